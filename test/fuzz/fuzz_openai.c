/*
 * fuzz_openai.c
 *	  libFuzzer target for src/openai.c and src/json.c.
 *
 * The bytes are taken as a chunk, as a plain body, as an error body, as a
 * plain text, as pieces of reasoning and as what is stored of a message.  Whatever they are: what
 * comes out is UTF-8 without NUL, raw JSON that is kept is JSON, making safe
 * twice is making safe once, and every request that is built is JSON.
 */
#include "openai.c"

#include "../unit/arena.h"
#include "json.c"

#define MAX_INPUT 4096

/* Many small blocks: the sanitizer need not keep so many of the freed. */
extern const char *__asan_default_options(void);

const char *
__asan_default_options(void)
{
	return "quarantine_size_mb=16";
}

static void
must(bool held)
{
	if (!held)
		abort();
}

static void
must_be_text(ChatStr s)
{
	size_t		need;

	must(s.data != NULL || s.len == 0);
	if (s.data != NULL)
		must(chat_utf8_check(s.data, s.len, &need));
}

/* Is this JSON that the server takes, with escapes? */
static void
must_be_json(ChatStr s)
{
	JsonSemAction sem = {.semstate = NULL};
	JsonLexContext *lex;
	size_t		need;

	/* a part may have numbers that are too long for it, not for the whole */
	must(chat_json_check(s.data, s.len, &need) != CHAT_JSON_DIRTY);
	must(run_parser(s, &sem, &lex));
}

/* The members of an object, without its braces. */
static void
must_be_members(ChatStr s)
{
	StringInfoData buf;

	must_be_text(s);
	initStringInfo(&buf);
	appendStringInfoChar(&buf, '{');
	put(&buf, s);
	appendStringInfoChar(&buf, '}');
	must_be_json((ChatStr) {buf.data, (size_t) buf.len});
}

static void
check_chunk(const ChatChunk *c)
{
	must_be_text(c->text);
	must_be_text(c->reasoning);
	must_be_text(c->refusal);
	must_be_text(c->finish_reason);
	must(c->finish_reason.data == NULL || c->finish_reason.len > 0);
	must_be_text(c->model);
	must_be_text(c->response_id);
	must_be_text(c->function_name);
	must_be_text(c->function_arguments);
	must_be_text(c->error_message);
	must_be_text(c->error_code);
	must_be_text(c->error_type);
	if (c->reasoning_details.data)
		must_be_json(c->reasoning_details);
	for (int i = 0; i < c->ntools; i++)
	{
		must_be_text(c->tools[i].id);
		must_be_text(c->tools[i].name);
		must_be_text(c->tools[i].arguments);
		must_be_members(c->tools[i].extra);
		must_be_members(c->tools[i].fn_extra);
	}
}

/* The bytes as a payload; as they are and made safe they say the same. */
static void
fuzz_payload(ChatStr in, bool (*parse_fn) (const char *, size_t, ChatChunk *))
{
	ChatChunk	chunk;
	ChatChunk	again;
	ChatEndpointError err;
	ChatStr		safe = in;

	if (!parse_fn(in.data, in.len, &chunk))
		return;
	check_chunk(&chunk);
	if (chunk.is_error)
	{
		chat_openai.chunk_error(&chunk, &err);
		must_be_text(err.message);
		must(err.message.len > 0 && err.message.len <= MAX_ERROR_MESSAGE);
	}
	must(make_safe(&safe));
	must(parse_fn(safe.data, safe.len, &again));
	must(again.text.len == chunk.text.len && again.ntools == chunk.ntools);
	must(chunk.text.len == 0 ||
		 memcmp(again.text.data, chunk.text.data, chunk.text.len) == 0);
}

/* The bytes as JSON that is made safe. */
static void
fuzz_clean(ChatStr in)
{
	size_t		need;
	size_t		need2;

	if (chat_json_check(in.data, in.len, &need) == CHAT_JSON_DIRTY)
	{
		char	   *out = palloc(need);

		must(chat_json_clean(in.data, in.len, out) == need);
		must(chat_json_check(out, need, &need2) == CHAT_JSON_AS_IS);
		must(need2 == need);
		must_be_text((ChatStr) {out, need});
	}
}

/* The bytes as pieces of reasoning. */
static void
fuzz_reasoning(ChatStr in)
{
	StringInfoData out;

	initStringInfo(&out);
	join_reasoning(&out, in);
	must_be_json((ChatStr) {out.data, (size_t) out.len});
	must(list_members((ChatStr) {out.data, (size_t) out.len}, '[').n <=
		 list_members(in, '[').n);
}

/* The bytes as a text that a chunk carries; returns them made storable. */
static ChatStr
fuzz_text(ChatStr in)
{
	size_t		need;
	ChatStr		text = in;
	char	   *out;
	StringInfoData json;
	ChatChunk	chunk;

	if (!chat_utf8_check(in.data, in.len, &need))
	{
		out = palloc(need);
		must(chat_utf8_clean(in.data, in.len, out) == need);
		text = (ChatStr) {out, need};
	}
	must_be_text(text);
	initStringInfo(&json);
	appendStringInfoString(&json, "{\"choices\":[{\"delta\":{\"content\":");
	put_string(&json, text);
	appendStringInfoString(&json, "}}]}");
	must(parse_chunk(json.data, (size_t) json.len, &chunk));
	must(chunk.text.len == text.len);
	must(text.len == 0 || memcmp(chunk.text.data, text.data, text.len) == 0);
	return text;
}

/* The bytes as all that is stored of messages. */
static void
fuzz_request(ChatStr raw, ChatStr text)
{
	ChatMessage messages[] = {
		{.role = LITERAL("user"), .content = text, .name = text,
		.parts = raw, .context = raw},
		{.role = LITERAL("assistant"), .content = text, .refusal = text,
			.tool_calls = raw, .function_call = raw, .reasoning_details = raw,
		.interrupted = true},
		{.role = LITERAL("tool"), .tool_call_id = text, .parts = raw}
	};
	ChatRequest req = {
		.model = text, .system = text, .messages = messages, .nmessages = 3,
		.temperature = text, .user = text, .session_id = text,
		.stream = true, .extra_body = raw
	};
	StringInfoData out;

	initStringInfo(&out);
	build_request(&out, &req);
	must_be_text((ChatStr) {out.data, (size_t) out.len});
	must(list_members((ChatStr) {out.data, (size_t) out.len}, '{').n > 0 ||
		 chat_json_check(out.data, (size_t) out.len, &(size_t) {0}) ==
		 CHAT_JSON_TOO_DEEP);
}

extern int	LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	ChatStr		in = {(const char *) data, size};
	ChatEndpointError err;

	if (size > MAX_INPUT)
		return 0;
	fuzz_payload(in, parse_chunk);
	fuzz_payload(in, parse_response);
	fuzz_clean(in);
	fuzz_reasoning(in);
	read_error(400 + (int) (size % 200), in.data, in.len, &err);
	must_be_text(err.message);
	must(err.message.len > 0 && err.message.len <= MAX_ERROR_MESSAGE);
	fuzz_request(in, fuzz_text(in));
	arena_reset();
	return 0;
}
