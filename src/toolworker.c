/*
 * toolworker.c
 *		The process that runs SQL tools, and the functions that a tool calls.
 *
 * A tool worker is connected as the role that owns the session (P7): no code
 * of a user ever runs with more rights than its own, and nothing has to be
 * dropped or taken back.  It claims one call at a time:
 *
 *	claim	a short transaction as the extension's owner
 *	run		the function, in a subtransaction as the role; its error is the
 *			call's result.  Deferred constraints and triggers run there, too
 *	store	in the same transaction, as the extension's owner: the result, the
 *			job's removal, the ring at the parked task
 *
 * So a call without a result has had no effect in the database, and runs
 * again after a crash.  When the job was taken away (cancelled, fenced off)
 * the transaction is aborted, effects and all.
 *
 * Owns what the process runs now; its slot, which tool.c takes and frees, is
 * filled here.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "catalog/pg_proc.h"
#include "commands/discard.h"
#include "fmgr.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "nodes/parsenodes.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timeout.h"

#include "compat.h"
#include "db.h"
#include "jsonbuf.h"
#include "shmem.h"
#include "tool.h"
#include "toolworker.h"
#include "turn.h"

/* of a call in a role that does not read committed, when it collides */
#define MAX_TRIES 20
/* a function that goes on after its timeout ends with its process, in ms */
#define GRACE 2000

PG_FUNCTION_INFO_V1(chat_current_tool_call);
PG_FUNCTION_INFO_V1(chat_report_progress);

/* A call that this process runs. */
typedef struct ToolCall
{
	int64		job;
	int64		epoch;
	pg_uuid_t	session;
	pg_uuid_t	task;
	pg_uuid_t	operation;
	char	   *user_id;
	char	   *call_id;
	char	   *name;
	char	   *function;		/* NULL: the tool is gone */
	char	   *parameters;
	char	   *input;
	bool		read_only;
	int64		timeout;		/* ms */
	int			crashes;
} ToolCall;

static ToolCall *current_call = NULL;
static TimeoutId grace_timeout;

/* ---------- claiming and storing ---------- */

/* $1 identity, $2 role, $3 database, $4 session or NULL */
CHAT_STMT(claim_call,
		  "WITH picked AS MATERIALIZED ("
		  " SELECT j.id FROM chat.chat_job AS j"
		  " WHERE j.tool_kind = 'sql' AND j.holder IS NULL AND j.owner = $2"
		  "  AND j.database = $3 AND j.run_at <= now()"
		  "  AND ($4 IS NULL OR j.session_id = $4)"
		  "  AND NOT EXISTS (SELECT FROM chat.chat_control AS k"
		  "   WHERE k.paused)"
		  " ORDER BY j.run_at, j.id LIMIT 1 FOR UPDATE SKIP LOCKED"
		  "), job AS ("
		  " UPDATE chat.chat_job AS j SET holder = $1, epoch = j.epoch + 1,"
		  "  attempts = j.attempts + 1"
		  " FROM picked AS p WHERE j.id = p.id"
		  " RETURNING j.id, j.epoch, j.session_id, j.task_id,"
		  "  j.operation_id, j.crashes"
		  "), call AS ("
		  " UPDATE chat.chat_tool_call AS c SET status = 'running',"
		  "  started_at = now() FROM job"
		  " WHERE c.operation_id = job.operation_id AND c.ended_at IS NULL"
		  " RETURNING c.*)"
		  " SELECT j.id, j.epoch, j.session_id, j.task_id, j.operation_id,"
		  "  s.user_id, c.call_id, c.name, t.function, t.parameters::text,"
		  "  COALESCE(c.input, '{}')::text, COALESCE(t.read_only, false),"
		  "  (extract(epoch FROM c.timeout) * 1000)::bigint, j.crashes,"
		  "  COALESCE(c.long_running, false)"
		  " FROM job AS j JOIN chat.chat_session AS s ON s.id = j.session_id"
		  " LEFT JOIN call AS c ON c.operation_id = j.operation_id"
		  " LEFT JOIN chat.chat_tool AS t ON t.id = c.tool_id AND t.enabled",
		  INT8OID, OIDOID, OIDOID, UUIDOID);

