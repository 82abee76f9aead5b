# The traps of others that no other test is named after: settings (T11),
# resolver threads and signals (T12), memory over ten thousand requests (T13),
# names of channels (T32), minor versions (T38), heartbeats without WAL (T39),
# rows that only grow in number (T57), where a key may go (T60), roles without
# PUBLIC's grants (T64), functions that keep no state (T68), owners that leave
# (T69).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $elsewhere = start_fake();
my $node = chat_cluster('main', conf => <<'EOC');
autovacuum = off
chat.heartbeat_interval = 100ms
wal_writer_delay = 10s
checkpoint_timeout = 1h
EOC
create_server($node, $fake, retries => 0);
my $worker = wait_for_worker($node);
$node->safe_psql('postgres', <<'EOS');
CREATE ROLE app LOGIN;
SELECT chat.grant_usage('app');
GRANT USAGE ON FOREIGN SERVER fake TO app;
EOS

# Asserts that a statement, run as app, raises an error with this SQLSTATE.
sub refused
{
	my ($sql, $state, $label) = @_;
	my ($rc, $out, $err) = $node->psql('postgres',
		"\\set VERBOSITY verbose\nSET ROLE app;\n$sql");

	like($err, qr/ERROR:  \Q$state\E: /, $label);
	return;
}

