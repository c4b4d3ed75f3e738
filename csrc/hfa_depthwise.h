/* The depthwise stage of the block, from rows in the ring to rows of pixels. */
#ifndef FC_HFA_DEPTHWISE_H
#define FC_HFA_DEPTHWISE_H

#include "hfa_transforms.h"

/* A value for several uses: loading it again for each would cost more. */
INLINE vec in_register(vec v) {
#if defined(__x86_64__)
    __asm__("" : "+v"(v));
#endif
    return v;
}

/* Some outputs of a row, computed as a whole tile of columns, of which `count` are written.

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
} window_job;

/* One row of taps for `tile` sums, every input loaded once. */
INLINE void window_known(int tile, int taps, int stride, const float *x, const float *w,
                         int64_t channels, vec *sum) {
    vec u[8];
    UNROLL
    for (int k = 0; k < taps; k++) u[k] = vload(w + k * channels);
    UNROLL
    for (int j = 0; j < (tile - 1) * stride + taps; j++, x += channels) {
        vec value = in_register(vload(x));
        UNROLL
        for (int k = taps - 1; k >= 0; k--)
            if (j >= k && (j - k) % stride == 0 && (j - k) / stride < tile)
                sum[(j - k) / stride] = value * u[k] + sum[(j - k) / stride];
    }
}

/* The same for any number of taps and any stride. */
INLINE void window_any(int tile, int64_t taps, int64_t step, const float *x, const float *w,
                       int64_t channels, vec *sum) {
    for (int64_t k = 0; k < taps; k++, w += channels, x += channels) {
        vec u = vload(w);
        UNROLL
        for (int j = 0; j < tile; j++) sum[j] = vload(x + j * step) * u + sum[j];
    }
}

INLINE void window_tile(const window_job *t, int tile, int taps, int stride) {
    const window_job g = *t; /* known not to change with what is stored */
    vec low = vset(g.low);
    int64_t weights_row = g.taps_wide * g.channels;
    for (int64_t c = 0; c < g.channels; c += VL) {
        const float *w = g.weights + c;
        vec sum[8], shift = g.bias ? vload_n(g.bias + c, vcount(g.valid, c)) : vzero();
        UNROLL
        for (int j = 0; j < tile; j++) sum[j] = shift;
        int64_t slot = g.slot;
        for (int64_t i = 0; i < g.taps_high; i++, w += weights_row) {
            const float *x = g.ring + slot * g.row_size + c;
            if (taps)
                window_known(tile, taps, stride, x, w, g.channels, sum);
            else
                window_any(tile, g.taps_wide, g.step, x, w, g.channels, sum);
            if (++slot == g.slots) slot = 0;
        }
        float *out = g.out + c;
        if (g.count >= tile) {
            UNROLL
            for (int j = 0; j < tile; j++) vstore(out + j * g.channels, vmax(sum[j], low));
        } else {
            UNROLL
            for (int j = 0; j < tile; j++)
                if (j < g.count) vstore(out + j * g.channels, vmax(sum[j], low));
        }
    }
}

#define WINDOW(tile, taps, stride)                                                             \
    static void window_##tile##_##taps##_##stride(const window_job *t) {                       \
        window_tile(t, tile, taps, stride);                                                    \
    }
#define WINDOWS(tile)                                                                          \
    WINDOW(tile, 0, 0) WINDOW(tile, 3, 1) WINDOW(tile, 3, 2) WINDOW(tile, 5, 1) WINDOW(tile, 7, 1)
WINDOWS(4) WINDOWS(7) WINDOWS(8)

