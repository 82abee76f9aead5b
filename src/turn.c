/*
 * turn.c
 *		The tool phase of a task.
 *
 * Owns what the streaming worker writes to chat_tool_call.  Tool workers and
 * callbacks write a call's end there and make the parked job due; only a turn
 * writes messages and events (so they come in one order), under the session's
 * lock and with the job held for the length of its transaction.
 *
 * A call's life: approval -> pending -> running -> an end; or waiting -> an
 * end, when the end comes from elsewhere.  An end is written once: every
 * statement that writes one asks for ended_at IS NULL.
 *
 * A task all of whose open calls are long operations is detached: it leaves
 * the session to other tasks, and takes it back when it is free.  Whoever
 * leaves a session, by its end or detached, makes those due that wait for it.
 */
#include "postgres.h"

#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/guc.h"

#include "db.h"
#include "jsonbuf.h"
#include "queue.h"
#include "shmem.h"
#include "turn.h"

#define TURN_FAILED "the results of the tools could not be handled"

static int	max_steps = 10;
static int	max_tool_calls = 32;
static int	max_tool_output_length = 100000;
static int	operation_timeout = 600000;

/*
 * $1 holder, $2 database, $3 most calls of a step, $4 time of an operation in
 * ms; then arrays: $5 job, $6 epoch, $7 session, $8 task, $9 answer id,
 * $10 content, $11 refusal, $12 tool calls, $13 metadata, $14 prompt tokens,
 * $15 completion tokens, $16 usage, $17 calls, $18 context tokens,
 * $19 compaction
 */
CHAT_STMT(park_tasks,
		  "WITH e AS MATERIALIZED (SELECT * FROM ROWS FROM ("
		  "  unnest($5), unnest($6), unnest($7), unnest($8), unnest($9),"
		  "  unnest($10), unnest($11), unnest($12), unnest($13),"
		  "  unnest($14), unnest($15), unnest($16), unnest($17),"
		  "  unnest($18), unnest($19))"
		  "  AS u (job, epoch, session, task, answer, content, refusal,"
		  "  tool_calls, metadata, prompt, completion, usage, calls,"
		  "  context, compaction)" CHAT_FEW("$5")
		  "), ok AS MATERIALIZED ("
		  " SELECT e.*, j.spent, s.next_sequence, s.owner,"
		  "  t.steps + 1 AS step,"
		  "  (s.settings || t.options) -> 'tools' AS allowed"
		  /* a probe for each, however many jobs there are: see queue.c */
		  " FROM e CROSS JOIN LATERAL (SELECT o.spent FROM chat.chat_job AS o"
		  "  WHERE o.id = e.job AND o.epoch = e.epoch"
		  "   AND o." CHAT_HELD_BY("$1") " OFFSET 0) AS j"
		  " JOIN chat.chat_session AS s ON s.id = e.session"
		  " JOIN chat.chat_task AS t ON t.id = e.task"
		  "), message AS ("
		  " INSERT INTO chat.chat_message (session_id, sequence, id, role,"
		  "  content, refusal, tool_calls, task_id, metadata)"
		  " SELECT session, next_sequence, answer, 'assistant', content,"
		  "  refusal, tool_calls::jsonb, task, metadata::jsonb FROM ok"
		  "), asked AS MATERIALIZED ("
		  " SELECT gen_random_uuid() AS operation, ok.session, ok.task,"
		  "  ok.owner, ok.answer, ok.step, c.place::int,"
		  "  ok.next_sequence + c.place AS sequence,"
		  "  c.item->>'id' AS call_id, c.item->>'name' AS name,"
		  "  c.item->>'arguments' AS arguments, c.item->'input' AS input,"
		  "  k.id AS tool, k.kind, k.timeout, k.approval,"
		  "  COALESCE(k.long_running, false) AS long_running,"
		  "  COALESCE(k.idempotent, false) AS idempotent,"
		  /* the same operation goes on already: it is not started twice */
		  "  CASE WHEN k.id IS NOT NULL THEN"
		  "   (SELECT o.operation_id FROM chat.chat_tool_call AS o"
		  "   WHERE o.task_id = ANY (ARRAY("
		  CHAT_OPEN_TASK("ok.session", "b.id") "))"
		  "    AND o.ended_at IS NULL AND o.long_running"
		  "    AND o.tool_id = k.id AND o.input = c.item->'input'"
		  "   LIMIT 1) END AS earlier,"
		  "  CASE WHEN c.item->>'error' IS NOT NULL THEN c.item->>'error'"
		  "   WHEN jsonb_array_length(ok.calls::jsonb) > $3"
		  "   THEN 'the step has more than ' || $3 || ' calls'"
		  "   WHEN k.id IS NULL THEN 'there is no such tool'"
		  "   ELSE (SELECT 'the required property \"' || r || '\" is missing'"
		  "    FROM jsonb_array_elements_text(CASE jsonb_typeof("
		  "     k.parameters->'required') WHEN 'array'"
		  "     THEN k.parameters->'required' ELSE '[]' END) AS r"
		  "    WHERE NOT (c.item->'input') ? r LIMIT 1) END AS problem"
		  " FROM ok CROSS JOIN LATERAL jsonb_array_elements(ok.calls::jsonb)"
		  "  WITH ORDINALITY AS c (item, place)"
		  " LEFT JOIN LATERAL (SELECT * FROM ("
		  "   SELECT * FROM chat.chat_tool AS own"
		  "    WHERE own.owner = ok.owner AND own.name = c.item->>'name'"
		  "   UNION ALL SELECT * FROM chat.chat_tool AS shared"
		  "    WHERE shared.owner IS NULL"
		  "     AND shared.name = c.item->>'name') AS t"
		  "  WHERE t.enabled AND (ok.allowed IS NULL OR ok.allowed ? t.name)"
		  "  ORDER BY t.owner NULLS LAST LIMIT 1) AS k ON true"
		  "), judged AS MATERIALIZED ("
		  " SELECT a.*, CASE WHEN problem IS NOT NULL THEN 'failed'"
		  "  WHEN approval = 'deny' THEN 'denied'"
		  "  WHEN twin IS NOT NULL THEN 'completed'"
		  "  WHEN approval = 'ask' THEN 'approval'"
		  "  WHEN kind = 'client' THEN 'waiting' ELSE 'pending' END AS status,"
		  "  CASE WHEN problem IS NOT NULL THEN 'failed: ' || problem"
		  "   WHEN approval = 'deny' THEN 'denied: it is not allowed'"
		  "   WHEN twin IS NOT NULL THEN 'goes on' END"
		  "  AS trouble"
		  /* nor twice in this step */
		  " FROM (SELECT b.*, COALESCE(b.earlier, CASE WHEN b.long_running"
		  "   AND b.operation <> b.first THEN b.first END) AS twin"
		  "  FROM (SELECT o.*, first_value(o.operation) OVER (PARTITION BY"
		  "    o.session, o.tool, o.input ORDER BY o.place) AS first"
		  "   FROM asked AS o) AS b) AS a"
		  "), call AS ("
		  " INSERT INTO chat.chat_tool_call (operation_id, session_id,"
		  "  task_id, message_id, position, sequence, step, call_id, name,"
		  "  kind, tool_id, arguments, input, timeout, long_running,"
		  "  idempotent, status, result, deadline, ended_at)"
		  " SELECT operation, session, task, answer, place, sequence, step,"
		  "  call_id, name,"
		  "  CASE WHEN problem IS NULL THEN kind ELSE 'none' END, tool,"
		  "  arguments, input, timeout, long_running, idempotent, status,"
		  "  CASE status WHEN 'completed' THEN json_build_object("
		  "   'type', 'operation_in_progress', 'operation_id', twin,"
		  "   'tool_name', name, 'message', 'The same operation was started"
		  " before and goes on; its result will follow.')"
		  "  ELSE json_build_object('type', 'error', 'message',"
		  "   'Tool ' || name || ' ' || trouble,"
		  "   'code', CASE status WHEN 'denied' THEN 'denied'"
		  "   ELSE 'invalid_input' END) END::text,"
		  "  NULL, now() FROM judged WHERE trouble IS NOT NULL"
		  " UNION ALL"
		  " SELECT operation, session, task, answer, place, sequence, step,"
		  "  call_id, name, kind, tool, arguments, input, timeout,"
		  "  long_running, idempotent, status, NULL,"
		  /* the tool's own time is not that of somebody who decides */
		  "  CASE WHEN status = 'approval' THEN now() + $4 * '1 ms'::interval"
		  "   WHEN status <> 'pending' OR long_running"
		  "   THEN now() + COALESCE(timeout, $4 * '1 ms'::interval) END,"
		  "  NULL FROM judged WHERE trouble IS NULL"
		  "), tool_message AS ("
		  " INSERT INTO chat.chat_message (session_id, sequence, role,"
		  "  content, tool_call_id, name, task_id, metadata)"
		  " SELECT session, sequence, 'tool', '', call_id, name, task,"
		  "  jsonb_build_object('operation_id', operation, 'pending', true)"
		  " FROM judged"
		  "), tool_job AS ("
		  " INSERT INTO chat.chat_job (kind, session_id, task_id, owner,"
		  "  database, operation_id, tool_kind)"
		  " SELECT 'tool', session, task, owner, $2, operation, kind"
		  " FROM judged WHERE status = 'pending'"
		  "), session AS ("
		  " UPDATE chat.chat_session AS s"
		  " SET next_sequence = s.next_sequence + 1"
		  "   + jsonb_array_length(ok.calls::jsonb),"
		  "  total_prompt_tokens"
		  "   = s.total_prompt_tokens + " CHAT_STEP_TOKENS("prompt") ","
		  "  total_completion_tokens = s.total_completion_tokens"
		  "   + " CHAT_STEP_TOKENS("completion") ","
		  "  updated_at = now()"
		  " FROM ok WHERE s.id = ok.session"
		  "), task AS ("
		  " UPDATE chat.chat_task AS t SET steps = ok.step,"
		  "  prompt_tokens"
		  "   = t.prompt_tokens + " CHAT_STEP_TOKENS("prompt") ","
		  "  completion_tokens"
		  "   = t.completion_tokens + " CHAT_STEP_TOKENS("completion") ","
		  "  model = COALESCE(ok.metadata::jsonb->>'model', t.model),"
		  CHAT_STEP_WINDOW("t") ","
		  "  usage = " CHAT_STEP_USAGE("t")
		  " FROM ok WHERE t.id = ok.task)"
		  " SELECT job FROM ok",
		  INT8OID, OIDOID, INT4OID, INT4OID, INT8ARRAYOID, INT8ARRAYOID,
		  UUIDARRAYOID, UUIDARRAYOID, UUIDARRAYOID, TEXTARRAYOID,
		  TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID, INT8ARRAYOID,
		  INT8ARRAYOID, TEXTARRAYOID, TEXTARRAYOID, INT8ARRAYOID,
		  TEXTARRAYOID);

