/*
 * append.c
 *		What turns add to their sessions: the messages of users when they start,
 *		those of models when they end.
 *
 * Owns nothing.  The caller holds the sessions' rows locked, which is all that
 * the foreign key asks for, and has taken the sequences from them.
 */
#include "postgres.h"

#include "access/tableam.h"
#include "access/xact.h"
#include "executor/tuptable.h"
#include "utils/timestamp.h"

#include "append.h"
#include "rows.h"

/* Returns a row with what a message holds. */
static TupleTableSlot *
make_row(ChatRows *rows, const ChatNewMessage *m)
{
	Datum		now = TimestampTzGetDatum(GetCurrentTransactionStartTimestamp());
	ChatColumn	columns[] = {
		CHAT_COLUMN("session_id", UUIDPGetDatum(&m->session)),
		CHAT_COLUMN("sequence", Int64GetDatum(m->sequence)),
		CHAT_COLUMN("id", UUIDPGetDatum(&m->id)),
		CHAT_COLUMN("role", m->role),
		{"content", m->content, m->content == (Datum) 0},
		{"refusal", m->refusal, m->refusal == (Datum) 0},
		{"tool_calls", m->tool_calls, m->tool_calls == (Datum) 0},
		{"function_call", m->function_call, m->function_call == (Datum) 0},
		CHAT_COLUMN("task_id", UUIDPGetDatum(&m->task)),
		CHAT_COLUMN("active", BoolGetDatum(m->superseded_by == 0)),
		{"superseded_by", Int64GetDatum(m->superseded_by), m->superseded_by == 0},
		CHAT_COLUMN("metadata", m->metadata),
		CHAT_COLUMN("created_at", now),
	};

	return chat_rows_slot(rows, columns, lengthof(columns));
}

/* Appends messages; what they point to has to last until then. */
void
chat_append_messages(const ChatNewMessage *messages, int n)
{
	ChatRows	rows;
	TupleTableSlot **slots;

	if (n == 0)
		return;
	chat_rows_open(&rows, "chat_message", true);
	slots = palloc(sizeof(TupleTableSlot *) * n);
	for (int i = 0; i < n; i++)
		slots[i] = make_row(&rows, &messages[i]);
	chat_rows_append(&rows, slots, n);
	for (int i = 0; i < n; i++)
		ExecDropSingleTupleTableSlot(slots[i]);
	chat_rows_close(&rows);
	CommandCounterIncrement();
}
