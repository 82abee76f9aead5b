/*
 * worker.c
 *		The streaming worker: its loop, its start and its end.
 *
 * Owns nothing but the process.  The streams that are open belong to
 * streams.c, what is due to work.c, and each part that the loop calls says
 * what is its own.  All of it is local to the process; what others see stands
 * in tables, or in the worker's slot in shared memory.
 *
 * No transaction is open while the network is awaited (P6): the loop moves
 * what is ready, then runs short transactions, then waits, once, at its foot.
 * With nothing due the worker sleeps on its latch (P9).
 *
 *	recheck.c	what the tables say of us: extension, pause, our jobs
 *	pace.c		when answers are read and stored
 *	flush.c		stores what the streams have gathered
 *	claim.c		takes jobs from the queue; prepare.c makes their requests
 *	errand.c	what turns wait for: tools, titles, summaries
 *	upkeep.c	what is done now and then
 */
#include "postgres.h"

#include <malloc.h>
#include <sys/resource.h>

#include "access/xact.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/fd.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "blame.h"
#include "claim.h"
#include "compat.h"
#include "errand.h"
#include "flush.h"
#include "http.h"
#include "httptool.h"
#include "pace.h"
#include "queue.h"
#include "recheck.h"
#include "retention.h"
#include "shmem.h"
#include "side.h"
#include "stream.h"
#include "streams.h"
#include "throttle.h"
#include "tool.h"
#include "upkeep.h"
#include "work.h"
#include "worker.h"

/* unflushed bytes of a stream beyond which its transfer is paused */
#define MAX_PENDING (256 * 1024)
/* memory that is free stays with the process up to here, ... */
#define KEEP_FREE (64 * 1024 * 1024)
/* ... and blocks up to here come out of it, not as mappings of their own */
#define MAX_HEAP_BLOCK (16 * 1024 * 1024)

static int	max_streams = 5000;

static uint32 wait_event_main;

/* Declares the setting of the worker. */
void
chat_worker_init(void)
{
	DefineCustomIntVariable("chat.max_streams",
							"Most streams that a worker has open.",
							NULL, &max_streams, 5000, 1, 1000000,
							PGC_SIGHUP, 0, NULL, NULL, NULL);
}

/* Fails the streams that waited too long; notes when to look again. */
static void
check_times(int64 now)
{
	/* variables, as Min() would call one of two functions twice */
	int64		tools = chat_httptool_check_time(now);
	int64		sides = chat_side_check_time(now);
	int64		stream;
	dlist_iter	iter;

	chat_due.check = Min(tools, sides);
	dlist_foreach(iter, &chat_streams.all)
	{
		ChatStream *s = dlist_container(ChatStream, node, iter.cur);

		if (s->ended)
			continue;
		stream = chat_stream_check_time(s, now);
		chat_due.check = Min(chat_due.check, stream);
		if (s->ended)
			chat_streams_mark(s);
	}
}

/* True if the bell rang and no claim is planned for it: see claim.c. */
static bool
bell_is_new(void)
{
	return chat_due.claim != 0 && pg_atomic_read_u32(&chat_slot->rung);
}

/* True if the worker is one too many and has nothing open. */
static bool
may_leave(void)
{
	return pg_atomic_read_u32(&chat_slot->surplus) && chat_streams.n == 0 &&
		chat_side_idle() && chat_httptool_idle();
}

/* Ends the worker; those that stay look at what it has meant to do later. */
static void
leave(void)
{
	chat_shmem_ring(MyDatabaseId, false);
	proc_exit(0);
}

/* Returns how long the loop may sleep, in ms; -1 = until something comes. */
static long
sleep_time(void)
{
	int64		now = chat_stream_clock();
	int64		due = Min(chat_due.check, chat_due.beat);
	long		http = chat_http_timeout();

	due = Min(due, chat_due.strays);
	due = Min(due, chat_due.adopt);
	due = Min(due, chat_flush_due());
	due = Min(due, chat_claim_due());
	due = Min(due, chat_retention_due());
	due = Min(due, chat_side_due());
	due = Min(due, chat_httptool_due());
	due = Min(due, chat_pace_due(now));
	due = Min(due, chat_recheck_due());
	/* the latch alone would not do: a wait for a lock resets it, too */
	if (ConfigReloadPending || chat_due.turns ||
		(chat_due.tools && !chat_recheck_is_paused()) ||
		(chat_due.sides && chat_recheck_may_claim()) ||
		pg_atomic_read_u32(&chat_slot->progress_due) ||
		pg_atomic_read_u32(&chat_slot->strays) ||
		bell_is_new() || may_leave())
		due = now;
	if (http >= 0)
		due = Min(due, now + http);
	if (due == CHAT_NEVER)
		return -1;
	return due <= now ? 0 : (long) Min(due - now, INT_MAX);
}

/* Transaction: gives our jobs back, at the end of the process. */
static void
give_back_work(void *arg)
{
	ChatEnd   **ends = palloc(sizeof(ChatEnd *) * (chat_streams.n + 1));
	dlist_iter	iter;
	int			n = 0;

	dlist_foreach(iter, &chat_streams.all)
	{
		ChatStream *s = dlist_container(ChatStream, node, iter.cur);

		s->end.kind = CHAT_END_GIVE_BACK;
		s->end.run_at = DT_NOBEGIN;
		s->end.reset = s->content_seen || s->job.reset;
		s->end.last_seq = s->seq;
		ends[n++] = &s->end;
	}
	chat_queue_release(chat_slot->identity, ends, n);
	chat_side_give_back(chat_slot->identity);
}

