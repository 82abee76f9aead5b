/*
 * stream.c
 *		One live attempt at a completion.
 *
 * Owns a ChatStream from the claim of its job to the commit of its end: the
 * transfer, the parsers, the growing message and the events that tell of it.
 * One process, no locks.  The only PG_TRY around parsing is here: whatever
 * the endpoint's bytes provoke ends this stream and no other.
 *
 * An attempt that failed is tried again (a later claim of the same job) as
 * long as the error is of the passing kind and attempts are left; after
 * content was seen the next attempt opens with reset-step (T48).
 */
#include "postgres.h"

#include <ctype.h>
#include <math.h>
#include <time.h>

#include "common/pg_prng.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "db.h"
#include "debug.h"
#include "jsonbuf.h"
#include "stream.h"

/* of an endpoint's error body this much is looked at */
#define MAX_ERROR_BODY 65536
/* a Retry-After beyond this fails at once, in seconds */
#define MAX_RETRY_AFTER 300
/* bytes of a tool call's id: every event of the call carries it */
#define MAX_ID 256
/* bytes of other names that an endpoint chooses */
#define MAX_NAME 256
/* bytes of an answer's tool calls: storing them takes many times as much */
#define MAX_CALLS_SIZE (1024 * 1024)
/* bytes of its reasoning_details: what is longer is not sent back */
#define MAX_DETAILS_SIZE (1024 * 1024)
/* tool calls of one answer: a bound for hostile input */
#define MAX_TOOL_INDEX 255
/* a transfer's buffer larger than this is given back once it is consumed */
#define KEEP_BUFFER 4096
/* of a request that was too long, this much is tried next */
#define SHRINK_PERCENT 60
/* bytes per token where nobody counts */
#define BYTES_PER_TOKEN 4

static int	connect_timeout = 10000;
static int	first_token_timeout = 60000;
static int	idle_timeout = 60000;
static int	stream_timeout = 300000;
static int	max_retries = 3;
static int	retry_base_delay = 1000;
static int	retry_max_delay = 30000;
static int	max_body_size = 16 * 1024;	/* kB */

