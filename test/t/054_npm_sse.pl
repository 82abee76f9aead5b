# Is what chat.sse() returns the AI SDK's protocol, for the AI SDK itself, and
# does its client build the very message that task_snapshot() returns, and
# to_ui_messages() in its place?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Npm;
use Test::More;

require_npm();

my $fake = start_fake();
my $node = chat_cluster('main', conf => 'chat.retry_base_delay = 1ms');
create_server($node, $fake);
my $session = create_session($node);

# Returns chat.sse() of a task.
sub sse
{
	my ($task, $after, $protocol) = @_;
	return $node->safe_psql('postgres',
		'SELECT chat.sse(' . join(', ', literal($task), $after // 0, $protocol // 7) . ')');
}

# Has the client read it.
sub verify
{
	my ($task, $protocol) = @_;
	return decode(run_node(sse($task, 0, $protocol), 'verify.mjs', $protocol));
}

# Returns task_snapshot() of a task.
sub snapshot
{
	my ($task) = @_;
	return decode($node->safe_psql('postgres',
		"SELECT chat.task_snapshot('$task')"));
}

# Checks a task's stream with both clients.
sub check
{
	my ($task, $what) = @_;
	my $snapshot = snapshot($task);

	foreach my $protocol (6, 7)
	{
		my $got = eval { verify($task, $protocol) };
		ok($got, "$what: ai $protocol takes every event") or diag($@), next;
		ok($got->{done}, 'and the end');
		# where ai 6 has the input that was refused
		$_->{input} //= delete $_->{rawInput}
		  foreach grep { exists $_->{rawInput} } @{ $got->{message}{parts} };
		is_deeply($got->{message}, $snapshot->{message},
			'it builds the message that the snapshot has')
		  or diag(encode($got->{message}) . "\n" . encode($snapshot->{message}));
		ok(!(grep { exists $_->{seq} || exists $_->{taskId} || exists $_->{code} }
				  @{ $got->{chunks} }),
			'nothing of ours is in the events');
		ok(!(grep { $_->{type} eq 'reset-step' } @{ $got->{chunks} }),
			'no reset-step where the protocol has none')
		  if $protocol == 6;
	}
	return;
}

# Makes a task that has ended with the given events.
sub invent
{
	my (@events) = @_;
	my $task = $node->safe_psql('postgres',
		"INSERT INTO chat.chat_task (session_id, server, status, finished_at, slot, run)"
		  . " VALUES ('$session->{id}', 'fake', 'completed', now(), 0, 0) RETURNING id");
	$task =~ s/\n.*//s;
	my $seq = 0;
	my $rows = join ', ', map {
		$seq++;
		my $event = encode({ %$_, taskId => $task, seq => $seq });
		"(0, '$task', $seq, " . literal($event) . ')'
	} @events;
	$node->safe_psql('postgres',
		"INSERT INTO chat.chat_event (slot, task_id, seq, payload) VALUES $rows");
	return $task;
}

# real streams
my %message = (
	text => "text with \"quotes\", \\ and \x{e9}\x{1F600} [[reasoning=3 tokens=30]]",
	echo => "echo \"this\" \\ back, \x{e9}\x{1F600}\nand go on",
	refusal => 'no [[refusal=never]]',
	reset => 'again [[tokens=8 cutafter=5 times=1 rst=1]]',
	tool => 'call [[tool=nothing args={"a":[1,"x"]} argsplit=1 tool=other thentext=after]]',
	failed => 'bad [[status=400 errmsg=nope]]',
	broken => 'half [[tokens=6 error_at=3]]');
my %task;
foreach my $name (sort keys %message)
{
	utf8::encode(my $text = $message{$name});
	$task{$name} = ask($node, create_session($node)->{id}, $text);
	wait_for_task($node, $task{$name});
	check($task{$name}, $name);
}
like(verify($task{failed}, 7)->{error}, qr/nope/, 'the client learns of an error');
my ($reset) = grep { $_->{type} eq 'reset-step' } events($node, $task{reset});
ok($reset, 'there was a reset-step');

# the stored messages are UIMessages, the same that the stream makes
sub stored
{
	my ($session, $protocol) = @_;
	my $json = $node->safe_psql('postgres', "SELECT chat.to_ui_messages('$session')");
	return decode(run_node($json, 'ui.mjs', $protocol));
}

foreach my $name (sort keys %message)
{
	my $session = row($node, "SELECT session_id FROM chat.chat_task WHERE id = '$task{$name}'")->{session_id};

	foreach my $protocol (6, 7)
	{
		my $got = eval { stored($session, $protocol) };
		ok($got, "to_ui_messages() of $name: ai $protocol takes every message") or diag($@), next;
		is($got->{messages}[0]{role}, 'user', 'the question')
		  or diag(encode($got->{messages}));
		is($got->{model}[0]{role}, 'user', 'and makes a request of it');
		next if $name eq 'failed';
		my $streamed = snapshot($task{$name})->{message};
		# what the stream calls a block is not stored
		delete $_->{id} foreach @{ $streamed->{parts} };
		is_deeply([ @{ $got->{messages}[-1] }{qw(id role parts)} ], [ @$streamed{qw(id role parts)} ],
			'the answer is the one that was streamed')
		  or diag(encode($got->{messages}[-1]) . "\n" . encode($streamed));
	}
}

# what only other parts of the runtime send
my $invented = invent(
	{ type => 'start', messageId => 'm-1', messageMetadata => { a => { x => 1 } } },
	{ type => 'start-step' },
	{ type => 'data-status', id => 'd', data => { compacted => JSON::PP::true } },
	{ type => 'data-status', id => 'd', data => { compacted => JSON::PP::false } },
	{ type => 'data-heartbeat', data => {}, transient => JSON::PP::true },
	{ type => 'tool-input-start', toolCallId => 'c1', toolName => 'a' },
	{ type => 'tool-input-delta', toolCallId => 'c1', inputTextDelta => '{"x":' },
	{ type => 'tool-input-delta', toolCallId => 'c1', inputTextDelta => '"\\"}"}' },
	{ type => 'tool-input-available', toolCallId => 'c1', toolName => 'a', input => { x => '"}' } },
	{ type => 'tool-input-available', toolCallId => 'c2', toolName => 'b', input => {} },
	{ type => 'tool-input-available', toolCallId => 'c3', toolName => 'c', input => {} },
	{ type => 'tool-approval-request', toolCallId => 'c2', approvalId => 'p1' },
	{ type => 'tool-approval-request', toolCallId => 'c3', approvalId => 'p2' },
	{ type => 'tool-output-available', toolCallId => 'c1', output => { n => 1 }, preliminary => JSON::PP::true },
	{ type => 'tool-output-denied', toolCallId => 'c3' },
	{ type => 'tool-output-error', toolCallId => 'c2', errorText => 'oops' },
	{ type => 'finish-step' },
	# nothing to take back: the step is over
	{ type => 'reset-step' },
	{ type => 'start-step' },
	{ type => 'text-start', id => 't' },
	{ type => 'text-delta', id => 't', delta => "void \x{e9}" },
	{ type => 'reset-step' },
	{ type => 'text-start', id => 't' },
	{ type => 'text-delta', id => 't', delta => "right \x{1F600}\n" },
	{ type => 'text-end', id => 't' },
	# a long operation of an earlier step ends
	{ type => 'tool-output-available', toolCallId => 'c1', output => [ 'done' ] },
	{ type => 'finish-step' },
	{ type => 'unheard-of', x => 1 },
	{ type => 'message-metadata', messageMetadata => { a => { y => 2 }, b => 'c' } },
	{ type => 'finish', finishReason => 'stop', extra => 1 });
check($invented, 'everything');

# an old client that has seen what is taken back
like(sse($invented, 20, 6), qr/^id: 1\ndata: \{"type":"start"/,
	'T41: protocol 6 begins anew where the client has seen void text');
unlike(sse($invented, 20, 6), qr/void/, 'without the void');
like(sse($invented, 22, 6), qr/^id: 23\n/,
	'and goes on where it has seen none');
like(sse($invented, 20, 7), qr/^id: 21\n.*\nid: 22\ndata: \{"type":"reset-step"\}\n/s,
	'protocol 7 has reset-step for that');

# a crash may have lost what a listener was told of
$node->safe_psql('postgres',
	"DELETE FROM chat.chat_event WHERE task_id = '$invented' AND seq IN (20, 21)");
like(sse($invented, 21, 6), qr/^id: 1\n/, 'the same where a crash has lost it');

# resume
my $all = sse($task{text});
my ($head, $rest) = $all =~ /^((?:id: \d+\n[^\n]*\n\n){4})(.*)$/s;
my ($last) = $head =~ /.*^id: (\d+)$/ms;
is(sse($task{text}, $last), $rest, 'a Last-Event-ID is where it goes on');
like(sse($task{text}, 999), qr/^data: \[DONE\]\n\n$/,
	'behind the end there is only the end');
my ($code, undef, $error) = $node->psql('postgres',
	"SELECT chat.sse('$task{text}', 0, 5)");
like($error, qr/unknown protocol version 5/, 'an unknown protocol is refused');

# a stream that has not ended
my $open = ask($node, $session->{id}, 'go [[tokens=4 gateat=2:mid]]');
$fake->wait_at_gate('mid');
wait_for($node, "SELECT chat.sse('$open') LIKE '%t1 %'");
unlike(sse($open), qr/DONE/, 'no [DONE] while it goes on');
my $at = snapshot($open)->{seq};
is(sse($open, $at), '', 'and nothing when nothing has come');
$fake->open_gate('mid');
like($node->safe_psql('postgres', "SELECT chat.sse('$open', $at, timeout => '30 s')"),
	qr/t2/, 'it can wait');
wait_for_task($node, $open);

# after the retention
$node->safe_psql('postgres', "ALTER SYSTEM SET chat.event_retention = '1s'");
$node->reload;
foreach my $name (sort keys %task)
{
	wait_for($node,
		"SELECT count(*) = 0 FROM chat.chat_event WHERE task_id = '$task{$name}'");
	check($task{$name}, "replay of $name");
}

done_testing();
