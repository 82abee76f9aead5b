/*
 * context.c
 *		Conversation to request: the stored messages as the provider takes
 *		them.
 *
 * Owns nothing: everything is in the caller's memory context.
 *
 * A history can hold tool calls without results and results without calls (a
 * crash, a branch, a window that cuts between them).  The API refuses such a
 * request, and would refuse every later one (T51): so each request is built
 * from a repaired copy, always the same one for the same history.
 */
#include "postgres.h"

#include <math.h>

#include "access/detoast.h"
#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "utils/array.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"

#include "context.h"
#include "db.h"
#include "jsonbuf.h"
#include "provider.h"

/* longest id of a call that every endpoint takes */
#define MAX_CALL_ID 40

#define NO_RESULT "no result: the call was interrupted before it ended"

/* columns in the results of our statements */
#define CONTEXT_CONTENT 4
#define CONTEXT_METADATA 11
/* a claim reads so many times the largest request, and one more */
#define CLAIM_SIZE 2
/* among so many messages the last request that was counted is looked for */
#define RECENT 16

static int	max_context_messages = 50;
static int	max_request_size = 32 * 1024;	/* kB */

/* A row of a result, to be put in order. */
typedef struct SequencedRow
{
	int64		sequence;
	uint64		row;
} SequencedRow;

/* $1 sessions, $2 how many messages of each, $3 behind which sequence */
CHAT_STMT(load_messages,
		  "SELECT w.n::int," CHAT_CONTEXT_COLUMNS
		  " FROM unnest($1, $2, $3) WITH ORDINALITY AS w (id, most, after, n),"
		  " LATERAL (SELECT * FROM chat.chat_message AS c"
		  "  WHERE c.session_id = w.id AND c.active AND c.sequence > w.after"
		  "  ORDER BY c.sequence DESC LIMIT w.most) AS m",
		  UUIDARRAYOID, INT8ARRAYOID, INT8ARRAYOID);

/* $1 task, $2 step: how its calls ended, the result as the model is shown it */
CHAT_STMT(last_results,
		  "SELECT c.operation_id, c.name, c.status, m.content"
		  " FROM chat.chat_tool_call AS c JOIN chat.chat_message AS m"
		  "  ON m.session_id = c.session_id AND m.sequence = c.sequence"
		  " WHERE c.task_id = $1 AND c.step = $2 ORDER BY c.position",
		  UUIDOID, INT4OID);

/*
 * $1 session, $2 sequence: the messages from the step boundary at or before
 * it on, and the newest message of the user.  Two scans, as one with OR would
 * be of the whole session.
 */
CHAT_STMT(load_step,
		  "WITH w AS MATERIALIZED ("
		  " SELECT COALESCE((SELECT max(b.sequence)"
		  "   FROM chat.chat_message AS b"
		  "   WHERE b.session_id = $1 AND b.active AND b.sequence <= $2"
		  "    AND b.role NOT IN ('tool', 'function')), $2) AS step,"
		  "  (SELECT max(u.sequence) FROM chat.chat_message AS u"
		  "   WHERE u.session_id = $1 AND u.active AND u.role = 'user')"
		  "   AS question)"
		  " SELECT 1," CHAT_CONTEXT_COLUMNS
		  " FROM w CROSS JOIN chat.chat_message AS m"
		  " WHERE m.session_id = $1 AND m.active AND m.sequence >= w.step"
		  " UNION ALL SELECT 1," CHAT_CONTEXT_COLUMNS
		  " FROM w CROSS JOIN chat.chat_message AS m"
		  " WHERE m.session_id = $1 AND m.active"
		  "  AND m.sequence = w.question AND w.question < w.step",
		  UUIDOID, INT8OID);

