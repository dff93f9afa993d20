// Element by element: activations and the noise stream, with the formulas and polynomials of ../activation.h, ../noise.h
// and kernels/triton/ops.py. No branch on values and no slow path, so that all a thread needs stays in registers.
#pragma once

#include <math.h>

#include "../philox.h"
#include "device.h"

namespace dql {
namespace device {

struct Activated {
    float h, slope;
};

constexpr int MISH = 0, RELU = 1, SILU = 2;  // indices into layout.ACTIVATIONS

// The value is z t; see `_gate` in kernels/triton/ops.py. Below LOWEST every value and slope is 0 in float32; above
// HIGHEST the value is z and the slope 1: there e is 2^29, whose square does not overflow.
struct Gate {
    float z, bounded, e, r, t;
};

DQL_DEVICE float not_below(float z, float least) { return z < least ? least : z; }  // NaN stays
DQL_DEVICE float not_above(float z, float most) { return z > most ? most : z; }

template <int KIND>
DQL_DEVICE Gate gate(float z) {
    Gate x;
    x.z = not_below(z, -104.0f);
    x.bounded = not_above(x.z, 20.1012688f);
    x.e = exp2_approximate(x.bounded * 1.44269504f);
    if (KIND == MISH) {
        const float w = x.e * (x.e + 2.0f);
        x.r = reciprocal(w + 2.0f);
        x.t = w * x.r;
    } else {
        x.r = reciprocal(x.e + 1.0f);
        x.t = x.e * x.r;
    }
    return x;
}

template <int KIND>
DQL_DEVICE float activate(float z) {
    if (KIND == RELU) return z < 0.0f ? 0.0f : z;
    const Gate x = gate<KIND>(z);
    return x.z * x.t;
}

template <int KIND>
DQL_DEVICE Activated activate_with_slope(float z) {
    if (KIND == RELU) return {z < 0.0f ? 0.0f : z, z > 0.0f ? 1.0f : z != z ? z : 0.0f};
    const Gate x = gate<KIND>(z);
    if (KIND == SILU) return {x.z * x.t, x.t + x.bounded * x.t * x.r};
    const float s = 2.0f * x.r, er = x.e * s;
    return {x.z * x.t, x.t + x.bounded * er * (s + er)};
}

// Several at a time: the kind is looked at once.
template <int COUNT>
DQL_DEVICE void activate_all(float (&z)[COUNT], int kind) {
    if (kind == MISH) {
        DQL_UNROLL
        for (int i = 0; i < COUNT; ++i) z[i] = activate<MISH>(z[i]);
    } else if (kind == RELU) {
        DQL_UNROLL
        for (int i = 0; i < COUNT; ++i) z[i] = activate<RELU>(z[i]);
    } else {
        DQL_UNROLL
        for (int i = 0; i < COUNT; ++i) z[i] = activate<SILU>(z[i]);
    }
}

// Mish in six instructions: z + z r, where r = -2 / (1 + (1 + e)^2) is its t less 1. Of very negative z that leaves
// rounding errors of z's size, 2^-23 |z|, where the value is less; infinity becomes NaN. Before a product in bf16 neither
// matters.
DQL_DEVICE float mish_briefly(float z) {
    const float e = exp2_approximate(z * 1.44269504f);
    return fmaf(z, reciprocal(fmaf(e, fmaf(e, -0.5f, -1.0f), -1.0f)), z);  // infinite e: r = 0
}
template <int COUNT>
DQL_DEVICE void activate_all_briefly(float (&z)[COUNT], int kind) {
    if (kind != MISH) return activate_all(z, kind);
    DQL_UNROLL
    for (int i = 0; i < COUNT; ++i) z[i] = mish_briefly(z[i]);
}

template <int COUNT>
DQL_DEVICE void activate_all_with_slope(float (&z)[COUNT], float (&slope)[COUNT], int kind) {
    DQL_UNROLL
    for (int i = 0; i < COUNT; ++i) {
        const Activated both = kind == MISH   ? activate_with_slope<MISH>(z[i])
                               : kind == RELU ? activate_with_slope<RELU>(z[i])
                                              : activate_with_slope<SILU>(z[i]);
        z[i] = both.h, slope[i] = both.slope;
    }
}

DQL_DEVICE float activate(float z, int kind) {
    float one[1] = {z};
    activate_all(one, kind);
    return one[0];
}
DQL_DEVICE Activated activate_with_slope(float z, int kind) {
    float one[1] = {z}, slope[1];
    activate_all_with_slope(one, slope, kind);
    return {one[0], slope[0]};
}

// ---- a float32 as two bf16 ----

// x = high + low but for 2^-17 of it at most. What would be rounded to infinity has the largest bf16 for `high`.
struct Parts {
    float high, low;  // low: what is left, in float32
};
DQL_DEVICE Parts parts_of(float x) {
    constexpr float LARGEST = 0x1.fep127f;
    const float high = as_float(bf16_pair(0, not_above(not_below(x, -LARGEST), LARGEST)));
    return {high, x - high};
}

// ---- noise: dql/noise.py ----

constexpr float WHOLE = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which the lowest bits then hold

// u = ((word >> 9) + 1/2) / 2^23 of (0, 1), exact: with the exponent of 1 it is 1 + (word >> 9) / 2^23.
DQL_DEVICE float unit(uint32_t word) { return as_float(word >> 9 | 0x3f800000u) - 0.999999940395355f; }

// sqrt(-2 ln u). u = 2^e f with f of [2/3, 4/3), so that near u = 1, where e = 0, the logarithm is its series in f - 1.
DQL_DEVICE float radius(uint32_t word) {
    const int32_t bits = static_cast<int32_t>(as_bits(unit(word)));
    const int32_t octave = (bits - 0x3f2aaaab) >> 23;
    const float s = as_float(static_cast<uint32_t>(bits - octave * (1 << 23))) - 1.0f;
    const float e = as_float(static_cast<uint32_t>(octave + 0x4b400000)) - WHOLE;
    float p = fmaf(s, -0.299652874f, 0.30679068f);
    p = fmaf(p, s, -0.275281489f);
    p = fmaf(p, s, 0.328606516f);
    p = fmaf(p, s, -0.400579244f);
    p = fmaf(p, s, 0.500129998f);
    p = fmaf(p, s, -0.666655481f);
    p = fmaf(p, s, 0.999999464f);
    return square_root(fmaf(e, -1.38629436f, fmaf(s * s, p, -2.0f * s)));
}

// cos and sin of 2 pi u = (q + f) pi / 2 with whole q and f of [-1/2, 1/2], both exact.
DQL_DEVICE void circle(uint32_t word, float& cosine, float& sine) {
    const float quarters = as_float(word >> 9 | 0x40800000u) - 3.99999976158142f;
    const float shifted = quarters + WHOLE;
    const uint32_t q = as_bits(shifted);
    const float f = quarters - (shifted - WHOLE), x = f * f;
    float s = fmaf(x, -4.60014539e-3f, 7.96795785e-2f);
    s = fmaf(s, x, -6.4596343e-1f);
    s = fmaf(s, x, -4.88437344e-8f);
    s = fmaf(f, s, f * 1.57079637f);
    float c = fmaf(x, 8.9448638e-4f, -2.08555963e-2f);
    c = fmaf(c, x, 2.53668547e-1f);
    c = fmaf(c, x, -1.23370051f);
    c = fmaf(c, x, 1.0f);
    const bool odd = (q & 1) != 0;
    cosine = as_float(as_bits(odd ? s : c) ^ ((q + 1) << 30 & 0x80000000u));
    sine = as_float(as_bits(odd ? c : s) ^ (q << 30 & 0x80000000u));
}

// Standard normals of dims 4 quad .. 4 quad + 3: element (k, row, dim) of dql.noise.normal.
DQL_DEVICE float4 normals4(uint64_t seed, uint32_t row, uint32_t k, uint32_t quad, uint32_t offset) {
    const PhiloxWords words = philox(seed, row, k, quad, offset);
    const float first = radius(words.w[0]), second = radius(words.w[2]);
    float c[2], s[2];
    circle(words.w[1], c[0], s[0]);
    circle(words.w[3], c[1], s[1]);
    return make_float4(first * c[0], first * s[0], second * c[1], second * s[1]);
}

// dql.noise.uniform(seed, ...)[row], by which `select` draws a row's candidate.
DQL_DEVICE float uniform(uint64_t seed, uint32_t row, uint32_t offset) {
    return unit(philox(seed, row, UNIFORM_STEP, 0, offset).w[0]);
}

}  // namespace device
}  // namespace dql
