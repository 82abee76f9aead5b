-- tools: register_tool, drop_tool, the view, services of wrapper chat_tool
SET client_min_messages = warning;
CREATE ROLE regress_tool_ann LOGIN;
CREATE ROLE regress_tool_bob LOGIN;
CREATE ROLE regress_tool_team LOGIN;
GRANT regress_tool_team TO regress_tool_bob;
CREATE ROLE regress_tool_still;
SELECT chat.grant_usage(r::regrole) FROM unnest(ARRAY['regress_tool_ann',
	'regress_tool_bob', 'regress_tool_team', 'regress_tool_still']) AS r;
CREATE SCHEMA shop;
GRANT USAGE ON SCHEMA shop TO PUBLIC;

-- runs a statement, undoes it, and says how it went
CREATE FUNCTION tool_try(statement text,
	OUT state text, OUT message text, OUT more text)
LANGUAGE plpgsql AS $$
DECLARE
	detail text;
	hint text;
BEGIN
	EXECUTE statement;
	RAISE EXCEPTION USING ERRCODE = '00000', MESSAGE = 'ok';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE,
		message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL,
		hint = PG_EXCEPTION_HINT;
	IF message = 'ok' THEN
		state := '00000';
	END IF;
	more := concat_ws(' / ', nullif(detail, ''), nullif(hint, ''));
END
$$;
-- a call of register_tool with these arguments
CREATE FUNCTION tool_refused(arguments text,
	OUT state text, OUT message text, OUT more text)
LANGUAGE sql AS $$
	SELECT * FROM tool_try(format('SELECT chat.register_tool(%s)', $1))
$$;

--
-- A signature is enough
--
CREATE FUNCTION shop.get_weather(city text, days integer DEFAULT 3) RETURNS text
LANGUAGE sql AS $$ SELECT format('%s: sunny for %s days', city, days) $$;
COMMENT ON FUNCTION shop.get_weather IS 'The weather of a city.
  city: its name, in English
days:how many days to look ahead
Only for a week.';
SET ROLE regress_tool_ann;
SELECT owner, name, kind, function, server, path, description, timeout,
	long_running, idempotent, read_only, approval, enabled
FROM chat.register_tool('shop.get_weather(text, integer)') \gx
SELECT jsonb_pretty(parameters) FROM chat.tools;
-- a name that only one function has
SET search_path = shop;
SELECT name, function FROM chat.register_tool('get_weather', 'weather2');
RESET search_path;
SELECT * FROM public.tool_refused('''shop.get_weather(integer)''');
SELECT * FROM public.tool_refused('''shop.nothing''');
SELECT * FROM public.tool_refused('''-''');

-- what is given counts; the same name again replaces the tool
SELECT id AS first_id FROM chat.tools JOIN chat.chat_tool USING (owner, name)
WHERE name = 'weather2' \gset
SELECT name, description, parameters, timeout, long_running, idempotent,
	read_only, approval, enabled
FROM chat.register_tool('shop.get_weather', name => 'weather2',
	description => 'all is given',
	parameters => '{"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome"]}}}',
	timeout => '90 s', long_running => true, idempotent => true,
	read_only => true, approval => 'ask', enabled => false) \gx
SELECT id = :first_id AS replaced FROM chat.chat_tool WHERE name = 'weather2';
SELECT name, description, timeout, enabled
FROM chat.register_tool('shop.get_weather', name => 'weather2', kind => NULL,
	timeout => NULL, approval => NULL, enabled => NULL, shared => NULL);
SELECT name, enabled FROM chat.tools ORDER BY name;
RESET ROLE;

--
-- Types
--
CREATE TYPE shop.size AS ENUM ('small', 'mid "dle"', 'large');
ALTER TYPE shop.size ADD VALUE 'tiny' BEFORE 'small';
CREATE DOMAIN shop.zip AS text CHECK (VALUE ~ '^\d{5}$');
CREATE DOMAIN shop.sizes AS shop.size[];
CREATE TYPE shop.address AS (street text, dropped integer, zip shop.zip, "No." integer[]);
ALTER TYPE shop.address DROP ATTRIBUTE dropped;
CREATE FUNCTION shop.types(a boolean, b smallint, c integer, d bigint,
	e numeric, f real, g double precision, h text, i varchar, j name, k bytea,
	l date, m time, n timestamptz, o timestamp, p interval, q uuid, r json,
	s jsonb, t integer[], u text[], v shop.size, w shop.zip, x shop.sizes,
	y shop.address, z shop.address[], aa inet, bb int4range, cc oid)
RETURNS void LANGUAGE sql AS '';
SET ROLE regress_tool_ann;
SELECT p.key, p.value FROM chat.register_tool('shop.types') AS t,
	jsonb_each(t.parameters -> 'properties') AS p
