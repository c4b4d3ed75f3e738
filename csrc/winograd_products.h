/* M = V U for a block of tiles, and meanwhile the memory that the next stages need is asked for.

   As in gemm.h, but nothing is added to the sums, and products, which leave memory idle, ask for
   a line or two with every row of U: of x for the next block, of y for the output transform. */
#ifndef FC_WINOGRAD_PRODUCTS_H
#define FC_WINOGRAD_PRODUCTS_H

#include "gemm.h"

/* Lines to be asked for: `left` of them, `step` floats apart. */
typedef struct {
    const float *at;
    int64_t step, left;
} line_run;

/* c (rows, width) = a (rows, depth) b (depth, width)

   ahead  what the next product will read in place of b
   read, written  runs of at most `depth` lines */
typedef struct {
    const float *a, *b, *ahead;
    int64_t a_stride, depth;
    float *c;
    line_run read, written;
} product_job;

INLINE void product_body(int rows, int nv, const product_job *g) {
    vec sum[MAX_ROWS * 4];
    UNROLL
    for (int i = 0; i < rows * nv; i++) sum[i] = vzero();
    const float *a = g->a, *b = g->b, *read = g->read.at, *written = g->written.at;
    const int64_t stride = g->a_stride, depth = g->depth, ahead = g->ahead - b;
    const int64_t reads = g->read.left, read_step = g->read.step;
    const int64_t writes = g->written.left, written_step = g->written.step;
    float *c = g->c;
    for (int64_t k = 0; k < depth; k++, b += nv * VL) {
        vec w[4];
        UNROLL
        for (int j = 0; j < nv; j++) w[j] = vload(b + j * VL);
        UNROLL
        for (int j = 0; j < nv * VL; j += FC_LINE) prefetch_far(b + ahead + j);
        prefetch(read);
        prefetch_write(written);
        read += read_step & -(int64_t)(k < reads); /* no branch */
        written += written_step & -(int64_t)(k < writes);
        UNROLL
        for (int i = 0; i < rows; i++) {
            vec value = vset(a[i * stride + k]);
            UNROLL
            for (int j = 0; j < nv; j++) sum[i * nv + j] = value * w[j] + sum[i * nv + j];
        }
    }
    UNROLL
    for (int i = 0; i < rows * nv; i++) vstore(c + i * VL, sum[i]);
}

typedef void (*product_tile)(const product_job *);

#define PRODUCT_TILE(rows, nv)                                                                 \
    static void product_##rows##_##nv(const product_job *g) { product_body(rows, nv, g); }
#define PRODUCT_ENTRY(rows, nv) [nv][rows - 1] = product_##rows##_##nv,

#define EACH_ROW_2(X, nv) X(1, nv) X(2, nv)
#define EACH_ROW_4(X, nv) EACH_ROW_2(X, nv) X(3, nv) X(4, nv)
#define EACH_ROW_6(X, nv) EACH_ROW_4(X, nv) X(5, nv) X(6, nv)
#define EACH_ROW_8(X, nv) EACH_ROW_6(X, nv) X(7, nv) X(8, nv)
#define EACH_ROW_12(X, nv) EACH_ROW_8(X, nv) X(9, nv) X(10, nv) X(11, nv) X(12, nv)
#define EACH_ROW_14(X, nv) EACH_ROW_12(X, nv) X(13, nv) X(14, nv)
#if VL == 16
#define EACH_BLOCK(X) EACH_ROW_14(X, 1) EACH_ROW_14(X, 2) EACH_ROW_8(X, 3) EACH_ROW_6(X, 4)
#elif VL == 8
#define EACH_BLOCK(X) EACH_ROW_12(X, 1) EACH_ROW_6(X, 2) EACH_ROW_4(X, 3) EACH_ROW_2(X, 4)
#else
#define EACH_BLOCK(X) EACH_ROW_8(X, 1) EACH_ROW_6(X, 2) EACH_ROW_4(X, 3) EACH_ROW_2(X, 4)
#endif

EACH_BLOCK(PRODUCT_TILE)
static const product_tile product_tiles[5][MAX_ROWS] = {EACH_BLOCK(PRODUCT_ENTRY)};

#endif
