// The chain kernel for many rows, in bf16 on Hopper: 128 rows a block, weights streamed, products by wgmma.
//
// Two warp groups have 64 rows each and every column of them, so that they need nothing of each other but the weights'
// ring, which a third group fills by bulk copies of 64 numbers of k for all columns. While one group waits for the special
// function units with its activations, the other multiplies: the ring's depth is how far apart they may be. Inputs of a
// layer are overwritten by its results: they leave the accumulators when the product has been made.
//
// Forward without saving; everything else goes by chain.h.
#pragma once

#include "arithmetic.h"
#include "chain_arguments.h"
#include "launch.h"

namespace dql {
namespace device {

// FLOATS_IN_SHARED: the small layers' weights and the biases, where they fit.
template <int HP, bool FLOATS_IN_SHARED>
class WideChain {
    static constexpr int CHUNKS = HP / WIDE_CHUNK, CHUNK_BYTES = HP * WIDE_CHUNK * 2, PAIRS = HP / 16;
    static constexpr int ROWS = 64;                             // of a warp group
    static constexpr int INPUT_BYTES = ROWS * WIDE_CHUNK * 2;   // of a warp group's input, 64 numbers of k

public:
    DQL_DEVICE explicit WideChain(const ChainArguments& arguments)
        : a(arguments),
          memory(shared_memory()),
          w(warp()),
          group(w / 4),
          g(lane() / 4),
          t(lane() % 4),
          narrow(a.memory.narrow),
          full(reinterpret_cast<Barrier*>(memory + a.memory.barriers)),
          empty(full + WIDE_STAGES),
          input(memory + a.memory.h[0] + group * CHUNKS * INPUT_BYTES),
          v(floats_at(a.memory.v)),
          own(floats_at(a.memory.own)),
          sums(floats_at(a.memory.parts)) {}

    DQL_DEVICE void run() {
        if (thread() == 0) {
            for (int i = 0; i < WIDE_STAGES; ++i) {
                barrier_init(full + i);
                barrier_init(empty + i, 8);  // the warps of two groups
            }
            barriers_ready();
        }
        wait_for_previous();
        if constexpr (FLOATS_IN_SHARED)
            for (int i = 4 * thread(); i < (a.net.X + a.net.O + a.net.L - 1) * HP; i += 4 * WIDE_THREADS)
                *reinterpret_cast<float4*>(floats_at(a.memory.floats) + i) = load_floats(global_floats() + i);
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
        int stage = 0, turn = 0;
        for (int tile = block_x(); tile < a.tiles; tile += blocks_x())
            for (int k = 0; k < a.K; ++k)
                for (int chunk = 0; chunk < per_step; ++chunk) {
                    if (turn > 0) barrier_wait(empty + stage, (turn - 1) & 1);
                    barrier_expect(full + stage, CHUNK_BYTES);
                    bulk_copy(memory + a.memory.weights + stage * CHUNK_BYTES,
                              operands + static_cast<int64_t>(chunk) * CHUNK_BYTES, CHUNK_BYTES, full + stage);
                    next(stage, turn);
                }
    }

    DQL_DEVICE static void next(int& stage, int& turn) {
        if (++stage == WIDE_STAGES) stage = 0, ++turn;
    }

    // ---- the warp groups: a warp has 16 rows of its tile to itself, except that its products read a whole group's ----

    DQL_DEVICE void consume() {
        int stage = 0, turn = 0;
        for (int tile = block_x(); tile < a.tiles; tile += blocks_x()) {
            row0 = static_cast<int64_t>(tile) * 2 * ROWS + 16 * w;
            begin();
            for (k = 0; k < a.K; ++k) {
                sync_warp();  // v is written
                first_layer();
                float z[HP / 2];
                for (int layer = 1; layer < a.net.L; ++layer) {
                    fence_async();
                    sync_some(1 + group, 128);  // the group's inputs are written
                    product(z, stage, turn);
                    sync_some(1 + group, 128);  // and read
                    add_bias_and_activate(z, layer);
                    if (layer + 1 < a.net.L) hand_on(z);
                }
                narrow_sums(z);
                sync_warp();
                update();
            }
        }
    }

