/*
 * server.c
 *		LLM endpoints: the options of wrapper chat_llm, the keys of its user
 *		mappings, and what a request needs of them.
 *
 * Owns the setting chat.default_server, the table of options, and which
 * wrappers were found to be the extension's (local to the process).  Foreign
 * servers belong to whoever created them: an endpoint's address and its key
 * come from the catalog alone, never from a setting, a session or a call.
 *
 * A key is copied once, out of the catalog, the file or the environment, into
 * the caller's memory; every buffer that it passes through here is wiped.
 */
#include "postgres.h"

#include <ctype.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "access/htup_details.h"
#include "access/reloptions.h"
#include "catalog/dependency.h"
#include "catalog/pg_foreign_data_wrapper.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_user_mapping.h"
#include "commands/extension.h"
#include "foreign/foreign.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/jsonb.h"
#include "utils/syscache.h"

#include "compat.h"
#include "option.h"
#include "server.h"
#include "shmem.h"

#define WRAPPER "chat_llm"
#define REDACTED "[redacted]"

/* A key file larger than this is not one. */
#define MAX_KEY_FILE_SIZE 65536

/* Below this many bytes a key is no secret, and replacing it would garble. */
#define MIN_SECRET_LENGTH 4

/* Bytes from which on a token that starts as OpenAI's keys do is hidden. */
#define MIN_KEY_TOKEN_LENGTH 16

#define SERVER ForeignServerRelationId
#define MAPPING UserMappingRelationId
#define FIELD(name) offsetof(ChatServer, name)
#define SUPER CHAT_OPTION_SUPERUSER
#define DAY_MS (24 * 60 * 60 * 1000.0)

