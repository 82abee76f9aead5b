/*
 * json.c
 *	  Makes text from the network safe for the server's JSON parser and for
 *	  the text type, and escapes and unescapes JSON strings.
 *
 * Owns nothing: functions over byte ranges, no allocation, no state.
 *
 * Each rewriting is one walk that copies what is clean in runs and replaces
 * the spots between them.  The same walk without an output counts, so the
 * size that is told is the size that is written.  In a string eight bytes are
 * looked at in one step as long as nothing in them needs a look: a clean
 * text, the usual one, is read once and never copied.
 */
#include "json.h"

#include <stdint.h>
#include <string.h>

#define ONES UINT64_C(0x0101010101010101)
#define HIGHS UINT64_C(0x8080808080808080)

/*
 * Which byte of a word, as it lies in memory, has the first mark?  A mark may
 * be false only behind a true one in the order of significance, so this holds
 * where the first byte is the least significant; elsewhere a loop finds it.
 */
#if defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define FIRST_BYTE(marks) (__builtin_ctzll(marks) / 8)
#endif

/* U+FFFD as bytes and as an escape */
#define REPLACEMENT "\xEF\xBF\xBD"
#define REPLACEMENT_LEN 3
#define REPLACEMENT_ESCAPE "\\ufffd"
#define ESCAPE_LEN 6

/* A rewriting under way: input up to `run` is dealt with. */
typedef struct Rewrite
{
	const char *run;			/* start of the clean run */
	char	   *out;			/* NULL = only count */
	size_t		len;			/* bytes written or counted */
	bool		changed;		/* something was replaced */
} Rewrite;

/* Passes on the clean run before p. */
static void
flush_run(Rewrite *rw, const char *p)
{
	size_t		n = (size_t) (p - rw->run);

	if (rw->out && n > 0)
		memcpy(rw->out + rw->len, rw->run, n);
	rw->len += n;
	rw->run = p;
}

/* Replaces the n bytes at p; returns what follows them. */
static const char *
replace(Rewrite *rw, const char *p, size_t n, const char *with, size_t withlen)
{
	flush_run(rw, p);
	rw->changed = true;
	if (rw->out)
		memcpy(rw->out + rw->len, with, withlen);
	rw->len += withlen;
	rw->run = p + n;
	return rw->run;
}

/*
 * Skips bytes that mean nothing inside a JSON string; stops at a quote, a
 * backslash, a control character and, with stop_high, at bytes over 0x7F.
 */
static inline const char *
skip_plain(const char *p, const char *end, bool stop_high)
{
	while (end - p >= 8)
	{
		uint64_t	w;
		uint64_t	quote;
		uint64_t	slash;
		uint64_t	hit;

		memcpy(&w, p, 8);
		quote = w ^ (ONES * '"');
		slash = w ^ (ONES * '\\');
		hit = ((w - ONES * 0x20) & ~w) |
			((quote - ONES) & ~quote) |
			((slash - ONES) & ~slash);
		if (stop_high)
			hit |= w;
		hit &= HIGHS;
		if (hit)
		{
#ifdef FIRST_BYTE
			return p + FIRST_BYTE(hit);
#else
			break;
#endif
		}
		p += 8;
	}
	while (p < end)
	{
		unsigned char c = (unsigned char) *p;

		if (c < 0x20 || c == '"' || c == '\\' || (stop_high && c >= 0x80))
			break;
		p++;
	}
	return p;
}

/*
 * Length of the UTF-8 character at p, which starts with a byte over 0x7F, or
 * 0 when it is none: then *bad is how many bytes one U+FFFD stands for (the
 * longest start of a character, as decoders of the web do it).
 */
static size_t
utf8_length(const char *s, const char *end, size_t *bad)
{
	const unsigned char *p = (const unsigned char *) s;
	size_t		left = (size_t) (end - s);
	unsigned char low = 0x80;
	unsigned char high = 0xBF;
	size_t		n;
	size_t		i;

	*bad = 1;
	if (p[0] < 0xC2 || p[0] > 0xF4)
		return 0;
	n = p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
	if (p[0] == 0xE0)
		low = 0xA0;				/* overlong */
	else if (p[0] == 0xED)
		high = 0x9F;			/* surrogates */
	else if (p[0] == 0xF0)
		low = 0x90;				/* overlong */
	else if (p[0] == 0xF4)
		high = 0x8F;			/* beyond U+10FFFF */
	for (i = 1; i < n; i++)
	{
		if (i >= left || p[i] < low || p[i] > high)
		{
			*bad = i;
			return 0;
		}
		low = 0x80;
		high = 0xBF;
	}
	return n;
}