/* Declares the settings of contexts. */
void
chat_context_init(void)
{
	DefineCustomIntVariable("chat.max_context_messages",
							"Most messages that a request carries.",
							NULL, &max_context_messages, 50, 1, 100000,
							PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("chat.max_request_size",
							"Largest size of the messages of a request.",
							NULL, &max_request_size, 32 * 1024, 64, 256 * 1024,
							PGC_SIGHUP, GUC_UNIT_KB, NULL, NULL, NULL);
}

/* Returns a text datum as a piece of text, where it lies; absent when NULL. */
static ChatStr
piece(Datum value, bool isnull)
{
	ChatStr		str = {NULL, 0};

	if (!isnull)
	{
		text	   *t = DatumGetTextPP(value);

		str.data = VARDATA_ANY(t);
		str.len = VARSIZE_ANY_EXHDR(t);
	}
	return str;
}

/* Returns a jsonb datum as JSON text; absent when NULL. */
static ChatStr
json_text(Datum value, bool isnull)
{
	ChatStr		str = {NULL, 0};

	if (!isnull)
	{
		Jsonb	   *json = DatumGetJsonbP(value);

		str.data = JsonbToCString(NULL, &json->root, VARSIZE(json));
		str.len = strlen(str.data);
	}
	return str;
}

/* Returns a member of an object, of a given kind, as JSON text. */
static ChatStr
json_piece(JsonbContainer *object, const char *name, bool array)
{
	JsonbValue	v;
	ChatStr		str = {NULL, 0};

	if (getKeyJsonValueFromContainer(object, name, (int) strlen(name),
									 &v) == NULL ||
		v.type != jbvBinary ||
		(array ? !JsonContainerIsArray(v.val.binary.data)
		 : !JsonContainerIsObject(v.val.binary.data)))
		return str;
	str.data = JsonbToCString(NULL, v.val.binary.data, v.val.binary.len);
	str.len = strlen(str.data);
	return str;
}

/* Reads what a message's metadata mean for a request. */
static void
read_metadata(ChatMessage *message, JsonbContainer *metadata,
			  const char *server)
{
	JsonbValue	v;

	message->foreign = server != NULL;
	if (JsonContainerSize(metadata) == 0)
		return;
	message->reasoning_details = json_piece(metadata, "reasoning_details", true);
	message->context = json_piece(metadata, "context", false);
	message->interrupted =
		getKeyJsonValueFromContainer(metadata, "interrupted", 11, &v) &&
		v.type == jbvBool && v.val.boolean;
	/* what is opaque goes back only to the server it came from */
	if (server && getKeyJsonValueFromContainer(metadata, "server", 6, &v) &&
		v.type == jbvString)
		message->foreign = strlen(server) != (size_t) v.val.string.len ||
			memcmp(server, v.val.string.val, v.val.string.len) != 0;
}

/* Reads one stored message; its texts live as long as the row. */
void
chat_context_row(ChatMessage *message, uint64 row, int first,
				 const char *server)
{
	TupleDesc	desc = SPI_tuptable->tupdesc;
	Datum	   *values = palloc(sizeof(Datum) * desc->natts);
	bool	   *nulls = palloc(sizeof(bool) * desc->natts);
	ChatStr    *const fields[] = {
		&message->role, &message->content, &message->name,
		&message->tool_call_id, &message->refusal
	};
	ChatStr    *const json[] = {
		&message->parts, &message->tool_calls, &message->function_call
	};

	memset(message, 0, sizeof(*message));
	/* one pass over the tuple instead of one for each column */
	heap_deform_tuple(SPI_tuptable->vals[row], desc, values, nulls);
	message->sequence = DatumGetInt64(values[first - 1]);
	for (int i = 0; i < (int) lengthof(fields); i++)
		*fields[i] = piece(values[first + i], nulls[first + i]);
	for (int i = 0; i < (int) lengthof(json); i++)
		*json[i] = json_text(values[first + 5 + i], nulls[first + 5 + i]);
	read_metadata(message, &DatumGetJsonbP(values[first + 8])->root, server);
	pfree(values);
	pfree(nulls);
}

/* Returns a C string as a piece of text; absent when NULL. */
static ChatStr
str(const char *text)
{
	ChatStr		s = {text, text ? strlen(text) : 0};

	return s;
}

/* Returns a JSON value as text: strings bare, anything else as JSON. */
static char *
value_text(JsonbValue *v)
{
	switch (v->type)
	{
		case jbvString:
			return pnstrdup(v->val.string.val, v->val.string.len);
		case jbvNumeric:
			return DatumGetCString(DirectFunctionCall1(numeric_out,
													   NumericGetDatum(v->val.numeric)));
		case jbvBool:
			return pstrdup(v->val.boolean ? "true" : "false");
		case jbvBinary:
			return JsonbToCString(NULL, v->val.binary.data, v->val.binary.len);
		default:
			return NULL;
	}
}

/* Returns a member of an object as value_text() does, NULL if absent. */
static char *
member(JsonbContainer *object, const char *name)
{
	JsonbValue	v;

	if (object == NULL || !JsonContainerIsObject(object) ||
		getKeyJsonValueFromContainer(object, name, (int) strlen(name),
									 &v) == NULL)
		return NULL;
	return value_text(&v);
}

/* Returns a member of an object as JSON text, NULL if absent. */
static char *
json_member(JsonbContainer *object, const char *name)
{
	JsonbValue	v;
	Jsonb	   *value;

	if (getKeyJsonValueFromContainer(object, name, (int) strlen(name),
									 &v) == NULL)
		return NULL;
	value = JsonbValueToJsonb(&v);
	return JsonbToCString(NULL, &value->root, VARSIZE(value));
}

/* Parses a JSON text that came out of the database. */
static Jsonb *
parse(const char *text)
{
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
											  CStringGetDatum(text)));
}

