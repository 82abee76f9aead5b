/*
 * window.h
 *		What of a conversation fits into the model's context window.
 */
#ifndef CHAT_WINDOW_H
#define CHAT_WINDOW_H

#include "postgres.h"

#include "context.h"
#include "queue.h"
#include "server.h"

/* What stands in a request beside the messages. */
typedef struct ChatWindowFrame
{
	const char *system;			/* NULL = none */
	const char *tools;			/* JSON, NULL = none */
} ChatWindowFrame;

/* What was done to make a conversation fit: what loses more is greater. */
typedef enum ChatCompaction
{
	CHAT_COMPACTION_NONE,
	CHAT_COMPACTION_COLLAPSED,	/* old outputs of tools */
	CHAT_COMPACTION_SUMMARIZED, /* a summary stands for the oldest messages */
	CHAT_COMPACTION_TRUNCATED	/* the oldest messages are left out */
} ChatCompaction;

/* How a request was made to fit. */
typedef struct ChatWindow
{
	int64		budget;			/* tokens that it may have, 0 = not known */
	int64		plain;			/* tokens by estimate alone, */
	int64		tokens;			/* and corrected by what was counted */
	ChatCompaction compaction;
	int64		summary_reach;	/* > 0: messages up to it want a summary first */
	bool		frame_too_large;	/* there is no room for any message */
} ChatWindow;

/* Declares the settings of windows. */
extern void chat_window_init(void);

/*
 * Makes the repaired messages of a request fit, the earlier ones first: old
 * tool outputs are collapsed, a summary is asked for, steps are left out.
 */
extern void chat_window_fit(const ChatJob *job, const ChatServer *server,
							const ChatWindowFrame *frame,
							ChatContext *context, ChatWindow *window);

/* The event that tells of it. */
extern char *chat_window_status(const ChatWindow *window);

/* Returns what was done, as a task has it; NULL for nothing. */
extern const char *chat_window_compaction(const ChatWindow *window);

/* Raises the smaller of a setting of the session and an option; 0 = none. */
extern int64 chat_window_limit(const ChatJob *job, const char *setting,
							   int64 option);

#endif							/* CHAT_WINDOW_H */
