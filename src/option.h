/*
 * option.h
 *		Options of chat's foreign-data wrappers: each wrapper has one table
 *		that says what a server and a user mapping may hold, and from which
 *		both the validator and the struct that the runtime reads are made.
 */
#ifndef CHAT_OPTION_H
#define CHAT_OPTION_H

#include "postgres.h"

#include "nodes/pg_list.h"

/* What a value must be, and what it becomes in the struct. */
typedef enum ChatOptionType
{
	CHAT_OPTION_TEXT,			/* char *: one line, not empty */
	CHAT_OPTION_SECRET,			/* char *: the same, never quoted in errors */
	CHAT_OPTION_PATH,			/* char *: an absolute file name */
	CHAT_OPTION_URL,			/* char *: http or https, nothing secret */
	CHAT_OPTION_REAL,			/* char *: a JSON number, as it was written */
	CHAT_OPTION_ENUM,			/* char *: one of choices */
	CHAT_OPTION_OBJECT,			/* char *: a JSON object */
	CHAT_OPTION_HEADER,			/* char *: a header's name */
	CHAT_OPTION_HEADERS,		/* char *: a JSON object of header: value */
	CHAT_OPTION_BOOL,			/* bool */
	CHAT_OPTION_INT,			/* int */
	CHAT_OPTION_TIME			/* int: milliseconds; written in seconds or
								 * with a unit */
} ChatOptionType;

/* Only a superuser may set it. */
#define CHAT_OPTION_SUPERUSER	0x01
/* Must be there. */
#define CHAT_OPTION_REQUIRED	0x02
/* Checked, but not in the struct. */
#define CHAT_OPTION_NO_FIELD	((size_t) -1)

typedef struct ChatOption
{
	const char *name;
	Oid			catalog;		/* where it belongs: pg_foreign_server or
								 * pg_user_mapping */
	ChatOptionType type;
	int			flags;
	size_t		offset;			/* of its field */
	double		min;			/* of numbers; times in milliseconds */
	double		max;
	const char *choices;		/* of an enum: "one, two" */
} ChatOption;

typedef struct ChatOptionTable
{
	const ChatOption *options;
	int			n;
} ChatOptionTable;

/* Raises what is wrong with the options of one object of the wrapper. */
extern void chat_option_validate(const ChatOptionTable *table, Oid catalog,
								 List *options);

/* Sets the fields of the options that are there, leaves the others. */
extern void chat_option_read(const ChatOptionTable *table, Oid catalog,
							 List *options, void *fields);

/* The value as it was written, or NULL. */
extern const char *chat_option_get(List *options, const char *name);

/* Whether a valid URL's host is this machine by its very name. */
extern bool chat_option_is_loopback(const char *url);

#endif							/* CHAT_OPTION_H */
