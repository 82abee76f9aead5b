/*
 * export.c
 *		Stored messages as the AI SDK's UIMessages.
 *
 * Owns nothing; everything is in the caller's memory context.  The steps of
 * one turn, and the results of its tools, are one message there.  What it is
 * made of is what the events of the turn would have built.
 */
#include "postgres.h"

#include "fmgr.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/jsonb.h"

#include "compat.h"
#include "db.h"

#define EMPTY_PART "{\"type\":\"text\",\"text\":\"\"}"

PG_FUNCTION_INFO_V1(chat_to_ui_messages);

CHAT_STMT(find_session,
		  "SELECT true FROM chat.chat_session AS s WHERE" CHAT_VISIBLE,
		  CHAT_VISIBLE_TYPES);

CHAT_STMT(load_messages,
		  "SELECT m.id::text, m.role, m.content, m.tool_call_id, m.refusal,"
		  " m.name, m.task_id::text,"
		  " to_json(m.created_at)::text, m.sequence, m.parts, m.tool_calls,"
		  " m.function_call, m.metadata,"
		  " COALESCE(c.operation_id::text, m.metadata ->> 'operation_id'),"
		  " COALESCE(m.metadata @> '{\"pending\": true}', false),"
		  " COALESCE(c.status = 'approval', false)"
		  " FROM chat.chat_message AS m"
		  " LEFT JOIN (SELECT o.* FROM chat.chat_tool_call AS o"
		  "  WHERE o.task_id = ANY (ARRAY(" CHAT_OPEN_TASK("$1", "b.id") "))"
		  "   AND o.ended_at IS NULL OFFSET 0) AS c"
		  " ON c.sequence = m.sequence"
		  " WHERE m.session_id = $1 AND m.active ORDER BY m.sequence",
		  UUIDOID);

/* A stored message; NULL = not there. */
typedef struct Row
{
	char	   *id;
	char	   *role;
	char	   *content;
	char	   *tool_call_id;
	char	   *refusal;
	char	   *name;
	char	   *task;
	char	   *created_at;		/* JSON */
	int64		sequence;
	JsonbContainer *parts;
	JsonbContainer *tool_calls;
	JsonbContainer *function_call;
	JsonbContainer *metadata;
	char	   *operation;		/* of a tool's message: its operation, ... */
	bool		pending;		/* ... whether that goes on ... */
	bool		approval;		/* ... or waits for an approval */
} Row;

/* ---------- JSON ---------- */

/* Appends what stands between members or elements. */
static void
separate(StringInfo out)
{
	char		last = out->data[out->len - 1];

	if (last != '{' && last != '[' && last != ':')
		appendStringInfoChar(out, ',');
}

/* Appends a member's name. */
static void
put_key(StringInfo out, const char *name)
{
	separate(out);
	escape_json(out, name);
	appendStringInfoChar(out, ':');
}

/* Appends a member that is a string. */
static void
put_string(StringInfo out, const char *name, const char *value)
{
	put_key(out, name);
	escape_json(out, value);
}

/* Appends a value. */
static void
put_value(StringInfo out, JsonbValue *value)
{
	Jsonb	   *json = JsonbValueToJsonb(value);

	(void) JsonbToCString(out, &json->root, VARSIZE(json));
}

/* Opens a part of a type, which may be made of two pieces. */
static void
open_part(StringInfo out, const char *type, const char *more)
{
	separate(out);
	appendStringInfoChar(out, '{');
	put_string(out, "type", psprintf("%s%s", type, more));
}

/* Returns a member that is a string, NULL if there is none. */
static char *
string_of(JsonbContainer *object, const char *name)
{
	JsonbValue	v;

	if (object == NULL || !JsonContainerIsObject(object) ||
		getKeyJsonValueFromContainer(object, name, (int) strlen(name),
									 &v) == NULL ||
		v.type != jbvString)
		return NULL;
	return pnstrdup(v.val.string.val, v.val.string.len);
}

/* Returns a member that is an object, NULL if there is none. */
static JsonbContainer *
object_of(JsonbContainer *object, const char *name)
{
	JsonbValue	v;

	if (object == NULL || !JsonContainerIsObject(object) ||
		getKeyJsonValueFromContainer(object, name, (int) strlen(name),
									 &v) == NULL ||
		v.type != jbvBinary || !JsonContainerIsObject(v.val.binary.data))
		return NULL;
	return v.val.binary.data;
}

