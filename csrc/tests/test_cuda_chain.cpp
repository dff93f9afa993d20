// What no result of the chain kernel shows: in a cluster whose pairs are split, a layer's partial sums lie in the buffer
// that the layer before did not use. With a single one, nothing but an exchange through other blocks would keep a warp
// from writing sums that another still reads. Whether results are right is in tests/backends/cuda.
#include <vector>

#include "../cuda/emulator/emulator.cpp"
#define PRECISION Precision::BF16
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"  // as csrc/build_cuda.py has it
#include "../cuda/chain_kernels.h"
#include "check.h"
#include "cuda_networks.h"

namespace {

// One tile through two steps, all weights zero.
template <Precision P>
void check_sums(int H, int cluster) {
    const Mlp net = mlp({5, 3, 16, H, 3}, device::RELU);
    const Tiling tiling = {P, cluster, 1, true};
    const int K = 2, B = 16;
    const std::vector<float> flat(net.size), steps(K * STEP_STRIDE), noise = random_floats(K * B * net.X);
    const std::vector<char> packed(Packed(net, tiling, false, B, K).end);
    std::vector<float> out(B * net.X);
    cuda::ChainJob job = {};
    job.net = net, job.tiling = tiling, job.networks = 1;
    job.flat = flat.data(), job.packed = packed.data(), job.steps = steps.data(), job.noise = noise.data();
    job.B = job.R = B, job.N = 1, job.K = K, job.max_action = 1, job.out = out.data();
    const device::ChainArguments a = cuda::chain_arguments(job, false);
    CHECK(a.division.split > 1);
    CHECK(a.memory.sums_apart > 0);
    int unused = 0, blocks = 0;
    const auto body = [&] {
        device::chain_kernel<P, 1, true, false>(a);
        if (device::thread() != 0) return;
        ++blocks;
        for (int w = 0; w < a.division.pairs * a.division.split; ++w)
            for (const int buffer : {a.memory.sums, a.memory.sums + a.memory.sums_apart}) {
                uint32_t first;  // shared memory starts with all bits set
                memcpy(&first, device::shared_memory() + buffer + w * 1024, 4);
                unused += first == 0xffffffffu;
            }
    };
    emulator::run(body, cluster, 1, cluster, THREADS, a.memory.bytes);
    CHECK_EQ(blocks, cluster);
    CHECK_EQ(unused, 0);
}

void split_pairs_have_two_buffers_in_turn() {
    for (const int cluster : {4, 8}) {
        check_sums<Precision::BF16>(256, cluster);
        check_sums<Precision::TF32>(128, cluster);
        check_sums<Precision::FP32>(128, cluster);
    }
}

}  // namespace

int main() {
    RUN(split_pairs_have_two_buffers_in_turn);
    return check::report();
}
