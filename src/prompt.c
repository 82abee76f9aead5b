/*
 * prompt.c
 *		System prompts: templates in versions, and what they become.
 *
 * Owns the statements on chat.chat_prompt.  A version is never changed, its
 * labels are: whoever moves them has locked the rows of all versions.
 *
 * A template is expanded in one pass, so that what stands in a value is
 * never taken for a variable.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgtime.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "db.h"
#include "prompt.h"
#include "server.h"
#include "user.h"

#define LATEST "latest"

/* what is sent when nobody has stored a prompt */
#define BUILT_IN \
	"You are a helpful assistant. Answer in the language of the user, " \
	"correctly and to the point: first what was asked, then what is worth " \
	"knowing about it. Say so when you do not know something or cannot be " \
	"sure, and ask when a question can be understood in more than one way. " \
	"Use tools where they help, and never claim to have done what you have " \
	"not.\n\nToday is {{date}}.\n\n{{users_information}}"

static const char *const known_variables[] =
{
	"users_information", "user_id", "session_id", "date", "title",
	"environment"
};

static char *default_prompt = NULL;
static char *onboarding_prompt = NULL;

PG_FUNCTION_INFO_V1(chat_set_prompt);
PG_FUNCTION_INFO_V1(chat_label_prompt);
PG_FUNCTION_INFO_V1(chat_delete_prompt);
PG_FUNCTION_INFO_V1(chat_build_system_prompt);

#define ONE_PROMPT " p.name = $1 AND p.owner IS NOT DISTINCT FROM $2 "

/* $3 template, $4 variables: the newest version first */
CHAT_STMT(lock_versions,
		  "SELECT p.version, p.template = $3 AND p.variables = $4"
		  " FROM chat.chat_prompt AS p WHERE" ONE_PROMPT
		  " ORDER BY p.version DESC FOR UPDATE",
		  TEXTOID, REGROLEOID, TEXTOID, TEXTARRAYOID);

/* the same; no row when somebody else has stored the version meanwhile */
CHAT_STMT(add_version,
		  "INSERT INTO chat.chat_prompt AS n (name, owner, version, template,"
		  " variables) SELECT $1, $2, COALESCE(max(p.version), 0) + 1, $3, $4"
		  " FROM chat.chat_prompt AS p WHERE" ONE_PROMPT
		  " ON CONFLICT DO NOTHING RETURNING n.version",
		  TEXTOID, REGROLEOID, TEXTOID, TEXTARRAYOID);

/* $3 version, $4 labels: moves them there; writes what changes only */
CHAT_STMT(move_labels,
		  "UPDATE chat.chat_prompt AS p SET labels ="
		  " ARRAY(SELECT l FROM unnest(p.labels) AS l WHERE l <> ALL ($4)"
		  "  UNION SELECT l FROM unnest($4) AS l WHERE p.version = $3"
		  "  ORDER BY 1)"
		  " WHERE" ONE_PROMPT "AND CASE p.version WHEN $3"
		  "  THEN NOT p.labels @> $4 ELSE p.labels && $4 END",
		  TEXTOID, REGROLEOID, INT4OID, TEXTARRAYOID);

/* $3 version */
CHAT_STMT(prompt_row,
		  "SELECT p FROM chat.chat_prompt AS p WHERE" ONE_PROMPT
		  "AND p.version = $3",
		  TEXTOID, REGROLEOID, INT4OID);

CHAT_STMT(delete_prompt,
		  "DELETE FROM chat.chat_prompt AS p WHERE" ONE_PROMPT,
		  TEXTOID, REGROLEOID);

/* $1 name, $2 owner: the version in use, the owner's before the shared one */
CHAT_STMT(find_prompt,
		  "SELECT p.template, p.version FROM chat.chat_prompt AS p"
		  " WHERE p.name = $1 AND (p.owner = $2 OR p.owner IS NULL)"
		  " ORDER BY p.owner IS NULL, 'production' = ANY (p.labels) DESC,"
		  " p.version DESC LIMIT 1",
		  TEXTOID, REGROLEOID);

/* $1 owner, $2 user, $3 session or NULL: whether it is the user's first */
CHAT_STMT(is_first,
		  "SELECT NOT EXISTS (SELECT FROM chat.chat_session AS o"
		  " WHERE o.user_id = $2 AND o.owner = $1 AND ($3 IS NULL"
		  " OR (o.created_at, o.id) < (SELECT s.created_at, s.id"
		  "  FROM chat.chat_session AS s WHERE s.id = $3)))",
		  REGROLEOID, TEXTOID, UUIDOID);

