/*
 * check.c
 *		What an administrator asks when something does not work:
 *		chat.test_server() and chat.check_installation().
 *
 * Owns nothing.  Both run in the caller's backend and with the caller's
 * rights, look at the very things that the worker would, and answer with rows
 * instead of errors.
 */
#include "postgres.h"

#include <math.h>
#include <sys/resource.h>

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_foreign_server.h"
#include "commands/async.h"
#include "commands/dbcommands.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "storage/fd.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/syscache.h"
#include "utils/wait_event.h"

#include "compat.h"
#include "http.h"
#include "provider.h"
#include "server.h"
#include "shmem.h"
#include "sse.h"
#include "throttle.h"

/* How long test_server() waits where the server's options do not say, ms. */
#define TEST_CONNECT_TIMEOUT 10000
#define TEST_TIMEOUT 60000

/* How long it waits for room where the server's limits leave none, ms. */
#define TEST_ROOM_TIMEOUT 5000
#define TEST_ROOM_SLICE 50

/* One token and some metadata: a larger answer is not what was asked for. */
#define TEST_MAX_BODY (1024 * 1024)

/* What a test request told. */
typedef struct Probe
{
	ChatSse		sse;
	instr_time	begin;
	double		latency_ms;		/* until the answer's end */
	double		first_token_ms; /* -1 = no content yet */
	char	   *model;
	bool		streaming;
	bool		has_usage;
	bool		answered;		/* content or the reason of its absence */
	ChatErrorKind kind;			/* valid when error is not NULL */
	bool		busy;			/* a 429 that passes */
	char	   *error;			/* redacted when run_probe() is through */
} Probe;

/* One function of check_installation() adds rows to it. */
typedef struct Report
{
	Tuplestorestate *store;
	TupleDesc	desc;
} Report;

/* What is tried and may fail, see attempt_key(). */
typedef struct Trial
{
	const ChatServer *server;
	char	   *message;		/* why it failed, or NULL */
	char	   *hint;
	char	   *key_source;
} Trial;

PG_FUNCTION_INFO_V1(chat_test_server);
PG_FUNCTION_INFO_V1(chat_check_installation);

/*
 * test_server
 */

/* Returns the milliseconds since the probe began. */
static double
elapsed_ms(const Probe *probe)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, probe->begin);
	return rint(INSTR_TIME_GET_MILLISEC(now) * 10) / 10;
}

/* Returns a C string of a piece of text that is there. */
static char *
str_text(ChatStr s)
{
	return pnstrdup(s.data, s.len);
}

/* Whether a piece of text is there and not empty. */
static bool
has_text(ChatStr s)
{
	return s.data != NULL && s.len > 0;
}

/* Returns a piece of text for a request. */
static ChatStr
text_str(const char *s)
{
	ChatStr		str = {s, s ? strlen(s) : 0};

	return str;
}

/* Notes the first error of a probe. */
static void
fail_probe(Probe *probe, ChatErrorKind kind, const char *message)
{
	if (probe->error != NULL)
		return;
	probe->kind = kind;
	probe->error = pstrdup(message);
}

/* Notes what one chunk, or a plain body, tells. */
static void
note_chunk(Probe *probe, const ChatChunk *chunk)
{
	if (chunk->is_error)
	{
		ChatEndpointError error;

		chat_openai.chunk_error(chunk, &error);
		fail_probe(probe, error.kind, str_text(error.message));
		return;
	}
	if (probe->model == NULL && has_text(chunk->model))
		probe->model = str_text(chunk->model);
	if (chunk->has_usage)
		probe->has_usage = true;
	if (has_text(chunk->text) || has_text(chunk->reasoning) ||
		has_text(chunk->refusal) || chunk->ntools > 0)
	{
		probe->answered = true;
		if (probe->first_token_ms < 0)
			probe->first_token_ms = elapsed_ms(probe);
	}
	/* reasoning models may spend the only token on what they do not show */
	if (has_text(chunk->finish_reason))
		probe->answered = true;
}

/* Notes one event of a stream. */
static void
note_event(Probe *probe, const ChatSseEvent *event)
{
	ChatChunk	chunk;
	ChatEndpointError error;

	if (chat_sse_is(event, "error"))
	{
		chat_openai.event_error(event->data, event->len, &error);
		fail_probe(probe, error.kind, str_text(error.message));
		return;
	}
	if (event->len == 0)
		return;
	if (chat_openai.parse_chunk(event->data, event->len, &chunk))
		note_chunk(probe, &chunk);
	else
		fail_probe(probe, CHAT_ERROR_INVALID_RESPONSE,
				   "the endpoint's event stream does not hold chat completion chunks");
}

