# P1: is a turn part of the transaction that asks for it?  Rolled back, no
# request is ever made; committed, it runs, whatever happens next; prepared,
# it waits for COMMIT PREPARED (T24, T37).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main', conf => 'wal_writer_delay = 10s');
create_server($node, $fake);

my $session = create_session($node)->{id};
my $call = "SELECT chat.stream_chat_completion('$session', 'MESSAGE [[tokens=2]]')";

# Returns the call with a message.
sub call
{
	my ($message) = @_;
	return $call =~ s/MESSAGE/$message/r;
}

# Returns the user messages of all requests that were made.
sub asked
{
	return map { $_->{body}{messages}[-1]{content} =~ /^(\w+)/ } $fake->completions;
}

# Waits until all tasks have ended.
sub all_ended
{
	wait_for($node,
		"SELECT count(*) = 0 FROM chat.chat_task WHERE finished_at IS NULL");
	return;
}

# rollback
$node->safe_psql('postgres', 'BEGIN; ' . call('undone') . '; ROLLBACK');
is(row($node, 'SELECT count(*) FROM chat.chat_task')->{count}, 0,
	'a rollback leaves no task');
is(row($node, 'SELECT count(*) FROM chat.chat_job')->{count}, 0, 'and no job');
$node->safe_psql('postgres',
	    'BEGIN; '
	  . call('kept')
	  . '; SAVEPOINT a; '
	  . call('back')
	  . '; ROLLBACK TO a; '
	  . call('also')
	  . '; COMMIT');
all_ended();
is_deeply([ asked() ], [qw(kept also)],
	'a rolled back savepoint takes its turn with it, and no other');
my ($ret, $out, $err) = $node->psql('postgres',
	'BEGIN; ' . call('failed') . '; SELECT 1/0; COMMIT');
like($err, qr/division by zero/, 'a transaction that fails');
all_ended();
is(scalar(asked()), 2, 'has asked nobody');

# in the transaction that creates the session, and nothing before the commit
$fake->forget;
my $psql = session($node);
$psql->query_safe('BEGIN');
my $task = $psql->query_safe('SELECT chat.stream_chat_completion'
	  . "((chat.create_chat_session()).id, 'fresh [[tokens=2]]')");
my $other = ask($node, $session, 'other [[tokens=2]]');
is(wait_for_task($node, $other)->{status}, 'completed', 'others run');
is_deeply([ asked() ], ['other'], 'nothing happens before the commit');
$psql->query_safe('COMMIT');
is(wait_for_task($node, $task)->{status}, 'completed', 'the commit starts it');
$psql->quit;

# 2PC (T37)
$fake->forget;
$node->safe_psql('postgres',
	'BEGIN; ' . call('prepared') . "; PREPARE TRANSACTION 'yes'");
my $second = create_session($node)->{id};
$node->safe_psql('postgres',
	"BEGIN; SELECT chat.stream_chat_completion('$second', 'never [[tokens=1]]');"
	  . " PREPARE TRANSACTION 'no'");
my $bystander = create_session($node)->{id};
wait_for_task($node, ask($node, $bystander, 'bystander [[tokens=1]]'));
is_deeply([ asked() ], ['bystander'], 'T37: what is prepared waits');
$node->safe_psql('postgres', "ROLLBACK PREPARED 'no'");
$node->safe_psql('postgres', "COMMIT PREPARED 'yes'");
$fake->wait_for_stats(sub { $_->{active} == 0 && (asked()) > 1 });
all_ended();
is_deeply([ asked() ], [qw(bystander prepared)],
	'T37: COMMIT PREPARED starts it, ROLLBACK PREPARED does not');

# durable: all processes killed as soon as the commit has returned (T24)
$fake->forget;
$task = ask($node, $session, 'durable [[tokens=5]]');
kill_everything($node);
$node->start;
is(wait_for_task($node, $task)->{status}, 'completed',
	'T24: a committed turn survives a crash');
is( row($node, "SELECT content FROM chat.chat_message"
		  . " WHERE task_id = '$task' AND role = 'assistant'")->{content},
	't0 t1 t2 t3 t4 ', 'with its answer');

# the same before any worker has seen it
$node->append_conf('postgresql.conf', 'chat.enabled = off');
$node->restart;
$fake->forget;
$task = ask($node, $session, 'unseen [[tokens=2]]');
$node->safe_psql('postgres',
	"BEGIN; SELECT chat.stream_chat_completion('$second', 'twophase [[tokens=1]]');"
	  . " PREPARE TRANSACTION 'crash'");
kill_everything($node);
$node->append_conf('postgresql.conf', 'chat.enabled = on');
$node->start;
is(wait_for_task($node, $task)->{status}, 'completed',
	'T24: also one that no worker had seen');
is_deeply([ asked() ], ['unseen'], 'once');
$node->safe_psql('postgres', "COMMIT PREPARED 'crash'");
all_ended();
is_deeply([ asked() ], [qw(unseen twophase)],
	'a prepared turn survives, too');
is(row($node, 'SELECT count(*) FROM chat.chat_job')->{count}, 0,
	'no job is left');

done_testing();
