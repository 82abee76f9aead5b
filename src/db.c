/*
 * db.c
 *		Transactions, prepared statements, and the switch to the extension's
 *		owner.
 *
 * Owns: the cached identity of the extension in this database (who owns it),
 * which a syscache callback invalidates, and the plans of all ChatStmts.
 * Everything here is local to the process.
 */
#include "postgres.h"

#include <time.h>

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/dependency.h"
#include "catalog/indexing.h"
#include "catalog/namespace.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_namespace.h"
#include "commands/extension.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "replication/syncrep.h"
#include "replication/walsender.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "compat.h"
#include "db.h"
#include "json.h"

const ChatArrayKind chat_int4s = {INT4OID, 4, true, TYPALIGN_INT};
const ChatArrayKind chat_int8s = {INT8OID, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE};
const ChatArrayKind chat_bools = {BOOLOID, 1, true, TYPALIGN_CHAR};
const ChatArrayKind chat_oids = {OIDOID, 4, true, TYPALIGN_INT};
const ChatArrayKind chat_times = {TIMESTAMPTZOID, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE};
const ChatArrayKind chat_uuids = {UUIDOID, UUID_LEN, false, TYPALIGN_CHAR};
const ChatArrayKind chat_texts = {TEXTOID, -1, false, TYPALIGN_INT};

#define PINNED_SEARCH_PATH "pg_catalog, pg_temp"

static char *user_id_setting = NULL;
static Oid	extension_owner = InvalidOid;	/* InvalidOid = look it up */
static ChatScope worker_scope;

/* Forgets who owns the extension when a schema changes. */
static void
forget_owner(Datum arg, int cacheid, uint32 hashvalue)
{
	extension_owner = InvalidOid;
}

/* Declares the settings that belong to the data layer. */
void
chat_db_init(void)
{
	DefineCustomStringVariable("chat.user_id",
							   "Application user that this session of the database works for.",
							   "When it is not empty, only chat sessions of this user are seen.",
							   &user_id_setting, "", PGC_USERSET, 0,
							   NULL, NULL, NULL);
	CacheRegisterSyscacheCallback(NAMESPACEOID, forget_owner, (Datum) 0);
}

/*
 * Returns the role that owns schema chat, having checked that the schema
 * belongs to the extension; InvalidOid when there is no such extension.
 */
Oid
chat_db_extension_owner(void)
{
	Oid			extension;
	Oid			schema;
	HeapTuple	tuple;

	if (OidIsValid(extension_owner))
		return extension_owner;
	extension = get_extension_oid("chat", true);
	schema = get_namespace_oid("chat", true);
	if (!OidIsValid(extension) || !OidIsValid(schema) ||
		getExtensionOfObject(NamespaceRelationId, schema) != extension)
		return InvalidOid;
	tuple = SearchSysCache1(NAMESPACEOID, ObjectIdGetDatum(schema));
	if (!HeapTupleIsValid(tuple))
		return InvalidOid;
	extension_owner = ((Form_pg_namespace) GETSTRUCT(tuple))->nspowner;
	ReleaseSysCache(tuple);
	return extension_owner;
}

/*
 * True if the extension's objects are of the version that this library is
 * for; says what differs otherwise (T66).
 */
bool
chat_db_same_version(void)
{
	Relation	rel = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	char	   *version = NULL;

	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber,
				F_NAMEEQ, CStringGetDatum("chat"));
	scan = systable_beginscan(rel, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		bool		isnull;
		Datum		value = heap_getattr(tuple, Anum_pg_extension_extversion,
										 RelationGetDescr(rel), &isnull);

		if (!isnull)
			version = TextDatumGetCString(value);
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	if (version == NULL || strcmp(version, CHAT_VERSION) == 0)
		return version != NULL;
	ereport(WARNING,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("extension \"chat\" has version %s, its library %s",
					version, CHAT_VERSION),
			 errdetail("No job is run until they are the same."),
			 errhint("Run ALTER EXTENSION chat UPDATE, or restart the server after an update of the library.")));
	return false;
}

/* Returns the caller's setting chat.user_id, "" if it is unset. */
const char *
chat_db_user(void)
{
	return user_id_setting ? user_id_setting : "";
}

/*
 * Opens SPI and works as the extension's owner with a pinned search_path.
 * An error on the way is undone by the abort of the (sub)transaction.
 */
