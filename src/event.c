/*
 * event.c
 *		Event rows and notifications.
 *
 * Owns the writing of chat_event and all NOTIFYs of the extension.  Never
 * sees a stream: a log comes in, rows go out.  All state is the caller's,
 * but for the time of the last look at the notification queue.
 *
 * Payloads are parts of the AI SDK's UI message stream protocol
 * (ai-sdk.dev/docs/ai-sdk-ui/stream-protocol), with taskId and seq added.
 */
#include "postgres.h"

#include "access/tableam.h"
#include "access/xact.h"
#include "commands/async.h"
#include "executor/executor.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "event.h"
#include "json.h"
#include "jsonbuf.h"
#include "rows.h"

/* how often the notification queue's fill is looked at, in ms */
#define QUEUE_LOOK_INTERVAL 1000
#define QUEUE_LOOK_LIMIT 0.9

/* rows that are appended together */
#define ROWS_AT_ONCE 128
/* slot, task_id, seq, payload, created_at: in the order of the table */
#define EVENT_COLUMNS 5

/* from PostgreSQL's epoch to that of Unix, in ms */
#define EPOCH_SHIFT \
	((int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY * 1000)

const ChatDeltaType chat_text_delta = {"text-delta", "id", "delta"};
const ChatDeltaType chat_reasoning_delta = {"reasoning-delta", "id", "delta"};
const ChatDeltaType chat_tool_input_delta =
{"tool-input-delta", "toolCallId", "inputTextDelta"};

typedef enum NotifyPayload
{
	NOTIFY_EVENT,
	NOTIFY_POINTER
} NotifyPayload;

static const struct config_enum_entry notify_payload_options[] = {
	{"event", NOTIFY_EVENT, false},
	{"pointer", NOTIFY_POINTER, false},
	{NULL, 0, false}
};

static int	notify_payload = NOTIFY_EVENT;

/* Declares the settings of events. */
void
chat_event_init(void)
{
	DefineCustomEnumVariable("chat.notify_payload",
							 "What a notification carries.",
							 "event: the whole event; pointer: only taskId and seq, which are then read by chat.get_task_events().",
							 &notify_payload, NOTIFY_EVENT,
							 notify_payload_options,
							 PGC_SIGHUP, 0, NULL, NULL, NULL);
}

/* Says where the events of a task go. */
void
chat_event_aim(ChatEventTarget *target, const pg_uuid_t *task, int16 slot,
			   char *channel)
{
	Datum		text = DirectFunctionCall1(uuid_out, UUIDPGetDatum(task));

	target->task = *task;
	strlcpy(target->task_text, DatumGetCString(text),
			sizeof(target->task_text));
	target->slot = slot;
	target->channel = channel;
}

/*
 * Returns a new item of the log whose text starts here, with room for len
 * bytes of it: what fails here for want of memory leaves the log as it was.
 */
static ChatEventItem *
append_item(ChatEventLog *log, MemoryContext context, size_t len)
{
	ChatEventItem *item;

	if (log->text.data == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(context);

		initStringInfo(&log->text);
		MemoryContextSwitchTo(old);
	}
	if (len > MaxAllocSize)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("an event of %zu bytes is too long", len)));
	enlargeStringInfo(&log->text, (int) len);
	if (log->nitems == log->maxitems)
	{
		int			max = Max(8, log->maxitems * 2);

		if (log->items == NULL)
			log->items = MemoryContextAlloc(context,
											max * sizeof(ChatEventItem));
		else
			log->items = repalloc(log->items, max * sizeof(ChatEventItem));
		log->maxitems = max;
	}
	item = &log->items[log->nitems++];
	memset(item, 0, sizeof(*item));
	item->start = log->text.len;
	return item;
}

/* Adds an event that is a whole JSON object. */
void
chat_event_add(ChatEventLog *log, MemoryContext context, const char *json)
{
	size_t		len = strlen(json);
	ChatEventItem *item = append_item(log, context, len);

	appendBinaryStringInfo(&log->text, json, (int) len);
	item->len = log->text.len - item->start;
}

/* Adds text to a block, to the last event if that is of the same block. */
void
chat_event_delta(ChatEventLog *log, MemoryContext context,
				 const ChatDeltaType *delta, const char *id,
				 const char *text, size_t len)
{
	ChatEventItem *item = NULL;

	if (log->nitems > 0)
		item = &log->items[log->nitems - 1];
	if (item == NULL || item->delta != delta || item->id != id)
	{
		item = append_item(log, context, len);
		item->delta = delta;
		item->id = id;
	}
	appendBinaryStringInfo(&log->text, text, (int) len);
	item->len = log->text.len - item->start;
}

