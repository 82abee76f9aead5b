/*
 * task.c
 *		The runtime functions that users call: stream_chat_completion,
 *		cancel_task, ask, worker_status; and the trigger that rings.
 *
 * Owns the statements of what is called.  A call holds its session's row lock
 * and nothing else (P5); the worker is woken by latch when the transaction
 * commits.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "storage/ipc.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/jsonb.h"
#include "utils/tuplestore.h"

#include "compat.h"
#include "db.h"
#include "session.h"
#include "shmem.h"
#include "task.h"

/* how long ask() waits before it looks whether a worker lives, in ms */
#define ASK_SLICE 5000

static int	max_message_length = 64000;

PG_FUNCTION_INFO_V1(chat_is_task_status);
PG_FUNCTION_INFO_V1(chat_job_ring);
PG_FUNCTION_INFO_V1(chat_task_ring);
PG_FUNCTION_INFO_V1(chat_stream_chat_completion);
PG_FUNCTION_INFO_V1(chat_cancel_task);
PG_FUNCTION_INFO_V1(chat_rerun_job);
PG_FUNCTION_INFO_V1(chat_ask);
PG_FUNCTION_INFO_V1(chat_worker_status);

/* CHAT_VISIBLE of the session, $4 task: locks the session */
CHAT_STMT(lock_task_session,
		  "SELECT s.id FROM chat.chat_session AS s WHERE" CHAT_VISIBLE
		  " FOR NO KEY UPDATE",
		  CHAT_VISIBLE_TYPES);

/* $1 task */
CHAT_STMT(session_of_task,
		  "SELECT session_id FROM chat.chat_task WHERE id = $1", UUIDOID);

/*
 * $1 task, $2 database: ends it if it waits behind others, and leaves notice
 * to its listeners; else asks its worker to
 */
CHAT_STMT(cancel_task,
		  "WITH job AS ("
		  " UPDATE chat.chat_job SET cancel = true, run_at = '-infinity'"
		  " WHERE task_id = $1 AND NOT cancel AND kind = 'completion'"
		  "  AND session_id ="
		  "  (SELECT t.session_id FROM chat.chat_task AS t WHERE t.id = $1)"
		  " RETURNING id"
		  "), task AS ("
		  " UPDATE chat.chat_task SET status = 'cancelled', input = NULL,"
		  "  finished_at = now(), error = '{\"code\": \"cancelled\","
		  "  \"message\": \"the task was cancelled\", \"retryable\": false}'"
		  " WHERE id = $1 AND status = 'queued' AND NOT EXISTS"
		  "  (SELECT FROM chat.chat_job AS j WHERE j.task_id = $1"
		  "   AND j.session_id = chat_task.session_id)"
		  " RETURNING id, session_id"
		  "), notice AS ("
		  " INSERT INTO chat.chat_job (kind, session_id, task_id, owner,"
		  "  database)"
		  " SELECT 'notice', s.id, task.id, s.owner, $2 FROM task"
		  " JOIN chat.chat_session AS s ON s.id = task.session_id)"
		  " SELECT id::text, false FROM job"
		  " UNION ALL SELECT id::text, true FROM task",
		  UUIDOID, OIDOID);

/*
 * $1 task that was put aside: what it was asked, and whether the newest
 * message that the model sees is still its own
 */
CHAT_STMT(find_poisoned,
		  "SELECT t.session_id, t.server::text, t.options,"
		  " (SELECT m.task_id = t.id FROM chat.chat_message AS m"
		  "  WHERE m.session_id = t.session_id AND m.active"
		  "  ORDER BY m.sequence DESC LIMIT 1)"
		  "  AND NOT EXISTS (SELECT FROM chat.chat_task AS o"
		  "   WHERE o.session_id = t.session_id AND o.status = 'queued'"
		  "   OFFSET 0)"
		  "  AND NOT EXISTS (SELECT FROM chat.chat_task AS o"
		  "   WHERE o.session_id = t.session_id AND o.status = 'running'"
		  "   OFFSET 0)"
		  " FROM chat.chat_task AS t"
		  " WHERE t.id = $1 AND t.error ? 'crashes' AND NOT t.error ? 'rerun'",
		  UUIDOID);

