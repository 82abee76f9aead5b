/*
 * tokens.c
 *		An estimate of how many tokens a text has.
 *
 * Owns the weights, in thousandths of a token.  They lie between those of
 * two common tokenizers (o200k and cl100k), which differ most where a script
 * is not Latin; what an endpoint has counted corrects them for a session.
 * test/unit/test_tokens.c prints how far off they are.
 */
#include "tokens.h"

#define TOKEN 1000

/* a word is one token up to so many letters, and one for each further few */
#define WORD_LETTERS 9
#define MORE_LETTERS 4
/* digits, and characters of punctuation, that make one token */
#define NUMBER_DIGITS 3
#define MARKS 3
/* letters of the Latin script beyond ASCII break words up */
#define ACCENTED 600
/* characters of other scripts, each */
#define ALPHABETIC 290			/* Cyrillic, Greek, Arabic, Hebrew ... */
#define SYLLABIC 750			/* Indic, Thai, Georgian ... */
#define IDEOGRAPHIC 1020		/* Chinese, Japanese, Korean */
#define WIDE_MARK 900			/* their punctuation */
#define PICTURE 2500			/* emoji and whatever is beyond */

/* the ratio of counted to estimated tokens is not trusted beyond these */
#define MIN_RATIO 0.3
#define MAX_RATIO 3.0

typedef enum Class
{
	BLANK, NEWLINE, LETTER, CAPITAL, DIGIT, MARK, OTHER
} Class;

#define B BLANK
#define N NEWLINE
#define L LETTER
#define C CAPITAL
#define D DIGIT
#define M MARK

/* the classes of ASCII; a text is looked up here byte by byte, so it pays */
static const unsigned char classes[128] = {
	M, M, M, M, M, M, M, M, M, B, N, M, M, N, M, M,
	M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M,
	B, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M,
	D, D, D, D, D, D, D, D, D, D, M, M, M, M, M, M,
	M, C, C, C, C, C, C, C, C, C, C, C, C, C, C, C,
	C, C, C, C, C, C, C, C, C, C, C, M, M, M, M, M,
	M, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L,
	L, L, L, L, L, L, L, L, L, L, L, M, M, M, M, M,
};

#undef B
#undef N
#undef L
#undef C
#undef D
#undef M

/* Returns the class of a byte. */
static inline Class
class_of(unsigned char c)
{
	return c < 0x80 ? (Class) classes[c] : OTHER;
}

/* Returns the length of a run of one class from p on. */
static size_t
run_length(const char *p, const char *end, Class class)
{
	const char *start = p;

	while (p < end && class_of((unsigned char) *p) == class)
		p++;
	return (size_t) (p - start);
}

/* Returns the length of a word: capitals begin it, or it is all capitals. */
static size_t
word_length(const char *p, const char *end)
{
	size_t		capitals = run_length(p, end, CAPITAL);
	size_t		letters = run_length(p + capitals, end, LETTER);

	/* in HTTPServer the last capital belongs to the next word */
	if (capitals > 1 && letters > 0)
		return capitals - 1;
	return capitals + letters;
}

/* Returns the weight of a word of ASCII letters. */
static int64_t
word_weight(size_t len)
{
	return TOKEN + (len > WORD_LETTERS
					? (int64_t) (len - WORD_LETTERS + MORE_LETTERS - 1) /
					MORE_LETTERS * TOKEN : 0);
}

/* Reads a character beyond ASCII; returns its length, never beyond the end. */
static size_t
read_character(const char *p, const char *end, uint32_t *c)
{
	unsigned char first = (unsigned char) *p;
	size_t		len = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;

	*c = first & (0xFF >> (len + 1));
	if ((size_t) (end - p) < len)
		len = (size_t) (end - p);
	for (size_t i = 1; i < len; i++)
		*c = (*c << 6) | ((unsigned char) p[i] & 0x3F);
	return len;
}

/* Returns the weight of a character beyond ASCII. */
static int64_t
character_weight(uint32_t c)
{
	if (c < 0x250)
		return ACCENTED;
	if (c < 0x900)
		return ALPHABETIC;
	if (c < 0x1E00)
		return SYLLABIC;
	if (c < 0x2000)
		return ACCENTED;
	if (c < 0x3000)
		return WIDE_MARK;
	if (c < 0x3040 || (c >= 0xFF00 && c < 0xFFF0))
		return WIDE_MARK;
	if (c < 0x10000)
		return IDEOGRAPHIC;
	return PICTURE;
}

/* Returns the weight of a run of ASCII of one class. */
static int64_t
run_weight(Class class, size_t len)
{
	switch (class)
	{
		case BLANK:
			/* one belongs to the word that follows */
			return len > 1 ? TOKEN : 0;
		case NEWLINE:
			return TOKEN;
		case DIGIT:
			return (int64_t) (len + NUMBER_DIGITS - 1) / NUMBER_DIGITS * TOKEN;
		case MARK:
			return (int64_t) (len + MARKS - 1) / MARKS * TOKEN;
		default:
			return word_weight(len);
	}
}

/* Estimates the tokens of a text, see tokens.h. */
int64_t
chat_tokens_estimate(const char *text, size_t len)
{
	const char *p = text;
	const char *end = text + len;
	int64_t		weight = 0;

	while (p < end)
	{
		Class		class = class_of((unsigned char) *p);
		uint32_t	c;
		size_t		n;

		if (class == OTHER)
		{
			n = read_character(p, end, &c);
			weight += character_weight(c);
		}
		else
		{
			n = class == LETTER || class == CAPITAL ? word_length(p, end)
				: run_length(p, end, class);
			weight += run_weight(class, n);
		}
		p += n;
	}
	return (weight + TOKEN - 1) / TOKEN;
}

/* Corrects an estimate by the last request that was counted, see tokens.h. */
int64_t
chat_tokens_calibrate(int64_t estimate, int64_t counted, int64_t estimated)
{
	double		ratio;
	double		rest;

	if (counted <= 0 || estimated <= 0)
		return estimate;
	ratio = (double) counted / (double) estimated;
	if (estimate <= estimated)
		return (int64_t) ((double) estimate * ratio + 0.5);
	if (ratio < MIN_RATIO)
		ratio = MIN_RATIO;
	if (ratio > MAX_RATIO)
		ratio = MAX_RATIO;
	rest = (double) (estimate - estimated) * ratio;
	return counted + (int64_t) (rest + 0.5);
}