/* Declares the settings of streams. */
void
chat_stream_init(void)
{
	static const struct
	{
		const char *name;
		const char *what;
		int		   *value;
		int			boot;
		int			min;
		int			max;
	}			times[] = {
		{"chat.connect_timeout",
		"Longest time to connect to an endpoint.",
		&connect_timeout, 10000, 1, 600000},
		{"chat.first_token_timeout",
		"Longest time from the request to the first content.",
		&first_token_timeout, 60000, 1, INT_MAX / 2},
		{"chat.idle_timeout",
		"Longest time between two contents of a stream.",
		&idle_timeout, 60000, 1, INT_MAX / 2},
		{"chat.stream_timeout",
		"Longest time of a whole stream.",
		&stream_timeout, 300000, 1, INT_MAX / 2},
		{"chat.retry_base_delay",
		"Delay before the first retry; it doubles with each.",
		&retry_base_delay, 1000, 1, 3600000},
		{"chat.retry_max_delay",
		"Longest delay before a retry.",
		&retry_max_delay, 30000, 1, 3600000},
	};

	for (size_t i = 0; i < lengthof(times); i++)
		DefineCustomIntVariable(times[i].name, times[i].what, NULL,
								times[i].value, times[i].boot, times[i].min,
								times[i].max, PGC_SIGHUP, GUC_UNIT_MS,
								NULL, NULL, NULL);
	DefineCustomIntVariable("chat.max_retries",
							"How often a request is tried again.",
							NULL, &max_retries, 3, 0, 100,
							PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("chat.max_body_size",
							"Largest answer of an endpoint.",
							NULL, &max_body_size, 16 * 1024, 1, 512 * 1024,
							PGC_SIGHUP, GUC_UNIT_KB, NULL, NULL, NULL);
}

/* Returns a clock in milliseconds that is never set back. */
int64
chat_stream_clock(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64) t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Copies a string that may be absent. */
static char *
copy_string(const char *s)
{
	return s ? pstrdup(s) : NULL;
}

/* Makes a stream for a claimed job; it is opened after the claim's commit. */
ChatStream *
chat_stream_create(const ChatJob *job, MemoryContext parent)
{
	MemoryContext context = AllocSetContextCreate(parent, "chat stream",
												  ALLOCSET_SMALL_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	ChatStream *s = palloc0(sizeof(ChatStream));

	s->context = context;
	s->endpoint = -1;
	s->usage = (ChatUsage) {-1, -1, -1, -1};
	s->job = *job;
	s->job.channel = copy_string(job->channel);
	s->job.server = copy_string(job->server);
	s->job.user_id = copy_string(job->user_id);
	s->job.settings = NULL;
	chat_event_aim(&s->target, &job->task, job->slot, s->job.channel);
	s->seq = job->seq;
	s->end.job = &s->job;
	MemoryContextSwitchTo(old);
	return s;
}

/* Sends the request. */
void
chat_stream_open(ChatStream *s)
{
	ChatHttpRequest req = {0};
	char	  **headers;

	/* the headers hold the key: they live as short as the call */
	MemoryContext brief = AllocSetContextCreate(s->context, "chat request",
												ALLOCSET_SMALL_SIZES);
	MemoryContext old = MemoryContextSwitchTo(brief);

	req.url = chat_server_url(s->server, chat_openai.path);
	req.body = s->request;
	req.body_len = s->request_len;
	req.nheaders = chat_server_headers(s->server, s->key, &headers);
	req.headers = (const char *const *) headers;
	req.ca_file = s->server->ca_file;
	req.proxy = s->server->proxy;
	req.connect_timeout = s->server->connect_timeout >= 0
		? s->server->connect_timeout : connect_timeout;
	req.allow_loopback = s->server->is_loopback;
	req.allow_private = s->server->allow_private;
	req.max_body = (size_t) max_body_size * 1024;
	chat_sse_init(&s->sse, req.max_body);
	s->opened_at = s->content_at = chat_stream_clock();
	s->transfer = chat_http_open(&req, s);
	for (int i = 0; i < req.nheaders; i++)
		explicit_bzero(headers[i], strlen(headers[i]));
	MemoryContextSwitchTo(old);
	MemoryContextDelete(brief);
	MemoryContextDelete(s->scratch);
	s->scratch = NULL;
	s->request = NULL;
	s->prompt_name = NULL;
}

/* Ends the transfer: nothing more is wanted of the endpoint. */
void
chat_stream_close(ChatStream *s)
{
	if (s->transfer)
		chat_http_close(s->transfer);
	s->transfer = NULL;
}

/* Frees a stream with all that it holds. */
void
chat_stream_free(ChatStream *s)
{
	chat_stream_close(s);
	chat_sse_free(&s->sse);
	if (s->key)
		explicit_bzero(s->key, strlen(s->key));
	MemoryContextDelete(s->context);
}

/* ---------- writing JSON ---------- */

/* Appends text to a buffer that is made at its first use. */
static void
append_text(StringInfo buf, ChatStr text)
{
	if (buf->data == NULL)
		initStringInfo(buf);
	appendBinaryStringInfo(buf, text.data, (int) text.len);
}

/* Adds an event {"type":...,"id":...} to the log. */
static void
log_block(ChatStream *s, const char *type)
{
	char		json[96];

	snprintf(json, sizeof(json), "{\"type\":\"%s\",\"id\":\"%s\"}", type,
			 s->block_id);
	chat_event_add(&s->log, s->context, json);
}

/* ---------- blocks of the answer ---------- */

/* Closes the block that is open. */
static void
close_block(ChatStream *s)
{
	if (s->block == CHAT_BLOCK_TEXT)
		log_block(s, "text-end");
	else if (s->block == CHAT_BLOCK_REASONING)
		log_block(s, "reasoning-end");
	s->block = CHAT_BLOCK_NONE;
}

/* Sees to it that a block of this kind is open. */
static void
open_block(ChatStream *s, ChatBlock block)
{
	if (s->block == block)
		return;
	close_block(s);
	s->block = block;
	s->block_id = psprintf("%s-%d",
						   block == CHAT_BLOCK_TEXT ? "text" : "reasoning",
						   ++s->blocks);
	log_block(s, block == CHAT_BLOCK_TEXT ? "text-start" : "reasoning-start");
}

/* Notes that content came: timeouts start anew, a retry must reset. */
static void
note_content(ChatStream *s)
{
	s->content_at = chat_stream_clock();
	if (s->first_content_at == 0)
		s->first_content_at = s->content_at;
	s->content_seen = true;
}

/* Takes text of the answer. */
static void
take_text(ChatStream *s, ChatStr text)
{
	note_content(s);
	append_text(&s->text, text);
	open_block(s, CHAT_BLOCK_TEXT);
	chat_event_delta(&s->log, s->context, &chat_text_delta, s->block_id,
					 text.data, text.len);
}

/* Takes text of the model's reasoning. */
static void
take_reasoning(ChatStream *s, ChatStr text)
{
	note_content(s);
	append_text(&s->reasoning, text);
	open_block(s, CHAT_BLOCK_REASONING);
	chat_event_delta(&s->log, s->context, &chat_reasoning_delta, s->block_id,
					 text.data, text.len);
}

/* Takes text of a refusal: listeners see it as text, the message apart. */
static void
take_refusal(ChatStream *s, ChatStr text)
{
	note_content(s);
	append_text(&s->refusal, text);
	open_block(s, CHAT_BLOCK_TEXT);
	chat_event_delta(&s->log, s->context, &chat_text_delta, s->block_id,
					 text.data, text.len);
}

/* Copies a piece of text into the stream's memory. */
static char *
copy_str(ChatStr text)
{
	return pnstrdup(text.data, text.len);
}

/* Copies a name that an endpoint has chosen, which may be anything. */
static char *
copy_name(ChatStr name)
{
	return pnstrdup(name.data, pg_mbcliplen(name.data, (int) name.len,
											MAX_NAME));
}

/* ---------- tool calls ---------- */

/*
 * True if a piece belongs to another call than the last one of its number:
 * some endpoints number all calls alike (Ollama: 0), or none; others repeat
 * id and name in each piece, or make up an id for each.  No object goes on
 * with a brace behind its last one.
 */
static bool
starts_other(const ChatStreamTool *t, const ChatToolDelta *d)
{
	const StringInfoData *args = &t->arguments;
	bool		named = d->name.len > 0 && t->name != NULL;

	if (d->id.len > 0 && t->sent_id != NULL &&
		(strlen(t->sent_id) != d->id.len ||
		 memcmp(t->sent_id, d->id.data, d->id.len) != 0))
		return named || d->index < 0;
	if (!named)
		return false;
	if (d->index < 0 && d->id.len == 0)
		return true;
	return d->arguments.len > 0 && d->arguments.data[0] == '{' &&
		args->len > 0 && args->data[args->len - 1] == '}';
}

/* Finds the call that a piece belongs to, or makes it. */
static ChatStreamTool *
find_tool(ChatStream *s, const ChatToolDelta *d)
{
	ChatStreamTool *t = NULL;

	for (int i = s->ntools - 1; i >= 0 && t == NULL; i--)
		if (d->index < 0 || s->tools[i].index == d->index)
			t = &s->tools[i];
	if (t != NULL && !starts_other(t, d))
		return t;
	if (s->ntools > MAX_TOOL_INDEX)
		return NULL;
	s->tools = s->tools
		? repalloc(s->tools, sizeof(ChatStreamTool) * (s->ntools + 1))
		: palloc(sizeof(ChatStreamTool));
	t = &s->tools[s->ntools++];
	memset(t, 0, sizeof(*t));
	t->index = d->index >= 0 ? d->index : s->ntools - 1;
	return t;
}

/* Gives a call an id that no other call of the answer has. */
static void
settle_id(ChatStream *s, ChatStreamTool *t)
{
	int			place = (int) (t - s->tools);

	/* some endpoints send no id, others the same one twice */
	t->id = t->sent_id;
	if (t->id == NULL)
		t->id = psprintf("call_%.8s_%d_%d", s->target.task_text,
						 s->job.steps, place);
	for (int i = 0; i < s->ntools; i++)
		if (i != place && s->tools[i].announced &&
			strcmp(s->tools[i].id, t->id) == 0)
		{
			t->id = psprintf("%s_%d", t->id, place);
			i = -1;
		}
}

/* Adds tool-input-start once the call has a name and an id. */
static void
announce_tool(ChatStream *s, ChatStreamTool *t)
{
	StringInfoData json;

	if (t->announced || t->name == NULL)
		return;
	settle_id(s, t);
	close_block(s);
	initStringInfo(&json);
	appendStringInfoString(&json, "{\"type\":\"tool-input-start\"");
	chat_append_member(&json, "toolCallId", t->id);
	chat_append_member(&json, "toolName", t->name);
	appendStringInfoChar(&json, '}');
	chat_event_add(&s->log, s->context, json.data);
	pfree(json.data);
	t->announced = true;
	if (t->arguments.len > 0)
		chat_event_delta(&s->log, s->context, &chat_tool_input_delta, t->id,
						 t->arguments.data, t->arguments.len);
}

/* Replaces what was kept by what came, if anything did. */
static void
keep_newest(char **kept, ChatStr text)
{
	if (text.len == 0)
		return;
	if (*kept)
		pfree(*kept);
	*kept = copy_str(text);
}

/* Takes a piece of a tool call. */
static void
take_tool(ChatStream *s, ChatToolDelta *d)
{
	ChatStreamTool *t;

	s->calls_size += d->arguments.len + d->extra.len + d->fn_extra.len;
	if (s->calls_size > MAX_CALLS_SIZE)
	{
		chat_stream_fail(s, CHAT_ERROR_LIMIT_REACHED, false,
						 s->transfer->status,
						 "the tool calls of the answer are longer than 1 MB");
		return;
	}
	/* what is no id does not count */
	if (d->id.len > MAX_ID)
		d->id.len = 0;
	t = find_tool(s, d);
	if (t == NULL)
		return;
	note_content(s);
	if (d->id.len > 0 && t->sent_id == NULL)
		t->sent_id = copy_str(d->id);
	if (d->name.len > 0 && t->name == NULL)
		t->name = copy_name(d->name);
	keep_newest(&t->extra, d->extra);
	keep_newest(&t->fn_extra, d->fn_extra);
	if (d->arguments.len > 0)
	{
		append_text(&t->arguments, d->arguments);
		if (t->announced)
			chat_event_delta(&s->log, s->context, &chat_tool_input_delta,
							 t->id, d->arguments.data, d->arguments.len);
	}
	announce_tool(s, t);
}

/* ---------- chunks ---------- */

static void fail_endpoint(ChatStream *s, const ChatEndpointError *error);

/* Takes what an endpoint counts: in one chunk, in all, or each apart. */
static void
take_usage(ChatUsage *kept, const ChatUsage *told)
{
	if (told->prompt >= 0)
		kept->prompt = told->prompt;
	if (told->completion >= 0)
		kept->completion = told->completion;
	if (told->cached >= 0)
		kept->cached = told->cached;
	if (told->reasoning >= 0)
		kept->reasoning = told->reasoning;
}

/* Frees a text that is given up. */
static void
give_up_text(StringInfo text)
{
	if (text->data)
		pfree(text->data);
	memset(text, 0, sizeof(*text));
}

/* Takes blocks of reasoning, or pieces of them, that have to be sent back. */
static void
take_details(ChatStream *s, ChatStr array)
{
	const char *first = array.data + 1;

	if (array.len <= 2 || array.data[0] != '[')
		return;
	while (isspace((unsigned char) *first))
		first++;
	if (*first == ']')
		return;
	s->details_size += array.len;
	/* half of them would be worth nothing */
	if (s->details_size > MAX_DETAILS_SIZE)
	{
		give_up_text(&s->details);
		return;
	}
	if (s->details.len > 0)
		appendStringInfoChar(&s->details, ',');
	append_text(&s->details, (ChatStr) {array.data + 1, array.len - 2});
}

/* Takes one payload of the endpoint. */
static void
take_chunk(ChatStream *s, const ChatChunk *c)
{
	if (c->is_error)
	{
		ChatEndpointError error;

		chat_openai.chunk_error(c, &error);
		fail_endpoint(s, &error);
		return;
	}
	if (c->model.len > 0 && s->model == NULL)
		s->model = copy_name(c->model);
	if (c->reasoning.len > 0)
		take_reasoning(s, c->reasoning);
	if (c->text.len > 0)
		take_text(s, c->text);
	if (c->refusal.len > 0)
		take_refusal(s, c->refusal);
	for (int i = 0; i < c->ntools && !s->ended; i++)
		take_tool(s, &c->tools[i]);
	if (c->function_name.len > 0 && s->function_name == NULL)
		s->function_name = copy_name(c->function_name);
	if (c->function_arguments.len > 0)
	{
		note_content(s);
		append_text(&s->function_arguments, c->function_arguments);
	}
	take_details(s, c->reasoning_details);
	if (c->finish_reason.len > 0 && s->finish_reason == NULL)
		s->finish_reason = copy_name(c->finish_reason);
	s->has_usage |= c->has_usage;
	if (c->has_usage)
		take_usage(&s->usage, &c->usage);
	s->said_done |= c->done;
}

/* Parses one payload, its temporary memory apart. */
static void
take_payload(ChatStream *s, const char *data, size_t len, MemoryContext brief)
{
	ChatChunk	chunk;
	ChatStr		text;
	MemoryContext old;
	bool		ok;

	if (len == 0)
		return;
	if (unlikely(chat_debug_fail[0] != '\0'))
		chat_debug_crash("crash", data, len);
	if (chat_template_match(&s->template, data, len, &text))
	{
		if (s->template.reasoning)
			take_reasoning(s, text);
		else
			take_text(s, text);
		return;
	}
	old = MemoryContextSwitchTo(brief);
	ok = s->plain ? chat_openai.parse_response(data, len, &chunk)
		: chat_openai.parse_chunk(data, len, &chunk);
	MemoryContextSwitchTo(old);
	if (ok)
	{
		chat_template_learn(&s->template, data, len, &chunk);
		take_chunk(s, &chunk);
	}
	else
		chat_stream_fail(s, CHAT_ERROR_INVALID_RESPONSE, false,
						 s->transfer->status,
						 "the endpoint sent something that is not a chat completion");
	MemoryContextReset(brief);
}

/* Takes an event; one that is called an error is one, whatever its data is. */
static void
take_event(ChatStream *s, const ChatSseEvent *ev, MemoryContext brief)
{
	ChatEndpointError error;
	MemoryContext old;

	if (!chat_sse_is(ev, "error"))
	{
		take_payload(s, ev->data, ev->len, brief);
		return;
	}
	old = MemoryContextSwitchTo(brief);
	chat_openai.event_error(ev->data, ev->len, &error);
	MemoryContextSwitchTo(old);
	fail_endpoint(s, &error);
	MemoryContextReset(brief);
}

/* Feeds what was received to the event parser. */
static void
take_events(ChatStream *s, MemoryContext brief)
{
	ChatTransfer *t = s->transfer;
	const char *p = t->buf;
	const char *end = t->buf + t->len;
	ChatSseEvent ev;
	ChatSseResult r = CHAT_SSE_MORE;

	while (!s->ended && !s->said_done &&
		   (r = chat_sse_next(&s->sse, &p, end, &ev)) == CHAT_SSE_EVENT)
		take_event(s, &ev, brief);
	if (!s->ended && r != CHAT_SSE_MORE && r != CHAT_SSE_EVENT)
		chat_stream_fail(s, CHAT_ERROR_INVALID_RESPONSE, false, t->status,
						 "an event of the endpoint's stream is too long");
	/* an event that the connection's end has cut off does not count */
	if (t->done && t->end == CHAT_HTTP_OK && !s->ended && !s->said_done &&
		chat_sse_finish(&s->sse, &ev) == CHAT_SSE_EVENT)
		take_event(s, &ev, brief);
	t->len = 0;
}

/* True if nothing of the body was seen that tells a stream from a document. */
static bool
sniff(ChatStream *s)
{
	ChatTransfer *t = s->transfer;

	for (size_t i = 0; i < t->len && !s->sniffed; i++)
	{
		char		c = t->buf[i];

		/* white space, and a byte order mark */
		if (c != '\0' && strchr(" \t\r\n\xEF\xBB\xBF", c) != NULL)
			continue;
		s->sniffed = true;
		/* a stream has lines of its own; some send an object as one */
		s->plain = c == '{' || (!t->event_stream && (c == '[' || c == '<'));
	}
	return !s->sniffed;
}

/* Gives a transfer's buffer back when it has grown. */
static void
trim_buffer(ChatTransfer *t)
{
	if (t->len > 0 || t->cap <= KEEP_BUFFER)
		return;
	free(t->buf);
	t->buf = NULL;
	t->cap = 0;
}

/* ---------- the end ---------- */

/*
 * True if the endpoint has worked on a request that it did not count: one
 * that was refused has cost nothing, one that we left has.
 */
static bool
has_cost(const ChatStream *s, const ChatEnd *end)
{
	return s->content_seen || end->kind == CHAT_END_CANCELLED ||
		s->failure == CHAT_ERROR_FIRST_TOKEN_TIMEOUT ||
		s->failure == CHAT_ERROR_STREAM_TIMEOUT;
}

/* Says what was used, by the endpoint's word or by a guess. */
static void
settle_usage(ChatStream *s, ChatEnd *end)
{
	ChatUsage  *u = &s->usage;
	bool		guessed = !s->has_usage || u->prompt < 0 || u->completion < 0;
	StringInfoData json;
	int64		bytes = (int64) s->text.len + s->reasoning.len +
		s->refusal.len + s->function_arguments.len;

	for (int i = 0; i < s->ntools; i++)
		bytes += s->tools[i].arguments.len;
	end->prompt_tokens = s->has_usage && u->prompt >= 0 ? u->prompt :
		has_cost(s, end) ? s->prompt_estimate : 0;
	end->completion_tokens = s->has_usage && u->completion >= 0
		? u->completion : (bytes + BYTES_PER_TOKEN - 1) / BYTES_PER_TOKEN;
	initStringInfo(&json);
	appendStringInfo(&json, "{\"prompt_tokens\":" INT64_FORMAT
					 ",\"completion_tokens\":" INT64_FORMAT
					 ",\"total_tokens\":" INT64_FORMAT,
					 end->prompt_tokens, end->completion_tokens,
					 end->prompt_tokens + end->completion_tokens);
	if (s->has_usage && u->cached >= 0)
		appendStringInfo(&json, ",\"cached_tokens\":" INT64_FORMAT,
						 (int64) u->cached);
	if (s->has_usage && u->reasoning >= 0)
		appendStringInfo(&json, ",\"reasoning_tokens\":" INT64_FORMAT,
						 (int64) u->reasoning);
	if (guessed)
		appendStringInfoString(&json, ",\"estimated\":true");
	appendStringInfoChar(&json, '}');
	end->usage = json.data;
}

/* Builds the tool_calls of the message, or NULL. */
static char *
tool_calls_json(ChatStream *s)
{
	StringInfoData json;
	size_t		need;
	int			n = 0;

	if (s->ntools == 0)
		return NULL;
	initStringInfo(&json);
	appendStringInfoChar(&json, '[');
	for (int i = 0; i < s->ntools; i++)
	{
		ChatStreamTool *t = &s->tools[i];

		if (t->name == NULL)
			continue;
		if (n++ > 0)
			appendStringInfoChar(&json, ',');
		appendStringInfoString(&json, "{\"id\":");
		chat_append_string(&json, t->id, strlen(t->id));
		appendStringInfoString(&json, ",\"type\":\"function\",\"function\":{"
							   "\"name\":");
		chat_append_string(&json, t->name, strlen(t->name));
		appendStringInfoString(&json, ",\"arguments\":");
		chat_append_string(&json, t->arguments.data ? t->arguments.data : "",
						   t->arguments.len);
		if (t->fn_extra)
			appendStringInfo(&json, ",%s", t->fn_extra);
		appendStringInfoChar(&json, '}');
		if (t->extra)
			appendStringInfo(&json, ",%s", t->extra);
		appendStringInfoChar(&json, '}');
	}
	appendStringInfoChar(&json, ']');
	/* each is checked as it comes, but all together are stored and sent */
	if (chat_json_check(json.data, json.len, &need) == CHAT_JSON_TOO_DEEP)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("the numbers in the endpoint's tool calls are too long")));
	return n > 0 ? json.data : NULL;
}

