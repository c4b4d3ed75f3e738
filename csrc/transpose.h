/* Contiguous to channels last and back: matrices transposed in squares of vectors. */
#include "vec.h"

enum { POINTS_PER_ITEM = 64 }; /* a few cache lines of every channel */

typedef struct {
    const float *from;
    float *to;
    int64_t from_stride, to_stride, rows, columns, high, wide, down, across;
} transpose_job;

/* to (columns, rows) = from (rows, columns) transposed, of at most VL by VL. */
INLINE void transpose_square(const float *from, int64_t from_stride, float *to, int64_t to_stride,
                         int64_t rows, int64_t columns) {
    vec v[VL];
    if (rows >= VL && columns >= VL) {
        UNROLL
        for (int i = 0; i < VL; i++) v[i] = vload(from + i * from_stride);
        vtranspose(v);
        UNROLL
        for (int i = 0; i < VL; i++) vstore(to + i * to_stride, v[i]);
        return;
    }
    int64_t wide = fc_min(columns, VL), high = fc_min(rows, VL);
    UNROLL
    for (int i = 0; i < VL; i++)
        v[i] = i < rows ? vload_n(from + i * from_stride, wide) : vzero();
    vtranspose(v);
    UNROLL
    for (int i = 0; i < VL; i++)
        if (i < columns) vstore_n(to + i * to_stride, v[i], high);
}

static void transpose_item(void *context, int64_t item, int thread) {
    (void)thread;
    const transpose_job *t = context;
    int64_t image = item / (t->down * t->across);
    const float *from = t->from + image * t->rows * t->from_stride;
    float *to = t->to + image * t->columns * t->to_stride;
    int64_t first_row = item / t->across % t->down * t->high;
    int64_t first_column = item % t->across * t->wide;
    int64_t last_row = fc_min(first_row + t->high, t->rows);
    int64_t last_column = fc_min(first_column + t->wide, t->columns);
    for (int64_t i = first_row; i < last_row; i += VL)
        for (int64_t j = first_column; j < last_column; j += VL)
            transpose_square(from + i * t->from_stride + j, t->from_stride, to + j * t->to_stride + i,
                             t->to_stride, last_row - i, last_column - j);
}

static void transpose(const float *from, int64_t from_stride, float *to, int64_t to_stride,
                      int64_t images, int64_t rows, int64_t columns, int threads) {
    if (!images || !rows || !columns) return;
    int tall = rows > columns; /* the longer axis is the points: cut there */
    transpose_job t = {from, to, from_stride, to_stride, rows, columns, tall ? POINTS_PER_ITEM : rows,
                       tall ? columns : POINTS_PER_ITEM, 0, 0};
    t.down = fc_ceil_div(rows, t.high);
    t.across = fc_ceil_div(columns, t.wide);
    fc_parallel_for(threads, images * t.down * t.across, transpose_item, &t);
}
