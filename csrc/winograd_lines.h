/* The programs of F(m, r), applied to many lines of a tile: one pass per axis. */
#ifndef FC_WINOGRAD_LINES_H
#define FC_WINOGRAD_LINES_H

#include "gemm.h"
#include "programs.h"

/* outer * inner lines of vectors, each transformed from `in` to `out`; a pass may be in place.

   in_step, out_step  between the values of a line, the others between lines
   next, fresh        values from `next` on that a later line will need, to be prefetched; or 0
   bias               NULL, or what is added to every output, `bias_inner` from line to line
   residual           NULL, or added, with the steps of out
   low                outputs below become equal to it */
typedef struct {
    const float *in;
    float *out;
    int64_t in_step, out_step, outer, in_outer, out_outer, inner, in_inner, out_inner;
    int64_t next, fresh;
    const float *bias, *residual;
    int64_t bias_inner;
    float low;
} line_job;

typedef void (*line_pass)(const line_job *);
typedef void (*line_program)(const vec *, vec *);

/* V = BT d; `fetch` asks for later inputs. */
INLINE void input_lines(int alpha, line_program program, int fetch, const line_job *job) {
    const line_job j = *job; /* stores through `out` cannot change a copy */
    for (int64_t o = 0; o < j.outer; o++) {
        const float *in = j.in + o * j.in_outer;
        float *out = j.out + o * j.out_outer;
        for (int64_t i = 0; i < j.inner; i++, in += j.in_inner, out += j.out_inner) {
            vec d[16], v[16];
            UNROLL
            for (int k = 0; k < alpha; k++) d[k] = vload(in + k * j.in_step);
            if (fetch)
                for (int64_t k = 0; k < j.fresh; k++) prefetch(in + j.next + k * j.in_step);
            program(d, v);
            UNROLL
            for (int k = 0; k < alpha; k++) vstore(out + k * j.out_step, v[k]);
        }
    }
}

/* y = AT M; `last` adds what comes after the sum. */
INLINE void output_lines(int m, int alpha, line_program program, int last, const line_job *job) {
    const line_job j = *job;
    const vec low = vset(j.low);
    for (int64_t o = 0; o < j.outer; o++) {
        const float *in = j.in + o * j.in_outer, *bias = j.bias;
        float *out = j.out + o * j.out_outer;
        const float *residual = j.residual ? j.residual + o * j.out_outer : NULL;
        for (int64_t i = 0; i < j.inner; i++, in += j.in_inner, out += j.out_inner) {
            vec d[16], y[16];
            UNROLL
            for (int k = 0; k < alpha; k++) d[k] = vload(in + k * j.in_step);
            program(d, y);
            if (last && bias) {
                vec shift = vload(bias + i * j.bias_inner);
                UNROLL
                for (int k = 0; k < m; k++) y[k] += shift;
            }
            if (last && residual) {
                UNROLL
                for (int k = 0; k < m; k++)
                    y[k] += vload(residual + i * j.out_inner + k * j.out_step);
            }
            UNROLL
            for (int k = 0; k < m; k++)
                vstore(out + k * j.out_step, last ? vmax(y[k], low) : y[k]);
        }
    }
}

/* The only pass of tiles with one axis: `outer` tiles side by side, `inner` vectors of each.

   in, in_outer  where value k of a line begins, and how far it goes from tile to tile: so that what
                 lies outside can come from a line of zeros
   lanes         valid ones of each vector */
typedef struct {
    const float *in[16];
    int64_t in_outer[16], out_step, out_outer, outer, inner, lanes;
    float *out;
} column_job;

typedef void (*column_pass)(const column_job *);

INLINE void column_body(int alpha, line_program program, int whole, const column_job *j) {
    const int64_t outer = j->outer, inner = j->inner, step = j->out_step, n = j->lanes;
    for (int64_t o = 0; o < outer; o++) {
        const float *in[16];
        float *out = j->out + o * j->out_outer;
        UNROLL
        for (int k = 0; k < alpha; k++) in[k] = j->in[k] + o * j->in_outer[k];
        for (int64_t i = 0; i < inner; i++, out += VL) {
            vec d[16], v[16];
            UNROLL
            for (int k = 0; k < alpha; k++)
                d[k] = whole ? vload(in[k] + i * VL) : vload_n(in[k] + i * VL, n);
            program(d, v);
            UNROLL
            for (int k = 0; k < alpha; k++) vstore(out + k * step, v[k]);
        }
    }
}

INLINE void input_columns(int alpha, line_program program, const column_job *j) {
    if (j->lanes == VL)
        column_body(alpha, program, 1, j);
    else
        column_body(alpha, program, 0, j);
}

#define LINE_PASSES(m, r, alpha)                                                               \
    static void read_##m##_##r(const line_job *j) {                                             \
        input_lines(alpha, bt_##m##_##r, 1, j);                                              \
    }                                                                                          \
    static void input_##m##_##r(const line_job *j) {                                            \
        input_lines(alpha, bt_##m##_##r, 0, j);                                              \
    }                                                                                          \
    static void column_##m##_##r(const column_job *j) {                                         \
        input_columns(alpha, bt_##m##_##r, j);                                                  \
    }                                                                                          \
    static void output_##m##_##r(const line_job *j) {                                           \
        output_lines(m, alpha, at_##m##_##r, 0, j);                                             \
    }                                                                                          \
    static void write_##m##_##r(const line_job *j) {                                            \
        output_lines(m, alpha, at_##m##_##r, 1, j);                                             \
    }
EACH_PROGRAM(LINE_PASSES)

/* By r and m: the pass that reads x and its like without prefetching, that of the output transform
   and the one which writes y. */
enum { MOST_TAPS = 7, MOST_OUTPUTS = 6 };
#define READ_PASS(m, r, alpha) [r][m] = read_##m##_##r,
#define INPUT_PASS(m, r, alpha) [r][m] = input_##m##_##r,
#define COLUMN_PASS(m, r, alpha) [r][m] = column_##m##_##r,
#define OUTPUT_PASS(m, r, alpha) [r][m] = output_##m##_##r,
#define WRITE_PASS(m, r, alpha) [r][m] = write_##m##_##r,
typedef line_pass line_passes[MOST_TAPS + 1][MOST_OUTPUTS + 1];
static const line_passes read_passes = {EACH_PROGRAM(READ_PASS)};
static const line_passes input_passes = {EACH_PROGRAM(INPUT_PASS)};
static const column_pass column_passes[MOST_TAPS + 1][MOST_OUTPUTS + 1] = {EACH_PROGRAM(COLUMN_PASS)};
static const line_passes output_passes = {EACH_PROGRAM(OUTPUT_PASS)};
static const line_passes write_passes = {EACH_PROGRAM(WRITE_PASS)};

#endif
