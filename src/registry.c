/*
 * registry.c
 *		The tools that models may call: register_tool and drop_tool, and what
 *		of them a request shows.
 *
 * Owns what is written to chat.chat_tool, and the setting
 * chat.enable_superuser_tools.  A tool belongs to the role that registered
 * it, or is shared by all, which only the extension's owner can do.  What a
 * tool refers to (a function, a server) is checked here with the rights of
 * the caller, and again by whoever runs a call.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/namespace.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "catalog/pg_proc.h"
#include "commands/dbcommands.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/regproc.h"
#include "utils/syscache.h"

#include "compat.h"
#include "db.h"
#include "field.h"
#include "registry.h"
#include "schema.h"
#include "toolserver.h"

/* A deadline beyond this is none, and could not be added to a time. */
#define MAX_TIMEOUT "366 days"

/* as in the table's check */
#define MAX_NAME_LENGTH 64

bool		chat_registry_superuser_tools = false;

PG_FUNCTION_INFO_V1(chat_register_tool);
PG_FUNCTION_INFO_V1(chat_drop_tool);

/*
 * $1 owner (NULL = shared), $2 name, $3 kind, $4 function, $5 server,
 * $6 path, $7 description, $8 parameters, $9 timeout, $10 long running,
 * $11 idempotent, $12 read only, $13 approval, $14 enabled
 */
CHAT_STMT(put_tool,
		  "INSERT INTO chat.chat_tool AS t (owner, name, kind, function,"
		  " server, path, description, parameters, timeout, long_running,"
		  " idempotent, read_only, approval, enabled)"
		  " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13,"
		  " $14) ON CONFLICT (owner, name) DO UPDATE SET"
		  " kind = excluded.kind, function = excluded.function,"
		  " server = excluded.server, path = excluded.path,"
		  " description = excluded.description,"
		  " parameters = excluded.parameters, timeout = excluded.timeout,"
		  " long_running = excluded.long_running,"
		  " idempotent = excluded.idempotent,"
		  " read_only = excluded.read_only, approval = excluded.approval,"
		  " enabled = excluded.enabled"
		  " RETURNING t",
		  REGROLEOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID,
		  JSONBOID, INTERVALOID, BOOLOID, BOOLOID, BOOLOID, TEXTOID, BOOLOID);

/* $1 owner (NULL = shared), $2 name */
CHAT_STMT(drop_tool,
		  "DELETE FROM chat.chat_tool AS t"
		  " WHERE t.owner IS NOT DISTINCT FROM $1 AND t.name = $2",
		  REGROLEOID, TEXTOID);

/*
 * $1 owners, $2 settings of sessions: the tools of each distinct pair, with
 * the numbers of those that share it
 *
 * A role's own tool goes before a shared one of the same name, also when it
 * is denied.
 */
CHAT_STMT(load_tools,
		  "WITH w AS MATERIALIZED ("
		  " SELECT u.owner, u.settings::jsonb -> 'tools' AS allowed,"
		  "  array_agg(u.n::int) AS who"
		  " FROM ROWS FROM (unnest($1), unnest($2))"
		  "  WITH ORDINALITY AS u (owner, settings, n)"
		  " GROUP BY 1, 2)"
		  " SELECT w.who, (SELECT '[' || string_agg("
		  "   json_build_object('type', 'function', 'function',"
		  "    CASE WHEN k.description IS NULL"
		  "    THEN json_build_object('name', k.name,"
		  "     'parameters', k.parameters)"
		  "    ELSE json_build_object('name', k.name,"
		  "     'description', k.description,"
		  "     'parameters', k.parameters) END)::text, ','"
		  "   ORDER BY k.name COLLATE \"C\") || ']'"
		  "  FROM (SELECT DISTINCT ON (t.name) t.name, t.description,"
		  "    t.parameters, t.approval"
		  "   FROM (SELECT * FROM chat.chat_tool AS own"
		  "    WHERE own.owner = w.owner"
		  "    UNION ALL SELECT * FROM chat.chat_tool AS shared"
		  "    WHERE shared.owner IS NULL) AS t"
		  "   WHERE t.enabled"
		  "    AND (w.allowed IS NULL OR w.allowed ? t.name)"
		  "   ORDER BY t.name, t.owner NULLS LAST) AS k"
		  "  WHERE k.approval <> 'deny')"
		  " FROM w",
		  OIDARRAYOID, TEXTARRAYOID);

