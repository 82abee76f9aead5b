/*
 * bench.c - load generator and meter for bench.sh
 *
 *	bench bare URL LOAD SCALE
 *		runs a load with a bare libcurl client (multi socket, epoll) that
 *		stores nothing
 *	bench chat CONNINFO LOAD SCALE POSTMASTER
 *		runs it through the extension: callers in pipeline mode, one listener
 *		on the channel "chat_bench"; the sessions of role "bench" use server
 *		"fake"
 *	bench cancel CONNINFO URL SCALE
 *		cancels streams one after the other while others go on; URL is the
 *		endpoint's root, which tells when it has seen each client leave
 *	bench idle CONNINFO SECONDS POSTMASTER
 *	bench table FILE
 *		prints what the runs above wrote as one table, and the targets
 *
 * A run prints one line "LOAD SIDE key=value ...".  Tokens carry the time at
 * which the endpoint sent them (19 digits of CLOCK_MONOTONIC), then "tN".
 *
 * Two threads in a chat run: the listener reads notifications, owns "meter"
 * until it is joined, and tells the main thread through a pipe which tasks
 * have shown their first token or their end.  The main thread owns everything
 * else.  "measuring" and "delivered" are atomic.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <curl/curl.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <libpq-fe.h>

#define MAX_CALLERS		10		/* as a pool of node-postgres has */
#define MS				INT64_C(1000000)
#define SECOND			INT64_C(1000000000)
#define GIVE_UP			(60 * SECOND)	/* without any token */
#define CHANNEL			"chat_bench"

/* ------------------------------------------------------------------ loads */

/*
 * With waves, all streams start together, by one commit, and the next wave
 * when all have ended.  Otherwise a stream that ends starts its next turn at
 * once, and the figures are those of "seconds" after all have begun.  They
 * begin as fast as they can, so that ends and beginnings come in bursts ever
 * after; or, staggered, spread evenly over the time that a turn takes.
 */
typedef struct Load
{
	const char *name;
	int			streams;
	int			tokens;
	int			delay;			/* ms between tokens */
	double		seconds;
	int			waves;
	bool		stagger;
	const char *what;
} Load;

static const Load loads[] = {
	{"W1", 1000, 200, 20, 12, 0, false, "1000 streams, 20 ms apart"},
	{"W2", 100, 500, 0, 0, 20, false, "100 streams of 500, no delay"},
	{"W3", 1, 50, 20, 12, 0, false, "one stream, 20 ms apart"},
	{"W4", 5000, 200, 50, 8, 0, false, "5000 streams, 50 ms apart"},
	{"W5", 64, 1, 0, 8, 0, false, "64 sessions, turns of 1 token"},
	{"W6", 64, 10, 0, 8, 0, false, "64 sessions, turns of 10 tokens"},
	{"W1s", 1000, 200, 20, 12, 0, true, "as W1, begun one after the other"},
	{"W4s", 5000, 200, 50, 8, 0, true, "as W4, begun one after the other"},
};

#define NLOADS ((int) (sizeof(loads) / sizeof(loads[0])))

/* Ends the program with a message. */
static void __attribute__((format(printf, 1, 2), noreturn))
die(const char *format,...)
{
	va_list		ap;

	va_start(ap, format);
	fputs("bench: ", stderr);
	vfprintf(stderr, format, ap);
	fputc('\n', stderr);
	va_end(ap);
	exit(1);
}

/* Allocates zeroed memory or ends the program. */
static void *
zalloc(size_t n, size_t size)
{
	void	   *p = calloc(n, size);

	if (p == NULL)
		die("out of memory");
	return p;
}

/* Returns the monotonic clock in nanoseconds. */
static int64_t
now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * SECOND + ts.tv_nsec;
}

/* Finds a load by its name. */
static Load
load_find(const char *name, double scale)
{
	for (int i = 0; i < NLOADS; i++)
		if (strcasecmp(loads[i].name, name) == 0)
		{
			Load		load = loads[i];

			load.seconds *= scale;
			if (load.waves)
				load.waves = load.waves * scale < 3 ? 3 :
					(int) (load.waves * scale);
			return load;
		}
	die("no load is named \"%s\"", name);
}

/*
 * Writes the message that makes the endpoint play a load.  Where streams run
 * side by side, their ticks are spread over the time between two tokens.
 */
static void
load_message(const Load *load, int stream, char *text, size_t size)
{
	double		first = 0;

	if (load->streams > 1)
		first = (double) load->delay * stream / load->streams;
	snprintf(text, size, "bench [[tokens=%d delay=%d first=%.2f stamp=1]]",
			 load->tokens, load->delay, first);
}

/* ---------------------------------------------------------------- metering */

#define SUB_BITS	6
#define NBUCKETS	((64 - SUB_BITS) << SUB_BITS)

/* Counts of nanoseconds, exact to less than two percent. */
typedef struct Hist
{
	uint64_t	total;
	uint64_t	count[NBUCKETS];
} Hist;

typedef struct Meter
{
	int64_t		tokens;			/* while measuring */
	Hist		latency;
} Meter;

static volatile bool measuring;
static volatile int64_t delivered;	/* tokens, from the start */
static Meter meter;

/* Adds a time to a histogram; times below zero count as zero. */
static void
hist_add(Hist *h, int64_t ns)
{
	uint64_t	v = ns > 0 ? (uint64_t) ns : 0;
	int			shift = 0;

	if (v >> (SUB_BITS + 1))
		shift = 63 - SUB_BITS - __builtin_clzll(v);
	h->count[((unsigned) shift << SUB_BITS) + (v >> shift)]++;
	h->total++;
}

/* Returns a percentile in milliseconds. */
static double
hist_ms(const Hist *h, double percent)
{
	uint64_t	want = (uint64_t) (h->total * percent / 100);
	uint64_t	seen = 0;

	for (unsigned i = 0; i < NBUCKETS; i++)
	{
		unsigned	shift = i >> (SUB_BITS + 1) ? (i >> SUB_BITS) - 1 : 0;

		seen += h->count[i];
		if (seen > want)
			return (double) ((uint64_t) (i - (shift << SUB_BITS)) << shift) /
				MS;
	}
	return 0;
}

/* What a piece of text told about the stream that it belongs to. */
typedef struct Seen
{
	int			tokens;
	int64_t		first_stamp;	/* of token t0, else 0 */
} Seen;

/* Reads a stamp in front of a token; 0 when there is none. */
static int64_t
read_stamp(const char *p, const char *end)
{
	int64_t		stamp = 0;

	if (end - p < 21 || p[19] != ' ' || p[20] != 't')
		return 0;
	for (int i = 0; i < 19; i++)
	{
		if (p[i] < '0' || p[i] > '9')
			return 0;
		stamp = stamp * 10 + (p[i] - '0');
	}
	return stamp;
}

/* Counts the tokens of a text, whose ends may lie inside a token. */
static Seen
scan_tokens(const char *p, const char *end, int64_t received)
{
	Seen		seen = {0, 0};
	bool		measure = measuring;

	while (p < end)
	{
		int64_t		stamp = read_stamp(p, end);

		if (stamp)
		{
			p += 20;
			if (measure)
				hist_add(&meter.latency, received - stamp);
			if (end - p > 2 && p[1] == '0' && p[2] == ' ')
				seen.first_stamp = stamp;
		}
		if (*p++ == 't')
			seen.tokens++;
		if (stamp)
			while (p < end && *p++ != ' ')
				;
	}
	if (measure)
		meter.tokens += seen.tokens;
	delivered += seen.tokens;
	return seen;
}

