# P10: does an error that passes cost a turn no more than time?  While its
# request is built somebody holds a table locked, or cancels the statement.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => <<'EOC');
chat.retry_base_delay = 100ms
chat.max_retries = 20
EOC
create_server($node, $fake);
$node->safe_psql('postgres', "SELECT chat.set_prompt('brief', 'Be brief.')");
my $worker = wait_for_worker($node);
my $holder = session($node);

# Starts a turn whose request needs the table of prompts, while that is locked.
sub held_turn
{
	my $id = create_session($node, settings => encode({ prompt => 'brief' }))->{id};

	$holder->query_safe('BEGIN; LOCK TABLE chat.chat_prompt IN ACCESS EXCLUSIVE MODE');
	return ask($node, $id, 'hello [[tokens=2]]');
}

my $task = held_turn();
wait_for($node, "SELECT attempts > 0 AND holder IS NULL FROM chat.chat_job"
	  . " WHERE task_id = '$task'");
my ($other) = run_turns($node, 'other [[tokens=1]]');
is($other->{status}, 'completed', 'a lock timeout holds up nobody else');
$holder->query_safe('COMMIT');
my $turn = turn_of($node, $task);
is($turn->{status}, 'completed', 'P10: after a lock timeout it is tried again')
  or diag(encode($turn->{error}));
is_deeply([ map { $_->{type} } grep { $_->{type} =~ /^(start|error|reset-step)$/ } @{ $turn->{events} } ],
	['start'], '  and listeners see nothing of it');

$task = held_turn();
wait_for($node, "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND pid = $worker");
$node->safe_psql('postgres', "SELECT pg_cancel_backend($worker)");
wait_for($node, "SELECT attempts > 0 AND holder IS NULL FROM chat.chat_job"
	  . " WHERE task_id = '$task'");
$holder->query_safe('COMMIT');
is(wait_for_task($node, $task)->{status}, 'completed',
	'P10: after a cancel request, too');
$holder->quit;

# what does not pass is final
$node->safe_psql('postgres', server_sql($fake->port, name => 'gone'));
my $id = create_session($node, server => 'gone')->{id};
pause_worker($node, $worker);
$task = ask($node, $id, 'hello');
$node->safe_psql('postgres', 'DROP SERVER gone CASCADE');
kill 'CONT', $worker;
my $row = wait_for_task($node, $task);
is($row->{status}, 'failed', 'a server that is gone fails its turn');
ok(!$row->{error}{retryable}, '  for good');
is(wait_for_worker($node), $worker, 'under one worker');

done_testing();
