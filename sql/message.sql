--
-- Messages: one, many, tool results, OpenAI form
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

\set s1 '''00000000-0000-4000-8000-000000000001'''
\set none '''00000000-0000-4000-8000-00000000dead'''
SELECT id FROM chat.create_chat_session(session_id => :s1);

-- add: all arguments, in one of the six roles each
UPDATE chat.chat_session SET updated_at = '2001-01-01' WHERE id = :s1;
SELECT session_id, sequence, id IS NOT NULL AS id, role, content, active,
	metadata, created_at = now() AS created
FROM chat.add_chat_message(session_id => :s1, role => 'system', content => 'Be brief.');
SELECT next_sequence, updated_at > '2001-01-01' AS updated FROM chat.chat_session WHERE id = :s1;
\x on
SELECT sequence, role, content, name FROM chat.add_chat_message(:s1, 'developer',
	'Use UTC.', name => 'dev');
SELECT sequence, role, content, parts, name FROM chat.add_chat_message(:s1, 'user',
	name => 'ann', parts => '[{"type": "text", "text": "Weather?"}]');
SELECT sequence, role, content, refusal, tool_calls FROM chat.add_chat_message(:s1,
	'assistant', tool_calls => '[{"id": "call_1", "type": "function",
	"function": {"name": "weather", "arguments": "{}"}, "extra": {"x": 1}}]');
SELECT sequence, role, content, tool_call_id FROM chat.add_chat_message(:s1, 'tool',
	content => 'sunny', tool_call_id => 'call_1');
SELECT sequence, role, content, function_call FROM chat.add_chat_message(:s1,
	'assistant', function_call => '{"name": "old", "arguments": "{}"}');
SELECT sequence, role, content, name FROM chat.add_chat_message(:s1, 'function',
	'old result', name => 'old');
SELECT sequence, role, refusal, id FROM chat.add_chat_message(:s1, 'assistant',
	refusal => 'No.', message_id => '00000000-0000-4000-8000-0000000000b8');
\x off
-- the expected sequence; a stale one
SELECT sequence FROM chat.add_chat_message(:s1, 'user', 'nine', sequence => 9);
SELECT * FROM raised(format(
	'SELECT chat.add_chat_message(%L, ''user'', ''x'', sequence => 9)', :s1));
SELECT * FROM raised(format(
	'SELECT chat.add_chat_message(%L, ''user'', ''x'', sequence => 11)', :s1));
-- sequences start at 1: who counts from 0 is told so
SELECT r.* FROM unnest(ARRAY[0, -1]) AS n, LATERAL raised(format(
	'SELECT chat.add_chat_message(%L, ''user'', ''x'', sequence => %s)', :s1, n)) AS r;
