/*
 * rows.c
 *		Appending rows without a plan, as COPY does: for the rows of events, and
 *		of the turns that are queued.
 *
 * NOT NULL, CHECKs and unique indexes hold.  Domains, defaults, foreign keys,
 * triggers and rules have no part in it: whoever appends says what they would
 * have, and holds the row that a key refers to locked.  A statement costs
 * several times as much, most of it before its first row.
 *
 * Owns nothing but the table that is open.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "executor/executor.h"
#include "nodes/makefuncs.h"
#include "utils/memutils.h"

#include "compat.h"
#include "rows.h"

/* Opens a table of schema chat; its memory is current until it is closed. */
void
chat_rows_open(ChatRows *rows, const char *table)
{
	rows->estate = CreateExecutorState();
	rows->outer = MemoryContextSwitchTo(rows->estate->es_query_cxt);
	rows->rel = table_openrv(makeRangeVar("chat", pstrdup(table), -1),
							 RowExclusiveLock);
	rows->result = makeNode(ResultRelInfo);
	InitResultRelInfo(rows->result, rows->rel, 0, NULL, 0);	/* in no range table */
	ExecOpenIndices(rows->result, false);
}

/* Appends rows, by pages. */
void
chat_rows_append(ChatRows *rows, TupleTableSlot **slots, int n)
{
	MemoryContextSwitchTo(GetPerTupleMemoryContext(rows->estate));
	for (int i = 0; i < n && rows->rel->rd_att->constr; i++)
		ExecConstraints(rows->result, slots[i], rows->estate);
	table_multi_insert(rows->rel, slots, n, GetCurrentCommandId(true), 0,
					   NULL);
	for (int i = 0; i < n; i++)
		(void) chat_insert_index_tuples(rows->result, slots[i], rows->estate);
	MemoryContextSwitchTo(rows->estate->es_query_cxt);
	ResetPerTupleExprContext(rows->estate);
}

/* Closes the table; its lock is kept. */
void
chat_rows_close(ChatRows *rows)
{
	ExecCloseIndices(rows->result);
	table_close(rows->rel, NoLock);
	MemoryContextSwitchTo(rows->outer);
	FreeExecutorState(rows->estate);
}

/* Puts the columns into a slot; raises an error if there is no such column. */
static void
fill_slot(TupleTableSlot *slot, const ChatColumn *columns, int n)
{
	TupleDesc	desc = slot->tts_tupleDescriptor;
	int			at = 0;

	for (int i = 0; i < desc->natts; i++)
	{
		bool		given = at < n &&
			strcmp(NameStr(TupleDescAttr(desc, i)->attname),
				   columns[at].name) == 0;

		slot->tts_isnull[i] = !given || columns[at].isnull;
		slot->tts_values[i] = slot->tts_isnull[i] ? (Datum) 0
			: columns[at].value;
		at += given;
	}
	if (at < n)
		elog(ERROR, "there is no column \"%s\" here", columns[at].name);
	ExecStoreVirtualTuple(slot);
}

/*
 * Appends one row; its columns are given in the order of the table, those
 * that are left out are NULL.
 */
void
chat_rows_insert(const char *table, const ChatColumn *columns, int n)
{
	ChatRows	rows;
	TupleTableSlot *slot;

	chat_rows_open(&rows, table);
	slot = table_slot_create(rows.rel, NULL);
	fill_slot(slot, columns, n);
	chat_rows_append(&rows, &slot, 1);
	ExecDropSingleTupleTableSlot(slot);
	chat_rows_close(&rows);
	CommandCounterIncrement();
}