/* $1 task, $2 the one that runs instead */
CHAT_STMT(mark_rerun,
		  "UPDATE chat.chat_task SET"
		  " error = error || jsonb_build_object('rerun', $2) WHERE id = $1",
		  UUIDOID, UUIDOID);

/* Declares the settings of the calls. */
void
chat_task_init(void)
{
	DefineCustomIntVariable("chat.max_message_length",
							"Most characters of a message.",
							NULL, &max_message_length, 64000, 1, 100000000,
							PGC_SUSET, 0, NULL, NULL, NULL);
}

/* is_task_status: the CHECK of the table. */
Datum
chat_is_task_status(PG_FUNCTION_ARGS)
{
	static const char *const open[] = {"queued", "running", "waiting"};
	static const char *const ended[] = {"completed", "failed", "cancelled"};
	const char *status = text_to_cstring(PG_GETARG_TEXT_PP(0));
	const char *const *names = PG_GETARG_BOOL(1) ? ended : open;

	for (size_t i = 0; i < lengthof(open); i++)
		if (strcmp(names[i], status) == 0)
			PG_RETURN_BOOL(true);
	PG_RETURN_BOOL(false);
}

/* Trigger on chat_job: rings when the transaction commits. */
Datum
chat_job_ring(PG_FUNCTION_ARGS)
{
	TriggerEvent event;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("chat_job_ring was not called by a trigger")));
	event = ((TriggerData *) fcinfo->context)->tg_event;
	chat_shmem_ring_at_commit(!TRIGGER_FIRED_BY_INSERT(event));
	if (TRIGGER_FIRED_BY_TRUNCATE(event))
		chat_shmem_strays_at_commit();
	return PointerGetDatum(NULL);
}

/*
 * Trigger on chat_task: whoever inserts there by a statement (a restore) may
 * leave tasks that no job will ever end.
 */
Datum
chat_task_ring(PG_FUNCTION_ARGS)
{
	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("chat_task_ring was not called by a trigger")));
	chat_shmem_strays_at_commit();
	return PointerGetDatum(NULL);
}

/* ---------- stream_chat_completion ---------- */

/* Reads the arguments, checks those that need no table. */
static void
read_call(FunctionCallInfo fcinfo, ChatCall *c)
{
	memset(c, 0, sizeof(*c));
	if (!PG_ARGISNULL(0))
		c->session = PG_GETARG_UUID_P(0);
	if (!PG_ARGISNULL(1))
		c->message = PG_GETARG_TEXT_PP(1);
	c->is_user_message = PG_ARGISNULL(2) || PG_GETARG_BOOL(2);
	if (!PG_ARGISNULL(3))
		c->user_id = PG_GETARG_TEXT_PP(3);
	if (!PG_ARGISNULL(4))
		c->context = PG_GETARG_JSONB_P(4);
	if (!PG_ARGISNULL(5))
		c->message_id = PG_GETARG_UUID_P(5);
	if (!PG_ARGISNULL(6))
		c->server = NameStr(*PG_GETARG_NAME(6));
	if (!PG_ARGISNULL(7))
		c->options = PG_GETARG_JSONB_P(7);
	if (!PG_ARGISNULL(8))
		c->on_busy = text_to_cstring(PG_GETARG_TEXT_PP(8));
}

/* Raises an error unless the context is {"url": text, "content": text}. */
static void
check_context(Jsonb *context)
{
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	v;
	bool		bad = !JB_ROOT_IS_OBJECT(context);

	it = JsonbIteratorInit(&context->root);
	while (!bad && (token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
			bad = !(v.val.string.len == 3 && memcmp(v.val.string.val, "url", 3) == 0) &&
				!(v.val.string.len == 7 && memcmp(v.val.string.val, "content", 7) == 0);
		else if (token == WJB_VALUE)
			bad = v.type != jbvString && v.type != jbvNull;
	}
	if (bad)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid context"),
				 errhint("A context is an object with the members \"url\" and \"content\", both of them text.")));
}

