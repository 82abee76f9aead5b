/*
 * sse.c
 *	  Pull parser for text/event-stream by the WHATWG rules.
 *
 * Owns one ChatSse per transfer: 88 bytes, plus a malloc'ed buffer only when
 * an event has several data lines or is split across feeds.  An event whose
 * single data line lies whole in the fed bytes is handed out in place, which
 * is the usual case and costs two or three memchr.
 *
 * A line is known by its first HEAD_SIZE bytes.  If these are split across
 * feeds they wait in head[]; what follows them goes where the field says, so
 * a comment or an unknown field costs no memory however long it is.
 *
 * Everything depends on the bytes alone, never on how they were split.
 */
#include "sse.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* enough to tell "event: " from anything else */
#define HEAD_SIZE 7

/* how far a search for LF may run ahead of the next CR */
#define WINDOW 1024

typedef enum LineKind
{
	LINE_HEAD,					/* not known yet */
	LINE_DATA,
	LINE_EVENT,
	LINE_SKIP					/* comment or a field that we ignore */
} LineKind;

/* Starts a parser. */
void
chat_sse_init(ChatSse *sse, size_t max_event)
{
	memset(sse, 0, sizeof(*sse));
	sse->max_event = max_event;
}

/* Frees the buffer. */
void
chat_sse_free(ChatSse *sse)
{
	free(sse->buf);
	sse->buf = NULL;
	sse->len = sse->cap = 0;
}

/* Forgets the event that was handed out; a large buffer is given back. */
static void
forget_event(ChatSse *sse)
{
	sse->dispatched = false;
	sse->has_data = false;
	sse->held = NULL;
	sse->name_len = 0;
	sse->len = 0;
	if (sse->cap > CHAT_SSE_KEEP_SIZE)
		chat_sse_free(sse);
}

/* Remembers a final failure; says false so that callers can pass it up. */
static bool
fail(ChatSse *sse, ChatSseResult result)
{
	sse->failed = (unsigned char) result;
	return false;
}

/* Makes room for n more bytes of data, within the cap. */
static bool
reserve(ChatSse *sse, size_t n)
{
	size_t		cap = sse->cap ? sse->cap : 256;
	char	   *buf;

	if (n > sse->max_event - sse->len)
		return fail(sse, CHAT_SSE_TOO_LONG);
	if (n <= sse->cap - sse->len)
		return true;
	while (cap - sse->len < n)
	{
		if (cap > SIZE_MAX / 2)
			return fail(sse, CHAT_SSE_NOMEM);
		cap *= 2;
	}
	buf = realloc(sse->buf, cap);
	if (buf == NULL)
		return fail(sse, CHAT_SSE_NOMEM);
	sse->buf = buf;
	sse->cap = cap;
	return true;
}

/* Appends bytes to the event's data. */
static bool
append(ChatSse *sse, const char *s, size_t n)
{
	if (n == 0)
		return true;
	if (!reserve(sse, n))
		return false;
	memcpy(sse->buf + sse->len, s, n);
	sse->len += n;
	return true;
}

/* Copies a data line that is still in place, before the bytes go away. */
static bool
keep_held(ChatSse *sse)
{
	const char *held = sse->held;

	sse->held = NULL;
	return held == NULL || append(sse, held, sse->held_len);
}

/* Adds bytes of a line's value to where its field goes. */
static bool
add_value(ChatSse *sse, const char *s, size_t n)
{
	size_t		room = CHAT_SSE_NAME_SIZE - sse->name_len;

	switch (sse->line)
	{
		case LINE_DATA:
			return append(sse, s, n);
		case LINE_EVENT:
			if (n > room)
				n = room;
			memcpy(sse->name + sse->name_len, s, n);
			sse->name_len += (unsigned char) n;
			return true;
		default:
			return true;
	}
}

/* Is the line's field this one?  If so, *skip is where its value starts. */
static bool
is_field(const char *s, size_t n, const char *field, size_t flen,
		 size_t *skip)
{
	if (n < flen || memcmp(s, field, flen) != 0)
		return false;
	if (n == flen)
		*skip = flen;
	else if (s[flen] != ':')
		return false;
	else if (n > flen + 1 && s[flen + 1] == ' ')
		*skip = flen + 2;
	else
		*skip = flen + 1;
	return true;
}

/*
 * Learns a line's field from its first bytes and takes their value.  With
 * in_place, s holds the whole line and stays good until the call returns.
 */