/* Builds the legacy function_call of the message, or NULL. */
static char *
function_call_json(ChatStream *s)
{
	StringInfoData json;

	if (s->function_name == NULL)
		return NULL;
	initStringInfo(&json);
	appendStringInfoString(&json, "{\"name\":");
	chat_append_string(&json, s->function_name, strlen(s->function_name));
	appendStringInfoString(&json, ",\"arguments\":");
	chat_append_string(&json, s->function_arguments.data
					   ? s->function_arguments.data : "",
					   s->function_arguments.len);
	appendStringInfoChar(&json, '}');
	return json.data;
}

/* Appends the blocks of reasoning that have to be sent back. */
static void
append_details(ChatStream *s, StringInfo json)
{
	ChatStr		array;
	MemoryContext brief;
	MemoryContext old;
	StringInfoData joined;

	if (s->details.len == 0)
		return;
	brief = AllocSetContextCreate(s->context, "chat reasoning",
								  ALLOCSET_DEFAULT_SIZES);
	old = MemoryContextSwitchTo(brief);
	array.data = psprintf("[%s]", s->details.data);
	array.len = s->details.len + 2;
	initStringInfo(&joined);
	/* a whole body has its blocks whole */
	if (s->plain)
		appendStringInfoString(&joined, array.data);
	else
		chat_openai.join_reasoning(&joined, array);
	MemoryContextSwitchTo(old);
	appendStringInfo(json, ",\"reasoning_details\":%s", joined.data);
	MemoryContextDelete(brief);
}

