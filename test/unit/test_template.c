/*
 * test_template.c
 *	  Unit test of src/template.c, beside the parser of src/openai.c.
 */
#include "openai.c"

#include "arena.h"
#include "json.c"
#include "tap.h"
#include "template.c"

#define HEAD "{\"id\":\"c\",\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":"
#define TAIL ",\"finish_reason\":null}]}"
#define CHUNK(delta) HEAD delta TAIL

/* Learns from a payload; true if there is a template now. */
static bool
learn(ChatTemplate *t, const char *payload)
{
	ChatChunk	chunk;

	memset(t, 0, sizeof(*t));
	if (!parse_chunk(payload, strlen(payload), &chunk))
		return false;
	chat_template_learn(t, payload, strlen(payload), &chunk);
	return t->prefix > 0;
}

/* Matches a payload; a text that must be the expected one, or NULL. */
static void
matches(const ChatTemplate *t, const char *payload, const char *want,
		const char *name)
{
	ChatStr		text = {NULL, 0};
	bool		matched = chat_template_match(t, payload, strlen(payload),
											  &text);

	if (want == NULL)
		ok(!matched, "%s", name);
	else
		is_text(matched ? text.data : NULL, text.len, want, name);
}

/* A text of n bytes in a chunk. */
static char *
long_chunk(size_t n)
{
	char	   *text = palloc(n + 1);
	char	   *payload = palloc(n + 200);

	memset(text, 'x', n);
	text[n] = '\0';
	sprintf(payload, CHUNK("{\"content\":\"%s\"}"), text);
	return payload;
}

static void
test_match(void)
{
	ChatTemplate t;
	ChatStr		text;
	char	   *payload;

	ok(learn(&t, CHUNK("{\"content\":\"hello\"}")), "a text is learnt");
	ok(!t.reasoning, "as text");
	matches(&t, CHUNK("{\"content\":\"hello\"}"), "hello", "the same again");
	matches(&t, CHUNK("{\"content\":\"x\"}"), "x", "a shorter one");
	matches(&t, CHUNK("{\"content\":\" a longer one\"}"), " a longer one",
			"a longer one");
	payload = long_chunk(100000);
	ok(chat_template_match(&t, payload, strlen(payload), &text) &&
	   text.data == payload + t.prefix && text.len == 100000,
	   "a very long one");
}

static void
test_others(void)
{
	ChatTemplate t;

	learn(&t, CHUNK("{\"content\":\"hello\"}"));
	matches(&t, CHUNK("{\"content\":\"gr\xc3\xbc\xc3\x9f\"}"),
			"gr\xc3\xbc\xc3\x9f", "UTF-8");
	matches(&t, CHUNK("{\"content\":\"gr\xc3\"}"), NULL, "half a character");
	matches(&t, CHUNK("{\"content\":\"\"}"), NULL, "no text");
	matches(&t, CHUNK("{\"content\":\"a\\nb\"}"), NULL, "an escape");
	matches(&t, CHUNK("{\"content\":\"a\\\\\"}"), NULL, "a backslash at the end");
	matches(&t, CHUNK("{\"content\":\"a\tb\"}"), NULL, "a control character");
	matches(&t, CHUNK("{\"content\":\"a\",\"refusal\":\"b\"}"), NULL,
			"a quote: another member");
	matches(&t, CHUNK("{\"content\": \"a\"}"), NULL, "another blank");
	matches(&t, HEAD "{\"content\":\"a\"},\"finish_reason\":\"stop\"}]}", NULL,
			"another end");
	matches(&t, CHUNK("{\"content\":null}"), NULL, "null");
	matches(&t, HEAD, NULL, "half of it");
	matches(&t, "", NULL, "nothing");
	matches(&t, "[DONE]", NULL, "the end mark");
}

static void
test_learn(void)
{
	ChatTemplate t;

	ok(learn(&t, CHUNK("{\"reasoning\":\"hm\"}")) && t.reasoning,
	   "reasoning is learnt as such");
	matches(&t, CHUNK("{\"reasoning\":\"so\"}"), "so", "and matched");
	ok(learn(&t, CHUNK("{\"content\":\"\",\"reasoning\":\"hm\"}")) && t.reasoning,
	   "beside an empty text");
	ok(!learn(&t, CHUNK("{\"content\":\"a\\nb\"}")), "not with an escape");
	ok(!learn(&t, CHUNK("{\"content\":\"\"}")), "not without a text");
	ok(!learn(&t, CHUNK("{\"content\":\"a\",\"reasoning\":\"b\"}")),
	   "not text and reasoning");
	ok(!learn(&t, CHUNK("{\"content\":\"a\",\"refusal\":\"b\"}")),
	   "not with a refusal");
	ok(!learn(&t, CHUNK("{\"content\":\"a\",\"tool_calls\":[{\"index\":0,"
						"\"function\":{\"name\":\"f\"}}]}")),
	   "not with a tool call");
	ok(!learn(&t, HEAD "{\"content\":\"a\"},\"finish_reason\":\"stop\"}]}"),
	   "not with a finish reason");
	ok(!learn(&t, HEAD "{\"content\":\"a\"}}],\"usage\":{\"prompt_tokens\":1,"
			  "\"completion_tokens\":1}}"), "not with usage");
	ok(!learn(&t, "{\"error\":{\"message\":\"a\"}}"), "not an error");
	ok(!learn(&t, "[DONE]"), "not the end mark");
	ok(learn(&t, long_chunk(100000)), "a long text is learnt");
	ok(!learn(&t, "{\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"x\":\""
			  "0123456789012345678901234567890123456789012345678901234567890"
			  "0123456789012345678901234567890123456789012345678901234567890"
			  "0123456789012345678901234567890123456789012345678901234567890"
			  "0123456789012345678901234567890123456789012345678901234567890"
			  "0123456789012345678901234567890123456789012345678901234567890"
			  "0123456789012345678901234567890123456789012345678901234567890"
			  "0123456789012345678901234567890123456789012345678901234567890"
			  "0123456789012345678901234567890123456789012345678901234567890"
			  "\"}"), "not much around it");
	matches(&t, CHUNK("{\"content\":\"a\"}"), NULL,
			"what was not learnt matches nothing");
}

int
main(void)
{
	test_match();
	test_others();
	test_learn();
	arena_reset();
	return done_testing();
}
