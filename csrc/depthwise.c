/* Depthwise convolution: along one axis by lines, otherwise by tiles of outputs. */
#include "depthwise_lines.h"
#include "depthwise_loops.h"
#include "depthwise_roll.h"
#include "depthwise_tile.h"

enum {
    DW_SERIAL = 1 << 18,        /* multiplications below which starting threads would not pay */
    DW_NEAR_VECTORS = 64 / VL,  /* of channels in a region: rows, and their weights, stay in L1 */
    DW_ROLL_VECTORS = 128 / VL, /* the same where regions roll, as they read one plane at a time */
    DW_NEAR_BYTES = 40 << 10,   /* of input that a region reads for an output frame: stays in L1 */
    DW_FAR_BYTES = 16 << 20,    /* of x and y: some of it is in memory, which answers late */
    DW_FAR_ROWS = 2             /* of a region then: what it asks for stays in L1 as well */
};

static int64_t dw_vectors(const fc_geometry *g) { return fc_ceil_div(g->out_channels, VL); }

/* First output channel of a vector: the last one ends with the channels, and repeats some of the
   one before it. */
static int64_t dw_channel(const fc_geometry *g, int64_t vector) {
    return fc_max(0, fc_min(vector * VL, g->out_channels - VL));
}

/* Bits for the `count` positions from `first` on: set inside 0..size. */
static uint64_t dw_inside(int64_t first, int64_t count, int64_t size) {
    int64_t from = fc_max(0, fc_min(count, -first)), to = fc_max(from, fc_min(count, size - first));
    return (((uint64_t)1 << to) - 1) & ~(((uint64_t)1 << from) - 1);
}

/* An item is a strip of output rows through a range of frames, for a group of vectors.

   With taps along T a strip is cut into regions of one tile, each of which goes through the frames:
   what KT frames hold for it stays in L1, so that every frame is read from further away once.
   Threads share no row, as neighbouring pixels may share a cache line; nor a channel: the last
   vector is in the group of the one that it overlaps.

   frames   address of every input frame, NULL where frames follow one another from x on
   kind     compiled tiles, or NULL
   lane_of  per vector, which input lane each output lane reads; NULL with multiplier 1
   high, wide     outputs of a region along H and W
   strips, groups, chunks   of rows, of vectors, of frames
   parts    groups that an item goes through one after another, region by region
   through  regions go through the frames; rolled: by dw_rolled
   ahead    ask for what later tiles read, and write through the frames
   stream   write past the caches */
typedef struct {
    const fc_depthwise *d;
    const fc_arrays *a;
    const float *const *frames;
    const tile_kind *kind;
    const vec_int *lane_of;
    int64_t cols, high, wide, strips, groups, parts, chunks;
    int width, through, rolled, ahead, stream;
} dw_job;

typedef struct {
    int64_t image, top, bottom, left, right, vector, last_vector;
} dw_region;

static const float *dw_plane(const dw_job *j, int64_t image, int64_t frame) {
    const fc_geometry *g = &j->d->geometry;
    int64_t index = image * g->in_size[0] + frame;
    if (j->frames) return j->frames[index];
    return j->a->x + index * g->in_size[1] * g->in_size[2] * g->in_channels;
}

/* The planes that output frame t of an image reads, and the first tap that reads one. */
static int64_t dw_planes(const dw_job *j, int64_t image, int64_t t, const float **planes,
                         int64_t *first) {
    const fc_geometry *g = &j->d->geometry;
    int64_t start = t * g->stride[0] - g->pad[0], step = g->dilation[0], time = g->in_size[0];
    int64_t count = 0;
    *first = start < 0 ? fc_ceil_div(-start, step) : 0;
    for (int64_t k = *first; k < g->kernel[0] && start + k * step < time; k++)
        planes[count++] = dw_plane(j, image, start + k * step);
    return count;
}

/* The tiles of a row in a region by kernels for the inside and for edges; next: what to ask for
   meanwhile, at channel 0 of the first column, or NULL. */
