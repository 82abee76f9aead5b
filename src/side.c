/*
 * side.c
 *		Requests that the worker makes beside the turns.
 *
 * Owns the list of those that this worker has under way, local to the
 * process.  A request that has a job is claimed like any other; its job is
 * deleted with what it stores, so a worker that dies in between leaves an
 * orphan that is made again.  None of them waits for an application: a
 * session that somebody holds locked gets its result later.
 *
 * A request to an LLM endpoint counts there like a turn's (throttle.c).  One
 * that a turn waits for (a summary) goes like that turn, which had its claim
 * already: before the turns that come after.  Those that nobody waits for
 * (titles) let all others go first, and only so many are under way at a time.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#include "db.h"
#include "notice.h"
#include "side.h"
#include "shmem.h"
#include "stream.h"
#include "throttle.h"
#include "tokens.h"
#include "usage.h"

/* longest time of a request, in ms */
#define MAX_TIME 30000
/* largest answer, in bytes */
#define MAX_ANSWER (1024 * 1024)
/* of an error body this much is told */
#define MAX_TOLD 65536
/* what another worker's claim has set aside is free again in so many ms */
#define CONTENDED_DELAY 100
/* titles that are under way at a time */
#define MAX_TITLES 32
/* a job that took so many workers down is not tried again */
#define MAX_CRASHES 3
#define MIN_DELAY 10
#define MAX_DELAY 1000
/* results that the database refuses are given up after so many tries */
#define MAX_TRIES 10

/* the types that have jobs */
static const ChatSideType *types[2];
static int	ntypes = 0;

static dlist_head sides = DLIST_STATIC_INIT(sides); /* under way */
static dlist_head asked = DLIST_STATIC_INIT(asked); /* not yet committed */

/* jobs whose servers have no room: when to look again, and what was seen */
static int64 look_at = PG_INT64_MAX;
static bool refused = false;
static bool contended = false;
static bool urgent = false;		/* turns may wait for some of them */

#define WAITING(db) \
	" j.holder IS NULL AND j.kind IN ('title', 'summary') AND j.database = " db

/* $1 jobs of one server that wait, the first ones: for them turns wait, or not */
#define FIRST(condition, most) \
	" (SELECT j.id, j.priority FROM chat.chat_job AS j WHERE" WAITING("$1") \
	"  AND j.server = b.server AND j.run_at <= now() AND j.priority " \
	condition " ORDER BY j.priority, j.id LIMIT " most ")"

/*
 * $1 database, $2 most of each server that turns wait for, $3 of others: jobs
 * that wait, whether a turn waits for them, and whether turns wait for the
 * same server
 */
CHAT_STMT(list_sides,
		  "WITH RECURSIVE place (server) AS ("
		  " (SELECT j.server FROM chat.chat_job AS j WHERE" WAITING("$1")
		  "  ORDER BY j.server LIMIT 1)"
		  " UNION ALL"
		  " SELECT n.server FROM place AS p CROSS JOIN LATERAL"
		  "  (SELECT j.server FROM chat.chat_job AS j WHERE" WAITING("$1")
		  "   AND j.server > p.server ORDER BY j.server LIMIT 1) AS n)"
		  " SELECT c.id, b.server::text, c.priority < " CHAT_SIDE_IDLE ","
		  "  b.behind"
		  " FROM (SELECT p.server, EXISTS (SELECT FROM chat.chat_job AS t"
		  "   WHERE t.holder IS NULL AND t.kind = 'completion'"
		  "    AND NOT t.parked AND t.database = $1 AND t.server = p.server"
		  "    AND t.run_at <= now()) AS behind FROM place AS p OFFSET 0) AS b"
		  " CROSS JOIN LATERAL (" FIRST("< " CHAT_SIDE_IDLE, "$2")
		  "  UNION ALL" FIRST(">= " CHAT_SIDE_IDLE, "$3") ") AS c"
		  " ORDER BY c.priority, c.id",
		  OIDOID, INT4OID, INT4OID);

