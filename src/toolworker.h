/*
 * toolworker.h
 *		The process that runs SQL tools.
 */
#ifndef CHAT_TOOLWORKER_H
#define CHAT_TOOLWORKER_H

#include "postgres.h"

extern PGDLLEXPORT void chat_toolworker_main(Datum slot);

#endif							/* CHAT_TOOLWORKER_H */
