/*
 * rows.c
 *		Reading and appending rows without a plan, as the catalogs' own code and
 *		COPY do: for the rows of events, of turns, and of their messages.
 *
 * NOT NULL, CHECKs and unique indexes hold.  Domains, foreign keys and rules
 * have no part in it: whoever appends says what they would have, and holds the
 * row that a key refers to locked.  Triggers have where it is asked for.  A
 * statement costs several times as much, most of it before its first row.
 *
 * Owns what is known of the tables that were opened: which indexes there are,
 * and their conditions, ready to be tested.  It is local to the process,
 * outlives transactions, and is forgotten when the server says that a table
 * is another.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_am.h"
#include "catalog/pg_trigger.h"
#include "commands/trigger.h"
#include "executor/executor.h"
#include "executor/nodeModifyTable.h"
#include "nodes/makefuncs.h"
#include "rewrite/rewriteHandler.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "compat.h"
#include "rows.h"

/* chat_task, chat_job, chat_message and the slots of chat_event */
#define MAX_TABLES 16

/* What is known of a table.  Nobody opens one that he has open. */
typedef struct Known
{
	char		name[NAMEDATALEN];
	Oid			oid;			/* InvalidOid = nothing is known */
	bool		stale;			/* the table is another since */
	bool		open;			/* or an error came while it was: all is void */
	bool		fires;			/* it has triggers for an append to fire */
	MemoryContext context;		/* of all below */
	EState	   *estate;
	ResultRelInfo *result;
	int			nindexes;
	Oid		   *indexes;
} Known;

static Known tables[MAX_TABLES];

/* Marks what is known of a table as old; of all where oid is invalid. */
static void
mark_stale(Datum arg, Oid oid)
{
	for (int i = 0; i < MAX_TABLES; i++)
		if (!OidIsValid(oid) || tables[i].oid == oid)
			tables[i].stale = true;
}

/* Marks all as old: a function that a condition calls may be another. */
static void
mark_all_stale(Datum arg, int cacheid, uint32 hashvalue)
{
	mark_stale(arg, InvalidOid);
}

/* Finds the place of a table among those that are known, or one for it. */
static Known *
find_known(const char *name)
{
	static bool registered = false;

	if (!registered)
	{
		CacheRegisterRelcacheCallback(mark_stale, (Datum) 0);
		CacheRegisterSyscacheCallback(PROCOID, mark_all_stale, (Datum) 0);
	}
	registered = true;
	for (int i = 0; i < MAX_TABLES; i++)
	{
		if (tables[i].name[0] == '\0')
			strlcpy(tables[i].name, name, NAMEDATALEN);
		if (strcmp(tables[i].name, name) == 0)
			return &tables[i];
	}
	elog(ERROR, "too many tables are appended to: \"%s\"", name);
}

/* Forgets what is known of a table. */
static void
forget(Known *k)
{
	if (k->context != NULL)
		MemoryContextDelete(k->context);
	k->context = NULL;
	k->estate = NULL;
	k->result = NULL;
	k->indexes = NULL;
	k->nindexes = 0;
	k->oid = InvalidOid;
}

/*
 * Opens a table of which all is known, and its indexes; NULL if it has to be
 * looked at.  The lock brings news of it: what is known counts after that.
 */
static Relation
reopen(Known *k)
{
	Relation	rel;

	if (!OidIsValid(k->oid) || k->stale || k->open)
		return NULL;
	rel = try_table_open(k->oid, RowExclusiveLock);
	if (rel != NULL && k->stale)
	{
		table_close(rel, RowExclusiveLock);
		rel = NULL;
	}
	if (rel == NULL)
		return NULL;
	k->result->ri_RelationDesc = rel;
	for (int i = 0; i < k->nindexes; i++)
		k->result->ri_IndexRelationDescs[i] = index_open(k->indexes[i],
														 RowExclusiveLock);
	return rel;
}

/*
 * True if a table has triggers that an append has to fire: any but that of the
 * foreign key which all have, as who appends holds the session locked.
 */
