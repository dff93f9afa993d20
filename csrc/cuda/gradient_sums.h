// The second launch of gradients.cu: adds up the images of the gradient that the parts of the rows made, and walks back
// through the time MLP, whose table's gradient is in the images too (kernels/reference.py, _time_table_bwd).
#pragma once

#include "arithmetic.h"
#include "launch.h"
#include "small_layer.h"

namespace dql {
namespace device {

constexpr int TIME_COLUMNS = 16;  // rows of the first layer's weight, of a block
// Steps that go through the time MLP side by side: one after the other would wait for memory at each of its layers.
constexpr int TIME_STEPS = 5;

// Floats of shared memory that a block needs.
DQL_PLAIN int finish_floats(int D, int H) { return TIME_STEPS * (8 * D + THREADS + H) + 4 * D * D + 3 * D; }

struct FinishArguments {
    Mlp net;
    int first_network, networks, HP, K, tables, parts;  // tables of K rows each, which are added up
    int64_t image;
    const float* images;
    const float* flat = nullptr;
    const float* embedding = nullptr;
    float* d_flat = nullptr;
    int64_t add_blocks = 0, column_blocks = 0;  // then one block for the time MLP
};

class Finish {
public:
    DQL_DEVICE explicit Finish(const FinishArguments& arguments)
        : a(arguments), net(a.net), hidden(reinterpret_cast<float*>(shared_memory())) {
        slope = hidden + TIME_STEPS * 2 * net.D;
        features = slope + TIME_STEPS * 2 * net.D;
        scratch = features + TIME_STEPS * net.D;
    }

    DQL_DEVICE void run() {
        if (block_x() < a.add_blocks)
            add(static_cast<int64_t>(block_x()) * THREADS + thread());
        else if (block_x() < a.add_blocks + a.column_blocks)
            first_layer(static_cast<int>(block_x() - a.add_blocks) * TIME_COLUMNS);
        else
            time_mlp();
    }

private:
    DQL_DEVICE float sum_of(int64_t at) const {
        float sum = a.images[at];
        DQL_UNROLL_BY_8
        for (int part = 1; part < a.parts; ++part) sum += a.images[part * a.image + at];
        return sum;
    }

    // What the products wrote; zero in the layout's gaps; left to others where the time MLP is behind it.
    DQL_DEVICE void add(int64_t i) {
        if (i >= net.size) return;
        const bool second = net.networks > 1 && i >= lowest() + net.apart;
        const int network = second ? 1 : 0;
        const bool ran = network >= a.first_network && network < a.first_network + a.networks;
        const int64_t at = i - (second ? net.apart : 0);
        bool written = false;
        if (net.D > 0 && (inside(at, net.time_w1, int64_t{2} * net.D * net.D) || inside(at, net.time_b1, 2 * net.D) ||
                          inside(at, net.time_w3, int64_t{2} * net.D * net.D) || inside(at, net.time_b3, net.D) ||
                          inside(at, net.first_bias, net.H)))
            return;
        if (inside(at, net.first, static_cast<int64_t>(net.H) * net.stride)) {
            const int column = static_cast<int>((at - net.first) % net.stride);
            if (net.D > 0 && column >= net.time_column && column < net.time_column + net.D) return;
            written = true;
        }
        written = written || (net.D == 0 && inside(at, net.first_bias, net.H)) ||
                  inside(at, net.out, static_cast<int64_t>(net.O) * net.H) || inside(at, net.out_bias, net.O);
        for (int layer = 0; layer < net.L - 1; ++layer)
            written = written || inside(at, net.hidden[layer], static_cast<int64_t>(net.H) * net.H) ||
                      inside(at, net.hidden_bias[layer], net.H);
        a.d_flat[i] = written && ran ? sum_of(i) : 0;
    }

    DQL_DEVICE static bool inside(int64_t i, int64_t first, int64_t size) { return i >= first && i < first + size; }
    DQL_DEVICE int64_t lowest() const { return net.first; }  // of a critic's tensors the first is the first

    DQL_DEVICE float d_table(int k, int column) const {
        float sum = sum_of(net.size + static_cast<int64_t>(k) * a.HP + column);
        if (a.tables > 1) sum += sum_of(net.size + static_cast<int64_t>(a.K + k) * a.HP + column);
        return sum;
    }

    // The time MLP at steps first .. first + steps - 1 into hidden, slope and features.
    DQL_DEVICE void time_forward(int first, int steps) {
        time_features(net, a.flat, a.embedding + static_cast<int64_t>(first) * net.D, steps, hidden, slope, features);
    }

    DQL_DEVICE int steps_from(int first) const { return a.K - first < TIME_STEPS ? a.K - first : TIME_STEPS; }

