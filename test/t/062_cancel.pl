# Does cancel_task end a task at once, whatever it is at: the transfer is
# closed, running SQL is cancelled, what was received stays, usage is known,
# listeners see one abort; and does it never hit anything else (T28, T40, T50)?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => "chat.max_streams = 3\nchat.retry_base_delay = 1h\nchat.retry_max_delay = 1h");
create_server($node, $fake);

# Cancels a task; true or false as the function says.
sub cancel
{
	my ($task) = @_;
	return $node->safe_psql('postgres', "SELECT chat.cancel_task('$task')") eq 't';
}

# The messages of a session, as role and content.
sub messages
{
	my ($session) = @_;
	return [ map { "$_->{role}: $_->{content}" } rows($node,
			"SELECT * FROM chat.get_chat_messages('$session')") ];
}

my $session = create_session($node);
my $id = $session->{id};
my $listener = listener($node, $session->{channel});

# while it streams; the next task of the session is none of its business
my $task = ask($node, $id, 'one [[tokens=10 gateat=5:a]]');
my $next = ask($node, $id, 'two [[tokens=3 gateat=1:b]]');
$listener->until(sub { ($_[0]{delta} // '') =~ /t4 $/ });
my $aborted = $fake->stats->{aborted};
ok(cancel($task), 'a task that streams is cancelled');
$fake->wait_for_stats(sub { $_->{aborted} == $aborted + 1 });
pass('its connection is closed');
my @events = $listener->turn($task);
is($events[-1]{type}, 'abort', 'listeners see an abort');
my $row = wait_for_task($node, $task);
is($row->{status}, 'cancelled', 'the task is cancelled');
is($row->{error}{code}, 'cancelled', 'and says so');
cmp_ok($row->{completion_tokens}, '>', 0, 'T50: its tokens are counted');
ok($row->{usage}{estimated}, 'T50: and said to be a guess');
cmp_ok($row->{prompt_tokens}, '>', 0, 'T50: the question has cost, too');
my $answer = row($node, "SELECT content, metadata FROM chat.chat_message"
	  . " WHERE task_id = '$task' AND role = 'assistant'");
is($answer->{content}, 't0 t1 t2 t3 t4 ', 'what was received stays');
ok($answer->{metadata}{interrupted}, 'marked as interrupted');
is((grep { $_->{type} =~ /^(abort|finish)$/ } stored_events($node, $task)), 1,
	'one terminal event');
$fake->wait_at_gate('b');
ok(!cancel($task), 'cancelling twice is harmless');
is(row($node, 'SELECT bool_or(cancel) AS c FROM chat.chat_job')->{c}, JSON::PP::false,
	'T40: it does not hit the next one');
$fake->open_gate('b');
is(wait_for_task($node, $next)->{status}, 'completed', 'which completes');
ok(!cancel($next), 'cancelling too late is harmless');
is(wait_for_task($node, $next)->{status}, 'completed', 'and changes nothing');
ok(!cancel('00000000-0000-0000-0000-000000000000'), 'nor does a task that is none');

# before the first token
$task = ask($node, $id, 'silent [[gatehead=c]]');
$fake->wait_at_gate('c');
$aborted = $fake->stats->{aborted};
ok(cancel($task), 'a task without an answer yet is cancelled');
$fake->wait_for_stats(sub { $_->{aborted} == $aborted + 1 });
$row = wait_for_task($node, $task);
is($row->{status}, 'cancelled', 'it ends');
cmp_ok($row->{prompt_tokens}, '>', 0, 'T50: the question was sent');
is( row($node, "SELECT count(*) FROM chat.chat_message WHERE task_id = '$task'"
		  . " AND role = 'assistant'")->{count},
	0, 'there is no message');

# while somebody holds the session: the transfer ends all the same
$task = ask($node, $id, 'held [[tokens=4 gateat=2:h]]');
$fake->wait_at_gate('h');
$aborted = $fake->stats->{aborted};
my $pid = wait_for_worker($node);
pause_worker($node, $pid);
ok(cancel($task), 'a task is cancelled');
my $holder = session($node);
$holder->query_safe('BEGIN');
$holder->query_safe("SELECT FROM chat.chat_session WHERE id = '$id' FOR UPDATE");
kill 'CONT', $pid;
$fake->wait_for_stats(sub { $_->{aborted} == $aborted + 1 });
pass('its connection is closed although its session is locked');
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$task'")->{status},
	'running', 'and its end is not stored');
$holder->query_safe('COMMIT');
$holder->quit;
is(wait_for_task($node, $task)->{status}, 'cancelled', 'then its end is stored');

# queued behind another one
my $first = ask($node, $id, 'first [[tokens=2 gateat=1:d]]');
$task = ask($node, $id, 'never [[tokens=2]]');
$fake->wait_at_gate('d');
ok(cancel($task), 'a queued task is cancelled');
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$task'")->{status},
	'cancelled', 'at once');
is_deeply([ map { $_->{type} } events($node, $task) ], [ 'start', 'abort' ],
	'its readers see start and abort');
is_deeply(
	[ map { $_->{payload}{type} } rows($node,
			"SELECT payload FROM chat.wait_task_events('$task', 0, '30 s')") ],
	[ 'start', 'abort' ], 'those that wait, too');
@events = $listener->turn($task);
is_deeply([ map { $_->{type} } @events ], [ 'start', 'abort' ],
	'and so do its listeners');
is_deeply(\@events, [ stored_events($node, $task) ], 'P3: what was notified is stored');
is_deeply([ map { $_->{seq} } @events ], [ 1, 2 ], 'with its numbers');
is($events[0]{messageId},
	row($node, "SELECT answer_id FROM chat.chat_task WHERE id = '$task'")->{answer_id},
	'of the message that never came');

# the same when the worker goes before it can tell, and when somebody holds the session
my @more = map { ask($node, $id, "never $_") } 1 .. 3;
$pid = wait_for_worker($node);
pause_worker($node, $pid);
ok(cancel($more[0]), 'a queued task is cancelled while the worker stands still');
kill 'TERM', $pid;
kill 'CONT', $pid;
wait_gone($pid);
is_deeply([ map { $_->{type} } $listener->turn($more[0]) ], [ 'start', 'abort' ],
	'the next worker tells its listeners');
$fake->wait_at_gate('d');
$pid = wait_for_worker($node);
pause_worker($node, $pid);
ok(cancel($more[1]), 'another one');
$holder = session($node);
$holder->query_safe('BEGIN');
$holder->query_safe("SELECT FROM chat.chat_session WHERE id = '$id' FOR UPDATE");
kill 'CONT', $pid;
my $elsewhere = ask($node, create_session($node)->{id}, 'elsewhere [[tokens=1]]');
wait_for_task($node, $elsewhere);
is(scalar(stored_events($node, $more[1])), 0, 'nobody is told while somebody holds its session');
$holder->query_safe('COMMIT');
$holder->quit;
is_deeply([ map { $_->{type} } $listener->turn($more[1]) ], [ 'start', 'abort' ], 'then they are');
$node->safe_psql('postgres', "BEGIN; SELECT chat.cancel_task('$more[2]'); PREPARE TRANSACTION 'cancel'");
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$more[2]'")->{status}, 'queued',
	'a cancel that is prepared');