static const ChatOption options[] = {
	{"allow_http", SERVER, CHAT_OPTION_BOOL, 0, FIELD(allow_http), 0, 0, NULL},
	{"allow_private", SERVER, CHAT_OPTION_BOOL, 0, FIELD(allow_private),
	0, 0, NULL},
	{"auth_header", SERVER, CHAT_OPTION_HEADER, 0, FIELD(auth_header),
	0, 0, NULL},
	{"base_url", SERVER, CHAT_OPTION_URL, CHAT_OPTION_REQUIRED,
	FIELD(base_url), 0, 0, NULL},
	{"ca_file", SERVER, CHAT_OPTION_PATH, SUPER, FIELD(ca_file), 0, 0, NULL},
	{"connect_timeout", SERVER, CHAT_OPTION_TIME, 0, FIELD(connect_timeout),
	1, DAY_MS, NULL},
	{"context_window", SERVER, CHAT_OPTION_INT, 0, FIELD(context_window),
	1, 1000000000, NULL},
	{"environment", SERVER, CHAT_OPTION_TEXT, 0, FIELD(environment),
	0, 0, NULL},
	{"extra_body", SERVER, CHAT_OPTION_OBJECT, 0, FIELD(extra_body),
	0, 0, NULL},
	{"extra_headers", SERVER, CHAT_OPTION_HEADERS, 0, FIELD(extra_headers),
	0, 0, NULL},
	{"first_token_timeout", SERVER, CHAT_OPTION_TIME, 0,
	FIELD(first_token_timeout), 1, DAY_MS, NULL},
	{"idle_timeout", SERVER, CHAT_OPTION_TIME, 0, FIELD(idle_timeout),
	1, DAY_MS, NULL},
	{"input_price", SERVER, CHAT_OPTION_REAL, 0, CHAT_OPTION_NO_FIELD,
	0, 1000000, NULL},
	{"max_concurrency", SERVER, CHAT_OPTION_INT, 0, FIELD(max_concurrency),
	1, 1000000, NULL},
	{"max_requests_per_minute", SERVER, CHAT_OPTION_INT, 0, FIELD(max_rpm),
	1, 100000000, NULL},
	{"max_tokens", SERVER, CHAT_OPTION_INT, 0, FIELD(max_tokens),
	1, 1000000000, NULL},
	{"max_tokens_field", SERVER, CHAT_OPTION_ENUM, 0, FIELD(max_tokens_field),
	0, 0, "max_tokens, max_completion_tokens"},
	{"max_tokens_per_task", SERVER, CHAT_OPTION_INT, 0,
	FIELD(max_tokens_per_task), 1, 2000000000, NULL},
	{"model", SERVER, CHAT_OPTION_TEXT, 0, FIELD(model), 0, 0, NULL},
	{"output_price", SERVER, CHAT_OPTION_REAL, 0, CHAT_OPTION_NO_FIELD,
	0, 1000000, NULL},
	{"proxy", SERVER, CHAT_OPTION_TEXT, SUPER, FIELD(proxy), 0, 0, NULL},
	{"retries", SERVER, CHAT_OPTION_INT, 0, FIELD(retries), 0, 100, NULL},
	{"stream_timeout", SERVER, CHAT_OPTION_TIME, 0, FIELD(stream_timeout),
	1, DAY_MS, NULL},
	{"stream_usage", SERVER, CHAT_OPTION_BOOL, 0, FIELD(stream_usage),
	0, 0, NULL},
	{"summarize", SERVER, CHAT_OPTION_BOOL, 0, FIELD(summarize), 0, 0, NULL},
	{"summary_model", SERVER, CHAT_OPTION_TEXT, 0, FIELD(summary_model),
	0, 0, NULL},
	{"temperature", SERVER, CHAT_OPTION_REAL, 0, FIELD(temperature),
	0, 2, NULL},
	{"thinking", SERVER, CHAT_OPTION_BOOL, 0, FIELD(thinking), 0, 0, NULL},
	{"title_model", SERVER, CHAT_OPTION_TEXT, 0, FIELD(title_model),
	0, 0, NULL},
	{"top_p", SERVER, CHAT_OPTION_REAL, 0, FIELD(top_p), 0, 1, NULL},
	{"tracing", SERVER, CHAT_OPTION_BOOL, 0, FIELD(tracing), 0, 0, NULL},
	{"api_key", MAPPING, CHAT_OPTION_SECRET, 0, CHAT_OPTION_NO_FIELD,
	0, 0, NULL},
	{"api_key_env", MAPPING, CHAT_OPTION_TEXT, SUPER, CHAT_OPTION_NO_FIELD,
	0, 0, NULL},
	{"api_key_file", MAPPING, CHAT_OPTION_PATH, SUPER, CHAT_OPTION_NO_FIELD,
	0, 0, NULL},
};

static const ChatOptionTable table = {options, lengthof(options)};

char	   *chat_server_default = NULL;

/* wrappers that were found to be the extension's */
static Oid	our_wrappers[4];
static int	nour_wrappers = 0;

PG_FUNCTION_INFO_V1(chat_llm_validator);

/* Forgets which wrappers are ours when one changes. */
static void
forget_wrappers(Datum arg, int cacheid, uint32 hashvalue)
{
	nour_wrappers = 0;
}

/*
 * Declares the setting.  Any user may set it: it picks among servers that
 * the session's owner has USAGE of, and so redirects nothing.
 */
void
chat_server_init(void)
{
	DefineCustomStringVariable("chat.default_server",
							   "Foreign server that answers chat sessions which name none.",
							   "The session's owner needs USAGE on it.",
							   &chat_server_default, "", PGC_USERSET, 0,
							   NULL, NULL, NULL);
	CacheRegisterSyscacheCallback(FOREIGNDATAWRAPPEROID, forget_wrappers,
								  (Datum) 0);
}

/*
 * Validator
 */

/*
 * Raises what two options of a server say against each other; the names are
 * those that the wrapper gives to base_url and extra_headers.
 */
