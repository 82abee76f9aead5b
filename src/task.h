/*
 * task.h
 *		The runtime functions that users call: start, cancel, wait.
 */
#ifndef CHAT_TASK_H
#define CHAT_TASK_H

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

extern void chat_task_init(void);

/* Raises what is wrong with the arguments, as far as no table tells it. */
extern void chat_task_check(const ChatCall *c);

/*
 * Queues the turn of a call that was checked, between chat_db_enter() and
 * chat_db_leave(); returns its task.  Locks the session's row.
 */
extern pg_uuid_t chat_task_queue(const ChatScope *scope, const ChatCall *c);

#endif							/* CHAT_TASK_H */
