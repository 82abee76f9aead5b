--
-- Who may do what: grants, row-level security, hostile roles
--
SET client_min_messages = warning;
SET timezone = 'UTC';

CREATE FUNCTION raised(statement text) RETURNS TABLE (
	state text, message text, detail text, hint text)
LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE statement;
	RETURN QUERY SELECT '00000', 'no error', '', '';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE,
		message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL,
		hint = PG_EXCEPTION_HINT;
	RETURN NEXT;
END
$$;
-- how often somebody's code ran, and as whom
CREATE TABLE caught (who name, what text);
GRANT INSERT ON caught TO PUBLIC;

CREATE ROLE regress_chat_ann;
CREATE ROLE regress_chat_team;
CREATE ROLE regress_chat_mallory;
CREATE ROLE regress_chat_nobody;
GRANT regress_chat_team TO regress_chat_ann;
-- a member that does not inherit has not USAGE
CREATE ROLE regress_chat_member NOINHERIT;
GRANT regress_chat_team TO regress_chat_member;

\set s1 '''00000000-0000-4000-8000-000000000001'''
\set s2 '''00000000-0000-4000-8000-000000000002'''
\set s3 '''00000000-0000-4000-8000-000000000003'''
\set none '''00000000-0000-4000-8000-00000000dead'''

-- nothing is granted to anybody (T63); monitoring roles see figures
SELECT count(*) AS usage_of_schema
FROM pg_namespace AS n, aclexplode(n.nspacl) AS a
WHERE n.nspname = 'chat'
	AND a.grantee NOT IN (n.nspowner, 'pg_monitor'::regrole);
SELECT count(*) AS on_tables
FROM pg_class AS c, aclexplode(c.relacl) AS a
WHERE c.relnamespace = 'chat'::regnamespace
	AND a.grantee NOT IN (c.relowner, 'pg_monitor'::regrole);
SELECT count(*) AS on_routines
FROM pg_proc AS p,
	aclexplode(COALESCE(p.proacl, acldefault('f', p.proowner))) AS a
WHERE p.pronamespace = 'chat'::regnamespace
	AND a.grantee NOT IN (p.proowner, 'pg_monitor'::regrole);
SELECT c.oid::regclass AS figures, a.privilege_type
FROM pg_class AS c, aclexplode(c.relacl) AS a
WHERE c.relnamespace = 'chat'::regnamespace
	AND a.grantee = 'pg_monitor'::regrole
ORDER BY c.oid::regclass::text COLLATE "C";
SET ROLE regress_chat_nobody;
SELECT state, message FROM raised('SELECT chat.create_chat_session()');
SELECT state, message FROM raised('SELECT * FROM chat.chat_session');
SELECT state, message FROM raised('SELECT chat.grant_usage(''regress_chat_nobody'')');
RESET ROLE;

SELECT r.* FROM unnest(ARRAY['grant_usage', 'revoke_usage', 'grant_callback']) AS f,
	unnest(ARRAY['NULL', '0::oid::regrole', '4000000000::oid::regrole']) AS a,
	LATERAL raised(format('SELECT chat.%s(%s)', f, a)) AS r;
-- what grant_usage() grants
SELECT chat.grant_usage(r::regrole) FROM unnest(ARRAY['regress_chat_ann',
	'regress_chat_team', 'regress_chat_mallory', 'regress_chat_member']) AS r;
SELECT c.oid::regclass AS relation, string_agg(a.privilege_type, ', ') AS privileges
FROM pg_class AS c, aclexplode(c.relacl) AS a
WHERE c.relnamespace = 'chat'::regnamespace
	AND a.grantee = 'regress_chat_ann'::regrole
	AND c.relname IN ('chat_session', 'chat_message', 'chat_task', 'chat_job',
		'chat_event', 'chat_event_0', 'chat_event_slot')
