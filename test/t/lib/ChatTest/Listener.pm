# ChatTest::Listener: a client that listens, as an application does
#
#	my $l = ChatTest::Listener->new($connstr, @channels);	LISTEN has committed
#	$l->next($seconds);		the next notification, or undef when none comes
#	$l->turn($task);		the events of a task up to the terminal one
#	$l->until(sub { ... });	all notifications up to the one it is true for
#	$l->pending;			those that are here already
#	$l->stop;
#
# A notification is a hash: channel, payload (as sent), event (decoded).

package ChatTest::Listener;

use strict;
use warnings;

use IO::Select;
use JSON::PP ();
use PostgreSQL::Test::Utils ();
use Time::HiRes ();

my %running;
my %unescape = ('\\' => '\\', 'n' => "\n", 'r' => "\r");

# Starts the client and returns when it listens.
sub new
{
	my ($class, $connstr, @channels) = @_;
	my $self = bless { buffer => '' }, $class;

	pipe(my $in, my $keep) or die "pipe: $!";
	pipe(my $out, my $child_out) or die "pipe: $!";
	my $program = ChatTest::build_file('listen');
	my $pid = fork() // die "fork: $!";
	if ($pid == 0)
	{
		open STDIN, '<&', $in or die;
		open STDOUT, '>&', $child_out or die;
		close $keep;
		exec $program, $connstr, @channels or die "$program: $!";
	}
	close $in;
	close $child_out;
	@$self{qw(pid out stdin select)} = ($pid, $out, $keep, IO::Select->new($out));
	$running{$pid} = $keep;
	my $line = $self->line($PostgreSQL::Test::Utils::timeout_default) // '';
	$line eq 'LISTENING' or die "the listener says \"$line\"\n";
	return $self;
}

# Returns the next line, or undef at the timeout; dies when there are no more.
sub line
{
	my ($self, $timeout) = @_;
	my $until = Time::HiRes::time() + $timeout;
	my $end;

	while (($end = index $self->{buffer}, "\n") < 0)
	{
		my $left = $until - Time::HiRes::time();
		$self->{select}->can_read($left > 0 ? $left : 0) or return;
		sysread($self->{out}, $self->{buffer}, 65536, length $self->{buffer})
		  or die "the listener has ended\n";
	}
	my $line = substr $self->{buffer}, 0, $end + 1, '';
	chomp $line;
	return $line;
}

# Returns the next notification; without a time it has to come.
sub next
{
	my ($self, $timeout) = @_;
	my $line =
	  $self->line($timeout // $PostgreSQL::Test::Utils::timeout_default);

	if (!defined $line)
	{
		return if defined $timeout;
		die "timed out waiting for a notification\n";
	}
	my ($channel, $payload) = split /\t/, $line, 2;
	$payload =~ s/\\([\\nr])/$unescape{$1}/g;
	return {
		channel => $channel,
		payload => $payload,
		event => JSON::PP->new->utf8->decode($payload)
	};
}

# Returns the notifications that have arrived already.
sub pending
{
	my ($self) = @_;
	my @all;

	while (my $note = $self->next(0))
	{
		push @all, $note;
	}
	return @all;
}

# Returns all notifications up to the one for which the condition holds.
sub until
{
	my ($self, $condition) = @_;
	my @all;

	for (;;)
	{
		push @all, $self->next;
		local $_ = $all[-1]{event};
		return @all if $condition->($all[-1]{event});
	}
}

# Returns a task's events up to the terminal one; others' are passed over, and
# so are heartbeats, which come when they like.
sub turn
{
	my ($self, $task) = @_;
	my @notes = $self->until(
		sub {
			return $_[0]{taskId} eq $task && $_[0]{type} =~ /^(finish|abort)$/;
		});

	return grep { $_->{taskId} eq $task && $_->{type} ne 'data-heartbeat' }
	  map { $_->{event} } @notes;
}

# Ends the client.
sub stop
{
	my ($self) = @_;
	return unless delete $running{ $self->{pid} };
	close $self->{stdin};
	waitpid $self->{pid}, 0;
	return;
}

END
{
	my $exit_code = $?;

	foreach my $pid (keys %running)
	{
		kill 'KILL', $pid;
		waitpid $pid, 0;
	}
	$? = $exit_code;
}

1;