/* Appends a member whose value is a text that is JSON, or else a string. */
static void
put_json(StringInfo out, const char *name, const char *text)
{
	Jsonb	   *json = chat_db_parse_json(text);

	if (json == NULL)
	{
		put_string(out, name, text);
		return;
	}
	put_key(out, name);
	(void) JsonbToCString(out, &json->root, VARSIZE(json));
}

/* ---------- parts ---------- */

/* Appends a part of type text or reasoning; one that a model wrote is done. */
static void
put_words(StringInfo out, const char *type, const char *text, bool done)
{
	if (text == NULL || text[0] == '\0')
		return;
	open_part(out, type, "");
	put_string(out, "text", text);
	if (done)
		put_string(out, "state", "done");
	appendStringInfoChar(out, '}');
}

/* Appends a file part: its media type as a data URL tells, or a guess. */
static void
put_file(StringInfo out, const char *url, const char *guess,
		 const char *filename)
{
	const char *type = guess;

	if (strncmp(url, "data:", 5) == 0)
	{
		int			len = (int) strcspn(url + 5, ";,");

		if (len > 0)
			type = pnstrdup(url + 5, len);
	}
	open_part(out, "file", "");
	put_string(out, "mediaType", type);
	if (filename)
		put_string(out, "filename", filename);
	put_string(out, "url", url);
	appendStringInfoChar(out, '}');
}

/* Appends a part of a content; one without a counterpart goes as data. */
static void
put_content_part(StringInfo out, JsonbValue *part, bool done)
{
	JsonbContainer *object = part->type == jbvBinary ?
		part->val.binary.data : NULL;
	char	   *type = string_of(object, "type");
	char	   *url = string_of(object_of(object, "image_url"), "url");
	char	   *audio = string_of(object_of(object, "input_audio"), "data");
	JsonbContainer *file = object_of(object, "file");

	if (type && strcmp(type, "text") == 0)
		put_words(out, "text", string_of(object, "text"), done);
	else if (type && strcmp(type, "refusal") == 0)
		put_words(out, "text", string_of(object, "refusal"), done);
	else if (url)
		put_file(out, url, "image/*", NULL);
	else if (audio)
	{
		char	   *format = string_of(object_of(object, "input_audio"),
									   "format");

		put_file(out, psprintf("data:audio/%s;base64,%s",
							   format ? format : "*", audio), "audio/*", NULL);
	}
	else if (string_of(file, "file_data"))
		put_file(out, string_of(file, "file_data"),
				 "application/octet-stream", string_of(file, "filename"));
	else
	{
		open_part(out, "data-part", "");
		put_key(out, "data");
		put_value(out, part);
		appendStringInfoChar(out, '}');
	}
}

/* Appends the parts of a message's content. */
static void
put_content(StringInfo out, const Row *row, bool done)
{
	JsonbIterator *it;
	JsonbValue	v;

	if (row->parts == NULL || JsonContainerSize(row->parts) == 0)
	{
		put_words(out, "text", row->content, done);
		return;
	}
	it = JsonbIteratorInit(row->parts);
	(void) JsonbIteratorNext(&it, &v, true);
	while (JsonbIteratorNext(&it, &v, true) == WJB_ELEM)
		put_content_part(out, &v, done);
}

/* Appends the approval that a call waits for, or was denied. */
static void
put_approval(StringInfo out, const Row *result, const char *state)
{
	put_string(out, "state", state);
	put_key(out, "approval");
	appendStringInfoChar(out, '{');
	put_string(out, "id", result->operation);
	if (strcmp(state, "output-denied") == 0)
	{
		put_key(out, "approved");
		appendStringInfoString(out, "false");
	}
	appendStringInfoChar(out, '}');
}

/* Appends what a tool returned, or why it did not. */
static void
put_result(StringInfo out, const Row *result)
{
	const char *text = result->content ? result->content : "";
	Jsonb	   *json = text[0] == '{' ? chat_db_parse_json(text) : NULL;
	char	   *type = json ? string_of(&json->root, "type") : NULL;
	char	   *code = json ? string_of(&json->root, "code") : NULL;

	if (type == NULL || strcmp(type, "error") != 0)
	{
		put_string(out, "state", "output-available");
		put_json(out, "output", text);
		if (type && strcmp(type, "operation_pending") == 0)
		{
			put_key(out, "preliminary");
			appendStringInfoString(out, "true");
		}
	}
	else if (code && strcmp(code, "denied") == 0 && result->operation)
		put_approval(out, result, "output-denied");
	else
	{
		char	   *message = string_of(&json->root, "message");

		put_string(out, "state", "output-error");
		put_string(out, "errorText", message ? message : text);
	}
}

