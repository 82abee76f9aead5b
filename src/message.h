/*
 * message.h
 *		The entries of a conversation: read from JSON, checked, stored and
 *		compared.
 *
 * All functions but the first two run between chat_db_enter() and
 * chat_db_leave(), after the caller's right to the session was checked and,
 * to write, its row locked.
 */
#ifndef CHAT_MESSAGE_H
#define CHAT_MESSAGE_H

#include "postgres.h"

#include "utils/jsonb.h"
#include "utils/uuid.h"

/* The columns of an entry; parts follows content (CHAT_FIELD_CONTENT). */
typedef enum ChatEntryColumn
{
	CHAT_ENTRY_ID,
	CHAT_ENTRY_ROLE,
	CHAT_ENTRY_CONTENT,
	CHAT_ENTRY_PARTS,
	CHAT_ENTRY_NAME,
	CHAT_ENTRY_TOOL_CALL_ID,
	CHAT_ENTRY_REFUSAL,
	CHAT_ENTRY_TOOL_CALLS,
	CHAT_ENTRY_FUNCTION_CALL,
	CHAT_ENTRY_METADATA,
	CHAT_ENTRY_ACTIVE,
	CHAT_ENTRY_CREATED_AT,
	CHAT_ENTRY_SEQUENCE,		/* as told by a document; not stored */
	CHAT_ENTRY_COLUMNS
} ChatEntryColumn;

typedef struct ChatEntry
{
	Datum		values[CHAT_ENTRY_COLUMNS];
	bool		nulls[CHAT_ENTRY_COLUMNS];
} ChatEntry;

/* Entries that belong to one session, in order. */
typedef struct ChatEntries
{
	ChatEntry  *items;
	int			n;
	bool		indexed;		/* errors name the index */
} ChatEntries;

/*
 * Reads and checks an array of entries; a document's have more members than
 * a batch's.
 */
extern void chat_message_read(ChatEntries *entries, Jsonb *array,
							  bool document);

/* Checks an entry that was not read from JSON. */
extern void chat_message_check(const ChatEntry *entry);

/*
 * Compares entries from one on with the stored messages that have their ids.
 * False: none is stored.  True: all are, and the last result holds them as
 * chat_message_row() reads them, in order.  Anything in between is an error
 * (23505).
 */
extern bool chat_message_stored(const pg_uuid_t *session,
								const ChatEntries *entries, int from);

/*
 * Compares the entries with the session's first active messages, one by one;
 * returns how many there are.  A difference is an error (55000).
 */
extern int	chat_message_overlap(const pg_uuid_t *session,
								 const ChatEntries *entries);

/*
 * Appends entries from one on in one statement, the first of them with the
 * given sequence; the rows are the last result.
 */
extern void chat_message_append(const pg_uuid_t *session,
								const ChatEntries *entries, int from,
								int64 sequence);

/* The composite value of a row, and its sequence, of the last result. */
extern Datum chat_message_row(uint64 row, int64 *sequence);

#endif							/* CHAT_MESSAGE_H */
