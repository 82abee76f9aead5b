/*
 * recheck.c
 *		What the tables say of the worker: whether its extension is there,
 *		whether it may take jobs, and which ones it has.
 *
 * Owns what was read last, local to the process.  Others change the tables:
 * whoever does so asks for a look in the worker's slot in shared memory
 * (ChatSlot.recheck), and so do we when something does not fit.
 */
#include "postgres.h"

#include "access/xact.h"
#include "commands/extension.h"
#include "storage/ipc.h"
#include "utils/guc.h"
#include "utils/snapmgr.h"

#include "control.h"
#include "db.h"
#include "httptool.h"
#include "queue.h"
#include "recheck.h"
#include "shmem.h"
#include "side.h"
#include "stream.h"
#include "streams.h"
#include "work.h"

static bool enabled = true;
static bool paused = true;		/* until the table was read */
static bool same_version = false;	/* library and extension fit */
static Oid	extension;
static int64 retry_at = 0;		/* the last look failed: not before */

/* Declares the setting that says whether workers work. */
void
chat_recheck_init(void)
{
	DefineCustomBoolVariable("chat.enabled",
							 "Whether workers take jobs from the queue.",
							 NULL, &enabled, true, PGC_SIGHUP, 0,
							 NULL, NULL, NULL);
}

/* True if the worker is to begin nothing: paused, or one too many. */
bool
chat_recheck_is_paused(void)
{
	return paused || pg_atomic_read_u32(&chat_slot->surplus);
}

/* True if the worker may take something from the queue. */
bool
chat_recheck_may_claim(void)
{
	return enabled && same_version && !chat_recheck_is_paused();
}

/* Returns when the tables are to be looked at, CHAT_NEVER if they need not. */
int64
chat_recheck_due(void)
{
	return pg_atomic_read_u32(&chat_slot->recheck) ? retry_at : CHAT_NEVER;
}

/* The jobs that are ours, by id, and what else was read with them. */
typedef struct HeldJobs
{
	int			n;
	int64	   *ids;
	int64	   *epochs;
	bool	   *cancels;
	bool		paused;
	Oid			extension;
} HeldJobs;

/* Reads which jobs are ours. */
static void
read_held(void *arg)
{
	HeldJobs   *held = arg;
	int64	   *ids;
	int64	   *job_epochs;
	bool	   *cancels;

	held->extension = get_extension_oid("chat", true);
	if (held->extension != extension)
		return;
	held->paused = chat_control_paused();
	held->n = chat_queue_held(chat_slot->identity, &ids, &job_epochs,
							  &cancels);
	held->ids = memcpy(chat_work_alloc(sizeof(int64) * (held->n + 1)), ids,
					   sizeof(int64) * held->n);
	held->epochs = memcpy(chat_work_alloc(sizeof(int64) * (held->n + 1)),
						  job_epochs, sizeof(int64) * held->n);
	held->cancels = memcpy(chat_work_alloc(held->n + 1), cancels, held->n);
}

/* True if the extension that the worker serves is still there. */
static bool
extension_is_here(void)
{
	Oid			found;

	StartTransactionCommand();
	found = get_extension_oid("chat", true);
	same_version = OidIsValid(found) && chat_db_same_version();
	CommitTransactionCommand();
	return found == extension && OidIsValid(found);
}

/* Ends the worker for good: the database has no such extension any more. */
static void
exit_absent(void)
{
	chat_shmem_set_exit(CHAT_EXIT_ABSENT);
	proc_exit(0);
}

/* Looks for a stream's job among those that are ours, ordered by id. */
static int
find_held(const HeldJobs *held, const ChatStream *s)
{
	int			low = 0;
	int			high = held->n;

	while (low < high)
	{
		int			mid = low + (high - low) / 2;

		if (held->ids[mid] < s->job.id)
			low = mid + 1;
		else
			high = mid;
	}
	return low < held->n && held->ids[low] == s->job.id &&
		held->epochs[low] == s->job.epoch ? low : -1;
}

/* Takes over what the table says, and lets it be known. */
static void
set_paused(bool now_paused)
{
	if (paused && !now_paused)
		chat_due.claim = 0;
	paused = now_paused;
	pg_atomic_write_u32(&chat_slot->paused, paused);
}

/* Drops the streams whose job is gone, cancels those that shall end. */
void
chat_recheck_run(void)
{
	HeldJobs	held = {0};
	dlist_mutable_iter iter;

	if (!extension_is_here())
		exit_absent();
	if (chat_work_try("look at its jobs", false, read_held, &held))
	{
		pg_atomic_write_u32(&chat_slot->recheck, 1);
		retry_at = chat_stream_clock() + CHAT_MAX_BACKOFF;
		return;
	}
	retry_at = 0;
	if (held.extension != extension)
		exit_absent();
	set_paused(held.paused);
	chat_httptool_keep(held.ids, held.n);
	chat_side_keep(held.ids, held.n);
	dlist_foreach_modify(iter, &chat_streams.all)
	{
		ChatStream *s = dlist_container(ChatStream, node, iter.cur);
		int			i = find_held(&held, s);

		if (i < 0)
		{
			chat_shmem_publish(&s->job.task);
			chat_streams_drop(s);
		}
		else if (held.cancels[i] && !s->ended)
		{
			chat_stream_cancel(s);
			chat_streams_mark(s);
		}
	}
}

/* Transaction: finds the extension. */
static void
find_extension(void *arg)
{
	if (!OidIsValid(chat_db_extension_owner()))
		return;
	extension = get_extension_oid("chat", true);
	same_version = chat_db_same_version();
}

/* Looks for the extension; without one the worker has nothing to do here. */
void
chat_recheck_start(void)
{
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	find_extension(NULL);
	PopActiveSnapshot();
	CommitTransactionCommand();
	if (!OidIsValid(extension))
		exit_absent();
}
