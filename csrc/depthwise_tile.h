/* Depthwise tiles: outputs along H and W of one vector of channels, kept in registers.

   Every depthwise kernel adds to the bias in the order of the taps (T, then H, then W), so that all
   give the same bits. Taps outside the image are left out. */
#ifndef FC_DEPTHWISE_TILE_H
#define FC_DEPTHWISE_TILE_H

#include "activation.h"

/* One tile, for `vectors` vectors of channels; the last vector begins at last_channel, and repeats
   channels of the one before it.

   frames     the planes (H, W, C) that the taps read, `count` of them
   at         offset of the tile's first input in each plane, which may be outside of it
   rows, cols bit r is set if row r of the tile's input is inside, bit q for column q
   weights    of the first plane's taps; w_plane to the next one's, w_vector to the next vector's
   bias, residual  at the tile's channel, or NULL; residual has the strides of y
   next_x     inputs of a later tile, to ask for meanwhile; NULL for nothing
   sums, y_plane  of tiles that roll, see depthwise_roll.h: what frames wait with; to the next frame
   stream     y is written past the caches: every vector of it is a whole cache line */
typedef struct {
    const float *const *frames;
    int64_t count, at, x_row, x_col;
    uint64_t rows, cols;
    int64_t vectors, last_channel;
    const float *weights, *bias, *residual;
    int64_t w_plane, w_vector;
    float *y, *sums;
    int64_t y_row, y_col, y_plane;
    const float *next_x;
    int activation, stream;
} dw_tile;

/* The same vector in a register. A compiler that knows where it came from would read it from memory
   once for every use, and unaligned loads are what tiles can least afford. */
INLINE vec dw_held(vec v) {
#if VL >= 8
    __asm__("" : "+v"(v));
#endif
    return v;
}

/* Ask for the share of the current vector in a later tile: rows and columns that no tile between
   reads. Not for outputs: a core has few requests under way, and stores can wait. */
INLINE void tile_ahead(int rows, int cols, const dw_tile *g, int64_t channel) {
    if (!g->next_x) return;
    UNROLL
    for (int r = 0; r < rows; r++) {
        const float *p = g->next_x + channel + r * g->x_row;
        UNROLL
        for (int q = 0; q < cols; q++, p += g->x_col) prefetch(p);
    }
}

enum { MOST_TILE_OUTS = 21 };

/* The end of a tile but for activations that come later. */
INLINE void tile_write(int rows, int cols, int added, int stream, const dw_tile *g,
                       int64_t channel, const vec *sum) {
    vec low = vset(activation_floor(g->activation));
    UNROLL
    for (int i = 0; i < rows; i++) {
        int64_t at = channel + i * g->y_row;
        UNROLL
        for (int j = 0; j < cols; j++, at += g->y_col) {
            vec z = sum[i * cols + j];
            if (added) z += vload(g->residual + at);
            if (stream) vstream(g->y + at, vmax(z, low));
            else vstore(g->y + at, vmax(z, low));
        }
    }
}

/* The end of a tile: residual, activation, store. */
INLINE void tile_store(int rows, int cols, const dw_tile *g, int64_t channel, const vec *sum) {
    if (activates_later(g->activation)) { /* before the store: pixels seldom begin with a line */
        vec later[MOST_TILE_OUTS];
        UNROLL
        for (int i = 0; i < rows * cols; i++) {
            int64_t at = channel + i / cols * g->y_row + i % cols * g->y_col;
            later[i] = sum[i];
            if (g->residual) later[i] += vload(g->residual + at);
        }
        activate_sums(later, rows * cols, g->activation);
        tile_write(rows, cols, 0, 0, g, channel, later);
    } else if (g->residual) tile_write(rows, cols, 1, 0, g, channel, sum);
    else if (g->stream) tile_write(rows, cols, 0, 1, g, channel, sum);
    else tile_write(rows, cols, 0, 0, g, channel, sum);
}

/* Only the outermost kw / 2 columns on either side may be outside: few branches. */
INLINE int tile_outer(int q, int in_cols, int kw) {
    return q < kw / 2 || q >= in_cols - kw / 2;
}

enum { HELD_TAPS = 9 };

/* rows x cols outputs, kh x kw taps and strides sh, sw, all known when compiling. Where there are
   enough registers, the weights of a plane are held in them. */
