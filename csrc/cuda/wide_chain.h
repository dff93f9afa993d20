// The chain kernel for many rows, in bf16 on Hopper: 128 rows a block, weights streamed, products by wgmma.
//
// Two warp groups have 64 rows each and every column of them, so that they need nothing of each other but the weights'
// ring, which a third group fills by bulk copies of 64 numbers of k for all columns. While one group waits for the special
// function units with its activations, the other multiplies: the ring's depth is how far apart they may be. Inputs of a
// layer are overwritten by its results: they leave the accumulators when the product has been made. So that they don't
// fall into step, and both wait for the one and then both for the other, they take turns at the tensor cores.
//
// The first layer is such a product as well. Its input, [x, state], has a place of its own, where the states stay for
// all steps. A float32 is two bf16 there, and in its weights; of the four products of parts three are made, which leaves
// errors of 2^-17 of the terms, beside 2^-9 where the hidden layers round. So nothing that grows with the rows is written
// beforehand, or read at a step. The time table's row comes with the weights. States too wide for that (wide_slabs) have
// their float32 part made by the prologue, and x is added to it on the FMA units. The last layer has two parts of
// everything likewise, but each warp makes it for its own rows, of the results as they lie in its registers.
//
// Forward without saving; everything else goes by chain.h.
#pragma once

#include "arithmetic.h"
#include "chain_arguments.h"
#include "launch.h"

namespace dql {
namespace device {

template <int HP, FirstLayer FIRST>
class WideChain {
    static constexpr int CHUNKS = HP / WIDE_CHUNK, CHUNK_BYTES = HP * WIDE_CHUNK * 2, PAIRS = HP / 16;
    static constexpr int ROWS = 64;                             // of a warp group
    static constexpr int INPUT_BYTES = ROWS * WIDE_CHUNK * 2;   // of a warp group's input, 64 numbers of k
    static constexpr int LOW = WIDE_SLAB * 2;                   // bytes from a high part to its low one
    static constexpr int TURN_OF_FIRST = 3;                     // a named barrier, and the next of the second group
    static constexpr bool FLOATS_IN_SHARED = FIRST != FirstLayer::IN_L2;

public:
    DQL_DEVICE explicit WideChain(const ChainArguments& arguments)
        : a(arguments),
          memory(shared_memory()),
          w(warp()),
          group(w / 4),
          narrow(a.memory.narrow),
          full(reinterpret_cast<Barrier*>(memory + a.memory.barriers)),
          empty(full + WIDE_MOST_STAGES),
          input(memory + a.memory.h[0] + group * CHUNKS * INPUT_BYTES),
          first(memory + a.memory.first + group * a.memory.slabs * INPUT_BYTES),
          v(floats_at(a.memory.v)),
          own(floats_at(a.memory.own)) {}

    DQL_DEVICE void run() {
        if (thread() == 0) {
            for (int i = 0; i < a.memory.stages; ++i) {
                barrier_init(full + i);
                barrier_init(empty + i, 8);  // the warps of two groups
            }
            barriers_ready();
        }
        wait_for_previous();
        if constexpr (FLOATS_IN_SHARED)
            for (int i = 4 * thread(); i < (a.net.X - unread() + a.net.O + a.net.L - 1) * HP; i += 4 * WIDE_THREADS)
                *reinterpret_cast<float4*>(floats_at(a.memory.floats) + i) =
                    load_floats(global_floats() + unread() * HP + i);
        sync_block();
        if (group == 2) {
            fewer_registers<24>();
            produce();
        } else {
            more_registers<240>();
            consume();
        }
    }

private:
    DQL_DEVICE float* floats_at(int offset) const { return reinterpret_cast<float*>(memory + offset); }

    // ---- the third group: one thread of it ----

