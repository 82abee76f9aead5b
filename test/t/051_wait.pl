# Does wait_task_events wait for events without cost, without a lock and no
# longer than there is something to wait for, also through a pooler?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use IPC::Run ();
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
# when it takes long, no time comes at which the worker would look at a stream
my $node = chat_cluster('main', conf => <<'EOC');
chat.heartbeat_interval = 1h
chat.connect_timeout = 10min
chat.first_token_timeout = 10min
chat.idle_timeout = 10min
chat.stream_timeout = 10min
EOC
create_server($node, $fake);
my $session = create_session($node);

# Starts a query in the background; returns what finish_query() takes.
sub start_query
{
	my ($sql, $connstr) = @_;
	my $query = { out => '', err => '' };

	$query->{run} = IPC::Run::start(
		[
			'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d',
			$connstr // $node->connstr('postgres'), '-c', $sql
		],
		'<', \undef, '>', \$query->{out}, '2>', \$query->{err},
		IPC::Run::timer($PostgreSQL::Test::Utils::timeout_default));
	return $query;
}

# Waits for its end; returns what it has printed.
sub finish_query
{
	my ($query) = @_;
	$query->{run}->finish;
	chomp $query->{out};
	return $query->{out};
}

# Waits until a backend sleeps in a wait of ours, and returns its pid.
sub sleeper
{
	my ($like) = @_;
	my $cond = "query LIKE '%$like%' AND pid <> pg_backend_pid()"
	  . " AND wait_event_type = 'Extension'";
	wait_for($node, "SELECT count(*) = 1 FROM pg_stat_activity WHERE $cond");
	return $node->safe_psql('postgres',
		"SELECT pid FROM pg_stat_activity WHERE $cond");
}

# a running task: what comes next
my $task = ask($node, $session->{id}, 'go [[tokens=4 gateat=2:mid]]');
$fake->wait_at_gate('mid');
wait_for($node,
	"SELECT count(*) > 0 FROM chat.get_task_events('$task')"
	  . " WHERE payload->>'type' = 'text-delta'");
my $last = $node->safe_psql('postgres',
	"SELECT max(seq) FROM chat.get_task_events('$task')");
my $query = start_query(
	"SELECT payload->>'type' FROM chat.wait_task_events('$task', $last)");
my $pid = sleeper('wait_task_events');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM pg_locks WHERE pid = $pid AND locktype = 'relation'"),
	'0', 'T35: a reader that waits holds no lock on a table');
is( $node->safe_psql('postgres',
		"SELECT backend_xid IS NULL FROM pg_stat_activity WHERE pid = $pid"),
	't', 'nor a transaction id');
my $utime = sub {
	my @stat = split / /, slurp_file("/proc/$pid/stat");
	return $stat[13] + $stat[14];
};
my $switches = sub {
	return slurp_file("/proc/$pid/status") =~ /^voluntary_ctxt_switches:\s*(\d+)/m
	  ? $1 : die;
};
my @before = ($utime->(), $switches->());
# other streams of the same worker are no reason to wake up
my $elsewhere = create_session($node);
my $noise;
do
{
	# of another bucket of the waits, that is: by the last byte of the id
	$noise = ask($node, $elsewhere->{id}, 'noise [[tokens=200]]');
	wait_for_task($node, $noise);
} while (hex(substr $noise, -2) == hex(substr $task, -2));
is_deeply([ $utime->(), $switches->() ],
	\@before, 'waiting takes no CPU, whatever others stream');
# nor do many readers cost the worker anything: they do not wake it
my $worker = wait_for_worker($node);
my $worker_switches = sub {
	return slurp_file("/proc/$worker/status") =~ /^voluntary_ctxt_switches:\s*(\d+)/m
	  ? $1 : die;
};
my $seen = '';
wait_for($node, "SELECT xact_start IS NULL FROM pg_stat_activity WHERE pid = $worker");
until ($worker_switches->() eq $seen)
{
	$seen = $worker_switches->();
	$node->safe_psql('postgres', 'SELECT pg_sleep(0.05)');
}
my @readers = map { start_query("SELECT payload->>'type' FROM chat.wait_task_events('$task', $last)") } 1 .. 20;
wait_for($node, "SELECT count(*) = 21 FROM pg_stat_activity WHERE query LIKE '%wait_task_events%'"
	  . " AND pid <> pg_backend_pid() AND wait_event_type = 'Extension'");
