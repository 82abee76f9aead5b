/*
 * schema.c
 *		A function's signature as a tool.
 *
 * Owns nothing: it reads the catalogs as the current role and builds text.
 * Of the types of arguments it says what a JSON value must look like so that
 * the cast to the type takes it.
 */
#include "postgres.h"

#include <ctype.h>

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/pg_enum.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "commands/comment.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/json.h"
#include "utils/lsyscache.h"
#include "utils/regproc.h"
#include "utils/rel.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

#include "compat.h"
#include "schema.h"

/* The schemas of types that are neither built of others nor plain text. */
static const struct
{
	Oid			type;
	const char *schema;
}			known_types[] =
{
	{BOOLOID, "\"type\":\"boolean\""},
	{INT2OID, "\"type\":\"integer\""},
	{INT4OID, "\"type\":\"integer\""},
	{INT8OID, "\"type\":\"integer\""},
	{OIDOID, "\"type\":\"integer\""},
	{NUMERICOID, "\"type\":\"number\""},
	{FLOAT4OID, "\"type\":\"number\""},
	{FLOAT8OID, "\"type\":\"number\""},
	{DATEOID, "\"type\":\"string\",\"format\":\"date\""},
	{TIMEOID, "\"type\":\"string\",\"format\":\"time\""},
	{TIMETZOID, "\"type\":\"string\",\"format\":\"time\""},
	{TIMESTAMPOID, "\"type\":\"string\",\"format\":\"date-time\""},
	{TIMESTAMPTZOID, "\"type\":\"string\",\"format\":\"date-time\""},
	{INTERVALOID, "\"type\":\"string\",\"format\":\"duration\""},
	{UUIDOID, "\"type\":\"string\",\"format\":\"uuid\""},
	{JSONOID, "\"type\":\"object\""},
	{JSONBOID, "\"type\":\"object\""},
};

static void write_type(StringInfo json, Oid type);

/*
 * Signatures
 */

/* Raises that a function cannot be a tool. */
static CHAT_NORETURN void
refuse(Oid function, const char *detail, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_WRONG_OBJECT_TYPE),
			 errmsg("function %s cannot be a tool",
					format_procedure(function)),
			 errdetail("%s", detail),
			 errhint("%s", hint)));
}

/* Raises an error unless a function is one that a call can run. */
static void
check_function(Form_pg_proc proc)
{
	if (proc->prokind != PROKIND_FUNCTION)
		refuse(proc->oid, "It is an aggregate, a window function or a procedure.",
			   "Wrap it in a function.");
	if (get_typtype(proc->prorettype) == TYPTYPE_PSEUDO &&
		proc->prorettype != VOIDOID && proc->prorettype != RECORDOID)
		refuse(proc->oid, psprintf("It returns %s.",
								   format_type_be(proc->prorettype)),
			   "Return text, jsonb, another type of values, or void.");
}

/* Takes an argument over, if it is one that a call gives. */
static void
read_argument(ChatSignature *s, const char *name, Oid type, char mode)
{
	ChatArgument *a = &s->arguments[s->n];

	if (mode == PROARGMODE_OUT || mode == PROARGMODE_TABLE)
		return;
	if (mode == PROARGMODE_VARIADIC)
		refuse(s->function, "It takes a variable number of arguments.",
			   "Wrap it in a function that takes an array.");
	if (get_typtype(getBaseType(type)) == TYPTYPE_PSEUDO)
		refuse(s->function, psprintf("An argument has the pseudo-type %s.",
									 format_type_be(type)),
			   "Wrap it in a function whose arguments have types of values.");
	a->name = pstrdup(name ? name : "");
	a->type = type;
	a->has_default = false;
	a->description = NULL;
	s->n++;
}

/* Returns a copy of a text without blanks at its ends, NULL if none is left. */
static char *
trim(const char *from, const char *end)
{
	while (from < end && isspace((unsigned char) *from))
		from++;
	while (end > from && isspace((unsigned char) end[-1]))
		end--;
	return from == end ? NULL : pnstrdup(from, end - from);
}

/* Gives a line "name: text" to its argument; false if it is none. */
static bool
describe_argument(ChatSignature *s, const char *line, const char *end)
{
	while (line < end && isspace((unsigned char) *line))
		line++;
	for (int i = 0; i < s->n; i++)
	{
		ChatArgument *a = &s->arguments[i];
		size_t		len = strlen(a->name);

		if (len == 0 || (size_t) (end - line) <= len || line[len] != ':' ||
			memcmp(line, a->name, len) != 0)
			continue;
		a->description = trim(line + len + 1, end);
		return true;
	}
	return false;
}

