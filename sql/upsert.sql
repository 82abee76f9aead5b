--
-- The document form of a session
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
-- the rows of a session with their versions: changes with each write
CREATE FUNCTION version(id uuid) RETURNS text LANGUAGE sql AS $$
	SELECT string_agg(v, ' ' ORDER BY n, v) FROM (
		SELECT 1, s.ctid::text || s.xmin FROM chat.chat_session AS s
		WHERE s.id = version.id
		UNION ALL
		SELECT 2, m.ctid::text || m.xmin FROM chat.chat_message AS m
		WHERE m.session_id = version.id) AS r(n, v)
$$;

\set s1 '''00000000-0000-4000-8000-000000000001'''
CREATE SERVER upsert_llm FOREIGN DATA WRAPPER chat_llm
	OPTIONS (base_url 'http://127.0.0.1:1/v1', model 'm');
CREATE SERVER upsert_other FOREIGN DATA WRAPPER chat_llm
	OPTIONS (base_url 'http://127.0.0.1:2/v1', model 'm');

-- nothing but a new session
SELECT d ->> 'session_id' IS NOT NULL AS id, d -> 'messages' AS messages,
	d -> 'usage' AS usage, d -> 'queued' AS queued, d ->> 'user_id' AS user_id
FROM chat.upsert_chat_session(session => '{}') AS d;
-- all of it
SELECT jsonb_pretty(chat.upsert_chat_session('{
	"session_id": "00000000-0000-4000-8000-000000000001",
	"user_id": "ann", "title": "Weather",
	"credentials": {"c": 1}, "successful_agent_runs": {"r": 2},
	"successful_agent_schedules": {"s": 3},
	"settings": {"model": "x"}, "metadata": {"k": null},
	"server": "upsert_llm", "channel": "gateway",
	"usage": [{"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11},
		{"prompt_tokens": 20, "completion_tokens": 2, "cost": 0.1}],
	"created_at": "2024-02-29T12:00:00+01:00",
	"messages": [
		{"role": "user", "content": "Weather?", "message_id": "00000000-0000-4000-8000-0000000000b1",
			"created_at": "2024-02-29T12:00:01+01:00"},
		{"role": "assistant", "content": null, "id": "00000000-0000-4000-8000-0000000000b2",
			"created_at": "2024-02-29T12:00:02+01:00",
			"tool_calls": [{"id": "call_1", "type": "function",
				"function": {"name": "weather", "arguments": "{}"}, "extra": {"s": "x"}}]},
		{"role": "tool", "content": "sunny", "tool_call_id": "call_1",
			"message_id": "00000000-0000-4000-8000-0000000000b3",
			"created_at": "2024-02-29T12:00:03+01:00", "metadata": {"m": 1}}]}')
	- 'updated_at') AS document;
SELECT next_sequence, owner = current_user::regrole AS owner, updated_at > created_at AS updated
FROM chat.chat_session WHERE id = :s1;

-- upsert(get(x)) changes nothing at all
UPDATE chat.chat_session SET updated_at = '2001-01-01' WHERE id = :s1;
SELECT version(:s1) AS before \gset
SELECT chat.upsert_chat_session(chat.get_chat_session(:s1)) = chat.get_chat_session(:s1) AS same;
SELECT version(:s1) = :'before' AS nothing_written;
-- nor does its own answer, nor a part of it, nor nulls
SELECT chat.upsert_chat_session(chat.upsert_chat_session(chat.get_chat_session(:s1)))
	= chat.get_chat_session(:s1) AS same;
SELECT chat.upsert_chat_session(jsonb_build_object('session_id', :s1))
	= chat.get_chat_session(:s1) AS same;
SELECT chat.upsert_chat_session(jsonb_build_object('session_id', :s1, 'title', NULL,
	'user_id', NULL, 'settings', NULL, 'messages', NULL, 'usage', NULL, 'server', NULL))
	= chat.get_chat_session(:s1) AS same;
SELECT chat.upsert_chat_session(jsonb_set(d, '{messages}', (d -> 'messages') - 2)) = d AS same
FROM chat.get_chat_session(:s1) AS d;
SELECT version(:s1) = :'before' AS nothing_written;
-- nor while a hidden message and a queued one are there
BEGIN;
UPDATE chat.chat_message SET active = false WHERE session_id = :s1 AND sequence = 1;
INSERT INTO chat.chat_task (session_id, server, input)
VALUES (:s1, 'upsert_llm', '{"role": "user", "content": "later"}'),
	(:s1, 'upsert_llm', '{"role": "user", "content": "still later"}'),
	(:s1, 'upsert_llm', NULL);
SELECT d -> 'queued' AS queued, jsonb_path_query_array(d, '$.messages[*].sequence') AS sequences,
	chat.upsert_chat_session(d) = d AS same
FROM chat.get_chat_session(:s1) AS d;
ROLLBACK;

-- fields that are there are set, others stay
SELECT d ->> 'title' AS title, d -> 'settings' AS settings, d ->> 'server' AS server,
	d ->> 'channel' AS channel, d ->> 'user_id' AS user_id, d -> 'credentials' AS credentials,
	d ->> 'created_at' AS created_at, (d ->> 'updated_at')::timestamptz = now() AS updated
FROM chat.upsert_chat_session(jsonb_build_object('session_id', :s1,
	'settings', '{"top_p": 0.5}'::jsonb, 'server', 'upsert_other', 'user_id', 'bob',
	'created_at', now(), 'updated_at', '1999-01-01')) AS d;
SELECT d ->> 'title' AS title, d ->> 'user_id' AS user_id, d ->> 'channel' AS channel
FROM chat.upsert_chat_session(jsonb_build_object('session_id', :s1, 'title', '',
	'user_id', '', 'channel', 'other')) AS d;
-- a server that is gone is an error for those only who choose it
DROP SERVER upsert_other;
SELECT chat.upsert_chat_session(chat.get_chat_session(:s1)) = chat.get_chat_session(:s1) AS same;
SELECT * FROM raised($$SELECT chat.upsert_chat_session('{"server": "upsert_other"}')$$);

-- totals never shrink
SELECT d -> 'usage' AS usage FROM chat.upsert_chat_session(jsonb_build_object('session_id', :s1,
	'usage', '[{"prompt_tokens": 5}, {"prompt_tokens": 6, "completion_tokens": 40}]'::jsonb)) AS d;
SELECT d -> 'usage' AS usage FROM chat.upsert_chat_session(jsonb_build_object('session_id', :s1,
	'usage', '[]'::jsonb, 'total_prompt_tokens', 100, 'total_completion_tokens', 0)) AS d;
SELECT d ->> 'total_prompt_tokens' AS prompt, d ->> 'total_completion_tokens' AS completion
FROM chat.upsert_chat_session(jsonb_build_object('session_id', :s1, 'total_prompt_tokens', 1,
	'usage', '[{"prompt_tokens": 101, "completion_tokens": null}, {}]'::jsonb)) AS d;
SELECT jsonb_path_query_array(d, '$.usage[*].total_tokens') AS total, chat.upsert_chat_session(d) = d AS same
FROM chat.upsert_chat_session('{"total_prompt_tokens": 9007199254740992,
	"total_completion_tokens": 9007199254740992}') AS d;
-- what was counted beyond that goes back as it is, and not further
SELECT id AS large FROM chat.create_chat_session() \gset
UPDATE chat.chat_session SET total_prompt_tokens = 9007199254741000 WHERE id = :'large';
SELECT chat.upsert_chat_session(d) = d AS same FROM chat.get_chat_session(:'large') AS d;
SELECT * FROM raised(format('SELECT chat.upsert_chat_session(%L)', jsonb_build_object(
	'session_id', :'large', 'total_prompt_tokens', 9007199254741001)));

-- messages beyond the stored ones are appended
SELECT version(:s1) AS before \gset
SELECT jsonb_path_query_array(d, '$.messages[*].sequence') AS sequences,
	jsonb_path_query_array(d, '$.messages[*].content') AS contents
FROM chat.upsert_chat_session(jsonb_build_object('session_id', :s1, 'messages', '[
	{"role": "user", "content": "Weather?"},
	{"role": "assistant", "sequence": 2, "tool_calls": [{"id": "call_1", "type": "function",
		"function": {"arguments": "{}", "name": "weather"}, "extra": {"s": "x"}}]},
	{"role": "tool", "content": "sunny", "tool_call_id": "call_1", "active": true},
	{"role": "assistant", "content": "It is sunny."},
	{"role": "user", "content": "Thanks", "active": false,
		"task_id": "00000000-0000-4000-8000-0000000000a1"}]'::jsonb)) AS d;
SELECT sequence, role, active, task_id, created_at > '2024-02-29 13:00' AS created
FROM chat.chat_message WHERE session_id = :s1 AND sequence > 3 ORDER BY sequence;
SELECT next_sequence FROM chat.chat_session WHERE id = :s1;
-- where the overlap differs, nothing is written
SELECT version(:s1) AS before \gset
SELECT r.state, r.message, r.detail, r.hint
FROM (VALUES
	(1, '{"content": "Whether?"}'), (1, '{"role": "system"}'),
	(1, '{"message_id": "00000000-0000-4000-8000-0000000000bb"}'),
	(1, '{"parts": []}'), (1, '{"name": "n"}'), (1, '{"metadata": {"m": 2}}'),
	(1, '{"active": false}'), (1, '{"sequence": 7}'), (2, '{"tool_calls": []}'),
	(2, '{"content": ""}'), (2, '{"refusal": "r"}'), (2, '{"function_call": {}}'),
	(3, '{"tool_call_id": "call_2"}'), (3, '{"metadata": {}}')) AS v(i, change),
	LATERAL raised(format('SELECT chat.upsert_chat_session(%L)',
		(SELECT jsonb_build_object('session_id', d -> 'session_id', 'title', 'lost',
			'messages', jsonb_set(d -> 'messages', ARRAY[(i - 1)::text],
				d -> 'messages' -> (i - 1) || change::jsonb)
				|| '{"role": "user", "content": "lost"}')
		FROM chat.get_chat_session(:s1) AS d))) AS r;
SELECT version(:s1) = :'before' AS nothing_written;
-- an id that is stored cannot be appended
SELECT * FROM raised(format('SELECT chat.upsert_chat_session(%L)', (SELECT jsonb_build_object(
	'session_id', :s1, 'messages', d -> 'messages' || '{"role": "user",
	"message_id": "00000000-0000-4000-8000-0000000000b1"}') FROM chat.get_chat_session(:s1) AS d)));
SELECT * FROM raised(format('SELECT chat.upsert_chat_session(%L)', (SELECT jsonb_build_object(
	'session_id', :s1, 'messages', (d #- '{messages,0,message_id}') -> 'messages'
	|| '{"role": "user", "message_id": "00000000-0000-4000-8000-0000000000b1"}')
	FROM chat.get_chat_session(:s1) AS d)));
-- neither can one that is hidden
SELECT id AS hidden FROM chat.chat_message WHERE session_id = :s1 AND NOT active \gset
SELECT * FROM raised(format('SELECT chat.upsert_chat_session(%L)', (SELECT jsonb_build_object(
	'session_id', :s1, 'messages', d -> 'messages' || jsonb_build_object('role', 'user',
	'content', 'Thanks', 'message_id', :'hidden')) FROM chat.get_chat_session(:s1) AS d)));

-- a document goes to another place
SELECT d AS document FROM chat.get_chat_session(:s1) AS d \gset
SELECT chat.delete_chat_session(:s1) AS deleted;
SELECT d - 'updated_at' - 'messages' - 'server' = e - 'updated_at' - 'messages' - 'server' AS same,
	jsonb_path_query_array(d, '$.messages[*].message_id')
	= jsonb_path_query_array(e, '$.messages[*].message_id') AS same_messages
FROM (VALUES (:'document'::jsonb)) AS v(e),
	chat.upsert_chat_session(e - 'server' || '{"server": "upsert_llm"}') AS d;
SELECT d ->> 'server' AS server FROM chat.get_chat_session(:s1) AS d;

-- what is refused
SELECT r.* FROM unnest(ARRAY[
	'[]', '1', '{"id": "x"}', '{"owner": "x"}', '{"format": "chat/1"}', '{"session_id": 1}', '{"session_id": "x"}',
	'{"user_id": 1}', '{"title": []}', '{"settings": []}', '{"settings": {"x": 1}}',
	'{"metadata": 1}', '{"summary": "x", "summary_sequence": 1}', '{"server": ""}', '{"channel": ""}',
	'{"channel": "aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffgggg"}',
	'{"total_prompt_tokens": -1}', '{"total_completion_tokens": 0.5}',
	'{"total_prompt_tokens": 9223372036854775808}',
	'{"total_completion_tokens": 9007199254740993}',
	'{"usage": [{"prompt_tokens": 9007199254740993}]}',
	'{"usage": {}}', '{"usage": [1]}', '{"usage": [{}, {"prompt_tokens": -1}]}',
	'{"usage": [{"completion_tokens": "1"}]}',
	'{"usage": [{"prompt_tokens": 9223372036854775807}, {"prompt_tokens": 1}]}',
	'{"created_at": "soon"}', '{"updated_at": 1}', '{"queued": {}}',
	'{"messages": {}}', '{"messages": [1]}', '{"messages": [{"role": "user"}, {}]}',
	'{"messages": [{"role": "user", "sequence": 0}]}',
	'{"messages": [{"role": "user", "task_id": "x"}]}',
	'{"messages": [{"role": "user", "created_at": "x"}]}',
	'{"messages": [{"role": "user", "active": 1}]}',
	'{"messages": [{"role": "user", "x": 1}]}']) AS d,
	LATERAL raised(format('SELECT chat.upsert_chat_session(%L)', d)) AS r;
SELECT * FROM raised('SELECT chat.upsert_chat_session(NULL)');

DELETE FROM chat.chat_session;
DROP SERVER upsert_llm;
DROP FUNCTION raised, version(uuid);
