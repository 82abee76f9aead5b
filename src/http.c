/*
 * http.c
 *		HTTP transfers over one libcurl multi handle per process.
 *
 * Owns: the multi handle, the epoll descriptors that libcurl's sockets are
 * members of, libcurl's timer, the list of transfers that have news, and some
 * easy handles for the next ones.  All of it is local to the process and made
 * in the process that uses it, never in the postmaster.
 *
 * An epoll descriptor is nested in the caller's WaitEventSet, so that the
 * set stays the same however many sockets come and go; what is ready is
 * asked for here, without waiting.  Sockets whose answer is under way are
 * members of another one, itself a member of the first that is not listened
 * to while they are held back: a thousand streams are read together, not one
 * by one.
 *
 * libcurl may start a thread to resolve a name when it moves a transfer.
 * Signals stay blocked meanwhile: a handler of the server must not run there.
 */
#include "postgres.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "miscadmin.h"
#include "portability/instr_time.h"
#include "storage/latch.h"
#include "utils/wait_event.h"

#include "compat.h"
#include "http.h"

#define READY_BATCH 1024
/* connections that are kept though nobody uses them */
#define KEEP_CONNECTIONS 128
#define MANY_TRANSFERS 256
#define MIN_BUFFER 1024
#define SPARE_HANDLES 64

static CURLM *multi = NULL;
static int	epoll_fd = -1;
static int	answer_fd = -1;		/* sockets whose answer is under way */
static bool held = false;		/* those are not looked at */
static int64 timer_due = -1;	/* ms of now_ms(), -1 = none */
static int	running = 0;
static long connections = 0;	/* that libcurl may keep, used or not */
static int	descriptors = 0;	/* that there are for them, 0 = not told */
static int	begun = 0;			/* answers since chat_http_poll() came */

/* What is known of a socket, by its number. */
typedef struct Socket
{
	uint32		events;			/* that libcurl waits for */
	bool		member;			/* of one of the descriptors */
	bool		answering;		/* of answer_fd */
} Socket;

static Socket *sockets = NULL;
static int	max_sockets = 0;

static dlist_head ready_list = DLIST_STATIC_INIT(ready_list);

static CURL *spare[SPARE_HANDLES];	/* as new, with buffers of full size */
static int	nspare = 0;

/* Returns a clock in milliseconds that is never set back. */
static int64
now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64) t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Puts a transfer into the list of chat_http_next(). */
static void
mark_ready(ChatTransfer *t)
{
	if (t->ready)
		return;
	t->ready = true;
	dlist_push_tail(&ready_list, &t->node);
}

/* Returns what is known of a socket, NULL if it has no number or no room. */
static Socket *
find_socket(curl_socket_t fd)
{
	if (fd < 0)
		return NULL;
	if (fd >= max_sockets)
	{
		int			max = Max(256, fd * 2);
		Socket	   *more = realloc(sockets, max * sizeof(Socket));

		if (more == NULL)
			return NULL;
		memset(more + max_sockets, 0, (max - max_sockets) * sizeof(Socket));
		sockets = more;
		max_sockets = max;
	}
	return &sockets[fd];
}

/* libcurl tells which events of a socket it waits for. */
static int
on_socket(CURL *easy, curl_socket_t fd, int what, void *arg, void *known)
{
	struct epoll_event ev = {0};
	Socket	   *s = find_socket(fd);
	ChatTransfer *t = NULL;
	int			set;

	if (s == NULL)
		return -1;
	if (what == CURL_POLL_REMOVE)
	{
		/* the kernel has removed it already when it was closed */
		(void) epoll_ctl(s->answering ? answer_fd : epoll_fd, EPOLL_CTL_DEL,
						 fd, NULL);
		memset(s, 0, sizeof(*s));
		return 0;
	}
	if (curl_easy_getinfo(easy, CURLINFO_PRIVATE, &t) == CURLE_OK && t != NULL)
	{
		t->fd = fd;
		/* back from a pause */
		if (s->events == 0)
			s->answering = t->total > 0;
	}
	ev.data.fd = fd;
	if (what & CURL_POLL_IN)
		ev.events |= EPOLLIN;
	if (what & CURL_POLL_OUT)
		ev.events |= EPOLLOUT;
	s->events = ev.events;
	set = s->answering ? answer_fd : epoll_fd;
	/* the kernel may have removed it, when it was closed */
	if (!(s->member && epoll_ctl(set, EPOLL_CTL_MOD, fd, &ev) == 0) &&
		epoll_ctl(set, EPOLL_CTL_ADD, fd, &ev) != 0)
		return -1;
	s->member = true;
	return 0;
}

