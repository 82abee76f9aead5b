/*
 * launcher.c
 *		One process for the whole server: keeps chat.workers workers in every
 *		database that has the extension.
 *
 * Owns the list of databases that it knows (local to the process) and the
 * allocation of worker slots: it alone takes a free slot and frees one whose
 * worker has exited.  The slots and the lists of changed and blocked
 * databases are protected by ChatShared.lock.
 *
 * Which database has the extension cannot be seen from outside.  So at its
 * start the launcher sends a worker into each database that allows
 * connections and is no template; a worker that finds no extension says so
 * and ends.  From then on the object access hook tells of CREATE and DROP
 * EXTENSION.  The utility hook keeps workers out of a database while a
 * command runs that needs it for itself, and rings after COMMIT PREPARED.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_database.h"
#include "catalog/pg_extension.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "commands/extension.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/wait_event.h"

#include "compat.h"
#include "launcher.h"
#include "shmem.h"

/* delays before a worker that failed is started again, in ms */
#define MIN_RESTART_DELAY 100
#define MAX_RESTART_DELAY 60000
/* a worker that ran as long as this did not fail at its start, in ms */
#define PROVEN_TIME 10000
/* a worker that was registered is given up after, in ms */
#define START_TIME 30000

typedef struct Database
{
	Oid			oid;
	bool		wanted;			/* start workers there */
	bool		changed;		/* told of since the last start */
	bool		warned;			/* said that there is no place */
	int			delay;			/* before the next start, 0 = none */
	TimestampTz not_before;
} Database;

static int	workers = 1;
static Database *databases = NULL;
static int	ndatabases = 0;

/* in a backend, until its transaction ends */
static Oid	kept_out[CHAT_MAX_BLOCKED]; /* databases that it has blocked */
static int	nkept_out = 0;
static Oid	created = InvalidOid;	/* a new database */

static object_access_hook_type prev_access_hook = NULL;
static ProcessUtility_hook_type prev_utility_hook = NULL;

/* ---------- hooks, in every backend ---------- */

/* Notes that an extension comes or goes in this database. */
static void
on_object_access(ObjectAccessType access, Oid class, Oid object, int sub,
				 void *arg)
{
	if (prev_access_hook)
		prev_access_hook(access, class, object, sub, arg);
	if (class == ExtensionRelationId &&
		(access == OAT_POST_CREATE || access == OAT_POST_ALTER ||
		 access == OAT_DROP))
		chat_shmem_check_at_commit();
}

/* True if any worker is, or is about to be, in a database. */
static bool
has_workers(Oid database)
{
	bool		found = false;

	LWLockAcquire(chat_shared->lock, LW_SHARED);
	for (int i = 0; i < chat_shared->nslots; i++)
		found |= chat_shared->slots[i].database == database &&
			chat_shared->slots[i].pid != 0;
	LWLockRelease(chat_shared->lock);
	return found;
}

/* Asks the workers of a database to end. */
static void
terminate_workers(Oid database)
{
	LWLockAcquire(chat_shared->lock, LW_SHARED);
	for (int i = 0; i < chat_shared->nslots; i++)
		if (chat_shared->slots[i].database == database &&
			chat_shared->slots[i].pid != 0)
			kill(chat_shared->slots[i].pid, SIGTERM);
	LWLockRelease(chat_shared->lock);
}

/* Keeps workers out of a database; false if too many are kept out of. */
static bool
block_database(Oid database)
{
	bool		done = false;

	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < CHAT_MAX_BLOCKED && !done; i++)
	{
		if (OidIsValid(chat_shared->blocked[i]))
			continue;
		chat_shared->blocked[i] = database;
		done = true;
	}
	LWLockRelease(chat_shared->lock);
	return done;
}

/* Lets workers in again. */
static void
unblock_database(Oid database)
{
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < CHAT_MAX_BLOCKED; i++)
	{
		if (chat_shared->blocked[i] != database)
			continue;
		chat_shared->blocked[i] = InvalidOid;
		break;
	}
	LWLockRelease(chat_shared->lock);
	chat_shmem_changed(database);
}

