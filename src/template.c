/*
 * template.c
 *		Reads the chunks that are like the one before.
 *
 * Owns nothing: the template is the stream's.
 */
#include <string.h>

#include "json.h"
#include "template.h"

/* True if a chunk tells a text or reasoning and nothing else. */
static bool
tells_only_text(const ChatChunk *c)
{
	return (c->text.len > 0) != (c->reasoning.len > 0) &&
		!c->done && !c->is_error && !c->has_usage && c->ntools == 0 &&
		c->refusal.data == NULL && c->finish_reason.data == NULL &&
		c->reasoning_details.data == NULL && c->function_name.data == NULL &&
		c->function_arguments.data == NULL;
}

/* Remembers what stands around the text, if the text stands in the payload. */
void
chat_template_learn(ChatTemplate *t, const char *data, size_t len,
					const ChatChunk *chunk)
{
	ChatStr		text = chunk->text.len > 0 ? chunk->text : chunk->reasoning;
	const char *end = data + len;

	t->prefix = 0;
	if (!tells_only_text(chunk) || text.data <= data ||
		text.data + text.len >= end || text.data[-1] != '"' ||
		text.data[text.len] != '"' || len - text.len > CHAT_TEMPLATE_SIZE)
		return;
	t->reasoning = chunk->reasoning.len > 0;
	t->prefix = (short) (text.data - data);
	t->suffix = (short) (end - text.data - text.len);
	memcpy(t->bytes, data, t->prefix);
	memcpy(t->bytes + t->prefix, text.data + text.len, t->suffix);
}

/* True if a string literal stands for itself: no escapes, valid UTF-8. */
static bool
is_plain(const char *s, size_t len)
{
	unsigned char high = 0;
	size_t		need;

	for (size_t i = 0; i < len; i++)
	{
		unsigned char c = (unsigned char) s[i];

		if (c == '"' || c == '\\' || c < 0x20)
			return false;
		high |= c;
	}
	return high < 0x80 || chat_utf8_check(s, len, &need);
}

/* Reads a payload that is like the remembered one. */
bool
chat_template_match(const ChatTemplate *t, const char *data, size_t len,
					ChatStr *text)
{
	size_t		around = (size_t) t->prefix + t->suffix;

	if (t->prefix == 0 || len <= around ||
		memcmp(data, t->bytes, t->prefix) != 0 ||
		memcmp(data + len - t->suffix, t->bytes + t->prefix, t->suffix) != 0)
		return false;
	text->data = data + t->prefix;
	text->len = len - around;
	return is_plain(text->data, text->len);
}
