# Is every request valid for the API, whatever the history?
#
# Random histories: all roles, results without calls and calls without results
# (as a crash, a branch or an import leaves them), contents that are empty or
# missing, with and without a context window.  A validator of the API's rules
# reads what the endpoint has received.  HISTORIES is how many, HISTORIES_SEED repeats.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
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
			my $call = { type => 'function', function => { name => pick('look', 'do_it'), arguments => pick('{}', '{"a": 1}', '', 'broken {') } };
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
			push @messages, { role => 'assistant', content => text(), function_call => { name => 'old', arguments => '{}' } };
			push @messages, { role => 'function', name => 'old', content => text() } if rand() < 0.7;
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
			my @ids = map { pick("c$_", 'call_0', "c$_", "c$_") } 1 .. 1 + int rand 3;
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

# Returns what is wrong with the content of a message.
sub content_problem
{
	my ($m, $nullable) = @_;
	my $c = $m->{content};

	return $nullable ? undef : 'no content' unless defined $c;
	return unless ref $c;
	return 'bad parts' if ref $c ne 'ARRAY' || !@$c;
	return (grep { !$_->{type} } @$c) ? 'part without type' : undef;
}

# Returns what is wrong with the calls of an answer and their results.
sub calls_problem
{
	my ($m, $next) = @_;
	my $calls = $m->{tool_calls};
	my %open;

	return 'empty tool_calls' unless ref $calls eq 'ARRAY' && @$calls;
	foreach my $call (@$calls)
	{
		return 'call without id' unless length($call->{id} // '');
		return 'call without name' unless length($call->{function}{name} // '');
		return 'call without arguments' unless defined $call->{function}{arguments} && !ref $call->{function}{arguments};
		return 'call without type' unless ($call->{type} // '') eq 'function';
		return 'the same id twice' if $open{ $call->{id} }++;
	}
	while (@$next && $next->[0]{role} eq 'tool')
	{
		my $result = shift @$next;
		return 'result of no call' unless delete $open{ $result->{tool_call_id} // '' };
		my $problem = content_problem($result);
		return "result: $problem" if $problem;
	}
	return %open ? 'call without result' : undef;
}

# Returns what the API would refuse a request for, undef if nothing.
sub problem
{
	my ($body) = @_;
	my @rest = @{ $body->{messages} };
	my %known = map { $_ => 1 } qw(role content name tool_calls tool_call_id function_call refusal reasoning_details);

	return 'no messages' unless @rest;
	while (my $m = shift @rest)
	{
		my $role = $m->{role} // '';
		my ($strange) = grep { !$known{$_} } keys %$m;
		my $problem;

		return "member $strange" if $strange;
		return "role $role" unless $role =~ /^(system|developer|user|assistant|tool|function)$/;
		return 'result without a call' if $role eq 'tool';
		return 'function without name' if $role eq 'function' && !length($m->{name} // '');
		return 'calls of a role that has none' if $m->{tool_calls} && $role ne 'assistant';
		my $acts = $m->{tool_calls} || $m->{function_call} || defined $m->{refusal};
		$problem = content_problem($m, $role eq 'assistant' && $acts || $role eq 'function');
		return "$role: $problem" if $problem;
		$problem = calls_problem($m, \@rest) if exists $m->{tool_calls};
		return $problem if $problem;
	}
	return;
}

# the validator itself
is(problem({ messages => [ { role => 'user', content => 'x' } ] }), undef, 'the validator lets what is valid pass');
is(problem({ messages => [ { role => 'tool', tool_call_id => 'x', content => '' } ] }), 'result without a call', 'and finds what is not');

my @tasks;
my %history;
foreach my $i (1 .. $histories)
{
	my @messages = history();
	my $id = create_session($node, server => $servers[ $i % @servers ])->{id};

	$node->safe_psql('postgres', "SELECT FROM chat.add_chat_messages_batch('$id', " . literal(encode(\@messages)) . ')')
	  if @messages;
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
