/*
 * operation.c
 *		The ends of tool calls that come from outside: of operations that go
 *		on elsewhere, of the application's own tools, of approvals.
 *
 * Owns the statements of complete_operation, operation_progress,
 * submit_tool_output, approve_tool_call and deny_tool_call; all of them are
 * called from SQL only.  Nothing is told to listeners or to the model here:
 * the result goes into chat_tool_call, and the task's next turn takes it on.
 *
 * Two rules bind this file to turn.c.  Whoever writes to a call first makes
 * the task's parked job due: that row's lock comes before the call's, and a
 * turn that runs meanwhile cannot miss the news.  And an end is written only
 * where there is none, so of many who want to end a call one does.
 */
#include "postgres.h"

#include "fmgr.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/jsonb.h"

#include "compat.h"
#include "db.h"
#include "field.h"
#include "tool.h"
#include "turn.h"

PG_FUNCTION_INFO_V1(chat_complete_operation);
PG_FUNCTION_INFO_V1(chat_operation_progress);
PG_FUNCTION_INFO_V1(chat_submit_tool_output);
PG_FUNCTION_INFO_V1(chat_approve_tool_call);
PG_FUNCTION_INFO_V1(chat_deny_tool_call);

/* $1 operation: whoever knows the id may see it */
CHAT_STMT(find_operation,
		  "SELECT c.session_id, c.task_id, c.name, c.ended_at IS NOT NULL,"
		  " c.reported OR c.status = 'completed',"
		  " COALESCE(t.status, '') IN ('running', 'waiting')"
		  " FROM chat.chat_tool_call AS c"
		  " LEFT JOIN chat.chat_task AS t ON t.id = c.task_id"
		  " WHERE c.operation_id = $1",
		  UUIDOID);

/*
 * CHAT_VISIBLE, $4 id of the call, $5 status, $6 kind (NULL = any)
 *
 * A model may reuse an id: the newest counts.  The lock keeps the session
 * from being deleted before the job's row is locked.
 */
CHAT_STMT(find_call,
		  "SELECT c.session_id, c.task_id, c.name, c.operation_id"
		  " FROM chat.chat_session AS s CROSS JOIN chat.chat_tool_call AS c"
		  " WHERE" CHAT_VISIBLE "AND c.task_id = ANY (ARRAY("
		  CHAT_OPEN_TASK("$1", "b.id") "))"
		  " AND c.call_id = $4 AND c.status = $5"
		  " AND ($6 IS NULL OR c.kind = $6)"
		  " ORDER BY c.sequence DESC LIMIT 1 FOR KEY SHARE OF s",
		  CHAT_VISIBLE_TYPES, TEXTOID, TEXTOID, TEXTOID);

/* $1 operation, $2 status, $3 result, $4 status that it must have or NULL */
CHAT_STMT(end_call,
		  "UPDATE chat.chat_tool_call AS c SET status = $2, result = $3,"
		  " reported = true, ended_at = now()"
		  " WHERE c.operation_id = $1 AND c.ended_at IS NULL"
		  " AND ($4 IS NULL OR c.status = $4)",
		  UUIDOID, TEXTOID, TEXTOID, TEXTOID);

/* $1 operation, $2 time of an operation in ms: its end comes from elsewhere */
CHAT_STMT(accept_call,
		  "UPDATE chat.chat_tool_call AS c SET long_running = true,"
		  " announced = false,"
		  " deadline = now() + COALESCE(c.timeout, $2 * '1 ms'::interval)"
		  " WHERE c.operation_id = $1 AND c.status = 'waiting'"
		  " AND NOT c.long_running",
		  UUIDOID, INT4OID);

/* $1 operation, $2 success, $3 result, $4 error */
CHAT_STMT(keep_late,
		  "UPDATE chat.chat_tool_call AS c SET late = jsonb_build_object("
		  " 'success', $2, 'result', $3, 'error', $4, 'received_at', now())"
		  " WHERE c.operation_id = $1 AND c.late IS NULL",
		  UUIDOID, BOOLOID, JSONBOID, TEXTOID);

