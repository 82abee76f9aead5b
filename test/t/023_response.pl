# Is everything taken from an answer that an endpoint may put there?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use JSON::PP ();
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake, retries => 0);

# Runs each directive in a session of its own.
sub turns
{
	return run_turns($node, map { "[[$_]]" } @_);
}

# Returns the last event of a type.
sub event
{
	my ($turn, $type) = @_;
	return (grep { $_->{type} eq $type } @{ $turn->{events} })[-1];
}

# Returns the deltas of a kind of block.
sub deltas
{
	my ($turn, $type) = @_;
	return join '',
	  map { $_->{delta} } grep { $_->{type} eq $type } @{ $turn->{events} };
}

# usage in any chunk
my %usage = (
	'usage=final prompt_tokens=11 completion_tokens=7' => [ 11, 7, undef ],
	'usage=first prompt_tokens=11 completion_tokens=7' => [ 11, 7, undef ],
	'usage=split prompt_tokens=11 completion_tokens=7' => [ 11, 7, undef ],
	'plain=1 prompt_tokens=11 completion_tokens=7' => [ 11, 7, undef ],
	'usage=none' => [ undef, undef, JSON::PP::true ],
	'plain=1 usage=none' => [ undef, undef, JSON::PP::true ],);
my @forms = sort keys %usage;
my @turns = turns(map { "tokens=3 $_" } @forms);
foreach my $i (0 .. $#forms)
{
	my ($turn, $want) = ($turns[$i], $usage{ $forms[$i] });
	my $usage = $turn->{answer}{metadata}{usage};

	is($usage->{estimated}, $want->[2], "$forms[$i]: estimated or not");
	is($usage->{prompt_tokens}, $want->[0], '  prompt tokens')
	  if defined $want->[0];
	is($usage->{completion_tokens}, $want->[1], '  completion tokens')
	  if defined $want->[1];
	cmp_ok($usage->{prompt_tokens}, '>', 0, '  some prompt tokens');
	cmp_ok($usage->{completion_tokens}, '>', 0, '  some completion tokens');
	is_deeply($turn->{usage}, $usage, '  the task has the same');
	is_deeply(event($turn, 'message-metadata')->{messageMetadata}{usage},
		$usage, '  and the event');
	my $session = row($node, "SELECT * FROM chat.chat_session"
		  . " WHERE id = '$turn->{session}'");
	is_deeply(
		[ @$session{qw(total_prompt_tokens total_completion_tokens)} ],
		[ @$usage{qw(prompt_tokens completion_tokens)} ],
		'  and the session');
}
my ($cached) = turns('tokens=1 cached=5 prompt_tokens=9 reasoning_tokens=2');
is_deeply(
	[ @{ $cached->{usage} }{qw(cached_tokens reasoning_tokens)} ],
	[ 5, 2 ],
	'cached and reasoning tokens are told');

# counts that nobody can have, and a session that has the largest total: its
# turns end all the same
my ($lie) = turns(
	'tokens=1 prompt_tokens=1000000000001 completion_tokens=9007199254740992');
is($lie->{status}, 'completed', 'impossible counts: completed');
is($lie->{usage}{estimated}, JSON::PP::true, 'they are estimated instead');
cmp_ok($lie->{prompt_tokens} + $lie->{completion_tokens}, '<', 1000,
	'and count nowhere');
my $largest = '9007199254740992';
my $full = create_session($node)->{id};
$node->safe_psql('postgres', "SELECT chat.update_chat_session('$full',"
	  . " total_prompt_tokens => $largest, total_completion_tokens => $largest)");
is(turn_of($node, ask($node, $full, 'x [[tokens=2 prompt_tokens=1000000000000]]'))->{status},
	'completed', 'the largest total: the turn is completed');
is( $node->safe_psql('postgres', 'SELECT total_prompt_tokens FROM'
		  . " chat.chat_session WHERE id = '$full'"),
	$largest + 1000000000000, 'and its tokens are added');

# what the model refuses
foreach my $turn (turns(
	'refusal=I%20cannot%20do%20that.',
	'refusal=I%20cannot%20do%20that. plain=1'))
{
	is($turn->{status}, 'completed', 'a refusal is an answer');
	is($turn->{answer}{refusal}, 'I cannot do that.', 'it has its column');
	is($turn->{answer}{content}, undef, 'and is no content');
	is(text_of(@{ $turn->{events} }),
		'I cannot do that.', 'listeners see it as text');
}

# reasoning, by both names
foreach my $turn (turns(
	'tokens=2 reasoning=3',
	'tokens=2 reasoning=3 reasoning_field=reasoning',
	'tokens=2 reasoning=3 plain=1'))
{
	is($turn->{answer}{content}, 't0 t1 ', 'reasoning is no content');
	is($turn->{answer}{metadata}{reasoning},
		'r0 r1 r2 ', 'it is kept in the metadata');
	is(deltas($turn, 'reasoning-delta'), 'r0 r1 r2 ', 'and streamed apart');
	is_deeply(
		[ grep { /^(reasoning|text)/ } types_of(@{ $turn->{events} }) ],
		[
			qw(reasoning-start reasoning-delta reasoning-end
			  text-start text-delta text-end)
		],
		'in blocks that open and close');
}

# finish reasons
my %finish = (
	'finish=stop' => 'stop',
	'finish=length' => 'length',
	'finish=content_filter' => 'content-filter',
	'finish=end_turn' => 'stop',
	'finish=' => 'other',
	'nofinish=1' => 'other',
	'finish=weird' => 'other',);
@forms = sort keys %finish;
@turns = turns(map { "tokens=2 $_" } @forms);
foreach my $i (0 .. $#forms)
{
	is($turns[$i]{status}, 'completed', "$forms[$i]: completed");
	is($turns[$i]{events}[-1]{finishReason},
		$finish{ $forms[$i] }, '  the word of the protocol');
}
is((turns('tokens=2 finish=length'))[0]{answer}{metadata}{finish_reason},
	'length', 'the endpoint\'s own word is kept');

# a plain body in the place of a stream
my ($plain, $byte, $unknown) = turns(
	'tokens=4 plain=1',
	'tokens=4 plain=1 split=1',
	'tokens=4 plain=1 unknown=1');
foreach my $turn ($plain, $byte, $unknown)
{
	is($turn->{status}, 'completed', 'a plain body is an answer');
	is($turn->{answer}{content}, 't0 t1 t2 t3 ', 'with its content');
	is_deeply(
		[ grep { !/metadata/ } types_of(@{ $turn->{events} }) ],
		[
			qw(start start-step data-status text-start text-delta text-end
			  finish-step finish)
		],
		'and the events of a stream');
}

# what no text of PostgreSQL can hold
foreach my $form ('', ' plain=1', ' split=1')
{
	my ($turn) = turns("tokens=1 nul=1 surrogate=1 badutf8=1$form");
	is($turn->{status}, 'completed', "NUL, surrogate, bad bytes$form");
	like(
		$turn->{answer}{content},
		qr/^a\x{fffd}b c\x{fffd}d e\x{fffd}+f t0 $/,
		'  each is U+FFFD');
	is(text_of(@{ $turn->{events} }),
		$turn->{answer}{content}, '  also in the events');
}

# the model's name and where the answer came from
my $meta = $plain->{answer}{metadata};
is($meta->{model}, 'fake-1', 'the model that answered is kept');
is($meta->{server}, 'fake', 'and the server');
ok(!exists $meta->{interrupted}, 'a whole answer is not interrupted');

# T58: parts that nobody knows pass by
my ($odd) = turns('tokens=2 unknown=1 nulls=1 comments=1');
is($odd->{answer}{content}, 't0 t1 ', 'T58: unknown fields are ignored');

done_testing();
