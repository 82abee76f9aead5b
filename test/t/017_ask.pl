# Does CALL chat.ask() give the answer, or the error, in one statement?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake, retries => 0);

# Runs SQL; returns standard output and error.
sub run_sql
{
	my ($sql) = @_;
	my ($rc, $out, $err) =
	  $node->psql('postgres', "\\set VERBOSITY verbose\n$sql");
	return ($out, $err);
}

my ($out, $err) = run_sql("CALL chat.ask('hi [[tokens=3]]');");
is($out, 't0 t1 t2 ', 'a new session: the answer');
is($err, '', 'and nothing else');
is(row($node, 'SELECT count(*) AS n FROM chat.chat_session')->{n},
	1, 'the session was made');
my $id = row($node, 'SELECT id FROM chat.chat_session')->{id};
($out, $err) = run_sql("CALL chat.ask('more [[text=second]]', '$id');");
is($out, 'second', 'in a session that there is');
is( row($node, "SELECT count(*) AS n FROM chat.chat_message"
		  . " WHERE session_id = '$id'")->{n},
	4, 'which holds both turns');
($out, $err) = run_sql("CALL chat.ask('[[refusal=No.]]');");
is($out, 'No.', 'a refusal is an answer');
($out, $err) = run_sql(
	"DO \$\$ DECLARE a text; BEGIN CALL chat.ask('[[text=in%20a%20block]]', NULL, a);"
	  . " RAISE NOTICE 'got %', a; END \$\$;");
like($err, qr/got in a block/, 'from PL/pgSQL');

# errors
($out, $err) = run_sql("CALL chat.ask('[[status=400 errmsg=not%20so]]');");
like($err, qr/ERROR:  38000: not so/, 'an endpoint\'s error is the statement\'s');
like($err, qr/DETAIL:  Task [0-9a-f-]{36} /, 'with the task');
($out, $err) = run_sql("BEGIN; CALL chat.ask('hi'); COMMIT;");
like($err, qr/ERROR:  2D000: .*transaction block/, 'not in a transaction block');
like($err, qr/stream_chat_completion/, 'and what to do instead');
($out, $err) = run_sql('CALL chat.ask(NULL);');
like($err, qr/ERROR:  22004: /, 'a message is needed');
($out, $err) =
  run_sql("CALL chat.ask('x', '00000000-0000-0000-0000-000000000000');");
like($err, qr/ERROR:  P0002: /, 'an unknown session');

# it holds no transaction while it waits (P6), and can be interrupted
my $session = create_session($node)->{id};
my $psql = $node->background_psql('postgres', on_error_stop => 0);
my $pid = $psql->query_safe('SELECT pg_backend_pid()');
$psql->query_until(qr/asking/,
	"\\echo asking\nCALL chat.ask('[[tokens=1 gate=g]]', '$session');\n\\echo over\n");
$fake->wait_at_gate('g');
wait_for($node, <<"EOF");
SELECT wait_event IS NOT NULL AND backend_xmin IS NULL
	AND backend_xid IS NULL
FROM pg_stat_activity WHERE pid = $pid
EOF
pass('P6: nothing is held while the answer is awaited');
is( row($node, "SELECT count(*) AS n FROM pg_locks WHERE pid = $pid"
		  . " AND locktype IN ('relation', 'tuple', 'transactionid')")->{n},
	0, 'P6: not even a lock');
$node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)");
$psql->query_until(qr/over/, "\n");
like($psql->{stderr}, qr/canceling statement/, 'waiting can be interrupted');
$psql->quit;
$fake->open_gate('g');
my ($task) = rows($node,
	"SELECT id FROM chat.chat_task WHERE session_id = '$session'");
is(turn_of($node, $task->{id})->{status}, 'completed', 'the turn goes on');

done_testing();
