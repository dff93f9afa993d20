// The chain kernel: K steps through an MLP for a tile of rows, forward or backward, a denoiser or critics (K = 1).
//
// A cluster of C blocks takes a tile. Each block has NS = HP / C columns of every hidden layer: it multiplies the whole
// input, which all blocks have, with its slice of the weights, applies bias and activation in registers and sends the
// result to every block's shared memory. The last layer's narrow result is summed over the block's columns and these
// sums are exchanged instead; the chain itself is then updated by every block for itself, with the same bits. So a step
// exchanges L times, and an exchange is one trip: a store carries its own notice (device.h, send16), and nobody waits
// for anything but the data.
//
//     forward     x -> h_1 -> ... -> h_L -> eps -> x             narrow in: x, narrow out: eps
//     backward    d_eps -> d_z_L -> ... -> d_z_1 -> d_x          narrow in: d_eps, narrow out: d_x
//
// Why no further barrier between blocks is needed: an exchange's bytes go to the one of two buffers that the exchange
// before last filled. A block sends bytes of exchange n + 1 when it has all of exchange n, so every block has sent all
// of its part of n; and a block's warps send parts of n after they have read exchange n - 1, the last reader of the
// buffer that n + 1 fills. The narrow sums have a buffer of their own, and between two of their exchanges lies at least
// one of the others.
#pragma once

#include <type_traits>

#include "arithmetic.h"
#include "chain_arguments.h"
#include "launch.h"
#include "product.h"

namespace dql {
namespace device {

// Four neighbours of a row as operands: 8 bytes of bf16, 16 of float32.
template <Precision P>
struct Operands {
    using Type = uint4;
    DQL_DEVICE static Type of(const float (&v)[4]) {
        if constexpr (P == Precision::TF32) return make_uint4(tf32(v[0]), tf32(v[1]), tf32(v[2]), tf32(v[3]));
        return make_uint4(as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3]));
    }
    DQL_DEVICE static void load(float (&v)[4], const Type& x) {
        v[0] = as_float(x.x), v[1] = as_float(x.y), v[2] = as_float(x.z), v[3] = as_float(x.w);
    }
    DQL_DEVICE static void send(Peer peer, int to, const Type& value, int barrier) { send16(peer, to, value, barrier); }
};
template <>
struct Operands<Precision::BF16> {
    using Type = uint2;
    DQL_DEVICE static Type of(const float (&v)[4]) { return make_uint2(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3])); }
    DQL_DEVICE static void load(float (&v)[4], const Type& x) {
        v[0] = as_float(x.x << 16), v[1] = as_float(x.x & 0xffff0000u);
        v[2] = as_float(x.y << 16), v[3] = as_float(x.y & 0xffff0000u);
    }
    DQL_DEVICE static void send(Peer peer, int to, const Type& value, int barrier) { send8(peer, to, value, barrier); }
};

// What a kernel with resident weights has in place of the stream.
struct NoStream {
    template <class... Anything>
    DQL_DEVICE explicit NoStream(Anything...) {}
};

template <Precision P, int MT, bool RESIDENT, bool BACKWARD>
class Chain {
    static constexpr int M = 16 * MT;
    static constexpr int ELEMENT = element_bytes(P);
    using Operand = typename Operands<P>::Type;
    using Stream = typename std::conditional<RESIDENT, NoStream, WeightStream>::type;

public:
    DQL_DEVICE explicit Chain(const ChainArguments& arguments)
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

    DQL_DEVICE void run() {
        prepare();
        Stream stream(global_operands(), memory + a.memory.weights, a.division, w, a.groups, a.net.L - 1, BACKWARD);
        for (int tile = block_x() / blocks; tile < a.tiles; tile += blocks_x() / blocks) {
            row0 = static_cast<int64_t>(tile) * M;
            begin();
            for (int i = 0; i < a.K; ++i) {
                k = BACKWARD ? a.K - 1 - i : i;
                step(stream);
            }
        }
        if constexpr (RESIDENT)
            sync_cluster();  // nobody leaves while others might look for its memory
        else
            stream.finish();
    }

private:
    DQL_DEVICE float* floats_at(int offset) const { return reinterpret_cast<float*>(memory + offset); }
    DQL_DEVICE const char* global_operands() const {
        return a.operands + (a.first_network + network) * a.operands_apart +
               static_cast<int64_t>(rank) * a.operand_bytes;
    }
    DQL_DEVICE const char* global_floats() const {
        return a.floats + (a.first_network + network) * a.floats_apart + static_cast<int64_t>(rank) * a.floats_bytes;
    }

