// From a ChainJob to the launch of its kernel, for one precision; each is compiled in a file of its own.
#pragma once

#include "chain_arguments.h"
#include "launch.h"

namespace dql {
namespace cuda {

using ChainKernel = void (*)(device::ChainArguments);

ChainKernel wide_chain_kernel_for(int HP, FirstLayer first);
ChainKernel solo_chain_kernel_for(int HP, int rows, bool saves, bool backward);

template <Precision P>
ChainKernel chain_kernel_for(const Tiling& tiling, bool backward);

inline device::ChainArguments chain_arguments(const ChainJob& job, bool backward) {
    const Slices s(job.net, job.tiling);
    const Packed packed(job.net, job.tiling, job.transposed, job.B, job.cloning.planes() > 0 ? job.cloning.T : job.K);
    const int64_t RP = whole_tiles(job.R, job.tiling);
    const int cloned = job.cloning.planes();
    const SavedPlaces saved(job.net, job.tiling, job.networks, RP, job.K, cloned);
    const BackwardPlaces back(job.net, job.tiling, job.networks, RP, job.K, cloned);
    device::ChainArguments a = {job.net, BlockMemory(job.net, job.tiling), Division(s.pairs(), s.groups)};
    a.HP = s.HP, a.NS = s.NS, a.groups = s.groups;
    a.operand_bytes = static_cast<int>(s.operand_bytes());
    a.floats_bytes = s.floats() * 4;
    a.first_network = job.first_network;
    a.operands_apart = packed.operands_apart, a.floats_apart = packed.floats_apart;
    a.flat = job.flat;
    a.states = job.states, a.embedding = job.embedding, a.told = job.told;
    if (!s.solo) {  // which has nothing packed
        a.operands = job.packed + packed.operands + (backward ? job.tiling.cluster * s.operand_bytes() : 0);
        a.first = job.packed + packed.first;
        a.floats = job.packed + packed.floats;
        a.time_table = reinterpret_cast<const float*>(job.packed + packed.time_table);
        a.state_part = reinterpret_cast<const float*>(job.packed + packed.state_part);
    }
    a.steps = job.steps;
    a.noise = job.noise, a.seed_at = job.seed_at, a.seed = job.seed;
    a.actions_in = job.actions_in;
    a.out = job.out;
    if (job.saved != nullptr) {
        a.h = job.saved + saved.h, a.slope = job.saved + saved.slope;
        a.xs = reinterpret_cast<float*>(job.saved + saved.xs), a.raws = reinterpret_cast<float*>(job.saved + saved.raws);
    }
    if (backward) {
        a.d_out_in = job.d_out;
        a.d_z = job.back + back.d_z, a.d_out = reinterpret_cast<float*>(job.back + back.d_out);
        a.d_actions = job.d_actions;
    }
    a.B = job.B, a.R = job.R, a.RP = RP, a.N = job.N, a.K = job.K;
    a.planes = job.K + cloned;
    a.chain_tiles = job.K > 0 ? static_cast<int>(RP / job.tiling.rows()) : 0;
    a.tiles = a.chain_tiles + cloned * static_cast<int>(RP / job.tiling.rows());
    a.cloning = job.cloning;
    if (cloned > 0) {
        a.errors = reinterpret_cast<float*>(job.saved + saved.errors);
        a.counter = reinterpret_cast<int32_t*>(job.saved + saved.counter);
    }
    a.only_at = job.only_at, a.only = job.only;
    a.max_action = job.max_action;
    a.all_rows = job.all_rows;
    return a;
}

}  // namespace cuda
}  // namespace dql