/* Reads a function's comment: about itself, and about its arguments. */
static void
read_comment(ChatSignature *s)
{
	char	   *comment = GetComment(s->function, ProcedureRelationId, 0);
	StringInfoData rest;

	if (comment == NULL)
		return;
	initStringInfo(&rest);
	while (*comment)
	{
		size_t		len = strcspn(comment, "\n");

		if (!describe_argument(s, comment, comment + len))
		{
			appendBinaryStringInfo(&rest, comment, (int) len);
			appendStringInfoChar(&rest, '\n');
		}
		comment += len + (comment[len] == '\n');
	}
	s->description = trim(rest.data, rest.data + rest.len);
}

/* Reads the signature of a function, see schema.h. */
void
chat_schema_read(Oid function, ChatSignature *s)
{
	HeapTuple	tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(function));
	Form_pg_proc proc;
	Oid		   *types;
	char	  **names;
	char	   *modes;
	int			n;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for function %u", function);
	proc = (Form_pg_proc) GETSTRUCT(tuple);
	check_function(proc);
	n = get_func_arg_info(tuple, &types, &names, &modes);
	s->function = function;
	s->name = pstrdup(NameStr(proc->proname));
	s->description = NULL;
	s->n = 0;
	s->arguments = palloc(sizeof(ChatArgument) * Max(n, 1));
	for (int i = 0; i < n; i++)
		read_argument(s, names ? names[i] : NULL, types[i],
					  modes ? modes[i] : PROARGMODE_IN);
	/* the last ones have the defaults */
	for (int i = s->n - proc->pronargdefaults; i < s->n; i++)
		s->arguments[i].has_default = true;
	ReleaseSysCache(tuple);
	read_comment(s);
}

/*
 * JSON Schema
 */

/* Appends the values of an enum, in their order. */
static void
write_enum(StringInfo json, Oid type)
{
	Relation	table = table_open(EnumRelationId, AccessShareLock);
	Relation	index = index_open(EnumTypIdSortOrderIndexId, AccessShareLock);
	SysScanDesc scan;
	ScanKeyData key;
	HeapTuple	tuple;
	const char *separator = "";

	ScanKeyInit(&key, Anum_pg_enum_enumtypid, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(type));
	scan = systable_beginscan_ordered(table, index, NULL, 1, &key);
	appendStringInfoString(json, "\"type\":\"string\",\"enum\":[");
	while ((tuple = systable_getnext_ordered(scan, ForwardScanDirection)))
	{
		appendStringInfoString(json, separator);
		escape_json(json, NameStr(((Form_pg_enum) GETSTRUCT(tuple))->enumlabel));
		separator = ",";
	}
	appendStringInfoChar(json, ']');
	systable_endscan_ordered(scan);
	index_close(index, AccessShareLock);
	table_close(table, AccessShareLock);
}

/* Appends the attributes of a composite type, which may all be absent. */
static void
write_composite(StringInfo json, Oid type)
{
	TupleDesc	desc = lookup_rowtype_tupdesc(type, -1);
	const char *separator = "";

	appendStringInfoString(json, "\"type\":\"object\",\"properties\":{");
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (att->attisdropped)
			continue;
		appendStringInfoString(json, separator);
		escape_json(json, NameStr(att->attname));
		appendStringInfoString(json, ":{");
		write_type(json, att->atttypid);
		appendStringInfoChar(json, '}');
		separator = ",";
	}
	appendStringInfoString(json, "},\"additionalProperties\":false");
	ReleaseTupleDesc(desc);
}

/* Appends what the values of a type are, without braces around it. */
static void
write_type(StringInfo json, Oid type)
{
	Oid			element;

	check_stack_depth();
	type = getBaseType(type);
	element = get_element_type(type);
	if (OidIsValid(element))
	{
		appendStringInfoString(json, "\"type\":\"array\",\"items\":{");
		write_type(json, element);
		appendStringInfoChar(json, '}');
		return;
	}
	for (size_t i = 0; i < lengthof(known_types); i++)
	{
		if (known_types[i].type == type)
		{
			appendStringInfoString(json, known_types[i].schema);
			return;
		}
	}
	switch (get_typtype(type))
	{
		case TYPTYPE_ENUM:
			write_enum(json, type);
			break;
		case TYPTYPE_COMPOSITE:
			write_composite(json, type);
			break;
		default:
			appendStringInfoString(json, "\"type\":\"string\"");
			break;
	}
}

/* Raises that an argument has no name. */
static CHAT_NORETURN void
refuse_unnamed(const ChatSignature *s, int i)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("argument %d of function %s has no name", i + 1,
					format_procedure(s->function)),
			 errdetail("A tool's arguments are given by name."),
			 errhint("Create the function again with names for its arguments.")));
}

