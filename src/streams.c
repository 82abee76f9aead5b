/*
 * streams.c
 *		The set of streams that the worker has open.
 *
 * Owns chat_streams: all of them, those that have something to flush, how many
 * there are and may be.  It is local to the process; the numbers are published
 * in the worker's slot in shared memory.
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/memutils.h"

#include "shmem.h"
#include "streams.h"
#include "throttle.h"
#include "work.h"

/*
 * With many streams, starts and ends go in batches of so many: the tokens of
 * the others wait for no more than that between two flushes.
 */
#define BUSY_BATCH 32

ChatStreams chat_streams = {
	.all = DLIST_STATIC_INIT(chat_streams.all),
	.dirty = DLIST_STATIC_INIT(chat_streams.dirty),
};

/* Makes the memory that streams live in. */
void
chat_streams_start(void)
{
	chat_streams.context = AllocSetContextCreate(TopMemoryContext,
												 "chat worker",
												 ALLOCSET_DEFAULT_SIZES);
}

/*
 * Ends the request of a stream that has ended: its server has room again,
 * whenever the end is stored.  One that was answered in full keeps its
 * connection until the last bytes have come.
 */
static void
end_request(ChatStream *s)
{
	if (chat_throttle_end(s))
	{
		chat_due.claim = 0;
		chat_shmem_ring(MyDatabaseId, false);
	}
	if (s->end.kind != CHAT_END_COMPLETED && s->end.kind != CHAT_END_TOOLS)
		chat_stream_close(s);
}

/* Notes that a stream has something to flush. */
void
chat_streams_mark(ChatStream *s)
{
	if (s->ended)
		end_request(s);
	if (s->dirty)
		return;
	s->dirty = true;
	dlist_push_tail(&chat_streams.dirty, &s->dirty_node);
}

/* Takes a stream off the list of those to flush. */
void
chat_streams_unmark(ChatStream *s)
{
	if (!s->dirty)
		return;
	s->dirty = false;
	dlist_delete(&s->dirty_node);
}

/* Publishes how many streams are open. */
static void
count_streams(void)
{
	pg_atomic_write_u64(&chat_slot->counters.open_streams, chat_streams.n);
	pg_atomic_write_u64(&chat_slot->counters.limit, chat_streams.limit);
}

/* Adds a stream whose claim is committed. */
void
chat_streams_add(ChatStream *s)
{
	dlist_push_tail(&chat_streams.all, &s->node);
	chat_streams.n++;
	chat_streams.epochs += s->job.epoch;
	count_streams();
}

/* Frees a stream: its end is stored, or its job is not ours any more. */
void
chat_streams_drop(ChatStream *s)
{
	chat_streams_unmark(s);
	if (!s->ended)
		s->end.kind = CHAT_END_GIVE_BACK;
	end_request(s);
	dlist_delete(&s->node);
	chat_streams.n--;
	chat_streams.epochs -= s->job.epoch;
	count_streams();
	chat_stream_free(s);
	/* with the last one goes what it was to be looked at for (P9) */
	if (chat_streams.n == 0)
		chat_due.check = 0;
}

/* Returns how many starts or ends one transaction takes. */
int
chat_streams_batch(int most)
{
	return chat_streams.n > CHAT_MANY_STREAMS ? BUSY_BATCH : most;
}

/* Sets how many streams may be open. */
void
chat_streams_set_limit(int limit)
{
	chat_streams.limit = limit;
	count_streams();
}
