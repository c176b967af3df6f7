/* One team of threads for the process, kept between steps.
 *
 * How to wait is half of the question. Within a step the others are done in microseconds; if one is
 * not, something else has its core, and whoever spins on keeps that something from the core that it
 * could have instead: so spin shortly, then sleep. Between two steps one thread prepares the next
 * for some hundred microseconds, and to sleep would cost a wake-up each time: so stay awake, but
 * offer the core to whoever wants it (the API process has something to do just then). If somebody
 * kept it, there is a neighbour who computes, and offering costs a slice of his each time; who
 * sleeps, on the other hand, gets a core at once when it wakes: so sleep early for a while.
 *
 * For whom to wait is the other half: for items that somebody is at, never for members. Whoever has
 * no item can have lost its core without anybody noticing. Both measured in loadtests/NOTES.md,
 * 2026-11-29.
 */
#define _GNU_SOURCE
#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define CACHE_LINE 128 /* two of 64 bytes: processors fetch them in pairs */
#define MAX_SIZE 256
#define OPEN 0x80000000u /* beside the number of members inside: more may come */
#define SPINS 64           /* looks before the clock is asked, about a microsecond */
#define WITHIN_NS 50000    /* how long to stay awake within a step */
#define BETWEEN_NS 1000000 /* and between two */
#define TAKEN_NS 1000000   /* away for longer than the API would be: a neighbour had the core */
#define WARY_NS 100000000  /* how long to be prepared for him */

/* Somebody may sleep until the low half of a word changes. */
typedef struct {
    _Alignas(CACHE_LINE) atomic_ulong word;
    atomic_int sleeping;
} Event;

_Static_assert(sizeof(atomic_ulong) == 8 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "the low half of a word lies where the word does");

static struct {
    pthread_mutex_t lock;
    int64_t asked, size; /* how many were asked for, and could be had */
    int has_cores;       /* one for each */
    pthread_t threads[MAX_SIZE];
    Work *work; /* NULL: go home */
    const void *task;
    uint32_t first_loop;
    Event called; /* counts calls */
    Event inside; /* how many members are, beside the caller; OPEN */
    Event at;     /* the loop that is open; in the high half, the item to be taken next */
    _Alignas(CACHE_LINE) atomic_long done; /* items of this loop */
} team = {.lock = PTHREAD_MUTEX_INITIALIZER, .asked = 1, .size = 1};

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint32_t low(Event *event) {
    return (uint32_t)atomic_load(&event->word);
}

/* Stay awake until the word is no longer `old`; 0 when it takes too long. */
static int stays_awake(Event *event, uint32_t old, int is_between) {
    static _Thread_local int64_t wary_until = 0;
    int64_t began = 0, last = 0;
    while (team.has_cores) {
        for (int i = 0; i < SPINS; i++) {
            if (low(event) != old) return 1;
            relax();
        }
        const int64_t now = now_ns();
        if (!began) began = last = now;
        if (now - last > TAKEN_NS) wary_until = now + WARY_NS;
        const int offers = is_between && now >= wary_until;
        if (now - began > (offers ? BETWEEN_NS : WITHIN_NS)) return 0;
        last = now;
        if (offers) sched_yield();
    }
    return 0;
}

