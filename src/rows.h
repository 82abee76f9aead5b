/*
 * rows.h
 *		Rows that are read and appended without a plan; see rows.c.
 */
#ifndef CHAT_ROWS_H
#define CHAT_ROWS_H

#include "access/genam.h"
#include "executor/tuptable.h"
#include "utils/rel.h"
#include "utils/snapshot.h"
#include "utils/uuid.h"

/* A table that is appended to; the caller provides the memory. */
typedef struct ChatRows
{
	Relation	rel;
	struct Known *known;		/* rows.c's own */
	bool		triggers;		/* it has some that are to be fired */
	MemoryContext memory;		/* until it is closed */
	MemoryContext outer;		/* that was current before */
} ChatRows;

/* A column of a row, by its name. */
typedef struct ChatColumn
{
	const char *name;
	Datum		value;
	bool		isnull;
} ChatColumn;

#define CHAT_COLUMN(name, value) {name, value, false}

/*
 * Opens a table of schema chat; its memory is current until it is closed.
 * With triggers those that somebody has added are fired.
 */
extern void chat_rows_open(ChatRows *rows, const char *table, bool triggers);

/*
 * Returns a new row, not yet appended; its columns are given in the order of
 * the table, those that are left out have their defaults, or are NULL.
 */
extern TupleTableSlot *chat_rows_slot(ChatRows *rows,
									  const ChatColumn *columns, int n);

/* Appends rows, by pages. */
extern void chat_rows_append(ChatRows *rows, TupleTableSlot **slots, int n);

/* Closes the table; its lock is kept. */
extern void chat_rows_close(ChatRows *rows);

/* Appends one row. */
extern void chat_rows_insert(const char *table, const ChatColumn *columns,
							 int n);

/* Rows of one key; the caller provides the memory. */
typedef struct ChatProbe
{
	Relation	table;
	Relation	index;
	Snapshot	snapshot;
	IndexScanDesc scan;
} ChatProbe;

/* Returns the OID of a relation of schema chat. */
extern Oid	chat_rows_oid(const char *name);

/* Opens a table of schema chat, to be closed by table_close(). */
extern Relation chat_rows_table(const char *name, LOCKMODE lock);

/* Begins to read the rows of a table that an index has under a key. */
extern void chat_rows_probe(ChatProbe *probe, Relation table,
							const char *index, const pg_uuid_t *key,
							Snapshot snapshot);

/* Reads the next row into a slot; false if there is none. */
extern bool chat_rows_next(ChatProbe *probe, TupleTableSlot *row);

/*
 * Locks the row that was read as FOR NO KEY UPDATE does, having waited for
 * those who have it: the slot holds it as it is then.  False if it is gone.
 */
extern bool chat_rows_lock(ChatProbe *probe, TupleTableSlot *row);

/* Ends it; locks of tables and rows are kept. */
extern void chat_rows_end(ChatProbe *probe);

/* Returns a column of a row. */
extern Datum chat_rows_get(TupleTableSlot *row, const char *column,
						   bool *isnull);

#endif							/* CHAT_ROWS_H */