$node->safe_psql('postgres', "COMMIT PREPARED 'cancel'");
is_deeply([ map { $_->{type} } $listener->turn($more[2]) ], [ 'start', 'abort' ],
	'is told when it is committed');
wait_for($node, "SELECT count(*) = 0 FROM chat.chat_job WHERE kind = 'notice'");
pass('no notice is left');
$fake->open_gate('d');
is(wait_for_task($node, $first)->{status}, 'completed', 'the first one goes on');
unlike(encode(messages($id)), qr/never/, 'its message never came to be');

# ready, but without a slot: three streams are all that there may be
my @full = map { ask($node, create_session($node)->{id}, 'full [[tokens=2 gateat=1:f]]') } 1 .. 3;
$fake->get_json('/gate/f?wait=3');
my $other = create_session($node);
my $waiting = listener($node, $other->{channel});
$task = ask($node, $other->{id}, 'no room [[tokens=2]]');
ok(cancel($task), 'a task that found no slot is cancelled');
is(($waiting->turn($task))[-1]{type}, 'abort', 'with its events');
is(wait_for_task($node, $task)->{status}, 'cancelled', 'before there is a slot');
is(row($node, 'SELECT count(*) FROM chat.chat_job')->{count}, 3,
	'all others are still there');
$fake->open_gate('f', 3);
is(wait_for_task($node, $_)->{status}, 'completed', 'and complete') foreach @full;

