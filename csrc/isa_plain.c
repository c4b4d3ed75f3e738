/* For every CPU: vectors of four floats, which GCC and Clang turn into SSE, NEON or scalars. */
static int usable(void) { return 1; }

#define ISA fc_plain
#define ISA_NAME "plain"
#define VL 4
#include "kernels.h"
