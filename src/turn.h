/*
 * turn.h
 *		The tool phase of a task: between a step that asked for tools and the
 *		next step.
 *
 * A task in this phase is held by nobody: its job is parked, and whoever ends
 * a call (a tool worker, a callback, the application) makes the job due.  A
 * turn then is one transaction of the streaming worker: results are given to
 * listeners and put into the messages, and when the last one is there the
 * job becomes an ordinary one again.  All state is in the tables, so a crash
 * between two turns changes nothing.
 */
#ifndef CHAT_TURN_H
#define CHAT_TURN_H

#include "postgres.h"

#include "event.h"
#include "queue.h"

extern void chat_turn_init(void);

/*
 * Stores a step that ended with tool calls: the assistant message, one tool
 * message per call, the calls, a job for each that runs here.  Sets ok and
 * missed of the ends as chat_queue_finish() does.
 */
extern void chat_turn_park(int64 holder, ChatEnd **ends, int n);

/* Parks the jobs of stored ends, their last event being seqs[i]. */
extern void chat_turn_seal(int64 holder, ChatEnd **ends,
						   const int64 *seqs, int n);

/*
 * Gives up to most of the due parked tasks their turn; events go into the
 * batch.  Returns how many tasks moved; their ids are in *tasks.  bare = they
 * fail, and nothing is read of their calls: for one whose turn failed.
 */
extern int	chat_turn_run(int64 holder, int most, bool bare,
						  ChatEventBatch *batch, pg_uuid_t **tasks);

/* Notifies a heartbeat for each task whose tools run. */
extern void chat_turn_heartbeat(void);

/* Tells listeners how far an operation is; false if its task is not parked. */
extern bool chat_turn_progress(const pg_uuid_t *operation, const char *report,
							   ChatEventBatch *batch, pg_uuid_t *task);

/* Setting chat.operation_timeout, in ms. */
extern int	chat_turn_operation_timeout(void);

/* Makes the parked job of a task due; true if there is one. */
extern bool chat_turn_ring(const pg_uuid_t *session, const pg_uuid_t *task);

#endif							/* CHAT_TURN_H */
