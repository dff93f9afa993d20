// What the CUDA kernels make of a backward pass, the gradients of parameters and states, run by the emulator against
// plain double loops. Whatever is written is NaN before, as are the padding columns of what is read.
#include <algorithm>
#include <vector>

#include "../cuda/emulator/emulator.cpp"
#include "../cuda/gradients.cu"
#include "check.h"
#include "cuda_networks.h"

namespace {

struct Case {
    Sizes sizes;
    Tiling tiling;
    int64_t B;
    int N, K, activation;
    int first_network, networks;
    int parts;
    int T = 0;  // of a batch that is cloned beside the chain, if there is one

    int planes() const { return K + (T > 0 ? 1 : 0); }
};

// A sum and the sum of its terms' magnitudes, by which its error is judged.
struct Sum {
    double value = 0, size = 0;
    void add(double term) { value += term, size += std::fabs(term); }
};

void put(char* operands, int64_t index, float x, Precision precision) {
    const uint32_t bits = device::as_bits(x);
    const char* from = reinterpret_cast<const char*>(&bits) + 4 - element_bytes(precision);
    memcpy(operands + index * element_bytes(precision), from, element_bytes(precision));
}

// A pass that might have been: random numbers where the chain kernel would have written.
class Pass {
public:
    explicit Pass(const Case& c)
        : c_(c),
          net_(mlp(c.sizes, c.activation)),
          s_(net_, c.tiling),
          R_(c.B * c.N),
          RP_(whole_tiles(R_, c.tiling)),
          flat_(random_floats(net_.size, 0.5)),
          embedding_(random_floats(std::max(c.K, c.T) * net_.D)),
          states_(random_floats(c.B * net_.S)),
          actions_in_(random_floats(net_.D > 0 ? 0 : R_ * net_.X)),
          d_q_(random_floats(net_.D > 0 ? 0 : c.networks * R_)),
          t_(c.T > 0 ? c.B : 0),
          saved_places_(net_, c.tiling, c.networks, RP_, c.K, c.planes() - c.K),
          back_places_(net_, c.tiling, c.networks, RP_, c.K, c.planes() - c.K),
          saved_(saved_places_.end, static_cast<char>(0xff)),
          back_(back_places_.end, static_cast<char>(0xff)),
          expected_(net_.size),
          expected_states_(c.B * net_.S) {
        for (int64_t& t : t_) t = static_cast<int64_t>(generator() % c.T);
        fill();
        for (int network = 0; network < c.networks; ++network) {
            layers(network);
            back_to_states(network);
        }
        if (net_.D > 0) time_mlp();
    }

    void check(bool parameters, bool of_states) {
        const int64_t workspace_size = cuda::gradient_workspace(net_, c_.tiling, c_.K, c_.parts, parameters, c_.T);
        std::vector<float> workspace(workspace_size, NOT_A_NUMBER), d_flat(parameters ? net_.size : 0, NOT_A_NUMBER),
            d_states(of_states ? c_.B * net_.S : 0, NOT_A_NUMBER);
        const auto run = [&] {
            cuda::GradientJob job = {};
            job.net = net_, job.tiling = c_.tiling;
            job.first_network = c_.first_network, job.networks = c_.networks;
            job.flat = flat_.data(), job.states = states_.data();
            job.B = c_.B, job.R = R_, job.RP = RP_, job.N = c_.N, job.K = c_.K;
            job.saved = saved_.data(), job.back = back_.data();
            if (net_.D > 0)
                job.embedding = embedding_.data();
            else
                job.actions_in = actions_in_.data(), job.d_q = d_q_.data();
            job.workspace = workspace.data(), job.parts = c_.parts;
            if (parameters) job.d_flat = d_flat.data();
            if (of_states) job.d_states = d_states.data();
            if (c_.T > 0) job.cloning.actions = states_.data(), job.cloning.t = t_.data(), job.cloning.T = c_.T;
            cuda::gradients(job, nullptr);
        };
        run();
        for (size_t i = 0; i < d_flat.size(); ++i)
            CHECK_NEAR(d_flat[i], expected_[i].value, TOLERANCE * expected_[i].size);
        for (size_t i = 0; i < d_states.size(); ++i)
            CHECK_NEAR(d_states[i], expected_states_[i].value, TOLERANCE * expected_states_[i].size);
        if (!parameters || !of_states) return;
        // The same bits, in whatever order the threads of a block run.
        const std::vector<float> d_flat_before = d_flat, d_states_before = d_states;
        std::fill(workspace.begin(), workspace.end(), NOT_A_NUMBER);
        emulator::seed(generator());
        run();
        CHECK(memcmp(d_flat.data(), d_flat_before.data(), d_flat.size() * 4) == 0);
        CHECK(memcmp(d_states.data(), d_states_before.data(), d_states.size() * 4) == 0);
    }

private:
    static constexpr double TOLERANCE = 4e-6;  // of the terms' magnitudes: sums of float32