void
chat_server_check_options(const ChatServer *server, const char *url_option,
						  const char *headers_option)
{
	Jsonb	   *object;
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	v;

	if (pg_strncasecmp(server->base_url, "http://", 7) == 0 &&
		!server->allow_http && !chat_option_is_loopback(server->base_url))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\"", url_option),
				 errdetail("Without encryption, everybody on the way reads the key and the messages."),
				 errhint("Use https://, or set the option allow_http for a network that you trust.")));
	if (server->extra_headers == NULL || server->auth_header == NULL)
		return;
	object = DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
												CStringGetDatum(server->extra_headers)));
	it = JsonbIteratorInit(&object->root);
	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		if (token == WJB_KEY &&
			v.val.string.len == (int) strlen(server->auth_header) &&
			pg_strncasecmp(v.val.string.val, server->auth_header,
						   v.val.string.len) == 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("invalid value for option \"%s\"",
							headers_option),
					 errdetail("Header \"%s\" carries the key: the option auth_header says so.",
							   server->auth_header),
					 errhint("A key belongs in a user mapping.")));
	}
}

/* Raises when a mapping says more than once where its key is. */
void
chat_server_check_mapping(List *list)
{
	if (list_length(list) > 1)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
				 errmsg("a user mapping takes only one of the options api_key, api_key_file and api_key_env"),
				 errhint("DROP the other one in the same ALTER USER MAPPING.")));
}

/* Checks the options of an object of wrapper chat_llm. */
Datum
chat_llm_validator(PG_FUNCTION_ARGS)
{
	List	   *list = untransformRelOptions(PG_GETARG_DATUM(0));
	Oid			catalog = PG_GETARG_OID(1);

	ChatServer	server = {0};

	chat_option_validate(&table, catalog, list);
	if (catalog == SERVER)
	{
		chat_option_read(&table, SERVER, list, &server);
		chat_server_check_options(&server, "base_url", "extra_headers");
		/* the limits may be others now */
		chat_shmem_ring_at_commit(false);
	}
	else if (catalog == MAPPING)
		chat_server_check_mapping(list);
	PG_RETURN_VOID();
}

/*
 * Servers
 */

/*
 * Whether a foreign-data wrapper is the one that this extension made.  That it
 * is of the extension is looked up in two catalogs, so it is remembered.
 */
static bool
is_our_wrapper(Oid fdwid, const char *wrapper)
{
	ForeignDataWrapper *fdw = GetForeignDataWrapper(fdwid);

	if (strcmp(fdw->fdwname, wrapper) != 0)
		return false;
	for (int i = 0; i < nour_wrappers; i++)
		if (our_wrappers[i] == fdwid)
			return true;
	if (getExtensionOfObject(ForeignDataWrapperRelationId, fdwid) !=
		get_extension_oid("chat", false))
		return false;
	if (nour_wrappers < (int) lengthof(our_wrappers))
		our_wrappers[nour_wrappers++] = fdwid;
	return true;
}

/* Finds the catalog's entry of a wrapper's server, see server.h. */
ForeignServer *
chat_server_find(const char *name, const char *wrapper, const char *what,
				 bool missing_ok)
{
	ForeignServer *entry = GetForeignServerByName(name, true);

	if (entry == NULL)
	{
		if (missing_ok)
			return NULL;
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("server \"%s\" does not exist", name),
				 errhint("Create it with CREATE SERVER ... FOREIGN DATA WRAPPER %s.",
						 wrapper)));
	}
	if (!is_our_wrapper(entry->fdwid, wrapper))
	{
		if (missing_ok)
			return NULL;
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("server \"%s\" is not %s", name, what),
				 errdetail("Its foreign-data wrapper is \"%s\".",
						   GetForeignDataWrapper(entry->fdwid)->fdwname),
				 errhint("Create a server with CREATE SERVER ... FOREIGN DATA WRAPPER %s.",
						 wrapper)));
	}
	return entry;
}

