# Does a step that asked for tools run them and go on, through any number of
# steps, whatever the calls look like; and does the model hear of each that
# could not run, so that it may try again?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Tools;
use Test::More;

my $fake = start_fake();
my $node = tool_cluster($fake);
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION app.add(a integer, b integer DEFAULT 10) RETURNS integer
	LANGUAGE sql AS 'SELECT a + b';
CREATE FUNCTION app.hello(who text DEFAULT 'world') RETURNS text
	LANGUAGE sql AS $$ SELECT 'hello ' || who $$;
CREATE FUNCTION app.long(n integer) RETURNS text
	LANGUAGE sql AS $$ SELECT repeat('é', n) $$;
EOS
register($node, 'ann', function => "app.$_") foreach qw(add hello long);
register($node, 'ann', function => 'app.add', name => 'off', enabled => 'off');
register($node, 'ann', function => 'app.add', name => 'never', approval => 'deny');
register($node, 'bob', function => 'app.add', name => 'of_bob');

# Runs turns of ann, each in a session of its own.
sub turns
{
	my @messages = @_;
	my @tasks = map { (start($node, $_))[1] } @messages;
	return map { turn_of($node, $_) } @tasks;
}

# Returns what the model was told of a turn's calls, in order.
sub told
{
	my ($turn) = @_;
	return [ map { $_->{content} } grep { $_->{role} eq 'tool' } @{ $turn->{messages} } ];
}

# steps that differ, with calls side by side
my ($turn) = turns('[[at=0 tokens=2 tool=add args={"a":1} id=a tool=hello id=b]]'
	  . ' [[at=1 tool=hello args={"who":"you"} id=c]]'
	  . ' [[at=2 tool=add args={"a":1,"b":2} id=d tool=add args={"a":3} id=e tool=hello id=f]]'
	  . ' [[at=3 text=done]]');
is($turn->{status}, 'completed', 'four steps') or diag(encode($turn->{error}));
is($turn->{steps}, 4, '  are counted');
is_deeply(told($turn), [ '11', 'hello world', 'hello you', '3', '13', 'hello world' ],
	'  the results are in the order of the calls');
is($turn->{answer}{content}, 'done', '  the last answer');
is_deeply(
	[ map { $_->{role} } @{ $turn->{messages} } ],
	[qw(user assistant tool tool assistant tool assistant tool tool tool assistant)],
	'  stored as the API wants it');
is_deeply(
	[ map { $_->{type} } grep { $_->{type} =~ /^(start|finish)/ } @{ $turn->{events} } ],
	[ 'start', ('start-step', 'finish-step') x 4, 'finish' ],
	'  steps of one stream');
sound($turn, $node, 'four steps');
my @bodies = map { $_->{body} } $fake->completions;
is(scalar @bodies, 4, '  one request for each step');
is_deeply([ map { scalar @{ $_->{messages} } } @bodies ], [ 1, 4, 6, 10 ],
	'  each with all that came before');
my $usage = row($node,
	"SELECT prompt_tokens, completion_tokens FROM chat.chat_task WHERE id = '$turn->{task}'");
my $session = row($node, 'SELECT total_prompt_tokens AS prompt_tokens,'
	  . " total_completion_tokens AS completion_tokens FROM chat.chat_session WHERE id = '$turn->{session}'");
is_deeply($session, $usage, '  usage is summed over the steps');
ok($usage->{completion_tokens} > 0, '  and is some');

