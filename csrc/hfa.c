/* The fully separable block in one pass, row by row: nothing of its inner stages leaves the cache.

   An item is a tile of m output frames, or a strip of rows and a band of columns of it. New rows of
   the temporal stage come out of F(m, K) - transform, one matrix product per point, inverse - into
   a ring of as many rows as the depthwise window is high; the depthwise stage reads the ring; its
   rows are multiplied by the pointwise weights on the way to y. Padding belongs to the output of a
   stage, behind its activation: rows outside the image are left out, columns outside are zero in
   the ring. */
#include "hfa_depthwise.h"
#include "hfa_multiply.h"

typedef struct {
    const fc_hfa *p;
    const fc_arrays *a;
    int64_t tiles, strips, bands;
} hfa_call;

/* One item: output frames from `frame`, rows first to last, columns left to right; of the temporal
   stage the columns in_left to in_right, the column `origin` being the first of the ring. */
typedef struct {
    const fc_hfa *p;
    const fc_arrays *a;
    const float **sources;
    float *ring, *v, *m, *d, *spare;
    int64_t image, frame, first, last, left, right, origin, in_left, in_right;
} hfa_item;

/* Ask for the input of `pixels` from (row, column) on. */
static void ask_input(const hfa_item *t, hfa_queue *queue, int64_t row, int64_t column,
                      int64_t pixels) {
    const fc_hfa *p = t->p;
    const fc_geometry *g = &p->temporal;
    int64_t size = g->in_size[0], high = g->in_size[1], wide = g->in_size[2];
    int64_t start = t->frame * g->stride[0] - g->pad[0];
    int64_t reach = (p->time.outputs - 1) * g->stride[0] + g->kernel[0];
    for (int64_t f = fc_max(0, start); f < fc_min(size, start + reach); f++) {
        int64_t pixel = ((t->image * size + f) * high + row) * wide + column;
        queue_add(queue, t->a->x + pixel * g->in_channels, pixels * g->in_channels, 0);
    }
}

/* Ask for what `count` output rows of a frame of the tile read from the ring and write to y. */
static void ask_output(const hfa_item *t, hfa_queue *queue, int64_t frame, int64_t top,
                       int64_t count) {
    const fc_hfa *p = t->p;
    const fc_geometry *g = &p->pointwise;
    int64_t row_size = p->columns * p->channels, k = g->out_channels;
    int64_t low = top * p->depthwise.stride[1] - p->depthwise.pad[1];
    int64_t high = low + (count - 1) * p->depthwise.stride[1] + p->window[0];
    for (int64_t row = fc_max(0, low); row < fc_min(p->depthwise.in_size[1], high); row++)
        queue_add(queue, t->ring + (frame * p->slots + row % p->slots) * row_size, row_size, 0);
    int64_t line = (t->image * g->out_size[0] + t->frame + frame) * g->out_size[1] + top;
    for (int64_t r = 0; r < count; r++)
        queue_add(queue, t->a->y + ((line + r) * g->out_size[2] + t->left) * k,
                  (t->right - t->left) * k, 1);
}

/* Rows of the temporal stage into the ring: `pixels` from (row, column) on, which are contiguous
   in memory. */
