/*
 * task.h
 *		The runtime functions that users call: start, cancel, wait.
 */
#ifndef CHAT_TASK_H
#define CHAT_TASK_H

#include "postgres.h"

#include "enqueue.h"

extern void chat_task_init(void);

/* Raises what is wrong with the arguments, as far as no table tells it. */
extern void chat_task_check(const ChatCall *c);

#endif							/* CHAT_TASK_H */
