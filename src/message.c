/*
 * message.c
 *		The entries of a conversation: read from JSON, checked, stored and
 *		compared.
 *
 * Owns the statements on chat.chat_message that write entries as their users
 * give them.  Everything is in the caller's memory context.  The session's
 * row lock, which the caller holds, protects its messages.
 */
#include "postgres.h"

#include "catalog/pg_collation.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"

#include "compat.h"
#include "db.h"
#include "field.h"
#include "message.h"

PG_FUNCTION_INFO_V1(chat_is_message_role);

#define ROLES "system, developer, user, assistant, tool, function"

/* what chat_message_row() and compare() read: $1 is the session */
#define ROW_SEQUENCE 1
#define ROW_MESSAGE 2
#define ROW_ENTRY 3
#define ROW_COLUMNS \
	" m.sequence, m, m.id, m.role, m.content, m.parts, m.name," \
	" m.tool_call_id, m.refusal, m.tool_calls, m.function_call," \
	" m.metadata, m.active "

CHAT_STMT(stored_entries,
		  "SELECT" ROW_COLUMNS "FROM chat.chat_message AS m"
		  " WHERE m.session_id = $1 AND m.id = ANY ($2)"
		  " ORDER BY m.sequence",
		  UUIDOID, UUIDARRAYOID);

CHAT_STMT(first_entries,
		  "SELECT" ROW_COLUMNS "FROM chat.chat_message AS m"
		  " WHERE m.session_id = $1 AND m.active"
		  " ORDER BY m.sequence LIMIT $2",
		  UUIDOID, INT8OID);

/* $3 and following are the columns of the entries as arrays */
CHAT_STMT(append_entries,
		  "INSERT INTO chat.chat_message AS m (session_id, sequence, id, role,"
		  " content, parts, name, tool_call_id, refusal, tool_calls,"
		  " function_call, metadata, active, created_at)"
		  " SELECT $1, $2 + u.n - 1,"
		  " COALESCE(u.id, pg_catalog.gen_random_uuid()), u.role, u.content,"
		  " u.parts, u.name, u.tool_call_id, u.refusal, u.tool_calls,"
		  " u.function_call, COALESCE(u.metadata, '{}'),"
		  " COALESCE(u.active, true),"
		  " COALESCE(u.created_at, pg_catalog.now())"
		  " FROM unnest($3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)"
		  " WITH ORDINALITY"
		  " AS u(id, role, content, parts, name, tool_call_id, refusal,"
		  " tool_calls, function_call, metadata, active, created_at, n)"
		  " ORDER BY u.n"
		  " RETURNING m.sequence, m",
		  UUIDOID, INT8OID,
		  UUIDARRAYOID, TEXTARRAYOID, TEXTARRAYOID, JSONBARRAYOID,
		  TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID, JSONBARRAYOID,
		  JSONBARRAYOID, JSONBARRAYOID, BOOLARRAYOID, TIMESTAMPTZARRAYOID);

/* The columns that are stored, in the order of the arrays. */
static const struct
{
	const char *name;
	Oid			type;
	bool		optional;		/* compared only when it is given */
}			columns[] =
{
	[CHAT_ENTRY_ID] = {"message_id", UUIDOID, true},
	[CHAT_ENTRY_ROLE] = {"role", TEXTOID, false},
	[CHAT_ENTRY_CONTENT] = {"content", TEXTOID, false},
	[CHAT_ENTRY_PARTS] = {"parts", JSONBOID, false},
	[CHAT_ENTRY_NAME] = {"name", TEXTOID, false},
	[CHAT_ENTRY_TOOL_CALL_ID] = {"tool_call_id", TEXTOID, false},
	[CHAT_ENTRY_REFUSAL] = {"refusal", TEXTOID, false},
	[CHAT_ENTRY_TOOL_CALLS] = {"tool_calls", JSONBOID, false},
	[CHAT_ENTRY_FUNCTION_CALL] = {"function_call", JSONBOID, false},
	[CHAT_ENTRY_METADATA] = {"metadata", JSONBOID, true},
	[CHAT_ENTRY_ACTIVE] = {"active", BOOLOID, true},
	[CHAT_ENTRY_CREATED_AT] = {"created_at", TIMESTAMPTZOID, true},
};