/* $1 holder, arrays: $2 job, $3 epoch, $4 last seq */
CHAT_STMT(seal_jobs,
		  "UPDATE chat.chat_job AS j SET holder = NULL, parked = true,"
		  " attempts = 0, run_at = '-infinity', last_seq = e.last_seq,"
		  " spent = NULL"
		  " FROM (SELECT * FROM ROWS FROM (unnest($2), unnest($3),"
		  "  unnest($4)) AS u (job, epoch, last_seq)" CHAT_FEW("$2") ") AS e"
		  " WHERE j.id = e.job AND j.epoch = e.epoch"
		  "  AND j." CHAT_HELD_BY("$1"),
		  INT8OID, INT8ARRAYOID, INT8ARRAYOID, INT8ARRAYOID);

/*
 * $1 holder, $2 database, $3 limit, $4 first run of this timeline
 *
 * The task is locked, too: its slot is that of now, and stays it (another
 * worker may be about to move its events, see retention.c).
 */
CHAT_STMT(pick_turns,
		  "WITH picked AS MATERIALIZED ("
		  " SELECT j.id, s.channel, t.slot FROM chat.chat_job AS j"
		  " JOIN chat.chat_session AS s ON s.id = j.session_id"
		  " JOIN chat.chat_task AS t ON t.id = j.task_id"
		  " WHERE j.holder IS NULL AND j.kind = 'completion' AND j.parked"
		  "  AND j.database = $2 AND j.run_at <= now()"
		  " ORDER BY j.run_at, j.id LIMIT $3"
		  " FOR UPDATE OF j SKIP LOCKED"
		  " FOR NO KEY UPDATE OF s, t SKIP LOCKED"
		  "), job AS ("
		  " UPDATE chat.chat_job AS j SET holder = $1, epoch = j.epoch + 1"
		  " FROM picked AS p WHERE j.id = p.id"
		  " RETURNING j.id, j.epoch, j.session_id, j.task_id, j.owner,"
		  "  j.cancel, j.last_seq, p.channel, p.slot"
		  "), task AS ("
		  " UPDATE chat.chat_task AS t SET run = GREATEST(t.run, $4)"
		  " FROM job WHERE t.id = job.task_id AND t.run < $4 RETURNING t.id)"
		  " SELECT j.id, j.epoch, j.session_id, j.task_id, j.owner, j.cancel,"
		  "  j.last_seq, j.channel::text, GREATEST(t.run, $4), t.run < $4,"
		  "  j.slot, t.steps, t.detached, t.status"
		  " FROM job AS j JOIN chat.chat_task AS t ON t.id = j.task_id"
		  " ORDER BY j.id",
		  INT8OID, OIDOID, INT4OID, INT4OID);

