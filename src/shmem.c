/*
 * shmem.c
 *		Shared memory: worker slots, the bell at commit, waiting for a task.
 *
 * Owns ChatShared and the wait buckets behind it.  They hold plain data only
 * (PIDs, OIDs, counters): nothing of a process that has died can be followed.
 *
 * Locks: ChatShared.lock protects the slots and the two OID lists.  Ringing,
 * which must not fail, takes no lock: it reads the atomics of the slots and
 * sets latches by proc number; a latch of the wrong process that is set by
 * accident is a spurious wake-up and no more.
 *
 * The bell rings when the commit has told the others what it changed in the
 * catalogs and has released its locks, not before: a worker that is woken
 * earlier looks at what it remembers, and nobody wakes it again.
 *
 * Waiting: a reader registers in the bucket of its task, looks at the tables,
 * and sleeps until the bucket's generation grows.  The worker looks for
 * readers after each commit; with none, publishing is one atomic read.
 */
#include "postgres.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "storage/condition_variable.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "storage/shmem.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "compat.h"
#include "shmem.h"

#define WAIT_BUCKETS 256

typedef struct WaitBucket
{
	ConditionVariable cv;
	pg_atomic_uint64 generation;
	pg_atomic_uint32 readers;
} WaitBucket;

ChatShared *chat_shared = NULL;
ChatEndpoint *chat_endpoints = NULL;
ChatSlot   *chat_slot = NULL;

static WaitBucket *buckets = NULL;
static shmem_request_hook_type prev_request_hook = NULL;
static shmem_startup_hook_type prev_startup_hook = NULL;

/* what this transaction has to do at its commit */
static bool ring_wanted = false;
static bool recheck_wanted = false;
static bool strays_wanted = false;
static bool notices_wanted = false;
static bool check_wanted = false;
static bool publish_wanted = false;
static bool publish_buckets[WAIT_BUCKETS];
static bool committed = false;	/* it has, and has to do it yet */

/* Returns the size of ChatShared with its slots. */
static Size
shared_size(void)
{
	return MAXALIGN(offsetof(ChatShared, slots) +
					sizeof(ChatSlot) * max_worker_processes);
}

/* Asks for the memory, in the postmaster. */
static void
request_memory(void)
{
	if (prev_request_hook)
		prev_request_hook();
	RequestAddinShmemSpace(shared_size() +
						   MAXALIGN(sizeof(ChatEndpoint) * CHAT_MAX_ENDPOINTS) +
						   MAXALIGN(sizeof(WaitBucket) * WAIT_BUCKETS));
	RequestNamedLWLockTranche("chat", 1);
}

/* Gives a slot its first state. */
static void
init_slot(ChatSlot *slot)
{
	pg_atomic_init_u32(&slot->proc, 0);
	pg_atomic_init_u32(&slot->bell_database, InvalidOid);
	pg_atomic_init_u32(&slot->rung, 0);
	pg_atomic_init_u32(&slot->paused, 0);
	pg_atomic_init_u32(&slot->surplus, 0);
	pg_atomic_init_u32(&slot->recheck, 0);
	pg_atomic_init_u32(&slot->strays, 0);
	pg_atomic_init_u32(&slot->notices, 0);
	pg_atomic_init_u32(&slot->progress_due, 0);
	for (size_t i = 0; i < sizeof(ChatCounters) / sizeof(pg_atomic_uint64); i++)
		pg_atomic_init_u64(&((pg_atomic_uint64 *) &slot->counters)[i], 0);
}

/* Finds or makes the structures. */
static void
startup(void)
{
	bool		found;

	if (prev_startup_hook)
		prev_startup_hook();
	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	chat_shared = ShmemInitStruct("chat", shared_size(), &found);
	if (!found)
	{
		memset(chat_shared, 0, shared_size());
		LWLockInitialize(chat_shared->lock,
						 GetNamedLWLockTranche("chat")->lock.tranche);
		chat_shared->nslots = max_worker_processes;
		chat_shared->rescan = true;
		pg_atomic_init_u32(&chat_shared->launcher_proc, 0);
		for (int i = 0; i < chat_shared->nslots; i++)
			init_slot(&chat_shared->slots[i]);
	}
	chat_endpoints = ShmemInitStruct("chat endpoints",
									 sizeof(ChatEndpoint) * CHAT_MAX_ENDPOINTS,
									 &found);
	if (!found)
		memset(chat_endpoints, 0, sizeof(ChatEndpoint) * CHAT_MAX_ENDPOINTS);
	buckets = ShmemInitStruct("chat waits", sizeof(WaitBucket) * WAIT_BUCKETS,
							  &found);
	for (int i = 0; !found && i < WAIT_BUCKETS; i++)
	{
		ConditionVariableInit(&buckets[i].cv);
		pg_atomic_init_u64(&buckets[i].generation, 0);
		pg_atomic_init_u32(&buckets[i].readers, 0);
	}
	LWLockRelease(AddinShmemInitLock);
}