    void fill() {
        const Precision precision = c_.tiling.precision;
        std::normal_distribution<float> normal;
        for (int64_t row = 0; row < int64_t{c_.networks} * net_.L * c_.planes() * RP_; ++row)
            for (int column = 0; column < net_.H; ++column) {
                const bool real = row % RP_ < R_;
                const float h = rounded(normal(generator), precision);
                const float d_z = real ? rounded(normal(generator), precision) : 0;
                put(saved_.data() + saved_places_.h, row * s_.HP + column, h, precision);
                put(back_.data() + back_places_.d_z, row * s_.HP + column, d_z, precision);
            }
        if (net_.D == 0) return;
        const std::vector<float> xs = random_floats(c_.planes() * RP_ * net_.X);
        std::vector<float> d_out = random_floats(c_.planes() * RP_ * net_.O);
        for (int64_t i = 0; i < c_.planes() * RP_ * net_.O; ++i)
            if (i / net_.O % RP_ >= R_) d_out[i] = 0;
        memcpy(saved_.data() + saved_places_.xs, xs.data(), xs.size() * 4);
        memcpy(back_.data() + back_places_.d_out, d_out.data(), d_out.size() * 4);
    }

    double operand(const char* from, int network, int layer, int64_t row, int column) const {
        const int64_t at = ((int64_t{network} * net_.L + layer) * c_.planes() * RP_ + row) * s_.HP + column;
        return device::as_float(bits_of(from, at, c_.tiling.precision));
    }
    double h(int network, int layer, int64_t row, int column) const {
        return operand(saved_.data() + saved_places_.h, network, layer, row, column);
    }
    double d_z(int network, int layer, int64_t row, int column) const {
        return operand(back_.data() + back_places_.d_z, network, layer, row, column);
    }
    double d_out(int network, int64_t row, int o) const {
        return net_.D > 0 ? number(back_, back_places_.d_out, row * net_.O + o) : d_q_[network * R_ + row];
    }
    double input(int64_t row, int x) const {
        return net_.D > 0 ? number(saved_, saved_places_.xs, row * net_.X + x) : actions_in_[row * net_.X + x];
    }
    float number(const std::vector<char>& from, int64_t start, int64_t index) const {
        float value;
        memcpy(&value, from.data() + start + index * 4, 4);
        return value;
    }

