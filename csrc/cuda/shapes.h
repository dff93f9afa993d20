// Plain data that host and kernels share: a network's sizes, how a problem is cut, where everything lies. No code here
// touches a GPU; tests go through all index maps.
//
// Letters: B states, N candidates, R = B N rows, RP those in whole tiles, S state size, X inputs that change from step
// to step (the action), O outputs, D time size, H hidden width, HP padded, L hidden layers, K steps; C blocks a
// cluster, NS = HP / C columns of each hidden layer that a block computes.
//
// The product of a hidden layer, [rows, HP] x [HP, NS], is done in
//     k-groups    64 bytes of a row of operands: 32 numbers of bf16, 16 of float32
//     n-pairs     16 output columns: two n-tiles of 8, as the tensor cores take them
//     m-tiles     16 rows
// A quad of lanes shares a row's k-group, 16 bytes each, whatever the precision: lane = 4 g + t holds bytes 16 t .. of
// row g (and g + 8). Which number of a k-group the instruction calls its k-th does not matter as long as both operands
// agree. Columns within an n-pair are dealt out so that a lane ends up with four neighbours, see `output_column`.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define DQL_PLAIN __host__ __device__ inline
#else
#define DQL_PLAIN inline
#endif

namespace dql {

constexpr int MAX_HIDDEN_LAYERS = 4, MAX_NARROW = 64, MAX_CLUSTER = 8;
constexpr int WARPS = 8, THREADS = 32 * WARPS;     // of a block
constexpr int GROUP_BYTES = 64;                    // a k-group of a row
constexpr int FRAGMENT_BYTES = 512;                // a k-group of an n-tile: 16 bytes a lane
constexpr int STEP_STRIDE = 8;                     // floats a row of the step table: a, b, c0, cx, cp, s, 0, 0

// Tiles of 128 rows, bf16 on Hopper alone (wide_chain.h): 64 numbers of k at a time, for all columns, in rows of 128
// bytes whose 16-byte pieces are swizzled. Of the first layer's input, [x, 0 .., state], a row has WIDE_SLAB numbers at a
// time, as two bf16 each: the nearest, and behind those the nearest to what is left.
constexpr int WIDE_M_TILES = 8, WIDE_CHUNK = 64, WIDE_SLAB = WIDE_CHUNK / 2, WIDE_THREADS = 3 * 128,
              WIDE_STAGES = 3, WIDE_MOST_STAGES = 4,  // chunks of weights under way
              WIDE_SHARED = 227 * 1024;               // bytes that a block may have

// Tiles of few rows, bf16, by a block alone (solo_chain.h): the first hidden layer's weights in registers, the others' in
// shared memory. Rows of activations are SOLO_PAD bytes longer than their numbers, see solo_row.
constexpr int SOLO_PAD = 128, SOLO_TABLE_STEPS = 6;  // rows of the time table that are made at a time

enum class Precision : int { FP32 = 0, TF32 = 1, BF16 = 2 };

DQL_PLAIN constexpr int element_bytes(Precision precision) { return precision == Precision::BF16 ? 2 : 4; }
DQL_PLAIN constexpr int rounded_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// A denoiser, or one of `networks` critics; offsets in elements of the flat buffer.
struct Mlp {
    int S, X, D, H, L, O;  // D = 0 of critics
    int activation;        // index into layout.ACTIVATIONS: mish, relu, silu
    int networks;          // 1, or 2 critics
    int64_t size;          // of the flat buffer
    int64_t apart;         // from a tensor of the first critic to that of the second
    int stride;            // columns of the first layer's weight
    int x_column, time_column, state_column;
    int64_t first, first_bias;
    int64_t hidden[MAX_HIDDEN_LAYERS - 1], hidden_bias[MAX_HIDDEN_LAYERS - 1];
    int64_t out, out_bias;
    int64_t time_w1, time_b1, time_w3, time_b3;  // [2 D, D], [2 D], [D, 2 D], [D]
};

// How a problem is cut.
struct Tiling {
    Precision precision;
    int cluster;    // C: blocks that share a tile; 1 where weights are streamed
    int m_tiles;    // 16 rows each, of a tile: 1, 2, 4 or WIDE_M_TILES; 0: solo
    bool resident;  // weights stay in shared memory for the whole chain (from compute capability 9.0); else streamed
    int solo = 0;   // rows of a tile of solo_chain.h: 4, 8, 16 or 24; 0: another kernel's