    DQL_DEVICE void produce() {
        if (thread() != 256) return;
        const int per_step = (a.net.L - 1) * CHUNKS;
        const char* operands = a.operands + a.first_network * a.operands_apart;
        Turn ring;
        int odd = 0;
        for (int tile = block_x(); tile < a.tiles; tile += blocks_x())
            for (int k = 0; k < a.K; ++k) {
                for (int slab = 0; slab < (FIRST == FirstLayer::PRODUCT ? a.memory.slabs : 0); ++slab) {
                    const bool with_time = slab == 0;
                    expect(ring, CHUNK_BYTES + (with_time ? HP * 4 : 0));
                    fill(ring, a.first + static_cast<int64_t>(slab) * CHUNK_BYTES);
                    // Where the step before the last has its row: the groups are past that.
                    if (with_time)
                        bulk_copy(time_row(odd), a.time_table + static_cast<int64_t>(k) * HP, HP * 4, full + ring.stage);
                    next(ring);
                }
                for (int chunk = 0; chunk < per_step; ++chunk) {
                    expect(ring, CHUNK_BYTES);
                    fill(ring, operands + static_cast<int64_t>(chunk) * CHUNK_BYTES);
                    next(ring);
                }
                odd ^= 1;
            }
    }

    struct Turn {
        int stage = 0, turn = 0;
    };
    DQL_DEVICE void next(Turn& ring) const {
        if (++ring.stage == a.memory.stages) ring.stage = 0, ++ring.turn;
    }
    DQL_DEVICE char* weights(const Turn& ring) const { return memory + a.memory.weights + ring.stage * CHUNK_BYTES; }
    DQL_DEVICE float* time_row(int odd) const { return floats_at(a.memory.time) + odd * HP; }

    DQL_DEVICE void expect(const Turn& ring, int bytes) {
        if (ring.turn > 0) barrier_wait(empty + ring.stage, (ring.turn - 1) & 1);
        barrier_expect(full + ring.stage, bytes);
    }
    DQL_DEVICE void fill(const Turn& ring, const char* from) {
        bulk_copy(weights(ring), from, CHUNK_BYTES, full + ring.stage);
    }

    // ---- the warp groups: a warp has 16 rows of its tile to itself, except that its products read a whole group's ----

    DQL_DEVICE void consume() {
        Turn ring;
        int odd = 0;
        if (in_turn() && group == 1) arrive_some(TURN_OF_FIRST, 256);  // the first group's turn
        for (tile = block_x(); tile < a.tiles; tile += blocks_x()) {
            begin();
            for (k = 0; k < a.K; ++k) {
                float z[HP / 2];
                Ahead ahead;
                if constexpr (FIRST != FirstLayer::PRODUCT) {
                    sync_warp();  // v is written
                    first_layer();
                }
                for (int layer = FIRST == FirstLayer::PRODUCT ? 0 : 1; layer < a.net.L; ++layer) {
                    fence_async();
                    if (in_turn())  // the group's inputs are written, and it is its turn
                        sync_some(TURN_OF_FIRST + group, 256);
                    else
                        sync_some(1 + group, 128);
                    if (FIRST == FirstLayer::PRODUCT && layer == 0) {
                        first_product(z, ring);
                        add(z, time_row(odd) + 4 * t());
                    } else {
                        product(z, ring, ahead, layer + 1 == a.net.L);
                        sync_some(1 + group, 128);  // and read
                        add(z, small_floats(a.net.X + a.net.O + layer - 1));
                    }
                    activate_all_briefly(z, a.net.activation);
                    if (layer + 1 < a.net.L) hand_on(z);
                }
                narrow_sums(z);
                sync_warp();
                update(ahead);
                odd ^= 1;
            }
        }
        if (in_turn() && group == 0) sync_some(TURN_OF_FIRST, 256);  // the last turn that it was given
    }

    // Where the ring has a whole layer, or else a group would wait for the other in the middle of one; and where that
    // leaves registers enough.
    DQL_DEVICE bool in_turn() const { return FIRST == FirstLayer::PRODUCT && a.memory.stages >= CHUNKS; }

    // So many of a layer's `count` chunks are asked for. When it is all, or as many as the ring has, the other group's are
    // next: the ring goes on only when that has been through them too.
    DQL_DEVICE void give_turn(int asked, int count) const {
        if (in_turn() && asked == (count < a.memory.stages ? count : a.memory.stages))
            arrive_some(TURN_OF_FIRST + 1 - group, 256);
    }

