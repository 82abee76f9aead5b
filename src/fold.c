/*
 * fold.c
 *		What an event stream adds up to.
 *
 * Owns the growing message of a fold: an array of parts, in the order in
 * which their first events came, as the AI SDK's client builds them.  All of
 * it is in the memory context in which the fold was made.
 *
 * Texts stay as they are in the events, escaped: the deltas of a block are
 * put together without being decoded, so ten thousand of them cost about as
 * much as copying them.  The scanner below relies on valid JSON.
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/memutils.h"

#include "fold.h"

typedef enum PartKind
{
	PART_STEP,
	PART_TEXT,
	PART_REASONING,
	PART_TOOL,
	PART_DATA
} PartKind;

/* A part of the message; values are raw JSON, absent ones have no data. */
typedef struct Part
{
	PartKind	kind;
	ChatStr		type;			/* of data parts */
	ChatStr		id;				/* of the block, tool call or data */
	const char *state;
	StringInfoData text;		/* escaped; data == NULL: none */
	ChatStr		tool_name;
	bool		dynamic;
	ChatStr		input;
	ChatStr		output;
	ChatStr		error_text;
	ChatStr		preliminary;
	ChatStr		approval_id;
	ChatStr		approved;
	ChatStr		reason;
	ChatStr		data;
} Part;

struct ChatFold
{
	MemoryContext context;
	ChatStr		message_id;
	ChatStr		metadata;
	Part	   *parts;
	int			nparts;
	int			maxparts;
	int			step;			/* first part of the current step */
	bool		step_open;
};

/* The members of an event that matter here. */
typedef struct Event
{
	ChatStr		type;
	ChatStr		id;
	ChatStr		delta;
	ChatStr		tool_call_id;
	ChatStr		tool_name;
	ChatStr		input_delta;
	ChatStr		input;
	ChatStr		output;
	ChatStr		error_text;
	ChatStr		preliminary;
	ChatStr		dynamic;
	ChatStr		approval_id;
	ChatStr		approved;
	ChatStr		reason;
	ChatStr		data;
	ChatStr		transient;
	ChatStr		message_id;
	ChatStr		metadata;
} Event;

static const struct
{
	const char *name;
	size_t		len;
	size_t		offset;
}			event_members[] = {
#define MEMBER(name, field) {name, sizeof(name) - 1, offsetof(Event, field)}
	MEMBER("type", type),
	MEMBER("id", id),
	MEMBER("delta", delta),
	MEMBER("toolCallId", tool_call_id),
	MEMBER("toolName", tool_name),
	MEMBER("inputTextDelta", input_delta),
	MEMBER("input", input),
	MEMBER("output", output),
	MEMBER("errorText", error_text),
	MEMBER("preliminary", preliminary),
	MEMBER("dynamic", dynamic),
	MEMBER("approvalId", approval_id),
	MEMBER("approved", approved),
	MEMBER("reason", reason),
	MEMBER("data", data),
	MEMBER("transient", transient),
	MEMBER("messageId", message_id),
	MEMBER("messageMetadata", metadata),
#undef MEMBER
};

/*
 * The protocol's events and their members.  What is not here does not leave
 * by chat.sse(): clients check events against a strict schema.
 */
static const struct
{
	const char *type;
	int			since;			/* protocol version */
	const char *members[6];
}			protocol_events[] = {
	{"text-delta", 6, {"id", "delta"}},
	{"text-start", 6, {"id"}},
	{"text-end", 6, {"id"}},
	{"reasoning-delta", 6, {"id", "delta"}},
	{"reasoning-start", 6, {"id"}},
	{"reasoning-end", 6, {"id"}},
	{"tool-input-delta", 6, {"toolCallId", "inputTextDelta"}},
	{"tool-input-start", 6, {"toolCallId", "toolName", "dynamic", "title"}},
	{"tool-input-available", 6, {"toolCallId", "toolName", "input", "dynamic", "title"}},
	{"tool-input-error", 6, {"toolCallId", "toolName", "input", "errorText", "dynamic", "title"}},
	{"tool-approval-request", 6, {"approvalId", "toolCallId"}},
	{"tool-approval-response", 7, {"approvalId", "approved", "reason"}},
	{"tool-output-available", 6, {"toolCallId", "output", "preliminary", "dynamic"}},
	{"tool-output-error", 6, {"toolCallId", "errorText", "dynamic"}},
	{"tool-output-denied", 6, {"toolCallId"}},
	{"start", 6, {"messageId", "messageMetadata"}},
	{"start-step", 6, {NULL}},
	{"finish-step", 6, {NULL}},
	{"reset-step", 7, {NULL}},
	{"message-metadata", 6, {"messageMetadata"}},
	{"error", 6, {"errorText"}},
	{"abort", 6, {"reason"}},
	{"finish", 6, {"finishReason", "messageMetadata"}},
};

