// What no result of the chain kernels shows: how much the blocks of a cluster send each other. In tiles of 128 rows,
// whatever the order in which weights arrive and products are made, the bits are the same: each waits for what it reads,
// and for who reads what it writes. And in a cluster whose pairs are split, a layer's partial sums lie in the buffer that
// the layer before did not use. With a single one, nothing but an exchange through other blocks would keep a warp from
// writing sums that another still reads. Whether results are right is in tests/backends/cuda.
#include <algorithm>
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

// Three tiles of a chain and three of a cloned batch, by one cluster or by more of them than tiles, in every order: the
// same bits, all memory as large as it is said to be, and the loss that of its rows.
template <Precision P>
void check_cloning(int H, int L, const Tiling& tiling, bool chain, bool predict_epsilon) {
    const Mlp net = mlp({5, 3, 16, H, L}, device::MISH);
    const int T = 3, K = chain ? T : 0, B = 2 * tiling.rows() + 3;
    const int64_t RP = whole_tiles(B, tiling);
    const std::vector<float> flat = random_floats(net.size, 0.2f), states = random_floats(B * net.S),
                             embedding = random_floats(T * net.D), steps = random_floats(T * STEP_STRIDE, 0.5f),
                             actions = random_floats(B * net.X), d_actions = random_floats(B * net.X),
                             q_sample = random_floats(2 * T);
    std::vector<int64_t> t(B);
    for (int64_t& one : t) one = static_cast<int64_t>(generator() % T);
    const SavedPlaces places(net, tiling, 1, RP, K, 1);
    const BackwardPlaces back_places(net, tiling, 1, RP, K, 1);
    std::vector<char> packed(Packed(net, tiling, true, B, T).end, static_cast<char>(0xff)), first_saved, first_back;
    for (int turn = 0; turn < 6; ++turn) {
        emulator::order(turn < 2 ? emulator::Order::EAGER : turn < 4 ? emulator::Order::LATE : emulator::Order::RANDOM);
        emulator::seed(turn);
        std::vector<char> saved(places.end, static_cast<char>(0xff)), back(back_places.end, static_cast<char>(0xff));
        std::vector<float> out(chain ? B * net.X : 0, NOT_A_NUMBER), loss(1, NOT_A_NUMBER);
        int32_t* counter = reinterpret_cast<int32_t*>(saved.data() + places.counter);
        cuda::prologue({net, tiling, true, flat.data(), embedding.data(), states.data(), B, T, packed.data(), nullptr,
                        counter},
                       nullptr);
        cuda::ChainJob job = {};
        job.net = net, job.tiling = tiling, job.transposed = true, job.networks = 1;
        job.flat = flat.data(), job.packed = packed.data(), job.steps = steps.data();
        job.B = job.R = B, job.N = 1, job.K = K, job.max_action = 1, job.seed = 3;
        job.out = out.data(), job.saved = saved.data();
        job.cloning = {actions.data(), t.data(), q_sample.data(), nullptr, 4, T, predict_epsilon, loss.data()};
        job.d_out = d_actions.data(), job.back = back.data();
        const int clusters = turn % 2 == 0 ? 1 : 7;
        const auto run = [&](bool backward) {
            const device::ChainArguments a = cuda::chain_arguments(job, backward);
            const cuda::ChainKernel kernel = cuda::chain_kernel_for<P>(tiling, backward);
            emulator::run([&] { kernel(a); }, std::min(clusters, a.tiles) * tiling.cluster, 1, tiling.cluster, THREADS,
                          a.memory.bytes);
        };
        run(false);
        CHECK_EQ(*counter, static_cast<int32_t>(RP / tiling.rows()));
        double squares = 0;
        const float* d_prediction = reinterpret_cast<const float*>(saved.data() + places.raws) + (K + 1) * RP * net.X;
        for (int i = 0; i < B * net.X; ++i) {
            const double off = d_prediction[i] * double(B * net.X) / 2;
            squares += off * off;
        }
        CHECK_NEAR(loss[0], squares / (B * net.X), 1e-5 * loss[0]);
        run(true);
        const float* d_out = reinterpret_cast<const float*>(back.data() + back_places.d_out) + K * RP * net.X;
        for (int i = 0; i < RP * net.X; ++i) CHECK_EQ(d_out[i], i < B * net.X ? d_prediction[i] : 0.0f);
        if (turn == 0) first_saved = saved, first_back = back;
        const auto same = [&](const std::vector<char>& left, const std::vector<char>& right, int64_t from, int64_t to) {
            return memcmp(left.data() + from, right.data() + from, to - from) == 0;
        };
        CHECK(same(saved, first_saved, places.h, places.raws));
        CHECK(same(saved, first_saved, places.errors, places.end));
        CHECK(same(back, first_back, 0, back_places.end));
    }
    emulator::order(emulator::Order::RANDOM);
}

void a_batch_is_cloned_in_any_order() {
    check_cloning<PRECISION>(40, 2, {PRECISION, 1, 1, false}, true, true);
    check_cloning<PRECISION>(40, 3, {PRECISION, 1, 2, false}, false, false);
    check_cloning<PRECISION>(200, 2, {PRECISION, 4, 1, true}, true, false);
    check_cloning<PRECISION>(64, 3, {PRECISION, 8, 1, true}, false, true);
    check_cloning<PRECISION>(64, 4, {PRECISION, 2, 2, true}, true, true);
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
    RUN(a_batch_is_cloned_in_any_order);
    RUN(many_rows_in_any_order);
    RUN(split_pairs_have_two_buffers_in_turn);
    return check::report();
}