    // High times high, and what the low parts add to it.
    template <bool ADD>
    DQL_DEVICE void slab_product(float (&z)[HP / 2], Turn& ring, int slab) {
        const uint64_t x = swizzled_operand(first + slab * INPUT_BYTES), w_x = swizzled_operand(weights(ring));
        barrier_wait(full + ring.stage, ring.turn & 1);
        wgmma_begin();
        DQL_UNROLL
        for (int i = 0; i < LOW; i += 32) {
            wgmma_bf16(z, further(x, i), further(w_x, i), ADD || i > 0);
            wgmma_bf16(z, further(x, i), further(w_x, LOW + i), true);
            wgmma_bf16(z, further(x, LOW + i), further(w_x, i), true);
        }
        wgmma_close();
        give_turn(slab + 1, a.memory.slabs);
        wgmma_wait<0>(z);
        if (lane() == 0) barrier_arrive(empty + ring.stage);
        next(ring);
    }
    // The first apart: that nothing is added to must be known when this is compiled, or registers are held for it.
    DQL_DEVICE void first_product(float (&z)[HP / 2], Turn& ring) {
        slab_product<false>(z, ring, 0);
        DQL_NO_UNROLL
        for (int slab = 1; slab < a.memory.slabs; ++slab) slab_product<true>(z, ring, slab);
    }

    // While the tensor cores finish the last layer, what the step's update will need is loaded and drawn.
    struct Ahead {
        float4 step[2];
        float bias[4], noise[4];  // of this lane's first quad: the only one where there are up to eight numbers a row
    };
    DQL_DEVICE void product(float (&z)[HP / 2], Turn& ring, Ahead& ahead, bool last) {
        const uint64_t h = swizzled_operand(input);
        int before = 0;  // the stage of the chunk before
        DQL_UNROLL
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            barrier_wait(full + ring.stage, ring.turn & 1);
            const uint64_t of_weights = swizzled_operand(weights(ring));
            wgmma_begin();
            DQL_UNROLL
            for (int i = 0; i < WIDE_CHUNK / 16; ++i)
                wgmma_bf16(z, further(h, chunk * INPUT_BYTES + 32 * i), further(of_weights, 32 * i), chunk + i > 0);
            wgmma_close();
            if (chunk + 1 >= WIDE_STAGES || chunk + 1 == CHUNKS) give_turn(chunk + 1, CHUNKS);
            if (chunk > 0) {
                wgmma_wait<1>(z);
                if (lane() == 0) barrier_arrive(empty + before);
            }
            before = ring.stage;
            next(ring);
        }
        if (last) look_ahead(ahead);
        wgmma_wait<0>(z);
        if (lane() == 0) barrier_arrive(empty + before);
    }

    // z[8 pair + 4 n-tile + 2 half + e]: row g + 8 half of the warp's 16, column 16 pair + 4 t + 2 n-tile + e.
    DQL_DEVICE static float& at(float (&z)[HP / 2], int pair, int half, int i) {
        return z[8 * pair + i / 2 * 4 + 2 * half + i % 2];
    }
    // Of this lane in fragments: row, and quarter of the columns.
    DQL_DEVICE static int g() { return lane() / 4; }
    DQL_DEVICE static int t() { return lane() % 4; }
    DQL_DEVICE static int row_of(int half) { return 8 * half + g(); }              // of the warp's
    DQL_DEVICE int64_t row0() const { return static_cast<int64_t>(tile) * 2 * ROWS + 16 * w; }
    DQL_DEVICE float* narrow_at(float* from, int row) const { return from + (w * 16 + row) * narrow; }
    // The narrow sums of a row lie where the warp's rows of the last product's input were: half of them in a chunk.
    DQL_DEVICE float* sums_at(int row) const {
        return reinterpret_cast<float*>(input + row / 8 * INPUT_BYTES + w % 4 * 16 * WIDE_CHUNK * 2) + row % 8 * narrow;
    }
    // Row `row` of the packed floats, from this lane's columns on: those of pair p are 16 p further.
    DQL_DEVICE const float* small_floats(int row) const {
        return (FLOATS_IN_SHARED ? floats_at(a.memory.floats) : global_floats()) + (row - unread()) * HP + 4 * t();
    }
    DQL_DEVICE int unread() const { return FIRST == FirstLayer::PRODUCT ? a.net.X : 0; }  // W_x among the operands
    DQL_DEVICE const float* global_floats() const {
        return reinterpret_cast<const float*>(a.floats + a.first_network * a.floats_apart);
    }

