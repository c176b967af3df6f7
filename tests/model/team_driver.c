/* A team at work on plain memory, many times.
 *
 *     team_driver SIZE CALLS    run under ThreadSanitizer, it also says whether what one member
 *                               writes before a meeting is safely there for the others after it
 *     team_driver absent        one member enters and then has no core until all is done
 *
 * 1 and a line that says why when something is wrong.
 */
#include "team.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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

static int share_out(int64_t size, int64_t calls) {
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

static atomic_int has_entered, is_done, was_waited_for;

/* At most 5 s; whether it came true. */
static int wait_until(atomic_int *it) {
    const struct timespec moment = {0, 1000000};
    for (int i = 0; i < 5000 && !atomic_load(it); i++) nanosleep(&moment, NULL);
    return atomic_load(it);
}

static void work_but_one(Member *me, const void *data) {
    if (me->rank) {
        atomic_store(&has_entered, 1);
        if (!wait_until(&is_done)) atomic_store(&was_waited_for, 1);
    } else {
        wait_until(&has_entered);
    }
    work(me, data);
    if (!me->rank) atomic_store(&is_done, 1);
}

static int one_is_absent(void) {
    int64_t numbers[ITEMS] = {0}, sums[ITEMS] = {0};
    const Task task = {numbers, sums};
    work_together(2, work_but_one, &task);
    if (!has_entered) printf("nobody was absent\n");
    if (was_waited_for) printf("the absent member was waited for\n");
    if (numbers[0] != LOOPS) printf("%ld of %d\n", (long)numbers[0], LOOPS);
    return !has_entered || was_waited_for || numbers[0] != LOOPS;
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "absent")) return one_is_absent();
    if (argc == 3) return share_out(atoi(argv[1]), atoi(argv[2]));
    printf("team_driver SIZE CALLS, or team_driver absent\n");
    return 2;
}
