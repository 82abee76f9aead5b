/* chat--0.1.0.sql */

-- complain if script is sourced in psql, rather than via CREATE EXTENSION
\echo Use "CREATE EXTENSION chat" to load this file. \quit

DO $$
BEGIN
	IF pg_catalog.current_setting('server_encoding') <> 'UTF8' THEN
		RAISE EXCEPTION 'chat needs a UTF-8 database'
			USING ERRCODE = 'feature_not_supported',
				DETAIL = pg_catalog.format('The encoding of this database is %s.',
					pg_catalog.current_setting('server_encoding')),
				HINT = 'Create a database with ENCODING ''UTF8'' TEMPLATE template0.';
	END IF;
END
$$;

CREATE SCHEMA chat;
COMMENT ON SCHEMA chat IS 'durable LLM chat runtime';

--
-- Tables
--
-- Nobody but the extension's owner writes to them: every write of a user is
-- a C function that checks the invoker and then works as the owner.  Reads
-- go through row-level security.
--

CREATE TABLE chat.chat_session (
	id uuid PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid(),
	user_id text,
	owner regrole NOT NULL,
	title text,
	credentials jsonb NOT NULL DEFAULT '{}',
	successful_agent_runs jsonb NOT NULL DEFAULT '{}',
	successful_agent_schedules jsonb NOT NULL DEFAULT '{}',
	total_prompt_tokens bigint NOT NULL DEFAULT 0
		CHECK (total_prompt_tokens >= 0),
	total_completion_tokens bigint NOT NULL DEFAULT 0
		CHECK (total_completion_tokens >= 0),
	metadata jsonb NOT NULL DEFAULT '{}'
		CHECK (pg_catalog.jsonb_typeof(metadata) = 'object'),
	channel name NOT NULL DEFAULT
		('chat_' || pg_catalog.replace(pg_catalog.gen_random_uuid()::text, '-', '')),
	server name,
	settings jsonb NOT NULL DEFAULT '{}'
		CHECK (pg_catalog.jsonb_typeof(settings) = 'object'),
	next_sequence bigint NOT NULL DEFAULT 1 CHECK (next_sequence > 0),
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	updated_at timestamptz NOT NULL DEFAULT pg_catalog.now()
) WITH (fillfactor = 70);
-- no index on updated_at: it changes with every turn, and updates stay HOT
CREATE INDEX chat_session_user_id_idx ON chat.chat_session (user_id);

CREATE TABLE chat.chat_message (
	session_id uuid NOT NULL
		REFERENCES chat.chat_session ON DELETE CASCADE,
	sequence bigint NOT NULL CHECK (sequence > 0),
	id uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
	role text NOT NULL CHECK (role IN
		('system', 'developer', 'user', 'assistant', 'tool', 'function')),
	content text,
	parts jsonb,
	name text,
	tool_call_id text,
	refusal text,
	tool_calls jsonb CHECK (pg_catalog.jsonb_typeof(tool_calls) = 'array'),
	function_call jsonb
		CHECK (pg_catalog.jsonb_typeof(function_call) = 'object'),
	task_id uuid,
	active boolean NOT NULL DEFAULT true,
	metadata jsonb NOT NULL DEFAULT '{}'
		CHECK (pg_catalog.jsonb_typeof(metadata) = 'object'),
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	PRIMARY KEY (session_id, sequence),
	UNIQUE (session_id, id)
);

