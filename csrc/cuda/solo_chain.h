// The chain for few rows, bf16, H up to 256: a block has a tile of 4 to 24 rows to itself for the whole chain, and all of
// the network. No other block is waited for, and nothing is packed before: one launch is all there is.
//
// Each warp computes 16 or 32 columns of every hidden layer. The weights of the first product are in its registers, up to
// 128 a lane; those of the others in shared memory, where a lane reads what it wrote itself. The product is the
// transposed one, weights times activations: rows of the tensor cores' a are columns of the layer, columns of b
// are rows of the tile, eight at a time. So eight rows cost what one costs, in place of sixteen.
//
// A lane 4 g + t has of each 16 columns (an m-tile) the columns 2 g and 2 g + 1, of each 8 rows the rows 2 t and
// 2 t + 1, and keeps their state part in registers from step to step. In tiles of 4 rows the second one is left out:
// half the activations.
//
// Per step: first layer (float32, FMA units), L - 1 products, the last layer's sums over a warp's columns by shuffles
// and over warps in shared memory, the update of the chain by a thread a quad; meanwhile other warps draw the noise of
// the step after. A barrier of the block after each.
#pragma once

#include "chain_rows.h"
#include "small_layer.h"

namespace dql {
namespace device {

enum class Solo : int { SAMPLE = 0, SAVE = 1, BACKWARD = 2 };

template <int HP, int ROWS, Solo MODE>
class SoloChain : ChainRows<ROWS, MODE == Solo::BACKWARD, false> {
    static constexpr bool BACKWARD = MODE == Solo::BACKWARD;
    using Rows = ChainRows<ROWS, BACKWARD, false>;
    using Rows::M, Rows::a, Rows::memory, Rows::narrow, Rows::v, Rows::own, Rows::k, Rows::row0;
    using Rows::floats_at, Rows::all_quads, Rows::own_place, Rows::begin_rows, Rows::draw_quads;
    using Rows::read_ahead, Rows::update_quad;

    static constexpr int EACH = ROWS == 4 ? 1 : 2;           // rows of a lane, of eight
    static constexpr int N_TILES = ROWS == 4 ? 1 : ROWS / 8;  // of eight rows
    static constexpr int M_TILES = HP / 16 / WARPS;          // of 16 columns, of a warp
    static constexpr int GROUPS = HP * 2 / GROUP_BYTES, ROW_BYTES = HP * 2 + SOLO_PAD;
    static constexpr int COUNT = M_TILES * N_TILES * 2 * EACH;  // results of a lane
    static constexpr int STATE_CHUNK = 32;

public:
    DQL_DEVICE explicit SoloChain(const ChainArguments& arguments)
        : Rows(arguments, 0), w(warp()), g(lane() / 4), t(lane() % 4), floats(floats_at(a.memory.floats)) {
        const int X = rounded_up(a.net.X, 4);
        w_in = floats + (BACKWARD ? X * HP : 0) + column_of(0);
        w_out = floats + (BACKWARD ? 0 : X * HP) + column_of(0);
        biases = floats + (X + rounded_up(a.net.O, 4)) * HP + column_of(0);
        read_from = solo_row(EACH == 1 ? g & ~1 : g, ROW_BYTES) + 16 * t;
    }

    DQL_DEVICE void run() {
        row0 = static_cast<int64_t>(block_x()) * M;
        load();
        DQL_NO_UNROLL
        for (int tile = block_x(); tile < a.tiles; tile += blocks_x()) {
            const bool first = tile == block_x();
            row0 = static_cast<int64_t>(tile) * M;
            if constexpr (!BACKWARD) {
                if (!first) state_part();
            }
            k = BACKWARD ? a.K - 1 : 0;
            begin();
            DQL_NO_UNROLL
            for (int i = 0; i < a.K; ++i) {
                k = BACKWARD ? a.K - 1 - i : i;
                // what load() made lasts to the end if it is all
                const bool made = i == 0 && (first || a.K <= SOLO_TABLE_STEPS);
                if (!BACKWARD && i % SOLO_TABLE_STEPS == 0 && !made) make_time_table(i);
                step();
            }
        }
    }

private:
    // ---- where a lane's numbers are ----

