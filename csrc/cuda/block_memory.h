// How a block of the chain kernel uses its shared memory, and how its warps share a layer's product. Made on the host,
// handed to the kernel; plain arithmetic, tested on the host.
#pragma once

#include "shapes.h"

namespace dql {

constexpr int RING_STAGES = 4;                        // k-groups of an n-pair under way, of each warp that streams
constexpr int STAGE_BYTES = 2 * FRAGMENT_BYTES;

// A layer's product is cut into n-pairs and, where there are fewer than warps, each pair's k-groups into `split` ranges
// whose sums are added in order. Warp w of 8 has range w % split of pair w / split; without a split the pairs
// w, w + 8, ... one pass each.
struct Division {
    int pairs, split, passes;
    bool idle;  // some warps have nothing to do, and would fall behind if nothing held them

    DQL_PLAIN Division(int pairs_, int groups) : pairs(pairs_), split(1) {
        while (2 * split * pairs <= WARPS && 2 * split <= groups) split *= 2;
        passes = (pairs * split + WARPS - 1) / WARPS;
        idle = pairs * split < WARPS;
    }
    DQL_PLAIN int pair(int warp, int pass) const { return split > 1 ? warp / split : warp + WARPS * pass; }
    DQL_PLAIN int first_group(int warp, int groups) const { return warp % split * groups / split; }
    DQL_PLAIN int last_group(int warp, int groups) const { return (warp % split + 1) * groups / split; }
};

// Of tiles of 128 rows: one more product, of x and the states; or float32 sums of x, added to the states' part, with
// weights from shared memory or, where they find no room there, from the L2 cache.
enum class FirstLayer : int { PRODUCT, IN_SHARED, IN_L2 };

// Byte offsets. M rows a tile, `narrow` floats a row of everything as wide as an action.
struct BlockMemory {
    int barriers;  // weights, activations (2), narrow sums
    int h[2];      // [M][row_bytes]: the inputs of the next layer, in turn
    int weights;   // resident: operands, then floats; streamed: the rings of 8 warps
    int floats;
    int sums;      // [8 warps][m_tiles][2][32 lanes][4] floats: results on their way between lanes or warps, if any are
    int sums_apart;  // to those of every other layer, in a cluster whose pairs are split; else 0
    int v;         // [M][narrow]: the input of the first layer
    int own;       // [3][M][narrow]: of the thread that updates a quad of the chain, between its steps
    int parts;     // [min(pairs, 8)][M][narrow]: narrow results of n-pairs; -1: they fit into the h that is not in use
    int peers;     // [C][M][narrow]: of the cluster's blocks
    int table;     // solo: [SOLO_TABLE_STEPS][HP], the time table's rows of some steps
    int narrow, row_bytes;
    int first, time;    // wide, if a product is made of the first layer's input: [slabs][M][128 bytes]; [2][HP] floats
    int slabs, stages;  // wide: of the first layer's input, or 0; of the ring
    int64_t bytes;

    DQL_PLAIN FirstLayer first_layer() const {  // of tiles of 128 rows
        return first > 0 ? FirstLayer::PRODUCT : floats > 0 ? FirstLayer::IN_SHARED : FirstLayer::IN_L2;
    }

    DQL_PLAIN BlockMemory(const Mlp& net, const Tiling& tiling) {
        const Slices s(net, tiling);
        const int M = tiling.rows(), slots = s.pairs() < WARPS ? s.pairs() : WARPS;
        narrow = narrow_width(net);
        row_bytes = s.row_bytes();
        const int narrow_bytes = M * narrow * 4;
        int64_t at = 0;
        const auto take = [&](int64_t size) {
            const int64_t start = at;
            at += (size + 127) / 128 * 128;
            return static_cast<int>(start);
        };
        table = 0;
        if (s.solo) {  // h also holds states, and what the time table is made of, before the chain needs it
            row_bytes = s.HP * 2 + SOLO_PAD;
            const int rows = rounded_up(M, 8);
            h[0] = take(rows * row_bytes), h[1] = take(rows * row_bytes);
            weights = take((s.L - 2) * s.layer_bytes());
            floats = take(s.floats() * 4);
            table = take(SOLO_TABLE_STEPS * s.HP * 4);
            barriers = sums = sums_apart = peers = 0;
            v = take(narrow_bytes), own = take(3 * narrow_bytes);
            parts = WARPS * narrow_bytes <= rows * row_bytes ? -1 : take(WARPS * narrow_bytes);
            bytes = at;
            return;
        }
        barriers = take(64);
        slabs = s.slabs;
        first = time = stages = 0;
        if (s.wide) {  // inputs, v, x0 of the step before, the ring; narrow sums lie in h
            const int stage = s.HP * WIDE_CHUNK * 2;
            at = 1024;
            h[0] = h[1] = take(static_cast<int64_t>(M) * s.HP * 2);
            first = s.slabs > 0 ? take(static_cast<int64_t>(s.slabs) * M * WIDE_CHUNK * 2) : 0;
            v = take(narrow_bytes);
            own = take(narrow_bytes);
            time = take(s.slabs > 0 ? 2 * s.HP * 4 : 0);
            sums = sums_apart = parts = peers = 0;
            const int small = (s.floats() - (s.slabs > 0 ? net.X * s.NS : 0)) * 4;  // W_x is among the operands
            floats = at + small + WIDE_STAGES * stage <= WIDE_SHARED ? take(small) : 0;  // 0: read from device memory
            at = (at + 1023) / 1024 * 1024;
            stages = at + WIDE_MOST_STAGES * stage <= WIDE_SHARED ? WIDE_MOST_STAGES : WIDE_STAGES;
            weights = take(stages * stage);
            bytes = at;
            return;
        }
        h[0] = take(static_cast<int64_t>(M) * row_bytes);
        h[1] = take(static_cast<int64_t>(M) * row_bytes);
        weights = take(tiling.resident ? s.operand_bytes() : WARPS * RING_STAGES * STAGE_BYTES);
        floats = take(tiling.resident ? s.floats() * 4 : 0);
        // With one buffer, what keeps a warp from writing sums that another still reads would be the exchange alone,
        // through other blocks. With two it is the barrier of the layer between, which compute-sanitizer sees.
        const bool split = Division(s.pairs(), s.groups).split > 1;
        const int sums_bytes = split || tiling.precision == Precision::FP32 ? WARPS * tiling.m_tiles * 1024 : 0;
        sums_apart = split && tiling.cluster > 1 ? sums_bytes : 0;
        sums = take(sums_bytes + sums_apart);
        v = take(narrow_bytes);
        own = take(3 * narrow_bytes);
        parts = slots * narrow * 4 <= row_bytes ? -1 : take(slots * narrow_bytes);
        peers = take(tiling.cluster > 1 ? tiling.cluster * narrow_bytes : 0);
        bytes = at;
    }
};

}  // namespace dql
