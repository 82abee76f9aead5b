/*
 * queue.c
 *		All SQL of the job table, and of the tasks that its jobs carry.
 *
 * Owns the statements; the rows protect themselves: a job is taken with
 * FOR UPDATE SKIP LOCKED, belongs to the worker whose identity stands in
 * holder, and every write of the holder names the epoch of its claim.  Who
 * lives is known exactly from shared memory, so a job held by somebody else
 * is an orphan, whatever its age.
 *
 * A session's row is locked before anything of the session is written, by
 * all of its writers: that orders the messages.  Here never more than for
 * one of our short transactions, and never waited for.
 */
#include "postgres.h"

#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"

#include "append.h"
#include "db.h"
#include "queue.h"

/* runs of one timeline; see P3 in the README */
#define RUNS_PER_TIMELINE 256

/*
 * The planner knows nothing of a queue that was empty when it planned, so
 * these are written for one index each: chat_job_claim_idx or _fair_idx for
 * jobs that may be claimed, chat_job_cancel_idx for those that shall end.
 * OFFSET keeps a subquery a probe by session: as a join it would read all
 * tasks that run, for each job.  Table j, database db.
 */
#define FREE_SESSION \
	" NOT EXISTS (SELECT FROM chat.chat_task AS r" \
	"  WHERE r.session_id = j.session_id AND r.status = 'running'" \
	"   AND r.id <> j.task_id OFFSET 0)" \
	" AND NOT EXISTS (SELECT FROM chat.chat_task AS w" \
	"  WHERE w.session_id = j.session_id AND w.status = 'waiting'" \
	"   AND NOT w.detached AND w.id <> j.task_id OFFSET 0)"

#define CLAIMABLE(db) \
	" j.holder IS NULL AND j.kind = 'completion' AND NOT j.parked" \
	" AND j.database = " db " AND j.run_at <= now() AND" FREE_SESSION

#define CANCELLED(db) \
	" j.holder IS NULL AND j.cancel AND NOT j.parked" \
	" AND j.database = " db " AND j.run_at <= now() AND" FREE_SESSION

/*
 * Of which servers and owners there are jobs: the index is entered once for
 * each pair, however many jobs there are.
 */
#define PAIRS(db) \
	"pair (server, owner) AS (" \
	" (SELECT j.server, j.owner FROM chat.chat_job AS j" \
	"  WHERE j.holder IS NULL AND j.kind = 'completion' AND NOT j.parked" \
	"   AND j.database = " db " ORDER BY j.server, j.owner LIMIT 1)" \
	" UNION ALL" \
	" SELECT n.server, n.owner FROM pair AS p CROSS JOIN LATERAL" \
	"  (SELECT j.server, j.owner FROM chat.chat_job AS j" \
	"   WHERE j.holder IS NULL AND j.kind = 'completion' AND NOT j.parked" \
	"    AND j.database = " db \
	"    AND (j.server, j.owner) > (p.server, p.owner)" \
	"   ORDER BY j.server, j.owner LIMIT 1) AS n" \
	")"

/*
 * What every claim does with the jobs that it has chosen and locked.  What was
 * read goes on from one to the next, so that nothing has to be joined again.
 */
#define PICKED_COLUMNS \
	" j.id, j.session_id, j.task_id, j.rerun, j.reset, s.next_sequence," \
	" s.channel, s.user_id, s.settings, s.title IS NULL AS untitled," \
	" s.summary, s.summary_sequence, COALESCE(s.summary_failed_at" \
	"  > now() - '5 min'::interval, false) AS summary_failed"

#define TAKE_PICKED \
	"), old AS MATERIALIZED (" \
	" SELECT p.*, t.run, t.input, t.message_id," \
	"  (p.rerun OR t.run < $4) AS new_run," \
	"  (SELECT e.slot FROM chat.chat_event_slot AS e" \
	"   ORDER BY e.opened_at DESC LIMIT 1) AS open_slot" \
	" FROM picked AS p JOIN chat.chat_task AS t ON t.id = p.task_id" \
	"), task AS (" \
	" UPDATE chat.chat_task AS t SET status = 'running', input = NULL," \
	"  started_at = COALESCE(t.started_at, now())," \
	"  slot = COALESCE(t.slot, o.open_slot)," \
	"  run = CASE WHEN o.new_run THEN GREATEST(t.run + 1, $4)" \
	"   ELSE t.run END" \
	" FROM old AS o WHERE t.id = o.task_id" \
	" RETURNING o.*, t.run AS this_run, t.slot, t.answer_id, t.server," \
	"  t.options, t.steps, t.prompt_tokens + t.completion_tokens AS tokens" \
	"), job AS (" \
	" UPDATE chat.chat_job AS j SET holder = $1, epoch = j.epoch + 1," \
	"  attempts = j.attempts + 1, reset = false, rerun = false" \
	/* an equation could be merged: all jobs read, if none were last seen */ \
	" FROM task AS t WHERE j.id = ANY (ARRAY[t.id])" \
	" RETURNING t.*, j.epoch, j.owner, j.attempts, j.crashes, j.cancel," \
	"  j.last_seq, j.blamed, j.waited, j.shrink_to," \
	"  COALESCE((j.spent->>'total_tokens')::bigint, 0) AS spent" \
	"), session AS (" \
	" UPDATE chat.chat_session AS s" \
	" SET next_sequence = s.next_sequence + 1, updated_at = now()" \
	" FROM old AS o WHERE s.id = o.session_id AND o.input IS NOT NULL" \
	"  AND NOT $5)" \
	" SELECT j.id, j.epoch, j.session_id, j.task_id, j.answer_id," \
	"  j.owner, j.attempts, j.crashes, j.run < 0," \
	"  j.cancel, j.this_run, j.last_seq, j.slot, j.channel::text," \
	"  j.server::text, j.user_id, CASE WHEN $5 THEN '{}'" \
	"   ELSE (j.settings || j.options)::text END," \
	"  j.new_run, j.reset, j.steps, j.blamed," \
	"  j.untitled AND j.input->>'role' = 'user'," \
	"  j.tokens + j.spent, j.waited, j.shrink_to, j.summary," \
	"  j.summary_sequence, j.summary_failed, j.next_sequence, j.message_id," \
	"  CASE WHEN NOT $5 THEN j.input->>'role' END," \
	"  j.input->>'content', COALESCE(j.input->'metadata', '{}')" \
	" FROM job AS j ORDER BY j.id"

