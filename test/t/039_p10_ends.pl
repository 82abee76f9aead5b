# P10: does an end that cannot be built end its task, and nothing else?  No
# memory for the message of an answer, of one that breaks off, runs out of
# time or is cancelled; answers as long as chat.max_body_size lets them be.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use JSON::PP ();
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => <<'EOC');
chat.debug_fail = 'settle:doomed'
chat.max_body_size = 32MB
chat.max_retries = 0
chat.idle_timeout = 1h
EOC
create_server($node, $fake);
$node->safe_psql('postgres',
	server_sql($fake->port, name => 'hasty', idle_timeout => '100ms'));
my $worker = wait_for_worker($node);
my @others = start_turns($node, 10, 'bystander [[tokens=6 gateat=3:others]]');
$fake->get_json('/gate/others?wait=10');

# Asserts how a task has ended whose message could not be made.
sub doomed
{
	my ($task, $status, $code, $last, $label) = @_;
	my $turn = turn_of($node, $task);
	my @events = @{ $turn->{events} };

	is($turn->{status}, $status, "P10: $label: $status");
	is($turn->{error}{code}, $code, '  its code');
	is($turn->{answer}, undef, '  no message');
	is((grep { $_->{type} =~ /^(finish|abort)$/ } @events), 1, '  one end');
	is($events[-1]{type}, $last, "  which is $last");
	is((grep { $_->{type} eq 'message-metadata' } @events),
		0, '  nothing is told of what was given up');
	is_deeply([ map { $_->{seq} } @events ],
		[ 1 .. @events ], '  seq counts on');
	is( rows($node, "SELECT FROM chat.chat_job WHERE task_id = '$task'"),
		0, '  no job');
	return;
}

my $id = create_session($node)->{id};
doomed(ask($node, $id, '[[text=the%20doomed%20one]]'),
	'failed', 'invalid_response', 'finish', 'a whole answer');
doomed(ask($node, $id, '[[text=doomed%20 repeat=9 cutafter=4]]'),
	'failed', 'endpoint_error', 'finish', 'an answer that breaks off');
doomed(ask($node, $id, '[[text=doomed error_at=1 errmsg=no]]'),
	'failed', 'endpoint_error', 'finish', 'an error in the stream');
doomed(ask($node, $id, '[[text=doomed%20 repeat=9 stall=3]]', server => 'hasty'),
	'failed', 'idle_timeout', 'finish', 'a stream that falls silent');
doomed(ask($node, $id, '[[text=doomed plain=1]]'),
	'failed', 'invalid_response', 'finish', 'a plain body');
doomed(ask($node, $id, '[[text=doomed tool=f args={} id=c]]'),
	'failed', 'invalid_response', 'finish', 'a tool call');
my $task = ask($node, $id, '[[text=doomed%20 repeat=9 gateat=3:cancel]]');
$fake->wait_at_gate('cancel');
wait_for($node, "SELECT count(*) > 0 FROM chat.chat_event"
	  . " WHERE task_id = '$task' AND payload->>'delta' LIKE 'doomed%'");
$node->safe_psql('postgres', "SELECT chat.cancel_task('$task')");
doomed($task, 'cancelled', 'cancelled', 'abort', 'a cancel');
is(turn_of($node, ask($node, $id, 'go on [[tokens=1]]'))->{status},
	'completed', 'the session goes on');

# As much as an answer may hold, and more.  Compared by the server: so much
# JSON takes this process a minute.
my %large = (
	'hugeline=31000000' => [ 'completed', undef, 'close to the limit' ],
	'text=%01%22%5C repeat=100000' => [ 'completed', undef, 'all escapes' ],
	'hugebody=40000000' => [ 'failed', 'invalid_response', 'beyond it' ],
	'hugeline=40000000' => [ 'failed', 'invalid_response', 'one line' ]);
foreach my $directive (sort keys %large)
{
	my ($status, $code, $label) = @{ $large{$directive} };

	$task = ask($node, create_session($node)->{id}, "[[$directive]]");
	is(wait_for_task($node, $task)->{status},
		$status, "P10, T62: an answer of chat.max_body_size, $label: $status");
	my $sizes = row($node, <<"EOS");
SELECT t.error->>'code' AS code, length(m.content) AS size,
	(m.metadata->'interrupted')::bool AS interrupted,
	m.content IS NOT DISTINCT FROM (SELECT string_agg(e.payload->>'delta', ''
		ORDER BY e.seq) FROM chat.chat_event AS e WHERE e.task_id = t.id)
		AS same
FROM chat.chat_task AS t LEFT JOIN chat.chat_message AS m
	ON m.session_id = t.session_id AND m.id = t.answer_id
WHERE t.id = '$task'
EOS
	is($sizes->{code}, $code, '  its code');
	ok($sizes->{same}, '  the message is what listeners saw');
	is($sizes->{interrupted}, $code && $sizes->{size} ? JSON::PP::true : undef,
		'  marked, if it is not whole');
}

$fake->open_gate('others', 10);
foreach my $turn (@others)
{
	is(wait_for_task($node, $turn->{task})->{status},
		'completed', 'a bystander ends');
	is(text_of(stored_events($node, $turn->{task})),
		't0 t1 t2 t3 t4 t5 ', '  with its answer');
}
is(wait_for_worker($node), $worker, 'P10: all of it under one worker');

done_testing();
