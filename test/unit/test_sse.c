/*
 * test_sse.c
 *	  Unit test of src/sse.c.  Each stream is fed whole, split at every point
 *	  and byte by byte; the events must be the same.  --bench measures.
 */
#include "sse.c"
#include "tap.h"

/* A record of what a parser said: name|data<LF> per event. */
typedef struct Log
{
	char		text[8192];
	size_t		len;
} Log;

static void
note(Log *log, const char *s, size_t n)
{
	if (log->len + n >= sizeof(log->text))
		abort();
	memcpy(log->text + log->len, s, n);
	log->len += n;
	log->text[log->len] = '\0';
}

static void
note_event(Log *log, const ChatSseEvent *ev)
{
	note(log, ev->name, ev->name_len);
	note(log, "|", 1);
	note(log, ev->data, ev->len);
	note(log, "\n", 1);
}

/* Feeds one range; false when the parser has failed. */
static bool
feed(ChatSse *sse, Log *log, const char *s, size_t n)
{
	char	   *copy = exact_copy(s, n);
	const char *p = copy;
	ChatSseEvent ev;
	ChatSseResult result;

	while ((result = chat_sse_next(sse, &p, copy + n, &ev)) == CHAT_SSE_EVENT)
		note_event(log, &ev);
	if (p != copy + n)
		note(log, "not all eaten\n", 14);
	free(copy);
	if (result == CHAT_SSE_TOO_LONG)
		note(log, "too long\n", 9);
	return result == CHAT_SSE_MORE;
}

static void
finish(ChatSse *sse, Log *log)
{
	ChatSseEvent ev;

	if (chat_sse_finish(sse, &ev) == CHAT_SSE_EVENT)
	{
		note(log, "cut:", 4);
		note_event(log, &ev);
	}
	chat_sse_free(sse);
}

/* Checks a stream in all splits. */
static void
check(const char *name, const char *stream, size_t len, size_t max_event,
	  const char *want)
{
	static Log	log;
	ChatSse		sse;
	size_t		bad = 0;

	for (size_t split = 0; split <= len + 1; split++)
	{
		log.len = 0;
		log.text[0] = '\0';
		chat_sse_init(&sse, max_event);
		if (split <= len)
		{
			if (feed(&sse, &log, stream, split) &&
				feed(&sse, &log, stream + split, len - split))
				finish(&sse, &log);
		}
		else
		{
			size_t		i = 0;

			while (i < len && feed(&sse, &log, stream + i, 1))
				i++;
			if (i == len)
				finish(&sse, &log);
		}
		chat_sse_free(&sse);
		if (strcmp(log.text, want) != 0 && bad++ == 0)
		{
			printf("# split at %zu of %zu\n", split, len);
			diag("got     ", log.text, log.len);
			diag("expected", want, strlen(want));
		}
	}
	ok(bad == 0, "%s", name);
}

#define CHECK_CAP(name, max_event, stream, want) \
	check(name, stream, sizeof(stream) - 1, max_event, want)
#define CHECK(name, stream, want) CHECK_CAP(name, 1000, stream, want)

static void
test_lines(void)
{
	CHECK("LF", "data: a\n\ndata: b\n\n", "|a\n|b\n");
	CHECK("CRLF", "data: a\r\n\r\ndata: b\r\n\r\n", "|a\n|b\n");
	CHECK("CRLF is one end", "data: a\r\ndata: b\r\nevent: e\r\n\r\n",
		  "e|a\nb\n");
	CHECK("CR", "data: a\r\rdata: b\r\r", "|a\n|b\n");
	CHECK("mixed ends", "data: a\r\n\ndata: b\n\rdata: c\r\r\n", "|a\n|b\n|c\n");
	CHECK("several data lines", "data: a\ndata: b\ndata:\ndata: c\n\n",
		  "|a\nb\n\nc\n");
	CHECK("one leading space", "data:a\n\ndata: a\n\ndata:  a\n\ndata:\ta\n\n",
		  "|a\n|a\n| a\n|\ta\n");
	CHECK("data without colon", "data\n\ndata\ndata\n\n", "|\n|\n\n");
	CHECK("data with nothing", "data:\n\ndata: \n\n", "|\n|\n");
	CHECK("blank lines alone", "\n\n\r\n\r\rdata: a\n\n\n\n", "|a\n");
	CHECK("high bytes pass", "data: a\xC3\xA9\xFF\n\n", "|a\xC3\xA9\xFF\n");
	CHECK("nothing", "", "");
}

static void
test_fields(void)
{
	CHECK("comments", ": hi\n:\ndata: a\n: keep-alive\n\n:\n\n", "|a\n");
	CHECK("OpenRouter's comment", ": OPENROUTER PROCESSING\n\ndata: a\n\n",
		  "|a\n");
	CHECK("id and retry", "id: 1\nretry: 10\ndata: a\nid\n\n", "|a\n");
	CHECK("fields like ours", "dataa: x\ndat: y\nDATA: z\n data: w\n"
		  "events: v\ndata : u\n\n", "");
	CHECK("event names", "event: error\ndata: a\n\ndata: b\n\n",
		  "error|a\n|b\n");
	CHECK("last event name counts", "event: one\nevent:two\ndata: a\n\n",
		  "two|a\n");
	CHECK("event without colon", "event: one\nevent\ndata: a\n\n", "|a\n");
	CHECK("event without data", "event: ping\n\ndata: a\n\n", "|a\n");
	CHECK("name after data", "data: a\nevent: late\n\n", "late|a\n");
	CHECK("long name is cut",
		  "event: a-name-that-is-longer-than-we-keep\ndata: a\n\n",
		  "a-name-that-is-longer-th|a\n");
}

