// What module.cpp calls: launches, each on the stream it is given, and questions about devices. Addresses are those of
// device memory (under the emulator: of the host's). Nothing here waits for a device. A call that CUDA refuses throws
// CudaError with the call's name.
#pragma once

#include <stdint.h>

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
};
int64_t gradient_workspace(const Mlp& net, const Tiling& tiling, int K, int parts, bool parameters);
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

}  // namespace cuda
}  // namespace dql
