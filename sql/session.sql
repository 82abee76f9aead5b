--
-- Sessions: create, read, change, list, delete
--
SET client_min_messages = warning;
SET timezone = 'UTC';

-- what a statement raises
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
-- the version of a session's row: changes with each write
CREATE FUNCTION version(id uuid) RETURNS text LANGUAGE sql AS
	'SELECT s.ctid::text || s.xmin FROM chat.chat_session AS s WHERE s.id = version.id';

\set s1 '''00000000-0000-4000-8000-000000000001'''
\set s2 '''00000000-0000-4000-8000-000000000002'''
\set none '''00000000-0000-4000-8000-00000000dead'''
\x on

-- create: with nothing at all
SELECT s.id IS NOT NULL AS id, user_id, owner = current_user::regrole AS owner,
	title, credentials, successful_agent_runs, successful_agent_schedules,
	total_prompt_tokens, total_completion_tokens, metadata,
	channel ~ '^chat_[0-9a-f]{32}$' AS channel, server, settings,
	next_sequence, created_at = now() AS created, updated_at = now() AS updated
FROM chat.create_chat_session() AS s;
-- its id begins with the time in milliseconds (UUIDv7)
WITH made AS MATERIALIZED (SELECT n, (chat.create_chat_session()).id FROM generate_series(1, 2) AS n),
	ids AS (SELECT n, id, replace(id::text, '-', '') AS hex FROM made)
SELECT substr(a.hex, 13, 1) AS version, substr(a.hex, 17, 1) ~ '[89ab]' AS variant,
	a.id < b.id AS ordered, substr(a.hex, 17) <> substr(b.hex, 17) AS random,
	now() - to_timestamp(('x0000' || substr(a.hex, 1, 12))::bit(64)::bigint / 1000.0)
		BETWEEN '-1 hour' AND '1 hour' AS of_now
FROM ids AS a, ids AS b WHERE a.n = 1 AND b.n = 2;
-- with everything
CREATE SERVER session_llm FOREIGN DATA WRAPPER chat_llm
	OPTIONS (base_url 'http://127.0.0.1:1/v1', model 'm');
CREATE FOREIGN DATA WRAPPER session_other;
CREATE SERVER session_other FOREIGN DATA WRAPPER session_other;
CREATE ROLE regress_chat_team NOLOGIN;
SELECT id, user_id, owner, title, metadata, channel, server, settings
FROM chat.create_chat_session(session_id => :s1, user_id => 'ann',
	title => 'First', server => 'session_llm',
	settings => '{"model": "m2", "temperature": 0.5}',
	metadata => '{"k": [1]}', owner => 'regress_chat_team',
	channel => 'gateway_7');
-- empty strings are nothing
SELECT user_id, title, channel <> '' AS channel
FROM chat.create_chat_session(user_id => '', title => '', channel => '');
-- an id that exists, a server that does not, an owner that does not
SELECT * FROM raised(format('SELECT chat.create_chat_session(session_id => %L)', :s1));
SELECT * FROM raised('SELECT chat.create_chat_session(server => ''nowhere'')');
SELECT * FROM raised('SELECT chat.create_chat_session(server => ''session_other'')');
SELECT * FROM raised('SELECT chat.create_chat_session(owner => 4000000000::oid)');
SELECT * FROM raised('SELECT chat.create_chat_session(metadata => ''[]'')');

-- settings: names, types and ranges
\x off
SELECT r.* FROM unnest(ARRAY[
	'[]', '"model"', '{"nonsense": 1}', '{"model": 1}', '{"model": null}',
	'{"title_model": true}', '{"temperature": "hot"}', '{"temperature": -0.1}',
	'{"temperature": 2.1}', '{"temperature": 1e400}', '{"top_p": 1.5}',
	'{"max_tokens": 0}', '{"max_tokens": 1.5}', '{"max_tokens": 3000000000}',
	'{"tools": "a"}', '{"tools": ["a", 1]}', '{"tools": {"a": 1}}',
	'{"tool_choice": 1}', '{"parallel_tool_calls": 1}',
	'{"max_context_messages": 0}', '{"first_token_timeout": 0}',
	'{"idle_timeout": -1}', '{"stream_timeout": "1s"}',
	'{"connect_timeout": 3000000}', '{"prompt": {}}', '{"thinking": "on"}',
	'{"extra_body": []}']) AS s,
	LATERAL raised(format('SELECT chat.create_chat_session(settings => %L)', s)) AS r;
