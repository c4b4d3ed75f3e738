/* Grouped convolution, dense included (one group): the form that the weights were packed for. */
#include "dense.h"
#include "grouped_strips.h"

enum { CYCLES_PER_THREAD = 40000 }; /* less work is done before another thread has started */

/* frames  addresses of the input frames (N, T), or NULL where they follow each other in x */
static void grouped_frames(const fc_grouped *p, const fc_arrays *a, const float *const *frames) {
    int threads = (int)fc_max(1, fc_min(a->threads, p->work / fc_least_work(CYCLES_PER_THREAD)));
    if (p->form == FC_PIXEL_LANES) lanes_run(p, a, frames, threads);
    else dense_run(p, a, frames, threads);
}

static void grouped_run(const void *params, const fc_arrays *a) {
    grouped_frames(params, a, NULL);
}
