# ChatTest::Fake: a running instance of the bundled fake endpoint
#
#	my $fake = ChatTest::Fake->new('--delay', 5);
#	$fake->port;
#	$fake->requests;			all recorded requests, decoded
#	$fake->last_request;
#	$fake->stats;				counters
#	$fake->open_gate('g', 2);	lets two streams pass gate g
#	$fake->wait_at_gate('g');	returns when a stream stands there
#	$fake->forget;				drops the recorded requests
#	$fake->get($path), ->post($path, $body), ->delete($path): (status, body)
#	$fake->stop;				as a crash: open connections break
#
# With CHAT_FOREIGN in the environment it is npm's aimock instead, which knows
# less: see test/aimock/same.mjs.
#
# It ends with its standard input, so it does not outlive the test.

package ChatTest::Fake;

use strict;
use warnings;

use IO::Select;
use IO::Socket::INET;
use JSON::PP ();
use PostgreSQL::Test::Utils ();

my %running;

# Starts the endpoint with further arguments and reads its port.
sub new
{
	my ($class, @args) = @_;
	my $self = bless {}, $class;

	pipe(my $in, my $keep) or die "pipe: $!";
	pipe(my $out, my $child_out) or die "pipe: $!";
	my @program = (ChatTest::build_file('fake_llm'), '--die-with-stdin', @args);
	# the same commands before a foreign implementation of the API
	@program = ('node', "$FindBin::RealBin/../aimock/same.mjs",
		"$ENV{CHAT_NPM}/node_modules")
	  if $ENV{CHAT_FOREIGN};
	my $pid = fork() // die "fork: $!";
	if ($pid == 0)
	{
		open STDIN, '<&', $in or die;
		open STDOUT, '>&', $child_out or die;
		close $keep;
		exec @program or die "$program[0]: $!";
	}
	close $in;
	close $child_out;
	$self->{pid} = $pid;
	$self->{stdin} = $keep;
	$running{$pid} = $keep;
	IO::Select->new($out)->can_read($PostgreSQL::Test::Utils::timeout_default)
	  or die "the fake endpoint tells no port\n";
	my $line = <$out> // '';
	$line =~ /^port=(\d+)$/ or die "the fake endpoint says \"$line\"\n";
	$self->{port} = $1;
	return $self;
}

sub port
{
	return $_[0]{port};
}

sub pid
{
	return $_[0]{pid};
}

# Makes one request; returns status and body.
sub request
{
	my ($self, $method, $path, $body) = @_;
	my $timeout = $PostgreSQL::Test::Utils::timeout_default;
	my $socket = IO::Socket::INET->new(
		PeerHost => '127.0.0.1',
		PeerPort => $self->{port},
		Timeout => $timeout) or die "the fake endpoint: $!\n";
	my $answer = '';

	$body //= '';
	print $socket "$method $path HTTP/1.1\r\nHost: fake\r\n"
	  . "Content-Type: application/json\r\nConnection: close\r\n"
	  . 'Content-Length: ' . length($body) . "\r\n\r\n$body";
	my ($select, $total) = (IO::Select->new($socket));
	while (!defined $total || length $answer < $total)
	{
		$select->can_read($timeout) or die "$method $path: no answer\n";
		sysread($socket, $answer, 65536, length $answer) or last;
		next if defined $total;
		my $head = index $answer, "\r\n\r\n";
		next if $head < 0;
		$total = $head + 4 + $1
		  if substr($answer, 0, $head) =~ /^Content-Length: *(\d+)/mi;
	}
	close $socket;
	my ($head, $content) = split /\r\n\r\n/, $answer, 2;
	my ($status) = ($head // '') =~ m{^HTTP/1\.\d (\d+)}
	  or die "$method $path: \"$answer\"\n";
	return ($status, $content);
}

sub get
{
	my ($self, $path) = @_;
	return $self->request('GET', $path);
}

sub post
{
	my ($self, $path, $body) = @_;
	return $self->request('POST', $path, $body);
}

sub delete
{
	my ($self, $path) = @_;
	return $self->request('DELETE', $path);
}

# Makes a GET request and decodes the answer.
sub get_json
{
	my ($self, $path) = @_;
	my ($status, $body) = $self->get($path);
	die "GET $path: $status $body\n" if $status != 200;
	return JSON::PP->new->utf8->decode($body);
}

sub requests
{
	return @{ $_[0]->get_json('/requests') };
}

sub last_request
{
	return $_[0]->get_json('/requests?last=1')->[0];
}

# Returns the requests for completions only.
sub completions
{
	return grep { $_->{path} =~ m{/chat/completions} } $_[0]->requests;
}

sub forget
{
	my ($self) = @_;
	$self->delete('/requests');
	return;
}

sub stats
{
	return $_[0]->get_json('/stats');
}

# Waits until a counter of /stats satisfies a condition; returns the counters.
sub wait_for_stats
{
	my ($self, $condition) = @_;
	my $tries = 50 * $PostgreSQL::Test::Utils::timeout_default;

	while ($tries-- > 0)
	{
		local $_ = $self->stats;
		return $_ if $condition->($_);
		select undef, undef, undef, 0.02;
	}
	die "timed out waiting for the fake endpoint's counters\n";
}

sub open_gate
{
	my ($self, $name, $passes) = @_;
	$passes //= 1;
	my ($status, $body) = $self->post("/gate/$name?n=$passes");
	die "gate $name: $status $body\n" if $status != 200;
	return;
}

sub wait_at_gate
{
	my ($self, $name) = @_;
	return $self->get_json("/gate/$name?wait=1");
}

# Kills the endpoint.
sub stop
{
	my ($self) = @_;
	return unless delete $running{ $self->{pid} };
	kill 'KILL', $self->{pid};
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
