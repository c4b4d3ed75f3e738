/* Between convolutions: sums, scales and activations, means, pooling. */
#include "activation.h"

enum {
    BLEND_FLOATS = 1 << 14, /* of an item, and less than is worth a second thread */
    FLAT_ROW = 1 << 11,     /* floats, where nothing depends on the channel */
    MEAN_BLOCK = 128,       /* pixels summed one after the other: sums of sums round less */
    MEAN_VECTORS = 8,
    POOL_VECTORS = 4
};

typedef struct {
    const fc_blend *p;
    const float *x, *scale, *shift, *residual;
    float *y;
    int64_t rows, row, last_row, rows_per_item;
} blend_job;

INLINE void blend_vector(const blend_job *j, int64_t at, int64_t out, int64_t c, int64_t n,
                         const float *scale, int whole, int activation) {
    vec v = whole ? vload(j->x + at + c) : vload_n(j->x + at + c, n);
    if (scale) v *= whole ? vload(scale + c) : vload_n(scale + c, n);
    if (j->shift) v += whole ? vload(j->shift + c) : vload_n(j->shift + c, n);
    if (j->residual) v += whole ? vload(j->residual + at + c) : vload_n(j->residual + at + c, n);
    v = vactivate(v, activation);
    if (whole) vstore(j->y + out + c, v);
    else vstore_n(j->y + out + c, v, n);
}

/* One row: a pixel, or where nothing depends on the channel a longer piece. */
static void blend_row(const blend_job *j, int64_t row, int activation) {
    const fc_blend *p = j->p;
    int64_t at = row * j->row, out = row * (j->row == p->channels ? p->y_step : j->row), c = 0;
    int64_t length = row == j->rows - 1 ? j->last_row : j->row;
    const float *scale = j->scale;
    if (scale && p->per_image) scale += row / p->points * p->channels;
    for (; c + VL <= length; c += VL) blend_vector(j, at, out, c, VL, scale, 1, activation);
    if (c < length) blend_vector(j, at, out, c, length - c, scale, 0, activation);
}

static void blend_item(void *context, int64_t item, int thread) {
    (void)thread;
    const blend_job *j = context;
    int64_t first = item * j->rows_per_item, last = fc_min(first + j->rows_per_item, j->rows);
    for (int64_t row = first; row < last; row++) blend_row(j, row, j->p->activation);
}

static void blend_run(const fc_blend *p, const float *x, const float *scale, const float *shift,
                      const float *residual, float *y, int threads) {
    int64_t pixels = p->images * p->points, total = pixels * p->channels;
    blend_job j = {p, x, scale, shift, residual, y, pixels, p->channels, p->channels, 1};
    if (!total) return;
    if (!scale && !shift && p->y_step == p->channels) {
        j.row = FLAT_ROW;
        j.rows = fc_ceil_div(total, FLAT_ROW);
        j.last_row = total - (j.rows - 1) * FLAT_ROW;
    }
    j.rows_per_item = fc_max(1, BLEND_FLOATS / j.row);
    int few = total < 2 * BLEND_FLOATS;
    fc_parallel_for(few ? 1 : threads, fc_ceil_div(j.rows, j.rows_per_item), blend_item, &j);
}

typedef struct {
    const fc_means *p;
    const float *x;
    float *sums;
    int64_t parts, row;
} means_job;

/* sums (C,) += pixels first .. last - 1 of x, `vectors` vectors from channel c on. */
INLINE void means_block(const means_job *j, const float *x, int64_t count, int vectors, int64_t c,
                        float *sums) {
    int64_t channels = j->p->channels, tail = vcount(channels, c + (vectors - 1) * VL);
    vec sum[MEAN_VECTORS];
    UNROLL
    for (int i = 0; i < vectors; i++) sum[i] = vzero();
    for (int64_t q = 0; q < count; q++, x += channels) {
        UNROLL
        for (int i = 0; i < vectors - 1; i++) sum[i] += vload(x + c + i * VL);
        sum[vectors - 1] += vload_n(x + c + (vectors - 1) * VL, tail);
    }
    UNROLL
    for (int i = 0; i < vectors; i++) {
        float *to = sums + c + i * VL;
        vstore(to, vload(to) + sum[i]);
    }
}

