/*
 * db.h
 *		Transactions, statements that are prepared once, and typed results.
 *
 * A C function that a user calls does
 *
 *		ChatScope	scope;
 *
 *		chat_db_enter(&scope);		-- SPI, as the extension's owner
 *		chat_db_exec(&stmt, values, nulls);
 *		... chat_db_text(row, column) ...
 *		chat_db_leave(&scope);
 *
 * with the condition CHAT_VISIBLE in the statements that touch a session,
 * whose parameters $1 to $3 chat_db_caller() fills.  A background worker
 * brackets the same with chat_db_begin() and chat_db_commit().
 */
#ifndef CHAT_DB_H
#define CHAT_DB_H

#include "postgres.h"

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

/* A statement that is prepared at its first use and kept by the process. */
typedef struct ChatStmt
{
	const char *sql;
	const Oid  *types;
	int			ntypes;
	SPIPlanPtr	plan;
} ChatStmt;

/* CHAT_STMT(name, "SQL", type OID of $1, ...): at file scope */
#define CHAT_STMT(name, text, ...) \
	static const Oid name##_types[] = {__VA_ARGS__}; \
	static ChatStmt name = {text, name##_types, lengthof(name##_types), NULL}

/*
 * A condition on a job that is found by its id.  An equation would also be
 * a way to find it: among all that the holder has.
 */
#define CHAT_HELD_BY(holder) "holder IS NOT DISTINCT FROM " holder

/* The same for a job that is found by its session, not among all parked ones. */
#define CHAT_IS_PARKED "parked IS NOT DISTINCT FROM true"

/*
 * Ends a subquery of arrays whose rows are found in tables by key.  Of a limit
 * that it does not know the planner thinks that one row is left, and for one
 * row it reads no table as a whole, however small that was when it planned.
 */
#define CHAT_FEW(array) " LIMIT cardinality(" array ")"

/*
 * The tasks that have a session or wait for it, by one small index each; by
 * the session alone they would be looked for among all that it ever had.
 */
#define CHAT_BUSY_TASK(session, columns) \
	" SELECT " columns " FROM chat.chat_task AS b" \
	"  WHERE b.session_id = " session " AND b.status = 'running'" \
	" UNION ALL SELECT " columns " FROM chat.chat_task AS b" \
	"  WHERE b.session_id = " session " AND b.status = 'waiting'" \
	"   AND NOT b.detached" \
	" UNION ALL SELECT " columns " FROM chat.chat_task AS b" \
	"  WHERE b.session_id = " session " AND b.status = 'queued'"

/*
 * The tasks b of a session that have not ended.  By the index of each status:
 * a session may have had tens of thousands.
 */
#define CHAT_OPEN_TASK(session, columns) \
	" SELECT " columns " FROM chat.chat_task AS b" \
	"  WHERE b.session_id = " session " AND b.status = 'running'" \
	" UNION ALL SELECT " columns " FROM chat.chat_task AS b" \
	"  WHERE b.session_id = " session " AND b.status = 'waiting'" \
	" UNION ALL SELECT " columns " FROM chat.chat_task AS b" \
	"  WHERE b.session_id = " session " AND b.status = 'queued'"

/*
 * Tokens of a step that ends and of its attempts that were given up.  "ok" has
 * the step's prompt, completion and usage, and spent, the job's.
 */
#define CHAT_STEP_TOKENS(which) \
	"ok." which " + COALESCE((ok.spent->>'" which "_tokens')::bigint, 0)"
/* What its request took of the window; as it was where none was made. */
#define CHAT_STEP_WINDOW(task) \
	"  context_tokens = CASE WHEN ok.context > 0 THEN ok.context" \
	"   ELSE " task ".context_tokens END," \
	"  compaction = CASE WHEN ok.context > 0 THEN ok.compaction" \
	"   ELSE " task ".compaction END"
#define CHAT_STEP_USAGE(task) \
	"CASE WHEN " task ".usage IS NULL AND ok.spent IS NULL" \
	" THEN ok.usage::jsonb ELSE chat.add_usage(chat.add_usage(" \
	task ".usage, ok.spent), ok.usage::jsonb) END"

/* What chat_db_enter() changes and chat_db_leave() restores. */
typedef struct ChatScope
{
	Oid			caller;			/* role that called us */
	const char *user;			/* chat.user_id of the caller, "" if unset */
	Oid			saved_user;
	int			saved_context;
	int			guc_level;
} ChatScope;

/*
 * The ownership condition on chat.chat_session AS s: $1 is the session's id,
 * $2 the caller's role, $3 chat.user_id ("" = any).  The same rule as the
 * row-level security policy and access.c.
 */
#define CHAT_VISIBLE \
	" s.id = $1 AND pg_catalog.pg_has_role($2, s.owner, 'USAGE')" \
	" AND ($3 = '' OR s.user_id = $3) "
#define CHAT_VISIBLE_TYPES UUIDOID, OIDOID, TEXTOID

/* What the elements of an array parameter are. */
typedef struct ChatArrayKind
{
	Oid			type;
	int			len;
	bool		byval;
	char		align;
} ChatArrayKind;

extern const ChatArrayKind chat_int4s;
extern const ChatArrayKind chat_int8s;
extern const ChatArrayKind chat_bools;
extern const ChatArrayKind chat_oids;
extern const ChatArrayKind chat_times;
extern const ChatArrayKind chat_uuids;
extern const ChatArrayKind chat_texts;

/*
 * Makes params[at] an array with the value of an expression for each i < n;
 * the caller has params, at, n and a Datum array values of that size.
 */
#define CHAT_DB_COLUMN(kind, expression) \
	do { \
		for (int i = 0; i < n; i++) \
			values[i] = (expression); \
		params[at++] = chat_db_array(&(kind), values, n); \
	} while (0)

extern void chat_db_init(void);
extern void chat_db_enter(ChatScope *scope);
extern void chat_db_leave(ChatScope *scope);
extern void chat_db_caller(const ChatScope *scope, Datum *values);
extern const char *chat_db_user(void);
extern uint64 chat_db_exec(ChatStmt *stmt, Datum *values, const char *nulls);
extern uint64 chat_db_exec_now(ChatStmt *stmt, Datum *values,
							   const char *nulls);
extern void chat_db_begin(const char *activity);
extern void chat_db_commit(bool durable);
extern void chat_db_abort(void);
extern bool chat_db_standby_missing(void);
extern Oid	chat_db_extension_owner(void);
extern bool chat_db_same_version(void);
extern Jsonb *chat_db_parse_json(const char *text);
extern void chat_db_new_ids(pg_uuid_t *ids, int n);
extern Datum chat_db_array(const ChatArrayKind *kind, Datum *values, int n);

/*
 * Results of the last chat_db_exec(): rows and columns count from 0 and 1.
 * Pointers live as long as the SPI context unless copied.
 */
static inline Datum
chat_db_datum(uint64 row, int column, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc,
						 column, isnull);
}