/*
 * Does what waits for the end of the transaction: only then others see that a
 * database is gone, or there, or has another name.
 */
static void
at_transaction_end(XactEvent event, void *arg)
{
	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT &&
		event != XACT_EVENT_PREPARE)
		return;
	while (nkept_out > 0)
		unblock_database(kept_out[--nkept_out]);
	if (OidIsValid(created) && event == XACT_EVENT_COMMIT)
		chat_shmem_changed(created);
	created = InvalidOid;
}

/* Waits until the workers have left a database. */
static void
wait_for_workers(Oid database)
{
	terminate_workers(database);
	while (has_workers(database))
	{
		CHECK_FOR_INTERRUPTS();
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT |
						 WL_EXIT_ON_PM_DEATH, 10, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
	}
}

/* Returns the value of a string option of a statement, or NULL. */
static char *
string_option(List *options, const char *name)
{
	ListCell   *lc;

	foreach(lc, options)
	{
		DefElem    *e = lfirst_node(DefElem, lc);

		if (strcmp(e->defname, name) == 0)
			return e->arg ? defGetString(e) : NULL;
	}
	return NULL;
}

/* Returns the name of the database that a statement needs for itself. */
static const char *
exclusive_database(Node *stmt)
{
	if (IsA(stmt, DropdbStmt))
		return ((DropdbStmt *) stmt)->dbname;
	if (IsA(stmt, RenameStmt) &&
		((RenameStmt *) stmt)->renameType == OBJECT_DATABASE)
		return ((RenameStmt *) stmt)->subname;
	if (IsA(stmt, AlterDatabaseStmt) &&
		string_option(((AlterDatabaseStmt *) stmt)->options, "tablespace"))
		return ((AlterDatabaseStmt *) stmt)->dbname;
	if (IsA(stmt, CreatedbStmt))
		return string_option(((CreatedbStmt *) stmt)->options, "template");
	return NULL;
}

/*
 * Returns the database that a statement needs for itself, if it may have it:
 * workers do not leave one because of a statement that fails at once.
 */
static Oid
database_to_leave(Node *stmt)
{
	const char *name = exclusive_database(stmt);
	Oid			database = name ? get_database_oid(name, true) : InvalidOid;

	if (!OidIsValid(database) || database == MyDatabaseId ||
		!chat_database_owned(database, GetUserId()))
		return InvalidOid;
	/* all but RENAME refuse to run in a transaction block */
	if (!IsA(stmt, RenameStmt) && IsTransactionBlock())
		return InvalidOid;
	return database;
}

/* True if a statement may have committed what another backend prepared. */
static bool
is_commit_prepared(Node *stmt)
{
	return IsA(stmt, TransactionStmt) &&
		((TransactionStmt *) stmt)->kind == TRANS_STMT_COMMIT_PREPARED;
}

/* Runs a utility statement. */
static void
run_utility(PlannedStmt *pstmt, const char *query, bool read_only,
			ProcessUtilityContext context, ParamListInfo params,
			QueryEnvironment *env, DestReceiver *dest, QueryCompletion *qc)
{
	if (prev_utility_hook)
		prev_utility_hook(pstmt, query, read_only, context, params, env,
						  dest, qc);
	else
		standard_ProcessUtility(pstmt, query, read_only, context, params, env,
								dest, qc);
}

