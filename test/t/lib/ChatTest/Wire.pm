# ChatTest::Wire: an endpoint that says, byte for byte, what a test tells it
#
#	my $wire = ChatTest::Wire->new($dir);
#	$wire->port;
#	$wire->say(cut => "HTTP/1.1 200 OK\r\n...");	to a request that holds "[[cut]]"
#	$wire->say(odd => $bytes, keep => 1);		the connection stays open behind it
#	$wire->say(more => $head, again => $bytes);	$bytes again and again, while they
#												are taken; times => most often
#	$wire->requests('cut');		how many there were
#	$wire->connections;			how many were made
#
#	stream('{...}', '{...}')	an answer whose events these are, then [DONE]
#	body('{...}', 'Name: value')	an answer of this body, with more headers
#	chunk('"content":"a"')		a payload with a delta of these members
#
# A process for each connection; they end with the test.

package ChatTest::Wire;

use strict;
use warnings;

use Exporter 'import';
use Fcntl ':flock';
use IO::Socket::INET;
use Storable ();

our @EXPORT = qw(stream body chunk);

my %running;

# Returns an answer of this body.
sub body
{
	my ($body, @headers) = @_;

	return join("\r\n", 'HTTP/1.1 200 OK', 'Content-Length: ' . length $body,
		@headers, '', $body);
}

# Returns an answer that is a stream of these payloads.
sub stream
{
	return body(join('', map { "data: $_\n\n" } @_, '[DONE]'),
		'Content-Type: text/event-stream');
}

# Returns a payload whose delta has these members.
sub chunk
{
	my ($members, $more) = @_;

	return '{"choices":[{"index":0,"delta":{' . $members . '}' . ($more // '') . '}]}';
}

# Starts the endpoint.
sub new
{
	my ($class, $dir) = @_;
	my $socket = IO::Socket::INET->new(
		LocalHost => '127.0.0.1', LocalPort => 0, Listen => 64)
	  or die "the endpoint: $!\n";
	my $self = bless { dir => $dir, port => $socket->sockport }, $class;

	mkdir $dir or die "$dir: $!\n";
	$self->{pid} = fork() // die "fork: $!";
	if ($self->{pid} == 0)
	{
		my $parent = getppid();

		$SIG{CHLD} = 'IGNORE';
		# the other side may be tired of us
		$SIG{PIPE} = 'IGNORE';
		for (;;)
		{
			my $client = $socket->accept or next;
			kill 0, $parent or exit 0;
			next if fork();
			$socket->close;
			note($dir, 'connections');
			1 while serve($client, $dir);
			# no END block of the test runs here
			require POSIX;
			POSIX::_exit(0);
		}
	}
	$socket->close;
	$running{ $self->{pid} } = 1;
	return $self;
}

# Adds to a count.
sub note
{
	my ($dir, $name) = @_;

	open my $out, '>>', "$dir/$name.count" or return;
	flock $out, LOCK_EX;
	syswrite $out, '.';
	close $out;
	return;
}

# Answers one request; true if another may follow on the connection.
sub serve
{
	my ($client, $dir) = @_;
	my ($request, $length) = ('');

	while (!defined $length || length $request < $length)
	{
		sysread($client, $request, 65536, length $request) or return 0;
		next if defined $length;
		my $head = index $request, "\r\n\r\n";
		next if $head < 0;
		$length = $head + 4
		  + (substr($request, 0, $head) =~ /^Content-Length: *(\d+)/mi ? $1 : 0);
	}
	# the last message counts
	my ($name) = $request =~ /.*\[\[(\w+)\]\]/s or return 0;
	my $answer = Storable::retrieve("$dir/$name");
	note($dir, $name);
	send_all($client, $answer->{bytes}) or return 0;
	for (my $n = $answer->{times} // 1e9; defined $answer->{again} && $n > 0; $n--)
	{
		send_all($client, $answer->{again}) or return 0;
	}
	return $answer->{keep};
}

# Sends bytes; false when nobody takes them.
sub send_all
{
	my ($client, $bytes) = @_;
	my $at = 0;

	while ($at < length $bytes)
	{
		my $n = syswrite $client, $bytes, length($bytes) - $at, $at;
		return 0 unless $n;
		$at += $n;
	}
	return 1;
}

sub port
{
	return $_[0]{port};
}

# Sets what is answered to requests of a name.
sub say
{
	my ($self, $name, $bytes, %more) = @_;
	my $file = "$self->{dir}/$name";

	Storable::nstore({ bytes => $bytes, %more }, "$file.new");
	rename "$file.new", $file or die "$file: $!\n";
	return $self;
}

# Returns how many requests of a name there were.
sub requests
{
	my ($self, $name) = @_;
	return -s "$self->{dir}/$name.count" // 0;
}

sub connections
{
	return $_[0]->requests('connections');
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
