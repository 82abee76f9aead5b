/*
 * chat.c
 *		The module: a durable LLM chat runtime.
 *
 * What is where: launcher.c and worker.c are the processes; claim.c, flush.c,
 * errand.c and upkeep.c are the parts of a worker's loop, stream.c is one live
 * answer, queue.c, context.c and event.c are what a worker does in the tables,
 * session.c and task.c are the functions that users call.  README.md says what
 * they promise.
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/guc.h"

#include "claim.h"
#include "compat.h"
#include "context.h"
#include "db.h"
#include "debug.h"
#include "event.h"
#include "launcher.h"
#include "pace.h"
#include "prompt.h"
#include "recheck.h"
#include "registry.h"
#include "retention.h"
#include "server.h"
#include "shmem.h"
#include "stream.h"
#include "summary.h"
#include "task.h"
#include "title.h"
#include "tool.h"
#include "turn.h"
#include "upkeep.h"
#include "usage.h"
#include "user.h"
#include "window.h"
#include "worker.h"

CHAT_MODULE_MAGIC;

extern CHAT_INIT_EXPORT void _PG_init(void);

/* Module load: each part declares its settings and installs its hooks. */
void
_PG_init(void)
{
	chat_db_init();
	chat_debug_init();
	chat_shmem_init();
	chat_server_init();
	chat_event_init();
	chat_retention_init();
	chat_context_init();
	chat_stream_init();
	chat_registry_init();
	chat_task_init();
	chat_turn_init();
	chat_tool_init();
	chat_usage_init();
	chat_user_init();
	chat_prompt_init();
	chat_langfuse_init();
	chat_title_init();
	chat_summary_init();
	chat_window_init();
	chat_worker_init();
	chat_recheck_init();
	chat_pace_init();
	chat_claim_init();
	chat_upkeep_init();
	chat_launcher_init();
	MarkGUCPrefixReserved("chat");
}