$node->safe_psql('postgres', <<"EOF");
SELECT count(chat.sse('$task', n % 3)), count(chat.task_snapshot('$task')),
	sum((SELECT count(*) FROM chat.get_task_events('$task')))
FROM generate_series(1, 300) AS n
EOF
is($worker_switches->(), $seen, 'many readers cost the worker nothing');
$fake->open_gate('mid');
like(finish_query($query), qr/^text-delta/, 'it returns what came');
is(scalar(grep { finish_query($_) =~ /^text-delta/ } @readers), 20, 'to each of them');
wait_for_task($node, $task);

# the end
my ($end) = rows($node, "SELECT max(seq) AS seq FROM chat.get_task_events('$task')");
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM chat.wait_task_events('$task', $end->{seq})"),
	'0', 'T46: nothing to wait for when the task has ended');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM chat.wait_task_events('00000000-0000-4000-8000-000000000000')"),
	'0', 'nor when there is no such task');

# cancelled while queued
my $head = ask($node, $session->{id}, 'head [[tokens=2 gate=head]]');
$fake->wait_at_gate('head');
my $queued = ask($node, $session->{id}, 'behind');
$query = start_query(
	"SELECT string_agg(payload->>'type', ' ') FROM chat.wait_task_events('$queued')");
sleeper('wait_task_events');
is($node->safe_psql('postgres', "SELECT chat.cancel_task('$queued')"),
	't', 'a queued task is cancelled');
is(finish_query($query), 'start abort',
	'T46: whoever waits for it learns so at once');

# the session goes away
$query = start_query(
	"SELECT count(*) FROM chat.wait_task_events('$head', 99)");
sleeper('wait_task_events');
$node->safe_psql('postgres',
	"SELECT chat.delete_chat_session('$session->{id}')");
is(finish_query($query), '0', 'a session that is deleted ends the wait');

# interrupts, limits
$session = create_session($node);
$task = ask($node, $session->{id}, 'stay [[tokens=2 gate=stay]]');
$fake->wait_at_gate('stay');
$query = start_query("SELECT count(*) FROM chat.wait_task_events('$task', 99)");
$pid = sleeper('wait_task_events');
$node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)");
finish_query($query);
like($query->{err}, qr/canceling statement due to user request/,
	'a wait can be interrupted');
is($node->safe_psql('postgres',
		"SELECT count(*) FROM chat.wait_task_events('$task', 99, '10 ms')"),
	'0', 'and ends at its timeout');
foreach my $level ('REPEATABLE READ', 'SERIALIZABLE')
{
	my (undef, undef, $error) = $node->psql('postgres',
		"\\set VERBOSITY verbose\nBEGIN ISOLATION LEVEL $level; SELECT * FROM chat.wait_task_events('$task')");
	like($error, qr/25001.*READ COMMITTED/s, "$level is refused");
}
my (undef, undef, $error) = $node->psql('postgres',
	"SELECT * FROM chat.wait_task_events('$task', 0, '31 s')");
like($error, qr/timeout is out of range/, 'more than 30 s is refused');

# whoever waits for a task that nobody will run learns of its end, too, and
# not by its timeout
foreach my $message ('running [[tokens=2 gate=lost]]', 'queued')
{
	my $id = create_session($node)->{id};
	my $lost = ask($node, $id, 'running [[tokens=2 gate=lost]]');
	$fake->wait_at_gate('lost');
	$lost = ask($node, $id, 'queued') if $message eq 'queued';
	$query = start_query("SELECT count(*) > 0, clock_timestamp() < statement_timestamp() + '25 s'"
		  . " FROM chat.wait_task_events('$lost', 99)");
	sleeper('wait_task_events');
	$node->safe_psql('postgres', 'TRUNCATE chat.chat_job');
	is(finish_query($query), 't|t', "T46: a reader of a task that has lost its job: $message");
	is(wait_for_task($node, $lost)->{error}{code}, 'restored', 'which is what it is told');
}