/*
 * $1 holder, $2 limit, $3 database, $4 first run of this timeline, $5 bare
 *
 * The queued message becomes a message: it takes its sequence when its turn
 * starts.  A bare claim leaves it out, and the settings: for a job whose claim
 * failed.
 */
CHAT_STMT(claim_jobs,
		  "WITH picked AS MATERIALIZED ("
		  " SELECT" PICKED_COLUMNS " FROM chat.chat_job AS j"
		  " JOIN chat.chat_session AS s ON s.id = j.session_id"
		  " WHERE" CLAIMABLE("$3")
		  " ORDER BY j.priority, j.run_at, j.id LIMIT $2"
		  " FOR UPDATE OF j SKIP LOCKED"
		  " FOR NO KEY UPDATE OF s SKIP LOCKED"
		  TAKE_PICKED,
		  INT8OID, INT4OID, OIDOID, INT4OID, BOOLOID);

/* The same for jobs that shall end. */
CHAT_STMT(claim_cancelled,
		  "WITH picked AS MATERIALIZED ("
		  " SELECT" PICKED_COLUMNS " FROM chat.chat_job AS j"
		  " JOIN chat.chat_session AS s ON s.id = j.session_id"
		  " WHERE" CANCELLED("$3")
		  " LIMIT $2"
		  " FOR UPDATE OF j SKIP LOCKED"
		  " FOR NO KEY UPDATE OF s SKIP LOCKED"
		  TAKE_PICKED,
		  INT8OID, INT4OID, OIDOID, INT4OID, BOOLOID);

/*
 * The same when there is less room than jobs.  $6 owners and $7 how many of
 * their jobs are at work here, $8 servers and $9 how many more they take
 *
 * The owner with the fewest jobs at work has the next turn (T27).
 */
CHAT_STMT(claim_fairly,
		  "WITH RECURSIVE " PAIRS("$3") ", open AS MATERIALIZED ("
		  " SELECT p.server, p.owner, COALESCE(h.n, 0) AS held,"
		  "  LEAST(COALESCE(r.room, $2), $2) AS room"
		  " FROM pair AS p"
		  " LEFT JOIN ROWS FROM (unnest($6), unnest($7)) AS h (owner, n)"
		  "  ON h.owner = p.owner"
		  " LEFT JOIN ROWS FROM (unnest($8), unnest($9)) AS r (server, room)"
		  "  ON r.server = p.server::text"
		  " WHERE COALESCE(r.room, 1) > 0"
		  "), candidate AS MATERIALIZED ("
		  " SELECT c.id, c.priority, c.run_at, o.server, o.room, o.held"
		  "   + row_number() OVER (PARTITION BY o.owner"
		  "    ORDER BY c.priority, c.run_at, c.id) AS turn"
		  " FROM open AS o CROSS JOIN LATERAL ("
		  "  SELECT j.id, j.priority, j.run_at FROM chat.chat_job AS j"
		  "  WHERE j.server = o.server AND j.owner = o.owner AND"
		  CLAIMABLE("$3")
		  "  ORDER BY j.priority, j.run_at, j.id LIMIT o.room) AS c"
		  "), ranked AS ("
		  " SELECT c.*, row_number() OVER (PARTITION BY c.server"
		  "  ORDER BY c.priority, c.turn, c.run_at, c.id) AS place"
		  " FROM candidate AS c"
		  "), chosen AS MATERIALIZED ("
		  " SELECT r.id FROM ranked AS r WHERE r.place <= r.room"
		  " ORDER BY r.priority, r.turn, r.run_at, r.id LIMIT $2"
		  "), picked AS MATERIALIZED ("
		  " SELECT" PICKED_COLUMNS " FROM chat.chat_job AS j"
		  " JOIN chat.chat_session AS s ON s.id = j.session_id"
		  " WHERE j.id = ANY (ARRAY(SELECT c.id FROM chosen AS c))"
		  "  AND j.holder IS NULL"
		  " FOR UPDATE OF j SKIP LOCKED"
		  " FOR NO KEY UPDATE OF s SKIP LOCKED"
		  TAKE_PICKED,
		  INT8OID, INT4OID, OIDOID, INT4OID, BOOLOID, OIDARRAYOID,
		  INT4ARRAYOID, TEXTARRAYOID, INT4ARRAYOID);

/*
 * $1 database, $2 servers that have no room: what is due and unclaimed, and
 * when the next one is due
 */
