# Do our processes behave?  They show what they do, come back when they are
# ended, survive their neighbours, and do with the places there are (T1, T3,
# T7, T8, T14, T26).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);
my $session = create_session($node)->{id};
my $worker = wait_for_worker($node);
my $start = row($node, 'SELECT pg_postmaster_start_time() AS t')->{t};

# T7: visible to operators and to autovacuum
my @turns = start_turns($node, 20, 'x [[tokens=3]]');
wait_for_task($node, $_->{task}) foreach @turns;
my $shown = row($node, "SELECT datname, backend_type, state, query"
	  . " FROM pg_stat_activity WHERE pid = $worker");
is($shown->{datname}, 'postgres', 'T7: the worker shows its database');
is($shown->{backend_type}, 'chat worker', 'its type');
like($shown->{query}, qr/\w/, "and what it did last: $shown->{query}");
wait_for($node, "SELECT n_tup_ins >= 20 AND n_tup_upd > 0 AND n_tup_del >= 20"
	  . " FROM pg_stat_user_tables WHERE relname = 'chat_job'");
pass('T7: its work is counted, for autovacuum');
wait_for($node, "SELECT n_tup_hot_upd::float / n_tup_upd > 0.8"
	  . " FROM pg_stat_user_tables WHERE relname = 'chat_session'");
pass('T26: updates of sessions are HOT');
is( row($node,
		    "SELECT count(*) FROM pg_class WHERE relnamespace = 'chat'::regnamespace"
		  . " AND relkind IN ('r', 'p') AND relpersistence <> 'p'")->{count},
	0, 'T14: no table is unlogged');
my $status = row($node, 'SELECT * FROM chat.worker_status()');
is($status->{completed}, 20, 'worker_status() counts');
is($status->{open_streams}, 0, 'no stream is open');

# T3: a worker that is ended comes back, and so does the launcher
$node->safe_psql('postgres', "SELECT pg_terminate_backend($worker)");
wait_gone($worker);
isnt(wait_for_worker($node), $worker, 'T3: an ended worker comes back');
my $launcher = pid_of($node, qr/: chat launcher/);
$worker = wait_for_worker($node);
$node->safe_psql('postgres', "SELECT pg_terminate_backend($launcher)");
wait_gone($launcher);
wait_for($node, "SELECT count(*) = 1 FROM pg_stat_activity"
	  . " WHERE backend_type = 'chat launcher'");
is(wait_for_worker($node), $worker, 'a new launcher keeps the worker');
is( wait_for_task($node, ask($node, $session, 'x [[tokens=1]]'))->{status},
	'completed', 'and all works');

# T1: ended while it starts, over and over
foreach (1 .. 5)
{
	wait_for($node, "SELECT count(pg_terminate_backend(pid)) > 0"
		  . " FROM pg_stat_activity WHERE backend_type = 'chat worker'");
}
is( wait_for_task($node, ask($node, $session, 'x [[tokens=1]]'))->{status},
	'completed', 'T1: a worker that is ended at its start harms nobody');
is(row($node, 'SELECT pg_postmaster_start_time() AS t')->{t}, $start,
	'the server has not restarted');

# more workers than one; a reload is enough
$node->append_conf('postgresql.conf', 'chat.workers = 3');
$node->reload;
wait_for($node, 'SELECT count(*) = 3 FROM chat.worker_status() WHERE pid > 0');
@turns = start_turns($node, 60, 'x [[tokens=3 gateat=1:w]]');
$fake->get_json('/gate/w?wait=60');
$fake->open_gate('w', 60);
wait_for_task($node, $_->{task}) foreach @turns;
is( row($node, "SELECT count(*) FROM chat.chat_task WHERE status = 'completed'"
		  . " AND id IN (" . join(',', map { literal($_->{task}) } @turns) . ")")
	  ->{count}, 60, 'three workers share the work');
is( row($node, "SELECT count(*) FROM chat.chat_event WHERE"
		  . " payload->>'type' = 'finish' AND task_id IN ("
		  . join(',', map { literal($_->{task}) } @turns) . ")")->{count},
	60, 'T42: and no task ends twice');

# and fewer: who has something open ends it, and takes nothing new
@turns = start_turns($node, 60, 'x [[tokens=3 gateat=1:f]]');
$fake->get_json('/gate/f?wait=60');
my $running = "FROM chat.worker_status() WHERE state = 'running'";
$node->append_conf('postgresql.conf', 'chat.workers = 1');
$node->reload;
wait_for($node, "SELECT count(*) = 1 $running");
my $kept = $node->safe_psql('postgres', "SELECT pid $running");
is(row($node, 'SELECT sum(open_streams)::int AS n FROM chat.worker_status()')->{n}, 60,
	'no stream is broken off');
is(wait_for_task($node, ask($node, $session, 'x [[tokens=1]]'))->{status}, 'completed',
	'the one that stays takes what comes');
# one that ends may be needed again
$node->append_conf('postgresql.conf', 'chat.workers = 3');
$node->reload;
wait_for($node, "SELECT count(*) = 3 $running");
$node->append_conf('postgresql.conf', 'chat.workers = 1');
$node->reload;
wait_for($node, "SELECT count(*) = 1 $running");
$fake->open_gate('f', 60);
is(scalar(grep { wait_for_task($node, $_->{task})->{status} eq 'completed' } @turns), 60,
	'all turns complete');
wait_for($node, 'SELECT count(*) = 1 FROM chat.worker_status()');
is($node->safe_psql('postgres', "SELECT pid $running"), $kept, 'one worker is left, the same');
is(wait_for_task($node, ask($node, $session, 'x [[tokens=1]]'))->{status}, 'completed',
	'and works');

unlike(slurp_file($node->logfile), qr/terminated by signal|PANIC|TRAP/,
	'nothing has crashed');
$node->stop;

# T8: no place for a worker: said once, tried again, nothing is lost
$node = chat_cluster('small', conf => 'max_worker_processes = 3');
create_server($node, $fake);
wait_for_worker($node);
$node->safe_psql('postgres', 'CREATE DATABASE second');
$node->safe_psql('second', 'CREATE EXTENSION chat');
create_server($node, $fake, db => 'second');
$session = create_session($node, db => 'second')->{id};
my $task = ask($node, $session, 'x [[tokens=1]]', db => 'second');
$node->wait_for_log(qr/no place for a chat worker/);
is( row($node, 'SELECT count(*) FROM chat.worker_status() WHERE pid > 0',
		'second')->{count},
	0, 'T8: max_worker_processes is exhausted');
is( row($node, "SELECT status FROM chat.chat_task WHERE id = '$task'", 'second')
	  ->{status}, 'queued', 'T8: the task waits');
is( wait_for_task($node,
		ask($node, create_session($node)->{id}, 'x [[tokens=1]]'))->{status},
	'completed', 'those with a worker go on');
$node->safe_psql('postgres', 'DROP EXTENSION chat CASCADE');
is(wait_for_task($node, $task, 'second')->{status}, 'completed',
	'T8: a place that is free again is taken');
my $oid = row($node, "SELECT oid FROM pg_database WHERE datname = 'second'")->{oid};
my @warnings =
  slurp_file($node->logfile) =~ /no place for a chat worker .* OID $oid\b/g;
is(@warnings, 1, 'T8: one warning');

done_testing();