INLINE void tile_body(int rows, int cols, int kh, int kw, int sh, int sw, int edge,
                      const dw_tile *g) {
    int in_rows = (rows - 1) * sh + kh, in_cols = (cols - 1) * sw + kw;
    int hold = VL == 16 && kh * kw <= HELD_TAPS;
    for (int64_t v = 0; v < g->vectors; v++) {
        int64_t channel = fc_min(v * VL, g->last_channel);
        vec sum[MOST_TILE_OUTS], start = g->bias ? vload(g->bias + channel) : vzero();
        UNROLL
        for (int i = 0; i < rows * cols; i++) sum[i] = start;
        tile_ahead(rows * sh, cols * sw, g, channel);
        const float *w = g->weights + v * g->w_vector;
        for (int64_t k = 0; k < g->count; k++, w += g->w_plane) {
            const float *row = g->frames[k] + g->at + channel;
            vec taps[HELD_TAPS];
            UNROLL
            for (int i = 0; i < kh * kw; i++)
                if (hold) taps[i] = dw_held(vload(w + i * VL));
            UNROLL
            for (int r = 0; r < in_rows; r++, row += g->x_row) {
                if (edge && !(g->rows >> r & 1)) continue;
                const float *p = row;
                UNROLL
                for (int q = 0; q < in_cols; q++, p += g->x_col) {
                    /* A branch: a masked load takes an arithmetic unit as well. */
                    if (edge && tile_outer(q, in_cols, kw) && !(g->cols >> q & 1)) continue;
                    vec x = dw_held(vload(p));
                    UNROLL
                    for (int i = 0; i < rows; i++)
                        UNROLL
                        for (int j = 0; j < cols; j++) {
                            int a = r - i * sh, b = q - j * sw, tap = a * kw + b;
                            if (a < 0 || a >= kh || b < 0 || b >= kw) continue;
                            sum[i * cols + j] += x * (hold ? taps[tap] : vload(w + tap * VL));
                        }
                }
                /* Without it, compilers load weights for several rows and run out of registers. */
                if (!hold) __asm__ volatile("" ::: "memory");
            }
        }
        tile_store(rows, cols, g, channel, sum);
    }
}

typedef void (*dw_kernel)(const dw_tile *);

/* Tiles of up to so many rows, of two widths, inner and at an edge. */
#if VL == 16
enum { TILE_ROWS = 3, WIDE = 7, NARROW = 5 };
#else
enum { TILE_ROWS = 2, WIDE = 5, NARROW = 4 };
#endif
static const int tile_widths[2] = {WIDE, NARROW};

#define TILE(name, rows, width, ...)                                                           \
    static void tile_##name##_##rows##_##width(const dw_tile *g) {                             \
        tile_body(rows, width, __VA_ARGS__, 0, g);                                             \
    }                                                                                          \
    static void tile_##name##_##rows##_##width##_edge(const dw_tile *g) {                      \
        tile_body(rows, width, __VA_ARGS__, 1, g);                                             \
    }
#define TILE_PAIR(name, rows, width)                                                           \
    {tile_##name##_##rows##_##width, tile_##name##_##rows##_##width##_edge}
#if VL == 16
#define TILES(name, width, ...)                                                                \
    TILE(name, 1, width, __VA_ARGS__)                                                          \
    TILE(name, 2, width, __VA_ARGS__) TILE(name, 3, width, __VA_ARGS__)
#define TILE_ENTRY(name, width)                                                                \
    {TILE_PAIR(name, 1, width), TILE_PAIR(name, 2, width), TILE_PAIR(name, 3, width)}
#else
#define TILES(name, width, ...) TILE(name, 1, width, __VA_ARGS__) TILE(name, 2, width, __VA_ARGS__)
#define TILE_ENTRY(name, width) {TILE_PAIR(name, 1, width), TILE_PAIR(name, 2, width)}
#endif
#define TILE_KIND(name, ...) TILES(name, WIDE, __VA_ARGS__) TILES(name, NARROW, __VA_ARGS__)
#define TILE_KIND_ENTRY(name, ...)                                                             \
    {{__VA_ARGS__}, {TILE_ENTRY(name, WIDE), TILE_ENTRY(name, NARROW)}},

/* Name, taps along H and W, strides along H and W: what video networks have. Each costs seconds of
   compiling; other taps are looped over. */
#define EACH_DEPTHWISE_TILE(X) X(3x3, 3, 3, 1, 1) X(3x3_2, 3, 3, 2, 2) X(5x5, 5, 5, 1, 1)

EACH_DEPTHWISE_TILE(TILE_KIND)

typedef struct {
    int shape[4]; /* taps and strides */
    dw_kernel kernels[2][TILE_ROWS][2];
} tile_kind;
static const tile_kind tile_kinds[] = {EACH_DEPTHWISE_TILE(TILE_KIND_ENTRY)};

/* The tiles that were compiled for a geometry, or NULL. */
static const tile_kind *tile_kind_of(const fc_geometry *g) {
    int64_t width = g->out_size[2], taps = g->kernel[2];
    int64_t behind = (width - 1) * g->stride[2] + taps - g->pad[2] - g->in_size[2];
    if (g->out_channels != g->in_channels || g->in_channels < VL || width < NARROW) return NULL;
    if (g->dilation[1] != 1 || g->dilation[2] != 1) return NULL;
    if (fc_max(g->pad[2], behind) > taps / 2) return NULL;
    int count = (int)(sizeof tile_kinds / sizeof *tile_kinds);
    for (int i = 0; i < count; i++) {
        const int *s = tile_kinds[i].shape;
        if (g->kernel[1] == s[0] && g->kernel[2] == s[1] && g->stride[1] == s[2] &&
            g->stride[2] == s[3])
            return &tile_kinds[i];
    }
    return NULL;
}

#endif