/* $1 holder, $2 jobs */
CHAT_STMT(claim_sides,
		  "WITH picked AS MATERIALIZED ("
		  " SELECT j.id FROM chat.chat_job AS j"
		  " WHERE j.id = ANY ($2) AND j.holder IS NULL"
		  " FOR UPDATE OF j SKIP LOCKED"
		  "), job AS ("
		  " UPDATE chat.chat_job AS j SET holder = $1, epoch = j.epoch + 1,"
		  "  attempts = j.attempts + 1"
		  " FROM picked AS p WHERE j.id = p.id RETURNING j.*)"
		  " SELECT j.id, j.epoch, j.kind, j.crashes, j.session_id, j.task_id,"
		  "  j.owner, j.server::text, s.channel::text, s.user_id,"
		  "  s.settings::text, j.input::text"
		  " FROM job AS j JOIN chat.chat_session AS s ON s.id = j.session_id"
		  " ORDER BY j.id",
		  INT8OID, INT8ARRAYOID);

/* $1 holder */
CHAT_STMT(give_back_sides,
		  "UPDATE chat.chat_job SET holder = NULL, attempts = attempts - 1"
		  " WHERE holder = $1 AND kind IN ('title', 'summary')",
		  INT8OID);

/* $1 job, $2 epoch, $3 holder */
CHAT_STMT(drop_side,
		  "DELETE FROM chat.chat_job WHERE id = $1 AND epoch = $2"
		  " AND " CHAT_HELD_BY("$3"),
		  INT8OID, INT8OID, INT8OID);

/*
 * $1 session, $2 kind, $3 server, $4 model, $5 prompt tokens, $6 completion
 * tokens, $7 cached, $8 reasoning tokens, $9 whether they are a guess
 */
CHAT_STMT(count_usage,
		  "WITH session AS ("
		  " UPDATE chat.chat_session AS s SET"
		  "  total_prompt_tokens = s.total_prompt_tokens + $5,"
		  "  total_completion_tokens = s.total_completion_tokens + $6"
		  " WHERE s.id = $1 RETURNING s.id, s.owner, s.user_id)"
		  " INSERT INTO chat.chat_usage (session_id, owner, user_id, server,"
		  "  model, kind, prompt_tokens, completion_tokens, cached_tokens,"
		  "  reasoning_tokens, estimated)"
		  " SELECT s.id, s.owner, s.user_id, $3::name, $4, $2, $5, $6, $7, $8,"
		  "  $9 FROM session AS s",
		  UUIDOID, TEXTOID, TEXTOID, TEXTOID, INT8OID, INT8OID, INT8OID,
		  INT8OID, BOOLOID);

/* Makes an empty request. */
static ChatSide *
make_side(const ChatSideType *type)
{
	MemoryContext context = AllocSetContextCreate(TopMemoryContext,
												  "chat side request",
												  ALLOCSET_SMALL_SIZES);
	ChatSide   *s = MemoryContextAllocZero(context, sizeof(ChatSide));

	s->context = context;
	s->type = type;
	s->endpoint = -1;
	s->usage.prompt = s->usage.completion = -1;
	s->usage.cached = s->usage.reasoning = -1;
	return s;
}

/* Takes a request off its endpoint's count: it has ended, or is given up. */
static void
leave_endpoint(ChatSide *s)
{
	ChatEndKind kind = !s->ended ? CHAT_END_GIVE_BACK
	: s->failed ? CHAT_END_FAILED : CHAT_END_COMPLETED;

	chat_throttle_finish(s->endpoint, kind, !s->rate_limited ? -1
						 : s->transfer ? Max(s->transfer->retry_after, 0) : 0);
	s->endpoint = -1;
}

/* Frees a request that is in no list. */
static void
free_side(ChatSide *s)
{
	leave_endpoint(s);
	if (s->transfer)
		chat_http_close(s->transfer);
	if (s->key)
		explicit_bzero(s->key, strlen(s->key));
	if (s->header)
		explicit_bzero(s->header, strlen(s->header));
	MemoryContextDelete(s->context);
}

/* Notes that nothing came of a request. */
static void
fail(ChatSide *s, const char *error)
{
	MemoryContext old;

	if (s->ended)
		return;
	old = MemoryContextSwitchTo(s->context);
	s->ended = true;
	s->failed = true;
	s->error = chat_server_redact(error, s->key);
	MemoryContextSwitchTo(old);
}

/* ---------- claim ---------- */

/* Makes a type known that has jobs: when the module is loaded. */
void
chat_side_register(const ChatSideType *type)
{
	Assert(ntypes < lengthof(types));
	types[ntypes++] = type;
}

