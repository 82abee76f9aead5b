/*
 * session.c
 *		The data functions that write: sessions, their messages, and the
 *		document form of both.
 *
 * Owns the statements on chat.chat_session that users' functions need.  Each
 * function takes the caller's role, works as the extension's owner, and has
 * the condition CHAT_VISIBLE in the statement that finds the session; the
 * lock on that row protects all that hangs on it.  What only reads is SQL in
 * the install script, under row-level security.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "common/int.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/syscache.h"
#include "utils/tuplestore.h"

#include "compat.h"
#include "context.h"
#include "db.h"
#include "field.h"
#include "message.h"
#include "server.h"
#include "session.h"
#include "shmem.h"
#include "usage.h"

/* The columns of a session as a document or create_chat_session() gives it. */
typedef enum DocumentColumn
{
	DOC_ID,
	DOC_USER_ID,
	DOC_TITLE,
	DOC_CREDENTIALS,
	DOC_RUNS,
	DOC_SCHEDULES,
	DOC_PROMPT_TOKENS,
	DOC_COMPLETION_TOKENS,
	DOC_SETTINGS,
	DOC_METADATA,
	DOC_SERVER,
	DOC_CHANNEL,
	DOC_APPENDED,				/* number of messages to be appended */
	DOC_OWNER,
	DOC_CREATED_AT,
	DOC_STORED,					/* those above are parameters, in order */
	DOC_MESSAGES = DOC_STORED,
	DOC_USAGE,
	DOC_FORMAT,
	DOC_SUMMARY,
	DOC_SUMMARY_SEQUENCE,
	DOC_COLUMNS
} DocumentColumn;

typedef struct Document
{
	Datum		values[DOC_COLUMNS];
	bool		nulls[DOC_COLUMNS];
} Document;

/* of exported documents */
#define FORMAT "chat/1"

/*
 * Largest total of tokens that is taken: JSON numbers tell no larger ones
 * apart, and millions of steps can be added before a bigint is full.
 */
#define MAX_TOTAL INT64CONST(9007199254740992)

#define DOC_TYPES \
	UUIDOID, TEXTOID, TEXTOID, JSONBOID, JSONBOID, JSONBOID, INT8OID, \
	INT8OID, JSONBOID, JSONBOID, NAMEOID, NAMEOID, INT8OID

CHAT_STMT(find_session,
		  "SELECT true FROM chat.chat_session AS s WHERE" CHAT_VISIBLE,
		  CHAT_VISIBLE_TYPES);

/* whether a session is there, but not for the caller */
CHAT_STMT(find_hidden,
		  "SELECT true FROM chat.chat_session AS s"
		  " WHERE s.id = $1 AND (" CHAT_VISIBLE ") IS NOT TRUE",
		  CHAT_VISIBLE_TYPES);

CHAT_STMT(lock_session,
		  "SELECT s.next_sequence, s.server, s.total_prompt_tokens,"
		  " s.total_completion_tokens FROM chat.chat_session AS s"
		  " WHERE" CHAT_VISIBLE "FOR NO KEY UPDATE",
		  CHAT_VISIBLE_TYPES);

CHAT_STMT(insert_session,
		  "INSERT INTO chat.chat_session AS s (id, user_id, title,"
		  " credentials, successful_agent_runs, successful_agent_schedules,"
		  " total_prompt_tokens, total_completion_tokens, settings, metadata,"
		  " server, channel, next_sequence, owner, created_at)"
		  " VALUES ($1, $2, NULLIF($3, ''), COALESCE($4, '{}'),"
		  " COALESCE($5, '{}'), COALESCE($6, '{}'), COALESCE($7, 0),"
		  " COALESCE($8, 0), COALESCE($9, '{}'), COALESCE($10, '{}'), $11,"
		  " COALESCE(NULLIF($12, ''), 'chat_' || pg_catalog.replace("
		  "pg_catalog.gen_random_uuid()::text, '-', '')), $13 + 1, $14,"
		  " COALESCE($15, pg_catalog.now()))"
		  " ON CONFLICT (id) DO NOTHING RETURNING s, s.id",
		  DOC_TYPES, REGROLEOID, TIMESTAMPTZOID);

/* of a session that is locked; writes nothing when nothing changes */
CHAT_STMT(merge_session,
		  "UPDATE chat.chat_session AS s SET user_id = n.user_id,"
		  " title = n.title, credentials = n.credentials,"
		  " successful_agent_runs = n.runs,"
		  " successful_agent_schedules = n.schedules,"
		  " total_prompt_tokens = n.prompt_tokens,"
		  " total_completion_tokens = n.completion_tokens,"
		  " settings = n.settings, metadata = n.metadata,"
		  " server = n.server, channel = n.channel,"
		  " next_sequence = s.next_sequence + $13,"
		  " updated_at = pg_catalog.now()"
		  " FROM (SELECT COALESCE($2, o.user_id) AS user_id,"
		  " CASE WHEN $3 IS NULL THEN o.title ELSE NULLIF($3, '') END"
		  " AS title, COALESCE($4, o.credentials) AS credentials,"
		  " COALESCE($5, o.successful_agent_runs) AS runs,"
		  " COALESCE($6, o.successful_agent_schedules) AS schedules,"
		  " GREATEST($7, o.total_prompt_tokens) AS prompt_tokens,"
		  " GREATEST($8, o.total_completion_tokens) AS completion_tokens,"
		  " COALESCE($9, o.settings) AS settings,"
		  " COALESCE($10, o.metadata) AS metadata,"
		  " COALESCE($11, o.server) AS server,"
		  " COALESCE($12, o.channel) AS channel"
		  " FROM chat.chat_session AS o WHERE o.id = $1) AS n"
		  " WHERE s.id = $1 AND ($13 > 0 OR (s.user_id, s.title,"
		  " s.credentials, s.successful_agent_runs,"
		  " s.successful_agent_schedules, s.total_prompt_tokens,"
		  " s.total_completion_tokens, s.settings, s.metadata, s.server,"
		  " s.channel) IS DISTINCT FROM (n.user_id, n.title, n.credentials,"
		  " n.runs, n.schedules, n.prompt_tokens, n.completion_tokens,"
		  " n.settings, n.metadata, n.server, n.channel))",
		  DOC_TYPES);

