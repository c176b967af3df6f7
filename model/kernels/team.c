/* One team of threads for the process, kept between steps.
 *
 * How to wait is the whole question. Within a step the others are done in microseconds; if one is
 * not, something else has its core, and whoever spins on keeps that something from the core that it
 * could have instead: so spin shortly, then sleep. Between two steps one thread prepares the next
 * for some hundred microseconds, and to sleep would cost a wake-up each time: so stay awake, but
 * offer the core to whoever wants it (the API process has something to do just then). If somebody
 * kept it, there is a neighbour who computes, and offering costs a slice of his each time; who
 * sleeps, on the other hand, gets a core at once when it wakes: so sleep early for a while.
 * Measured in loadtests/NOTES.md, 2026-11-29.
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
#define SPINS 64           /* looks before the clock is asked, about a microsecond */
#define WITHIN_NS 50000    /* how long to stay awake within a step */
#define BETWEEN_NS 1000000 /* and between two */
#define TAKEN_NS 1000000   /* away for longer than the API would be: a neighbour had the core */
#define WARY_NS 100000000  /* how long to be prepared for him */

/* A word that changes once for each event, and how many sleep until it does. */
typedef struct {
    _Alignas(CACHE_LINE) atomic_uint count;
    atomic_int sleeping;
} Event;

static struct {
    pthread_mutex_t lock;
    int64_t asked, size; /* how many were asked for, and could be had */
    int has_cores;       /* one for each */
    pthread_t threads[MAX_SIZE];
    Work *work; /* NULL: go home */
    const void *task;
    Event called, met;
    _Alignas(CACHE_LINE) atomic_long next;
    _Alignas(CACHE_LINE) atomic_long arrived;
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

/* Stay awake until the word is no longer `old`; 0 when it takes too long. */
static int stays_awake(Event *event, unsigned old, int is_between) {
    static _Thread_local int64_t wary_until = 0;
    int64_t began = 0, last = 0;
    while (team.has_cores) {
        for (int i = 0; i < SPINS; i++) {
            if (atomic_load_explicit(&event->count, memory_order_acquire) != old) return 1;
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

static void wait_for(Event *event, unsigned old, int is_between) {
    if (stays_awake(event, old, is_between)) return;
    atomic_fetch_add(&event->sleeping, 1);
    while (atomic_load(&event->count) == old)
        syscall(SYS_futex, &event->count, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    atomic_fetch_sub(&event->sleeping, 1);
}

static void tell(Event *event) {
    atomic_fetch_add(&event->count, 1);
    if (atomic_load(&event->sleeping))
        syscall(SYS_futex, &event->count, FUTEX_WAKE_PRIVATE, MAX_SIZE, NULL, NULL, 0);
}

int64_t take(int64_t count) {
    return atomic_fetch_add_explicit(&team.next, count, memory_order_relaxed);
}

void meet(const Member *me) {
    if (me->size == 1) {
        atomic_store_explicit(&team.next, 0, memory_order_relaxed);
        return;
    }
    const unsigned old = atomic_load(&team.met.count);
    if (atomic_fetch_add(&team.arrived, 1) + 1 < me->size) {
        wait_for(&team.met, old, 0);
    } else {
        atomic_store_explicit(&team.arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team.next, 0, memory_order_relaxed);
        tell(&team.met);
    }
}

static void *live(void *rank) {
    unsigned calls = 0; /* of a new team */
    for (;; calls++) {
        wait_for(&team.called, calls, 1);
        if (!team.work) return NULL;
        const Member me = {(int64_t)(intptr_t)rank, team.size};
        team.work(&me, team.task);
        meet(&me);
    }
}

static void send_home(void) {
    team.work = NULL;
    tell(&team.called);
    for (int64_t rank = 1; rank < team.size; rank++) pthread_join(team.threads[rank], NULL);
    team.size = 1;
}

/* A child has none of its parent's threads. */
static void after_fork(void) {
    const pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
    team.lock = fresh;
    team.asked = team.size = 1;
    atomic_store(&team.next, 0);
    atomic_store(&team.arrived, 0);
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
    team.asked = size;
    atomic_store(&team.called.count, 0);
    atomic_store(&team.called.sleeping, 0);
    atomic_store(&team.met.sleeping, 0);
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
    team.work = work;
    team.task = task;
    if (team.size > 1) tell(&team.called);
    const Member me = {0, team.size};
    work(&me, task);
    meet(&me);
    pthread_mutex_unlock(&team.lock);
}