/* What an element may hold; those from sequence on only in a document. */
static const ChatField fields[] =
{
	CHAT_FIELD("role", CHAT_FIELD_TEXT, CHAT_ENTRY_ROLE),
	CHAT_FIELD("content", CHAT_FIELD_CONTENT, CHAT_ENTRY_CONTENT),
	CHAT_FIELD("name", CHAT_FIELD_TEXT, CHAT_ENTRY_NAME),
	CHAT_FIELD("tool_call_id", CHAT_FIELD_TEXT, CHAT_ENTRY_TOOL_CALL_ID),
	CHAT_FIELD("refusal", CHAT_FIELD_TEXT, CHAT_ENTRY_REFUSAL),
	CHAT_FIELD("tool_calls", CHAT_FIELD_OBJECTS, CHAT_ENTRY_TOOL_CALLS),
	CHAT_FIELD("function_call", CHAT_FIELD_OBJECT, CHAT_ENTRY_FUNCTION_CALL),
	CHAT_FIELD("parts", CHAT_FIELD_ARRAY, CHAT_ENTRY_PARTS),
	CHAT_FIELD("message_id", CHAT_FIELD_UUID, CHAT_ENTRY_ID),
	CHAT_FIELD("id", CHAT_FIELD_UUID, CHAT_ENTRY_ID),
	CHAT_FIELD("metadata", CHAT_FIELD_OBJECT, CHAT_ENTRY_METADATA),
	CHAT_FIELD_RANGE("sequence", CHAT_FIELD_INTEGER, CHAT_ENTRY_SEQUENCE,
					 1, CHAT_FIELD_MAX),
	CHAT_FIELD("created_at", CHAT_FIELD_TIME, CHAT_ENTRY_CREATED_AT),
	CHAT_FIELD("active", CHAT_FIELD_BOOL, CHAT_ENTRY_ACTIVE),
	CHAT_FIELD("task_id", CHAT_FIELD_UUID, CHAT_FIELD_NO_COLUMN),
	CHAT_FIELD_RANGE("superseded_by", CHAT_FIELD_INTEGER,
					 CHAT_FIELD_NO_COLUMN, 1, CHAT_FIELD_MAX),
};
#define DOCUMENT_FIELDS 5

static const ChatFieldTable batch_table =
{"key", fields, lengthof(fields) - DOCUMENT_FIELDS, false, true};
static const ChatFieldTable document_table =
{"key", fields, lengthof(fields), false, true};

/* Returns what opens the text of an error about an entry. */
static const char *
prefix(bool indexed, int index)
{
	return indexed ? psprintf("message at index %d: ", index) : "";
}

/* Raises that an entry cannot be stored. */
static CHAT_NORETURN void
reject(const char *where, const char *what, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("%s%s", where, what),
			 hint != NULL ? errhint("%s", hint) : 0));
}

/* Whether a role is one of the six. */
static bool
is_role(Datum role)
{
	static const char *const roles[] =
	{"system", "developer", "user", "assistant", "tool", "function"};
	char	   *name = TextDatumGetCString(role);

	for (size_t i = 0; i < lengthof(roles); i++)
		if (strcmp(roles[i], name) == 0)
			return true;
	return false;
}

/* is_message_role: the CHECK of the table. */
Datum
chat_is_message_role(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(is_role(PG_GETARG_DATUM(0)));
}

/* Checks what one entry must be beyond the types of its members. */
static void
check(const ChatEntry *entry, const char *where)
{
	/* JSON that goes into requests */
	static const ChatEntryColumn sent[] =
	{CHAT_ENTRY_PARTS, CHAT_ENTRY_TOOL_CALLS, CHAT_ENTRY_FUNCTION_CALL};
	Datum		role = entry->values[CHAT_ENTRY_ROLE];

	if (entry->nulls[CHAT_ENTRY_ROLE])
		reject(where, "\"role\" is missing", "Valid are: " ROLES ".");
	if (!is_role(role))
		reject(where, psprintf("unrecognized role \"%s\"",
							   TextDatumGetCString(role)),
			   "Valid are: " ROLES ".");
	if (strcmp(TextDatumGetCString(role), "tool") == 0 &&
		entry->nulls[CHAT_ENTRY_TOOL_CALL_ID])
		reject(where, "a tool message needs \"tool_call_id\"", NULL);
	for (size_t i = 0; i < lengthof(sent); i++)
	{
		Datum		value = entry->values[sent[i]];

		if (!entry->nulls[sent[i]])
			chat_field_check_depth(&DatumGetJsonbP(value)->root,
								   columns[sent[i]].name, where);
	}
}

