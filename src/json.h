/*
 * json.h
 *	  Makes text from the network safe for the server's JSON parser and for
 *	  the text type, and escapes and unescapes JSON strings.
 *
 * Pure C: no allocation, no state, no server header.  Whoever calls brings
 * the output buffer; each writer has a companion, or a NULL output, that
 * tells how large it must be.
 */
#ifndef CHAT_JSON_H
#define CHAT_JSON_H

#include <stdbool.h>
#include <stddef.h>

/* objects and arrays within each other; the server's parser recurses */
#define CHAT_JSON_MAX_DEPTH 64
/*
 * sum of the exponents of a text, beside twice its length: jsonb writes its
 * numbers without them, a hundred thousand digits for ten bytes
 */
#define CHAT_JSON_MAX_DIGITS 100000

typedef enum ChatJsonState
{
	CHAT_JSON_AS_IS,			/* use the input as it is */
	CHAT_JSON_DIRTY,			/* use what chat_json_clean writes */
	CHAT_JSON_TOO_DEEP			/* refuse: nested, or written out by jsonb,
								 * beyond the limit */
} ChatJsonState;

/*
 * Looks at a JSON text once.  For CHAT_JSON_DIRTY, *need is the exact size of
 * what chat_json_clean writes.  Tells nothing about the grammar: the parser
 * finds what is not JSON.
 */
extern ChatJsonState chat_json_check(const char *in, size_t len,
									 size_t *need);

/*
 * Writes a text that the server's parsers take: bytes that are not UTF-8,
 * raw NULs, \u0000 and surrogate escapes without their half become U+FFFD;
 * raw control characters inside strings become escapes.  Returns the size
 * written (the *need of chat_json_check; no NUL is added).
 */
extern size_t chat_json_clean(const char *in, size_t len, char *out);

/*
 * Escapes a plain text for use between the quotes of a JSON string; returns
 * the size.  With out == NULL only the size.  At most six times len.
 */
extern size_t chat_json_escape(const char *in, size_t len, char *out);

/*
 * Undoes the escapes of what stands between the quotes of a JSON string that
 * chat_json_clean has let pass and the parser has accepted; returns the size,
 * never more than len.  in and out may be the same.
 */
extern size_t chat_json_unescape(const char *in, size_t len, char *out);

/*
 * True if a plain text can be stored as it is: UTF-8 without NUL.  Otherwise
 * *need is the exact size of what chat_utf8_clean writes.
 */
extern bool chat_utf8_check(const char *in, size_t len, size_t *need);

/* Writes the text with U+FFFD for NULs and for what is not UTF-8. */
extern size_t chat_utf8_clean(const char *in, size_t len, char *out);

#endif							/* CHAT_JSON_H */
