/*
 * enqueue.c
 *		Putting a turn into the tables: what stream_chat_completion, regenerate,
 *		edit_message and rerun_job have in common.
 *
 * Owns nothing.  A call holds its session's row lock and nothing else (P5): no
 * notification, no lock of the queue.  Everybody who talks to a session comes
 * by here, so what each call does is done without a plan; see rows.c.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "append.h"
#include "db.h"
#include "enqueue.h"
#include "rows.h"
#include "server.h"
#include "session.h"
#include "shmem.h"
#include "title.h"
#include "usage.h"

/* $1 session, $2 message id */
CHAT_STMT(find_task,
		  "SELECT t.id FROM chat.chat_task AS t"
		  " WHERE t.session_id = $1 AND t.message_id = $2"
		  " UNION ALL SELECT NULL::uuid FROM chat.chat_message AS m"
		  " WHERE m.session_id = $1 AND m.id = $2",
		  UUIDOID, UUIDOID);

/* $1 session: the task that has it, or the first that will */
CHAT_STMT(find_busy,
		  "SELECT t.id::text, t.status FROM"
		  " (" CHAT_BUSY_TASK("$1", "b.id, b.status, b.place") ") AS t"
		  " ORDER BY t.status <> 'queued' DESC, t.place LIMIT 1",
		  UUIDOID);

/*
 * $1 session, $2 interrupt or rollback: its tasks make room for another.  One
 * that is queued starts all the same, so that its message takes its place,
 * and ends at once.
 */
CHAT_STMT(supersede_tasks,
		  "WITH task AS ("
		  " UPDATE chat.chat_task AS t SET superseded = $2"
		  " WHERE t.id = ANY (ARRAY(" CHAT_BUSY_TASK("$1", "b.id") "))"
		  "  AND t.superseded IS DISTINCT FROM 'rollback'"
		  " RETURNING t.id)"
		  " UPDATE chat.chat_job AS j SET cancel = true,"
		  "  run_at = '-infinity' FROM task"
		  " WHERE j.session_id = $1 AND j.task_id = task.id"
		  "  AND j.kind = 'completion'",
		  UUIDOID, TEXTOID);

/* $1 session: a summary of what is about to be hidden is none */
CHAT_STMT(forget_summary,
		  "UPDATE chat.chat_session AS s SET summary = NULL,"
		  " summary_sequence = 0 WHERE s.id = $1 AND s.summary IS NOT NULL"
		  " AND EXISTS (SELECT FROM ("
		  CHAT_OPEN_TASK("$1", "b.id, b.superseded") ") AS t"
		  "  JOIN chat.chat_message AS m ON m.session_id = $1"
		  "   AND m.task_id = t.id AND m.sequence <= s.summary_sequence"
		  "  WHERE t.superseded = 'rollback')",
		  UUIDOID);

/*
 * Looks for the task that a message id has started already; false if there
 * is none.  An id that a stored message has, but no task, is an error.
 */
static bool
find_earlier(const ChatCall *c, pg_uuid_t *task)
{
	Datum		values[2] = {UUIDPGetDatum(c->session), (Datum) 0};

	if (c->message_id == NULL)
		return false;
	values[1] = UUIDPGetDatum(c->message_id);
	if (chat_db_exec_now(&find_task, values, NULL) == 0)
		return false;
	if (chat_db_isnull(0, 1))
		ereport(ERROR,
				(errcode(ERRCODE_UNIQUE_VIOLATION),
				 errmsg("message id is taken"),
				 errdetail("The session holds a message with this id that no call of stream_chat_completion has sent.")));
	*task = chat_db_uuid(0, 1);
	return true;
}

/* What a call reads of its session's row. */
typedef struct SessionRow
{
	Oid			owner;
	char	   *server;			/* NULL = none */
	char	   *model;			/* NULL = the server's */
} SessionRow;

/* Whether a column holds this text. */
static bool
is_text(TupleTableSlot *row, const char *column, const char *wanted)
{
	bool		isnull;
	Datum		value = chat_rows_get(row, column, &isnull);

	return !isnull && strcmp(TextDatumGetCString(value), wanted) == 0;
}