/* Figures that a run prints. */
typedef struct Figures
{
	double		rate;			/* tokens/s delivered */
	double		turns;			/* turns/s */
	double		cpu;			/* microseconds per token */
	Hist		first;			/* start of the turn to its first token */
	Hist		wire;			/* commit to the endpoint's first token */
} Figures;

static Figures figures;

/* Prints a run's line up to what only one side has. */
static void
print_figures(const Load *load, const char *side)
{
	printf("%s %s rate=%.0f turns=%.1f p50=%.2f p99=%.2f cpu=%.3f",
		   load->name, side, figures.rate, figures.turns,
		   hist_ms(&meter.latency, 50), hist_ms(&meter.latency, 99),
		   figures.cpu);
	if (figures.first.total > 0)
		printf(" first=%.2f", hist_ms(&figures.first, 50));
}

/* Sorts numbers. */
static int
compare_doubles(const void *a, const void *b)
{
	double		x = *(const double *) a;
	double		y = *(const double *) b;

	return x < y ? -1 : x > y;
}

/* Returns the median of the waves' rates. */
static double
median(double *values, int n)
{
	qsort(values, n, sizeof(*values), compare_doubles);
	return values[n / 2];
}

/* ------------------------------------------------------------------ phases */

typedef enum Phase
{
	RAMPING, MEASURING, DRAINING
} Phase;

/*
 * The course of a run, the same for both sides: turns begin and end, the
 * measured time begins when all streams have shown a token.
 */
typedef struct Course
{
	Load		load;
	Phase		phase;
	int			begun;			/* streams whose first turn was begun */
	int			started;		/* streams that have shown a token */
	int			active;
	long		turns;			/* that ended while measuring */
	long		all_turns;		/* that ever began */
	int64_t		began;			/* the measured time, or the wave */
	int64_t		last_token;		/* receipt of the newest token */
	int			wave;
	double	   *wave_rates;
	void		(*start) (int stream);
	void		(*start_wave) (void);
	void		(*window) (bool open);	/* the measured time begins or ends */
} Course;

static Course course;

/* Begins the next wave, or ends the run behind the last. */
static void
next_wave(void)
{
	if (course.wave == course.load.waves)
	{
		course.phase = DRAINING;
		course.window(false);
		return;
	}
	course.wave++;
	course.active = course.load.streams;
	course.all_turns += course.load.streams;
	course.began = now_ns();
	course.start_wave();
}

/* Begins the first turns that are due. */
static void
begin_due(void)
{
	int64_t		turn = course.load.tokens * course.load.delay * MS;
	int64_t		now = now_ns();

	while (course.phase != DRAINING && course.begun < course.load.streams &&
		   (!course.load.stagger || now - course.began >=
			turn * course.begun / course.load.streams))
	{
		course.active++;
		course.all_turns++;
		course.start(course.begun++);
	}
}

/* Begins the run. */
static void
course_begin(void)
{
	course.wave_rates = zalloc(course.load.waves + 1, sizeof(double));
	course.began = now_ns();
	if (course.load.waves)
	{
		course.begun = course.load.streams;
		course.phase = MEASURING;
		course.window(true);
		next_wave();
	}
	begin_due();
}

/* Returns how long the run may sleep at most, in milliseconds. */
static int
course_sleep(void)
{
	return course.begun < course.load.streams ? 1 : 50;
}

/* Notes that a stream has shown its first token of all. */
static void
stream_started(void)
{
	if (++course.started < course.load.streams || course.phase != RAMPING ||
		course.load.waves)
		return;
	course.phase = MEASURING;
	course.began = now_ns();
	course.window(true);
}

/* Notes that a stream's turn has ended, and begins its next. */
static void
stream_ended(int stream)
{
	int64_t		tokens = (int64_t) course.load.streams * course.load.tokens;

	course.turns += course.phase == MEASURING;
	if (course.phase != DRAINING && course.load.waves == 0)
	{
		course.all_turns++;
		course.start(stream);
		return;
	}
	if (--course.active > 0 || course.load.waves == 0)
		return;
	course.wave_rates[course.wave - 1] = tokens * 1e9 /
		(course.last_token - course.began);
	next_wave();
}

/* Ends the measured time when it is over. */
static void
course_check(void)
{
	static int64_t seen = -1;
	static int64_t since;
	int64_t		now = now_ns();

	begin_due();
	if (course.phase == MEASURING && course.load.waves == 0 &&
		now - course.began > course.load.seconds * 1e9)
	{
		course.phase = DRAINING;
		course.window(false);
	}
	if (delivered != seen)
	{
		seen = delivered;
		since = now;
	}
	else if (now - since > GIVE_UP)
		die("%s: no token for 60 s, %d of %d streams are open",
			course.load.name, course.active, course.load.streams);
}

/*
 * Works out what the measured time gave.  The times to the first token hold
 * the pause by which load_message() spreads the streams.
 */
static void
course_figures(int64_t cpu_ns)
{
	double		seconds = (now_ns() - course.began) / 1e9;

	if (course.load.waves)
	{
		figures.rate = median(course.wave_rates, course.load.waves);
		figures.turns = figures.rate / course.load.tokens;
	}
	else
	{
		figures.rate = meter.tokens / seconds;
		figures.turns = course.turns / seconds;
	}
	figures.cpu = meter.tokens ? cpu_ns / 1e3 / meter.tokens : 0;
}

/* ------------------------------------------------------- the bare client */

typedef struct Bare
{
	CURL	   *easy;
	struct curl_slist *headers;
	char		body[512];
	char		tail[4096];		/* an event that is not all there */
	size_t		tail_len;
	int64_t		asked;
	bool		begun;
} Bare;

static CURLM *multi;
static Bare *bares;
static int	bare_epoll;
static int64_t bare_timeout = -1;
static int64_t bare_cpu;
static const char *bare_url;

/* Returns this process's CPU time. */
static int64_t
own_cpu(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
	return ts.tv_sec * SECOND + ts.tv_nsec;
}

/* Looks at the lines of one stretch of the body. */
static void
bare_lines(Bare *b, const char *p, const char *end, int64_t received)
{
	static const char mark[] = "\"content\":\"";
	const char *at;

	while ((at = memmem(p, end - p, mark, sizeof(mark) - 1)) != NULL)
	{
		const char *close;
		Seen		seen;

		at += sizeof(mark) - 1;
		close = memchr(at, '"', end - at);
		if (close == NULL)
			return;
		seen = scan_tokens(at, close, received);
		if (seen.tokens)
			course.last_token = received;
		if (seen.first_stamp)
		{
			if (measuring)
				hist_add(&figures.first, received - b->asked);
			if (!b->begun)
			{
				b->begun = true;
				stream_started();
			}
		}
		p = close;
	}
}

