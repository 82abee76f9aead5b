/*
 * throttle.h
 *		How much may be asked of each endpoint now, and how it has answered.
 *
 * The limits of a server hold for all workers of its database together:
 * max_concurrency, max_requests_per_minute, and what a 429 asks for.
 */
#ifndef CHAT_THROTTLE_H
#define CHAT_THROTTLE_H

#include "postgres.h"

#include "stream.h"

/* Servers that take fewer requests than there is room for. */
typedef struct ChatRoom
{
	int			n;
	const char **servers;
	int		   *rooms;			/* requests that each one takes */
} ChatRoom;

/*
 * Sets requests aside, up to most of each server: in a transaction, whose
 * memory holds the result.  chat_throttle_settle() gives back those that did
 * not start; call it whatever happens.
 */
extern void chat_throttle_reserve(int most, ChatRoom *room);
extern void chat_throttle_settle(void);

/*
 * The same for requests beside the turns: first forget what was asked for
 * before, then ask for one after the other.  What is refused to one that a
 * turn waits for (awaited) is kept free of turns until the next look; one
 * that nobody waits for is refused while turns wait (behind).
 */
extern void chat_throttle_look(void);
extern bool chat_throttle_admit(const char *server, bool awaited, bool behind,
								int64 now, bool *contended);

/* Tell of a stream's request: it starts, content has come, it has ended. */
extern void chat_throttle_start(ChatStream *stream);
extern void chat_throttle_answered(ChatStream *stream);
extern bool chat_throttle_end(ChatStream *stream);

/* Tell of a request beside the turns; an endpoint of -1 counts nothing. */
extern int	chat_throttle_begin(const ChatServer *server);
extern bool chat_throttle_ask(const ChatServer *server, int *endpoint,
							  int64 *closed);
extern void chat_throttle_finish(int endpoint, ChatEndKind kind, long after);

/* When a server that is closed for a time opens again, INT64_MAX = none is. */
extern int64 chat_throttle_due(void);

#endif							/* CHAT_THROTTLE_H */
