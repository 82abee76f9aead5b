/*
 * fake_llm.c - a scripted OpenAI-compatible endpoint for tests, demo and bench
 *
 * One process, one thread, one epoll set; nothing here is shared with the
 * extension's sources.  The process owns every connection, the gates and the
 * record of requests; no locks exist because no second thread does.
 *
 * Usage: fake_llm [--port N] [--host ADDR] [--delay MS] [--api-key KEY]
 *                 [--die-with-stdin]
 * Prints "port=N" when it listens.  Ends on SIGTERM and SIGINT.
 *
 * What an answer looks like is commanded by the last user message: the text
 * between [[ and ]], blank-separated key=value pairs, values percent-encoded
 * where they hold blanks.  An unknown key is answered with status 400.  A
 * request for a title (at most 20 tokens, the prompt says "title") follows
 * only a block that holds for=title, all others only blocks without it.
 * Without a directive the message is echoed with a few sentences; a request
 * for at most 20 tokens is answered "Fake Title Here".
 *
 * A "unit" is one paced piece of the answer: a reasoning, content or refusal
 * token, a tool call's head or a piece of its arguments, counted from 0
 * through the whole answer.
 *
 * Content:  tokens=N  size=B (pad each)  stamp=1 (19 digits of
 *   CLOCK_MONOTONIC ns and a blank before each)  text=T  repeat=N
 *   reasoning=N  reasoning_field=F  reasoning_details=1  refusal=T
 *   nul=1 surrogate=1 badutf8=1 (one token each, before the others)
 * Tools:  tool=NAME [args=JSON] [id=ID], repeatable;  argsplit=B (8; 0 sends
 *   each call whole)  interleave=1  noid=1  noindex=1  toolextra=1
 *   toolfinish=R  steps=N (tool steps before the last answer; 1)
 *   thentokens=N  thentext=T  then.KEY=V (the last answer's directives; its
 *   default is "Tool said: " and the last tool result)
 * A member "fake" of the request stands for the last user message's text.
 * Steps:  at=N: this block is for the request that follows N tool steps, and
 *   then no other is; without such a block the others count
 * Pace:  first=MS  delay=MS  gate=NAME  gateat=UNIT:NAME  gatehead=NAME
 *   (before the status line)
 * Wire:  split=B  splitat=K  eol=lf|cr|crlf  bom=1  comments=1  multidata=1
 *   nospace=1  notail=1 (no newline after the last event)  closed=1 (the end
 *   of the connection ends the body)  plain=1  norole=1  unknown=1  nulls=1
 *   finish=R  usage=final|first|none|split  prompt_tokens=N
 *   completion_tokens=N  cached=N  reasoning_tokens=N
 * Failure:  status=CODE  retry_after=S|date:S  errmsg=T  errcode=T  errtype=T
 *   errbody=T  html=1  location=URL  error_at=UNIT  garbage=UNIT  stall=UNIT
 *   cutafter=UNIT  cut=BYTES  rst=1 (a cut resets)  hang=1
 *   reset=1 (2: closes)
 *   hugeline=B  hugebody=B (or huge=B)  nodone=1  nofinish=1
 *   times=N key=K: only the first N requests with that key fail (the key's
 *   default is the directive itself)
 *
 * Other endpoints:
 *   GET /v1/models
 *   POST /tools/NAME   the arguments' "command" holds status= hang= huge=
 *                      delay= text= gate= reset= retry_after= times= key=
 *   GET /requests      all recorded requests, oldest first; ?last=1: an array
 *                      of the last one; DELETE /requests forgets them
 *   GET /stats         counters; ?wait=NAME:N answers when the counter has
 *                      reached N, ?wait=idle when nothing is active
 *   POST /gate/NAME    ?n=K lets K waiting or coming streams pass
 *   GET /gate/NAME     {"waiting":..,"passes":..}; ?wait=K answers when K wait
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/queue.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HIGH_WATER		(64 * 1024) /* unsent bytes at which a stream rests */
#define MAX_HEAD		(64 * 1024)
#define MAX_BODY		(256 * 1024 * 1024)
#define MAX_RECORDS		2000
#define MAX_RECORDED	(256 * 1024 * 1024) /* bytes of all records */
#define MAX_DEPTH		200
#define MAX_GATES		16
#define MAX_CALLS		64
#define MAX_PIECES		1000	/* writes of one stream before others' turn */
#define MAX_EVENTS		512
#define COMMENT_NS		INT64_C(50000000)
#define MS				INT64_C(1000000)

/* ---------------------------------------------------------------- buffers */

typedef struct Buf
{
	char	   *data;
	size_t		off;			/* bytes already consumed */
	size_t		len;
	size_t		cap;
} Buf;

