/* What Python sees. Sizes and strides count elements; addresses are integers, 0 for none, because
   that is what passes through cffi fastest. Geometry has three axes (T, H, W); missing ones are 1. */

typedef struct {
    int64_t batch, in_channels, out_channels, groups;
    int64_t in_size[3], out_size[3], kernel[3], stride[3], dilation[3], pad[3];
} fc_geometry;

/* y = activation(sum + bias + residual); the order of activations is that of epilogue.ACTIVATIONS */
enum { FC_NONE, FC_RELU, FC_SILU, FC_HARDSWISH, FC_SIGMOID };

/* isa         index of the instruction set that the weights were packed for
   family      index of the kernel, FC_WINOGRAD and so on
   contiguous  x, residual and y are (N, C, *size) in C order and go through transposed copies
   in_points, out_points  product of the spatial sizes: what the copies hold per channel; of a
               stream those of one frame
   params      of the family, of a type that its header declares */
enum { FC_FAMILIES = 8 };
typedef struct {
    int32_t isa, family, contiguous, has_residual;
    int64_t batch, in_channels, out_channels, in_points, out_points;
    const void *params;
} fc_plan;

/* Instruction sets, best first; `fc_isa_name` is NULL behind the last, `fc_isa_usable` says whether
   this CPU has one. */
const char *fc_isa_name(int isa);
int fc_isa_usable(int isa);
int fc_isa_lanes(int isa);

/* Threads that OpenMP would use now; 1 without OpenMP and in a forked child, where the parent's
   threads do not exist. */
int fc_max_threads(void);

/* Elements that fc_run takes from the workspace for transposed copies, before the family's own. */
int64_t fc_copies_size(const fc_plan *plan);

/* One step of an FC_CONTINUAL plan. state (N, C, ring, *frame), or with sums (N, K, ring,
   *out_frame), and steps, one every `steps_stride`, are written unless update is 0, y where a stream
   has a column; nothing of streams whose byte of `active` (N) is 0. The rest is as for fc_run. */
void fc_step(const fc_plan *plan, intptr_t x, intptr_t weights, intptr_t bias, intptr_t residual,
             intptr_t state, intptr_t steps, int64_t steps_stride, intptr_t y, intptr_t workspace,
             intptr_t active, int update, int threads);

/* Run a plan: weights as its family packs them, three biases for hfa. The workspace holds
   fc_copies_size plus the family's own elements, with whatever alignment. */
void fc_run(const fc_plan *plan, intptr_t x, intptr_t weights, intptr_t bias, intptr_t bias1,
            intptr_t bias2, intptr_t residual, intptr_t y, intptr_t workspace, int threads);
