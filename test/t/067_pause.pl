# Do pause, resume and drain do what they say, over restarts, too, and do the
# views count what is there?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => 'chat.workers = 2');
create_server($node, $fake);
$node->safe_psql('postgres', <<'SQL');
CREATE ROLE app LOGIN;
CREATE ROLE watcher LOGIN IN ROLE pg_monitor;
GRANT USAGE ON FOREIGN SERVER fake TO app;
SELECT chat.grant_usage('app');
CREATE FUNCTION public.now_text() RETURNS text LANGUAGE sql AS 'SELECT 1::text';
SET ROLE app;
SELECT chat.register_tool('public.now_text()');
SQL

# Depth of the queue by kind and state.
sub depth
{
	my ($kind, $state) = @_;
	return row($node, "SELECT depth FROM chat.stat_queue WHERE kind = '$kind' AND state = '$state'")->{depth};
}

# what runs goes on, what is queued waits
my $session = create_session($node)->{id};
my $running = ask($node, $session, 'running [[tokens=3 gateat=1:g]]');
my $behind = ask($node, $session, 'behind [[tokens=1]]');
$fake->wait_at_gate('g');
is($node->safe_psql('postgres', 'SELECT chat.pause()'), 't', 'pause');
is($node->safe_psql('postgres', 'SELECT chat.pause()'), 'f', 'once');
wait_for($node, "SELECT bool_and(state = 'paused') AND count(*) = 2 FROM chat.stat_worker");
my $waits = ask($node, create_session($node, owner => 'app')->{id}, 'waits [[tool=now_text args={}]]');
is(depth('completion', 'running'), 1, 'stat_queue: one runs');
is(depth('completion', 'due'), 1, 'stat_queue: one is due');
is(depth('completion', 'behind'), 1, 'stat_queue: one is behind another');
cmp_ok(row($node, "SELECT sum(oldest_seconds) AS s FROM chat.stat_queue WHERE kind = 'completion'")->{s},
	'>', 0, 'stat_queue: the age of the oldest');
$fake->open_gate('g');
is(wait_for_task($node, $running)->{status}, 'completed', 'what ran completes');
$fake->forget;

# a drain that has nothing to wait for
is($node->safe_psql('postgres', 'CALL chat.drain()'), '0', 'drain');
$node->restart;
wait_for($node, "SELECT bool_and(state = 'paused') AND count(*) = 2 FROM chat.worker_status() WHERE pid > 0");
is($node->safe_psql('postgres', 'CALL chat.drain()'), '0', 'after a restart it is still paused');
is(scalar($fake->completions), 0, 'nothing was asked meanwhile');
is(depth('completion', 'due'), 2, 'both wait');

# a cancelled task ends all the same
my $gone = ask($node, create_session($node)->{id}, 'gone');
is($node->safe_psql('postgres', "SELECT chat.cancel_task('$gone')"), 't', 'a task is cancelled');
is(wait_for_task($node, $gone)->{status}, 'cancelled', 'and ends while all is paused');
is($node->safe_psql('postgres', 'SELECT chat.resume()'), 't', 'resume');
is(wait_for_task($node, $_)->{status}, 'completed', 'what waited runs') foreach $behind, $waits;
is($node->safe_psql('postgres', 'SELECT chat.resume()'), 'f', 'once');

# a drain waits, and blocks nobody
my $slow = ask($node, $session, 'slow [[tokens=3 gateat=1:h]]');
$fake->wait_at_gate('h');
is($node->safe_psql('postgres', "CALL chat.drain('0 s')"), '1', 'drain tells what is still at work');
my $drain = session($node);
my $other = ask($node, create_session($node)->{id}, 'other [[tokens=1]]');
$fake->open_gate('h');
is($drain->query_safe("CALL chat.drain('1 h')"), '0', 'drain waits for it');
is(wait_for_task($node, $slow)->{status}, 'completed', 'which has completed');
is(depth('completion', 'due'), 1, 'others wait');
$drain->quit;
$node->safe_psql('postgres', 'SELECT chat.resume()');
is(wait_for_task($node, $other)->{status}, 'completed', 'until resume');
my ($ret, $out, $err) = $node->psql('postgres', 'BEGIN; CALL chat.drain();');
like($err, qr/cannot run inside a transaction block/, 'drain needs no transaction around it');
# pause is part of its transaction
$node->safe_psql('postgres', 'BEGIN; SELECT chat.pause(); ROLLBACK');
is(wait_for_task($node, ask($node, $session, 'on [[tokens=1]]'))->{status}, 'completed',
	'a pause that is rolled back is none');

# who may
foreach my $sql ('SELECT chat.pause()', 'SELECT chat.resume()', 'CALL chat.drain()',
	'SELECT * FROM chat.stat_worker', 'SELECT * FROM chat.stat_queue', 'SELECT * FROM chat.stat_server')
{
	($ret, $out, $err) = $node->psql('postgres', "SET ROLE app; $sql");
	like($err, qr/permission denied/, "a role that uses chat may not: $sql");
}
foreach my $view ('worker', 'queue', 'server')
{
	cmp_ok($node->safe_psql('postgres', "SET ROLE watcher; SELECT count(*) FROM chat.stat_$view"),
		'>', 0, "a monitoring role reads stat_$view");
}
is($node->safe_psql('postgres', <<'SQL'), '0', 'the figures are numbers');
SELECT count(*) FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
WHERE c.relnamespace = 'chat'::regnamespace AND c.relname LIKE 'stat\_%' AND a.attnum > 0
	AND a.atttypid NOT IN ('int4'::regtype, 'int8'::regtype, 'float8'::regtype,
		'text'::regtype, 'name'::regtype, 'timestamptz'::regtype)
SQL

done_testing();
