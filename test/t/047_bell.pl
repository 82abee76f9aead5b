# Is the bell heard that rings while a commit of the worker waits for a
# synchronous standby, or while the launcher waits for a lock?  Whatever waits
# within a transaction resets the latch.  And does it ring no sooner than the
# worker can see, and lock, what it rings for?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use IPC::Run ();
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', allows_streaming => 1);
create_server($node, $fake);

# a standby that can be held up
my $wal = PostgreSQL::Test::Utils::tempdir();
my $standby = IPC::Run::start(
	[ 'pg_receivewal', '--synchronous', '-D', $wal, '-d', $node->connstr ],
	'<', \undef, '>&', \my $output);
my $pid = $standby->{KIDS}[0]{PID};
END { kill 'KILL', $pid if $pid }
wait_for($node, 'SELECT count(*) = 1 FROM pg_stat_replication');
my @sessions = map { create_session($node)->{id} } 1 .. 2;
wait_for($node, 'SELECT flush_lsn IS NOT NULL FROM pg_stat_replication');
$node->safe_psql('postgres',
	"ALTER SYSTEM SET synchronous_standby_names = '*'");
$node->reload;
wait_for($node, q{SELECT sync_state = 'sync' FROM pg_stat_replication});

# what the test itself writes waits for nobody
$ENV{PGOPTIONS} = '-c synchronous_commit=local';
kill 'STOP', $pid;
my $first = ask($node, $sessions[0], 'go [[tokens=2 gateat=1:v]]');
wait_for($node, q{SELECT wait_event = 'SyncRep' FROM pg_stat_activity
	WHERE backend_type = 'chat worker'});
my $second = ask($node, $sessions[1], 'hi [[tokens=1]]');
kill 'CONT', $pid;

is(wait_for_task($node, $second)->{status}, 'completed',
	'a turn that came while the worker waited');
$fake->open_gate('v');
is(wait_for_task($node, $first)->{status}, 'completed',
	'and the one that it waited with');
$node->stop;

# The launcher looks at pg_database when something has changed; somebody holds
# the catalog locked, and the extension comes to another database meanwhile.
$node = chat_cluster('launcher', conf => 'log_min_messages = debug1');
wait_for_worker($node);
my $log = -s $node->logfile;
$node->safe_psql('postgres', 'CREATE DATABASE second');
$node->wait_for_log(qr/unregistering background worker "chat worker"/, $log);
my ($holder, $ringer) = map { session($node) } 1 .. 2;
my $creator = session($node, 'second');
# what these will need of the catalog is in their caches
$ringer->query_safe('SELECT 1');
$creator->query_safe('BEGIN; CREATE EXTENSION chat; ROLLBACK');
$ringer->query_safe("BEGIN; CREATE TABLE t (); PREPARE TRANSACTION 'ring'");
$holder->query_safe('BEGIN');
$holder->query_safe('LOCK TABLE pg_catalog.pg_database IN ACCESS EXCLUSIVE MODE');
$ringer->query_safe("COMMIT PREPARED 'ring'");
wait_until(
	'the launcher to wait for the lock',
	sub {
		$holder->query_safe('SELECT count(*) FROM pg_locks AS l'
			  . ' JOIN pg_stat_activity AS a ON a.pid = l.pid'
			  . " WHERE NOT l.granted AND a.backend_type = 'chat launcher'") eq '1';
	});
$creator->query_safe('CREATE EXTENSION chat');
$holder->query_safe('COMMIT');
wait_for_worker($node, 'second');
pass('an extension that came while the launcher waited gets its worker');
$_->quit foreach $holder, $ringer, $creator;
$node->stop;

# Whoever rings is held right after it has rung, which is all that the worker
# hears of it.
my $latch = PostgreSQL::Test::Utils::tempdir();
$node = chat_cluster('held', start => 0);
{
	local $ENV{LD_PRELOAD} = build_file('latch.so');
	local $ENV{CHAT_TEST_LATCH} = $latch;
	$node->start;
}
$node->safe_psql('postgres', 'CREATE EXTENSION chat');
create_server($node, $fake, max_concurrency => 1);

# Runs statements, the last of which rings; returns when it has, and holds it.
# The worker is stopped meanwhile: what the commit of a large change of catalogs
# tells all processes would wake it, and nothing would be left to ring for.
sub ring
{
	my @statements = @_;
	my $worker = wait_for_worker($node);
	my $psql = session($node);

	# nothing is left that it would wait with, for a lock that these take
	wait_for_rest($node, $worker);
	$psql->query_safe('SET client_min_messages = warning');
	$psql->query_safe($_) foreach @statements[ 0 .. $#statements - 1 ];
	pause_worker($node, $worker);
	append_to_file("$latch/new", $worker);
	rename "$latch/new", "$latch/pid" or die "$latch: $!\n";
	$psql->query_until(qr/ringing/, "\\echo ringing\n$statements[-1];\n");
	wait_until('the bell', sub { -e "$latch/held" });
	kill 'CONT', $worker;
	return $psql;
}

# Lets it go on.
sub let_go
{
	my ($psql) = @_;
	unlink "$latch/held" or die "$latch: $!\n";
	$psql->quit;
	return;
}

my @turns = start_turns($node, 2, 'one [[tokens=2 gateat=1:r]]');
$fake->wait_at_gate('r');
my $held = ring("ALTER SERVER fake OPTIONS (SET max_concurrency '2')");
$fake->get_json('/gate/r?wait=2');
pass('a changed server is seen');
let_go($held);
$fake->open_gate('r', 2);
wait_for_task($node, $_->{task}) foreach @turns;

$held = ring('BEGIN', 'LOCK TABLE chat.chat_job IN ACCESS EXCLUSIVE MODE',
	"SELECT chat.stream_chat_completion('$turns[0]{session}', 'hi [[tokens=2 gateat=1:l]]')",
	'COMMIT');
$fake->wait_at_gate('l');
pass('what was locked can be used');
let_go($held);
$fake->open_gate('l');
wait_for($node, 'SELECT count(*) = 0 FROM chat.chat_job');

my $old = wait_for_worker($node);
$held = ring('BEGIN', 'DROP EXTENSION chat CASCADE', 'CREATE EXTENSION chat', 'COMMIT');
wait_gone($old);
pass('a replaced extension is seen: its worker ends');
let_go($held);
isnt(wait_for_worker($node), $old, 'and another one comes');

done_testing();
