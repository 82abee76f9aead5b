/*
 * demo.c
 *		Runs two turns as an application would, and shows them: one of words,
 *		and one in which the model calls a function of the database.
 *
 *	demo BASE_URL MODEL KEY_FILE MESSAGE SCRIPT
 *
 * The connection is libpq's default (PGHOST and so on).  KEY_FILE may be
 * empty: no user mapping then.  SCRIPT is what has the fake endpoint call the
 * function; empty for a real one, which decides for itself.  Every statement
 * is printed before it runs; the answer is printed as its notifications
 * arrive, nothing else is read until it has ended.
 *
 * Exits with 3 when a turn fails, which is told by then, and with 1 when
 * something else does.
 */
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <libpq-fe.h>

static PGconn *conn;

/* psql's prompt: who is no superuser has another one. */
static const char *prompt = "chat=#";

/* Escape sequences, empty where the output is not a terminal. */
static const char *BOLD = "";
static const char *DIM = "";
static const char *BLUE = "";
static const char *GREEN = "";
static const char *RED = "";
static const char *PLAIN = "";

/* What is known of the turn while its events arrive. */
typedef struct Turn
{
	double		called;			/* when the call had committed, ms */
	double		first;			/* of the first piece of text, 0 = none yet */
	double		ended;
	int			pieces;
	int			notifications;
	bool		failed;
} Turn;

/* Ends the program with what went wrong. */
static void
die(const char *what)
{
	fprintf(stderr, "%sdemo: %s: %s%s", RED, what, PQerrorMessage(conn),
			PLAIN);
	exit(1);
}

/* Returns the monotonic clock in milliseconds. */
static double
now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1e3 + ts.tv_nsec / 1e6;
}

/* Turns colours on for a terminal. */
static void
colours(void)
{
	const char *term = getenv("TERM");

	if (!isatty(STDOUT_FILENO) || getenv("NO_COLOR") != NULL ||
		term == NULL || strcmp(term, "dumb") == 0)
		return;
	BOLD = "\033[1m";
	DIM = "\033[2m";
	BLUE = "\033[34m";
	GREEN = "\033[32m";
	RED = "\033[31m";
	PLAIN = "\033[0m";
}

/* Prints a heading. */
static void
heading(const char *text)
{
	printf("\n%s-- %s%s\n", BOLD, text, PLAIN);
}

/* Prints a statement as psql shows it, later lines indented. */
static void
show(const char *sql)
{
	printf("%s%s%s %s", DIM, prompt, PLAIN, BLUE);
	for (; *sql; sql++)
	{
		putchar(*sql);
		if (*sql == '\n')
			fputs("       ", stdout);
	}
	printf("%s\n", PLAIN);
	fflush(stdout);
}

/* Runs a statement without a word. */
static PGresult *
run(const char *sql)
{
	PGresult   *res = PQexec(conn, sql);

	if (PQresultStatus(res) != PGRES_COMMAND_OK &&
		PQresultStatus(res) != PGRES_TUPLES_OK)
		die(sql);
	return res;
}

/* Builds a statement; "%s" arguments have to be quoted already. */
static char *
format(const char *fmt,...)
{
	va_list		args;
	char	   *sql;

	va_start(args, fmt);
	if (vasprintf(&sql, fmt, args) < 0)
		exit(1);
	va_end(args);
	return sql;
}

/* Returns a string as an SQL literal. */
static char *
literal(const char *s)
{
	char	   *quoted = PQescapeLiteral(conn, s, strlen(s));

	if (quoted == NULL)
		die("cannot quote");
	return quoted;
}

/* Shows and runs a statement and shows its command tag. */
static void
command(const char *sql)
{
	PGresult   *res;

	show(sql);
	res = run(sql);
	printf("%s\n", PQcmdStatus(res));
	PQclear(res);
}

/* Returns how many characters a UTF-8 string has. */
static int
width(const char *s)
{
	int			n = 0;

	for (; *s; s++)
		n += ((unsigned char) *s & 0xC0) != 0x80;
	return n;
}

/* Prints a value on one line, filled up to a width; numbers to the right. */
static void
print_value(const char *s, int fill, bool right)
{
	int			pad = fill - width(s);

	printf("%*s", right && pad > 0 ? pad : 0, "");
	for (; *s; s++)
		putchar((unsigned char) *s < ' ' ? ' ' : *s);
	printf("%*s", !right && pad > 0 ? pad : 0, "");
}

