/* Output pixels in lanes: the strips of a call, direct or by F(m, r), on their way along T. */
#ifndef FC_GROUPED_STRIPS_H
#define FC_GROUPED_STRIPS_H

#include "winograd_lanes.h"

static void lanes_item(void *context, int64_t item, int thread) {
    const lanes_call *c = context;
    const fc_grouped *p = c->params;
    const fc_geometry *g = &p->geometry;
    const fc_pixel_lanes *l = &p->lanes;
    lanes_strip s = {.call = c};
    int64_t tiles = fc_ceil_div(g->out_size[0], l->tile[0]), time = item % c->times;
    s.time = time * tiles / c->times * l->tile[0];
    s.last_time = fc_min((time + 1) * tiles / c->times * l->tile[0], g->out_size[0]);
    item /= c->times;
    s.column = item % c->across * l->wide;
    s.columns = fc_min(l->wide, g->out_size[2] - s.column);
    s.row = item / c->across % c->down * l->high;
    s.rows = fc_min(l->high, g->out_size[1] - s.row);
    s.group = item / (c->across * c->down) % c->chunks * l->groups;
    s.groups = fc_min(l->groups, g->groups - s.group);
    s.image = item / (c->across * c->down * c->chunks);

    int64_t depth = g->in_channels / g->groups, outputs = g->out_channels / g->groups;
    int64_t channels = l->groups * depth;
    int64_t of_row = fc_ceil_div(l->groups * outputs + l->channels, VL) * VL * l->sums_stride;
    int64_t of_frame = l->tile[1] * of_row;
    int tiled = l->tile[0] * l->tile[1] > 1;
    s.ring = c->arrays->workspace + thread * p->each;
    s.sums = s.ring + channels * l->channel_stride;
    s.tiled.packed = s.sums + l->tile[0] * of_frame;
    s.tiled.v = s.tiled.packed + channels * l->packed_stride;
    s.tiled.bias = s.tiled.v + depth * l->v_stride;
    s.tiled.m = s.tiled.bias + tiled * l->channels * VL;
    int64_t points = l->points[0] * l->points[1] + l->points[0] * l->tile[1];
    s.offsets = (int64_t *)(s.tiled.m + tiled * points * l->channels * l->vectors * VL);

    /* Padding stays zero: for one strip it is the same rows and columns in every frame. */
    memset(s.ring, 0, 4 * channels * l->channel_stride);
    memset(s.tiled.packed, 0, 4 * channels * l->packed_stride);
    int64_t following = 0;
    for (int64_t o = s.time; o < s.last_time; o += l->tile[0]) {
        int64_t first = o * g->stride[0] - g->pad[0];
        int64_t reach = l->tile[0] - 1 + (g->kernel[0] - 1) * g->dilation[0];
        int64_t last = fc_min(first + reach, g->in_size[0] - 1);
        for (following = fc_max(following, first); following <= last; following++)
            tiled_pack(&s, following);
        if (tiled) tiled_multiply(&s, o, of_row);
        else lanes_multiply(&s, o);
        for (int64_t t = o; t < fc_min(o + l->tile[0], s.last_time); t++)
            lanes_unpack(&s, t, s.sums + (t - o) * of_frame, of_row);
    }
}

/* Strips, and parts of T where there are too few of them to keep all threads busy. */
static void lanes_run(const fc_grouped *p, const fc_arrays *a, const float *const *frames,
                      int threads) {
    const fc_geometry *g = &p->geometry;
    const fc_pixel_lanes *l = &p->lanes;
    lanes_call c = {.params = p, .arrays = a, .frames = frames, .times = 1};
    c.chunks = fc_ceil_div(g->groups, l->groups);
    c.down = fc_ceil_div(g->out_size[1], l->high);
    c.across = fc_ceil_div(g->out_size[2], l->wide);
    int64_t strips = g->batch * c.chunks * c.down * c.across, best = INT64_MAX;
    if (!strips) return;
    int64_t tiles = fc_ceil_div(g->out_size[0], l->tile[0]);
    for (int64_t times = 1; times <= tiles; times++) {
        /* Each part packs the frames in front of its first output again: a sixth of the work. */
        int64_t frames_each = fc_ceil_div(tiles, times) * l->tile[0];
        int64_t again = times > 1 ? g->kernel[0] - 1 : 0;
        int64_t busiest = fc_ceil_div(strips * times, threads) * (6 * frames_each + again);
        if (busiest < best) {
            best = busiest;
            c.times = times;
        }
        if (threads == 1) break;
    }
    fc_parallel_for(threads, strips * c.times, lanes_item, &c);
}


#endif