    DQL_PLAIN constexpr int rows() const { return solo > 0 ? solo : 16 * m_tiles; }
};

DQL_PLAIN constexpr int padded_width(int H, const Tiling& tiling) {
    if (tiling.m_tiles == WIDE_M_TILES || tiling.solo > 0) return H <= 128 ? 128 : 256;
    return rounded_up(H, tiling.cluster == 1 ? 32 : 16 * tiling.cluster);
}

DQL_PLAIN constexpr int narrow_width(const Mlp& net) { return rounded_up(net.X > net.O ? net.X : net.O, 4); }

// Slabs of the first layer's input in tiles of 128 rows. 0: there is no room for them, and the states' part is made
// beforehand, as for all other tilings. See BlockMemory.
DQL_PLAIN constexpr int wide_slabs(const Mlp& net, int HP) {
    const int narrow = narrow_width(net), slabs = (narrow + net.S + WIDE_SLAB - 1) / WIDE_SLAB, M = 16 * WIDE_M_TILES;
    const int bytes = 1024 + M * HP * 2 + slabs * M * WIDE_CHUNK * 2 + WIDE_STAGES * HP * WIDE_CHUNK * 2 +
                      2 * M * narrow * 4 + (2 + net.O + net.L - 1) * HP * 4;
    return net.D > 0 && bytes <= WIDE_SHARED ? slabs : 0;
}

// What a block holds of a padded network, and where: the sizes of packed buffers.
struct Slices {
    int HP, NS, L, X, O, element, groups;  // groups: k-groups of a row
    bool wide, solo;
    int slabs;  // of the first layer's input, if a product is made of it; else 0

    DQL_PLAIN Slices(const Mlp& net, const Tiling& tiling)
        : HP(padded_width(net.H, tiling)),
          NS(HP / tiling.cluster),
          L(net.L),
          X(net.X),
          O(net.O),
          element(element_bytes(tiling.precision)),
          groups(HP * element / GROUP_BYTES),
          wide(tiling.m_tiles == WIDE_M_TILES),
          solo(tiling.solo > 0),
          slabs(wide ? wide_slabs(net, HP) : 0) {}

    DQL_PLAIN int pairs() const { return NS / 16; }
    // Operands of one block, one direction: [L - 1][2 pairs][groups][32 lanes][16 bytes]
    DQL_PLAIN int64_t layer_bytes() const { return static_cast<int64_t>(NS) * HP * element; }
    DQL_PLAIN int64_t operand_bytes() const { return (L - 1) * layer_bytes(); }
    DQL_PLAIN int64_t first_bytes() const { return static_cast<int64_t>(slabs) * HP * WIDE_CHUNK * 2; }
    // Floats of one block, the same for both directions: W_x [X][NS] | W_out [O][NS] | biases [L - 1][NS]. Wide, W_out is
    // [pairs][O][4 quarters] of high and low parts of four columns: see narrow_place. Solo, X and O are rounded up to
    // whole quads, with zeros.
    DQL_PLAIN int floats() const {
        return ((solo ? rounded_up(X, 4) + rounded_up(O, 4) : X + O) + L - 1) * NS;
    }
    // Bytes of a row of activations in shared memory: eight lanes' 16 bytes, two rows of them, fall into all banks.
    DQL_PLAIN int row_bytes() const { return rounded_up(HP * element, 128) + GROUP_BYTES; }
};

// The column of its n-pair that column n (0 .. 7) of n-tile j (0 or 1) is: lane 4 g + t of a result has the tile's
// columns 2 t and 2 t + 1, and so of both tiles the pair's columns 4 t .. 4 t + 3.
DQL_PLAIN constexpr int output_column(int j, int n) { return 4 * (n / 2) + 2 * j + n % 2; }

// Where row `n` of eight starts in a solo tile's activations, in bytes: the 16-byte pieces of rows 2 i and 2 i + 1, as
// operands are read, fall into different banks, and so do 32 bytes each of rows 0, 2, 4, 6 (or 1, 3, 5, 7), as results
// are written.
DQL_PLAIN constexpr int solo_row(int n, int row_bytes) { return n * row_bytes + (n / 2 * 32 + n % 2 * 64) % 128; }

// Where number k (0 .. 63) of a row lies in a wide operand, in bytes.
DQL_PLAIN constexpr int wide_place(int row, int k) { return row * 128 + (k / 8 ^ row % 8) * 16 + k % 8 * 2; }

// Where column n of a wide product is among its rows of operands, and as a k of the next layer's, whose input is stored
// as the product's results lie.
DQL_PLAIN constexpr int wide_row(int column) {
    return column / 16 * 16 + column / 2 % 2 * 8 + column % 16 / 4 * 2 + column % 2;
}

// The last layer's weights as a lane's operands of m16n8k16, four words of two bf16: word i of the wide W_out is of this
// output, these two columns and their low parts or high ones.
struct NarrowPlace {
    int output, column;
    bool low;
};
DQL_PLAIN constexpr NarrowPlace narrow_place(int O, int i) {
    return {i / 16 % O, i / 16 / O * 16 + i / 4 % 4 * 4 + i % 2 * 2, i % 4 / 2 != 0};
}

// Where a number of a layer's weight lies in one block's operands: `column` of NS, `k` of HP. In elements.
DQL_PLAIN int64_t operand_index(const Slices& s, int layer, int column, int k) {
    if (s.wide) {
        const int64_t chunk = static_cast<int64_t>(layer) * (s.HP / WIDE_CHUNK) + k / WIDE_CHUNK;
        return chunk * s.HP * WIDE_CHUNK + wide_place(wide_row(column), wide_row(k) % WIDE_CHUNK) / 2;
    }
    const int per_lane = 16 / s.element, per_group = GROUP_BYTES / s.element;
    const int pair = column / 16, within = column % 16;
    const int j = within / 2 % 2, g = within / 4 * 2 + within % 2;
    const int group = k / per_group, t = k % per_group / per_lane, e = k % per_lane;
    const int64_t fragment = (static_cast<int64_t>(layer) * 2 * s.pairs() + 2 * pair + j) * s.groups + group;
    return (fragment * 32 + 4 * g + t) * per_lane + e;
}

// One buffer of packed weights and what depends on them and on the states, by byte:
//     operands      [networks][directions][C][operand_bytes()]
//     first         [slabs][HP][128 bytes]: of W_x and W_s, a row of each column as the input has them, swizzled
//     floats        [networks][C][floats()]
//     time table    [K][HP]: W_t time_mlp(embedding_k) + b of the first layer; not of critics
//     state part    [networks][B][HP]: W_s s; of critics W_s s + b; none where there are slabs
// Solo blocks read parameters and states themselves, and nothing is packed for them.
struct Packed {
    int64_t operands, first, floats, time_table, state_part, end;
    int64_t operands_apart, floats_apart;  // from one network to the next, in bytes

