/* Transforms of the block: along time over spans of pixels, in space line by line. */
#ifndef FC_HFA_TRANSFORMS_H
#define FC_HFA_TRANSFORMS_H

#include "activation.h"

enum { MOST_POINTS = 12 }; /* of a compiled program */

/* V = BT d along time for a span of `count` elements.

   x      the span in the first frame of the clip; frame f of the tile begins f * frame_step + first
          elements behind, and is zero unless low <= f < high
   v      [point * v_point + element], written in whole vectors */
typedef struct {
    const float *x;
    int64_t first, frame_step, low, high, count;
    float *v;
    int64_t v_point;
} frames_in_job;

INLINE void frames_in(void (*program)(const vec *, vec *), int alpha, const frames_in_job *t) {
    static const float zeros[VL] = {0};
    const frames_in_job g = *t; /* known not to change with what is stored */
    const float *from[MOST_POINTS];
    int64_t moves[MOST_POINTS];
    UNROLL
    for (int f = 0; f < alpha; f++) {
        int inside = f >= g.low && f < g.high;
        from[f] = inside ? g.x + g.first + f * g.frame_step : zeros;
        moves[f] = inside ? VL : 0;
    }
    vec in[MOST_POINTS], out[MOST_POINTS];
    int64_t i = 0;
    for (; i + VL <= g.count; i += VL) {
        UNROLL
        for (int f = 0; f < alpha; f++, from[f - 1] += moves[f - 1]) in[f] = vload(from[f]);
        program(in, out);
        float *v = g.v + i;
        UNROLL
        for (int p = 0; p < alpha; p++, v += g.v_point) vstore(v, out[p]);
    }
    if (i == g.count) return;
    UNROLL
    for (int f = 0; f < alpha; f++) in[f] = vload_n(from[f], g.count - i);
    program(in, out);
    UNROLL
    for (int p = 0; p < alpha; p++) vstore(g.v + p * g.v_point + i, out[p]);
}

/* z = max(AT M + bias, low) along time for a few vectors of channels of a span of pixels.

   m        [point * m_point + pixel * m_pixel + channel]
   z        [frame * frame_step + pixel * z_pixel + channel], whole vectors
   bias     or NULL; readable for `channels` */
typedef struct {
    const float *m;
    int64_t m_point, m_pixel, pixels, vectors, channels;
    const float *bias;
    float low, *z;
    int64_t frame_step, z_pixel;
} frames_out_job;

INLINE void frames_out(void (*program)(const vec *, vec *), int alpha, int outputs,
                       const frames_out_job *t) {
    const frames_out_job g = *t; /* known not to change with what is stored */
    vec low = vset(g.low);
    for (int64_t j = 0; j < g.vectors * VL; j += VL) {
        vec shift = g.bias ? vload_n(g.bias + j, vcount(g.channels, j)) : vzero();
        const float *pixel = g.m + j;
        float *to = g.z + j;
        for (int64_t i = 0; i < g.pixels; i++, pixel += g.m_pixel, to += g.z_pixel) {
            vec in[MOST_POINTS], out[MOST_POINTS];
            const float *m = pixel;
            UNROLL
            for (int p = 0; p < alpha; p++, m += g.m_point) in[p] = vload(m);
            program(in, out);
            float *z = to;
            UNROLL
            for (int f = 0; f < outputs; f++, z += g.frame_step)
                vstore(z, vmax(out[f] + shift, low));
        }
    }
}

/* The same by matrices, for F(m, r) without programs; zeros of a matrix are no products. */
static void frames_in_matrix(const float *bt, int64_t alpha, const frames_in_job *t) {
    for (int64_t p = 0; p < alpha; p++)
        for (int64_t i = 0; i < t->count; i += VL) {
            vec sum = vzero();
            for (int64_t f = fc_max(t->low, 0); f < fc_min(t->high, alpha); f++)
                if (bt[p * alpha + f] != 0)
                    sum += vload_n(t->x + t->first + f * t->frame_step + i, vcount(t->count, i)) *
                           bt[p * alpha + f];
            vstore(t->v + p * t->v_point + i, sum);
        }
}

static void frames_out_matrix(const float *at, int64_t alpha, int64_t outputs,
                              const frames_out_job *t) {
    for (int64_t j = 0; j < t->vectors * VL; j += VL) {
        vec shift = t->bias ? vload_n(t->bias + j, vcount(t->channels, j)) : vzero();
        for (int64_t i = 0; i < t->pixels; i++)
            for (int64_t f = 0; f < outputs; f++) {
                vec sum = vzero();
                for (int64_t p = 0; p < alpha; p++)
                    if (at[f * alpha + p] != 0)
                        sum += vload(t->m + p * t->m_point + i * t->m_pixel + j) *
                               at[f * alpha + p];
                vstore(t->z + f * t->frame_step + i * t->z_pixel + j,
                       vmax(sum + shift, vset(t->low)));
            }
    }
}

