/*
 * upkeep.h
 *		What is done now and then, whoever asks something: heartbeats, old
 *		events, a clock that was set back, tasks that no job will end.
 */
#ifndef CHAT_UPKEEP_H
#define CHAT_UPKEEP_H

#include "postgres.h"

extern void chat_upkeep_init(void);

/* Plans heartbeats while there are tasks to send them for. */
extern void chat_upkeep_plan_beat(bool wanted, int64 now);
extern void chat_upkeep_beat(int64 now);

extern void chat_upkeep_retire(void);
extern void chat_upkeep_check_clock(void);
extern void chat_upkeep_end_strays(int64 now);

#endif							/* CHAT_UPKEEP_H */