static void
test_ends(void)
{
	CHECK("byte order mark", "\xEF\xBB\xBF" "data: a\n\n", "|a\n");
	CHECK("only the first mark", "\xEF\xBB\xBF\xEF\xBB\xBF" "data: a\n\n"
		  "data: b\n\n", "|b\n");
	CHECK("half a mark", "\xEF\xBB" "data: a\n\ndata: b\n\n", "|b\n");
	CHECK("a mark later", "data: a\n\n\xEF\xBB\xBF" "data: b\n\n", "|a\n");
	CHECK("cut before the blank line", "data: a\n\ndata: b\n", "|a\ncut:|b\n");
	CHECK("cut in the line", "data: a\n\ndata: [DONE]", "|a\ncut:|[DONE]\n");
	CHECK("cut in the field", "data: a\n\ndata", "|a\ncut:|\n");
	CHECK("cut in a mark", "\xEF\xBB", "");
	CHECK("cut in another field", "data: a\nid: 1", "cut:|a\n");
	CHECK("cut after CR", "data: a\r\n\r", "|a\n");
}

static void
test_caps(void)
{
	ChatSse		sse;
	Log			log = {.len = 0};
	char		big[10000];
	ChatSseEvent ev;
	const char *p;

	CHECK_CAP("data at the cap", 5, "data: 12345\n\ndata: 123\ndata: 4\n\n",
			  "|12345\n|123\n4\n");
	CHECK_CAP("data over the cap", 5, "data: 12345\n\ndata: 123456\n\n",
			  "|12345\ntoo long\n");
	CHECK_CAP("lines over the cap", 5, "data: 123\ndata: 45\n\n",
			  "too long\n");
	CHECK_CAP("LF alone over the cap", 5, "data: 12345\ndata\n\n",
			  "too long\n");
	CHECK_CAP("long comments are free", 5, ": 123456789\nunknown: 123456789\n"
			  "event: 1234567\ndata: 1\n\n", "1234567|1\n");

	memset(big, 'x', sizeof(big));
	chat_sse_init(&sse, sizeof(big));
	feed(&sse, &log, "data: ", 6);
	p = big;
	chat_sse_next(&sse, &p, big + sizeof(big), &ev);
	p = "\n\n";
	ok(chat_sse_next(&sse, &p, p + 2, &ev) == CHAT_SSE_EVENT &&
	   ev.len == sizeof(big), "a large event");
	p = "data";
	ok(chat_sse_next(&sse, &p, p + 4, &ev) == CHAT_SSE_MORE &&
	   sse.buf == NULL, "a large buffer is given back");
	chat_sse_free(&sse);
	ok(sizeof(ChatSse) < 100, "an idle parser takes %zu bytes",
	   sizeof(ChatSse));
}

static void
test_in_place(void)
{
	static const char stream[] = ": c\nevent: e\ndata: hello\nid: 1\n\n";
	const char *p = stream;
	ChatSse		sse;
	ChatSseEvent ev;

	chat_sse_init(&sse, 100);
	ok(chat_sse_next(&sse, &p, stream + sizeof(stream) - 1, &ev) ==
	   CHAT_SSE_EVENT && ev.data == strstr(stream, "hello") &&
	   sse.buf == NULL, "a whole event is not copied");
	chat_sse_free(&sse);

	chat_sse_init(&sse, 3);
	p = "data: 1234";
	chat_sse_next(&sse, &p, p + 10, &ev);
	p = "\n\ndata: 1\n\n";
	ok(chat_sse_next(&sse, &p, p + 11, &ev) == CHAT_SSE_TOO_LONG,
	   "a failure is final");
	ok(chat_sse_finish(&sse, &ev) == CHAT_SSE_TOO_LONG, "also at the end");
	chat_sse_free(&sse);
	chat_sse_free(&sse);
}

/* Measures one way to feed. */
static void
bench_feed(const char *what, const char *stream, size_t len, size_t step)
{
	size_t		events = 0;
	double		start = seconds();
	double		used;

	for (int round = 0; round < 200; round++)
	{
		ChatSse		sse;
		ChatSseEvent ev;

		chat_sse_init(&sse, 1 << 20);
		for (size_t i = 0; i < len; i += step)
		{
			const char *p = stream + i;
			const char *end = stream + (i + step < len ? i + step : len);

			while (chat_sse_next(&sse, &p, end, &ev) == CHAT_SSE_EVENT)
				events++;
		}
		chat_sse_free(&sse);
	}
	used = seconds() - start;
	printf("%-28s %.4f us/event, %.0f MB/s\n", what, used * 1e6 / events,
		   200.0 * len / used / 1e6);
}

static int
bench(void)
{
	enum
	{
		EVENTS = 5000, SIZE = 200
	};
	char	   *stream = malloc(EVENTS * SIZE);

	for (int i = 0; i < EVENTS; i++)
	{
		char	   *s = stream + i * SIZE;

		memset(s, 'x', SIZE);
		memcpy(s, "data: ", 6);
		memcpy(s + SIZE - 2, "\n\n", 2);
	}
	bench_feed("200 bytes, feeds of 16 kB", stream, EVENTS * SIZE, 16384);
	bench_feed("200 bytes, one per feed", stream, EVENTS * SIZE, SIZE);
	bench_feed("200 bytes, feeds of 77", stream, EVENTS * SIZE, 77);
	memset(stream, '\r', EVENTS * SIZE);
	memcpy(stream, "data: x", 7);
	bench_feed("nothing but CR", stream, EVENTS * SIZE, 16384);
	free(stream);
	return 0;
}

int
main(int argc, char **argv)
{
	if (argc > 1 && strcmp(argv[1], "--bench") == 0)
		return bench();
	test_lines();
	test_fields();
	test_ends();
	test_caps();
	test_in_place();
	return done_testing();
}
