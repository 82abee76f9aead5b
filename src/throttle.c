/*
 * throttle.c
 *		How much may be asked of each endpoint now, and how it has answered.
 *
 * Owns the endpoints in shared memory (ChatEndpoint, protected by
 * ChatShared.lock), and in this process which requests of its own they count:
 * those are taken back when the process ends.  A crash of any process resets
 * all of it.
 *
 * A claim first sets requests aside (reserve), so that two workers together
 * do not exceed a limit; what did not start is given back.  Requests beside
 * the turns are set aside one at a time: titles, and chat.test_server, from
 * what turns have left, and titles none while a turn waits for the same
 * server; summaries, for which turns wait, before the turns that come after.
 *
 * A 429 closes its server for the time that it asks for, else for a delay
 * that doubles with each.  Then one request is let through, and with each
 * good answer twice as many may be without one, until nothing is left of the
 * limit (T27).
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/syscache.h"
#include "utils/tuplestore.h"

#include "db.h"
#include "shmem.h"
#include "throttle.h"

/* so many requests without an answer are no limit any more */
#define FREE_BURST 1024
/* a Retry-After beyond this is not waited for, in seconds; see stream.c */
#define MAX_RETRY_AFTER 300

PG_FUNCTION_INFO_V1(chat_server_statistics);

/* $1 wrapper: the limits that its servers' options set */
CHAT_STMT(limited_servers,
		  "SELECT s.oid, s.srvname::text, o.concurrency, o.rate"
		  " FROM pg_catalog.pg_foreign_server AS s"
		  " JOIN pg_catalog.pg_foreign_data_wrapper AS w ON w.oid = s.srvfdw"
		  "  AND w.fdwname = $1"
		  " CROSS JOIN LATERAL (SELECT max(p.value) FILTER (WHERE"
		  "   p.name = 'max_concurrency') AS concurrency,"
		  "  max(p.value) FILTER (WHERE"
		  "   p.name = 'max_requests_per_minute') AS rate"
		  "  FROM (SELECT option_name AS name, CASE WHEN option_value"
		  "   ~ '^ *[0-9]{1,9} *$' THEN option_value::int END AS value"
		  "   FROM pg_catalog.pg_options_to_table(s.srvoptions)) AS p) AS o"
		  " WHERE o.concurrency > 0 OR o.rate > 0",
		  TEXTOID);

/* what of the endpoints' counts is ours */
static int	mine_open[CHAT_MAX_ENDPOINTS];
static int	mine_unanswered[CHAT_MAX_ENDPOINTS];
static int	reserved[CHAT_MAX_ENDPOINTS];
static int64 reserved_at;
/* what requests are owed that turns wait for, beside the turns */
static int	owed[CHAT_MAX_ENDPOINTS];
static bool limits_valid = false;

/* ---------- the table ---------- */

/* Forgets the limits: a server was changed. */
static void
on_server_change(Datum arg, int cache, uint32 hash)
{
	limits_valid = false;
}

/* Takes back what this process has counted, at its end. */
static void
leave(int code, Datum arg)
{
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < CHAT_MAX_ENDPOINTS; i++)
	{
		ChatEndpoint *e = &chat_endpoints[i];

		e->reserved -= reserved[i];
		e->open -= mine_open[i];
		e->unanswered -= mine_unanswered[i];
		mine_open[i] = mine_unanswered[i] = reserved[i] = 0;
	}
	LWLockRelease(chat_shared->lock);
}

/* Sees to it that leave() is called. */
static void
register_leave(void)
{
	static bool registered = false;

	if (!registered)
		before_shmem_exit(leave, (Datum) 0);
	registered = true;
}

/* True if an endpoint does not take just anything. */
static bool
is_limited(const ChatEndpoint *e)
{
	return e->max_concurrency > 0 || e->max_rate > 0 || e->burst > 0;
}