/* Returns the type that has jobs of a kind. */
static const ChatSideType *
find_type(const char *kind)
{
	for (int i = 0; i < ntypes; i++)
		if (strcmp(types[i]->kind, kind) == 0)
			return types[i];
	elog(ERROR, "no requests of kind \"%s\"", kind);
}

/* Reads one row of claim_sides. */
static ChatSide *
read_side(uint64 row)
{
	ChatSide   *s = make_side(find_type(chat_db_text(row, 3)));
	MemoryContext old = MemoryContextSwitchTo(s->context);

	s->job = chat_db_int64(row, 1, 0);
	s->epoch = chat_db_int64(row, 2, 0);
	s->crashes = chat_db_int32(row, 4, 0);
	s->session = chat_db_uuid(row, 5);
	s->task = chat_db_uuid(row, 6);
	s->owner = chat_db_oid(row, 7);
	s->server_name = chat_db_text(row, 8);
	s->channel = chat_db_text(row, 9);
	s->user_id = chat_db_text(row, 10);
	s->settings = chat_db_text(row, 11);
	s->input = chat_db_text(row, 12);
	MemoryContextSwitchTo(old);
	return s;
}

/* Reads the endpoint and the key, builds the body; may it be sent at all? */
static void
prepare_completion(ChatSide *s)
{
	int64		used;

	if (s->crashes >= MAX_CRASHES)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("the request has ended its worker %d times",
						s->crashes)));
	MemoryContextSwitchTo(s->context);
	s->server = chat_server_load(s->server_name, false);
	chat_server_check(s->server_name, s->owner, "any");
	s->key = chat_server_key(s->server, s->owner);
	if (chat_usage_is_over(&s->session, chat_usage_limit(s->owner), &used))
		ereport(ERROR,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("the user's tokens of this day are used up")));
	s->type->prepare(s);
}

