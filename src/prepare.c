/*
 * prepare.c
 *		The request of a job that was claimed: endpoint and key, prompt,
 *		tools, the messages that fit, and whether it may be made at all.
 *
 * Owns nothing: what it makes belongs to the stream.  All of it runs in the
 * transaction of the claim.
 */
#include "postgres.h"

#include "access/xact.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"

#include "context.h"
#include "debug.h"
#include "event.h"
#include "langfuse.h"
#include "prepare.h"
#include "prompt.h"
#include "queue.h"
#include "server.h"
#include "stream.h"
#include "summary.h"
#include "usage.h"
#include "window.h"

/* Builds a job's system prompt and notes which one it was. */
static char *
system_prompt(ChatStream *s, const ChatJob *job, ChatPromptFetch *fetch)
{
	ChatPromptTurn turn = {
		.owner = job->owner,
		.user_id = job->user_id,
		.session = &job->session,
		.server = job->server,
		.setting = chat_context_setting(job, "prompt"),
		.fetch = fetch
	};

	return chat_prompt_build(&turn, &s->prompt_name, &s->prompt_version);
}

/* Sends a job back to the queue before its request, to wait for something. */
static void
defer(ChatStream *s, int what, int delay)
{
	s->deferred = true;
	s->ended = true;
	s->end.kind = CHAT_END_GIVE_BACK;
	s->end.waited = what;
	s->end.run_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), delay);
}

/* Fails a request that its window or its budget forbids; false if it did. */
static bool
admit(ChatStream *s, const ChatJob *job)
{
	const ChatWindow *w = &s->window;
	int64		most = chat_window_limit(job, "max_tokens_per_task",
										 s->server->max_tokens_per_task);
	int			limit_of_day = chat_usage_limit(job->owner);
	int64		used;

	if (w->frame_too_large)
		chat_stream_fail(s, CHAT_ERROR_CONTEXT_LENGTH_EXCEEDED, false, 0,
						 psprintf("the system prompt and the tools alone do not fit into the context window, which leaves " INT64_FORMAT " tokens",
								  w->budget));
	else if (most > 0 && job->tokens + w->tokens > most)
		chat_stream_fail(s, CHAT_ERROR_LIMIT_REACHED, false, 0,
						 psprintf("the task has used " INT64_FORMAT " tokens and would use " INT64_FORMAT " more, max_tokens_per_task is " INT64_FORMAT,
								  job->tokens, w->tokens, most));
	else if (chat_usage_is_over(&job->session, limit_of_day, &used))
		chat_stream_fail(s, CHAT_ERROR_LIMIT_REACHED, false, 0,
						 psprintf("the user's tokens of this day are used up: " INT64_FORMAT " of %d",
								  used, limit_of_day));
	return !s->ended;
}

/* Builds a job's request, as far as it is made now. */
static void
build_request(ChatStream *s, const ChatJob *job, ChatContext *context,
			  const char *tools)
{
	ChatWindowFrame frame = {.tools = tools};
	ChatPromptFetch fetch = {false, false};

	if (context->too_large)
	{
		chat_stream_fail(s, CHAT_ERROR_LIMIT_REACHED, false, 0,
						 psprintf("the newest messages have more than the " INT64_FORMAT " bytes of chat.max_request_size",
								  chat_context_most()));
		return;
	}
	fetch.waited = (job->waited & CHAT_WAITED_PROMPT) != 0;
	frame.system = system_prompt(s, job, &fetch);
	if (fetch.wait)
	{
		defer(s, CHAT_WAITED_PROMPT, CHAT_PROMPT_WAIT);
		return;
	}
	chat_summary_insert(job, context);
	chat_window_fit(job, s->server, &frame, context, &s->window);
	s->prompt_estimate = s->end.context_tokens = s->window.tokens;
	s->end.compaction = chat_window_compaction(&s->window);
	chat_event_add(&s->log, s->context, chat_window_status(&s->window));
	if (!admit(s, job))
		return;
	if (s->window.summary_reach > 0)
	{
		defer(s, CHAT_WAITED_SUMMARY, CHAT_SUMMARY_WAIT);
		return;
	}
	s->request = chat_context_request(job, s->server, context, frame.system,
									  tools, &s->request_len);
}

/*
 * True if an error of one job may be gone when it is tried again: somebody
 * held a lock, cancelled the statement, or used up the memory.
 */
static bool
is_passing(const ErrorData *edata)
{
	switch (ERRCODE_TO_CATEGORY(edata->sqlerrcode))
	{
		case ERRCODE_INSUFFICIENT_RESOURCES:
		case ERRCODE_OPERATOR_INTERVENTION:
		case ERRCODE_TRANSACTION_ROLLBACK:
			return true;
		default:
			return edata->sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE;
	}
}

/*
 * Reads a job's endpoint and key and builds its request.  An error of this
 * one job (server dropped, key unreadable) leaves the transaction usable; one
 * that passes costs an attempt, so that it holds up nobody else's job.
 */
static void
prepare(ChatStream *s, const ChatJob *job, ChatContext *context,
		const char *tools)
{
	MemoryContext old = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;

	BeginInternalSubTransaction(NULL);
	PG_TRY();
	{
		MemoryContextSwitchTo(s->context);
		s->server = chat_server_load(job->server, false);
		chat_server_check_usage(s->server, job->owner);
		s->key = chat_server_key(s->server, job->owner);
		/* goes when the request is sent: a stream stays small */
		s->scratch = AllocSetContextCreate(s->context, "chat request text",
										   ALLOCSET_SMALL_SIZES);
		MemoryContextSwitchTo(s->scratch);
		build_request(s, job, context, tools);
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
		/* what was planned before the error does not count */
		s->deferred = s->ended = false;
		s->request = NULL;
		chat_stream_fail(s, CHAT_ERROR_ENDPOINT_ERROR, is_passing(edata), 0,
						 edata->message);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	CurrentResourceOwner = owner;
}

/* Makes a stream's request, or ends it. */
void
chat_prepare_request(ChatStream *s, const ChatJob *job, ChatContext *context,
					 const char *tools)
{
	if (context->later)
	{
		defer(s, 0, 0);
		return;
	}
	chat_context_repair(context);
	chat_context_close(job, context);
	prepare(s, job, context, tools);
	if (s->request)
		chat_debug_crash("request", s->request, s->request_len);
}

/* Records which system prompts the requests of a claim use. */
void
chat_prepare_record(ChatStream **streams, int n)
{
	pg_uuid_t  *tasks = palloc(sizeof(pg_uuid_t) * n);
	char	  **names = palloc(sizeof(char *) * n);
	int		   *versions = palloc(sizeof(int) * n);

	for (int i = 0; i < n; i++)
	{
		tasks[i] = streams[i]->job.task;
		names[i] = streams[i]->prompt_name;
		versions[i] = streams[i]->prompt_version;
	}
	chat_prompt_record(tasks, names, versions, n);
}