/* Moves a transfer's socket to those whose answer is under way. */
static void
note_answer(ChatTransfer *t)
{
	Socket	   *s = find_socket(t->fd);
	struct epoll_event ev = {0};

	/* a number that libcurl has left may be that of anything */
	if (s == NULL || s->answering || s->events == 0)
		return;
	ev.events = s->events;
	ev.data.fd = t->fd;
	if (epoll_ctl(answer_fd, EPOLL_CTL_ADD, t->fd, &ev) != 0)
		return;
	(void) epoll_ctl(epoll_fd, EPOLL_CTL_DEL, t->fd, NULL);
	s->answering = true;
}

/* libcurl tells when it wants to be called without a socket's event. */
static int
on_timer(CURLM *m, long timeout, void *arg)
{
	timer_due = timeout < 0 ? -1 : now_ms() + timeout;
	return 0;
}

/* True if an IPv4 address (host order) belongs to this machine. */
static bool
is_loopback4(uint32 a)
{
	return (a >> 24) == 127;
}

/* True if an IPv4 address is not one of the public internet. */
static bool
is_private4(uint32 a)
{
	return (a >> 24) == 0 || (a >> 24) == 10 ||
		(a >> 20) == 0xac1 ||	/* 172.16/12 */
		(a >> 16) == 0xc0a8 ||	/* 192.168/16 */
		(a >> 16) == 0xa9fe ||	/* 169.254/16, cloud metadata */
		(a >> 22) == 0x191 ||	/* 100.64/10, shared */
		(a >> 8) == 0xc00000 || /* 192.0.0/24 */
		(a >> 17) == 0x6309 ||	/* 198.18/15, benchmarks */
		(a >> 28) >= 14;		/* multicast and reserved */
}

/* Reads four bytes of an IPv6 address as an IPv4 address in host order. */
static uint32
embedded4(const uint8 *b)
{
	return ((uint32) b[0] << 24) | ((uint32) b[1] << 16) | (b[2] << 8) | b[3];
}

/*
 * Finds the IPv4 address that a translator or a tunnel would reach by an IPv6
 * address; false if there is none in it.
 */
static bool
find_embedded4(const struct in6_addr *a, uint32 *v4)
{
	const uint8 *b = a->s6_addr;
	static const uint8 zeros[12] = {0};
	static const uint8 nat64[12] = {0x00, 0x64, 0xff, 0x9b};

	if (IN6_IS_ADDR_V4MAPPED(a) || IN6_IS_ADDR_V4COMPAT(a) ||
		memcmp(b, nat64, 12) == 0 ||
	/* translated: ::ffff:0:a.b.c.d */
		(memcmp(b, zeros, 8) == 0 && embedded4(b + 8) == 0xffff0000) ||
	/* ISATAP, under whatever prefix */
		(embedded4(b + 8) & ~0x02000000) == 0x00005efe)
		*v4 = embedded4(b + 12);
	else if (b[0] == 0x20 && b[1] == 0x02)	/* 6to4 */
		*v4 = embedded4(b + 2);
	else if (embedded4(b) == 0x20010000)	/* Teredo: client is inverted */
		*v4 = ~embedded4(b + 12);
	else
		return false;
	return true;
}

