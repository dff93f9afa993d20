// What the tests of engine.h share: networks with the layout of kernels/layout.py, tables, every variant.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "../cpu/engine.h"

namespace dql {

using Floats = std::vector<float>;

constexpr float NOTHING = std::numeric_limits<float>::quiet_NaN();
constexpr int T = 7;  // timesteps of the noise-prediction loss

struct Sizes {
    int S, A, H, L, B, N, K, activation, D;
};

inline Floats draw(std::mt19937& generator, int64_t n, float scale = 1.0f) {
    Floats values(static_cast<size_t>(n));
    for (float& v : values) {  // about normal; <random>'s distributions differ between libraries
        v = 0.0f;
        for (int i = 0; i < 4; ++i) v += static_cast<float>(generator() % 65536) / 32768.0f - 1.0f;
        v *= 0.87f * scale;
    }
    return values;
}

template <class Body>
void every_variant(const Body& body) {
    for (const Variant& variant : variants()) {
        if (!variant.kernels) continue;
        force_variant(variant.name);
        CHECK_EQ(std::string(kernels().name), std::string(variant.name));
        body(variant.name);
    }
    force_variant("");
}

// A network with the layout of kernels/layout.py: each tensor starts at a multiple of 16, and NaN lies between.
struct Net {
    Spec spec;
    std::vector<int64_t> sizes;
    Floats flat;

    Net(const Sizes& z, bool critic, std::mt19937& generator) {
        spec = {critic, z.S, z.A, critic ? 0 : z.D, z.H, z.L, z.activation, {}, 0};
        std::vector<std::pair<int, int>> layers;  // rows, columns
        if (!critic) layers = {{2 * z.D, z.D}, {z.D, 2 * z.D}};
        for (int i = 0; i < (critic ? 2 : 1); ++i)
            for (int l = 0; l <= z.L; ++l)
                layers.push_back({l < z.L ? z.H : critic ? 1 : z.A, l ? z.H : z.A + spec.D + z.S});
        for (const auto& [rows, columns] : layers)
            for (const int64_t size : {static_cast<int64_t>(rows) * columns, static_cast<int64_t>(rows)}) {
                spec.offsets.push_back(spec.flat_size);
                sizes.push_back(size);
                spec.flat_size += (size + 15) / 16 * 16;
            }
        flat.assign(static_cast<size_t>(spec.flat_size), NOTHING);
        for (size_t i = 0; i < sizes.size(); ++i) {
            const float scale = i % 2 ? 0.25f : 1.5f / std::sqrt(static_cast<float>(layers[i / 2].second));
            const Floats values = draw(generator, sizes[i], scale);
            std::copy(values.begin(), values.end(), flat.begin() + spec.offsets[i]);
        }
    }

    // Every element of every tensor is finite, and what lies between them is as it was: NaN.
    bool written_where_it_should(const Floats& gradient) const {
        std::vector<bool> inside(gradient.size());
        for (size_t i = 0; i < sizes.size(); ++i)
            for (int64_t j = 0; j < sizes[i]; ++j) inside[static_cast<size_t>(spec.offsets[i] + j)] = true;
        for (size_t i = 0; i < gradient.size(); ++i)
            if (std::isfinite(gradient[i]) != inside[i]) return false;
        return true;
    }
};

inline Table make_table(const Sizes& z, std::mt19937& generator, uint64_t id, bool steps) {
    Table table = {};
    table.id = id;
    table.K = steps ? z.K : T;
    table.D = z.D;
    table.embedding = draw(generator, static_cast<int64_t>(table.K) * z.D);
    for (int k = 0; k < table.K; ++k) {
        const float step[STEP_COLUMNS] = {1.25f, 0.75f, 0.6f, 0.5f, k ? 0.1f : 0.0f, k + 1 < z.K ? 0.3f : 0.0f};
        if (steps) table.steps.insert(table.steps.end(), step, step + STEP_COLUMNS);
        if (!steps) table.q_sample.insert(table.q_sample.end(), {1.0f - 0.1f * static_cast<float>(k), 0.4f});
    }
    return table;
}

inline bool same_bits(const Floats& a, const Floats& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace dql