    // Row after row, as autograd would add them up; the rows of padding are nobody's.
    void layers(int network) {
        const int64_t at = (c_.first_network + network) * net_.apart;
        Sum* d = expected_.data() + at;
        for (int64_t row = 0; row < c_.planes() * RP_; ++row) {
            const int64_t r = row % RP_;
            if (r >= R_) continue;
            for (int o = 0; o < net_.O; ++o) {
                const double d_o = d_out(network, row, o);
                for (int j = 0; j < net_.H; ++j)
                    d[net_.out + o * net_.H + j].add(d_o * h(network, net_.L - 1, row, j));
                d[net_.out_bias + o].add(d_o);
            }
            for (int i = 0; i < net_.H; ++i) {
                for (int layer = 1; layer < net_.L; ++layer) {
                    const double d_zi = d_z(network, layer, row, i);
                    for (int j = 0; j < net_.H; ++j)
                        d[net_.hidden[layer - 1] + i * net_.H + j].add(d_zi * h(network, layer - 1, row, j));
                    d[net_.hidden_bias[layer - 1] + i].add(d_zi);
                }
                const double d_zi = d_z(network, 0, row, i);
                Sum* weight = d + net_.first + int64_t{i} * net_.stride;
                for (int x = 0; x < net_.X; ++x) weight[net_.x_column + x].add(d_zi * input(row, x));
                for (int j = 0; j < net_.S; ++j)
                    weight[net_.state_column + j].add(d_zi * states_[r / c_.N * net_.S + j]);
                d[net_.first_bias + i].add(d_zi);
            }
        }
    }

    // kernels/reference.py, _time_table_bwd. Errors are passed on from sum to sum, so their sizes are too; those of the
    // activation's value and slope are absolute, as both cross zero.
    void time_mlp() {
        const int D = net_.D;
        for (int k = 0; k < std::max(c_.K, c_.T); ++k) {
            const float* embedding = embedding_.data() + k * D;
            const TimeMlp time(net_, flat_, embedding);
            std::vector<Sum> d_features(D), d_hidden(2 * D);
            for (int i = 0; i < net_.H; ++i) {
                Sum d_table;
                for (int64_t r = 0; r < R_; ++r) {
                    if (k < c_.K) d_table.add(d_z(0, 0, k * RP_ + r, i));
                    if (c_.T > 0 && t_[r] == c_.T - 1 - k) d_table.add(d_z(0, 0, c_.K * RP_ + r, i));
                }
                for (int d = 0; d < D; ++d) {
                    const int64_t at = net_.first + int64_t{i} * net_.stride + net_.time_column + d;
                    pass_on(expected_[at], d_table, time.features[d], time.feature_sizes[d]);
                    pass_on(d_features[d], d_table, flat_[at], std::fabs(flat_[at]));
                }
            }
            for (int d = 0; d < D; ++d) {
                pass_on(expected_[net_.time_b3 + d], d_features[d], 1, 1);
                for (int i = 0; i < 2 * D; ++i) {
                    const int64_t at = net_.time_w3 + d * 2 * D + i;
                    pass_on(expected_[at], d_features[d], time.hidden[i], std::fabs(time.hidden[i]) + 0.5);
                    pass_on(d_hidden[i], d_features[d], flat_[at] * time.slope[i],
                            std::fabs(flat_[at]) * (std::fabs(time.slope[i]) + 0.5));
                }
            }
            for (int i = 0; i < 2 * D; ++i) {
                pass_on(expected_[net_.time_b1 + i], d_hidden[i], 1, 1);
                for (int d = 0; d < D; ++d)
                    pass_on(expected_[net_.time_w1 + i * D + d], d_hidden[i], embedding[d], std::fabs(embedding[d]));
            }
        }
    }
    static void pass_on(Sum& to, const Sum& from, double factor, double size) {
        to.value += from.value * factor, to.size += from.size * size;
    }

    void back_to_states(int network) {
        const float* weight = flat_.data() + (c_.first_network + network) * net_.apart + net_.first + net_.state_column;
        for (int64_t row = 0; row < c_.K * RP_; ++row) {
            const int64_t r = row % RP_;
            for (int i = 0; r < R_ && i < net_.H; ++i) {
                const double d_zi = d_z(network, 0, row, i);
                for (int j = 0; j < net_.S; ++j)
                    expected_states_[r / c_.N * net_.S + j].add(d_zi * weight[int64_t{i} * net_.stride + j]);
            }
        }
    }