/* $1 session, $2 name of a variable */
CHAT_STMT(session_value,
		  "SELECT CASE $2 WHEN 'title' THEN s.title"
		  " ELSE s.metadata ->> $2 END"
		  " FROM chat.chat_session AS s WHERE s.id = $1",
		  UUIDOID, TEXTOID);

/* CHAT_VISIBLE, $4 user that is asked for or NULL */
CHAT_STMT(find_session,
		  "SELECT s.owner::oid, s.user_id, s.settings ->> 'prompt',"
		  " s.server::text"
		  " FROM chat.chat_session AS s WHERE" CHAT_VISIBLE
		  "AND ($4 IS NULL OR s.user_id = $4)",
		  CHAT_VISIBLE_TYPES, TEXTOID);

/* arrays: $1 task, $2 name, $3 version */
CHAT_STMT(record_prompts,
		  "UPDATE chat.chat_task AS t"
		  " SET prompt_name = u.name, prompt_version = u.version"
		  " FROM unnest($1, $2, $3) AS u (id, name, version)"
		  " WHERE t.id = u.id AND (t.prompt_name, t.prompt_version)"
		  "  IS DISTINCT FROM (u.name, u.version)",
		  UUIDARRAYOID, TEXTARRAYOID, INT4ARRAYOID);

/* Declares the settings of prompts. */
void
chat_prompt_init(void)
{
	DefineCustomStringVariable("chat.default_prompt",
							   "Name of the prompt of sessions that name none.",
							   "When it is empty, they get no system prompt.",
							   &default_prompt, "default", PGC_SIGHUP, 0,
							   NULL, NULL, NULL);
	DefineCustomStringVariable("chat.onboarding_prompt",
							   "Name of the prompt of a user's first session.",
							   "When it is empty, that is like any other.",
							   &onboarding_prompt, "", PGC_SIGHUP, 0,
							   NULL, NULL, NULL);
}

/* ---------- templates ---------- */

/* A placeholder {{ name }} of a template. */
typedef struct Placeholder
{
	const char *start;			/* of the braces */
	const char *end;			/* behind them */
	const char *name;
	int			len;			/* 0 = there is no valid name */
} Placeholder;

/* Whether text is the name of a variable. */
static bool
is_name(const char *text, int len)
{
	for (int i = 0; i < len; i++)
	{
		char		c = pg_ascii_tolower((unsigned char) text[i]);

		if (!(c >= 'a' && c <= 'z') && c != '_' &&
			(i == 0 || !(c >= '0' && c <= '9')))
			return false;
	}
	return len > 0;
}

/* Finds the next placeholder; one that is not closed reaches to the end. */
static bool
next_placeholder(const char *text, Placeholder *p)
{
	const char *close;

	p->start = strstr(text, "{{");
	if (p->start == NULL)
		return false;
	p->name = p->start + 2;
	p->len = 0;
	close = strstr(p->name, "}}");
	p->end = close ? close + 2 : p->start + strlen(p->start);
	while (*p->name == ' ')
		p->name++;
	while (close && close > p->name && close[-1] == ' ')
		close--;
	if (close && is_name(p->name, (int) (close - p->name)))
		p->len = (int) (close - p->name);
	return true;
}

/* Whether a placeholder's name is the given one. */
static bool
is_variable(const Placeholder *p, const char *name)
{
	return (int) strlen(name) == p->len && memcmp(name, p->name, p->len) == 0;
}

/* Whether a placeholder's name is built in or declared. */
static bool
is_known(const Placeholder *p, Datum *declared, int ndeclared)
{
	for (size_t i = 0; i < lengthof(known_variables); i++)
		if (is_variable(p, known_variables[i]))
			return true;
	for (int i = 0; i < ndeclared; i++)
		if (is_variable(p, TextDatumGetCString(declared[i])))
			return true;
	return false;
}

/* Returns how a placeholder begins. */
static char *
excerpt(const Placeholder *p)
{
	int			len = (int) Min(p->end - p->start, 1000);

	return pnstrdup(p->start, pg_mbcliplen(p->start, len, 60));
}

