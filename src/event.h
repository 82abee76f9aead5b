/*
 * event.h
 *		Event streams of tasks: gathered in a log, stored as rows, notified.
 *
 * A log holds what happened to one task since its last flush, without
 * numbers; consecutive deltas of one block become one.  A flush adds the
 * logs of many tasks to a batch, which numbers them, cuts what is too long
 * for a notification, and writes them in the current transaction.  A log is
 * cleared, and its task's seq moved, only after the commit.
 */
#ifndef CHAT_EVENT_H
#define CHAT_EVENT_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "utils/uuid.h"

/* A payload of NOTIFY must be shorter than 8000 bytes (async.c). */
#define CHAT_EVENT_MAX_PAYLOAD 7999

/* the runs of a task are this far apart in seq */
#define CHAT_EVENT_RUN_SHIFT 32

/* How the deltas of one kind of block are written. */
typedef struct ChatDeltaType
{
	const char *type;			/* "text-delta" */
	const char *id_member;		/* "id" */
	const char *text_member;	/* "delta" */
} ChatDeltaType;

extern const ChatDeltaType chat_text_delta;
extern const ChatDeltaType chat_reasoning_delta;
extern const ChatDeltaType chat_tool_input_delta;

typedef struct ChatEventItem
{
	const ChatDeltaType *delta; /* NULL: the text is a JSON object */
	const char *id;				/* of the block; lives as long as the log */
	int			start;			/* in ChatEventLog.text */
	int			len;
} ChatEventItem;

typedef struct ChatEventLog
{
	StringInfoData text;		/* data == NULL while nothing was added */
	ChatEventItem *items;
	int			nitems;
	int			maxitems;
} ChatEventLog;

/* Where the events of a task go. */
typedef struct ChatEventTarget
{
	pg_uuid_t	task;
	char		task_text[37];
	int16		slot;
	char	   *channel;
} ChatEventTarget;

/* The rows of one transaction. */
typedef struct ChatEventBatch
{
	int			n;
	int			max;
	Datum	   *columns[4];		/* slot, task_id, seq, payload */
	char	  **channels;
	char	  **notices;		/* what is notified of each row */
} ChatEventBatch;

extern void chat_event_init(void);
extern void chat_event_aim(ChatEventTarget *target, const pg_uuid_t *task,
						   int16 slot, char *channel);
extern void chat_event_add(ChatEventLog *log, MemoryContext context,
						   const char *json);
extern void chat_event_delta(ChatEventLog *log, MemoryContext context,
							 const ChatDeltaType *delta, const char *id,
							 const char *text, size_t len);
extern void chat_event_clear(ChatEventLog *log);
extern int64 chat_event_collect(ChatEventBatch *batch,
								const ChatEventTarget *target, int64 seq,
								const ChatEventLog *log);
extern void chat_event_write(ChatEventBatch *batch);
extern void chat_event_notify(ChatEventBatch *batch);
extern void chat_event_heartbeat(const char *channel, const char *task);
extern bool chat_event_queue_full(void);

#endif							/* CHAT_EVENT_H */