CREATE TABLE chat.chat_task (
	id uuid PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid(),
	session_id uuid NOT NULL
		REFERENCES chat.chat_session ON DELETE CASCADE,
	-- the order in which the tasks of a session run
	place bigint GENERATED ALWAYS AS IDENTITY,
	status text NOT NULL DEFAULT 'queued' CHECK (status IN
		('queued', 'running', 'waiting', 'completed', 'failed', 'cancelled')),
	-- id of the message that started it: the client's, for idempotency
	message_id uuid,
	-- the queued message, until the task starts and it becomes a message
	input jsonb,
	server name NOT NULL,
	options jsonb NOT NULL DEFAULT '{}',
	-- id of the assistant message that the task writes
	answer_id uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
	run integer NOT NULL DEFAULT -1,
	slot smallint,
	steps integer NOT NULL DEFAULT 0 CHECK (steps >= 0),
	prompt_tokens bigint NOT NULL DEFAULT 0 CHECK (prompt_tokens >= 0),
	completion_tokens bigint NOT NULL DEFAULT 0
		CHECK (completion_tokens >= 0),
	usage jsonb,
	error jsonb,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	started_at timestamptz,
	finished_at timestamptz,
	CHECK ((status IN ('completed', 'failed', 'cancelled'))
		= (finished_at IS NOT NULL))
) WITH (fillfactor = 70);
-- at most one task of a session runs
CREATE UNIQUE INDEX chat_task_running_idx ON chat.chat_task (session_id)
	WHERE status = 'running';
CREATE INDEX chat_task_queued_idx ON chat.chat_task (session_id, place)
	WHERE status = 'queued';
CREATE UNIQUE INDEX chat_task_message_idx
	ON chat.chat_task (session_id, message_id);

