/*
 * worker.c
 *		The streaming worker and its loop.
 *
 * Owns the list of streams that are open, the list of those that have
 * something to flush, and the times at which things are due.  All of it is
 * local to the process; what others see of it stands in tables, or in the
 * worker's slot in shared memory.
 *
 * No transaction is open while the network is awaited (P6): the loop moves
 * what is ready, then runs short transactions, then waits, once, at its foot.
 *
 *	claim	one durable transaction: jobs, their queued messages, the contexts
 *			of all their requests, start and start-step; then the requests go
 *	flush	deltas of all streams in one transaction that is not waited for,
 *			then ends and retries in a durable one; a stream's state advances
 *			only after the commit
 *
 * A transaction that fails is repeated stream by stream, and the stream that
 * fails alone has failed; an error of the system (disk, locks) is waited out.
 * With nothing due the worker sleeps on its latch (P9).
 */
#include "postgres.h"

#include <sys/resource.h>

#include "access/xact.h"
#include "commands/extension.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/fd.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "storage/lwlock.h"
#include "storage/procsignal.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "blame.h"
#include "compat.h"
#include "context.h"
#include "control.h"
#include "db.h"
#include "debug.h"
#include "event.h"
#include "http.h"
#include "httptool.h"
#include "prompt.h"
#include "queue.h"
#include "registry.h"
#include "retention.h"
#include "server.h"
#include "shmem.h"
#include "side.h"
#include "stream.h"
#include "summary.h"
#include "throttle.h"
#include "title.h"
#include "tool.h"
#include "turn.h"
#include "usage.h"
#include "worker.h"

/* jobs of one claim; more follow in the next turn of the loop */
#define MAX_CLAIM 256
/* titles and the like of one claim */
#define MAX_SIDES 32
/*
 * Beyond MANY_STREAMS, starts and ends go in batches of BUSY_BATCH: the tokens
 * of the others wait for no more than that between two flushes.
 */
#define MANY_STREAMS 100
#define BUSY_BATCH 32
/* chat.flush_interval is for so many streams, and up to MAX_PACE times that */
#define PACE_STREAMS 400
#define MAX_PACE 10
/* answers are held back for no longer, in ms: a held stream seems silent */
#define MAX_HOLD 100
/* ends of one transaction */
#define MAX_ENDS 1000
/* parked tasks of one transaction */
#define MAX_TURNS 256
/* unflushed bytes of a stream beyond which its transfer is paused */
#define MAX_PENDING (256 * 1024)
/* descriptors that stay free for the server's own use */
#define RESERVED_FILES 64
/* a clock that was set back by less is waited for, in ms */
#define CLOCK_SLACK 1000
#define MIN_BACKOFF 10
/* up to so many open streams each flush is made at once */
#define FEW_STREAMS 4
#define MAX_BACKOFF 1000
/* flushes of one stream that may fail for want of memory before it has failed */
#define MAX_MEMORY_TRIES 10
#define NEVER PG_INT64_MAX

/* How the next claim goes about a job that made a claim fail. */
typedef enum ClaimMode
{
	CLAIM_BATCH,
	CLAIM_SINGLE,				/* one by one, to find it */
	CLAIM_BARE					/* found: without its message, to fail it */
} ClaimMode;

static int	max_streams = 5000;
static int	max_crashes = 3;
static int	flush_interval = 10;
static int	heartbeat_interval = 15000;
static bool enabled = true;
static bool paused = true;		/* until the table was read */

static bool same_version = false;	/* library and extension fit */
static MemoryContext worker_context;
static MemoryContext tick_context;
static int64 identity;
static Oid	extension;
static uint32 wait_event_main;

static dlist_head streams = DLIST_STATIC_INIT(streams);
static dlist_head dirty_streams = DLIST_STATIC_INIT(dirty_streams);
static int	nstreams = 0;
static int64 epochs = 0;		/* sum over streams, for the fence */
static int	limit = 0;			/* streams that may be open */

/* times, in ms of chat_stream_clock() */
static int64 tick_at = 0;		/* the answers of this tick are read since */
static int64 flushed_at = 0;	/* the tick of the last flush */
static int64 flush_took = 0;	/* that tick, up to then */
static int64 flush_due = NEVER; /* not before, after an error */
static bool early = false;		/* this tick is before that of the next flush */
static bool reading_held = false;	/* answers are not read in this tick */
static bool reading_on = false; /* more of them are to be read in this tick */
static int	tick_reads = 0;
static bool fence_passed = false;	/* in this tick */
static int64 check_due = NEVER; /* a stream's timeout */
static int64 claim_due = 0;		/* 0 = the bell rang */
static int64 rest_due = NEVER;	/* a retry, or locked jobs */
static int64 strays_due = 0;	/* tasks without a job: at the start */
static int	claim_backoff = 0;
static ClaimMode claim_mode = CLAIM_BATCH;
static bool crowded = false;	/* jobs wait for room: take them in turns */
static bool cancels_due = false;	/* unclaimed jobs that shall end */
static bool turns_due = false;	/* parked tasks have something to do */
static int64 turns_retry = 0;	/* those that are due are locked: not before */
static int	turns_backoff = 0;
static ClaimMode turn_mode = CLAIM_BATCH;
static bool tools_due = false;	/* tool jobs may be ready */
static bool sides_due = false;	/* title and summary jobs may be ready */
static int64 beat_due = NEVER;	/* heartbeat */
static int64 adopt_due = 0;		/* jobs of the dead: at the start */

