# Are events kept for chat.event_retention, by rotation, with nobody in the
# way and nobody getting half a stream?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use PostgreSQL::Test::Utils;
use Test::More;

use constant REPLAY => 2**52;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);
my $session = create_session($node);

# Sets the retention.
sub set_retention
{
	my ($value) = @_;
	$node->safe_psql('postgres',
		"ALTER SYSTEM SET chat.event_retention = '$value'");
	$node->reload;
	return;
}

# Waits until a task has no stored events.
sub wait_until_gone
{
	my ($task) = @_;
	wait_for($node,
		"SELECT count(*) = 0 FROM chat.chat_event WHERE task_id = '$task'");
	return;
}

# Returns task_snapshot() of a task.
sub snapshot
{
	my ($task) = @_;
	return decode($node->safe_psql('postgres',
		"SELECT chat.task_snapshot('$task')"));
}

# Returns events without what numbers them.
sub plain
{
	return [ map { my %e = %$_; delete @e{qw(seq taskId)}; \%e } @_ ];
}

# what there is to retire
my %message = (
	text => 'text [[reasoning=3 tokens=5]]',
	refusal => 'no [[refusal=never]]',
	tool => 'call [[tool=nothing args={"a":[1,"x"]} thentext=after]]',
	failed => 'bad [[status=400 errmsg=nope]]',
	broken => 'half [[tokens=6 cutafter=3]]',);
my (%task, %before, %events);
$node->safe_psql('postgres', 'ALTER SYSTEM SET chat.max_retries = 0');
$node->reload;
foreach my $name (sort keys %message)
{
	$task{$name} = ask($node, create_session($node)->{id}, $message{$name});
	wait_for_task($node, $task{$name});
	$before{$name} = snapshot($task{$name});
	$events{$name} = [ events($node, $task{$name}) ];
}
my $cancelled = ask($node, create_session($node)->{id},
	'long [[tokens=9 gateat=3:cancel]]');
$fake->wait_at_gate('cancel');
wait_for($node,
	"SELECT chat.task_snapshot('$cancelled')->'message'->>'parts' LIKE '%t1 %'");
$node->safe_psql('postgres', "SELECT chat.cancel_task('$cancelled')");
wait_for_task($node, $cancelled);
$task{cancelled} = $cancelled;
$before{cancelled} = snapshot($cancelled);
$events{cancelled} = [ events($node, $cancelled) ];

# a stream that goes on all the time, with a listener
my $listener = listener($node, $session->{channel});
my $running = ask($node, $session->{id}, 'go [[tokens=6 gateat=3:mid]]');
$fake->wait_at_gate('mid');
wait_for($node,
	"SELECT chat.task_snapshot('$running')->'message'->>'parts' LIKE '%t2 %'");
my ($slot) = $node->safe_psql('postgres',
	"SELECT slot FROM chat.chat_task WHERE id = '$running'");

# a reader with a snapshot of this time
my $old = $node->background_psql('postgres');
$old->query_safe("BEGIN ISOLATION LEVEL REPEATABLE READ;"
	  . " SELECT count(*) FROM chat.chat_task");

set_retention('1s');
wait_until_gone($_) foreach values %task;
wait_for($node,
	"SELECT slot <> $slot FROM chat.chat_task WHERE id = '$running'");
pass('T45: events are retired');