/* Reads a server's configuration, see server.h. */
ChatServer *
chat_server_load(const char *name, bool missing_ok)
{
	ForeignServer *entry = chat_server_find(name, WRAPPER, "an LLM endpoint",
											missing_ok);
	ChatServer *server;

	if (entry == NULL)
		return NULL;
	server = palloc0(sizeof(ChatServer));
	server->oid = entry->serverid;
	server->name = pstrdup(entry->servername);
	server->stream_usage = true;
	server->connect_timeout = -1;
	server->first_token_timeout = -1;
	server->idle_timeout = -1;
	server->stream_timeout = -1;
	server->retries = -1;
	chat_option_read(&table, SERVER, entry->options, server);
	if (server->base_url == NULL)
		elog(ERROR, "server \"%s\" has no base_url", name);
	if (server->max_tokens_field == NULL)
		server->max_tokens_field = pstrdup("max_tokens");
	server->is_loopback = chat_option_is_loopback(server->base_url);
	server->allow_http |= server->is_loopback;
	server->allow_private |= server->is_loopback;
	return server;
}

/* Raises an error unless role has USAGE of the server. */
void
chat_server_check_usage(const ChatServer *server, Oid role)
{
	if (!chat_server_usable(server->oid, role))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for foreign server %s",
						server->name),
				 errhint("The server's owner can run GRANT USAGE ON FOREIGN SERVER %s TO %s.",
						 quote_identifier(server->name),
						 quote_identifier(GetUserNameFromId(role, false)))));
}

/* Raises what stands against role's using the server, see server.h. */
void
chat_server_check(const char *name, Oid role, const char *model)
{
	ChatServer *server;

	if (name == NULL || *name == '\0')
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("no server is chosen for this chat session"),
				 errhint("Create one with CREATE SERVER ... FOREIGN DATA WRAPPER " WRAPPER
						 ", and name it in the call, in the session or in the setting chat.default_server.")));
	server = chat_server_load(name, false);
	chat_server_check_usage(server, role);
	if ((model == NULL || *model == '\0') && server->model == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_DYNAMIC_PARAMETER_VALUE_NEEDED),
				 errmsg("server \"%s\" has no model", name),
				 errhint("Set one with ALTER SERVER %s OPTIONS (ADD model '...'), or in the session's settings.",
						 quote_identifier(name))));
	chat_server_wipe(chat_server_key(server, role));
}

/* Returns base_url with path appended, the query string kept behind. */
char *
chat_server_url(const ChatServer *server, const char *path)
{
	const char *base = server->base_url;
	size_t		len = strcspn(base, "?");
	const char *query = base + len;

	while (len > 0 && base[len - 1] == '/')
		len--;
	return psprintf("%.*s%s%s", (int) len, base, path, query);
}

/*
 * Keys
 */

/* Where a key comes from, for errors: the name is for the log alone. */
typedef struct KeySource
{
	const ChatServer *server;
	const char *name;
	const char *hint;
} KeySource;

/* Raises that a key's source does not hold one. */
static void
refuse_key(const KeySource *source, const char *problem)
{
	ereport(ERROR,
			(errcode(ERRCODE_CONFIG_FILE_ERROR),
			 errmsg("could not read the API key of server \"%s\"",
					source->server->name),
			 errdetail("%s", problem),
			 errdetail_log("%s The key is in %s.", problem, source->name),
			 errhint("%s", source->hint)));
}

/* Checks what was read as a key, which is wiped when it is none. */
static char *
accept_key(const KeySource *source, char *key)
{
	const char *problem = NULL;

	if (*key == '\0')
		problem = "The key is empty.";
	for (const char *p = key; *p && problem == NULL; p++)
	{
		if ((unsigned char) *p < 0x20 || *p == 0x7f)
			problem = "The key is more than one line of text.";
	}
	if (problem != NULL)
	{
		chat_server_wipe(key);
		refuse_key(source, problem);
	}
	return key;
}

/* Opens a key's file, a regular one: a pipe could keep the worker waiting. */
static int
open_key_file(const KeySource *source, const char *path)
{
	struct stat st;
	int			fd;

	if (stat(path, &st) == 0 && !S_ISREG(st.st_mode))
		refuse_key(source, "The file is not a regular file.");
	fd = OpenTransientFile(path, O_RDONLY | PG_BINARY);
	if (fd < 0)
		refuse_key(source, psprintf("The file cannot be opened: %s.",
									strerror(errno)));
	return fd;
}