/* $1 session, $2 task: the first lock of all who end a call */
CHAT_STMT(lock_parked,
		  "SELECT id FROM chat.chat_job WHERE session_id = $1 AND task_id = $2"
		  " AND kind = 'completion' FOR UPDATE",
		  UUIDOID, UUIDOID);

/* $1 job, $2 epoch, $3 identity, $4 operation, $5 status, $6 result */
CHAT_STMT(store_result,
		  "WITH gone AS ("
		  " DELETE FROM chat.chat_job WHERE id = $1 AND epoch = $2"
		  "  AND " CHAT_HELD_BY("$3") " RETURNING id)"
		  " UPDATE chat.chat_tool_call AS c SET status = $5, result = $6,"
		  "  ended_at = now() FROM gone"
		  " WHERE c.operation_id = $4 AND c.ended_at IS NULL"
		  " RETURNING c.operation_id",
		  INT8OID, INT8OID, INT8OID, UUIDOID, TEXTOID, TEXTOID);

/* the same without an end: it comes from elsewhere; $5 ms until then */
CHAT_STMT(store_accepted,
		  "WITH gone AS ("
		  " DELETE FROM chat.chat_job WHERE id = $1 AND epoch = $2"
		  "  AND " CHAT_HELD_BY("$3") " RETURNING id)"
		  " UPDATE chat.chat_tool_call AS c SET status = 'waiting',"
		  "  long_running = true,"
		  "  deadline = now() + COALESCE(c.timeout, $5 * '1 ms'::interval)"
		  " FROM gone WHERE c.operation_id = $4 AND c.ended_at IS NULL"
		  " RETURNING c.operation_id",
		  INT8OID, INT8OID, INT8OID, UUIDOID, INT8OID);

/* Reads the row of a claim. */
static ToolCall *
read_call(void)
{
	ToolCall   *c = MemoryContextAllocZero(TopTransactionContext,
										   sizeof(ToolCall));

	c->job = chat_db_int64(0, 1, 0);
	c->epoch = chat_db_int64(0, 2, 0);
	c->session = chat_db_uuid(0, 3);
	c->task = chat_db_uuid(0, 4);
	c->operation = chat_db_uuid(0, 5);
	c->user_id = chat_db_text(0, 6);
	c->call_id = chat_db_text(0, 7);
	c->name = chat_db_text(0, 8);
	c->function = chat_db_text(0, 9);
	c->parameters = chat_db_text(0, 10);
	c->input = chat_db_text(0, 11);
	c->read_only = chat_db_bool(0, 12);
	c->timeout = chat_db_int64(0, 13, chat_db_bool(0, 15) ?
							   chat_turn_operation_timeout() :
							   chat_tool_default_timeout());
	c->crashes = chat_db_int32(0, 14, 0);
	return c;
}

/* Copies a string into the memory of the current call. */
static char *
keep(MemoryContext context, const char *s)
{
	return s ? MemoryContextStrdup(context, s) : NULL;
}

/*
 * Claims a call for this process's role, of a session if one is given; NULL
 * if there is none.
 */
static ToolCall *
claim_next(const pg_uuid_t *session, MemoryContext context)
{
	Datum		values[4];
	char		nulls[5] = "    ";
	ToolCall   *claimed = NULL;
	ToolCall   *c = NULL;

	chat_db_begin("claim a tool call");
	values[0] = Int64GetDatum(chat_slot->identity);
	values[1] = ObjectIdGetDatum(chat_slot->role);
	values[2] = ObjectIdGetDatum(MyDatabaseId);
	values[3] = UUIDPGetDatum(session);
	nulls[3] = session ? ' ' : 'n';
	if (chat_db_exec(&claim_call, values, nulls) > 0)
	{
		claimed = read_call();
		c = MemoryContextAlloc(context, sizeof(ToolCall));
		*c = *claimed;
		c->user_id = keep(context, claimed->user_id);
		c->call_id = keep(context, claimed->call_id);
		c->name = keep(context, claimed->name);
		c->function = keep(context, claimed->function);
		c->parameters = keep(context, claimed->parameters);
		c->input = keep(context, claimed->input);
	}
	chat_db_commit(true);
	return c;
}