/* Whether a session's row is the caller's: CHAT_VISIBLE, and the call's user. */
static bool
is_callers(TupleTableSlot *row, const ChatCall *c, const ChatScope *scope)
{
	bool		isnull;
	Datum		owner = chat_rows_get(row, "owner", &isnull);

	return has_privs_of_role(scope->caller, DatumGetObjectId(owner)) &&
		(scope->user[0] == '\0' || is_text(row, "user_id", scope->user)) &&
		(c->user_id == NULL ||
		 is_text(row, "user_id", text_to_cstring(c->user_id)));
}

/* Copies what a call needs of its session's row. */
static void
read_session(TupleTableSlot *row, SessionRow *s)
{
	bool		isnull;
	Datum		value = chat_rows_get(row, "owner", &isnull);
	JsonbValue	model;

	s->owner = DatumGetObjectId(value);
	value = chat_rows_get(row, "server", &isnull);
	s->server = isnull ? NULL : pstrdup(NameStr(*DatumGetName(value)));
	value = chat_rows_get(row, "settings", &isnull);
	s->model = NULL;
	if (getKeyJsonValueFromContainer(&DatumGetJsonbP(value)->root, "model",
									 5, &model) && model.type == jbvString)
		s->model = pnstrdup(model.val.string.val, model.val.string.len);
}

/* Locks the session; says whose it is and what endpoint it names. */
static void
lock_call_session(const ChatCall *c, const ChatScope *scope, SessionRow *s)
{
	Relation	rel = chat_rows_table("chat_session", RowShareLock);
	TupleTableSlot *row = table_slot_create(rel, NULL);
	ChatProbe	probe;
	bool		found;

	/* what the statement that calls has done so far counts */
	CommandCounterIncrement();
	chat_rows_probe(&probe, rel, "chat_session_pkey", c->session,
					GetTransactionSnapshot());
	/* what is not the caller's is not waited for */
	found = chat_rows_next(&probe, row) && is_callers(row, c, scope) &&
		chat_rows_lock(&probe, row) && is_callers(row, c, scope);
	if (found)
		read_session(row, s);
	chat_rows_end(&probe);
	ExecDropSingleTupleTableSlot(row);
	table_close(rel, NoLock);
	if (!found)
		chat_session_missing(c->session);
	if (c->server)
		s->server = c->server;
	if (s->server == NULL)
		s->server = chat_server_default;
}

/* Returns the model that the call's options name, else the session's. */
static const char *
call_model(const ChatCall *c, const char *session_model)
{
	JsonbValue	v;

	if (c->options &&
		getKeyJsonValueFromContainer(&c->options->root, "model", 5, &v) &&
		v.type == jbvString)
		return pnstrdup(v.val.string.val, v.val.string.len);
	return session_model;
}

/* Does with the tasks of a busy session what the call says. */
static void
make_room(const ChatCall *c)
{
	Datum		values[2] = {UUIDPGetDatum(c->session), (Datum) 0};

	if (c->on_busy == NULL || strcmp(c->on_busy, "enqueue") == 0)
		return;
	if (strcmp(c->on_busy, "reject") != 0)
	{
		values[1] = CStringGetTextDatum(c->on_busy);
		chat_db_exec_now(&supersede_tasks, values, NULL);
		chat_db_exec(&forget_summary, values, NULL);
	}
	else if (chat_db_exec_now(&find_busy, values, NULL) > 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("session is busy"),
				 errdetail("Task %s is %s.", chat_db_text(0, 1),
						   chat_db_text(0, 2)),
				 errhint("Follow that task, or say on_busy => 'enqueue', 'interrupt' or 'rollback'.")));
}

/* What the rows of a new turn have in common. */
typedef struct NewTurn
{
	const ChatCall *call;
	Oid			owner;
	Name		server;
	pg_uuid_t	task;
	pg_uuid_t	answer;
	int64		place;
	Datum		input;			/* 0 = none */
	int64		job;			/* 0 = others are before it */
} NewTurn;

