# ChatTest::Tools: turns that call tools, and what must be true of all of them
#
#	my $node = tool_cluster($fake, $conf);	with role ann, who may use server "fake"
#						and the service "services" (the bundled endpoint's /tools)
#	register($node, 'ann', function => 'app.f');	undef instead of a role: shared
#	as_role($node, 'ann', $sql);			runs it as the role; its output
#	my ($session, $task) = start($node, 'go [[tool=f]]', %session);	of ann
#	wait_for_calls($node, $task, $status, $n);	operations of n calls that wait
#	calls($node, $task);		rows of chat_tool_call in order
#	turns_of($node, @tasks);	what turn_of() returns of tasks that have ended,
#						with their calls, by one query
#	of_type($turn, $type);		its events of a type
#	outputs($turn);				results that listeners saw, preliminary ones not
#	sound($turn, $node, 'what');	assertion: events, rows and snapshot fit
#	sound_requests($fake, 'what');	assertion: the API would take all requests
#	value($text)				percent-encoded, for a directive

package ChatTest::Tools;

use strict;
use warnings;

use Exporter 'import';
use Test::More;

use ChatTest;
use ChatTest::Api;

our @EXPORT = qw(
  tool_cluster register as_role start wait_for_calls calls turns_of of_type
  outputs
  sound sound_requests faults value
);

