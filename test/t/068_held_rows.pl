# P10: rows that an application keeps locked (it has cancelled a task, ended
# an operation or renamed a session, and does not commit) hold up their own
# task and nothing else, and the worker does not spin meanwhile.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use ChatTest::Tools;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $node = tool_cluster($fake, 'chat.retry_base_delay = 1ms');
my $worker = wait_for_worker($node);
my $holder = session($node);

$node->safe_psql('postgres', 'ALTER SERVER fake OPTIONS (SET retries \'3\')');
$node->safe_psql('postgres',
	q{CREATE FUNCTION app.note(what text) RETURNS text LANGUAGE sql AS $$ SELECT 'noted ' || what $$});
register($node, 'ann', function => 'app.note');
register($node, 'ann', kind => 'client', name => 'ask_user');
register($node, 'ann', kind => 'http', name => 'job', server => 'services',
	path => '/job', parameters => '{"type": "object"}');

# Asserts that turns of other sessions stream and end, also those with tools.
sub others_go_on
{
	my ($when) = @_;
	my @turns = start_turns($node, 5, 'other [[tokens=3]]');

	push @turns, { task => (start($node, "go [[tool=$_ args={} steps=1]]"))[1] }
	  foreach 'note', 'job';
	is(wait_for_task($node, $_->{task})->{status}, 'completed',
		"$when: another ends")
	  foreach @turns;
	return;
}

# a cancel that is not committed, while the attempt fails and would go back
my $session = create_session($node)->{id};
my $task = ask($node, $session, 'try [[status=503 times=1 gatehead=h tokens=3]]');
$fake->wait_at_gate('h');
$holder->query_safe('BEGIN');
$holder->query_safe("SELECT chat.cancel_task('$task')");
$fake->open_gate('h');
others_go_on('a job that cannot go back');
$holder->query_safe('ROLLBACK');
$fake->open_gate('h');
is(wait_for_task($node, $task)->{status}, 'completed',
	'it goes back later, and the next attempt succeeds');

# the same, and the cancel is committed
$session = create_session($node)->{id};
$task = ask($node, $session, 'try [[status=503 times=1 gatehead=h tokens=4]]');
$fake->wait_at_gate('h');
$holder->query_safe('BEGIN');
$holder->query_safe("SELECT chat.cancel_task('$task')");
$fake->open_gate('h');
others_go_on('a cancelled job that cannot go back');
$holder->query_safe('COMMIT');
is(wait_for_task($node, $task)->{status}, 'cancelled', 'a cancelled one ends');

# the result of an HTTP tool whose task is held
($session, $task) = start($node,
	'go [[tool=job args=%7B%22command%22:%22gate=t%22%7D steps=1]]');
$fake->wait_at_gate('t');
$holder->query_safe('BEGIN');
$holder->query_safe("SELECT chat.cancel_task('$task')");
$fake->open_gate('t');
others_go_on('a result that cannot be stored');
$holder->query_safe('ROLLBACK');
is(wait_for_task($node, $task)->{status}, 'completed',
	'it is stored later');

# the result of a function, whose role waits for no lock for long
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION app.meet() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	SET LOCAL lock_timeout = 0;
	PERFORM pg_advisory_xact_lock(3);
	SET LOCAL lock_timeout = '10ms';
	RETURN 'met';
END $$;
ALTER ROLE ann SET lock_timeout = '10ms';
EOS
register($node, 'ann', function => 'app.meet');
$holder->query_safe('SELECT pg_advisory_lock(3)');
($session, $task) = start($node, 'go [[tool=meet args={} steps=1]]');
wait_for($node, "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted");
$holder->query_safe('BEGIN');
$holder->query_safe("SELECT chat.cancel_task('$task')");
$holder->query_safe('SELECT pg_advisory_unlock(3)');
others_go_on('a result of a function that cannot be stored');
$holder->query_safe('ROLLBACK');
is(wait_for_task($node, $task)->{status}, 'completed', 'it is stored later');
is((calls($node, $task))[0]{result}, 'met', '  as it was');
$node->safe_psql('postgres', 'ALTER ROLE ann RESET lock_timeout');

# the progress of a function whose task is held: it is told with the next one
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION app.report(n integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. n LOOP
		PERFORM chat.report_progress(to_jsonb(i)), pg_advisory_xact_lock(i);
	END LOOP;
	RETURN 'reported';
END $$;
EOS
register($node, 'ann', function => 'app.report');
my $gate = session($node);
$gate->query_safe('SELECT pg_advisory_lock(1), pg_advisory_lock(2)');
($session, $task) = start($node, 'go [[tool=report args={"n":2} steps=1]]');
my $told = "SELECT count(*) FROM chat.chat_event WHERE task_id = '$task' AND payload->>'preliminary' = 'true'";
wait_for($node, "SELECT ($told) = 1");
my $log = -s $node->logfile;
$holder->query_safe('BEGIN');
$holder->query_safe("SELECT chat.cancel_task('$task')");
$gate->query_safe('SELECT pg_advisory_unlock(1)');
wait_for($node, "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = 2 AND NOT granted");
others_go_on('progress that cannot be told');
is($node->safe_psql('postgres', $told), 1, '  it is not told');
unlike(slurp_file($node->logfile, $log), qr/lock timeout/, '  and nobody waits for that');
$holder->query_safe('ROLLBACK');
$gate->query_safe('SELECT pg_advisory_unlock(2)');
is(wait_for_task($node, $task)->{status}, 'completed', '  its task ends');
$gate->quit;

# a parked task that is due, in a session that is locked
($session, $task) = start($node, 'go [[tool=ask_user args={} steps=1]]');
wait_for_calls($node, $task, 'waiting', 1);
my ($call) = calls($node, $task);
$holder->query_safe('BEGIN');
$holder->query_safe("SELECT chat.update_session_title('$session', 'x')");
$node->safe_psql('postgres', "SELECT chat.complete_operation('$call->{operation_id}', '\"yes\"')");
others_go_on('a turn that cannot be taken');
my $commits = 'SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()';
my $before = $node->safe_psql('postgres', $commits);
my $after = $node->safe_psql('postgres', "SELECT pg_sleep(2); $commits");
$after =~ s/\s//g;
cmp_ok($after - $before, '<', 200, 'the worker does not spin meanwhile');
$holder->query_safe('COMMIT');
is(wait_for_task($node, $task)->{status}, 'completed', 'and is taken later');

# a cancel ends the request of an HTTP tool, too
($session, $task) = start($node,
	'go [[tool=job args=%7B%22command%22:%22gate=c%22%7D steps=1]]');
$fake->wait_at_gate('c');
$node->safe_psql('postgres', "SELECT chat.cancel_task('$task')");
is(wait_for_task($node, $task)->{status}, 'cancelled', 'a tool call is cancelled');
$fake->wait_for_stats(sub { $_->{active} == 0 });
pass('  and its request has ended');

is(wait_for_worker($node), $worker, 'under one worker');
$holder->quit;
$node->stop;
done_testing();