static const char *const data_members[] = {"id", "data", "transient"};

/* ---------- reading JSON ---------- */

/* Returns the first byte at or after p that is not white space. */
static const char *
skip_space(const char *p, const char *end)
{
	while (p < end && (*p == ' ' || *p == '\n' || *p == '\t' || *p == '\r'))
		p++;
	return p;
}

/* Returns the byte behind the string that starts at p. */
static const char *
skip_string(const char *p, const char *end)
{
	for (p++; p < end && *p != '"'; p++)
	{
		if (*p == '\\')
			p++;
	}
	return Min(p + 1, end);
}

/* Returns the byte behind the value that starts at p. */
static const char *
skip_value(const char *p, const char *end)
{
	int			depth = 0;

	if (p < end && *p != '"' && *p != '{' && *p != '[')
	{
		while (p < end && *p != ',' && *p != ']' && *p != '}' &&
			   skip_space(p, end) == p)
			p++;
		return p;
	}
	while (p < end)
	{
		if (*p == '"')
			p = skip_string(p, end);
		else
		{
			if (*p == '{' || *p == '[')
				depth++;
			else if (*p == '}' || *p == ']')
				depth--;
			p++;
		}
		if (depth == 0)
			break;
	}
	return p;
}

/*
 * Returns the next member of the object, or element of the array, whose text
 * *at points into; false at its end.  *at starts at the opening bracket.
 */
bool
chat_fold_next(const char **at, const char *end, ChatMember *m)
{
	const char *p = skip_space(*at, end);

	memset(m, 0, sizeof(*m));
	if (p < end && (*p == '{' || *p == '[' || *p == ','))
		p = skip_space(p + 1, end);
	if (p >= end || *p == '}' || *p == ']')
		return false;
	m->value.data = p;
	p = skip_value(p, end);
	m->value.len = p - m->value.data;
	p = skip_space(p, end);
	if (p < end && *p == ':')
	{
		m->name.data = m->value.data + 1;
		m->name.len = m->value.len - 2;
		p = skip_space(p + 1, end);
		m->value.data = p;
		p = skip_value(p, end);
		m->value.len = p - m->value.data;
		p = skip_space(p, end);
	}
	*at = p;
	return true;
}

/* True if a piece of text is the given word. */
static bool
is_word(ChatStr s, const char *word)
{
	return s.data != NULL && s.len == strlen(word) &&
		memcmp(s.data, word, s.len) == 0;
}

/* Returns a member of an object, absent if it has none of that name. */
ChatStr
chat_fold_member(ChatStr object, const char *name)
{
	const char *at = object.data;
	ChatMember	m;

	if (object.data != NULL && object.len > 0 && *at == '{')
		while (chat_fold_next(&at, object.data + object.len, &m))
			if (is_word(m.name, name))
				return m.value;
	return (ChatStr) {NULL, 0};
}

/* Returns what stands between the quotes of a JSON string. */
static ChatStr
inner(ChatStr value)
{
	if (value.data == NULL || value.len < 2 || value.data[0] != '"')
		return (ChatStr) {NULL, 0};
	return (ChatStr) {value.data + 1, value.len - 2};
}

/* True if an event is of the given type. */
bool
chat_fold_is(ChatStr json, const char *type)
{
	return is_word(inner(chat_fold_member(json, "type")), type);
}

/* Finds the members of an event. */
static void
read_event(ChatStr json, Event *e)
{
	const char *at = json.data;
	ChatMember	m;

	memset(e, 0, sizeof(*e));
	while (chat_fold_next(&at, json.data + json.len, &m))
		for (size_t i = 0; i < lengthof(event_members); i++)
			if (m.name.len == event_members[i].len &&
				memcmp(m.name.data, event_members[i].name, m.name.len) == 0)
			{
				*(ChatStr *) ((char *) e + event_members[i].offset) = m.value;
				break;
			}
}

/* True if two values are written the same. */
static bool
same(ChatStr a, ChatStr b)
{
	return a.data != NULL && b.data != NULL && a.len == b.len &&
		memcmp(a.data, b.data, a.len) == 0;
}

/* ---------- the message ---------- */

