/* Depthwise tiles of three taps along T that read a plane once, for the three frames that it adds
   to: a load serves three products. The sums of two frames wait in memory for planes to come. */
#ifndef FC_DEPTHWISE_ROLL_H
#define FC_DEPTHWISE_ROLL_H

#include "depthwise_tile.h"

enum { ROLL_TAPS = 3, ROLL_COLS = VL == 16 ? 7 : 4, ROLL_ROWS = 2 };

/* sum += one row of taps, from w on, for the frames oldest..newest. */
INLINE void roll_row(int kw, int sw, int edge, int oldest, int newest, const dw_tile *g,
                     const float *row, const float *w, vec sum[ROLL_TAPS][ROLL_COLS]) {
    int in_cols = (ROLL_COLS - 1) * sw + kw;
    UNROLL
    for (int b = 0; b < kw; b++, row += g->x_col, w += VL) {
        vec taps[ROLL_TAPS];
        UNROLL
        for (int k = oldest; k <= newest; k++)
            taps[k] = dw_held(vload(w + (ROLL_TAPS - 1 - k) * g->w_plane));
        const float *p = row;
        UNROLL
        for (int j = 0; j < ROLL_COLS; j++, p += sw * g->x_col) {
            int q = j * sw + b;
            if (edge && tile_outer(q, in_cols, kw) && !(g->cols >> q & 1)) continue;
            vec x = dw_held(vload(p));
            UNROLL
            for (int k = oldest; k <= newest; k++) sum[k][j] += x * taps[k];
        }
    }
}

/* ROLL_COLS outputs of a row in three frames; the oldest is complete and stored, at y.

   first  the oldest frame is not wanted
   last   nor is the newest */
INLINE void roll_body(int kh, int kw, int sh, int sw, int edge, int first, int last,
                      const dw_tile *g) {
    int oldest = first ? 1 : 0, newest = last ? 1 : 2;
    vec *waiting = (vec *)g->sums;
    for (int64_t v = 0; v < g->vectors; v++, waiting += (ROLL_TAPS - 1) * ROLL_COLS) {
        int64_t channel = fc_min(v * VL, g->last_channel);
        vec sum[ROLL_TAPS][ROLL_COLS], start = g->bias ? vload(g->bias + channel) : vzero();
        UNROLL
        for (int j = 0; j < ROLL_COLS; j++) {
            sum[0][j] = waiting[j];
            sum[1][j] = waiting[ROLL_COLS + j];
            sum[2][j] = start;
        }
        tile_ahead(sh, ROLL_COLS * sw, g, channel);
        if (!last && g->next_x) /* few outputs: for them as well */
            for (int j = 0; j < ROLL_COLS; j++)
                prefetch_write(g->y + channel + g->y_plane + j * g->y_col);
        const float *row = g->frames[0] + g->at + channel, *w = g->weights + v * g->w_vector;
        UNROLL
        for (int r = 0; r < kh; r++, row += g->x_row, w += kw * VL) {
            if (!edge || g->rows >> r & 1)
                roll_row(kw, sw, edge, oldest, newest, g, row, w, sum);
            /* Without it, compilers load for several rows and run out of registers. */
            __asm__ volatile("" ::: "memory");
        }
        if (!first) tile_store(1, ROLL_COLS, g, channel, sum[0]);
        UNROLL
        for (int j = 0; j < ROLL_COLS; j++) {
            waiting[j] = sum[1][j];
            waiting[ROLL_COLS + j] = sum[2][j];
        }
    }
}

/* Stride 2, where tiles rather wait for loads than for arithmetic. */
enum { ROLL_KERNEL = 3, ROLL_STRIDE = 2 };

#define ROLL(name, edge, first, last)                                                          \
    static void roll_##name(const dw_tile *g) {                                                \
        roll_body(ROLL_KERNEL, ROLL_KERNEL, ROLL_STRIDE, ROLL_STRIDE, edge, first, last, g);   \
    }
ROLL(inner, 0, 0, 0)
ROLL(edge, 1, 0, 0)
ROLL(last, 1, 0, 1)
ROLL(first, 1, 1, 0)
ROLL(only, 1, 1, 1)
/* By first and last; inner and at an edge. */
static const dw_kernel roll_kernels[2][2][2] = {
    {{roll_inner, roll_edge}, {roll_last, roll_last}},
    {{roll_first, roll_first}, {roll_only, roll_only}}};

/* Whether a geometry that has compiled tiles is better rolled. */
static int rolls(const fc_geometry *g) {
    int64_t width = g->out_size[2], wasted = fc_ceil_div(width, ROLL_COLS) * ROLL_COLS - width;
    return g->kernel[0] == ROLL_TAPS && g->stride[0] == 1 && g->dilation[0] == 1 &&
           g->pad[0] < ROLL_TAPS && g->kernel[1] == ROLL_KERNEL && g->kernel[2] == ROLL_KERNEL &&
           g->stride[1] == ROLL_STRIDE && g->stride[2] == ROLL_STRIDE && width >= ROLL_COLS &&
           3 * wasted <= width;
}

#endif
