// The reverse chain, its gradient, and the published acting rule.
#include <cmath>
#include <cstring>

#include "weight_gradients.h"

namespace dql {

int64_t saved_floats(const Trunk& t, int64_t rows, int64_t inside_rows) {
    return (panels(t.X) * (rows + inside_rows) + panels(t.O) * rows + 2 * t.L * t.P * rows) * PANEL;
}

Saved saved_in(float* at, const Trunk& t, int64_t rows, int64_t inside_rows) {
    Saved saved = {};
    const auto take = [&](int64_t floats) {
        float* taken = at;
        at += floats;
        return taken;
    };
    saved.rows = rows;
    saved.x = take(panels(t.X) * rows * PANEL);
    for (int l = 0; l < t.L; ++l) {
        saved.hidden[l] = take(t.P * rows * PANEL);
        saved.slope[l] = saved.d_z[l] = take(t.P * rows * PANEL);
    }
    saved.d_out = take(panels(t.O) * rows * PANEL);
    saved.inside = take(panels(t.X) * inside_rows * PANEL);
    return saved;
}

static ChainJob chain_job(const ChainCall& call) {
    ChainJob job = {};
    job.net = &call.packed->trunks[0];
    job.time_table = call.time_table->data();
    job.states = call.states;
    job.noise = call.noise;
    job.seed = call.seed;
    job.N = call.N, job.R = call.B * call.N;
    job.K = call.table->K;
    job.steps = call.table->steps.data();
    job.max_action = call.max_action;
    job.bf16 = call.bf16;
    job.actions = call.actions;
    return job;
}

void chain(const ChainCall& call, SavedChain* saved) {
    ChainJob job = chain_job(call);
    const Trunk& t = *job.net;
    if (saved) {
        const int64_t rows = job.K * job.R;
        saved->packed = call.packed;
        saved->time_table = call.time_table;
        saved->B = call.B, saved->N = call.N;
        saved->memory = Buffer(saved_floats(t, rows, rows + job.R));
        saved->saved = saved_in(saved->memory.data(), t, rows, rows + job.R);
        job.saved = &saved->saved;
    }
    over_tiles(call.threads, job.R, kernels().scratch_floats(t, job.K),
               [&](int64_t first, int rows, float* scratch) { kernels().chain_tile(job, first, rows, scratch); });
}

// All candidates into actions [R][A], and which of its N a state takes: take(b, n). q_min [R] is scratch.
template <class Take>
static void draw_among(const ChainCall& call, const Packed& critic, uint64_t draw_seed, float* actions, float* q_min,
                       const Take& take) {
    ChainJob job = chain_job(call);
    const int64_t N = call.N;
    job.actions = actions;
    job.q_min = q_min;
    job.critic = critic.trunks;
    const int64_t floats = kernels().scratch_floats(*job.net, job.K) + kernels().scratch_floats(critic.trunks[0], 1);
    over_tiles(call.threads, job.R, floats,
               [&](int64_t first, int rows, float* scratch) { kernels().chain_tile(job, first, rows, scratch); });
    for (int64_t b = 0; b < call.B; ++b) {
        float* q = job.q_min + b * N;
        float largest = q[0];
        for (int64_t n = 1; n < N; ++n) largest = q[n] > largest ? q[n] : largest;
        float total = 0.0f;
        for (int64_t n = 0; n < N; ++n) q[n] = total += std::exp(q[n] - largest);
        const float draw = static_cast<float>(kernels().uniform(draw_seed, 0, static_cast<uint32_t>(b))) * total;
        int64_t index = 0;  // of a critic that has become NaN, the first: no comparison holds
        while (index + 1 < N && q[index] <= draw) ++index;
        take(b, index);
    }
}

constexpr int64_t SMALL = 1 << 14;

void select(const ChainCall& call, const Packed& critic, uint64_t draw_seed, float* chosen) {
    const int64_t A = call.packed->trunks[0].X, N = call.N, R = call.B * N;
    const int64_t needed = R * (A + 1);
    thread_local Buffer small(SMALL);  // a robot's calls allocate nothing
    Buffer large;
    if (needed > SMALL) large = Buffer(needed);
    const Buffer& memory = needed > SMALL ? large : small;
    const float* actions = memory.data();
    draw_among(call, critic, draw_seed, memory.data(), memory.data() + R * A, [&](int64_t b, int64_t n) {
        std::memcpy(chosen + b * A, actions + (b * N + n) * A, sizeof(float) * static_cast<size_t>(A));
    });
}

void draw(const ChainCall& call, const Packed& critic, uint64_t draw_seed, int64_t* index) {
    const Buffer q_min(call.B * call.N);
    draw_among(call, critic, draw_seed, call.actions, q_min.data(), [&](int64_t b, int64_t n) { index[b] = n; });
}

static void d_states(const Trunk& t, const float* d_part, int64_t B, float* out, int threads) {
    over_tiles(threads, B, (panels(t.S) + 1) * PANEL * kernels().max_rows,
               [&](int64_t first, int rows, float* scratch) {
                   kernels().states_tile(t, d_part, B, first, rows, out, scratch);
               });
}

void chain_backward(const Network& net, SavedChain& saved, const Table& table, const float* states,
                    const float* d_actions, float d_scale, const Gradients& out, int threads) {
    const Trunk& t = saved.packed->trunks[0];
    const int64_t B = saved.B, N = saved.N, R = B * N, K = table.K, P = t.P;
    ChainBackwardJob job = {};
    job.net = &t;
    job.steps = table.steps.data();
    job.R = R;
    job.K = table.K;
    job.d_actions = d_actions;
    job.d_scale = d_scale;
    job.saved = &saved.saved;
    over_tiles(threads, R, kernels().scratch_floats(t, table.K), [&](int64_t first, int rows, float* scratch) {
        kernels().chain_backward_tile(job, first, rows, scratch);
    });
    // A state's part is shared by all steps and candidates: its gradient is the sum over both.
    Buffer d_part(P * B * PANEL), d_table(K * P * PANEL);
    const int64_t extra = P * (out.flat ? 2 : 1);
    const auto sums = [&](int64_t task) {
        const int64_t p = task % P;
        const float* d_z = saved.saved.d_z[0] + p * saved.saved.rows * PANEL;
        if (task >= P) {
            for (int64_t k = 0; k < K; ++k)
                kernels().column_sums(d_z + k * R * PANEL, R, d_table.data() + (k * P + p) * PANEL, false);
            return;
        }
        if (N == 1) {
            for (int64_t k = 0; k < K; ++k)
                kernels().add(d_part.data() + p * B * PANEL, d_z + k * R * PANEL, B * PANEL, k > 0);
            return;
        }
        for (int64_t b = 0; b < B; ++b)
            for (int64_t k = 0; k < K; ++k)
                kernels().column_sums(d_z + (k * R + b * N) * PANEL, N, d_part.data() + (p * B + b) * PANEL, k > 0);
    };
    if (!out.flat) {
        parallel_for(threads, extra, [&](int64_t task, int) { sums(task); });
    } else {
        const WeightGradients weights(net, 0, out, saved.saved);
        parallel_for(threads, weights.size() + extra, [&](int64_t task, int) {
            task < weights.size() ? weights.run(task) : sums(task - weights.size());
        });
        state_gradient(net, d_part.data(), B, states, out.flat + net.spec().offsets[4], out.accumulate, threads);
        time_gradient(net, *saved.packed, saved.time_table->data(), table, d_table.data(), out);
    }
    if (out.d_states) d_states(t, d_part.data(), B, out.d_states, threads);
}

}  // namespace dql
