-- ends of tool calls that come from outside
SET client_min_messages = warning;
CREATE ROLE regress_op_ann;
CREATE ROLE regress_op_eve;
CREATE ROLE regress_op_service;
SELECT chat.grant_usage('regress_op_ann'), chat.grant_usage('regress_op_eve');
-- for a service: nothing but what it needs
SELECT chat.grant_callback('regress_op_service');
SELECT p.oid::regprocedure AS granted
FROM pg_proc AS p, aclexplode(p.proacl) AS a
WHERE p.pronamespace = 'chat'::regnamespace AND a.grantee = 'regress_op_service'::regrole
ORDER BY 1;
SELECT count(*) AS tables_granted FROM pg_class AS c, aclexplode(c.relacl) AS a
WHERE c.relnamespace = 'chat'::regnamespace AND a.grantee = 'regress_op_service'::regrole;

\set s1 '''00000000-0000-4000-8000-000000000001'''
\set none '''00000000-0000-4000-8000-00000000dead'''

-- runs a statement, undoes it, and says how it went
CREATE FUNCTION op_try(statement text, OUT state text, OUT message text, OUT more text)
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
-- the id of an operation, of a task
CREATE FUNCTION op(n integer) RETURNS uuid LANGUAGE sql AS
$$ SELECT format('00000000-0000-4000-8000-0000000001%s', to_char($1, 'FM00'))::uuid $$;
CREATE FUNCTION task(n integer) RETURNS uuid LANGUAGE sql AS
$$ SELECT format('00000000-0000-4000-8000-0000000000a%s', $1)::uuid $$;
CREATE VIEW calls AS
	SELECT c.position AS n, c.status, c.result, c.reported, c.ended_at IS NOT NULL AS ended,
		c.late - 'received_at' AS late
	FROM chat.chat_tool_call AS c;

-- All of it in one transaction, which no worker ever sees.  A session of ann
-- with one task that waits for its tools (1 to 12) and one that has ended
-- (20 to 24); the job of the first is parked.
BEGIN;
INSERT INTO chat.chat_session (id, owner) VALUES (:s1, 'regress_op_ann');
INSERT INTO chat.chat_task (id, session_id, status, server, finished_at)
VALUES (task(1), :s1, 'running', 'x', NULL), (task(2), :s1, 'failed', 'x', now());
INSERT INTO chat.chat_job (kind, session_id, task_id, owner, database, run_at, parked)
SELECT 'completion', :s1, task(1), 'regress_op_ann'::regrole, oid, 'infinity', true
FROM pg_database WHERE datname = current_database();
INSERT INTO chat.chat_tool_call (operation_id, session_id, task_id, message_id,
	position, sequence, step, call_id, name, kind, arguments, status, result,
	long_running, timeout, ended_at)
SELECT op(n), :s1, task(CASE WHEN n < 20 THEN 1 ELSE 2 END), op(0), n, n, 1,
	COALESCE(id, 'call_' || n), 'tool' || n, kind, '{}', status,
	CASE WHEN result IS NULL THEN NULL ELSE result END, long, timeout::interval,
	CASE WHEN result IS NULL THEN NULL ELSE now() END
FROM (VALUES
	(1, 'http', 'waiting', NULL, true, NULL, NULL),
	(2, 'http', 'waiting', NULL, true, NULL, NULL),
	(3, 'sql', 'pending', NULL, false, NULL, NULL),
	(4, 'http', 'running', NULL, false, NULL, NULL),
	(5, 'http', 'failed', '{"type": "error", "code": "timeout"}', true, NULL, NULL),
	(6, 'sql', 'completed', 'itself', false, NULL, NULL),
	(7, 'client', 'waiting', NULL, false, NULL, 'same'),
	(8, 'client', 'waiting', NULL, false, NULL, 'same'),
	(9, 'sql', 'approval', NULL, false, NULL, NULL),
	(10, 'client', 'approval', NULL, false, '1 hour', NULL),
	(11, 'http', 'approval', NULL, true, NULL, NULL),
	(12, 'sql', 'approval', NULL, false, NULL, NULL),
	(20, 'http', 'cancelled', '{"type": "error", "code": "cancelled"}', true, NULL, NULL),
	(21, 'http', 'waiting', NULL, true, NULL, NULL),
	(22, 'http', 'completed', 'x', true, NULL, NULL),
	(23, 'client', 'waiting', NULL, false, NULL, NULL),
	(24, 'sql', 'approval', NULL, false, NULL, NULL)
) AS v(n, kind, status, result, long, timeout, id);
-- true if the task was made due since the last look
CREATE FUNCTION rung() RETURNS boolean LANGUAGE sql AS $$
	WITH was AS (SELECT run_at = '-infinity' AS due FROM chat.chat_job WHERE kind = 'completion'),
		now AS (UPDATE chat.chat_job SET run_at = 'infinity' WHERE kind = 'completion')
	SELECT due FROM was