/* Builds the JSON Schema of the arguments, see schema.h. */
char *
chat_schema_build(const ChatSignature *s)
{
	StringInfoData json;
	const char *separator = "";

	initStringInfo(&json);
	appendStringInfoString(&json, "{\"type\":\"object\",\"properties\":{");
	for (int i = 0; i < s->n; i++)
	{
		const ChatArgument *a = &s->arguments[i];

		if (a->name[0] == '\0')
			refuse_unnamed(s, i);
		appendStringInfoString(&json, separator);
		escape_json(&json, a->name);
		appendStringInfoString(&json, ":{");
		write_type(&json, a->type);
		if (a->description)
		{
			appendStringInfoString(&json, ",\"description\":");
			escape_json(&json, a->description);
		}
		appendStringInfoChar(&json, '}');
		separator = ",";
	}
	appendStringInfoString(&json, "},\"required\":[");
	separator = "";
	for (int i = 0; i < s->n; i++)
	{
		if (s->arguments[i].has_default)
			continue;
		appendStringInfoString(&json, separator);
		escape_json(&json, s->arguments[i].name);
		separator = ",";
	}
	appendStringInfoString(&json, "],\"additionalProperties\":false}");
	return json.data;
}

/*
 * Schemas that were given
 */

/* Raises what is wrong with given parameters. */
static CHAT_NORETURN void
refuse_parameters(const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("invalid parameters of a tool"),
			 errdetail("%s", detail),
			 errhint("Give the JSON Schema of an object, such as {\"type\": \"object\", \"properties\": {\"city\": {\"type\": \"string\"}}, \"required\": [\"city\"]}.")));
}

/* Finds a member; NULL if there is none. */
static JsonbValue *
member(Jsonb *object, const char *name)
{
	return getKeyJsonValueFromContainer(&object->root, name,
										(int) strlen(name), NULL);
}

/* True if a value is an array of strings. */
static bool
is_strings(const JsonbValue *v)
{
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	item;

	if (v->type != jbvBinary || !JsonContainerIsArray(v->val.binary.data))
		return false;
	it = JsonbIteratorInit(v->val.binary.data);
	while ((token = JsonbIteratorNext(&it, &item, true)) != WJB_DONE)
		if (token == WJB_ELEM && item.type != jbvString)
			return false;
	return true;
}

/* Checks parameters that were given, see schema.h. */
void
chat_schema_check(Jsonb *parameters)
{
	JsonbValue *v;

	if (!JB_ROOT_IS_OBJECT(parameters))
		refuse_parameters("They are no JSON object.");
	v = member(parameters, "type");
	if (v == NULL || v->type != jbvString || v->val.string.len != 6 ||
		memcmp(v->val.string.val, "object", 6) != 0)
		refuse_parameters("The member \"type\" must be \"object\".");
	v = member(parameters, "properties");
	if (v && (v->type != jbvBinary ||
			  !JsonContainerIsObject(v->val.binary.data)))
		refuse_parameters("The member \"properties\" must be an object.");
	v = member(parameters, "required");
	if (v && !is_strings(v))
		refuse_parameters("The member \"required\" must be an array of strings.");
}

/* True if the schema names an argument. */
static bool
names(JsonbValue *properties, const char *name)
{
	JsonbValue	v;

	return properties &&
		getKeyJsonValueFromContainer(properties->val.binary.data, name,
									 (int) strlen(name), &v) != NULL;
}

/*
 * Finds the json or jsonb argument that the schema does not name, and that
 * takes the whole object; -1 if there is no one such.
 */
static int
find_whole(const ChatSignature *s, JsonbValue *properties)
{
	int			found = -1;

	for (int i = 0; i < s->n; i++)
	{
		const ChatArgument *a = &s->arguments[i];

		if ((a->type != JSONOID && a->type != JSONBOID) ||
			a->name[0] == '\0' || names(properties, a->name))
			continue;
		if (found >= 0)
			return -1;
		found = i;
	}
	return found;
}

/* Raises an error if a property is not an argument of the function. */
static void
match_properties(const ChatSignature *s, JsonbValue *properties)
{
	JsonbIterator *it = JsonbIteratorInit(properties->val.binary.data);
	JsonbIteratorToken token;
	JsonbValue	v;

	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		char	   *name;
		bool		found = false;

		if (token != WJB_KEY)
			continue;
		name = pnstrdup(v.val.string.val, v.val.string.len);
		for (int i = 0; i < s->n && !found; i++)
			found = strcmp(s->arguments[i].name, name) == 0;
		if (!found)
			refuse_parameters(psprintf("Function %s has no argument \"%s\".",
									   format_procedure(s->function), name));
	}
}

/* Checks parameters against a function, see schema.h. */
void
chat_schema_match(const ChatSignature *s, Jsonb *parameters)
{
	JsonbValue *properties = member(parameters, "properties");
	int			whole = find_whole(s, properties);

	for (int i = 0; i < s->n; i++)
	{
		const ChatArgument *a = &s->arguments[i];

		if (i == whole || a->has_default)
			continue;
		if (a->name[0] == '\0')
			refuse_unnamed(s, i);
		if (!names(properties, a->name))
			refuse_parameters(psprintf("They do not name the argument \"%s\" of function %s, which has no default.",
									   a->name,
									   format_procedure(s->function)));
	}
	if (properties && whole < 0)
		match_properties(s, properties);
}