/*
 * Gives the jobs back when the worker is told to end: the attempts were not
 * theirs to lose.  Does not wait for anybody: not for a lock, and not for a
 * standby.  After a crash this never runs, and the jobs are orphans.
 */
static void
give_back(int code, Datum arg)
{
	if ((chat_streams.n == 0 && chat_side_idle()) ||
		chat_slot->exit == CHAT_EXIT_ABSENT)
		return;
	AbortOutOfAnyTransaction();
	(void) set_config_option("synchronous_commit", "local", PGC_SUSET,
							 PGC_S_OVERRIDE, GUC_ACTION_SET, true, 0, false);
	(void) chat_work_try("give its jobs back", true, give_back_work, NULL);
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
		/* of a row or two each: a bitmap would cost more than they do */
		{"enable_bitmapscan", "off"},
		{"max_parallel_workers_per_gather", "0"},
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
	int64		files = PG_INT32_MAX;

	if (getrlimit(RLIMIT_NOFILE, &rlim) == 0)
	{
		if (rlim.rlim_cur < rlim.rlim_max)
		{
			struct rlimit wanted = {rlim.rlim_max, rlim.rlim_max};

			if (setrlimit(RLIMIT_NOFILE, &wanted) == 0)
				rlim = wanted;
		}
		if (rlim.rlim_cur != RLIM_INFINITY)
			files = (int64) rlim.rlim_cur - max_safe_fds - CHAT_RESERVED_FILES;
	}
	files = Max(files, 1);
	chat_http_set_limit((int) Min(files, PG_INT32_MAX));
	chat_streams_set_limit((int) Min(files, max_streams));
}

/*
 * Keeps free memory for the next tick: what a batch of answers takes would
 * else be given back and asked for again, a page fault for each 4 kB.
 */
static void
keep_memory(void)
{
#ifdef M_TRIM_THRESHOLD
	(void) mallopt(M_TRIM_THRESHOLD, KEEP_FREE);
	(void) mallopt(M_MMAP_THRESHOLD, MAX_HEAP_BLOCK);
#endif
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
	keep_memory();
	chat_shmem_attach(slot, database);
	BackgroundWorkerInitializeConnectionByOid(database, InvalidOid, 0);
	set_options();
	chat_streams_start();
	chat_work_start();
	wait_event_main = chat_wait_event("ChatMain");
	chat_recheck_start();
	chat_shmem_set_exit(CHAT_EXIT_STOPPED);
	set_limit();
	chat_blame_start(chat_slot->identity);
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

	chat_pace_begin();
	chat_pace_read(chat_http_poll());
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
			chat_streams_mark(s);
		/* from the first content on another, maybe shorter limit holds */
		if (waiting && s->first_content_at != 0)
		{
			int64		due = chat_stream_check_time(s, s->content_at);

			chat_due.check = Min(chat_due.check, due);
		}
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
	chat_due.claim = 0;
}

/* Stores what the streams have gathered; a claim that is due goes with it. */
static void
flush(void)
{
	ChatFlushGuest claim;
	bool		joint = pg_atomic_read_u32(&chat_slot->recheck) == 0 &&
		!chat_side_is_urgent() && chat_claim_join(&claim);

	if (joint)
		chat_upkeep_check_clock();
	chat_flush_run(joint ? &claim : NULL);
}

/* Sleeps until something is due or comes. */
static void
sleep_on(WaitEventSet *set)
{
	WaitEvent	event;

	if (WaitEventSetWait(set, sleep_time(), &event, 1,
						 wait_event_main) == 1 &&
		(event.events & WL_LATCH_SET))
	{
		ResetLatch(MyLatch);
		chat_due.claim = chat_due.turns_retry = 0;
	}
}

/* Main function of the worker. */
void
chat_worker_main(Datum slot)
{
	WaitEventSet *set = start_up(DatumGetInt32(slot));

	for (;;)
	{
		int64		now;

		/* a cancel request found no statement to cancel */
		QueryCancelPending = false;
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
			reload();
		if (may_leave())
			leave();
		if (bell_is_new())
			chat_due.claim = chat_due.turns_retry = 0;
		if (pg_atomic_exchange_u32(&chat_slot->recheck, 0))
			chat_recheck_run();
		if (pg_atomic_exchange_u32(&chat_slot->progress_due, 0))
			chat_errand_tell_progress();
		now = chat_stream_clock();
		if (pg_atomic_exchange_u32(&chat_slot->strays, 0) ||
			chat_due.strays <= now)
			chat_upkeep_end_strays(now);
		receive();
		now = chat_stream_clock();
		if (chat_due.adopt <= now)
			chat_claim_adopt();
		if (chat_due.check <= now)
			check_times(now);
		/* before a claim: turns wait for these */
		if (chat_side_due() <= now)
			chat_errand_store_sides();
		if (chat_flush_due() <= now)
			flush();
		if (chat_due.turns)
			chat_errand_run_turns();
		/* what we waited for may have changed more than what we did */
		if (chat_claim_due() <= now &&
			pg_atomic_read_u32(&chat_slot->recheck) == 0)
		{
			if (chat_side_is_urgent() && chat_recheck_may_claim())
				chat_errand_run_sides();
			chat_upkeep_check_clock();
			chat_claim_run();
		}
		if (chat_retention_due() <= now)
			chat_upkeep_retire();
		if (chat_tool_orphans())
			chat_claim_adopt();
		if (chat_due.tools && !chat_recheck_is_paused())
			chat_errand_run_tools();
		if (chat_httptool_due() <= now)
			chat_errand_store_tools();
		if (chat_due.sides && chat_recheck_may_claim())
			chat_errand_run_sides();
		if (chat_due.beat <= now)
			chat_upkeep_beat(now);
		chat_work_reset();
		sleep_on(set);
	}
}