/* Declares the settings of the worker. */
void
chat_worker_init(void)
{
	DefineCustomBoolVariable("chat.enabled",
							 "Whether workers take jobs from the queue.",
							 NULL, &enabled, true, PGC_SIGHUP, 0,
							 NULL, NULL, NULL);
	DefineCustomIntVariable("chat.max_streams",
							"Most streams that a worker has open.",
							NULL, &max_streams, 5000, 1, 1000000,
							PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("chat.max_crashes",
							"Crashes of workers that a task may cause before it fails.",
							NULL, &max_crashes, 3, 1, 100,
							PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("chat.flush_interval",
							"Shortest time between two flushes of deltas.",
							NULL, &flush_interval, 10, 0, 10000,
							PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("chat.heartbeat_interval",
							"Time between two heartbeats of a task that is silent.",
							NULL, &heartbeat_interval, 15000, 100, 3600000,
							PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
}

/* ---------- transactions that may fail ---------- */

/* True if an error says nothing about the row: it is waited out. */
static bool
is_systemic(const ErrorData *edata)
{
	switch (ERRCODE_TO_CATEGORY(edata->sqlerrcode))
	{
		case ERRCODE_INSUFFICIENT_RESOURCES:
		case ERRCODE_OPERATOR_INTERVENTION:
		case ERRCODE_SYSTEM_ERROR:
		case ERRCODE_TRANSACTION_ROLLBACK:
		case ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE:
		case ERRCODE_INVALID_TRANSACTION_STATE:
			return true;
		default:
			return edata->sqlerrcode == ERRCODE_UNDEFINED_TABLE ||
				edata->sqlerrcode == ERRCODE_IO_ERROR;
	}
}

/* True if an error says that the notification queue is full. */
static bool
is_queue_full(const ErrorData *edata)
{
	/* the code alone also tells of texts that are too long */
	return edata->sqlerrcode == ERRCODE_PROGRAM_LIMIT_EXCEEDED &&
		edata->message &&
		strcmp(edata->message,
			   _("too many notifications in the NOTIFY queue")) == 0;
}

/*
 * Returns an error instead of a transaction whose commit would wait for a
 * synchronous standby that is not there, and everything else with it: the
 * streams go on meanwhile, and what has to be durable is done later.
 */
static ErrorData *
refuse_without_standby(void)
{
	static bool warned = false;
	bool		missing = chat_db_standby_missing();
	ErrorData  *edata;

	if (missing && !warned)
		ereport(WARNING,
				(errmsg("chat worker waits for a synchronous standby"),
				 errdetail("Jobs are neither started nor ended meanwhile.")));
	warned = missing;
	if (!missing)
		return NULL;
	edata = MemoryContextAllocZero(tick_context, sizeof(ErrorData));
	edata->sqlerrcode = ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
	edata->message = "a synchronous standby is missing";
	return edata;
}

/*
 * Runs work in a transaction of its own; returns NULL, or the error, which
 * was logged.  durable = the commit waits for the log.
 */
static ErrorData *
try_transaction(const char *activity, bool durable,
				void (*work) (void *), void *arg)
{
	ErrorData  *volatile edata = NULL;
	MemoryContext old = CurrentMemoryContext;

	if (durable)
		edata = refuse_without_standby();
	if (edata)
		return edata;
	PG_TRY();
	{
		chat_db_begin(activity);
		work(arg);
		chat_db_commit(durable);
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(tick_context);
		edata = CopyErrorData();
		FlushErrorState();
		chat_db_abort();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	/* also when the extension is gone: see recheck() */
	if (edata && is_systemic(edata))
		pg_atomic_write_u32(&chat_slot->recheck, 1);
	if (edata && !is_queue_full(edata))
		ereport(LOG,
				(errcode(edata->sqlerrcode),
				 errmsg("chat worker could not %s: %s", activity,
						edata->message)));
	return edata;
}

/* ---------- the list of streams ---------- */

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
		claim_due = 0;
		chat_shmem_ring(MyDatabaseId, false);
	}
	if (s->end.kind != CHAT_END_COMPLETED && s->end.kind != CHAT_END_TOOLS)
		chat_stream_close(s);
}

/* Notes that a stream has something to flush. */
static void
mark_dirty(ChatStream *s)
{
	if (s->ended)
		end_request(s);
	if (s->dirty)
		return;
	s->dirty = true;
	dlist_push_tail(&dirty_streams, &s->dirty_node);
}

/* Takes a stream off the list of those to flush. */
static void
unmark_dirty(ChatStream *s)
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
	pg_atomic_write_u64(&chat_slot->counters.open_streams, nstreams);
	pg_atomic_write_u64(&chat_slot->counters.limit, limit);
}

/* Adds a stream whose claim is committed. */
static void
add_stream(ChatStream *s)
{
	dlist_push_tail(&streams, &s->node);
	nstreams++;
	epochs += s->job.epoch;
	count_streams();
}

/* Frees a stream: its end is stored, or its job is not ours any more. */
static void
drop_stream(ChatStream *s)
{
	unmark_dirty(s);
	if (!s->ended)
		s->end.kind = CHAT_END_GIVE_BACK;
	end_request(s);
	dlist_delete(&s->node);
	nstreams--;
	epochs -= s->job.epoch;
	count_streams();
	chat_stream_free(s);
}

/* ---------- recheck: what others did to our jobs ---------- */

typedef struct HeldJobs
{
	int			n;
	int64	   *ids;
	int64	   *epochs;
	bool	   *cancels;
	bool		paused;
	Oid			extension;
} HeldJobs;

/* Reads which jobs are ours. */
static void
read_held(void *arg)
{
	HeldJobs   *held = arg;
	MemoryContext spi = CurrentMemoryContext;
	int64	   *ids;
	int64	   *job_epochs;
	bool	   *cancels;

	held->extension = get_extension_oid("chat", true);
	if (held->extension != extension)
		return;
	held->paused = chat_control_paused();
	held->n = chat_queue_held(identity, &ids, &job_epochs, &cancels);
	MemoryContextSwitchTo(tick_context);
	held->ids = memcpy(palloc(sizeof(int64) * (held->n + 1)), ids,
					   sizeof(int64) * held->n);
	held->epochs = memcpy(palloc(sizeof(int64) * (held->n + 1)), job_epochs,
						  sizeof(int64) * held->n);
	held->cancels = memcpy(palloc(held->n + 1), cancels, held->n);
	MemoryContextSwitchTo(spi);
}

/* True if the extension that the worker serves is still there. */
static bool
extension_is_here(void)
{
	Oid			found;

	StartTransactionCommand();
	found = get_extension_oid("chat", true);
	same_version = OidIsValid(found) && chat_db_same_version();
	CommitTransactionCommand();
	return found == extension && OidIsValid(found);
}

/* Ends the worker for good: the database has no such extension any more. */
static void
exit_absent(void)
{
	chat_shmem_set_exit(CHAT_EXIT_ABSENT);
	proc_exit(0);
}

/* Looks for a stream's job among those that are ours, ordered by id. */
static int
find_held(const HeldJobs *held, const ChatStream *s)
{
	int			low = 0;
	int			high = held->n;

	while (low < high)
	{
		int			mid = low + (high - low) / 2;

		if (held->ids[mid] < s->job.id)
			low = mid + 1;
		else
			high = mid;
	}
	return low < held->n && held->ids[low] == s->job.id &&
		held->epochs[low] == s->job.epoch ? low : -1;
}

/* Takes over what the table says, and lets it be known. */
static void
set_paused(bool now_paused)
{
	if (paused && !now_paused)
		claim_due = 0;
	paused = now_paused;
	pg_atomic_write_u32(&chat_slot->paused, paused);
}

/* Drops the streams whose job is gone, cancels those that shall end. */
static void
recheck(void)
{
	HeldJobs	held = {0};
	dlist_mutable_iter iter;

	if (!extension_is_here())
		exit_absent();
	if (try_transaction("look at its jobs", false, read_held, &held))
	{
		pg_atomic_write_u32(&chat_slot->recheck, 1);
		rest_due = Min(rest_due, chat_stream_clock() + MAX_BACKOFF);
		return;
	}
	if (held.extension != extension)
		exit_absent();
	set_paused(held.paused);
	chat_httptool_keep(held.ids, held.n);
	chat_side_keep(held.ids, held.n);
	dlist_foreach_modify(iter, &streams)
	{
		ChatStream *s = dlist_container(ChatStream, node, iter.cur);
		int			i = find_held(&held, s);

		if (i < 0)
		{
			chat_shmem_publish(&s->job.task);
			drop_stream(s);
		}
		else if (held.cancels[i] && !s->ended)
		{
			chat_stream_cancel(s);
			mark_dirty(s);
		}
	}
}

/* ---------- flush ---------- */

/* The streams of one transaction, and what it writes. */
typedef struct Flush
{
	ChatStream **streams;
	int			n;
	int64	   *seqs;			/* of the last event after the commit */
	bool		quiet;			/* without notifications */
	bool		fenced;			/* out: our jobs are not what we think */
} Flush;

/* Writes and notifies the events of a batch, and counts them. */
static void
write_events(ChatEventBatch *batch, bool quiet)
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

/* Transaction: the logs of the streams. */
static void
write_deltas(void *arg)
{
	Flush	   *f = arg;
	ChatEventBatch batch = {0};

	if (!fence_passed)
		f->fenced = !chat_queue_intact(identity, nstreams, epochs);
	if (f->fenced)
		return;
	for (int i = 0; i < f->n; i++)
		f->seqs[i] = chat_event_collect(&batch, &f->streams[i]->target,
										f->streams[i]->seq,
										&f->streams[i]->log);
	write_events(&batch, f->quiet);
}

/* Advances the streams whose logs were committed. */
static void
deltas_committed(Flush *f)
{
	fence_passed = true;
	for (int i = 0; i < f->n; i++)
	{
		ChatStream *s = f->streams[i];

		s->seq = f->seqs[i];
		chat_event_clear(&s->log);
		if (!s->ended)
			unmark_dirty(s);
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
		chat_turn_seal(identity, ends, seqs, n);
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
		chat_queue_finish(identity, lists.finals, lists.nfinals);
	if (lists.nsteps > 0)
		chat_turn_park(identity, lists.steps, lists.nsteps);
	if (lists.nbacks > 0)
		chat_queue_release(identity, lists.backs, lists.nbacks);
	/* locked by somebody, or not ours any more: recheck() tells which */
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
	write_events(&batch, f->quiet);
}

/* Has a stream's end stored later. */
static void
postpone_end(ChatStream *s)
{
	int			delay = Min(MIN_BACKOFF << Min(s->end_tries, 10), MAX_BACKOFF);

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
			rest_due = 0;		/* its time is in the table: look there */
			break;
		case CHAT_END_TOOLS:
			turns_due = true;
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
	if (nstreams <= MANY_STREAMS)
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
		drop_stream(s);
	}
	/* a session's next task may have become ready */
	claim_due = 0;
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
	mark_dirty(s);
}

/* Says, once, that the notification queue is full. */
static void
warn_queue_full(void)
{
	static bool warned = false;

	if (!warned)
		ereport(WARNING,
				(errmsg("the notification queue is full"),
				 errdetail("Events are stored without a notification."),
				 errhint("Look for a session that listens and stays in a transaction: SELECT * FROM pg_stat_activity WHERE state LIKE 'idle in%%'.")));
	warned = true;
}

/*
 * Runs one of the two transactions of a flush; when it fails, without
 * notifications or stream by stream.  False: the system refuses, try later.
 */
static bool
flush_some(Flush *f, const char *activity, bool durable,
		   void (*work) (void *), void (*committed) (Flush *))
{
	ErrorData  *edata = try_transaction(activity, durable, work, f);

	if (edata && is_queue_full(edata) && !f->quiet)
	{
		warn_queue_full();
		f->quiet = true;
		edata = try_transaction(activity, durable, work, f);
	}
	if (edata == NULL)
	{
		if (!f->fenced)
			committed(f);
		return !f->fenced;
	}
	/* many large ends may be more than there is memory for, each alone not */
	if (is_systemic(edata) &&
		(edata->sqlerrcode != ERRCODE_OUT_OF_MEMORY ||
		 (f->n == 1 && f->streams[0]->end_tries < MAX_MEMORY_TRIES)))
	{
		if (edata->sqlerrcode == ERRCODE_OUT_OF_MEMORY)
			f->streams[0]->end_tries++;
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
			return false;
	}
	return true;
}

/* Returns how many starts or ends one transaction takes. */
static int
batch_size(int most)
{
	return nstreams > MANY_STREAMS ? BUSY_BATCH : most;
}

/* Collects the streams for one of the two transactions of a flush. */
static void
pick_streams(Flush *f, bool ends, int64 now)
{
	dlist_iter	iter;
	int			most = ends ? Min(nstreams, batch_size(MAX_ENDS)) : nstreams;

	memset(f, 0, sizeof(*f));
	f->streams = palloc(sizeof(ChatStream *) * Max(most, 1));
	f->seqs = palloc(sizeof(int64) * Max(most, 1));
	dlist_foreach(iter, &dirty_streams)
	{
		ChatStream *s = dlist_container(ChatStream, dirty_node, iter.cur);
		bool		ending = s->ended && now >= s->retry_end_at;
		bool		wanted = ends ? ending
			: !ending && s->log.nitems > 0 && s->end.kind < CHAT_END_RETRY;

		if (wanted && f->n < most)
			f->streams[f->n++] = s;
	}
}

/* Stores what the streams have gathered: deltas, then ends. */
static void
flush(void)
{
	Flush		f;
	int64		start = chat_stream_clock();
	bool		ok = true;

	flush_due = NEVER;
	pick_streams(&f, false, start);
	if (f.n > 0)
		ok = flush_some(&f, "store deltas", false, write_deltas,
						deltas_committed);
	if (f.n > 0 && f.fenced)
		recheck();
	if (ok && !reading_on)
	{
		pick_streams(&f, true, start);
		if (f.n > 0)
			ok = flush_some(&f, "store ends", true, write_ends,
							ends_committed);
	}
	flushed_at = tick_at;
	flush_took = chat_stream_clock() - tick_at;
	pg_atomic_fetch_add_u64(&chat_slot->counters.flushes, 1);
	if (!ok)
		flush_due = chat_stream_clock() + 100;
}

/*
 * Returns the time before which no flush begins: a few streams wait for
 * nothing, many share their commits, and very many send more than one token
 * between two.
 */
static int64
next_pace(void)
{
	int64		interval = flush_interval;

	if (nstreams <= FEW_STREAMS)
		interval = 0;
	else if (nstreams > PACE_STREAMS)
		interval = Min(interval * nstreams / PACE_STREAMS,
					   interval * MAX_PACE);
	return flushed_at + Max(interval, flush_took);
}

/* Returns when the next flush is due, NEVER if there is nothing to flush. */
static int64
next_flush(void)
{
	bool		paced = nstreams <= MANY_STREAMS || early;
	int64		pace = paced ? next_pace() : 0;
	int64		due = NEVER;
	dlist_iter	iter;

	if (dlist_is_empty(&dirty_streams))
		return NEVER;
	if (flush_due != NEVER)
		return flush_due;
	dlist_foreach(iter, &dirty_streams)
	{
		ChatStream *s = dlist_container(ChatStream, dirty_node, iter.cur);

		if (!s->ended || s->retry_end_at == 0 ||
			(s->log.nitems > 0 && s->end.kind < CHAT_END_RETRY))
			return pace;
		due = Min(due, s->retry_end_at);
	}
	return Max(due, pace);
}

/* ---------- claim ---------- */

/* What a claim brings. */
typedef struct Claim
{
	ChatClaim	wish;
	bool		quiet;			/* without notifications */
	int			n;
	ChatStream **streams;
	ChatQueueRest rest;
	int64	   *seqs;
} Claim;

/* Builds a job's system prompt and notes which one it was. */
static char *
system_prompt(ChatStream *s, const ChatJob *job, ChatPromptFetch *fetch)
{
	return chat_prompt_build(job->owner, job->user_id, &job->session,
							 chat_context_setting(job, "prompt"), fetch,
							 &s->prompt_name, &s->prompt_version);
}

/* Records which system prompts the requests of a claim use. */
static void
record_prompts(const Claim *c)
{
	pg_uuid_t  *tasks = palloc(sizeof(pg_uuid_t) * c->n);
	char	  **names = palloc(sizeof(char *) * c->n);
	int		   *versions = palloc(sizeof(int) * c->n);

	for (int i = 0; i < c->n; i++)
	{
		tasks[i] = c->streams[i]->job.task;
		names[i] = c->streams[i]->prompt_name;
		versions[i] = c->streams[i]->prompt_version;
	}
	chat_prompt_record(tasks, names, versions, c->n);
}

/* Sends a job back to the queue before its request, to wait for something. */
static void
defer(ChatStream *s, int what, int delay)
{
	s->deferred = true;
	s->ended = true;
	s->end.kind = CHAT_END_GIVE_BACK;
	s->end.waited = what;
	s->end.run_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), delay);
}

