/*
 * window.c
 *		What of a conversation fits into the model's context window.
 *
 * Owns nothing: the messages are the caller's, and are changed in his copy.
 * What is stored stays as it is.
 *
 * A request's tokens are those that the endpoint has counted in the last one
 * of the session, and an estimate of what came since, with the session's own
 * error.  Its size is brought under the budget in steps that lose more and
 * more: old outputs of tools become a marker, then a summary takes the place
 * of the oldest messages (if the server wants that, see summary.c), then the
 * oldest steps are left out.  A step (an answer with its calls and their
 * results) stays together; the system prompt, the newest message of the user
 * and the last step are never left out.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "lib/stringinfo.h"
#include "utils/guc.h"

#include "db.h"
#include "jsonbuf.h"
#include "tokens.h"
#include "window.h"

/* what the API adds to each message, and to a request */
#define MESSAGE_TOKENS 4
#define REQUEST_TOKENS 3
/* a picture or a recording, whatever its bytes */
#define DATA_TOKENS 800
/* a quoted text without a blank of so many bytes is such data */
#define DATA_BYTES 4000
/* outputs smaller than this are not worth a marker */
#define MIN_COLLAPSE 400
/* the answer's part of the window where max_tokens is not set */
#define MAX_RESERVE 4096

/* as they stand on tasks and in events */
static const char *const compaction_names[] = {
	[CHAT_COMPACTION_NONE] = NULL,
	[CHAT_COMPACTION_COLLAPSED] = "collapsed",
	[CHAT_COMPACTION_SUMMARIZED] = "summarized",
	[CHAT_COMPACTION_TRUNCATED] = "truncated",
};

static int	keep_recent = 15;

/* Declares the settings of windows. */
void
chat_window_init(void)
{
	DefineCustomIntVariable("chat.keep_recent_messages",
							"Newest messages that a summary leaves as they are.",
							NULL, &keep_recent, 15, 1, 100000,
							PGC_SIGHUP, 0, NULL, NULL, NULL);
}

/* ---------- sizes ---------- */

/* Returns the tokens of a text that may be absent. */
static int64
text_tokens(ChatStr text)
{
	return text.data ? chat_tokens_estimate(text.data, text.len) : 0;
}

/* Returns the tokens of a JSON text; pictures and the like count as such. */
static int64
json_tokens(ChatStr json)
{
	const char *p = json.data;
	const char *end = p + json.len;
	const char *from = p;
	int64		tokens = 0;

	if (json.data == NULL)
		return 0;
	while ((p = memchr(p, '"', end - p)) != NULL)
	{
		const char *close = memchr(p + 1, '"', end - p - 1);

		if (close == NULL)
			break;
		if (close - p > DATA_BYTES && memchr(p, ' ', close - p) == NULL)
		{
			tokens += chat_tokens_estimate(from, p - from) + DATA_TOKENS;
			from = close;
		}
		p = close;
	}
	return tokens + chat_tokens_estimate(from, end - from);
}

/* Returns the tokens of a message. */
static int64
message_tokens(const ChatMessage *m)
{
	return MESSAGE_TOKENS +
		(m->parts.data ? json_tokens(m->parts) : text_tokens(m->content)) +
		text_tokens(m->name) + text_tokens(m->tool_call_id) +
		text_tokens(m->refusal) + json_tokens(m->tool_calls) +
		json_tokens(m->function_call) + json_tokens(m->reasoning_details) +
		json_tokens(m->context);
}

/* Returns a C string as a piece of text; absent when NULL. */
static ChatStr
str(const char *text)
{
	ChatStr		s = {text, text ? strlen(text) : 0};

	return s;
}

/* True if a message's role is the given one. */
static bool
has_role(const ChatMessage *m, const char *role)
{
	return m->role.len == strlen(role) &&
		memcmp(m->role.data, role, m->role.len) == 0;
}

/* True if a message belongs to the step that the one before it began. */
static bool
is_result(const ChatMessage *m)
{
	return has_role(m, "tool") || has_role(m, "function");
}

/* The messages of a request while they are made to fit. */
typedef struct Fit
{
	ChatContext *context;
	ChatWindow *window;
	int64	   *tokens;			/* of each message */
	bool	   *left_out;
	int64		frame;			/* tokens of all else */
	int			question;		/* newest message of the user, -1 = none */
	int			last_step;		/* where the last step begins */
} Fit;

/* Sums up what is left; true if it fits. */
static bool
fits(Fit *f)
{
	ChatWindow *w = f->window;

	w->plain = f->frame;
	for (int i = 0; i < f->context->n; i++)
		if (!f->left_out[i])
			w->plain += f->tokens[i];
	w->tokens = chat_tokens_calibrate(w->plain, f->context->counted,
									  f->context->estimated);
	return w->budget == 0 || w->tokens <= w->budget;
}

/* Measures a request's messages and finds what has to stay. */
static void
measure(Fit *f)
{
	ChatContext *c = f->context;

	f->tokens = palloc(sizeof(int64) * (c->n + 1));
	f->left_out = palloc0(sizeof(bool) * (c->n + 1));
	f->question = -1;
	f->last_step = 0;
	for (int i = 0; i < c->n; i++)
	{
		f->tokens[i] = message_tokens(&c->messages[i]);
		/* what was made up for this request has no sequence */
		if (has_role(&c->messages[i], "user") && c->messages[i].sequence > 0)
			f->question = i;
		if (!is_result(&c->messages[i]))
			f->last_step = i;
	}
}