/* Returns a member of a JSON object as text, NULL if it has none. */
char *
chat_context_member(const char *object, const char *name)
{
	return member(&parse(object)->root, name);
}

/* Returns a setting of a job's session as text, NULL if it has none. */
char *
chat_context_setting(const ChatJob *job, const char *name)
{
	return chat_context_member(job->settings, name);
}

/* Returns how many messages a job's session wants in its requests. */
static int64
wanted_messages(const ChatJob *job)
{
	char	   *text = member(&parse(job->settings)->root,
							  "max_context_messages");

	return text ? Min(strtol(text, NULL, 10), max_context_messages)
		: max_context_messages;
}

/* True if a message's role is the given one. */
static bool
has_role(const ChatMessage *m, const char *role)
{
	return m->role.len == strlen(role) &&
		memcmp(m->role.data, role, m->role.len) == 0;
}

/* Orders messages by their sequence, which stands before each. */
static int
compare_sequence(const void *a, const void *b)
{
	int64		x = ((const SequencedRow *) a)->sequence;
	int64		y = ((const SequencedRow *) b)->sequence;

	return x < y ? -1 : x > y;
}

/* Returns a number that is a member of an object, 0 if there is none. */
static int64
number(JsonbContainer *object, const char *name)
{
	char	   *text = member(object, name);

	return text ? strtoll(text, NULL, 10) : 0;
}

/*
 * Looks among the newest answers for the last request that the endpoint has
 * counted.
 */
static void
find_count(ChatContext *c, const SequencedRow *rows)
{
	for (int i = c->n - 1; i >= 0 && i >= c->n - RECENT; i--)
	{
		JsonbContainer *metadata;
		char	   *usage;
		bool		isnull;

		if (!has_role(&c->messages[i], "assistant") ||
			c->messages[i].foreign)
			continue;
		metadata = &DatumGetJsonbP(chat_db_datum(rows[i].row, CONTEXT_METADATA,
												 &isnull))->root;
		c->estimated = number(metadata, "prompt_estimate");
		usage = c->estimated > 0 ? json_member(metadata, "usage") : NULL;
		if (usage == NULL)
			continue;
		metadata = &parse(usage)->root;
		if (member(metadata, "estimated") == NULL)
			c->counted = number(metadata, "prompt_tokens");
		if (c->counted > 0)
			return;
	}
}

/* True if a message belongs to the step that one before it began. */
static bool
is_result(const ChatMessage *m)
{
	return has_role(m, "tool") || has_role(m, "function");
}

/* Returns where the next step begins, behind a message. */
static int
next_step(const ChatContext *c, int at)
{
	do
		at++;
	while (at < c->n && is_result(&c->messages[at]));
	return at;
}

/* Leaves out the messages before one: the array is not one to grow then. */
static void
skip_steps(ChatContext *c, int first)
{
	c->messages += first;
	c->n -= first;
	c->cut = true;
}

/* Leaves out all but the last step. */
static void
skip_to_last_step(ChatContext *c)
{
	while (next_step(c, 0) < c->n)
		skip_steps(c, next_step(c, 0));
}

