# Does an SQL tool take its arguments by name, return what it returns, run in
# one transaction with its result, and leave nothing behind for the next call?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use ChatTest::Crash;
use ChatTest::Tools;
use PostgreSQL::Test::Utils;
use Test::More;

my $fake = start_fake();
my $node = tool_cluster($fake, "log_min_messages = debug1\njit = on");

# Creates functions of schema app; registers for ann what CREATE FUNCTION (not
# CREATE OR REPLACE) makes.
sub tools
{
	my ($sql, @more) = @_;

	$node->safe_psql('postgres', $sql);
	register($node, 'ann', function => "app.$_", @more)
	  foreach $sql =~ /CREATE FUNCTION app\.(\w+)/g;
	return;
}

# Returns name(args) as directives for the endpoint: name => object, ...
sub directives
{
	my @pairs = @_;
	my ($text, $n) = ('', 0);

	while (my ($name, $args) = splice @pairs, 0, 2)
	{
		$text .= sprintf 'tool=%s args=%s id=c%d ', $name, value(encode($args)), ++$n;
	}
	return $text;
}

# Calls tools in one step of a new session; returns what the model was told of
# each: the text, or the error as [code, message].
sub call
{
	my @pairs = @_;
	my (undef, $task) = start($node, '[[' . directives(@pairs) . ']]');
	my $turn = turn_of($node, $task);
	my $what = join ' ', map { $pairs[ 2 * $_ ] } 0 .. $#pairs / 2;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	sound($turn, $node, $what);
	return map { told($_->{content}) } grep { $_->{role} eq 'tool' } @{ $turn->{messages} };
}