static inline bool
chat_db_isnull(uint64 row, int column)
{
	bool		isnull;

	(void) chat_db_datum(row, column, &isnull);
	return isnull;
}

/* Returns a palloc'ed C string, or NULL. The column is text or json. */
static inline char *
chat_db_text(uint64 row, int column)
{
	bool		isnull;
	Datum		d = chat_db_datum(row, column, &isnull);

	return isnull ? NULL : TextDatumGetCString(d);
}

/* Returns the column in its type's output form, or NULL (any type). */
static inline char *
chat_db_string(uint64 row, int column)
{
	return SPI_getvalue(SPI_tuptable->vals[row], SPI_tuptable->tupdesc,
						column);
}

static inline int64
chat_db_int64(uint64 row, int column, int64 otherwise)
{
	bool		isnull;
	Datum		d = chat_db_datum(row, column, &isnull);

	return isnull ? otherwise : DatumGetInt64(d);
}

static inline int32
chat_db_int32(uint64 row, int column, int32 otherwise)
{
	bool		isnull;
	Datum		d = chat_db_datum(row, column, &isnull);

	return isnull ? otherwise : DatumGetInt32(d);
}

static inline Oid
chat_db_oid(uint64 row, int column)
{
	bool		isnull;
	Datum		d = chat_db_datum(row, column, &isnull);

	return isnull ? InvalidOid : DatumGetObjectId(d);
}

static inline bool
chat_db_bool(uint64 row, int column)
{
	bool		isnull;
	Datum		d = chat_db_datum(row, column, &isnull);

	return !isnull && DatumGetBool(d);
}

/* Returns a text as a parameter or array element; NULL becomes SQL's NULL. */
static inline Datum
chat_db_text_or_null(const char *text)
{
	return text ? CStringGetTextDatum(text) : (Datum) 0;
}

/* Copies a uuid; all zeros when the column is NULL. */
static inline pg_uuid_t
chat_db_uuid(uint64 row, int column)
{
	bool		isnull;
	Datum		d = chat_db_datum(row, column, &isnull);
	pg_uuid_t	id;

	memset(&id, 0, sizeof(id));
	if (!isnull)
		id = *DatumGetUUIDP(d);
	return id;
}

#endif							/* CHAT_DB_H */
