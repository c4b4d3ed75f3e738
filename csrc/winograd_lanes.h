/* Grouped convolution by F(m, r) along T and H, output pixels in lanes.

   As in grouped_lanes.h, but rows are packed in phases of tiles, input row i of tile n being row
   n + i / m of phase i % m: BT and AT then work on whole rows of all tiles at once. Along H, V is
   made once per frame on its way into the ring, along T once per tile from the ring's frames. M of a
   register block of pixels stays near from its products, taps along W as terms, to AT. */
#ifndef FC_WINOGRAD_LANES_H
#define FC_WINOGRAD_LANES_H

#include "grouped_lanes.h"
#include "winograd_lines.h"

/* Input frame t into its slot of the ring. */
static void tiled_pack(const lanes_strip *s, int64_t t) {
    const fc_grouped *p = s->call->params;
    const fc_geometry *g = &p->geometry;
    const fc_pixel_lanes *l = &p->lanes;
    float *slot = s->ring + t % l->slots * l->frame;
    if (l->tile[1] == 1) {
        lanes_pack(s, t, slot, l->channel_stride);
        return;
    }
    lanes_pack(s, t, s->tiled.packed, l->packed_stride);
    edge_job job = {.out = slot, .out_step = l->length, .out_inner = VL, .lanes = VL};
    job.outer = s->groups * (g->in_channels / g->groups);
    job.out_outer = l->channel_stride;
    job.inner = l->length / VL;
    for (int64_t i = 0; i < l->points[1]; i++) {
        int64_t row = i % l->tile[1] * l->packed_rows + i / l->tile[1];
        job.in[i] = s->tiled.packed + row * l->row_length;
        job.in_outer[i] = l->packed_stride;
        job.in_inner[i] = VL;
    }
    edge_passes[g->kernel[1]][l->tile[1]](&job);
}

/* V along T of one group, from input frame first_t on; frames that do not exist are zeros. */
static void tiled_input(const lanes_strip *s, int64_t group, int64_t first_t) {
    const fc_geometry *g = &s->call->params->geometry;
    const fc_pixel_lanes *l = &s->call->params->lanes;
    static const float zeros[VL] __attribute__((aligned(4 * VL)));
    int64_t depth = g->in_channels / g->groups;
    edge_job job = {.out = s->tiled.v, .out_step = l->frame, .out_inner = VL, .lanes = VL};
    job.outer = depth;
    job.out_outer = l->v_stride;
    job.inner = l->frame / VL;
    for (int64_t i = 0; i < l->points[0]; i++) {
        int64_t t = first_t + i;
        job.in[i] = zeros;
        if (t < 0 || t >= g->in_size[0]) continue;
        job.in[i] = s->ring + group * depth * l->channel_stride + t % l->slots * l->frame;
        job.in_outer[i] = l->channel_stride;
        job.in_inner[i] = VL;
    }
    edge_passes[g->kernel[0]][l->tile[0]](&job);
}

/* Offsets of the terms of a point: taps of direct axes and channels. Returns their number, and in
   left_out that of the terms in front, of frames before the first. */
static int64_t tiled_terms(const lanes_strip *s, int64_t first_t, int64_t *left_out) {
    const fc_geometry *g = &s->call->params->geometry;
    const fc_pixel_lanes *l = &s->call->params->lanes;
    int64_t depth = g->in_channels / g->groups, terms = 0;
    int64_t times = l->tile[0] > 1 ? 1 : g->kernel[0], rows = l->tile[1] > 1 ? 1 : g->kernel[1];
    int64_t stride = l->tile[0] > 1 ? l->v_stride : l->channel_stride;
    *left_out = 0;
    for (int64_t i = 0; i < times; i++) {
        int64_t t = first_t + i * g->dilation[0], slot = 0;
        if (l->tile[0] == 1) {
            if (t < 0) *left_out = (i + 1) * rows * depth * g->kernel[2];
            if (t < 0 || t >= g->in_size[0]) continue;
            slot = t % l->slots * l->frame;
        }
        for (int64_t j = 0; j < rows; j++)
            for (int64_t n = 0; n < depth; n++)
                for (int64_t q = 0; q < g->kernel[2]; q++)
                    s->offsets[terms++] = slot + n * stride + j * l->row_length + q;
    }
    return terms;
}

/* AT along H, then along T, of the M of some channels and `nv` vectors of pixels: to their sums, of
   (tile[0], tile[1]) outputs `of_row` apart. */