/*
 * Of a session that was just imported: what its document says and no other
 * function takes.  $1 session, $2 document
 */
CHAT_STMT(restore_messages,
		  "UPDATE chat.chat_message AS m SET"
		  " task_id = (e.message ->> 'task_id')::uuid,"
		  " superseded_by = (e.message ->> 'superseded_by')::bigint,"
		  " metadata = m.metadata - 'pending',"
		  " content = CASE WHEN" CHAT_SESSION_PENDING("m") "THEN"
		  CHAT_SESSION_NO_RESULT("m") "ELSE m.content END"
		  " FROM jsonb_array_elements($2 -> 'messages') WITH ORDINALITY"
		  "  AS e (message, n)"
		  " WHERE m.session_id = $1 AND m.sequence = e.n"
		  " AND (e.message ->> 'task_id' IS NOT NULL"
		  "  OR e.message ->> 'superseded_by' IS NOT NULL"
		  "  OR" CHAT_SESSION_PENDING("m") ")",
		  UUIDOID, JSONBOID);

/* $1 session, $2 document, $3 summary or NULL, $4 how far it reaches */
CHAT_STMT(restore_session,
		  "UPDATE chat.chat_session AS s SET updated_at ="
		  " COALESCE(($2 ->> 'updated_at')::timestamptz, s.updated_at),"
		  " summary = $3,"
		  " summary_sequence = CASE WHEN $3 IS NULL THEN 0 ELSE $4 END"
		  " WHERE s.id = $1 RETURNING s",
		  UUIDOID, JSONBOID, TEXTOID, INT8OID);

CHAT_STMT(document_of,
		  "SELECT chat.get_chat_session($1)",
		  UUIDOID);

CHAT_STMT(update_session,
		  "UPDATE chat.chat_session AS s SET"
		  " credentials = COALESCE($4, s.credentials),"
		  " successful_agent_runs = COALESCE($5, s.successful_agent_runs),"
		  " successful_agent_schedules ="
		  " COALESCE($6, s.successful_agent_schedules),"
		  " total_prompt_tokens = COALESCE($7, s.total_prompt_tokens),"
		  " total_completion_tokens ="
		  " COALESCE($8, s.total_completion_tokens),"
		  " title = CASE WHEN $9 IS NULL THEN s.title"
		  " ELSE NULLIF($9, '') END,"
		  " settings = COALESCE($10, s.settings),"
		  " metadata = COALESCE($11, s.metadata),"
		  " updated_at = pg_catalog.now()"
		  " WHERE" CHAT_VISIBLE "RETURNING s",
		  CHAT_VISIBLE_TYPES, JSONBOID, JSONBOID, JSONBOID, INT8OID, INT8OID,
		  TEXTOID, JSONBOID, JSONBOID);

CHAT_STMT(set_title,
		  "UPDATE chat.chat_session AS s SET title = NULLIF($4, ''),"
		  " updated_at = pg_catalog.now()"
		  " WHERE" CHAT_VISIBLE
		  "AND s.title IS DISTINCT FROM NULLIF($4, '')",
		  CHAT_VISIBLE_TYPES, TEXTOID);

CHAT_STMT(set_user,
		  "UPDATE chat.chat_session AS s SET user_id ="
		  " CASE WHEN $4 IS NULL THEN s.user_id ELSE NULLIF($4, '') END,"
		  " updated_at = CASE WHEN $4 IS NULL THEN s.updated_at"
		  " ELSE pg_catalog.now() END"
		  " WHERE" CHAT_VISIBLE "RETURNING s",
		  CHAT_VISIBLE_TYPES, TEXTOID);

/* takes the next $4 sequences; the row lock makes them gapless */
CHAT_STMT(take_sequences,
		  "UPDATE chat.chat_session AS s SET"
		  " next_sequence = s.next_sequence + $4,"
		  " updated_at = pg_catalog.now()"
		  " WHERE" CHAT_VISIBLE "RETURNING s.next_sequence - $4",
		  CHAT_VISIBLE_TYPES, INT8OID);

CHAT_STMT(set_tool_content,
		  "WITH newest AS (SELECT m.sequence FROM chat.chat_message AS m"
		  " WHERE m.session_id = $1 AND m.tool_call_id = $2"
		  " AND m.role IN ('tool', 'function') AND m.active"
		  " ORDER BY m.sequence DESC LIMIT 1)"
		  " UPDATE chat.chat_message AS m SET"
		  " content = COALESCE($3, m.content),"
		  " parts = CASE WHEN $3 IS NULL THEN m.parts END"
		  " FROM newest WHERE m.session_id = $1"
		  " AND m.sequence = newest.sequence",
		  UUIDOID, TEXTOID, TEXTOID);

CHAT_STMT(touch_session,
		  "UPDATE chat.chat_session AS s SET updated_at = pg_catalog.now()"
		  " WHERE s.id = $1",
		  UUIDOID);

CHAT_STMT(lock_session_of_user,
		  "SELECT true FROM chat.chat_session AS s WHERE" CHAT_VISIBLE
		  "AND ($4 IS NULL OR s.user_id = $4) FOR UPDATE",
		  CHAT_VISIBLE_TYPES, TEXTOID);

