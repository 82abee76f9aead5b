/*
 * work.c
 *		What all parts of the streaming worker share: transactions that may
 *		fail, the memory of a turn of the loop, and what is due.
 *
 * Owns that memory, a context that is reset at the foot of the loop, and
 * chat_due, in which every part notes what the loop is to do and when.  Both
 * are local to the process.
 *
 * A transaction that fails is an answer, not an end: its error is logged and
 * returned.  An error of the system (disk, locks) is to be waited out; any
 * other is of one item, which is found by trying them one by one.
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "db.h"
#include "shmem.h"
#include "work.h"

/* at the start the queue, strays and what the dead have left are looked at */
ChatDue		chat_due = {
	.rest = CHAT_NEVER,
	.check = CHAT_NEVER,
	.beat = CHAT_NEVER,
};

static MemoryContext turn_context;

/* Makes the context that is current in the loop. */
void
chat_work_start(void)
{
	turn_context = AllocSetContextCreate(TopMemoryContext, "chat tick",
										 ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(turn_context);
}

/* Frees what a turn of the loop has allocated. */
void
chat_work_reset(void)
{
	MemoryContextReset(turn_context);
}

/* Allocates what outlives a transaction, until the end of the turn. */
void *
chat_work_alloc(Size size)
{
	return MemoryContextAllocZero(turn_context, size);
}

/* True if an error says nothing about the row: it is waited out. */
bool
chat_work_is_systemic(const ErrorData *edata)
{
	switch (ERRCODE_TO_CATEGORY(edata->sqlerrcode))
	{
		case ERRCODE_INSUFFICIENT_RESOURCES:
		case ERRCODE_OPERATOR_INTERVENTION:
		case ERRCODE_SYSTEM_ERROR:
		case ERRCODE_TRANSACTION_ROLLBACK:
		case ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE:
		case ERRCODE_INVALID_TRANSACTION_STATE:
			return true;
		default:
			return edata->sqlerrcode == ERRCODE_UNDEFINED_TABLE ||
				edata->sqlerrcode == ERRCODE_IO_ERROR;
	}
}

/* True if an error says that the notification queue is full. */
static bool
is_queue_full(const ErrorData *edata)
{
	/* the code alone also tells of texts that are too long */
	return edata->sqlerrcode == ERRCODE_PROGRAM_LIMIT_EXCEEDED &&
		edata->message &&
		strcmp(edata->message,
			   _("too many notifications in the NOTIFY queue")) == 0;
}

/*
 * True, after a warning that is given once, if an error says that the
 * notification queue is full: without notifications it would not have been.
 */
bool
chat_work_is_too_loud(const ErrorData *edata)
{
	static bool warned = false;

	if (edata == NULL || !is_queue_full(edata))
		return false;
	if (!warned)
		ereport(WARNING,
				(errmsg("the notification queue is full"),
				 errdetail("Events are stored without a notification."),
				 errhint("Look for a session that listens and stays in a transaction: SELECT * FROM pg_stat_activity WHERE state LIKE 'idle in%%'.")));
	warned = true;
	return true;
}

/*
 * Returns an error instead of a transaction whose commit would wait for a
 * synchronous standby that is not there, and everything else with it: the
 * streams go on meanwhile, and what has to be durable is done later.
 */
static ErrorData *
refuse_without_standby(void)
{
	static bool warned = false;
	bool		missing = chat_db_standby_missing();
	ErrorData  *edata;

	if (missing && !warned)
		ereport(WARNING,
				(errmsg("chat worker waits for a synchronous standby"),
				 errdetail("Jobs are neither started nor ended meanwhile.")));
	warned = missing;
	if (!missing)
		return NULL;
	edata = chat_work_alloc(sizeof(ErrorData));
	edata->sqlerrcode = ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
	edata->message = "a synchronous standby is missing";
	return edata;
}

/*
 * Runs work in a transaction of its own; returns NULL, or the error, which
 * was logged.  durable = the commit waits for the log.
 */
ErrorData *
chat_work_try(const char *activity, bool durable,
			  void (*work) (void *), void *arg)
{
	ErrorData  *volatile edata = NULL;
	MemoryContext old = CurrentMemoryContext;

	if (durable)
		edata = refuse_without_standby();
	if (edata)
		return edata;
	PG_TRY();
	{
		chat_db_begin(activity);
		work(arg);
		chat_db_commit(durable);
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(turn_context);
		edata = CopyErrorData();
		FlushErrorState();
		chat_db_abort();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	/* also when the extension is gone: see recheck.c */
	if (edata && chat_work_is_systemic(edata))
		pg_atomic_write_u32(&chat_slot->recheck, 1);
	if (edata && !is_queue_full(edata))
		ereport(LOG,
				(errcode(edata->sqlerrcode),
				 errmsg("chat worker could not %s: %s", activity,
						edata->message)));
	return edata;
}