CHAT_STMT(queue_rest,
		  "WITH RECURSIVE " PAIRS("$1") ", due AS MATERIALIZED ("
		  " SELECT p.server::text = ANY ($2) AS closed FROM pair AS p"
		  " CROSS JOIN LATERAL (SELECT FROM chat.chat_job AS j"
		  "  WHERE j.server = p.server AND j.owner = p.owner AND"
		  CLAIMABLE("$1") " LIMIT 1) AS one)"
		  " SELECT EXISTS (SELECT FROM due WHERE NOT closed),"
		  " cardinality($2) > 0 AND EXISTS (SELECT FROM due WHERE closed),"
		  " EXISTS (SELECT FROM chat.chat_job AS j"
		  "  WHERE" CANCELLED("$1") "),"
		  " (SELECT j.run_at FROM chat.chat_job AS j"
		  "  WHERE j.holder IS NULL AND j.database = $1"
		  "   AND j.run_at > '-infinity' AND j.run_at > now()"
		  "   AND j.run_at < 'infinity' ORDER BY j.run_at LIMIT 1),"
		  " EXISTS (SELECT FROM chat.chat_job AS j WHERE j.holder IS NULL"
		  "  AND j.parked AND j.database = $1 AND j.run_at <= now()),"
		  " EXISTS (SELECT FROM chat.chat_job AS j WHERE j.holder IS NULL"
		  "  AND j.parked AND j.database = $1),"
		  " EXISTS (SELECT FROM chat.chat_job AS j WHERE j.holder IS NULL"
		  "  AND j.tool_kind = 'sql' AND j.database = $1"
		  "  AND j.run_at <= now())"
		  " OR EXISTS (SELECT FROM chat.chat_job AS j WHERE j.holder IS NULL"
		  "  AND j.tool_kind = 'http' AND j.database = $1"
		  "  AND j.run_at <= now()),"
		  " EXISTS (SELECT FROM chat.chat_job AS j WHERE j.holder IS NULL"
		  "  AND j.kind IN ('title', 'summary') AND j.database = $1"
		  "  AND j.run_at <= now())",
		  OIDOID, TEXTARRAYOID);

/* $1 sessions: locks those that nobody else has locked */
CHAT_STMT(lock_sessions,
		  "SELECT id FROM chat.chat_session WHERE id = ANY($1) ORDER BY id"
		  " FOR NO KEY UPDATE SKIP LOCKED",
		  UUIDARRAYOID);

/*
 * $1 holder, $2 database, then arrays: $3 job, $4 epoch, $5 session, $6 task,
 * $7 status, $8 error, $9 has message, $10 model, $11 prompt tokens,
 * $12 completion tokens, $13 usage, $14 context tokens, $15 compaction
 *
 * P2: usage, terminal state, removal of the job and the next task's job are
 * one statement; message and terminal event join it in the transaction.
 */
CHAT_STMT(finish_jobs,
		  "WITH e AS MATERIALIZED (SELECT * FROM ROWS FROM ("
		  "  unnest($3), unnest($4), unnest($5), unnest($6), unnest($7),"
		  "  unnest($8), unnest($9), unnest($10), unnest($11), unnest($12),"
		  "  unnest($13), unnest($14), unnest($15)) AS u (job, epoch, session,"
		  "  task, status, error, has_message, model, prompt, completion,"
		  "  usage, context, compaction)"
		  CHAT_FEW("$3")
		  "), gone AS ("
		  " DELETE FROM chat.chat_job AS j USING e"
		  " WHERE j.id = e.job AND j.epoch = e.epoch"
		  "  AND j." CHAT_HELD_BY("$1") " RETURNING e.*, j.spent"
		  "), ok AS MATERIALIZED ("
		  " SELECT gone.*, s.next_sequence, s.owner,"
		  "  t.superseded IS NOT DISTINCT FROM 'rollback' AS hide"
		  " FROM gone JOIN chat.chat_session AS s ON s.id = gone.session"
		  " JOIN chat.chat_task AS t ON t.id = gone.task"
		  /* of a task that was rolled back the model sees nothing */
		  "), hidden AS ("
		  " UPDATE chat.chat_message AS m SET active = false,"
		  "  superseded_by = ok.next_sequence + ok.has_message::int"
		  " FROM ok WHERE ok.hide AND m.session_id = ok.session"
		  "  AND m.task_id = ok.task AND m.active"
		  "), session AS ("
		  " UPDATE chat.chat_session AS s"
		  " SET next_sequence = s.next_sequence + ok.has_message::int,"
		  "  total_prompt_tokens"
		  "   = s.total_prompt_tokens + " CHAT_STEP_TOKENS("prompt") ","
		  "  total_completion_tokens = s.total_completion_tokens"
		  "   + " CHAT_STEP_TOKENS("completion") ","
		  "  updated_at = now()"
		  " FROM ok WHERE s.id = ok.session"
		  "), task AS ("
		  " UPDATE chat.chat_task AS t SET status = ok.status,"
		  "  error = ok.error::jsonb, finished_at = now(),"
		  "  steps = t.steps + (ok.usage IS NOT NULL)::int,"
		  "  prompt_tokens"
		  "   = t.prompt_tokens + " CHAT_STEP_TOKENS("prompt") ","
		  "  completion_tokens"
		  "   = t.completion_tokens + " CHAT_STEP_TOKENS("completion") ","
		  "  model = COALESCE(ok.model, t.model),"
		  CHAT_STEP_WINDOW("t") ","
		  "  usage = " CHAT_STEP_USAGE("t")
		  " FROM ok WHERE t.id = ok.task"
		  /* a task that waits for the session to be free */
		  "), parked AS ("
		  " UPDATE chat.chat_job AS j SET run_at = '-infinity'"
		  " FROM ok WHERE j.session_id = ok.session AND j.parked"
		  "  AND j.id <> ok.job"
		  "), next AS ("
		  " INSERT INTO chat.chat_job (kind, session_id, task_id, server,"
		  "  owner, database, cancel)"
		  " SELECT 'completion', f.session, q.id, q.server, f.owner, $2,"
		  "  q.superseded IS NOT NULL"
		  " FROM (SELECT DISTINCT session, owner FROM ok) AS f"
		  " CROSS JOIN LATERAL (SELECT t.* FROM chat.chat_task AS t"
		  "  WHERE t.session_id = f.session AND t.status = 'queued'"
		  "  ORDER BY t.place LIMIT 1) AS q"
		  " WHERE NOT EXISTS (SELECT FROM chat.chat_job AS o"
		  "  WHERE o.session_id = f.session AND o.task_id = q.id"
		  "   AND o.kind = 'completion' OFFSET 0)"
		  /* a task that was detached ends while another has the session */
		  " AND NOT EXISTS (SELECT FROM chat.chat_task AS b"
		  "  WHERE b.session_id = f.session AND b.status = 'waiting'"
		  "   AND NOT b.detached AND b.id NOT IN (SELECT task FROM ok) OFFSET 0))"
		  " SELECT job, next_sequence, hide FROM ok",
		  INT8OID, OIDOID, INT8ARRAYOID, INT8ARRAYOID, UUIDARRAYOID,
		  UUIDARRAYOID, TEXTARRAYOID, TEXTARRAYOID, BOOLARRAYOID,
		  TEXTARRAYOID, INT8ARRAYOID, INT8ARRAYOID, TEXTARRAYOID,
		  INT8ARRAYOID, TEXTARRAYOID);

