// The CUDA kernels around the chain, run by the emulator, against plain double loops: what a chain needs before it
// starts, the draw, the noise. Whatever they write is NaN before.
#include <algorithm>
#include <vector>

#include "../cuda/emulator/emulator.cpp"
#include "../cuda/prologue.cu"
#include "../cuda/select.cu"
#include "check.h"
#include "cuda_networks.h"

namespace {

// ---- arithmetic.h ----

void activations_are_accurate() {
    for (const int kind : {device::MISH, device::RELU, device::SILU}) {
        for (double z = -130; z < 130; z += 0.0137) {
            const float x = static_cast<float>(z);
            double slope;
            const double h = activation_of(x, kind, &slope);
            const device::Activated both = device::activate_with_slope(x, kind);
            // 2^y is as exact as y, which grows with z; it is 0 where it would be denormal.
            const double relative = 5e-7 + (z < 0 ? -1e-7 * z : 0);
            CHECK_NEAR(both.h, h, relative * std::fabs(h) + 2e-36);
            CHECK_NEAR(both.slope, slope, relative * std::fabs(slope) + 4e-7);
            CHECK_EQ(device::activate(x, kind), both.h);
            float brief[1] = {x};
            device::activate_all_briefly(brief, kind);
            CHECK_NEAR(brief[0], h, relative * std::fabs(h) + (kind == device::MISH ? 2.4e-7 * std::fabs(z) : 2e-36));
        }
        for (const float huge : {1e4f, 3e38f, INFINITE}) {
            CHECK_EQ(device::activate(huge, kind), huge);
            CHECK_EQ(device::activate_with_slope(huge, kind).slope, 1.0f);
            CHECK_EQ(device::activate(-huge, kind), 0.0f);
            CHECK_EQ(device::activate_with_slope(-huge, kind).slope, 0.0f);
        }
        const device::Activated none = device::activate_with_slope(NOT_A_NUMBER, kind);
        CHECK(none.h != none.h && none.slope != none.slope);
        CHECK(std::isnan(device::activate(NOT_A_NUMBER, kind)));
        float brief[4] = {1e30f, -1e30f, 0.0f, NOT_A_NUMBER};
        device::activate_all_briefly(brief, kind);
        CHECK(brief[0] == 1e30f && brief[1] == 0 && brief[2] == 0 && std::isnan(brief[3]));
    }
}

void parts_add_up() {
    for (const float x : random_floats(1000, 100)) {
        const device::Parts parts = device::parts_of(x);
        CHECK_EQ(parts.high, rounded(x, Precision::BF16));
        CHECK_NEAR(double{parts.high} + rounded(parts.low, Precision::BF16), x, 0x1p-17 * std::fabs(x));
    }
    const float largest = std::numeric_limits<float>::max();
    for (const float x : {0.0f, 1.0f, -1.5f, 1e-30f, 3.3e38f, -3.4e38f, largest, -largest}) {
        const device::Parts parts = device::parts_of(x);
        CHECK(std::isfinite(parts.high) && std::isfinite(rounded(parts.low, Precision::BF16)));
        CHECK_NEAR(double{parts.high} + rounded(parts.low, Precision::BF16), x, 0x1p-16 * std::fabs(x));
    }
    CHECK(std::isnan(device::parts_of(NOT_A_NUMBER).high) && std::isnan(device::parts_of(NOT_A_NUMBER).low));
}

double exact_normal(uint64_t seed, uint32_t row, uint32_t k, uint32_t dim) {
    const PhiloxWords words = philox(seed, row, k, dim / 4, 0);
    const double length = std::sqrt(-2 * std::log(unit_double(words.w[dim % 4 / 2 * 2])));
    const double angle = 2 * M_PI * unit_double(words.w[dim % 4 / 2 * 2 + 1]);
    return length * (dim % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

void uniforms_are_exact() {
    for (const uint32_t word : {0u, 511u, 512u, 0x7fffffffu, 0x80000000u, 0xffffffffu})
        CHECK_EQ(double{device::unit(word)}, unit_double(word));
    for (uint32_t row = 0; row < 1000; ++row)
        CHECK_EQ(double{device::uniform(row * 0x9e3779b97f4a7c15u, row, 3)},
                 unit_double(philox(row * 0x9e3779b97f4a7c15u, row, UNIFORM_STEP, 0, 3).w[0]));
}

// ---- select.cu ----

void noise_is_the_stream() {
    for (const int A : {1, 3, 4, 6, 24, 63})
        for (const int K : {1, 5})
            for (const bool in_memory : {false, true}) {
                const int64_t R = 7, seed = in_memory ? -5 : 0x123456789abcdefll;
                std::vector<float> out(K * R * A, NOT_A_NUMBER);
                const uint64_t given = in_memory ? 1 : static_cast<uint64_t>(seed);
                cuda::noise({in_memory ? &seed : nullptr, given, R, K, A, out.data()}, nullptr);
                for (int64_t i = 0; i < K * R * A; ++i) {
                    const double exact = exact_normal(static_cast<uint64_t>(seed), static_cast<uint32_t>(i / A % R),
                                                      static_cast<uint32_t>(i / A / R), static_cast<uint32_t>(i % A));
                    CHECK_NEAR(out[i], exact, 2e-6 * (1 + std::fabs(exact)));
                }
            }
    // dql.noise.normal(2024, 3, 5, 6)[2, 4]
    const float known[6] = {0.25278245f, -0.47944497f, 0.82663336f, 0.90562106f, 0.34445885f, 0.29685944f};
    std::vector<float> out(3 * 5 * 6, NOT_A_NUMBER);
    cuda::noise({nullptr, 2024, 5, 3, 6, out.data()}, nullptr);
    for (int dim = 0; dim < 6; ++dim) CHECK_NEAR(out[(2 * 5 + 4) * 6 + dim], known[dim], 3e-6);
}

// The candidate of state b by plain sums; -1 where rounding decides.
int chosen_of(const std::vector<float>& q, int64_t R, int64_t b, int N, uint64_t seed) {
    std::vector<double> p(N);
    double highest = -INFINITY, sum = 0;
    for (int n = 0; n < N; ++n) {
        const float first = q[b * N + n], second = q[R + b * N + n];
        if (first != first || second != second) return 0;  // nothing is below NaN
        highest = std::max<double>(highest, std::min(first, second));
    }
    for (int n = 0; n < N; ++n) {
        p[n] = std::exp(std::min(q[b * N + n], q[R + b * N + n]) - highest);
        sum += p[n];
    }
    const double bar = double{device::uniform(seed, static_cast<uint32_t>(b), 0)} * sum;
    double until = 0;
    for (int n = 0; n < N; ++n) {
        until += p[n];
        if (std::fabs(until - bar) < 1e-5 * sum && n + 1 < N) return -1;
        if (until > bar) return n;
    }
    return N - 1;
}

void candidates_are_drawn() {
    int unclear = 0, draws = 0;
    for (const int N : {1, 3, 32, 50, 1000})
        for (const int A : {1, 6, 64}) {
            const int64_t B = N > 100 ? 9 : 41, R = B * N;
            std::vector<float> q = random_floats(2 * R, 2), actions = random_floats(R * A);
            if (N > 1) {
                q[1] = NOT_A_NUMBER;              // state 0, the first critic
                q[R + N + N - 1] = NOT_A_NUMBER;  // state 1, the second, its last candidate
                std::fill_n(q.begin() + 2 * N, N, 3e38f);  // all of state 2 alike
                std::fill_n(q.begin() + R + 2 * N, N, 3e38f);
                q[3 * N + N / 2] = -INFINITE;  // never chosen
            }
            const int64_t seed = 99 + N;
            for (const bool in_memory : {false, true}) {
                std::vector<float> chosen(B * A, NOT_A_NUMBER);
                const uint64_t given = in_memory ? 0 : static_cast<uint64_t>(seed);
                const int64_t* seed_at = in_memory ? &seed : nullptr;
                cuda::choose({q.data(), actions.data(), seed_at, given, B, R, N, A, chosen.data()}, nullptr);
                for (int64_t b = 0; b < B; ++b) {
                    const int n = chosen_of(q, R, b, N, static_cast<uint64_t>(seed));
                    ++draws, unclear += n < 0;
                    for (int a = 0; n >= 0 && a < A; ++a) CHECK_EQ(chosen[b * A + a], actions[(b * N + n) * A + a]);
                }
            }
        }
    CHECK(50 * unclear < draws);
}

// ---- prologue.cu ----

void chunks_have_one_place() {
    for (const int H : {1, 17, 64, 200})
        for (const Tiling& tiling : tilings()) {
            const Slices s(mlp({5, 3, 16, H, 2}, 0), tiling);
            const int per_lane = 16 / s.element;
            for (int chunk = 0; chunk < s.layer_bytes() / 16; ++chunk) {
                const device::Place place = device::place_of(s, chunk);
                for (int e = 0; e < per_lane; ++e) {
                    const int64_t index = operand_index(s, 0, place.column, device::k_of(s, place, e));
                    if (index != int64_t{chunk} * per_lane + e) CHECK_EQ(index, int64_t{chunk} * per_lane + e);
                }
            }
        }
}

void check_prologue(const Sizes& sizes, const Tiling& tiling, int64_t B, int K, int activation, bool transposed) {
    const Mlp net = mlp(sizes, activation);
    const Slices s(net, tiling);
    const Packed places(net, tiling, transposed, B, K);
    const std::vector<float> flat = random_floats(net.size, 0.5), states = random_floats(B * net.S),
                             embedding = random_floats(K * net.D);
    std::vector<char> packed(places.end, static_cast<char>(0xff));
    cuda::prologue({net, tiling, transposed, flat.data(), net.D > 0 ? embedding.data() : nullptr, states.data(), B, K,
                    packed.data(), nullptr},
                   nullptr);
    for (int network = 0; network < net.networks; ++network) {
        const float* w = flat.data() + network * net.apart;
        for (int column = 0; column < s.HP; ++column) {
            const int rank = column / s.NS, within = column % s.NS;
            const bool real = column < net.H;
            const int64_t floats_at = places.floats + network * places.floats_apart + (rank * s.floats() + within) * 4;
            const float* floats = reinterpret_cast<const float*>(packed.data() + floats_at);
            const float* first_row = w + net.first + int64_t{real ? column : 0} * net.stride;
            for (int x = 0; x < net.X; ++x) CHECK_EQ(floats[x * s.NS], real ? first_row[net.x_column + x] : 0.0f);
            for (int o = 0; !s.wide && o < net.O; ++o)
                CHECK_EQ(floats[(net.X + o) * s.NS], real ? w[net.out + o * net.H + column] : 0.0f);
            for (int layer = 0; layer < net.L - 1; ++layer) {
                CHECK_EQ(floats[(net.X + net.O + layer) * s.NS], real ? w[net.hidden_bias[layer] + column] : 0.0f);
                for (int turned = 0; turned < (transposed ? 2 : 1); ++turned) {
                    const char* operands = packed.data() + places.operands + network * places.operands_apart +
                                           (turned * tiling.cluster + rank) * s.operand_bytes();
                    for (int k = 0; k < s.HP; ++k) {
                        const int64_t from = turned ? int64_t{k} * net.H + column : int64_t{column} * net.H + k;
                        float number = 0;
                        if (real && k < net.H) number = rounded(w[net.hidden[layer] + from], tiling.precision);
                        const uint32_t bits = bits_of(operands, operand_index(s, layer, within, k), tiling.precision);
                        if (bits != device::as_bits(number)) CHECK_EQ(device::as_float(bits), number);
                    }
                }
            }
            // Of the first layer in slabs: zeros between x and the states and behind them, two bf16 of each weight.
            const int narrow = (net.X + 3) / 4 * 4;
            for (int i = 0; i < s.slabs * 32; ++i) {
                int from = -1;
                if (i < net.X) from = net.x_column + i;
                if (i >= narrow && i < narrow + net.S) from = net.state_column + i - narrow;
                const float weight = real && from >= 0 ? first_row[from] : 0;
                const char* slab = packed.data() + places.first + i / 32 * s.HP * 128;
                const int row = wide_row(column);
                const float high = device::as_float(bits_of(slab, wide_place(row, i % 32) / 2, Precision::BF16));
                const float low = device::as_float(bits_of(slab, wide_place(row, 32 + i % 32) / 2, Precision::BF16));
                CHECK_EQ(high, rounded(weight, Precision::BF16));
                CHECK_NEAR(double{high} + low, weight, 0x1p-17 * std::fabs(weight));
            }
            for (int64_t b = 0; s.slabs == 0 && b < B; ++b) {
                double sum = real && net.D == 0 ? w[net.first_bias + column] : 0;
                for (int j = 0; real && j < net.S; ++j)
                    sum += double{first_row[net.state_column + j]} * states[b * net.S + j];
                const float* part = reinterpret_cast<const float*>(packed.data() + places.state_part);
                CHECK_NEAR(part[(network * B + b) * s.HP + column], sum, real ? 2e-6 * (net.S + 4) : 0);
            }
        }
    }
    for (int network = 0; s.wide && network < net.networks; ++network) {  // the last layer's, in parts
        const float* w_out = flat.data() + network * net.apart + net.out;
        const char* words = packed.data() + places.floats + network * places.floats_apart + net.X * s.HP * 4;
        for (int o = 0; o < net.O; ++o)
            for (int column = 0; column < s.HP; ++column) {
                const int word = ((column / 16 * net.O + o) * 4 + column % 16 / 4) * 4 + column % 4 / 2;
                const float high = device::as_float(bits_of(words, 2 * word + column % 2, Precision::BF16));
                const float low = device::as_float(bits_of(words, 2 * (word + 2) + column % 2, Precision::BF16));
                const float weight = column < net.H ? w_out[o * net.H + column] : 0;
                CHECK_EQ(high, rounded(weight, Precision::BF16));
                CHECK_NEAR(double{high} + low, weight, 0x1p-17 * std::fabs(weight));
            }
    }
    for (int k = 0; net.D > 0 && k < K; ++k) {
        const TimeMlp time(net, flat, embedding.data() + k * net.D);
        for (int column = 0; column < s.HP; ++column) {
            double sum = column < net.H ? flat[net.first_bias + column] : 0, size = std::fabs(sum);
            for (int d = 0; column < net.H && d < net.D; ++d) {
                const int64_t at = net.first + int64_t{column} * net.stride + net.time_column + d;
                const double term = flat[at] * time.features[d];
                sum += term, size += std::fabs(term);
            }
            const float* table = reinterpret_cast<const float*>(packed.data() + places.time_table);
            CHECK_NEAR(table[k * s.HP + column], sum, 1e-5 * size);
        }
    }
}

// The part of a state that holds NaN or infinity is NaN throughout, of others as it was, to the bit; and it is told.
void check_bad_states(const Sizes& sizes, const Tiling& tiling, int64_t B) {
    const Mlp net = mlp(sizes, 0);
    const Packed places(net, tiling, false, B, 2);
    const int HP = Slices(net, tiling).HP;
    const std::vector<float> flat = random_floats(net.size, 0.5), embedding = random_floats(2 * net.D);
    std::vector<float> states = random_floats(B * net.S);
    states[0] = 3e38f, states[(B - 1) * net.S] = -3e38f;  // huge is no mistake
    int32_t told = 0;
    const auto run = [&](int32_t* at) {
        std::vector<char> packed(places.end, static_cast<char>(0xff));
        cuda::prologue({net, tiling, false, flat.data(), net.D > 0 ? embedding.data() : nullptr, states.data(), B, 2,
                        packed.data(), at},
                       nullptr);
        return packed;
    };
    const std::vector<char> good = run(&told);
    CHECK_EQ(told, 0);
    for (int64_t place = 0; place < B * net.S; place += 7) {
        const float before = states[place];
        states[place] = place % 3 == 0 ? NAN : place % 3 == 1 ? INFINITY : -INFINITY;
        const std::vector<char> packed = run(&told);
        CHECK_EQ(told, 1);
        told = 0;
        CHECK(memcmp(packed.data(), good.data(), places.state_part) == 0);
        for (int network = 0; network < net.networks; ++network)
            for (int64_t b = 0; b < B; ++b) {
                const int64_t at = places.state_part + (network * B + b) * HP * 4;
                const float* part = reinterpret_cast<const float*>(packed.data() + at);
                if (b != place / net.S) CHECK(memcmp(part, good.data() + at, HP * 4) == 0);
                for (int column = 0; b == place / net.S && column < HP; ++column) CHECK(std::isnan(part[column]));
            }
        run(nullptr);  // nobody wants to know
        CHECK_EQ(told, 0);
        states[place] = before;
    }
}

void bad_states() {
    for (const Tiling& tiling : {Tiling{Precision::BF16, 1, 1, false}, Tiling{Precision::FP32, 4, 1, true}}) {
        check_bad_states({1, 1, 4, 17, 2}, tiling, 1);
        check_bad_states({11, 3, 16, 64, 2}, tiling, 17);
        check_bad_states({35, 3, 16, 300, 2}, tiling, 3);  // two chunks of a state, two turns of columns
        check_bad_states({5, 3, 0, 40, 2}, tiling, 18);    // critics
    }
}

void prologues() {
    int turn = 0;
    for (const Tiling& tiling : tilings())
        for (const int H : {1, 17, 64, 200}) {
            const int L = 2 + turn % 3, K = turn % 2 ? 5 : 2, D = turn % 2 ? 4 : 16, A = turn % 3 == 0 ? 24 : turn % 3;
            const int S = turn % 2 ? 11 : 1, B = 1 + 11 * (turn % 3);
            check_prologue({S, A, D, H, L}, tiling, B, K, turn % 3, turn % 4 != 0);
            check_prologue({S, A, 0, H, L}, tiling, B, 1, turn % 3, turn % 4 != 1);
            ++turn;
        }
    check_prologue({70, 64, 64, 40, 2}, {Precision::BF16, 1, 1, false}, 35, 1, 0, true);
}

}  // namespace

int main() {
    RUN(activations_are_accurate);
    RUN(parts_add_up);
    RUN(uniforms_are_exact);
    RUN(noise_is_the_stream);
    RUN(candidates_are_drawn);
    RUN(chunks_have_one_place);
    RUN(prologues);
    RUN(bad_states);
    return check::report();
}
