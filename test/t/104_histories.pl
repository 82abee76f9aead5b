# Is every request valid for the API, whatever the history?
#
# Random histories: all roles, results without calls and calls without results
# (as a crash, a branch or an import leaves them), branches that were set aside,
# calls that are under way, answers that were cut short, contents that are empty
# or missing, names and ids that no endpoint takes, with and without a context
# window.  A validator of the API's rules reads what the endpoint has received.
# (What real crashes leave it reads in 086_tool_chaos.pl.)
#  HISTORIES is how many, HISTORIES_SEED repeats.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Api;
use Test::More;

my $histories = $ENV{HISTORIES} || 90;
my $seed = $ENV{HISTORIES_SEED} || int(rand(2**31));

srand($seed);
note("HISTORIES_SEED=$seed");

my $fake = start_fake();
my $node = chat_cluster('main', conf => "chat.keep_recent_messages = 3\nchat.max_context_messages = 30\nchat.max_retries = 0");
my @servers = ('fake', 'narrow', 'summing');

create_server($node, $fake);
$node->safe_psql('postgres', server_sql($fake->port, name => 'narrow', context_window => 700, max_tokens => 100));
$node->safe_psql('postgres', server_sql($fake->port, name => 'summing', context_window => 900, max_tokens => 100, summarize => 'on'));

# Returns one of a list.
sub pick
{
	return $_[ int rand @_ ];
}

# Returns a random text; some are empty, some missing.
sub text
{
	return pick(undef, '', ' ', 'word', "two\nlines", "\x{4f60}\x{597d}", '{"json": [1, 2]}', '<|end|>',
		'some words ' x int(rand(30)), 'some words ' x int(rand(200)));
}

# Returns tool calls; ids may repeat, be missing or strange.
sub calls
{
	my @ids = @_;
	return [ map {
			my $id = $_;
			my $call = { type => 'function', function => { name => pick('look', 'do_it', 'functions.look', 'look at!', "\x{e4}" x 70), arguments => pick('{}', '{"a": 1}', '', 'broken {') } };
			$call->{id} = $id if defined $id;
			delete $call->{function}{name} if rand() < 0.05;
			delete $call->{function}{arguments} if rand() < 0.05;
			$call } @ids ];
}

# Returns a random history.
sub history
{
	my @messages;

	for (0 .. int rand 25)
	{
		my $kind = rand;

		if ($kind < 0.25)
		{
			push @messages, { role => 'user', content => text() };
			$messages[-1]{name} = pick('ann', 'Ann Smith', '<Ann>', "J\x{f6}rg", 'x' x 100) if rand() < 0.3;
		}
		elsif ($kind < 0.4)
		{
			push @messages, { role => 'assistant', content => text() };
			$messages[-1]{refusal} = 'no' if rand() < 0.2;
		}
		elsif ($kind < 0.5)
		{
			push @messages, { role => pick('system', 'developer'), content => text() };
		}
		elsif ($kind < 0.55)
		{
			push @messages, { role => 'assistant', content => text(), function_call => { name => pick('old', 'old one'), arguments => '{}' } };
			push @messages, { role => 'function', name => pick('old', 'old one', undef), content => text() } if rand() < 0.7;
		}
		elsif ($kind < 0.6)
		{
			push @messages, { role => 'user', content => undef,
				parts => [ { type => 'text', text => 'look' }, { type => 'image_url', image_url => { url => 'data:image/png;base64,' . 'A' x 9000 } } ] };
		}
		elsif ($kind < 0.7)
		{
			push @messages, { role => 'tool', tool_call_id => pick('c1', 'nobody', 'call_0'), content => text() };
		}
		else
		{
			my @ids = map { pick("c$_", 'call_0', "c$_", "call_$_" . 'x' x 50) } 1 .. 1 + int rand 3;
			my @results = grep { rand() < 0.8 } @ids;

			@ids = (@ids, undef) if rand() < 0.1;
			@results = reverse @results if rand() < 0.3;
			push @results, pick(@ids) // 'c1' if rand() < 0.2;
			push @messages, { role => 'assistant', content => text(), tool_calls => calls(@ids) };
			push @messages, { role => 'user', content => 'interrupting' } if rand() < 0.1;
			push @messages, { role => 'tool', tool_call_id => $_, content => text() } for @results;
		}
	}
	return @messages;
}