static bool
start_line(ChatSse *sse, const char *s, size_t n, bool in_place)
{
	size_t		skip = 0;

	if (is_field(s, n, "data", 4, &skip))
	{
		bool		first = !sse->has_data;

		sse->line = LINE_DATA;
		sse->has_data = true;
		if (first && in_place)
		{
			if (n - skip > sse->max_event)
				return fail(sse, CHAT_SSE_TOO_LONG);
			sse->held = s + skip;
			sse->held_len = n - skip;
			return true;
		}
		if (!first && (!keep_held(sse) || !append(sse, "\n", 1)))
			return false;
	}
	else if (is_field(s, n, "event", 5, &skip))
	{
		sse->line = LINE_EVENT;
		sse->name_len = 0;
	}
	else
		sse->line = LINE_SKIP;
	return add_value(sse, s + skip, n - skip);
}

/* Takes bytes of the current line; whole = the line ends with them. */
static bool
take(ChatSse *sse, const char *s, size_t n, bool whole)
{
	size_t		k;

	if (sse->line != LINE_HEAD)
		return add_value(sse, s, n);
	if (sse->head_len == 0 && (whole || n >= HEAD_SIZE))
		return start_line(sse, s, n, whole);

	k = HEAD_SIZE - sse->head_len;
	if (k > n)
		k = n;
	memcpy(sse->head + sse->head_len, s, k);
	sse->head_len += (unsigned char) k;
	if (sse->head_len < HEAD_SIZE && !whole)
		return true;
	return start_line(sse, sse->head, sse->head_len, false) &&
		add_value(sse, s + k, n - k);
}

/* Ends a line. */
static void
end_line(ChatSse *sse)
{
	sse->line = LINE_HEAD;
	sse->head_len = 0;
}

/* Hands the event out if it has data; without data it is forgotten. */
static bool
dispatch(ChatSse *sse, ChatSseEvent *ev)
{
	if (!sse->has_data)
	{
		forget_event(sse);
		return false;
	}
	ev->data = sse->held ? sse->held : sse->buf;
	ev->len = sse->held ? sse->held_len : sse->len;
	if (ev->data == NULL)
		ev->data = "";
	ev->name = sse->name;
	ev->name_len = sse->name_len;
	sse->dispatched = true;
	return true;
}

/*
 * Finds the end of the line, CR or LF.  Searches in windows so that a text of
 * nothing but CRs is not searched for an LF again at each of them.
 */
static const char *
find_eol(const char *p, const char *end)
{
	while (p < end)
	{
		size_t		left = (size_t) (end - p);
		size_t		n = left < WINDOW ? left : WINDOW;
		const char *lf = memchr(p, '\n', n);
		const char *cr = memchr(p, '\r', lf ? (size_t) (lf - p) : n);

		if (cr)
			return cr;
		if (lf)
			return lf;
		p += n;
	}
	return NULL;
}

/* Skips a byte order mark at the start, also one split across feeds. */
static const char *
skip_bom(ChatSse *sse, const char *p, const char *end)
{
	static const char bom[] = "\xEF\xBB\xBF";

	while (sse->bom < 3 && p < end)
	{
		if (*p == bom[sse->bom])
		{
			sse->bom++;
			p++;
			continue;
		}
		if (sse->bom > 0)
			sse->line = LINE_SKIP;	/* no field starts with these bytes */
		sse->bom = 3;
	}
	return p;
}

/* Eats bytes from *p until an event is whole or end is reached. */
ChatSseResult
chat_sse_next(ChatSse *sse, const char **p, const char *end,
			  ChatSseEvent *ev)
{
	const char *s = *p;

	if (sse->dispatched)
		forget_event(sse);
	if (sse->bom < 3)
		s = skip_bom(sse, s, end);
	while (s < end && !sse->failed)
	{
		const char *eol;
		const char *start;
		bool		blank;

		if (sse->skip_lf)
		{
			sse->skip_lf = false;
			if (*s == '\n')
			{
				s++;
				continue;
			}
		}
		start = s;
		eol = find_eol(s, end);
		s = eol ? eol : end;
		blank = s == start && sse->line == LINE_HEAD && sse->head_len == 0;
		if (!blank && !take(sse, start, (size_t) (s - start), eol != NULL))
			break;
		if (eol == NULL)
			break;
		sse->skip_lf = *s++ == '\r';
		end_line(sse);
		if (blank && dispatch(sse, ev))
		{
			*p = s;
			return CHAT_SSE_EVENT;
		}
	}
	if (!sse->failed)
		(void) keep_held(sse);
	*p = end;
	return sse->failed ? (ChatSseResult) sse->failed : CHAT_SSE_MORE;
}

/* Hands out an event that the end of the bytes has cut. */
ChatSseResult
chat_sse_finish(ChatSse *sse, ChatSseEvent *ev)
{
	if (sse->dispatched)
		forget_event(sse);
	if (!sse->failed && sse->line == LINE_HEAD && sse->head_len > 0)
		(void) start_line(sse, sse->head, sse->head_len, false);
	if (sse->failed)
		return (ChatSseResult) sse->failed;
	end_line(sse);
	return dispatch(sse, ev) ? CHAT_SSE_EVENT : CHAT_SSE_MORE;
}
