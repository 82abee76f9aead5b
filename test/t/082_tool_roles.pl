# P7: does a tool run as the role that owns the session, with that role's
# rights and no others, whatever it tries; and is a role that cannot run tools
# told so?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Tools;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $node = tool_cluster($fake);
my $user = $node->safe_psql('postgres', 'SELECT current_user');

# a tool that runs any statement and says what came of it
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION app.try(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	result text;
BEGIN
	IF statement LIKE 'SELECT %' THEN
		EXECUTE statement INTO result;
	ELSE
		EXECUTE statement;
	END IF;
	RETURN concat_ws(' ', 'ok', result);
EXCEPTION WHEN OTHERS THEN
	RETURN SQLSTATE;
END $$;
CREATE FUNCTION app.query(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	result text;
BEGIN
	EXECUTE statement INTO result;
	RETURN result;
END $$;
CREATE FUNCTION app.do(statements text[]) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	s text;
BEGIN
	FOREACH s IN ARRAY statements LOOP
		EXECUTE s;
	END LOOP;
	RETURN 'done';
END $$;
CREATE ROLE team NOLOGIN;
GRANT team TO bob;
CREATE TABLE app.of_bob (secret text);
INSERT INTO app.of_bob VALUES ('hidden');
ALTER TABLE app.of_bob OWNER TO bob;
CREATE SCHEMA ann AUTHORIZATION ann;
EOS
register($node, $_, function => 'app.try') foreach qw(ann bob);
register($node, 'ann', function => 'app.do');
register($node, 'ann', function => 'app.query');
register($node, 'bob', function => 'app.query');

# Runs statements, each by a call of the tool; returns the results.
sub try
{
	my ($role, $tool, @statements) = @_;
	my $calls = join ' ', map {
		"tool=$tool id=c$_ args="
		  . value(encode(ref $statements[$_] ? { statements => $statements[$_] } : { statement => $statements[$_] }))
	} 0 .. $#statements;
	my $session = create_session($node, owner => $role);
	my $turn = turn_of($node, ask($node, $session->{id}, "[[$calls]]"));

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	sound($turn, $node, "calls of $role");
	return map { $_->{content} } grep { $_->{role} eq 'tool' } @{ $turn->{messages} };
}

my $bobs = create_session($node, owner => 'bob')->{id};
wait_for_task($node, ask($node, $bobs, 'my secret [[tokens=1]]'));

# who it is, and whom it cannot become
my @who = (
	q(SELECT concat_ws(' ', current_user, session_user, current_setting('is_superuser'))),
	"SET ROLE bob", "SET ROLE $user", "SET SESSION AUTHORIZATION bob",
	"SET SESSION AUTHORIZATION $user", 'RESET SESSION AUTHORIZATION', 'RESET ROLE',
	q(SELECT concat_ws(' ', current_user, session_user, current_setting('is_superuser'))),
	'SELECT count(*) FROM pg_authid', 'CREATE ROLE evil SUPERUSER',
	q(COPY app.of_bob FROM PROGRAM 'true'), q(SELECT pg_read_file('/etc/passwd')),
	"ALTER SYSTEM SET chat.tool_workers = 1", q(SET session_replication_role = replica),
	q(SET chat.tool_timeout = '1h'));
is_deeply(
	[ try('ann', 'try', @who) ],
	[
		'ok ann ann off', '42501', '42501', '42501', '42501', 'ok', 'ok', 'ok ann ann off',
		'42501', '42501', '42501', '42501', '25001', '42501', '55P02'
	],
	'T17: a tool is its role and becomes nobody else');

# what belongs to somebody else
is_deeply(
	[
		try('ann', 'try',
			'SELECT secret FROM app.of_bob', 'SELECT count(*) FROM chat.chat_session WHERE owner <> \'ann\'::regrole',
			"SELECT chat.get_chat_session('$bobs')", "SELECT count(*) FROM chat.get_chat_messages('$bobs')",
			"SELECT content FROM chat.chat_message WHERE session_id = '$bobs'",
			"SELECT chat.add_chat_message('$bobs', 'user', 'x')", "SELECT chat.delete_chat_session('$bobs')",
			"SELECT chat.stream_chat_completion('$bobs', 'x')",
			"SELECT count(*) FROM chat.chat_tool WHERE owner <> 'ann'::regrole",
			"SELECT chat.create_chat_session(owner => 'bob')",
			'INSERT INTO chat.chat_job DEFAULT VALUES', 'SELECT count(*) FROM chat.chat_job',
			"UPDATE chat.chat_tool_call SET result = 'x'",
			'CREATE TABLE app.x ()', 'CREATE TABLE chat.x ()',
			'SELECT umoptions FROM pg_user_mapping',
			'SELECT coalesce(umoptions::text, \'nothing\') FROM pg_user_mappings WHERE srvname = \'fake\'')
	],
	[
		'42501', 'ok 0', 'ok', 'ok 0', 'ok', 'P0002', 'ok false', 'P0002', 'ok 0', '42501', '42501', '42501',
		'42501', '42501', '42501', '42501', 'ok nothing'
	],
	'T17: other owners are as if they were not there');

# what it leaves for others to fall over: objects that hide the built-in ones
my @traps = (
	'CREATE TABLE ann.trap (who text)',
	'CREATE FUNCTION ann.now() RETURNS timestamptz LANGUAGE sql AS $$ INSERT INTO ann.trap VALUES (current_user); SELECT null::timestamptz $$',
	'CREATE FUNCTION ann.op(bigint, bigint) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN INSERT INTO ann.trap VALUES (current_user); RETURN true; END $$',
	'CREATE OPERATOR ann.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = ann.op)',
	'CREATE FUNCTION ann.to_json(anyelement) RETURNS text LANGUAGE sql AS $$ SELECT \'trapped\' $$',
	'CREATE VIEW ann.chat_tool_call AS SELECT 1 AS trapped',
	'GRANT INSERT ON ann.trap TO PUBLIC', 'GRANT USAGE ON SCHEMA ann TO PUBLIC',
	'ALTER ROLE ann SET search_path = ann, pg_catalog, chat',
	"ALTER ROLE ann SET statement_timeout = '1ms'", 'ALTER ROLE ann SET default_transaction_read_only = on',
	"ALTER ROLE ann SET role = 'ann'");
is_deeply([ try('ann', 'do', \@traps) ], ['done'], 'a role sets traps');
my @results = try('ann', 'query',
	'SELECT 1', "SELECT current_setting('search_path')");
is_deeply(\@results, [ '1', 'ann, pg_catalog, chat' ], 'its tools run with its own settings');
is_deeply([ try('bob', 'query', 'SELECT 1', "SELECT current_setting('search_path')") ],
	[ '1', '"$user", public' ], "and others' with theirs");
is_deeply([ rows($node, 'SELECT who FROM ann.trap') ], [], 'T16, T17: nobody has stepped into a trap');
$node->safe_psql('postgres', 'ALTER ROLE ann RESET ALL');

# a member of a role runs that role's tools as that role, not as itself
$node->safe_psql('postgres', "SELECT chat.grant_usage('team'); GRANT USAGE ON FOREIGN SERVER fake TO team;"
	  . 'GRANT USAGE ON SCHEMA app TO team; ALTER ROLE team LOGIN');
register($node, 'team', function => 'app.query');
is_deeply([ try('team', 'query', "SELECT current_user || ' ' || session_user") ], ['team team'],
	"a role's session");

# shared tools run as the owner of the session, too
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION app.me() RETURNS text LANGUAGE sql AS 'SELECT current_user::text';
SET chat.enable_superuser_tools = on;
SELECT chat.register_tool('app.me', shared => true);
EOS
is_deeply([ try($_, 'me', '') ], [$_], "a shared tool runs as $_") foreach qw(ann bob);

# roles that cannot run tools: the call says why
sub refused
{
	my ($role, $why, $what) = @_;
	my ($result) = try($role, 'query', 'SELECT 1');
	my $error = eval { decode($result) };

	is(ref $error ? $error->{code} : $result, 'tool_not_available', "$what: the call is refused");
	like($error->{message}, $why, '  and says why') if ref $error;
	return;
}

$node->safe_psql('postgres', 'REVOKE CONNECT ON DATABASE postgres FROM PUBLIC; GRANT CONNECT ON DATABASE postgres TO bob, team');
refused('ann', qr/may not connect to the database/, 'no CONNECT');
my ($rc, $out, $err) = $node->psql('postgres', "SET ROLE ann; SELECT chat.register_tool('app.query')");
like($err, qr/CONNECT|connect/, '  register_tool says so, too');
is_deeply([ try('bob', 'query', 'SELECT 1') ], ['1'], '  others go on');
$node->safe_psql('postgres', 'GRANT CONNECT ON DATABASE postgres TO PUBLIC');
is_deeply([ try('ann', 'query', 'SELECT 1') ], ['1'], '  and it does again once it may');
SKIP:
{
	skip 'a role without LOGIN can run tools from 17 on', 4 if $node->pg_version >= 17;
	$node->safe_psql('postgres', 'ALTER ROLE team NOLOGIN');
	refused('team', qr/may not log in/, 'NOLOGIN');
	($rc, $out, $err) = $node->psql('postgres', "SET ROLE team; SELECT chat.register_tool('app.query')");
	like($err, qr/LOGIN/, '  register_tool says so, too');
}
$node->safe_psql('postgres', 'ALTER ROLE bob SUPERUSER');
refused('bob', qr/is a superuser and chat\.enable_superuser_tools is off/, 'a superuser');
$node->safe_psql('postgres', 'ALTER SYSTEM SET chat.enable_superuser_tools = on; SELECT pg_reload_conf()');
wait_for($node, "SELECT current_setting('chat.enable_superuser_tools') = 'on'");
is_deeply([ try('bob', 'query', "SELECT current_user::text") ], ['bob'], '  unless it is allowed');
$node->safe_psql('postgres', 'ALTER SYSTEM RESET chat.enable_superuser_tools; ALTER ROLE bob NOSUPERUSER; SELECT pg_reload_conf()');

# a worker that cannot start: it is tried a few times, then the call fails, and
# nobody else waits for that
register($node, 'ann', function => 'app.me', name => 'ask_me', approval => 'ask');
$node->safe_psql('postgres', "ALTER ROLE ann SET lock_timeout = '10ms'");
my ($session, $task) = start($node, '[[tool=ask_me id=a]]');
wait_for_calls($node, $task, 'approval', 1);
my $locker = $node->background_psql('postgres');
$locker->query_safe('BEGIN; LOCK TABLE chat.chat_tool');
as_role($node, 'ann', "SELECT chat.approve_tool_call('$session', 'a')");
wait_for($node, "SELECT status = 'failed' FROM chat.chat_tool_call WHERE task_id = '$task'");
$locker->query_safe('ROLLBACK');
my $turn = turn_of($node, $task);
like((calls($node, $task))[0]{shown}, qr/no tool worker could be started/, 'no process can be had: the call says so');
sound($turn, $node, 'no process can be had');
$node->safe_psql('postgres', 'ALTER ROLE ann RESET lock_timeout');
is_deeply([ try('ann', 'query', 'SELECT 1') ], ['1'], '  and later one can');
$locker->quit;

# a role that is dropped while its call waits: the call and the task end
$node->safe_psql('postgres', 'CREATE ROLE gone LOGIN; GRANT USAGE ON SCHEMA app TO gone;'
	  . "SELECT chat.grant_usage('gone'); GRANT USAGE ON FOREIGN SERVER fake TO gone");
register($node, 'gone', function => 'app.me', name => 'ask_me', approval => 'ask');
($session, $task) = start($node, '[[tool=ask_me id=a]]', owner => 'gone');
wait_for_calls($node, $task, 'approval', 1);
$node->safe_psql('postgres', 'DROP OWNED BY gone; DROP ROLE gone;'
	  . "SELECT chat.approve_tool_call('$session', 'a')");
$turn = turn_of($node, $task);
is($turn->{status}, 'failed', 'T69: the role of a call is dropped: its task ends');
like((calls($node, $task))[0]{shown}, qr/owner role does not exist any more.*tool_not_available/,
	'  and its call says why');
sound($turn, $node, 'a role that is dropped');

# T27: a role with many calls does not keep the others from theirs
register($node, $_, function => 'app.query', name => 'wait') foreach qw(ann bob);
$node->safe_psql('postgres', 'ALTER SYSTEM SET chat.tool_workers = 1; SELECT pg_reload_conf()');
wait_for($node, "SELECT current_setting('chat.tool_workers') = '1'");
$locker = $node->background_psql('postgres');
$locker->query_safe('SELECT pg_advisory_lock(1)');
my $wait = '[[tool=wait id=a args=' . value(encode({ statement => 'SELECT pg_advisory_xact_lock_shared(1)' })) . ']]';
my @anns = map { (start($node, $wait))[1] } 1 .. 4;
wait_for($node, "SELECT count(*) = 4 FROM chat.chat_tool_call WHERE task_id IN ('" . join("', '", @anns) . "')");
my $bobs_task = (start($node, $wait, owner => 'bob'))[1];
wait_for($node, "SELECT count(*) = 1 FROM chat.chat_tool_call WHERE task_id = '$bobs_task'");
wait_for($node, "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted");
$locker->query_safe('SELECT pg_advisory_unlock(1)');
wait_for_task($node, $_) foreach @anns, $bobs_task;
is_deeply([ map { $_->{owner} } rows($node, 'SELECT s.owner FROM chat.chat_tool_call AS c JOIN chat.chat_session AS s'
		  . " ON s.id = c.session_id WHERE c.name = 'wait' ORDER BY c.started_at") ],
	[qw(ann bob ann ann ann)], 'T27: roles have tool workers in turn');
$node->safe_psql('postgres', 'ALTER SYSTEM RESET chat.tool_workers; SELECT pg_reload_conf()');
$locker->quit;

# a role whose default isolation sees the past: a collision is tried again
$node->safe_psql('postgres', <<'EOS');
CREATE TABLE app.counter (n integer);
INSERT INTO app.counter VALUES (0);
GRANT ALL ON app.counter TO ann;
CREATE FUNCTION app.count() RETURNS text LANGUAGE sql AS $$
	UPDATE app.counter SET n = n + 1;
	SELECT current_setting('transaction_isolation') $$;
ALTER ROLE ann SET default_transaction_isolation = 'serializable';
EOS
register($node, 'ann', function => 'app.count');
is_deeply([ try('ann', 'count', ('') x 8) ], [ ('serializable') x 8 ],
	'calls of a role with another isolation level');
is(row($node, 'SELECT n FROM app.counter')->{n}, 8, '  have their effect once');

$node->stop;
done_testing();
