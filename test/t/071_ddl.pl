# What do statements do to turns whose objects they take away or change?
# Each turn ends once, or is gone with all that belongs to it; ten others
# come through undisturbed.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Bystander;
use ChatTest::Crash;
use File::Find;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', start => 0);
my $scripts = own_scripts($node);
$node->start;
$node->safe_psql('postgres', 'CREATE EXTENSION chat');
create_server($node, $fake);

# Gives a node a copy of the staged installation, to which the test may add
# scripts; returns their directory, or undef with a server that looks nowhere
# but in its own.
sub own_scripts
{
	my ($node) = @_;
	my $conf = slurp_file($ENV{TEMP_CONFIG} // '/dev/null');
	my $copy = PostgreSQL::Test::Utils::tempdir();

	if ($conf =~ /^extension_destdir = '(.*)'/m)
	{
		# links: the library is one and the same
		system_or_bail('cp', '-R', '-s', "$1/.", $copy);
		$node->append_conf('postgresql.conf', "extension_destdir = '$copy'");
		my $found;
		find(sub { $found = $File::Find::dir if $_ eq 'chat.control' }, $copy);
		return $found;
	}
	if ($conf =~ /^extension_control_path = '([^:]*):/m)
	{
		system_or_bail('cp', '-R', '-s', "$1/extension", $copy);
		$node->append_conf('postgresql.conf',
			"extension_control_path = '$copy:\$system'");
		return "$copy/extension";
	}
	return;
}

# Makes a database with the extension; returns its name.
sub make_database
{
	my ($name) = @_;
	$node->safe_psql('postgres', "CREATE DATABASE $name");
	$node->safe_psql($name, 'CREATE EXTENSION chat');
	create_server($node, $fake, db => $name);
	return $name;
}

# Starts a turn that stands at gate v after three tokens.
sub start_victim
{
	my ($db, $id) = @_;
	$id //= create_session($node, db => $db // 'postgres')->{id};
	my $task = ask($node, $id, 'victim [[tokens=6 gateat=3:v]]',
		db => $db // 'postgres');

	$fake->wait_at_gate('v');
	return ($task, $id);
}

# Asserts that a turn ended as it should, once.
sub ended
{
	my ($what, $task, $status, $code, $roles, $db) = @_;
	my $row = wait_for_task($node, $task, $db);

	is_deeply([ $row->{status}, $row->{error} && $row->{error}{code} ],
		[ $status, $code ], "$what: the turn ends as $status")
	  or diag(encode($row));
	one_end($node, $task, $what, $db);
	is(messages($node, $task, $db), $roles, "$what: its messages");
	return $row;
}

# Asserts that nothing of a session is left.
sub gone
{
	my ($what, $session, $db) = @_;

	is( row($node, <<"EOS", $db)->{n}, 0, "$what: nothing of it is left");
SELECT (SELECT count(*) FROM chat.chat_session WHERE id = '$session')
	+ (SELECT count(*) FROM chat.chat_message WHERE session_id = '$session')
	+ (SELECT count(*) FROM chat.chat_task WHERE session_id = '$session')
	+ (SELECT count(*) FROM chat.chat_job WHERE session_id = '$session') AS n
EOS
	return;
}

# Returns once the fake endpoint has seen a transfer broken off.
sub aborted
{
	my ($what, $before, $n) = @_;
	$fake->wait_for_stats(sub { $_->{aborted} >= $before + ($n // 1) });
	pass("$what: the transfer is broken off");
	return;
}

# --- within the database of the bystanders

my $what = 'session deleted';
my $by = ChatTest::Bystander->new($node, $fake);
my ($task, $session) = start_victim();
my $aborts = $fake->stats->{aborted};
is($node->safe_psql('postgres', "SELECT chat.delete_chat_session('$session')"),
	't', "$what mid-stream");
aborted($what, $aborts);
gone($what, $session);
$by->check($what, undisturbed => 1);

$what = 'TRUNCATE of the sessions';
$by = ChatTest::Bystander->new($node, $fake, gate => 'by2', db => make_database('by2'));
($task, $session) = start_victim();
my $queued = ask($node, $session, 'behind [[tokens=1]]');
$aborts = $fake->stats->{aborted};
my $pid = wait_for_worker($node);
$node->safe_psql('postgres', 'TRUNCATE chat.chat_session CASCADE');
aborted($what, $aborts);
gone($what, $session);
is(row($node, 'SELECT count(*) FROM chat.chat_job')->{count}, 0,
	"$what: no job is left");
is(wait_for_worker($node), $pid, "$what: the worker goes on");
$by->check($what, undisturbed => 1);

$what = 'TRUNCATE of the tasks';
$by = ChatTest::Bystander->new($node, $fake, gate => 'by2', db => 'by2');
($task, $session) = start_victim();
$queued = ask($node, $session, 'behind [[tokens=1]]');
$node->safe_psql('postgres', 'TRUNCATE chat.chat_task CASCADE');
$fake->open_gate('v');
wait_for($node, 'SELECT open_streams = 0 FROM chat.worker_status()');
is(row($node, "SELECT (SELECT count(*) FROM chat.chat_task) + (SELECT count(*) FROM chat.chat_job) AS n")->{n},
	0, "$what: nothing of it is left to be done");
my $next = ask($node, $session, 'next [[tokens=1]]');
ended("$what, the next turn", $next, 'completed', undef, 'user assistant');
is(wait_for_worker($node), $pid, "$what: the worker goes on");
$by->check($what, undisturbed => 1);

$what = 'TRUNCATE of the jobs';
$by = ChatTest::Bystander->new($node, $fake, gate => 'by2', db => 'by2');
($task, $session) = start_victim();
$aborts = $fake->stats->{aborted};
$node->safe_psql('postgres', 'TRUNCATE chat.chat_job');
aborted($what, $aborts);
is(row($node, "SELECT count(*) FROM chat.chat_message WHERE task_id = '$task'")
	  ->{count}, 1, "$what: what was stored stays");
$next = ask($node, create_session($node)->{id}, 'next [[tokens=1]]');
is(wait_for_task($node, $next)->{status}, 'completed',
	"$what: other sessions go on");
ended($what, $task, 'failed', 'restored', 'user');
$by->check($what, undisturbed => 1);

$what = 'TRUNCATE of the events';
$by = ChatTest::Bystander->new($node, $fake, gate => 'by2', db => 'by2');
($task, $session) = start_victim();
$node->safe_psql('postgres', 'TRUNCATE chat.chat_event');
$fake->open_gate('v');
ended($what, $task, 'completed', undef, 'user assistant');
is( row($node, "SELECT content FROM chat.chat_message WHERE task_id = '$task'"
		  . " AND role = 'assistant'")->{content},
	't0 t1 t2 t3 t4 t5 ',
	"$what: the answer is whole");
$by->check($what, undisturbed => 1);

$what = 'TRUNCATE of the messages';
$by = ChatTest::Bystander->new($node, $fake, gate => 'by2', db => 'by2');
($task, $session) = start_victim();
$node->safe_psql('postgres', 'TRUNCATE chat.chat_message');
$fake->open_gate('v');
ended($what, $task, 'completed', undef, 'assistant');
$by->check($what, undisturbed => 1);

$what = 'REINDEX';
$by = ChatTest::Bystander->new($node, $fake);
($task, $session) = start_victim();
$node->safe_psql('postgres', 'REINDEX SCHEMA chat');
$node->safe_psql('postgres', "REINDEX TABLE CONCURRENTLY chat.$_")
  foreach qw(chat_job chat_session chat_event);
$fake->open_gate('v');
ended($what, $task, 'completed', undef, 'user assistant');
$by->check($what, undisturbed => 1);

$what = 'VACUUM FULL';
$by = ChatTest::Bystander->new($node, $fake);
($task, $session) = start_victim();
$node->safe_psql('postgres', 'VACUUM FULL');
$fake->open_gate('v');
ended($what, $task, 'completed', undef, 'user assistant');
$by->check($what, undisturbed => 1);

$what = 'server dropped';
$node->safe_psql('postgres', server_sql($fake->port, name => 'brief'));
$by = ChatTest::Bystander->new($node, $fake);
$session = create_session($node, server => 'brief')->{id};
($task) = start_victim(undef, $session);
$queued = ask($node, $session, 'behind [[tokens=1]]');
$node->safe_psql('postgres', 'DROP SERVER brief CASCADE');
$fake->open_gate('v');
# the request has been made: its answer is worth keeping
ended($what, $task, 'completed', undef, 'user assistant');
my $row = ended("$what, the turn behind", $queued, 'failed',
	'endpoint_error', 'user');
like($row->{error}{message}, qr/server "brief" does not exist/,
	"$what: the next turn says why it failed");
$by->check($what, undisturbed => 1);

$what = 'T69: DROP ROLE of an owner';
$node->safe_psql('postgres',
	'CREATE ROLE brief; SELECT chat.grant_usage(\'brief\');'
	  . 'GRANT USAGE ON FOREIGN SERVER fake TO brief');
$by = ChatTest::Bystander->new($node, $fake);
$session = create_session($node, owner => 'brief')->{id};
($task) = start_victim(undef, $session);
$queued = ask($node, $session, 'behind [[tokens=1]]');
$node->safe_psql('postgres', 'DROP OWNED BY brief; DROP ROLE brief');
$fake->open_gate('v');
ended($what, $task, 'completed', undef, 'user assistant');
$row = ended("$what, the turn behind", $queued, 'failed', 'endpoint_error',
	'user');
like($row->{error}{message}, qr/role/, "$what: the next turn says why");
$by->check($what, undisturbed => 1);

# --- the extension in the database of the bystanders

SKIP:
{
	$what = 'ALTER EXTENSION UPDATE';
	skip "$what: this server has no directory for scripts of the test", 10
	  unless $scripts;
	my $version = row($node, 'SELECT extversion AS v FROM pg_extension'
		  . " WHERE extname = 'chat'")->{v};
	append_to_file("$scripts/chat--$version--99.0.sql", <<'EOS');
ALTER TABLE chat.chat_task ADD COLUMN upgraded boolean DEFAULT true;
ALTER TABLE chat.chat_job ADD COLUMN upgraded integer DEFAULT 1;
ALTER TABLE chat.chat_message ADD CHECK (sequence > -1);
CREATE FUNCTION chat.upgraded() RETURNS text LANGUAGE sql AS 'SELECT ''99''';
EOS
	append_to_file("$scripts/chat--99.0--$version.sql", <<'EOS');
ALTER TABLE chat.chat_task DROP COLUMN upgraded;
ALTER TABLE chat.chat_job DROP COLUMN upgraded;
EOS
	$by = ChatTest::Bystander->new($node, $fake);
	($task, $session) = start_victim();
	$queued = ask($node, $session, 'behind [[tokens=1]]');
	$pid = wait_for_worker($node);
	# the tables are locked while the stream goes on: what it does meanwhile
	# waits, and is lost no more than anything else
	my $upgrade = session($node);
	$upgrade->query_safe("BEGIN; ALTER EXTENSION chat UPDATE TO '99.0'");
	my $log = -s $node->logfile;
	$fake->open_gate('v');
	$node->wait_for_log(qr/could not store \w+: .* lock timeout/, $log);
	$upgrade->query_safe('COMMIT');
	$upgrade->quit;
	ended($what, $task, 'completed', undef, 'user assistant');
	is(text_of(stored_events($node, $task)), 't0 t1 t2 t3 t4 t5 ',
		"$what: its events add up to the answer");
	# T66: the library is not of that version
	$node->wait_for_log(qr/extension "chat" has version 99\.0, its library \Q$version/, $log);
	is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$queued'")->{status},
		'queued', "$what: T66: no job is run by another version's library");
	$node->safe_psql('postgres', "ALTER EXTENSION chat UPDATE TO '$version'");
	ended("$what, the turn behind", $queued, 'completed', undef,
		'user assistant');
	is(wait_for_worker($node), $pid, "$what: the worker goes on");
	is($node->safe_psql('postgres', 'SELECT chat.upgraded()'),
		'99', "$what: has happened");
	$by->check($what, undisturbed => 1);
}

# --- the database, the extension

$what = 'DROP EXTENSION';
my $db = make_database('gone');
$by = ChatTest::Bystander->new($node, $fake);
($task, $session) = start_victim($db);
$pid = wait_for_worker($node, $db);
$aborts = $fake->stats->{aborted};
$node->safe_psql($db, 'DROP EXTENSION chat CASCADE');
aborted($what, $aborts);
wait_gone($pid);
pass("$what: the worker ends");
$node->safe_psql($db, 'CREATE EXTENSION chat');
create_server($node, $fake, db => $db);
$next = ask($node, create_session($node, db => $db)->{id},
	'again [[tokens=1]]', db => $db);
ended("$what and CREATE EXTENSION", $next, 'completed', undef,
	'user assistant', $db);
$by->check($what, undisturbed => 1);

$what = 'DROP EXTENSION that is rolled back';
$by = ChatTest::Bystander->new($node, $fake);
($task, $session) = start_victim($db);
$pid = wait_for_worker($node, $db);
$node->safe_psql($db, 'BEGIN; DROP EXTENSION chat CASCADE; ROLLBACK');
$fake->open_gate('v');
ended($what, $task, 'completed', undef, 'user assistant', $db);
is(wait_for_worker($node, $db), $pid, "$what: the worker goes on");
$by->check($what, undisturbed => 1);

$what = 'ALTER DATABASE RENAME';
$by = ChatTest::Bystander->new($node, $fake);
($task, $session) = start_victim($db);
$pid = wait_for_worker($node, $db);
$node->safe_psql('postgres', "ALTER DATABASE $db RENAME TO renamed");
$db = 'renamed';
# until the process is gone its stream stands at the gate
wait_gone($pid);
$fake->wait_at_gate('v');
is( row($node, "SELECT attempts, crashes FROM chat.chat_job", $db)->{attempts},
	1, "$what: the attempt was given back");
$fake->open_gate('v');
ended($what, $task, 'completed', undef, 'user assistant', $db);
is(text_of(stored_events($node, $task, $db)), 't0 t1 t2 t3 t4 t5 ',
	"$what: its events add up to the answer");
$by->check($what, undisturbed => 1);

$what = 'ALTER DATABASE RENAME that fails';
$by = ChatTest::Bystander->new($node, $fake);
($task, $session) = start_victim($db);
$pid = wait_for_worker($node, $db);
my (undef, undef, $error) =
  $node->psql('postgres', "ALTER DATABASE $db RENAME TO postgres");
like($error, qr/already exists/, $what);
wait_gone($pid);
$fake->wait_at_gate('v');
$fake->open_gate('v');
ended($what, $task, 'completed', undef, 'user assistant', $db);
$by->check($what, undisturbed => 1);

$what = 'DROP DATABASE';
$by = ChatTest::Bystander->new($node, $fake);
($task, $session) = start_victim($db);
$pid = wait_for_worker($node, $db);
$aborts = $fake->stats->{aborted};
$node->safe_psql('postgres', "DROP DATABASE $db");
wait_gone($pid);
pass("$what: the worker has ended");
aborted($what, $aborts);
is( row($node, "SELECT count(*) FROM pg_database WHERE datname = '$db'")
	  ->{count}, 0, $what);
$by->check($what, undisturbed => 1);

done_testing();
