// The chain kernel: K steps through an MLP for a tile of rows, forward or backward, a denoiser or critics (K = 1).
//
// A cluster of C blocks takes a tile. Each block has NS = HP / C columns of every hidden layer: it multiplies the whole
// input, which all blocks have, with its slice of the weights, applies bias and activation in registers and sends the
// result to every block's shared memory. The last layer's narrow result is summed over the block's columns and these
// sums are exchanged instead; the chain itself is then updated by every block for itself, with the same bits. So a step
// exchanges L times, and an exchange is one trip: a store carries its own notice (device.h, send16), and nobody waits
// for anything but the data.
//
// A batch may be cloned beside a chain (host.h, Cloning): its tiles are behind the chain's and have one step, number K.
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

#include "chain_state.h"

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
class Chain : ChainState<MT, RESIDENT, BACKWARD> {
    using State = ChainState<MT, RESIDENT, BACKWARD>;
    using typename State::Base;
    using State::M, State::a, State::memory, State::blocks, State::rank, State::network, State::w, State::g, State::t;
    using State::first_pair, State::share, State::narrow, State::in, State::out, State::critic, State::idle;
    using State::peers, State::halves, State::floats, State::w_in, State::w_out, State::barriers, State::v, State::base;
    using State::turn, State::k, State::row0, State::live_rows, State::sums_bytes;
    using State::floats_at, State::global_floats, State::row_of, State::column_of, State::load_base, State::parts;
    using State::draws, State::others_draw, State::draw_next, State::begin, State::send_sums, State::update;

    static constexpr int ELEMENT = element_bytes(P);
    using Operand = typename Operands<P>::Type;
    using Stream = typename std::conditional<RESIDENT, NoStream, WeightStream>::type;

public:
    DQL_DEVICE explicit Chain(const ChainArguments& arguments) : State(arguments) {}

    DQL_DEVICE void run() {
        prepare();
        Stream stream(global_operands(), memory + a.memory.weights, a.division, w, a.groups, a.net.L - 1, BACKWARD);
        for (int tile = block_x() / blocks; tile < a.tiles; tile += blocks_x() / blocks) {
            const bool cloned = tile >= a.chain_tiles;
            row0 = static_cast<int64_t>(cloned ? tile - a.chain_tiles : tile) * M;
            k = cloned ? a.K : BACKWARD ? a.K - 1 : 0;
            begin();
            if (RESIDENT && tile == block_x() / blocks) barrier_wait(barriers, 0);  // the weights are here
            for (int i = cloned ? 1 : a.K; i > 0; --i) {
                step(stream);
                k += BACKWARD ? -1 : 1;
            }
        }
        if constexpr (RESIDENT)
            leave_cluster();
        else
            stream.finish();
    }

private:
    DQL_DEVICE const char* global_operands() const {
        return a.operands + (a.first_network + network) * a.operands_apart +
               static_cast<int64_t>(rank) * a.operand_bytes;
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
                    barrier_expect(barriers + 1, exchanged_bytes());
                    barrier_expect(barriers + 2, exchanged_bytes());
                    barrier_expect(barriers + 3, sums_bytes());
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
        } else {
            wait_for_previous();
            sync_block();
        }
    }

    // ---- activations between layers ----

    DQL_DEVICE uint32_t exchanged_bytes() const { return static_cast<uint32_t>(live_rows * a.HP * ELEMENT); }

    // Hands four columns of a row to every block, as the input of the next layer.
    DQL_DEVICE void hand_on(int row, int column, const Operand& value) {
        const int to = a.memory.h[turn & 1] + row * a.memory.row_bytes + (rank * a.NS + column) * ELEMENT;
        if (RESIDENT && blocks > 1) {
            const int barrier = a.memory.barriers + 8 * (1 + (turn & 1));
            if (row >= live_rows) return;
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
                barrier_expect(barriers + 1 + buffer, exchanged_bytes());
            if (a.division.split == 1 && a.division.idle) sync_block();
        } else {
            sync_block();
        }
        ++turn;
        return memory + a.memory.h[buffer];
    }

    // ---- one step ----

    DQL_DEVICE int64_t saved_at(int layer, int row, int column) const {
        const int64_t plane = (static_cast<int64_t>(network) * a.net.L + layer) * a.planes + k;
        return ((plane * a.RP + row0 + row) * a.HP + rank * a.NS + column) * ELEMENT;
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
                product<P, MT>(z, sums, h, a.memory.row_bytes, weights, share, w, nothing, live_rows);
            } else {
                product<P, MT>(z, floats_at(a.memory.sums), h, a.memory.row_bytes, stream, share, w, nothing, live_rows);
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

    // In the last turn of a backward chain nobody asks for the gradient of x_T, the noise, nor for that of a cloned
    // row's x; of a critic the caller may.
    DQL_DEVICE bool sums_wanted() const { return !BACKWARD || (critic ? a.d_actions != nullptr : k > 0 && k < a.K); }

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

};

template <Precision P, int MT, bool RESIDENT, bool BACKWARD>
DQL_KERNEL(THREADS, 1) chain_kernel(DQL_ARGUMENT ChainArguments arguments) {
    if constexpr (RESIDENT && !HAS_CLUSTERS) return;
    if constexpr (BACKWARD) {  // nobody asks for this critic
        if (arguments.only_at != nullptr ? arguments.only_at[block_y()] == 0
                                         : arguments.only > 0 && arguments.only != 1 + block_y())
            return;
    }
    Chain<P, MT, RESIDENT, BACKWARD>(arguments).run();
}

}  // namespace device
}  // namespace dql
