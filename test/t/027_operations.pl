# Do the ends of tool calls that come from outside (the application, a service,
# somebody who approves) carry their task on, exactly once?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use IPC::Run ();
use PostgreSQL::Test::Utils;
use Test::More;

my $clients = 100;
my $fake = start_fake();
my $node = chat_cluster('main',
	conf => "chat.max_tool_calls = 60\nchat.max_context_messages = 100\nmax_connections = 140");
my $port = $fake->port;
create_server($node, $fake, retries => 0);
$node->safe_psql('postgres', <<"EOF");
CREATE SERVER services FOREIGN DATA WRAPPER chat_tool
	OPTIONS (url 'http://127.0.0.1:$port/tools');
CREATE ROLE ann LOGIN;
CREATE ROLE service LOGIN;
SELECT chat.grant_usage('ann'), chat.grant_callback('service');
GRANT USAGE ON FOREIGN SERVER fake, services TO ann;
CREATE FUNCTION public.note(what text) RETURNS text LANGUAGE sql AS \$\$ SELECT 'noted ' || what \$\$;
SET ROLE ann;
SELECT chat.register_tool(kind => 'client', name => 'ask_user');
SELECT chat.register_tool('public.note', approval => 'ask');
SELECT chat.register_tool(kind => 'client', name => 'ask_first', approval => 'ask');
SELECT chat.register_tool(kind => 'http', name => 'job', server => 'services',
	path => '/job', long_running => true, parameters => '{"type": "object"}');
EOF

# Starts a turn of ann whose answer has these directives; returns session and
# task.
sub start
{
	my ($directives) = @_;
	my $session = create_session($node, owner => 'ann');

	return ($session->{id}, ask($node, $session->{id}, "go [[$directives]]"));
}

# Waits until so many calls of a task have a status; returns their operations.
sub wait_for_calls
{
	my ($task, $status, $n) = @_;

	wait_for($node, <<"EOF");
SELECT count(*) = $n FROM chat.chat_tool_call AS c
	JOIN chat.chat_job AS j ON j.session_id = c.session_id AND j.kind = 'completion'
WHERE c.task_id = '$task' AND c.status = '$status' AND j.parked
EOF
	return map { $_->{operation_id} } rows($node, <<"EOF");
SELECT operation_id FROM chat.chat_tool_call WHERE task_id = '$task' ORDER BY position
EOF
}

# Runs an expression as a role; returns its value.
sub as
{
	my ($role, $expression) = @_;
	my $out = $node->safe_psql('postgres', "SET ROLE $role; SELECT $expression");

	return $out;
}

# Returns the events of a type.
sub of_type
{
	my ($turn, $type) = @_;
	return grep { $_->{type} eq $type } @{ $turn->{events} };
}

# Checks that a turn has ended once and well, with these last words.
sub ends_well
{
	my ($task, $words, $what) = @_;
	my $turn = turn_of($node, $task);
	my ($answer) = grep { $_->{role} eq 'assistant' } reverse @{ $turn->{messages} };

	is($turn->{status}, 'completed', "$what: completed")
	  or diag(encode($turn->{error}));
	is($answer->{content}, $words, '  the model was told');
	is(scalar(of_type($turn, 'finish')), 1, '  one end');
	is($turn->{steps}, 2, '  after two steps');
	return $turn;
}

# the application's tool
my ($session, $task) = start('tool=ask_user id=c1');
wait_for_calls($task, 'waiting', 1);
is(as('ann', "chat.session_status('$session')"), 'processing_tools', 'a tool is asked for');
is(as('ann', "chat.submit_tool_output('$session', 'c2', '1')"), 'f', 'no such call');
is(as('ann', "chat.submit_tool_output('$session', 'c1', '\"blue\"')"), 't', 'the application answers');
ends_well($task, 'Tool said: blue', 'client tool');
is(as('ann', "chat.session_status('$session')"), 'completed', 'all is done');
is(as('ann', "chat.submit_tool_output('$session', 'c1', '2')"), 'f', 'nothing waits any more');

