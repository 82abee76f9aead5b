/*
 * prompt.h
 *		System prompts: templates, and what they become.
 */
#ifndef CHAT_PROMPT_H
#define CHAT_PROMPT_H

#include "postgres.h"

#include "langfuse.h"
#include "utils/uuid.h"

/* Declares the settings of prompts. */
extern void chat_prompt_init(void);

/*
 * Builds the system prompt of a turn, between chat_db_enter() and
 * chat_db_leave(): two or three statements by key.  setting is the session's
 * setting "prompt", NULL = none.  NULL is returned when that, or else
 * chat.default_prompt, is empty: no system prompt.  *name and *version say
 * which was used, NULL and 0 the built-in one.  user_id and session may be
 * NULL.  A worker says by fetch how it goes about the prompt server, and has
 * to wait when that says so; others pass NULL.  What is returned is in the
 * caller's memory context.
 */
extern char *chat_prompt_build(Oid owner, const char *user_id,
							   const pg_uuid_t *session, const char *setting,
							   ChatPromptFetch *fetch, char **name,
							   int *version);

/*
 * Records on n tasks which prompt they used, in one statement; those whose
 * name is NULL are left as they are.
 */
extern void chat_prompt_record(const pg_uuid_t *tasks, char **names,
							   const int *versions, int n);

#endif							/* CHAT_PROMPT_H */
