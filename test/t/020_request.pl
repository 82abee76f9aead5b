# Does a request hold exactly what somebody has set, by the session's settings
# before the server's options, and nothing else?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use IO::Handle;
use IO::Select;
use IO::Socket::INET;
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;

my ($true, $false) = (JSON::PP::true, JSON::PP::false);
my $fake = start_fake();
# no proxy counts but the one that a server names
my $node = do
{
	local @ENV{qw(http_proxy HTTPS_PROXY all_proxy)} = ('http://127.0.0.1:1') x 3;
	chat_cluster('main');
};

# Creates the server anew with these options.
sub set_server
{
	my (%opt) = @_;

	$node->safe_psql('postgres', 'DROP SERVER IF EXISTS fake CASCADE');
	create_server($node, $fake, %opt);
	return;
}

# Runs a turn in a new session with these arguments of create_chat_session;
# returns request, session and task.
sub request_of
{
	my (%args) = @_;
	my $call = delete $args{call} // {};
	my $session = create_session($node, %args);

	$fake->forget;
	my $task = ask($node, $session->{id}, 'hi [[tokens=1]]', %$call);
	my $row = wait_for_task($node, $task);
	is($row->{status}, 'completed', 'the turn is completed')
	  or diag(encode($row->{error}));
	my @all = $fake->completions;
	is(@all, 1, 'by one request');
	return ($all[0], $session->{id}, $task);
}

# The body that a request has at least, with these members beside it.
sub body
{
	my (%more) = @_;

	return {
		model => 'fake-1',
		messages => [ { role => 'user', content => 'hi [[tokens=1]]' } ],
		stream => $true,
		stream_options => { include_usage => $true },
		%more
	};
}

# nothing that nobody set
set_server();
my ($request, $session, $task) = request_of(user_id => 'ada', title => 't');
is_deeply($request->{body}, body(),
	'model, messages, stream, stream_options and nothing else');
is($request->{method}, 'POST', 'it is a POST');
is($request->{path}, '/v1/chat/completions', 'to the path of completions');
is_deeply(
	[ grep { !/^(host|accept|content-length|user-agent)$/ }
		  sort keys %{ $request->{headers} } ],
	[qw(accept-encoding authorization content-type)],
	'with key and type in the headers, and no wish for compression');
ok( !exists $request->{headers}{expect},
	'and without a question before the body');

# a server without a key
$node->safe_psql('postgres',
	server_sql($fake->port, name => 'keyless', key => undef));
($request) = request_of(server => 'keyless');
ok(!exists $request->{headers}{authorization},
	'no header where there is no key');

# the server's options
set_server(
	temperature => '0.25',
	top_p => '0.5',
	max_tokens => 77,
	stream_usage => 'off');
($request) = request_of();
my $expected = body(temperature => 0.25, top_p => 0.5, max_tokens => 77);
delete $expected->{stream_options};
is_deeply($request->{body}, $expected, 'options of the server are sent');

# the session's settings over the server's options, the call's over both
($request) = request_of(
	settings => encode(
		{ model => 'other', temperature => 1, max_tokens => 5 }),
	call => { options => encode({ max_tokens => 6, top_p => 1 }) });
$expected = body(
	model => 'other',
	temperature => 1,
	top_p => 1,
	max_tokens => 6);
delete $expected->{stream_options};
is_deeply($request->{body}, $expected,
	'settings go before options of the server, options of the call before both'
);

# the name of the limit
set_server(max_tokens => 77, max_tokens_field => 'max_completion_tokens');
($request) = request_of();
is_deeply(
	$request->{body},
	body(max_completion_tokens => 77),
	'max_tokens_field renames the limit');
($request) = request_of(settings => encode({ max_tokens => 3 }));
is_deeply(
	$request->{body},
	body(max_completion_tokens => 3),
	'also that of the settings');

# tracing: 128 characters at most, which are not bytes
set_server(tracing => 'on');
my $user = "\xc3\xa9" x 200;
($request, $session) = request_of(user_id => $user);
is_deeply(
	$request->{body},
	body(user => "\x{e9}" x 128, session_id => $session),
	'tracing sends user and session, cut on a character');
($request, $session) = request_of();
is_deeply(
	$request->{body},
	body(session_id => $session),
	'an anonymous session sends no user');

# thinking
set_server(thinking => 'on');
($request) = request_of();
is_deeply($request->{body}, body(), 'thinking needs a model that knows it');
($request) =
  request_of(settings => encode({ model => 'anthropic/claude' }));
is_deeply(
	$request->{body},
	body(model => 'anthropic/claude', reasoning => { enabled => $true }),
	'thinking is sent for anthropic');
($request) = request_of(
	settings => encode({ model => 'anthropic/claude', thinking => $false }));
is_deeply(
	$request->{body},
	body(model => 'anthropic/claude'),
	'a session may switch it off');

