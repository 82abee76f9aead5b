# P4 with tools: whatever is killed at whatever moment, does every task end
# once, does every call have one result, and has what must happen once
# happened once?
#
# CHAOS_RUNS (40) runs, each with one end of something; CHAOS_SEED repeats one
# (as far as the moments do).  The only waiting for a time here is the one for
# the moment of the kill: it is what is random.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use ChatTest::Tools;
use Test::More;
use Time::HiRes ();

my $runs = $ENV{CHAOS_RUNS} || 40;
my $seed = $ENV{CHAOS_SEED} || int rand 2**31;
my $sessions = 4;
my @killed = (0) x 5;
my %seen;

diag("seed $seed, $runs runs");
srand $seed;

my $fake = start_fake();
my $node = tool_cluster($fake,
	"restart_after_crash = on\nchat.tool_workers = 3\nchat.retry_base_delay = 10ms\nchat.max_retries = 10");
$node->safe_psql('postgres', <<'EOS');
ALTER SERVER fake OPTIONS (SET retries '10');
CREATE TABLE app.effect (operation uuid, what text);
GRANT ALL ON app.effect TO ann;
CREATE FUNCTION app.effect(ms integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_sleep(ms / 2000.0);
	INSERT INTO app.effect SELECT operation_id, 'effect' FROM chat.current_tool_call();
	PERFORM chat.report_progress(to_jsonb(ms));
	PERFORM pg_sleep(ms / 2000.0);
	RETURN 'done';
END $$;
CREATE FUNCTION app.elsewhere(ms integer) RETURNS json LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO app.effect SELECT operation_id, 'elsewhere' FROM chat.current_tool_call();
	RETURN '{"status": "accepted"}';
END $$;
EOS
register($node, 'ann', function => 'app.effect');
register($node, 'ann', function => 'app.effect', name => 'long', long_running => 'on');
register($node, 'ann', function => 'app.elsewhere');
register($node, 'ann', kind => 'http', name => 'once', server => 'services', path => '/once');
register($node, 'ann', kind => 'http', name => 'again', server => 'services', path => '/again', idempotent => 'on');
register($node, 'ann', kind => 'client', name => 'ask_user');

# Returns a random call, as directives.
sub random_call
{
	my ($id) = @_;
	my $ms = int rand 40;
	# operations differ, or they would be one
	my %calls = (
		effect => { ms => $ms }, long => { ms => $ms + 100 * $id }, elsewhere => { ms => $id },
		once => { command => "delay=$ms" }, again => { command => "delay=$ms" },
		ask_user => {}, nothing => {});
	my $name = (sort keys %calls)[ rand keys %calls ];

	return "tool=$name id=c$id args=" . value(encode($calls{$name}));
}

# Returns a message that makes for some random steps.
sub random_message
{
	my $n = 0;
	my $steps = 1 + int rand 3;
	my $message = '';

	foreach my $step (0 .. $steps - 1)
	{
		$message .= "[[at=$step tokens=3 delay=2 "
		  . join(' ', map { random_call(++$n) } 0 .. rand 4) . ']] ';
	}
	return "$message [[at=$steps tokens=5 delay=2]]";
}

# Does away with something; returns what.
sub kill_something
{
	my $which = int rand 5;
	my %found = processes($node);
	my ($worker) = grep { $found{$_} =~ /chat worker/ } keys %found;
	my ($tool) = grep { $found{$_} =~ /chat tool worker/ } keys %found;

	# not there at this moment: the other one
	$which = 0 if $which == 1 && !$tool;
	$which = 2 if $which == 3 && !$tool;
	$which = 4 if $which != 1 && !$worker;
	$killed[$which]++;
	if ($which < 2)
	{
		my $pid = $which == 0 ? $worker : $tool;
		kill 'KILL', $pid;
		wait_gone($pid);
	}
	elsif ($which < 4)
	{
		kill 'TERM', $which == 2 ? $worker : $tool;
	}
	else
	{
		rand 2 < 1 ? kill_server($node) : kill_everything($node);
		$node->start;
	}
	return ('kill -9 of the worker', 'kill -9 of a tool worker', 'end of the worker',
		'end of a tool worker', 'kill -9 of the postmaster')[$which];
}

# Ends what waits for us, until all tasks have ended.
sub serve
{
	my $statement = <<'EOS';
SELECT chat.complete_operation(operation_id, '"ended elsewhere"') FROM chat.chat_tool_call
WHERE status = 'waiting' AND ended_at IS NULL;
SELECT count(*) = 0 FROM chat.chat_task WHERE status NOT IN ('completed', 'failed', 'cancelled');
EOS

	wait_until(
		'all tasks to end',
		sub {
			my ($rc, $out) = $node->psql('postgres', $statement);
			return $rc == 0 && $out =~ /^t$/m;
		});
	return;
}

# Returns what is wrong with a task's calls: how often what happened.
sub effect_faults
{
	my ($turn, $effects, $requests) = @_;
	my @faults;

	foreach my $c (@{ $turn->{calls} })
	{
		my $what = "$c->{name} $c->{status}";
		my $n = $effects->{ $c->{operation_id} } // 0;
		my $asked = $requests->{ $c->{operation_id} } // 0;
		my $error = $c->{status} eq 'failed' ? (eval { decode($c->{result})->{code} } // '?') : '';

		$seen{"$what $error"}++;
		if ($c->{name} =~ /^(effect|long|elsewhere)$/)
		{
			push @faults, "$what $error, with $n effects" unless $c->{status} eq 'completed' && $n == 1;
		}
		elsif ($c->{name} eq 'once')
		{
			push @faults, "$what $error, asked $asked times"
			  unless $c->{status} eq 'completed' && $asked == 1 || $error eq 'tool_unknown_outcome' && $asked <= 1;
		}
		elsif ($c->{name} eq 'again')
		{
			push @faults, "$what $error, asked $asked times" unless $c->{status} eq 'completed' && $asked >= 1;
		}
		else
		{
			push @faults, $what if $c->{status} ne ($c->{name} eq 'nothing' ? 'failed' : 'completed');
		}
	}
	return @faults;
}

foreach my $run (1 .. $runs)
{
	my @messages = map { random_message() } 1 .. $sessions;
	my $delay = rand 0.25;
	my $list = join ', ', map { '(' . literal($_) . ')' } @messages;

	$fake->forget;
	my @tasks = split /\n/, $node->safe_psql('postgres', <<"EOS");
TRUNCATE app.effect;
SELECT chat.stream_chat_completion((chat.create_chat_session(owner => 'ann')).id, m)
FROM (VALUES $list) AS v (m)
EOS
	Time::HiRes::sleep($delay);
	my $what = sprintf 'run %d, %s after %.0f ms', $run, kill_something(), 1000 * $delay;
	serve();
	my %effects = map { $_->{operation} => $_->{n} }
	  rows($node, 'SELECT operation, count(*) AS n FROM app.effect GROUP BY operation');
	my %requests;
	$requests{ $_->{headers}{'idempotency-key'} }++ foreach grep { $_->{path} =~ m{^/tools} } $fake->requests;
	my @faults;
	foreach my $turn (turns_of($node, @tasks))
	{
		push @faults, map { "$turn->{task}: $_" }
		  $turn->{status} eq 'completed' ? () : "it has $turn->{status}: " . encode($turn->{error}),
		  faults($turn), effect_faults($turn, \%effects, \%requests);
	}
	is_deeply(\@faults, [], $what) or diag(join "\n", @messages);
	# whatever was cut off where
	sound_requests($fake, "run $run");
}
note(join ', ', map { "$_: $seen{$_}" } sort keys %seen);
note("ends: @killed");

$node->stop;
done_testing();