# Returns text as a value of a directive of the fake endpoint.
sub value
{
	my ($text) = @_;
	utf8::encode($text);
	$text =~ s/([^\w.,:"{}-])/sprintf '%%%02X', ord $1/ge;
	return $text;
}

# Makes and starts the cluster.
sub tool_cluster
{
	my ($fake, $conf) = @_;
	my $node = chat_cluster('main', conf => $conf // '');
	my $port = $fake->port;

	create_server($node, $fake, retries => 0);
	$node->safe_psql('postgres', <<"EOS");
CREATE SERVER services FOREIGN DATA WRAPPER chat_tool
	OPTIONS (url 'http://127.0.0.1:$port/tools');
CREATE ROLE ann LOGIN;
CREATE ROLE bob LOGIN;
SELECT chat.grant_usage('ann'), chat.grant_usage('bob');
GRANT USAGE ON FOREIGN SERVER fake, services TO ann, bob;
CREATE SCHEMA app;
GRANT USAGE ON SCHEMA app TO ann, bob;
EOS
	return $node;
}

# Registers a tool as a role; options are the arguments.
sub register
{
	my ($node, $role, %args) = @_;
	my $list = join ', ',
	  map { "$_ => " . literal($args{$_}) } sort keys %args;

	$node->safe_psql('postgres',
		$role ? "SET ROLE $role; SELECT chat.register_tool($list)"
		: "SELECT chat.register_tool($list, shared => true)");
	return;
}

# Runs a statement as a role.
sub as_role
{
	my ($node, $role, $sql) = @_;
	return $node->safe_psql('postgres', "SET ROLE $role; $sql");
}

# Starts a turn in a new session; returns session and task.
sub start
{
	my ($node, $message, %session) = @_;
	my $session = create_session($node, owner => 'ann', %session);

	return ($session->{id}, ask($node, $session->{id}, $message));
}

# Waits until so many calls of a task have a status and their task is at rest;
# returns the operations of all its calls.
sub wait_for_calls
{
	my ($node, $task, $status, $n) = @_;

	wait_for($node, <<"EOS");
SELECT count(*) = $n FROM chat.chat_tool_call AS c
	JOIN chat.chat_job AS j ON j.session_id = c.session_id
		AND j.task_id = c.task_id AND j.kind = 'completion'
WHERE c.task_id = '$task' AND c.status = '$status'
	AND j.parked AND j.holder IS NULL AND j.run_at > now()
EOS
	return map { $_->{operation_id} } calls($node, $task);
}

# What is read of a call, as c and its message m.
my $call_columns =
  "c.*, m.content AS shown, m.metadata ? 'pending' AS pending";
my $call_tables = <<'EOS';
chat.chat_tool_call AS c
	LEFT JOIN chat.chat_message AS m ON m.session_id = c.session_id
		AND m.sequence = c.sequence
EOS

# Returns a task's calls.
sub calls
{
	my ($node, $task) = @_;
	return rows($node, <<"EOS");
SELECT $call_columns FROM $call_tables
WHERE c.task_id = '$task' ORDER BY c.step, c.position
EOS
}

# Returns the turns of tasks that have ended.
sub turns_of
{
	my ($node, @tasks) = @_;
	my $list = join ', ', map { literal($_) } @tasks;

	return rows($node, <<"EOS");
SELECT t.*, t.id AS task, t.session_id AS session,
	chat.task_snapshot(t.id) AS snapshot,
	(SELECT count(*) FROM chat.chat_job AS j WHERE j.task_id = t.id) AS jobs,
	(SELECT json_agg(m ORDER BY m.sequence) FROM chat.chat_message AS m
	WHERE m.session_id = t.session_id AND m.task_id = t.id) AS messages,
	(SELECT json_agg(e.payload ORDER BY e.seq) FROM chat.chat_event AS e
	WHERE e.task_id = t.id) AS events,
	(SELECT coalesce(json_agg(d ORDER BY d.step, d.position), '[]') FROM
		(SELECT $call_columns FROM $call_tables
		WHERE c.task_id = t.id) AS d) AS calls
FROM chat.chat_task AS t WHERE t.id IN ($list)
EOS
}

# Returns the events of a type.
sub of_type
{
	my ($turn, $type) = @_;
	return grep { $_->{type} eq $type } @{ $turn->{events} };
}

# Returns the outputs that listeners saw, without what was preliminary.
sub outputs
{
	my ($turn) = @_;
	return map { $_->{output} }
	  grep { !$_->{preliminary} } of_type($turn, 'tool-output-available');
}

# Which event of a call may follow which; "end" is its result.
my %follows = (
	'tool-input-start' => { '' => 1 },
	'tool-input-delta' => { map { $_ => 1 } qw(tool-input-start tool-input-delta) },
	'tool-input-available' =>
	  { map { $_ => 1 } '', qw(tool-input-start tool-input-delta) },
	'tool-input-error' =>
	  { map { $_ => 1 } qw(tool-input-start tool-input-delta tool-input-available) },
	'tool-approval-request' => { 'tool-input-available' => 1 },
	'preliminary' => {
		map { $_ => 1 } qw(tool-input-available tool-approval-request preliminary)
	},
	'end' => {
		map { $_ => 1 } qw(tool-input-available tool-approval-request preliminary)
	});

# Follows the events of a stream as a client does; returns what is wrong.
sub event_faults
{
	my (@events) = @_;
	my ($open, $seq, %state, @faults) = (0, 0);

	foreach my $e (@events)
	{
		my $type = $e->{type};

		# by one, except where a run begins
		push @faults, "seq $e->{seq} after $seq"
		  unless $e->{seq} == $seq + 1
		  || $e->{seq} > $seq && $e->{seq} % 2**32 == 1;
		$seq = $e->{seq};
		if ($type =~ /^(start-step|reset-step|finish-step)$/)
		{
			push @faults, "$type in the wrong place" if $open == ($type eq 'start-step');
			push @faults, map { "$type, but $_ stands at $state{$_}" }
			  grep { $state{$_} !~ /^(end|tool-input-error)$/ } sort keys %state
			  if $type eq 'finish-step';
			$open = $type ne 'finish-step';
			%state = ();
			next;
		}
		next unless $type =~ /^tool-/;
		my $id = $e->{toolCallId};
		my $now = $type =~ /^tool-output-/
		  ? $e->{preliminary} ? 'preliminary' : 'end'
		  : $type;
		push @faults, "$id: $now after \"" . ($state{$id} // '') . '"'
		  unless $follows{$now}{ $state{$id} // '' };
		push @faults, "$id: $now outside of a step" unless $open;
		$state{$id} = $now;
	}
	push @faults, "the first event is $events[0]{type}"
	  if $events[0]{type} ne 'start';
	push @faults, "the last event is $events[-1]{type}"
	  if $events[-1]{type} !~ /^(finish|abort)$/;
	push @faults, 'more than one end'
	  if 1 != grep { $_->{type} =~ /^(finish|abort)$/ } @events;
	return @faults;
}

# Compares messages with calls; returns what is wrong.
sub message_faults
{
	my ($messages, @calls) = @_;
	my (@faults, @want);

	foreach my $m (@$messages)
	{
		if ($m->{role} eq 'tool')
		{
			my $id = shift @want // 'none';
			push @faults, "a result of $m->{tool_call_id} instead of $id"
			  if $id ne $m->{tool_call_id};
			push @faults, "$id is still pending" if $m->{metadata}{pending};
		}
		push @want, map { $_->{id} } @{ $m->{tool_calls} // [] };
	}
	push @faults, "$_ has no message" foreach @want;
	foreach my $c (@calls)
	{
		push @faults, "$c->{call_id} has not ended ($c->{status})"
		  unless $c->{ended_at} && defined $c->{result};
		push @faults, "$c->{call_id} was not delivered" unless $c->{delivered};
	}
	return @faults;
}

# Returns what is wrong with a turn that has ended.
sub faults
{
	my ($turn, $node) = @_;
	($turn) = turns_of($node, $turn->{task}) unless $turn->{calls};
	my @calls = @{ $turn->{calls} };
	my @faults = (event_faults(@{ $turn->{events} }),
		message_faults($turn->{messages}, @calls));
	my %shown = map { $_->{toolCallId} => $_->{state} }
	  grep { $_->{toolCallId} } @{ $turn->{snapshot}{message}{parts} };
	my %want = (
		completed => 'output-available',
		denied => 'output-denied',
		failed => 'output-error',
		cancelled => 'output-error');

	push @faults, "$turn->{jobs} jobs are left" if $turn->{jobs};
	foreach my $c (@calls)
	{
		my $state = $shown{ $c->{call_id} } // 'none';
		push @faults, "the snapshot has $c->{call_id} as $state"
		  if $state ne $want{ $c->{status} };
	}
	return @faults;
}

# Asserts that a turn that has ended is as it must be.
sub sound
{
	my ($turn, $node, $what) = @_;
	my @faults = faults($turn, $node);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is_deeply(\@faults, [], "$what: events, rows and snapshot fit")
	  or diag(join "\n", map { encode($_) } @{ $turn->{events} });
	return;
}

# Asserts that the API would take all requests that were made.
sub sound_requests
{
	my ($fake, $what) = @_;
	my @faults;

	foreach my $request ($fake->completions)
	{
		my ($role, @want) = ('');
		my $problem = problem($request->{body});

		push @faults, $problem if $problem;
		foreach my $m (@{ $request->{body}{messages} })
		{
			$role = $m->{role};
			if ($role eq 'tool')
			{
				my $id = shift @want // 'none';
				push @faults, "a result of $m->{tool_call_id} instead of $id"
				  if $id ne $m->{tool_call_id};
				next;
			}
			push @faults, "no result of @want" if @want;
			@want = map { $_->{id} } @{ $m->{tool_calls} // [] };
		}
		push @faults, "no result of @want" if @want;
		push @faults, 'it ends with an assistant message' if $role eq 'assistant';
	}
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is_deeply(\@faults, [], "$what: the API would take every request");
	return;
}

1;
