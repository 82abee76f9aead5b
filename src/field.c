/*
 * field.c
 *		Members of JSON objects as checked column values.
 *
 * Owns nothing: values are palloc'ed in the caller's memory context.
 */
#include "postgres.h"

#include <math.h>

#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "field.h"
#include "json.h"

/* Says in words what a member must be. */
static char *
expectation(const ChatField *field)
{
	switch (field->kind)
	{
		case CHAT_FIELD_TEXT:
			return "a string";
		case CHAT_FIELD_NAME:
			return psprintf("a string of 1 to %d bytes", NAMEDATALEN - 1);
		case CHAT_FIELD_UUID:
			return "a UUID";
		case CHAT_FIELD_TIME:
			return "a timestamp";
		case CHAT_FIELD_BOOL:
			return "true or false";
		case CHAT_FIELD_INTEGER:
			if (field->max == CHAT_FIELD_MAX)
				return psprintf("a whole number from %.0f", field->min);
			return psprintf("a whole number from %.0f to %.0f",
							field->min, field->max);
		case CHAT_FIELD_NUMBER:
			return psprintf("a number from %.15g to %.15g",
							field->min, field->max);
		case CHAT_FIELD_OBJECT:
			return "an object";
		case CHAT_FIELD_ARRAY:
			return "an array";
		case CHAT_FIELD_OBJECTS:
			return "an array of objects";
		case CHAT_FIELD_STRINGS:
			return "an array of strings";
		case CHAT_FIELD_CHOICE:
			return "a string or an object";
		case CHAT_FIELD_CONTENT:
			return "a string or an array";
		case CHAT_FIELD_ANY:
			break;
	}
	return "a JSON value";
}

/* Raises that a member is not what it must be. */
static CHAT_NORETURN void
reject(const ChatField *field, const char *prefix)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("%s\"%s\" must be %s",
					prefix, field->name, expectation(field))));
}

/* Raises that there is no such member, and lists those that there are. */
static CHAT_NORETURN void
reject_name(const ChatFieldTable *table, const char *prefix,
			const JsonbValue *key)
{
	StringInfoData valid;

	initStringInfo(&valid);
	for (int i = 0; i < table->n; i++)
		appendStringInfo(&valid, "%s%s", i == 0 ? "" : ", ",
						 table->fields[i].name);
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("%sunrecognized %s \"%s\"", prefix, table->what,
					pnstrdup(key->val.string.val, key->val.string.len)),
			 errhint("Valid are: %s.", valid.data)));
}

/* Finds a member's description, or NULL. */
static const ChatField *
find(const ChatFieldTable *table, const JsonbValue *key)
{
	for (int i = 0; i < table->n; i++)
	{
		const char *name = table->fields[i].name;

		if (strlen(name) == (size_t) key->val.string.len &&
			memcmp(name, key->val.string.val, key->val.string.len) == 0)
			return &table->fields[i];
	}
	return NULL;
}

/* Whether a value is an array whose elements are all of the given kind. */
static bool
array_of(const JsonbValue *value, bool objects)
{
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	v;

	if (value->type != jbvBinary ||
		!JsonContainerIsArray(value->val.binary.data))
		return false;
	it = JsonbIteratorInit(value->val.binary.data);
	(void) JsonbIteratorNext(&it, &v, true);
	while ((token = JsonbIteratorNext(&it, &v, true)) == WJB_ELEM)
	{
		bool		object = v.type == jbvBinary &&
			JsonContainerIsObject(v.val.binary.data);

		if (objects ? !object : v.type != jbvString)
			return false;
	}
	return true;
}

