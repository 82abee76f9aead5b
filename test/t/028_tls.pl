# Are errors of certificate, URL and protocol final, and does a certificate
# that the administrator trusts work?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use IO::Handle;
use IO::Socket::INET;
use JSON::PP ();
use POSIX ();
use PostgreSQL::Test::Utils;
use Test::More;

my $node = chat_cluster('main', conf => <<'EOF');
chat.retry_base_delay = 1ms
chat.retry_max_delay = 1ms
EOF
my @programs;

# Runs a turn at a base URL; returns it.
my $servers = 0;

sub turn_at
{
	my ($url, %opt) = @_;
	my $name = 's' . ++$servers;

	$node->safe_psql('postgres',
		server_sql(0, name => $name, base_url => $url, %opt));
	return turn_of($node,
		ask($node, create_session($node, server => $name)->{id}, 'hi'));
}

# Returns how many requests were tried again.
sub retried
{
	return row($node, 'SELECT sum(retried) AS n FROM chat.worker_status()')
	  ->{n};
}

# Checks that a turn has failed for good.
sub is_final
{
	my ($turn, $label) = @_;

	is($turn->{status}, 'failed', "$label: failed");
	is($turn->{error}{code}, 'endpoint_error', "$label: code");
	is($turn->{error}{retryable}, JSON::PP::false, "$label: for good");
	is(retried(), 0, "$label: it was not tried again");
	return;
}

# Starts a server that answers whatever comes with these bytes and closes.
sub start_server
{
	my ($answer) = @_;
	my $listener = IO::Socket::INET->new(
		LocalAddr => '127.0.0.1',
		Listen => 10) or die "listen: $!";
	my $pid = fork() // die "fork: $!";

	if ($pid == 0)
	{
		$SIG{PIPE} = 'IGNORE';
		while (my $client = $listener->accept)
		{
			sysread $client, my $data, 65536;
			syswrite $client, $answer;
			close $client;
		}
		POSIX::_exit(0);
	}
	push @programs, $pid;
	return $listener->sockport;
}

# peers that speak something else
my $turn = turn_at('https://127.0.0.1:'
	  . start_server("HTTP/1.1 400 Bad Request\r\n\r\n") . '/v1');
is_final($turn, 'no TLS');
is_final(turn_at('http://127.0.0.1:' . start_server("SSH-2.0-x\r\n") . '/v1'),
	'no HTTP');

SKIP:
{
	my $dir = $node->basedir;
	my $key = "$dir/key.pem";
	my $cert = "$dir/cert.pem";

	skip 'no openssl program', 1
	  if system("openssl req -x509 -newkey rsa:2048 -nodes -days 2"
		  . " -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
		  . " -keyout '$key' -out '$cert' >/dev/null 2>&1") != 0;

	# Starts a TLS server whose answer is written to it.
	my $start = sub {
		pipe(my $in, my $to) or die "pipe: $!";
		pipe(my $from, my $out) or die "pipe: $!";
		my $pid = fork() // die "fork: $!";
		if ($pid == 0)
		{
			open STDIN, '<&', $in or die;
			open STDOUT, '>&', $out or die;
			open STDERR, '>', '/dev/null' or die;
			close $to;
			exec 'openssl', 's_server', '-accept', '127.0.0.1:0',
			  '-cert', $cert, '-key', $key or die;
		}
		push @programs, $pid;
		close $out;
		my $port;
		while (my $line = <$from>)
		{
			($port) = $line =~ /^ACCEPT 127\.0\.0\.1:(\d+)/ and last;
		}
		$port or die "openssl s_server tells no port\n";
		return ($port, $to, $from);
	};

	my ($port, $to, $from) = $start->();
	$turn = turn_at("https://127.0.0.1:$port/v1");
	is_final($turn, 'a certificate that nobody knows');
	like($turn->{error}{message}, qr/certificate/,
		'a certificate that nobody knows: the text says so');

	# the same certificate, trusted: by address, and not by another name
	$turn = turn_at("https://localhost:$port/v1", ca_file => $cert);
	is_final($turn, 'a certificate of another host');

	my $body = '{"choices":[{"message":{"content":"by TLS"}}]}';
	my $name = 'trusted';
	$node->safe_psql('postgres',
		server_sql(0, name => $name, ca_file => $cert, retries => 0,
			base_url => "https://127.0.0.1:$port/v1"));
	my $task = ask($node, create_session($node, server => $name)->{id}, 'hi');
	my $request = '';
	while (my $line = <$from>)
	{
		$request .= $line;
		last if $line =~ /^content-length:/i;
	}
	print $to "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
	  . 'Content-Length: ' . length($body) . "\r\n\r\n$body\n";
	$to->flush;
	$turn = turn_of($node, $task);
	is($turn->{answer}{content}, 'by TLS', 'ca_file: a trusted one works')
	  or diag(encode($turn->{error}));
	is(retried(), 0, 'at the first try');
	like($request, qr{POST /v1/chat/completions}, 'the request came by TLS');
}

# a handshake that breaks off is a broken connection: worth another try
$turn = turn_at('https://127.0.0.1:' . start_server('') . '/v1',
	retries => 1);
is($turn->{error}{retryable}, JSON::PP::true, 'a broken handshake may pass');
is(retried(), 1, 'it was tried again');

done_testing();

END
{
	my $exit_code = $?;

	foreach my $pid (@programs)
	{
		kill 'KILL', $pid;
		waitpid $pid, 0;
	}
	$? = $exit_code;
}