/* True if there is a message of the user from one on. */
static bool
has_question(const ChatContext *c, int from)
{
	for (int i = from; i < c->n; i++)
		if (has_role(&c->messages[i], "user"))
			return true;
	return false;
}

/* Returns the size of a stored message, without reading what is out of line. */
static Size
row_size(uint64 row)
{
	Datum		values[CONTEXT_METADATA];
	bool		nulls[CONTEXT_METADATA];
	Size		size = 0;

	Assert(SPI_tuptable->tupdesc->natts == CONTEXT_METADATA);
	heap_deform_tuple(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, values,
					  nulls);
	for (int i = CONTEXT_CONTENT - 1; i < CONTEXT_METADATA; i++)
		if (!nulls[i])
			size += toast_raw_datum_size(values[i]);
	return size;
}

/*
 * Reads n messages of the last result, from a row on, and puts them in order:
 * the statement brings them as its index scan does.  Of what is larger than a
 * request may be it leaves the newest steps.
 */
static void
read_messages(ChatContext *c, uint64 row, int n, const char *server)
{
	SequencedRow *rows = palloc(sizeof(SequencedRow) * Max(n, 1));
	Size		most = (Size) chat_context_most();
	Size		size = 0;
	int			first = n;

	for (int i = 0; i < n; i++)
	{
		rows[i].row = row + i;
		rows[i].sequence = chat_db_int64(row + i, 2, 0);
	}
	qsort(rows, n, sizeof(SequencedRow), compare_sequence);
	for (; first > 0; first--)
	{
		Size		more = row_size(rows[first - 1].row);

		if (size + more > most)
			break;
		size += more;
	}
	c->size = size;
	c->n = n - first;
	c->messages = palloc(sizeof(ChatMessage) * Max(c->n, 1));
	for (int i = 0; i < c->n; i++)
		chat_context_row(&c->messages[i], rows[first + i].row, 2, server);
	find_count(c, rows + first);
	c->large = first > 0;
	if (c->large)
		skip_steps(c, c->n > 0 && is_result(&c->messages[0])
				   ? next_step(c, 0) : 0);
	c->too_large = c->large && c->n == 0;
}

/*
 * Leaves of a context that has more messages the newest most, or fewer: whole
 * steps.  The newest message of the user and the last step always stay; true
 * if they have to be read, from the first message that is left on.
 */
static bool
shrink(ChatContext *c, int64 most)
{
	int			first = (int) (c->n - most);
	bool		found;

	if (is_result(&c->messages[first]))
		first = next_step(c, first);
	found = has_question(c, first);
	/* it needs room, too */
	if (!found && c->n - first >= most && next_step(c, first) < c->n)
		first = next_step(c, first);
	/* of the last step not even the beginning was read */
	if (first == c->n)
		first = (int) (c->n - most);
	skip_steps(c, first);
	return !found;
}

/* Returns how many bytes the messages of a request may have. */
int64
chat_context_most(void)
{
	return (int64) max_request_size * 1024;
}

/*
 * Leaves of a context what belongs into a request, as far as it was read;
 * false if the message of the user has to be read with the steps that are
 * left.
 */
static bool
limit(ChatContext *c, int64 most, bool summarized)
{
	if (!c->large && c->n > most)
		return !shrink(c, most);
	/* a summary may reach beyond the message of the user */
	if (!c->large)
		return !summarized || c->n == 0 || has_question(c, 0);
	if (c->too_large || has_question(c, 0))
		return true;
	/* there is room for it beside the last step, or for none */
	skip_to_last_step(c);
	return false;
}

/*
 * Reads the messages from the step on that a context now begins with, and the
 * newest one of the user.
 */
static void
read_step(ChatContext *c, const ChatJob *job)
{
	Datum		params[2] = {UUIDPGetDatum(&job->session),
	Int64GetDatum(c->messages[0].sequence)};
	uint64		rows = chat_db_exec(&load_step, params, NULL);

	if (rows > 0)
		read_messages(c, 0, (int) rows, job->server);
}

