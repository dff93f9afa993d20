// The draw of the published acting rule, and the noise stream by itself.
#include "arithmetic.h"
#include "launch.h"

namespace dql {
namespace device {

DQL_DEVICE uint64_t seed_of(const int64_t* seed_at, uint64_t seed) {
    return seed_at != nullptr ? static_cast<uint64_t>(*seed_at) : seed;
}

// min(q_1, q_2) of candidate n; NaN if one is; -infinity behind the last.
DQL_DEVICE float pessimistic(const float* q, int64_t R, int n, int N) {
    if (n >= N) return -INFINITY;
    const float first = q[n], second = q[R + n];
    return first != first || first < second ? first : second;
}

// The running sum over the lanes before and up to this one, built from the only shuffle there is: at each turn the
// lanes of the upper half of a group of 2 d add the sum of the lower half.
DQL_DEVICE float running_sum(float value, float& total) {
    float sum = value;
    total = value;
    DQL_UNROLL
    for (int d = 1; d < 32; d *= 2) {
        const float other = shuffle_xor(total, d);
        if (lane() & d) sum += other;
        total += other;
    }
    return sum;
}

// A warp a state. A critic that has become NaN makes the sum NaN: nothing is below it, and the first candidate is
// taken.
DQL_KERNEL(THREADS, 1) choose_kernel(DQL_ARGUMENT cuda::ChooseJob job) {
    const int64_t b = static_cast<int64_t>(block_x()) * WARPS + warp();
    if (b >= job.B) return;
    const float* q = job.q + b * job.N;
    float highest = -INFINITY;
    for (int n = lane(); n < job.N; n += 32) {
        const float value = pessimistic(q, job.R, n, job.N);
        highest = value > highest || value != value ? value : highest;
    }
    DQL_UNROLL
    for (int d = 1; d < 32; d *= 2) {
        const float other = shuffle_xor(highest, d);
        highest = other > highest || other != other ? other : highest;
    }
    float sum = 0;
    for (int start = 0; start < job.N; start += 32) {
        const int n = start + lane();
        if (n < job.N) sum += exp2_approximate((pessimistic(q, job.R, n, job.N) - highest) * 1.44269504f);
    }
    float all;
    running_sum(sum, all);
    const float bar = uniform(seed_of(job.seed_at, job.seed), static_cast<uint32_t>(b), 0) * all;
    float before = 0, passed = 0;  // candidates whose cumulative sum does not exceed the bar
    for (int start = 0; start < job.N; start += 32) {
        const int n = start + lane();
        const float p = n < job.N ? exp2_approximate((pessimistic(q, job.R, n, job.N) - highest) * 1.44269504f) : 0;
        float of_these;
        const float until = before + running_sum(p, of_these);
        if (n < job.N && until <= bar) passed += 1;
        before += of_these;
    }
    float count;
    running_sum(passed, count);  // whole numbers below 2^24: exact
    const int64_t index = static_cast<int64_t>(count) < job.N ? static_cast<int64_t>(count) : job.N - 1;
    for (int a = lane(); a < job.A; a += 32) job.chosen[b * job.A + a] = job.actions[(b * job.N + index) * job.A + a];
}

DQL_KERNEL(THREADS, 1) noise_kernel(DQL_ARGUMENT cuda::NoiseJob job) {
    const int quads = (job.A + 3) / 4;
    const int64_t count = static_cast<int64_t>(job.K) * job.R * quads;
    const uint64_t seed = seed_of(job.seed_at, job.seed);
    for (int64_t i = static_cast<int64_t>(block_x()) * THREADS + thread(); i < count;
         i += static_cast<int64_t>(blocks_x()) * THREADS) {
        const int64_t place = i / quads;  // k R + row
        const int quad = static_cast<int>(i % quads);
        const float4 four = normals4(seed, static_cast<uint32_t>(place % job.R), static_cast<uint32_t>(place / job.R),
                                     static_cast<uint32_t>(quad), 0);
        const float values[4] = {four.x, four.y, four.z, four.w};
        DQL_UNROLL
        for (int j = 0; j < 4; ++j)
            if (4 * quad + j < job.A) job.out[place * job.A + 4 * quad + j] = values[j];
    }
}

}  // namespace device

namespace cuda {

void choose(const ChooseJob& job, Stream stream) {
    Grid grid;
    grid.x = (job.B + WARPS - 1) / WARPS;
    launch("the draw among candidates", device::choose_kernel, grid, job, stream);
}

void noise(const NoiseJob& job, Stream stream) {
    const int64_t quads = static_cast<int64_t>(job.K) * job.R * ((job.A + 3) / 4);
    Grid grid;
    grid.x = quads < (1 << 22) ? (quads + THREADS - 1) / THREADS : (1 << 14);
    launch("the noise", device::noise_kernel, grid, job, stream);
}

}  // namespace cuda
}  // namespace dql
