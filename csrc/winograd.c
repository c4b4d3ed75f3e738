/* Minimal filtering F(m, r) per axis: V = BT d, M = V U per point, y = AT M.

   Lavin and Gray 2016, section 4.1. A thread takes a block of few tiles through all stages, V and M
   staying in its caches while U streams by ("fused"); or all threads go through one stage after the
   other with a round of many tiles and share U ("phased"). The phases of a strided axis lie side by
   side in the rows of V, so the products add them up. */
#include "winograd_fetch.h"

/* A round of tiles: `count` from `first` on. */
typedef struct {
    const fc_winograd *p;
    const fc_arrays *a;
    int64_t first, count;
} winograd_round;

static void input_tiles(const fc_winograd *p, const fc_arrays *a, int64_t first, int64_t count,
                        float *v, float *lines) {
    tile_place place = place_of(p, first);
    for (int64_t i = 0; i < count; i++, next_place(p, &place))
        input_tile(p, a->x, &place, v + i * p->v_row, lines);
}

/* M of one point and one panel, for `count` tiles, while memory of the lists is asked for. */
static void multiply_point(const fc_winograd *p, const fc_arrays *a, int64_t point, int64_t panel,
                           int64_t count, const float *v, float *m, line_list *read,
                           line_list *written) {
    int64_t width = p->vectors * VL, block = gemm_block_rows[p->vectors];
    product_job g = {.a = v + point * p->v_point, .a_stride = p->v_row, .depth = p->depth};
    g.b = a->weights + (panel * p->points + point) * p->depth * width;
    g.ahead = g.b + p->depth * width;
    g.c = m + panel * p->m_panel + point * p->m_point;
    for (int64_t row = 0; row < count; row += block) {
        take_lines(read, p->depth, g.b, &g.read);
        take_lines(written, p->depth, g.b, &g.written);
        product_tiles[p->vectors][fc_min(block, count - row) - 1](&g);
        g.a += block * p->v_row;
        g.c += block * width;
        g.ahead = g.b;
    }
}

static void output_tiles(const fc_winograd *p, const fc_arrays *a, int64_t first, int64_t count,
                         int64_t panel, const float *m, float *lines) {
    tile_place place = place_of(p, first);
    m += panel * p->m_panel;
    for (int64_t i = 0; i < count; i++, next_place(p, &place))
        output_tile(p, a, &place, panel, m + i * p->vectors * VL, lines);
}

static void fused_item(void *context, int64_t item, int thread) {
    const winograd_round *r = context;
    const fc_winograd *p = r->p;
    float *lines = r->a->workspace + thread * (p->lines + p->v_size + p->m_size);
    float *v = lines + p->lines, *m = v + p->v_size;
    int64_t first = item * p->block, count = fc_min(p->block, p->tiles - first);
    int64_t next = first + count, after = fc_min(p->block, p->tiles - next);
    int64_t parts = fc_ceil_div(p->vectors * VL, FC_LINE);
    line_list read, written;
    input_tiles(p, r->a, first, count, v, lines);
    for (int64_t panel = 0; panel < p->panels; panel++) {
        list_lines(&read, p, r->a->x, 0, 1, next, panel == p->panels - 1 ? after : 0);
        list_lines(&written, p, r->a->y + panel * p->vectors * VL, 1, parts, first, count);
        for (int64_t point = 0; point < p->points; point++)
            multiply_point(p, r->a, point, panel, count, v, m, &read, &written);
        output_tiles(p, r->a, first, count, panel, m, lines);
    }
}

static void input_item(void *context, int64_t item, int thread) {
    const winograd_round *r = context;
    const fc_winograd *p = r->p;
    float *v = r->a->workspace, *lines = v + p->v_size + p->m_size + thread * p->lines;
    int64_t done = item * p->group, count = fc_min(p->group, r->count - done);
    input_tiles(p, r->a, r->first + done, count, v + done * p->v_row, lines);
}

static void multiply_item(void *context, int64_t item, int thread) {
    (void)thread;
    const winograd_round *r = context;
    const fc_winograd *p = r->p;
    float *v = r->a->workspace, *m = v + p->v_size;
    line_list none = {0};
    multiply_point(p, r->a, item / p->panels, item % p->panels, r->count, v, m, &none, &none);
}

static void output_item(void *context, int64_t item, int thread) {
    const winograd_round *r = context;
    const fc_winograd *p = r->p;
    float *m = r->a->workspace + p->v_size, *lines = m + p->m_size + thread * p->lines;
    int64_t done = item / p->panels * p->group, count = fc_min(p->group, r->count - done);
    output_tiles(p, r->a, r->first + done, count, item % p->panels, m + done * p->vectors * VL,
                 lines);
}

static void winograd_run(const void *params, const fc_arrays *a) {
    const fc_winograd *p = params;
    winograd_round r = {p, a, 0, p->tiles};
    if (!p->phased) {
        fc_parallel_for(a->threads, fc_ceil_div(p->tiles, p->block), fused_item, &r);
        return;
    }
    for (; r.first < p->tiles; r.first += p->block) {
        r.count = fc_min(p->block, p->tiles - r.first);
        int64_t groups = fc_ceil_div(r.count, p->group);
        fc_parallel_for(a->threads, groups, input_item, &r);
        fc_parallel_for(a->threads, p->points * p->panels, multiply_item, &r);
        fc_parallel_for(a->threads, groups * p->panels, output_item, &r);
    }
}