/* Builds the message's metadata. */
static char *
metadata_json(ChatStream *s, const ChatEnd *end, bool interrupted)
{
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfo(&json, "{\"usage\":%s", end->usage);
	chat_append_member(&json, "server", s->job.server);
	chat_append_member(&json, "model", s->model);
	chat_append_member(&json, "finish_reason", s->finish_reason);
	/* what the next estimate of the session is corrected by */
	if (s->window.plain > 0)
		appendStringInfo(&json, ",\"prompt_estimate\":" INT64_FORMAT,
						 s->window.plain);
	if (s->reasoning.len > 0)
		chat_append_member(&json, "reasoning", s->reasoning.data);
	/* an endpoint takes back a whole one only */
	if (interrupted)
		appendStringInfoString(&json, ",\"interrupted\":true");
	else
		append_details(s, &json);
	appendStringInfoChar(&json, '}');
	return json.data;
}

/* Fills the end with what the answer is, or was when it broke off. */
static void
settle_message(ChatStream *s, ChatEnd *end, bool interrupted)
{
	if (unlikely(chat_debug_fail[0] != '\0'))
		chat_debug_memory("settle", s->text.data, s->text.len);
	settle_usage(s, end);
	end->content = s->text.len > 0 ? s->text.data : NULL;
	end->refusal = s->refusal.len > 0 ? s->refusal.data : NULL;
	/* half a tool call is worth nothing */
	end->tool_calls = interrupted ? NULL : tool_calls_json(s);
	end->function_call = interrupted ? NULL : function_call_json(s);
	end->has_message = end->content || end->refusal || end->tool_calls ||
		end->function_call;
	end->metadata = metadata_json(s, end, interrupted);
}