/* Keeps our workers out of the way of statements on databases. */
static void
on_utility(PlannedStmt *pstmt, const char *query, bool read_only,
		   ProcessUtilityContext context, ParamListInfo params,
		   QueryEnvironment *env, DestReceiver *dest, QueryCompletion *qc)
{
	Node	   *stmt = pstmt->utilityStmt;
	Oid			database = database_to_leave(stmt);
	bool		rings = is_commit_prepared(stmt);
	/* a statement that ends a transaction may free itself */
	char	   *creates = IsA(stmt, CreatedbStmt)
		? pstrdup(((CreatedbStmt *) stmt)->dbname) : NULL;

	if (OidIsValid(database) &&
		nkept_out < CHAT_MAX_BLOCKED && block_database(database))
	{
		kept_out[nkept_out++] = database;
		wait_for_workers(database);
	}
	run_utility(pstmt, query, read_only, context, params, env, dest, qc);
	if (rings)
	{
		chat_shmem_ring_prepared();
		/* no worker goes where no extension is */
		if (OidIsValid(get_extension_oid("chat", true)))
			chat_shmem_changed(MyDatabaseId);
	}
	if (creates)
	{
		CommandCounterIncrement();
		created = get_database_oid(creates, true);
	}
}

/* ---------- the launcher ---------- */

/* Declares the settings and registers the process and the hooks. */
void
chat_launcher_init(void)
{
	BackgroundWorker launcher = {
		.bgw_name = "chat launcher",
		.bgw_type = "chat launcher",
		.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION,
		.bgw_start_time = BgWorkerStart_RecoveryFinished,
		.bgw_restart_time = 1,
		.bgw_library_name = "chat",
		.bgw_function_name = "chat_launcher_main",
	};

	DefineCustomIntVariable("chat.workers",
							"Workers in each database that has the extension.",
							NULL, &workers, 1, 1, 64, PGC_SIGHUP, 0,
							NULL, NULL, NULL);
	if (!process_shared_preload_libraries_in_progress || IsBinaryUpgrade)
		return;
	prev_access_hook = object_access_hook;
	object_access_hook = on_object_access;
	prev_utility_hook = ProcessUtility_hook;
	ProcessUtility_hook = on_utility;
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterBackgroundWorker(&launcher);
}

/* Finds a database in the list, or adds it. */
static Database *
find_database(Oid oid)
{
	for (int i = 0; i < ndatabases; i++)
		if (databases[i].oid == oid)
			return &databases[i];
	databases = databases
		? repalloc(databases, sizeof(Database) * (ndatabases + 1))
		: MemoryContextAlloc(TopMemoryContext, sizeof(Database));
	memset(&databases[ndatabases], 0, sizeof(Database));
	databases[ndatabases].oid = oid;
	return &databases[ndatabases++];
}

/* Wants workers in a database, at once. */
static void
want(Oid oid)
{
	Database   *d = find_database(oid);

	d->wanted = true;
	d->changed = true;
	d->delay = 0;
	d->not_before = 0;
}

/* Looks at pg_database: forgets what is gone; adds all that may be ours. */
static void
scan_databases(bool add)
{
	Relation	rel;
	SysScanDesc scan;
	HeapTuple	tuple;
	Oid		   *known = palloc(sizeof(Oid) * (ndatabases + 1));
	int			nknown = 0;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = systable_beginscan(rel, InvalidOid, false, NULL, 0, NULL);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_database form = (Form_pg_database) GETSTRUCT(tuple);

		if (form->datistemplate || !form->datallowconn ||
			form->encoding != PG_UTF8)
			continue;
		if (add)
			want(form->oid);
		for (int i = 0; i < ndatabases; i++)
			if (!add && databases[i].oid == form->oid)
				known[nknown++] = form->oid;
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	CommitTransactionCommand();
	/* a wait for a lock may have taken the bell that somebody rang meanwhile */
	SetLatch(MyLatch);
	for (int i = 0; !add && i < ndatabases; i++)
	{
		bool		found = false;

		for (int k = 0; k < nknown; k++)
			found |= known[k] == databases[i].oid;
		databases[i].wanted &= found;
	}
}

/* Takes notice of what backends told. */
static void
take_changes(void)
{
	Oid			changed[CHAT_MAX_CHANGED];
	int			n;
	bool		rescan;

	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	n = chat_shared->nchanged;
	memcpy(changed, chat_shared->changed, sizeof(Oid) * n);
	rescan = chat_shared->rescan;
	chat_shared->nchanged = 0;
	chat_shared->rescan = false;
	LWLockRelease(chat_shared->lock);
	for (int i = 0; i < n; i++)
		want(changed[i]);
	if (rescan)
		scan_databases(true);
	if (rescan || n > 0)
		scan_databases(false);
}