/* Makes a message without parts. */
ChatFold *
chat_fold_create(void)
{
	ChatFold   *f = palloc0(sizeof(ChatFold));

	f->context = CurrentMemoryContext;
	return f;
}

/* Adds a part. */
static Part *
add_part(ChatFold *f, PartKind kind, ChatStr id)
{
	Part	   *part;

	if (f->nparts == f->maxparts)
	{
		f->maxparts = Max(16, f->maxparts * 2);
		f->parts = f->parts
			? repalloc(f->parts, sizeof(Part) * f->maxparts)
			: palloc(sizeof(Part) * f->maxparts);
	}
	part = &f->parts[f->nparts++];
	memset(part, 0, sizeof(*part));
	part->kind = kind;
	part->id = id;
	return part;
}

/* Finds the newest part of a kind and id, not before the given place. */
static Part *
find_part(ChatFold *f, PartKind kind, ChatStr id, int first)
{
	for (int i = f->nparts - 1; i >= first; i--)
		if (f->parts[i].kind == kind && same(f->parts[i].id, id))
			return &f->parts[i];
	return NULL;
}

/* Appends the inside of a JSON string to a part's text. */
static void
append_text(Part *part, ChatStr value)
{
	ChatStr		text = inner(value);

	if (text.data == NULL)
		return;
	if (part->text.data == NULL)
		initStringInfo(&part->text);
	appendBinaryStringInfo(&part->text, text.data, (int) text.len);
}

/* Takes an event of a block of text or reasoning: what = start, delta, end. */
static void
take_block(ChatFold *f, const Event *e, PartKind kind, const char *what)
{
	Part	   *part;

	if (strncmp(what, "start", 5) == 0)
	{
		part = add_part(f, kind, e->id);
		part->state = "streaming";
		return;
	}
	part = find_part(f, kind, e->id, f->step);
	if (part == NULL)
		return;
	if (strncmp(what, "delta", 5) == 0)
		append_text(part, e->delta);
	else
		part->state = "done";
}

/* Returns the part of a call in the current step, making it if need be. */
static Part *
need_tool(ChatFold *f, const Event *e)
{
	Part	   *part = find_part(f, PART_TOOL, e->tool_call_id, f->step);

	if (part == NULL)
		part = add_part(f, PART_TOOL, e->tool_call_id);
	part->tool_name = inner(e->tool_name);
	part->dynamic = part->dynamic || is_word(e->dynamic, "true");
	return part;
}

/* Takes an event of a tool call's input; false if it is none. */
static bool
take_tool_input(ChatFold *f, const Event *e, ChatStr type)
{
	Part	   *part;

	if (is_word(type, "tool-input-delta"))
	{
		part = find_part(f, PART_TOOL, e->tool_call_id, f->step);
		if (part)
			append_text(part, e->input_delta);
		return true;
	}
	if (is_word(type, "tool-input-start"))
		need_tool(f, e)->state = "input-streaming";
	else if (is_word(type, "tool-input-available") ||
			 is_word(type, "tool-input-error"))
	{
		part = need_tool(f, e);
		part->state = is_word(type, "tool-input-error")
			? "output-error" : "input-available";
		part->input = e->input;
		part->error_text = e->error_text;
		part->text.data = NULL;
	}
	else
		return false;
	return true;
}

/* Takes an event of a tool call's approval or output. */
static void
take_tool_output(ChatFold *f, const Event *e, ChatStr type)
{
	Part	   *part = NULL;

	if (is_word(type, "tool-approval-response"))
	{
		for (int i = 0; i < f->nparts; i++)
			if (same(f->parts[i].approval_id, e->approval_id))
				part = &f->parts[i];
		if (part == NULL)
			return;
		part->state = "approval-responded";
		part->approved = e->approved;
		part->reason = e->reason;
		return;
	}
	part = find_part(f, PART_TOOL, e->tool_call_id, 0);
	if (part == NULL)
		return;
	if (is_word(type, "tool-approval-request"))
	{
		part->state = "approval-requested";
		part->approval_id = e->approval_id;
	}
	else if (is_word(type, "tool-output-denied"))
		part->state = "output-denied";
	else if (is_word(type, "tool-output-available"))
	{
		part->state = "output-available";
		part->output = e->output;
		part->preliminary = e->preliminary;
		part->error_text = (ChatStr) {NULL, 0};
	}
	else if (is_word(type, "tool-output-error"))
	{
		part->state = "output-error";
		part->error_text = e->error_text;
		part->output = part->preliminary = (ChatStr) {NULL, 0};
	}
}

