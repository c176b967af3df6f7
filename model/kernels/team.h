/* The threads that compute a step together: they share out the items of a loop and meet at its
 * end. Why not OpenMP: it knows one way to wait, and a step needs two (team.c).
 */
#ifndef VITRINE_TEAM_H
#define VITRINE_TEAM_H

#include <stdint.h>

typedef struct {
    int64_t rank, size; /* rank 0 is the thread that called */
} Member;

typedef void Work(const Member *me, const void *task);

/* Every member calls `work` once; returns when all have. `size` threads, the caller among them; as
 * many as can be had. One call at a time: another thread's waits. */
void work_together(int64_t size, Work *work, const void *task);

/* The first of the next `count` items of the loop that all members are in; past its end when there
 * are none left. */
int64_t take(int64_t count);

/* The share of this member in a loop whose items are alike: from here on, to where the next one's
 * begins. */
static inline int64_t share_of(const Member *me, int64_t rank, int64_t items) {
    return (items * rank + me->size - 1) / me->size;
}

/* Wait for all members: what each wrote before, all see after. Ends a loop. */
void meet(const Member *me);

#endif
