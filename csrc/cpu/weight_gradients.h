// From the gradients of a network's pre-activations to those of its weights.
#pragma once

#include "tiles.h"

namespace dql {

// All products of a network's weight gradients but the state's and the time's, as tasks of similar size. An element of
// the result is summed by one task in the order of the rows: the same bits whatever the number of threads.
class WeightGradients {
public:
    // trunk: which of twin critics; `saved` after the backward pass over the rows
    WeightGradients(const Network& net, int trunk, const Gradients& out, const Saved& saved);
    int64_t size() const { return static_cast<int64_t>(tasks_.size()); }
    void run(int64_t task) const;

private:
    struct Task {
        int layer, j, i;  // panels of the weight's rows and columns; i < 0: the bias
    };
    int outputs() const { return spec_.critic ? 1 : spec_.A; }

    const Spec& spec_;
    const Saved& saved_;
    bool accumulate_;
    float *weight_[MAX_LAYERS + 1], *bias_[MAX_LAYERS + 1];
    std::vector<Task> tasks_;
};

// The state's columns of the first weight, from d_part [P][B][32], the gradient of each state's part.
void state_gradient(const Network& net, const float* d_part, int64_t B, const float* states, float* first_weight,
                    bool accumulate, int threads);

// From d_table [K][32 P], the gradient of what each timestep adds to the first layer, to the time MLP and to the first
// layer's bias and time columns. `floats`: the table's, see Network::time_table.
void time_gradient(const Network& net, const Packed& packed, const float* floats, const Table& table,
                   const float* d_table, const Gradients& out);

}  // namespace dql
