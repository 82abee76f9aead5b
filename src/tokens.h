/*
 * tokens.h
 *		How many tokens a text has, about.  Usable without postgres.h.
 */
#ifndef CHAT_TOKENS_H
#define CHAT_TOKENS_H

#include <stddef.h>
#include <stdint.h>

/*
 * Estimates the tokens of a text in UTF-8 by its scripts, words, numbers and
 * punctuation; one pass, no vocabulary.
 */
extern int64_t chat_tokens_estimate(const char *text, size_t len);

/*
 * Corrects the estimate of a request by the last one that was counted: its
 * count was exact for all that it held, and its error is that of the session
 * for what came since.  counted or estimated <= 0: there was none.
 */
extern int64_t chat_tokens_calibrate(int64_t estimate, int64_t counted,
									 int64_t estimated);

#endif							/* CHAT_TOKENS_H */
