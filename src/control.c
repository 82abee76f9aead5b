/*
 * control.c
 *		pause, resume and drain: what an administrator does before a restart
 *		or while an endpoint is out of order.
 *
 * Owns the one row of chat_control.  It is durable: a database that was
 * paused stays so over restarts.  A worker reads it when it starts and when
 * it is rung to look at its jobs, and says in its slot what it has read, so
 * that drain knows when no worker can take anything more.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "compat.h"
#include "control.h"
#include "db.h"
#include "shmem.h"

/* how often drain looks, in ms */
#define DRAIN_SLICE 50

PG_FUNCTION_INFO_V1(chat_pause);
PG_FUNCTION_INFO_V1(chat_resume);
PG_FUNCTION_INFO_V1(chat_drain);

/* $1 database */
CHAT_STMT(read_control,
		  "SELECT c.paused FROM chat.chat_control AS c WHERE $1 <> 0", OIDOID);

/* $1 paused, $2 role */
CHAT_STMT(set_control,
		  "INSERT INTO chat.chat_control AS c (paused, changed_at, changed_by)"
		  " VALUES ($1, now(), $2) ON CONFLICT (only_row) DO UPDATE"
		  " SET paused = $1, changed_at = now(), changed_by = $2"
		  " WHERE c.paused <> $1",
		  BOOLOID, OIDOID);

/* $1 database */
CHAT_STMT(count_running,
		  "SELECT count(*) FROM chat.chat_job"
		  " WHERE holder IS NOT NULL AND database = $1",
		  OIDOID);

/* True if the workers shall take nothing more. */
bool
chat_control_paused(void)
{
	Datum		values[1] = {ObjectIdGetDatum(MyDatabaseId)};

	return chat_db_exec(&read_control, values, NULL) > 0 &&
		chat_db_bool(0, 1);
}

/* Pauses or resumes; true if that changed anything. */
static bool
set_paused(bool paused)
{
	ChatScope	scope;
	Datum		values[2];
	bool		changed;

	chat_db_enter(&scope);
	values[0] = BoolGetDatum(paused);
	values[1] = ObjectIdGetDatum(scope.caller);
	changed = chat_db_exec(&set_control, values, NULL) > 0;
	chat_db_leave(&scope);
	chat_shmem_ring_at_commit(true);
	return changed;
}

/* pause: no worker takes a job any more; those at work go on. */
Datum
chat_pause(PG_FUNCTION_ARGS)
{
	chat_shmem_require();
	PG_RETURN_BOOL(set_paused(true));
}

/* resume: the workers take jobs again. */
Datum
chat_resume(PG_FUNCTION_ARGS)
{
	chat_shmem_require();
	PG_RETURN_BOOL(set_paused(false));
}

/* Counts the jobs at work. */
static int64
running_jobs(void)
{
	ChatScope	scope;
	Datum		values[1] = {ObjectIdGetDatum(MyDatabaseId)};
	int64		n;

	chat_db_enter(&scope);
	chat_db_exec(&count_running, values, NULL);
	n = chat_db_int64(0, 1, 0);
	chat_db_leave(&scope);
	return n;
}

/* True if every worker of this database knows that it is paused. */
static bool
all_paused(void)
{
	bool		all = true;

	LWLockAcquire(chat_shared->lock, LW_SHARED);
	for (int i = 0; i < chat_shared->nslots; i++)
	{
		ChatSlot   *slot = &chat_shared->slots[i];

		if (slot->database == MyDatabaseId && slot->pid != 0 &&
			slot->kind == CHAT_SLOT_WORKER &&
			slot->state == CHAT_SLOT_RUNNING &&
			pg_atomic_read_u32(&slot->paused) == 0)
			all = false;
	}
	LWLockRelease(chat_shared->lock);
	return all;
}

/* Waits, in no transaction, until nothing is at work; returns what is. */
static int64
wait_for_rest(TimestampTz until)
{
	for (;;)
	{
		bool		sure = all_paused();
		int64		n = running_jobs();

		SPI_commit();
		if ((n == 0 && sure) || GetCurrentTimestamp() >= until)
			return n;
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 DRAIN_SLICE, chat_wait_event("ChatDrain"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

/* drain: pauses, waits until nothing is at work any more. */
Datum
chat_drain(PG_FUNCTION_ARGS)
{
	TupleDesc	desc;
	Interval   *span;
	TimestampTz until;
	Datum		left;
	bool		isnull = false;

	chat_shmem_require();
	if (fcinfo->context == NULL || !IsA(fcinfo->context, CallContext) ||
		castNode(CallContext, fcinfo->context)->atomic)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_TERMINATION),
				 errmsg("chat.drain() cannot run inside a transaction block"),
				 errhint("Call chat.pause() and commit.")));
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("timeout must not be null")));
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	desc = BlessTupleDesc(desc);
	span = PG_GETARG_INTERVAL_P(0);
	until = DatumGetTimestampTz(DirectFunctionCall2(timestamptz_pl_interval,
													TimestampTzGetDatum(GetCurrentTimestamp()),
													IntervalPGetDatum(span)));
	SPI_connect_ext(SPI_OPT_NONATOMIC);
	(void) set_paused(true);
	SPI_commit();
	left = Int64GetDatum(wait_for_rest(until));
	SPI_finish();
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(desc, &left, &isnull)));
}