/* Fails a request that its window or its budget forbids; false if it did. */
static bool
admit(ChatStream *s, const ChatJob *job)
{
	const ChatWindow *w = &s->window;
	int64		most = chat_window_limit(job, "max_tokens_per_task",
										 s->server->max_tokens_per_task);
	int64		used;
	int			limit_of_day;

	if (w->frame_too_large)
		chat_stream_fail(s, CHAT_ERROR_CONTEXT_LENGTH_EXCEEDED, false, 0,
						 psprintf("the system prompt and the tools alone do not fit into the context window, which leaves " INT64_FORMAT " tokens",
								  w->budget));
	else if (most > 0 && job->tokens + w->tokens > most)
		chat_stream_fail(s, CHAT_ERROR_LIMIT_REACHED, false, 0,
						 psprintf("the task has used " INT64_FORMAT " tokens and would use " INT64_FORMAT " more, max_tokens_per_task is " INT64_FORMAT,
								  job->tokens, w->tokens, most));
	else if (chat_usage_is_over(&job->session, &used, &limit_of_day))
		chat_stream_fail(s, CHAT_ERROR_LIMIT_REACHED, false, 0,
						 psprintf("the user's tokens of this day are used up: " INT64_FORMAT " of %d",
								  used, limit_of_day));
	return !s->ended;
}

