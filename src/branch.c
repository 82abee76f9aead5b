/*
 * branch.c
 *		Branches of a conversation: another answer, another question, a copy.
 *
 * Owns the statements that set messages aside.  A message that is set aside
 * stays, with the sequence of what took its place: so the conversation as it
 * was when message n was the newest is what is not above n and was not set
 * aside for something up to n.  The session's row lock protects it all.
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "compat.h"
#include "db.h"
#include "session.h"
#include "shmem.h"
#include "task.h"

PG_FUNCTION_INFO_V1(chat_regenerate);
PG_FUNCTION_INFO_V1(chat_edit_message);
PG_FUNCTION_INFO_V1(chat_fork_session);

CHAT_STMT(lock_session,
		  "SELECT true FROM chat.chat_session AS s WHERE" CHAT_VISIBLE
		  "FOR NO KEY UPDATE",
		  CHAT_VISIBLE_TYPES);

/* $1 session, $2 sequence: of a message that the model sees */
CHAT_STMT(find_message,
		  "SELECT m.role FROM chat.chat_message AS m"
		  " WHERE m.session_id = $1 AND m.sequence = $2 AND m.active",
		  UUIDOID, INT8OID);

/*
 * $1 session, $2 sequence or NULL for the newest: where the answer begins
 * that this message belongs to, or that follows it.  That is behind the
 * user's message, or where the message's task began, if that is later.  The
 * second column: whether there is anything to answer.
 */
CHAT_STMT(find_answer,
		  "WITH m AS MATERIALIZED (SELECT c.sequence, c.role, c.task_id,"
		  "  c.role IN ('assistant', 'tool', 'function') AS answers"
		  "  FROM chat.chat_message AS c"
		  "  WHERE c.session_id = $1 AND c.active),"
		  " target AS (SELECT m.* FROM m WHERE m.sequence <="
		  "  COALESCE($2, 9223372036854775807)"
		  "  ORDER BY m.sequence DESC LIMIT 1),"
		  " question AS (SELECT max(m.sequence) AS sequence FROM m, target"
		  "  WHERE m.role = 'user' AND m.sequence <= target.sequence)"
		  " SELECT GREATEST("
		  "  (SELECT min(m.sequence) FROM m, question AS q WHERE m.answers"
		  "   AND m.sequence > COALESCE(q.sequence, 0)),"
		  "  (SELECT min(m.sequence) FROM m, target AS t WHERE m.answers"
		  "   AND t.answers AND m.task_id = t.task_id)),"
		  " (SELECT q.sequence FROM question AS q) IS NOT NULL",
		  UUIDOID, INT8OID);

/*
 * $1 session, $2 sequence: what stands against setting aside what follows, a
 * task at work or one that waits and has messages there
 */
CHAT_STMT(find_busy,
		  "SELECT t.id::text, t.status FROM ("
		  CHAT_OPEN_TASK("$1", "b.id, b.status, b.place") ") AS t"
		  " WHERE t.status <> 'waiting' OR EXISTS"
		  "  (SELECT FROM chat.chat_message AS m WHERE m.session_id = $1"
		  "   AND m.active AND m.sequence >= $2 AND m.task_id = t.id)"
		  " ORDER BY t.status = 'running' DESC, t.place LIMIT 1",
		  UUIDOID, INT8OID);

/* $1 session, $2 sequence */
CHAT_STMT(set_aside,
		  "UPDATE chat.chat_message AS m"
		  " SET active = false, superseded_by = s.next_sequence"
		  " FROM chat.chat_session AS s WHERE s.id = $1"
		  " AND m.session_id = $1 AND m.active AND m.sequence >= $2",
		  UUIDOID, INT8OID);

/* $1 session, $2 sequence: a summary of what is set aside is none */
CHAT_STMT(forget_summary,
		  "UPDATE chat.chat_session AS s SET summary = NULL,"
		  " summary_sequence = 0 WHERE s.id = $1 AND s.summary_sequence >= $2",
		  UUIDOID, INT8OID);

/* $1 session, $2 how many sequences to take */
CHAT_STMT(touch_session,
		  "UPDATE chat.chat_session AS s SET updated_at = now(),"
		  " next_sequence = s.next_sequence + $2 WHERE s.id = $1"
		  " RETURNING s.next_sequence - $2",
		  UUIDOID, INT8OID);

