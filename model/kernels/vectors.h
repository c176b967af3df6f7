/* Sixteen floats at a time: what every compiled kernel is written in.
 *
 * GCC's and clang's vector extension: one AVX-512 register, two AVX2 or four NEON ones. No
 * -ffast-math anywhere: nothing may be reordered, so that a row's bits are its own.
 */
#ifndef VITRINE_VECTORS_H
#define VITRINE_VECTORS_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define LANES 16
#define LINE 64 /* bytes of a line of the cache */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4)));
typedef uint16_t hvec __attribute__((vector_size(32), aligned(2)));

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE float from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t to_bf16(float f) { /* round to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

INLINE vec load(const void *base, int64_t at, int is_bf16) {
    if (is_bf16) {
        hvec h;
        memcpy(&h, (const uint16_t *)base + at, sizeof h);
#if defined(__AVX512F__) /* GCC takes the general form in halves */
        return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
        return (vec)(__builtin_convertvector(h, uvec) << 16);
#endif
    }
    vec v;
    memcpy(&v, (const float *)base + at, sizeof v);
    return v;
}

/* the low half of each lane */
INLINE hvec narrow(uvec v) {
#if defined(__AVX512F__)
    return (hvec)_mm512_cvtepi32_epi16((__m512i)v);
#else
    return __builtin_convertvector(v, hvec);
#endif
}

INLINE void store(void *base, int64_t at, vec v, int is_bf16) {
    if (!is_bf16) {
        memcpy((float *)base + at, &v, sizeof v);
        return;
    }
#if defined(__AVX512BF16__) /* the same, but what lies between -2^-126 and 2^-126 becomes zero */
    const hvec h = (hvec)_mm512_cvtneps_pbh((__m512)v);
#else
    uvec bits = (uvec)v;
    uvec is_nan = (uvec)((bits & 0x7fffffffu) > 0x7f800000u);
    uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    const hvec h = narrow((rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan));
#endif
    memcpy((uint16_t *)base + at, &h, sizeof h);
}

INLINE vec choose(ivec mask, vec yes, vec no) {
    return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}

INLINE float max_lane(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

INLINE float sum_lanes(vec v) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

/* exp(x) for x <= 0: 2^n * p(r), r = x - n ln 2, |r| <= ln 2 / 2; polynomial and split of
 * ln 2 as in Cephes' expf (S. Moshier). Below -87 the result is 0, as it should be for a
 * masked key (-inf). */
INLINE vec exp_vec(vec x) {
    ivec dead = x < splat(-87.0f);
    x = (vec)((ivec)x & ~dead);
    vec shifted = x * splat(1.44269504088896341f) + splat(12582912.0f); /* 1.5 * 2^23: rounds */
    vec n = shifted - splat(12582912.0f);
    vec r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return (vec)((ivec)(p * (vec)power) & ~dead);
}

/* x / (1 + e^-y), without overflow: 1 / (1 + e^-y) = e^min(y, 0) / (1 + e^-|y|). A NaN in y
 * must come in through x too. */
INLINE vec times_sigmoid(vec x, vec y) {
    ivec negative = y < splat(0);
    vec small = exp_vec(splat(0) - (vec)((ivec)y & 0x7fffffff));
    return x * choose(negative, small, splat(1.0f)) / (splat(1.0f) + small);
}

INLINE vec silu(vec x) { return times_sigmoid(x, x); }

/* x (1 + tanh z) / 2 = x / (1 + e^-2z), z = sqrt(2 / pi) (x + 0.044715 x^3) */
INLINE vec gelu_tanh(vec x) {
    vec z = splat(0.7978845608028654f) * (x + splat(0.044715f) * x * x * x);
    return times_sigmoid(x, z + z);
}

/* x (1 + erf(x / sqrt 2)) / 2; erf by Abramowitz and Stegun 7.1.26, error below 1.5e-7 */
INLINE vec gelu(vec x) {
    vec y = (vec)((ivec)x & 0x7fffffff) * splat(0.7071067811865476f);
    vec t = splat(1.0f) / (splat(1.0f) + splat(0.3275911f) * y);
    vec p = splat(1.061405429f);
    p = p * t + splat(-1.453152027f);
    p = p * t + splat(1.421413741f);
    p = p * t + splat(-0.284496736f);
    p = p * t + splat(0.254829592f);
    vec tail = p * t * exp_vec(splat(0) - y * y); /* erfc(y) */
    return x * splat(0.5f) * choose(x < splat(0), tail, splat(2.0f) - tail);
}

#endif