SELECT * FROM raised(format('SELECT chat.create_chat_session(settings => %L)',
	'{"extra_body": ' || repeat('{"a":', 65) || '1' || repeat('}', 65) || '}'));
SELECT settings FROM chat.create_chat_session(settings => '{
	"model": "m", "title_model": "t", "temperature": 2, "top_p": 0,
	"max_tokens": 1, "tools": [], "tool_choice": {"type": "none"},
	"parallel_tool_calls": false, "max_context_messages": 1,
	"first_token_timeout": 0.5, "idle_timeout": 60, "stream_timeout": 300,
	"connect_timeout": 0.001, "prompt": "p", "thinking": true,
	"extra_body": {"a": {"b": null}}}');

-- get
SELECT jsonb_pretty(chat.get_chat_session(session_id => :s1)
	- 'created_at' - 'updated_at') AS document;
SELECT (d ->> 'created_at')::timestamptz = s.created_at AS created,
	(d ->> 'updated_at')::timestamptz = s.updated_at AS updated
FROM chat.get_chat_session(:s1) AS d, chat.chat_session AS s WHERE s.id = :s1;
SELECT chat.get_chat_session(:s1, 'ann') IS NOT NULL AS hers,
	chat.get_chat_session(:s1, user_id => 'bob') IS NULL AS not_his,
	chat.get_chat_session(:none) IS NULL AS none,
	chat.get_chat_session(NULL) IS NULL AS unknown;
-- an anonymous session matches no given user
SELECT id FROM chat.create_chat_session(session_id => :s2);
SELECT chat.get_chat_session(:s2, 'ann') IS NULL AS not_hers,
	chat.get_chat_session(:s2, '') IS NULL AS nobodys,
	chat.get_chat_session(:s2) ->> 'user_id' IS NULL AS anonymous;

-- update: what is not null, and updated_at
UPDATE chat.chat_session SET updated_at = '2001-01-01' WHERE id = :s1;
SELECT title, credentials, successful_agent_runs, successful_agent_schedules,
	total_prompt_tokens AS prompt, total_completion_tokens AS completion,
	settings, metadata, updated_at = now() AS updated
FROM chat.update_chat_session(session_id => :s1, credentials => '{"a": 1}',
	successful_agent_runs => '{"r": 1}', successful_agent_schedules => '{"s": 1}',
	total_prompt_tokens => 10, total_completion_tokens => 20);
SELECT title, credentials, total_prompt_tokens AS prompt, settings, metadata
FROM chat.update_chat_session(:s1, credentials => '{"b": 2}', title => 'Second',
	settings => '{"top_p": 1}', metadata => '{}');
SELECT title FROM chat.update_chat_session(:s1, title => '');
UPDATE chat.chat_session SET updated_at = '2001-01-01' WHERE id = :s1;
SELECT title, total_completion_tokens AS completion, updated_at = now() AS updated
FROM chat.update_chat_session(:s1);
SELECT chat.update_chat_session(:none, title => 'x') IS NULL AS none,
	chat.update_chat_session(NULL, title => 'x') IS NULL AS unknown;
SELECT state, message FROM raised(format(
	'SELECT chat.update_chat_session(%L, total_prompt_tokens => -1)', :s1));
SELECT state, message FROM raised(format(
	'SELECT chat.update_chat_session(%L, total_completion_tokens => -1)', :s1));
SELECT state, message FROM raised(format(
	'SELECT chat.update_chat_session(%L, total_prompt_tokens => 9007199254740993)', :s1));
SELECT state, message FROM raised(format(
	'SELECT chat.update_chat_session(%L, settings => ''{"x": 1}'')', :s1));