/* $1 session, $2 sequence, $3 that of the copy, $4 content, $5 task */
CHAT_STMT(copy_message,
		  "INSERT INTO chat.chat_message (session_id, sequence, role, content,"
		  " parts, name, task_id, metadata)"
		  " SELECT $1, $3, o.role, $4, CASE WHEN o.parts IS NOT NULL THEN"
		  "  jsonb_build_array(jsonb_build_object('type', 'text', 'text', $4))"
		  "  || COALESCE((SELECT jsonb_agg(p.part ORDER BY p.n)"
		  "   FROM jsonb_array_elements(o.parts) WITH ORDINALITY"
		  "    AS p (part, n)"
		  "   WHERE (p.part ->> 'type') IS DISTINCT FROM 'text'), '[]') END,"
		  "  o.name, $5, o.metadata"
		  " FROM chat.chat_message AS o"
		  " WHERE o.session_id = $1 AND o.sequence = $2",
		  UUIDOID, INT8OID, INT8OID, TEXTOID, UUIDOID);

/* CHAT_VISIBLE, $4 newest message, NULL = all that is seen, $5 the copy's id */
CHAT_STMT(fork_session,
		  "WITH source AS MATERIALIZED ("
		  " SELECT s.* FROM chat.chat_session AS s WHERE" CHAT_VISIBLE
		  "), copied AS MATERIALIZED ("
		  " SELECT m.*, row_number() OVER (ORDER BY m.sequence) AS n"
		  " FROM chat.chat_message AS m JOIN source ON m.session_id = source.id"
		  " WHERE m.sequence <= COALESCE($4, 9223372036854775807)"
		  "  AND CASE WHEN $4 IS NULL THEN m.active ELSE m.sequence <= $4"
		  "  AND (m.active OR m.superseded_by > $4 OR m.sequence = $4) END"
		  /* the summary goes with the messages that it is made of, or not */
		  "), summary AS ("
		  " SELECT c.summary, (SELECT count(*) FROM copied AS m"
		  "  WHERE m.sequence <= c.summary_sequence) AS reach"
		  " FROM source AS c WHERE c.summary IS NOT NULL"
		  "  AND ($4 IS NULL OR c.summary_sequence <= $4)"
		  "  AND NOT EXISTS (SELECT FROM copied AS m WHERE NOT m.active"
		  "   AND m.sequence <= c.summary_sequence)"
		  "), session AS ("
		  " INSERT INTO chat.chat_session AS f (id, user_id, owner, title,"
		  "  credentials, successful_agent_runs, successful_agent_schedules,"
		  "  metadata, server, settings, next_sequence, summary,"
		  "  summary_sequence)"
		  " SELECT $5, c.user_id, c.owner, c.title, c.credentials,"
		  "  c.successful_agent_runs, c.successful_agent_schedules,"
		  "  c.metadata, c.server, c.settings,"
		  "  (SELECT count(*) + 1 FROM copied), y.summary,"
		  "  COALESCE(y.reach, 0)"
		  " FROM source AS c LEFT JOIN summary AS y ON true"
		  " RETURNING f AS copy, f.id"
		  "), message AS ("
		  " INSERT INTO chat.chat_message (session_id, sequence, id, role,"
		  "  content, parts, name, tool_call_id, refusal, tool_calls,"
		  "  function_call, task_id, metadata, created_at)"
		  " SELECT session.id, c.n, c.id, c.role,"
		  "  CASE WHEN" CHAT_SESSION_PENDING("c") "THEN"
		  CHAT_SESSION_NO_RESULT("c") "ELSE c.content END,"
		  "  c.parts, c.name, c.tool_call_id, c.refusal, c.tool_calls,"
		  "  c.function_call, c.task_id, c.metadata - 'pending',"
		  "  c.created_at FROM copied AS c, session)"
		  " SELECT session.copy FROM session",
		  CHAT_VISIBLE_TYPES, INT8OID, UUIDOID);

/* Takes the arguments that a call of stream_chat_completion shares with us. */
static void
take_call(FunctionCallInfo fcinfo, int server, ChatCall *call)
{
	memset(call, 0, sizeof(*call));
	call->is_user_message = true;
	if (!PG_ARGISNULL(0))
		call->session = PG_GETARG_UUID_P(0);
	if (!PG_ARGISNULL(server))
		call->server = NameStr(*PG_GETARG_NAME(server));
	if (!PG_ARGISNULL(server + 1))
		call->options = PG_GETARG_JSONB_P(server + 1);
}

/* Starts a function: locks the session that the caller must see. */
static void
enter(ChatScope *scope, pg_uuid_t *session)
{
	Datum		values[3];

	chat_db_enter(scope);
	values[0] = UUIDPGetDatum(session);
	chat_db_caller(scope, values);
	if (chat_db_exec(&lock_session, values, NULL) == 0)
		chat_session_missing(session);
}

