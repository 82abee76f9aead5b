# Is the event stream of a turn whole, in order, within the limits of NOTIFY,
# and the same in the notifications and in the table?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use JSON::PP ();
use Test::More;

my $fake = start_fake();
my $node =
  chat_cluster('main', conf => 'chat.max_message_length = 1000000');
create_server($node, $fake, retries => 0);

my $session = create_session($node);
my $listener = listener($node, $session->{channel});

# Runs a turn in the session; returns its notifications and the turn.
sub listen_to
{
	my ($message) = @_;
	my $task = ask($node, $session->{id}, $message);
	my @notes = grep { $_->{event}{type} ne 'data-heartbeat' }
	  $listener->until(
		sub { $_[0]{taskId} eq $task && $_[0]{type} =~ /^(finish|abort)$/ });

	return (\@notes, turn_of($node, $task));
}

# Checks what holds for the events of every turn.
sub check_stream
{
	my ($notes, $turn, $label) = @_;
	my @events = map { $_->{event} } @$notes;
	my @numbered = grep { defined $_->{seq} } @events;

	is($events[0]{type}, 'start', "$label: opens with start");
	is($events[-1]{type}, 'finish', "$label: ends with finish");
	is((grep { $_->{type} =~ /^(finish|abort)$/ } @events),
		1, "$label: one end");
	is((grep { $_->{type} eq 'start' } @events), 1, "$label: one start");
	is_deeply([ map { $_->{seq} } @numbered ],
		[ 1 .. @numbered ], "$label: seq counts 1, 2, 3");
	is_deeply(\@numbered, $turn->{events},
		"$label: P3: each notified event has its row, and the other way");
	is((grep { length $_->{payload} >= 8000 } @$notes),
		0, "$label: T30: each payload is shorter than 8000 bytes");
	is((grep { $_->{taskId} ne $turn->{task} } @events),
		0, "$label: each names the task");
	return;
}

# a short turn
my ($notes, $turn) = listen_to('hello [[tokens=5 reasoning=2]]');
check_stream($notes, $turn, 'short');
is_deeply(
	[ types_of(map { $_->{event} } @$notes) ],
	[
		qw(start start-step data-status
		  reasoning-start reasoning-delta reasoning-end
		  text-start text-delta text-end finish-step message-metadata finish)
	],
	'blocks open and close');
is($notes->[0]{event}{messageId}, $turn->{answer}{id},
	'T41: start names the message that will be stored');
my ($metadata) = grep { $_->{type} eq 'message-metadata' } @{ $turn->{events} };
is_deeply($metadata->{messageMetadata}{usage},
	$turn->{usage}, 'the usage is told');
