/* Activations on vectors, and the end of a sum on its way to memory. */
#ifndef FC_ACTIVATION_H
#define FC_ACTIVATION_H

#include "vec.h"

/* exp(v) within 2 units in the last place, inf above 88.7, NaN for NaN; below -87.3 what is at most
   2^-126, or 0.

   v = k ln 2 + f with |f| <= ln 2 / 2; a Taylor polynomial of degree 7 is exact to 2^-25 there. */
INLINE vec vexp(vec v) {
    vec x = vmin(vmax(v, vset(-87.3f)), vset(88.8f));
#if VL == 16
    vec k = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT);
#else
    vec shift = vset(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vec k = (x * 1.44269504f + shift) - shift;
#endif
    vec f = x - k * 0.693145752f; /* ln 2 in two parts, the first of few bits */
    f = f - k * 1.42860677e-6f;
    vec p = vset(1.0f / 5040);
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
#if VL == 16
    return _mm512_scalef_ps(p, k);
#else
    /* 2^k in two factors, as 2^128 is no float. */
    vec_int n = __builtin_convertvector(k, vec_int), half = n >> 1;
    vec y = p * (vec)((half + 127) << 23) * (vec)((n - half + 127) << 23);
    y = vselect(v < -87.3f, vzero(), y);
    return vselect(v == v, y, v);
#endif
}

INLINE vec vsigmoid(vec z) { return 1.0f / (1.0f + vexp(-z)); }

INLINE vec vactivate(vec z, int activation) {
    switch (activation) {
    case FC_RELU: return vmax(z, vzero());
    case FC_SILU: return z * vsigmoid(z);
    case FC_HARDSWISH: return z * vmin(vmax(z + 3.0f, vzero()), vset(6.0f)) * (1.0f / 6);
    case FC_SIGMOID: return vsigmoid(z);
    default: return z;
    }
}

/* What is in front of every activation that is not piecewise linear in one step: the largest lower
   bound that can be applied in registers. relu is max(z, 0), the others are left for
   `activate_rows`. */
INLINE float activation_floor(int activation) {
    return activation == FC_RELU ? 0.0f : -__builtin_inff();
}
INLINE int activates_later(int activation) { return activation > FC_RELU; }

/* Every element of c (rows, columns), which begin `stride` apart, through one activation. */
INLINE void activate_each(float *c, int64_t stride, int64_t rows, int64_t columns, int activation) {
    for (int64_t i = 0; i < rows; i++, c += stride) {
        int64_t j = 0;
        for (; j + VL <= columns; j += VL) vstore(c + j, vactivate(vload(c + j), activation));
        if (j < columns) {
            int64_t n = columns - j;
            vstore_n(c + j, vactivate(vload_n(c + j, n), activation), n);
        }
    }
}

/* c (rows, columns) = activation(c) in place, for a block that is still in the cache. */
static __attribute__((noinline, unused)) void activate_rows(float *c, int64_t stride, int64_t rows,
                                                            int64_t columns, int activation) {
    switch (activation) {
    case FC_RELU: activate_each(c, stride, rows, columns, FC_RELU); break;
    case FC_SILU: activate_each(c, stride, rows, columns, FC_SILU); break;
    case FC_HARDSWISH: activate_each(c, stride, rows, columns, FC_HARDSWISH); break;
    case FC_SIGMOID: activate_each(c, stride, rows, columns, FC_SIGMOID); break;
    default: break;
    }
}

/* The same for vectors on their way to memory. */
static __attribute__((noinline, unused)) void activate_sums(vec *sums, int count, int activation) {
    activate_rows((float *)sums, VL, 1, count * VL, activation);
}

#endif
