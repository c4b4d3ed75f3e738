/* The parts that are the same for every instruction set: dispatch, threads, layouts. */
#define _GNU_SOURCE
#include "internal.h"

#include <pthread.h>
#include <sched.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#include <stdlib.h>
#include <unistd.h>
enum { MOST_THREADS = 256 };
#endif

extern const fc_isa fc_plain;
#if defined(__x86_64__)
extern const fc_isa fc_avx512, fc_avx2;
static const fc_isa *const sets[] = {&fc_avx512, &fc_avx2, &fc_plain};
#else
static const fc_isa *const sets[] = {&fc_plain};
#endif

const char *fc_isa_name(int isa) {
    return isa >= 0 && isa < (int)(sizeof sets / sizeof *sets) ? sets[isa]->name : NULL;
}

const fc_isa *fc_set(int isa) { return sets[isa]; }

int fc_isa_usable(int isa) { return sets[isa]->usable(); }

int fc_isa_lanes(int isa) { return sets[isa]->lanes; }

/* OpenMP's threads do not survive a fork: waiting for them would last for ever. */
static int alone = 0;

static void in_child(void) { alone = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

#ifdef _OPENMP
int fc_max_threads(void) { return alone ? 1 : omp_get_max_threads(); }

static void run_together(int threads, int64_t items, fc_item item, void *context) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < items; i++) item(context, i, omp_get_thread_num());
}
#else
/* Without OpenMP threads live for one call: slower to start, and what the thread sanitizer, which
   does not see into OpenMP's library, can check. */
int fc_max_threads(void) {
    const char *wanted = getenv("OMP_NUM_THREADS");
    long n = wanted ? strtol(wanted, NULL, 10) : sysconf(_SC_NPROCESSORS_ONLN);
    return alone || n < 1 ? 1 : n > MOST_THREADS ? MOST_THREADS : (int)n;
}

typedef struct {
    int64_t items, *next;
    fc_item item;
    void *context;
    int thread;
} share;

static void *work(void *argument) {
    share *s = argument;
    for (int64_t i; (i = __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED)) < s->items;)
        s->item(s->context, i, s->thread);
    return NULL;
}

static void run_together(int threads, int64_t items, fc_item item, void *context) {
    share shares[MOST_THREADS];
    pthread_t ids[MOST_THREADS];
    int64_t next = 0;
    int started = 1;
    for (int i = 0; i < threads && i < MOST_THREADS; i++)
        shares[i] = (share){items, &next, item, context, i};
    /* A thread that does not start leaves its work to the others. */
    while (started < threads && started < MOST_THREADS &&
           !pthread_create(&ids[started], NULL, work, &shares[started]))
        started++;
    work(&shares[0]);
    for (int i = 1; i < started; i++) pthread_join(ids[i], NULL);
}
#endif

/* Threads that look for the next loop all the time, instead of being woken for each. Who comes too
   late for a loop is not waited for: its items are done by the others.

   open    number of the loop that may be entered, 0 for none; inside: helpers that may be in it */
typedef struct {
    _Alignas(64) int64_t open;
    _Alignas(64) int64_t inside;
    _Alignas(64) int64_t next;
    int64_t items, loops;
    fc_item item;
    void *context;
    int threads, over;
    void (*body)(void *);
    void *body_context;
} team;
static _Thread_local team *led = NULL; /* by this thread, while no loop runs */
enum { SPINS = 1000 };                 /* before a helper lets others have its core */

int fc_is_awake(void) { return led != NULL; }

static void take_items(team *t, int thread) {
    for (int64_t i; (i = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < t->items;)
        t->item(t->context, i, thread);
}

static void lead(team *t, int threads, int64_t items, fc_item item, void *context) {
    t->items = items;
    t->item = item;
    t->context = context;
    t->threads = threads;
    __atomic_store_n(&t->next, 0, __ATOMIC_RELAXED);
    led = NULL; /* a loop inside this one is not for the team */
    __atomic_store_n(&t->open, ++t->loops, __ATOMIC_SEQ_CST);
    take_items(t, 0);
    __atomic_store_n(&t->open, 0, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&t->inside, __ATOMIC_SEQ_CST)) fc_pause();
    led = t;
}

static void help(team *t, int thread) {
    int64_t done = 0, spins = 0;
    while (!__atomic_load_n(&t->over, __ATOMIC_ACQUIRE)) {
        int64_t open = __atomic_load_n(&t->open, __ATOMIC_ACQUIRE);
        if (!open || open == done) {
            if (++spins < SPINS) fc_pause();
            else sched_yield();
            continue;
        }
        /* Once inside, the loop that is open stays: see the order in `lead`. */
        __atomic_fetch_add(&t->inside, 1, __ATOMIC_SEQ_CST);
        done = __atomic_load_n(&t->open, __ATOMIC_SEQ_CST);
        if (done && thread < t->threads) take_items(t, thread);
        __atomic_fetch_sub(&t->inside, 1, __ATOMIC_SEQ_CST);
        spins = 0;
    }
}

