// What no result of the chain kernels shows. In tiles of 128 rows, whatever the order in which weights arrive and products
// are made, the bits are the same: each waits for what it reads, and for who reads what it writes. And in a cluster whose
// pairs are split, a layer's partial sums lie in the buffer that the layer before did not use. With a single one, nothing
// but an exchange through other blocks would keep a warp from writing sums that another still reads. Whether results are
// right is in tests/backends/cuda.
#include <vector>

#include "../cuda/emulator/emulator.cpp"
#define PRECISION Precision::BF16
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"  // as csrc/build_cuda.py has it
#include "../cuda/chain_kernels.h"
#include "../cuda/chain_wide.cu"
#include "../cuda/prologue.cu"
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

// Three tiles by one block, in which two steps each have a row of the time table in turn.
void check_orders(const Sizes& sizes, FirstLayer first) {
    const Mlp net = mlp(sizes, device::MISH);
    const Tiling tiling = {Precision::BF16, 1, WIDE_M_TILES, false};
    const int K = 3, B = 300;
    const std::vector<float> flat = random_floats(net.size, 0.1), states = random_floats(B * net.S),
                             embedding = random_floats(K * net.D), steps = random_floats(K * STEP_STRIDE, 0.5),
                             noise = random_floats(K * B * net.X);
    std::vector<char> packed(Packed(net, tiling, false, B, K).end, static_cast<char>(0xff));
    std::vector<float> out(B * net.X), before;
    int32_t told = 0;
    emulator::order(emulator::Order::RANDOM);
    cuda::prologue({net, tiling, false, flat.data(), embedding.data(), states.data(), B, K, packed.data(), &told},
                   nullptr);
    cuda::ChainJob job = {};
    job.net = net, job.tiling = tiling, job.networks = 1;
    job.flat = flat.data(), job.packed = packed.data(), job.steps = steps.data(), job.noise = noise.data();
    job.states = states.data(), job.told = &told;
    job.B = job.R = B, job.N = 1, job.K = K, job.max_action = 2, job.out = out.data();
    const device::ChainArguments a = cuda::chain_arguments(job, false);
    CHECK_EQ(a.memory.first_layer() == first, true);
    const cuda::ChainKernel kernel = cuda::wide_chain_kernel_for(a.HP, first);
    for (const emulator::Order order : {emulator::Order::EAGER, emulator::Order::LATE, emulator::Order::RANDOM})
        for (uint64_t seed = 0; seed < (order == emulator::Order::RANDOM ? 2 : 1); ++seed) {
            emulator::order(order);
            emulator::seed(seed);
            std::fill(out.begin(), out.end(), NOT_A_NUMBER);
            emulator::run([&] { kernel(a); }, 1, 1, 1, WIDE_THREADS, a.memory.bytes);
            if (before.empty()) before = out;
            CHECK(memcmp(out.data(), before.data(), out.size() * 4) == 0);
            for (const float x : out) CHECK(std::isfinite(x));
        }
    CHECK_EQ(told, 0);
    emulator::order(emulator::Order::RANDOM);
}

void many_rows_in_any_order() {
    check_orders({17, 6, 16, 100, 2}, FirstLayer::PRODUCT);
    check_orders({29, 8, 16, 256, 2}, FirstLayer::PRODUCT);
    check_orders({60, 9, 16, 256, 2}, FirstLayer::IN_SHARED);
}

}  // namespace

int main() {
    RUN(many_rows_in_any_order);
    RUN(split_pairs_have_two_buffers_in_turn);
    return check::report();
}