SELECT state, message FROM raised(format(
	'SELECT chat.update_chat_session(%L, metadata => ''1'')', :s1));
-- numbers that are long when they are written out, as in a dump
SELECT r.* FROM unnest(ARRAY['credentials', 'successful_agent_runs',
	'successful_agent_schedules', 'metadata']) AS a, LATERAL raised(format(
	'SELECT chat.update_chat_session(%L, %s => %L)', :s1, a,
	'{"a": [' || repeat('1e131071, ', 8) || '0]}')) AS r;

-- title: the stored one again writes nothing
SELECT chat.update_session_title(session_id => :s1, title => 'Third') AS found;
SELECT version(:s1) AS before \gset
SELECT chat.update_session_title(:s1, 'Third') AS found,
	chat.update_session_title(:s1, NULL) AS unchanged;
SELECT version(:s1) = :'before' AS nothing_written, title
FROM chat.chat_session WHERE id = :s1;
SELECT chat.update_session_title(:s1, '') AS cleared;
SELECT title IS NULL AS cleared, updated_at > '2001-01-01' AS updated
FROM chat.chat_session WHERE id = :s1;
SELECT chat.update_session_title(:none, 'x') AS none,
	chat.update_session_title(NULL, 'x') AS unknown;

-- assign
SELECT id, user_id FROM chat.assign_user_to_session(session_id => :s2, user_id => 'bob');
SELECT user_id, updated_at < now() AS left_alone
FROM chat.assign_user_to_session(:s2, NULL);
SELECT user_id IS NULL AS anonymous FROM chat.assign_user_to_session(:s2, '');
SELECT user_id FROM chat.assign_user_to_session(:s2, 'bob');
SELECT * FROM raised(format('SELECT chat.assign_user_to_session(%L, ''x'')', :none));
SELECT * FROM raised('SELECT chat.assign_user_to_session(NULL, ''x'')');

-- lists: newest first, ties by id, pages that lose nothing
SELECT s.id FROM generate_series(1, 7) AS i, chat.create_chat_session(
	user_id => 'list', title => 'n' || i,
	session_id => ('00000000-0000-4000-8000-0000000001' || lpad(i::text, 2, '0'))::uuid) AS s;
UPDATE chat.chat_session
SET updated_at = '2020-01-01'::timestamptz + right(title, 1)::int / 3 * interval '1 day'
WHERE user_id = 'list';
SELECT title, updated_at FROM chat.get_user_chat_sessions(user_id => 'list');
SELECT title FROM chat.get_user_chat_sessions('list', max_rows => 2, skip => 1);
SELECT count(*) FROM chat.get_user_chat_sessions('list', NULL, NULL);
WITH RECURSIVE page AS (
	SELECT 1 AS n, ARRAY(SELECT s FROM chat.get_user_chat_sessions('list', 2) AS s) AS rows
	UNION ALL
	SELECT n + 1, ARRAY(SELECT s FROM chat.get_user_chat_sessions('list', 2, 0,
		before_updated_at => rows[cardinality(rows)].updated_at,
		before_id => rows[cardinality(rows)].id) AS s)
	FROM page WHERE cardinality(rows) > 0)
SELECT n, ARRAY(SELECT (r).title FROM unnest(rows) AS r) AS titles FROM page;
SELECT title FROM chat.get_user_chat_sessions('list', before_updated_at => '2020-01-02');
SELECT r.state, r.message FROM unnest(ARRAY['max_rows', 'skip']) AS a, LATERAL raised(
	format('SELECT count(*) FROM chat.get_user_chat_sessions(''list'', %s => -1)', a)) AS r;
SELECT chat.get_user_session_count(user_id => 'list') AS seven,
	chat.get_user_session_count('nobody') AS none,
	chat.get_user_session_count(NULL) AS unknown,
	(SELECT count(*) FROM chat.get_user_chat_sessions('nobody')) AS no_rows,
	(SELECT count(*) FROM chat.get_user_chat_sessions(NULL)) AS nor_here;

