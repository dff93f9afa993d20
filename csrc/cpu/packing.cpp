// A network's weights, packed once for each version of its parameters, and what its timesteps add to the first layer.
#include <algorithm>
#include <cstring>
#include <new>
#include <shared_mutex>
#include <stdexcept>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "time_mlp.h"

namespace dql {

// Shared by all who pack, and held alone by a thread that forks: a child is not to inherit a network's lock from a
// thread that it does not have, nor weights that are half packed.
static std::shared_mutex packing;
#if !defined(_WIN32)
[[maybe_unused]] static const int registered = pthread_atfork([] { packing.lock(); }, [] { packing.unlock(); }, [] {
    new (&packing) std::shared_mutex;  // others may have waited for it
});
#endif

// The n-th of the scattered elements of a tensor: an even stride would stay in a few columns.
static int64_t scattered(int64_t n, int64_t size) {
    uint64_t x = static_cast<uint64_t>(n + 1) * 0x9E3779B97F4A7C15;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    return static_cast<int64_t>((x ^ x >> 31) % static_cast<uint64_t>(size));
}

Network::Network(Spec spec) : spec_(std::move(spec)) {
    constexpr int64_t PROBES = 32, SMALL = 64;  // all elements of a small tensor, as many of any other
    for (size_t i = 0; i < spec_.offsets.size(); ++i) {
        const int64_t end = i + 1 < spec_.offsets.size() ? spec_.offsets[i + 1] : spec_.flat_size;
        const int64_t first = spec_.offsets[i], size = end - first;
        for (int64_t n = 0; n < (size <= SMALL ? size : PROBES); ++n)
            probed_.push_back(first + (size <= SMALL ? n : scattered(n, size)));
    }
    probes_.resize(probed_.size());
}

TrunkSource Network::source(const float* flat, int trunk) const {
    const Spec& s = spec_;
    TrunkSource source = {};
    size_t i = s.critic ? static_cast<size_t>(trunk) * 2 * (s.L + 1) : 4;
    const auto next = [&] { return flat + s.offsets[i++]; };
    source.first_stride = s.A + s.D + s.S;
    source.x_column = s.critic ? s.S : 0;
    source.time_column = s.A;
    source.state_column = s.critic ? 0 : s.A + s.D;
    source.first = next();
    source.first_bias = next();
    for (int l = 0; l + 1 < s.L; ++l) {
        source.hidden[l] = next();
        source.hidden_bias[l] = next();
    }
    source.out = next();
    source.out_bias = next();
    return source;
}

void Network::allocate(Packed& packed, int parts) const {
    const Spec& s = spec_;
    const int64_t P = panels(s.H), padded = P * PANEL;
    float* at = nullptr;  // null: only counts
    int64_t total = 0;
    const auto take = [&](int64_t floats) {
        const int64_t rounded = (floats + 15) / 16 * 16;
        float* taken = at;
        if (at) at += rounded;
        total += rounded;
        return taken;
    };
    const auto lay_out = [&] {
        for (int i = 0; i < (s.critic ? 2 : 1); ++i) {
            Trunk& t = packed.trunks[i];
            if (parts & FORWARD) {
                t.S = s.S, t.X = s.A, t.D = s.D, t.H = s.H, t.L = s.L, t.O = s.critic ? 1 : s.A;
                t.activation = s.activation;
                t.P = P;
                t.x_weight = take(s.A * padded);
                for (int l = 0; l + 1 < s.L; ++l) {
                    t.hidden_weight[l] = take(padded * padded);
                    t.hidden_bias[l] = take(padded);
                }
                t.out_weight = take(t.O * padded);
                t.out_bias = take(t.O);
                t.state_weight = take(s.S * padded);
                t.time_weight = take(s.D * padded);
                t.first_bias = take(padded);
            }
            if (parts & BACKWARD) {
                t.out_weight_t = take(t.O * padded);
                for (int l = 0; l + 1 < s.L; ++l) t.hidden_weight_t[l] = take(padded * padded);
                t.x_weight_t = take(t.X * padded);
                t.state_weight_t = take(padded * panels(s.S) * PANEL);
            }
            if (parts & BF16)
                for (int l = 0; l + 1 < s.L; ++l)
                    t.hidden_weight_bf16[l] = reinterpret_cast<uint32_t*>(take(padded * padded / 2));
        }
    };
    lay_out();
    packed.buffers.emplace_back(total);
    at = packed.buffers.back().data();
    lay_out();
}

std::shared_ptr<Packed> Network::packed(const float* flat, int64_t version, int parts) {
    const std::shared_lock<std::shared_mutex> no_fork(packing);
    const std::lock_guard<std::mutex> lock(mutex_);
    bool same = current_ && flat == flat_ && version == version_;
    for (size_t i = 0; same && i < probed_.size(); ++i)
        same = std::memcmp(&probes_[i], flat + probed_[i], sizeof(float)) == 0;
    if (!same) {
        // Where nobody else holds the old version, its memory serves the new one.
        if (!current_ || current_.use_count() > 1) current_ = std::make_shared<Packed>();
        current_->parts = 0;
        current_->tables.clear();
        if (!spec_.critic) {
            const int64_t D = spec_.D;
            const int64_t sizes[4] = {2 * D * D, 2 * D, 2 * D * D, D};
            current_->time_mlp.resize(static_cast<size_t>(4 * D * D + 3 * D));
            float* to = current_->time_mlp.data();
            for (size_t i = 0; i < 4; ++i, to += sizes[i - 1])
                std::memcpy(to, flat + spec_.offsets[i], sizeof(float) * static_cast<size_t>(sizes[i]));
        }
        for (size_t i = 0; i < probed_.size(); ++i) probes_[i] = flat[probed_[i]];
        flat_ = flat;
        version_ = version;
    }
    const int missing = (parts | FORWARD) & ~current_->parts;
    if (missing) {
        if (const int fresh = missing & ~current_->allocated) allocate(*current_, fresh);
        current_->allocated |= missing;
        for (int i = 0; i < (spec_.critic ? 2 : 1); ++i) kernels().pack(current_->trunks[i], source(flat, i), missing);
        current_->parts |= missing;
    }
    return current_;
}

std::shared_ptr<const Buffer> Network::time_table(Packed& packed, const Table& table) const {
    if (table.D != spec_.D) throw std::invalid_argument("the table was made for another size of time embedding");
    const std::shared_lock<std::shared_mutex> no_fork(packing);
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Packed::TimeTable& known : packed.tables)
        if (known.id == table.id) return known.floats;
    const Trunk& t = packed.trunks[0];
    const int64_t D = t.D, K = table.K;
    const TimeMlp mlp(packed, D);
    auto floats = std::make_shared<const Buffer>(TimeSaved::floats(t, K));
    const TimeSaved s(floats->data(), t, K);
    std::memset(s.hidden, 0, sizeof(float) * static_cast<size_t>(K * (2 * s.wide + s.columns)));
    for (int64_t k = 0; k < K; ++k)
        for (int64_t i = 0; i < 2 * D; ++i) {
            float z = mlp.bias1[i];
            const float* embedding = table.embedding.data() + k * D;
            for (int64_t d = 0; d < D; ++d) z += mlp.weight1[i * D + d] * embedding[d];
            s.hidden[k * s.wide + i] = z;
        }
    kernels().activate(t.activation, s.hidden, s.slope, K * s.wide);
    for (int64_t k = 0; k < K; ++k)
        for (int64_t d = 0; d < D; ++d) {
            float f = mlp.bias3[d];
            for (int64_t i = 0; i < 2 * D; ++i) f += mlp.weight3[d * 2 * D + i] * s.hidden[k * s.wide + i];
            s.features[k * s.columns + d] = f;
        }
    kernels().time_table(t, s.features, K, s.table);
    if (packed.tables.size() >= 8) packed.tables.erase(packed.tables.begin());
    packed.tables.push_back({table.id, floats});
    return floats;
}

}  // namespace dql
