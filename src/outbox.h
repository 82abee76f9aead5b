/*
 * outbox.h
 *		Events on their way out of a worker.
 */
#ifndef CHAT_OUTBOX_H
#define CHAT_OUTBOX_H

#include "postgres.h"

#include "event.h"

/* In a transaction: writes and notifies events, and counts them. */
extern void chat_outbox_write(ChatEventBatch *batch, bool quiet);

#endif							/* CHAT_OUTBOX_H */