    // The first layer's time columns and its bias, TIME_COLUMNS rows of the weight.
    DQL_DEVICE void first_layer(int first) {
        const int D = net.D;
        float sums[TIME_COLUMNS * MAX_NARROW / THREADS];
        DQL_UNROLL
        for (float& sum : sums) sum = 0;
        float bias = 0;
        for (int k = 0; k < a.K; k += TIME_STEPS) {
            const int steps = steps_from(k);
            sync_block();  // the scratch is read
            for (int i = thread(); i < steps * TIME_COLUMNS; i += THREADS) {
                const int row = first + i % TIME_COLUMNS;
                scratch[i] = row < net.H ? d_table(k + i / TIME_COLUMNS, row) : 0;
            }
            time_forward(k, steps);
            for (int step = 0; step < steps; ++step) {
                const float* d = scratch + step * TIME_COLUMNS;
                if (thread() < TIME_COLUMNS) bias += d[thread()];
                DQL_UNROLL
                for (int n = 0; n < TIME_COLUMNS * MAX_NARROW / THREADS; ++n) {
                    const int i = thread() + n * THREADS;
                    if (i < TIME_COLUMNS * D) sums[n] = fmaf(d[i / D], features[step * D + i % D], sums[n]);
                }
            }
        }
        DQL_UNROLL
        for (int n = 0; n < TIME_COLUMNS * MAX_NARROW / THREADS; ++n) {
            const int i = thread() + n * THREADS, row = first + i / D;
            if (i < TIME_COLUMNS * D && row < net.H)
                a.d_flat[net.first + static_cast<int64_t>(row) * net.stride + net.time_column + i % D] = sums[n];
        }
        if (thread() < TIME_COLUMNS && first + thread() < net.H) a.d_flat[net.first_bias + first + thread()] = bias;
    }

    DQL_DEVICE void time_mlp() {
        const int D = net.D, H = net.H;
        float* partial = scratch;                        // [TIME_STEPS][THREADS]
        float* d_row = partial + TIME_STEPS * THREADS;   // [TIME_STEPS][H]: of the table
        float* d_features = d_row + TIME_STEPS * H;      // [TIME_STEPS][D]
        float* d_z = d_features + TIME_STEPS * D;        // [TIME_STEPS][2 D]
        float *d_w1 = d_z + TIME_STEPS * 2 * D, *d_w3 = d_w1 + 2 * D * D, *d_b1 = d_w3 + 2 * D * D, *d_b3 = d_b1 + 2 * D;
        for (int i = thread(); i < 4 * D * D + 3 * D; i += THREADS) d_w1[i] = 0;
        const int lanes = THREADS / D;  // threads for each feature
        for (int k = 0; k < a.K; k += TIME_STEPS) {
            const int steps = steps_from(k);
            for (int i = thread(); i < steps * H; i += THREADS) d_row[i] = d_table(k + i / H, i % H);
            time_forward(k, steps);
            const int d = thread() % D, of = thread() / D;
            float sums[TIME_STEPS];
            DQL_UNROLL
            for (float& sum : sums) sum = 0;
            if (of < lanes) {
                DQL_UNROLL_BY_8
                for (int row = of; row < H; row += lanes) {
                    const float weight = a.flat[net.first + static_cast<int64_t>(row) * net.stride + net.time_column + d];
                    DQL_UNROLL
                    for (int step = 0; step < TIME_STEPS; ++step)
                        if (step < steps) sums[step] = fmaf(d_row[step * H + row], weight, sums[step]);
                }
            }
            DQL_UNROLL
            for (int step = 0; step < TIME_STEPS; ++step) partial[step * THREADS + thread()] = sums[step];
            sync_block();
            for (int i = thread(); i < steps * D; i += THREADS) {
                float sum = 0;
                for (int n = 0; n < lanes; ++n) sum += partial[i / D * THREADS + n * D + i % D];
                d_features[i] = sum;
            }
            sync_block();
            for (int i = thread(); i < steps * 2 * D; i += THREADS) {
                const int unit = i % (2 * D), step = i / (2 * D);
                float sum = 0;
                DQL_UNROLL_BY_8
                for (int n = 0; n < D; ++n)
                    sum = fmaf(a.flat[net.time_w3 + n * 2 * D + unit], d_features[step * D + n], sum);
                d_z[i] = sum * slope[i];
            }
            sync_block();
            const float* embedding = a.embedding + static_cast<int64_t>(k) * D;
            for (int step = 0; step < steps; ++step) {
                const float *of_z = d_z + step * 2 * D, *of_features = d_features + step * D;
                for (int i = thread(); i < 2 * D; i += THREADS) d_b1[i] += of_z[i];
                for (int i = thread(); i < D; i += THREADS) d_b3[i] += of_features[i];
                for (int i = thread(); i < 2 * D * D; i += THREADS) {
                    d_w3[i] = fmaf(of_features[i / (2 * D)], hidden[step * 2 * D + i % (2 * D)], d_w3[i]);
                    d_w1[i] = fmaf(of_z[i / D], embedding[step * D + i % D], d_w1[i]);
                }
            }
        }
        for (int i = thread(); i < 2 * D * D; i += THREADS) {
            a.d_flat[net.time_w1 + i] = d_w1[i];
            a.d_flat[net.time_w3 + i] = d_w3[i];
        }
        for (int i = thread(); i < 2 * D; i += THREADS) a.d_flat[net.time_b1 + i] = d_b1[i];
        for (int i = thread(); i < D; i += THREADS) a.d_flat[net.time_b3 + i] = d_b3[i];
    }

    const FinishArguments& a;
    const Mlp& net;
    float *hidden, *slope, *features, *scratch;
};

DQL_KERNEL(THREADS, 1) finish_kernel(DQL_ARGUMENT FinishArguments arguments) { Finish(arguments).run(); }

}  // namespace device
}  // namespace dql
