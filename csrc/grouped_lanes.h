/* Convolution with few channels per group: lanes are output pixels, no channel is padded.

   A strip of output rows moves along T. Its input rows are transposed once into a ring of frames,
   so that every tap of every output of the strip is one offset: with column stride s, the columns p,
   p + s, ... make phase p, and tap k of output q is column q + k * dilation / s of phase
   k * dilation % s; rows likewise. Weights are broadcast, sums leave as [channel][pixel] and are
   transposed back on their way to y. */
#ifndef FC_GROUPED_LANES_H
#define FC_GROUPED_LANES_H

#include "dense.h"

#if VL == 16
enum { MAX_CHANNELS = 12 };
#else
enum { MAX_CHANNELS = 6 };
#endif
enum { MAX_PIXELS = 8 }; /* vectors */

/* sums (channels, vectors of pixels) = max(bias + sum over terms of weights times pixels, low)

   offsets  (terms,): where the pixels of a tap and an input channel begin in source
   weights  (terms, channels) */
typedef struct {
    const int64_t *offsets;
    int64_t terms;
    const float *source, *weights;
    float *sums;
    int64_t sums_stride;
    float bias[MAX_CHANNELS], low;
} lanes_job;

INLINE void lanes_body(int channels, int nv, const lanes_job *l) {
    vec sum[32];
    UNROLL
    for (int i = 0; i < channels; i++)
        UNROLL
        for (int j = 0; j < nv; j++) sum[i * nv + j] = vset(l->bias[i]);
    const float *w = l->weights;
    for (int64_t t = 0; t < l->terms; t++, w += channels) {
        const float *x = l->source + l->offsets[t];
        vec pixels[MAX_PIXELS];
        UNROLL
        for (int j = 0; j < nv; j++) pixels[j] = vload(x + j * VL);
        UNROLL
        for (int i = 0; i < channels; i++) {
            vec value = vset(w[i]);
            UNROLL
            for (int j = 0; j < nv; j++) sum[i * nv + j] = value * pixels[j] + sum[i * nv + j];
        }
    }
    vec low = vset(l->low);
    float *sums = l->sums; /* stores cannot change a copy */
    const int64_t stride = l->sums_stride;
    UNROLL
    for (int i = 0; i < channels; i++, sums += stride)
        UNROLL
        for (int j = 0; j < nv; j++) vstore(sums + j * VL, vmax(sum[i * nv + j], low));
}

/* X(channels, vectors) for every register block: sums, a row of pixels and a weight fit. */
#define EACH_PIXELS_2(X, n) X(n, 1) X(n, 2)
#define EACH_PIXELS_3(X, n) EACH_PIXELS_2(X, n) X(n, 3)
#define EACH_PIXELS_4(X, n) EACH_PIXELS_3(X, n) X(n, 4)
#define EACH_PIXELS_5(X, n) EACH_PIXELS_4(X, n) X(n, 5)
#define EACH_PIXELS_6(X, n) EACH_PIXELS_5(X, n) X(n, 6)
#define EACH_PIXELS_7(X, n) EACH_PIXELS_6(X, n) X(n, 7)
#define EACH_PIXELS_8(X, n) EACH_PIXELS_7(X, n) X(n, 8)
#if VL == 16
#define EACH_LANES_TILE(X)                                                                     \
    EACH_PIXELS_8(X, 1) EACH_PIXELS_8(X, 2) EACH_PIXELS_7(X, 3) EACH_PIXELS_6(X, 4)             \
    EACH_PIXELS_5(X, 5) EACH_PIXELS_4(X, 6) EACH_PIXELS_3(X, 7) EACH_PIXELS_3(X, 8)             \
    EACH_PIXELS_3(X, 9) EACH_PIXELS_2(X, 10) EACH_PIXELS_2(X, 11) EACH_PIXELS_2(X, 12)
#else
#define EACH_LANES_TILE(X)                                                                     \
    EACH_PIXELS_7(X, 1) EACH_PIXELS_5(X, 2) EACH_PIXELS_3(X, 3) EACH_PIXELS_3(X, 4)             \
    EACH_PIXELS_2(X, 5) EACH_PIXELS_2(X, 6)
#endif
#define LANES_TILE(channels, nv)                                                               \
    static void lanes_##channels##_##nv(const lanes_job *l) { lanes_body(channels, nv, l); }
EACH_LANES_TILE(LANES_TILE)
typedef void (*lanes_tile)(const lanes_job *);
#define LANES_NAME(channels, nv) [channels][nv] = lanes_##channels##_##nv,
static const lanes_tile lanes_tiles[MAX_CHANNELS + 1][MAX_PIXELS + 1] = {
    EACH_LANES_TILE(LANES_NAME)};

/* One call. Items are strips, and some output frames of each. */
typedef struct {
    const fc_grouped *params;
    const fc_arrays *arrays;
    const float *const *frames;
    int64_t chunks, down, across, times;
} lanes_call;

