// What a chain needs before it starts, in one launch: packed weights, the time table, the states' part (shapes.h,
// Packed). Everything depends on parameters and states alone, nothing on another part: each block does one piece.
#include "arithmetic.h"
#include "launch.h"
#include "small_layer.h"

namespace dql {
namespace device {

constexpr int STATES_A_BLOCK = 16, STATE_CHUNK = 32;

// Blocks of each part, in this order. All that is divided fits 32 bits, in which that is several times faster.
struct PrologueArguments {
    cuda::PrologueJob job;
    Packed places;
    Slices slices;
    int chunks = 0;  // of 16 bytes: all operands
    int floats = 0;
    int operand_blocks = 0, first_blocks = 0, float_blocks = 0, time_blocks = 0, state_blocks = 0;
};

// Column and first k of the 16 bytes number `chunk` of one block's layer: the inverse of operand_index.
struct Place {
    int column, k;
};
DQL_HOST_DEVICE Place place_of(const Slices& s, int chunk) {
    const int per_lane = 16 / s.element;
    if (s.wide) {
        const int row = chunk / 8 % s.HP, piece = chunk % 8, kc = chunk / 8 / s.HP;
        const int k = kc * WIDE_CHUNK + (piece ^ row % 8) * 8;  // as it is stored
        return {row / 16 * 16 + output_column(row / 8 % 2, row % 8), k / 16 * 16 + output_column(k / 8 % 2, 0)};
    }
    const int lane = chunk % 32, group = chunk / 32 % s.groups, tile = chunk / 32 / s.groups;
    return {tile / 2 * 16 + output_column(tile % 2, lane / 4), (group * 4 + lane % 4) * per_lane};
}
// The k of number i of those 16 bytes.
DQL_HOST_DEVICE int k_of(const Slices& s, const Place& place, int i) {
    return place.k + (s.wide ? output_column(0, i) : i);
}

class Prologue {
public:
    DQL_DEVICE explicit Prologue(const PrologueArguments& arguments)
        : a(arguments), job(a.job), net(job.net), s(a.slices) {}

    DQL_DEVICE void run() {
        let_next_start();
        int block = block_x();
        if (job.counter != nullptr && block == 0 && thread() == 0) *job.counter = 0;
        if (block < a.operand_blocks) {
            operands(block * THREADS + thread());
        } else if ((block -= a.operand_blocks) < a.first_blocks) {
            first_layer(block * THREADS + thread());
        } else if ((block -= a.first_blocks) < a.float_blocks) {
            floats(block * THREADS + thread());
        } else if ((block -= a.float_blocks) < a.time_blocks) {
            time(block);
        } else {
            block -= a.time_blocks;
            states(static_cast<int64_t>(block % a.state_blocks) * STATES_A_BLOCK, block / a.state_blocks);
        }
    }

private:
    DQL_DEVICE void operands(int chunk) {
        if (chunk >= a.chunks) return;
        const int per_layer = static_cast<int>(s.layer_bytes() / 16), layers = s.L - 1;
        const Place place = place_of(s, chunk % per_layer);
        int rest = chunk / per_layer;
        const int layer = rest % layers;
        rest /= layers;
        const int rank = rest % job.tiling.cluster;
        rest /= job.tiling.cluster;
        const int directions = job.transposed ? 2 : 1, turned = rest % directions;
        const int64_t network = rest / directions;
        const float* weight = job.flat + net.hidden[layer] + network * net.apart;
        const int column = rank * s.NS + place.column, per_lane = 16 / s.element;
        // Forward, a row of the weight is a column of the product, and its numbers lie side by side.
        const int64_t column_stride = turned ? 1 : net.H, k_stride = turned ? net.H : 1;
        float numbers[8];
        DQL_UNROLL
        for (int i = 0; i < 8; ++i) {
            numbers[i] = 0;
            const int k = k_of(s, place, i);
            if (i < per_lane && column < net.H && k < net.H) numbers[i] = weight[column * column_stride + k * k_stride];
        }
        uint4 packed;
        if (job.tiling.precision == Precision::BF16)
            packed = make_uint4(bf16_pair(numbers[0], numbers[1]), bf16_pair(numbers[2], numbers[3]),
                                bf16_pair(numbers[4], numbers[5]), bf16_pair(numbers[6], numbers[7]));
        else if (job.tiling.precision == Precision::TF32)
            packed = make_uint4(tf32(numbers[0]), tf32(numbers[1]), tf32(numbers[2]), tf32(numbers[3]));
        else
            packed = make_uint4(as_bits(numbers[0]), as_bits(numbers[1]), as_bits(numbers[2]), as_bits(numbers[3]));
        reinterpret_cast<uint4*>(job.packed + a.places.operands)[chunk] = packed;
    }

