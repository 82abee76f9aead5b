/*
 * langfuse.c
 *		Prompts of a Langfuse server.
 *
 * Owns the options of wrapper chat_langfuse and the table
 * chat.chat_prompt_cache.  A prompt is fetched by the worker, never by a
 * caller: the first turn that needs it waits, in the queue; later ones take
 * what is there, and what is old is fetched again beside them.  When nothing
 * can be had, the prompt of the same name in chat.chat_prompt serves.
 *
 * The keys are those of the mapping of the extension's owner, or PUBLIC's:
 * what they let us read serves everybody.
 */
#include "postgres.h"

#include <ctype.h>

#include "access/htup_details.h"
#include "access/reloptions.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_type.h"
#include "catalog/pg_user_mapping.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/guc.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"
#include "utils/syscache.h"

#include "db.h"
#include "langfuse.h"
#include "option.h"
#include "queue.h"
#include "server.h"
#include "side.h"

#define WRAPPER "chat_langfuse"
#define SERVER ForeignServerRelationId
#define MAPPING UserMappingRelationId
#define FIELD(name) offsetof(PromptServer, name)
#define SUPER CHAT_OPTION_SUPERUSER
#define DAY_MS (24 * 60 * 60 * 1000.0)

#define DEFAULT_TTL 60000
#define DEFAULT_TIMEOUT 5000
/* what is no older than this serves a turn that has waited, in ms */
#define JUST_NOW 15000
/* after a failure the next attempt comes no sooner, in ms */
#define MIN_PAUSE 10000

typedef struct PromptServer
{
	ChatServer	endpoint;		/* option host is its base_url, timeout its
								 * stream_timeout */
	int			cache_ttl;		/* ms */
} PromptServer;

static const ChatOption options[] = {
	{"allow_http", SERVER, CHAT_OPTION_BOOL, 0, FIELD(endpoint.allow_http),
	0, 0, NULL},
	{"allow_private", SERVER, CHAT_OPTION_BOOL, 0,
	FIELD(endpoint.allow_private), 0, 0, NULL},
	{"ca_file", SERVER, CHAT_OPTION_PATH, SUPER, FIELD(endpoint.ca_file),
	0, 0, NULL},
	{"cache_ttl", SERVER, CHAT_OPTION_TIME, 0, FIELD(cache_ttl),
	0, DAY_MS, NULL},
	{"connect_timeout", SERVER, CHAT_OPTION_TIME, 0,
	FIELD(endpoint.connect_timeout), 1, DAY_MS, NULL},
	{"environment", SERVER, CHAT_OPTION_TEXT, 0, FIELD(endpoint.environment),
	0, 0, NULL},
	{"host", SERVER, CHAT_OPTION_URL, CHAT_OPTION_REQUIRED,
	FIELD(endpoint.base_url), 0, 0, NULL},
	{"proxy", SERVER, CHAT_OPTION_TEXT, SUPER, FIELD(endpoint.proxy),
	0, 0, NULL},
	{"timeout", SERVER, CHAT_OPTION_TIME, 0, FIELD(endpoint.stream_timeout),
	1, CHAT_PROMPT_WAIT, NULL},
	{"public_key", MAPPING, CHAT_OPTION_SECRET, 0, CHAT_OPTION_NO_FIELD,
	0, 0, NULL},
	{"secret_key", MAPPING, CHAT_OPTION_SECRET, 0, CHAT_OPTION_NO_FIELD,
	0, 0, NULL},
};

static const ChatOptionTable table = {options, lengthof(options)};

static char *prompt_server = NULL;

PG_FUNCTION_INFO_V1(chat_langfuse_validator);

/*
 * $1 server, $2 name, $3 label: the template, how old it is and how long ago
 * it was asked for, in ms
 */
CHAT_STMT(find_cached,
		  "SELECT c.template, c.version,"
		  " (extract(epoch FROM now() - c.fetched_at) * 1000)::bigint,"
		  " (extract(epoch FROM now() - c.tried_at) * 1000)::bigint"
		  " FROM chat.chat_prompt_cache AS c"
		  " WHERE c.server = $1::name AND c.name = $2 AND c.label = $3",
		  TEXTOID, TEXTOID, TEXTOID);