    DQL_DEVICE void product(float (&z)[HP / 2], int& stage, int& turn) {
        int before = 0;  // the stage of the chunk before
        DQL_UNROLL
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            barrier_wait(full + stage, turn & 1);
            const char* weights = memory + a.memory.weights + stage * CHUNK_BYTES;
            wgmma_begin();
            DQL_UNROLL
            for (int i = 0; i < WIDE_CHUNK / 16; ++i)
                wgmma_bf16(z, swizzled_operand(input + chunk * INPUT_BYTES + 32 * i), swizzled_operand(weights + 32 * i),
                           chunk + i > 0);
            wgmma_close();
            if (chunk > 0) {
                wgmma_wait<1>(z);
                if (lane() == 0) barrier_arrive(empty + before);
            }
            before = stage;
            next(stage, turn);
        }
        wgmma_wait<0>(z);
        if (lane() == 0) barrier_arrive(empty + before);
    }

    // z[8 pair + 4 n-tile + 2 half + e]: row g + 8 half of the warp's 16, column 16 pair + 4 t + 2 n-tile + e.
    DQL_DEVICE static float& at(float (&z)[HP / 2], int pair, int half, int i) {
        return z[8 * pair + i / 2 * 4 + 2 * half + i % 2];
    }
    DQL_DEVICE int row_of(int half) const { return 8 * half + g; }  // of the warp's
    DQL_DEVICE float* narrow_at(float* from, int row) const { return from + (w * 16 + row) * narrow; }
    // Row `row` of the packed floats, from this lane's columns on: those of pair p are 16 p further.
    DQL_DEVICE const float* small_floats(int row) const {
        return (FLOATS_IN_SHARED ? floats_at(a.memory.floats) : global_floats()) + row * HP + 4 * t;
    }
    DQL_DEVICE const float* global_floats() const {
        return reinterpret_cast<const float*>(a.floats + a.first_network * a.floats_apart);
    }

    // Four pairs at a time: all at once would need more registers than there are.
    DQL_DEVICE void first_layer() {
        const float* state[2];
        const float* time = a.time_table + static_cast<int64_t>(k) * HP + 4 * t;
        DQL_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int64_t row = row0 + row_of(half);
            const int index = static_cast<int>(row < a.R ? row : a.R - 1) / a.N;
            state[half] = a.state_part + static_cast<int64_t>(index) * HP + 4 * t;
        }
        float4 of_time[4], of_state[4][2];  // of the four pairs to come, on their way meanwhile
        const auto load = [&](int pair) {
            DQL_UNROLL
            for (int p = 0; p < 4; ++p) {
                of_time[p] = load_floats(time + 16 * (pair + p));
                DQL_UNROLL
                for (int half = 0; half < 2; ++half) of_state[p][half] = load_floats(state[half] + 16 * (pair + p));
            }
        };
        if (FLOATS_IN_SHARED) load(0);
        DQL_NO_UNROLL
        for (int pair = 0; pair < PAIRS; pair += 4) {
            if (!FLOATS_IN_SHARED) load(pair);
            float z[4][2][4];
            DQL_UNROLL
            for (int p = 0; p < 4; ++p)
                DQL_UNROLL
                for (int half = 0; half < 2; ++half) {
                    z[p][half][0] = of_state[p][half].x + of_time[p].x, z[p][half][1] = of_state[p][half].y + of_time[p].y;
                    z[p][half][2] = of_state[p][half].z + of_time[p].z, z[p][half][3] = of_state[p][half].w + of_time[p].w;
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
                        z[p][half][0] = fmaf(x[half], w_i.x, z[p][half][0]);
                        z[p][half][1] = fmaf(x[half], w_i.y, z[p][half][1]);
                        z[p][half][2] = fmaf(x[half], w_i.z, z[p][half][2]);
                        z[p][half][3] = fmaf(x[half], w_i.w, z[p][half][3]);
                    }
                }
            }
            DQL_UNROLL
            for (int p = 0; p < 4; ++p)
                DQL_UNROLL
                for (int half = 0; half < 2; ++half) {
                    activate_all(z[p][half], a.net.activation);
                    hand_on(z[p][half], pair + p, half);
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

    DQL_DEVICE void add_bias_and_activate(float (&z)[HP / 2], int layer) {
        add(z, small_floats(a.net.X + a.net.O + layer - 1));
        activate_all(z, a.net.activation);
    }

    // Four columns of a row into the next product's input, swizzled.
    DQL_DEVICE void hand_on(const float (&four)[4], int pair, int half) {
        const int row = w % 4 * 16 + row_of(half), column = 16 * pair + 4 * t;
        char* chunk = input + column / WIDE_CHUNK * INPUT_BYTES;
        *reinterpret_cast<uint2*>(chunk + wide_place(row, column % WIDE_CHUNK)) =
            make_uint2(bf16_pair(four[0], four[1]), bf16_pair(four[2], four[3]));
    }

    DQL_DEVICE void hand_on(float (&z)[HP / 2]) {
        DQL_UNROLL
        for (int pair = 0; pair < PAIRS; ++pair)
            DQL_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float four[4] = {at(z, pair, half, 0), at(z, pair, half, 1), at(z, pair, half, 2),
                                       at(z, pair, half, 3)};
                hand_on(four, pair, half);
            }
    }