/* Prepares a request that was claimed; an error ends it. */
static void
prepare(ChatSide *s)
{
	MemoryContext old = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;

	BeginInternalSubTransaction(NULL);
	PG_TRY();
	{
		prepare_completion(s);
		MemoryContextSwitchTo(old);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(s->context);
		edata = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		fail(s, edata->message);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	CurrentResourceOwner = owner;
}

/* Counts the requests under way that nobody waits for. */
static int
count_idle(void)
{
	dlist_iter	iter;
	int			n = 0;

	dlist_foreach(iter, &sides)
		n += dlist_container(ChatSide, node, iter.cur)->type->idle;
	return n;
}

/* A job that waits, as list_sides tells it. */
typedef struct Candidate
{
	Datum		id;
	const char *server;
	bool		awaited;		/* by a turn */
	bool		behind;			/* turns wait for the server */
} Candidate;

/* Lists the jobs that wait, the first ones first; returns how many. */
static int
list(int most, Candidate **found)
{
	int			titles = Max(MAX_TITLES - count_idle(), 0);
	Datum		values[3] = {ObjectIdGetDatum(MyDatabaseId),
	Int32GetDatum(most), Int32GetDatum(Min(most, titles))};
	int			n = (int) chat_db_exec(&list_sides, values, NULL);
	Candidate  *jobs = palloc(sizeof(Candidate) * Max(n, 1));
	int			kept = 0;

	for (int i = 0; i < n; i++)
	{
		Candidate  *c = &jobs[kept];

		c->id = Int64GetDatum(chat_db_int64(i, 1, 0));
		c->server = chat_db_text(i, 2);
		c->awaited = chat_db_bool(i, 3);
		c->behind = chat_db_bool(i, 4);
		/* so many titles of all servers */
		kept += c->awaited || titles-- > 0;
	}
	*found = jobs;
	return kept;
}

/* Chooses the jobs that are taken now, up to most; returns how many. */
static int
choose(int most, Datum *ids)
{
	int64		now = chat_stream_clock();
	Candidate  *jobs;
	int			found = list(most, &jobs);
	int			n = 0;

	urgent = false;
	chat_throttle_look();
	for (int i = 0; i < found && n < most; i++)
	{
		const Candidate *c = &jobs[i];

		if (chat_throttle_admit(c->server, c->awaited, c->behind, now,
								&contended))
			ids[n++] = c->id;
		else
		{
			refused = true;
			urgent |= c->awaited;
		}
	}
	return n;
}

/* True if a turn waits for a request that has found no room. */
bool
chat_side_is_urgent(void)
{
	return urgent;
}

/* Takes jobs that wait; returns how many. */
int
chat_side_claim(int64 holder, int most)
{
	MemoryContext caller = CurrentMemoryContext;
	Datum	   *ids = palloc(sizeof(Datum) * most);
	int			n = choose(most, ids);
	Datum		values[2] = {Int64GetDatum(holder), (Datum) 0};
	dlist_iter	iter;

	if (n == 0)
		return 0;
	values[1] = chat_db_array(&chat_int8s, ids, n);
	n = (int) chat_db_exec(&claim_sides, values, NULL);
	for (int row = 0; row < n; row++)
		dlist_push_tail(&asked, &read_side(row)->node);
	MemoryContextSwitchTo(caller);
	dlist_foreach(iter, &asked)
	{
		ChatSide   *s = dlist_container(ChatSide, node, iter.cur);

		if (s->job != 0)
			prepare(s);
	}
	return n;
}

/* Asks for something that has no job. */
ChatSide *
chat_side_add(const ChatSideType *type)
{
	ChatSide   *s = make_side(type);

	dlist_push_tail(&asked, &s->node);
	return s;
}

/* Finds a request that is under way. */
ChatSide *
chat_side_find(bool (*match) (const ChatSide *, void *), void *arg)
{
	dlist_head *const lists[] = {&sides, &asked};
	dlist_iter	iter;

	for (size_t i = 0; i < lengthof(lists); i++)
		dlist_foreach(iter, lists[i])
		{
			ChatSide   *s = dlist_container(ChatSide, node, iter.cur);

			if (!s->ended && match(s, arg))
				return s;
		}
	return NULL;
}

/* ---------- the request ---------- */

/* Sends a request. */
static void
send_request(ChatSide *s)
{
	ChatServer *server = s->server;
	ChatHttpRequest req = {0};
	char	  **headers = &s->header;
	int			n = 1;

	if (s->header == NULL)
		n = chat_server_headers(server, s->key, &headers);
	req.url = s->url ? s->url : chat_server_url(server, chat_openai.path);
	req.body = s->body;
	req.body_len = s->body ? strlen(s->body) : 0;
	req.headers = (const char *const *) headers;
	req.nheaders = n;
	req.ca_file = server->ca_file;
	req.proxy = server->proxy;
	req.connect_timeout = server->connect_timeout >= 0
		? server->connect_timeout : 10000;
	req.allow_loopback = server->is_loopback;
	req.allow_private = server->allow_private;
	req.max_body = MAX_ANSWER;
	s->due = chat_stream_clock() + MAX_TIME;
	if (server->stream_timeout >= 0)
		s->due = Min(s->due, chat_stream_clock() + server->stream_timeout);
	if (s->job != 0)
		s->endpoint = chat_throttle_begin(server);
	s->transfer = chat_http_open(&req, s);
	s->transfer->kind = CHAT_TRANSFER_SIDE;
	if (s->header == NULL)
		for (int i = 0; i < n; i++)
			explicit_bzero(headers[i], strlen(headers[i]));
}

/* Plans when to look again at jobs that found no room. */
static void
plan_look(void)
{
	if (refused)
		look_at = Min(chat_throttle_due(), contended
					  ? chat_stream_clock() + CONTENDED_DELAY
					  : PG_INT64_MAX);
	refused = contended = false;
}

/* Sends the requests that were asked for. */
static void
open_asked(bool committed)
{
	while (!dlist_is_empty(&asked))
	{
		ChatSide   *s = dlist_container(ChatSide, node,
										dlist_pop_head_node(&asked));
		MemoryContext old;

		if (!committed)
		{
			free_side(s);
			continue;
		}
		dlist_push_tail(&sides, &s->node);
		if (s->ended)
			continue;
		old = MemoryContextSwitchTo(s->context);
		PG_TRY();
		{
			send_request(s);
		}
		PG_CATCH();
		{
			ErrorData  *edata;

			MemoryContextSwitchTo(s->context);
			edata = CopyErrorData();
			FlushErrorState();
			fail(s, edata->message);
			leave_endpoint(s);
		}
		PG_END_TRY();
		MemoryContextSwitchTo(old);
	}
}

/* Sends the requests that were asked for, or forgets them. */
void
chat_side_open(bool committed)
{
	open_asked(committed);
	chat_throttle_settle();
	plan_look();
}

/* Judges an answer that has come to its end. */
static void
settle(ChatSide *s)
{
	ChatTransfer *t = s->transfer;
	const char *body = t->buf ? t->buf : "";
	ChatEndpointError error;

	if (t->end != CHAT_HTTP_OK)
		fail(s, t->error);
	else if (t->status >= 200 && t->status <= 299)
	{
		s->worked = true;
		if (s->type->read(s, body, t->len))
			s->ended = true;
		else
			fail(s, "the answer is not what was asked for");
	}
	else
	{
		chat_openai.read_error(t->status, body, Min(t->len, MAX_TOLD), &error);
		s->rate_limited = error.kind == CHAT_ERROR_RATE_LIMITED &&
			error.retryable;
		fail(s, psprintf("HTTP status %d: %.*s", t->status,
						 (int) error.message.len, error.message.data));
	}
}

/* Takes what a transfer has received. */
void
chat_side_receive(ChatTransfer *t)
{
	ChatSide   *s = t->owner;
	MemoryContext old;

	if (!t->done || s->ended)
		return;
	old = MemoryContextSwitchTo(s->context);
	PG_TRY();
	{
		settle(s);
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(s->context);
		edata = CopyErrorData();
		FlushErrorState();
		fail(s, edata->message);
	}
	PG_END_TRY();
	leave_endpoint(s);
	MemoryContextSwitchTo(old);
}

/* Ends what takes too long. */
int64
chat_side_check_time(int64 now)
{
	int64		due = PG_INT64_MAX;
	dlist_iter	iter;

	dlist_foreach(iter, &sides)
	{
		ChatSide   *s = dlist_container(ChatSide, node, iter.cur);

		if (s->ended)
			continue;
		if (now < s->due)
		{
			due = Min(due, s->due);
			continue;
		}
		chat_http_close(s->transfer);
		s->transfer = NULL;
		s->worked = true;
		fail(s, "no answer came in time");
		leave_endpoint(s);
	}
	return due;
}

/* ---------- results ---------- */

/*
 * When results can be stored, jobs may find room that were refused, or there
 * is a notice to be told.
 */
int64
chat_side_due(void)
{
	int64		due = Min(look_at, chat_notice_due());
	dlist_iter	iter;

	dlist_foreach(iter, &sides)
	{
		ChatSide   *s = dlist_container(ChatSide, node, iter.cur);

		if (s->ended)
			due = Min(due, s->store_at);
	}
	return due;
}

/* Deletes the job of a request whose result the database refuses. */
static bool
drop(ChatSide *s, int64 holder)
{
	Datum		values[3] = {Int64GetDatum(s->job), Int64GetDatum(s->epoch),
	Int64GetDatum(holder)};

	if (s->job != 0)
		chat_db_exec(&drop_side, values, NULL);
	return true;
}

/* Stores the results, and tells the notices. */
void
chat_side_store(int64 holder)
{
	MemoryContext caller = CurrentMemoryContext;
	int64		now = chat_stream_clock();
	dlist_iter	iter;

	dlist_foreach(iter, &sides)
	{
		ChatSide   *s = dlist_container(ChatSide, node, iter.cur);

		s->stored = false;
		if (!s->ended || s->store_at > now)
			continue;
		s->stored = s->tries >= MAX_TRIES ? drop(s, holder)
			: s->type->store(s, holder);
		MemoryContextSwitchTo(caller);
		if (!s->stored)
			s->store_at = now + MAX_DELAY;
	}
	chat_notice_tell();
	MemoryContextSwitchTo(caller);
}

/* Forgets what is stored; what was not is tried again later. */
void
chat_side_stored(bool committed)
{
	int64		now = chat_stream_clock();
	dlist_mutable_iter iter;

	chat_notice_told(committed);
	/* the claim that follows finds the jobs, if there still are any */
	if (look_at <= now)
		look_at = PG_INT64_MAX;
	dlist_foreach_modify(iter, &sides)
	{
		ChatSide   *s = dlist_container(ChatSide, node, iter.cur);

		if (!s->ended)
			continue;
		if (committed && s->stored)
		{
			/* there may be more of it */
			urgent |= s->job != 0 && !s->type->idle;
			dlist_delete(&s->node);
			free_side(s);
		}
		else if (!committed)
			s->store_at = now + Min(MIN_DELAY << Min(s->tries++, 10),
									MAX_DELAY);
	}
}

/* Ends the requests whose jobs are gone. */
void
chat_side_keep(const int64 *ids, int n)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &sides)
	{
		ChatSide   *s = dlist_container(ChatSide, node, iter.cur);
		bool		found = s->job == 0;

		for (int i = 0; i < n && !found; i++)
			found = ids[i] == s->job;
		if (found)
			continue;
		dlist_delete(&s->node);
		free_side(s);
	}
}

