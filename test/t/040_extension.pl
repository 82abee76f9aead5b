# Does the worker come and go with the extension?  DROP EXTENSION while it
# streams, CREATE EXTENSION again, in the same transaction, in a second
# database; a schema of the same name is nobody's (T5, T10).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', extension => 0);
my $launcher = pid_of($node, qr/: chat launcher/);

# Returns the databases that our workers are in.
sub places
{
	return $node->safe_psql('template1',
		"SELECT string_agg(datname, ' ' ORDER BY datname) FROM"
		  . " pg_stat_activity WHERE backend_type = 'chat worker'");
}

# Waits until the workers are in exactly these databases.
sub wait_for_places
{
	my ($places, $what) = @_;
	wait_until($what, sub { places() eq $places });
	pass($what);
	return;
}

# T10: nothing happens before CREATE EXTENSION, also beside a squatter
$node->safe_psql('postgres', 'CREATE SCHEMA chat; CREATE TABLE chat.chat_job ()');
is(places(), '', 'T10: no worker without the extension');
my ($ret, $out, $err) = $node->psql('postgres', 'CREATE EXTENSION chat');
like($err, qr/schema "chat" already exists/, 'T10: a squatter is not adopted');
$node->restart;
$launcher = pid_of($node, qr/: chat launcher/);
wait_for_places('', 'T10: and starts nothing');
$node->safe_psql('postgres', 'DROP SCHEMA chat CASCADE');

# an aborted CREATE EXTENSION, then one that commits
$node->safe_psql('postgres', 'BEGIN; CREATE EXTENSION chat; ROLLBACK');
$node->safe_psql('postgres', 'CREATE EXTENSION chat');
wait_for_places('postgres', 'CREATE EXTENSION brings a worker');
create_server($node, $fake);

# DROP EXTENSION while ten streams are open
my @turns = start_turns($node, 10, 'x [[tokens=4 gateat=2:g]]');
$fake->get_json('/gate/g?wait=10');
($ret, $out, $err) = $node->psql('postgres', 'DROP EXTENSION chat');
like($err, qr/CASCADE/, 'DROP EXTENSION asks for CASCADE: there is a server');
is($fake->stats->{active}, 10, 'and has ended nothing');
$node->safe_psql('postgres', 'BEGIN; DROP EXTENSION chat CASCADE; ROLLBACK');
is(wait_for_worker($node), pid_of($node, qr/: chat worker/),
	'a rolled back one has ended nothing either');
is($fake->stats->{active}, 10, 'no stream');
$node->safe_psql('postgres', 'DROP EXTENSION chat CASCADE');
wait_for_places('', 'DROP EXTENSION ends the worker');
$fake->wait_for_stats(sub { $_->{active} == 0 });
pass('and its requests');

# again, in one transaction, and in quick succession
$node->safe_psql('postgres', 'CREATE EXTENSION chat');
create_server($node, $fake);
my $session = create_session($node)->{id};
is(wait_for_task($node, ask($node, $session, 'a [[tokens=1]]'))->{status},
	'completed', 'CREATE EXTENSION again works');
foreach my $round (1 .. 3)
{
	my $old = wait_for_worker($node);
	my @drop = ('DROP EXTENSION chat CASCADE', 'CREATE EXTENSION chat',
		server_sql($fake->port));

	if ($round == 1)
	{
		$node->safe_psql('postgres', join ';', 'BEGIN', @drop, 'COMMIT');
	}
	else
	{
		$node->safe_psql('postgres', $_) foreach @drop;
	}
	# nothing else has it look again
	wait_gone($old);
	pass("replaced, round $round: the worker of the old one ends");
	isnt(wait_for_worker($node), $old, 'another one comes');
	$session = create_session($node)->{id};
	is( wait_for_task($node, ask($node, $session, "b [[tokens=1]]"))->{status},
		'completed', 'and serves the new one');
}

# a second database
$node->safe_psql('postgres', 'CREATE DATABASE second');
$node->safe_psql('second', 'CREATE EXTENSION chat');
create_server($node, $fake, db => 'second');
wait_for_places('postgres second', 'a second database gets its own worker');
$session = create_session($node, db => 'second')->{id};
my $task = ask($node, $session, 'c [[tokens=1]]', db => 'second');
is(wait_for_task($node, $task, 'second')->{status}, 'completed', 'that works');
$node->safe_psql('second', 'DROP EXTENSION chat CASCADE');
wait_for_places('postgres', 'DROP EXTENSION there ends that one only');

# CREATE EXTENSION that is prepared
$node->safe_psql('second', 'BEGIN; CREATE EXTENSION chat; PREPARE TRANSACTION'
	  . " 'later'");
is(places(), 'postgres', 'a prepared CREATE EXTENSION brings no worker yet');
$node->safe_psql('second', "COMMIT PREPARED 'later'");
wait_for_places('postgres second', 'COMMIT PREPARED does');

# no process has crashed on the way
is(pid_of($node, qr/: chat launcher/), $launcher, 'one launcher all the time');
unlike(slurp_file($node->logfile), qr/terminated by signal|PANIC|TRAP/,
	'nothing has crashed');

done_testing();