ORDER BY length(p.key), p.key COLLATE "C";
SELECT jsonb_array_length(parameters -> 'required') AS required,
	parameters -> 'type' AS type, parameters -> 'additionalProperties' AS more,
	description IS NULL AS without_description
FROM chat.tools WHERE name = 'types';
RESET ROLE;

-- which arguments are the model's
CREATE FUNCTION shop.modes(a integer, INOUT b integer, OUT c integer, d text DEFAULT 'x', e text DEFAULT NULL)
LANGUAGE sql AS 'SELECT 1, 2';
CREATE FUNCTION shop.rows(a integer) RETURNS TABLE (b integer, c text) LANGUAGE sql AS 'SELECT 1, ''x''';
CREATE FUNCTION shop.nothing_at_all() RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION shop.unnamed(integer, b text) RETURNS integer LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION shop.variadic(a integer, VARIADIC b text[]) RETURNS integer LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION shop.polymorphic(a anyelement) RETURNS anyelement LANGUAGE sql AS 'SELECT a';
CREATE FUNCTION shop.polymorphic_in(a integer, b anyarray) RETURNS integer LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION shop.trg() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE PROCEDURE shop.proc(a integer) LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION shop."Grüße"(a integer) RETURNS integer LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION shop.document(a integer, everything jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT everything';
CREATE FUNCTION shop.documents(a jsonb, b json) RETURNS jsonb LANGUAGE sql AS 'SELECT a';
CREATE FUNCTION shop.hidden(a integer) RETURNS integer LANGUAGE sql AS 'SELECT 1';
REVOKE ALL ON FUNCTION shop.hidden(integer) FROM PUBLIC;
CREATE FUNCTION pg_temp.temporary(a integer) RETURNS integer LANGUAGE sql AS 'SELECT 1';
SET ROLE regress_tool_ann;
SELECT name, parameters FROM chat.register_tool('shop.modes');
SELECT name, parameters FROM chat.register_tool('shop.rows(integer)');
SELECT name, parameters FROM chat.register_tool('shop.nothing_at_all()');
SELECT f, r.* FROM unnest(ARRAY['shop.unnamed', 'shop.variadic', 'shop.polymorphic',
	'shop.polymorphic_in', 'shop.trg', 'shop.proc(integer)', 'sum(integer)', 'rank()', 'shop."Grüße"',
	'shop.hidden', 'pg_temp.temporary']) AS f,
	LATERAL tool_refused(quote_literal(f)) AS r;
SELECT name FROM chat.register_tool('shop."Grüße"', 'greetings');

-- parameters that are given must be an object's schema that fits the function
SELECT p, r.state, r.more FROM unnest(ARRAY['[]', '1', '{}', '{"type": "string"}', '{"type": 1}',
	'{"type": "object", "properties": []}',
	'{"type": "object", "required": "city"}',
	'{"type": "object", "required": ["city", 1]}',
	'{"type": "object", "properties": {}}',
	'{"type": "object", "properties": {"city": {}, "day": {}}}',
	'{"type": "object", "properties": {"city": {}}}',
	'{"type": "object", "properties": {"city": true, "days": {}}, "required": ["city"]}']) AS p,
	LATERAL tool_refused(format('%L, parameters => %L', 'shop.get_weather', p)) AS r;
-- except one json argument that it does not name, which takes the object
SELECT name, parameters FROM chat.register_tool('shop.document', parameters =>
	'{"type": "object", "properties": {"a": {"type": "integer"}, "else": {}}}');
SELECT state, more FROM tool_refused($$'shop.document', parameters => '{"type": "object"}'$$);
SELECT state, more FROM tool_refused($$'shop.documents', parameters => '{"type": "object"}'$$);
SELECT state FROM tool_refused($$'shop.documents', parameters => '{"type": "object", "properties": {"a": {}}}'$$);

--
-- Arguments
--
SELECT a, r.* FROM unnest(ARRAY[
	'', 'function => NULL', '''shop.modes'', kind => ''python''',
	'''shop.modes'', approval => ''maybe''', '''shop.modes'', name => ''a b''',
	'''shop.modes'', name => ''''', '''shop.modes'', name => repeat(''x'', 65)',
	'''shop.modes'', name => repeat(''x'', 64)',
	'''shop.modes'', timeout => ''0''', '''shop.modes'', timeout => ''-1 s''',
	'''shop.modes'', timeout => ''367 days''', '''shop.modes'', timeout => ''366 days''',
	'''shop.modes'', server => ''x''', '''shop.modes'', path => ''/x''',
	'''shop.modes'', kind => ''client'', name => ''x''', 'kind => ''client''',
	'kind => ''client'', name => ''x'', read_only => true',
	'kind => ''client'', name => ''x'', idempotent => true',
	'kind => ''client'', name => ''x'', long_running => true',
	'kind => ''client'', name => ''x'', path => ''/x''',
	'kind => ''http'', name => ''x''', 'kind => ''http'', server => ''x''',
	'kind => ''http'', server => ''x'', name => ''x''',
	'kind => ''http'', server => ''x'', name => ''x'', read_only => true']) AS a,
	LATERAL tool_refused(a) AS r;
SELECT name, kind, function, parameters FROM chat.register_tool(kind => 'client', name => 'ask_user');

--
-- HTTP services
--
RESET ROLE;
SELECT fdwname, fdwhandler::regproc, fdwvalidator::regproc,
	obj_description(oid, 'pg_foreign_data_wrapper')
FROM pg_foreign_data_wrapper WHERE fdwname = 'chat_tool';
CREATE FUNCTION tool_try_server(options text, OUT state text, OUT message text, OUT more text)
LANGUAGE sql AS $$
	SELECT * FROM public.tool_try(format(
		'CREATE SERVER regress_tried FOREIGN DATA WRAPPER chat_tool OPTIONS (%s)', options))
$$;
SELECT * FROM tool_try('CREATE SERVER regress_tried FOREIGN DATA WRAPPER chat_tool');
SELECT o, t.* FROM unnest(ARRAY[
	$$url 'https://tools.example', base_url 'x'$$,
	$$url 'https://tools.example', api_key 'x'$$,
	$$url 'tools.example'$$,
	$$url 'http://tools.example'$$,
	$$url 'http://tools.example', allow_http 'on'$$,
	$$url 'http://127.0.0.1:8080/run'$$,
	$$url 'https://tools.example', timeout '0'$$,
	$$url 'https://tools.example', retries '-1'$$,
	$$url 'https://tools.example', headers '{"Authorization": "x"}'$$,
	$$url 'https://tools.example', headers '{"X-Key": "x"}', auth_header 'x-key'$$,
	$$url 'https://tools.example', ids_in_body 'maybe'$$,
	$$url 'https://tools.example/v1?x=1', timeout '30', connect_timeout '500ms',
		retries '2', ids_in_body 'on', headers '{"X-Team": "a"}',
		auth_header 'X-Key', ca_file '/etc/ssl/ca.pem', proxy 'http://p:1',
		allow_private 'on'$$]) AS o, tool_try_server(o) AS t;
CREATE SERVER regress_tools FOREIGN DATA WRAPPER chat_tool
	OPTIONS (url 'https://tools.example/run', timeout '30', headers '{"X-Team": "a"}');
CREATE SERVER regress_llm FOREIGN DATA WRAPPER chat_llm
	OPTIONS (base_url 'https://llm.example/v1', model 'm');
SELECT * FROM tool_try($$CREATE USER MAPPING FOR CURRENT_USER SERVER regress_tools
	OPTIONS (api_key 'x', api_key_env 'y')$$);
SELECT * FROM tool_try($$CREATE USER MAPPING FOR CURRENT_USER SERVER regress_tools
	OPTIONS (api_key_file 'secret')$$);

SET ROLE regress_tool_ann;
SELECT * FROM tool_try($$CREATE SERVER regress_tried FOREIGN DATA WRAPPER chat_tool OPTIONS (url 'https://x')$$);
SELECT * FROM tool_refused($$kind => 'http', name => 'search', server => 'regress_none'$$);
SELECT * FROM tool_refused($$kind => 'http', name => 'search', server => 'regress_llm'$$);
SELECT * FROM tool_refused($$kind => 'http', name => 'search', server => 'regress_tools'$$);
RESET ROLE;
GRANT USAGE ON FOREIGN SERVER regress_tools TO regress_tool_ann, regress_tool_bob;
SET ROLE regress_tool_ann;
SELECT * FROM tool_refused($$kind => 'http', name => 'search', server => 'regress_tools'$$);
RESET ROLE;
CREATE USER MAPPING FOR PUBLIC SERVER regress_tools OPTIONS (api_key 'tool-secret-1');
SET ROLE regress_tool_ann;
SELECT name, kind, function, server, path, parameters
FROM chat.register_tool(kind => 'http', name => 'search', server => 'regress_tools',
	path => '/search', idempotent => true, long_running => true);
-- a path never leaves the server's URL
SELECT p, r.state, r.more FROM unnest(ARRAY['', 'x', '@evil.example', '//evil.example',
	'/a b', '/ü', '/a?x=1', '/a#b', '/a\b', '/..', '/a/../b', '/a/..', '/./a', '/%2e%2E/a',
	'/.%2e', '/a/.../b', '/a..b/%2e%2ec', '/a/']) AS p,
	LATERAL tool_refused(format($$kind => 'http', name => 'search', server => 'regress_tools', path => %L$$, p)) AS r;

--
-- Who may what
--
-- a role that no process can be connected as: before 17, one without LOGIN
SET ROLE regress_tool_still;
SELECT state = CASE WHEN current_setting('server_version_num')::int < 170000
	THEN '55000' ELSE '00000' END AS as_documented
FROM tool_refused('''shop.modes''');
SELECT state FROM tool_refused($$kind => 'client', name => 'x'$$);
-- one without CONNECT
RESET ROLE;
SELECT current_database() AS db \gset
REVOKE CONNECT ON DATABASE :"db" FROM PUBLIC;
SET ROLE regress_tool_bob;
SELECT state, message, replace(more, current_database(), 'DATABASE') AS more
FROM tool_refused('''shop.modes''');
RESET ROLE;
GRANT CONNECT ON DATABASE :"db" TO PUBLIC;
-- a superuser
SELECT state, more FROM tool_refused('''shop.modes''');
SELECT state FROM tool_refused('''shop.modes'', shared => true');
SET chat.enable_superuser_tools = on;
SELECT state FROM tool_refused('''shop.modes''');
RESET chat.enable_superuser_tools;
SET ROLE regress_tool_ann;
SELECT * FROM tool_try('SET chat.enable_superuser_tools = on');

-- shared tools are the DBA's
SELECT * FROM tool_refused('''shop.modes'', shared => true');
SELECT * FROM tool_try('SELECT chat.drop_tool(''modes'', shared => true)');
RESET ROLE;
SELECT owner, name FROM chat.register_tool('shop.modes', shared => true);
SELECT owner, name FROM chat.register_tool('shop.modes', shared => true, description => 'twice');
SET ROLE regress_tool_team;
SELECT owner, name FROM chat.register_tool(kind => 'client', name => 'team_tool');
-- a role sees its own, its groups' and the shared ones, and changes its own
SET ROLE regress_tool_bob;
SELECT owner, name FROM chat.register_tool(kind => 'client', name => 'modes');
SELECT owner, name, kind, description FROM chat.tools ORDER BY owner::text, name;
SELECT chat.drop_tool('team_tool') AS of_the_team, chat.drop_tool('ask_user') AS of_ann,
	chat.drop_tool('modes') AS own, chat.drop_tool('modes') AS again, chat.drop_tool(NULL) AS null;
SELECT owner, name FROM chat.tools ORDER BY owner::text, name;
SELECT s, r.state, r.message FROM unnest(ARRAY[
	'INSERT INTO chat.chat_tool (owner, name, kind, parameters) VALUES (NULL, ''x'', ''client'', ''{}'')',
	'UPDATE chat.chat_tool SET enabled = false', 'DELETE FROM chat.tools',
	'SELECT * FROM chat.chat_tool_progress']) AS s, LATERAL tool_try(s) AS r;
RESET ROLE;
SELECT chat.drop_tool('modes', shared => true) AS shared, chat.drop_tool('modes', true) AS again;
SELECT count(*) AS left_alone FROM chat.tools WHERE name = 'modes';

-- the table holds what the function promises
SELECT t, r.state FROM unnest(ARRAY[
	$$'x y', 'client', NULL, NULL, '{}', NULL, 'auto'$$, $$'x', 'sql', NULL, NULL, '{}', NULL, 'auto'$$,
	$$'x', 'http', NULL, NULL, '{}', NULL, 'auto'$$, $$'x', 'shell', NULL, NULL, '{}', NULL, 'auto'$$,
	$$'x', 'client', NULL, NULL, '[]', NULL, 'auto'$$, $$'x', 'client', NULL, NULL, '{}', '0', 'auto'$$,
	$$'x', 'client', NULL, NULL, '{}', '1000 years', 'auto'$$, $$'x', 'client', NULL, NULL, '{}', NULL, 'never'$$]) AS t,
	LATERAL tool_try('INSERT INTO chat.chat_tool (name, kind, function, server, parameters, timeout, approval) VALUES (' || t || ')') AS r;

DELETE FROM chat.chat_tool;
DROP SERVER regress_tools, regress_llm CASCADE;
DROP FUNCTION tool_try, tool_refused, tool_try_server;
DROP SCHEMA shop CASCADE;
DO $$
BEGIN
	FOR i IN 1 .. 4 LOOP
		EXECUTE format('DROP OWNED BY %1$I; DROP ROLE %1$I',
			(ARRAY['regress_tool_ann', 'regress_tool_bob', 'regress_tool_still', 'regress_tool_team'])[i]);
	END LOOP;
END
$$;