# nor is it when the statement was prepared and somebody else commits it
foreach my $sql ("SELECT chat.cancel_task('TASK')",
	"SELECT chat.delete_chat_session('SESSION')", 'TRUNCATE chat.chat_job')
{
	my $id = create_session($node)->{id};
	ask($node, $id, 'running [[tokens=2 gate=lost]]');
	$fake->wait_at_gate('lost');
	my $behind = ask($node, $id, 'behind');
	(my $what = $sql) =~ s/SESSION/$id/;
	$what =~ s/TASK/$behind/;
	$query = start_query("SELECT count(*) >= 0, clock_timestamp() < statement_timestamp() + '25 s'"
		  . " FROM chat.wait_task_events('$behind', 99)");
	sleeper('wait_task_events');
	$node->safe_psql('postgres', "BEGIN; $what; PREPARE TRANSACTION 'told'");
	$node->safe_psql('postgres', "COMMIT PREPARED 'told'");
	is(finish_query($query), 't|t', "T46: a reader at COMMIT PREPARED of $sql");
	$node->safe_psql('postgres', "SELECT chat.delete_chat_session('$id')");
}
$session = create_session($node);
$task = ask($node, $session->{id}, 'stay [[tokens=2 gate=stay]]');
$fake->wait_at_gate('stay');

# within a transaction each call sees what is new
$query = start_query(
	"BEGIN; SELECT 1; SELECT payload->>'type' FROM chat.wait_task_events('$task', 3, max_rows => 1); COMMIT");
sleeper('wait_task_events');
$fake->open_gate('stay');
like(finish_query($query), qr/text-start/,
	'a transaction that began before sees it');
wait_for_task($node, $task);

# the pooler
SKIP:
{
	my ($pgbouncer) = grep { -x } map { "$_/pgbouncer" } split(/:/, $ENV{PATH}),
	  '/usr/sbin';
	skip 'pgbouncer is not installed', 4 unless $pgbouncer;
	my $dir = PostgreSQL::Test::Utils::tempdir();
	my $port = PostgreSQL::Test::Cluster::get_free_port();

	append_to_file("$dir/users", qq("postgres" ""\n));
	append_to_file("$dir/ini", <<"EOF");
[databases]
postgres = host=@{[ $node->host ]} port=@{[ $node->port ]} user=@{[ scalar getpwuid $> ]}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = $port
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
logfile = $dir/log
pidfile = $dir/pid
EOF
	my $run = IPC::Run::start([ $pgbouncer, "$dir/ini" ],
		'<', \undef, '>&', \my $bouncer_log,
		IPC::Run::timer($PostgreSQL::Test::Utils::timeout_default));
	my $connstr = "host=127.0.0.1 port=$port dbname=postgres user=postgres";
	my $up = 0;
	while (!$up && $run->pumpable)
	{
		$up = !system_log('psql', '-XAtq', '-d', $connstr, '-c', 'SELECT 1');
		eval { $run->pump_nb };
		select undef, undef, undef, 0.05;
	}
	ok($up, 'PgBouncer is up, with transaction pooling')
	  or BAIL_OUT("pgbouncer: $bouncer_log " . slurp_file("$dir/log"));
	my $pooled = ask($node, $session->{id}, 'pooled [[tokens=5 delay=20]]');
	my ($after, @events) = (0);
	while (1)
	{
		my $got = finish_query(start_query(
			"SELECT coalesce(json_agg(payload), '[]') FROM chat.wait_task_events('$pooled', $after)",
			$connstr));
		my @new = @{ decode($got || '[]') };
		last unless @new;
		push @events, @new;
		$after = $events[-1]{seq};
	}
	is(text_of(@events), 't0 t1 t2 t3 t4 ', 'T35: a stream through a pooler');
	is($events[-1]{type}, 'finish', 'up to its end');
	is_deeply(\@events, [ events($node, $pooled) ], 'and nothing twice');
	$run->signal('TERM');
	$run->finish;
}

done_testing();
