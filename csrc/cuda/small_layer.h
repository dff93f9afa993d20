// The small layers of a network: its float weights in a kernel's order, the time MLP for one input or for several.
#pragma once

#include "arithmetic.h"
#include "shapes.h"

namespace dql {
namespace device {

// Row `row` of X + O + L - 1, as wide as the hidden layers, of what kernels keep as floats: W_x [X] | W_out [O] | the
// hidden biases [L - 1]; 0 where there is no such column. `flat` is that of the network in question.
DQL_DEVICE float small_float(const Mlp& net, const float* flat, int row, int column) {
    if (column >= net.H) return 0;
    if (row < net.X) return flat[net.first + static_cast<int64_t>(column) * net.stride + net.x_column + row];
    if (row < net.X + net.O) return flat[net.out + static_cast<int64_t>(row - net.X) * net.H + column];
    return flat[net.hidden_bias[row - net.X - net.O] + column];
}

// out[i] = bias[i] + sum over d of weight[i * row + d * column] in[d] for i < outputs; no bias if it is null. Eight lanes
// share a sum, so that all of the weight is on its way at once: such layers follow each other, and nothing else hides
// their latency. `out` is seen by the block when this returns; `in`, in shared memory, must be seen before.
DQL_DEVICE void small_layer(float* out, const float* weight, int row, int column, const float* bias, const float* in,
                            int outputs, int inputs) {
    for (int first = 0; first < outputs; first += THREADS / 8) {
        const int i = first + thread() / 8;
        float sum = 0;
        if (i < outputs) {
            DQL_UNROLL_BY_8
            for (int d = thread() % 8; d < inputs; d += 8) sum = fmaf(weight[i * row + d * column], in[d], sum);
        }
        DQL_UNROLL
        for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
        if (i < outputs && thread() % 8 == 0) out[i] = bias != nullptr ? bias[i] + sum : sum;
    }
    sync_block();
}

// The time MLP for `steps` rows of `embedding`, side by side: one after the other would wait for memory at each layer.
// Writes hidden [steps][2 D], its slope likewise (null: none) and features [steps][D] in shared memory, which the block
// sees when this returns. Begins with a barrier of the block: what was there before may be being read.
DQL_DEVICE void time_features(const Mlp& net, const float* flat, const float* embedding, int steps, float* hidden,
                              float* slope, float* features) {
    const int D = net.D;
    sync_block();
    for (int i = thread(); i < steps * 2 * D; i += THREADS) {
        const int unit = i % (2 * D), step = i / (2 * D);
        float sum = flat[net.time_b1 + unit];
        DQL_UNROLL_BY_8
        for (int d = 0; d < D; ++d) sum = fmaf(flat[net.time_w1 + unit * D + d], embedding[step * D + d], sum);
        if (slope != nullptr) {
            const Activated both = activate_with_slope(sum, net.activation);
            hidden[i] = both.h, slope[i] = both.slope;
        } else {
            hidden[i] = activate(sum, net.activation);
        }
    }
    sync_block();
    for (int i = thread(); i < steps * D; i += THREADS) {
        const int unit = i % D, step = i / D;
        float sum = flat[net.time_b3 + unit];
        DQL_UNROLL_BY_8
        for (int d = 0; d < 2 * D; ++d) sum = fmaf(flat[net.time_w3 + unit * 2 * D + d], hidden[step * 2 * D + d], sum);
        features[i] = sum;
    }
    sync_block();
}

}  // namespace device
}  // namespace dql
