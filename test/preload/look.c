/*
 * look.c
 *		A process that a test can hold while it looks what has come.
 *
 * Preloaded (LD_PRELOAD) into the processes of one server: when the file
 * "pid" in the directory named by CHAT_TEST_LOOK holds the number of a
 * process, that one, when it asks for sockets that are ready without waiting
 * for any, renames the file to "held" and goes on when that is gone, too.
 * The worker blocks signals there: nobody must wait for it to serve one.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

/* True if the file asks to hold this process. */
static int
is_wanted(const char *file)
{
	FILE	   *in = fopen(file, "r");
	long		wanted = 0;

	if (in == NULL)
		return 0;
	if (fscanf(in, "%ld", &wanted) != 1)
		wanted = 0;
	fclose(in);
	return wanted == (long) getpid();
}

/* The C library's function, by its name. */
int
epoll_wait(int epfd, struct epoll_event *events, int most, int timeout)
{
	const char *dir = timeout == 0 ? getenv("CHAT_TEST_LOOK") : NULL;
	char		file[1024];
	char		held[1024];

	if (dir != NULL)
	{
		snprintf(file, sizeof(file), "%s/pid", dir);
		snprintf(held, sizeof(held), "%s/held", dir);
		if (is_wanted(file) && rename(file, held) == 0)
			while (access(held, F_OK) == 0)
				usleep(1000);
	}
	return (int) syscall(SYS_epoll_pwait, epfd, events, most, timeout, NULL,
						 _NSIG / 8);
}
