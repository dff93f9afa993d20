// Networks for the tests of the CUDA kernels, laid out as kernels/layout.py does, and the numbers to fill them with.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../cuda/arithmetic.h"
#include "../cuda/shapes.h"

namespace {

using namespace dql;

const float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN(), INFINITE = std::numeric_limits<float>::infinity();

struct Sizes {
    int S, A, D, H, L;  // D = 0: twin critics
};

inline Mlp mlp(const Sizes& sizes, int activation) {
    Mlp net = {};
    net.S = sizes.S, net.X = sizes.A, net.D = sizes.D, net.H = sizes.H, net.L = sizes.L;
    net.O = sizes.D > 0 ? sizes.A : 1;
    net.activation = activation;
    net.networks = sizes.D > 0 ? 1 : 2;
    net.stride = sizes.S + sizes.A + sizes.D;
    if (sizes.D > 0)
        net.x_column = 0, net.time_column = sizes.A, net.state_column = sizes.A + sizes.D;
    else
        net.state_column = 0, net.x_column = sizes.S;
    int64_t end = 0;
    const auto take = [&](int64_t count) {
        const int64_t start = end;
        end += (count + 15) / 16 * 16;
        return start;
    };
    const int64_t D = sizes.D, H = sizes.H;
    if (D > 0) {
        net.time_w1 = take(2 * D * D), net.time_b1 = take(2 * D);
        net.time_w3 = take(2 * D * D), net.time_b3 = take(D);
    }
    net.first = take(H * net.stride), net.first_bias = take(H);
    for (int i = 0; i < net.L - 1; ++i) net.hidden[i] = take(H * H), net.hidden_bias[i] = take(H);
    net.out = take(net.O * H), net.out_bias = take(net.O);
    net.apart = end;
    net.size = end * net.networks;
    return net;
}

std::mt19937 generator(7);

std::vector<float> random_floats(int64_t count, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> numbers(count);
    for (float& number : numbers) number = normal(generator);
    return numbers;
}

double activation_of(double z, int kind, double* slope = nullptr) {
    if (kind == device::RELU) {
        if (slope != nullptr) *slope = z > 0 ? 1 : 0;
        return z > 0 ? z : 0;
    }
    const double sigmoid = 1 / (1 + std::exp(-z));
    if (kind == device::SILU) {
        if (slope != nullptr) *slope = sigmoid + z * sigmoid * (1 - sigmoid);
        return z * sigmoid;
    }
    const double t = std::tanh(z > 30 ? z : std::log1p(std::exp(z)));
    if (slope != nullptr) *slope = t + z * sigmoid * (1 - t * t);
    return z * t;
}

// The time MLP of one step: hidden [2 D] and its slope, features [D] and the sizes of their terms.
struct TimeMlp {
    std::vector<double> hidden, slope, features, feature_sizes;
    TimeMlp(const Mlp& net, const std::vector<float>& flat, const float* embedding)
        : hidden(2 * net.D), slope(2 * net.D), features(net.D), feature_sizes(net.D) {
        for (int i = 0; i < 2 * net.D; ++i) {
            double z = flat[net.time_b1 + i];
            for (int d = 0; d < net.D; ++d) z += double{flat[net.time_w1 + i * net.D + d]} * embedding[d];
            hidden[i] = activation_of(z, net.activation, &slope[i]);
        }
        for (int i = 0; i < net.D; ++i) {
            features[i] = flat[net.time_b3 + i], feature_sizes[i] = std::fabs(features[i]) + 1;
            for (int d = 0; d < 2 * net.D; ++d) {
                const double term = flat[net.time_w3 + i * 2 * net.D + d] * hidden[d];
                features[i] += term, feature_sizes[i] += std::fabs(term);
            }
        }
    }
};

// What the precision makes of a number, and the bits of an operand as float32.
inline float rounded(float x, Precision precision) {
    if (precision == Precision::BF16) return device::as_float(device::bf16(x) << 16);
    return precision == Precision::TF32 ? device::as_float(device::tf32(x)) : x;
}
inline uint32_t bits_of(const char* operands, int64_t index, Precision precision) {
    uint32_t bits = 0;
    memcpy(&bits, operands + index * element_bytes(precision), element_bytes(precision));
    return precision == Precision::BF16 ? bits << 16 : bits;
}

inline std::vector<Tiling> tilings() {
    std::vector<Tiling> all;
    for (const Precision precision : {Precision::FP32, Precision::TF32, Precision::BF16}) {
        for (const int cluster : {1, 2, 4, 8}) all.push_back({precision, cluster, 1, true});
        all.push_back({precision, 1, 2, false});
    }
    all.push_back({Precision::BF16, 1, WIDE_M_TILES, false});
    return all;
}

}  // namespace
