/* One step of a stream: which columns are complete, and what is kept for the others. */
#include "internal.h"

#include <string.h>

enum { FLOATS_PER_THREAD = 1 << 15 }; /* copied before another thread has started */

typedef struct {
    const fc_isa *isa;
    const fc_plan *plan;
    const fc_continual *c;
    fc_arrays a; /* the workspace behind what is taken from it here */
    const float *x;
    float *state;
    const uint8_t *active;
    int64_t *seen, seen_stride;
    int64_t in_size, out_size; /* floats of a frame and of a column */
} step_call;

static int64_t table_size(const fc_plan *p) {
    const fc_continual *c = p->params;
    int64_t floats = (int64_t)sizeof(intptr_t) / (int64_t)sizeof(float);
    return fc_lines(p->batch * c->taps * floats);
}

int64_t fc_step_copies(const fc_plan *p) {
    const fc_continual *c = p->params;
    int64_t x = p->in_channels * p->in_points, y = p->out_channels * p->out_points;
    if (c->sums) return (p->contiguous ? fc_lines(x) : 0) + 3 * fc_lines(y);
    if (!p->contiguous) return table_size(p);
    return table_size(p) + fc_lines(p->batch * c->taps * x) +
           (p->has_residual ? 2 : 1) * fc_lines(p->batch * y);
}

static float *take(step_call *s, int64_t floats) {
    float *memory = s->a.workspace;
    s->a.workspace += fc_lines(floats);
    return memory;
}

static int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }

static int is_active(const step_call *s, int64_t n) { return !s->active || s->active[n]; }

static int64_t time_of(const step_call *s, int64_t n) { return s->seen[n * s->seen_stride]; }

/* Whether there is a column of time t. */
static int is_column(const step_call *s, int64_t t) {
    return modulo(t - s->c->ring, s->c->stride) == 0;
}

typedef struct {
    const step_call *step; /* NULL: one row */
    const float *from;
    float *to;
    int64_t rows, row, pieces;
} copy_job;

static void copy_item(void *context, int64_t item, int thread) {
    (void)thread;
    const copy_job *j = context;
    int64_t row = item / j->pieces, piece = item % j->pieces, slot = 0, ring = 1;
    if (j->step) {
        int64_t n = row / j->rows;
        if (!is_active(j->step, n)) return;
        ring = j->step->c->ring;
        slot = time_of(j->step, n) % ring;
    }
    int64_t begin = j->row * piece / j->pieces, end = j->row * (piece + 1) / j->pieces;
    memcpy(j->to + (row * ring + slot) * j->row + begin, j->from + row * j->row + begin,
           (size_t)(end - begin) * sizeof(float));
}

/* Rows of floats, each cut into pieces where there are fewer than threads. */
static void copy(copy_job j, int64_t rows, int threads) {
    if (!rows || !j.row) return;
    if (rows * j.row < 2 * fc_least_work(FLOATS_PER_THREAD)) threads = 1;
    j.pieces = fc_min(fc_ceil_div(threads, rows), j.row);
    fc_parallel_for(threads, rows * j.pieces, copy_item, &j);
}

/* Where the taps of a stream's column read, channels last. */
static void find_frames(const step_call *s, int64_t n, const float **frames, float *copies) {
    const fc_plan *p = s->plan;
    const fc_continual *c = s->c;
    int64_t t = time_of(s, n), points = p->in_points, channels = p->in_channels;
    for (int64_t k = 0; k < c->taps; k++) {
        int64_t time = t - c->ring + k * c->dilation;
        if (c->replicate) time = fc_max(time, 0);
        const float *from = s->x + n * s->in_size;
        int64_t row = points;
        if (time != t && !p->contiguous) {
            from = s->state + (n * c->ring + modulo(time, c->ring)) * s->in_size;
        } else if (time != t) {
            from = s->state + (n * channels * c->ring + modulo(time, c->ring)) * points;
            row = c->ring * points;
        }
        frames[k] = from;
        if (!p->contiguous) continue;
        float *copied = copies + (n * c->taps + k) * s->in_size;
        s->isa->transpose(from, row, copied, channels, 1, channels, points, s->a.threads);
        frames[k] = copied;
    }
}