/* Takes data of ours that belongs to the message. */
static void
take_data(ChatFold *f, const Event *e, ChatStr type)
{
	Part	   *part = NULL;

	if (is_word(e->transient, "true"))
		return;
	for (int i = 0; i < f->nparts && part == NULL; i++)
		if (f->parts[i].kind == PART_DATA && same(f->parts[i].type, type) &&
			same(f->parts[i].id, e->id))
			part = &f->parts[i];
	if (part == NULL)
		part = add_part(f, PART_DATA, e->id);
	part->type = type;
	part->data = e->data;
}

/*
 * Writes the members of two objects as one: those of b win, objects within
 * both are merged alike.
 */
static void
merge(StringInfo out, ChatStr a, ChatStr b)
{
	const char *at = a.data;
	ChatMember	m;
	char	   *sep = "";

	check_stack_depth();
	appendStringInfoChar(out, '{');
	for (int pass = 0; pass < 2; pass++, at = b.data)
	{
		ChatStr		all = pass == 0 ? a : b;
		ChatStr		others = pass == 0 ? b : a;

		while (chat_fold_next(&at, all.data + all.len, &m))
		{
			char	   *name = pnstrdup(m.name.data, m.name.len);
			ChatStr		other = chat_fold_member(others, name);

			pfree(name);
			if (pass == 1 && other.data)
				continue;		/* is there already */
			appendStringInfo(out, "%s\"%.*s\":", sep, (int) m.name.len,
							 m.name.data);
			sep = ",";
			if (other.data && *other.data == '{' && *m.value.data == '{')
				merge(out, m.value, other);
			else if (other.data)
				appendBinaryStringInfo(out, other.data, (int) other.len);
			else
				appendBinaryStringInfo(out, m.value.data, (int) m.value.len);
		}
	}
	appendStringInfoChar(out, '}');
}

/* Takes metadata of the message. */
static void
take_metadata(ChatFold *f, ChatStr metadata)
{
	StringInfoData all;

	if (metadata.data == NULL || is_word(metadata, "null"))
		return;
	if (f->metadata.data == NULL || *f->metadata.data != '{' ||
		*metadata.data != '{')
	{
		f->metadata = metadata;
		return;
	}
	initStringInfo(&all);
	merge(&all, f->metadata, metadata);
	f->metadata = (ChatStr) {all.data, all.len};
}

/* Takes an event that is about the whole message or a step of it. */
static void
take_frame(ChatFold *f, const Event *e, ChatStr type)
{
	if (is_word(type, "start-step"))
	{
		add_part(f, PART_STEP, (ChatStr) {NULL, 0});
		f->step = f->nparts;
		f->step_open = true;
	}
	else if (is_word(type, "finish-step"))
		f->step_open = false;
	else if (is_word(type, "reset-step"))
	{
		/* a finished step stays */
		if (f->step_open)
			f->nparts = f->step;
	}
	else if (is_word(type, "start"))
	{
		f->nparts = f->step = 0;
		f->step_open = false;
		f->metadata = (ChatStr) {NULL, 0};
		f->message_id = e->message_id;
	}
	take_metadata(f, e->metadata);
}

/* Adds an event to the message; the event's text has to stay. */
void
chat_fold_event(ChatFold *f, ChatStr json)
{
	MemoryContext old = MemoryContextSwitchTo(f->context);
	Event		e;
	ChatStr		type;

	read_event(json, &e);
	type = inner(e.type);
	if (type.len > 5 && memcmp(type.data, "text-", 5) == 0)
		take_block(f, &e, PART_TEXT, type.data + 5);
	else if (type.len > 10 && memcmp(type.data, "reasoning-", 10) == 0)
		take_block(f, &e, PART_REASONING, type.data + 10);
	else if (type.len > 5 && memcmp(type.data, "tool-", 5) == 0)
	{
		if (!take_tool_input(f, &e, type))
			take_tool_output(f, &e, type);
	}
	else if (type.len > 5 && memcmp(type.data, "data-", 5) == 0)
		take_data(f, &e, type);
	else
		take_frame(f, &e, type);
	MemoryContextSwitchTo(old);
}

/* ---------- writing ---------- */

/* Appends a raw value on one line: line ends in JSON are white space. */
static void
put_raw(StringInfo out, ChatStr value)
{
	int			start = out->len;

	appendBinaryStringInfo(out, value.data, (int) value.len);
	for (int i = start; i < out->len; i++)
		if (out->data[i] == '\n' || out->data[i] == '\r')
			out->data[i] = ' ';
}