/* Raises an error unless a template's variables are all known. */
static void
check_template(const char *template, Datum *declared, int ndeclared)
{
	Placeholder p;
	StringInfoData valid;

	initStringInfo(&valid);
	for (size_t i = 0; i < lengthof(known_variables); i++)
		appendStringInfo(&valid, "%s%s", i == 0 ? "" : ", ",
						 known_variables[i]);
	for (const char *text = template; next_placeholder(text, &p); text = p.end)
	{
		if (p.len == 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("invalid placeholder in the template"),
					 errdetail("It begins with: %s", excerpt(&p)),
					 errhint("A placeholder is the name of a variable in double braces: letters, digits and underscores.")));
		if (!is_known(&p, declared, ndeclared))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("unrecognized variable \"%s\" in the template",
							pnstrdup(p.name, p.len)),
					 errhint("Valid are: %s. Declare others in \"variables\".",
							 valid.data)));
	}
}

/* Returns what the session says of a variable, NULL if nothing. */
static char *
value_of_session(const ChatPromptTurn *turn, const char *name)
{
	Datum		values[2];

	if (turn->session == NULL)
		return NULL;
	values[0] = UUIDPGetDatum(turn->session);
	values[1] = CStringGetTextDatum(name);
	return chat_db_exec(&session_value, values, NULL) > 0
		? chat_db_text(0, 1) : NULL;
}

/* Returns a uuid in its text form. */
static char *
uuid_text(const pg_uuid_t *id)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(id)));
}

/* Returns today's date, the same in every process: UTC. */
static char *
today(void)
{
	TimestampTz start = GetCurrentTransactionStartTimestamp();
	pg_time_t	now = timestamptz_to_time_t(start);
	struct pg_tm *tm = pg_gmtime(&now);

	return psprintf("%04d-%02d-%02d", tm->tm_year + 1900, tm->tm_mon + 1,
					tm->tm_mday);
}

/* Returns the option "environment" of the server that is asked. */
static char *
environment(const ChatPromptTurn *turn)
{
	const char *name = turn->server;
	ChatServer *server = name && name[0] ? chat_server_load(name, true) : NULL;

	return server ? server->environment : NULL;
}

/* Returns the value of a placeholder, NULL for an empty one. */
static const char *
value_of(const ChatPromptTurn *turn, const Placeholder *p)
{
	if (is_variable(p, "users_information"))
		return chat_user_information(turn->owner, turn->user_id);
	if (is_variable(p, "user_id"))
		return turn->user_id;
	if (is_variable(p, "session_id"))
		return turn->session ? uuid_text(turn->session) : NULL;
	if (is_variable(p, "date"))
		return today();
	if (is_variable(p, "environment"))
		return environment(turn);
	return value_of_session(turn, pnstrdup(p->name, p->len));
}

/* Returns a template with its variables replaced. */
static char *
expand(const ChatPromptTurn *turn, const char *template)
{
	StringInfoData out;
	Placeholder p;

	initStringInfo(&out);
	for (; next_placeholder(template, &p); template = p.end)
	{
		const char *value = p.len > 0 ? value_of(turn, &p) : NULL;

		appendBinaryStringInfo(&out, template, (int) (p.start - template));
		if (p.len == 0)
			appendBinaryStringInfo(&out, p.start, (int) (p.end - p.start));
		else if (value)
			appendStringInfoString(&out, value);
	}
	appendStringInfoString(&out, template);
	return out.data;
}

/* ---------- choice ---------- */

/*
 * Says that a prompt that somebody wants does not exist.  A worker says it
 * once for the same name in a row, not with each turn.
 */
static void
warn_missing(const char *name)
{
	static char last[NAMEDATALEN];

	if (MyBackendType == B_BG_WORKER &&
		strncmp(last, name, sizeof(last) - 1) == 0)
		return;
	strlcpy(last, name, sizeof(last));
	ereport(WARNING,
			(errcode(ERRCODE_UNDEFINED_OBJECT),
			 errmsg("prompt \"%s\" does not exist", name),
			 errdetail("Another prompt takes its place."),
			 errhint("Store it with chat.set_prompt().")));
}

/* The stored prompt that was read last. */
typedef struct StoredPrompt
{
	TransactionId xid;			/* the transaction that has read it */
	Oid			owner;
	char	   *name;
	char	   *template;		/* NULL = there is none */
	int			version;
	MemoryContext context;
} StoredPrompt;