    DQL_DEVICE int column_of(int m) const { return 16 * (w * M_TILES + m) + 2 * g; }  // and the one behind it
    DQL_DEVICE int row_of(int n, int e) const { return EACH == 1 ? t : 8 * n + 2 * t + e; }
    // In arrays of COUNT: m-tile, n-tile, column, row.
    DQL_DEVICE static constexpr int at(int m, int n, int c, int e) {
        return ((m * N_TILES + n) * 2 + c) * EACH + e;
    }

    DQL_DEVICE static float2 load2(const float* at) { return *reinterpret_cast<const float2*>(at); }

    // ---- once a block ----

    // The matrix of product number `which` (1 ..), as W[column][k]: as it lies forward, transposed backward.
    DQL_DEVICE const float* matrix_of(int which) const {
        return a.flat + a.net.hidden[BACKWARD ? a.net.L - 1 - which : which - 1];
    }

    // Numbers k .. k + 3 of two columns of an m-tile, on their way: forward four of each, backward four pairs.
    struct Numbers {
        float4 first, second;
        bool real;
    };

    // Of piece `piece` of an m-tile, two a k-group. H is a multiple of 4; loads never wait for a comparison.
    DQL_DEVICE Numbers numbers_of(const float* matrix, int m, int piece) const {
        const int H = a.net.H, column = column_of(m), at_k = 16 * piece - 12 * (piece % 2) + 8 * t;
        const bool real = column < H && at_k < H;
        const float* from = matrix + (real ? BACKWARD ? at_k * H + column : column * H + at_k : 0);
        if constexpr (!BACKWARD) return {load_floats(from), load_floats(from + H), real};
        const float2 pairs[4] = {load2(from), load2(from + H), load2(from + 2 * H), load2(from + 3 * H)};
        return {make_float4(pairs[0].x, pairs[1].x, pairs[2].x, pairs[3].x),
                make_float4(pairs[0].y, pairs[1].y, pairs[2].y, pairs[3].y), real};
    }

    // In the order of an instruction's a.
    DQL_DEVICE static uint4 packed(const Numbers& x) {
        return make_uint4(x.real ? bf16_pair(x.first.x, x.first.y) : 0, x.real ? bf16_pair(x.second.x, x.second.y) : 0,
                          x.real ? bf16_pair(x.first.z, x.first.w) : 0, x.real ? bf16_pair(x.second.z, x.second.w) : 0);
    }

    // This lane's 16 bytes of the m-tile's piece `piece` (two a k-group), of a matrix in shared memory.
    DQL_DEVICE uint4* shared_operands(int which, int m, int piece) const {
        const int64_t tile = static_cast<int64_t>(which - 2) * (HP / 16) + w * M_TILES + m;
        return reinterpret_cast<uint4*>(memory + a.memory.weights) + (tile * 2 * GROUPS + piece) * 32 + lane();
    }

    // Half of an m-tile's pieces, on their way and into shared memory.
    DQL_DEVICE void fetch(Numbers (&numbers)[GROUPS], int tile, int half) const {
        DQL_UNROLL
        for (int i = 0; i < GROUPS; ++i)
            numbers[i] = numbers_of(matrix_of(2 + tile / M_TILES), tile % M_TILES, half * GROUPS + i);
    }
    DQL_DEVICE void store(const Numbers (&numbers)[GROUPS], int tile, int half) const {
        DQL_UNROLL
        for (int i = 0; i < GROUPS; ++i)
            *shared_operands(2 + tile / M_TILES, tile % M_TILES, half * GROUPS + i) = packed(numbers[i]);
    }

    // 512 KB of weights at H = 256 and L = 3 take a multiprocessor 8,000 cycles, and all else waits for one load after the
    // other: so some weights are always on their way meanwhile, as many as registers hold.
    DQL_DEVICE void load() {
        const int tiles = (a.net.L - 2) * M_TILES;
        Numbers first[GROUPS], second[GROUPS];
        if (tiles > 0) fetch(first, 0, 0);
        load_floats_of_layers();
        if constexpr (!BACKWARD) make_time_table(0);
        DQL_NO_UNROLL
        for (int tile = 0; tile < tiles; ++tile) {
            fetch(second, tile, 1);
            store(first, tile, 0);
            if (tile + 1 < tiles) fetch(first, tile + 1, 0);
            store(second, tile, 1);
        }
        constexpr int AHEAD = ROWS + (MODE == Solo::SAVE ? 8 : 0) < 24 ? 2 * GROUPS * 3 / 4 : GROUPS;
        DQL_UNROLL
        for (int m = 0; m < M_TILES; ++m) {
            Numbers numbers[2 * GROUPS];
            DQL_UNROLL
            for (int piece = 0; piece < AHEAD; ++piece) numbers[piece] = numbers_of(matrix_of(1), m, piece);
            if constexpr (!BACKWARD) {
                if (m + 1 == M_TILES) state_part();
            }
            DQL_UNROLL
            for (int piece = AHEAD; piece < 2 * GROUPS; ++piece) numbers[piece] = numbers_of(matrix_of(1), m, piece);
            DQL_UNROLL
            for (int piece = 0; piece < 2 * GROUPS; ++piece) kept[m][piece] = packed(numbers[piece]);
        }
    }