$$;

--
-- complete_operation
--
SET LOCAL ROLE regress_op_service;
SELECT current_user, (SELECT s.state FROM op_try('SELECT 1 FROM chat.chat_tool_call') AS s) AS sees_calls;
SELECT chat.complete_operation(op(1), '{"temperature": 21.50}');
RESET ROLE;
SELECT rung(), * FROM calls WHERE n = 1;
SET LOCAL client_min_messages = notice;
SELECT chat.complete_operation(op(1), '"other"', success => false, error => 'no');
SET LOCAL client_min_messages = warning;
SELECT rung(), * FROM calls WHERE n = 1;
-- a failure, told to the model
SELECT chat.complete_operation(op(2), success => false, error => 'the "printer" is on fire');
SELECT chat.complete_operation(op(2), '"all is well"');
SELECT rung(), * FROM calls WHERE n = 2;
-- before a 202 was recorded: in any state that is no end
SELECT chat.complete_operation(op(3), '"a \"text\"\nas it is"'), chat.complete_operation(op(4), success => false, result => '{"page": 7}');
SELECT rung();
SELECT * FROM calls WHERE n IN (3, 4) ORDER BY n;
SAVEPOINT results;
SELECT r, chat.complete_operation(op(n), r) FROM (VALUES (9, '[1, null]'::jsonb), (10, NULL), (11, 'null'), (12, '1e3')) AS v(n, r);
SELECT n, result FROM calls WHERE n BETWEEN 9 AND 12 ORDER BY n;
ROLLBACK TO results;
-- too late: the call was timed out, cancelled, or its task has ended
SELECT n, chat.complete_operation(op(n), '{"n": 1}') AS first,
	chat.complete_operation(op(n), '{"n": 2}', success => false) AS second
FROM unnest(ARRAY[5, 6, 20, 21, 22]) AS n;
SELECT rung();
SELECT n, status, reported, ended, late FROM calls WHERE n IN (5, 6, 20, 21, 22) ORDER BY n;
SELECT c.late ? 'received_at' AS says_when FROM chat.chat_tool_call AS c WHERE c.operation_id = op(5);
-- what cannot be meant
SELECT * FROM op_try(format('SELECT chat.complete_operation(%L)', :none));
SELECT * FROM op_try('SELECT chat.complete_operation(NULL)');
SELECT * FROM op_try('SELECT chat.complete_operation(op(1), success => NULL)');
SELECT * FROM op_try('SELECT chat.complete_operation(op(9), error => ''x'')');

--
-- operation_progress
--
SET LOCAL ROLE regress_op_service;
SELECT n, chat.operation_progress(op(n), jsonb_build_object('done', n)) AS goes_on
FROM unnest(ARRAY[7, 7, 1, 20, 21]) AS n;
SELECT chat.operation_progress(:none, '{}') AS unknown, chat.operation_progress(NULL, '{}') AS null,
	chat.operation_progress(op(7), NULL) AS only_asks;
RESET ROLE;
SELECT rung();
SELECT operation_id = op(7) AS of_7, progress FROM chat.chat_tool_progress ORDER BY id;

--
-- submit_tool_output
--
-- a stranger's session is none
SET LOCAL ROLE regress_op_eve;
SELECT chat.submit_tool_output(:s1, 'same', '1') AS submit, chat.approve_tool_call(:s1, 'call_9') AS approve,
	chat.deny_tool_call(:s1, 'call_9') AS deny, chat.session_status(:s1) AS status;
SET LOCAL ROLE regress_op_ann;
SET LOCAL chat.user_id = 'somebody else';
SELECT chat.submit_tool_output(:s1, 'same', '1') AS submit;
RESET chat.user_id;
RESET ROLE;
SELECT rung();
SET LOCAL ROLE regress_op_ann;
-- the newest call of an id that was used twice, then the older one
SELECT chat.submit_tool_output(:s1, 'same', '{"chosen": "b"}');
RESET ROLE;
SELECT rung();
SELECT n, status, result, ended FROM calls WHERE n IN (7, 8) ORDER BY n;
SET LOCAL ROLE regress_op_ann;
SELECT chat.submit_tool_output(:s1, 'same', error => 'the user has left');
SELECT chat.submit_tool_output(:s1, 'same') AS none_left, chat.submit_tool_output(:s1, 'call_1', '1') AS not_a_client_tool,
	chat.submit_tool_output(:s1, 'call_10', '1') AS not_approved, chat.submit_tool_output(:s1, 'call_23', '1') AS task_has_ended,
	chat.submit_tool_output(:none, 'same') AS no_session, chat.submit_tool_output(NULL, 'same') AS null, chat.submit_tool_output(:s1, NULL) AS null;
