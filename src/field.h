/*
 * field.h
 *		Members of JSON objects as checked column values.
 *
 * A table of ChatFields says which members an object may have, what each
 * must be and in which column it goes.  Settings, messages and documents are
 * read this way.
 */
#ifndef CHAT_FIELD_H
#define CHAT_FIELD_H

#include "postgres.h"

#include "utils/jsonb.h"

/* What a member must be, and as what it is handed over. */
typedef enum ChatFieldKind
{
	CHAT_FIELD_TEXT,			/* string: text */
	CHAT_FIELD_NAME,			/* string that fits into a name: name */
	CHAT_FIELD_UUID,			/* string: uuid */
	CHAT_FIELD_TIME,			/* string: timestamptz */
	CHAT_FIELD_BOOL,			/* boolean: bool */
	CHAT_FIELD_INTEGER,			/* whole number from min to max: bigint */
	CHAT_FIELD_NUMBER,			/* number from min to max: double */
	CHAT_FIELD_OBJECT,			/* object: jsonb */
	CHAT_FIELD_ARRAY,			/* array: jsonb */
	CHAT_FIELD_OBJECTS,			/* array of objects: jsonb */
	CHAT_FIELD_STRINGS,			/* array of strings: jsonb */
	CHAT_FIELD_CHOICE,			/* string or object: jsonb */
	CHAT_FIELD_CONTENT,			/* string: text; array: jsonb, in the column
								 * that follows */
	CHAT_FIELD_ANY				/* anything: jsonb */
} ChatFieldKind;

#define CHAT_FIELD_NO_COLUMN (-1)	/* checked only */
#define CHAT_FIELD_MAX ((double) PG_INT64_MAX)	/* whatever a bigint holds */

typedef struct ChatField
{
	const char *name;
	ChatFieldKind kind;
	int			column;
	double		min;			/* of numbers */
	double		max;
} ChatField;

/* entries of a table: without and with a range */
#define CHAT_FIELD(name, kind, column) {name, kind, column, 0, 0}
#define CHAT_FIELD_RANGE(name, kind, column, min, max) \
	{name, kind, column, min, max}

typedef struct ChatFieldTable
{
	const char *what;			/* "setting": in errors about names */
	const ChatField *fields;
	int			n;
	bool		open;			/* other members are ignored */
	bool		null_is_absent; /* a JSON null stands for nothing at all */
} ChatFieldTable;

/*
 * Reads an object into values and nulls, which the caller has set to what
 * stands for absent (all NULL).  prefix, such as "message at index 3: ",
 * opens the texts of errors (22023).  values may be NULL: only checks.
 */
extern void chat_field_read(const ChatFieldTable *table,
							JsonbContainer *object, const char *prefix,
							Datum *values, bool *nulls);

/*
 * Raises an error if the numbers of a value are long when they are written
 * out: 1e100000 has ten bytes in a request, but not where we write it.
 */
extern void chat_field_check_numbers(JsonbContainer *json, const char *name,
									 const char *prefix);

/*
 * Raises an error if a value is nested deeper than what goes into a request
 * may be: it would be left out of it.
 */
extern void chat_field_check_depth(JsonbContainer *json, const char *name,
								   const char *prefix);

/* Checks a value that was not a member of an object. */
extern void chat_field_check(const ChatField *field, Jsonb *json);

#endif							/* CHAT_FIELD_H */
