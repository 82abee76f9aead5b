# Several tasks of one session, some of which wait for operations: do they
# take turns, is nobody forgotten, and do two of them never run at once?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Tools;
use Test::More;

my $fake = start_fake();
my $node = tool_cluster($fake);

register($node, 'ann', kind => 'http', name => 'job', server => 'services',
	path => '/job', long_running => 'true', parameters => '{"type": "object"}');
register($node, 'ann', kind => 'client', name => 'ask_user');

my $n = 0;

# Returns directives that call the operation; each time it is another one.
sub operate
{
	$n++;
	return 'tool=job steps=1 args='
	  . value("{\"command\":\"status=202\",\"n\":$n}");
}

# Starts another turn in a session.
sub next_task
{
	my ($session, $message) = @_;
	return ask($node, $session, $message);
}

# Starts a turn that waits for an operation and has left the session; returns
# its task and the operation.
sub detached
{
	my ($session) = @_;
	my $task = next_task($session, 'go [[' . operate() . ']]');
	my ($operation) = wait_for_calls($node, $task, 'waiting', 1);

	wait_for($node, "SELECT detached FROM chat.chat_task WHERE id = '$task'");
	return ($task, $operation);
}

# Ends operations, all in one transaction.
sub complete
{
	$node->safe_psql('postgres', join ' ', 'BEGIN;',
		(map { "SELECT chat.complete_operation('$_', '\"done\"');" } @_),
		'COMMIT;');
	return;
}

# Waits until a task is done with its calls and waits for its session.
sub wait_ready
{
	my ($task) = @_;
	wait_for($node, <<"EOS");
SELECT bool_and(c.delivered) AND bool_and(j.run_at = 'infinity')
FROM chat.chat_tool_call AS c JOIN chat.chat_job AS j
	ON j.session_id = c.session_id AND j.task_id = c.task_id
		AND j.kind = 'completion'
WHERE c.task_id = '$task'
EOS
	return;
}

# Asserts that a task ends like this.
sub ends
{
	my ($task, $status, $what) = @_;
	my $row = wait_for_task($node, $task);

	is($row->{status}, $status, $what) or diag(encode($row->{error}));
	return;
}

# Returns a new session of ann.
sub new_session
{
	return create_session($node, owner => 'ann')->{id};
}

# two that are done wait for a third, and are woken by the same end
my $session = new_session();
my ($first, $op1) = detached($session);
my ($second, $op2) = detached($session);
my $third = next_task($session, 'third [[tokens=2 gate=g]]');
$fake->wait_at_gate('g');
complete($op1, $op2);
wait_ready($_) foreach $first, $second;
$fake->open_gate('g', 10);
ends($third, 'completed', 'the task that has the session ends');
ends($_, 'completed', '  and those that wait for it go on, one after the other')
  foreach $first, $second;

# others, of other sessions, were not held up by that
my $other = new_session();
my ($task, $op) = detached($other);
complete($op);
ends($task, 'completed', 'tools of another session work');

# one that is done goes on when the other leaves the session
$session = new_session();
($first, $op1) = detached($session);
$second = next_task($session,
	'second [[' . operate() . ' gatehead=h]]');
$fake->wait_at_gate('h');
complete($op1);
wait_ready($first);
$fake->open_gate('h', 10);
ends($first, 'completed', 'a task takes the session that another has left');
($op2) = wait_for_calls($node, $second, 'waiting', 1);
complete($op2);
ends($second, 'completed', '  which takes it back');

# one that waits for its client keeps the session, whatever others do
$session = new_session();
($first, $op1) = detached($session);
$second = next_task($session, 'second [[tool=ask_user args={} steps=1]]');
($op2) = wait_for_calls($node, $second, 'waiting', 1);
$third = next_task($session, 'third [[tokens=1]]');
complete($op1);
wait_ready($first);
is( row($node, "SELECT status FROM chat.chat_task WHERE id = '$third'")->{status},
	'queued', 'a task does not start while another waits for its client');
$node->safe_psql('postgres', "SELECT chat.cancel_task('$first')");
ends($first, 'cancelled', 'a task that waits for the session is cancelled');
is( row($node, "SELECT status FROM chat.chat_task WHERE id = '$third'")->{status},
	'queued', '  and the next one has not started');
complete($op2);
ends($second, 'completed', 'the client answers');
ends($third, 'completed', '  and the next one runs');

# two end at once, and one is queued behind them
$session = new_session();
($first, $op1) = detached($session);
$second = next_task($session, 'second [[tool=ask_user args={} steps=1]]');
wait_for_calls($node, $second, 'waiting', 1);
$third = next_task($session, 'third [[tokens=1]]');
$node->safe_psql('postgres',
	"SELECT chat.cancel_task(t) FROM unnest('{$first, $second}'::uuid[]) AS t");
ends($_, 'cancelled', 'one of two is cancelled') foreach $first, $second;
ends($third, 'completed', '  and the next one runs');
is( row($node, "SELECT steps FROM chat.chat_task WHERE id = '$third'")->{steps},
	1, '  once');

# one is done in the moment in which the one that has the session ends
$session = new_session();
($first, $op1) = detached($session);
$second = next_task($session, 'second [[tool=ask_user args={} steps=1]]');
($op2) = wait_for_calls($node, $second, 'waiting', 1);
$node->safe_psql('postgres', <<"EOS");
BEGIN;
SELECT chat.complete_operation('$op1', '1');
SELECT chat.cancel_task('$second');
COMMIT;
EOS
ends($second, 'cancelled', 'the task that has the session is cancelled');
ends($first, 'completed', '  and the other goes on');

is(row($node, 'SELECT count(*) FROM chat.chat_job')->{count}, 0,
	'no job is left');
$node->stop;
done_testing();
