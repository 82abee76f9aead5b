# P9: does idleness cost nothing?  For ten seconds nothing wakes our
# processes and nothing commits: the one place where a test lets time pass.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => 'autovacuum = off');
create_server($node, $fake);

# Returns what our processes and the database have done so far.
sub activity
{
	my %now;

	foreach my $name ('chat launcher', 'chat worker')
	{
		my $pid = pid_of($node, qr/: \Q$name\E/);
		open my $status, '<', "/proc/$pid/status" or die "$name: $!";
		($now{$name}) = map { /^voluntary_ctxt_switches:\s*(\d+)/ } <$status>;
		close $status;
	}
	# from another database: the query counts as well
	$now{commits} = $node->safe_psql('template1', 'SELECT xact_commit +'
		  . " xact_rollback FROM pg_stat_database WHERE datname = 'postgres'");
	return \%now;
}

# Returns how long a process of ours sleeps at most, in ms; 'for ever' when it
# waits for an event only, or when this system does not tell.
sub sleeps
{
	my ($name) = @_;
	my $pid = pid_of($node, qr/: \Q$name\E/);
	open my $file, '<', "/proc/$pid/syscall" or return 'for ever';
	# epoll_wait, by its number on this machine, and its arguments
	my @call = split ' ', <$file> // '';
	close $file;
	my ($time) = ($call[4] // '') =~ /^0x[0-9a-f]*?([0-9a-f]{1,8})$/;
	return !defined $time || $time eq 'ffffffff' ? 'for ever' : hex $time;
}

# Asserts that nothing happens for ten seconds.
sub idle
{
	my ($when) = @_;
	my $before;

	# until what has been going on has come to its end
	wait_until(
		'our processes to rest',
		sub {
			my $now = activity();
			my $still = $before && encode($now) eq encode($before);
			$before = $now;
			select undef, undef, undef, 1 unless $still;
			return $still;
		});
	# what wakes them later than that is not of the past: the next event slot
	my $worker = sleeps('chat worker');
	is(sleeps('chat launcher'), 'for ever', "P9: the launcher sleeps, $when");
	ok($worker eq 'for ever' || $worker > 100000, "P9: so does the worker, $when")
	  or diag("for $worker ms");
	select undef, undef, undef, 10;
	is_deeply(activity(), $before, "P9: ten seconds of rest, $when");
	return;
}

# work of each kind has been done, and streams have ended
my $session = create_session($node)->{id};
wait_for_task($node, ask($node, $session, 'one [[tokens=10]]'));
wait_for_task($node, ask($node, $session, 'two [[status=429 times=1 retry_after=1]]'));
wait_for_task($node, $_->{task}) foreach start_turns($node, 20, 'x [[tokens=2]]');
$node->safe_psql('postgres', 'BEGIN; SELECT chat.stream_chat_completion'
	  . "('$session', 'no'); ROLLBACK");
idle('after work');

# a job that is due much later, and a database without the extension
$node->safe_psql('postgres', 'CREATE DATABASE bystander');
my $task = ask($node, $session, 'later [[status=429 retry_after=250]]');
wait_for($node, "SELECT run_at > now() + interval '1 minute'"
	  . " FROM chat.chat_job WHERE task_id = '$task'");
wait_until('the launcher to have looked at the new database',
	sub { 1 == grep { /chat worker/ } values %{ { processes($node) } } });
idle('with a retry in some minutes');

done_testing();