/* Finds the endpoint of a server, or makes it; -1: no place.  Needs the lock. */
static int
find_endpoint(Oid server, const char *name, int64 now)
{
	int			place = -1;
	ChatEndpoint *e;

	for (int i = 0; i < CHAT_MAX_ENDPOINTS; i++)
	{
		e = &chat_endpoints[i];
		if (e->server == server && e->database == MyDatabaseId)
		{
			e->used_at = now;
			namestrcpy(&e->name, name);
			return i;
		}
		/* free, else the one that was not used for the longest time */
		if (e->open + e->reserved == 0 && e->max_concurrency == 0 && e->max_rate == 0 &&
			(place < 0 || e->used_at < chat_endpoints[place].used_at))
			place = i;
	}
	if (place < 0)
		return -1;
	e = &chat_endpoints[place];
	memset(e, 0, sizeof(*e));
	e->database = MyDatabaseId;
	e->server = server;
	namestrcpy(&e->name, name);
	e->used_at = now;
	return place;
}

/* Reads the servers' limits again; whatever a 429 has asked for is over. */
static void
load_limits(int64 now)
{
	static bool watching = false;
	Datum		values[1] = {CStringGetTextDatum("chat_llm")};
	uint64		n;

	if (!watching)
		CacheRegisterSyscacheCallback(FOREIGNSERVEROID, on_server_change,
									  (Datum) 0);
	watching = true;
	register_leave();
	limits_valid = true;
	n = chat_db_exec(&limited_servers, values, NULL);
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < CHAT_MAX_ENDPOINTS; i++)
	{
		ChatEndpoint *e = &chat_endpoints[i];

		if (e->database != MyDatabaseId)
			continue;
		e->max_concurrency = e->max_rate = e->burst = e->strikes = 0;
		e->paused_until = 0;
	}
	for (uint64 row = 0; row < n; row++)
	{
		bool		isnull;
		char	   *name = TextDatumGetCString(chat_db_datum(row, 2, &isnull));
		int			i = find_endpoint(chat_db_oid(row, 1), name, now);

		if (i < 0)
			continue;
		chat_endpoints[i].max_concurrency = chat_db_int32(row, 3, 0);
		chat_endpoints[i].max_rate = chat_db_int32(row, 4, 0);
	}
	LWLockRelease(chat_shared->lock);
}

/* ---------- requests per minute ---------- */

/* Empties the places of seconds that are long ago. */
static void
advance(ChatEndpoint *e, int64 now)
{
	int64		second = now / 1000;
	int64		from = Max(e->second + 1, second - CHAT_RATE_SECONDS + 1);

	for (int64 s = from; s <= second; s++)
		e->requests_at[s % CHAT_RATE_SECONDS] = 0;
	e->second = Max(e->second, second);
}

/* Returns how many requests have started within the last minute. */
static int
requests_of_minute(ChatEndpoint *e, int64 now)
{
	int			n = 0;

	advance(e, now);
	for (int i = 0; i < CHAT_RATE_SECONDS; i++)
		n += e->requests_at[i];
	return n;
}

/* Returns when the oldest request of the minute will be a minute ago. */
static int64
oldest_leaves(const ChatEndpoint *e)
{
	for (int64 s = e->second - CHAT_RATE_SECONDS + 1; s <= e->second; s++)
		if (s >= 0 && e->requests_at[s % CHAT_RATE_SECONDS] > 0)
			return (s + CHAT_RATE_SECONDS) * 1000;
	return PG_INT64_MAX;
}

/* Returns how many requests an endpoint takes now, most at most. */
static int
room_of(ChatEndpoint *e, int most, int64 now)
{
	int			room = most;

	if (now < e->paused_until)
		return 0;
	if (e->max_concurrency > 0)
		room = Min(room, e->max_concurrency - e->open - e->reserved);
	if (e->max_rate > 0)
		room = Min(room, e->max_rate - requests_of_minute(e, now));
	if (e->burst > 0)
		room = Min(room, e->burst - e->unanswered - e->reserved);
	return Max(room, 0);
}

/* ---------- a claim ---------- */

/* Sets requests of an endpoint aside.  Needs the lock. */
static void
set_aside(int i, int n, int64 now)
{
	ChatEndpoint *e = &chat_endpoints[i];

	reserved[i] += n;
	e->reserved += n;
	advance(e, now);
	e->requests_at[now / 1000 % CHAT_RATE_SECONDS] += n;
}