/*
 * $1 sessions, locked, $2 tasks: those whose session another task has.  A
 * statement of its own: its snapshot is taken when the locks are held.
 */
CHAT_STMT(find_busy,
		  "SELECT w.n::int FROM ROWS FROM (unnest($1), unnest($2))"
		  "  WITH ORDINALITY AS w (session, task, n)"
		  " WHERE EXISTS (SELECT FROM chat.chat_task AS r"
		  "  WHERE r.session_id = w.session AND r.id <> w.task"
		  "   AND r.status = 'running' OFFSET 0)"
		  " OR EXISTS (SELECT FROM chat.chat_task AS r"
		  "  WHERE r.session_id = w.session AND r.id <> w.task"
		  "   AND r.status = 'waiting' AND NOT r.detached OFFSET 0)",
		  UUIDARRAYOID, UUIDARRAYOID);

/*
 * $1 tasks, $2 their steps, $3 characters of a result that are looked at; a
 * probe for each task, however many calls there are: see queue.c
 */
CHAT_STMT(load_calls,
		  "SELECT w.n::int, c.operation_id, c.call_id, c.name, c.kind,"
		  " c.status, left(c.result, $3), c.long_running, c.announced,"
		  " c.delivered,"
		  " c.sequence, c.deadline, COALESCE(c.input::text, '{}'),"
		  " c.arguments, length(c.result)"
		  " FROM ROWS FROM (unnest($1), unnest($2))"
		  "  WITH ORDINALITY AS w (task, step, n)"
		  " CROSS JOIN LATERAL (SELECT o.* FROM chat.chat_tool_call AS o"
		  "  WHERE o.task_id = w.task AND o.step = w.step OFFSET 0) AS c"
		  " ORDER BY w.n, c.position",
		  UUIDARRAYOID, INT4ARRAYOID, INT4OID);

/* $1 task: its calls end without having been looked at */
CHAT_STMT(abandon_calls,
		  "WITH call AS ("
		  " UPDATE chat.chat_tool_call AS c SET status = 'failed',"
		  "  ended_at = now(), result = json_build_object('type', 'error',"
		  "   'message', '" TURN_FAILED "', 'code', 'internal')::text"
		  " WHERE c.task_id = $1 AND c.ended_at IS NULL"
		  " RETURNING c.operation_id, c.session_id)"
		  " DELETE FROM chat.chat_job AS j USING call"
		  " WHERE j.session_id = call.session_id AND j.kind = 'tool'"
		  "  AND j.operation_id = call.operation_id",
		  UUIDOID);

/* $1 operations: takes what was reported of them from outside */
CHAT_STMT(take_progress,
		  "WITH p AS (DELETE FROM chat.chat_tool_progress"
		  "  WHERE operation_id = ANY($1)"
		  "  RETURNING operation_id, id, progress)"
		  " SELECT operation_id, progress::text FROM p ORDER BY id",
		  UUIDARRAYOID);

/* $1 task, $2 step: the message that asks for the step's calls */
CHAT_STMT(step_message,
		  "SELECT m.metadata->>'reasoning', COALESCE(m.content, m.refusal)"
		  " FROM chat.chat_tool_call AS c JOIN chat.chat_message AS m"
		  "  ON m.session_id = c.session_id AND m.id = c.message_id"
		  " WHERE c.task_id = $1 AND c.step = $2 LIMIT 1",
		  UUIDOID, INT4OID);

/*
 * Arrays: $1 operation, $2 status (NULL = as it is), $3 result (the same),
 * $4 announced, $5 delivered, $6 content of the tool message (NULL = as it is)
 */
CHAT_STMT(update_calls,
		  "WITH u AS MATERIALIZED (SELECT * FROM ROWS FROM (unnest($1),"
		  "  unnest($2), unnest($3), unnest($4), unnest($5), unnest($6))"
		  "  AS v (operation, status, result, announced, delivered, content)"
		  CHAT_FEW("$1")
		  "), call AS ("
		  " UPDATE chat.chat_tool_call AS c"
		  " SET status = COALESCE(u.status, c.status),"
		  "  result = COALESCE(u.result, c.result),"
		  "  ended_at = CASE WHEN u.status IN ('completed', 'failed',"
		  "   'denied', 'cancelled') THEN now() ELSE c.ended_at END,"
		  "  announced = u.announced, delivered = u.delivered"
		  " FROM u WHERE c.operation_id = u.operation"
		  " RETURNING c.operation_id, c.session_id, c.sequence, u.content,"
		  "  u.status, u.delivered"
		  "), job AS ("
		  " DELETE FROM chat.chat_job AS j USING call"
		  " WHERE j.session_id = call.session_id AND j.kind = 'tool'"
		  "  AND j.operation_id = call.operation_id"
		  "  AND call.delivered"
		  "), message AS ("
		  " UPDATE chat.chat_message AS m SET content = call.content,"
		  "  metadata = CASE WHEN call.delivered THEN m.metadata - 'pending'"
		  "   ELSE m.metadata END"
		  " FROM call WHERE m.session_id = call.session_id"
		  "  AND m.sequence = call.sequence AND call.content IS NOT NULL"
		  " RETURNING m.session_id)"
		  " UPDATE chat.chat_session AS s SET updated_at = now()"
		  " FROM (SELECT DISTINCT session_id FROM message) AS m"
		  " WHERE s.id = m.session_id",
		  UUIDARRAYOID, TEXTARRAYOID, TEXTARRAYOID, BOOLARRAYOID,
		  BOOLARRAYOID, TEXTARRAYOID);

/*
 * $1 holder, $2 database, arrays: $3 job, $4 epoch, $5 parked, $6 run at,
 * $7 last seq, $8 status of the task, $9 detached
 *
 * A task that leaves its session free makes the next one ready, and due those
 * that were done and found it taken.
 */
