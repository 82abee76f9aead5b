# Rows of turns are appended without a plan, and what is known of their tables
# is kept between calls.  Do calls and turns see tables that were changed in
# between, do constraints, defaults and triggers hold, and is a session that
# others change while a call waits for it seen as it is then?

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";
use ChatTest;
use Test::More;

my $fake = start_fake();
my $node = chat_cluster('main');
create_server($node, $fake);
my $session = create_session($node)->{id};
my $caller = $node->background_psql('postgres', on_error_stop => 0);
my $task;

# Runs a turn that the long-lived connection calls for; returns its task.
sub turn
{
	my ($message) = @_;
	my $task = $caller->query("SELECT chat.stream_chat_completion('$session', "
		  . literal($message) . ')');

	is(wait_for_task($node, $task)->{status}, 'completed', "turn: $message");
	return $task;
}

# Changes the tables from elsewhere.
sub change
{
	my ($sql) = @_;
	$node->safe_psql('postgres', $sql);
}

# Returns a value that another connection sees.
sub seen
{
	my ($sql) = @_;
	return $node->safe_psql('postgres', $sql);
}

# Asserts that an index has as many rows as the table has.
sub complete
{
	my ($table, $index, $where) = @_;
	my $count = "SELECT count(*) FROM chat.$table" . ($where ? " WHERE $where" : '');

	is( seen("SET enable_seqscan = off; SET enable_bitmapscan = off; $count"),
		seen("SET enable_indexscan = off; SET enable_indexonlyscan = off; $count"),
		"$index is complete");
	change("SELECT bt_index_check('chat.$index', true)");
}

change('CREATE EXTENSION amcheck');
turn('one');
turn('two');

# indexes
change('CREATE INDEX later_task ON chat.chat_task (server, id)');
change("CREATE INDEX CONCURRENTLY later_part ON chat.chat_task (id) WHERE server = 'fake'");
change('CREATE INDEX CONCURRENTLY later_message ON chat.chat_message (role, id)');
turn('three');
complete('chat_task', 'later_task', "server = 'fake'");
complete('chat_task', 'later_part', "server = 'fake'");
complete('chat_message', 'later_message', "role = 'user'");
change('DROP INDEX chat.later_task');
change('DROP INDEX CONCURRENTLY chat.later_part');
change('DROP INDEX CONCURRENTLY chat.later_message');
turn('four');
change('REINDEX TABLE chat.chat_task');
change('VACUUM FULL chat.chat_job');
turn('five');
complete('chat_task', 'chat_task_pkey', 'id IS NOT NULL');

# an index that is none of a B-tree, whose method keeps things for a statement
change("CREATE INDEX words ON chat.chat_message USING gin"
	  . " (to_tsvector('simple', content)) WITH (fastupdate = off)");
turn('findme six');
turn('findme seven');
is( seen("SET enable_seqscan = off; SELECT count(*) FROM chat.chat_message"
	  . " WHERE to_tsvector('simple', content) @@ 'findme' AND role = 'user'"),
	2, 'a GIN index finds what turns have appended');
change('DROP INDEX chat.words');

# constraints: an error leaves nothing behind that the next call trips over
change("ALTER TABLE chat.chat_task ADD CONSTRAINT no CHECK (input ->> 'content' <> 'never')");
turn('eight');
like($caller->query("\\set VERBOSITY sqlstate\n"
		  . "SELECT chat.stream_chat_completion('$session', 'never')") // '',
	qr/^$/, 'no task for what a CHECK refuses');
$caller->{stderr} = '';
is(seen("SELECT count(*) FROM chat.chat_task WHERE input IS NOT NULL"), 0,
	'nothing is left of the call');
turn('nine');
is( $caller->query(<<"EOS"), 'refused',
DO \$\$ BEGIN
	FOR i IN 1 .. 3 LOOP
		BEGIN
			PERFORM chat.stream_chat_completion('$session', 'never');
		EXCEPTION WHEN check_violation THEN
			NULL;
		END;
	END LOOP;
END \$\$;
SELECT 'refused';
EOS
	'calls that fail in subtransactions');
