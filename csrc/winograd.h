/* Minimal filtering F(m, r) on each axis (csrc/winograd.c): what Python works out once per plan.

   The axes are renumbered, those with a single point per tile first, so that axis 2 always has a
   transform. Phases are those of the polyphase split of a strided axis; of an axis with a single
   point, all its taps. */
typedef struct {
    int64_t m, r, alpha;      /* of F(m, r); alpha is 1 for an axis without a transform */
    int64_t tiles, divisor;   /* place of a tile on the axis: number / divisor % tiles */
    int64_t in_size, out_size, in_step, out_step;
    int64_t kernel, stride, pad, phases;
} fc_winograd_axis;

/* V is [point][tile][v_row] with v_point between points, M [point][tile][width] with m_point, where
   width is vectors * VL. The weights U are [panel][point][depth][width], or [point][panel] if
   phased: in the order of use, and readable for a product more.

   order     the axes from the one along which tile numbers run fastest
   block     tiles that go through the stages together; of a round of all threads if phased
   group     tiles per item of the transforms of a round
   depth     phases * channels, the rows of U
   panels    of output channels, each `vectors` wide
   m_panel   between the M of two panels; 0 where they take turns
   u_point, u_panel  between the U of two points, and of two panels
   at_once   vectors of channels that go through the passes of the input transform together
   lines     floats for the lines of a tile between two passes, per thread
   v_size, m_size  floats of V and of M, of a thread or of all threads if phased
   lanes     several groups: what they are cut into, and nothing else; or NULL */
typedef struct {
    fc_winograd_axis axis[3];
    int32_t order[3], phased, activation, vectors;
    int64_t channels, out_channels, depth, points, panels;
    int64_t in_image, out_image, tiles, block, group;
    int64_t at_once, v_row, v_point, m_point, m_panel, u_point, u_panel, v_size, m_size, lines;
    const fc_grouped *lanes;
} fc_winograd;
