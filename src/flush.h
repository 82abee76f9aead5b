/*
 * flush.h
 *		Storing what the streams have gathered.
 */
#ifndef CHAT_FLUSH_H
#define CHAT_FLUSH_H

#include "postgres.h"

/* Stores deltas, then ends. */
extern void chat_flush_run(void);

/* Returns when that is due, CHAT_NEVER if there is nothing to store. */
extern int64 chat_flush_due(void);

#endif							/* CHAT_FLUSH_H */