/* Reads the messages of a claim's sessions. */
void
chat_context_load(const ChatJob *jobs, int n, ChatContext *contexts)
{
	Datum	   *ids = palloc(sizeof(Datum) * n);
	Datum	   *most = palloc(sizeof(Datum) * n);
	Datum	   *after = palloc(sizeof(Datum) * n);
	Datum		params[3];
	int		   *counts = palloc0(sizeof(int) * n);
	Size		size = 0;
	uint64		rows;

	for (int i = 0; i < n; i++)
	{
		ids[i] = UUIDPGetDatum(&jobs[i].session);
		/* one more shows that there are more */
		most[i] = Int64GetDatum(wanted_messages(&jobs[i]) + 1);
		after[i] = Int64GetDatum(jobs[i].summary_sequence);
	}
	params[0] = chat_db_array(&chat_uuids, ids, n);
	params[1] = chat_db_array(&chat_int8s, most, n);
	params[2] = chat_db_array(&chat_int8s, after, n);
	rows = chat_db_exec(&load_messages, params, NULL);
	memset(contexts, 0, sizeof(ChatContext) * n);
	for (uint64 row = 0; row < rows; row++)
		counts[chat_db_int32(row, 1, 0) - 1]++;
	for (uint64 row = 0; row < rows;)
	{
		int			i = chat_db_int32(row, 1, 0) - 1;

		contexts[i].later = size > CLAIM_SIZE * (Size) chat_context_most();
		if (!contexts[i].later)
			read_messages(&contexts[i], row, counts[i], jobs[i].server);
		size += contexts[i].size;
		row += counts[i];
	}
	for (int i = 0; i < n; i++)
	{
		ChatContext *c = &contexts[i];

		if (limit(c, DatumGetInt64(most[i]) - 1,
				  jobs[i].summary_sequence > 0))
			continue;
		read_step(c, &jobs[i]);
		/* the message of the user has no room beside so many steps */
		if (c->large && !c->too_large)
		{
			skip_to_last_step(c);
			read_step(c, &jobs[i]);
		}
		c->too_large |= c->large;
	}
}

/* True if two pieces of text are the same. */
static bool
same(ChatStr a, ChatStr b)
{
	return a.len == b.len && (a.len == 0 || memcmp(a.data, b.data, a.len) == 0);
}

/* Returns the id of a call that is sent, absent if it is not. */
static ChatStr
sent_id(JsonbValue *call)
{
	JsonbContainer *object = call->type == jbvBinary
		? call->val.binary.data : NULL;
	ChatStr		id = str(member(object, "id"));
	char	   *function = member(object, "function");

	if (id.len == 0 || function == NULL || function[0] != '{' ||
		str(member(&parse(function)->root, "name")).len == 0)
		return str(NULL);
	return id;
}

/* Counts the calls before one that have the same id. */
static int
count_same(const ChatStr *ids, int call)
{
	int			n = 0;

	for (int i = 0; i < call; i++)
		n += ids[call].data && ids[i].data && same(ids[i], ids[call]);
	return n;
}

/* Returns the result of a call: of calls with one id, each its own. */
static ChatMessage
find_result(ChatStr id, int nth, bool alone, const ChatMessage *results,
			int nresults)
{
	ChatMessage m = {0};

	m.role = str("tool");
	m.tool_call_id = id;
	m.content = str(NO_RESULT);
	for (int r = 0; r < nresults; r++)
		if (same(results[r].tool_call_id, id) && (alone || nth-- == 0))
			m = results[r];
	return m;
}

/* Returns the calls of a message with one of the ids replaced. */
static ChatStr
rename_call(ChatStr calls, int call, const char *id)
{
	char	   *path = psprintf("{%d,id}", call);
	Jsonb	   *all = parse(pnstrdup(calls.data, calls.len));
	ArrayType  *array = DatumGetArrayTypeP(OidFunctionCall3(F_ARRAY_IN,
															CStringGetDatum(path),
															ObjectIdGetDatum(TEXTOID),
															Int32GetDatum(-1)));
	StringInfoData text;

	initStringInfo(&text);
	chat_append_string(&text, id, strlen(id));
	all = DatumGetJsonbP(DirectFunctionCall4(jsonb_set, JsonbPGetDatum(all),
											 PointerGetDatum(array),
											 JsonbPGetDatum(parse(text.data)),
											 BoolGetDatum(false)));
	return str(JsonbToCString(NULL, &all->root, VARSIZE(all)));
}