void
chat_db_enter(ChatScope *scope)
{
	Oid			owner = chat_db_extension_owner();

	if (!OidIsValid(owner))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("extension \"chat\" is not installed in this database"),
				 errhint("Run CREATE EXTENSION chat.")));
	scope->caller = GetUserId();
	scope->user = chat_db_user();
	GetUserIdAndSecContext(&scope->saved_user, &scope->saved_context);
	SPI_connect();
	SetUserIdAndSecContext(owner, scope->saved_context |
						   SECURITY_LOCAL_USERID_CHANGE |
						   SECURITY_RESTRICTED_OPERATION);
	scope->guc_level = NewGUCNestLevel();
	(void) set_config_option("search_path", PINNED_SEARCH_PATH,
							 PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	/* probes by key, also where a table was small when it was planned */
	(void) set_config_option("enable_seqscan", "off",
							 PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	/* the price of a sequential scan is none that is worth a compiler */
	(void) set_config_option("jit", "off",
							 PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
}

/* Undoes chat_db_enter(). */
void
chat_db_leave(ChatScope *scope)
{
	AtEOXact_GUC(false, scope->guc_level);
	SetUserIdAndSecContext(scope->saved_user, scope->saved_context);
	SPI_finish();
}

/* Fills the parameters $2 and $3 of CHAT_VISIBLE (values[1], values[2]). */
void
chat_db_caller(const ChatScope *scope, Datum *values)
{
	values[1] = ObjectIdGetDatum(scope->caller);
	values[2] = CStringGetTextDatum(scope->user);
}

/* Builds an array; in one of texts, (Datum) 0 is NULL. */
Datum
chat_db_array(const ChatArrayKind *kind, Datum *values, int n)
{
	bool	   *nulls = palloc0(sizeof(bool) * Max(n, 1));
	int			lower = 1;

	for (int i = 0; kind->type == TEXTOID && i < n; i++)
		nulls[i] = values[i] == (Datum) 0;
	return PointerGetDatum(construct_md_array(values, nulls, 1, &n, &lower,
											  kind->type, kind->len,
											  kind->byval, kind->align));
}

/* Runs a statement, preparing it the first time; returns the row count. */
static uint64
execute(ChatStmt *stmt, Datum *values, const char *nulls, Snapshot snapshot)
{
	int			rc;

	if (stmt->plan == NULL)
	{
		/* planned once: planning costs more than most of them take */
		SPIPlanPtr	plan = SPI_prepare_cursor(stmt->sql, stmt->ntypes,
											  (Oid *) stmt->types,
											  CURSOR_OPT_GENERIC_PLAN);

		if (plan == NULL || SPI_keepplan(plan) != 0)
			elog(ERROR, "could not prepare statement: %s: %s",
				 SPI_result_code_string(SPI_result), stmt->sql);
		stmt->plan = plan;
	}
	rc = SPI_execute_snapshot(stmt->plan, values, nulls, snapshot,
							  InvalidSnapshot, false, true, 0);
	if (rc < 0)
		elog(ERROR, "could not execute statement: %s: %s",
			 SPI_result_code_string(rc), stmt->sql);
	return SPI_processed;
}

/* Runs a statement in the transaction's snapshot. */
uint64
chat_db_exec(ChatStmt *stmt, Datum *values, const char *nulls)
{
	return execute(stmt, values, nulls, InvalidSnapshot);
}

/*
 * Runs a statement that must see what others have committed by now, also
 * where the transaction has one snapshot for all of its statements: as the
 * checks of foreign keys do.
 */
uint64
chat_db_exec_now(ChatStmt *stmt, Datum *values, const char *nulls)
{
	return execute(stmt, values, nulls, IsolationUsesXactSnapshot() ?
				   GetLatestSnapshot() : InvalidSnapshot);
}

/*
 * Parses a text of unknown origin; NULL if it is not JSON that jsonb can hold.
 * Nothing but memory is touched, so the error needs no subtransaction.
 */
Jsonb *
chat_db_parse_json(const char *text)
{
	MemoryContext old = CurrentMemoryContext;
	Jsonb	   *volatile result = NULL;
	size_t		need;

	if (chat_json_check(text, strlen(text), &need) == CHAT_JSON_TOO_DEEP)
		return NULL;
	PG_TRY();
	{
		result = DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
													CStringGetDatum(text)));
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(old);
		FlushErrorState();
	}
	PG_END_TRY();
	return result;
}

/* Starts a transaction of a background worker, working as the owner. */
void
chat_db_begin(const char *activity)
{
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	/* a tool worker's role may have other defaults */
	XactReadOnly = false;
	XactIsoLevel = XACT_READ_COMMITTED;
	PushActiveSnapshot(GetTransactionSnapshot());
	chat_db_enter(&worker_scope);
	pgstat_report_activity(STATE_RUNNING, activity);
}

/*
 * Commits what chat_db_begin() started and flushes the statistics.  A commit
 * that is not durable does not wait for the log: a crash may undo it.
 */
void
chat_db_commit(bool durable)
{
	chat_db_leave(&worker_scope);
	PopActiveSnapshot();
	if (!durable)
		(void) set_config_option("synchronous_commit", "off",
								 PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_LOCAL, true, 0, false);
	CommitTransactionCommand();
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/* True if a durable commit would wait for a standby that is not there. */
bool
chat_db_standby_missing(void)
{
	SyncRepStandbyData *standbys;
	int			n;

	if (!SyncRepRequested() || SyncRepConfig == NULL)
		return false;
	n = SyncRepGetCandidateStandbys(&standbys);
	pfree(standbys);
	return n < SyncRepConfig->num_sync;
}

/*
 * Ends a worker's failed transaction.  The caller has caught the error and
 * copied what it wants to know of it.
 */
void
chat_db_abort(void)
{
	AbortCurrentTransaction();
	pgstat_report_activity(STATE_IDLE, NULL);
}

/*
 * Makes new ids, of version 7 (RFC 9562): the time in 4096ths of a millisecond
 * and 62 random bits.  What is made now stands together in the indexes, at
 * their end, whatever else they hold.  To ask for the random bits of many costs
 * what it does for one.
 */
void
chat_db_new_ids(pg_uuid_t *ids, int n)
{
	struct timespec now;
	uint64		ms;
	uint32		fraction;

	if (!pg_strong_random(ids, sizeof(pg_uuid_t) * n))
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("could not generate random values")));
	clock_gettime(CLOCK_REALTIME, &now);
	ms = (uint64) now.tv_sec * 1000 + now.tv_nsec / 1000000;
	fraction = (uint32) ((uint64) (now.tv_nsec % 1000000) * 4096 / 1000000);
	for (int i = 0; i < n; i++)
	{
		unsigned char *id = ids[i].data;

		for (int k = 0; k < 6; k++)
			id[k] = (unsigned char) (ms >> (40 - 8 * k));
		id[6] = 0x70 | (unsigned char) (fraction >> 8);
		id[7] = (unsigned char) fraction;
		id[8] = (id[8] & 0x3f) | 0x80;
	}
}