    // ---- once a block ----

    DQL_DEVICE void prepare() {
        // What no row or action fills is multiplied with zero weights, or never stored, but should be some number.
        for (int i = thread(); i < (a.memory.bytes - a.memory.v) / 4; i += THREADS) v[i] = 0;
        if constexpr (RESIDENT) {  // whatever needs nothing of the kernel before comes before the wait for it
            if (thread() == 0) {
                for (int i = 0; i < 4; ++i) barrier_init(barriers + i);
                barriers_ready();
                barrier_expect(barriers, static_cast<uint32_t>(a.operand_bytes + a.floats_bytes));
                if (blocks > 1) {
                    barrier_expect(barriers + 1, static_cast<uint32_t>(M * a.HP * ELEMENT));
                    barrier_expect(barriers + 2, static_cast<uint32_t>(M * a.HP * ELEMENT));
                    barrier_expect(barriers + 3, static_cast<uint32_t>(blocks * M * narrow * 4));
                }
            }
            sync_cluster();
            wait_for_previous();
            if (thread() == 0) {
                const int layer_bytes = a.operand_bytes / (a.net.L - 1);
                for (int at = 0; at < a.operand_bytes; at += layer_bytes)
                    bulk_copy(memory + a.memory.weights + at, global_operands() + at,
                              static_cast<uint32_t>(layer_bytes), barriers);
                bulk_copy(memory + a.memory.floats, global_floats(), static_cast<uint32_t>(a.floats_bytes), barriers);
            }
            barrier_wait(barriers, 0);
        } else {
            wait_for_previous();
            sync_block();
        }
    }

    // ---- activations between layers ----

    // Hands four columns of a row to every block, as the input of the next layer.
    DQL_DEVICE void hand_on(int row, int column, const Operand& value) {
        const int to = a.memory.h[turn & 1] + row * a.memory.row_bytes + (rank * a.NS + column) * ELEMENT;
        if (RESIDENT && blocks > 1) {
            const int barrier = a.memory.barriers + 8 * (1 + (turn & 1));
            DQL_UNROLL
            for (int i = 0; i < MAX_CLUSTER; ++i)
                if (i < blocks) Operands<P>::send(peers[i], to, value, barrier);
        } else {
            *reinterpret_cast<Operand*>(memory + to) = value;
        }
    }

    // Until all blocks' columns are here; returns where.
    DQL_DEVICE const char* receive() {
        const int buffer = turn & 1;
        if (RESIDENT && blocks > 1) {
            barrier_wait_for_peers(barriers + 1 + buffer, turn >> 1 & 1);
            if (thread() == 0)  // for the exchange after next
                barrier_expect(barriers + 1 + buffer, static_cast<uint32_t>(M * a.HP * ELEMENT));
            if (a.division.split == 1 && a.division.idle) sync_block();
        } else {
            sync_block();
        }
        ++turn;
        return memory + a.memory.h[buffer];
    }

    // ---- one step ----

