# Are the tool calls of an answer gathered from their pieces and stored?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake, retries => 0);

my $args = '{"city":"Z\u00fcrich","n":[1,2.5,{"x":null}]}';
my $two = "tool=weather args=$args id=c1 tool=time args={} id=c2";

# Returns the message that holds the calls.
sub message
{
	my ($turn) = @_;
	return (grep { $_->{tool_calls} } @{ $turn->{messages} })[0] // {};
}

# Returns the calls as [id, name, arguments].
sub calls
{
	my ($turn) = @_;
	return [
		map { [ $_->{id}, $_->{function}{name}, $_->{function}{arguments} ] }
		  @{ message($turn)->{tool_calls} // [] }
	];
}

# two calls, in every form in which endpoints send them
my @forms = (
	'', 'argsplit=0', 'argsplit=1', 'interleave=1 argsplit=2', 'split=1',
	'noindex=1', 'noindex=1 argsplit=0', 'plain=1', 'multidata=1 eol=cr',
	'tokens=2', 'reasoning=2', 'toolfinish=stop', 'nofinish=1', 'unknown=1',
	'toolextra=1');
my @turns = run_turns($node, map { "[[$two $_]]" } @forms);
foreach my $i (0 .. $#forms)
{
	my $turn = $turns[$i];
	is($turn->{status}, 'completed', "form \"$forms[$i]\": completed")
	  or diag(encode($turn->{error}));
	is_deeply(
		calls($turn),
		[ [ 'c1', 'weather', $args ], [ 'c2', 'time', '{}' ] ],
		'  both calls, whole');
	is(message($turn)->{content},
		$forms[$i] =~ /tokens/ ? 't0 t1 ' : undef, '  with the content');
	my %input;
	$input{ $_->{toolCallId} } .= $_->{inputTextDelta}
	  foreach grep { $_->{type} eq 'tool-input-delta' } @{ $turn->{events} };
	is_deeply(\%input, { c1 => $args, c2 => '{}' }, '  and their events');
	my @start = grep { $_->{type} eq 'tool-input-start' } @{ $turn->{events} };
	is_deeply(
		[ map { "$_->{toolCallId} $_->{toolName}" } @start ],
		[ 'c1 weather', 'c2 time' ],
		'  each is announced once');
}

# without ids the runtime gives some
@forms = ('', 'noindex=1', 'plain=1', 'noindex=1 argsplit=0');
@turns = run_turns($node, map { "[[$two noid=1 $_]]" } @forms);
foreach my $i (0 .. $#forms)
{
	my $calls = calls($turns[$i]);
	is_deeply(
		[ map { [ @$_[ 1, 2 ] ] } @$calls ],
		[ [ 'weather', $args ], [ 'time', '{}' ] ],
		"without ids, form \"$forms[$i]\": both calls");
	ok(@$calls == 2 && $calls->[0][0] && $calls->[1][0]
		  && $calls->[0][0] ne $calls->[1][0],
		'  with different ids');
}

# members that nobody knows are kept as they came
my ($extra) = run_turns($node, "[[$two toolextra=1]]");
is_deeply(
	message($extra)->{tool_calls}[0],
	{
		id => 'c1',
		type => 'function',
		function => { name => 'weather', arguments => $args },
		extra_content => { google => { thought_signature => 'sig123' } }
	},
	'unknown members of a call are stored');

# many calls, and long arguments that need more than one event
my $long = '{"t":"' . ("x" x 20000) . '"}';
my ($many, $big) = run_turns(
	$node,
	'[[' . join(' ', map { "tool=f$_ id=i$_" } 1 .. 30) . ']]',
	"[[tool=f id=i args=$long argsplit=5000]]");
is(scalar @{ calls($many) }, 30, 'thirty calls of one answer');
is(calls($big)->[0][2], $long, 'long arguments');

# an answer that breaks off has no calls: half of one is worth nothing (T48)
my ($cut) = run_turns($node, "[[tokens=2 $two cutafter=5]]");
is($cut->{status}, 'failed', 'T48: an answer that breaks off has failed');
is($cut->{answer}{content}, 't0 t1 ', 'its text is kept');
is($cut->{answer}{tool_calls}, undef, 'T48: half a tool call is not');

done_testing();
