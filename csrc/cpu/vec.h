// One vector type for every variant of the kernels, on the compiler's vector extensions.
//
// variant.cpp is compiled once for each instruction set, and W, the floats of a vector, follows from the compiler's
// flags. Everything lives in a namespace named after the variant: no inline function of one variant can be linked in
// place of another's. For the same reason no header of the C++ library with inline code may be included here.
#pragma once

#include <stdint.h>

#if defined(__AVX2__) || defined(__AVX512F__) || defined(__SSE__)
#include <immintrin.h>
#endif

#ifndef DQL_VARIANT
#error "compile with -DDQL_VARIANT=avx512bf16, avx512, avx2 or generic"
#endif

#define DQL_INLINE static inline __attribute__((always_inline))

namespace dql {
namespace DQL_VARIANT {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t IVec __attribute__((vector_size(W * 4)));
typedef float UnalignedVec __attribute__((vector_size(W * 4), aligned(4), may_alias));

DQL_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
DQL_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
DQL_INLINE Vec broadcast(float x) { return x - Vec{}; }
// The smaller and the larger, b where one of them is NaN: the machine's own instructions, which a comparison written
// out is not always turned into.
#if defined(__AVX512F__)
// All lanes of a masked form: GCC 12 takes the plain forms' undefined operand for a mistake and warns.
DQL_INLINE Vec min(Vec a, Vec b) { return _mm512_maskz_min_ps((__mmask16)-1, a, b); }
DQL_INLINE Vec max(Vec a, Vec b) { return _mm512_maskz_max_ps((__mmask16)-1, a, b); }
#elif defined(__AVX2__)
DQL_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
DQL_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
#elif defined(__SSE__)
DQL_INLINE Vec min(Vec a, Vec b) { return _mm_min_ps(a, b); }
DQL_INLINE Vec max(Vec a, Vec b) { return _mm_max_ps(a, b); }
#else
DQL_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
DQL_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif
DQL_INLINE Vec as_float(IVec v) { return reinterpret_cast<Vec>(v); }
DQL_INLINE IVec as_int(Vec v) { return reinterpret_cast<IVec>(v); }

DQL_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float total[W];
    store(total, v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) total[i] += total[i + half];
    return total[0];
#endif
}

// Whole numbers without a sign: W of 32 bits, or W / 2 of 64 in the same register.
typedef uint32_t UVec __attribute__((vector_size(W * 4)));
typedef uint64_t LongVec __attribute__((vector_size(W * 4)));

// 32 x 32 -> 64 bits: products of the lower halves of 64-bit lanes, whatever the upper halves hold.
DQL_INLINE LongVec multiply_lower(LongVec a, LongVec b) {
#if defined(__AVX512F__)
    return (LongVec)_mm512_maskz_mul_epu32((__mmask8)-1, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (LongVec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (LongVec)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

DQL_INLINE Vec square_root(Vec v) {
#if defined(__AVX512F__)
    return _mm512_maskz_sqrt_ps((__mmask16)-1, v);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(v);
#elif defined(__SSE__)
    return _mm_sqrt_ps(v);
#else
    for (int i = 0; i < W; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
#endif
}

// Four floats from each of p, p + stride, ...
DQL_INLINE Vec load_quads(const float* p, int64_t stride) {
#if defined(__AVX512F__)
    const Vec first = _mm512_maskz_broadcast_f32x4((__mmask16)-1, _mm_loadu_ps(p));
    const Vec two = _mm512_mask_broadcast_f32x4(first, 0x00f0, _mm_loadu_ps(p + stride));
    const Vec three = _mm512_mask_broadcast_f32x4(two, 0x0f00, _mm_loadu_ps(p + 2 * stride));
    return _mm512_mask_broadcast_f32x4(three, 0xf000, _mm_loadu_ps(p + 3 * stride));
#elif defined(__AVX2__)
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
#else
    Vec v;
    for (int i = 0; i < W; ++i) v[i] = p[i / 4 * stride + i % 4];
    return v;
#endif
}

// Transposes every 4 x 4 block: lane 4 g + j of v[i] and lane 4 g + i of v[j] change places.
DQL_INLINE void transpose_blocks(Vec v[4]) {
#if defined(__SSE__)
#if defined(__AVX512F__)
#define DQL_PAIRS(half, a, b) _mm512_maskz_unpack##half##_ps((__mmask16)-1, a, b)
#define DQL_HALVES(a, b, which) _mm512_maskz_shuffle_ps((__mmask16)-1, a, b, which)
#elif defined(__AVX2__)
#define DQL_PAIRS(half, a, b) _mm256_unpack##half##_ps(a, b)
#define DQL_HALVES(a, b, which) _mm256_shuffle_ps(a, b, which)
#else
#define DQL_PAIRS(half, a, b) _mm_unpack##half##_ps(a, b)
#define DQL_HALVES(a, b, which) _mm_shuffle_ps(a, b, which)
#endif
    const Vec a = DQL_PAIRS(lo, v[0], v[1]), b = DQL_PAIRS(lo, v[2], v[3]);
    const Vec c = DQL_PAIRS(hi, v[0], v[1]), d = DQL_PAIRS(hi, v[2], v[3]);
    v[0] = DQL_HALVES(a, b, 0x44);
    v[1] = DQL_HALVES(a, b, 0xEE);
    v[2] = DQL_HALVES(c, d, 0x44);
    v[3] = DQL_HALVES(c, d, 0xEE);
#undef DQL_PAIRS
#undef DQL_HALVES
#else
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < i; ++j)
            for (int g = 0; g < W; g += 4) {
                const float lane = v[i][g + j];
                v[i][g + j] = v[j][g + i];
                v[j][g + i] = lane;
            }
#endif
}

// a * b + c, for where it matters that it is rounded once: the compiler may contract the plain expression or not.
// Twice in the generic variant.
DQL_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

}  // namespace DQL_VARIANT
}  // namespace dql