    // Rows of W_x, of W_out, zeros up to whole quads of them, biases: a column by a thread.
    DQL_DEVICE void load_floats_of_layers() {
        // What no action fills is multiplied with zero weights, or never stored, but should be some number.
        for (int i = thread(); i < (a.memory.bytes - a.memory.v) / 4; i += THREADS) v[i] = 0;
        const int column = thread(), X = a.net.X, O = a.net.O, whole_X = rounded_up(X, 4), whole_O = rounded_up(O, 4);
        if (column >= HP) return;
        const bool real = column < a.net.H;
        const int place = real ? column : 0;
        float* to = floats + column;
        const float* x = a.flat + a.net.first + static_cast<int64_t>(place) * a.net.stride + a.net.x_column;
        DQL_UNROLL_BY_8
        for (int i = 0; i < whole_X; ++i) to[i * HP] = real && i < X ? x[i < X ? i : 0] : 0;
        DQL_UNROLL_BY_8
        for (int i = 0; i < whole_O; ++i)
            to[(whole_X + i) * HP] = real && i < O ? a.flat[a.net.out + (i < O ? i : 0) * a.net.H + place] : 0;
        DQL_UNROLL
        for (int i = 0; i < MAX_HIDDEN_LAYERS - 1; ++i)
            if (i + 1 < a.net.L) to[(whole_X + whole_O + i) * HP] = real ? a.flat[a.net.hidden_bias[i] + place] : 0;
    }

    // Rows first .. of the time table, SOLO_TABLE_STEPS of them or as many as there are.
    DQL_DEVICE void make_time_table(int first) {
        const int D = a.net.D, steps = a.K - first < SOLO_TABLE_STEPS ? a.K - first : SOLO_TABLE_STEPS;
        float* hidden = floats_at(a.memory.h[0]);  // [SOLO_TABLE_STEPS][2 D]
        float* features = hidden + SOLO_TABLE_STEPS * 2 * D;  // [SOLO_TABLE_STEPS][D]
        time_features(a.net, a.flat, a.embedding + static_cast<int64_t>(first) * D, steps, hidden, nullptr, features);
        float* table = floats_at(a.memory.table);
        const int column = thread();
        if (column >= HP) return;
        const bool real = column < a.net.H;
        const float* weight =
            a.flat + a.net.first + static_cast<int64_t>(real ? column : 0) * a.net.stride + a.net.time_column;
        float sums[SOLO_TABLE_STEPS];
        DQL_UNROLL
        for (int s = 0; s < SOLO_TABLE_STEPS; ++s) sums[s] = real ? a.flat[a.net.first_bias + column] : 0;
        DQL_UNROLL_BY_8
        for (int d = 0; d < D; ++d) {
            const float weight_d = real ? weight[d] : 0;
            DQL_UNROLL
            for (int s = 0; s < SOLO_TABLE_STEPS; ++s)  // behind the last step whatever is there
                sums[s] = fmaf(weight_d, features[s * D + d], sums[s]);
        }
        DQL_UNROLL
        for (int s = 0; s < SOLO_TABLE_STEPS; ++s) table[s * HP + column] = sums[s];
    }

    // ---- once a tile ----

    DQL_DEVICE void begin() {
        sync_block();  // the tile before is done
        begin_rows(thread());
        if (!BACKWARD && a.K > 1) draw_quads(THREADS - 1 - thread(), THREADS, 1, 2);
    }