/* Checks the arguments that need no table. */
void
chat_task_check(const ChatCall *c)
{
	if (c->session == NULL)
		chat_session_missing(NULL);
	if (c->message)
	{
		int			length = pg_mbstrlen_with_len(VARDATA_ANY(c->message),
												  VARSIZE_ANY_EXHDR(c->message));

		if (length > max_message_length)
			ereport(ERROR,
					(errcode(ERRCODE_STRING_DATA_RIGHT_TRUNCATION),
					 errmsg("message is too long"),
					 errdetail("It has %d characters; chat.max_message_length is %d.",
							   length, max_message_length)));
	}
	if (c->context)
		check_context(c->context);
	if (c->options)
		chat_session_check_settings(c->options);
	if (c->on_busy && strcmp(c->on_busy, "enqueue") != 0 &&
		strcmp(c->on_busy, "reject") != 0 &&
		strcmp(c->on_busy, "interrupt") != 0 &&
		strcmp(c->on_busy, "rollback") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for on_busy: \"%s\"", c->on_busy),
				 errhint("Valid values are enqueue, reject, interrupt and rollback.")));
}

/* stream_chat_completion: queues a turn, returns its task. */
Datum
chat_stream_chat_completion(PG_FUNCTION_ARGS)
{
	ChatCall	c;
	ChatScope	scope;
	pg_uuid_t  *task = palloc(sizeof(pg_uuid_t));

	chat_shmem_require();
	read_call(fcinfo, &c);
	chat_task_check(&c);
	chat_db_enter(&scope);
	*task = chat_enqueue(&scope, &c);
	chat_db_leave(&scope);
	PG_RETURN_UUID_P(task);
}

/* ---------- cancel_task ---------- */

/* cancel_task: true if this call ends the task. */
Datum
chat_cancel_task(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Datum		values[3];
	pg_uuid_t	session;
	bool		ended = false;

	chat_shmem_require();
	chat_db_enter(&scope);
	values[0] = PG_GETARG_DATUM(0);
	if (chat_db_exec(&session_of_task, values, NULL) > 0)
	{
		session = chat_db_uuid(0, 1);
		values[0] = UUIDPGetDatum(&session);
		chat_db_caller(&scope, values);
		if (chat_db_exec(&lock_task_session, values, NULL) > 0)
		{
			values[0] = PG_GETARG_DATUM(0);
			values[1] = ObjectIdGetDatum(MyDatabaseId);
			ended = chat_db_exec(&cancel_task, values, NULL) > 0;
			if (ended && chat_db_bool(0, 2))
				chat_shmem_notices_at_commit();
			chat_shmem_publish_at_commit(PG_GETARG_UUID_P(0));
		}
	}
	chat_db_leave(&scope);
	PG_RETURN_BOOL(ended);
}

/* ---------- rerun_job ---------- */

/* Raises that a task is not one that can be run again. */
static void
refuse_rerun(Datum task)
{
	ereport(ERROR,
			(errcode(ERRCODE_NO_DATA_FOUND),
			 errmsg("task was not put aside"),
			 errdetail("There is no task %s in chat.poisoned_jobs.",
					   DatumGetCString(DirectFunctionCall1(uuid_out, task)))));
}

/* rerun_job: queues what a task has failed to do, as another task. */
Datum
chat_rerun_job(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	ChatCall	call = {.is_user_message = true};
	Datum		values[3];
	pg_uuid_t	session;
	pg_uuid_t  *task = palloc(sizeof(pg_uuid_t));

	chat_shmem_require();
	chat_db_enter(&scope);
	values[0] = PG_GETARG_DATUM(0);
	if (chat_db_exec(&session_of_task, values, NULL) == 0)
		refuse_rerun(PG_GETARG_DATUM(0));
	session = chat_db_uuid(0, 1);
	values[0] = UUIDPGetDatum(&session);
	chat_db_caller(&scope, values);
	if (chat_db_exec(&lock_task_session, values, NULL) == 0)
		refuse_rerun(PG_GETARG_DATUM(0));
	values[0] = PG_GETARG_DATUM(0);
	if (chat_db_exec_now(&find_poisoned, values, NULL) == 0)
		refuse_rerun(PG_GETARG_DATUM(0));
	if (!chat_db_bool(0, 4))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the session has gone on since"),
				 errhint("Call chat.regenerate() with the sequence of the message to answer.")));
	call.session = &session;
	call.server = chat_db_text(0, 2);
	call.options = DatumGetJsonbPCopy(chat_db_datum(0, 3, &(bool) {false}));
	*task = chat_enqueue(&scope, &call);
	values[1] = UUIDPGetDatum(task);
	chat_db_exec(&mark_rerun, values, NULL);
	chat_db_leave(&scope);
	PG_RETURN_UUID_P(task);
}

