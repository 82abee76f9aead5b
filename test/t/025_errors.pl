# Does each error of an endpoint come back under its code, with its status and
# its own words, without the key, and with what was received until then?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;

my $key = 'sk-secret-0123456789abcdefghij';
my $fake = start_fake();
my $node = chat_cluster('main', conf => 'chat.max_body_size = 64kB');
create_server($node, $fake, retries => 0, key => $key);

# directive, code, status, retryable, what the text says; hugebody and hugeline
# are answers without a bound (T62)
my @cases = (
	[ 'status=401', 'authentication_failed', 401, 0, qr/Incorrect API key/ ],
	[ 'status=403 errmsg=no%20access', 'authentication_failed', 403, 0,
		qr/no access/ ],
	[ 'status=400 errcode=invalid_api_key errmsg=bad', 'authentication_failed',
		400, 0, qr/bad/ ],
	[ 'status=429', 'rate_limited', 429, 1, qr/Rate limit reached/ ],
	[ 'status=429 errcode=insufficient_quota errmsg=pay', 'rate_limited', 429,
		0, qr/pay/ ],
	[ 'status=400 errcode=context_length_exceeded errmsg=long',
		'context_length_exceeded', 400, 0, qr/long/ ],
	[ 'status=400 errmsg=the%20maximum%20context%20length%20is%208192',
		'context_length_exceeded', 400, 0, qr/8192/ ],
	[ 'status=413 errmsg=prompt%20is%20too%20long', 'context_length_exceeded',
		413, 0, qr/too long/ ],
	[ 'status=400 errcode=content_filter errmsg=filtered', 'content_filter',
		400, 0, qr/filtered/ ],
	[ 'tokens=0 finish=content_filter', 'content_filter', 200, 0,
		qr/content filter/ ],
	[ 'status=403 errcode=unsupported_country_region_territory errmsg=nope',
		'model_not_available_region', 403, 0, qr/nope/ ],
	[ 'status=403 errmsg=not%20available%20in%20your%20region',
		'model_not_available_region', 403, 0, qr/region/ ],
	[ 'status=404 errmsg=no%20such%20model', 'endpoint_error', 404, 0,
		qr/no such model/ ],
	[ 'status=422 errmsg=unprocessable', 'endpoint_error', 422, 0,
		qr/unprocessable/ ],
	[ 'status=408', 'endpoint_error', 408, 1, qr/./ ],
	[ 'status=409', 'endpoint_error', 409, 1, qr/./ ],
	[ 'status=500 errmsg=oops', 'endpoint_error', 500, 1, qr/oops/ ],
	[ 'html=1', 'endpoint_error', 502, 1, qr/HTTP status 502/ ],
	[ 'status=503 errbody=overloaded%20now', 'endpoint_error', 503, 1,
		qr/overloaded now/ ],
	[ 'status=400 errbody={"detail":[{"msg":"field%20required"}]}',
		'endpoint_error', 400, 0, qr/field required/ ],
	[ 'status=302 location=http://127.0.0.1:1/', 'endpoint_error', 302, 0,
		qr/./ ],
	[ 'status=200 html=1', 'invalid_response', 200, 0,
		qr/not a chat completion/ ],
	[ 'status=200 errbody={}', 'invalid_response', 200, 0,
		qr/not a chat completion/ ],
	[ 'status=200 errbody={"error":"told%20plainly"}', 'endpoint_error', undef,
		0, qr/told plainly/ ],
	[ 'garbage=0', 'invalid_response', 200, 0, qr/not a chat completion/ ],
	[ 'error_at=0 errmsg=inside errtype=x', 'endpoint_error', undef, 0,
		qr/inside/ ],
	[ 'error_at=0 errmsg=slow errcode=429', 'rate_limited', 429, 1, qr/slow/ ],
	[ 'error_at=0', 'endpoint_error', undef, 1, qr/had an error/ ],
	[ 'tokens=0', 'empty_response', 200, 0, qr/no text, refusal or tool/ ],
	[ 'tokens=0 plain=1', 'empty_response', 200, 0, qr/no text/ ],
	[ 'tokens=0 reasoning=3', 'empty_response', 200, 0, qr/no text/ ],
	[ 'tokens=0 nodone=1 nofinish=1 closed=1', 'empty_response', 200, 0,
		qr/no text/ ],
	[ 'hugebody=100000', 'invalid_response', 200, 0, qr/max_body_size/ ],
	[ 'hugebody=100000 plain=1', 'invalid_response', 200, 0,
		qr/max_body_size/ ],
	[ 'hugeline=100000', 'invalid_response', 200, 0,
		qr/max_body_size|too long/ ],
	[ 'status=500 hugebody=1000000', 'endpoint_error', 500, 1, qr/./ ],
	[ 'reset=1', 'endpoint_error', undef, 1, qr/request to the endpoint failed/ ],
	[ 'reset=2', 'endpoint_error', undef, 1, qr/request to the endpoint failed/ ],
	[ 'tokens=3 cut=0', 'endpoint_error', 200, 1, qr/failed/ ],
	[ 'tokens=3 plain=1 cut=40', 'endpoint_error', 200, 1, qr/failed/ ],
	[ 'cutafter=0 tokens=3', 'endpoint_error', 200, 1, qr/failed/ ],);