/* Empties a log and gives back what was large. */
void
chat_event_clear(ChatEventLog *log)
{
	log->nitems = 0;
	if (log->text.data == NULL)
		return;
	if (log->text.maxlen > 1024)
	{
		pfree(log->text.data);
		memset(&log->text, 0, sizeof(log->text));
	}
	else
		resetStringInfo(&log->text);
	if (log->maxitems > 16)
	{
		pfree(log->items);
		log->items = NULL;
		log->maxitems = 0;
	}
}

/* Makes room for one more row. */
static void
reserve_row(ChatEventBatch *batch)
{
	if (batch->n < batch->max)
		return;
	if (batch->max == 0)
	{
		batch->max = 256;
		for (int i = 0; i < 4; i++)
			batch->columns[i] = palloc(batch->max * sizeof(Datum));
		batch->channels = palloc(batch->max * sizeof(char *));
		batch->notices = palloc(batch->max * sizeof(char *));
		return;
	}
	batch->max *= 2;
	for (int i = 0; i < 4; i++)
		batch->columns[i] = repalloc_huge(batch->columns[i],
										  batch->max * sizeof(Datum));
	batch->channels = repalloc_huge(batch->channels,
									batch->max * sizeof(char *));
	batch->notices = repalloc_huge(batch->notices,
								   batch->max * sizeof(char *));
}

/* Adds a row whose payload is the finished object in json. */
static void
add_row(ChatEventBatch *batch, const ChatEventTarget *target, int64 seq,
		const StringInfo json)
{
	char	   *value = palloc(VARHDRSZ + json->len + 1);
	bool		pointer = notify_payload == NOTIFY_POINTER ||
	json->len > CHAT_EVENT_MAX_PAYLOAD;

	SET_VARSIZE(value, VARHDRSZ + json->len);
	memcpy(VARDATA(value), json->data, json->len + 1);
	reserve_row(batch);
	batch->columns[0][batch->n] = Int16GetDatum(target->slot);
	batch->columns[1][batch->n] = UUIDPGetDatum(&target->task);
	batch->columns[2][batch->n] = Int64GetDatum(seq);
	batch->columns[3][batch->n] = PointerGetDatum(value);
	batch->channels[batch->n] = target->channel;
	batch->notices[batch->n] = pointer
		? psprintf("{\"taskId\":\"%s\",\"seq\":" INT64_FORMAT "}",
				   target->task_text, seq)
		: VARDATA(value);
	batch->n++;
}

/* Appends taskId and seq, and the brace that ends the object. */
static void
finish_object(StringInfo json, const ChatEventTarget *target, int64 seq)
{
	char		number[MAXINT8LEN + 1];

	pg_lltoa(seq, number);
	appendBinaryStringInfo(json, ",\"taskId\":\"", 11);
	appendBinaryStringInfo(json, target->task_text, 36);
	appendBinaryStringInfo(json, "\",\"seq\":", 8);
	appendStringInfoString(json, number);
	appendStringInfoChar(json, '}');
}

/*
 * Returns how many bytes of a text, cut on a character, fit into room bytes
 * when escaped; at least one character.  No more than room bytes are looked
 * at: a long text has many pieces.
 */
static int
fitting(const char *text, int len, int room)
{
	int			most = Min(len, room);
	int			used = 0;
	int			escaped = 0;

	while (most < len && most > 0 && (text[most] & 0xC0) == 0x80)
		most--;
	if (most > 0 && (most <= room / 6 ||
					 (int) chat_json_escape(text, most, NULL) <= room))
		return most;
	while (used < len)
	{
		int			mb = Min(pg_utf_mblen((const unsigned char *) text + used),
							 len - used);

		escaped += (int) chat_json_escape(text + used, mb, NULL);
		if (escaped > room && used > 0)
			break;
		used += mb;
	}
	return used;
}

/* Adds the rows of a delta: more than one when it is long. */
static int64
collect_delta(ChatEventBatch *batch, const ChatEventTarget *target, int64 seq,
			  const ChatEventItem *item, const char *text, StringInfo json)
{
	int			done = 0;

	do
	{
		int			room;
		int			part;

		resetStringInfo(json);
		appendStringInfo(json, "{\"type\":\"%s\"", item->delta->type);
		/* what a model has chosen, and short: see stream.c */
		chat_append_member(json, item->delta->id_member, item->id);
		appendStringInfo(json, ",\"%s\":\"", item->delta->text_member);
		/* 100: what finish_object() appends, with the quote */
		room = CHAT_EVENT_MAX_PAYLOAD - 100 - json->len;
		part = fitting(text + done, item->len - done, room);
		enlargeStringInfo(json, part * 6);
		json->len += (int) chat_json_escape(text + done, part,
											json->data + json->len);
		appendStringInfoChar(json, '"');
		finish_object(json, target, ++seq);
		add_row(batch, target, seq, json);
		done += part;
	} while (done < item->len);
	return seq;
}

