/*
 * httptool.c
 *		HTTP tools: a POST of the arguments to a server of wrapper chat_tool.
 *
 * Owns the list of calls that this worker has under way, local to the
 * process.  A call is claimed and committed before its request leaves, so
 * that a callback that overtakes the answer finds its row (T54); its result
 * is stored by a later transaction.  A worker that dies in between leaves an
 * orphan: it runs again only if the tool is idempotent, else its outcome is
 * unknown (queue.c).
 *
 * 202, or the answer {"status": "accepted"}, says that the operation goes on
 * elsewhere and ends by chat.complete_operation().
 */
#include "postgres.h"

#include <math.h>

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "lib/ilist.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#include "db.h"
#include "http.h"
#include "httptool.h"
#include "jsonbuf.h"
#include "stream.h"
#include "tool.h"
#include "toolserver.h"
#include "turn.h"

/* largest result, in bytes; what the model is shown of it is shorter */
#define MAX_RESULT (16 * 1024 * 1024)
/* of an error body this much is told */
#define MAX_TOLD 500
/* delays before a result is stored whose task is locked, in ms */
#define MIN_BACKOFF 10
#define MAX_BACKOFF 1000
#define DEFAULT_RETRIES 2

typedef struct HttpCall
{
	dlist_node	node;
	MemoryContext context;
	int64		job;
	int64		epoch;
	pg_uuid_t	session;
	pg_uuid_t	task;
	pg_uuid_t	operation;
	Oid			owner;
	int			attempts;
	bool		idempotent;
	bool		long_running;
	char	   *call_id;
	char	   *name;
	char	   *input;
	char	   *server_name;
	char	   *path;
	int64		timeout;		/* ms */
	ChatToolServer *server;
	char	   *key;
	ChatTransfer *transfer;
	int64		due;			/* chat_stream_clock() */
	bool		ended;
	bool		accepted;
	bool		failed;
	TimestampTz retry_at;		/* 0 = no retry */
	char	   *result;
	bool		stored;			/* in the transaction that is under way */
	int			store_tries;	/* that found the task locked */
	int64		store_at;		/* not before this time */
} HttpCall;

static dlist_head calls = DLIST_STATIC_INIT(calls);	/* under way */
static dlist_head claimed = DLIST_STATIC_INIT(claimed); /* not yet committed */
static int	npending = 0;		/* of calls: ended, not stored */

/* $1 holder, $2 limit, $3 database */
CHAT_STMT(claim_http,
		  "WITH picked AS MATERIALIZED ("
		  " SELECT j.id FROM chat.chat_job AS j"
		  " WHERE j.tool_kind = 'http' AND j.holder IS NULL"
		  "  AND j.database = $3 AND j.run_at <= now()"
		  " ORDER BY j.run_at, j.id LIMIT $2 FOR UPDATE SKIP LOCKED"
		  "), job AS ("
		  " UPDATE chat.chat_job AS j SET holder = $1, epoch = j.epoch + 1,"
		  "  attempts = j.attempts + 1"
		  " FROM picked AS p WHERE j.id = p.id"
		  " RETURNING j.id, j.epoch, j.session_id, j.task_id,"
		  "  j.operation_id, j.owner, j.attempts"
		  "), call AS ("
		  " UPDATE chat.chat_tool_call AS c SET status = 'running',"
		  "  started_at = COALESCE(c.started_at, now()) FROM job"
		  " WHERE c.operation_id = job.operation_id AND c.ended_at IS NULL"
		  " RETURNING c.*)"
		  " SELECT j.id, j.epoch, j.session_id, j.task_id, j.operation_id,"
		  "  j.owner, j.attempts, c.idempotent, c.call_id, c.name,"
		  "  COALESCE(c.input, '{}')::text, t.server::text, t.path,"
		  "  COALESCE((extract(epoch FROM c.timeout) * 1000)::bigint, -1),"
		  "  c.long_running"
		  " FROM job AS j JOIN call AS c ON c.operation_id = j.operation_id"
		  " LEFT JOIN chat.chat_tool AS t ON t.id = c.tool_id AND t.enabled"
		  " ORDER BY j.id",
		  INT8OID, INT4OID, OIDOID);

/*
 * $1 session, $2 task: the first lock of all who end a call.  Nobody is
 * waited for: an application may hold the job for long.
 */
