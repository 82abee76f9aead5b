/*
 * tap.h
 *	  What a unit test needs to print TAP.  Each test is a program of one
 *	  file that includes the source under test.
 */
#ifndef CHAT_TAP_H
#define CHAT_TAP_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int	tap_run;
static int	tap_failed;

/* Reports one assertion. */
__attribute__((format(printf, 2, 3)))
static inline bool
ok(bool passed, const char *name, ...)
{
	va_list		args;

	tap_run++;
	if (!passed)
		tap_failed++;
	printf("%s %d - ", passed ? "ok" : "not ok", tap_run);
	va_start(args, name);
	vprintf(name, args);
	va_end(args);
	putchar('\n');
	return passed;
}

/* Prints a text as a diagnosis, control characters escaped. */
static inline void
diag(const char *label, const char *s, size_t len)
{
	printf("# %s: ", label);
	for (size_t i = 0; i < len; i++)
	{
		unsigned char c = (unsigned char) s[i];

		if (c < 0x20 || c >= 0x7F)
			printf("\\x%02x", c);
		else
			putchar(c);
	}
	putchar('\n');
}

/* Reports whether a text is the expected one; shows both when it is not. */
static inline bool
is_text(const char *got, size_t len, const char *want, const char *name)
{
	bool		same = got != NULL && len == strlen(want) &&
		memcmp(got, want, len) == 0;

	ok(same, "%s", name);
	if (!same)
	{
		diag("got     ", got ? got : "(absent)", got ? len : 8);
		diag("expected", want, strlen(want));
	}
	return same;
}

/* Ends the program: the plan, and how it went. */
static inline int
done_testing(void)
{
	printf("1..%d\n", tap_run);
	return tap_failed == 0 && tap_run > 0 ? 0 : 1;
}

/* Seconds on a clock that only goes forward. */
static inline double
seconds(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double) ts.tv_sec + (double) ts.tv_nsec / 1e9;
}

/* A copy that ends where its allocation ends, so that over-reads show. */
static inline char *
exact_copy(const char *s, size_t len)
{
	char	   *copy = malloc(len ? len : 1);

	if (copy == NULL)
		abort();
	if (len > 0)
		memcpy(copy, s, len);
	return copy;
}

#endif							/* CHAT_TAP_H */