/*
 * Stores a call's result, as the extension's owner, in the transaction that
 * the call ran in.  An error (the job was taken away) undoes them both.
 */
static void
store(const ToolCall *c, bool failed, const char *result)
{
	ChatScope	scope;
	Datum		values[6];
	uint64		n;

	chat_db_enter(&scope);
	values[0] = UUIDPGetDatum(&c->session);
	values[1] = UUIDPGetDatum(&c->task);
	chat_db_exec(&lock_parked, values, NULL);
	values[0] = Int64GetDatum(c->job);
	values[1] = Int64GetDatum(c->epoch);
	values[2] = Int64GetDatum(chat_slot->identity);
	values[3] = UUIDPGetDatum(&c->operation);
	if (!failed && chat_tool_is_accepted(result))
	{
		values[4] = Int64GetDatum((int64) chat_turn_operation_timeout());
		n = chat_db_exec(&store_accepted, values, NULL);
	}
	else
	{
		values[4] = CStringGetTextDatum(failed ? "failed" : "completed");
		values[5] = CStringGetTextDatum(result);
		n = chat_db_exec(&store_result, values, NULL);
	}
	if (n == 0)
		ereport(ERROR,
				(errcode(ERRCODE_QUERY_CANCELED),
				 errmsg("the tool call was ended by somebody else")));
	chat_turn_ring(&c->session, &c->task);
	chat_db_leave(&scope);
}

/* ---------- running a function ---------- */

/* An argument that a call gives. */
typedef struct Argument
{
	const char *name;			/* "": none */
	Oid			type;
	char	   *otherwise;		/* its DEFAULT; NULL: it has none */
} Argument;

/* What a function takes and returns. */
typedef struct Function
{
	char	   *name;			/* qualified and quoted */
	int			nargs;
	Argument   *args;
	Oid			result;
	bool		returns_set;
} Function;

/* Resolves a signature with the rights and the search_path of the role. */
static void
look_up_function(const char *signature, Function *f)
{
	Datum		oid = DirectFunctionCall1(regprocedurein,
										  CStringGetDatum(signature));
	HeapTuple	tuple = SearchSysCache1(PROCOID, oid);
	Form_pg_proc form;
	Oid		   *types;
	char	   *schema;
	char	   *modes;
	char	  **names;
	int			n;

	if (!HeapTupleIsValid(tuple))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_FUNCTION),
				 errmsg("function \"%s\" does not exist", signature)));
	form = (Form_pg_proc) GETSTRUCT(tuple);
	if (form->prokind != PROKIND_FUNCTION)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"%s\" is not a plain function", signature)));
	schema = get_namespace_name(form->pronamespace);
	f->name = quote_qualified_identifier(schema, NameStr(form->proname));
	f->result = form->prorettype;
	f->returns_set = form->proretset;
	n = get_func_arg_info(tuple, &types, &names, &modes);
	f->args = palloc(sizeof(Argument) * Max(n, 1));
	f->nargs = 0;
	for (int i = 0; i < n; i++)
	{
		Argument   *a = &f->args[f->nargs];

		if (modes &&
			(modes[i] == PROARGMODE_OUT || modes[i] == PROARGMODE_TABLE))
			continue;
		a->name = names && names[i] ? names[i] : "";
		a->type = types[i];
		a->otherwise = NULL;
		/* the last ones have the defaults */
		if (++f->nargs > form->pronargs - form->pronargdefaults)
		{
			Datum		d = DirectFunctionCall2(pg_get_function_arg_default,
												oid, Int32GetDatum(i + 1));

			a->otherwise = TextDatumGetCString(d);
		}
	}
	ReleaseSysCache(tuple);
}

/* True if an object has a member. */
static bool
has_member(JsonbContainer *object, const char *name)
{
	JsonbValue	v;

	return getKeyJsonValueFromContainer(object, name, (int) strlen(name),
										&v) != NULL;
}

