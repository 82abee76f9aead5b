/*
 * outbox.c
 *		Events on their way out of a worker: rows, notifications, and what is
 *		to be known of them.
 *
 * Owns nothing; runs in a transaction of the worker.
 */
#include "postgres.h"

#include "debug.h"
#include "outbox.h"
#include "retention.h"
#include "shmem.h"
#include "stream.h"

/* Writes and notifies the events of a batch, and counts them. */
void
chat_outbox_write(ChatEventBatch *batch, bool quiet)
{
	chat_event_write(batch);
	if (!quiet && batch->n > 0)
		chat_debug_notify();
	if (quiet || chat_event_queue_full())
		pg_atomic_fetch_add_u64(&chat_slot->counters.unnotified, batch->n);
	else
		chat_event_notify(batch);
	pg_atomic_fetch_add_u64(&chat_slot->counters.events, batch->n);
	if (batch->n > 0)
		chat_retention_written(chat_stream_clock());
}