static void wait_for(Event *event, uint32_t old, int is_between) {
    if (stays_awake(event, old, is_between)) return;
    atomic_fetch_add(&event->sleeping, 1);
    while (low(event) == old)
        syscall(SYS_futex, &event->word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    atomic_fetch_sub(&event->sleeping, 1);
}

/* After the word was changed. */
static void wake(Event *event) {
    if (atomic_load(&event->sleeping))
        syscall(SYS_futex, &event->word, FUTEX_WAKE_PRIVATE, MAX_SIZE, NULL, NULL, 0);
}

int64_t take(Member *me, int64_t items, int64_t count) {
    unsigned long at = atomic_load(&team.at.word);
    for (;;) {
        const int64_t first = (int64_t)(at >> 32);
        if ((uint32_t)at != me->loop || first >= items) return items;
        const int64_t taken = items - first < count ? items - first : count;
        if (atomic_compare_exchange_weak(&team.at.word, &at, at + ((unsigned long)taken << 32))) {
            me->done += taken;
            return first;
        }
    }
}

void meet(Member *me, int64_t items) {
    const int64_t mine = me->done;
    me->done = 0;
    const int says = mine || (!items && me->rank == 0); /* somebody must, of a loop of nothing */
    if (says && atomic_fetch_add(&team.done, mine) + mine == items) {
        atomic_store(&team.done, 0);
        atomic_store(&team.at.word, (uint32_t)(me->loop + 1)); /* the next loop is open */
        wake(&team.at);
    } else if (low(&team.at) == me->loop) {
        wait_for(&team.at, me->loop, 0);
    }
    me->loop++;
}

static int enter(void) {
    unsigned long inside = atomic_load(&team.inside.word);
    while (inside & OPEN)
        if (atomic_compare_exchange_weak(&team.inside.word, &inside, inside + 1)) return 1;
    return 0;
}

static void leave(void) {
    atomic_fetch_sub(&team.inside.word, 1);
    wake(&team.inside);
}

static void open_and_call(Work *work, const void *task) {
    team.work = work;
    team.task = task;
    team.first_loop = low(&team.at);
    atomic_store(&team.inside.word, OPEN);
    atomic_fetch_add(&team.called.word, 1);
    wake(&team.called);
}

/* Whoever is still inside has nothing left to do. */
static void close_and_wait(void) {
    atomic_fetch_and(&team.inside.word, ~(unsigned long)OPEN);
    for (uint32_t inside = low(&team.inside); inside; inside = low(&team.inside))
        wait_for(&team.inside, inside, 0);
}

static void *live(void *rank) {
    for (uint32_t calls = 0;;) { /* of a new team */
        wait_for(&team.called, calls, 1);
        calls = low(&team.called);
        if (!enter()) continue; /* it came too late */
        if (!team.work) return NULL;
        Member me = {(int64_t)(intptr_t)rank, team.size, 0, team.first_loop};
        team.work(&me, team.task);
        leave();
    }
}

static void send_home(void) {
    open_and_call(NULL, NULL);
    for (int64_t rank = 1; rank < team.size; rank++) pthread_join(team.threads[rank], NULL);
    team.size = 1;
}

/* A child has none of its parent's threads. */
static void after_fork(void) {
    const pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
    team.lock = fresh;
    team.asked = team.size = 1;
    atomic_store(&team.at.word, 0);
    atomic_store(&team.done, 0);
}

static int64_t num_cores(void) {
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof cores, &cores) ? MAX_SIZE : CPU_COUNT(&cores);
}

/* Signals are for the threads that were there before. */
static void gather(int64_t size) {
    static int forks_are_known = 0;
    if (!forks_are_known) forks_are_known = !pthread_atfork(NULL, NULL, after_fork);
    send_home();
    Event *const events[] = {&team.called, &team.inside};
    for (int i = 0; i < 2; i++) {
        atomic_store(&events[i]->word, 0);
        atomic_store(&events[i]->sleeping, 0);
    }
    atomic_store(&team.at.sleeping, 0);
    team.asked = size;
    team.has_cores = size <= num_cores();
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (size > MAX_SIZE) size = MAX_SIZE;
    for (int64_t rank = 1; rank < size; rank++, team.size++)
        if (pthread_create(&team.threads[rank], NULL, live, (void *)(intptr_t)rank)) break;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void work_together(int64_t size, Work *work, const void *task) {
    pthread_mutex_lock(&team.lock);
    if (size != team.asked) gather(size);
    open_and_call(work, task);
    Member me = {0, team.size, 0, team.first_loop};
    work(&me, task);
    close_and_wait();
    pthread_mutex_unlock(&team.lock);
}