/* Checks the JSON columns of an entry whose columns came as arguments. */
static void
check_arguments(const ChatEntry *entry)
{
	for (size_t i = 0; i < lengthof(fields); i++)
	{
		int			column = fields[i].column;

		if ((fields[i].kind == CHAT_FIELD_ARRAY ||
			 fields[i].kind == CHAT_FIELD_OBJECTS ||
			 fields[i].kind == CHAT_FIELD_OBJECT) && !entry->nulls[column])
			chat_field_check(&fields[i],
							 DatumGetJsonbP(entry->values[column]));
	}
}

/* Orders pointers to entries by id, and the same ids by index. */
static int
compare_ids(const void *a, const void *b)
{
	const ChatEntry *x = *(ChatEntry *const *) a;
	const ChatEntry *y = *(ChatEntry *const *) b;
	int			order;

	order = memcmp(DatumGetUUIDP(x->values[CHAT_ENTRY_ID]),
				   DatumGetUUIDP(y->values[CHAT_ENTRY_ID]), UUID_LEN);
	return order != 0 ? order : (x > y) - (x < y);
}

/* Finds an id that two entries share, and names the second. */
static void
check_ids(const ChatEntries *entries)
{
	const ChatEntry **ids = palloc(sizeof(*ids) * Max(entries->n, 1));
	int			n = 0;

	for (int i = 0; i < entries->n; i++)
		if (!entries->items[i].nulls[CHAT_ENTRY_ID])
			ids[n++] = &entries->items[i];
	qsort(ids, n, sizeof(*ids), compare_ids);
	for (int i = 1; i < n; i++)
	{
		Datum		id = ids[i]->values[CHAT_ENTRY_ID];

		if (memcmp(DatumGetUUIDP(id),
				   DatumGetUUIDP(ids[i - 1]->values[CHAT_ENTRY_ID]),
				   UUID_LEN) == 0)
			ereport(ERROR,
					(errcode(ERRCODE_UNIQUE_VIOLATION),
					 errmsg("%sits id is that of another entry",
							prefix(true, (int) (ids[i] - entries->items))),
					 errdetail("The id is %s.",
							   DatumGetCString(DirectFunctionCall1(uuid_out,
																   id)))));
	}
	pfree(ids);
}

/* Checks an entry whose columns came as arguments. */
void
chat_message_check(const ChatEntry *entry)
{
	check(entry, "");
	check_arguments(entry);
}

/* Reads the entries of an array. */
void
chat_message_read(ChatEntries *entries, Jsonb *array, bool document)
{
	JsonbIterator *it;
	JsonbValue	v;

	if (!JB_ROOT_IS_ARRAY(array) || JB_ROOT_IS_SCALAR(array))
		reject("", "messages must be a JSON array", NULL);
	entries->n = 0;
	entries->indexed = true;
	entries->items = palloc_extended(sizeof(ChatEntry) *
									 Max(JB_ROOT_COUNT(array), 1),
									 MCXT_ALLOC_HUGE);
	it = JsonbIteratorInit(&array->root);
	(void) JsonbIteratorNext(&it, &v, true);
	while (JsonbIteratorNext(&it, &v, true) == WJB_ELEM)
	{
		ChatEntry  *entry = &entries->items[entries->n];
		const char *where = prefix(true, entries->n);

		if (v.type != jbvBinary)
			reject(where, "not a JSON object", NULL);
		memset(entry->nulls, true, sizeof(entry->nulls));
		chat_field_read(document ? &document_table : &batch_table,
						v.val.binary.data, where,
						entry->values, entry->nulls);
		check(entry, where);
		entries->n++;
	}
	check_ids(entries);
}

/* Makes the array of one column of the entries from one on. */
static Datum
column_array(const ChatEntries *entries, int from, int column)
{
	int			n = entries->n - from;
	int			lower = 1;
	Datum	   *values = palloc(sizeof(Datum) * n);
	bool	   *nulls = palloc(sizeof(bool) * n);
	int16		len;
	bool		byval;
	char		align;

	for (int i = 0; i < n; i++)
	{
		values[i] = entries->items[from + i].values[column];
		nulls[i] = entries->items[from + i].nulls[column];
	}
	get_typlenbyvalalign(columns[column].type, &len, &byval, &align);
	return PointerGetDatum(construct_md_array(values, nulls, 1, &n, &lower,
											  columns[column].type,
											  len, byval, align));
}

/* Appends entries. */
void
chat_message_append(const pg_uuid_t *session, const ChatEntries *entries,
					int from, int64 sequence)
{
	Datum		values[2 + lengthof(columns)];

	values[0] = UUIDPGetDatum(session);
	values[1] = Int64GetDatum(sequence);
	for (int i = 0; i < (int) lengthof(columns); i++)
		values[2 + i] = column_array(entries, from, i);
	chat_db_exec(&append_entries, values, NULL);
}

