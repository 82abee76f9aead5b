/*
 * reader.c
 *		The functions that read event streams.
 *
 * Owns nothing that outlives a call but prepared statements.  A reader takes
 * part in nothing: it reads under its own snapshot, in a subtransaction that
 * is rolled back, so that neither a reader that waits nor a transaction that
 * has read holds a lock on a table, and the retention of events never meets
 * one for longer than a query.
 *
 * Whether a stream is whole is seen from its slot: retention empties a slot
 * at once, and takes the streams of tasks that go on elsewhere first.  So a
 * started task without any event has lost them all, or the snapshot is older
 * than the move; a new snapshot tells, and where there can be none the answer
 * is the replay, as it is for a task whose events are gone (replay.c).
 *
 * Numbers: a replay has its own, from CHAT_REPLAY_SEQ on.  Whoever has seen a
 * part of the live stream and asks on after its retention gets the replay as
 * a whole.  It opens, as every stream does, with start, which says that the
 * message begins from nothing.  Whoever has seen a part of the replay gets
 * the rest of it.
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#include "db.h"
#include "fold.h"
#include "reader.h"
#include "replay.h"
#include "shmem.h"

/* longest wait, in ms */
#define MAX_WAIT 30000

PG_FUNCTION_INFO_V1(chat_get_task_events);
PG_FUNCTION_INFO_V1(chat_wait_task_events);
PG_FUNCTION_INFO_V1(chat_task_snapshot);
PG_FUNCTION_INFO_V1(chat_sse);

/* $1 task, $2 caller's role, $3 chat.user_id */
CHAT_STMT(find_task,
		  "SELECT t.session_id, t.status, t.slot, t.answer_id, t.error::text,"
		  " COALESCE(t.finished_at, t.created_at), t.finished_at IS NOT NULL,"
		  " t.started_at IS NOT NULL, t.usage::text"
		  " FROM chat.chat_task AS t"
		  " JOIN chat.chat_session AS s ON s.id = t.session_id"
		  " WHERE t.id = $1 AND pg_catalog.pg_has_role($2, s.owner, 'USAGE')"
		  " AND ($3 = '' OR s.user_id = $3)",
		  UUIDOID, OIDOID, TEXTOID);

/* What is asked for. */
typedef struct Question
{
	pg_uuid_t  *task;			/* NULL: nothing is found */
	int64		after;
	int64		max_rows;		/* -1 = all */
} Question;

/* What is there. */
typedef struct Answer
{
	bool		found;			/* there is such a task, for the caller */
	bool		ended;			/* and nothing comes after these events */
	ChatReplayTask task;
	int			slot;			/* -1 = none */
	ChatEventRows events;
} Answer;

/* ---------- reading ---------- */

/*
 * Returns a statement on the partition of one slot: only that is locked and
 * looked at.  kind 0: $1 task, $2 after, $3 limit; kind 1: $1 task.
 */
static ChatStmt *
slot_stmt(int slot, int kind)
{
	static ChatStmt stmts[CHAT_EVENT_SLOTS][2];
	static const Oid types[] = {UUIDOID, INT8OID, INT8OID};
	ChatStmt   *stmt = &stmts[slot][kind];

	if (stmt->sql == NULL)
	{
		char	   *sql = kind == 0
		? psprintf("SELECT seq, payload, created_at FROM chat.chat_event_%d"
				   " WHERE slot = %d AND task_id = $1 AND seq > $2"
				   " ORDER BY seq LIMIT $3", slot, slot)
		: psprintf("SELECT true FROM chat.chat_event_%d"
				   " WHERE slot = %d AND task_id = $1 LIMIT 1", slot, slot);

		stmt->types = types;
		stmt->ntypes = kind == 0 ? 3 : 1;
		stmt->sql = MemoryContextStrdup(TopMemoryContext, sql);
	}
	return stmt;
}

/*
 * Runs a statement, and stays in the current memory context: SPI's own, which
 * it leaves us in, is gone before the answer is used.
 */
static uint64
run(ChatStmt *stmt, Datum *values, const char *nulls)
{
	MemoryContext context = CurrentMemoryContext;
	uint64		n = chat_db_exec(stmt, values, nulls);

	MemoryContextSwitchTo(context);
	return n;
}

/* Reads the task; false if there is none that the caller may see. */
static bool
read_task(const ChatScope *scope, const Question *q, Answer *a)
{
	Datum		values[3];
	bool		isnull;

	values[0] = UUIDPGetDatum(q->task);
	chat_db_caller(scope, values);
	if (run(&find_task, values, NULL) == 0)
		return false;
	a->task.id = *q->task;
	a->task.session = chat_db_uuid(0, 1);
	a->task.status = chat_db_text(0, 2);
	a->slot = DatumGetInt16(chat_db_datum(0, 3, &isnull));
	if (isnull || a->slot < 0 || a->slot >= CHAT_EVENT_SLOTS)
		a->slot = -1;
	a->task.answer = chat_db_uuid(0, 4);
	a->task.error = chat_db_text(0, 5);
	a->task.at = DatumGetTimestampTz(chat_db_datum(0, 6, &isnull));
	a->ended = a->task.ended = chat_db_bool(0, 7);
	a->task.started = chat_db_bool(0, 8);
	a->task.usage = chat_db_text(0, 9);
	return true;
}

