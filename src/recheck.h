/*
 * recheck.h
 *		What the tables say of the worker: whether its extension is there,
 *		whether it may take jobs, and which ones it has.
 */
#ifndef CHAT_RECHECK_H
#define CHAT_RECHECK_H

#include "postgres.h"

extern void chat_recheck_init(void);

/* Finds the extension; ends the process when there is none. */
extern void chat_recheck_start(void);

/* Drops the streams whose job is gone, cancels those that shall end. */
extern void chat_recheck_run(void);

/* Returns when that is due, CHAT_NEVER if it is not. */
extern int64 chat_recheck_due(void);

/* True if an administrator has paused the workers. */
extern bool chat_recheck_is_paused(void);

/* True if the worker may take something from the queue. */
extern bool chat_recheck_may_claim(void);

#endif							/* CHAT_RECHECK_H */