#define WINDOW_CALL(tile, t, taps, stride)                                                     \
    (taps == 3 && stride == 1   ? window_##tile##_3_1(t)                                       \
     : taps == 3 && stride == 2 ? window_##tile##_3_2(t)                                       \
     : taps == 5 && stride == 1 ? window_##tile##_5_1(t)                                       \
     : taps == 7 && stride == 1 ? window_##tile##_7_1(t)                                       \
                                : window_##tile##_0_0(t))

INLINE void depthwise_tile(const window_job *t, int64_t tile, int64_t stride) {
    if (tile == 8)
        WINDOW_CALL(8, t, t->taps_wide, stride);
    else if (tile == 7)
        WINDOW_CALL(7, t, t->taps_wide, stride);
    else
        WINDOW_CALL(4, t, t->taps_wide, stride);
}

/* A tile of F(m, r) in height and width, one vector of channels.

   ring       of one frame, from the column of the tile's first tap
   first_row  of the image under the tile's first tap; rows outside the image are zeros
   weights    [point of (phase, phase, high, wide) * channels], from the vector's first channel
   spare      points of the tile three times */
typedef struct {
    const fc_hfa_axis *high, *wide;
    int64_t stride_high, stride_wide, channels;
    const float *ring;
    int64_t row_size, slots, first_row, height;
    const float *weights;
    float *spare;
} fast_tile;

INLINE const float *fast_row(const fast_tile *t, int64_t row) {
    return row < 0 || row >= t->height ? NULL : t->ring + row % t->slots * t->row_size;
}

/* The sums of outputs, [row * outputs of a row + column] in vectors, somewhere in spare. */
static const float *fast_any(const fast_tile *t) {
    int64_t high = t->high->alpha, wide = t->wide->alpha, points = high * wide;
    float *lines = t->spare, *v = lines + points * VL, *sums = v + points * VL;
    const float *w = t->weights;
    for (int64_t i = 0; i < points; i++) vstore(sums + i * VL, vzero());
    for (int64_t down = 0; down < t->high->phases; down++)
        for (int64_t across = 0; across < t->wide->phases; across++) {
            for (int64_t i = 0; i < high; i++) {
                const float *x = fast_row(t, t->first_row + i * t->stride_high + down);
                float *line = lines + i * wide * VL;
                for (int64_t j = 0; !x && j < wide; j++) vstore(line + j * VL, vzero());
                if (x)
                    transform_line(t->wide, x + across * t->channels, t->stride_wide * t->channels,
                                   line, VL);
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

/* The same with stride 1 and one known program in height and width. */
INLINE const float *fast_square(void (*in)(const vec *, vec *), void (*out)(const vec *, vec *),
                                int alpha, int outputs, const fast_tile *t) {
    vec rows[8][8], z[8][8];
    UNROLL
    for (int i = 0; i < alpha; i++) {
        const float *x = fast_row(t, t->first_row + i);
        vec line[8];
        UNROLL
        for (int j = 0; j < alpha; j++) line[j] = x ? vload(x + j * t->channels) : vzero();
        in(line, rows[i]);
    }
    UNROLL
    for (int j = 0; j < alpha; j++) {
        vec column[8], v[8];
        UNROLL
        for (int i = 0; i < alpha; i++) column[i] = rows[i][j];
        in(column, v);
        UNROLL
        for (int i = 0; i < alpha; i++) v[i] *= vload(t->weights + (i * alpha + j) * t->channels);
        out(v, column);
        UNROLL
        for (int i = 0; i < outputs; i++) z[i][j] = column[i];
    }
    UNROLL
    for (int i = 0; i < outputs; i++) {
        vec line[8];
        out(z[i], line);
        UNROLL
        for (int j = 0; j < outputs; j++) vstore(t->spare + (i * outputs + j) * VL, line[j]);
    }
    return t->spare;
}

static const float *fast_2_3(const fast_tile *t) { return fast_square(bt_2_3, at_2_3, 4, 2, t); }
static const float *fast_4_3(const fast_tile *t) { return fast_square(bt_4_3, at_4_3, 6, 4, t); }

INLINE const float *depthwise_fast_tile(const fast_tile *t) {
    int plain = t->stride_high == 1 && t->stride_wide == 1;
    if (plain && t->high->program == PROGRAM_2_3 && t->wide->program == PROGRAM_2_3)
        return fast_2_3(t);
    if (plain && t->high->program == PROGRAM_4_3 && t->wide->program == PROGRAM_4_3)
        return fast_4_3(t);
    return fast_any(t);
}

#endif