/* The columns of streams first .. last - 1, which all have one. */
static void columns(const step_call *s, int64_t first, int64_t last, const float **frames,
                    float *copies) {
    const fc_plan *p = s->plan;
    int64_t points = p->out_points, channels = p->out_channels;
    fc_arrays a = s->a;
    float *y = a.y + first * s->out_size;
    a.y = p->contiguous ? copies : y;
    if (a.residual) a.residual += first * s->out_size;
    if (a.residual && p->contiguous) {
        float *residual = copies + fc_lines(p->batch * s->out_size);
        s->isa->transpose(a.residual, points, residual, channels, last - first, channels, points,
                          a.threads);
        a.residual = residual;
    }
    s->isa->step(s->c, &a, frames + first * s->c->taps, last - first);
    if (p->contiguous)
        s->isa->transpose(a.y, channels, y, points, last - first, points, channels, a.threads);
}

/* The state is the last frames: columns are summed as over a clip, then x takes its slot. */
static void with_frames(step_call *s, int update) {
    const fc_plan *p = s->plan;
    const fc_continual *c = s->c;
    const float **frames = (const float **)take(s, table_size(p));
    float *inputs = s->a.workspace, *outputs = inputs;
    if (p->contiguous) {
        inputs = take(s, p->batch * c->taps * s->in_size);
        outputs = take(s, p->batch * s->out_size);
        if (p->has_residual) take(s, p->batch * s->out_size);
    }
    for (int64_t n = 0, first = 0; n <= p->batch; n++) {
        if (n < p->batch && is_active(s, n) && is_column(s, time_of(s, n))) {
            find_frames(s, n, frames + n * c->taps, inputs);
            continue;
        }
        if (first < n) columns(s, first, n, frames, outputs);
        first = n + 1;
    }
    if (!update || !c->ring) return;
    copy_job keep = {.step = s, .from = s->x, .to = s->state,
                     .rows = p->contiguous ? p->in_channels : 1,
                     .row = p->contiguous ? p->in_points : s->in_size};
    copy(keep, p->batch * keep.rows, s->a.threads);
}

typedef struct {
    const float *a, *b;
    float *sum;
    int64_t size, pieces;
} add_job;

static void add_item(void *context, int64_t item, int thread) {
    (void)thread;
    const add_job *j = context;
    int64_t end = j->size * (item + 1) / j->pieces;
    for (int64_t i = j->size * item / j->pieces; i < end; i++) j->sum[i] = j->a[i] + j->b[i];
}

/* One stream of the second form; maps of a column's size and channels last are what it works on. */
typedef struct {
    step_call *step;
    int64_t n;
    const float *x;
    float *maps[3];
} sum_call;

/* y = the frame under one tap + residual; under the last one with bias and activation. */
static void tap_product(const sum_call *u, int64_t tap, const float *residual, float *y) {
    const step_call *s = u->step;
    const fc_continual *c = s->c;
    int last = tap == c->taps - 1;
    fc_arrays a = s->a;
    a.x = u->x;
    a.weights += tap * c->tap_size;
    a.residual = residual;
    a.y = y;
    if (!last) a.bias[0] = NULL;
    s->isa->run[c->inner](last ? c->params : c->partial, &a);
}

static float *slot_of(const sum_call *u, int64_t slot) {
    const step_call *s = u->step;
    int64_t ring = s->c->ring, points = s->plan->out_points;
    if (!s->plan->contiguous) return s->state + (u->n * ring + slot) * s->out_size;
    return s->state + u->n * ring * s->out_size + slot * points;
}

static const float *load_slot(const sum_call *u, int64_t slot, float *map) {
    const step_call *s = u->step;
    const fc_plan *p = s->plan;
    if (!p->contiguous) return slot_of(u, slot);
    s->isa->transpose(slot_of(u, slot), s->c->ring * p->out_points, map, p->out_channels, 1,
                      p->out_channels, p->out_points, s->a.threads);
    return map;
}

static void store_slot(const sum_call *u, int64_t slot, const float *map) {
    const step_call *s = u->step;
    const fc_plan *p = s->plan;
    if (p->contiguous) {
        s->isa->transpose(map, p->out_channels, slot_of(u, slot), s->c->ring * p->out_points, 1,
                          p->out_points, p->out_channels, s->a.threads);
        return;
    }
    copy_job j = {.from = map, .to = slot_of(u, slot), .rows = 1, .row = s->out_size};
    copy(j, 1, s->a.threads);
}

/* What the frames in front of the stream have added, all of them its first: the sum for the next
   column; and for the others to their slots. */
