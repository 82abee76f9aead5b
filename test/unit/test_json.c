/*
 * test_json.c
 *	  Unit test of src/json.c.  --bench measures.
 */
#include "json.c"
#include "tap.h"

#define FFFD "\xEF\xBF\xBD"

/* Checks one JSON text: what becomes of it, and that it is clean then. */
static void
clean(const char *name, const char *in, size_t len, const char *want)
{
	char	   *copy = exact_copy(in, len);
	char	   *out;
	size_t		need = 0;
	size_t		got;
	bool		dirty = strlen(want) != len || memcmp(in, want, len) != 0;

	ok(chat_json_check(copy, len, &need) ==
	   (dirty ? CHAT_JSON_DIRTY : CHAT_JSON_AS_IS), "%s: judged", name);
	out = malloc(need + 1);
	got = chat_json_clean(copy, len, out);
	ok(got == need, "%s: size", name);
	is_text(out, got, want, name);
	ok(chat_json_check(out, got, &need) == CHAT_JSON_AS_IS,
	   "%s: clean the second time", name);
	free(out);
	free(copy);
}

#define CLEAN(name, in, want) clean(name, in, sizeof(in) - 1, want)
#define SAME(name, in) clean(name, in, sizeof(in) - 1, in)

static void
test_clean(void)
{
	SAME("plain", "{\"a\":[1,true,null,\"text \\\" \\\\ \\n \\u00e9 /\"]}");
	SAME("nothing", "");
	SAME("UTF-8", "{\"a\":\"\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80\xEF\xBF\xBD\"}");
	SAME("edges of UTF-8", "\"\xC2\x80\xDF\xBF\xE0\xA0\x80\xED\x9F\xBF"
		 "\xEE\x80\x80\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF\"");
	SAME("surrogate pair", "\"\\ud83d\\ude00\\uD83D\\uDE00\"");
	SAME("escaped backslash before u", "\"\\\\u0000 \\\\\\\\ud800\"");
	SAME("white space outside strings", "\t{\r\n\"a\" : 1 }\n");
	SAME("not JSON, but harmless", "]}{[ \"\\x \\u12 \\uzzzz");

	CLEAN("escaped NUL", "\"a\\u0000b\"", "\"a\\ufffdb\"");
	CLEAN("raw NUL in a string", "\"a\0b\"", "\"a" FFFD "b\"");
	CLEAN("raw NUL outside", "{\0}", "{" FFFD "}");
	CLEAN("raw controls in a string", "\"a\nb\tc\x01\x1f\"",
		  "\"a\\u000ab\\u0009c\\u0001\\u001f\"");
	CLEAN("lone high surrogate", "\"\\ud83d\"", "\"\\ufffd\"");
	CLEAN("lone low surrogate", "\"\\ude00x\"", "\"\\ufffdx\"");
	CLEAN("inverted pair", "\"\\ude00\\ud83d\"", "\"\\ufffd\\ufffd\"");
	CLEAN("high, high, low", "\"\\ud83d\\ud83d\\ude00\"",
		  "\"\\ufffd\\ud83d\\ude00\"");
	CLEAN("high and something else", "\"\\ud83d\\n\\ud83d\\u0041\"",
		  "\"\\ufffd\\n\\ufffd\\u0041\"");
	CLEAN("high and NUL", "\"\\ud83d\\u0000\"", "\"\\ufffd\\ufffd\"");
	CLEAN("high at the end", "\"\\ud83d\\ude0", "\"\\ufffd\\ude0");
	CLEAN("control after a backslash", "\"\\\n\"", "\"\\\\u000a\"");
	CLEAN("NUL after a backslash", "\"\\\0\"", "\"\\" FFFD "\"");

	CLEAN("stray continuation", "\"\x80\xBF\"", "\"" FFFD FFFD "\"");
	CLEAN("cut character", "\"\xE4\xB8\"", "\"" FFFD "\"");
	CLEAN("cut at the end of all", "\"\xF0\x9F\x98", "\"" FFFD);
	CLEAN("overlong", "\"\xC0\x80\xE0\x80\x80\xF0\x80\x80\x80\"",
		  "\"" FFFD FFFD FFFD FFFD FFFD FFFD FFFD FFFD FFFD "\"");
	CLEAN("surrogates as UTF-8", "\"\xED\xA0\x80\"", "\"" FFFD FFFD FFFD "\"");
	CLEAN("beyond U+10FFFF", "\"\xF4\x90\x80\x80\xF5\xFF\"",
		  "\"" FFFD FFFD FFFD FFFD FFFD FFFD "\"");
	CLEAN("cut by a quote", "{\"a\":\"\xC3\",\"b\":1}",
		  "{\"a\":\"" FFFD "\",\"b\":1}");
	CLEAN("bytes outside strings", "{\xFF}", "{" FFFD "}");
	CLEAN("dirt at each place of a word", "\"0123456\n8\n01\n3456789\"",
		  "\"0123456\\u000a8\\u000a01\\u000a3456789\"");
}

static void
test_depth(void)
{
	char		deep[400] = {0};
	size_t		need = 0;

	memset(deep, '[', 64);
	memset(deep + 64, ']', 64);
	ok(chat_json_check(deep, 128, &need) == CHAT_JSON_AS_IS, "64 deep");
	memset(deep, '{', 65);
	ok(chat_json_check(deep, 65, &need) == CHAT_JSON_TOO_DEEP, "65 deep");
	for (int i = 0; i < 200; i++)
		memcpy(deep + 2 * i, "[]", 2);
	ok(chat_json_check(deep, 400, &need) == CHAT_JSON_AS_IS,
	   "many beside each other");
	memset(deep, ']', 100);
	memset(deep + 100, '[', 65);
	ok(chat_json_check(deep, 165, &need) == CHAT_JSON_TOO_DEEP,
	   "ends without a start give no credit");
	memset(deep, '[', 200);
	deep[0] = '"';
	ok(chat_json_check(deep, 200, &need) == CHAT_JSON_AS_IS,
	   "brackets in a string do not count");
}

