/* Shares out plain memory among the members of a team, many times: run under ThreadSanitizer, it
 * says whether what one writes before a meeting is safely there for the others after it.
 *
 *     team_driver SIZE CALLS
 */
#include "team.h"

#include <stdio.h>
#include <stdlib.h>

#define ITEMS 37
#define LOOPS 9

typedef struct {
    int64_t *numbers, *sums; /* (ITEMS) each */
} Task;

static void work(Member *me, const void *data) {
    const Task *task = data;
    for (int loop = 0; loop < LOOPS; loop++) {
        const int64_t count = 1 + loop % 3, share = share_of(me, ITEMS);
        for (int64_t i = take(me, ITEMS, count); i < ITEMS; i = take(me, ITEMS, count))
            for (int64_t item = i; item < i + count && item < ITEMS; item++) task->numbers[item]++;
        meet(me, ITEMS);
        for (int64_t i = take(me, ITEMS, share); i < ITEMS; i = take(me, ITEMS, share))
            for (int64_t item = i; item < i + share && item < ITEMS; item++)
                task->sums[item] += task->numbers[ITEMS - 1 - item];
        meet(me, ITEMS);
        meet(me, 0);
    }
}

int main(int argc, char **argv) {
    const int64_t size = argc > 1 ? atoi(argv[1]) : 2, calls = argc > 2 ? atoi(argv[2]) : 1000;
    int64_t numbers[ITEMS] = {0}, sums[ITEMS] = {0}, expected = 0;
    for (int64_t call = 1; call <= calls; call++) {
        const Task task = {numbers, sums};
        work_together(call % 100 ? size : 1, work, &task); /* now and then alone */
        for (int64_t loop = 1; loop <= LOOPS; loop++) expected += (call - 1) * LOOPS + loop;
    }
    for (int i = 0; i < ITEMS; i++)
        if (numbers[i] != calls * LOOPS || sums[i] != expected) {
            printf("item %d: %ld of %ld, %ld of %ld\n", i, (long)numbers[i], (long)(calls * LOOPS),
                   (long)sums[i], (long)expected);
            return 1;
        }
    return 0;
}