/* A tool as register_tool() is given it, in the order of its arguments. */
typedef struct Tool
{
	char	   *function;		/* texts: NULL = not given */
	char	   *name;
	char	   *description;
	Jsonb	   *parameters;		/* the same */
	char	   *kind;
	char	   *server;
	char	   *path;
	Interval   *timeout;		/* the same */
	bool		long_running;
	bool		idempotent;
	bool		read_only;
	char	   *approval;
	bool		enabled;
	bool		shared;
	Oid			function_oid;	/* of kind sql, once it is resolved */
} Tool;

/* Declares the setting. */
void
chat_registry_init(void)
{
	DefineCustomBoolVariable("chat.enable_superuser_tools",
							 "Lets SQL tools run as superusers.",
							 "A model chooses the arguments of the call.",
							 &chat_registry_superuser_tools, false,
							 PGC_SUSET, 0, NULL, NULL, NULL);
}

/*
 * Checks
 */

/* Raises that an argument of register_tool() is not what it must be. */
static CHAT_NORETURN void
refuse(const char *argument, const char *detail, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("invalid value for argument \"%s\" of register_tool()",
					argument),
			 errdetail("%s", detail),
			 hint ? errhint("%s", hint) : 0));
}

/* Raises an error if an argument is given that a kind does not have. */
static void
refuse_given(const Tool *t, const char *argument, bool given)
{
	if (given)
		refuse(argument, psprintf("It does not go with kind \"%s\".",
								  t->kind), NULL);
}

/* Checks which arguments go with the kind. */
static void
check_kind(const Tool *t)
{
	bool		sql = strcmp(t->kind, "sql") == 0;
	bool		http = strcmp(t->kind, "http") == 0;
	bool		client = strcmp(t->kind, "client") == 0;

	if (!sql && !http && !client)
		refuse("kind", psprintf("There is no kind \"%s\".", t->kind),
			   "Valid kinds are: sql, http, client.");
	if (sql && t->function == NULL)
		refuse("function", "A tool of kind \"sql\" needs a function.",
			   "Name one, such as 'public.get_weather(text)', or another kind.");
	if (http && t->server == NULL)
		refuse("server", "A tool of kind \"http\" needs a server.",
			   "Create one with CREATE SERVER ... FOREIGN DATA WRAPPER chat_tool.");
	if (!sql && t->name == NULL)
		refuse("name", psprintf("A tool of kind \"%s\" needs a name.",
								t->kind), NULL);
	refuse_given(t, "function", t->function && !sql);
	refuse_given(t, "server", t->server && !http);
	refuse_given(t, "path", t->path && !http);
	refuse_given(t, "read_only", t->read_only && !sql);
	refuse_given(t, "idempotent", t->idempotent && client);
	refuse_given(t, "long_running", t->long_running && client);
}

/* Checks a tool's name: what the APIs take. */
static void
check_name(const char *name)
{
	static const char alphabet[] =
	"0123456789_-ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
	size_t		len = strlen(name);

	if (len < 1 || len > MAX_NAME_LENGTH || strspn(name, alphabet) != len)
		refuse("name", psprintf("\"%s\" cannot be the name of a tool.", name),
			   "Give 1 to 64 letters, digits, underscores and hyphens.");
}

/* Checks a tool's time: some, and one that can be added to the clock. */
static void
check_timeout(const Interval *timeout)
{
	Datum		value = IntervalPGetDatum(timeout);
	Datum		limit = DirectFunctionCall3(interval_in,
											CStringGetDatum(MAX_TIMEOUT),
											ObjectIdGetDatum(InvalidOid),
											Int32GetDatum(-1));
	Datum		zero = DirectFunctionCall3(interval_in, CStringGetDatum("0"),
										   ObjectIdGetDatum(InvalidOid),
										   Int32GetDatum(-1));

	if (!DatumGetBool(DirectFunctionCall2(interval_gt, value, zero)) ||
		DatumGetBool(DirectFunctionCall2(interval_gt, value, limit)))
		refuse("timeout", psprintf("It is %s.",
								   DatumGetCString(DirectFunctionCall1(interval_out, value))),
			   "Give a time that is positive and not longer than " MAX_TIMEOUT ".");
}