/* Sets requests aside. */
void
chat_throttle_reserve(int most, ChatRoom *room)
{
	int64		now = chat_stream_clock();

	memset(room, 0, sizeof(*room));
	if (!limits_valid)
		load_limits(now);
	reserved_at = now;
	room->servers = palloc(sizeof(char *) * CHAT_MAX_ENDPOINTS);
	room->rooms = palloc(sizeof(int) * CHAT_MAX_ENDPOINTS);
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < CHAT_MAX_ENDPOINTS; i++)
	{
		ChatEndpoint *e = &chat_endpoints[i];

		if (e->database != MyDatabaseId || !is_limited(e))
			continue;
		set_aside(i, Max(room_of(e, most + owed[i], now) - owed[i], 0), now);
		if (reserved[i] == most)
			continue;
		room->servers[room->n] = pstrdup(NameStr(e->name));
		room->rooms[room->n++] = reserved[i];
	}
	LWLockRelease(chat_shared->lock);
}

/* Begins a look at the requests beside the turns that wait. */
void
chat_throttle_look(void)
{
	memset(owed, 0, sizeof(owed));
}

/*
 * Sets one request beside the turns aside; false if its server has no room
 * now, or turns go first.  What was refused may be free at once when it is
 * only set aside by another worker's claim: that is added to contended.
 */
bool
chat_throttle_admit(const char *server, bool awaited, bool behind, int64 now,
					bool *contended)
{
	bool		room = true;

	if (!limits_valid)
		load_limits(now);
	reserved_at = now;
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < CHAT_MAX_ENDPOINTS && room; i++)
	{
		ChatEndpoint *e = &chat_endpoints[i];

		if (e->database != MyDatabaseId || !is_limited(e) ||
			strcmp(NameStr(e->name), server) != 0)
			continue;
		room = (awaited || !behind) && room_of(e, 1, now) > 0;
		if (room)
			set_aside(i, 1, now);
		else
			*contended |= e->reserved > reserved[i];
		if (awaited && !room)
			owed[i]++;
		break;
	}
	LWLockRelease(chat_shared->lock);
	return room;
}

/* Gives back the requests that were set aside and did not start. */
void
chat_throttle_settle(void)
{
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < CHAT_MAX_ENDPOINTS; i++)
	{
		ChatEndpoint *e = &chat_endpoints[i];

		if (reserved[i] == 0)
			continue;
		e->reserved -= reserved[i];
		advance(e, chat_stream_clock());
		if (reserved_at / 1000 > e->second - CHAT_RATE_SECONDS)
			e->requests_at[reserved_at / 1000 % CHAT_RATE_SECONDS] -=
				reserved[i];
		reserved[i] = 0;
	}
	LWLockRelease(chat_shared->lock);
}

/*
 * Returns when a server opens again that was closed for a time when it was
 * asked last.  Maybe that time has come since: then it is due at once, for
 * nothing else would tell.
 */
int64
chat_throttle_due(void)
{
	int64		now = chat_stream_clock();
	int64		due = PG_INT64_MAX;

	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < CHAT_MAX_ENDPOINTS; i++)
	{
		ChatEndpoint *e = &chat_endpoints[i];

		if (e->database != MyDatabaseId)
			continue;
		if (reserved_at < e->paused_until)
			due = Min(due, e->paused_until);
		else if (e->max_rate > 0 && requests_of_minute(e, now) >= e->max_rate)
			due = Min(due, oldest_leaves(e));
		else if (e->max_rate > 0 && now / 1000 > reserved_at / 1000)
			due = Min(due, now);
	}
	LWLockRelease(chat_shared->lock);
	return due;
}

/* ---------- a request ---------- */