static void join_team(void *context, int64_t item, int thread) {
    (void)thread;
    team *t = context;
    if (item) {
        help(t, (int)item);
        return;
    }
    led = t;
    t->body(t->body_context);
    led = NULL;
    __atomic_store_n(&t->over, 1, __ATOMIC_RELEASE);
}

void fc_awake(int threads, void (*body)(void *), void *context) {
    if (threads < 2 || alone) {
        body(context);
        return;
    }
    team t = {.body = body, .body_context = context};
    run_together(threads, threads, join_team, &t);
}

void fc_parallel_for(int threads, int64_t items, fc_item item, void *context) {
    if (threads > 1 && items > 1 && !alone) {
        if (led) lead(led, threads, items, item, context);
        else run_together(threads, items, item, context);
        return;
    }
    for (int64_t i = 0; i < items; i++) item(context, i, 0);
}

int64_t fc_copies_size(const fc_plan *p) {
    if (p->family == FC_CONTINUAL) return FC_LINE + fc_step_copies(p);
    if (!p->contiguous) return FC_LINE;
    int64_t x = p->batch * p->in_channels * p->in_points;
    int64_t y = p->batch * p->out_channels * p->out_points;
    return FC_LINE + fc_lines(x) + (p->has_residual ? 2 : 1) * fc_lines(y);
}

/* Where the copies of residual and y go, cut from the workspace; to be followed by the kernel and
   then by `y_back`. */
static float *copy_residual(const fc_isa *isa, const fc_plan *p, fc_arrays *a) {
    int64_t y_size = fc_lines(p->batch * p->out_channels * p->out_points);
    float *y = a->y, *residual = a->workspace + y_size;
    if (a->residual) {
        isa->transpose(a->residual, p->out_points, residual, p->out_channels, p->batch,
                       p->out_channels, p->out_points, a->threads);
        a->residual = residual;
    }
    a->y = a->workspace;
    a->workspace += (p->has_residual ? 2 : 1) * y_size;
    return y;
}

static void y_back(const fc_isa *isa, const fc_plan *p, const fc_arrays *a, float *y) {
    isa->transpose(a->y, p->out_channels, y, p->out_points, p->batch, p->out_points,
                   p->out_channels, a->threads);
}

void fc_run(const fc_plan *p, intptr_t x, intptr_t weights, intptr_t bias, intptr_t bias1,
            intptr_t bias2, intptr_t residual, intptr_t y, intptr_t workspace, int threads) {
    const fc_isa *isa = sets[p->isa];
    fc_arrays a = {.x = (const float *)x,
                   .weights = (const float *)weights,
                   .bias = {(const float *)bias, (const float *)bias1, (const float *)bias2},
                   .residual = (const float *)residual,
                   .y = (float *)y,
                   .workspace = fc_line_up(workspace),
                   .threads = threads};
    if (!p->contiguous) {
        isa->run[p->family](p->params, &a);
        return;
    }
    float *last = a.workspace;
    a.workspace += fc_lines(p->batch * p->in_channels * p->in_points);
    isa->transpose(a.x, p->in_points, last, p->in_channels, p->batch, p->in_channels, p->in_points,
                   threads);
    a.x = last;
    float *target = copy_residual(isa, p, &a);
    isa->run[p->family](p->params, &a);
    y_back(isa, p, &a, target);
}

void fc_run_blend(const fc_blend *p, intptr_t x, intptr_t scale, intptr_t shift, intptr_t residual,
                  intptr_t y, int threads) {
    sets[p->isa]->blend(p, (const float *)x, (const float *)scale, (const float *)shift,
                        (const float *)residual, (float *)y, threads);
}

int64_t fc_means_size(const fc_means *p) {
    return FC_LINE + p->images * FC_MEAN_PARTS * fc_lines(p->channels);
}

void fc_run_means(const fc_means *p, intptr_t x, intptr_t y, intptr_t workspace, int threads) {
    sets[p->isa]->means(p, (const float *)x, (float *)y, fc_line_up(workspace), threads);
}

void fc_run_pool(const fc_pool *p, intptr_t x, intptr_t y, int threads) {
    sets[p->isa]->pool(p, (const float *)x, (float *)y, threads);
}

void fc_run_window(const fc_window *p, intptr_t x, intptr_t ring, intptr_t steps, intptr_t y,
                   int threads) {
    sets[p->isa]->window(p, (const float *)x, (const float *)ring, (const int64_t *)steps,
                         (float *)y, threads);
}

void fc_run_turn(const fc_turn *p, intptr_t x, intptr_t y, int threads) {
    sets[p->isa]->transpose((const float *)x, p->columns, (float *)y, p->rows, p->images, p->rows,
                            p->columns, threads);
}
