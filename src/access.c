/*
 * access.c
 *		Who sees what hangs on a session: the function of the policies.
 *
 * Owns nothing but what a place in a plan remembers of its last session.  It
 * runs as whoever reads, and tells the same of a session that he may not see
 * as of one that is not there.
 *
 * It is a function because a subquery in its place costs more than a
 * comparison, and so comes behind those of the query that cannot leak by
 * themselves.  EXPLAIN ANALYZE tells how often the subquery ran: how many rows
 * of others have a content not less than 'a', than 'b', and so on to its last
 * letter.  The function is cheaper than any operator (see its COST), so other
 * conditions see the caller's rows only.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/uuid.h"

#include "compat.h"
#include "db.h"

/* What a place in a plan remembers. */
typedef struct Memory
{
	Oid			table;			/* chat_session */
	Oid			index;
	AttrNumber	id;
	AttrNumber	owner;
	AttrNumber	user_id;
	/* the last answer, and to what */
	bool		known;
	bool		visible;
	Oid			role;
	char	   *user;
	pg_uuid_t	session;
} Memory;

PG_FUNCTION_INFO_V1(chat_session_visible);

/* Returns a relation of the schema of the function. */
static Oid
find_relation(Oid schema, const char *name)
{
	Oid			oid = get_relname_relid(name, schema);

	if (!OidIsValid(oid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation \"chat.%s\" does not exist", name)));
	return oid;
}

/* Returns what a place in a plan remembers, nothing at its first call. */
static Memory *
recall(FmgrInfo *place)
{
	Memory	   *m = place->fn_extra;
	Oid			schema;

	if (m != NULL)
		return m;
	schema = get_func_namespace(place->fn_oid);
	m = MemoryContextAllocZero(place->fn_mcxt, sizeof(Memory));
	m->table = find_relation(schema, "chat_session");
	m->index = find_relation(schema, "chat_session_pkey");
	m->id = get_attnum(m->table, "id");
	m->owner = get_attnum(m->table, "owner");
	m->user_id = get_attnum(m->table, "user_id");
	place->fn_extra = m;
	return m;
}

/* Whether a session's row is the role's and the user's: as in CHAT_VISIBLE. */
static bool
is_visible(const Memory *m, HeapTuple row, TupleDesc desc, Oid role,
		   const char *user)
{
	bool		isnull;
	Datum		owner = heap_getattr(row, m->owner, desc, &isnull);
	Datum		user_id;

	if (isnull || !has_privs_of_role(role, DatumGetObjectId(owner)))
		return false;
	if (user[0] == '\0')
		return true;
	user_id = heap_getattr(row, m->user_id, desc, &isnull);
	return !isnull && strcmp(TextDatumGetCString(user_id), user) == 0;
}

/* Looks a session up, as the query sees the table. */
static bool
look_up(const Memory *m, pg_uuid_t *session, Oid role, const char *user)
{
	Relation	rel = table_open(m->table, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	row;
	bool		visible;

	ScanKeyInit(&key, m->id, BTEqualStrategyNumber, F_UUID_EQ,
				UUIDPGetDatum(session));
	scan = systable_beginscan(rel, m->index, true, GetActiveSnapshot(), 1,
							  &key);
	row = systable_getnext(scan);
	visible = HeapTupleIsValid(row) &&
		is_visible(m, row, RelationGetDescr(rel), role, user);
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return visible;
}

/* session_visible: whether there is such a session that the caller may see. */
Datum
chat_session_visible(PG_FUNCTION_ARGS)
{
	pg_uuid_t  *session;
	Oid			role = GetUserId();
	const char *user = chat_db_user();
	Memory	   *m;

	if (PG_ARGISNULL(0))
		PG_RETURN_BOOL(false);
	session = PG_GETARG_UUID_P(0);
	m = recall(fcinfo->flinfo);
	/* rows of one session mostly follow each other */
	if (m->known && m->role == role && strcmp(m->user, user) == 0 &&
		memcmp(&m->session, session, UUID_LEN) == 0)
		PG_RETURN_BOOL(m->visible);
	m->known = false;
	m->visible = look_up(m, session, role, user);
	m->role = role;
	m->session = *session;
	if (m->user != NULL)
		pfree(m->user);
	m->user = MemoryContextStrdup(fcinfo->flinfo->fn_mcxt, user);
	m->known = true;
	PG_RETURN_BOOL(m->visible);
}