CHAT_STMT(leave_turns,
		  "WITH e AS MATERIALIZED (SELECT * FROM ROWS FROM (unnest($3),"
		  "  unnest($4), unnest($5), unnest($6), unnest($7), unnest($8),"
		  "  unnest($9)) AS u (job, epoch, parked, run_at, last_seq, status,"
		  "  detached)" CHAT_FEW("$3")
		  "), job AS ("
		  " UPDATE chat.chat_job AS j SET holder = NULL, parked = e.parked,"
		  "  run_at = e.run_at, last_seq = e.last_seq, attempts = 0,"
		  "  waited = 0, shrink_to = NULL"
		  " FROM e WHERE j.id = e.job AND j.epoch = e.epoch"
		  "  AND j." CHAT_HELD_BY("$1")
		  " RETURNING j.task_id, j.session_id, j.owner, e.status, e.detached,"
		  "  e.parked"
		  "), task AS ("
		  " UPDATE chat.chat_task AS t SET status = job.status,"
		  "  detached = job.detached,"
		  "  answer_id = CASE WHEN job.parked THEN t.answer_id"
		  "   ELSE gen_random_uuid() END"
		  " FROM job WHERE t.id = job.task_id"
		  "), rung AS ("
		  " UPDATE chat.chat_job AS p SET run_at = '-infinity'"
		  " FROM job JOIN chat.chat_task AS o ON o.id = job.task_id"
		  " WHERE job.detached AND NOT o.detached"
		  "  AND p.session_id = job.session_id AND p." CHAT_IS_PARKED
		  "  AND p.holder IS NULL)"
		  " INSERT INTO chat.chat_job (kind, session_id, task_id, server,"
		  "  owner, database, cancel)"
		  " SELECT 'completion', f.session_id, q.id, q.server, f.owner,"
		  "  $2, q.superseded IS NOT NULL"
		  " FROM (SELECT DISTINCT session_id, owner FROM job WHERE detached)"
		  "  AS f CROSS JOIN LATERAL (SELECT t.* FROM chat.chat_task AS t"
		  "  WHERE t.session_id = f.session_id AND t.status = 'queued'"
		  "  ORDER BY t.place LIMIT 1) AS q"
		  " WHERE NOT EXISTS (SELECT FROM chat.chat_job AS o"
		  "  WHERE o.session_id = f.session_id AND o.task_id = q.id"
		  "   AND o.kind = 'completion' OFFSET 0)"
		  " AND NOT EXISTS (SELECT FROM chat.chat_task AS b"
		  "  WHERE b.session_id = f.session_id AND b.status = 'running'"
		  "   AND b.id NOT IN (SELECT k.task_id FROM job AS k"
		  "    WHERE k.detached) OFFSET 0)"
		  " AND NOT EXISTS (SELECT FROM chat.chat_task AS b"
		  "  WHERE b.session_id = f.session_id AND b.status = 'waiting'"
		  "   AND NOT b.detached"
		  "   AND b.id NOT IN (SELECT k.task_id FROM job AS k"
		  "    WHERE k.detached) OFFSET 0)",
		  INT8OID, OIDOID, INT8ARRAYOID, INT8ARRAYOID, BOOLARRAYOID,
		  TIMESTAMPTZARRAYOID, INT8ARRAYOID, TEXTARRAYOID, BOOLARRAYOID);

/* $1 session, $2 task */
CHAT_STMT(ring_job,
		  "UPDATE chat.chat_job SET run_at = '-infinity'"
		  " WHERE session_id = $1 AND task_id = $2 AND kind = 'completion'"
		  " AND parked",
		  UUIDOID, UUIDOID);

/*
 * $1 operation, $2 first run of this timeline: takes the next number of the
 * task's stream.  A task that was not yet seen on this timeline has its turn
 * first; one that somebody holds is not waited for.
 */
CHAT_STMT(next_seq,
		  "WITH picked AS MATERIALIZED ("
		  " SELECT j.id, t.id AS task, s.channel, c.call_id"
		  " FROM chat.chat_tool_call AS c"
		  " JOIN chat.chat_task AS t ON t.id = c.task_id AND t.run >= $2"
		  " JOIN chat.chat_session AS s ON s.id = c.session_id"
		  " JOIN chat.chat_job AS j ON j.session_id = c.session_id"
		  "  AND j.task_id = c.task_id AND j.kind = 'completion'"
		  "  AND j." CHAT_IS_PARKED " AND j.holder IS NULL"
		  " WHERE c.operation_id = $1 AND c.ended_at IS NULL"
		  " FOR UPDATE OF j SKIP LOCKED)"
		  " UPDATE chat.chat_job AS j SET last_seq = j.last_seq + 1"
		  " FROM picked AS p WHERE j.id = p.id"
		  " RETURNING j.last_seq, p.task, p.channel::text, p.call_id",
		  UUIDOID, INT4OID);

/*
 * $1 task, whose job is locked: where its events go.  A statement of its own:
 * its snapshot is taken when nobody can move them any more (retention.c).
 */
CHAT_STMT(find_slot,
		  "SELECT t.slot FROM chat.chat_task AS t WHERE t.id = $1",
		  UUIDOID);

/* $1 database */
CHAT_STMT(parked_tasks,
		  "SELECT s.channel::text, j.task_id FROM chat.chat_job AS j"
		  " JOIN chat.chat_session AS s ON s.id = j.session_id"
		  " WHERE j.holder IS NULL AND j.parked AND j.database = $1"
		  " LIMIT 10000",
		  OIDOID);

/* A call as a turn sees it, and what the turn does to it. */
typedef struct Call
{
	pg_uuid_t	operation;
	char	   *call_id;
	char	   *name;
	char	   *kind;
	char	   *status;
	char	   *result;
	bool		long_running;
	bool		announced;
	bool		delivered;
	TimestampTz deadline;
	char	   *input;
	char	   *arguments;
	int			result_length;	/* characters */
	bool		changed;
	const char *new_status;		/* NULL = as it is */
	const char *content;		/* of the tool message, NULL = as it is */
} Call;

/* A parked task that has its turn. */
typedef struct Turn
{
	ChatJob		job;
	bool		new_run;
	int			steps;
	bool		busy;			/* another task has the session */
	bool		holds;			/* this one had it before the turn */
	bool		meets_holder;	/* so had another of this batch */
	int			ncalls;
	Call	   *calls;
	ChatEventTarget target;
	ChatEventLog log;
	ChatEnd    *end;			/* the task ends here */
	bool		parked;			/* stays so */
	TimestampTz run_at;
	const char *status;
	bool		detached;
	int64		seq;
} Turn;