/* Adds an event to the end's log. */
static void
log_end(ChatStream *s, const char *json)
{
	chat_event_add(&s->end_log, s->context, json);
}

/* Adds message-metadata: model, usage and finish reason. */
static void
log_metadata(ChatStream *s, const ChatEnd *end)
{
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfo(&json, "{\"type\":\"message-metadata\","
					 "\"messageMetadata\":{\"usage\":%s", end->usage);
	chat_append_member(&json, "model", s->model);
	chat_append_member(&json, "finishReason", s->finish_reason);
	appendStringInfoString(&json, "}}");
	log_end(s, json.data);
	pfree(json.data);
}

/* Returns the AI SDK's word for why the answer has ended. */
static const char *
finish_word(const ChatStream *s)
{
	const char *reason = s->finish_reason ? s->finish_reason : "";

	return chat_openai.finish_reason((ChatStr) {reason, strlen(reason)});
}

/* True if the answer was ended before it was whole. */
static bool
is_cut(const ChatStream *s)
{
	const char *word = finish_word(s);

	return strcmp(word, "length") == 0 || strcmp(word, "content-filter") == 0;
}

/*
 * Returns a call's arguments as a JSON object; NULL when they are none.  No
 * arguments at all are an empty object, unless they were still to come.
 */
static char *
tool_input(const ChatStream *s, const ChatStreamTool *t)
{
	Jsonb	   *input;

	if (t->arguments.len == 0)
		return is_cut(s) ? NULL : "{}";
	input = chat_db_parse_json(t->arguments.data);
	if (input == NULL || !JB_ROOT_IS_OBJECT(input))
		return NULL;
	return JsonbToCString(NULL, &input->root, VARSIZE(input));
}