/* True if a path's segment, up to end, is "." or "..", also when encoded. */
static bool
is_dots(const char *at, const char *end)
{
	int			dots = 0;

	while (at < end)
	{
		if (*at == '.')
			at++;
		else if (end - at >= 3 && pg_strncasecmp(at, "%2e", 3) == 0)
			at += 3;
		else
			return false;
		dots++;
	}
	return dots == 1 || dots == 2;
}

/*
 * Checks the path below a server's URL.  It must stay below it: where
 * requests go is for the server's owner to say.
 */
static void
check_path(const char *path)
{
	const char *problem = NULL;

	if (path[0] != '/')
		problem = "It does not start with a slash.";
	for (const char *p = path; *p; p++)
	{
		if (*p <= 0x20 || *p >= 0x7f || strchr("\\?#", *p))
			problem = "It holds a character that a path cannot have, or that must be percent-encoded.";
		else if (*p == '/' && is_dots(p + 1, p + 1 + strcspn(p + 1, "/")))
			problem = "It leaves the server's URL.";
	}
	if (problem)
		refuse("path", problem,
			   "Give a path such as '/weather', which is appended to the server's URL.");
}

/* Raises an error unless the caller may share tools with all roles. */
static void
check_shared(Oid caller)
{
	Oid			owner = chat_db_extension_owner();

	if (!superuser_arg(caller) &&
		!(OidIsValid(owner) && has_privs_of_role(caller, owner)))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for shared tools"),
				 errdetail("Only superusers and the owner of extension chat may share tools with all roles.")));
}

/* Raises that a role cannot run SQL tools. */
static CHAT_NORETURN void
refuse_role(Oid role, const char *detail, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("role \"%s\" cannot run SQL tools",
					GetUserNameFromId(role, false)),
			 errdetail("%s", detail),
			 errhint("%s", hint)));
}

/* True if a role may log in. */
static bool
can_login(Oid role)
{
	HeapTuple	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(role));
	bool		result;

	if (!HeapTupleIsValid(tuple))
		return false;
	result = ((Form_pg_authid) GETSTRUCT(tuple))->rolcanlogin;
	ReleaseSysCache(tuple);
	return result;
}

/* Raises why no tool worker can connect as a role, see registry.h. */
void
chat_registry_check_role(Oid role)
{
	const char *name = quote_identifier(GetUserNameFromId(role, false));

	if (superuser_arg(role) && !chat_registry_superuser_tools)
		refuse_role(role, "It is a superuser, and a model would choose what is done with its rights.",
					"Register the tool as another role, or set chat.enable_superuser_tools.");
	if (!CHAT_WORKER_BYPASSES_LOGIN && !can_login(role))
		refuse_role(role, "A tool's function runs in a process that connects as the role, and before PostgreSQL 17 that needs LOGIN.",
					psprintf("Run ALTER ROLE %s LOGIN; without a password nobody else can use it.",
							 name));
	if (!superuser_arg(role) && chat_database_aclcheck(role) != ACLCHECK_OK)
		refuse_role(role, "A tool's function runs in a process that connects as the role, which has no CONNECT privilege on this database.",
					psprintf("Run GRANT CONNECT ON DATABASE %s TO %s.",
							 quote_identifier(get_database_name(MyDatabaseId)),
							 name));
}

/*
 * register_tool
 */

/* Returns an argument that is text, or NULL. */
static char *
text_argument(FunctionCallInfo fcinfo, int n, char *otherwise)
{
	return PG_ARGISNULL(n) ? otherwise
		: text_to_cstring(PG_GETARG_TEXT_PP(n));
}

/* Returns an argument that is a flag. */
static bool
flag_argument(FunctionCallInfo fcinfo, int n, bool otherwise)
{
	return PG_ARGISNULL(n) ? otherwise : PG_GETARG_BOOL(n);
}

