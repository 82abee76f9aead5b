# Does a request carry what the server's options and the user mapping say, and
# does an endpoint's error come back as it was, without the key?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;

my $key = 'sk-demo-0123456789abcdef';
my $fake = start_fake('--api-key', $key);
my $port = $fake->port;
my $node = chat_cluster('main');

# Creates the server anew with these options and a key in a file, tests it and
# returns the row.
my $key_file = $node->basedir . '/key';
append_to_file($key_file, "$key\n");

sub test_server
{
	my (%opt) = @_;

	$fake->forget;
	$node->safe_psql('postgres',
		'DROP SERVER IF EXISTS fake CASCADE;'
		  . server_sql($port, key => undef, %opt)
		  . 'CREATE USER MAPPING FOR PUBLIC SERVER fake OPTIONS (api_key_file '
		  . literal($key_file) . ')');
	return row($node, "SELECT * FROM chat.test_server('fake')");
}

# The same where the endpoint is told what to do.
sub test_command
{
	my ($command, %opt) = @_;

	return test_server(
		extra_body =>
		  encode({ messages => [ { role => 'user', content => $command } ] }),
		%opt);
}

# a good answer
my $row = test_server();
ok($row->{ok}, 'the endpoint answers');
is($row->{model}, 'fake-1', 'the model that answered is told');
ok($row->{streaming}, 'that it streams');
ok($row->{usage}, 'and that it counts tokens');
is($row->{error}, undef, 'there is no error');
ok($row->{first_token_ms} <= $row->{latency_ms},
	'the first token is not later than the end');
my $request = $fake->last_request;
is($request->{path}, '/v1/chat/completions', 'the path is appended');
is($request->{headers}{authorization}, "Bearer $key",
	'the key of the mapping is sent');
is($request->{headers}{'content-type'}, 'application/json',
	'as is the type of the body');
is_deeply(
	$request->{body},
	{
		model => 'fake-1',
		messages => [ { role => 'user', content => 'Hi' } ],
		max_tokens => 1,
		stream => JSON::PP::true,
		stream_options => { include_usage => JSON::PP::true },
	},
	'nothing that nobody set is in the body');

# what options change
$row = test_server(
	base_url => "http://127.0.0.1:$port/v1/?api-version=2024-10-21",
	auth_header => 'api-key',
	max_tokens_field => 'max_completion_tokens',
	stream_usage => 'off',
	temperature => '0.5',
	top_p => '0.25',
	extra_headers => encode(
		{ 'X-Title' => 'a: b', 'X-Empty' => '', 'User-Agent' => 'mine' }));
$request = $fake->last_request;
is( $request->{path},
	'/v1/chat/completions?api-version=2024-10-21',
	'the query string of base_url stays behind the path');
is($request->{headers}{'api-key'}, $key, 'auth_header carries the bare key');
ok(!exists $request->{headers}{authorization}, 'and no other header does');
is($request->{headers}{'x-title'}, 'a: b', 'an extra header is sent');
is($request->{headers}{'x-empty'}, '', 'also one without a value');
is($request->{headers}{'user-agent'}, 'mine', 'it may replace ours');
is($request->{body}{max_completion_tokens}, 1, 'max_tokens_field is heeded');
ok(!exists $request->{body}{max_tokens}, 'in the place of max_tokens');
ok(!exists $request->{body}{stream_options}, 'stream_usage off asks nothing');
is($request->{body}{temperature}, 0.5, 'temperature is sent');
is($request->{body}{top_p}, 0.25, 'top_p is sent');

# placeholders of extra_body: a test has neither user nor session nor task
test_server(
	environment => 'a "b" {{user_id}} {{environment}}',
	extra_body => encode(
		{
			user => '{{user_id}}',
			tag => 'in {{environment}}!',
			both => '{{environment}}{{session_id}}',
			other => '{{x}} {{ environment }} {{environment',
			list => [ 1, '{{task_id}}', '{{environment}}', ['{{user_id}}'] ],
			nested => { user => '{{user_id}}', n => 1.5, t => \1, z => undef },
			'{{user_id}}' => 'a name is no value',
		}));
