/*
 * replay.h
 *		The event stream of a task again, from its messages.
 */
#ifndef CHAT_REPLAY_H
#define CHAT_REPLAY_H

#include "postgres.h"

#include "provider.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

/*
 * The events of a replay are numbered from here on: beyond every run of a
 * task, and below 2^53, so that JavaScript keeps the numbers apart.
 */
#define CHAT_REPLAY_SEQ (INT64CONST(1) << 52)

/* An event as readers get it. */
typedef struct ChatEventRow
{
	int64		seq;
	TimestampTz at;
	ChatStr		json;
} ChatEventRow;

typedef struct ChatEventRows
{
	ChatEventRow *rows;
	int			n;
	int			max;
} ChatEventRows;

/* What a replay has to know of the task. */
typedef struct ChatReplayTask
{
	pg_uuid_t	id;
	pg_uuid_t	session;
	pg_uuid_t	answer;			/* id of the message, if none is stored */
	const char *status;
	bool		started;		/* it had its turn */
	bool		ended;
	const char *error;			/* JSON object or NULL */
	const char *usage;			/* the same */
	TimestampTz at;				/* when it ended, else when it was made */
} ChatReplayTask;

extern void chat_replay_task(const ChatReplayTask *task, ChatEventRows *out);
extern ChatEventRow *chat_replay_add(ChatEventRows *rows);

#endif							/* CHAT_REPLAY_H */
