/* Gradients of depthwise and grouped convolutions: what Python works out once per plan. */

/* A vector of input channels, and some outputs of the groups that they belong to.

   x_channel, x_lanes  the first input channel, and how many lanes are valid
   y_channel           the first channel of a vector of gy that holds all these outputs
   outputs, valid      of the compiled kernel, and how many of them exist */
typedef struct {
    int64_t x_channel, x_lanes, y_channel, outputs, valid;
} fc_gradient_block;

/* geometry    of the forward convolution
   contiguous  x, gx and gy are (N, C, *size) and go through transposed copies
   blocks      of the weight gradient; lane_of (blocks, FC_MOST_OUTPUTS, VL): the lane of the vector
               of gy that each lane of an output multiplies
   high        output rows of a strip;  chunks: parts of the strips of all images, which are summed
               apart, and then in order: the result does not depend on the number of threads
   sums        floats of all sums of a chunk */
enum { FC_MOST_OUTPUTS = 8 };
typedef struct {
    fc_geometry geometry;
    int32_t isa, contiguous;
    int64_t blocks, high, chunks, sums;
    const fc_gradient_block *block;
    const int32_t *lane_of;
} fc_gradient;

/* Floats of workspace in front of a kernel's own: the transposed copies. */
int64_t fc_gradient_copies(const fc_gradient *gradient);

/* gw (K, C / G, *kernel) = the sum over all outputs of gy (N, K, *out) times what they read of
   x (N, C, *in). The workspace holds the copies and chunks * sums floats. */
void fc_weight_gradient(const fc_gradient *gradient, intptr_t x, intptr_t gy, intptr_t gw,
                        intptr_t workspace, int threads);

/* gx (N, C, *in) of a depthwise convolution without multiplier: what every input gave to gy, by
   w (C, 1, *kernel). The workspace holds the copies and taps * (C + VL) floats. */
void fc_input_gradient(const fc_gradient *gradient, intptr_t gy, intptr_t w, intptr_t gx,
                       intptr_t workspace, int threads);
