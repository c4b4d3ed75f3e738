/* Weight gradients of convolutions with few channels per group: lanes are input channels.

   A sum is kept for every tap, lane and output of the lane's group. While a row of pixels passes,
   the sums of some taps and outputs stay in registers: the vector of gy is permuted once per output
   and meets the inputs under all of these taps. */
#ifndef FC_WEIGHT_GRADIENT_H
#define FC_WEIGHT_GRADIENT_H

#include "vec.h"

/* Taps in time and height that are summed together, for 1, 3 and 5 taps along W. */
enum { WG_ROWS_1 = 6, WG_ROWS_3 = 3, WG_ROWS_5 = 2, WG_ROWS = 6, WG_INPUTS = 10, WG_SUMS = 24 };

/* sums[r] (cols, outs, VL) += gy times x, over `rows` rows of `pixels` pixels

   x        first input under tap 0 of each of the row taps; x_row, x_pixel apart for outputs that
            follow one another, x_tap for taps along W
   lane_of  (outs, VL): lanes of gy; a single output multiplies lane by lane
   x_lanes, y_lanes  readable lanes of both vectors */
typedef struct {
    const float *gy, *x[WG_ROWS];
    float *sums[WG_ROWS];
    int64_t rows, pixels, gy_row, gy_pixel, x_row, x_pixel, x_tap, x_lanes, y_lanes;
    const int32_t *lane_of;
} wg_job;

INLINE void wg_body(int taps, int cols, int outs, int whole, const wg_job *j) {
    vec sum[WG_SUMS];
    UNROLL
    for (int r = 0; r < taps; r++)
        UNROLL
        for (int i = 0; i < cols * outs; i++) sum[r * cols * outs + i] = vload(j->sums[r] + i * VL);
    for (int64_t row = 0; row < j->rows; row++) {
        const float *gy = j->gy + row * j->gy_row, *x[WG_ROWS];
        UNROLL
        for (int r = 0; r < taps; r++) x[r] = j->x[r] + row * j->x_row;
        for (int64_t p = 0; p < j->pixels; p++, gy += j->gy_pixel) {
            vec v[WG_INPUTS], g = whole ? vload(gy) : vload_n(gy, j->y_lanes);
            UNROLL
            for (int r = 0; r < taps; r++) {
                UNROLL
                for (int b = 0; b < cols; b++) {
                    const float *from = x[r] + b * j->x_tap;
                    v[r * cols + b] = whole ? vload(from) : vload_n(from, j->x_lanes);
                }
                x[r] += j->x_pixel;
                if (outs > 1) continue; /* one row of taps */
                UNROLL
                for (int b = 0; b < cols; b++) sum[r * cols + b] += v[r * cols + b] * g;
            }
            if (outs == 1) continue;
            UNROLL
            for (int o = 0; o < outs; o++) {
                vec_int lanes;
                memcpy(&lanes, j->lane_of + o * VL, sizeof lanes);
                vec of_group = vpermute(g, lanes);
                UNROLL
                for (int b = 0; b < cols; b++) sum[b * outs + o] += v[b] * of_group;
            }
        }
    }
    UNROLL
    for (int r = 0; r < taps; r++)
        UNROLL
        for (int i = 0; i < cols * outs; i++) vstore(j->sums[r] + i * VL, sum[r * cols * outs + i]);
}

typedef void (*wg_kernel)(const wg_job *);

/* X(taps, cols, outs) for every set of sums that registers hold. Outputs of a group come in these
   numbers. */
#define EACH_WG_ONE(X)                                                                          \
    X(1, 1, 1) X(2, 1, 1) X(3, 1, 1) X(4, 1, 1) X(5, 1, 1) X(6, 1, 1) X(1, 3, 1) X(2, 3, 1)       \
    X(3, 3, 1) X(1, 5, 1) X(2, 5, 1)
#define EACH_WG_FEW(X)                                                                          \
    X(1, 1, 2) X(1, 1, 3) X(1, 1, 4) X(1, 3, 2) X(1, 3, 3) X(1, 3, 4)
#if VL == 16
#define EACH_WG(X)                                                                              \
    EACH_WG_ONE(X) EACH_WG_FEW(X) X(1, 1, 6) X(1, 1, 8) X(1, 3, 6) X(1, 3, 8)
#else
#define EACH_WG(X) EACH_WG_ONE(X) EACH_WG_FEW(X)
#endif
#define WG_KERNEL(taps, cols, outs)                                                             \
    static void wg_##taps##_##cols##_##outs(const wg_job *j) { wg_body(taps, cols, outs, 1, j); } \
    static void wg_##taps##_##cols##_##outs##_part(const wg_job *j) {                           \
        wg_body(taps, cols, outs, 0, j);                                                        \
    }