/* Adds the event that tells a call's whole input. */
static void
log_tool(ChatStream *s, const ChatStreamTool *t, const char *input)
{
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfoString(&json, "{\"type\":\"tool-input-available\"");
	chat_append_member(&json, "toolCallId", t->id);
	chat_append_member(&json, "toolName", t->name);
	appendStringInfo(&json, ",\"input\":%s}", input);
	log_end(s, json.data);
	pfree(json.data);
}

/* Builds what turn.c stores of the calls; adds their events. */
static char *
calls_json(ChatStream *s)
{
	StringInfoData json;

	initStringInfo(&json);
	for (int i = 0; i < s->ntools; i++)
	{
		ChatStreamTool *t = &s->tools[i];
		char	   *input;

		if (t->name == NULL)
			continue;
		input = tool_input(s, t);
		appendStringInfoChar(&json, json.len == 0 ? '[' : ',');
		appendStringInfo(&json, "{\"place\":%d", i + 1);
		chat_append_member(&json, "id", t->id);
		chat_append_member(&json, "name", t->name);
		chat_append_member(&json, "arguments",
						   t->arguments.data ? t->arguments.data : "");
		if (input)
			appendStringInfo(&json, ",\"input\":%s", input);
		else
			chat_append_member(&json, "error", is_cut(s) ?
							   "the answer was cut before the arguments were whole" :
							   "the arguments are not a JSON object");
		appendStringInfoChar(&json, '}');
		/* what is no input is told with the call's result, by its turn */
		if (input)
			log_tool(s, t, input);
	}
	appendStringInfoChar(&json, ']');
	return json.data;
}

/* Ends a step that asked for tools: they run, then the model goes on. */
static void
complete_step(ChatStream *s)
{
	s->ended = true;
	s->end.kind = CHAT_END_TOOLS;
	settle_message(s, &s->end, false);
	close_block(s);
	s->end.calls = calls_json(s);
}

/* Ends a stream whose answer is whole. */
static void
complete(ChatStream *s)
{
	char	   *json;

	s->ended = true;
	s->end.kind = CHAT_END_COMPLETED;
	settle_message(s, &s->end, false);
	close_block(s);
	log_end(s, "{\"type\":\"finish-step\"}");
	log_metadata(s, &s->end);
	json = psprintf("{\"type\":\"finish\",\"finishReason\":\"%s\"}",
					finish_word(s));
	log_end(s, json);
	pfree(json);
}

/* ---------- ends that are not the answer's ---------- */

/* Builds the error of a task. */
static char *
error_json(ChatStream *s, const char *code, bool retryable, int status,
		   const char *message)
{
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfo(&json, "{\"code\":\"%s\",\"retryable\":%s", code,
					 retryable ? "true" : "false");
	chat_append_member(&json, "message", message);
	if (status > 0)
		appendStringInfo(&json, ",\"status\":%d", status);
	if (s->transfer && s->transfer->retry_after > 0)
		appendStringInfo(&json, ",\"retry_after\":%ld",
						 s->transfer->retry_after);
	appendStringInfoChar(&json, '}');
	return json.data;
}

/*
 * Gives up what was received, when there is no memory for an end that holds
 * it.  What the stream used is free then for one that does not.
 */
static void
give_up(ChatStream *s)
{
	ChatEnd    *end = &s->end;

	give_up_text(&s->text);
	give_up_text(&s->reasoning);
	give_up_text(&s->refusal);
	give_up_text(&s->details);
	give_up_text(&s->function_arguments);
	for (int i = 0; i < s->ntools; i++)
		give_up_text(&s->tools[i].arguments);
	s->ntools = 0;
	end->has_message = false;
	end->content = end->refusal = end->tool_calls = end->function_call = NULL;
	end->metadata = "{}";
	end->usage = NULL;
	chat_event_clear(&s->end_log);
}

/* What a stream ends with that did not complete its answer. */
typedef struct Stop
{
	ChatEndKind kind;
	const char *code;
	bool		retryable;
	int			status;			/* of HTTP, 0 = none */
	const char *message;
	bool		asked;			/* there may be something received */
} Stop;

/* Adds the events that tell of an error. */
static void
log_error(ChatStream *s, const Stop *stop)
{
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfoString(&json, "{\"type\":\"error\"");
	chat_append_member(&json, "errorText", stop->message);
	chat_append_member(&json, "code", stop->code);
	appendStringInfoChar(&json, '}');
	log_end(s, json.data);
	pfree(json.data);
}

/* Fills the end of a stream that stops; bare = without what was received. */
static void
settle_stop(ChatStream *s, const Stop *stop, bool bare)
{
	ChatEnd    *end = &s->end;
	bool		failed = stop->kind == CHAT_END_FAILED;

	end->kind = stop->kind;
	end->metadata = "{}";
	end->error = error_json(s, stop->code, stop->retryable, stop->status,
							stop->message);
	close_block(s);
	if (failed)
		log_error(s, stop);
	if (stop->asked && !bare)
	{
		settle_message(s, end, true);
		log_metadata(s, end);
	}
	log_end(s, failed ? "{\"type\":\"finish\",\"finishReason\":\"error\"}"
			: "{\"type\":\"abort\"}");
}

