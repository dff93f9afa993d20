// Gradients of weights, and elementwise passes over flat buffers. Every output element is summed by one task in the
// order of the rows: the same bits whatever the number of threads.
#pragma once

#include "trunk.h"

namespace dql {
namespace DQL_VARIANT {

constexpr int OUTER_ROWS = 128;                  // of both panels at a time: 32 KB, the L1 cache
constexpr int OUTER_COLUMNS = W == 16 ? 12 : 6;  // of `a` at a time, times UNIT columns of `b`, in registers

// total[j][i] += sum over rows of a[row][j] b[row][i], for C columns j and UNIT i
template <int C>
static __attribute__((noinline)) void outer_block(const float* a, const float* b, int64_t rows, float* total) {
    Vec sums[C][2];
    for (int j = 0; j < C; ++j)
        for (int v = 0; v < 2; ++v) sums[j][v] = load(total + j * PANEL + v * W);
#pragma GCC unroll 2
    for (int64_t r = 0; r < rows; ++r) {
        const Vec b0 = load(b + r * PANEL), b1 = load(b + r * PANEL + W);
        for (int j = 0; j < C; ++j) {
            const Vec x = broadcast(a[r * PANEL + j]);
            sums[j][0] += x * b0;
            sums[j][1] += x * b1;
        }
    }
    for (int j = 0; j < C; ++j)
        for (int v = 0; v < 2; ++v) store(total + j * PANEL + v * W, sums[j][v]);
}

// The same for `columns` of a and `width` of b: C at a time as long as that fits, then the rest.
template <int C>
static inline void outer_columns(const float* a, const float* b, int64_t rows, int columns, int width, float* total) {
    for (; columns >= C; columns -= C, a += C, total += C * PANEL)
        for (int i = 0; i < width; i += UNIT) outer_block<C>(a, b + i, rows, total + i);
    if constexpr (C > 1) {
        if (columns) outer_columns<C - 1>(a, b, rows, columns, width, total);
    }
}

static void outer(const OuterJob& job) {
    alignas(64) float total[PANEL * PANEL] = {};
    for (int64_t row = 0; row < job.rows; row += OUTER_ROWS)
        outer_columns<OUTER_COLUMNS>(job.a + row * PANEL, job.b + row * PANEL,
                                     job.rows - row < OUTER_ROWS ? job.rows - row : OUTER_ROWS, job.valid_a,
                                     job.valid_b, total);
    for (int j = 0; j < job.valid_a; ++j) {
        float* out = job.out + j * job.stride_a;
        const float* from = total + j * PANEL;
        if (job.stride_b == 1 && job.valid_b == PANEL) {
            for (int i = 0; i < PANEL; i += W)
                store(out + i, job.accumulate ? load(out + i) + load(from + i) : load(from + i));
        } else {
            for (int i = 0; i < job.valid_b; ++i, out += job.stride_b) *out = job.accumulate ? *out + from[i] : from[i];
        }
    }
}

static void column_sums(const float* panel, int64_t rows, float* out, bool accumulate) {
    Vec sums[PANEL / W] = {};
    for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < PANEL / W; ++v) sums[v] += load(panel + r * PANEL + v * W);
    for (int v = 0; v < PANEL / W; ++v) store(out + v * W, accumulate ? load(out + v * W) + sums[v] : sums[v]);
}

static void add(float* to, const float* from, int64_t size, bool accumulate) {
    for (int64_t i = 0; i < size; ++i) to[i] = accumulate ? to[i] + from[i] : from[i];
}

static void states_tile(const Trunk& t, const float* d_state_part, int64_t part_rows, int64_t first_row, int rows,
                        float* d_states, float* scratch) {
    Layer layer = {};
    layer.product.in = d_state_part + first_row * PANEL;
    layer.product.in_panel = part_rows * PANEL;
    layer.product.K = t.P * PANEL;
    layer.product.weight = t.state_weight_t;
    layer.product.P = panels(t.S);
    layer.product.out = scratch;
    layer.product.out_panel = rows * PANEL;
    layer.activation = -1;
    run_layer(layer, rows, panels(t.S));
    from_panels(scratch, rows * PANEL, rows, t.S, d_states + first_row * t.S);
}

// The table [K][32 P] of what the timesteps add to the first layer: W_t features + b.
static void time_table(const Trunk& t, const float* features, int64_t K, float* table) {
    for (int64_t k = 0; k < K; ++k) {
        Layer layer = {};
        layer.product.in = features + k * panels(t.D) * PANEL;
        layer.product.in_panel = PANEL;
        layer.product.K = t.D;
        layer.product.weight = t.time_weight;
        layer.product.P = t.P;
        layer.product.common = t.first_bias;
        layer.product.out = table + k * t.P * PANEL;
        layer.product.out_panel = PANEL;
        layer.activation = -1;
        run_layer(layer, 1, t.P);
    }
}

static double sum_squares(const float* values, int64_t size) {
    double total = 0.0;
    int64_t i = 0;
    for (; i + 4096 <= size; i += 4096) {  // a block's sum in float32, in vectors; the blocks' in double
        Vec sums[4] = {};
        for (int64_t j = 0; j < 4096; j += 4 * W)
            for (int v = 0; v < 4; ++v) {
                const Vec x = load(values + i + j + v * W);
                sums[v] += x * x;
            }
        total += (double)sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    for (; i < size; ++i) total += (double)values[i] * values[i];
    return total;
}

// Adam (arXiv 1412.6980) as torch.optim.Adam computes it.
static void adam(const AdamJob& job) {
    for (int64_t i = 0; i < job.size; ++i) {
        const float g = job.gradient[i] * job.gradient_scale;
        const float m = job.exp_avg[i] + job.one_minus_beta1 * (g - job.exp_avg[i]);
        const float v = job.beta2 * job.exp_avg_sq[i] + job.one_minus_beta2 * g * g;
        job.exp_avg[i] = m;
        job.exp_avg_sq[i] = v;
        job.parameters[i] -= job.step_size * m / (__builtin_sqrtf(v) / job.correction + job.eps);
    }
}

static void lerp(float* target, const float* source, int64_t size, float weight) {
    for (int64_t i = 0; i < size; ++i) target[i] += weight * (source[i] - target[i]);
}

// x - x is 0 for finite x and NaN otherwise.
static bool all_finite(const float* values, int64_t size) {
    Vec sums = {};
    int64_t i = 0;
    for (; i + W <= size; i += W) {
        const Vec x = load(values + i);
        sums += x - x;
    }
    float rest = sum(sums);
    for (; i < size; ++i) rest += values[i] - values[i];
    return rest == 0.0f;
}

}  // namespace DQL_VARIANT
}  // namespace dql