my $body = $fake->last_request->{body};
delete @$body{qw(model messages max_tokens stream stream_options)};
my $environment = 'a "b" {{user_id}} {{environment}}';
is_deeply(
	$body,
	{
		tag => "in $environment!",
		other => '{{x}} {{ environment }} {{environment',
		list => [ 1, $environment, [] ],
		nested => { n => 1.5, t => JSON::PP::true, z => undef },
		'{{user_id}}' => 'a name is no value',
	},
	'placeholders are replaced once; what has no value is left out');

# errors come back as rows, with the endpoint's own words
foreach my $case (
	[
		'status=429 errmsg=slow%20down', 'rate_limited',
		qr/^HTTP status 429: slow down$/
	],
	[ 'status=500 errmsg=oops', 'endpoint_error', qr/oops/ ],
	[ "status=400 errmsg=key%20$key!", 'endpoint_error', qr/key \[redacted\]!/ ],
	[
		'status=400 errmsg=key%20sk-proj-***************wxyz', 'endpoint_error',
		qr/key \[redacted\]$/
	],
	[
		'status=400 errmsg=task-0123456789abcdef%20sk-short', 'endpoint_error',
		qr/task-0123456789abcdef sk-short$/
	],
	[ 'error_at=0', 'endpoint_error', qr/./ ],
	[ 'garbage=0', 'invalid_response', qr/event stream/ ],
	[ 'reset=1', 'endpoint_error', qr/./ ],
	[ 'cut=40', 'endpoint_error', qr/./ ],
	[
		"status=302 location=http://127.0.0.1:$port/v1/moved", 'endpoint_error',
		qr/302/
	])
{
	my ($command, $code, $error) = @$case;
	$row = test_command("[[$command]]");
	ok(!$row->{ok}, "$command: not ok");
	is($row->{error_code}, $code, "$command: code");
	like($row->{error}, $error, "$command: text");
	unlike($row->{error}, qr/\Q$key\E/, "$command: no key");
	is(scalar $fake->requests, 1, "$command: one request");
}

$row = test_command('[[plain=1]]');
ok($row->{ok} && !$row->{streaming}, 'an endpoint that ignores "stream"');
$row = test_command('[[hang=1]]', stream_timeout => '100ms');
is($row->{error_code}, 'first_token_timeout', 'an endpoint that hangs');
$row = test_command('[[tokens=5 stall=1]]', stream_timeout => '2');
is($row->{error_code}, 'stream_timeout', 'an endpoint that stalls');

my ($rc, $out, $err) = $node->psql('postgres', <<'EOS');
SET statement_timeout = '100ms';
SELECT chat.test_server('fake');
EOS
like($err, qr/canceling statement due to statement timeout/,
	'waiting can be interrupted');

# a wrong key
append_to_file("$key_file.wrong", "sk-wrong-0123456789abcdef");
$key_file .= '.wrong';
$row = test_server();
is($row->{error_code}, 'authentication_failed', 'a wrong key is told');
unlike($row->{error}, qr/sk-/, 'but not the key, though the endpoint quotes it');

# P8: keys stay put
my $log = slurp_file($node->logfile);
unlike($log, qr/\Q$key\E|sk-wrong/, 'no key is in the server log');

# a TLS endpoint that is none is a final error, not a crash
$row = test_server(base_url => "https://127.0.0.1:$port/v1");
ok(!$row->{ok}, 'TLS with a server that has none');

# what check_installation says where the library is not preloaded
my $bare = chat_cluster('bare', conf => "shared_preload_libraries = ''");
my %items = map { $_->{item} => $_ }
  rows($bare, 'SELECT * FROM chat.check_installation()');
ok(!$items{preload}{ok}, 'a missing preload is told');
like($items{preload}{cure}, qr/shared_preload_libraries/, 'with its cure');
ok(!$items{worker}{ok}, 'and that there is no worker');
%items = map { $_->{item} => $_ }
  rows($node, 'SELECT * FROM chat.check_installation()');
ok($items{preload}{ok}, 'a preloaded library is told');

done_testing();