/* $1 operation, $2 progress */
CHAT_STMT(add_progress,
		  "INSERT INTO chat.chat_tool_progress (operation_id, session_id,"
		  " message_id, position, progress)"
		  " SELECT c.operation_id, c.session_id, c.message_id, c.position, $2"
		  " FROM chat.chat_tool_call AS c"
		  " WHERE c.operation_id = $1 AND c.ended_at IS NULL",
		  UUIDOID, JSONBOID);

/* $1 operation, $2 database, $3 time of an operation in ms */
CHAT_STMT(allow_call,
		  "WITH call AS ("
		  " UPDATE chat.chat_tool_call AS c SET"
		  "  status = CASE c.kind WHEN 'client' THEN 'waiting'"
		  "   ELSE 'pending' END,"
		  "  deadline = CASE WHEN c.kind = 'client' OR c.long_running"
		  "   THEN now() + COALESCE(c.timeout, $3 * '1 ms'::interval) END"
		  " WHERE c.operation_id = $1 AND c.status = 'approval'"
		  " RETURNING c.session_id, c.task_id, c.operation_id, c.kind,"
		  "  c.status"
		  "), job AS ("
		  " INSERT INTO chat.chat_job (kind, session_id, task_id, owner,"
		  "  database, operation_id, tool_kind)"
		  " SELECT 'tool', call.session_id, call.task_id, s.owner, $2,"
		  "  call.operation_id, call.kind"
		  " FROM call JOIN chat.chat_session AS s ON s.id = call.session_id"
		  " WHERE call.status = 'pending')"
		  " SELECT FROM call",
		  UUIDOID, OIDOID, INT4OID);

/* A call, as find_operation and find_call tell of it. */
typedef struct Call
{
	pg_uuid_t	operation;
	pg_uuid_t	session;
	pg_uuid_t	task;
	char	   *name;
	bool		ended;
	bool		reported;		/* by one of our callers, or with success */
	bool		active;			/* its task goes on */
} Call;

/* How a call has ended, as the caller tells. */
typedef struct Outcome
{
	bool		success;
	Jsonb	   *result;			/* NULL = not given */
	text	   *error;			/* the same */
} Outcome;

/*
 * Results
 */

/* Returns a result as the model is shown it: a string is its text. */
static char *
result_text(Jsonb *result)
{
	JsonbValue *v;

	if (result == NULL)
		return pstrdup("null");
	if (JB_ROOT_IS_SCALAR(result))
	{
		v = getIthJsonbValueFromContainer(&result->root, 0);
		if (v->type == jbvString)
			return pnstrdup(v->val.string.val, v->val.string.len);
	}
	return JsonbToCString(NULL, &result->root, VARSIZE(result));
}

/* Builds an error that is a call's result; details may be NULL. */
static char *
error_result(const char *message, const char *code, Jsonb *details)
{
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfoString(&json, "{\"type\":\"error\",\"message\":");
	escape_json(&json, message);
	appendStringInfo(&json, ",\"code\":\"%s\"", code);
	if (details)
		appendStringInfo(&json, ",\"details\":%s",
						 JsonbToCString(NULL, &details->root,
										VARSIZE(details)));
	appendStringInfoChar(&json, '}');
	return json.data;
}

/* Returns the text that becomes the call's result. */
static char *
outcome_text(const Call *c, const Outcome *o, const char *code)
{
	if (o->success)
		return result_text(o->result);
	return error_result(psprintf("Tool %s failed: %s", c->name,
								 o->error ? text_to_cstring(o->error) :
								 "no reason was given"),
						code, o->result);
}

/* Raises an error if somebody tells of a success and of an error. */
static void
check_outcome(const Outcome *o)
{
	if (o->success && o->error)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("an operation that succeeded has no error"),
				 errhint("Give success => false with the error.")));
}

