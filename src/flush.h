/*
 * flush.h
 *		Storing what the streams have gathered.
 */
#ifndef CHAT_FLUSH_H
#define CHAT_FLUSH_H

#include "postgres.h"

/* What shares the transaction of the ends, if there are any. */
typedef struct ChatFlushGuest
{
	void		(*work) (void *arg);	/* in the transaction */
	void		(*committed) (void *arg);
	void		(*undone) (void *arg);	/* it failed: to be done alone */
	void	   *arg;
} ChatFlushGuest;

/* Stores deltas, then ends, with a guest or NULL. */
extern void chat_flush_run(const ChatFlushGuest *guest);

/* Returns when that is due, CHAT_NEVER if there is nothing to store. */
extern int64 chat_flush_due(void);

#endif							/* CHAT_FLUSH_H */