    // W_s s of the lane's columns and rows. Of a state that holds NaN or infinity it is NaN, and with it all that follows
    // from that state: infinity alone might end as an action within the bounds.
    DQL_DEVICE void state_part() {
        float* chunk = floats_at(a.memory.h[0]);  // [STATE_CHUNK][M]
        int* bad = reinterpret_cast<int*>(chunk + STATE_CHUNK * M);  // [M]
        DQL_UNROLL
        for (int i = 0; i < COUNT; ++i) base[i] = 0;
        const int S = a.net.S;
        for (int from = 0; from < S; from += STATE_CHUNK) {
            sync_block();  // what was there is read
            if (from == 0 && thread() < M) bad[thread()] = 0;
            if (from == 0) sync_block();
            for (int i = thread(); i < STATE_CHUNK * M; i += THREADS) {
                const int row = i / STATE_CHUNK, j = from + i % STATE_CHUNK;
                int state = static_cast<int>(row0) + row;  // a division of 64 bits is a call
                float value = 0;
                if (state < a.R && j < S) {
                    if (a.N > 1) state /= a.N;
                    value = a.states[static_cast<int64_t>(state) * S + j];
                }
                chunk[i % STATE_CHUNK * M + row] = value;
                if (!(fabsf(value) < INFINITY)) {  // all who find something write the same
                    bad[row] = 1;
                    if (a.told != nullptr) *a.told = 1;
                }
            }
            sync_block();
            const int width = S - from < STATE_CHUNK ? S - from : STATE_CHUNK;
            const float* weight[M_TILES][2];
            DQL_UNROLL
            for (int m = 0; m < M_TILES; ++m)
                DQL_UNROLL
                for (int c = 0; c < 2; ++c) {
                    // behind H any will do: what comes of it is multiplied by 0
                    const int column = column_of(m) < a.net.H ? column_of(m) + c : 0;
                    weight[m][c] = a.flat + a.net.first + static_cast<int64_t>(column) * a.net.stride +
                                   a.net.state_column + from;
                }
            DQL_UNROLL_BY_8
            for (int j = 0; j < width; ++j) {
                float w_j[M_TILES][2];
                DQL_UNROLL
                for (int m = 0; m < M_TILES; ++m) w_j[m][0] = weight[m][0][j], w_j[m][1] = weight[m][1][j];
                DQL_UNROLL
                for (int n = 0; n < N_TILES; ++n)
                    DQL_UNROLL
                    for (int e = 0; e < EACH; ++e) {
                        const float x = chunk[j * M + row_of(n, e)];
                        DQL_UNROLL
                        for (int m = 0; m < M_TILES; ++m)
                            DQL_UNROLL
                            for (int c = 0; c < 2; ++c) base[at(m, n, c, e)] = fmaf(w_j[m][c], x, base[at(m, n, c, e)]);
                    }
            }
        }
        DQL_UNROLL
        for (int n = 0; n < N_TILES; ++n)
            DQL_UNROLL
            for (int e = 0; e < EACH; ++e) {
                if (bad[row_of(n, e)] == 0) continue;
                DQL_UNROLL
                for (int m = 0; m < M_TILES; ++m) base[at(m, n, 0, e)] = base[at(m, n, 1, e)] = NAN;
            }
    }

    // ---- one step ----

    DQL_DEVICE void step() {
        sync_block();  // v and the time table are written
        DQL_NO_UNROLL
        for (int nth = 0; nth < a.net.L; ++nth) {
            const int layer = BACKWARD ? a.net.L - 1 - nth : nth;  // whose activations, or d_z, come of it
            uint32_t slope[BACKWARD ? COUNT / 2 : 1];
            if constexpr (BACKWARD) load_slopes(slope, layer);
            float z[COUNT];
            if (nth == 0) {
                first_layer(z);
            } else {
                sync_block();  // its input is written
                if constexpr (BACKWARD)
                    clear(z);
                else
                    fill(z, biases + (layer - 1) * HP);
                const char* h = memory + a.memory.h[nth - 1 & 1] + read_from;
                if (nth == 1)
                    product(z, h, [&](int m, int piece) { return kept[m][piece]; });
                else
                    product(z, h, [&](int m, int piece) { return *shared_operands(nth, m, piece); });
            }
            finish_layer(z, slope, layer, nth);
            // In the last turn of a backward chain nobody asks for the gradient of x_T, the noise.
            if (nth + 1 == a.net.L && (!BACKWARD || k > 0)) narrow_part(z);
        }
        if (BACKWARD && k == 0) return;
        update();
    }

