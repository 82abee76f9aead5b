/*
 * fuzz_sse.c
 *	  libFuzzer target for src/sse.c.
 *
 * The first two bytes choose the cap and how the rest is split.  Whatever the
 * bytes are, feeding them whole, split at every point and in steps must give
 * the same events and the same end, and a plain reading of the standard by a
 * second, slow parser must agree.
 */
#include <stdint.h>

#include "sse.c"

#define MAX_INPUT 400

/* What a parser said, as a hash and a length. */
typedef struct Digest
{
	uint64_t	hash;
	size_t		events;
	int			end;
} Digest;

static void
add_bytes(Digest *d, const char *s, size_t n)
{
	d->hash = d->hash * 1099511628211u + n + 1;
	for (size_t i = 0; i < n; i++)
		d->hash = (d->hash ^ (unsigned char) s[i]) * 1099511628211u;
}

static void
add_event(Digest *d, const char *name, size_t nlen, const char *s, size_t n)
{
	d->events++;
	add_bytes(d, name, nlen);
	add_bytes(d, s, n);
}

/* Feeds a range from a copy of its own, which is gone afterwards. */
static ChatSseResult
feed(ChatSse *sse, Digest *d, const char *s, size_t n)
{
	char	   *copy = malloc(n + 1);
	const char *p = copy;
	ChatSseEvent ev;
	ChatSseResult result;

	memcpy(copy, s, n);
	copy = realloc(copy, n ? n : 1);
	p = copy;
	while ((result = chat_sse_next(sse, &p, copy + n, &ev)) == CHAT_SSE_EVENT)
		add_event(d, ev.name, ev.name_len, ev.data, ev.len);
	if (p != copy + n)
		abort();
	free(copy);
	return result;
}

/* Parses with the first feed ending at `split`, others of `step` bytes. */
static Digest
parse_split(const char *s, size_t n, size_t cap, size_t split, size_t step)
{
	Digest		d = {0};
	ChatSse		sse;
	ChatSseEvent ev;
	ChatSseResult result;

	chat_sse_init(&sse, cap);
	result = feed(&sse, &d, s, split);
	for (size_t i = split; i < n && result == CHAT_SSE_MORE; i += step)
		result = feed(&sse, &d, s + i, i + step < n ? step : n - i);
	if (result == CHAT_SSE_MORE)
	{
		result = chat_sse_finish(&sse, &ev);
		if (result == CHAT_SSE_EVENT)
			add_event(&d, ev.name, ev.name_len, ev.data, ev.len);
	}
	if (sse.len > cap)
		abort();
	chat_sse_free(&sse);
	d.end = (int) result;
	return d;
}

/* The event that the reference parser gathers. */
typedef struct Event
{
	char		data[MAX_INPUT * 2];
	size_t		len;
	size_t		lines;
	char		name[MAX_INPUT];
	size_t		name_len;
} Event;

/* Handles one line by the letter of the standard; false = over the cap. */
static int
reference_line(Event *ev, const char *line, size_t n, size_t cap)
{
	const char *colon = memchr(line, ':', n);
	size_t		flen = colon ? (size_t) (colon - line) : n;
	const char *value = line + flen + (colon ? 1 : 0);
	size_t		vlen = n - (size_t) (value - line);

	if (vlen > 0 && *value == ' ')
	{
		value++;
		vlen--;
	}
	if (flen == 4 && memcmp(line, "data", 4) == 0)
	{
		if (ev->lines++ > 0)
			ev->data[ev->len++] = '\n';
		memcpy(ev->data + ev->len, value, vlen);
		ev->len += vlen;
		return ev->len <= cap;
	}
	if (flen == 5 && memcmp(line, "event", 5) == 0)
	{
		memcpy(ev->name, value, vlen);
		ev->name_len = vlen < CHAT_SSE_NAME_SIZE ? vlen : CHAT_SSE_NAME_SIZE;
	}
	return 1;
}

/* Parses all at once, line by line. */
static Digest
parse_reference(const char *s, size_t n, size_t cap)
{
	Digest		d = {0};
	Event		ev = {.len = 0};
	size_t		i = n >= 3 && memcmp(s, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;

	while (i < n)
	{
		size_t		start = i;

		while (i < n && s[i] != '\n' && s[i] != '\r')
			i++;
		if (i > start)
		{
			if (!reference_line(&ev, s + start, i - start, cap))
			{
				d.end = CHAT_SSE_TOO_LONG;
				return d;
			}
		}
		else
		{
			if (ev.lines > 0)
				add_event(&d, ev.name, ev.name_len, ev.data, ev.len);
			ev.len = ev.lines = ev.name_len = 0;
		}
		if (i < n)
			i += s[i] == '\r' && i + 1 < n && s[i + 1] == '\n' ? 2 : 1;
	}
	d.end = ev.lines > 0 ? CHAT_SSE_EVENT : CHAT_SSE_MORE;
	if (ev.lines > 0)
		add_event(&d, ev.name, ev.name_len, ev.data, ev.len);
	return d;
}

static void
must_equal(Digest a, Digest b)
{
	if (a.hash != b.hash || a.events != b.events || a.end != b.end)
		abort();
}

/* Many small blocks: the sanitizer need not keep so many of the freed. */
extern const char *__asan_default_options(void);

const char *
__asan_default_options(void)
{
	return "quarantine_size_mb=16";
}

extern int	LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const char *s = (const char *) data + 2;
	size_t		cap;
	size_t		step;
	Digest		whole;

	if (size < 2 || size > MAX_INPUT)
		return 0;
	cap = data[0] < 128 ? data[0] : 100000;
	step = data[1] % 16 + 1;
	size -= 2;
	whole = parse_reference(s, size, cap);
	for (size_t split = 0; split <= size; split++)
		must_equal(whole, parse_split(s, size, cap, split, size + 1));
	must_equal(whole, parse_split(s, size, cap, 0, step));
	must_equal(whole, parse_split(s, size, cap, 0, 1));
	return 0;
}