    const Case c_;
    const Mlp net_;
    const Slices s_;
    const int64_t R_, RP_;
    const std::vector<float> flat_, embedding_, states_, actions_in_, d_q_;
    std::vector<int64_t> t_;
    const SavedPlaces saved_places_;
    const BackwardPlaces back_places_;
    std::vector<char> saved_, back_;
    std::vector<Sum> expected_, expected_states_;
};

void check_all(const Case& c) {
    Pass pass(c);
    pass.check(true, true);
    pass.check(true, false);
    pass.check(false, true);
}

const int WIDTHS[] = {1, 17, 64};

void of_denoisers() {
    int turn = 0;
    for (const Tiling& tiling : tilings())
        for (const int H : WIDTHS) {
            Case c = {{11, 3, 4, H, 2 + turn % 3}, tiling, 7, 1, 2, turn % 3, 0, 1, 1 + turn % 3};
            if (turn % 2 == 0) c.sizes.S = 1, c.sizes.D = 16, c.B = 1, c.N = 3, c.K = 1;
            if (turn % 4 == 1) c.sizes.A = 1, c.K = 5;
            if (turn % 3 == 0) c.sizes.A = 24;
            if (turn % 5 == 0) c.parts = 40;  // some have no row
            check_all(c);
            ++turn;
        }
}

void of_critics() {
    int turn = 0;
    for (const Tiling& tiling : tilings())
        for (const int H : WIDTHS) {
            Case c = {{11, 3, 0, H, 2 + turn % 3}, tiling, 11, 1, 1, turn % 3, 0, 2, 1 + turn % 4};
            if (turn % 2 == 0) c.sizes.S = 1, c.B = 5, c.N = 3;
            if (turn % 3 == 1) c.sizes.A = 1, c.networks = 1;                       // the first alone
            if (turn % 3 == 2) c.sizes.A = 24, c.first_network = 1, c.networks = 1;  // the second
            check_all(c);
            ++turn;
        }
}

// A batch beside a chain of all steps, and alone.
void of_a_cloned_batch() {
    int turn = 0;
    for (const Tiling& tiling : tilings()) {
        if (tiling.m_tiles == WIDE_M_TILES) continue;
        Case c = {{11, 3, 4, WIDTHS[turn % 2], 2 + turn % 3}, tiling, 7, 1, 3, turn % 3, 0, 1, 1 + turn % 3, 3};
        if (turn % 2 == 0) c.sizes.S = 1, c.sizes.D = 16, c.B = 37;
        if (turn % 3 == 0) c.K = 0;
        if (turn % 5 == 0) c.parts = 40;  // some have no row
        Pass(c).check(true, false);
        ++turn;
    }
    Pass({{3, 1, 4, 5, 2}, {Precision::FP32, 1, 1, true}, 5, 1, 70, 0, 0, 1, 2, 70}).check(true, false);
}

// Several tiles each way, and the largest of what is narrow.
void of_wide_networks() {
    for (const Precision precision : {Precision::FP32, Precision::TF32, Precision::BF16}) {
        check_all({{11, 6, 16, 200, 2}, {precision, 4, 1, true}, 9, 1, 2, 0, 0, 1, 2});
        check_all({{11, 3, 0, 200, 2}, {precision, 2, 1, true}, 5, 3, 1, 0, 0, 2, 3});
    }
    check_all({{70, 64, 64, 40, 2}, {Precision::BF16, 1, 1, false}, 3, 3, 2, 0, 0, 1, 2});
    check_all({{11, 6, 16, 256, 2}, {Precision::BF16, 1, WIDE_M_TILES, false}, 43, 3, 1, 0, 0, 1, 3});
}

}  // namespace

int main() {
    RUN(of_denoisers);
    RUN(of_critics);
    RUN(of_a_cloned_batch);
    RUN(of_wide_networks);
    return check::report();
}
