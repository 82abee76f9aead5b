/*
 * usage.c
 *		What users have used, and how much they may.
 *
 * Owns the limit of a day and the statements on chat.chat_usage that are not
 * side.c's.  The tokens of turns stand on their tasks; the table has what no
 * task tells: titles, summaries, and the turns of sessions that are gone, so
 * that nobody gets tokens back by deleting a session.
 *
 * The limit is a setting like any other, so a call has that of its connection.
 * A worker serves all roles: it reads what ALTER ROLE and ALTER DATABASE have
 * set for the owner of a session, as a connection of that role would begin
 * with.
 */
#include "postgres.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "utils/guc.h"

#include "db.h"
#include "usage.h"

#define LIMIT "chat.max_tokens_per_user_per_day"

static int	max_tokens = 0;
static int	configured = 0;		/* by the server's configuration alone */

/*
 * $1 database, $2 role: what is set for them, what is more special first; see
 * process_settings() of PostgreSQL
 */
CHAT_STMT(find_limit,
		  "SELECT substr(c.entry, length('" LIMIT "=') + 1)"
		  " FROM pg_catalog.pg_db_role_setting AS s"
		  " CROSS JOIN LATERAL unnest(s.setconfig) AS c (entry)"
		  " WHERE s.setdatabase IN ($1, 0) AND s.setrole IN ($2, 0)"
		  "  AND lower(c.entry) LIKE '" LIMIT "=%'"
		  " ORDER BY s.setrole = 0, s.setdatabase = 0 LIMIT 1",
		  OIDOID, OIDOID);

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

/*
 * Takes what the server's configuration says of the limit; what is set for a
 * database or a role is of higher sources.
 */
static bool
check_limit(int *value, void **extra, GucSource source)
{
	if (source <= PGC_S_ARGV)
		configured = *value;
	return true;
}

/* Declares the settings of usage. */
void
chat_usage_init(void)
{
	DefineCustomIntVariable(LIMIT,
							"Most tokens of a user of the application in a day.",
							"Days are those of UTC; 0 is no limit.",
							&max_tokens, 0, 0, INT_MAX,
							PGC_SUSET, 0, check_limit, NULL, NULL);
}

/* Reads the limit that a connection of a role would begin with. */
static int
read_limit(Oid owner)
{
	Datum		values[2] = {ObjectIdGetDatum(MyDatabaseId),
	ObjectIdGetDatum(owner)};
	MemoryContext old = CurrentMemoryContext;
	int			limit = configured;

	if (chat_db_exec(&find_limit, values, NULL) > 0)
		(void) parse_int(chat_db_text(0, 1), &limit, 0, NULL);
	MemoryContextSwitchTo(old);
	return limit;
}

/*
 * Returns the limit for the sessions of a role.  A claim reads it once where
 * its turns are of the same role.
 */
int
chat_usage_limit(Oid owner)
{
	static TransactionId read_in = InvalidTransactionId;
	static Oid	read_of = InvalidOid;
	static int	limit;
	TransactionId now = GetTopTransactionIdIfAny();

	if (!TransactionIdIsValid(now) || read_in != now || read_of != owner)
		limit = read_limit(owner);
	read_in = now;
	read_of = owner;
	return limit;
}

/* True if the user of a session has used that many tokens today. */
bool
chat_usage_is_over(const pg_uuid_t *session, int most, int64 *used)
{
	Datum		values[1] = {UUIDPGetDatum(session)};
	MemoryContext old = CurrentMemoryContext;

	if (most == 0)
		return false;
	chat_db_exec(&used_today, values, NULL);
	*used = chat_db_int64(0, 1, 0);
	MemoryContextSwitchTo(old);
	return *used >= most;
}

/* Raises an error when the caller's limit is reached. */
void
chat_usage_check(const pg_uuid_t *session)
{
	int64		used;

	if (chat_usage_is_over(session, max_tokens, &used))
		ereport(ERROR,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("the user's tokens of this day are used up"),
				 errdetail("They are " INT64_FORMAT "; " LIMIT " is %d.",
						   used, max_tokens),
				 errhint("The next day begins at midnight UTC.")));
}

/* Keeps what a session has used that is about to be deleted. */
void
chat_usage_keep(const pg_uuid_t *session)
{
	Datum		values[1] = {UUIDPGetDatum(session)};

	chat_db_exec(&keep_usage, values, NULL);
}