    // On the FMA units, onto the states' part. Four pairs at a time: all at once would need more registers than there are.
    DQL_DEVICE void first_layer() {
        const float* state[2];
        const float* time = a.time_table + static_cast<int64_t>(k) * HP + 4 * t();
        DQL_UNROLL
        for (int half = 0; half < 2; ++half) state[half] = a.state_part + state_of(row_of(half)) * HP + 4 * t();
        float4 of_state[4][2];  // of the four pairs to come, on their way meanwhile
        const auto load = [&](int pair) {
            DQL_UNROLL
            for (int p = 0; p < 4; ++p)
                DQL_UNROLL
                for (int half = 0; half < 2; ++half) of_state[p][half] = load_floats(state[half] + 16 * (pair + p));
        };
        if (FLOATS_IN_SHARED) load(0);
        DQL_NO_UNROLL
        for (int pair = 0; pair < PAIRS; pair += 4) {
            const int place = place_of_matrix();
            if (!FLOATS_IN_SHARED) load(pair);
            float z[32];  // [4 pairs][half][4 columns]
            DQL_UNROLL
            for (int p = 0; p < 4; ++p) {
                const float4 of_time = load_floats(time + 16 * (pair + p));
                DQL_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int at = 8 * p + 4 * half;
                    z[at] = of_state[p][half].x + of_time.x, z[at + 1] = of_state[p][half].y + of_time.y;
                    z[at + 2] = of_state[p][half].z + of_time.z, z[at + 3] = of_state[p][half].w + of_time.w;
                }
            }
            if (FLOATS_IN_SHARED && pair + 4 < PAIRS) load(pair + 4);  // what is not in shared memory takes registers
            for (int i = 0; i < a.net.X; ++i) {
                const float* w_x = small_floats(i) + 16 * pair;
                const float x[2] = {narrow_at(v, row_of(0))[i], narrow_at(v, row_of(1))[i]};
                DQL_UNROLL
                for (int p = 0; p < 4; ++p) {
                    const float4 w_i = load_floats(w_x + 16 * p);
                    DQL_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        const int at = 8 * p + 4 * half;
                        z[at] = fmaf(x[half], w_i.x, z[at]), z[at + 1] = fmaf(x[half], w_i.y, z[at + 1]);
                        z[at + 2] = fmaf(x[half], w_i.z, z[at + 2]), z[at + 3] = fmaf(x[half], w_i.w, z[at + 3]);
                    }
                }
            }
            activate_all_briefly(z, a.net.activation);
            DQL_UNROLL
            for (int p = 0; p < 4; ++p) {
                const float upper[4] = {z[8 * p], z[8 * p + 1], z[8 * p + 2], z[8 * p + 3]};
                const float lower[4] = {z[8 * p + 4], z[8 * p + 5], z[8 * p + 6], z[8 * p + 7]};
                hand_on(place, upper, lower, pair + p);
            }
        }
    }

    // z += a row of numbers, one a column.
    DQL_DEVICE void add(float (&z)[HP / 2], const float* row) {
        DQL_UNROLL
        for (int pair = 0; pair < PAIRS; ++pair) {
            if (pair % 8 == 0) keep_order();
            const float4 b = load_floats(row + 16 * pair);
            DQL_UNROLL
            for (int half = 0; half < 2; ++half) {
                at(z, pair, half, 0) += b.x, at(z, pair, half, 1) += b.y;
                at(z, pair, half, 2) += b.z, at(z, pair, half, 3) += b.w;
            }
        }
    }

    // A pair's columns of two rows, g and g + 8, into the next product's input as products have them: number k of a row
    // is the column that has row k of the operands (wide_row), in which order the weights' k are packed.
    DQL_DEVICE void hand_on(int place, const float (&upper)[4], const float (&lower)[4], int pair) {
        store_matrices(input + pair / 4 * INPUT_BYTES + (place ^ pair % 4 * 32),
                       {bf16_pair(upper[0], upper[1]), bf16_pair(lower[0], lower[1]), bf16_pair(upper[2], upper[3]),
                        bf16_pair(lower[2], lower[3])});
    }

    // Where this lane's row of a pair's matrix begins, of the first pair.
    DQL_DEVICE int place_of_matrix() const {
        const int matrix = lane() / 8, row = w % 4 * 16 + matrix % 2 * 8 + lane() % 8;
        return made_here(wide_place(row, matrix / 2 * 8));
    }

    DQL_DEVICE void hand_on(float (&z)[HP / 2]) {
        const int place = place_of_matrix();
        DQL_UNROLL
        for (int pair = 0; pair < PAIRS; ++pair) {
            const float upper[4] = {at(z, pair, 0, 0), at(z, pair, 0, 1), at(z, pair, 0, 2), at(z, pair, 0, 3)};
            const float lower[4] = {at(z, pair, 1, 0), at(z, pair, 1, 1), at(z, pair, 1, 2), at(z, pair, 1, 3)};
            hand_on(place, upper, lower, pair);
        }
    }

    // The last layer, eight outputs at a time, by a warp for its own rows: results of the layer before are operands as they
    // lie, in two parts like the weights.
    DQL_DEVICE void narrow_sums(float (&z)[HP / 2]) {
        const int O = a.net.O;
        for (int o = 0; o < O; o += 8) {
            const int output = o + g() < O ? o + g() : O - 1;  // behind the last one that again
            const float* w_out = small_floats(a.net.X) + 16 * output;
            float sum[3][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 0, 0}};
            DQL_UNROLL
            for (int pair = 0; pair < PAIRS; ++pair) {
                const float4 w = load_floats(w_out + pair * O * 16);
                uint32_t high[4], low[4];
                DQL_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float first = at(z, pair, i % 2, i / 2 * 2), second = at(z, pair, i % 2, i / 2 * 2 + 1);
                    high[i] = bf16_pair(first, second);
                    low[i] = bf16_pair(first - as_float(high[i] << 16), second - as_float(high[i] & 0xffff0000u));
                }
                const uint32_t w_high[2] = {as_bits(w.x), as_bits(w.y)}, w_low[2] = {as_bits(w.z), as_bits(w.w)};
                mma_bf16(sum[0], high, w_high);
                mma_bf16(sum[1], high, w_low);
                mma_bf16(sum[2], low, w_high);
            }
            DQL_UNROLL
            for (int half = 0; half < 2; ++half)
                if (o + 2 * t() < O)
                    *reinterpret_cast<uint2*>(sums_at(row_of(half)) + o + 2 * t()) =
                        make_uint2(as_bits(sum[0][2 * half] + (sum[1][2 * half] + sum[2][2 * half])),
                                   as_bits(sum[0][2 * half + 1] + (sum[1][2 * half + 1] + sum[2][2 * half + 1])));
        }
    }

    // ---- the chain: the warp's 16 rows, a quad of a row's numbers by one lane ----

    DQL_DEVICE int64_t state_of(int row) const {  // behind the last row the last one's
        const int64_t r = row0() + row;
        return static_cast<int>(r < a.R ? r : a.R - 1) / a.N;
    }

    DQL_DEVICE void begin() {
        if constexpr (FIRST == FirstLayer::PRODUCT) put_states();
        for (int quad = lane(); quad < 4 * narrow; quad += 32) {
            const int row = quad / (narrow / 4), q = quad % (narrow / 4);
            float x[4] = {0, 0, 0, 0}, zero[4] = {0, 0, 0, 0};
            draw(a, x, row0() + row, q, 0);
            put_x(row, q, x);
            put(narrow_at(own, row) + 4 * q, zero);
        }
    }

    DQL_DEVICE void look_ahead(Ahead& ahead) const {
        const float* step = a.steps + k * STEP_STRIDE;
        ahead.step[0] = load_floats(step), ahead.step[1] = load_floats(step + 4);
        look_ahead(ahead.bias, ahead.noise, lane());
    }
    DQL_DEVICE void look_ahead(float (&bias)[4], float (&noise)[4], int quad) const {
        DQL_UNROLL
        for (int i = 0; i < 4; ++i) bias[i] = noise[i] = 0;
        if (quad >= 4 * narrow) return;
        const int row = quad / (narrow / 4), q = quad % (narrow / 4);
        read(bias, a.flat + a.net.out_bias, q, a.net.O);
        if (k + 1 < a.K) draw(a, noise, row0() + row, q, k + 1);
    }

    DQL_DEVICE void update(Ahead& ahead) {
        const Step step(ahead.step[0], ahead.step[1]);
        for (int quad = lane(); quad < 4 * narrow; quad += 32) {
            const int row = quad / (narrow / 4), q = quad % (narrow / 4);
            float sum[4], x[4], x0_before[4];
            get(sum, sums_at(row) + 4 * q);
            get(x, narrow_at(v, row) + 4 * q);
            get(x0_before, narrow_at(own, row) + 4 * q);
            const bool last = k + 1 == a.K;
            if (quad >= 32) look_ahead(ahead.bias, ahead.noise, quad);
            const Updated updated = chain_step(a, step, k, sum, ahead.bias, x, x0_before, ahead.noise);
            put(narrow_at(own, row) + 4 * q, updated.x0);
            put_x(row, q, updated.next);
            if (last && row0() + row < a.R) write_actions(a, row0() + row, q, updated.next);
        }
    }

    DQL_DEVICE void put_x(int row, int q, const float (&numbers)[4]) {
        float x[4];
        DQL_UNROLL
        for (int i = 0; i < 4; ++i) x[i] = 4 * q + i < a.net.X ? numbers[i] : 0;  // behind the last one there is anything
        put(narrow_at(v, row) + 4 * q, x);
        if constexpr (FIRST == FirstLayer::PRODUCT) {
            Parts parts[4];
            DQL_UNROLL
            for (int i = 0; i < 4; ++i) parts[i] = parts_of(x[i]);
            char* slab = first + q / 8 * INPUT_BYTES;
            const int place = wide_place(w % 4 * 16 + row, 4 * q % WIDE_SLAB);
            *reinterpret_cast<uint2*>(slab + place) =
                make_uint2(bf16_pair(parts[0].high, parts[1].high), bf16_pair(parts[2].high, parts[3].high));
            *reinterpret_cast<uint2*>(slab + (place ^ LOW)) =
                make_uint2(bf16_pair(parts[0].low, parts[1].low), bf16_pair(parts[2].low, parts[3].low));
        }
    }

    // The states behind x, a lane a number of each row. One that holds NaN or infinity becomes NaN in every column of the
    // product, and with it all that follows from that state: infinity alone might end as an action within the bounds.
    DQL_DEVICE void put_states() {
        for (int column = narrow + lane(); column < a.memory.slabs * WIDE_SLAB; column += 32) {
            const int j = column - narrow, place = column % WIDE_SLAB;
            char* slab = first + column / WIDE_SLAB * INPUT_BYTES;
            bool bad = false;
            DQL_UNROLL_BY_8
            for (int row = 0; row < 16; ++row) {
                float value = j < a.net.S ? a.states[state_of(row) * a.net.S + j] : 0;
                if (!(fabsf(value) < INFINITY)) value = NAN, bad = true;
                const Parts parts = parts_of(value);
                const uint32_t both = bf16_pair(parts.high, parts.low);
                const int at = wide_place(w % 4 * 16 + row, place);
                *reinterpret_cast<uint16_t*>(slab + at) = static_cast<uint16_t>(both);
                *reinterpret_cast<uint16_t*>(slab + (at ^ LOW)) = static_cast<uint16_t>(both >> 16);
            }
            if (bad && a.told != nullptr) *a.told = 1;
        }
    }

    const ChainArguments& a;
    char* memory;
    int w, group, narrow;
    Barrier *full, *empty;
    char *input, *first;
    float *v, *own;
    int k = 0, tile = 0;
};

template <int HP, FirstLayer FIRST>
DQL_KERNEL(WIDE_THREADS, 1) wide_chain_kernel(DQL_ARGUMENT ChainArguments arguments) {
    if constexpr (!HAS_WGMMA) return;
    WideChain<HP, FIRST>(arguments).run();
}

}  // namespace device
}  // namespace dql
