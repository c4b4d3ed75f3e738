/* The matrix micro-kernel: a block of C = A B in registers, A broadcast from rows, B streamed.

   A is a sum over segments (the taps of a direct convolution; one segment for a plain product):
   C = sum over s of A_s (rows, depth) B_s (depth, columns). B is packed into panels of a few vectors
   of columns, [panel][segment][depth][vectors * VL], zeros behind the last column, and readable for
   one panel more behind the last, which is prefetched. */
#ifndef FC_GEMM_H
#define FC_GEMM_H

#include "activation.h"

/* Rows of the register block for 1, 2, 3 and 4 vectors per panel: accumulators, a row of B and an
   element of A fit the registers. fastconv/c_kernels/panels.py has the same numbers. */
#if VL == 16
enum { ROWS_1 = 14, ROWS_2 = 14, ROWS_3 = 8, ROWS_4 = 6 };
#elif VL == 8
enum { ROWS_1 = 12, ROWS_2 = 6, ROWS_3 = 4, ROWS_4 = 2 };
#else
enum { ROWS_1 = 8, ROWS_2 = 6, ROWS_3 = 4, ROWS_4 = 2 };
#endif
enum { MAX_ROWS = 14 };

/* c (rows, columns) = activation(product + bias + residual)

   a         first row of each segment; a_stride between rows
   b         one panel, segment after segment
   columns   valid ones of the panel, at least 1; nothing else of c, bias and residual is touched
   residual  or NULL; with c's stride, and may be c itself, which makes the product accumulate
   ahead     what is wanted next, so many cache lines, asked for by full register blocks */
typedef struct {
    const float *const *a;
    int64_t a_stride, segments, depth;
    const float *b;
    float *c;
    int64_t c_stride, columns;
    const float *bias, *residual;
    int activation;
    const float *ahead;
    int64_t ahead_lines;
    int ahead_write;
} gemm_job;

/* The end of a register block: bias, residual, activation, and the way to memory; with `stream` past
   the caches. */
INLINE void gemm_finish(int rows, int nv, vec *sum, float *c, int64_t c_stride, int64_t columns,
                        const float *bias, const float *residual, int activation, int stream) {
    vec low = vset(activation_floor(activation));
    UNROLL
    for (int j = 0; j < nv; j++) {
        int64_t n = vcount(columns, j * VL);
        if (bias) {
            vec shift = vload_n(bias + j * VL, n);
            UNROLL
            for (int i = 0; i < rows; i++) sum[i * nv + j] += shift;
        }
        if (residual && n == VL) {
            UNROLL
            for (int i = 0; i < rows; i++)
                sum[i * nv + j] += vload(residual + i * c_stride + j * VL);
        } else if (residual && n) {
            UNROLL
            for (int i = 0; i < rows; i++)
                sum[i * nv + j] += vload_n(residual + i * c_stride + j * VL, n);
        }
    }
    if (activates_later(activation)) { /* a copy, so that sums otherwise stay in registers */
        vec later[MAX_ROWS * 4];
        UNROLL
        for (int i = 0; i < rows * nv; i++) later[i] = sum[i];
        activate_sums(later, rows * nv, activation);
        UNROLL
        for (int i = 0; i < rows * nv; i++) sum[i] = later[i];
    }
    UNROLL
    for (int j = 0; j < nv; j++) {
        int64_t n = vcount(columns, j * VL);
        if (n == VL && stream) {
            UNROLL
            for (int i = 0; i < rows; i++)
                vstream(c + i * c_stride + j * VL, vmax(sum[i * nv + j], low));
        } else if (n == VL) {
            UNROLL
            for (int i = 0; i < rows; i++)
                vstore(c + i * c_stride + j * VL, vmax(sum[i * nv + j], low));
        } else if (n) {
            UNROLL
            for (int i = 0; i < rows; i++)
                vstore_n(c + i * c_stride + j * VL, vmax(sum[i * nv + j], low), n);
        }
    }
}

