-- endpoints: servers of wrapper chat_llm, their user mappings and their keys
\getenv abs_builddir PG_ABS_BUILDDIR
CREATE ROLE regress_chat_admin;
CREATE ROLE regress_chat_user;
GRANT USAGE ON FOREIGN DATA WRAPPER chat_llm TO regress_chat_admin;
GRANT USAGE ON SCHEMA chat TO regress_chat_admin, regress_chat_user;
GRANT EXECUTE ON FUNCTION chat.test_server, chat.check_installation
	TO regress_chat_admin, regress_chat_user;

-- runs a statement, undoes it, and says how it went
CREATE FUNCTION public.chat_try(statement text,
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
-- the same for one option of a server, or of a user mapping
CREATE FUNCTION public.chat_try_server(options text,
	url text DEFAULT 'https://llm.example/v1',
	OUT state text, OUT message text, OUT more text)
LANGUAGE sql AS $$
	SELECT * FROM public.chat_try(format(
		'CREATE SERVER regress_tried FOREIGN DATA WRAPPER chat_llm
			OPTIONS (base_url %L%s)', url, ', ' || options))
$$;
CREATE FUNCTION public.chat_try_mapping(options text,
	OUT state text, OUT message text, OUT more text)
LANGUAGE sql AS $$
	SELECT * FROM public.chat_try(format(
		'CREATE USER MAPPING FOR CURRENT_USER SERVER regress_llm
			OPTIONS (%s)', options))
$$;

-- the wrapper
SELECT fdwname, fdwhandler::regproc, fdwvalidator::regproc,
	obj_description(oid, 'pg_foreign_data_wrapper')
FROM pg_foreign_data_wrapper WHERE fdwname = 'chat_llm';
SELECT * FROM chat_try('CREATE SERVER regress_tried FOREIGN DATA WRAPPER chat_llm');
SELECT * FROM chat_try_server($$api_key 'x'$$);
SELECT * FROM chat_try_server($$"Model" 'x'$$);
SELECT * FROM chat_try('ALTER FOREIGN DATA WRAPPER chat_llm OPTIONS (ADD model ''x'')');

-- URLs
SELECT url, t.* FROM (VALUES
	('https://llm.example'),
	('HTTPS://llm.example:8443/v1/'),
	('https://llm.example/openai/deployments/x?api-version=2024-10-21'),
	('https://[2001:db8::1]:443/v1'),
	('http://localhost:11434/v1'),
	('http://LOCALHOST/v1'),
	('http://127.1.2.3:8080'),
	('http://[::1]:8080/v1'),
	('')) AS u(url), chat_try_server(NULL, url) AS t;
SELECT url, t.state, t.more FROM (VALUES
	('llm.example/v1'),
	('ftp://llm.example/v1'),
	('file:///etc/passwd'),
	('https://'),
	('https:///v1'),
	('https://:443/v1'),
	('https://user@llm.example/v1'),
	('https://user:secret@llm.example/v1'),
	('https://llm.example/v1#x'),
	('https://llm.example:0/v1'),
	('https://llm.example:/v1'),
	('https://llm.example:65536/v1'),
	('https://llm.example:44x/v1'),
	('https://llm.example\v1'),
	('https://llm.example/v 1'),
	('https://llm.example/é'),
	(E'https://llm.example/v1\r\nX: y'),
	('https://llm%2eexample/v1'),
	('https://[::1'),
	('https://[::1%25lo]/v1'),
	('https://[1.2.3.4]/v1'),
	('https://[::1]x/v1')) AS u(url), chat_try_server(NULL, url) AS t;
-- without encryption only on this machine, or when somebody says so
SELECT url, t.* FROM (VALUES
	('http://llm.example/v1'),
	('http://localhost.example/v1'),
	('http://localhost./v1'),
	('http://127.1/v1'),
	('http://2130706433/v1'),
	('http://128.0.0.1/v1'),
	('http://[::2]/v1')) AS u(url), chat_try_server(NULL, url) AS t;
SELECT * FROM chat_try_server($$allow_http 'on'$$, 'http://llm.example/v1');
SELECT * FROM chat_try_server($$allow_http 'off'$$, 'http://llm.example/v1');
SELECT * FROM chat_try_server($$allow_http 'off'$$, 'http://localhost/v1');

-- every other option, as it should be
SELECT o.option, t.* FROM (VALUES
	($$model 'a model/with: signs'$$),
	($$title_model 'small'$$),
	($$temperature '0'$$), ($$temperature '0.70'$$), ($$temperature '2e0'$$),
	($$top_p '1'$$), ($$top_p '0.0'$$),
	($$max_tokens '1'$$),
	($$max_tokens_field 'max_tokens'$$),
	($$max_tokens_field 'max_completion_tokens'$$),
	($$context_window '1000000'$$),
	($$stream_usage 'off'$$), ($$stream_usage 'true'$$),
	($$tracing 'on'$$), ($$thinking 'yes'$$),
	($$allow_http '1'$$), ($$allow_private '0'$$),
	($$environment 'production'$$),
	($$extra_body '{}'$$),
	($$extra_body '{"metadata": {"user": "{{user_id}}"}, "n": [1, "{{x"]}'$$),
	($$extra_headers '{}'$$),
	($$extra_headers '{"HTTP-Referer": "https://a.example", "X-Empty": ""}'$$),
	($$auth_header 'api-key'$$), ($$auth_header 'Authorization'$$),
	($$ca_file '/etc/ssl/certs/own.pem'$$),
	($$proxy 'http://proxy.example:3128'$$),
	($$connect_timeout '5'$$), ($$connect_timeout '0.001'$$),
	($$first_token_timeout '2.5'$$), ($$idle_timeout '500ms'$$),
	($$stream_timeout '10 min'$$), ($$stream_timeout '1d'$$),
	($$max_concurrency '1'$$), ($$max_requests_per_minute '60'$$),
	($$retries '0'$$), ($$retries '100'$$)) AS o(option),
	chat_try_server(o.option) AS t;
-- and as it should not
SELECT o.option, t.* FROM (VALUES
	($$model ''$$), ($$model E'a\nb'$$), ($$title_model ''$$),
	($$temperature '2.1'$$), ($$temperature '-0.1'$$),
	($$temperature 'warm'$$), ($$temperature ''$$), ($$temperature 'NaN'$$),
	($$temperature '.5'$$), ($$temperature '1,"stream":false'$$),
	($$top_p '1.01'$$),
	($$max_tokens '0'$$), ($$max_tokens '1.5'$$), ($$max_tokens '0x10'$$),
	($$max_tokens 'many'$$), ($$max_tokens '7 '$$),
	($$max_tokens '99999999999'$$),
	($$max_tokens_field 'max'$$), ($$max_tokens_field ''$$),
	($$max_tokens_field 'max_tokens, max_completion_tokens'$$),
	($$context_window '0'$$),
	($$stream_usage 'perhaps'$$), ($$tracing ''$$), ($$thinking '2'$$),
	($$allow_http 'x'$$), ($$allow_private 'x'$$),
	($$environment E'a\tb'$$),
	($$extra_body '[]'$$), ($$extra_body '"x"'$$),
	($$extra_headers '["X-A"]'$$), ($$extra_headers '{"X-A": 1}'$$),
	($$extra_headers '{"X-A": {"b": "c"}}'$$),
	($$extra_headers '{"Authorization": "Bearer x"}'$$),
	($$extra_headers '{"HOST": "other.example"}'$$),
	($$extra_headers '{"content-length": "1"}'$$),
	($$extra_headers '{"Content-Type": "text/plain"}'$$),
	($$extra_headers '{"Transfer-Encoding": "chunked"}'$$),
	($$extra_headers '{"Connection": "close"}'$$),
	($$extra_headers '{"X-A": "b\r\nHost: c"}'$$),
	($$extra_headers '{"X-A\n": "b"}'$$), ($$extra_headers '{"X A": "b"}'$$),
	($$extra_headers '{"": "b"}'$$), ($$extra_headers '{"Host:": "b"}'$$),
	($$auth_header 'api-key', extra_headers '{"Api-Key": "x"}'$$),
	($$auth_header 'Host'$$), ($$auth_header 'api key'$$), ($$auth_header ''$$),
	($$ca_file 'own.pem'$$), ($$proxy ''$$),
	($$connect_timeout '0'$$), ($$connect_timeout '-1'$$),
	($$first_token_timeout '25h'$$), ($$idle_timeout 'soon'$$),
	($$stream_timeout '5 parsecs'$$), ($$stream_timeout 'inf'$$),
	($$max_concurrency '0'$$), ($$max_requests_per_minute '0'$$),
	($$retries '-1'$$), ($$retries '101'$$)) AS o(option),
	chat_try_server(o.option) AS t;
SELECT state, message, right(more, 53) AS more FROM chat_try_server(format('extra_body %L',
	repeat('{"a":', 65) || '1' || repeat('}', 65)));
SELECT state FROM chat_try_server(format('extra_body %L',
	repeat('{"a":', 64) || '1' || repeat('}', 64)));
-- what is no JSON is refused by the JSON parser
SELECT state FROM chat_try_server($$extra_body '{"a": '$$);
SELECT state FROM chat_try_server($$extra_body '{"a": "\u0000"}'$$);
SELECT state FROM chat_try_server($$extra_headers 'x'$$);

-- user mappings
CREATE SERVER regress_llm FOREIGN DATA WRAPPER chat_llm
	OPTIONS (base_url 'https://10.0.0.1/v1', model 'm');
SELECT o.option, t.* FROM (VALUES
	($$api_key 'sk-1'$$), ($$api_key_env 'CHAT_KEY'$$),
	($$api_key_file '/run/secrets/key'$$)) AS o(option),
	chat_try_mapping(o.option) AS t;
SELECT * FROM chat_try('CREATE USER MAPPING FOR PUBLIC SERVER regress_llm');
SELECT o.option, t.* FROM (VALUES
	($$api_key ''$$), ($$api_key E'sk-secret\r\nHost: x'$$),
	($$api_key_env ''$$), ($$api_key_file 'key'$$), ($$api_key_file ''$$),
	($$api_key 'sk-secret', api_key_file '/run/secrets/key'$$),
	($$api_key_env 'A', api_key_file '/run/secrets/key'$$),
	($$password 'x'$$), ($$model 'x'$$)) AS o(option),
	chat_try_mapping(o.option) AS t;

-- what only a superuser may set, or keep
SET ROLE regress_chat_admin;
SELECT o.option, t.* FROM (VALUES
	($$ca_file '/etc/ssl/certs/own.pem'$$),
	($$proxy 'http://proxy.example:3128'$$)) AS o(option),
	chat_try_server(o.option) AS t;
CREATE SERVER regress_own FOREIGN DATA WRAPPER chat_llm
	OPTIONS (base_url 'https://10.0.0.2/v1');
CREATE USER MAPPING FOR CURRENT_USER SERVER regress_own OPTIONS (api_key 'sk-admin');
SELECT o.option, t.* FROM (VALUES
	($$api_key_file '/etc/passwd'$$), ($$api_key_env 'PATH'$$)) AS o(option),
	chat_try(format('ALTER USER MAPPING FOR CURRENT_USER SERVER regress_own
		OPTIONS (DROP api_key, ADD %s)', o.option)) AS t;
RESET ROLE;
ALTER SERVER regress_own OPTIONS (ADD ca_file '/etc/ssl/certs/own.pem');
SET ROLE regress_chat_admin;
SELECT * FROM chat_try($$ALTER SERVER regress_own OPTIONS (SET base_url 'https://evil.example')$$);
SELECT * FROM chat_try($$ALTER SERVER regress_own OPTIONS (DROP ca_file)$$);
RESET ROLE;
ALTER SERVER regress_own OPTIONS (DROP ca_file);

-- what stands against a request is said at once
SELECT * FROM chat_try($$SELECT chat.test_server('')$$);
SELECT * FROM chat_try($$SELECT chat.test_server('regress_none')$$);
CREATE FOREIGN DATA WRAPPER regress_other;
CREATE SERVER regress_foreign FOREIGN DATA WRAPPER regress_other;
SELECT * FROM chat_try($$SELECT chat.test_server('regress_foreign')$$);
-- a wrapper that borrows the validator is not ours, either
CREATE FOREIGN DATA WRAPPER regress_borrowed VALIDATOR chat.chat_llm_validator;
CREATE SERVER regress_foreign2 FOREIGN DATA WRAPPER regress_borrowed
	OPTIONS (base_url 'https://10.0.0.1', model 'm');
SELECT * FROM chat_try($$SELECT chat.test_server('regress_foreign2')$$);
SELECT * FROM chat_try($$SELECT chat.test_server('regress_own')$$);
SET ROLE regress_chat_user;
SELECT * FROM chat_try($$SELECT chat.test_server('regress_llm')$$);
RESET ROLE;
GRANT USAGE ON FOREIGN SERVER regress_llm TO regress_chat_user;
SET ROLE regress_chat_user;
SELECT * FROM chat_try($$SELECT chat.test_server('regress_llm')$$);
RESET ROLE;

-- the role's own mapping counts, then PUBLIC's
CREATE FUNCTION public.chat_mapping_of_user(
	OUT ok boolean, OUT detail text, OUT cure text) LANGUAGE sql AS $$
	SELECT ok, detail, cure FROM chat.check_installation()
	WHERE item = 'mapping regress_llm'
$$;
SET ROLE regress_chat_user;
SELECT * FROM chat_mapping_of_user();
RESET ROLE;
CREATE USER MAPPING FOR PUBLIC SERVER regress_llm OPTIONS (api_key 'sk-public');
SET ROLE regress_chat_user;
SELECT * FROM chat_mapping_of_user();
CREATE USER MAPPING FOR CURRENT_USER SERVER regress_llm OPTIONS (api_key 'sk-own');
SELECT * FROM chat_mapping_of_user();
ALTER USER MAPPING FOR CURRENT_USER SERVER regress_llm OPTIONS (DROP api_key);
SELECT * FROM chat_mapping_of_user();
DROP USER MAPPING FOR CURRENT_USER SERVER regress_llm;

-- PUBLIC's key is hidden from those who use it
SELECT usename, umoptions FROM pg_user_mappings WHERE srvname = 'regress_llm';
SELECT option_name, option_value FROM information_schema.user_mapping_options
WHERE foreign_server_name = 'regress_llm';
SELECT umoptions FROM pg_user_mapping;
RESET ROLE;

-- keys in files and in the environment
\set key_file :abs_builddir '/results/endpoint.key'
COPY (SELECT 'sk-file') TO :'key_file';
ALTER USER MAPPING FOR PUBLIC SERVER regress_llm
	OPTIONS (DROP api_key, ADD api_key_file :'key_file');
SELECT * FROM chat_mapping_of_user();
COPY (SELECT 'sk-file' FROM generate_series(1, 2)) TO :'key_file';
SELECT * FROM chat_mapping_of_user();
COPY (SELECT) TO :'key_file';
SELECT * FROM chat_mapping_of_user();
COPY (SELECT repeat('x', 65535)) TO :'key_file';
SELECT * FROM chat_mapping_of_user();
COPY (SELECT repeat('x', 65536)) TO :'key_file';
SELECT * FROM chat_mapping_of_user();
COPY (VALUES (repeat('x', 65536)), ('y')) TO :'key_file';
SELECT * FROM chat_mapping_of_user();
COPY (SELECT 1) TO :'key_file' (FORMAT binary);
SELECT * FROM chat_mapping_of_user();
\set key_file :abs_builddir '/results'
ALTER USER MAPPING FOR PUBLIC SERVER regress_llm
	OPTIONS (SET api_key_file :'key_file');
SELECT * FROM chat_mapping_of_user();
ALTER USER MAPPING FOR PUBLIC SERVER regress_llm
	OPTIONS (SET api_key_file '/nonexistent/key');
SELECT * FROM chat_mapping_of_user();
ALTER USER MAPPING FOR PUBLIC SERVER regress_llm
	OPTIONS (DROP api_key_file, ADD api_key_env 'REGRESS_CHAT_NO_SUCH_VARIABLE');
SELECT * FROM chat_mapping_of_user();
ALTER USER MAPPING FOR PUBLIC SERVER regress_llm
	OPTIONS (SET api_key_env 'PATH');
SELECT * FROM chat_mapping_of_user();

-- on this machine no key is needed; nobody answers there
ALTER SERVER regress_llm OPTIONS (SET base_url 'http://127.0.0.1:1/v1');
DROP USER MAPPING FOR PUBLIC SERVER regress_llm;
SELECT * FROM chat_mapping_of_user();
SELECT ok, first_token_ms, model, streaming, usage, error_code
FROM chat.test_server('regress_llm');

-- private networks are refused before anything is sent
CREATE USER MAPPING FOR PUBLIC SERVER regress_llm OPTIONS (api_key 'sk-public');
CREATE FUNCTION public.chat_try_address(address text,
	OUT error_code text, OUT error text) LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE format('ALTER SERVER regress_llm OPTIONS (SET base_url %L)',
		format('https://%s/v1', address));
	SELECT t.error_code, t.error INTO error_code, error
	FROM chat.test_server('regress_llm') AS t;
END
$$;
SELECT address, t.* FROM (VALUES
	('10.0.0.1'), ('172.31.255.255'), ('192.168.1.1'), ('169.254.169.254'),
	('100.100.100.200'), ('0.0.0.0'), ('[::]'), ('[fe80::1]'), ('[fc00::1]'),
	('[::ffff:10.0.0.1]'), ('[64:ff9b::a9fe:a9fe]'), ('0x0a000001'),
	('167772161')) AS a(address), chat_try_address(address) AS t;
-- also where a tunnel or a translator leads there (T61): 6to4, Teredo, ISATAP,
-- translated, and a site's own translator
SELECT address, t.* FROM (VALUES
	('[2002:a00:1::1]'), ('[2002:a9fe:a9fe::]'), ('[2002:7f00:1::1]'),
	('[2001:0:808:808::f5ff:fffe]'), ('[2001:db8::5efe:192.168.1.1]'),
	('[2001:db8::200:5efe:10.0.0.1]'), ('[::ffff:0:172.16.0.1]'),
	('[::10.0.0.1]'), ('[64:ff9b:1::808:808]')) AS a(address),
	chat_try_address(address) AS t;
-- however this machine's address is written
SELECT address, t.* FROM (VALUES ('2130706433'), ('127.1'),
	('[::ffff:127.0.0.1]')) AS a(address), chat_try_address(address) AS t;

-- the list of what an installation needs
SELECT item, ok, cure FROM chat.check_installation()
WHERE item IN ('encoding', 'version', 'libcurl', 'notification_queue',
	'default_server');
SELECT item FROM chat.check_installation() WHERE item !~ ' ';
SELECT item, ok, detail, cure FROM chat.check_installation()
WHERE item LIKE 'server %';
SET chat.default_server = 'regress_foreign';
SELECT item, ok, detail FROM chat.check_installation()
WHERE item = 'default_server';
SET chat.default_server = 'regress_llm';
SELECT item, ok, detail, cure FROM chat.check_installation()
WHERE item = 'default_server';
RESET chat.default_server;
SET ROLE regress_chat_user;
SELECT item, ok, detail, cure FROM chat.check_installation()
WHERE item LIKE '% regress_own';
RESET ROLE;

-- once a server exists, the extension is not dropped by chance
BEGIN;
\set VERBOSITY terse
DROP EXTENSION chat;
ROLLBACK;
BEGIN;
SET client_min_messages = warning;
DROP EXTENSION chat CASCADE;
SELECT srvname FROM pg_foreign_server ORDER BY 1;
ROLLBACK;
DROP SERVER regress_foreign, regress_foreign2;
DROP FOREIGN DATA WRAPPER regress_other, regress_borrowed;
SET client_min_messages = warning;
DROP SERVER regress_llm, regress_own CASCADE;
RESET client_min_messages;
SELECT item, ok, detail, cure FROM chat.check_installation()
WHERE item LIKE 'server' OR item LIKE 'mapping%';
DROP FUNCTION public.chat_try, public.chat_try_server, public.chat_try_mapping,
	public.chat_mapping_of_user, public.chat_try_address;
DROP OWNED BY regress_chat_admin, regress_chat_user;
DROP ROLE regress_chat_admin, regress_chat_user;
