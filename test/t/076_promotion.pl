# Does a promotion in the middle of streams lose nothing and double nothing?
# The standby runs nothing; promoted, it finds the unfinished jobs and ends
# each once; the runs of its timeline start at 256 (P3, T9).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Bystander;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

use constant RUN => 2**32;

my $fake = start_fake();
my $primary = chat_cluster('primary', allows_streaming => 1);
create_server($primary, $fake);
$primary->safe_psql('postgres', <<'EOS');
CREATE ROLE app LOGIN;
SELECT chat.grant_usage('app');
GRANT USAGE ON FOREIGN SERVER fake TO app;
SELECT chat.register_tool(kind => 'client', name => 'ask_user', shared => true);
EOS

# a turn that is over stays as it is
my $done = ask($primary, create_session($primary)->{id}, 'done [[tokens=3]]');
wait_for_task($primary, $done);
my @done = stored_events($primary, $done);

$primary->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'base', has_streaming => 1);
$standby->start;

my @turns = start_turns($primary, 5,
	'hello [[tokens=9 gateat=3:a gateat=6:b]]');
my $by = ChatTest::Bystander->new($primary, $fake);
my $behind = ask($primary, $turns[0]{session}, 'behind [[tokens=1]]');
my $call = ask($primary, create_session($primary)->{id},
	'call [[tokens=3 tool=ask_user args={} thentext=done]]');
wait_for($primary, "SELECT status = 'waiting' FROM chat.chat_tool_call"
	  . " WHERE task_id = '$call'");
$fake->get_json('/gate/a?wait=5');
$primary->wait_for_catchup($standby);

# the standby has all of it, and does nothing with it
is(row($standby, 'SELECT count(*) FROM chat.chat_job')->{count}, 16,
	'the standby has the jobs');
is(row($standby, 'SELECT count(*) FROM chat.worker_status()')->{count}, 0,
	'and no worker');
my %processes = processes($standby);
is((grep { /chat/ && !/walreceiver|startup/ } values %processes),
	0, 'nor a launcher')
  or diag(join "\n", values %processes);
is_deeply([ events($standby, $done) ], \@done,
	'it answers readers');
my (undef, undef, $error) = $standby->psql('postgres',
	"SELECT * FROM chat.wait_task_events('$done', 0, '1 s')");
like($error, qr/cannot wait for events during recovery/,
	'but waits for nothing');
(undef, undef, $error) = $standby->psql('postgres',
	'SELECT chat.stream_chat_completion('
	  . "'$turns[0]{session}', 'on the standby')");
like($error, qr/read-only transaction|during recovery/, 'and takes no turn');

# what the primary tells from here on, the standby never learns
my $listener = listener($primary, map { $_->{channel} } @turns);
my $notified = row($primary, 'SELECT max(seq) AS n FROM chat.chat_event'
	  . " WHERE task_id = '$turns[0]{task}'")->{n};
foreach my $pid (keys %{ { processes($primary) } })
{
	my %now = processes($primary);
	kill 'STOP', $pid if ($now{$pid} // '') =~ /walsender/;
}
$fake->open_gate('a', 5);
my (%told, %lost);
$listener->until(
	sub {
		my ($event) = @_;
		$lost{"$event->{taskId} $event->{seq}"} = 1;
		$told{ $event->{taskId} } = 1 if ($event->{delta} // '') =~ /t5 $/;
		return keys %told == 5;
	});
kill_everything($primary);
my $requests = $fake->stats->{requests};
$standby->promote;
$fake->get_json('/gate/a?wait=5');
$by->{node} = $standby;
$by->ready;
is($fake->stats->{requests} - $requests, 15, 'the new primary takes up all jobs');
$fake->open_gate($_, 5) foreach qw(a b);

my $text = join '', map { "t$_ " } 0 .. 8;
foreach my $turn (@turns)
{
	my $task = $turn->{task};
	my $row = wait_for_task($standby, $task);
	is_deeply([ @$row{qw(status error)} ],
		[ 'completed', undef ], 'a turn completes');
	one_end($standby, $task, 'a turn');
	is(messages($standby, $task), 'user assistant', 'with one message');
	my @events = stored_events($standby, $task);
	is(text_of(@events), $text, 'its events add up to the answer');
	is(scalar(grep { $lost{"$task $_->{seq}"} } @events),
		0, 'no number of the old primary was used again');
	my ($first) = grep { $_->{seq} > RUN } @events;
	is($first->{seq}, 256 * RUN + 1, 'T9: the run starts at 256');
	is($first->{type}, 'reset-step', 'with reset-step');
}
cmp_ok(scalar(keys %lost), '>', 0, 'the standby has missed events');
is(wait_for_task($standby, $behind)->{status},
	'completed', 'what was queued follows');
$by->check('promotion');
is_deeply([ stored_events($standby, $done) ],
	\@done, 'a turn that was over stays as it was');

# the application's answer reaches the turn that waited for it
is( $standby->safe_psql(
		'postgres',
		'SELECT chat.submit_tool_output(session_id, call_id, \'42\')'
		  . " FROM chat.chat_tool_call WHERE task_id = '$call'"),
	't', 'a client tool still waits');
is(wait_for_task($standby, $call)->{status}, 'completed',
	'a turn that waited for the application completes');
one_end($standby, $call, 'a turn that waited');
is(messages($standby, $call), 'user assistant tool assistant', 'its messages');
is( text_of(stored_events($standby, $call)),
	't0 t1 t2 done',
	'what it said before is part of its stream');
is(row($standby, 'SELECT count(*) FROM chat.chat_job')->{count}, 0,
	'no job is left');

done_testing();