    // Two outputs at a time: four sums that do not wait for each other are as many as a scheduler can add to without a
    // pause, and half as many shuffles.
    DQL_DEVICE void narrow_sums(float (&z)[HP / 2]) {
        for (int o = 0; o < a.net.O; o += 2) {
            const float* w_out = small_floats(a.net.X + o);
            const int next = o + 1 < a.net.O ? HP : 0;  // behind the last output its weights again
            float sum[2][2] = {{0, 0}, {0, 0}};         // [half][output]
            DQL_UNROLL
            for (int pair = 0; pair < PAIRS; ++pair) {
                if (pair % 4 == 0) sync_warp();
                DQL_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const float4 w = load_floats(w_out + i * next + 16 * pair);
                    DQL_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        sum[half][i] = fmaf(at(z, pair, half, 0), w.x, sum[half][i]);
                        sum[half][i] = fmaf(at(z, pair, half, 1), w.y, sum[half][i]);
                        sum[half][i] = fmaf(at(z, pair, half, 2), w.z, sum[half][i]);
                        sum[half][i] = fmaf(at(z, pair, half, 3), w.w, sum[half][i]);
                    }
                }
            }
            DQL_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float both = summed_over_quad(sum[half]);
                if (t < 2 && o + t < a.net.O) narrow_at(sums, row_of(half))[o + t] = both;
            }
        }
    }

    // ---- the chain: the warp's 16 rows, a quad of a row's numbers by one lane ----

    DQL_DEVICE void begin() {
        for (int quad = lane(); quad < 4 * narrow; quad += 32) {
            const int row = quad / (narrow / 4), q = quad % (narrow / 4);
            float x[4] = {0, 0, 0, 0}, zero[4] = {0, 0, 0, 0};
            draw(a, x, row0 + row, q, 0);
            put(narrow_at(v, row) + 4 * q, x);
            put(narrow_at(own, row) + 4 * q, zero);
            put(narrow_at(sums, row) + 4 * q, zero);
        }
    }

    DQL_DEVICE void update() {
        const Step step(a.steps + k * STEP_STRIDE);
        for (int quad = lane(); quad < 4 * narrow; quad += 32) {
            const int row = quad / (narrow / 4), q = quad % (narrow / 4);
            float sum[4], x[4], x0_before[4], noise[4] = {0, 0, 0, 0};
            get(sum, narrow_at(sums, row) + 4 * q);
            get(x, narrow_at(v, row) + 4 * q);
            get(x0_before, narrow_at(own, row) + 4 * q);
            const bool last = k + 1 == a.K;
            if (!last) draw(a, noise, row0 + row, q, k + 1);
            float bias[4] = {0, 0, 0, 0};
            read(bias, a.flat + a.net.out_bias, q, a.net.O);
            const Updated updated = chain_step(a, step, k, sum, bias, x, x0_before, noise);
            put(narrow_at(own, row) + 4 * q, updated.x0);
            put(narrow_at(v, row) + 4 * q, updated.next);
            if (last && row0 + row < a.R) write_actions(a, row0 + row, q, updated.next);
        }
    }

    const ChainArguments& a;
    char* memory;
    int w, group, g, t, narrow;  // of this lane: warp, warp group, row and quarter of fragments
    Barrier *full, *empty;
    char* input;
    float *v, *own, *sums;
    int k = 0;
    int64_t row0 = 0;  // of the warp
};

template <int HP, bool FLOATS_IN_SHARED>
DQL_KERNEL(WIDE_THREADS, 1) wide_chain_kernel(DQL_ARGUMENT ChainArguments arguments) {
    if constexpr (!HAS_WGMMA) return;
    WideChain<HP, FLOATS_IN_SHARED>(arguments).run();
}

}  // namespace device
}  // namespace dql
