# ChatTest::Api: what the chat completions API refuses
#
#	my $why = problem($body);	why it would refuse a request, undef: it would not
#
# Its rules about messages, as OpenAI's endpoint applies them.

package ChatTest::Api;

use strict;
use warnings;

use Exporter 'import';

our @EXPORT = qw(problem);

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
		return 'id of a call too long' if length $call->{id} > 40;
		return 'name of a call' unless ($call->{function}{name} // '') =~ /^[a-zA-Z0-9_-]{1,64}\z/;
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
		return 'name of a function' if $role eq 'function' && ($m->{name} // '') !~ /^[a-zA-Z0-9_-]{1,64}\z/;
		return 'name of a function' if $m->{function_call} && ($m->{function_call}{name} // '') !~ /^[a-zA-Z0-9_-]{1,64}\z/;
		return 'name' if exists $m->{name} && $m->{name} !~ m{^[^\s<|\\/>]{1,64}\z};
		return 'calls of a role that has none' if $m->{tool_calls} && $role ne 'assistant';
		my $acts = $m->{tool_calls} || $m->{function_call} || defined $m->{refusal};
		$problem = content_problem($m, $role eq 'assistant' && $acts || $role eq 'function');
		return "$role: $problem" if $problem;
		$problem = calls_problem($m, \@rest) if exists $m->{tool_calls};
		return $problem if $problem;
	}
	return;
}

1;
