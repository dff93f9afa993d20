// What no result of the chain kernels shows: how much the blocks of a cluster send each other. In tiles of 128 rows,
// whatever the order in which weights arrive and products are made, the bits are the same: each waits for what it reads,
// and for who reads what it writes. And in a cluster whose pairs are split, a layer's partial sums lie in the buffer that
// the layer before did not use. With a single one, nothing but an exchange through other blocks would keep a warp from
// writing sums that another still reads. Whether results are right is in tests/backends/cuda.
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

// One tile of `rows` rows through two steps: what the blocks of a cluster send each other.
template <Precision P>
int64_t sent(int rows, bool all_rows, std::vector<float>& out) {
    const Mlp net = mlp({5, 3, 16, 256, 3}, device::MISH);
    const Tiling tiling = {P, 8, 1, true};
    const int K = 2;
    generator.seed(3);
    const std::vector<float> flat = random_floats(net.size, 0.1f), states = random_floats(16 * net.S),
                             embedding = random_floats(K * net.D), noise = random_floats(K * rows * net.X);
    std::vector<float> steps(K * STEP_STRIDE);
    for (int k = 0; k < K; ++k)
        for (int i = 0; i < 4; ++i) steps[k * STEP_STRIDE + i] = 0.5f;
    std::vector<char> packed(Packed(net, tiling, false, rows, K).end);
    cuda::prologue({net, tiling, false, flat.data(), embedding.data(), states.data(), rows, K, packed.data(), nullptr},
                   nullptr);
    out.assign(rows * net.X, NOT_A_NUMBER);
    cuda::ChainJob job = {};
    job.net = net, job.tiling = tiling, job.networks = 1;
    job.flat = flat.data(), job.packed = packed.data(), job.steps = steps.data(), job.noise = noise.data();
    job.B = job.R = rows, job.N = 1, job.K = K, job.max_action = 9, job.out = out.data(), job.all_rows = all_rows;
    const device::ChainArguments a = cuda::chain_arguments(job, false);
    const auto body = [&] { device::chain_kernel<P, 1, true, false>(a); };
    emulator::run(body, 8, 1, 8, THREADS, a.memory.bytes);
    return emulator::sent_bytes();
}

// Of a tile that is not full, the rows that there are: an exchange of one row is a sixteenth of one of sixteen.
template <Precision P>
void check_sent() {
    std::vector<float> few, whole;
    for (const int rows : {1, 7, 16}) {
        const int64_t a_row = 2 * (2 * 256 * element_bytes(P) * 8 + 8 * 8 * 4 * 4);  // activations twice, sums; steps
        CHECK_EQ(sent<P>(rows, false, few), rows * a_row);
        CHECK_EQ(sent<P>(rows, true, whole), 16 * a_row);
        CHECK(few == whole);
        for (const float action : few) CHECK(std::fabs(action) <= 9);
    }
}

void rows_that_nobody_asked_for_are_not_sent() {
    check_sent<Precision::BF16>();
    check_sent<Precision::FP32>();
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
    RUN(rows_that_nobody_asked_for_are_not_sent);
    RUN(many_rows_in_any_order);
    RUN(split_pairs_have_two_buffers_in_turn);
    return check::report();
}