/* $1 server, $2 name, $3 label, $4 template or NULL, $5 version, $6 error */
CHAT_STMT(store_cached,
		  "INSERT INTO chat.chat_prompt_cache AS c (server, name, label,"
		  "  template, version, fetched_at, tried_at, error)"
		  " VALUES ($1::name, $2, $3, $4, $5,"
		  "  CASE WHEN $4 IS NOT NULL THEN now() END, now(), $6)"
		  " ON CONFLICT (server, name, label) DO UPDATE SET"
		  "  template = COALESCE($4, c.template),"
		  "  version = CASE WHEN $4 IS NULL THEN c.version ELSE $5 END,"
		  "  fetched_at = CASE WHEN $4 IS NULL THEN c.fetched_at"
		  "   ELSE now() END,"
		  "  tried_at = now(), error = $6",
		  TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT4OID, TEXTOID);

/* $1 database: the turns that wait for a prompt go on */
CHAT_STMT(wake_turns,
		  "UPDATE chat.chat_job SET run_at = '-infinity'"
		  " WHERE kind = 'completion' AND holder IS NULL AND NOT parked"
		  "  AND database = $1 AND run_at > '-infinity'"
		  "  AND run_at > now() AND run_at < 'infinity'"
		  "  AND waited & " CppAsString2(CHAT_WAITED_PROMPT) " <> 0",
		  OIDOID);

/* Declares the settings of the prompt server. */
void
chat_langfuse_init(void)
{
	DefineCustomStringVariable("chat.prompt_server",
							   "Foreign server of wrapper chat_langfuse that has the prompts.",
							   "When it is empty, only those in the database serve.",
							   &prompt_server, "", PGC_SIGHUP, 0,
							   NULL, NULL, NULL);
}

/* Checks the options of an object of wrapper chat_langfuse. */
Datum
chat_langfuse_validator(PG_FUNCTION_ARGS)
{
	List	   *list = untransformRelOptions(PG_GETARG_DATUM(0));
	Oid			catalog = PG_GETARG_OID(1);
	PromptServer server = {0};

	chat_option_validate(&table, catalog, list);
	if (catalog == SERVER)
	{
		chat_option_read(&table, SERVER, list, &server);
		chat_server_check_options(&server.endpoint, "host", "");
	}
	PG_RETURN_VOID();
}

/* ---------- configuration ---------- */

/* Reads the server's options; NULL if there is none. */
static PromptServer *
load_server(void)
{
	PromptServer *server;
	ChatServer *endpoint;
	ForeignServer *entry;

	if (prompt_server[0] == '\0')
		return NULL;
	entry = chat_server_find(prompt_server, WRAPPER, "a prompt server", true);
	if (entry == NULL)
		return NULL;
	server = palloc0(sizeof(PromptServer));
	server->cache_ttl = DEFAULT_TTL;
	endpoint = &server->endpoint;
	endpoint->oid = entry->serverid;
	endpoint->name = pstrdup(entry->servername);
	endpoint->connect_timeout = -1;
	endpoint->stream_timeout = DEFAULT_TIMEOUT;
	chat_option_read(&table, SERVER, entry->options, server);
	endpoint->is_loopback = chat_option_is_loopback(endpoint->base_url);
	endpoint->allow_http |= endpoint->is_loopback;
	endpoint->allow_private |= endpoint->is_loopback;
	return server;
}

/* Encodes a text in base 64. */
static char *
base64(const char *text)
{
	static const char digits[] =
	"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	size_t		len = strlen(text);
	char	   *out = palloc0((len + 2) / 3 * 4 + 1);
	char	   *at = out;

	for (size_t i = 0; i < len; i += 3)
	{
		uint32		three = (uint8) text[i] << 16;

		if (i + 1 < len)
			three |= (uint8) text[i + 1] << 8;
		if (i + 2 < len)
			three |= (uint8) text[i + 2];
		*at++ = digits[three >> 18];
		*at++ = digits[three >> 12 & 63];
		*at++ = i + 1 < len ? digits[three >> 6 & 63] : '=';
		*at++ = i + 2 < len ? digits[three & 63] : '=';
	}
	return out;
}

/* Forgets the secrets of a list of options. */
static void
wipe(List *list)
{
	ListCell   *cell;

	foreach(cell, list)
	{
		char	   *value = strVal(((DefElem *) lfirst(cell))->arg);

		explicit_bzero(value, strlen(value));
	}
}

/*
 * Returns the header that carries the keys, NULL unless both are there; *key
 * is the secret one, so that it can be kept out of what is told.
 */