turn('ten');
change('ALTER TABLE chat.chat_task DROP CONSTRAINT no');
turn('never');

# a look at a table that is broken off is none
my $holder = $node->background_psql('postgres');
$holder->query_safe('BEGIN; ALTER INDEX chat.chat_task_pkey SET TABLESPACE pg_default');
my $late = $node->background_psql('postgres', on_error_stop => 0);
is( $late->query("SET lock_timeout = '10ms';\n"
	  . "SELECT chat.stream_chat_completion('$session', 'too early');\n"
	  . '\echo :SQLSTATE'),
	'55P03', 'a call that does not get the lock of an index');
$holder->query_safe('ROLLBACK');
$holder->quit;
$task = $late->query("SELECT chat.stream_chat_completion('$session', 'later')");
is(wait_for_task($node, $task)->{status}, 'completed', 'and one that does');
$late->quit;
complete('chat_task', 'chat_task_pkey', 'id IS NOT NULL');

# what the calling statement has done counts, and it may write
is( seen("WITH s AS (INSERT INTO chat.chat_session (owner, server)"
	  . " VALUES ('postgres', 'fake') RETURNING id)"
	  . " SELECT chat.stream_chat_completion(id, 'new') IS NOT NULL FROM s"),
	't', 'a session that the same statement has made');
is( seen("UPDATE chat.chat_session SET title = 'renamed' WHERE id = '$session'"
	  . " RETURNING chat.stream_chat_completion(id, 'written') IS NOT NULL"),
	't', 'or has written');
wait_for($node, 'SELECT count(*) = 0 FROM chat.chat_job');
my (undef, undef, $error) = $node->psql('postgres',
	'\set VERBOSITY sqlstate' . "\nSET default_transaction_read_only = on;\n"
	  . "SELECT chat.stream_chat_completion('$session', 'no')");
like($error, qr/25006/, 'not in a transaction that only reads');

# columns of the administrator's
change(<<'EOS');
ALTER TABLE chat.chat_message
	ADD COLUMN tenant text NOT NULL DEFAULT 'nobody',
	ADD COLUMN length int GENERATED ALWAYS AS (length(content)) STORED,
	ADD COLUMN gone int DEFAULT 1;
ALTER TABLE chat.chat_message DROP COLUMN gone;
ALTER TABLE chat.chat_task ADD COLUMN mark int DEFAULT 7;
EOS
$task = turn('eleven');
is( seen("SELECT string_agg(concat_ws('/', role, tenant, length = length(content)), ' ' ORDER BY sequence)"
	  . " FROM chat.chat_message WHERE task_id = '$task'"),
	'user/nobody/t assistant/nobody/t',
	'columns that were added have their defaults, and are computed');
is(seen("SELECT mark FROM chat.chat_task WHERE id = '$task'"),
	7, 'those of tasks, too');