/* Takes body bytes from libcurl. */
static size_t
bare_write(char *data, size_t size, size_t n, void *arg)
{
	Bare	   *b = arg;
	int64_t		received = now_ns();
	char	   *end = data + size * n;
	char	   *p = data;
	char	   *nl;

	if (b->tail_len > 0)
	{
		size_t		take;

		nl = memchr(p, '\n', end - p);
		take = (nl ? nl + 1 : end) - p;
		if (b->tail_len + take > sizeof(b->tail))
			die("the endpoint sent a line that is too long");
		memcpy(b->tail + b->tail_len, p, take);
		b->tail_len += take;
		p += take;
		if (nl == NULL)
			return size * n;
		bare_lines(b, b->tail, b->tail + b->tail_len, received);
		b->tail_len = 0;
	}
	nl = memrchr(p, '\n', end - p);
	if (nl)
	{
		bare_lines(b, p, nl, received);
		p = nl + 1;
	}
	if ((size_t) (end - p) > sizeof(b->tail))
		die("the endpoint sent a line that is too long");
	memcpy(b->tail, p, end - p);
	b->tail_len = end - p;
	return size * n;
}

/* Lets epoll watch what libcurl wants watched. */
static int
bare_socket(CURL *easy, curl_socket_t fd, int what, void *arg, void *known)
{
	struct epoll_event ev = {.data.fd = fd};

	(void) easy;
	(void) arg;
	if (what == CURL_POLL_REMOVE)
	{
		epoll_ctl(bare_epoll, EPOLL_CTL_DEL, fd, NULL);
		curl_multi_assign(multi, fd, NULL);
		return 0;
	}
	ev.events = (what & CURL_POLL_IN ? EPOLLIN : 0) |
		(what & CURL_POLL_OUT ? EPOLLOUT : 0);
	if (epoll_ctl(bare_epoll, known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd,
				  &ev) < 0)
		die("epoll_ctl: %s", strerror(errno));
	curl_multi_assign(multi, fd, &bare_epoll);
	return 0;
}

/* Notes when libcurl wants to be called. */
static int
bare_timer(CURLM *m, long ms, void *arg)
{
	(void) m;
	(void) arg;
	bare_timeout = ms < 0 ? -1 : now_ns() + ms * MS;
	return 0;
}

/* Begins a turn. */
static void
bare_start(int i)
{
	Bare	   *b = &bares[i];
	char		message[256];

	if (b->easy == NULL)
	{
		b->easy = curl_easy_init();
		b->headers = curl_slist_append(NULL, "Content-Type: application/json");
		load_message(&course.load, i, message, sizeof(message));
		snprintf(b->body, sizeof(b->body), "{\"model\":\"fake-1\","
				 "\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}],"
				 "\"stream\":true,\"stream_options\":"
				 "{\"include_usage\":true}}", message);
		curl_easy_setopt(b->easy, CURLOPT_URL, bare_url);
		curl_easy_setopt(b->easy, CURLOPT_HTTPHEADER, b->headers);
		curl_easy_setopt(b->easy, CURLOPT_POSTFIELDS, b->body);
		curl_easy_setopt(b->easy, CURLOPT_WRITEFUNCTION, bare_write);
		curl_easy_setopt(b->easy, CURLOPT_WRITEDATA, b);
		curl_easy_setopt(b->easy, CURLOPT_PRIVATE, (char *) b);
		curl_easy_setopt(b->easy, CURLOPT_NOSIGNAL, 1L);
		curl_easy_setopt(b->easy, CURLOPT_NOPROXY, "*");
	}
	b->asked = now_ns();
	b->tail_len = 0;
	curl_multi_add_handle(multi, b->easy);
}

/* Begins a turn of all streams. */
static void
bare_start_wave(void)
{
	for (int i = 0; i < course.load.streams; i++)
		bare_start(i);
}

/* Begins or ends the measured time. */
static void
bare_window(bool open)
{
	bare_cpu = own_cpu() - bare_cpu;
	measuring = open;
	if (!open)
		course_figures(bare_cpu);
}

/* Deals with the transfers that have ended. */
static void
bare_ended(void)
{
	CURLMsg    *msg;
	int			left;

	while ((msg = curl_multi_info_read(multi, &left)) != NULL)
	{
		CURL	   *easy = msg->easy_handle;
		CURLcode	code = msg->data.result;
		char	   *private;

		curl_easy_getinfo(easy, CURLINFO_PRIVATE, &private);
		if (code != CURLE_OK)
			die("bare client: %s", curl_easy_strerror(code));
		curl_multi_remove_handle(multi, easy);
		stream_ended((int) ((Bare *) private - bares));
	}
}

/* Raises the number of descriptors that this process may open. */
static void
raise_nofile(void)
{
	struct rlimit lim;

	getrlimit(RLIMIT_NOFILE, &lim);
	lim.rlim_cur = lim.rlim_max;
	setrlimit(RLIMIT_NOFILE, &lim);
}

/* Runs a load with the bare client. */
static void
run_bare(const char *url, const char *name, double scale)
{
	struct epoll_event events[512];
	int			running;

	raise_nofile();
	course.load = load_find(name, scale);
	course.start = bare_start;
	course.start_wave = bare_start_wave;
	course.window = bare_window;
	bare_url = url;
	bare_epoll = epoll_create1(EPOLL_CLOEXEC);
	bares = zalloc(course.load.streams, sizeof(*bares));
	curl_global_init(CURL_GLOBAL_DEFAULT);
	multi = curl_multi_init();
	curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, bare_socket);
	curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, bare_timer);
	curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS, course.load.streams + 16L);
	course_begin();
	while (course.phase != DRAINING)
	{
		int64_t		wait = course_sleep() * MS;
		int			n;

		if (bare_timeout >= 0 && bare_timeout - now_ns() < wait)
			wait = bare_timeout - now_ns();
		n = epoll_wait(bare_epoll, events, 512, wait <= 0 ? 0 :
					   (int) ((wait + MS - 1) / MS));
		for (int i = 0; i < n; i++)
			curl_multi_socket_action(multi, events[i].data.fd,
									 (events[i].events & EPOLLIN ?
									  CURL_CSELECT_IN : 0) |
									 (events[i].events & EPOLLOUT ?
									  CURL_CSELECT_OUT : 0), &running);
		if (bare_timeout >= 0 && now_ns() >= bare_timeout)
		{
			bare_timeout = -1;
			curl_multi_socket_action(multi, CURL_SOCKET_TIMEOUT, 0, &running);
		}
		bare_ended();
		course_check();
	}
	print_figures(&course.load, "bare");
	printf("\n");
}

/* ---------------------------------------------------- looking at processes */

/* CPU nanoseconds of the cluster's processes. */
typedef struct ClusterCpu
{
	int64_t		all;
	int64_t		worker;
	int64_t		listener;
} ClusterCpu;

static int	postmaster;
static int	worker_pid;
static int	listener_pid;

/* Reads a small file; false when it is not there. */
static bool
read_file(const char *path, char *text, size_t size)
{
	int			fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t		n;

	if (fd < 0)
		return false;
	n = read(fd, text, size - 1);
	close(fd);
	if (n <= 0)
		return false;
	text[n] = '\0';
	return true;
}

