// What a call of the native backend does: packs weights once per version of the parameters, cuts the rows into tiles
// and runs a variant's kernels over them. Knows nothing of Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "network.h"

namespace dql {

// ---- variants ----

// Every variant that was compiled, the fastest first, with "" if this CPU can run it and else the reason.
struct Variant {
    const char* name;
    const Kernels* kernels;  // null if this CPU cannot run it
    std::string reason;
};
const std::vector<Variant>& variants();

// The kernels in use: the first that can run, or the one that was forced.
const Kernels& kernels();

// Forces a variant for the whole process; an empty name undoes that. Packed weights serve all variants but bf16's.
// Throws std::invalid_argument with the reason if it is unknown or this CPU cannot run it.
void force_variant(const std::string& name);

// ---- memory ----

// 64-byte aligned floats, not initialised. A thread keeps the few large ones that it freed last for its next calls: the
// system would take their pages back and clear new ones every time.
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(int64_t floats);
    float* data() const { return memory_.get(); }
    int64_t size() const { return size_; }

private:
    struct Free {
        size_t bytes;
        void operator()(float* p) const;
    };
    std::unique_ptr<float, Free> memory_;
    int64_t size_ = 0;
};

// ---- networks ----

// Sizes of a denoiser (one trunk, A outputs) or of twin critics (two trunks, one output each), and where each tensor
// starts in the flat buffer, in the order of kernels/layout.py.
struct Spec {
    bool critic;
    int S, A, D, H, L;
    int activation;
    std::vector<int64_t> offsets;
    int64_t flat_size;
};

// The weights of one version of the parameters, packed for the kernels. Immutable while a call uses it, but for parts
// that are added (another precision, the backward pass's transposed weights).
struct Packed {
    Trunk trunks[2];
    int parts = 0;      // Pack flags: filled for this version
    int allocated = 0;  // ... and those with memory
    std::vector<Buffer> buffers;
    std::vector<float> time_mlp;  // the time MLP's four tensors
    struct TimeTable {
        uint64_t id;
        std::shared_ptr<const Buffer> floats;  // table [K][32 P], then what its backward pass needs
    };
    std::vector<TimeTable> tables;
};

// The steps of a sampler, or the T timesteps of the noise-prediction loss (then without steps).
struct Table {
    uint64_t id;  // unique in the process
    int K, D;
    std::vector<float> steps;      // [K][STEP_COLUMNS]
    std::vector<float> embedding;  // [K][D], of the timesteps
    std::vector<float> q_sample;   // [K][2], for the loss
};

class Network {
public:
    explicit Network(Spec spec);
    const Spec& spec() const { return spec_; }

    // The parameters at `flat`, packed. `version` is the tensors' version counter; beside it 32 elements of each tensor
    // are compared, since optimizers and `.data` can write without counting. A write through `.data` to a small part of
    // a tensor can go unnoticed.
    // What it returns may be used from any thread.
    std::shared_ptr<Packed> packed(const float* flat, int64_t version, int parts);

    // The table's time part; `packed` remembers the last few.
    std::shared_ptr<const Buffer> time_table(Packed& packed, const Table& table) const;

private:
    Spec spec_;
    std::vector<int64_t> probed_;  // elements of the flat buffer, some of each tensor
    std::vector<float> probes_;    // their values when the weights were packed
    std::shared_ptr<Packed> current_;
    const float* flat_ = nullptr;
    int64_t version_ = -1;
    mutable std::mutex mutex_;  // `learn` packs while another thread may have the interpreter

    TrunkSource source(const float* flat, int trunk) const;
    void allocate(Packed& packed, int parts) const;
};

// ---- calls; `flat` gradients are laid out as the parameters, padding untouched ----

// What a chain keeps for its backward pass, which overwrites it: callers set `spent` before they start one.
struct SavedChain {
    std::shared_ptr<Packed> packed;
    std::shared_ptr<const Buffer> time_table;
    Buffer memory;
    Saved saved;
    int64_t B, N;
    bool spent = false;
};

struct ChainCall {
    std::shared_ptr<Packed> packed;
    std::shared_ptr<const Buffer> time_table;
    const Table* table;
    const float* states;
    int64_t B, N;
    const float* noise;  // or null
    uint64_t seed;
    float max_action;
    bool bf16;
    int threads;
    float* actions;
};

void chain(const ChainCall& call, SavedChain* saved);

// The published acting rule: of each state's N actions one, drawn from softmax(min(Q_1, Q_2)).
void select(const ChainCall& call, const Packed& critic, uint64_t draw_seed, float* chosen);

// The same draw, with all that it is from: the call's actions are all candidates [B N][A], index [B] is which was taken.
void draw(const ChainCall& call, const Packed& critic, uint64_t draw_seed, int64_t* index);