    DQL_PLAIN Packed(const Mlp& net, const Tiling& tiling, bool transposed, int64_t B, int K) {
        const Slices s(net, tiling);
        if (s.solo) {
            operands = first = floats = time_table = state_part = end = operands_apart = floats_apart = 0;
            return;
        }
        operands_apart = (transposed ? 2 : 1) * tiling.cluster * s.operand_bytes();
        floats_apart = static_cast<int64_t>(tiling.cluster) * s.floats() * 4;
        operands = 0;
        first = operands + net.networks * operands_apart;
        floats = first + s.first_bytes();
        time_table = floats + net.networks * floats_apart;
        state_part = time_table + (net.D > 0 ? static_cast<int64_t>(K) * s.HP * 4 : 0);
        end = state_part + (s.slabs > 0 ? 0 : net.networks * B * s.HP * 4);
    }
};

// What a forward pass saves and a backward pass adds, by byte. Operands are of the precision's type.
//     h        [networks run][L][K][RP][HP] operands: after the activation
//     slope    the same: the activation's derivative
//     xs       [K][RP][X] floats: the chain before each step; not of critics
//     raws     [K + 1][RP][X] floats: x0 before its clamp; last, the action before its own; not of critics
// Where a batch is cloned beside the chain, its rows are those of one more plane of each, behind the others: of xs the
// noisy actions, of raws the prediction's gradient. Then there is
//     errors   [tiles] floats: of each, the sum of squares
//     counter  of the tiles that are done
struct SavedPlaces {
    int64_t h, slope, xs, raws, errors, counter, end;
    DQL_PLAIN SavedPlaces(const Mlp& net, const Tiling& tiling, int networks_run, int64_t RP, int K, int cloned = 0) {
        const Slices s(net, tiling);
        const int64_t planes = K + cloned;
        const int64_t each = static_cast<int64_t>(networks_run) * net.L * planes * RP * s.HP * s.element;
        h = 0;
        slope = h + each;
        xs = slope + each;
        raws = xs + (net.D > 0 ? planes * RP * net.X * 4 : 0);
        errors = raws + (net.D > 0 ? (planes + 1) * RP * net.X * 4 : 0);
        counter = errors + cloned * RP / tiling.rows() * 4;
        end = (counter + 4 * cloned + 15) / 16 * 16;
    }
};

//     d_z      [networks run][L][K][RP][HP] operands
//     d_out    [K][RP][O] floats: of eps; not of critics, where the caller has it
// and likewise one more plane.
struct BackwardPlaces {
    int64_t d_z, d_out, end;
    DQL_PLAIN BackwardPlaces(const Mlp& net, const Tiling& tiling, int networks_run, int64_t RP, int K,
                             int cloned = 0) {
        const Slices s(net, tiling);
        const int64_t planes = K + cloned;
        d_z = 0;
        d_out = d_z + static_cast<int64_t>(networks_run) * net.L * planes * RP * s.HP * s.element;
        end = d_out + (net.D > 0 ? planes * RP * net.O * 4 : 0);
        end = (end + 15) / 16 * 16;
    }
};

DQL_PLAIN int64_t whole_tiles(int64_t R, const Tiling& tiling) {
    const int64_t rows = tiling.rows();
    return (R + rows - 1) / rows * rows;
}

}  // namespace dql
