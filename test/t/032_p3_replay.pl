# P3: can everything that was notified be read again, after a kill -9 of all
# processes with commits that nobody waited for?  Either an event has its
# row, or its number is never used for anything else (T42, T43).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

use constant RUN => 2**32;

my $fake = start_fake();
my $node = chat_cluster('main',
	conf => "wal_writer_delay = 10s\nwal_writer_flush_after = 100MB");
create_server($node, $fake);

my @turns = start_turns($node, 5,
	'hello [[tokens=30 gateat=10:a gateat=20:b gateat=29:c]]');
my (%notified, %lost);

# Notes what a listener was told; no number ever stands for two things.
sub note_events
{
	my (@events) = @_;

	foreach my $event (grep { defined $_->{seq} } @events)
	{
		my $seen = \$notified{ $event->{taskId} }{ $event->{seq} };
		my $text = encode($event);
		is($text, $$seen, "T42: $event->{taskId} $event->{seq} once more")
		  if defined $$seen && $$seen ne $text;
		$$seen = $text;
	}
	return;
}

# Listens until all streams have got as far as a token.
sub listen_to_token
{
	my ($listener, $token) = @_;
	my %there;

	$listener->until(
		sub {
			note_events($_[0]);
			$there{ $_[0]{taskId} } = 1
			  if ($_[0]{delta} // '') =~ /t$token $/;
			return keys %there == @turns;
		});
	return;
}

$fake->get_json('/gate/a?wait=' . @turns);
my $listener = listener($node, map { $_->{channel} } @turns);
foreach my $crash (1 .. 3)
{
	# further deltas, that only an asynchronous commit has stored
	$fake->open_gate('a', scalar @turns);
	listen_to_token($listener, 19);
	kill_everything($node);
	$node->start;
	$fake->get_json('/gate/a?wait=' . @turns);
	$listener = listener($node, map { $_->{channel} } @turns);
	foreach my $turn (@turns)
	{
		my %stored =
		  map { $_->{seq} => encode($_) } stored_events($node, $turn->{task});
		my $told = $notified{ $turn->{task} };
		$lost{"$turn->{task} $_"} = 1
		  foreach grep { !exists $stored{$_} } keys %$told;
		my @wrong = grep { exists $stored{$_} && $stored{$_} ne $told->{$_} }
		  keys %$told;
		is_deeply(\@wrong, [],
			"crash $crash: stored is what was notified, or nothing");
		my @first = grep { $_ > $crash * RUN } sort { $a <=> $b } keys %stored;
		is($first[0], $crash * RUN + 1, 'the run starts where it should');
		is(decode($stored{ $first[0] })->{type},
			'reset-step', 'and with reset-step');
	}
}
cmp_ok(scalar(keys %lost), '>', 0,
	    'the crashes have lost events that were notified ('
	  . scalar(keys %lost)
	  . ')');

# The end: nobody has taken a lost number.
$fake->open_gate($_, 10) foreach qw(a b c);
my $text = join '', map { "t$_ " } 0 .. 29;
foreach my $turn (@turns)
{
	my $task = $turn->{task};
	is(wait_for_task($node, $task)->{status}, 'completed', 'a task ends');
	my @stored = stored_events($node, $task);
	my @reused = grep { $lost{"$task $_->{seq}"} } @stored;
	is(@reused, 0, 'T42: no number was used again');
	is(text_of(@stored), $text, 'its events add up to the answer');
	my $seq = 0;
	my @jumps = grep {
		my $ok = $_->{seq} == $seq + 1
		  || ($_->{seq} % RUN == 1 && $_->{type} eq 'reset-step');
		$seq = $_->{seq};
		!$ok;
	} @stored;
	is_deeply(\@jumps, [], 'without a gap but for the resets');
	is_deeply(
		row($node,
			"SELECT array_agg(content) AS all FROM chat.chat_message"
			  . " WHERE task_id = '$task' AND role = 'assistant'")->{all},
		[$text],
		'and one message holds it');
}

done_testing();