/* Ends the process: a fake without memory is of no use. */
static void
die(const char *what)
{
	fprintf(stderr, "fake_llm: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* Allocates zeroed memory or dies. */
static void *
zalloc(size_t size)
{
	void	   *p = calloc(1, size);

	if (p == NULL)
		die("calloc");
	return p;
}

/* Makes room for more bytes behind the buffer's end. */
static char *
buf_need(Buf *b, size_t more)
{
	if (b->len + more > b->cap)
	{
		size_t		cap = b->cap ? b->cap : 256;

		while (cap < b->len + more)
			cap *= 2;
		b->data = realloc(b->data, cap);
		if (b->data == NULL)
			die("realloc");
		b->cap = cap;
	}
	return b->data + b->len;
}

/* Appends bytes. */
static void
buf_put(Buf *b, const char *data, size_t len)
{
	if (len == 0)
		return;
	memcpy(buf_need(b, len), data, len);
	b->len += len;
}

/* Appends a string. */
static void
buf_puts(Buf *b, const char *s)
{
	buf_put(b, s, strlen(s));
}

/* Appends one byte n times. */
static void
buf_fill(Buf *b, char c, size_t n)
{
	memset(buf_need(b, n), c, n);
	b->len += n;
}

/* Appends formatted text. */
static void __attribute__((format(printf, 2, 3)))
buf_printf(Buf *b, const char *format,...)
{
	va_list		ap;
	int			n;

	va_start(ap, format);
	n = vsnprintf(NULL, 0, format, ap);
	va_end(ap);
	va_start(ap, format);
	vsnprintf(buf_need(b, n + 1), n + 1, format, ap);
	va_end(ap);
	b->len += n;
}

/* Returns the contents as a C string. */
static const char *
buf_str(Buf *b)
{
	*buf_need(b, 1) = '\0';
	return b->data + b->off;
}

/* Returns how many bytes are not consumed yet. */
static size_t
buf_left(const Buf *b)
{
	return b->len - b->off;
}

/* Empties a buffer, keeps its memory unless that is large. */
static void
buf_reset(Buf *b)
{
	b->off = b->len = 0;
	if (b->cap > 4 * HIGH_WATER)
	{
		free(b->data);
		b->data = NULL;
		b->cap = 0;
	}
}

/* Gives a buffer's memory back. */
static void
buf_free(Buf *b)
{
	free(b->data);
	memset(b, 0, sizeof(*b));
}

/* Returns the length of the valid UTF-8 character at p, or 0. */
static int
utf8_len(const unsigned char *p, size_t left)
{
	int			n;
	uint32_t	c;

	if (p[0] < 0x80)
		return 1;
	if (p[0] < 0xc2 || p[0] > 0xf4)
		return 0;
	n = p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
	if (left < (size_t) n)
		return 0;
	c = p[0] & (0x7f >> n);
	for (int i = 1; i < n; i++)
	{
		if ((p[i] & 0xc0) != 0x80)
			return 0;
		c = c << 6 | (p[i] & 0x3f);
	}
	if ((n == 3 && c < 0x800) || (n == 4 && (c < 0x10000 || c > 0x10ffff)) ||
		(c >= 0xd800 && c < 0xe000))
		return 0;
	return n;
}

/* Appends text as the inside of a JSON string; stray bytes as \u00XX. */
static void
buf_escape(Buf *b, const char *text, size_t len)
{
	const unsigned char *p = (const unsigned char *) text;
	const unsigned char *end = p + len;

	while (p < end)
	{
		const unsigned char *run = p;
		int			n = 0;

		while (p < end && *p >= 0x20 && *p != '"' && *p != '\\' &&
			   (n = utf8_len(p, end - p)) > 0)
			p += n;
		buf_put(b, (const char *) run, p - run);
		if (p == end)
			break;
		if (*p == '"' || *p == '\\')
			buf_printf(b, "\\%c", *p);
		else if (*p == '\n')
			buf_puts(b, "\\n");
		else
			buf_printf(b, "\\u%04x", *p);
		p++;
	}
}

/* Appends text as a JSON string. */
static void
buf_json(Buf *b, const char *text, size_t len)
{
	buf_put(b, "\"", 1);
	buf_escape(b, text, len);
	buf_put(b, "\"", 1);
}

/* Appends percent-decoded text. */
static void
buf_unpercent(Buf *b, const char *text, size_t len)
{
	for (size_t i = 0; i < len; i++)
	{
		unsigned	byte;

		if (text[i] == '%' && i + 2 < len &&
			sscanf(text + i + 1, "%2x", &byte) == 1)
		{
			buf_fill(b, (char) byte, 1);
			i += 2;
		}
		else
			buf_put(b, text + i, 1);
	}
}

/* Appends a number in decimal, left-padded with zeros to a width. */
static void
buf_decimal(Buf *b, uint64_t value, int width)
{
	char		digits[24];
	int			n = 0;

	do
	{
		digits[sizeof(digits) - ++n] = (char) ('0' + value % 10);
		value /= 10;
	} while (value > 0 || n < width);
	buf_put(b, digits + sizeof(digits) - n, n);
}

/* Appends a chunk's size line. */
static void
buf_chunk_size(Buf *b, size_t size)
{
	char		line[19] = "................\r\n";
	int			at = 16;

	do
		line[--at] = "0123456789abcdef"[size & 15];
	while ((size >>= 4) > 0);
	buf_put(b, line + at, 18 - at);
}

/* ------------------------------------------------------------ JSON reader */

/* A cursor over JSON text; "bad" once it met something that is not JSON. */
typedef struct Json
{
	const char *p;
	const char *end;
	int			depth;
	bool		bad;
} Json;

/* Marks the text as bad and moves to its end, so that every loop ends. */
static bool
json_fail(Json *j)
{
	j->bad = true;
	j->p = j->end;
	return false;
}

/* Skips blanks and returns the next byte, 0 at the end. */
static char
json_peek(Json *j)
{
	while (j->p < j->end && (*j->p == ' ' || *j->p == '\t' ||
							 *j->p == '\n' || *j->p == '\r'))
		j->p++;
	return j->p < j->end ? *j->p : '\0';
}

/* Enters an array or object; false when it is empty or something else. */
static bool
json_open(Json *j, char open)
{
	if (json_peek(j) != open || ++j->depth > MAX_DEPTH)
		return json_fail(j);
	j->p++;
	if (json_peek(j) != (open == '{' ? '}' : ']'))
		return true;
	j->p++;
	j->depth--;
	return false;
}

/* Moves on to the next element; false, and out of it, behind the last. */
static bool
json_more(Json *j, char close)
{
	char		c = json_peek(j);

	if (c != ',' && c != close)
		return json_fail(j);
	j->p++;
	if (c == close)
		j->depth--;
	return c == ',';
}

/* Reads four hex digits. */
static bool
json_hex(Json *j, uint32_t *code)
{
	*code = 0;
	for (int i = 0; i < 4; i++, j->p++)
	{
		const char *digits = "0123456789abcdef";
		const char *at;

		if (j->p >= j->end || *j->p == '\0')
			return json_fail(j);
		at = strchr(digits, *j->p | 0x20);
		if (at == NULL)
			return json_fail(j);
		*code = *code << 4 | (uint32_t) (at - digits);
	}
	return true;
}

/* Appends a code point in UTF-8; surrogates come out as U+FFFD. */
static void
put_utf8(Buf *b, uint32_t c)
{
	char		s[4];
	int			n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;

	if (c >= 0xd800 && c < 0xe000)
		c = 0xfffd;
	for (int i = n - 1; i > 0; i--, c >>= 6)
		s[i] = (char) (0x80 | (c & 0x3f));
	s[0] = (char) (n == 1 ? c : (0xff00 >> n & 0xff) | c);
	buf_put(b, s, n);
}

/* Reads what follows a backslash. */
static bool
json_escape(Json *j, Buf *out)
{
	const char *from = "\"\\/bfnrt";
	const char *to = "\"\\/\b\f\n\r\t";
	const char *at;
	uint32_t	code;
	uint32_t	low;

	if (j->p >= j->end || *j->p == '\0')
		return json_fail(j);
	if (*j->p != 'u')
	{
		at = strchr(from, *j->p++);
		if (at == NULL)
			return json_fail(j);
		if (out)
			buf_put(out, to + (at - from), 1);
		return true;
	}
	j->p++;
	if (!json_hex(j, &code))
		return false;
	if (code >= 0xd800 && code < 0xdc00 && j->end - j->p >= 6 &&
		j->p[0] == '\\' && j->p[1] == 'u')
	{
		Json		ahead = *j;

		ahead.p += 2;
		if (json_hex(&ahead, &low) && low >= 0xdc00 && low < 0xe000)
		{
			code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
			j->p = ahead.p;
		}
	}
	if (out)
		put_utf8(out, code);
	return true;
}

/* Reads a string and appends its text to out, which may be NULL. */
static bool
json_string(Json *j, Buf *out)
{
	if (json_peek(j) != '"')
		return json_fail(j);
	j->p++;
	while (j->p < j->end && *j->p != '"')
	{
		const char *run = j->p;

		while (j->p < j->end && *j->p != '"' && *j->p != '\\')
		{
			int			n = utf8_len((const unsigned char *) j->p,
									 j->end - j->p);

			if (n == 0 || (unsigned char) *j->p < 0x20)
				return json_fail(j);
			j->p += n;
		}
		if (out)
			buf_put(out, run, j->p - run);
		if (j->p < j->end && *j->p == '\\')
		{
			j->p++;
			if (!json_escape(j, out))
				return false;
		}
	}
	if (j->p >= j->end)
		return json_fail(j);
	j->p++;
	return true;
}

/* Reads an object's key and the colon. */
static bool
json_key(Json *j, Buf *key)
{
	buf_reset(key);
	if (!json_string(j, key))
		return false;
	if (json_peek(j) != ':')
		return json_fail(j);
	j->p++;
	buf_str(key);
	return true;
}

/* Skips digits; false when there is none. */
static bool
json_digits(Json *j)
{
	const char *from = j->p;

	while (j->p < j->end && *j->p >= '0' && *j->p <= '9')
		j->p++;
	return j->p > from ? true : json_fail(j);
}

/* Skips a number, true, false or null. */
static bool
json_scalar(Json *j)
{
	static const char *const words[] = {"true", "false", "null"};

	for (int i = 0; i < 3; i++)
	{
		size_t		n = strlen(words[i]);

		if ((size_t) (j->end - j->p) >= n && memcmp(j->p, words[i], n) == 0)
		{
			j->p += n;
			return true;
		}
	}
	if (*j->p == '-')
		j->p++;
	if (j->end - j->p > 1 && j->p[0] == '0' && j->p[1] >= '0' &&
		j->p[1] <= '9')
		return json_fail(j);
	if (!json_digits(j))
		return false;
	if (j->p < j->end && *j->p == '.')
	{
		j->p++;
		if (!json_digits(j))
			return false;
	}
	if (j->p < j->end && (*j->p | 0x20) == 'e')
	{
		j->p++;
		if (j->p < j->end && (*j->p == '+' || *j->p == '-'))
			j->p++;
		return json_digits(j);
	}
	return true;
}

/* Skips one value of any kind. */
static bool
json_skip(Json *j)
{
	char		c = json_peek(j);

	if (c == '"')
		return json_string(j, NULL);
	if (c == '{' || c == '[')
	{
		char		close = c == '{' ? '}' : ']';

		if (!json_open(j, c))
			return !j->bad;
		do
		{
			if (c == '{')
			{
				if (!json_string(j, NULL) || json_peek(j) != ':')
					return json_fail(j);
				j->p++;
			}
			if (!json_skip(j))
				return false;
		} while (json_more(j, close));
		return !j->bad;
	}
	return c == '\0' ? json_fail(j) : json_scalar(j);
}

/* Says whether text is one JSON value and nothing else. */
static bool
json_valid(const char *text, size_t len)
{
	Json		j = {text, text + len, 0, false};

	return json_skip(&j) && json_peek(&j) == '\0' && j.p == j.end;
}

/* ------------------------------------------------- what a request asks for */

typedef struct Facts
{
	bool		stream;
	bool		include_usage;
	long		max_tokens;		/* -1: not given */
	long		prompt_bytes;
	int			messages;
	int			tool_steps;		/* since the last user message */
	bool		says_title;
	Buf			model;
	Buf			user;			/* the last user message's text */
	Buf			fake;			/* what stands for it, if anything */
	Buf			tool;			/* the last tool result */
} Facts;

/* Appends a message's content: a string, or the text parts of an array. */
static void
read_content(Json *j, Buf *out)
{
	Buf			key = {0};

	if (json_peek(j) == '"')
		json_string(j, out);
	else if (json_peek(j) != '[')
		json_skip(j);
	else if (json_open(j, '['))
		do
		{
			if (json_peek(j) != '{')
				json_skip(j);
			else if (json_open(j, '{'))
				do
				{
					if (!json_key(j, &key))
						break;
					if (strcmp(key.data, "text") == 0 && json_peek(j) == '"')
						json_string(j, out);
					else
						json_skip(j);
				} while (json_more(j, '}'));
		} while (json_more(j, ']'));
	buf_free(&key);
}

/* Files one message away that has been read. */
static void
note_message(Facts *f, const char *role, Buf *content, bool calls)
{
	Buf		   *keep = NULL;

	f->messages++;
	f->prompt_bytes += (long) content->len + 12;
	if (strcmp(role, "user") == 0)
	{
		keep = &f->user;
		f->tool_steps = 0;
		buf_reset(&f->tool);
	}
	else if (strcmp(role, "tool") == 0 || strcmp(role, "function") == 0)
		keep = &f->tool;
	else if (strcmp(role, "assistant") == 0)
		f->tool_steps += calls;
	if (strcmp(role, "assistant") != 0 &&
		strcasestr(buf_str(content), "title") != NULL)
		f->says_title = true;
	if (keep)
	{
		Buf			old = *keep;

		*keep = *content;
		*content = old;
	}
}

/* Reads one message. */
static void
read_message(Json *j, Facts *f)
{
	Buf			key = {0};
	Buf			role = {0};
	Buf			content = {0};
	bool		calls = false;

	if (json_open(j, '{'))
		do
		{
			if (!json_key(j, &key))
				break;
			if (strcmp(key.data, "role") == 0 && json_peek(j) == '"')
				json_string(j, &role);
			else if (strcmp(key.data, "content") == 0)
				read_content(j, &content);
			else
			{
				if (strcmp(key.data, "tool_calls") == 0)
					calls = json_peek(j) == '[';
				json_skip(j);
			}
		} while (json_more(j, '}'));
	note_message(f, buf_str(&role), &content, calls);
	buf_free(&key);
	buf_free(&role);
	buf_free(&content);
}

/* Reads one member of the request's top level. */
static void
read_member(Json *j, const char *key, Facts *f)
{
	Buf			inner = {0};

	if (strcmp(key, "stream") == 0)
		f->stream = json_peek(j) == 't';
	if (strcmp(key, "max_tokens") == 0 ||
		strcmp(key, "max_completion_tokens") == 0)
		if (json_peek(j) >= '0' && json_peek(j) <= '9')
			f->max_tokens = strtol(j->p, NULL, 10);
	if (strcmp(key, "model") == 0 && json_peek(j) == '"')
		json_string(j, &f->model);
	else if (strcmp(key, "fake") == 0 && json_peek(j) == '"')
		json_string(j, &f->fake);
	else if (strcmp(key, "messages") == 0 && json_peek(j) == '[')
	{
		if (json_open(j, '['))
			do
				read_message(j, f);
			while (json_more(j, ']'));
	}
	else if (strcmp(key, "stream_options") == 0 && json_peek(j) == '{')
	{
		if (json_open(j, '{'))
			do
			{
				if (!json_key(j, &inner))
					break;
				if (strcmp(inner.data, "include_usage") == 0)
					f->include_usage = json_peek(j) == 't';
				json_skip(j);
			} while (json_more(j, '}'));
	}
	else
		json_skip(j);
	buf_free(&inner);
}

/* Reads a chat completion request; false when it is not one. */
static bool
facts_read(Facts *f, const char *body, size_t len)
{
	Json		j = {body, body + len, 0, false};
	Buf			key = {0};

	memset(f, 0, sizeof(*f));
	f->max_tokens = -1;
	if (json_open(&j, '{'))
		do
		{
			if (!json_key(&j, &key))
				break;
			read_member(&j, key.data, f);
		} while (json_more(&j, '}'));
	buf_free(&key);
	return !j.bad && f->messages > 0;
}

/* Gives the memory of the facts back. */
static void
facts_free(Facts *f)
{
	buf_free(&f->model);
	buf_free(&f->user);
	buf_free(&f->fake);
	buf_free(&f->tool);
}

/* ------------------------------------------------------------- directives */

typedef struct GateStop
{
	long		at;				/* unit; -1: before the status line */
	char	   *name;
} GateStop;

typedef struct ToolCall
{
	char	   *name;
	char	   *args;
	char	   *id;
	size_t		pos;			/* bytes of args that were sent */
	bool		opened;
} ToolCall;

/* How one request is answered; numbers are -1 and texts NULL by default. */
typedef struct Plan
{
	/* content */
	long		tokens;
	long		size;
	long		stamp;
	char	   *text;
	long		repeat;
	long		reasoning;
	char	   *reasoning_field;
	long		reasoning_details;
	char	   *refusal;
	long		nul;
	long		surrogate;
	long		badutf8;
	/* tools */
	long		argsplit;
	long		interleave;
	long		noid;
	long		noindex;
	long		toolextra;
	char	   *toolfinish;
	long		steps;
	/* pace, in nanoseconds */
	long		first;
	long		delay;
	/* wire */
	long		split;
	long		splitat;
	char	   *eol;
	long		bom;
	long		comments;
	long		multidata;
	long		nospace;
	long		notail;
	long		closed;
	long		plain;
	long		norole;
	long		unknown;
	long		nulls;
	char	   *finish;
	char	   *usage;
	long		prompt_tokens;
	long		completion_tokens;
	long		cached;
	long		reasoning_tokens;
	/* failure */
	long		status;
	char	   *retry_after;
	char	   *errmsg;
	char	   *errcode;
	char	   *errtype;
	char	   *errbody;
	long		html;
	char	   *location;
	long		error_at;
	long		garbage;
	long		stall;
	long		cutafter;
	long		cut;
	long		rst;
	long		hang;
	long		reset;
	long		hugeline;
	long		hugebody;
	long		nodone;
	long		nofinish;
	/* lists */
	GateStop	gates[MAX_GATES];
	int			ngates;
	ToolCall	calls[MAX_CALLS];
	int			ncalls;
} Plan;

typedef enum KeyType
{
	KEY_INT, KEY_MS, KEY_TEXT
} KeyType;

typedef enum KeyClass
{
	CLASS_BODY,					/* not for the answer after the tools */
	CLASS_WIRE,					/* for every answer */
	CLASS_FAIL					/* as BODY, and only "times" times */
} KeyClass;

typedef struct KeySpec
{
	const char *name;
	KeyType		type;
	KeyClass	class;
	size_t		offset;
} KeySpec;

#define KEY(name, type, class) {#name, KEY_##type, CLASS_##class, \
	offsetof(Plan, name)}

static const KeySpec key_specs[] = {
	KEY(tokens, INT, BODY), KEY(size, INT, WIRE), KEY(stamp, INT, WIRE),
	KEY(text, TEXT, BODY), KEY(repeat, INT, BODY),
	KEY(reasoning, INT, BODY), KEY(reasoning_field, TEXT, WIRE),
	KEY(reasoning_details, INT, BODY), KEY(refusal, TEXT, BODY),
	KEY(nul, INT, BODY), KEY(surrogate, INT, BODY), KEY(badutf8, INT, BODY),
	KEY(argsplit, INT, WIRE), KEY(interleave, INT, WIRE),
	KEY(noid, INT, WIRE), KEY(noindex, INT, WIRE), KEY(toolextra, INT, WIRE),
	KEY(toolfinish, TEXT, WIRE), KEY(steps, INT, WIRE),
	KEY(first, MS, WIRE), KEY(delay, MS, WIRE),
	KEY(split, INT, WIRE), KEY(splitat, INT, WIRE), KEY(eol, TEXT, WIRE),
	KEY(bom, INT, WIRE), KEY(comments, INT, WIRE), KEY(multidata, INT, WIRE),
	KEY(nospace, INT, WIRE), KEY(notail, INT, WIRE), KEY(closed, INT, WIRE),
	KEY(plain, INT, WIRE), KEY(norole, INT, WIRE), KEY(unknown, INT, WIRE),
	KEY(nulls, INT, WIRE), KEY(finish, TEXT, BODY), KEY(usage, TEXT, WIRE),
	KEY(prompt_tokens, INT, WIRE), KEY(completion_tokens, INT, WIRE),
	KEY(cached, INT, WIRE), KEY(reasoning_tokens, INT, WIRE),
	KEY(status, INT, FAIL), KEY(retry_after, TEXT, FAIL),
	KEY(errmsg, TEXT, FAIL), KEY(errcode, TEXT, FAIL),
	KEY(errtype, TEXT, FAIL), KEY(errbody, TEXT, FAIL), KEY(html, INT, FAIL),
	KEY(location, TEXT, FAIL), KEY(error_at, INT, FAIL),
	KEY(garbage, INT, FAIL), KEY(stall, INT, FAIL), KEY(cutafter, INT, FAIL),
	KEY(cut, INT, FAIL), KEY(rst, INT, FAIL), KEY(hang, INT, FAIL),
	KEY(reset, INT, FAIL), KEY(hugeline, INT, FAIL), KEY(hugebody, INT, FAIL),
	KEY(nodone, INT, FAIL), KEY(nofinish, INT, FAIL),
};

#define NKEYS (sizeof(key_specs) / sizeof(key_specs[0]))

/* One key=value pair of a directive. */
typedef struct Pair
{
	const char *key;
	size_t		klen;
	const char *value;
	size_t		vlen;
} Pair;

/* How often a key=K has been seen. */
typedef struct KeyCount
{
	char	   *key;
	long		seen;
	LIST_ENTRY(KeyCount) link;
} KeyCount;

static LIST_HEAD(, KeyCount) key_counts = LIST_HEAD_INITIALIZER(key_counts);
static long default_delay;

/* Cuts the next pair off the text at *p; false at the end. */
static bool
next_pair(const char **p, const char *end, Pair *pair)
{
	const char *eq;

	while (*p < end && strchr(" \t\r\n", **p))
		(*p)++;
	if (*p == end)
		return false;
	pair->key = *p;
	while (*p < end && !strchr(" \t\r\n", **p))
		(*p)++;
	eq = memchr(pair->key, '=', *p - pair->key);
	pair->klen = (eq ? eq : *p) - pair->key;
	pair->value = eq ? eq + 1 : "1";
	pair->vlen = eq ? (size_t) (*p - pair->value) : 1;
	return true;
}

/* Says whether a pair has this key. */
static bool
pair_is(const Pair *pair, const char *key)
{
	return strlen(key) == pair->klen &&
		memcmp(pair->key, key, pair->klen) == 0;
}

/* Returns a pair's value decoded, as a new string. */
static char *
pair_text(const Pair *pair)
{
	Buf			b = {0};

	buf_unpercent(&b, pair->value, pair->vlen);
	buf_str(&b);
	return b.data;
}

/* Counts a request under its key and says whether it is to fail. */
static bool
count_failure(const char *directive, const char *end)
{
	const char *p = directive;
	char	   *key = NULL;
	long		times = -1;
	Pair		pair;
	KeyCount   *count;

	while (next_pair(&p, end, &pair))
		if (pair_is(&pair, "times"))
			times = strtol(pair.value, NULL, 10);
		else if (pair_is(&pair, "key"))
		{
			free(key);
			key = pair_text(&pair);
		}
	if (times < 0)
	{
		free(key);
		return true;
	}
	if (key == NULL)
		key = strndup(directive, end - directive);
	LIST_FOREACH(count, &key_counts, link)
		if (strcmp(count->key, key) == 0)
			break;
	if (count == NULL)
	{
		count = zalloc(sizeof(*count));
		count->key = strdup(key);
		LIST_INSERT_HEAD(&key_counts, count, link);
	}
	free(key);
	return ++count->seen <= times;
}

/* Inserts a gate in the order of its units. */
static void
add_gate(Plan *plan, long at, char *name)
{
	int			i = plan->ngates;

	if (i == MAX_GATES)
	{
		free(name);
		return;
	}
	for (; i > 0 && plan->gates[i - 1].at > at; i--)
		plan->gates[i] = plan->gates[i - 1];
	plan->gates[i].at = at;
	plan->gates[i].name = name;
	plan->ngates++;
}

/* Takes a pair that fills a list; false when it is none. */
static bool
take_list_pair(Plan *plan, const Pair *pair)
{
	ToolCall   *last = plan->ncalls ? &plan->calls[plan->ncalls - 1] : NULL;
	char	  **field = NULL;

	if (pair_is(pair, "gate"))
		add_gate(plan, 0, pair_text(pair));
	else if (pair_is(pair, "gatehead"))
		add_gate(plan, -1, pair_text(pair));
	else if (pair_is(pair, "gateat"))
	{
		const char *colon = memchr(pair->value, ':', pair->vlen);

		if (colon)
			add_gate(plan, strtol(pair->value, NULL, 10),
					 strndup(colon + 1, pair->value + pair->vlen - colon - 1));
	}
	else if (pair_is(pair, "tool") && plan->ncalls < MAX_CALLS)
	{
		last = &plan->calls[plan->ncalls++];
		last->name = pair_text(pair);
	}
	else if (pair_is(pair, "args") && last)
		field = &last->args;
	else if (pair_is(pair, "id") && last)
		field = &last->id;
	else
		return false;
	if (field)
	{
		free(*field);
		*field = pair_text(pair);
	}
	return true;
}

/* Stores a pair's value where its key belongs. */
static void
take_value(Plan *plan, const KeySpec *spec, const Pair *pair)
{
	char	   *at = (char *) plan + spec->offset;

	if (spec->type == KEY_INT)
		*(long *) at = strtol(pair->value, NULL, 10);
	else if (spec->type == KEY_MS)
		*(long *) at = (long) (strtod(pair->value, NULL) * MS);
	else
	{
		free(*(char **) at);
		*(char **) at = pair_text(pair);
	}
}

/* Takes one pair; false when its key does not exist. */
static bool
take_pair(Plan *plan, Pair pair, bool after_tools, bool failing)
{
	static const char *const others[] = {"times", "key", "for", "at", "gate",
		"gatehead", "gateat", "tool", "args", "id", NULL};
	bool		then = pair.klen > 4 && memcmp(pair.key, "then", 4) == 0;

	if (then)
	{
		size_t		skip = pair.key[4] == '.' ? 5 : 4;

		pair.key += skip;
		pair.klen -= skip;
	}
	if (pair_is(&pair, "huge"))
	{
		pair.key = "hugebody";
		pair.klen = strlen(pair.key);
	}
	for (size_t i = 0; i < NKEYS; i++)
		if (pair_is(&pair, key_specs[i].name))
		{
			bool		apply = then ? after_tools : !after_tools ||
			key_specs[i].class == CLASS_WIRE;

			if (key_specs[i].class == CLASS_FAIL && !failing && !then)
				apply = false;
			if (apply)
				take_value(plan, &key_specs[i], &pair);
			return true;
		}
	if (then == after_tools && take_list_pair(plan, &pair))
		return true;
	for (int i = 0; others[i]; i++)
		if (pair_is(&pair, others[i]))
			return true;
	return false;
}

/* Sets a plan to its defaults. */
static void
plan_init(Plan *plan)
{
	memset(plan, 0, sizeof(*plan));
	for (size_t i = 0; i < NKEYS; i++)
		if (key_specs[i].type != KEY_TEXT)
			*(long *) ((char *) plan + key_specs[i].offset) = -1;
	plan->delay = default_delay;
}

/* Gives the memory of a plan back. */
static void
plan_free(Plan *plan)
{
	for (size_t i = 0; i < NKEYS; i++)
		if (key_specs[i].type == KEY_TEXT)
			free(*(char **) ((char *) plan + key_specs[i].offset));
	for (int i = 0; i < plan->ngates; i++)
		free(plan->gates[i].name);
	for (int i = 0; i < plan->ncalls; i++)
	{
		free(plan->calls[i].name);
		free(plan->calls[i].args);
		free(plan->calls[i].id);
	}
}

/* Turns a key that does not exist into an answer that says so. */
static void
plan_refuse(Plan *plan, const Pair *pair)
{
	Buf			b = {0};

	buf_printf(&b, "the fake has no directive \"%.*s\"", (int) pair->klen,
			   pair->key);
	buf_str(&b);
	plan_free(plan);
	plan_init(plan);
	plan->status = 400;
	plan->errmsg = b.data;
	plan->errcode = strdup("fake_unknown_directive");
}

/* Makes a plan of a directive's text. */
static void
plan_read(Plan *plan, const char *p, const char *end, bool after_tools)
{
	bool		failing = after_tools || count_failure(p, end);
	Pair		pair;

	plan_init(plan);
	while (next_pair(&p, end, &pair))
		if (!take_pair(plan, pair, after_tools, failing))
		{
			plan_refuse(plan, &pair);
			return;
		}
}

/* Says whether a directive is marked for title requests. */
static bool
is_for_title(const char *p, const char *end)
{
	Pair		pair;

	while (next_pair(&p, end, &pair))
		if (pair_is(&pair, "for") && pair.vlen == 5 &&
			memcmp(pair.value, "title", 5) == 0)
			return true;
	return false;
}

/* Returns after how many tool steps a directive counts; -1: any. */
static long
step_of(const char *p, const char *end)
{
	Pair		pair;

	while (next_pair(&p, end, &pair))
		if (pair_is(&pair, "at"))
			return strtol(pair.value, NULL, 10);
	return -1;
}

/*
 * Finds the last directive in a message that counts after so many tool steps
 * (-1: those that count always); *end is set behind its text.
 */
static const char *
find_directive(const char *text, bool title, long step, const char **end)
{
	const char *found = NULL;
	const char *open = text;

	while ((open = strstr(open, "[[")) != NULL)
	{
		const char *close = strstr(open + 2, "]]");

		if (close == NULL)
			break;
		if (memchr(open, '=', close - open) &&
			is_for_title(open + 2, close) == title &&
			step_of(open + 2, close) == step)
		{
			found = open + 2;
			*end = close;
		}
		open = close + 2;
	}
	return found;
}

/* ------------------------------------------------------------ connections */

typedef enum Phase
{
	PHASE_HEAD, PHASE_UNITS, PHASE_OVER
} Phase;

typedef enum Framing
{
	FRAME_CHUNKED, FRAME_LENGTH, FRAME_CLOSE
} Framing;

typedef enum Ending
{
	END_CLEAN, END_CLOSE, END_RESET
} Ending;

/* One answer that is under way. */
typedef struct Stream
{
	Plan		plan;
	Phase		phase;
	Framing		framing;
	Ending		ending;
	bool		tool_endpoint;
	bool		include_usage;
	bool		usage_in_chunks;	/* chunks carry "usage":null */
	bool		head_sent;
	bool		split_done;		/* the cut of "splitat" was made */
	bool		tail_sent;
	bool		garbage_done;
	bool		hugeline_done;
	bool		details_done;
	bool		chunk_sent;
	unsigned long serial;
	long		unit;			/* units sent so far */
	long		token;			/* content tokens sent so far */
	long		reasoned;
	long		repeated;
	int			special;
	int			gate;			/* the next gate of the plan */
	int			call;			/* interleaving: the call to go on with */
	int64_t		due;			/* when the next unit may go */
	long		body_bytes;		/* of the body, produced so far */
	size_t		text_pos;
	size_t		refusal_pos;
	long		prompt_tokens;
	char	   *text;			/* the answer's text, unless counted tokens */
	char	   *reply;			/* a whole body that was made beforehand */
	size_t		reply_len;
	const char *reply_type;
	Buf			body;			/* produced, not framed yet */
	Buf			json;			/* scratch: one chunk's JSON */
	Buf			prefix;			/* what every chunk begins with */
	const char *eol;
	struct Gate *at_gate;		/* where it waits, if at one */
} Stream;

typedef struct Conn Conn;
typedef TAILQ_HEAD(Queue, Conn) Queue;

/* A recorded request; "conn" while it is being answered. */
typedef struct Record
{
	unsigned long n;
	unsigned long connection;
	int64_t		arrived;
	int64_t		ended;			/* answered, or its client has left; 0: not yet */
	bool		aborted;
	bool		done;
	int			status;
	char	   *head;			/* JSON members method, path, headers */
	char	   *body;
	size_t		body_len;
	size_t		size;
	Conn	   *conn;
} Record;

struct Conn
{
	int			fd;
	unsigned long number;
	bool		dead;
	bool		close_after;
	bool		continued;		/* "100 Continue" was sent */
	uint32_t	mask;			/* what epoll watches */
	int			timer;			/* place in the heap, -1: none */
	int64_t		deadline;
	Buf			in;
	Buf			out;
	Stream	   *stream;
	Record	   *record;
	char	   *wait;			/* held GET: what it waits for */
	Queue	   *queue;			/* the one queue that it stands in */
	TAILQ_ENTRY(Conn) link;
};

typedef struct Gate
{
	char	   *name;
	long		passes;
	long		waiting;
	Queue		queue;
	LIST_ENTRY(Gate) link;
} Gate;

typedef struct Stats
{
	long		requests;
	long		active;
	long		completed;
	long		aborted;
	long		max_active;
	long		connections;
} Stats;

static int	epfd;
static int	listen_fd;
static const char *api_key;
static volatile sig_atomic_t stopping;
static bool changed;			/* held GETs are to be looked at */
static unsigned long next_serial;
static unsigned long next_connection;
static unsigned long next_record;
static Stats stats;
static Record *records[MAX_RECORDS];
static int	first_record;
static int	nrecords;
static size_t recorded_bytes;
static LIST_HEAD(, Gate) gates = LIST_HEAD_INITIALIZER(gates);
static Queue ready = TAILQ_HEAD_INITIALIZER(ready);
static Queue held = TAILQ_HEAD_INITIALIZER(held);
static Queue graveyard = TAILQ_HEAD_INITIALIZER(graveyard);
static Conn **heap;
static int	heap_len;
static int	heap_cap;

/* Returns the monotonic clock in nanoseconds. */
static int64_t
now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t) ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* Moves a connection to another queue, or to none. */
static void
conn_enqueue(Conn *c, Queue *queue)
{
	if (c->queue == queue)
		return;
	if (c->queue)
		TAILQ_REMOVE(c->queue, c, link);
	c->queue = queue;
	if (queue)
		TAILQ_INSERT_TAIL(queue, c, link);
}

