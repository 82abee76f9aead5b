/*
 * notice.h
 *		Listeners of tasks that were cancelled before they had started.
 */
#ifndef CHAT_NOTICE_H
#define CHAT_NOTICE_H

#include "postgres.h"

/* When there is something to tell (worker's clock), PG_INT64_MAX = never. */
extern int64 chat_notice_due(void);

/* In a transaction: tells it. */
extern void chat_notice_tell(void);

/* After its end. */
extern void chat_notice_told(bool committed);

#endif							/* CHAT_NOTICE_H */
