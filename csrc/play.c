/* The calls of a recorded step, and the ring that a delay or a window keeps. */
#include "internal.h"

#include <string.h>

enum { RING_FLOATS = 1 << 14 }; /* copied by one thread at a time */

typedef struct {
    const fc_ring *p;
    const float *x;
    float *ring, *y;
    const int64_t *steps;
    const uint8_t *active;
    int64_t pieces;
} ring_job;

static void ring_item(void *context, int64_t item, int thread) {
    (void)thread;
    const ring_job *j = context;
    const fc_ring *p = j->p;
    int64_t n = item / j->pieces, piece = item % j->pieces;
    if (j->active && !j->active[n]) return;
    int64_t begin = p->floats * piece / j->pieces, end = p->floats * (piece + 1) / j->pieces;
    size_t size = (size_t)(end - begin) * sizeof(float);
    float *entry = j->ring + n * p->stream_stride + j->steps[n] % p->ring * p->entry_stride + begin;
    if (j->y) memcpy(j->y + n * p->floats + begin, entry, size);
    if (j->x) memcpy(entry, j->x + n * p->floats + begin, size);
}

void fc_run_ring(const fc_ring *p, intptr_t x, intptr_t ring, intptr_t steps, intptr_t y,
                 intptr_t active, int threads) {
    int64_t *seen = (int64_t *)steps;
    ring_job j = {p,    (const float *)x,          (float *)ring, (float *)y,
                  seen, (const uint8_t *)active, fc_max(1, p->floats / RING_FLOATS)};
    int few = p->streams * p->floats < 2 * RING_FLOATS;
    if (p->ring && p->floats)
        fc_parallel_for(few ? 1 : threads, p->streams * j.pieces, ring_item, &j);
    for (int64_t n = 0; x && n < p->streams; n++) seen[n] += !j.active || j.active[n];
}

static void play_one(const fc_call *c, intptr_t active, int threads) {
    switch (c->kind) {
    case FC_CALL_STEP:
        fc_step(c->params, c->x, c->weights, c->bias, c->residual, c->state, c->steps, 1, c->y,
                c->workspace, active, 1, threads);
        break;
    case FC_CALL_BLEND:
        fc_run_blend(c->params, c->x, c->weights, c->bias, c->residual, c->y, threads);
        break;
    case FC_CALL_MEANS: fc_run_means(c->params, c->x, c->y, c->workspace, threads); break;
    case FC_CALL_POOL: fc_run_pool(c->params, c->x, c->y, threads); break;
    case FC_CALL_TURN: fc_run_turn(c->params, c->x, c->y, threads); break;
    case FC_CALL_WINDOW:
        fc_run_window(c->params, c->x, c->state, c->steps, c->y, threads);
        break;
    case FC_CALL_RING:
        fc_run_ring(c->params, c->x, c->state, c->steps, c->y, active, threads);
        break;
    default: break;
    }
}

typedef struct {
    const fc_call *calls;
    int64_t count;
    intptr_t active;
    int threads;
} playing;

static void play_all(void *context) {
    const playing *p = context;
    for (int64_t i = 0; i < p->count; i++) play_one(&p->calls[i], p->active, p->threads);
}

void fc_play(const fc_call *calls, int64_t count, intptr_t active, int threads) {
    playing p = {calls, count, active, threads};
    fc_awake(threads, play_all, &p);
}
