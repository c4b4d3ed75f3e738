/* Convolution as an implicit matrix product: rows are output pixels, columns output channels.

   A block of output pixels keeps a table of addresses, one per tap and pixel: where that tap's
   input channels begin, or zeros where the tap lies on padding. The micro-kernel broadcasts inputs
   through the table and streams packed weights, so every stride, dilation and padding is one
   kernel, and a 1 x 1 x 1 kernel is its case of one tap. */
#ifndef FC_DENSE_H
#define FC_DENSE_H

#include "gemm.h"

/* c (rows, columns) = activation(sum over taps of inputs under the table @ b + bias + residual)

   rows     [tap][rows_step]: addresses of inputs, `shift` floats before what is read
   zeros    the address that stands for padding: taps that all rows have there are left out
   pixel    floats from a row's inputs to those of the row behind it, which are asked for
   fetch    floats from c to memory that will be written soon, and from residual to what will be
            read, or 0
   stream   c is written past the caches
   the rest as in gemm_job, with one row of c behind the other */
typedef struct {
    const float *const *rows;
    int64_t rows_step, taps, shift, depth, pixel;
    const float *zeros, *b;
    float *c;
    int64_t c_stride, columns, fetch;
    const float *bias, *residual;
    int activation, stream;
} dense_job;

INLINE void dense_body(int rows, int nv, const dense_job *g) {
    if (g->fetch) {
        float *line = g->c + g->fetch;
        for (int i = 0; i < rows && !g->stream; i++, line += g->c_stride)
            UNROLL
            for (int j = 0; j < nv * VL; j += FC_LINE) prefetch_write(line + j);
        if (g->residual) { /* from far away: nobody has read it since it was written */
            const float *added = g->residual + g->fetch;
            for (int i = 0; i < rows; i++, added += g->c_stride)
                UNROLL
                for (int j = 0; j < nv * VL; j += FC_LINE) prefetch_far(added + j);
        }
    }
    vec sum[MAX_ROWS * 4];
    UNROLL
    for (int i = 0; i < rows * nv; i++) sum[i] = vzero();
    const float *b = g->b, *const *table = g->rows;
    int64_t depth = g->depth, tap_size = depth * nv * VL, ahead = g->taps * tap_size;
    for (int64_t s = 0; s < g->taps; s++, table += g->rows_step) {
        if (table[0] == g->zeros) {
            int inputs = 0;
            UNROLL
            for (int i = 1; i < rows; i++) inputs |= table[i] != g->zeros;
            if (!inputs) {
                b += tap_size;
                continue;
            }
        }
        const float *a[MAX_ROWS];
        UNROLL
        for (int i = 0; i < rows; i++) a[i] = table[i] + g->shift;
        const float *next = a[rows - 1] + g->pixel;
        _Pragma("GCC unroll 4") /* less is done between short sums */
        for (int64_t k = 0; k < depth; k++, b += nv * VL) {
            vec w[4];
            prefetch(next + k * FC_LINE);
            UNROLL
            for (int j = 0; j < nv; j++) w[j] = vload(b + j * VL);
            if (rows == gemm_block_rows[nv]) {
                UNROLL
                for (int j = 0; j < nv * VL; j += 16) prefetch_far(b + ahead + j);
            }
            UNROLL
            for (int i = 0; i < rows; i++) {
                vec value = vset(a[i][k]);
                UNROLL
                for (int j = 0; j < nv; j++)
                    sum[i * nv + j] = value * w[j] + sum[i * nv + j];
            }
        }
    }
    gemm_finish(rows, nv, sum, g->c, g->c_stride, g->columns, g->bias, g->residual, g->activation,
                g->stream);
}

typedef void (*dense_tile)(const dense_job *);
#define DENSE_TILE(rows, nv)                                                                   \
    static void dense_##rows##_##nv(const dense_job *g) { dense_body(rows, nv, g); }
EACH_TILE(DENSE_TILE)
#define DENSE_NAME(rows, nv) [nv][rows - 1] = dense_##rows##_##nv,
static const dense_tile dense_tiles[5][MAX_ROWS] = {EACH_TILE(DENSE_NAME)};

/* One call, and how its work is cut: items are pieces of the output pixels times shares of the
   panels.

   frames  where each input frame (N, T) begins, or NULL where they follow each other in x
   stream  y is written past the caches */
