# What does a server without places for workers, or with few descriptors, do
# to turns?  They wait for a place, and all of them end once.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Bystander;
use ChatTest::Crash;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();

# --- T8: max_worker_processes exhausted

my $what = 'max_worker_processes exhausted';
my $node = chat_cluster('workers', conf => <<'EOS');
max_logical_replication_workers = 0
max_worker_processes = 4
EOS
create_server($node, $fake);
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION twice(n int) RETURNS int LANGUAGE sql RETURN n * 2;
CREATE ROLE app LOGIN;
SELECT chat.grant_usage('app');
GRANT USAGE ON FOREIGN SERVER fake TO app;
SET ROLE app;
SELECT chat.register_tool('public.twice');
EOS

# a launcher, and the workers of three databases
my %pid = (postgres => wait_for_worker($node));
foreach my $db (qw(one two late))
{
	my $log = -s $node->logfile;
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION chat');
	create_server($node, $fake, db => $db);
	if ($db eq 'late')
	{
		$node->wait_for_log(qr/no place for a chat worker/, $log);
		next;
	}
	$pid{$db} = wait_for_worker($node, $db);
}
my $by = ChatTest::Bystander->new($node, $fake);
my $call = ask($node, create_session($node, owner => 'app')->{id},
	'call [[tool=twice args={"n":21} thentext=done]]');
my $late = ask($node, create_session($node, db => 'late')->{id},
	'late [[tokens=2]]', db => 'late');
wait_for($node, 'SELECT EXISTS (SELECT FROM chat.chat_tool_call'
	  . " WHERE task_id = '$call' AND status = 'pending')");
# a turn that needs no further process is not held up
my $other = ask($node, create_session($node)->{id}, 'other [[tokens=1]]');
is_deeply([ @{ wait_for_task($node, $other) }{qw(status error)} ],
	[ 'completed', undef ], "$what: others are not held up");
one_end($node, $other, $what);
is(messages($node, $other), 'user assistant', "$what: their messages");
is(row($node, "SELECT status FROM chat.chat_tool_call WHERE task_id = '$call'")
	  ->{status}, 'pending', "$what: a tool waits for a place");
is(row($node, "SELECT status FROM chat.chat_task WHERE id = '$late'", 'late')
	  ->{status}, 'queued', "$what: so does a turn");
my %check = map { $_->{item} => $_ } rows($node,
	'SELECT item, cure FROM chat.check_installation() WHERE NOT ok', 'late');
like($check{worker}{cure}, qr/See item max_worker_processes/,
	"$what: check_installation() says where to look");
like($check{max_worker_processes}{cure},
	qr/^ALTER SYSTEM SET max_worker_processes = 1\d; and restart/,
	"$what: and what cures it");
$by->check($what, undisturbed => 1);
$node->safe_psql('postgres', 'DROP DATABASE one; ');
$node->safe_psql('postgres', 'DROP DATABASE two; ');
is_deeply([ @{ wait_for_task($node, $late, 'late') }{qw(status error)} ],
	[ 'completed', undef ], "$what: with a place the turn completes");
one_end($node, $late, $what, 'late');
is(messages($node, $late, 'late'), 'user assistant', "$what: its messages");
is_deeply([ @{ wait_for_task($node, $call) }{qw(status error)} ],
	[ 'completed', undef ], "$what: and so does the tool's");
one_end($node, $call, $what);
is(messages($node, $call), 'user assistant tool assistant',
	"$what: its messages");
is( row($node, "SELECT content FROM chat.chat_message WHERE role = 'tool'"
		  . " AND task_id = '$call'")->{content},
	'42', "$what: and the tool's result");
is(wait_for_worker($node), $pid{postgres}, "$what: the worker was not harmed");
$node->stop;

# --- too few descriptors: the server inherits the limit of this process

$what = 'few descriptors';
system_or_bail('prlimit', '--pid', $$, '--nofile=220:220');
$node = chat_cluster('files', conf => <<'EOS');
max_files_per_process = 100
log_min_messages = warning
EOS
create_server($node, $fake);
wait_for_worker($node);
my $limit = row($node, 'SELECT stream_limit FROM chat.worker_status()')
  ->{stream_limit};
cmp_ok($limit, '<', 120, "$what: the worker knows how many streams it can have");
cmp_ok($limit, '>', 15, "$what: and has some ($limit)");
my $check = row($node,
	"SELECT ok, cure FROM chat.check_installation() WHERE item = 'descriptors'");
is($check->{ok}, JSON::PP::false, "$what: check_installation() says so");
like($check->{cure}, qr/LimitNOFILE=5164 .*ulimit -n/, "$what: and what cures it");
$by = ChatTest::Bystander->new($node, $fake);
my @turns = start_turns($node, 300, 'many [[tokens=4 gateat=2:v]]');
$fake->get_json('/gate/v?wait=' . ($limit - 10));
is(row($node, 'SELECT open_streams FROM chat.worker_status()')->{open_streams},
	$limit, "$what: no more streams than that are open");
$fake->open_gate('v', 300);
wait_for($node, 'SELECT count(*) FILTER (WHERE finished_at IS NOT NULL) >='
	  . " 300 FROM chat.chat_task");
is_deeply(
	[
		rows($node, <<'EOS')
SELECT t.status, t.error, count(*) AS n,
	bool_and((SELECT count(*) = 1 FROM chat.chat_event AS e
		WHERE e.task_id = t.id
			AND e.payload->>'type' IN ('finish', 'abort'))) AS one_end,
	bool_and((SELECT array_agg(m.role ORDER BY m.sequence)
			= '{user,assistant}' FROM chat.chat_message AS m
		WHERE m.task_id = t.id)) AS pairs,
	bool_and((SELECT m.content = 't0 t1 t2 t3 ' FROM chat.chat_message AS m
		WHERE m.task_id = t.id AND m.role = 'assistant')) AS texts
FROM chat.chat_task AS t WHERE t.finished_at IS NOT NULL GROUP BY 1, 2
EOS
	],
	[
		{
			status => 'completed',
			error => undef,
			n => 300,
			one_end => JSON::PP::true,
			pairs => JSON::PP::true,
			texts => JSON::PP::true
		}
	],
	"$what: more turns than that all complete, once");
$by->check($what, undisturbed => 1);
unlike(slurp_file($node->logfile), qr/too many open files|out of file desc/i,
	"$what: nothing has run out of them");

done_testing();
