# ChatTest::Langfuse: a fake of Langfuse's API of prompts
#
#	my $store = ChatTest::Langfuse->new($dir, 'pk-1', 'sk-1');
#	$store->port;
#	$store->set(greeting => { production => [3, 'Hello'] });	name, label
#	$store->fail(500);			every answer from now on; 0: none
#	$store->hold('/name?'); $store->release;	answers wait
#	$store->requests;			lines "METHOD PATH" so far
#
# A process of its own, which ends with the test; what it answers stands in
# files of the directory.

package ChatTest::Langfuse;

use strict;
use warnings;

use IO::Socket::INET;
use JSON::PP ();
use MIME::Base64 ();
use PostgreSQL::Test::Utils ();

my %running;

# Writes a file in one piece.
sub put
{
	my ($file, $text) = @_;

	open my $out, '>', "$file.new" or die "$file: $!\n";
	print $out $text;
	close $out or die "$file: $!\n";
	rename "$file.new", $file or die "$file: $!\n";
	return;
}

# Reads a file, '' if there is none.
sub get
{
	my ($file) = @_;

	open my $in, '<', $file or return '';
	local $/;
	return <$in> // '';
}

# Starts the server.
sub new
{
	my ($class, $dir, $public, $secret) = @_;
	my $socket = IO::Socket::INET->new(
		LocalHost => '127.0.0.1', LocalPort => 0, Listen => 64)
	  or die "the fake prompt server: $!\n";
	my $self = bless { dir => $dir, port => $socket->sockport }, $class;

	mkdir $dir;
	put("$dir/prompts", '{}');
	$self->{pid} = fork() // die "fork: $!";
	if ($self->{pid} == 0)
	{
		my $parent = getppid();

		$SIG{CHLD} = 'IGNORE';
		for (;;)
		{
			my $client = $socket->accept or next;
			kill 0, $parent or exit 0;
			# one process for each request: some of them wait
			next if fork();
			$socket->close;
			serve($client, $dir, 'Basic ' . MIME::Base64::encode("$public:$secret", ''));
			# no END block of the test runs here
			require POSIX;
			POSIX::_exit(0);
		}
	}
	$socket->close;
	$running{ $self->{pid} } = 1;
	return $self;
}

# Answers one request.
sub serve
{
	my ($client, $dir, $authorization) = @_;
	my $line = <$client> // return;
	my ($method, $path) = split ' ', $line;
	my %header;

	while (my $h = <$client>)
	{
		$h =~ s/\r?\n$//;
		last if $h eq '';
		$header{ lc $1 } = $2 if $h =~ /^([^:]+): *(.*)$/;
	}
	open my $log, '>>', "$dir/requests" or return;
	syswrite $log, "$method $path\n";
	# what is held is a part of the path, '' all
	select undef, undef, undef, 0.01
	  while -e "$dir/hold" && index($path, get("$dir/hold")) >= 0;
	my ($status, $body) = answer($dir, $path, ($header{authorization} // '') eq $authorization);
	print $client "HTTP/1.1 $status X\r\nContent-Type: application/json\r\n"
	  . 'Content-Length: ' . length($body) . "\r\nConnection: close\r\n\r\n$body";
	close $client;
	return;
}

# Returns status and body of an answer.
sub answer
{
	my ($dir, $path, $allowed) = @_;
	my $fail = get("$dir/fail");
	my $prompts = JSON::PP->new->utf8->decode(get("$dir/prompts"));

	return ($fail, '{"message":"out of order"}') if $fail;
	return (401, '{"message":"invalid credentials"}') unless $allowed;
	my ($name, $label) = $path =~ m{^/api/public/v2/prompts/([^/?]+)\?label=([^&]+)$}
	  or return (404, '{"message":"no such path"}');
	$name =~ s/%([0-9A-F]{2})/chr hex $1/ge;
	my $found = $prompts->{$name}{$label}
	  or return (404, '{"message":"prompt not found"}');
	return (
		200,
		JSON::PP->new->utf8->encode(
			{
				name => $name, version => $found->[0], prompt => $found->[1],
				type => ref $found->[1] ? 'chat' : 'text',
				labels => [$label], tags => [], config => {}
			}));
}

sub port
{
	return $_[0]{port};
}

# Sets the prompt of a name: label => [version, text or messages].
sub set
{
	my ($self, %prompts) = @_;
	my $all = JSON::PP->new->utf8->decode(get("$self->{dir}/prompts"));

	$all->{$_} = $prompts{$_} for keys %prompts;
	put("$self->{dir}/prompts", JSON::PP->new->utf8->encode($all));
	return;
}

# Has every request fail with a status, none with 0.
sub fail
{
	my ($self, $status) = @_;
	put("$self->{dir}/fail", $status || '');
	return;
}

# Has all requests wait, or those whose path holds a text.
sub hold
{
	my ($self, $part) = @_;
	put("$self->{dir}/hold", $part // '');
	return;
}

# Lets them go on.
sub release
{
	my ($self) = @_;
	unlink "$self->{dir}/hold";
	return;
}

# Returns the requests so far.
sub requests
{
	my ($self) = @_;
	return split /\n/, get("$self->{dir}/requests");
}

END
{
	# the exit status is the test's
	local $?;
	kill 'KILL', keys %running;
	waitpid $_, 0 for keys %running;
}

1;
