/*
 * jsonbuf.h
 *		Writing JSON into a StringInfo: strings and members, escaped.
 */
#ifndef CHAT_JSONBUF_H
#define CHAT_JSONBUF_H

#include "postgres.h"

#include "lib/stringinfo.h"

#include "json.h"

/* Appends a text as a JSON string. */
static inline void
chat_append_string(StringInfo buf, const char *text, size_t len)
{
	appendStringInfoChar(buf, '"');
	enlargeStringInfo(buf, (int) chat_json_escape(text, len, NULL) + 2);
	buf->len += (int) chat_json_escape(text, len, buf->data + buf->len);
	appendStringInfoChar(buf, '"');
}

/* Appends ,"name":"text" unless the text is NULL. */
static inline void
chat_append_member(StringInfo buf, const char *name, const char *text)
{
	if (text == NULL)
		return;
	appendStringInfo(buf, ",\"%s\":", name);
	chat_append_string(buf, text, strlen(text));
}

/* Returns what the model is told of a tool call that failed. */
static inline char *
chat_tool_error(const char *tool, const char *what, const char *code)
{
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfoString(&json, "{\"type\":\"error\"");
	chat_append_member(&json, "message",
					   psprintf("Tool %s failed: %s", tool, what));
	chat_append_member(&json, "code", code);
	appendStringInfoChar(&json, '}');
	return json.data;
}

#endif							/* CHAT_JSONBUF_H */
