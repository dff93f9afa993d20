// What the kernels are handed: packed networks and jobs, as plain data. No variant's code is in here.
//
// The panel format of activations: n rows and c columns are ceil(c / 32) panels, each [n][32] and contiguous; missing
// columns are zeros. All sizes of a hidden layer are padded to whole panels.
// Weights [K][c], K being what a product sums over, are cut into blocks of 128 columns, each [K][128] and contiguous
// (the last one narrower, in whole panels): rows that are computed together stream whole blocks from front to back.
//
// Letters: B states, N candidates, R = B N rows, S state size, A action size, H hidden width, K steps, L hidden layers.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace dql {

constexpr int PANEL = 32;
constexpr int MAX_LAYERS = 4;
constexpr int STEP_COLUMNS = 6;  // a, b, c0, cx, cp, s: kernels/layout.py

static inline int64_t panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

constexpr int BLOCK_PANELS = 4;
constexpr int BLOCK = BLOCK_PANELS * PANEL;

// Columns of the block that panel `panel` of P is in.
static inline int64_t block_width(int64_t panel, int64_t P) {
    const int64_t left = P - panel / BLOCK_PANELS * BLOCK_PANELS;
    return (left < BLOCK_PANELS ? left : BLOCK_PANELS) * PANEL;
}

// Where element (k, column) of packed weights [K][32 P] is.
static inline int64_t block_index(int64_t K, int64_t P, int64_t k, int64_t column) {
    return column / BLOCK * BLOCK * K + k * block_width(column / PANEL, P) + column % BLOCK;
}

enum Activation : int { MISH = 0, RELU = 1, SILU = 2 };  // the order of kernels/layout.py's ACTIVATIONS
enum Pack : int { FORWARD = 1, BACKWARD = 2, BF16 = 4 };

// Where one network's tensors lie in its flat buffer, row-major as torch has them.
struct TrunkSource {
    const float* first;       // [H][first_stride]: of the first hidden layer
    int64_t first_stride;     // its columns: A + D + S of a denoiser, S + A of a critic
    int64_t x_column;         // where the action's columns start
    int64_t time_column;      // where the time features' columns start; unused without any
    int64_t state_column;
    const float* first_bias;  // [H]
    const float* hidden[MAX_LAYERS - 1];       // L - 1 of [H][H]
    const float* hidden_bias[MAX_LAYERS - 1];  // [H]
    const float* out;         // [O][H]
    const float* out_bias;    // [O]
};

// One MLP: H x L with an activation, then O outputs. P = panels(H). Pointers into buffers that somebody else owns.
struct Trunk {
    int S, X, D, H, L, O;  // X: inputs that change from step to step (the action); D: time features, 0 for a critic
    int activation;
    int64_t P;
    float* state_weight;                      // blocks [S][32 P]
    float* time_weight;                       // blocks [D][32 P]
    float* x_weight;                          // blocks [X][32 P]
    float* first_bias;                        // [32 P]
    float* hidden_weight[MAX_LAYERS - 1];     // blocks [32 P][32 P]
    float* hidden_bias[MAX_LAYERS - 1];       // [32 P]
    float* out_weight;                        // [O][32 P]
    float* out_bias;                          // [O]
    // BACKWARD: the same matrices, transposed
    float* out_weight_t;                      // blocks [O][32 P]
    float* hidden_weight_t[MAX_LAYERS - 1];   // blocks [32 P][32 P]
    float* x_weight_t;                        // [X][32 P]
    float* state_weight_t;                    // blocks [32 P][32 panels(S)]
    // BF16: two rows' elements side by side, as the CPU's instruction takes them
    uint32_t* hidden_weight_bf16[MAX_LAYERS - 1];  // blocks [16 P][32 P]
};

// What a backward pass needs of a forward pass over `rows` rows. With K steps, rows = K R and row k R + r is row r of
// step k. d_z may be the same memory as slope: each element is read before it is written.
struct Saved {
    int64_t rows;
    float* x;                    // [panels(X)][rows][32]
    float* hidden[MAX_LAYERS];   // after the activation: [P][rows][32]
    float* slope[MAX_LAYERS];    // the activation's derivative: [P][rows][32]
    float* d_z[MAX_LAYERS];      // written by the backward pass: [P][rows][32]
    float* d_out;                // written by the backward pass: [panels(O)][rows][32]
    float* inside;               // chains: 1 where x0 (and, last, the action) was not clamped [panels(A)][rows + R][32]
};

// A reverse chain over rows of `states`.
struct ChainJob {
    const Trunk* net;
    const float* time_table;  // [K][32 P]
    const float* states;      // [B][S]
    const float* noise;       // [K][R][A], or null: then drawn from (seed, offset, row)
    uint64_t seed;
    uint32_t offset;
    int64_t N, R;
    int K;
    const float* steps;       // [K][STEP_COLUMNS]
    float max_action;
    bool bf16;
    float* actions;           // [R][A]
    const Saved* saved;       // null: nothing is saved
    // select alone: the critics' smaller value of every action
    const Trunk* critic;      // two, or null
    float* q_min;             // [R]
};