CHAT_STMT(delete_events,
		  "WITH t AS MATERIALIZED (SELECT pg_catalog.array_agg(t.id) AS ids,"
		  " pg_catalog.array_agg(DISTINCT t.slot) AS slots"
		  " FROM chat.chat_task AS t"
		  " WHERE t.session_id = $1 AND t.slot IS NOT NULL)"
		  " DELETE FROM chat.chat_event AS e"
		  " WHERE e.slot = ANY ((SELECT t.slots FROM t)::smallint[])"
		  " AND e.task_id = ANY ((SELECT t.ids FROM t)::uuid[])",
		  UUIDOID);

CHAT_STMT(delete_session,
		  "DELETE FROM chat.chat_session AS s WHERE s.id = $1",
		  UUIDOID);

CHAT_STMT(active_messages,
		  "SELECT" CHAT_CONTEXT_COLUMNS "FROM chat.chat_message AS m"
		  " WHERE m.session_id = $1 AND m.active ORDER BY m.sequence",
		  UUIDOID);

#define SETTING(name, kind) CHAT_FIELD(name, kind, CHAT_FIELD_NO_COLUMN)
#define SETTING_RANGE(name, kind, min, max) \
	CHAT_FIELD_RANGE(name, kind, CHAT_FIELD_NO_COLUMN, min, max)
/* seconds that fit into an int of milliseconds */
#define SETTING_TIME(name) \
	SETTING_RANGE(name, CHAT_FIELD_NUMBER, 0.001, 2147483)

/* What a session's settings may hold; they go before the server's options. */
static const ChatField setting_fields[] =
{
	SETTING("model", CHAT_FIELD_TEXT),
	SETTING("title_model", CHAT_FIELD_TEXT),
	SETTING_RANGE("temperature", CHAT_FIELD_NUMBER, 0, 2),
	SETTING_RANGE("top_p", CHAT_FIELD_NUMBER, 0, 1),
	SETTING_RANGE("max_tokens", CHAT_FIELD_INTEGER, 1, PG_INT32_MAX),
	SETTING_RANGE("max_tokens_per_task", CHAT_FIELD_INTEGER,
				  1, PG_INT32_MAX),
	SETTING("tools", CHAT_FIELD_STRINGS),
	SETTING("tool_choice", CHAT_FIELD_CHOICE),
	SETTING("parallel_tool_calls", CHAT_FIELD_BOOL),
	SETTING_RANGE("max_context_messages", CHAT_FIELD_INTEGER,
				  1, PG_INT32_MAX),
	SETTING_TIME("first_token_timeout"),
	SETTING_TIME("idle_timeout"),
	SETTING_TIME("stream_timeout"),
	SETTING_TIME("connect_timeout"),
	SETTING("prompt", CHAT_FIELD_TEXT),
	SETTING("thinking", CHAT_FIELD_BOOL),
	SETTING("extra_body", CHAT_FIELD_OBJECT),
};
static const ChatFieldTable setting_table =
{"setting", setting_fields, lengthof(setting_fields), false, false};

static const ChatField metadata_field =
CHAT_FIELD("metadata", CHAT_FIELD_OBJECT, DOC_METADATA);

/* The document form of a session. */
static const ChatField document_fields[] =
{
	CHAT_FIELD("session_id", CHAT_FIELD_UUID, DOC_ID),
	CHAT_FIELD("user_id", CHAT_FIELD_TEXT, DOC_USER_ID),
	CHAT_FIELD("title", CHAT_FIELD_TEXT, DOC_TITLE),
	CHAT_FIELD("credentials", CHAT_FIELD_ANY, DOC_CREDENTIALS),
	CHAT_FIELD("successful_agent_runs", CHAT_FIELD_ANY, DOC_RUNS),
	CHAT_FIELD("successful_agent_schedules", CHAT_FIELD_ANY, DOC_SCHEDULES),
	CHAT_FIELD_RANGE("total_prompt_tokens", CHAT_FIELD_INTEGER,
					 DOC_PROMPT_TOKENS, 0, CHAT_FIELD_MAX),
	CHAT_FIELD_RANGE("total_completion_tokens", CHAT_FIELD_INTEGER,
					 DOC_COMPLETION_TOKENS, 0, CHAT_FIELD_MAX),
	CHAT_FIELD("settings", CHAT_FIELD_OBJECT, DOC_SETTINGS),
	CHAT_FIELD("metadata", CHAT_FIELD_OBJECT, DOC_METADATA),
	CHAT_FIELD("server", CHAT_FIELD_NAME, DOC_SERVER),
	CHAT_FIELD("channel", CHAT_FIELD_NAME, DOC_CHANNEL),
	CHAT_FIELD("usage", CHAT_FIELD_OBJECTS, DOC_USAGE),
	CHAT_FIELD("messages", CHAT_FIELD_ARRAY, DOC_MESSAGES),
	CHAT_FIELD("created_at", CHAT_FIELD_TIME, DOC_CREATED_AT),
	CHAT_FIELD("updated_at", CHAT_FIELD_TIME, CHAT_FIELD_NO_COLUMN),
	CHAT_FIELD("queued", CHAT_FIELD_ARRAY, CHAT_FIELD_NO_COLUMN),
	/* of exported documents alone */
	CHAT_FIELD("format", CHAT_FIELD_TEXT, DOC_FORMAT),
	CHAT_FIELD("summary", CHAT_FIELD_TEXT, DOC_SUMMARY),
	CHAT_FIELD_RANGE("summary_sequence", CHAT_FIELD_INTEGER,
					 DOC_SUMMARY_SEQUENCE, 1, CHAT_FIELD_MAX),
};
#define EXPORT_FIELDS 3

