# P4: does a crash lose nothing and double nothing?  The worker killed, the
# server stopped at once, the postmaster killed: every unfinished job is found
# at once and ends exactly once.  A graceful end costs no attempt (T18, T20,
# T21, T22).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf =>
	  "restart_after_crash = on\nwal_writer_delay = 10s");
create_server($node, $fake);

my $answer = join '', map { "t$_ " } 0 .. 9;
my $last_epoch = 0;

# Ends the runtime while four streams stand at a gate; what they become then.
# Options: crashes and attempts that the jobs show afterwards, reset.
sub survive
{
	my ($what, $end, %expect) = @_;
	my @sessions = map { create_session($node) } 1 .. 4;
	my $listener = listener($node, map { $_->{channel} } @sessions);
	my %told;
	my @tasks =
	  map { ask($node, $_->{id}, "first $what [[tokens=10 gateat=5:g]]") }
	  @sessions;
	# behind the first one: nothing of it may be lost either (T20)
	my $queued = ask($node, $sessions[0]{id}, 'next [[tokens=2]]');

	$listener->until(
		sub {
			$told{ $_[0]{taskId} } = 1 if ($_[0]{delta} // '') =~ /t4 $/;
			return keys %told == @tasks;
		});
	my $before = $fake->stats->{requests};
	$end->();
	wait_for($node, 'SELECT count(*) = 4 FROM chat.chat_job'
		  . ' WHERE holder IS NOT NULL');
	$fake->get_json('/gate/g?wait=4');
	is($fake->stats->{requests} - $before, 4, "$what: all jobs run again");
	my $jobs = row($node, 'SELECT array_agg(DISTINCT crashes) AS crashes,'
		  . ' array_agg(DISTINCT attempts) AS attempts FROM chat.chat_job');
	is_deeply(
		$jobs,
		{ crashes => [ $expect{crashes} ], attempts => [1] },
		"$what: attempts and crashes are counted");
	$listener = listener($node, map { $_->{channel} } @sessions);
	$fake->open_gate('g', 4);
	my %heard;
	$listener->until(
		sub {
			$heard{ $_[0]{taskId} } .= $_[0]{delta} // '';
			$told{ $_[0]{taskId} } = 2 if $_[0]{type} eq 'finish';
			return 4 == grep { ($told{$_} // 0) == 2 } @tasks;
		});
	foreach my $task (@tasks)
	{
		is(wait_for_task($node, $task)->{status}, 'completed',
			"$what: a task ends");
		my @stored = stored_events($node, $task);
		is((grep { $_->{type} eq 'reset-step' } @stored),
			1, 'listeners saw one reset');
		is((grep { $_->{type} eq 'finish' } @stored), 1, 'and one end');
		is(text_of(@stored), $answer, 'and then the whole answer');
		is_deeply(
			[
				map { $_->{content} } rows($node,
					    "SELECT content FROM chat.chat_message"
					  . " WHERE task_id = '$task' AND role = 'assistant'")
			],
			[$answer],
			'readers see one message');
		is( row($node,
				    "SELECT count(*) FROM chat.chat_message"
				  . " WHERE task_id = '$task' AND role = 'user'")->{count},
			1, 'and one question');
	}
	is(wait_for_task($node, $queued)->{status}, 'completed',
		"$what: T20: what waits behind is not lost");
	is(row($node, 'SELECT count(*) FROM chat.chat_job')->{count}, 0,
		"$what: no job is left (T22)");
	$listener->stop;
	return;
}

# crashes
survive(
	'kill -9 of the worker',
	sub {
		my $pid = wait_for_worker($node);
		my $start = row($node, 'SELECT pg_postmaster_start_time() AS t')->{t};

		kill 'KILL', $pid;
		wait_gone($pid);
		# the server throws everybody out and recovers by itself
		wait_for($node, 'SELECT true');
		isnt(wait_for_worker($node), $pid, 'another worker came');
		is(row($node, 'SELECT pg_postmaster_start_time() AS t')->{t},
			$start, 'under the same postmaster');
	},
	crashes => 1);
survive(
	'stop -m immediate',
	sub {
		$node->stop('immediate');
		$node->start;
	},
	crashes => 1);
survive(
	'kill -9 of all processes',
	sub {
		kill_everything($node);
		$node->start;
	},
	crashes => 1);
# the worker sees the postmaster's end and has the time to give its jobs back
survive(
	'kill -9 of the postmaster',
	sub {
		kill_server($node);
		$node->start;
	},
	crashes => 0);

# graceful ends (T21)
survive(
	'stop -m fast',
	sub {
		$node->stop('fast');
		$node->start;
	},
	crashes => 0);
survive(
	'pg_terminate_backend',
	sub {
		my $pid = wait_for_worker($node);
		$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
		wait_gone($pid);
	},
	crashes => 0);

# a cancel request has nothing to cancel
my $session = create_session($node)->{id};
my $task = ask($node, $session, 'cancel [[tokens=3 gateat=1:c]]');
$fake->wait_at_gate('c');
my $pid = wait_for_worker($node);
$fake->forget;
$node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)");
my $other = ask($node, create_session($node)->{id}, 'other [[tokens=1]]');
wait_for_task($node, $other);
$fake->open_gate('c');
is(wait_for_task($node, $task)->{status}, 'completed',
	'pg_cancel_backend() of the worker');
is(wait_for_worker($node), $pid, 'ends nothing');
is(scalar($fake->completions), 1, 'and repeats nothing');

# T19: a worker whose job somebody else has taken writes nothing any more
$task = ask($node, $session, 'fence [[tokens=3 gateat=1:d]]');
$fake->wait_at_gate('d');
my $aborted = $fake->stats->{aborted};
$node->safe_psql('postgres', 'UPDATE chat.chat_job SET epoch = epoch + 1,'
	  . " holder = 4711 WHERE task_id = '$task'");
$fake->wait_for_stats(sub { $_->{aborted} > $aborted });
pass('T19: who lost a job ends its transfer');
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$task'")->{status},
	'running', 'and not the task');
# its holder is not among the living: the next worker takes it up
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
$fake->wait_at_gate('d');
$fake->open_gate('d');
is(wait_for_task($node, $task)->{status}, 'completed',
	'T18: an orphan is known by its holder, not by its age');

done_testing();
