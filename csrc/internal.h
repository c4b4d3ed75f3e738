/* Between the parts of the library: not seen by Python. */
#ifndef FC_INTERNAL_H
#define FC_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "fastconv.h"
#include "grouped.h"
#include "winograd.h"
#include "depthwise.h"
#include "hfa.h"
#include "continual.h"
#include "gradients.h"
#include "elementwise.h"
#include "play.h"
#include "families.h"

#define FC_LINE 16 /* floats of a cache line */

/* The arrays of one call. x, residual and y are (N, T, H, W, C) in C order; the workspace begins at
   a cache line. */
typedef struct {
    const float *x, *weights, *bias[3], *residual;
    float *y, *workspace;
    int threads;
} fc_arrays;

typedef void (*fc_kernel)(const void *params, const fc_arrays *arrays);

/* Everything compiled for one instruction set. */
typedef struct {
    const char *name;
    int lanes;
    int (*usable)(void);
    fc_kernel run[FC_FAMILIES];
    /* Columns of streams from the frames (streams, taps) that their taps read. */
    void (*step)(const fc_continual *params, const fc_arrays *arrays, const float *const *frames,
                 int64_t streams);
    /* Each of `images` matrices (rows, columns), rows from_stride apart, to (columns, rows), those
       to_stride apart; images follow each other. */
    void (*transpose)(const float *from, int64_t from_stride, float *to, int64_t to_stride,
                      int64_t images, int64_t rows, int64_t columns, int threads);
    /* As in gradients.h, channels last; the workspace begins at a cache line. */
    void (*weight_gradient)(const fc_gradient *params, const float *x, const float *gy, float *gw,
                            float *workspace, int threads);
    void (*input_gradient)(const fc_gradient *params, const float *gy, const float *w, float *gx,
                           float *workspace, int threads);
    void (*blend)(const fc_blend *params, const float *x, const float *scale, const float *shift,
                  const float *residual, float *y, int threads);
    void (*means)(const fc_means *params, const float *x, float *y, float *workspace, int threads);
    void (*pool)(const fc_pool *params, const float *x, float *y, int threads);
    void (*window)(const fc_window *params, const float *x, const float *ring, const int64_t *steps,
                   float *y, int threads);
} fc_isa;

const fc_isa *fc_set(int isa);

/* Elements that fc_step takes from the workspace before the inner family's own. */
int64_t fc_step_copies(const fc_plan *plan);

/* Call item(context, i, thread) for every i below items, in any order; thread < threads. */
typedef void (*fc_item)(void *context, int64_t i, int thread);
void fc_parallel_for(int threads, int64_t items, fc_item item, void *context);

/* Call body(context) while threads stay awake for the loops in it, which fc_is_awake tells. */
void fc_awake(int threads, void (*body)(void *), void *context);
int fc_is_awake(void);

/* What one thread does before another would have started to help: `asleep`, where it has to be woken
   first. A thread that looks for work is there in less than a microsecond instead of ten. */
static inline int64_t fc_least_work(int64_t asleep) { return fc_is_awake() ? asleep / 8 : asleep; }

static inline void fc_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static inline float *fc_line_up(intptr_t workspace) {
    intptr_t line = FC_LINE * (intptr_t)sizeof(float);
    return (float *)((workspace + line - 1) / line * line);
}
static inline int64_t fc_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t fc_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t fc_max(int64_t a, int64_t b) { return a > b ? a : b; }
/* Elements rounded up to whole cache lines. */
static inline int64_t fc_lines(int64_t size) { return fc_ceil_div(size, FC_LINE) * FC_LINE; }

#endif
