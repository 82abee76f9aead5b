# P10: does the worker never wait for an application?  A session that
# somebody holds locked waits alone, a hundred others go on (T27).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);

my $worker = wait_for_worker($node);
my $holder = session($node);

# Asserts that turns of a hundred other sessions end.
sub others_go_on
{
	my ($when) = @_;
	my @turns = start_turns($node, 100, 'other [[tokens=3]]');
	my $list = join ', ', map { literal($_->{task}) } @turns;

	wait_for($node, "SELECT count(*) = 100 FROM chat.chat_task"
		  . " WHERE id IN ($list) AND status = 'completed'");
	pass("$when: a hundred others go on");
	return;
}

# Returns a task's status.
sub status
{
	my ($task) = @_;
	return row($node,
		"SELECT status FROM chat.chat_task WHERE id = '$task'")->{status};
}

my %ways = (
	'SELECT FOR UPDATE' => sub {
		$holder->query_safe('BEGIN');
		$holder->query_safe('SELECT FROM chat.chat_session WHERE id ='
			  . " '$_[0]' FOR UPDATE");
		return sub { $holder->query_safe('COMMIT') };
	},
	'UPDATE' => sub {
		$holder->query_safe('BEGIN');
		$holder->query_safe("SELECT chat.update_session_title('$_[0]', 'x')");
		return sub { $holder->query_safe('ROLLBACK') };
	},
	'a prepared transaction' => sub {
		$node->safe_psql('postgres', 'BEGIN;'
			  . " SELECT chat.update_session_title('$_[0]', 'x');"
			  . " PREPARE TRANSACTION 'holder'");
		return sub { $node->safe_psql('postgres', "COMMIT PREPARED 'holder'") };
	});

foreach my $way (sort keys %ways)
{
	# locked while it streams: the deltas come, the end is stored later
	my $session = create_session($node);
	my $listener = listener($node, $session->{channel});
	my $task = ask($node, $session->{id}, 'end [[tokens=6 gateat=3:g]]');
	$fake->wait_at_gate('g');
	my $release = $ways{$way}->($session->{id});
	$fake->open_gate('g');
	$listener->until(sub { ($_[0]{delta} // '') =~ /t5 $/ });
	pass("$way: the locked session's deltas come");
	others_go_on($way);
	is(status($task), 'running', "$way: the end waits");
	is( row($node, 'SELECT count(*) FROM chat.chat_job')->{count},
		1, 'alone');
	$release->();
	is(wait_for_task($node, $task)->{status}, 'completed',
		"$way: and comes after the release");
	my @events = stored_events($node, $task);
	is((grep { $_->{type} eq 'finish' } @events), 1, 'once');
	is(text_of(@events), 't0 t1 t2 t3 t4 t5 ', 'with the whole answer');

	$listener->stop;
}

# locked before the worker has seen the job
my $session = create_session($node)->{id};
pause_worker($node, $worker);
my $task = ask($node, $session, 'start [[tokens=2]]');
$holder->query_safe('BEGIN');
$holder->query_safe(
	"SELECT FROM chat.chat_session WHERE id = '$session' FOR UPDATE");
kill 'CONT', $worker;
others_go_on('before the start');
is(status($task), 'queued', 'before the start: the locked one is queued');
$holder->query_safe('COMMIT');
is(wait_for_task($node, $task)->{status}, 'completed',
	'before the start: and runs after the release');

# fifty locked sessions, more than a few retries long
my @locked = start_turns($node, 50, 'many [[tokens=2 gateat=1:many]]');
$fake->get_json('/gate/many?wait=50');
$holder->query_safe('BEGIN');
$holder->query_safe('SELECT id FROM chat.chat_session WHERE id IN ('
	  . join(', ', map { literal($_->{session}) } @locked)
	  . ') FOR UPDATE');
$fake->open_gate('many', 50);
others_go_on('fifty locked');
$holder->query_safe('COMMIT');
is(wait_for_task($node, $_->{task})->{status}, 'completed', 'all end')
  foreach @locked;
is(wait_for_worker($node), $worker, 'under one worker');
$holder->quit;

done_testing();
