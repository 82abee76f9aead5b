/*
 * replay.c
 *		The event stream of a task again, from its messages.
 *
 * Owns nothing; reads chat_message, inside the caller's chat_db_enter().
 *
 * Events are kept for a while, messages for good.  Whoever asks for a stream
 * that is gone gets one with the same meaning: the same blocks in the same
 * order, each text in one delta, and the same end.  It is the same every
 * time, number by number, because what it is made of does not change once
 * the task has ended; of a task that has not ended it is a beginning.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "db.h"
#include "fold.h"
#include "json.h"
#include "replay.h"

/* $1 session, $2 task */
CHAT_STMT(load_messages,
		  "SELECT m.id, m.role, m.content, m.refusal, m.tool_calls::text,"
		  " m.tool_call_id, m.metadata->>'reasoning',"
		  " (m.metadata->'usage')::text, m.metadata->>'model',"
		  " m.metadata->>'finish_reason',"
		  " COALESCE(m.metadata @> '{\"interrupted\": true}', false),"
		  " COALESCE(m.metadata @> '{\"pending\": true}', false),"
		  " m.created_at"
		  " FROM chat.chat_message AS m"
		  " WHERE m.session_id = $1 AND m.task_id = $2"
		  " AND m.role IN ('assistant', 'tool') ORDER BY m.sequence",
		  UUIDOID, UUIDOID);

typedef struct Message
{
	pg_uuid_t	id;
	bool		is_tool;
	char	   *content;
	char	   *refusal;
	char	   *tool_calls;		/* JSON array */
	char	   *tool_call_id;
	char	   *reasoning;
	char	   *usage;			/* JSON */
	char	   *model;
	char	   *finish_reason;
	bool		interrupted;
	bool		pending;
	TimestampTz at;
} Message;

/* A replay as it grows. */
typedef struct Replay
{
	const ChatReplayTask *task;
	ChatEventRows *out;
	char	   *task_text;
	TimestampTz at;				/* of the events that follow */
	int			blocks;
	StringInfoData json;		/* event in the making */
} Replay;

/* Makes room for one more row and returns it. */
ChatEventRow *
chat_replay_add(ChatEventRows *rows)
{
	if (rows->n == rows->max)
	{
		rows->max = Max(16, rows->max * 2);
		rows->rows = rows->rows
			? repalloc_huge(rows->rows, sizeof(ChatEventRow) * rows->max)
			: palloc(sizeof(ChatEventRow) * rows->max);
	}
	return &rows->rows[rows->n++];
}

/* ---------- writing events ---------- */

/* Starts an event. */
static StringInfo
begin(Replay *r, const char *type)
{
	resetStringInfo(&r->json);
	appendStringInfo(&r->json, "{\"type\":\"%s\"", type);
	return &r->json;
}

/* Appends ,"name":"text" unless there is none. */
static void
put_text(Replay *r, const char *name, const char *text)
{
	size_t		len;

	if (text == NULL)
		return;
	len = strlen(text);
	appendStringInfo(&r->json, ",\"%s\":\"", name);
	enlargeStringInfo(&r->json, (int) chat_json_escape(text, len, NULL) + 1);
	r->json.len += (int) chat_json_escape(text, len,
										  r->json.data + r->json.len);
	appendStringInfoChar(&r->json, '"');
}

/* Ends the event and adds its row. */
static void
finish(Replay *r)
{
	ChatEventRow *row = chat_replay_add(r->out);

	row->seq = CHAT_REPLAY_SEQ + r->out->n;
	row->at = r->at;
	appendStringInfo(&r->json, ",\"taskId\":\"%s\",\"seq\":" INT64_FORMAT "}",
					 r->task_text, row->seq);
	row->json.data = pnstrdup(r->json.data, r->json.len);
	row->json.len = r->json.len;
}

/* Adds an event that has nothing but a type. */
static void
add_plain(Replay *r, const char *type)
{
	begin(r, type);
	finish(r);
}

/* Adds a block of text or reasoning, if there is any. */
static void
add_block(Replay *r, const char *kind, const char *text)
{
	char	   *id;

	if (text == NULL || *text == '\0')
		return;
	id = psprintf("%s-%d", kind, ++r->blocks);
	for (int i = 0; i < 3; i++)
	{
		begin(r, psprintf("%s-%s", kind,
						  i == 0 ? "start" : i == 1 ? "delta" : "end"));
		put_text(r, "id", id);
		if (i == 1)
			put_text(r, "delta", text);
		finish(r);
	}
}

/* ---------- tools ---------- */

