/* One tile of Winograd convolution in, one tile out: passes over its axes, some channels at a time.

   The lines of a tile between two passes are [vector][i0][i1][i2] in a buffer that stays in the
   first-level cache. Axes of one point take no pass, so there are one to three. */
#ifndef FC_WINOGRAD_TILES_H
#define FC_WINOGRAD_TILES_H

#include "winograd_lines.h"

/* The image of a tile and its place on each axis. */
typedef struct {
    int64_t image, at[3];
} tile_place;

INLINE tile_place place_of(const fc_winograd *p, int64_t tile) {
    tile_place place;
    int64_t per_image = 1;
    for (int a = 0; a < 3; a++) {
        const fc_winograd_axis *axis = &p->axis[a];
        place.at[a] = tile / axis->divisor % axis->tiles;
        per_image *= axis->tiles;
    }
    place.image = tile / per_image;
    return place;
}

/* Go `count` tiles on, not beyond the end of a row. */
INLINE void skip_places(const fc_winograd *p, tile_place *place, int64_t count) {
    place->at[p->order[0]] += count - 1;
    for (int k = 0; k < 3; k++) {
        int a = p->order[k];
        if (++place->at[a] < p->axis[a].tiles) return;
        place->at[a] = 0;
    }
    place->image++;
}

/* The inputs of a tile under one phase: those with low <= index < high on every axis are in x and
   reach outputs that are in y, the others are taken for zeros. `rest` is where x ends, beyond the
   tile or not; origin that of index 0. */
typedef struct {
    int64_t low[3], high[3], rest[3], step[3], origin;
    int empty;
} tile_window;

INLINE tile_window window_of(const fc_winograd *p, const tile_place *place, const int64_t *phase) {
    tile_window w = {.origin = place->image * p->in_image};
    for (int a = 0; a < 3; a++) {
        const fc_winograd_axis *axis = &p->axis[a];
        int64_t s = axis->stride, first = place->at[a] * axis->m * s + phase[a] - axis->pad;
        int64_t before = first < 0 ? -first : 0, after = fc_max(axis->in_size - first, 0);
        w.low[a] = fc_min(s == 1 ? before : fc_ceil_div(before, s), axis->alpha);
        w.rest[a] = s == 1 ? after : fc_ceil_div(after, s);
        int64_t outputs = fc_min(axis->out_size - place->at[a] * axis->m, axis->m);
        int64_t taps = fc_ceil_div(axis->kernel - phase[a], s); /* of r, the others being zeros */
        w.high[a] = fc_min(w.rest[a], outputs + axis->r - 1);
        w.step[a] = axis->in_step * s;
        w.origin += first * axis->in_step;
        w.empty |= w.low[a] >= fc_min(w.high[a], outputs + taps - 1);
    }
    return w;
}

INLINE int passes_of(const fc_winograd *p) {
    return 1 + (p->axis[1].alpha > 1) + (p->axis[0].alpha > 1);
}

INLINE line_pass pass_of(const line_passes table, const fc_winograd_axis *axis) {
    return table[axis->r][axis->m];
}

INLINE void clear_vectors(float *at, int64_t count) {
    for (int64_t i = 0; i < count; i++) vstore(at + i * VL, vzero());
}

/* The first pass, over axis 2, from x to `out`. An outer and an inner loop go over planes, rows,
   vectors of channels or tiles; steps are between their x and between their lines. */
typedef struct {
    const float *x;
    float *out;
    int64_t out_step, outer, in_outer, out_outer, inner, in_inner, out_inner;
} first_pass;

static void read_lines(const fc_winograd *p, const tile_window *w, int64_t n, const first_pass *f,
                       const float *zeros) {
    const fc_winograd_axis *axis = &p->axis[2];
    int ahead = p->order[0];
    if (n == VL && !w->low[2] && w->high[2] == axis->alpha) {
        line_job j = {.in = f->x, .in_step = w->step[2], .out = f->out, .out_step = f->out_step};
        j.outer = f->outer, j.in_outer = f->in_outer, j.out_outer = f->out_outer;
        j.inner = f->inner, j.in_inner = f->in_inner, j.out_inner = f->out_inner;
        /* The next tile begins m further along one axis; what it shares with this one is here. */
        if (ahead == 2) {
            j.next = axis->alpha * w->step[2];
            j.fresh = fc_max(fc_min(w->rest[2] - axis->alpha, axis->m), 0);
        }
        pass_of(read_passes, axis)(&j);
        return;
    }
    edge_job e = {.out = f->out, .out_step = f->out_step, .outer = f->outer, .inner = f->inner,
                  .out_outer = f->out_outer, .out_inner = f->out_inner, .lanes = n};
    for (int64_t k = 0; k < axis->alpha; k++) {
        int inside = k >= w->low[2] && k < w->high[2];
        e.in[k] = inside ? f->x + k * w->step[2] : zeros;
        e.in_outer[k] = inside ? f->in_outer : 0;
        e.in_inner[k] = inside ? f->in_inner : 0;
    }
    edge_passes[axis->r][axis->m](&e);
}