# Does to a stored history what branches, crashes and cancels do.
sub disturb
{
	my ($id) = @_;
	my $n = row($node, "SELECT count(*) AS n FROM chat.chat_message WHERE session_id = '$id'")->{n};
	my $from = 1 + int rand($n + 1);
	my $to = $from + int rand 6;
	my $what = pick(
		# a branch; a task that was rolled back; calls that go on; an answer that broke off
		"active = false, superseded_by = $n + 1 WHERE sequence >= $from AND",
		"active = false, superseded_by = $to + 1 WHERE sequence BETWEEN $from AND $to AND",
		q(content = '', metadata = '{"pending": true}' WHERE role = 'tool' AND),
		q(metadata = '{"interrupted": true}' WHERE role = 'assistant' AND));

	$node->safe_psql('postgres', "UPDATE chat.chat_message SET $what session_id = '$id'");
	return;
}

# the validator itself
is(problem({ messages => [ { role => 'user', content => 'x' } ] }), undef, 'the validator lets what is valid pass');
is(problem({ messages => [ { role => 'tool', tool_call_id => 'x', content => '' } ] }), 'result without a call', 'and finds what is not');
is(problem({ messages => [ { role => 'user', content => 'x', name => 'a b' } ] }), 'name', 'also in names');

# What is sure to be collapsed (by the narrow server) and summed up (by the
# summing one): chance alone brings these about too seldom.
my $talk = 'some words ' x 20;
my @sure = (
	[   { role => 'user', content => 'look' },
		{ role => 'assistant', tool_calls => [ { id => 'c1', type => 'function', function => { name => 'look', arguments => '{}' } } ] },
		{ role => 'tool', tool_call_id => 'c1', content => $talk x 20 },
		{ role => 'assistant', content => 'done' } ],
	[ { role => 'user', content => 'start [[text=RECAP]]' }, { role => 'assistant', content => 'fine' },
		map { ({ role => 'user', content => $talk }, { role => 'assistant', content => $talk }) } 1 .. 10 ]);

my @tasks;
my %history;
foreach my $i (1 .. $histories)
{
	my @messages = $i <= @sure ? @{ $sure[ $i - 1 ] } : history();
	my $id = create_session($node, server => $servers[ $i % @servers ])->{id};

	$node->safe_psql('postgres', "SELECT FROM chat.add_chat_messages_batch('$id', " . literal(encode(\@messages)) . ')')
	  if @messages;
	disturb($id) if $i > @sure && rand() < 0.4;
	$history{$i} = \@messages;
	push @tasks, ask($node, $id, "question $i. [[tokens=1]]");
}
my @failed = grep { $_->{status} ne 'completed' } map { wait_for_task($node, $_) } @tasks;
is(scalar @failed, 0, "all of $histories turns are answered");
diag(encode($_->{error})) foreach @failed[ 0 .. ($#failed < 4 ? $#failed : 4) ];

my %seen;
my @bad;
foreach my $request ($fake->completions)
{
	my $body = $request->{body};
	my $problem = problem($body);
	my ($question) = map { $_->{content} =~ /^question (\d+)\./ ? $1 : () }
	  grep { $_->{role} eq 'user' && !ref $_->{content} } @{ $body->{messages} };

	$seen{$question} = 1 if $question;
	push @bad, [ $question, $problem, $body->{messages} ] if $problem;
}
is(scalar @bad, 0, 'every request is valid');
diag("HISTORIES_SEED=$seed, question $_->[0]: $_->[1]: ", substr(encode($_->[2]), 0, 4000))
  foreach @bad[ 0 .. ($#bad < 2 ? $#bad : 2) ];
is(scalar keys %seen, $histories, 'each holds its question');
my %compacted = map { $_->{compaction} // 'none' => $_->{n} }
  rows($node, 'SELECT compaction, count(*) AS n FROM chat.chat_task GROUP BY 1');
note(encode(\%compacted));
if ($histories >= 60)
{
	ok($compacted{$_}, "some were $_")
	  foreach qw(none collapsed truncated summarized);
}

done_testing();
