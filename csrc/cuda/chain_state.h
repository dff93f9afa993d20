// What a block of the chain kernel knows of its tile, and the chain's own arithmetic between two passes through the
// network: the narrow sums of the last layer, the update of x (or of its gradient), noise, and what the next step's first
// layer needs. chain.h has the layers.
#pragma once

#include "arithmetic.h"
#include "chain_arguments.h"
#include "launch.h"
#include "product.h"

namespace dql {
namespace device {

template <int MT, bool RESIDENT, bool BACKWARD>
class ChainState {
protected:
    static constexpr int M = 16 * MT;

    DQL_DEVICE explicit ChainState(const ChainArguments& arguments)
        : a(arguments),
          memory(shared_memory()),
          blocks(RESIDENT ? cluster_size() : 1),
          rank(RESIDENT ? cluster_rank() : 0),
          network(block_y()),
          w(warp()),
          g(lane() / 4),
          t(lane() % 4),
          first_pair(a.division.pair(w, 0)),
          share(a.division, w, a.groups),
          narrow(a.memory.narrow),
          in(BACKWARD ? a.net.O : a.net.X),
          out(BACKWARD ? a.net.X : a.net.O),
          critic(a.net.D == 0),
          floats(reinterpret_cast<const float*>(RESIDENT ? memory + a.memory.floats : global_floats())),
          barriers(reinterpret_cast<Barrier*>(memory + a.memory.barriers)),
          v(floats_at(a.memory.v)),
          own(floats_at(a.memory.own)) {
        w_in = floats + (BACKWARD ? a.net.X * a.NS : 0);
        w_out = floats + (BACKWARD ? 0 : a.net.X * a.NS);
        idle = first_pair >= a.division.pairs;
        halves = idle ? 0 : share.split == 1 ? 3 : share.range < 2 ? 1 << share.range : 0;
        if constexpr (RESIDENT) {
            DQL_UNROLL
            for (int i = 0; i < MAX_CLUSTER; ++i) peers[i] = peer((rank + i) & (blocks - 1));
        }
    }

    DQL_DEVICE float* floats_at(int offset) const { return reinterpret_cast<float*>(memory + offset); }
    DQL_DEVICE const char* global_floats() const {
        return a.floats + (a.first_network + network) * a.floats_apart + static_cast<int64_t>(rank) * a.floats_bytes;
    }

    // Row and column, in the tile and the block's slice, of this lane's four numbers.
    DQL_DEVICE int row_of(int m, int half) const { return 16 * m + 8 * half + g; }
    DQL_DEVICE int column_of(int pair) const { return 16 * pair + 4 * t; }

    // Of the step's first layer, what does not depend on the chain: loaded early.
    struct Base {
        float4 time, state[MT][2];
    };

    DQL_DEVICE void load_base(Base& base, int pair, int step) const {
        const int column = rank * a.NS + column_of(pair);
        if (!critic) base.time = load_floats(a.time_table + static_cast<int64_t>(step) * a.HP + column);
        const float* part = a.state_part + (a.first_network + network) * a.B * a.HP + column;
        DQL_UNROLL
        for (int m = 0; m < MT; ++m)
            DQL_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int64_t row = row0 + row_of(m, half);
                int state = static_cast<int>(row < a.R ? row : a.R - 1);
                if (a.N > 1) state /= a.N;
                if (halves >> half & 1) base.state[m][half] = load_floats(part + static_cast<int64_t>(state) * a.HP);
            }
    }

    // ---- the narrow sums, and what becomes of them: a quad of a row's numbers belongs to one thread ----

    DQL_DEVICE int quads() const { return narrow / 4; }
    DQL_DEVICE int first_quad() const { return thread(); }
    DQL_DEVICE int all_quads() const { return M * quads(); }