/* Eats what a transfer has received, if it is a stream. */
static void
on_received(ChatTransfer *transfer, void *arg)
{
	Probe	   *probe = arg;
	const char *p = transfer->buf;
	const char *end = p + transfer->len;
	ChatSseEvent event;
	ChatSseResult result;

	if (!transfer->event_stream || transfer->status / 100 != 2 ||
		transfer->len == 0)
		return;
	probe->streaming = true;
	while ((result = chat_sse_next(&probe->sse, &p, end,
								   &event)) == CHAT_SSE_EVENT)
		note_event(probe, &event);
	if (result != CHAT_SSE_MORE)
		fail_probe(probe, CHAT_ERROR_INVALID_RESPONSE,
				   "an event of the endpoint's stream is too long");
	transfer->len = 0;
}

/* Says what became of a transfer that ended without an answer. */
static void
note_transport_error(Probe *probe, const ChatTransfer *transfer)
{
	if (!transfer->done)
	{
		fail_probe(probe, probe->first_token_ms < 0 ?
				   CHAT_ERROR_FIRST_TOKEN_TIMEOUT : CHAT_ERROR_STREAM_TIMEOUT,
				   "the endpoint's answer did not end in time");
		return;
	}
	switch (transfer->end)
	{
		case CHAT_HTTP_CONNECT_TIMEOUT:
			fail_probe(probe, CHAT_ERROR_CONNECT_TIMEOUT, transfer->error);
			break;
		case CHAT_HTTP_TOO_LARGE:
			fail_probe(probe, CHAT_ERROR_LIMIT_REACHED,
					   "the endpoint's answer is too large");
			break;
		case CHAT_HTTP_FORBIDDEN:
			fail_probe(probe, CHAT_ERROR_ENDPOINT_ERROR,
					   "the endpoint's address belongs to a private network: the option allow_private is off");
			break;
		default:
			fail_probe(probe, CHAT_ERROR_ENDPOINT_ERROR, transfer->error);
			break;
	}
}

/* Judges a transfer after its end. */
static void
conclude(Probe *probe, ChatTransfer *transfer)
{
	ChatSseEvent event;
	ChatEndpointError error;
	ChatChunk	chunk;

	on_received(transfer, probe);
	if (transfer->end != CHAT_HTTP_OK)
		note_transport_error(probe, transfer);
	else if (transfer->status / 100 != 2)
	{
		chat_openai.read_error(transfer->status, transfer->buf, transfer->len,
							   &error);
		probe->busy = error.kind == CHAT_ERROR_RATE_LIMITED && error.retryable;
		fail_probe(probe, error.kind,
				   psprintf("HTTP status %d: %s", transfer->status,
							str_text(error.message)));
	}
	else if (probe->streaming)
	{
		if (chat_sse_finish(&probe->sse, &event) == CHAT_SSE_EVENT)
			note_event(probe, &event);
	}
	else if (chat_openai.parse_response(transfer->buf, transfer->len, &chunk))
		note_chunk(probe, &chunk);
	else
		fail_probe(probe, CHAT_ERROR_INVALID_RESPONSE,
				   "the endpoint's answer is not a chat completion");
	if (!probe->answered)
		fail_probe(probe, CHAT_ERROR_EMPTY_RESPONSE,
				   "the endpoint's answer is empty");
}

/* Builds the request for one token, as a session's would be. */
static void
build_body(const ChatServer *server, StringInfo body)
{
	ChatRequest request = {0};
	ChatMessage message = {0};

	message.role = text_str("user");
	message.content = text_str("Hi");
	request.model = text_str(server->model);
	request.messages = &message;
	request.nmessages = 1;
	request.temperature = text_str(server->temperature);
	request.top_p = text_str(server->top_p);
	request.max_tokens = text_str("1");
	request.max_tokens_field = text_str(server->max_tokens_field);
	request.stream = true;
	request.include_usage = server->stream_usage;
	request.extra_body = text_str(chat_server_expand_body(server, NULL, NULL,
														  NULL));
	chat_openai.build_request(body, &request);
}

