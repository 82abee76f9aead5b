# Does an HTTP tool get the arguments with all its ids, once unless it is
# idempotent; and is every answer, or its lack, a result?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use ChatTest::Tools;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $node = tool_cluster($fake, 'restart_after_crash = on');
my $port = $fake->port;

# Creates a service; options are the server's.
sub service
{
	my ($name, %opt) = @_;
	my $key = delete $opt{key};
	my $path = delete $opt{path} // '/tools';
	$opt{url} //= "http://127.0.0.1:$port$path";
	my $list = join ', ', map { "$_ " . literal($opt{$_}) } sort keys %opt;
	$node->safe_psql('postgres', "CREATE SERVER $name FOREIGN DATA WRAPPER chat_tool OPTIONS ($list);"
		  . "GRANT USAGE ON FOREIGN SERVER $name TO ann;"
		  . ($key ? "CREATE USER MAPPING FOR PUBLIC SERVER $name OPTIONS (api_key '$key')" : ''));
	return;
}

# Registers an HTTP tool of a service.
sub http_tool
{
	my ($name, $server, %args) = @_;
	register($node, 'ann', kind => 'http', name => $name, server => $server, path => "/$name", %args);
	return;
}

service('keyed', key => 'tool-secret-1', headers => '{"X-Team": "blue"}', ids_in_body => 'on');
service('twice', retries => 2, timeout => '500ms');
service('slow', timeout => '300ms', retries => 0);
http_tool('plain', 'services');
http_tool('quick', 'services', timeout => '300 ms');
http_tool('keyed', 'keyed');
http_tool('again', 'twice', idempotent => 'on');
http_tool('once', 'twice');
http_tool('slow', 'slow');
register($node, 'ann', kind => 'http', name => 'bare', server => 'keyed');

