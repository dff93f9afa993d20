// The noise stream of every variant against numbers that dql.noise printed, against the same formulas in double
// precision, and against itself: a number must not depend on the call that it was made in. Prints the throughput.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../cpu/engine.h"
#include "../philox.h"
#include "check.h"

namespace {

template <class Test>
void each_variant(Test test) {
    for (const dql::Variant& variant : dql::variants())
        if (variant.kernels) test(*variant.kernels);
}

// Relative, also where cos or sin crosses zero: over all 2^23 values of u the radius is within 1.11e-7 and cos and sin
// within 1.29e-7, and the product is rounded once.
constexpr double TOLERANCE = 3e-7;

// dql.noise.normal(seed, k + 1, 1, 40, offset=offset, row_offset=row, dtype=torch.float64)[k, 0, dim]
const struct {
    uint64_t seed;
    uint32_t offset, k, row;
    int dim;
    double value;
} NORMALS[] = {
    {0ull, 0u, 0u, 0u, 0, 0.99113747514589712},
    {0ull, 0u, 0u, 0u, 1, -0.92466278035443317},
    {0ull, 0u, 0u, 0u, 2, -0.61760905498485441},
    {0ull, 0u, 0u, 0u, 3, -0.48206834726449632},
    {123ull, 0u, 4u, 7u, 0, 1.6781859107308896},
    {123ull, 0u, 4u, 7u, 1, 0.3176477990982714},
    {123ull, 0u, 4u, 7u, 4, 0.034049577605528666},
    {123ull, 0u, 4u, 7u, 5, -0.3045912415276264},
    {18446744073709551615ull, 0u, 0u, 4294967295u, 2, 0.5652793036481869},
    {18446744073709551615ull, 0u, 0u, 4294967295u, 3, 0.48787142763933172},
    {18446744073709551615ull, 0u, 0u, 4294967295u, 38, -1.7638301972740484},
    {18446744073709551615ull, 0u, 0u, 4294967295u, 39, -1.1635248026596825},
    {9223372036854775813ull, 4294967295u, 999u, 4294967294u, 1, -0.99658194685827006},
    {9223372036854775813ull, 4294967295u, 999u, 4294967294u, 17, 1.2130225100477956},
    {9223372036854775813ull, 4294967295u, 999u, 4294967294u, 31, 0.45094561481615553},
    {9223372036854775813ull, 4294967295u, 999u, 4294967294u, 32, -0.63385097624487707},
    {244837814094590ull, 3u, 2u, 65536u, 0, -0.11902369880977537},
    {244837814094590ull, 3u, 2u, 65536u, 5, 1.007984892507245},
    {244837814094590ull, 3u, 2u, 65536u, 10, -1.3553116380467956},
    {244837814094590ull, 3u, 2u, 65536u, 15, 0.87718443892561493},
};

void matches_python_normals() {
    each_variant([](const dql::Kernels& kernels) {
        for (const auto& expected : NORMALS) {
            float out[64];
            kernels.normals(expected.seed, expected.offset, expected.k, 1, expected.row, 1, 40, out, 64, 32);
            CHECK_NEAR(out[expected.dim], expected.value, TOLERANCE * std::fabs(expected.value));
        }
    });
}

// dql.noise.uniform(seed, row + 1, offset=offset)[row]
const struct {
    uint64_t seed;
    uint32_t offset, row;
    double value;
} UNIFORMS[] = {
    {0ull, 0u, 0u, 0.96172481775283813},
    {18446744073709551615ull, 0u, 5u, 0.29340368509292603},
    {18446744073709551614ull, 9u, 255u, 0.57063978910446167},
    {42ull, 4294967295u, 3u, 0.82309466600418091},
};

void matches_python_uniforms() {
    each_variant([](const dql::Kernels& kernels) {
        for (const auto& expected : UNIFORMS)
            CHECK_EQ(kernels.uniform(expected.seed, expected.offset, expected.row), expected.value);
    });
}

// dql.noise.integers(seed, high, index + 1, offset=offset)[index]
const struct {
    uint64_t seed;
    uint32_t offset;
    uint64_t high;
    int64_t index;
    int32_t value;
} INTEGERS[] = {
    {0ull, 0u, 1ull, 0, 0},
    {0ull, 0u, 1ull, 7, 0},
    {18446744073709551615ull, 0u, 1000000ull, 0, 734688},
    {18446744073709551615ull, 0u, 1000000ull, 1, 853452},
    {18446744073709551615ull, 0u, 1000000ull, 2, 309285},
    {18446744073709551615ull, 0u, 1000000ull, 3, 929263},
    {18446744073709551615ull, 0u, 1000000ull, 4, 254339},
    {18446744073709551615ull, 0u, 1000000ull, 101, 671120},
    {7ull, 2u, 2147483648ull, 0, 513165288},
    {7ull, 2u, 2147483648ull, 5, 1828653035},
    {7ull, 2u, 2147483648ull, 63, 1470726510},
    {7ull, 2u, 2147483648ull, 64, 2126115893},
    {7ull, 2u, 2147483648ull, 1000, 314978734},
    {99ull, 0u, 3ull, 17, 2},
    {99ull, 0u, 3ull, 18, 0},
};

void matches_python_integers() {
    each_variant([](const dql::Kernels& kernels) {
        for (const auto& expected : INTEGERS) {
            int32_t alone = -1;
            kernels.integers(expected.seed, expected.offset, expected.high, expected.index, 1, &alone);
            CHECK_EQ(alone, expected.value);
            std::vector<int32_t> all(static_cast<size_t>(expected.index) + 1);
            kernels.integers(expected.seed, expected.offset, expected.high, 0, expected.index + 1, all.data());
            CHECK_EQ(all.back(), expected.value);
        }
        std::vector<int32_t> all(1000), part(1000);
        kernels.integers(5, 1, 1000, 0, 1000, all.data());
        for (const int64_t first : {1, 3, 4, 66, 999})
            for (const int64_t count : {0, 1, 5, 200}) {
                if (first + count > 1000) continue;
                part.assign(1000, -7);
                kernels.integers(5, 1, 1000, first, count, part.data());
                for (int64_t i = 0; i < 1000; ++i)
                    CHECK_EQ(part[static_cast<size_t>(i)], i < count ? all[static_cast<size_t>(first + i)] : -7);
            }
    });
}

double exact_normal(uint64_t seed, uint32_t offset, uint32_t k, uint32_t row, int dim) {
    const dql::PhiloxWords words = dql::philox(seed, row, k, static_cast<uint32_t>(dim / 4), offset);
    const int pair = dim % 4 / 2 * 2;
    const double radius = std::sqrt(-2.0 * std::log(dql::unit_double(words.w[pair])));
    const double angle = 2.0 * 3.14159265358979323846 * dql::unit_double(words.w[pair + 1]);
    return radius * (dim % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

void accurate_and_normal() {
    constexpr int steps = 8, rows = 4096, dims = 32;  // 2^20 numbers
    std::vector<float> out(size_t{steps} * rows * dims);
    each_variant([&](const dql::Kernels& kernels) {
        kernels.normals(2024, 0, 3, steps, 17, rows, dims, out.data(), rows * dims, 0);
        double worst = 0.0, moment[5] = {};
        size_t at = 0;
        for (uint32_t k = 3; k < 3 + steps; ++k)
            for (uint32_t row = 17; row < 17 + rows; ++row)
                for (int dim = 0; dim < dims; ++dim, ++at) {
                    const double exact = exact_normal(2024, 0, k, row, dim), x = out[at];
                    worst = std::fmax(worst, (std::fabs(x - exact) - 1e-15) / std::fabs(exact));
                    for (int power = 1; power <= 4; ++power) moment[power] += std::pow(x, power);
                }
        const double n = static_cast<double>(at), deviations = 5.0 / std::sqrt(n);
        CHECK_NEAR(worst, 0.0, TOLERANCE);
        CHECK_NEAR(moment[1] / n, 0.0, deviations);
        CHECK_NEAR(moment[2] / n, 1.0, deviations * std::sqrt(2.0));  // the variance of x^2, and so on
        CHECK_NEAR(moment[3] / n, 0.0, deviations * std::sqrt(15.0));
        CHECK_NEAR(moment[4] / n, 3.0, deviations * std::sqrt(96.0));
        std::printf("    %-10s within %.2e of float64, relative\n", kernels.name, worst);
    });
}

// Every cut of a block of normals gives the bits of the whole, and writes nothing else.
void independent_of_tiling() {
    constexpr int steps = 3, rows = 37, gap = 5;
    constexpr float poison = -12345.0f;
    const uint64_t seed = (uint64_t{1} << 40) + 9;
    const uint32_t row0 = 0xffffffffu - rows + 1, k0 = 2, offset = 6;  // up to the last row id there is
    each_variant([&](const dql::Kernels& kernels) {
        for (const int A : {1, 2, 3, 4, 6, 17, 31, 32, 33, 40, 64, 70}) {
            const int64_t panels = dql::panels(A), panel_stride = rows * 32 + gap;
            const int64_t step_stride = panels * panel_stride + gap;
            const auto fill = [&](int row_cut, int step_cut) {
                std::vector<float> out(static_cast<size_t>(steps * step_stride), poison);
                for (int s = 0; s < steps; s += step_cut)
                    for (int r = 0; r < rows; r += row_cut)
                        kernels.normals(seed, offset, k0 + static_cast<uint32_t>(s), std::min(step_cut, steps - s),
                                        row0 + static_cast<uint32_t>(r), std::min(row_cut, rows - r), A,
                                        out.data() + s * step_stride + r * 32, step_stride, panel_stride);
                return out;
            };
            const std::vector<float> whole = fill(rows, steps);
            std::vector<bool> inside(whole.size());
            for (int s = 0; s < steps; ++s)
                for (int r = 0; r < rows; ++r)
                    for (int a = 0; a < A; ++a) {
                        const auto at =
                            static_cast<size_t>(s * step_stride + a / 32 * panel_stride + r * 32 + a % 32);
                        inside[at] = true;
                        const double exact = exact_normal(seed, offset, k0 + static_cast<uint32_t>(s),
                                                          row0 + static_cast<uint32_t>(r), a);
                        CHECK_NEAR(whole[at], exact, TOLERANCE * std::fabs(exact) + 1e-15);
                    }
            for (size_t i = 0; i < whole.size(); ++i)
                if (!inside[i]) CHECK_EQ(whole[i], poison);
            for (const int row_cut : {1, 2, 5, 16, 36})
                for (const int step_cut : {1, 2}) {
                    const std::vector<float> cut = fill(row_cut, step_cut);
                    CHECK(std::memcmp(cut.data(), whole.data(), whole.size() * sizeof(float)) == 0);
                }
        }
        float untouched = poison;
        kernels.normals(seed, offset, k0, 0, row0, rows, 6, &untouched, 0, 0);
        kernels.normals(seed, offset, k0, steps, row0, 0, 6, &untouched, 0, 0);
        CHECK_EQ(untouched, poison);
    });
}

double nanoseconds(const dql::Kernels& kernels, int steps, int rows, int A, float* out) {
    double best = 1e9;
    for (int sample = 0; sample < 20; ++sample) {
        constexpr int calls = 20;
        const auto start = std::chrono::steady_clock::now();
        for (int call = 0; call < calls; ++call)
            kernels.normals(static_cast<uint64_t>(call), 0, 0, steps, 0, rows, A, out, rows * 32, rows * 32);
        const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
        best = std::min(best, spent.count() / calls);
    }
    return best;
}

void throughput() {
    std::vector<float> out(size_t{5} * 64 * 32);
    each_variant([&](const dql::Kernels& kernels) {
        const double row = nanoseconds(kernels, 5, 1, 6, out.data());
        const double wide = nanoseconds(kernels, 5, 64, 32, out.data()) / (5 * 64 * 32);
        const double narrow = nanoseconds(kernels, 5, 64, 6, out.data()) / (5 * 64 * 6);
        std::printf("    %-10s %.2f ns a normal (%.2f where A = 6), %.0f ns for one row of A = 6, K = 5\n",
                    kernels.name, wide, narrow, row);
    });
}

}  // namespace

int main() {
    RUN(matches_python_normals);
    RUN(matches_python_uniforms);
    RUN(matches_python_integers);
    RUN(accurate_and_normal);
    RUN(independent_of_tiling);
    RUN(throughput);
    return check::report();
}
