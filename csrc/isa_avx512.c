#if defined(__x86_64__)
#include <stdint.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,bmi2,prfchw"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,bmi2,prfchw,prefer-vector-width=512")
#endif

static int usable(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

#define ISA fc_avx512
#define ISA_NAME "avx512"
#define VL 16
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
