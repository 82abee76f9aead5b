# What does a clock that is set back do to turns?  Retries, deadlines and
# waits come when they should, each turn ends once, and ten others come
# through.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Bystander;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

my $clock = PostgreSQL::Test::Utils::tempdir() . '/clock';

# Sets the clock of the server that many seconds off.
sub set_clock
{
	my ($offset) = @_;
	open my $out, '+>>', $clock or die "$clock: $!\n";
	close $out;
	open $out, '+<', $clock or die "$clock: $!\n";
	syswrite $out, sprintf "%-32d", $offset;
	close $out;
	return;
}

set_clock(0);
my $fake = start_fake();
my $node = chat_cluster('main', start => 0,
	conf => "chat.retry_base_delay = 2s");
{
	local $ENV{LD_PRELOAD} = build_file('clock.so');
	local $ENV{CHAT_TEST_CLOCK} = $clock;
	$node->start;
}
$node->safe_psql('postgres', 'CREATE EXTENSION chat;'
	  . "SELECT chat.register_tool(kind => 'client', name => 'ask_user',"
	  . " timeout => '3 s')");
create_server($node, $fake);

# Asserts that a turn has ended as it should.
sub ended
{
	my ($what, $task, $roles) = @_;
	my $row = wait_for_task($node, $task);

	is_deeply([ @$row{qw(status error)} ],
		[ 'completed', undef ], "$what: the turn completes");
	one_end($node, $task, $what);
	is(messages($node, $task), $roles, "$what: its messages");
	return;
}

# Runs turns while the clock is set.
sub survive
{
	my ($what, $offset, $later) = @_;
	my $by = ChatTest::Bystander->new($node, $fake);
	my $open = ask($node, create_session($node)->{id},
		'open [[tokens=6 gateat=3:v]]');
	$fake->wait_at_gate('v');
	my $retry = ask($node, create_session($node)->{id},
		"again [[status=503 times=1 tokens=3 key=k$offset]]");
	my $call = ask($node, create_session($node)->{id},
		'call [[tool=ask_user args={} thentext=done]]');
	wait_for($node, "SELECT EXISTS (SELECT FROM chat.chat_job WHERE task_id ="
		  . " '$retry' AND holder IS NULL AND run_at > now())");
	wait_for($node, "SELECT status = 'waiting' FROM chat.chat_tool_call"
		  . " WHERE task_id = '$call'");
	my $reader = session($node);
	my $seq = row($node, "SELECT max(seq) AS n FROM chat.chat_event"
		  . " WHERE task_id = '$open'")->{n};
	my $pid = $reader->query_safe('SELECT pg_backend_pid()');
	$reader->{stdin} .= "SELECT count(*) FROM"
	  . " chat.wait_task_events('$open', $seq, '3 s');\n\\echo woke\n";
	$reader->{run}->pump_nb;
	wait_for($node, "SELECT wait_event_type IN ('IPC', 'Extension')"
		  . " FROM pg_stat_activity WHERE pid = $pid");
	my $before = row($node, 'SELECT now() AS t')->{t};
	set_clock($offset);
	wait_for($node, "SELECT $later");
	ended("$what, a retry", $retry, 'user assistant');
	ended("$what, a deadline", $call, 'user assistant tool assistant');
	$reader->query_until(qr/woke/, '');
	$reader->quit;
	pass("$what: who waits for events comes back");
	my $next = ask($node, create_session($node)->{id}, 'next [[tokens=1]]');
	ended("$what, a new turn", $next, 'user assistant');
	$fake->open_gate('v');
	ended("$what, an open stream", $open, 'user assistant');
	is(text_of(stored_events($node, $open)), 't0 t1 t2 t3 t4 t5 ',
		"$what: its events add up to the answer");
	$by->check($what, undisturbed => 1);
	return;
}

my $start = row($node, 'SELECT now() AS t')->{t};
survive('clock set back by an hour', -3600,
	"now() < '$start'::timestamptz - interval '30 min'");
survive('clock set forward by a day', 82800,
	"now() > '$start'::timestamptz + interval '20 h'");
survive('clock set back by a day', 0,
	"now() < '$start'::timestamptz + interval '20 h'");
like(slurp_file($node->logfile), qr/the clock was set back by 3[0-9]{6} ms/,
	'the log tells of it');

done_testing();