-- updates stay HOT: no index has to follow them
SELECT id FROM chat.create_chat_session(user_id => 'hot',
	session_id => '00000000-0000-4000-8000-000000000900');
SELECT pg_stat_force_next_flush() IS NOT NULL AS flushed;
SELECT n_tup_upd AS upd, n_tup_hot_upd AS hot
FROM pg_stat_user_tables WHERE relid = 'chat.chat_session'::regclass \gset
DO $$
DECLARE
	s uuid := '00000000-0000-4000-8000-000000000900';
BEGIN
	FOR i IN 1 .. 30 LOOP
		PERFORM chat.add_chat_message(s, 'user', 'x');
		COMMIT;
		PERFORM chat.update_session_title(s, 't' || i);
		COMMIT;
		PERFORM chat.update_chat_session(s, total_prompt_tokens => i);
		COMMIT;
	END LOOP;
END
$$;
SELECT pg_stat_force_next_flush() IS NOT NULL AS flushed;
-- somebody's snapshot may keep the row's page full once
SELECT n_tup_upd - :upd AS updated, n_tup_hot_upd - :hot > 80 AS nearly_all_hot
FROM pg_stat_user_tables WHERE relid = 'chat.chat_session'::regclass;

-- delete: with all that belongs to it (in one transaction, so that a worker
-- sees nothing of it)
SELECT user_id FROM chat.create_chat_session('00000000-0000-4000-8000-000000000003');
BEGIN;
SELECT count(*) FROM chat.add_chat_messages_batch(:s1,
	'[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]');
INSERT INTO chat.chat_task (id, session_id, server, slot)
VALUES ('00000000-0000-4000-8000-0000000000a1', :s1, 'session_llm', 0),
	('00000000-0000-4000-8000-0000000000a2', :s1, 'session_llm', 3),
	('00000000-0000-4000-8000-0000000000a3', :s1, 'session_llm', NULL),
	('00000000-0000-4000-8000-0000000000a4', :s2, 'session_llm', 3);
INSERT INTO chat.chat_job (kind, session_id, task_id, owner, database, run_at)
SELECT 'completion', t.session_id, t.id, s.owner, 0, 'infinity'
FROM chat.chat_task AS t JOIN chat.chat_session AS s ON s.id = t.session_id;
INSERT INTO chat.chat_event (slot, task_id, seq, payload)
SELECT t.slot, t.id, n, '{}' FROM chat.chat_task AS t, generate_series(1, 3) AS n
WHERE t.slot IS NOT NULL;
SELECT chat.delete_chat_session(session_id => :s1, user_id => 'bob') AS not_his,
	chat.delete_chat_session('00000000-0000-4000-8000-000000000003', 'bob') AS anonymous,
	chat.delete_chat_session('00000000-0000-4000-8000-000000000003', '') AS nobodys,
	chat.delete_chat_session(:none) AS none,
	chat.delete_chat_session(NULL) AS unknown,
	chat.get_chat_session_message_count(:s1) AS messages;
SELECT chat.delete_chat_session(:s1, user_id => 'ann') AS hers,
	chat.delete_chat_session('00000000-0000-4000-8000-000000000003') AS anyones;
SELECT chat.delete_chat_session(:s1) AS again,
	(SELECT count(*) FROM chat.chat_message WHERE session_id = :s1) AS messages,
	(SELECT count(*) FROM chat.chat_task WHERE session_id = :s1) AS tasks,
	(SELECT count(*) FROM chat.chat_job WHERE session_id = :s1) AS jobs,
	(SELECT array_agg(DISTINCT right(task_id::text, 2)) FROM chat.chat_event) AS events,
	(SELECT count(*) FROM chat.chat_task WHERE session_id = :s2) AS others;
SELECT chat.delete_chat_session(:s2) AS found;
SELECT count(*) AS events FROM chat.chat_event;
COMMIT;

DELETE FROM chat.chat_session;
DROP SERVER session_llm, session_other;
DROP FOREIGN DATA WRAPPER session_other;
DROP ROLE regress_chat_team;
DROP FUNCTION raised, version(uuid);