/* Returns the properties of the schema that the model was shown, or NULL. */
static JsonbContainer *
schema_properties(const char *parameters)
{
	Jsonb	   *schema = parameters ? chat_db_parse_json(parameters) : NULL;
	JsonbValue	v;

	if (schema && JB_ROOT_IS_OBJECT(schema) &&
		getKeyJsonValueFromContainer(&schema->root, "properties", 10, &v) &&
		v.type == jbvBinary && JsonContainerIsObject(v.val.binary.data))
		return v.val.binary.data;
	return NULL;
}

/* Returns the json argument that takes the whole object, as in schema.c. */
static int
find_whole(const Function *f, JsonbContainer *properties)
{
	int			found = -1;

	for (int i = 0; i < f->nargs; i++)
	{
		const Argument *a = &f->args[i];

		if ((a->type != JSONOID && a->type != JSONBOID) ||
			a->name[0] == '\0' ||
			(properties && has_member(properties, a->name)))
			continue;
		if (found >= 0)
			return -1;
		found = i;
	}
	return found;
}

/* Returns an argument that the input does not give. */
static char *
absent_argument(const Argument *a)
{
	if (a->otherwise == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("the argument \"%s\" is missing", a->name)));
	return psprintf("(%s)::%s", a->otherwise,
					format_type_be_qualified(a->type));
}

/*
 * Builds the statement that calls the function with the input's members as
 * arguments: $1 is the input.  All arguments are given, in their places and
 * with their types: so no other function of the same name is meant.  What the
 * schema does not name is not the model's to choose.
 */
static char *
call_statement(const ToolCall *c, const Function *f)
{
	Datum		object = DirectFunctionCall1(jsonb_in,
											 CStringGetDatum(c->input));
	JsonbContainer *input = &DatumGetJsonbP(object)->root;
	JsonbContainer *properties = schema_properties(c->parameters);
	int			whole = find_whole(f, properties);
	StringInfoData args;
	StringInfoData columns;
	const char *wrap = "pg_catalog.to_json(q.x)";

	initStringInfo(&args);
	initStringInfo(&columns);
	for (int i = 0; i < f->nargs; i++)
	{
		const Argument *a = &f->args[i];
		const char *name = quote_identifier(a->name);

		appendStringInfoString(&args, i ? ", " : "");
		if (i == whole)
			appendStringInfo(&args, "$1::%s",
							 format_type_be_qualified(a->type));
		else if (properties && has_member(properties, a->name) &&
				 has_member(input, a->name))
		{
			appendStringInfo(&args, "r.%s", name);
			appendStringInfo(&columns, "%s%s %s", columns.len ? ", " : "",
							 name, format_type_be_qualified(a->type));
		}
		else
			appendStringInfoString(&args, absent_argument(a));
	}
	if (f->result == JSONOID || f->result == JSONBOID ||
		f->result == TEXTOID || f->result == VARCHAROID ||
		f->result == VOIDOID)
		wrap = "q.x";
	if (f->returns_set)
		wrap = "COALESCE(pg_catalog.json_agg(q.x), '[]')";
	return psprintf("SELECT (%s)::text FROM (SELECT %s(%s) AS x%s%s%s) AS q",
					wrap, f->name, args.data,
					columns.len
					? " FROM pg_catalog.jsonb_to_record($1) AS r(" : "",
					columns.data, columns.len ? ")" : "");
}

/* Runs the function; returns its result as text. */
static char *
run_function(const ToolCall *c, MemoryContext context)
{
	Function	f;
	char	   *sql;
	char	   *result = NULL;
	Oid			types[1] = {JSONBOID};
	Datum		values[1];
	int			rc;

	if (c->function == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("the tool does not exist any more")));
	SPI_connect();
	look_up_function(c->function, &f);
	sql = call_statement(c, &f);
	values[0] = DirectFunctionCall1(jsonb_in, CStringGetDatum(c->input));
	pgstat_report_activity(STATE_RUNNING, sql);
	rc = SPI_execute_with_args(sql, 1, types, values, NULL, false, 0);
	if (rc != SPI_OK_SELECT)
		elog(ERROR, "could not run tool: %s", SPI_result_code_string(rc));
	if (SPI_processed > 0 && f.result != VOIDOID)
		result = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	result = MemoryContextStrdup(context, result ? result : "null");
	/* what is deferred runs now, as the role */
	SPI_execute("SET CONSTRAINTS ALL IMMEDIATE", false, 0);
	SPI_finish();
	return result;
}

