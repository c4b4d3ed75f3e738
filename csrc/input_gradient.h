/* Input gradients of depthwise convolutions with any stride and dilation.

   Inputs of a row that lie a stride apart read gy under the same taps, one output further each: a
   block of them shares the loads of the weights. */
#ifndef FC_INPUT_GRADIENT_H
#define FC_INPUT_GRADIENT_H

#include "vec.h"

enum { IG_COLS = VL == 16 ? 8 : 4 };

typedef struct {
    const fc_gradient *params;
    const float *gy, *weights; /* (taps, C + VL) */
    float *gx;
} ig_call;

/* The output that reads input i under tap k of an axis, or -1. */
static int64_t ig_output(const fc_geometry *g, int axis, int64_t i, int64_t k) {
    int64_t at = i + g->pad[axis] - k * g->dilation[axis];
    if (at < 0 || at % g->stride[axis] || at / g->stride[axis] >= g->out_size[axis]) return -1;
    return at / g->stride[axis];
}

/* A vector of channels of `cols` inputs, the first at column i.

   rows, weights  (count,): row of gy at column 0, and weights at tap 0 along W, of every tap in time
                  and height that reads this row of inputs */
INLINE void ig_block(int whole, const ig_call *call, const float *const *rows,
                     const float *const *weights, int64_t count, int64_t i, int64_t cols,
                     int64_t lanes, float *gx) {
    const fc_geometry *g = &call->params->geometry;
    int64_t c = g->in_channels, w_tap = c + VL, width = g->out_size[2], step = g->stride[2];
    vec sum[IG_COLS];
    UNROLL
    for (int j = 0; j < IG_COLS; j++) sum[j] = vzero();
    for (int64_t b = 0; b < g->kernel[2]; b++) {
        int64_t at = i + g->pad[2] - b * g->dilation[2];
        if (at % step) continue;
        at = at / step;
        int inside = at >= 0 && cols == IG_COLS && at + IG_COLS <= width;
        for (int64_t n = 0; n < count; n++) {
            const float *gy = rows[n] + at * c;
            vec w = vload(weights[n] + b * w_tap);
            UNROLL
            for (int j = 0; j < IG_COLS; j++)
                if (inside || (j < cols && at + j >= 0 && at + j < width))
                    sum[j] += (whole ? vload(gy + j * c) : vload_n(gy + j * c, lanes)) * w;
        }
    }
    UNROLL
    for (int j = 0; j < IG_COLS; j++)
        if (j < cols) vstore_n(gx + j * step * c, sum[j], lanes);
}

/* A row of inputs. */
static void ig_item(void *context, int64_t item, int thread) {
    (void)thread;
    const ig_call *call = context;
    const fc_geometry *g = &call->params->geometry;
    int64_t row = item % g->in_size[1], t = item / g->in_size[1] % g->in_size[0];
    int64_t image = item / (g->in_size[0] * g->in_size[1]), c = g->in_channels;
    int64_t line = g->out_size[2] * c, width = g->in_size[2], step = g->stride[2];
    float *gx = call->gx + item * width * c;
    enum { IG_TAPS = 64 }; /* of a pass; sums of more taps would be added to those before */
    const float *rows[IG_TAPS], *weights[IG_TAPS];
    int64_t count = 0;
    for (int64_t i = 0; i < g->kernel[0]; i++) {
        int64_t out_t = ig_output(g, 0, t, i);
        for (int64_t a = 0; out_t >= 0 && a < g->kernel[1]; a++) {
            int64_t out_row = ig_output(g, 1, row, a);
            if (out_row < 0) continue;
            rows[count] = call->gy + ((image * g->out_size[0] + out_t) * g->out_size[1] + out_row) * line;
            weights[count++] = call->weights + (i * g->kernel[1] + a) * g->kernel[2] * (c + VL);
        }
    }
    for (int64_t phase = 0; phase < fc_min(step, width); phase++)
        for (int64_t channel = 0; channel < c; channel += VL) {
            int64_t lanes = vcount(c, channel), all = (width - phase - 1) / step + 1;
            const float *from[IG_TAPS], *by[IG_TAPS];
            for (int64_t n = 0; n < count; n++) {
                from[n] = rows[n] + channel;
                by[n] = weights[n] + channel;
            }
            for (int64_t j = 0; j < all; j += IG_COLS) {
                int64_t i = phase + j * step, cols = fc_min(IG_COLS, all - j);
                float *to = gx + i * c + channel;
                if (lanes == VL) ig_block(1, call, from, by, count, i, cols, lanes, to);
                else ig_block(0, call, from, by, count, i, cols, lanes, to);
            }
        }
}

enum { IG_SERIAL = 1 << 18 };

static void input_gradient(const fc_gradient *p, const float *gy, const float *w, float *gx,
                           float *workspace, int threads) {
    const fc_geometry *g = &p->geometry;
    int64_t c = g->in_channels, taps = g->kernel[0] * g->kernel[1] * g->kernel[2];
    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t i = 0; i < c + VL; i++)
            workspace[tap * (c + VL) + i] = i < c ? w[i * taps + tap] : 0.0f;
    ig_call call = {.params = p, .gy = gy, .weights = workspace, .gx = gx};
    int64_t rows = g->batch * g->in_size[0] * g->in_size[1];
    if (rows * g->in_size[2] * c * taps < IG_SERIAL) threads = 1;
    fc_parallel_for(threads, rows, ig_item, &call);
}

#endif