static void means_item(void *context, int64_t item, int thread) {
    (void)thread;
    const means_job *j = context;
    const fc_means *p = j->p;
    int64_t image = item / j->parts, part = item % j->parts;
    int64_t first = p->points * part / j->parts, last = p->points * (part + 1) / j->parts;
    float *sums = j->sums + item * j->row;
    memset(sums, 0, 4 * (size_t)j->row);
    for (; first < last; first += MEAN_BLOCK) {
        const float *x = j->x + (image * p->points + first) * p->channels;
        int64_t count = fc_min(MEAN_BLOCK, last - first), c = 0;
        for (; c + MEAN_VECTORS * VL <= p->channels; c += MEAN_VECTORS * VL)
            means_block(j, x, count, MEAN_VECTORS, c, sums);
        switch (fc_ceil_div(p->channels - c, VL)) {
        case 8: means_block(j, x, count, 8, c, sums); break;
        case 7: means_block(j, x, count, 7, c, sums); break;
        case 6: means_block(j, x, count, 6, c, sums); break;
        case 5: means_block(j, x, count, 5, c, sums); break;
        case 4: means_block(j, x, count, 4, c, sums); break;
        case 3: means_block(j, x, count, 3, c, sums); break;
        case 2: means_block(j, x, count, 2, c, sums); break;
        case 1: means_block(j, x, count, 1, c, sums); break;
        default: break;
        }
    }
}

static void means_run(const fc_means *p, const float *x, float *y, float *workspace, int threads) {
    int64_t floats = p->points * p->channels;
    means_job j = {p, x, workspace, 1, fc_lines(p->channels)};
    j.parts = fc_max(1, fc_min(FC_MEAN_PARTS, floats / BLEND_FLOATS));
    int few = p->images * floats < 2 * BLEND_FLOATS;
    fc_parallel_for(few ? 1 : threads, p->images * j.parts, means_item, &j);
    float each = 1.0f / (float)fc_max(p->points, 1);
    for (int64_t n = 0; n < p->images; n++)
        for (int64_t c = 0; c < p->channels; c += VL) {
            const float *from = workspace + n * j.parts * j.row + c;
            vec sum = vload(from);
            for (int64_t i = 1; i < j.parts; i++) sum += vload(from + i * j.row);
            vstore_n(y + n * p->channels + c, sum * each, vcount(p->channels, c));
        }
}

typedef struct {
    const fc_pool *p;
    const float *x;
    float *y;
} pool_job;

/* The taps first .. last - 1 of an axis that output `out` has inside. */
INLINE void pool_taps(const fc_geometry *g, int axis, int64_t out, int64_t *first, int64_t *last) {
    int64_t start = out * g->stride[axis] - g->pad[axis];
    *first = fc_max(start, 0);
    *last = fc_min(start + g->kernel[axis], g->in_size[axis]);
}

INLINE void pool_vectors(int vectors, int mean, const fc_geometry *g, const float *x,
                         const int64_t *from, const int64_t *to, int64_t c, float each, float *y) {
    int64_t channels = g->in_channels, tail = vcount(channels, c + (vectors - 1) * VL);
    vec best[POOL_VECTORS];
    UNROLL
    for (int i = 0; i < vectors; i++) best[i] = vset(mean ? 0.0f : -__builtin_inff());
    for (int64_t t = from[0]; t < to[0]; t++)
        for (int64_t h = from[1]; h < to[1]; h++) {
            const float *in = x + ((t * g->in_size[1] + h) * g->in_size[2] + from[2]) * channels + c;
            for (int64_t w = from[2]; w < to[2]; w++, in += channels)
                UNROLL
                for (int i = 0; i < vectors; i++) {
                    int whole = i < vectors - 1;
                    vec v = whole ? vload(in + i * VL) : vload_n(in + i * VL, tail);
                    /* vmax keeps a NaN of its first argument only. */
                    if (mean) best[i] += v;
                    else best[i] = vselect(v == v, vmax(best[i], v), v);
                }
        }
    UNROLL
    for (int i = 0; i < vectors; i++) {
        if (mean) best[i] *= each;
        vstore_n(y + c + i * VL, best[i], i < vectors - 1 ? VL : tail);
    }
}

