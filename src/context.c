/*
 * context.c
 *		Conversation to request: the stored messages as the provider takes
 *		them.
 *
 * Owns nothing: everything is in the caller's memory context.
 */
#include "postgres.h"

#include "context.h"
#include "db.h"

/* Returns a column of type text as a piece of text; absent when NULL. */
static ChatStr
column(uint64 row, int number)
{
	ChatStr		str = {NULL, 0};
	char	   *text = chat_db_text(row, number);

	if (text != NULL)
	{
		str.data = text;
		str.len = strlen(text);
	}
	return str;
}

/* Reads one stored message. */
void
chat_context_row(ChatMessage *message, uint64 row, int first)
{
	message->role = column(row, first);
	message->content = column(row, first + 1);
	message->name = column(row, first + 2);
	message->tool_call_id = column(row, first + 3);
	message->refusal = column(row, first + 4);
	message->parts = column(row, first + 5);
	message->tool_calls = column(row, first + 6);
	message->function_call = column(row, first + 7);
	message->reasoning_details = column(row, first + 8);
	message->context = column(row, first + 9);
	message->interrupted = chat_db_bool(row, first + 10);
}