/* True if no request is under way. */
bool
chat_side_idle(void)
{
	return dlist_is_empty(&sides);
}

/* Gives the jobs back. */
void
chat_side_give_back(int64 holder)
{
	Datum		values[1] = {Int64GetDatum(holder)};

	chat_db_exec(&give_back_sides, values, NULL);
}

/* ---------- for types that ask a model ---------- */

/* Returns a C string as a piece of text; absent when NULL. */
static ChatStr
str(const char *text)
{
	ChatStr		s = {text, text ? strlen(text) : 0};

	return s;
}

/* Returns a uuid in its text form. */
static char *
uuid_text(const pg_uuid_t *id)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(id)));
}

/* Builds the body of a request for a short text: no tools, no reasoning. */
char *
chat_side_completion(const ChatSide *s, const char *model, const char *system,
					 const char *text, int max_tokens)
{
	char	   *session = uuid_text(&s->session);
	ChatMessage message = {0};
	ChatRequest req = {0};
	StringInfoData body;

	message.role = str("user");
	message.content = str(text);
	req.model = str(model);
	req.system = str(system);
	req.messages = &message;
	req.nmessages = 1;
	req.max_tokens = str(psprintf("%d", max_tokens));
	req.max_tokens_field = str(s->server->max_tokens_field);
	if (s->server->tracing)
	{
		req.user = str(s->user_id);
		req.session_id = str(session);
	}
	req.extra_body = str(chat_server_expand_body(s->server, s->user_id,
												 session, NULL));
	initStringInfo(&body);
	chat_openai.build_request(&body, &req);
	return body.data;
}