static const float *begin(const sum_call *u, int update) {
    const fc_continual *c = u->step->c;
    const float *sum = NULL;
    for (int64_t k = 0; k < c->taps - 1; k++) {
        float *to = u->maps[k & 1];
        tap_product(u, k, sum, to);
        sum = to;
        int64_t slot = (c->taps - 2 - k) * c->dilation;
        for (int64_t i = 0; update && i < c->dilation; i++) store_slot(u, slot + i, to);
    }
    return sum;
}

/* The column that is complete. */
static void finish(const sum_call *u, const float *sum) {
    const step_call *s = u->step;
    const fc_plan *p = s->plan;
    int64_t size = s->out_size, points = p->out_points, channels = p->out_channels;
    float *y = s->a.y + u->n * size;
    if (s->a.residual) {
        const float *residual = s->a.residual + u->n * size;
        if (p->contiguous) {
            s->isa->transpose(residual, points, u->maps[2], channels, 1, channels, points,
                              s->a.threads);
            residual = u->maps[2];
        }
        if (sum) {
            int threads = size < fc_least_work(FLOATS_PER_THREAD) ? 1 : s->a.threads;
            add_job j = {sum, residual, u->maps[2], size, threads};
            fc_parallel_for(threads, threads, add_item, &j);
            residual = u->maps[2];
        }
        sum = residual;
    }
    float *to = !p->contiguous ? y : sum == u->maps[1] ? u->maps[0] : u->maps[1];
    tap_product(u, s->c->taps - 1, sum, to);
    if (p->contiguous)
        s->isa->transpose(to, channels, y, points, 1, points, channels, s->a.threads);
}

/* The frame under the other taps, to the columns that they complete later; the first tap to reach
   one overwrites the slot. */
static void add_frame(const sum_call *u, int64_t t) {
    const step_call *s = u->step;
    const fc_continual *c = s->c;
    for (int64_t k = 0; k < c->taps - 1; k++) {
        int64_t time = t + (c->taps - 1 - k) * c->dilation, slot = time % c->ring;
        if (!is_column(s, time)) continue;
        int direct = !k && !s->plan->contiguous;
        float *to = direct ? slot_of(u, slot) : u->maps[1];
        tap_product(u, k, k ? load_slot(u, slot, u->maps[0]) : NULL, to);
        if (!direct) store_slot(u, slot, to);
    }
}

/* The state is the columns that are not complete. */
static void with_sums(step_call *s, int update) {
    const fc_plan *p = s->plan;
    const fc_continual *c = s->c;
    float *copied = p->contiguous ? take(s, s->in_size) : NULL;
    sum_call u = {.step = s};
    for (int i = 0; i < 3; i++) u.maps[i] = take(s, s->out_size);
    for (u.n = 0; u.n < p->batch; u.n++) {
        int64_t t = time_of(s, u.n);
        int is_begin = c->replicate && !t && c->ring, has_column = is_column(s, t);
        if (!is_active(s, u.n) || !(update || has_column)) continue;
        u.x = s->x + u.n * s->in_size;
        if (p->contiguous) {
            s->isa->transpose(u.x, p->in_points, copied, p->in_channels, 1, p->in_channels,
                              p->in_points, s->a.threads);
            u.x = copied;
        }
        const float *sum = is_begin ? begin(&u, update) : NULL;
        if (has_column) {
            if (c->ring && !is_begin) sum = load_slot(&u, t % c->ring, u.maps[0]);
            finish(&u, sum);
        }
        if (update) add_frame(&u, t);
    }
}

void fc_step(const fc_plan *p, intptr_t x, intptr_t weights, intptr_t bias, intptr_t residual,
             intptr_t state, intptr_t steps, int64_t steps_stride, intptr_t y, intptr_t workspace,
             intptr_t active, int update, int threads) {
    const fc_continual *c = p->params;
    step_call s = {.isa = fc_set(p->isa),
                   .plan = p,
                   .c = c,
                   .a = {.weights = (const float *)weights,
                         .bias = {(const float *)bias},
                         .residual = (const float *)residual,
                         .y = (float *)y,
                         .workspace = fc_line_up(workspace),
                         .threads = threads},
                   .x = (const float *)x,
                   .state = (float *)state,
                   .active = (const uint8_t *)active,
                   .seen = (int64_t *)steps,
                   .seen_stride = steps_stride,
                   .in_size = p->in_channels * p->in_points,
                   .out_size = p->out_channels * p->out_points};
    if (c->sums) with_sums(&s, update);
    else with_frames(&s, update);
    for (int64_t n = 0; update && n < p->batch; n++) s.seen[n * steps_stride] += is_active(&s, n);
}
