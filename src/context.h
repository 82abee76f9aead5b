/*
 * context.h
 *		Conversation to request: the stored messages as the provider takes
 *		them.
 */
#ifndef CHAT_CONTEXT_H
#define CHAT_CONTEXT_H

#include "postgres.h"

#include "provider.h"
#include "queue.h"
#include "server.h"

/* what chat_context_row() reads, of chat.chat_message AS m */
#define CHAT_CONTEXT_COLUMNS \
	" m.sequence, m.role, m.content, m.name, m.tool_call_id, m.refusal," \
	" m.parts, m.tool_calls, m.function_call, m.metadata "

/*
 * Reads CHAT_CONTEXT_COLUMNS of a row of the last statement, the first of
 * them at column first, for a request to a server (NULL = any).  The texts
 * live as long as the result.
 */
extern void chat_context_row(ChatMessage *message, uint64 row, int first,
							 const char *server);

/* The messages of one request. */
typedef struct ChatContext
{
	ChatMessage *messages;
	int			n;
	/* the last request of the session that the endpoint has counted: */
	int64		counted;		/* its tokens, 0 = there is none, */
	int64		estimated;		/* and what they were estimated at */
	bool		cut;			/* there are older messages, left out */
	bool		large;			/* because of their size, */
	bool		too_large;		/* and what may not be left out is too large */
	Size		size;			/* of what was read */
	bool		later;			/* the others of the claim are all it takes */
	bool		summarized;		/* the first message is a summary */
} ChatContext;

/* Declares the settings of contexts. */
extern void chat_context_init(void);

/*
 * Reads what the model shall see of the sessions of a claim, in one query:
 * contexts[i] belongs to jobs[i].
 */
extern void chat_context_load(const ChatJob *jobs, int n,
							  ChatContext *contexts);

/*
 * Makes a history one that the API takes: each tool call of an assistant
 * message is followed by its one result, each result follows its call.
 */
extern void chat_context_repair(ChatContext *context);

/*
 * Sees to it that the request of a task whose tools have run does not end
 * with an assistant message: when other turns came in between, an item is
 * added that says which operation has ended with what.
 */
extern void chat_context_close(const ChatJob *job, ChatContext *context);

/*
 * Builds the body of a job's request; sets in *server the time limits that
 * the session's settings put over it.
 */
extern char *chat_context_request(const ChatJob *job, ChatServer *server,
								  const ChatContext *context,
								  const char *system, const char *tools,
								  int *len);

/* Returns how many bytes the messages of a request may have. */
extern int64 chat_context_most(void);

/* Returns a setting of a job's session as text, NULL if it has none. */
extern char *chat_context_setting(const ChatJob *job, const char *name);

/* Returns a member of a JSON object as text, NULL if it has none. */
extern char *chat_context_member(const char *object, const char *name);

#endif							/* CHAT_CONTEXT_H */
