/*
 * queue.h
 *		The job table: claim, finish, retry, give back, orphans.
 *
 * Everything works on arrays of jobs and costs a handful of statements,
 * however many jobs there are.  Each runs in the caller's transaction.
 */
#ifndef CHAT_QUEUE_H
#define CHAT_QUEUE_H

#include "postgres.h"

#include "utils/timestamp.h"
#include "utils/uuid.h"

/* What a job has waited for already, before its request: a set. */
#define CHAT_WAITED_SUMMARY 1
#define CHAT_WAITED_PROMPT 2

/* A claimed job and what its session and task say. */
typedef struct ChatJob
{
	int64		id;
	int64		epoch;
	pg_uuid_t	session;
	pg_uuid_t	task;
	pg_uuid_t	answer;			/* id of the assistant message to come */
	Oid			owner;
	int			attempts;		/* with this one */
	int			crashes;
	int			blamed;			/* crashes while a worker was at work on it */
	int			steps;			/* that the task has made */
	bool		first;			/* the task's first claim ever */
	bool		reset;			/* listeners saw something that is void now */
	bool		cancel;
	int64		tokens;			/* that the task has used */
	int			waited;			/* CHAT_WAITED_...: what for, in this step */
	int64		shrink_to;		/* tokens that a request may have, 0 = any */
	char	   *summary;		/* of the session, NULL = none */
	int64		summary_sequence;	/* how far it reaches */
	bool		summary_failed; /* a short time ago */
	bool		untitled;		/* a user's message starts, no title yet */
	int64		seq;			/* of the last event */
	int16		slot;
	char	   *channel;
	char	   *server;
	char	   *user_id;		/* NULL = anonymous */
	char	   *settings;		/* session's, with the task's options over it */
} ChatJob;

typedef enum ChatEndKind
{
	CHAT_END_COMPLETED,
	CHAT_END_FAILED,
	CHAT_END_CANCELLED,
	CHAT_END_TOOLS,				/* the step is over, its tools run */
	CHAT_END_RETRY,				/* the job goes back, to run later */
	CHAT_END_GIVE_BACK			/* the job goes back, the attempt never was */
} ChatEndKind;

/* How an attempt at a job ended, and what it leaves. */
typedef struct ChatEnd
{
	const ChatJob *job;
	ChatEndKind kind;
	bool		ok;				/* out: stored; the job was still ours */
	bool		missed;			/* out: somebody holds the session locked */
	/* CHAT_END_RETRY, CHAT_END_GIVE_BACK */
	TimestampTz run_at;
	bool		reset;
	int64		last_seq;
	int			waited;			/* CHAT_WAITED_..., to be added */
	int64		shrink_to;		/* tokens of the next request, 0 = as it is */
	/* the others */
	const char *error;			/* JSON object or NULL */
	bool		has_message;
	const char *content;		/* text or NULL, each */
	const char *refusal;
	const char *tool_calls;		/* JSON */
	const char *function_call;	/* JSON */
	const char *metadata;		/* JSON object, never NULL */
	int64		context_tokens; /* estimate of the request, 0 = none was made */
	const char *compaction;		/* how it was made to fit, NULL = it did */
	int64		prompt_tokens;
	int64		completion_tokens;
	const char *usage;			/* JSON object or NULL: no request was made */
	/* CHAT_END_TOOLS: [{"id", "name", "arguments", "input" or "error"}] */
	const char *calls;
} ChatEnd;

/* What a claim asks for, and what it had to choose from. */
typedef struct ChatClaim
{
	int64		holder;
	int			limit;
	bool		bare;			/* without the queued messages */
	bool		cancelled;		/* only jobs that shall end: they need no room */
	/* turn by turn among the owners, and within the servers' room */
	bool		fair;
	int			nowners;		/* that have jobs at work here */
	Oid		   *owners;
	int		   *held;
	int			nservers;		/* that take fewer than limit */
	const char **servers;
	int		   *rooms;
} ChatClaim;

/* What is left in the queue after a claim. */
typedef struct ChatQueueRest
{
	bool		due;			/* jobs of servers that have room */
	bool		closed;			/* jobs of those that have none */
	bool		cancelled;		/* jobs that shall end */
	bool		turns;			/* parked tasks that are due */
	bool		parked;			/* any parked task */
	bool		tools;			/* tool jobs that are due */
	bool		sides;			/* titles and summaries that are due */
	TimestampTz next_run;		/* of jobs not yet due, DT_NOEND = none */
} ChatQueueRest;

#define CHAT_STRAY_MESSAGE \
	"the task has lost its job: the database was restored or copied"

/* A task that was ended because no job would ever have ended it. */
typedef struct ChatStray
{
	pg_uuid_t	task;
	bool		told;			/* it has events: they need an end */
	int64		seq;			/* of the last event: a new run's */
	int16		slot;
	char	   *channel;
} ChatStray;

extern int	chat_queue_claim(const ChatClaim *claim, ChatJob **jobs,
							 ChatQueueRest *rest);
extern void chat_queue_finish(int64 holder, ChatEnd **ends, int n);
extern void chat_queue_release(int64 holder, ChatEnd **ends, int n);
extern void chat_queue_move(int64 ms);
extern int	chat_queue_holders(int64 **holders);
extern int	chat_queue_adopt(const int64 *dead, int ndead, int max_crashes);
extern void chat_queue_blame(const int64 *jobs, int n);
extern int	chat_queue_strays(ChatStray **strays, bool *skipped);
extern int	chat_queue_held(int64 holder, int64 **ids, int64 **epochs,
							bool **cancels);
extern int	chat_queue_lock(ChatEnd **ends, int n, ChatEnd **locked);
extern void chat_queue_mark(ChatEnd **ends, int n);
extern int32 chat_queue_first_run(void);
extern bool chat_queue_intact(int64 holder, int64 count, int64 epochs);

#endif							/* CHAT_QUEUE_H */
