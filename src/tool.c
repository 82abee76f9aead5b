/*
 * tool.c
 *		SQL tools: which processes run them, and what all tools share.
 *
 * Owns the slots of kind CHAT_SLOT_TOOL, which the streaming worker takes and
 * frees here and the process that it starts fills (toolworker.c), and what it
 * knows of the roles that wait, local to the process.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "storage/lwlock.h"
#include "utils/acl.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/syscache.h"

#include "compat.h"
#include "db.h"
#include "registry.h"
#include "shmem.h"
#include "tool.h"
#include "turn.h"

/* tool workers of a role that ended without a claim, before we give up */
#define MAX_FALSE_STARTS 3
/* a slot whose worker never came is free again after, in ms */
#define START_TIME 30000

static int	tool_workers = 4;
static int	tool_timeout = 60000;

/* Declares the settings of tools. */
void
chat_tool_init(void)
{
	DefineCustomIntVariable("chat.tool_workers",
							"Most processes that run SQL tools in a database.",
							NULL, &tool_workers, 4, 1, 64, PGC_SIGHUP, 0,
							NULL, NULL, NULL);
	DefineCustomIntVariable("chat.tool_timeout",
							"Longest time of a tool that says nothing else.",
							NULL, &tool_timeout, 60000, 1, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
}

/* Setting chat.tool_timeout, in ms. */
int
chat_tool_default_timeout(void)
{
	return tool_timeout;
}

/* True if a result says that the operation goes on elsewhere. */
bool
chat_tool_is_accepted(const char *result)
{
	Jsonb	   *value;
	JsonbValue	v;

	if (result[0] != '{')
		return false;
	value = chat_db_parse_json(result);
	return value && JB_ROOT_IS_OBJECT(value) &&
		getKeyJsonValueFromContainer(&value->root, "status", 6, &v) &&
		v.type == jbvString && v.val.string.len == 8 &&
		memcmp(v.val.string.val, "accepted", 8) == 0;
}

/* $1 database, $2 most: SQL calls that wait, by role; one look for each role */
CHAT_STMT(waiting_roles,
		  "WITH RECURSIVE role (owner) AS ("
		  " (SELECT j.owner FROM chat.chat_job AS j"
		  "  WHERE j.tool_kind = 'sql' AND j.holder IS NULL"
		  "  ORDER BY j.owner LIMIT 1)"
		  " UNION ALL"
		  " SELECT (SELECT j.owner FROM chat.chat_job AS j"
		  "  WHERE j.tool_kind = 'sql' AND j.holder IS NULL"
		  "   AND j.owner > role.owner ORDER BY j.owner LIMIT 1)"
		  " FROM role WHERE role.owner IS NOT NULL)"
		  " SELECT role.owner, call.n FROM role CROSS JOIN LATERAL ("
		  "  SELECT count(*)::int, min(w.id) FROM ("
		  "   SELECT j.id FROM chat.chat_job AS j"
		  "   WHERE j.tool_kind = 'sql' AND j.holder IS NULL"
		  "    AND j.owner = role.owner AND j.database = $1"
		  "    AND j.run_at <= now()"
		  "   ORDER BY j.run_at, j.id LIMIT $2) AS w) AS call (n, first)"
		  " WHERE call.n > 0 ORDER BY call.first",
		  OIDOID, INT4OID);

/*
 * $1 database, $2 role: makes the tasks due whose calls nobody can run; first,
 * for all who end a call lock the task's job before the call
 */
CHAT_STMT(ring_waiting,
		  "UPDATE chat.chat_job AS p SET run_at = '-infinity'"
		  " FROM chat.chat_job AS j"
		  " WHERE j.tool_kind = 'sql' AND j.holder IS NULL"
		  "  AND j.database = $1 AND j.owner = $2"
		  "  AND p.session_id = j.session_id AND p.task_id = j.task_id"
		  "  AND p.kind = 'completion'"
		  "  AND p.parked",
		  OIDOID, OIDOID);

/* $1 database, $2 role, $3 why: fails the calls that nobody can run */
CHAT_STMT(fail_calls,
		  "WITH gone AS ("
		  " DELETE FROM chat.chat_job AS j"
		  " WHERE j.tool_kind = 'sql' AND j.holder IS NULL"
		  "  AND j.database = $1 AND j.owner = $2"
		  " RETURNING j.operation_id)"
		  " UPDATE chat.chat_tool_call AS c SET status = 'failed',"
		  "  ended_at = now(), result = json_build_object('type', 'error',"
		  "   'message', 'Tool ' || c.name || ' failed: ' || $3,"
		  "   'code', 'tool_not_available')::text"
		  "  FROM gone WHERE c.operation_id = gone.operation_id"
		  "  AND c.ended_at IS NULL",
		  OIDOID, OIDOID, TEXTOID);

/* What the scheduler knows of a role. */
typedef struct WaitingRole
{
	Oid			role;
	int			calls;
	int			false_starts;
	int64		not_before;		/* by chat_shmem_clock() */
} WaitingRole;

static bool orphans = false;	/* calls whose worker has ended */
static WaitingRole *roles = NULL;
static int	nroles = 0;

/* Finds what is known of a role. */
static WaitingRole *
find_role(Oid role)
{
	for (int i = 0; i < nroles; i++)
		if (roles[i].role == role)
			return &roles[i];
	roles = roles ? repalloc(roles, sizeof(WaitingRole) * (nroles + 1))
		: MemoryContextAlloc(TopMemoryContext, sizeof(WaitingRole));
	memset(&roles[nroles], 0, sizeof(WaitingRole));
	roles[nroles].role = role;
	return &roles[nroles++];
}

/* Says why no tool worker can be connected as a role; NULL if one can. */
static const char *
why_not(const WaitingRole *r)
{
	HeapTuple	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(r->role));
	bool		can_login;

	if (!HeapTupleIsValid(tuple))
		return "the session's owner role does not exist any more";
	can_login = ((Form_pg_authid) GETSTRUCT(tuple))->rolcanlogin;
	ReleaseSysCache(tuple);
	if (!can_login && !CHAT_WORKER_BYPASSES_LOGIN)
		return "the session's owner role may not log in, which this version of PostgreSQL asks of a background worker";
	if (chat_database_aclcheck(r->role) != ACLCHECK_OK)
		return "the session's owner role may not connect to the database";
	if (superuser_arg(r->role) && !chat_registry_superuser_tools)
		return "the session's owner is a superuser and chat.enable_superuser_tools is off";
	if (r->false_starts >= MAX_FALSE_STARTS)
		return "no tool worker could be started as the session's owner role";
	return NULL;
}

