/*
 * http.h
 *		HTTP transfers over one libcurl multi handle, driven by a descriptor
 *		that somebody else waits on.
 *
 * chat_http_poll() never blocks: it moves what is ready.  What a transfer
 * received gathers in its buffer; chat_http_next() hands out the transfers
 * that have something to say.  No callback of ours throws.
 */
#ifndef CHAT_HTTP_H
#define CHAT_HTTP_H

#include "postgres.h"

#include <curl/curl.h>

#include "lib/ilist.h"

typedef struct ChatHttpRequest
{
	const char *url;
	const char *body;			/* NULL: GET */
	size_t		body_len;
	const char *const *headers; /* "Name: value" */
	int			nheaders;
	const char *ca_file;		/* NULL: the system's */
	const char *proxy;			/* NULL: none, whatever the environment says */
	int			connect_timeout;	/* ms */
	bool		allow_loopback; /* connect to this machine */
	bool		allow_private;	/* connect to private networks, too */
	size_t		max_body;		/* most bytes of an answer */
	bool		once;			/* never sent twice, not even by libcurl */
} ChatHttpRequest;

/* Why a transfer ended; CHAT_HTTP_OK says nothing about the status. */
typedef enum ChatHttpEnd
{
	CHAT_HTTP_OK,
	CHAT_HTTP_CONNECT_TIMEOUT,
	CHAT_HTTP_CONNECT_FAILED,	/* name, route, refused: worth a retry */
	CHAT_HTTP_BROKEN,			/* the connection broke: worth a retry */
	CHAT_HTTP_TOO_LARGE,		/* more than max_body */
	CHAT_HTTP_FORBIDDEN,		/* address that the server may not use */
	CHAT_HTTP_FATAL				/* certificate, URL, protocol: final */
} ChatHttpEnd;

/* Descriptors that stay free beside those of streams and of the server. */
#define CHAT_RESERVED_FILES 64

/* What a transfer's owner is. */
typedef enum ChatTransferKind
{
	CHAT_TRANSFER_STREAM,
	CHAT_TRANSFER_TOOL,			/* httptool.c */
	CHAT_TRANSFER_SIDE			/* side.c */
} ChatTransferKind;

typedef struct ChatTransfer
{
	void	   *owner;			/* the caller's */
	ChatTransferKind kind;
	CURL	   *easy;
	struct curl_slist *headers;
	char	   *body;			/* malloc'ed; freed when the answer begins */
	size_t		body_len;
	bool		body_sent;
	char	   *buf;			/* malloc'ed: received, not yet consumed */
	size_t		len;
	size_t		cap;
	size_t		total;			/* bytes of the answer so far */
	size_t		max_body;
	curl_socket_t fd;			/* its last socket, -1 = none yet */
	int			status;			/* HTTP status, 0 before the answer */
	bool		event_stream;	/* content type is text/event-stream */
	long		retry_after;	/* seconds, -1 when not told */
	bool		allow_loopback;
	bool		allow_private;
	bool		forbidden;
	bool		too_large;
	bool		paused;
	bool		done;			/* nothing more comes */
	bool		small;			/* its buffer in libcurl is */
	ChatHttpEnd end;			/* valid when done */
	bool		ready;			/* in the list of chat_http_next() */
	dlist_node	node;
	char		error[CURL_ERROR_SIZE];
} ChatTransfer;

/* answers that are read at one go */
#define CHAT_HTTP_BATCH 256

extern int	chat_http_start(void);
extern ChatTransfer *chat_http_open(const ChatHttpRequest *req, void *owner);
extern void chat_http_close(ChatTransfer *transfer);
extern void chat_http_pause(ChatTransfer *transfer, bool pause);
extern void chat_http_hold(bool hold);
extern bool chat_http_poll(void);
extern void chat_http_set_limit(int limit);
extern long chat_http_timeout(void);
extern ChatTransfer *chat_http_next(void);
extern ChatTransfer *chat_http_perform(const ChatHttpRequest *req,
									   int timeout,
									   void (*hook) (ChatTransfer *, void *),
									   void *arg);

#endif							/* CHAT_HTTP_H */