/* Reads the key that a file holds, in one piece into one buffer. */
static char *
read_key_file(const ChatServer *server, const char *path)
{
	KeySource	source = {server, psprintf("file \"%s\"", path),
	"Write the key, and nothing else, into a file that the server's operating system user can read."};
	int			fd = open_key_file(&source, path);
	char	   *buffer = palloc(MAX_KEY_FILE_SIZE + 1);
	char	   *key = NULL;
	size_t		len = 0;
	ssize_t		got;
	bool		whole;

	while ((got = read(fd, buffer + len, MAX_KEY_FILE_SIZE + 1 - len)) > 0)
		len += got;
	CloseTransientFile(fd);
	whole = (got == 0 && len <= MAX_KEY_FILE_SIZE);
	while (len > 0 && (buffer[len - 1] == '\n' || buffer[len - 1] == '\r'))
		len--;
	if (whole && memchr(buffer, '\0', len) == NULL)
		key = pnstrdup(buffer, len);
	explicit_bzero(buffer, MAX_KEY_FILE_SIZE + 1);
	pfree(buffer);
	if (key == NULL)
		refuse_key(&source, "The file does not hold a line of text.");
	return accept_key(&source, key);
}

/* Reads the key that an environment variable of the postmaster holds. */
static char *
read_key_env(const ChatServer *server, const char *variable)
{
	KeySource	source = {server,
		psprintf("environment variable \"%s\"", variable),
	"Set the variable in the environment in which the server starts, and restart it."};
	const char *value = getenv(variable);

	if (value == NULL)
		refuse_key(&source, "The environment variable is not set.");
	return accept_key(&source, pstrdup(value));
}

/* Returns the rest of a text that starts with an option's name and '='. */
static char *
option_value(const text *element, const char *name)
{
	const char *data = VARDATA_ANY(element);
	int			len = VARSIZE_ANY_EXHDR(element);
	int			skip = (int) strlen(name) + 1;

	if (len < skip || memcmp(data, name, skip - 1) != 0 ||
		data[skip - 1] != '=')
		return NULL;
	return pnstrdup(data + skip, len - skip);
}

/*
 * Takes the key that a mapping's options tell, NULL when they tell none.  It
 * reads the array in place, because the usual helpers leave copies behind.
 */
static char *
mapping_key(const ChatServer *server, ArrayType *array)
{
	Datum	   *elements;
	int			n;
	char	   *value;
	KeySource	source = {server, "option api_key",
	"Set it with ALTER USER MAPPING ... OPTIONS (SET api_key '...')."};

	deconstruct_array(array, TEXTOID, -1, false, TYPALIGN_INT,
					  &elements, NULL, &n);
	for (int i = 0; i < n; i++)
	{
		const text *element = (const text *) DatumGetPointer(elements[i]);

		if ((value = option_value(element, "api_key")) != NULL)
			return accept_key(&source, value);
		if ((value = option_value(element, "api_key_file")) != NULL)
			return read_key_file(server, value);
		if ((value = option_value(element, "api_key_env")) != NULL)
			return read_key_env(server, value);
	}
	return NULL;
}

/* Returns the key of role's mapping, or else PUBLIC's, see server.h. */
char *
chat_server_key(const ChatServer *server, Oid role)
{
	HeapTuple	tuple;
	Datum		datum;
	ArrayType  *array;
	bool		isnull;
	char	   *key = NULL;

	tuple = SearchSysCache2(USERMAPPINGUSERSERVER, ObjectIdGetDatum(role),
							ObjectIdGetDatum(server->oid));
	if (!HeapTupleIsValid(tuple))
		tuple = SearchSysCache2(USERMAPPINGUSERSERVER,
								ObjectIdGetDatum(InvalidOid),
								ObjectIdGetDatum(server->oid));
	if (!HeapTupleIsValid(tuple))
	{
		if (server->is_loopback)
			return NULL;
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("no API key for server \"%s\"", server->name),
				 errdetail("There is no user mapping for role \"%s\", and none for PUBLIC.",
						   GetUserNameFromId(role, false)),
				 errhint("Run CREATE USER MAPPING FOR PUBLIC SERVER %s OPTIONS (api_key_file '...'); without options it says that no key is needed.",
						 quote_identifier(server->name))));
	}
	datum = SysCacheGetAttr(USERMAPPINGUSERSERVER, tuple,
							Anum_pg_user_mapping_umoptions, &isnull);
	if (!isnull)
	{
		array = DatumGetArrayTypeP(datum);
		key = mapping_key(server, array);
		if ((Pointer) array != DatumGetPointer(datum))
		{
			explicit_bzero(array, VARSIZE(array));
			pfree(array);
		}
	}
	ReleaseSysCache(tuple);
	return key;
}

