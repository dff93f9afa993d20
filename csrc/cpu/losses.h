// The other networks' work on a tile of rows: the noise-prediction loss, and one critic.
#pragma once

#include "chain.h"

namespace dql {
namespace DQL_VARIANT {

// x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (arXiv 2006.11239, eq. 4);
// loss = mean (denoiser(x_t, t, s) - noise)^2.
static void bc_tile(const BcJob& job, int64_t first_row, int rows, float* scratch) {
    const Trunk& t = *job.net;
    const Saved& saved = *job.saved;
    const int A = t.X;
    const int64_t panel = rows * PANEL, size = panels(A) * panel, wide = t.P * panel;
    Arena arena = {scratch};
    float *out = arena.take(size), *noise = arena.take(size), *target = arena.take(size);
    float* states = arena.take(panels(t.S) * panel);
    float* part = arena.take(wide);
    int32_t index[MAX_ROWS];
    gather_states(job.states, t.S, 1, first_row, rows, states, index);
    state_part(t, states, rows, nullptr, part);
    for (int64_t i = 0; i < size; ++i) noise[i] = out[i] = 0.0f;
    normals(job.seed, 0, 0, 1, (uint32_t)first_row, rows, A, noise, size, panel);
    to_panels(job.actions + first_row * A, A, rows, A, target, panel);
    for (int r = 0; r < rows; ++r) {
        const int32_t time = job.t[first_row + r];
        const float* table = job.time_table + time * t.P * PANEL;
        for (int64_t p = 0; p < t.P; ++p)
            for (int c = 0; c < PANEL; c += W) {
                float* at = part + (p * rows + r) * PANEL + c;
                store(at, load(at) + load(table + p * PANEL + c));
            }
        const Vec signal = broadcast(job.q_sample[2 * time]), spread = broadcast(job.q_sample[2 * time + 1]);
        for (int64_t p = 0; p < panels(A); ++p)
            for (int c = 0; c < PANEL; c += W) {
                const int64_t at = (p * rows + r) * PANEL + c;
                store(saved.x + (p * saved.rows + first_row + r) * PANEL + c,
                      signal * load(target + at) + spread * load(noise + at));
            }
    }
    trunk_forward(t, rows, saved.x + first_row * PANEL, saved.rows * PANEL, nullptr, part, panel, index,
                  saved_places(saved, t, first_row), nullptr, out, panel);
    const float* wanted = job.predict_epsilon ? noise : target;
    const float scale = 2.0f / (float)(job.B * A);
    for (int r = 0; r < rows; ++r) {
        float loss = 0.0f;
        for (int64_t p = 0; p < panels(A); ++p)
            for (int c = 0; c < PANEL; ++c) {
                const int64_t at = (p * rows + r) * PANEL + c;
                const float error = out[at] - wanted[at];
                loss += error * error;
                saved.d_out[(p * saved.rows + first_row + r) * PANEL + c] = scale * error;
            }
        job.row_loss[first_row + r] = loss;
    }
    trunk_backward(t, rows, saved, first_row, nullptr, 0);
}

static void critic_tile(const CriticJob& job, int64_t first_row, int rows, float* scratch) {
    const Trunk& t = *job.net;
    const int A = t.X;
    const int64_t panel = rows * PANEL, size = panels(A) * panel, wide = t.P * panel;
    Arena arena = {scratch};
    float *x = arena.take(size), *q = arena.take(panel), *d_x = arena.take(size);
    float* states = arena.take(panels(t.S) * panel);
    float* part = arena.take(wide);
    float* spare = arena.take(2 * wide);
    int32_t index[MAX_ROWS];
    const int count = gather_states(job.states, t.S, job.N, first_row, rows, states, index);
    state_part(t, states, count, t.first_bias, part);
    to_panels(job.actions + first_row * A, A, rows, A, x, panel);
    const Saved* saved = job.saved;
    if (saved)
        for (int64_t i = 0; i < size; i += W)
            store(saved->x + i / panel * saved->rows * PANEL + first_row * PANEL + i % panel, load(x + i));
    const Places places = saved ? saved_places(*saved, t, first_row) : scratch_places(t, rows, spare);
    trunk_forward(t, rows, x, panel, nullptr, part, count * PANEL, index, places, nullptr, q, panel);
    for (int r = 0; r < rows; ++r) job.q[first_row + r] = q[r * PANEL];
    if (!saved) return;
    for (int r = 0; r < rows; ++r) {
        float* d = saved->d_out + (first_row + r) * PANEL;
        for (int c = 0; c < PANEL; ++c) d[c] = 0.0f;
        d[0] = job.target_q ? 2.0f / (float)job.R * (q[r * PANEL] - job.target_q[first_row + r]) : 1.0f;
    }
    trunk_backward(t, rows, *saved, first_row, job.d_actions ? d_x : nullptr, panel);
    if (job.d_actions) from_panels(d_x, panel, rows, A, job.d_actions + first_row * A);
}

}  // namespace DQL_VARIANT
}  // namespace dql
