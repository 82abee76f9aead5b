# T65: does a dump carry the conversations, and a restored or copied database
# call no LLM again?  What was unfinished ends as failed, with code restored.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);

my $session = create_session($node, user_id => 'ada', title => 'a talk');
my $done = ask($node, $session->{id}, 'first [[tokens=3]]');
wait_for_task($node, $done);
my $running = ask($node, $session->{id}, 'second [[tokens=6 gateat=3:g]]');
my $queued = ask($node, $session->{id}, 'third [[tokens=1]]');
$fake->wait_at_gate('g');
wait_for($node, "SELECT count(*) = 1 FROM chat.chat_event"
	  . " WHERE task_id = '$running' AND payload->>'delta' LIKE '%t2 '");

# What a database knows of the conversation.
my $talk = "SELECT s.id, s.user_id, s.title, s.channel, s.next_sequence,"
  . ' s.total_completion_tokens, m.sequence, m.role, m.content, m.task_id,'
  . ' m.metadata FROM chat.chat_session AS s'
  . ' JOIN chat.chat_message AS m ON m.session_id = s.id';
my $before = encode([ rows($node, "$talk ORDER BY s.id, m.sequence") ]);
my $requests = $fake->stats->{requests};

# dump and restore
my $dump = PostgreSQL::Test::Utils::tempdir() . '/dump';
$node->command_ok([ 'pg_dump', '-Fc', '-f', $dump, $node->connstr('postgres') ],
	'the dump');
$node->safe_psql('postgres', 'CREATE DATABASE restored');
$node->command_ok(
	[ 'pg_restore', '--exit-on-error', '-d', $node->connstr('restored'), $dump ],
	'T65: the restore');
is(encode([ rows($node, "$talk ORDER BY s.id, m.sequence", 'restored') ]),
	$before, 'sessions and messages are the same');
foreach my $task ($running, $queued)
{
	my $row = wait_for_task($node, $task, 'restored');
	is($row->{status}, 'failed', 'T65: an unfinished task has failed');
	is($row->{error}{code}, 'restored', 'because it was restored');
}
is(wait_for_task($node, $done, 'restored')->{status},
	'completed', 'what was finished stays so');
is($fake->stats->{requests}, $requests, 'no LLM was called');
is(row($node, 'SELECT count(*) FROM chat.chat_job', 'restored')->{count},
	0, 'nor will one be');

# the restored conversation goes on
$node->safe_psql('restored',
	"ALTER DATABASE restored SET chat.default_server = 'fake'");
my $next = ask($node, $session->{id}, 'next [[tokens=2]]', db => 'restored');
is(wait_for_task($node, $next, 'restored')->{status},
	'completed', 'the restored conversation goes on');

# the original has lost nothing; a restart does not confuse it either
$node->restart;
$fake->wait_at_gate('g');
$fake->open_gate('g');
is(wait_for_task($node, $_)->{status}, 'completed',
	'the original goes on as well')
  foreach $running, $queued;

# T46: tasks whose queue was emptied end, too, once, with their events
my $stray = ask($node, $session->{id}, 'stray [[tokens=4 gateat=2:s]]');
my $behind = ask($node, $session->{id}, 'behind');
$fake->wait_at_gate('s');
my $listener = listener($node, $session->{channel});
my $aborted = $fake->stats->{aborted};
$node->safe_psql('postgres', 'TRUNCATE chat.chat_job');
my @events = $listener->turn($stray);
$fake->wait_for_stats(sub { $_->{aborted} > $aborted });
pass('TRUNCATE of the queue aborts the requests');
foreach my $task ($stray, $behind)
{
	is(wait_for_task($node, $task)->{error}{code},
		'restored', 'and ends the tasks');
}
is_deeply([ map { $_->{type} } @events ],
	[qw(reset-step error finish)], 'listeners learn of it');
is((grep { $_->{type} eq 'finish' } stored_events($node, $stray)), 1,
	'T46: with one end');
is(wait_for_task($node, ask($node, $session->{id}, 'on [[tokens=1]]'))->{status},
	'completed', 'the session is not blocked');
$listener->stop;

done_testing();
