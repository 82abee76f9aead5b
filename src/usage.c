/*
 * usage.c
 *		What users have used, and how much they may.
 *
 * Owns the limit of a day and the statements on chat.chat_usage that are not
 * side.c's.  The tokens of turns stand on their tasks; the table has what no
 * task tells: titles, summaries, and the turns of sessions that are gone, so
 * that nobody gets tokens back by deleting a session.
 */
#include "postgres.h"

#include "utils/guc.h"

#include "db.h"
#include "usage.h"

static int	max_tokens = 0;

/* $1 session: what its user has used since midnight, UTC */
CHAT_STMT(used_today,
		  "WITH s AS MATERIALIZED (SELECT c.user_id, c.owner,"
		  "  date_trunc('day', now(), 'UTC') AS day"
		  "  FROM chat.chat_session AS c WHERE c.id = $1)"
		  " SELECT COALESCE((SELECT sum(t.prompt_tokens + t.completion_tokens)"
		  "  FROM s JOIN chat.chat_session AS o ON o.user_id = s.user_id"
		  "   AND o.owner = s.owner AND o.updated_at >= s.day"
		  "  JOIN chat.chat_task AS t ON t.session_id = o.id"
		  "   AND COALESCE(t.finished_at, now()) >= s.day), 0)::bigint"
		  " + COALESCE((SELECT sum(u.prompt_tokens + u.completion_tokens)"
		  "  FROM s JOIN chat.chat_usage AS u ON u.created_at >= s.day"
		  "   AND u.user_id = s.user_id AND u.owner = s.owner), 0)::bigint",
		  UUIDOID);

/* $1 session */
CHAT_STMT(keep_usage,
		  "INSERT INTO chat.chat_usage (session_id, owner, user_id, server,"
		  "  model, kind, requests, prompt_tokens, completion_tokens,"
		  "  cached_tokens, reasoning_tokens, estimated, created_at)"
		  " SELECT s.id, s.owner, s.user_id, t.server, t.model, 'completion',"
		  "  sum(t.steps), sum(t.prompt_tokens), sum(t.completion_tokens),"
		  "  sum(COALESCE((t.usage->>'cached_tokens')::bigint, 0)),"
		  "  sum(COALESCE((t.usage->>'reasoning_tokens')::bigint, 0)),"
		  "  bool_or(COALESCE((t.usage->>'estimated')::boolean, false)),"
		  "  max(COALESCE(t.finished_at, now()))"
		  " FROM chat.chat_session AS s JOIN chat.chat_task AS t"
		  "  ON t.session_id = s.id"
		  " WHERE s.id = $1 AND t.prompt_tokens + t.completion_tokens > 0"
		  " GROUP BY s.id, s.owner, s.user_id, t.server, t.model,"
		  "  date_trunc('day', COALESCE(t.finished_at, now()), 'UTC')",
		  UUIDOID);

/* Declares the settings of usage. */
void
chat_usage_init(void)
{
	DefineCustomIntVariable("chat.max_tokens_per_user_per_day",
							"Most tokens of a user of the application in a day.",
							"Days are those of UTC; 0 is no limit.",
							&max_tokens, 0, 0, INT_MAX,
							PGC_SUSET, 0, NULL, NULL, NULL);
}

/* True if the user of a session has used up the day's tokens. */
bool
chat_usage_is_over(const pg_uuid_t *session, int64 *used, int *most)
{
	Datum		values[1] = {UUIDPGetDatum(session)};
	MemoryContext old = CurrentMemoryContext;

	*most = max_tokens;
	if (max_tokens == 0)
		return false;
	chat_db_exec(&used_today, values, NULL);
	*used = chat_db_int64(0, 1, 0);
	MemoryContextSwitchTo(old);
	return *used >= max_tokens;
}

/* Raises an error when the user of a session has used up the day's tokens. */
void
chat_usage_check(const pg_uuid_t *session)
{
	int64		used;
	int			most;

	if (chat_usage_is_over(session, &used, &most))
		ereport(ERROR,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("the user's tokens of this day are used up"),
				 errdetail("They are " INT64_FORMAT "; chat.max_tokens_per_user_per_day is %d.",
						   used, most),
				 errhint("The next day begins at midnight UTC.")));
}

/* Keeps what a session has used that is about to be deleted. */
void
chat_usage_keep(const pg_uuid_t *session)
{
	Datum		values[1] = {UUIDPGetDatum(session)};

	chat_db_exec(&keep_usage, values, NULL);
}
