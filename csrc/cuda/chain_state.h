// What a block of the chain kernel knows of its tile, and what happens between two passes through the network: the narrow
// sums of the last layer, the chain's own arithmetic (chain_rows.h) and what the next step's first layer needs. chain.h
// has the layers.
#pragma once

#include "chain_rows.h"
#include "launch.h"
#include "product.h"

namespace dql {
namespace device {

template <int MT, bool RESIDENT, bool BACKWARD>
class ChainState : protected ChainRows<16 * MT, BACKWARD, true> {
    using Rows = ChainRows<16 * MT, BACKWARD, true>;

protected:
    using Rows::M, Rows::a, Rows::memory, Rows::rank, Rows::network, Rows::narrow, Rows::critic, Rows::v, Rows::own;
    using Rows::k, Rows::row0, Rows::floats_at, Rows::quads, Rows::all_quads, Rows::own_place, Rows::begin_rows;
    using Rows::draws, Rows::draw_quads, Rows::read_ahead, Rows::update_quad;

    DQL_DEVICE explicit ChainState(const ChainArguments& arguments)
        : Rows(arguments, RESIDENT ? cluster_rank() : 0),
          blocks(RESIDENT ? cluster_size() : 1),
          w(warp()),
          g(lane() / 4),
          t(lane() % 4),
          first_pair(a.division.pair(w, 0)),
          share(a.division, w, a.groups),
          in(BACKWARD ? a.net.O : a.net.X),
          out(BACKWARD ? a.net.X : a.net.O),
          floats(reinterpret_cast<const float*>(RESIDENT ? memory + a.memory.floats : global_floats())),
          barriers(reinterpret_cast<Barrier*>(memory + a.memory.barriers)) {
        w_in = floats + (BACKWARD ? a.net.X * a.NS : 0);
        w_out = floats + (BACKWARD ? 0 : a.net.X * a.NS);
        idle = first_pair >= a.division.pairs;
        // Of a tile that is not full, rows that nobody asked for are neither sent nor, in float32, multiplied, where no
        // later tile's are announced before its height is known, and none of it is saved.
        const int64_t rows = a.R - static_cast<int64_t>(block_x() / blocks) * M;
        const bool only = a.tiles <= blocks_x() / blocks && !BACKWARD && a.h == nullptr && !a.all_rows;
        live_rows = only && rows < M ? static_cast<int>(rows) : M;
        halves = idle ? 0 : share.split == 1 ? 3 : share.range < 2 ? 1 << share.range : 0;
        if constexpr (RESIDENT) {
            DQL_UNROLL
            for (int i = 0; i < MAX_CLUSTER; ++i) peers[i] = peer((rank + i) & (blocks - 1));
        }
    }

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
        const bool cloned = !critic && step == a.K;
        if (cloned)
            base.time = make_float4(0, 0, 0, 0);
        else if (!critic)
            base.time = load_floats(a.time_table + static_cast<int64_t>(step) * a.HP + column);
        const float* part = a.state_part + (a.first_network + network) * a.B * a.HP + column;
        DQL_UNROLL
        for (int m = 0; m < MT; ++m)
            DQL_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int64_t row = row0 + row_of(m, half);
                int state = static_cast<int>(row < a.R ? row : a.R - 1);
                if (a.N > 1) state /= a.N;
                if (!(halves >> half & 1)) continue;
                float4& four = base.state[m][half];
                four = load_floats(part + static_cast<int64_t>(state) * a.HP);
                if (!cloned) continue;
                const float* row_of_table = a.time_table + (a.cloning.T - 1 - a.cloning.t[state]) * a.HP + column;
                const float4 time = load_floats(row_of_table);
                four.x += time.x, four.y += time.y, four.z += time.z, four.w += time.w;
            }
    }

    // ---- the narrow sums, and what becomes of them: a quad of a row's numbers belongs to one thread ----

    DQL_DEVICE int first_quad() const { return thread(); }

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

    DQL_DEVICE uint32_t sums_bytes() const { return static_cast<uint32_t>(blocks * live_rows * narrow * 4); }