/* Looks what waits, and fails what cannot be run; true if there was any. */
bool
chat_tool_judge(void)
{
	/* more of a role than there may be workers tell nothing */
	Datum		values[3] = {ObjectIdGetDatum(MyDatabaseId),
	Int32GetDatum(tool_workers)};
	uint64		n = chat_db_exec(&waiting_roles, values, NULL);
	Oid		   *waiting = palloc(sizeof(Oid) * (n + 1));
	bool		failed = false;

	for (int i = 0; i < nroles; i++)
		roles[i].calls = 0;
	for (uint64 row = 0; row < n; row++)
	{
		waiting[row] = chat_db_oid(row, 1);
		find_role(waiting[row])->calls = chat_db_int32(row, 2, 0);
	}
	for (uint64 i = 0; i < n; i++)
	{
		WaitingRole *r = find_role(waiting[i]);
		const char *reason = why_not(r);

		if (reason == NULL)
			continue;
		values[1] = ObjectIdGetDatum(r->role);
		values[2] = CStringGetTextDatum(reason);
		chat_db_exec(&ring_waiting, values, NULL);
		chat_db_exec(&fail_calls, values, NULL);
		r->calls = r->false_starts = 0;
		failed = true;
	}
	return failed;
}

/* Frees the slots of tool workers that have ended; counts those that live. */
static int
reap_tools(void)
{
	TimestampTz now = GetCurrentTimestamp();
	int			live = 0;

	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < chat_shared->nslots; i++)
	{
		ChatSlot   *slot = &chat_shared->slots[i];
		bool		lost = slot->state == CHAT_SLOT_STARTING &&
		TimestampDifferenceExceeds(slot->started_at, now, START_TIME);

		if (slot->state == CHAT_SLOT_FREE || slot->kind != CHAT_SLOT_TOOL ||
			slot->database != MyDatabaseId)
			continue;
		if (slot->state != CHAT_SLOT_EXITED && !lost)
		{
			live++;
			continue;
		}
		/* it may have left a call behind, whatever it was doing */
		orphans |= slot->exit == CHAT_EXIT_ERROR;
		if (slot->claimed)
			find_role(slot->role)->false_starts = 0;
		else if (slot->exit == CHAT_EXIT_ERROR)
		{
			WaitingRole *r = find_role(slot->role);

			r->false_starts++;
			r->not_before = chat_shmem_clock() + (100 << r->false_starts);
		}
		slot->state = CHAT_SLOT_FREE;
		slot->database = InvalidOid;
	}
	LWLockRelease(chat_shared->lock);
	return live;
}

