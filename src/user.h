/*
 * user.h
 *		What the application knows about its users.
 */
#ifndef CHAT_USER_H
#define CHAT_USER_H

#include "postgres.h"

#include "db.h"

/* Declares the settings of user contexts. */
extern void chat_user_init(void);

/*
 * What a system prompt says about a user (NULL = anonymous) of a role's
 * sessions: the context, marked as data and cut at the limit, or that the
 * user was not met before.  A context that cannot be loaded is a WARNING.
 */
extern char *chat_user_information(Oid owner, const char *user_id);

/*
 * Returns the role that something is stored for: the caller, or one whose
 * privileges the caller has (42501 otherwise).
 */
extern Oid	chat_user_owner(const ChatScope *scope, Datum owner, bool isnull);

#endif							/* CHAT_USER_H */
