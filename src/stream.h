/*
 * stream.h
 *		One live attempt at a completion: transfer, parser, growing message,
 *		events, end.
 *
 * A stream lives in a memory context of its own and goes in one piece.  It
 * touches no table: the worker stores its log and its end, and tells it what
 * was committed.
 */
#ifndef CHAT_STREAM_H
#define CHAT_STREAM_H

#include "postgres.h"

#include "event.h"
#include "http.h"
#include "lib/ilist.h"
#include "provider.h"
#include "queue.h"
#include "server.h"
#include "sse.h"
#include "template.h"
#include "window.h"

/* One tool call of the answer, as far as it has come. */
typedef struct ChatStreamTool
{
	int			index;			/* the endpoint's, or by position */
	char	   *sent_id;		/* the endpoint's, NULL until known */
	char	   *id;				/* no other call's, once it is announced */
	char	   *name;			/* NULL until known */
	StringInfoData arguments;
	char	   *extra;			/* raw members to send back, or NULL */
	char	   *fn_extra;
	bool		announced;		/* tool-input-start is in the log */
} ChatStreamTool;

typedef enum ChatBlock
{
	CHAT_BLOCK_NONE,
	CHAT_BLOCK_TEXT,
	CHAT_BLOCK_REASONING
} ChatBlock;

typedef struct ChatStream
{
	dlist_node	node;			/* in the worker's list of streams */
	dlist_node	dirty_node;		/* in the worker's list of those to flush */
	bool		dirty;
	MemoryContext context;
	ChatJob		job;
	ChatEventTarget target;
	int64		seq;			/* last event that is committed */
	ChatEventLog log;			/* events since then */

	/* the request */
	ChatServer *server;
	char	   *key;			/* wiped with the stream */
	MemoryContext scratch;		/* what made the request; until it is sent */
	char	   *request;		/* body, until it is sent */
	int			request_len;
	int64		prompt_estimate;	/* tokens */
	ChatWindow	window;
	bool		deferred;		/* no request now: the job goes back */
	char	   *prompt_name;	/* of the system prompt, NULL = built-in */
	int			prompt_version;
	ChatTransfer *transfer;
	int			endpoint;		/* that counts the request, -1 = none */
	bool		answered;		/* as the endpoint counts it */
	ChatSse		sse;
	bool		plain;			/* a body, not a stream of events */
	bool		sniffed;		/* plain is known */
	ChatTemplate template;		/* of the last chunk that was only text */

	/* the answer */
	ChatBlock	block;			/* that is open */
	const char *block_id;
	int			blocks;
	StringInfoData text;
	StringInfoData reasoning;
	StringInfoData refusal;
	StringInfoData function_arguments;
	char	   *function_name;
	StringInfoData details;		/* elements of reasoning_details */
	size_t		details_size;	/* bytes of them that came */
	ChatStreamTool *tools;
	int			ntools;
	size_t		calls_size;		/* bytes of them so far */
	char	   *model;
	char	   *finish_reason;	/* the endpoint's word */
	bool		has_usage;
	ChatUsage	usage;
	bool		said_done;		/* the endpoint's end mark was seen */
	bool		content_seen;	/* listeners may have seen some of it */

	/* times, in ms of chat_stream_clock() */
	int64		opened_at;
	int64		content_at;		/* last content, or opened_at */
	int64		first_content_at;	/* 0 = none yet */

	/* the end */
	bool		ended;
	ChatErrorKind failure;		/* of an attempt that failed */
	bool		passing;		/* that failure is worth another attempt */
	ChatEnd		end;
	ChatEventLog end_log;		/* written with it */
	int64		retry_end_at;	/* storing it failed: not before this time */
	int			end_tries;
	int			memory_tries;	/* flushes in a row that had none for it */
} ChatStream;

extern void chat_stream_init(void);
extern ChatStream *chat_stream_create(const ChatJob *job,
									  MemoryContext parent);
extern void chat_stream_open(ChatStream *stream);
extern bool chat_stream_receive(ChatStream *stream);
extern int64 chat_stream_check_time(ChatStream *stream, int64 now);
extern void chat_stream_fail(ChatStream *stream, ChatErrorKind kind,
							 bool retryable, int status, const char *message);
extern void chat_stream_poisoned(ChatStream *stream);
extern void chat_stream_cancel(ChatStream *stream);
extern void chat_stream_close(ChatStream *stream);
extern void chat_stream_free(ChatStream *stream);
extern int64 chat_stream_clock(void);
extern int64 chat_stream_backoff(int tries);

#endif							/* CHAT_STREAM_H */