/*
 * $1 holder, then arrays: $2 job, $3 epoch, $4 run at, $5 reset, $6 last seq,
 * $7 attempts to give back, $8 what they wait for, $9 tokens of the next
 * request or 0, $10 usage of the attempt or NULL.  Does not wait for a row
 * that is locked: whoever deletes a session does, and then the job is gone
 * anyway.
 */
CHAT_STMT(release_jobs,
		  "WITH e AS MATERIALIZED (SELECT * FROM ROWS FROM ("
		  "  unnest($2), unnest($3), unnest($4), unnest($5), unnest($6),"
		  "  unnest($7), unnest($8), unnest($9), unnest($10))"
		  "  AS u (job, epoch, run_at, reset, last_seq, refund, waited, shrink,"
		  "  usage)" CHAT_FEW("$2")
		  "), mine AS ("
		  " SELECT e.* FROM chat.chat_job AS j JOIN e ON e.job = j.id"
		  "  AND e.epoch = j.epoch WHERE j." CHAT_HELD_BY("$1")
		  " FOR UPDATE OF j SKIP LOCKED)"
		  " UPDATE chat.chat_job AS j SET holder = NULL,"
		  /* an attempt that failed while it was cancelled is not repeated */
		  "  run_at = CASE WHEN j.cancel THEN '-infinity' ELSE mine.run_at END,"
		  "  reset = mine.reset, last_seq = mine.last_seq,"
		  "  attempts = j.attempts - mine.refund, waited = j.waited | mine.waited,"
		  "  shrink_to = COALESCE(NULLIF(mine.shrink, 0), j.shrink_to),"
		  "  spent = CASE WHEN mine.usage IS NULL THEN j.spent"
		  "   ELSE chat.add_usage(j.spent, mine.usage::jsonb) END"
		  " FROM mine WHERE j.id = mine.job"
		  " RETURNING j.id",
		  INT8OID, INT8ARRAYOID, INT8ARRAYOID, TIMESTAMPTZARRAYOID,
		  BOOLARRAYOID, INT8ARRAYOID, INT4ARRAYOID, INT4ARRAYOID,
		  INT8ARRAYOID, TEXTARRAYOID);

/* $1 database */
CHAT_STMT(list_holders,
		  "SELECT DISTINCT holder FROM chat.chat_job"
		  " WHERE database = $1 AND holder IS NOT NULL",
		  OIDOID);

/* $1 database, $2 identities of the dead */
CHAT_STMT(adopt_orphans,
		  "UPDATE chat.chat_job SET holder = NULL, crashes = crashes + 1,"
		  " attempts = attempts - 1,"
		  " rerun = true, reset = true, run_at = '-infinity'"
		  " WHERE database = $1 AND holder IS NOT NULL AND kind <> 'tool'"
		  " AND holder = ANY ($2)",
		  OIDOID, INT8ARRAYOID);

/* $1 jobs that a worker was at work on when it crashed */
CHAT_STMT(blame_jobs,
		  "UPDATE chat.chat_job SET blamed = blamed + 1 WHERE id = ANY ($1)",
		  INT8ARRAYOID);

/*
 * The same for tool calls, $3 being the crashes that end one.  A SQL tool and
 * its result are one transaction: it has had no effect and runs again (unless
 * it takes its worker down each time).  Of an HTTP tool nobody knows, so only
 * an idempotent one does.
 */
CHAT_STMT(adopt_calls,
		  "WITH dead AS MATERIALIZED ("
		  " SELECT j.id, j.operation_id, j.session_id, j.task_id,"
		  "  (c.kind = 'sql' OR c.idempotent) AND j.crashes + 1 < $3 AS again"
		  " FROM chat.chat_job AS j JOIN chat.chat_tool_call AS c"
		  "  ON c.operation_id = j.operation_id"
		  " WHERE j.database = $1 AND j.kind = 'tool'"
		  "  AND j.holder = ANY ($2)"
		  "), again AS ("
		  " UPDATE chat.chat_job AS j SET holder = NULL,"
		  "  crashes = j.crashes + 1, run_at = '-infinity'"
		  " FROM dead WHERE j.id = dead.id AND dead.again"
		  "), lost AS ("
		  " DELETE FROM chat.chat_job AS j USING dead"
		  " WHERE j.id = dead.id AND NOT dead.again"
		  " RETURNING dead.operation_id, dead.session_id, dead.task_id"
		  "), call AS ("
		  " UPDATE chat.chat_tool_call AS c SET status = 'failed',"
		  "  ended_at = now(), result = json_build_object('type', 'error',"
		  "   'message', 'Tool ' || c.name || ' failed: outcome unknown, it"
		  " was interrupted', 'code', 'tool_unknown_outcome')::text"
		  " FROM lost WHERE c.operation_id = lost.operation_id"
		  "  AND c.ended_at IS NULL"
		  "), ring AS ("
		  " UPDATE chat.chat_job AS p SET run_at = '-infinity' FROM lost"
		  " WHERE p.session_id = lost.session_id"
		  "  AND p.task_id = lost.task_id AND p.kind = 'completion'"
		  "  AND p.parked)"
		  " SELECT id FROM dead",
		  OIDOID, INT8ARRAYOID, INT4OID);

