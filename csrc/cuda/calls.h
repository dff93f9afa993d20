// What a launch is told: numbers of 8 bytes in a row, which kernels/cuda/binding.py packs by the names that stand here.
// Before the bar are those that change from call to call, behind it what a plan packs once.
#pragma once

#include <stdint.h>

namespace dql {
namespace cuda {

using address = uint64_t;  // of memory, or null; a seed's bits; a stream
using integer = int64_t;
using real = double;

#define DQL_PLACE(F) F(integer, ordinal)
#define DQL_TILED(F) F(integer, precision) F(integer, cluster) F(integer, m_tiles) F(integer, resident) \
                     F(integer, solo)

#define DQL_PROLOGUE_CALL(F, BAR)                                                                     \
    F(address, flat) F(address, states) F(address, packed) F(address, told) F(address, stream) BAR    \
    DQL_TILED(F) F(integer, transposed) F(address, embedding) F(integer, B) F(integer, K)             \
    F(address, counter) DQL_PLACE(F)

#define DQL_CHAIN_CALL(F, BAR)                                                                        \
    F(address, flat) F(address, states) F(address, packed) F(address, noise) F(address, seed)         \
    F(address, seed_at) F(address, out) F(address, saved) F(address, told) F(address, stream) BAR     \
    DQL_TILED(F) F(address, embedding) F(integer, transposed) F(integer, first_network)               \
    F(integer, networks)                                                                              \
    F(address, steps) F(integer, B) F(integer, N) F(integer, K) F(real, max_action)                   \
    F(address, actions_in) F(address, d_out) F(address, back) F(address, d_actions)                   \
    F(integer, max_clusters) F(integer, all_rows) F(address, only_at) F(integer, only) DQL_PLACE(F)

#define DQL_GRADIENT_CALL(F, BAR)                                                                     \
    F(address, flat) F(address, states) F(address, saved) F(address, back) F(address, actions_in)     \
    F(address, d_q) F(address, workspace) F(address, d_flat) F(address, d_states) F(address, stream) BAR \
    DQL_TILED(F) F(integer, first_network) F(integer, networks) F(address, embedding) F(integer, B)   \
    F(integer, N) F(integer, K) F(integer, parts) DQL_PLACE(F)

// What a call of the actor is told beside.
#define DQL_CLONING_CALL(F, BAR)                                                                      \
    F(address, actions) F(address, t) F(address, seed) F(address, seed_at) F(address, loss) BAR       \
    F(address, q_sample) F(integer, T) F(integer, predict_epsilon)

#define DQL_CHOOSE_CALL(F, BAR)                                                                       \
    F(address, q) F(address, actions) F(address, seed) F(address, seed_at) F(address, chosen)         \
    F(address, stream) BAR F(integer, B) F(integer, N) F(integer, A) DQL_PLACE(F)

#define DQL_NOISE_CALL(F, BAR)                                                                        \
    F(address, seed) F(address, seed_at) F(address, out) F(address, stream) BAR F(integer, K)         \
    F(integer, R) F(integer, A) DQL_PLACE(F)

#define DQL_BEGIN_CALL(F, BAR)                                                                        \
    F(address, rows) F(integer, first) F(address, bc_t) F(address, coin) F(address, target)           \
    F(address, bc_noise) F(address, actor) F(real, lr_scale) F(real, ema_weight) F(address, stream) BAR \
    F(address, states) F(address, actions) F(address, rewards) F(address, next_states) F(address, masks) \
    F(address, to_states) F(address, to_actions) F(address, to_rewards) F(address, to_next_states)    \
    F(address, to_masks) F(integer, size) F(integer, B) F(integer, S) F(integer, A) F(integer, T)     \
    F(address, t) F(address, seeds) F(address, scalars) DQL_PLACE(F)

#define DQL_CRITIC_LOSS_CALL(F, BAR)                                                                  \
    F(address, q_target) F(address, rewards) F(address, masks) F(address, q) F(address, d_q)          \
    F(address, metrics) F(address, stream) BAR F(integer, B) F(integer, N) F(real, discount) DQL_PLACE(F)

#define DQL_Q_LOSS_CALL(F, BAR)                                                                       \
    F(address, q) F(address, picked_at) F(address, d_q) F(address, loss) F(address, stream) BAR       \
    F(integer, B) F(integer, picked) F(real, eta) DQL_PLACE(F)

#define DQL_ADAM_CALL(F, BAR)                                                                         \
    F(address, flat) F(address, gradient) F(address, exp_avg) F(address, exp_avg_sq) F(address, step) \
    F(address, lr_scale_at) F(address, average) F(address, weight_at) F(address, sums) F(address, norm) \
    F(address, stream) BAR F(integer, count) F(real, lr) F(real, max_norm) F(real, weight) DQL_PLACE(F)

#define DQL_MEMBER(type, name) type name;
#define DQL_NAMED(type, name) #type " " #name ";"
#define DQL_CALL(Name, FIELDS)                                      \
    struct Name {                                                   \
        FIELDS(DQL_MEMBER, )                                        \
        static constexpr const char* NAMES = FIELDS(DQL_NAMED, "|"); \
    };

DQL_CALL(PrologueCall, DQL_PROLOGUE_CALL)
DQL_CALL(ChainCall, DQL_CHAIN_CALL)
DQL_CALL(GradientCall, DQL_GRADIENT_CALL)
DQL_CALL(CloningCall, DQL_CLONING_CALL)
DQL_CALL(ChooseCall, DQL_CHOOSE_CALL)
DQL_CALL(NoiseCall, DQL_NOISE_CALL)
DQL_CALL(BeginCall, DQL_BEGIN_CALL)
DQL_CALL(CriticLossCall, DQL_CRITIC_LOSS_CALL)
DQL_CALL(QLossCall, DQL_Q_LOSS_CALL)
DQL_CALL(AdamCall, DQL_ADAM_CALL)

}  // namespace cuda
}  // namespace dql