# Returns a value of the worker's status in /proc.
sub of_worker
{
	my ($name, $task) = @_;
	my ($value) =
	  ChatTest::Crash::read_proc("/proc/$worker/" . ($task // '') . 'status') =~
	  /^$name:\s*(\w+)/m;
	return $value;
}

# --- T11: what a user may set

is( $node->safe_psql('postgres', "SELECT string_agg(name, ' ' ORDER BY name)"
		  . " FROM pg_settings WHERE name LIKE 'chat.%' AND context = 'user'"),
	'chat.default_server chat.user_id', 'T11: users set these two');
is( $node->safe_psql('postgres', "SELECT count(*) FROM pg_settings WHERE"
		  . " name LIKE 'chat.%' AND context NOT IN ('user', 'superuser', 'sighup')"),
	0, 'T11: none needs a restart');
refused("SET chat.connect_timeout = 1", '55P02', 'T11: not what workers read');
refused("SET chat.max_message_length = 1", '42501', 'T11: not a limit');
$node->safe_psql('postgres', server_sql($elsewhere->port, name => 'private'));
my $session =
  $node->safe_psql('postgres', 'SET ROLE app; SELECT id FROM chat.create_chat_session()');
refused("SET chat.default_server = 'private';"
	  . " SELECT chat.stream_chat_completion('$session', 'x')",
	'42501', 'T11: a server is chosen among those that one may use');

# --- T60: address and key belong together

refused("ALTER SERVER fake OPTIONS (SET base_url 'http://127.0.0.1:1/v1')",
	'42501', 'T60: the address is the owner\'s to change');
refused("SELECT chat.stream_chat_completion('$session', 'x',"
	  . " options => '{\"base_url\": \"http://127.0.0.1:1\"}')",
	'22023', 'T60: no option of a call changes it');
refused("SELECT chat.update_chat_session('$session',"
	  . " settings => '{\"base_url\": \"http://127.0.0.1:1\"}')",
	'22023', 'T60: nor does a setting of a session');
foreach my $header ('authorization', 'HOST', 'Content-Length', 'Transfer-Encoding')
{
	my ($rc, $out, $err) = $node->psql('postgres',
		"ALTER SERVER fake OPTIONS (ADD extra_headers '{\"$header\": \"x\"}')");
	like($err, qr/ERROR: .*header/, "T60: $header is no extra header");
}
my $location = 'http://127.0.0.1:' . $elsewhere->port . '/v1/chat/completions';
my ($turn) = run_turns($node, "[[status=307 location=$location]]");
is($turn->{error}{status}, 307, 'T60: a redirect is an error');
is(scalar $elsewhere->requests, 0, 'T60: nobody follows it');

# --- T38

my $version = row($node, "SELECT * FROM chat.check_installation()"
	  . " WHERE item = 'server_version'");
ok(defined $version->{ok}, "T38: the minor version is judged: $version->{detail}")
  if exists $version->{detail};
is($version->{item}, 'server_version', 'T38: check_installation() looks at it');

# --- T32: the longest name of a channel

my $name = 'c' x 63;
my $named = create_session($node, channel => $name);
is($named->{channel}, $name, 'T32: 63 bytes are a channel');
my $listener = listener($node, $name);
my @events = $listener->turn(ask($node, $named->{id}, '[[tokens=2]]'));
is(text_of(@events), 't0 t1 ', 'T32: and it is notified');
$listener->stop;
like(create_session($node)->{channel}, qr/^chat_[0-9a-f]{32}$/,
	'T32: those that are made are shorter');

# --- T39: heartbeats

my $quiet = create_session($node);
$listener = listener($node, $quiet->{channel});
my $task = ask($node, $quiet->{id}, '[[tokens=2 gateat=1:quiet]]');
$fake->wait_at_gate('quiet');
my $beat = sub { $_[0]{type} eq 'data-heartbeat' };
$listener->until($beat);
my $events = row($node, 'SELECT count(*) FROM chat.chat_event')->{count};
my %flushed;
foreach (1 .. 20)
{
	$listener->until($beat);
	$flushed{ $node->safe_psql('postgres', 'SELECT pg_current_wal_flush_lsn()') } = 1;
}
cmp_ok(scalar keys %flushed, '<', 5, 'T39: twenty heartbeats flush no WAL');
is(row($node, 'SELECT count(*) FROM chat.chat_event')->{count},
	$events, 'T39: and leave no row');
$fake->open_gate('quiet');
$listener->turn($task);
$listener->stop;

# --- T57: rows are added, not written again

my $before = 'SELECT n_tup_ins AS ins, n_tup_upd AS upd, n_tup_del AS del'
  . " FROM pg_stat_user_tables WHERE relname = 'chat_message'";
wait_for($node, "SELECT ins > 0 FROM ($before) AS s");
my $was = row($node, $before);
my $long = create_session($node)->{id};
ask($node, $long, "n$_ [[tokens=3]]") foreach 1 .. 30;
wait_for($node, "SELECT count(*) = 60 FROM chat.chat_message WHERE session_id = '$long'");
wait_for($node, "SELECT ins = $was->{ins} + 60 FROM ($before) AS s");
my $is = row($node, $before);
is_deeply([ @$is{qw(upd del)} ], [ @$was{qw(upd del)} ],
	'T57: thirty turns add sixty messages and write none again');

# --- T64: without what PUBLIC has

$node->safe_psql('postgres', <<'EOS');
REVOKE ALL ON DATABASE postgres FROM PUBLIC;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA chat FROM PUBLIC;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON FUNCTIONS FROM PUBLIC;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON TYPES FROM PUBLIC;
GRANT CONNECT ON DATABASE postgres TO app;
EOS
$task = $node->safe_psql('postgres',
	"SELECT chat.stream_chat_completion('$session', '[[tokens=3]]')",
	extra_params => [ '-U', 'app' ]);
is(wait_for_task($node, $task)->{status}, 'completed',
	'T64: the runtime needs nothing of PUBLIC\'s');

# --- T68: functions that may be called anywhere

is( $node->safe_psql('postgres', <<'EOS'), '', 'T68: what writes is volatile');
SELECT string_agg(p.proname, ' ' ORDER BY p.proname)
FROM pg_proc AS p JOIN pg_language AS l ON l.oid = p.prolang
WHERE p.pronamespace = 'chat'::regnamespace AND p.provolatile <> 'v'
	AND p.proname ~ '^(create|update|upsert|add_chat|delete|assign|stream|cancel|register|drop|set_|report|complete|submit|approve|deny|pause|resume|edit|regenerate|fork|import|rerun|grant|revoke)'
EOS
is( $node->safe_psql('postgres', <<'EOS'), '', 'T68: and no C function is said to be safe in parallel that writes or waits');
SELECT string_agg(p.proname, ' ' ORDER BY p.proname)
FROM pg_proc AS p JOIN pg_language AS l ON l.oid = p.prolang
WHERE p.pronamespace = 'chat'::regnamespace AND p.proparallel = 's'
	AND p.provolatile = 'v'
EOS

# --- T69: an owner leaves

$node->safe_psql('postgres', <<'EOS');
CREATE ROLE heir LOGIN;
SELECT chat.grant_usage('heir');
GRANT USAGE ON FOREIGN SERVER fake TO heir;
SET ROLE app;
SELECT chat.set_prompt('mine', 'be brief');
SELECT chat.set_user_context('ada', '{"likes": "tea"}');
EOS
$task = ask($node, $session, '[[tokens=4 gateat=2:heir]]');
my $queued = ask($node, $session, '[[tokens=1]]');
$fake->wait_at_gate('heir');
my $owned = $node->safe_psql('postgres', 'SELECT count(*) FROM chat.chat_session'
	  . " WHERE owner = 'app'::regrole");
is($node->safe_psql('postgres', "SELECT chat.reassign_owner('app', 'heir')"),
	$owned + 2, 'T69: sessions, prompt and user context have another owner');
refused("SELECT chat.reassign_owner('heir', 'app')", '42501',
	'T69: not everybody may do that');
$node->safe_psql('postgres',
	"SELECT chat.revoke_usage('app'); DROP OWNED BY app; DROP ROLE app");
pass('T69: the role can be dropped while its turn runs');
$fake->open_gate('heir');
is(wait_for_task($node, $_)->{status}, 'completed', 'T69: the turns go on')
  foreach $task, $queued;
is( $node->safe_psql('postgres',
		"SET ROLE heir; SELECT count(*) FROM chat.chat_message WHERE task_id = '$task'"),
	2, 'T69: the heir reads them');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM chat.chat_session WHERE owner = 'heir'::regrole"),
	$owned, 'T69: all of them');

# --- T13: ten thousand requests leave nothing behind

# Runs so many turns, a thousand at a time.
sub run_many
{
	my ($thousands) = @_;

	foreach (1 .. $thousands)
	{
		$node->safe_psql('postgres', <<'EOS');
SELECT count(chat.stream_chat_completion((chat.create_chat_session()).id,
	'[[tokens=3]]')) FROM generate_series(1, 1000)
EOS
		wait_for($node,
			'SELECT count(*) = 0 FROM chat.chat_job');
		$fake->forget;
	}
	return;
}

run_many(3);
my ($memory, @files) = (of_worker('VmRSS'), glob "/proc/$worker/fd/*");
run_many(7);
my @files_now = glob "/proc/$worker/fd/*";
cmp_ok(of_worker('VmRSS') - $memory, '<', 8 * 1024,
	'T13: the worker\'s memory does not grow with the turns (kB)');
cmp_ok(scalar @files_now, '<=', @files + 200,
	'T13: nor do its descriptors');
is( row($node, "SELECT count(*) FROM chat.chat_task WHERE status = 'completed'"
		  . " AND finished_at > now() - interval '1 hour'")->{count} >= 10000,
	1, 'T13: ten thousand turns are completed');
is(wait_for_worker($node), $worker, 'T13: under one worker');

# --- T12: threads that resolve names take no signals; here they wait for a
# file, and the worker gets signals that are harmless where they belong

my $file = PostgreSQL::Test::Utils::tempdir() . '/resolve';
{
	local $ENV{LD_PRELOAD} = build_file('resolver.so');
	local $ENV{CHAT_TEST_RESOLVER} = $file;
	$node->restart;
}
$worker = wait_for_worker($node);
ok(hex(of_worker('SigIgn')) & 1 << 12, 'T12: the worker ignores SIGPIPE');
my @lost;
foreach my $n (1 .. 8)
{
	$node->safe_psql('postgres',
		server_sql(1, name => "nowhere$n", allow_http => 'on', retries => 0,
			connect_timeout => '1h', base_url => "http://host$n.invalid:9/v1"));
	push @lost,
	  ask($node, create_session($node, server => "nowhere$n")->{id}, 'x');
}
my @threads;
wait_until(
	'eight threads',
	sub {
		@threads = grep { $_ != $worker }
		  map { m{(\d+)$} } glob "/proc/$worker/task/*";
		return @threads >= 8;
	});
my %open;
foreach my $tid (@threads)
{
	my $blocked = of_worker('SigBlk', "task/$tid/");
	$open{$_}++
	  foreach grep { !(hex($blocked) & 1 << $_ - 1) } 1, 2, 3, 10, 12, 14, 15, 23;
}
is_deeply(\%open, {}, 'T12: threads of the worker block the signals');
foreach (1 .. 50)
{
	kill $_, $worker foreach qw(USR1 URG HUP);
}
is((run_turns($node, '[[tokens=1]]'))[0]{status},
	'completed', 'T12: others do not wait for a name');
append_to_file($file, '');
foreach my $task (@lost)
{
	my $row = wait_for_task($node, $task);
	is($row->{error}{code}, 'endpoint_error',
		'T12: a name that does not resolve');
	is($row->{error}{retryable}, JSON::PP::true, '  may do so later');
}
is(wait_for_worker($node), $worker, 'T12: the worker has stayed');
is( row($node, "SELECT ok FROM chat.check_installation() WHERE item = 'libcurl'")->{ok},
	JSON::PP::true, 'T12: check_installation() looks at libcurl\'s resolver');

done_testing();
