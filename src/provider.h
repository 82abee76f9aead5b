/*
 * provider.h
 *	  The seam between the runtime and one kind of LLM API: build a request,
 *	  read one payload of the answer, read an error body.  No socket, no
 *	  table.  Usable without postgres.h.
 *
 * Strings that a parser returns point into the text that was given or are
 * palloc'ed in the current memory context: give the text and that context
 * the same, short life.  They are UTF-8 without NUL and not terminated.
 * Whoever builds a request leaves scratch in the current memory context, too.
 */
#ifndef CHAT_PROVIDER_H
#define CHAT_PROVIDER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct StringInfoData;

/* A piece of text, not NUL-terminated; data == NULL means absent. */
typedef struct ChatStr
{
	const char *data;
	size_t		len;
} ChatStr;

/* A piece of one tool call; pieces of one call carry the same index. */
typedef struct ChatToolDelta
{
	int			index;			/* -1 when the endpoint gave none */
	ChatStr		id;
	ChatStr		name;			/* function.name */
	ChatStr		arguments;		/* function.arguments, to be appended */
	ChatStr		extra;			/* unknown members, raw: "k":v,"k2":v2 */
	ChatStr		fn_extra;		/* the same of the function object */
} ChatToolDelta;

/* Token counts; -1 = the endpoint did not tell. */
typedef struct ChatUsage
{
	int64_t		prompt;
	int64_t		completion;
	int64_t		cached;			/* part of prompt */
	int64_t		reasoning;		/* part of completion */
} ChatUsage;

/* What one payload of a stream, or a whole plain body, told. */
typedef struct ChatChunk
{
	bool		done;			/* the stream's own end mark */
	ChatStr		text;			/* to be appended */
	ChatStr		reasoning;		/* to be appended */
	ChatStr		refusal;		/* to be appended */
	ChatStr		finish_reason;	/* the endpoint's word; never empty */
	ChatStr		model;			/* the model that answered */
	ChatStr		response_id;
	ChatStr		reasoning_details;	/* raw JSON array, see join_reasoning */
	ChatStr		function_name;	/* legacy function_call.name */
	ChatStr		function_arguments; /* to be appended */
	int			ntools;
	ChatToolDelta *tools;		/* in the order of the payload */
	bool		has_usage;
	ChatUsage	usage;
	bool		is_error;		/* an error object, also inside a 200 */
	ChatStr		error_message;
	ChatStr		error_code;		/* string or number, as text */
	ChatStr		error_type;
	int			error_status;	/* HTTP status named in it, or 0 */
} ChatChunk;

/*
 * The closed list of error codes.  A code's name and whether the runtime tries
 * again by itself: chat_provider_error().
 */
typedef enum ChatErrorKind
{
	CHAT_ERROR_AUTHENTICATION_FAILED,
	CHAT_ERROR_RATE_LIMITED,
	CHAT_ERROR_CONTEXT_LENGTH_EXCEEDED,
	CHAT_ERROR_CONTENT_FILTER,
	CHAT_ERROR_MODEL_NOT_AVAILABLE_REGION,
	CHAT_ERROR_ENDPOINT_ERROR,
	CHAT_ERROR_INVALID_RESPONSE,
	CHAT_ERROR_EMPTY_RESPONSE,
	CHAT_ERROR_CONNECT_TIMEOUT,
	CHAT_ERROR_FIRST_TOKEN_TIMEOUT,
	CHAT_ERROR_IDLE_TIMEOUT,
	CHAT_ERROR_STREAM_TIMEOUT,
	CHAT_ERROR_LIMIT_REACHED,
	CHAT_ERROR_CANCELLED,
	CHAT_ERROR_TOOL_UNKNOWN_OUTCOME,
	CHAT_ERROR_RESTORED
} ChatErrorKind;

#define CHAT_ERROR_COUNT (CHAT_ERROR_RESTORED + 1)

typedef struct ChatErrorCode
{
	const char *name;			/* "rate_limited" */
	bool		retryable;		/* for endpoint_error the status decides, see
								 * ChatEndpointError */
} ChatErrorCode;