static const ChatFieldTable document_table =
{"key", document_fields, lengthof(document_fields) - EXPORT_FIELDS, false,
true};
static const ChatFieldTable export_table =
{"key", document_fields, lengthof(document_fields), false, true};

/* One entry of a document's usage; endpoints add members of their own. */
static const ChatField usage_fields[] =
{
	CHAT_FIELD_RANGE("prompt_tokens", CHAT_FIELD_INTEGER, 0,
					 0, CHAT_FIELD_MAX),
	CHAT_FIELD_RANGE("completion_tokens", CHAT_FIELD_INTEGER, 1,
					 0, CHAT_FIELD_MAX),
};
static const ChatFieldTable usage_table =
{"key", usage_fields, lengthof(usage_fields), true, true};

PG_FUNCTION_INFO_V1(chat_session_create);
PG_FUNCTION_INFO_V1(chat_session_upsert);
PG_FUNCTION_INFO_V1(chat_session_import);
PG_FUNCTION_INFO_V1(chat_session_update);
PG_FUNCTION_INFO_V1(chat_session_set_title);
PG_FUNCTION_INFO_V1(chat_session_assign);
PG_FUNCTION_INFO_V1(chat_session_delete);
PG_FUNCTION_INFO_V1(chat_session_add_message);
PG_FUNCTION_INFO_V1(chat_session_add_batch);
PG_FUNCTION_INFO_V1(chat_session_set_tool_content);
PG_FUNCTION_INFO_V1(chat_to_openai_messages);

/*
 * Checks
 */

/* Raises that there is no such session, for the caller at least. */
void
chat_session_missing(const pg_uuid_t *id)
{
	ereport(ERROR,
			(errcode(ERRCODE_NO_DATA_FOUND),
			 errmsg("session does not exist"),
			 id == NULL ? errdetail("The session's id is null.") :
			 errdetail("The session's id is %s.",
					   DatumGetCString(DirectFunctionCall1(uuid_out,
														   UUIDPGetDatum(id))))));
}

/* Raises an error unless all members are settings, well-formed. */
void
chat_session_check_settings(Jsonb *settings)
{
	JsonbValue	v;

	if (!JB_ROOT_IS_OBJECT(settings))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("settings must be a JSON object")));
	chat_field_read(&setting_table, &settings->root, "", NULL, NULL);
	if (getKeyJsonValueFromContainer(&settings->root, "extra_body", 10, &v))
		chat_field_check_depth(v.val.binary.data, "extra_body", "");
}

/* Raises an error unless the caller may create sessions of the role. */
static void
check_owner(Oid caller, Oid owner)
{
	if (!SearchSysCacheExists1(AUTHOID, ObjectIdGetDatum(owner)))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("role with OID %u does not exist", owner)));
	if (!has_privs_of_role(caller, owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied to create a session of role \"%s\"",
						GetUserNameFromId(owner, false)),
				 errdetail("The caller must have the privileges of that role.")));
}

/* Raises that chat.user_id says that we work for another user. */
static CHAT_NORETURN void
reject_user(const ChatScope *scope)
{
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("permission denied for sessions of another user"),
			 errdetail("The setting \"chat.user_id\" is \"%s\".",
					   scope->user)));
}

/* Checks a document's user against chat.user_id; an empty one is none. */
static void
check_user(const ChatScope *scope, Document *doc)
{
	char	   *user;

	if (doc->nulls[DOC_USER_ID])
		return;
	user = TextDatumGetCString(doc->values[DOC_USER_ID]);
	if (user[0] == '\0')
		doc->nulls[DOC_USER_ID] = true;
	else if (scope->user[0] != '\0' && strcmp(scope->user, user) != 0)
		reject_user(scope);
}

/* Raises an error if a total is larger than one may be, or than it was. */
static void
check_total(const char *name, int64 total, int64 stored)
{
	if (total < 0 || total > Max(stored, MAX_TOTAL))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("\"%s\" must be a whole number from 0 to %lld",
						name, (long long) MAX_TOTAL)));
}

/* Checks a document's totals against those that are stored. */
static void
check_totals(const Document *doc, int64 prompt, int64 completion)
{
	if (!doc->nulls[DOC_PROMPT_TOKENS])
		check_total("total_prompt_tokens",
					DatumGetInt64(doc->values[DOC_PROMPT_TOKENS]), prompt);
	if (!doc->nulls[DOC_COMPLETION_TOKENS])
		check_total("total_completion_tokens",
					DatumGetInt64(doc->values[DOC_COMPLETION_TOKENS]),
					completion);
}

/* Starts a function: fills the parameters of CHAT_VISIBLE. */
static void
enter(ChatScope *scope, pg_uuid_t *id, Datum *values)
{
	chat_db_enter(scope);
	values[0] = UUIDPGetDatum(id);
	chat_db_caller(scope, values);
}

/* Copies the first column of the first row out, and ends the function. */
static Datum
leave_with_row(ChatScope *scope)
{
	bool		isnull;
	Datum		row = chat_db_datum(0, 1, &isnull);

	row = SPI_datumTransfer(row, false, -1);
	chat_db_leave(scope);
	return row;
}

/* Takes arguments as parameters of a statement. */
static void
take_arguments(FunctionCallInfo fcinfo, int first, int n, Datum *values,
			   char *nulls)
{
	for (int i = 0; i < n; i++)
	{
		values[i] = PG_GETARG_DATUM(first + i);
		nulls[i] = PG_ARGISNULL(first + i) ? 'n' : ' ';
	}
}

/*
 * Sessions
 */

