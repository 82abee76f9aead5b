/*
 * debug.h
 *		Failures on demand, for tests of what nothing else brings about.
 */
#ifndef CHAT_DEBUG_H
#define CHAT_DEBUG_H

#include "postgres.h"

/* Setting chat.debug_fail: "" = none. */
extern char *chat_debug_fail;

extern void chat_debug_init(void);

/* Crashes the process if the setting is "what:text" and data holds the text. */
extern void chat_debug_crash(const char *what, const char *data, size_t len);

/* Raises that there is no memory, likewise. */
extern void chat_debug_memory(const char *what, const char *data, size_t len);

/* Raises the error of a full notification queue if the setting asks for it. */
extern void chat_debug_notify(void);

#endif							/* CHAT_DEBUG_H */