static void tiled_output(const lanes_strip *s, int64_t channels, int64_t nv, const float *bias,
                         float low, float *sums, int64_t of_row) {
    const fc_geometry *g = &s->call->params->geometry;
    const fc_pixel_lanes *l = &s->call->params->lanes;
    int64_t size = l->channels * nv * VL, points = l->points[0] * l->points[1];
    float *m = s->tiled.m, *between = m + points * size;
    line_job last = {.out_inner = l->sums_stride, .bias = bias, .bias_inner = VL, .low = low};
    last.in_outer = last.out_outer = last.lanes = VL;
    last.outer = nv;
    last.inner = channels;
    last.in_inner = nv * VL;
    if (l->tile[0] == 1) {
        last.in = m;
        last.in_step = size;
        last.out = sums;
        last.out_step = of_row;
        last.valid = l->tile[1];
        write_passes[g->kernel[1]][l->tile[1]](&last);
        return;
    }
    if (l->tile[1] > 1) {
        line_job first = {.in = m, .out = between, .in_step = size, .out_step = size};
        first.outer = l->points[0];
        first.in_outer = l->points[1] * size;
        first.out_outer = l->tile[1] * size;
        first.inner = size / VL;
        first.in_inner = first.out_inner = VL;
        output_passes[g->kernel[1]][l->tile[1]](&first);
        m = between;
    }
    last.in_step = l->tile[1] * size;
    last.out_step = l->tile[1] * of_row;
    last.valid = l->tile[0];
    for (int64_t i = 0; i < l->tile[1]; i++) {
        last.in = m + i * size;
        last.out = sums + i * of_row;
        write_passes[g->kernel[0]][l->tile[0]](&last);
    }
}

/* The sums of a strip at the output times of one tile. */
static void tiled_multiply(const lanes_strip *s, int64_t out_t, int64_t of_row) {
    const lanes_call *c = s->call;
    const fc_grouped *p = c->params;
    const fc_geometry *g = &p->geometry;
    const fc_pixel_lanes *l = &p->lanes;
    int64_t depth = g->in_channels / g->groups, outputs = g->out_channels / g->groups;
    int64_t blocks = fc_ceil_div(outputs, l->channels);
    int64_t first_t = out_t * g->stride[0] - g->pad[0], left_out;
    int64_t terms = tiled_terms(s, first_t, &left_out), points = l->points[0] * l->points[1];
    int64_t all_terms = g->kernel[2] * depth;
    for (int i = 0; i < 2; i++) all_terms *= l->tile[i] > 1 ? 1 : g->kernel[i];
    int64_t down = fc_ceil_div(s->rows, l->tile[1]);
    int64_t vectors = fc_ceil_div((down - 1) * l->row_length + s->columns, VL);
    lanes_job job = {.offsets = s->offsets, .terms = terms, .low = -__builtin_inff()};
    float low = c->arrays->residual ? job.low : activation_floor(p->activation);
    const float *bias = c->arrays->bias[0];
    for (int64_t n = 0; n < s->groups * blocks; n++) {
        int64_t group = n / blocks, first = n % blocks * l->channels;
        int64_t channels = fc_min(l->channels, outputs - first);
        for (int64_t i = 0; i < channels; i++) {
            float value = bias ? bias[(s->group + group) * outputs + first + i] : 0.0f;
            vstore(s->tiled.bias + i * VL, vset(value));
        }
        const float *source = s->ring + group * depth * l->channel_stride;
        if (l->tile[0] > 1) {
            if (!first) tiled_input(s, group, first_t);
            source = s->tiled.v;
        }
        const float *weights =
            c->arrays->weights + (s->group * blocks + n) * points * all_terms * l->channels;
        for (int64_t v = 0; v < vectors; v += l->vectors) {
            int64_t nv = fc_min(l->vectors, vectors - v);
            job.sums = s->tiled.m;
            job.sums_stride = nv * VL;
            job.weights = weights + left_out * l->channels;
            for (int64_t i = 0; i < points; i++) {
                job.source = source + i / l->points[1] * l->frame + i % l->points[1] * l->length;
                job.source += v * VL;
                lanes_tiles[l->channels][nv](&job);
                job.sums += l->channels * nv * VL;
                job.weights += all_terms * l->channels;
            }
            float *sums = s->sums + (group * outputs + first) * l->sums_stride + v * VL;
            tiled_output(s, channels, nv, s->tiled.bias, low, sums, of_row);
        }
    }
}

#endif