/* Declares the settings of the tool phase. */
void
chat_turn_init(void)
{
	DefineCustomIntVariable("chat.max_steps",
							"Most steps (requests to the model) of a task.",
							NULL, &max_steps, 10, 1, 1000,
							PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("chat.max_tool_calls",
							"Most tool calls of a step.",
							NULL, &max_tool_calls, 32, 1, 250,
							PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("chat.max_tool_output_length",
							"Most characters of a tool's result that the model is shown.",
							NULL, &max_tool_output_length,
							100000, 100, 100000000,
							PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("chat.operation_timeout",
							"Longest time that a long operation, an approval or the application's output is waited for.",
							NULL, &operation_timeout, 600000, 1, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
}

/* ---------- the end of a step that asked for tools ---------- */

/* Stores the steps. */
void
chat_turn_park(int64 holder, ChatEnd **all, int nall)
{
	ChatEnd   **ends = palloc(sizeof(ChatEnd *) * nall);
	int			n = chat_queue_lock(all, nall, ends);
	Datum	   *values = palloc(sizeof(Datum) * nall);
	Datum		params[19];
	int			at = 0;

	if (n == 0)
		return;
	params[at++] = Int64GetDatum(holder);
	params[at++] = ObjectIdGetDatum(MyDatabaseId);
	params[at++] = Int32GetDatum(max_tool_calls);
	params[at++] = Int32GetDatum(operation_timeout);
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->job->id));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->job->epoch));
	CHAT_DB_COLUMN(chat_uuids, UUIDPGetDatum(&ends[i]->job->session));
	CHAT_DB_COLUMN(chat_uuids, UUIDPGetDatum(&ends[i]->job->task));
	CHAT_DB_COLUMN(chat_uuids, UUIDPGetDatum(&ends[i]->job->answer));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(ends[i]->content));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(ends[i]->refusal));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(ends[i]->tool_calls));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(ends[i]->metadata));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->prompt_tokens));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->completion_tokens));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(ends[i]->usage));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(ends[i]->calls));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->context_tokens));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(ends[i]->compaction));
	chat_db_exec(&park_tasks, params, NULL);
	chat_queue_mark(ends, n);
}

/* Parks the jobs. */
void
chat_turn_seal(int64 holder, ChatEnd **ends, const int64 *seqs, int n)
{
	Datum	   *values = palloc(sizeof(Datum) * n);
	Datum		params[4];
	int			at = 0;

	params[at++] = Int64GetDatum(holder);
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->job->id));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->job->epoch));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(seqs[i]));
	chat_db_exec(&seal_jobs, params, NULL);
}

/* Makes the parked job of a task due. */
bool
chat_turn_ring(const pg_uuid_t *session, const pg_uuid_t *task)
{
	Datum		values[2] = {UUIDPGetDatum(session), UUIDPGetDatum(task)};

	return chat_db_exec(&ring_job, values, NULL) > 0;
}

/* ---------- events of a turn ---------- */

/* Starts an event of a call. */
static void
begin_event(StringInfo json, const char *type, const Call *c)
{
	initStringInfo(json);
	appendStringInfo(json, "{\"type\":\"%s\"", type);
	chat_append_member(json, "toolCallId", c->call_id);
}

/* Adds a finished event to the turn's log. */
static void
add_event(Turn *t, StringInfo json)
{
	appendStringInfoChar(json, '}');
	chat_event_add(&t->log, CurrentMemoryContext, json->data);
	pfree(json->data);
}

/* Returns a uuid in its text form. */
static char *
uuid_text(const pg_uuid_t *id)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(id)));
}

/* Returns a text as JSON: itself when it is JSON, else a string. */
static char *
as_json(const char *text)
{
	StringInfoData json;
	Jsonb	   *value = chat_db_parse_json(text);

	if (value)
		return JsonbToCString(NULL, &value->root, VARSIZE(value));
	initStringInfo(&json);
	chat_append_string(&json, text, strlen(text));
	return json.data;
}

/* Tells listeners a call's input again, when a new run begins. */
static void
log_input(Turn *t, const Call *c)
{
	StringInfoData json;

	begin_event(&json, "tool-input-available", c);
	chat_append_member(&json, "toolName", c->name);
	appendStringInfo(&json, ",\"input\":%s", c->input);
	add_event(t, &json);
}

/* Returns the message of an error result, or the whole of it. */
static const char *
error_text(const char *result)
{
	Jsonb	   *value = result[0] == '{' ? chat_db_parse_json(result) : NULL;
	JsonbValue	v;

	if (value && JB_ROOT_IS_OBJECT(value) &&
		getKeyJsonValueFromContainer(&value->root, "message", 7, &v) &&
		v.type == jbvString)
		return pnstrdup(v.val.string.val, v.val.string.len);
	return result;
}

/* Tells listeners how a call ended. */
static void
log_result(Turn *t, const Call *c, const char *status, const char *content)
{
	StringInfoData json;

	if (strcmp(status, "completed") == 0)
	{
		begin_event(&json, "tool-output-available", c);
		appendStringInfo(&json, ",\"output\":%s", as_json(content));
	}
	else if (strcmp(status, "denied") == 0)
		begin_event(&json, "tool-output-denied", c);
	else if (strcmp(c->kind, "none") == 0)
	{
		begin_event(&json, "tool-input-error", c);
		chat_append_member(&json, "toolName", c->name);
		appendStringInfo(&json, ",\"input\":%s", as_json(c->arguments));
		chat_append_member(&json, "errorText", error_text(content));
	}
	else
	{
		begin_event(&json, "tool-output-error", c);
		chat_append_member(&json, "errorText", error_text(content));
	}
	add_event(t, &json);
}

/* Tells listeners that an operation goes on. */
static void
log_started(Turn *t, const Call *c)
{
	StringInfoData json;

	begin_event(&json, "tool-output-available", c);
	appendStringInfo(&json, ",\"preliminary\":true,\"output\":{"
					 "\"type\":\"operation_started\",\"operation_id\":\"%s\"",
					 uuid_text(&c->operation));
	chat_append_member(&json, "tool_name", c->name);
	appendStringInfoChar(&json, '}');
	add_event(t, &json);
}

/* Asks listeners for an approval. */
static void
log_request(Turn *t, const Call *c)
{
	StringInfoData json;

	begin_event(&json, "tool-approval-request", c);
	chat_append_member(&json, "approvalId", uuid_text(&c->operation));
	add_event(t, &json);
}

/* ---------- what a turn does to a call ---------- */

/* Returns a result as the model is shown it: what is too long is cut. */
static char *
shown_result(const char *result, int length)
{
	int			bytes;

	if (length <= max_tool_output_length)
		return pstrdup(result);
	bytes = pg_mbcharcliplen(result, (int) strlen(result),
							 max_tool_output_length);
	return psprintf("%.*s\n[cut: %d of %d characters are shown]", bytes,
					result, max_tool_output_length, length);
}

/* Ends a call here and now. */
static void
end_call(Call *c, const char *status, const char *what, const char *code)
{
	c->new_status = status;
	c->status = pstrdup(status);
	c->result = chat_tool_error(c->name, what, code);
	c->result_length = pg_mbstrlen(c->result);
}

/* True if a status is an end. */
static bool
is_end(const char *status)
{
	return strcmp(status, "completed") == 0 || strcmp(status, "failed") == 0 ||
		strcmp(status, "denied") == 0 || strcmp(status, "cancelled") == 0;
}

/* Gives the result of a call that has ended to listeners and the model. */
static void
deliver(Turn *t, Call *c)
{
	c->content = shown_result(c->result, c->result_length);
	log_result(t, c, c->status, c->content);
	c->delivered = true;
	c->changed = true;
}

