// A tile's product with a slice of a hidden layer: z[row][column] += sum over k of h[row][k] w[column][k], for the n-pair
// and the k-groups of one warp. The operands are laid out as shapes.h says; the result is what lane 4 g + t owns:
// z[m][half][i] is row 16 m + 8 half + g, column 4 t + i of the pair.
#pragma once

#include "chain_arguments.h"

namespace dql {
namespace device {

DQL_DEVICE uint4 load16(const char* at) { return *reinterpret_cast<const uint4*>(at); }

// A warp's part in every product: its k-groups, and which of the ranges they are. Divisions are done once.
struct Share {
    int first, last, range, split;
    DQL_DEVICE Share(const Division& division, int w, int groups)
        : first(division.first_group(w, groups)),
          last(division.last_group(w, groups)),
          range(w % division.split),
          split(division.split) {}
};

// From a lane's bytes of a fragment to those of the lane with the same quarter of column `i` of those that it multiplies:
// g % (8 / EACH), and those that are 8 / EACH further each.
template <int EACH>
DQL_DEVICE int other_lane(int i) {
    const int g = lane() / 4, apart = 8 / EACH;
    return (g % apart + i * apart - g) * 64;
}

// A pair's weights in shared memory for good.
struct ResidentWeights {
    const char* at;  // this lane's 16 bytes of the first fragment
    int tile_bytes;  // from one n-tile to the next

    DQL_DEVICE void take(uint4 (&b)[2], int group) {
        b[0] = load16(at + group * FRAGMENT_BYTES);
        b[1] = load16(at + group * FRAGMENT_BYTES + tile_bytes);
    }
    // Of each n-tile EACH columns, as scalar_sums wants them.
    template <int EACH>
    DQL_DEVICE void take(uint4 (&b)[2][EACH], int group) {
        DQL_UNROLL
        for (int i = 0; i < 2 * EACH; ++i)
            b[i / EACH][i % EACH] = load16(at + group * FRAGMENT_BYTES + i / EACH * tile_bytes + other_lane<EACH>(i % EACH));
    }
};

// A warp's weights on their way from device memory, k-group after k-group in the order in which its products will ask
// for them, across layers, steps and tiles. On the tensor cores a lane copies what it alone will read, so that nobody else
// must wait; in float32 lanes read each other's.
class WeightStream {
public:
    // Layers first_layer, first_layer + step, ..., `layers` of them, over and over; none for an idle warp.
    DQL_DEVICE WeightStream(const char* operands, char* ring, const Division& division, int w, int groups,
                            int layers, bool descending)
        : operands_(operands + lane() * 16),
          ring_(ring + w * RING_STAGES * STAGE_BYTES + lane() * 16),
          first_pair_(division.pair(w, 0)),
          pairs_(division.pairs),
          first_group_(division.first_group(w, groups)),
          last_group_(division.last_group(w, groups)),
          groups_(groups),
          layers_(layers),
          descending_(descending),
          stride_(division.split > 1 ? pairs_ : WARPS),
          pair_(first_pair_),
          group_(first_group_) {
        if (first_pair_ >= pairs_) return;
        DQL_UNROLL
        for (int i = 0; i < RING_STAGES - 1; ++i) fetch();
    }

    DQL_DEVICE void take(uint4 (&b)[2], int /*group*/) {
        wait_groups<RING_STAGES - 2>();
        const char* stage = ring_ + taken_ * STAGE_BYTES;
        b[0] = load16(stage);
        b[1] = load16(stage + FRAGMENT_BYTES);
        taken_ = (taken_ + 1) % RING_STAGES;
        fetch();  // into the stage that was read before this one
    }
    template <int EACH>
    DQL_DEVICE void take(uint4 (&b)[2][EACH], int /*group*/) {
        wait_groups<RING_STAGES - 2>();
        sync_warp();  // all lanes' copies are in, and what they read before is read
        const char* stage = ring_ + taken_ * STAGE_BYTES;
        DQL_UNROLL
        for (int i = 0; i < 2 * EACH; ++i)
            b[i / EACH][i % EACH] = load16(stage + i / EACH * FRAGMENT_BYTES + other_lane<EACH>(i % EACH));
        taken_ = (taken_ + 1) % RING_STAGES;
        fetch();
    }

    DQL_DEVICE void finish() { wait_groups<0>(); }

private:
    DQL_DEVICE void fetch() {
        const int layer = descending_ ? layers_ - 1 - layer_ : layer_;
        const char* from = operands_ + (static_cast<int64_t>(layer * pairs_ + pair_) * 2 * groups_ + group_) *
                                           FRAGMENT_BYTES;
        char* to = ring_ + fetched_ * STAGE_BYTES;
        copy16(to, from);
        copy16(to + FRAGMENT_BYTES, from + static_cast<int64_t>(groups_) * FRAGMENT_BYTES);
        close_group();
        fetched_ = (fetched_ + 1) % RING_STAGES;
        if (++group_ < last_group_) return;
        group_ = first_group_;
        if ((pair_ += stride_) < pairs_) return;
        pair_ = first_pair_;
        if (++layer_ == layers_) layer_ = 0;
    }

