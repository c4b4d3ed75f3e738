/* Minimal filtering F(m, r) per axis: V = BT d, M = V U per point, y = AT M.

   Lavin and Gray 2016, section 4.1. A thread takes a block of few tiles through all stages, V and M
   staying in its caches while U streams by ("fused"); or all threads go through one stage after the
   other with a round of many tiles and share U ("phased"). The phases of a strided axis lie side by
   side in the rows of V, so the products add them up. */
#include "winograd_fetch.h"

/* A round of tiles: `count` from `first` on; frames as for `input_tile`. */
typedef struct {
    const fc_winograd *p;
    const fc_arrays *a;
    const float *const *frames;
    int64_t first, count;
} winograd_round;

static void input_tiles(const winograd_round *r, int64_t first, int64_t count, float *v,
                        float *lines) {
    const fc_winograd *p = r->p;
    tile_place place = place_of(p, first);
    clear_vectors(lines + p->points * p->at_once * VL, 1); /* zeros for what is outside x */
    for (int64_t i = 0, alike; i < count; i += alike) {
        alike = alike_from(p, &place, count - i);
        input_tile(p, r->a->x, r->frames, &place, alike, v + i * p->v_row, lines);
        skip_places(p, &place, alike);
    }
}

/* M of one point and one panel, for `count` tiles. Meanwhile the lists' memory is asked for; after
   their end, what the next product reads beside its weights and what it writes. */
static void multiply_point(const fc_winograd *p, const fc_arrays *a, int64_t point, int64_t panel,
                           int64_t count, const float *v, float *m, line_list *read,
                           line_list *written) {
    int64_t width = p->vectors * VL, most = gemm_block_rows[p->vectors];
    int64_t rows = fc_ceil_div(count, fc_ceil_div(count, most)); /* blocks of equal height */
    /* Next comes another panel of this point if phased, else another point, round and round. */
    int64_t next = point + 1 < p->points ? 1 : 1 - p->points;
    int64_t next_a = p->phased ? 0 : next * p->v_point;
    int64_t next_c = p->phased ? (panel + 1 < p->panels ? p->m_panel : 0) : next * p->m_point;
    product_job g = {.a = v + point * p->v_point, .a_stride = p->v_row, .depth = p->depth};
    g.b = a->weights + point * p->u_point + panel * p->u_panel;
    g.ahead = g.b + p->depth * width;
    g.c = m + panel * p->m_panel + point * p->m_point;
    for (; count > 0; count -= rows) {
        rows = fc_min(rows, count);
        take_lines(read, p->depth, g.a + next_a, fc_ceil_div(rows * p->v_row, FC_LINE), &g.read);
        take_lines(written, p->depth, g.c + next_c, fc_ceil_div(rows * width, FC_LINE), &g.written);
        product_tiles[p->vectors][rows - 1](&g);
        g.a += rows * p->v_row;
        g.c += rows * width;
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

static void fused_block(const winograd_round *r, int64_t first, int64_t end, float *lines) {
    const fc_winograd *p = r->p;
    const fc_arrays *a = r->a;
    float *v = lines + p->lines, *m = v + p->v_size;
    int64_t width = p->vectors * VL, count = fc_min(p->block, end - first), next = first + count;
    line_list read, written;
    input_tiles(r, first, count, v, lines);
    for (int64_t panel = 0; panel < p->panels; panel++) {
        int64_t reads = panel == p->panels - 1 && !r->frames ? fc_min(p->block, end - next) : 0;
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

/* Neighbouring blocks go to one thread, which asks for memory of the next block during products. An
   item for each thread has half of all blocks, the next ones half of the rest, and so on to single
   blocks, so that all end together. Returns the first block of an item. */
static int64_t first_block(const winograd_round *r, int64_t item) {
    int64_t blocks = fc_ceil_div(r->p->tiles, r->p->block), threads = r->a->threads, first = 0;
    int64_t size = blocks / (2 * threads);
    for (; item > threads && size > 1; item -= threads, size /= 2) first += threads * size;
    return fc_min(first + item * fc_max(size, 1), blocks);
}

static void fused_item(void *context, int64_t item, int thread) {
    const winograd_round *r = context;
    const fc_winograd *p = r->p;
    float *lines = r->a->workspace + thread * (p->lines + p->v_size + p->m_size);
    int64_t first = first_block(r, item) * p->block;
    int64_t end = fc_min(first_block(r, item + 1) * p->block, p->tiles);
    for (; first < end; first += p->block) fused_block(r, first, end, lines);
}

static void input_item(void *context, int64_t item, int thread) {
    const winograd_round *r = context;
    const fc_winograd *p = r->p;
    float *v = r->a->workspace, *lines = v + p->v_size + p->m_size + thread * p->lines;
    int64_t done = item * p->group, count = fc_min(p->group, r->count - done);
    input_tiles(r, r->first + done, count, v + done * p->v_row, lines);
}

/* Panels of one point that are an item: all of them, unless that makes too few items. */
static int64_t panels_per_item(const fc_winograd *p, int threads) {
    int64_t parts = fc_min(fc_ceil_div(4 * threads, p->points), p->panels);
    return fc_ceil_div(p->panels, parts);
}

static void multiply_item(void *context, int64_t item, int thread) {
    (void)thread;
    const winograd_round *r = context;
    const fc_winograd *p = r->p;
    float *v = r->a->workspace, *m = v + p->v_size;
    line_list none = {0};
    int64_t each = panels_per_item(p, r->a->threads), parts = fc_ceil_div(p->panels, each);
    int64_t panel = item % parts * each, end = fc_min(panel + each, p->panels);
    for (; panel < end; panel++)
        multiply_point(p, r->a, item / parts, panel, r->count, v, m, &none, &none);
}

static void output_item(void *context, int64_t item, int thread) {
    const winograd_round *r = context;
    const fc_winograd *p = r->p;
    float *m = r->a->workspace + p->v_size, *lines = m + p->m_size + thread * p->lines;
    int64_t done = item / p->panels * p->group, count = fc_min(p->group, r->count - done);
    output_tiles(p, r->a, r->first + done, count, item % p->panels, m + done * p->vectors * VL,
                 lines);
}

static void winograd_frames(const fc_winograd *p, const fc_arrays *a,
                            const float *const *frames) {
    winograd_round r = {p, a, frames, 0, p->tiles};
    if (!p->phased) {
        int64_t items = 0, blocks = fc_ceil_div(p->tiles, p->block);
        while (first_block(&r, items) < blocks) items += a->threads;
        fc_parallel_for(a->threads, items, fused_item, &r);
        return;
    }
    for (; r.first < p->tiles; r.first += p->block) {
        r.count = fc_min(p->block, p->tiles - r.first);
        int64_t groups = fc_ceil_div(r.count, p->group);
        fc_parallel_for(a->threads, groups, input_item, &r);
        int64_t parts = fc_ceil_div(p->panels, panels_per_item(p, a->threads));
        fc_parallel_for(a->threads, p->points * parts, multiply_item, &r);
        fc_parallel_for(a->threads, groups * p->panels, output_item, &r);
    }
}

static void winograd_run(const void *params, const fc_arrays *a) {
    const fc_winograd *p = params;
    if (p->lanes) grouped_run(p->lanes, a);
    else winograd_frames(p, a, NULL);
}