/* Reads parent and CPU ticks, own and those of dead children. */
static bool
read_stat(int pid, int *parent, int64_t *own, int64_t *dead)
{
	char		path[64];
	char		text[1024];
	long long	t[4];
	char	   *p;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	if (!read_file(path, text, sizeof(text)) ||
		(p = strrchr(text, ')')) == NULL ||
		sscanf(p + 1, " %*c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u "
			   "%lld %lld %lld %lld", parent, &t[0], &t[1], &t[2], &t[3]) != 5)
		return false;
	*own = (t[0] + t[1]) * (SECOND / sysconf(_SC_CLK_TCK));
	*dead = (t[2] + t[3]) * (SECOND / sysconf(_SC_CLK_TCK));
	return true;
}

/* Returns a process's CPU time, exact where the kernel keeps it so. */
static int64_t
process_cpu(int pid, int64_t ticks)
{
	char		path[64];
	char		text[128];
	int64_t		sum = 0;
	struct dirent *entry;
	DIR		   *dir;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	while (dir && (entry = readdir(dir)) != NULL)
	{
		snprintf(path, sizeof(path), "/proc/%d/task/%.10s/schedstat", pid,
				 entry->d_name);
		if (entry->d_name[0] != '.' && read_file(path, text, sizeof(text)))
			sum += strtoll(text, NULL, 10);
	}
	if (dir)
		closedir(dir);
	return sum > 0 ? sum : ticks;
}

/* Adds up the CPU time of the postmaster and all its children. */
static ClusterCpu
cluster_cpu(void)
{
	ClusterCpu	cpu = {0, 0, 0};
	struct dirent *entry;
	DIR		   *dir = opendir("/proc");

	while (dir && (entry = readdir(dir)) != NULL)
	{
		int			pid = atoi(entry->d_name);
		int			parent;
		int64_t		ticks;
		int64_t		dead;
		int64_t		own;

		if (pid <= 0 || !read_stat(pid, &parent, &ticks, &dead))
			continue;
		if (pid != postmaster && parent != postmaster)
			continue;
		own = process_cpu(pid, ticks);
		cpu.all += own + (pid == postmaster ? dead : 0);
		if (pid == worker_pid)
			cpu.worker = own;
		if (pid == listener_pid)
			cpu.listener = own;
	}
	if (dir)
		closedir(dir);
	return cpu;
}

/* Returns the bytes of memory that the worker shares with nobody. */
static int64_t
worker_memory(void)
{
	char		path[64];
	char		text[256];
	long long	resident;
	long long	shared;

	snprintf(path, sizeof(path), "/proc/%d/statm", worker_pid);
	if (!read_file(path, text, sizeof(text)) ||
		sscanf(text, "%*d %lld %lld", &resident, &shared) != 2)
		return 0;
	return (resident - shared) * sysconf(_SC_PAGESIZE);
}

/* ------------------------------------------------------------ the listener */

typedef enum NoteKind
{
	NOTE_FIRST, NOTE_END
} NoteKind;

/* What the listener tells the main thread; written in one piece. */
typedef struct Note
{
	NoteKind	kind;
	bool		failed;
	char		task[37];
	int64_t		stamp;
	int64_t		received;
} Note;

static PGconn *listen_conn;
static int	note_pipe[2];
static int	stop_pipe[2];
static volatile int64_t last_receipt;

/* Ends the program with a connection's error. */
static void __attribute__((noreturn))
die_pg(PGconn *conn, const char *what)
{
	die("%s: %s", what, PQerrorMessage(conn));
}

/* Opens a connection. */
static PGconn *
pg_open(const char *conninfo, const char *role)
{
	const char *keys[] = {"dbname", "user", NULL};
	const char *values[] = {conninfo, role, NULL};
	PGconn	   *conn = PQconnectdbParams(keys, values, 1);

	if (PQstatus(conn) != CONNECTION_OK)
		die_pg(conn, "connecting");
	return conn;
}

/* Runs a query and returns its first value as a number. */
static double
pg_number(PGconn *conn, const char *sql)
{
	PGresult   *res = PQexec(conn, sql);
	double		value = 0;

	if (PQresultStatus(res) == PGRES_TUPLES_OK && PQntuples(res) > 0)
		value = strtod(PQgetvalue(res, 0, 0), NULL);
	else if (PQresultStatus(res) != PGRES_COMMAND_OK)
		die_pg(conn, sql);
	PQclear(res);
	return value;
}

/* Finds a member's string value; NULL when it is not there. */
static const char *
member(const char *json, const char *end, const char *name, size_t len)
{
	const char *p = memmem(json, end - json, name, len);

	if (p == NULL)
		return NULL;
	for (p += len; p < end && (*p == ' ' || *p == ':'); p++)
		;
	return p < end && *p == '"' ? p + 1 : NULL;
}

#define MEMBER(json, end, name) \
	member(json, end, "\"" name "\"", sizeof(name) + 1)

/* Sends a note to the main thread. */
static void
tell(NoteKind kind, const char *p, const char *end, int64_t stamp,
	 int64_t received)
{
	Note		note = {.kind = kind, .stamp = stamp, .received = received};
	const char *task = MEMBER(p, end, "taskId");

	if (task == NULL || end - task < 36)
		return;
	memcpy(note.task, task, 36);
	note.failed = kind == NOTE_END &&
		memmem(p, end - p, "\"error\"", 7) != NULL;
	if (write(note_pipe[1], &note, sizeof(note)) != sizeof(note))
		die("pipe: %s", strerror(errno));
}

/* Reads one notification's payload. */
static void
take_payload(const char *p, int64_t received)
{
	const char *end = p + strlen(p);
	const char *type = MEMBER(p, end, "type");
	const char *text;
	Seen		seen;

	if (type == NULL)
		return;
	if (strncmp(type, "finish\"", 7) == 0)
		tell(NOTE_END, p, end, 0, received);
	if (strncmp(type, "text-delta\"", 11) != 0)
		return;
	text = MEMBER(p, end, "delta");
	if (text == NULL)
		return;
	seen = scan_tokens(text, text + strcspn(text, "\""), received);
	last_receipt = received;
	if (seen.first_stamp)
		tell(NOTE_FIRST, p, end, seen.first_stamp, received);
}

/* Listens until the main thread says stop. */
static void *
listener_main(void *arg)
{
	struct pollfd fds[2] = {{.events = POLLIN}, {.events = POLLIN}};

	(void) arg;
	fds[0].fd = PQsocket(listen_conn);
	fds[1].fd = stop_pipe[0];
	for (;;)
	{
		PGnotify   *n;
		int64_t		received;

		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			die("poll: %s", strerror(errno));
		if (fds[1].revents)
			return NULL;
		if (!PQconsumeInput(listen_conn))
			die_pg(listen_conn, "listening");
		received = now_ns();
		while ((n = PQnotifies(listen_conn)) != NULL)
		{
			take_payload(n->extra, received);
			PQfreemem(n);
		}
	}
}

/* ------------------------------------------------------------- the callers */

/* A turn by its task's id; the caller and the listener may be first. */
typedef struct Turn
{
	char		task[37];
	int			session;		/* -1: the caller does not know it yet */
	bool		ended;
	int64_t		committed;
	int64_t		stamp;			/* of the first token */
	int64_t		received;
	struct Turn *next;
} Turn;

