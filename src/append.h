/*
 * append.h
 *		Messages that turns add to their sessions; see append.c.
 */
#ifndef CHAT_APPEND_H
#define CHAT_APPEND_H

#include "postgres.h"

#include "utils/uuid.h"

/* A message to be; the columns that may be NULL are (Datum) 0 then. */
typedef struct ChatNewMessage
{
	pg_uuid_t	session;
	int64		sequence;
	pg_uuid_t	id;
	Datum		role;			/* text */
	Datum		content;		/* text or NULL */
	Datum		refusal;		/* text or NULL */
	Datum		tool_calls;		/* jsonb or NULL */
	Datum		function_call;	/* jsonb or NULL */
	pg_uuid_t	task;
	Datum		metadata;		/* jsonb */
	int64		superseded_by;	/* 0 = the model sees it */
} ChatNewMessage;

/* Appends messages; what they point to has to last until then. */
extern void chat_append_messages(const ChatNewMessage *messages, int n);

#endif							/* CHAT_APPEND_H */
