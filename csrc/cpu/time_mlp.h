// The time MLP's weights, and what its forward pass over a table's K timesteps leaves for the backward pass.
#pragma once

#include "engine.h"

namespace dql {

// The tensors of the time MLP in Packed::time_mlp, and what its forward pass leaves behind a table's floats.
struct TimeMlp {
    const float *weight1, *bias1, *weight3, *bias3;  // [2D][D], [2D], [D][2D], [D]
    TimeMlp(const Packed& packed, int64_t D)
        : weight1(packed.time_mlp.data()), bias1(weight1 + 2 * D * D), weight3(bias1 + 2 * D),
          bias3(weight3 + 2 * D * D) {}
};

struct TimeSaved {
    float *table, *hidden, *slope, *features;  // [K][32 P], [K][wide], [K][wide], [K][32 panels(D)]
    int64_t wide, columns;                     // 2D padded to panels; floats of a row of features
    static int64_t floats(const Trunk& t, int64_t K) {
        return K * (t.P + 2 * panels(2 * t.D) + panels(t.D)) * PANEL;
    }
    TimeSaved(float* floats, const Trunk& t, int64_t K)
        : table(floats), hidden(table + K * t.P * PANEL), slope(hidden + K * panels(2 * t.D) * PANEL),
          features(slope + K * panels(2 * t.D) * PANEL), wide(panels(2 * t.D) * PANEL), columns(panels(t.D) * PANEL) {}
};

}  // namespace dql
