/* Everything that is compiled once per instruction set, into the table `ISA`.

   The including file defines ISA, ISA_NAME, VL and `usable` before. */
#include "internal.h"
#include "gemm.h"
#include "programs.h"
#include "transpose.h"
#include "grouped.c"
#include "winograd.c"
#include "depthwise.c"
#include "hfa.c"
#include "continual.c"
#include "weight_gradient.h"
#include "input_gradient.h"
#include "elementwise.c"

const fc_isa ISA = {
    .name = ISA_NAME,
    .lanes = VL,
    .usable = usable,
    .transpose = transpose,
    .step = continual_frames,
    .weight_gradient = weight_gradient,
    .input_gradient = input_gradient,
    .blend = blend_run,
    .means = means_run,
    .pool = pool_run,
    .window = columns_run,
    .run = {[FC_WINOGRAD] = winograd_run,
            [FC_DEPTHWISE] = depthwise_run,
            [FC_GROUPED] = grouped_run,
            [FC_HFA] = hfa_run},
};