/*
 * Adds the events of a log to a batch, numbered from seq + 1 on; returns the
 * last number.  Everything is allocated in the current context.
 */
int64
chat_event_collect(ChatEventBatch *batch, const ChatEventTarget *target,
				   int64 seq, const ChatEventLog *log)
{
	StringInfoData json;

	if (log->nitems == 0)
		return seq;
	initStringInfo(&json);
	for (int i = 0; i < log->nitems; i++)
	{
		const ChatEventItem *item = &log->items[i];
		const char *text = log->text.data + item->start;

		if (item->delta)
		{
			seq = collect_delta(batch, target, seq, item, text, &json);
			continue;
		}
		resetStringInfo(&json);
		/* without its closing brace */
		appendBinaryStringInfo(&json, text, item->len - 1);
		finish_object(&json, target, ++seq);
		add_row(batch, target, seq, &json);
	}
	pfree(json.data);
	return seq;
}

/* Fills slots with the next rows of a slot of events; returns how many. */
static int
fill_slots(const ChatEventBatch *batch, int16 slot, int *row,
		   TupleTableSlot **slots, int max)
{
	TimestampTz start = GetCurrentTransactionStartTimestamp();
	Datum		now = TimestampTzGetDatum(start);
	int			n = 0;

	for (; *row < batch->n && n < max; (*row)++)
	{
		TupleTableSlot *s = slots[n];

		if (DatumGetInt16(batch->columns[0][*row]) != slot)
			continue;
		ExecClearTuple(s);
		memset(s->tts_isnull, true,
			   s->tts_tupleDescriptor->natts * sizeof(bool));
		for (int i = 0; i < EVENT_COLUMNS; i++)
		{
			s->tts_values[i] = i < 4 ? batch->columns[i][*row] : now;
			s->tts_isnull[i] = false;
		}
		ExecStoreVirtualTuple(s);
		n++;
	}
	return n;
}

/* Appends the rows of one slot to its partition. */
static void
append_rows(const ChatEventBatch *batch, int16 slot)
{
	char		name[NAMEDATALEN];
	TupleTableSlot *slots[ROWS_AT_ONCE];
	ChatRows	rows;
	int			row = 0;
	int			n;

	snprintf(name, sizeof(name), "chat_event_%d", slot);
	chat_rows_open(&rows, name, false);
	for (int i = 0; i < ROWS_AT_ONCE; i++)
		slots[i] = i < batch->n ? table_slot_create(rows.rel, NULL) : NULL;
	while ((n = fill_slots(batch, slot, &row, slots, ROWS_AT_ONCE)) > 0)
		chat_rows_append(&rows, slots, n);
	for (int i = 0; i < ROWS_AT_ONCE && slots[i]; i++)
		ExecDropSingleTupleTableSlot(slots[i]);
	chat_rows_close(&rows);
}

/* Stores the rows of a batch in the current transaction. */
void
chat_event_write(ChatEventBatch *batch)
{
	uint32		used = 0;

	for (int i = 0; i < batch->n; i++)
		used |= (uint32) 1 << DatumGetInt16(batch->columns[0][i]);
	for (int16 slot = 0; used >> slot != 0; slot++)
		if (used & (uint32) 1 << slot)
			append_rows(batch, slot);
	if (batch->n > 0)
		CommandCounterIncrement();
}

/* Notifies the events of a batch when the current transaction commits. */
void
chat_event_notify(ChatEventBatch *batch)
{
	for (int i = 0; i < batch->n; i++)
		Async_Notify(batch->channels[i], batch->notices[i]);
}

/* Tells listeners that a task is alive: a notification without a row. */
void
chat_event_heartbeat(const char *channel, const char *task)
{
	int64		at = GetCurrentTimestamp() / 1000 + EPOCH_SHIFT;

	Async_Notify(channel,
				 psprintf("{\"type\":\"data-heartbeat\","
						  "\"data\":{\"at\":" INT64_FORMAT "},"
						  "\"transient\":true,\"taskId\":\"%s\"}", at, task));
}

/*
 * True if so much waits in the server's notification queue that we leave our
 * notifications out; readers find the rows.
 */
bool
chat_event_queue_full(void)
{
	static TimestampTz looked = 0;
	static bool full = false;
	TimestampTz now = GetCurrentTimestamp();

	if (looked == 0 || now < looked ||
		TimestampDifferenceExceeds(looked, now, QUEUE_LOOK_INTERVAL))
	{
		looked = now;
		full = DatumGetFloat8(OidFunctionCall0(F_PG_NOTIFICATION_QUEUE_USAGE))
			> QUEUE_LOOK_LIMIT;
	}
	return full;
}