    DQL_DEVICE static void clear(float (&z)[COUNT]) {
        DQL_UNROLL
        for (int i = 0; i < COUNT; ++i) z[i] = 0;
    }

    // z = a row of numbers, one a column.
    DQL_DEVICE static void fill(float (&z)[COUNT], const float* row) {
        DQL_UNROLL
        for (int m = 0; m < M_TILES; ++m) {
            const float2 both = load2(row + 16 * m);
            DQL_UNROLL
            for (int n = 0; n < N_TILES; ++n)
                DQL_UNROLL
                for (int e = 0; e < EACH; ++e) z[at(m, n, 0, e)] = both.x, z[at(m, n, 1, e)] = both.y;
        }
    }

    DQL_DEVICE void first_layer(float (&z)[COUNT]) const {
        if constexpr (BACKWARD) {
            clear(z);
        } else {
            fill(z, floats_at(a.memory.table) + k % SOLO_TABLE_STEPS * HP + column_of(0));
            DQL_UNROLL
            for (int i = 0; i < COUNT; ++i) z[i] += base[i];
        }
        const int in = BACKWARD ? a.net.O : a.net.X;
        DQL_UNROLL_BY_2
        for (int quad = 0; 4 * quad < in; ++quad) {
            float x[N_TILES][EACH][4];
            DQL_UNROLL
            for (int n = 0; n < N_TILES; ++n)
                DQL_UNROLL
                for (int e = 0; e < EACH; ++e) get(x[n][e], v + row_of(n, e) * narrow + 4 * quad);
            float2 w[4][M_TILES];
            DQL_UNROLL
            for (int i = 0; i < 4; ++i)
                DQL_UNROLL
                for (int m = 0; m < M_TILES; ++m) w[i][m] = load2(w_in + (4 * quad + i) * HP + 16 * m);
            DQL_UNROLL
            for (int i = 0; i < 4; ++i) {
                DQL_UNROLL
                for (int m = 0; m < M_TILES; ++m) {
                    const float2 w_i = w[i][m];
                    DQL_UNROLL
                    for (int n = 0; n < N_TILES; ++n)
                        DQL_UNROLL
                        for (int e = 0; e < EACH; ++e) {
                            z[at(m, n, 0, e)] = fmaf(x[n][e][i], w_i.x, z[at(m, n, 0, e)]);
                            z[at(m, n, 1, e)] = fmaf(x[n][e][i], w_i.y, z[at(m, n, 1, e)]);
                        }
                }
            }
        }
    }

    // z += weights times activations. An instruction that adds to the result of the one before waits for it; with eight
    // rows there is too little else to do meanwhile, and every other one has sums of its own.
    template <class Weights>
    DQL_DEVICE static void product(float (&z)[COUNT], const char* h, const Weights& weights) {
        constexpr int SETS = N_TILES == 1 ? 2 : 1;
        float d[SETS][M_TILES][N_TILES][4];
        DQL_UNROLL
        for (int m = 0; m < M_TILES; ++m)
            DQL_UNROLL
            for (int n = 0; n < N_TILES; ++n)
                DQL_UNROLL
                for (int i = 0; i < 4; ++i) {
                    d[0][m][n][i] = i % 2 < EACH ? z[at(m, n, i / 2, i % EACH)] : 0;
                    if (SETS == 2) d[SETS - 1][m][n][i] = 0;
                }
        DQL_UNROLL
        for (int group = 0; group < GROUPS; ++group) {
            uint4 b[N_TILES];
            DQL_UNROLL
            for (int n = 0; n < N_TILES; ++n)
                b[n] = *reinterpret_cast<const uint4*>(h + n * 8 * ROW_BYTES + group * GROUP_BYTES);
            DQL_UNROLL
            for (int m = 0; m < M_TILES; ++m) {
                const uint4 low = weights(m, 2 * group), high = weights(m, 2 * group + 1);
                const uint32_t a_low[4] = {low.x, low.y, low.z, low.w}, a_high[4] = {high.x, high.y, high.z, high.w};
                DQL_UNROLL
                for (int n = 0; n < N_TILES; ++n) {
                    const uint32_t b_low[2] = {b[n].x, b[n].y}, b_high[2] = {b[n].z, b[n].w};
                    mma_bf16(d[0][m][n], a_low, b_low);
                    mma_bf16(d[SETS - 1][m][n], a_high, b_high);
                }
            }
        }
        DQL_UNROLL
        for (int m = 0; m < M_TILES; ++m)
            DQL_UNROLL
            for (int n = 0; n < N_TILES; ++n)
                DQL_UNROLL
                for (int i = 0; i < 4; ++i)
                    if (i % 2 < EACH) {
                        z[at(m, n, i / 2, i % EACH)] = d[0][m][n][i];
                        if (SETS == 2) z[at(m, n, i / 2, i % EACH)] += d[SETS - 1][m][n][i];
                    }
    }