/* True if an IPv6 address is not one of the public internet. */
static bool
is_private6(const struct in6_addr *a)
{
	const uint8 *b = a->s6_addr;

	return IN6_IS_ADDR_UNSPECIFIED(a) || IN6_IS_ADDR_LINKLOCAL(a) ||
		IN6_IS_ADDR_SITELOCAL(a) || IN6_IS_ADDR_MULTICAST(a) ||
		(b[0] & 0xfe) == 0xfc ||
	/* 64:ff9b:1::/48, translators of a site's own */
		(embedded4(b) == 0x0064ff9b && b[4] == 0 && b[5] == 1);
}

/* Decides about an IPv6 address; embedded IPv4 addresses count as such. */
static bool
address6_allowed(const ChatTransfer *t, const struct in6_addr *a)
{
	uint32		v4;

	if (IN6_IS_ADDR_LOOPBACK(a))
		return t->allow_loopback || t->allow_private;
	if (is_private6(a))
		return t->allow_private;
	if (!find_embedded4(a, &v4))
		return true;
	if (is_loopback4(v4))
		return t->allow_loopback || t->allow_private;
	return t->allow_private || !is_private4(v4);
}

/* Decides whether a transfer may connect to the address that was resolved. */
static bool
address_allowed(const ChatTransfer *t, const struct sockaddr *addr)
{
	if (addr->sa_family == AF_INET)
	{
		const struct sockaddr_in *in = (const struct sockaddr_in *) addr;
		uint32		a = ntohl(in->sin_addr.s_addr);

		if (is_loopback4(a))
			return t->allow_loopback || t->allow_private;
		return t->allow_private || !is_private4(a);
	}
	if (addr->sa_family == AF_INET6)
	{
		const struct sockaddr_in6 *in = (const struct sockaddr_in6 *) addr;

		return address6_allowed(t, &in->sin6_addr);
	}
	return false;
}

/* libcurl asks for a socket: the place to refuse an address (T61). */
static curl_socket_t
on_open_socket(void *arg, curlsocktype purpose, struct curl_sockaddr *addr)
{
	ChatTransfer *t = arg;

	if (!address_allowed(t, &addr->addr))
	{
		t->forbidden = true;
		return CURL_SOCKET_BAD;
	}
	return socket(addr->family, addr->socktype | SOCK_CLOEXEC, addr->protocol);
}

/* Makes room for n more bytes; false when there is no memory. */
static bool
reserve(ChatTransfer *t, size_t n)
{
	size_t		cap = t->cap ? t->cap : MIN_BUFFER;
	char	   *buf;

	while (cap < t->len + n)
		cap *= 2;
	if (cap == t->cap)
		return true;
	buf = realloc(t->buf, cap);
	if (buf == NULL)
		return false;
	t->buf = buf;
	t->cap = cap;
	return true;
}

/* Reads how many seconds the endpoint asks to wait, -1 when it does not. */
static long
read_retry_after(CURL *easy)
{
	curl_off_t	after = 0;
	struct curl_header *header;

	if (curl_easy_getinfo(easy, CURLINFO_RETRY_AFTER, &after) == CURLE_OK &&
		after > 0)
		return (long) Min(after, INT_MAX);
	/* a number that libcurl cannot hold */
	if (curl_easy_header(easy, "Retry-After", 0, CURLH_HEADER, -1,
						 &header) == CURLHE_OK &&
		strspn(header->value, "0123456789") > 18)
		return INT_MAX;
	return -1;
}

/* Reads what the head of the answer says. */
static void
note_head(ChatTransfer *t)
{
	long		status = 0;
	curl_off_t	sent = 0;
	char	   *type = NULL;

	curl_easy_getinfo(t->easy, CURLINFO_RESPONSE_CODE, &status);
	curl_easy_getinfo(t->easy, CURLINFO_CONTENT_TYPE, &type);
	t->status = (int) status;
	t->event_stream = type != NULL &&
		pg_strncasecmp(type, "text/event-stream", 17) == 0;
	t->retry_after = read_retry_after(t->easy);
	curl_easy_getinfo(t->easy, CURLINFO_SIZE_UPLOAD_T, &sent);
	if (t->body && (size_t) sent >= t->body_len)
	{
		explicit_bzero(t->body, t->body_len);
		free(t->body);
		t->body = NULL;
	}
}

