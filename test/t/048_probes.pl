# Does a turn cost the same however many others run, and however many its
# session has had?  The planner has seen the queue empty, and may see it so
# again at any time: what it has made of the statements is read from the log of
# auto_explain.  What it knows of the tables is up to the test, not to when an
# autovacuum comes by.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

use constant MANY => 60;    # tasks that run, and tasks of one session
use constant FEW => 25;    # rows that a statement of one turn may look at

chomp(my $libraries = `$ENV{PG_CONFIG} --pkglibdir`);
plan skip_all => 'auto_explain is not installed'
  unless -e "$libraries/auto_explain.so";

my $fake = start_fake();
my $node = chat_cluster('main', conf => <<'EOC');
shared_preload_libraries = 'auto_explain,chat'
autovacuum = off
auto_explain.log_min_duration = 0
auto_explain.log_analyze = on
auto_explain.log_timing = off
auto_explain.log_nested_statements = on
chat.enable_superuser_tools = on
chat.tool_workers = 1
chat.first_token_timeout = 600s
chat.idle_timeout = 600s
EOC
create_server($node, $fake);
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION answer() RETURNS text LANGUAGE sql AS $$ SELECT '42' $$;
SELECT chat.register_tool('public.answer()');
CREATE FUNCTION hold() RETURNS text LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_advisory_xact_lock(1); RETURN 'held'; END $$;
SELECT chat.register_tool('public.hold()');
EOS
my $port = $fake->port;
$node->safe_psql('postgres', <<"EOS");
CREATE SERVER services FOREIGN DATA WRAPPER chat_tool
	OPTIONS (url 'http://127.0.0.1:$port/tools');
SELECT chat.register_tool(kind => 'http', name => 'remote', server => 'services', path => '/remote');
SELECT chat.register_tool(kind => 'client', name => 'asks');
EOS

# Returns the statements of a stretch of the log that looked at many rows of
# tasks or jobs, with the line of the plan that says so.
sub wide
{
	my ($text) = @_;
	my ($query, $relation, $rows, @found) = ('', '', 0);

	foreach my $line (split /\n/, $text)
	{
		$query = $1 if $line =~ /Query Text: (.{1,100})/;
		# a worker counts what it holds at a flush, and reads it at a cancel
		next if $query =~ /^SELECT (?:count\(\*\), COALESCE\(sum\(epoch\)|id, epoch, cancel)/;
		if ($line =~ /->|^\t?\S.*\(cost=/)
		{
			$relation = $line =~ /(?:Scan|Seq).* on (chat_task|chat_job|chat_tool_call) / ? $1 : '';
			$rows = $line =~ /actual rows=([\d.]+) loops=(\d+)/ ? $1 * $2 : 0;
			push @found, "$query: $line" if $relation && $rows > FEW;
		}
		push @found, "$query: $line"
		  if $line =~ /Rows Removed by (Join )?Filter: (\d+)/
		  && $2 > FEW && ($1 || $relation);
	}
	return @found;
}

# the server sees the queue empty, after it was in use
wait_for_task($node, ask($node, create_session($node)->{id}, 'call [[tool=answer]]'));
$node->safe_psql('postgres', 'VACUUM chat.chat_job; VACUUM chat.chat_tool_call');

# what runs, and what was
my @running = map { $_->{task} }
  start_turns($node, MANY, 'run [[tokens=2 gateat=1:on]]');
$fake->wait_at_gate('on', MANY);
my $old = create_session($node)->{id};
wait_for_task($node, ask($node, $old, "turn $_ [[tokens=1]]")) foreach 1 .. MANY;

my $offset = -s $node->logfile;
my $calls = ask($node, $old, 'call [[tool=answer]]');
wait_for_task($node, $calls);
my $behind = ask($node, $old, 'gate [[tokens=2 gateat=1:mid]]');
$fake->wait_at_gate('mid');
my $queued = ask($node, $old, 'next [[tokens=1]]');
$node->safe_psql('postgres', "SELECT chat.session_status('$old')");
$node->safe_psql('postgres', "SELECT chat.cancel_task('$behind')");
is(wait_for_task($node, $behind)->{status}, 'cancelled', 'a turn is cancelled');
is(wait_for_task($node, $queued)->{status}, 'completed', 'the next one runs');
is(wait_for_task($node, ask($node, $old, 'over [[tokens=1]]', on_busy => 'interrupt'))->{status},
	'completed', 'and one that interrupts');
my $log = substr(slurp_file($node->logfile), $offset);
cmp_ok(scalar(() = $log =~ /Query Text/g), '>', 50, 'the plans were logged');
is_deeply([ wide($log) ], [],
	'no statement of a turn reads all that runs, or all that the session had');

$fake->open_gate('on', MANY);
is(wait_for_task($node, $_)->{status}, 'completed', 'a turn that ran') foreach @running;

# the first look of a worker at what there is
my $worker = wait_for_worker($node);
$offset = -s $node->logfile;
$node->safe_psql('postgres', "SELECT pg_terminate_backend($worker)");
wait_for($node, "SELECT count(*) = 1 FROM chat.worker_status() WHERE pid <> $worker");
is(wait_for_task($node, ask($node, $old, 'on [[tokens=1]]'))->{status},
	'completed', 'another worker comes');
$log = substr(slurp_file($node->logfile), $offset);
like($log, qr/Query Text: SELECT count\(DISTINCT n\.session_id\)/, 'and looks for tasks without a job');
is_deeply([ wide($log) ], [], 'it does not read the tasks that have ended');

# calls of SQL tools that wait for a tool worker
my $gate = session($node);
$gate->query_safe('SELECT pg_advisory_lock(1)');
my @held = map { $_->{task} } start_turns($node, MANY, 'wait [[tool=hold]]');
wait_for($node, 'SELECT count(*) = ' . (MANY - 1) . " FROM chat.chat_job WHERE kind = 'tool' AND holder IS NULL");
$offset = -s $node->logfile;
my $remote = ask($node, $old, 'call [[tool=remote]]');
is(wait_for_task($node, $remote)->{status}, 'completed', 'a call of an HTTP tool is not behind them');
my $operation = $node->safe_psql('postgres',
	"SELECT operation_id FROM chat.chat_tool_call WHERE status = 'pending' LIMIT 1");
is($node->safe_psql('postgres', "SELECT chat.operation_progress('$operation', '1')"),
	't', 'progress of a call that waits is told');
my ($waits, $dropped) = map { ask($node, create_session($node)->{id}, 'call [[tool=asks id=c1]]') } 1 .. 2;
wait_for($node, "SELECT status = 'waiting' FROM chat.chat_task WHERE id = '$_'")
  foreach $waits, $dropped;
$node->safe_psql('postgres', "SELECT chat.cancel_task('$dropped')");
is(wait_for_task($node, $dropped)->{status}, 'cancelled', 'one that waits is cancelled');
is($node->safe_psql('postgres', <<"EOS"), 't', 'the output of a tool of the client comes');
SELECT chat.submit_tool_output(session_id, 'c1', '"blue"') FROM chat.chat_task WHERE id = '$waits'
EOS
is(wait_for_task($node, $waits)->{status}, 'completed', 'and the task goes on');
$log = substr(slurp_file($node->logfile), $offset);
like($log, qr/Query Text: WITH picked AS MATERIALIZED.*tool_kind = 'http'/, 'it was claimed');
is_deeply([ wide($log) ], [], 'whoever looks for a call does not read all that wait');
$gate->query_safe('SELECT pg_advisory_unlock(1)');
$gate->quit;
is(wait_for_task($node, $_)->{status}, 'completed', 'a call that waited') foreach @held;
done_testing();
