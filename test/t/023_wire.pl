# Answers byte for byte: those that are odd, but what some endpoint sends, count;
# those that nobody should send harm nothing but their own turn.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Bystander;
use ChatTest::Wire;
use IO::Compress::Deflate ();
use IO::Compress::Gzip ();
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $wire = ChatTest::Wire->new(PostgreSQL::Test::Utils::tempdir() . '/wire');
my $node = chat_cluster('main', conf => 'chat.max_steps = 1');
my $key = 'my-key-0123456789-secret';
create_server($node, $wire, retries => 0, key => $key);
$node->safe_psql('postgres', server_sql($fake->port, name => 'good', retries => 0));

# Returns a value as JSON, in bytes.
sub json
{
	my $text = encode($_[0]);

	utf8::encode($text);
	return $text;
}

# Returns a piece of a tool call; undef leaves a member out.
sub piece
{
	my ($index, $id, $name, $arguments, $more) = @_;
	my %function = (
		defined $name ? (name => $name) : (),
		defined $arguments ? (arguments => $arguments) : ());

	return json({
		defined $index ? (index => $index) : (),
		defined $id ? (id => $id) : (),
		function => \%function, %{ $more // {} } });
}

# Returns a payload with pieces of tool calls.
sub calling
{
	return chunk('"tool_calls":[' . join(',', @_) . ']');
}

# Returns an answer with a status.
sub status
{
	my ($status, $body, @headers) = @_;

	return body($body, @headers) =~ s/200 OK/$status Status/r;
}

# Returns what an encoder makes of an answer's body.
sub encoded
{
	my ($encoder, $name, $text) = @_;
	my $out;

	$encoder->(\$text => \$out);
	return body($out, 'Content-Type: text/event-stream', "Content-Encoding: $name");
}

# Asks for each of these answers; returns the turns in their order.
sub turns_of
{
	my ($answers, @names) = @_;

	$wire->say($_ => $answers->{$_}) foreach @names;
	return run_turns($node, map { "[[$_]]" } @names);
}

# Returns the calls of a turn's answer, "id name arguments".
sub calls
{
	my ($turn) = @_;

	return [
		map { join ' ', $_->{id}, @{ $_->{function} }{qw(name arguments)} }
		  map { @{ $_->{tool_calls} // [] } } @{ $turn->{messages} }
	];
}

my $hello = "data: " . chunk('"content":"hello"') . "\n\n";
my $sse = 'Content-Type: text/event-stream';
my @names;

# what says hello
my %hello = (
	# Perplexity's chunks have all that was said beside what is new
	both => stream(
		'{"choices":[{"delta":{"content":"hel"},"message":{"content":"hel"}}]}',
		'{"choices":[{"message":{"content":"hello"},"finish_reason":"stop","delta":{"content":"lo"}}]}'),
	message => stream('{"choices":[{"message":{"role":"assistant","content":"hello"},"finish_reason":"stop"}]}'),
	whole_both => body('{"choices":[{"delta":{"content":"no"},"message":{"content":"hello"}}]}'),
	mark => body("\xEF\xBB\xBF" . '{"choices":[{"message":{"content":"hello"}}]}'),
	labelled => body('{"choices":[{"message":{"content":"hello"}}]}', $sse),
	unlabelled => body($hello),
	gzip => encoded(\&IO::Compress::Gzip::gzip, 'gzip', $hello),
	deflate => encoded(\&IO::Compress::Deflate::deflate, 'deflate', $hello),
	http10 => "HTTP/1.0 200 OK\r\n$sse\r\n\r\n$hello",
	interim => "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" . body($hello, $sse),
	trailers => sprintf("HTTP/1.1 200 OK\r\n$sse\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n"
		  . "%x;extension=\"1\"\r\n%s\r\n0\r\nX: y\r\nRetry-After: 5000\r\n\r\n", length $hello, $hello),
	behind_end => stream(chunk('"content":"hello"'), '[DONE]', chunk('"content":"late"')),
	pipelined => body($hello, $sse) . body("data: poison\n\n", $sse),
	roles => stream(chunk('"role":"assistant"'), chunk('"role":"assistant","content":""'),
		chunk('"content":"hel"'), chunk('"role":"assistant","content":"lo"'), chunk('"content":null'),
		chunk('', ',"finish_reason":"stop"'), '{"choices":[]}', '{"choices":null}', '{}'),
	choices => stream('{"choices":[{"index":1,"delta":{"content":"no"}},{"index":0,"delta":{"content":"hello"}}]}',
		'{"choices":[{"index":2,"delta":{"content":"no"},"finish_reason":"length"}]}'),
	negative => stream('{"choices":[{"index":-1,"delta":{"content":"hello"}}]}'),
	parts => stream(chunk('"content":[{"type":"text","text":"hel"},"lo"]')),
	log_probabilities => body('{"choices":[{"message":{"content":"hello"},"logprobs":{"content":['
		  . join(',', ('-1.25e-07') x 200000) . ']}}]}'));
@names = sort keys %hello;
my @turns = turns_of(\%hello, @names);
foreach my $i (0 .. $#names)
{
	is_deeply([ $turns[$i]{status}, $turns[$i]{answer}{content}, text_of(@{ $turns[$i]{events} }) ],
		[ 'completed', 'hello', 'hello' ], "$names[$i]: hello")
	  or diag(encode($turns[$i]{error}));
}

# a refusal beside content
my ($turn) = turns_of({ refusal => stream(chunk('"content":"so","refusal":"No"'), chunk('"refusal":"."')) }, 'refusal');
is_deeply([ @{ $turn->{answer} }{qw(content refusal)} ], [ 'so', 'No.' ], 'a refusal beside content');

# calls, however they are numbered
my @two = ('a f {"x":1}', 'b g {"x":2}');
my %calls = (
	# Ollama: all are number 0
	same_number => [ [ calling(piece(0, 'a', 'f', '{"x":1}')), calling(piece(0, 'b', 'g', '{"x":2}')) ], @two ],
	same_number_at_once => [ [ calling(piece(0, 'a', 'f', '{"x":1}'), piece(0, 'b', 'g', '{"x":2}')) ], @two ],
	same_number_in_pieces => [ [ calling(piece(0, 'a', 'f', '{"x"')), calling(piece(0, undef, undef, ':1}')),
		calling(piece(0, 'b', 'g', '')), calling(piece(0, undef, undef, '{"x":2}')) ], @two ],
	no_id => [ [ calling(piece(0, '', 'f', '{"x":1}'), piece(0, '', 'g', '{"x":2}')) ], 'call_* f {"x":1}', 'call_* g {"x":2}' ],
	no_number => [ [ calling(piece(undef, 'a', 'f', '{"x":1}')), calling(piece(undef, 'b', 'g', '{"x"'), piece(undef, undef, undef, ':2}')) ], @two ],
	same_id => [ [ calling(piece(undef, 'a', 'f', '{"x":1}'), piece(undef, 'a', 'g', '{"x":2}')) ], $two[0], 'a_1 g {"x":2}' ],
	same_id_numbered => [ [ calling(piece(0, 'a', 'f', '{"x":1}')), calling(piece(1, 'a', 'g', '{"x"')), calling(piece(1, 'a', 'g', ':2}')) ], $two[0], 'a_1 g {"x":2}' ],
	repeated => [ [ calling(piece(0, 'a', 'f', '')), calling(piece(0, 'a', 'f', '{"x"')), calling(piece(0, 'a', 'f', ':1}')) ], $two[0] ],
	id_each => [ [ calling(piece(0, 'a', 'f')), calling(piece(0, 'q', undef, '{"x"')), calling(piece(0, 'r', undef, ':1}')) ], $two[0] ],
	late_id => [ [ calling(piece(0, undef, undef, '{"x"')), calling(piece(0, 'a', undef, ':1}')), calling(piece(0, undef, 'f')) ], $two[0] ],
	interleaved => [ [ calling(piece(1, 'b', 'g', '{"x"'), piece(0, 'a', 'f', '{"x"')), calling(piece(0, undef, undef, ':1}'), piece(1, undef, undef, ':2}')) ], reverse @two ],
	mixed => [ [ calling(piece(1, 'a', 'f', '{"x":1}')), calling(piece(0, 'b', 'g', '{"x":2}')), calling(piece(undef, 'c', 'h', '{}')) ], @two, 'c h {}' ],
	numbers => [ [ calling(piece(2147483647, 'a', 'f', '{"x":1}')), calling(piece(undef, 'b', 'g', '{"x":2}')),
		calling(piece(99999999999, 'c', 'h', '{}')), calling(piece(-5, 'd', 'i', '{}')), calling(piece('0', 'e', 'j', '{}')) ],
		@two, 'c h {}', 'd i {}', 'e j {}' ],
	nameless => [ [ calling(piece(0, 'a', undef, '{}')), calling(piece(1, 'a', 'f', '{"x":1}')) ], $two[0] ]);
@names = sort keys %calls;
@turns = turns_of({ map { $_ => stream(@{ $calls{$_}[0] }) } @names }, @names);
foreach my $i (0 .. $#names)
{
	my ($pieces, @want) = @{ $calls{ $names[$i] } };
	my $got = calls($turns[$i]);

	s/^call_\w+/call_*/ foreach @$got;
	is_deeply($got, \@want, "calls: $names[$i]") or diag(encode($turns[$i]{error}));
	my @ids = map { $_->{toolCallId} } grep { $_->{type} eq 'tool-input-available' } @{ $turns[$i]{events} };
	is(scalar @ids, scalar @want, '  each has its event');
}
# in a whole body each is a call of its own
@names = ('whole_same', 'whole_mixed');
@turns = turns_of({
		whole_same => body('{"choices":[{"message":{"tool_calls":[' . piece(0, 'a', 'f', '{"x":1}') . ',' . piece(0, 'b', 'g', '{"x":2}') . ']}}]}'),
		whole_mixed => body('{"choices":[{"message":{"tool_calls":[' . piece(1, 'a', 'f', '{"x":1}') . ',' . piece(undef, 'b', 'g', '{"x":2}') . ']}}]}') }, @names);
is_deeply(calls($turns[$_]), \@two, "calls: $names[$_]") foreach 0, 1;

# usage
my %usage = (
	apart => [ [ 11, 7, undef ], '{"usage":{"prompt_tokens":11}}', '{"usage":{"completion_tokens":7}}' ],
	growing => [ [ 11, 7, undef ], '{"usage":{"prompt_tokens":11,"completion_tokens":1}}', '{"usage":{"prompt_tokens":11,"completion_tokens":7}}' ],
	strings => [ [ undef, undef, JSON::PP::true ], '{"usage":{"prompt_tokens":"11","completion_tokens":null}}' ],
	nothing => [ [ undef, undef, JSON::PP::true ], '{"usage":null}', '{"usage":[]}', '{"usage":{"prompt_tokens":-5,"completion_tokens":1e400}}' ]);
@names = sort keys %usage;
@turns = turns_of({ map { $_ => stream(chunk('"content":"x"'), @{ $usage{$_} }[ 1 .. $#{ $usage{$_} } ]) } @names }, @names);
foreach my $i (0 .. $#names)
{
	my ($want) = @{ $usage{ $names[$i] } };
	my $got = $turns[$i]{usage};

	is($got->{estimated}, $want->[2], "usage: $names[$i]");
	is_deeply([ @$got{qw(prompt_tokens completion_tokens)} ], [ @$want[ 0, 1 ] ], '  as it was told') if defined $want->[0];
}

# reasoning that has to be sent back comes in pieces, each chunk with one
my @pieces = (
	'{"type":"reasoning.text","text":"Let","format":"f","index":0}',
	'{"type":"reasoning.text","text":" me","format":"f","index":0,"signature":null}',
	'{"type":"reasoning.text","signature":"S1","format":"f","index":0}',
	'{"type":"reasoning.text","text":"And","format":"f","index":0}',
	'{"type":"reasoning.encrypted","data":"b3B","id":"r"}');
my @joined = (
	{ type => 'reasoning.text', text => 'Let me', format => 'f', index => 0, signature => 'S1' },
	{ type => 'reasoning.text', text => 'And', format => 'f', index => 0 },
	{ type => 'reasoning.encrypted', data => 'b3B', id => 'r' });
my @streamed = map { chunk("\"reasoning_details\":[$_]") } @pieces, ' ';
my %reasoning = (
	reasoned => stream(@streamed, chunk('"content":"x"')),
	whole_reasoned => body('{"choices":[{"message":{"content":"x","reasoning_details":[' . join(',', @pieces) . ']}}]}'),
	half_reasoned => stream(@streamed[ 0, 1 ], chunk('"content":"x"'), '{"error":{"message":"broke"}}'));
@turns = turns_of(\%reasoning, sort keys %reasoning);
is_deeply([ map { $_->{answer}{metadata}{reasoning_details} } @turns ],
	[ undef, \@joined, [ map { decode($_) } @pieces ] ],
	'blocks of reasoning are joined, a whole body has them whole, half ones do not count');

# of more than is kept nothing is
@turns = turns_of({ much_reasoned => stream((chunk('"reasoning_details":[' . join(',', (1) x 100_000) . ']')) x 7, chunk('"content":"x"')) },
	'much_reasoned');
is_deeply([ $turns[0]{status}, $turns[0]{answer}{content}, $turns[0]{answer}{metadata}{reasoning_details} ],
	[ 'completed', 'x', undef ], 'too many blocks of reasoning are not kept');

# what fails, and how: code, status, words, retryable (undef: as libcurl has it)
my %failures = (
	no_content => [ "HTTP/1.1 204 No Content\r\n\r\n", 'empty_response', 204, qr/no text/, 0 ],
	empty => [ body(''), 'empty_response', 200, qr/no text/, 0 ],
	labelled_error => [ body('{"error":{"message":"oh no","code":400}}', $sse), 'endpoint_error', 400, qr/^oh no$/, 0 ],
	named => [ body(qq(event: error\ndata: {"message":"no credit"}\n\n), $sse), 'endpoint_error', undef, qr/^no credit$/, 0 ],
	named_words => [ body("event: error\ndata: no luck\n\n", $sse), 'endpoint_error', undef, qr/^no luck$/, 0 ],
	named_late => [ body(qq(event: message\ndata: {"choices":[]}\n\nevent: error\ndata: {"message":"too late"}\n\n), $sse), 'endpoint_error', undef, qr/^too late$/, 0 ],
	named_code => [ body(qq(event: error\ndata: {"error":{"message":"wait","code":429}}\n\n), $sse), 'rate_limited', 429, qr/^wait/, 1 ],
	encoding => [ body('x', $sse, 'Content-Encoding: none-such'), 'endpoint_error', 200, qr/encoding/i, 0 ],
	not_gzip => [ body('xxxxxxxxxxxxxxxx', $sse, 'Content-Encoding: gzip'), 'endpoint_error', 200, qr/./, 0 ],
	length => [ "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc", 'endpoint_error', 200, qr/./, 0 ],
	short => [ "HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n$hello", 'endpoint_error', 200, qr/./, 1 ],
	ssh => [ "SSH-2.0-OpenSSH_9\r\n", 'endpoint_error', undef, qr/HTTP/, 0 ],
	headers => [ "HTTP/1.1 200 OK\r\n" . "X: y\r\n" x 100000, 'endpoint_error', 200, qr/./, undef ],
	gemini => [ status(400, '[{"error":{"code":400,"message":"bad","status":"INVALID_ARGUMENT"}}]'), 'endpoint_error', 400, qr/^bad$/, 0 ],
	azure => [ status(401, '{"statusCode":401,"message":"Access denied"}'), 'authentication_failed', 401, qr/^Access denied$/, 0 ],
	mistral => [ status(422, '{"object":"error","message":{"detail":[{"loc":["x"],"msg":"Field required"}]},"type":"x"}'), 'endpoint_error', 422, qr/^Field required$/, 0 ],
	cloudflare => [ status(400, '{"success":false,"errors":[{"code":1000,"message":"no route"}]}'), 'endpoint_error', 400, qr/^no route$/, 0 ],
	deepinfra => [ status(404, '{"detail":{"error":"no model"}}'), 'endpoint_error', 404, qr/^no model$/, 0 ],
	ollama => [ status(404, '{"error":"model \"x\" not found"}'), 'endpoint_error', 404, qr/not found$/, 0 ],
	xai => [ status(400, '{"code":"Client error","error":"bad argument"}'), 'endpoint_error', 400, qr/^bad argument$/, 0 ],
	marked => [ status(400, "\xEF\xBB\xBF" . '{"error":{"message":"marked"}}'), 'endpoint_error', 400, qr/^marked$/, 0 ],
	gzipped => [ do { IO::Compress::Gzip::gzip(\'{"error":{"message":"packed"}}' => \my $out); status(400, $out, 'Content-Encoding: gzip') },
		'endpoint_error', 400, qr/^packed$/, 0 ],
	later => [ status(429, '{}', 'Retry-After: 4000000000'), 'rate_limited', 429, qr/wait \d{5,} seconds/, 1 ],
	much_later => [ status(500, '{}', 'Retry-After: 99999999999999999999999'), 'endpoint_error', 500, qr/wait \d{5,} seconds/, 1 ],
	earlier => [ status(500, '{}', 'Retry-After: -7'), 'endpoint_error', 500, qr/^HTTP status 500$/, 1 ],
	past => [ status(500, '{}', 'Retry-After: Wed, 21 Oct 2015 07:28:00 GMT'), 'endpoint_error', 500, qr/^HTTP status 500$/, 1 ],
	key_cut => [ status(400, '{"error":{"message":"' . 'w' x 1990 . " $key\"}}"), 'endpoint_error', 400, qr/w \[redacted\]$/, 0 ]);
@names = sort keys %failures;
@turns = turns_of({ map { $_ => $failures{$_}[0] } @names }, @names);
foreach my $i (0 .. $#names)
{
	my (undef, $code, $status, $words, $retryable) = @{ $failures{ $names[$i] } };
	my $error = $turns[$i]{error};

	$retryable //= $error->{retryable};
	is_deeply([ @$error{qw(code status)}, !!$error->{retryable} ], [ $code, $status, !!$retryable ], "$names[$i]: $code")
	  or diag(encode($error));
	like($error->{message}, $words, '  in its words');
}

# a connection that has told of an error, or has given all, is used again
$wire->say(kept => status(500, '{"error":{"message":"kept"}}'), keep => 1);
$wire->say(taken => stream(chunk('"content":"hello"')), keep => 1);
my $connections = $wire->connections;
my $id = create_session($node)->{id};
is_deeply([ map { turn_of($node, ask($node, $id, "[[$_]]"))->{status} } qw(kept taken kept taken) ],
	[qw(failed completed failed completed)], 'errors and answers on one connection');
is($wire->connections, $connections + 1, '  it is one');

# what is too much harms nobody else
my $by = ChatTest::Bystander->new($node, $fake, server => 'good');
my $worker = wait_for_worker($node);
my $numbers = join ',', ('1e131071') x 7;
my %hostile = (
	bomb => [ encoded(\&IO::Compress::Gzip::gzip, 'gzip', 'data: ' . ' ' x 20_000_000), 'invalid_response', qr/max_body_size/ ],
	deep => [ stream(chunk('"content":"x","y":' . '[' x 100000 . ']' x 100000)), 'invalid_response', qr/not a chat/ ],
	numbers => [ stream(map { calling(piece($_, "i$_", 'f', "{\"a\":[$numbers]}")) } 0 .. 20), 'limit_reached', qr/max_steps/ ],
	members => [ stream(map { calling('{"index":' . $_ . ',"id":"i","function":{"name":"f","arguments":"{}"},"x":1e99999}') } 0 .. 20), 'invalid_response', qr/too long/ ],
	details => [ stream((map { chunk('"reasoning_details":[{"n":1e99999}]') } 0 .. 200), chunk('"content":"x"')), undef ],
	calls => [ stream(map { calling(piece($_, "i$_", 'f', '{}')) } 0 .. 2000), 'limit_reached', qr/max_tool_calls/ ],
	arguments => [ stream(calling(piece(0, 'i', 'f', '{"a":"' . 'x' x 1_100_000 . '"}'))), 'limit_reached', qr/longer than 1 MB/ ],
	unnamed => [ body("event: error\n\ndata: " . chunk('"content":"x"') . "\n\ndata: [DONE]\n\n", $sse), undef ],
	names => [ stream(json({ model => "\x{e9}" x 100000, choices => [ { finish_reason => 'f' x 100000, delta => { content => 'x' } } ] })), undef ],
	tool_name => [ stream(calling(piece(0, 'i' x 100000, "\x{e9}" x 100000, '{}'))), 'limit_reached', qr/max_steps/ ],
	returns => [ body("data: x" . "\r" x 1_000_000, $sse), 'invalid_response', qr/not a chat/ ],
	blocks => [ stream(map { chunk('"content":"a"'), chunk('"reasoning":"b"') } 1 .. 3000), undef ]);
@names = sort keys %hostile;
@turns = turns_of({ map { $_ => $hostile{$_}[0] } @names }, @names);
foreach my $i (0 .. $#names)
{
	my (undef, $code, $words) = @{ $hostile{ $names[$i] } };

	is($turns[$i]{error} && $turns[$i]{error}{code}, $code, "$names[$i]: " . ($code // 'completed')) or diag(encode($turns[$i]{error}));
	like($turns[$i]{error}{message}, $words, '  in its words') if $code;
	cmp_ok(length encode([ $turns[$i]{events}, $turns[$i]{messages} ]), '<', 3_000_000, '  nothing of it grows');
}
my %turn;
@turn{@names} = @turns;
is($turn{names}{answer}{metadata}{model}, "\x{e9}" x 128, 'the name of a model is cut, on a character');
is($turn{names}{events}[-1]{finishReason}, 'other', 'so is the reason of an end');
like(calls($turn{tool_name})->[0], qr/^call_\w+ \x{e9}{128} \{\}$/, 'and the name of a tool; what is no id is replaced');
is($turn{blocks}{answer}{content}, 'a' x 3000, 'many blocks are one text');
$by->check('hostile answers', undisturbed => 1);
is(wait_for_worker($node), $worker, 'the worker has gone through all of it');
unlike(slurp_file($node->logfile), qr/\Q$key\E/, 'P8: no key in the log');

$node->stop;
done_testing();