    // 16 bytes of the first layer's slabs: of eight numbers the high parts, or the low ones.
    DQL_DEVICE void first_layer(int chunk) {
        const int row = chunk / 8 % s.HP, piece = chunk % 8 ^ row % 8, narrow = narrow_width(net);
        const int column = row / 16 * 16 + output_column(row / 8 % 2, row % 8);
        const float* weight = job.flat + net.first + static_cast<int64_t>(column) * net.stride;
        float part[8];
        DQL_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int from = chunk / 8 / s.HP * WIDE_SLAB + piece % 4 * 8 + i;
            float number = 0;
            if (column < net.H && from < net.X) number = weight[net.x_column + from];
            if (column < net.H && from >= narrow && from < narrow + net.S)
                number = weight[net.state_column + from - narrow];
            const Parts parts = parts_of(number);
            part[i] = piece < 4 ? parts.high : parts.low;
        }
        reinterpret_cast<uint4*>(job.packed + a.places.first)[chunk] =
            make_uint4(bf16_pair(part[0], part[1]), bf16_pair(part[2], part[3]), bf16_pair(part[4], part[5]),
                       bf16_pair(part[6], part[7]));
    }

    DQL_DEVICE void floats(int i) {
        if (i >= a.floats) return;
        int rest = i / s.NS;
        const int rows = s.X + s.O + s.L - 1, row = rest % rows;
        rest /= rows;
        const int column = rest % job.tiling.cluster * s.NS + i % s.NS;
        const float* flat = job.flat + rest / job.tiling.cluster * net.apart;
        reinterpret_cast<float*>(job.packed + a.places.floats)[i] =
            s.wide && row >= s.X && row < s.X + s.O
                ? narrow_word(flat, narrow_place(s.O, (row - s.X) * s.NS + i % s.NS))
                : small_float(net, flat, row, column);
    }

    DQL_DEVICE float narrow_word(const float* flat, const NarrowPlace& place) const {
        const float* weight = flat + net.out + static_cast<int64_t>(place.output) * net.H;
        float part[2];
        DQL_UNROLL
        for (int i = 0; i < 2; ++i) {
            const Parts parts = parts_of(place.column + i < net.H ? weight[place.column + i] : 0);
            part[i] = place.low ? parts.low : parts.high;
        }
        return as_float(bf16_pair(part[0], part[1]));
    }

    // One step's row of the table.
    DQL_DEVICE void time(int k) {
        float* hidden = reinterpret_cast<float*>(shared_memory());  // [2 D]
        float* features = hidden + 2 * MAX_NARROW;                  // [D]
        const int D = net.D;
        const float* embedding = job.embedding + static_cast<int64_t>(k) * D;
        small_layer(hidden, job.flat + net.time_w1, D, 1, job.flat + net.time_b1, embedding, 2 * D, D);
        for (int i = thread(); i < 2 * D; i += THREADS) hidden[i] = activate(hidden[i], net.activation);
        sync_block();
        small_layer(features, job.flat + net.time_w3, 2 * D, 1, job.flat + net.time_b3, hidden, D, 2 * D);
        float* row = reinterpret_cast<float*>(job.packed + a.places.time_table) + static_cast<int64_t>(k) * s.HP;
        for (int column = thread(); column < s.HP; column += THREADS) {
            float sum = 0;
            if (column < net.H) {
                const float* weight = job.flat + net.first + static_cast<int64_t>(column) * net.stride + net.time_column;
                sum = job.flat[net.first_bias + column];
                DQL_UNROLL_BY_8
                for (int d = 0; d < D; ++d) sum = fmaf(weight[d], features[d], sum);
            }
            row[column] = sum;
        }
    }