/* Reads the arguments of register_tool(). */
static void
read_tool(FunctionCallInfo fcinfo, Tool *t)
{
	t->function = text_argument(fcinfo, 0, NULL);
	t->name = text_argument(fcinfo, 1, NULL);
	t->description = text_argument(fcinfo, 2, NULL);
	t->parameters = PG_ARGISNULL(3) ? NULL : PG_GETARG_JSONB_P(3);
	if (t->parameters)
		chat_field_check_numbers(&t->parameters->root, "parameters", "");
	t->kind = text_argument(fcinfo, 4, "sql");
	t->server = PG_ARGISNULL(5) ? NULL : NameStr(*PG_GETARG_NAME(5));
	t->path = text_argument(fcinfo, 6, NULL);
	t->timeout = PG_ARGISNULL(7) ? NULL : PG_GETARG_INTERVAL_P(7);
	t->long_running = flag_argument(fcinfo, 8, false);
	t->idempotent = flag_argument(fcinfo, 9, false);
	t->read_only = flag_argument(fcinfo, 10, false);
	t->approval = text_argument(fcinfo, 11, "auto");
	t->enabled = flag_argument(fcinfo, 12, true);
	t->shared = flag_argument(fcinfo, 13, false);
	t->function_oid = InvalidOid;
}

/* Parses a JSON text. */
static Jsonb *
parse(const char *json)
{
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
											  CStringGetDatum(json)));
}

/* Finds the function by its signature, or by a name that only one has. */
static Oid
resolve(const char *function)
{
	Oid			oid = DatumGetObjectId(DirectFunctionCall1(strchr(function, '(') ?
														   regprocedurein : regprocin,
														   CStringGetDatum(function)));

	if (!OidIsValid(oid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_FUNCTION),
				 errmsg("function \"%s\" does not exist", function)));
	return oid;
}

/* Finds the function of a tool, and takes from it what was not given. */
static void
complete_from_function(Tool *t, Oid caller)
{
	ChatSignature signature;

	t->function_oid = resolve(t->function);
	if (!chat_function_executable(t->function_oid, caller))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for function %s",
						format_procedure(t->function_oid))));
	if (isAnyTempNamespace(get_func_namespace(t->function_oid)))
		refuse("function", "Other sessions do not see a temporary function.",
			   "Create it in a schema.");
	chat_schema_read(t->function_oid, &signature);
	if (t->name == NULL)
		t->name = signature.name;
	if (t->description == NULL)
		t->description = signature.description;
	if (t->parameters)
	{
		chat_schema_check(t->parameters);
		chat_schema_match(&signature, t->parameters);
	}
	else
		t->parameters = parse(chat_schema_build(&signature));
}

/* Checks a tool, with the rights of the caller, and completes it. */
static void
check_tool(Tool *t, Oid caller)
{
	check_kind(t);
	if (strcmp(t->approval, "auto") != 0 && strcmp(t->approval, "ask") != 0 &&
		strcmp(t->approval, "deny") != 0)
		refuse("approval", psprintf("There is no approval \"%s\".",
									t->approval),
			   "Valid values are: auto, ask, deny.");
	if (t->timeout)
		check_timeout(t->timeout);
	if (t->path)
		check_path(t->path);
	if (t->shared)
		check_shared(caller);
	if (t->function)
		complete_from_function(t, caller);
	else if (t->parameters)
		chat_schema_check(t->parameters);
	else
		t->parameters = parse("{\"type\":\"object\",\"properties\":{}}");
	check_name(t->name);
	if (t->function && !t->shared)
		chat_registry_check_role(caller);
	if (t->server)
		chat_tool_server_check(t->server, caller, !t->shared);
}

/* Sets a parameter that is a text or NULL. */
static void
set_text(Datum *values, char *nulls, int i, const char *text)
{
	nulls[i] = text ? ' ' : 'n';
	values[i] = text ? CStringGetTextDatum(text) : (Datum) 0;
}

