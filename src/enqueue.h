/*
 * enqueue.h
 *		Turns that go into the tables; see enqueue.c.
 */
#ifndef CHAT_ENQUEUE_H
#define CHAT_ENQUEUE_H

#include "postgres.h"

#include "utils/jsonb.h"
#include "utils/uuid.h"

#include "db.h"

/* The arguments of stream_chat_completion, NULL = not given. */
typedef struct ChatCall
{
	pg_uuid_t  *session;
	text	   *message;
	bool		is_user_message;
	text	   *user_id;
	Jsonb	   *context;
	pg_uuid_t  *message_id;
	char	   *server;
	Jsonb	   *options;
	const char *on_busy;		/* NULL = enqueue */
} ChatCall;

/*
 * Queues the turn of a call that was checked, between chat_db_enter() and
 * chat_db_leave(); returns its task.  Locks the session's row.
 */
extern pg_uuid_t chat_enqueue(const ChatScope *scope, const ChatCall *c);

#endif							/* CHAT_ENQUEUE_H */
