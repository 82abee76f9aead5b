/*
 * toolserver.h
 *		Services that run HTTP tools, as they are configured by foreign
 *		servers of wrapper chat_tool.
 *
 * An endpoint like any other, so that server.h's functions build its URL and
 * headers, find its key and redact what it says:
 *
 *		server = chat_tool_server_load(name, false);
 *		key = chat_server_key(&server->endpoint, owner);
 *		n = chat_server_headers(&server->endpoint, key, &headers);
 */
#ifndef CHAT_TOOLSERVER_H
#define CHAT_TOOLSERVER_H

#include "postgres.h"

#include "server.h"

typedef struct ChatToolServer
{
	ChatServer	endpoint;		/* option url is its base_url, headers its
								 * extra_headers, timeout its stream_timeout;
								 * max_concurrency, the model and the like are
								 * not set */
	bool		ids_in_body;	/* _operation_id and _task_id go with the
								 * arguments */
} ChatToolServer;

/* NULL only when missing_ok and there is no such server of chat_tool's. */
extern ChatToolServer *chat_tool_server_load(const char *name,
											 bool missing_ok);

/*
 * Raises what stands against role's using the server: there is none, no
 * USAGE; with_key also: no mapping, a key that cannot be read.
 */
extern void chat_tool_server_check(const char *name, Oid role, bool with_key);

#endif							/* CHAT_TOOLSERVER_H */