/* Puts a connection into a place of the timer heap. */
static void
heap_set(int i, Conn *c)
{
	heap[i] = c;
	c->timer = i;
}

/* Moves an entry of the heap to where it belongs. */
static void
heap_fix(int i)
{
	Conn	   *c = heap[i];

	while (i > 0 && heap[(i - 1) / 2]->deadline > c->deadline)
	{
		heap_set(i, heap[(i - 1) / 2]);
		i = (i - 1) / 2;
	}
	for (;;)
	{
		int			child = 2 * i + 1;

		if (child + 1 < heap_len &&
			heap[child + 1]->deadline < heap[child]->deadline)
			child++;
		if (child >= heap_len || heap[child]->deadline >= c->deadline)
			break;
		heap_set(i, heap[child]);
		i = child;
	}
	heap_set(i, c);
}

/* Sets a connection's timer. */
static void
timer_set(Conn *c, int64_t deadline)
{
	c->deadline = deadline;
	if (c->timer < 0)
	{
		if (heap_len == heap_cap)
		{
			heap_cap = heap_cap ? heap_cap * 2 : 1024;
			heap = realloc(heap, heap_cap * sizeof(*heap));
			if (heap == NULL)
				die("realloc");
		}
		heap_set(heap_len++, c);
	}
	heap_fix(c->timer);
}