/* Whether a call has a result by now. */
static bool
has_result(const Row *result)
{
	return result != NULL &&
		!(result->pending && (result->content == NULL || !*result->content));
}

/* Appends a tool part. */
static void
put_tool(StringInfo out, const char *name, const char *id,
		 const char *arguments, const Row *result)
{
	if (arguments == NULL || arguments[0] == '\0')
		arguments = "{}";
	open_part(out, "tool-", name);
	put_string(out, "toolCallId", id);
	put_json(out, "input", arguments);
	if (has_result(result))
		put_result(out, result);
	else if (result && result->approval && result->operation)
		put_approval(out, result, "approval-requested");
	else if (chat_db_parse_json(arguments) != NULL)
		put_string(out, "state", "input-available");
	else
	{
		put_string(out, "state", "output-error");
		put_string(out, "errorText", "the arguments are not JSON");
	}
	appendStringInfoChar(out, '}');
}

/* Finds the result of a call among the messages that follow it. */
static const Row *
find_result(const Row *rows, int n, const char *role, const char *id)
{
	for (int i = 0; i < n; i++)
	{
		const char *of = strcmp(role, "tool") == 0 ?
			rows[i].tool_call_id : rows[i].name;

		if (strcmp(rows[i].role, role) == 0 && of && strcmp(of, id) == 0)
			return &rows[i];
	}
	return NULL;
}

/* Appends the tool parts of one step; rows[0] is the assistant's message. */
static void
put_tools(StringInfo out, const Row *rows, int n)
{
	JsonbIterator *it;
	JsonbValue	v;
	char	   *name;

	if (rows->tool_calls)
	{
		it = JsonbIteratorInit(rows->tool_calls);
		(void) JsonbIteratorNext(&it, &v, true);
		for (int i = 0; JsonbIteratorNext(&it, &v, true) == WJB_ELEM; i++)
		{
			JsonbContainer *call = v.type == jbvBinary ?
				v.val.binary.data : NULL;
			JsonbContainer *function = object_of(call, "function");
			char	   *id = string_of(call, "id");

			name = string_of(function, "name");
			if (name)
				put_tool(out, name, id ? id : psprintf("%s-%d", rows->id, i),
						 string_of(function, "arguments"),
						 id ? find_result(rows + 1, n - 1, "tool", id) : NULL);
		}
	}
	name = string_of(rows->function_call, "name");
	if (name)
		put_tool(out, name, rows->id,
				 string_of(rows->function_call, "arguments"),
				 find_result(rows + 1, n - 1, "function", name));
}

/* ---------- messages ---------- */

/* Appends the metadata: what is stored, less what became a part. */
static void
put_metadata(StringInfo out, const Row *first, const Row *last)
{
	JsonbIterator *it = JsonbIteratorInit(last->metadata);
	JsonbIteratorToken token;
	JsonbValue	v;
	char	   *name = NULL;

	put_key(out, "metadata");
	appendStringInfoChar(out, '{');
	put_key(out, "createdAt");
	appendStringInfoString(out, first->created_at);
	put_key(out, "sequence");
	appendStringInfo(out, INT64_FORMAT, first->sequence);
	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
			name = pnstrdup(v.val.string.val, v.val.string.len);
		if (token != WJB_VALUE || strncmp(name, "reasoning", 9) == 0 ||
			strcmp(name, "createdAt") == 0 || strcmp(name, "sequence") == 0)
			continue;
		if (strcmp(name, "finish_reason") == 0)
			name = "finishReason";
		put_key(out, name);
		put_value(out, &v);
	}
	appendStringInfoChar(out, '}');
}

/* Opens a message. */
static void
open_message(StringInfo out, const char *id, const char *role)
{
	separate(out);
	appendStringInfoChar(out, '{');
	put_string(out, "id", id);
	put_string(out, "role", role);
	put_key(out, "parts");
	appendStringInfoChar(out, '[');
}

/* Closes a message that was made of these rows. */
static void
close_message(StringInfo out, const Row *first, const Row *last)
{
	appendStringInfoChar(out, ']');
	put_metadata(out, first, last);
	appendStringInfoChar(out, '}');
}

