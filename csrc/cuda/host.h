// What module.cpp calls: launches, each on the stream it is given, and questions about devices. Addresses are those of
// device memory (under the emulator: of the host's). Nothing here waits for a device. A call that CUDA refuses throws
// CudaError with the call's name.
#pragma once

#include <stdint.h>

#include <map>
#include <stdexcept>
#include <string>

#include "shapes.h"

namespace dql {
namespace cuda {

struct CudaError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

using Stream = void*;  // a cudaStream_t

struct Device {
    int capability;        // 90, say
    int multiprocessors;
    int shared_per_block;  // bytes, with the opt-in
};

// ---- runtime.cu ----

constexpr int EMULATED_CAPABILITY = 90;
bool emulated();
int driver_version();              // 13000; 0: there is no driver. Never throws
int runtime_version();
Device device(int ordinal);        // throws where there is none
// "", or why no kernel runs on this device: CUDA's words. Throws, as the two below, on what may not last.
std::string cannot_run(int ordinal);
// The compute capability that the code which this device runs was compiled for: less than the device's where its own
// was left out and PTX stands in, and then without what the device has more. 0: there is none.
int compiled_for(int ordinal);
// Whether the kernel for 128 rows a tile does: code for compute capability 9.0.
bool can_run_wide(int ordinal);
void use_device(int ordinal);      // for the calling thread's launches
int max_clusters(int ordinal, const Mlp& net, const Tiling& tiling, bool backward);  // resident at a time
// To measure what it is good for: whether kernels that overlap ask for the same shared memory of a multiprocessor.
void compare(bool same_carveout);
// How often each kernel was launched in the emulator since the last question.
std::map<std::string, int64_t> launches();

// The noise-prediction loss of a batch, beside a chain over its states (N = 1): B rows more, of one step each, with a
// timestep of their own. T is that of the tables; the chain runs all steps, so that its step k has timestep T - 1 - k,
// or, with K = 0, none.
struct Cloning {
    const float* actions = nullptr;   // [B, X]; null: no batch is cloned
    const int64_t* t = nullptr;       // [B]
    const float* q_sample = nullptr;  // [T, 2]: the factors of actions and of noise
    const int64_t* seed_at = nullptr; // of the noise; or null: `seed`
    uint64_t seed = 0;
    int T = 0;
    bool predict_epsilon = true;      // what is predicted: the noise, or the actions
    float* loss = nullptr;            // written [1]: the mean square of what the prediction is off

