# P5: does a caller never wait for us?  It takes no NOTIFY lock and locks no
# row but its session's, and the worker wakes by latch at the commit (T29).

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use Test::More;

# the tokens of local commits do not wait for the standby that is not there
my $fake = start_fake();
my $node = chat_cluster('main', allows_streaming => 1,
	conf => "synchronous_commit = local\nsynchronous_standby_names = 'nobody'");
create_server($node, $fake);

my ($mine, $other) = map { create_session($node)->{id} } 1 .. 2;
my $caller = session($node);
my $pid = $caller->query_safe('SELECT pg_backend_pid()');
$caller->query_safe('BEGIN');
my $task = $caller->query_safe(
	"SELECT chat.stream_chat_completion('$mine', 'hello [[tokens=1]]')");
my @locks = rows($node,
	    "SELECT locktype, mode, relation::regclass::text AS relation"
	  . " FROM pg_locks WHERE pid = $pid AND locktype NOT IN"
	  . " ('virtualxid', 'transactionid')");
is_deeply([ grep { $_->{locktype} ne 'relation' } @locks ],
	[], 'an open call holds locks of relations only');
is_deeply([ grep { $_->{mode} !~ /^(Access|Row)ShareLock$|^RowExclusiveLock$/ } @locks ],
	[], 'that conflict with no reader and no writer');

# its row locks, by trying to take them
my $others = $node->safe_psql('postgres',
	"SELECT array_agg(id) FROM (SELECT id FROM chat.chat_session"
	  . " FOR UPDATE SKIP LOCKED) AS s");
is($others, "{$other}", 'it has locked its session\'s row and no other');
is($node->safe_psql('postgres', 'SELECT count(*) FROM (SELECT FROM chat.chat_job'
	  . ' FOR UPDATE) AS j'), 0, 'nothing of the queue');
$caller->query_safe('COMMIT');
wait_for_task($node, $task);

# T29: somebody holds the lock of all who notify, in a commit that does not
# end; callers commit all the same
my $notifier = session($node);
my $blocker = $notifier->query_safe('SELECT pg_backend_pid()');
$notifier->query_safe("SET synchronous_commit = on");
$notifier->query_until(qr/committing/,
	"\\echo committing\nBEGIN;\nCREATE TABLE t ();\nNOTIFY x;\nCOMMIT;\n");
wait_for($node, "SELECT count(*) = 1 FROM pg_locks WHERE pid = $blocker"
	  . " AND locktype = 'object' AND database = 0 AND objid = 0 AND granted");
my @tasks;
push @tasks, ask($node, create_session($node)->{id}, "held $_ [[tokens=1]]")
  foreach 1 .. 3;
push @tasks, ask($node, $mine, 'held [[tokens=1]]');
$node->safe_psql('postgres',
	    "BEGIN; SELECT chat.stream_chat_completion('$other', 'two [[tokens=1]]');"
	  . " PREPARE TRANSACTION 'held'");
$node->safe_psql('postgres', "COMMIT PREPARED 'held'");
pass('T29: callers commit while somebody holds the NOTIFY lock');
wait_for($node, "SELECT count(*) = 1 FROM pg_locks WHERE pid = $blocker"
	  . " AND locktype = 'object' AND database = 0 AND granted");
is(row($node, 'SELECT count(*) FROM chat.chat_task WHERE finished_at IS NULL')
	  ->{count}, 5, 'their tasks wait');
my $worker = wait_for_worker($node);
# its wait for the standby ends; what it did is committed
$node->safe_psql('postgres', "SELECT pg_cancel_backend($blocker)");
is(wait_for_task($node, $_)->{status}, 'completed', 'and run after it')
  foreach @tasks;
wait_for($node,
	'SELECT count(*) = 0 FROM chat.chat_task WHERE finished_at IS NULL');
is(wait_for_worker($node), $worker, 'the worker has waited it out');

# waking: the worker has no other reason to look than the latch at commit
my @last = start_turns($node, 20, 'wake [[tokens=1]]');
wait_for_task($node, $_->{task}) foreach @last;
pass('the commit wakes the worker');
$node->safe_psql('postgres', 'SELECT count(chat.create_chat_session(title => g::text))'
	  . ' FROM generate_series(1, 3) AS g');
foreach my $session (map { $_->{id} } rows($node,
	'SELECT id FROM chat.chat_session ORDER BY created_at DESC LIMIT 3'))
{
	$node->safe_psql('postgres',
		"BEGIN; SELECT chat.stream_chat_completion('$session', 'x [[tokens=1]]');"
		  . " PREPARE TRANSACTION 'wake'");
	$node->safe_psql('postgres', "COMMIT PREPARED 'wake'");
}
wait_for($node,
	'SELECT count(*) = 0 FROM chat.chat_task WHERE finished_at IS NULL');
pass('and COMMIT PREPARED does');

# A table that only this process sees: a rolled back TRUNCATE of the queue
$caller->query_safe('BEGIN');
$caller->query_safe('TRUNCATE chat.chat_job');
my $slow = session($node);
$slow->query_until(qr/asking/, "\\echo asking\nSELECT"
	  . " chat.stream_chat_completion('$mine', 'late [[tokens=1]]');\n");
wait_for($node, "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"
	  . " AND relation = 'chat.chat_job'::regclass");
$caller->query_safe('ROLLBACK');
wait_for($node, "SELECT count(*) = 1 FROM chat.chat_task WHERE status ="
	  . " 'completed' AND session_id = '$mine' AND created_at >= all"
	  . " (SELECT created_at FROM chat.chat_task WHERE session_id = '$mine')");
pass('a call that had to wait for a lock runs after it');
$_->quit foreach $caller, $slow;

done_testing();