/*
 * Reads the version in use of a stored prompt.  The turns of a claim mostly
 * want the same one: its transaction, in which nobody stores any, reads it
 * once in a row.
 */
static const StoredPrompt *
read_stored(const ChatPromptTurn *turn, const char *name)
{
	static StoredPrompt last;
	Datum		values[2];
	bool		found;

	if (turn->fetch && last.name && TransactionIdIsValid(last.xid) &&
		last.xid == GetTopTransactionIdIfAny() &&
		last.owner == turn->owner && strcmp(last.name, name) == 0)
		return &last;
	if (last.context == NULL)
		last.context = AllocSetContextCreate(TopMemoryContext,
											 "chat stored prompt",
											 ALLOCSET_SMALL_SIZES);
	last.name = NULL;
	MemoryContextReset(last.context);
	values[0] = CStringGetTextDatum(name);
	values[1] = ObjectIdGetDatum(turn->owner);
	found = chat_db_exec(&find_prompt, values, NULL) > 0;
	last.xid = GetTopTransactionIdIfAny();
	last.owner = turn->owner;
	last.template = found
		? MemoryContextStrdup(last.context, chat_db_text(0, 1)) : NULL;
	last.version = found ? chat_db_int32(0, 2, 0) : 0;
	last.name = MemoryContextStrdup(last.context, name);
	return &last;
}

/* Finds the version in use of a prompt: its template, NULL if none. */
static char *
find(const ChatPromptTurn *turn, const char *prompt, char **name, int *version)
{
	char	   *template = chat_langfuse_find(prompt, turn->fetch, version);
	const StoredPrompt *stored;

	if (turn->fetch && turn->fetch->wait)
		return NULL;
	*name = pstrdup(prompt);
	if (template)
		return template;
	stored = read_stored(turn, prompt);
	*version = stored->version;
	if (stored->template == NULL)
	{
		*name = NULL;
		return NULL;
	}
	return pstrdup(stored->template);
}

/* Whether a turn is of its user's first session. */
static bool
onboarding(const ChatPromptTurn *turn)
{
	Datum		values[3];

	if (turn->user_id == NULL || onboarding_prompt[0] == '\0')
		return false;
	values[0] = ObjectIdGetDatum(turn->owner);
	values[1] = CStringGetTextDatum(turn->user_id);
	values[2] = turn->session ? UUIDPGetDatum(turn->session) : (Datum) 0;
	chat_db_exec(&is_first, values, turn->session ? "   " : "  n");
	return chat_db_bool(0, 1);
}

/* Chooses the template of a turn; NULL when it wants no system prompt. */
static char *
choose(const ChatPromptTurn *turn, char **name, int *version)
{
	const char *names[3];
	int			n = 0;

	if (turn->setting)
		names[n++] = turn->setting;
	if (onboarding(turn))
		names[n++] = onboarding_prompt;
	names[n++] = default_prompt;
	for (int i = 0; i < n; i++)
	{
		char	   *template;

		/* an empty name wants none */
		if (names[i][0] == '\0')
			return NULL;
		template = find(turn, names[i], name, version);
		if (template || (turn->fetch && turn->fetch->wait))
			return template;
		/* that nobody stored a default is no mistake */
		if (strcmp(names[i], "default") != 0)
			warn_missing(names[i]);
	}
	return BUILT_IN;
}

/*
 * Builds the system prompt of a turn.  Statements leave us in the context of
 * SPI, but the caller gets text, name and context as if there were none.
 */
char *
chat_prompt_build(const ChatPromptTurn *turn, char **name, int *version)
{
	MemoryContext caller = CurrentMemoryContext;
	char	   *text;

	*name = NULL;
	*version = 0;
	text = choose(turn, name, version);
	if (text)
		text = expand(turn, text);
	MemoryContextSwitchTo(caller);
	if (*name)
		*name = pstrdup(*name);
	return text ? pstrdup(text) : NULL;
}