/*
 * Returns "name: scheme+value" in one allocation: psprintf() could leave part
 * of a key behind in a buffer that was too small.
 */
static char *
make_header(const char *name, const char *scheme, const char *value)
{
	size_t		size = strlen(name) + 2 + strlen(scheme) + strlen(value) + 1;
	char	   *header = palloc(size);

	snprintf(header, size, "%s: %s%s", name, scheme, value);
	return header;
}

/* Returns the headers of a request, see server.h. */
int
chat_server_headers(const ChatServer *server, const char *key,
					char ***headers)
{
	char	  **list;
	int			n = 0;
	bool		named = false;
	Jsonb	   *extra = NULL;
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	v;

	if (server->extra_headers)
		extra = DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
												   CStringGetDatum(server->extra_headers)));
	list = palloc((3 + (extra ? JB_ROOT_COUNT(extra) : 0)) * sizeof(char *));
	list[n++] = pstrdup("Content-Type: application/json");
	if (key && server->auth_header)
		list[n++] = make_header(server->auth_header, "", key);
	else if (key)
		list[n++] = make_header("Authorization", "Bearer ", key);
	if (extra)
	{
		it = JsonbIteratorInit(&extra->root);
		while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
		{
			if (token == WJB_KEY)
				list[n] = pnstrdup(v.val.string.val, v.val.string.len);
			else if (token == WJB_VALUE)
			{
				named |= pg_strcasecmp(list[n], "user-agent") == 0;
				/* libcurl sends an empty header only when a ; ends it */
				list[n] = v.val.string.len == 0 ?
					psprintf("%s;", list[n]) :
					psprintf("%s: %.*s", list[n], v.val.string.len,
							 v.val.string.val);
				n++;
			}
		}
	}
	if (!named)
		list[n++] = pstrdup("User-Agent: chat/" CHAT_VERSION);
	*headers = list;
	return n;
}

/* Returns how many bytes at a text's end are the start of a key. */
static size_t
cut_key_length(const char *text, const char *key)
{
	size_t		size = strlen(text);
	size_t		n = Min(size, strlen(key) - 1);

	while (n >= MIN_SECRET_LENGTH && memcmp(text + size - n, key, n) != 0)
		n--;
	return n >= MIN_SECRET_LENGTH ? n : 0;
}

/*
 * Appends text with every occurrence of a key replaced, and what is left of
 * one where the text was cut.
 */
static void
redact_key(StringInfo out, const char *text, const char *key)
{
	const char *hit;
	size_t		cut;

	while ((hit = strstr(text, key)) != NULL)
	{
		appendBinaryStringInfo(out, text, hit - text);
		appendStringInfoString(out, REDACTED);
		text = hit + strlen(key);
	}
	cut = cut_key_length(text, key);
	appendBinaryStringInfo(out, text, strlen(text) - cut);
	if (cut > 0)
		appendStringInfoString(out, REDACTED);
}

/* Appends text with what looks like a key of OpenAI's replaced. */
static void
redact_tokens(StringInfo out, const char *text)
{
	/* endpoints quote a key with its middle starred, or cut by dots */
	static const char alphabet[] =
	"*.-_0123456789"
	"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
	const char *from = text;
	const char *hit;

	while ((hit = strstr(from, "sk-")) != NULL)
	{
		size_t		len = strspn(hit, alphabet);

		if (len < MIN_KEY_TOKEN_LENGTH ||
			(hit > text && isalnum((unsigned char) hit[-1])))
			len = 3;
		else
		{
			appendBinaryStringInfo(out, from, hit - from);
			appendStringInfoString(out, REDACTED);
			from = hit + len;
			continue;
		}
		appendBinaryStringInfo(out, from, hit + len - from);
		from = hit + len;
	}
	appendStringInfoString(out, from);
}