($session, $task) = start('tool=ask_user id=c1');
wait_for_calls($task, 'waiting', 1);
as('ann', "chat.submit_tool_output('$session', 'c1', error => 'gone away')");
my $turn = ends_well($task,
	'Tool said: {"type":"error","message":"Tool ask_user failed: gone away","code":"tool_failed"}',
	'client tool with an error');
is(scalar(of_type($turn, 'tool-output-error')), 1, '  listeners see the error');

# the session's updated_at goes with each result that is stored
($session, $task) = start('tool=ask_user id=c1 tool=ask_user id=c2');
wait_for_calls($task, 'waiting', 2);
$node->safe_psql('postgres',
	"UPDATE chat.chat_session SET updated_at = '2001-01-01' WHERE id = '$session'");
as('ann', "chat.submit_tool_output('$session', 'c1', '1')");
wait_for($node, "SELECT content = '1' FROM chat.chat_message"
	  . " WHERE session_id = '$session' AND tool_call_id = 'c1'");
is( $node->safe_psql('postgres',
		"SELECT updated_at > '2001-01-01' FROM chat.chat_session WHERE id = '$session'"),
	't', 'a result sets updated_at');
as('ann', "chat.submit_tool_output('$session', 'c2', '2')");
wait_for_task($node, $task);

# approvals: allowed, denied, and one of the application's own
($session, $task) = start('tool=note args={"what":"it"} id=c1');
my ($operation) = wait_for_calls($task, 'approval', 1);
is(as('ann', "chat.approve_tool_call('$session', 'c1')"), 't', 'it is allowed');
$turn = ends_well($task, 'Tool said: noted it', 'approved');
is_deeply(
	[ map { [ @$_{qw(toolCallId approvalId)} ] } of_type($turn, 'tool-approval-request') ],
	[ [ 'c1', $operation ] ],
	'  listeners were asked');

($session, $task) = start('tool=note args={"what":"it"} id=c1');
wait_for_calls($task, 'approval', 1);
is(as('ann', "chat.deny_tool_call('$session', 'c1', 'not now')"), 't', 'it is denied');
$turn = ends_well($task,
	'Tool said: {"type":"error","message":"Tool note denied: not now","code":"denied"}',
	'denied');
is(scalar(of_type($turn, 'tool-output-denied')), 1, '  listeners see it');

($session, $task) = start('tool=ask_first id=c1');
wait_for_calls($task, 'approval', 1);
is(as('ann', "chat.approve_tool_call('$session', 'c1')"), 't', 'the application may');
wait_for_calls($task, 'waiting', 1);
as('ann', "chat.submit_tool_output('$session', 'c1', '[7]')");
ends_well($task, 'Tool said: [7]', 'approved client tool');

# an operation that a service ends: its role has nothing but the id
($session, $task) = start('tool=job args={"command":"status=202"} id=c1');
($operation) = wait_for_calls($task, 'waiting', 1);
is(as('service', "chat.operation_progress('$operation', '{\"done\": 40}')"), 't', 'a service reports');
wait_for($node, <<"EOF");
SELECT count(*) = 1 FROM chat.chat_event WHERE task_id = '$task'
	AND payload->>'preliminary' = 'true' AND payload->'output'->>'done' = '40'
EOF
is( $node->safe_psql('postgres', 'SELECT count(*) FROM chat.chat_tool_progress'),
	0, 'a report that was told is gone');
is(as('service', "chat.complete_operation('$operation', '{\"made\": 3}')"),
	'completed', 'it ends the operation');
$turn = turn_of($node, $task);
is($turn->{status}, 'completed', 'the turn goes on and ends')
  or diag(encode($turn->{error}));
is_deeply(
	[ map { $_->{output} } grep { !$_->{preliminary} } of_type($turn, 'tool-output-available') ],
	[ { made => 3 } ],
	'  with the result, once');
is(as('service', "chat.complete_operation('$operation', '4')"), 'duplicate', 'again is a no-op');

# what comes after the end is kept
($session, $task) = start('tool=job args={"command":"status=202"} id=c1');
($operation) = wait_for_calls($task, 'waiting', 1);
$node->safe_psql('postgres', "SELECT chat.cancel_task('$task')");
is(wait_for_task($node, $task)->{status}, 'cancelled', 'a task is cancelled');
is(as('service', "chat.complete_operation('$operation', '{\"made\": 5}')"), 'late', 'its operation ends late');
is(row($node, "SELECT late->'result' AS late FROM chat.chat_tool_call WHERE operation_id = '$operation'")->{late}{made},
	5, '  and the result is kept');
