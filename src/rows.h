/*
 * rows.h
 *		Rows that are appended without a plan; see rows.c.
 */
#ifndef CHAT_ROWS_H
#define CHAT_ROWS_H

#include "executor/tuptable.h"
#include "nodes/execnodes.h"
#include "utils/rel.h"

/* A table that is appended to; the caller provides the memory. */
typedef struct ChatRows
{
	Relation	rel;
	EState	   *estate;
	ResultRelInfo *result;
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

/* Opens a table of schema chat; its memory is current until it is closed. */
extern void chat_rows_open(ChatRows *rows, const char *table);

/* Appends rows, by pages. */
extern void chat_rows_append(ChatRows *rows, TupleTableSlot **slots, int n);

/* Closes the table; its lock is kept. */
extern void chat_rows_close(ChatRows *rows);

/*
 * Appends one row; its columns are given in the order of the table, those
 * that are left out are NULL.
 */
extern void chat_rows_insert(const char *table, const ChatColumn *columns,
							 int n);

#endif							/* CHAT_ROWS_H */
