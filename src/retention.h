/*
 * retention.h
 *		Event streams are kept for a while: the rotation of the slots.
 *
 * The worker's loop calls in here; all times are in ms of its clock.
 */
#ifndef CHAT_RETENTION_H
#define CHAT_RETENTION_H

#include "postgres.h"

#define CHAT_RETENTION_NEVER PG_INT64_MAX

/* What one transaction has done. */
typedef struct ChatRetired
{
	int64		holder;			/* in: the worker's identity */
	bool		moved;			/* unfinished streams went to another slot */
	int16		from;
	int16		to;
	bool		busy;			/* somebody is in the way: later */
	bool		more;			/* there is more to do at once */
	int64		next;			/* ms until something is due; -1 = nothing */
} ChatRetired;

extern void chat_retention_init(void);
extern void chat_retention_written(int64 now);
extern void chat_retention_recheck(void);
extern int64 chat_retention_due(void);
extern void chat_retention_work(void *retired);
extern void chat_retention_done(const ChatRetired *retired, bool failed,
								int64 now);

#endif							/* CHAT_RETENTION_H */
