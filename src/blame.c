/*
 * blame.c
 *		Which job a worker was at work on when it crashed.
 *
 * A worker has many streams, and a crash ends them all; only the job that it
 * was at work on at that instant is to blame.  Shared memory does not survive
 * a crash, so each worker has a place in a small file of the server's folder
 * for temporary statistics, mapped into its memory: to note a job costs one
 * store.  The file is a hint: without it nobody is blamed.
 *
 * Owns that file, one for each database.  Places are given away under
 * ChatShared.lock; a place belongs to the worker whose identity stands there.
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "miscadmin.h"
#include "pgstat.h"
#include "storage/fd.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"

#include "blame.h"
#include "shmem.h"

#define PLACES 128

typedef struct Place
{
	int64		identity;		/* 0 = free */
	int64		job;			/* 0 = none */
} Place;

static Place unmapped;
static volatile Place *place = &unmapped;
static int64 jobs[PLACES];
static int	njobs = 0;

/* Frees the place when the process ends in order. */
static void
leave(int code, Datum arg)
{
	place->job = 0;
	place->identity = 0;
}

/* Maps the file of this database; NULL when that is not possible. */
static Place *
map_file(void)
{
	char		path[MAXPGPATH];
	Place		none[PLACES] = {{0}};
	void	   *map = MAP_FAILED;
	int			fd;
	off_t		size;

	snprintf(path, sizeof(path), "%s/chat.%u", PG_STAT_TMP_DIR, MyDatabaseId);
	fd = OpenTransientFile(path, O_RDWR | O_CREAT | PG_BINARY);
	if (fd >= 0)
	{
		size = lseek(fd, 0, SEEK_END);
		/* written, not only extended: a store must find its block */
		if (size == sizeof(none) ||
			pg_pwrite(fd, none, sizeof(none), 0) == sizeof(none))
			map = mmap(NULL, sizeof(none), PROT_READ | PROT_WRITE, MAP_SHARED,
					   fd, 0);
		CloseTransientFile(fd);
	}
	if (map != MAP_FAILED)
		return map;
	ereport(LOG,
			(errcode_for_file_access(),
			 errmsg("could not map file \"%s\": %m", path),
			 errdetail("Jobs that crash a worker cannot be told from others.")));
	return NULL;
}

/* True if a worker lives. */
static bool
is_live(int64 identity, const int64 *live, int nlive)
{
	for (int i = 0; i < nlive; i++)
		if (live[i] == identity)
			return true;
	return false;
}

/* Begins to keep a record; finds what those who died have left. */
void
chat_blame_start(int64 identity)
{
	int64	   *live = palloc(sizeof(int64) * chat_shared->nslots);
	int			nlive = chat_shmem_live(MyDatabaseId, live);
	Place	   *places = map_file();

	if (places == NULL)
		return;
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < PLACES; i++)
	{
		Place	   *p = &places[i];

		if (is_live(p->identity, live, nlive))
			continue;
		if (p->identity != 0 && p->job != 0)
			jobs[njobs++] = p->job;
		p->identity = p->job = 0;
		if (place == &unmapped)
		{
			p->identity = identity;
			place = p;
		}
	}
	LWLockRelease(chat_shared->lock);
	on_proc_exit(leave, (Datum) 0);
}

/* The jobs that dead workers were at work on; returns how many. */
int
chat_blame_jobs(const int64 **list)
{
	*list = jobs;
	return njobs;
}

/* Forgets those jobs: they are counted in the table. */
void
chat_blame_forget(void)
{
	njobs = 0;
}

/* Says what this worker is at work on, 0 = nothing that can be named. */
void
chat_blame_on(int64 job)
{
	place->job = job;
}