    DQL_DEVICE int64_t saved_at(int layer, int row, int column) const {
        const int64_t plane = (static_cast<int64_t>(network) * a.net.L + layer) * a.K + k;
        return ((plane * a.RP + row0 + row) * a.HP + rank * a.NS + column) * ELEMENT;
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

    DQL_DEVICE void load_slopes(Operand (&slope)[MT][2], int layer, int pair) const {
        DQL_UNROLL
        for (int m = 0; m < MT; ++m)
            DQL_UNROLL
            for (int half = 0; half < 2; ++half)
                if (halves >> half & 1)
                    slope[m][half] = *reinterpret_cast<const Operand*>(
                        a.slope + saved_at(layer, row_of(m, half), column_of(pair)));
    }

    // Activates (forward) or multiplies with the slopes (backward), saves, and hands on, unless the layer is the last.
    DQL_DEVICE void finish_layer(float (&z)[MT][2][4], const Operand (&slope)[MT][2], int layer, int pair, bool last) {
        DQL_UNROLL
        for (int m = 0; m < MT; ++m)
            DQL_UNROLL
            for (int half = 0; half < 2; ++half) {
                if (!(halves >> half & 1)) continue;
                const int row = row_of(m, half), column = column_of(pair);
                float(&four)[4] = z[m][half];
                if constexpr (BACKWARD) {
                    float by[4];
                    Operands<P>::load(by, slope[m][half]);
                    DQL_UNROLL
                    for (int i = 0; i < 4; ++i) four[i] *= by[i];
                    const Operand value = Operands<P>::of(four);
                    *reinterpret_cast<Operand*>(a.d_z + saved_at(layer, row, column)) = value;
                    if (!last) hand_on(row, column, value);
                } else if (a.h != nullptr) {
                    float slopes[4];
                    activate_all_with_slope(four, slopes, a.net.activation);
                    const Operand value = Operands<P>::of(four);
                    *reinterpret_cast<Operand*>(a.h + saved_at(layer, row, column)) = value;
                    *reinterpret_cast<Operand*>(a.slope + saved_at(layer, row, column)) = Operands<P>::of(slopes);
                    if (!last) hand_on(row, column, value);
                } else {
                    activate_all(four, a.net.activation);
                    if (!last) hand_on(row, column, Operands<P>::of(four));
                }
            }
    }

    // From the narrow input to the first layer's slice.
    DQL_DEVICE void first_layer() {
        const int layer = BACKWARD ? a.net.L - 1 : 0;
        for (int pass = 0; pass < a.division.passes; ++pass) {
            const int pair = first_pair + WARPS * pass;
            if (pair >= a.division.pairs || halves == 0) break;
            float z[MT][2][4];
            Operand slope[MT][2];
            if constexpr (BACKWARD) {
                load_slopes(slope, layer, pair);
            } else if (pass > 0) {
                load_base(base, pair, k);
            }
            DQL_UNROLL
            for (int m = 0; m < MT; ++m)
                DQL_UNROLL
                for (int half = 0; half < 2; ++half) {
                    float4 start = make_float4(0, 0, 0, 0);
                    if constexpr (!BACKWARD) {
                        start = base.state[m][half];
                        if (!critic)
                            start.x += base.time.x, start.y += base.time.y, start.z += base.time.z,
                                start.w += base.time.w;
                    }
                    z[m][half][0] = start.x, z[m][half][1] = start.y, z[m][half][2] = start.z, z[m][half][3] = start.w;
                }
            for (int i = 0; i < in; ++i) {
                const float4 w_i = load_floats(w_in + i * a.NS + column_of(pair));
                DQL_UNROLL
                for (int m = 0; m < MT; ++m)
                    DQL_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        const float x = v[row_of(m, half) * narrow + i];
                        z[m][half][0] = fmaf(x, w_i.x, z[m][half][0]);
                        z[m][half][1] = fmaf(x, w_i.y, z[m][half][1]);
                        z[m][half][2] = fmaf(x, w_i.z, z[m][half][2]);
                        z[m][half][3] = fmaf(x, w_i.w, z[m][half][3]);
                    }
            }
            finish_layer(z, slope, layer, pair, false);
        }
    }

    // Sums of the last layer's columns, times the narrow weights, over one n-pair; a warp adds up its own pairs. Four
    // outputs at a time, a lane of the quad keeps one of them: one after the other would wait for each one's shuffles.
    DQL_DEVICE void narrow_part(const float (&z)[MT][2][4], int pair, int pass) {
        float* part = parts() + pair % WARPS * (M * narrow) + t;
        for (int o = 0; o < out; o += 4) {
            float4 w_o[4];
            DQL_UNROLL
            for (int i = 0; i < 4; ++i)  // behind the last output its weights again: a sum that nobody asks for
                w_o[i] = load_floats(w_out + (o + i < out ? o + i : out - 1) * a.NS + column_of(pair));
            DQL_UNROLL
            for (int m = 0; m < MT; ++m)
                DQL_UNROLL
                for (int half = 0; half < 2; ++half) {
                    if (!(halves >> half & 1)) continue;
                    const float(&four)[4] = z[m][half];
                    float sums[4];
                    DQL_UNROLL
                    for (int i = 0; i < 4; ++i)
                        sums[i] = four[0] * w_o[i].x + four[1] * w_o[i].y + four[2] * w_o[i].z + four[3] * w_o[i].w;
                    const float sum = summed_over_quad(sums);
                    float* at = part + row_of(m, half) * narrow + o;
                    *at = pass > 0 ? *at + sum : sum;
                }
        }
    }

