# Does a message that goes in by SQL come back as a stream of notifications,
# and is what was notified also stored?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);

my $session = create_session($node, user_id => 'ada');
like($session->{id}, qr/^[0-9a-f-]{36}$/, 'a session has an id');
like($session->{channel}, qr/^chat_[0-9a-f]{32}$/, 'and a channel of its own');

my $listener = listener($node, $session->{channel});
my $answer = join '', map { "t$_ " } 0 .. 19;
my $task = ask($node, $session->{id}, 'hello [[tokens=20]]');
like($task, qr/^[0-9a-f-]{36}$/, 'the call returns the task');

# the stream
my @events = $listener->turn($task);
is($events[0]{type}, 'start', 'the stream opens with start');
is($events[-1]{type}, 'finish', 'and ends with finish');
my @order = grep { !/^(data-|message-metadata)/ } types_of(@events);
is_deeply(
	\@order,
	[
		qw(start start-step text-start text-delta text-end finish-step finish)
	],
	'the parts come in the order of the protocol');
is(text_of(@events), $answer, 'the deltas are the answer');
my @seq = map { $_->{seq} } grep { defined $_->{seq} } @events;
is_deeply(\@seq, [ 1 .. @seq ], 'seq counts 1, 2, 3 ...');
ok(!(grep { $_->{taskId} ne $task } @events), 'each event names the task');

# the rows
my $row = wait_for_task($node, $task);
is($row->{status}, 'completed', 'the task is completed');
is($row->{steps}, 1, 'in one step');
my @messages = rows($node,
	"SELECT sequence, role, content, active FROM chat.chat_message"
	  . " WHERE session_id = '$session->{id}' ORDER BY sequence");
is_deeply(
	[ map { [ @$_{qw(sequence role content)} ] } @messages ],
	[
		[ 1, 'user', 'hello [[tokens=20]]' ],
		[ 2, 'assistant', $answer ]
	],
	'question and answer are stored');
my @stored = stored_events($node, $task);
my @notified = grep { defined $_->{seq} } @events;
is_deeply(\@stored, \@notified, 'every notified event has its row');
is_deeply([ events($node, $task) ],
	\@stored, 'get_task_events returns the rows');
is_deeply(
	[ events($node, $task, $seq[-2]) ],
	[ $stored[-1] ],
	'and only those after a given seq');

# the session's updated_at is set where messages are stored: with the claim,
# with the end
my $times = row($node, <<"EOS");
SELECT s.updated_at = t.finished_at AS ended, m.created_at = t.started_at AS begun
FROM chat.chat_session AS s JOIN chat.chat_task AS t ON t.session_id = s.id
	JOIN chat.chat_message AS m ON m.session_id = s.id AND m.sequence = 1
WHERE t.id = '$task'
EOS
ok($times->{ended}, 'updated_at is of the transaction that ended the task');
ok($times->{begun}, 'the question is stored by the one that began it');

# the usage
my $totals = row($node,
	"SELECT total_prompt_tokens, total_completion_tokens"
	  . " FROM chat.chat_session WHERE id = '$session->{id}'");
cmp_ok($totals->{total_prompt_tokens}, '>', 0, 'prompt tokens are counted');
cmp_ok($totals->{total_completion_tokens},
	'>', 0, 'completion tokens are counted');
is( rows($node, "SELECT 1 FROM chat.chat_job WHERE task_id = '$task'"),
	0, 'no job is left');

# the request
my @requests = $fake->completions;
is(@requests, 1, 'one request was made');
is_deeply(
	$requests[0]{body},
	{
		model => 'fake-1',
		messages => [ { role => 'user', content => 'hello [[tokens=20]]' } ],
		stream => JSON::PP::true,
		stream_options => { include_usage => JSON::PP::true }
	},
	'its body holds what is needed and nothing else');
is($requests[0]{headers}{authorization}, 'Bearer sk-test', 'with the key');

# the next turn knows the first one
$fake->forget;
my $second = ask($node, $session->{id}, 'and again [[tokens=3]]');
is(text_of($listener->turn($second)), 't0 t1 t2 ', 'a second turn streams');
is_deeply(
	[ map { $_->{role} } @{ $fake->last_request->{body}{messages} } ],
	[qw(user assistant user)],
	'its request holds the first turn');

$listener->stop;
done_testing();