// The gradient of a chain, as far as it goes row by row: d_z, d_out, and nothing of the weights.
struct ChainBackwardJob {
    const Trunk* net;
    const float* steps;
    int64_t R;
    int K;
    const float* d_actions;   // [R][A]
    float d_scale;            // a factor of d_actions
    const Saved* saved;
};

// The noise-prediction loss and its row-wise gradient.
struct BcJob {
    const Trunk* net;
    const float* time_table;  // [T][32 P]
    const float* q_sample;    // [T][2]: sqrt(abar), sqrt(1 - abar)
    const float* states;      // [B][S]
    const float* actions;     // [B][A]
    const int32_t* t;         // [B]
    uint64_t seed;            // of the noise: normal(seed, 1, B, A)
    int64_t B;
    bool predict_epsilon;
    const Saved* saved;
    float* row_loss;          // [B]: the sum of squared errors of a row
};

// One Q function over rows, row r belonging to state r / N.
struct CriticJob {
    const Trunk* net;         // one
    const float* states;      // [B][S]
    const float* actions;     // [R][A]
    int64_t N, R;
    float* q;                 // [R]
    const Saved* saved;       // null: values alone
    const float* target_q;    // null, or [R]: d_q = 2 / R (q - target_q), down to d_z
    float* d_actions;         // null, or [R][A]: dq/da, down to d_z
};

// out[j][i] = sum over rows of a[row][j] b[row][i], one panel of each, 32 floats a row.
struct OuterJob {
    const float* a;
    const float* b;
    int64_t rows;
    int valid_a, valid_b;      // columns that exist
    float* out;
    int64_t stride_a, stride_b;  // out[j * stride_a + i * stride_b]
    bool accumulate;
};

struct AdamJob {
    float* parameters;
    const float* gradient;
    float* exp_avg;
    float* exp_avg_sq;
    int64_t size;
    float gradient_scale;  // of clipping
    float step_size;       // lr / (1 - beta1^step)
    float correction;      // sqrt(1 - beta2^step)
    float beta2, one_minus_beta1, one_minus_beta2, eps;  // 1 - beta in double: 1 - 0.999f is off by 5e-5
};

// One variant of the kernels. `scratch` is 64-byte aligned memory of the calling thread, scratch_floats() floats of it.
struct Kernels {
    const char* name;
    int max_rows;  // a tile holds up to this many
    bool bf16;
    void (*pack)(const Trunk& trunk, const TrunkSource& source, int what);
    void (*to_panels)(const float* in, int64_t stride, int64_t rows, int64_t columns, float* out, int64_t out_panel);
    // features [K][32 panels(D)] -> table [K][32 P]
    void (*time_table)(const Trunk& net, const float* features, int64_t K, float* table);
    void (*activate)(int activation, float* z, float* slope, int64_t n);
    int64_t (*scratch_floats)(const Trunk& net, int K);
    void (*chain_tile)(const ChainJob& job, int64_t first_row, int rows, float* scratch);
    void (*chain_backward_tile)(const ChainBackwardJob& job, int64_t first_row, int rows, float* scratch);
    void (*bc_tile)(const BcJob& job, int64_t first_row, int rows, float* scratch);
    void (*critic_tile)(const CriticJob& job, int64_t first_row, int rows, float* scratch);
    void (*outer)(const OuterJob& job);
    // out[32] (+)= sum of rows of [rows][32]
    void (*column_sums)(const float* panel, int64_t rows, float* out, bool accumulate);
    // to (+)= from
    void (*add)(float* to, const float* from, int64_t size, bool accumulate);
    // d_states of rows: [rows][32 P panels] x state_weight_t -> [rows][S]
    void (*states_tile)(const Trunk& net, const float* d_state_part, int64_t part_rows, int64_t first_row, int rows,
                        float* d_states, float* scratch);
    double (*sum_squares)(const float* values, int64_t size);
    void (*adam)(const AdamJob& job);
    void (*lerp)(float* target, const float* source, int64_t size, float weight);
    bool (*all_finite)(const float* values, int64_t size);
    double (*uniform)(uint64_t seed, uint32_t offset, uint32_t row);
    void (*integers)(uint64_t seed, uint32_t offset, uint64_t high, int64_t first, int64_t count, int32_t* out);
    void (*normals)(uint64_t seed, uint32_t offset, uint32_t k0, int steps, uint32_t row0, int n, int A, float* out,
                    int64_t step_stride, int64_t panel_stride);
    double (*fma_ceiling)(double seconds, bool bf16);  // FLOP/s of a bare register loop
};

}  // namespace dql