    // One hidden layer's product; `layer` is the one whose activations (or d_z) it gives.
    DQL_DEVICE void hidden_layer(Stream& stream, int layer, bool last) {
        const int matrix = BACKWARD ? layer : layer - 1;
        const char* h = nullptr;
        for (int pass = 0; pass < a.division.passes; ++pass) {
            const int pair = first_pair + WARPS * pass;
            const bool nothing = pair >= a.division.pairs;
            Operand slope[MT][2];
            if constexpr (BACKWARD) {
                if (!nothing) load_slopes(slope, layer, pair);
            }
            if (pass == 0) h = receive();
            if (nothing && a.division.split == 1) break;
            float z[MT][2][4];
            float4 bias = make_float4(0, 0, 0, 0);
            if constexpr (!BACKWARD) {
                if (!nothing) bias = load_floats(floats + (a.net.X + a.net.O + layer - 1) * a.NS + column_of(pair));
            }
            if constexpr (RESIDENT) {
                const int tile_bytes = a.groups * FRAGMENT_BYTES;
                ResidentWeights weights = {
                    memory + a.memory.weights + (matrix * a.division.pairs + pair) * 2 * tile_bytes + lane() * 16,
                    tile_bytes};
                float* sums = floats_at(a.memory.sums + (turn & 1) * a.memory.sums_apart);
                product<P, MT>(z, sums, h, a.memory.row_bytes, weights, share, w, nothing);
            } else {
                product<P, MT>(z, floats_at(a.memory.sums), h, a.memory.row_bytes, stream, share, w, nothing);
            }
            if (halves == 0) break;
            if constexpr (!BACKWARD) {
                DQL_UNROLL
                for (int m = 0; m < MT; ++m)
                    DQL_UNROLL
                    for (int half = 0; half < 2; ++half)
                        z[m][half][0] += bias.x, z[m][half][1] += bias.y, z[m][half][2] += bias.z,
                            z[m][half][3] += bias.w;
            }
            finish_layer(z, slope, layer, pair, last);
            if (last && sums_wanted()) narrow_part(z, pair, pass);
        }
    }

    // In the last turn of a backward chain nobody asks for the gradient of x_T, the noise; of a critic the caller may.
    DQL_DEVICE bool sums_wanted() const { return !BACKWARD || (critic ? a.d_actions != nullptr : k > 0); }

    DQL_DEVICE void step(Stream& stream) {
        sync_block();  // v is written
        first_layer();
        if (draws() && others_draw() && halves == 0 && !idle) {
            const int spare = a.division.split - 2;  // warps of each pair
            const int nth = w / a.division.split * spare + w % a.division.split - 2;
            draw_next(nth * 32 + lane(), a.division.pairs * spare * 32);
        }
        for (int i = 1; i < a.net.L; ++i) hidden_layer(stream, BACKWARD ? a.net.L - 1 - i : i, i == a.net.L - 1);
        if (!sums_wanted()) return;
        sync_block();  // the parts are written
        if (RESIDENT && blocks > 1) send_sums();
        update();
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

template <Precision P, int MT, bool RESIDENT, bool BACKWARD>
DQL_KERNEL(THREADS, 1) chain_kernel(DQL_ARGUMENT ChainArguments arguments) {
    if constexpr (RESIDENT && !HAS_CLUSTERS) return;
    Chain<P, MT, RESIDENT, BACKWARD>(arguments).run();
}

}  // namespace device
}  // namespace dql