static void dw_compiled(const dw_job *j, dw_tile *tile, const dw_region *r, int64_t rows,
                        int64_t top, int64_t first_tap, int64_t out_row, const float *next,
                        const dw_kernel *kernels) {
    const fc_geometry *g = &j->d->geometry;
    const fc_arrays *a = j->a;
    int64_t c = g->in_channels, out_width = g->out_size[2], taps = g->kernel[1] * g->kernel[2];
    int64_t in_rows = (rows - 1) * g->stride[1] + g->kernel[1];
    int64_t in_cols = (j->cols - 1) * g->stride[2] + g->kernel[2];
    int64_t channel = dw_channel(g, r->vector);
    uint64_t all_rows = dw_inside(0, in_rows, in_rows), all_cols = dw_inside(0, in_cols, in_cols);
    tile->rows = dw_inside(top, in_rows, g->in_size[1]);
    tile->vectors = r->last_vector - r->vector;
    tile->last_channel = c - VL - channel;
    tile->w_plane = taps * VL;
    tile->w_vector = g->kernel[0] * tile->w_plane;
    tile->weights = a->weights + (r->vector * g->kernel[0] + first_tap) * taps * VL;
    tile->bias = a->bias[0] ? a->bias[0] + channel : NULL;
    for (int64_t column = r->left; column < r->right; column += j->cols) {
        /* The last tile overlaps the one before it. */
        int64_t first = fc_min(column, out_width - j->cols);
        int64_t left = first * g->stride[2] - g->pad[2];
        int64_t at = (out_row * out_width + first) * c + channel;
        tile->cols = dw_inside(left, in_cols, g->in_size[2]);
        tile->at = (top * g->in_size[2] + left) * c + channel;
        tile->y = a->y + at;
        tile->residual = a->residual ? a->residual + at : NULL;
        tile->next_x = next ? next + first * g->stride[2] * c + channel : NULL;
        int edge = tile->rows != all_rows || tile->cols != all_cols;
        kernels[edge](tile);
    }
}

/* The tiles of a row in a region, their taps counted at run time. */
static void dw_looped(const dw_job *j, dw_tile *tile, const dw_region *r, int64_t top,
                      int64_t first_tap, int64_t out_row) {
    const fc_geometry *g = &j->d->geometry;
    const fc_arrays *a = j->a;
    int64_t multiplier = g->out_channels / g->in_channels, taps = g->kernel[1] * g->kernel[2];
    for (int64_t column = r->left; column < r->right; column += j->cols)
        for (int64_t vector = r->vector; vector < r->last_vector; vector++) {
            int64_t channel = dw_channel(g, vector), lanes = vcount(g->out_channels, channel);
            int64_t at = (out_row * g->out_size[2] + column) * g->out_channels + channel;
            int64_t in_channel = channel / multiplier;
            dw_loops l = {.geometry = g, .out_cols = fc_min(j->cols, g->out_size[2] - column),
                          .lanes_in = (channel + lanes - 1) / multiplier - in_channel + 1,
                          .lanes_out = lanes, .top = top,
                          .left = column * g->stride[2] - g->pad[2],
                          .lane_of = j->lane_of ? j->lane_of + vector : NULL};
            tile->at = (top * g->in_size[2] + l.left) * g->in_channels + in_channel;
            tile->weights = a->weights + (vector * g->kernel[0] + first_tap) * taps * VL;
            tile->bias = a->bias[0] ? a->bias[0] + channel : NULL;
            tile->y = a->y + at;
            tile->residual = a->residual ? a->residual + at : NULL;
            loop_tile(tile, &l);
        }
}

/* Where later tiles read what none before them did, the first column of a row of tiles: through the
   frames, in the next one; else in the rows below. NULL where memory ends, or is near. */
static const float *dw_next(const dw_job *j, const dw_region *r, const dw_tile *tile, int64_t t,
                            int64_t end, int64_t top, int64_t rows) {
    const fc_geometry *g = &j->d->geometry;
    if (!j->ahead || !tile->count) return NULL;
    int64_t height = g->in_size[1], row = top + g->kernel[1] - g->stride[1];
    int64_t column = g->kernel[2] - g->stride[2] - g->pad[2];
    int64_t newest = t * g->stride[0] - g->pad[0] + (g->kernel[0] - 1) * g->dilation[0];
    if (j->through) {
        newest += g->stride[0];
        if (t + 1 >= end || newest >= g->in_size[0]) return NULL;
    } else {
        row += rows * g->stride[1];
        if (row + rows * g->stride[1] > height) return NULL;
    }
    return j->a->x + ((r->image * g->in_size[0] + newest) * height + row) * tile->x_row +
           column * g->in_channels;
}

