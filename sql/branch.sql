--
-- Branches, export and import, UIMessages, search
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

CREATE ROLE regress_chat_ann;
CREATE ROLE regress_chat_team;
CREATE ROLE regress_chat_mallory;
GRANT regress_chat_team TO regress_chat_ann;
SELECT chat.grant_usage(r::regrole) FROM unnest(ARRAY['regress_chat_ann',
	'regress_chat_team', 'regress_chat_mallory']) AS r;

-- what a fork up to a message holds
CREATE FUNCTION forks(session uuid) RETURNS TABLE (up_to bigint, messages jsonb)
LANGUAGE plpgsql AS $$
DECLARE
	f uuid;
BEGIN
	FOR up_to IN SELECT * FROM unnest(ARRAY[1, 2, 3, 4, 5, 6, 99, 0, NULL]) LOOP
		SELECT id INTO f FROM chat.fork_chat_session(session, up_to);
		messages := (SELECT jsonb_agg(concat(m.sequence, ' ', m.content,
				CASE WHEN NOT m.active THEN ' (aside)' END) ORDER BY m.sequence)
			FROM chat.get_chat_messages(f, all_branches => true) AS m);
		RETURN NEXT;
	END LOOP;
END
$$;

\set s1 '''00000000-0000-4000-8000-000000000001'''
\set s2 '''00000000-0000-4000-8000-000000000002'''
\set s3 '''00000000-0000-4000-8000-000000000003'''
\set none '''00000000-0000-4000-8000-00000000dead'''

-- a session with two questions, of which the first was answered twice and
-- the second edited: 1 2 | 3, 4 | 5 6
SET ROLE regress_chat_ann;
SELECT id FROM chat.create_chat_session(:s1, 'u1', 'Title', metadata => '{"m": 1}',
	settings => '{"model": "m"}');
SELECT title FROM chat.update_chat_session(:s1, credentials => '{"token": "secret"}',
	successful_agent_runs => '{"a": 1}', total_prompt_tokens => 10, total_completion_tokens => 5);
SELECT count(*) FROM chat.add_chat_messages_batch(:s1, '[
	{"role": "user", "content": "question one"}, {"role": "assistant", "content": "first answer"},
	{"role": "assistant", "content": "second answer"}, {"role": "user", "content": "question two"},
	{"role": "user", "content": "question three"}, {"role": "assistant", "content": "third answer",
		"message_id": "00000000-0000-4000-8000-0000000000c6", "metadata": {"model": "m"}}]');
RESET ROLE;
UPDATE chat.chat_message SET active = false, superseded_by = CASE sequence WHEN 2 THEN 3 ELSE 5 END,
	task_id = '00000000-0000-4000-8000-0000000000a1'
WHERE session_id = :s1 AND sequence IN (2, 4);
SET ROLE regress_chat_ann;
-- what was set aside is read when asked for
SELECT array_agg(sequence) AS seen FROM chat.get_chat_messages(:s1);
SELECT array_agg(sequence) AS all FROM chat.get_chat_messages(:s1, all_branches => true);
SELECT array_agg(sequence) AS page FROM chat.get_chat_messages(:s1, 5, 2, true);
SELECT chat.get_chat_session_message_count(:s1) AS count;
SELECT m ->> 'sequence' AS sequence, m -> 'active' AS active, m -> 'superseded_by' AS superseded_by
FROM jsonb_array_elements(chat.get_chat_session(:s1, all_branches => true) -> 'messages') AS m;
SELECT bool_or(m ?| '{active,superseded_by}') AS told
FROM jsonb_array_elements(chat.get_chat_session(:s1) -> 'messages') AS m;
SELECT jsonb_agg(m -> 'content') AS for_the_model
FROM jsonb_array_elements(chat.to_openai_messages(:s1)) AS m;

-- sessions without branches pay nothing: no index but the keys
SELECT count(*) AS keys FROM pg_index WHERE indrelid = 'chat.chat_message'::regclass;