/* Plans the next start in a database whose worker failed. */
static void
plan_restart(const ChatSlot *slot)
{
	Database   *d = find_database(slot->database);
	TimestampTz now = GetCurrentTimestamp();

	if (slot->exit == CHAT_EXIT_ABSENT)
	{
		/* it may have come after the worker looked */
		d->wanted = d->changed;
		return;
	}
	if (slot->exit == CHAT_EXIT_STOPPED &&
		TimestampDifferenceExceeds(slot->started_at, now, PROVEN_TIME))
		d->delay = 0;
	d->delay = Min(Max(d->delay * 2, MIN_RESTART_DELAY), MAX_RESTART_DELAY);
	d->not_before = TimestampTzPlusMilliseconds(now, d->delay);
}

/* Counts the streaming workers of a database; the lock is held. */
static int
count_live(Oid database)
{
	int			n = 0;

	for (int i = 0; i < chat_shared->nslots; i++)
		if (chat_shared->slots[i].state == CHAT_SLOT_RUNNING &&
			chat_shared->slots[i].kind == CHAT_SLOT_WORKER &&
			chat_shared->slots[i].database == database)
			n++;
	return n;
}

/*
 * Frees the slots whose workers have ended or never came; true if one failed:
 * its database may be gone.
 */
static bool
reap_slots(void)
{
	bool		failed = false;
	TimestampTz now = GetCurrentTimestamp();

	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < chat_shared->nslots; i++)
	{
		ChatSlot   *slot = &chat_shared->slots[i];
		bool		lost = slot->state == CHAT_SLOT_STARTING &&
		TimestampDifferenceExceeds(slot->started_at, now, START_TIME);

		/* a tool worker's end is the streaming worker's business */
		if (slot->kind == CHAT_SLOT_TOOL && count_live(slot->database) > 0)
			continue;
		if (slot->state != CHAT_SLOT_EXITED && !lost)
			continue;
		if (lost)
			slot->exit = CHAT_EXIT_ERROR;
		failed |= slot->exit == CHAT_EXIT_ERROR;
		if (slot->kind == CHAT_SLOT_WORKER)
			plan_restart(slot);
		slot->state = CHAT_SLOT_FREE;
		slot->database = InvalidOid;
	}
	LWLockRelease(chat_shared->lock);
	return failed;
}

/* Registers a worker; false when the server has no place for it. */
static bool
start_worker(Oid database)
{
	Database   *d = find_database(database);
	BackgroundWorker worker = {
		.bgw_name = "chat worker",
		.bgw_type = "chat worker",
		.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION,
		.bgw_start_time = BgWorkerStart_RecoveryFinished,
		.bgw_restart_time = BGW_NEVER_RESTART,
		.bgw_library_name = "chat",
		.bgw_function_name = "chat_worker_main",
		.bgw_notify_pid = MyProcPid,
	};
	int			slot = chat_shmem_take_slot(CHAT_SLOT_WORKER, database, InvalidOid);

	if (slot < 0)
		return false;
	worker.bgw_main_arg = Int32GetDatum(slot);
	memcpy(worker.bgw_extra, &database, sizeof(Oid));
	if (RegisterDynamicBackgroundWorker(&worker, NULL))
	{
		d->warned = false;
		return true;
	}
	chat_shmem_free_slot(slot);
	if (!d->warned)
		ereport(WARNING,
				(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
				 errmsg("no place for a chat worker in the database with OID %u",
						database),
				 errhint("Increase max_worker_processes.")));
	d->warned = true;
	return false;
}

