/*
 * claim.h
 *		Taking jobs from the queue.
 */
#ifndef CHAT_CLAIM_H
#define CHAT_CLAIM_H

#include "postgres.h"

#include "flush.h"

extern void chat_claim_init(void);

/* Takes jobs, makes streams of them and sends their requests. */
extern void chat_claim_run(void);

/* The same within the transaction of a flush; false if it is not to be. */
extern bool chat_claim_join(ChatFlushGuest *guest);

/* Returns when the queue is to be looked at. */
extern int64 chat_claim_due(void);

/* Takes up what dead workers have left. */
extern void chat_claim_adopt(void);

#endif							/* CHAT_CLAIM_H */
