#if defined(__x86_64__)
#include <stdint.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2,prfchw"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2,prfchw")
#endif

static int usable(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2");
}

#define ISA fc_avx2
#define ISA_NAME "avx2"
#define VL 8
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
