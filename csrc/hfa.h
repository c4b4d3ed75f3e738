/* The fully separable block: temporal, depthwise and pointwise stage. */

/* F(outputs, taps) along one axis, for each of `phases` interleaved inputs of a strided axis.

   program  index of its straight-line programs, or -1: then by the matrices
   bt, at   (alpha, alpha) and (outputs, alpha) in C order */
typedef struct {
    int64_t outputs, alpha, phases;
    int32_t program;
    const float *bt, *at;
} fc_hfa_axis;

/* activation  of each stage
   fast        the depthwise stage is F(m, r) on its axes and not direct
   vectors_t, vectors_p  per panel of the temporal and the pointwise weights, which follow each
               other in memory as (panels, points, phases or taps, C, panel), (points of all phases,
               channels) and (panels, M, panel), the second and third at depthwise_at, pointwise_at
   rows        output rows per step;  band: output columns per item;  tile: columns that the direct
               depthwise stage computes together
   window      rows and columns that one depthwise tile reads
   channels    of the middle, in whole vectors
   slots, columns  the ring, m frames of (slots, columns, channels)
   chunk       pixels of the temporal stage that are transformed and multiplied together
   v_point, m_point  elements from point to point of V and M
   tables, ring, v, m, d, spare  where they begin in a thread's workspace; each: its size
   row_cost    multiplications of an input row and of an output row */
typedef struct {
    fc_geometry temporal, depthwise, pointwise;
    fc_hfa_axis time, high, wide;
    int32_t activation[3], fast;
    int64_t vectors_t, vectors_p, depthwise_at, pointwise_at;
    int64_t rows, band, tile, window[2], channels, slots, columns, chunk, v_point, m_point;
    int64_t tables, ring, v, m, d, spare, each;
    double row_cost[2];
} fc_hfa;