/* Takes a place among the server's requests; false if none is free in time. */
static bool
take_place(const ChatServer *server, Probe *probe, int *endpoint)
{
	int64		due = chat_shmem_clock() + TEST_ROOM_TIMEOUT;
	int64		closed;

	*endpoint = -1;
	/* without the library there are no workers whose requests would count */
	while (chat_shared != NULL &&
		   !chat_throttle_ask(server, endpoint, &closed))
	{
		int64		now = chat_shmem_clock();

		if (now + closed >= due)
		{
			fail_probe(probe, closed > 0 ? CHAT_ERROR_RATE_LIMITED
					   : CHAT_ERROR_LIMIT_REACHED, closed > 0
					   ? psprintf("a 429 keeps the endpoint closed for another %d s",
								  (int) (closed / 1000 + 1))
					   : "max_concurrency or max_requests_per_minute leave no room for a request");
			return false;
		}
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT |
						 WL_EXIT_ON_PM_DEATH, TEST_ROOM_SLICE,
						 PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	return true;
}

/* Gives the place back, and says how the request has ended. */
static void
leave_place(const Probe *probe, const ChatTransfer *transfer, int endpoint)
{
	chat_throttle_finish(endpoint, transfer == NULL ? CHAT_END_CANCELLED
						 : probe->error ? CHAT_END_FAILED : CHAT_END_COMPLETED,
						 probe->busy ? Max(transfer->retry_after, 0) : -1);
}

/* Sends the request and fills the probe; the key is wiped in any case. */
static void
run_probe(const ChatServer *server, Probe *probe)
{
	int			endpoint;
	ChatHttpRequest request = {0};
	StringInfoData body;
	char	  **headers = NULL;
	char	   *volatile key = NULL;
	ChatTransfer *volatile transfer = NULL;

	initStringInfo(&body);
	build_body(server, &body);
	request.url = chat_server_url(server, chat_openai.path);
	request.body = body.data;
	request.body_len = body.len;
	request.ca_file = server->ca_file;
	request.proxy = server->proxy;
	request.connect_timeout = server->connect_timeout >= 0 ?
		server->connect_timeout : TEST_CONNECT_TIMEOUT;
	request.allow_loopback = server->is_loopback;
	request.allow_private = server->allow_private;
	request.max_body = TEST_MAX_BODY;

	if (!take_place(server, probe, &endpoint))
		return;
	chat_sse_init(&probe->sse, TEST_MAX_BODY);
	PG_TRY();
	{
		key = chat_server_key(server, GetUserId());
		request.nheaders = chat_server_headers(server, key, &headers);
		request.headers = (const char *const *) headers;
		INSTR_TIME_SET_CURRENT(probe->begin);
		transfer = chat_http_perform(&request, server->stream_timeout >= 0 ?
									 server->stream_timeout : TEST_TIMEOUT,
									 on_received, probe);
		probe->latency_ms = elapsed_ms(probe);
		conclude(probe, transfer);
		probe->error = chat_server_redact(probe->error, key);
	}
	PG_FINALLY();
	{
		chat_sse_free(&probe->sse);
		leave_place(probe, transfer, endpoint);
		if (transfer != NULL)
			chat_http_close(transfer);
		for (int i = 0; i < request.nheaders; i++)
			chat_server_wipe(headers[i]);
		chat_server_wipe(key);
	}
	PG_END_TRY();
}

/* Makes a one-token request in the calling backend and says what came back. */
Datum
chat_test_server(PG_FUNCTION_ARGS)
{
	const char *name = NameStr(*PG_GETARG_NAME(0));
	Probe		probe = {.first_token_ms = -1};
	ChatServer *server;
	TupleDesc	desc;
	Datum		values[8];
	bool		nulls[8] = {false};

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	chat_server_check(name, GetUserId(), NULL);
	server = chat_server_load(name, false);
	run_probe(server, &probe);

	values[0] = BoolGetDatum(probe.error == NULL);
	values[1] = Float8GetDatum(probe.latency_ms);
	values[2] = Float8GetDatum(probe.first_token_ms);
	nulls[2] = probe.first_token_ms < 0;
	values[3] = CStringGetTextDatum(probe.model ? probe.model : server->model);
	values[4] = BoolGetDatum(probe.streaming);
	values[5] = BoolGetDatum(probe.has_usage);
	nulls[6] = nulls[7] = (probe.error == NULL);
	if (probe.error != NULL)
	{
		values[6] = CStringGetTextDatum(chat_provider_error(probe.kind)->name);
		values[7] = CStringGetTextDatum(probe.error);
	}
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc),
													  values, nulls)));
}

/*
 * check_installation
 */