/* One item at work: which outputs, and the pieces of its thread's workspace.

   ring     (channels, channel_stride)
   sums     (outputs, sums_stride)
   offsets  of every term of an output frame */
typedef struct {
    const lanes_call *call;
    int64_t image, group, groups, row, rows, column, columns, time, last_time;
    float *ring, *sums;
    int64_t *offsets;
    struct lanes_tiled {
        float *packed, *v, *m, *bias;
    } tiled;
} lanes_strip;

/* Transpose the strip's rows of input frame t: to (channels, to_stride). */
static void lanes_pack(const lanes_strip *s, int64_t t, float *slot, int64_t to_stride) {
    const lanes_call *c = s->call;
    const fc_geometry *g = &c->params->geometry;
    const fc_pixel_lanes *l = &c->params->lanes;
    int64_t depth = g->in_channels / g->groups, channels = s->groups * depth;
    int64_t w = g->in_size[2], step = g->stride[2], pixel = g->in_channels;
    const float *frame =
        input_frame(g, c->arrays->x, c->frames, s->image, t) + s->group * depth;
    /* Rows in the order of memory, though phases take turns. */
    int64_t row_step = l->tile[1] > 1 ? l->tile[1] : g->stride[1], top = s->row * g->stride[1];
    int64_t reach = (s->rows - 1) * g->stride[1] + (g->kernel[1] - 1) * g->dilation[1];
    int64_t below = (l->row_phases > 1 ? 1 : row_step) * w * pixel;
    top -= g->pad[1];
    for (int64_t r = fc_max(-top, 0); r <= fc_min(reach, g->in_size[1] - 1 - top); r++) {
        int64_t i = 0;
        while (i < l->row_phases && l->residues[i] != r % row_step) i++;
        if (i == l->row_phases) continue;
        for (int64_t j = 0; j < l->column_phases; j++) {
            int64_t start = s->column * step - g->pad[2] + l->residues[l->row_phases + j];
            /* Packed columns that lie in the input. */
            int64_t left = fc_max((step - 1 - start) / step, 0);
            int64_t right = fc_min((w - 1 - start + step) / step, l->row_length);
            const float *from = frame + ((top + r) * w + start) * pixel;
            int64_t row = (i * l->column_phases + j) * l->packed_rows + r / row_step;
            float *to = slot + row * l->row_length;
            for (int64_t n = 0; n < channels; n += VL)
                for (int64_t q = left; q < right; q += VL) {
                    /* Some pixels again, rather than fewer than a vector. */
                    if (right - left >= VL) q = fc_min(q, right - VL);
                    const float *square = from + q * step * pixel + n;
                    UNROLL
                    for (int k = 0; k < VL; k++) prefetch(square + below + k * step * pixel);
                    transpose_square(square, step * pixel, to + n * to_stride + q, to_stride,
                                     right - q, channels - n);
                }
        }
    }
}

/* Pixels first .. last - 1 of an array, `channels` floats of each, `step` floats apart. */
typedef struct {
    const float *start;
    int64_t step, channels, pixels;
} lanes_pixels;

/* Ask for part `i` of `parts` of some pixels: to write them, or to read them somewhat later. */
INLINE void lanes_expect(int write, const lanes_pixels *p, int64_t i, int64_t parts) {
    int64_t last = (i + 1) * p->pixels / parts;
    for (int64_t n = i * p->pixels / parts; n < last; n++) {
        const char *line = (const char *)(p->start + n * p->step), *end = line + 4 * p->channels;
        for (line -= (uintptr_t)line % 64; line < end; line += 64)
            if (write) prefetch_write(line);
            else prefetch_far(line);
    }
}

/* What a strip reads of input frame t, which may lie behind the last. */
static lanes_pixels lanes_arriving(const lanes_strip *s, int64_t t) {
    const fc_geometry *g = &s->call->params->geometry;
    int64_t depth = g->in_channels / g->groups, top = s->row * g->stride[1] - g->pad[1];
    int64_t span = (g->kernel[1] - 1) * g->dilation[1] + 1;
    int64_t bottom = fc_min(top + (s->rows - 1) * g->stride[1] + span, g->in_size[1]);
    top = fc_max(top, 0);
    lanes_pixels p = {.step = g->in_channels, .channels = s->groups * depth};
    if (t >= g->in_size[0] || bottom <= top) return p;
    p.start = input_frame(g, s->call->arrays->x, s->call->frames, s->image, t) +
              top * g->in_size[2] * g->in_channels + s->group * depth;
    p.pixels = (bottom - top) * g->in_size[2];
    return p;
}

/* What a strip writes of output frame t. */
static lanes_pixels lanes_leaving(const lanes_strip *s, int64_t t) {
    const fc_geometry *g = &s->call->params->geometry;
    int64_t outputs = g->out_channels / g->groups;
    int64_t row = (s->image * g->out_size[0] + t) * g->out_size[1] + s->row;
    float *y = s->call->arrays->y;
    return (lanes_pixels){
        .start = y + row * g->out_size[2] * g->out_channels + s->group * outputs,
        .step = g->out_channels,
        .channels = s->groups * outputs,
        .pixels = s->rows * g->out_size[2],
    };
}