/* Takes a connection's timer away. */
static void
timer_clear(Conn *c)
{
	int			i = c->timer;

	if (i < 0)
		return;
	c->timer = -1;
	if (i != --heap_len)
	{
		heap_set(i, heap[heap_len]);
		heap_fix(i);
	}
}

/* Gives a stream's memory back. */
static void
stream_free(Stream *s)
{
	if (s == NULL)
		return;
	plan_free(&s->plan);
	free(s->text);
	free(s->reply);
	buf_free(&s->body);
	buf_free(&s->json);
	buf_free(&s->prefix);
	free(s);
}

/* Ends the recording of a request: it was answered, or its client left. */
static void
record_end(Conn *c, bool whole, bool aborted)
{
	if (c->record == NULL)
		return;
	c->record->done = whole;
	c->record->aborted = aborted;
	c->record->ended = now_ns();
	c->record->conn = NULL;
	c->record = NULL;
}

/* Counts the end of an answer. */
static void
stream_end(Conn *c, bool whole, bool aborted)
{
	if (c->stream == NULL)
		return;
	stats.active--;
	stats.completed += whole;
	stats.aborted += aborted;
	changed = true;
	record_end(c, whole, aborted);
	stream_free(c->stream);
	c->stream = NULL;
}

/* Closes a connection; its memory goes at the end of the round. */
static void
conn_close(Conn *c, bool by_client)
{
	if (c->dead)
		return;
	if (c->stream && c->stream->at_gate)
		c->stream->at_gate->waiting--;
	stream_end(c, false, by_client);
	timer_clear(c);
	close(c->fd);
	free(c->wait);
	c->wait = NULL;
	buf_free(&c->in);
	buf_free(&c->out);
	c->dead = true;
	conn_enqueue(c, &graveyard);
}

/* Tells epoll what to watch. */
static void
conn_watch(Conn *c, uint32_t mask)
{
	struct epoll_event ev = {.events = mask, .data.ptr = c};

	if (mask == c->mask)
		return;
	c->mask = mask;
	if (epoll_ctl(epfd, EPOLL_CTL_MOD, c->fd, &ev) < 0)
		die("epoll_ctl");
}

/* Returns the reason phrase of a status. */
static const char *
reason(int status)
{
	switch (status)
	{
		case 200:
			return "OK";
		case 202:
			return "Accepted";
		case 302:
			return "Found";
		case 400:
			return "Bad Request";
		case 401:
			return "Unauthorized";
		case 403:
			return "Forbidden";
		case 404:
			return "Not Found";
		case 408:
			return "Request Timeout";
		case 429:
			return "Too Many Requests";
		case 500:
			return "Internal Server Error";
		case 502:
			return "Bad Gateway";
		case 503:
			return "Service Unavailable";
		default:
			return "Status";
	}
}

/* ----------------------------------------------------------- SSE building */

/* Appends to the body; what lies beyond the cut is dropped. */
static void
body_put(Stream *s, const char *data, size_t len)
{
	long		cut = s->plan.cut;

	if (s->phase == PHASE_OVER && s->ending != END_CLEAN)
		return;
	if (cut >= 0 && s->body_bytes + (long) len >= cut)
	{
		len = cut - s->body_bytes;
		s->phase = PHASE_OVER;
		s->ending = s->plan.rst > 0 ? END_RESET : END_CLOSE;
	}
	buf_put(&s->body, data, len);
	s->body_bytes += (long) len;
}

/* Appends a string to the body. */
static void
body_puts(Stream *s, const char *text)
{
	body_put(s, text, strlen(text));
}

/* Appends an event's JSON as several data lines, cut behind commas. */
static void
put_data_lines(Stream *s, const char *json, size_t len)
{
	bool		quoted = false;
	size_t		from = 0;

	for (size_t i = 0; i < len; i++)
	{
		if (quoted && json[i] == '\\')
			i++;
		else if (json[i] == '"')
			quoted = !quoted;
		else if (json[i] == ',' && !quoted)
		{
			body_puts(s, "data: ");
			body_put(s, json + from, i + 1 - from);
			body_puts(s, s->eol);
			from = i + 1;
		}
	}
	body_puts(s, "data: ");
	body_put(s, json + from, len - from);
}

/* Appends one SSE event; the last one may lack its newlines. */
static void
put_event(Stream *s, const char *data, size_t len, bool last)
{
	if (s->plan.comments > 0)
	{
		body_puts(s, ": keep-alive");
		body_puts(s, s->eol);
		body_puts(s, s->eol);
	}
	if (s->plan.multidata > 0)
		put_data_lines(s, data, len);
	else
	{
		body_puts(s, s->plan.nospace > 0 ? "data:" : "data: ");
		body_put(s, data, len);
	}
	if (last && s->plan.notail > 0)
		return;
	body_puts(s, s->eol);
	body_puts(s, s->eol);
}

/* Begins a chunk whose delta the caller fills in. */
static Buf *
chunk_begin(Stream *s)
{
	buf_reset(&s->json);
	buf_put(&s->json, s->prefix.data, s->prefix.len);
	return &s->json;
}

/* Appends the usage of the answer as JSON. */
static void
put_usage(Stream *s, Buf *b, long completion)
{
	long		prompt = s->plan.prompt_tokens;
	long		reasoning = s->plan.reasoning_tokens;

	if (prompt < 0)
		prompt = s->prompt_tokens;
	if (reasoning < 0)
		reasoning = s->reasoned;
	buf_printf(b, "{\"prompt_tokens\":%ld,\"completion_tokens\":%ld,"
			   "\"total_tokens\":%ld,\"prompt_tokens_details\":"
			   "{\"cached_tokens\":%ld},\"completion_tokens_details\":"
			   "{\"reasoning_tokens\":%ld}}",
			   prompt, completion, prompt + completion,
			   s->plan.cached > 0 ? s->plan.cached : 0, reasoning);
}

/* Says whether the answer's usage goes where "place" says. */
static bool
usage_is(const Stream *s, const char *place)
{
	const char *want = s->plan.usage;

	if (want == NULL)
		want = s->include_usage ? "final" : "none";
	return strcmp(want, place) == 0;
}

/* Ends a chunk and appends it as an event. */
static void
chunk_end(Stream *s, const char *finish)
{
	Buf		   *b = &s->json;

	if (s->plan.nulls > 0)
		buf_puts(b, ",\"function_call\":null,\"audio\":null");
	if (s->plan.unknown > 0)
		buf_puts(b, ",\"x_delta\":[{}]");
	buf_puts(b, "},\"logprobs\":null,\"finish_reason\":");
	if (finish)
		buf_json(b, finish, strlen(finish));
	else
		buf_puts(b, "null");
	buf_puts(b, "}]");
	if (!s->chunk_sent && (usage_is(s, "first") || usage_is(s, "split")))
	{
		long		given = s->plan.completion_tokens;

		buf_puts(b, ",\"usage\":");
		put_usage(s, b, usage_is(s, "first") && given > 0 ? given : 0);
	}
	else if (s->usage_in_chunks)
		buf_puts(b, ",\"usage\":null");
	buf_puts(b, "}");
	s->chunk_sent = true;
	put_event(s, b->data, b->len, false);
}

/* Makes what every chunk of this answer begins with. */
static void
make_prefix(Stream *s, const char *model)
{
	Buf		   *b = &s->prefix;

	buf_printf(b, "{\"id\":\"chatcmpl-%lu\",\"object\":"
			   "\"chat.completion.chunk\",\"created\":%ld,\"model\":",
			   s->serial, (long) time(NULL));
	buf_json(b, model, strlen(model));
	buf_puts(b, ",\"system_fingerprint\":\"fp_fake\",");
	if (s->plan.unknown > 0)
		buf_puts(b, "\"x_top\":{\"list\":[1,{\"a\":null}]},");
	buf_puts(b, "\"choices\":[{\"index\":0,");
	if (s->plan.unknown > 0)
		buf_puts(b, "\"x_choice\":true,");
	buf_puts(b, "\"delta\":{");
}

/* ------------------------------------------------------------------ units */

/* Finds the next word of a text: up to the blank before the one after it. */
static size_t
word_len(const char *text)
{
	size_t		n = strspn(text, " ");

	n += strcspn(text + n, " ");
	return n;
}

/* Appends the next counted token, escaped by nature. */
static void
put_counted(Stream *s, Buf *b)
{
	size_t		from = b->len;
	size_t		len;

	if (s->plan.stamp > 0)
	{
		buf_decimal(b, (uint64_t) now_ns(), 19);
		buf_put(b, " ", 1);
	}
	buf_put(b, "t", 1);
	buf_decimal(b, (uint64_t) s->token, 1);
	len = b->len - from + 1;
	if (s->plan.size > (long) len)
		buf_fill(b, '.', (size_t) s->plan.size - len);
	buf_put(b, " ", 1);
}

/* Appends the next word of the answer's text; false at its end. */
static bool
put_word(Stream *s, Buf *b)
{
	size_t		n;

	if (s->text == NULL || *s->text == '\0')
		return false;
	if (s->text[s->text_pos] == '\0')
	{
		if (++s->repeated >= s->plan.repeat)
			return false;
		s->text_pos = 0;
	}
	if (s->plan.stamp > 0)
	{
		buf_decimal(b, (uint64_t) now_ns(), 19);
		buf_put(b, " ", 1);
	}
	n = word_len(s->text + s->text_pos);
	buf_escape(b, s->text + s->text_pos, n);
	s->text_pos += n;
	return true;
}

/* Appends the next content token in JSON form; false when none is left. */
static bool
put_content(Stream *s, Buf *b)
{
	static const char *const specials[] = {"a\\u0000b ", "c\\ud83dd ",
	"e\xff\xfe\xc3" "f "};
	const long	wanted[] = {s->plan.nul, s->plan.surrogate, s->plan.badutf8};

	while (s->special < 3)
		if (wanted[s->special++] > 0)
		{
			buf_puts(b, specials[s->special - 1]);
			return true;
		}
	if (s->plan.hugeline > 0 && !s->hugeline_done)
	{
		s->hugeline_done = true;
		buf_fill(b, 'x', (size_t) s->plan.hugeline);
		return true;
	}
	if (s->plan.hugebody > 0)
	{
		size_t		n = s->plan.hugebody > 8000 ? 8000 : s->plan.hugebody;

		buf_fill(b, 'x', n);
		s->plan.hugebody -= (long) n;
		return true;
	}
	if (s->plan.tokens < 0)
		return put_word(s, b);
	if (s->token >= s->plan.tokens)
		return false;
	put_counted(s, b);
	s->token++;
	return true;
}

/* Appends a tool call's id, extra member and name. */
static void
put_call_head(Stream *s, Buf *b, int i)
{
	ToolCall   *call = &s->plan.calls[i];

	if (s->plan.noid <= 0)
	{
		buf_puts(b, "\"id\":");
		if (call->id)
			buf_json(b, call->id, strlen(call->id));
		else
			buf_printf(b, "\"call_%lu_%d\"", s->serial, i);
		buf_puts(b, ",");
	}
	buf_puts(b, "\"type\":\"function\",");
	if (s->plan.toolextra > 0)
		buf_puts(b, "\"extra_content\":{\"google\":"
				 "{\"thought_signature\":\"sig123\"}},");
	buf_puts(b, "\"function\":{\"name\":");
	buf_json(b, call->name, strlen(call->name));
	buf_puts(b, ",\"arguments\":");
}

/* Returns how much of a call's arguments goes into one piece. */
static size_t
args_piece(const Stream *s, const ToolCall *call)
{
	const char *args = call->args ? call->args : "{}";
	size_t		left = strlen(args) - call->pos;
	size_t		n = s->plan.argsplit < 0 ? 8 : (size_t) s->plan.argsplit;

	if (n == 0 || n > left)
		return left;
	while (n < left && ((unsigned char) args[call->pos + n] & 0xc0) == 0x80)
		n++;
	return n;
}