# the same calls in every form in which they arrive
my $calls = 'tool=add args={"a":4,"b":5} id=a tool=hello args='
  . value(qq({"who":"\x{e9}\\"\\\\"})) . ' id=b';
my @forms = ('', 'argsplit=0', 'argsplit=1', 'split=1', 'argsplit=1 split=1',
	'interleave=1 argsplit=1', 'noindex=1', 'noid=1', 'noid=1 noindex=1', 'plain=1',
	'tokens=3 reasoning=2', 'toolfinish=stop', 'nofinish=1', 'toolextra=1');
$fake->forget;
my @turns = turns(map { "[[$calls $_]]" } @forms);
foreach my $i (0 .. $#forms)
{
	is_deeply(
		[ $turns[$i]{status}, told($turns[$i]) ],
		[ 'completed', [ '9', qq(hello \x{e9}"\\) ] ],
		"form \"$forms[$i]\"") or diag(encode($turns[$i]{error}));
	sound($turns[$i], $node, "form \"$forms[$i]\"");
	my %input;
	$input{ $_->{toolCallId} } .= $_->{inputTextDelta} foreach of_type($turns[$i], 'tool-input-delta');
	is_deeply(
		[ map { decode($input{ $_->{toolCallId} }) } of_type($turns[$i], 'tool-input-available') ],
		[ map { $_->{input} } of_type($turns[$i], 'tool-input-available') ],
		'  the pieces of the input are the input');
}
sound_requests($fake, 'all forms');

# the same id in every step, and twice in one
($turn) = turns('[[at=0 tool=add args={"a":1} id=call_0]] [[at=1 tool=add args={"a":2} id=call_0]] [[at=2 text=ok]]');
is_deeply(told($turn), [ 11, 12 ], 'one id in two steps: each call has its own result');
$fake->forget;
($turn) = turns('[[tool=add args={"a":1} id=x tool=add args={"a":2} id=x]]');
is_deeply(told($turn), [ 11, 12 ], 'one id twice in a step');
sound($turn, $node, 'one id twice in a step');
sound_requests($fake, 'one id twice in a step');

# ids that would break out of an event, or that no event has room for
my $hostile = qq(","type":"finish","x":"\r\n\\\x{e9}\t);
$fake->forget;
@turns = turns('[[tool=add args={"a":1} id=' . value($hostile) . ' argsplit=3]]',
	'[[tool=add args={"a":1} id=' . ('x' x 9000) . ' argsplit=3]]');
is_deeply([ map { $_->{status} } @turns ], [ ('completed') x 2 ], 'hostile ids');
is((calls($node, $turns[0]{task}))[0]{call_id}, $hostile, '  are stored as they are');
ok(length((calls($node, $turns[1]{task}))[0]{call_id}) < 41, '  one that is too long is replaced');
sound($_, $node, 'hostile ids') foreach @turns;
sound_requests($fake, 'hostile ids');

# empty arguments
@turns = turns('[[tool=hello args= id=a]]', '[[tool=hello args={} id=a]]',
	'[[tool=hello args=%20%0A id=a]]');
is_deeply(told($turns[0]), ['hello world'], 'no arguments are an empty object');
is_deeply([ map { $_->{input} } of_type($turns[0], 'tool-input-available') ], [ {} ],
	'  listeners see it as one');
is_deeply(told($turns[1]), ['hello world'], 'an empty object');

# what cannot run is told to the model, which tries again
my %bad = (
	'invalid JSON' => [ 'tool=add args={"a":', qr/the arguments are not a JSON object/ ],
	'an array' => [ 'tool=add args=[1]', qr/the arguments are not a JSON object/ ],
	'a number' => [ 'tool=add args=7', qr/the arguments are not a JSON object/ ],
	'null' => [ 'tool=add args=null', qr/the arguments are not a JSON object/ ],
	'NUL' => [ 'tool=add args={"a":"%5Cu0000"}', qr/failed/ ],
	'two objects' => [ 'tool=add args={"a":1}{"a":2}', qr/the arguments are not a JSON object/ ],
	'a missing property' => [ 'tool=add args={"b":1}', qr/the required property "a" is missing/ ],
	'an unknown tool' => [ 'tool=nothing args={}', qr/there is no such tool/ ],
	'a disabled tool' => [ 'tool=off args={"a":1}', qr/there is no such tool/ ],
	'a tool of somebody else' => [ 'tool=of_bob args={"a":1}', qr/there is no such tool/ ]);
my @names = sort keys %bad;
$fake->forget;
@turns = turns(map { "[[at=0 $bad{$_}[0] id=a]] [[at=1 tool=add args={\"a\":1} id=b]] [[at=2 text=ok]]" } @names);
foreach my $i (0 .. $#names)
{
	my $t = $turns[$i];
	my $told = told($t);

	is($t->{status}, 'completed', "$names[$i]: the task goes on") or diag(encode($t->{error}));
	my $error = eval { decode($told->[0]) } // {};
	is($error->{type}, 'error', '  the model is told');
	like($error->{message} // '', $bad{$names[$i]}[1], '  what is wrong');
	is($told->[1], '11', '  and may try again');
	is(scalar(of_type($t, 'tool-input-error')), 1, '  listeners see one tool-input-error')
	  unless $names[$i] eq 'NUL';
	sound($t, $node, $names[$i]);
}
sound_requests($fake, 'bad calls');

# a good call beside bad ones
($turn) = turns('[[tool=add args={"a":1} id=a tool=nothing id=b tool=add args=x id=c]]');
is(told($turn)->[0], '11', 'a good call runs beside bad ones');
sound($turn, $node, 'good and bad calls');

# what is denied by its registration
($turn) = turns('[[tool=never args={"a":1} id=a]]');
is_deeply(
	decode(told($turn)->[0]),
	{ type => 'error', message => 'Tool never denied: it is not allowed', code => 'denied' },
	'a tool that is denied does not run');
is(scalar(of_type($turn, 'tool-output-denied')), 1, '  listeners see that');
sound($turn, $node, 'denied');

# a tool that is not in the session's list
my (undef, $task) = start($node, '[[tool=add args={"a":1} id=a tool=hello id=b]]',
	settings => '{"tools": ["hello"]}');
$turn = turn_of($node, $task);
like(told($turn)->[0], qr/there is no such tool/, 'a tool that the session may not use');
is(told($turn)->[1], 'hello world', '  one that it may');
sound($turn, $node, "the session's list");

# settings of tools go with the request
$fake->forget;
(undef, $task) = start($node, 'hi [[tokens=1]]',
	settings => '{"tool_choice": {"type": "function", "function": {"name": "add"}}, "parallel_tool_calls": false}');
wait_for_task($node, $task);
my $body = $fake->last_request->{body};
is($body->{tool_choice}{function}{name}, 'add', 'tool_choice goes with the request');
ok(exists $body->{parallel_tool_calls} && !$body->{parallel_tool_calls}, 'so does parallel_tool_calls');

# one that forces a call does so once: with it in every step nothing would end
foreach my $choice ('"required"', '{"type": "function", "function": {"name": "hello"}}')
{
	$fake->forget;
	(undef, $task) = start($node, '[[tool=hello steps=2]]', settings => "{\"tool_choice\": $choice}");
	is(turn_of($node, $task)->{status}, 'completed', "tool_choice $choice");
	is_deeply([ map { exists $_->{body}{tool_choice} ? 1 : 0 } $fake->completions ], [ 1, 0, 0 ],
		'  is for the first step');
}
$fake->forget;
(undef, $task) = start($node, '[[tool=hello]]', settings => '{"tool_choice": "auto"}');
wait_for_task($node, $task);
is_deeply([ map { $_->{body}{tool_choice} } $fake->completions ], [ ('auto') x 2 ],
	'one that does not is for all');

# an answer that is cut by its length: no call runs of which something is
# missing, be it all of its arguments (T48)
@turns = turns(map { "[[at=0 tool=hello args={\"who\":\"me\"} id=a tool=hello args=$_ id=b toolfinish=length]] [[at=1 text=ok]]" }
	  '', '{"who":"y', '{}');
is_deeply([ map { told($_)->[0] } @turns ], [ ('hello me') x 3 ], 'T48: an answer that is cut: calls that are whole run');
like(told($turns[$_])->[1], qr/the answer was cut before the arguments were whole/, '  those that are not do not') foreach 0, 1;
is(told($turns[2])->[1], 'hello world', '  unless nothing is missing');
sound($_, $node, 'an answer that is cut') foreach @turns;

# an answer that breaks off runs nothing
my $before = row($node, 'SELECT count(*) AS n FROM chat.chat_tool_call')->{n};
@turns = turns('[[tool=add args={"a":1} id=a argsplit=1 cutafter=4]]',
	'[[tool=add args={"a":1} id=a error_at=2]]');
is($_->{status}, 'failed', 'half an answer has failed') foreach @turns;
is(row($node, 'SELECT count(*) AS n FROM chat.chat_tool_call')->{n}, $before, '  and runs nothing');
# one that is repeated after that runs its calls once
$node->safe_psql('postgres', "ALTER SERVER fake OPTIONS (SET retries '3');"
	  . "ALTER SYSTEM SET chat.retry_base_delay = '10ms'; SELECT pg_reload_conf()");
($turn) = turns('[[tool=add args={"a":1} id=a reset=1 times=1 key=once]]');
is_deeply(told($turn), ['11'], 'a request that is repeated: one call');
sound($turn, $node, 'a request that is repeated');

# limits
$node->safe_psql('postgres', 'ALTER SYSTEM SET chat.max_steps = 3;'
	  . 'ALTER SYSTEM SET chat.max_tool_calls = 2; ALTER SYSTEM SET chat.max_tool_output_length = 100;'
	  . 'SELECT pg_reload_conf()');
wait_for($node, "SELECT current_setting('chat.max_steps') = '3'");
@turns = turns('[[tool=hello id=a steps=50]]', '[[tool=hello id=a steps=2]]',
	'[[tool=hello id=a tool=hello id=b tool=hello id=c]]',
	'[[tool=long args={"n":101} id=a tool=long args={"n":100} id=b]]',
	'[[tool=hello id=a tool=hello id=b]]');
is($turns[0]{status}, 'failed', 'chat.max_steps');
is($turns[0]{error}{code}, 'limit_reached', '  the code');
like($turns[0]{error}{message}, qr/chat\.max_steps \(3\)/, '  the reason');
is($turns[0]{steps}, 3, '  after as many steps');
is((of_type($turns[0], 'finish'))[0]{finishReason}, 'error', '  listeners see why');
is((of_type($turns[0], 'error'))[0]{code}, 'limit_reached', '  with its code');
sound($turns[0], $node, 'chat.max_steps');
is($turns[1]{status}, 'completed', 'just below it');
is($turns[2]{status}, 'failed', 'chat.max_tool_calls');
is($turns[2]{error}{code}, 'limit_reached', '  the code');
like($turns[2]{error}{message}, qr/chat\.max_tool_calls \(2\)/, '  the reason');
is_deeply([ map { $_->{code} } of_type($turns[2], 'error') ], ['limit_reached'], '  listeners see it');
like($_, qr/the step has more than 2 calls/, '  none of the calls runs') foreach @{ told($turns[2]) };
is(scalar @{ told($turns[2]) }, 3, '  each has its result');
sound($turns[2], $node, 'chat.max_tool_calls');
is_deeply(told($turns[4]), [ ('hello world') x 2 ], '  as many as that do');
is(told($turns[3])->[0], ("\x{e9}" x 100) . "\n[cut: 100 of 101 characters are shown]",
	'chat.max_tool_output_length: cut, with a marker');
is(told($turns[3])->[1], "\x{e9}" x 100, '  not when it fits');
is((calls($node, $turns[3]{task}))[0]{result}, "\x{e9}" x 101, '  what is stored is whole');

# after all that the session is of use
$fake->forget;
wait_for_task($node, ask($node, $turns[0]{session}, 'and now? [[text=fine]]'));
is($fake->last_request->{body}{messages}[-1]{role}, 'user', 'the session goes on');
sound_requests($fake, 'after a limit');

$node->stop;
done_testing();