/* Returns the role of a message that the model sees; it must exist. */
static char *
require_message(Datum *values)
{
	if (chat_db_exec(&find_message, values, NULL) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_NO_DATA_FOUND),
				 errmsg("message does not exist"),
				 errdetail("The session shows no message with sequence %lld.",
						   (long long) DatumGetInt64(values[1]))));
	return chat_db_text(0, 1);
}

/* Sets messages aside from a sequence on; no task may be at work on them. */
static void
supersede(Datum *values)
{
	if (chat_db_exec_now(&find_busy, values, NULL) > 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("session is busy"),
				 errdetail("Task %s is %s.", chat_db_text(0, 1),
						   chat_db_text(0, 2)),
				 errhint("Wait for its end, or call chat.cancel_task().")));
	chat_db_exec(&set_aside, values, NULL);
	chat_db_exec(&forget_summary, values, NULL);
}

/* regenerate: returns the task. */
Datum
chat_regenerate(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	ChatCall	call;
	Datum		values[2];
	bool		newest = PG_ARGISNULL(1);
	pg_uuid_t  *task = palloc(sizeof(pg_uuid_t));

	chat_shmem_require();
	take_call(fcinfo, 2, &call);
	chat_task_check(&call);
	enter(&scope, call.session);
	values[0] = UUIDPGetDatum(call.session);
	values[1] = PG_GETARG_DATUM(1);
	if (!newest)
		(void) require_message(values);
	chat_db_exec(&find_answer, values, newest ? " n" : NULL);
	if (!chat_db_bool(0, 2))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("there is no message of a user to answer")));
	/* a question that nobody has answered has nothing to be set aside */
	values[1] = Int64GetDatum(chat_db_int64(0, 1, PG_INT64_MAX));
	supersede(values);
	values[1] = Int64GetDatum(0);
	chat_db_exec(&touch_session, values, NULL);
	*task = chat_enqueue(&scope, &call);
	chat_db_leave(&scope);
	PG_RETURN_UUID_P(task);
}

/* Takes the arguments of edit_message and checks those that need no table. */
static void
take_edit(FunctionCallInfo fcinfo, ChatCall *call)
{
	take_call(fcinfo, 3, call);
	if (PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("sequence must not be null")));
	if (PG_ARGISNULL(2))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("content must not be null")));
	call->message = PG_GETARG_TEXT_PP(2);
	chat_task_check(call);
	/* it becomes a message here and now, so the task has none of its own */
	call->message = NULL;
}

/* edit_message: returns the task. */
Datum
chat_edit_message(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	ChatCall	call;
	Datum		values[5];
	char	   *role;
	pg_uuid_t  *task = palloc(sizeof(pg_uuid_t));

	chat_shmem_require();
	take_edit(fcinfo, &call);
	enter(&scope, call.session);
	values[0] = UUIDPGetDatum(call.session);
	values[1] = PG_GETARG_DATUM(1);
	role = require_message(values);
	if (strcmp(role, "user") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("only messages of a user can be edited"),
				 errdetail("The role of message %lld is %s.",
						   (long long) PG_GETARG_INT64(1), role)));
	supersede(values);
	*task = chat_enqueue(&scope, &call);
	values[1] = Int64GetDatum(1);
	chat_db_exec(&touch_session, values, NULL);
	values[1] = PG_GETARG_DATUM(1);
	values[2] = Int64GetDatum(chat_db_int64(0, 1, 0));
	values[3] = PG_GETARG_DATUM(2);
	values[4] = UUIDPGetDatum(task);
	chat_db_exec(&copy_message, values, NULL);
	chat_db_leave(&scope);
	PG_RETURN_UUID_P(task);
}

/* fork_chat_session: returns the row of the copy. */
Datum
chat_fork_session(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Datum		values[5];
	pg_uuid_t	copy;
	Datum		row;
	bool		isnull;

	if (PG_ARGISNULL(0))
		chat_session_missing(NULL);
	chat_db_enter(&scope);
	chat_db_new_ids(&copy, 1);
	values[0] = PG_GETARG_DATUM(0);
	chat_db_caller(&scope, values);
	values[3] = PG_GETARG_DATUM(1);
	values[4] = UUIDPGetDatum(&copy);
	if (chat_db_exec(&fork_session, values,
					 PG_ARGISNULL(1) ? "   n " : NULL) == 0)
		chat_session_missing(PG_GETARG_UUID_P(0));
	row = SPI_datumTransfer(chat_db_datum(0, 1, &isnull), false, -1);
	chat_db_leave(&scope);
	return row;
}