/* ---------- ask ---------- */

/* Undoes chat_shmem_wait_prepare() when an error or the end interrupts. */
static void
stop_waiting(int code, Datum task)
{
	chat_shmem_wait_cancel(DatumGetUUIDP(task));
}

/* Runs a statement of ask() with the caller's rights; returns one value. */
static Datum
ask_one(const char *sql, int nargs, Oid *types, Datum *values, bool *isnull)
{
	int			rc = SPI_execute_with_args(sql, nargs, types, values, NULL,
										   false, 1);

	if (rc < 0 || SPI_processed != 1)
		elog(ERROR, "could not execute \"%s\": %s", sql,
			 SPI_result_code_string(rc));
	return SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1,
						 isnull);
}

/* True when the task has ended; waits for news otherwise, in no transaction. */
static bool
ask_look(pg_uuid_t *task)
{
	Oid			types[1] = {UUIDOID};
	Datum		values[1] = {UUIDPGetDatum(task)};
	volatile bool ended = false;
	uint64		seen = chat_shmem_wait_prepare(task);

	PG_ENSURE_ERROR_CLEANUP(stop_waiting, UUIDPGetDatum(task));
	{
		bool		isnull;

		ended = DatumGetBool(ask_one("SELECT COALESCE((SELECT t.status IN ('completed', 'failed', 'cancelled')"
									 " FROM chat.chat_task AS t WHERE t.id OPERATOR(pg_catalog.=) $1), true)",
									 1, types, values, &isnull));
		SPI_commit();
		if (!ended && !chat_shmem_wait(task, seen, ASK_SLICE))
		{
			int64	   *live = palloc(sizeof(int64) * chat_shared->nslots);

			if (chat_shmem_live(MyDatabaseId, live) == 0)
				ereport(ERROR,
						(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						 errmsg("no chat worker runs in this database"),
						 errdetail("The task stays queued."),
						 errhint("Look at SELECT * FROM chat.check_installation().")));
		}
	}
	PG_END_ENSURE_ERROR_CLEANUP(stop_waiting, UUIDPGetDatum(task));
	stop_waiting(0, UUIDPGetDatum(task));
	return ended;
}

/* Returns the answer of a task that has ended; raises its error. */
static Datum
ask_answer(pg_uuid_t *task, bool *isnull)
{
	Oid			types[1] = {UUIDOID};
	Datum		values[1] = {UUIDPGetDatum(task)};
	Datum		error;
	Datum		answer;

	error = ask_one("SELECT (SELECT t.error OPERATOR(pg_catalog.->>) 'message' FROM chat.chat_task AS t"
					" WHERE t.id OPERATOR(pg_catalog.=) $1)",
					1, types, values, isnull);
	if (!*isnull)
		ereport(ERROR,
				(errcode(ERRCODE_EXTERNAL_ROUTINE_EXCEPTION),
				 errmsg("%s", TextDatumGetCString(error)),
				 errdetail("Task %s has failed.",
						   DatumGetCString(DirectFunctionCall1(uuid_out, values[0])))));
	answer = ask_one("SELECT (SELECT COALESCE(m.content, m.refusal) FROM chat.chat_message AS m"
					 " WHERE m.task_id OPERATOR(pg_catalog.=) $1"
					 " AND m.session_id OPERATOR(pg_catalog.=) (SELECT t.session_id FROM chat.chat_task AS t"
					 "  WHERE t.id OPERATOR(pg_catalog.=) $1)"
					 " AND m.role OPERATOR(pg_catalog.=) 'assistant'"
					 " ORDER BY m.sequence DESC LIMIT 1)",
					 1, types, values, isnull);
	return *isnull ? (Datum) 0 : SPI_datumTransfer(answer, false, -1);
}