/* Runs a statement that takes the stored columns of a document. */
static uint64
exec_document(ChatStmt *stmt, Document *doc)
{
	char		nulls[DOC_STORED];

	for (int i = 0; i < DOC_STORED; i++)
		nulls[i] = doc->nulls[i] ? 'n' : ' ';
	return chat_db_exec(stmt, doc->values, nulls);
}

/* Sets a column of a document. */
static void
set_column(Document *doc, DocumentColumn column, Datum value)
{
	doc->values[column] = value;
	doc->nulls[column] = false;
}

/* Returns the name of a document's server, which must have one. */
static const char *
server_name(const Document *doc)
{
	return NameStr(*DatumGetName(doc->values[DOC_SERVER]));
}

/*
 * Inserts a session.  A chosen id that is taken is an error, about which only
 * those who see that session learn more; with missing_ok, false.
 */
static bool
insert_document(const ChatScope *scope, Document *doc)
{
	check_user(scope, doc);
	check_totals(doc, 0, 0);
	if (doc->nulls[DOC_USER_ID] && scope->user[0] != '\0')
		set_column(doc, DOC_USER_ID, CStringGetTextDatum(scope->user));
	if (!doc->nulls[DOC_SERVER])
		(void) chat_server_load(server_name(doc), false);
	if (doc->nulls[DOC_OWNER])
		set_column(doc, DOC_OWNER, ObjectIdGetDatum(scope->caller));
	if (doc->nulls[DOC_APPENDED])
		set_column(doc, DOC_APPENDED, Int64GetDatum(0));
	if (doc->nulls[DOC_ID])
	{
		pg_uuid_t  *id = palloc(sizeof(pg_uuid_t));

		chat_db_new_ids(id, 1);
		set_column(doc, DOC_ID, UUIDPGetDatum(id));
	}
	return exec_document(&insert_session, doc) > 0;
}

/* Raises that a chosen id is taken. */
static CHAT_NORETURN void
reject_id(const ChatScope *scope, Datum id)
{
	Datum		values[3];
	bool		visible;

	values[0] = id;
	chat_db_caller(scope, values);
	visible = chat_db_exec(&find_session, values, NULL) > 0;
	ereport(ERROR,
			(errcode(ERRCODE_UNIQUE_VIOLATION),
			 errmsg("session id is taken"),
			 visible ?
			 errdetail("Session %s exists.",
					   DatumGetCString(DirectFunctionCall1(uuid_out, id))) : 0,
			 visible ?
			 errhint("To create or update, call chat.upsert_chat_session().") : 0));
}

/* create_chat_session: returns the row. */
Datum
chat_session_create(PG_FUNCTION_ARGS)
{
	static const DocumentColumn arguments[] =
	{DOC_ID, DOC_USER_ID, DOC_TITLE, DOC_SERVER, DOC_SETTINGS, DOC_METADATA,
	DOC_OWNER, DOC_CHANNEL};
	ChatScope	scope;
	Document	doc;

	memset(doc.nulls, true, sizeof(doc.nulls));
	for (int i = 0; i < (int) lengthof(arguments); i++)
		if (!PG_ARGISNULL(i))
			set_column(&doc, arguments[i], PG_GETARG_DATUM(i));
	if (!doc.nulls[DOC_SETTINGS])
		chat_session_check_settings(DatumGetJsonbP(doc.values[DOC_SETTINGS]));
	if (!doc.nulls[DOC_METADATA])
		chat_field_check(&metadata_field,
						 DatumGetJsonbP(doc.values[DOC_METADATA]));
	chat_db_enter(&scope);
	if (!doc.nulls[DOC_OWNER])
		check_owner(scope.caller, DatumGetObjectId(doc.values[DOC_OWNER]));
	if (!insert_document(&scope, &doc))
		reject_id(&scope, doc.values[DOC_ID]);
	return leave_with_row(&scope);
}

/* update_chat_session: returns the row or NULL. */
Datum
chat_session_update(PG_FUNCTION_ARGS)
{
	static const ChatField anything[] =
	{
		CHAT_FIELD("credentials", CHAT_FIELD_ANY, DOC_CREDENTIALS),
		CHAT_FIELD("successful_agent_runs", CHAT_FIELD_ANY, DOC_RUNS),
		CHAT_FIELD("successful_agent_schedules", CHAT_FIELD_ANY,
				   DOC_SCHEDULES),
	};
	ChatScope	scope;
	Datum		values[11];
	char		nulls[11] = "   ";

	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	if (!PG_ARGISNULL(7))
		chat_session_check_settings(PG_GETARG_JSONB_P(7));
	if (!PG_ARGISNULL(8))
		chat_field_check(&metadata_field, PG_GETARG_JSONB_P(8));
	for (int i = 0; i < (int) lengthof(anything); i++)
		if (!PG_ARGISNULL(i + 1))
			chat_field_check(&anything[i], PG_GETARG_JSONB_P(i + 1));
	if (!PG_ARGISNULL(4))
		check_total("total_prompt_tokens", PG_GETARG_INT64(4), 0);
	if (!PG_ARGISNULL(5))
		check_total("total_completion_tokens", PG_GETARG_INT64(5), 0);
	enter(&scope, PG_GETARG_UUID_P(0), values);
	take_arguments(fcinfo, 1, 8, values + 3, nulls + 3);
	if (chat_db_exec(&update_session, values, nulls) > 0)
		return leave_with_row(&scope);
	chat_db_leave(&scope);
	PG_RETURN_NULL();
}