RESET ROLE;
SELECT n, status, result, ended FROM calls WHERE n IN (7, 8, 10, 23) ORDER BY n;
SELECT rung();

--
-- approve_tool_call, deny_tool_call
--
SET LOCAL ROLE regress_op_ann;
SELECT chat.session_status(:s1);
SELECT n, chat.approve_tool_call(:s1, 'call_' || n) AS first, chat.approve_tool_call(:s1, 'call_' || n) AS again
FROM generate_series(9, 11) AS n;
SELECT chat.deny_tool_call(:s1, 'call_12', 'too "dear"') AS deny, chat.deny_tool_call(:s1, 'call_12') AS again,
	chat.approve_tool_call(:s1, 'call_12') AS approve, chat.deny_tool_call(:s1, 'call_9') AS approved,
	chat.approve_tool_call(:s1, 'call_24') AS task_has_ended, chat.deny_tool_call(:s1, 'call_24') AS task_has_ended,
	chat.approve_tool_call(NULL, 'x') AS null, chat.deny_tool_call(:s1, NULL) AS null;
RESET ROLE;
SELECT rung();
SELECT c.position AS n, c.kind, c.status, c.result, c.deadline - now() AS time
FROM chat.chat_tool_call AS c WHERE c.position BETWEEN 9 AND 12 ORDER BY 1;
SELECT j.kind, j.operation_id = op(9) AS of_9, j.operation_id = op(11) AS of_11, j.owner::regrole,
	j.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AS here, j.parked
FROM chat.chat_job AS j WHERE j.kind = 'tool' ORDER BY j.id;
SAVEPOINT denied;
UPDATE chat.chat_tool_call SET status = 'approval', result = NULL, ended_at = NULL, reported = false
WHERE operation_id = op(12);
SELECT chat.deny_tool_call(:s1, 'call_12');
SELECT result FROM calls WHERE n = 12;
ROLLBACK TO denied;

--
-- session_status
--
SET LOCAL ROLE regress_op_ann;
SELECT chat.session_status(:s1), chat.session_status(:none) AS none, chat.session_status(NULL) AS null;
RESET ROLE;
SAVEPOINT status;
-- the calls have ended: the model goes on
UPDATE chat.chat_tool_call SET status = 'completed', result = '', ended_at = now() WHERE task_id = task(1);
SELECT chat.session_status(:s1) AS goes_on;
ROLLBACK TO status;
-- a task that waits behind the one with the tools does not show
INSERT INTO chat.chat_task (id, session_id, status, server) VALUES (task(3), :s1, 'queued', 'x');
SELECT chat.session_status(:s1) AS one_behind;
-- but goes before one that has left the session to others
UPDATE chat.chat_task SET status = 'waiting', detached = true WHERE id = task(1);
SELECT chat.session_status(:s1) AS detached;
UPDATE chat.chat_task SET status = 'completed', finished_at = now() WHERE id = task(3);
SELECT chat.session_status(:s1) AS only_operations;
UPDATE chat.chat_task SET detached = false WHERE id = task(1);
SELECT chat.session_status(:s1) AS waits;
UPDATE chat.chat_task SET status = 'cancelled', finished_at = now() WHERE id = task(1);
SELECT chat.session_status(:s1) AS ended;
DELETE FROM chat.chat_task;
SELECT chat.session_status(:s1) AS no_task;
ROLLBACK TO status;

-- all of it goes with the session
SELECT chat.delete_chat_session(:s1);
SELECT (SELECT count(*) FROM chat.chat_tool_call) AS calls, (SELECT count(*) FROM chat.chat_tool_progress) AS progress,
	(SELECT count(*) FROM chat.chat_job) AS jobs;
SELECT state FROM op_try('SELECT chat.complete_operation(op(1))');
ROLLBACK;

DROP VIEW calls;
DROP FUNCTION op_try, op, task;
DROP OWNED BY regress_op_ann, regress_op_eve, regress_op_service;
DROP ROLE regress_op_ann, regress_op_eve, regress_op_service;