/* Ends a call, if nobody else has; its job was rung before. */
static bool
end(const Call *c, const char *status, const char *result,
	const char *only_from)
{
	Datum		values[4];
	char		nulls[5] = "    ";

	values[0] = UUIDPGetDatum(&c->operation);
	values[1] = CStringGetTextDatum(status);
	values[2] = CStringGetTextDatum(result);
	values[3] = only_from ? CStringGetTextDatum(only_from) : (Datum) 0;
	nulls[3] = only_from ? ' ' : 'n';
	return chat_db_exec(&end_call, values, nulls) > 0;
}

/*
 * Operations: who knows the id may end it
 */

/* Looks an operation up; false if there is none. */
static bool
find_by_operation(const pg_uuid_t *operation, Call *c)
{
	Datum		values[1] = {UUIDPGetDatum(operation)};

	if (chat_db_exec(&find_operation, values, NULL) == 0)
		return false;
	c->operation = *operation;
	c->session = chat_db_uuid(0, 1);
	c->task = chat_db_uuid(0, 2);
	c->name = chat_db_text(0, 3);
	c->ended = chat_db_bool(0, 4);
	c->reported = chat_db_bool(0, 5);
	c->active = chat_db_bool(0, 6);
	return true;
}

/* The same; none is an error. */
static void
find_or_refuse(const pg_uuid_t *operation, Call *c)
{
	if (!find_by_operation(operation, c))
		ereport(ERROR,
				(errcode(ERRCODE_NO_DATA_FOUND),
				 errmsg("operation does not exist"),
				 errdetail("The operation's id is %s.",
						   DatumGetCString(DirectFunctionCall1(uuid_out,
															   UUIDPGetDatum(operation))))));
}

/* Stores what came too late; false if something has been stored already. */
static bool
store_late(const Call *c, const Outcome *o)
{
	Datum		values[4];
	char		nulls[5] = "    ";

	values[0] = UUIDPGetDatum(&c->operation);
	values[1] = BoolGetDatum(o->success);
	values[2] = o->result ? JsonbPGetDatum(o->result) : (Datum) 0;
	nulls[2] = o->result ? ' ' : 'n';
	values[3] = PointerGetDatum(o->error);
	nulls[3] = o->error ? ' ' : 'n';
	return chat_db_exec(&keep_late, values, nulls) > 0;
}

/* Ends an operation, or says why that was not done. */
static const char *
complete(const pg_uuid_t *operation, const Outcome *o)
{
	Call		c;

	find_or_refuse(operation, &c);
	if (!c.ended && c.active)
	{
		chat_turn_ring(&c.session, &c.task);
		if (end(&c, o->success ? "completed" : "failed",
				outcome_text(&c, o, "operation_failed"), NULL))
			return "completed";
		/* somebody was faster */
		find_or_refuse(operation, &c);
	}
	if (!c.reported && store_late(&c, o))
		return "late";
	ereport(NOTICE,
			(errmsg("operation has ended already"),
			 errdetail("Nothing was changed.")));
	return "duplicate";
}

/* complete_operation: returns what it did. */
Datum
chat_complete_operation(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Outcome		o;
	const char *done;

	if (PG_ARGISNULL(0) || PG_ARGISNULL(2))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be null",
						PG_ARGISNULL(0) ? "operation_id" : "success")));
	o.result = PG_ARGISNULL(1) ? NULL : PG_GETARG_JSONB_P(1);
	o.success = PG_GETARG_BOOL(2);
	o.error = PG_ARGISNULL(3) ? NULL : PG_GETARG_TEXT_PP(3);
	check_outcome(&o);
	chat_db_enter(&scope);
	done = complete(PG_GETARG_UUID_P(0), &o);
	chat_db_leave(&scope);
	PG_RETURN_TEXT_P(cstring_to_text(done));
}

/* operation_progress: returns whether the operation goes on. */
Datum
chat_operation_progress(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Call		c;
	Datum		values[2];
	bool		goes_on = false;

	if (PG_ARGISNULL(0))
		PG_RETURN_BOOL(false);
	if (!PG_ARGISNULL(1))
		chat_field_check_numbers(&PG_GETARG_JSONB_P(1)->root, "progress", "");
	chat_db_enter(&scope);
	if (find_by_operation(PG_GETARG_UUID_P(0), &c))
		goes_on = !c.ended && c.active;
	if (goes_on && !PG_ARGISNULL(1))
	{
		chat_turn_ring(&c.session, &c.task);
		values[0] = PG_GETARG_DATUM(0);
		values[1] = PG_GETARG_DATUM(1);
		goes_on = chat_db_exec(&add_progress, values, NULL) > 0;
	}
	chat_db_leave(&scope);
	PG_RETURN_BOOL(goes_on);
}

