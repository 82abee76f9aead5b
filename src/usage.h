/*
 * usage.h
 *		What users have used, and how much they may.
 */
#ifndef CHAT_USAGE_H
#define CHAT_USAGE_H

#include "postgres.h"

#include "utils/uuid.h"

/* Declares the settings of usage. */
extern void chat_usage_init(void);

/* In a worker: the limit of a day for the sessions of a role, 0 = none. */
extern int	chat_usage_limit(Oid owner);

/* True if the user of a session has used that many tokens today. */
extern bool chat_usage_is_over(const pg_uuid_t *session, int most,
							   int64 *used);

/* In a call: raises an error when the caller's limit is reached. */
extern void chat_usage_check(const pg_uuid_t *session);

/* Keeps what a session has used that is about to be deleted. */
extern void chat_usage_keep(const pg_uuid_t *session);

#endif							/* CHAT_USAGE_H */
