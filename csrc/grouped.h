/* What the grouped family is told: dense and grouped direct convolution.

   FC_PIXEL_ROWS: an implicit matrix product, output pixels are rows and output channels lanes.
   FC_PIXEL_LANES: output pixels are lanes, for few channels per group. */
enum { FC_PIXEL_ROWS, FC_PIXEL_LANES };

/* Weights of a group: panels[0] panels of vectors[0] vectors, then panels[1] of vectors[1], each
   [tap][depth][vectors * lanes].

   taps, depth  terms of a sum: addresses per output pixel, and consecutive floats behind each
   joined       what they are: (KT, KH, KW) taps and C / G floats, or joined (KT, KH) taps and
                KW * C floats, all of them inside their row
   run          consecutive output pixels that share a register block
   block        most output pixels whose addresses are in the table at once
   chunk_taps, chunk_depth  terms that stay in the cache while they meet a block of pixels
   packed_row   floats of an input row with its padding that is copied to the workspace, 0 where
                inputs are read in place;  packed_rows: rows of each frame that an item copies
   piece        output pixels of an item that copies: whole rows, or part of one */
typedef struct {
    int64_t vectors[2], panels[2];
    int64_t taps, depth, joined, run, block, chunk_taps, chunk_depth;
    int64_t packed_row, packed_rows, piece;
} fc_pixel_rows;

/* A strip of output rows of some groups moves along T. Its input is a ring of frames in the
   workspace, [channel][slot][phase][row][column].

   channels, vectors  output channels and vectors of pixels of the register block
   groups, high, wide of an item: groups, output rows and columns
   row_phases, column_phases  used residues of input rows and columns modulo the stride
   packed_rows, row_length, frame  rows of a phase, floats of a row and of a frame
   slots              frames in the ring
   channel_stride, sums_stride  floats between channels of the ring and of the sums
   residues           of rows, then of columns
   offsets            (KH, KW): of a tap into a frame
   together           of those, which follow each other for one channel before the next

   With F(m, r) along T, along H or both (csrc/winograd_lanes.h), a slot is V of a frame along H:

   tile       m along T and H, 1 where taps are terms of the sums
   points     alpha along T and H, 1 likewise
   length     floats of a point of a slot: where H is direct, the packed rows
   high       a multiple of tile[1];  row_phases  tile[1]
   packed_stride, v_stride  floats between channels of a packed frame and of V */
typedef struct {
    int64_t channels, vectors, groups, high, wide;
    int64_t row_phases, column_phases, packed_rows, row_length, frame, slots;
    int64_t channel_stride, sums_stride, together;
    int64_t tile[2], points[2], length, packed_stride, v_stride;
    const int64_t *residues, *offsets;
} fc_pixel_lanes;

/* work    cycles on one thread, roughly;  each  floats of workspace per thread
   scaled  the input is input_activation(x * scale), where scale (N, C) comes in place of a second
           bias: squeeze and excitation in front of a convolution of one tap, FC_PIXEL_ROWS alone */
typedef struct {
    fc_geometry geometry;
    int32_t form, activation, scaled, input_activation;
    int64_t work, each;
    fc_pixel_rows rows;
    fc_pixel_lanes lanes;
} fc_grouped;
