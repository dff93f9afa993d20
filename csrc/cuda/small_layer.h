// The small layers of a network: its float weights in a kernel's order, and a layer of the time MLP for one input.
#pragma once

#include "device.h"
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

}  // namespace device
}  // namespace dql
