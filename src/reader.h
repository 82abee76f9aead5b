/*
 * reader.h
 *		The functions that read event streams: get_task_events,
 *		wait_task_events, task_snapshot, sse.
 *
 * They are known to SQL only.
 */
#ifndef CHAT_READER_H
#define CHAT_READER_H

/* slots of chat_event, and with them its partitions */
#define CHAT_EVENT_SLOTS 8

#endif							/* CHAT_READER_H */