/* Tells the readers of a bucket, if there are any, that a task has moved. */
static void
publish(WaitBucket *bucket)
{
	pg_memory_barrier();
	if (pg_atomic_read_u32(&bucket->readers) == 0)
		return;
	pg_atomic_fetch_add_u64(&bucket->generation, 1);
	ConditionVariableBroadcast(&bucket->cv);
}

/* Forgets what the transaction has to do at its commit. */
static void
forget(void)
{
	ring_wanted = recheck_wanted = check_wanted = strays_wanted = false;
	notices_wanted = committed = false;
	if (publish_wanted)
		memset(publish_buckets, 0, sizeof(publish_buckets));
	publish_wanted = false;
}

/* Notes how the transaction ends.  In a parallel worker nothing is wanted. */
static void
at_transaction_end(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT)
		committed = true;
	if (event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE)
		forget();
}

/*
 * Rings when the commit is over for everybody else.  Must not fail.  PREPARE,
 * portals and parts of a transaction release what they hold, too.
 */
static void
at_release(ResourceReleasePhase phase, bool is_commit, bool is_top_level,
		   void *arg)
{
	if (!committed || phase != RESOURCE_RELEASE_AFTER_LOCKS || !is_commit ||
		!is_top_level)
		return;
	if (ring_wanted && chat_shared)
		chat_shmem_ring(MyDatabaseId, recheck_wanted);
	if (notices_wanted && chat_shared)
		chat_shmem_ring_notices(MyDatabaseId);
	if (check_wanted && chat_shared)
		chat_shmem_changed(MyDatabaseId);
	for (int i = 0; publish_wanted && i < WAIT_BUCKETS; i++)
		if (publish_buckets[i] && buckets)
			publish(&buckets[i]);
	forget();
}

/* Installs the hooks; the memory exists only when preloaded. */
void
chat_shmem_init(void)
{
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterResourceReleaseCallback(at_release, NULL);
	if (!process_shared_preload_libraries_in_progress)
		return;
	prev_request_hook = shmem_request_hook;
	shmem_request_hook = request_memory;
	prev_startup_hook = shmem_startup_hook;
	shmem_startup_hook = startup;
}

/* Raises an error that says what to do when the library is not preloaded. */
void
chat_shmem_require(void)
{
	if (chat_shared == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the chat runtime is not loaded"),
				 errdetail("Only the data functions work without it."),
				 errhint("Add the line shared_preload_libraries = 'chat' to postgresql.conf and restart the server.")));
}

/* Sets the latch of the launcher. */
static void
wake_launcher(void)
{
	uint32		proc = pg_atomic_read_u32(&chat_shared->launcher_proc);

	if (proc > 0)
		SetLatch(&chat_proc_by_number(proc - 1)->procLatch);
}

/* Leaves the slot to the launcher when the process ends. */
static void
detach(int code, Datum arg)
{
	ChatSlot   *slot = chat_slot;

	if (slot == NULL)
		return;
	chat_slot = NULL;
	pg_atomic_write_u32(&slot->proc, 0);
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	if (slot->pid == MyProcPid)
	{
		slot->pid = 0;
		slot->state = CHAT_SLOT_EXITED;
	}
	LWLockRelease(chat_shared->lock);
	wake_launcher();
	if (slot->kind == CHAT_SLOT_TOOL)
		chat_shmem_ring(slot->database, false);
}

/*
 * Sets a free slot aside for a worker that is about to be started; -1 if
 * there is none, or no worker may be in that database now.
 */
int
chat_shmem_take_slot(ChatSlotKind kind, Oid database, Oid role)
{
	int			found = -1;
	ChatSlot   *slot;

	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < chat_shared->nslots && found < 0; i++)
		if (chat_shared->slots[i].state == CHAT_SLOT_FREE)
			found = i;
	for (int i = 0; i < CHAT_MAX_BLOCKED; i++)
		if (chat_shared->blocked[i] == database)
			found = -1;
	if (found >= 0)
	{
		slot = &chat_shared->slots[found];
		slot->state = CHAT_SLOT_STARTING;
		slot->kind = kind;
		slot->exit = CHAT_EXIT_ERROR;
		slot->database = database;
		slot->role = role;
		slot->claimed = slot->running = false;
		slot->progress_len = 0;
		slot->started_at = GetCurrentTimestamp();
	}
	LWLockRelease(chat_shared->lock);
	return found;
}

/* Makes a slot free whose worker was not started. */
void
chat_shmem_free_slot(int slot)
{
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	chat_shared->slots[slot].state = CHAT_SLOT_FREE;
	chat_shared->slots[slot].database = InvalidOid;
	LWLockRelease(chat_shared->lock);
}

