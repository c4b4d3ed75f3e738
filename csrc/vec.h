/* Vectors of VL floats, the same code for every instruction set.

   vec is a GCC vector: + - * and comparisons work on it, and on it with a scalar, which is
   broadcast; a product added to something becomes a fused multiply-add where the CPU has one.
   The functions that take n touch the first n lanes in memory only, 0 <= n <= VL. */
#ifndef FC_VEC_H
#define FC_VEC_H

#include <stdint.h>
#include <string.h>
#if VL > 4
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("GCC unroll 128")

typedef float vec __attribute__((vector_size(4 * VL), aligned(4 * VL), may_alias));
typedef float vec_anywhere __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t vec_int __attribute__((vector_size(4 * VL)));

INLINE vec vload(const float *p) { return *(const vec_anywhere *)p; }
INLINE void vstore(float *p, vec v) { *(vec_anywhere *)p = v; }
INLINE vec vzero(void) { return (vec){0}; }
INLINE vec vset(float f) { return f - (vec){0}; }
INLINE vec vfma(vec a, vec b, vec c) { return a * b + c; }
/* a where the mask of a comparison is set, else b. */
INLINE vec vselect(vec_int mask, vec a, vec b) {
    return (vec)((mask & (vec_int)a) | (~mask & (vec_int)b));
}
/* max(v, low) and min(v, high), NaN where v is NaN. */
#if VL == 16
INLINE vec vmax(vec v, vec low) { return _mm512_max_ps(low, v); }
INLINE vec vmin(vec v, vec high) { return _mm512_min_ps(high, v); }
#elif VL == 8
INLINE vec vmax(vec v, vec low) { return _mm256_max_ps(low, v); }
INLINE vec vmin(vec v, vec high) { return _mm256_min_ps(high, v); }
#else
INLINE vec vmax(vec v, vec low) { return vselect(v < low, low, v); }
INLINE vec vmin(vec v, vec high) { return vselect(v > high, high, v); }
#endif

INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }
INLINE void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }
INLINE void prefetch_write(const void *p) { __builtin_prefetch(p, 1, 3); }

#if VL == 16
INLINE __mmask16 vfirst(int64_t n) { return (__mmask16)((1u << n) - 1); }
INLINE vec vload_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(vfirst(n), p); }
INLINE void vstore_n(float *p, vec v, int64_t n) { _mm512_mask_storeu_ps(p, vfirst(n), v); }
#elif VL == 8
INLINE __m256i vfirst(int64_t n) {
    static const int32_t lanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(lanes + 8 - n));
}
INLINE vec vload_n(const float *p, int64_t n) { return _mm256_maskload_ps(p, vfirst(n)); }
INLINE void vstore_n(float *p, vec v, int64_t n) { _mm256_maskstore_ps(p, vfirst(n), v); }
#else
INLINE vec vload_n(const float *p, int64_t n) {
    vec v = vzero();
    for (int64_t i = 0; i < n; i++) v[i] = p[i];
    return v;
}
INLINE void vstore_n(float *p, vec v, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
}
#endif
/* v[lanes[i]] in every lane i. */
#if VL == 16
INLINE vec vpermute(vec v, vec_int lanes) { return _mm512_permutexvar_ps((__m512i)lanes, v); }
#elif VL == 8
INLINE vec vpermute(vec v, vec_int lanes) { return _mm256_permutevar8x32_ps(v, (__m256i)lanes); }
#else
INLINE vec vpermute(vec v, vec_int lanes) {
    return (vec){v[lanes[0]], v[lanes[1]], v[lanes[2]], v[lanes[3]]};
}
#endif
/* Valid lanes of the vector that begins at lane `first` of a row of `count`. */
INLINE int64_t vcount(int64_t count, int64_t first) {
    int64_t n = count - first;
    return n < 0 ? 0 : n > VL ? VL : n;
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec_int){__VA_ARGS__})
#endif
/* The first or the second halves of a and b, lane by lane in turn. */
#if VL == 16
#define LOW_LANES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_LANES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VL == 8
#define LOW_LANES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_LANES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW_LANES 0, 4, 1, 5
#define HIGH_LANES 2, 6, 3, 7
#endif

/* A square of vectors transposed: perfect shuffles, log2(VL) rounds. */
INLINE void vtranspose(vec v[VL]) {
    UNROLL
    for (int half = 1; half < VL; half *= 2) {
        vec w[VL];
        UNROLL
        for (int i = 0; i < VL / 2; i++) {
            w[2 * i] = SHUFFLE(v[i], v[i + VL / 2], LOW_LANES);
            w[2 * i + 1] = SHUFFLE(v[i], v[i + VL / 2], HIGH_LANES);
        }
        UNROLL
        for (int i = 0; i < VL; i++) v[i] = w[i];
    }
}

#endif
