# Is what is told to a worker between two of its looks seen, though it was rung
# for before and nothing else comes?  A report of a tool, a task without a job.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $dir = PostgreSQL::Test::Utils::tempdir();

# heartbeats and the like would wake it
my $node = chat_cluster('main', start => 0,
	conf => "chat.heartbeat_interval = 86400000\nchat.enable_superuser_tools = on");
{
	local $ENV{LD_PRELOAD} = build_file('look.so');
	local $ENV{CHAT_TEST_LOOK} = $dir;
	$node->start;
}
$node->safe_psql('postgres', 'CREATE EXTENSION chat');
create_server($node, $fake);

# a tool that reports when it may, and ends when it may
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION public.report() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_advisory_xact_lock_shared(1);
	PERFORM chat.report_progress('{"half": true}');
	PERFORM pg_advisory_xact_lock_shared(2);
	RETURN 'done';
END $$;
SELECT chat.register_tool('public.report()', description => 'reports');
EOS
my $gate = $node->background_psql('postgres');
$gate->query_safe('SELECT pg_advisory_lock(1), pg_advisory_lock(2)');
my $task = ask($node, create_session($node)->{id},
	'go [[tool=report args={} id=c1 thentext=said]]');
wait_for($node, "SELECT status = 'running' FROM chat.chat_tool_call WHERE task_id = '$task'");
my $worker = wait_for_worker($node);

# Rings for nothing, and holds the worker when it has begun to look.
sub hold
{
	wait_for_rest($node, $worker);
	append_to_file("$dir/new", $worker);
	rename "$dir/new", "$dir/pid" or die "$dir: $!\n";
	$node->safe_psql('postgres', 'DELETE FROM chat.chat_job WHERE false');
	wait_until('the worker to look', sub { -e "$dir/held" });
	return;
}

# Lets it go on until it rests again.
sub let_go
{
	unlink "$dir/held" or die "$dir/held: $!\n";
	wait_for_rest($node, $worker);
	return;
}

hold();
$gate->query_safe('SELECT pg_advisory_unlock(1)');
wait_for($node, q{SELECT count(*) = 1 FROM pg_locks
	WHERE locktype = 'advisory' AND objid = 2 AND NOT granted});
let_go();
is( scalar(grep { $_->{preliminary} } events($node, $task)),
	1, 'a report of a tool is told when the worker rests');

hold();
my $session = create_session($node)->{id};
my $stray = $node->safe_psql('postgres', 'INSERT INTO chat.chat_task (session_id, server)'
	  . " VALUES ('$session', 'fake') RETURNING id");
let_go();
is( $node->safe_psql('postgres',
		"SELECT error ->> 'code' FROM chat.chat_task WHERE id = '$stray'"),
	'restored', 'and a task that no job will end has ended');

$gate->query_safe('SELECT pg_advisory_unlock(2)');
is(wait_for_task($node, $task)->{status}, 'completed', 'all goes on');
$gate->quit;
$node->stop;
done_testing();