/*
 * Ends a stream without a whole answer.  Whatever goes wrong here ends it as
 * well: an error that is about what was received would come again.
 */
static void
stop_stream(ChatStream *s, const Stop *stop)
{
	MemoryContext old = CurrentMemoryContext;
	volatile bool settled = false;

	PG_TRY();
	{
		settle_stop(s, stop, false);
		settled = true;
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(old);
		EmitErrorReport();
		FlushErrorState();
	}
	PG_END_TRY();
	if (settled)
		return;
	give_up(s);
	settle_stop(s, stop, true);
}

/* Ends a stream because somebody asked for it. */
void
chat_stream_cancel(ChatStream *s)
{
	MemoryContext old;
	Stop		stop = {.kind = CHAT_END_CANCELLED, .code = "cancelled",
	.message = "the task was cancelled"};

	if (s->ended)
		return;
	old = MemoryContextSwitchTo(s->context);
	s->ended = true;
	/* without a request there is no usage, and no message */
	stop.asked = s->transfer != NULL;
	stop_stream(s, &stop);
	MemoryContextSwitchTo(old);
}

/* Returns the delay after so many failures in a row, in ms. */
int64
chat_stream_backoff(int tries)
{
	double		delay = retry_base_delay * pow(2, Min(tries - 1, 20));

	return (int64) Min(delay, (double) retry_max_delay);
}

/* Returns the delay before the next attempt in ms. */
static int64
retry_delay(const ChatStream *s)
{
	double		jitter = 0.5 + pg_prng_double(&pg_global_prng_state) / 2;

	return (int64) ((double) chat_stream_backoff(s->job.attempts) * jitter);
}

/* Says whether the attempt that failed is tried again, and when. */
static bool
plan_retry(ChatStream *s, bool retryable)
{
	int			retries = s->server && s->server->retries >= 0
	? s->server->retries : max_retries;
	long		after = s->transfer ? s->transfer->retry_after : -1;
	int64		delay;

	if (!retryable || s->job.attempts > retries || after > MAX_RETRY_AFTER)
		return false;
	delay = Max(retry_delay(s), after * 1000);
	s->end.kind = CHAT_END_RETRY;
	s->end.run_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), delay);
	s->end.reset = s->content_seen || s->end.reset;
	if (s->has_usage || has_cost(s, &s->end))
		settle_usage(s, &s->end);
	return true;
}

/*
 * Ends an attempt that failed: the job goes back when the error passes and
 * attempts are left, else the task has failed.  What was received is kept.
 */
void
chat_stream_fail(ChatStream *s, ChatErrorKind kind, bool retryable,
				 int status, const char *message)
{
	Stop		stop = {.kind = CHAT_END_FAILED, .retryable = retryable,
	.status = status, .asked = s->transfer != NULL};
	MemoryContext old;

	if (s->ended)
		return;
	old = MemoryContextSwitchTo(s->context);
	s->ended = true;
	s->failure = kind;
	s->passing = retryable;
	if (!plan_retry(s, retryable))
	{
		char	   *safe = chat_server_redact(message, s->key);

		if (s->transfer && s->transfer->retry_after > MAX_RETRY_AFTER)
			safe = psprintf("%s (the endpoint asks to wait %ld seconds)",
							safe, s->transfer->retry_after);
		stop.code = chat_provider_error(kind)->name;
		stop.message = safe;
		stop_stream(s, &stop);
	}
	MemoryContextSwitchTo(old);
}

/* Fails a task that has taken its worker down too often. */
void
chat_stream_poisoned(ChatStream *s)
{
	MemoryContext old = MemoryContextSwitchTo(s->context);
	const char *code = chat_provider_error(CHAT_ERROR_LIMIT_REACHED)->name;
	char	   *message = psprintf("the task has crashed its worker %d times and was put aside",
								   s->job.blamed);

	chat_stream_fail(s, CHAT_ERROR_LIMIT_REACHED, false, 0, message);
	s->end.error = psprintf("{\"code\":\"%s\",\"retryable\":false,"
							"\"message\":\"%s\",\"crashes\":%d}",
							code, message, s->job.blamed);
	s->end.usage = NULL;
	MemoryContextSwitchTo(old);
}

/*
 * Sends the job back once for a smaller request, when the endpoint says that
 * this one is too long; false if it was back already.
 */
static bool
shrink(ChatStream *s)
{
	if (s->job.shrink_to > 0 || s->content_seen || s->ended)
		return false;
	s->ended = true;
	s->failure = CHAT_ERROR_CONTEXT_LENGTH_EXCEEDED;
	s->end.kind = CHAT_END_RETRY;
	s->end.run_at = DT_NOBEGIN;
	s->end.shrink_to = Max(s->prompt_estimate * SHRINK_PERCENT / 100, 1);
	return true;
}

/* Ends an attempt by an error of the endpoint. */
static void
fail_endpoint(ChatStream *s, const ChatEndpointError *error)
{
	if (error->kind == CHAT_ERROR_CONTEXT_LENGTH_EXCEEDED && shrink(s))
		return;
	chat_stream_fail(s, error->kind, error->retryable, error->status,
					 pnstrdup(error->message.data, error->message.len));
}