/* Chooses the tool call that goes on; -1 when all are whole. */
static int
choose_call(Stream *s)
{
	for (int i = 0; i < s->plan.ncalls; i++)
	{
		int			at = i;
		ToolCall   *call;

		if (s->plan.interleave > 0)
			at = (s->call + i) % s->plan.ncalls;
		call = &s->plan.calls[at];
		if (!call->opened || args_piece(s, call) > 0)
		{
			s->call = at + 1;
			return at;
		}
	}
	return -1;
}

/* Sends the next piece of a tool call; false when all have gone. */
static bool
send_call_piece(Stream *s)
{
	int			i = choose_call(s);
	ToolCall   *call = i < 0 ? NULL : &s->plan.calls[i];
	const char *args;
	size_t		n;
	Buf		   *b;

	if (call == NULL)
		return false;
	args = call->args ? call->args : "{}";
	n = call->opened || s->plan.argsplit == 0 ? args_piece(s, call) : 0;
	b = chunk_begin(s);
	buf_puts(b, "\"tool_calls\":[{");
	if (s->plan.noindex <= 0)
		buf_printf(b, "\"index\":%d,", i);
	if (!call->opened)
		put_call_head(s, b, i);
	else
		buf_puts(b, "\"function\":{\"arguments\":");
	buf_json(b, args + call->pos, n);
	buf_puts(b, "}}]");
	call->opened = true;
	call->pos += n;
	chunk_end(s, NULL);
	return true;
}

/* Sends the next reasoning unit; false when none is left. */
static bool
send_reasoning(Stream *s)
{
	const char *field = s->plan.reasoning_field;
	Buf		   *b;

	if (s->reasoned < s->plan.reasoning)
	{
		b = chunk_begin(s);
		buf_printf(b, "\"%s\":\"r%ld \"", field ? field : "reasoning_content",
				   s->reasoned++);
		chunk_end(s, NULL);
		return true;
	}
	if (s->plan.reasoning_details <= 0 || s->details_done)
		return false;
	s->details_done = true;
	b = chunk_begin(s);
	buf_puts(b, "\"reasoning_details\":[{\"type\":\"reasoning.encrypted\","
			 "\"data\":\"b3BhcXVl\",\"id\":\"rs_1\",\"format\":\"fake-v1\","
			 "\"index\":0}]");
	chunk_end(s, NULL);
	return true;
}

/* Sends the next content or refusal token; false when none is left. */
static bool
send_text(Stream *s)
{
	Buf		   *b = chunk_begin(s);
	const char *refusal = s->plan.refusal;

	buf_puts(b, "\"content\":\"");
	if (put_content(s, b))
	{
		buf_puts(b, "\"");
		if (s->plan.nulls > 0)
			buf_puts(b, ",\"tool_calls\":null,\"refusal\":null,"
					 "\"reasoning_content\":null");
		chunk_end(s, NULL);
		return true;
	}
	if (refusal == NULL || refusal[s->refusal_pos] == '\0')
		return false;
	b = chunk_begin(s);
	buf_puts(b, "\"refusal\":");
	buf_json(b, refusal + s->refusal_pos, word_len(refusal + s->refusal_pos));
	s->refusal_pos += word_len(refusal + s->refusal_pos);
	chunk_end(s, NULL);
	return true;
}

/* Returns the finish reason. */
static const char *
finish_of(const Stream *s)
{
	if (s->plan.finish)
		return s->plan.finish;
	if (s->plan.ncalls == 0)
		return "stop";
	return s->plan.toolfinish ? s->plan.toolfinish : "tool_calls";
}

/* Sends what follows the last unit. */
static void
send_end(Stream *s)
{
	if (s->plan.nofinish <= 0)
	{
		Buf		   *b = chunk_begin(s);

		if (s->plan.nulls > 0)
			buf_puts(b, "\"content\":null");
		else if (s->plan.unknown > 0)
			buf_puts(b, "\"x\":0");
		chunk_end(s, finish_of(s));
	}
	if (usage_is(s, "final") || usage_is(s, "split"))
	{
		Buf		   *b = &s->json;

		buf_reset(b);
		buf_printf(b, "{\"id\":\"chatcmpl-%lu\",\"object\":"
				   "\"chat.completion.chunk\",\"created\":%ld,\"choices\":[],"
				   "\"usage\":", s->serial, (long) time(NULL));
		put_usage(s, b, s->plan.completion_tokens >= 0 ?
				  s->plan.completion_tokens : s->unit);
		buf_puts(b, "}");
		put_event(s, b->data, b->len, s->plan.nodone > 0);
	}
	if (s->plan.nodone <= 0)
		put_event(s, "[DONE]", 6, true);
	s->phase = PHASE_OVER;
}

/* Makes an error object of the plan's texts and the status. */
static void
put_error(Stream *s, Buf *b)
{
	int			status = (int) s->plan.status;
	const char *message = s->plan.errmsg;
	const char *type = s->plan.errtype;
	const char *code = s->plan.errcode;

	if (message == NULL)
		message = status == 429 ? "Rate limit reached for requests" :
			status == 401 ? "Incorrect API key provided" :
			status >= 400 && status < 500 ? "The request is not acceptable" :
			"The server had an error while processing your request";
	if (type == NULL)
		type = status == 429 ? "requests" : status >= 400 && status < 500 ?
			"invalid_request_error" : "server_error";
	if (code == NULL)
		code = status == 429 ? "rate_limit_exceeded" : status == 401 ?
			"invalid_api_key" : NULL;
	buf_puts(b, "{\"error\":{\"message\":");
	if (s->plan.hugebody > 0)
	{
		buf_puts(b, "\"");
		buf_fill(b, 'x', (size_t) s->plan.hugebody);
		buf_puts(b, "\"");
	}
	else
		buf_json(b, message, strlen(message));
	buf_puts(b, ",\"type\":");
	buf_json(b, type, strlen(type));
	buf_puts(b, ",\"param\":null,\"code\":");
	if (code)
		buf_json(b, code, strlen(code));
	else
		buf_puts(b, "null");
	buf_puts(b, "}}");
}

/* ------------------------------------------------------------- the stream */

/* Puts an answer's head into the output. */
static void
put_head(Conn *c, int status, const char *type, const char *extra)
{
	Stream	   *s = c->stream;
	Buf		   *b = &c->out;

	if (c->record)
		c->record->status = status;
	buf_printf(b, "HTTP/1.1 %d %s\r\nContent-Type: %s\r\n"
			   "x-request-id: req_%lu\r\n%s",
			   status, reason(status), type, s->serial, extra);
	if (s->framing == FRAME_CHUNKED)
		buf_puts(b, "Transfer-Encoding: chunked\r\n");
	else if (s->framing == FRAME_LENGTH)
		buf_printf(b, "Content-Length: %zu\r\n", s->reply_len);
	if (s->framing == FRAME_CLOSE)
		c->close_after = true;
	if (c->close_after)
		buf_puts(b, "Connection: close\r\n");
	buf_puts(b, "\r\n");
	s->head_sent = true;
}

/* Chooses how the end of the body is marked. */
static Framing
choose_framing(const Stream *s)
{
	if (s->plan.closed > 0)
		return FRAME_CLOSE;
	if (s->reply == NULL || s->plan.split > 0 || s->plan.splitat > 0)
		return FRAME_CHUNKED;
	return FRAME_LENGTH;
}

/* Finds a gate by its name; the first mention makes it. */
static Gate *
gate_find(const char *name)
{
	Gate	   *g;

	LIST_FOREACH(g, &gates, link)
		if (strcmp(g->name, name) == 0)
			return g;
	g = zalloc(sizeof(*g));
	g->name = strdup(name);
	TAILQ_INIT(&g->queue);
	LIST_INSERT_HEAD(&gates, g, link);
	return g;
}

/* Waits at the next gate of the plan unless it lets the stream pass. */
static bool
pass_gate(Conn *c)
{
	Stream	   *s = c->stream;
	Gate	   *g = gate_find(s->plan.gates[s->gate].name);

	changed = true;
	if (g->passes > 0)
	{
		g->passes--;
		s->gate++;
		return true;
	}
	g->waiting++;
	s->at_gate = g;
	conn_enqueue(c, &g->queue);
	return false;
}

/* Passes all gates up to a unit; false when the stream has to wait. */
static bool
pass_gates(Conn *c, long unit)
{
	Stream	   *s = c->stream;

	while (s->gate < s->plan.ngates && s->plan.gates[s->gate].at <= unit)
		if (!pass_gate(c))
			return false;
	return true;
}

/* Says whether the stream may go on now; else sets its timer. */
static bool
is_due(Conn *c)
{
	if (c->stream->due <= 0 || c->stream->due <= now_ns())
		return true;
	timer_set(c, c->stream->due);
	return false;
}

/* Starts the stream's clock when its first unit may come. */
static void
start_clock(Stream *s)
{
	s->due = s->plan.first > 0 || s->plan.delay > 0 ? now_ns() : 0;
	if (s->plan.first > 0)
		s->due += s->plan.first;
}

/* Makes the whole body of an error. */
static void
make_error(Stream *s)
{
	Buf			b = {0};

	s->reply_type = "application/json";
	if (s->plan.html > 0)
	{
		s->reply_type = "text/html; charset=utf-8";
		buf_printf(&b, "<html><head><title>%ld %s</title></head>\n"
				   "<body><center><h1>%ld %s</h1></center></body></html>\n",
				   s->plan.status, reason((int) s->plan.status),
				   s->plan.status, reason((int) s->plan.status));
	}
	else if (s->plan.errbody)
		buf_puts(&b, s->plan.errbody);
	else
		put_error(s, &b);
	s->reply_len = b.len;
	buf_str(&b);
	s->reply = b.data;
}

/* Appends all content tokens of a body that is no stream. */
static void
put_message(Stream *s, Buf *b)
{
	const char *field = s->plan.reasoning_field;
	bool		some = false;
	size_t		start = b->len;

	buf_puts(b, "{\"role\":\"assistant\",\"content\":\"");
	while (put_content(s, b))
	{
		some = true;
		s->unit++;
	}
	buf_puts(b, "\"");
	if (!some && (s->plan.ncalls > 0 || s->plan.refusal))
	{
		b->len = start;
		buf_puts(b, "{\"role\":\"assistant\",\"content\":null");
	}
	buf_puts(b, ",\"refusal\":");
	if (s->plan.refusal)
		buf_json(b, s->plan.refusal, strlen(s->plan.refusal));
	else
		buf_puts(b, "null");
	if (s->plan.reasoning > 0)
	{
		buf_printf(b, ",\"%s\":\"", field ? field : "reasoning_content");
		for (; s->reasoned < s->plan.reasoning; s->unit++)
			buf_printf(b, "r%ld ", s->reasoned++);
		buf_puts(b, "\"");
	}
	for (int i = 0; i < s->plan.ncalls; i++, s->unit++)
	{
		const char *args = s->plan.calls[i].args;

		buf_puts(b, i == 0 ? ",\"tool_calls\":[{" : ",{");
		put_call_head(s, b, i);
		buf_json(b, args ? args : "{}", strlen(args ? args : "{}"));
		buf_puts(b, i + 1 == s->plan.ncalls ? "}}]" : "}}");
	}
	buf_puts(b, "}");
}

/* Makes the whole body of an answer that is no stream. */
static void
make_plain(Stream *s, const char *model)
{
	Buf			b = {0};

	s->reply_type = "application/json";
	buf_printf(&b, "{\"id\":\"chatcmpl-%lu\",\"object\":\"chat.completion\","
			   "\"created\":%ld,\"model\":", s->serial, (long) time(NULL));
	buf_json(&b, model, strlen(model));
	buf_puts(&b, ",\"system_fingerprint\":\"fp_fake\",");
	if (s->plan.unknown > 0)
		buf_puts(&b, "\"x_top\":{\"list\":[1,{\"a\":null}]},");
	buf_puts(&b, "\"choices\":[{\"index\":0,\"message\":");
	put_message(s, &b);
	buf_puts(&b, ",\"logprobs\":null,\"finish_reason\":");
	if (s->plan.nofinish > 0)
		buf_puts(&b, "null");
	else
		buf_json(&b, finish_of(s), strlen(finish_of(s)));
	buf_puts(&b, "}]");
	if (s->plan.usage == NULL || strcmp(s->plan.usage, "none") != 0)
	{
		buf_puts(&b, ",\"usage\":");
		put_usage(s, &b, s->plan.completion_tokens >= 0 ?
				  s->plan.completion_tokens : s->unit);
	}
	buf_puts(&b, "}");
	s->reply_len = b.len;
	buf_str(&b);
	s->reply = b.data;
}

/* Puts an error's additional headers together. */
static void
put_extra_headers(const Stream *s, Buf *b)
{
	const char *after = s->plan.retry_after;
	char		date[64];

	if (after && strncmp(after, "date:", 5) == 0)
	{
		time_t		when = time(NULL) + strtol(after + 5, NULL, 10);
		struct tm	tm;

		gmtime_r(&when, &tm);
		strftime(date, sizeof(date), "%a, %d %b %Y %H:%M:%S GMT", &tm);
		after = date;
	}
	if (after)
		buf_printf(b, "Retry-After: %s\r\n", after);
	if (s->plan.location)
		buf_printf(b, "Location: %s\r\n", s->plan.location);
	buf_str(b);
}