# triggers of the administrator's
change(<<'EOS');
CREATE TABLE seen (what text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF TG_LEVEL = 'STATEMENT' THEN
		INSERT INTO public.seen SELECT concat_ws(' ', TG_WHEN, n.role, n.content) FROM new_rows AS n;
		RETURN NULL;
	END IF;
	INSERT INTO public.seen VALUES (concat_ws(' ', TG_WHEN, NEW.role, NEW.content));
	IF TG_WHEN = 'BEFORE' THEN
		NEW.tenant := 'marked';
	END IF;
	RETURN NEW;
END
$$;
GRANT ALL ON seen TO PUBLIC;
CREATE TRIGGER a BEFORE INSERT ON chat.chat_message FOR EACH ROW EXECUTE FUNCTION note();
CREATE TRIGGER b AFTER INSERT ON chat.chat_message FOR EACH ROW EXECUTE FUNCTION note();
CREATE TRIGGER c AFTER INSERT ON chat.chat_message REFERENCING NEW TABLE AS new_rows
	FOR EACH STATEMENT EXECUTE FUNCTION note();
EOS
$task = turn('twelve [[text=yes]]');
is( seen("SELECT string_agg(what, ', ' ORDER BY ctid) FROM seen"),
	join(', ', map { ("BEFORE $_", "AFTER $_", "AFTER $_") }
		  'user twelve [[text=yes]]', 'assistant yes'),
	'triggers on messages are fired for those of turns');
is( seen("SELECT string_agg(DISTINCT tenant, ' ') FROM chat.chat_message"
	  . " WHERE task_id = '$task'"),
	'marked', 'and change the row');
change('DROP TRIGGER a ON chat.chat_message; DROP TRIGGER b ON chat.chat_message;'
	  . ' DROP TRIGGER c ON chat.chat_message');
turn('thirteen');
is(seen('SELECT count(*) FROM seen'), 6, 'until they are gone');

# a constraint that is checked at the end
change('ALTER TABLE chat.chat_message ADD CONSTRAINT once UNIQUE (tenant, content)'
	  . ' DEFERRABLE');
is( wait_for_task($node, ask($node, $session, 'same [[text=fresh]]'))->{status},
	'completed', 'a turn that keeps a deferrable constraint');
$task = ask($node, $session, 'other [[text=fresh]]');
isnt(wait_for_task($node, $task)->{status}, 'completed', 'and one that does not');
change('ALTER TABLE chat.chat_message DROP CONSTRAINT once');

# a session that is changed while a call waits for it
sub meanwhile
{
	my ($sql, $call, $expected, $what) = @_;
	my $id = create_session($node, user_id => 'ann')->{id};
	my $holder = $node->background_psql('postgres');
	my $waiter = $node->background_psql('postgres', on_error_stop => 0);

	s/SESSION/$id/g foreach $sql, $call;
	$holder->query_safe("BEGIN; $sql");
	$waiter->query_until(qr/called/, <<"EOS");
\\echo called
$call;
\\if :ERROR
\\echo :SQLSTATE
\\endif
\\echo over
EOS
	wait_for($node, 'SELECT count(*) > 0 FROM pg_locks WHERE NOT granted');
	$holder->query_safe('COMMIT');
	my $out = $waiter->query_until(qr/over/, '');
	like($out, $expected, $what);
	$_->quit foreach $holder, $waiter;
	return $id;
}

my $id = meanwhile("UPDATE chat.chat_session SET title = 't' WHERE id = 'SESSION'",
	"SELECT chat.stream_chat_completion('SESSION', 'hi', user_id => 'ann') IS NOT NULL",
	qr/^t$/m, 'a session that was written to meanwhile is called all the same');
wait_for($node, "SELECT count(*) = 2 FROM chat.chat_message WHERE session_id = '$id'");
meanwhile("UPDATE chat.chat_session SET user_id = 'bob' WHERE id = 'SESSION'",
	"SELECT chat.stream_chat_completion('SESSION', 'hi', user_id => 'ann')",
	qr/P0002/, "one that is somebody else's now is not there");
meanwhile("DELETE FROM chat.chat_session WHERE id = 'SESSION'",
	"SELECT chat.stream_chat_completion('SESSION', 'hi')",
	qr/P0002/, 'nor one that was deleted');
meanwhile("UPDATE chat.chat_session SET server = 'nowhere' WHERE id = 'SESSION'",
	"SELECT chat.stream_chat_completion('SESSION', 'hi')",
	qr/42704/, 'the endpoint is the one that it has now');

# the extension itself, in one connection
$caller->query('SET client_min_messages = warning; DROP EXTENSION chat CASCADE;'
	  . ' CREATE EXTENSION chat');
create_server($node, $fake);
wait_for_worker($node);
$session = create_session($node)->{id};
turn('fourteen');
turn('fifteen');
$caller->quit;
$node->stop;
done_testing();