/* Ends an attempt whose transfer did not come to an orderly end. */
static void
fail_transfer(ChatStream *s)
{
	ChatTransfer *t = s->transfer;
	char	   *message = psprintf("request to the endpoint failed: %s",
								   t->error);

	switch (t->end)
	{
		case CHAT_HTTP_CONNECT_TIMEOUT:
			chat_stream_fail(s, CHAT_ERROR_CONNECT_TIMEOUT, true, 0, message);
			break;
		case CHAT_HTTP_CONNECT_FAILED:
		case CHAT_HTTP_BROKEN:
			chat_stream_fail(s, CHAT_ERROR_ENDPOINT_ERROR, true, t->status,
							 message);
			break;
		case CHAT_HTTP_TOO_LARGE:
			chat_stream_fail(s, CHAT_ERROR_INVALID_RESPONSE, false, t->status,
							 "the endpoint's answer is larger than chat.max_body_size");
			break;
		case CHAT_HTTP_FORBIDDEN:
			chat_stream_fail(s, CHAT_ERROR_ENDPOINT_ERROR, false, 0,
							 "the endpoint's address is private and the server's option allow_private is off");
			break;
		default:
			chat_stream_fail(s, CHAT_ERROR_ENDPOINT_ERROR, false, t->status,
							 message);
	}
}

/* Judges an answer that has come to its end. */
static void
settle(ChatStream *s)
{
	const ChatErrorCode *empty =
	chat_provider_error(CHAT_ERROR_EMPTY_RESPONSE);
	bool		filtered = s->finish_reason &&
		strcmp(s->finish_reason, "content_filter") == 0;

	if (s->transfer->end != CHAT_HTTP_OK && s->transfer->done &&
		!s->said_done && s->finish_reason == NULL)
		fail_transfer(s);
	else if (s->ntools > 0 && tool_calls_json(s) != NULL)
		complete_step(s);
	else if (s->text.len > 0 || s->refusal.len > 0 || s->function_name)
		complete(s);
	else if (filtered)
		chat_stream_fail(s, CHAT_ERROR_CONTENT_FILTER, false,
						 s->transfer->status,
						 "the endpoint's content filter stopped the answer");
	else
		chat_stream_fail(s, CHAT_ERROR_EMPTY_RESPONSE,
						 empty->retryable, s->transfer->status,
						 "the endpoint's answer holds no text, refusal or tool call");
}

/* Reads an answer whose status is not of the 200s. */
static void
receive_error(ChatStream *s)
{
	ChatTransfer *t = s->transfer;
	ChatEndpointError error;

	if (t->len < MAX_ERROR_BODY && !t->done)
		return;
	chat_openai.read_error(t->status, t->buf ? t->buf : "",
						   Min(t->len, MAX_ERROR_BODY), &error);
	fail_endpoint(s, &error);
	t->len = 0;
}

/* Reads what was received, whatever it is. */
static void
receive(ChatStream *s, MemoryContext brief)
{
	ChatTransfer *t = s->transfer;

	if (t->status != 0 && (t->status < 200 || t->status > 299))
	{
		receive_error(s);
		return;
	}
	if (t->len > 0 && (s->sniffed || !sniff(s)) && s->plain && t->done)
	{
		/* half a document is none */
		if (t->end == CHAT_HTTP_OK)
			take_payload(s, t->buf, t->len, brief);
		t->len = 0;
	}
	else if (t->len > 0 && s->sniffed && !s->plain)
		take_events(s, brief);
	else if (t->done && s->sniffed && !s->plain)
		take_events(s, brief);
	if (!s->ended && (s->said_done || t->done))
		settle(s);
}

/*
 * Takes what the transfer has received; true if there is something to flush.
 */
bool
chat_stream_receive(ChatStream *s)
{
	static MemoryContext brief = NULL;
	MemoryContext old = MemoryContextSwitchTo(s->context);

	if (brief == NULL)
		brief = AllocSetContextCreate(TopMemoryContext, "chat payload",
									  ALLOCSET_DEFAULT_SIZES);
	if (s->ended)
	{
		s->transfer->len = 0;
		MemoryContextSwitchTo(old);
		return false;
	}
	PG_TRY();
	{
		receive(s, brief);
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(s->context);
		edata = CopyErrorData();
		FlushErrorState();
		MemoryContextReset(brief);
		/* an end that broke off is none */
		s->ended = false;
		chat_event_clear(&s->end_log);
		chat_stream_fail(s, CHAT_ERROR_INVALID_RESPONSE, false,
						 s->transfer->status, edata->message);
	}
	PG_END_TRY();
	trim_buffer(s->transfer);
	MemoryContextSwitchTo(old);
	return s->ended || s->log.nitems > 0;
}

/*
 * Fails a stream that has waited too long; returns when to look again, in
 * ms of chat_stream_clock().
 */
int64
chat_stream_check_time(ChatStream *s, int64 now)
{
	int			first = s->server->first_token_timeout >= 0
	? s->server->first_token_timeout : first_token_timeout;
	int			idle = s->server->idle_timeout >= 0
	? s->server->idle_timeout : idle_timeout;
	int			whole = s->server->stream_timeout >= 0
	? s->server->stream_timeout : stream_timeout;
	int64		silent_due = s->content_at +
	(s->first_content_at ? idle : first);
	int64		whole_due = s->opened_at + whole;

	if (s->ended)
		return PG_INT64_MAX;
	if (now >= whole_due)
		chat_stream_fail(s, CHAT_ERROR_STREAM_TIMEOUT, false, 0,
						 psprintf("the answer took longer than %d ms", whole));
	else if (now >= silent_due && s->first_content_at == 0)
		chat_stream_fail(s, CHAT_ERROR_FIRST_TOKEN_TIMEOUT, true, 0,
						 psprintf("no content came within %d ms", first));
	else if (now >= silent_due)
		chat_stream_fail(s, CHAT_ERROR_IDLE_TIMEOUT, true, 0,
						 psprintf("no content came for %d ms", idle));
	return s->ended ? PG_INT64_MAX : Min(silent_due, whole_due);
}