CHAT_STMT(lock_parked,
		  "SELECT id FROM chat.chat_job WHERE session_id = $1 AND task_id = $2"
		  " AND kind = 'completion' FOR UPDATE SKIP LOCKED",
		  UUIDOID, UUIDOID);

/* the same without the lock */
CHAT_STMT(find_parked,
		  "SELECT id FROM chat.chat_job WHERE session_id = $1 AND task_id = $2"
		  " AND kind = 'completion'",
		  UUIDOID, UUIDOID);

/*
 * $1 job, $2 epoch, $3 holder, $4 operation, $5 accepted, $6 status,
 * $7 result, $8 time of an operation in ms, $9 session, $10 task
 */
CHAT_STMT(store_http,
		  "WITH gone AS ("
		  " DELETE FROM chat.chat_job WHERE id = $1 AND epoch = $2"
		  "  AND " CHAT_HELD_BY("$3") " RETURNING id"
		  "), call AS ("
		  " UPDATE chat.chat_tool_call AS c SET"
		  "  status = CASE WHEN $5 THEN 'waiting' ELSE $6 END,"
		  "  result = CASE WHEN $5 THEN NULL ELSE $7 END,"
		  "  ended_at = CASE WHEN $5 THEN NULL ELSE now() END,"
		  "  long_running = c.long_running OR $5,"
		  "  deadline = CASE WHEN $5"
		  "   THEN now() + COALESCE(c.timeout, $8 * '1 ms'::interval)"
		  "   ELSE c.deadline END"
		  " FROM gone WHERE c.operation_id = $4 AND c.ended_at IS NULL)"
		  " UPDATE chat.chat_job SET run_at = '-infinity'"
		  " WHERE session_id = $9 AND task_id = $10 AND kind = 'completion'"
		  "  AND parked",
		  INT8OID, INT8OID, INT8OID, UUIDOID, BOOLOID, TEXTOID, TEXTOID,
		  INT8OID, UUIDOID, UUIDOID);

/* $1 job, $2 epoch, $3 holder, $4 run at */
CHAT_STMT(retry_http,
		  "UPDATE chat.chat_job SET holder = NULL, run_at = $4"
		  " WHERE id = $1 AND epoch = $2 AND " CHAT_HELD_BY("$3"),
		  INT8OID, INT8OID, INT8OID, TIMESTAMPTZOID);

/* Frees a call that is in no list. */
static void
free_call(HttpCall *c)
{
	if (c->transfer)
		chat_http_close(c->transfer);
	if (c->key)
		explicit_bzero(c->key, strlen(c->key));
	MemoryContextDelete(c->context);
}

/* Builds the result of a call that failed; what came may quote the key. */
static char *
error_result(HttpCall *c, const char *what, const char *code)
{
	return chat_tool_error(c->name, chat_server_redact(what, c->key), code);
}

/* Notes how a call ended. */
static void
end_call(HttpCall *c, bool failed, const char *result)
{
	if (c->ended)
		return;
	/* first what may fail */
	c->result = pstrdup(result);
	c->ended = true;
	c->failed = failed;
	npending++;
}