typedef struct Caller
{
	PGconn	   *conn;
	int		   *queue;			/* sessions whose results are to come */
	int			head;
	int			count;
	Turn	  **fresh;			/* turns whose commit is to come */
	int			nfresh;
	bool		writing;		/* epoll watches for room to write */
} Caller;

#define TURN_SLOTS	16384

static Turn *turns[TURN_SLOTS];
static char (*sessions)[37];
static bool *session_begun;
static Caller callers[MAX_CALLERS];
static int	ncallers;
static int	next_caller;
static int	chat_epoll;
static PGconn *control;
static int64_t base_memory;
static int64_t peak_memory;
static ClusterCpu cpu_at_open;
static ClusterCpu cpu_spent;
static double wal_at_open;
static double wal_spent;
static long failures;

/* Finds a task's turn, and makes it if there is none. */
static Turn **
turn_find(const char *task)
{
	unsigned	hash = 2166136261u;
	Turn	  **slot;

	for (const char *p = task; *p; p++)
		hash = (hash ^ (unsigned char) *p) * 16777619u;
	for (slot = &turns[hash % TURN_SLOTS]; *slot; slot = &(*slot)->next)
		if (strcmp((*slot)->task, task) == 0)
			return slot;
	*slot = zalloc(1, sizeof(Turn));
	snprintf((*slot)->task, sizeof((*slot)->task), "%s", task);
	(*slot)->session = -1;
	return slot;
}

/* Files a turn away once caller and listener have told all of it. */
static void
turn_check(const char *task)
{
	Turn	  **slot = turn_find(task);
	Turn	   *t = *slot;
	int			session = t->session;

	if (session < 0 || t->committed == 0 || !t->ended)
		return;
	if (t->stamp && measuring)
	{
		hist_add(&figures.first, t->received - t->committed);
		hist_add(&figures.wire, t->stamp - t->committed);
	}
	*slot = t->next;
	free(t);
	stream_ended(session);
}

/* Takes a note from the listener. */
static void
take_note(const Note *note)
{
	Turn	   *t = *turn_find(note->task);

	if (note->kind == NOTE_FIRST)
	{
		t->stamp = note->stamp;
		t->received = note->received;
		if (t->session >= 0 && !session_begun[t->session])
		{
			session_begun[t->session] = true;
			stream_started();
		}
		return;
	}
	if (note->failed && failures++ == 0)
		fprintf(stderr, "bench: %s: task %s failed\n", course.load.name,
				note->task);
	t->ended = true;
	course.last_token = last_receipt;
	turn_check(note->task);
}

/* Tells epoll what to watch of a caller's socket. */
static void
caller_watch(Caller *c)
{
	struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
	int			unsent = PQflush(c->conn);

	if (unsent < 0)
		die_pg(c->conn, "calling");
	if (c->writing == (unsent > 0))
		return;
	c->writing = unsent > 0;
	ev.events |= c->writing ? EPOLLOUT : 0;
	epoll_ctl(chat_epoll, EPOLL_CTL_MOD, PQsocket(c->conn), &ev);
}

/* Puts a call into a caller's pipeline, without the end of a transaction. */
static void
send_call(Caller *c, int session)
{
	char		message[256];
	const char *values[2] = {sessions[session], message};

	load_message(&course.load, session, message, sizeof(message));
	if (!PQsendQueryPrepared(c->conn, "call", 2, values, NULL, NULL, 0))
		die_pg(c->conn, "calling");
	c->queue[(c->head + c->count++) % course.load.streams] = session;
}

/* Begins a turn by a transaction of its own. */
static void
chat_start(int session)
{
	Caller	   *c = &callers[next_caller++ % ncallers];

	send_call(c, session);
	if (!PQpipelineSync(c->conn))
		die_pg(c->conn, "calling");
	caller_watch(c);
}

/* Begins a turn of every session by one transaction. */
static void
chat_start_wave(void)
{
	for (int i = 0; i < course.load.streams; i++)
		send_call(&callers[0], i);
	if (!PQpipelineSync(callers[0].conn))
		die_pg(callers[0].conn, "calling");
	caller_watch(&callers[0]);
}

/* Notes that the transactions of a caller's turns are committed. */
static void
turns_committed(Caller *c)
{
	int64_t		now = now_ns();
	int			n = c->nfresh;

	c->nfresh = 0;
	for (int i = 0; i < n; i++)
	{
		Turn	   *t = c->fresh[i];
		char		task[37];

		t->committed = now;
		if (t->stamp && !session_begun[t->session])
		{
			session_begun[t->session] = true;
			stream_started();
		}
		memcpy(task, t->task, sizeof(task));
		turn_check(task);
	}
}

/* Takes the results that a caller's server has sent. */
static void
caller_read(Caller *c)
{
	if (!PQconsumeInput(c->conn))
		die_pg(c->conn, "calling");
	while (!PQisBusy(c->conn))
	{
		PGresult   *res = PQgetResult(c->conn);
		ExecStatusType status = PQresultStatus(res);

		if (res == NULL)
		{
			if (c->count == 0 && c->nfresh == 0)
				break;
			continue;
		}
		if (status == PGRES_TUPLES_OK)
		{
			Turn	   *t = *turn_find(PQgetvalue(res, 0, 0));

			t->session = c->queue[c->head];
			c->head = (c->head + 1) % course.load.streams;
			c->count--;
			c->fresh[c->nfresh++] = t;
		}
		else if (status != PGRES_PIPELINE_SYNC)
			die_pg(c->conn, "chat.stream_chat_completion");
		PQclear(res);
		if (status == PGRES_PIPELINE_SYNC)
			turns_committed(c);
	}
	caller_watch(c);
}

/* Opens the callers. */
static void
open_callers(const char *conninfo)
{
	static const char *const sql =
		"SELECT chat.stream_chat_completion($1, $2)";
	static const Oid types[2] = {2950, 25};

	ncallers = course.load.streams < MAX_CALLERS ? course.load.streams :
		MAX_CALLERS;
	for (int i = 0; i < ncallers; i++)
	{
		Caller	   *c = &callers[i];
		struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
		PGresult   *res;

		c->conn = pg_open(conninfo, "bench");
		c->queue = zalloc(course.load.streams, sizeof(*c->queue));
		c->fresh = zalloc(course.load.streams, sizeof(*c->fresh));
		res = PQprepare(c->conn, "call", sql, 2, types);
		if (PQresultStatus(res) != PGRES_COMMAND_OK)
			die_pg(c->conn, sql);
		PQclear(res);
		PQsetnonblocking(c->conn, 1);
		PQenterPipelineMode(c->conn);
		epoll_ctl(chat_epoll, EPOLL_CTL_ADD, PQsocket(c->conn), &ev);
	}
}