/* Sends the whole reply that was made. */
static void
send_reply(Conn *c)
{
	Stream	   *s = c->stream;
	Buf			extra = {0};
	int			status = s->plan.status > 0 ? (int) s->plan.status : 200;

	put_extra_headers(s, &extra);
	s->framing = choose_framing(s);
	put_head(c, status, s->reply_type, extra.data);
	buf_free(&extra);
	body_put(s, s->reply, s->reply_len);
	if (s->ending == END_CLEAN && s->plan.stall >= 0)
		s->plan.hang = 1;		/* the end of the body never comes */
	else
		s->phase = PHASE_OVER;
}

/* Sends the head of a stream and its role chunk. */
static void
send_stream_head(Conn *c)
{
	Stream	   *s = c->stream;

	s->framing = choose_framing(s);
	put_head(c, 200, "text/event-stream; charset=utf-8",
			 "Cache-Control: no-cache\r\n");
	if (s->plan.bom > 0)
		body_puts(s, "\xef\xbb\xbf");
	if (s->plan.norole <= 0)
	{
		Buf		   *b = chunk_begin(s);

		buf_puts(b, "\"role\":\"assistant\",\"content\":\"\","
				 "\"refusal\":null");
		chunk_end(s, NULL);
	}
	if (s->phase == PHASE_HEAD)
		s->phase = PHASE_UNITS;
	start_clock(s);
}

/* Begins the answer; false when it has to wait, or to hang. */
static bool
step_head(Conn *c)
{
	Stream	   *s = c->stream;

	if (!pass_gates(c, -1) || s->plan.hang > 0)
		return false;
	if (s->plan.reset > 0)
	{
		s->phase = PHASE_OVER;
		s->ending = s->plan.reset == 1 ? END_RESET : END_CLOSE;
		return false;
	}
	if (s->reply == NULL)
	{
		send_stream_head(c);
		return true;
	}
	if (s->due == 0 && s->plan.first > 0)
		start_clock(s);
	if (!is_due(c) || !pass_gates(c, 0))
		return false;
	send_reply(c);
	return true;
}

/* Sends what spoils the stream where its time has come; false: no more. */
static bool
spoil(Stream *s, bool at_end)
{
	Plan	   *p = &s->plan;

	if (p->garbage >= 0 && !s->garbage_done &&
		(at_end || s->unit >= p->garbage))
	{
		s->garbage_done = true;
		put_event(s, "this is not JSON {", 18, false);
	}
	if (p->error_at >= 0 && (at_end || s->unit >= p->error_at))
	{
		buf_reset(&s->json);
		put_error(s, &s->json);
		put_event(s, s->json.data, s->json.len, true);
		s->phase = PHASE_OVER;
	}
	else if (p->cutafter >= 0 && (at_end || s->unit >= p->cutafter))
	{
		s->phase = PHASE_OVER;
		s->ending = p->rst > 0 ? END_RESET : END_CLOSE;
	}
	return s->phase == PHASE_UNITS;
}

/* Stands still for good, with a comment now and then where one is wanted. */
static void
stall(Conn *c)
{
	Stream	   *s = c->stream;

	if (s->plan.comments <= 0)
		return;
	if (s->due > 0 && now_ns() >= s->due)
	{
		body_puts(s, ": keep-alive");
		body_puts(s, s->eol);
		body_puts(s, s->eol);
	}
	s->due = now_ns() + COMMENT_NS;
	timer_set(c, s->due);
}

/* Sends the next unit; false when the stream has to wait or is over. */
static bool
step_unit(Conn *c)
{
	Stream	   *s = c->stream;

	if (!spoil(s, false))
		return false;
	if (s->plan.stall >= 0 && s->unit >= s->plan.stall)
	{
		stall(c);
		return false;
	}
	if (!is_due(c) || !pass_gates(c, s->unit))
		return false;
	if (send_reasoning(s) || send_text(s) || send_call_piece(s))
	{
		s->unit++;
		if (s->plan.delay > 0)
			s->due += s->plan.delay;
		return true;
	}
	if (s->plan.stall >= 0)
	{
		s->plan.stall = s->unit;
		return true;
	}
	if (spoil(s, true))
		send_end(s);
	return false;
}

/* Produces until enough is waiting to be written, or the stream waits. */
static bool
stream_fill(Conn *c)
{
	Stream	   *s = c->stream;
	bool		go = s->at_gate == NULL;

	while (go && s->phase != PHASE_OVER &&
		   buf_left(&c->out) + buf_left(&s->body) < HIGH_WATER)
		go = s->phase == PHASE_HEAD && !s->head_sent ? step_head(c) :
			s->phase == PHASE_UNITS ? step_unit(c) : false;
	return go && s->phase != PHASE_OVER;
}

/* Moves the next piece of the body, framed, into the output. */
static void
frame_piece(Conn *c)
{
	Stream	   *s = c->stream;
	size_t		n = buf_left(&s->body);

	if (s->plan.split > 0 && n > (size_t) s->plan.split)
		n = (size_t) s->plan.split;
	if (s->plan.splitat > 0 && !s->split_done)
	{
		size_t		left = (size_t) s->plan.splitat;

		if (left <= n)
		{
			n = left;
			s->split_done = true;
		}
		else
			s->plan.splitat -= (long) n;
	}
	if (s->framing == FRAME_CHUNKED)
		buf_chunk_size(&c->out, n);
	buf_put(&c->out, s->body.data + s->body.off, n);
	if (s->framing == FRAME_CHUNKED)
		buf_puts(&c->out, "\r\n");
	s->body.off += n;
	if (buf_left(&s->body) == 0)
		buf_reset(&s->body);
}