/*
 * $1 database: sessions with unfinished tasks and no job.  Every session with
 * such a task has one, except in a database that was restored or copied, or
 * whose queue somebody has emptied.
 */
#define HAS_NO_JOB(session) \
	" NOT EXISTS (SELECT FROM chat.chat_job AS j" \
	"  WHERE j.session_id = " session " AND j.database = $1 OFFSET 0)"

/* by the index of each status: there may be millions of tasks that have ended */
#define STRAY_SESSIONS \
	" SELECT t.session_id FROM (SELECT q.session_id FROM chat.chat_task AS q" \
	"  WHERE q.status = 'queued'" \
	" UNION ALL SELECT r.session_id FROM chat.chat_task AS r" \
	"  WHERE r.status = 'running'" \
	" UNION ALL SELECT w.session_id FROM chat.chat_task AS w" \
	"  WHERE w.status = 'waiting') AS t WHERE" HAS_NO_JOB("t.session_id")

CHAT_STMT(count_strays,
		  "SELECT count(DISTINCT n.session_id) FROM (" STRAY_SESSIONS ") AS n",
		  OIDOID);

/* $1 database: the same, locked */
CHAT_STMT(lock_strays,
		  "SELECT s.id FROM chat.chat_session AS s"
		  " WHERE s.id = ANY (ARRAY(" STRAY_SESSIONS "))"
		  " ORDER BY s.id FOR NO KEY UPDATE OF s SKIP LOCKED",
		  OIDOID);

/* $1 database, $2 first run of this timeline, $3 sessions, locked */
CHAT_STMT(end_strays,
		  "WITH foreign_job AS ("
		  " DELETE FROM chat.chat_job AS j WHERE j.database <> $1"
		  "  AND j.session_id = ANY ($3)"
		  "), task AS ("
		  " UPDATE chat.chat_task AS t SET status = 'failed',"
		  "  finished_at = now(), run = GREATEST(t.run + 1, $2),"
		  "  error = '{\"code\": \"restored\", \"retryable\": true,"
		  "   \"message\": \"" CHAT_STRAY_MESSAGE "\"}'"
		  " WHERE t.session_id = ANY ($3)"
		  "  AND t.status IN ('queued', 'running', 'waiting')"
		  "  AND" HAS_NO_JOB("t.session_id")
		  " RETURNING t.id, t.session_id, t.run, t.slot)"
		  " SELECT task.id, task.run, task.slot, s.channel::text,"
		  "  EXISTS (SELECT FROM chat.chat_event AS e"
		  "   WHERE e.slot = task.slot AND e.task_id = task.id)"
		  " FROM task JOIN chat.chat_session AS s ON s.id = task.session_id",
		  OIDOID, INT4OID, UUIDARRAYOID);

/*
 * $1 database, $2 ms that the clock was set back: what was to come in the
 * near future still is.  What another worker has moved already is no more
 * than half of that away.
 */
CHAT_STMT(move_times,
		  "WITH moved AS ("
		  " UPDATE chat.chat_tool_call AS c"
		  " SET deadline = c.deadline - $2 * '1 ms'::interval"
		  /* a call that has not ended is of a task that has a job */
		  " FROM (SELECT DISTINCT j.task_id FROM chat.chat_job AS j"
		  "  WHERE j.database = $1 AND j.task_id IS NOT NULL) AS w"
		  " WHERE c.task_id = w.task_id AND c.ended_at IS NULL"
		  "  AND c.deadline > now() + $2 * '0.5 ms'::interval)"
		  " UPDATE chat.chat_job SET run_at = run_at - $2 * '1 ms'::interval"
		  " WHERE database = $1 AND holder IS NULL AND isfinite(run_at)"
		  "  AND run_at > now() + $2 * '0.5 ms'::interval",
		  OIDOID, INT8OID);

/* $1 holder */
CHAT_STMT(held_jobs,
		  "SELECT id, epoch, cancel FROM chat.chat_job WHERE holder = $1"
		  " ORDER BY id",
		  INT8OID);

/* $1 holder */
CHAT_STMT(count_held,
		  "SELECT count(*), COALESCE(sum(epoch), 0)::bigint"
		  " FROM chat.chat_job WHERE holder = $1 AND kind = 'completion'",
		  INT8OID);

/* Reads one row of claim_jobs. */
static void
read_job(ChatJob *job, uint64 row)
{
	int64		run = chat_db_int32(row, 11, 0);
	bool		new_run = chat_db_bool(row, 18);

	job->id = chat_db_int64(row, 1, 0);
	job->epoch = chat_db_int64(row, 2, 0);
	job->session = chat_db_uuid(row, 3);
	job->task = chat_db_uuid(row, 4);
	job->answer = chat_db_uuid(row, 5);
	job->owner = chat_db_oid(row, 6);
	job->attempts = chat_db_int32(row, 7, 0);
	job->crashes = chat_db_int32(row, 8, 0);
	job->blamed = chat_db_int32(row, 21, 0);
	job->first = chat_db_bool(row, 9);
	job->cancel = chat_db_bool(row, 10);
	job->seq = new_run ? run << 32 : chat_db_int64(row, 12, 0);
	job->slot = DatumGetInt16(chat_db_datum(row, 13, &(bool) {false}));
	job->channel = chat_db_text(row, 14);
	job->server = chat_db_text(row, 15);
	job->user_id = chat_db_text(row, 16);
	job->settings = chat_db_text(row, 17);
	job->steps = chat_db_int32(row, 20, 0);
	job->untitled = chat_db_bool(row, 22);
	job->tokens = chat_db_int64(row, 23, 0);
	job->waited = chat_db_int32(row, 24, 0);
	job->shrink_to = chat_db_int64(row, 25, 0);
	job->summary = chat_db_text(row, 26);
	job->summary_sequence = chat_db_int64(row, 27, 0);
	job->summary_failed = chat_db_bool(row, 28);
	job->reset = !job->first && (new_run || chat_db_bool(row, 19));
}