/* Counts the workers of a database. */
static int
count_workers(Oid database)
{
	int			n = 0;

	LWLockAcquire(chat_shared->lock, LW_SHARED);
	for (int i = 0; i < chat_shared->nslots; i++)
		if (chat_shared->slots[i].state != CHAT_SLOT_FREE &&
			chat_shared->slots[i].kind == CHAT_SLOT_WORKER &&
			chat_shared->slots[i].database == database)
			n++;
	LWLockRelease(chat_shared->lock);
	return n;
}

/*
 * Starts what is missing and may start; returns how long to sleep, in ms,
 * -1 = until something happens.
 */
static long
start_missing(void)
{
	long		sleep = -1;

	for (int i = 0; i < ndatabases; i++)
	{
		Database   *d = &databases[i];
		TimestampTz now = GetCurrentTimestamp();
		int			missing = d->wanted ? workers - count_workers(d->oid) : 0;
		long		left;

		if (missing <= 0)
			continue;
		left = TimestampDifferenceMilliseconds(now, d->not_before);
		/* a clock that was set back must not stop us */
		left = Min(left, MAX_RESTART_DELAY);
		if (d->not_before > now && left > 0)
		{
			sleep = sleep < 0 ? left : Min(sleep, left);
			continue;
		}
		d->changed = false;
		while (missing > 0 && start_worker(d->oid))
			missing--;
		if (missing > 0)
			sleep = sleep < 0 ? 1000 : Min(sleep, 1000);
	}
	return sleep;
}

/* Returns how many workers of the slot's database have a slot before it. */
static int
rank_of(const ChatSlot *slot)
{
	int			n = 0;

	for (const ChatSlot *s = chat_shared->slots; s < slot; s++)
		if (s->state == CHAT_SLOT_RUNNING && s->kind == CHAT_SLOT_WORKER &&
			s->database == slot->database)
			n++;
	return n;
}

/* Tells the workers beyond chat.workers that they are, and all others. */
static void
mark_surplus(void)
{
	LWLockAcquire(chat_shared->lock, LW_SHARED);
	for (int i = 0; i < chat_shared->nslots; i++)
	{
		ChatSlot   *slot = &chat_shared->slots[i];

		if (slot->state == CHAT_SLOT_RUNNING && slot->kind == CHAT_SLOT_WORKER)
			chat_shmem_set_surplus(slot, rank_of(slot) >= workers);
	}
	LWLockRelease(chat_shared->lock);
}

/* True if a worker was registered that has not come yet. */
static bool
any_starting(void)
{
	bool		found = false;

	LWLockAcquire(chat_shared->lock, LW_SHARED);
	for (int i = 0; i < chat_shared->nslots; i++)
		found |= chat_shared->slots[i].state == CHAT_SLOT_STARTING;
	LWLockRelease(chat_shared->lock);
	return found;
}

/* Lets nobody ring a launcher that is gone. */
static void
forget_launcher(int code, Datum arg)
{
	pg_atomic_write_u32(&chat_shared->launcher_proc, 0);
}

/* Main function of the launcher. */
void
chat_launcher_main(Datum arg)
{
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	before_shmem_exit(forget_launcher, (Datum) 0);
	pg_atomic_write_u32(&chat_shared->launcher_proc,
						(uint32) chat_my_proc_number() + 1);
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	chat_shared->rescan = true;
	LWLockRelease(chat_shared->lock);
	for (;;)
	{
		MemoryContext cycle = AllocSetContextCreate(TopMemoryContext,
													"chat launcher cycle",
													ALLOCSET_DEFAULT_SIZES);
		long		sleep;

		MemoryContextSwitchTo(cycle);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
		}
		take_changes();
		if (reap_slots())
			scan_databases(false);
		mark_surplus();
		sleep = start_missing();
		if (any_starting() && (sleep < 0 || sleep > START_TIME))
			sleep = START_TIME;
		MemoryContextSwitchTo(TopMemoryContext);
		MemoryContextDelete(cycle);
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_EXIT_ON_PM_DEATH |
						 (sleep >= 0 ? WL_TIMEOUT : 0), sleep,
						 PG_WAIT_EXTENSION);
	}
}
