/*
 * latch.c
 *		A process that a test can hold right after it has woken another one.
 *
 * Preloaded (LD_PRELOAD) into the processes of one server: when the file
 * "pid" in the directory named by CHAT_TEST_LATCH holds the number of a
 * process, whoever else wakes that one (a latch is set by SIGURG) renames the
 * file to "held" and goes on when that is gone, too.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/* True if the file asks to hold whoever wakes this process. */
static int
is_wanted(const char *file, pid_t pid)
{
	FILE	   *in = fopen(file, "r");
	long		wanted = 0;

	if (in == NULL)
		return 0;
	if (fscanf(in, "%ld", &wanted) != 1)
		wanted = 0;
	fclose(in);
	return wanted == (long) pid;
}

/* The C library's function, by its name. */
int
kill(pid_t pid, int sig)
{
	int			rc = (int) syscall(SYS_kill, pid, sig);
	const char *dir = getenv("CHAT_TEST_LATCH");
	char		file[1024];
	char		held[1024];

	if (rc != 0 || sig != SIGURG || pid == getpid() || dir == NULL)
		return rc;
	snprintf(file, sizeof(file), "%s/pid", dir);
	snprintf(held, sizeof(held), "%s/held", dir);
	if (is_wanted(file, pid) && rename(file, held) == 0)
		while (access(held, F_OK) == 0)
			usleep(1000);
	return rc;
}
