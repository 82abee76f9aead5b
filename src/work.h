/*
 * work.h
 *		What all parts of the streaming worker share: transactions that may
 *		fail, the memory of a turn of the loop, and what is due.
 */
#ifndef CHAT_WORK_H
#define CHAT_WORK_H

#include "postgres.h"

#define CHAT_NEVER PG_INT64_MAX

/* what failed is tried again after so long, in ms; it doubles each time */
#define CHAT_MIN_BACKOFF 10
#define CHAT_MAX_BACKOFF 1000

/* How a transaction goes about the one item that made it fail. */
typedef enum ChatWorkMode
{
	CHAT_WORK_BATCH,
	CHAT_WORK_SINGLE,			/* one by one, to find it */
	CHAT_WORK_BARE				/* found: without its content, to fail it */
} ChatWorkMode;

/* What the loop is to do; times in ms of chat_stream_clock(). */
typedef struct ChatDue
{
	int64		claim;			/* 0 = the bell rang */
	int64		rest;			/* look at the queue: a retry, locked jobs */
	int64		check;			/* a stream's timeout */
	int64		beat;			/* heartbeats */
	int64		strays;			/* tasks without a job */
	int64		adopt;			/* jobs of the dead */
	bool		turns;			/* parked tasks have something to do */
	int64		turns_retry;	/* those that are due are locked: not before */
	bool		tools;			/* tool jobs may be ready */
	bool		sides;			/* title and summary jobs may be ready */
} ChatDue;

extern ChatDue chat_due;

/* Begins the memory of a turn, which is current in the loop; forgets it. */
extern void chat_work_start(void);
extern void chat_work_reset(void);

/* Allocates what a transaction leaves to the rest of the turn, zeroed. */
extern void *chat_work_alloc(Size size);

/*
 * Runs work in a transaction of its own; returns NULL, or the error, which
 * was logged.  durable = the commit waits for the log.
 */
extern ErrorData *chat_work_try(const char *activity, bool durable,
								void (*work) (void *), void *arg);

/* True if an error says nothing about the row: it is waited out. */
extern bool chat_work_is_systemic(const ErrorData *edata);

/* True if the transaction is to be run again without notifications. */
extern bool chat_work_is_too_loud(const ErrorData *edata);

#endif							/* CHAT_WORK_H */