/* Passes over characters beyond ASCII, replacing what is not UTF-8. */
static const char *
walk_high(Rewrite *rw, const char *p, const char *end)
{
	while (p < end && (unsigned char) *p >= 0x80)
	{
		size_t		bad;
		size_t		n = utf8_length(p, end, &bad);

		if (n > 0)
			p += n;
		else
			p = replace(rw, p, bad, REPLACEMENT, REPLACEMENT_LEN);
	}
	return p;
}

/* Value of a hexadecimal digit, or -1. */
static int
hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	if (c >= 'A' && c <= 'F')
		return c - 'A' + 10;
	return -1;
}

/* Value of the \uXXXX at p, or -1 when there is none. */
static int
hex_escape(const char *p, const char *end)
{
	int			value = 0;
	int			i;

	if (end - p < ESCAPE_LEN || p[0] != '\\' || p[1] != 'u')
		return -1;
	for (i = 2; i < ESCAPE_LEN; i++)
	{
		int			digit = hex_digit(p[i]);

		if (digit < 0)
			return -1;
		value = value * 16 + digit;
	}
	return value;
}

/* Writes \u00XX for a control character. */
static void
control_escape(unsigned char c, char out[ESCAPE_LEN])
{
	static const char digits[] = "0123456789abcdef";

	memcpy(out, "\\u00", 4);
	out[4] = digits[c >> 4];
	out[5] = digits[c & 15];
}

/* Passes over the escape at p, replacing those that no text can hold. */
static const char *
walk_escape(Rewrite *rw, const char *p, const char *end)
{
	int			value = hex_escape(p, end);
	int			next;

	if (value < 0)
	{
		/* a strange byte after the backslash wants its own look */
		if (end - p >= 2 && p[1] >= 0x20 && (unsigned char) p[1] < 0x80)
			return p + 2;
		return p + 1;
	}
	if (value >= 0xD800 && value <= 0xDBFF)
	{
		next = hex_escape(p + ESCAPE_LEN, end);
		if (next >= 0xDC00 && next <= 0xDFFF)
			return p + 2 * ESCAPE_LEN;
	}
	if (value == 0 || (value >= 0xD800 && value <= 0xDFFF))
		return replace(rw, p, ESCAPE_LEN, REPLACEMENT_ESCAPE, ESCAPE_LEN);
	return p + ESCAPE_LEN;
}

/* Passes over the rest of a string; returns what follows its end. */
static const char *
walk_string(Rewrite *rw, const char *p, const char *end)
{
	for (;;)
	{
		char		escape[ESCAPE_LEN];

		p = skip_plain(p, end, true);
		if (p >= end)
			return end;
		if (*p == '"')
			return p + 1;
		if (*p == '\\')
			p = walk_escape(rw, p, end);
		else if ((unsigned char) *p >= 0x80)
			p = walk_high(rw, p, end);
		else if (*p == '\0')
			p = replace(rw, p, 1, REPLACEMENT, REPLACEMENT_LEN);
		else
		{
			control_escape((unsigned char) *p, escape);
			p = replace(rw, p, 1, escape, ESCAPE_LEN);
		}
	}
}

/*
 * Returns the exponent that follows the letter at p, without its sign.  One
 * that no number can have is refused by whoever reads it.
 */
static int
exponent(const char *p, const char *end)
{
	int			value = 0;

	p++;
	if (p < end && (*p == '-' || *p == '+'))
		p++;
	for (; p < end && *p >= '0' && *p <= '9' && value < 1000000; p++)
		value = value * 10 + (*p - '0');
	return value;
}

/* Passes over a JSON text; false when it is nested or written out too far. */
static bool
walk_json(Rewrite *rw, const char *p, const char *end)
{
	int			depth = 0;
	size_t		digits = 0;
	size_t		most = CHAT_JSON_MAX_DIGITS + 2 * (size_t) (end - p);

	while (p < end)
	{
		switch (*p)
		{
			case '"':
				p = walk_string(rw, p + 1, end);
				continue;
			case '{':
			case '[':
				if (++depth > CHAT_JSON_MAX_DEPTH)
					return false;
				break;
			case '}':
			case ']':
				if (depth > 0)
					depth--;
				break;
			case 'e':
			case 'E':
				digits += (size_t) exponent(p, end);
				if (digits > most)
					return false;
				break;
			case '\0':
				p = replace(rw, p, 1, REPLACEMENT, REPLACEMENT_LEN);
				continue;
			default:
				if ((unsigned char) *p >= 0x80)
				{
					p = walk_high(rw, p, end);
					continue;
				}
		}
		p++;
	}
	flush_run(rw, end);
	return true;
}

/* Passes over a plain text. */
static void
walk_text(Rewrite *rw, const char *p, const char *end)
{
	while (p < end)
	{
		if ((unsigned char) *p >= 0x80)
			p = walk_high(rw, p, end);
		else if (*p == '\0')
			p = replace(rw, p, 1, REPLACEMENT, REPLACEMENT_LEN);
		else
			p++;
	}
	flush_run(rw, end);
}

