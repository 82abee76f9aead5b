/*
 * task.h
 *		The runtime functions that users call: start, cancel, wait.
 */
#ifndef CHAT_TASK_H
#define CHAT_TASK_H

#include "postgres.h"

extern void chat_task_init(void);

#endif							/* CHAT_TASK_H */
