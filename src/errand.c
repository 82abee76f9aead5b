/*
 * errand.c
 *		What turns wait for: calls of tools, titles and summaries.
 *
 * Each errand is claimed or judged in one transaction of the loop, runs
 * elsewhere (turn.c, tool.c, httptool.c, side.c), and is stored in another.
 *
 * Owns how the turns of parked tasks go on after an error, local to the
 * process.
 */
#include "postgres.h"

#include "utils/uuid.h"

#include "errand.h"
#include "event.h"
#include "httptool.h"
#include "outbox.h"
#include "queue.h"
#include "shmem.h"
#include "side.h"
#include "stream.h"
#include "tool.h"
#include "turn.h"
#include "work.h"

/* parked tasks of one transaction */
#define MAX_TURNS 256
/* calls of HTTP tools of one claim */
#define MAX_CALLS 256
/* titles and the like of one claim */
#define MAX_SIDES 32

static ChatWorkMode turn_mode = CHAT_WORK_BATCH;
static int	turns_backoff = 0;

/* What a turn of the parked tasks brought. */
typedef struct Turns
{
	int			n;
	pg_uuid_t  *tasks;
	bool		quiet;
} Turns;

/* Plans the errands by what a claim has left in the queue. */
void
chat_errand_plan(const ChatQueueRest *rest, int64 now)
{
	chat_due.turns = rest->turns && now >= chat_due.turns_retry;
	if (!rest->turns)
		turns_backoff = 0;
	else if (!chat_due.turns)
		chat_due.rest = Min(chat_due.rest, chat_due.turns_retry);
	chat_due.tools = rest->tools;
	chat_due.sides = rest->sides;
}

/* Transaction: gives the due parked tasks their turn. */
static void
turn_work(void *arg)
{
	Turns	   *t = arg;
	ChatEventBatch batch = {0};
	pg_uuid_t  *tasks;

	t->n = chat_turn_run(chat_slot->identity,
						 turn_mode == CHAT_WORK_BATCH ? MAX_TURNS : 1,
						 turn_mode == CHAT_WORK_BARE, &batch, &tasks);
	if (t->n == 0)
		return;
	t->tasks = memcpy(chat_work_alloc(sizeof(pg_uuid_t) * t->n),
					  tasks, sizeof(pg_uuid_t) * t->n);
	chat_outbox_write(&batch, t->quiet);
}

/* Plans what comes after turns of n tasks: of all that could be had. */
static void
turns_committed(int n)
{
	if (turn_mode == CHAT_WORK_BARE)
		turn_mode = CHAT_WORK_SINGLE;
	else if (n == 0)
		turn_mode = CHAT_WORK_BATCH;
	chat_due.turns = turn_mode != CHAT_WORK_BATCH;
	if (n > 0)
	{
		turns_backoff = 0;
		chat_due.claim = 0;
		return;
	}
	/* somebody holds what is due locked, if anything is */
	turns_backoff = Min(Max(turns_backoff * 2, CHAT_MIN_BACKOFF),
						CHAT_MAX_BACKOFF);
	chat_due.turns_retry = chat_stream_clock() + turns_backoff;
	chat_due.rest = Min(chat_due.rest, chat_due.turns_retry);
}

/*
 * Gives the due parked tasks their turn.  When that fails, they have it one by
 * one, and the task that fails alone has failed.
 */
void
chat_errand_run_turns(void)
{
	Turns		t = {0};
	ErrorData  *edata = chat_work_try("look after tool calls", true,
										turn_work, &t);

	if (chat_work_is_too_loud(edata))
	{
		t.quiet = true;
		edata = chat_work_try("look after tool calls", true, turn_work, &t);
	}
	if (edata == NULL)
	{
		for (int i = 0; i < t.n; i++)
			chat_shmem_publish(&t.tasks[i]);
		turns_committed(t.n);
		return;
	}
	chat_due.turns = !chat_work_is_systemic(edata) &&
		turn_mode != CHAT_WORK_BARE;
	if (chat_due.turns)
	{
		turn_mode = turn_mode == CHAT_WORK_BATCH
			? CHAT_WORK_SINGLE : CHAT_WORK_BARE;
		return;
	}
	turn_mode = CHAT_WORK_BATCH;
	chat_due.turns_retry = chat_stream_clock() + CHAT_MAX_BACKOFF;
	chat_due.rest = Min(chat_due.rest, chat_due.turns_retry);
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
	*(int *) arg = chat_httptool_claim(chat_slot->identity, MAX_CALLS);
}

/* Transaction: stores the results of HTTP tool calls. */
static void
store_http_work(void *arg)
{
	chat_httptool_store(chat_slot->identity);
}

/* Stores the results of HTTP tools. */
void
chat_errand_store_tools(void)
{
	bool		committed = chat_work_try("store results of tools", true,
											store_http_work, NULL) == NULL;

	chat_httptool_stored(committed, 100);
	chat_due.turns |= committed;
}

/* Has the tools run that wait. */
void
chat_errand_run_tools(void)
{
	int			n = 0;
	bool		failed = false;

	chat_due.tools = false;
	if (chat_work_try("look at tool jobs", true, judge_work, &failed) ||
		chat_tool_schedule())
		chat_due.rest = Min(chat_due.rest, chat_stream_clock() + 100);
	chat_due.turns |= failed;
	chat_httptool_open(chat_work_try("claim tool calls", true,
									   claim_http_work, &n) == NULL);
	if (n > 0)
		chat_due.check = 0;
	chat_due.tools = n == MAX_CALLS;
}

/* Transaction: tells what running tools have reported. */
static void
progress_work(void *arg)
{
	Turns	   *t = arg;
	ChatEventBatch batch = {0};
	pg_uuid_t  *tasks;

	t->n = chat_tool_progress(&batch, &tasks);
	t->tasks = memcpy(chat_work_alloc(sizeof(pg_uuid_t) * (t->n + 1)),
					  tasks, sizeof(pg_uuid_t) * t->n);
	chat_outbox_write(&batch, false);
}

/* Tells what running tools have reported. */
void
chat_errand_tell_progress(void)
{
	Turns		t = {0};

	if (chat_work_try("tell progress", true, progress_work, &t) == NULL)
		for (int i = 0; i < t.n; i++)
			chat_shmem_publish(&t.tasks[i]);
}

/* Transaction: takes jobs that ask for a title or a summary. */
static void
claim_sides_work(void *arg)
{
	*(int *) arg = chat_side_claim(chat_slot->identity, MAX_SIDES);
}

/* Has titles and summaries made that wait. */
void
chat_errand_run_sides(void)
{
	int			n = 0;
	bool		ok = chat_work_try("claim titles and summaries", true,
									 claim_sides_work, &n) == NULL;

	chat_side_open(ok);
	if (!ok)
		chat_due.rest = Min(chat_due.rest, chat_stream_clock() + 100);
	if (n > 0)
		chat_due.check = 0;
	chat_due.sides = n == MAX_SIDES;
}

/* Transaction: stores what came of requests beside the turns. */
static void
store_sides_work(void *arg)
{
	chat_side_store(chat_slot->identity);
}

/* Stores what came of requests beside the turns. */
void
chat_errand_store_sides(void)
{
	chat_side_stored(chat_work_try("store titles and summaries", true,
									 store_sides_work, NULL) == NULL);
	/* a turn may have waited for it */
	chat_due.claim = 0;
}
