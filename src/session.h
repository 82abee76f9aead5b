/*
 * session.h
 *		The data functions: what other modules use of them.
 */
#ifndef CHAT_SESSION_H
#define CHAT_SESSION_H

#include "postgres.h"

#include "utils/jsonb.h"
#include "utils/uuid.h"

#include "compat.h"

/*
 * Whether a message m waits for the result of a tool, and what it gets when
 * it is copied to another session, where that result never comes.
 */
#define CHAT_SESSION_PENDING(m) \
	" (" m ".role = 'tool' AND " m ".metadata @> '{\"pending\": true}') "
#define CHAT_SESSION_NO_RESULT(m) \
	" jsonb_build_object('type', 'error', 'code', 'no_result', 'message'," \
	" concat('Tool ', " m ".name, ' failed: the conversation was copied" \
	" before it ended'))::text "

/*
 * Raises an error (22023) unless all members are settings that a session
 * may have, of the right type and in range.
 */
extern void chat_session_check_settings(Jsonb *settings);

/*
 * Raises P0002 (no_data_found).  A session that the caller may not see and
 * one that does not exist are the same.  id may be NULL.
 */
extern CHAT_NORETURN void chat_session_missing(const pg_uuid_t *id);

#endif							/* CHAT_SESSION_H */
