# Does a client that is cut off at any point, any number of times, have the
# whole stream at its end, and nothing twice?  Streams of 1, 1001 and 10,001
# deltas, read by paging, by waiting, by LISTEN and from snapshots, in a
# random mixture.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $seed = $ENV{CHAT_SEED} // int rand 2**31;
srand $seed;
diag("seed $seed");

my $fake = start_fake();
# without pace, or with a flush now and then, many deltas would become one
my $node = chat_cluster('main', conf => 'chat.flush_interval = 0');
create_server($node, $fake);
my $session = create_session($node);
my $listener;

# Takes up the stream after a number from get_task_events, in pages.
sub read_pages
{
	my ($task, $after) = @_;
	my $size = 1 + int rand 700;

	return map { $_->{payload} } rows($node,
		"SELECT payload FROM chat.get_task_events('$task', $after, $size)");
}

# The same, waiting.
sub read_waiting
{
	my ($task, $after) = @_;
	my $size = 1 + int rand 700;

	return map { $_->{payload} } rows($node,
		"SELECT payload FROM chat.wait_task_events('$task', $after, max_rows => $size)");
}

# LISTEN, commit, read what was missed, go on with notifications; stop at
# a random point.
sub read_listening
{
	my ($task, $after) = @_;
	my $own = listener($node, $session->{channel});
	my @got = map { $_->{payload} } rows($node,
		"SELECT payload FROM chat.get_task_events('$task', $after)");
	my $more = int rand 200;

	while ($more-- > 0 && !(@got && $got[-1]{type} =~ /^(finish|abort)$/))
	{
		my $event = $own->next->{event};
		my $last = @got ? $got[-1]{seq} : $after;
		push @got, $event
		  if $event->{taskId} eq $task && ($event->{seq} // 0) > $last;
	}
	$own->stop;
	return @got;
}

# Reads a task's stream with disconnects; returns the events.
sub read_torn
{
	my ($task) = @_;
	my @readers = (\&read_pages, \&read_waiting, \&read_listening);
	my @all;

	until (@all && $all[-1]{type} =~ /^(finish|abort)$/)
	{
		my $after = @all ? $all[-1]{seq} : 0;
		my @got = $readers[ int rand @readers ]->($task, $after);
		# a part of what was sent does not arrive
		splice @got, 1 + int rand @got if @got > 1 && rand() < 0.3;
		push @all, @got;
	}
	return @all;
}

foreach my $tokens (1, 1001, 10001)
{
	my $answer = join '', map { "t$_ " } 0 .. $tokens - 1;
	my $gate = "gate$tokens";
	# some of the readers come while it streams
	my $task = ask($node, $session->{id},
		"go [[tokens=$tokens delay=1 " . ($tokens > 1 ? 'gateat=' . int($tokens / 2) : 'gateat=0') . ":$gate]]");
	$fake->wait_at_gate($gate);
	my $snapshot = decode($node->safe_psql('postgres',
		"SELECT chat.task_snapshot('$task')"));
	$fake->open_gate($gate);
	my @torn = read_torn($task);
	wait_for_task($node, $task);
	my @stored = stored_events($node, $task);

	diag("$tokens tokens came in " . @stored . ' events');
	is(text_of(@torn), $answer,
		"T41, T44: a torn reader has all of $tokens deltas, once");
	is_deeply(\@torn, \@stored,
		'T34, T42: event by event, each number once');
	is_deeply([ read_torn($task) ], \@stored, 'and when it comes late');
	my $text = join '', map { $_->{text} }
	  grep { $_->{type} eq 'text' } @{ $snapshot->{message}{parts} };
	is($text . text_of(events($node, $task, $snapshot->{seq})),
		$answer, 'so has one that begins with a snapshot');
	my $whole = decode($node->safe_psql('postgres',
		"SELECT chat.task_snapshot('$task')"));
	is($whole->{message}{parts}[-1]{text}, $answer, 'or ends with one');
}

done_testing();
