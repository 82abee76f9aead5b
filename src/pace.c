/*
 * pace.c
 *		When answers are read and stored.
 *
 * Owns the current tick and what the last flush took, local to the process.
 * Up to CHAT_MANY_STREAMS each turn of the loop is a tick.  What more streams
 * send is read when it can be stored, and then all of it: so many tokens share
 * a commit, and the time goes into answers, not into turns of the loop.
 */
#include "postgres.h"

#include "utils/guc.h"

#include "http.h"
#include "pace.h"
#include "stream.h"
#include "streams.h"
#include "work.h"

/* up to so many open streams each flush is made at once */
#define FEW_STREAMS 4
/* chat.flush_interval is for so many streams, and up to MAX_PACE times that */
#define PACE_STREAMS 400
#define MAX_PACE 10
/* answers are held back for no longer, in ms: a held stream seems silent */
#define MAX_HOLD 100

ChatPace	chat_pace;

static int	flush_interval = 10;

/* claims rest for so many times as long as they take */
#define CLAIM_REST 2

/* times, in ms of chat_stream_clock() */
static int64 claim_at = 0;		/* no claim before */
static int64 tick_at = 0;		/* the answers of this tick are read since */
static int64 flushed_at = 0;	/* the tick of the last flush */
static int64 flush_took = 0;	/* that tick, up to then */

static int	tick_reads = 0;

/* Declares the setting of the pace. */
void
chat_pace_init(void)
{
	DefineCustomIntVariable("chat.flush_interval",
							"Shortest time between two flushes of deltas.",
							NULL, &flush_interval, 10, 0, 10000,
							PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
}

/* True if so much is going on that transactions are shared. */
bool
chat_pace_is_busy(void)
{
	return chat_streams.n > FEW_STREAMS;
}

/*
 * Returns the time before which no flush begins: a few streams wait for
 * nothing, many share their commits, and very many send more than one token
 * between two.
 */
int64
chat_pace_next(void)
{
	int64		interval = flush_interval;

	if (!chat_pace_is_busy())
		interval = 0;
	else if (chat_streams.n > PACE_STREAMS)
		interval = Min(interval * chat_streams.n / PACE_STREAMS,
					   interval * MAX_PACE);
	return flushed_at + Max(interval, flush_took);
}

/* Begins a tick, unless the last one is still being read. */
void
chat_pace_begin(void)
{
	if (chat_pace.reading)
		return;
	/* what many send is read when it can be stored, and then all of it */
	tick_at = chat_stream_clock();
	tick_reads = 0;
	chat_pace.tick++;
	chat_pace.early = chat_streams.n > CHAT_MANY_STREAMS &&
		tick_at < chat_pace_next();
	chat_pace.held = chat_pace.early && tick_at < flushed_at + MAX_HOLD;
	chat_http_hold(chat_pace.held);
}

/* Notes that answers were read; a tick has an end, whatever comes. */
void
chat_pace_read(bool more)
{
	chat_pace.reading = more &&
		++tick_reads <= chat_streams.n / CHAT_HTTP_BATCH;
}

/* Notes that what was read is stored. */
void
chat_pace_flushed(void)
{
	flushed_at = tick_at;
	flush_took = chat_stream_clock() - tick_at;
}

/*
 * Notes that a claim was made, begun at that time.  Where a few streams are
 * open, the next one comes at once; where there are more, new turns wait for
 * each other, so that they share what a claim costs whatever its size.
 */
void
chat_pace_claimed(int64 begun)
{
	int64		now = chat_stream_clock();

	claim_at = !chat_pace_is_busy() ? now
		: now + Min(1 + CLAIM_REST * (now - begun), flush_interval);
}

/* True if the next flush has something to store, beside ends that wait. */
static bool
has_dirty(int64 now)
{
	dlist_iter	iter;

	dlist_foreach(iter, &chat_streams.dirty)
	{
		ChatStream *s = dlist_container(ChatStream, dirty_node, iter.cur);

		if (!s->ended || s->retry_end_at <= now)
			return true;
	}
	return false;
}

/*
 * Returns the time before which new turns are not claimed.  Where many streams
 * share their commits, new ones share theirs, too.
 */
int64
chat_pace_claim(void)
{
	if (chat_pace.held || chat_pace.reading)
		return chat_pace_next();
	/* what ends with the next flush shares its transaction */
	return chat_pace_is_busy() && has_dirty(chat_stream_clock())
		? Max(claim_at, chat_pace_next()) : claim_at;
}

/* Returns when answers are to be read that the descriptor does not tell of. */
int64
chat_pace_due(int64 now)
{
	int64		due = chat_pace.reading ? now : CHAT_NEVER;

	if (chat_pace.held)
		due = Min(due, Min(chat_pace_next(), flushed_at + MAX_HOLD));
	return due;
}