/*
 * Calls of a session: who sees the session may end them
 */

/*
 * Finds the newest call of a session, in a status, that has an id (the first
 * two arguments), and makes its task's job due; false if there is none.
 */
static bool
take_call(FunctionCallInfo fcinfo, const ChatScope *scope, const char *status,
		  const char *kind, Call *c)
{
	Datum		values[6];
	char		nulls[7] = "      ";

	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		return false;
	values[0] = PG_GETARG_DATUM(0);
	chat_db_caller(scope, values);
	values[3] = PG_GETARG_DATUM(1);
	values[4] = CStringGetTextDatum(status);
	values[5] = kind ? CStringGetTextDatum(kind) : (Datum) 0;
	nulls[5] = kind ? ' ' : 'n';
	if (chat_db_exec(&find_call, values, nulls) == 0)
		return false;
	c->session = chat_db_uuid(0, 1);
	c->task = chat_db_uuid(0, 2);
	c->name = chat_db_text(0, 3);
	c->operation = chat_db_uuid(0, 4);
	chat_turn_ring(&c->session, &c->task);
	return true;
}

/* Takes what the application says of a call: its end, or that it goes on. */
static bool
take_output(const Call *c, const Outcome *o)
{
	char	   *text = outcome_text(c, o, "tool_failed");
	Datum		values[2] = {UUIDPGetDatum(&c->operation),
	Int32GetDatum(chat_turn_operation_timeout())};

	if (o->success && chat_tool_is_accepted(text))
		return chat_db_exec(&accept_call, values, NULL) > 0;
	return end(c, o->success ? "completed" : "failed", text, "waiting");
}

/* submit_tool_output: returns whether a call has waited for it. */
Datum
chat_submit_tool_output(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Call		c;
	Outcome		o;
	bool		ended;

	o.result = PG_ARGISNULL(2) ? NULL : PG_GETARG_JSONB_P(2);
	o.error = PG_ARGISNULL(3) ? NULL : PG_GETARG_TEXT_PP(3);
	o.success = o.error == NULL;
	chat_db_enter(&scope);
	ended = take_call(fcinfo, &scope, "waiting", "client", &c) &&
		take_output(&c, &o);
	chat_db_leave(&scope);
	PG_RETURN_BOOL(ended);
}

/* approve_tool_call: returns whether a call has waited for it. */
Datum
chat_approve_tool_call(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Call		c;
	Datum		values[3];
	bool		allowed = false;

	chat_db_enter(&scope);
	if (take_call(fcinfo, &scope, "approval", NULL, &c))
	{
		values[0] = UUIDPGetDatum(&c.operation);
		values[1] = ObjectIdGetDatum(MyDatabaseId);
		values[2] = Int32GetDatum(chat_turn_operation_timeout());
		allowed = chat_db_exec(&allow_call, values, NULL) > 0;
	}
	chat_db_leave(&scope);
	PG_RETURN_BOOL(allowed);
}

/* deny_tool_call: returns whether a call has waited for it. */
Datum
chat_deny_tool_call(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Call		c;
	bool		denied = false;

	chat_db_enter(&scope);
	if (take_call(fcinfo, &scope, "approval", NULL, &c))
	{
		char	   *reason = PG_ARGISNULL(2) ? "it was not allowed" :
		text_to_cstring(PG_GETARG_TEXT_PP(2));

		denied = end(&c, "denied",
					 error_result(psprintf("Tool %s denied: %s", c.name, reason),
								  "denied", NULL),
					 "approval");
	}
	chat_db_leave(&scope);
	PG_RETURN_BOOL(denied);
}
