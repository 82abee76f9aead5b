# Does a gateway of forty lines suffice: post, stream, resume, stop?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Npm;
use File::Copy;
use IO::Socket::INET;
use IPC::Run ();
use PostgreSQL::Test::Utils;
use Test::More;

require_npm();

my $timeout = $PostgreSQL::Test::Utils::timeout_default;
my $fake = start_fake();
my $node = chat_cluster('main', conf => 'chat.retry_base_delay = 1ms');
create_server($node, $fake);
my $session = create_session($node);

# the gateway finds its package beside itself
my $dir = PostgreSQL::Test::Utils::tempdir();
copy("$FindBin::RealBin/../gateway.mjs", "$dir/gateway.mjs") or die $!;
symlink node_file('node_modules'), "$dir/node_modules" or die $!;
my $url = sprintf 'postgres://%s@/postgres?host=%s&port=%s',
  scalar getpwuid $>, $node->host, $node->port;
my ($out, $err) = ('', '');
my $gateway = IPC::Run::start([ 'node', "$dir/gateway.mjs", $url ],
	'<', \undef, '>', \$out, '2>', \$err, IPC::Run::timer($timeout));
$gateway->pump until $out =~ /^port=(\d+)$/m;
my ($port) = $out =~ /^port=(\d+)$/m;

# Sends a request; returns the connection.
sub request
{
	my ($method, $path, $body, %headers) = @_;
	my $socket = IO::Socket::INET->new(
		PeerHost => '127.0.0.1',
		PeerPort => $port,
		Timeout => $timeout) or die "gateway: $!";
	$body = encode($body // {});
	print $socket join "\r\n", "$method $path HTTP/1.0", 'Host: gateway',
	  'Content-Length: ' . length $body,
	  (map { "$_: $headers{$_}" } sort keys %headers), '', $body;
	return $socket;
}

# Reads until the pattern is met, or to the end of the answer.
sub receive
{
	my ($socket, $pattern) = @_;
	my $text = '';

	while (!defined $pattern || $text !~ $pattern)
	{
		IO::Select->new($socket)->can_read($timeout)
		  or die "no answer, but \"$text\"";
		sysread $socket, $text, 65536, length $text or last;
	}
	return $text;
}

# Makes a request whose answer is JSON.
sub call
{
	my ($head, $body) = split /\r\n\r\n/, receive(request(@_)), 2;
	return decode($body);
}

# Returns the events of a text/event-stream.
sub parse
{
	return map { decode($_) } $_[0] =~ /^data: (\{.*\})$/mg;
}

# post and stream
my $task = call('POST', '/chat',
	{ session => $session->{id}, message => 'go [[tokens=6 gateat=3:mid]]' })->{task};
like($task, qr/^[0-9a-f-]{36}$/, 'POST starts a turn');
$fake->wait_at_gate('mid');
my $first = request('GET', "/chat/$task/stream");
my $head = receive($first, qr/t2 /);
like($head, qr{^content-type: text/event-stream}mi, 'GET streams');
close $first;

# resume
my ($last) = $head =~ /.*^id: (\d+)$/ms;
my $second =
  request('GET', "/chat/$task/stream", undef, 'Last-Event-ID' => $last);
receive($second, qr/\r\n\r\n/);
$fake->open_gate('mid');
my $rest = receive($second);
is(text_of(parse($head), parse($rest)),
	't0 t1 t2 t3 t4 t5 ',
	'T41: a client that comes back has the whole, and nothing twice');
like($rest, qr/data: \[DONE\]\n\n$/, 'to its end');
is(wait_for_task($node, $task)->{status}, 'completed',
	'T40: who goes away cancels nothing');
my $late = receive(request('GET', "/chat/$task/stream"));
is(text_of(parse($late)), 't0 t1 t2 t3 t4 t5 ', 'a late one has it, too');

# stop
$task = call('POST', '/chat',
	{ session => $session->{id}, message => 'long [[tokens=9 gateat=2:stop]]' })->{task};
my $stream = request('GET', "/chat/$task/stream");
receive($stream, qr/t1 /);
is(call('POST', "/chat/$task/stop")->{stopped},
	JSON::PP::true, 'T40: POST stop ends a turn');
like(receive($stream), qr/"type":"abort".*\[DONE\]/s, 'its stream says so');
is(call('POST', "/chat/$task/stop")->{stopped},
	JSON::PP::false, 'stopping twice does nothing');

# a client of ai 6 whose text is taken back
$task = call('POST', '/chat',
	{
		session => $session->{id},
		message => 'again [[tokens=6 gateat=3:cut cutafter=5 times=1 rst=1]]'
	})->{task};
$stream = request('GET', "/chat/$task/stream?protocol=6");
my $void = receive($stream, qr/t2 /);
$fake->open_gate('cut', 2);
receive($stream);
my $whole = receive(request('GET', "/chat/$task/stream?protocol=6"));
is(text_of(parse($whole)), 't0 t1 t2 t3 t4 t5 ',
	'T48: protocol 6 never shows two attempts');
wait_for_task($node, $task);

# errors
like(receive(request('GET', '/chat/00000000-0000-4000-8000-000000000000/stream')),
	qr{^HTTP/1.1 404}, 'an unknown task');
like(call('POST', '/chat', { session => '00000000-0000-4000-8000-000000000000', message => 'x' })->{error},
	qr/session/, 'an unknown session');

$gateway->signal('TERM');
$gateway->finish;
done_testing();
