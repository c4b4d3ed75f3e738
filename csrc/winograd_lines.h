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
   low                outputs below become equal to it
   lanes, valid       for `write` passes: of the last inner line, and outputs of every line in y */
typedef struct {
    const float *in;
    float *out;
    int64_t in_step, out_step, outer, in_outer, out_outer, inner, in_inner, out_inner;
    int64_t next, fresh;
    const float *bias, *residual;
    int64_t bias_inner, lanes, valid;
    float low;
} line_job;

/* Lines with values outside x, or with few lanes: every value has its own place and steps, so that
   zeros can come from one and the same place. */
typedef struct {
    const float *in[16];
    float *out;
    int64_t in_outer[16], in_inner[16], out_step, outer, out_outer, inner, out_inner, lanes;
} edge_job;

typedef void (*line_pass)(const line_job *);
typedef void (*edge_pass)(const edge_job *);
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

INLINE void edge_body(int alpha, line_program program, int whole, const edge_job *j) {
    const int64_t outer = j->outer, inner = j->inner, step = j->out_step, n = j->lanes;
    for (int64_t o = 0; o < outer; o++) {
        const float *in[16];
        float *out = j->out + o * j->out_outer;
        UNROLL
        for (int k = 0; k < alpha; k++) in[k] = j->in[k] + o * j->in_outer[k];
        for (int64_t i = 0; i < inner; i++, out += j->out_inner) {
            vec d[16], v[16];
            UNROLL
            for (int k = 0; k < alpha; k++) d[k] = whole ? vload(in[k]) : vload_n(in[k], n);
            UNROLL
            for (int k = 0; k < alpha; k++) in[k] += j->in_inner[k];
            program(d, v);
            UNROLL
            for (int k = 0; k < alpha; k++) vstore(out + k * step, v[k]);
        }
    }
}

INLINE void edge_lines(int alpha, line_program program, const edge_job *j) {
    if (j->lanes == VL)
        edge_body(alpha, program, 1, j);
    else
        edge_body(alpha, program, 0, j);
}

/* Lines of M to lines between the passes. */
INLINE void output_lines(int m, int alpha, line_program program, const line_job *job) {
    const line_job j = *job;
    for (int64_t o = 0; o < j.outer; o++) {
        const float *in = j.in + o * j.in_outer;
        float *out = j.out + o * j.out_outer;
        for (int64_t i = 0; i < j.inner; i++, in += j.in_inner, out += j.out_inner) {
            vec d[16], y[16];
            UNROLL
            for (int k = 0; k < alpha; k++) d[k] = vload(in + k * j.in_step);
            program(d, y);
            UNROLL
            for (int k = 0; k < m; k++) vstore(out + k * j.out_step, y[k]);
        }
    }
}

/* The last pass, to y with what comes after the sum; `whole` lines have all lanes and outputs. */
INLINE void write_body(int m, int alpha, line_program program, int whole, const line_job *job) {
    const line_job j = *job;
    const int64_t valid = whole ? m : j.valid;
    const vec low = vset(j.low);
    for (int64_t o = 0; o < j.outer; o++) {
        const float *in = j.in + o * j.in_outer;
        for (int64_t i = 0; i < j.inner; i++, in += j.in_inner) {
            vec d[16], y[16];
            int64_t at = o * j.out_outer + i * j.out_inner, n = i + 1 < j.inner ? VL : j.lanes;
            UNROLL
            for (int k = 0; k < alpha; k++) d[k] = vload(in + k * j.in_step);
            program(d, y);
            if (j.bias) {
                const float *bias = j.bias + i * j.bias_inner;
                vec shift = whole ? vload(bias) : vload_n(bias, n);
                UNROLL
                for (int k = 0; k < m; k++) y[k] += shift;
            }
            UNROLL
            for (int k = 0; k < m; k++, at += j.out_step) {
                if (j.residual && k < valid)
                    y[k] += whole ? vload(j.residual + at) : vload_n(j.residual + at, n);
                if (whole)
                    vstore(j.out + at, vmax(y[k], low));
                else if (k < valid)
                    vstore_n(j.out + at, vmax(y[k], low), n);
            }
        }
    }
}

INLINE void write_lines(int m, int alpha, line_program program, const line_job *j) {
    if (j->lanes == VL && j->valid == m)
        write_body(m, alpha, program, 1, j);
    else
        write_body(m, alpha, program, 0, j);
}

/* By r and m: passes over x, with prefetching or at its edges, over lines, and those of M. */
#define LINE_PASSES(m, r, alpha)                                                               \
    static void read_##m##_##r(const line_job *j) {                                             \
        input_lines(alpha, bt_##m##_##r, 1, j);                                                 \
    }                                                                                          \
    static void edge_##m##_##r(const edge_job *j) { edge_lines(alpha, bt_##m##_##r, j); }       \
    static void input_##m##_##r(const line_job *j) {                                            \
        input_lines(alpha, bt_##m##_##r, 0, j);                                                 \
    }                                                                                          \
    static void output_##m##_##r(const line_job *j) {                                           \
        output_lines(m, alpha, at_##m##_##r, j);                                                \
    }                                                                                          \
    static void write_##m##_##r(const line_job *j) {                                            \
        write_lines(m, alpha, at_##m##_##r, j);                                                 \
    }
EACH_PROGRAM(LINE_PASSES)

enum { MOST_TAPS = 7, MOST_OUTPUTS = 6 };
typedef line_pass line_passes[MOST_TAPS + 1][MOST_OUTPUTS + 1];
#define READ_PASS(m, r, alpha) [r][m] = read_##m##_##r,
#define EDGE_PASS(m, r, alpha) [r][m] = edge_##m##_##r,
#define INPUT_PASS(m, r, alpha) [r][m] = input_##m##_##r,
#define OUTPUT_PASS(m, r, alpha) [r][m] = output_##m##_##r,
#define WRITE_PASS(m, r, alpha) [r][m] = write_##m##_##r,
static const line_passes read_passes = {EACH_PROGRAM(READ_PASS)};
static const edge_pass edge_passes[MOST_TAPS + 1][MOST_OUTPUTS + 1] = {EACH_PROGRAM(EDGE_PASS)};
static const line_passes input_passes = {EACH_PROGRAM(INPUT_PASS)};
static const line_passes output_passes = {EACH_PROGRAM(OUTPUT_PASS)};
static const line_passes write_passes = {EACH_PROGRAM(WRITE_PASS)};

#endif