/* ---------- making it fit ---------- */

/* Notes what was done. */
static void
note(ChatWindow *w, ChatCompaction what)
{
	w->compaction = Max(w->compaction, what);
}

/* Replaces old outputs of tools by a marker, the oldest first. */
static void
collapse(Fit *f)
{
	for (int i = 0; i < f->last_step; i++)
	{
		ChatMessage *m = &f->context->messages[i];
		size_t		size = m->parts.data ? m->parts.len : m->content.len;

		if (!is_result(m) || size < MIN_COLLAPSE)
			continue;
		m->content = str(psprintf("[The output of this call, %zu bytes, was left out to save space.]",
								  size));
		m->parts.data = NULL;
		m->parts.len = 0;
		f->tokens[i] = message_tokens(m);
		note(f->window, CHAT_COMPACTION_COLLAPSED);
		if (fits(f))
			return;
	}
}

/*
 * Returns the sequence up to which a summary may reach, 0 if there is nothing
 * to sum up that the one before has not: the newest messages stay.  So does
 * the question: it is sent beside a summary of the steps that followed it.
 */
static int64
summary_reach(const Fit *f, int64 before)
{
	const ChatContext *c = f->context;

	for (int i = Min(c->n - keep_recent, c->n - 1); i >= 2; i--)
	{
		const ChatMessage *m = &c->messages[i];

		if (!is_result(m) && m->sequence > before + 1)
			return m->sequence - 1;
	}
	return 0;
}

/* Leaves out the oldest steps. */
static void
truncate_steps(Fit *f)
{
	ChatContext *c = f->context;
	int			start = c->summarized ? 1 : 0;

	while (start < f->last_step)
	{
		int			end = start + 1;

		while (end < c->n && is_result(&c->messages[end]))
			end++;
		if (start != f->question)
		{
			for (int i = start; i < end; i++)
				f->left_out[i] = true;
			note(f->window, CHAT_COMPACTION_TRUNCATED);
			if (fits(f))
				return;
		}
		start = end;
	}
}

/* Takes the messages that were left out out of the request. */
static void
squeeze(Fit *f)
{
	ChatContext *c = f->context;
	int			n = 0;

	for (int i = 0; i < c->n; i++)
		if (!f->left_out[i])
			c->messages[n++] = c->messages[i];
	c->n = n;
}

/* Returns the tokens that the window leaves to a request, 0 = not known. */
static int64
room_in_window(const ChatJob *job, const ChatServer *server)
{
	int64		window = server->context_window;
	char	   *text = chat_context_setting(job, "max_tokens");
	int64		reserve = text ? strtoll(text, NULL, 10) : server->max_tokens;

	if (reserve <= 0)
		reserve = Min(MAX_RESERVE, window / 4);
	return window > 0 ? Max(window - reserve, 1) : 0;
}

/* Makes the messages of a request fit, see window.h. */
void
chat_window_fit(const ChatJob *job, const ChatServer *server,
				const ChatWindowFrame *frame, ChatContext *context,
				ChatWindow *window)
{
	Fit			f = {.context = context, .window = window};
	int64		room = room_in_window(job, server);

	memset(window, 0, sizeof(*window));
	window->budget = room;
	/* the endpoint has refused a larger one */
	if (job->shrink_to > 0 && (room == 0 || job->shrink_to < room))
		window->budget = job->shrink_to;
	f.frame = REQUEST_TOKENS + text_tokens(str(frame->tools));
	if (frame->system)
		f.frame += MESSAGE_TOKENS + text_tokens(str(frame->system));
	window->frame_too_large = room > 0 &&
		chat_tokens_calibrate(f.frame, context->counted,
							  context->estimated) > room;
	measure(&f);
	if (context->summarized)
		note(window, CHAT_COMPACTION_SUMMARIZED);
	if (context->cut)
		note(window, CHAT_COMPACTION_TRUNCATED);
	if (fits(&f) || window->frame_too_large)
		return;
	collapse(&f);
	if (fits(&f))
		return;
	if (server->summarize && !job->summary_failed &&
		!(job->waited & CHAT_WAITED_SUMMARY))
		window->summary_reach = summary_reach(&f, job->summary_sequence);
	if (window->summary_reach > 0)
		return;
	truncate_steps(&f);
	squeeze(&f);
}

/* ---------- telling ---------- */

/* Returns the event that tells of a window. */
char *
chat_window_status(const ChatWindow *w)
{
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfo(&json, "{\"type\":\"data-status\",\"data\":{\"phase\":\"%s\""
					 ",\"contextTokens\":" INT64_FORMAT,
					 w->summary_reach > 0 ? "summarizing" : "request",
					 w->tokens);
	if (w->budget > 0)
		appendStringInfo(&json, ",\"contextBudget\":" INT64_FORMAT,
						 w->budget);
	chat_append_member(&json, "compaction", chat_window_compaction(w));
	appendStringInfoString(&json, "},\"transient\":true}");
	return json.data;
}

/* Returns what was done, as a task has it. */
const char *
chat_window_compaction(const ChatWindow *w)
{
	return compaction_names[w->compaction];
}

/* Returns the smaller of a setting of the session and an option. */
int64
chat_window_limit(const ChatJob *job, const char *setting, int64 option)
{
	char	   *text = chat_context_setting(job, setting);
	int64		wanted = text ? strtoll(text, NULL, 10) : 0;

	if (wanted <= 0 || option <= 0)
		return Max(wanted, option);
	return Min(wanted, option);
}