/* Appends ,"name":value unless the value is absent. */
static void
put_member(StringInfo out, const char *name, ChatStr value)
{
	if (value.data == NULL)
		return;
	appendStringInfo(out, ",\"%s\":", name);
	put_raw(out, value);
}

/* Appends ,"name":"text", the text being escaped already. */
static void
put_text(StringInfo out, const char *name, const StringInfoData *text)
{
	appendStringInfo(out, ",\"%s\":\"", name);
	if (text->data)
		appendBinaryStringInfo(out, text->data, text->len);
	appendStringInfoChar(out, '"');
}

/* Appends a tool call's part. */
static void
put_tool(StringInfo out, const Part *part)
{
	if (part->dynamic)
		appendStringInfo(out, "{\"type\":\"dynamic-tool\",\"toolName\":\"%.*s\"",
						 (int) part->tool_name.len, part->tool_name.data);
	else
		appendStringInfo(out, "{\"type\":\"tool-%.*s\"",
						 (int) part->tool_name.len, part->tool_name.data);
	put_member(out, "toolCallId", part->id);
	appendStringInfo(out, ",\"state\":\"%s\"", part->state);
	put_member(out, "input", part->input);
	if (part->text.data)
		put_text(out, "rawInput", &part->text);
	put_member(out, "output", part->output);
	put_member(out, "errorText", part->error_text);
	put_member(out, "preliminary", part->preliminary);
	if (part->approval_id.data)
	{
		appendStringInfoString(out, ",\"approval\":{\"id\":");
		put_raw(out, part->approval_id);
		put_member(out, "approved", part->approved);
		put_member(out, "reason", part->reason);
		appendStringInfoChar(out, '}');
	}
	appendStringInfoChar(out, '}');
}

/* Appends a part. */
static void
put_part(StringInfo out, const Part *part)
{
	switch (part->kind)
	{
		case PART_STEP:
			appendStringInfoString(out, "{\"type\":\"step-start\"}");
			break;
		case PART_TEXT:
		case PART_REASONING:
			appendStringInfo(out, "{\"type\":\"%s\"",
							 part->kind == PART_TEXT ? "text" : "reasoning");
			if (part->kind == PART_REASONING)
				put_member(out, "id", part->id);
			put_text(out, "text", &part->text);
			appendStringInfo(out, ",\"state\":\"%s\"}", part->state);
			break;
		case PART_TOOL:
			put_tool(out, part);
			break;
		case PART_DATA:
			appendStringInfo(out, "{\"type\":\"%.*s\"", (int) part->type.len,
							 part->type.data);
			put_member(out, "id", part->id);
			put_member(out, "data", part->data);
			appendStringInfoChar(out, '}');
			break;
	}
}

/* Appends the message: {"role":"assistant","id":...,"parts":[...],...}. */
void
chat_fold_message(const ChatFold *f, StringInfo out)
{
	appendStringInfoString(out, "{\"role\":\"assistant\"");
	put_member(out, "id", f->message_id);
	appendStringInfoString(out, ",\"parts\":[");
	for (int i = 0; i < f->nparts; i++)
	{
		if (i > 0)
			appendStringInfoChar(out, ',');
		put_part(out, &f->parts[i]);
	}
	appendStringInfoChar(out, ']');
	put_member(out, "metadata", f->metadata);
	appendStringInfoChar(out, '}');
}

/*
 * Appends an event as the protocol has it, without what is ours; false if
 * the protocol has no such event.
 */
bool
chat_fold_protocol(StringInfo out, ChatStr json, int protocol)
{
	ChatStr		type = inner(chat_fold_member(json, "type"));
	const char *const *members = NULL;
	int			n = 0;
	const char *at = json.data;
	ChatMember	m;

	for (size_t i = 0; i < lengthof(protocol_events) && members == NULL; i++)
		if (protocol_events[i].since <= protocol &&
			is_word(type, protocol_events[i].type))
		{
			members = protocol_events[i].members;
			n = lengthof(protocol_events[i].members);
		}
	if (members == NULL && type.len > 5 && memcmp(type.data, "data-", 5) == 0)
	{
		members = data_members;
		n = lengthof(data_members);
	}
	if (members == NULL)
		return false;
	appendStringInfo(out, "{\"type\":\"%.*s\"", (int) type.len, type.data);
	while (chat_fold_next(&at, json.data + json.len, &m))
		for (int i = 0; i < n && members[i]; i++)
			if (is_word(m.name, members[i]))
			{
				put_member(out, members[i], m.value);
				break;
			}
	appendStringInfoChar(out, '}');
	return true;
}