/* Counts the tool workers of a role that have nothing yet. */
static int
count_starting(Oid role)
{
	int			n = 0;

	LWLockAcquire(chat_shared->lock, LW_SHARED);
	for (int i = 0; i < chat_shared->nslots; i++)
	{
		ChatSlot   *slot = &chat_shared->slots[i];

		if (slot->state != CHAT_SLOT_FREE && slot->state != CHAT_SLOT_EXITED &&
			slot->kind == CHAT_SLOT_TOOL && slot->database == MyDatabaseId &&
			slot->role == role && !slot->claimed)
			n++;
	}
	LWLockRelease(chat_shared->lock);
	return n;
}

/* Registers a tool worker; false when the server has no place for it. */
static bool
start_tool_worker(Oid role)
{
	Oid			extra[2] = {MyDatabaseId, role};
	int			slot = chat_shmem_take_slot(CHAT_SLOT_TOOL, MyDatabaseId,
											role);
	BackgroundWorker worker = {
		.bgw_name = "chat tool worker",
		.bgw_type = "chat tool worker",
		.bgw_flags = BGWORKER_SHMEM_ACCESS |
		BGWORKER_BACKEND_DATABASE_CONNECTION,
		.bgw_start_time = BgWorkerStart_RecoveryFinished,
		.bgw_restart_time = BGW_NEVER_RESTART,
		.bgw_library_name = "chat",
		.bgw_function_name = "chat_toolworker_main",
	};

	if (slot < 0)
		return false;
	worker.bgw_main_arg = Int32GetDatum(slot);
	memcpy(worker.bgw_extra, extra, sizeof(extra));
	if (RegisterDynamicBackgroundWorker(&worker, NULL))
		return true;
	chat_shmem_free_slot(slot);
	return false;
}

/* Returns how many more tool workers a role could have; later: not yet. */
static int
count_missing(const WaitingRole *r, bool *later)
{
	int			missing = r->calls > 0
	? r->calls - count_starting(r->role) : 0;

	if (missing <= 0 || r->not_before <= chat_shmem_clock())
		return missing;
	*later = true;
	return 0;
}

/*
 * Starts tool workers for the calls that chat_tool_judge() has found; true if
 * some could not be started now.  Roles have them in turn: none waits until
 * all calls of another have ended.
 */
bool
chat_tool_schedule(void)
{
	static int	turn = 0;
	int			live = reap_tools();
	int		   *missing = palloc(sizeof(int) * (nroles + 1));
	int			wanted = 0;
	bool		later = false;

	for (int i = 0; i < nroles; i++)
		wanted += missing[i] = Max(count_missing(&roles[i], &later), 0);
	/* a worker that ends rings: no need to come back for what is left */
	while (wanted > 0 && live < tool_workers)
	{
		int			i = turn++ % nroles;

		turn %= nroles;
		if (missing[i] == 0)
			continue;
		if (!start_tool_worker(roles[i].role))
			return true;
		missing[i]--;
		wanted--;
		live++;
	}
	return later;
}

/* True, once, if a tool worker has ended without ending its call. */
bool
chat_tool_orphans(void)
{
	bool		found;

	(void) reap_tools();
	found = orphans;
	orphans = false;
	return found;
}

/* Keeps a report that could not be told, unless there is a newer one. */
static void
keep_report(ChatSlot *slot, const pg_uuid_t *operation, const char *report)
{
	LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
	if (slot->kind == CHAT_SLOT_TOOL && slot->running &&
		slot->progress_len == 0 &&
		memcmp(&slot->operation, operation, UUID_LEN) == 0)
	{
		slot->progress_len = (int) strlen(report);
		memcpy(slot->progress, report, slot->progress_len);
	}
	LWLockRelease(chat_shared->lock);
}

/*
 * Writes what running tools of this database have reported.  A task that
 * somebody holds is told with the next report of any tool.
 */
int
chat_tool_progress(ChatEventBatch *batch, pg_uuid_t **tasks)
{
	int			n = 0;

	*tasks = palloc(sizeof(pg_uuid_t) * chat_shared->nslots);
	for (int i = 0; i < chat_shared->nslots; i++)
	{
		ChatSlot   *slot = &chat_shared->slots[i];
		char	   *report = NULL;
		pg_uuid_t	operation;

		LWLockAcquire(chat_shared->lock, LW_EXCLUSIVE);
		if (slot->kind == CHAT_SLOT_TOOL && slot->database == MyDatabaseId &&
			slot->progress_len > 0)
		{
			report = pnstrdup(slot->progress, slot->progress_len);
			operation = slot->operation;
			slot->progress_len = 0;
		}
		LWLockRelease(chat_shared->lock);
		if (report == NULL)
			continue;
		if (chat_turn_progress(&operation, report, batch, &(*tasks)[n]))
			n++;
		else
			keep_report(slot, &operation, report);
	}
	return n;
}