static void hfa_temporal(const hfa_item *t, hfa_queue *queue, int64_t row, int64_t column,
                         int64_t pixels) {
    const fc_hfa *p = t->p;
    const fc_geometry *g = &p->temporal;
    int64_t channels = g->in_channels, stride = g->stride[0], size = g->in_size[0];
    int64_t frame_size = g->in_size[1] * g->in_size[2] * channels, count = pixels * channels;
    const float *x = t->a->x + t->image * size * frame_size;
    int64_t place = (row * g->in_size[2] + column) * channels;
    int64_t start = t->frame * stride - g->pad[0]; /* of the first tap */
    int direct = p->time.outputs == 1;
    int64_t points = direct ? 1 : p->time.alpha, segments = p->time.phases, first_tap = 0;
    int64_t weights = segments; /* per point and panel */
    if (direct) {
        first_tap = fc_max(0, -start);
        weights = g->kernel[0];
        segments = fc_max(0, fc_min(weights, size - start) - first_tap);
        for (int64_t k = 0; k < segments; k++)
            t->sources[k] = x + (start + first_tap + k) * frame_size + place;
    } else {
        for (int64_t phase = 0; phase < segments; phase++) {
            /* Frame f of the phase is f * stride + at. */
            int64_t at = start + phase;
            int64_t low = at < 0 ? fc_ceil_div(-at, stride) : 0;
            int64_t high = at < size ? fc_ceil_div(size - at, stride) : 0;
            frames_in_job in = {.x = x + place,
                                .first = at * frame_size,
                                .frame_step = stride * frame_size,
                                .low = low,
                                .high = high,
                                .count = count,
                                .v = t->v + phase * p->chunk * channels,
                                .v_point = p->v_point};
            transform_frames(&p->time, &in);
        }
    }
    int nv = (int)p->vectors_t;
    int64_t width = nv * VL, depth = weights * channels * width;
    const float *u = t->a->weights + first_tap * channels * width;
    const float *bias = t->a->bias[0];
    int64_t panels = fc_ceil_div(g->out_channels, width);
    queue_share(queue, panels * points * row_blocks(nv, pixels));
    for (int64_t panel = 0; panel < panels; panel++) {
        for (int64_t point = 0; point < points; point++, u += depth) {
            if (!direct)
                for (int64_t s = 0; s < segments; s++)
                    t->sources[s] = t->v + point * p->v_point + s * p->chunk * channels;
            gemm_job job = {.a = t->sources,
                            .a_stride = channels,
                            .segments = segments,
                            .depth = channels,
                            .b = u,
                            .c = t->m + point * p->m_point,
                            .c_stride = width,
                            .columns = width};
            hfa_multiply(&job, nv, pixels, queue);
        }
        int64_t at = panel * width, frame_step = p->slots * p->columns * p->channels;
        frames_out_job out = {.m = t->m,
                              .m_point = p->m_point,
                              .m_pixel = width,
                              .vectors = fc_min(nv, (p->channels - at) / VL),
                              .channels = g->out_channels - at,
                              .bias = bias ? bias + at : NULL,
                              .low = activation_floor(p->activation[0]),
                              .frame_step = frame_step,
                              .z_pixel = p->channels};
        for (int64_t done = 0, r = row, c = column; done < pixels; r++, c = t->in_left) {
            out.pixels = fc_min(pixels - done, t->in_right - c);
            out.z = t->ring + (r % p->slots * p->columns + c - t->origin) * p->channels + at;
            inverse_frames(&p->time, &out);
            if (activates_later(p->activation[0]))
                for (int64_t f = 0; f < p->time.outputs; f++)
                    activate_rows(out.z + f * frame_step, p->channels, out.pixels,
                                  out.vectors * VL, p->activation[0]);
            out.m += out.pixels * width;
            done += out.pixels;
        }
    }
}

/* Rows `from` to `to` of the temporal stage into the ring, for `count` output rows from `top`. */
static void hfa_fill(const hfa_item *t, int64_t from, int64_t to, int64_t top, int64_t count) {
    const fc_hfa *p = t->p;
    int64_t width = t->in_right - t->in_left, step = p->temporal.in_size[2];
    int64_t span = width == step ? (to - from) * step : width;
    for (int64_t row = from; row < to; row += span == width ? 1 : to - from)
        for (int64_t i = 0; i < span; i += p->chunk) {
            hfa_queue queue = {.count = 0};
            int64_t pixels = fc_min(p->chunk, span - i), left = span - i - pixels;
            if (left)
                ask_input(t, &queue, row, t->in_left + i + pixels, fc_min(p->chunk, left));
            else if (span == width && row + 1 < to)
                ask_input(t, &queue, row + 1, t->in_left, fc_min(p->chunk, span));
            else
                ask_output(t, &queue, 0, top, count);
            hfa_temporal(t, &queue, row + i / step, t->in_left + i % step, pixels);
        }
}

/* The depthwise stage of `count` rows of one frame: d (rows, columns, channels). */
static void hfa_direct(const hfa_item *t, int64_t frame, int64_t top, int64_t count) {
    const fc_hfa *p = t->p;
    const fc_geometry *g = &p->depthwise;
    int64_t row_size = p->columns * p->channels, wide = t->right - t->left;
    const float *ring = t->ring + frame * p->slots * row_size;
    const float *weights = t->a->weights + p->depthwise_at;
    window_job job = {.row_size = row_size,
                      .slots = p->slots,
                      .taps_wide = g->kernel[2],
                      .step = g->stride[2] * p->channels,
                      .channels = p->channels,
                      .valid = g->out_channels,
                      .bias = t->a->bias[1],
                      .low = activation_floor(p->activation[1])};
    /* Row after row of a tile, as neighbours read the same. */
    for (int64_t c = 0; c < wide; c += p->tile)
        for (int64_t r = 0; r < count; r++) {
            int64_t start = (top + r) * g->stride[1] - g->pad[1];
            int64_t first = fc_min(fc_max(0, -start), g->kernel[1]);
            int64_t last = fc_min(g->kernel[1], g->in_size[1] - start);
            job.ring = ring + c * job.step;
            job.slot = fc_max(0, start + first) % p->slots;
            job.taps_high = last - first;
            job.weights = weights + first * g->kernel[2] * p->channels;
            job.out = t->d + (r * wide + c) * p->channels;
            job.count = wide - c;
            depthwise_tile(&job, p->tile, g->stride[2]);
        }
}

