#include "weight_gradients.h"

#include <cstring>

#include "time_mlp.h"

namespace dql {

static int valid(int columns, int panel) { return std::min(PANEL, columns - panel * PANEL); }

WeightGradients::WeightGradients(const Network& net, int trunk, const Gradients& out, const Saved& saved)
    : spec_(net.spec()), saved_(saved), accumulate_(out.accumulate) {
    const size_t first = spec_.critic ? static_cast<size_t>(trunk) * 2 * (spec_.L + 1) : 4;
    for (int l = 0; l <= spec_.L; ++l) {
        weight_[l] = out.flat + spec_.offsets[first + 2 * static_cast<size_t>(l)];
        bias_[l] = out.flat + spec_.offsets[first + 2 * static_cast<size_t>(l) + 1];
    }
    const int P = static_cast<int>(panels(spec_.H)), PO = static_cast<int>(panels(outputs()));
    for (int l = 1; l <= spec_.L; ++l)
        for (int j = 0; j < (l < spec_.L ? P : PO); ++j)
            for (int i = 0; i < P; ++i) tasks_.push_back({l, j, i});
    for (int j = 0; j < P; ++j)
        for (int a = 0; a < panels(spec_.A); ++a) tasks_.push_back({0, j, a});
    for (int l = spec_.critic ? 0 : 1; l <= spec_.L; ++l)
        for (int j = 0; j < (l < spec_.L ? P : PO); ++j) tasks_.push_back({l, j, -1});
}

void WeightGradients::run(int64_t index) const {
    const Task& task = tasks_[static_cast<size_t>(index)];
    const bool out = task.layer == spec_.L;
    const int64_t panel = saved_.rows * PANEL;
    const float* d = (out ? saved_.d_out : saved_.d_z[task.layer]) + task.j * panel;
    const int rows_of_out = valid(out ? outputs() : spec_.H, task.j);
    if (task.i < 0) {  // the bias
        alignas(64) float sums[PANEL];
        kernels().column_sums(d, saved_.rows, sums, false);
        float* to = bias_[task.layer] + task.j * PANEL;
        for (int c = 0; c < rows_of_out; ++c) to[c] = accumulate_ ? to[c] + sums[c] : sums[c];
        return;
    }
    OuterJob job = {};
    job.rows = saved_.rows;
    job.accumulate = accumulate_;
    if (task.layer == 0) {  // few columns: summed with d_z along the vectors, and stored transposed
        const int64_t stride = spec_.A + spec_.D + spec_.S;
        job.a = saved_.x + task.i * panel;
        job.b = d;
        job.valid_a = valid(spec_.A, task.i);
        job.valid_b = rows_of_out;
        job.out = weight_[0] + task.j * PANEL * stride + (spec_.critic ? spec_.S : 0) + task.i * PANEL;
        job.stride_a = 1;
        job.stride_b = stride;
    } else {
        job.a = d;
        job.b = saved_.hidden[task.layer - 1] + task.i * panel;
        job.valid_a = rows_of_out;
        job.valid_b = valid(spec_.H, task.i);
        job.out = weight_[task.layer] + task.j * PANEL * spec_.H + task.i * PANEL;
        job.stride_a = spec_.H;
        job.stride_b = 1;
    }
    kernels().outer(job);
}

void state_gradient(const Network& net, const float* d_part, int64_t B, const float* states,
                    float* first_weight, bool accumulate, int threads) {
    const Spec& s = net.spec();
    const int64_t PS = panels(s.S), P = panels(s.H), stride = s.A + s.D + s.S;
    Buffer padded(PS * B * PANEL);
    kernels().to_panels(states, s.S, B, s.S, padded.data(), B * PANEL);
    parallel_for(threads, PS * P, [&](int64_t task, int) {
        const int64_t i = task % PS, j = task / PS;
        OuterJob job = {};
        job.a = padded.data() + i * B * PANEL;
        job.b = d_part + j * B * PANEL;
        job.rows = B;
        job.valid_a = static_cast<int>(std::min<int64_t>(PANEL, s.S - i * PANEL));
        job.valid_b = static_cast<int>(std::min<int64_t>(PANEL, s.H - j * PANEL));
        job.out = first_weight + j * PANEL * stride + (s.critic ? 0 : s.A + s.D) + i * PANEL;
        job.stride_a = 1;
        job.stride_b = stride;
        job.accumulate = accumulate;
        kernels().outer(job);
    });
}

void time_gradient(const Network& net, const Packed& packed, const float* floats, const Table& table,
                   const float* d_table, const Gradients& out) {
    const Spec& s = net.spec();
    const Trunk& t = packed.trunks[0];
    const int64_t D = s.D, K = table.K, H = s.H, stride = s.A + s.D + s.S, wide = t.P * PANEL;
    const TimeSaved saved(const_cast<float*>(floats), t, K);
    const TimeMlp mlp(packed, D);
    const auto at = [&](size_t i) { return out.flat + s.offsets[i]; };
    float *weight1 = at(0), *bias1 = at(1), *weight3 = at(2), *bias3 = at(3), *first = at(4), *first_bias = at(5);
    if (!out.accumulate) {
        std::memset(weight1, 0, sizeof(float) * static_cast<size_t>(2 * D * D));
        std::memset(bias1, 0, sizeof(float) * static_cast<size_t>(2 * D));
        std::memset(weight3, 0, sizeof(float) * static_cast<size_t>(2 * D * D));
        std::memset(bias3, 0, sizeof(float) * static_cast<size_t>(D));
        std::memset(first_bias, 0, sizeof(float) * static_cast<size_t>(H));
        for (int64_t j = 0; j < H; ++j)
            std::memset(first + j * stride + s.A, 0, sizeof(float) * static_cast<size_t>(D));
    }
    std::vector<float> d_features(static_cast<size_t>(D)), d_hidden(static_cast<size_t>(2 * D));
    for (int64_t k = 0; k < K; ++k) {
        const float *d = d_table + k * wide, *features = saved.features + k * saved.columns;
        std::fill(d_features.begin(), d_features.end(), 0.0f);
        for (int64_t j = 0; j < H; ++j) {
            float* to = first + j * stride + s.A;
            first_bias[j] += d[j];
            for (int64_t i = 0; i < D; ++i) {
                to[i] += d[j] * features[i];
                d_features[static_cast<size_t>(i)] += d[j] * t.time_weight[block_index(D, t.P, i, j)];
            }
        }
        const float *hidden = saved.hidden + k * saved.wide, *slope = saved.slope + k * saved.wide;
        std::fill(d_hidden.begin(), d_hidden.end(), 0.0f);
        for (int64_t i = 0; i < D; ++i) {
            const float df = d_features[static_cast<size_t>(i)];
            bias3[i] += df;
            for (int64_t h = 0; h < 2 * D; ++h) {
                weight3[i * 2 * D + h] += df * hidden[h];
                d_hidden[static_cast<size_t>(h)] += df * mlp.weight3[i * 2 * D + h];
            }
        }
        for (int64_t h = 0; h < 2 * D; ++h) {
            const float dz = d_hidden[static_cast<size_t>(h)] * slope[h];
            bias1[h] += dz;
            for (int64_t i = 0; i < D; ++i)
                weight1[h * D + i] += dz * table.embedding[static_cast<size_t>(k * D + i)];
        }
    }
}

}  // namespace dql
