/*
 * template.h
 *		The chunks of a stream are alike: all but the text of one delta.
 *
 * Nearly every payload of a stream repeats the one before it, byte for byte,
 * except for the string that is the delta.  A template remembers what stands
 * around that string; a payload that has the same around a string without
 * escapes needs no JSON parser: it is the same document with another text in
 * it.  Anything else is left to the parser.  Pure C, no allocation.
 */
#ifndef CHAT_TEMPLATE_H
#define CHAT_TEMPLATE_H

#include "provider.h"

/* a longer payload is not remembered */
#define CHAT_TEMPLATE_SIZE 496

typedef struct ChatTemplate
{
	short		prefix;			/* bytes before the string; 0 = nothing known */
	short		suffix;			/* bytes behind it */
	bool		reasoning;		/* the string is reasoning, not text */
	char		bytes[CHAT_TEMPLATE_SIZE];	/* prefix, suffix */
} ChatTemplate;

/* Remembers a payload that told nothing but a text, as parsed into *chunk. */
extern void chat_template_learn(ChatTemplate *t, const char *data, size_t len,
								const ChatChunk *chunk);

/* Reads a payload that is like the remembered one; false if it is not. */
extern bool chat_template_match(const ChatTemplate *t, const char *data,
								size_t len, ChatStr *text);

#endif							/* CHAT_TEMPLATE_H */