/* Whether a task has the session, or is queued for it: as CHAT_BUSY_TASK. */
static bool
is_busy(const pg_uuid_t *session)
{
	static const char *const indexes[] = {"chat_task_running_idx",
	"chat_task_waiting_idx", "chat_task_queued_idx"};
	Relation	rel = chat_rows_table("chat_task", AccessShareLock);
	TupleTableSlot *row = table_slot_create(rel, NULL);
	Snapshot	now;
	bool		busy = false;

	CommandCounterIncrement();
	now = RegisterSnapshot(GetLatestSnapshot());
	for (size_t i = 0; i < lengthof(indexes) && !busy; i++)
	{
		ChatProbe	probe;
		bool		isnull;

		chat_rows_probe(&probe, rel, indexes[i], session, now);
		/* one that waits elsewhere leaves the session free */
		while (!busy && chat_rows_next(&probe, row))
			busy = !(is_text(row, "status", "waiting") &&
					 DatumGetBool(chat_rows_get(row, "detached", &isnull)));
		chat_rows_end(&probe);
	}
	UnregisterSnapshot(now);
	ExecDropSingleTupleTableSlot(row);
	table_close(rel, NoLock);
	return busy;
}

/* Returns the next number of a sequence of the schema. */
static int64
next_of(const char *sequence)
{
	return DatumGetInt64(DirectFunctionCall1(nextval_oid,
											 ObjectIdGetDatum(chat_rows_oid(sequence))));
}

/* Begins a member of an object that is being made. */
static void
push_key(JsonbParseState **state, char *key)
{
	JsonbValue	name = {.type = jbvString};

	name.val.string.val = key;
	name.val.string.len = (int) strlen(key);
	pushJsonbValue(state, WJB_KEY, &name);
}

/* Adds a member that is text. */
static void
push_text(JsonbParseState **state, char *key, char *text, int len)
{
	JsonbValue	value = {.type = jbvString};

	value.val.string.val = text;
	value.val.string.len = len;
	push_key(state, key);
	pushJsonbValue(state, WJB_VALUE, &value);
}

/* Returns the message of a call, as it waits in its task. */
static Datum
make_input(const ChatCall *c)
{
	char	   *role = c->is_user_message ? "user" : "assistant";
	JsonbParseState *state = NULL;
	JsonbValue	context = {.type = jbvBinary};

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	push_text(&state, "role", role, (int) strlen(role));
	push_text(&state, "content", VARDATA_ANY(c->message),
			  (int) VARSIZE_ANY_EXHDR(c->message));
	push_key(&state, "metadata");
	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	if (c->context)
	{
		context.val.binary.data = &c->context->root;
		context.val.binary.len = (int) VARSIZE_ANY_EXHDR(c->context);
		push_key(&state, "context");
		pushJsonbValue(&state, WJB_VALUE, &context);
	}
	pushJsonbValue(&state, WJB_END_OBJECT, NULL);
	return JsonbPGetDatum(JsonbValueToJsonb(pushJsonbValue(&state,
														   WJB_END_OBJECT,
														   NULL)));
}

/*
 * Says what the rows of a turn hold.  Only the head task of a session has a
 * job.
 */
static void
plan_turn(NewTurn *t)
{
	const ChatCall *c = t->call;
	pg_uuid_t	ids[2];

	chat_db_new_ids(ids, lengthof(ids));
	t->task = ids[0];
	t->answer = ids[1];
	t->place = next_of("chat_task_place_seq");
	t->input = c->message ? make_input(c) : (Datum) 0;
	t->job = is_busy(c->session) ? 0 : next_of("chat_job_id_seq");
}