    // Of a layer's plane, the place of this lane's first column of a row.
    DQL_DEVICE char* saved_at(char* planes, int layer, int row) const {
        const int64_t plane = static_cast<int64_t>(layer) * a.K + k;
        return planes + ((plane * a.RP + row0 + row) * HP + column_of(0)) * 2;
    }

    DQL_DEVICE void load_slopes(uint32_t (&slope)[COUNT / 2], int layer) const {
        DQL_UNROLL
        for (int n = 0; n < N_TILES; ++n)
            DQL_UNROLL
            for (int e = 0; e < EACH; ++e) {
                const char* from = saved_at(a.slope, layer, row_of(n, e));
                DQL_UNROLL
                for (int m = 0; m < M_TILES; ++m)
                    slope[(m * N_TILES + n) * EACH + e] = *reinterpret_cast<const uint32_t*>(from + 32 * m);
            }
    }

    // Activates (forward) or multiplies with the slopes (backward), saves, and hands on, unless the layer is the last.
    template <int SLOPES>
    DQL_DEVICE void finish_layer(float (&z)[COUNT], const uint32_t (&slope)[SLOPES], int layer, int nth) {
        float slopes[MODE == Solo::SAVE ? COUNT : 1];
        if constexpr (MODE == Solo::SAMPLE) activate_all(z, a.net.activation);
        if constexpr (MODE == Solo::SAVE) activate_all_with_slope(z, slopes, a.net.activation);
        char* const next = memory + a.memory.h[nth & 1] + column_of(0) * 2;
        DQL_UNROLL
        for (int n = 0; n < N_TILES; ++n)
            DQL_UNROLL
            for (int e = 0; e < EACH; ++e) {
                char *first = nullptr, *second = nullptr;
                if constexpr (MODE == Solo::SAVE)
                    first = saved_at(a.h, layer, row_of(n, e)), second = saved_at(a.slope, layer, row_of(n, e));
                if constexpr (BACKWARD) first = saved_at(a.d_z, layer, row_of(n, e));
                char* const to = next + n * 8 * ROW_BYTES + solo_row(2 * t + e, ROW_BYTES);
                DQL_UNROLL
                for (int m = 0; m < M_TILES; ++m) {
                    float &low = z[at(m, n, 0, e)], &high = z[at(m, n, 1, e)];
                    if constexpr (BACKWARD) {
                        const uint32_t by = slope[(m * N_TILES + n) * EACH + e];
                        low *= as_float(by << 16), high *= as_float(by & 0xffff0000u);
                    }
                    const uint32_t value = bf16_pair(low, high);
                    if constexpr (MODE != Solo::SAMPLE) *reinterpret_cast<uint32_t*>(first + 32 * m) = value;
                    if constexpr (MODE == Solo::SAVE)
                        *reinterpret_cast<uint32_t*>(second + 32 * m) =
                            bf16_pair(slopes[at(m, n, 0, e)], slopes[at(m, n, 1, e)]);
                    if (nth + 1 < a.net.L) *reinterpret_cast<uint32_t*>(to + 32 * m) = value;
                }
            }
    }

    // Where they fit, in the activations that the last product does not read and the next step writes first.
    DQL_DEVICE float* parts() const {
        return floats_at(a.memory.parts >= 0 ? a.memory.parts : a.memory.h[a.net.L - 1 & 1]);
    }