# extra_body
set_server(
	environment => 'test "1"',
	extra_body => encode(
		{
			who => '{{user_id}}',
			trace => { s => '{{session_id}}', t => 'task {{task_id}}.' },
			where => '{{environment}}',
			top_k => 4,
			list => [ '{{user_id}}', 1.5, undef ],
			'{{user_id}}' => 'a name',
		}));
($request, $session, $task) = request_of(user_id => 'a"\\b{{task_id}}');
is_deeply(
	$request->{body},
	body(
		who => 'a"\\b{{task_id}}',
		trace => { s => $session, t => "task $task." },
		where => 'test "1"',
		top_k => 4,
		list => [ 'a"\\b{{task_id}}', 1.5, undef ],
		'{{user_id}}' => 'a name'),
	'placeholders of extra_body are replaced once');
($request, $session, $task) = request_of();
is_deeply(
	$request->{body},
	body(
		trace => { s => $session, t => "task $task." },
		where => 'test "1"',
		top_k => 4,
		list => [ 1.5, undef ],
		'{{user_id}}' => 'a name'),
	'a member whose variable is NULL is left out');

# extra_body replaces what we set, and the session's goes over the server's
set_server(
	temperature => '1',
	extra_body => encode({ temperature => 0, a => 1, b => { c => 1 } }));
($request) = request_of(settings => encode({ extra_body => { a => 2 } }));
is_deeply(
	$request->{body},
	body(temperature => 0, a => 2, b => { c => 1 }),
	'extra_body is merged into the request, no member comes twice');

# headers
set_server(
	base_url => 'http://127.0.0.1:' . $fake->port . '/v1/?api-version=1',
	auth_header => 'api-key',
	extra_headers => encode({ 'X-Title' => 'a b', 'X-None' => '' }));
($request) = request_of();
is($request->{headers}{'x-title'}, 'a b', 'an extra header is sent');
is($request->{headers}{'x-none'}, '', 'an empty one, too');
is($request->{headers}{'api-key'}, 'sk-test', 'auth_header carries the key');
ok(!exists $request->{headers}{authorization}, 'and no other header');
is($request->{path}, '/v1/chat/completions?api-version=1',
	'the query string stays behind the path');

# the server of the call
$node->safe_psql('postgres',
	server_sql($fake->port, name => 'second', model => 'second-1'));
($request) = request_of(call => { server => 'second' });
is($request->{body}{model}, 'second-1', 'the call may name another server');
($request) = request_of(server => 'second');
is($request->{body}{model}, 'second-1', 'and so may the session');

# a proxy, which only superusers can name: it is asked for the whole address
my $proxy = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 1)
  or die "listen: $!";
$node->safe_psql('postgres',
	server_sql($fake->port, name => 'proxied', retries => 0,
		base_url => 'http://llm.example/v1', allow_http => 'on',
		proxy => 'http://127.0.0.1:' . $proxy->sockport));
my $behind = ask($node, create_session($node, server => 'proxied')->{id}, 'hi');
IO::Select->new($proxy)->can_read($PostgreSQL::Test::Utils::timeout_default)
  or die "nobody asks the proxy\n";
my $client = $proxy->accept;
my $head = <$client>;
my $answer = '{"choices":[{"message":{"content":"by proxy"}}]}';
print $client "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
  . 'Content-Length: ' . length($answer) . "\r\n\r\n$answer";
$client->flush;
is(turn_of($node, $behind)->{answer}{content}, 'by proxy', 'proxy: it answers')
  or diag($head);
like($head, qr{^POST http://llm\.example/v1/chat/completions HTTP},
	'proxy: it is told where to go');
close $client;

# whose key: that of the session's owner, else PUBLIC's, when the job is claimed
$node->safe_psql('postgres', <<'EOS');
CREATE ROLE app;
CREATE ROLE other;
GRANT USAGE ON FOREIGN SERVER fake TO app, other;
CREATE USER MAPPING FOR app SERVER fake OPTIONS (api_key 'sk-of-app');
CREATE USER MAPPING FOR CURRENT_USER SERVER fake OPTIONS (api_key 'sk-of-caller');
ALTER SERVER fake OPTIONS (DROP auth_header);
EOS
($request) = request_of(owner => 'app');
is($request->{headers}{authorization}, 'Bearer sk-of-app',
	"the key of the owner's mapping, whoever calls");
($request) = request_of(owner => 'other');
is($request->{headers}{authorization}, 'Bearer sk-test',
	"PUBLIC's, where the owner has none");
($request) = request_of();
is($request->{headers}{authorization}, 'Bearer sk-of-caller',
	"and the caller's, where it is the owner");
$node->safe_psql('postgres', 'SELECT chat.pause()');
$fake->forget;
$task = ask($node, create_session($node, owner => 'app')->{id}, '[[tokens=1]]');
$node->safe_psql('postgres', <<'EOS');
ALTER USER MAPPING FOR app SERVER fake OPTIONS (SET api_key 'sk-renewed');
SELECT chat.resume();
EOS
wait_for_task($node, $task);
is($fake->last_request->{headers}{authorization}, 'Bearer sk-renewed',
	'a key counts as it is when the job is claimed, not when it was queued');

done_testing();