/* Writes what the output holds; false when the socket is full or dead. */
static bool
write_out(Conn *c)
{
	while (buf_left(&c->out) > 0)
	{
		ssize_t		n = send(c->fd, c->out.data + c->out.off,
							 buf_left(&c->out), MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
		{
			conn_watch(c, EPOLLIN | EPOLLRDHUP | EPOLLOUT);
			return false;
		}
		if (n < 0)
		{
			conn_close(c, true);
			return false;
		}
		c->out.off += (size_t) n;
	}
	buf_reset(&c->out);
	conn_watch(c, EPOLLIN | EPOLLRDHUP);
	return true;
}

/* Closes a connection whose answer ends by that. */
static void
break_off(Conn *c)
{
	struct linger hard = {.l_onoff = 1, .l_linger = 0};

	if (c->stream->ending == END_RESET)
		setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
	conn_close(c, false);
}

static void conn_serve(Conn *c);

/* Ends an answer that has been written, and looks at the next request. */
static void
answer_done(Conn *c)
{
	if (c->stream && c->stream->ending != END_CLEAN)
	{
		break_off(c);
		return;
	}
	timer_clear(c);
	stream_end(c, true, false);
	if (c->close_after)
		conn_close(c, false);
	else if (buf_left(&c->in) > 0)
		conn_serve(c);
}

/* Produces and writes as far as it goes without waiting. */
static void
conn_pump(Conn *c)
{
	Stream	   *s = c->stream;
	int			pieces = 0;
	bool		more;

	if (c->queue == &ready)
		conn_enqueue(c, NULL);
	more = s && stream_fill(c);
	if (s && s->plan.split <= 0 && s->plan.splitat <= 0 &&
		buf_left(&s->body) > 0)
		frame_piece(c);
	if (!write_out(c))
		return;
	while (s && buf_left(&s->body) > 0)
	{
		if (++pieces > MAX_PIECES)
		{
			conn_enqueue(c, &ready);
			return;
		}
		frame_piece(c);
		if (!write_out(c))
			return;
	}
	if (s && s->phase != PHASE_OVER)
	{
		if (more)
			conn_enqueue(c, &ready);
		return;
	}
	if (s && s->framing == FRAME_CHUNKED && s->ending == END_CLEAN &&
		!s->tail_sent)
	{
		s->tail_sent = true;
		buf_puts(&c->out, "0\r\n\r\n");
		if (!write_out(c))
			return;
	}
	answer_done(c);
}

/* --------------------------------------------------------------- requests */

typedef struct Request
{
	const char *method;
	const char *target;			/* path and query, NUL-terminated */
	const char *path;			/* without the query */
	const char *query;			/* "" when there is none */
	const char *body;
	size_t		body_len;
	const char *key;			/* the API key that was sent, or NULL */
	Buf			headers;		/* JSON object */
} Request;

/* One header line of the request, cut in place. */
typedef struct Header
{
	char	   *name;
	char	   *value;
} Header;

/* Forgets the oldest record. */
static void
record_drop(void)
{
	Record	   *r = records[first_record];

	if (r->conn)
		r->conn->record = NULL;
	recorded_bytes -= r->size;
	free(r->head);
	free(r->body);
	free(r);
	first_record = (first_record + 1) % MAX_RECORDS;
	nrecords--;
}

/* Records a request. */
static void
record_add(Conn *c, const Request *req)
{
	Record	   *r = zalloc(sizeof(*r));
	Buf			head = {0};

	buf_puts(&head, "\"method\":");
	buf_json(&head, req->method, strlen(req->method));
	buf_puts(&head, ",\"path\":");
	buf_json(&head, req->target, strlen(req->target));
	buf_puts(&head, ",\"headers\":");
	buf_put(&head, req->headers.data, req->headers.len);
	r->n = ++next_record;
	r->connection = c->number;
	r->arrived = now_ns();
	r->size = sizeof(*r) + head.len + req->body_len;
	buf_str(&head);
	r->head = head.data;
	r->body = malloc(req->body_len + 1);
	if (r->body == NULL)
		die("malloc");
	memcpy(r->body, req->body, req->body_len);
	r->body_len = req->body_len;
	r->conn = c;
	c->record = r;
	while (nrecords > 0 && (nrecords == MAX_RECORDS ||
							recorded_bytes + r->size > MAX_RECORDED))
		record_drop();
	records[(first_record + nrecords++) % MAX_RECORDS] = r;
	recorded_bytes += r->size;
}

/* Appends a record as JSON. */
static void
put_record(Buf *b, const Record *r)
{
	buf_printf(b, "{\"n\":%lu,\"connection\":%lu,\"arrived_ns\":%lld,"
			   "\"ended_ns\":%lld,"
			   "\"status\":%d,\"done\":%s,\"aborted\":%s,%s,\"body\":",
			   r->n, r->connection, (long long) r->arrived,
			   (long long) r->ended, r->status,
			   r->done ? "true" : "false", r->aborted ? "true" : "false",
			   r->head);
	if (json_valid(r->body, r->body_len))
		buf_put(b, r->body, r->body_len);
	else
		buf_json(b, r->body, r->body_len);
	buf_puts(b, "}");
}

/* Finds a parameter of the query; false when it is not there. */
static bool
query_param(const char *query, const char *name, char *value, size_t size)
{
	size_t		n = strlen(name);
	const char *p = query;

	while (*p)
	{
		size_t		len = strcspn(p, "&");

		if (len > n && p[n] == '=' && memcmp(p, name, n) == 0)
		{
			snprintf(value, size, "%.*s", (int) (len - n - 1), p + n + 1);
			return true;
		}
		p += len + (p[len] == '&');
	}
	return false;
}

/* Answers a request of the test's own with JSON. */
static void
reply_json(Conn *c, int status, const char *json, size_t len)
{
	buf_printf(&c->out, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\n"
			   "Content-Length: %zu\r\n%s\r\n", status, reason(status), len,
			   c->close_after ? "Connection: close\r\n" : "");
	buf_put(&c->out, json, len);
	conn_pump(c);
}

/* Answers GET and DELETE /requests. */
static void
serve_requests(Conn *c, const Request *req)
{
	char		value[16];
	Buf			b = {0};
	int			i = 0;

	if (strcmp(req->method, "DELETE") == 0)
	{
		while (nrecords > 0)
			record_drop();
		next_record = 0;
		reply_json(c, 200, "{}", 2);
		return;
	}
	if (query_param(req->query, "last", value, sizeof(value)) && nrecords > 0)
		i = nrecords - 1;
	buf_puts(&b, "[");
	for (bool first = true; i < nrecords; i++, first = false)
	{
		buf_puts(&b, first ? "\n" : ",\n");
		put_record(&b, records[(first_record + i) % MAX_RECORDS]);
	}
	buf_puts(&b, "]\n");
	reply_json(c, 200, b.data, b.len);
	buf_free(&b);
}

/* Answers with the counters. */
static void
reply_stats(Conn *c)
{
	Buf			b = {0};

	buf_printf(&b, "{\"requests\":%ld,\"active\":%ld,\"completed\":%ld,"
			   "\"aborted\":%ld,\"max_active\":%ld,\"connections\":%ld}\n",
			   stats.requests, stats.active, stats.completed, stats.aborted,
			   stats.max_active, stats.connections);
	reply_json(c, 200, b.data, b.len);
	buf_free(&b);
}

/* Answers with the state of a gate. */
static void
reply_gate(Conn *c, const Gate *g)
{
	Buf			b = {0};

	buf_printf(&b, "{\"waiting\":%ld,\"passes\":%ld}\n", g->waiting,
			   g->passes);
	reply_json(c, 200, b.data, b.len);
	buf_free(&b);
}

/* Says whether the counter that "NAME:N" names has reached N. */
static bool
stats_reached(const char *wait)
{
	static const struct
	{
		const char *name;
		const long *value;
	}			counters[] = {
		{"requests", &stats.requests}, {"active", &stats.active},
		{"completed", &stats.completed}, {"aborted", &stats.aborted},
		{"max_active", &stats.max_active},
		{"connections", &stats.connections}
	};
	const char *colon = strchr(wait, ':');

	if (colon == NULL)
		return stats.active == 0;
	for (size_t i = 0; i < sizeof(counters) / sizeof(counters[0]); i++)
		if (strncmp(wait, counters[i].name, colon - wait) == 0 &&
			counters[i].name[colon - wait] == '\0')
			return *counters[i].value >= strtol(colon + 1, NULL, 10);
	return true;
}

/* Answers a held GET if what it waits for has come. */
static bool
try_held(Conn *c)
{
	Gate	   *g;

	if (strncmp(c->wait, "stats ", 6) == 0)
	{
		if (!stats_reached(c->wait + 6))
			return false;
		conn_enqueue(c, NULL);
		reply_stats(c);
		return true;
	}
	g = gate_find(strchr(c->wait, ' ') + 1);
	if (g->waiting < strtol(c->wait, NULL, 10))
		return false;
	conn_enqueue(c, NULL);
	reply_gate(c, g);
	return true;
}

/* Holds a GET until what it waits for has come. */
static void __attribute__((format(printf, 2, 3)))
hold(Conn *c, const char *format,...)
{
	va_list		ap;

	free(c->wait);
	va_start(ap, format);
	if (vasprintf(&c->wait, format, ap) < 0)
		die("vasprintf");
	va_end(ap);
	if (!try_held(c))
		conn_enqueue(c, &held);
}

/* Looks at all held GETs again. */
static void
release_held(void)
{
	Conn	   *c;
	Conn	   *next;

	changed = false;
	for (c = TAILQ_FIRST(&held); c; c = next)
	{
		next = TAILQ_NEXT(c, link);
		try_held(c);
	}
}

/* Answers POST and GET /gate/NAME. */
static void
serve_gate(Conn *c, const Request *req)
{
	Gate	   *g = gate_find(req->path + strlen("/gate/"));
	char		value[16] = "1";
	Conn	   *first;

	if (strcmp(req->method, "POST") != 0)
	{
		if (query_param(req->query, "wait", value, sizeof(value)))
			hold(c, "%ld %s", strtol(value, NULL, 10), g->name);
		else
			reply_gate(c, g);
		return;
	}
	query_param(req->query, "n", value, sizeof(value));
	g->passes += strtol(value, NULL, 10);
	while (g->passes > 0 && (first = TAILQ_FIRST(&g->queue)) != NULL)
	{
		g->passes--;
		g->waiting--;
		first->stream->at_gate = NULL;
		first->stream->gate++;
		if (first->stream->due > 0)
			first->stream->due = now_ns();
		conn_enqueue(first, &ready);
	}
	changed = true;
	reply_gate(c, g);
}

/* Answers GET /stats. */
static void
serve_stats(Conn *c, const Request *req)
{
	char		value[64];

	if (query_param(req->query, "wait", value, sizeof(value)))
		hold(c, "stats %s", value);
	else
		reply_stats(c);
}

/* Begins an answer that is recorded and counted. */
static Stream *
stream_begin(Conn *c, const Request *req)
{
	Stream	   *s = zalloc(sizeof(*s));

	plan_init(&s->plan);
	s->serial = ++next_serial;
	s->eol = "\n";
	c->stream = s;
	record_add(c, req);
	stats.requests++;
	if (++stats.active > stats.max_active)
		stats.max_active = stats.active;
	changed = true;
	return s;
}

/* Makes an error the answer, with the message given. */
static void __attribute__((format(printf, 4, 5)))
refuse(Stream *s, int status, const char *code, const char *format,...)
{
	va_list		ap;

	plan_free(&s->plan);
	plan_init(&s->plan);
	s->plan.status = status;
	s->plan.errcode = code ? strdup(code) : NULL;
	va_start(ap, format);
	if (vasprintf(&s->plan.errmsg, format, ap) < 0)
		die("vasprintf");
	va_end(ap);
	make_error(s);
}

/* Makes the text of an answer that nobody commanded. */
static char *
default_text(const Facts *f, bool directive, bool after_tools)
{
	static const char *const pleasant =
		"\n\nThis is the fake model that comes with the tests, so the words "
		"are always the same. They still travel like real ones: each arrives "
		"as an event of its own, is stored, and reaches every listener of the "
		"session. A real endpoint would have more to say.";
	Buf			b = {0};
	Buf			user = f->user;
	const char *p = buf_str(&user);
	const char *open;

	if (after_tools)
	{
		Buf			tool = f->tool;

		buf_printf(&b, "Tool said: %s", tool.len ? buf_str(&tool) : "");
		return b.data;
	}
	if (f->max_tokens >= 0 && f->max_tokens <= 20 && !directive)
		return strdup("Fake Title Here");
	buf_puts(&b, "You said: ");
	while (directive && (open = strstr(p, "[[")) && strstr(open, "]]"))
	{
		buf_put(&b, p, open - p);
		p = strstr(open, "]]") + 2;
	}
	buf_puts(&b, p);
	while (b.len > 0 && b.data[b.len - 1] == ' ')
		b.len--;
	if (!directive)
		buf_puts(&b, pleasant);
	buf_str(&b);
	return b.data;
}

/* Lets a stream follow what the request says. */
static void
plan_answer(Stream *s, Facts *f)
{
	const char *end = NULL;
	const char *directive;
	bool		title = f->max_tokens >= 0 && f->max_tokens <= 20 &&
	f->says_title;
	bool		after_tools = false;
	Plan	   *p = &s->plan;
	const char *text = buf_str(f->fake.len > 0 ? &f->fake : &f->user);

	directive = find_directive(text, title, f->tool_steps, &end);
	if (directive)
		plan_read(p, directive, end, false);
	else if ((directive = find_directive(text, title, -1, &end)) != NULL)
	{
		plan_read(p, directive, end, false);
		if (p->ncalls > 0 && f->tool_steps >= (p->steps > 0 ? p->steps : 1))
		{
			after_tools = true;
			plan_free(p);
			plan_read(p, directive, end, true);
		}
	}
	if (p->text)
		s->text = strdup(p->text);
	else if (p->tokens < 0 && p->hugeline <= 0 && p->hugebody <= 0 &&
			 p->refusal == NULL && p->ncalls == 0)
		s->text = default_text(f, directive != NULL, after_tools);
	if (p->eol && strcmp(p->eol, "lf") != 0)
		s->eol = strcmp(p->eol, "cr") == 0 ? "\r" : "\r\n";
	s->include_usage = f->include_usage;
	s->usage_in_chunks = f->include_usage && usage_is(s, "final");
	s->prompt_tokens = f->prompt_bytes / 4 + 1;
}

/* Answers POST .../chat/completions. */
static void
serve_completion(Conn *c, const Request *req)
{
	Stream	   *s = stream_begin(c, req);
	Facts		f;

	if (!facts_read(&f, req->body, req->body_len))
		refuse(s, 400, NULL, "We could not parse the JSON body of your "
			   "request, or it has no messages.");
	else
	{
		plan_answer(s, &f);
		if (s->plan.html > 0 && s->plan.status < 0)
			s->plan.status = 502;
		if (s->plan.errbody && s->plan.status < 0)
			s->plan.status = 500;
		if (s->plan.status >= 0)
			make_error(s);
		else if (s->plan.plain > 0 || !f.stream)
			make_plain(s, buf_str(&f.model));
		else
			make_prefix(s, buf_str(&f.model));
	}
	facts_free(&f);
	conn_pump(c);
}

/* Copies the "command" of a tool's arguments. */
static void
read_command(const Request *req, Buf *command)
{
	Json		j = {req->body, req->body + req->body_len, 0, false};
	Buf			key = {0};

	if (json_peek(&j) == '{' && json_open(&j, '{'))
		do
		{
			if (!json_key(&j, &key))
				break;
			if (strcmp(key.data, "command") == 0 && json_peek(&j) == '"')
				json_string(&j, command);
			else
				json_skip(&j);
		} while (json_more(&j, '}'));
	buf_free(&key);
	buf_str(command);
}

/* Makes the body that a tool endpoint answers with. */
static void
make_tool_reply(Stream *s, const Request *req)
{
	Buf			b = {0};

	s->reply_type = "application/json";
	if (s->plan.text)
		buf_puts(&b, s->plan.text);
	else if (s->plan.hugebody > 0)
	{
		buf_puts(&b, "\"");
		buf_fill(&b, 'x', (size_t) s->plan.hugebody);
		buf_puts(&b, "\"");
	}
	else
	{
		buf_puts(&b, "{\"tool\":");
		buf_json(&b, req->path + 7, strlen(req->path + 7));
		buf_puts(&b, ",\"args\":");
		if (json_valid(req->body, req->body_len))
			buf_put(&b, req->body, req->body_len);
		else
			buf_json(&b, req->body, req->body_len);
		buf_puts(&b, "}");
	}
	s->reply_len = b.len;
	buf_str(&b);
	s->reply = b.data;
}

/* Answers POST /tools/NAME. */
static void
serve_tool(Conn *c, const Request *req)
{
	Stream	   *s = stream_begin(c, req);
	Buf			command = {0};
	const char *p;
	const char *end;

	read_command(req, &command);
	p = command.data;
	end = p + command.len;
	if (strncmp(p, "[[", 2) == 0 && strstr(p, "]]"))
	{
		end = strstr(p, "]]");
		p += 2;
	}
	if (memchr(p, '=', end - p) || strcmp(p, "hang") == 0)
	{
		plan_free(&s->plan);
		plan_read(&s->plan, p, end, false);
	}
	s->plan.first = s->plan.delay;
	if (s->plan.status >= 400)
		make_error(s);
	else
		make_tool_reply(s, req);
	buf_free(&command);
	conn_pump(c);
}

/* Answers GET /v1/models. */
static void
serve_models(Conn *c, const Request *req)
{
	Stream	   *s = stream_begin(c, req);

	s->reply = strdup("{\"object\":\"list\",\"data\":[{\"id\":\"fake-1\","
					  "\"object\":\"model\",\"created\":1700000000,"
					  "\"owned_by\":\"fake\"}]}");
	s->reply_len = strlen(s->reply);
	s->reply_type = "application/json";
	conn_pump(c);
}

/* Refuses a wrong API key; true when it did. */
static bool
refuse_key(Conn *c, const Request *req)
{
	Stream	   *s;

	if (api_key == NULL || (req->key && strcmp(req->key, api_key) == 0))
		return false;
	s = stream_begin(c, req);
	if (req->key)
		refuse(s, 401, "invalid_api_key", "Incorrect API key provided: %s. "
			   "You can find your API key at https://fake.example/keys.",
			   req->key);
	else
		refuse(s, 401, NULL, "You didn't provide an API key.");
	conn_pump(c);
	return true;
}

/* Says whether a string ends with another. */
static bool
ends_with(const char *s, const char *tail)
{
	size_t		n = strlen(s);
	size_t		t = strlen(tail);

	return n >= t && strcmp(s + n - t, tail) == 0;
}

/* Answers one request. */
static void
route(Conn *c, const Request *req)
{
	bool		post = strcmp(req->method, "POST") == 0;

	if (strcmp(req->path, "/requests") == 0)
		serve_requests(c, req);
	else if (strcmp(req->path, "/stats") == 0)
		serve_stats(c, req);
	else if (strncmp(req->path, "/gate/", 6) == 0)
		serve_gate(c, req);
	else if (post && strncmp(req->path, "/tools/", 7) == 0)
		serve_tool(c, req);
	else if (refuse_key(c, req))
		return;
	else if (post && ends_with(req->path, "/chat/completions"))
		serve_completion(c, req);
	else if (ends_with(req->path, "/models"))
		serve_models(c, req);
	else
	{
		refuse(stream_begin(c, req), 404, NULL, "Invalid URL (%s %s)",
			   req->method, req->path);
		conn_pump(c);
	}
}

/* ------------------------------------------------------------------- HTTP */

/* Cuts the next line off a head; NULL at its end. */
static char *
next_line(char **p, char *end)
{
	char	   *line = *p;
	char	   *nl = memchr(line, '\n', end - line);

	if (nl == NULL)
		return NULL;
	*p = nl + 1;
	if (nl > line && nl[-1] == '\r')
		nl--;
	*nl = '\0';
	return *line ? line : NULL;
}

/* Appends the headers as a JSON object; equal names are joined. */
static void
put_headers(Buf *b, const Header *h, int n)
{
	bool		first = true;

	buf_puts(b, "{");
	for (int i = 0; i < n; i++)
	{
		bool		seen = false;

		for (int k = 0; k < i; k++)
			seen = seen || strcmp(h[k].name, h[i].name) == 0;
		if (seen)
			continue;
		buf_puts(b, first ? "" : ",");
		first = false;
		buf_json(b, h[i].name, strlen(h[i].name));
		buf_puts(b, ":\"");
		buf_escape(b, h[i].value, strlen(h[i].value));
		for (int k = i + 1; k < n; k++)
			if (strcmp(h[k].name, h[i].name) == 0)
			{
				buf_puts(b, ", ");
				buf_escape(b, h[k].value, strlen(h[k].value));
			}
		buf_puts(b, "\"");
	}
	buf_puts(b, "}");
}

/* Splits the header lines; returns how many there are. */
static int
split_headers(char *p, char *end, Header *h, int max)
{
	char	   *line;
	int			n = 0;

	while (n < max && (line = next_line(&p, end)) != NULL)
	{
		char	   *colon = strchr(line, ':');

		if (colon == NULL)
			continue;
		*colon = '\0';
		for (char *at = line; *at; at++)
			if (*at >= 'A' && *at <= 'Z')
				*at += 'a' - 'A';
		h[n].name = line;
		h[n].value = colon + 1 + strspn(colon + 1, " \t");
		n++;
	}
	return n;
}

/* Decodes a chunked body in place; -1: bad, 0: not all there, 1: done. */
static int
dechunk(char *p, size_t len, size_t *used, size_t *body_len)
{
	char	   *at = p;
	char	   *end = p + len;
	size_t		out = 0;

	for (int pass = 0; pass < 2; pass++)
		for (at = p, out = 0;;)
		{
			char	   *nl = memchr(at, '\n', end - at);
			size_t		n;

			if (nl == NULL)
				return 0;
			n = strtoul(at, NULL, 16);
			if (n > MAX_BODY)
				return -1;
			at = nl + 1;
			if ((size_t) (end - at) < n + 2)
				return 0;
			if (pass == 1)
				memmove(p + out, at, n);
			out += n;
			at += n + 2;
			if (n == 0)
				break;
		}
	*used = at - p;
	*body_len = out;
	return 1;
}

/* What the headers say about the body and the connection. */
typedef struct Message
{
	size_t		length;
	bool		chunked;
	bool		expects;
} Message;

/* Reads the headers that matter here. */
static void
read_headers(Conn *c, Request *req, Message *m, const Header *h, int n)
{
	for (int i = 0; i < n; i++)
	{
		if (strcmp(h[i].name, "content-length") == 0)
			m->length = strtoul(h[i].value, NULL, 10);
		else if (strcmp(h[i].name, "transfer-encoding") == 0)
			m->chunked = strcasestr(h[i].value, "chunked") != NULL;
		else if (strcmp(h[i].name, "expect") == 0)
			m->expects = true;
		else if (strcmp(h[i].name, "connection") == 0)
			c->close_after |= strcasecmp(h[i].value, "close") == 0;
		else if (strcmp(h[i].name, "api-key") == 0)
			req->key = h[i].value;
		else if (strcmp(h[i].name, "authorization") == 0 &&
				 strncasecmp(h[i].value, "bearer ", 7) == 0)
			req->key = h[i].value + 7;
	}
}

/* Splits the request line in place; false when it is none. */
static bool
split_request_line(Conn *c, Request *req, char *line, Buf *path)
{
	char	   *target = line ? strchr(line, ' ') : NULL;
	char	   *version = target ? strchr(target + 1, ' ') : NULL;

	if (version == NULL || strncmp(version + 1, "HTTP/1.", 7) != 0)
		return false;
	*target++ = '\0';
	*version++ = '\0';
	c->close_after |= strcmp(version, "HTTP/1.0") == 0;
	req->method = line;
	req->target = target;
	req->query = strchr(target, '?') ? strchr(target, '?') + 1 : "";
	buf_put(path, target, strcspn(target, "?"));
	req->path = buf_str(path);
	return true;
}

/* Finds out whether the body is all there; answers as dechunk() does. */
static int
take_body(Conn *c, Request *req, const Message *m, char *body, size_t *used)
{
	size_t		there = c->in.data + c->in.len - body;

	if (!m->chunked)
	{
		*used = m->length;
		req->body_len = m->length;
		if (m->length > MAX_BODY)
			return -1;
	}
	if (m->chunked)
	{
		int			verdict = dechunk(body, there, used, &req->body_len);

		if (verdict != 0)
			return verdict;
	}
	else if (there >= m->length)
		return 1;
	if (m->expects && !c->continued)
	{
		c->continued = true;
		buf_puts(&c->out, "HTTP/1.1 100 Continue\r\n\r\n");
		write_out(c);
	}
	return 0;
}

/* Answers the request in the input, if it is whole. */
static void
conn_serve(Conn *c)
{
	char	   *start = c->in.data + c->in.off;
	char	   *head_end = memmem(start, buf_left(&c->in), "\r\n\r\n", 4);
	size_t		head_len;
	size_t		used = 0;
	char	   *copy;
	char	   *p;
	Header		h[100];
	int			n;
	int			verdict = -1;
	Request		req = {0};
	Message		m = {0};
	Buf			path = {0};

	if (head_end == NULL)
	{
		if (buf_left(&c->in) > MAX_HEAD)
			conn_close(c, false);
		return;
	}
	head_len = head_end + 4 - start;
	p = copy = memcpy(zalloc(head_len + 1), start, head_len);
	if (split_request_line(c, &req, next_line(&p, copy + head_len), &path))
	{
		n = split_headers(p, copy + head_len, h, 100);
		read_headers(c, &req, &m, h, n);
		req.body = start + head_len;
		verdict = take_body(c, &req, &m, start + head_len, &used);
	}
	if (verdict < 0)
		conn_close(c, false);
	else if (verdict > 0)
	{
		Buf			in = c->in;

		/* the request stays in "in" while the rest moves to a new buffer */
		memset(&c->in, 0, sizeof(c->in));
		buf_put(&c->in, start + head_len + used,
				in.data + in.len - (start + head_len + used));
		c->continued = false;
		put_headers(&req.headers, h, n);
		route(c, &req);
		buf_free(&req.headers);
		buf_free(&in);
	}
	free(copy);
	buf_free(&path);
}

/* Reads what the client sent; false when the connection is gone. */
static bool
conn_read(Conn *c)
{
	for (;;)
	{
		ssize_t		n = recv(c->fd, buf_need(&c->in, 16384), 16384, 0);

		if (n > 0)
			c->in.len += (size_t) n;
		else if (n < 0 && errno == EINTR)
			continue;
		else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			return true;
		else
		{
			conn_close(c, true);
			return false;
		}
		if (n < 16384)
			return true;
	}
}

/* Handles what epoll says about a connection. */
static void
conn_event(Conn *c, uint32_t events)
{
	if (c->dead)
		return;
	if (events & EPOLLERR)
	{
		conn_close(c, true);
		return;
	}
	if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP))
	{
		if (!conn_read(c))
			return;
		if (c->stream == NULL && c->queue == NULL && buf_left(&c->out) == 0)
			conn_serve(c);
		if (c->dead)
			return;
	}
	if (events & EPOLLOUT)
		conn_pump(c);
}