ok($turn->{usage}{completion_tokens} > 0, 'and is not nothing');
my %blocks;
foreach my $event (grep { $_->{type} =~ /^(text|reasoning)-/ } @{ $turn->{events} })
{
	$blocks{ $event->{id} }{ $event->{type} =~ s/-.*//r } = 1;
}
is(keys %blocks, 2, 'each block has an id of its own');

# T30: long deltas are cut, on characters
foreach my $case (
	[ 'tokens=3 size=20000', 'ASCII' ],
	[ 'text=' . ('%F0%9F%98%80' x 6000), 'characters of four bytes' ],
	[ 'text=x' . ('%E2%82%AC' x 8000), 'characters of three bytes' ],
	[ 'text=' . ('%22%5C' x 8000), 'quotes and backslashes' ],
	[ 'text=' . ('%01' x 6000), 'control characters' ],
	[ 'text=' . ('a%0A' x 6000), 'lines' ],
	[ 'tokens=0 refusal=' . ('%C3%A9' x 9000), 'a refusal' ])
{
	my ($directive, $label) = @$case;

	($notes, $turn) = listen_to("[[$directive]]");
	is($turn->{status}, 'completed', "$label: completed")
	  or diag(encode($turn->{error}));
	check_stream($notes, $turn, $label);
	is( text_of(@{ $turn->{events} }),
		$turn->{answer}{content} // $turn->{answer}{refusal},
		"$label: the deltas are the text");
	is((grep { ($_->{delta} // '') =~ /\x{fffd}/ } @{ $turn->{events} }),
		0, "$label: cut on a character");
	cmp_ok(scalar(grep { $_->{type} eq 'text-delta' } @{ $turn->{events} }),
		'>', 1, "$label: in more than one event");
}

# T33: tokens that are all alike are not folded
($notes, $turn) = listen_to('[[text=same%20 repeat=500]]');
check_stream($notes, $turn, 'alike');
is(text_of(map { $_->{event} } @$notes),
	'same ' x 500, 'T33: equal deltas are not folded');

# T44: many
($notes, $turn) = listen_to('[[tokens=10001 usage=none]]');
check_stream($notes, $turn, 'many');
is(text_of(map { $_->{event} } @$notes),
	join('', map { "t$_ " } 0 .. 10000), 'T44: all of 10001 tokens arrive');

# T29: a paced stream arrives as it comes, not at the end
my $task = ask($node, $session->{id}, '[[tokens=4 gateat=2:mid]]');
my @first = $listener->until(
	sub { $_[0]{taskId} eq $task && ($_[0]{delta} // '') =~ /t1 $/ });
$fake->wait_at_gate('mid');
is( text_of(map { $_->{event} } @first),
	't0 t1 ', 'what has come is seen while the rest is awaited');
is(text_of(stored_events($node, $task)), 't0 t1 ', 'and stored');
is( row($node, "SELECT count(*) AS n FROM chat.chat_message"
		  . " WHERE task_id = '$task' AND role = 'assistant'")->{n},
	0, 'the message comes when it is whole');
is( row($node, "SELECT (chat.get_active_task('$session->{id}')).id")->{id},
	$task, 'get_active_task knows what runs');
is(row($node, "SELECT (chat.get_task('$task')).status")->{status},
	'running', 'and get_task that it runs');
is_deeply(
	[ map { $_->{seq} } events($node, $task, 2) ],
	[ map { $_->{seq} } grep { $_->{seq} > 2 } stored_events($node, $task) ],
	'get_task_events starts after any seq');
my @two = rows($node,
	"SELECT seq FROM chat.get_task_events('$task', 1, 2) ORDER BY seq");
is_deeply([ map { $_->{seq} } @two ], [ 2, 3 ], 'and returns as many as wanted');
$fake->open_gate('mid');
$listener->turn($task);
is( row($node, "SELECT (chat.get_active_task('$session->{id}')).id")->{id},
	undef, 'get_active_task: nothing runs any more');
my $unknown = '00000000-0000-0000-0000-000000000000';
is(row($node, "SELECT (chat.get_task('$unknown')).id")->{id},
	undef, 'get_task of an unknown task is NULL');
is_deeply([ events($node, $unknown) ], [], 'and it has no events');

# start, start-step and data-status commit with the claim, before the request
# leaves
$task = ask($node, create_session($node)->{id}, '[[tokens=1 gatehead=head]]');
$fake->wait_at_gate('head');
is_deeply([ types_of(stored_events($node, $task)) ],
	[qw(start start-step data-status)], 'start, start-step and data-status are there before the answer');
is( row($node, <<"EOF")->{count}, 1, 'stored by the transaction of the claim');
SELECT count(DISTINCT x) FROM (
	SELECT xmin::text AS x FROM chat.chat_event WHERE task_id = '$task'
	UNION ALL SELECT xmin::text FROM chat.chat_message WHERE task_id = '$task'
	UNION ALL SELECT xmin::text FROM chat.chat_task WHERE id = '$task'
	UNION ALL SELECT xmin::text FROM chat.chat_job WHERE task_id = '$task') AS t
EOF
ok(row($node, "SELECT s.updated_at = t.started_at AS same FROM chat.chat_task AS t JOIN chat.chat_session AS s ON s.id = t.session_id WHERE t.id = '$task'")->{same},
	'which sets updated_at');
$fake->open_gate('head');
is(turn_of($node, $task)->{status}, 'completed', 'then it comes');

# sessions that share a channel
my @shared = map { create_session($node, channel => 'gateway')->{id} } 1 .. 2;
my $gateway = listener($node, 'gateway');
my @tasks = map { ask($node, $_, 'shared [[tokens=3 gateat=1:shared]]') } @shared;
$fake->wait_at_gate('shared', 2);
$fake->open_gate('shared', 2);
my %ended;
my @notes = map { $_->{event} } $gateway->until(sub {
	$ended{ $_[0]{taskId} } = 1 if $_[0]{type} eq 'finish';
	return keys %ended == 2;
});
foreach my $shared (@tasks)
{
	is_deeply([ grep { defined $_->{seq} && $_->{taskId} eq $shared } @notes ], [ stored_events($node, $shared) ],
		'on a channel that sessions share taskId tells the streams apart');
}
$gateway->stop;

# a failed turn is a whole stream, too
($notes, $turn) = listen_to('[[status=400]]');
check_stream($notes, $turn, 'failed');
($notes, $turn) = listen_to('[[tokens=9 cutafter=3]]');
check_stream($notes, $turn, 'cut');
$listener->stop;

# chat.notify_payload = pointer: no content in the notifications (T31)
my $pointer =
  chat_cluster('pointer', conf => "chat.notify_payload = 'pointer'");
create_server($pointer, $fake);
$session = create_session($pointer);
$listener = listener($pointer, $session->{channel});
$task = ask($pointer, $session->{id}, '[[tokens=30 delay=1]]');
$turn = turn_of($pointer, $task);
my $last = $turn->{events}[-1]{seq};
my @pointers =
  grep { defined $_->{event}{seq} } $listener->until(sub { ($_[0]{seq} // 0) == $last });
is((grep { encode([ sort keys %{ $_->{event} } ]) ne '["seq","taskId"]' } @pointers),
	0, 'T31: pointers hold taskId and seq, nothing else');
is_deeply([ map { $_->{event}{seq} } @pointers ],
	[ 1 .. $last ], 'one for each event');
is( text_of(events($pointer, $task)),
	join('', map { "t$_ " } 0 .. 29),
	'the events are read by get_task_events');

done_testing();
