/* One step of a stream, in two forms of memory.

   inner, params  FC_GROUPED, FC_DEPTHWISE or FC_WINOGRAD without a transform in time: for a window
                  of `taps` frames, or with `sums` for one frame of one stream; `partial` is that
                  without bias and activation
   taps, dilation, stride  along time; ring: maps kept per stream, dilation * (taps - 1)
   sums       the state is the columns that are not complete, else the last frames
   replicate  in front of a stream stands its first frame, else what the state holds
   tap_size   sums: floats from the weights of one tap to those of the next */
typedef struct {
    int32_t inner, sums, replicate;
    const void *params, *partial;
    int64_t taps, dilation, stride, ring, tap_size;
} fc_continual;