/*
 * Returns the first run of this timeline: a promotion starts a new range, so
 * that no number is used twice whatever the old primary has notified.
 */
int32
chat_queue_first_run(void)
{
	return (int32) (GetWALInsertionTimeLine() - 1) * RUNS_PER_TIMELINE;
}

/* Says what of the queue is left when these jobs were claimed. */
static void
read_rest(const ChatClaim *claim, const ChatJob *jobs, int n,
		  ChatQueueRest *rest)
{
	Datum	   *closed = palloc(sizeof(Datum) * Max(claim->nservers, 1));
	Datum		values[2] = {ObjectIdGetDatum(MyDatabaseId)};
	int			nclosed = 0;
	bool		isnull;
	Datum		next;

	for (int i = 0; i < claim->nservers; i++)
	{
		int			room = claim->rooms[i];

		for (int k = 0; k < n; k++)
			room -= strcmp(jobs[k].server, claim->servers[i]) == 0;
		if (room <= 0)
			closed[nclosed++] = CStringGetTextDatum(claim->servers[i]);
	}
	values[1] = chat_db_array(&chat_texts, closed, nclosed);
	chat_db_exec(&queue_rest, values, NULL);
	rest->due = chat_db_bool(0, 1);
	rest->closed = chat_db_bool(0, 2);
	rest->cancelled = chat_db_bool(0, 3);
	next = chat_db_datum(0, 4, &isnull);
	rest->next_run = isnull ? DT_NOEND : DatumGetTimestampTz(next);
	rest->turns = chat_db_bool(0, 5);
	rest->parked = chat_db_bool(0, 6);
	rest->tools = chat_db_bool(0, 7);
	rest->sides = chat_db_bool(0, 8);
}

/* Sets the parameters of a fair claim. */
static void
set_shares(const ChatClaim *claim, Datum *params)
{
	int			n = claim->nowners;
	Datum	   *values = palloc(sizeof(Datum) * (n + claim->nservers + 1));
	int			at = 0;

	CHAT_DB_COLUMN(chat_oids, ObjectIdGetDatum(claim->owners[i]));
	CHAT_DB_COLUMN(chat_int4s, Int32GetDatum(claim->held[i]));
	n = claim->nservers;
	CHAT_DB_COLUMN(chat_texts, CStringGetTextDatum(claim->servers[i]));
	CHAT_DB_COLUMN(chat_int4s, Int32GetDatum(claim->rooms[i]));
}

/* Stores the messages that start the turns of a claim's jobs. */
static void
add_questions(const ChatJob *jobs, int n)
{
	ChatNewMessage *messages = palloc0(sizeof(ChatNewMessage) * n);
	pg_uuid_t  *ids = palloc(sizeof(pg_uuid_t) * n);
	int			nmessages = 0;

	chat_db_new_ids(ids, n);
	for (int i = 0; i < n; i++)
	{
		ChatNewMessage *m = &messages[nmessages];
		bool		isnull;

		m->role = chat_db_datum(i, 31, &isnull);
		if (isnull)
			continue;
		m->session = jobs[i].session;
		m->task = jobs[i].task;
		m->sequence = chat_db_int64(i, 29, 0);
		m->id = chat_db_isnull(i, 30) ? ids[i] : chat_db_uuid(i, 30);
		m->content = chat_db_datum(i, 32, &isnull);
		m->metadata = chat_db_datum(i, 33, &isnull);
		nmessages++;
	}
	chat_append_messages(messages, nmessages);
}

/*
 * Takes up to limit due jobs; returns how many.  The array is allocated in
 * the SPI context.
 */
int
chat_queue_claim(const ChatClaim *claim, ChatJob **jobs, ChatQueueRest *rest)
{
	Datum		values[9];
	ChatStmt   *stmt = &claim_jobs;
	int			n = 0;

	values[0] = Int64GetDatum(claim->holder);
	values[1] = Int32GetDatum(claim->limit);
	values[2] = ObjectIdGetDatum(MyDatabaseId);
	values[3] = Int32GetDatum(chat_queue_first_run());
	values[4] = BoolGetDatum(claim->bare);
	if (claim->cancelled)
		stmt = &claim_cancelled;
	else if (claim->fair)
	{
		stmt = &claim_fairly;
		set_shares(claim, &values[5]);
	}
	if (claim->limit > 0)
		n = (int) chat_db_exec(stmt, values, NULL);
	*jobs = palloc0(sizeof(ChatJob) * Max(n, 1));
	for (int i = 0; i < n; i++)
		read_job(&(*jobs)[i], i);
	if (n > 0)
		add_questions(*jobs, n);
	read_rest(claim, *jobs, n, rest);
	return n;
}

static const char *const status_names[] = {
	[CHAT_END_COMPLETED] = "completed",
	[CHAT_END_FAILED] = "failed",
	[CHAT_END_CANCELLED] = "cancelled",
};