static bool
has_triggers(const ResultRelInfo *result)
{
	const TriggerDesc *desc = result->ri_TrigDesc;
	Oid			session = chat_rows_oid("chat_session");

	for (int i = 0; desc != NULL && i < desc->numtriggers; i++)
	{
		const Trigger *t = &desc->triggers[i];

		if (TRIGGER_FOR_INSERT(t->tgtype) &&
			!(t->tgfoid == F_RI_FKEY_CHECK_INS &&
			  t->tgconstrrelid == session))
			return true;
	}
	return false;
}

/*
 * Opens a table and looks at it.  What an index keeps beside its relation
 * between two rows is known of a B-tree's alone (nothing): where there are
 * others, or triggers to fire, the table is looked at each time.
 */
static Relation
look(Known *k, bool triggers)
{
	MemoryContext old;
	Relation	rel;
	bool		keep;

	forget(k);
	k->stale = false;
	k->open = true;
	rel = table_openrv(makeRangeVar("chat", k->name, -1), RowExclusiveLock);
	k->oid = RelationGetRelid(rel);
	k->context = AllocSetContextCreate(TopMemoryContext, "chat table",
									   ALLOCSET_SMALL_SIZES);
	old = MemoryContextSwitchTo(k->context);
	k->estate = CreateExecutorState();
	MemoryContextSwitchTo(k->estate->es_query_cxt);
	k->result = makeNode(ResultRelInfo);
	InitResultRelInfo(k->result, rel, 0, NULL, 0);	/* in no range table */
	ExecOpenIndices(k->result, false);
	k->fires = has_triggers(k->result);
	keep = !(triggers && k->fires);
	k->nindexes = k->result->ri_NumIndices;
	k->indexes = palloc(sizeof(Oid) * Max(k->nindexes, 1));
	for (int i = 0; i < k->nindexes; i++)
	{
		Relation	index = k->result->ri_IndexRelationDescs[i];

		k->indexes[i] = RelationGetRelid(index);
		keep = keep && index->rd_rel->relam == BTREE_AM_OID;
	}
	MemoryContextSwitchTo(old);
	if (!keep)
		k->oid = InvalidOid;
	return rel;
}

/*
 * Opens a table of schema chat; its memory is current until it is closed.
 * With triggers those that somebody has added are fired.
 */