GROUP BY c.oid ORDER BY c.oid::regclass::text COLLATE "C";
SELECT f AS function, has_function_privilege('regress_chat_ann', p.oid, 'EXECUTE') AS granted
FROM unnest(ARRAY['create_chat_session', 'get_chat_session', 'get_chat_messages',
	'upsert_chat_session', 'update_chat_session', 'update_session_title',
	'assign_user_to_session', 'add_chat_message', 'add_chat_messages_batch',
	'get_user_chat_sessions', 'get_user_session_count', 'delete_chat_session',
	'get_chat_session_message_count', 'update_tool_message_content',
	'to_openai_messages', 'grant_usage', 'revoke_usage', 'usage_objects',
	'chat_job_ring', 'chat_llm_validator']) WITH ORDINALITY AS u(f, n)
	LEFT JOIN pg_proc AS p ON p.proname = f AND p.pronamespace = 'chat'::regnamespace
ORDER BY n;

-- a role works with its own sessions and with those of its groups
SET ROLE regress_chat_ann;
SELECT owner FROM chat.create_chat_session(session_id => :s1, user_id => 'u1', title => 'hers');
SELECT owner FROM chat.create_chat_session(session_id => :s2, user_id => 'u1',
	owner => 'regress_chat_team');
SELECT sequence FROM chat.add_chat_messages_batch(:s1, '[{"role": "user", "content": "secret"},
	{"role": "tool", "tool_call_id": "c", "content": "r"}]');
SELECT id, title FROM chat.chat_session ORDER BY id;
SELECT content FROM chat.chat_message ORDER BY sequence;
SELECT chat.get_user_session_count('u1') AS two;
-- a session of a role that she is not
SELECT * FROM raised('SELECT chat.create_chat_session(owner => ''regress_chat_mallory'')');
SET ROLE regress_chat_member;
SELECT * FROM raised('SELECT chat.create_chat_session(owner => ''regress_chat_team'')');
SELECT count(*) AS seen_without_usage FROM chat.chat_session;
RESET ROLE;
INSERT INTO chat.chat_task (id, session_id, server, slot, status, finished_at)
VALUES ('00000000-0000-4000-8000-0000000000a1', :s1, 'x', 0, 'completed', now());
INSERT INTO chat.chat_event (slot, task_id, seq, payload)
VALUES (0, '00000000-0000-4000-8000-0000000000a1', 1, '{}');
SET ROLE regress_chat_ann;
SELECT (SELECT count(*) FROM chat.chat_task) AS tasks, (SELECT count(*) FROM chat.chat_event) AS events;

-- for a stranger, a session that is there and one that is not are the same
SET ROLE regress_chat_mallory;
SELECT (SELECT count(*) FROM chat.chat_session) AS sessions,
	(SELECT count(*) FROM chat.chat_message) AS messages,
	(SELECT count(*) FROM chat.chat_task) AS tasks,
	(SELECT count(*) FROM chat.chat_event) AS events;
SELECT s = :none AS none,
	chat.get_chat_session(s) AS get_session,
	(SELECT count(*) FROM chat.get_chat_messages(s)) AS get_messages,
	chat.get_chat_session_message_count(s) AS count,
	chat.to_openai_messages(s) AS openai,
	chat.update_chat_session(s, title => 'x') AS update,
	chat.update_session_title(s, 'x') AS title,
	chat.update_tool_message_content(s, 'c', 'x') AS tool,
	chat.delete_chat_session(s) AS delete
FROM unnest(ARRAY[:s1, :none]::uuid[]) AS s;
SELECT chat.get_user_session_count('u1') AS count,
	(SELECT count(*) FROM chat.get_user_chat_sessions('u1')) AS list;