    DQL_DEVICE void send_sums() {
        const int mine = a.memory.peers + rank * M * narrow * 4;
        for (int quad = first_quad(); quad < live_rows * quads(); quad += THREADS) {
            const float4 sum = sum_of(parts(), slots(), quad);
            const uint4 bits = make_uint4(as_bits(sum.x), as_bits(sum.y), as_bits(sum.z), as_bits(sum.w));
            DQL_UNROLL
            for (int i = 0; i < MAX_CLUSTER; ++i)
                if (i < blocks) send16(peers[i], mine + 16 * quad, bits, a.memory.barriers + 8 * 3);
        }
    }

    DQL_DEVICE void begin() {
        begin_rows(first_quad());
        if constexpr (!BACKWARD) {
            if (!idle) load_base(base, first_pair, k);
        }
    }

    // What the first layer of a step needs, while something else is waited for.
    DQL_DEVICE void load_ahead(int step) {
        if constexpr (!BACKWARD) {
            if (!idle && step < a.K) load_base(base, first_pair, step);
        }
    }

    // Where pairs are split in four or eight, the warps that finish no rows draw it, long before it is needed.
    DQL_DEVICE bool others_draw() const { return a.division.split > 2; }

    DQL_DEVICE void draw_next(int first, int threads) { draw_quads(first, threads, k + 1, 1); }

    DQL_DEVICE void update() {
        const bool exchanged = RESIDENT && blocks > 1;
        if (draws() && !others_draw()) draw_next(thread(), THREADS);  // while the sums are under way
        load_ahead(k + 1);
        const Step step(critic || k == a.K ? nullptr : a.steps + k * STEP_STRIDE);
        float ahead[4];  // of the first quad
        if (first_quad() < all_quads()) read_ahead(ahead, first_quad());
        if (exchanged && first_quad() < all_quads()) {
            barrier_wait_for_peers(barriers + 3, sums_turn & 1);
            if (thread() == 0) barrier_expect(barriers + 3, sums_bytes());
        }
        ++sums_turn;
        const float* from = exchanged ? floats_at(a.memory.peers) : parts();
        for (int quad = first_quad(); quad < all_quads(); quad += THREADS) {
            const float4 four = sum_of(from, exchanged ? blocks : slots(), quad);
            const float sum[4] = {four.x, four.y, four.z, four.w};
            if (quad != first_quad()) read_ahead(ahead, quad);
            update_quad(step, sum, quad, ahead, own_place(1, quad));
        }
        if constexpr (!BACKWARD) {
            if (!critic && k == a.K) sum_errors();
        }
    }

    // The squares that the cloned rows of a tile left, summed by one warp of one block; that of the tile which is done
    // last adds up all tiles', in their order.
    DQL_DEVICE void sum_errors() {
        if (rank != 0) return;
        sync_block();
        if (w != 0) return;
        float sum = 0;
        for (int quad = lane(); quad < all_quads(); quad += 32) {
            const float4 four = load_floats(own_place(1, quad));
            sum += four.x + four.y + four.z + four.w;
        }
        DQL_UNROLL
        for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        const int tiles = a.tiles - a.chain_tiles;
        float before = 0;
        if (lane() == 0) {
            a.errors[row0 / M] = sum;
            before = static_cast<float>(count_in(a.counter));
        }
        sync_warp();  // what this lane sees, the others see
        DQL_UNROLL
        for (int mask = 1; mask < 32; mask *= 2) before += shuffle_xor(before, mask);
        if (before + 1 != static_cast<float>(tiles)) return;
        sum = 0;
        for (int tile = lane(); tile < tiles; tile += 32) sum += written_by_others(a.errors + tile);
        DQL_UNROLL
        for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        if (lane() == 0) *a.cloning.loss = sum / (static_cast<float>(a.R) * static_cast<float>(a.net.O));
    }

    int blocks;
    int w, g, t;  // of this lane: warp, row and quarter of fragments
    int first_pair;
    Share share;
    int in, out;
    bool idle;
    Peer peers[RESIDENT ? MAX_CLUSTER : 1];  // the cluster's blocks, this one first: not all send to the same at once
    int live_rows;  // of a tile
    int halves;     // bit 0: this warp finishes rows g of its m-tiles; bit 1: rows g + 8
    const float *floats, *w_in, *w_out;
    Barrier* barriers;
    Base base = {};  // of the step's first pass over the pairs
    int turn = 0, sums_turn = 0;
};

}  // namespace device
}  // namespace dql
