# P10: does what is bad fail alone?  A row that the database refuses at the
# start, a role that is gone, a server that is dropped, an error that hits
# everything: the worker stays up and bystanders go on (T2, T46).

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

# Lets the worker find all of these jobs at the same time.
sub together
{
	my ($make) = @_;

	pause_worker($node, $worker);
	my @result = $make->();
	kill 'CONT', $worker;
	return @result;
}

# Asserts how a task has ended, and that it ended once.
sub ended
{
	my ($task, $status, $what) = @_;
	my $row = wait_for_task($node, $task);

	is($row->{status}, $status, $what);
	is((grep { $_->{type} =~ /^(finish|abort)$/ } stored_events($node, $task)),
		1, 'T46: with one end');
	return $row;
}

# a message that the table refuses, between others
$node->safe_psql('postgres', "ALTER TABLE chat.chat_message ADD CONSTRAINT"
	  . " refuse CHECK (content NOT LIKE '%poison%')");
my (@good, @bad);
together(
	sub {
		push @good, map { $_->{task} } start_turns($node, 10, 'a [[tokens=2]]');
		push @bad, map { $_->{task} } start_turns($node, 2, 'poison');
		push @good, map { $_->{task} } start_turns($node, 10, 'b [[tokens=2]]');
		push @bad, map { $_->{task} } start_turns($node, 1, 'poison [[x=1]]');
		push @good, map { $_->{task} } start_turns($node, 10, 'c [[tokens=2]]');
	});
ended($_, 'failed', 'a poisonous question fails') foreach @bad;
ended($_, 'completed', 'its neighbour does not') foreach @good;
# answers: all in one flush
my @answers = together(
	sub {
		return map { $_->{task} } start_turns($node, 20, 'x [[gate=g tokens=3]]'),
		  start_turns($node, 3, 'y [[gate=g text=poi%73on]]');
	});
$fake->get_json('/gate/g?wait=23');
together(sub { $fake->open_gate('g', 23) });
ended($answers[$_], $_ < 20 ? 'completed' : 'failed', "answer $_")
  foreach 0 .. 22;
$node->safe_psql('postgres',
	'ALTER TABLE chat.chat_message DROP CONSTRAINT refuse');

# T2: the owner of a session is dropped
$node->safe_psql('postgres', 'CREATE ROLE leaver;'
	  . " SELECT chat.grant_usage('leaver');"
	  . ' GRANT USAGE ON FOREIGN SERVER fake TO leaver;');
my $theirs = create_session($node, owner => 'leaver')->{id};
my ($orphan) = together(
	sub {
		my $task = ask($node, $theirs, 'gone [[tokens=1]]');
		$node->safe_psql('postgres', 'DROP OWNED BY leaver; DROP ROLE leaver');
		push @good, map { $_->{task} } start_turns($node, 3, 'z [[tokens=1]]');
		return $task;
	});
ended($orphan, 'failed', 'T2: the task of a role that is gone fails');
ended($_, 'completed', 'T2: others do not') foreach splice @good, 30;

# a server that is dropped before the start, and in the middle of an answer
$node->safe_psql('postgres', server_sql($fake->port, name => 'brief'));
my $middle = ask($node, create_session($node, server => 'brief')->{id},
	'middle [[tokens=4 gateat=2:m]]');
$fake->wait_at_gate('m');
my ($before) = together(
	sub {
		my $task = ask($node, create_session($node, server => 'brief')->{id}, 'x');
		$node->safe_psql('postgres', 'DROP SERVER brief CASCADE');
		return $task;
	});
ended($before, 'failed', 'a task whose server is gone fails');
$fake->open_gate('m');
ended($middle, 'completed', 'an answer that is on its way comes');

# an error that hits everything passes, and nobody pays for it
$node->safe_psql('postgres',
	'ALTER TABLE chat.chat_event ADD CONSTRAINT nothing CHECK (false) NOT VALID');
my @hit = map { $_->{task} } start_turns($node, 5, 'storm [[tokens=2]]');
$node->wait_for_log(qr/(could not claim jobs.*){5}/s);
is( row($node, "SELECT count(*) FROM chat.chat_task"
		  . " WHERE status = 'queued'")->{count},
	5, 'nothing starts while nothing can be stored');
$node->safe_psql('postgres', 'ALTER TABLE chat.chat_event DROP CONSTRAINT nothing');
ended($_, 'completed', 'and all of it after the storm') foreach @hit;

# the same in the middle of an answer
my @turns = start_turns($node, 3, 'm [[tokens=4 gateat=2:n]]');
$fake->get_json('/gate/n?wait=3');
$node->safe_psql('postgres', 'ALTER TABLE chat.chat_event_0 RENAME TO hidden');
$fake->open_gate('n', 3);
$node->wait_for_log(qr/could not store/);
$node->safe_psql('postgres', 'ALTER TABLE chat.hidden RENAME TO chat_event_0');
foreach my $turn (@turns)
{
	ended($turn->{task}, 'completed', 'a table that was away for a while');
	is(text_of(stored_events($node, $turn->{task})),
		't0 t1 t2 t3 ', 'nothing of the answer is missing');
}
is(wait_for_worker($node), $worker, 'all of it under one worker');

done_testing();