SELECT s = :none AS none, r.state, r.message, r.detail, r.hint
FROM unnest(ARRAY[:s1, :none]) AS s, unnest(ARRAY[
	'chat.add_chat_message(%L, ''user'', ''x'')',
	'chat.add_chat_message(%L, ''user'', ''x'', message_id => gen_random_uuid())',
	'chat.add_chat_messages_batch(%L, ''[{"role": "user"}]'')',
	'chat.add_chat_messages_batch(%L, ''[]'')',
	'chat.assign_user_to_session(%L, ''m'')']) AS f,
	LATERAL raised(format('SELECT ' || f, s)) AS r
ORDER BY f, s;
-- except that a chosen id is taken
SELECT * FROM raised(format('SELECT chat.create_chat_session(%L)', :s1));
SELECT * FROM raised(format('SELECT chat.upsert_chat_session(%L)', jsonb_build_object('session_id', :s1)));
-- no way past the functions
SELECT s, r.state, r.message FROM unnest(ARRAY[
	'INSERT INTO chat.chat_session (owner) VALUES (''regress_chat_mallory'')',
	'UPDATE chat.chat_session SET owner = ''regress_chat_mallory''',
	'DELETE FROM chat.chat_message', 'TRUNCATE chat.chat_event',
	'SELECT * FROM chat.chat_job', 'SELECT * FROM chat.chat_event_0',
	'SELECT * FROM chat.chat_event_slot', 'SELECT * FROM chat.chat_session FOR UPDATE',
	'LOCK TABLE chat.chat_session', 'SELECT nextval(''chat.chat_task_place_seq'')',
	'SELECT chat.grant_usage(''regress_chat_mallory'')', 'SELECT chat.usage_objects()',
	'CREATE TABLE chat.x ()']) AS s,
	LATERAL raised(s) AS r;
-- leaky functions see no rows of others
CREATE FUNCTION pg_temp.leak(t text) RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS
$$ BEGIN RAISE WARNING 'leaked %', t; RETURN true; END $$;
SELECT count(*) FROM chat.chat_session WHERE pg_temp.leak(title);
SELECT count(*) FROM chat.chat_message WHERE pg_temp.leak(content);
RESET ROLE;

-- nor does EXPLAIN tell what stands in them: by how often something was looked
-- at, which rows an index was asked for, or what the statistics expect
CREATE FUNCTION told(query text, VARIADIC guesses text[]) RETURNS bigint
LANGUAGE plpgsql SET jit = off AS $$
DECLARE
	guess text;
	line text;
	plan text;
	plans text[];
BEGIN
	FOREACH guess IN ARRAY guesses LOOP
		plan := '';
		FOR line IN EXECUTE 'EXPLAIN (ANALYZE, BUFFERS OFF, TIMING OFF, SUMMARY OFF) ' || format(query, guess) LOOP
			plan := plan || replace(line, guess, '') || E'\n';
		END LOOP;
		plans := plans || plan;
	END LOOP;
	RETURN (SELECT count(DISTINCT p) FROM unnest(plans) AS p);
END
$$;
CREATE FUNCTION guesses() RETURNS TABLE (what text, plans bigint, by_index bigint, by_cost bigint)
LANGUAGE plpgsql AS $$
DECLARE
	query text;
	guess text[];
BEGIN
	FOR what, query, guess IN VALUES
		('content', 'SELECT FROM chat.chat_message WHERE content >= %L',
			'{"secret 0", "secret 55", "secret 7", "zzz"}'::text[]),
		('content of one', 'SELECT FROM chat.chat_message
			WHERE session_id = ''00000000-0000-4000-8000-000000000002'' AND sequence = 17 AND content >= %L',
			'{"aaaa", "secret 16", "secret 18"}'),
		('content, exactly', 'SELECT FROM chat.chat_message WHERE content = %L',
			'{"secret 17", "another"}'),
		('arguments', 'SELECT FROM chat.chat_tool_call WHERE arguments < %L', '{"aaaa", "arg 1", "arg 5", "zzz"}'),
		('operation', 'SELECT FROM chat.chat_tool_call WHERE operation_id < %L',
			'{"00000000-0000-4000-8000-000000000000", "00000000-0000-4000-8000-000000000e15",
			"00000000-0000-4000-8000-000000000e57", "f0000000-0000-4000-8000-000000000000"}')
	LOOP
		plans := told(query, VARIADIC guess);
		SET enable_seqscan = off;
		by_index := told(query, VARIADIC guess);
		RESET enable_seqscan;
		SET cpu_operator_cost = 0;
		by_cost := told(query, VARIADIC guess);
		RESET cpu_operator_cost;
		RETURN NEXT;
	END LOOP;