/* Records which prompts tasks used. */
void
chat_prompt_record(const pg_uuid_t *tasks, char **names, const int *versions,
				   int n)
{
	MemoryContext caller = CurrentMemoryContext;
	Datum	   *values[3];
	Datum		params[3];
	int			used = 0;

	for (int i = 0; i < 3; i++)
		values[i] = palloc(sizeof(Datum) * Max(n, 1));
	for (int i = 0; i < n; i++)
	{
		if (names[i] == NULL)
			continue;
		values[0][used] = UUIDPGetDatum(&tasks[i]);
		values[1][used] = CStringGetTextDatum(names[i]);
		values[2][used++] = Int32GetDatum(versions[i]);
	}
	if (used == 0)
		return;
	params[0] = chat_db_array(&chat_uuids, values[0], used);
	params[1] = chat_db_array(&chat_texts, values[1], used);
	params[2] = chat_db_array(&chat_int4s, values[2], used);
	chat_db_exec(&record_prompts, params, NULL);
	MemoryContextSwitchTo(caller);
}

/* build_system_prompt: returns the text; NULL if there is no such session. */
Datum
chat_build_system_prompt(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Datum		values[4];
	char	   *user = PG_ARGISNULL(0) ? NULL
		: TextDatumGetCString(PG_GETARG_DATUM(0));
	ChatPromptTurn turn = {.user_id = user};
	char	   *text = NULL;
	char	   *name;
	int			version;
	bool		visible;
	Datum		result = (Datum) 0;

	turn.session = PG_ARGISNULL(1) ? NULL : PG_GETARG_UUID_P(1);
	chat_db_enter(&scope);
	turn.owner = scope.caller;
	visible = scope.user[0] == '\0' || user == NULL ||
		strcmp(scope.user, user) == 0;
	if (turn.session)
	{
		values[0] = UUIDPGetDatum(turn.session);
		chat_db_caller(&scope, values);
		values[3] = PG_GETARG_DATUM(0);
		visible = chat_db_exec(&find_session, values,
							   user ? "    " : "   n") > 0;
		if (visible)
		{
			turn.owner = chat_db_oid(0, 1);
			turn.user_id = chat_db_text(0, 2);
			turn.setting = chat_db_text(0, 3);
			turn.server = chat_db_text(0, 4);
		}
	}
	if (turn.server == NULL)
		turn.server = chat_server_default;
	if (visible)
		text = chat_prompt_build(&turn, &name, &version);
	if (text)
		result = SPI_datumTransfer(CStringGetTextDatum(text), false, -1);
	chat_db_leave(&scope);
	if (text == NULL)
		PG_RETURN_NULL();
	return result;
}

/* ---------- functions that write ---------- */

/* Which prompt a function is about: parameters $1 and $2 of its statements. */
typedef struct Which
{
	Datum		values[4];
	char		nulls[5];
} Which;

/* Takes the arguments name, shared and owner; checks the right to write. */
static void
take_which(FunctionCallInfo fcinfo, int shared, const ChatScope *scope,
		   Which *which)
{
	int			owner = shared + 1;

	strcpy(which->nulls, "    ");
	which->values[0] = PG_GETARG_DATUM(0);
	if (PG_ARGISNULL(shared) || !PG_GETARG_BOOL(shared))
	{
		which->values[1] =
			ObjectIdGetDatum(chat_user_owner(scope, PG_GETARG_DATUM(owner),
											 PG_ARGISNULL(owner)));
		return;
	}
	if (!PG_ARGISNULL(owner))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("a shared prompt has no owner")));
	if (!has_privs_of_role(scope->caller, chat_db_extension_owner()))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for shared prompts"),
				 errdetail("They are the administrator's."),
				 errhint("Without \"shared\" the prompt is your own.")));
	which->nulls[1] = 'n';
}

/* Raises an error when a text argument is missing or empty. */
static void
require(FunctionCallInfo fcinfo, int argument, const char *name)
{
	if (PG_ARGISNULL(argument))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be null", name)));
	if (VARSIZE_ANY_EXHDR(PG_GETARG_TEXT_PP(argument)) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not be empty", name)));
}

/* Takes an argument of type text[], NULL = empty; its elements are none. */
static Datum
take_texts(FunctionCallInfo fcinfo, int argument, const char *what,
		   Datum **texts, int *n)
{
	bool	   *nulls;

	*n = 0;
	*texts = NULL;
	if (PG_ARGISNULL(argument))
		return PointerGetDatum(construct_empty_array(TEXTOID));
	deconstruct_array(PG_GETARG_ARRAYTYPE_P(argument), TEXTOID, -1, false,
					  TYPALIGN_INT, texts, &nulls, n);
	for (int i = 0; i < *n; i++)
		if (nulls[i] || TextDatumGetCString((*texts)[i])[0] == '\0')
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("a %s must be neither null nor empty", what)));
	return PG_GETARG_DATUM(argument);
}

