# What do the ends of the worker and of the server do to a turn?  Graceful
# ones give the attempt back, crashes are counted; each turn ends once, and
# ten others come through byte for byte.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Bystander;
use ChatTest::Crash;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => 'restart_after_crash = on');
create_server($node, $fake);

# Ends something while a stream, and ten others, stand at gates.
sub end_of
{
	my ($what, $crashes, $end) = @_;
	my $session = create_session($node);
	my $victim = ask($node, $session->{id},
		'victim [[tokens=6 gateat=3:v]]');
	my $behind = ask($node, $session->{id}, 'behind [[tokens=1]]');
	my $by = ChatTest::Bystander->new($node, $fake);

	$fake->wait_at_gate('v');
	$end->();
	$fake->wait_at_gate('v');
	$by->ready;
	is_deeply(
		row($node, 'SELECT array_agg(DISTINCT attempts) AS attempts,'
			  . ' array_agg(DISTINCT crashes) AS crashes, count(*)'
			  . ' FROM chat.chat_job'),
		{ attempts => [1], crashes => [$crashes], count => 11 },
		"$what: the attempt is given back"
		  . ($crashes ? ', the crash is counted' : ''));
	$fake->open_gate('v');
	$by->check($what);
	my $row = wait_for_task($node, $victim);
	is_deeply([ @$row{qw(status error)} ],
		[ 'completed', undef ], "$what: the turn completes");
	one_end($node, $victim, $what);
	is(text_of(stored_events($node, $victim)),
		't0 t1 t2 t3 t4 t5 ', "$what: its events add up to the answer");
	is(messages($node, $victim), 'user assistant', "$what: one message");
	is(wait_for_task($node, $behind)->{status},
		'completed', "$what: the next turn follows");
	is( row($node,
			"SELECT string_agg(role, ' ' ORDER BY sequence) AS roles"
			  . " FROM chat.chat_message WHERE session_id = '$session->{id}'")
		  ->{roles},
		'user assistant user assistant',
		"$what: the history is question, answer, question, answer");
	return;
}

end_of('stop -m fast', 0, sub { $node->restart });
end_of('stop -m smart and a restart',
	0, sub { $node->stop('smart'); $node->start });
end_of('pg_terminate_backend of the worker', 0, sub {
	my $pid = wait_for_worker($node);
	$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
	wait_gone($pid);
});
end_of('pg_terminate_backend of the launcher and the worker', 0, sub {
	my @pids = (pid_of($node, qr/chat launcher/), wait_for_worker($node));
	kill 'TERM', @pids;
	wait_gone(@pids);
});
end_of('kill -9 of the worker', 1, sub {
	my $pid = wait_for_worker($node);
	kill 'KILL', $pid;
	wait_gone($pid);
	wait_for($node, 'SELECT true');
});
end_of('kill -9 of another backend', 1, sub {
	my $pid = wait_for_worker($node);
	my $session = session($node);
	my $other = $session->query_safe('SELECT pg_backend_pid()');
	kill 'KILL', $other;
	wait_gone($pid);
	$session->{run}->finish;
	wait_for($node, 'SELECT true');
});
end_of('stop -m immediate', 1, sub { $node->stop('immediate'); $node->start });
end_of('kill -9 of the postmaster', 0, sub {
	# the worker sees it and has the time to give its jobs back
	kill_server($node);
	$node->start;
});
end_of('kill -9 of all processes', 1, sub {
	kill_everything($node);
	$node->start;
});

done_testing();