/* update_session_title: returns whether there is such a session. */
Datum
chat_session_set_title(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Datum		values[4];
	bool		found = false;

	if (PG_ARGISNULL(0))
		PG_RETURN_BOOL(false);
	enter(&scope, PG_GETARG_UUID_P(0), values);
	if (!PG_ARGISNULL(1))
	{
		values[3] = PG_GETARG_DATUM(1);
		found = chat_db_exec(&set_title, values, NULL) > 0;
	}
	if (!found)
		found = chat_db_exec(&find_session, values, NULL) > 0;
	chat_db_leave(&scope);
	PG_RETURN_BOOL(found);
}

/* assign_user_to_session: returns the row. */
Datum
chat_session_assign(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Datum		values[4];
	char		nulls[4] = "   ";

	if (PG_ARGISNULL(0))
		chat_session_missing(NULL);
	enter(&scope, PG_GETARG_UUID_P(0), values);
	take_arguments(fcinfo, 1, 1, values + 3, nulls + 3);
	if (chat_db_exec(&set_user, values, nulls) == 0)
		chat_session_missing(PG_GETARG_UUID_P(0));
	if (scope.user[0] != '\0' && !PG_ARGISNULL(1) &&
		strcmp(scope.user, TextDatumGetCString(values[3])) != 0)
		reject_user(&scope);
	return leave_with_row(&scope);
}

/* delete_chat_session: returns whether there was such a session. */
Datum
chat_session_delete(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Datum		values[4];
	char		nulls[4] = "   ";
	bool		found;

	if (PG_ARGISNULL(0))
		PG_RETURN_BOOL(false);
	enter(&scope, PG_GETARG_UUID_P(0), values);
	take_arguments(fcinfo, 1, 1, values + 3, nulls + 3);
	found = chat_db_exec(&lock_session_of_user, values, nulls) > 0;
	if (found)
	{
		chat_usage_keep(DatumGetUUIDP(values[0]));
		chat_db_exec(&delete_events, values, NULL);
		chat_db_exec(&delete_session, values, NULL);
		/* whoever waits for one of its tasks waits in vain */
		chat_shmem_publish_at_commit(NULL);
	}
	chat_db_leave(&scope);
	PG_RETURN_BOOL(found);
}

/*
 * Messages
 */

/* Raises that the caller's idea of the session is out of date. */
static CHAT_NORETURN void
reject_sequence(int64 given, int64 right, const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("sequence %lld is stale", (long long) given),
			 errdetail("%s %lld.", what, (long long) right),
			 errhint("Read the session again.")));
}

/*
 * Takes n sequences of a session that the caller may see and returns the
 * first; it must be the expected one, if one is (not NULL).
 */
static int64
take(Datum *visible, int n, const int64 *expected)
{
	Datum		values[4];
	int64		first;

	memcpy(values, visible, sizeof(Datum) * 3);
	values[3] = Int64GetDatum(n);
	if (chat_db_exec(&take_sequences, values, NULL) == 0)
		chat_session_missing(DatumGetUUIDP(values[0]));
	first = chat_db_int64(0, 1, 0);
	if (expected != NULL && *expected != first)
		reject_sequence(*expected, first, "The next sequence is");
	return first;
}

/* Whether a client has chosen the id of one of the entries. */
static bool
has_ids(const ChatEntries *entries)
{
	for (int i = 0; i < entries->n; i++)
		if (!entries->items[i].nulls[CHAT_ENTRY_ID])
			return true;
	return false;
}

/*
 * Appends entries to a session that the caller may see; the rows are the
 * last result.  Entries that are stored already, under the ids that the
 * client chose, are the same messages, not new ones.
 */
static void
append(Datum *visible, const ChatEntries *entries, const int64 *expected)
{
	pg_uuid_t  *session = DatumGetUUIDP(visible[0]);
	int64		sequence;

	if (has_ids(entries))
	{
		if (chat_db_exec(&lock_session, visible, NULL) == 0)
			chat_session_missing(session);
		if (chat_message_stored(session, entries, 0))
		{
			(void) chat_message_row(0, &sequence);
			if (expected != NULL && *expected != sequence)
				reject_sequence(*expected, sequence,
								"The message is stored already, with sequence");
			return;
		}
	}
	sequence = take(visible, entries->n, expected);
	chat_message_append(session, entries, 0, sequence);
}

/* add_chat_message: returns the row. */
Datum
chat_session_add_message(PG_FUNCTION_ARGS)
{
	static const ChatEntryColumn arguments[] =
	{CHAT_ENTRY_ROLE, CHAT_ENTRY_CONTENT, CHAT_ENTRY_NAME,
		CHAT_ENTRY_TOOL_CALL_ID, CHAT_ENTRY_REFUSAL, CHAT_ENTRY_TOOL_CALLS,
	CHAT_ENTRY_FUNCTION_CALL, CHAT_ENTRY_PARTS, CHAT_ENTRY_ID};
	ChatScope	scope;
	ChatEntry	entry;
	ChatEntries entries = {&entry, 1, false};
	Datum		visible[3];
	Datum		row;
	int64		expected = PG_ARGISNULL(10) ? 0 : PG_GETARG_INT64(10);
	int64		sequence;

	if (PG_ARGISNULL(0))
		chat_session_missing(NULL);
	memset(entry.nulls, true, sizeof(entry.nulls));
	for (int i = 0; i < (int) lengthof(arguments); i++)
	{
		entry.values[arguments[i]] = PG_GETARG_DATUM(i + 1);
		entry.nulls[arguments[i]] = PG_ARGISNULL(i + 1);
	}
	chat_message_check(&entry);
	enter(&scope, PG_GETARG_UUID_P(0), visible);
	append(visible, &entries, PG_ARGISNULL(10) ? NULL : &expected);
	row = SPI_datumTransfer(chat_message_row(0, &sequence), false, -1);
	chat_db_leave(&scope);
	return row;
}

