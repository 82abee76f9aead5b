# Is a job that crashes its worker each time put aside, and does nobody else
# pay for it?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => "restart_after_crash = on\nchat.debug_fail = 'crash:nastychunk'");
create_server($node, $fake);

# Waits until the server is back after a crash.
sub back
{
	wait_for($node, 'SELECT count(*) > 0 FROM chat.worker_status() WHERE pid > 0');
	return;
}

# A task by its id; the server may be restarting.
sub task
{
	my ($task) = @_;
	wait_for($node, "SELECT finished_at IS NOT NULL FROM chat.chat_task WHERE id = '$task'");
	return turn_of($node, $task);
}

# Sends a message that crashes the server, maybe before the answer to the call
# has come: with an id of its own it can be sent again and is one message.
my $sent = 0;

sub ask_crashing
{
	my ($session, $message) = @_;
	my $id = sprintf('00000000-0000-4000-8000-%012d', ++$sent);

	while (1)
	{
		my $task = eval { ask($node, $session, $message, message_id => $id) };
		return $task if $task;
		back();
	}
}

# bystanders that stream all the while
my $whole = join '', map { "t$_ " } 0 .. 9;
my @others = map { ask($node, create_session($node)->{id}, "by [[tokens=10 gateat=5:by]]") } 1 .. 5;
$fake->get_json('/gate/by?wait=5');
my $session = create_session($node)->{id};
$fake->forget;
my $bad = ask_crashing($session, 'bad [[text=%6eastychunk]]');
my $end = task($bad);
is($end->{status}, 'failed', 'a task that crashes its worker fails');
is($end->{error}{code}, 'limit_reached', 'with a code');
is($end->{error}{crashes}, 3, 'after three crashes');
is((grep { $_->{path} =~ /completions/ && $_->{body}{messages}[-1]{content} =~ /^bad/ } $fake->requests), 3,
	'it was tried as often');
is((grep { $_->{type} =~ /^(finish|abort)$/ } @{ $end->{events} }), 1, 'one terminal event');
is($end->{answer}, undef, 'no answer');
is(scalar @{ $end->{messages} }, 1, 'and its question once');
back();
$fake->get_json('/gate/by?wait=5');
$fake->open_gate('by', 5);
foreach my $task (@others)
{
	my $turn = task($task);
	is($turn->{status}, 'completed', 'a bystander completes');
	is($turn->{answer}{content}, $whole, 'with the whole answer');
}
is_deeply(
	[ rows($node, 'SELECT task_id, session_id, crashes FROM chat.poisoned_jobs') ],
	[ { task_id => $bad, session_id => $session, crashes => 3 } ],
	'it is listed');

# what the administrator does about it
$node->append_conf('postgresql.conf', "chat.debug_fail = ''");
$node->reload;
my $again = $node->safe_psql('postgres', "SELECT chat.rerun_job('$bad')");
$end = task($again);
is($end->{status}, 'completed', 'it is run again');
is($end->{answer}{content}, 'nastychunk', 'with its answer') or diag(encode($end->{answer}));
is(row($node, 'SELECT count(*) FROM chat.poisoned_jobs')->{count}, 0, 'and is listed no more');
is(row($node, "SELECT chat.get_chat_session_message_count('$session') AS n")->{n}, 2,
	'a question and an answer');
my ($ret, $out, $err) = $node->psql('postgres', "SELECT chat.rerun_job('$bad')");
like($err, qr/task was not put aside/, 'once');
($ret, $out, $err) = $node->psql('postgres', "SELECT chat.rerun_job('$again')");
like($err, qr/task was not put aside/, 'and no other one');

# a crash before the request leaves
$node->append_conf('postgresql.conf', "chat.debug_fail = 'request:nastyquestion'\nchat.max_crashes = 2");
$node->reload;
my $fine = ask($node, create_session($node)->{id}, 'fine [[tokens=2 gateat=1:fine]]');
$fake->wait_at_gate('fine');
$bad = ask_crashing($session, 'nastyquestion');
$end = task($bad);
is($end->{error}{crashes}, 2, 'a crash before the request leaves is counted, too');
$fake->get_json('/gate/fine?wait=1');
$fake->open_gate('fine');
is(task($fine)->{status}, 'completed', 'and others go on');
my $next = ask_crashing($session, 'nothing bad');
$end = task($next);
# the question is still there: the session is poisoned until it is set aside
is($end->{error}{crashes}, 2, 'the next task of the session has the question, too');

# kill -9 is nobody's fault
$node->append_conf('postgresql.conf', "chat.debug_fail = ''\nchat.max_crashes = 1");
$node->reload;
$fine = ask($node, create_session($node)->{id}, 'fine [[tokens=2 gateat=1:kill]]');
$fake->wait_at_gate('kill');
foreach (1 .. 3)
{
	my $pid = wait_for_worker($node);
	kill 'KILL', $pid;
	wait_gone($pid);
	back();
	$fake->get_json('/gate/kill?wait=1');
}
$fake->open_gate('kill');
is(task($fine)->{status}, 'completed', 'a worker that is killed blames nobody');

# a tool that takes its worker down
$node->append_conf('postgresql.conf', "chat.max_crashes = 2");
$node->reload;
$node->safe_psql('postgres', <<'SQL');
CREATE ROLE app LOGIN;
GRANT USAGE ON FOREIGN SERVER fake TO app;
SELECT chat.grant_usage('app');
CREATE FUNCTION public.nap() RETURNS text LANGUAGE sql AS 'SELECT pg_sleep(3600)::text';
SET ROLE app;
SELECT chat.register_tool('public.nap()');
SQL
my $task = ask($node, create_session($node, owner => 'app')->{id}, 'nap [[tool=nap args={}]]');
foreach (1 .. 2)
{
	wait_for($node, "SELECT count(*) = 1 FROM pg_stat_activity"
		  . " WHERE backend_type = 'chat tool worker' AND wait_event = 'PgSleep'");
	my $pid = pid_of($node, qr/chat tool worker/);
	kill 'KILL', $pid;
	wait_gone($pid);
	back();
}
$end = task($task);
is($end->{status}, 'completed', 'a tool that takes its worker down ends, and its task goes on');
is( row($node, "SELECT result::json->>'code' AS code FROM chat.chat_tool_call WHERE task_id = '$task'")->{code},
	'tool_unknown_outcome', 'its result is an unknown outcome');

# a full queue of notifications: the rows are there all the same
$node->append_conf('postgresql.conf', "chat.debug_fail = 'notify_full'");
$node->reload;
$fine = ask($node, $session = create_session($node)->{id}, 'quiet [[tokens=5]]');
$end = task($fine);
is($end->{status}, 'completed', 'a full notification queue fails nothing');
is(text_of(@{ $end->{events} }), 't0 t1 t2 t3 t4 ', 'the events are stored');
cmp_ok(row($node, 'SELECT sum(unnotified) AS n FROM chat.worker_status()')->{n}, '>', 0, 'and counted');

done_testing();
