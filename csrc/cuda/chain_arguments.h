// What the chain kernels are handed, and the arithmetic of the chain itself, a quad of a row's numbers at a time.
#pragma once

#include "arithmetic.h"
#include "block_memory.h"
#include "device.h"
#include "host.h"

namespace dql {
namespace device {

DQL_DEVICE float4 load_floats(const void* at) { return *static_cast<const float4*>(at); }

// What the kernel is handed.
struct ChainArguments {
    Mlp net;
    BlockMemory memory;
    Division division;
    int HP, NS, groups, operand_bytes, floats_bytes;
    int first_network;
    int64_t operands_apart, floats_apart;  // bytes, network to network
    const float* flat;
    const char* operands;  // of the direction
    const char* first;     // of the first layer, if there are slabs of it
    const char* floats;
    const float* time_table;
    const float* state_part;
    const float* embedding;  // [K, D], read by solo blocks
    const float* states;  // [B, S], read by solo blocks and where there are slabs, and told of:
    int32_t* told;        // null, or set to 1 if one holds NaN or infinity
    const float* steps;
    const float* noise;
    const int64_t* seed_at;
    uint64_t seed;
    const float* actions_in;
    float* out;
    char *h, *slope;  // null: nothing is saved
    float *xs, *raws;
    const float* d_out_in;
    char* d_z;
    float* d_out;
    float* d_actions;
    int64_t B, R, RP;
    int N, K, tiles;
    float max_action;
    bool all_rows;  // a tile that is not full is exchanged whole all the same: to compare
    int chain_tiles, planes;  // the other tiles are cloned rows, whose one step has number K
    cuda::Cloning cloning;
    float* errors;
    int32_t* counter;
    const float* only_at;
    int only;
};

struct Step {
    float a, b, c0, cx, cp, s;
    DQL_DEVICE explicit Step(const float* row) {  // or null, of critics
        const float4 first = row != nullptr ? load_floats(row) : make_float4(0, 0, 0, 0);
        a = first.x, b = first.y, c0 = first.z, cx = first.w;
        cp = row != nullptr ? row[4] : 0, s = row != nullptr ? row[5] : 0;
    }
    DQL_DEVICE Step(float4 first, float4 second)  // two halves of a row
        : a(first.x), b(first.y), c0(first.z), cx(first.w), cp(second.x), s(second.y) {}
};

DQL_DEVICE void put(float* to, const float (&from)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
DQL_DEVICE void get(float (&to)[4], const float* from) {
    const float4 four = load_floats(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
// Numbers summed over the four lanes 4 g + t of a quad, of which lane t gets the one of that number. Each exchange
// halves how many a lane has, so that four sums cost three shuffles, of which two wait for each other.
DQL_DEVICE float summed_over_quad(const float (&each)[4]) {
    const bool odd = lane() & 1, high = lane() & 2;
    const float low = (odd ? each[1] : each[0]) + shuffle_xor(odd ? each[0] : each[1], 1);
    const float up = (odd ? each[3] : each[2]) + shuffle_xor(odd ? each[2] : each[3], 1);
    return (high ? up : low) + shuffle_xor(high ? low : up, 2);
}
// Of two numbers, lane t gets number t % 2.
DQL_DEVICE float summed_over_quad(const float (&each)[2]) {
    const bool odd = lane() & 1;
    const float sum = (odd ? each[1] : each[0]) + shuffle_xor(odd ? each[0] : each[1], 1);
    return sum + shuffle_xor(sum, 2);
}
// A quad of a row in device memory that is `width` wide, read or written as far as it exists.
DQL_DEVICE void read(float (&to)[4], const float* row, int quad, int width) {
    DQL_UNROLL
    for (int i = 0; i < 4; ++i)
        if (4 * quad + i < width) to[i] = row[4 * quad + i];
}
DQL_DEVICE void write(float* row, const float (&from)[4], int quad, int width) {
    DQL_UNROLL
    for (int i = 0; i < 4; ++i)
        if (4 * quad + i < width) row[4 * quad + i] = from[i];
}

DQL_DEVICE float clamped(const ChainArguments& a, float x) {  // NaN stays
    return x > a.max_action ? a.max_action : x < -a.max_action ? -a.max_action : x;
}
DQL_DEVICE bool inside(const ChainArguments& a, float x) { return fabsf(x) <= a.max_action; }

// noise[k] of a row, handed in or drawn; left alone behind the last row.
DQL_DEVICE void draw(const ChainArguments& a, float (&noise)[4], int64_t row, int quad, int k) {
    if (row >= a.R) return;
    if (a.noise != nullptr) {
        read(noise, a.noise + (static_cast<int64_t>(k) * a.R + row) * a.net.X, quad, a.net.X);
        return;
    }
    const uint64_t seed = a.seed_at != nullptr ? static_cast<uint64_t>(*a.seed_at) : a.seed;
    const float4 four =
        normals4(seed, static_cast<uint32_t>(row), static_cast<uint32_t>(k), static_cast<uint32_t>(quad), 0);
    noise[0] = four.x, noise[1] = four.y, noise[2] = four.z, noise[3] = four.w;
}

// Of a cloned row: the noisy action sqrt(abar_t) a + sqrt(1 - abar_t) noise, and what is to be predicted from it; left
// alone behind the last row.
DQL_DEVICE void clone(const ChainArguments& a, float (&x)[4], float (&target)[4], int64_t row, int quad) {
    if (row >= a.R) return;
    const cuda::Cloning& c = a.cloning;
    const uint64_t seed = c.seed_at != nullptr ? static_cast<uint64_t>(*c.seed_at) : c.seed;
    const float4 four = normals4(seed, static_cast<uint32_t>(row), 0, static_cast<uint32_t>(quad), 0);
    const float noise[4] = {four.x, four.y, four.z, four.w};
    const float keep = c.q_sample[2 * c.t[row]], add = c.q_sample[2 * c.t[row] + 1];
    read(x, c.actions + row * a.net.X, quad, a.net.X);
    DQL_UNROLL
    for (int i = 0; i < 4; ++i) {
        target[i] = c.predict_epsilon ? noise[i] : x[i];
        x[i] = keep * x[i] + add * noise[i];
    }
}

struct Updated {
    float raw[4], x0[4], next[4];  // next: not clamped
};

// x0 = clamp(a x - b eps), x' = c0 x0 + cx x + cp x0_before + s noise: kernels/reference.py. `sums` is eps without bias.
DQL_DEVICE Updated chain_step(const ChainArguments& a, const Step& step, int k, const float (&sums)[4],
                              const float (&bias)[4], const float (&x)[4], const float (&x0_before)[4],
                              const float (&noise)[4]) {
    Updated u;
    DQL_UNROLL
    for (int i = 0; i < 4; ++i) {
        u.raw[i] = step.a * x[i] - step.b * (sums[i] + bias[i]);
        u.x0[i] = clamped(a, u.raw[i]);
        u.next[i] = step.c0 * u.x0[i] + step.cx * x[i] + step.cp * x0_before[i];
        if (k + 1 < a.K) u.next[i] += step.s * noise[i];  // the posterior variance of the last step is 0
    }
    return u;
}

DQL_DEVICE void write_actions(const ChainArguments& a, int64_t row, int quad, const float (&x)[4]) {
    float actions[4];
    DQL_UNROLL
    for (int i = 0; i < 4; ++i) actions[i] = clamped(a, x[i]);
    write(a.out + row * a.net.X, actions, quad, a.net.X);
}

}  // namespace device
}  // namespace dql