    // Eight numbers (of four: twice the same) summed over the lanes of equal t, of which lane g gets number g.
    template <int NUMBERS>
    DQL_DEVICE static float summed_over_columns(const float (&each)[NUMBERS]) {
        const bool first = lane() & 4, second = lane() & 8, third = lane() & 16;
        float half[NUMBERS / 2], quarter[NUMBERS / 4];
        DQL_UNROLL
        for (int i = 0; i < NUMBERS / 2; ++i)
            half[i] = (first ? each[2 * i + 1] : each[2 * i]) + shuffle_xor(first ? each[2 * i] : each[2 * i + 1], 4);
        DQL_UNROLL
        for (int i = 0; i < NUMBERS / 4; ++i)
            quarter[i] = (second ? half[2 * i + 1] : half[2 * i]) + shuffle_xor(second ? half[2 * i] : half[2 * i + 1], 8);
        if constexpr (NUMBERS == 4) return quarter[0] + shuffle_xor(quarter[0], 16);
        return (third ? quarter[NUMBERS / 4 - 1] : quarter[0]) +
               shuffle_xor(third ? quarter[0] : quarter[NUMBERS / 4 - 1], 16);
    }

    // Sums of the last layer's columns, times the narrow weights, over the warp's columns: four outputs at a time.
    DQL_DEVICE void narrow_part(const float (&z)[COUNT]) {
        const int out = BACKWARD ? a.net.X : a.net.O;
        float* part = parts() + w * M * narrow;
        DQL_UNROLL_BY_2
        for (int o = 0; o < out; o += 4) {
            float2 w_o[M_TILES][4];
            DQL_UNROLL
            for (int m = 0; m < M_TILES; ++m)
                DQL_UNROLL
                for (int i = 0; i < 4; ++i) w_o[m][i] = load2(w_out + (o + i) * HP + 16 * m);
            DQL_UNROLL
            for (int n = 0; n < N_TILES; ++n) {
                float sums[4 * EACH];
                DQL_UNROLL
                for (int i = 0; i < 4; ++i)
                    DQL_UNROLL
                    for (int e = 0; e < EACH; ++e) {
                        float sum = 0;
                        DQL_UNROLL
                        for (int m = 0; m < M_TILES; ++m) {
                            sum = fmaf(z[at(m, n, 0, e)], w_o[m][i].x, sum);
                            sum = fmaf(z[at(m, n, 1, e)], w_o[m][i].y, sum);
                        }
                        sums[i * EACH + e] = sum;
                    }
                const float sum = summed_over_columns(sums);
                if (EACH == 2 || g < 4)
                    part[row_of(n, EACH == 1 ? 0 : g % 2) * narrow + o + (EACH == 1 ? g % 4 : g / 2)] = sum;
            }
        }
    }

    // noise[j] lies in place 1 + j % 2 of `own`; what is drawn now the update after this one will take.
    DQL_DEVICE void update() {
        const Step step(a.steps + k * STEP_STRIDE);
        float ahead[4];  // of the first quad
        if (thread() < all_quads()) read_ahead(ahead, thread());
        sync_block();  // the parts are written
        for (int quad = thread(); quad < all_quads(); quad += THREADS) {
            float4 all = load_floats(parts() + 4 * quad);
            DQL_UNROLL
            for (int slot = 1; slot < WARPS; ++slot) {
                const float4 more = load_floats(parts() + slot * M * narrow + 4 * quad);
                all.x += more.x, all.y += more.y, all.z += more.z, all.w += more.w;
            }
            const float sum[4] = {all.x, all.y, all.z, all.w};
            if (quad != thread()) read_ahead(ahead, quad);
            update_quad(step, sum, quad, ahead, own_place(1 + (k + 1) % 2, quad));
        }
        if (!BACKWARD && k + 2 < a.K) draw_quads(THREADS - 1 - thread(), THREADS, k + 2, 1 + k % 2);
    }

    int w, g, t;  // of this lane: warp; column pair and row pair of fragments
    float* floats;
    const float *w_in, *w_out, *biases;  // from the lane's first column on
    int read_from;  // where the lane's bytes of a product's input are, of eight rows
    uint4 kept[M_TILES][2 * GROUPS];
    float base[BACKWARD ? 1 : COUNT];
};

template <int HP, int ROWS, Solo MODE>
DQL_KERNEL(THREADS, 1) solo_chain_kernel(DQL_ARGUMENT ChainArguments arguments) {
    SoloChain<HP, ROWS, MODE>(arguments).run();
}

}  // namespace device
}  // namespace dql
