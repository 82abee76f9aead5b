/*
 * notice.c
 *		Listeners of tasks that were cancelled before they had started.
 *
 * Owns the jobs of kind "notice".  A task that waits behind another in its
 * session ends in the transaction of whoever cancels it, which writes no
 * event and takes no lock of the notification queue (P5).  It leaves a
 * notice, and a worker tells the listeners: start, abort.  Until then readers
 * get the same from the task's row (replay.c).
 *
 * A worker does this beside the turns, in the transaction that stores the
 * results of side.c's requests.  Notices stand in the table until they are
 * told; what has to be looked at when is kept here, local to the process.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/uuid.h"

#include "db.h"
#include "event.h"
#include "notice.h"
#include "outbox.h"
#include "queue.h"
#include "shmem.h"
#include "stream.h"

/* notices of one transaction */
#define MAX_NOTICES 256
#define MIN_DELAY 10
#define MAX_DELAY 1000
/* after so many failures the events are stored without being notified */
#define MAX_LOUD 3

static int64 due = PG_INT64_MAX;
static int	tries = 0;			/* since all were told */
static int	failures = 0;		/* of them */
static bool looked = false;		/* in this transaction */
static bool more = false;		/* notices were left */

/*
 * $1 database, $2 limit, $3 first run of this timeline: takes notices whose
 * session nobody holds locked.  Those of the database that this one is a copy
 * of are void.
 */
CHAT_STMT(take_notices,
		  "WITH picked AS MATERIALIZED ("
		  " SELECT j.id, j.task_id, s.channel FROM chat.chat_job AS j"
		  " JOIN chat.chat_session AS s ON s.id = j.session_id"
		  " WHERE j.server = '' AND j.kind = 'notice' AND j.database = $1"
		  "  AND j.holder IS NULL"
		  " ORDER BY j.id LIMIT $2"
		  " FOR UPDATE OF j SKIP LOCKED"
		  " FOR NO KEY UPDATE OF s SKIP LOCKED"
		  "), gone AS ("
		  " DELETE FROM chat.chat_job AS j WHERE j.server = ''"
		  "  AND j.kind = 'notice' AND j.holder IS NULL"
		  "  AND (j.id IN (SELECT p.id FROM picked AS p)"
		  "   OR j.database <> $1)"
		  "), task AS ("
		  " UPDATE chat.chat_task AS t SET run = GREATEST(t.run + 1, $3),"
		  "  slot = (SELECT e.slot FROM chat.chat_event_slot AS e"
		  "   ORDER BY e.opened_at DESC LIMIT 1)"
		  " FROM picked AS p WHERE t.id = p.task_id AND t.slot IS NULL"
		  " RETURNING t.id, t.answer_id, t.slot, t.run, p.channel)"
		  " SELECT id, answer_id, slot, run, channel::text FROM task",
		  OIDOID, INT4OID, INT4OID);

/* $1 database */
CHAT_STMT(any_notice,
		  "SELECT EXISTS (SELECT FROM chat.chat_job AS j"
		  " WHERE j.server = '' AND j.kind = 'notice' AND j.database = $1"
		  "  AND j.holder IS NULL)",
		  OIDOID);

/* Returns when notices are to be looked at, PG_INT64_MAX = there are none. */
int64
chat_notice_due(void)
{
	return pg_atomic_read_u32(&chat_slot->notices) ? 0 : due;
}

/* Adds the events of one task to a batch. */
static void
collect(ChatEventBatch *batch, uint64 row)
{
	/* the batch points to it */
	ChatEventTarget *target = palloc0(sizeof(ChatEventTarget));
	pg_uuid_t	task = chat_db_uuid(row, 1);
	pg_uuid_t	answer = chat_db_uuid(row, 2);
	Datum		id = UUIDPGetDatum(&answer);
	bool		isnull;
	ChatEventLog log = {0};

	chat_event_aim(target, &task,
				   DatumGetInt16(chat_db_datum(row, 3, &isnull)),
				   chat_db_text(row, 5));
	chat_event_add(&log, CurrentMemoryContext,
				   psprintf("{\"type\":\"start\",\"messageId\":\"%s\"}",
							DatumGetCString(DirectFunctionCall1(uuid_out, id))));
	chat_event_add(&log, CurrentMemoryContext, "{\"type\":\"abort\"}");
	(void) chat_event_collect(batch, target,
							  (int64) chat_db_int32(row, 4, 0) << CHAT_EVENT_RUN_SHIFT,
							  &log);
}

/* In a transaction: tells the notices that there are. */
void
chat_notice_tell(void)
{
	Datum		values[3] = {ObjectIdGetDatum(MyDatabaseId),
		Int32GetDatum(MAX_NOTICES),
	Int32GetDatum(chat_queue_first_run())};
	ChatEventBatch batch = {0};
	uint64		n;

	looked = chat_notice_due() <= chat_stream_clock();
	if (!looked)
		return;
	/* what is committed from here on asks anew */
	pg_atomic_write_u32(&chat_slot->notices, 0);
	due = 0;
	n = chat_db_exec(&take_notices, values, NULL);
	for (uint64 row = 0; row < n; row++)
		collect(&batch, row);
	chat_db_exec(&any_notice, values, NULL);
	more = chat_db_bool(0, 1);
	chat_outbox_write(&batch, failures >= MAX_LOUD);
}

/* After the transaction: plans when to look again. */
void
chat_notice_told(bool committed)
{
	int64		now = chat_stream_clock();

	if (!(committed ? looked : chat_notice_due() <= now))
		return;
	looked = false;
	due = PG_INT64_MAX;
	if (committed && !more)
	{
		tries = failures = 0;
		return;
	}
	/* somebody holds a session locked, or the system is out of order */
	if (!committed)
	{
		pg_atomic_write_u32(&chat_slot->notices, 0);
		failures++;
	}
	due = now + Min(MIN_DELAY << Min(tries++, 10), MAX_DELAY);
}
