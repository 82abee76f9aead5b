/*
 * httptool.h
 *		HTTP tools: calls that the streaming worker makes itself.
 */
#ifndef CHAT_HTTPTOOL_H
#define CHAT_HTTPTOOL_H

#include "postgres.h"

#include "http.h"

/* In a transaction: takes up to most calls that wait; returns how many. */
extern int	chat_httptool_claim(int64 holder, int most);

/* After its commit: sends the requests; after a failure: forgets them. */
extern void chat_httptool_open(bool committed);

/* Takes what a transfer has received; true if its call has ended. */
extern bool chat_httptool_receive(ChatTransfer *transfer);

/* Fails what takes too long; returns when to look again (worker's clock). */
extern int64 chat_httptool_check_time(int64 now);

/*
 * Returns when results are to be stored (worker's clock), PG_INT64_MAX if
 * there are none.
 */
extern int64 chat_httptool_due(void);

/*
 * In a transaction: stores the results that are due; after its commit: forgets
 * those that were; after a failure: tries again in delay ms.
 */
extern void chat_httptool_store(int64 holder);
extern void chat_httptool_stored(bool committed, int delay);

/* True if there are no calls. */
extern bool chat_httptool_idle(void);

/* Ends the requests whose jobs are not among ids any more. */
extern void chat_httptool_keep(const int64 *ids, int n);

#endif							/* CHAT_HTTPTOOL_H */