# Calls a tool in a session of its own; returns the turn.
sub call
{
	my ($tool, $args, $id) = @_;
	my (undef, $task) = start($node, "[[tool=$tool id=" . ($id // 'c1') . ' args=' . value(encode($args)) . ']]');
	my $turn = turn_of($node, $task);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	sound($turn, $node, $tool);
	return $turn;
}

# Returns what the model was told: the text, or the error as [code, message].
sub told
{
	my ($turn) = @_;
	my ($content) = map { $_->{content} } grep { $_->{role} eq 'tool' } @{ $turn->{messages} };
	my $error = $content =~ /^\{"type" ?: ?"error"/ ? decode($content) : return $content;

	return [ @$error{qw(code message)} ];
}

# Returns the requests that reached the services.
sub requests
{
	return grep { $_->{path} =~ m{^/tools} } $fake->requests;
}

# the request
my $turn = call('plain', { n => 1, text => "\x{e9}" }, "id%C3%A9%0D%0AX-Evil:%201");
my ($request) = requests();
my ($call) = calls($node, $turn->{task});
is_deeply(decode(told($turn)), { tool => 'plain', args => { n => 1, text => "\x{e9}" } }, 'the body is the result');
is($request->{method}, 'POST', 'arguments are posted');
is($request->{path}, '/tools/plain', 'to the path below the url');
is_deeply($request->{body}, { n => 1, text => "\x{e9}" }, 'as they are');
is_deeply(
	[ @{ $request->{headers} }{qw(content-type x-chat-session-id x-chat-task-id x-chat-operation-id idempotency-key)} ],
	[ 'application/json', $turn->{session}, $turn->{task}, ($call->{operation_id}) x 2 ],
	'with the ids in the headers');
like($request->{headers}{'x-chat-tool-call-id'}, qr/^id\?+X-Evil:\?1$/, "what a model chose ends no header");
ok(!exists $request->{headers}{'x-evil'} && !exists $request->{headers}{authorization}, 'and there are no others');

$fake->forget;
call('keyed', { n => 1 });
($request) = requests();
($call) = rows($node, 'SELECT operation_id, task_id FROM chat.chat_tool_call ORDER BY created_at DESC LIMIT 1');
is_deeply(
	$request->{body},
	{ n => 1, _operation_id => $call->{operation_id}, _task_id => $call->{task_id} },
	'ids_in_body');
is($request->{headers}{authorization}, 'Bearer tool-secret-1', 'the key of the mapping');
is($request->{headers}{'x-team'}, 'blue', 'headers of the server');
$fake->forget;
call('bare', { n => 1 });
is((requests())[0]{path}, '/tools', 'without a path it is the url');

# answers
my %text = (
	'{"a": 1}' => 'JSON', 'just text' => 'text', '' => 'nothing', '{"status":"done"}' => 'a status of another kind');
foreach my $text (sort keys %text)
{
	is(told(call('plain', { command => '[[status=200 text=' . value($text) . ']]' })), $text, "status 200: $text{$text}")
	  if $text ne '';
}
is(told(call('plain', { command => 'status=201 text=made' })), 'made', 'status 201');
my $huge = told(call('plain', { command => 'huge=200000' }));
like($huge, qr/\[cut: 100000 of 200002 characters are shown\]$/, 'a huge body is cut for the model');
is_deeply(told(call('plain', { command => 'huge=20000000' })), [ 'result_too_large', 'Tool plain failed: the result is too large' ],
	'one that is larger than that is an error');
foreach my $status (400, 404, 500, 503)
{
	my $error = told(call('once', { command => "status=$status errmsg=broken" }));
	is($error->[0], "http_$status", "status $status is an error");
	like($error->[1], qr/HTTP status $status: .*broken/, '  with what the service said');
}
is(told(call('plain', { command => 'status=302 location=http://127.0.0.1:1/' }))->[0], 'http_302', 'redirects are not followed');

# no answer
is_deeply(told(call('quick', { command => 'hang=1' })), [ 'timeout', 'Tool quick failed: it gave no answer in time' ], "the tool's timeout");
is(told(call('slow', { command => 'hang=1' }))->[0], 'timeout', "the server's timeout");
is(told(call('once', { command => 'reset=1' }))->[0], 'no_answer', 'a connection that breaks');
is(told(call('once', { command => 'huge=100000 cut=5000' }))->[0], 'no_answer', 'half a body');
service('nobody', url => 'http://127.0.0.1:1/', retries => 0);
http_tool('nobody', 'nobody');
is(told(call('nobody', {}))->[0], 'no_answer', 'nobody there');
service('private', url => 'https://10.1.2.3/', key => 'none');
http_tool('private', 'private');
is(told(call('private', {}))->[0], 'forbidden_address', 'a private address');

# keys are in no result, no log and no row
my $error = told(call('keyed', { command => 'status=500 errmsg=key%20tool%2Dsecret%2D1%20is%20bad' }));
like($error->[1], qr/key .* is bad/, 'P8: an answer that holds the key is told');
unlike($error->[1], qr/secret/, '  without it');
is(told(call('keyed', { command => 'status=200 text=you%20sent%20tool%2Dsecret%2D1' })), 'you sent [redacted]',
	'P8: so is a result that holds it');
is(row($node, "SELECT count(*) AS n FROM chat.chat_tool_call AS c WHERE c::text LIKE '%tool-secret%'")->{n}
	  + row($node, "SELECT count(*) AS n FROM chat.chat_event AS e WHERE e::text LIKE '%tool-secret%'")->{n}
	  + row($node, "SELECT count(*) AS n FROM chat.chat_message AS m WHERE m::text LIKE '%tool-secret%'")->{n},
	0, 'P8: the key is in no row');
unlike(slurp_file($node->logfile), qr/tool-secret/, 'P8: nor in the log');

# retries: of idempotent tools only, with the same key
foreach my $tool ('again', 'once')
{
	foreach my $fault ('status=500', 'status=429', 'reset=1', 'hang=1')
	{
		$fake->forget;
		my $result = told(call($tool, { command => "$fault times=1 key=$tool-$fault" }));
		my @requests = requests();

		is(scalar @requests, $tool eq 'again' ? 2 : 1, "$tool, $fault: requests");
		is(ref $result ? 1 : 0, $tool eq 'again' ? 0 : 1, '  the result');
		is(scalar(keys %{ { map { $_->{headers}{'idempotency-key'} => 1 } @requests } }), 1, '  one Idempotency-Key');
	}
}
$fake->forget;
is(told(call('again', { command => 'status=503' }))->[0], 'http_503', "retries end");
is(scalar(requests()), 3, '  after as many as the server says');

# what changes between the step and the call
$node->safe_psql('postgres', 'REVOKE USAGE ON FOREIGN SERVER keyed FROM ann');
is(told(call('keyed', {}))->[0], 'tool_not_available', 'no USAGE any more');
$node->safe_psql('postgres', 'DROP SERVER slow');
is(told(call('slow', {}))->[0], 'tool_not_available', 'the server is gone');

# many at once, in one worker, while none of them answers
$fake->forget;
my $calls = join ' ', map { "tool=plain id=c$_ args=" . value(encode({ command => 'gate=many', n => $_ })) } 1 .. 30;
my (undef, $task) = start($node, "[[$calls]]");
$fake->get_json('/gate/many?wait=30');
pass('thirty services are asked at once');
is(row($node, "SELECT count(*) AS n FROM pg_stat_activity WHERE backend_type = 'chat worker' AND xact_start IS NOT NULL")->{n},
	0, 'P6: no transaction is open meanwhile');
$fake->open_gate('many', 30);
$turn = turn_of($node, $task);
is_deeply([ map { decode($_->{content})->{args}{n} } grep { $_->{role} eq 'tool' } @{ $turn->{messages} } ],
	[ 1 .. 30 ], '  every result is where it belongs');
sound($turn, $node, 'thirty services');

# crashes: what was sent is repeated only where it may be
http_tool('may_repeat', 'services', idempotent => 'on');
http_tool('must_not', 'services');
foreach my $tool ('may_repeat', 'must_not')
{
	$fake->forget;
	(undef, $task) = start($node, "[[tool=$tool id=c1 args=" . value("{\"command\":\"gate=$tool\"}") . ']]');
	$fake->wait_at_gate($tool);
	my $pid = wait_for_worker($node);
	kill 'KILL', $pid;
	wait_gone($pid);
	wait_for($node, 'SELECT true');
	if ($tool eq 'may_repeat')
	{
		$fake->wait_at_gate($tool);
		$fake->open_gate($tool);
	}
	$turn = turn_of($node, $task);
	is($turn->{status}, 'completed', "$tool: kill -9 of the worker");
	my $result = told($turn);
	if ($tool eq 'may_repeat')
	{
		ok(!ref $result, '  T25: an idempotent call runs again');
		is(scalar(requests()), 2, '  by one request more');
	}
	else
	{
		is_deeply($result, [ 'tool_unknown_outcome', 'Tool must_not failed: outcome unknown, it was interrupted' ],
			'  T25: the outcome of any other is unknown');
		is(scalar(requests()), 1, '  and it is not asked again');
	}
	sound($turn, $node, "$tool after a crash");
}

# a worker that is told to end does not lose them either
$fake->forget;
(undef, $task) = start($node, '[[tool=may_repeat id=c1 args=' . value('{"command":"gate=stop"}') . ']]');
$fake->wait_at_gate('stop');
$node->restart;
$fake->wait_at_gate('stop');
$fake->open_gate('stop');
$turn = turn_of($node, $task);
is($turn->{status}, 'completed', 'a restart of the server');
ok(!ref told($turn), '  an idempotent call runs again');
sound($turn, $node, 'a restart');

$node->stop;
done_testing();
