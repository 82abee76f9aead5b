/*
 * control.h
 *		Pausing the workers of a database.
 */
#ifndef CHAT_CONTROL_H
#define CHAT_CONTROL_H

#include "postgres.h"

/* True if the workers shall take nothing more; in a transaction. */
extern bool chat_control_paused(void);

#endif							/* CHAT_CONTROL_H */
