/*
 * schema.h
 *		A function's signature as a tool: its arguments, and the JSON Schema
 *		that a model is shown.
 */
#ifndef CHAT_SCHEMA_H
#define CHAT_SCHEMA_H

#include "postgres.h"

#include "utils/jsonb.h"

/* An argument that a call gives. */
typedef struct ChatArgument
{
	char	   *name;			/* "" = it has none */
	Oid			type;
	bool		has_default;
	char	   *description;	/* NULL = none */
} ChatArgument;

typedef struct ChatSignature
{
	Oid			function;
	char	   *name;			/* without its schema */
	char	   *description;	/* from its comment; NULL = none */
	int			n;
	ChatArgument *arguments;
} ChatSignature;

/*
 * Reads the signature of a function, or raises why it cannot be a tool.  A
 * line "name: text" of the function's comment describes an argument.
 */
extern void chat_schema_read(Oid function, ChatSignature *signature);

/* The JSON Schema of the arguments; raises an error when one has no name. */
extern char *chat_schema_build(const ChatSignature *signature);

/* Raises an error unless it is the JSON Schema of an object. */
extern void chat_schema_check(Jsonb *parameters);

/*
 * Raises an error unless the function can be called with what the schema
 * names; one json or jsonb argument that it does not name takes the whole
 * object.
 */
extern void chat_schema_match(const ChatSignature *signature,
							  Jsonb *parameters);

#endif							/* CHAT_SCHEMA_H */
