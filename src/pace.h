/*
 * pace.h
 *		When answers are read and stored.
 *
 * A tick is what lies between two flushes: the answers that it reads are
 * stored together, in as many turns of the loop as reading them takes.
 */
#ifndef CHAT_PACE_H
#define CHAT_PACE_H

#include "postgres.h"

/* Anybody may read it; pace.c changes it. */
typedef struct ChatPace
{
	uint64		tick;			/* number of the current one */
	bool		early;			/* it is before that of the next flush */
	bool		held;			/* no answers are read in it */
	bool		reading;		/* more of them are to be read in it */
} ChatPace;

extern ChatPace chat_pace;

extern void chat_pace_init(void);

/* Begins a tick, unless the last one is still being read. */
extern void chat_pace_begin(void);

/* Notes that answers were read, and whether there are more. */
extern void chat_pace_read(bool more);

/* Notes that what was read is stored. */
extern void chat_pace_flushed(void);

/* Returns the time before which no flush begins. */
extern int64 chat_pace_next(void);

/* True if so much is going on that transactions are shared. */
extern bool chat_pace_is_busy(void);

/* Notes that a claim was made, begun at that time. */
extern void chat_pace_claimed(int64 begun);

/* Returns the time before which new turns are not claimed. */
extern int64 chat_pace_claim(void);

/* Returns when answers are to be read that the descriptor does not tell of. */
extern int64 chat_pace_due(int64 now);

#endif							/* CHAT_PACE_H */