typedef struct {
    const fc_grouped *params;
    const fc_arrays *arrays;
    const float *const *frames;
    int64_t pixels, block, size, runs_per_piece, pieces_per_run, pieces, share;
    int stream;
} dense_call;

INLINE const float *input_frame(const fc_geometry *g, const float *x, const float *const *frames,
                                int64_t image, int64_t t) {
    int64_t frame = image * g->in_size[0] + t;
    return frames ? frames[frame] : x + frame * g->in_size[1] * g->in_size[2] * g->in_channels;
}

/* Input that an item copies, with the padding round it: packed (KT, packed_rows, packed_row), of
   output row `row` and some behind, from output column `column` on. */
typedef struct {
    float *packed;
    int64_t row, column;
} dense_copy;

/* Fill a copy for output frame `frame`; rows and frames that do not exist are left out. */
static void dense_pack(const dense_call *d, int64_t frame, const dense_copy *copy) {
    const fc_geometry *g = &d->params->geometry;
    const fc_pixel_rows *r = &d->params->rows;
    int64_t image = frame / g->out_size[0], out_t = frame % g->out_size[0], c = g->in_channels;
    int64_t row_size = g->in_size[2] * c, start = (copy->column * g->stride[2] - g->pad[2]) * c;
    int64_t left = fc_min(fc_max(-start, 0), r->packed_row);
    int64_t used = fc_max(fc_min(row_size - start, r->packed_row) - left, 0);
    int64_t top = copy->row * g->stride[1] - g->pad[1];
    for (int64_t i = 0; i < g->kernel[0]; i++) {
        int64_t t = out_t * g->stride[0] - g->pad[0] + i * g->dilation[0];
        if (t < 0 || t >= g->in_size[0]) continue;
        const float *from = input_frame(g, d->arrays->x, d->frames, image, t);
        for (int64_t j = fc_max(-top, 0); j < fc_min(r->packed_rows, g->in_size[1] - top); j++) {
            float *to = copy->packed + (i * r->packed_rows + j) * r->packed_row;
            memset(to, 0, 4 * left);
            if (used) memcpy(to + left, from + (top + j) * row_size + start + left, 4 * used);
            memset(to + left + used, 0, 4 * (r->packed_row - left - used));
        }
    }
}

/* Where the taps of some pixels of one output row begin: every (KT, KH, KW), or (KT, KH).

   copy   where the input is read from, or NULL for x itself
   entry  of column 0 at the first tap; those of columns start .. stop - 1 are written */
static void dense_row_addresses(const dense_call *d, int64_t row, int64_t start, int64_t stop,
                                const dense_copy *copy, const float *zeros,
                                const float **entry) {
    const fc_geometry *g = &d->params->geometry;
    const fc_pixel_rows *r = &d->params->rows;
    int64_t out_h = row % g->out_size[1], frame = row / g->out_size[1];
    int64_t image = frame / g->out_size[0], out_t = frame % g->out_size[0];
    int64_t w = g->in_size[2], step = g->stride[2], pixel = g->in_channels;
    int64_t columns = r->joined ? 1 : g->kernel[2];
    for (int64_t i = 0; i < g->kernel[0]; i++) {
        int64_t in_t = out_t * g->stride[0] - g->pad[0] + i * g->dilation[0];
        int there = in_t >= 0 && in_t < g->in_size[0];
        const float *from = there ? input_frame(g, d->arrays->x, d->frames, image, in_t) : NULL;
        for (int64_t j = 0; j < g->kernel[1]; j++) {
            int64_t in_h = out_h * g->stride[1] - g->pad[1] + j * g->dilation[1];
            int inside = there && in_h >= 0 && in_h < g->in_size[1];
            const float *line = inside ? from + in_h * w * pixel : zeros;
            if (inside && copy) {
                int64_t above = (out_h - copy->row) * g->stride[1] + j * g->dilation[1];
                line = copy->packed + (i * r->packed_rows + above) * r->packed_row;
            }
            for (int64_t q = 0; q < columns; q++, entry += d->block) {
                int64_t in_w = copy       ? -copy->column * step
                               : r->joined ? 0
                                           : q * g->dilation[2] - g->pad[2];
                int64_t low = start, high = inside ? stop : start;
                if (inside && !r->joined) { /* columns o with in_w + o * step in 0 .. w - 1 */
                    low = fc_min(fc_max((step - 1 - in_w) / step, start), stop);
                    high = fc_max(fc_min((w - 1 - in_w + step) / step, stop), low);
                }
                for (int64_t o = start; o < low; o++) entry[o] = zeros;
                for (int64_t o = low; o < high; o++) entry[o] = line + (in_w + o * step) * pixel;
                for (int64_t o = high; o < stop; o++) entry[o] = zeros;
            }
        }
    }
}

