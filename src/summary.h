/*
 * summary.h
 *		Summaries of what does not fit into the context window any more.
 */
#ifndef CHAT_SUMMARY_H
#define CHAT_SUMMARY_H

#include "postgres.h"

#include "context.h"
#include "queue.h"

/* Requests for summaries: what side.c drives. */
/* Says what jobs of summaries are. */
extern void chat_summary_init(void);

/* longest time that a turn waits for its summary, in ms */
#define CHAT_SUMMARY_WAIT 30000

/* In a claim: asks for a summary of a job's session up to a sequence. */
extern void chat_summary_queue(const ChatJob *job, int64 reach);

/* Puts a session's summary before the messages of a request. */
extern void chat_summary_insert(const ChatJob *job, ChatContext *context);

#endif							/* CHAT_SUMMARY_H */