/* Tells whether a JSON text can be parsed as it is. */
ChatJsonState
chat_json_check(const char *in, size_t len, size_t *need)
{
	Rewrite		rw = {in, NULL, 0, false};

	if (!walk_json(&rw, in, in + len))
		return CHAT_JSON_TOO_DEEP;
	*need = rw.len;
	return rw.changed ? CHAT_JSON_DIRTY : CHAT_JSON_AS_IS;
}

/* Writes a JSON text that the server's parsers take. */
size_t
chat_json_clean(const char *in, size_t len, char *out)
{
	Rewrite		rw = {in, out, 0, false};

	(void) walk_json(&rw, in, in + len);
	return rw.len;
}

/* Tells whether a plain text can be stored as it is. */
bool
chat_utf8_check(const char *in, size_t len, size_t *need)
{
	Rewrite		rw = {in, NULL, 0, false};

	walk_text(&rw, in, in + len);
	*need = rw.len;
	return !rw.changed;
}

/* Writes a plain text that can be stored. */
size_t
chat_utf8_clean(const char *in, size_t len, char *out)
{
	Rewrite		rw = {in, out, 0, false};

	walk_text(&rw, in, in + len);
	return rw.len;
}

/* The letter of a two-character escape for this byte, or 0. */
static char
short_escape(char c)
{
	switch (c)
	{
		case '"':
		case '\\':
			return c;
		case '\b':
			return 'b';
		case '\f':
			return 'f';
		case '\n':
			return 'n';
		case '\r':
			return 'r';
		case '\t':
			return 't';
		default:
			return 0;
	}
}

/* Escapes a plain text for a JSON string. */
size_t
chat_json_escape(const char *in, size_t len, char *out)
{
	const char *end = in + len;
	const char *p = in;
	Rewrite		rw = {in, out, 0, false};

	while ((p = skip_plain(p, end, false)) < end)
	{
		char		escape[ESCAPE_LEN];
		char		letter = short_escape(*p);

		if (letter)
		{
			escape[0] = '\\';
			escape[1] = letter;
			p = replace(&rw, p, 1, escape, 2);
		}
		else
		{
			control_escape((unsigned char) *p, escape);
			p = replace(&rw, p, 1, escape, ESCAPE_LEN);
		}
	}
	flush_run(&rw, end);
	return rw.len;
}

/* Writes a code point as UTF-8; returns the number of bytes. */
static size_t
put_utf8(uint32_t c, char *out)
{
	if (c < 0x80)
	{
		out[0] = (char) c;
		return 1;
	}
	if (c < 0x800)
	{
		out[0] = (char) (0xC0 | (c >> 6));
		out[1] = (char) (0x80 | (c & 0x3F));
		return 2;
	}
	if (c < 0x10000)
	{
		out[0] = (char) (0xE0 | (c >> 12));
		out[1] = (char) (0x80 | ((c >> 6) & 0x3F));
		out[2] = (char) (0x80 | (c & 0x3F));
		return 3;
	}
	out[0] = (char) (0xF0 | (c >> 18));
	out[1] = (char) (0x80 | ((c >> 12) & 0x3F));
	out[2] = (char) (0x80 | ((c >> 6) & 0x3F));
	out[3] = (char) (0x80 | (c & 0x3F));
	return 4;
}

/* Undoes one escape at *p; returns the number of bytes written. */
static size_t
unescape_one(const char **p, const char *end, char *out)
{
	static const char letters[] = "bfnrt";
	static const char bytes[] = "\b\f\n\r\t";
	int			value = hex_escape(*p, end);
	uint32_t	point;
	const char *letter;

	if (value >= 0)
	{
		*p += ESCAPE_LEN;
		point = (uint32_t) value;
		if (value >= 0xD800 && value <= 0xDBFF)
		{
			int			low = hex_escape(*p, end);

			if (low >= 0xDC00 && low <= 0xDFFF)
			{
				*p += ESCAPE_LEN;
				point = 0x10000 + ((point - 0xD800) << 10) +
					((uint32_t) low - 0xDC00);
			}
		}
		return put_utf8(point, out);
	}
	if (end - *p < 2)
	{
		*out = *(*p)++;
		return 1;
	}
	letter = memchr(letters, (*p)[1], sizeof(letters) - 1);
	*out = letter ? bytes[letter - letters] : (*p)[1];
	*p += 2;
	return 1;
}

/* Undoes the escapes of a JSON string. */
size_t
chat_json_unescape(const char *in, size_t len, char *out)
{
	const char *end = in + len;
	char	   *o = out;

	while (in < end)
	{
		const char *slash = memchr(in, '\\', (size_t) (end - in));
		size_t		n = (size_t) ((slash ? slash : end) - in);

		memmove(o, in, n);
		o += n;
		in += n;
		if (slash)
			o += unescape_one(&in, end, o);
	}
	return (size_t) (o - out);
}