/* What an endpoint's error means. */
typedef struct ChatEndpointError
{
	ChatErrorKind kind;
	bool		retryable;		/* of this very error, by kind and status */
	int			status;			/* HTTP status, or the one told in a stream */
	ChatStr		message;		/* the endpoint's own words, never absent, cut
								 * at 2000 bytes; may quote the API key */
	ChatStr		code;			/* the endpoint's own code, or absent */
} ChatEndpointError;

/* One stored message as a request needs it. */
typedef struct ChatMessage
{
	int64_t		sequence;		/* where it is stored, 0 = made up */
	ChatStr		role;			/* one of the six of OpenAI's API */
	ChatStr		content;		/* plain text; absent = SQL NULL */
	ChatStr		name;
	ChatStr		tool_call_id;
	ChatStr		refusal;
	ChatStr		parts;			/* raw JSON array; replaces content */
	ChatStr		tool_calls;		/* raw JSON array, as stored */
	ChatStr		function_call;	/* raw JSON object (legacy) */
	ChatStr		reasoning_details;	/* raw JSON array to send back */
	ChatStr		context;		/* raw JSON object {"url","content"} */
	bool		interrupted;	/* the answer was cut short */
	bool		foreign;		/* of another server: what is opaque stays here */
} ChatMessage;

/* What a request says; absent members are not sent. */
typedef struct ChatRequest
{
	ChatStr		model;
	ChatStr		system;			/* system prompt, goes first */
	const ChatMessage *messages;
	int			nmessages;
	ChatStr		temperature;	/* numbers as JSON writes them */
	ChatStr		top_p;
	ChatStr		max_tokens;
	ChatStr		max_tokens_field;	/* absent = max_tokens */
	bool		stream;
	bool		include_usage;	/* counts only with stream */
	bool		thinking;		/* "reasoning":{"enabled":true} */
	ChatStr		user;			/* tracing: whose request it is, ... */
	ChatStr		session_id;		/* ... both cut at 128 characters */
	ChatStr		tools;			/* raw JSON */
	ChatStr		tool_choice;	/* raw JSON */
	ChatStr		parallel_tool_calls;	/* raw JSON */
	ChatStr		extra_body;		/* raw JSON object, placeholders expanded; its
								 * members replace ours */
} ChatRequest;

/* One kind of API. */
typedef struct ChatProvider
{
	const char *name;
	const char *path;			/* appended to the server's base_url */

	/* appends the request's body to out */
	void		(*build_request) (struct StringInfoData *out,
								  const ChatRequest *req);

	/*
	 * Reads one payload of a stream into *out, which it zeroes first.  False =
	 * not what the API sends.  Throws nothing but out of memory.
	 */
	bool		(*parse_chunk) (const char *data, size_t len, ChatChunk *out);

	/* the same for the whole body of an answer that is not a stream */
	bool		(*parse_response) (const char *data, size_t len,
								   ChatChunk *out);

	/*
	 * Appends the reasoning_details of a message: an array of those of all
	 * chunks, in which a block that came in pieces is one again.
	 */
	void		(*join_reasoning) (struct StringInfoData *out,
								   ChatStr pieces);

	/* says what an event means that is called an error; any data will do */
	void		(*event_error) (const char *data, size_t len,
								ChatEndpointError *out);

	/* says what a response with an error status means; any body will do */
	void		(*read_error) (int http_status, const char *body, size_t len,
							   ChatEndpointError *out);

	/* says what a chunk with is_error means */
	void		(*chunk_error) (const ChatChunk *chunk,
								ChatEndpointError *out);

	/*
	 * The AI SDK's word for the endpoint's finish reason: stop, length,
	 * content-filter, tool-calls, error or other.
	 */
	const char *(*finish_reason) (ChatStr reason);
} ChatProvider;

/* the OpenAI chat completions API and all that speak it (openai.c) */
extern const ChatProvider chat_openai;

/* Appends the JSON array of messages as the API wants them. */
extern void chat_openai_messages(struct StringInfoData *out,
								 const ChatMessage *messages, int nmessages);

/* The name of an error code and whether the runtime tries again by itself. */
extern const ChatErrorCode *chat_provider_error(ChatErrorKind kind);

#endif							/* CHAT_PROVIDER_H */