/*
 * Returns the id that a call is sent with.  The API takes an id only once in
 * a message, and endpoints only so long ones, but those that they gave
 * themselves; models and applications do not care.
 */
static ChatStr
fitting_id(ChatStr id, bool foreign, int call, int nth)
{
	if (foreign && id.len > MAX_CALL_ID)
		id = str(psprintf("%.*s_%08x",
						  pg_mbcliplen(id.data, (int) id.len, MAX_CALL_ID / 2),
						  id.data,
						  hash_bytes((const unsigned char *) id.data,
									 (int) id.len)));
	return nth == 0 ? id : str(psprintf("%.*s_%d_%d", (int) id.len, id.data,
										call, nth));
}

/*
 * Copies the results of one assistant message's calls, in the order of the
 * calls, from the tool messages that follow it; a call without one gets one
 * that says so.
 */
static void
copy_results(ChatContext *out, ChatMessage *assistant,
			 const ChatMessage *results, int nresults)
{
	JsonbContainer *calls = &parse(pnstrdup(assistant->tool_calls.data,
											assistant->tool_calls.len))->root;
	int			n = (int) JsonContainerSize(calls);
	ChatStr    *ids = palloc(sizeof(ChatStr) * (n + 1));

	for (int i = 0; i < n; i++)
		ids[i] = sent_id(getIthJsonbValueFromContainer(calls, i));
	for (int i = 0; i < n; i++)
	{
		int			nth = count_same(ids, i);
		bool		alone = nth == 0;
		ChatMessage *m;

		if (ids[i].data == NULL)
			continue;
		for (int k = i + 1; k < n; k++)
			alone &= ids[k].data == NULL || !same(ids[k], ids[i]);
		m = &out->messages[out->n++];
		*m = find_result(ids[i], nth, alone, results, nresults);
		m->tool_call_id = fitting_id(ids[i], assistant->foreign, i, nth);
		if (same(m->tool_call_id, ids[i]))
			continue;
		assistant->tool_calls = rename_call(assistant->tool_calls, i,
											m->tool_call_id.data);
	}
}

/* Makes a history one that the API takes. */
void
chat_context_repair(ChatContext *context)
{
	ChatContext out = *context;
	int			room = context->n;

	for (int i = 0; i < context->n; i++)
		if (context->messages[i].tool_calls.data)
			room += JsonContainerSize(&parse(pnstrdup(context->messages[i].tool_calls.data,
													  context->messages[i].tool_calls.len))->root);
	out.n = 0;
	out.messages = palloc(sizeof(ChatMessage) * Max(room, 1));
	for (int i = 0; i < context->n;)
	{
		const ChatMessage *m = &context->messages[i++];
		int			first = i;

		if (has_role(m, "tool"))
			continue;			/* without its call */
		out.messages[out.n++] = *m;
		if (m->tool_calls.data == NULL)
			continue;
		while (i < context->n && has_role(&context->messages[i], "tool"))
			i++;
		copy_results(&out, &out.messages[out.n - 1],
					 &context->messages[first], i - first);
	}
	*context = out;
}

/* Tells the model how the calls of a task's last step ended. */
void
chat_context_close(const ChatJob *job, ChatContext *context)
{
	Datum		params[2] = {UUIDPGetDatum(&job->task),
	Int32GetDatum(job->steps)};
	StringInfoData text;
	ChatMessage *last;
	uint64		rows;

	if (job->steps == 0 || context->n == 0 ||
		!has_role(&context->messages[context->n - 1], "assistant"))
		return;
	rows = chat_db_exec(&last_results, params, NULL);
	if (rows == 0)
		return;
	initStringInfo(&text);
	for (uint64 row = 0; row < rows; row++)
		appendStringInfo(&text, "%sOperation %s (%s) that was started earlier has %s. Its result:\n%s",
						 row ? "\n\n" : "", chat_db_string(row, 1),
						 chat_db_text(row, 2), chat_db_text(row, 3),
						 chat_db_text(row, 4));
	context->messages = repalloc(context->messages,
								 sizeof(ChatMessage) * (context->n + 1));
	last = &context->messages[context->n++];
	memset(last, 0, sizeof(*last));
	last->role = str("user");
	last->content = str(text.data);
}