/* Reads the answer of a model: text and usage. */
bool
chat_side_read_completion(ChatSide *s, const char *body, size_t len)
{
	ChatChunk	chunk;

	if (!chat_openai.parse_response(body, len, &chunk))
		return false;
	if (chunk.is_error)
	{
		s->worked = false;
		return false;
	}
	if (chunk.has_usage)
		s->usage = chunk.usage;
	s->model = pnstrdup(chunk.model.data ? chunk.model.data : "",
						chunk.model.len);
	s->text = pnstrdup(chunk.text.data ? chunk.text.data : "",
					   chunk.text.len);
	return true;
}

/* Estimates the tokens of a text that may be missing. */
static int64
guess(const char *text)
{
	return text ? chat_tokens_estimate(text, strlen(text)) : 0;
}

/*
 * Counts what a request has used, for its session and for itself.  One that
 * was refused has cost nothing, one that we left has.
 */
void
chat_side_count(const ChatSide *s, const char *kind)
{
	const ChatUsage *u = &s->usage;
	bool		guessed = u->prompt < 0 || u->completion < 0;
	bool		has_model = s->model && s->model[0];
	Datum		values[9];
	char		nulls[10] = "         ";

	if (!s->worked)
		return;
	values[0] = UUIDPGetDatum(&s->session);
	values[1] = CStringGetTextDatum(kind);
	values[2] = CStringGetTextDatum(s->server_name);
	values[3] = has_model ? CStringGetTextDatum(s->model) : (Datum) 0;
	nulls[3] = has_model ? ' ' : 'n';
	values[4] = Int64GetDatum(u->prompt >= 0 ? u->prompt : guess(s->body));
	values[5] = Int64GetDatum(u->completion >= 0 ? u->completion
							  : guess(s->text));
	values[6] = Int64GetDatum(Max(u->cached, 0));
	values[7] = Int64GetDatum(Max(u->reasoning, 0));
	values[8] = BoolGetDatum(guessed);
	chat_db_exec(&count_usage, values, nulls);
}