struct Gradients {
    float* flat;     // or null
    bool accumulate;
    float* d_states;  // [B][S], or null
};
void chain_backward(const Network& net, SavedChain& saved, const Table& table, const float* states,
                    const float* d_actions, float d_scale, const Gradients& out, int threads);

void q_values(const Packed& critic, const float* states, int64_t B, const float* actions, int64_t N, float* q1,
              float* q2, int threads);

// r + mask * discount * min over i of max over n of Q_i(s, a_n): [B]; returns its mean
double target_q(const Packed& critic, const float* states, int64_t B, const float* actions, int64_t N,
                const float* rewards, const float* masks, float discount, float* out, int threads);

struct CriticLoss {
    double loss, q;  // the sum of both means of squared errors; the mean of both Q
};
CriticLoss critic_gradient(const Network& net, const Packed& packed, const float* states, const float* actions,
                           int64_t B, const float* target, const Gradients& out, int threads);

struct QMeans {
    double q, other;  // mean Q_i, mean |Q_j|
};
// dQ_i/da [B][A] of the critic `which` (0 or 1).
QMeans q_gradient(const Packed& critic, int which, const float* states, const float* actions, int64_t B,
                  float* d_actions, int threads);

// The noise-prediction loss, t and noise drawn from the seeds; returns the loss.
double bc_gradient(const Network& net, const Packed& packed, const Buffer& time_table, const Table& table,
                   const float* states, const float* actions, int64_t B, uint64_t t_seed, uint64_t noise_seed,
                   bool predict_epsilon, const Gradients& out, int threads);

// Clips to max_norm (0: no clipping) and takes a step; returns the norm before clipping.
struct AdamState {
    float *parameters, *gradient, *exp_avg, *exp_avg_sq;
    int64_t size;
};
double adam_step(const AdamState& state, double lr, int64_t step, double max_norm);

// ---- whole updates ----

// A network in training. Whoever writes its parameters counts `version` on.
struct Weights {
    Network* net = nullptr;
    float* flat = nullptr;
    int64_t version = 0;
};

struct Optimizer {
    float *gradient = nullptr, *exp_avg = nullptr, *exp_avg_sq = nullptr;
    float* step = nullptr;  // [1], the steps taken
    double lr = 0.0, max_norm = 0.0;
};

// An agent of Diffusion-QL or, without the last three networks, of behaviour cloning.
struct Learner {
    Weights actor, ema_actor, critic, critic_target;
    Optimizer actor_adam, critic_adam;
    const Table *steps = nullptr, *loss = nullptr;  // the chain's; the T timesteps of the noise-prediction loss
    bool predict_epsilon = true;
    float max_action = 0.0f, discount = 0.0f;
    double eta = 0.0, tau = 0.0;
    int64_t candidates = 1;  // next actions whose best value is the target's
    bool learns_q() const { return critic.net != nullptr; }
};

// [size][S], [size][A], [size], [size][S], [size]
struct Transitions {
    const float *states, *actions, *rewards, *next_states, *masks;
    int64_t size;
};

// As dql.draws.UpdateSeeds.
struct UpdateSeeds {
    uint64_t target, bc_t, bc_noise, actor, coin;
};

// n updates of an agent, one after the other.
struct LearnCall {
    Learner agent;
    Transitions data;
    const int64_t* rows;  // [n][B] of the data; or null: the data are the batch, and n is 1
    int64_t B, n;
    const UpdateSeeds* seeds;  // [n]
    const double *lr_scale, *ema_weight;  // [n]
    // Written. Of Diffusion-QL [n][8]: loss, mean Q, mean target and gradient's norm of the critics; loss, its two
    // terms and gradient's norm of the actor. Of behaviour cloning [n][2]: loss and norm.
    double* metrics;
    // null, or written [n][TIMES]: when each update began and each of its phases ended, nanoseconds of the steady clock.
    // The phases are the batch's rows; of Diffusion-QL the target's chain, its Q, the critics' gradient, their Adam; the
    // noise-prediction loss; of Diffusion-QL the actor's chain, the Q gradient, the chain's gradient; the actor's Adam;
    // of Diffusion-QL the averages.
    static constexpr int TIMES = 12;
    int64_t* times;
    int64_t metrics_each() const { return agent.learns_q() ? 8 : 2; }
};

// The same bits whatever the number of threads and of agents. Several agents run side by side, each on one thread; so
// few of them that this would leave more than half of the threads idle, one after the other on all. No two of them may
// share a network. Throws std::invalid_argument, with nothing written, for a row that is not among the data's.
void learn(std::vector<LearnCall>& calls, int threads);

}  // namespace dql