/* libcurl hands over bytes; a short count ends the transfer. */
static size_t
on_data(char *data, size_t size, size_t n, void *arg)
{
	ChatTransfer *t = arg;

	n *= size;
	if (t->status == 0)
		note_head(t);
	if (n > t->max_body - t->total)
	{
		t->too_large = true;
		return 0;
	}
	if (!reserve(t, n))
		return 0;
	begun += t->total == 0;
	memcpy(t->buf + t->len, data, n);
	t->len += n;
	t->total += n;
	mark_ready(t);
	return n;
}

/* Says what a result of libcurl means to a caller. */
static ChatHttpEnd
classify(const ChatTransfer *t, CURLcode rc)
{
	if (t->forbidden)
		return CHAT_HTTP_FORBIDDEN;
	if (t->too_large)
		return CHAT_HTTP_TOO_LARGE;
	switch (rc)
	{
		case CURLE_OK:
			return CHAT_HTTP_OK;
		case CURLE_OPERATION_TIMEDOUT:
			return CHAT_HTTP_CONNECT_TIMEOUT;
		case CURLE_COULDNT_RESOLVE_HOST:
		case CURLE_COULDNT_RESOLVE_PROXY:
		case CURLE_COULDNT_CONNECT:
			return CHAT_HTTP_CONNECT_FAILED;
		case CURLE_GOT_NOTHING:
		case CURLE_RECV_ERROR:
		case CURLE_SEND_ERROR:
		case CURLE_PARTIAL_FILE:
		case CURLE_HTTP2:
		case CURLE_HTTP2_STREAM:
		case CURLE_OUT_OF_MEMORY:
		case CURLE_WRITE_ERROR: /* on_data() had none */
		case CURLE_ABORTED_BY_CALLBACK: /* on_socket() had no room */
			return CHAT_HTTP_BROKEN;
		case CURLE_SSL_CONNECT_ERROR:
			/* a handshake that broke off, or a peer that cannot shake hands */
			return strstr(t->error, "SYSCALL") || strstr(t->error, "reset") ||
				strstr(t->error, "eof") ? CHAT_HTTP_BROKEN : CHAT_HTTP_FATAL;
		default:
			return CHAT_HTTP_FATAL;
	}
}

/* Notes the transfers that libcurl has finished. */
static void
collect_done(void)
{
	CURLMsg    *msg;
	int			left;

	while ((msg = curl_multi_info_read(multi, &left)) != NULL)
	{
		ChatTransfer *t = NULL;
		CURLcode	rc = msg->data.result;

		if (msg->msg != CURLMSG_DONE)
			continue;
		curl_easy_getinfo(msg->easy_handle, CURLINFO_PRIVATE, (char **) &t);
		if (t->status == 0)
			note_head(t);
		t->done = true;
		t->end = classify(t, rc);
		if (rc != CURLE_OK && t->error[0] == '\0')
			strlcpy(t->error, curl_easy_strerror(rc), sizeof(t->error));
		mark_ready(t);
	}
}

/*
 * Moves the sockets of answers that have begun, and did not end at once, to
 * those whose answer is under way.
 */
static void
note_answers(void)
{
	dlist_iter	iter;

	if (begun == 0)
		return;
	begun = 0;
	dlist_foreach(iter, &ready_list)
	{
		ChatTransfer *t = dlist_container(ChatTransfer, node, iter.cur);

		if (!t->done && t->total > 0)
			note_answer(t);
	}
}

/* Blocks every signal; returns the old mask in *old. */
static void
block_signals(sigset_t *old)
{
	sigset_t	all;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, old);
}

