/*
 * title.h
 *		Titles of sessions, written by a model after the first message.
 */
#ifndef CHAT_TITLE_H
#define CHAT_TITLE_H

#include "postgres.h"

#include "queue.h"

/* Requests for titles: what side.c drives. */

/* Declares the settings of titles. */
extern void chat_title_init(void);

/*
 * In a claim: queues titles for those sessions of its jobs that need one;
 * true if there are any.
 */
extern bool chat_title_queue(const ChatJob *jobs, int n);

/*
 * In a caller's transaction: queues a title for a session that needs one and
 * has its question already.
 */
extern void chat_title_want(const pg_uuid_t *session, const char *server,
							Oid owner);

#endif							/* CHAT_TITLE_H */