/* Decodes a JSON string; NULL if it is none. */
static char *
decode(ChatStr value)
{
	char	   *text;

	if (value.data == NULL || value.len < 2 || *value.data != '"')
		return NULL;
	text = palloc(value.len);
	text[chat_json_unescape(value.data + 1, value.len - 2, text)] = '\0';
	return text;
}

/* Appends ,"name": and a text as JSON: itself when it is, else a string. */
static void
put_value(Replay *r, const char *name, const char *text)
{
	Jsonb	   *value = chat_db_parse_json(text);

	if (value == NULL)
	{
		put_text(r, name, text);
		return;
	}
	appendStringInfo(&r->json, ",\"%s\":", name);
	JsonbToCString(&r->json, &value->root, VARSIZE(value));
}

/* Returns a member of an object that is a string, else NULL. */
static char *
string_member(Jsonb *object, const char *name)
{
	JsonbValue	v;

	if (!JB_ROOT_IS_OBJECT(object) ||
		getKeyJsonValueFromContainer(&object->root, name, (int) strlen(name),
									 &v) == NULL || v.type != jbvString)
		return NULL;
	return pnstrdup(v.val.string.val, v.val.string.len);
}

/* Reads a tool's result that is an error document; false if it is none. */
static bool
read_error(const char *content, char **code, char **message)
{
	Jsonb	   *value = *content == '{' ? chat_db_parse_json(content) : NULL;
	char	   *type = value ? string_member(value, "type") : NULL;

	if (type == NULL || strcmp(type, "error") != 0)
		return false;
	*code = string_member(value, "code");
	*message = string_member(value, "message");
	if (*code == NULL)
		*code = "";
	return true;
}

/* Adds how a tool call ended. */
static void
add_result(Replay *r, const Message *m, const char *id, const char *name,
		   const char *arguments)
{
	const char *content = m->content ? m->content : "";
	char	   *code = NULL;
	char	   *message = NULL;

	if (m->pending && *content == '\0')
		return;
	r->at = m->at;
	if (!read_error(content, &code, &message))
	{
		begin(r, "tool-output-available");
		put_text(r, "toolCallId", id);
		put_value(r, "output", content);
	}
	else if (strcmp(code, "denied") == 0)
	{
		begin(r, "tool-output-denied");
		put_text(r, "toolCallId", id);
	}
	else if (strcmp(code, "invalid_input") == 0)
	{
		begin(r, "tool-input-error");
		put_text(r, "toolCallId", id);
		put_text(r, "toolName", name);
		put_value(r, "input", arguments);
		put_text(r, "errorText", message ? message : content);
	}
	else
	{
		begin(r, "tool-output-error");
		put_text(r, "toolCallId", id);
		put_text(r, "errorText", message ? message : content);
	}
	finish(r);
}

/* Reads the id, name and arguments of a stored tool call. */
static bool
read_call(ChatStr call, char **id, char **name, char **arguments)
{
	ChatStr		function = chat_fold_member(call, "function");

	*id = decode(chat_fold_member(call, "id"));
	*name = decode(chat_fold_member(function, "name"));
	*arguments = decode(chat_fold_member(function, "arguments"));
	if (*arguments == NULL || **arguments == '\0')
		*arguments = "{}";
	return *id != NULL && *name != NULL;
}

/* Adds the calls of a step, then their results. */
static void
add_tools(Replay *r, const Message *m, const Message *results, int nresults)
{
	for (int pass = 0; pass < 2; pass++)
	{
		const char *at = m->tool_calls;
		const char *end = at + strlen(at);
		ChatMember	call;
		char	   *id;
		char	   *name;
		char	   *arguments;

		while (chat_fold_next(&at, end, &call))
		{
			if (!read_call(call.value, &id, &name, &arguments))
				continue;
			if (pass == 0)
			{
				begin(r, "tool-input-available");
				put_text(r, "toolCallId", id);
				put_text(r, "toolName", name);
				put_value(r, "input", arguments);
				finish(r);
			}
			for (int i = 0; pass == 1 && i < nresults; i++)
				if (results[i].tool_call_id &&
					strcmp(results[i].tool_call_id, id) == 0)
					add_result(r, &results[i], id, name, arguments);
		}
	}
}

/* ---------- the stream ---------- */

/* Returns a uuid in its text form. */
static char *
uuid_text(const pg_uuid_t *id)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(id)));
}

