/*
 * fold.h
 *		What an event stream adds up to: the message as AI SDK parts, and an
 *		event in the pure protocol.
 *
 * Pure: no table, no transaction.  Events are JSON objects that the server
 * has accepted as json; a fold keeps pointers into them, so they live as
 * long as it does.
 */
#ifndef CHAT_FOLD_H
#define CHAT_FOLD_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "provider.h"

/* the protocol versions that chat_fold_protocol() writes: of npm's ai */
#define CHAT_PROTOCOL_MIN 6
#define CHAT_PROTOCOL_MAX 7

typedef struct ChatFold ChatFold;

/* A member of a JSON object, or an element of an array: raw JSON. */
typedef struct ChatMember
{
	ChatStr		name;			/* without its quotes; absent in arrays */
	ChatStr		value;
} ChatMember;

extern ChatFold *chat_fold_create(void);
extern void chat_fold_event(ChatFold *fold, ChatStr json);
extern void chat_fold_message(const ChatFold *fold, StringInfo out);
extern bool chat_fold_protocol(StringInfo out, ChatStr json, int protocol);
extern bool chat_fold_is(ChatStr json, const char *type);
extern bool chat_fold_next(const char **at, const char *end,
						   ChatMember *member);
extern ChatStr chat_fold_member(ChatStr object, const char *name);

#endif							/* CHAT_FOLD_H */