-- fork: as it is, and as it was
SELECT id <> :s1 AS another, user_id, owner, title, credentials, successful_agent_runs, total_prompt_tokens,
	metadata, settings, next_sequence, channel LIKE 'chat\_%' AS channel
FROM chat.fork_chat_session(session_id => :s1);
SELECT * FROM forks(:s1);
SELECT count(DISTINCT channel) = count(*) AS channels_differ,
	bool_and(next_sequence = 1 + (SELECT count(*) FROM chat.chat_message AS m WHERE m.session_id = s.id))
	FILTER (WHERE id <> :s1) AS gapless
FROM chat.chat_session AS s;
-- the summary goes with all the messages that it is made of, or not at all
RESET ROLE;
CREATE FUNCTION fork_summaries(session uuid, reach bigint) RETURNS TABLE (up_to bigint, summary text, summary_sequence bigint)
LANGUAGE plpgsql AS $$
DECLARE
	f chat.chat_session;
BEGIN
	UPDATE chat.chat_session AS s SET summary = 'S', summary_sequence = reach WHERE s.id = session;
	FOR up_to IN SELECT * FROM unnest(ARRAY[1, 2, 3, 4, 5, NULL]) LOOP
		SELECT * INTO f FROM chat.fork_chat_session(session, up_to);
		summary := f.summary;
		summary_sequence := f.summary_sequence;
		RETURN NEXT;
	END LOOP;
END
$$;
SELECT reach, f.* FROM unnest(ARRAY[1, 3, 4, 5]) AS reach, LATERAL fork_summaries(:s1, reach) AS f;
UPDATE chat.chat_session SET summary = NULL, summary_sequence = 0;
SET ROLE regress_chat_ann;
-- what is forked goes its own way
SELECT id AS f FROM chat.fork_chat_session(:s1, 3) \gset
SELECT sequence FROM chat.add_chat_message(:'f', 'user', 'other');
SELECT next_sequence FROM chat.chat_session WHERE id = :s1;
SELECT * FROM raised(format('SELECT chat.fork_chat_session(%L)', :none));
SELECT * FROM raised('SELECT chat.fork_chat_session(NULL)');
SET ROLE regress_chat_mallory;
SELECT state, message FROM raised(format('SELECT chat.fork_chat_session(%L)', :s1));
SET ROLE regress_chat_ann;
SET chat.user_id = 'u2';
SELECT state, message FROM raised(format('SELECT chat.fork_chat_session(%L)', :s1));
SET chat.user_id = '';

--
-- Export and import
--
SELECT array_agg(key ORDER BY key COLLATE "C") AS keys
FROM jsonb_object_keys(chat.export_chat_session(session_id => :s1)) AS key;
SELECT chat.export_chat_session(:none) IS NULL AS none, chat.export_chat_session(NULL) IS NULL AS unknown,
	chat.export_chat_session(:s1)::text LIKE '%secret%' AS credentials;
SET ROLE regress_chat_mallory;
SELECT chat.export_chat_session(:s1) IS NULL AS hidden;
SET ROLE regress_chat_ann;
-- there and back again
SELECT chat.export_chat_session(:s1) AS document, channel AS old_channel FROM chat.chat_session WHERE id = :s1 \gset
SELECT * FROM raised(format('SELECT chat.import_chat_session(%L)', :'document'));
SELECT chat.delete_chat_session(:s1);
SELECT owner, user_id, title, credentials, next_sequence, channel <> :'old_channel' AS another_channel
FROM chat.import_chat_session(document => :'document');
SELECT chat.export_chat_session(:s1) = :'document' AS the_same;
SELECT * FROM forks(:s1) WHERE up_to IN (2, 4);
-- as a copy, for another role
SELECT id, owner FROM chat.import_chat_session(:'document', session_id => :s2, owner => 'regress_chat_team');
SELECT chat.export_chat_session(:s2) - 'session_id' = :'document'::jsonb - 'session_id' AS the_same;
SELECT state, message FROM raised(format('SELECT chat.import_chat_session(%L, gen_random_uuid(), ''regress_chat_mallory'')', :'document'));
-- with its summary, which no copy is without
RESET ROLE;
UPDATE chat.chat_session SET summary = 'S', summary_sequence = 3 WHERE id = :s1;
SET ROLE regress_chat_ann;
SELECT chat.export_chat_session(:s1) AS summed_up \gset
SELECT :'summed_up'::jsonb - ARRAY['summary', 'summary_sequence'] = :'document'::jsonb AS all_else,
	:'summed_up'::jsonb ->> 'summary' AS summary, :'summed_up'::jsonb -> 'summary_sequence' AS reach;