    DQL_DEVICE float4 sum_of(const float* from, int slots, int quad) const {
        float4 sum = load_floats(from + 4 * quad);
        for (int slot = 1; slot < slots; ++slot) {
            const float4 more = load_floats(from + slot * M * narrow + 4 * quad);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        return sum;
    }

    // The activations that will overwrite them are those of the next exchange, which no block begins before it has this
    // one's narrow sums, or, alone, before the next step's first barrier.
    DQL_DEVICE float* parts() const { return floats_at(a.memory.parts >= 0 ? a.memory.parts : a.memory.h[turn & 1]); }

    DQL_DEVICE int slots() const { return a.division.pairs < WARPS ? a.division.pairs : WARPS; }

    DQL_DEVICE void send_sums() {
        const int mine = a.memory.peers + rank * M * narrow * 4;
        for (int quad = first_quad(); quad < all_quads(); quad += THREADS) {
            const float4 sum = sum_of(parts(), slots(), quad);
            const uint4 bits = make_uint4(as_bits(sum.x), as_bits(sum.y), as_bits(sum.z), as_bits(sum.w));
            DQL_UNROLL
            for (int i = 0; i < MAX_CLUSTER; ++i)
                if (i < blocks) send16(peers[i], mine + 16 * quad, bits, a.memory.barriers + 8 * 3);
        }
    }

    // Of a quad: 0: x0 of the step before, or d_x; 1: noise, or the gradient carried to x0; 2: d_raw.
    DQL_DEVICE float* own_place(int which, int quad) const { return own + which * M * narrow + 4 * quad; }
    // The narrow input of the tile's first step.
    DQL_DEVICE void begin() {
        for (int quad = first_quad(); quad < all_quads(); quad += THREADS) {
            const int row = quad / quads(), q = quad % quads();
            const int64_t at = row0 + row;
            float x[4] = {0, 0, 0, 0}, zero[4] = {0, 0, 0, 0};
            if (critic) {
                if (at < a.R) {
                    if constexpr (BACKWARD)
                        read(x, a.d_out_in + network * a.R + at, q, 1);
                    else
                        read(x, a.actions_in + at * a.net.X, q, a.net.X);
                }
                put(v + 4 * quad, x);
                continue;
            }
            if constexpr (BACKWARD) {
                float last[4] = {0, 0, 0, 0};
                if (at < a.R) read(x, a.d_out_in + at * a.net.X, q, a.net.X);
                read(last, a.raws + (static_cast<int64_t>(a.K) * a.RP + at) * a.net.X, q, a.net.X);
                DQL_UNROLL
                for (int i = 0; i < 4; ++i) x[i] = inside(a, last[i]) ? x[i] : 0;
                put(own_place(0, quad), x);
                put(own_place(1, quad), zero);
                backward_input(quad, row, q, a.K - 1);
            } else {
                draw(a, x, at, q, 0);
                put(v + 4 * quad, x);
                put(own_place(0, quad), zero);
            }
        }
        k = BACKWARD ? a.K - 1 : 0;
        load_ahead(0);
    }

    // What the first layer of a step needs, while something else is waited for.
    DQL_DEVICE void load_ahead(int step) {
        if constexpr (!BACKWARD) {
            if (!idle && step < a.K) load_base(base, first_pair, step);
        }
    }

    // d_eps of step j from d_x behind it.
    DQL_DEVICE void backward_input(int quad, int row, int q, int j) {
        const Step step(a.steps + j * STEP_STRIDE);
        const int64_t at = (static_cast<int64_t>(j) * a.RP + row0 + row) * a.net.X;
        float raw[4] = {0, 0, 0, 0}, d_x[4], carried[4], d_raw[4], d_eps[4];
        read(raw, a.raws + at, q, a.net.X);
        get(d_x, own_place(0, quad));
        get(carried, own_place(1, quad));
        DQL_UNROLL
        for (int i = 0; i < 4; ++i) {
            d_raw[i] = inside(a, raw[i]) ? step.c0 * d_x[i] + carried[i] : 0;
            carried[i] = step.cp * d_x[i];
            d_eps[i] = -step.b * d_raw[i];
        }
        put(own_place(1, quad), carried);
        put(own_place(2, quad), d_raw);
        put(v + 4 * quad, d_eps);
        if (rank == 0) write(a.d_out + at, d_eps, q, a.net.X);
    }

    // After this step the chain takes noise: not after the last, where the posterior variance is 0.
    DQL_DEVICE bool draws() const { return !BACKWARD && !critic && k + 1 < a.K; }

    // Where pairs are split in four or eight, the warps that finish no rows draw it, long before it is needed.
    DQL_DEVICE bool others_draw() const { return a.division.split > 2; }

    DQL_DEVICE void draw_next(int first, int threads) {
        for (int quad = first; quad < all_quads(); quad += threads) {
            float noise[4] = {0, 0, 0, 0};
            draw(a, noise, row0 + quad / quads(), quad % quads(), k + 1);
            put(own_place(1, quad), noise);
        }
    }

    DQL_DEVICE void update() {
        const bool exchanged = RESIDENT && blocks > 1;
        if (draws() && !others_draw()) draw_next(thread(), THREADS);  // while the sums are under way
        load_ahead(k + 1);
        const Step step(critic ? nullptr : a.steps + k * STEP_STRIDE);
        float bias[4] = {0, 0, 0, 0};  // of the first quad; whatever comes from device memory is asked for before the wait
        if (!BACKWARD && first_quad() < all_quads()) read_bias(bias, first_quad());
        if (exchanged && first_quad() < all_quads()) {
            barrier_wait_for_peers(barriers + 3, sums_turn & 1);
            if (thread() == 0) barrier_expect(barriers + 3, static_cast<uint32_t>(blocks * M * narrow * 4));
        }
        ++sums_turn;
        const float* from = exchanged ? floats_at(a.memory.peers) : parts();
        for (int quad = first_quad(); quad < all_quads(); quad += THREADS) {
            const float4 four = sum_of(from, exchanged ? blocks : slots(), quad);
            const float sum[4] = {four.x, four.y, four.z, four.w};
            if (!BACKWARD && quad != first_quad()) read_bias(bias, quad);
            if constexpr (BACKWARD)
                update_backward(step, sum, quad);
            else
                update_forward(step, sum, quad, bias);
        }
    }

    DQL_DEVICE void read_bias(float (&bias)[4], int quad) const {
        read(bias, a.flat + a.net.out_bias + (a.first_network + network) * a.net.apart, quad % quads(), a.net.O);
    }

    DQL_DEVICE void update_forward(const Step& step, const float (&sum)[4], int quad, const float (&bias)[4]) {
        const int row = quad / quads(), q = quad % quads(), A = a.net.X;
        const int64_t at = row0 + row;
        if (critic) {
            if (q == 0 && rank == 0 && at < a.R) a.out[network * a.R + at] = sum[0] + bias[0];
            return;
        }
        float x[4], x0_before[4], noise[4] = {0, 0, 0, 0};
        get(x, v + 4 * quad);
        get(x0_before, own_place(0, quad));
        if (draws()) get(noise, own_place(1, quad));
        const Updated updated = chain_step(a, step, k, sum, bias, x, x0_before, noise);
        put(own_place(0, quad), updated.x0);
        put(v + 4 * quad, updated.next);
        const bool last = k + 1 == a.K;
        if (rank != 0) return;
        if (a.h != nullptr) {
            const int64_t here = (static_cast<int64_t>(k) * a.RP + at) * A;
            write(a.xs + here, x, q, A);
            write(a.raws + here, updated.raw, q, A);
            if (last) write(a.raws + here + a.RP * A, updated.next, q, A);
        }
        if (last && at < a.R) write_actions(a, at, q, updated.next);
    }

    DQL_DEVICE void update_backward(const Step& step, const float (&sum)[4], int quad) {
        const int row = quad / quads(), q = quad % quads(), A = a.net.X;
        const int64_t at = row0 + row;
        if (critic) {
            if (rank == 0 && at < a.R) write(a.d_actions + (network * a.R + at) * A, sum, q, A);
            return;
        }
        float d_x[4], d_raw[4];
        get(d_x, own_place(0, quad));
        get(d_raw, own_place(2, quad));
        DQL_UNROLL
        for (int i = 0; i < 4; ++i) d_x[i] = step.cx * d_x[i] + step.a * d_raw[i] + sum[i];
        put(own_place(0, quad), d_x);
        backward_input(quad, row, q, k - 1);
    }

    const ChainArguments& a;
    char* memory;
    int blocks, rank, network;
    int w, g, t;  // of this lane: warp, row and quarter of fragments
    int first_pair;
    Share share;
    int narrow, in, out;
    bool critic, idle;
    Peer peers[RESIDENT ? MAX_CLUSTER : 1];  // the cluster's blocks, this one first: not all send to the same at once
    int halves;  // bit 0: this warp finishes rows g of its m-tiles; bit 1: rows g + 8
    const float *floats, *w_in, *w_out;
    Barrier* barriers;
    float *v, *own;
    Base base = {};  // of the step's first pass over the pairs
    int turn = 0, sums_turn = 0, k = 0;
    int64_t row0 = 0;
};

}  // namespace device
}  // namespace dql
