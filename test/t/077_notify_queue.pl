# What does a full notification queue do to turns (T36)?  It fails none: what
# nobody can be told is stored, and a warning says so once.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Bystander;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
my $version =
  row($node, "SELECT current_setting('server_version_num')::int AS v")->{v};
my $real = $version >= 170000;

if ($real)
{
	$node->append_conf('postgresql.conf', 'max_notify_queue_pages = 64');
	$node->restart;
}
create_server($node, $fake);
$node->safe_psql('postgres', <<'EOS');
CREATE ROLE app LOGIN;
SELECT chat.grant_usage('app');
GRANT USAGE ON FOREIGN SERVER fake TO app;
CREATE FUNCTION twice(n int) RETURNS int LANGUAGE sql RETURN n * 2;
SET ROLE app;
SELECT chat.register_tool('public.twice');
EOS

my $sleeper;

# Fills the queue: a session that listens does not read; before 17 a queue is
# too large for that, and the error is the worker's own.
sub fill
{
	if (!$real)
	{
		$node->append_conf('postgresql.conf',
			"chat.debug_fail = 'notify_full'");
		$node->reload;
		return;
	}
	$sleeper = session($node);
	$sleeper->query_safe('LISTEN sleep; BEGIN; SELECT 1');
	foreach (1 .. 1000)
	{
		my ($rc) = $node->psql('postgres', 'SELECT count(pg_notify('
			  . "'sleep', n || repeat('x', 7000))) FROM generate_series(1, 4) AS n");
		return if $rc != 0;
	}
	die "the queue does not fill\n";
}

# Empties the queue.
sub drain
{
	if (!$real)
	{
		$node->append_conf('postgresql.conf', "chat.debug_fail = ''");
		$node->reload;
		return;
	}
	$sleeper->query_safe('COMMIT');
	$sleeper->quit;
	wait_for($node, 'SELECT pg_notification_queue_usage() < 0.1');
	return;
}

# Asserts that a turn has ended as it should, all of it stored.
sub ended
{
	my ($what, $task, $status, $roles, $text) = @_;
	my $row = wait_for_task($node, $task);

	is_deeply([ $row->{status}, $row->{error} && $row->{error}{code} ],
		[ $status, $status eq 'cancelled' ? 'cancelled' : undef ], "$what: $status");
	one_end($node, $task, $what);
	is(messages($node, $task), $roles, "$what: its messages");
	is(text_of(stored_events($node, $task)), $text, "$what: its text");
	return;
}

my $session = create_session($node, owner => 'app');
my $listener = listener($node, $session->{channel});
my $by = ChatTest::Bystander->new($node, $fake);
my $open = ask($node, $session->{id}, 'open [[tokens=6 gateat=3:v]]');
$fake->wait_at_gate('v');
my $log = -s $node->logfile;
fill();
$fake->open_gate('v');
ended('an open stream', $open, 'completed', 'user assistant',
	't0 t1 t2 t3 t4 t5 ');
my $new = ask($node, $session->{id}, 'new [[tokens=3]]');
ended('a new turn', $new, 'completed', 'user assistant', 't0 t1 t2 ');
my $call = ask($node, $session->{id},
	'call [[tool=twice args={"n":21} thentext=done]]');
ended('a tool', $call, 'completed', 'user assistant tool assistant', 'done');
my $cancel = ask($node, $session->{id}, 'cancel [[tokens=4 gateat=2:w]]');
$fake->wait_at_gate('w');
wait_for($node, "SELECT count(*) > 0 FROM chat.chat_event WHERE task_id ="
	  . " '$cancel' AND payload->>'delta' LIKE '%t1 '");
is($node->safe_psql('postgres', "SELECT chat.cancel_task('$cancel')"),
	't', 'a cancel');
ended('a cancel', $cancel, 'cancelled', 'user assistant', 't0 t1 ');
my $holds = ask($node, $session->{id}, 'holds [[tokens=2 gateat=1:w]]');
$fake->wait_at_gate('w');
my $queued = ask($node, $session->{id}, 'queued');
is($node->safe_psql('postgres', "SELECT chat.cancel_task('$queued')"),
	't', 'a cancel of a queued task');
wait_for($node, "SELECT count(*) = 2 FROM chat.chat_event WHERE task_id = '$queued'");
ended('a cancel of a queued task', $queued, 'cancelled', '', '');
$fake->open_gate('w');
ended('the one before it', $holds, 'completed', 'user assistant', 't0 t1 ');
my $crash = ask($node, $session->{id}, 'crash [[tokens=6 gateat=3:v]]');
$fake->wait_at_gate('v');
my $pid = wait_for_worker($node);
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
wait_gone($pid);
$fake->wait_at_gate('v');
$fake->open_gate('v');
ended('a restart of the worker', $crash, 'completed', 'user assistant',
	't0 t1 t2 t3 t4 t5 ');
$by->ready;
$by->check('a full queue');
# above 90 % nothing is tried any more
like(slurp_file($node->logfile, $log),
	$real ? qr/./ : qr/the notification queue is full/, 'a warning says so');
my %told = map { $_->{event}{taskId} => 1 } $listener->pending;
ok(!$told{$_}, 'nobody was told what could not be told')
  foreach $new, $call, $cancel, $queued;
drain();
my $limit = time() + $PostgreSQL::Test::Utils::timeout_default;
# the worker looks at the queue now and then: turns until one is told
until (grep { $_->{event}{type} eq 'finish' } $listener->pending)
{
	die "nobody is told\n" if time() > $limit;
	wait_for_task($node, ask($node, $session->{id}, 'more [[tokens=2]]'));
}
my $last = ask($node, $session->{id}, 'last [[tokens=2]]');
is_deeply(
	[ $listener->turn($last) ],
	[ stored_events($node, $last) ],
	'with room in the queue listeners are told again');

done_testing();