/* Returns a copy of text without the key or anything like one. */
char *
chat_server_redact(const char *text, const char *key)
{
	StringInfoData without_key;
	StringInfoData out;

	if (text == NULL)
		return NULL;
	initStringInfo(&without_key);
	initStringInfo(&out);
	if (key != NULL && strlen(key) >= MIN_SECRET_LENGTH)
		redact_key(&without_key, text, key);
	else
		appendStringInfoString(&without_key, text);
	redact_tokens(&out, without_key.data);
	explicit_bzero(without_key.data, without_key.len);
	pfree(without_key.data);
	return out.data;
}

/*
 * extra_body
 */

/* The variables of extra_body's placeholders. */
typedef struct Variable
{
	const char *placeholder;
	const char *value;
} Variable;

/*
 * Replaces the placeholders of a string in one pass, so that a value is never
 * looked at again.  NULL when one of them has no value.
 */
static char *
expand_string(const char *s, int len, const Variable *vars, int nvars)
{
	StringInfoData out;
	const char *end = s + len;

	initStringInfo(&out);
	while (s < end)
	{
		int			i;

		for (i = 0; i < nvars; i++)
		{
			int			n = (int) strlen(vars[i].placeholder);

			if (end - s >= n && memcmp(s, vars[i].placeholder, n) == 0)
			{
				if (vars[i].value == NULL)
					return NULL;
				appendStringInfoString(&out, vars[i].value);
				s += n;
				break;
			}
		}
		if (i == nvars)
			appendStringInfoChar(&out, *s++);
	}
	return out.data;
}

/* Rebuilds an object with the placeholders of its strings replaced. */
static Jsonb *
expand_object(Jsonb *object, const Variable *vars, int nvars)
{
	JsonbIterator *it = JsonbIteratorInit(&object->root);
	JsonbParseState *state = NULL;
	JsonbValue *result = NULL;
	JsonbIteratorToken token;
	JsonbValue	v;
	JsonbValue	key;
	bool		have_key = false;

	while ((token = JsonbIteratorNext(&it, &v, false)) != WJB_DONE)
	{
		if (token == WJB_KEY)
		{
			/* not pushed before it is known whether its value stays */
			key = v;
			have_key = true;
			continue;
		}
		if ((token == WJB_VALUE || token == WJB_ELEM) && v.type == jbvString)
		{
			char	   *text = expand_string(v.val.string.val,
											 v.val.string.len, vars, nvars);

			if (text == NULL)
			{
				have_key = false;
				continue;
			}
			v.val.string.val = text;
			v.val.string.len = (int) strlen(text);
		}
		if (have_key)
			(void) pushJsonbValue(&state, WJB_KEY, &key);
		have_key = false;
		result = pushJsonbValue(&state, token,
								token == WJB_VALUE || token == WJB_ELEM ?
								&v : NULL);
	}
	return JsonbValueToJsonb(result);
}

/* Returns extra_body with its placeholders replaced, see server.h. */
char *
chat_server_expand_body(const ChatServer *server, const char *user_id,
						const char *session_id, const char *task_id)
{
	const Variable vars[] = {
		{"{{user_id}}", user_id},
		{"{{session_id}}", session_id},
		{"{{task_id}}", task_id},
		{"{{environment}}", server->environment},
	};
	Jsonb	   *object;

	if (server->extra_body == NULL)
		return NULL;
	if (strstr(server->extra_body, "{{") == NULL &&
		strchr(server->extra_body, '\\') == NULL)
		return pstrdup(server->extra_body);
	object = DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
												CStringGetDatum(server->extra_body)));
	object = expand_object(object, vars, lengthof(vars));
	return JsonbToCString(NULL, &object->root, VARSIZE(object));
}