SELECT id AS f, summary, summary_sequence FROM chat.import_chat_session(:'summed_up', gen_random_uuid()) \gset
SELECT chat.export_chat_session(:'f') - 'session_id' = :'summed_up'::jsonb - 'session_id' AS the_same,
	summary, summary_sequence FROM chat.chat_session WHERE id = :'f';
RESET ROLE;
UPDATE chat.chat_session SET summary = NULL, summary_sequence = 0 WHERE id = :s1;
SET ROLE regress_chat_ann;
-- documents of others
SELECT id IS NOT NULL AS id, owner, next_sequence FROM chat.import_chat_session('{}');
SELECT next_sequence FROM chat.import_chat_session('{"messages": [
	{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}');
SELECT d, r.* FROM unnest(ARRAY['[]', '1', '{"x": 1}', '{"format": "chat/2"}', '{"format": 1}',
	'{"messages": [{"role": "user", "sequence": 2}]}',
	'{"messages": [{"role": "user", "superseded_by": 0}]}',
	'{"messages": [{"role": "user", "superseded_by": "x"}]}',
	'{"messages": [{"role": "user", "task_id": "x"}]}',
	'{"summary": "x"}', '{"summary_sequence": 1}', '{"summary": "x", "summary_sequence": 1}',
	'{"summary": "x", "summary_sequence": 0, "messages": [{"role": "user"}]}', '{"summary": 1, "summary_sequence": 1}',
	'{"updated_at": "x"}', '{"server": "nowhere"}']) WITH ORDINALITY AS v(d, n),
	LATERAL raised(format('SELECT chat.import_chat_session(%L)', d)) AS r ORDER BY n;
SELECT * FROM raised('SELECT chat.import_chat_session(NULL)');
-- a linear one goes through upsert, too, without its mark, and changes nothing
SELECT id AS f FROM chat.fork_chat_session(:s1) \gset
SELECT chat.export_chat_session(:'f') AS document \gset
SELECT chat.upsert_chat_session(:'document'::jsonb - 'format') IS NOT NULL AS upserted;
SELECT chat.export_chat_session(:'f') = :'document' AS the_same;
SELECT * FROM raised('SELECT chat.add_chat_messages_batch(''00000000-0000-4000-8000-000000000001'', ''[{"role": "user", "superseded_by": 1}]'')');

--
-- UIMessages
--
SELECT id FROM chat.create_chat_session(:s3);
SELECT count(*) FROM chat.add_chat_messages_batch(:s3, '[
	{"role": "system", "content": "Be brief."},
	{"role": "user", "content": "plain", "message_id": "00000000-0000-4000-8000-0000000000c2",
		"metadata": {"context": {"url": "u"}}},
	{"role": "user", "parts": [{"type": "text", "text": "see"},
		{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
		{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
		{"type": "input_audio", "input_audio": {"data": "BB==", "format": "wav"}},
		{"type": "input_audio", "input_audio": {"data": "BB=="}},
		{"type": "file", "file": {"file_data": "data:application/pdf;base64,CC==", "filename": "c.pdf"}},
		{"type": "file", "file": {"file_data": "DD=="}},
		{"type": "file", "file": {"file_id": "f1"}}, "odd", {"type": "refusal", "refusal": "no"}]},
	{"role": "tool", "tool_call_id": "orphan", "content": "nobody asked"},
	{"role": "assistant", "content": "Let me look.", "message_id": "00000000-0000-4000-8000-0000000000c5",
		"metadata": {"reasoning": "hm", "reasoning_details": [], "model": "m", "finish_reason": "tool_calls"},
		"tool_calls": [
		{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Bonn\"}"}},
		{"id": "c2", "type": "function", "function": {"name": "list", "arguments": ""}},
		{"id": "c3", "type": "function", "function": {"name": "fail", "arguments": "{\"a\": 1e999999}"}},
		{"id": "c4", "type": "function", "function": {"name": "slow", "arguments": "{\"nul\": \"\\u0000\"}"}},
		{"id": "c5", "type": "function", "function": {"name": "lost"}},
		{"id": "c6", "type": "function", "function": {"name": "broken", "arguments": "{\"a\""}},
		{"type": "function", "function": {"name": "unnamed", "arguments": "{}"}},
		{"id": "c8", "type": "function", "function": {}}]},
	{"role": "tool", "tool_call_id": "c2", "content": "[1, 2]"},
	{"role": "tool", "tool_call_id": "c1", "content": "sunny"},
	{"role": "tool", "tool_call_id": "c3", "content": "{\"type\": \"error\", \"message\": \"broke\"}"},
	{"role": "tool", "tool_call_id": "c4", "content": "{\"type\": \"operation_pending\", \"operation_id\": \"o\"}"},
	{"role": "assistant", "content": "Sunny.", "metadata": {"model": "m2", "finish_reason": "stop", "interrupted": true}},
	{"role": "assistant", "refusal": "I will not.", "message_id": "00000000-0000-4000-8000-0000000000cb"},
	{"role": "assistant", "function_call": {"name": "old", "arguments": "{}"},
		"message_id": "00000000-0000-4000-8000-0000000000cc"},
	{"role": "function", "name": "old", "content": "{not json"},
	{"role": "developer", "content": null},
	{"role": "user", "content": "aside"}]');
RESET ROLE;
UPDATE chat.chat_message SET active = false WHERE session_id = :s3 AND content = 'aside';
UPDATE chat.chat_message SET created_at = '2026-01-02 03:04:05', id = CASE WHEN sequence IN (1, 3, 14)
	THEN ('00000000-0000-4000-8000-0000000000f' || sequence % 10)::uuid ELSE id END
WHERE session_id = :s3;
SET ROLE regress_chat_ann;
SELECT jsonb_pretty(chat.to_ui_messages(session_id => :s3));
-- the steps of one task are one message, under the id of the first
RESET ROLE;
UPDATE chat.chat_message SET task_id = ('00000000-0000-4000-8000-0000000000a' || CASE WHEN sequence < 11 THEN 1 ELSE 2 END)::uuid
WHERE session_id = :s3 AND sequence BETWEEN 3 AND 13;
SET ROLE regress_chat_ann;
SELECT m ->> 'id' AS id, m ->> 'role' AS role, jsonb_path_query_array(m, '$.parts[*].type') AS parts
FROM jsonb_array_elements(chat.to_ui_messages(:s3)) AS m WHERE m ->> 'role' = 'assistant';
SELECT chat.to_ui_messages(:none) IS NULL AS none, chat.to_ui_messages(NULL) IS NULL AS unknown,
	chat.to_ui_messages((chat.create_chat_session()).id) AS empty;
SET ROLE regress_chat_mallory;
SELECT chat.to_ui_messages(:s3) IS NULL AS hidden;

-- calls that are under way, that wait for an approval, that were denied (in one
-- transaction, so that a worker does not see a task without a job)
SET ROLE regress_chat_ann;
SELECT id AS s4 FROM chat.create_chat_session() \gset
SELECT count(*) FROM chat.add_chat_messages_batch(:'s4', '[
	{"role": "user", "content": "go"},
	{"role": "assistant", "message_id": "00000000-0000-4000-8000-0000000000d2", "tool_calls": [
		{"id": "c1", "function": {"name": "runs", "arguments": "{}"}},
		{"id": "c2", "function": {"name": "asks", "arguments": "{}"}},
		{"id": "c3", "function": {"name": "denied", "arguments": "{}"}},
		{"id": "c4", "function": {"name": "denied", "arguments": "{}"}},
		{"id": "c5", "function": {"name": "long", "arguments": "{}"}}]},
	{"role": "tool", "tool_call_id": "c1", "name": "runs", "content": "", "metadata": {"pending": true}},
	{"role": "tool", "tool_call_id": "c2", "name": "asks", "content": "", "metadata": {"pending": true}},
	{"role": "tool", "tool_call_id": "c3", "content": "{\"type\": \"error\", \"code\": \"denied\", \"message\": \"no\"}",
		"metadata": {"operation_id": "00000000-0000-4000-8000-0000000000e3"}},
	{"role": "tool", "tool_call_id": "c4", "content": "{\"type\": \"error\", \"code\": \"denied\"}"},
	{"role": "tool", "tool_call_id": "c5", "name": "long", "content": "{\"type\": \"operation_pending\"}", "metadata": {"pending": true}}]');
RESET ROLE;
BEGIN;
INSERT INTO chat.chat_task (id, session_id, status, server)
VALUES ('00000000-0000-4000-8000-0000000000f2', :'s4', 'waiting', 'nobody');
INSERT INTO chat.chat_tool_call (operation_id, session_id, task_id, message_id, position, sequence, step, call_id, name, kind, arguments, status)
VALUES ('00000000-0000-4000-8000-0000000000e2', :'s4', '00000000-0000-4000-8000-0000000000f2', '00000000-0000-4000-8000-0000000000d2', 2, 4, 1, 'c2', 'asks', 'sql', '{}', 'approval');
SET ROLE regress_chat_ann;
SELECT p - 'input' AS part FROM jsonb_path_query(chat.to_ui_messages(:'s4'), '$[1].parts[1 to last]') AS p;
-- in a copy they never end
SELECT id AS f FROM chat.fork_chat_session(:'s4') \gset
SELECT sequence, content, metadata FROM chat.get_chat_messages(:'f') WHERE role = 'tool';
SELECT id AS f FROM chat.import_chat_session(chat.export_chat_session(:'s4'), gen_random_uuid()) \gset
SELECT sequence, content, metadata FROM chat.get_chat_messages(:'f') WHERE role = 'tool';
ROLLBACK;

--
-- Search
--
RESET ROLE;
DELETE FROM chat.chat_session;
SET ROLE regress_chat_ann;
SELECT id FROM chat.create_chat_session(:s1, 'u1');
SELECT id FROM chat.create_chat_session(:s2, 'u2', owner => 'regress_chat_team');
SET ROLE regress_chat_mallory;
SELECT id FROM chat.create_chat_session(:s3, 'u1');
SELECT count(*) FROM chat.add_chat_messages_batch(:s3, '[{"role": "user", "content": "elephants of Mallory"}]');
SET ROLE regress_chat_ann;
SELECT count(*) FROM chat.add_chat_messages_batch(:s1, '[
	{"role": "user", "content": "Where do elephants live?"},
	{"role": "assistant", "content": "Elephants live in Africa. Elephants, elephants."},
	{"role": "tool", "tool_call_id": "c", "content": "elephants"},
	{"role": "user", "content": "forgotten elephants"}, {"role": "user", "content": null}]');
SELECT count(*) FROM chat.add_chat_messages_batch(:s2, '[{"role": "user", "content": "An elephants question of the team"}]');
RESET ROLE;
UPDATE chat.chat_message SET active = false WHERE content = 'forgotten elephants';
CREATE FUNCTION found(query text, user_id text DEFAULT NULL, max_rows int DEFAULT 20,
	config regconfig DEFAULT 'simple') RETURNS TABLE (excerpt text) LANGUAGE sql AS $$
	SELECT f.excerpt FROM chat.search_messages($1, $2, $3, $4) AS f $$;
SET ROLE regress_chat_ann;
SELECT session_id, sequence, role, excerpt, rank > 0 AS rank, created_at IS NOT NULL AS created_at
FROM chat.search_messages(query => 'elephants', user_id => NULL, max_rows => 20);
SELECT * FROM found('elephants', 'u1');
SELECT * FROM found('elephants', max_rows => 1);
SELECT count(*) FROM found('elephants', max_rows => NULL);
SELECT * FROM found('elephants -live');
SELECT * FROM found('"elephants live"');
SELECT * FROM found('question or africa');
-- another configuration knows more forms
SELECT count(*) AS simple FROM found('elephant');
SELECT count(*) AS english FROM found('elephant', config => 'english');
SELECT count(*) AS none FROM found('giraffe');
SELECT count(*) AS null_query FROM found(NULL);
SELECT count(*) AS null_config FROM found('elephants', config => NULL);
SELECT count(*) AS empty_query FROM found('');
SELECT state, message FROM raised('SELECT * FROM chat.search_messages(''x'', max_rows => -1)');
SET chat.user_id = 'u2';
SELECT * FROM found('elephants');
SET chat.user_id = '';
SET ROLE regress_chat_mallory;
SELECT * FROM found('elephants');
-- nor does the parser tell of what it met in messages of others
RESET ROLE;
INSERT INTO chat.chat_message (session_id, sequence, role, content)
VALUES (:s2, 99, 'user', repeat('x', 3000));
SET ROLE regress_chat_mallory;
SET client_min_messages = notice;
SELECT * FROM found('elephants');
SELECT current_setting('client_min_messages') AS still;
SET client_min_messages = warning;
-- the index: the administrator's, and used by those who search
SELECT state, message FROM raised('SELECT chat.create_search_index()');
RESET ROLE;
SELECT chat.create_search_index(), chat.create_search_index(), chat.create_search_index(config => 'english');
INSERT INTO chat.chat_message (session_id, sequence, role, content)
SELECT :s3, n, 'user', 'filler ' || n FROM generate_series(100, 3000) AS n;
SELECT state, message FROM raised(format('INSERT INTO chat.chat_message (session_id, sequence, role, content)
	SELECT %L, 5000, ''user'', string_agg(''w'' || n, '' '') FROM generate_series(1, 200000) AS n', :s3));
VACUUM ANALYZE chat.chat_message;
SELECT pg_stat_force_next_flush();
SELECT idx_scan AS before FROM pg_stat_user_indexes WHERE indexrelname = 'chat_message_search_simple' \gset
SELECT count(*) FROM found('africa');
SELECT pg_stat_force_next_flush();
SELECT idx_scan > :before AS index_used FROM pg_stat_user_indexes WHERE indexrelname = 'chat_message_search_simple';
-- which does not tell others in how many messages it found a word
SET ROLE regress_chat_mallory;
BEGIN;
SELECT idx_tup_fetch AS before FROM pg_stat_xact_user_tables
WHERE relid = 'chat.chat_message'::regclass \gset
SELECT count(*) FROM found('africa');
SELECT idx_tup_fetch - :before AS fetched FROM pg_stat_xact_user_tables
WHERE relid = 'chat.chat_message'::regclass;
COMMIT;
RESET ROLE;
DROP INDEX chat.chat_message_search_simple, chat.chat_message_search_english;

DELETE FROM chat.chat_session;
SELECT chat.revoke_usage(r::regrole) FROM unnest(ARRAY['regress_chat_ann',
	'regress_chat_team', 'regress_chat_mallory']) AS r;
DROP FUNCTION forks, found, fork_summaries;
DROP ROLE regress_chat_ann, regress_chat_team, regress_chat_mallory;
DROP FUNCTION raised;
