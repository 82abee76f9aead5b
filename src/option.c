/*
 * option.c
 *		Checks and reads the options of foreign servers and user mappings.
 *
 * Owns nothing but code: the tables belong to the wrappers.  The check of a
 * value is all the protection that its later readers have, so what cannot be
 * sent safely (a line break in a header, credentials in a URL that everybody
 * can read in the catalog) is refused here.  A secret is never part of an
 * error.
 */
#include "postgres.h"

#include <arpa/inet.h>
#include <limits.h>

#include "commands/defrem.h"
#include "common/jsonapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/jsonb.h"

#include "json.h"
#include "option.h"

/*
 * Headers that the runtime or libcurl sets, or that change how a message is
 * framed.
 */
static const char *const reserved_headers[] = {
	"authorization", "connection", "content-length", "content-type",
	"expect", "host", "keep-alive", "proxy-authorization", "proxy-connection",
	"te", "trailer", "transfer-encoding", "upgrade",
};

/* The host of a URL: a piece of it, without the brackets of IPv6. */
typedef struct UrlHost
{
	const char *start;
	int			len;
	bool		bracketed;
} UrlHost;

/* Raises that a value is not what the option takes. */
static void
refuse(const ChatOption *option, const char *value, const char *want)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("invalid value for option \"%s\"", option->name),
			 option->type == CHAT_OPTION_SECRET ? 0 :
			 errdetail("The value is \"%s\".", value),
			 errhint("Give %s.", want)));
}

/* Finds the table's row for an option, or NULL. */
static const ChatOption *
find(const ChatOptionTable *table, Oid catalog, const char *name)
{
	for (int i = 0; i < table->n; i++)
	{
		const ChatOption *option = &table->options[i];

		if (option->catalog == catalog && strcmp(option->name, name) == 0)
			return option;
	}
	return NULL;
}

/* Raises that there is no such option, and lists those that there are. */
static void
refuse_name(const ChatOptionTable *table, Oid catalog, const char *name)
{
	StringInfoData valid;

	initStringInfo(&valid);
	for (int i = 0; i < table->n; i++)
	{
		if (table->options[i].catalog == catalog)
			appendStringInfo(&valid, "%s%s", valid.len > 0 ? ", " : "",
							 table->options[i].name);
	}
	ereport(ERROR,
			(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
			 errmsg("invalid option \"%s\"", name),
			 valid.len > 0 ?
			 errhint("Valid options in this context are: %s.", valid.data) :
			 errhint("There are no valid options in this context.")));
}

/* Whether a text is not empty and holds no control character. */
static bool
is_line(const char *s)
{
	if (*s == '\0')
		return false;
	for (; *s; s++)
	{
		if ((unsigned char) *s < 0x20 || *s == 0x7f)
			return false;
	}
	return true;
}

/* Whether a text is a token of HTTP, as the name of a header must be. */
static bool
is_token(const char *s)
{
	static const char alphabet[] =
	"!#$%&'*+-.^_`|~0123456789"
	"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

	return *s != '\0' && s[strspn(s, alphabet)] == '\0';
}

/* Whether a header is not the user's to set. */
static bool
is_reserved(const char *header)
{
	for (size_t i = 0; i < lengthof(reserved_headers); i++)
	{
		if (pg_strcasecmp(header, reserved_headers[i]) == 0)
			return true;
	}
	return false;
}

/* Whether a piece of a URL is a port that can be connected to. */
static bool
is_port(const char *s, int len)
{
	int			port = 0;

	if (len < 1 || len > 5)
		return false;
	for (int i = 0; i < len; i++)
	{
		if (s[i] < '0' || s[i] > '9')
			return false;
		port = port * 10 + (s[i] - '0');
	}
	return port > 0 && port <= 65535;
}

/* Whether the host between brackets is an IPv6 address. */
static bool
is_ipv6(const UrlHost *host)
{
	char		text[INET6_ADDRSTRLEN];
	struct in6_addr address;

	if (host->len >= (int) sizeof(text))
		return false;
	memcpy(text, host->start, host->len);
	text[host->len] = '\0';
	return inet_pton(AF_INET6, text, &address) == 1;
}

/*
 * Splits scheme and host off a URL; NULL, or what is wrong with it.  It is
 * stricter than libcurl on purpose: what two parsers could read differently
 * is refused.
 */