/* A block of output pixels, whose addresses are in the table, times panels first .. last - 1. */
static void dense_products(const dense_call *d, const float *const *table, const float *zeros,
                           int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
    const fc_grouped *p = d->params;
    const fc_pixel_rows *r = &p->rows;
    const fc_arrays *a = d->arrays;
    int64_t k = p->geometry.out_channels, group = k / p->geometry.groups;
    int64_t per_group = r->panels[0] + r->panels[1], terms = r->taps * r->depth;
    dense_job job = {.rows_step = d->block, .zeros = zeros, .c_stride = k};
    job.pixel = p->geometry.in_channels * p->geometry.stride[2];
    for (int64_t tap = 0; tap < r->taps; tap += r->chunk_taps)
        for (int64_t from = 0; from < r->depth; from += r->chunk_depth) {
            int is_first = !tap && !from;
            int is_last = tap + r->chunk_taps >= r->taps && from + r->chunk_depth >= r->depth;
            job.taps = fc_min(r->chunk_taps, r->taps - tap);
            job.depth = fc_min(r->chunk_depth, r->depth - from);
            job.activation = is_last ? p->activation : FC_NONE;
            job.stream = d->stream && is_first && is_last;
            for (int64_t n = first_panel; n < last_panel; n++) {
                int64_t g = n / per_group, i = n % per_group, narrow = i >= r->panels[0];
                int64_t nv = r->vectors[narrow];
                int64_t before = i * r->vectors[0]; /* vectors of this group in front */
                if (narrow) before = r->panels[0] * r->vectors[0] + (i - r->panels[0]) * nv;
                int64_t of_group = r->panels[0] * r->vectors[0] + r->panels[1] * r->vectors[1];
                int64_t channel = g * group + before * VL;
                job.columns = fc_min(group - before * VL, nv * VL);
                job.shift = g * r->depth + from;
                job.b = a->weights + (g * of_group + before) * VL * terms +
                        (tap * r->depth + from) * nv * VL;
                job.bias = is_first && a->bias[0] ? a->bias[0] + channel : NULL;
                for (int64_t q = begin; q < end;) {
                    int64_t stop = fc_min(end, (q / r->run + 1) * r->run);
                    int64_t tiles = fc_ceil_div(stop - q, gemm_block_rows[nv]);
                    for (; tiles; tiles--) {
                        int64_t rows = fc_ceil_div(stop - q, tiles);
                        job.fetch = is_first * 2 * rows * k;
                        job.rows = table + tap * d->block + q - begin;
                        job.c = a->y + q * k + channel;
                        job.residual = !is_first      ? job.c
                                       : a->residual ? a->residual + q * k + channel
                                                     : NULL;
                        dense_tiles[nv][rows - 1](&job);
                        q += rows;
                    }
                }
            }
        }
}

INLINE void dense_scale_pixel(const float *x, const float *scale, float *scaled, int64_t channels,
                              int activation) {
    int64_t j = 0;
    for (; j + VL <= channels; j += VL)
        vstore(scaled + j, vactivate(vload(x + j) * vload(scale + j), activation));
    if (j < channels) {
        int64_t n = channels - j;
        vec z = vload_n(x + j, n) * vload_n(scale + j, n);
        vstore_n(scaled + j, vactivate(z, activation), n);
    }
}

/* Replace the inputs of a block, of one tap, by activation(input * scale): scaled (pixels, C). */
static void dense_scale(const dense_call *d, const float **table, const float *zeros, int64_t begin,
                        int64_t end, float *scaled) {
    const fc_geometry *g = &d->params->geometry;
    int64_t channels = g->in_channels;
    int64_t of_image = g->out_size[0] * g->out_size[1] * g->out_size[2];
    int activation = d->params->input_activation;
    for (int64_t q = begin; q < end; q++, table++, scaled += channels) {
        if (*table == zeros) continue;
        const float *x = *table, *scale = d->arrays->bias[1] + q / of_image * channels;
        if (activation == FC_SILU) dense_scale_pixel(x, scale, scaled, channels, FC_SILU);
        else if (!activation) dense_scale_pixel(x, scale, scaled, channels, FC_NONE);
        else dense_scale_pixel(x, scale, scaled, channels, activation);
        *table = scaled;
    }
}

