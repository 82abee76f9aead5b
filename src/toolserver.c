/*
 * toolserver.c
 *		Services that run HTTP tools: the options of wrapper chat_tool.
 *
 * Owns the wrapper's table of options and nothing else; what an endpoint
 * needs beyond that is server.c's, keys included.
 */
#include "postgres.h"

#include "access/reloptions.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_user_mapping.h"
#include "fmgr.h"

#include "option.h"
#include "toolserver.h"

#define WRAPPER "chat_tool"
#define SERVER ForeignServerRelationId
#define MAPPING UserMappingRelationId
#define FIELD(name) offsetof(ChatToolServer, name)
#define SUPER CHAT_OPTION_SUPERUSER
#define DAY_MS (24 * 60 * 60 * 1000.0)

static const ChatOption options[] = {
	{"allow_http", SERVER, CHAT_OPTION_BOOL, 0, FIELD(endpoint.allow_http),
	0, 0, NULL},
	{"allow_private", SERVER, CHAT_OPTION_BOOL, 0,
	FIELD(endpoint.allow_private), 0, 0, NULL},
	{"auth_header", SERVER, CHAT_OPTION_HEADER, 0,
	FIELD(endpoint.auth_header), 0, 0, NULL},
	{"ca_file", SERVER, CHAT_OPTION_PATH, SUPER, FIELD(endpoint.ca_file),
	0, 0, NULL},
	{"connect_timeout", SERVER, CHAT_OPTION_TIME, 0,
	FIELD(endpoint.connect_timeout), 1, DAY_MS, NULL},
	{"headers", SERVER, CHAT_OPTION_HEADERS, 0,
	FIELD(endpoint.extra_headers), 0, 0, NULL},
	{"ids_in_body", SERVER, CHAT_OPTION_BOOL, 0, FIELD(ids_in_body),
	0, 0, NULL},
	{"proxy", SERVER, CHAT_OPTION_TEXT, SUPER, FIELD(endpoint.proxy),
	0, 0, NULL},
	{"retries", SERVER, CHAT_OPTION_INT, 0, FIELD(endpoint.retries),
	0, 100, NULL},
	{"timeout", SERVER, CHAT_OPTION_TIME, 0, FIELD(endpoint.stream_timeout),
	1, DAY_MS, NULL},
	{"url", SERVER, CHAT_OPTION_URL, CHAT_OPTION_REQUIRED,
	FIELD(endpoint.base_url), 0, 0, NULL},
	{"api_key", MAPPING, CHAT_OPTION_SECRET, 0, CHAT_OPTION_NO_FIELD,
	0, 0, NULL},
	{"api_key_env", MAPPING, CHAT_OPTION_TEXT, SUPER, CHAT_OPTION_NO_FIELD,
	0, 0, NULL},
	{"api_key_file", MAPPING, CHAT_OPTION_PATH, SUPER, CHAT_OPTION_NO_FIELD,
	0, 0, NULL},
};

static const ChatOptionTable table = {options, lengthof(options)};

PG_FUNCTION_INFO_V1(chat_tool_validator);

/* Checks the options of an object of wrapper chat_tool. */
Datum
chat_tool_validator(PG_FUNCTION_ARGS)
{
	List	   *list = untransformRelOptions(PG_GETARG_DATUM(0));
	Oid			catalog = PG_GETARG_OID(1);
	ChatToolServer server = {0};

	chat_option_validate(&table, catalog, list);
	if (catalog == SERVER)
	{
		chat_option_read(&table, SERVER, list, &server);
		chat_server_check_options(&server.endpoint, "url", "headers");
	}
	else if (catalog == MAPPING)
		chat_server_check_mapping(list);
	PG_RETURN_VOID();
}

/* Reads a server's configuration, see toolserver.h. */
ChatToolServer *
chat_tool_server_load(const char *name, bool missing_ok)
{
	ForeignServer *entry = chat_server_find(name, WRAPPER,
											"a service for tools",
											missing_ok);
	ChatToolServer *server;
	ChatServer *endpoint;

	if (entry == NULL)
		return NULL;
	server = palloc0(sizeof(ChatToolServer));
	endpoint = &server->endpoint;
	endpoint->oid = entry->serverid;
	endpoint->name = pstrdup(entry->servername);
	endpoint->connect_timeout = -1;
	endpoint->first_token_timeout = -1;
	endpoint->idle_timeout = -1;
	endpoint->stream_timeout = -1;
	endpoint->retries = -1;
	chat_option_read(&table, SERVER, entry->options, server);
	if (endpoint->base_url == NULL)
		elog(ERROR, "server \"%s\" has no url", name);
	endpoint->is_loopback = chat_option_is_loopback(endpoint->base_url);
	endpoint->allow_http |= endpoint->is_loopback;
	endpoint->allow_private |= endpoint->is_loopback;
	return server;
}

/* Raises what stands against role's using the server, see toolserver.h. */
void
chat_tool_server_check(const char *name, Oid role, bool with_key)
{
	ChatToolServer *server = chat_tool_server_load(name, false);

	chat_server_check_usage(&server->endpoint, role);
	if (with_key)
		chat_server_wipe(chat_server_key(&server->endpoint, role));
}
