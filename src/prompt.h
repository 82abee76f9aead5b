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

/* The turn that a prompt is for. */
typedef struct ChatPromptTurn
{
	Oid			owner;
	const char *user_id;		/* NULL = anonymous */
	const pg_uuid_t *session;	/* NULL = one to come */
	const char *server;			/* that is asked, NULL = not known */
	const char *setting;		/* the session's "prompt", NULL = none */
	ChatPromptFetch *fetch;		/* of a worker, else NULL; see langfuse.h */
} ChatPromptTurn;

/*
 * Builds the system prompt of a turn, between chat_db_enter() and
 * chat_db_leave(): two or three statements by key.  NULL is returned when the
 * setting, or else chat.default_prompt, is empty: no system prompt.  *name and
 * *version say which was used, NULL and 0 the built-in one.  A worker has to
 * wait when its fetch says so.  What is returned is in the caller's memory
 * context.
 */
extern char *chat_prompt_build(const ChatPromptTurn *turn, char **name,
							   int *version);

/*
 * Records on n tasks which prompt they used, in one statement; those whose
 * name is NULL are left as they are.
 */
extern void chat_prompt_record(const pg_uuid_t *tasks, char **names,
							   const int *versions, int n);

#endif							/* CHAT_PROMPT_H */
