/*
 * server.h
 *		LLM endpoints, as they are configured by foreign servers of wrapper
 *		chat_llm, and the keys of their user mappings.
 *
 * All of it needs a transaction; results live in the current memory context.
 * A key is the caller's to wipe (chat_server_wipe) as soon as it is sent, and
 * whatever an endpoint says goes through chat_server_redact before anybody
 * sees it.
 */
#ifndef CHAT_SERVER_H
#define CHAT_SERVER_H

#include "postgres.h"

#include "foreign/foreign.h"
#include "nodes/pg_list.h"

/* One endpoint; strings are NULL where the option is not set. */
typedef struct ChatServer
{
	Oid			oid;
	char	   *name;
	char	   *base_url;		/* never NULL, may hold a query string */
	char	   *model;
	char	   *title_model;
	bool		summarize;		/* what does not fit the window is summed up */
	char	   *summary_model;
	int			max_tokens_per_task;	/* 0 = any */
	char	   *temperature;	/* a JSON number, as it was written */
	char	   *top_p;			/* the same */
	int			max_tokens;		/* 0 = not set */
	char	   *max_tokens_field;	/* never NULL */
	int			context_window; /* in tokens, 0 = not known */
	bool		stream_usage;
	bool		tracing;
	bool		thinking;
	bool		allow_http;		/* also when is_loopback */
	bool		allow_private;	/* also when is_loopback */
	bool		is_loopback;	/* localhost, 127.0.0.0/8 or ::1 */
	char	   *environment;
	char	   *extra_body;		/* JSON object, placeholders not expanded */
	char	   *extra_headers;	/* JSON object of strings */
	char	   *auth_header;	/* NULL = Authorization: Bearer KEY; else the
								 * header whose value is the bare key */
	char	   *ca_file;
	char	   *proxy;
	int			connect_timeout;	/* milliseconds, -1 = the setting's */
	int			first_token_timeout;
	int			idle_timeout;
	int			stream_timeout;
	int			max_concurrency;	/* 0 = unlimited */
	int			max_rpm;		/* requests per minute, 0 = unlimited */
	int			retries;		/* -1 = the setting's */
} ChatServer;

/* Setting chat.default_server; "" = none. */
extern char *chat_server_default;

extern void chat_server_init(void);

/* NULL only when missing_ok and there is no such server of chat's. */
extern ChatServer *chat_server_load(const char *name, bool missing_ok);

/*
 * The key that role's mapping holds, or else PUBLIC's; NULL = none is needed.
 * Errors never hold it.
 */
extern char *chat_server_key(const ChatServer *server, Oid role);

/*
 * Raises what stands against role's using the server: there is none (name
 * NULL or ""), no USAGE, no model, no mapping.  model is what the session or
 * the call names, NULL = the server's own.
 */
extern void chat_server_check(const char *name, Oid role, const char *model);

/* base_url with path appended, the query string kept behind. */
extern char *chat_server_url(const ChatServer *server, const char *path);

/*
 * extra_body with its placeholders replaced; members whose variable is NULL
 * are left out.  NULL when the server has no extra_body.
 */
extern char *chat_server_expand_body(const ChatServer *server,
									 const char *user_id,
									 const char *session_id,
									 const char *task_id);

/*
 * The headers of a request, "Name: value" each; returns how many.  They hold
 * the key: wipe them like it.
 */
extern int	chat_server_headers(const ChatServer *server, const char *key,
								char ***headers);

/* A copy of text without the key (may be NULL) or anything like one. */
extern char *chat_server_redact(const char *text, const char *key);

/* What the endpoints of all wrappers share. */

/*
 * The catalog's entry of a server of the wrapper, what it is ("an LLM
 * endpoint") being told in errors.  NULL only when missing_ok.
 */
extern ForeignServer *chat_server_find(const char *name, const char *wrapper,
									   const char *what, bool missing_ok);
extern void chat_server_check_usage(const ChatServer *server, Oid role);
extern void chat_server_check_options(const ChatServer *server,
									  const char *url_option,
									  const char *headers_option);
extern void chat_server_check_mapping(List *options);

/* Forgets a key (may be NULL) for good. */
static inline void
chat_server_wipe(char *key)
{
	if (key == NULL)
		return;
	explicit_bzero(key, strlen(key));
	pfree(key);
}

#endif							/* CHAT_SERVER_H */
