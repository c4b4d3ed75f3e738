/* Columns of streams from frames wherever they lie: the families of the clip read a table of them,
   (streams, taps). */
static void continual_frames(const fc_continual *p, const fc_arrays *a, const float *const *frames,
                             int64_t streams) {
    if (p->inner == FC_DEPTHWISE) {
        fc_depthwise d = *(const fc_depthwise *)p->params;
        d.geometry.batch = streams;
        depthwise_frames(&d, a, frames);
        return;
    }
    if (p->inner == FC_WINOGRAD) {
        fc_winograd w = *(const fc_winograd *)p->params;
        w.tiles = streams * w.axis[0].tiles * w.axis[1].tiles * w.axis[2].tiles;
        winograd_frames(&w, a, frames);
        return;
    }
    fc_grouped g = *(const fc_grouped *)p->params;
    int64_t batch = g.geometry.batch;
    if (batch != streams) {
        /* Runs of all pixels become those of fewer streams. */
        const int64_t *out = g.geometry.out_size;
        int64_t pixels = out[0] * out[1] * out[2];
        if (g.rows.run == batch * pixels) g.rows.run = streams * pixels;
        g.work = g.work * streams / batch;
        g.geometry.batch = streams;
    }
    grouped_frames(&g, a, frames);
}