INLINE void gemm_body(int rows, int nv, int ahead, const gemm_job *g, int64_t row) {
    vec sum[MAX_ROWS * 4];
    UNROLL
    for (int i = 0; i < rows * nv; i++) sum[i] = vzero();
    const float *b = g->b;
    int64_t stride = g->a_stride, depth = g->depth, panel = g->segments * depth * nv * VL;
    const float *next = g->ahead, *end = ahead ? next + g->ahead_lines * FC_LINE : next;
    int write = g->ahead_write;
    for (int64_t s = 0; s < g->segments; s++) {
        const float *a = g->a[s] + row * stride;
        for (int64_t k = 0; k < depth; k++, b += nv * VL) {
            vec w[4];
            UNROLL
            for (int j = 0; j < nv; j++) w[j] = vload(b + j * VL);
            if (ahead) {
                UNROLL
                for (int j = 0; j < nv * VL; j += 16) prefetch_far(b + panel + j);
            }
            if (next != end) {
                if (write)
                    prefetch_write(next);
                else
                    prefetch_far(next);
                next += FC_LINE;
            }
            UNROLL
            for (int i = 0; i < rows; i++) {
                vec value = vset(a[i * stride + k]);
                UNROLL
                for (int j = 0; j < nv; j++)
                    sum[i * nv + j] = value * w[j] + sum[i * nv + j];
            }
        }
    }
    int64_t at = row * g->c_stride;
    gemm_finish(rows, nv, sum, g->c + at, g->c_stride, g->columns, g->bias,
                g->residual ? g->residual + at : NULL, g->activation, 0);
}

typedef void (*gemm_tile)(const gemm_job *, int64_t row);

/* X(rows, nv) for every register block. */
#define EACH_ROWS_2(X, nv) X(1, nv) X(2, nv)
#define EACH_ROWS_4(X, nv) EACH_ROWS_2(X, nv) X(3, nv) X(4, nv)
#define EACH_ROWS_6(X, nv) EACH_ROWS_4(X, nv) X(5, nv) X(6, nv)
#define EACH_ROWS_8(X, nv) EACH_ROWS_6(X, nv) X(7, nv) X(8, nv)
#define EACH_ROWS_12(X, nv) EACH_ROWS_8(X, nv) X(9, nv) X(10, nv) X(11, nv) X(12, nv)
#define EACH_ROWS_14(X, nv) EACH_ROWS_12(X, nv) X(13, nv) X(14, nv)
#if VL == 16
#define EACH_TILE(X) EACH_ROWS_14(X, 1) EACH_ROWS_14(X, 2) EACH_ROWS_8(X, 3) EACH_ROWS_6(X, 4)
#elif VL == 8
#define EACH_TILE(X) EACH_ROWS_12(X, 1) EACH_ROWS_6(X, 2) EACH_ROWS_4(X, 3) EACH_ROWS_2(X, 4)
#else
#define EACH_TILE(X) EACH_ROWS_8(X, 1) EACH_ROWS_6(X, 2) EACH_ROWS_4(X, 3) EACH_ROWS_2(X, 4)
#endif

#define GEMM_TILE(rows, nv)                                                                    \
    static void gemm_##rows##_##nv(const gemm_job *g, int64_t row) {                            \
        gemm_body(rows, nv, rows == ROWS_##nv, g, row);                                         \
    }
EACH_TILE(GEMM_TILE)
#define GEMM_NAME(rows, nv) [nv][rows - 1] = gemm_##rows##_##nv,
static const gemm_tile gemm_tiles[5][MAX_ROWS] = {EACH_TILE(GEMM_NAME)};
static const int gemm_block_rows[5] = {0, ROWS_1, ROWS_2, ROWS_3, ROWS_4};

/* `rows` rows of c, of any count, for one panel of `nv` vectors. */
INLINE void gemm_rows(const gemm_job *g, int nv, int64_t rows) {
    int64_t row = 0, block = gemm_block_rows[nv];
    for (; row + block <= rows; row += block) gemm_tiles[nv][block - 1](g, row);
    if (row < rows) gemm_tiles[nv][rows - row - 1](g, row);
}

#endif
