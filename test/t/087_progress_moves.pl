# Is a report of a tool where its task's events are, when another worker has
# moved these to another slot just as it was about to be stored (P3)?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => "chat.workers = 2\nchat.enable_superuser_tools = on\nchat.event_retention = 1h");

create_server($node, $fake);
wait_for($node, 'SELECT count(*) = 2 FROM chat.worker_status() WHERE pid > 0');

# A tool that reports and ends when it may; a worker that stands still when it
# has taken the snapshot in which it looks for the task, and no lock: until the
# gate is open, it says that it is there.
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION public.report() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_advisory_xact_lock_shared(1);
	PERFORM chat.report_progress('{"half": true}');
	PERFORM pg_advisory_xact_lock_shared(2);
	RETURN 'done';
END $$;
SELECT chat.register_tool('public.report()', description => 'reports');
CREATE FUNCTION public.stand_still() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	IF pg_stat_get_backend_activity(b) = 'tell progress'
		FROM pg_stat_get_backend_idset() AS b WHERE pg_stat_get_backend_pid(b) = pg_backend_pid()
	THEN
		PERFORM pg_advisory_xact_lock(3);
		WHILE NOT pg_try_advisory_xact_lock_shared(4) LOOP
			PERFORM pg_sleep(0.01);
		END LOOP;
	END IF;
	RETURN true;
END $$;
EOS
my $gate = $node->background_psql('postgres');
$gate->query_safe('SELECT pg_advisory_lock(1), pg_advisory_lock(2), pg_advisory_lock(4)');

my $session = create_session($node);
my $listener = listener($node, $session->{channel});
my $task = ask($node, $session->{id}, 'go [[tool=report args={} id=c1 thentext=said]]');
wait_for($node, "SELECT status = 'running' FROM chat.chat_tool_call WHERE task_id = '$task'");
my $slot = $node->safe_psql('postgres', "SELECT slot FROM chat.chat_task WHERE id = '$task'");

# what the statement reads is not as it was
$node->safe_psql('postgres', <<'EOS');
BEGIN;
ALTER TABLE chat.chat_session RENAME TO real_session;
CREATE VIEW chat.chat_session AS SELECT * FROM chat.real_session WHERE public.stand_still();
COMMIT;
EOS
$gate->query_safe('SELECT pg_advisory_unlock(1)');
wait_for($node, "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = 3 AND granted");
$node->safe_psql('postgres', "ALTER SYSTEM SET chat.event_retention = '1s'");
$node->reload;
wait_for($node, "SELECT slot <> $slot FROM chat.chat_task WHERE id = '$task'");
pass('the other worker moves the events of a task that one is about to report of');
$gate->query_safe('SELECT pg_advisory_unlock(4)');
wait_for($node, "SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory' AND objid = 3");
$node->safe_psql('postgres', 'BEGIN; DROP VIEW chat.chat_session;'
	  . 'ALTER TABLE chat.real_session RENAME TO chat_session; COMMIT');
$node->safe_psql('postgres', "ALTER SYSTEM SET chat.event_retention = '1h'");
$node->reload;
$gate->query_safe('SELECT pg_advisory_unlock(2)');
is(wait_for_task($node, $task)->{status}, 'completed', 'the task goes on');
my @told = $listener->turn($task);
my @there = events($node, $task);
is(scalar(grep { $_->{preliminary} } @told), 1, 'its listeners are told how far it is');
is_deeply(\@there, \@told, 'P3: and what they were told can be read');
is(row($node, "SELECT count(DISTINCT slot) AS n FROM chat.chat_event WHERE task_id = '$task'")->{n}, 1, 'all of it is in one place');

$gate->quit;
$listener->stop;
done_testing();