/* Keeps in ends[] only those whose session could be locked. */
int
chat_queue_lock(ChatEnd **ends, int n, ChatEnd **locked)
{
	Datum	   *values = palloc(sizeof(Datum) * n);
	Datum		params[1];
	uint64		got;
	int			nlocked = 0;

	for (int i = 0; i < n; i++)
		values[i] = UUIDPGetDatum(&ends[i]->job->session);
	params[0] = chat_db_array(&chat_uuids, values, n);
	got = chat_db_exec(&lock_sessions, params, NULL);
	if (got == (uint64) n)
	{
		memcpy(locked, ends, sizeof(ChatEnd *) * n);
		return n;
	}
	for (int i = 0; i < n; i++)
	{
		ends[i]->missed = true;
		for (uint64 row = 0; row < got && ends[i]->missed; row++)
		{
			pg_uuid_t	id = chat_db_uuid(row, 1);

			if (memcmp(&id, &ends[i]->job->session, UUID_LEN) == 0)
			{
				ends[i]->missed = false;
				locked[nlocked++] = ends[i];
			}
		}
	}
	return nlocked;
}

/*
 * Returns the end of the job whose id a row begins with, marked as stored;
 * NULL if there is none.  The rows come mostly in the order of the ends: *at
 * is where to look first.
 */
static ChatEnd *
mark_end(uint64 row, ChatEnd **ends, int n, int *at)
{
	int64		id = chat_db_int64(row, 1, 0);

	for (int tries = 0; tries < n; tries++, *at = (*at + 1) % n)
	{
		if (ends[*at]->job->id != id)
			continue;
		ends[*at]->ok = true;
		return ends[*at];
	}
	return NULL;
}

/* Marks the ends whose job id the last statement returned. */
void
chat_queue_mark(ChatEnd **ends, int n)
{
	uint64		rows = SPI_processed;
	int			at = 0;

	for (uint64 row = 0; row < rows; row++)
		(void) mark_end(row, ends, n, &at);
}

/* Parses a JSON text; (Datum) 0 if there is none. */
static Datum
json_or_null(const char *text)
{
	return text ? DirectFunctionCall1(jsonb_in, CStringGetDatum(text))
		: (Datum) 0;
}

/* Returns the name of the model that a message's metadata have, or NULL. */
static Datum
model_of(Datum metadata)
{
	JsonbValue	v;

	if (getKeyJsonValueFromContainer(&DatumGetJsonbP(metadata)->root, "model",
									 5, &v) == NULL || v.type != jbvString)
		return (Datum) 0;
	return PointerGetDatum(cstring_to_text_with_len(v.val.string.val,
													v.val.string.len));
}

/*
 * Stores the answers of the ends that the last statement has stored: it tells
 * the sequence, and whether the model sees nothing of the task.
 */
static void
add_answers(ChatEnd **ends, const Datum *metadata, int n)
{
	uint64		rows = SPI_processed;
	ChatNewMessage *messages = palloc0(sizeof(ChatNewMessage) * n);
	Datum		role = CStringGetTextDatum("assistant");
	int			nmessages = 0;
	int			at = 0;

	for (uint64 row = 0; row < rows; row++)
	{
		ChatEnd    *e = mark_end(row, ends, n, &at);
		ChatNewMessage *m = &messages[nmessages];

		if (e == NULL || !e->has_message)
			continue;
		m->session = e->job->session;
		m->task = e->job->task;
		m->sequence = chat_db_int64(row, 2, 0);
		m->superseded_by = chat_db_bool(row, 3) ? m->sequence + 1 : 0;
		m->id = e->job->answer;
		m->role = role;
		m->content = chat_db_text_or_null(e->content);
		m->refusal = chat_db_text_or_null(e->refusal);
		m->tool_calls = json_or_null(e->tool_calls);
		m->function_call = json_or_null(e->function_call);
		m->metadata = metadata[at];
		nmessages++;
	}
	chat_append_messages(messages, nmessages);
}

/*
 * Ends tasks: of the given ends those get ok whose job was still ours, and
 * those get missed whose session somebody holds locked (or has deleted).
 */
void
chat_queue_finish(int64 holder, ChatEnd **all, int nall)
{
	ChatEnd   **ends = palloc(sizeof(ChatEnd *) * nall);
	int			n = chat_queue_lock(all, nall, ends);
	Datum	   *values = palloc(sizeof(Datum) * nall);
	Datum	   *metadata = palloc(sizeof(Datum) * nall);
	Datum		params[15];
	int			at = 0;

	if (n == 0)
		return;
	for (int i = 0; i < n; i++)
		metadata[i] = json_or_null(ends[i]->metadata);
	params[at++] = Int64GetDatum(holder);
	params[at++] = ObjectIdGetDatum(MyDatabaseId);
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->job->id));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->job->epoch));
	CHAT_DB_COLUMN(chat_uuids, UUIDPGetDatum(&ends[i]->job->session));
	CHAT_DB_COLUMN(chat_uuids, UUIDPGetDatum(&ends[i]->job->task));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(status_names[ends[i]->kind]));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(ends[i]->error));
	CHAT_DB_COLUMN(chat_bools, BoolGetDatum(ends[i]->has_message));
	CHAT_DB_COLUMN(chat_texts, model_of(metadata[i]));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->prompt_tokens));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->completion_tokens));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(ends[i]->usage));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->context_tokens));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(ends[i]->compaction));
	chat_db_exec(&finish_jobs, params, NULL);
	add_answers(ends, metadata, n);
}