/* A region, frame by frame. */
static void dw_through(const dw_job *j, dw_tile *tile, const float **planes, const dw_region *r,
                       int64_t from, int64_t to) {
    const fc_geometry *g = &j->d->geometry;
    int64_t first_tap, rows;
    for (int64_t t = from; t < to; t++) {
        tile->count = dw_planes(j, r->image, t, planes, &first_tap);
        for (int64_t h = r->top; h < r->bottom; h += rows) {
            int64_t rest = r->bottom - h, top = h * g->stride[1] - g->pad[1];
            int64_t out_row = (r->image * g->out_size[0] + t) * g->out_size[1] + h;
            rows = rest >= TILE_ROWS && rest != TILE_ROWS + 1 ? TILE_ROWS : fc_min(rest, 2);
            if (j->kind) {
                const float *next = dw_next(j, r, tile, t, to, top, rows);
                dw_compiled(j, tile, r, rows, top, first_tap, out_row, next,
                            j->kind->kernels[j->width][rows - 1]);
            } else {
                rows = 1;
                dw_looped(j, tile, r, top, first_tap, out_row);
            }
        }
    }
}

/* A region of at most ROLL_ROWS rows and one tile's columns, plane by plane: each completes a
   frame. The last planes may be outside: they have no rows. */
static void dw_rolled(const dw_job *j, dw_tile *tile, const float **planes, const dw_region *r,
                      int64_t from, int64_t to) {
    const fc_geometry *g = &j->d->geometry;
    vec sums[ROLL_ROWS][DW_ROLL_VECTORS][ROLL_TAPS - 1][ROLL_COLS];
    const float *bias = j->a->bias[0];
    for (int64_t v = r->vector; v < r->last_vector; v++) {
        vec start = bias ? vload(bias + dw_channel(g, v)) : vzero();
        for (int i = 0; i < ROLL_ROWS * (ROLL_TAPS - 1) * ROLL_COLS; i++)
            sums[i % ROLL_ROWS][v - r->vector][i / ROLL_ROWS % 2][i / ROLL_ROWS / 2] = start;
    }
    tile->count = 1;
    for (int64_t p = fc_max(0, from - g->pad[0]); p < to + ROLL_TAPS - 1 - g->pad[0]; p++) {
        int64_t t = p + g->pad[0] - (ROLL_TAPS - 1);
        int outside = p >= g->in_size[0];
        planes[0] = dw_plane(j, r->image, outside ? 0 : p);
        const dw_kernel *kernels = roll_kernels[t < from][t + ROLL_TAPS > to];
        for (int64_t h = r->top; h < r->bottom; h++) {
            int64_t top = outside ? g->in_size[1] : h * g->stride[1] - g->pad[1];
            int64_t out_row = (r->image * g->out_size[0] + t) * g->out_size[1] + h;
            tile->sums = (float *)sums[h - r->top];
            const float *next = dw_next(j, r, tile, t, to, top, 1);
            dw_compiled(j, tile, r, 1, top, 0, out_row, next, kernels);
        }
    }
}

static void dw_item(void *context, int64_t item, int thread) {
    const dw_job *j = context;
    const fc_geometry *g = &j->d->geometry;
    int64_t chunk = item % j->chunks, strip = item / j->chunks % j->strips;
    int64_t group = item / (j->chunks * j->strips) % j->groups, vectors = dw_vectors(g);
    const float **planes = (const float **)(j->a->workspace + thread * fc_lines(2 * g->kernel[0]));
    dw_tile tile = {.frames = planes, .x_row = g->in_size[2] * g->in_channels,
                    .x_col = g->in_channels, .y_row = g->out_size[2] * g->out_channels,
                    .y_col = g->out_channels, .activation = j->d->activation, .stream = j->stream};
    if (j->through && !j->stream) tile.y_ahead = g->out_size[1] * tile.y_row;
    dw_region r = {.image = item / (j->chunks * j->strips * j->groups),
                   .top = dw_share(g->out_size[1], strip, j->strips),
                   .bottom = dw_share(g->out_size[1], strip + 1, j->strips)};
    int64_t from = dw_share(g->out_size[0], chunk, j->chunks);
    int64_t to = dw_share(g->out_size[0], chunk + 1, j->chunks);
    for (; r.left < g->out_size[2]; r.left += j->wide)
        for (int64_t part = group * j->parts; part < (group + 1) * j->parts; part++) {
            r.right = fc_min(g->out_size[2], r.left + j->wide);
            r.vector = dw_share(vectors, part, j->groups * j->parts);
            r.last_vector = dw_share(vectors, part + 1, j->groups * j->parts);
            (j->rolled ? dw_rolled : dw_through)(j, &tile, planes, &r, from, to);
        }
    if (j->stream) vdrain();
}

