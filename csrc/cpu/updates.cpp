// What a training update needs beside chains: the critics, the noise-prediction loss, Adam.
#include <cmath>
#include <cstring>

#include "weight_gradients.h"

namespace dql {

// ---- the critic ----

static void critic_tiles(const CriticJob& job, int threads) {
    over_tiles(threads, job.R, kernels().scratch_floats(*job.net, 1),
               [&](int64_t first, int rows, float* scratch) { kernels().critic_tile(job, first, rows, scratch); });
}

static CriticJob critic_job(const Trunk& net, const float* states, int64_t B, const float* actions, int64_t N,
                            float* q) {
    CriticJob job = {};
    job.net = &net;
    job.states = states;
    job.actions = actions;
    job.N = N, job.R = B * N;
    job.q = q;
    return job;
}

void q_values(const Packed& critic, const float* states, int64_t B, const float* actions, int64_t N, float* q1,
              float* q2, int threads) {
    critic_tiles(critic_job(critic.trunks[0], states, B, actions, N, q1), threads);
    critic_tiles(critic_job(critic.trunks[1], states, B, actions, N, q2), threads);
}

double target_q(const Packed& critic, const float* states, int64_t B, const float* actions, int64_t N,
                const float* rewards, const float* masks, float discount, float* out, int threads) {
    Buffer q(2 * B * N);
    q_values(critic, states, B, actions, N, q.data(), q.data() + B * N, threads);
    double total = 0.0;
    for (int64_t b = 0; b < B; ++b) {
        float best[2];
        for (int i = 0; i < 2; ++i) {
            const float* values = q.data() + (i * B + b) * N;
            best[i] = values[0];
            for (int64_t n = 1; n < N; ++n)
                if (best[i] == best[i] && !(values[n] <= best[i])) best[i] = values[n];  // a NaN stays, as in amax
        }
        const float least = best[0] < best[1] || best[0] != best[0] ? best[0] : best[1];
        out[b] = rewards[b] + masks[b] * discount * least;
        total += out[b];
    }
    return total / static_cast<double>(B);
}

static double mean(const float* values, int64_t n) {
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) total += values[i];
    return total / static_cast<double>(n);
}

CriticLoss critic_gradient(const Network& net, const Packed& packed, const float* states, const float* actions,
                           int64_t B, const float* target, const Gradients& out, int threads) {
    const Trunk& t = packed.trunks[0];
    Buffer memory(saved_floats(t, B, 0) + 2 * B);
    float* q = memory.data() + saved_floats(t, B, 0);
    CriticLoss loss = {};
    for (int i = 0; i < 2; ++i) {
        const Saved saved = saved_in(memory.data(), t, B, 0);
        CriticJob job = critic_job(packed.trunks[i], states, B, actions, 1, q);
        job.saved = &saved;
        job.target_q = target;
        critic_tiles(job, threads);
        const WeightGradients weights(net, i, out, saved);
        parallel_for(threads, weights.size(), [&](int64_t task, int) { weights.run(task); });
        const size_t first = static_cast<size_t>(i) * 2 * (net.spec().L + 1);
        state_gradient(net, saved.d_z[0], B, states, out.flat + net.spec().offsets[first], out.accumulate, threads);
        for (int64_t b = 0; b < B; ++b) loss.loss += static_cast<double>(q[b] - target[b]) * (q[b] - target[b]);
        loss.q += mean(q, B) / 2;
    }
    loss.loss /= static_cast<double>(B);
    return loss;
}

QMeans q_gradient(const Packed& critic, int which, const float* states, const float* actions, int64_t B,
                  float* d_actions, int threads) {
    const Trunk& t = critic.trunks[which];
    Buffer memory(saved_floats(t, B, 0) + 2 * B);
    float* q = memory.data() + saved_floats(t, B, 0);
    const Saved saved = saved_in(memory.data(), t, B, 0);
    CriticJob job = critic_job(t, states, B, actions, 1, q);
    job.saved = &saved;
    job.d_actions = d_actions;
    critic_tiles(job, threads);
    critic_tiles(critic_job(critic.trunks[1 - which], states, B, actions, 1, q + B), threads);
    QMeans means = {mean(q, B), 0.0};
    for (int64_t b = 0; b < B; ++b) means.other += std::fabs(q[B + b]);
    means.other /= static_cast<double>(B);
    return means;
}