/* Builds the result of a call that failed. */
static char *
error_result(const ToolCall *c, const ErrorData *edata)
{
	return chat_tool_error(c->name, edata->message,
						   unpack_sql_state(edata->sqlerrcode));
}

/* Ends the process: the function has caught the end of its time. */
static void
run_out(void)
{
	ProcDiePending = true;
	InterruptPending = true;
	SetLatch(MyLatch);
}

/* Limits the time of a call, or of its commit, which nothing can cancel. */
static void
start_clock(int64 timeout, bool commit)
{
	int			ms = (int) Min(timeout, INT_MAX - GRACE);

	if (!commit)
		enable_timeout_after(STATEMENT_TIMEOUT, ms);
	enable_timeout_after(grace_timeout, ms + GRACE);
}

/* Ends that. */
static void
stop_clock(void)
{
	disable_timeout(STATEMENT_TIMEOUT, false);
	disable_timeout(grace_timeout, false);
}

/* Runs the function in a subtransaction; its error becomes its result. */
static char *
try_function(const ToolCall *c, MemoryContext context, bool *failed)
{
	char	   *volatile result = NULL;
	ResourceOwner owner = CurrentResourceOwner;

	*failed = false;
	BeginInternalSubTransaction(NULL);
	PG_TRY();
	{
		XactReadOnly = c->read_only || DefaultXactReadOnly;
		start_clock(c->timeout, false);
		result = run_function(c, context);
		stop_clock();
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		stop_clock();
		MemoryContextSwitchTo(context);
		edata = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		/* the whole transaction is in vain */
		if (edata->sqlerrcode == ERRCODE_T_R_SERIALIZATION_FAILURE &&
			IsolationUsesXactSnapshot())
			ReThrowError(edata);
		result = error_result(c, edata);
		*failed = true;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
	return result;
}

/* Says in shared memory what this process runs. */
static void
announce(const ToolCall *c)
{
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	chat_slot->running = c != NULL;
	chat_slot->claimed = true;
	chat_slot->progress_len = 0;
	if (c)
		chat_slot->operation = c->operation;
	LWLockRelease(chat_shared->lock);
}

/* Runs one call and stores its result, in one transaction. */
static void
perform(ToolCall *c, MemoryContext context)
{
	bool		failed;
	char	   *result;

	announce(c);
	current_call = c;
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	/* the result has to be stored, whatever the function may */
	XactReadOnly = false;
	PushActiveSnapshot(GetTransactionSnapshot());
	result = try_function(c, context, &failed);
	announce(NULL);
	current_call = NULL;
	/* a cancel that comes from here on comes too late */
	HOLD_CANCEL_INTERRUPTS();
	store(c, failed, result);
	PopActiveSnapshot();
	/* what a cursor WITH HOLD has left to do, or a trigger deferred anew */
	start_clock(c->timeout, true);
	CommitTransactionCommand();
	stop_clock();
	RESUME_CANCEL_INTERRUPTS();
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/*
 * Gives back to the next call a session without a trace of the last one:
 * settings, temporary tables, prepared statements, locks, LISTEN.
 */
static void
discard_all(void)
{
	DiscardStmt *stmt = makeNode(DiscardStmt);

	stmt->target = DISCARD_ALL;
	StartTransactionCommand();
	DiscardCommand(stmt, true);
	CommitTransactionCommand();
}

/* Ends a call whose transaction failed as a whole, if it is still ours. */
static void
store_failure(const ToolCall *c, ErrorData *edata, MemoryContext context)
{
	MemoryContext old = MemoryContextSwitchTo(context);
	char	   *result = error_result(c, edata);

	PG_TRY();
	{
		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();
		XactReadOnly = false;
		XactIsoLevel = XACT_READ_COMMITTED;
		PushActiveSnapshot(GetTransactionSnapshot());
		HOLD_CANCEL_INTERRUPTS();
		store(c, true, result);
		PopActiveSnapshot();
		CommitTransactionCommand();
		RESUME_CANCEL_INTERRUPTS();
	}
	PG_CATCH();
	{
		/* anything else ends the process, which leaves an orphan */
		if (geterrcode() != ERRCODE_QUERY_CANCELED)
			PG_RE_THROW();
		/* taken away: nothing is left to do */
		MemoryContextSwitchTo(context);
		FlushErrorState();
		QueryCancelHoldoffCount = 0;
		AbortCurrentTransaction();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
}

/*
 * Runs a call; whatever goes wrong with it ends with it.  False if its
 * isolation level asks for another try.
 */
static bool
perform_safely(ToolCall *c, MemoryContext context, bool last)
{
	volatile bool again = false;

	PG_TRY();
	{
		perform(c, context);
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		stop_clock();
		MemoryContextSwitchTo(context);
		edata = CopyErrorData();
		FlushErrorState();
		QueryCancelHoldoffCount = 0;
		AbortCurrentTransaction();
		announce(NULL);
		current_call = NULL;
		again = edata->sqlerrcode == ERRCODE_T_R_SERIALIZATION_FAILURE &&
			!last;
		if (!again)
			store_failure(c, edata, context);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	return !again;
}

/* Main function of the tool worker. */
void
chat_toolworker_main(Datum slot)
{
	Oid			extra[2];
	MemoryContext context;
	pg_uuid_t	session;
	ToolCall   *c;
	bool		first = true;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	memcpy(extra, MyBgworkerEntry->bgw_extra, sizeof(extra));
	chat_shmem_attach(DatumGetInt32(slot), extra[0]);
	BackgroundWorkerInitializeConnectionByOid(extra[0], extra[1],
											  CHAT_WORKER_CONNECT_FLAGS);
	grace_timeout = RegisterTimeout(USER_TIMEOUT, run_out);
	context = AllocSetContextCreate(TopMemoryContext, "chat tool call",
									ALLOCSET_DEFAULT_SIZES);
	while ((c = claim_next(first ? NULL : &session, context)) != NULL)
	{
		CHECK_FOR_INTERRUPTS();
		session = c->session;
		first = false;
		for (int i = 1; !perform_safely(c, context, i == MAX_TRIES); i++)
			CHECK_FOR_INTERRUPTS();
		discard_all();
		MemoryContextReset(context);
	}
	/* an error before the first claim is a false start */
	chat_shmem_set_exit(CHAT_EXIT_STOPPED);
	proc_exit(0);
}

/* ---------- functions that a tool calls ---------- */

/* current_tool_call: what the call is about; NULLs outside of one. */
Datum
chat_current_tool_call(PG_FUNCTION_ARGS)
{
	TupleDesc	desc;
	Datum		values[6] = {0};
	bool		nulls[6] = {true, true, true, true, true, true};
	const ToolCall *c = current_call;

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	if (c)
	{
		values[0] = UUIDPGetDatum(&c->session);
		values[1] = c->user_id ? CStringGetTextDatum(c->user_id) : (Datum) 0;
		values[2] = UUIDPGetDatum(&c->task);
		values[3] = CStringGetTextDatum(c->call_id);
		values[4] = UUIDPGetDatum(&c->operation);
		values[5] = CStringGetTextDatum(c->name);
		memset(nulls, false, sizeof(nulls));
		nulls[1] = c->user_id == NULL;
	}
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc),
													  values, nulls)));
}

/*
 * report_progress: shows listeners how far the running tool has come, though
 * its transaction is open.  A report that nobody has read yet is replaced.
 */
Datum
chat_report_progress(PG_FUNCTION_ARGS)
{
	Jsonb	   *report = PG_GETARG_JSONB_P(0);
	char	   *text = JsonbToCString(NULL, &report->root, VARSIZE(report));
	int			len = (int) strlen(text);

	if (current_call == NULL)
		PG_RETURN_BOOL(false);
	if (len > CHAT_PROGRESS_SIZE)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("progress report is too long"),
				 errdetail("It has %d bytes; at most %d are allowed.", len,
						   CHAT_PROGRESS_SIZE)));
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	memcpy(chat_slot->progress, text, len);
	chat_slot->progress_len = len;
	LWLockRelease(chat_shared->lock);
	chat_shmem_ring_progress(MyDatabaseId);
	PG_RETURN_BOOL(true);
}
