/*
 * flush.c
 *		Storing what the streams have gathered.
 *
 * A flush is deltas of all streams in one transaction that is not waited for,
 * then ends and retries in a durable one, which a claim may share: where many
 * turns end, many begin.  A stream's state advances only after the commit.  A
 * transaction that fails is repeated stream by stream, without the claim, and
 * the stream that fails alone has failed; an error of the system is waited
 * out.
 *
 * Owns the time of the next try after an error, and in which tick the fence
 * was passed: our jobs are those that we think.  Both are local to the
 * process.
 */
#include "postgres.h"

#include "event.h"
#include "flush.h"
#include "http.h"
#include "outbox.h"
#include "pace.h"
#include "queue.h"
#include "recheck.h"
#include "shmem.h"
#include "stream.h"
#include "streams.h"
#include "turn.h"
#include "work.h"

/* ends of one transaction */
#define MAX_ENDS 1000
/* flushes in a row that may fail for want of memory until a stream fails */
#define MAX_MEMORY_TRIES 10

static int64 flush_due = CHAT_NEVER;	/* not before, after an error */
static uint64 fence_tick = 0;	/* the fence was passed in this one */

/* The streams of one transaction, and what it writes. */
typedef struct Flush
{
	ChatStream **streams;
	int			n;
	int64	   *seqs;			/* of the last event after the commit */
	bool		quiet;			/* without notifications */
	bool		fenced;			/* out: our jobs are not what we think */
} Flush;

/* Transaction: the logs of the streams. */
static void
write_deltas(void *arg)
{
	Flush	   *f = arg;
	ChatEventBatch batch = {0};

	if (fence_tick != chat_pace.tick)
		f->fenced = !chat_queue_intact(chat_slot->identity, chat_streams.n,
									   chat_streams.epochs);
	if (f->fenced)
		return;
	for (int i = 0; i < f->n; i++)
		f->seqs[i] = chat_event_collect(&batch, &f->streams[i]->target,
										f->streams[i]->seq,
										&f->streams[i]->log);
	chat_outbox_write(&batch, f->quiet);
}

/* Advances the streams whose logs were committed. */
static void
deltas_committed(Flush *f)
{
	fence_tick = chat_pace.tick;
	for (int i = 0; i < f->n; i++)
	{
		ChatStream *s = f->streams[i];

		s->seq = f->seqs[i];
		s->memory_tries = 0;
		chat_event_clear(&s->log);
		if (!s->ended)
			chat_streams_unmark(s);
		if (s->transfer && s->transfer->paused)
			chat_http_pause(s->transfer, false);
		chat_shmem_publish(&s->job.task);
	}
}

/* The ends of one transaction by what is done with them. */
typedef struct EndLists
{
	ChatEnd   **finals;
	ChatEnd   **steps;			/* that asked for tools */
	ChatEnd   **backs;			/* jobs that go back to the queue */
	int			nfinals;
	int			nsteps;
	int			nbacks;
} EndLists;

/* Sorts the ends of a flush. */
static void
sort_ends(const Flush *f, EndLists *lists)
{
	memset(lists, 0, sizeof(*lists));
	lists->finals = palloc(sizeof(ChatEnd *) * f->n);
	lists->steps = palloc(sizeof(ChatEnd *) * f->n);
	lists->backs = palloc(sizeof(ChatEnd *) * f->n);
	for (int i = 0; i < f->n; i++)
	{
		ChatEnd    *e = &f->streams[i]->end;

		e->ok = e->missed = false;
		e->last_seq = f->streams[i]->seq;
		if (e->kind >= CHAT_END_RETRY)
			lists->backs[lists->nbacks++] = e;
		else if (e->kind == CHAT_END_TOOLS)
			lists->steps[lists->nsteps++] = e;
		else
			lists->finals[lists->nfinals++] = e;
	}
}

/* Parks the tasks whose steps were stored, now that their seq is known. */
static void
seal_steps(const Flush *f)
{
	ChatEnd   **ends = palloc(sizeof(ChatEnd *) * f->n);
	int64	   *seqs = palloc(sizeof(int64) * f->n);
	int			n = 0;

	for (int i = 0; i < f->n; i++)
	{
		ChatEnd    *e = &f->streams[i]->end;

		if (!e->ok || e->kind != CHAT_END_TOOLS)
			continue;
		ends[n] = e;
		seqs[n++] = f->seqs[i];
	}
	if (n > 0)
		chat_turn_seal(chat_slot->identity, ends, seqs, n);
}

