/* One step of a stream: which family computes a column from the frames of its taps, and the ring.

   inner, params  FC_GROUPED or FC_DEPTHWISE, for a window of `taps` frames
   taps, dilation along time; ring: frames kept per stream, dilation * (taps - 1) */
typedef struct {
    int32_t inner;
    const void *params;
    int64_t taps, dilation, ring;
} fc_continual;