# between two attempts
$task = ask($node, $other->{id}, 'again [[status=500 times=1]]');
wait_for($node, "SELECT count(*) = 1 FROM chat.chat_job WHERE task_id = '$task'"
	  . ' AND holder IS NULL AND run_at > now()');
ok(cancel($task), 'a task that waits for its next attempt is cancelled');
is(($waiting->turn($task))[-1]{type}, 'abort', 'with its events');
is(wait_for_task($node, $task)->{status}, 'cancelled', 'it ends');

# in its tool phase
$node->safe_psql('postgres', <<'SQL');
CREATE ROLE app LOGIN;
GRANT USAGE ON FOREIGN SERVER fake TO app;
SELECT chat.grant_usage('app');
CREATE TABLE public.seen (n int);
GRANT INSERT ON public.seen TO app;
CREATE FUNCTION public.nap() RETURNS text LANGUAGE sql AS
	$$ INSERT INTO public.seen VALUES (1); SELECT pg_sleep(3600)::text $$;
SET ROLE app;
SELECT chat.register_tool('public.nap()');
SELECT chat.register_tool(name => 'pick', kind => 'client', parameters => '{"type": "object"}');
SQL
$other = create_session($node, owner => 'app');
$waiting = listener($node, $other->{channel});
$task = ask($node, $other->{id}, 'nap [[tool=nap args={} id=n1]]');
wait_for($node, "SELECT count(*) = 1 FROM pg_stat_activity"
	  . " WHERE backend_type = 'chat tool worker' AND query LIKE '%nap%'"
	  . " AND wait_event = 'PgSleep'");
ok(cancel($task), 'a task whose tool runs is cancelled');
@events = $waiting->turn($task);
is($events[-1]{type}, 'abort', 'with its events');
is((grep { $_->{type} eq 'tool-output-error' } @events), 1, 'the call has an end');
wait_for($node, "SELECT count(*) = 0 FROM pg_stat_activity"
	  . " WHERE backend_type = 'chat tool worker' AND query LIKE '%nap%'");
pass('T28: the statement is cancelled');
is(wait_for_task($node, $task)->{status}, 'cancelled', 'the task is cancelled');
is(row($node, 'SELECT count(*) FROM public.seen')->{count}, 0, 'the tool had no effect');
is( row($node, "SELECT status FROM chat.chat_tool_call WHERE task_id = '$task'")->{status},
	'cancelled', 'its call is cancelled');

# while it waits for the application
$task = ask($node, $other->{id}, 'pick [[tool=pick args={} id=p1]]');
wait_for($node, "SELECT status = 'waiting' FROM chat.chat_task WHERE id = '$task'");
ok(cancel($task), 'a waiting task is cancelled');
is(wait_for_task($node, $task)->{status}, 'cancelled', 'it ends');
is($node->safe_psql('postgres', "SELECT chat.submit_tool_output('$other->{id}', 'p1', '1')"),
	'f', 'and takes no output any more');
$task = ask($node, $other->{id}, 'go on [[tokens=1]]');
is(wait_for_task($node, $task)->{status}, 'completed', 'the session is usable');

# T40: a listener that goes away cancels nothing
$task = ask($node, $id, 'alone [[tokens=4 gateat=2:e]]');
$listener->until(sub { ($_[0]{delta} // '') =~ /t1 $/ });
$listener->stop;
$fake->open_gate('e');
is(wait_for_task($node, $task)->{status}, 'completed', 'T40: a listener went away, the answer came');
is(row($node, 'SELECT count(*) FROM chat.chat_job')->{count}, 0, 'no job is left');
$waiting->stop;

done_testing();