/* Prints a result as psql does. */
static void
print_rows(const PGresult *res)
{
	int			columns = PQnfields(res);
	int			fill[16];

	for (int c = 0; c < columns && c < 16; c++)
	{
		fill[c] = width(PQfname(res, c));
		for (int r = 0; r < PQntuples(res); r++)
			if (width(PQgetvalue(res, r, c)) > fill[c])
				fill[c] = width(PQgetvalue(res, r, c));
	}
	for (int c = 0; c < columns; c++)
	{
		printf(c ? " | " : " ");
		print_value(PQfname(res, c), fill[c], false);
	}
	for (int c = 0; c < columns; c++)
	{
		printf(c ? "+-" : "\n-");
		for (int i = 0; i <= fill[c]; i++)
			putchar('-');
	}
	for (int r = 0; r < PQntuples(res); r++)
	{
		for (int c = 0; c < columns; c++)
		{
			/* the numbers among our columns are int4 and int8 */
			bool		right = PQftype(res, c) == 20 || PQftype(res, c) == 23;

			printf(c ? " | " : "\n ");
			print_value(PQgetvalue(res, r, c), fill[c], right);
		}
	}
	printf("\n(%d row%s)\n\n", PQntuples(res), PQntuples(res) == 1 ? "" : "s");
}

/* Shows and runs a query and prints its rows. */
static PGresult *
query(const char *sql)
{
	PGresult   *res;

	show(sql);
	res = run(sql);
	print_rows(res);
	return res;
}

/* Creates the extension, the endpoint and its key. */
static void
install(const char *base_url, const char *model, const char *key_file)
{
	heading("once: the extension, and where the model is");
	command("CREATE EXTENSION chat;");
	command(format("CREATE SERVER demo FOREIGN DATA WRAPPER chat_llm\n"
				   "OPTIONS (base_url %s, model %s);",
				   literal(base_url), literal(model)));
	if (*key_file)
		command(format("CREATE USER MAPPING FOR PUBLIC SERVER demo\n"
					   "OPTIONS (api_key_file %s);", literal(key_file)));
}

/*
 * Returns the member's value of a flat JSON object, decoded by the server,
 * or NULL.
 */
static char *
member(const char *json, const char *name)
{
	const char *values[2] = {json, name};
	PGresult   *res = PQexecParams(conn, "SELECT $1::jsonb ->> $2", 2, NULL,
								   values, NULL, NULL, 0);
	char	   *value = NULL;

	if (PQresultStatus(res) != PGRES_TUPLES_OK)
		die("unexpected event");
	if (!PQgetisnull(res, 0, 0))
		value = strdup(PQgetvalue(res, 0, 0));
	PQclear(res);
	return value;
}

/* Prints a member of an event behind a word. */
static void
show_member(const char *payload, const char *word, const char *name)
{
	char	   *text = member(payload, name);

	printf("%s%s %s%s", DIM, word, text ? text : "", PLAIN);
	free(text);
}

/* Shows an event of a tool call; false if it is none that is shown. */
static bool
show_tool(const char *type, const char *payload)
{
	if (strcmp(type, "tool-input-available") == 0)
	{
		show_member(payload, "calls", "toolName");
		show_member(payload, "", "input");
		printf("\n");
	}
	else if (strcmp(type, "tool-output-available") == 0)
	{
		show_member(payload, "  result:", "output");
		printf("\n");
	}
	else if (strcmp(type, "tool-output-error") == 0 ||
			 strcmp(type, "tool-input-error") == 0)
	{
		show_member(payload, "  error:", "errorText");
		printf("\n");
	}
	else
		return false;
	return true;
}

/* Shows one event of the stream; true when it was the last. */
static bool
show_event(const char *payload, Turn *turn)
{
	double		arrived = now_ms();
	char	   *type = member(payload, "type");
	bool		last = false;

	turn->notifications++;
	if (type == NULL)
		return false;
	if (strcmp(type, "text-delta") == 0)
	{
		char	   *delta = member(payload, "delta");

		if (turn->first == 0)
			turn->first = arrived;
		turn->pieces++;
		printf("%s%s%s", GREEN, delta ? delta : "", PLAIN);
		free(delta);
	}
	else if (strcmp(type, "error") == 0)
	{
		char	   *text = member(payload, "errorText");

		printf("%s%s%s", RED, text ? text : payload, PLAIN);
		turn->failed = true;
		free(text);
	}
	else if (strcmp(type, "finish") == 0 || strcmp(type, "abort") == 0)
		last = true;
	else
		show_tool(type, payload);
	fflush(stdout);
	free(type);
	return last;
}

