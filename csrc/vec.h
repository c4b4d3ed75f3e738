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
/* Past the caches, p being a multiple of a vector: for cache lines that are written whole, and soon.
   vdrain() before others read them. */
#if VL == 16
INLINE void vstream(float *p, vec v) { _mm512_stream_ps(p, v); }
INLINE void vdrain(void) { _mm_sfence(); }
#elif VL == 8
INLINE void vstream(float *p, vec v) { _mm256_stream_ps(p, v); }
INLINE void vdrain(void) { _mm_sfence(); }
#else
INLINE void vstream(float *p, vec v) { vstore(p, v); }
INLINE void vdrain(void) {}
#endif
enum { PAST_CACHES_BYTES = 32 << 20 }; /* more than caches keep for the next layer */

/* Whether y is to be written past the caches, which otherwise read its old content before, and give
   up x for it: of so many floats read and written in all. What is written in turn must be whole
   cache lines: it begins in steps of `step`. */
INLINE int past_caches(int64_t floats, const float *y, int64_t step) {
    return floats * (int64_t)sizeof(float) > PAST_CACHES_BYTES && step % FC_LINE == 0 &&
           (uintptr_t)y % (FC_LINE * sizeof(float)) == 0;
}

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
/* For transposing: lanes in turn, pairs of lanes in turn, both within blocks of four lanes; and the
   even or odd blocks of a, then those of b. */
#if VL == 16
#define LOW_LANES 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH_LANES 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define LOW_PAIRS 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_PAIRS 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define EVEN_BLOCKS 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define ODD_BLOCKS 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#elif VL == 8
#define LOW_LANES 0, 8, 1, 9, 4, 12, 5, 13
#define HIGH_LANES 2, 10, 3, 11, 6, 14, 7, 15
#define LOW_PAIRS 0, 1, 8, 9, 4, 5, 12, 13
#define HIGH_PAIRS 2, 3, 10, 11, 6, 7, 14, 15
#define EVEN_BLOCKS 0, 1, 2, 3, 8, 9, 10, 11
#define ODD_BLOCKS 4, 5, 6, 7, 12, 13, 14, 15
#else
#define LOW_LANES 0, 4, 1, 5
#define HIGH_LANES 2, 6, 3, 7
#define LOW_PAIRS 0, 1, 4, 5
#define HIGH_PAIRS 2, 3, 6, 7
#endif

/* A square of vectors transposed: squares of four lanes first, then blocks of four lanes. */
INLINE void vtranspose(vec v[VL]) {
    vec w[VL];
    UNROLL
    for (int i = 0; i < VL; i += 4) {
        vec a = SHUFFLE(v[i], v[i + 1], LOW_LANES), b = SHUFFLE(v[i], v[i + 1], HIGH_LANES);
        vec c = SHUFFLE(v[i + 2], v[i + 3], LOW_LANES), d = SHUFFLE(v[i + 2], v[i + 3], HIGH_LANES);
        w[i] = SHUFFLE(a, c, LOW_PAIRS);
        w[i + 1] = SHUFFLE(a, c, HIGH_PAIRS);
        w[i + 2] = SHUFFLE(b, d, LOW_PAIRS);
        w[i + 3] = SHUFFLE(b, d, HIGH_PAIRS);
    }
#if VL == 16
    UNROLL
    for (int i = 0; i < 4; i++) {
        vec a = SHUFFLE(w[i], w[i + 4], EVEN_BLOCKS), b = SHUFFLE(w[i], w[i + 4], ODD_BLOCKS);
        vec c = SHUFFLE(w[i + 8], w[i + 12], EVEN_BLOCKS);
        vec d = SHUFFLE(w[i + 8], w[i + 12], ODD_BLOCKS);
        v[i] = SHUFFLE(a, c, EVEN_BLOCKS);
        v[i + 4] = SHUFFLE(b, d, EVEN_BLOCKS);
        v[i + 8] = SHUFFLE(a, c, ODD_BLOCKS);
        v[i + 12] = SHUFFLE(b, d, ODD_BLOCKS);
    }
#elif VL == 8
    UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = SHUFFLE(w[i], w[i + 4], EVEN_BLOCKS);
        v[i + 4] = SHUFFLE(w[i], w[i + 4], ODD_BLOCKS);
    }
#else
    UNROLL
    for (int i = 0; i < 4; i++) v[i] = w[i];
#endif
}

#endif
