/*
 * prepare.h
 *		The request of a job that was claimed.
 */
#ifndef CHAT_PREPARE_H
#define CHAT_PREPARE_H

#include "postgres.h"

#include "context.h"
#include "queue.h"
#include "stream.h"

/*
 * In a claim: makes a stream's request.  When there is none afterwards, the
 * stream has ended: it failed, or is deferred.
 */
extern void chat_prepare_request(ChatStream *stream, const ChatJob *job,
								 ChatContext *context, const char *tools);

/* In a claim: records which system prompts the requests of its streams use. */
extern void chat_prepare_record(ChatStream **streams, int n);

#endif							/* CHAT_PREPARE_H */