/* Reads the messages that the task has written. */
static int
load(const ChatReplayTask *task, Message **messages)
{
	Datum		values[2] = {UUIDPGetDatum(&task->session),
	UUIDPGetDatum(&task->id)};
	MemoryContext context = CurrentMemoryContext;
	int			n = (int) chat_db_exec(&load_messages, values, NULL);

	/* SPI leaves us in its own */
	MemoryContextSwitchTo(context);
	*messages = palloc0(sizeof(Message) * Max(n, 1));
	for (int i = 0; i < n; i++)
	{
		Message    *m = &(*messages)[i];
		bool		isnull;

		m->id = chat_db_uuid(i, 1);
		m->is_tool = strcmp(chat_db_text(i, 2), "tool") == 0;
		m->content = chat_db_text(i, 3);
		m->refusal = chat_db_text(i, 4);
		m->tool_calls = chat_db_text(i, 5);
		m->tool_call_id = chat_db_text(i, 6);
		m->reasoning = chat_db_text(i, 7);
		m->usage = chat_db_text(i, 8);
		m->model = chat_db_text(i, 9);
		m->finish_reason = chat_db_text(i, 10);
		m->interrupted = chat_db_bool(i, 11);
		m->pending = chat_db_bool(i, 12);
		m->at = DatumGetTimestampTz(chat_db_datum(i, 13, &isnull));
	}
	return n;
}

/* Adds a step: one assistant message and the tool messages behind it. */
static void
add_step(Replay *r, const Message *m, int nresults)
{
	r->at = m->at;
	add_plain(r, "start-step");
	add_block(r, "reasoning", m->reasoning);
	add_block(r, "text", m->content);
	add_block(r, "text", m->refusal);
	if (m->tool_calls)
		add_tools(r, m, m + 1, nresults);
	if (!m->interrupted)
		add_plain(r, "finish-step");
}

/* Adds what is known of the last message: usage, model, finish reason. */
static void
add_metadata(Replay *r, const Message *m)
{
	const char *usage = m ? m->usage : r->task->usage;

	if (usage == NULL)
		return;
	begin(r, "message-metadata");
	appendStringInfo(&r->json, ",\"messageMetadata\":{\"usage\":%s", usage);
	if (m)
	{
		put_text(r, "model", m->model);
		put_text(r, "finishReason", m->finish_reason);
	}
	appendStringInfoChar(&r->json, '}');
	finish(r);
}

/* Adds the event of an error. */
static void
add_error(Replay *r)
{
	const char *json = r->task->error ? r->task->error : "";
	ChatStr		error = {json, strlen(json)};
	char	   *message = decode(chat_fold_member(error, "message"));

	begin(r, "error");
	put_text(r, "errorText", message ? message : "the task has failed");
	put_text(r, "code", decode(chat_fold_member(error, "code")));
	finish(r);
}

/* Adds the end of a task that has ended. */
static void
add_end(Replay *r, const Message *last)
{
	const char *reason = "error";

	r->at = r->task->at;
	if (strcmp(r->task->status, "cancelled") == 0)
	{
		add_metadata(r, last);
		add_plain(r, "abort");
		return;
	}
	if (strcmp(r->task->status, "failed") == 0)
		add_error(r);
	else if (strcmp(r->task->status, "completed") != 0)
		return;
	else if (last && last->finish_reason)
		reason = chat_openai.finish_reason((ChatStr) {last->finish_reason,
		strlen(last->finish_reason)});
	else
		reason = chat_openai.finish_reason((ChatStr) {NULL, 0});
	add_metadata(r, last);
	begin(r, "finish");
	put_text(r, "finishReason", reason);
	finish(r);
}

/*
 * Adds the events of a task, numbered from CHAT_REPLAY_SEQ + 1 on; rows and
 * texts are allocated in the current context.
 */
void
chat_replay_task(const ChatReplayTask *task, ChatEventRows *out)
{
	Replay		r = {0};
	Message    *messages;
	Message    *last = NULL;
	bool		waits = false;
	int			n = load(task, &messages);

	memset(out, 0, sizeof(*out));
	r.task = task;
	r.out = out;
	r.at = task->at;
	r.task_text = uuid_text(&task->id);
	initStringInfo(&r.json);
	for (int i = 0; i < n && last == NULL; i++)
		if (!messages[i].is_tool)
			last = &messages[i];
	begin(&r, "start");
	put_text(&r, "messageId", uuid_text(last ? &last->id : &task->answer));
	finish(&r);
	for (int i = 0; i < n; i++)
	{
		int			first = i + 1;

		if (messages[i].is_tool)
			continue;
		last = &messages[i];
		while (i + 1 < n && messages[i + 1].is_tool)
			waits |= messages[++i].pending;
		/* what follows is going to change: it is not yet told */
		if (waits && !task->ended)
			break;
		add_step(&r, last, i + 1 - first);
	}
	/* a step that was begun and left nothing */
	if (last == NULL && task->started)
		add_plain(&r, "start-step");
	add_end(&r, last);
	pfree(r.json.data);
}