/* Adds a row; the cure is left out when all is well. */
static void
add_row(Report *report, const char *item, bool ok, const char *detail,
		const char *cure)
{
	Datum		values[4];
	bool		nulls[4] = {false};

	values[0] = CStringGetTextDatum(item);
	values[1] = BoolGetDatum(ok);
	values[2] = CStringGetTextDatum(detail);
	nulls[3] = ok || cure == NULL;
	if (!nulls[3])
		values[3] = CStringGetTextDatum(cure);
	tuplestore_putvalues(report->store, report->desc, values, nulls);
}

/* Returns a setting's value as a number, or a default when there is none. */
static int
setting_int(const char *name, int otherwise)
{
	const char *value = GetConfigOption(name, true, false);

	return value ? atoi(value) : otherwise;
}

/* Looks at shared_preload_libraries. */
static void
check_preload(Report *report)
{
	add_row(report, "preload", chat_shared != NULL,
			chat_shared != NULL ?
			"The library was loaded when the server started." :
			"The library was not loaded when the server started: no worker can run.",
			"Add chat to shared_preload_libraries in postgresql.conf, such as shared_preload_libraries = 'chat', and restart the server.");
}

/* Looks for the worker of this database. */
static void
check_worker(Report *report)
{
	int			pid = 0;
	const char *enabled = GetConfigOption("chat.enabled", true, false);

	if (RecoveryInProgress())
	{
		add_row(report, "worker", true,
				"This server is a standby: its worker starts when it is promoted.",
				NULL);
		return;
	}
	if (chat_shared != NULL)
	{
		LWLockAcquire(chat_shared->lock, LW_SHARED);
		for (int i = 0; i < chat_shared->nslots && pid == 0; i++)
		{
			ChatSlot   *slot = &chat_shared->slots[i];

			if (slot->state == CHAT_SLOT_RUNNING &&
				slot->database == MyDatabaseId)
				pid = slot->pid;
		}
		LWLockRelease(chat_shared->lock);
	}
	if (pid != 0)
		add_row(report, "worker", true,
				psprintf("The worker of this database runs as process %d.", pid),
				NULL);
	else if (chat_shared == NULL)
		add_row(report, "worker", false, "No worker runs in this database.",
				"See item preload.");
	else if (enabled != NULL && strcmp(enabled, "off") == 0)
		add_row(report, "worker", false,
				"No worker runs in this database: chat.enabled is off.",
				"ALTER SYSTEM SET chat.enabled = on; SELECT pg_reload_conf();");
	else
		add_row(report, "worker", false, "No worker runs in this database.",
				"See item max_worker_processes, and the server log.");
}

/* Looks at the database's encoding. */
static void
check_encoding(Report *report)
{
	add_row(report, "encoding", GetDatabaseEncoding() == PG_UTF8,
			psprintf("The encoding of this database is %s.",
					 GetDatabaseEncodingName()),
			"CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0;");
}

/* Returns the version of the extension's objects in this database. */
static char *
extension_version(void)
{
	Relation	rel = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	char	   *version = NULL;

	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber,
				F_NAMEEQ, CStringGetDatum("chat"));
	scan = systable_beginscan(rel, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		bool		isnull;
		Datum		datum = heap_getattr(tuple, Anum_pg_extension_extversion,
										 RelationGetDescr(rel), &isnull);

		version = TextDatumGetCString(datum);
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return version;
}

/* Compares the library's version with that of its objects. */
static void
check_version(Report *report)
{
	char	   *version = extension_version();
	bool		ok = version != NULL && strcmp(version, CHAT_VERSION) == 0;

	add_row(report, "version", ok,
			psprintf("The loaded library is version %s, the extension in this database %s.",
					 CHAT_VERSION, version ? version : "is missing"),
			"ALTER EXTENSION chat UPDATE; and restart the server if the library is the older one.");
}

/*
 * Looks whether the server has the fix of November 2025 without which LISTEN
 * may fail with "could not access status of transaction".
 */
static void
check_server_version(Report *report)
{
	static const int fixed[] = {150015, 160011, 170007, 180001};
	int			version = setting_int("server_version_num", PG_VERSION_NUM);
	bool		ok = true;

	for (size_t i = 0; i < lengthof(fixed); i++)
	{
		if (version / 10000 == fixed[i] / 10000)
			ok = version >= fixed[i];
	}
	add_row(report, "server_version", ok,
			psprintf("PostgreSQL %d.%d%s", version / 10000, version % 10000,
					 ok ? "." : " lacks a fix without which LISTEN may fail with \"could not access status of transaction\"."),
			"Install the latest minor version of PostgreSQL and restart the server.");
}

