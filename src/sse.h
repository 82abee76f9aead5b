/*
 * sse.h
 *	  Pull parser for text/event-stream by the WHATWG rules.
 *
 * Pure C, knows nothing of PostgreSQL.  The caller feeds byte ranges as they
 * arrive and pulls events:
 *
 *		while ((r = chat_sse_next(&sse, &p, end, &ev)) == CHAT_SSE_EVENT)
 *			use(ev.data, ev.len);
 *		if (r != CHAT_SSE_MORE)
 *			fail;
 *
 * and at the end of the transfer, once, chat_sse_finish.
 */
#ifndef CHAT_SSE_H
#define CHAT_SSE_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

/* an event's name is kept up to this many bytes, the rest is cut off */
#define CHAT_SSE_NAME_SIZE 24

/* a buffer larger than this is given back after its event */
#define CHAT_SSE_KEEP_SIZE 4096

typedef enum ChatSseResult
{
	CHAT_SSE_MORE,				/* all bytes are eaten, feed more */
	CHAT_SSE_EVENT,				/* *ev is an event */
	CHAT_SSE_TOO_LONG,			/* an event's data passed max_event; final */
	CHAT_SSE_NOMEM				/* malloc refused; final */
} ChatSseResult;

/*
 * One event.  The pointers stay good until the next call on the parser, and
 * no longer than the fed bytes; nothing is NUL-terminated.
 */
typedef struct ChatSseEvent
{
	const char *data;			/* data lines joined with \n */
	size_t		len;
	const char *name;			/* event field, empty if there was none */
	size_t		name_len;
} ChatSseEvent;

/* The parser's state; 88 bytes, and a malloc'ed buffer only while needed. */
typedef struct ChatSse
{
	char	   *buf;			/* data of the event being gathered */
	size_t		len;
	size_t		cap;
	size_t		max_event;		/* most bytes of data in one event */
	const char *held;			/* during a call: data line still in place */
	size_t		held_len;
	unsigned char line;			/* what the current line is (sse.c) */
	unsigned char head_len;		/* bytes in head */
	unsigned char name_len;
	unsigned char bom;			/* bytes of a byte order mark seen; 3 = past */
	bool		has_data;		/* the event has a data line */
	bool		skip_lf;		/* last byte was CR: an LF belongs to it */
	bool		dispatched;		/* buf holds an event that was handed out */
	unsigned char failed;		/* the final ChatSseResult, or 0 */
	char		head[8];		/* start of a line whose field is not known */
	char		name[CHAT_SSE_NAME_SIZE];
} ChatSse;

/* Starts a parser; a zeroed struct that is never fed needs no free. */
extern void chat_sse_init(ChatSse *sse, size_t max_event);

/* Eats bytes from *p until an event is whole or end is reached. */
extern ChatSseResult chat_sse_next(ChatSse *sse, const char **p,
								   const char *end, ChatSseEvent *ev);

/*
 * Tells that no more bytes come.  The standard drops an event that no blank
 * line has ended; real endpoints cut that line, so here it is an event.
 */
extern ChatSseResult chat_sse_finish(ChatSse *sse, ChatSseEvent *ev);

/* Frees the buffer; may be called again. */
extern void chat_sse_free(ChatSse *sse);

/* Says whether an event has this name. */
static inline bool
chat_sse_is(const ChatSseEvent *ev, const char *name)
{
	size_t		len = strlen(name);

	return ev->name_len == len && memcmp(ev->name, name, len) == 0;
}

#endif							/* CHAT_SSE_H */