/*
 * Takes the slot that the launcher has set aside and gives this worker an
 * identity that no other worker ever had.  Exits when the slot is not (or no
 * longer) meant for us.
 */
void
chat_shmem_attach(int index, Oid database)
{
	ChatSlot   *slot = &chat_shared->slots[index];
	int64		identity;
	bool		mine;

	if (!pg_strong_random(&identity, sizeof(identity)))
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("could not generate random numbers")));
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	mine = slot->state == CHAT_SLOT_STARTING && slot->database == database;
	for (int i = 0; i < CHAT_MAX_BLOCKED; i++)
		mine = mine && chat_shared->blocked[i] != database;
	if (mine)
	{
		slot->state = CHAT_SLOT_RUNNING;
		slot->exit = CHAT_EXIT_ERROR;
		slot->pid = MyProcPid;
		slot->identity = identity;
		slot->started_at = GetCurrentTimestamp();
	}
	else if (slot->state == CHAT_SLOT_STARTING && slot->database == database)
	{
		slot->state = CHAT_SLOT_EXITED;
		slot->exit = CHAT_EXIT_STOPPED;
	}
	LWLockRelease(chat_shared->lock);
	if (!mine)
	{
		wake_launcher();
		proc_exit(0);
	}
	chat_slot = slot;
	init_slot(slot);
	/* a worker before this one may have left some */
	pg_atomic_write_u32(&slot->notices, 1);
	on_shmem_exit(detach, (Datum) 0);
	pg_atomic_write_u32(&slot->bell_database, database);
	pg_atomic_write_u32(&slot->proc, (uint32) chat_my_proc_number() + 1);
	/* it need not look any more whether this worker comes (P9) */
	wake_launcher();
}

/* Says how this worker is going to end. */
void
chat_shmem_set_exit(ChatSlotExit how)
{
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	chat_slot->exit = how;
	LWLockRelease(chat_shared->lock);
}

/*
 * Lists the identities of the workers that live in a database, in an array
 * of max_worker_processes; returns how many.
 */
int
chat_shmem_live(Oid database, int64 *identities)
{
	int			n = 0;

	LWLockAcquire(chat_shared->lock, LW_SHARED);
	for (int i = 0; i < chat_shared->nslots; i++)
	{
		ChatSlot   *slot = &chat_shared->slots[i];

		if (slot->state == CHAT_SLOT_RUNNING && slot->pid != 0 &&
			slot->database == database)
			identities[n++] = slot->identity;
	}
	LWLockRelease(chat_shared->lock);
	return n;
}

/* Tells the launcher to look at a database. */
void
chat_shmem_changed(Oid database)
{
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	if (chat_shared->nchanged < CHAT_MAX_CHANGED)
		chat_shared->changed[chat_shared->nchanged++] = database;
	else
		chat_shared->rescan = true;
	LWLockRelease(chat_shared->lock);
	wake_launcher();
}

/*
 * Wakes the workers of a database, except the process itself; recheck = they
 * shall look whether their jobs are still theirs.
 */
void
chat_shmem_ring(Oid database, bool recheck)
{
	for (int i = 0; i < chat_shared->nslots; i++)
	{
		ChatSlot   *slot = &chat_shared->slots[i];
		uint32		proc = pg_atomic_read_u32(&slot->proc);

		if (proc == 0 || slot == chat_slot ||
			pg_atomic_read_u32(&slot->bell_database) != database)
			continue;
		if (recheck)
			pg_atomic_write_u32(&slot->recheck, 1);
		if (strays_wanted)
			pg_atomic_write_u32(&slot->strays, 1);
		/*
		 * Who has not yet looked at the queue since the last ring is awake,
		 * or will be; all else it may have looked at before.
		 */
		if (pg_atomic_exchange_u32(&slot->rung, 1) == 0 || recheck ||
			strays_wanted || pg_atomic_read_u32(&slot->progress_due) ||
			pg_atomic_read_u32(&slot->notices))
			SetLatch(&chat_proc_by_number(proc - 1)->procLatch);
	}
}

/* Tells a worker, if it does not know, that it is one too many or is not. */
void
chat_shmem_set_surplus(ChatSlot *slot, bool surplus)
{
	uint32		proc = pg_atomic_read_u32(&slot->proc);

	if (pg_atomic_exchange_u32(&slot->surplus, surplus) == surplus)
		return;
	pg_atomic_write_u32(&slot->rung, 1);
	if (proc != 0)
		SetLatch(&chat_proc_by_number(proc - 1)->procLatch);
}