/* Looks at what libcurl can do. */
static void
check_libcurl(Report *report)
{
	curl_version_info_data *info = curl_version_info(CURLVERSION_NOW);
	bool		ssl = (info->features & CURL_VERSION_SSL) != 0;
	bool		async = (info->features & CURL_VERSION_ASYNCHDNS) != 0;

	add_row(report, "libcurl", ssl && async,
			psprintf("libcurl %s, %s, %s.", info->version,
					 ssl ? info->ssl_version : "without TLS",
					 async ? "resolves names asynchronously" :
					 "blocks while it resolves names"),
			"Install a libcurl that was built with TLS and the threaded or c-ares resolver.");
}

/* Compares the limit of open files with the streams that are allowed. */
static void
check_descriptors(Report *report)
{
	struct rlimit limit;
	int			streams = setting_int("chat.max_streams", 0);
	rlim_t		need = (rlim_t) streams + max_files_per_process +
	CHAT_RESERVED_FILES;
	bool		ok;

	if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
		return;
	/* the worker raises the soft limit to what it needs */
	ok = limit.rlim_max == RLIM_INFINITY || limit.rlim_max >= need;
	add_row(report, "descriptors", ok,
			psprintf("A process may open %s files (soft limit %s); chat.max_streams is %d.",
					 limit.rlim_max == RLIM_INFINITY ? "any number of" :
					 psprintf(UINT64_FORMAT, (uint64) limit.rlim_max),
					 limit.rlim_cur == RLIM_INFINITY ? "none" :
					 psprintf(UINT64_FORMAT, (uint64) limit.rlim_cur),
					 streams),
			psprintf("Set LimitNOFILE=" UINT64_FORMAT " in the [Service] section of the server's systemd unit (or ulimit -n where it is started) and restart it, or lower chat.max_streams.",
					 (uint64) need));
}

/*
 * Counts the background workers that chat wants: the launcher, the workers
 * and the tool workers, beside the server's own logical replication launcher.
 */
static void
check_worker_processes(Report *report)
{
	int			slots = 0;
	int			tools = setting_int("chat.tool_workers", 0);
	int			need;

	if (chat_shared != NULL)
	{
		LWLockAcquire(chat_shared->lock, LW_SHARED);
		for (int i = 0; i < chat_shared->nslots; i++)
			slots += chat_shared->slots[i].state != CHAT_SLOT_FREE;
		LWLockRelease(chat_shared->lock);
	}
	need = 2 + Max(slots, setting_int("chat.workers", 1)) + tools;
	add_row(report, "max_worker_processes", max_worker_processes >= need,
			psprintf("max_worker_processes is %d; chat and logical replication's launcher take up to %d now.",
					 max_worker_processes, need),
			psprintf("ALTER SYSTEM SET max_worker_processes = %d; and restart the server.",
					 need + 8));
}

/* Looks how full the queue of notifications is. */
static void
check_notification_queue(Report *report)
{
	double		usage = DatumGetFloat8(DirectFunctionCall1(pg_notification_queue_usage,
														   (Datum) 0));

	add_row(report, "notification_queue", usage <= 0.5,
			psprintf("The queue of notifications is %.0f %% full.",
					 usage * 100),
			"End the oldest transaction of a listening session: SELECT pid, xact_start, query FROM pg_stat_activity WHERE xact_start IS NOT NULL ORDER BY xact_start;");
}

/* Compares the names of two servers. */
static int
compare_names(const ListCell *a, const ListCell *b)
{
	return strcmp(((ChatServer *) lfirst(a))->name,
				  ((ChatServer *) lfirst(b))->name);
}

/* Returns the servers of wrapper chat_llm, ordered by name. */
static List *
all_servers(void)
{
	Relation	rel = table_open(ForeignServerRelationId, AccessShareLock);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, NULL, 0,
										  NULL);
	HeapTuple	tuple;
	List	   *names = NIL;
	List	   *servers = NIL;
	ListCell   *cell;

	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
		names = lappend(names,
						pstrdup(NameStr(((Form_pg_foreign_server)
										 GETSTRUCT(tuple))->srvname)));
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	foreach(cell, names)
	{
		ChatServer *server = chat_server_load(lfirst(cell), true);

		if (server != NULL)
			servers = lappend(servers, server);
	}
	list_sort(servers, compare_names);
	return servers;
}