/* Creates the sessions of a load. */
static void
create_sessions(const char *conninfo)
{
	PGconn	   *conn = pg_open(conninfo, "bench");
	char		sql[512];
	PGresult   *res;

	snprintf(sql, sizeof(sql), "SELECT (s).id FROM (SELECT "
			 "chat.create_chat_session(title => 'bench', server => 'fake', "
			 "channel => '" CHANNEL "', settings => '%s') AS s "
			 "FROM generate_series(1, %d) OFFSET 0) AS made",
			 /* a flood is of streams, not of ever longer histories */
			 course.load.waves > 0 ? "{\"max_context_messages\": 1}" : "{}",
			 course.load.streams);
	res = PQexec(conn, sql);
	if (PQresultStatus(res) != PGRES_TUPLES_OK)
		die_pg(conn, sql);
	sessions = zalloc(course.load.streams, sizeof(*sessions));
	session_begun = zalloc(course.load.streams, sizeof(*session_begun));
	for (int i = 0; i < course.load.streams; i++)
		snprintf(sessions[i], sizeof(sessions[i]), "%s",
				 PQgetvalue(res, i, 0));
	PQclear(res);
	/* a turn, so that caches are filled before memory is looked at */
	pg_number(conn, "CALL chat.ask('warm up', NULL, NULL)");
	PQfinish(conn);
}

/* Begins or ends the measured time. */
static void
chat_window(bool open)
{
	ClusterCpu	cpu;
	double		wal;

	if (!open)
	{
		measuring = false;
		peak_memory = worker_memory();
	}
	wal = pg_number(control, "SELECT pg_current_wal_insert_lsn() - '0/0'");
	cpu = cluster_cpu();
	if (open)
	{
		cpu_at_open = cpu;
		wal_at_open = wal;
		course.began = now_ns();
		measuring = true;
		return;
	}
	cpu_spent.all = cpu.all - cpu_at_open.all;
	cpu_spent.worker = cpu.worker - cpu_at_open.worker;
	cpu_spent.listener = cpu.listener - cpu_at_open.listener;
	wal_spent = wal - wal_at_open;
	course_figures(cpu_spent.all - cpu_spent.listener);
}

/* Reads all notes that have come. */
static void
read_notes(void)
{
	Note		notes[64];
	ssize_t		n = read(note_pipe[0], notes, sizeof(notes));

	for (ssize_t i = 0; i * (ssize_t) sizeof(Note) < n; i++)
		take_note(&notes[i]);
}

/*
 * Drives the load until its measured time is over and all turns have ended,
 * so that none is left for the next run.
 */
static void
drive(void)
{
	struct epoll_event events[64];

	course_begin();
	while (course.phase != DRAINING || course.active > 0)
	{
		int			n = epoll_wait(chat_epoll, events, 64, course_sleep());

		for (int i = 0; i < n; i++)
			if (events[i].data.ptr == note_pipe)
				read_notes();
			else
				caller_read(events[i].data.ptr);
		course_check();
	}
}

/* Starts the listener. */
static void
start_listener(const char *conninfo, pthread_t *thread)
{
	struct epoll_event ev = {.events = EPOLLIN, .data.ptr = note_pipe};

	if (pipe2(note_pipe, O_CLOEXEC) < 0 || pipe2(stop_pipe, O_CLOEXEC) < 0)
		die("pipe: %s", strerror(errno));
	fcntl(note_pipe[0], F_SETPIPE_SZ, 1024 * 1024);
	epoll_ctl(chat_epoll, EPOLL_CTL_ADD, note_pipe[0], &ev);
	listen_conn = pg_open(conninfo, "bench");
	listener_pid = PQbackendPID(listen_conn);
	pg_number(listen_conn, "LISTEN " CHANNEL);
	if (pthread_create(thread, NULL, listener_main, NULL) != 0)
		die("pthread_create");
}

/* Runs a load through the extension. */
static void
run_chat(const char *conninfo, const char *name, double scale)
{
	pthread_t	thread;
	double		tokens;

	course.load = load_find(name, scale);
	course.start = chat_start;
	course.start_wave = chat_start_wave;
	course.window = chat_window;
	chat_epoll = epoll_create1(EPOLL_CLOEXEC);
	control = pg_open(conninfo, NULL);
	create_sessions(conninfo);
	worker_pid = (int) pg_number(control,
								 "SELECT pid FROM chat.worker_status() "
								 "WHERE pid IS NOT NULL");
	base_memory = worker_memory();
	start_listener(conninfo, &thread);
	open_callers(conninfo);
	drive();
	if (write(stop_pipe[1], "x", 1) != 1)
		die("pipe: %s", strerror(errno));
	pthread_join(thread, NULL);
	tokens = meter.tokens ? (double) meter.tokens : 1;
	print_figures(&course.load, "chat");
	printf(" worker=%.3f listener=%.3f wal=%.0f failed=%ld lost=%ld",
		   cpu_spent.worker / 1e3 / tokens, cpu_spent.listener / 1e3 / tokens,
		   wal_spent / tokens, failures,
		   course.all_turns * course.load.tokens - (long) delivered);
	/* elsewhere few are open at the end, or the first token is put off */
	if (course.load.streams >= 1000)
		printf(" memory=%.1f", (peak_memory - base_memory) / 1024.0 /
			   course.load.streams);
	if (course.load.delay == 0 || course.load.streams == 1)
		printf(" wire=%.2f", hist_ms(&figures.wire, 50));
	printf("\n");
}

/* ----------------------------------------------------------------- cancels */

#define CANCEL_STREAMS	200
#define CANCEL_TURNS	300		/* that are cancelled and measured */
#define CANCEL_PAUSE	(20 * MS)	/* between two of them */

/* A turn that was begun, and when its cancel was sent. */
typedef struct Cancel
{
	char		task[37];
	int64_t		sent;
	int64_t		closed;
} Cancel;

/* What an HTTP request has answered. */
typedef struct Answer
{
	char	   *data;
	size_t		len;
} Answer;

/* Takes a piece of an answer. */
static size_t
take_answer(char *data, size_t size, size_t n, void *arg)
{
	Answer	   *a = arg;

	a->data = realloc(a->data, a->len + n + 1);
	if (a->data == NULL)
		die("out of memory");
	memcpy(a->data + a->len, data, n);
	a->len += n;
	a->data[a->len] = '\0';
	return size * n;
}

/* Asks the endpoint something; the text is to be freed. */
static char *
ask_endpoint(const char *root, const char *path)
{
	CURL	   *easy = curl_easy_init();
	char		url[256];
	Answer		answer = {NULL, 0};

	snprintf(url, sizeof(url), "%s%s", root, path);
	curl_easy_setopt(easy, CURLOPT_URL, url);
	curl_easy_setopt(easy, CURLOPT_NOPROXY, "*");
	curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, take_answer);
	curl_easy_setopt(easy, CURLOPT_WRITEDATA, &answer);
	if (curl_easy_perform(easy) != CURLE_OK || answer.data == NULL)
		die("the endpoint does not answer %s", path);
	curl_easy_cleanup(easy);
	return answer.data;
}

/* Begins the turn of that number in a session. */
static void
begin_cancelled(int session, int turn, Cancel *cancel)
{
	char		message[64];
	const char *values[2] = {sessions[session], message};
	PGresult   *res;

	snprintf(message, sizeof(message), "turn %d. [[tokens=100000 delay=20]]",
			 turn);
	res = PQexecParams(control, "SELECT chat.stream_chat_completion("
					   "$1::uuid, $2)", 2, NULL, values, NULL, NULL, 0);
	if (PQresultStatus(res) != PGRES_TUPLES_OK)
		die_pg(control, "chat.stream_chat_completion");
	snprintf(cancel->task, sizeof(cancel->task), "%s", PQgetvalue(res, 0, 0));
	PQclear(res);
}