SELECT * FROM raised(format('SELECT chat.add_chat_messages_batch(%L,
	''[{"role": "user"}]'', start_sequence => 0)', :s1));
-- an id that is stored is the same message, not another
SELECT sequence, refusal FROM chat.add_chat_message(:s1, 'assistant',
	refusal => 'No.', message_id => '00000000-0000-4000-8000-0000000000b8');
SELECT sequence FROM chat.add_chat_message(:s1, 'assistant', refusal => 'No.',
	message_id => '00000000-0000-4000-8000-0000000000b8', sequence => 8);
SELECT * FROM raised(format('SELECT chat.add_chat_message(%L, ''assistant'',
	refusal => ''No.'', message_id => ''00000000-0000-4000-8000-0000000000b8'',
	sequence => 10)', :s1));
SELECT * FROM raised(format('SELECT chat.add_chat_message(%L, ''assistant'', ''Yes.'',
	message_id => ''00000000-0000-4000-8000-0000000000b8'')', :s1));
SELECT next_sequence, (SELECT count(*) FROM chat.chat_message) AS messages
FROM chat.chat_session WHERE id = :s1;
-- what is refused
SELECT r.* FROM unnest(ARRAY[
	'''robot'', ''x''', '''User'', ''x''', 'NULL, ''x''', '''tool'', ''x''',
	'''assistant'', tool_calls => ''{}''', '''assistant'', tool_calls => ''[1]''',
	'''assistant'', tool_calls => ''"x"''', '''assistant'', tool_calls => ''null''',
	'''assistant'', function_call => ''[]''', '''user'', parts => ''{}''']) AS a,
	LATERAL raised(format('SELECT chat.add_chat_message(%L, %s)', :s1, a)) AS r;
-- nor is what a request would not take, and would go without: 64 levels do
SELECT r.* FROM unnest(ARRAY['parts', 'tool_calls', 'function_call']) AS a,
	LATERAL raised(format('SELECT chat.add_chat_message(%L, ''assistant'', %s => %L)', :s1, a,
		CASE a WHEN 'parts' THEN repeat('[', 65) || repeat(']', 65)
			WHEN 'tool_calls' THEN '[' || repeat('{"a":', 64) || '1' || repeat('}', 64) || ']'
			ELSE repeat('{"a":', 65) || '1' || repeat('}', 65) END)) AS r;
SELECT * FROM raised(format('SELECT chat.add_chat_messages_batch(%L, %L)', :s1,
	'[{"role": "user", "content": ' || repeat('[', 65) || repeat(']', 65) || '}]'));
BEGIN;
SELECT id AS s4 FROM chat.create_chat_session() \gset
SELECT sequence FROM chat.add_chat_message(:'s4', 'user',
	parts => (repeat('[', 64) || repeat(']', 64))::jsonb);
SELECT length(chat.to_openai_messages(:'s4') -> 0 ->> 'content') AS brackets;
ROLLBACK;
SELECT * FROM raised(format('SELECT chat.add_chat_message(%L, ''user'', ''x'')', :none));
SELECT * FROM raised(format('SELECT chat.add_chat_message(%L, ''user'', ''x'',
	message_id => %L)', :none, :none));
SELECT * FROM raised('SELECT chat.add_chat_message(NULL, ''user'', ''x'')');

-- OpenAI form
SELECT jsonb_pretty(chat.to_openai_messages(session_id => :s1)) AS messages;
SELECT id AS s2 FROM chat.create_chat_session() \gset
SELECT chat.to_openai_messages(:'s2') AS empty,
	chat.to_openai_messages(:none) IS NULL AS none,
	chat.to_openai_messages(NULL) IS NULL AS unknown;
-- calls without id or name are left out, what has been cut short says so
SELECT count(*) FROM chat.add_chat_messages_batch(:'s2', '[
	{"role": "user", "content": null},
	{"role": "user", "content": "a", "metadata": {"context": {"url": "u", "content": "c"}}},
	{"role": "assistant", "content": "cut", "metadata": {"interrupted": true}},
	{"role": "assistant", "content": "whole", "metadata": {"interrupted": false}},
	{"role": "assistant", "tool_calls": [
		{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
		{"type": "function", "function": {"name": "g", "arguments": "{}"}},
		{"id": "c", "type": "function", "function": {"arguments": "{}"}}],
		"metadata": {"reasoning_details": [{"type": "r"}]}},
	{"role": "tool", "tool_call_id": "a", "content": "hidden"}]');
UPDATE chat.chat_message SET active = false
WHERE session_id = :'s2' AND content = 'hidden';
SELECT n, m ->> 'role' AS role, m - 'role' - 'content' AS others,
	m ->> 'content' IN ('', 'whole') AS as_is, m ->> 'content' LIKE 'cut_%' AS marked,
	m ->> 'content' LIKE '%_a' AS with_context
FROM jsonb_array_elements(chat.to_openai_messages(:'s2')) WITH ORDINALITY AS e(m, n);

-- without content, the six roles; the API wants a string of all but a refusal
SELECT id AS s3 FROM chat.create_chat_session() \gset
SELECT count(*) FROM chat.add_chat_messages_batch(:'s3', '[
	{"role": "system"}, {"role": "developer"}, {"role": "user"}, {"role": "assistant"},
	{"role": "tool", "tool_call_id": "c"}, {"role": "function"},
	{"role": "assistant", "refusal": "No."}]');
SELECT m FROM jsonb_array_elements(chat.to_openai_messages(:'s3')) AS m;

-- batch
SELECT session_id, sequence, role, content, parts, name, tool_call_id, refusal,
	metadata
FROM chat.add_chat_messages_batch(session_id => :s1, messages => '[
	{"role": "user", "content": "ten"},
	{"role": "assistant", "content": [{"type": "text", "text": "eleven"}]},
	{"role": "user", "parts": [{"type": "image_url"}], "content": "twelve", "name": "ann"},
	{"role": "tool", "tool_call_id": "call_2", "content": "thirteen", "metadata": {"a": 1}},
	{"role": "assistant", "content": null, "refusal": "no"}]',
	start_sequence => 10);
SELECT next_sequence FROM chat.chat_session WHERE id = :s1;
SELECT * FROM raised(format('SELECT chat.add_chat_messages_batch(%L,
	''[{"role": "user", "content": "x"}]'', 10)', :s1));
-- nothing is no rows
SELECT count(*) FROM chat.add_chat_messages_batch(:s1, '[]');
SELECT count(*) FROM chat.add_chat_messages_batch(:s1, '[]', 1);
SELECT * FROM raised(format('SELECT chat.add_chat_messages_batch(%L, ''[]'')', :none));
SELECT * FROM raised(format('SELECT chat.add_chat_messages_batch(%L, ''[{"role": "user"}]'')', :none));
SELECT * FROM raised('SELECT chat.add_chat_messages_batch(NULL, ''[{"role": "user"}]'')');
SELECT * FROM raised(format('SELECT chat.add_chat_messages_batch(%L, NULL)', :s1));
-- a bad element is named by its index, and nothing is stored
SELECT r.* FROM unnest(ARRAY[
	'1', '"x"', 'null', '[]', '{}', '{"role": "robot"}', '{"role": 1}',
	'{"role": "tool"}', '{"role": "user", "text": "x"}',
	'{"role": "user", "content": 1}', '{"role": "user", "content": {}}',
	'{"role": "user", "content": [], "parts": []}',
	'{"role": "user", "parts": {}}', '{"role": "user", "name": 1}',
	'{"role": "user", "id": "x"}', '{"role": "user", "metadata": []}',
	'{"role": "user", "id": "00000000-0000-4000-8000-0000000000c1", "message_id": "00000000-0000-4000-8000-0000000000c1"}',
	'{"role": "assistant", "tool_calls": {}}',
	'{"role": "assistant", "tool_calls": ["x"]}',
	'{"role": "assistant", "function_call": "x"}',
	'{"role": "user", "sequence": 3}']) AS e,
	LATERAL raised(format('SELECT chat.add_chat_messages_batch(%L, ''[{"role": "user"}, %s]'')', :s1, e)) AS r;
SELECT * FROM raised(format('SELECT chat.add_chat_messages_batch(%L, ''{}'')', :s1));
SELECT * FROM raised(format('SELECT chat.add_chat_messages_batch(%L, ''1'')', :s1));
SELECT next_sequence, (SELECT count(*) FROM chat.chat_message WHERE session_id = :s1) AS messages
FROM chat.chat_session WHERE id = :s1;
-- ids that clients choose: the same batch again is the same messages
\set batch '[{"role": "user", "content": "c1", "message_id": "00000000-0000-4000-8000-0000000000c1"}, {"role": "assistant", "content": "c2", "id": "00000000-0000-4000-8000-0000000000c2"}]'
SELECT sequence, id, content FROM chat.add_chat_messages_batch(:s1, :'batch');
SELECT sequence, id, content FROM chat.add_chat_messages_batch(:s1, :'batch');
SELECT sequence, id FROM chat.add_chat_messages_batch(:s1, :'batch', 15);
SELECT r.* FROM unnest(ARRAY[
	'[{"role": "user", "content": "c1", "id": "00000000-0000-4000-8000-0000000000c1"}, {"role": "user"}]',
	'[{"role": "user"}, {"role": "assistant", "content": "c2", "id": "00000000-0000-4000-8000-0000000000c2"}]',
	'[{"role": "user", "content": "other", "id": "00000000-0000-4000-8000-0000000000c1"}]',
	'[{"role": "user", "id": "00000000-0000-4000-8000-0000000000c4"}, {"role": "user"}, {"role": "user", "id": "00000000-0000-4000-8000-0000000000c4"}]']) AS b,
	LATERAL raised(format('SELECT chat.add_chat_messages_batch(%L, %L)', :s1, b)) AS r;
-- the same id in another session is another message
SELECT id FROM chat.add_chat_message(:'s2', 'user', 'c1',
	message_id => '00000000-0000-4000-8000-0000000000c1');
-- no gap anywhere
SELECT array_agg(sequence ORDER BY sequence) = array_agg(n ORDER BY n) AS gapless
FROM (SELECT sequence, row_number() OVER (ORDER BY sequence) AS n
	FROM chat.chat_message WHERE session_id = :s1) AS m;

-- pages
SELECT sequence FROM chat.get_chat_messages(session_id => :s1, max_rows => 3);
SELECT sequence FROM chat.get_chat_messages(:s1, before_sequence => 3, max_rows => 3);
SELECT count(*) AS all FROM chat.get_chat_messages(:s1);
SELECT count(*) AS hidden FROM chat.get_chat_messages(:'s2') WHERE content = 'hidden';
SELECT count(*) AS none FROM chat.get_chat_messages(:none);
SELECT state, message FROM raised(format(
	'SELECT count(*) FROM chat.get_chat_messages(%L, max_rows => -1)', :s1));
SELECT chat.get_chat_session_message_count(session_id => :s1) AS messages,
	chat.get_chat_session_message_count(:'s2') AS active,
	chat.get_chat_session_message_count(:none) AS none,
	chat.get_chat_session_message_count(NULL) AS unknown;
-- the page before a sequence costs the page, not the session
CREATE FUNCTION index_condition(query text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	plan json;
BEGIN
	EXECUTE 'EXPLAIN (FORMAT JSON) ' || query INTO plan;
	RETURN jsonb_path_query_first(plan::jsonb, 'strict $.**."Index Cond"') #>> '{}';
END
$$;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SELECT index_condition('SELECT * FROM chat.get_chat_messages(
	''00000000-0000-4000-8000-000000000001'', 100, 10)');
RESET enable_seqscan;
RESET enable_bitmapscan;

-- tool results: where an id was used twice, the newest
SELECT count(*) FROM chat.add_chat_messages_batch(:s1, '[
	{"role": "tool", "tool_call_id": "call_0", "content": "first"},
	{"role": "user", "tool_call_id": "call_0", "content": "a user says it"},
	{"role": "tool", "tool_call_id": "call_0", "content": "pending"},
	{"role": "function", "tool_call_id": "call_f", "content": [{"type": "text"}]}]');
UPDATE chat.chat_session SET updated_at = '2001-01-01' WHERE id = :s1;
SELECT chat.update_tool_message_content(session_id => :s1, tool_call_id => 'call_0',
	new_content => 'done') AS found;
SELECT updated_at > '2001-01-01' AS updated FROM chat.chat_session WHERE id = :s1;
SELECT chat.update_tool_message_content(:s1, 'call_f', 'done') AS found;
SELECT role, tool_call_id, content, parts FROM chat.get_chat_messages(:s1, max_rows => 4);
-- null leaves the content, and the parts, as they are
SELECT parts FROM chat.add_chat_message(:s1, 'tool', tool_call_id => 'call_p',
	parts => '[{"type": "text", "text": "kept"}]');
SELECT chat.update_tool_message_content(:s1, 'call_p', NULL) AS found,
	content, parts FROM chat.get_chat_messages(:s1, max_rows => 1);
-- of a message that was set aside nothing is written
SELECT sequence AS hidden FROM chat.add_chat_message(:s1, 'tool', 'aside',
	tool_call_id => 'call_0') \gset
UPDATE chat.chat_message SET active = false WHERE session_id = :s1 AND sequence = :hidden;
SELECT chat.update_tool_message_content(:s1, 'call_0', 'again') AS found;
SELECT content, active FROM chat.get_chat_messages(:s1, all_branches => true)
WHERE tool_call_id = 'call_0' AND role = 'tool';
UPDATE chat.chat_session SET updated_at = '2001-01-01' WHERE id = :s1;
SELECT chat.update_tool_message_content(:s1, 'call_x', 'x') AS no_call,
	chat.update_tool_message_content(:s1, NULL, 'x') AS null_call,
	chat.update_tool_message_content(:none, 'call_0', 'x') AS none,
	chat.update_tool_message_content(NULL, 'call_0', 'x') AS unknown;
SELECT updated_at FROM chat.chat_session WHERE id = :s1;

-- the tables hold what the functions promise
SELECT r.state, r.message FROM unnest(ARRAY[
	$$99, 'robot', gen_random_uuid()$$, $$0, 'user', gen_random_uuid()$$,
	$$1, 'user', gen_random_uuid()$$,
	$$99, 'user', '00000000-0000-4000-8000-0000000000c1'$$]) AS v,
	LATERAL raised(format('INSERT INTO chat.chat_message (session_id, sequence, role, id)
		VALUES (%L, %s)', :s1, v)) AS r;
SELECT state, message FROM raised(format('INSERT INTO chat.chat_message
	(session_id, sequence, role) VALUES (%L, 1, ''user'')', :none));
SELECT r.state, r.message FROM unnest(ARRAY[
	'chat_session SET total_prompt_tokens = -1',
	'chat_session SET total_completion_tokens = -1',
	'chat_session SET credentials = NULL',
	'chat_session SET successful_agent_runs = NULL',
	'chat_session SET successful_agent_schedules = NULL',
	'chat_session SET metadata = NULL', 'chat_session SET settings = NULL',
	'chat_session SET owner = NULL', 'chat_session SET channel = NULL',
	'chat_message SET metadata = NULL']) AS v,
	LATERAL raised('UPDATE chat.' || v) AS r;
SELECT r.state, r.message FROM unnest(ARRAY[
	$$'sleeping', NULL, 0$$, $$'completed', NULL, 0$$, $$'queued', now(), 0$$,
	$$'queued', NULL, -1$$]) AS v,
	LATERAL raised(format('INSERT INTO chat.chat_task
		(session_id, server, status, finished_at, prompt_tokens)
		VALUES (%L, ''x'', %s)', :s1, v)) AS r;
-- what is JSON and not null is {} unless given
SELECT attrelid::regclass AS table, attname AS column,
	pg_get_expr(d.adbin, d.adrelid) AS "default"
FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d
	ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE attrelid IN ('chat.chat_session'::regclass, 'chat.chat_message'::regclass)
	AND atttypid IN ('jsonb'::regtype, 'chat.json_object'::regtype) AND attnotnull
ORDER BY a.attrelid::regclass::text, attname;
-- what hangs on a session goes with it; events and task_id refer to nothing
SELECT conrelid::regclass AS table, conkey.columns, confrelid::regclass AS refers_to,
	confdeltype = 'c' AS cascades
FROM pg_constraint, LATERAL (SELECT string_agg(attname, ', ' ORDER BY array_position(conkey, attnum)) AS columns
	FROM pg_attribute WHERE attrelid = conrelid AND attnum = ANY (conkey)) AS conkey
WHERE contype = 'f' AND connamespace = 'chat'::regnamespace AND conparentid = 0
ORDER BY conrelid::regclass::text;

DELETE FROM chat.chat_session;
DROP FUNCTION raised, index_condition;