/* V = BT d of a tile: `vectors` vectors of channels, the last one with n valid lanes, to
   v + point * v_point. If tiles have one axis, of `count` tiles side by side. */
static void input_vectors(const fc_winograd *p, const float *x, const tile_window *w,
                          int64_t count, int64_t vectors, int64_t n, float *v, float *lines) {
    int64_t a0 = p->axis[0].alpha, a1 = p->axis[1].alpha, a2 = p->axis[2].alpha;
    int64_t area = a1 * a2, volume = a0 * area, passes = passes_of(p);
    const int64_t *low = w->low, *high = w->high;
    const float *zeros = lines + volume * p->at_once * VL;
    if (w->empty) {
        for (int64_t i = 0; i < volume; i++)
            for (int64_t tile = 0; tile < count; tile++)
                clear_vectors(v + i * p->v_point + tile * p->v_row, vectors);
        return;
    }
    first_pass f = {.out = v, .out_step = p->v_point, .outer = count};
    f.x = x + (w->origin + low[0] * w->step[0] + low[1] * w->step[1]);
    f.in_outer = w->step[p->order[0]], f.out_outer = p->v_row;
    f.in_inner = f.out_inner = VL;
    if (passes > 1) {
        f.out = lines + (low[0] * area + low[1] * a2) * VL, f.out_step = VL;
        f.inner = high[1] - low[1], f.in_inner = w->step[1], f.out_inner = a2 * VL;
        f.outer = high[0] - low[0], f.in_outer = w->step[0], f.out_outer = area * VL;
        if (passes == 2) f.in_outer = VL, f.out_outer = volume * VL;
    }
    for (int64_t k = 0, some, whole = n == VL ? vectors : vectors - 1; k < vectors; k += some) {
        some = passes == 3 || k == whole ? 1 : whole;
        if (passes == 1) f.inner = some;
        if (passes == 2) f.outer = some;
        read_lines(p, w, k < whole ? VL : n, &f, zeros);
        f.x += some * VL, f.out += some * (passes == 1 ? VL : volume * VL);
    }
    if (passes == 1) return;
    for (int64_t k = 0; k < vectors; k++)
        for (int64_t i0 = low[0]; i0 < high[0]; i0++) {
            float *plane = lines + (k * volume + i0 * area) * VL;
            clear_vectors(plane, low[1] * a2);
            clear_vectors(plane + high[1] * a2 * VL, (a1 - high[1]) * a2);
        }
    line_job h = {.in = lines, .out = v, .in_step = a2 * VL, .out_step = a2 * p->v_point};
    if (passes == 2) {
        h.outer = a2, h.in_outer = VL, h.out_outer = p->v_point;
        h.inner = vectors, h.in_inner = volume * VL, h.out_inner = VL;
        pass_of(input_passes, &p->axis[1])(&h);
        return;
    }
    h.out_step = a2 * VL;
    h.outer = high[0] - low[0], h.in_outer = h.out_outer = area * VL;
    h.inner = a2, h.in_inner = h.out_inner = VL;
    for (int64_t k = 0; k < vectors; k++) {
        float *planes = lines + k * volume * VL;
        clear_vectors(planes, low[0] * area);
        clear_vectors(planes + high[0] * area * VL, (a0 - high[0]) * area);
        h.in = h.out = planes + low[0] * area * VL;
        pass_of(input_passes, &p->axis[1])(&h);
    }
    line_job t = {.in = lines, .out = v, .in_step = area * VL, .out_step = area * p->v_point};
    t.outer = area, t.in_outer = VL, t.out_outer = p->v_point;
    t.inner = vectors, t.in_inner = volume * VL, t.out_inner = VL;
    pass_of(input_passes, &p->axis[0])(&t);
}

/* V of `count` tiles side by side for all phases and channels, v[point * v_point + phase * channels
   + channel]. Lanes behind the last channel become zeros; what follows there is written later.

   frames  NULL, or where the frames begin that the phases of axis 0 read, (images, phases): of a
           stream, whose column is one tile there */
static void input_tile(const fc_winograd *p, const float *x, const float *const *frames,
                       const tile_place *place, int64_t count, float *v, float *lines) {
    int64_t phase[3];
    for (phase[0] = 0; phase[0] < p->axis[0].phases; phase[0]++)
        for (phase[1] = 0; phase[1] < p->axis[1].phases; phase[1]++)
            for (phase[2] = 0; phase[2] < p->axis[2].phases; phase[2]++, v += p->channels) {
                tile_window w = window_of(p, place, phase);
                if (frames) {
                    x = frames[place->image * p->axis[0].phases + phase[0]];
                    w.origin -= place->image * p->in_image + phase[0] * p->axis[0].in_step;
                }
                for (int64_t c = 0; c < p->channels; c += p->at_once * VL) {
                    int64_t left = p->channels - c;
                    int64_t vectors = fc_min(p->at_once, fc_ceil_div(left, VL));
                    int64_t n = fc_min(left - (vectors - 1) * VL, VL);
                    input_vectors(p, x + c, &w, count, vectors, n, v + c, lines);
                }
            }
}

