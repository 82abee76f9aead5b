/*
 * launcher.h
 *		The process that keeps a worker in every database that has the
 *		extension, and the hooks through which it learns of them.
 */
#ifndef CHAT_LAUNCHER_H
#define CHAT_LAUNCHER_H

#include "postgres.h"

extern void chat_launcher_init(void);
extern PGDLLEXPORT void chat_launcher_main(Datum arg);

#endif							/* CHAT_LAUNCHER_H */
