#!/usr/bin/perl
#
# chaos: does anything that can happen to a server lose, double or hang a turn?
#
#	perl test/chaos.pl [--seconds N] [--seed N]		(by test/run chaos)
#
# Random turns (tools and long operations among them) over random faults of
# the fake endpoint, with cancels, listeners that come and go, and ends of the
# worker, of tool workers, of backends and of the whole server.  The time is
# spent in rounds; after each of them everything has to end, and then the
# promises P1 to P4 are checked over all that the round has left: tables,
# events, and what listeners were told.  The counts are printed at the end.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/t/lib";

BEGIN
{
	$ENV{CHAT_BUILD} //= "$FindBin::RealBin/../build";
}

use ChatTest;
use ChatTest::Crash;
use Digest::MD5 qw(md5);
use Encode qw(encode_utf8);
use Getopt::Long;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

use constant RUN => 2**32;

my $seconds = $ENV{CHAOS_SECONDS} || 20;
my $seed = $ENV{CHAOS_SEED} || int(time() * 1000) % 1_000_000_007;
GetOptions('seconds=i' => \$seconds, 'seed=i' => \$seed)
  or die "usage: chaos.pl [--seconds N] [--seed N]\n";

use constant ROUND => 15;    # seconds of turmoil before each check
use constant SESSIONS => 25;    # of a round
use constant SETTLE => 60;    # seconds without any progress: a turn is stuck
use constant OPEN => 60;    # turns that may be unfinished
use constant LISTENERS => 3;

my %count = map { $_ => 0 } qw(rounds turns rolled_back completed failed
  cancelled steps resets tool_calls operations events notified
  notified_and_lost reconnects);
my %faults;
my %violations = map { $_ => [] } qw(P1 P2 P3 P4);
my ($fake, $node, @sessions, @listeners, %told, $cancels);
my $key = 0;

# ---------------------------------------------------------------- the stage

# Starts the cluster, the endpoint and the tools.
sub set_up
{
	my $workers = any(1, 1, 2);

	$fake = start_fake();
	$node = chat_cluster('chaos', conf => <<"EOS");
chat.workers = $workers
restart_after_crash = on
wal_writer_delay = 2s
chat.retry_base_delay = 20ms
chat.retry_max_delay = 200ms
chat.idle_timeout = 2s
chat.first_token_timeout = 2s
chat.tool_timeout = 5s
chat.operation_timeout = 20s
chat.max_crashes = 1000
log_min_messages = warning
EOS
	create_server($node, $fake);
	my $port = $fake->port;
	$node->safe_psql('postgres', <<"EOS");
CREATE SERVER services FOREIGN DATA WRAPPER chat_tool
	OPTIONS (url 'http://127.0.0.1:$port/tools');
CREATE ROLE app LOGIN;
SELECT chat.grant_usage('app');
GRANT USAGE ON FOREIGN SERVER fake, services TO app;
CREATE SCHEMA app;
CREATE TABLE app.calls (task uuid, sure boolean, answer text);
GRANT ALL ON SCHEMA app TO app;
CREATE FUNCTION app.twice(n int) RETURNS int LANGUAGE sql RETURN n * 2;
CREATE FUNCTION app.doze(ms int) RETURNS text LANGUAGE sql
	AS \$\$ SELECT pg_sleep(ms / 1000.0)::text || 'rested' \$\$;
CREATE FUNCTION app.fail() RETURNS text LANGUAGE plpgsql
	AS \$\$ BEGIN RAISE EXCEPTION 'never'; END \$\$;
SET ROLE app;
SELECT chat.register_tool('app.twice', read_only => true);
SELECT chat.register_tool('app.doze', idempotent => true);
SELECT chat.register_tool('app.fail');
SELECT chat.register_tool(kind => 'client', name => 'ask_user');
SELECT chat.register_tool(kind => 'http', name => 'fetch', server => 'services',
	path => '/fetch', parameters => '{"type": "object"}');
SELECT chat.register_tool(kind => 'http', name => 'job', server => 'services',
	path => '/job', long_running => true, parameters => '{"type": "object"}');
EOS
	return;
}