    const char* operands_;
    char* ring_;
    int first_pair_, pairs_, first_group_, last_group_, groups_, layers_;
    bool descending_;
    int stride_, pair_, group_, layer_ = 0, fetched_ = 0, taken_ = 0;
};

// On the tensor cores: bf16 and tf32. A k-group takes two instructions for each m-tile and n-tile. One that adds to the
// result of the one before waits for it; with a single m-tile there is too little else to do meanwhile, and each of the
// two has sums of its own.
template <Precision P, int MT, class Weights>
DQL_DEVICE void tensor_product(float (&z)[MT][2][4], const char* h, int row_bytes, Weights& weights, int first,
                               int last) {
    constexpr int OF_SECOND = MT == 1 ? 1 : 0;
    float d[1 + OF_SECOND][MT][2][4];  // [sums][m-tile][n-tile]: rows g (2) and g + 8 (2), columns 2 t and 2 t + 1
    DQL_UNROLL
    for (int m = 0; m < (1 + OF_SECOND) * MT; ++m)
        DQL_UNROLL
        for (int i = 0; i < 8; ++i) d[m / MT][m % MT][i / 4][i % 4] = 0;
    const char* mine = h + lane() / 4 * row_bytes + lane() % 4 * 16;
    DQL_UNROLL_BY_2
    for (int group = first; group < last; ++group) {
        uint4 b[2];
        weights.take(b, group);
        DQL_UNROLL
        for (int m = 0; m < MT; ++m) {
            const uint4 low = load16(mine + 16 * m * row_bytes + group * GROUP_BYTES);
            const uint4 high = load16(mine + (16 * m + 8) * row_bytes + group * GROUP_BYTES);
            const uint32_t first_half[4] = {low.x, high.x, low.y, high.y};
            const uint32_t second_half[4] = {low.z, high.z, low.w, high.w};
            DQL_UNROLL
            for (int n = 0; n < 2; ++n) {
                const uint32_t b_first[2] = {b[n].x, b[n].y}, b_second[2] = {b[n].z, b[n].w};
                if constexpr (P == Precision::BF16) {
                    mma_bf16(d[0][m][n], first_half, b_first);
                    mma_bf16(d[OF_SECOND][m][n], second_half, b_second);
                } else {
                    mma_tf32(d[0][m][n], first_half, b_first);
                    mma_tf32(d[OF_SECOND][m][n], second_half, b_second);
                }
            }
        }
    }
    DQL_UNROLL
    for (int m = 0; m < MT; ++m)
        DQL_UNROLL
        for (int half = 0; half < 2; ++half)
            DQL_UNROLL
            for (int i = 0; i < 4; ++i) {
                z[m][half][i] = d[0][m][i / 2][2 * half + i % 2];
                if (OF_SECOND) z[m][half][i] += d[OF_SECOND][m][i / 2][2 * half + i % 2];
            }
}

// Where the sums of one warp lie: [m-tile][half][lane][4]. Lanes are dealt out anew in each half, so that what float32
// stores of several rows at a time falls into different banks.
DQL_DEVICE int sum_offset(int m, int half, int lane) { return ((m * 2 + half) * 32 + (lane ^ (half * 2 + m % 2))) * 4; }
DQL_DEVICE float* sum_place(float* sums, int m, int half, int lane) { return sums + sum_offset(m, half, lane); }

// In float32 a lane 4 g + t multiplies its quarter of each k-group for 8 rows and 4 MT columns, so that little of what it
// loads serves once: with EACH = 2 MT, rows g / (8 / EACH) + EACH i, and of each n-tile the columns of `other_lane`. All
// rows by two columns would be 18 loads of 16 bytes for 128 multiply-adds, and 34 for 256, and loads would bound it;
// these are 12 and 16.
template <int ROWS, int EACH, class Weights>
DQL_DEVICE void scalar_sums(float (&d)[8][2][EACH], const char* mine, int row_bytes, Weights& weights, int first,
                            int last) {
    for (int group = first; group < last; ++group) {
        uint4 b[2][EACH];
        weights.take(b, group);
        DQL_UNROLL
        for (int row = 0; row < ROWS; ++row) {
            const float4 a = load_floats(mine + row * EACH * row_bytes + group * GROUP_BYTES);
            DQL_UNROLL
            for (int n = 0; n < 2; ++n)
                DQL_UNROLL
                for (int i = 0; i < EACH; ++i) {
                    d[row][n][i] = fmaf(a.x, as_float(b[n][i].x), d[row][n][i]);
                    d[row][n][i] = fmaf(a.y, as_float(b[n][i].y), d[row][n][i]);
                    d[row][n][i] = fmaf(a.z, as_float(b[n][i].z), d[row][n][i]);
                    d[row][n][i] = fmaf(a.w, as_float(b[n][i].w), d[row][n][i]);
                }
        }
    }
}

// On the FMA units, strict float32; then the quad adds up. The result is left in `sums`, where other lanes own it. Up to
// FEW of the tile's rows take less: what would be the others' is 0.
template <int MT, class Weights>
DQL_DEVICE void scalar_product(float* sums, const char* h, int row_bytes, Weights& weights, int first, int last,
                               int rows) {
    constexpr int EACH = 2 * MT, FEW = 4;
    const int g = lane() / 4, t = lane() % 4, of_rows = g / (8 / EACH);
    float d[8][2][EACH];
    DQL_UNROLL
    for (int row = 0; row < 8; ++row)
        DQL_UNROLL
        for (int i = 0; i < 2 * EACH; ++i) d[row][i / EACH][i % EACH] = 0;
    const char* mine = h + of_rows * row_bytes + t * 16;
    if (MT == 1 && rows <= FEW)
        scalar_sums<FEW / EACH>(d, mine, row_bytes, weights, first, last);
    else
        scalar_sums<8>(d, mine, row_bytes, weights, first, last);
    // Each lane hands half of its rows to a neighbour and keeps the sums of the other half, twice: two are left.
    DQL_UNROLL
    for (int n = 0; n < 2; ++n)
        DQL_UNROLL
        for (int i = 0; i < EACH; ++i) {
            float half[4], quarter[2];
            DQL_UNROLL
            for (int row = 0; row < 4; ++row) {
                const float low = d[row][n][i], high = d[4 + row][n][i];
                half[row] = (t & 2 ? high : low) + shuffle_xor(t & 2 ? low : high, 2);
            }
            DQL_UNROLL
            for (int row = 0; row < 2; ++row)
                quarter[row] = (t & 1 ? half[2 + row] : half[row]) + shuffle_xor(t & 1 ? half[row] : half[2 + row], 1);
            const int column = output_column(n, g % (8 / EACH) + i * (8 / EACH));
            DQL_UNROLL
            for (int k = 0; k < 2; ++k) {
                const int row = EACH * (2 * t + k) + of_rows;
                sum_place(sums, row / 16, row / 8 % 2, row % 8 * 4 + column / 4)[column % 4] = quarter[k];
            }
        }
}

// z = the product over all k-groups, in the warp that owns it: with a split, warp 0 of a pair has the rows of half 0
// and warp 1 those of half 1; the others' z is nothing. `idle`: this warp has no pair; it must come along where all
// warps meet. `rows`: how many of the tile anybody asked for.
template <Precision P, int MT, class Weights>
DQL_DEVICE void product(float (&z)[MT][2][4], float* all_sums, const char* h, int row_bytes, Weights& weights,
                        const Share& share, int w, bool idle, int rows) {
    float* sums = all_sums + w * MT * 256;
    const int first = share.first, last = share.last;
    if (!idle) {
        if constexpr (P == Precision::FP32)
            scalar_product<MT>(sums, h, row_bytes, weights, first, last, rows);
        else
            tensor_product<P, MT>(z, h, row_bytes, weights, first, last);
    }
    if (share.split == 1) {
        if (P == Precision::FP32 && !idle) {
            sync_warp();
            DQL_UNROLL
            for (int m = 0; m < MT; ++m)
                DQL_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const float4 sum = load_floats(sum_place(sums, m, half, lane()));
                    z[m][half][0] = sum.x, z[m][half][1] = sum.y, z[m][half][2] = sum.z, z[m][half][3] = sum.w;
                }
            sync_warp();
        }
        return;
    }
    if constexpr (P != Precision::FP32) {
        if (!idle) {
            DQL_UNROLL
            for (int m = 0; m < MT; ++m)
                DQL_UNROLL
                for (int half = 0; half < 2; ++half)
                    *reinterpret_cast<float4*>(sum_place(sums, m, half, lane())) =
                        make_float4(z[m][half][0], z[m][half][1], z[m][half][2], z[m][half][3]);
        }
    }
    sync_block();
    const int range = share.range;
    if (idle || range > 1) return;
    const float* of_pair = sums - range * MT * 256;
    DQL_UNROLL
    for (int m = 0; m < MT; ++m) {
        float4 sum = make_float4(0, 0, 0, 0);
        for (int other = 0; other < share.split; ++other) {
            const float4 part = load_floats(of_pair + other * MT * 256 + sum_offset(m, range, lane()));
            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        DQL_UNROLL
        for (int half = 0; half < 2; ++half)  // indexed by a constant: registers
            if (half == range)
                z[m][half][0] = sum.x, z[m][half][1] = sum.y, z[m][half][2] = sum.z, z[m][half][3] = sum.w;
    }
}

}  // namespace device
}  // namespace dql
