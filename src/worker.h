/*
 * worker.h
 *		The streaming worker: one process per database (chat.workers of them).
 */
#ifndef CHAT_WORKER_H
#define CHAT_WORKER_H

#include "postgres.h"

extern void chat_worker_init(void);
extern PGDLLEXPORT void chat_worker_main(Datum slot);

#endif							/* CHAT_WORKER_H */