/* Whether a value has the JSON type that its kind asks for. */
static bool
has_type(const ChatField *field, const JsonbValue *value)
{
	bool		object = value->type == jbvBinary &&
		JsonContainerIsObject(value->val.binary.data);
	bool		array = value->type == jbvBinary &&
		JsonContainerIsArray(value->val.binary.data);

	switch (field->kind)
	{
		case CHAT_FIELD_TEXT:
		case CHAT_FIELD_UUID:
		case CHAT_FIELD_TIME:
			return value->type == jbvString;
		case CHAT_FIELD_NAME:
			return value->type == jbvString &&
				value->val.string.len > 0 &&
				value->val.string.len < NAMEDATALEN;
		case CHAT_FIELD_BOOL:
			return value->type == jbvBool;
		case CHAT_FIELD_INTEGER:
		case CHAT_FIELD_NUMBER:
			return value->type == jbvNumeric;
		case CHAT_FIELD_OBJECT:
			return object;
		case CHAT_FIELD_ARRAY:
			return array;
		case CHAT_FIELD_OBJECTS:
			return array_of(value, true);
		case CHAT_FIELD_STRINGS:
			return array_of(value, false);
		case CHAT_FIELD_CHOICE:
			return value->type == jbvString || object;
		case CHAT_FIELD_CONTENT:
			return value->type == jbvString || array;
		case CHAT_FIELD_ANY:
			break;
	}
	return true;
}

/* Hands over a number that is in range, and whole when it must be. */
static Datum
number(const ChatField *field, const JsonbValue *value, const char *prefix)
{
	Datum		numeric = NumericGetDatum(value->val.numeric);
	Datum		largest = NumericGetDatum(int64_to_numeric(PG_INT64_MAX));
	double		d;

	d = DatumGetFloat8(DirectFunctionCall1(numeric_float8_no_overflow,
										   numeric));
	if (!(d >= field->min && d <= field->max))
		reject(field, prefix);
	if (field->kind == CHAT_FIELD_NUMBER)
		return Float8GetDatum(d);
	/* a double cannot tell the largest bigint from what is beyond it */
	if (d != floor(d) ||
		(d >= CHAT_FIELD_MAX &&
		 DatumGetBool(DirectFunctionCall2(numeric_gt, numeric, largest))))
		reject(field, prefix);
	return DirectFunctionCall1(numeric_int8, numeric);
}

/* Reads a string by a type's input function; its error is ours. */
static Datum
input(const ChatField *field, char *string, const char *prefix)
{
	MemoryContext context = CurrentMemoryContext;
	volatile Datum result = (Datum) 0;

	PG_TRY();
	{
		if (field->kind == CHAT_FIELD_UUID)
			result = DirectFunctionCall1(uuid_in, CStringGetDatum(string));
		else
			result = DirectFunctionCall3(timestamptz_in,
										 CStringGetDatum(string),
										 ObjectIdGetDatum(InvalidOid),
										 Int32GetDatum(-1));
	}
	PG_CATCH();
	{
		/* thrown on, in our words: the transaction ends all the same */
		if (ERRCODE_TO_CATEGORY(geterrcode()) != ERRCODE_DATA_EXCEPTION)
			PG_RE_THROW();
		MemoryContextSwitchTo(context);
		FlushErrorState();
		reject(field, prefix);
	}
	PG_END_TRY();
	return result;
}

/* Hands over a value that has the right JSON type. */
static Datum
convert(const ChatField *field, const JsonbValue *value, const char *prefix)
{
	char	   *string = NULL;

	if (value->type == jbvString)
		string = pnstrdup(value->val.string.val, value->val.string.len);
	switch (field->kind)
	{
		case CHAT_FIELD_TEXT:
			return CStringGetTextDatum(string);
		case CHAT_FIELD_CONTENT:
			if (string != NULL)
				return CStringGetTextDatum(string);
			break;
		case CHAT_FIELD_NAME:
			return DirectFunctionCall1(namein, CStringGetDatum(string));
		case CHAT_FIELD_UUID:
		case CHAT_FIELD_TIME:
			return input(field, string, prefix);
		case CHAT_FIELD_BOOL:
			return BoolGetDatum(value->val.boolean);
		case CHAT_FIELD_INTEGER:
		case CHAT_FIELD_NUMBER:
			return number(field, value, prefix);
		default:
			break;
	}
	return JsonbPGetDatum(JsonbValueToJsonb(unconstify(JsonbValue *, value)));
}