/*
 * Has libcurl keep a number of connections beside those that are in use.  Its
 * own limit counts both: with a fixed one, nothing would be used again once
 * so many transfers run.
 */
static void
keep_connections(void)
{
	long		n = running + KEEP_CONNECTIONS;

	if (descriptors > 0)
		n = Min(n, descriptors);
	if (n == connections)
		return;
	connections = n;
	curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS, n);
}

/*
 * Makes the multi handle of this process if there is none; returns the
 * descriptor that becomes readable when chat_http_poll() has work.
 */
int
chat_http_start(void)
{
	struct epoll_event ev = {.events = EPOLLIN};

	if (multi != NULL)
		return epoll_fd;
	if (curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK)
		ereport(ERROR,
				(errcode(ERRCODE_EXTERNAL_ROUTINE_EXCEPTION),
				 errmsg("could not initialize libcurl")));
	if (epoll_fd < 0)
		epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (answer_fd < 0)
		answer_fd = epoll_create1(EPOLL_CLOEXEC);
	ev.data.fd = answer_fd;
	if (epoll_fd < 0 || answer_fd < 0 ||
		(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, answer_fd, &ev) != 0 &&
		 errno != EEXIST))
		ereport(ERROR,
				(errcode_for_socket_access(),
				 errmsg("could not create epoll descriptor: %m")));
	multi = curl_multi_init();
	if (multi == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("could not create a libcurl multi handle")));
	curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, on_socket);
	curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, on_timer);
	keep_connections();
	return epoll_fd;
}

/* Sets how many descriptors there are for connections. */
void
chat_http_set_limit(int limit)
{
	descriptors = limit;
}

/* Sets what every transfer has in common. */
static void
set_common_options(ChatTransfer *t, const ChatHttpRequest *req)
{
	CURL	   *easy = t->easy;

	curl_easy_setopt(easy, CURLOPT_PRIVATE, t);
	curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, t->error);
	curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
	curl_easy_setopt(easy, CURLOPT_FOLLOWLOCATION, 0L);
	curl_easy_setopt(easy, CURLOPT_PROXY, req->proxy ? req->proxy : "");
	curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, on_data);
	curl_easy_setopt(easy, CURLOPT_WRITEDATA, t);
	/* asked for is none, but what comes all the same can be read */
	curl_easy_setopt(easy, CURLOPT_ACCEPT_ENCODING, "identity");
	curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
	curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS,
					 (long) req->connect_timeout);
	curl_easy_setopt(easy, CURLOPT_UPLOAD_BUFFERSIZE, 16384L);
	/* many have little to say at a time */
	t->small = running >= MANY_TRANSFERS;
	if (t->small)
		curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, 4096L);
	/* what was sent on a connection that was used before is sent again */
	if (req->once)
		curl_easy_setopt(easy, CURLOPT_FRESH_CONNECT, 1L);
	if (req->proxy == NULL)
	{
		curl_easy_setopt(easy, CURLOPT_OPENSOCKETFUNCTION, on_open_socket);
		curl_easy_setopt(easy, CURLOPT_OPENSOCKETDATA, t);
	}
	if (req->ca_file)
		curl_easy_setopt(easy, CURLOPT_CAINFO, req->ca_file);
}

/* Sets URL, headers and body; false when there is no memory. */
static bool
set_request(ChatTransfer *t, const ChatHttpRequest *req)
{
	struct curl_slist *list;

	if (curl_easy_setopt(t->easy, CURLOPT_URL, req->url) != CURLE_OK)
		return false;
	for (int i = 0; i < req->nheaders; i++)
	{
		list = curl_slist_append(t->headers, req->headers[i]);
		if (list == NULL)
			return false;
		t->headers = list;
	}
	/* no "100 Continue" round trip before a large body */
	list = curl_slist_append(t->headers, "Expect:");
	if (list == NULL)
		return false;
	t->headers = list;
	curl_easy_setopt(t->easy, CURLOPT_HTTPHEADER, t->headers);
	if (req->body == NULL)
		return true;
	t->body = malloc(req->body_len + 1);
	if (t->body == NULL)
		return false;
	memcpy(t->body, req->body, req->body_len);
	t->body_len = req->body_len;
	curl_easy_setopt(t->easy, CURLOPT_POSTFIELDSIZE_LARGE,
					 (curl_off_t) req->body_len);
	curl_easy_setopt(t->easy, CURLOPT_POSTFIELDS, t->body);
	return true;
}