-- Small and hot: a job is deleted when it is done.
CREATE TABLE chat.chat_job (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	kind text NOT NULL CHECK (kind IN
		('completion', 'tool', 'title', 'summary')),
	session_id uuid NOT NULL
		REFERENCES chat.chat_session ON DELETE CASCADE,
	task_id uuid,
	-- the session's owner, for fairness
	owner oid NOT NULL,
	-- the database's own OID: a copy of the database runs nothing
	database oid NOT NULL,
	priority smallint NOT NULL DEFAULT 0,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	-- not before this time: a retry's; at once otherwise
	run_at timestamptz NOT NULL DEFAULT '-infinity',
	attempts integer NOT NULL DEFAULT 0,
	crashes integer NOT NULL DEFAULT 0,
	-- somebody wants the task to end
	cancel boolean NOT NULL DEFAULT false,
	-- what the listeners saw of the last attempt is void
	reset boolean NOT NULL DEFAULT false,
	-- its holder died: the task starts a new run
	rerun boolean NOT NULL DEFAULT false,
	-- number of the last event, when no new run starts
	last_seq bigint NOT NULL DEFAULT 0,
	-- identity of the worker that holds it
	holder bigint,
	-- fencing: grows with every claim, each write of the holder checks it
	epoch bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
CREATE INDEX chat_job_claim_idx ON chat.chat_job (priority, run_at, id)
	WHERE holder IS NULL;
CREATE INDEX chat_job_session_idx ON chat.chat_job (session_id);

CREATE TABLE chat.chat_event (
	slot smallint NOT NULL,
	task_id uuid NOT NULL,
	seq bigint NOT NULL,
	payload json NOT NULL,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	PRIMARY KEY (slot, task_id, seq)
) PARTITION BY LIST (slot);
DO $$
BEGIN
	FOR i IN 0 .. 7 LOOP
		EXECUTE pg_catalog.format('CREATE TABLE chat.chat_event_%s
			PARTITION OF chat.chat_event FOR VALUES IN (%s)', i, i);
	END LOOP;
END
$$;

-- which slot new tasks write to: the one that was opened last
CREATE TABLE chat.chat_event_slot (
	slot smallint PRIMARY KEY,
	opened_at timestamptz NOT NULL
);
INSERT INTO chat.chat_event_slot VALUES (0, pg_catalog.now());

COMMENT ON TABLE chat.chat_session IS 'conversations';
COMMENT ON TABLE chat.chat_message IS 'the entries of a conversation, in OpenAI roles';
COMMENT ON TABLE chat.chat_task IS 'turns: from a user''s message to the final answer';
COMMENT ON TABLE chat.chat_job IS 'the queue that the workers take their jobs from';
COMMENT ON TABLE chat.chat_event IS 'event streams of tasks, in the AI SDK''s UI message stream vocabulary';
COMMENT ON TABLE chat.chat_event_slot IS 'rotation of the partitions of chat_event';

--
-- Row-level security
--
-- One definition of who sees a session; what hangs on a session asks for it
-- by a scalar subquery, which is an index probe (EXISTS would become a scan
-- of all sessions).
--

ALTER TABLE chat.chat_session ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_message ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_task ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_job ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_event ENABLE ROW LEVEL SECURITY;

CREATE POLICY visible ON chat.chat_session FOR SELECT USING (
	pg_catalog.pg_has_role(owner, 'USAGE')
	AND (COALESCE(pg_catalog.current_setting('chat.user_id', true), '') = ''
		OR user_id = pg_catalog.current_setting('chat.user_id', true)));
CREATE POLICY visible ON chat.chat_message FOR SELECT USING (
	(SELECT true FROM chat.chat_session AS s WHERE s.id = session_id));
CREATE POLICY visible ON chat.chat_task FOR SELECT USING (
	(SELECT true FROM chat.chat_session AS s WHERE s.id = session_id));
CREATE POLICY visible ON chat.chat_event FOR SELECT USING (
	(SELECT true FROM chat.chat_task AS t WHERE t.id = task_id));

--
-- The bell: whoever touches the queue wakes the worker, at commit
--

CREATE FUNCTION chat.chat_job_ring() RETURNS trigger
	LANGUAGE c AS 'MODULE_PATHNAME', 'chat_job_ring';
COMMENT ON FUNCTION chat.chat_job_ring() IS 'wakes the worker when the transaction commits';
CREATE TRIGGER ring AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON chat.chat_job
	FOR EACH STATEMENT EXECUTE FUNCTION chat.chat_job_ring();
ALTER TABLE chat.chat_job ENABLE ALWAYS TRIGGER ring;

--
-- Data functions
--

--
-- Endpoints
--
-- A wrapper without a handler: its servers hold no tables, they say where
-- requests go, and their user mappings which key is sent.
--

CREATE FUNCTION chat.chat_llm_validator(options text[], catalog oid)
	RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'chat_llm_validator';
COMMENT ON FUNCTION chat.chat_llm_validator(text[], oid) IS
	'checks the options of servers and user mappings of wrapper chat_llm';
CREATE FOREIGN DATA WRAPPER chat_llm VALIDATOR chat.chat_llm_validator;
COMMENT ON FOREIGN DATA WRAPPER chat_llm IS
	'LLM endpoints that speak the OpenAI chat completions API';

CREATE FUNCTION chat.test_server(server name,
	OUT ok boolean, OUT latency_ms double precision,
	OUT first_token_ms double precision, OUT model text,
	OUT streaming boolean, OUT usage boolean,
	OUT error_code text, OUT error text)
	LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
	AS 'MODULE_PATHNAME', 'chat_test_server';
COMMENT ON FUNCTION chat.test_server(name) IS
	'asks a server for one token with the key of the current role, and says how it answered';

CREATE FUNCTION chat.check_installation(
	OUT item text, OUT ok boolean, OUT detail text, OUT cure text)
	RETURNS SETOF record
	LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
	AS 'MODULE_PATHNAME', 'chat_check_installation';
COMMENT ON FUNCTION chat.check_installation() IS
	'lists what chat needs to work, and the line that cures what is wrong';

--
-- Runtime
--

--
-- Access
--
-- The last section, because grant_usage() and the REVOKE cover all that
-- stands above.
--

CREATE FUNCTION chat.grant_usage(role regrole) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
	what text;
BEGIN
	FOR what IN SELECT * FROM chat.usage_objects() LOOP
		EXECUTE format('GRANT %s TO %s', what, role);
	END LOOP;
END
$$;
CREATE FUNCTION chat.revoke_usage(role regrole) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
	what text;
BEGIN
	FOR what IN SELECT * FROM chat.usage_objects() LOOP
		EXECUTE format('REVOKE %s FROM %s', what, role);
	END LOOP;
END
$$;
