/*
 * debug.c
 *		Failures on demand, for tests of what nothing else brings about.
 *
 * Owns the setting chat.debug_fail, which no listing shows and only who
 * configures the server can set:
 *
 *	crash:TEXT		a worker crashes when it takes a chunk that holds TEXT
 *	request:TEXT	it crashes when it has built a request that holds TEXT
 *	settle:TEXT		there is no memory for the message of an answer with TEXT
 *	notify_full		NOTIFY fails as it does when its queue is full
 */
#include "postgres.h"

#include "utils/guc.h"

#include "debug.h"

char	   *chat_debug_fail = "";

/* Declares the setting. */
void
chat_debug_init(void)
{
	DefineCustomStringVariable("chat.debug_fail",
							   "What shall fail, for tests.",
							   NULL, &chat_debug_fail, "", PGC_SIGHUP,
							   GUC_NO_SHOW_ALL | GUC_NOT_IN_SAMPLE,
							   NULL, NULL, NULL);
}

/* True if the setting is "what:text" and data holds the text. */
static bool
is_asked(const char *what, const char *data, size_t len)
{
	size_t		skip = strlen(what);
	const char *text = chat_debug_fail + skip + 1;
	size_t		size;

	if (chat_debug_fail[0] == '\0' ||
		strncmp(chat_debug_fail, what, skip) != 0 || text[-1] != ':')
		return false;
	size = strlen(text);
	for (size_t i = 0; size > 0 && i + size <= len; i++)
		if (memcmp(data + i, text, size) == 0)
			return true;
	return false;
}

/* Crashes the process if the setting says so. */
void
chat_debug_crash(const char *what, const char *data, size_t len)
{
	if (is_asked(what, data, len))
		abort();
}

/* Raises that there is no memory if the setting says so. */
void
chat_debug_memory(const char *what, const char *data, size_t len)
{
	if (is_asked(what, data, len))
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory"),
				 errdetail("Failed as chat.debug_fail asks.")));
}

/* Raises the error of a full notification queue if the setting asks for it. */
void
chat_debug_notify(void)
{
	if (strcmp(chat_debug_fail, "notify_full") == 0)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("too many notifications in the NOTIFY queue")));
}
