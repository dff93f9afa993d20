// The noise stream of dql/noise.py, W counters at a time. A counter (row, k, block, offset) gives four words w and with
// u(w) = ((w >> 9) + 1/2) / 2^23 the normals of dims 4 block .. 4 block + 3 (Box and Muller):
//     n0, n1 = sqrt(-2 ln u(w0)) * (cos, sin)(2 pi u(w1)),   n2, n3 likewise from w2, w3
// A number depends on its counter alone, not on the lane, the call or the tile that it was made in. It is within 3e-7
// of the same formula in float64, relative, next to the zeros of cos and sin too: over all 2^23 values of u the radius
// is within 1.1e-7, cos and sin within 1.3e-7, and the product is rounded once more.
#pragma once

#include "philox.h"
#include "vec.h"

namespace dql {
namespace DQL_VARIANT {

// Philox of W counters. Even and odd lanes go apart, each in the lower half of a 64-bit lane, where one multiplication
// leaves both words of the product; what is in the upper half is never looked at.
DQL_INLINE void philox(uint64_t seed, const UVec counter[4], UVec words[4]) {
    const LongVec m0 = PHILOX_MULTIPLIER_0 - LongVec{}, m1 = PHILOX_MULTIPLIER_1 - LongVec{};
    LongVec c[2][4];
    for (int i = 0; i < 4; ++i) {
        c[0][i] = (LongVec)counter[i];
        c[1][i] = c[0][i] >> 32;
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        for (LongVec* x : c) {
            const LongVec p0 = multiply_lower(x[0], m0), p1 = multiply_lower(x[2], m1);
            x[0] = (p1 >> 32) ^ x[1] ^ k0;
            x[1] = p1;
            x[2] = (p0 >> 32) ^ x[3] ^ k1;
            x[3] = p0;
        }
        k0 += PHILOX_KEY_STEP_0;
        k1 += PHILOX_KEY_STEP_1;
    }
    for (int i = 0; i < 4; ++i) words[i] = (UVec)((c[0][i] & 0xffffffffu) | (c[1][i] << 32));
}

// sqrt(-2 ln u). u = 2^e f with f of [2/3, 4/3), so that near u = 1, where e = 0, the logarithm is its series in f - 1,
// which is exact: nothing cancels.
DQL_INLINE Vec radius(UVec word) {
    const Vec m = __builtin_convertvector((IVec)(word >> 9), Vec);
    const IVec bits = as_int(m * 0x1p-23f + 0x1p-24f);
    const IVec octave = (bits - 0x3f2aaaab) >> 23;
    const Vec e = __builtin_convertvector(octave, Vec);
    const Vec s = as_float(bits - (octave << 23)) - 1.0f;
    Vec p = broadcast(-0.299652874f);  // (2 s - 2 ln(1 + s)) / s^2, to 2.1e-8 of the logarithm of u
    p = p * s + 0.30679068f;
    p = p * s - 0.275281489f;
    p = p * s + 0.328606516f;
    p = p * s - 0.400579244f;
    p = p * s + 0.500129998f;
    p = p * s - 0.666655481f;
    p = p * s + 0.999999464f;
    return square_root(e * -1.38629436f + ((s * s) * p - 2.0f * s));
}

// cos and sin of 2 pi u = (q + f) pi / 2 with whole q and f of [-1/2, 1/2], both exact.
DQL_INLINE void circle(UVec word, Vec& cosine, Vec& sine) {
    const Vec m = __builtin_convertvector((IVec)(word >> 9), Vec);
    const Vec quarters = m * 0x1p-21f + 0x1p-22f;
    const Vec shifted = quarters + 12582912.0f;  // + 1.5 * 2^23: rounds to a whole number, in the lowest bits
    const IVec q = as_int(shifted);
    const Vec f = quarters - (shifted - 12582912.0f);
    const Vec x = f * f;
    Vec s = broadcast(-4.60014539e-3f);
    s = s * x + 7.96795785e-2f;
    s = s * x - 6.4596343e-1f;
    s = s * x - 4.88437344e-8f;
    s = f * s + f * 1.57079637f;  // the first coefficient in two parts
    Vec c = broadcast(8.9448638e-4f);
    c = c * x - 2.08555963e-2f;
    c = c * x + 2.53668547e-1f;
    c = c * x - 1.23370051f;
    c = c * x + 1.0f;
    const IVec odd = (q & 1) != 0;
    cosine = as_float(as_int(odd ? s : c) ^ ((q + 1) << 30 & INT32_MIN));
    sine = as_float(as_int(odd ? c : s) ^ (q << 30 & INT32_MIN));
}

// Normals of steps k0 .. k0 + steps - 1 and rows row0 .. row0 + n - 1, whose ids are below 2^32:
//     out[s * step_stride + (a / 32) * panel_stride + r * 32 + a % 32]   for s < steps, r < n, a < A
// What lies between is left alone. n is below 2^30.
static inline void normals(uint64_t seed, uint32_t offset, uint32_t k0, int steps, uint32_t row0, int n, int A,
                           float* out, int64_t step_stride, int64_t panel_stride) {
    const int blocks = (A + 3) / 4;
    const int64_t total = (int64_t)steps * n * blocks;
    if (total <= 0) return;

    // Counters are numbered with the block running fastest, then the row: lane i starts at i = (s n + r) blocks + b.
    // The halves keep the quotients of such small numbers away from whole ones, where rounding could go wrong.
    Vec number;
    for (int i = 0; i < W; ++i) number[i] = (float)i + 0.5f;
    const IVec rows = __builtin_convertvector(number / (float)blocks, IVec);
    IVec s = __builtin_convertvector((__builtin_convertvector(rows, Vec) + 0.5f) / (float)n, IVec);
    IVec r = rows - s * n;
    IVec b = __builtin_convertvector(number, IVec) - rows * blocks;
    const int b_stride = W % blocks, r_stride = W / blocks % n, s_stride = W / blocks / n;

    int block = 0, row = 0;  // of the counter that is written next
    float *step_out = out, *row_out = out;
    for (int64_t done = 0; done < total; done += W) {
        const UVec counter[4] = {(UVec)r + row0, (UVec)s + k0, (UVec)b, offset - UVec{}};
        UVec words[4];
        philox(seed, counter, words);
        b += b_stride;
        const IVec next_row = b >= blocks;  // -1 where true
        b -= next_row & blocks;
        r += r_stride - next_row;
        const IVec next_step = r >= n;
        r -= next_step & n;
        s += s_stride - next_step;

        Vec v[4];
        for (int i = 0; i < 4; i += 2) {
            const Vec length = radius(words[i]);
            circle(words[i + 1], v[i], v[i + 1]);
            v[i] *= length;
            v[i + 1] *= length;
        }
        transpose_blocks(v);
        alignas(64) float quads[4 * W];
        for (int i = 0; i < 4; ++i) store(quads + i * W, v[i]);
        const int lanes = total - done < W ? (int)(total - done) : W;
        for (int i = 0; i < lanes; ++i) {
            const float* quad = quads + i % 4 * W + i / 4 * 4;
            float* to = row_out + block / 8 * panel_stride + block % 8 * 4;
            const int width = A - 4 * block;
            if (width >= 4)
                __builtin_memcpy(to, quad, 16);
            else
                for (int j = 0; j < width; ++j) to[j] = quad[j];
            if (++block < blocks) continue;
            block = 0;
            row_out += 32;
            if (++row < n) continue;
            row = 0;
            row_out = step_out += step_stride;
        }
    }
}

// dql.noise.uniform(seed, count)[row]: the number of (0, 1) by which `select` draws a row's candidate.
static inline double uniform(uint64_t seed, uint32_t offset, uint32_t row) {
    return unit_double(dql::philox(seed, row, UNIFORM_STEP, 0, offset).w[0]);
}

// dql.noise.integers(seed, high, count)[i] for i of first .. first + count - 1; high is 1 .. 2^31.
static inline void integers(uint64_t seed, uint32_t offset, uint64_t high, int64_t first, int64_t count,
                            int32_t* out) {
    UVec lane;
    for (int i = 0; i < W; ++i) lane[i] = (uint32_t)i;
    int64_t at = first / 4 * 4;  // the first number of the counters at hand
    for (const int64_t end = first + count; at < end; at += 4 * W) {
        const UVec counter[4] = {lane + (uint32_t)(at / 4), INTEGER_STEP - UVec{}, UVec{}, offset - UVec{}};
        UVec words[4];
        philox(seed, counter, words);
        uint32_t numbers[4 * W];
        for (int j = 0; j < 4; ++j)
            for (int i = 0; i < W; ++i) numbers[4 * i + j] = words[j][i];
        const int64_t from = at < first ? first - at : 0, to = end - at < 4 * W ? end - at : 4 * W;
        for (int64_t i = from; i < to; ++i) out[at + i - first] = (int32_t)(numbers[i] * high >> 32);
    }
}

}  // namespace DQL_VARIANT
}  // namespace dql
