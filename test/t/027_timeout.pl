# Does each wait for an endpoint end, under its own code?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use IO::Handle;
use JSON::PP ();
use Socket;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake, retries => 0);

# Returns a port that takes no connection: its queue is full.
my @held;

sub deaf_port
{
	socket(my $listener, PF_INET, SOCK_STREAM, 0) or die "socket: $!";
	bind($listener, pack_sockaddr_in(0, INADDR_LOOPBACK)) or die "bind: $!";
	listen($listener, 0) or die "listen: $!";
	my $address = getsockname $listener;
	push @held, $listener;
	for (1 .. 50)
	{
		socket(my $client, PF_INET, SOCK_STREAM, 0) or die "socket: $!";
		$client->blocking(0);
		connect($client, $address);
		my $ready = '';
		vec($ready, fileno($client), 1) = 1;
		push @held, $client;
		# whoever does not get through at once waits in vain
		return (unpack_sockaddr_in($address))[0]
		  unless select undef, $ready, undef, 0.5;
	}
	die "the queue of a listening socket is never full\n";
}

# Runs a directive with server options; returns the turn.
my $servers = 0;

sub turn_with
{
	my ($message, %opt) = @_;
	my $port = delete $opt{port} // $fake->port;
	my $name = 's' . ++$servers;

	$node->safe_psql('postgres',
		server_sql($port, name => $name, retries => 0, %opt));
	return turn_of($node,
		ask($node, create_session($node, server => $name)->{id}, $message));
}

# Checks code and the rest of a turn that ran out of time.
sub timed_out
{
	my ($turn, $code, $text, $label) = @_;

	is($turn->{status}, 'failed', "$label: failed");
	is($turn->{error}{code}, $code, "$label: code")
	  or diag(encode($turn->{error}));
	is($turn->{answer}{content}, $text, "$label: what was received is kept");
	is((grep { $_->{type} eq 'error' && $_->{code} eq $code }
			  @{ $turn->{events} }),
		1, "$label: one event tells it");
	return;
}

my $deaf = deaf_port();
my $turn = turn_with('hi', port => $deaf, connect_timeout => '200ms');
timed_out($turn, 'connect_timeout', undef, 'nobody takes the connection');
is($turn->{error}{retryable}, JSON::PP::true, 'it may pass');

timed_out(turn_with('[[hang=1]]', first_token_timeout => '100ms'),
	'first_token_timeout', undef, 'no answer comes');
timed_out(
	turn_with('[[tokens=3 stall=0 comments=1]]',
		first_token_timeout => '200ms'),
	'first_token_timeout', undef, 'comments come, no content');
timed_out(
	turn_with('[[tokens=3 stall=2]]', idle_timeout => '100ms'),
	'idle_timeout', 't0 t1 ', 'the stream falls silent');
timed_out(
	turn_with('[[tokens=3 stall=2 comments=1]]', idle_timeout => '200ms'),
	'idle_timeout', 't0 t1 ', 'only comments come');
$turn = turn_with('[[tokens=100000 delay=10]]',
	stream_timeout => '300ms', idle_timeout => '10s');
like($turn->{answer}{content}, qr/^t0 t1 /, 'the answer has no end');
timed_out($turn, 'stream_timeout', $turn->{answer}{content}, 'the whole stream');
is($turn->{error}{retryable}, JSON::PP::false, 'that is not tried again');
is($turn->{answer}{metadata}{interrupted},
	JSON::PP::true, 'the answer is marked as interrupted');
timed_out(
	turn_with('[[status=500 stall=1 closed=1]]', first_token_timeout => '100ms'),
	'first_token_timeout', undef, 'an error whose body has no end');

# the connection is given up: the endpoint sees it go
$fake->wait_for_stats(sub { $_->{active} == 0 });
pass('no request is left open');

# a session's settings go before the server's options
$node->safe_psql('postgres',
	server_sql($fake->port, name => 'patient', retries => 0,
		first_token_timeout => '1h', idle_timeout => '1h'));
my $id = create_session($node, server => 'patient',
	settings => encode({ idle_timeout => 0.1 }))->{id};
timed_out(turn_of($node, ask($node, $id, '[[tokens=2 stall=1]]')),
	'idle_timeout', 't0 ', 'the session\'s own limit');
timed_out(
	turn_of($node, ask($node, $id, '[[hang=1]]',
			options => encode({ first_token_timeout => 0.1 }))),
	'first_token_timeout', undef, 'the call\'s own limit');

# waiting is not in vain where somebody waits longer
$turn = turn_with('[[tokens=3 delay=150]]', idle_timeout => '10s',
	first_token_timeout => '10s');
is($turn->{status}, 'completed', 'slow is not late');

# the settings hold where neither session nor server says anything
my $brief = chat_cluster('brief', conf => <<'EOF');
chat.connect_timeout = 50ms
chat.first_token_timeout = 300ms
chat.idle_timeout = 100ms
chat.stream_timeout = 800ms
chat.max_retries = 1
chat.retry_base_delay = 1ms
EOF
create_server($brief, $fake);
$fake->forget;
my @turns = run_turns($brief, '[[hang=1]]', '[[tokens=2 stall=1]]');
is($turns[0]{error}{code}, 'first_token_timeout', 'chat.first_token_timeout');
is($turns[1]{error}{code}, 'idle_timeout', 'chat.idle_timeout');
is(scalar $fake->completions, 4, 'each was tried again once');
$brief->safe_psql('postgres', server_sql($deaf, name => 'deaf'));
$turn = turn_of($brief,
	ask($brief, create_session($brief, server => 'deaf')->{id}, 'hi'));
is($turn->{error}{code}, 'connect_timeout', 'chat.connect_timeout');
($turn) = run_turns($brief, '[[tokens=100000 delay=10]]');
is($turn->{error}{code}, 'stream_timeout', 'chat.stream_timeout');

done_testing();
