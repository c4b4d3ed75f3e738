/* Depthwise tiles of one row with any taps, strides, dilations, channels and multiplier. */
#ifndef FC_DEPTHWISE_LOOPS_H
#define FC_DEPTHWISE_LOOPS_H

#include "depthwise_tile.h"

enum { LOOP_COLS = VL == 16 ? 8 : 4 };

/* One vector of a tile, more of which is in dw_tile.

   out_cols             outputs of the tile that exist
   lanes_in, lanes_out  channels that it reads and writes, at most VL
   lane_of              lane of the input vector that each output reads; NULL for its own
   top, left            row and column of the tile's first tap, which may be outside */
typedef struct {
    const fc_geometry *geometry;
    int64_t out_cols, lanes_in, lanes_out, top, left;
    const vec_int *lane_of;
} dw_loops;

INLINE vec loop_load(int whole, int spread, const float *p, const dw_loops *l) {
    vec v = whole ? vload(p) : vload_n(p, l->lanes_in);
    return spread ? vpermute(v, *l->lane_of) : v;
}

/* sum += one row of taps, from w on; p: where the first tap of the first output is, or would be. */
INLINE void loop_row(int whole, int spread, const float *p, int64_t x_col, const float *w,
                     const dw_loops *l, vec *sum) {
    int64_t width = l->geometry->in_size[2], stride = l->geometry->stride[2];
    int64_t step = stride * x_col, dilation = l->geometry->dilation[2];
    int64_t column = l->left, last = (LOOP_COLS - 1) * stride;
    for (int64_t b = 0; b < l->geometry->kernel[2]; b++, w += VL) {
        vec tap = vload(w);
        int inside = l->out_cols == LOOP_COLS && column >= 0 && column + last < width;
        UNROLL
        for (int j = 0; j < LOOP_COLS; j++) {
            int64_t at = column + j * stride;
            if (inside || (j < l->out_cols && at >= 0 && at < width))
                sum[j] += loop_load(whole, spread, p + j * step, l) * tap;
        }
        column += dilation;
        p += dilation * x_col;
    }
}

INLINE void loop_body(int whole, int spread, const dw_tile *g, const dw_loops *l) {
    const fc_geometry *geometry = l->geometry;
    vec sum[LOOP_COLS], start = g->bias ? vload_n(g->bias, l->lanes_out) : vzero();
    UNROLL
    for (int j = 0; j < LOOP_COLS; j++) sum[j] = start;
    const float *w = g->weights;
    for (int64_t k = 0; k < g->count; k++)
        for (int64_t a = 0; a < geometry->kernel[1]; a++, w += geometry->kernel[2] * VL) {
            int64_t down = a * geometry->dilation[1], row = l->top + down;
            if (row >= 0 && row < geometry->in_size[1])
                loop_row(whole, spread, g->frames[k] + g->at + down * g->x_row, g->x_col, w, l, sum);
        }
    vec low = vset(activation_floor(g->activation));
    UNROLL
    for (int j = 0; j < LOOP_COLS; j++) {
        if (j >= l->out_cols) break;
        vec z = sum[j];
        if (g->residual) z += vload_n(g->residual + j * g->y_col, l->lanes_out);
        vstore_n(g->y + j * g->y_col, vmax(z, low), l->lanes_out);
    }
    if (activates_later(g->activation))
        activate_rows(g->y, g->y_col, l->out_cols, l->lanes_out, g->activation);
}

static void loop_tile(const dw_tile *g, const dw_loops *l) {
    if (l->lane_of) loop_body(0, 1, g, l);
    else if (l->lanes_in == VL) loop_body(1, 0, g, l);
    else loop_body(0, 0, g, l);
}

#endif
