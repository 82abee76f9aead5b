/*
 * compat.h
 *		Differences between the PostgreSQL and libcurl versions that are
 *		supported: the only place with version #ifs.
 */
#ifndef CHAT_COMPAT_H
#define CHAT_COMPAT_H

#include "pg_config.h"

#if PG_VERSION_NUM < 150000
#error "chat needs PostgreSQL 15 or later"
#endif

/* --- JSON parser (common/jsonapi.h) --- */

/*
 * Actions of the parser return an error code from 16 on; 17 brings its own
 * way to free a lexer, and 18 constifies the input.
 */
#if PG_VERSION_NUM >= 160000
#define CHAT_JSON_ACTION JsonParseErrorType
#define CHAT_JSON_GO_ON return JSON_SUCCESS
#else
#define CHAT_JSON_ACTION void
#define CHAT_JSON_GO_ON return
#endif

#if PG_VERSION_NUM >= 170000
#define chat_json_lexer(json, len) \
	makeJsonLexContextCstringLen(NULL, (char *) (json), (int) (len), \
								 PG_UTF8, false)
#define chat_json_lexer_free(lex) freeJsonLexContext(lex)
#else
#define chat_json_lexer(json, len) \
	makeJsonLexContextCstringLen((char *) (json), (int) (len), PG_UTF8, false)
#define chat_json_lexer_free(lex) pfree(lex)
#endif

/* --- server --- */

#ifndef FRONTEND

/* 18 has its own word for it */
#define CHAT_NORETURN __attribute__((noreturn))

/* 15 declares neither; its exported functions need the visibility, too. */
#if PG_VERSION_NUM < 160000
#define CHAT_INIT_EXPORT PGDLLEXPORT
#else
#define CHAT_INIT_EXPORT
#endif

#if PG_VERSION_NUM >= 170000
#define chat_wait_event(name) WaitEventExtensionNew(name)
#define chat_wait_event_set(n) CreateWaitEventSet(NULL, (n))
#define chat_proc_by_number(n) GetPGProcByNumber(n)
#define chat_my_proc_number() ((int) MyProcNumber)
#else
#define chat_wait_event(name) PG_WAIT_EXTENSION
#define chat_wait_event_set(n) CreateWaitEventSet(TopMemoryContext, (n))
#define chat_proc_by_number(n) (&ProcGlobal->allProcs[(n)])
#define chat_my_proc_number() ((int) MyProc->pgprocno)
#endif

/* 16 knows indexes that summarize, and can leave out the others. */
#if PG_VERSION_NUM >= 160000
#define chat_insert_index_tuples(result, slot, estate) \
	ExecInsertIndexTuples((result), (slot), (estate), false, false, NULL, \
						  NIL, false)
#else
#define chat_insert_index_tuples(result, slot, estate) \
	ExecInsertIndexTuples((result), (slot), (estate), false, false, NULL, NIL)
#endif

/* 18 counts what a scan does, where it is told to. */
#if PG_VERSION_NUM >= 180000
#define chat_index_beginscan(table, index, snapshot, nkeys) \
	index_beginscan((table), (index), (snapshot), NULL, (nkeys), 0)
#else
#define chat_index_beginscan(table, index, snapshot, nkeys) \
	index_beginscan((table), (index), (snapshot), (nkeys), 0)
#endif

/* From 17 on a background worker may connect as a role without LOGIN. */
#if PG_VERSION_NUM >= 170000
#define CHAT_WORKER_BYPASSES_LOGIN true
#define CHAT_WORKER_CONNECT_FLAGS BGWORKER_BYPASS_ROLELOGINCHECK
#else
#define CHAT_WORKER_BYPASSES_LOGIN false
#define CHAT_WORKER_CONNECT_FLAGS 0
#endif

#if PG_VERSION_NUM >= 160000
#define chat_database_aclcheck(role) \
	object_aclcheck(DatabaseRelationId, MyDatabaseId, (role), ACL_CONNECT)
#else
#define chat_database_aclcheck(role) \
	pg_database_aclcheck(MyDatabaseId, (role), ACL_CONNECT)
#endif

#if PG_VERSION_NUM >= 160000
#define chat_database_owned(database, role) \
	object_ownercheck(DatabaseRelationId, (database), (role))
#else
#define chat_database_owned(database, role) \
	pg_database_ownercheck((database), (role))
#endif

#if PG_VERSION_NUM >= 180000
#define CHAT_MODULE_MAGIC PG_MODULE_MAGIC_EXT(.name = "chat", .version = CHAT_VERSION)
#else
#define CHAT_MODULE_MAGIC PG_MODULE_MAGIC
#endif

#if PG_VERSION_NUM >= 160000
#define chat_server_usable(server, role) \
	(object_aclcheck(ForeignServerRelationId, (server), (role), \
					 ACL_USAGE) == ACLCHECK_OK)
#define chat_function_executable(function, role) \
	(object_aclcheck(ProcedureRelationId, (function), (role), \
					 ACL_EXECUTE) == ACLCHECK_OK)
#else
#define chat_server_usable(server, role) \
	(pg_foreign_server_aclcheck((server), (role), ACL_USAGE) == ACLCHECK_OK)
#define chat_function_executable(function, role) \
	(pg_proc_aclcheck((function), (role), ACL_EXECUTE) == ACLCHECK_OK)
#endif

#endif							/* !FRONTEND */

#endif							/* CHAT_COMPAT_H */