/* Reads the task's stored events; false if it has none at all. */
static bool
read_stored(const Question *q, Answer *a)
{
	Datum		values[3] = {UUIDPGetDatum(q->task), Int64GetDatum(q->after),
	Int64GetDatum(q->max_rows)};
	uint64		n;

	if (a->slot < 0)
		return false;
	n = run(slot_stmt(a->slot, 0), values, q->max_rows < 0 ? "  n" : NULL);
	for (uint64 i = 0; i < n; i++)
	{
		ChatEventRow *row = chat_replay_add(&a->events);
		bool		isnull;

		row->seq = chat_db_int64(i, 1, 0);
		row->json.data = chat_db_text(i, 2);
		row->json.len = strlen(row->json.data);
		row->at = DatumGetTimestampTz(chat_db_datum(i, 3, &isnull));
	}
	return n > 0 || run(slot_stmt(a->slot, 1), values, NULL) > 0;
}

/* Reads the replay, from where the caller is in it. */
static void
read_replay(const Question *q, Answer *a)
{
	ChatEventRows all;

	chat_replay_task(&a->task, &all);
	a->events.n = 0;
	for (int i = 0; i < all.n; i++)
		if (all.rows[i].seq > q->after &&
			(q->max_rows < 0 || a->events.n < q->max_rows))
			*chat_replay_add(&a->events) = all.rows[i];
}

/* Reads what is asked for, inside chat_db_enter(). */
static void
read_answer(const ChatScope *scope, const Question *q, Answer *a)
{
	for (int try = 0;; try++)
	{
		memset(a, 0, sizeof(*a));
		a->found = q->task != NULL && read_task(scope, q, a);
		if (!a->found)
		{
			a->ended = true;
			return;
		}
		if (q->after < CHAT_REPLAY_SEQ && read_stored(q, a))
			return;
		/* moved to another slot meanwhile? the next statement sees */
		if (a->slot < 0 || try > 0 || IsolationUsesXactSnapshot() ||
			q->after >= CHAT_REPLAY_SEQ)
			break;
	}
	if (strcmp(a->task.status, "queued") != 0 &&
		(a->ended || q->after < CHAT_REPLAY_SEQ))
		read_replay(q, a);
}

/* Sets what makes a plan probe by key, whatever the statistics say. */
static void
set_options(void)
{
	static const char *const options[][2] = {
		{"enable_seqscan", "off"},
		{"enable_bitmapscan", "off"},
		{"plan_cache_mode", "force_generic_plan"},
		{"jit", "off"},
	};

	for (size_t i = 0; i < lengthof(options); i++)
		(void) set_config_option(options[i][0], options[i][1], PGC_USERSET,
								 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0,
								 false);
}

/*
 * Reads what is asked for, under a new snapshot where the isolation level
 * has one; the answer is allocated in the current context.  The rollback
 * gives the tables' locks back.
 */
static void
answer_query(const Question *q, Answer *a)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	ChatScope	scope;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	chat_db_enter(&scope);
	set_options();
	MemoryContextSwitchTo(context);
	read_answer(&scope, q, a);
	chat_db_leave(&scope);
	RollbackAndReleaseCurrentSubTransaction();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
}

/* ---------- waiting ---------- */

/* Undoes chat_shmem_wait_prepare() when an error or the end interrupts. */
static void
stop_waiting(int code, Datum task)
{
	chat_shmem_wait_cancel(DatumGetUUIDP(task));
}

/*
 * Reads; with nothing there, sleeps until the task has moved or the time has
 * come.  False: it has slept, look again.
 */
static bool
try_answer(const Question *q, Answer *a, int64 until)
{
	volatile bool done = true;
	uint64		seen = chat_shmem_wait_prepare(q->task);

	PG_ENSURE_ERROR_CLEANUP(stop_waiting, UUIDPGetDatum(q->task));
	{
		long		left;

		answer_query(q, a);
		left = (long) (until - chat_shmem_clock());
		if (a->events.n == 0 && !a->ended && left > 0)
		{
			(void) chat_shmem_wait(q->task, seen, left);
			done = false;
		}
	}
	PG_END_ENSURE_ERROR_CLEANUP(stop_waiting, UUIDPGetDatum(q->task));
	stop_waiting(0, UUIDPGetDatum(q->task));
	return done;
}

