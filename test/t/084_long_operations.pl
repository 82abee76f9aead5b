# Does a long operation leave its session free, and does its end, whoever
# brings it, whenever and how often, reach the model exactly once?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use ChatTest::Tools;
use Test::More;

my $fake = start_fake();
my $node = tool_cluster($fake, 'restart_after_crash = on');
$node->safe_psql('postgres', <<'EOS');
CREATE TABLE app.queue (operation uuid, what text);
GRANT ALL ON app.queue TO ann;
-- puts work into the application's own queue
CREATE FUNCTION app.enqueue(what text) RETURNS jsonb LANGUAGE sql AS $$
	INSERT INTO app.queue SELECT c.operation_id, what FROM chat.current_tool_call() AS c;
	SELECT '{"status": "accepted"}'::jsonb $$;
CREATE FUNCTION app.slow(n integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM chat.report_progress('"begun"');
	PERFORM pg_advisory_xact_lock(n);
	INSERT INTO app.queue VALUES (NULL, 'slow');
	RETURN 'slow ' || n;
END $$;
CREATE FUNCTION app.bad(n integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_advisory_xact_lock(n);
	RAISE EXCEPTION 'it broke';
END $$;
CREATE FUNCTION app.now() RETURNS text LANGUAGE sql AS $$ SELECT 'at once' $$;
CREATE ROLE service LOGIN;
SELECT chat.grant_callback('service');
EOS
register($node, 'ann', function => 'app.enqueue');
register($node, 'ann', function => 'app.now');
register($node, 'ann', function => 'app.slow', long_running => 'on');
register($node, 'ann', function => 'app.bad', long_running => 'on');
register($node, 'ann', kind => 'http', name => 'job', server => 'services', path => '/job', long_running => 'on');
register($node, 'ann', kind => 'http', name => 'brief', server => 'services', path => '/job', long_running => 'on',
	timeout => '300 ms');
register($node, 'ann', kind => 'http', name => 'accepts', server => 'services', path => '/job');
register($node, 'ann', kind => 'client', name => 'ask_user');
register($node, 'ann', kind => 'client', name => 'ask_briefly', timeout => '300 ms');
register($node, 'ann', function => 'app.now', name => 'ask_first', approval => 'ask', timeout => '1 ms');
register($node, 'ann', function => 'app.slow', name => 'ask_slow', approval => 'ask', long_running => 'on');

my $args = value('{"command":"status=202"}');

# Returns a session's messages: role and content.
sub conversation
{
	my ($session) = @_;
	return map { [ $_->{role}, $_->{content} // '' ] } rows($node,
		"SELECT role, content FROM chat.chat_message WHERE session_id = '$session' ORDER BY sequence");
}

# Returns the status of a session.
sub status
{
	my ($session) = @_;
	return as_role($node, 'ann', "SELECT chat.session_status('$session')");
}

# Ends an operation as a service does.
sub complete
{
	my ($operation, $rest) = @_;
	return as_role($node, 'service', "SELECT chat.complete_operation('$operation', $rest)");
}

#
# The operation goes on, the session is free
#
my ($session, $task) = start($node, "[[tokens=1 tool=job id=c1 args=$args thentext=I%20see]]");
my ($operation) = wait_for_calls($node, $task, 'waiting', 1);
is_deeply(
	decode((calls($node, $task))[0]{shown}),
	{
		type => 'operation_pending', operation_id => $operation, tool_name => 'job',
		message => 'The operation goes on; its result will follow.'
	},
	'the pending document is in the tool message');
my @started = grep { $_->{type} eq 'tool-output-available' } stored_events($node, $task);
is_deeply(
	[ map { [ $_->{preliminary}, $_->{output} ] } @started ],
	[ [ \1, { type => 'operation_started', operation_id => $operation, tool_name => 'job' } ] ],
	'listeners hear that it has started');
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$task'")->{status}, 'waiting', 'the task waits');
is(status($session), 'processing_tools', 'the session says so');
$fake->forget;
my $other = ask($node, $session, 'meanwhile [[text=yes]]');
is(wait_for_task($node, $other)->{status}, 'completed', 'the session is free for other turns');
my @sent = map { [ $_->{role}, $_->{content} // '' ] } @{ $fake->last_request->{body}{messages} };
like($sent[2][1], qr/operation_pending/, '  their requests show that it goes on');
sound_requests($fake, 'a turn meanwhile');
$fake->forget;
is(complete($operation, q('{"made": 3}')), 'completed', 'it ends');
my $turn = turn_of($node, $task);
is($turn->{status}, 'completed', '  its task goes on by itself, and ends') or diag(encode($turn->{error}));
is((calls($node, $task))[0]{shown}, '{"made": 3}', '  the result replaces the pending document');
@sent = @{ $fake->last_request->{body}{messages} };
is($sent[-1]{role}, 'user', '  where another turn came between, the request closes with an item');
like($sent[-1]{content}, qr/^Operation \Q$operation\E \(job\) .* completed\. Its result:\n\{"made": 3\}$/,
	'  that says which operation ended with what');
sound_requests($fake, 'the continuation');
is_deeply([ outputs($turn) ], [ { made => 3 } ], '  listeners see the result, once');
sound($turn, $node, 'an operation');
is(status($session), 'completed', '  the session is done');
is_deeply([ map { $_->[0] } conversation($session) ], [qw(user assistant tool user assistant assistant)],
	'  the messages are in the order of events');
is(complete($operation, "'1'"), 'duplicate', 'again is a no-op');

# without another turn the result is the end of the request
$fake->forget;
($session, $task) = start($node, "[[tool=job id=c1 args=$args]]");
($operation) = wait_for_calls($node, $task, 'waiting', 1);
complete($operation, q('"done"'));
$turn = turn_of($node, $task);
is($turn->{answer}{content}, 'Tool said: done', 'without another turn');
is($fake->last_request->{body}{messages}[-1]{role}, 'tool', '  nothing is added to the request');
is($fake->last_request->{body}{messages}[-1]{content}, 'done', '  which shows the result in its place');

# failures are told, with and without details
($session, $task) = start($node, "[[tool=job id=c1 args=$args]]");
($operation) = wait_for_calls($node, $task, 'waiting', 1);
complete($operation, q('{"page": 7}', success => false, error => 'no paper'));
$turn = turn_of($node, $task);
is_deeply(
	decode((calls($node, $task))[0]{shown}),
	{
		type => 'error', message => 'Tool job failed: no paper', code => 'operation_failed', details => { page => 7 }
	},
	'a failure is told to the model');
is((of_type($turn, 'tool-output-error'))[0]{errorText}, 'Tool job failed: no paper', '  and to listeners');
sound($turn, $node, 'a failure');

# the same where another turn came between
($session, $task) = start($node, "[[tool=job id=c1 args=$args]]");
($operation) = wait_for_calls($node, $task, 'waiting', 1);
wait_for_task($node, ask($node, $session, 'meanwhile [[text=yes]]'));
$fake->forget;
complete($operation, q(NULL, success => false, error => 'no ink'));
$turn = turn_of($node, $task);
like($fake->last_request->{body}{messages}[-1]{content},
	qr/^Operation \Q$operation\E \(job\) .* failed\. Its result:\n\{.*Tool job failed: no ink/, '  the closing item tells of a failure, too');
sound_requests($fake, 'a failure after another turn');

# a service that answers itself has the time of an operation, too
$node->safe_psql('postgres', "ALTER SYSTEM SET chat.tool_timeout = '50ms'; SELECT pg_reload_conf()");
wait_for($node, "SELECT current_setting('chat.tool_timeout') = '50ms'");
($session, $task) = start($node, '[[tool=job id=c1 args=' . value('{"command":"delay=200 text=slowly"}') . ']]');
$turn = turn_of($node, $task);
is((calls($node, $task))[0]{shown}, 'slowly', 'a long service is not ended by chat.tool_timeout');
($session, $task) = start($node, '[[tool=accepts id=c1 args=' . value('{"command":"hang=1"}') . ']]');
$turn = turn_of($node, $task);
is(decode((calls($node, $task))[0]{shown})->{code}, 'timeout', '  any other one is');
$node->safe_psql('postgres', 'ALTER SYSTEM RESET chat.tool_timeout; SELECT pg_reload_conf()');
wait_for($node, "SELECT current_setting('chat.tool_timeout') = '1min'");

# nobody ends it
($session, $task) = start($node, "[[tool=brief id=c1 args=$args]]");
$turn = turn_of($node, $task);
is($turn->{status}, 'completed', 'nobody ends it');
($operation) = map { $_->{operation_id} } calls($node, $task);
is_deeply(
	decode((calls($node, $task))[0]{shown}),
	{ type => 'error', message => 'Tool brief failed: nobody ended it in time', code => 'timeout' },
	'  the model is told');
is(complete($operation, q('"too late"')), 'late', '  what comes after that is late');
is(row($node, "SELECT late->>'result' AS late FROM chat.chat_tool_call WHERE operation_id = '$operation'")->{late},
	'too late', '  and kept');
sound($turn, $node, 'nobody ends it');
$node->safe_psql('postgres', "ALTER SYSTEM SET chat.operation_timeout = '300ms'; SELECT pg_reload_conf()");
wait_for($node, "SELECT current_setting('chat.operation_timeout') = '300ms'");
($session, $task) = start($node, "[[tool=job id=c1 args=$args tool=ask_user id=c2]]");
$turn = turn_of($node, $task);
is_deeply([ map { decode($_->{shown})->{code} } calls($node, $task) ], [ ('timeout') x 2 ], 'chat.operation_timeout');
sound($turn, $node, 'chat.operation_timeout');
$node->safe_psql('postgres', 'ALTER SYSTEM RESET chat.operation_timeout; SELECT pg_reload_conf()');

# the callback overtakes the answer
($session, $task) = start($node, '[[tool=job id=c1 args=' . value('{"command":"status=202 gatehead=late"}') . ']]');
$fake->wait_at_gate('late');
($operation) = map { $_->{operation_id} } calls($node, $task);
is(complete($operation, q('"first"')), 'completed', 'T54: a callback that overtakes the 202');
$turn = turn_of($node, $task);
is($turn->{answer}{content}, 'Tool said: first', '  counts');
$fake->open_gate('late');
sound($turn, $node, 'a callback that overtakes');

# the same operation again, while it goes on
$fake->forget;
($session, $task) = start($node, "[[tool=job id=c1 args=$args]]");
($operation) = wait_for_calls($node, $task, 'waiting', 1);
$other = ask($node, $session, "impatient [[tool=job id=c1 args=$args tool=job id=c2 args="
	  . value('{"command":"status=200 text=other"}') . ']]');
$turn = turn_of($node, $other);
my @again = map { $_->{shown} } calls($node, $other);
is_deeply(
	[ @{ decode($again[0]) }{qw(type operation_id tool_name)} ],
	[ 'operation_in_progress', $operation, 'job' ],
	'the same operation is not started twice');
is($again[1], 'other', '  one with other arguments is');
is(scalar(grep { $_->{path} eq '/tools/job' } $fake->requests), 2, '  the service was asked twice, not three times');
sound($turn, $node, 'the same operation');
complete($operation, q('"done"'));
$turn = turn_of($node, $task);
is((calls($node, $task))[0]{shown}, 'done', '  it ends where it was started');
sound($turn, $node, 'the first of them');
sound_requests($fake, 'the same operation');
# nor twice in one step
$fake->forget;
($session, $task) = start($node, "[[tool=job id=c1 args=$args tool=job id=c2 args=$args tool=now id=c3 tool=now id=c4]]");
my ($one) = wait_for_calls($node, $task, 'waiting', 1);
is(scalar(grep { $_->{path} eq '/tools/job' } $fake->requests), 1, 'the same operation twice in a step: one request');
complete($one, q('"once"'));
$turn = turn_of($node, $task);
my @twice = map { $_->{shown} } calls($node, $task);
is_deeply([ @{ decode($twice[1]) }{qw(type operation_id)} ], [ 'operation_in_progress', $one ], '  the other call says so');
is_deeply([ @twice[ 0, 2, 3 ] ], [ 'once', ('at once') x 2 ], '  what is no operation runs as often as it is asked for');
sound($turn, $node, 'the same operation twice in a step');
($other) = (start($node, "[[tool=job id=c1 args=$args]]"))[1];
wait_for_calls($node, $other, 'waiting', 1);
pass('  after that, or in another session, it is another one');

#
# accepted: any kind may go on elsewhere
#
($session, $task) = start($node, '[[tool=enqueue id=c1 args={"what":"a"} tool=accepts id=c2 args=' . $args
	  . ' tool=accepts id=c3 args=' . value('{"command":"[[text={%22status%22:%22accepted%22}]]"}') . ' tool=now id=c4]]');
my @operations = wait_for_calls($node, $task, 'waiting', 3);
is_deeply([ rows($node, 'SELECT operation, what FROM app.queue') ],
	[ { operation => $operations[0], what => 'a' } ], 'an SQL tool has put work into a queue, and knows its id');
is(row($node, "SELECT detached FROM chat.chat_task WHERE id = '$task'")->{detached} ? 1 : 0, 1, 'the session is free');
is(complete($operations[0], q('{"n": 1}')), 'completed', 'the first ends');
is(complete($operations[2], q('{"n": 3}')), 'completed', 'the third ends');
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$task'")->{status}, 'waiting', 'the model waits for all');
is(complete($operations[1], q('{"n": 2}')), 'completed', 'the second ends');
$turn = turn_of($node, $task);
is_deeply([ map { $_->{shown} } calls($node, $task) ], [ '{"n": 1}', '{"n": 2}', '{"n": 3}', 'at once' ],
	'all results in their places');
is($turn->{steps}, 2, 'T55: one continuation');
sound($turn, $node, 'accepted');

# the application, too: its output says so, and its session is free from then on
($session, $task) = start($node, '[[tool=ask_user id=c1 tool=ask_user id=c2]]');
@operations = wait_for_calls($node, $task, 'waiting', 2);
foreach my $id ('c1', 'c2')
{
	is(as_role($node, 'ann', qq(SELECT chat.submit_tool_output('$session', '$id', '{"status": "accepted"}'))), 't',
		"a client tool says that $id goes on elsewhere");
}
is(as_role($node, 'ann', qq(SELECT chat.submit_tool_output('$session', 'c1', '{"status": "accepted"}'))), 'f', '  once');
wait_for($node, "SELECT detached FROM chat.chat_task WHERE id = '$task'");
is(decode((calls($node, $task))[0]{shown})->{type}, 'operation_pending', '  the pending document is in the tool message');
is(wait_for_task($node, ask($node, $session, 'meanwhile [[text=yes]]'))->{status}, 'completed', '  the session is free');
is(complete($operations[0], q('"a"')), 'completed', '  a callback ends one');
is(as_role($node, 'ann', qq(SELECT chat.submit_tool_output('$session', 'c2', '"b"'))), 't', '  the application the other');
$turn = turn_of($node, $task);
is_deeply([ map { $_->{shown} } calls($node, $task) ], [ 'a', 'b' ], '  both results are there');
is_deeply([ map { $_->{output}{type} } grep { $_->{preliminary} } of_type($turn, 'tool-output-available') ],
	[ ('operation_started') x 2 ], '  listeners heard that they go on');
sound($turn, $node, 'a client tool that goes on');

#
# A long SQL tool runs in its own time
#
$node->safe_psql('postgres', 'TRUNCATE app.queue');
my $lock = session($node);
$lock->query_safe('SELECT pg_advisory_lock(1), pg_advisory_lock(2), pg_advisory_lock(3)');
($session, $task) = start($node, '[[tool=slow args={"n":1} id=c1]]');
wait_for($node, "SELECT count(*) = 1 FROM chat.chat_event WHERE task_id = '$task' AND payload->>'output' = 'begun'");
is(wait_for_task($node, ask($node, $session, 'meanwhile [[text=yes]]'))->{status}, 'completed',
	'while a long SQL tool runs the session is free');
# the continuation waits for the session, not the other way round
my $long = ask($node, $session, 'later [[tokens=3 gateat=1:g]]');
$fake->wait_at_gate('g');
$lock->query_safe('SELECT pg_advisory_unlock(1)');
wait_for($node, "SELECT delivered FROM chat.chat_tool_call WHERE task_id = '$task'");
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$task'")->{status}, 'waiting',
	'its continuation waits until the session is free');
$fake->open_gate('g');
is(wait_for_task($node, $long)->{status}, 'completed', '  another turn comes to its end');
$turn = turn_of($node, $task);
is($turn->{status}, 'completed', '  then it goes on');
is(row($node, 'SELECT count(*) AS n FROM app.queue')->{n}, 1, '  it has run once');
sound($turn, $node, 'a long SQL tool');
sound_requests($fake, 'a long SQL tool');

# a failure of it
$lock->query_safe('SELECT pg_advisory_unlock(2)');
($session, $task) = start($node, '[[tool=bad args={"n":2} id=c1]]');
$turn = turn_of($node, $task);
is(decode((calls($node, $task))[0]{shown})->{message}, 'Tool bad failed: it broke', 'a long SQL tool that fails');
sound($turn, $node, 'a long SQL tool that fails');

# a crash of the server while it goes on
($session, $task) = start($node, "[[tool=job id=c1 args=$args tool=slow id=c2 args={\"n\":3}]]");
@operations = wait_for_calls($node, $task, 'waiting', 1);
wait_for($node, "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted");
kill_everything($node);
$node->start;
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$task'")->{status}, 'waiting', 'after a crash it still waits');
is(complete($operations[0], q('"after the crash"')), 'completed', '  and can be ended');
$turn = turn_of($node, $task);
is_deeply([ map { $_->{shown} } calls($node, $task) ], [ 'after the crash', 'slow 3' ], '  what ran has run again');
is(row($node, "SELECT count(*) AS n FROM app.queue WHERE what = 'slow'")->{n}, 2, '  with one effect');
sound($turn, $node, 'a crash');
$lock = session($node);

#
# The application's tools and approvals keep the session
#
($session, $task) = start($node, '[[tool=ask_user id=c1]]');
wait_for_calls($node, $task, 'waiting', 1);
$other = ask($node, $session, 'meanwhile [[text=yes]]');
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$other'")->{status}, 'queued',
	'a client tool keeps the session: other messages wait');
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$task'")->{status}, 'waiting', '  its task waits');
is(status($session), 'processing_tools', '  the session says so');
as_role($node, 'ann', qq(SELECT chat.submit_tool_output('$session', 'c1', '{"colour": "blue"}')));
$turn = turn_of($node, $task);
is($turn->{answer}{content}, 'Tool said: {"colour": "blue"}', '  its output goes to the model');
is(wait_for_task($node, $other)->{status}, 'completed', '  then the others have their turn');
is(status($session), 'completed', '  and all is done');
sound($turn, $node, 'a client tool');

# a client tool beside an operation: the session is kept until it is done
($session, $task) = start($node, "[[tool=job id=c1 args=$args tool=ask_user id=c2]]");
@operations = wait_for_calls($node, $task, 'waiting', 2);
$other = ask($node, $session, 'meanwhile [[text=yes]]');
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$other'")->{status}, 'queued', 'beside an operation, too');
as_role($node, 'ann', "SELECT chat.submit_tool_output('$session', 'c2', '1')");
is(wait_for_task($node, $other)->{status}, 'completed', '  once only the operation is left, it is free');
complete($operations[0], "'2'");
$turn = turn_of($node, $task);
is_deeply([ map { $_->{shown} } calls($node, $task) ], [ 2, 1 ], '  both results are there');
sound($turn, $node, 'both kinds');

# deadlines
($session, $task) = start($node, '[[tool=ask_briefly id=c1 tool=ask_first id=c2]]');
wait_for($node, "SELECT status = 'failed' FROM chat.chat_tool_call WHERE task_id = '$task' AND call_id = 'c1'");
is(row($node, "SELECT status FROM chat.chat_tool_call WHERE task_id = '$task' AND call_id = 'c2'")->{status}, 'approval',
	"the tool's own time is not that of the approval");
as_role($node, 'ann', "SELECT chat.deny_tool_call('$session', 'c2')");
$turn = turn_of($node, $task);
is_deeply([ map { decode($_->{shown})->{code} } calls($node, $task) ], [ 'timeout', 'denied' ],
	'nobody answers: the model is told');
sound($turn, $node, 'a deadline of a client tool');
$node->safe_psql('postgres', "ALTER SYSTEM SET chat.operation_timeout = '300ms'; SELECT pg_reload_conf()");
wait_for($node, "SELECT current_setting('chat.operation_timeout') = '300ms'");
($session, $task) = start($node, '[[tool=ask_first id=c1]]');
$turn = turn_of($node, $task);
$node->safe_psql('postgres', 'ALTER SYSTEM RESET chat.operation_timeout; SELECT pg_reload_conf()');
wait_for($node, "SELECT current_setting('chat.operation_timeout') = '10min'");
is(decode((calls($node, $task))[0]{shown})->{code}, 'timeout', 'nobody approves: the model is told');
is(scalar(of_type($turn, 'tool-approval-request')), 1, '  listeners were asked');
sound($turn, $node, 'deadlines');

# a long tool that has to be approved first
($session, $task) = start($node, '[[tool=ask_slow args={"n":9} id=c1]]');
wait_for_calls($node, $task, 'approval', 1);
$other = ask($node, $session, 'meanwhile [[text=yes]]');
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$other'")->{status}, 'queued', 'an approval keeps the session');
is(row($node, 'SELECT count(*) AS n FROM app.queue')->{n}, 2, '  and nothing runs before it');
as_role($node, 'ann', "SELECT chat.approve_tool_call('$session', 'c1')");
$turn = turn_of($node, $task);
is((calls($node, $task))[0]{shown}, 'slow 9', '  approved, it runs');
wait_for_task($node, $other);
sound($turn, $node, 'a long tool with approval');

#
# Steps with tools, some of them long, one after the other
#
$fake->forget;
($session, $task) = start($node, "[[at=0 tool=job id=a args=$args]] [[at=1 tool=now id=b]] [[at=2 tool=job id=c args=$args tool=now id=d]] [[at=3 text=ok]]");
foreach my $id ('a', 'c')
{
	wait_for($node, "SELECT count(*) = 1 FROM chat.chat_tool_call WHERE task_id = '$task' AND call_id = '$id' AND status = 'waiting'");
	my ($call) = grep { $_->{call_id} eq $id } calls($node, $task);
	complete($call->{operation_id}, "'\"$id\"'");
}
$turn = turn_of($node, $task);
is_deeply([ map { $_->{shown} } calls($node, $task) ], [ 'a', 'at once', 'c', 'at once' ], 'many steps');
is($turn->{answer}{content}, 'ok', '  the answer');
sound($turn, $node, 'many steps');
sound_requests($fake, 'many steps');

$lock->quit;
$node->stop;
done_testing();
