/* A stream's column from frames wherever they lie: the families of the clip read a table of them. */
static void continual_frames(const fc_continual *p, const fc_arrays *a,
                             const float *const *frames) {
    if (p->inner == FC_DEPTHWISE) depthwise_frames(p->params, a, frames);
    else grouped_frames(p->params, a, frames);
}