# Returns one of its arguments.
sub any
{
	return $_[ rand @_ ];
}

# Runs SQL that a crash may interrupt; returns whether all of it was done, and
# the output.
sub try_sql
{
	my ($sql) = @_;
	my ($rc, $out) =
	  $node->psql('postgres', $sql, on_error_stop => 0, timeout => 60);
	return ($rc == 0, $out // '');
}

# Waits until the server takes connections.
sub wait_until_up
{
	wait_until('the server', sub { (try_sql('SELECT 1'))[0] });
	return;
}

# ---------------------------------------------------------------- the turns

# Returns a random turn: message, whether it has to complete, and its answer
# where that is known.
sub random_turn
{
	my $n = 1 + int rand 40;
	my $text = join '', map { "t$_ " } 0 .. $n - 1;
	my $pace = any('', '', 'delay=' . int rand 30, 'split=' . (1 + int rand 9));
	my $once = 'times=1 key=k' . ++$key;
	my $cut = int rand $n;
	my $plain = "tokens=$n $pace";
	my $dice = rand;

	return ($plain, 1, $text) if $dice < 0.35;
	return (
		$plain . ' '
		  . any("status=503 $once", "status=429 retry_after=0 $once",
			"status=500 $once", "reset=1 $once", "reset=2 $once"),
		1, $text) if $dice < 0.5;
	return (
		$plain . ' '
		  . any("cutafter=$cut $once rst=1", "cutafter=$cut $once",
			"garbage=$cut $once", "error_at=$cut $once", "stall=$cut $once",
			"hang=1 $once", "status=400", "status=401", "cutafter=$cut",
			'nodone=1', 'nofinish=1', 'hugeline=100000'),
		0, undef) if $dice < 0.65;
	return ("reasoning=3 " . any('plain=1', 'eol=cr', 'bom=1', 'comments=1')
		  . " $plain", 1, $text) if $dice < 0.72;
	return ("repeat=$n text=" . any('%C3%A4%22%5C%E2%82%AC', 'ha%20'), 1, undef)
	  if $dice < 0.76;
	my $tools = join ' ', map {
		any('tool=twice args={"n":21}', 'tool=doze args={"ms":150}',
			'tool=doze args={"ms":5}', 'tool=fail args={}',
			'tool=nothing args={}', 'tool=twice args={"n":',
			'tool=fetch args={"command":"text=hi"}',
			'tool=job args={}', 'tool=ask_user args={}')
	} 1 .. 1 + int rand 3;
	# behind an operation other turns may pass, and the endpoint obeys theirs
	return (any('', 'tokens=4 ') . "$tools steps=" . (1 + int rand 3)
		  . " thentokens=$n", $tools !~ /tool=job/, undef);
}

# Returns the SQL that starts turns, each in a transaction of its own with the
# note that it was called.
sub start_sql
{
	my ($n) = @_;
	my $sql = '';

	foreach (1 .. $n)
	{
		my ($directives, $sure, $answer) = random_turn();
		my $session = any(@sessions);
		my $insert =
		    'INSERT INTO app.calls SELECT chat.stream_chat_completion('
		  . "'$session', " . literal("go [[$directives]]") . '), '
		  . ($sure ? 'true' : 'false') . ', ' . literal($answer) . ';';
		if (rand() < 0.05)
		{
			$insert =~ s/go \[\[/never [[/;
			$insert = "BEGIN; $insert ROLLBACK;";
			$count{rolled_back}++;
		}
		$sql .= "$insert\n";
	}
	return $sql;
}

# Returns the SQL that ends some of the operations that wait, some twice.
sub operations_sql
{
	my ($share) = @_;
	my $twice = rand() < 0.2 ? 2 : 1;
	return <<"EOS" x $twice;
SELECT chat.complete_operation(operation_id, '{"done": true}', n % 4 > 0,
	CASE WHEN n % 4 = 0 THEN 'went wrong' END)
FROM (SELECT operation_id, (random() * 1000)::int AS n
	FROM chat.chat_tool_call WHERE status = 'waiting' AND kind = 'http'
	AND random() < $share) AS c;
SELECT chat.submit_tool_output(session_id, call_id, '"yes"')
FROM chat.chat_tool_call WHERE status = 'waiting' AND kind = 'client'
	AND random() < $share;
EOS
}

# ---------------------------------------------------------------- listeners

# Notes what a listener was told.
sub hear
{
	my ($line) = @_;
	my (undef, $payload) = split /\t/, $line, 2;
	my ($task, $seq) =
	  ($payload // '') =~ /"taskId":"([0-9a-f-]{36})","seq":(\d+)\}$/
	  or return;

	return if $payload =~ /^\{"taskId"/;    # a pointer
	$count{notified}++;
	$payload =~ s/\\([\\nr])/$1 eq '\\' ? '\\' : $1 eq 'n' ? "\n" : "\r"/ge;
	my $digest = md5(utf8::is_utf8($payload) ? encode_utf8($payload) : $payload);
	my $seen = \$told{$task}{$seq};
	violation('P3', "$task $seq was notified with two payloads")
	  if defined $$seen && $$seen ne $digest;
	$$seen = $digest;
	return;
}

# Reads what the listeners have; replaces those that have ended.
sub listen_all
{
	foreach my $i (0 .. LISTENERS - 1)
	{
		if ($listeners[$i])
		{
			my $go_on = eval {
				while (defined(my $line = $listeners[$i]->line(0)))
				{
					hear($line);
				}
				1;
			};
			next if $go_on && rand() > 0.01;
			$listeners[$i]->stop;
			$listeners[$i] = undef;
			$count{reconnects}++;
		}
		$listeners[$i] = eval { listener($node, 'chaos') };
	}
	return;
}

# ---------------------------------------------------------------- faults

# Kills one of the server's processes.
sub kill_like
{
	my ($signal, $like) = @_;
	my %found = processes($node);
	my ($pid) = grep { $found{$_} =~ $like } sort keys %found;

	return unless $pid;
	kill $signal, $pid;
	wait_gone($pid) if $signal ne 'INT';
	return 1;
}

my @faults = (
	[ 3, 'kill -9 worker', sub { kill_like('KILL', qr/chat worker/) } ],
	[ 2, 'terminate worker', sub { kill_like('TERM', qr/chat worker/) } ],
	[ 1, 'cancel worker', sub { kill_like('INT', qr/chat worker/) } ],
	[ 1, 'terminate launcher', sub { kill_like('TERM', qr/chat launcher/) } ],
	[ 2, 'kill -9 tool worker', sub { kill_like('KILL', qr/chat tool/) } ],
	[ 2, 'terminate tool worker', sub { kill_like('TERM', qr/chat tool/) } ],
	[ 1, 'kill -9 postmaster', sub { kill_server($node); $node->start; 1 } ],
	[ 2, 'kill -9 everything', sub { kill_everything($node); $node->start; 1 } ],
	[ 1, 'stop -m immediate', sub { $node->stop('immediate'); $node->start; 1 } ],
	[ 1, 'stop -m fast', sub { $node->restart; 1 } ],
	[ 1, 'reload', sub { $node->reload; 1 } ],
	[
		1, 'reindex',
		sub { (try_sql('REINDEX TABLE chat.chat_job'))[0] }
	],
	[
		1, 'locks',
		sub {
			(try_sql('BEGIN; LOCK chat.chat_session, chat.chat_message;'
				  . ' SELECT pg_sleep(0.5); COMMIT'))[0];
		}
	]);

# Does something bad.
sub do_harm
{
	my $total = 0;
	$total += $_->[0] foreach @faults;
	my $dice = rand $total;

	foreach my $fault (@faults)
	{
		$dice -= $fault->[0];
		next if $dice > 0;
		$faults{ $fault->[1] }++ if $fault->[2]->();
		last;
	}
	wait_until_up();
	return;
}

# ---------------------------------------------------------------- checks

# Notes that a promise was broken.
sub violation
{
	my ($promise, $what) = @_;
	push @{ $violations{$promise} }, $what;
	diag("$promise: $what") if @{ $violations{$promise} } <= 20;
	return;
}

# Waits until all turns have ended.
sub settle
{
	my ($until, $before) = (time() + SETTLE, '');

	for (;;)
	{
		listen_all();
		my (undef, $out) = try_sql(operations_sql(1) . <<'EOS');
SELECT 'left', count(*) FILTER (WHERE finished_at IS NULL)
	+ (SELECT count(*) FROM chat.chat_job WHERE kind = 'notice'), sum(steps),
	count(*), (SELECT count(*) FROM chat.chat_tool_call
		WHERE ended_at IS NOT NULL)
FROM chat.chat_task;
EOS
		my ($state) = $out =~ /^(left\|.*)$/m;
		return if ($state // '') =~ /^left\|0\|/;
		# however slow the machine is
		($until, $before) = (time() + SETTLE, $state)
		  if defined $state && $state ne $before;
		last if time() > $until;
		select undef, undef, undef, 0.1;
	}
	violation('P4', 'stuck: ' . encode($_)) foreach rows($node, <<'EOS');
SELECT j AS job, t AS task, (SELECT json_agg(c) FROM chat.chat_tool_call AS c
	WHERE c.task_id = t.id) AS calls
FROM chat.chat_job AS j FULL JOIN chat.chat_task AS t ON t.id = j.task_id
WHERE j.id IS NOT NULL OR t.status IN ('running', 'waiting') LIMIT 9
EOS
	# what hangs shall not spoil the rounds that follow
	try_sql('DELETE FROM app.calls WHERE task IN (SELECT t.id FROM'
		  . ' chat.chat_task AS t WHERE t.session_id IN (SELECT o.session_id'
		  . ' FROM chat.chat_task AS o WHERE o.finished_at IS NULL));'
		  . 'SELECT DISTINCT chat.delete_chat_session(session_id) FROM'
		  . ' chat.chat_task WHERE finished_at IS NULL');
	return;
}

# Looks at the numbers of a task's events, and at what listeners were told.
sub check_numbers
{
	my ($id, @rows) = @_;
	my ($last, %stored) = (0);

	foreach my $row (@rows)
	{
		my ($seq, $type) = @$row{qw(seq type)};
		$stored{$seq} = $row;
		$count{resets}++ if $type eq 'reset-step';
		violation('P3', "$id: $last is followed by $seq $type")
		  unless $seq == $last + 1
		  || $seq > $last && $seq % RUN == 1 && $type eq 'reset-step';
		$last = $seq;
	}
	foreach my $seq (keys %{ $told{$id} // {} })
	{
		my $row = $stored{$seq};
		$count{notified_and_lost}++ unless $row;
		violation('P3', "$id $seq: stored is not what was notified")
		  if $row && md5(encode_utf8($row->{raw})) ne $told{$id}{$seq};
	}
	my @ends = grep { $rows[$_]{type} =~ /^(finish|abort)$/ } 0 .. $#rows;
	violation('P2', "$id: " . scalar(@ends) . ' terminal events')
	  if @ends != 1 || $ends[0] != $#rows;
	return;
}

# Returns the texts of a stream's steps: what a client shows at the end.
sub fold
{
	my (@texts) = ('');

	foreach my $row (@_)
	{
		$texts[-1] .= decode($row->{raw})->{delta}
		  if $row->{type} eq 'text-delta';
		$texts[-1] = '' if $row->{type} eq 'reset-step';
		push @texts, '' if $row->{type} eq 'finish-step';
	}
	return grep { $_ ne '' } @texts;
}

# Looks at one task with its messages and calls.
sub check_task
{
	my ($task, @events) = @_;
	my ($id, $status) = @$task{qw(id status)};
	my @answers = @{ $task->{answers} // [] };
	my @texts = grep { $_ ne '' } map { $_->{content} // '' } @answers;

	$count{$status}++;
	$count{steps} += $task->{steps};
	$count{tool_calls} += $task->{calls};
	$count{operations} += $task->{operations};
	$count{events} += @events;
	check_numbers($id, @events);
	violation('P1', "$id: it was never called") unless $task->{called};
	violation('P2', "$id: $task->{jobs} jobs after its end") if $task->{jobs};
	violation('P4', "$id: $task->{questions} questions")
	  if $task->{questions} != ($task->{started} ? 1 : 0);
	violation('P4', "$id: $status after " . encode($task))
	  if $status eq 'failed' && $task->{sure};
	violation('P2', "$id: no events") if $task->{started} && !@events;
	violation('P4', "$id: steps $task->{steps}, " . @answers . ' messages')
	  if $status eq 'completed' && @answers != $task->{steps};
	violation('P4', "$id: $task->{calls} calls, $task->{results} results, "
		  . "$task->{asked} asked")
	  if $task->{calls} != $task->{results}
	  || $task->{asked} != $task->{results};
	my $folded = encode([ fold(@events) ]);
	violation('P4', "$id: $status, the stream is $folded, stored is "
		  . encode(\@texts))
	  if $folded ne encode(\@texts);
	violation('P4', "$id: \"$texts[-1]\" is not the answer")
	  if $status eq 'completed' && defined $task->{answer}
	  && ($texts[-1] // '') ne $task->{answer};
	return;
}

my $task_query = <<'EOS';
SELECT t.id, t.status, t.steps, t.error, c.sure, c.answer,
	(SELECT m.content FROM chat.chat_message AS m
		WHERE m.task_id = t.id AND m.role = 'user') AS message,
	c.task IS NOT NULL AS called, t.started_at IS NOT NULL AS started,
	(SELECT count(*) FROM chat.chat_job AS j WHERE j.task_id = t.id) AS jobs,
	(SELECT count(*) FROM chat.chat_message AS m
		WHERE m.task_id = t.id AND m.role = 'user') AS questions,
	(SELECT json_agg(json_build_object('content', m.content)
			ORDER BY m.sequence) FROM chat.chat_message AS m
		WHERE m.task_id = t.id AND m.role = 'assistant') AS answers,
	(SELECT coalesce(sum(jsonb_array_length(m.tool_calls)), 0)
		FROM chat.chat_message AS m WHERE m.task_id = t.id
			AND m.metadata->'interrupted' IS NULL) AS asked,
	(SELECT count(*) FROM chat.chat_message AS m
		WHERE m.task_id = t.id AND m.role = 'tool' AND m.content <> ''
			AND NOT m.metadata ? 'pending') AS results,
	(SELECT count(*) FROM chat.chat_tool_call AS k
		WHERE k.task_id = t.id) AS calls,
	(SELECT count(*) FROM chat.chat_tool_call AS k
		WHERE k.task_id = t.id AND k.kind IN ('http', 'client')) AS operations
FROM chat.chat_task AS t LEFT JOIN app.calls AS c ON c.task = t.id
WHERE t.session_id = ANY (%s)
EOS

# Looks at what cannot be seen task by task.
sub check_sessions
{
	my ($list) = @_;
	my @bad;

	violation('P1', 'a committed call has no task: ' . encode($_))
	  foreach rows($node, 'SELECT * FROM app.calls AS c WHERE NOT EXISTS'
		  . ' (SELECT FROM chat.chat_task AS t WHERE t.id = c.task)');
	violation('P4', 'session: ' . encode($_)) foreach rows($node, <<"EOS");
SELECT * FROM (SELECT s.id, s.next_sequence,
	(SELECT array_agg(m.sequence ORDER BY m.sequence) FROM chat.chat_message
		AS m WHERE m.session_id = s.id) AS sequences,
	s.total_prompt_tokens AS prompt, s.total_completion_tokens AS completion,
	(SELECT sum(t.prompt_tokens) FROM chat.chat_task AS t
		WHERE t.session_id = s.id) AS task_prompt,
	(SELECT sum(t.completion_tokens) FROM chat.chat_task AS t
		WHERE t.session_id = s.id) AS task_completion
	FROM chat.chat_session AS s WHERE s.id = ANY ($list)) AS s
WHERE sequences <> ARRAY(SELECT generate_series(1, next_sequence - 1))
	OR prompt <> task_prompt OR completion <> task_completion
EOS
	violation('P4', 'a result without its call: ' . encode($_))
	  foreach rows($node, <<"EOS");
SELECT m.session_id, m.sequence FROM chat.chat_message AS m
WHERE m.session_id = ANY ($list) AND m.role = 'tool' AND 1 <> (
	SELECT count(*) FROM chat.chat_tool_call AS c
	WHERE c.session_id = m.session_id AND c.sequence = m.sequence
		AND c.ended_at IS NOT NULL AND c.delivered)
EOS
	return;
}

# Checks all that a round has left.
sub check_round
{
	my $list = "'{" . join(',', @sessions) . "}'::uuid[]";
	my %events;

	# as text: what listeners were told has to be the same, byte for byte
	foreach my $row (rows($node, <<"EOS"))
SELECT e.task_id, e.seq, e.payload->>'type' AS type, e.payload::text AS raw
FROM chat.chat_event AS e JOIN chat.chat_task AS t ON t.id = e.task_id
WHERE t.session_id = ANY ($list) ORDER BY e.task_id, e.seq
EOS
	{
		push @{ $events{ $row->{task_id} } }, $row;
	}
	my @tasks = rows($node, sprintf $task_query, $list);
	check_task($_, @{ $events{ $_->{id} } // [] }) foreach @tasks;
	check_sessions($list);
	violation('P1', 'a turn was requested that was rolled back')
	  if grep { encode($_->{body} // '') =~ /never \[\[/ } $fake->requests;
	$count{turns} += @tasks;
	$count{rounds}++;
	return;
}

# ---------------------------------------------------------------- the play

# Makes the sessions of a round.
sub new_sessions
{
	@sessions = map { $_->{id} } rows($node,
		'SELECT c.id FROM generate_series(1, ' . SESSIONS . ') AS n,'
		  . " LATERAL chat.create_chat_session(title => n::text,"
		  . " owner => 'app', channel => 'chaos') AS c");
	%told = ();
	$fake->forget;
	return;
}

# One round: turmoil, rest, checks.
sub play
{
	my ($until) = @_;
	my $harm = time() + rand 3;

	new_sessions();
	while (time() < $until)
	{
		my (undef, $left) = try_sql('SELECT count(*) FROM chat.chat_task'
			  . ' WHERE finished_at IS NULL');
		my $sql = '';
		$sql .= start_sql(1 + int rand 12)
		  if $left =~ /^\d+$/ && $left < OPEN;
		$sql .= 'SELECT chat.cancel_task(id) FROM chat.chat_task'
		  . ' WHERE finished_at IS NULL ORDER BY random() LIMIT 2;'
		  if rand() < 0.1;
		$sql .= operations_sql(0.3);
		try_sql($sql);
		listen_all();
		next if time() < $harm;
		do_harm();
		$harm = time() + 0.2 + rand 3;
	}
	settle();
	check_round();
	return;
}

diag("chaos: $seconds s, seed $seed");
srand($seed);
set_up();
my $end = time() + $seconds;
while (time() < $end)
{
	my $left = $end - time();
	play(time() + ($left < 1.5 * ROUND ? $left : ROUND));
}
diag(join ', ', map { ($_ =~ tr/_/ /r) . " $count{$_}" } sort keys %count);
diag(join ', ', map { "$_: $faults{$_}" } sort keys %faults);
cmp_ok($count{turns}, '>', 0, "there were turns (seed $seed)");
my %names = (
	P1 => 'every committed call has its task, no other was requested',
	P2 => 'every task ended once',
	P3 => 'no number stood for two things',
	P4 => 'nothing was lost, doubled or stuck');
is(scalar @{ $violations{$_} }, 0, "$_: $names{$_}") foreach sort keys %names;

done_testing();