/* Reads one row of claim_http. */
static HttpCall *
read_call(uint64 row)
{
	MemoryContext context = AllocSetContextCreate(TopMemoryContext,
												  "chat HTTP tool call",
												  ALLOCSET_SMALL_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	HttpCall   *c = palloc0(sizeof(HttpCall));

	c->context = context;
	c->job = chat_db_int64(row, 1, 0);
	c->epoch = chat_db_int64(row, 2, 0);
	c->session = chat_db_uuid(row, 3);
	c->task = chat_db_uuid(row, 4);
	c->operation = chat_db_uuid(row, 5);
	c->owner = chat_db_oid(row, 6);
	c->attempts = chat_db_int32(row, 7, 0);
	c->idempotent = chat_db_bool(row, 8);
	c->call_id = chat_db_text(row, 9);
	c->name = chat_db_text(row, 10);
	c->input = chat_db_text(row, 11);
	c->server_name = chat_db_text(row, 12);
	c->path = chat_db_text(row, 13);
	c->timeout = chat_db_int64(row, 14, -1);
	c->long_running = chat_db_bool(row, 15);
	MemoryContextSwitchTo(old);
	return c;
}

/* Reads a call's server and key; an error ends the call. */
static void
prepare(HttpCall *c)
{
	MemoryContext old = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;

	BeginInternalSubTransaction(NULL);
	PG_TRY();
	{
		MemoryContextSwitchTo(c->context);
		if (c->server_name == NULL)
			ereport(ERROR,
					(errcode(ERRCODE_UNDEFINED_OBJECT),
					 errmsg("the tool does not exist any more")));
		c->server = chat_tool_server_load(c->server_name, false);
		chat_tool_server_check(c->server_name, c->owner, true);
		c->key = chat_server_key(&c->server->endpoint, c->owner);
		if (c->timeout < 0)
			c->timeout = c->server->endpoint.stream_timeout;
		if (c->timeout < 0)
			c->timeout = c->long_running ? chat_turn_operation_timeout()
				: chat_tool_default_timeout();
		MemoryContextSwitchTo(old);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(c->context);
		edata = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(c->context);
		end_call(c, true, error_result(c, edata->message, "tool_not_available"));
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	CurrentResourceOwner = owner;
}

/* Takes calls that wait. */
int
chat_httptool_claim(int64 holder, int most)
{
	Datum		values[3];
	dlist_iter	iter;
	uint64		n;

	values[0] = Int64GetDatum(holder);
	values[1] = Int32GetDatum(most);
	values[2] = ObjectIdGetDatum(MyDatabaseId);
	n = chat_db_exec(&claim_http, values, NULL);
	for (uint64 row = 0; row < n; row++)
		dlist_push_tail(&claimed, &read_call(row)->node);
	dlist_foreach(iter, &claimed)
		prepare(dlist_container(HttpCall, node, iter.cur));
	return (int) n;
}

/* Returns a uuid in its text form. */
static char *
uuid_text(const pg_uuid_t *id)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(id)));
}

/* Returns a text that can stand in a header: what a model chose is hostile. */
static char *
header_safe(const char *text)
{
	char	   *safe = pstrdup(text);

	for (char *p = safe; *p; p++)
		if (*p < 0x21 || *p > 0x7e)
			*p = '?';
	return safe;
}

/* Builds the body: the arguments, with the ids if the server wants them. */
static char *
request_body(const HttpCall *c)
{
	char	   *ids;
	Jsonb	   *both;

	if (!c->server->ids_in_body)
		return c->input;
	ids = psprintf("{\"_operation_id\":\"%s\",\"_task_id\":\"%s\"}",
				   uuid_text(&c->operation), uuid_text(&c->task));
	both = DatumGetJsonbP(DirectFunctionCall2(jsonb_concat,
											  DirectFunctionCall1(jsonb_in, CStringGetDatum(c->input)),
											  DirectFunctionCall1(jsonb_in, CStringGetDatum(ids))));
	return JsonbToCString(NULL, &both->root, VARSIZE(both));
}

/* Sends a call's request. */
static void
send_request(HttpCall *c)
{
	ChatServer *endpoint = &c->server->endpoint;
	ChatHttpRequest req = {0};
	char	  **headers;
	char	  **all;
	int			n = chat_server_headers(endpoint, c->key, &headers);
	char	   *operation = uuid_text(&c->operation);

	all = palloc(sizeof(char *) * (n + 5));
	memcpy(all, headers, sizeof(char *) * n);
	all[n] = psprintf("X-Chat-Session-Id: %s", uuid_text(&c->session));
	all[n + 1] = psprintf("X-Chat-Task-Id: %s", uuid_text(&c->task));
	all[n + 2] = psprintf("X-Chat-Tool-Call-Id: %s", header_safe(c->call_id));
	all[n + 3] = psprintf("X-Chat-Operation-Id: %s", operation);
	all[n + 4] = psprintf("Idempotency-Key: %s", operation);
	req.url = c->path ? chat_server_url(endpoint, c->path)
		: endpoint->base_url;
	req.body = request_body(c);
	req.body_len = strlen(req.body);
	req.headers = (const char *const *) all;
	req.nheaders = n + 5;
	req.ca_file = endpoint->ca_file;
	req.proxy = endpoint->proxy;
	req.connect_timeout = endpoint->connect_timeout >= 0
		? endpoint->connect_timeout : 10000;
	req.allow_loopback = endpoint->is_loopback;
	req.allow_private = endpoint->allow_private;
	req.max_body = MAX_RESULT;
	req.once = !c->idempotent;
	c->due = chat_stream_clock() + c->timeout;
	c->transfer = chat_http_open(&req, c);
	c->transfer->kind = CHAT_TRANSFER_TOOL;
	for (int i = 0; i < n; i++)
		explicit_bzero(headers[i], strlen(headers[i]));
}