/* How many tiles from a place on, `most` at most, are the same but for a step along the axis where
   tile numbers run fastest: those of one axis, which is another, in a row without an edge. */
INLINE int64_t alike_from(const fc_winograd *p, const tile_place *place, int64_t most) {
    const fc_winograd_axis *fast = &p->axis[p->order[0]];
    if (passes_of(p) > 1 || fast->alpha > 1 || fast->stride > 1 || fast->pad > 0) return 1;
    int64_t inside = fc_min(fast->tiles, fast->in_size - fast->phases + 1);
    return fc_max(fc_min(most, inside - place->at[p->order[0]]), 1);
}

/* Where a tile of y is: of `size` valid outputs per axis, at y and residual. */
typedef struct {
    int64_t size[3], step[3], at;
} tile_target;

INLINE tile_target target_of(const fc_winograd *p, const tile_place *place) {
    tile_target t = {.at = place->image * p->out_image};
    for (int a = 0; a < 3; a++) {
        const fc_winograd_axis *axis = &p->axis[a];
        int64_t first = place->at[a] * axis->m;
        t.size[a] = fc_min(axis->m, axis->out_size - first);
        t.step[a] = axis->out_step;
        t.at += first * axis->out_step;
    }
    return t;
}

/* y of a tile from m[point * m_point]: `vectors` vectors of channels, the last one with n valid
   lanes. If tiles have one axis, of `count` tiles side by side. */
static void output_vectors(const fc_winograd *p, const tile_target *t, int64_t count,
                           const float *m, int64_t vectors, int64_t n, const float *bias,
                           const float *residual, float *y, float *lines) {
    int64_t a1 = p->axis[1].alpha, a2 = p->axis[2].alpha, area = a1 * a2;
    int64_t volume = p->axis[0].m * area, aside = p->axis[p->order[0]].out_step;
    int passes = passes_of(p);
    line_job j = {.in = m, .in_inner = VL, .out = lines, .out_inner = volume * VL};
    j.inner = vectors;
    if (passes == 3) {
        j.in_step = area * p->m_point, j.out_step = area * VL;
        j.outer = area, j.in_outer = p->m_point, j.out_outer = VL;
        pass_of(output_passes, &p->axis[0])(&j);
        j.in_step = j.out_step = a2 * VL;
        j.outer = t->size[0], j.in_outer = j.out_outer = area * VL;
        j.inner = a2, j.in_inner = j.out_inner = VL;
        for (int64_t k = 0; k < vectors; k++) {
            j.in = j.out = lines + k * volume * VL;
            pass_of(output_passes, &p->axis[1])(&j);
        }
    } else if (passes == 2) {
        j.in_step = a2 * p->m_point, j.out_step = a2 * VL;
        j.outer = a2, j.in_outer = p->m_point, j.out_outer = VL;
        pass_of(output_passes, &p->axis[1])(&j);
    }
    line_job w = {.in = lines, .in_step = VL, .in_outer = a2 * VL, .in_inner = volume * VL};
    w.out = y, w.out_step = t->step[2], w.out_outer = t->step[1], w.out_inner = VL;
    w.outer = t->size[1], w.inner = vectors;
    if (passes == 1) {
        w.in = m, w.in_step = p->m_point, w.in_inner = VL, w.in_outer = p->vectors * VL;
        w.outer = count, w.out_outer = aside;
    }
    w.bias = bias, w.bias_inner = VL, w.residual = residual;
    w.low = activation_floor(p->activation), w.lanes = n, w.valid = t->size[2];
    for (int64_t i0 = 0; i0 < t->size[0]; i0++) {
        pass_of(write_passes, &p->axis[2])(&w);
        w.in += area * VL, w.out += t->step[0];
        if (residual) w.residual += t->step[0];
    }
    if (activates_later(p->activation))
        for (int64_t tile = 0; tile < count; tile++, y += aside)
            for (int64_t i0 = 0; i0 < t->size[0]; i0++)
                for (int64_t i1 = 0; i1 < t->size[1]; i1++)
                    activate_rows(y + i0 * t->step[0] + i1 * t->step[1], t->step[2], t->size[2],
                                  (vectors - 1) * VL + n, p->activation);
}

/* y of `count` tiles side by side and one panel of channels, m[point * m_point + column]. */
static void output_tile(const fc_winograd *p, const fc_arrays *a, const tile_place *place,
                        int64_t count, int64_t panel, const float *m, float *lines) {
    int64_t first = panel * p->vectors * VL;
    int64_t columns = fc_min(p->out_channels - first, p->vectors * VL);
    tile_target t = target_of(p, place);
    int64_t at = t.at + first, vectors = fc_ceil_div(columns, VL);
    output_vectors(p, &t, count, m, vectors, columns - (vectors - 1) * VL,
                   a->bias[0] ? a->bias[0] + first : NULL, a->residual ? a->residual + at : NULL,
                   a->y + at, lines);
}

#endif
