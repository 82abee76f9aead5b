/*
 * retention.c
 *		Event streams are kept for a while: the rotation of the slots.
 *
 * Owns chat_event_slot, which holds a row for every slot that may hold
 * events: the one opened last takes the events of new tasks.  A slot without
 * a row is empty.  A quarter of the retention after the open slot got its
 * first event another one is opened; when a slot has been closed for the
 * retention, it is emptied by TRUNCATE.
 *
 * Before that the events of the tasks that have not ended go on to the open
 * slot, so a stream is always whole or gone.  The worker's own streams write
 * to a slot that they know from memory: it tells them of the move.
 *
 * Locks: the rows of chat_event_slot, skipped when somebody else has them (one
 * worker at a time does this); then the partition in ACCESS EXCLUSIVE mode,
 * but only when nobody has it, for nobody shall wait behind us.  Without it
 * the slot is left for later, and if need be the open slot is used for longer.
 *
 * While there is no event to retire, nothing is due.
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "storage/lmgr.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"

#include "db.h"
#include "reader.h"
#include "retention.h"

/* the open slot is changed this often in the time of the retention */
#define ROTATIONS 4
/* delays after somebody was in the way, in ms */
#define MIN_DELAY 1000
#define MAX_DELAY 60000

static int	event_retention = 3600; /* s */

/* when something is due; 0 = at once, to find out */
static int64 due = 0;
static int64 delay = 0;

/* ages in ms; an age below zero means that the clock was set back */
static ChatStmt lock_slots = {
	"SELECT slot, (EXTRACT(epoch FROM now() - opened_at) * 1000)::bigint,"
	" (SELECT count(*) FROM chat.chat_event_slot)"
	" FROM chat.chat_event_slot ORDER BY opened_at DESC, slot"
	" FOR UPDATE SKIP LOCKED",
	NULL, 0, NULL
};

/* $1 slot: it becomes the one opened last, whatever the clock says */
CHAT_STMT(open_slot,
		  "INSERT INTO chat.chat_event_slot (slot, opened_at)"
		  " SELECT $1, GREATEST(now(), max(opened_at) + '1 us'::interval)"
		  " FROM chat.chat_event_slot",
		  INT2OID);

/* $1 slot */
CHAT_STMT(forget_slot,
		  "DELETE FROM chat.chat_event_slot WHERE slot = $1", INT2OID);

/* $1 slot, $2 the open one: takes the events of unfinished tasks along */
CHAT_STMT(move_tasks,
		  "WITH moved AS ("
		  " UPDATE chat.chat_task AS t SET slot = $2"
		  " WHERE t.id = ANY (ARRAY("
		  "  SELECT r.id FROM chat.chat_task AS r"
		  "   WHERE r.status = 'running' AND r.slot = $1"
		  "  UNION ALL SELECT w.id FROM chat.chat_task AS w"
		  "   WHERE w.status = 'waiting' AND w.slot = $1"
		  "  UNION ALL SELECT q.id FROM chat.chat_task AS q"
		  "   WHERE q.status = 'queued' AND q.slot = $1)) RETURNING t.id"
		  "), copied AS ("
		  " INSERT INTO chat.chat_event (slot, task_id, seq, payload,"
		  "  created_at)"
		  " SELECT $2, e.task_id, e.seq, e.payload, e.created_at"
		  " FROM moved JOIN chat.chat_event AS e"
		  "  ON e.slot = $1 AND e.task_id = moved.id)"
		  " SELECT id FROM moved",
		  INT2OID, INT2OID);

/*
 * $1 tasks that were moved: who holds them.  Whoever is about to take one has
 * it locked, and has read its slot.
 */
CHAT_STMT(lock_holders,
		  "SELECT j.holder FROM chat.chat_job AS j"
		  " WHERE j.session_id = ANY (ARRAY(SELECT t.session_id"
		  "   FROM chat.chat_task AS t WHERE t.id = ANY ($1)))"
		  "  AND j.task_id = ANY ($1) AND j.kind = 'completion'"
		  " FOR UPDATE NOWAIT",
		  UUIDARRAYOID);