/* Counts a request that starts; returns its endpoint.  Needs the lock. */
static int
start_request(const ChatServer *server, int64 now)
{
	int			i = find_endpoint(server->oid, server->name, now);
	ChatEndpoint *e = &chat_endpoints[Max(i, 0)];

	if (i < 0)
		return -1;
	e->requests++;
	mine_open[i]++;
	mine_unanswered[i]++;
	e->open++;
	e->unanswered++;
	if (reserved[i] > 0)
	{
		reserved[i]--;
		e->reserved--;
	}
	else
	{
		advance(e, now);
		e->requests_at[now / 1000 % CHAT_RATE_SECONDS]++;
	}
	return i;
}

/* Counts a turn's request that starts. */
void
chat_throttle_start(ChatStream *s)
{
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	s->endpoint = start_request(s->server, chat_stream_clock());
	s->answered = false;
	LWLockRelease(chat_shared->lock);
}

/* Counts a request beside the turns that starts; returns its endpoint. */
int
chat_throttle_begin(const ChatServer *server)
{
	int			i;

	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	i = start_request(server, chat_stream_clock());
	LWLockRelease(chat_shared->lock);
	return i;
}

/*
 * Counts a request that a backend makes; false if its server has no room, and
 * closed says for how many ms a 429 keeps it closed.
 */
bool
chat_throttle_ask(const ChatServer *server, int *endpoint, int64 *closed)
{
	int64		now = chat_stream_clock();
	bool		room = true;
	int			i;

	register_leave();
	*closed = 0;
	*endpoint = -1;
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	i = find_endpoint(server->oid, server->name, now);
	if (i >= 0)
	{
		ChatEndpoint *e = &chat_endpoints[i];

		/* maybe no worker has looked at the server's options yet */
		e->max_concurrency = server->max_concurrency;
		e->max_rate = server->max_rpm;
		room = room_of(e, 1, now) > 0;
		*closed = Max(e->paused_until - now, 0);
	}
	if (room)
		*endpoint = start_request(server, now);
	LWLockRelease(chat_shared->lock);
	return room;
}

/* Notes that a request has an answer, good or bad.  Needs the lock. */
static void
note_answer(ChatStream *s, ChatEndpoint *e)
{
	if (s->answered)
		return;
	s->answered = true;
	mine_unanswered[s->endpoint]--;
	e->unanswered--;
}

/* Takes a request off its endpoint; true if that is limited.  Needs the lock. */
static bool
leave_endpoint(int i)
{
	mine_open[i]--;
	chat_endpoints[i].open--;
	return is_limited(&chat_endpoints[i]);
}

/* Takes a good answer: a server that had enough may be asked for more. */
static void
open_wider(ChatEndpoint *e)
{
	e->strikes = 0;
	if (e->burst > 0 && (e->burst *= 2) >= FREE_BURST)
		e->burst = 0;
}

/* Counts the first content of an answer. */
void
chat_throttle_answered(ChatStream *s)
{
	ChatEndpoint *e;

	if (s->endpoint < 0 || s->answered)
		return;
	e = &chat_endpoints[s->endpoint];
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	note_answer(s, e);
	open_wider(e);
	e->first_tokens++;
	e->first_token_last = s->first_content_at - s->opened_at;
	e->first_token_time += e->first_token_last;
	LWLockRelease(chat_shared->lock);
}

/* Closes an endpoint that has had enough.  Needs the lock. */
static void
take_429(ChatEndpoint *e, long after, int64 now)
{
	int64		until;

	e->rate_limited++;
	if (after > MAX_RETRY_AFTER)
		return;
	/* those that were sent together are one */
	if (now >= e->paused_until)
		e->strikes++;
	until = now + (after > 0 ? after * 1000
				   : chat_stream_backoff(e->strikes));
	if (after > 0 || now >= e->paused_until)
		e->paused_until = Max(e->paused_until, until);
	e->burst = 1;
}

/* Counts how a request has ended.  Needs the lock. */
static void
count_end(ChatEndpoint *e, ChatEndKind kind)
{
	switch (kind)
	{
		case CHAT_END_COMPLETED:
		case CHAT_END_TOOLS:
			e->completed++;
			break;
		case CHAT_END_FAILED:
			e->failed++;
			break;
		case CHAT_END_CANCELLED:
			e->cancelled++;
			break;
		case CHAT_END_RETRY:
			e->retried++;
			break;
		case CHAT_END_GIVE_BACK:
			break;
	}
}