/* Merges two JSON objects, the second over the first; either may be NULL. */
static char *
merge(const char *a, const char *b)
{
	Jsonb	   *both;

	if (a == NULL || b == NULL)
		return a ? pstrdup(a) : b ? pstrdup(b) : NULL;
	both = DatumGetJsonbP(DirectFunctionCall2(jsonb_concat,
											  JsonbPGetDatum(parse(a)),
											  JsonbPGetDatum(parse(b))));
	return JsonbToCString(NULL, &both->root, VARSIZE(both));
}

/* Returns a uuid in its text form. */
static char *
uuid_text(const pg_uuid_t *id)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(id)));
}

/* Sets the time limits that the settings, in seconds, put over a server's. */
static void
apply_times(JsonbContainer *settings, ChatServer *server)
{
	const struct
	{
		const char *name;
		int		   *value;
	}			times[] = {
		{"connect_timeout", &server->connect_timeout},
		{"first_token_timeout", &server->first_token_timeout},
		{"idle_timeout", &server->idle_timeout},
		{"stream_timeout", &server->stream_timeout},
	};

	for (size_t i = 0; i < lengthof(times); i++)
	{
		char	   *seconds = member(settings, times[i].name);

		if (seconds != NULL)
			*times[i].value = (int) rint(strtod(seconds, NULL) * 1000);
	}
}

/* True if a tool_choice leaves the model no way but to call a tool. */
static bool
forces_call(JsonbContainer *settings)
{
	char	   *choice = member(settings, "tool_choice");
	JsonbValue	v;

	if (choice && (strcmp(choice, "required") == 0 || strcmp(choice, "any") == 0))
		return true;
	return getKeyJsonValueFromContainer(settings, "tool_choice", 11, &v) &&
		v.type == jbvBinary && JsonContainerIsObject(v.val.binary.data) &&
		(choice = member(v.val.binary.data, "type")) != NULL &&
		strcmp(choice, "function") == 0;
}

/*
 * Returns the tool_choice of a job's request.  One that forces a call is for
 * the task's first step: with it in all of them there would be no answer.
 */
static char *
tool_choice(const ChatJob *job, JsonbContainer *settings)
{
	if (job->steps > 0 && forces_call(settings))
		return NULL;
	return json_member(settings, "tool_choice");
}

/* Builds the body of a job's request: session's settings over the server's. */
char *
chat_context_request(const ChatJob *job, ChatServer *server,
					 const ChatContext *context, const char *system,
					 const char *tools, int *len)
{
	JsonbContainer *settings = &parse(job->settings)->root;
	ChatRequest req = {0};
	StringInfoData body;
	char	   *session = uuid_text(&job->session);
	char	   *text;

	apply_times(settings, server);
	text = member(settings, "model");
	req.model = str(text ? text : server->model);
	text = member(settings, "temperature");
	req.temperature = str(text ? text : server->temperature);
	text = member(settings, "top_p");
	req.top_p = str(text ? text : server->top_p);
	text = member(settings, "max_tokens");
	if (text == NULL && server->max_tokens > 0)
		text = psprintf("%d", server->max_tokens);
	req.max_tokens = str(text);
	req.max_tokens_field = str(server->max_tokens_field);
	text = member(settings, "thinking");
	req.thinking = (text ? strcmp(text, "true") == 0 : server->thinking) &&
		req.model.data != NULL && strstr(req.model.data, "anthropic") != NULL;
	req.stream = true;
	req.include_usage = server->stream_usage;
	if (server->tracing)
	{
		req.user = str(job->user_id);
		req.session_id = str(session);
	}
	req.extra_body = str(merge(chat_server_expand_body(server, job->user_id,
													   session,
													   uuid_text(&job->task)),
							   member(settings, "extra_body")));
	req.system = str(system);
	req.tools = str(tools);
	if (tools)
	{
		req.tool_choice = str(tool_choice(job, settings));
		req.parallel_tool_calls = str(json_member(settings,
												  "parallel_tool_calls"));
	}
	req.messages = context->messages;
	req.nmessages = context->n;
	initStringInfo(&body);
	chat_openai.build_request(&body, &req);
	*len = body.len;
	return body.data;
}
