/*
 * resolver.c
 *		A resolver that a test can hold, for the processes of one server.
 *
 * Preloaded (LD_PRELOAD), it answers a name that ends with ".invalid" only
 * when the file named by CHAT_TEST_RESOLVER exists, and then with "no such
 * name".  All other names are the C library's.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int (*Resolve) (const char *, const char *, const struct addrinfo *,
						struct addrinfo **);

/* True if a text ends with another one. */
static int
ends_with(const char *text, const char *end)
{
	size_t		n = strlen(text);
	size_t		m = strlen(end);

	return n >= m && strcmp(text + n - m, end) == 0;
}

/* The C library's function, by its name. */
int
getaddrinfo(const char *node, const char *service,
			const struct addrinfo *hints, struct addrinfo **result)
{
	const char *file = getenv("CHAT_TEST_RESOLVER");
	Resolve		real;

	if (file && node && ends_with(node, ".invalid"))
	{
		while (access(file, F_OK) != 0)
			usleep(10000);
		return EAI_NONAME;
	}
	*(void **) &real = dlsym(RTLD_NEXT, "getaddrinfo");
	return real(node, service, hints, result);
}
