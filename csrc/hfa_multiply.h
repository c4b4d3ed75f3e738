/* Matrix products that ask for the data of what comes next while they compute. */
#ifndef FC_HFA_MULTIPLY_H
#define FC_HFA_MULTIPLY_H

#include "gemm.h"

/* Spans of memory to be asked for, a share by every register block; what does not fit is left out,
   as all of this is advice. */
enum { MOST_SPANS = 24 };
typedef struct {
    const float *at;
    int64_t lines;
    int write;
} hfa_span;
typedef struct {
    hfa_span spans[MOST_SPANS];
    int count, first;
    int64_t share;
} hfa_queue;

INLINE void queue_add(hfa_queue *q, const float *at, int64_t elements, int write) {
    if (q->count < MOST_SPANS)
        q->spans[q->count++] = (hfa_span){at, fc_ceil_div(elements, FC_LINE), write};
}

/* Share the spans out among so many register blocks. */
INLINE void queue_share(hfa_queue *q, int64_t blocks) {
    int64_t lines = 0;
    for (int i = 0; i < q->count; i++) lines += q->spans[i].lines;
    q->share = fc_ceil_div(lines, fc_max(1, blocks));
}

INLINE void queue_take(hfa_queue *q, gemm_job *g) {
    g->ahead_lines = 0;
    if (q->first == q->count) return;
    hfa_span *span = &q->spans[q->first];
    g->ahead = span->at;
    g->ahead_write = span->write;
    g->ahead_lines = fc_min(q->share, span->lines);
    span->at += g->ahead_lines * FC_LINE;
    span->lines -= g->ahead_lines;
    q->first += !span->lines;
}

INLINE int64_t row_blocks(int nv, int64_t rows) { return fc_ceil_div(rows, gemm_block_rows[nv]); }

/* `rows` rows of c for one panel of `nv` vectors. */
static void hfa_multiply(gemm_job *g, int nv, int64_t rows, hfa_queue *queue) {
    int64_t block = gemm_block_rows[nv];
    for (int64_t row = 0; row < rows; row += block) {
        queue_take(queue, g);
        gemm_tiles[nv][fc_min(block, rows - row) - 1](g, row);
    }
}

#endif
