/*
 * blame.h
 *		Which job a worker was at work on when it crashed.
 */
#ifndef CHAT_BLAME_H
#define CHAT_BLAME_H

#include "postgres.h"

/* Begins to keep a record; finds what those who died have left. */
extern void chat_blame_start(int64 identity);

/* The jobs that dead workers were at work on; returns how many. */
extern int	chat_blame_jobs(const int64 **jobs);

/* Forgets those jobs: they are counted in the table. */
extern void chat_blame_forget(void);

/* Says what this worker is at work on, 0 = nothing that can be named. */
extern void chat_blame_on(int64 job);

#endif							/* CHAT_BLAME_H */
