/*
 * claim.c
 *		Taking jobs from the queue.
 *
 * A claim is one durable transaction: jobs, their queued messages, the
 * contexts of all their requests, start and start-step; then the requests go.
 * What is left in the queue says when the next one is due.
 *
 * Owns the plan of the next claim, local to the process.  A claim that fails
 * is repeated job by job, and the job that fails alone has failed; an error of
 * the system is waited out.
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "blame.h"
#include "claim.h"
#include "context.h"
#include "errand.h"
#include "event.h"
#include "outbox.h"
#include "pace.h"
#include "prepare.h"
#include "queue.h"
#include "recheck.h"
#include "registry.h"
#include "shmem.h"
#include "side.h"
#include "stream.h"
#include "streams.h"
#include "summary.h"
#include "throttle.h"
#include "title.h"
#include "upkeep.h"
#include "work.h"

/* jobs of one claim; more follow in the next turn of the loop */
#define MAX_CLAIM 256

static int	max_crashes = 3;

static int	claim_backoff = 0;
static int64 locked_until = 0;	/* no other look at what is locked before */
static int64 apart_until = 0;	/* claims fail: ends are stored without them */
static ChatWorkMode claim_mode = CHAT_WORK_BATCH;
static bool crowded = false;	/* jobs wait for room: take them in turns */
static bool cancels_due = false;	/* unclaimed jobs that shall end */

/* Declares the setting that says which jobs are not taken. */
void
chat_claim_init(void)
{
	DefineCustomIntVariable("chat.max_crashes",
							"Crashes of workers that a task may cause before it fails.",
							NULL, &max_crashes, 3, 1, 100,
							PGC_SIGHUP, 0, NULL, NULL, NULL);
}

/* What a claim brings. */
typedef struct Claim
{
	int64		begun;
	ChatClaim	wish;
	bool		quiet;			/* without notifications */
	int			n;
	ChatStream **streams;
	ChatQueueRest rest;
	int64	   *seqs;
} Claim;

/* Adds the events that open a task, or its next attempt. */
static void
log_start(ChatStream *s)
{
	char	   *id;
	char	   *json;

	if (s->job.reset)
		chat_event_add(&s->log, s->context, "{\"type\":\"reset-step\"}");
	if (!s->job.first)
		return;
	id = DatumGetCString(DirectFunctionCall1(uuid_out,
											 UUIDPGetDatum(&s->job.answer)));
	json = psprintf("{\"type\":\"start\",\"messageId\":\"%s\"}", id);
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
		ChatStream *s = chat_stream_create(&jobs[i], chat_streams.context);

		c->streams[i] = s;
		log_start(s);
		if (is_poisoned(&jobs[i]))
			chat_stream_poisoned(s);
		else if (claim_mode == CHAT_WORK_BARE)
			chat_stream_fail(s, CHAT_ERROR_ENDPOINT_ERROR, false, 0,
							 "the request could not be built");
		else if (jobs[i].cancel)
			chat_stream_cancel(s);
		else
		{
			chat_blame_on(jobs[i].id);
			chat_prepare_request(s, &jobs[i], &contexts[i], tools[i]);
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
	Oid		   *owners = palloc(sizeof(Oid) * (chat_streams.n + 1));
	int			n = 0;
	dlist_iter	iter;

	wish->held = palloc(sizeof(int) * (chat_streams.n + 1));
	dlist_foreach(iter, &chat_streams.all)
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

/* Says what the claim takes: in a transaction, whose memory it uses. */
static void
plan_wish(ChatClaim *wish)
{
	int			room_left = chat_streams.limit - chat_streams.n;
	int			most = chat_recheck_may_claim()
	? Min(room_left, chat_streams_batch(MAX_CLAIM)) : 0;
	ChatRoom	room;

	wish->holder = chat_slot->identity;
	wish->bare = claim_mode == CHAT_WORK_BARE;
	wish->cancelled = cancels_due;
	if (cancels_due)
		most = MAX_CLAIM;
	wish->limit = claim_mode == CHAT_WORK_BATCH ? most : Min(most, 1);
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
		chat_queue_release(chat_slot->identity, ends, n);
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
	c->streams = chat_work_alloc(sizeof(ChatStream *) * n);
	c->seqs = chat_work_alloc(sizeof(int64) * n);
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
	chat_prepare_record(c->streams, n);
	for (int i = 0; i < n; i++)
		c->seqs[i] = chat_event_collect(&batch, &c->streams[i]->target,
										c->streams[i]->seq,
										&c->streams[i]->log);
	chat_outbox_write(&batch, c->quiet);
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
		chat_streams_mark(s);
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
			chat_due.sides = true;
			chat_due.claim = 0;
			chat_shmem_publish(&s->job.task);
			chat_stream_free(s);
			continue;
		}
		chat_streams_add(s);
		if (s->ended)
			chat_streams_mark(s);
		else
			open_stream(s);
		chat_shmem_publish(&s->job.task);
	}
	chat_side_open(true);
	chat_pace_claimed(c->begun);
	if (c->n > 0)
		chat_due.check = Min(chat_due.check, now + 1);
}

