/*
 * langfuse.h
 *		Prompts of a Langfuse server, as it is configured by a foreign server
 *		of wrapper chat_langfuse and the setting chat.prompt_server.
 */
#ifndef CHAT_LANGFUSE_H
#define CHAT_LANGFUSE_H

#include "postgres.h"

/* How a worker that builds a request goes about prompts. */
typedef struct ChatPromptFetch
{
	bool		waited;			/* in: it has waited for one already */
	bool		wait;			/* out: one is fetched, the request waits */
} ChatPromptFetch;

/* longest time that a turn waits for its prompt, in ms */
#define CHAT_PROMPT_WAIT 10000

/* Declares the settings of the prompt server. */
extern void chat_langfuse_init(void);

/*
 * Returns the template of a prompt as the server had it last, NULL if there
 * is none.  A worker (fetch not NULL) has it fetched when it is not there, or
 * in the background when it is old; everybody else takes what is there.
 */
extern char *chat_langfuse_find(const char *name, ChatPromptFetch *fetch,
								int *version);

#endif							/* CHAT_LANGFUSE_H */
