# Do workers keep out of the way of statements on databases (T6)?  And does a
# copy of a database run nothing of the original's?

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

# Makes a database with the extension and a server.
sub make_database
{
	my ($db) = @_;
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION chat');
	create_server($node, $fake, db => $db);
	return;
}

# Opens fifty streams in a database.
sub open_streams
{
	my ($db) = @_;
	my @turns = start_turns($node, 50, 'x [[tokens=4 gateat=2:g]]', $db);
	$fake->get_json('/gate/g?wait=50');
	return map { $_->{task} } @turns;
}

# T6: DROP DATABASE with fifty streams open, both ways
foreach my $force ('', ' WITH (FORCE)')
{
	make_database('drops');
	open_streams('drops');
	$node->safe_psql('postgres', "DROP DATABASE drops$force");
	$fake->wait_for_stats(sub { $_->{active} == 0 });
	pass("T6: DROP DATABASE$force with fifty streams open");
}

# a DROP that fails changes nothing for long
make_database('stays');
my @tasks = open_streams('stays');
my $guest = session($node, 'stays');
my ($ret, $out, $err) = $node->psql('postgres', 'DROP DATABASE stays');
like($err, qr/is being accessed by other users/, 'a DROP DATABASE that fails');
$guest->quit;
$fake->get_json('/gate/g?wait=50');
pass('lets the worker in again, its jobs go on');

# one that fails at once does not even make the worker leave
my $pids = "SELECT pid FROM pg_stat_activity WHERE datname = 'stays'"
  . " AND backend_type = 'chat worker'";
my $before = $node->safe_psql('postgres', $pids);
$node->safe_psql('postgres', 'CREATE ROLE stranger CREATEDB');
foreach my $statement (
	'DROP DATABASE stays',
	'ALTER DATABASE stays RENAME TO mine',
	'ALTER DATABASE stays SET TABLESPACE pg_default',
	'CREATE DATABASE mine TEMPLATE stays')
{
	(undef, undef, $err) = $node->psql('postgres',
		"SET ROLE stranger; $statement");
	like($err, qr/must be owner|permission denied/, "$statement by a stranger");
}
(undef, undef, $err) =
  $node->psql('postgres', 'BEGIN; DROP DATABASE stays; COMMIT');
like($err, qr/cannot run inside a transaction block/, 'DROP DATABASE in a block');
is($node->safe_psql('postgres', $pids), $before, 'leaves the worker where it is');

# RENAME and TEMPLATE with streams open; the jobs go on afterwards
$node->safe_psql('postgres', 'ALTER DATABASE stays RENAME TO renamed');
$fake->get_json('/gate/g?wait=50');
pass('ALTER DATABASE RENAME');
# the endpoint may still count the streams of the worker that had to leave
wait_for($node, "SELECT count(*) = 1 FROM pg_stat_activity"
	  . " WHERE datname = 'renamed' AND backend_type = 'chat worker'");
pass('the worker is in the renamed database');
$fake->get_json('/gate/g?wait=50');
my $queued = $node->safe_psql('renamed', "SELECT chat.stream_chat_completion("
	  . "session_id, 'queued [[tokens=1]]') FROM chat.chat_task LIMIT 1");
$before = $fake->stats->{requests};
$node->safe_psql('postgres', 'CREATE DATABASE copy TEMPLATE renamed');
$fake->wait_for_stats(sub { $_->{requests} >= $before + 50 });
is($fake->stats->{requests} - $before, 50, 'CREATE DATABASE TEMPLATE');
wait_for($node,
	'SELECT count(*) = 0 FROM chat.chat_task WHERE finished_at IS NULL', 'copy');
my $copied = row($node, "SELECT count(*),"
	  . " count(*) FILTER (WHERE status = 'failed' AND error->>'code' ="
	  . " 'restored') AS restored, (SELECT count(*) FROM chat.chat_job) AS jobs,"
	  . " (SELECT count(*) FROM chat.chat_event AS e"
	  . "  WHERE e.payload->>'type' = 'finish') AS finished"
	  . ' FROM chat.chat_task AS t', 'copy');
is_deeply($copied, { count => 51, restored => 51, jobs => 0, finished => 50 },
	'what was unfinished has ended in the copy');
is($fake->stats->{requests} - $before, 50, 'and the copy has asked nobody');
$node->safe_psql('copy', "ALTER DATABASE copy SET chat.default_server = 'fake'");
my $session = create_session($node, db => 'copy')->{id};
my $task = ask($node, $session, 'new [[tokens=1]]', db => 'copy');
is(wait_for_task($node, $task, 'copy')->{status}, 'completed',
	'the copy has a worker of its own');
$fake->open_gate('g', 50);
is(wait_for_task($node, $_, 'renamed')->{status}, 'completed', 'and the original ends')
  foreach @tasks, $queued;

# a template database gets no worker, what is made from it does
$node->safe_psql('template1', 'CREATE EXTENSION chat');
$node->safe_psql('postgres', 'CREATE DATABASE child');
wait_for_worker($node, 'child');
is( $node->safe_psql('postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE datname = 'template1'"
		  . " AND backend_type LIKE 'chat%'"),
	0, 'a template database has no worker');
$node->restart;
wait_for_worker($node, 'child');
is( $node->safe_psql('postgres',
		"SELECT string_agg(datname, ' ' ORDER BY datname) FROM"
		  . " pg_stat_activity WHERE backend_type = 'chat worker'"
		  . " AND datname = 'template1'"),
	'', 'nor after a restart');

# another encoding: no extension, no worker, no noise
$node->safe_psql('postgres', "CREATE DATABASE latin ENCODING 'LATIN1'"
	  . " LOCALE 'C' TEMPLATE template0");
($ret, $out, $err) = $node->psql('latin', 'CREATE EXTENSION chat');
like($err, qr/UTF-?8/i, 'a database of another encoding is refused');
unlike(slurp_file($node->logfile), qr/terminated by signal|PANIC|TRAP/,
	'nothing has crashed');

done_testing();