/* Whether a message has the role of a result. */
static bool
is_result(const Row *row)
{
	return strcmp(row->role, "tool") == 0 ||
		strcmp(row->role, "function") == 0;
}

/* Whether a message goes on with the turn of the one before it. */
static bool
continues(const Row *row)
{
	if (is_result(row))
		return true;
	if (strcmp(row->role, "assistant") != 0)
		return false;
	if (row->task && row[-1].task)
		return strcmp(row->task, row[-1].task) == 0;
	return is_result(&row[-1]);
}

/*
 * Appends one assistant message; returns how many rows it was made of.  Its
 * id is that of the first step, as in the events.
 */
static int
put_turn(StringInfo out, const Row *rows, int left)
{
	const Row  *last = rows;
	int			n = 1;

	while (n < left && continues(&rows[n]))
		n++;
	open_message(out, rows->id, "assistant");
	for (int i = 0; i < n; i++)
	{
		if (is_result(&rows[i]))
			continue;
		last = &rows[i];
		open_part(out, "step-start", "");
		appendStringInfoChar(out, '}');
		put_words(out, "reasoning", string_of(last->metadata, "reasoning"),
				 true);
		put_content(out, last, true);
		put_words(out, "text", last->refusal, true);
		put_tools(out, last, n - i);
	}
	close_message(out, rows, last);
	return n;
}

/* Appends all messages as an array. */
static void
put_messages(StringInfo out, const Row *rows, int n)
{
	appendStringInfoChar(out, '[');
	for (int i = 0; i < n;)
	{
		if (strcmp(rows[i].role, "assistant") == 0)
		{
			i += put_turn(out, &rows[i], n - i);
			continue;
		}
		/* a result without its call has no place there */
		if (!is_result(&rows[i]))
		{
			open_message(out, rows[i].id, strcmp(rows[i].role, "user") == 0
						 ? "user" : "system");
			put_content(out, &rows[i], false);
			/* a message without parts is none */
			if (out->data[out->len - 1] == '[')
				appendStringInfoString(out, EMPTY_PART);
			close_message(out, &rows[i], &rows[i]);
		}
		i++;
	}
	appendStringInfoChar(out, ']');
}

/* Returns a column of type jsonb, NULL if it is NULL. */
static JsonbContainer *
container(uint64 row, int column)
{
	bool		isnull;
	Datum		d = chat_db_datum(row, column, &isnull);

	return isnull ? NULL : &DatumGetJsonbP(d)->root;
}

/* Reads the rows of the last statement. */
static Row *
read_rows(uint64 n)
{
	Row		   *rows = palloc_extended(sizeof(Row) * Max(n, 1),
									   MCXT_ALLOC_HUGE);

	for (uint64 i = 0; i < n; i++)
	{
		char	  **texts[] = {
			&rows[i].id, &rows[i].role, &rows[i].content,
			&rows[i].tool_call_id, &rows[i].refusal, &rows[i].name,
			&rows[i].task, &rows[i].created_at
		};

		for (int t = 0; t < (int) lengthof(texts); t++)
			*texts[t] = chat_db_text(i, t + 1);
		rows[i].sequence = chat_db_int64(i, 9, 0);
		rows[i].parts = container(i, 10);
		rows[i].tool_calls = container(i, 11);
		rows[i].function_call = container(i, 12);
		rows[i].metadata = container(i, 13);
		rows[i].operation = chat_db_text(i, 14);
		rows[i].pending = chat_db_bool(i, 15);
		rows[i].approval = chat_db_bool(i, 16);
	}
	return rows;
}

/* to_ui_messages: returns the array, NULL if there is no such session. */
Datum
chat_to_ui_messages(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Datum		values[3];
	StringInfoData out;
	uint64		n;
	Datum		result;

	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	chat_db_enter(&scope);
	values[0] = PG_GETARG_DATUM(0);
	chat_db_caller(&scope, values);
	if (chat_db_exec(&find_session, values, NULL) == 0)
	{
		chat_db_leave(&scope);
		PG_RETURN_NULL();
	}
	n = chat_db_exec(&load_messages, values, NULL);
	initStringInfo(&out);
	put_messages(&out, read_rows(n), (int) n);
	result = DirectFunctionCall1(jsonb_in, CStringGetDatum(out.data));
	result = SPI_datumTransfer(result, false, -1);
	chat_db_leave(&scope);
	return result;
}