/* add_chat_messages_batch: returns the rows. */
Datum
chat_session_add_batch(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	ChatScope	scope;
	ChatEntries entries;
	Datum		visible[3];
	int64		expected = PG_ARGISNULL(2) ? 0 : PG_GETARG_INT64(2);

	InitMaterializedSRF(fcinfo, 0);
	if (PG_ARGISNULL(0))
		chat_session_missing(NULL);
	if (PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("messages must not be null")));
	chat_message_read(&entries, PG_GETARG_JSONB_P(1), false);
	enter(&scope, PG_GETARG_UUID_P(0), visible);
	if (entries.n > 0)
		append(visible, &entries, PG_ARGISNULL(2) ? NULL : &expected);
	else if (chat_db_exec(&find_session, visible, NULL) == 0)
		chat_session_missing(PG_GETARG_UUID_P(0));
	for (int i = 0; i < entries.n; i++)
	{
		HeapTupleData tuple;
		int64		sequence;

		tuple.t_data = DatumGetHeapTupleHeader(chat_message_row(i, &sequence));
		tuple.t_len = HeapTupleHeaderGetDatumLength(tuple.t_data);
		ItemPointerSetInvalid(&tuple.t_self);
		tuple.t_tableOid = InvalidOid;
		tuplestore_puttuple(rsinfo->setResult, &tuple);
	}
	chat_db_leave(&scope);
	return (Datum) 0;
}

/* update_tool_message_content: returns whether there is such a message. */
Datum
chat_session_set_tool_content(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Datum		visible[3];
	Datum		values[3];
	char		nulls[3] = " ";
	bool		found;

	if (PG_ARGISNULL(0))
		PG_RETURN_BOOL(false);
	enter(&scope, PG_GETARG_UUID_P(0), visible);
	values[0] = visible[0];
	take_arguments(fcinfo, 1, 2, values + 1, nulls + 1);
	found = chat_db_exec(&lock_session, visible, NULL) > 0 &&
		chat_db_exec(&set_tool_content, values, nulls) > 0;
	if (found)
		chat_db_exec(&touch_session, values, NULL);
	chat_db_leave(&scope);
	PG_RETURN_BOOL(found);
}

/* to_openai_messages: returns the messages of the next request, or NULL. */
Datum
chat_to_openai_messages(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	ChatMessage *messages;
	Datum		visible[3];
	StringInfoData json;
	uint64		n;
	Datum		result;

	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	enter(&scope, PG_GETARG_UUID_P(0), visible);
	if (chat_db_exec(&find_session, visible, NULL) == 0)
	{
		chat_db_leave(&scope);
		PG_RETURN_NULL();
	}
	n = chat_db_exec(&active_messages, visible, NULL);
	messages = palloc_extended(sizeof(ChatMessage) * Max(n, 1),
							   MCXT_ALLOC_HUGE);
	for (uint64 i = 0; i < n; i++)
		chat_context_row(&messages[i], i, 1, NULL);
	initStringInfo(&json);
	chat_openai_messages(&json, messages, (int) n);
	result = DirectFunctionCall1(jsonb_in, CStringGetDatum(json.data));
	result = SPI_datumTransfer(result, false, -1);
	chat_db_leave(&scope);
	return result;
}

/*
 * Documents
 */

/* Adds a count to a sum. */
static void
add(int64 *sum, Datum count, bool isnull)
{
	if (!isnull && pg_add_s64_overflow(*sum, DatumGetInt64(count), sum))
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg("sum of usage is out of range")));
}

/* Sums a document's usage entries; the larger of sum and total counts. */
static void
sum_usage(Document *doc)
{
	JsonbIterator *it;
	JsonbValue	v;
	int64		sums[2] = {0, 0};

	if (doc->nulls[DOC_USAGE])
		return;
	it = JsonbIteratorInit(&DatumGetJsonbP(doc->values[DOC_USAGE])->root);
	(void) JsonbIteratorNext(&it, &v, true);
	for (int i = 0; JsonbIteratorNext(&it, &v, true) == WJB_ELEM; i++)
	{
		Datum		counts[2];
		bool		nulls[2] = {true, true};

		chat_field_read(&usage_table, v.val.binary.data,
						psprintf("usage at index %d: ", i), counts, nulls);
		add(&sums[0], counts[0], nulls[0]);
		add(&sums[1], counts[1], nulls[1]);
	}
	for (int i = 0; i < 2; i++)
	{
		int			column = DOC_PROMPT_TOKENS + i;

		if (doc->nulls[column] ||
			DatumGetInt64(doc->values[column]) < sums[i])
			set_column(doc, column, Int64GetDatum(sums[i]));
	}
}

/* Reads a document and its messages. */
static void
read_document(const ChatFieldTable *table, Jsonb *json, Document *doc,
			  ChatEntries *entries)
{
	memset(doc->nulls, true, sizeof(doc->nulls));
	chat_field_read(table, &json->root, "", doc->values, doc->nulls);
	if (!doc->nulls[DOC_SETTINGS])
		chat_session_check_settings(DatumGetJsonbP(doc->values[DOC_SETTINGS]));
	if (!doc->nulls[DOC_FORMAT] &&
		strcmp(TextDatumGetCString(doc->values[DOC_FORMAT]), FORMAT) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("unrecognized format of a document: \"%s\"",
						TextDatumGetCString(doc->values[DOC_FORMAT])),
				 errhint("Valid is: %s.", FORMAT)));
	sum_usage(doc);
	entries->n = 0;
	entries->indexed = true;
	if (!doc->nulls[DOC_MESSAGES])
		chat_message_read(entries, DatumGetJsonbP(doc->values[DOC_MESSAGES]),
						  true);
}

