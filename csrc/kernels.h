/* Everything that is compiled once per instruction set, into the table `ISA`.

   The including file defines ISA, ISA_NAME, VL and `usable` before. */
#include "internal.h"
#include "gemm.h"
#include "transpose.h"
#include "depthwise.c"

const fc_isa ISA = {
    .name = ISA_NAME,
    .lanes = VL,
    .usable = usable,
    .transpose = transpose,
    .run = {[FC_DEPTHWISE] = depthwise_run},
};