/* Builds a job's request, as far as it is made now. */
static void
build_request(ChatStream *s, const ChatJob *job, ChatContext *context,
			  const char *tools)
{
	ChatWindowFrame frame = {.tools = tools};
	ChatPromptFetch fetch = {false, false};
	char	   *status;

	fetch.waited = (job->waited & CHAT_WAITED_PROMPT) != 0;
	frame.system = system_prompt(s, job, &fetch);
	if (fetch.wait)
	{
		defer(s, CHAT_WAITED_PROMPT, CHAT_PROMPT_WAIT);
		return;
	}
	chat_summary_insert(job, context);
	chat_window_fit(job, s->server, &frame, context, &s->window);
	s->prompt_estimate = s->end.context_tokens = s->window.tokens;
	status = chat_window_status(&s->window);
	if (status)
		chat_event_add(&s->log, s->context, status);
	if (!admit(s, job))
		return;
	if (s->window.summary_reach > 0)
	{
		defer(s, CHAT_WAITED_SUMMARY, CHAT_SUMMARY_WAIT);
		return;
	}
	s->request = chat_context_request(job, s->server, context, frame.system,
									  tools, &s->request_len);
}

/*
 * True if an error of one job may be gone when it is tried again: somebody
 * held a lock, cancelled the statement, or used up the memory.
 */
static bool
is_passing(const ErrorData *edata)
{
	switch (ERRCODE_TO_CATEGORY(edata->sqlerrcode))
	{
		case ERRCODE_INSUFFICIENT_RESOURCES:
		case ERRCODE_OPERATOR_INTERVENTION:
		case ERRCODE_TRANSACTION_ROLLBACK:
			return true;
		default:
			return edata->sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE;
	}
}

/*
 * Reads a job's endpoint and key and builds its request.  An error of this
 * one job (server dropped, key unreadable) leaves the transaction usable; one
 * that passes costs an attempt, so that it holds up nobody else's job.
 */
