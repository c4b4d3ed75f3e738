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
    if (passes_of(p) == 1) clear_vectors(lines, p->at_once);
    for (int64_t i = 0, alike; i < count; i += alike) {
        alike = alike_from(p, &place, count - i);
        input_tile(p, a->x, &place, alike, v + i * p->v_row, lines);
        skip_places(p, &place, alike);
    }
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
        int64_t rows = fc_min(block, count - row);
        take_lines(read, p->depth, g.a + p->v_point, fc_ceil_div(rows * p->v_row, FC_LINE), &g.read);
        take_lines(written, p->depth, g.c + p->m_point, fc_ceil_div(rows * width, FC_LINE), &g.written);
        product_tiles[p->vectors][rows - 1](&g);
        g.a += block * p->v_row;
        g.c += block * width;
        g.ahead = g.b;
    }
}

static void output_tiles(const fc_winograd *p, const fc_arrays *a, int64_t first, int64_t count,
                         int64_t panel, const float *m, float *lines) {
    tile_place place = place_of(p, first);
    m += panel * p->m_panel;
    for (int64_t i = 0, alike; i < count; i += alike) {
        alike = alike_from(p, &place, count - i);
        output_tile(p, a, &place, alike, panel, m + i * p->vectors * VL, lines);
        skip_places(p, &place, alike);
    }
}

static void fused_block(const fc_winograd *p, const fc_arrays *a, int64_t first, int64_t end,
                        float *lines) {
    float *v = lines + p->lines, *m = v + p->v_size;
    int64_t width = p->vectors * VL, count = fc_min(p->block, end - first), next = first + count;
    line_list read, written;
    input_tiles(p, a, first, count, v, lines);
    for (int64_t panel = 0; panel < p->panels; panel++) {
        int64_t reads = panel == p->panels - 1 ? fc_min(p->block, end - next) : 0;
        list_lines(&read, p, a->x, 0, 1, next, reads);
        const float *y = a->y + panel * width;
        int64_t columns = fc_min(width, p->out_channels - panel * width);
        int64_t aside = (uintptr_t)y / sizeof *y % FC_LINE;
        list_lines(&written, p, y - aside, 1, fc_ceil_div(aside + columns, FC_LINE), first, count);
        for (int64_t point = 0; point < p->points; point++)
            multiply_point(p, a, point, panel, count, v, m, &read, &written);
        output_tiles(p, a, first, count, panel, m, lines);
    }
}

/* Neighbouring blocks go to one thread, which asks for memory of the next block during products:
   many of them at first, and fewer towards the end. Returns the first block of an item. */
static int64_t first_block(const winograd_round *r, int64_t item) {
    int64_t blocks = fc_ceil_div(r->p->tiles, r->p->block), first = 0;
    for (; item > 0 && first < blocks; item--)
        first += fc_max((blocks - first) / (2 * r->a->threads), 1);
    return first;
}

static void fused_item(void *context, int64_t item, int thread) {
    const winograd_round *r = context;
    const fc_winograd *p = r->p;
    float *lines = r->a->workspace + thread * (p->lines + p->v_size + p->m_size);
    int64_t first = first_block(r, item) * p->block;
    int64_t end = fc_min(first_block(r, item + 1) * p->block, p->tiles);
    for (; first < end; first += p->block) fused_block(p, r->a, first, end, lines);
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
        int64_t items = 0, blocks = fc_ceil_div(p->tiles, p->block);
        while (first_block(&r, items) < blocks) items++;
        fc_parallel_for(a->threads, items, fused_item, &r);
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
