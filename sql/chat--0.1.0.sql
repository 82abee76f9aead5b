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
-- Domains
--
-- What columns of the busy tables may hold.  A CHECK of the table is read and
-- planned anew by each statement that writes a row, whatever it writes; a
-- domain's is kept ready, and tested where a value is set.  Columns of which
-- applications make arrays have plain types and CHECKs that are short to read.
--

CREATE DOMAIN chat.json_object AS jsonb
	CONSTRAINT is_object CHECK (pg_catalog.jsonb_typeof(VALUE) = 'object');
CREATE DOMAIN chat.json_array AS jsonb
	CONSTRAINT is_array CHECK (pg_catalog.jsonb_typeof(VALUE) = 'array');
CREATE DOMAIN chat.total AS bigint
	CONSTRAINT is_not_negative CHECK (VALUE >= 0);
CREATE DOMAIN chat.step_count AS integer
	CONSTRAINT is_not_negative CHECK (VALUE >= 0);
CREATE DOMAIN chat.next_sequence AS bigint
	CONSTRAINT is_positive CHECK (VALUE > 0);
CREATE DOMAIN chat.superseded_how AS text
	CONSTRAINT is_on_busy CHECK (VALUE IN ('interrupt', 'rollback'));
CREATE DOMAIN chat.job_kind AS text CONSTRAINT is_kind CHECK (VALUE IN
	('completion', 'tool', 'title', 'summary', 'notice'));
CREATE DOMAIN chat.job_tool_kind AS text
	CONSTRAINT is_tool_kind CHECK (VALUE IN ('sql', 'http'));
REVOKE ALL ON TYPE chat.json_object, chat.json_array, chat.total,
	chat.step_count, chat.next_sequence, chat.superseded_how, chat.job_kind,
	chat.job_tool_kind FROM PUBLIC;

CREATE FUNCTION chat.is_message_role(role text) RETURNS boolean
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE
AS 'MODULE_PATHNAME', 'chat_is_message_role';
COMMENT ON FUNCTION chat.is_message_role(text) IS
	'whether a message may have this role';

CREATE FUNCTION chat.is_task_status(status text, has_ended boolean)
RETURNS boolean
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE
AS 'MODULE_PATHNAME', 'chat_is_task_status';
COMMENT ON FUNCTION chat.is_task_status(text, boolean) IS
	'whether a task may have this status, when it has ended or not';

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
	total_prompt_tokens chat.total NOT NULL DEFAULT 0,
	total_completion_tokens chat.total NOT NULL DEFAULT 0,
	metadata chat.json_object NOT NULL DEFAULT '{}',
	channel name NOT NULL DEFAULT
		('chat_' || pg_catalog.replace(pg_catalog.gen_random_uuid()::text, '-', '')),
	server name,
	settings chat.json_object NOT NULL DEFAULT '{}',
	next_sequence chat.next_sequence NOT NULL DEFAULT 1,
	-- of the messages up to this sequence that the model still sees
	summary text,
	summary_sequence chat.total NOT NULL DEFAULT 0,
	summary_failed_at timestamptz,
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
	-- system, developer, user, assistant, tool, function
	role text NOT NULL CHECK (chat.is_message_role(role)),
	content text,
	parts jsonb,
	name text,
	tool_call_id text,
	refusal text,
	tool_calls chat.json_array,
	function_call chat.json_object,
	task_id uuid,
	active boolean NOT NULL DEFAULT true,
	-- of a superseded one: the sequence of what took its place
	superseded_by bigint,
	metadata chat.json_object NOT NULL DEFAULT '{}',
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
	-- queued, running, waiting; ended: completed, failed, cancelled
	status text NOT NULL DEFAULT 'queued',
	-- id of the message that started it: the client's, for idempotency
	message_id uuid,
	-- the queued message, until the task starts and it becomes a message
	input jsonb,
	server name NOT NULL,
	options jsonb NOT NULL DEFAULT '{}',
	-- id of the assistant message that the task writes
	answer_id uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
	run integer NOT NULL DEFAULT -1,
	-- waits for operations that leave the session free
	detached boolean NOT NULL DEFAULT false,
	slot smallint,
	steps chat.step_count NOT NULL DEFAULT 0,
	prompt_tokens chat.total NOT NULL DEFAULT 0,
	completion_tokens chat.total NOT NULL DEFAULT 0,
	usage jsonb,
	-- the system prompt that it used; null: the built-in one, or none
	prompt_name text,
	prompt_version integer,
	-- that answered
	model text,
	-- tokens of the last request, and how it was made to fit
	context_tokens bigint,
	compaction text,
	error jsonb,
	-- a later message has taken its place: its messages stay, or are hidden
	superseded chat.superseded_how,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	started_at timestamptz,
	finished_at timestamptz,
	CONSTRAINT chat_task_status_check
		CHECK (chat.is_task_status(status, finished_at IS NOT NULL))
) WITH (fillfactor = 70);
-- at most one task of a session runs
CREATE UNIQUE INDEX chat_task_running_idx ON chat.chat_task (session_id)
	WHERE status = 'running';
CREATE INDEX chat_task_queued_idx ON chat.chat_task (session_id, place)
	WHERE status = 'queued';
CREATE INDEX chat_task_waiting_idx ON chat.chat_task (session_id)
	WHERE status = 'waiting';
CREATE UNIQUE INDEX chat_task_message_idx
	ON chat.chat_task (session_id, message_id);

