// Mish, SiLU and ReLU with their derivatives. Mish(z) = z tanh(softplus(z)) (arXiv 1908.08681); with e = exp(z) and
// w = e (e + 2), which no sign of z makes cancel,
//     mish(z)  = z w / (w + 2)
//     mish'(z) = w / (w + 2) + 4 z e (e + 1) / (w + 2)^2
//     silu(z)  = z e / (e + 1),   silu'(z) = e / (e + 1) + z e / (e + 1)^2
//
// The largest errors of Mish and SiLU over all 2^32 floats (tests/test_activation.cpp --all), ReLU having none:
//                                                                     avx512    avx2      generic
//     value, in ulp of the exact value (of 2^-119 where it is less)   6.41      5.52      4.65
//     slope for z of [-2.5, -0.5], where it crosses zero: absolute    1.18e-7   1.05e-7   1.09e-7
//     slope elsewhere: relative to its exact value (or to 2^-119)     6.3e-7    6.2e-7    6.0e-7
// NaN gives NaN and the slope NaN; +inf gives +inf and 1; -inf gives -0 (ReLU 0) and 0.
#pragma once

#include "vec.h"

namespace dql {
namespace DQL_VARIANT {

// What scaled_exp multiplies its result with: no exp of a z that matters is then below the normal range, so that its
// exponent can be put in by adding whole numbers. The quotients below take the factor out again.
constexpr float EXP_SCALE = 0x1p32f;

// EXP_SCALE 2^(i / EXP_PIECES), as many as one shuffle of registers can look up: the more there are, the shorter is the
// polynomial that does the rest. Kept as the float's bits less i << EXP_SHIFT, so that adding
// (EXP_PIECES n + i) << EXP_SHIFT to entry i multiplies it with 2^n.
#if defined(__AVX512F__)
constexpr int EXP_PIECES = 32, EXP_SHIFT = 18;
alignas(64) constexpr uint32_t EXP_POWERS[EXP_PIECES] = {
    0x4f800000, 0x4f7ecd87, 0x4f7daac3, 0x4f7c980f, 0x4f7b95c2, 0x4f7aa43a, 0x4f79c3d3, 0x4f78f4f0,
    0x4f7837f0, 0x4f778d3a, 0x4f76f532, 0x4f767043, 0x4f75fed7, 0x4f75a15b, 0x4f75583f, 0x4f7523f6,
    0x4f7504f3, 0x4f74fbaf, 0x4f7508a4, 0x4f752c4d, 0x4f75672a, 0x4f75b9be, 0x4f76248c, 0x4f76a81e,
    0x4f7744fd, 0x4f77fbb8, 0x4f78ccdf, 0x4f79b907, 0x4f7ac0c7, 0x4f7be4ba, 0x4f7d257d, 0x4f7e83b3,
};
#elif defined(__AVX2__)
constexpr int EXP_PIECES = 8, EXP_SHIFT = 20;
alignas(32) constexpr uint32_t EXP_POWERS[EXP_PIECES] = {
    0x4f800000, 0x4f7b95c2, 0x4f7837f0, 0x4f75fed7, 0x4f7504f3, 0x4f75672a, 0x4f7744fd, 0x4f7ac0c7,
};
#else
constexpr int EXP_PIECES = 1, EXP_SHIFT = 23;
constexpr uint32_t EXP_POWERS[EXP_PIECES] = {0x4f800000};
#endif

DQL_INLINE UVec look_up_power(UVec i) {  // modulo EXP_PIECES
#if defined(__AVX512F__)
    const __m512i* powers = reinterpret_cast<const __m512i*>(EXP_POWERS);
    return (UVec)_mm512_permutex2var_epi32(powers[0], (__m512i)i, powers[1]);
#elif defined(__AVX2__)
    return (UVec)_mm256_permutevar8x32_epi32(*reinterpret_cast<const __m256i*>(EXP_POWERS), (__m256i)i);
#else
    return (i & 0) + EXP_POWERS[0];
#endif
}

// exp(z) * EXP_SCALE for z of [-104, 20].
DQL_INLINE Vec scaled_exp(Vec z) {
    // 1.5 * 2^23 / EXP_PIECES: adding it rounds to whole pieces and leaves their number in the lowest bits.
    const Vec magic = broadcast(12582912.0f / EXP_PIECES);
    const Vec t = z * 1.44269504f + magic;
    const Vec n = t - magic;
    const UVec pieces = (UVec)t;
    const Vec power = (Vec)(look_up_power(pieces) + (pieces << EXP_SHIFT));
#if defined(__AVX512F__)
    const Vec r = multiply_add(n, broadcast(-0.693147182f), z);
    const Vec p = (r * 0.49999997f + 1.00001466f) * r;
#elif defined(__AVX2__)
    const Vec r = multiply_add(n, broadcast(-0.693147182f), z);
    const Vec p = ((r * 0.166642979f + 0.50006479f) * r + 1.0f) * r;
#else
    const Vec r = (z - n * 0.693145752f) - n * 1.42860677e-6f;  // in two parts: n times the first is exact
    Vec p = broadcast(1.38436444e-3f);
    p = p * r + 8.37416295e-3f;
    p = p * r + 4.16680016e-2f;
    p = p * r + 1.66664317e-1f;
    p = p * r + 4.9999994e-1f;
    p = (p * r) * r + r;
#endif
    return p * power + power;
}

constexpr float LOWEST = -104.0f;  // below, exp and with it all three are 0 in float32: it stands in for -infinity
constexpr float HIGHEST = 20.0f;   // above, all three are z itself and their slope is 1

// max and min give their second operand where one is NaN, so that NaN comes out where NaN went in.
DQL_INLINE Vec not_below(Vec z) { return max(broadcast(LOWEST), z); }
DQL_INLINE Vec not_above(Vec z) { return min(broadcast(HIGHEST), z); }

struct Mish {
    DQL_INLINE Vec value(Vec z) {
        z = not_below(z);
        const Vec e = scaled_exp(not_above(z));
        const Vec p = e * (e * (0.5f / EXP_SCALE) + 1.0f);  // w / 2, times EXP_SCALE
        return z * (p / (p + EXP_SCALE));
    }
    DQL_INLINE Vec value_and_slope(Vec z, Vec& slope) {
        z = not_below(z);
        const Vec bounded = not_above(z);
        const Vec e = scaled_exp(bounded);
        const Vec p = e * (e * (0.5f / EXP_SCALE) + 1.0f);
        const Vec t = p / (p + EXP_SCALE);     // w / (w + 2), to the bit as in value(): the divider has time for both
        const Vec r = 1.0f / (p + EXP_SCALE);  // 2 / (w + 2), over EXP_SCALE
        const Vec er = e * r;
        slope = (bounded * er) * (r * EXP_SCALE + er) + t;
        return z * t;
    }
};

struct Silu {
    DQL_INLINE Vec value(Vec z) {
        z = not_below(z);
        const Vec e = scaled_exp(not_above(z));
        return z * (e * (1.0f / (e + EXP_SCALE)));
    }
    DQL_INLINE Vec value_and_slope(Vec z, Vec& slope) {
        z = not_below(z);
        const Vec bounded = not_above(z);
        const Vec e = scaled_exp(bounded);
        const Vec r = 1.0f / (e + EXP_SCALE);  // 1 / (e + 1), over EXP_SCALE
        const Vec s = e * r;
        slope = (bounded * s) * (r * EXP_SCALE) + s;
        return z * s;
    }
};

struct Relu {
    DQL_INLINE Vec value(Vec z) { return max(Vec{}, z); }
    DQL_INLINE Vec value_and_slope(Vec z, Vec& slope) {
        slope = z != z ? z : (z > 0.0f ? broadcast(1.0f) : Vec{});
        return value(z);
    }
};

}  // namespace DQL_VARIANT
}  // namespace dql