# Returns a result as call() does.
sub told
{
	my ($content) = @_;
	my $error = $content =~ /^\{"type" ?: ?"error"/ ? decode($content) : return $content;

	return [ @$error{qw(code message)} ];
}

#
# Arguments
#
tools(<<'EOS');
CREATE TYPE app.mood AS ENUM ('good', 'bad');
CREATE TYPE app.point AS (x integer, y numeric);
CREATE DOMAIN app.even AS integer CHECK (VALUE % 2 = 0);
CREATE FUNCTION app.types(i integer DEFAULT -1, n numeric DEFAULT -1, b boolean DEFAULT NULL,
	d date DEFAULT NULL, a integer[] DEFAULT NULL, m app.mood DEFAULT NULL,
	j jsonb DEFAULT '"absent"', p app.point DEFAULT NULL, ps app.point[] DEFAULT NULL,
	e app.even DEFAULT NULL, t text DEFAULT 'absent', u uuid DEFAULT NULL, "Big ""X" text DEFAULT NULL)
RETURNS text LANGUAGE sql AS $$
	SELECT concat_ws('|', i, n, b, d, a::text, m, j, p::text, ps::text, e, t, u, "Big ""X")
$$;
CREATE FUNCTION app.document(doc jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT doc';
CREATE FUNCTION app.rest(a integer, others json) RETURNS text LANGUAGE sql AS $$ SELECT a || others::text $$;
CREATE FUNCTION app.part(doc jsonb) RETURNS text LANGUAGE sql AS 'SELECT doc::text';
EOS
register($node, 'ann', function => 'app.document', parameters => '{"type": "object", "properties": {"a": {}}}');
register($node, 'ann', function => 'app.rest',
	parameters => '{"type": "object", "properties": {"a": {"type": "integer"}}}');
is_deeply(
	[
		call(
			types => {},
			types => { i => 7, n => '1.50', b => \1, d => '2024-02-29', a => [ 1, undef, 3 ], m => 'bad' },
			types => {
				j => { k => [ 1, 'x' ] }, p => { x => 1, y => 2.5 }, ps => [ { x => 3 } ],
				e => 4, t => '7', u => 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11', 'Big "X' => 'x'
			},
			types => { i => '12', t => undef, j => undef },
			types => { i => 1, unknown => 'is ignored', t => "'; DROP TABLE x; --" })
	],
	[
		'-1|-1|"absent"|absent',
		'7|1.50|t|2024-02-29|{1,NULL,3}|bad|"absent"|absent',
		'-1|-1|{"k": [1, "x"]}|(1,2.5)|{"(3,)"}|4|7|a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11|x',
		'12|-1',
		q(1|-1|"absent"|'; DROP TABLE x; --)
	],
	'arguments by name, cast to their types; absent is the DEFAULT, null is NULL');
is_deeply(
	[
		map { $_->[0] } call(
			types => { i => 'seven' }, types => { i => 1e10 }, types => { d => '2023-02-29' },
			types => { a => 'x' }, types => { m => 'so so' }, types => { e => 3 },
			types => { p => { x => 'x' } }, types => { i => { a => 1 } }, types => { u => 'x' })
	],
	[ '22P02', '22003', '22008', '22P02', '22P02', '23514', '22P02', '22P02', '22P02' ],
	'a cast that fails is the result');
is_deeply(
	[ call(document => { a => 1, b => [2] }, rest => { a => 1, b => 2 }, part => { doc => { a => 1 } }) ],
	[ '{"a": 1, "b": [2]}', '1{"a": 1, "b": 2}', '{"a": 1}' ],
	'a json argument that the schema does not name takes the whole object');

# what the schema does not name takes its DEFAULT or the object, whatever the
# model sends; other functions of the same name are others
tools(<<'EOS');
CREATE FUNCTION app.discount(percent integer, unlimited boolean DEFAULT false, by text DEFAULT current_user)
RETURNS text LANGUAGE sql AS $$ SELECT concat_ws(' ', percent, unlimited, by) $$;
CREATE FUNCTION app.both(a jsonb DEFAULT '1', b jsonb DEFAULT '2') RETURNS text LANGUAGE sql AS $$ SELECT concat_ws(' ', a, b) $$;
CREATE FUNCTION app.named(doc jsonb, "Else" integer DEFAULT 7, n bigint DEFAULT 8)
RETURNS text LANGUAGE sql AS $$ SELECT concat_ws(' ', doc, "Else", n) $$;
EOS
my $percent = '{"type": "object", "properties": {"percent": {"type": "integer"}}}';
register($node, 'ann', function => 'app.discount', parameters => $percent);
register($node, 'ann', function => 'app.both', parameters => '{"type": "object", "properties": {}}');
register($node, 'ann', function => 'app.named', parameters => '{"type": "object", "properties": {"x": {}}}');
$node->safe_psql('postgres', <<'EOS');
CREATE FUNCTION app.over(a text) RETURNS text LANGUAGE sql AS $$ SELECT 'one' $$;
CREATE FUNCTION app.over(a text, b integer DEFAULT 1) RETURNS text LANGUAGE sql AS $$ SELECT 'two' $$;
CREATE FUNCTION app.over(b integer, a text) RETURNS text LANGUAGE sql AS $$ SELECT 'turned round' $$;
CREATE FUNCTION app.over(a varchar, b integer DEFAULT 1, c integer DEFAULT 2) RETURNS text
	LANGUAGE sql AS $$ SELECT 'three ' || c $$;
EOS
my @over = ([ one => 'text' ], [ two => 'text,integer' ], [ turned => 'integer,text' ], [ three => 'varchar,integer,integer' ]);
register($node, 'ann', function => "app.over($_->[1])", name => $_->[0]) foreach @over;
is_deeply(
	[
		call(
			discount => { percent => 5, unlimited => \1, by => 'root' },
			both => { a => 5 }, named => { doc => 5, x => 6, Else => 1 },
			two => { a => 'x' }, two => { a => 'x', b => 2 },
			turned => { a => 'x', b => 2 }, three => { a => 'x' })
	],
	[
		'5 f ann', '1 2', '{"x": 6, "doc": 5, "Else": 1} 7 8',
		'two', 'two', 'turned round', 'three 2'
	],
	'the function is the one that was registered, with the arguments that the schema names');
is((call(one => { a => 'x' }))[0][0], 42725, '  where SQL can tell which one that is');
$node->safe_psql('postgres', 'CREATE OR REPLACE FUNCTION app.discount(percent integer, unlimited boolean DEFAULT true, by text DEFAULT NULL)'
	  . " RETURNS text LANGUAGE sql AS 'SELECT unlimited::text'; DROP FUNCTION app.both;"
	  . 'CREATE FUNCTION app.both(a jsonb, b jsonb) RETURNS text LANGUAGE sql AS $$ SELECT a::text $$');
is_deeply([ call(discount => { percent => 5 }, both => {}) ],
	[ 'true', [ 22023, 'Tool both failed: the argument "a" is missing' ] ], '  with the defaults of today');

#
# Results
#
tools(<<'EOS');
CREATE FUNCTION app.r_text() RETURNS text LANGUAGE sql AS $$ SELECT E'as "it"\n\\ is' $$;
CREATE FUNCTION app.r_varchar() RETURNS varchar LANGUAGE sql AS $$ SELECT '{"a":  1}' $$;
CREATE FUNCTION app.r_json() RETURNS json LANGUAGE sql AS $$ SELECT '{"b":  1, "a": 2}'::json $$;
CREATE FUNCTION app.r_jsonb() RETURNS jsonb LANGUAGE sql AS $$ SELECT '{"b":  1, "a": 2}'::jsonb $$;
CREATE FUNCTION app.r_int() RETURNS integer LANGUAGE sql AS 'SELECT 42';
CREATE FUNCTION app.r_bool() RETURNS boolean LANGUAGE sql AS 'SELECT true';
CREATE FUNCTION app.r_date() RETURNS date LANGUAGE sql AS $$ SELECT date '2024-02-29' $$;
CREATE FUNCTION app.r_array() RETURNS integer[] LANGUAGE sql AS 'SELECT ARRAY[1, NULL]';
CREATE FUNCTION app.r_row() RETURNS app.point LANGUAGE sql AS 'SELECT 1, 2.50';
CREATE FUNCTION app.r_out(OUT a integer, OUT b text) LANGUAGE sql AS $$ SELECT 1, 'x' $$;
CREATE FUNCTION app.r_setof() RETURNS SETOF integer LANGUAGE sql AS 'SELECT generate_series(1, 3)';
CREATE FUNCTION app.r_table() RETURNS TABLE (a integer, b text) LANGUAGE sql AS $$ VALUES (1, 'x'), (2, NULL) $$;
CREATE FUNCTION app.r_texts() RETURNS SETOF text LANGUAGE sql AS $$ VALUES ('x'), ('y') $$;
CREATE FUNCTION app.r_empty() RETURNS SETOF text LANGUAGE sql AS 'SELECT NULL::text WHERE false';
CREATE FUNCTION app.r_void() RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION app.r_null() RETURNS text LANGUAGE sql AS 'SELECT NULL::text';
CREATE FUNCTION app.r_null_row() RETURNS app.point LANGUAGE sql AS 'SELECT NULL::app.point';
CREATE FUNCTION app.r_blank() RETURNS text LANGUAGE sql AS $$ SELECT '' $$;
EOS
my %results = (
	r_text => qq(as "it"\n\\ is), r_varchar => '{"a":  1}', r_json => '{"b":  1, "a": 2}',
	r_jsonb => '{"a": 2, "b": 1}', r_int => '42', r_bool => 'true', r_date => '"2024-02-29"',
	r_array => '[1,null]', r_row => '{"x":1,"y":2.50}', r_out => '{"a":1,"b":"x"}',
	r_setof => '[1, 2, 3]', r_table => qq([{"a":1,"b":"x"}, \n {"a":2,"b":null}]),
	r_texts => '["x", "y"]', r_empty => '[]', r_void => 'null', r_null => 'null',
	r_null_row => 'null', r_blank => '');
my @names = sort keys %results;
is_deeply([ call(map { ($_, {}) } @names) ], [ @results{@names} ], 'what functions return');

#
# Transactions
#
tools(<<'EOS');
CREATE TABLE app.item (id integer PRIMARY KEY, what text);
CREATE TABLE app.part (id integer REFERENCES app.item DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE app.seen (who text);
GRANT ALL ON ALL TABLES IN SCHEMA app TO ann;
CREATE OR REPLACE FUNCTION app.on_item() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO app.seen VALUES (current_user || ' ' || session_user);
	IF NEW.what = 'bad' THEN RAISE EXCEPTION 'a bad item'; END IF;
	RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER seen AFTER INSERT ON app.item DEFERRABLE INITIALLY DEFERRED
	FOR EACH ROW EXECUTE FUNCTION app.on_item();
EOS
tools(<<'EOS');
CREATE FUNCTION app.add_item(id integer, what text DEFAULT 'good') RETURNS text LANGUAGE sql AS $$
	INSERT INTO app.item VALUES (id, what) RETURNING 'added' $$;
CREATE FUNCTION app.add_part(id integer) RETURNS text LANGUAGE sql AS $$
	INSERT INTO app.part VALUES (id) RETURNING 'added' $$;
CREATE FUNCTION app.add_and_fail(id integer) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO app.item VALUES (id, 'x');
	RAISE EXCEPTION USING ERRCODE = 'XY123', MESSAGE = E'no "more"\n\\ of it', DETAIL = 'a detail';
END $$;
CREATE FUNCTION app.commit_it() RETURNS void LANGUAGE plpgsql AS 'BEGIN COMMIT; END';
CREATE FUNCTION app.sleep(n numeric) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO app.item VALUES (-1, 'slept');
	PERFORM pg_sleep(n);
	RETURN 'slept';
END $$;
CREATE FUNCTION app.write_anyway() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM set_config('transaction_read_only', 'off', false);
	INSERT INTO app.item VALUES (-2, 'x');
	RETURN 'written';
END $$;
EOS
register($node, 'ann', function => 'app.add_item', name => 'read_item', read_only => 'on');
register($node, 'ann', function => 'app.write_anyway', read_only => 'on');
register($node, 'ann', function => 'app.sleep', timeout => '200 ms');
is_deeply(
	[ call(add_item => { id => 1 }, add_part => { id => 77 }, add_item => { id => 2, what => 'bad' }) ],
	[
		'added',
		[ 23503, 'Tool add_part failed: insert or update on table "part" violates foreign key constraint "part_id_fkey"' ],
		[ 'P0001', 'Tool add_item failed: a bad item' ]
	],
	'what is deferred runs before the result is stored, and is part of it');
is_deeply([ map { $_->{who} } rows($node, 'SELECT who FROM app.seen') ], ['ann ann'],
	'  as the role');
is_deeply(
	[ call(add_and_fail => { id => 3 }, add_item => { id => 1 }) ],
	[
		[ 'XY123', qq(Tool add_and_fail failed: no "more"\n\\ of it) ],
		[ 23505, 'Tool add_item failed: duplicate key value violates unique constraint "item_pkey"' ]
	],
	'a raised error is the result, with its SQLSTATE');
is_deeply([ map { $_->{id} } rows($node, 'SELECT id FROM app.item') ], [1], '  and undoes the call');
is((call(commit_it => {}))[0][0], '2D000', 'a tool cannot end the transaction');
is_deeply([ map { $_->[0] } call(read_item => { id => 5 }, write_anyway => {}) ], [ 25006, 25001 ],
	'read_only');
is_deeply([ call(sleep => { n => 600 }) ],
	[ [ 57014, 'Tool sleep failed: canceling statement due to statement timeout' ] ], 'its own timeout');
$node->safe_psql('postgres', "ALTER SYSTEM SET chat.tool_timeout = '300ms'; SELECT pg_reload_conf()");
register($node, 'ann', function => 'app.sleep');
is((call(sleep => { n => 600 }))[0][0], 57014, 'chat.tool_timeout');
$node->safe_psql('postgres', 'ALTER SYSTEM RESET chat.tool_timeout; SELECT pg_reload_conf()');
is_deeply([ map { $_->{id} } rows($node, 'SELECT id FROM app.item') ], [1], '  and nothing is left of them');

# one that is long by itself has the time of an operation
register($node, 'ann', function => 'app.sleep', name => 'long_sleep', long_running => 'on');
$node->safe_psql('postgres', "ALTER SYSTEM SET chat.tool_timeout = '50ms'; SELECT pg_reload_conf()");
wait_for($node, "SELECT current_setting('chat.tool_timeout') = '50ms'");
is_deeply([ call(long_sleep => { n => 0.2 }) ], ['slept'], 'a long tool is not ended by chat.tool_timeout');
$node->safe_psql('postgres', "ALTER SYSTEM RESET chat.tool_timeout; DELETE FROM app.item WHERE id = -1; SELECT pg_reload_conf()");

# what is not there any more when it is called
tools(<<'EOS');
CREATE FUNCTION app.gone() RETURNS text LANGUAGE sql AS $$ SELECT 'x' $$;
CREATE FUNCTION app.not_mine() RETURNS text LANGUAGE sql AS $$ SELECT 'x' $$;
CREATE FUNCTION app.other() RETURNS text LANGUAGE sql AS $$ SELECT 'old' $$;
EOS
$node->safe_psql('postgres', <<'EOS');
DROP FUNCTION app.gone;
REVOKE EXECUTE ON FUNCTION app.not_mine FROM PUBLIC;
CREATE OR REPLACE FUNCTION app.other() RETURNS text LANGUAGE sql AS $$ SELECT 'new' $$;
EOS
my @left = call(gone => {}, not_mine => {}, other => {});
is_deeply([ map { ref $_ ? $_->[0] : $_ } @left ], [ 42883, 42501, 'new' ],
	'functions are resolved and checked when they run') or diag(encode(\@left));

#
# What the call is about; progress while the transaction is open
#
tools(<<'EOS');
CREATE FUNCTION app.about() RETURNS jsonb LANGUAGE sql AS 'SELECT to_jsonb(c) FROM chat.current_tool_call() AS c';
CREATE FUNCTION app.count_to(n integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. n LOOP
		PERFORM chat.report_progress(jsonb_build_object('done', i));
		PERFORM pg_advisory_xact_lock(i);
	END LOOP;
	RETURN 'counted';
END $$;
CREATE FUNCTION app.report(n integer) RETURNS boolean LANGUAGE sql AS $$
	SELECT chat.report_progress(to_jsonb(repeat('x', n))) $$;
EOS
my ($session, $task) = start($node, '[[tool=about id=the_call]]', user_id => 'u1');
my $turn = turn_of($node, $task);
my ($call) = calls($node, $task);
is_deeply(
	(outputs($turn))[0],
	{
		session_id => $session, user_id => 'u1', task_id => $task,
		tool_call_id => 'the_call', operation_id => $call->{operation_id}, name => 'about'
	},
	'current_tool_call()');
is_deeply(
	decode(as_role($node, 'ann', 'SELECT to_json(array[c.session_id::text, c.name, chat.report_progress(\'1\')::text])'
		  . ' FROM chat.current_tool_call() AS c')),
	[ undef, undef, 'false' ], '  elsewhere there is none');

my $gate = session($node);
$gate->query_safe('SELECT pg_advisory_lock(1), pg_advisory_lock(2)');
$session = create_session($node, owner => 'ann');
my $listener = listener($node, $session->{channel});
$task = ask($node, $session->{id}, '[[tool=count_to args={"n":2} id=a]]');
foreach my $n (1, 2)
{
	$listener->until(sub { $_->{preliminary} && $_->{output}{done} == $n });
	pass("listeners see progress $n");
	is(row($node, "SELECT count(*) AS n FROM pg_stat_activity WHERE backend_type = 'chat tool worker' AND xact_start IS NOT NULL")->{n},
		1, '  while the transaction is open');
	is(as_role($node, 'ann', "SELECT chat.session_status('$session->{id}')"), 'processing_tools', '  and the session says so');
	$gate->query_safe("SELECT pg_advisory_unlock($n)");
}
$turn = turn_of($node, $task);
is_deeply([ map { $_->{output} } of_type($turn, 'tool-output-available') ],
	[ { done => 1 }, { done => 2 }, 'counted' ], '  readers find it, too');
sound($turn, $node, 'progress');
is((call(report => { n => 100000 }))[0][0], '54000', 'a report that is too long is refused');
is((call(report => { n => 1000 }))[0], 'true', '  one that is not is taken');

#
# Nothing is left behind for the next call
#
$node->safe_psql('postgres', "ALTER SYSTEM SET chat.tool_workers = 1; SELECT pg_reload_conf()");
tools(<<'EOS');
CREATE FUNCTION app.leave() RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
	CREATE TEMPORARY TABLE item (secret text);
	INSERT INTO pg_temp.item VALUES ('secret');
	PERFORM set_config('search_path', 'pg_temp, public', false);
	PERFORM set_config('app.secret', 'x', false);
	PERFORM set_config('statement_timeout', '1', false);
	PERFORM set_config('default_transaction_read_only', 'on', false);
	PERFORM set_config('TimeZone', 'Asia/Tokyo', false);
	EXECUTE 'PREPARE leftover AS SELECT 1';
	EXECUTE 'DECLARE leftover CURSOR WITH HOLD FOR SELECT 1';
	PERFORM pg_advisory_lock(4711);
	PERFORM set_config('role', 'team', false);
	RETURN pg_backend_pid();
END $$;
CREATE FUNCTION app.look() RETURNS jsonb LANGUAGE sql AS $$
	SELECT jsonb_build_object('pid', pg_backend_pid(), 'temp', to_regclass('pg_temp.item'),
		'path', current_setting('search_path'), 'secret', current_setting('app.secret', true),
		'timeout', current_setting('statement_timeout'), 'zone', current_setting('TimeZone'),
		'read_only', current_setting('transaction_read_only'),
		'prepared', (SELECT count(*) FROM pg_prepared_statements WHERE name = 'leftover'),
		'cursors', (SELECT count(*) FROM pg_cursors WHERE name = 'leftover'),
		'locks', (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
		'user', current_user)
$$;
CREATE FUNCTION app.listen() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'LISTEN x'; END $$;
EOS
$node->safe_psql('postgres', 'CREATE ROLE team; GRANT team TO ann; GRANT TEMPORARY ON DATABASE postgres TO ann');
wait_for($node, "SELECT current_setting('chat.tool_workers') = '1'");
my @seen = call(leave => {}, look => {}, leave => {}, look => {}, listen => {});
my $seen = ref $seen[1] ? {} : decode($seen[1]);
is(delete $seen->{pid}, $seen[0], 'the calls of a session run in one process') or diag(encode(\@seen));
is_deeply(
	$seen,
	{
		temp => undef, path => '"$user", public', secret => '', timeout => '0',
		read_only => 'off', prepared => 0, cursors => 0, locks => 0, user => 'ann',
		zone => row($node, "SELECT current_setting('TimeZone') AS z")->{z}
	},
	'  and none finds anything of the one before');
is($seen[2], $seen[0], '  nor stumbles over it');
is($seen[4][0], '0A000', '  LISTEN is no use there') or diag(encode($seen[4]));
my ($elsewhere) = call(leave => {});
isnt($elsewhere, $seen[0], 'another session has another process');

#
# Side by side, up to chat.tool_workers
#
tools(<<'EOS');
CREATE FUNCTION app.meet(n integer) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_advisory_xact_lock_shared(99);
	RETURN n;
END $$;
EOS
my $waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
foreach my $workers (3, 1)
{
	$node->safe_psql('postgres', "ALTER SYSTEM SET chat.tool_workers = $workers; SELECT pg_reload_conf()");
	wait_for($node, "SELECT current_setting('chat.tool_workers') = '$workers'");
	$gate->query_safe('SELECT pg_advisory_lock(99)');
	(undef, $task) = start($node, '[[' . directives(map { ("meet", { n => $_ }) } 1 .. 5) . ']]');
	wait_for($node, "SELECT ($waiting) = $workers");
	# with the worker asked to look again there are no more
	wait_for_task($node, ask($node, create_session($node, owner => 'bob')->{id}, 'hi [[tokens=1]]'));
	is($node->safe_psql('postgres', $waiting), $workers, "chat.tool_workers = $workers: so many run");
	is( $node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'chat tool worker'"),
		$workers, '  as processes');
	$gate->query_safe('SELECT pg_advisory_unlock(99)');
	$turn = turn_of($node, $task);
	is_deeply([ map { $_->{content} } grep { $_->{role} eq 'tool' } @{ $turn->{messages} } ],
		[ 1 .. 5 ], '  and all of them end');
	sound($turn, $node, 'side by side');
}
wait_for($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'chat tool worker'");
pass('with nothing to do they are gone');

#
# A tool that takes its process down
#
tools(<<'EOS');
CREATE SEQUENCE app.tries;
GRANT USAGE ON SEQUENCE app.tries TO ann;
CREATE FUNCTION app.die(times integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO app.item VALUES (100 + nextval('app.tries'), 'x');
	IF currval('app.tries') <= times THEN
		PERFORM pg_terminate_backend(pg_backend_pid());
		PERFORM pg_sleep(600);
	END IF;
	RETURN 'at last';
END $$;
EOS
is_deeply([ call(die => { times => 2 }) ], ['at last'], 'a call whose process ends runs again');
is_deeply([ map { $_->{id} } rows($node, 'SELECT id FROM app.item WHERE id > 100') ], [103], '  and has its effect once');
is((call(die => { times => 1000 }))[0][0], 'tool_unknown_outcome', 'not for ever');

# one that does not let itself be ended is ended with its process
tools(<<'EOS');
CREATE FUNCTION app.endless() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	LOOP
		BEGIN
			PERFORM pg_sleep(600);
		EXCEPTION WHEN query_canceled THEN
			NULL;
		END;
	END LOOP;
END $$;
EOS
# long enough to be in the loop, also on a busy machine
register($node, 'ann', function => 'app.endless', timeout => '1 s');
$node->safe_psql('postgres', 'ALTER SYSTEM SET chat.max_crashes = 1; SELECT pg_reload_conf()');
wait_for($node, "SELECT current_setting('chat.max_crashes') = '1'");
is((call(endless => {}))[0][0], 'tool_unknown_outcome', 'T28: a tool that catches the end of its time');
wait_for($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'chat tool worker'");
pass('  its process is gone');

# what a function leaves to the commit has no more time than the function
tools(<<'EOS');
CREATE FUNCTION app.leave_to_commit() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE 'DECLARE forever CURSOR WITH HOLD FOR SELECT pg_sleep(6000)';
	RETURN 'done';
END $$;
EOS
# long enough to be at the commit, also on a busy machine
register($node, 'ann', function => 'app.leave_to_commit', timeout => '1 s');
is((call(leave_to_commit => {}))[0][0], 'tool_unknown_outcome', 'T28: one that leaves what never ends to the commit');
wait_for($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'chat tool worker'");
pass('  its process is gone, too');

unlike(slurp_file($node->logfile), qr/JIT provider/, 'none of our statements is compiled: that would take seconds');

$gate->quit;
$node->stop;
done_testing();
