/* Depthwise convolution along one axis: memory is a stack of lines, and lanes run across pixels.

   Behind the convolved axis lie `inner` elements of which nothing but the channel matters, so that
   a vector takes any of them, whole. A block of outputs shares the lines that it reads. */
#ifndef FC_DEPTHWISE_LINES_H
#define FC_DEPTHWISE_LINES_H

#include "activation.h"

enum { DW_ITEMS = 4 }; /* for every thread, so that they end together */
enum { MOST_LINE_OUTS = 8, MOST_LINE_TAPS = 7, MOST_LINES = MOST_LINE_OUTS + MOST_LINE_TAPS - 1 };

/* A block: elements `first` to `last` of lines.

   x          the input lines that the outputs read in turn, zeros for one outside
   y_line     from one line of outputs to the next; residual has it too
   weights    (taps, channels + VL), and bias (channels + VL), the channels repeating
   stream     write past the caches */
typedef struct {
    const float *x[MOST_LINES];
    const float *weights, *bias, *residual;
    float *y;
    int64_t first, last, channels, y_line;
    int activation, stream;
} dw_lines;

/* The elements at i, n of them, whose channels begin at c. */
INLINE void line_vector(int taps, int outs, int whole, int added, int stream, const dw_lines *g,
                        const float *const *in, int64_t i, int64_t n, int64_t c) {
    int64_t row = g->channels + VL, y_line = g->y_line;
    vec w[MOST_LINE_TAPS], sum[MOST_LINE_OUTS], start = vload(g->bias + c);
    UNROLL
    for (int k = 0; k < taps; k++) w[k] = vload(g->weights + k * row + c);
    UNROLL
    for (int o = 0; o < outs; o++) sum[o] = start;
    UNROLL
    for (int s = 0; s < taps + outs - 1; s++) {
        vec v = whole ? vload(in[s] + i) : vload_n(in[s] + i, n);
        UNROLL
        for (int o = 0; o < outs; o++)
            if (s >= o && s - o < taps) sum[o] += v * w[s - o];
    }
    vec low = vset(activation_floor(g->activation));
    float *y = g->y + i;
    const float *residual = g->residual + i;
    UNROLL
    for (int o = 0; o < outs; o++, y += y_line, residual += y_line) {
        if (added) sum[o] += whole ? vload(residual) : vload_n(residual, n);
        if (stream) vstream(y, vmax(sum[o], low));
        else if (whole) vstore(y, vmax(sum[o], low));
        else vstore_n(y, vmax(sum[o], low), n);
    }
}

INLINE void line_loop(int taps, int outs, int added, int stream, const dw_lines *g) {
    int64_t channels = g->channels, turn = VL % channels, i = g->first, c = i % channels;
    int64_t last = g->last;
    const float *in[MOST_LINES];
    UNROLL
    for (int s = 0; s < taps + outs - 1; s++) in[s] = g->x[s];
    for (; i + VL <= last; i += VL) {
        line_vector(taps, outs, 1, added, stream, g, in, i, VL, c);
        c += turn;
        if (c >= channels) c -= channels;
    }
    if (i < last) line_vector(taps, outs, 0, added, 0, g, in, i, last - i, c);
}

INLINE void line_body(int taps, int outs, const dw_lines *g) {
    if (g->residual) line_loop(taps, outs, 1, 0, g);
    else if (g->stream) line_loop(taps, outs, 0, 1, g);
    else line_loop(taps, outs, 0, 0, g);
    if (activates_later(g->activation))
        activate_rows(g->y + g->first, g->y_line, outs, g->last - g->first, g->activation);
}

typedef void (*line_kernel)(const dw_lines *);

#define LINE_KERNEL(taps, outs)                                                                 \
    static void lines_##taps##_##outs(const dw_lines *g) { line_body(taps, outs, g); }
#define LINE_KERNELS(taps)                                                                      \
    LINE_KERNEL(taps, 1) LINE_KERNEL(taps, 2) LINE_KERNEL(taps, 4) LINE_KERNEL(taps, 8)
LINE_KERNELS(1) LINE_KERNELS(2) LINE_KERNELS(3) LINE_KERNELS(4) LINE_KERNELS(5) LINE_KERNELS(6)
LINE_KERNELS(7)
#define LINE_ENTRY(taps) {lines_##taps##_1, lines_##taps##_2, lines_##taps##_4, lines_##taps##_8}
/* By taps - 1, and by the logarithm of outputs. */
static const line_kernel line_kernels[MOST_LINE_TAPS][4] = {
    LINE_ENTRY(1), LINE_ENTRY(2), LINE_ENTRY(3), LINE_ENTRY(4),
    LINE_ENTRY(5), LINE_ENTRY(6), LINE_ENTRY(7)};

/* The index-th of nearly equal pieces begins here, and ends where the next one begins. */
static int64_t dw_share(int64_t size, int64_t index, int64_t pieces) {
    return size * index / pieces;
}