static const char *
split_url(const char *url, UrlHost *host)
{
	const char *at;
	const char *end;
	const char *port;

	for (const char *p = url; *p; p++)
	{
		if (*p <= 0x20 || *p >= 0x7f || *p == '\\')
			return "a URL without blanks, backslashes or other characters that need percent-encoding";
	}
	if (pg_strncasecmp(url, "https://", 8) == 0)
		at = url + 8;
	else if (pg_strncasecmp(url, "http://", 7) == 0)
		at = url + 7;
	else
		return "a URL that starts with https:// or http://";
	if (strchr(url, '#') != NULL)
		return "a URL without a fragment";
	end = at + strcspn(at, "/?");
	if (memchr(at, '@', end - at) != NULL)
		return "a URL without credentials; a key belongs in a user mapping";

	host->bracketed = (*at == '[');
	if (host->bracketed)
	{
		host->start = at + 1;
		host->len = (int) strcspn(host->start, "]/?");
		port = host->start + host->len;
		if (*port != ']' || !is_ipv6(host))
			return "a URL with a valid IPv6 address between the brackets";
		port++;
	}
	else
	{
		host->start = at;
		host->len = (int) strspn(at, "0123456789-._"
								 "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
								 "abcdefghijklmnopqrstuvwxyz");
		port = at + host->len;
		if (host->len == 0)
			return "a URL with a host";
	}
	if (port == end)
		return NULL;
	if (*port != ':')
		return "a URL whose host is a name or an address";
	if (!is_port(port + 1, (int) (end - port - 1)))
		return "a URL whose port is between 1 and 65535";
	return NULL;
}

/* Whether a valid URL's host is this machine by its very name. */
bool
chat_option_is_loopback(const char *url)
{
	UrlHost		host;
	char		text[INET6_ADDRSTRLEN];
	struct in_addr v4;
	struct in6_addr v6;

	if (split_url(url, &host) != NULL || host.len >= (int) sizeof(text))
		return false;
	memcpy(text, host.start, host.len);
	text[host.len] = '\0';
	if (host.bracketed)
		return inet_pton(AF_INET6, text, &v6) == 1 &&
			IN6_IS_ADDR_LOOPBACK(&v6);
	if (pg_strcasecmp(text, "localhost") == 0)
		return true;
	return inet_pton(AF_INET, text, &v4) == 1 &&
		(ntohl(v4.s_addr) >> 24) == 127;
}

/* Says which text was no JSON. */
static void
json_context(void *arg)
{
	errcontext("option \"%s\"", ((const ChatOption *) arg)->name);
}

/* Parses an option's JSON object. */
static Jsonb *
parse_object(const ChatOption *option, const char *value)
{
	ErrorContextCallback context;
	Jsonb	   *object;
	size_t		need;

	/* what a request could not hold would be left out of it */
	if (chat_json_check(value, strlen(value), &need) == CHAT_JSON_TOO_DEEP)
		refuse(option, value,
			   psprintf("JSON of at most %d levels, without long numbers",
						CHAT_JSON_MAX_DEPTH));
	context.callback = json_context;
	context.arg = (void *) option;
	context.previous = error_context_stack;
	error_context_stack = &context;
	object = DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
												CStringGetDatum(value)));
	error_context_stack = context.previous;
	if (!JB_ROOT_IS_OBJECT(object))
		refuse(option, value, "a JSON object");
	return object;
}

/* Checks a header that the user wants. */
static void
check_header(const ChatOption *option, const char *name, const char *text)
{
	if (!is_token(name))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\"", option->name),
				 errdetail("\"%s\" cannot be the name of a header.", name)));
	if (is_reserved(name))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\"", option->name),
				 errdetail("Header \"%s\" cannot be set.", name),
				 errhint("A key belongs in a user mapping; the other headers of the connection are set by the worker.")));
	if (text != NULL && *text != '\0' && !is_line(text))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\"", option->name),
				 errdetail("The value of header \"%s\" holds a control character.",
						   name)));
}

/* Checks a JSON object of headers. */
static void
check_headers(const ChatOption *option, const char *value)
{
	Jsonb	   *object = parse_object(option, value);
	JsonbIterator *it = JsonbIteratorInit(&object->root);
	JsonbValue	v;
	JsonbIteratorToken token;
	char	   *name = NULL;

	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
			name = pnstrdup(v.val.string.val, v.val.string.len);
		else if (token == WJB_VALUE)
		{
			if (v.type != jbvString)
				refuse(option, value, "a JSON object whose values are strings");
			check_header(option, name,
						 pnstrdup(v.val.string.val, v.val.string.len));
		}
	}
}

/*
 * Reads a whole number.  Settings would take hexadecimal digits and round
 * fractions, too.
 */
static bool
parse_whole(const char *value, int *result)
{
	const char *digits = value + (*value == '-');
	long		number;
	char	   *end;

	if (*digits < '0' || *digits > '9')
		return false;
	errno = 0;
	number = strtol(value, &end, 10);
	if (*end != '\0' || errno != 0 || number < INT_MIN || number > INT_MAX)
		return false;
	*result = (int) number;
	return true;
}

/* Checks that a number is one and lies in its range. */
static void
check_number(const ChatOption *option, const char *value)
{
	bool		whole = (option->type == CHAT_OPTION_INT);
	double		number = 0;
	int			i;
	bool		ok;

	if (whole)
	{
		ok = parse_whole(value, &i);
		if (ok)
			number = i;
	}
	else
	{
		ok = IsValidJsonNumber(value, strlen(value));
		if (ok)
			number = strtod(value, NULL);
	}
	if (!ok || number < option->min || number > option->max)
		refuse(option, value,
			   psprintf("%s between %.15g and %.15g",
						whole ? "a whole number" : "a number",
						option->min, option->max));
}