static void hfa_fast(const hfa_item *t, int64_t frame, int64_t top, int64_t count) {
    const fc_hfa *p = t->p;
    const fc_geometry *g = &p->depthwise;
    const float *bias = t->a->bias[1];
    int64_t wide = t->right - t->left, m1 = p->high.outputs, m2 = p->wide.outputs;
    const float *ring = t->ring + frame * p->slots * p->columns * p->channels;
    vec low = vset(activation_floor(p->activation[1]));
    for (int64_t r = 0; r < count; r += m1)
        for (int64_t c = 0; c < wide; c += m2)
            for (int64_t j = 0; j < p->channels; j += VL) {
                fast_tile tile = {
                    .high = &p->high,
                    .wide = &p->wide,
                    .stride_high = g->stride[1],
                    .stride_wide = g->stride[2],
                    .channels = p->channels,
                    .ring = ring + c * g->stride[2] * p->channels + j,
                    .row_size = p->columns * p->channels,
                    .slots = p->slots,
                    .first_row = (top + r) * g->stride[1] - g->pad[1],
                    .height = g->in_size[1],
                    .weights = t->a->weights + p->depthwise_at + j,
                    .spare = t->spare};
                const float *sums = depthwise_fast_tile(&tile);
                vec shift = bias ? vload_n(bias + j, vcount(g->out_channels, j)) : vzero();
                for (int64_t y = 0; y < fc_min(m1, count - r); y++)
                    for (int64_t x = 0; x < fc_min(m2, wide - c); x++)
                        vstore(t->d + ((r + y) * wide + c + x) * p->channels + j,
                               vmax(vload(sums + (y * m2 + x) * VL) + shift, low));
            }
}

/* `pixels` of d times the pointwise weights, to y from (row, column) of an output frame on. */
static void hfa_pointwise(const hfa_item *t, hfa_queue *queue, const float *d, int64_t frame,
                          int64_t row, int64_t column, int64_t pixels) {
    const fc_hfa *p = t->p;
    const fc_geometry *g = &p->pointwise;
    const fc_arrays *a = t->a;
    int nv = (int)p->vectors_p;
    int64_t width = nv * VL, k = g->out_channels;
    int64_t pixel = ((t->image * g->out_size[0] + frame) * g->out_size[1] + row) * g->out_size[2];
    const float *u = a->weights + p->pointwise_at;
    for (int64_t at = 0; at < k; at += width, u += g->in_channels * width) {
        int64_t place = (pixel + column) * k + at;
        gemm_job job = {.a = &d,
                        .a_stride = p->channels,
                        .segments = 1,
                        .depth = g->in_channels,
                        .b = u,
                        .c = a->y + place,
                        .c_stride = k,
                        .columns = fc_min(width, k - at),
                        .bias = a->bias[2] ? a->bias[2] + at : NULL,
                        .residual = a->residual ? a->residual + place : NULL,
                        .activation = p->activation[2]};
        hfa_multiply(&job, nv, pixels, queue);
    }
}

/* Rows `top` on of all frames of the tile, whose window is in the ring; `next` is the first row of
   the temporal stage that is not. */
static void hfa_output(const hfa_item *t, int64_t top, int64_t count, int64_t next) {
    const fc_hfa *p = t->p;
    const fc_geometry *g = &p->pointwise;
    int64_t frames = fc_min(p->time.outputs, g->out_size[0] - t->frame);
    int64_t wide = t->right - t->left, left = t->in_right - t->in_left;
    int merged = wide == g->out_size[2], nv = (int)p->vectors_p;
    int64_t rows = merged ? count : 1; /* multiplied together */
    int64_t blocks = fc_ceil_div(g->out_channels, nv * VL) * row_blocks(nv, rows * wide);
    for (int64_t f = 0; f < frames; f++) {
        hfa_queue queue = {.count = 0};
        if (f + 1 < frames)
            ask_output(t, &queue, f + 1, top, count);
        else if (top + count < t->last && next < p->depthwise.in_size[1])
            ask_input(t, &queue, next, t->in_left, fc_min(p->chunk, left));
        queue_share(&queue, blocks * fc_ceil_div(count, rows));
        if (p->fast)
            hfa_fast(t, f, top, count);
        else
            hfa_direct(t, f, top, count);
        if (activates_later(p->activation[1]))
            activate_rows(t->d, p->channels, count * wide, p->channels, p->activation[1]);
        for (int64_t r = 0; r < count; r += rows)
            hfa_pointwise(t, &queue, t->d + r * wide * p->channels, t->frame + f, top + r, t->left,
                          rows * wide);
    }
}