/* Stores the task of a turn. */
static void
add_task(const NewTurn *t)
{
	const ChatCall *c = t->call;
	Datum		options = c->options ? JsonbPGetDatum(c->options)
	: DirectFunctionCall1(jsonb_in, CStringGetDatum("{}"));
	Datum		now = TimestampTzGetDatum(GetCurrentTransactionStartTimestamp());
	ChatColumn	columns[] = {
		CHAT_COLUMN("id", UUIDPGetDatum(&t->task)),
		CHAT_COLUMN("session_id", UUIDPGetDatum(c->session)),
		CHAT_COLUMN("place", Int64GetDatum(t->place)),
		CHAT_COLUMN("status", CStringGetTextDatum("queued")),
		{"message_id", UUIDPGetDatum(c->message_id), c->message_id == NULL},
		{"input", t->input, t->input == (Datum) 0},
		CHAT_COLUMN("server", NameGetDatum(t->server)),
		CHAT_COLUMN("options", options),
		CHAT_COLUMN("answer_id", UUIDPGetDatum(&t->answer)),
		CHAT_COLUMN("run", Int32GetDatum(-1)),
		CHAT_COLUMN("detached", BoolGetDatum(false)),
		CHAT_COLUMN("steps", Int32GetDatum(0)),
		CHAT_COLUMN("prompt_tokens", Int64GetDatum(0)),
		CHAT_COLUMN("completion_tokens", Int64GetDatum(0)),
		CHAT_COLUMN("created_at", now),
	};

	chat_rows_insert("chat_task", columns, lengthof(columns));
}

/* Stores the job of a turn, and rings when the transaction commits. */
static void
add_job(const NewTurn *t)
{
	Datum		now = TimestampTzGetDatum(GetCurrentTransactionStartTimestamp());
	ChatColumn	columns[] = {
		CHAT_COLUMN("id", Int64GetDatum(t->job)),
		CHAT_COLUMN("kind", CStringGetTextDatum("completion")),
		CHAT_COLUMN("session_id", UUIDPGetDatum(t->call->session)),
		CHAT_COLUMN("task_id", UUIDPGetDatum(&t->task)),
		CHAT_COLUMN("server", NameGetDatum(t->server)),
		CHAT_COLUMN("owner", ObjectIdGetDatum(t->owner)),
		CHAT_COLUMN("database", ObjectIdGetDatum(MyDatabaseId)),
		CHAT_COLUMN("priority", Int16GetDatum(0)),
		CHAT_COLUMN("created_at", now),
		CHAT_COLUMN("run_at", TimestampTzGetDatum(DT_NOBEGIN)),
		CHAT_COLUMN("attempts", Int32GetDatum(0)),
		CHAT_COLUMN("crashes", Int32GetDatum(0)),
		CHAT_COLUMN("blamed", Int32GetDatum(0)),
		CHAT_COLUMN("cancel", BoolGetDatum(false)),
		CHAT_COLUMN("reset", BoolGetDatum(false)),
		CHAT_COLUMN("rerun", BoolGetDatum(false)),
		CHAT_COLUMN("last_seq", Int64GetDatum(0)),
		CHAT_COLUMN("parked", BoolGetDatum(false)),
		CHAT_COLUMN("waited", Int32GetDatum(0)),
		CHAT_COLUMN("epoch", Int64GetDatum(0)),
	};

	chat_rows_insert("chat_job", columns, lengthof(columns));
	chat_shmem_ring_at_commit(false);
}

/*
 * Queues a turn, unless its message id has started one; returns its task.  Who
 * queues locks the session, to which the rows refer, but does not write to it,
 * so only the latest snapshot tells what was queued before.
 */
pg_uuid_t
chat_enqueue(const ChatScope *scope, const ChatCall *c)
{
	NewTurn		t = {.call = c};
	pg_uuid_t	earlier;
	NameData	name;
	SessionRow	session;

	PreventCommandIfReadOnly("stream_chat_completion()");
	lock_call_session(c, scope, &session);
	if (find_earlier(c, &earlier))
		return earlier;
	t.owner = session.owner;
	chat_server_check(session.server, t.owner, call_model(c, session.model));
	chat_usage_check(c->session);
	make_room(c);
	namestrcpy(&name, session.server);
	t.server = &name;
	plan_turn(&t);
	add_task(&t);
	if (t.job != 0)
		add_job(&t);
	/* the worker asks for one when it takes up a message of a call */
	if (c->message == NULL)
		chat_title_want(c->session, session.server, t.owner);
	return t.task;
}