void
chat_rows_open(ChatRows *rows, const char *table, bool triggers)
{
	Known	   *k = find_known(table);

	rows->rel = reopen(k);
	if (rows->rel == NULL)
		rows->rel = look(k, triggers);
	k->open = true;
	rows->known = k;
	rows->triggers = triggers && k->fires;
	rows->outer = CurrentMemoryContext;
	rows->memory = AllocSetContextCreate(CurrentMemoryContext, "chat rows",
										 ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(rows->memory);
}

/* Makes a row what its table's declaration says, or raises an error. */
static void
complete(ChatRows *rows, TupleTableSlot *slot)
{
	EState	   *estate = rows->known->estate;
	ResultRelInfo *result = rows->known->result;
	TupleConstr *constr = rows->rel->rd_att->constr;

	slot->tts_tableOid = RelationGetRelid(rows->rel);
	if (constr && constr->has_generated_stored)
		ExecComputeStoredGenerated(result, estate, slot, CMD_INSERT);
	if (constr)
		ExecConstraints(result, slot, estate);
}

/* Appends rows, by pages. */
static void
append_plain(ChatRows *rows, TupleTableSlot **slots, int n)
{
	EState	   *estate = rows->known->estate;
	ResultRelInfo *result = rows->known->result;
	CommandId	command = GetCurrentCommandId(true);

	for (int i = 0; i < n; i++)
		complete(rows, slots[i]);
	if (n == 1)
		table_tuple_insert(rows->rel, slots[0], command, 0, NULL);
	else
		table_multi_insert(rows->rel, slots, n, command, 0, NULL);
	for (int i = 0; i < n; i++)
		(void) chat_insert_index_tuples(result, slots[i], estate);
}

/* Appends rows one by one, as INSERT would: with all of the triggers. */
static void
append_fired(ChatRows *rows, TupleTableSlot **slots, int n)
{
	EState	   *estate = rows->known->estate;
	ResultRelInfo *result = rows->known->result;
	TriggerDesc *desc = result->ri_TrigDesc;
	TransitionCaptureState *capture;

	AfterTriggerBeginQuery();
	capture = MakeTransitionCaptureState(desc, RelationGetRelid(rows->rel),
										 CMD_INSERT);
	ExecBSInsertTriggers(estate, result);
	for (int i = 0; i < n; i++)
	{
		List	   *recheck;

		slots[i]->tts_tableOid = RelationGetRelid(rows->rel);
		if (desc->trig_insert_before_row &&
			!ExecBRInsertTriggers(estate, result, slots[i]))
			continue;
		complete(rows, slots[i]);
		table_tuple_insert(rows->rel, slots[i], GetCurrentCommandId(true), 0,
						   NULL);
		recheck = chat_insert_index_tuples(result, slots[i], estate);
		ExecARInsertTriggers(estate, result, slots[i], recheck, capture);
	}
	ExecASInsertTriggers(estate, result, capture);
	AfterTriggerEndQuery(estate);
	ExecCloseResultRelations(estate);
	estate->es_trig_target_relations = NIL;
}

/* Appends rows. */
void
chat_rows_append(ChatRows *rows, TupleTableSlot **slots, int n)
{
	EState	   *estate = rows->known->estate;

	MemoryContextSwitchTo(GetPerTupleMemoryContext(estate));
	if (rows->triggers)
		append_fired(rows, slots, n);
	else
		append_plain(rows, slots, n);
	MemoryContextSwitchTo(rows->memory);
	ResetPerTupleExprContext(estate);
}

/* Closes the table; its lock is kept. */
void
chat_rows_close(ChatRows *rows)
{
	rows->known->open = false;
	ExecCloseIndices(rows->known->result);
	table_close(rows->rel, NoLock);
	MemoryContextSwitchTo(rows->outer);
	MemoryContextDelete(rows->memory);
}

/*
 * Puts the default of a column into a slot: of one that an administrator has
 * added, as all others that have one are given.  It is made ready in the memory
 * of what is known of the table, which therefore is not kept.
 */
static void
fill_default(ChatRows *rows, TupleTableSlot *slot, int column)
{
	EState	   *estate = rows->known->estate;
	Node	   *expr = build_column_default(rows->rel, column + 1);

	if (expr == NULL)
		return;
	rows->known->stale = true;
	slot->tts_values[column] =
		ExecEvalExprSwitchContext(ExecPrepareExpr((Expr *) expr, estate),
								  GetPerTupleExprContext(estate),
								  &slot->tts_isnull[column]);
}

/* Puts the columns into a slot; raises an error if there is no such column. */
static void
fill_slot(ChatRows *rows, TupleTableSlot *slot, const ChatColumn *columns,
		  int n)
{
	TupleDesc	desc = slot->tts_tupleDescriptor;
	int			at = 0;

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);
		bool		given = at < n &&
			strcmp(NameStr(att->attname), columns[at].name) == 0;

		slot->tts_isnull[i] = !given || columns[at].isnull;
		slot->tts_values[i] = slot->tts_isnull[i] ? (Datum) 0
			: columns[at].value;
		if (!given && att->atthasdef && att->attgenerated == '\0')
			fill_default(rows, slot, i);
		at += given;
	}
	if (at < n)
		elog(ERROR, "there is no column \"%s\" here", columns[at].name);
	ExecStoreVirtualTuple(slot);
}

/*
 * Returns a new row, not yet appended; its columns are given in the order of
 * the table, those that are left out have their defaults, or are NULL.
 */
