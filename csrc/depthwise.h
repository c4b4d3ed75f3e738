/* A depthwise convolution. Weights are packed as (vectors, KT, KH, KW, lanes), a vector being the
   output channels that dw_channel names; behind them, for a multiplier, the input lane that each
   output lane reads. In lines they are (taps, K + lanes), the channels repeating, and behind them
   FC_LINE_CHUNK zeros. */
enum { FC_DEPTHWISE_TILES, FC_DEPTHWISE_LINES, FC_LINE_CHUNK = 2048 };

/* form        one of the above
   looped      tiles: loop over the taps even where a kernel was compiled for them
   axis        lines: the axis that is convolved */
typedef struct {
    fc_geometry geometry;
    int32_t activation, form, looped, axis;
} fc_depthwise;