/* Raises an error if the numbers of a value are long, see field.h. */
void
chat_field_check_numbers(JsonbContainer *json, const char *name,
						 const char *prefix)
{
	JsonbIterator *it = JsonbIteratorInit(json);
	JsonbIteratorToken token;
	JsonbValue	v;
	int			digits = 0;

	while ((token = JsonbIteratorNext(&it, &v, false)) != WJB_DONE)
	{
		char	   *number;

		if ((token != WJB_VALUE && token != WJB_ELEM) ||
			v.type != jbvNumeric)
			continue;
		number = DatumGetCString(DirectFunctionCall1(numeric_out,
													 NumericGetDatum(v.val.numeric)));
		/* what has no exponent has that many bytes at its origin, too */
		digits += Max((int) strlen(number) - 64, 0);
		pfree(number);
		if (digits > CHAT_JSON_MAX_DIGITS)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("%sthe numbers of \"%s\" are too long", prefix,
							name),
					 errdetail("Without exponents they may have %d digits in all.",
							   CHAT_JSON_MAX_DIGITS)));
	}
}

/* Raises an error if a value is nested too far, see field.h. */
void
chat_field_check_depth(JsonbContainer *json, const char *name,
					   const char *prefix)
{
	JsonbIterator *it = JsonbIteratorInit(json);
	JsonbIteratorToken token;
	JsonbValue	v;
	int			depth = 0;

	while ((token = JsonbIteratorNext(&it, &v, false)) != WJB_DONE)
	{
		if (token == WJB_BEGIN_ARRAY || token == WJB_BEGIN_OBJECT)
			depth++;
		else if (token == WJB_END_ARRAY || token == WJB_END_OBJECT)
			depth--;
		if (depth > CHAT_JSON_MAX_DEPTH)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("%s\"%s\" is nested too deeply", prefix, name),
					 errdetail("Its arrays and objects may have %d levels.",
							   CHAT_JSON_MAX_DEPTH)));
	}
}

/* Reads one member; two names of one column exclude each other. */
static void
read_member(const ChatField *field, const JsonbValue *value,
			const char *prefix, Datum *values, bool *nulls)
{
	int			column = field->column;
	Datum		datum;

	if (!has_type(field, value))
		reject(field, prefix);
	if (value->type == jbvBinary)
		chat_field_check_numbers(value->val.binary.data, field->name, prefix);
	datum = convert(field, value, prefix);
	if (column == CHAT_FIELD_NO_COLUMN || values == NULL)
		return;
	if (field->kind == CHAT_FIELD_CONTENT && value->type != jbvString)
		column++;
	if (!nulls[column])
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s\"%s\" is given twice", prefix, field->name)));
	values[column] = datum;
	nulls[column] = false;
}

/* Reads an object by the table. */
void
chat_field_read(const ChatFieldTable *table, JsonbContainer *object,
				const char *prefix, Datum *values, bool *nulls)
{
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	v;
	const ChatField *field = NULL;

	if (!JsonContainerIsObject(object))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%snot a JSON object", prefix)));
	it = JsonbIteratorInit(object);
	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
		{
			field = find(table, &v);
			if (field == NULL && !table->open)
				reject_name(table, prefix, &v);
		}
		else if (token == WJB_VALUE && field != NULL &&
				 !(v.type == jbvNull && table->null_is_absent))
			read_member(field, &v, prefix, values, nulls);
	}
}

/* Checks a single value by a field that is not converted. */
void
chat_field_check(const ChatField *field, Jsonb *json)
{
	JsonbValue	v;

	if (!JB_ROOT_IS_SCALAR(json))
	{
		v.type = jbvBinary;
		v.val.binary.data = &json->root;
		v.val.binary.len = VARSIZE(json) - VARHDRSZ;
	}
	else
		(void) JsonbExtractScalar(&json->root, &v);
	if (!has_type(field, &v))
		reject(field, "");
	chat_field_check_numbers(&json->root, field->name, "");
}
