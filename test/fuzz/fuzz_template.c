/*
 * fuzz_template.c
 *	  libFuzzer target for src/template.c, beside the full parser.
 *
 * The bytes before the first NUL are a payload, from which a template is
 * learnt; those behind it are a text that takes the place of the payload's,
 * and a payload of their own.  Whatever the template says of a payload, the
 * parser says, too: this text or this reasoning, and nothing else.
 */
#include "openai.c"

#include "../unit/arena.h"
#include "json.c"
#include "template.c"

#define MAX_INPUT 2048

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

static bool
same(ChatStr a, ChatStr b)
{
	return a.len == b.len && (a.data == NULL) == (b.data == NULL) &&
		(a.len == 0 || memcmp(a.data, b.data, a.len) == 0);
}

/* A copy of its own size: whoever reads beyond it is seen. */
static ChatStr
copy_of(ChatStr s)
{
	char	   *copy = palloc(s.len);

	memcpy(copy, s.data, s.len);
	return (ChatStr) {copy, s.len};
}

/* Asks both of a payload; the template may have nothing to say. */
static bool
compare(const ChatTemplate *t, ChatStr payload, const ChatChunk *learnt)
{
	ChatStr		in = copy_of(payload);
	ChatStr		text;
	ChatChunk	chunk;

	if (!chat_template_match(t, in.data, in.len, &text))
		return false;
	must(text.len > 0);
	must(parse_chunk(in.data, in.len, &chunk));
	must(tells_only_text(&chunk));
	must(same(t->reasoning ? chunk.reasoning : chunk.text, text));
	must((t->reasoning ? chunk.text.len : chunk.reasoning.len) == 0);
	must(same(chunk.model, learnt->model));
	must(same(chunk.response_id, learnt->response_id));
	return true;
}

/* The learnt payload with another text in it. */
static ChatStr
filled(const ChatTemplate *t, ChatStr text)
{
	char	   *out = palloc(t->prefix + text.len + t->suffix);

	memcpy(out, t->bytes, t->prefix);
	memcpy(out + t->prefix, text.data, text.len);
	memcpy(out + t->prefix + text.len, t->bytes + t->prefix, t->suffix);
	return (ChatStr) {out, t->prefix + text.len + t->suffix};
}

extern int	LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const char *in = (const char *) data;
	const char *gap;
	ChatStr		payload;
	ChatStr		rest = {in + size, 0};
	ChatTemplate t;
	ChatChunk	chunk;
	size_t		need;

	if (size == 0 || size > MAX_INPUT)
		return 0;
	gap = memchr(in, '\0', size);
	payload = copy_of((ChatStr) {in, gap ? (size_t) (gap - in) : size});
	if (gap)
		rest = (ChatStr) {gap + 1, size - payload.len - 1};
	memset(&t, 0, sizeof(t));
	if (parse_chunk(payload.data, payload.len, &chunk))
	{
		chat_template_learn(&t, payload.data, payload.len, &chunk);
		if (t.prefix > 0)
		{
			must(compare(&t, payload, &chunk));
			(void) compare(&t, rest, &chunk);
			/* what needs no escapes is always taken */
			must(compare(&t, filled(&t, rest), &chunk) ==
				 (rest.len > 0 && chat_utf8_check(rest.data, rest.len, &need) &&
				  chat_json_escape(rest.data, rest.len, NULL) == rest.len));
		}
	}
	else
		must(!chat_template_match(&t, rest.data, rest.len, &payload));
	arena_reset();
	return 0;
}