/*
 * Brings a document into a session that exists and is locked: $1 to $3 and
 * the row of lock_session are at hand.
 */
static void
merge(const ChatScope *scope, Document *doc, const ChatEntries *entries)
{
	pg_uuid_t  *session = DatumGetUUIDP(doc->values[DOC_ID]);
	int64		sequence = chat_db_int64(0, 1, 0);
	char	   *server = chat_db_string(0, 2);
	int			from;

	check_user(scope, doc);
	check_totals(doc, chat_db_int64(0, 3, 0), chat_db_int64(0, 4, 0));
	if (!doc->nulls[DOC_SERVER])
	{
		if (server == NULL || strcmp(server, server_name(doc)) != 0)
			(void) chat_server_load(server_name(doc), false);
	}
	from = chat_message_overlap(session, entries);
	if (from < entries->n && chat_message_stored(session, entries, from))
		ereport(ERROR,
				(errcode(ERRCODE_UNIQUE_VIOLATION),
				 errmsg("message at index %d: stored already, but hidden",
						from)));
	set_column(doc, DOC_APPENDED, Int64GetDatum(entries->n - from));
	exec_document(&merge_session, doc);
	if (from < entries->n)
		chat_message_append(session, entries, from, sequence);
}

/*
 * Finds the session of a document, with a statement that takes $1 to $3 of
 * CHAT_VISIBLE; false when there is none.
 */
static bool
find_document(const ChatScope *scope, const Document *doc, ChatStmt *stmt)
{
	Datum		values[3];

	if (doc->nulls[DOC_ID])
		return false;
	values[0] = doc->values[DOC_ID];
	chat_db_caller(scope, values);
	return chat_db_exec(stmt, values, NULL) > 0;
}

/* Creates the session of a document with its messages. */
static bool
create(const ChatScope *scope, Document *doc, const ChatEntries *entries)
{
	bool		isnull;
	Datum		id;

	set_column(doc, DOC_APPENDED, Int64GetDatum(entries->n));
	if (!insert_document(scope, doc))
		return false;
	id = chat_db_datum(0, 2, &isnull);
	set_column(doc, DOC_ID, id);
	if (entries->n > 0)
		chat_message_append(DatumGetUUIDP(id), entries, 0, 1);
	return true;
}

/* upsert_chat_session: returns the document as it is then. */
Datum
chat_session_upsert(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Document	doc;
	ChatEntries entries;
	bool		created = false;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("session must not be null")));
	read_document(&document_table, PG_GETARG_JSONB_P(0), &doc, &entries);
	chat_db_enter(&scope);
	while (!created && !find_document(&scope, &doc, &lock_session))
	{
		created = create(&scope, &doc, &entries);
		/* taken, by somebody else; or by our kind, who may have left again */
		if (!created && find_document(&scope, &doc, &find_hidden))
			reject_id(&scope, doc.values[DOC_ID]);
	}
	if (!created)
		merge(&scope, &doc, &entries);
	chat_db_exec(&document_of, doc.values, NULL);
	return leave_with_row(&scope);
}

/*
 * Checks that the messages of a document that is imported are whole: their
 * sequences, which branches refer to, count from 1.
 */
static void
check_sequences(const ChatEntries *entries)
{
	for (int i = 0; i < entries->n; i++)
	{
		const ChatEntry *entry = &entries->items[i];

		if (!entry->nulls[CHAT_ENTRY_SEQUENCE] &&
			DatumGetInt64(entry->values[CHAT_ENTRY_SEQUENCE]) != i + 1)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("message at index %d: its sequence is not %d",
							i, i + 1),
					 errhint("Import what chat.export_chat_session() returned, or leave the sequences out.")));
	}
}

/* Checks that a summary that is imported is one of the document's messages. */
static void
check_summary(const Document *doc, const ChatEntries *entries)
{
	if (doc->nulls[DOC_SUMMARY] != doc->nulls[DOC_SUMMARY_SEQUENCE])
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("\"summary\" and \"summary_sequence\" go together")));
	if (!doc->nulls[DOC_SUMMARY] &&
		DatumGetInt64(doc->values[DOC_SUMMARY_SEQUENCE]) > entries->n)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("the summary reaches beyond the messages"),
				 errdetail("\"summary_sequence\" is %lld, the last message has %d.",
						   (long long) DatumGetInt64(doc->values[DOC_SUMMARY_SEQUENCE]),
						   entries->n)));
}

/* import_chat_session: returns the row. */
Datum
chat_session_import(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Document	doc;
	ChatEntries entries;
	Datum		values[4];

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("document must not be null")));
	read_document(&export_table, PG_GETARG_JSONB_P(0), &doc, &entries);
	check_sequences(&entries);
	check_summary(&doc, &entries);
	if (!PG_ARGISNULL(1))
		set_column(&doc, DOC_ID, PG_GETARG_DATUM(1));
	chat_db_enter(&scope);
	if (!PG_ARGISNULL(2))
	{
		check_owner(scope.caller, PG_GETARG_OID(2));
		set_column(&doc, DOC_OWNER, PG_GETARG_DATUM(2));
	}
	if (!create(&scope, &doc, &entries))
		reject_id(&scope, doc.values[DOC_ID]);
	values[0] = doc.values[DOC_ID];
	values[1] = PG_GETARG_DATUM(0);
	if (entries.n > 0)
		chat_db_exec(&restore_messages, values, NULL);
	values[2] = doc.values[DOC_SUMMARY];
	values[3] = doc.values[DOC_SUMMARY_SEQUENCE];
	chat_db_exec(&restore_session, values,
				 doc.nulls[DOC_SUMMARY] ? "  nn" : NULL);
	return leave_with_row(&scope);
}
