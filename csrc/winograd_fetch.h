/* Which memory the tiles of a block touch, as runs of cache lines to be asked for beforehand. */
#ifndef FC_WINOGRAD_FETCH_H
#define FC_WINOGRAD_FETCH_H

#include "winograd_products.h"
#include "winograd_tiles.h"

/* Tiles side by side along the axis where tile numbers run fastest are one segment: a box in x or
   y. Its rows along that axis are the runs, `parts` of them for the lines of a pixel of y.

   at, step, left  what is left of the run, or of all of them if 0
   place, tiles    what is in no segment yet
   low, high, row  of the box, per axis, and its next row */
typedef struct {
    const float *at;
    int64_t step, left;
    const fc_winograd *p;
    const float *array;
    tile_place place;
    int64_t tiles, low[3], high[3], row[3], origin, part, parts;
    int output;
} line_list;

/* Go to the next segment whose box is not empty; 0 if there is none. */
static int next_segment(line_list *list) {
    const fc_winograd *p = list->p;
    int fast = p->order[0];
    while (list->tiles) {
        int64_t length = fc_min(p->axis[fast].tiles - list->place.at[fast], list->tiles);
        int some = 1;
        list->origin = list->place.image * (list->output ? p->out_image : p->in_image);
        for (int a = 0; a < 3; a++) {
            const fc_winograd_axis *axis = &p->axis[a];
            int64_t first = list->place.at[a], last = first + (a == fast ? length - 1 : 0);
            int64_t step = list->output ? axis->m : axis->m * axis->stride;
            int64_t reach = (axis->alpha - 1) * axis->stride + axis->phases;
            int64_t pad = list->output ? 0 : axis->pad;
            if (list->output) reach = axis->m;
            list->row[a] = list->low[a] = fc_max(first * step - pad, 0);
            list->high[a] = fc_min(last * step - pad + reach,
                                   list->output ? axis->out_size : axis->in_size);
            some &= list->low[a] < list->high[a];
        }
        list->tiles -= length;
        skip_places(p, &list->place, length);
        if (some) return 1;
    }
    return 0;
}

/* Go to the next row of the box; 0 if there is none. */
static int next_row(line_list *list) {
    for (int k = 1; k < 3; k++) {
        int a = list->p->order[k];
        if (++list->row[a] < list->high[a]) return 1;
        list->row[a] = list->low[a];
    }
    return 0;
}

/* Begin the next run; if there is none, no lines are left. */
static __attribute__((noinline)) void next_run(line_list *list) {
    const fc_winograd *p = list->p;
    int fast = p->order[0];
    if (list->part == list->parts) {
        list->part = 0;
        if (!next_row(list) && !next_segment(list)) return;
    }
    int64_t pixels = list->high[fast] - list->low[fast], at = list->part++ * FC_LINE;
    for (int a = 0; a < 3; a++)
        at += list->row[a] * (list->output ? p->axis[a].out_step : p->axis[a].in_step);
    list->at = list->array + (list->origin + at);
    list->step = list->output ? p->axis[fast].out_step : FC_LINE;
    list->left = list->output ? pixels : fc_ceil_div(pixels * p->axis[fast].in_step, FC_LINE);
}

/* The lines of `tiles` tiles from `first` on: of x, or the first `parts` per pixel of y. */
static void list_lines(line_list *list, const fc_winograd *p, const float *array, int output,
                       int64_t parts, int64_t first, int64_t tiles) {
    list->left = list->tiles = 0;
    if (tiles < 1) return;
    list->p = p;
    list->array = array;
    list->output = output;
    list->place = place_of(p, first);
    list->tiles = tiles;
    list->parts = parts;
    list->part = 0;
    if (next_segment(list)) next_run(list);
}

/* Take the next lines, at most `most`, or `count` consecutive ones at `other` if there are none. */
INLINE void take_lines(line_list *list, int64_t most, const float *other, int64_t others,
                       line_run *taken) {
    int64_t count = fc_min(list->left, most);
    if (!count) {
        taken->at = other;
        taken->step = FC_LINE;
        taken->left = others;
        return;
    }
    taken->at = list->at;
    taken->step = list->step;
    taken->left = count;
    list->at += count * list->step;
    list->left -= count;
    if (!list->left) next_run(list);
}

#endif