/* Returns an easy handle that is as new, NULL when there is no memory. */
static CURL *
take_handle(void)
{
	return nspare > 0 ? spare[--nspare] : curl_easy_init();
}

/*
 * Keeps an easy handle for the next transfer, as to make one costs more than to
 * clear it; not one with a small buffer, which libcurl would take for one of
 * the size that it is to have next.
 */
static void
keep_handle(ChatTransfer *t)
{
	if (t->small || nspare == SPARE_HANDLES)
		return;
	curl_easy_reset(t->easy);
	spare[nspare++] = t->easy;
	t->easy = NULL;
}

/* Frees a transfer that is in no list and not part of the multi handle. */
static void
free_transfer(ChatTransfer *t)
{
	if (t->easy)
		curl_easy_cleanup(t->easy);
	/* headers and body may hold a key or what a user wrote */
	for (struct curl_slist *h = t->headers; h != NULL; h = h->next)
		explicit_bzero(h->data, strlen(h->data));
	curl_slist_free_all(t->headers);
	if (t->body)
	{
		explicit_bzero(t->body, t->body_len);
		free(t->body);
	}
	free(t->buf);
	free(t);
}

/*
 * Starts a transfer.  All of the request is copied.  Raises an error when
 * there is no memory; everything else is told when the transfer ends.
 */
