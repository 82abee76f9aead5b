/*
 * listen.c
 *		Prints the notifications of some channels, for the tests.
 *
 *	listen CONNINFO CHANNEL...
 *
 * Prints LISTENING once it listens, then one line "channel<TAB>payload" for
 * each notification, each line flushed.  Backslash, newline and carriage
 * return of a payload are escaped as \\, \n and \r.  Ends at the end of its
 * input, so that it never outlives the test that started it.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <libpq-fe.h>

/* Ends the program with the connection's error. */
static void
die(PGconn *conn, const char *what)
{
	fprintf(stderr, "listen: %s: %s", what, PQerrorMessage(conn));
	exit(1);
}

/* Starts to listen to one channel, whatever its name. */
static void
subscribe(PGconn *conn, const char *channel)
{
	char	   *quoted = PQescapeIdentifier(conn, channel, strlen(channel));
	char		sql[256];
	PGresult   *res;

	if (quoted == NULL)
		die(conn, channel);
	snprintf(sql, sizeof(sql), "LISTEN %s", quoted);
	res = PQexec(conn, sql);
	if (PQresultStatus(res) != PGRES_COMMAND_OK)
		die(conn, sql);
	PQclear(res);
	PQfreemem(quoted);
}

/* Prints a payload on one line. */
static void
print_payload(const char *s)
{
	for (; *s; s++)
	{
		if (*s == '\\')
			fputs("\\\\", stdout);
		else if (*s == '\n')
			fputs("\\n", stdout);
		else if (*s == '\r')
			fputs("\\r", stdout);
		else
			putchar(*s);
	}
}

/* Prints all notifications that have arrived. */
static void
print_notifications(PGconn *conn)
{
	PGnotify   *note;

	if (!PQconsumeInput(conn))
		die(conn, "connection lost");
	while ((note = PQnotifies(conn)) != NULL)
	{
		printf("%s\t", note->relname);
		print_payload(note->extra);
		putchar('\n');
		PQfreemem(note);
	}
	fflush(stdout);
}

int
main(int argc, char **argv)
{
	PGconn	   *conn;

	if (argc < 3)
	{
		fprintf(stderr, "usage: listen CONNINFO CHANNEL...\n");
		return 2;
	}
	conn = PQconnectdb(argv[1]);
	if (PQstatus(conn) != CONNECTION_OK)
		die(conn, "cannot connect");
	for (int i = 2; i < argc; i++)
		subscribe(conn, argv[i]);
	puts("LISTENING");
	print_notifications(conn);
	for (;;)
	{
		struct pollfd fds[2] = {
			{.fd = PQsocket(conn), .events = POLLIN},
			{.fd = STDIN_FILENO, .events = POLLIN},
		};
		char		buf[64];

		if (poll(fds, 2, -1) < 0)
			return 1;
		if (fds[0].revents)
			print_notifications(conn);
		if (fds[1].revents && read(STDIN_FILENO, buf, sizeof(buf)) <= 0)
			break;
	}
	PQfinish(conn);
	return 0;
}
