/*
 * tool.h
 *		SQL tools: which processes run them, and what all tools share.
 */
#ifndef CHAT_TOOL_H
#define CHAT_TOOL_H

#include "postgres.h"

#include "event.h"

extern void chat_tool_init(void);

/* True if a result says that the operation goes on elsewhere. */
extern bool chat_tool_is_accepted(const char *result);

/* Setting chat.tool_timeout, in ms. */
extern int	chat_tool_default_timeout(void);

/* Starts tool workers for what waits; part of the streaming worker. */
extern bool chat_tool_schedule(void);

/* True, once, if a tool worker has ended without ending its call. */
extern bool chat_tool_orphans(void);

/* Fails, in the current transaction, what cannot be run; true if any. */
extern bool chat_tool_judge(void);

/* Writes what running tools have reported; in the current transaction. */
extern int	chat_tool_progress(ChatEventBatch *batch, pg_uuid_t **tasks);

#endif							/* CHAT_TOOL_H */
