/*
 * streams.h
 *		The set of streams that the worker has open.
 */
#ifndef CHAT_STREAMS_H
#define CHAT_STREAMS_H

#include "postgres.h"

#include "lib/ilist.h"
#include "stream.h"

/* beyond so many streams work goes in batches, and the loop in ticks */
#define CHAT_MANY_STREAMS 100

/* Anybody may read it; streams.c changes it. */
typedef struct ChatStreams
{
	dlist_head	all;			/* by ChatStream.node */
	dlist_head	dirty;			/* with something to flush: dirty_node */
	int			n;
	int			limit;			/* that may be open */
	int64		epochs;			/* sum over all, for the fence */
	MemoryContext context;		/* parent of theirs */
} ChatStreams;

extern ChatStreams chat_streams;

extern void chat_streams_start(void);
extern void chat_streams_set_limit(int limit);

/* Adds a stream whose claim is committed. */
extern void chat_streams_add(ChatStream *stream);

/* Frees a stream: its end is stored, or its job is not ours any more. */
extern void chat_streams_drop(ChatStream *stream);

/* Notes that a stream has something to flush, or nothing any more. */
extern void chat_streams_mark(ChatStream *stream);
extern void chat_streams_unmark(ChatStream *stream);

/* Returns how many starts or ends, up to most, one transaction takes. */
extern int	chat_streams_batch(int most);

#endif							/* CHAT_STREAMS_H */
