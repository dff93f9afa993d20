// Products of a tile of rows with packed weights: the inner loops of everything.
//
//     out[r][c] = common[c] + base[base_row[r]][c] + sum over k of in[r][k] weight[k][c]
//
// R rows times U units of two vectors are accumulated in registers while k runs; the weights stream by once. Each
// element is one chain of fused multiply-adds in the order of k, whatever R and U: so a row's result does not depend,
// to the last bit, on the rows it is computed with.
#pragma once

#include "network.h"
#include "vec.h"

namespace dql {
namespace DQL_VARIANT {

constexpr int UNIT = 2 * W;                    // columns of a unit
constexpr int UNITS_OF_PANEL = PANEL / UNIT;   // 1 with AVX-512, 2 with AVX2, 4 otherwise
constexpr int REGISTERS = W == 16 ? 32 : 16;
constexpr int MAX_ROWS = REGISTERS == 32 ? 14 : 6;  // 2 R accumulators, two weights, one broadcast

// Units at a time: enough independent sums to hide an addition's latency.
constexpr int units(int R) {
    return REGISTERS == 32 ? (R == 1 ? 8 : R <= 3 ? 4 : R <= 6 ? 2 : 1) : (R == 1 ? 4 : R == 2 ? 2 : 1);
}

// Few rows wait for their weights. In float32 the processor's own prefetching keeps up with loops of two rows of k, but
// not of four, strides of 2 KB; in bf16 they are fetched some rows of k ahead.
constexpr int FEW_ROWS = 3;
constexpr int FETCH_AHEAD = 8;

// What is kept of many rows for a backward pass lies beyond the L2 cache. Where a product writes is fetched while it
// runs, a few rows at a time, for more would hold up its weights; a short one (K < 32) fetches so many panels ahead.
constexpr int FETCH_PANELS = 2;

// The operands of a product; panel strides in floats.
struct Product {
    const float* in;
    int64_t in_panel;
    int64_t K;
    const float* weight;     // blocks [K][32 P]
    int64_t P;
    const float* common;     // [32 P], or null
    const float* base;       // or null
    int64_t base_panel;
    const int32_t* base_row; // [R]
    float* out;
    int64_t out_panel;
    const float* times = nullptr;  // a factor of every element, in panels as `out`, which it may be
    const float* fetch = nullptr;  // what the caller reads or writes next, in panels as `out`; `out` is fetched, too
};

template <int R, int U>
static __attribute__((noinline)) void product_units(const Product& p, int64_t first_unit) {
    const float* weight[U];
    Vec sums[R][2 * U];
    for (int u = 0; u < U; ++u) {
        const int64_t panel = (first_unit + u) / UNITS_OF_PANEL, column = (first_unit + u) % UNITS_OF_PANEL * UNIT;
        weight[u] = p.weight + block_index(p.K, p.P, 0, panel * PANEL + column);
        for (int v = 0; v < 2; ++v) {
            const int64_t at = panel * PANEL + column + v * W;
            const Vec start = p.common ? load(p.common + at) : Vec{};
            if (p.base) {
                const float* base = p.base + panel * p.base_panel + column + v * W;
                for (int r = 0; r < R; ++r) sums[r][2 * u + v] = start + load(base + p.base_row[r] * PANEL);
            } else {
                for (int r = 0; r < R; ++r) sums[r][2 * u + v] = start;
            }
        }
    }
    const float* in = p.in;
    // one block, or (U = 8) two whole ones: `in_groups` starts a group at a multiple of its size
    const int64_t stride = block_width(first_unit / UNITS_OF_PANEL, p.P);
    int64_t at = 0;
    const auto step = [&](int k) __attribute__((always_inline)) {
        Vec w[2 * U];
        for (int u = 0; u < U; ++u) {
            const float* row = weight[u] + at;
            w[2 * u] = load(row);
            w[2 * u + 1] = load(row + W);
        }
        for (int r = 0; r < R; ++r) {
            const Vec x = broadcast(in[r * PANEL + k]);
            for (int v = 0; v < 2 * U; ++v) sums[r][v] += x * w[v];
        }
        at += stride;
    };
    const int64_t fetched_panel = first_unit / UNITS_OF_PANEL + (p.K < PANEL ? FETCH_PANELS : 0);
    const auto fetch = [&](int64_t row, int64_t until) __attribute__((always_inline)) {
        for (; row < until; ++row)
            for (int64_t c = 0; c < U * UNIT; c += 16) {
                const int64_t column = first_unit % UNITS_OF_PANEL * UNIT + c;
                const int64_t offset = (fetched_panel + column / PANEL) * p.out_panel + row * PANEL + column % PANEL;
                __builtin_prefetch(p.out + offset);
                __builtin_prefetch(p.fetch + offset);
            }
    };
    int64_t left = p.K, fetched = p.fetch ? 0 : R;
    const int64_t at_a_time = left < PANEL ? R : (R * PANEL + left - 1) / left;
    if (left < PANEL) fetch(fetched, R);
    for (; left >= PANEL; left -= PANEL, in += p.in_panel) {
        if (fetched < R) {
            fetch(fetched, fetched + at_a_time < R ? fetched + at_a_time : R);
            fetched += at_a_time;
        }
#pragma GCC unroll 2
        for (int k = 0; k < PANEL; ++k) step(k);
    }
    for (int k = 0; k < left; ++k) step(k);
    for (int u = 0; u < U; ++u) {
        const int64_t panel = (first_unit + u) / UNITS_OF_PANEL, column = (first_unit + u) % UNITS_OF_PANEL * UNIT;
        float* out = p.out + panel * p.out_panel + column;
        if (p.times) {
            const float* times = p.times + panel * p.out_panel + column;
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < 2; ++v) sums[r][2 * u + v] *= load(times + r * PANEL + v * W);
        }
        for (int r = 0; r < R; ++r) {
            store(out + r * PANEL, sums[r][2 * u]);
            store(out + r * PANEL + W, sums[r][2 * u + 1]);
        }
    }
}

#if defined(__AVX512BF16__)
// The same with bf16 operands, products and sums in float32: `in` holds pairs
// [P][R][16] and weight blocks [K / 2][32 P].
struct ProductBf16 {
    const uint32_t* in;
    int64_t in_panel;        // in pairs
    int64_t K;               // a multiple of 32
    const uint32_t* weight;
    int64_t P;
    const float* common;
    float* out;
    int64_t out_panel;
};

template <int R, int U>
static __attribute__((noinline)) void product_units_bf16(const ProductBf16& p, int64_t first_panel) {
    __m512 sums[R][2 * U];
    for (int v = 0; v < 2 * U; ++v) {
        const __m512 start = load(p.common + first_panel * PANEL + v * W);
        for (int r = 0; r < R; ++r) sums[r][v] = start;
    }
    const uint32_t* weight[U];
    for (int u = 0; u < U; ++u) weight[u] = p.weight + block_index(p.K / 2, p.P, 0, (first_panel + u) * PANEL);
    const int64_t stride = block_width(first_panel, p.P);
    const uint32_t* in = p.in;
    int64_t at = 0;
    for (int64_t left = p.K; left > 0; left -= PANEL, in += p.in_panel) {
#pragma GCC unroll 4
        for (int k = 0; k < PANEL / 2; ++k, at += stride) {
            if constexpr (R == 1) {  // one broadcast and the weights from memory: 2 U weights would not fit
                const __m512bh x = (__m512bh)_mm512_set1_epi32((int)in[k]);
                for (int v = 0; v < 2 * U; ++v) {
                    const uint32_t* row = weight[v / 2] + at + v % 2 * W;
                    __builtin_prefetch(row + FETCH_AHEAD * BLOCK);
                    sums[0][v] = _mm512_dpbf16_ps(sums[0][v], (__m512bh)_mm512_loadu_si512(row), x);
                }
            } else {
                __m512bh w[2 * U];
                for (int v = 0; v < 2 * U; ++v) {
                    const uint32_t* row = weight[v / 2] + at + v % 2 * W;
                    if (R <= FEW_ROWS) __builtin_prefetch(row + FETCH_AHEAD * BLOCK);
                    w[v] = (__m512bh)_mm512_loadu_si512(row);
                }
                for (int r = 0; r < R; ++r) {
                    const __m512bh x = (__m512bh)_mm512_set1_epi32((int)in[r * (PANEL / 2) + k]);
                    for (int v = 0; v < 2 * U; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], w[v], x);
                }
            }
        }
    }
    for (int v = 0; v < 2 * U; ++v)
        for (int r = 0; r < R; ++r)
            store(p.out + (first_panel + v / 2) * p.out_panel + r * PANEL + (v % 2) * W, sums[r][v]);
}
#endif

