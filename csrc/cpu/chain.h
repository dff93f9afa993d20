// The reverse chain over a tile of rows, forward and backward, as kernels/reference.py writes it:
//
//     x = noise[0]
//     for k in 0 .. K-1:
//         x0 = clamp(a x - b denoiser(x, t_k, s), -max, +max)
//         x  = c0 x0 + cx x + cp x0_previous + s noise[k+1]
//     action = clamp(x, -max, +max)
#pragma once

#include "noise.h"
#include "trunk.h"

namespace dql {
namespace DQL_VARIANT {

constexpr int64_t NOISE_FLOATS = 1 << 14;  // of noise that are drawn at a time, if one step does not need more

struct Arena {
    float* next;
    float* take(int64_t floats) {
        float* taken = next;
        next += (floats + 15) / 16 * 16;
        return taken;
    }
};

static inline int64_t noise_steps(int64_t step_floats, int K) {
    const int64_t steps = NOISE_FLOATS / step_floats;
    return steps < 1 ? 1 : steps > K ? K : steps;
}

// Enough for any of the tiles below.
static int64_t scratch_floats(const Trunk& net, int K) {
    const int64_t tile = MAX_ROWS * PANEL, action = panels(net.X) * tile;
    const int64_t chain = 8 * action + noise_steps(action, K) * action;
    const int64_t bf16 = net.P * tile;
    return chain + bf16 + (panels(net.S) + 8 * net.P + 8) * tile + 64 * 16;
}

// The states of a tile's rows, each once, in panels; `index` tells each row's. Returns how many.
static inline int gather_states(const float* states, int S, int64_t N, int64_t first_row, int rows, float* out,
                                int32_t* index) {
    const int64_t first = first_row / N, count = (first_row + rows - 1) / N - first + 1;
    for (int r = 0; r < rows; ++r) index[r] = (int32_t)((first_row + r) / N - first);
    to_panels(states + first * S, S, count, S, out, count * PANEL);
    return (int)count;
}

// Not NaN's business: it goes through.
DQL_INLINE Vec clamp(Vec v, Vec bound) { return max(-bound, min(bound, v)); }

// min(Q_1, Q_2) of actions x [panels(A)][rows][32], whose states were gathered.
static inline void critics_min(const ChainJob& job, int rows, const float* x, const float* states, int count,
                               const int32_t* index, Arena arena, float* q_min) {
    const int64_t wide = job.critic->P * rows * PANEL;
    float* part = arena.take(wide);
    const Places places = scratch_places(*job.critic, rows, arena.take(2 * wide));
    float q[2][MAX_ROWS * PANEL];
    for (int i = 0; i < 2; ++i) {
        const Trunk& critic = job.critic[i];
        state_part(critic, states, count, critic.first_bias, part);
        trunk_forward(critic, rows, x, rows * PANEL, nullptr, part, count * PANEL, index, places, nullptr, q[i], 0);
    }
    for (int r = 0; r < rows; ++r) {
        const float a = q[0][r * PANEL], b = q[1][r * PANEL];
        q_min[r] = a < b || a != a ? a : b;
    }
}

static void chain_tile(const ChainJob& job, int64_t first_row, int rows, float* scratch) {
    const Trunk& t = *job.net;
    const int A = t.X;
    const int64_t PA = panels(A), size = PA * rows * PANEL, wide = t.P * rows * PANEL, panel = rows * PANEL;
    const int64_t many = noise_steps(size, job.K);
    Arena arena = {scratch};
    float *x = arena.take(size), *eps = arena.take(size), *x0_previous = arena.take(size);
    float* noise = arena.take(many * size);
    float* states = arena.take(panels(t.S) * rows * PANEL);
    float* part = arena.take(wide);
    Places places = scratch_places(t, rows, arena.take(2 * wide));
    uint32_t* rounded = job.bf16 ? reinterpret_cast<uint32_t*>(arena.take(wide)) : nullptr;
    int32_t index[MAX_ROWS];
    const int count = gather_states(job.states, t.S, job.N, first_row, rows, states, index);
    state_part(t, states, count, nullptr, part);

    const Saved* saved = job.saved;
    const Vec bound = broadcast(job.max_action);
    int64_t from = 0, until = 0;  // the steps whose noise is here
    for (int64_t i = 0; i < size; ++i) eps[i] = x0_previous[i] = 0.0f;
    if (A % PANEL)
        for (int64_t i = 0; i < many * size; ++i) noise[i] = 0.0f;
    for (int k = 0; k <= job.K; ++k) {
        // noise[0] is x itself; after the last step, k = K, there is none left to add
        if (k < job.K && k == until) {
            from = until;
            until = from + many < job.K ? from + many : job.K;
            if (job.noise) {
                for (int64_t i = from; i < until; ++i)
                    to_panels(job.noise + (i * job.R + first_row) * A, A, rows, A, noise + (i - from) * size, panel);
            } else {
                normals(job.seed, job.offset, (uint32_t)from, (int)(until - from), (uint32_t)first_row, rows, A, noise,
                        size, panel);
            }
        }
        const float* drawn = noise + (k - from) * size;
        if (k == 0) {
            for (int64_t i = 0; i < size; i += W) store(x + i, load(drawn + i));
        } else {
            const float* step = job.steps + (k - 1) * STEP_COLUMNS;
            const Vec a = broadcast(step[0]), b = broadcast(step[1]), c0 = broadcast(step[2]), cx = broadcast(step[3]);
            const Vec cp = broadcast(step[4]), s = broadcast(step[5]);
            for (int64_t i = 0; i < size; i += W) {
                const Vec before = load(x + i), raw = a * before - b * load(eps + i), x0 = clamp(raw, bound);
                Vec next = c0 * x0 + cx * before + cp * load(x0_previous + i);
                if (k < job.K) next += s * load(drawn + i);  // the posterior variance is 0 in the last step
                store(x + i, next);
                store(x0_previous + i, x0);
                if (saved) {
                    const Vec absolute = max(raw, -raw);
                    const int64_t at = i / panel * (saved->rows + job.R) * PANEL + i % panel;
                    store(saved->inside + at + ((k - 1) * job.R + first_row) * PANEL,
                          absolute <= bound ? broadcast(1.0f) : Vec{});
                }
            }
        }
        if (k == job.K) break;
        const int64_t row = k * job.R + first_row;
        if (saved) {
            for (int64_t p = 0; p < PA; ++p)
                for (int64_t i = 0; i < panel; i += W)
                    store(saved->x + (p * saved->rows + row) * PANEL + i, load(x + p * panel + i));
            places = saved_places(*saved, t, row);
        }
        trunk_forward(t, rows, x, panel, job.time_table + k * t.P * PANEL, part, count * PANEL, index, places,
                      rounded, eps, panel);
    }
    for (int64_t i = 0; i < size; i += W) {
        const Vec v = load(x + i), absolute = max(v, -v);
        if (saved)
            store(saved->inside + i / panel * (saved->rows + job.R) * PANEL + i % panel +
                      (job.K * job.R + first_row) * PANEL,
                  absolute <= bound ? broadcast(1.0f) : Vec{});
        store(x + i, clamp(v, bound));
    }
    from_panels(x, panel, rows, A, job.actions + first_row * A);
    if (job.critic) critics_min(job, rows, x, states, count, index, arena, job.q_min + first_row);
}

static void chain_backward_tile(const ChainBackwardJob& job, int64_t first_row, int rows, float* scratch) {
    const Trunk& t = *job.net;
    const Saved& saved = *job.saved;
    const int A = t.X;
    const int64_t PA = panels(A), panel = rows * PANEL, size = PA * panel;
    Arena arena = {scratch};
    float *d_x = arena.take(size), *carried = arena.take(size), *d_raw = arena.take(size), *through = arena.take(size);
    to_panels(job.d_actions + first_row * A, A, rows, A, d_x, panel);
    const int64_t inside_panel = (saved.rows + job.R) * PANEL;
    for (int64_t i = 0; i < size; i += W) {
        const float* inside = saved.inside + i / panel * inside_panel + i % panel + (job.K * job.R + first_row) * PANEL;
        store(d_x + i, load(d_x + i) * job.d_scale * load(inside));
        store(carried + i, Vec{});
        store(through + i, Vec{});
    }
    for (int k = job.K - 1; k >= 0; --k) {
        const float* step = job.steps + k * STEP_COLUMNS;
        const Vec a = broadcast(step[0]), b = broadcast(step[1]), c0 = broadcast(step[2]), cx = broadcast(step[3]);
        const Vec cp = broadcast(step[4]);
        const int64_t row = k * job.R + first_row;
        for (int64_t i = 0; i < size; i += W) {
            const Vec d = load(d_x + i);
            const Vec raw = (d * c0 + load(carried + i)) *
                            load(saved.inside + i / panel * inside_panel + i % panel + row * PANEL);
            store(carried + i, d * cp);
            store(d_raw + i, raw);
            store(saved.d_out + i / panel * saved.rows * PANEL + i % panel + row * PANEL, -b * raw);
        }
        // the gradient of x_T itself, the noise, is nobody's
        trunk_backward(t, rows, saved, row, k ? through : nullptr, panel);
        if (k)
            for (int64_t i = 0; i < size; i += W)
                store(d_x + i, load(d_x + i) * cx + a * load(d_raw + i) + load(through + i));
    }
}

}  // namespace DQL_VARIANT
}  // namespace dql