EACH_WG(WG_KERNEL)
#define WG_NAME(taps, cols, outs)                                                               \
    [taps][cols][outs] = {wg_##taps##_##cols##_##outs##_part, wg_##taps##_##cols##_##outs},
static const wg_kernel wg_kernels[WG_ROWS + 1][6][FC_MOST_OUTPUTS + 1][2] = {EACH_WG(WG_NAME)};

typedef struct {
    const fc_gradient *params;
    const float *x, *gy;
    float *sums, *gw;
} wg_call;

/* Outputs from..to - 1 along an axis whose inputs under tap k exist. */
typedef struct {
    int64_t from, to;
} wg_range;

static wg_range wg_inside(const fc_geometry *g, int axis, int64_t k, int64_t from, int64_t to) {
    int64_t start = k * g->dilation[axis] - g->pad[axis], step = g->stride[axis];
    int64_t low = start < 0 ? fc_ceil_div(-start, step) : 0, last = g->in_size[axis] - 1 - start;
    int64_t high = last < 0 ? 0 : last / step + 1;
    wg_range r = {fc_max(from, low), fc_min(to, high)};
    if (r.to < r.from) r.to = r.from;
    return r;
}

/* One block at work on a strip of an image.

   taps (KT * KH): first input of each, at the strip's image and output frame, row and column 0 */
typedef struct {
    const wg_call *call;
    const fc_gradient_block *block;
    const int32_t *lane_of;
    float *sums;
    const float *gy; /* of the output frame */
    int64_t x_row;
    int whole;
} wg_work;

/* Some row taps, for outputs from..to - 1 along H, and all taps along W. */
static void wg_rows(const wg_work *w, const float *const *x, const int64_t *tap, int taps,
                    wg_range rows) {
    const fc_geometry *g = &w->call->params->geometry;
    int64_t outs = w->block->outputs, kw = g->kernel[2], width = g->out_size[2];
    int64_t c = g->in_channels, k = g->out_channels;
    if (rows.from >= rows.to) return;
    wg_job job = {.rows = rows.to - rows.from,
                  .gy_row = width * k, .gy_pixel = k,
                  .x_row = g->stride[1] * w->x_row, .x_pixel = g->stride[2] * c,
                  .x_tap = g->dilation[2] * c,
                  .x_lanes = vcount(c, w->block->x_channel),
                  .y_lanes = vcount(k, w->block->y_channel),
                  .lane_of = w->lane_of};
    wg_range inner = {0, width};
    for (int64_t b = 0; b < kw; b++) inner = wg_inside(g, 2, b, inner.from, inner.to);
    int together = (kw == 3 || (kw == 5 && outs == 1)) && inner.from < inner.to;
    for (int64_t b = together ? -1 : 0; b < kw; b++) {
        /* All taps where all are inside, then what each has beyond. */
        wg_range parts[2] = {inner};
        int cols = b < 0 ? (int)kw : 1, count = 1;
        if (b >= 0) {
            parts[0] = wg_inside(g, 2, b, 0, width);
            if (together) {
                count = 2;
                parts[1] = (wg_range){inner.to, parts[0].to};
                parts[0].to = inner.from;
            }
        }
        for (int i = 0; i < count; i++) {
            int64_t at = fc_max(b, 0) * g->dilation[2] - g->pad[2] + parts[i].from * g->stride[2];
            job.pixels = parts[i].to - parts[i].from;
            if (job.pixels <= 0) continue;
            job.gy = w->gy + (rows.from * width + parts[i].from) * k;
            for (int r = 0; r < taps; r++) {
                job.x[r] = x[r] + rows.from * job.x_row + at * c;
                job.sums[r] = w->sums + (tap[r] * kw + fc_max(b, 0)) * outs * VL;
            }
            wg_kernels[taps][cols][outs][w->whole](&job);
        }
    }
}

/* Every tap of an output frame. */
static void wg_frame(wg_work *w, int64_t image, int64_t t, wg_range strip) {
    const wg_call *call = w->call;
    const fc_geometry *g = &call->params->geometry;
    int64_t kh = g->kernel[1], plane = g->in_size[1] * w->x_row;
    int64_t out_plane = g->out_size[1] * g->out_size[2] * g->out_channels;
    w->gy = call->gy + (image * g->out_size[0] + t) * out_plane + w->block->y_channel;
    wg_range inner = strip;
    for (int64_t a = 0; a < kh; a++) inner = wg_inside(g, 1, a, inner.from, inner.to);
    int64_t kw = g->kernel[2];
    int most = w->block->outputs > 1 ? 1
               : kw == 3             ? WG_ROWS_3
               : kw == 5             ? WG_ROWS_5
                                     : WG_ROWS_1;
    const float *x[WG_ROWS];
    int64_t taps[WG_ROWS];
    int count = 0;
    for (int64_t i = 0; i < g->kernel[0]; i++) {
        int64_t in_t = t * g->stride[0] - g->pad[0] + i * g->dilation[0];
        if (in_t < 0 || in_t >= g->in_size[0]) continue;
        const float *frame =
            call->x + (image * g->in_size[0] + in_t) * plane + w->block->x_channel;
        for (int64_t a = 0; a < kh; a++) {
            const float *from = frame + (a * g->dilation[1] - g->pad[1]) * w->x_row;
            int64_t tap = i * kh + a;
            wg_range rows = wg_inside(g, 1, a, strip.from, strip.to);
            if (inner.from >= inner.to) {
                wg_rows(w, &from, &tap, 1, rows);
                continue;
            }
            wg_rows(w, &from, &tap, 1, (wg_range){rows.from, inner.from});
            wg_rows(w, &from, &tap, 1, (wg_range){inner.to, rows.to});
            x[count] = from;
            taps[count++] = tap;
            if (count == most) {
                wg_rows(w, x, taps, count, inner);
                count = 0;
            }
        }
    }
    if (count) wg_rows(w, x, taps, count, inner);
}

static int64_t wg_block_sums(const fc_gradient *p, int64_t block) {
    const fc_geometry *g = &p->geometry;
    return g->kernel[0] * g->kernel[1] * g->kernel[2] * p->block[block].outputs * VL;
}

/* Where the sums of a block begin in those of its chunk. */
static int64_t wg_sums_at(const fc_gradient *p, int64_t block) {
    int64_t at = 0;
    for (int64_t b = 0; b < block; b++) at += wg_block_sums(p, b);
    return at;
}

static void wg_item(void *context, int64_t item, int thread) {
    (void)thread;
    const wg_call *call = context;
    const fc_gradient *p = call->params;
    const fc_geometry *g = &p->geometry;
    int64_t block = item % p->blocks, chunk = item / p->blocks;
    int64_t strips = fc_ceil_div(g->out_size[1], p->high), all = g->batch * strips;
    wg_work w = {.call = call,
                 .block = p->block + block,
                 .lane_of = p->lane_of + block * FC_MOST_OUTPUTS * VL,
                 .sums = call->sums + chunk * p->sums + wg_sums_at(p, block),
                 .x_row = g->in_size[2] * g->in_channels};
    w.whole = w.block->x_channel + VL <= g->in_channels &&
              w.block->y_channel + VL <= g->out_channels;
    memset(w.sums, 0, (size_t)wg_block_sums(p, block) * sizeof(float));
    for (int64_t i = all * chunk / p->chunks; i < all * (chunk + 1) / p->chunks; i++) {
        wg_range strip = {i % strips * p->high, 0};
        strip.to = fc_min(strip.from + p->high, g->out_size[1]);
        for (int64_t t = 0; t < g->out_size[0]; t++) wg_frame(&w, i / strips, t, strip);
    }
}

/* The sums of all chunks of a block, in order, to their places in gw (K, C / G, taps). */
static void wg_finish(void *context, int64_t item, int thread) {
    (void)thread;
    const wg_call *call = context;
    const fc_gradient *p = call->params;
    const fc_geometry *g = &p->geometry;
    const fc_gradient_block *block = p->block + item;
    const int32_t *lane_of = p->lane_of + item * FC_MOST_OUTPUTS * VL;
    const float *first = call->sums + wg_sums_at(p, item);
    int64_t taps = g->kernel[0] * g->kernel[1] * g->kernel[2], depth = g->in_channels / g->groups;
    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t o = 0; o < block->valid; o++) {
            const float *from = first + (tap * block->outputs + o) * VL;
            vec sum = vload(from);
            for (int64_t i = 1; i < p->chunks; i++) sum += vload(from + i * p->sums);
            for (int64_t l = 0; l < block->x_lanes; l++) {
                int64_t k = block->y_channel + lane_of[o * VL + l];
                int64_t c = (block->x_channel + l) % depth;
                call->gw[(k * depth + c) * taps + tap] = sum[l];
            }
        }
}

enum { WG_SERIAL = 1 << 18 }; /* multiplications below which starting threads would not pay */

static void weight_gradient(const fc_gradient *p, const float *x, const float *gy, float *gw,
                            float *workspace, int threads) {
    const fc_geometry *g = &p->geometry;
    wg_call call = {.params = p, .x = x, .gy = gy, .sums = workspace, .gw = gw};
    int64_t outs = g->batch * g->out_channels * g->out_size[0] * g->out_size[1] * g->out_size[2];
    if (outs * g->kernel[0] * g->kernel[1] * g->kernel[2] < WG_SERIAL) threads = 1;
    fc_parallel_for(threads, p->chunks * p->blocks, wg_item, &call);
    fc_parallel_for(threads, p->blocks, wg_finish, &call);
}

#endif