my @turns = run_turns($node, map { "[[$_->[0]]]" } @cases);
foreach my $i (0 .. $#cases)
{
	my ($name, $code, $status, $retryable, $text) = @{ $cases[$i] };
	my $turn = $turns[$i];
	my $error = $turn->{error};

	is($turn->{status}, 'failed', "$name: failed");
	is($error->{code}, $code, "  code");
	is($error->{status}, $status, '  status');
	is(!!$error->{retryable}, !!$retryable, '  retryable');
	like($error->{message}, $text, '  its own words');
	my @errors = grep { $_->{type} eq 'error' } @{ $turn->{events} };
	is_deeply(
		[ map { [ @$_{qw(errorText code)} ] } @errors ],
		[ [ @$error{qw(message code)} ] ],
		'  one error event says the same');
	my @types = grep { $_ ne 'message-metadata' } types_of(@{ $turn->{events} });
	is_deeply([ @types[ -2, -1 ] ],
		[qw(error finish)], '  the terminal event follows');
	is((grep { $_ eq 'finish' } @types), 1, '  once');
	is($turn->{events}[-1]{finishReason}, 'error', '  and tells an error');
	is($turn->{answer}, undef, '  there is no message')
	  unless $name =~ /huge/;
	is( rows($node, "SELECT FROM chat.chat_job WHERE task_id = '$turn->{task}'"),
		0, '  and no job');
}

# the endpoint's words are cut, the key in them is not told (P8)
my ($wordy, $quoting, $starred) = run_turns(
	$node,
	'[[status=400 errmsg=' . ('w' x 5000) . ']]',
	"[[status=400 errmsg=key%20$key%20is%20bad]]",
	'[[error_at=0 errmsg=key%20sk-proj-*******************wxyz]]');
cmp_ok(length $wordy->{error}{message}, '<=', 2000, 'long words are cut');
is( $quoting->{error}{message},
	'key [redacted] is bad',
	'P8: the key is not told');
is( $starred->{error}{message},
	'key [redacted]',
	'P8: nor is what an endpoint left of one');

# what was received before an error is kept
my @partial = (
	[ 'tokens=9 error_at=3 errmsg=gone', 'endpoint_error' ],
	[ 'tokens=9 cutafter=3', 'endpoint_error' ],
	[ 'tokens=9 cutafter=3 rst=1', 'endpoint_error' ],
	[ 'tokens=9 garbage=3', 'invalid_response' ],);
@turns = run_turns($node, map { "[[$_->[0]]]" } @partial);
foreach my $i (0 .. $#partial)
{
	my ($name, $code) = @{ $partial[$i] };
	my $turn = $turns[$i];

	is($turn->{error}{code}, $code, "$name: code");
	like($turn->{answer}{content}, qr/^t0 (t1 (t2 )?)?$/,
		'  what was received is kept');
	is($turn->{answer}{content}, 't0 t1 t2 ', '  all of it')
	  unless $name =~ /rst/;
	is( text_of(@{ $turn->{events} }),
		$turn->{answer}{content},
		'  and is what listeners saw');
	is($turn->{answer}{metadata}{interrupted},
		JSON::PP::true, '  marked as interrupted');
	ok( (grep { $_->{type} eq 'text-end' } @{ $turn->{events} }),
		'  its block is closed');
	is($turn->{usage}{estimated}, JSON::PP::true, '  usage is estimated');
}

# T43: nothing listens on the port
$node->safe_psql('postgres',
	server_sql(1, name => 'nobody', retries => 0));
my $id = create_session($node, server => 'nobody')->{id};
my $turn = turn_of($node, ask($node, $id, 'hi'));
is($turn->{error}{code}, 'endpoint_error', 'nobody listens: endpoint_error');
is($turn->{error}{retryable}, JSON::PP::true, 'which may pass');

# T61: an address that the server may not use is final
$node->safe_psql('postgres',
	server_sql(1, name => 'private', retries => 3,
		base_url => 'http://10.255.255.1:9/v1', allow_http => 'on'));
$id = create_session($node, server => 'private')->{id};
$turn = turn_of($node, ask($node, $id, 'hi'));
like($turn->{error}{message}, qr/allow_private/,
	'T61: a private address is refused');
is($turn->{error}{retryable}, JSON::PP::false, 'T61: for good');

# the next turn of a session is not harmed by a failed one
$fake->forget;
my $failed = run_turns($node, '[[status=500]]');
my ($next) = turn_of($node, ask($node, $turn->{session}, 'on [[tokens=1]]',
	server => 'fake'));
is($next->{status}, 'completed', 'a session goes on after an error');

unlike(slurp_file($node->logfile), qr/\Q$key\E/, 'P8: no key in the log');

done_testing();