/* Tells the streaming workers of a database that a tool has reported. */
void
chat_shmem_ring_progress(Oid database)
{
	for (int i = 0; i < chat_shared->nslots; i++)
		if (pg_atomic_read_u32(&chat_shared->slots[i].bell_database) == database)
			pg_atomic_write_u32(&chat_shared->slots[i].progress_due, 1);
	chat_shmem_ring(database, false);
}

/* Tells the streaming workers of a database that there are notices. */
void
chat_shmem_ring_notices(Oid database)
{
	for (int i = 0; i < chat_shared->nslots; i++)
		if (pg_atomic_read_u32(&chat_shared->slots[i].bell_database) == database)
			pg_atomic_write_u32(&chat_shared->slots[i].notices, 1);
	chat_shmem_ring(database, false);
}

/*
 * Rings for a transaction that was prepared, maybe by another backend, and is
 * committed now: nobody knows what it did.
 */
void
chat_shmem_ring_prepared(void)
{
	strays_wanted = true;
	chat_shmem_ring_notices(MyDatabaseId);
	chat_shmem_ring(MyDatabaseId, true);
	strays_wanted = false;
	for (int i = 0; i < WAIT_BUCKETS; i++)
		publish(&buckets[i]);
}

/* Cancels the statement of the tool worker that runs an operation. */
void
chat_shmem_cancel_operation(const pg_uuid_t *operation)
{
	LWLockAcquire(chat_shared->lock, LW_SHARED);
	for (int i = 0; i < chat_shared->nslots; i++)
	{
		ChatSlot   *slot = &chat_shared->slots[i];

		if (slot->kind == CHAT_SLOT_TOOL && slot->pid != 0 && slot->running &&
			memcmp(&slot->operation, operation, UUID_LEN) == 0)
			kill(slot->pid, SIGINT);
	}
	LWLockRelease(chat_shared->lock);
}

/* Rings when the current transaction has committed. */
void
chat_shmem_ring_at_commit(bool recheck)
{
	ring_wanted = true;
	recheck_wanted |= recheck;
}

/* Has the workers look for tasks without a job when it has committed. */
void
chat_shmem_strays_at_commit(void)
{
	ring_wanted = true;
	strays_wanted = true;
}

/* Has the workers tell notices when it has committed. */
void
chat_shmem_notices_at_commit(void)
{
	notices_wanted = true;
}

/* Has the launcher look at this database when the transaction committed. */
void
chat_shmem_check_at_commit(void)
{
	check_wanted = true;
	ring_wanted = true;
	recheck_wanted = true;
}

/* Returns the bucket of a task (its id is random). */
static WaitBucket *
bucket_of(const pg_uuid_t *task)
{
	return &buckets[task->data[15] % WAIT_BUCKETS];
}

/*
 * Registers a reader.  What is committed after this is seen by
 * chat_shmem_wait(); look at the tables between the two calls.
 */
uint64
chat_shmem_wait_prepare(const pg_uuid_t *task)
{
	WaitBucket *bucket = bucket_of(task);

	pg_atomic_fetch_add_u32(&bucket->readers, 1);
	return pg_atomic_read_u64(&bucket->generation);
}

/* Ends what chat_shmem_wait_prepare() began. */
void
chat_shmem_wait_cancel(const pg_uuid_t *task)
{
	pg_atomic_fetch_sub_u32(&bucket_of(task)->readers, 1);
}

/* Returns a time in ms for waits: nobody sets this clock. */
int64
chat_shmem_clock(void)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	return (int64) INSTR_TIME_GET_MILLISEC(now);
}

/*
 * Sleeps until something of the task (or of one that shares its bucket) was
 * committed after the given generation; false after timeout ms.
 */
bool
chat_shmem_wait(const pg_uuid_t *task, uint64 seen, long timeout)
{
	WaitBucket *bucket = bucket_of(task);
	int64		end = chat_shmem_clock() + timeout;
	bool		moved;

	ConditionVariablePrepareToSleep(&bucket->cv);
	while (!(moved = pg_atomic_read_u64(&bucket->generation) != seen))
	{
		long		left = (long) (end - chat_shmem_clock());

		if (left <= 0)
			break;
		(void) ConditionVariableTimedSleep(&bucket->cv, left,
										   chat_wait_event("ChatTask"));
	}
	ConditionVariableCancelSleep();
	return moved;
}

/* Tells the readers of a task, if there are any, that it has moved. */
void
chat_shmem_publish(const pg_uuid_t *task)
{
	publish(bucket_of(task));
}

/* The same when the transaction has committed; NULL = those of all tasks. */
void
chat_shmem_publish_at_commit(const pg_uuid_t *task)
{
	if (task)
		publish_buckets[task->data[15] % WAIT_BUCKETS] = true;
	else
		memset(publish_buckets, true, sizeof(publish_buckets));
	publish_wanted = true;
}