/* Stores a tool; the row is the last result. */
static void
store(const Tool *t, Oid caller)
{
	Datum		values[14];
	char		nulls[15] = "              ";

	values[0] = ObjectIdGetDatum(caller);
	nulls[0] = t->shared ? 'n' : ' ';
	set_text(values, nulls, 1, t->name);
	set_text(values, nulls, 2, t->kind);
	/* qualified, because the search_path is pinned now */
	set_text(values, nulls, 3, OidIsValid(t->function_oid) ?
			 format_procedure(t->function_oid) : NULL);
	set_text(values, nulls, 4, t->server);
	set_text(values, nulls, 5, t->path);
	set_text(values, nulls, 6, t->description);
	values[7] = JsonbPGetDatum(t->parameters);
	values[8] = IntervalPGetDatum(t->timeout);
	nulls[8] = t->timeout ? ' ' : 'n';
	values[9] = BoolGetDatum(t->long_running);
	values[10] = BoolGetDatum(t->idempotent);
	values[11] = BoolGetDatum(t->read_only);
	set_text(values, nulls, 12, t->approval);
	values[13] = BoolGetDatum(t->enabled);
	chat_db_exec(&put_tool, values, nulls);
}

/* register_tool: returns the row. */
Datum
chat_register_tool(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Tool		tool;
	bool		isnull;
	Datum		row;

	read_tool(fcinfo, &tool);
	check_tool(&tool, GetUserId());
	chat_db_enter(&scope);
	store(&tool, scope.caller);
	row = SPI_datumTransfer(chat_db_datum(0, 1, &isnull), false, -1);
	chat_db_leave(&scope);
	return row;
}

/* drop_tool: returns whether there was one. */
Datum
chat_drop_tool(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Datum		values[2];
	char		nulls[3] = "  ";
	bool		shared = flag_argument(fcinfo, 1, false);
	bool		found;

	if (shared)
		check_shared(GetUserId());
	if (PG_ARGISNULL(0))
		PG_RETURN_BOOL(false);
	chat_db_enter(&scope);
	values[0] = ObjectIdGetDatum(scope.caller);
	nulls[0] = shared ? 'n' : ' ';
	values[1] = PG_GETARG_DATUM(0);
	found = chat_db_exec(&drop_tool, values, nulls) > 0;
	chat_db_leave(&scope);
	PG_RETURN_BOOL(found);
}

/*
 * Requests
 */

/* Reads the tools of owners and settings, see registry.h. */
static void
load(Datum *owners, Datum *settings, int n, char **tools)
{
	Datum		values[2];
	uint64		rows;

	values[0] = chat_db_array(&chat_oids, owners, n);
	values[1] = chat_db_array(&chat_texts, settings, n);
	rows = chat_db_exec(&load_tools, values, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		char	   *json = chat_db_text(row, 2);
		bool		isnull;
		Datum	   *who;
		int			nwho;

		deconstruct_array(DatumGetArrayTypeP(chat_db_datum(row, 1, &isnull)),
						  INT4OID, sizeof(int32), true, TYPALIGN_INT,
						  &who, NULL, &nwho);
		for (int i = 0; i < nwho; i++)
			tools[DatumGetInt32(who[i]) - 1] = json;
	}
}

/* Reads the tools of the jobs of a claim, see registry.h. */
void
chat_registry_load(const ChatJob *jobs, int n, char **tools)
{
	Datum	   *owners = palloc(sizeof(Datum) * Max(n, 1));
	Datum	   *settings = palloc(sizeof(Datum) * Max(n, 1));

	if (n == 0)
		return;
	for (int i = 0; i < n; i++)
	{
		owners[i] = ObjectIdGetDatum(jobs[i].owner);
		settings[i] = CStringGetTextDatum(jobs[i].settings);
		tools[i] = NULL;
	}
	load(owners, settings, n, tools);
}

/* Reads the tools of one owner, see registry.h. */
char *
chat_registry_tools(Oid owner, const char *allowed)
{
	Datum		owners[1] = {ObjectIdGetDatum(owner)};
	Datum		settings[1];
	char	   *tools = NULL;

	settings[0] = CStringGetTextDatum(allowed ?
									  psprintf("{\"tools\":%s}", allowed) :
									  "{}");
	load(owners, settings, 1, &tools);
	return tools;
}