/*
 * Counts the end of a request; true if its server takes no more than so many,
 * so that others may wait for this end.
 */
bool
chat_throttle_end(ChatStream *s)
{
	int64		now = chat_stream_clock();
	ChatEndpoint *e;
	bool		limited;

	if (s->endpoint < 0)
		return false;
	e = &chat_endpoints[s->endpoint];
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	note_answer(s, e);
	count_end(e, s->end.kind);
	if (s->first_content_at > 0 && s->end.usage)
	{
		e->tokens += s->end.completion_tokens;
		e->token_time += now - s->first_content_at;
	}
	if (s->failure == CHAT_ERROR_RATE_LIMITED && s->passing)
		take_429(e, s->transfer ? s->transfer->retry_after : -1, now);
	else if (s->end.kind == CHAT_END_COMPLETED || s->end.kind == CHAT_END_TOOLS)
		e->strikes = 0;
	limited = leave_endpoint(s->endpoint);
	s->endpoint = -1;
	LWLockRelease(chat_shared->lock);
	return limited;
}

/*
 * Counts the end of a request beside the turns; after = what a 429 has asked
 * for, in seconds (0 = it said nothing), -1 = it was none.  Wakes those that
 * may wait for this end, but not this process.
 */
void
chat_throttle_finish(int endpoint, ChatEndKind kind, long after)
{
	ChatEndpoint *e = &chat_endpoints[Max(endpoint, 0)];
	bool		limited;

	if (endpoint < 0)
		return;
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	mine_unanswered[endpoint]--;
	e->unanswered--;
	count_end(e, kind);
	if (after >= 0)
		take_429(e, after, chat_stream_clock());
	else if (kind == CHAT_END_COMPLETED)
		open_wider(e);
	limited = leave_endpoint(endpoint);
	LWLockRelease(chat_shared->lock);
	if (limited)
		chat_shmem_ring(MyDatabaseId, false);
}

/* ---------- statistics ---------- */

/* Adds the row of one endpoint. */
static void
put_endpoint(ReturnSetInfo *rsinfo, ChatEndpoint *e, int64 now)
{
	int64		pause = Max(e->paused_until - now, 0);
	Datum		values[] = {
		ObjectIdGetDatum(e->server),
		NameGetDatum(&e->name),
		Int64GetDatum(e->open),
		Int64GetDatum(e->requests),
		Int64GetDatum(e->completed),
		Int64GetDatum(e->failed),
		Int64GetDatum(e->cancelled),
		Int64GetDatum(e->retried),
		Int64GetDatum(e->rate_limited),
		Int64GetDatum(e->first_tokens),
		Float8GetDatum(e->first_token_time / 1000.0),
		Float8GetDatum(e->first_token_last / 1000.0),
		Int64GetDatum(e->tokens),
		Float8GetDatum(e->token_time / 1000.0),
		/* what a claim has set aside for this moment is no request */
		Int64GetDatum(requests_of_minute(e, now) - e->reserved),
		Float8GetDatum(pause / 1000.0)
	};
	bool		nulls[lengthof(values)] = {0};

	nulls[11] = e->first_tokens == 0;
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

/* server_statistics: the endpoints of this database. */
Datum
chat_server_statistics(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	ChatEndpoint *copy;

	InitMaterializedSRF(fcinfo, 0);
	if (chat_shared == NULL)
		return (Datum) 0;
	copy = palloc(sizeof(ChatEndpoint) * CHAT_MAX_ENDPOINTS);
	LWLockAcquire(chat_shared->lock, LW_SHARED);
	memcpy(copy, chat_endpoints, sizeof(ChatEndpoint) * CHAT_MAX_ENDPOINTS);
	LWLockRelease(chat_shared->lock);
	for (int i = 0; i < CHAT_MAX_ENDPOINTS; i++)
		if (copy[i].database == MyDatabaseId)
			put_endpoint(rsinfo, &copy[i], chat_stream_clock());
	return (Datum) 0;
}