INLINE void pool_pixel(int mean, const pool_job *j, const float *x, const int64_t *from,
                       const int64_t *to, float *y) {
    const fc_geometry *g = &j->p->geometry;
    int64_t taps = g->kernel[0] * g->kernel[1] * g->kernel[2], c = 0;
    if (!j->p->counted) taps = (to[0] - from[0]) * (to[1] - from[1]) * (to[2] - from[2]);
    float each = 1.0f / (float)taps;
    for (; c + POOL_VECTORS * VL <= g->in_channels; c += POOL_VECTORS * VL)
        pool_vectors(POOL_VECTORS, mean, g, x, from, to, c, each, y);
    switch (fc_ceil_div(g->in_channels - c, VL)) {
    case 4: pool_vectors(4, mean, g, x, from, to, c, each, y); break;
    case 3: pool_vectors(3, mean, g, x, from, to, c, each, y); break;
    case 2: pool_vectors(2, mean, g, x, from, to, c, each, y); break;
    case 1: pool_vectors(1, mean, g, x, from, to, c, each, y); break;
    default: break;
    }
}

/* An item is a row of outputs. */
static void pool_item(void *context, int64_t item, int thread) {
    (void)thread;
    const pool_job *j = context;
    const fc_geometry *g = &j->p->geometry;
    int64_t h = item % g->out_size[1], t = item / g->out_size[1] % g->out_size[0];
    int64_t image = item / (g->out_size[1] * g->out_size[0]), from[3], to[3];
    int64_t size = g->in_size[0] * g->in_size[1] * g->in_size[2] * g->in_channels;
    float *y = j->y + item * g->out_size[2] * g->in_channels;
    pool_taps(g, 0, t, &from[0], &to[0]);
    pool_taps(g, 1, h, &from[1], &to[1]);
    for (int64_t w = 0; w < g->out_size[2]; w++, y += g->in_channels) {
        pool_taps(g, 2, w, &from[2], &to[2]);
        if (j->p->mean) pool_pixel(1, j, j->x + image * size, from, to, y);
        else pool_pixel(0, j, j->x + image * size, from, to, y);
    }
}

static void pool_run(const fc_pool *p, const float *x, float *y, int threads) {
    const fc_geometry *g = &p->geometry;
    int64_t rows = g->batch * g->out_size[0] * g->out_size[1];
    int64_t taps = g->kernel[0] * g->kernel[1] * g->kernel[2];
    int few = rows * g->out_size[2] * g->in_channels * taps < 2 * BLEND_FLOATS;
    pool_job j = {p, x, y};
    fc_parallel_for(few ? 1 : threads, rows, pool_item, &j);
}

typedef struct {
    const fc_window *p;
    const float *x, *ring;
    const int64_t *steps;
    float *y;
    int64_t pieces;
} columns_job;

/* An item is a piece of a stream's column. */
static void columns_item(void *context, int64_t item, int thread) {
    (void)thread;
    const columns_job *j = context;
    const fc_window *p = j->p;
    int64_t n = item / j->pieces, piece = item % j->pieces, row = n * p->floats;
    int64_t end = p->floats * (piece + 1) / j->pieces;
    /* Never below 0: one round is added. */
    int64_t oldest = j->steps[n] % p->ring + p->ring - p->dilation * (p->taps - 1);
    for (int64_t i = p->floats * piece / j->pieces; i < end; i += VL) {
        int64_t count = vcount(end, i);
        vec newest = vload_n(j->x + row + i, count), sum = vzero();
        for (int64_t k = 0; k < p->taps; k++) {
            int64_t entry = (oldest + k * p->dilation) % p->ring;
            vec v = newest;
            if (k < p->taps - 1)
                v = vload_n(j->ring + entry * p->streams * p->floats + row + i, count);
            if (!k) sum = v;
            else if (p->reduce != FC_WINDOW_MAX) sum += v;
            else sum = vselect(v == v, vmax(sum, v), v);
        }
        if (p->reduce == FC_WINDOW_MEAN) sum *= 1.0f / (float)p->taps;
        vstore_n(j->y + row + i, sum, count);
    }
}

static void columns_run(const fc_window *p, const float *x, const float *ring, const int64_t *steps,
                       float *y, int threads) {
    int64_t work = p->floats * p->taps;
    columns_job j = {p, x, ring, steps, y, fc_max(1, work / BLEND_FLOATS)};
    int few = p->streams * work < 2 * BLEND_FLOATS;
    fc_parallel_for(few ? 1 : threads, p->streams * j.pieces, columns_item, &j);
}