/* The sums of a strip at one output time. */
static void lanes_multiply(const lanes_strip *s, int64_t out_t) {
    const lanes_call *c = s->call;
    const fc_grouped *p = c->params;
    const fc_geometry *g = &p->geometry;
    const fc_pixel_lanes *l = &p->lanes;
    int64_t depth = g->in_channels / g->groups, outputs = g->out_channels / g->groups;
    int64_t area = g->kernel[1] * g->kernel[2], blocks = fc_ceil_div(outputs, l->channels);
    int64_t all_terms = g->kernel[0] * area * depth;
    int64_t first_t = out_t * g->stride[0] - g->pad[0], terms = 0, left_out = 0;
    for (int64_t i = 0; i < g->kernel[0]; i++) {
        int64_t t = first_t + i * g->dilation[0];
        if (t < 0) left_out = (i + 1) * area * depth;
        if (t < 0 || t >= g->in_size[0]) continue;
        int64_t slot = t % l->slots * l->frame;
        for (int64_t j = 0; j < area; j += l->together)
            for (int64_t n = 0; n < depth; n++)
                for (int64_t q = 0; q < l->together; q++)
                    s->offsets[terms++] = slot + n * l->channel_stride + l->offsets[j + q];
    }
    int64_t pixels = (s->rows - 1) * l->row_length + s->columns;
    int64_t vectors = fc_ceil_div(pixels, VL);

    /* Between the sums: lines of this output, and of the next frame that will be packed. */
    lanes_pixels leaving = lanes_leaving(s, out_t);
    int64_t following = first_t + g->stride[0] + (g->kernel[0] - 1) * g->dilation[0];
    lanes_pixels arriving = lanes_arriving(s, following);
    int64_t step = 0, steps = s->groups * blocks * fc_ceil_div(vectors, l->vectors);

    lanes_job job = {.offsets = s->offsets, .terms = terms, .sums_stride = l->sums_stride};
    job.low = c->arrays->residual ? -__builtin_inff() : activation_floor(p->activation);
    for (int64_t n = 0; n < s->groups * blocks; n++) {
        int64_t group = n / blocks, first = n % blocks * l->channels;
        const float *bias = c->arrays->bias[0];
        for (int64_t i = 0; i < l->channels; i++)
            job.bias[i] = bias && first + i < outputs
                              ? bias[(s->group + group) * outputs + first + i]
                              : 0.0f;
        job.weights = c->arrays->weights +
                      ((s->group * blocks + n) * all_terms + left_out) * l->channels;
        for (int64_t v = 0; v < vectors; v += l->vectors, step++) {
            lanes_expect(1, &leaving, step, steps);
            lanes_expect(0, &arriving, step, steps);
            job.source = s->ring + group * depth * l->channel_stride + v * VL;
            job.sums = s->sums + (group * outputs + first) * l->sums_stride + v * VL;
            lanes_tiles[l->channels][fc_min(l->vectors, vectors - v)](&job);
        }
    }
}

/* Residual and activation, and the way to y.

   sums  of the frame: (rows of a tile, channels, sums_stride), those of a row `of_row` apart */
static void lanes_unpack(const lanes_strip *s, int64_t out_t, const float *sums_of, int64_t of_row) {
    const lanes_call *c = s->call;
    const fc_geometry *g = &c->params->geometry;
    const fc_pixel_lanes *l = &c->params->lanes;
    int64_t k = g->out_channels, group = k / g->groups, outputs = s->groups * group;
    int activation = c->params->activation;
    const float *residual = c->arrays->residual;
    for (int64_t r = 0; r < s->rows; r++) {
        int64_t row = (s->image * g->out_size[0] + out_t) * g->out_size[1] + s->row + r;
        int64_t at = (row * g->out_size[2] + s->column) * k + s->group * group;
        const float *sums =
            sums_of + r % l->tile[1] * of_row + r / l->tile[1] * l->row_length;
        float *y = c->arrays->y + at;
        for (int64_t n = 0; n < outputs; n += VL)
            for (int64_t q = 0; q < s->columns; q += VL) {
                if (s->columns >= VL) q = fc_min(q, s->columns - VL);
                transpose_square(sums + n * l->sums_stride + q, l->sums_stride, y + q * k + n, k,
                             outputs - n, s->columns - q);
            }
        if (residual)
            for (int64_t q = 0; q < s->columns; q++)
                for (int64_t n = 0; n < outputs; n += VL) {
                    int64_t i = q * k + n, count = vcount(outputs, n);
                    vec z = vload_n(y + i, count) + vload_n(residual + at + i, count);
                    vstore_n(y + i, vmax(z, vset(activation_floor(activation))), count);
                }
        if (activates_later(activation)) activate_rows(y, k, s->columns, outputs, activation);
    }
}

#endif