/* Floats of x and y. */
static int64_t dw_floats(const fc_geometry *g) {
    int64_t x = g->batch * g->in_channels * g->in_size[0] * g->in_size[1] * g->in_size[2];
    int64_t y = g->batch * g->out_channels * g->out_size[0] * g->out_size[1] * g->out_size[2];
    return x + y;
}

/* An item is a part of the axis, for a chunk of the elements behind it. `frame_images` of the images
   are one frame. */
typedef struct {
    const fc_depthwise *d;
    const fc_arrays *a;
    const float *const *frames;
    const float *bias;
    int64_t images, frame_images, lines, outs, inner, taps, step, pad, chunks, parts;
    int stream;
} dw_line_job;

/* The line of an image, zeros in its chunk for one outside. */
static const float *dw_line(const dw_line_job *j, int64_t image, int64_t line, int64_t first) {
    if (line < 0 || line >= j->lines)
        return j->a->weights + j->taps * (j->d->geometry.in_channels + VL) - first;
    if (j->frames && j->d->axis == 0) return j->frames[image * j->lines + line];
    const float *x = j->a->x;
    if (j->frames) { /* one to a stream */
        x = j->frames[image / j->frame_images];
        image %= j->frame_images;
    }
    return x + (image * j->lines + line) * j->inner;
}

/* Outputs of one residue modulo the dilation share lines: from..to of them in blocks. */
static void dw_line_blocks(const dw_line_job *j, dw_lines *block, int64_t image, int64_t phase,
                           int64_t from, int64_t to) {
    static const int outs_of[4] = {1, 2, 4, 8};
    const fc_arrays *a = j->a;
    for (int64_t o = from; o < to;) {
        int size = 3;
        while (outs_of[size] > to - o) size--;
        int64_t many = outs_of[size], t = phase + o * j->step;
        for (int64_t s = 0; s < many + j->taps - 1; s++)
            block->x[s] = dw_line(j, image, t - j->pad + s * j->step, block->first);
        int64_t at = (image * j->outs + t) * j->inner;
        block->y = a->y + at;
        block->residual = a->residual ? a->residual + at : NULL;
        line_kernels[j->taps - 1][size](block);
        o += many;
    }
}

static void dw_line_item(void *context, int64_t item, int thread) {
    (void)thread;
    const dw_line_job *j = context;
    const fc_geometry *g = &j->d->geometry;
    int64_t part = item % j->parts, chunk = item / j->parts % j->chunks;
    int64_t image = item / (j->parts * j->chunks);
    dw_lines block = {.weights = j->a->weights, .bias = j->bias, .channels = g->in_channels,
                      .first = chunk * FC_LINE_CHUNK, .y_line = j->inner * j->step,
                      .activation = j->d->activation, .stream = j->stream};
    block.last = fc_min(j->inner, block.first + FC_LINE_CHUNK);
    for (int64_t phase = 0; phase < fc_min(j->step, j->outs); phase++) {
        int64_t count = fc_ceil_div(j->outs - phase, j->step);
        dw_line_blocks(j, &block, image, phase, dw_share(count, part, j->parts),
                       dw_share(count, part + 1, j->parts));
    }
    if (j->stream) vdrain();
}

static void dw_lines_run(const fc_depthwise *d, const fc_arrays *a, const float *const *frames,
                          int threads) {
    const fc_geometry *g = &d->geometry;
    int axis = d->axis;
    dw_line_job j = {.d = d, .a = a, .frames = frames, .bias = a->workspace, .images = g->batch,
                     .lines = g->in_size[axis], .outs = g->out_size[axis],
                     .inner = g->in_channels, .taps = g->kernel[axis], .step = g->dilation[axis],
                     .pad = g->pad[axis], .frame_images = 1, .parts = 1};
    for (int i = 0; i < axis; i++) j.images *= g->in_size[i];
    for (int i = 1; i < axis; i++) j.frame_images *= g->in_size[i];
    for (int i = axis + 1; i < 3; i++) j.inner *= g->in_size[i];
    /* Activations that come later read y again. */
    j.stream = !activates_later(d->activation) && past_caches(dw_floats(g), a->y, j.inner);
    j.chunks = fc_ceil_div(j.inner, FC_LINE_CHUNK);
    int64_t items = j.images * j.chunks, wanted = threads > 1 ? DW_ITEMS * threads : 1;
    if (items < wanted)
        j.parts = fc_max(1, fc_min(j.outs / MOST_LINE_OUTS, fc_ceil_div(wanted, fc_max(1, items))));
    for (int64_t i = 0; i < g->in_channels + VL; i++)
        a->workspace[i] = a->bias[0] ? a->bias[0][i % g->in_channels] : 0.0f;
    fc_parallel_for(threads, items * j.parts, dw_line_item, &j);
}

#endif