/* Raises an error where nothing new would be seen, or nobody would wake us. */
static void
require_news(void)
{
	chat_shmem_require();
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("cannot wait for events during recovery"),
				 errhint("Wait on the primary, or read with chat.get_task_events().")));
	if (IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
				 errmsg("cannot wait for events in a transaction of isolation level REPEATABLE READ or SERIALIZABLE"),
				 errdetail("Its snapshot would never show them."),
				 errhint("Wait in a transaction of isolation level READ COMMITTED.")));
}

/* Reads what is asked for, waiting up to timeout ms for there to be some. */
static void
await_answer(const Question *q, Answer *a, int64 timeout)
{
	MemoryContext context = CurrentMemoryContext;
	MemoryContext attempt;
	int64		until;
	bool		done;

	/* without a task there is nothing to wait for */
	if (timeout <= 0 || q->task == NULL)
	{
		answer_query(q, a);
		return;
	}
	require_news();
	until = chat_shmem_clock() + timeout;
	/* lives as long as the answer: a child, emptied before each new try */
	attempt = AllocSetContextCreate(context, "chat reader",
									ALLOCSET_DEFAULT_SIZES);
	do
	{
		MemoryContextReset(attempt);
		MemoryContextSwitchTo(attempt);
		done = try_answer(q, a, until);
		MemoryContextSwitchTo(context);
	} while (!done);
}

/* ---------- arguments ---------- */

/* Reads the arguments task, after and max_rows (number, -1 = none). */
static Question
read_query(FunctionCallInfo fcinfo, int max_rows)
{
	Question	q = {NULL, 0, -1};

	if (!PG_ARGISNULL(0))
		q.task = PG_GETARG_UUID_P(0);
	if (!PG_ARGISNULL(1))
		q.after = PG_GETARG_INT64(1);
	if (max_rows >= 0 && !PG_ARGISNULL(max_rows))
	{
		q.max_rows = PG_GETARG_INT32(max_rows);
		if (q.max_rows < 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("max_rows must not be negative")));
	}
	return q;
}

/* Reads a timeout in ms; NULL is the longest one. */
static int64
read_timeout(FunctionCallInfo fcinfo, int arg)
{
	Interval   *span;
	double		ms;

	if (PG_ARGISNULL(arg))
		return MAX_WAIT;
	span = PG_GETARG_INTERVAL_P(arg);
	ms = span->time / 1000.0 + 1000.0 * SECS_PER_DAY *
		(span->day + span->month * (double) DAYS_PER_MONTH);
	if (ms < 0 || ms > MAX_WAIT)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("timeout is out of range"),
				 errhint("A call waits for 0 to %d seconds; call again to wait longer.",
						 MAX_WAIT / 1000)));
	return (int64) ms;
}

/* ---------- get_task_events, wait_task_events ---------- */

/* Returns the events as rows. */
static void
put_events(ReturnSetInfo *rsinfo, const ChatEventRows *events)
{
	for (int i = 0; i < events->n; i++)
	{
		const ChatEventRow *row = &events->rows[i];
		text	   *json = cstring_to_text_with_len(row->json.data,
													(int) row->json.len);
		Datum		values[3] = {Int64GetDatum(row->seq),
			PointerGetDatum(json), TimestampTzGetDatum(row->at)};
		bool		nulls[3] = {0};

		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values,
							 nulls);
		pfree(json);
	}
}

/* get_task_events: the events that are there. */
Datum
chat_get_task_events(PG_FUNCTION_ARGS)
{
	Question	q = read_query(fcinfo, 2);
	Answer		a;

	InitMaterializedSRF(fcinfo, 0);
	answer_query(&q, &a);
	put_events((ReturnSetInfo *) fcinfo->resultinfo, &a.events);
	return (Datum) 0;
}

/* wait_task_events: the same, waiting for the first of them. */
Datum
chat_wait_task_events(PG_FUNCTION_ARGS)
{
	Question	q = read_query(fcinfo, 3);
	int64		timeout = read_timeout(fcinfo, 2);
	Answer		a;

	require_news();
	InitMaterializedSRF(fcinfo, 0);
	await_answer(&q, &a, timeout);
	put_events((ReturnSetInfo *) fcinfo->resultinfo, &a.events);
	return (Datum) 0;
}

/* ---------- task_snapshot ---------- */