/* Cancels a turn: the statement is its own transaction. */
static void
cancel_turn(Cancel *cancel)
{
	const char *values[1] = {cancel->task};
	PGresult   *res;

	cancel->sent = now_ns();
	res = PQexecParams(control, "SELECT chat.cancel_task($1)", 1, NULL,
					   values, NULL, NULL, 0);
	if (PQresultStatus(res) != PGRES_TUPLES_OK ||
		strcmp(PQgetvalue(res, 0, 0), "t") != 0)
		die_pg(control, "chat.cancel_task");
	PQclear(res);
}

/* Waits until so many streams are open at the endpoint. */
static void
await_active(const char *root, long n)
{
	int64_t		begin = now_ns();
	struct timespec pause = {0, 10 * MS};

	for (;;)
	{
		char	   *stats = ask_endpoint(root, "/stats");
		const char *at = strstr(stats, "\"active\":");
		bool		there = at && strtol(at + 9, NULL, 10) == n;

		free(stats);
		if (there)
			return;
		if (now_ns() - begin > GIVE_UP)
			die("cancel: %ld streams are not to be had", n);
		nanosleep(&pause, NULL);
	}
}

/* Learns from the endpoint when it has seen the clients of turns leave. */
static void
read_closed(const char *root, Cancel *cancels, int n)
{
	char	   *text = ask_endpoint(root, "/requests");
	char	   *save = NULL;

	for (char *line = strtok_r(text, "\n", &save); line;
		 line = strtok_r(NULL, "\n", &save))
	{
		const char *ended = strstr(line, "\"ended_ns\":");
		const char *turn = strstr(line, "\"turn ");
		int			i = turn ? atoi(turn + 6) : -1;

		if (ended && i >= 0 && i < n && strstr(line, "\"aborted\":true"))
			cancels[i].closed = strtoll(ended + 11, NULL, 10);
	}
	free(text);
}

/*
 * Cancels streams, and begins another for each, while the others go on.  The
 * time is from before the statement that cancels and commits is sent to the
 * end of the connection as the endpoint sees it: more than from the commit.
 */
static void
run_cancel(const char *conninfo, const char *root, double scale)
{
	int			n = CANCEL_TURNS * scale < 50 ? 50 : (int) (CANCEL_TURNS * scale);
	Cancel	   *cancels = zalloc(n + CANCEL_STREAMS, sizeof(*cancels));
	Hist	   *times = zalloc(1, sizeof(*times));
	struct timespec pause = {0, CANCEL_PAUSE};
	pthread_t	thread;
	long		lost = 0;

	course.load = (Load) {.name = "cancel", .streams = CANCEL_STREAMS, .waves = 1};
	curl_global_init(CURL_GLOBAL_DEFAULT);
	chat_epoll = epoll_create1(EPOLL_CLOEXEC);
	control = pg_open(conninfo, "bench");
	create_sessions(conninfo);
	start_listener(conninfo, &thread);
	for (int i = 0; i < CANCEL_STREAMS; i++)
		begin_cancelled(i, i, &cancels[i]);
	await_active(root, CANCEL_STREAMS);
	for (int i = 0; i < n; i++)
	{
		cancel_turn(&cancels[i]);
		begin_cancelled(i % CANCEL_STREAMS, i + CANCEL_STREAMS,
						&cancels[i + CANCEL_STREAMS]);
		nanosleep(&pause, NULL);
	}
	await_active(root, CANCEL_STREAMS);
	read_closed(root, cancels, n);
	for (int i = 0; i < n; i++)
	{
		if (cancels[i].closed)
			hist_add(times, cancels[i].closed - cancels[i].sent);
		else
			lost++;
	}
	for (int i = n; i < n + CANCEL_STREAMS; i++)
		cancel_turn(&cancels[i]);
	await_active(root, 0);
	if (write(stop_pipe[1], "x", 1) != 1)
		die("pipe: %s", strerror(errno));
	pthread_join(thread, NULL);
	printf("cancel chat streams=%d cancels=%d p50=%.2f p99=%.2f max=%.2f "
		   "lost=%ld\n", CANCEL_STREAMS, n, hist_ms(times, 50),
		   hist_ms(times, 99), hist_ms(times, 99.99), lost);
}

/* ------------------------------------------------------------------- idle */

/* Returns how often the worker has gone to sleep. */
static long
worker_sleeps(void)
{
	char		path[64];
	char		text[4096];
	const char *at;

	snprintf(path, sizeof(path), "/proc/%d/status", worker_pid);
	if (!read_file(path, text, sizeof(text)) ||
		(at = strstr(text, "\nvoluntary_ctxt_switches:")) == NULL)
		return 0;
	return strtol(strchr(at, ':') + 1, NULL, 10);
}

/* Looks how much happens when nothing is to be done. */
static void
run_idle(const char *conninfo, double seconds)
{
	const char *sql = "SELECT xact_commit + xact_rollback "
	"FROM pg_stat_database WHERE datname = current_database()";
	struct timespec pause = {(time_t) seconds, 0};
	ClusterCpu	before;
	ClusterCpu	after;
	double		commits;
	long		wakeups;
	PGconn	   *conn = pg_open(conninfo, NULL);

	/* statistics of this backend itself reach the view a second late */
	pg_number(conn, "SELECT pg_sleep(2)");
	worker_pid = (int) pg_number(conn, "SELECT pid FROM chat.worker_status() "
								 "WHERE pid IS NOT NULL");
	pg_number(conn, "SELECT pg_sleep(2)");
	commits = pg_number(conn, sql);
	PQfinish(conn);
	before = cluster_cpu();
	wakeups = worker_sleeps();
	while (nanosleep(&pause, &pause) < 0 && errno == EINTR)
		;
	wakeups = worker_sleeps() - wakeups;
	after = cluster_cpu();
	conn = pg_open(conninfo, NULL);
	commits = pg_number(conn, sql) - commits;
	printf("idle chat seconds=%.0f wakeups=%ld workercpu=%.3f allcpu=%.3f "
		   "commits=%.0f\n", seconds, wakeups,
		   (after.worker - before.worker) / 1e6,
		   (after.all - before.all) / 1e6, commits);
	PQfinish(conn);
}

/* --------------------------------------------------------------- the table */

static char lines[64][512];
static int	nlines;
static bool missed;

/* Finds a figure; -1 when the run did not take place. */
static double
figure(const char *load, const char *side, const char *key)
{
	char		start[32];
	char		want[32];

	snprintf(start, sizeof(start), "%s %s ", load, side);
	snprintf(want, sizeof(want), " %s=", key);
	for (int i = nlines - 1; i >= 0; i--)
		if (strncmp(lines[i], start, strlen(start)) == 0)
		{
			const char *at = strstr(lines[i], want);

			return at ? strtod(at + strlen(want), NULL) : -1;
		}
	return -1;
}