TupleTableSlot *
chat_rows_slot(ChatRows *rows, const ChatColumn *columns, int n)
{
	TupleTableSlot *slot = table_slot_create(rows->rel, NULL);

	fill_slot(rows, slot, columns, n);
	return slot;
}

/* Appends one row. */
void
chat_rows_insert(const char *table, const ChatColumn *columns, int n)
{
	ChatRows	rows;
	TupleTableSlot *slot;

	chat_rows_open(&rows, table, false);
	slot = chat_rows_slot(&rows, columns, n);
	chat_rows_append(&rows, &slot, 1);
	ExecDropSingleTupleTableSlot(slot);
	chat_rows_close(&rows);
	CommandCounterIncrement();
}

/* Returns the OID of a relation of schema chat. */
Oid
chat_rows_oid(const char *name)
{
	Oid			oid = get_relname_relid(name, get_namespace_oid("chat", false));

	if (!OidIsValid(oid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation \"chat.%s\" does not exist", name)));
	return oid;
}

/* Opens a table of schema chat, to be closed by table_close(). */
Relation
chat_rows_table(const char *name, LOCKMODE lock)
{
	return table_open(chat_rows_oid(name), lock);
}

/* Begins to read the rows of a table that an index has under a key. */
void
chat_rows_probe(ChatProbe *probe, Relation table, const char *index,
				const pg_uuid_t *key, Snapshot snapshot)
{
	ScanKeyData first;

	probe->table = table;
	probe->index = index_open(chat_rows_oid(index), AccessShareLock);
	probe->snapshot = RegisterSnapshot(snapshot);
	probe->scan = chat_index_beginscan(table, probe->index, probe->snapshot, 1);
	ScanKeyInit(&first, 1, BTEqualStrategyNumber, F_UUID_EQ,
				UUIDPGetDatum(key));
	index_rescan(probe->scan, &first, 1, NULL, 0);
}

/* Reads the next row into a slot; false if there is none. */
bool
chat_rows_next(ChatProbe *probe, TupleTableSlot *row)
{
	return index_getnext_slot(probe->scan, ForwardScanDirection, row);
}

/*
 * Locks the row that was read as FOR NO KEY UPDATE does, having waited for
 * those who have it: the slot holds it as it is then.  False if it is gone.
 */
bool
chat_rows_lock(ChatProbe *probe, TupleTableSlot *row)
{
	ItemPointerData tid = row->tts_tid;
	uint8		flags = TUPLE_LOCK_FLAG_LOCK_UPDATE_IN_PROGRESS;
	TM_FailureData failure;
	TM_Result	result;

	if (!IsolationUsesXactSnapshot())
		flags |= TUPLE_LOCK_FLAG_FIND_LAST_VERSION;
	result = table_tuple_lock(probe->table, &tid, probe->snapshot, row,
							  GetCurrentCommandId(true),
							  LockTupleNoKeyExclusive, LockWaitBlock, flags,
							  &failure);
	if (result == TM_Ok)
		return true;
	if (IsolationUsesXactSnapshot() &&
		(result == TM_Updated || result == TM_Deleted))
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("could not serialize access due to concurrent %s",
						result == TM_Updated ? "update" : "delete")));
	if (result != TM_Deleted && result != TM_SelfModified)
		elog(ERROR, "unexpected result of locking a row: %d", (int) result);
	return false;
}

/* Ends it; locks of tables and rows are kept. */
void
chat_rows_end(ChatProbe *probe)
{
	index_endscan(probe->scan);
	UnregisterSnapshot(probe->snapshot);
	index_close(probe->index, NoLock);
}

/* Returns a column of a row. */
Datum
chat_rows_get(TupleTableSlot *row, const char *column, bool *isnull)
{
	TupleDesc	desc = row->tts_tupleDescriptor;

	for (int i = 0; i < desc->natts; i++)
		if (strcmp(NameStr(TupleDescAttr(desc, i)->attname), column) == 0)
			return slot_getattr(row, i + 1, isnull);
	elog(ERROR, "there is no column \"%s\" here", column);
}
