/* The threads that compute a step together. They share out the items of a loop, and nobody begins
 * the next before all items of this one are done; but a member who is not there, because something
 * else has its core, is not waited for: the others do its items, and it joins when it comes. OpenMP
 * waits for all, and knows only one way to wait (team.c).
 */
#ifndef VITRINE_TEAM_H
#define VITRINE_TEAM_H

#include <stdint.h>

typedef struct {
    int64_t rank, size; /* rank 0 is the thread that called, and always there */
    int64_t done;       /* items of the loop that it is in */
    uint32_t loop;      /* its number */
} Member;

typedef void Work(Member *me, const void *task);

/* `work` is called by the caller and, as they come, by the others of `size` threads, as far as
 * they can be had; returns when all items are done and everybody has left. All go through the same
 * loops, each of them
 *
 *     for (int64_t i = take(me, items, 1); i < items; i = take(me, items, 1)) ...
 *     meet(me, items);
 *
 * One call at a time: another thread's waits. */
void work_together(int64_t size, Work *work, const void *task);

/* The first of the next `count` of the loop's items, of which there may be fewer; `items` when none
 * is left. */
int64_t take(Member *me, int64_t items, int64_t count);

/* Wait until all items are done: what was written for them, all see after. */
void meet(Member *me, int64_t items);

/* How many items to take at once where all cost the same: each member's share. */
static inline int64_t share_of(const Member *me, int64_t items) {
    return (items + me->size - 1) / me->size;
}

#endif