    DQL_PLAIN int planes() const { return actions != nullptr ? 1 : 0; }
};

// ---- prologue.cu: one launch ----

struct PrologueJob {
    Mlp net;
    Tiling tiling;
    bool transposed;         // pack for backward passes too
    const float* flat;       // [net.size]
    const float* embedding;  // [K, D], or null of critics
    const float* states;     // [B, S]
    int64_t B;
    int K;                   // 1 of critics
    char* packed;            // written: see Packed
    int32_t* told;           // null, or set to 1 if a state holds NaN or infinity: the device's, or pinned memory
    int32_t* counter = nullptr;  // null, or set to 0: see SavedPlaces
};
void prologue(const PrologueJob& job, Stream stream);

// ---- chain_*.cu: one launch ----

struct ChainJob {
    Mlp net;
    Tiling tiling;
    bool transposed;             // as packed
    int first_network, networks; // the critics that run; 0, 1 of a denoiser
    const float* flat;
    const float *states, *embedding;  // [B, S] of a denoiser's forward pass; solo: [K, D]; see PrologueJob
    int32_t* told;           // as the prologue's
    const char* packed;      // null of solo
    const float* steps;      // [K, STEP_STRIDE]; null of critics
    int64_t B, R;
    int N, K;                // K = 1 of critics
    float max_action;
    const float* noise;      // [K, R, A] or null: drawn
    const int64_t* seed_at;  // device memory, or null: `seed`
    uint64_t seed;
    const float* actions_in; // critics: [R, X]
    float* out;              // a denoiser: actions [R, X]; critics: q [networks, R]
    char* saved;             // null, or written: see SavedPlaces
    // a backward pass
    const float* d_out;      // a denoiser: d_actions [R, X]; critics: d_q [networks, R]
    char* back;              // written: see BackwardPlaces
    float* d_actions;        // critics: null, or written [networks, R, X]
    int max_clusters;        // how many of the grid may be resident: 0: ask the device
    bool all_rows;           // a cluster exchanges tiles that are not full whole all the same: to measure
    Cloning cloning;         // of a denoiser, saving; not solo
    const float* only_at;    // null, or, of critics' backward pass, [2]: a 0 for the one that is left out, and that
                             // d_actions is [R, X] of the other alone
    int only;                // the same: 1 or 2 for the one that is not; 0: none is
};
void chain_forward(const ChainJob& job, Stream stream);
void chain_backward(const ChainJob& job, Stream stream);
int64_t shared_bytes(const Mlp& net, const Tiling& tiling, bool backward);  // of a block

// ---- gradients.cu: what is left of a backward pass, two launches ----

struct GradientJob {
    Mlp net;
    Tiling tiling;
    int first_network, networks;
    const float* flat;
    const float* embedding;   // [K, D] or null of critics
    const float* states;      // [B, S]
    int64_t B, R, RP;
    int N, K;
    const char* saved;
    const char* back;
    const float* actions_in;  // critics: [R, X]
    const float* d_q;         // critics: [networks, R]
    float* workspace;         // gradient_workspace() floats
    int parts;                // the rows are cut into so many parts, added in order
    float* d_flat;            // null, or written whole [net.size] (a critic that was not run: zeros)
    float* d_states;          // null, or written [B, S]
    Cloning cloning;          // as the chain's
};
// With tables of T rows more; 0: no batch was cloned.
int64_t gradient_workspace(const Mlp& net, const Tiling& tiling, int K, int parts, bool parameters, int T = 0);
void gradients(const GradientJob& job, Stream stream);

// ---- select.cu: one launch each ----

// Of each state's N candidates one, drawn from softmax(min(q[0], q[1])): chosen [B, A].
struct ChooseJob {
    const float* q;           // [2, R]
    const float* actions;     // [R, A]
    const int64_t* seed_at;   // or null: seed
    uint64_t seed;
    int64_t B, R;
    int N, A;
    float* chosen;
};
void choose(const ChooseJob& job, Stream stream);

// dql.noise.normal: out [K, R, A]
struct NoiseJob {
    const int64_t* seed_at;
    uint64_t seed;
    int64_t R;
    int K, A;
    float* out;
};
void noise(const NoiseJob& job, Stream stream);

// ---- update.cu: what an update begins with and its losses, one launch each; a step of Adam, two ----

// A batch gathered from a dataset, or copied, and all that an update has of its own: dql/draws.py.
struct BeginJob {
    const float *states, *actions, *rewards, *next_states, *masks;  // [size, S or A or 1]
    float *to_states, *to_actions, *to_rewards, *to_next_states, *to_masks;  // written [B, ...]
    int64_t size;       // of the dataset; 0: row b of what is written is row b
    uint64_t rows;      // seed: row b is integers(rows, size, ...)[first + b]
    int64_t first;
    int64_t B;
    int S, A, T;
    uint64_t bc_t;      // seed of the timesteps: integers(bc_t, T, B)
    int64_t* t;         // written [B]
    uint64_t coin;      // seed: integers(coin, 2, 1)
    uint64_t target, bc_noise, actor;
    int64_t* seeds;     // written: these, each at a multiple of 16 bytes
    float lr_scale, ema_weight;
    float* scalars;     // written [4]: a 1 for the Q that is maximised and a 0, and those two
};
void begin(const BeginJob& job, Stream stream);

struct CriticLossJob {
    const float* q_target;  // [2, B N]: of the target critics; each one's best of a state's N candidates counts
    const float *rewards, *masks;  // [B]
    const float* q;         // [2, B]
    float discount;
    int64_t B;
    int N;
    float* d_q;             // written [2, B]
    float* metrics;         // written [3]: the loss, the mean of both Q, the mean target
};
void critic_loss(const CriticLossJob& job, Stream stream);

struct QLossJob {
    const float* q;          // [2, B]
    const float* picked_at;  // [2], a 1 for the one that is maximised and a 0; or null: `picked`, 0 or 1
    int picked;
    float eta;
    int64_t B;
    float* d_q;              // written [2, B]: of eta times the loss
    float* loss;             // written [1]
};
void q_loss(const QLossJob& job, Stream stream);

constexpr int MOST_SUMS = 256;  // parts of the gradient's norm: a thread each adds them up

struct AdamJob {
    float *flat, *gradient;         // [count]; the gradient is left clipped
    float *exp_avg, *exp_avg_sq;    // [count]
    float* step;                    // steps done; one more is counted
    float lr;
    const float* lr_scale_at;       // null: 1
    float max_norm;                 // 0: nothing is clipped
    float* average;                 // [count] or null
    float weight;                   // how far it goes towards `flat`; 0: it is left alone
    const float* weight_at;         // or null: `weight`
    int64_t count;
    float* sums;                    // written [MOST_SUMS]
    float* norm;                    // written [1]: before clipping
    int parts = 0;
};
void adam(const AdamJob& job, Stream stream);

}  // namespace cuda
}  // namespace dql
