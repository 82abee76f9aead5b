# P6: is no transaction open while the network is awaited, in any process of
# ours?  No snapshot, no lock, so vacuum and DDL go on beside streams that
# stall (T4, T5).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);

# What our processes hold: nothing, but the lock that each process has on
# its own virtual transaction while one is open.
my $held = <<"EOF";
SELECT a.backend_type, a.state, a.xact_start, a.backend_xid, a.backend_xmin,
	a.wait_event_type,
	(SELECT count(*) FROM pg_locks AS l WHERE l.pid = a.pid) AS locks
FROM pg_stat_activity AS a WHERE a.backend_type LIKE 'chat %'
ORDER BY a.backend_type
EOF

# Asserts that our processes hold nothing.
sub nothing_is_held
{
	my ($when) = @_;

	foreach my $process (rows($node, $held))
	{
		my $type = $process->{backend_type};
		is($process->{$_}, undef, "$when: the $type has no $_")
		  foreach qw(xact_start backend_xid backend_xmin);
		is($process->{locks}, 0, "$when: the $type has no lock");
		is($process->{wait_event_type}, 'Extension', "$when: the $type waits")
		  if $type eq 'chat worker';
	}
	return;
}

wait_for_worker($node);
wait_for($node, "SELECT count(*) = 1 FROM pg_stat_activity"
	  . " WHERE backend_type = 'chat worker' AND state = 'idle'"
	  . " AND wait_event_type = 'Extension'");
nothing_is_held('idle');

# before the status line, in the middle of the answer
my @turns =
  (start_turns($node, 2, 'head [[gatehead=head tokens=2]]'),
	start_turns($node, 3, 'middle [[tokens=4 gateat=2:middle]]'));
$fake->get_json('/gate/head?wait=2');
$fake->get_json('/gate/middle?wait=3');
wait_for($node, "SELECT count(*) = 3 FROM chat.chat_event"
	  . " WHERE payload->>'delta' LIKE '%t1 '");
wait_for($node, "SELECT bool_and(xact_start IS NULL AND wait_event_type ="
	  . " 'Extension') FROM pg_stat_activity WHERE backend_type = 'chat worker'");
nothing_is_held('streaming');

# T4: what is deleted now can be vacuumed now
$node->safe_psql('postgres',
	'CREATE TABLE t AS SELECT generate_series(1, 100); DELETE FROM t');
my ($ret, $out, $err) = $node->psql('postgres', 'VACUUM (VERBOSE) t');
like($err, qr/100 removed, 0 remain, 0 are dead but not yet removable/,
	'T4: vacuum removes what was deleted');
# T5: DDL that needs a table for itself
foreach my $ddl ('VACUUM FULL chat.chat_job', 'REINDEX TABLE chat.chat_task',
	'ALTER TABLE chat.chat_message SET (fillfactor = 90)')
{
	$node->safe_psql('postgres', $ddl);
}
pass('T5: VACUUM FULL, REINDEX and ALTER TABLE find no lock in their way');

# who waits for an answer holds neither snapshot nor lock
my $asker = session($node);
my $pid = $asker->query_safe('SELECT pg_backend_pid()');
$asker->query_until(qr/asking/,
	"\\echo asking\nCALL chat.ask('wait [[gate=asker]]');\n");
$fake->wait_at_gate('asker');
wait_for($node, "SELECT wait_event_type = 'Extension'"
	  . " FROM pg_stat_activity WHERE pid = $pid");
my $waiting = row($node, "SELECT backend_xmin, backend_xid,"
	  . " (SELECT count(*) FROM pg_locks AS l WHERE l.pid = a.pid"
	  . " AND locktype <> 'virtualxid') AS locks"
	  . " FROM pg_stat_activity AS a WHERE pid = $pid");
is($waiting->{backend_xmin}, undef, 'ask() waits without a snapshot');
is($waiting->{locks}, 0, 'and without a lock');
$fake->open_gate('asker');

$fake->open_gate('head', 2);
$fake->open_gate('middle', 3);
is(wait_for_task($node, $_->{task})->{status}, 'completed', 'a turn ends')
  foreach @turns;
$asker->quit;

done_testing();
