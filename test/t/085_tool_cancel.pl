# Does a cancelled task end at once, whatever its tools are doing, and leave a
# session that can be used; and do listeners hear that a silent tool lives?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use ChatTest::Tools;
use Test::More;

my $fake = start_fake();
my $node = tool_cluster($fake, "chat.tool_workers = 2\nchat.heartbeat_interval = 100");
$node->safe_psql('postgres', <<'EOS');
CREATE TABLE app.effect (n integer);
GRANT ALL ON app.effect TO ann;
CREATE FUNCTION app.slow(n integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO app.effect VALUES (n);
	PERFORM pg_advisory_xact_lock_shared(n);
	RETURN 'slow ' || n;
END $$;
-- does not let itself be cancelled
CREATE FUNCTION app.stubborn(n integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO app.effect VALUES (n);
	BEGIN
		PERFORM pg_advisory_xact_lock_shared(1);
	EXCEPTION WHEN query_canceled THEN
		PERFORM pg_advisory_xact_lock_shared(n);
	END;
	RETURN 'stubborn';
END $$;
CREATE FUNCTION app.quick() RETURNS text LANGUAGE sql AS $$ SELECT 'quick' $$;
EOS
register($node, 'ann', function => "app.$_") foreach qw(slow stubborn quick);
register($node, 'ann', function => 'app.slow', name => 'long', long_running => 'on');
register($node, 'ann', function => 'app.quick', name => 'ask_first', approval => 'ask');
register($node, 'ann', kind => 'client', name => 'ask_user');
register($node, 'ann', kind => 'http', name => 'job', server => 'services', path => '/job');
my $waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
my $lock = session($node);
$lock->query_safe('SELECT pg_advisory_lock(1), pg_advisory_lock(2)');

# Cancels a task and looks at what is left: the codes of its calls.
sub cancelled
{
	my ($session, $task, $what, @codes) = @_;

	is(as_role($node, 'ann', "SELECT chat.cancel_task('$task')"), 't', "$what: it is cancelled");
	my $turn = turn_of($node, $task);
	is($turn->{status}, 'cancelled', '  the task ends so');
	is($turn->{events}[-1]{type}, 'abort', '  listeners see it');
	is_deeply([ map { (eval { decode($_->{shown})->{code} }) // $_->{shown} } calls($node, $task) ],
		\@codes, '  every call has a result');
	sound($turn, $node, $what);
	$fake->forget;
	is(turn_of($node, ask($node, $session, 'and now? [[text=fine]]'))->{answer}{content}, 'fine',
		'  the session goes on');
	sound_requests($fake, $what);
	return;
}

# while an SQL tool runs; those that have ended keep their results
my ($session, $task) = start($node, '[[tool=slow args={"n":1} id=a tool=quick id=b tool=job id=c args='
	  . value('{"command":"gate=h"}') . ' tool=ask_user id=d tool=ask_first id=e]]');
$fake->wait_at_gate('h');
wait_for($node, "SELECT ($waiting) = 1");
wait_for($node, "SELECT delivered FROM chat.chat_tool_call WHERE task_id = '$task' AND call_id = 'b'");
my $aborted = $fake->stats->{aborted};
cancelled($session, $task, 'tools of all kinds', 'cancelled', 'quick', ('cancelled') x 3);
$fake->wait_for_stats(sub { $_->{aborted} > $aborted });
pass('the request to the service is ended');
wait_for($node, "SELECT ($waiting) = 0");
pass('the SQL tool is cancelled');
is(row($node, 'SELECT count(*) AS n FROM app.effect')->{n}, 0, 'it has had no effect');

# one that does not let itself be cancelled has none, either
($session, $task) = start($node, '[[tool=stubborn args={"n":2} id=a]]');
wait_for($node, "SELECT ($waiting) = 1");
cancelled($session, $task, 'a stubborn tool', 'cancelled');
$lock->query_safe('SELECT pg_advisory_unlock(2)');
wait_for($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'chat tool worker'");
is(row($node, 'SELECT count(*) AS n FROM app.effect')->{n}, 0, '  what it did is undone');
is((calls($node, $task))[0]{status}, 'cancelled', '  its result is not taken any more');

# calls that have not begun: both workers are busy
my @busy = map { start($node, '[[tool=slow args={"n":1} id=a]]') } 1 .. 2;
wait_for($node, "SELECT ($waiting) = 2");
($session, $task) = start($node, '[[tool=slow args={"n":7} id=a tool=slow args={"n":8} id=b]]');
wait_for($node, "SELECT count(*) = 2 FROM chat.chat_tool_call WHERE task_id = '$task' AND status = 'pending'");
cancelled($session, $task, 'calls that wait for a process', ('cancelled') x 2);

# a long operation, with others meanwhile
($session, $task) = start($node, '[[tool=job id=a args=' . value('{"command":"status=202"}') . ']]');
my ($operation) = wait_for_calls($node, $task, 'waiting', 1);
wait_for_task($node, ask($node, $session, 'meanwhile [[text=yes]]'));
cancelled($session, $task, 'an operation', 'cancelled');
is($node->safe_psql('postgres', "SELECT chat.complete_operation('$operation', '1')"), 'late', '  its end comes late');

# a long tool that waits its turn, a client tool, an approval
foreach my $tool ('long args={"n":9}', 'ask_user', 'ask_first')
{
	($session, $task) = start($node, "[[tool=$tool id=a]]");
	wait_for($node, "SELECT count(*) = 1 FROM chat.chat_tool_call AS c"
		  . " JOIN chat.chat_task AS t ON t.id = c.task_id WHERE task_id = '$task' AND t.status = 'waiting'");
	cancelled($session, $task, $tool, 'cancelled');
	is($node->safe_psql('postgres', "SELECT chat.cancel_task('$task')"), 'f', '  again is a no-op');
}

# the session is deleted while its tools run
my ($doomed) = start($node, '[[tool=job id=c args=' . value('{"command":"gate=h"}') . ']]');
$fake->wait_at_gate('h');
$aborted = $fake->stats->{aborted};
is(as_role($node, 'ann', "SELECT chat.delete_chat_session('$doomed')"), 't', 'a session is deleted');
$fake->wait_for_stats(sub { $_->{aborted} > $aborted });
pass('  its request is ended');
is(as_role($node, 'ann', "SELECT chat.delete_chat_session('$busy[0]')"), 't', 'another one, with an SQL tool');
$lock->query_safe('SELECT pg_advisory_unlock(1)');
is(turn_of($node, $busy[3])->{status}, 'completed', '  others go on');
wait_for($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'chat tool worker'");
is_deeply([ map { $_->{n} } rows($node, 'SELECT n FROM app.effect') ], [1], '  its tool has had no effect');

# heartbeats while a tool says nothing
$lock->query_safe('SELECT pg_advisory_lock(3)');
$session = create_session($node, owner => 'ann');
my $listener = listener($node, $session->{channel});
$task = ask($node, $session->{id}, '[[tool=slow args={"n":3} id=a]]');
$listener->until(sub { $_->{type} eq 'tool-input-available' });
my $beats = 0;
$listener->until(
	sub {
		$beats += $_->{type} eq 'data-heartbeat' && $_->{taskId} eq $task;
		return $beats == 3;
	});
pass('heartbeats while a tool runs');
$lock->query_safe('SELECT pg_advisory_unlock(3)');
my $turn = turn_of($node, $task);
is(scalar(of_type($turn, 'data-heartbeat')), 0, '  they are not stored');
sound($turn, $node, 'heartbeats');

$lock->quit;
$node->stop;
done_testing();
