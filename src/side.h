/*
 * side.h
 *		Requests that the worker makes beside the turns: titles, summaries,
 *		prompts of a prompt store.
 *
 * The transport is the same for all: claimed or asked for in a transaction,
 * sent after its commit, received, stored in another.  What is asked and what
 * becomes of the answer belongs to title.c, summary.c and langfuse.c.
 */
#ifndef CHAT_SIDE_H
#define CHAT_SIDE_H

#include "postgres.h"

#include "http.h"
#include "lib/ilist.h"
#include "provider.h"
#include "server.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

/* priority of the jobs that nobody waits for: titles; a turn waits for others */
#define CHAT_SIDE_IDLE "10"

typedef struct ChatSide ChatSide;

/* What one kind of request does; each runs in a transaction. */
typedef struct ChatSideType
{
	const char *kind;			/* of its jobs, NULL = it has none */
	bool		idle;			/* nobody waits for it */

	/* builds side->body in side->context; an error ends the request */
	void		(*prepare) (ChatSide *side);

	/* reads the whole body of an answer of the 200s; false = it is no answer */
	bool		(*read) (ChatSide *side, const char *body, size_t len);

	/*
	 * Stores what came, or that nothing did (side->failed), and deletes the
	 * job.  False = somebody holds the session locked: again later.
	 */
	bool		(*store) (ChatSide *side, int64 holder);
} ChatSideType;

struct ChatSide
{
	dlist_node	node;
	MemoryContext context;
	const ChatSideType *type;
	/* the job, where there is one */
	int64		job;			/* 0 = none */
	int64		epoch;
	int			crashes;
	pg_uuid_t	session;
	pg_uuid_t	task;
	Oid			owner;
	char	   *server_name;
	char	   *channel;
	char	   *user_id;
	char	   *settings;		/* of the session */
	char	   *input;			/* of the job, JSON or NULL */
	/* the request */
	ChatServer *server;
	char	   *key;			/* wiped with it */
	char	   *url;			/* NULL = the completions of server */
	char	   *body;			/* NULL = GET */
	char	   *header;			/* instead of those of server, wiped */
	ChatTransfer *transfer;
	int			endpoint;		/* that counts it, -1 = none */
	int64		due;			/* chat_stream_clock() */
	/* the answer */
	bool		ended;
	bool		failed;
	bool		worked;			/* the endpoint did: it was no refusal */
	bool		rate_limited;	/* by a 429 */
	char	   *error;			/* why, without keys */
	char	   *text;
	char	   *model;
	ChatUsage	usage;
	/* storing it */
	int64		store_at;		/* not before */
	int			tries;
	bool		stored;
	void	   *extra;			/* the type's own */
};

/* Makes a type known that has jobs: when the module is loaded. */
extern void chat_side_register(const ChatSideType *type);

/* In a transaction: takes up to most jobs that wait; returns how many. */
extern int	chat_side_claim(int64 holder, int most);

/*
 * True if a turn waits for a request that has found no room at its server: it
 * is to be claimed before other turns.
 */
extern bool chat_side_is_urgent(void);

/* In a transaction: asks for something that has no job; fields to be set. */
extern ChatSide *chat_side_add(const ChatSideType *type);

/* After the commit: sends the requests; after a failure: forgets them. */
extern void chat_side_open(bool committed);

/* Takes what a transfer has received. */
extern void chat_side_receive(ChatTransfer *transfer);

/* Ends what takes too long; returns when to look again (worker's clock). */
extern int64 chat_side_check_time(int64 now);

/*
 * When results can be stored, or room be found for what waits, PG_INT64_MAX =
 * there is nothing.
 */
extern int64 chat_side_due(void);

/* In a transaction: stores the results; after its end: forgets them. */
extern void chat_side_store(int64 holder);
extern void chat_side_stored(bool committed);

/* Ends the requests whose jobs are not among ids any more. */
extern void chat_side_keep(const int64 *ids, int n);

/* True if no request is under way. */
extern bool chat_side_idle(void);

/* In a transaction: gives the jobs back, at the end of the process. */
extern void chat_side_give_back(int64 holder);

/* Finds a request that is under way. */
extern ChatSide *chat_side_find(bool (*match) (const ChatSide *, void *),
								void *arg);

/* For types that ask a model: one message, a few tokens, no stream. */
extern char *chat_side_completion(const ChatSide *side, const char *model,
								  const char *system, const char *text,
								  int max_tokens);
extern bool chat_side_read_completion(ChatSide *side, const char *body,
									  size_t len);
extern void chat_side_count(const ChatSide *side, const char *kind);

#endif							/* CHAT_SIDE_H */
