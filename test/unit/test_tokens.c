/*
 * test_tokens.c
 *	  How far off is the estimate of tokens?
 *
 * Reference counts are in test/tokens: conversations.json, and counts.tsv as
 * count.mjs has written it.  Each conversation is walked through as a session
 * does it: the request before each answer is estimated, corrected by the
 * count of the request before.
 */
#include "tap.h"

#include <math.h>

#include "../../src/tokens.c"

#define MAX_MESSAGES 64
#define MAX_TEXT (1 << 20)

typedef struct Message
{
	char		conversation[32];
	long		counts[2];		/* o200k, cl100k */
	long		bytes;
	int64_t		estimate;
} Message;

static Message messages[MAX_MESSAGES];
static int	nmessages;
static const char *const tokenizers[] = {"o200k", "cl100k"};

/* Reads a file beside the tests. */
static char *
read_file(const char *name)
{
	char		path[256];
	char	   *text = calloc(1, MAX_TEXT);
	FILE	   *f;

	snprintf(path, sizeof(path), "test/tokens/%s", name);
	f = fopen(path, "r");
	if (f == NULL || text == NULL)
	{
		printf("Bail out! cannot read %s\n", path);
		exit(1);
	}
	if (fread(text, 1, MAX_TEXT - 1, f) == 0)
		exit(1);
	fclose(f);
	return text;
}

/* Undoes the escapes of a JSON string in place; returns where it ends. */
static char *
unescape(char *p, size_t *len)
{
	char	   *out = p;
	char	   *start = p;

	for (; *p != '"'; p++)
	{
		if (*p == '\\')
		{
			p++;
			*out++ = *p == 'n' ? '\n' : *p == 't' ? '\t' : *p;
		}
		else
			*out++ = *p;
	}
	*len = (size_t) (out - start);
	return p + 1;
}

/* Reads the counts, then the texts, which come in the same order. */
static void
load(void)
{
	char	   *counts = read_file("counts.tsv");
	char	   *texts = read_file("conversations.json");
	char	   *p = texts;

	for (char *line = strtok(counts, "\n"); line; line = strtok(NULL, "\n"))
	{
		Message    *m = &messages[nmessages++];

		if (sscanf(line, "%31s %*d %ld %ld %ld", m->conversation, &m->bytes,
				   &m->counts[0], &m->counts[1]) != 4)
			exit(1);
	}
	for (int i = 0; i < nmessages; i++)
	{
		char	   *start;
		size_t		len;

		/* the next string that is not the name of a conversation */
		for (;;)
		{
			start = strchr(p, '"') + 1;
			p = unescape(start, &len);
			if (*p != ':')
				break;
		}
		messages[i].estimate = chat_tokens_estimate(start, len);
		ok((long) len == messages[i].bytes, "%s, message %d is the one that was counted",
		   messages[i].conversation, i + 1);
	}
}

/* Prints and bounds the error of one conversation with one tokenizer. */
static void
walk(int first, int n, int tokenizer, double uncorrected, double corrected)
{
	const char *name = messages[first].conversation;
	int64_t		estimate = 0;
	long		count = 0;
	int64_t		last_estimate = 0;
	long		last_count = 0;
	double		worst = 0;
	double		raw;

	for (int i = 0; i < n; i++)
	{
		int64_t		told;
		double		error;

		estimate += messages[first + i].estimate;
		count += messages[first + i].counts[tokenizer];
		if (i % 2 == 1)
			continue;
		told = chat_tokens_calibrate(estimate, last_count, last_estimate);
		error = 100.0 * ((double) told - count) / count;
		if (i > 0 && fabs(error) > fabs(worst))
			worst = error;
		last_estimate = estimate;
		last_count = count;
	}
	raw = 100.0 * ((double) estimate - count) / count;
	/* on stderr, which is shown also when all is well */
	fprintf(stderr, "# %-8s %-7s %5ld tokens: alone %+6.1f %%, in the session at most %+6.1f %%\n",
		   name, tokenizers[tokenizer], count, raw, worst);
	ok(fabs(raw) <= uncorrected, "%s, %s: the estimate alone is within %.0f %%",
	   name, tokenizers[tokenizer], uncorrected);
	ok(fabs(worst) <= corrected, "%s, %s: in the session it is within %.0f %%",
	   name, tokenizers[tokenizer], corrected);
}

/* Walks through all conversations. */
static void
test_errors(void)
{
	for (int first = 0, n; first < nmessages; first += n)
	{
		bool		latin = strcmp(messages[first].conversation, "chinese") &&
			strcmp(messages[first].conversation, "russian");

		for (n = 1; first + n < nmessages &&
			 strcmp(messages[first + n].conversation,
					messages[first].conversation) == 0;)
			n++;
		for (int t = 0; t < 2; t++)
			walk(first, n, t, latin ? 30 : 60, 20);
	}
}

/* Tests edges: nothing, broken UTF-8, long runs, odd calibrations. */
static void
test_edges(void)
{
	char		zeros[1000];

	ok(chat_tokens_estimate("", 0) == 0, "nothing is nothing");
	ok(chat_tokens_estimate("\xF0\x9F", 2) > 0, "half a character is read to the end only");
	ok(chat_tokens_estimate("\xFF\xFE\x80", 3) > 0, "what is no UTF-8 has a size, too");
	memset(zeros, '0', sizeof(zeros));
	ok(chat_tokens_estimate(zeros, sizeof(zeros)) == 334, "digits go by three");
	ok(chat_tokens_estimate("HTTPServerName", 14) == 3, "words within a word");
	ok(chat_tokens_calibrate(100, 0, 0) == 100, "without a count the estimate stays");
	ok(chat_tokens_calibrate(100, 50, 100) == 50, "the same request has the same count");
	ok(chat_tokens_calibrate(150, 50, 100) == 75, "what came since has the session's error");
	ok(chat_tokens_calibrate(50, 50, 100) == 25, "what was taken away, too");
	ok(chat_tokens_calibrate(200, 1000, 100) == 1300, "an odd ratio holds for what was counted alone");
}

int
main(void)
{
	load();
	test_errors();
	test_edges();
	return done_testing();
}
