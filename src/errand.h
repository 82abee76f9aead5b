/*
 * errand.h
 *		What turns wait for: calls of tools, titles and summaries.
 */
#ifndef CHAT_ERRAND_H
#define CHAT_ERRAND_H

#include "postgres.h"

#include "queue.h"

/* Plans the errands by what a claim has left in the queue. */
extern void chat_errand_plan(const ChatQueueRest *rest, int64 now);

/* Gives the due parked tasks their turn. */
extern void chat_errand_run_turns(void);

/* Tools: has them run, tells what they report, stores what HTTP ones answer */
extern void chat_errand_run_tools(void);
extern void chat_errand_tell_progress(void);
extern void chat_errand_store_tools(void);

/* Titles and summaries: has them made, stores them. */
extern void chat_errand_run_sides(void);
extern void chat_errand_store_sides(void);

#endif							/* CHAT_ERRAND_H */