/* Transaction: the ends of the streams. */
static void
write_ends(void *arg)
{
	Flush	   *f = arg;
	ChatEventBatch batch = {0};
	EndLists	lists;

	sort_ends(f, &lists);
	if (lists.nfinals > 0)
		chat_queue_finish(chat_slot->identity, lists.finals, lists.nfinals);
	if (lists.nsteps > 0)
		chat_turn_park(chat_slot->identity, lists.steps, lists.nsteps);
	if (lists.nbacks > 0)
		chat_queue_release(chat_slot->identity, lists.backs, lists.nbacks);
	/* locked by somebody, or not ours any more: recheck.c tells which */
	for (int i = 0; i < lists.nbacks; i++)
		lists.backs[i]->missed = !lists.backs[i]->ok;
	for (int i = 0; i < f->n; i++)
	{
		ChatStream *s = f->streams[i];

		f->seqs[i] = s->seq;
		if (!s->end.ok || s->end.kind >= CHAT_END_RETRY)
			continue;
		f->seqs[i] = chat_event_collect(&batch, &s->target, f->seqs[i],
										&s->log);
		f->seqs[i] = chat_event_collect(&batch, &s->target, f->seqs[i],
										&s->end_log);
	}
	if (lists.nsteps > 0)
		seal_steps(f);
	chat_outbox_write(&batch, f->quiet);
}

/* Has a stream's end stored later. */
static void
postpone_end(ChatStream *s)
{
	int			delay = Min(CHAT_MIN_BACKOFF << Min(s->end_tries, 10),
								CHAT_MAX_BACKOFF);

	s->end_tries++;
	s->retry_end_at = chat_stream_clock() + delay;
}

/* Counts how a stream ended. */
static void
count_end(const ChatStream *s)
{
	ChatCounters *c = &chat_slot->counters;

	switch (s->end.kind)
	{
		case CHAT_END_COMPLETED:
			pg_atomic_fetch_add_u64(&c->completed, 1);
			break;
		case CHAT_END_FAILED:
			pg_atomic_fetch_add_u64(&c->failed, 1);
			break;
		case CHAT_END_CANCELLED:
			pg_atomic_fetch_add_u64(&c->cancelled, 1);
			break;
		case CHAT_END_RETRY:
			pg_atomic_fetch_add_u64(&c->retried, 1);
			chat_due.rest = 0;		/* its time is in the table: look there */
			break;
		case CHAT_END_TOOLS:
			chat_due.turns = true;
			break;
		case CHAT_END_GIVE_BACK:
			break;
	}
}

/* Frees the streams whose ends were committed. */
static void
ends_committed(Flush *f)
{
	/* the last bytes of a body may have come: keep the connection */
	if (chat_streams.n <= CHAT_MANY_STREAMS)
		(void) chat_http_poll();
	for (int i = 0; i < f->n; i++)
	{
		ChatStream *s = f->streams[i];

		if (s->end.missed)
		{
			if (s->end.kind >= CHAT_END_RETRY)
				pg_atomic_write_u32(&chat_slot->recheck, 1);
			postpone_end(s);
			continue;
		}
		if (s->end.ok)
		{
			count_end(s);
			chat_shmem_publish(&s->job.task);
		}
		chat_streams_drop(s);
	}
	/* a session's next task may have become ready */
	chat_due.claim = 0;
}

/* Gives a stream that the database refuses an end that it will take. */
static void
fail_stream(ChatStream *s, const ErrorData *edata)
{
	MemoryContext old = MemoryContextSwitchTo(s->context);
	ChatEventLog none = {0};

	s->log = none;
	s->ended = false;
	s->end_log = none;
	chat_stream_fail(s, CHAT_ERROR_ENDPOINT_ERROR, false, 0,
					 psprintf("the answer could not be stored: %s",
							  edata->message));
	s->end.has_message = false;
	s->end.metadata = "{}";
	s->end.usage = NULL;
	MemoryContextSwitchTo(old);
	postpone_end(s);
	chat_streams_mark(s);
}

/*
 * Runs one of the two transactions of a flush; when it fails, without
 * notifications or stream by stream.  False: the system refuses, try later.
 */