// ---- the noise-prediction loss ----

double bc_gradient(const Network& net, const Packed& packed, const Buffer& time_table, const Table& table,
                   const float* states, const float* actions, int64_t B, uint64_t t_seed, uint64_t noise_seed,
                   bool predict_epsilon, const Gradients& out, int threads) {
    const Trunk& t = packed.trunks[0];
    const int64_t P = t.P, A = t.X;
    Buffer memory(saved_floats(t, B, 0) + B + table.K * P * PANEL);
    float* row_loss = memory.data() + saved_floats(t, B, 0);
    float* d_table = row_loss + B;
    const Saved saved = saved_in(memory.data(), t, B, 0);
    std::vector<int32_t> times(static_cast<size_t>(B));
    kernels().integers(t_seed, 0, static_cast<uint64_t>(table.K), 0, B, times.data());
    BcJob job = {};
    job.net = &t;
    job.time_table = time_table.data();
    job.q_sample = table.q_sample.data();
    job.states = states;
    job.actions = actions;
    job.t = times.data();
    job.seed = noise_seed;
    job.B = B;
    job.predict_epsilon = predict_epsilon;
    job.saved = &saved;
    job.row_loss = row_loss;
    over_tiles(threads, B, kernels().scratch_floats(t, 1),
               [&](int64_t first, int rows, float* scratch) { kernels().bc_tile(job, first, rows, scratch); });
    const WeightGradients weights(net, 0, out, saved);
    parallel_for(threads, weights.size() + P, [&](int64_t task, int) {
        if (task < weights.size()) return weights.run(task);
        const int64_t p = task - weights.size();
        for (int64_t k = 0; k < table.K; ++k)
            std::memset(d_table + (k * P + p) * PANEL, 0, sizeof(float) * PANEL);
        for (int64_t b = 0; b < B; ++b)
            kernels().column_sums(saved.d_z[0] + (p * B + b) * PANEL, 1,
                                  d_table + (times[static_cast<size_t>(b)] * P + p) * PANEL, true);
    });
    state_gradient(net, saved.d_z[0], B, states, out.flat + net.spec().offsets[4], out.accumulate, threads);
    time_gradient(net, packed, time_table.data(), table, d_table, out);
    return mean(row_loss, B) / static_cast<double>(A);
}

// ---- the optimiser ----

double adam_step(const AdamState& state, double lr, int64_t step, double max_norm) {
    constexpr double BETA1 = 0.9, BETA2 = 0.999, EPS = 1e-8;
    const double norm = std::sqrt(kernels().sum_squares(state.gradient, state.size));
    AdamJob job = {};
    job.parameters = state.parameters;
    job.gradient = state.gradient;
    job.exp_avg = state.exp_avg;
    job.exp_avg_sq = state.exp_avg_sq;
    job.size = state.size;
    const double scale = max_norm / (norm + 1e-6);
    job.gradient_scale = max_norm > 0.0 && !(scale >= 1.0) ? static_cast<float>(scale) : 1.0f;
    job.step_size = static_cast<float>(lr / (1.0 - std::pow(BETA1, static_cast<double>(step))));
    job.correction = static_cast<float>(std::sqrt(1.0 - std::pow(BETA2, static_cast<double>(step))));
    job.one_minus_beta1 = static_cast<float>(1.0 - BETA1);
    job.one_minus_beta2 = static_cast<float>(1.0 - BETA2);
    job.beta2 = static_cast<float>(BETA2);
    job.eps = static_cast<float>(EPS);
    kernels().adam(job);
    return norm;
}

}  // namespace dql