/* Returns the name of the first column in which an entry differs, or NULL. */
static const char *
difference(const ChatEntry *entry, uint64 row)
{
	for (int i = 0; i < CHAT_ENTRY_CREATED_AT; i++)
	{
		bool		isnull;
		bool		same;
		Datum		stored = chat_db_datum(row, ROW_ENTRY + i, &isnull);
		Datum		given = entry->values[i];

		if (entry->nulls[i] && columns[i].optional)
			continue;
		if (entry->nulls[i] || isnull)
			same = entry->nulls[i] && isnull;
		else if (columns[i].type == JSONBOID)
			same = compareJsonbContainers(&DatumGetJsonbP(stored)->root,
										  &DatumGetJsonbP(given)->root) == 0;
		else if (columns[i].type == TEXTOID)
			same = DatumGetBool(DirectFunctionCall2Coll(texteq,
														C_COLLATION_OID,
														stored, given));
		else if (columns[i].type == UUIDOID)
			same = memcmp(DatumGetUUIDP(stored), DatumGetUUIDP(given),
						  UUID_LEN) == 0;
		else
			same = DatumGetBool(stored) == DatumGetBool(given);
		if (!same)
			return columns[i].name;
	}
	return NULL;
}

/* Returns the index of the entry with the id of a row: at first sight i. */
static int
find_id(const ChatEntries *entries, uint64 row, int i)
{
	bool		isnull;
	pg_uuid_t  *id = DatumGetUUIDP(chat_db_datum(row, ROW_ENTRY, &isnull));

	for (int tries = 0; tries < entries->n; tries++, i++)
	{
		const ChatEntry *entry = &entries->items[i % entries->n];

		if (!entry->nulls[CHAT_ENTRY_ID] &&
			memcmp(DatumGetUUIDP(entry->values[CHAT_ENTRY_ID]), id,
				   UUID_LEN) == 0)
			return i % entries->n;
	}
	elog(ERROR, "message that nobody asked for");
}

/* Tells whether entries from one on are stored already: all or none. */
bool
chat_message_stored(const pg_uuid_t *session, const ChatEntries *entries,
					int from)
{
	Datum		values[2];
	uint64		n = entries->n - from;
	uint64		found;

	values[0] = UUIDPGetDatum(session);
	values[1] = column_array(entries, from, CHAT_ENTRY_ID);
	found = chat_db_exec(&stored_entries, values, NULL);
	for (uint64 row = 0; row < found; row++)
	{
		int			i = find_id(entries, row, from + (int) row);
		const char *what = difference(&entries->items[i], row);

		if (what != NULL || found != n || i != from + (int) row)
			ereport(ERROR,
					(errcode(ERRCODE_UNIQUE_VIOLATION),
					 errmsg("%sa message with this id is stored already",
							prefix(entries->indexed, i)),
					 what != NULL ?
					 errdetail("It differs in \"%s\".", what) : 0));
	}
	return found > 0;
}

/* Compares the entries with what is stored, as far as both reach. */
int
chat_message_overlap(const pg_uuid_t *session, const ChatEntries *entries)
{
	Datum		values[2];
	uint64		found;

	values[0] = UUIDPGetDatum(session);
	values[1] = Int64GetDatum(entries->n);
	found = chat_db_exec(&first_entries, values, NULL);
	for (uint64 row = 0; row < found; row++)
	{
		const ChatEntry *entry = &entries->items[row];
		const char *what = difference(entry, row);
		int64		sequence = chat_db_int64(row, ROW_SEQUENCE, 0);

		if (what == NULL && !entry->nulls[CHAT_ENTRY_SEQUENCE] &&
			DatumGetInt64(entry->values[CHAT_ENTRY_SEQUENCE]) != sequence)
			what = "sequence";
		if (what != NULL)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("%snot what is stored",
							prefix(true, (int) row)),
					 errdetail("The message with sequence %lld differs in \"%s\".",
							   (long long) sequence, what),
					 errhint("Read the session again.")));
	}
	return (int) found;
}

/* Returns a row of the last result as a composite value. */
Datum
chat_message_row(uint64 row, int64 *sequence)
{
	bool		isnull;

	*sequence = chat_db_int64(row, ROW_SEQUENCE, 0);
	return chat_db_datum(row, ROW_MESSAGE, &isnull);
}
