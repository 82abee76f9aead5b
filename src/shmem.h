/*
 * shmem.h
 *		What the processes of chat share: worker slots, the bell, and waiting
 *		for the progress of a task.
 */
#ifndef CHAT_SHMEM_H
#define CHAT_SHMEM_H

#include "postgres.h"

#include "port/atomics.h"
#include "storage/lwlock.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

typedef enum ChatSlotState
{
	CHAT_SLOT_FREE,				/* the launcher may use it */
	CHAT_SLOT_STARTING,			/* a worker was registered, not yet there */
	CHAT_SLOT_RUNNING,
	CHAT_SLOT_EXITED			/* the launcher has not yet seen it */
} ChatSlotState;

typedef enum ChatSlotKind
{
	CHAT_SLOT_WORKER,			/* streaming worker, the launcher's */
	CHAT_SLOT_TOOL				/* tool worker, the streaming worker's */
} ChatSlotKind;

/* How a worker ended, for the launcher. */
typedef enum ChatSlotExit
{
	CHAT_EXIT_ERROR,			/* start again, with a growing delay */
	CHAT_EXIT_STOPPED,			/* was asked to: start again soon */
	CHAT_EXIT_ABSENT			/* the database has no extension */
} ChatSlotExit;

/* What a worker counts; only itself writes. */
typedef struct ChatCounters
{
	pg_atomic_uint64 open_streams;
	pg_atomic_uint64 limit;		/* streams that may be open */
	pg_atomic_uint64 started;	/* requests sent */
	pg_atomic_uint64 completed;
	pg_atomic_uint64 failed;
	pg_atomic_uint64 cancelled;
	pg_atomic_uint64 retried;
	pg_atomic_uint64 events;	/* rows written */
	pg_atomic_uint64 flushes;
	pg_atomic_uint64 unnotified;	/* events stored without a NOTIFY */
	pg_atomic_uint64 bytes;		/* received from endpoints */
} ChatCounters;

/* the longest progress report of a running tool */
#define CHAT_PROGRESS_SIZE 4096

/* One worker. Fields without an atomic are protected by ChatShared.lock. */
typedef struct ChatSlot
{
	ChatSlotState state;
	ChatSlotKind kind;
	ChatSlotExit exit;
	Oid			database;
	Oid			role;			/* of a tool worker */
	bool		claimed;		/* the tool worker has run something */
	pg_uuid_t	operation;		/* that the tool worker runs now */
	bool		running;		/* operation is valid */
	int			progress_len;	/* 0 = nothing new */
	char		progress[CHAT_PROGRESS_SIZE];
	int			pid;			/* 0 = not there */
	int64		identity;		/* unique among all workers, ever */
	TimestampTz started_at;
	pg_atomic_uint32 proc;		/* its proc number + 1, 0 = none: read by the
								 * commit callback without the lock */
	pg_atomic_uint32 bell_database;	/* database, for the same reader */
	pg_atomic_uint32 rung;		/* the latch alone would not do: whatever waits
								 * within a transaction resets it, too */
	pg_atomic_uint32 paused;	/* the worker knows that it shall rest */
	pg_atomic_uint32 surplus;	/* more than chat.workers: it takes nothing and
								 * ends when it has nothing open */
	pg_atomic_uint32 recheck;	/* jobs were changed or deleted by others */
	pg_atomic_uint32 strays;	/* tasks may have come without a job */
	pg_atomic_uint32 notices;	/* listeners are to be told; see notice.c */
	pg_atomic_uint32 progress_due;	/* a tool has reported progress */
	ChatCounters counters;
} ChatSlot;

/* endpoints that are known at a time, in all databases */
#define CHAT_MAX_ENDPOINTS 128
/* a minute, and the second that is not over */
#define CHAT_RATE_SECONDS 61

/*
 * An endpoint as the workers of its database use it (throttle.c).  Protected
 * by ChatShared.lock; times are in ms, of chat_stream_clock().
 */
typedef struct ChatEndpoint
{
	Oid			database;		/* InvalidOid = free */
	Oid			server;
	NameData	name;
	int64		used_at;
	int			max_concurrency;	/* 0 = any */
	int			max_rate;		/* requests per minute, 0 = any */
	int			reserved;		/* requests that claims have set aside */
	int			open;			/* requests */
	int			unanswered;		/* of them */
	int			burst;			/* most unanswered ones after a 429, 0 = any */
	int			strikes;		/* 429s in a row */
	int64		paused_until;
	int64		second;			/* the newest one of requests_at */
	int			requests_at[CHAT_RATE_SECONDS];
	/* counters */
	int64		requests;
	int64		completed;
	int64		failed;
	int64		cancelled;
	int64		retried;
	int64		rate_limited;
	int64		first_tokens;
	int64		first_token_time;
	int64		first_token_last;
	int64		tokens;
	int64		token_time;
} ChatEndpoint;

#define CHAT_MAX_BLOCKED 64
#define CHAT_MAX_CHANGED 64

typedef struct ChatShared
{
	LWLock		lock[1];		/* an array, to be named as a pointer is */
	pg_atomic_uint32 launcher_proc;	/* proc number + 1, 0 = none */
	bool		rescan;			/* the launcher shall look at all databases */
	int			nchanged;		/* or only at these */
	Oid			changed[CHAT_MAX_CHANGED];
	Oid			blocked[CHAT_MAX_BLOCKED];	/* no worker may be there */
	int			nslots;
	ChatSlot	slots[FLEXIBLE_ARRAY_MEMBER];
} ChatShared;

extern ChatShared *chat_shared; /* NULL without shared_preload_libraries */
extern ChatEndpoint *chat_endpoints;	/* CHAT_MAX_ENDPOINTS of them */
extern ChatSlot *chat_slot;		/* this process's, in a worker */

extern void chat_shmem_init(void);
extern void chat_shmem_require(void);
extern int	chat_shmem_take_slot(ChatSlotKind kind, Oid database, Oid role);
extern void chat_shmem_free_slot(int slot);
extern void chat_shmem_attach(int slot, Oid database);
extern void chat_shmem_set_exit(ChatSlotExit how);
extern int	chat_shmem_live(Oid database, int64 *identities);
extern void chat_shmem_changed(Oid database);
extern void chat_shmem_ring(Oid database, bool recheck);
extern void chat_shmem_set_surplus(ChatSlot *slot, bool surplus);
extern void chat_shmem_ring_progress(Oid database);
extern void chat_shmem_ring_notices(Oid database);
extern void chat_shmem_ring_prepared(void);
extern void chat_shmem_cancel_operation(const pg_uuid_t *operation);
extern void chat_shmem_ring_at_commit(bool recheck);
extern void chat_shmem_strays_at_commit(void);
extern void chat_shmem_notices_at_commit(void);
extern void chat_shmem_check_at_commit(void);
extern uint64 chat_shmem_wait_prepare(const pg_uuid_t *task);
extern void chat_shmem_wait_cancel(const pg_uuid_t *task);
extern int64 chat_shmem_clock(void);
extern bool chat_shmem_wait(const pg_uuid_t *task, uint64 seen, long timeout);
extern void chat_shmem_publish(const pg_uuid_t *task);
extern void chat_shmem_publish_at_commit(const pg_uuid_t *task);

#endif							/* CHAT_SHMEM_H */