/* Doubles the time until the next look. */
static void
back_off(void)
{
	claim_backoff = Min(Max(claim_backoff * 2, CHAT_MIN_BACKOFF),
						CHAT_MAX_BACKOFF);
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
	chat_due.claim = cancels_due ||
		(crowded && chat_recheck_may_claim() &&
		 chat_streams.n + c->n < chat_streams.limit) ? 0 : CHAT_NEVER;
	/* is something locked? */
	skipped = c->wish.cancelled ? rest->cancelled && c->n == 0
		: rest->due && c->n < c->wish.limit;
	if (!skipped)
		claim_backoff = locked_until = 0;
	else if (now >= locked_until)
	{
		back_off();
		locked_until = now + claim_backoff;
	}
	chat_due.rest = skipped ? locked_until : CHAT_NEVER;
	if (rest->next_run != DT_NOEND)
		chat_due.rest =
			Min(chat_due.rest, now + 1 +
				TimestampDifferenceMilliseconds(GetCurrentTimestamp(),
												rest->next_run));
	if (rest->closed)
		chat_due.rest = Min(chat_due.rest, chat_throttle_due());
}

/* Plans what comes after a claim. */
static void
plan_next(const Claim *c)
{
	int64		now = chat_stream_clock();

	plan_claim(c, now);
	chat_errand_plan(&c->rest, now);
	chat_upkeep_plan_beat(c->rest.parked || chat_streams.n > 0 || c->n > 0,
						  now);
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

/* Begins a claim: who rings from here on may have come too late for it. */
static void
begin_claim(Claim *c)
{
	memset(c, 0, sizeof(*c));
	c->begun = chat_stream_clock();
	if (pg_atomic_exchange_u32(&chat_slot->rung, 0))
		chat_due.turns_retry = 0;
}

/* Transaction, of a flush: the same as a claim of its own. */
static void
joint_work(void *arg)
{
	begin_claim(arg);
	claim_work(arg);
}

/* Takes over what a flush has claimed for us. */
static void
joint_committed(void *arg)
{
	Claim	   *c = arg;

	plan_next(c);
	claim_committed(c);
	chat_throttle_settle();
}

/* Forgets a claim that has failed with a flush: it is made alone, at once. */
static void
joint_undone(void *arg)
{
	undo_claim(arg);
	chat_due.claim = 0;
}

/*
 * Lets a flush make the claim that is due, in the transaction of its ends, or
 * that would be due then, for those that come next; false if it is a special
 * one, or would most likely fail.
 */
bool
chat_claim_join(ChatFlushGuest *guest)
{
	static Claim joint;

	if (claim_mode != CHAT_WORK_BATCH || cancels_due ||
		chat_stream_clock() < apart_until ||
		(!chat_pace_is_busy() && chat_claim_due() > chat_stream_clock()))
		return false;
	memset(&joint, 0, sizeof(joint));
	*guest = (ChatFlushGuest) {joint_work, joint_committed, joint_undone,
		&joint};
	return true;
}

/* Takes jobs from the queue. */
void
chat_claim_run(void)
{
	Claim		c;
	ErrorData  *edata;

	begin_claim(&c);
	edata = chat_work_try("claim jobs", true, claim_work, &c);
	if (chat_work_is_too_loud(edata))
	{
		undo_claim(&c);
		begin_claim(&c);
		c.quiet = true;
		edata = chat_work_try("claim jobs", true, claim_work, &c);
	}
	if (edata == NULL)
	{
		joint_committed(&c);
		if (claim_mode == CHAT_WORK_BARE)
			claim_mode = CHAT_WORK_SINGLE;
		else if (c.n == 0)
			claim_mode = CHAT_WORK_BATCH;
		if (claim_mode != CHAT_WORK_BATCH)
			chat_due.claim = 0;
		return;
	}
	undo_claim(&c);
	if (!chat_work_is_systemic(edata) && claim_mode != CHAT_WORK_BARE)
	{
		claim_mode = claim_mode == CHAT_WORK_BATCH
			? CHAT_WORK_SINGLE : CHAT_WORK_BARE;
		chat_due.claim = 0;
		return;
	}
	/* not even a bare claim: it is not the job's fault */
	claim_mode = CHAT_WORK_BATCH;
	cancels_due = false;
	chat_due.claim = CHAT_NEVER;
	back_off();
	chat_due.rest = apart_until = chat_stream_clock() + claim_backoff;
}

/*
 * Returns when the queue is to be looked at: also when there is no room for
 * more.  New turns wait for each other, what is known to be there does not.
 */
int64
chat_claim_due(void)
{
	int64		due = Min(chat_due.claim, chat_due.rest);

	if (!crowded && !cancels_due && claim_mode == CHAT_WORK_BATCH)
		due = Max(due, chat_pace_claim());
	return due;
}

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
void
chat_claim_adopt(void)
{
	chat_due.adopt = CHAT_NEVER;
	if (chat_work_try("take up jobs", true, adopt_work, NULL))
		chat_due.adopt = chat_stream_clock() + CHAT_MAX_BACKOFF;
	else
		chat_blame_forget();
	chat_due.claim = 0;
}