/* Tells that a call waits for its end. */
static void
announce(Turn *t, Call *c)
{
	StringInfoData json;

	c->announced = true;
	c->changed = true;
	if (strcmp(c->status, "approval") == 0)
	{
		log_request(t, c);
		/* once allowed, the operation is announced like any other */
		c->announced = !c->long_running;
		return;
	}
	log_started(t, c);
	initStringInfo(&json);
	appendStringInfoString(&json, "{\"type\":\"operation_pending\"");
	chat_append_member(&json, "operation_id", uuid_text(&c->operation));
	chat_append_member(&json, "tool_name", c->name);
	chat_append_member(&json, "message",
					   "The operation goes on; its result will follow.");
	appendStringInfoChar(&json, '}');
	c->content = json.data;
}

/* True if a call leaves the session free while it goes on. */
static bool
is_operation(const Call *c)
{
	return c->long_running && strcmp(c->status, "approval") != 0;
}

/* Looks at one call; false if it goes on. */
static bool
look_at_call(Turn *t, Call *c, TimestampTz now)
{
	if (c->delivered)
		return true;
	if (!is_end(c->status) && (t->job.cancel || c->deadline <= now))
	{
		chat_shmem_cancel_operation(&c->operation);
		/* its request ends when its job is seen to be gone */
		if (strcmp(c->kind, "http") == 0)
			pg_atomic_write_u32(&chat_slot->recheck, 1);
		if (t->job.cancel)
			end_call(c, "cancelled", "the task was cancelled", "cancelled");
		else
			end_call(c, "failed", "nobody ended it in time", "timeout");
	}
	if (is_end(c->status))
	{
		deliver(t, c);
		return true;
	}
	if (!c->announced &&
		(is_operation(c) || strcmp(c->status, "approval") == 0))
		announce(t, c);
	return false;
}

/* ---------- what a turn does to its task ---------- */

/* Ends the task of a turn. */
static void
end_task(Turn *t, ChatEndKind kind, const char *error, const char *event)
{
	t->end = palloc0(sizeof(ChatEnd));
	t->end->job = &t->job;
	t->end->kind = kind;
	t->end->error = error;
	t->end->metadata = "{}";
	if (event)
		chat_event_add(&t->log, CurrentMemoryContext, event);
}

/* Ends a task that has reached a limit. */
static void
end_by_limit(Turn *t, const char *text)
{
	chat_event_add(&t->log, CurrentMemoryContext,
				   "{\"type\":\"finish-step\"}");
	end_task(t, CHAT_END_FAILED,
			 psprintf("{\"code\":\"limit_reached\",\"retryable\":false,"
					  "\"message\":\"%s\"}", text),
			 psprintf("{\"type\":\"error\",\"errorText\":\"%s\","
					  "\"code\":\"limit_reached\"}", text));
	chat_event_add(&t->log, CurrentMemoryContext,
				   "{\"type\":\"finish\",\"finishReason\":\"error\"}");
}

/* Lets the model go on: the last result is there. */
static void
next_step(Turn *t)
{
	if (t->ncalls > max_tool_calls)
	{
		end_by_limit(t, psprintf("a step of the task has more calls than chat.max_tool_calls (%d)",
								 max_tool_calls));
		return;
	}
	if (t->steps >= max_steps)
	{
		end_by_limit(t, psprintf("the task has reached chat.max_steps (%d)",
								 max_steps));
		return;
	}
	if (t->busy)
	{
		/* whoever leaves the session makes this one due, unless it was now */
		t->parked = true;
		t->run_at = t->meets_holder ? DT_NOBEGIN : DT_NOEND;
		t->status = "waiting";
		t->detached = true;
		return;
	}
	chat_event_add(&t->log, CurrentMemoryContext,
				   "{\"type\":\"finish-step\"}");
	chat_event_add(&t->log, CurrentMemoryContext,
				   "{\"type\":\"start-step\"}");
	t->parked = false;
	t->run_at = DT_NOBEGIN;
	t->status = "running";
	t->detached = false;
}

/* Says how a task waits whose calls have not all ended. */
static void
wait_on(Turn *t)
{
	bool		all_operations = true;
	bool		all_wait = true;

	t->parked = true;
	t->run_at = DT_NOEND;
	for (int i = 0; i < t->ncalls; i++)
	{
		const Call *c = &t->calls[i];

		if (c->delivered)
			continue;
		all_operations &= is_operation(c);
		all_wait &= is_operation(c) || strcmp(c->kind, "client") == 0 ||
			strcmp(c->status, "approval") == 0;
		t->run_at = Min(t->run_at, c->deadline);
	}
	t->status = all_wait ? "waiting" : "running";
	/* what left the session never takes it back before it goes on */
	t->detached = all_operations || t->detached;
	if (t->detached)
		t->status = "waiting";
}

/* Adds a block of text that listeners are told again. */
static void
log_again(Turn *t, const char *kind, const ChatDeltaType *delta,
		  const char *text)
{
	char	   *id = psprintf("%s-again", kind);

	if (text == NULL || text[0] == '\0')
		return;
	chat_event_add(&t->log, CurrentMemoryContext,
				   psprintf("{\"type\":\"%s-start\",\"id\":\"%s\"}",
							kind, id));
	chat_event_delta(&t->log, CurrentMemoryContext, delta, id, text,
					 strlen(text));
	chat_event_add(&t->log, CurrentMemoryContext,
				   psprintf("{\"type\":\"%s-end\",\"id\":\"%s\"}", kind, id));
}

/* Tells listeners again what the step's message says beside its calls. */
static void
log_step(Turn *t)
{
	MemoryContext old = CurrentMemoryContext;
	Datum		values[2] = {UUIDPGetDatum(&t->job.task),
	Int32GetDatum(t->steps)};

	if (chat_db_exec(&step_message, values, NULL) == 0)
		return;
	MemoryContextSwitchTo(old);
	log_again(t, "reasoning", &chat_reasoning_delta, chat_db_text(0, 1));
	log_again(t, "text", &chat_text_delta, chat_db_text(0, 2));
}

/* Gives one task its turn. */
static void
take_turn(Turn *t, TimestampTz now)
{
	bool		open = false;

	if (t->new_run)
	{
		chat_event_add(&t->log, CurrentMemoryContext,
					   "{\"type\":\"reset-step\"}");
		log_step(t);
		for (int i = 0; i < t->ncalls; i++)
		{
			log_input(t, &t->calls[i]);
			if (t->calls[i].delivered)
				log_result(t, &t->calls[i], t->calls[i].status,
						   shown_result(t->calls[i].result,
										t->calls[i].result_length));
		}
	}
	for (int i = 0; i < t->ncalls; i++)
		open |= !look_at_call(t, &t->calls[i], now);
	if (t->job.cancel)
		end_task(t, CHAT_END_CANCELLED,
				 "{\"code\":\"cancelled\","
				 "\"message\":\"the task was cancelled\",\"retryable\":false}",
				 "{\"type\":\"abort\"}");
	else if (open)
		wait_on(t);
	else
		next_step(t);
}

