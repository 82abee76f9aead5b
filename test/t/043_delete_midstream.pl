# Does a session that is deleted in the middle of an answer end its request
# at once, and nothing else (T23)?

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
my $worker = wait_for_worker($node);

my @doomed = start_turns($node, 3, 'doomed [[tokens=4 gateat=2:g]]');
my @others = start_turns($node, 3, 'other [[tokens=4 gateat=2:h]]');
$fake->get_json('/gate/g?wait=3');
$fake->get_json('/gate/h?wait=3');

# a rolled back delete does nothing
$node->safe_psql('postgres',
	"BEGIN; SELECT chat.delete_chat_session('$doomed[0]{session}'); ROLLBACK");
is($fake->stats->{active}, 6, 'a delete that is rolled back ends nothing');

is( $node->safe_psql('postgres',
		"SELECT chat.delete_chat_session('$doomed[0]{session}')"),
	't', 'delete_chat_session() in the middle of an answer');
$fake->wait_for_stats(sub { $_->{aborted} == 1 });
pass('T23: the request ends at once');
# two at once, and by SQL
$node->safe_psql('postgres', 'DELETE FROM chat.chat_session WHERE id IN ('
	  . join(', ', map { literal($_->{session}) } @doomed[ 1, 2 ])
	  . ')');
$fake->wait_for_stats(sub { $_->{aborted} == 3 });
pass('so it does for every way to delete');
is(scalar(grep { $_->{aborted} } $fake->completions), 3,
	'the endpoint saw its client leave');

# in a transaction that somebody prepared
my ($prepared) = start_turns($node, 1, 'prepared [[tokens=2 gateat=1:p]]');
$fake->wait_at_gate('p');
$node->safe_psql('postgres',
	    "BEGIN; SELECT chat.delete_chat_session('$prepared->{session}');"
	  . " PREPARE TRANSACTION 'delete'");
is($fake->stats->{aborted}, 3, 'a prepared delete waits');
$node->safe_psql('postgres', "COMMIT PREPARED 'delete'");
$fake->wait_for_stats(sub { $_->{aborted} == 4 });
pass('COMMIT PREPARED ends the request');

# deleted between the last byte and the end
my ($late) = start_turns($node, 1, 'late [[tokens=2 gateat=1:l]]');
$fake->wait_at_gate('l');
my $psql = session($node);
$psql->query_safe('BEGIN');
$psql->query_safe("SELECT chat.delete_chat_session('$late->{session}')");
$fake->open_gate('l');
$fake->wait_for_stats(sub { $_->{active} == 3 });
$psql->query_safe('COMMIT');
$psql->quit;
wait_for($node, 'SELECT open_streams = 3 FROM chat.worker_status()');
pass('a session that goes while its end waits for it');

$fake->open_gate('h', 3);
is(wait_for_task($node, $_->{task})->{status}, 'completed', 'the others end')
  foreach @others;
is(row($node, 'SELECT count(*) FROM chat.chat_task')->{count}, 3,
	'of the deleted ones nothing is left');
is(wait_for_worker($node), $worker, 'the worker has stayed');

# a delete while the message still waits in the queue, and all of it at once
my ($busy) = start_turns($node, 1, 'busy [[tokens=2 gateat=1:b]]');
ask($node, $busy->{session}, "queued $_") foreach 1 .. 3;
$fake->wait_at_gate('b');
my $before = $fake->stats->{requests};
$node->safe_psql('postgres', 'TRUNCATE chat.chat_session CASCADE');
$fake->wait_for_stats(sub { $_->{active} == 0 });
my ($fresh) = start_turns($node, 1, 'fresh [[tokens=1]]');
is(wait_for_task($node, $fresh->{task})->{status}, 'completed',
	'TRUNCATE of all sessions');
is($fake->stats->{requests} - $before, 1, 'what was queued is not asked');

done_testing();
