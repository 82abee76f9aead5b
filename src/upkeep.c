/*
 * upkeep.c
 *		What is done now and then, whoever asks something: heartbeats, old
 *		events, a clock that was set back, tasks that no job will end.
 *
 * Owns nothing but what the clock said last, local to the process.
 */
#include "postgres.h"

#include "utils/guc.h"
#include "utils/timestamp.h"

#include "event.h"
#include "outbox.h"
#include "queue.h"
#include "retention.h"
#include "shmem.h"
#include "stream.h"
#include "streams.h"
#include "turn.h"
#include "upkeep.h"
#include "work.h"

/* a clock that was set back by less is waited for, in ms */
#define CLOCK_SLACK 1000

static int	heartbeat_interval = 15000;

/* Declares the setting of the heartbeats. */
void
chat_upkeep_init(void)
{
	DefineCustomIntVariable("chat.heartbeat_interval",
							"Time between two heartbeats of a task that is silent.",
							NULL, &heartbeat_interval, 15000, 100, 3600000,
							PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
}

/* Transaction: tells listeners of tasks that have nothing else to say. */
static void
beat_work(void *arg)
{
	int64		now = chat_stream_clock();
	dlist_iter	iter;

	dlist_foreach(iter, &chat_streams.all)
	{
		ChatStream *s = dlist_container(ChatStream, node, iter.cur);

		if (now - s->content_at >= heartbeat_interval)
			chat_event_heartbeat(s->target.channel, s->target.task_text);
	}
	chat_turn_heartbeat();
}

/* Plans heartbeats while there are tasks to send them for. */
void
chat_upkeep_plan_beat(bool wanted, int64 now)
{
	if (!wanted)
		chat_due.beat = CHAT_NEVER;
	else if (chat_due.beat == CHAT_NEVER)
		chat_due.beat = now + heartbeat_interval;
}

/* Sends heartbeats: no rows, and not durable. */
void
chat_upkeep_beat(int64 now)
{
	(void) chat_work_try("send heartbeats", false, beat_work, NULL);
	chat_due.beat = now + heartbeat_interval;
}

/* Retires old events; streams that wrote to their slot go on in another. */
void
chat_upkeep_retire(void)
{
	ChatRetired r = {.holder = chat_slot->identity};
	ErrorData  *edata = chat_work_try("retire events", true,
										chat_retention_work, &r);
	dlist_iter	iter;

	chat_retention_done(&r, edata != NULL, chat_stream_clock());
	if (edata || !r.moved)
		return;
	dlist_foreach(iter, &chat_streams.all)
	{
		ChatStream *s = dlist_container(ChatStream, node, iter.cur);

		if (s->target.slot == r.from)
			s->target.slot = r.to;
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
void
chat_upkeep_check_clock(void)
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
	if (chat_work_try("follow the clock", true, move_work, &back) == NULL)
		last = offset;
}

/* Adds the events that end a stray task to a batch. */
static void
collect_stray(ChatEventBatch *batch, const ChatStray *stray)
{
	/* the batch points to it */
	ChatEventTarget *target = palloc0(sizeof(ChatEventTarget));
	ChatEventLog log = {0};

	chat_event_aim(target, &stray->task, stray->slot, stray->channel);
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
	chat_outbox_write(&batch, false);
	if (n > 0)
		ereport(LOG,
				(errmsg("chat worker ends %d tasks that have no job", n),
				 errdetail("This database was restored or copied, or its queue was emptied.")));
}

/* Ends stray tasks; looks again when somebody holds a session locked. */
void
chat_upkeep_end_strays(int64 now)
{
	bool		skipped = false;

	if (chat_work_try("end tasks without a job", true, strays_work,
					  &skipped))
		skipped = true;
	chat_due.strays = skipped ? now + CHAT_MAX_BACKOFF : CHAT_NEVER;
}