/* Adds a text to the elements of an array. */
static Datum
with_text(Datum *texts, int n, const char *text)
{
	Datum	   *all = palloc(sizeof(Datum) * (n + 1));

	if (n > 0)
		memcpy(all, texts, sizeof(Datum) * n);
	all[n] = CStringGetTextDatum(text);
	return PointerGetDatum(construct_array(all, n + 1, TEXTOID, -1, false,
										   TYPALIGN_INT));
}

/* Moves labels to a version and ends the function with its row. */
static Datum
label(ChatScope *scope, Which *which, int version, Datum labels)
{
	bool		isnull;
	Datum		row;

	which->values[2] = Int32GetDatum(version);
	which->values[3] = labels;
	chat_db_exec(&move_labels, which->values, which->nulls);
	chat_db_exec(&prompt_row, which->values, which->nulls);
	row = SPI_datumTransfer(chat_db_datum(0, 1, &isnull), false, -1);
	chat_db_leave(scope);
	return row;
}

/* Stores a version, unless the newest is the same; returns its number. */
static int
store(Which *which)
{
	uint64		n;

	do
	{
		CHECK_FOR_INTERRUPTS();
		n = chat_db_exec(&lock_versions, which->values, which->nulls);
		if (n > 0 && chat_db_bool(0, 2))
			return chat_db_int32(0, 1, 0);
		n = chat_db_exec(&add_version, which->values, which->nulls);
	} while (n == 0);
	return chat_db_int32(0, 1, 0);
}

/* set_prompt: returns the row. */
Datum
chat_set_prompt(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Which		which;
	Datum	   *labels;
	Datum	   *variables;
	Datum		declared;
	int			nlabels;
	int			nvariables;

	require(fcinfo, 0, "name");
	require(fcinfo, 1, "template");
	(void) take_texts(fcinfo, 2, "label", &labels, &nlabels);
	declared = take_texts(fcinfo, 3, "variable", &variables, &nvariables);
	for (int i = 0; i < nvariables; i++)
	{
		char	   *name = TextDatumGetCString(variables[i]);

		if (!is_name(name, (int) strlen(name)))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("invalid name of a variable: \"%s\"", name),
					 errhint("Names consist of letters, digits and underscores.")));
	}
	check_template(TextDatumGetCString(PG_GETARG_DATUM(1)), variables,
				   nvariables);
	chat_db_enter(&scope);
	take_which(fcinfo, 4, &scope, &which);
	which.values[2] = PG_GETARG_DATUM(1);
	which.values[3] = declared;
	return label(&scope, &which, store(&which),
				 with_text(labels, nlabels, LATEST));
}

/* label_prompt: returns the row, NULL if there is none. */
Datum
chat_label_prompt(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Which		which;
	Datum	   *texts;
	Datum		labels;
	int			n;
	bool		found = false;

	labels = take_texts(fcinfo, 2, "label", &texts, &n);
	for (int i = 0; i < n; i++)
		if (strcmp(TextDatumGetCString(texts[i]), LATEST) == 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("label \"%s\" cannot be moved", LATEST),
					 errdetail("It always belongs to the newest version.")));
	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		PG_RETURN_NULL();
	chat_db_enter(&scope);
	take_which(fcinfo, 3, &scope, &which);
	which.values[2] = which.values[3] = (Datum) 0;
	which.nulls[2] = which.nulls[3] = 'n';
	n = (int) chat_db_exec(&lock_versions, which.values, which.nulls);
	for (int i = 0; i < n && !found; i++)
		found = chat_db_int32(i, 1, 0) == PG_GETARG_INT32(1);
	which.nulls[2] = which.nulls[3] = ' ';
	if (found)
		return label(&scope, &which, PG_GETARG_INT32(1), labels);
	chat_db_leave(&scope);
	PG_RETURN_NULL();
}

/* delete_prompt: returns whether there was one. */
Datum
chat_delete_prompt(PG_FUNCTION_ARGS)
{
	ChatScope	scope;
	Which		which;
	bool		found;

	if (PG_ARGISNULL(0))
		PG_RETURN_BOOL(false);
	chat_db_enter(&scope);
	take_which(fcinfo, 1, &scope, &which);
	found = chat_db_exec(&delete_prompt, which.values, which.nulls) > 0;
	chat_db_leave(&scope);
	PG_RETURN_BOOL(found);
}