// Runs `run.template with<R, U>(first)` over `count` units, U at a time as long as that fits, then half as many.
template <int R, int U, class Run>
static inline void in_groups(int64_t first, int64_t count, const Run& run) {
    for (; count >= U; first += U, count -= U) run.template with<R, U>(first);
    if constexpr (U > 1) {
        if (count) in_groups<R, U / 2>(first, count, run);
    }
}

// Calls `run.template rows<R>()` with R = rows.
template <int R, class Run>
static inline void with_rows(int rows, const Run& run) {
    if (rows == R) {
        run.template rows<R>();
    } else if constexpr (R > 1) {
        with_rows<R - 1>(rows, run);
    }
}

// Panels that are best computed together before anything is done to them: then they are still in the L1 cache.
template <int R>
constexpr int panels_at_once() {
    return units(R) > UNITS_OF_PANEL ? units(R) / UNITS_OF_PANEL : 1;
}

// out[r][o] = bias[o] + sum over k of in[r][k] weight[o][k], for few outputs o: sums along the vectors.
template <int RB, int OB>
static inline void dot_block(const float* in, int64_t in_panel, const float* weight, int64_t P, const float* bias,
                             float* out) {
    Vec sums[RB][OB] = {};
    for (int64_t panel = 0; panel < P; ++panel) {
#pragma GCC unroll 8
        for (int k = 0; k < PANEL; k += W) {
            Vec w[OB];
            for (int o = 0; o < OB; ++o) w[o] = load(weight + (o * P + panel) * PANEL + k);
            for (int r = 0; r < RB; ++r) {
                const Vec x = load(in + panel * in_panel + r * PANEL + k);
                for (int o = 0; o < OB; ++o) sums[r][o] += x * w[o];
            }
        }
    }
    for (int r = 0; r < RB; ++r)
        for (int o = 0; o < OB; ++o) out[r * PANEL + o] = sum(sums[r][o]) + (bias ? bias[o] : 0.0f);
}

template <int OB>
static inline void dot_outputs(const float* in, int64_t in_panel, int rows, const float* weight, int64_t P,
                               const float* bias, float* out) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) dot_block<4, OB>(in + r * PANEL, in_panel, weight, P, bias, out + r * PANEL);
    for (; r < rows; ++r) dot_block<1, OB>(in + r * PANEL, in_panel, weight, P, bias, out + r * PANEL);
}

// in [P][rows][32], weight [O][32 P], bias [O] or null -> out [panels(O)][rows][32]
static inline void dot(const float* in, int64_t in_panel, int rows, const float* weight, int64_t P, const float* bias,
                       int O, float* out, int64_t out_panel) {
    for (int o = 0; o < O; o += 2) {  // two of a pair lie in one panel
        const float* b = bias ? bias + o : nullptr;
        float* to = out + o / PANEL * out_panel + o % PANEL;
        if (o + 1 < O)
            dot_outputs<2>(in, in_panel, rows, weight + o * P * PANEL, P, b, to);
        else
            dot_outputs<1>(in, in_panel, rows, weight + o * P * PANEL, P, b, to);
    }
}

}  // namespace DQL_VARIANT
}  // namespace dql