/* Gives jobs back to the queue: to be tried again, or as if never taken. */
void
chat_queue_release(int64 holder, ChatEnd **ends, int n)
{
	Datum	   *values = palloc(sizeof(Datum) * n);
	Datum		params[10];
	int			at = 0;

	params[at++] = Int64GetDatum(holder);
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->job->id));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->job->epoch));
	CHAT_DB_COLUMN(chat_times, TimestampTzGetDatum(ends[i]->run_at));
	CHAT_DB_COLUMN(chat_bools, BoolGetDatum(ends[i]->reset));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->last_seq));
	CHAT_DB_COLUMN(chat_int4s, Int32GetDatum(ends[i]->kind == CHAT_END_GIVE_BACK));
	CHAT_DB_COLUMN(chat_int4s, Int32GetDatum(ends[i]->waited));
	CHAT_DB_COLUMN(chat_int8s, Int64GetDatum(ends[i]->shrink_to));
	CHAT_DB_COLUMN(chat_texts, chat_db_text_or_null(ends[i]->usage));
	chat_db_exec(&release_jobs, params, NULL);
	chat_queue_mark(ends, n);
}

/* Counts the crashes that jobs have caused. */
void
chat_queue_blame(const int64 *jobs, int n)
{
	Datum	   *values = palloc(sizeof(Datum) * n);
	Datum		params[1];

	for (int i = 0; i < n; i++)
		values[i] = Int64GetDatum(jobs[i]);
	params[0] = chat_db_array(&chat_int8s, values, n);
	chat_db_exec(&blame_jobs, params, NULL);
}

/*
 * Lists who holds jobs; returns how many.  Who lives is asked afterwards: a
 * worker that comes in between is not seen here, and not taken for dead.
 */
int
chat_queue_holders(int64 **holders)
{
	Datum		params[1] = {ObjectIdGetDatum(MyDatabaseId)};
	int			n = (int) chat_db_exec(&list_holders, params, NULL);

	*holders = palloc(sizeof(int64) * Max(n, 1));
	for (int i = 0; i < n; i++)
		(*holders)[i] = chat_db_int64(i, 1, 0);
	return n;
}

/*
 * Frees the jobs of holders that are dead; returns how many.  A tool call
 * that has lost so many workers fails.
 */
int
chat_queue_adopt(const int64 *dead, int ndead, int max_crashes)
{
	Datum	   *values = palloc(sizeof(Datum) * Max(ndead, 1));
	Datum		params[3];
	int			n;

	for (int i = 0; i < ndead; i++)
		values[i] = Int64GetDatum(dead[i]);
	params[0] = ObjectIdGetDatum(MyDatabaseId);
	params[1] = chat_db_array(&chat_int8s, values, ndead);
	params[2] = Int32GetDatum(max_crashes);
	n = (int) chat_db_exec(&adopt_orphans, params, NULL);
	return n + (int) chat_db_exec(&adopt_calls, params, NULL);
}

/*
 * Ends the tasks that no job will end; returns how many.  skipped = somebody
 * holds one of their sessions locked: look again later.
 */
int
chat_queue_strays(ChatStray **strays, bool *skipped)
{
	Datum		params[3] = {ObjectIdGetDatum(MyDatabaseId)};
	int64		sessions;
	int			n;
	Datum	   *values;
	pg_uuid_t  *ids;

	chat_db_exec(&count_strays, params, NULL);
	sessions = chat_db_int64(0, 1, 0);
	n = sessions > 0 ? (int) chat_db_exec(&lock_strays, params, NULL) : 0;
	*skipped = sessions > n;
	values = palloc(sizeof(Datum) * (n + 1));
	ids = palloc(sizeof(pg_uuid_t) * (n + 1));
	for (int i = 0; i < n; i++)
	{
		ids[i] = chat_db_uuid(i, 1);
		values[i] = UUIDPGetDatum(&ids[i]);
	}
	params[1] = Int32GetDatum(chat_queue_first_run());
	params[2] = chat_db_array(&chat_uuids, values, n);
	n = n > 0 ? (int) chat_db_exec(&end_strays, params, NULL) : 0;
	*strays = palloc0(sizeof(ChatStray) * (n + 1));
	for (int i = 0; i < n; i++)
	{
		ChatStray  *s = &(*strays)[i];
		bool		isnull;

		s->task = chat_db_uuid(i, 1);
		s->seq = (int64) chat_db_int32(i, 2, 0) << 32;
		s->slot = DatumGetInt16(chat_db_datum(i, 3, &isnull));
		s->channel = chat_db_text(i, 4);
		s->told = !isnull && chat_db_bool(i, 5);
	}
	return n;
}

/* Has what is due in the future come when it should, on another clock. */
void
chat_queue_move(int64 ms)
{
	Datum		values[2] = {ObjectIdGetDatum(MyDatabaseId),
	Int64GetDatum(ms)};

	chat_db_exec(&move_times, values, NULL);
}

/* Lists the jobs that are ours in the table; returns how many. */
int
chat_queue_held(int64 holder, int64 **ids, int64 **epochs, bool **cancels)
{
	Datum		params[1] = {Int64GetDatum(holder)};
	int			n = (int) chat_db_exec(&held_jobs, params, NULL);

	*ids = palloc(sizeof(int64) * Max(n, 1));
	*epochs = palloc(sizeof(int64) * Max(n, 1));
	*cancels = palloc(sizeof(bool) * Max(n, 1));
	for (int i = 0; i < n; i++)
	{
		(*ids)[i] = chat_db_int64(i, 1, 0);
		(*epochs)[i] = chat_db_int64(i, 2, 0);
		(*cancels)[i] = chat_db_bool(i, 3);
	}
	return n;
}

/*
 * True if the table holds exactly our jobs: the fence of a flush of deltas,
 * one scan of a small table instead of a probe for each stream.
 */
bool
chat_queue_intact(int64 holder, int64 count, int64 epochs)
{
	Datum		params[1] = {Int64GetDatum(holder)};

	chat_db_exec(&count_held, params, NULL);
	return chat_db_int64(0, 1, -1) == count &&
		chat_db_int64(0, 2, -1) == epochs;
}