/* Starts the turn of ask(), in a new session if none is given. */
static pg_uuid_t *
ask_start(FunctionCallInfo fcinfo)
{
	Oid			types[2] = {UUIDOID, TEXTOID};
	Datum		values[2] = {PG_GETARG_DATUM(1), PG_GETARG_DATUM(0)};
	bool		isnull;
	pg_uuid_t  *task = MemoryContextAlloc(fcinfo->flinfo->fn_mcxt,
										  sizeof(pg_uuid_t));

	if (PG_ARGISNULL(1))
	{
		pg_uuid_t  *session = palloc(sizeof(pg_uuid_t));

		*session = *DatumGetUUIDP(ask_one("SELECT (chat.create_chat_session()).id",
										  0, NULL, NULL, &isnull));
		values[0] = UUIDPGetDatum(session);
	}
	*task = *DatumGetUUIDP(ask_one("SELECT chat.stream_chat_completion($1, $2)",
								   2, types, values, &isnull));
	return task;
}

/* ask: commits, waits, returns the answer. */
Datum
chat_ask(PG_FUNCTION_ARGS)
{
	TupleDesc	desc;
	Datum		answer;
	bool		isnull;
	pg_uuid_t  *task;

	chat_shmem_require();
	if (fcinfo->context == NULL || !IsA(fcinfo->context, CallContext) ||
		castNode(CallContext, fcinfo->context)->atomic)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_TERMINATION),
				 errmsg("chat.ask() cannot run inside a transaction block"),
				 errhint("Call chat.stream_chat_completion() and commit.")));
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("message must not be null")));
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	desc = BlessTupleDesc(desc);
	SPI_connect_ext(SPI_OPT_NONATOMIC);
	task = ask_start(fcinfo);
	SPI_commit();
	while (!ask_look(task))
		;
	answer = ask_answer(task, &isnull);
	SPI_finish();
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(desc, &answer, &isnull)));
}

/* ---------- worker_status ---------- */

/* Adds the row of one worker. */
static void
put_worker(ReturnSetInfo *rsinfo, const ChatSlot *slot)
{
	ChatCounters *c = (ChatCounters *) &slot->counters;
	bool		paused = pg_atomic_read_u32((pg_atomic_uint32 *) &slot->paused) != 0;
	bool		surplus = pg_atomic_read_u32((pg_atomic_uint32 *) &slot->surplus) != 0;
	pg_atomic_uint64 *counters[] = {
		&c->open_streams, &c->limit, &c->started, &c->completed, &c->failed,
		&c->cancelled, &c->retried, &c->events, &c->flushes, &c->unnotified
	};
	Datum		values[3 + lengthof(counters)];
	bool		nulls[3 + lengthof(counters)] = {0};

	values[0] = Int32GetDatum(slot->pid);
	nulls[0] = slot->pid == 0;
	values[1] = CStringGetTextDatum(slot->state != CHAT_SLOT_RUNNING
									? "starting" : surplus ? "ending"
									: paused ? "paused" : "running");
	values[2] = TimestampTzGetDatum(slot->started_at);
	for (size_t i = 0; i < lengthof(counters); i++)
		values[3 + i] = Int64GetDatum((int64) pg_atomic_read_u64(counters[i]));
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

/* worker_status: the workers of this database. */
Datum
chat_worker_status(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	ChatSlot   *slots;
	int			n = 0;

	InitMaterializedSRF(fcinfo, 0);
	if (chat_shared == NULL)
		return (Datum) 0;
	slots = palloc(sizeof(ChatSlot) * chat_shared->nslots);
	LWLockAcquire(chat_shared->lock, LW_SHARED);
	for (int i = 0; i < chat_shared->nslots; i++)
		if (chat_shared->slots[i].database == MyDatabaseId &&
			chat_shared->slots[i].kind == CHAT_SLOT_WORKER &&
			(chat_shared->slots[i].state == CHAT_SLOT_RUNNING ||
			 chat_shared->slots[i].state == CHAT_SLOT_STARTING))
			slots[n++] = chat_shared->slots[i];
	LWLockRelease(chat_shared->lock);
	for (int i = 0; i < n; i++)
		put_worker(rsinfo, &slots[i]);
	return (Datum) 0;
}