/* Takes the key and says from which mapping it is. */
static void
try_key(Trial *trial)
{
	const ChatServer *server = trial->server;
	char	   *key = chat_server_key(server, GetUserId());
	const char *mapping;

	if (SearchSysCacheExists2(USERMAPPINGUSERSERVER,
							  ObjectIdGetDatum(GetUserId()),
							  ObjectIdGetDatum(server->oid)))
		mapping = quote_identifier(GetUserNameFromId(GetUserId(), false));
	else if (SearchSysCacheExists2(USERMAPPINGUSERSERVER,
								   ObjectIdGetDatum(InvalidOid),
								   ObjectIdGetDatum(server->oid)))
		mapping = "PUBLIC";
	else
		mapping = NULL;
	if (mapping == NULL)
		trial->key_source = pstrdup("There is no user mapping; on this machine none is needed.");
	else
		trial->key_source = psprintf(key != NULL ?
									 "The key is that of the user mapping for %s." :
									 "The user mapping for %s says that no key is needed.",
									 mapping);
	chat_server_wipe(key);
}

/* Runs try_key() in a subtransaction and notes the text of its error. */
static bool
attempt_key(Trial *trial)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	volatile bool ok = false;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		try_key(trial);
		ReleaseCurrentSubTransaction();
		ok = true;
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		if (error->sqlerrcode == ERRCODE_QUERY_CANCELED)
			PG_RE_THROW();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		trial->message = error->detail ?
			psprintf("%s: %s", error->message, error->detail) : error->message;
		trial->hint = error->hint;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
	return ok;
}

/* Looks whether the current role may use a server; true if it may. */
static bool
check_server(Report *report, const ChatServer *server)
{
	char	   *item = psprintf("server %s", server->name);
	const char *name = quote_identifier(server->name);
	const char *role = quote_identifier(GetUserNameFromId(GetUserId(), false));

	if (!chat_server_usable(server->oid, GetUserId()))
	{
		add_row(report, item, false,
				psprintf("Role %s may not use it.", role),
				psprintf("GRANT USAGE ON FOREIGN SERVER %s TO %s;", name, role));
		return false;
	}
	if (server->model == NULL)
		add_row(report, item, false, "It has no model.",
				psprintf("ALTER SERVER %s OPTIONS (ADD model '...');", name));
	else
		add_row(report, item, true,
				psprintf("%s, model %s", server->base_url, server->model),
				NULL);
	return true;
}

/* Looks at the key that the current role has for a server. */
static void
check_mapping(Report *report, const ChatServer *server)
{
	char	   *item = psprintf("mapping %s", server->name);
	Trial		trial = {.server = server};

	if (attempt_key(&trial))
		add_row(report, item, true, trial.key_source, NULL);
	else
		add_row(report, item, false, trial.message, trial.hint);
}

/* Looks at all servers. */
static void
check_servers(Report *report)
{
	List	   *servers = all_servers();
	ListCell   *cell;

	if (servers == NIL)
		add_row(report, "server", false, "There is no server.",
				"CREATE SERVER openai FOREIGN DATA WRAPPER chat_llm OPTIONS (base_url 'https://api.openai.com/v1', model '...');");
	foreach(cell, servers)
	{
		/* the keys of the others are not ours to try */
		if (check_server(report, lfirst(cell)))
			check_mapping(report, lfirst(cell));
	}
}

/* Looks at the server that sessions use which name none. */
static void
check_default_server(Report *report)
{
	const char *name = chat_server_default;

	if (name == NULL || *name == '\0')
		add_row(report, "default_server", true,
				"chat.default_server is empty: each session names its server.",
				NULL);
	else
		add_row(report, "default_server",
				chat_server_load(name, true) != NULL,
				psprintf("chat.default_server is \"%s\".", name),
				psprintf("Create that server, or run ALTER DATABASE %s SET chat.default_server = '...';",
						 quote_identifier(get_database_name(MyDatabaseId))));
}

/* Lists what chat needs, and the cure of what is wrong. */
Datum
chat_check_installation(PG_FUNCTION_ARGS)
{
	static void (*const checks[]) (Report *) = {
		check_preload, check_worker, check_encoding, check_version,
		check_server_version, check_libcurl, check_descriptors,
		check_worker_processes, check_notification_queue,
		check_default_server, check_servers,
	};
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	Report		report;

	InitMaterializedSRF(fcinfo, 0);
	report.store = rsinfo->setResult;
	report.desc = rsinfo->setDesc;
	for (size_t i = 0; i < lengthof(checks); i++)
		checks[i] (&report);
	return (Datum) 0;
}