/* Declares the setting of the retention. */
void
chat_retention_init(void)
{
	DefineCustomIntVariable("chat.event_retention",
							"How long the events of tasks are kept.",
							"Later readers get the same stream rebuilt from the messages.",
							&event_retention, 3600, 1, INT_MAX / 1000,
							PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
}

/* Returns the retention in ms. */
static int64
retention(void)
{
	return (int64) event_retention * 1000;
}

/* Notes that events were stored. */
void
chat_retention_written(int64 now)
{
	if (due == CHAT_RETENTION_NEVER)
		due = now + retention() / ROTATIONS;
}

/* Has the slots looked at: the setting may have changed. */
void
chat_retention_recheck(void)
{
	due = 0;
}

/* Returns when chat_retention_work() is due. */
int64
chat_retention_due(void)
{
	return due;
}

/* True if a slot holds events. */
static bool
has_events(int slot)
{
	char		sql[80];

	snprintf(sql, sizeof(sql), "SELECT true FROM chat.chat_event_%d LIMIT 1",
			 slot);
	if (SPI_execute(sql, true, 1) != SPI_OK_SELECT)
		elog(ERROR, "could not read chat_event_%d", slot);
	return SPI_processed > 0;
}

/* Locks a slot's partition against everybody; false if somebody uses it. */
static bool
lock_partition(int slot)
{
	char		name[NAMEDATALEN];
	Oid			partition;

	snprintf(name, sizeof(name), "chat_event_%d", slot);
	partition = get_relname_relid(name, get_namespace_oid("chat", false));
	return OidIsValid(partition) &&
		ConditionalLockRelationOid(partition, AccessExclusiveLock);
}

/*
 * Moves what goes on to the open slot; true if there was anything.  A stream
 * of another worker ends first: it writes to the slot that it knows.
 */
static bool
move_on(int64 holder, int slot, int open)
{
	Datum		values[2] = {Int16GetDatum(slot), Int16GetDatum(open)};
	int			n = (int) chat_db_exec(&move_tasks, values, NULL);
	pg_uuid_t  *ids = palloc(sizeof(pg_uuid_t) * Max(n, 1));
	Datum	   *tasks = palloc(sizeof(Datum) * Max(n, 1));

	if (n == 0)
		return false;
	for (int i = 0; i < n; i++)
	{
		ids[i] = chat_db_uuid(i, 1);
		tasks[i] = UUIDPGetDatum(&ids[i]);
	}
	values[0] = chat_db_array(&chat_uuids, tasks, n);
	n = (int) chat_db_exec(&lock_holders, values, NULL);
	for (int i = 0; i < n; i++)
		if (chat_db_int64(i, 1, holder) != holder)
			ereport(ERROR,
					(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
					 errmsg("another worker writes to event slot %d", slot)));
	return true;
}

/*
 * Empties a slot, having moved what goes on to the open one; false if
 * somebody is in the way.
 */
static bool
retire_slot(ChatRetired *r, int slot, int open)
{
	Datum		values[1] = {Int16GetDatum(slot)};
	char		sql[80];

	if (!lock_partition(slot))
		return false;
	r->moved = move_on(r->holder, slot, open);
	r->from = slot;
	r->to = open;
	snprintf(sql, sizeof(sql), "TRUNCATE chat.chat_event_%d", slot);
	if (SPI_execute(sql, false, 0) != SPI_OK_UTILITY)
		elog(ERROR, "could not empty chat_event_%d", slot);
	chat_db_exec(&forget_slot, values, NULL);
	return true;
}

/* Opens a slot that is free; false if none is. */
static bool
open_next(const bool *used)
{
	for (int slot = 0; slot < CHAT_EVENT_SLOTS; slot++)
	{
		Datum		values[1] = {Int16GetDatum(slot)};

		if (used[slot])
			continue;
		chat_db_exec(&open_slot, values, NULL);
		return true;
	}
	return false;
}

/* Notes that something is due in so many ms. */
static void
plan(ChatRetired *r, int64 ms)
{
	ms = Max(Min(ms, retention()), 1);
	r->next = r->next < 0 ? ms : Min(r->next, ms);
}

/* Transaction: opens a slot, or empties one, or says when that is due. */
void
chat_retention_work(void *arg)
{
	ChatRetired *r = arg;
	int			slots[CHAT_EVENT_SLOTS] = {0};
	int64		ages[CHAT_EVENT_SLOTS] = {0};
	bool		used[CHAT_EVENT_SLOTS] = {false};
	int			n = (int) chat_db_exec(&lock_slots, NULL, NULL);
	int64		rotation = retention() / ROTATIONS;

	r->next = -1;
	r->busy = n == 0 || n != chat_db_int64(0, 3, 0);
	for (int i = 0; i < n && !r->busy; i++)
	{
		bool		isnull;

		slots[i] = DatumGetInt16(chat_db_datum(i, 1, &isnull));
		ages[i] = chat_db_int64(i, 2, 0);
		used[slots[i]] = true;
	}
	if (r->busy)
		return;
	/* the oldest first; it is as long closed as the next one is open */
	if (n > 1 && ages[n - 2] >= retention())
	{
		r->busy = !retire_slot(r, slots[n - 1], slots[0]);
		r->more = !r->busy;
		if (r->more)
			return;
	}
	else if (n > 1)
		plan(r, retention() - ages[n - 2]);
	if (!has_events(slots[0]))
		return;
	if (ages[0] >= rotation && open_next(used))
		r->more = true;
	else if (ages[0] < rotation)
		plan(r, rotation - ages[0]);
	else
		r->busy = true;
}

/* Plans the next look by what the last one has found. */
void
chat_retention_done(const ChatRetired *r, bool failed, int64 now)
{
	bool		again = failed || r->busy;

	delay = again ? Min(Max(delay * 2, MIN_DELAY), MAX_DELAY) : 0;
	if (again)
		due = now + delay;
	else if (r->more)
		due = now;
	else
		due = r->next < 0 ? CHAT_RETENTION_NEVER : now + r->next;
}