/* Sends the requests of the calls that were claimed. */
void
chat_httptool_open(bool committed)
{
	while (!dlist_is_empty(&claimed))
	{
		HttpCall   *c = dlist_container(HttpCall, node,
										dlist_pop_head_node(&claimed));
		MemoryContext old;

		if (!committed)
		{
			npending -= c->ended;
			free_call(c);
			continue;
		}
		dlist_push_tail(&calls, &c->node);
		if (c->ended)
			continue;
		old = MemoryContextSwitchTo(c->context);
		PG_TRY();
		{
			send_request(c);
		}
		PG_CATCH();
		{
			ErrorData  *edata;

			MemoryContextSwitchTo(c->context);
			edata = CopyErrorData();
			FlushErrorState();
			end_call(c, true, error_result(c, edata->message, "internal"));
		}
		PG_END_TRY();
		MemoryContextSwitchTo(old);
	}
}

/* Plans another attempt at a call that may be repeated; false if it may not. */
static bool
plan_retry(HttpCall *c)
{
	int			retries = c->server->endpoint.retries >= 0
	? c->server->endpoint.retries : DEFAULT_RETRIES;
	int64		delay = 500 * (int64) pow(2, Min(c->attempts - 1, 6));

	if (!c->idempotent || c->attempts > retries)
		return false;
	if (c->transfer && c->transfer->retry_after > 0)
		delay = Max(delay, Min(c->transfer->retry_after, 300) * 1000);
	c->retry_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), delay);
	end_call(c, true, "");
	return true;
}

/* Returns a body as text that can be stored. */
static char *
body_text(const ChatTransfer *t, size_t most)
{
	size_t		len = Min(t->len, most);
	size_t		need;
	char	   *text;

	if (chat_utf8_check(t->buf, len, &need))
		return pnstrdup(t->buf ? t->buf : "", len);
	text = palloc(need + 1);
	text[chat_utf8_clean(t->buf, len, text)] = '\0';
	return text;
}

/* Judges the answer. */
static void
settle(HttpCall *c)
{
	ChatTransfer *t = c->transfer;
	bool		success = t->end == CHAT_HTTP_OK && t->status >= 200 &&
	t->status <= 299;
	char	   *text;

	if (success)
	{
		text = body_text(t, MAX_RESULT);
		c->accepted = t->status == 202 || chat_tool_is_accepted(text);
		/* a service may tell what it was sent */
		if (c->key && strstr(text, c->key))
			text = chat_server_redact(text, c->key);
		end_call(c, false, text);
		return;
	}
	if (t->end != CHAT_HTTP_TOO_LARGE && t->end != CHAT_HTTP_FORBIDDEN &&
		t->end != CHAT_HTTP_FATAL && plan_retry(c))
		return;
	if (t->end == CHAT_HTTP_TOO_LARGE)
		end_call(c, true, error_result(c, "the result is too large", "result_too_large"));
	else if (t->end == CHAT_HTTP_FORBIDDEN)
		end_call(c, true, error_result(c, "the service's address is private and the server's option allow_private is off", "forbidden_address"));
	else if (t->end != CHAT_HTTP_OK)
		end_call(c, true, error_result(c, t->error, "no_answer"));
	else
		end_call(c, true,
				 error_result(c, psprintf("HTTP status %d: %s", t->status,
										  body_text(t, MAX_TOLD)),
							  psprintf("http_%d", t->status)));
}