-- Small and hot: a job is deleted when it is done.
CREATE TABLE chat.chat_job (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	kind chat.job_kind NOT NULL,
	session_id uuid NOT NULL
		REFERENCES chat.chat_session ON DELETE CASCADE,
	task_id uuid,
	-- the task's endpoint, for its limits; empty: none
	server name NOT NULL DEFAULT '',
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
	-- those of the crashes that happened while a worker was at work on it
	blamed integer NOT NULL DEFAULT 0,
	-- somebody wants the task to end
	cancel boolean NOT NULL DEFAULT false,
	-- what the listeners saw of the last attempt is void
	reset boolean NOT NULL DEFAULT false,
	-- its holder died: the task starts a new run
	rerun boolean NOT NULL DEFAULT false,
	-- number of the last event, when no new run starts
	last_seq bigint NOT NULL DEFAULT 0,
	-- the task waits for its tool calls: whoever ends one of them makes it due
	parked boolean NOT NULL DEFAULT false,
	-- the call that a tool job runs, and who does: tool workers the SQL ones
	operation_id uuid,
	tool_kind chat.job_tool_kind,
	-- what the task has waited for in this step; see queue.h
	waited integer NOT NULL DEFAULT 0,
	-- tokens of its next request: the endpoint has refused a larger one
	shrink_to bigint,
	-- usage of the step's attempts that were given up
	spent jsonb,
	-- what a title or a summary was asked for
	input jsonb,
	-- identity of the worker that holds it
	holder bigint,
	-- fencing: grows with every claim, each write of the holder checks it
	epoch bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
CREATE INDEX chat_job_claim_idx ON chat.chat_job (priority, run_at, id)
	WHERE holder IS NULL AND kind = 'completion' AND NOT parked;
CREATE INDEX chat_job_side_idx ON chat.chat_job (server, priority, id)
	WHERE holder IS NULL AND kind IN ('title', 'summary', 'notice');
CREATE INDEX chat_job_sql_idx ON chat.chat_job (owner, run_at, id)
	WHERE holder IS NULL AND tool_kind = 'sql';
CREATE INDEX chat_job_http_idx ON chat.chat_job (run_at, id)
	WHERE holder IS NULL AND tool_kind = 'http';
-- when there are more jobs than room: turn by turn, within servers' limits
CREATE INDEX chat_job_fair_idx
	ON chat.chat_job (server, owner, priority, run_at, id)
	WHERE holder IS NULL AND kind = 'completion' AND NOT parked;
CREATE INDEX chat_job_cancel_idx ON chat.chat_job (id)
	WHERE holder IS NULL AND cancel;
CREATE INDEX chat_job_parked_idx ON chat.chat_job (run_at)
	WHERE holder IS NULL AND parked;
CREATE INDEX chat_job_later_idx ON chat.chat_job (run_at)
	WHERE holder IS NULL AND run_at > '-infinity';
-- what a worker holds, however long the queue is
CREATE INDEX chat_job_holder_idx ON chat.chat_job (holder)
	WHERE holder IS NOT NULL;
CREATE INDEX chat_job_session_idx ON chat.chat_job (session_id);

CREATE TABLE chat.chat_tool (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	-- NULL: shared by all, the DBA's
	owner regrole,
	name text NOT NULL CHECK (name ~ '^[a-zA-Z0-9_-]{1,64}$'),
	kind text NOT NULL CHECK (kind IN ('sql', 'http', 'client')),
	-- signature of the function, resolved when it runs
	function text,
	server name,
	path text,
	description text,
	parameters jsonb NOT NULL
		CHECK (pg_catalog.jsonb_typeof(parameters) = 'object'),
	timeout interval CHECK (timeout > '0' AND timeout <= '366 days'),
	long_running boolean NOT NULL DEFAULT false,
	idempotent boolean NOT NULL DEFAULT false,
	read_only boolean NOT NULL DEFAULT false,
	approval text NOT NULL DEFAULT 'auto'
		CHECK (approval IN ('auto', 'ask', 'deny')),
	enabled boolean NOT NULL DEFAULT true,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	UNIQUE NULLS NOT DISTINCT (owner, name),
	CHECK (CASE kind WHEN 'sql' THEN function IS NOT NULL
		WHEN 'http' THEN server IS NOT NULL ELSE true END)
);

-- One row per call, known by its message and position: a model may send the
-- same id twice.
CREATE TABLE chat.chat_tool_call (
	-- who knows it may end the operation, so no index knows what is next to it
	operation_id uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
	session_id uuid NOT NULL
		REFERENCES chat.chat_session ON DELETE CASCADE,
	task_id uuid NOT NULL,
	-- the assistant message that asks, and the place in its tool_calls
	message_id uuid NOT NULL,
	position integer NOT NULL CHECK (position > 0),
	-- the tool message that the result goes to
	sequence bigint NOT NULL,
	step integer NOT NULL,
	call_id text NOT NULL,
	name text NOT NULL,
	kind text NOT NULL CHECK (kind IN ('sql', 'http', 'client', 'none')),
	tool_id bigint,
	arguments text NOT NULL,
	input jsonb,
	timeout interval,
	long_running boolean NOT NULL DEFAULT false,
	idempotent boolean NOT NULL DEFAULT false,
	-- approval: somebody must allow it; pending: a job will run it;
	-- waiting: its end comes from elsewhere
	status text NOT NULL CHECK (status IN ('approval', 'pending', 'running',
		'waiting', 'completed', 'failed', 'denied', 'cancelled')),
	result text,
	deadline timestamptz,
	-- listeners know that it waits; listeners and the model know its result
	announced boolean NOT NULL DEFAULT false,
	delivered boolean NOT NULL DEFAULT false,
	-- its end was told by complete_operation or the like
	reported boolean NOT NULL DEFAULT false,
	-- what came when all was over
	late jsonb,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	started_at timestamptz,
	ended_at timestamptz,
	PRIMARY KEY (session_id, message_id, position),
	CONSTRAINT chat_tool_call_operation_id
		EXCLUDE USING hash (operation_id WITH OPERATOR(pg_catalog.=)),
	CHECK ((status IN ('completed', 'failed', 'denied', 'cancelled'))
		= (ended_at IS NOT NULL)),
	CHECK ((ended_at IS NOT NULL) = (result IS NOT NULL))
);
CREATE INDEX chat_tool_call_task_idx ON chat.chat_tool_call (task_id, step);

-- Progress of operations that the next turn of the task tells and deletes.
CREATE TABLE chat.chat_tool_progress (
	operation_id uuid NOT NULL,
	id bigint GENERATED ALWAYS AS IDENTITY,
	session_id uuid NOT NULL,
	message_id uuid NOT NULL,
	position integer NOT NULL,
	progress jsonb NOT NULL,
	PRIMARY KEY (operation_id, id),
	FOREIGN KEY (session_id, message_id, position)
		REFERENCES chat.chat_tool_call ON DELETE CASCADE
);
CREATE INDEX chat_tool_progress_call_idx
	ON chat.chat_tool_progress (session_id, message_id, position);

-- What requests beside the turns have used, and the tasks of sessions that
-- were deleted.
CREATE TABLE chat.chat_usage (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	-- no foreign key: what was used stays when the session goes
	session_id uuid NOT NULL,
	owner regrole NOT NULL,
	user_id text,
	server name,
	model text,
	kind text NOT NULL CHECK (kind IN ('completion', 'title', 'summary')),
	requests bigint NOT NULL DEFAULT 1,
	prompt_tokens bigint NOT NULL CHECK (prompt_tokens >= 0),
	completion_tokens bigint NOT NULL CHECK (completion_tokens >= 0),
	cached_tokens bigint NOT NULL DEFAULT 0,
	reasoning_tokens bigint NOT NULL DEFAULT 0,
	estimated boolean NOT NULL DEFAULT false,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now()
);
CREATE INDEX chat_usage_user_id_idx ON chat.chat_usage (user_id, created_at);

CREATE TABLE chat.chat_event (
	slot smallint NOT NULL,
	task_id uuid NOT NULL,
	seq bigint NOT NULL,
	payload json NOT NULL,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	PRIMARY KEY (slot, task_id, seq)
) PARTITION BY LIST (slot);
-- a payload that can be notified stays in its row, as it is: events are
-- written often, read once and kept for a short time
ALTER TABLE chat.chat_event ALTER COLUMN payload SET STORAGE EXTERNAL;
DO $$
BEGIN
	FOR i IN 0 .. 7 LOOP
		EXECUTE pg_catalog.format('CREATE TABLE chat.chat_event_%s
			PARTITION OF chat.chat_event FOR VALUES IN (%s)
			WITH (toast_tuple_target = 8160)', i, i);
		EXECUTE pg_catalog.format('ALTER TABLE chat.chat_event_%s
			ALTER COLUMN payload SET STORAGE EXTERNAL', i);
	END LOOP;
END
$$;
-- texts compress several times faster with lz4, where the server has it
DO $$
BEGIN
	ALTER TABLE chat.chat_message ALTER COLUMN content SET COMPRESSION lz4;
	ALTER TABLE chat.chat_message ALTER COLUMN parts SET COMPRESSION lz4;
	ALTER TABLE chat.chat_message ALTER COLUMN metadata SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
	NULL;
END
$$;

-- which slot new tasks write to: the one that was opened last
CREATE TABLE chat.chat_event_slot (
	slot smallint PRIMARY KEY,
	opened_at timestamptz NOT NULL
);
INSERT INTO chat.chat_event_slot VALUES (0, pg_catalog.now());

-- what the administrator has told the workers: always one row
CREATE TABLE chat.chat_control (
	only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
	paused boolean NOT NULL DEFAULT false,
	changed_at timestamptz,
	changed_by regrole
);
INSERT INTO chat.chat_control DEFAULT VALUES;

COMMENT ON TABLE chat.chat_session IS 'conversations';
COMMENT ON COLUMN chat.chat_session.user_id IS 'user of the application; null: anonymous';
COMMENT ON COLUMN chat.chat_session.owner IS 'database role that the session belongs to: its members see it, its keys and tools are used';
COMMENT ON COLUMN chat.chat_session.channel IS 'what to LISTEN to; whoever knows the name can';
COMMENT ON COLUMN chat.chat_session.server IS 'foreign server of wrapper chat_llm; null: chat.default_server';
COMMENT ON COLUMN chat.chat_session.settings IS 'model, temperature and the like; they go before the server''s options';
COMMENT ON COLUMN chat.chat_session.next_sequence IS 'sequence of the next message';
COMMENT ON TABLE chat.chat_message IS 'the entries of a conversation, in OpenAI roles';
COMMENT ON COLUMN chat.chat_message.parts IS 'content in the API''s own parts; goes to the model instead of content';
COMMENT ON COLUMN chat.chat_message.active IS 'whether it is of the branch that the model and the functions see';
COMMENT ON COLUMN chat.chat_message.superseded_by IS 'sequence of the first message of the branch that took its place';
COMMENT ON COLUMN chat.chat_message.metadata IS 'model, finish reason, usage and the like; interrupted: true marks an answer that was cut short';
COMMENT ON TABLE chat.chat_task IS 'turns: from a user''s message to the final answer';
COMMENT ON TABLE chat.chat_job IS 'the queue that the workers take their jobs from';
COMMENT ON TABLE chat.chat_tool IS 'tools that models may call';
COMMENT ON TABLE chat.chat_tool_call IS 'calls of tools, each with its one result';
COMMENT ON TABLE chat.chat_usage IS 'tokens of titles and summaries, and of the turns of deleted sessions';
COMMENT ON TABLE chat.chat_tool_progress IS 'progress of operations that was not told yet';
COMMENT ON TABLE chat.chat_event IS 'event streams of tasks, in the AI SDK''s UI message stream vocabulary';
COMMENT ON TABLE chat.chat_control IS 'whether the workers of this database are paused';
COMMENT ON TABLE chat.chat_event_slot IS 'rotation of the partitions of chat_event';

--
-- Row-level security
--
-- One definition of who sees a session; what hangs on a session asks for it
-- by a function, which is an index probe for each session.  Its cost puts it
-- before all conditions of the query: behind them, EXPLAIN ANALYZE would tell
-- for how many rows of others a comparison holds, and so what stands in them.
-- What the statistics of a column tell is the same, so there are none of what
-- people say and of what lets somebody in who knows it.
--

CREATE FUNCTION chat.session_visible(session_id uuid) RETURNS boolean
LANGUAGE c STABLE PARALLEL SAFE COST 0.0001
AS 'MODULE_PATHNAME', 'chat_session_visible';
COMMENT ON FUNCTION chat.session_visible IS 'whether there is such a session that the caller may see';

ALTER TABLE chat.chat_session
	ALTER COLUMN title SET STATISTICS 0,
	ALTER COLUMN channel SET STATISTICS 0,
	ALTER COLUMN summary SET STATISTICS 0;
ALTER TABLE chat.chat_message
	ALTER COLUMN content SET STATISTICS 0,
	ALTER COLUMN refusal SET STATISTICS 0;
ALTER TABLE chat.chat_tool_call
	ALTER COLUMN operation_id SET STATISTICS 0,
	ALTER COLUMN arguments SET STATISTICS 0,
	ALTER COLUMN result SET STATISTICS 0;

ALTER TABLE chat.chat_session ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_message ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_task ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_job ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_event ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_tool ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_tool_call ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_usage ENABLE ROW LEVEL SECURITY;
-- what has no policy shows nothing, whatever a DBA grants by mistake
ALTER TABLE chat.chat_event_slot ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_tool_progress ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_control ENABLE ROW LEVEL SECURITY;
DO $$
BEGIN
	FOR i IN 0 .. 7 LOOP
		EXECUTE pg_catalog.format('ALTER TABLE chat.chat_event_%s
			ENABLE ROW LEVEL SECURITY', i);
	END LOOP;
END
$$;

CREATE POLICY visible ON chat.chat_session FOR SELECT USING (
	pg_catalog.pg_has_role(owner, 'USAGE')
	AND (COALESCE(pg_catalog.current_setting('chat.user_id', true), '') = ''
		OR user_id = pg_catalog.current_setting('chat.user_id', true)));
CREATE POLICY visible ON chat.chat_message FOR SELECT USING (
	chat.session_visible(session_id));
CREATE POLICY visible ON chat.chat_task FOR SELECT USING (
	chat.session_visible(session_id));
CREATE POLICY visible ON chat.chat_tool FOR SELECT USING (
	owner IS NULL OR pg_catalog.pg_has_role(owner, 'USAGE'));
CREATE POLICY visible ON chat.chat_tool_call FOR SELECT USING (
	chat.session_visible(session_id));
CREATE POLICY visible ON chat.chat_usage FOR SELECT USING (
	pg_catalog.pg_has_role(owner, 'USAGE')
	AND (COALESCE(pg_catalog.current_setting('chat.user_id', true), '') = ''
		OR user_id = pg_catalog.current_setting('chat.user_id', true)));
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

-- Tasks that a restore brings have no job: the worker ends them.
CREATE FUNCTION chat.chat_task_ring() RETURNS trigger
	LANGUAGE c AS 'MODULE_PATHNAME', 'chat_task_ring';
COMMENT ON FUNCTION chat.chat_task_ring() IS
	'has the workers look for tasks without a job';
CREATE TRIGGER ring AFTER INSERT ON chat.chat_task
	FOR EACH STATEMENT EXECUTE FUNCTION chat.chat_task_ring();

--
-- Internal
--

-- Sums the token counts of two steps.
CREATE FUNCTION chat.add_usage(a jsonb, b jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT CASE WHEN a IS NULL THEN b WHEN b IS NULL THEN a
		ELSE (SELECT pg_catalog.jsonb_object_agg(u.key,
				CASE pg_catalog.jsonb_typeof(u.value) WHEN 'number'
					THEN pg_catalog.to_jsonb(COALESCE((a -> u.key)::bigint, 0)
						+ COALESCE((b -> u.key)::bigint, 0))
					ELSE u.value END)
			FROM pg_catalog.jsonb_each(a || b) AS u) END;
END;
COMMENT ON FUNCTION chat.add_usage(jsonb, jsonb) IS 'token counts of two steps together';

--
-- Data functions
--
-- What only reads is SQL and runs as the caller, under row-level security;
-- what writes is C.
--

CREATE FUNCTION chat.create_chat_session(
	session_id uuid DEFAULT NULL,
	user_id text DEFAULT NULL,
	title text DEFAULT NULL,
	server name DEFAULT NULL,
	settings jsonb DEFAULT NULL,
	metadata jsonb DEFAULT NULL,
	owner regrole DEFAULT NULL,
	channel name DEFAULT NULL)
RETURNS chat.chat_session
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_session_create';
COMMENT ON FUNCTION chat.create_chat_session IS 'creates a session and returns its row';

CREATE FUNCTION chat.get_chat_session(
	session_id uuid,
	user_id text DEFAULT NULL,
	all_branches boolean DEFAULT false)
RETURNS jsonb
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT pg_catalog.jsonb_build_object(
		'session_id', s.id,
		'user_id', s.user_id,
		'title', s.title,
		'credentials', s.credentials,
		'successful_agent_runs', s.successful_agent_runs,
		'successful_agent_schedules', s.successful_agent_schedules,
		'settings', s.settings,
		'metadata', s.metadata,
		'server', s.server,
		'channel', s.channel,
		'total_prompt_tokens', s.total_prompt_tokens,
		'total_completion_tokens', s.total_completion_tokens,
		'usage', CASE WHEN s.total_prompt_tokens > 0 OR s.total_completion_tokens > 0
			THEN pg_catalog.jsonb_build_array(pg_catalog.jsonb_build_object(
				'prompt_tokens', s.total_prompt_tokens,
				'completion_tokens', s.total_completion_tokens,
				'total_tokens', s.total_prompt_tokens::numeric + s.total_completion_tokens))
			ELSE '[]' END,
		'created_at', s.created_at,
		'updated_at', s.updated_at,
		'messages', COALESCE((
			SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
				'message_id', m.id,
				'sequence', m.sequence,
				'role', m.role,
				'content', m.content,
				'parts', m.parts,
				'name', m.name,
				'tool_call_id', m.tool_call_id,
				'refusal', m.refusal,
				'tool_calls', m.tool_calls,
				'function_call', m.function_call,
				'task_id', m.task_id,
				'metadata', m.metadata,
				'created_at', m.created_at)
				|| CASE WHEN all_branches THEN pg_catalog.jsonb_build_object(
					'active', m.active,
					'superseded_by', m.superseded_by) ELSE '{}' END
				ORDER BY m.sequence)
			FROM chat.chat_message AS m
			WHERE m.session_id = s.id AND (m.active OR all_branches)), '[]'),
		'queued', COALESCE((
			SELECT pg_catalog.jsonb_agg(t.input ORDER BY t.place)
			FROM chat.chat_task AS t
			WHERE t.session_id = s.id AND t.status = 'queued'
				AND t.input IS NOT NULL), '[]'))
	FROM chat.chat_session AS s
	WHERE s.id = get_chat_session.session_id
		AND (get_chat_session.user_id IS NULL
			OR s.user_id = get_chat_session.user_id);
END;
COMMENT ON FUNCTION chat.get_chat_session IS 'a session with its messages, as a document';

CREATE FUNCTION chat.get_chat_messages(
	session_id uuid,
	before_sequence bigint DEFAULT NULL,
	max_rows integer DEFAULT NULL,
	all_branches boolean DEFAULT false)
RETURNS SETOF chat.chat_message
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT p.*
	FROM (SELECT m.*
		FROM chat.chat_message AS m
		WHERE m.session_id = get_chat_messages.session_id
			AND (m.active OR all_branches)
			AND m.sequence < COALESCE(before_sequence, 9223372036854775807)
		ORDER BY m.sequence DESC
		LIMIT max_rows) AS p
	ORDER BY p.sequence;
END;
COMMENT ON FUNCTION chat.get_chat_messages IS 'the newest messages of a session, or those before a sequence, in order';

CREATE FUNCTION chat.get_chat_session_message_count(session_id uuid)
RETURNS bigint
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT pg_catalog.count(*)
	FROM chat.chat_message AS m
	WHERE m.session_id = get_chat_session_message_count.session_id AND m.active;
END;
COMMENT ON FUNCTION chat.get_chat_session_message_count IS 'how many messages a session has';

CREATE FUNCTION chat.get_user_chat_sessions(
	user_id text,
	max_rows integer DEFAULT 50,
	skip integer DEFAULT 0,
	before_updated_at timestamptz DEFAULT NULL,
	before_id uuid DEFAULT NULL)
RETURNS SETOF chat.chat_session
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT s.*
	FROM chat.chat_session AS s
	WHERE s.user_id = get_user_chat_sessions.user_id
		AND CASE
			WHEN before_updated_at IS NULL THEN true
			WHEN before_id IS NULL THEN s.updated_at < before_updated_at
			ELSE (s.updated_at, s.id) < (before_updated_at, before_id)
		END
	ORDER BY s.updated_at DESC, s.id DESC
	LIMIT max_rows OFFSET skip;
END;
COMMENT ON FUNCTION chat.get_user_chat_sessions IS 'sessions of a user, those changed last first; page with updated_at and id of the last row';

CREATE FUNCTION chat.get_user_session_count(user_id text)
RETURNS bigint
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT pg_catalog.count(*)
	FROM chat.chat_session AS s
	WHERE s.user_id = get_user_session_count.user_id;
END;
COMMENT ON FUNCTION chat.get_user_session_count IS 'how many sessions a user has';

CREATE FUNCTION chat.upsert_chat_session(session jsonb)
RETURNS jsonb
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_session_upsert';
COMMENT ON FUNCTION chat.upsert_chat_session IS 'creates or updates a session from its document and appends the messages that are new; returns the document as stored';

CREATE FUNCTION chat.update_chat_session(
	session_id uuid,
	credentials jsonb DEFAULT NULL,
	successful_agent_runs jsonb DEFAULT NULL,
	successful_agent_schedules jsonb DEFAULT NULL,
	total_prompt_tokens bigint DEFAULT NULL,
	total_completion_tokens bigint DEFAULT NULL,
	title text DEFAULT NULL,
	settings jsonb DEFAULT NULL,
	metadata jsonb DEFAULT NULL)
RETURNS chat.chat_session
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_session_update';
COMMENT ON FUNCTION chat.update_chat_session IS 'sets what is not null; returns the row, or null if there is none';

CREATE FUNCTION chat.update_session_title(session_id uuid, title text)
RETURNS boolean
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_session_set_title';
COMMENT ON FUNCTION chat.update_session_title IS 'sets the title; returns whether there is such a session';

CREATE FUNCTION chat.assign_user_to_session(session_id uuid, user_id text)
RETURNS chat.chat_session
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_session_assign';
COMMENT ON FUNCTION chat.assign_user_to_session IS 'gives a session to a user of the application; returns the row';

CREATE FUNCTION chat.delete_chat_session(session_id uuid, user_id text DEFAULT NULL)
RETURNS boolean
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_session_delete';
COMMENT ON FUNCTION chat.delete_chat_session IS 'deletes a session with all that belongs to it; returns whether there was one';

CREATE FUNCTION chat.add_chat_message(
	session_id uuid,
	role text,
	content text DEFAULT NULL,
	name text DEFAULT NULL,
	tool_call_id text DEFAULT NULL,
	refusal text DEFAULT NULL,
	tool_calls jsonb DEFAULT NULL,
	function_call jsonb DEFAULT NULL,
	parts jsonb DEFAULT NULL,
	message_id uuid DEFAULT NULL,
	sequence bigint DEFAULT NULL)
RETURNS chat.chat_message
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_session_add_message';
COMMENT ON FUNCTION chat.add_chat_message IS 'appends a message and returns its row';

CREATE FUNCTION chat.add_chat_messages_batch(
	session_id uuid,
	messages jsonb,
	start_sequence bigint DEFAULT NULL)
RETURNS SETOF chat.chat_message
LANGUAGE c VOLATILE ROWS 10 AS 'MODULE_PATHNAME', 'chat_session_add_batch';
COMMENT ON FUNCTION chat.add_chat_messages_batch IS 'appends an array of messages, all or none, and returns their rows';

CREATE FUNCTION chat.update_tool_message_content(
	session_id uuid,
	tool_call_id text,
	new_content text)
RETURNS boolean
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_session_set_tool_content';
COMMENT ON FUNCTION chat.update_tool_message_content IS 'replaces the content of the newest tool message of a tool call; returns whether there is one';

CREATE FUNCTION chat.to_openai_messages(session_id uuid)
RETURNS jsonb
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'chat_to_openai_messages';
COMMENT ON FUNCTION chat.to_openai_messages IS 'the messages of a session as a chat completions request holds them';

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
-- Tools
--
-- Servers of wrapper chat_tool are the services that run HTTP tools.
--

CREATE FUNCTION chat.chat_tool_validator(options text[], catalog oid)
	RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'chat_tool_validator';
COMMENT ON FUNCTION chat.chat_tool_validator(text[], oid) IS
	'checks the options of servers and user mappings of wrapper chat_tool';
CREATE FOREIGN DATA WRAPPER chat_tool VALIDATOR chat.chat_tool_validator;
COMMENT ON FOREIGN DATA WRAPPER chat_tool IS
	'services that run HTTP tools';

CREATE FUNCTION chat.register_tool(
	function text DEFAULT NULL,
	name text DEFAULT NULL,
	description text DEFAULT NULL,
	parameters jsonb DEFAULT NULL,
	kind text DEFAULT 'sql',
	server name DEFAULT NULL,
	path text DEFAULT NULL,
	timeout interval DEFAULT NULL,
	long_running boolean DEFAULT false,
	idempotent boolean DEFAULT false,
	read_only boolean DEFAULT false,
	approval text DEFAULT 'auto',
	enabled boolean DEFAULT true,
	shared boolean DEFAULT false)
RETURNS chat.chat_tool
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_register_tool';
COMMENT ON FUNCTION chat.register_tool IS
'lets models call a function, an HTTP service or the application; replaces the role''s tool of the same name and returns its row';

CREATE FUNCTION chat.drop_tool(name text, shared boolean DEFAULT false)
RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_drop_tool';
COMMENT ON FUNCTION chat.drop_tool(text, boolean) IS
'drops a tool of the current role, or a shared one; returns whether there was one';

CREATE VIEW chat.tools WITH (security_invoker = true) AS
	SELECT t.owner, t.name, t.kind, t.function, t.server, t.path,
		t.description, t.parameters, t.timeout, t.long_running, t.idempotent,
		t.read_only, t.approval, t.enabled, t.created_at
	FROM chat.chat_tool AS t;
COMMENT ON VIEW chat.tools IS 'tools of the roles that the current one belongs to, and those that all share (owner is null)';

--
-- Operations
--

CREATE FUNCTION chat.complete_operation(
	operation_id uuid,
	result jsonb DEFAULT NULL,
	success boolean DEFAULT true,
	error text DEFAULT NULL)
RETURNS text
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_complete_operation';
COMMENT ON FUNCTION chat.complete_operation(uuid, jsonb, boolean, text) IS
'ends an operation with its result or its error; returns completed, duplicate or late';

CREATE FUNCTION chat.operation_progress(operation_id uuid, progress jsonb)
RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_operation_progress';
COMMENT ON FUNCTION chat.operation_progress(uuid, jsonb) IS
'tells listeners how far an operation is; returns whether it goes on';

CREATE FUNCTION chat.submit_tool_output(
	session_id uuid,
	tool_call_id text,
	output jsonb DEFAULT NULL,
	error text DEFAULT NULL)
RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_submit_tool_output';
COMMENT ON FUNCTION chat.submit_tool_output(uuid, text, jsonb, text) IS
'ends a call of a client tool with its output or its error; returns whether one has waited for it';

CREATE FUNCTION chat.approve_tool_call(session_id uuid, tool_call_id text)
RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_approve_tool_call';
COMMENT ON FUNCTION chat.approve_tool_call(uuid, text) IS
'lets a tool call run that waits for approval; returns whether there was one';

CREATE FUNCTION chat.deny_tool_call(
	session_id uuid,
	tool_call_id text,
	reason text DEFAULT NULL)
RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_deny_tool_call';
COMMENT ON FUNCTION chat.deny_tool_call(uuid, text, text) IS
'denies a tool call that waits for approval, and tells the model; returns whether there was one';

-- The task that has the session decides, then those that wait for it, then
-- those that have left it free.
CREATE FUNCTION chat.session_status(session_id uuid) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT COALESCE(
		(SELECT CASE WHEN t.status <> 'queued' AND EXISTS (
				SELECT FROM chat.chat_tool_call AS c
				WHERE c.task_id = t.id AND c.session_id = s.id
					AND c.ended_at IS NULL)
			THEN 'processing_tools' ELSE 'processing_message' END
		FROM (
			-- each by its own index, however many tasks there were
			SELECT b.* FROM chat.chat_task AS b
			WHERE b.session_id = s.id AND b.status = 'running'
			UNION ALL
			SELECT b.* FROM chat.chat_task AS b
			WHERE b.session_id = s.id AND b.status = 'queued'
			UNION ALL
			SELECT b.* FROM chat.chat_task AS b
			WHERE b.session_id = s.id AND b.status = 'waiting') AS t
		ORDER BY t.status = 'running' DESC, t.detached,
			t.status = 'waiting' DESC, t.place
		LIMIT 1),
		CASE WHEN EXISTS (SELECT FROM chat.chat_task AS t
				WHERE t.session_id = s.id)
			THEN 'completed' ELSE 'idle' END)
	FROM chat.chat_session AS s
	WHERE s.id = session_status.session_id;
END;
COMMENT ON FUNCTION chat.session_status(uuid) IS
'idle, processing_message, processing_tools or completed; null for an unknown session';

--
-- Runtime
--

CREATE FUNCTION chat.stream_chat_completion(
	session_id uuid,
	message text DEFAULT NULL,
	is_user_message boolean DEFAULT true,
	user_id text DEFAULT NULL,
	context jsonb DEFAULT NULL,
	message_id uuid DEFAULT NULL,
	server name DEFAULT NULL,
	options jsonb DEFAULT NULL,
	on_busy text DEFAULT 'enqueue')
RETURNS uuid
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_stream_chat_completion';
COMMENT ON FUNCTION chat.stream_chat_completion(uuid, text, boolean, text, jsonb, uuid, name, jsonb, text) IS
'queues a message and the answer to it; returns the task at once, which starts when the transaction commits';

CREATE FUNCTION chat.generate_session_title(session_id uuid) RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_generate_session_title';
COMMENT ON FUNCTION chat.generate_session_title(uuid) IS
'asks a model for another title; returns whether there is such a session, with a question in it';

CREATE FUNCTION chat.cancel_task(task_id uuid) RETURNS boolean
LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_cancel_task';
COMMENT ON FUNCTION chat.cancel_task(uuid) IS
'ends a task; true if it was this call that did';

CREATE PROCEDURE chat.ask(
	message text,
	session_id uuid DEFAULT NULL,
	INOUT answer text DEFAULT NULL)
LANGUAGE c AS 'MODULE_PATHNAME', 'chat_ask';
COMMENT ON PROCEDURE chat.ask(text, uuid, text) IS
'sends a message, waits for the answer and returns it; without a session, in a new one';

CREATE FUNCTION chat.get_task(task_id uuid) RETURNS chat.chat_task
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT t FROM chat.chat_task AS t WHERE t.id = get_task.task_id;
END;
COMMENT ON FUNCTION chat.get_task(uuid) IS
'a task, or NULL';

CREATE FUNCTION chat.get_active_task(session_id uuid) RETURNS chat.chat_task
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	-- by the index of each status: those that have ended may be many
	SELECT a.t FROM (
		SELECT b AS t, 0 AS rank, b.place FROM chat.chat_task AS b
		WHERE b.session_id = get_active_task.session_id
			AND b.status = 'running'
		UNION ALL
		SELECT b, 1, b.place FROM chat.chat_task AS b
		WHERE b.session_id = get_active_task.session_id
			AND b.status = 'waiting'
		UNION ALL
		SELECT b, 1, b.place FROM chat.chat_task AS b
		WHERE b.session_id = get_active_task.session_id
			AND b.status = 'queued') AS a
	ORDER BY a.rank, a.place LIMIT 1;
END;
COMMENT ON FUNCTION chat.get_active_task(uuid) IS
'the task that runs in a session, else the next one, or NULL';

CREATE FUNCTION chat.current_tool_call(
	OUT session_id uuid,
	OUT user_id text,
	OUT task_id uuid,
	OUT tool_call_id text,
	OUT operation_id uuid,
	OUT name text)
LANGUAGE c STABLE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'chat_current_tool_call';
COMMENT ON FUNCTION chat.current_tool_call() IS
'inside a SQL tool: what the call is about; NULLs elsewhere';

CREATE FUNCTION chat.report_progress(progress jsonb) RETURNS boolean
LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_report_progress';
COMMENT ON FUNCTION chat.report_progress(jsonb) IS
'inside a SQL tool: shows listeners at once how far it is; false elsewhere';

CREATE FUNCTION chat.worker_status(
	OUT pid integer,
	OUT state text,
	OUT started_at timestamptz,
	OUT open_streams bigint,
	OUT stream_limit bigint,
	OUT requests bigint,
	OUT completed bigint,
	OUT failed bigint,
	OUT cancelled bigint,
	OUT retried bigint,
	OUT events bigint,
	OUT flushes bigint,
	OUT unnotified bigint)
RETURNS SETOF record
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'chat_worker_status';
COMMENT ON FUNCTION chat.worker_status() IS
'the workers of this database and what they have counted since they started';

--
-- Administration
--

CREATE FUNCTION chat.pause() RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_pause';
COMMENT ON FUNCTION chat.pause() IS
'lets the workers of this database take nothing more from the queue, also after a restart; what is at work goes on; true if they were not paused';

CREATE FUNCTION chat.resume() RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_resume';
COMMENT ON FUNCTION chat.resume() IS
'lets the workers go on; true if they were paused';

CREATE PROCEDURE chat.drain(
	timeout interval DEFAULT '60 s',
	INOUT running bigint DEFAULT NULL)
LANGUAGE c AS 'MODULE_PATHNAME', 'chat_drain';
COMMENT ON PROCEDURE chat.drain(interval, bigint) IS
'pauses, waits until nothing is at work, and returns how many jobs still are at the timeout';

CREATE VIEW chat.poisoned_jobs WITH (security_invoker = true) AS
	SELECT t.id AS task_id, t.session_id, t.server, t.finished_at AS set_aside_at,
		(t.error ->> 'crashes')::integer AS crashes,
		t.error ->> 'message' AS message
	FROM chat.chat_task AS t
	WHERE t.status = 'failed' AND t.error ? 'crashes' AND NOT t.error ? 'rerun';
COMMENT ON VIEW chat.poisoned_jobs IS
'tasks that were put aside because they have crashed their worker chat.max_crashes times, and were not run again';

CREATE FUNCTION chat.rerun_job(task_id uuid) RETURNS uuid
LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_rerun_job';
COMMENT ON FUNCTION chat.rerun_job(uuid) IS
'queues the answer again that a task of poisoned_jobs owes; returns the new task';

--
-- Statistics
--
-- Plain numbers, for a metrics exporter.  They tell nothing of what is said,
-- but of how much: for monitoring roles, see the last section.
--

CREATE FUNCTION chat.server_statistics(
	OUT server_oid oid,
	OUT server name,
	OUT open_requests bigint,
	OUT requests bigint,
	OUT completed bigint,
	OUT failed bigint,
	OUT cancelled bigint,
	OUT retried bigint,
	OUT rate_limited bigint,
	OUT first_tokens bigint,
	OUT first_token_seconds double precision,
	OUT first_token_seconds_last double precision,
	OUT tokens bigint,
	OUT token_seconds double precision,
	OUT requests_last_minute bigint,
	OUT closed_seconds double precision)
RETURNS SETOF record
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'chat_server_statistics';
COMMENT ON FUNCTION chat.server_statistics() IS
'what the endpoints of this database were asked and how they answered, since the server started';

CREATE VIEW chat.stat_server AS
	SELECT f.srvname AS server, s.open_requests, s.requests, s.completed,
		s.failed, s.cancelled, s.retried, s.rate_limited,
		s.first_tokens, s.first_token_seconds,
		s.first_token_seconds / NULLIF(s.first_tokens, 0) AS first_token_seconds_avg,
		s.first_token_seconds_last, s.tokens, s.token_seconds,
		s.tokens / NULLIF(s.token_seconds, 0) AS tokens_per_second,
		s.requests_last_minute, s.closed_seconds
	FROM chat.server_statistics() AS s
		JOIN pg_catalog.pg_foreign_server AS f ON f.oid = s.server_oid;
COMMENT ON VIEW chat.stat_server IS
'endpoints: requests and how they ended, time to the first token, tokens per second, how long one is closed after a 429; counted since the server started';

CREATE VIEW chat.stat_worker AS
	SELECT w.pid, w.state, w.started_at,
		EXTRACT(epoch FROM pg_catalog.clock_timestamp() - w.started_at)::double precision AS seconds,
		w.open_streams, w.stream_limit, w.requests, w.completed, w.failed,
		w.cancelled, w.retried, w.events, w.flushes, w.unnotified
	FROM chat.worker_status() AS w;
COMMENT ON VIEW chat.stat_worker IS
'workers of this database and what they have counted since they started';

CREATE VIEW chat.stat_queue AS
	SELECT k.kind, s.state, pg_catalog.count(j.id) AS depth,
		COALESCE(EXTRACT(epoch FROM pg_catalog.clock_timestamp()
			- pg_catalog.min(j.created_at)), 0)::double precision AS oldest_seconds
	FROM (VALUES ('completion'), ('tool'), ('title'), ('summary')) AS k (kind)
		CROSS JOIN (VALUES ('due'), ('later'), ('parked'), ('running')) AS s (state)
		LEFT JOIN (SELECT id, kind, created_at, CASE
				WHEN holder IS NOT NULL THEN 'running'
				WHEN parked THEN 'parked'
				WHEN run_at <= pg_catalog.now() THEN 'due'
				ELSE 'later' END AS state
			FROM chat.chat_job) AS j ON j.kind = k.kind AND j.state = s.state
	GROUP BY k.kind, s.state
	UNION ALL
	SELECT 'completion', 'behind', pg_catalog.count(t.id),
		COALESCE(EXTRACT(epoch FROM pg_catalog.clock_timestamp()
			- pg_catalog.min(t.created_at)), 0)::double precision
	FROM chat.chat_task AS t
	WHERE t.status = 'queued' AND NOT EXISTS (SELECT FROM chat.chat_job AS j
		WHERE j.session_id = t.session_id AND j.task_id = t.id);
COMMENT ON VIEW chat.stat_queue IS
'jobs by kind and state (due, later, parked until a tool call ends, running; behind another task of their session), how many and how old the oldest is';

--
-- Resume
--
-- Readers of event streams: they run as the extension's owner and check the
-- caller themselves, because what they read is spread over partitions, and
-- they hold no lock on any when they return.
--

CREATE FUNCTION chat.get_task_events(
	task_id uuid,
	after_seq bigint DEFAULT 0,
	max_rows integer DEFAULT NULL)
RETURNS TABLE (seq bigint, payload json, created_at timestamptz)
LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 100
AS 'MODULE_PATHNAME', 'chat_get_task_events';
COMMENT ON FUNCTION chat.get_task_events(uuid, bigint, integer) IS
'the events of a task after a sequence number, in order; when they are gone, the same stream rebuilt from the messages';

CREATE FUNCTION chat.wait_task_events(
	task_id uuid,
	after_seq bigint DEFAULT 0,
	timeout interval DEFAULT '30 s',
	max_rows integer DEFAULT NULL)
RETURNS TABLE (seq bigint, payload json, created_at timestamptz)
LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10
AS 'MODULE_PATHNAME', 'chat_wait_task_events';
COMMENT ON FUNCTION chat.wait_task_events(uuid, bigint, interval, integer) IS
'the events of a task after a sequence number, as soon as there is one; no rows at the timeout, or when the task has ended and all was read';

CREATE FUNCTION chat.task_snapshot(task_id uuid) RETURNS jsonb
LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_task_snapshot';
COMMENT ON FUNCTION chat.task_snapshot(uuid) IS
'the message of a task so far, as the AI SDK has it, and the sequence number of the last event in it';

CREATE FUNCTION chat.sse(
	task_id uuid,
	after_seq bigint DEFAULT 0,
	protocol integer DEFAULT 7,
	timeout interval DEFAULT '0')
RETURNS text
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_sse';
COMMENT ON FUNCTION chat.sse(uuid, bigint, integer, interval) IS
'the events of a task after a sequence number as server-sent events in the pure AI SDK protocol, with [DONE] at the end';

--
-- Usage
--
-- Of turns, which stand on their tasks, and of all else, by day of UTC.
--

CREATE VIEW chat.usage WITH (security_invoker = true) AS
	SELECT u.day, u.owner, u.user_id, u.server, u.model, u.kind,
		pg_catalog.sum(u.requests)::bigint AS requests,
		pg_catalog.sum(u.prompt_tokens)::bigint AS prompt_tokens,
		pg_catalog.sum(u.completion_tokens)::bigint AS completion_tokens,
		pg_catalog.sum(u.cached_tokens)::bigint AS cached_tokens,
		pg_catalog.sum(u.reasoning_tokens)::bigint AS reasoning_tokens,
		pg_catalog.bool_or(u.estimated) AS estimated,
		(pg_catalog.sum(u.prompt_tokens) * p.input
			+ pg_catalog.sum(u.completion_tokens) * p.output) / 1000000 AS cost
	FROM (
		SELECT (COALESCE(t.finished_at, t.started_at) AT TIME ZONE 'UTC')::date AS day,
			s.owner, s.user_id, t.server, t.model, 'completion' AS kind,
			t.steps AS requests, t.prompt_tokens, t.completion_tokens,
			COALESCE((t.usage ->> 'cached_tokens')::bigint, 0) AS cached_tokens,
			COALESCE((t.usage ->> 'reasoning_tokens')::bigint, 0) AS reasoning_tokens,
			COALESCE((t.usage ->> 'estimated')::boolean, false) AS estimated
		FROM chat.chat_task AS t
			JOIN chat.chat_session AS s ON s.id = t.session_id
		WHERE t.usage IS NOT NULL
		UNION ALL
		SELECT (u.created_at AT TIME ZONE 'UTC')::date, u.owner, u.user_id,
			u.server, u.model, u.kind, u.requests, u.prompt_tokens,
			u.completion_tokens, u.cached_tokens, u.reasoning_tokens, u.estimated
		FROM chat.chat_usage AS u) AS u
		LEFT JOIN LATERAL (
			SELECT pg_catalog.max(o.option_value::numeric)
					FILTER (WHERE o.option_name = 'input_price') AS input,
				pg_catalog.max(o.option_value::numeric)
					FILTER (WHERE o.option_name = 'output_price') AS output
			FROM pg_catalog.pg_foreign_server AS f,
				pg_catalog.pg_options_to_table(f.srvoptions) AS o
			WHERE f.srvname = u.server) AS p ON true
	GROUP BY u.day, u.owner, u.user_id, u.server, u.model, u.kind, p.input, p.output;
COMMENT ON VIEW chat.usage IS 'tokens by day, role, user, server, model and kind; with costs where the server says what they are';

--
-- Prompts
--
-- Templates of system prompts.  A version never changes; labels move from
-- one to another.
--

CREATE TABLE chat.chat_prompt (
	-- null: shared, and the administrator's
	owner regrole,
	name text NOT NULL CHECK (name <> ''),
	version integer NOT NULL CHECK (version > 0),
	labels text[] NOT NULL DEFAULT '{}',
	template text NOT NULL CHECK (template <> ''),
	-- those that the template may use beside the built-in ones
	variables text[] NOT NULL DEFAULT '{}',
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	CONSTRAINT chat_prompt_key UNIQUE NULLS NOT DISTINCT (name, owner, version)
);
COMMENT ON TABLE chat.chat_prompt IS 'templates of system prompts, in versions that never change';
COMMENT ON COLUMN chat.chat_prompt.owner IS 'database role that it belongs to; null: shared by all';
COMMENT ON COLUMN chat.chat_prompt.labels IS 'production marks the version in use, latest the newest; others as you like';
COMMENT ON COLUMN chat.chat_prompt.variables IS 'declared variables, filled from the members of the session''s metadata';
ALTER TABLE chat.chat_prompt ENABLE ROW LEVEL SECURITY;
ALTER TABLE chat.chat_prompt ALTER COLUMN template SET STATISTICS 0;
CREATE POLICY visible ON chat.chat_prompt FOR SELECT USING (
	owner IS NULL OR pg_catalog.pg_has_role(owner, 'USAGE'));

-- Prompts of the prompt server, as the worker has fetched them.
CREATE TABLE chat.chat_prompt_cache (
	server name NOT NULL,
	name text NOT NULL,
	label text NOT NULL,
	-- null: it could not be had yet
	template text,
	version integer,
	fetched_at timestamptz,
	tried_at timestamptz NOT NULL,
	error text,
	PRIMARY KEY (server, name, label)
);
COMMENT ON TABLE chat.chat_prompt_cache IS 'prompts as the server in chat.prompt_server had them last';
-- what has no policy shows nothing, whatever a DBA grants by mistake
ALTER TABLE chat.chat_prompt_cache ENABLE ROW LEVEL SECURITY;

CREATE FUNCTION chat.chat_langfuse_validator(options text[], catalog oid)
	RETURNS void
	LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'chat_langfuse_validator';
COMMENT ON FUNCTION chat.chat_langfuse_validator(text[], oid) IS
	'checks the options of servers and user mappings of wrapper chat_langfuse';
CREATE FOREIGN DATA WRAPPER chat_langfuse VALIDATOR chat.chat_langfuse_validator;
COMMENT ON FOREIGN DATA WRAPPER chat_langfuse IS
	'Langfuse servers that have prompts';

CREATE FUNCTION chat.set_prompt(
	name text,
	template text,
	labels text[] DEFAULT NULL,
	variables text[] DEFAULT NULL,
	shared boolean DEFAULT false,
	owner regrole DEFAULT NULL)
RETURNS chat.chat_prompt
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_set_prompt';
COMMENT ON FUNCTION chat.set_prompt IS 'stores a template as a new version, unless it is the newest already, and moves the labels to it; returns the row';

CREATE FUNCTION chat.label_prompt(
	name text,
	version integer,
	labels text[],
	shared boolean DEFAULT false,
	owner regrole DEFAULT NULL)
RETURNS chat.chat_prompt
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_label_prompt';
COMMENT ON FUNCTION chat.label_prompt IS 'moves labels to a version of a prompt; returns the row, or null if there is none';

CREATE FUNCTION chat.delete_prompt(
	name text,
	shared boolean DEFAULT false,
	owner regrole DEFAULT NULL)
RETURNS boolean
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_delete_prompt';
COMMENT ON FUNCTION chat.delete_prompt IS 'deletes all versions of a prompt; returns whether there were any';

CREATE FUNCTION chat.get_prompt(name text, label text DEFAULT NULL)
RETURNS chat.chat_prompt
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT p
	FROM chat.chat_prompt AS p
	WHERE p.name = get_prompt.name
		AND (p.owner IS NULL
			OR p.owner = pg_catalog.quote_ident(CURRENT_USER)::regrole)
		AND (get_prompt.label IS NULL OR get_prompt.label = ANY (p.labels))
	ORDER BY p.owner IS NULL, 'production' = ANY (p.labels) DESC, p.version DESC
	LIMIT 1;
END;
COMMENT ON FUNCTION chat.get_prompt IS 'the version of a prompt that has a label, or without one that is in use: the caller''s own, else the shared one';

CREATE FUNCTION chat.build_system_prompt(
	user_id text,
	session_id uuid DEFAULT NULL)
RETURNS text
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'chat_build_system_prompt';
COMMENT ON FUNCTION chat.build_system_prompt IS 'the system prompt that the next turn would send';

--
-- User context
--
-- What the application knows about its users, for the system prompt.
--

CREATE TABLE chat.chat_user_context (
	owner regrole NOT NULL,
	user_id text NOT NULL CHECK (user_id <> ''),
	context jsonb NOT NULL
		CHECK (pg_catalog.jsonb_typeof(context) = 'object'),
	updated_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	PRIMARY KEY (owner, user_id)
);
COMMENT ON TABLE chat.chat_user_context IS 'what is known about users of the application';
COMMENT ON COLUMN chat.chat_user_context.owner IS 'database role whose sessions use it';
ALTER TABLE chat.chat_user_context ENABLE ROW LEVEL SECURITY;
CREATE POLICY visible ON chat.chat_user_context FOR SELECT USING (
	pg_catalog.pg_has_role(owner, 'USAGE')
	AND (COALESCE(pg_catalog.current_setting('chat.user_id', true), '') = ''
		OR user_id = pg_catalog.current_setting('chat.user_id', true)));

CREATE FUNCTION chat.set_user_context(
	user_id text,
	context jsonb,
	merge boolean DEFAULT true,
	owner regrole DEFAULT NULL)
RETURNS jsonb
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_set_user_context';
COMMENT ON FUNCTION chat.set_user_context IS 'stores what is known about a user, into what was known or instead of it; returns what is known then';

CREATE FUNCTION chat.get_user_context(user_id text, owner regrole DEFAULT NULL)
RETURNS jsonb
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT c.context
	FROM chat.chat_user_context AS c
	WHERE c.user_id = get_user_context.user_id
		AND c.owner = COALESCE(get_user_context.owner,
			pg_catalog.quote_ident(CURRENT_USER)::regrole);
END;
COMMENT ON FUNCTION chat.get_user_context IS 'what is known about a user, or null';

CREATE FUNCTION chat.delete_user_context(user_id text, owner regrole DEFAULT NULL)
RETURNS boolean
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_delete_user_context';
COMMENT ON FUNCTION chat.delete_user_context IS 'forgets what is known about a user; returns whether anything was';

CREATE FUNCTION chat.format_user_context(context jsonb)
RETURNS text
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE
AS 'MODULE_PATHNAME', 'chat_format_user_context';
COMMENT ON FUNCTION chat.format_user_context IS 'a user''s context as readable text, lists as bullets, members in the order of their names';

--
-- Branches
--
-- Messages that are replaced stay, marked with the sequence of what took
-- their place: a branch can be told, read and forked as it was.
--

CREATE FUNCTION chat.regenerate(
	session_id uuid,
	sequence bigint DEFAULT NULL,
	server name DEFAULT NULL,
	options jsonb DEFAULT NULL)
RETURNS uuid
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_regenerate';
COMMENT ON FUNCTION chat.regenerate IS 'answers again: sets the last answer, or the one that a message belongs to, and all that came after it aside and queues another; returns the task';

CREATE FUNCTION chat.edit_message(
	session_id uuid,
	sequence bigint,
	content text,
	server name DEFAULT NULL,
	options jsonb DEFAULT NULL)
RETURNS uuid
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'chat_edit_message';
COMMENT ON FUNCTION chat.edit_message IS 'sets a user''s message and all that came after it aside, appends it with another content and queues the answer; returns the task';

CREATE FUNCTION chat.fork_chat_session(
	session_id uuid,
	up_to_sequence bigint DEFAULT NULL)
RETURNS chat.chat_session
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_fork_session';
COMMENT ON FUNCTION chat.fork_chat_session IS 'copies a session, as it was when a message was its newest; returns the row of the copy';

CREATE FUNCTION chat.export_chat_session(session_id uuid)
RETURNS jsonb
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT (chat.get_chat_session(export_chat_session.session_id, all_branches => true)
		OPERATOR(pg_catalog.-) '{credentials,channel,usage,queued}'::text[])
		OPERATOR(pg_catalog.||) '{"format": "chat/1"}'
		OPERATOR(pg_catalog.||) (SELECT CASE WHEN s.summary IS NULL THEN '{}'
			ELSE pg_catalog.jsonb_build_object('summary', s.summary,
				'summary_sequence', s.summary_sequence) END
			FROM chat.chat_session AS s
			WHERE s.id = export_chat_session.session_id);
END;
COMMENT ON FUNCTION chat.export_chat_session IS 'a session with all of its branches as a document, without credentials';

CREATE FUNCTION chat.import_chat_session(
	document jsonb,
	session_id uuid DEFAULT NULL,
	owner regrole DEFAULT NULL)
RETURNS chat.chat_session
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'chat_session_import';
COMMENT ON FUNCTION chat.import_chat_session IS 'creates a session from its exported document, under its own id or another; returns the row';

CREATE FUNCTION chat.to_ui_messages(session_id uuid)
RETURNS jsonb
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'chat_to_ui_messages';
COMMENT ON FUNCTION chat.to_ui_messages IS 'the messages of a session as the AI SDK''s UIMessage array';

-- A C function, because no index serves a full-text search that runs under
-- row-level security: its operator may not see rows before the policy.
CREATE FUNCTION chat.search_messages(
	query text,
	user_id text DEFAULT NULL,
	max_rows integer DEFAULT 20,
	config regconfig DEFAULT 'pg_catalog.simple')
RETURNS TABLE (session_id uuid, sequence bigint, role text, excerpt text,
	rank real, created_at timestamptz)
LANGUAGE c VOLATILE ROWS 20 AS 'MODULE_PATHNAME', 'chat_search_messages';
COMMENT ON FUNCTION chat.search_messages IS 'finds messages of users and assistants by a web search query, best first';

CREATE FUNCTION chat.create_search_index(config regconfig DEFAULT 'pg_catalog.simple')
RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
	index_name text := 'chat_message_search_'
		|| (SELECT c.cfgname FROM pg_ts_config AS c WHERE c.oid = config);
BEGIN
	EXECUTE format('CREATE INDEX IF NOT EXISTS %I ON chat.chat_message
		USING gin (to_tsvector(%L::regconfig, "left"(content, 100000)))
		WHERE active AND role IN (''user'', ''assistant'')',
		index_name, config);
	RETURN index_name;
END
$$;
COMMENT ON FUNCTION chat.create_search_index IS 'creates the index that serves search_messages(); messages cannot be written meanwhile';

--
-- Owners
--

-- What a role owned goes to another one; also when the role is gone, by its
-- OID.  Names that the new owner has already stay with the old one.
CREATE FUNCTION chat.reassign_owner(old_owner regrole, new_owner regrole)
RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
	moved bigint;
	n bigint;
BEGIN
	IF NOT EXISTS (SELECT FROM pg_roles WHERE oid = new_owner) THEN
		RAISE EXCEPTION 'role with OID % does not exist', COALESCE(new_owner::oid, 0)
			USING ERRCODE = 'undefined_object';
	END IF;
	UPDATE chat.chat_session SET owner = new_owner WHERE owner = old_owner;
	GET DIAGNOSTICS moved = ROW_COUNT;
	UPDATE chat.chat_job SET owner = new_owner WHERE owner = old_owner::oid;
	UPDATE chat.chat_tool AS t SET owner = new_owner
		WHERE owner = old_owner AND NOT EXISTS (SELECT FROM chat.chat_tool AS o
			WHERE o.owner = new_owner AND o.name = t.name);
	GET DIAGNOSTICS n = ROW_COUNT;
	moved := moved + n;
	UPDATE chat.chat_prompt AS p SET owner = new_owner
		WHERE owner = old_owner AND NOT EXISTS (SELECT FROM chat.chat_prompt AS o
			WHERE o.owner = new_owner AND o.name = p.name);
	GET DIAGNOSTICS n = ROW_COUNT;
	moved := moved + n;
	UPDATE chat.chat_user_context AS u SET owner = new_owner
		WHERE owner = old_owner AND NOT EXISTS (
			SELECT FROM chat.chat_user_context AS o
			WHERE o.owner = new_owner AND o.user_id = u.user_id);
	GET DIAGNOSTICS n = ROW_COUNT;
	RETURN moved + n;
END
$$;
COMMENT ON FUNCTION chat.reassign_owner(regrole, regrole) IS
'gives a role''s sessions, tools, prompts and user contexts to another role; returns how many';

--
-- Access
--
-- The last section, because grant_usage() and the REVOKE cover all that
-- stands above.
--

-- What a role needs, as fragments of GRANT: the tables whose rows a policy
-- chooses, the views, and all routines but those of the administrator.
CREATE FUNCTION chat.usage_objects() RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
	WITH administration AS (
		SELECT ARRAY['grant_usage', 'revoke_usage', 'usage_objects',
			'create_search_index', 'server_statistics',
			'grant_callback', 'reassign_owner', 'add_usage',
			'is_message_role', 'is_task_status', 'pause', 'resume', 'drain',
			'chat_llm_validator', 'chat_tool_validator',
			'chat_langfuse_validator']::name[] AS names),
	member AS (
		SELECT d.classid, d.objid
		FROM pg_depend AS d
			JOIN pg_extension AS e ON e.oid = d.refobjid
		WHERE d.refclassid = 'pg_extension'::regclass
			AND d.deptype = 'e' AND e.extname = 'chat')
	SELECT 'USAGE ON SCHEMA chat'
	UNION ALL
	SELECT format('SELECT ON TABLE %s', c.oid::regclass)
	FROM member AS m
		JOIN pg_class AS c ON c.oid = m.objid
	WHERE m.classid = 'pg_class'::regclass
		AND (c.relkind = 'v' AND c.relname NOT LIKE 'stat\_%'
			OR c.relkind IN ('r', 'p') AND c.relrowsecurity
				AND EXISTS (SELECT FROM pg_policy AS p WHERE p.polrelid = c.oid))
	UNION ALL
	SELECT format('EXECUTE ON ROUTINE %s', p.oid::regprocedure)
	FROM member AS m
		JOIN pg_proc AS p ON p.oid = m.objid
	WHERE m.classid = 'pg_proc'::regclass
		AND p.prorettype <> 'trigger'::regtype
		AND p.proname <> ALL ((SELECT a.names FROM administration AS a)::name[])
$$;
COMMENT ON FUNCTION chat.usage_objects() IS 'what grant_usage() grants, as fragments of GRANT';

CREATE FUNCTION chat.grant_usage(role regrole) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
	what text;
BEGIN
	IF role IS NULL OR NOT EXISTS (SELECT FROM pg_roles WHERE oid = role) THEN
		RAISE EXCEPTION 'role with OID % does not exist', COALESCE(role::oid, 0)
			USING ERRCODE = 'undefined_object';
	END IF;
	FOR what IN SELECT * FROM chat.usage_objects() LOOP
		EXECUTE format('GRANT %s TO %s', what, role);
	END LOOP;
END
$$;
COMMENT ON FUNCTION chat.grant_usage(regrole) IS 'lets a role use chat; again after an update of the extension';

CREATE FUNCTION chat.revoke_usage(role regrole) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
	what text;
BEGIN
	IF role IS NULL OR NOT EXISTS (SELECT FROM pg_roles WHERE oid = role) THEN
		RAISE EXCEPTION 'role with OID % does not exist', COALESCE(role::oid, 0)
			USING ERRCODE = 'undefined_object';
	END IF;
	FOR what IN SELECT * FROM chat.usage_objects() LOOP
		EXECUTE format('REVOKE %s FROM %s', what, role);
	END LOOP;
END
$$;
COMMENT ON FUNCTION chat.revoke_usage(regrole) IS 'takes back what grant_usage() granted';

CREATE FUNCTION chat.grant_callback(role regrole) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
	IF role IS NULL OR NOT EXISTS (SELECT FROM pg_roles WHERE oid = role) THEN
		RAISE EXCEPTION 'role with OID % does not exist', COALESCE(role::oid, 0)
			USING ERRCODE = 'undefined_object';
	END IF;
	EXECUTE format('GRANT USAGE ON SCHEMA chat TO %s', role);
	EXECUTE format('GRANT EXECUTE ON FUNCTION chat.complete_operation, chat.operation_progress TO %s',
		role);
END
$$;
COMMENT ON FUNCTION chat.grant_callback(regrole) IS 'lets a role end the operations whose ids it was given, and nothing else';

-- Nothing is granted to anybody, also where default privileges say otherwise.
DO $$
DECLARE
	what text;
BEGIN
	FOR what IN
		SELECT pg_catalog.format('REVOKE ALL ON %s FROM %s', o.name,
			CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END)
		FROM (
			SELECT 'SCHEMA chat', n.nspacl, n.nspowner
			FROM pg_catalog.pg_namespace AS n
			WHERE n.nspname = 'chat'
			UNION ALL
			SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END
				|| c.oid::regclass, c.relacl, c.relowner
			FROM pg_catalog.pg_class AS c
			WHERE c.relnamespace = 'chat'::regnamespace
				AND c.relkind IN ('r', 'p', 'v', 'S')
			UNION ALL
			SELECT 'ROUTINE ' || p.oid::regprocedure,
				COALESCE(p.proacl, pg_catalog.acldefault('f', p.proowner)), p.proowner
			FROM pg_catalog.pg_proc AS p
			WHERE p.pronamespace = 'chat'::regnamespace) AS o(name, acl, owner),
			LATERAL pg_catalog.aclexplode(o.acl) AS a
		WHERE a.grantee <> o.owner
	LOOP
		EXECUTE what;
	END LOOP;
END
$$;

-- What there is to count is the business of monitoring roles.
GRANT USAGE ON SCHEMA chat TO pg_monitor;
GRANT SELECT ON chat.stat_worker, chat.stat_queue, chat.stat_server TO pg_monitor;
GRANT EXECUTE ON FUNCTION chat.worker_status, chat.server_statistics TO pg_monitor;

-- A dump carries the conversations, not the queue and the event streams: a
-- restored database calls no LLM again.
SELECT pg_catalog.pg_extension_config_dump('chat.chat_session', '');
SELECT pg_catalog.pg_extension_config_dump('chat.chat_message', '');
SELECT pg_catalog.pg_extension_config_dump('chat.chat_task', '');
SELECT pg_catalog.pg_extension_config_dump('chat.chat_prompt', '');
SELECT pg_catalog.pg_extension_config_dump('chat.chat_user_context', '');
SELECT pg_catalog.pg_extension_config_dump('chat.chat_task_place_seq', '');
SELECT pg_catalog.pg_extension_config_dump('chat.chat_tool', '');
SELECT pg_catalog.pg_extension_config_dump('chat.chat_tool_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('chat.chat_tool_call', '');
SELECT pg_catalog.pg_extension_config_dump('chat.chat_usage', '');
SELECT pg_catalog.pg_extension_config_dump('chat.chat_usage_id_seq', '');