/* Regions, and items enough for the threads. */
static void dw_cut(dw_job *j, int threads) {
    const fc_geometry *g = &j->d->geometry;
    int64_t vectors = dw_vectors(g), height = g->out_size[1];
    int64_t frame = g->in_size[1] * g->in_size[2] * VL * (int64_t)sizeof(float);
    j->high = height;
    j->wide = g->out_size[2];
    int far = !j->frames && dw_floats(g) * (int64_t)sizeof(float) > DW_FAR_BYTES;
    j->ahead = far && j->kind && (j->through || g->kernel[0] == 1);
    int64_t deep = fc_min(vectors, j->rolled ? DW_ROLL_VECTORS : DW_NEAR_VECTORS);
    if (far && !j->through) deep = vectors;
    if (j->through && (j->rolled || frame * g->kernel[0] * deep > DW_NEAR_BYTES)) {
        j->high = j->rolled ? ROLL_ROWS : far ? DW_FAR_ROWS : TILE_ROWS;
        j->wide = j->cols;
    }
    j->groups = far ? 1 : fc_ceil_div(vectors, deep);
    j->parts = far ? fc_ceil_div(vectors, deep) : 1;
    int64_t wanted = threads > 1 ? DW_ITEMS * threads : 1;
    int64_t have = fc_max(1, g->batch * j->groups * fc_ceil_div(height, j->high));
    j->chunks = have < wanted ? fc_min(g->out_size[0], fc_ceil_div(wanted, have)) : 1;
    have *= j->chunks;
    if (have < wanted && !j->through) {
        int64_t strips = fc_min(fc_ceil_div(height, TILE_ROWS), fc_ceil_div(wanted, have));
        j->high = fc_ceil_div(height, strips);
    }
    j->strips = fc_ceil_div(height, j->high);
}

static void dw_tiles(const fc_depthwise *d, const fc_arrays *a, const float *const *frames,
                     int threads) {
    const fc_geometry *g = &d->geometry;
    int64_t taps = g->kernel[0] * g->kernel[1] * g->kernel[2];
    dw_job j = {.d = d, .a = a, .frames = frames, .cols = LOOP_COLS,
                .stream = past_caches(dw_floats(g), a->y, g->out_channels)};
    j.kind = d->looped ? NULL : tile_kind_of(g);
    if (g->out_channels != g->in_channels)
        j.lane_of = (const vec_int *)(a->weights + dw_vectors(g) * taps * VL);
    if (j.kind) { /* least outputs in tiles, one more for the start of each */
        int64_t wide = fc_ceil_div(g->out_size[2], WIDE) * (WIDE + 1);
        int64_t narrow = fc_ceil_div(g->out_size[2], NARROW) * (NARROW + 1);
        j.width = g->out_size[2] < WIDE || narrow < wide;
        j.cols = tile_widths[j.width];
    }
    j.through = j.kind && g->kernel[0] > 1 && g->out_size[0] > 1;
    j.rolled = j.through && rolls(g);
    if (j.rolled) j.cols = ROLL_COLS;
    dw_cut(&j, threads);
    fc_parallel_for(threads, g->batch * j.groups * j.strips * j.chunks, dw_item, &j);
}

/* The convolution of a clip, or of `frames` (N, T): where each of its frames is. */
static void depthwise_frames(const fc_depthwise *d, const fc_arrays *a,
                             const float *const *frames) {
    const fc_geometry *g = &d->geometry;
    int64_t taps = g->kernel[0] * g->kernel[1] * g->kernel[2];
    int64_t outs = g->batch * g->out_channels * g->out_size[0] * g->out_size[1] * g->out_size[2];
    int threads = outs * taps < fc_least_work(DW_SERIAL) ? 1 : a->threads;
    if (d->form == FC_DEPTHWISE_LINES) dw_lines_run(d, a, frames, threads);
    else dw_tiles(d, a, frames, threads);
}

static void depthwise_run(const void *params, const fc_arrays *a) {
    depthwise_frames(params, a, NULL);
}