/* Prints one figure, or a dash. */
static void
cell(const char *load, const char *side, const char *key, int width, int prec)
{
	double		value = figure(load, side, key);

	if (value == -1)
		printf(" %*s", width, "-");
	else
		printf(" %*.*f", width, prec, value);
}

/* Prints a load's two rows. */
static void
print_rows(const Load *load)
{
	static const char *const sides[] = {"bare", "chat"};

	for (int i = 0; i < 2; i++)
	{
		if (figure(load->name, sides[i], "rate") < 0)
			continue;
		printf("%-3s %-4s", load->name, sides[i]);
		cell(load->name, sides[i], "rate", 9, 0);
		cell(load->name, sides[i], "turns", 8, 1);
		cell(load->name, sides[i], "p50", 7, 2);
		cell(load->name, sides[i], "p99", 7, 2);
		cell(load->name, sides[i], "cpu", 8, 2);
		cell(load->name, sides[i], "worker", 8, 2);
		cell(load->name, sides[i], "listener", 8, 2);
		cell(load->name, sides[i], "first", 7, 2);
		cell(load->name, sides[i], "wire", 7, 2);
		cell(load->name, sides[i], "memory", 7, 1);
		cell(load->name, sides[i], "wal", 6, 0);
		printf("  %s\n", i == 0 ? load->what : "");
	}
}

/* Prints a target and whether it was reached. */
static void
target(const char *what, double got, double limit, bool at_least, bool there)
{
	bool		ok = at_least ? got >= limit : got <= limit;

	if (!there)
		return;
	missed = missed || !ok;
	printf("%-6s %-58s %s %9.2f  got %9.2f\n", ok ? "ok" : "MISSED", what,
		   at_least ? ">=" : "<=", limit, got);
}

/* Prints the targets of a load of a thousand streams. */
static void
print_thousand(const char *load)
{
	bool		there = figure(load, "chat", "rate") >= 0;
	char		what[80];

	snprintf(what, sizeof(what), "%s tokens/s, 98 %% of the bare client's",
			 load);
	target(what, figure(load, "chat", "rate"),
		   0.98 * figure(load, "bare", "rate"), true, there);
	snprintf(what, sizeof(what), "%s p99 latency, ms", load);
	target(what, figure(load, "chat", "p99"), 50, false, there);
	snprintf(what, sizeof(what), "%s CPU per token, times the bare client's",
			 load);
	target(what, figure(load, "chat", "cpu") / figure(load, "bare", "cpu"),
		   2.5, false, there);
	snprintf(what, sizeof(what), "%s worker memory per open stream, KB", load);
	target(what, figure(load, "chat", "memory"), 64, false, there);
}

/* Prints the targets beside what was reached. */
static void
print_targets(void)
{
	bool		w2 = figure("W2", "chat", "rate") >= 0;
	bool		w3 = figure("W3", "chat", "rate") >= 0;
	bool		w4 = figure("W4", "chat", "rate") >= 0;
	bool		w5 = figure("W5", "chat", "rate") >= 0;
	bool		cancel = figure("cancel", "chat", "cancels") >= 0;
	bool		idle = figure("idle", "chat", "seconds") >= 0;

	printf("\n");
	print_thousand("W1");
	print_thousand("W1s");
	target("W2 tokens/s", figure("W2", "chat", "rate"), 500000, true, w2);
	target("W3 p50 latency, ms", figure("W3", "chat", "p50"), 1, false, w3);
	target("W3 first token, ms after the bare client's",
		   figure("W3", "chat", "first") - figure("W3", "bare", "first"), 2,
		   false, w3);
	target("W3 commit to request on the wire, p50, ms",
		   figure("W3", "chat", "wire"), 2, false, w3);
	target("W4 tokens/s", figure("W4", "chat", "rate"), 90000, true, w4);
	target("W4 p99 latency, ms", figure("W4", "chat", "p99"), 250, false, w4);
	target("W4 worker memory per open stream, KB",
		   figure("W4", "chat", "memory"), 64, false, w4);
	target("W5 turns/s", figure("W5", "chat", "turns"), 2000, true, w5);
	target("cancel_task to the connection's end, p99, ms",
		   figure("cancel", "chat", "p99"), 100, false, cancel);
	target("cancels whose connection did not end",
		   figure("cancel", "chat", "lost"), 0, false, cancel);
	target("idle: the worker's CPU, ms", figure("idle", "chat", "workercpu"),
		   0, false, idle);
	target("idle: how often the worker woke up",
		   figure("idle", "chat", "wakeups"), 0, false, idle);
}

/* Prints the table of a file of runs; exits with 3 when the run is void. */
static int
print_table(const char *path)
{
	FILE	   *file = fopen(path, "r");
	double		bare = -1;

	if (file == NULL)
		die("%s: %s", path, strerror(errno));
	while (nlines < 64 && fgets(lines[nlines], sizeof(lines[0]), file))
		nlines++;
	fclose(file);
	printf("\n%-8s %9s %8s %7s %7s %8s %8s %8s %7s %7s %7s %6s\n%-8s %9s %8s "
		   "%7s %7s %8s %8s %8s %7s %7s %7s %6s\n", "load", "tokens/s",
		   "turns/s", "p50", "p99", "CPU", "worker", "listener", "first",
		   "wire", "memory", "WAL", "", "", "", "ms", "ms", "us/token",
		   "us/token", "us/token", "ms", "ms", "KB", "B/tok");
	for (int i = 0; i < NLOADS; i++)
		print_rows(&loads[i]);
	for (int i = 0; i < nlines; i++)
		if (strncmp(lines[i], "idle", 4) == 0 ||
			strncmp(lines[i], "cancel", 6) == 0)
			printf("%s", lines[i]);
	print_targets();
	for (int i = 0; i < NLOADS; i++)
	{
		double		failed = figure(loads[i].name, "chat", "failed");
		double		lost = figure(loads[i].name, "chat", "lost");

		if (failed > 0 || (failed == 0 && lost != 0))
			printf("WRONG  %s: %.0f tasks failed, %.0f tokens were lost\n",
				   loads[i].name, failed, lost);
	}
	bare = figure("W1", "bare", "cpu");
	if (bare > 2 * 7.9)
	{
		printf("\nThis run is VOID: the bare client took %.1f us per token at "
			   "W1, more than\ntwice the 7.9 us of an idle machine.\n", bare);
		return 3;
	}
	return 0;
}

int
main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";

	if (strcmp(mode, "bare") == 0 && argc == 5)
		run_bare(argv[2], argv[3], atof(argv[4]));
	else if (strcmp(mode, "chat") == 0 && argc == 6)
	{
		postmaster = atoi(argv[5]);
		run_chat(argv[2], argv[3], atof(argv[4]));
	}
	else if (strcmp(mode, "cancel") == 0 && argc == 5)
		run_cancel(argv[2], argv[3], atof(argv[4]));
	else if (strcmp(mode, "idle") == 0 && argc == 5)
	{
		postmaster = atoi(argv[4]);
		run_idle(argv[2], atof(argv[3]));
	}
	else if (strcmp(mode, "table") == 0 && argc == 3)
		return print_table(argv[2]);
	else
		die("usage: see the head of bench.c");
	return 0;
}