END
$$;
BEGIN;
INSERT INTO chat.chat_message (session_id, sequence, role, content)
SELECT :s2, n, 'user', 'secret ' || n FROM generate_series(10, 99) AS n;
INSERT INTO chat.chat_tool_call (operation_id, session_id, task_id, message_id,
	position, sequence, step, call_id, name, kind, arguments, status)
SELECT ('00000000-0000-4000-8000-000000000e' || n)::uuid, :s2, :none, :none,
	n, n, 1, 'c', 'n', 'client', 'arg ' || n, 'waiting' FROM generate_series(10, 99) AS n;
ANALYZE chat.chat_message, chat.chat_tool_call;
SET LOCAL ROLE regress_chat_mallory;
SELECT * FROM guesses();
-- to those who see the rows each of them tells something
SET LOCAL ROLE regress_chat_ann;
SELECT what, plans > 1 AS plans, by_index > 1 AS by_index, by_cost > 1 AS by_cost FROM guesses();
ROLLBACK;

-- planting (T15): a trigger, a rule, a default, an index expression, a policy, ...
CREATE SCHEMA mallory AUTHORIZATION regress_chat_mallory;
SET ROLE regress_chat_mallory;
CREATE FUNCTION mallory.note() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO public.caught VALUES (current_user, 'trigger'); RETURN NEW; END $$;
CREATE FUNCTION mallory.note(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS
$$ BEGIN INSERT INTO public.caught VALUES (current_user, 'text'); RETURN $1; END $$;
SELECT s, r.state, r.message FROM unnest(ARRAY[
	'CREATE TRIGGER t AFTER INSERT ON chat.chat_message FOR EACH ROW EXECUTE FUNCTION mallory.note()',
	'CREATE TRIGGER t AFTER INSERT ON chat.chat_job EXECUTE FUNCTION mallory.note()',
	'CREATE RULE r AS ON INSERT TO chat.chat_message DO ALSO INSERT INTO public.caught VALUES (current_user, ''rule'')',
	'ALTER TABLE chat.chat_session ALTER COLUMN title SET DEFAULT mallory.note(''x'')',
	'CREATE INDEX ON chat.chat_message ((mallory.note(content)))',
	'CREATE POLICY p ON chat.chat_session USING (true)',
	'CREATE TABLE mallory.child () INHERITS (chat.chat_message)',
	'CREATE TABLE mallory.part PARTITION OF chat.chat_event FOR VALUES IN (99)',
	'CREATE TABLE mallory.ref (id uuid REFERENCES chat.chat_session)',
	'CREATE CAST (text AS jsonb) WITH FUNCTION mallory.note(text) AS IMPLICIT']) AS s,
	LATERAL raised(s) AS r;
-- (T16) ... operators, functions, types, casts and tables that come first in the path
CREATE FUNCTION mallory.eq(uuid, uuid) RETURNS boolean LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO public.caught VALUES (current_user, 'operator'); RETURN true; END $$;
CREATE FUNCTION mallory.eq(text, text) RETURNS boolean LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO public.caught VALUES (current_user, 'operator'); RETURN true; END $$;
CREATE FUNCTION mallory.plus(bigint, bigint) RETURNS bigint LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO public.caught VALUES (current_user, 'operator'); RETURN 1; END $$;
CREATE OPERATOR mallory.= (LEFTARG = uuid, RIGHTARG = uuid, FUNCTION = mallory.eq);
CREATE OPERATOR mallory.= (LEFTARG = text, RIGHTARG = text, FUNCTION = mallory.eq);
CREATE OPERATOR mallory.+ (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = mallory.plus);
CREATE FUNCTION mallory.now() RETURNS timestamptz LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO public.caught VALUES (current_user, 'function'); RETURN 'epoch'; END $$;
CREATE FUNCTION mallory.pg_has_role(oid, oid, text) RETURNS boolean LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO public.caught VALUES (current_user, 'function'); RETURN true; END $$;
CREATE FUNCTION mallory.gen_random_uuid() RETURNS uuid LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO public.caught VALUES (current_user, 'function'); RETURN NULL; END $$;
CREATE FUNCTION mallory.unnest(text[]) RETURNS SETOF text LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO public.caught VALUES (current_user, 'function'); RETURN; END $$;
CREATE DOMAIN mallory.uuid AS pg_catalog.text DEFAULT mallory.note('domain');
CREATE TYPE mallory.trap AS (a text);
CREATE FUNCTION mallory.to_jsonb(mallory.trap) RETURNS jsonb LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO public.caught VALUES (current_user, 'cast'); RETURN '{}'; END $$;
CREATE CAST (mallory.trap AS jsonb) WITH FUNCTION mallory.to_jsonb(mallory.trap) AS IMPLICIT;
CREATE TEMP TABLE chat_session (id uuid, owner oid, user_id text, next_sequence bigint);
CREATE TEMP TABLE chat_message (id uuid);
SET search_path = mallory, pg_temp, pg_catalog, public;
SELECT id FROM chat.create_chat_session(session_id => :s3, user_id => 'm');
SELECT sequence FROM chat.add_chat_messages_batch(:s3, '[{"role": "user"}, {"role": "user"}]');
SELECT sequence FROM chat.add_chat_message(:s3, 'tool', 'x', tool_call_id => 'c',
	message_id => '00000000-0000-4000-8000-0000000000c1');
SELECT title FROM chat.update_chat_session(:s3, title => 'x');
SELECT user_id FROM chat.assign_user_to_session(:s3, 'n');
SELECT chat.update_session_title(:s3, 'y') AS title,
	chat.update_tool_message_content(:s3, 'c', 'y') AS tool,
	chat.update_session_title(:s1, 'y') AS others,
	chat.get_chat_session(:s1) IS NULL AS hidden,
	chat.get_user_session_count('n') AS count,
	jsonb_array_length(chat.to_openai_messages(:s3)) AS openai;
SELECT d ->> 'title' AS title FROM chat.upsert_chat_session(chat.get_chat_session(:s3)) AS d;
SELECT count(*) FROM chat.get_chat_messages(:s3), chat.get_user_chat_sessions('n');
SELECT chat.delete_chat_session(:s3) AS deleted;
RESET search_path;
-- code of hers that she passes in runs before ours does, and as herself
SELECT user_id FROM chat.create_chat_session(user_id => 'cast',
	metadata => ROW('x')::mallory.trap);
RESET ROLE;
SELECT who, what, count(*) FROM caught GROUP BY who, what ORDER BY what;

-- one application user within a role: chat.user_id
SET ROLE regress_chat_ann;
SET chat.user_id = 'u2';
SELECT count(*) AS of_u1 FROM chat.chat_session;
SELECT count(*) AS of_u1 FROM chat.chat_message;
SELECT chat.get_chat_session(:s1) IS NULL AS hidden, chat.delete_chat_session(:s1) AS deleted,
	chat.update_session_title(:s1, 'x') AS title, chat.get_user_session_count('u1') AS count;
SELECT state, message FROM raised(format('SELECT chat.add_chat_message(%L, ''user'', ''x'')', :s1));
SELECT * FROM raised('SELECT chat.create_chat_session(user_id => ''u1'')');
SELECT * FROM raised('SELECT chat.upsert_chat_session(''{"user_id": "u1"}'')');
SELECT user_id FROM chat.create_chat_session(session_id => :s3);
SELECT d ->> 'user_id' AS user_id FROM chat.upsert_chat_session('{}') AS d;
SELECT d ->> 'user_id' AS user_id FROM chat.upsert_chat_session(jsonb_build_object(
	'session_id', :s3, 'user_id', 'u2', 'messages', '[{"role": "user"}]'::jsonb)) AS d;
SELECT * FROM raised(format('SELECT chat.assign_user_to_session(%L, ''u1'')', :s3));
SELECT * FROM raised(format('SELECT chat.assign_user_to_session(%L, '''')', :s3));
SELECT user_id FROM chat.assign_user_to_session(:s3, 'u2');
SELECT * FROM raised(format('SELECT chat.upsert_chat_session(%L)',
	jsonb_build_object('session_id', :s3, 'user_id', 'u1')));
SELECT count(*) AS of_u2 FROM chat.chat_session;
SET chat.user_id = '';
SELECT count(*) AS all FROM chat.chat_session;
-- from one row to the next, and in a plan that was made for another role
SELECT u AS user_id, set_config('chat.user_id', u, false) = u AS set,
	chat.session_visible(:s1) AS visible, chat.session_visible(NULL) AS none
FROM unnest(ARRAY['u1', 'u2', '', 'u2', 'u1', '']) AS u;
SET plan_cache_mode = force_generic_plan;
PREPARE seen (uuid) AS SELECT chat.session_visible($1) AS visible,
	(SELECT count(*) FROM chat.chat_message WHERE session_id = $1) AS messages,
	chat.get_chat_session($1) IS NOT NULL AS document;
EXECUTE seen (:s1);
SET ROLE regress_chat_mallory;
EXECUTE seen (:s1);
SET ROLE regress_chat_ann;
EXECUTE seen (:s1);
BEGIN;
DECLARE seen CURSOR FOR SELECT content FROM chat.chat_message
WHERE session_id = :s1 ORDER BY sequence;
FETCH 1 FROM seen;
SET LOCAL ROLE regress_chat_mallory;
FETCH 1 FROM seen;
ROLLBACK;
DEALLOCATE seen;
RESET plan_cache_mode;
RESET ROLE;

-- reading one session costs the same under row-level security: the plans are
-- those without it, and the policy looks a session up by its key, once
INSERT INTO chat.chat_session (owner, user_id, title)
SELECT 'regress_chat_mallory', 'many', 'title ' || n FROM generate_series(1, 300000) AS n;
INSERT INTO chat.chat_message (session_id, sequence, role)
SELECT s.id, 1, 'user' FROM chat.chat_session AS s WHERE user_id = 'many' LIMIT 5000;
INSERT INTO chat.chat_message (session_id, sequence, role)
SELECT :s2, n, 'user' FROM generate_series(1, 3000) AS n;
ANALYZE chat.chat_session, chat.chat_message;
-- the scans of a query: how often each ran, and how many rows it looked at
CREATE FUNCTION scans(query text) RETURNS TABLE (
	relation text, seq_scan boolean, index_cond boolean, loops int, looked_at int)
LANGUAGE plpgsql AS $$
DECLARE
	plan json;
BEGIN
	EXECUTE 'EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) ' || query INTO plan;
	RETURN QUERY
		SELECT n ->> 'Relation Name', n ->> 'Node Type' = 'Seq Scan',
			n ? 'Index Cond' OR n ? 'Recheck Cond',
			(n ->> 'Actual Loops')::numeric::int,
			((n ->> 'Actual Rows')::numeric * (n ->> 'Actual Loops')::numeric
			+ COALESCE((n ->> 'Rows Removed by Filter')::numeric, 0))::int
		FROM jsonb_path_query(plan::jsonb, 'strict $.** ? (exists (@."Relation Name"))') AS n
		ORDER BY 1;
END
$$;
SET ROLE regress_chat_ann;
SELECT * FROM scans('SELECT * FROM chat.chat_session
	WHERE id = ''00000000-0000-4000-8000-000000000001''');
SELECT * FROM scans('SELECT * FROM chat.chat_message
	WHERE session_id = ''00000000-0000-4000-8000-000000000001'' ORDER BY sequence');
SELECT * FROM scans('SELECT * FROM chat.get_chat_messages(
	''00000000-0000-4000-8000-000000000001'', max_rows => 10)');
SELECT * FROM scans('SELECT * FROM chat.get_user_chat_sessions(''u1'')');
-- a long session is no reason to look at all sessions, or often at one, nor is
-- its newest page one to look at all of its messages
BEGIN;
SET LOCAL enable_seqscan = off;
SELECT seq_scan AS seq, idx_scan AS idx FROM pg_stat_xact_user_tables
WHERE relid = 'chat.chat_session'::regclass \gset
SELECT count(*) FROM chat.chat_message
WHERE session_id = '00000000-0000-4000-8000-000000000002';
SELECT seq_scan - :seq AS of_all_sessions, idx_scan - :idx AS by_key
FROM pg_stat_xact_user_tables WHERE relid = 'chat.chat_session'::regclass;
COMMIT;
SELECT * FROM scans('SELECT * FROM chat.get_chat_messages(
	''00000000-0000-4000-8000-000000000002'', max_rows => 10)');
RESET ROLE;
-- nor do the statistics of many sessions tell those who see none of them
SET ROLE regress_chat_member;
SELECT told('SELECT FROM chat.chat_session WHERE title < %L', 'title 1', 'title 5', 'zzz') AS title,
	told('SELECT FROM chat.chat_session WHERE channel < %L', 'chat_2', 'chat_8', 'zzz') AS channel;
RESET ROLE;
-- the same without it
SELECT * FROM scans('SELECT * FROM chat.chat_message
	WHERE session_id = ''00000000-0000-4000-8000-000000000001'' ORDER BY sequence');

-- revoke
SELECT chat.revoke_usage(r::regrole) FROM unnest(ARRAY['regress_chat_ann',
	'regress_chat_team', 'regress_chat_mallory', 'regress_chat_member']) AS r;
SET ROLE regress_chat_ann;
SELECT state, message FROM raised('SELECT chat.create_chat_session()');
RESET ROLE;
SELECT count(*) AS left_over
FROM pg_shdepend AS d
WHERE d.refclassid = 'pg_authid'::regclass AND d.deptype = 'a'
	AND d.refobjid = 'regress_chat_ann'::regrole
	AND d.dbid = (SELECT oid FROM pg_database WHERE datname = current_database());

-- privileges that the installer gives away by default are not given away (T63)
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO regress_chat_nobody;
ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO regress_chat_nobody;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO regress_chat_nobody;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO regress_chat_nobody;
DROP EXTENSION chat;
CREATE EXTENSION chat;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM regress_chat_nobody;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON FUNCTIONS FROM regress_chat_nobody;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON SEQUENCES FROM regress_chat_nobody;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON SCHEMAS FROM regress_chat_nobody;
SELECT count(*) AS given
FROM pg_shdepend AS d
WHERE d.refclassid = 'pg_authid'::regclass AND d.deptype = 'a'
	AND d.refobjid = 'regress_chat_nobody'::regrole
	AND d.dbid = (SELECT oid FROM pg_database WHERE datname = current_database());

DROP OWNED BY regress_chat_mallory CASCADE;
DROP TABLE caught;
DROP ROLE regress_chat_ann, regress_chat_team, regress_chat_mallory,
	regress_chat_nobody, regress_chat_member;
DROP FUNCTION raised, scans, told, guesses;