/* Reads a time: seconds, or a number with one of the units of settings. */
static int
parse_time(const ChatOption *option, const char *value)
{
	double		seconds;

	if (!parse_real(value, &seconds, GUC_UNIT_S, NULL) ||
		seconds * 1000 < option->min || seconds * 1000 > option->max)
		refuse(option, value,
			   psprintf("a time between %.15g and %.15g s, such as 30, 2.5 or '500ms'",
						option->min / 1000, option->max / 1000));
	return (int) (seconds * 1000 + 0.5);
}

/* Whether a value is one of an enum's choices. */
static bool
is_choice(const char *choices, const char *value)
{
	size_t		len = strlen(value);

	while (*choices)
	{
		size_t		n = strcspn(choices, ",");

		if (n == len && memcmp(choices, value, n) == 0)
			return true;
		choices += n;
		choices += strspn(choices, ", ");
	}
	return false;
}

/* Raises what is wrong with one value. */
static void
check_value(const ChatOption *option, const char *value)
{
	UrlHost		host;
	const char *want;
	bool		b;

	switch (option->type)
	{
		case CHAT_OPTION_TEXT:
		case CHAT_OPTION_SECRET:
			if (!is_line(value))
				refuse(option, value, "one line that is not empty, without control characters");
			break;
		case CHAT_OPTION_PATH:
			if (!is_line(value) || !is_absolute_path(value))
				refuse(option, value, "an absolute file name");
			break;
		case CHAT_OPTION_URL:
			want = split_url(value, &host);
			if (want != NULL)
				refuse(option, value, want);
			break;
		case CHAT_OPTION_REAL:
		case CHAT_OPTION_INT:
			check_number(option, value);
			break;
		case CHAT_OPTION_ENUM:
			if (!is_choice(option->choices, value))
				refuse(option, value, psprintf("one of: %s", option->choices));
			break;
		case CHAT_OPTION_OBJECT:
			(void) parse_object(option, value);
			break;
		case CHAT_OPTION_HEADER:
			/* the one place where the key may go under this name */
			if (pg_strcasecmp(value, "authorization") != 0)
				check_header(option, value, NULL);
			break;
		case CHAT_OPTION_HEADERS:
			check_headers(option, value);
			break;
		case CHAT_OPTION_BOOL:
			if (!parse_bool(value, &b))
				refuse(option, value, "on or off");
			break;
		case CHAT_OPTION_TIME:
			(void) parse_time(option, value);
			break;
	}
}

/* Raises what is wrong with the options of one object of the wrapper. */
void
chat_option_validate(const ChatOptionTable *table, Oid catalog, List *options)
{
	ListCell   *cell;

	foreach(cell, options)
	{
		DefElem    *def = (DefElem *) lfirst(cell);
		const ChatOption *option = find(table, catalog, def->defname);

		if (option == NULL)
			refuse_name(table, catalog, def->defname);
		if ((option->flags & CHAT_OPTION_SUPERUSER) && !superuser())
			ereport(ERROR,
					(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
					 errmsg("permission denied to set option \"%s\"",
							option->name),
					 errdetail("Only superusers may change an object that has this option.")));
		check_value(option, defGetString(def));
	}
	for (int i = 0; i < table->n; i++)
	{
		const ChatOption *option = &table->options[i];

		if (option->catalog == catalog &&
			(option->flags & CHAT_OPTION_REQUIRED) &&
			chat_option_get(options, option->name) == NULL)
			ereport(ERROR,
					(errcode(ERRCODE_FDW_DYNAMIC_PARAMETER_VALUE_NEEDED),
					 errmsg("option \"%s\" is required", option->name)));
	}
}

/* Sets the fields of the options that are there, leaves the others. */
void
chat_option_read(const ChatOptionTable *table, Oid catalog, List *options,
				 void *fields)
{
	ListCell   *cell;

	foreach(cell, options)
	{
		DefElem    *def = (DefElem *) lfirst(cell);
		const ChatOption *option = find(table, catalog, def->defname);
		char	   *value = defGetString(def);
		char	   *field;

		if (option == NULL || option->offset == CHAT_OPTION_NO_FIELD)
			continue;
		field = (char *) fields + option->offset;
		switch (option->type)
		{
			case CHAT_OPTION_BOOL:
				(void) parse_bool(value, (bool *) field);
				break;
			case CHAT_OPTION_INT:
				(void) parse_whole(value, (int *) field);
				break;
			case CHAT_OPTION_TIME:
				*(int *) field = parse_time(option, value);
				break;
			default:
				*(char **) field = pstrdup(value);
				break;
		}
	}
}

/* Returns the value as it was written, or NULL. */
const char *
chat_option_get(List *options, const char *name)
{
	ListCell   *cell;

	foreach(cell, options)
	{
		DefElem    *def = (DefElem *) lfirst(cell);

		if (strcmp(def->defname, name) == 0)
			return defGetString(def);
	}
	return NULL;
}