# streams that are gone
foreach my $name (sort keys %task)
{
	my $task = $task{$name};
	my $after = snapshot($task);
	my @replay = events($node, $task);

	is($replay[0]{type}, 'start', "$name: the replay opens with start");
	is($replay[0]{messageId}, $before{$name}{message}{id}, 'of the same message');
	is_deeply([ map { $_->{seq} } @replay ],
		[ map { REPLAY + $_ } 1 .. @replay ], 'it has numbers of its own');
	is($replay[-1]{type}, $events{$name}[-1]{type},
		'T46: and ends as the stream did');
	is_deeply(
		plain(grep { $_->{type} =~ /^(error|abort|finish|message-metadata)$/ } @replay),
		plain(grep { $_->{type} =~ /^(error|abort|finish|message-metadata)$/ }
			  @{ $events{$name} }),
		'with the same error, usage and reason');
	is_deeply($after->{message}, $before{$name}{message},
		'T45: the snapshot is the same as before');
	is($after->{status}, $before{$name}{status}, 'and so is the status');
	my $half = int(@replay / 2);
	is_deeply(
		[ events($node, $task, $replay[$half]{seq}) ],
		[ @replay[ $half + 1 .. $#replay ] ],
		'a replay can be resumed, too');
	is_deeply([ events($node, $task, 3) ],
		\@replay, 'who has seen a part of the stream gets the replay as a whole');
	is_deeply([ events($node, $task, $replay[-1]{seq}) ],
		[], 'who has seen it gets nothing');
}

# an old snapshot
is( scalar $old->query_safe(
		"SELECT string_agg(payload->>'delta', '') FROM chat.get_task_events('$task{text}') WHERE payload->>'type' = 'text-delta'"),
	't0 t1 t2 t3 t4 ', 'T43: a reader with an old snapshot gets the replay');
is( scalar $old->query_safe(
		"SELECT payload->>'type' FROM chat.get_task_events('$running')"),
	"start\nstart-step",
	'T43: or its beginning, of a task that has not ended, and never half a stream');
$old->query_safe('COMMIT');

# the stream that went on
set_retention('1h');
$fake->open_gate('mid');
my @notified = $listener->turn($running);
wait_for_task($node, $running);
is(text_of(@notified), 't0 t1 t2 t3 t4 t5 ',
	'a stream that goes on is carried over');
is_deeply([ map { $_->{seq} } @notified ],
	[ 1 .. @notified ], 'its numbers go on, too');
is_deeply([ events($node, $running) ],
	\@notified, 'all of it is in one place');

# somebody reads a slot, and stays
my $held = ask($node, $session->{id}, 'held [[tokens=2]]');
wait_for_task($node, $held);
my @stored = stored_events($node, $held);
($slot) = $node->safe_psql('postgres',
	"SELECT slot FROM chat.chat_task WHERE id = '$held'");
my $reader = $node->background_psql('postgres');
$reader->query_safe("BEGIN; SELECT count(*) FROM chat.chat_event_$slot");
set_retention('1s');
wait_for($node,
	"SELECT count(*) > 1 FROM chat.chat_event_slot"
	  . " WHERE opened_at >= (SELECT opened_at FROM chat.chat_event_slot WHERE slot = $slot)");
my $meanwhile = ask($node, $session->{id}, 'meanwhile [[tokens=3]]');
wait_for_task($node, $meanwhile);
is(text_of(events($node, $meanwhile)), 't0 t1 t2 ',
	'a reader that stays holds up nobody');
is_deeply([ stored_events($node, $held) ],
	\@stored, 'and what it reads stays as long as it does');
is( $node->safe_psql('postgres', <<"EOF"), '0', 'nobody waits for it');
SELECT count(*) FROM pg_locks WHERE NOT granted
EOF
$reader->query_safe('COMMIT');
wait_until_gone($held);
pass('then it goes');

# nothing is left
wait_until_gone($meanwhile);
wait_until_gone($running);
wait_for($node, 'SELECT count(*) = 1 FROM chat.chat_event_slot');
pass('one slot is open when all events are gone');

# a task that ended before it had any event
my $never = $node->safe_psql('postgres', <<"EOF");
INSERT INTO chat.chat_task (session_id, server, status, finished_at, error)
VALUES ('$session->{id}', 'fake', 'failed', now(),
	'{"code": "restored", "message": "gone \\"for good\\"", "retryable": false}')
RETURNING id
EOF
$never =~ s/\n.*//s;
is_deeply(
	plain(events($node, $never)),
	[
		{
			type => 'start',
			messageId => $node->safe_psql('postgres',
				"SELECT answer_id FROM chat.chat_task WHERE id = '$never'")
		},
		{
			type => 'error',
			errorText => 'gone "for good"',
			code => 'restored'
		},
		{ type => 'finish', finishReason => 'error' }
	],
	'T46: a task that ended before any event has its end, too');

# several workers: each stream writes to the slot that its worker knows
$node->append_conf('postgresql.conf', 'chat.workers = 2');
set_retention('1h');
wait_for($node, 'SELECT count(*) = 2 FROM chat.worker_status() WHERE pid > 0');
$node->safe_psql('postgres',
	"SELECT chat.register_tool(kind => 'client', name => 'ask_user', shared => true)");

# Starts streams that stand at a gate until both workers have some.
sub start_both
{
	my ($gate) = @_;
	my @tasks;

	do
	{
		push @tasks, map { ask($node, create_session($node)->{id},
				"both [[tokens=9 gateat=3:$gate]]") } 1 .. 4;
		$fake->get_json("/gate/$gate?wait=" . @tasks);
	} until $node->safe_psql('postgres', 'SELECT count(DISTINCT holder) = 2'
		  . ' FROM chat.chat_job WHERE holder IS NOT NULL') eq 't';
	return @tasks;
}

# Lets them end, and looks whether they are whole.
sub end_both
{
	my ($what, $gate, @tasks) = @_;

	$fake->open_gate($gate, scalar @tasks);
	wait_for_task($node, $_) foreach @tasks;
	my @whole = grep {
		my @events = events($node, $_);
		text_of(@events) eq join('', map { "t$_ " } 0 .. 8)
		  && $events[-1]{type} eq 'finish'
	} @tasks;
	is(scalar @whole, scalar @tasks, "two workers: $what are whole");
	return;
}

# a task that stays, in the same slot as streams of both
my $waits = ask($node, create_session($node)->{id},
	'call [[tool=ask_user args={} id=c1 thentext=done]]');
wait_for($node, "SELECT status = 'waiting' FROM chat.chat_task WHERE id = '$waits'");
my @waiting = stored_events($node, $waits);
my @both = start_both('both');
my $log = -s $node->logfile;
set_retention('1s');
$node->wait_for_log(qr/another worker writes to event slot/, $log);
pass('two workers: a stream keeps its slot until it ends');
end_both('its streams', 'both', @both);
wait_until_gone($_) foreach @both;
is_deeply([ stored_events($node, $waits) ],
	\@waiting, 'two workers: what waits goes along, whole');

# streams in the open slot are in nobody's way
set_retention('1h');
($slot) = $node->safe_psql('postgres',
	"SELECT slot FROM chat.chat_task WHERE id = '$waits'");
set_retention('1s');
wait_for($node, "SELECT count(*) > 1 FROM chat.chat_event_slot"
	  . " WHERE opened_at >= (SELECT opened_at FROM chat.chat_event_slot WHERE slot = $slot)");
@both = ();
my $tries = 0;
while ($tries++ < 300 && $node->safe_psql('postgres',
		"SELECT slot = $slot FROM chat.chat_task WHERE id = '$waits'") eq 't')
{
	# whichever slot is open, both workers write to it
	push @both, map { ask($node, create_session($node)->{id},
			'open [[tokens=9 gateat=3:open]]') } 1 .. 4;
	$fake->get_json('/gate/open?wait=' . @both);
}
cmp_ok($tries, '<', 300, 'two workers: a slot is retired while others write to the open one');
end_both('the others', 'open', @both);
wait_until_gone($_) foreach @both;
$node->safe_psql('postgres', "SELECT chat.submit_tool_output(session_id, 'c1', '42')"
	  . " FROM chat.chat_task WHERE id = '$waits'");
is(wait_for_task($node, $waits)->{status}, 'completed', 'two workers: what waited goes on');
is(text_of(events($node, $waits)), 'done', 'and its stream is whole');

$listener->stop;
$old->quit;
$reader->quit;
done_testing();
