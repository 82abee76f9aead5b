# What does a synchronous standby that is not there do to turns?  Streams go
# on, ends wait, the server can be stopped; with the standby back (or taken
# off the list) everything ends once, and ten others come through.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Bystander;
use ChatTest::Crash;
use Test::More;

# what the test itself writes waits for nobody
$ENV{PGOPTIONS} = '-c synchronous_commit=local';

my $fake = start_fake();
my $node = chat_cluster('main', allows_streaming => 1);
create_server($node, $fake);

# Names a standby that does not exist, or none; returns when the worker has
# read it.
sub set_standby
{
	my ($names) = @_;
	my $log = -s $node->logfile;

	$node->safe_psql('postgres',
		"ALTER SYSTEM SET synchronous_standby_names = '$names'");
	$node->reload;
	$node->wait_for_log(qr/"synchronous_standby_names" changed/, $log);
	# whoever comes after this has the setting, and so has a worker
	wait_for($node, "SELECT current_setting('synchronous_standby_names')"
		  . " = '$names'");
	return;
}

# Starts three turns that stand at gate v.
sub start_victims
{
	my @turns =
	  start_turns($node, 3, 'victim [[tokens=9 gateat=3:v gateat=6:w]]');
	$fake->get_json('/gate/v?wait=3');
	return @turns;
}

# Asserts that turns have ended as they should.
sub check_ends
{
	my ($what, @turns) = @_;
	my $text = join '', map { "t$_ " } 0 .. 8;

	foreach my $turn (@turns)
	{
		my $task = $turn->{task};
		my $row = wait_for_task($node, $task);
		is_deeply([ @$row{qw(status error)} ],
			[ 'completed', undef ], "$what: the turn completes");
		one_end($node, $task, $what);
		is(messages($node, $task), 'user assistant', "$what: one message");
		is(text_of(stored_events($node, $task)),
			$text, "$what: its events add up to the answer");
	}
	return;
}

# Returns how many of the turns have ended.
sub count_ended
{
	my (@turns) = @_;
	my $list = join ', ', map { literal($_->{task}) } @turns;
	return row($node, 'SELECT count(*) FROM chat.chat_task WHERE id IN'
		  . " ($list) AND finished_at IS NOT NULL")->{count};
}

my $what = 'standby missing';
my @turns = start_victims();
my $by = ChatTest::Bystander->new($node, $fake);
my $pid = wait_for_worker($node);
my $listener = listener($node, map { $_->{channel} } @turns);
my $log = -s $node->logfile;
set_standby('nobody');
$fake->open_gate('v', 3);
my %told;
$listener->until(
	sub {
		$told{ $_[0]{taskId} } = 1 if ($_[0]{delta} // '') =~ /t5 $/;
		return keys %told == 3;
	});
pass("$what: streams go on");
$fake->open_gate('w', 3);
my $new = ask($node, create_session($node)->{id}, 'new [[tokens=1]]');
$node->wait_for_log(qr/waits for a synchronous standby/, $log);
# one more look of the worker at its queue
my $row = row($node, 'SELECT * FROM chat.worker_status()');
is(count_ended(@turns), 0, "$what: nothing has ended that is not safe");
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$new'")->{status},
	'queued', "$what: nothing is started");
my ($wait) = rows($node,
	"SELECT wait_event FROM pg_stat_activity WHERE pid = $pid");
isnt($wait->{wait_event}, 'SyncRep', "$what: the worker does not stand still");
set_standby('');
check_ends($what, @turns);
is(wait_for_task($node, $new)->{status}, 'completed', "$what: later it is");
is(wait_for_worker($node), $pid, "$what: by the same worker");
$by->check($what, undisturbed => 1);

$what = 'stop without the standby';
@turns = start_victims();
$by = ChatTest::Bystander->new($node, $fake);
set_standby('nobody');
$fake->open_gate('v', 1);
$node->restart;
pass("$what: the server stops");
is(row($node, 'SELECT count(*) FROM chat.chat_job WHERE holder IS NOT NULL')
	  ->{count}, 0, "$what: the jobs were given back");
set_standby('');
$by->ready;
$fake->open_gate($_, 3) foreach qw(v w);
check_ends($what, @turns);
$by->check($what);

$what = 'kill -9 of all processes without the standby';
@turns = start_victims();
$by = ChatTest::Bystander->new($node, $fake);
set_standby('nobody');
kill_everything($node);
$node->start;
is(row($node, 'SELECT count(*) FROM chat.chat_job WHERE holder IS NOT NULL')
	  ->{count}, 13, "$what: the jobs are not taken up");
set_standby('');
$by->ready;
$fake->open_gate($_, 3) foreach qw(v w);
check_ends($what, @turns);
$by->check($what);

done_testing();