static void
test_exponents(void)
{
	static char numbers[200000];
	size_t		len;
	size_t		need;

	len = (size_t) sprintf(numbers, "[1e99999,1]");
	ok(chat_json_check(numbers, len, &need) == CHAT_JSON_AS_IS,
	   "a long number");
	len = (size_t) sprintf(numbers, "[1e99999,2E-99]");
	ok(chat_json_check(numbers, len, &need) == CHAT_JSON_TOO_DEEP,
	   "numbers that are too long together");
	len = (size_t) sprintf(numbers, "[1e99999999999999999999]");
	ok(chat_json_check(numbers, len, &need) == CHAT_JSON_TOO_DEEP,
	   "one that is too long alone");
	len = (size_t) sprintf(numbers, "\"1e99999 1e99999\"");
	ok(chat_json_check(numbers, len, &need) == CHAT_JSON_AS_IS,
	   "in a string it is none");
	/* many log probabilities: they are short for what they take */
	len = 0;
	for (int i = 0; i < 20000; i++)
		len += (size_t) sprintf(numbers + len, "-1.2e-15,");
	ok(chat_json_check(numbers, len, &need) == CHAT_JSON_AS_IS,
	   "many that are short");
}

static void
text(const char *name, const char *in, size_t len, const char *want)
{
	size_t		need = 0;
	char	   *copy = exact_copy(in, len);
	bool		clean = chat_utf8_check(copy, len, &need);
	char	   *out = malloc(need + 1);

	ok(clean == (strlen(want) == len && memcmp(in, want, len) == 0),
	   "%s: judged", name);
	ok(chat_utf8_clean(copy, len, out) == need, "%s: size", name);
	is_text(out, need, want, name);
	free(out);
	free(copy);
}

#define TEXT(name, in, want) text(name, in, sizeof(in) - 1, want)

static void
test_text(void)
{
	TEXT("text", "a\n\"\\\x7f\xC3\xA9", "a\n\"\\\x7f\xC3\xA9");
	TEXT("text with NUL", "a\0b", "a" FFFD "b");
	TEXT("text cut in a character", "ab\xE4\xB8", "ab" FFFD);
	TEXT("three bytes become three", "\xF0\x9F\x98", FFFD);
}

static void
test_escape(void)
{
	static const char in[] = "a\"b\\c/\n\r\t\b\f\x01\x1f\x7f\xC3\xA9\xF0\x9F\x98\x80";
	static const char want[] = "a\\\"b\\\\c/\\n\\r\\t\\b\\f\\u0001\\u001f\x7f"
		"\xC3\xA9\xF0\x9F\x98\x80";
	static const char escapes[] = "\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\u00e9"
		"\\u4e2d\\ud83d\\ude00 end";
	static const char plain[] = "\"\\/\b\f\n\r\tA\xC3\xA9\xE4\xB8\xAD"
		"\xF0\x9F\x98\x80 end";
	char		out[200];
	char		all[128];
	char		back[128 * 6];
	size_t		n;

	n = chat_json_escape(in, sizeof(in) - 1, NULL);
	ok(n == sizeof(want) - 1, "size of an escaped text");
	n = chat_json_escape(in, sizeof(in) - 1, out);
	is_text(out, n, want, "escaped text");
	n = chat_json_unescape(escapes, sizeof(escapes) - 1, out);
	is_text(out, n, plain, "unescaped text");
	memcpy(out, escapes, sizeof(escapes));
	n = chat_json_unescape(out, sizeof(escapes) - 1, out);
	is_text(out, n, plain, "unescaped in place");
	ok(chat_json_unescape("a\\", 2, out) == 2, "backslash at the end");
	ok(chat_json_escape("", 0, out) == 0, "empty text");

	for (int i = 0; i < 128; i++)
		all[i] = (char) i;
	n = chat_json_escape(all, 128, back);
	n = chat_json_unescape(back, n, back);
	ok(n == 128 && memcmp(all, back, 128) == 0, "all of ASCII and back");
}

/* Measures the check of one text. */
static void
bench_check(const char *what, const char *s)
{
	size_t		len = strlen(s);
	size_t		need = 0;
	size_t		sum = 0;
	double		start = seconds();

	for (int i = 0; i < 5000000; i++)
		sum += chat_json_check(s, len, &need) + need;
	printf("%-28s %.4f us (%zu bytes)%s\n", what,
		   (seconds() - start) / 5.0, len, sum == 1 ? "!" : "");
}

static int
bench(void)
{
	bench_check("delta chunk",
				"{\"id\":\"chatcmpl-1234567890\",\"object\":\"chat.completion."
				"chunk\",\"created\":1700000000,\"model\":\"gpt-4o-mini\","
				"\"choices\":[{\"index\":0,\"delta\":{\"content\":\" hello\"},"
				"\"finish_reason\":null}],\"usage\":null}");
	bench_check("Chinese delta",
				"{\"choices\":[{\"delta\":{\"content\":\""
				"\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD"
				"\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD\xE4\xB8\xAD"
				"\"}}]}");
	return 0;
}

int
main(int argc, char **argv)
{
	if (argc > 1 && strcmp(argv[1], "--bench") == 0)
		return bench();
	test_clean();
	test_depth();
	test_exponents();
	test_text();
	test_escape();
	return done_testing();
}