/* Prints the answer while it arrives. */
static void
follow(Turn *turn)
{
	bool		last = false;

	while (!last)
	{
		PGnotify   *note = PQnotifies(conn);

		if (note != NULL)
		{
			last = show_event(note->extra, turn);
			PQfreemem(note);
			continue;
		}
		if (poll(&(struct pollfd) {.fd = PQsocket(conn),.events = POLLIN}, 1,
				 -1) < 0 || !PQconsumeInput(conn))
			die("connection lost");
	}
	turn->ended = now_ms();
	printf("\n");
}

/* Shows what is stored and how long it took. */
static void
epilogue(const char *session, const char *task, const Turn *turn)
{
	char	   *id = literal(session);

	heading("what is stored");
	PQclear(query(format("SELECT sequence, role,\n"
						 "       left(content, 40) || CASE WHEN length(content) > 40"
						 " THEN ' ...' ELSE '' END AS content\n"
						 "FROM chat.get_chat_messages(session_id => %s);",
						 id)));
	PQclear(query(format("SELECT status, steps, prompt_tokens,"
						 " completion_tokens\n"
						 "FROM chat.chat_task WHERE id = %s;",
						 literal(task))));
	printf("%s%d notifications, %d pieces of text", DIM, turn->notifications,
		   turn->pieces);
	if (turn->first != 0)
		printf("; first token %.1f ms after the call, all after %.0f ms",
			   turn->first - turn->called, turn->ended - turn->called);
	printf("%s\n", PLAIN);
}

/* Sends a message in a session of its own and shows all that follows. */
static void
converse(const char *message, Turn *turn)
{
	PGresult   *res;
	char	   *session;
	char	   *task;

	heading("a session, and a listener on its channel");
	res = query("SELECT id, channel\nFROM chat.create_chat_session"
				"(user_id => 'ada', server => 'demo');");
	session = strdup(PQgetvalue(res, 0, 0));
	command(format("LISTEN %s;", PQgetvalue(res, 0, 1)));
	PQclear(res);

	heading("the call: it returns at once, a background worker does the rest");
	res = query(format("SELECT chat.stream_chat_completion(session_id => %s,\n"
					   "message => %s) AS task;",
					   literal(session), literal(message)));
	turn->called = now_ms();
	task = strdup(PQgetvalue(res, 0, 0));
	PQclear(res);

	heading("the answer, as its notifications arrive");
	follow(turn);
	epilogue(session, task, turn);
}

/* Shows and runs a statement whose result says nothing. */
static void
quietly(const char *sql)
{
	show(sql);
	PQclear(run(sql));
}

/* Makes a function over a table a tool of the role that the sessions have. */
static void
install_tool(const char *script)
{
	if (*script)
		PQclear(run(format("ALTER SERVER demo OPTIONS (ADD extra_body %s)",
						   literal(format("{\"fake\": \"%s\"}", script)))));
	heading("a tool: a function over a table, that the model may call");
	command("CREATE ROLE ada LOGIN;");
	quietly("SELECT chat.grant_usage('ada');");
	command("GRANT USAGE ON FOREIGN SERVER demo TO ada;");
	command("CREATE SCHEMA shop AUTHORIZATION ada;");
	command("SET ROLE ada;");
	prompt = "chat=>";
	command("CREATE TABLE shop.orders (id integer PRIMARY KEY, status text);");
	command("INSERT INTO shop.orders VALUES (1042, 'shipped'), (1043, 'packed');");
	command("CREATE FUNCTION shop.order_status(order_id integer) RETURNS text\n"
			"LANGUAGE sql AS 'SELECT status FROM shop.orders WHERE id = order_id';");
	command("COMMENT ON FUNCTION shop.order_status IS 'How far an order is.';");
	PQclear(query("SELECT name, description, parameters->'properties' AS arguments\n"
				  "FROM chat.register_tool('shop.order_status');"));
}

int
main(int argc, char **argv)
{
	Turn		words = {0};
	Turn		tool = {0};

	if (argc != 6)
	{
		fprintf(stderr, "usage: demo BASE_URL MODEL KEY_FILE MESSAGE SCRIPT\n");
		return 2;
	}
	colours();
	conn = PQconnectdb("application_name=demo");
	if (PQstatus(conn) != CONNECTION_OK)
		die("cannot connect");
	install(argv[1], argv[2], argv[3]);
	converse(argv[4], &words);
	if (!words.failed)
	{
		install_tool(argv[5]);
		converse("Where is my order 1042?", &tool);
		PQclear(run("RESET ROLE"));
		if (*argv[5])
			PQclear(run("ALTER SERVER demo OPTIONS (DROP extra_body)"));
	}
	PQfinish(conn);
	return words.failed || tool.failed ? 3 : 0;
}
