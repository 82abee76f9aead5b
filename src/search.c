/*
 * search.c
 *		Full-text search in the messages that the caller may see.
 *
 * Works as the extension's owner with the condition of ownership in the
 * statement: under row-level security no index could serve the search.  The
 * statement is planned for each call, because an index belongs to one text
 * search configuration.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/tuplestore.h"

#include "compat.h"
#include "db.h"

/* columns of the result */
#define COLUMNS 6

PG_FUNCTION_INFO_V1(chat_search_messages);

/*
 * $1 query, $2 caller, $3 chat.user_id, $4 user or NULL, $5 most rows,
 * $6 configuration.  The expression and the condition are those of
 * create_search_index(); its limit keeps a text of any length within what a
 * tsvector holds.
 */
static const char search[] =
"SELECT m.session_id, m.sequence, m.role,"
" ts_headline($6, \"left\"(m.content, 100000), q.query,"
"  'StartSel=**, StopSel=**, MaxFragments=2, MaxWords=20, MinWords=5'),"
" m.rank, m.created_at"
" FROM (SELECT c.session_id, c.sequence, c.role, c.content, c.created_at,"
"   ts_rank_cd(to_tsvector($6, \"left\"(c.content, 100000)),"
"    websearch_to_tsquery($6, $1)) AS rank"
"  FROM chat.chat_message AS c"
"  JOIN chat.chat_session AS s ON s.id = c.session_id"
"  WHERE to_tsvector($6, \"left\"(c.content, 100000))"
"    @@ websearch_to_tsquery($6, $1)"
"   AND c.active AND c.role IN ('user', 'assistant')"
"   AND pg_has_role($2, s.owner, 'USAGE')"
"   AND ($3 = '' OR s.user_id = $3) AND ($4 IS NULL OR s.user_id = $4)"
"  ORDER BY rank DESC, c.created_at DESC, c.session_id, c.sequence"
"  LIMIT $5) AS m,"
" websearch_to_tsquery($6, $1) AS q (query)"
" ORDER BY m.rank DESC, m.created_at DESC, m.session_id, m.sequence";

/*
 * Keeps what the search meets in messages of others from the caller: what the
 * parser says of very long words, and from how many rows an index took him.
 */
static void
hush(const ChatScope *scope)
{
	(void) set_config_option("client_min_messages", "error",
							 PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	if (!superuser_arg(scope->caller))
		(void) set_config_option("track_counts", "off",
								 PGC_SUSET, PGC_S_SESSION,
								 GUC_ACTION_SAVE, true, 0, false);
}

/* search_messages: returns the rows, best first. */
Datum
chat_search_messages(PG_FUNCTION_ARGS)
{
	static Oid	types[] = {TEXTOID, OIDOID, TEXTOID, TEXTOID, INT4OID,
	REGCONFIGOID};
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	ChatScope	scope;
	Datum		values[6];
	char		nulls[7] = "      ";
	int			rc;

	InitMaterializedSRF(fcinfo, 0);
	if (PG_ARGISNULL(0) || PG_ARGISNULL(3))
		return (Datum) 0;
	chat_db_enter(&scope);
	hush(&scope);
	values[0] = PG_GETARG_DATUM(0);
	chat_db_caller(&scope, values);
	values[3] = PG_GETARG_DATUM(1);
	nulls[3] = PG_ARGISNULL(1) ? 'n' : ' ';
	values[4] = PG_GETARG_DATUM(2);
	nulls[4] = PG_ARGISNULL(2) ? 'n' : ' ';
	values[5] = PG_GETARG_DATUM(3);
	rc = SPI_execute_with_args(search, lengthof(types), types, values, nulls,
							   false, 0);
	if (rc != SPI_OK_SELECT)
		elog(ERROR, "could not search: %s", SPI_result_code_string(rc));
	for (uint64 row = 0; row < SPI_processed; row++)
	{
		Datum		columns[COLUMNS];
		bool		isnull[COLUMNS];

		for (int i = 0; i < COLUMNS; i++)
			columns[i] = chat_db_datum(row, i + 1, &isnull[i]);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, columns,
							 isnull);
	}
	chat_db_leave(&scope);
	return (Datum) 0;
}