/* ---------- the transaction ---------- */

/* Reads the row of a parked job. */
static void
read_turn(Turn *t, uint64 row)
{
	int64		run = chat_db_int32(row, 9, 0);

	memset(t, 0, sizeof(*t));
	t->job.id = chat_db_int64(row, 1, 0);
	t->job.epoch = chat_db_int64(row, 2, 0);
	t->job.session = chat_db_uuid(row, 3);
	t->job.task = chat_db_uuid(row, 4);
	t->job.owner = chat_db_oid(row, 5);
	t->job.cancel = chat_db_bool(row, 6);
	t->job.channel = chat_db_text(row, 8);
	t->new_run = chat_db_bool(row, 10);
	t->seq = t->new_run ? run << CHAT_EVENT_RUN_SHIFT
		: chat_db_int64(row, 7, 0);
	t->steps = chat_db_int32(row, 12, 0);
	t->detached = chat_db_bool(row, 13);
	t->holds = !t->detached;
	chat_event_aim(&t->target, &t->job.task,
				   DatumGetInt16(chat_db_datum(row, 11, &(bool) {false})),
				   t->job.channel);
}

/* Reads a call's row. */
static void
read_call(Call *c, uint64 row)
{
	bool		isnull;
	Datum		deadline = chat_db_datum(row, 12, &isnull);

	memset(c, 0, sizeof(*c));
	c->operation = chat_db_uuid(row, 2);
	c->call_id = chat_db_text(row, 3);
	c->name = chat_db_text(row, 4);
	c->kind = chat_db_text(row, 5);
	c->status = chat_db_text(row, 6);
	c->result = chat_db_text(row, 7);
	c->long_running = chat_db_bool(row, 8);
	c->announced = chat_db_bool(row, 9);
	c->delivered = chat_db_bool(row, 10);
	c->deadline = isnull ? DT_NOEND : DatumGetTimestampTz(deadline);
	c->input = chat_db_text(row, 13);
	c->arguments = chat_db_text(row, 14);
	c->result_length = chat_db_int32(row, 15, 0);
}

static void tell_progress(Turn *turns, int nturns, int ncalls);

/* Reads which sessions are taken, and the calls of the turns' steps. */
static void
load(Turn *turns, int n)
{
	Datum	   *values = palloc(sizeof(Datum) * n);
	Datum		params[3];
	int			at = 0;
	uint64		rows;

	CHAT_DB_COLUMN(chat_uuids, UUIDPGetDatum(&turns[i].job.session));
	CHAT_DB_COLUMN(chat_uuids, UUIDPGetDatum(&turns[i].job.task));
	rows = chat_db_exec(&find_busy, params, NULL);
	for (uint64 row = 0; row < rows; row++)
		turns[chat_db_int32(row, 1, 0) - 1].busy = true;
	at = 0;
	CHAT_DB_COLUMN(chat_uuids, UUIDPGetDatum(&turns[i].job.task));
	CHAT_DB_COLUMN(chat_int4s, Int32GetDatum(turns[i].steps));
	params[at++] = Int32GetDatum(max_tool_output_length);
	rows = chat_db_exec(&load_calls, params, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		Turn	   *t = &turns[chat_db_int32(row, 1, 0) - 1];

		if (t->calls == NULL)
			t->calls = palloc(sizeof(Call) * (rows - row));
		read_call(&t->calls[t->ncalls++], row);
	}
	tell_progress(turns, n, (int) rows);
}

/* Tells listeners how far an operation is. */
static void
log_progress(Turn *t, const Call *c, const char *report)
{
	StringInfoData json;

	begin_event(&json, "tool-output-available", c);
	appendStringInfo(&json, ",\"preliminary\":true,\"output\":%s",
					 as_json(report));
	add_event(t, &json);
}

/* Tells listeners what was reported of operations from outside. */
static void
tell_progress(Turn *turns, int nturns, int ncalls)
{
	Call	  **calls = palloc(sizeof(Call *) * Max(ncalls, 1));
	Turn	  **owners = palloc(sizeof(Turn *) * Max(ncalls, 1));
	Datum	   *values = palloc(sizeof(Datum) * Max(ncalls, 1));
	Datum		params[1];
	int			at = 0;
	int			n = 0;
	uint64		rows;

	for (int t = 0; t < nturns; t++)
		for (int c = 0; c < turns[t].ncalls; c++)
			if (!turns[t].calls[c].delivered)
			{
				owners[n] = &turns[t];
				calls[n++] = &turns[t].calls[c];
			}
	if (n == 0)
		return;
	CHAT_DB_COLUMN(chat_uuids, UUIDPGetDatum(&calls[i]->operation));
	rows = chat_db_exec(&take_progress, params, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		pg_uuid_t	operation = chat_db_uuid(row, 1);

		for (int i = 0; i < n; i++)
			if (memcmp(&calls[i]->operation, &operation, UUID_LEN) == 0)
				log_progress(owners[i], calls[i], chat_db_text(row, 2));
	}
}

/* Writes what the turns did to their calls. */
static void
write_calls(Turn *turns, int nturns)
{
	Call	  **calls;
	Datum	   *values;
	Datum		params[6];
	int			at = 0;
	int			n = 0;

	for (int t = 0; t < nturns; t++)
		n += turns[t].ncalls;
	calls = palloc(sizeof(Call *) * Max(n, 1));
	values = palloc(sizeof(Datum) * Max(n, 1));
	n = 0;
	for (int t = 0; t < nturns; t++)
		for (int c = 0; c < turns[t].ncalls; c++)
			if (turns[t].calls[c].changed)
				calls[n++] = &turns[t].calls[c];
	if (n == 0)
		return;
	CHAT_DB_COLUMN(chat_uuids, UUIDPGetDatum(&calls[i]->operation));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(calls[i]->new_status));
	CHAT_DB_COLUMN(chat_texts,
				   chat_db_text_or_null(calls[i]->new_status
										? calls[i]->result : NULL));
	CHAT_DB_COLUMN(chat_bools, BoolGetDatum(calls[i]->announced));
	CHAT_DB_COLUMN(chat_bools, BoolGetDatum(calls[i]->delivered));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(calls[i]->content));
	chat_db_exec(&update_calls, params, NULL);
}