    // STATES_A_BLOCK states from `first` on, every column. Of a state that holds NaN or infinity every column is NaN, and
    // with it all that follows from that state: infinity alone might end as an action within the bounds.
    DQL_DEVICE void states(int64_t first, int network) {
        float* chunk = reinterpret_cast<float*>(shared_memory());  // [STATE_CHUNK][STATES_A_BLOCK]
        int* bad = reinterpret_cast<int*>(chunk + STATE_CHUNK * STATES_A_BLOCK);  // [STATES_A_BLOCK]
        if (thread() < STATES_A_BLOCK) bad[thread()] = 0;
        const int S = net.S;
        float* out = reinterpret_cast<float*>(job.packed + a.places.state_part) + network * job.B * s.HP;
        for (int start = 0; start < s.HP; start += THREADS) {
            const int column = start + thread();
            const bool real = column < net.H;
            const float* weight = job.flat + net.first + network * net.apart +
                                  static_cast<int64_t>(real ? column : 0) * net.stride + net.state_column;
            const float bias = real && net.D == 0 ? job.flat[net.first_bias + network * net.apart + column] : 0;
            float sums[STATES_A_BLOCK];
            DQL_UNROLL
            for (int b = 0; b < STATES_A_BLOCK; ++b) sums[b] = bias;
            for (int at = 0; at < S; at += STATE_CHUNK) {
                sync_block();  // the chunk before is read
                for (int i = thread(); i < STATE_CHUNK * STATES_A_BLOCK; i += THREADS) {
                    const int b = i / STATE_CHUNK, j = at + i % STATE_CHUNK;
                    const float value = first + b < job.B && j < S ? job.states[(first + b) * S + j] : 0;
                    chunk[i % STATE_CHUNK * STATES_A_BLOCK + b] = value;
                    if (!(fabsf(value) < INFINITY)) {  // all who find something write the same
                        bad[b] = 1;
                        if (job.told != nullptr) *job.told = 1;
                    }
                }
                sync_block();
                const int width = S - at < STATE_CHUNK ? S - at : STATE_CHUNK;
                DQL_UNROLL_BY_8
                for (int j = 0; j < width; ++j) {
                    const float w = real ? weight[at + j] : 0;
                    DQL_UNROLL
                    for (int b = 0; b < STATES_A_BLOCK; b += 4) {
                        const float4 four = *reinterpret_cast<const float4*>(chunk + j * STATES_A_BLOCK + b);
                        sums[b] = fmaf(w, four.x, sums[b]);
                        sums[b + 1] = fmaf(w, four.y, sums[b + 1]);
                        sums[b + 2] = fmaf(w, four.z, sums[b + 2]);
                        sums[b + 3] = fmaf(w, four.w, sums[b + 3]);
                    }
                }
            }
            if (column >= s.HP) continue;
            DQL_UNROLL
            for (int b = 0; b < STATES_A_BLOCK; ++b)
                if (first + b < job.B) out[(first + b) * s.HP + column] = bad[b] ? NAN : sums[b];
        }
    }

    const PrologueArguments& a;
    const cuda::PrologueJob& job;
    const Mlp& net;
    const Slices& s;
};

DQL_KERNEL(THREADS, 3) prologue_kernel(DQL_ARGUMENT PrologueArguments arguments) { Prologue(arguments).run(); }

}  // namespace device

namespace cuda {

void prologue(const PrologueJob& job, Stream stream) {
    const Slices s(job.net, job.tiling);
    const auto blocks = [](int threads) { return (threads + THREADS - 1) / THREADS; };
    device::PrologueArguments a = {job, Packed(job.net, job.tiling, job.transposed, job.B, job.K), s};
    a.chunks = static_cast<int>((a.places.first - a.places.operands) / 16);
    a.floats = job.net.networks * job.tiling.cluster * s.floats();
    a.operand_blocks = blocks(a.chunks);
    a.first_blocks = static_cast<int>(s.first_bytes() / 16 / THREADS);  // HP is 128 or 256
    a.float_blocks = blocks(a.floats);
    a.time_blocks = job.net.D > 0 ? job.K : 0;
    a.state_blocks = static_cast<int>((job.B + device::STATES_A_BLOCK - 1) / device::STATES_A_BLOCK);
    if (s.slabs > 0) a.state_blocks = 0;  // the chain reads the states
    Grid grid;
    grid.x = a.operand_blocks + a.first_blocks + a.float_blocks + a.time_blocks + int64_t{job.net.networks} * a.state_blocks;
    grid.overlaps = true;
    grid.shared = 4 * (device::STATE_CHUNK + 1) * device::STATES_A_BLOCK;
    launch("the prologue", device::prologue_kernel, grid, a, stream);
}

}  // namespace cuda
}  // namespace dql
