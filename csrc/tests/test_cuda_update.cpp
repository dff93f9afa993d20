// The kernels of an update beside chains and critics, run by the emulator, against plain loops in float64. Whatever
// they write is NaN before.
#include <algorithm>
#include <vector>

#include "../cuda/emulator/emulator.cpp"
#include "../cuda/update.cu"
#include "check.h"
#include "cuda_networks.h"

namespace {

int64_t integer_of(uint64_t seed, uint64_t high, uint64_t i) {
    return static_cast<int64_t>(philox(seed, static_cast<uint32_t>(i / 4), INTEGER_STEP, 0, 0).w[i % 4] * high >> 32);
}

void batches_are_gathered() {
    // dql.noise.integers(2024, 1000, 6)
    const int64_t known[6] = {594, 692, 84, 693, 402, 427};
    for (int i = 0; i < 6; ++i) CHECK_EQ(integer_of(2024, 1000, i), known[i]);
    for (const int S : {1, 40})
        for (const int A : {1, 33})
            for (const int64_t size : {0, 1, 1000}) {
                const int64_t B = 21, rows = size > 0 ? size : B, first = 2 * B + 1;
                const std::vector<float> states = random_floats(rows * S), actions = random_floats(rows * A),
                                         rewards = random_floats(rows), next = random_floats(rows * S),
                                         masks = random_floats(rows);
                const std::vector<float> none[5] = {std::vector<float>(B * S, NOT_A_NUMBER),
                                                    std::vector<float>(B * A, NOT_A_NUMBER),
                                                    std::vector<float>(B, NOT_A_NUMBER)};
                std::vector<float> to[5] = {none[0], none[1], none[2], none[0], none[2]}, scalars(4, NOT_A_NUMBER);
                std::vector<int64_t> t(B, -1), seeds(5, -1);  // of the last seed's 16 bytes the first half
                const uint64_t coin = 5 + size;
                cuda::begin({states.data(), actions.data(), rewards.data(), next.data(), masks.data(), to[0].data(),
                             to[1].data(), to[2].data(), to[3].data(), to[4].data(), size, 7, first, B, S, A, 5, 8,
                             t.data(), coin, ~uint64_t{0}, 2, 3, seeds.data(), 0.5f, 0.25f, scalars.data()},
                            nullptr);
                for (int64_t b = 0; b < B; ++b) {
                    const int64_t row = size > 0 ? integer_of(7, size, first + b) : b;
                    const auto same = [&](const std::vector<float>& got, const std::vector<float>& from, int width) {
                        return memcmp(got.data() + b * width, from.data() + row * width, 4 * width) == 0;
                    };
                    CHECK(same(to[0], states, S) && same(to[1], actions, A) && same(to[2], rewards, 1));
                    CHECK(same(to[3], next, S) && same(to[4], masks, 1));
                    CHECK_EQ(t[b], integer_of(8, 5, b));
                }
                CHECK(seeds == std::vector<int64_t>({-1, -1, 2, -1, 3}));
                const float picked = static_cast<float>(integer_of(coin, 2, 0));
                CHECK(scalars == std::vector<float>({picked, 1 - picked, 0.5f, 0.25f}));
            }
}

void critics_loss(int64_t B, int N) {
    const std::vector<float> q_target = random_floats(2 * B * N), rewards = random_floats(B), q = random_floats(2 * B);
    std::vector<float> masks(B), d_q(2 * B, NOT_A_NUMBER), metrics(3, NOT_A_NUMBER);
    for (int64_t b = 0; b < B; ++b) masks[b] = b % 3 > 0;
    const auto run = [&] {
        cuda::critic_loss({q_target.data(), rewards.data(), masks.data(), q.data(), 0.9f, B, N, d_q.data(),
                           metrics.data()},
                          nullptr);
    };
    run();
    double loss = 0, sum = 0, target = 0, size = 0;
    for (int64_t b = 0; b < B; ++b) {
        float best[2];
        for (int i = 0; i < 2; ++i) {
            const float* first = q_target.data() + (i * B + b) * N;
            best[i] = *std::max_element(first, first + N);
        }
        const double y = rewards[b] + double{masks[b]} * 0.9f * std::min(best[0], best[1]);
        for (int i = 0; i < 2; ++i) {
            const double off = q[i * B + b] - y;
            CHECK_NEAR(d_q[i * B + b], 2 * off / B, 1e-6 * (std::fabs(y) + 1) / B + 1e-6 * std::fabs(off) / B);
            loss += off * off / B, sum += q[i * B + b] / (2.0 * B), size += (off * off + std::fabs(y) + 1) / B;
        }
        target += y / B;
    }
    CHECK_NEAR(metrics[0], loss, 1e-6 * size);
    CHECK_NEAR(metrics[1], sum, 1e-6 * size);
    CHECK_NEAR(metrics[2], target, 1e-6 * size);
    const std::vector<float> before = metrics;
    emulator::seed(generator());
    run();
    CHECK(metrics == before);
}

void critics_losses() {
    for (const int64_t B : {1, 5, 256, 700})
        for (const int N : {1, 3, 10}) critics_loss(B, N);
}

void q_losses() {
    for (const int64_t B : {1, 5, 256, 700})
        for (const int picked : {0, 1})
            for (const bool in_memory : {false, true}) {
                const std::vector<float> q = random_floats(2 * B);
                const float flags[2] = {picked == 0 ? 1.0f : 0.0f, picked == 1 ? 1.0f : 0.0f};
                std::vector<float> d_q(2 * B, NOT_A_NUMBER), loss(1, NOT_A_NUMBER);
                cuda::q_loss({q.data(), in_memory ? flags : nullptr, in_memory ? 1 - picked : picked, 0.7f, B,
                              d_q.data(), loss.data()},
                             nullptr);
                double mean = 0, size = 0, divisor = 0;
                for (int64_t b = 0; b < B; ++b) {
                    mean += q[picked * B + b] / double(B), size += std::fabs(q[picked * B + b]) / double(B);
                    divisor += std::fabs(q[(1 - picked) * B + b]) / double(B);
                }
                CHECK_NEAR(loss[0], -mean / divisor, 2e-6 * size / divisor);
                for (int64_t b = 0; b < B; ++b) {
                    CHECK_NEAR(d_q[picked * B + b], -0.7f / divisor / B, 2e-6 / divisor / B);
                    CHECK_EQ(d_q[(1 - picked) * B + b], 0.0f);
                }
            }
}

// Steps of Adam in float64, beside float32's own.
void adam(int64_t count, float max_norm, float weight, bool in_memory) {
    std::vector<float> flat = random_floats(count), average = random_floats(count), first(count), second(count),
                       step(1), sums(cuda::MOST_SUMS, NOT_A_NUMBER), norm(1, NOT_A_NUMBER);
    std::vector<double> flat_d(flat.begin(), flat.end()), average_d(average.begin(), average.end()), m(count), v(count);
    for (int n = 1; n <= 3; ++n) {
        std::vector<float> gradient = random_floats(count, 3);
        const std::vector<float> given = gradient;
        const float scale = 1.0f / static_cast<float>(n);
        cuda::AdamJob job = {};
        job.flat = flat.data(), job.gradient = gradient.data(), job.step = step.data();
        job.exp_avg = first.data(), job.exp_avg_sq = second.data();
        job.lr = in_memory ? 0.01f : 0.01f * scale, job.lr_scale_at = in_memory ? &scale : nullptr;
        job.max_norm = max_norm;
        job.average = weight < 0 ? nullptr : average.data();
        job.weight = in_memory ? NOT_A_NUMBER : weight, job.weight_at = in_memory ? &weight : nullptr;
        job.count = count, job.sums = sums.data(), job.norm = norm.data();
        cuda::adam(job, nullptr);
        CHECK_EQ(step[0], static_cast<float>(n));
        double squares = 0;
        for (const float g : given) squares += double{g} * g;
        CHECK_NEAR(norm[0], std::sqrt(squares), 1e-6 * std::sqrt(squares));
        const double by = max_norm > 0 ? std::min(1.0, max_norm / (std::sqrt(squares) + 1e-6)) : 1;
        for (int64_t i = 0; i < count; ++i) {
            const double g = given[i] * by;
            m[i] = 0.9 * m[i] + 0.1 * g, v[i] = 0.999 * v[i] + 0.001 * g * g;
            const double root = std::sqrt(v[i] / (1 - std::pow(0.999, n)));
            flat_d[i] -= 0.01 * double{scale} * m[i] / (1 - std::pow(0.9, n)) / (root + 1e-8);
            if (weight >= 0) average_d[i] += double{weight} * (flat_d[i] - average_d[i]);
            CHECK_NEAR(gradient[i], g, 2e-6 * std::fabs(g));
            CHECK_NEAR(first[i], m[i], 2e-6 * (std::fabs(m[i]) + std::fabs(g)));
            CHECK_NEAR(second[i], v[i], 4e-6 * v[i]);
            CHECK_NEAR(flat[i], flat_d[i], 1e-6 * (std::fabs(flat_d[i]) + 1));
            CHECK_NEAR(average[i], average_d[i], 2e-6 * (std::fabs(average_d[i]) + std::fabs(flat_d[i]) + 1));
        }
    }
}

void steps_of_adam() {
    for (const int64_t count : {1, 255, 256, 3000, 70000}) {  // the last has more blocks than parts of the norm
        adam(count, 0, -1, false);
        if (count > 3000) continue;
        for (const float weight : {0.005f, 0.8f, 1.0f})
            for (const bool in_memory : {false, true}) adam(count, 1, weight, in_memory);
    }
}

}  // namespace

int main() {
    RUN(batches_are_gathered);
    RUN(critics_losses);
    RUN(q_losses);
    RUN(steps_of_adam);
    return check::report();
}