ChatTransfer *
chat_http_open(const ChatHttpRequest *req, void *owner)
{
	ChatTransfer *t;
	bool		ok;

	chat_http_start();
	t = calloc(1, sizeof(ChatTransfer));
	if (t == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
	t->owner = owner;
	t->fd = -1;
	t->max_body = req->max_body;
	t->retry_after = -1;
	t->allow_loopback = req->allow_loopback;
	t->allow_private = req->allow_private;
	t->easy = take_handle();
	ok = t->easy != NULL;
	if (ok)
	{
		set_common_options(t, req);
		ok = set_request(t, req) &&
			curl_multi_add_handle(multi, t->easy) == CURLM_OK;
	}
	if (ok)
		return t;
	free_transfer(t);
	ereport(ERROR,
			(errcode(ERRCODE_OUT_OF_MEMORY),
			 errmsg("could not start an HTTP request")));
}

/* Ends a transfer, whatever its state, and frees it. */
void
chat_http_close(ChatTransfer *t)
{
	if (t->ready)
		dlist_delete(&t->node);
	if (curl_multi_remove_handle(multi, t->easy) == CURLM_OK)
		keep_handle(t);
	free_transfer(t);
}

/* Stops or goes on reading a transfer's answer. */
void
chat_http_pause(ChatTransfer *t, bool pause)
{
	if (t->done || t->paused == pause)
		return;
	t->paused = pause;
	curl_easy_pause(t->easy, pause ? CURLPAUSE_RECV : CURLPAUSE_CONT);
}

/*
 * Holds back the sockets whose answer is under way, or not any more: until
 * then chat_http_poll() does not look at them and they wake nobody.
 */
void
chat_http_hold(bool hold)
{
	struct epoll_event ev = {.events = hold ? 0 : EPOLLIN,
	.data.fd = answer_fd};

	/* to add it again would have the kernel look at each of its members */
	if (hold != held &&
		epoll_ctl(epoll_fd, EPOLL_CTL_MOD, answer_fd, &ev) == 0)
		held = hold;
}

/*
 * Moves sockets of one descriptor that are ready, at most so many; returns how
 * many.  Sets answers if there are such whose answer is under way, too.
 */
static int
poll_sockets(int set, int most, bool *answers)
{
	struct epoll_event events[READY_BATCH];
	int			n = epoll_wait(set, events, most, 0);

	for (int i = 0; i < n; i++)
	{
		int			what = 0;

		if (events[i].data.fd == answer_fd)
		{
			*answers = true;
			continue;
		}
		if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
			what |= CURL_CSELECT_IN;
		if (events[i].events & EPOLLOUT)
			what |= CURL_CSELECT_OUT;
		curl_multi_socket_action(multi, events[i].data.fd, what, &running);
		keep_connections();
	}
	return n;
}

/*
 * Moves what is ready, without waiting; true if it was CHAT_HTTP_BATCH
 * answers, so that there may be more.
 */
bool
chat_http_poll(void)
{
	sigset_t	mask;
	bool		answers = false;
	bool		more = false;

	if (multi == NULL)
		return false;
	block_signals(&mask);
	(void) poll_sockets(epoll_fd, READY_BATCH, &answers);
	if (answers)
		more = poll_sockets(answer_fd, CHAT_HTTP_BATCH,
							&answers) == CHAT_HTTP_BATCH;
	if (timer_due >= 0 && now_ms() >= timer_due)
	{
		timer_due = -1;
		curl_multi_socket_action(multi, CURL_SOCKET_TIMEOUT, 0, &running);
	}
	sigprocmask(SIG_SETMASK, &mask, NULL);
	keep_connections();
	collect_done();
	note_answers();
	return more;
}

/*
 * Returns the milliseconds until there is something to do without a socket's
 * event, -1 for never: until libcurl's timer, and none while a transfer is
 * ready, as those are that got what was held back when they went on reading.
 */
long
chat_http_timeout(void)
{
	int64		left;

	if (!dlist_is_empty(&ready_list))
		return 0;
	if (timer_due < 0)
		return -1;
	left = timer_due - now_ms();
	return left > 0 ? (long) left : 0;
}

/*
 * Returns a transfer that received something or ended, or NULL.  The caller
 * consumes buf and sets len to what it leaves.
 */
ChatTransfer *
chat_http_next(void)
{
	ChatTransfer *t;

	if (dlist_is_empty(&ready_list))
		return NULL;
	t = dlist_container(ChatTransfer, node, dlist_pop_head_node(&ready_list));
	t->ready = false;
	return t;
}

/*
 * Performs one request and waits for its end, at most timeout ms; the caller
 * closes the transfer.  Interrupts are served while it waits.  hook, if not
 * NULL, sees the answer grow and may consume it; it may throw.  For functions
 * that a user calls; the worker never waits.
 */
ChatTransfer *
chat_http_perform(const ChatHttpRequest *req, int timeout,
				  void (*hook) (ChatTransfer *, void *), void *arg)
{
	ChatTransfer *t = chat_http_open(req, NULL);
	int64		due = now_ms() + timeout;

	PG_TRY();
	{
		while (!t->done && now_ms() < due)
		{
			long		wait = chat_http_timeout();

			if (wait < 0 || wait > due - now_ms())
				wait = Max(due - now_ms(), 0);
			(void) WaitLatchOrSocket(MyLatch,
									 WL_LATCH_SET | WL_SOCKET_READABLE |
									 WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
									 epoll_fd, wait, PG_WAIT_EXTENSION);
			ResetLatch(MyLatch);
			CHECK_FOR_INTERRUPTS();
			(void) chat_http_poll();
			(void) chat_http_next();	/* it can only be this one */
			if (hook != NULL && t->len > 0)
				hook(t, arg);
		}
	}
	PG_CATCH();
	{
		chat_http_close(t);
		PG_RE_THROW();
	}
	PG_END_TRY();
	if (!t->done)
	{
		t->end = CHAT_HTTP_CONNECT_TIMEOUT;
		strlcpy(t->error, "no answer in time", sizeof(t->error));
	}
	return t;
}