static bool
flush_some(Flush *f, const char *activity, bool durable,
		   void (*work) (void *), void (*committed) (Flush *))
{
	ErrorData  *edata = chat_work_try(activity, durable, work, f);

	if (!f->quiet && chat_work_is_too_loud(edata))
	{
		f->quiet = true;
		edata = chat_work_try(activity, durable, work, f);
	}
	if (edata == NULL)
	{
		if (!f->fenced)
			committed(f);
		return !f->fenced;
	}
	/* many large ends may be more than there is memory for, each alone not */
	if (chat_work_is_systemic(edata) &&
		(edata->sqlerrcode != ERRCODE_OUT_OF_MEMORY ||
		 (f->n == 1 && f->streams[0]->memory_tries < MAX_MEMORY_TRIES)))
	{
		if (edata->sqlerrcode == ERRCODE_OUT_OF_MEMORY)
			f->streams[0]->memory_tries++;
		return false;
	}
	if (f->n == 1)
	{
		fail_stream(f->streams[0], edata);
		return true;
	}
	for (int i = 0; i < f->n; i++)
	{
		Flush		one = {&f->streams[i], 1, &f->seqs[i], f->quiet, false};

		if (!flush_some(&one, activity, durable, work, committed))
		{
			f->fenced = one.fenced;
			return false;
		}
	}
	return true;
}

/* Collects the streams for one of the two transactions of a flush. */
static void
pick_streams(Flush *f, bool ends, int64 now)
{
	dlist_iter	iter;
	int			most = ends
	? Min(chat_streams.n, chat_streams_batch(MAX_ENDS)) : chat_streams.n;

	memset(f, 0, sizeof(*f));
	f->streams = palloc(sizeof(ChatStream *) * Max(most, 1));
	f->seqs = palloc(sizeof(int64) * Max(most, 1));
	dlist_foreach(iter, &chat_streams.dirty)
	{
		ChatStream *s = dlist_container(ChatStream, dirty_node, iter.cur);
		bool		ending = s->ended && now >= s->retry_end_at;
		bool		wanted = ends ? ending
			: !ending && s->log.nitems > 0 && s->end.kind < CHAT_END_RETRY;

		if (wanted && f->n < most)
			f->streams[f->n++] = s;
	}
}

/* Ends that share their transaction. */
typedef struct Joint
{
	Flush	   *ends;
	const ChatFlushGuest *guest;
} Joint;

/* Transaction: the ends, and what the guest does. */
static void
write_joint(void *arg)
{
	Joint	   *j = arg;

	write_ends(j->ends);
	j->guest->work(j->guest->arg);
}

/* Stores ends together with a guest; false if that has to be done apart. */
static bool
flush_with(Flush *ends, const ChatFlushGuest *guest)
{
	Joint		joint = {ends, guest};

	if (chat_work_try("store ends and claim jobs", true, write_joint, &joint))
	{
		guest->undone(guest->arg);
		return false;
	}
	ends_committed(ends);
	guest->committed(guest->arg);
	return true;
}

/* Stores what the streams have gathered: deltas, then ends. */
void
chat_flush_run(const ChatFlushGuest *guest)
{
	Flush		f;
	int64		start = chat_stream_clock();
	bool		ok = true;

	flush_due = CHAT_NEVER;
	pick_streams(&f, false, start);
	if (f.n > 0)
		ok = flush_some(&f, "store deltas", false, write_deltas,
						deltas_committed);
	if (f.n > 0 && f.fenced)
		chat_recheck_run();
	if (ok && !chat_pace.reading)
	{
		pick_streams(&f, true, start);
		if (f.n > 0 && !(guest && flush_with(&f, guest)))
			ok = flush_some(&f, "store ends", true, write_ends,
							ends_committed);
	}
	chat_pace_flushed();
	pg_atomic_fetch_add_u64(&chat_slot->counters.flushes, 1);
	if (!ok)
		flush_due = chat_stream_clock() + 100;
}

/* Returns when the next flush is due, CHAT_NEVER if there is none to make. */
int64
chat_flush_due(void)
{
	bool		paced = chat_streams.n <= CHAT_MANY_STREAMS || chat_pace.early;
	int64		pace = paced ? chat_pace_next() : 0;
	int64		due = CHAT_NEVER;
	dlist_iter	iter;

	if (dlist_is_empty(&chat_streams.dirty))
		return CHAT_NEVER;
	if (flush_due != CHAT_NEVER)
		return flush_due;
	dlist_foreach(iter, &chat_streams.dirty)
	{
		ChatStream *s = dlist_container(ChatStream, dirty_node, iter.cur);

		if (!s->ended || s->retry_end_at == 0 ||
			(s->log.nitems > 0 && s->end.kind < CHAT_END_RETRY))
			return pace;
		due = Min(due, s->retry_end_at);
	}
	return Max(due, pace);
}