static char *
authorization(const PromptServer *server, char **key)
{
	HeapTuple	tuple;
	List	   *list;
	Datum		datum;
	bool		isnull;
	const char *public_key;
	const char *secret_key;
	char	   *header = NULL;

	tuple = SearchSysCache2(USERMAPPINGUSERSERVER,
							ObjectIdGetDatum(chat_db_extension_owner()),
							ObjectIdGetDatum(server->endpoint.oid));
	if (!HeapTupleIsValid(tuple))
		tuple = SearchSysCache2(USERMAPPINGUSERSERVER,
								ObjectIdGetDatum(InvalidOid),
								ObjectIdGetDatum(server->endpoint.oid));
	if (!HeapTupleIsValid(tuple))
		return NULL;
	datum = SysCacheGetAttr(USERMAPPINGUSERSERVER, tuple,
							Anum_pg_user_mapping_umoptions, &isnull);
	list = isnull ? NIL : untransformRelOptions(datum);
	public_key = chat_option_get(list, "public_key");
	secret_key = chat_option_get(list, "secret_key");
	if (public_key && secret_key)
	{
		char	   *both = psprintf("%s:%s", public_key, secret_key);
		char	   *encoded = base64(both);

		header = psprintf("Authorization: Basic %s", encoded);
		*key = pstrdup(secret_key);
		explicit_bzero(both, strlen(both));
		explicit_bzero(encoded, strlen(encoded));
	}
	wipe(list);
	ReleaseSysCache(tuple);
	return header;
}

/* The label that an environment uses. */
static const char *
label_of(const PromptServer *server)
{
	const char *environment = server->endpoint.environment;

	return environment && strcmp(environment, "production") == 0
		? "production" : "latest";
}

/* ---------- fetching ---------- */

/* Which prompt a request is for, and what came. */
typedef struct Fetched
{
	char	   *name;
	const char *label;
	int			version;
} Fetched;

/* Joins the texts of a chat prompt: its system messages, or all of them. */
static char *
join_messages(JsonbContainer *messages, bool system_only)
{
	StringInfoData text;

	initStringInfo(&text);
	for (int i = 0; i < (int) JsonContainerSize(messages); i++)
	{
		JsonbValue *m = getIthJsonbValueFromContainer(messages, i);
		JsonbContainer *object = m->type == jbvBinary ? m->val.binary.data
			: NULL;
		JsonbValue	v;

		if (object == NULL || !JsonContainerIsObject(object))
			continue;
		if (system_only &&
			(getKeyJsonValueFromContainer(object, "role", 4, &v) == NULL ||
			 v.type != jbvString ||
			 ((v.val.string.len != 6 ||
			   memcmp(v.val.string.val, "system", 6) != 0) &&
			  (v.val.string.len != 9 ||
			   memcmp(v.val.string.val, "developer", 9) != 0))))
			continue;
		if (getKeyJsonValueFromContainer(object, "content", 7, &v) == NULL ||
			v.type != jbvString)
			continue;
		if (text.len > 0)
			appendStringInfoString(&text, "\n\n");
		appendBinaryStringInfo(&text, v.val.string.val, v.val.string.len);
	}
	return text.data;
}

/* Reads the answer: a text prompt, or a chat prompt. */
static bool
read_answer(ChatSide *side, const char *body, size_t len)
{
	Fetched    *f = side->extra;
	Jsonb	   *json = chat_db_parse_json(pnstrdup(body, len));
	JsonbValue	v;

	if (json == NULL || !JB_ROOT_IS_OBJECT(json) ||
		getKeyJsonValueFromContainer(&json->root, "version", 7, &v) == NULL ||
		v.type != jbvNumeric)
		return false;
	f->version = DatumGetInt32(DirectFunctionCall1(numeric_int4,
												   NumericGetDatum(v.val.numeric)));
	if (getKeyJsonValueFromContainer(&json->root, "prompt", 6, &v) == NULL)
		return false;
	if (v.type == jbvString)
		side->text = pnstrdup(v.val.string.val, v.val.string.len);
	else if (v.type == jbvBinary && JsonContainerIsArray(v.val.binary.data))
	{
		side->text = join_messages(v.val.binary.data, true);
		if (side->text[0] == '\0')
			side->text = join_messages(v.val.binary.data, false);
	}
	return side->text != NULL && side->text[0] != '\0';
}

