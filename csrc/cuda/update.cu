// What an update does beside chains and critics, for dql/update_fused.py: its batch and draws, both losses of Q values
// with their gradients, a step of Adam. Every sum has one order, so the same numbers give the same bits.
#include <algorithm>

#include "arithmetic.h"
#include "launch.h"

namespace dql {
namespace device {

// Element `index` of dql.noise.integers(seed, high, ...).
DQL_DEVICE int64_t drawn(uint64_t seed, uint64_t high, uint64_t index) {
    const PhiloxWords words = philox(seed, static_cast<uint32_t>(index / 4), INTEGER_STEP, 0, 0);
    const int i = static_cast<int>(index % 4);
    const uint32_t word = i == 0 ? words.w[0] : i == 1 ? words.w[1] : i == 2 ? words.w[2] : words.w[3];
    return static_cast<int64_t>(word * high >> 32);
}

// A warp a row.
DQL_KERNEL(THREADS, 1) begin_kernel(DQL_ARGUMENT cuda::BeginJob job) {
    if (block_x() == 0 && thread() == 0) {
        job.seeds[0] = static_cast<int64_t>(job.target);
        job.seeds[2] = static_cast<int64_t>(job.bc_noise);
        job.seeds[4] = static_cast<int64_t>(job.actor);
        const float first = static_cast<float>(drawn(job.coin, 2, 0));
        job.scalars[0] = first, job.scalars[1] = 1 - first;
        job.scalars[2] = job.lr_scale, job.scalars[3] = job.ema_weight;
    }
    const int64_t b = static_cast<int64_t>(block_x()) * WARPS + warp();
    if (b >= job.B) return;
    const int64_t from = job.size > 0 ? drawn(job.rows, job.size, job.first + b) : b;
    for (int i = lane(); i < job.S; i += 32) {
        job.to_states[b * job.S + i] = job.states[from * job.S + i];
        job.to_next_states[b * job.S + i] = job.next_states[from * job.S + i];
    }
    for (int i = lane(); i < job.A; i += 32) job.to_actions[b * job.A + i] = job.actions[from * job.A + i];
    if (lane() == 0) job.to_rewards[b] = job.rewards[from];
    if (lane() == 1) job.to_masks[b] = job.masks[from];
    if (lane() == 2) job.t[b] = drawn(job.bc_t, job.T, b);
}

// COUNT numbers of each thread, summed over the block; all threads get the sums.
template <int COUNT>
DQL_DEVICE void sum_over_block(float (&each)[COUNT]) {
    float* of_warps = reinterpret_cast<float*>(shared_memory());  // [WARPS][COUNT]
    DQL_UNROLL
    for (int i = 0; i < COUNT; ++i)
        DQL_UNROLL
        for (int mask = 1; mask < 32; mask *= 2) each[i] += shuffle_xor(each[i], mask);
    sync_block();  // what was there is read
    DQL_UNROLL
    for (int i = 0; i < COUNT; ++i)
        if (lane() == 0) of_warps[warp() * COUNT + i] = each[i];
    sync_block();
    DQL_UNROLL
    for (int i = 0; i < COUNT; ++i) {
        each[i] = 0;
        DQL_UNROLL
        for (int w = 0; w < WARPS; ++w) each[i] += of_warps[w * COUNT + i];
    }
}

// The largest of `count` numbers; NaN if one is.
DQL_DEVICE float largest(const float* numbers, int count) {
    float found = numbers[0];
    for (int n = 1; n < count; ++n) {
        const float other = numbers[n];
        found = other > found || other != other ? other : found;
    }
    return found;
}

// y = r + mask discount min(max_n Q_1', max_n Q_2'); the loss is mean (Q_1 - y)^2 + mean (Q_2 - y)^2. One block.
DQL_KERNEL(THREADS, 1) critic_loss_kernel(DQL_ARGUMENT cuda::CriticLossJob job) {
    const float by = 1.0f / static_cast<float>(job.B);
    float sums[4] = {0, 0, 0, 0};  // squares, Q of both, y
    for (int64_t b = thread(); b < job.B; b += THREADS) {
        const float first = largest(job.q_target + b * job.N, job.N);
        const float second = largest(job.q_target + (job.B + b) * job.N, job.N);
        const float least = first != first || first < second ? first : second;  // NaN if one is
        const float y = job.rewards[b] + job.masks[b] * job.discount * least;
        DQL_UNROLL
        for (int i = 0; i < 2; ++i) {
            const float q = job.q[i * job.B + b], error = q - y;
            job.d_q[i * job.B + b] = 2.0f * by * error;
            sums[0] = fmaf(error, error, sums[0]);
            sums[1 + i] += q;
        }
        sums[3] += y;
    }
    sum_over_block(sums);
    if (thread() != 0) return;
    job.metrics[0] = sums[0] * by;
    job.metrics[1] = 0.5f * (sums[1] * by + sums[2] * by);
    job.metrics[2] = sums[3] * by;
}

// -mean(Q_i) / mean|Q_j| without a gradient through the divisor. One block.
DQL_KERNEL(THREADS, 1) q_loss_kernel(DQL_ARGUMENT cuda::QLossJob job) {
    const int i = job.picked_at != nullptr ? (job.picked_at[1] != 0 ? 1 : 0) : job.picked;
    const float *q = job.q + i * job.B, *other = job.q + (1 - i) * job.B;
    float sums[2] = {0, 0};
    DQL_UNROLL_BY_8
    for (int64_t b = thread(); b < job.B; b += THREADS) {
        sums[0] += q[b];
        sums[1] += fabsf(other[b]);
    }
    sum_over_block(sums);
    const float rows = static_cast<float>(job.B), divisor = sums[1] / rows, d = -job.eta / divisor / rows;
    for (int64_t b = thread(); b < job.B; b += THREADS) {
        job.d_q[i * job.B + b] = d;
        job.d_q[(1 - i) * job.B + b] = 0;
    }
    if (thread() == 0) job.loss[0] = -(sums[0] / rows) / divisor;
}

// ---- Adam, arXiv 1412.6980 as torch.optim.Adam has it: the gradient's norm, then everything else in one pass ----

constexpr float NEW1 = 0.1f, NEW2 = 0.001f;  // 1 - beta, as float32 would not have it
constexpr float BETA2 = 0.999f, EPSILON = 1e-8f;
constexpr float LOG_BETA1 = -0.105360516f, LOG_BETA2 = -0.00100050033f;

// The block's share of the squares, and once the count of steps, which nobody else touches meanwhile.
DQL_KERNEL(THREADS, 1) squares_kernel(DQL_ARGUMENT cuda::AdamJob job) {
    float sum[1] = {0};
    DQL_UNROLL_BY_8
    for (int64_t i = static_cast<int64_t>(block_x()) * THREADS + thread(); i < job.count;
         i += static_cast<int64_t>(blocks_x()) * THREADS)
        sum[0] = fmaf(job.gradient[i], job.gradient[i], sum[0]);
    sum_over_block(sum);
    if (thread() != 0) return;
    job.sums[block_x()] = sum[0];
    if (block_x() == 0) *job.step += 1;
}

DQL_KERNEL(THREADS, 1) adam_kernel(DQL_ARGUMENT cuda::AdamJob job) {
    float sum[1] = {thread() < job.parts ? job.sums[thread()] : 0};
    sum_over_block(sum);
    const float norm = square_root(sum[0]), step = *job.step;
    if (block_x() == 0 && thread() == 0) *job.norm = norm;
    float scale = 1;
    if (job.max_norm > 0) {
        scale = job.max_norm / (norm + 1e-6f);
        scale = scale > 1.0f ? 1.0f : scale;  // NaN stays
    }
    // 1 - beta^step loses nothing this way, whatever the step
    const float correction1 = -expm1f(step * LOG_BETA1), correction2 = -expm1f(step * LOG_BETA2);
    const float rate = job.lr * (job.lr_scale_at != nullptr ? *job.lr_scale_at : 1.0f) / correction1;
    const float root = 1.0f / sqrtf(correction2);
    const float weight = job.weight_at != nullptr ? *job.weight_at : job.weight;
    const int64_t i = static_cast<int64_t>(block_x()) * THREADS + thread();
    if (i >= job.count) return;
    float gradient = job.gradient[i];
    if (job.max_norm > 0) job.gradient[i] = gradient *= scale;
    const float mean = fmaf(gradient - job.exp_avg[i], NEW1, job.exp_avg[i]);
    const float square = fmaf(gradient * NEW2, gradient, job.exp_avg_sq[i] * BETA2);
    job.exp_avg[i] = mean, job.exp_avg_sq[i] = square;
    const float flat = job.flat[i] - rate * (mean / fmaf(square_root(square), root, EPSILON));
    job.flat[i] = flat;
    if (job.average == nullptr || weight == 0) return;  // 0 times infinity is NaN
    const float average = job.average[i];
    // torch.lerp's two forms: each ends at its own end
    job.average[i] = weight < 0.5f ? fmaf(weight, flat - average, average) : flat - (flat - average) * (1.0f - weight);
}

}  // namespace device

namespace cuda {

constexpr int SUMS_BYTES = 4 * WARPS * 4;

void begin(const BeginJob& job, Stream stream) {
    Grid grid;
    grid.x = (job.B + WARPS - 1) / WARPS;
    launch("an update's beginning", device::begin_kernel, grid, job, stream);
}

void critic_loss(const CriticLossJob& job, Stream stream) {
    Grid grid;
    grid.x = 1, grid.shared = SUMS_BYTES;
    launch("the critics' loss", device::critic_loss_kernel, grid, job, stream);
}

void q_loss(const QLossJob& job, Stream stream) {
    Grid grid;
    grid.x = 1, grid.shared = SUMS_BYTES;
    launch("the Q loss", device::q_loss_kernel, grid, job, stream);
}

void adam(const AdamJob& given, Stream stream) {
    AdamJob job = given;
    const int64_t blocks = (job.count + THREADS - 1) / THREADS;
    job.parts = static_cast<int>(std::min<int64_t>(blocks, MOST_SUMS));
    Grid grid;
    grid.x = job.parts, grid.shared = SUMS_BYTES;
    launch("the gradient's norm", device::squares_kernel, grid, job, stream);
    grid.x = blocks;
    launch("Adam's step", device::adam_kernel, grid, job, stream);
}

}  // namespace cuda
}  // namespace dql
