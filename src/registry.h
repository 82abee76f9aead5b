/*
 * registry.h
 *		The tools that models may call: what the workers ask the registry.
 */
#ifndef CHAT_REGISTRY_H
#define CHAT_REGISTRY_H

#include "postgres.h"

#include "queue.h"

/* Setting chat.enable_superuser_tools. */
extern bool chat_registry_superuser_tools;

extern void chat_registry_init(void);

/*
 * Reads the tools that the sessions of a claim may use, in one query:
 * tools[i] becomes the JSON array "tools" of the request for jobs[i], or
 * NULL.  Jobs that may use the same ones share the text.
 */
extern void chat_registry_load(const ChatJob *jobs, int n, char **tools);

/*
 * The same for one owner, limited to the names in the JSON array allowed
 * (NULL = all).
 */
extern char *chat_registry_tools(Oid owner, const char *allowed);

/*
 * Raises why no tool worker can run an SQL tool as a role: superusers are
 * not allowed to, the role has no LOGIN (before 17), no CONNECT.
 */
extern void chat_registry_check_role(Oid role);

#endif							/* CHAT_REGISTRY_H */
