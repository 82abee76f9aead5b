/*
 * clock.c
 *		A clock that a test can set, for the processes of one server.
 *
 * Preloaded (LD_PRELOAD), it adds to the time of day the seconds that stand,
 * as text, at the start of the file named by CHAT_TEST_CLOCK.  The file is
 * mapped once, so that whoever writes to it sets the clock of all processes
 * at once.  CLOCK_MONOTONIC stays as it is, as when a real clock is set.
 *
 * (libfaketime is no help with PostgreSQL 15, whose postmaster forks within
 * signal handlers: the children find its guard against recursion set and keep
 * the true time.)
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SIZE 32

static const char *file = "";

/* Maps the file; without one the time is true. */
static void __attribute__((constructor))
map_file(void)
{
	const char *name = getenv("CHAT_TEST_CLOCK");
	int			fd = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
	void	   *map;

	if (fd < 0)
		return;
	map = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0);
	if (map != MAP_FAILED)
		file = map;
	close(fd);
}

int
clock_gettime(clockid_t clock, struct timespec *t)
{
	int			rc = (int) syscall(SYS_clock_gettime, clock, t);

	if (rc == 0 && clock == CLOCK_REALTIME)
		t->tv_sec += atol(file);
	return rc;
}

int
gettimeofday(struct timeval *restrict t, void *restrict zone)
{
	struct timespec now;

	(void) zone;
	if (clock_gettime(CLOCK_REALTIME, &now) != 0)
		return -1;
	t->tv_sec = now.tv_sec;
	t->tv_usec = now.tv_nsec / 1000;
	return 0;
}

time_t
time(time_t *t)
{
	struct timespec now;

	if (clock_gettime(CLOCK_REALTIME, &now) != 0)
		return (time_t) -1;
	if (t)
		*t = now.tv_sec;
	return now.tv_sec;
}
