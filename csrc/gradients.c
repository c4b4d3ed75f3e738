/* Gradients: layouts, and the way to the kernels of an instruction set. */
#include "internal.h"

static int64_t points(const int64_t *size) { return size[0] * size[1] * size[2]; }

static int64_t x_size(const fc_geometry *g) {
    return fc_lines(g->batch * g->in_channels * points(g->in_size));
}

static int64_t y_size(const fc_geometry *g) {
    return fc_lines(g->batch * g->out_channels * points(g->out_size));
}

int64_t fc_gradient_copies(const fc_gradient *p) {
    return FC_LINE + (p->contiguous ? x_size(&p->geometry) + y_size(&p->geometry) : 0);
}

/* (N, channels, points) as (N, points, channels), cut from the workspace. */
static const float *last(const fc_gradient *p, intptr_t from, int64_t channels, int64_t size,
                         float **workspace, int threads) {
    if (!p->contiguous) return (const float *)from;
    float *copy = *workspace;
    int64_t batch = p->geometry.batch;
    *workspace += fc_lines(batch * channels * size);
    fc_set(p->isa)->transpose((const float *)from, size, copy, channels, batch, channels, size,
                              threads);
    return copy;
}

void fc_weight_gradient(const fc_gradient *p, intptr_t x, intptr_t gy, intptr_t gw,
                        intptr_t workspace, int threads) {
    const fc_geometry *g = &p->geometry;
    float *scratch = fc_line_up(workspace);
    const float *inputs = last(p, x, g->in_channels, points(g->in_size), &scratch, threads);
    const float *outputs = last(p, gy, g->out_channels, points(g->out_size), &scratch, threads);
    fc_set(p->isa)->weight_gradient(p, inputs, outputs, (float *)gw, scratch, threads);
}

void fc_input_gradient(const fc_gradient *p, intptr_t gy, intptr_t w, intptr_t gx,
                       intptr_t workspace, int threads) {
    const fc_geometry *g = &p->geometry;
    const fc_isa *isa = fc_set(p->isa);
    int64_t size = points(g->in_size);
    float *scratch = fc_line_up(workspace), *target = (float *)gx;
    const float *outputs = last(p, gy, g->out_channels, points(g->out_size), &scratch, threads);
    if (p->contiguous) {
        target = scratch;
        scratch += x_size(g);
    }
    isa->input_gradient(p, outputs, (const float *)w, target, scratch, threads);
    if (p->contiguous)
        isa->transpose(target, g->in_channels, (float *)gx, size, g->batch, size, g->in_channels,
                       threads);
}