/* Takes what a transfer has received. */
bool
chat_httptool_receive(ChatTransfer *t)
{
	HttpCall   *c = t->owner;
	MemoryContext old;

	if (!t->done || c->ended)
		return c->ended;
	old = MemoryContextSwitchTo(c->context);
	PG_TRY();
	{
		settle(c);
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(c->context);
		edata = CopyErrorData();
		FlushErrorState();
		end_call(c, true, error_result(c, edata->message, "internal"));
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	return true;
}

/* Fails what takes too long. */
int64
chat_httptool_check_time(int64 now)
{
	int64		due = PG_INT64_MAX;
	dlist_iter	iter;

	dlist_foreach(iter, &calls)
	{
		HttpCall   *c = dlist_container(HttpCall, node, iter.cur);
		MemoryContext old;

		if (c->ended)
			continue;
		if (now < c->due)
		{
			due = Min(due, c->due);
			continue;
		}
		old = MemoryContextSwitchTo(c->context);
		chat_http_close(c->transfer);
		c->transfer = NULL;
		if (!plan_retry(c))
			end_call(c, true,
					 error_result(c, "it gave no answer in time", "timeout"));
		MemoryContextSwitchTo(old);
	}
	return due;
}

/* Returns when results are to be stored, PG_INT64_MAX if there are none. */
int64
chat_httptool_due(void)
{
	int64		due = PG_INT64_MAX;
	dlist_iter	iter;

	if (npending == 0)
		return due;
	dlist_foreach(iter, &calls)
	{
		HttpCall   *c = dlist_container(HttpCall, node, iter.cur);

		if (c->ended)
			due = Min(due, c->store_at);
	}
	return due;
}

/* True if somebody else holds the job of a call's task. */
static bool
is_held(const HttpCall *c)
{
	Datum		values[2] = {UUIDPGetDatum(&c->session),
	UUIDPGetDatum(&c->task)};

	return chat_db_exec(&lock_parked, values, NULL) == 0 &&
		chat_db_exec(&find_parked, values, NULL) > 0;
}

/* Stores one result; false if that has to wait. */
static bool
store(int64 holder, const HttpCall *c)
{
	Datum		values[10];

	values[0] = Int64GetDatum(c->job);
	values[1] = Int64GetDatum(c->epoch);
	values[2] = Int64GetDatum(holder);
	if (c->retry_at != 0)
	{
		values[3] = TimestampTzGetDatum(c->retry_at);
		chat_db_exec(&retry_http, values, NULL);
		return true;
	}
	if (is_held(c))
		return false;
	values[3] = UUIDPGetDatum(&c->operation);
	values[4] = BoolGetDatum(c->accepted);
	values[5] = CStringGetTextDatum(c->failed ? "failed" : "completed");
	values[6] = CStringGetTextDatum(c->result);
	values[7] = Int64GetDatum((int64) chat_turn_operation_timeout());
	values[8] = UUIDPGetDatum(&c->session);
	values[9] = UUIDPGetDatum(&c->task);
	chat_db_exec(&store_http, values, NULL);
	return true;
}

/* Stores the results that are due. */
void
chat_httptool_store(int64 holder)
{
	int64		now = chat_stream_clock();
	dlist_iter	iter;

	dlist_foreach(iter, &calls)
	{
		HttpCall   *c = dlist_container(HttpCall, node, iter.cur);

		c->stored = false;
		if (!c->ended || c->store_at > now)
			continue;
		c->stored = store(holder, c);
		if (!c->stored)
			c->store_at = now + Min(MIN_BACKOFF << Min(c->store_tries++, 10),
									MAX_BACKOFF);
	}
}

/*
 * Forgets the calls whose results are stored; those that were not, because
 * the transaction failed, are tried again after delay ms.
 */
void
chat_httptool_stored(bool committed, int delay)
{
	int64		now = chat_stream_clock();
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &calls)
	{
		HttpCall   *c = dlist_container(HttpCall, node, iter.cur);

		if (!c->ended)
			continue;
		if (!committed)
			c->store_at = Max(c->store_at, now + delay);
		else if (c->stored)
		{
			npending--;
			dlist_delete(&c->node);
			free_call(c);
		}
	}
}

/* Ends the requests whose jobs are gone. */
void
chat_httptool_keep(const int64 *ids, int n)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &calls)
	{
		HttpCall   *c = dlist_container(HttpCall, node, iter.cur);
		bool		found = false;

		for (int i = 0; i < n && !found; i++)
			found = ids[i] == c->job;
		if (found)
			continue;
		npending -= c->ended;
		dlist_delete(&c->node);
		free_call(c);
	}
}

/* True if no call is under way. */
bool
chat_httptool_idle(void)
{
	return dlist_is_empty(&calls) && dlist_is_empty(&claimed);
}