/* Zeros into the ring's columns outside the image. */
static void hfa_clear(const hfa_item *t) {
    const fc_hfa *p = t->p;
    int64_t before = fc_max(0, fc_min(t->in_left - t->origin, p->columns));
    int64_t inside = t->in_right - t->in_left, behind = p->columns - before - inside;
    for (int64_t row = 0; row < p->time.outputs * p->slots; row++) {
        float *z = t->ring + row * p->columns * p->channels;
        memset(z, 0, (size_t)(before * p->channels) * sizeof *z);
        memset(z + (before + inside) * p->channels, 0, (size_t)(behind * p->channels) * sizeof *z);
    }
}

/* Rows per strip: whole depthwise tiles, so that results do not depend on the number of strips. */
INLINE int64_t strip_rows(const fc_hfa *p, int64_t strips) {
    int64_t m = p->high.outputs;
    return fc_ceil_div(fc_ceil_div(p->pointwise.out_size[1], strips), m) * m;
}

static void hfa_one(void *context, int64_t item, int thread) {
    const hfa_call *call = context;
    const fc_hfa *p = call->p;
    const fc_geometry *g = &p->depthwise;
    int64_t height = g->in_size[1], m1 = p->high.outputs, m2 = p->wide.outputs;
    int64_t each = strip_rows(p, call->strips);
    float *mine = call->a->workspace + thread * p->each;
    hfa_item t = {.p = p,
                  .a = call->a,
                  .sources = (const float **)(mine + p->tables),
                  .ring = mine + p->ring,
                  .v = mine + p->v,
                  .m = mine + p->m,
                  .d = mine + p->d,
                  .spare = mine + p->spare};
    t.left = item % call->bands * p->band;
    item /= call->bands;
    t.first = item % call->strips * each;
    item /= call->strips;
    t.frame = item % call->tiles * p->time.outputs;
    t.image = item / call->tiles;
    t.right = fc_min(t.left + p->band, g->out_size[2]);
    t.last = fc_min(t.first + each, g->out_size[1]);
    t.origin = t.left * g->stride[2] - g->pad[2];
    t.in_left = 0;
    t.in_right = g->in_size[2];
    if (call->bands > 1) {
        int64_t tiles = fc_ceil_div(t.right - t.left, m2);
        int64_t end = t.origin + (tiles - 1) * m2 * g->stride[2] + p->window[1];
        t.in_right = fc_max(0, fc_min(t.in_right, end));
        t.in_left = fc_min(fc_max(0, t.origin), t.in_right);
    }
    hfa_clear(&t);
    int64_t done = 0;
    for (int64_t top = t.first; top < t.last; top += p->rows) {
        int64_t count = fc_min(p->rows, t.last - top), tiles = fc_ceil_div(count, m1);
        int64_t low = top * g->stride[1] - g->pad[1];
        int64_t high = low + (tiles - 1) * m1 * g->stride[1] + p->window[0];
        done = fc_max(done, low);
        high = fc_min(high, height);
        if (done < high && t.in_left < t.in_right) hfa_fill(&t, done, high, top, count);
        done = fc_max(done, high);
        hfa_output(&t, top, count, done);
    }
}

/* As many strips as make the busiest thread finish first: each adds rows of the temporal stage. */
static int64_t hfa_strips(const fc_hfa *p, int64_t items, int threads) {
    const fc_geometry *g = &p->depthwise;
    int64_t best = 1;
    double least = 0;
    for (int64_t strips = 1; strips <= fc_min(g->out_size[1], 2 * threads); strips++) {
        int64_t rows = strip_rows(p, strips);
        double in = (double)((rows - 1) * g->stride[1] + p->window[0]);
        double cost = in * p->row_cost[0] + (double)rows * p->row_cost[1];
        cost *= (double)fc_ceil_div(items * strips, threads);
        if (strips == 1 || cost < least) {
            best = strips;
            least = cost;
        }
    }
    return best;
}

static void hfa_run(const void *params, const fc_arrays *a) {
    const fc_hfa *p = params;
    hfa_call call = {.p = p, .a = a};
    call.tiles = fc_ceil_div(p->pointwise.out_size[0], p->time.outputs);
    call.bands = fc_ceil_div(p->pointwise.out_size[2], p->band);
    int64_t items = p->temporal.batch * call.tiles * call.bands;
    call.strips = hfa_strips(p, items, a->threads);
    fc_parallel_for(a->threads, items * call.strips, hfa_one, &call);
}