/* task_snapshot: what the events add up to, and how far they go. */
Datum
chat_task_snapshot(PG_FUNCTION_ARGS)
{
	Question	q = {PG_GETARG_UUID_P(0), 0, -1};
	Answer		a;
	ChatFold   *fold;
	StringInfoData json;

	answer_query(&q, &a);
	if (!a.found)
		PG_RETURN_NULL();
	fold = chat_fold_create();
	for (int i = 0; i < a.events.n; i++)
		chat_fold_event(fold, a.events.rows[i].json);
	initStringInfo(&json);
	appendStringInfo(&json, "{\"status\":\"%s\",\"seq\":" INT64_FORMAT
					 ",\"message\":", a.task.status,
					 a.events.n ? a.events.rows[a.events.n - 1].seq : 0);
	if (a.events.n > 0)
		chat_fold_message(fold, &json);
	else
	{
		Datum		id = UUIDPGetDatum(&a.task.answer);

		appendStringInfo(&json, "{\"role\":\"assistant\",\"id\":\"%s\","
						 "\"parts\":[]}",
						 DatumGetCString(DirectFunctionCall1(uuid_out, id)));
	}
	if (a.task.error)
		appendStringInfo(&json, ",\"error\":%s", a.task.error);
	appendStringInfoChar(&json, '}');
	PG_RETURN_DATUM(DirectFunctionCall1(jsonb_in, CStringGetDatum(json.data)));
}

/* ---------- sse ---------- */

/*
 * Marks in void_rows what reset-step events take back, and those that the
 * client need not or cannot be told of.  Returns whether the client has seen
 * some of what an event after "after" takes back.
 */
static bool
mark_void(const ChatEventRows *events, int64 after, int protocol,
		  bool *void_rows)
{
	int			step = 0;
	bool		open = false;
	bool		seen = false;

	for (int i = 0; i < events->n; i++)
	{
		ChatStr		json = events->rows[i].json;

		if (chat_fold_is(json, "start-step"))
		{
			step = i + 1;
			open = true;
		}
		else if (chat_fold_is(json, "finish-step"))
			open = false;
		else if (chat_fold_is(json, "reset-step"))
		{
			/* a finished step stays: there is nothing to take back */
			void_rows[i] = !open || protocol < 7;
			if (open && protocol < 7)
			{
				/* also what a crash has lost: it is not among the rows */
				seen |= step > 0 && after > events->rows[step - 1].seq &&
					after < events->rows[i].seq;
				memset(void_rows + step, true, sizeof(bool) * (i - step));
			}
			step = i + 1;
		}
	}
	return seen;
}

/* True if there is an event of that type. */
static bool
has_event(const ChatEventRows *events, const char *type)
{
	for (int i = 0; i < events->n; i++)
		if (chat_fold_is(events->rows[i].json, type))
			return true;
	return false;
}

/* True if the last event is the end of the stream. */
static bool
has_end(const ChatEventRows *events)
{
	ChatStr		last;

	if (events->n == 0)
		return false;
	last = events->rows[events->n - 1].json;
	return chat_fold_is(last, "finish") || chat_fold_is(last, "abort");
}

/* Appends the events, each as one of the stream's. */
static void
put_stream(StringInfo out, const ChatEventRows *events, int64 after,
		   int protocol, const bool *void_rows)
{
	StringInfoData json;

	initStringInfo(&json);
	for (int i = 0; i < events->n; i++)
	{
		const ChatEventRow *row = &events->rows[i];

		resetStringInfo(&json);
		if (row->seq > after && !(void_rows && void_rows[i]) &&
			chat_fold_protocol(&json, row->json, protocol))
			appendStringInfo(out, "id: " INT64_FORMAT "\ndata: %s\n\n",
							 row->seq, json.data);
	}
}

/* sse: the events after a number as the text of an event stream. */
Datum
chat_sse(PG_FUNCTION_ARGS)
{
	Question	q = read_query(fcinfo, -1);
	int			protocol = PG_ARGISNULL(2)
	? CHAT_PROTOCOL_MAX : PG_GETARG_INT32(2);
	int64		timeout = PG_ARGISNULL(3) ? 0 : read_timeout(fcinfo, 3);
	Answer		a;
	bool	   *void_rows = NULL;
	StringInfoData out;

	if (protocol < CHAT_PROTOCOL_MIN || protocol > CHAT_PROTOCOL_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("unknown protocol version %d", protocol),
				 errhint("The versions are %d and %d, those of the npm package ai.",
						 CHAT_PROTOCOL_MIN, CHAT_PROTOCOL_MAX)));
	await_answer(&q, &a, timeout);
	if (!a.found)
		PG_RETURN_NULL();
	initStringInfo(&out);
	if (has_event(&a.events, "reset-step"))
	{
		Question		all = {q.task, 0, -1};

		/* what it takes back may lie before */
		if (q.after > 0)
			answer_query(&all, &a);
		void_rows = palloc0(a.events.n + 1);
		if (mark_void(&a.events, q.after, protocol, void_rows))
			q.after = 0;
	}
	put_stream(&out, &a.events, q.after, protocol, void_rows);
	if (a.ended || has_end(&a.events))
		appendStringInfoString(&out, "data: [DONE]\n\n");
	PG_RETURN_TEXT_P(cstring_to_text_with_len(out.data, out.len));
}