/* Stores what came, and lets the turns go on that wait. */
static bool
store(ChatSide *side, int64 holder)
{
	Fetched    *f = side->extra;
	Datum		values[6];
	char		nulls[7] = "      ";

	if (side->failed)
		ereport(WARNING,
				(errcode(ERRCODE_EXTERNAL_ROUTINE_EXCEPTION),
				 errmsg("could not fetch prompt \"%s\" from server \"%s\"",
						f->name, side->server->name),
				 errdetail("%s", side->error),
				 errhint("What was fetched before serves, or the prompt of this name in the database.")));
	values[0] = CStringGetTextDatum(side->server->name);
	values[1] = CStringGetTextDatum(f->name);
	values[2] = CStringGetTextDatum(f->label);
	values[3] = side->failed ? (Datum) 0 : CStringGetTextDatum(side->text);
	nulls[3] = side->failed ? 'n' : ' ';
	values[4] = Int32GetDatum(f->version);
	values[5] = side->failed ? CStringGetTextDatum(side->error) : (Datum) 0;
	nulls[5] = side->failed ? ' ' : 'n';
	chat_db_exec(&store_cached, values, nulls);
	values[0] = ObjectIdGetDatum(MyDatabaseId);
	chat_db_exec(&wake_turns, values, NULL);
	return true;
}

static const ChatSideType fetch_type = {
	.read = read_answer,
	.store = store,
};

/* True if a request is for the prompt of this name. */
static bool
is_for(const ChatSide *side, void *name)
{
	return side->type == &fetch_type &&
		strcmp(((const Fetched *) side->extra)->name, name) == 0;
}

/* Returns a name as part of a URL's path. */
static char *
encode(const char *name)
{
	StringInfoData out;

	initStringInfo(&out);
	for (; *name; name++)
	{
		if (isalnum((unsigned char) *name) || strchr("-._~", *name))
			appendStringInfoChar(&out, *name);
		else
			appendStringInfo(&out, "%%%02X", (unsigned char) *name);
	}
	return out.data;
}

/* Asks for a prompt, unless that is under way; false if it cannot be. */
static bool
ask(const char *name)
{
	MemoryContext old = CurrentMemoryContext;
	PromptServer *server;
	ChatSide   *side;
	Fetched    *f;

	if (chat_side_find(is_for, (void *) name))
		return true;
	side = chat_side_add(&fetch_type);
	MemoryContextSwitchTo(side->context);
	side->extra = f = palloc0(sizeof(Fetched));
	f->name = pstrdup(name);
	server = load_server();
	f->label = label_of(server);
	side->server = &server->endpoint;
	side->header = authorization(server, &side->key);
	side->url = psprintf("%s?label=%s",
						 chat_server_url(side->server,
										 psprintf("/api/public/v2/prompts/%s",
												  encode(name))),
						 f->label);
	MemoryContextSwitchTo(old);
	return true;
}

/* ---------- finding ---------- */

/* True if both keys are there: without them no server is configured. */
static bool
is_configured(const PromptServer *server)
{
	char	   *key = NULL;
	char	   *header = authorization(server, &key);

	if (header == NULL)
		return false;
	explicit_bzero(header, strlen(header));
	chat_server_wipe(key);
	return true;
}

/* What is stored of a prompt. */
typedef struct Cached
{
	char	   *template;		/* NULL = there is none */
	int64		age;			/* of the template, ms */
	int64		tried;			/* how long ago it was asked for, ms */
} Cached;

/* Has a prompt fetched where that is due; says whether the turn waits. */
static bool
fetch_prompt(const PromptServer *server, const char *name, const Cached *c,
			 bool waited)
{
	bool		recent = c->tried < JUST_NOW;
	bool		pause = c->tried < MIN_PAUSE;

	if (waited)
		/* somebody else's prompt may have come first */
		return !recent && chat_side_find(is_for, (void *) name) != NULL;
	if (server->cache_ttl == 0)
		return ask(name);
	if (c->template == NULL)
		return !pause && ask(name);
	if (c->age >= server->cache_ttl && !(pause && c->age > c->tried))
		(void) ask(name);
	return false;
}

/* Returns the template of a prompt as the server had it last. */
char *
chat_langfuse_find(const char *name, ChatPromptFetch *fetch, int *version)
{
	PromptServer *server = load_server();
	Cached		c = {NULL, PG_INT64_MAX, PG_INT64_MAX};
	Datum		values[3];

	if (server == NULL || !is_configured(server))
		return NULL;
	values[0] = CStringGetTextDatum(server->endpoint.name);
	values[1] = CStringGetTextDatum(name);
	values[2] = CStringGetTextDatum(label_of(server));
	if (chat_db_exec(&find_cached, values, NULL) > 0)
	{
		c.template = chat_db_text(0, 1);
		*version = chat_db_int32(0, 2, 0);
		c.age = chat_db_int64(0, 3, PG_INT64_MAX);
		c.tried = chat_db_int64(0, 4, PG_INT64_MAX);
	}
	if (fetch)
		fetch->wait = fetch_prompt(server, name, &c, fetch->waited);
	return c.template;
}