static void
prepare(ChatStream *s, const ChatJob *job, ChatContext *context,
		const char *tools)
{
	MemoryContext old = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;

	BeginInternalSubTransaction(NULL);
	PG_TRY();
	{
		MemoryContextSwitchTo(s->context);
		s->server = chat_server_load(job->server, false);
		chat_server_check(job->server, job->owner, "any");
		s->key = chat_server_key(s->server, job->owner);
		/* goes when the request is sent: a stream stays small */
		s->scratch = AllocSetContextCreate(s->context, "chat request text",
										   ALLOCSET_SMALL_SIZES);
		MemoryContextSwitchTo(s->scratch);
		build_request(s, job, context, tools);
		MemoryContextSwitchTo(old);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(s->context);
		edata = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		/* what was planned before the error does not count */
		s->deferred = s->ended = false;
		s->request = NULL;
		chat_stream_fail(s, CHAT_ERROR_ENDPOINT_ERROR, is_passing(edata), 0,
						 edata->message);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	CurrentResourceOwner = owner;
}

/* Adds the events that open a task, or its next attempt. */
static void
log_start(ChatStream *s)
{
	char	   *json;

	if (s->job.reset)
		chat_event_add(&s->log, s->context, "{\"type\":\"reset-step\"}");
	if (!s->job.first)
		return;
	json = psprintf("{\"type\":\"start\",\"messageId\":\"%s\"}",
					DatumGetCString(DirectFunctionCall1(uuid_out,
														UUIDPGetDatum(&s->job.answer))));
	chat_event_add(&s->log, s->context, json);
	chat_event_add(&s->log, s->context, "{\"type\":\"start-step\"}");
}

/* True if a job has crashed its worker too often. */
static bool
is_poisoned(const ChatJob *job)
{
	return job->blamed >= max_crashes;
}

/* Puts the poisoned jobs last; returns how many others there are. */
static int
sort_jobs(ChatJob *jobs, int n)
{
	int			sound = 0;

	for (int i = 0; i < n; i++)
	{
		ChatJob		job = jobs[i];

		if (is_poisoned(&job))
			continue;
		jobs[i] = jobs[sound];
		jobs[sound++] = job;
	}
	return sound;
}

/* Makes the streams of the jobs that were claimed. */
static void
make_streams(Claim *c, ChatJob *jobs, ChatContext *contexts, char **tools)
{
	for (int i = 0; i < c->n; i++)
	{
		ChatStream *s = chat_stream_create(&jobs[i], worker_context);

		c->streams[i] = s;
		log_start(s);
		if (is_poisoned(&jobs[i]))
			chat_stream_poisoned(s);
		else if (claim_mode == CLAIM_BARE)
			chat_stream_fail(s, CHAT_ERROR_ENDPOINT_ERROR, false, 0,
							 "the request could not be built");
		else if (jobs[i].cancel)
			chat_stream_cancel(s);
		else
		{
			chat_blame_on(jobs[i].id);
			chat_context_repair(&contexts[i]);
			chat_context_close(&jobs[i], &contexts[i]);
			prepare(s, &jobs[i], &contexts[i], tools[i]);
			if (s->request)
				chat_debug_crash("request", s->request, s->request_len);
		}
	}
	chat_blame_on(0);
}

/* Compares two owners. */
static int
compare_owners(const void *a, const void *b)
{
	Oid			x = *(const Oid *) a;
	Oid			y = *(const Oid *) b;

	return x < y ? -1 : x > y;
}

/* Counts the streams by owner. */
static void
count_owners(ChatClaim *wish)
{
	Oid		   *owners = palloc(sizeof(Oid) * (nstreams + 1));
	int			n = 0;
	dlist_iter	iter;

	wish->held = palloc(sizeof(int) * (nstreams + 1));
	dlist_foreach(iter, &streams)
		owners[n++] = dlist_container(ChatStream, node, iter.cur)->job.owner;
	qsort(owners, n, sizeof(Oid), compare_owners);
	wish->owners = owners;
	for (int i = 0; i < n; i++)
	{
		if (i == 0 || owners[i] != owners[wish->nowners - 1])
		{
			owners[wish->nowners] = owners[i];
			wish->held[wish->nowners++] = 0;
		}
		wish->held[wish->nowners - 1]++;
	}
}

/* True if the worker may take something from the queue. */
static bool
may_claim(void)
{
	return enabled && same_version && !paused;
}

/* Says what the claim takes: in a transaction, whose memory it uses. */
static void
plan_wish(ChatClaim *wish)
{
	int			most = may_claim()
	? Min(limit - nstreams, batch_size(MAX_CLAIM)) : 0;
	ChatRoom	room;

	wish->holder = identity;
	wish->bare = claim_mode == CLAIM_BARE;
	wish->cancelled = cancels_due;
	if (cancels_due)
		most = MAX_CLAIM;
	wish->limit = claim_mode == CLAIM_BATCH ? most : Min(most, 1);
	if (wish->cancelled)
		return;
	chat_throttle_reserve(wish->limit, &room);
	wish->nservers = room.n;
	wish->servers = room.servers;
	wish->rooms = room.rooms;
	wish->fair = wish->limit > 0 && (crowded || room.n > 0);
	if (wish->fair)
		count_owners(wish);
}

/* Records what the requests of a claim were made of. */
static void
record_windows(const Claim *c)
{
	pg_uuid_t  *tasks = palloc(sizeof(pg_uuid_t) * c->n);
	const ChatWindow **windows = palloc(sizeof(ChatWindow *) * c->n);
	int			n = 0;

	for (int i = 0; i < c->n; i++)
	{
		/* the others have it at their end */
		if (c->streams[i]->window.budget == 0)
			continue;
		tasks[n] = c->streams[i]->job.task;
		windows[n++] = &c->streams[i]->window;
	}
	chat_window_record(tasks, windows, n);
}

/* Gives those jobs back that have to wait, and asks for what they wait for. */
static void
release_deferred(const Claim *c)
{
	ChatEnd   **ends = palloc(sizeof(ChatEnd *) * c->n);
	int			n = 0;

	for (int i = 0; i < c->n; i++)
	{
		ChatStream *s = c->streams[i];

		if (!s->deferred)
			continue;
		s->end.last_seq = c->seqs[i];
		ends[n++] = &s->end;
		if (s->window.summary_reach > 0)
			chat_summary_queue(&s->job, s->window.summary_reach);
	}
	if (n > 0)
		chat_queue_release(identity, ends, n);
}

/* Transaction: claims jobs, stores their messages and opening events. */
static void
claim_work(void *arg)
{
	Claim	   *c = arg;
	ChatJob    *jobs;
	ChatContext *contexts;
	char	  **tools;
	ChatEventBatch batch = {0};
	int			sound;
	int			n;

	plan_wish(&c->wish);
	n = chat_queue_claim(&c->wish, &jobs, &c->rest);
	if (n == 0)
		return;
	c->streams = MemoryContextAllocZero(tick_context, sizeof(ChatStream *) * n);
	c->seqs = MemoryContextAlloc(tick_context, sizeof(int64) * n);
	contexts = palloc0(sizeof(ChatContext) * n);
	tools = palloc0(sizeof(char *) * n);
	sound = sort_jobs(jobs, n);
	if (sound > 0 && !c->wish.bare)
	{
		chat_context_load(jobs, sound, contexts);
		chat_registry_load(jobs, sound, tools);
	}
	c->n = n;
	if (!c->wish.bare)
		c->rest.sides |= chat_title_queue(jobs, sound);
	make_streams(c, jobs, contexts, tools);
	record_prompts(c);
	record_windows(c);
	for (int i = 0; i < n; i++)
		c->seqs[i] = chat_event_collect(&batch, &c->streams[i]->target,
										c->streams[i]->seq,
										&c->streams[i]->log);
	write_events(&batch, c->quiet);
	release_deferred(c);
}

/* Sends the request of a stream whose claim is committed. */
static void
open_stream(ChatStream *s)
{
	MemoryContext old = CurrentMemoryContext;

	PG_TRY();
	{
		chat_throttle_start(s);
		chat_stream_open(s);
		pg_atomic_fetch_add_u64(&chat_slot->counters.started, 1);
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(s->context);
		edata = CopyErrorData();
		FlushErrorState();
		chat_stream_fail(s, CHAT_ERROR_ENDPOINT_ERROR, true, 0,
						 edata->message);
		mark_dirty(s);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
}

/* Takes over the streams of a claim that was committed. */
static void
claim_committed(Claim *c)
{
	int64		now = chat_stream_clock();

	for (int i = 0; i < c->n; i++)
	{
		ChatStream *s = c->streams[i];

		s->seq = c->seqs[i];
		chat_event_clear(&s->log);
		if (s->deferred)
		{
			/* what it waits for is ours to see to, and its time to know */
			sides_due = true;
			claim_due = 0;
			chat_shmem_publish(&s->job.task);
			chat_stream_free(s);
			continue;
		}
		add_stream(s);
		if (s->ended)
			mark_dirty(s);
		else
			open_stream(s);
		chat_shmem_publish(&s->job.task);
	}
	chat_side_open(true);
	if (c->n > 0)
		check_due = Min(check_due, now + 1);
}

/* Plans the next claim by what is left in the queue. */
static void
plan_claim(const Claim *c, int64 now)
{
	const ChatQueueRest *rest = &c->rest;
	bool		skipped;

	/* is there a claim that is sure to bring something? */
	cancels_due = rest->cancelled && !(c->wish.cancelled && c->n == 0);
	crowded = rest->due && (c->wish.cancelled || c->n == c->wish.limit);
	claim_due = cancels_due ||
		(crowded && may_claim() && nstreams + c->n < limit) ? 0 : NEVER;
	/* is something locked? */
	skipped = c->wish.cancelled ? rest->cancelled && c->n == 0
		: rest->due && c->n < c->wish.limit;
	claim_backoff = skipped
		? Min(Max(claim_backoff * 2, MIN_BACKOFF), MAX_BACKOFF) : 0;
	rest_due = skipped ? now + claim_backoff : NEVER;
	if (rest->next_run != DT_NOEND)
		rest_due = Min(rest_due, now + 1 +
					   TimestampDifferenceMilliseconds(GetCurrentTimestamp(),
													   rest->next_run));
	if (rest->closed)
		rest_due = Min(rest_due, chat_throttle_due());
}

/* Plans what comes after a claim. */
static void
plan_next(const Claim *c)
{
	int64		now = chat_stream_clock();

	plan_claim(c, now);
	turns_due = c->rest.turns && now >= turns_retry;
	if (!c->rest.turns)
		turns_backoff = 0;
	else if (!turns_due)
		rest_due = Min(rest_due, turns_retry);
	tools_due = c->rest.tools;
	sides_due = c->rest.sides;
	if (!c->rest.parked && nstreams == 0 && c->n == 0)
		beat_due = NEVER;
	else if (beat_due == NEVER)
		beat_due = now + heartbeat_interval;
}

/* Forgets what a claim that failed has made. */
static void
undo_claim(Claim *c)
{
	chat_throttle_settle();
	for (int i = 0; i < c->n; i++)
		if (c->streams[i])
			chat_stream_free(c->streams[i]);
	chat_side_open(false);
}

/* Takes jobs from the queue. */
static void
claim(void)
{
	Claim		c = {0};
	ErrorData  *edata = try_transaction("claim jobs", true, claim_work, &c);

	if (edata && is_queue_full(edata))
	{
		warn_queue_full();
		undo_claim(&c);
		memset(&c, 0, sizeof(c));
		c.quiet = true;
		edata = try_transaction("claim jobs", true, claim_work, &c);
	}
	if (edata == NULL)
	{
		plan_next(&c);
		claim_committed(&c);
		chat_throttle_settle();
		if (claim_mode == CLAIM_BARE)
			claim_mode = CLAIM_SINGLE;
		else if (c.n == 0)
			claim_mode = CLAIM_BATCH;
		if (claim_mode != CLAIM_BATCH)
			claim_due = 0;
		return;
	}
	undo_claim(&c);
	if (!is_systemic(edata) && claim_mode != CLAIM_BARE)
	{
		claim_mode = claim_mode == CLAIM_BATCH ? CLAIM_SINGLE : CLAIM_BARE;
		claim_due = 0;
		return;
	}
	/* not even a bare claim: it is not the job's fault */
	claim_mode = CLAIM_BATCH;
	cancels_due = false;
	claim_due = NEVER;
	claim_backoff = Min(Max(claim_backoff * 2, MIN_BACKOFF), MAX_BACKOFF);
	rest_due = chat_stream_clock() + claim_backoff;
}

/*
 * Returns when the queue is to be looked at: also when there is no room for
 * more.  Where many streams share their commits, new ones share theirs, too.
 */
static int64
next_claim(void)
{
	int64		due = Min(claim_due, rest_due);

	if ((reading_held || reading_on) && !crowded && !cancels_due && claim_mode == CLAIM_BATCH)
		due = Max(due, next_pace());
	return due;
}

/* ---------- requests beside the turns ---------- */

/* Transaction: takes jobs that ask for a title or a summary. */
static void
claim_sides_work(void *arg)
{
	*(int *) arg = chat_side_claim(identity, MAX_SIDES);
}

/* Has titles and summaries made that wait. */
static void
run_sides(void)
{
	int			n = 0;
	bool		ok = try_transaction("claim titles and summaries", true,
									 claim_sides_work, &n) == NULL;

	chat_side_open(ok);
	if (!ok)
		rest_due = Min(rest_due, chat_stream_clock() + 100);
	if (n > 0)
		check_due = 0;
	sides_due = n == MAX_SIDES;
}

/* Transaction: stores what came of requests beside the turns. */
static void
store_sides_work(void *arg)
{
	chat_side_store(identity);
}

/* Stores what came of requests beside the turns. */
static void
store_sides(void)
{
	chat_side_stored(try_transaction("store titles and summaries", true,
									 store_sides_work, NULL) == NULL);
	/* a turn may have waited for it */
	claim_due = 0;
}

/* ---------- tools ---------- */

/* What a turn of the parked tasks brought. */
typedef struct Turns
{
	int			n;
	pg_uuid_t  *tasks;
	bool		quiet;
} Turns;

/* Transaction: gives the due parked tasks their turn. */
static void
turn_work(void *arg)
{
	Turns	   *t = arg;
	ChatEventBatch batch = {0};
	pg_uuid_t  *tasks;

	t->n = chat_turn_run(identity, turn_mode == CLAIM_BATCH ? MAX_TURNS : 1,
						 turn_mode == CLAIM_BARE, &batch, &tasks);
	if (t->n == 0)
		return;
	t->tasks = memcpy(MemoryContextAlloc(tick_context,
										 sizeof(pg_uuid_t) * t->n),
					  tasks, sizeof(pg_uuid_t) * t->n);
	write_events(&batch, t->quiet);
}

/* Plans what comes after turns of n tasks, which were all that could be had. */
static void
turns_committed(int n)
{
	if (turn_mode == CLAIM_BARE)
		turn_mode = CLAIM_SINGLE;
	else if (n == 0)
		turn_mode = CLAIM_BATCH;
	turns_due = turn_mode != CLAIM_BATCH;
	if (n > 0)
	{
		turns_backoff = 0;
		claim_due = 0;
		return;
	}
	/* somebody holds what is due locked, if anything is */
	turns_backoff = Min(Max(turns_backoff * 2, MIN_BACKOFF), MAX_BACKOFF);
	turns_retry = chat_stream_clock() + turns_backoff;
	rest_due = Min(rest_due, turns_retry);
}

/*
 * Gives the due parked tasks their turn.  When that fails, they have it one by
 * one, and the task that fails alone has failed.
 */
static void
turn(void)
{
	Turns		t = {0};
	ErrorData  *edata = try_transaction("look after tool calls", true,
										turn_work, &t);

	if (edata && is_queue_full(edata))
	{
		warn_queue_full();
		t.quiet = true;
		edata = try_transaction("look after tool calls", true, turn_work, &t);
	}
	if (edata == NULL)
	{
		for (int i = 0; i < t.n; i++)
			chat_shmem_publish(&t.tasks[i]);
		turns_committed(t.n);
		return;
	}
	turns_due = !is_systemic(edata) && turn_mode != CLAIM_BARE;
	if (turns_due)
	{
		turn_mode = turn_mode == CLAIM_BATCH ? CLAIM_SINGLE : CLAIM_BARE;
		return;
	}
	turn_mode = CLAIM_BATCH;
	turns_retry = chat_stream_clock() + MAX_BACKOFF;
	rest_due = Min(rest_due, turns_retry);
}

/* Transaction: looks what tool jobs wait. */
static void
judge_work(void *arg)
{
	*(bool *) arg = chat_tool_judge();
}

/* Transaction: takes HTTP tool calls. */
static void
claim_http_work(void *arg)
{
	*(int *) arg = chat_httptool_claim(identity, MAX_CLAIM);
}

/* Transaction: stores the results of HTTP tool calls. */
static void
store_http_work(void *arg)
{
	chat_httptool_store(identity);
}

/* Stores the results of HTTP tools. */
static void
store_http(void)
{
	bool		committed = try_transaction("store results of tools", true,
											store_http_work, NULL) == NULL;

	chat_httptool_stored(committed, 100);
	turns_due |= committed;
}

/* Has the tools run that wait. */
static void
run_tools(void)
{
	int			n = 0;
	bool		failed = false;

	tools_due = false;
	if (try_transaction("look at tool jobs", true, judge_work, &failed) ||
		chat_tool_schedule())
		rest_due = Min(rest_due, chat_stream_clock() + 100);
	turns_due |= failed;
	chat_httptool_open(try_transaction("claim tool calls", true,
									   claim_http_work, &n) == NULL);
	if (n > 0)
		check_due = 0;
	tools_due = n == MAX_CLAIM;
}

/* Transaction: tells what running tools have reported. */
static void
progress_work(void *arg)
{
	Turns	   *t = arg;
	ChatEventBatch batch = {0};
	pg_uuid_t  *tasks;

	t->n = chat_tool_progress(&batch, &tasks);
	t->tasks = memcpy(MemoryContextAlloc(tick_context,
										 sizeof(pg_uuid_t) * (t->n + 1)),
					  tasks, sizeof(pg_uuid_t) * t->n);
	write_events(&batch, false);
}

/* Tells what running tools have reported. */
static void
progress(void)
{
	Turns		t = {0};

	if (try_transaction("tell progress", true, progress_work, &t) == NULL)
		for (int i = 0; i < t.n; i++)
			chat_shmem_publish(&t.tasks[i]);
}

/* Transaction: tells listeners of tasks that have nothing else to say. */
static void
beat_work(void *arg)
{
	int64		now = chat_stream_clock();
	dlist_iter	iter;

	dlist_foreach(iter, &streams)
	{
		ChatStream *s = dlist_container(ChatStream, node, iter.cur);

		if (now - s->content_at >= heartbeat_interval)
			chat_event_heartbeat(s->target.channel, s->target.task_text);
	}
	chat_turn_heartbeat();
}

/* Sends heartbeats: no rows, and not durable. */
static void
beat(int64 now)
{
	(void) try_transaction("send heartbeats", false, beat_work, NULL);
	beat_due = now + heartbeat_interval;
}

/* ---------- retention ---------- */

/* Retires old events; streams that wrote to their slot go on in another. */
static void
retire(void)
{
	ChatRetired r = {.holder = identity};
	ErrorData  *edata = try_transaction("retire events", true,
										chat_retention_work, &r);
	dlist_iter	iter;

	chat_retention_done(&r, edata != NULL, chat_stream_clock());
	if (edata || !r.moved)
		return;
	dlist_foreach(iter, &streams)
	{
		ChatStream *s = dlist_container(ChatStream, node, iter.cur);

		if (s->target.slot == r.from)
			s->target.slot = r.to;
	}
}

/* ---------- time ---------- */

/* Fails the streams that waited too long; notes when to look again. */
static void
check_times(int64 now)
{
	dlist_iter	iter;

	check_due = Min(chat_httptool_check_time(now), chat_side_check_time(now));
	dlist_foreach(iter, &streams)
	{
		ChatStream *s = dlist_container(ChatStream, node, iter.cur);

		if (s->ended)
			continue;
		check_due = Min(check_due, chat_stream_check_time(s, now));
		if (s->ended)
			mark_dirty(s);
	}
}

/* Transaction: what is due is due as soon as before on the old clock. */
static void
move_work(void *arg)
{
	chat_queue_move(*(int64 *) arg);
}

/*
 * Sees whether somebody has set the server's clock back since the last look:
 * then the times that stand in the tables are too far away.
 */
static void
check_clock(void)
{
	static int64 last = PG_INT64_MAX;
	/* not the turn's: a flush may have taken long since then */
	int64		offset = GetCurrentTimestamp() / 1000 - chat_stream_clock();
	int64		back = last - offset;

	if (last == PG_INT64_MAX || back < CLOCK_SLACK)
	{
		last = offset;
		return;
	}
	ereport(LOG,
			(errmsg("the clock was set back by " INT64_FORMAT " ms", back)));
	if (try_transaction("follow the clock", true, move_work, &back) == NULL)
		last = offset;
}

/* Returns how long the loop may sleep, in ms; -1 = until something comes. */
static long
sleep_time(void)
{
	int64		now = chat_stream_clock();
	int64		due = Min(Min(check_due, beat_due),
						  Min(Min(strays_due, adopt_due), next_flush()));
	long		http = chat_http_timeout();

	due = Min(due, Min(chat_retention_due(), chat_side_due()));
	due = Min(due, next_claim());
	if (reading_on)
		due = now;
	if (reading_held)
		due = Min(due, Min(next_pace(), flushed_at + MAX_HOLD));
	due = Min(due, chat_httptool_due());
	/* the latch alone would not do: a wait for a lock resets it, too */
	if (ConfigReloadPending || turns_due || (tools_due && !paused) ||
		(sides_due && may_claim()) || pg_atomic_read_u32(&chat_slot->rung))
		due = now;
	if (http >= 0)
		due = Min(due, now + http);
	if (due == NEVER)
		return -1;
	return due <= now ? 0 : (long) Min(due - now, INT_MAX);
}

/* ---------- tasks that no job will end ---------- */

/* Adds the events that end a stray task to a batch. */
static void
collect_stray(ChatEventBatch *batch, const ChatStray *stray)
{
	/* the batch points to it */
	ChatEventTarget *target = palloc0(sizeof(ChatEventTarget));
	ChatEventLog log = {0};

	target->task = stray->task;
	target->slot = stray->slot;
	target->channel = stray->channel;
	strlcpy(target->task_text,
			DatumGetCString(DirectFunctionCall1(uuid_out,
												UUIDPGetDatum(&stray->task))),
			sizeof(target->task_text));
	chat_event_add(&log, CurrentMemoryContext, "{\"type\":\"reset-step\"}");
	chat_event_add(&log, CurrentMemoryContext,
				   "{\"type\":\"error\",\"errorText\":\"" CHAT_STRAY_MESSAGE
				   "\",\"code\":\"restored\"}");
	chat_event_add(&log, CurrentMemoryContext,
				   "{\"type\":\"finish\",\"finishReason\":\"error\"}");
	(void) chat_event_collect(batch, target, stray->seq, &log);
}

/* Transaction: ends the tasks that have no job, in a restored database. */
static void
strays_work(void *arg)
{
	bool	   *skipped = arg;
	ChatStray  *strays;
	ChatEventBatch batch = {0};
	int			n = chat_queue_strays(&strays, skipped);

	for (int i = 0; i < n; i++)
	{
		if (strays[i].told)
			collect_stray(&batch, &strays[i]);
		chat_shmem_publish_at_commit(&strays[i].task);
	}
	write_events(&batch, false);
	if (n > 0)
		ereport(LOG,
				(errmsg("chat worker ends %d tasks that have no job", n),
				 errdetail("This database was restored or copied, or its queue was emptied.")));
}

/* Ends stray tasks; looks again when somebody holds a session locked. */
static void
end_strays(int64 now)
{
	bool		skipped = false;

	if (try_transaction("end tasks without a job", true, strays_work,
						&skipped))
		skipped = true;
	strays_due = skipped ? now + MAX_BACKOFF : NEVER;
}

/* ---------- the process ---------- */

/* Leaves in holders[] those that do not live; returns how many. */
static int
list_dead(int64 *holders, int n)
{
	int64	   *live = palloc(sizeof(int64) * chat_shared->nslots);
	int			nlive = chat_shmem_live(MyDatabaseId, live);
	int			ndead = 0;

	for (int i = 0; i < n; i++)
	{
		bool		lives = false;

		for (int k = 0; k < nlive && !lives; k++)
			lives = live[k] == holders[i];
		if (!lives)
			holders[ndead++] = holders[i];
	}
	return ndead;
}

/* Transaction: frees the jobs of workers that died. */
static void
adopt_work(void *arg)
{
	int64	   *holders;
	const int64 *jobs;
	int			n = chat_blame_jobs(&jobs);

	if (n > 0)
		chat_queue_blame(jobs, n);
	n = chat_queue_holders(&holders);
	n = list_dead(holders, n);
	if (n > 0)
		n = chat_queue_adopt(holders, n, max_crashes);
	if (n > 0)
		ereport(LOG,
				(errmsg("chat worker takes up %d jobs whose worker is gone",
						n)));
}

/* Takes up what dead workers have left; soon again when that fails. */
static void
adopt(void)
{
	adopt_due = NEVER;
	if (try_transaction("take up jobs", true, adopt_work, NULL))
		adopt_due = chat_stream_clock() + MAX_BACKOFF;
	else
		chat_blame_forget();
	claim_due = 0;
}

/* Transaction: gives our jobs back, at the end of the process. */
static void
give_back_work(void *arg)
{
	ChatEnd   **ends = palloc(sizeof(ChatEnd *) * (nstreams + 1));
	dlist_iter	iter;
	int			n = 0;

	dlist_foreach(iter, &streams)
	{
		ChatStream *s = dlist_container(ChatStream, node, iter.cur);

		s->end.kind = CHAT_END_GIVE_BACK;
		s->end.run_at = DT_NOBEGIN;
		s->end.reset = s->content_seen || s->job.reset;
		s->end.last_seq = s->seq;
		ends[n++] = &s->end;
	}
	chat_queue_release(identity, ends, n);
	chat_side_give_back(identity);
}

/*
 * Gives the jobs back when the worker is told to end: the attempts were not
 * theirs to lose.  Does not wait for anybody: not for a lock, and not for a
 * standby.  After a crash this never runs, and the jobs are orphans.
 */
static void
give_back(int code, Datum arg)
{
	if ((nstreams == 0 && chat_side_idle()) ||
		chat_slot->exit == CHAT_EXIT_ABSENT)
		return;
	AbortOutOfAnyTransaction();
	(void) set_config_option("synchronous_commit", "local", PGC_SUSET,
							 PGC_S_OVERRIDE, GUC_ACTION_SET, true, 0, false);
	(void) try_transaction("give its jobs back", true, give_back_work, NULL);
}

/* Sets what this process needs of the server's settings. */
static void
set_options(void)
{
	static const char *const options[][2] = {
		{"search_path", "pg_catalog, pg_temp"},
		{"statement_timeout", "0"},
		{"lock_timeout", "200ms"},
		{"idle_in_transaction_session_timeout", "0"},
		{"default_transaction_isolation", "read committed"},
		{"default_transaction_read_only", "off"},
		{"jit", "off"},
		/* the statements are probes by key, whatever the statistics say */
		{"plan_cache_mode", "force_generic_plan"},
		{"enable_seqscan", "off"},
		{"enable_mergejoin", "off"},
		{"session_replication_role", "origin"},
	};

	for (size_t i = 0; i < lengthof(options); i++)
		SetConfigOption(options[i][0], options[i][1], PGC_SUSET,
						PGC_S_OVERRIDE);
}

/* Raises the soft limit of descriptors and derives how many streams fit. */
static void
set_limit(void)
{
	struct rlimit rlim;
	int64		files = max_streams;

	if (getrlimit(RLIMIT_NOFILE, &rlim) == 0)
	{
		if (rlim.rlim_cur < rlim.rlim_max)
		{
			struct rlimit wanted = {rlim.rlim_max, rlim.rlim_max};

			if (setrlimit(RLIMIT_NOFILE, &wanted) == 0)
				rlim = wanted;
		}
		if (rlim.rlim_cur != RLIM_INFINITY)
			files = (int64) rlim.rlim_cur - max_safe_fds - RESERVED_FILES;
	}
	limit = (int) Max(Min(files, max_streams), 1);
	count_streams();
}

/* Transaction: finds the extension. */
static void
find_extension(void *arg)
{
	if (!OidIsValid(chat_db_extension_owner()))
		return;
	extension = get_extension_oid("chat", true);
	same_version = chat_db_same_version();
}

/* Looks for the extension; without one the worker has nothing to do here. */
static void
require_extension(void)
{
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	find_extension(NULL);
	PopActiveSnapshot();
	CommitTransactionCommand();
	if (!OidIsValid(extension))
		exit_absent();
}

/* Connects and prepares everything that the loop works with. */
static WaitEventSet *
start_up(int slot)
{
	Oid			database;
	WaitEventSet *set;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	memcpy(&database, MyBgworkerEntry->bgw_extra, sizeof(Oid));
	chat_shmem_attach(slot, database);
	BackgroundWorkerInitializeConnectionByOid(database, InvalidOid, 0);
	set_options();
	worker_context = AllocSetContextCreate(TopMemoryContext, "chat worker",
										   ALLOCSET_DEFAULT_SIZES);
	tick_context = AllocSetContextCreate(TopMemoryContext, "chat tick",
										 ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(tick_context);
	identity = chat_slot->identity;
	wait_event_main = chat_wait_event("ChatMain");
	require_extension();
	chat_shmem_set_exit(CHAT_EXIT_STOPPED);
	set_limit();
	chat_blame_start(identity);
	/* whether it is paused, before it claims */
	pg_atomic_write_u32(&chat_slot->recheck, 1);
	set = chat_wait_event_set(3);
	AddWaitEventToSet(set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	AddWaitEventToSet(set, WL_SOCKET_READABLE, chat_http_start(), NULL, NULL);
	before_shmem_exit(give_back, (Datum) 0);
	return set;
}

/* Takes what the transfers have received. */
static void
receive(void)
{
	ChatTransfer *t;

	if (!reading_on)
	{
		/* what many send is read when it can be stored, and then all of it */
		tick_at = chat_stream_clock();
		tick_reads = 0;
		fence_passed = false;
		early = nstreams > MANY_STREAMS && tick_at < next_pace();
		reading_held = early && tick_at < flushed_at + MAX_HOLD;
		chat_http_hold(reading_held);
	}
	reading_on = chat_http_poll() &&
		++tick_reads <= nstreams / CHAT_HTTP_BATCH;
	while ((t = chat_http_next()) != NULL)
	{
		ChatStream *s = t->owner;
		bool		waiting;
		bool		received;

		if (t->kind == CHAT_TRANSFER_TOOL)
			(void) chat_httptool_receive(t);
		if (t->kind == CHAT_TRANSFER_SIDE)
			chat_side_receive(t);
		if (t->kind != CHAT_TRANSFER_STREAM)
			continue;
		waiting = s->first_content_at == 0;
		chat_blame_on(s->job.id);
		received = chat_stream_receive(s);
		if (waiting && s->first_content_at != 0)
			chat_throttle_answered(s);
		if (received)
			mark_dirty(s);
		/* from the first content on another, maybe shorter limit holds */
		if (waiting && s->first_content_at != 0)
			check_due = Min(check_due,
							chat_stream_check_time(s, s->content_at));
		if (s->transfer && s->log.text.len > MAX_PENDING)
			chat_http_pause(s->transfer, true);
	}
	chat_blame_on(0);
}

/* Reads the configuration again. */
static void
reload(void)
{
	ConfigReloadPending = false;
	ProcessConfigFile(PGC_SIGHUP);
	set_limit();
	chat_retention_recheck();
	claim_due = 0;
}

/* Main function of the worker. */
void
chat_worker_main(Datum slot)
{
	WaitEventSet *set = start_up(DatumGetInt32(slot));

	for (;;)
	{
		WaitEvent	event;
		int64		now;

		/* a cancel request found no statement to cancel */
		QueryCancelPending = false;
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
			reload();
		if (pg_atomic_exchange_u32(&chat_slot->rung, 0))
			claim_due = turns_retry = 0;
		if (pg_atomic_exchange_u32(&chat_slot->recheck, 0))
			recheck();
		if (pg_atomic_exchange_u32(&chat_slot->progress_due, 0))
			progress();
		receive();
		now = chat_stream_clock();
		if (pg_atomic_exchange_u32(&chat_slot->strays, 0) || strays_due <= now)
			end_strays(now);
		if (adopt_due <= now)
			adopt();
		if (check_due <= now)
			check_times(now);
		if (next_flush() <= now)
			flush();
		if (turns_due)
			turn();
		/* what we waited for may have changed more than what we did */
		if (next_claim() <= now &&
			pg_atomic_read_u32(&chat_slot->recheck) == 0)
		{
			check_clock();
			claim();
		}
		if (chat_retention_due() <= now)
			retire();
		if (chat_tool_orphans())
			adopt();
		if (tools_due && !paused)
			run_tools();
		if (chat_httptool_due() <= now)
			store_http();
		if (sides_due && may_claim())
			run_sides();
		if (chat_side_due() <= now)
			store_sides();
		if (beat_due <= now)
			beat(now);
		MemoryContextReset(tick_context);
		if (WaitEventSetWait(set, sleep_time(), &event, 1,
							 wait_event_main) == 1 &&
			(event.events & WL_LATCH_SET))
		{
			ResetLatch(MyLatch);
			claim_due = turns_retry = 0;
		}
	}
}