is(as('service', "chat.operation_progress('$operation', '1')"), 'f', '  nobody wants its progress');

# the calls of a step ended by a hundred clients at once, each call by two: one
# that is a service, and one that is the application; meanwhile functions of
# the same step end in tool workers, and HTTP services answer
my $calls = $clients / 2;
my $others = 5;
$fake->forget;
$node->safe_psql('postgres', <<'EOF');
CREATE FUNCTION public.meet() RETURNS text LANGUAGE sql AS
	$$ SELECT 'met' FROM pg_advisory_xact_lock_shared(1) $$;
SET ROLE ann;
SELECT chat.register_tool('public.meet');
SELECT chat.register_tool(kind => 'http', name => 'fetch', server => 'services',
	path => '/fetch', parameters => '{"type": "object"}');
EOF
my $barrier = $node->background_psql('postgres');
$barrier->query_safe('SELECT pg_advisory_lock(1)');
($session, $task) = start(join ' ', (map { "tool=ask_user id=i$_" } 1 .. $calls),
	(map { "tool=meet id=m$_ tool=fetch id=f$_ args=%7B%22command%22:%22gate=ends%20text=fetched%22%7D" } 1 .. $others));
wait_for($node, <<"EOF");
SELECT count(*) = $calls FROM chat.chat_tool_call WHERE task_id = '$task' AND status = 'waiting'
EOF
$fake->get_json("/gate/ends?wait=$others");
$node->safe_psql('postgres', 'CREATE TABLE said (n integer, what text)');
my $script = PostgreSQL::Test::Utils::tempdir() . '/ends.sql';
append_to_file($script, <<"EOF");
\\set n :client_id / 2 + 1
\\set service :client_id % 2
SELECT pg_advisory_lock_shared(1);
\\if :service
INSERT INTO said SELECT :n, chat.complete_operation(operation_id, to_jsonb(:client_id))
FROM chat.chat_tool_call WHERE task_id = '$task' AND position = :n;
\\else
INSERT INTO said SELECT :n, CASE WHEN chat.submit_tool_output('$session', 'i' || :n, to_jsonb(:client_id))
	THEN 'completed' ELSE 'duplicate' END;
\\endif
EOF
my ($out, $err) = ('', '');
my $run = IPC::Run::start(
	[
		'pgbench', '-n', '-c', $clients, '-j', 2, '-t', 1, '-f', $script,
		'-h', $node->host, '-p', $node->port, 'postgres'
	],
	'>', \$out, '2>', \$err);
# the functions wait at the same barrier, as many as there are tool workers
wait_for($node, <<"EOF");
SELECT count(*) = $clients + 4 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
EOF
$barrier->quit;
$fake->open_gate('ends', $others);
ok($run->finish, "$clients clients have ended $calls calls") or diag($err);
is_deeply(
	[ map { [ @$_{qw(what n)} ] } rows($node, 'SELECT what, count(*) AS n FROM said GROUP BY what ORDER BY what') ],
	[ [ 'completed', $calls ], [ 'duplicate', $calls ] ],
	'each call was ended once');
$turn = turn_of($node, $task);
is($turn->{status}, 'completed', 'the task goes on and ends')
  or diag(encode($turn->{error}));
is(scalar(my @requests = $fake->completions), 2, '  by one request more');
is($turn->{steps}, 2, '  after two steps');
my @results = map { $_->{content} } grep { $_->{role} eq 'tool' } @{ $turn->{messages} };
is( (grep { int($results[$_] / 2) == $_ } 0 .. $calls - 1),
	$calls, '  every call has its result');
is_deeply([ @results[ $calls .. $#results ] ], [ ('met', 'fetched') x $others ],
	'  those that were run here, too');
is( scalar(grep { !$_->{preliminary} } of_type($turn, 'tool-output-available')),
	$calls + 2 * $others, '  that listeners saw once');
is(scalar(of_type($turn, 'finish')), 1, '  and one end');

$node->stop;
done_testing();
