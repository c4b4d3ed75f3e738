/* The depthwise stage of the block, from rows in the ring to rows of pixels. */
#ifndef FC_HFA_DEPTHWISE_H
#define FC_HFA_DEPTHWISE_H

#include "hfa_transforms.h"

/* A row of outputs, computed in whole tiles of columns.

   ring      one frame (slots, columns, channels), from the column of the first output's first tap
   slot      of the row under the first of `taps_high` taps; the next row is in the next slot
   step      elements from output to output;  channels: in whole vectors, between columns
   weights   [(tap row, tap column) * channels + channel], from the first tap row inside
   bias      or NULL, of `valid` channels
   out       [column * channels + channel] */
typedef struct {
    const float *ring;
    int64_t row_size, slots, slot, taps_high, taps_wide, step, channels, valid;
    const float *weights, *bias;
    float low, *out;
    int64_t count;
    int64_t tune;
} window_job;

/* `tile` sums of one vector of channels, every input loaded once. */
INLINE void window_known(const window_job *t, int tile, int taps, int stride, const float *ring,
                         int64_t c, vec *sum) {
    const float *w = t->weights + c;
    int64_t channels = t->channels, slot = t->slot;
    for (int64_t i = 0; i < t->taps_high; i++, w += taps * channels) {
        const float *x = ring + slot * t->row_size + c;
        vec u[8];
        UNROLL
        for (int k = 0; k < taps; k++) u[k] = vload(w + k * channels);
        if (t->tune & 64) {
            UNROLL
            for (int j = (tile-1) * stride + taps; j < (2 * tile - 1) * stride + taps; j++) prefetch(x + j * channels);
        }
        UNROLL
        for (int j = 0; j < (tile - 1) * stride + taps; j++) {
            vec value = vload(x + j * channels);
            if (t->tune & 128) __asm__("" : "+v"(value));
            UNROLL
            for (int k = 0; k < taps; k++)
                if (j >= k && (j - k) % stride == 0 && (j - k) / stride < tile)
                    sum[(j - k) / stride] = value * u[k] + sum[(j - k) / stride];
        }
        if (++slot == t->slots) slot = 0;
    }
}

/* The same for any number of taps and any stride. */
INLINE void window_any(const window_job *t, int tile, const float *ring, int64_t c, vec *sum) {
    const float *w = t->weights + c;
    int64_t channels = t->channels, slot = t->slot;
    for (int64_t i = 0; i < t->taps_high; i++) {
        const float *x = ring + slot * t->row_size + c;
        for (int64_t k = 0; k < t->taps_wide; k++, w += channels, x += channels) {
            vec u = vload(w);
            UNROLL
            for (int j = 0; j < tile; j++) sum[j] = vload(x + j * t->step) * u + sum[j];
        }
        if (++slot == t->slots) slot = 0;
    }
}

INLINE void window_row(const window_job *t, int tile, int taps, int stride) {
    vec low = vset(t->low);
    const float *ring = t->ring;
    float *out = t->out;
    for (int64_t column = 0; column < t->count; column += tile) {
        for (int64_t c = 0; c < t->channels; c += VL) {
            vec sum[8];
            vec shift = t->bias ? vload_n(t->bias + c, vcount(t->valid, c)) : vzero();
            UNROLL
            for (int j = 0; j < tile; j++) sum[j] = vzero();
            if (taps)
                window_known(t, tile, taps, stride, ring, c, sum);
            else
                window_any(t, tile, ring, c, sum);
            UNROLL
            for (int j = 0; j < tile; j++)
                vstore(out + j * t->channels + c, vmax(sum[j] + shift, low));
        }
        ring += tile * t->step;
        out += tile * t->channels;
    }
}

#define WINDOW(tile, taps, stride)                                                             \
    static void window_##tile##_##taps##_##stride(const window_job *t) {                       \
        window_row(t, tile, taps, stride);                                                     \
    }
#define WINDOWS(tile) WINDOW(tile, 0, 0) WINDOW(tile, 3, 1) WINDOW(tile, 3, 2) WINDOW(tile, 5, 1)
WINDOWS(4) WINDOWS(7) WINDOWS(8)

#define WINDOW_CALL(tile, t, taps, stride)                                                     \
    (taps == 3 && stride == 1   ? window_##tile##_3_1(t)                                       \
     : taps == 3 && stride == 2 ? window_##tile##_3_2(t)                                       \
     : taps == 5 && stride == 1 ? window_##tile##_5_1(t)                                       \
                                : window_##tile##_0_0(t))

INLINE void depthwise_row(const window_job *t, int64_t tile, int64_t stride) {
    if (tile == 8)
        WINDOW_CALL(8, t, t->taps_wide, stride);
    else if (tile == 7)
        WINDOW_CALL(7, t, t->taps_wide, stride);
    else
        WINDOW_CALL(4, t, t->taps_wide, stride);
}

/* A tile of F(m, r) in height and width, one vector of channels.

   rows, inside  each of the first tile row's input rows, from its first column, NULL for zeros
   weights   [point of (phase, phase, high, wide) * channels], from the vector's first channel
   spare     points of the tile three times
   y         [row * wide->outputs * VL + column * VL], in spare */
typedef struct {
    const fc_hfa_axis *high, *wide;
    int64_t stride_high, stride_wide, channels;
    const float *ring;
    int64_t row_size, slots, first_row, height; /* image row of the tile's first, of the image */
    const float *weights;
    float *spare;
} fast_tile;

/* Leaves the sums at the end of spare and returns them. */
static float *depthwise_fast_tile(const fast_tile *t) {
    int64_t high = t->high->alpha, wide = t->wide->alpha, points = high * wide;
    float *lines = t->spare, *v = lines + points * VL, *sums = v + points * VL;
    const float *w = t->weights;
    for (int64_t i = 0; i < points; i++) vstore(sums + i * VL, vzero());
    for (int64_t down = 0; down < t->high->phases; down++)
        for (int64_t across = 0; across < t->wide->phases; across++) {
            for (int64_t i = 0; i < high; i++) {
                int64_t row = t->first_row + i * t->stride_high + down;
                float *line = lines + i * wide * VL;
                if (row < 0 || row >= t->height) {
                    for (int64_t j = 0; j < wide; j++) vstore(line + j * VL, vzero());
                    continue;
                }
                const float *x = t->ring + row % t->slots * t->row_size + across * t->channels;
                transform_line(t->wide, x, t->stride_wide * t->channels, line, VL);
            }
            for (int64_t j = 0; j < wide; j++)
                transform_line(t->high, lines + j * VL, wide * VL, v + j * VL, wide * VL);
            for (int64_t i = 0; i < points; i++, w += t->channels)
                vstore(sums + i * VL, vload(v + i * VL) * vload(w) + vload(sums + i * VL));
        }
    for (int64_t j = 0; j < wide; j++)
        inverse_line(t->high, sums + j * VL, wide * VL, lines + j * VL, wide * VL);
    for (int64_t i = 0; i < t->high->outputs; i++)
        inverse_line(t->wide, lines + i * wide * VL, VL, v + i * t->wide->outputs * VL, VL);
    return v;
}

#endif
