/* The matrix micro-kernel: a block of C = A B in registers, A broadcast from rows, B streamed.

   A is a sum over segments (the taps of a direct convolution; one segment for a plain product):
   C = sum over s of A_s (rows, depth) B_s (depth, columns). B is packed into panels of a few vectors
   of columns, [panel][segment][depth][vectors * VL], zeros behind the last column, and readable for
   one panel more behind the last, which is prefetched. */
#ifndef FC_GEMM_H
#define FC_GEMM_H

#include "activation.h"

/* Rows of the register block for 1, 2, 3 and 4 vectors per panel: accumulators, a row of B and an
   element of A fit the registers. Python reads them through fc_block_rows. */
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
    if (g->bias) {
        UNROLL
        for (int j = 0; j < nv; j++) {
            vec shift = vload_n(g->bias + j * VL, vcount(g->columns, j * VL));
            UNROLL
            for (int i = 0; i < rows; i++) sum[i * nv + j] += shift;
        }
    }
    vec low = vset(activation_floor(g->activation));
    float *c = g->c + row * g->c_stride;
    const float *residual = g->residual ? g->residual + row * g->c_stride : NULL;
    if (g->columns >= nv * VL) {
        UNROLL
        for (int i = 0; i < rows; i++)
            UNROLL
            for (int j = 0; j < nv; j++) {
                vec z = sum[i * nv + j];
                if (residual) z += vload(residual + i * g->c_stride + j * VL);
                vstore(c + i * g->c_stride + j * VL, vmax(z, low));
            }
    } else {
        UNROLL
        for (int j = 0; j < nv; j++) {
            int64_t n = vcount(g->columns, j * VL);
            if (!n) break;
            UNROLL
            for (int i = 0; i < rows; i++) {
                vec z = sum[i * nv + j];
                if (residual) z += vload_n(residual + i * g->c_stride + j * VL, n);
                vstore_n(c + i * g->c_stride + j * VL, vmax(z, low), n);
            }
        }
    }
    if (activates_later(g->activation))
        activate_rows(c, g->c_stride, rows, fc_min(g->columns, nv * VL), g->activation);
}

typedef void (*gemm_tile)(const gemm_job *, int64_t row);

#define GEMM_TILE(rows, nv)                                                                    \
    static void gemm_##rows##_##nv(const gemm_job *g, int64_t row) {                            \
        gemm_body(rows, nv, rows == ROWS_##nv, g, row);                                         \
    }
#define GEMM_ROWS_2(nv) GEMM_TILE(1, nv) GEMM_TILE(2, nv)
#define GEMM_ROWS_4(nv) GEMM_ROWS_2(nv) GEMM_TILE(3, nv) GEMM_TILE(4, nv)
#define GEMM_ROWS_6(nv) GEMM_ROWS_4(nv) GEMM_TILE(5, nv) GEMM_TILE(6, nv)
#define GEMM_ROWS_8(nv) GEMM_ROWS_6(nv) GEMM_TILE(7, nv) GEMM_TILE(8, nv)
#define GEMM_ROWS_12(nv)                                                                       \
    GEMM_ROWS_8(nv) GEMM_TILE(9, nv) GEMM_TILE(10, nv) GEMM_TILE(11, nv) GEMM_TILE(12, nv)
#define GEMM_ROWS_14(nv) GEMM_ROWS_12(nv) GEMM_TILE(13, nv) GEMM_TILE(14, nv)
#define TILES_2(nv) gemm_1_##nv, gemm_2_##nv
#define TILES_4(nv) TILES_2(nv), gemm_3_##nv, gemm_4_##nv
#define TILES_6(nv) TILES_4(nv), gemm_5_##nv, gemm_6_##nv
#define TILES_8(nv) TILES_6(nv), gemm_7_##nv, gemm_8_##nv
#define TILES_12(nv) TILES_8(nv), gemm_9_##nv, gemm_10_##nv, gemm_11_##nv, gemm_12_##nv
#define TILES_14(nv) TILES_12(nv), gemm_13_##nv, gemm_14_##nv

#if VL == 16
GEMM_ROWS_14(1) GEMM_ROWS_14(2) GEMM_ROWS_8(3) GEMM_ROWS_6(4)
static const gemm_tile gemm_tiles[5][MAX_ROWS] = {{0}, {TILES_14(1)}, {TILES_14(2)}, {TILES_8(3)}, {TILES_6(4)}};
#elif VL == 8
GEMM_ROWS_12(1) GEMM_ROWS_6(2) GEMM_ROWS_4(3) GEMM_ROWS_2(4)
static const gemm_tile gemm_tiles[5][MAX_ROWS] = {{0}, {TILES_12(1)}, {TILES_6(2)}, {TILES_4(3)}, {TILES_2(4)}};
#else
GEMM_ROWS_8(1) GEMM_ROWS_6(2) GEMM_ROWS_4(3) GEMM_ROWS_2(4)
static const gemm_tile gemm_tiles[5][MAX_ROWS] = {{0}, {TILES_8(1)}, {TILES_6(2)}, {TILES_4(3)}, {TILES_2(4)}};
#endif
static const int gemm_block_rows[5] = {0, ROWS_1, ROWS_2, ROWS_3, ROWS_4};

/* `rows` rows of c, of any count, for one panel of `nv` vectors. */
INLINE void gemm_rows(const gemm_job *g, int nv, int64_t rows) {
    int64_t row = 0, block = gemm_block_rows[nv];
    for (; row + block <= rows; row += block) gemm_tiles[nv][block - 1](g, row);
    if (row < rows) gemm_tiles[nv][rows - row - 1](g, row);
}

#endif