/* One program on vectors in memory. */
INLINE void apply_line(void (*program)(const vec *, vec *), int inputs, int outputs,
                       const float *from, int64_t from_step, float *to, int64_t to_step) {
    vec in[MOST_POINTS], out[MOST_POINTS];
    UNROLL
    for (int i = 0; i < inputs; i++) in[i] = vload(from + i * from_step);
    program(in, out);
    UNROLL
    for (int i = 0; i < outputs; i++) vstore(to + i * to_step, out[i]);
}

static void line_matrix(const float *matrix, int64_t inputs, int64_t outputs, const float *from,
                        int64_t from_step, float *to, int64_t to_step) {
    for (int64_t i = 0; i < outputs; i++) {
        vec sum = vzero();
        for (int64_t j = 0; j < inputs; j++) {
            float factor = matrix[i * inputs + j];
            if (factor != 0) sum += vload(from + j * from_step) * factor;
        }
        vstore(to + i * to_step, sum);
    }
}

typedef void (*line_function)(const float *from, int64_t from_step, float *to, int64_t to_step);
typedef struct {
    void (*frames_in)(const frames_in_job *);
    void (*frames_out)(const frames_out_job *);
    line_function in, out;
} axis_programs;

#define AXIS_FUNCTIONS(m, r, alpha)                                                            \
    static void frames_in_##m##_##r(const frames_in_job *t) {                                  \
        frames_in(bt_##m##_##r, alpha, t);                                                     \
    }                                                                                          \
    static void frames_out_##m##_##r(const frames_out_job *t) {                                \
        frames_out(at_##m##_##r, alpha, m, t);                                                 \
    }                                                                                          \
    static void line_in_##m##_##r(const float *from, int64_t from_step, float *to,             \
                                  int64_t to_step) {                                           \
        apply_line(bt_##m##_##r, alpha, alpha, from, from_step, to, to_step);                  \
    }                                                                                          \
    static void line_out_##m##_##r(const float *from, int64_t from_step, float *to,            \
                                   int64_t to_step) {                                          \
        apply_line(at_##m##_##r, alpha, m, from, from_step, to, to_step);                      \
    }
EACH_PROGRAM(AXIS_FUNCTIONS)

#define AXIS_ENTRY(m, r, alpha)                                                                \
    {frames_in_##m##_##r, frames_out_##m##_##r, line_in_##m##_##r, line_out_##m##_##r},
#define PROGRAM_INDEX(m, r, alpha) PROGRAM_##m##_##r,
enum { EACH_PROGRAM(PROGRAM_INDEX) };
static const axis_programs hfa_programs[] = {EACH_PROGRAM(AXIS_ENTRY)};

/* One input or one output sample: the sum is the result. */
INLINE void same(const vec *in, vec *out) { out[0] = in[0]; }
static void frames_out_direct(const frames_out_job *t) { frames_out(same, 1, 1, t); }

INLINE void transform_frames(const fc_hfa_axis *axis, const frames_in_job *t) {
    if (axis->program >= 0)
        hfa_programs[axis->program].frames_in(t);
    else
        frames_in_matrix(axis->bt, axis->alpha, t);
}

INLINE void inverse_frames(const fc_hfa_axis *axis, const frames_out_job *t) {
    if (axis->outputs == 1)
        frames_out_direct(t);
    else if (axis->program >= 0)
        hfa_programs[axis->program].frames_out(t);
    else
        frames_out_matrix(axis->at, axis->alpha, axis->outputs, t);
}

INLINE void transform_line(const fc_hfa_axis *axis, const float *from, int64_t from_step,
                           float *to, int64_t to_step) {
    if (axis->program >= 0)
        hfa_programs[axis->program].in(from, from_step, to, to_step);
    else
        line_matrix(axis->bt, axis->alpha, axis->alpha, from, from_step, to, to_step);
}

INLINE void inverse_line(const fc_hfa_axis *axis, const float *from, int64_t from_step, float *to,
                         int64_t to_step) {
    if (axis->program >= 0)
        hfa_programs[axis->program].out(from, from_step, to, to_step);
    else
        line_matrix(axis->at, axis->alpha, axis->outputs, from, from_step, to, to_step);
}

#endif
