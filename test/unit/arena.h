/*
 * arena.h
 *	  palloc and its kin for programs without a server: blocks of malloc, so
 *	  that sanitizers see over-reads, all freed by arena_reset() as a memory
 *	  context's reset does it.  Takes the place of libpgcommon's own.
 *
 * Include after postgres_fe.h.
 */
#ifndef CHAT_ARENA_H
#define CHAT_ARENA_H

#include <stdlib.h>
#include <string.h>

#include "common/fe_memutils.h"

/* In front of each block; blocks form a ring. */
typedef struct ArenaBlock
{
	struct ArenaBlock *prev;
	struct ArenaBlock *next;
	size_t		size;
	size_t		pad;			/* keeps what follows aligned */
} ArenaBlock;

static ArenaBlock arena = {&arena, &arena, 0, 0};
static size_t arena_used;

/* Frees all blocks. */
static inline void
arena_reset(void)
{
	while (arena.next != &arena)
		pfree(arena.next + 1);
}

void *
palloc(Size size)
{
	ArenaBlock *block = malloc(sizeof(ArenaBlock) + size);

	if (block == NULL)
		abort();
	block->size = size;
	block->prev = &arena;
	block->next = arena.next;
	block->next->prev = block;
	arena.next = block;
	arena_used += size;
	return block + 1;
}

/* Frees a block; like the one of programs it takes NULL, which 18 needs. */
void
pfree(void *p)
{
	ArenaBlock *block;

	if (p == NULL)
		return;
	block = (ArenaBlock *) p - 1;
	block->prev->next = block->next;
	block->next->prev = block->prev;
	arena_used -= block->size;
	free(block);
}

void *
palloc0(Size size)
{
	return memset(palloc(size), 0, size);
}

void *
palloc_extended(Size size, int flags)
{
	return flags & MCXT_ALLOC_ZERO ? palloc0(size) : palloc(size);
}

void *
repalloc(void *p, Size size)
{
	ArenaBlock *block = (ArenaBlock *) p - 1;
	void	   *copy = palloc(size);

	memcpy(copy, p, block->size < size ? block->size : size);
	pfree(p);
	return copy;
}

char *
pnstrdup(const char *s, Size n)
{
	size_t		len = strnlen(s, n);
	char	   *copy = palloc(len + 1);

	memcpy(copy, s, len);
	copy[len] = '\0';
	return copy;
}

char *
pstrdup(const char *s)
{
	return pnstrdup(s, strlen(s));
}

void *
pg_malloc(size_t size)
{
	return palloc(size);
}

void *
pg_malloc0(size_t size)
{
	return palloc0(size);
}

void *
pg_malloc_extended(size_t size, int flags)
{
	return palloc_extended(size, flags);
}

void *
pg_realloc(void *p, size_t size)
{
	return p ? repalloc(p, size) : palloc(size);
}

char *
pg_strdup(const char *s)
{
	return pstrdup(s);
}

void
pg_free(void *p)
{
	pfree(p);
}

#endif							/* CHAT_ARENA_H */