/* Takes all connections that wait. */
static void
accept_all(void)
{
	for (;;)
	{
		int			fd = accept4(listen_fd, NULL, NULL,
								 SOCK_NONBLOCK | SOCK_CLOEXEC);
		struct epoll_event ev = {.events = EPOLLIN | EPOLLRDHUP};
		int			on = 1;
		Conn	   *c;

		if (fd < 0)
			return;
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		c = zalloc(sizeof(*c));
		c->fd = fd;
		c->timer = -1;
		c->number = ++next_connection;
		c->mask = ev.events;
		ev.data.ptr = c;
		if (epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &ev) < 0)
			die("epoll_ctl");
		stats.connections++;
	}
}

/* Lets the streams go on whose time has come. */
static void
run_timers(void)
{
	int64_t		now = heap_len > 0 ? now_ns() : 0;

	while (heap_len > 0 && heap[0]->deadline <= now)
	{
		Conn	   *c = heap[0];
		int64_t		old = c->deadline;

		/* most streams set it anew, which costs less than two moves */
		conn_pump(c);
		if (heap_len > 0 && heap[0] == c && c->deadline == old)
			timer_clear(c);
	}
}

/* Lets each stream that is ready produce once more. */
static void
run_ready(void)
{
	Conn	   *last = TAILQ_LAST(&ready, Queue);
	Conn	   *c = NULL;

	while (c != last && (c = TAILQ_FIRST(&ready)) != NULL)
		conn_pump(c);
}

/* Frees the connections that were closed in this round. */
static void
bury(void)
{
	Conn	   *c;

	while ((c = TAILQ_FIRST(&graveyard)) != NULL)
	{
		TAILQ_REMOVE(&graveyard, c, link);
		free(c);
	}
}

/* Returns how many milliseconds epoll may sleep; -1: for ever. */
static int
sleep_ms(void)
{
	int64_t		left;

	if (!TAILQ_EMPTY(&ready))
		return 0;
	if (heap_len == 0)
		return -1;
	left = heap[0]->deadline - now_ns();
	return left <= 0 ? 0 : left > 60000 * MS ? 60000 :
		(int) ((left + MS - 1) / MS);
}

/* Serves until a signal, or the end of standard input, says stop. */
static void
run(const sigset_t *unblocked)
{
	struct epoll_event events[MAX_EVENTS];

	while (!stopping)
	{
		int			n = epoll_pwait(epfd, events, MAX_EVENTS, sleep_ms(),
									unblocked);

		for (int i = 0; i < n; i++)
		{
			char		byte[256];

			if (events[i].data.ptr == &listen_fd)
				accept_all();
			else if (events[i].data.ptr == &stopping)
				stopping = read(STDIN_FILENO, byte, sizeof(byte)) <= 0;
			else
				conn_event(events[i].data.ptr, events[i].events);
		}
		run_timers();
		run_ready();
		if (changed)
			release_held();
		bury();
	}
}

/* ---------------------------------------------------------------- startup */

/* Notes that the process is to end. */
static void
on_signal(int signo)
{
	(void) signo;
	stopping = 1;
}

/* Raises the number of descriptors as far as the system lets us. */
static void
raise_nofile(void)
{
	struct rlimit lim;

	getrlimit(RLIMIT_NOFILE, &lim);
	if (lim.rlim_max < 65536)
	{
		struct rlimit more = {65536, 65536};

		if (setrlimit(RLIMIT_NOFILE, &more) == 0)
			return;
	}
	lim.rlim_cur = lim.rlim_max;
	setrlimit(RLIMIT_NOFILE, &lim);
}

/* Listens and tells on which port. */
static void
start_listening(const char *host, int port)
{
	struct sockaddr_in addr = {.sin_family = AF_INET};
	struct epoll_event ev = {.events = EPOLLIN, .data.ptr = &listen_fd};
	socklen_t	len = sizeof(addr);
	int			on = 1;

	addr.sin_port = htons((uint16_t) port);
	if (inet_pton(AF_INET, host, &addr.sin_addr) != 1)
		die("--host");
	listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	setsockopt(listen_fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listen_fd, (struct sockaddr *) &addr, sizeof(addr)) < 0)
		die("bind");
	if (listen(listen_fd, 8192) < 0)
		die("listen");
	getsockname(listen_fd, (struct sockaddr *) &addr, &len);
	if (epoll_ctl(epfd, EPOLL_CTL_ADD, listen_fd, &ev) < 0)
		die("epoll_ctl");
	printf("port=%d\n", ntohs(addr.sin_port));
	fflush(stdout);
}

/* Ends when standard input does; at once if nobody can wait for it. */
static void
watch_stdin(void)
{
	struct epoll_event ev = {.events = EPOLLIN};

	ev.data.ptr = (void *) &stopping;
	if (epoll_ctl(epfd, EPOLL_CTL_ADD, STDIN_FILENO, &ev) < 0)
		stopping = 1;
}

/* Says how the program is called, and ends it. */
static void
usage(void)
{
	fprintf(stderr, "usage: fake_llm [--port N] [--host ADDR] [--delay MS] "
			"[--api-key KEY] [--die-with-stdin]\n");
	exit(2);
}

int
main(int argc, char **argv)
{
	const char *host = "127.0.0.1";
	int			port = 0;
	bool		die_with_stdin = false;
	sigset_t	blocked;
	sigset_t	unblocked;
	struct sigaction sa = {.sa_handler = on_signal};

	default_delay = -1;
	for (int i = 1; i < argc; i++)
	{
		bool		more = i + 1 < argc;

		if (more && strcmp(argv[i], "--port") == 0)
			port = atoi(argv[++i]);
		else if (more && strcmp(argv[i], "--host") == 0)
			host = argv[++i];
		else if (more && strcmp(argv[i], "--delay") == 0)
			default_delay = (long) (atof(argv[++i]) * MS);
		else if (more && strcmp(argv[i], "--api-key") == 0)
			api_key = argv[++i];
		else if (strcmp(argv[i], "--die-with-stdin") == 0)
			die_with_stdin = true;
		else
			usage();
	}
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGTERM);
	sigaddset(&blocked, SIGINT);
	sigprocmask(SIG_BLOCK, &blocked, &unblocked);
	sigdelset(&unblocked, SIGTERM);
	sigdelset(&unblocked, SIGINT);
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGINT, &sa, NULL);
	signal(SIGPIPE, SIG_IGN);
	raise_nofile();
	epfd = epoll_create1(EPOLL_CLOEXEC);
	if (epfd < 0)
		die("epoll_create1");
	if (die_with_stdin)
		watch_stdin();
	start_listening(host, port);
	run(&unblocked);
	return 0;
}