/* Writes how the tasks go on. */
static void
write_jobs(int64 holder, Turn **turns, int n)
{
	Datum	   *values = palloc(sizeof(Datum) * Max(n, 1));
	Datum		params[9];
	int			at = 0;

	if (n == 0)
		return;
	params[at++] = Int64GetDatum(holder);
	params[at++] = ObjectIdGetDatum(MyDatabaseId);
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(turns[i]->job.id));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(turns[i]->job.epoch));
	CHAT_DB_COLUMN(chat_bools, BoolGetDatum(turns[i]->parked));
	CHAT_DB_COLUMN(chat_times, TimestampTzGetDatum(turns[i]->run_at));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(turns[i]->seq));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(turns[i]->status));
	CHAT_DB_COLUMN(chat_bools, BoolGetDatum(turns[i]->detached));
	chat_db_exec(&leave_turns, params, NULL);
}

/*
 * Ends tasks.  Each end makes its session's next task ready: two of the same
 * session end one after the other.
 */
static void
finish_tasks(int64 holder, ChatEnd **ends, int n)
{
	ChatEnd   **now = palloc(sizeof(ChatEnd *) * Max(n, 1));

	while (n > 0)
	{
		int			nnow = 0;
		int			later = 0;

		for (int i = 0; i < n; i++)
		{
			bool		again = false;

			for (int k = 0; k < nnow && !again; k++)
				again = memcmp(&now[k]->job->session, &ends[i]->job->session,
							   UUID_LEN) == 0;
			if (again)
				ends[later++] = ends[i];
			else
				now[nnow++] = ends[i];
		}
		chat_queue_finish(holder, now, nnow);
		n = later;
	}
}

/* Ends the tasks that end here, and sends the others on. */
static void
write_turns(int64 holder, Turn *turns, int n, ChatEventBatch *batch)
{
	ChatEnd   **ends = palloc(sizeof(ChatEnd *) * n);
	Turn	  **going = palloc(sizeof(Turn *) * n);
	int			nends = 0;
	int			ngoing = 0;

	for (int i = 0; i < n; i++)
	{
		turns[i].seq = chat_event_collect(batch, &turns[i].target,
										  turns[i].seq, &turns[i].log);
		if (turns[i].end)
			ends[nends++] = turns[i].end;
		else
			going[ngoing++] = &turns[i];
	}
	/* who ends a task rings those that wait for its session: these first */
	write_jobs(holder, going, ngoing);
	finish_tasks(holder, ends, nends);
}

/*
 * Notes what the other turns of the batch do to the session of one: the
 * statement that picked them shows it as it was before all of them.
 */
static void
look_at_others(Turn *turns, int n, int i)
{
	Turn	   *t = &turns[i];

	for (int k = 0; k < n; k++)
	{
		const Turn *o = &turns[k];

		if (k == i ||
			memcmp(&o->job.session, &t->job.session, UUID_LEN) != 0)
			continue;
		t->meets_holder |= o->holds;
		/* it went on before us */
		t->busy |= k < i && o->end == NULL && !o->detached;
	}
}

/* Ends a task whose turn failed. */
static void
fail_turn(Turn *t)
{
	Datum		values[1] = {UUIDPGetDatum(&t->job.task)};
	MemoryContext old = CurrentMemoryContext;

	chat_db_exec(&abandon_calls, values, NULL);
	MemoryContextSwitchTo(old);
	if (t->new_run)
		chat_event_add(&t->log, CurrentMemoryContext,
					   "{\"type\":\"reset-step\"}");
	end_task(t, CHAT_END_FAILED,
			 "{\"code\":\"endpoint_error\",\"retryable\":false,"
			 "\"message\":\"" TURN_FAILED "\"}",
			 "{\"type\":\"error\",\"errorText\":\"" TURN_FAILED "\","
			 "\"code\":\"endpoint_error\"}");
	chat_event_add(&t->log, CurrentMemoryContext,
				   "{\"type\":\"finish\",\"finishReason\":\"error\"}");
}

/* Gives the due parked tasks their turn. */
int
chat_turn_run(int64 holder, int most, bool bare, ChatEventBatch *batch,
			  pg_uuid_t **tasks)
{
	Datum		values[4];
	TimestampTz now = GetCurrentTimestamp();
	Turn	   *turns;
	int			n;

	values[0] = Int64GetDatum(holder);
	values[1] = ObjectIdGetDatum(MyDatabaseId);
	values[2] = Int32GetDatum(most);
	values[3] = Int32GetDatum(chat_queue_first_run());
	n = (int) chat_db_exec(&pick_turns, values, NULL);
	if (n == 0)
		return 0;
	turns = palloc(sizeof(Turn) * n);
	*tasks = palloc(sizeof(pg_uuid_t) * n);
	for (int i = 0; i < n; i++)
	{
		read_turn(&turns[i], i);
		(*tasks)[i] = turns[i].job.task;
	}
	if (!bare)
		load(turns, n);
	for (int i = 0; i < n; i++)
	{
		look_at_others(turns, n, i);
		if (bare)
			fail_turn(&turns[i]);
		else
			take_turn(&turns[i], now);
	}
	if (!bare)
		write_calls(turns, n);
	write_turns(holder, turns, n, batch);
	return n;
}

/* Notifies a heartbeat for each task whose tools run. */
void
chat_turn_heartbeat(void)
{
	Datum		values[1] = {ObjectIdGetDatum(MyDatabaseId)};
	uint64		n = chat_db_exec(&parked_tasks, values, NULL);

	for (uint64 row = 0; row < n; row++)
	{
		pg_uuid_t	task = chat_db_uuid(row, 2);

		chat_event_heartbeat(chat_db_text(row, 1), uuid_text(&task));
	}
}

/* Setting chat.operation_timeout, in ms. */
int
chat_turn_operation_timeout(void)
{
	return operation_timeout;
}

/* Tells listeners how far an operation is. */
bool
chat_turn_progress(const pg_uuid_t *operation, const char *report,
				   ChatEventBatch *batch, pg_uuid_t *task)
{
	Datum		values[2] = {UUIDPGetDatum(operation),
	Int32GetDatum(chat_queue_first_run())};
	Turn	   *t;
	Call		c = {0};
	int64		seq;
	char	   *channel;

	if (chat_db_exec(&next_seq, values, NULL) == 0)
		return false;
	seq = chat_db_int64(0, 1, 0);
	*task = chat_db_uuid(0, 2);
	channel = chat_db_text(0, 3);
	c.call_id = chat_db_text(0, 4);
	values[0] = UUIDPGetDatum(task);
	chat_db_exec(&find_slot, values, NULL);
	/* the batch points into its targets */
	t = palloc0(sizeof(Turn));
	chat_event_aim(&t->target, task,
				   DatumGetInt16(chat_db_datum(0, 1, &(bool) {false})),
				   channel);
	log_progress(t, &c, report);
	(void) chat_event_collect(batch, &t->target, seq - 1, &t->log);
	return true;
}