static void dense_item(void *context, int64_t item, int thread) {
    const dense_call *d = context;
    const fc_grouped *p = d->params;
    const fc_pixel_rows *r = &p->rows;
    const fc_geometry *g = &p->geometry;
    int64_t ow = g->out_size[2], panels = g->groups * (r->panels[0] + r->panels[1]);
    float *zeros = d->arrays->workspace + thread * p->each;
    const float **table = (const float **)(zeros + fc_lines(fc_max(g->in_channels, r->depth)));
    memset(zeros, 0, 4 * fc_max(g->in_channels, r->depth));

    int64_t piece = item % d->pieces, first_panel = item / d->pieces * d->share;
    int64_t last_panel = fc_min(first_panel + d->share, panels);
    int64_t first = piece * d->runs_per_piece * r->run, last = first + d->runs_per_piece * r->run;
    if (d->pieces_per_run > 1) {
        first = piece / d->pieces_per_run * r->run;
        last = first + r->run;
        first += piece % d->pieces_per_run * d->size;
        last = fc_min(last, first + d->size);
    }
    last = fc_min(last, d->pixels);
    dense_copy copy = {(float *)table + fc_lines(2 * r->taps * r->block),
                       first / ow % g->out_size[1], first % ow};
    if (r->packed_row) dense_pack(d, first / (ow * g->out_size[1]), &copy);
    for (int64_t begin = first; begin < last; begin += d->block) {
        int64_t end = fc_min(begin + d->block, last);
        for (int64_t q = begin; q < end;) {
            int64_t start = q % ow, stop = fc_min(start + end - q, ow);
            dense_row_addresses(d, q / ow, start, stop, r->packed_row ? &copy : NULL, zeros,
                                table + (q - begin - start));
            q += stop - start;
        }
        if (p->scaled) dense_scale(d, table, zeros, begin, end, copy.packed);
        dense_products(d, table, zeros, begin, end, first_panel, last_panel);
    }
    if (d->stream) vdrain();
}

static int dense_streams(const fc_grouped *p, const fc_arrays *a, int64_t pixels) {
    const fc_geometry *g = &p->geometry;
    int64_t x = g->batch * g->in_size[0] * g->in_size[1] * g->in_size[2] * g->in_channels;
    int64_t y = pixels * g->out_channels * (a->residual ? 2 : 1);
    /* Vectors shorter than a cache line would be written by halves, far apart in time. */
    return VL == FC_LINE && !activates_later(p->activation) &&
           past_caches(x + y, a->y, g->out_channels / g->groups);
}

/* Large items, but enough for all threads: first the panels are shared out, then blocks shrink. */
static void dense_run(const fc_grouped *p, const fc_arrays *a, const float *const *frames,
                      int threads) {
    const fc_pixel_rows *r = &p->rows;
    const fc_geometry *g = &p->geometry;
    int64_t pixels = g->batch * g->out_size[0] * g->out_size[1] * g->out_size[2];
    if (!pixels) return;
    int64_t panels = g->groups * (r->panels[0] + r->panels[1]), runs = pixels / r->run;
    int64_t wanted = threads > 1 ? 4 * threads : 1;
    dense_call d = {.params = p, .arrays = a, .frames = frames, .pixels = pixels};
    d.stream = dense_streams(p, a, pixels);
    d.block = r->block;
    if (!r->packed_row) {
        int64_t least = gemm_block_rows[r->vectors[0]];
        int64_t even = fc_ceil_div(pixels * panels, wanted * least) * least;
        d.block = fc_max(fc_min(d.block, even), least);
    }
    d.size = r->packed_row ? r->piece : d.block;
    d.pieces_per_run = fc_ceil_div(r->run, d.size);
    d.runs_per_piece = d.pieces_per_run > 1 || r->packed_row ? 1 : d.size / r->run;
    d.pieces = d.pieces_per_run > 1 ? runs * d.pieces_per_run : fc_ceil_div(runs, d.runs_per_piece);
    int64_t shares = fc_min(panels, fc_ceil_div(wanted, d.pieces));
    d.share = fc_ceil_div(panels, shares);
    fc_parallel_for(threads, d.pieces * fc_ceil_div(panels, d.share), dense_item, &d);
}

#endif
