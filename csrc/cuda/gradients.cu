// What is left of a backward pass: the gradients of parameters and states, in two launches.
//
// `products`: every parameter's gradient is a product over rows, sum over rows of a[row][i] b[row][j] (a bias: b = 1).
// A block has one tile of one product and one part of the rows, and writes into its part's image of the gradient: no
// atomics, the same bits every time. The gradient of the states is some blocks more. The second launch,
// gradient_sums.h, adds up the images.
//
// Weights of hidden layers go by the tensor cores in bf16 and tf32, as tf32: bf16 numbers are exact in it. Everything
// else is small, and float32.
#include <algorithm>
#include <stdexcept>

#include "arithmetic.h"
#include "chain_arguments.h"
#include "gradient_sums.h"
#include "launch.h"

namespace dql {
namespace device {

constexpr int SIDE = 64, CHUNK = 32, STRIDE = SIDE + 8;  // a tile, rows at a time; eight lanes' four rows: all banks
constexpr int MAX_PRODUCTS = 24, SUMMED_STATES = 8;

// One factor: its row r is min(r % period, limit - 1) / divisor of an array; a period or limit of 0 is none.
struct Factor {
    const char* at;      // null: ones
    bool operands;       // of the precision's type; else float32
    bool timesteps;      // int64: column c of a row is 1 where it is width - 1 - c, else 0
    bool ends;           // rows from the limit on count as zero
    int width, stride;   // columns that exist; elements a row
    int64_t period, limit;
    int divisor;
};

struct Product {
    Factor a, b;
    int64_t rows;        // of one batch, cut into the parts
    int batches;         // one after the other; each has its own result
    int64_t out;         // in the image: out + batch * out_batch + i * out_stride + j
    int64_t out_batch;
    int out_stride;
    bool tensor_cores;
    int tiles_j, tiles;  // of one batch
    int first_tile;      // among all products' tiles
};

struct ProductsArguments {
    Product products[MAX_PRODUCTS];
    int count, tiles;    // all
    int bf16;
    int64_t image;       // floats of one part's image
    float* images;
    // the states' gradient
    float* d_states;
    const char* d_z;     // of the first layer
    int64_t d_z_apart;   // elements, network to network
    const float* w_states;
    int64_t w_apart;
    int networks, H, HP, S, stride, N, K;
    int64_t B, RP;
};
static_assert(sizeof(ProductsArguments) <= 4096, "a kernel's argument");

DQL_DEVICE float operand_at(const char* at, int64_t index, bool bf16) {
    if (bf16) return as_float(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(at)[index]) << 16);
    return reinterpret_cast<const float*>(at)[index];
}

class Products {
public:
    DQL_DEVICE explicit Products(const ProductsArguments& arguments)
        : a(arguments), tile_a(reinterpret_cast<float*>(shared_memory())), tile_b(tile_a + CHUNK * STRIDE) {}

    DQL_DEVICE void run(int part, int parts) {
        if (block_x() >= a.tiles) {
            if (part == 0) states(static_cast<int64_t>(block_x() - a.tiles) * SUMMED_STATES);
            return;
        }
        int which = 0;
        while (which + 1 < a.count && a.products[which + 1].first_tile <= block_x()) ++which;
        const Product& p = a.products[which];
        const int tile = block_x() - p.first_tile, batch = tile / p.tiles;
        const int i0 = tile % p.tiles / p.tiles_j * SIDE, j0 = tile % p.tiles % p.tiles_j * SIDE;
        const int64_t start = batch * p.rows;
        const int64_t first = start + p.rows * part / parts, last = start + p.rows * (part + 1) / parts;
        float* image = a.images + part * a.image + p.out + batch * p.out_batch;
        if (p.tensor_cores)
            on_tensor_cores(p, image, i0, j0, first, last);
        else
            on_fma_units(p, image, i0, j0, first, last);
    }

private:
    // What a thread asked for of 64 columns of a factor, a quarter of two rows: four float32 each, or four bf16 in two.
    // Nothing is done with them before they are stored, so that nothing waits for them before.
    struct Fetched {
        uint4 half[2];
    };

    // Rows first ...
    DQL_DEVICE void load(const Factor& f, int column0, int64_t first, int64_t last, Fetched& fetched) const {
        const int column = column0 + thread() % 16 * 4;
        DQL_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int64_t row = first + thread() / 16 + 16 * half;
            uint4& four = fetched.half[half];
            four = make_uint4(0, 0, 0, 0);
            if (row >= last) continue;
            if (f.operands) {  // whose rows are padded to whole vectors; what is behind the width goes nowhere
                if (column >= f.stride) continue;
                const int64_t at = row * f.stride + column;
                if (a.bf16) {
                    const uint2 pairs = *reinterpret_cast<const uint2*>(f.at + at * 2);
                    four.x = pairs.x, four.y = pairs.y;
                } else {
                    four = *reinterpret_cast<const uint4*>(f.at + at * 4);
                }
                continue;
            }
            if (f.at == nullptr) {
                if (column == 0) four.x = as_bits(1.0f);
                continue;
            }
            const int64_t within = f.period > 0 ? row % f.period : row;
            if (f.ends && within >= f.limit) continue;
            int64_t index = f.limit == 0 || within < f.limit ? within : f.limit - 1;
            if (f.divisor > 1) index = static_cast<int32_t>(index) / f.divisor;
            if (f.timesteps) {
                const int one = f.width - 1 - static_cast<int>(reinterpret_cast<const int64_t*>(f.at)[index]) - column;
                const uint32_t bits = as_bits(1.0f);
                four = make_uint4(one == 0 ? bits : 0, one == 1 ? bits : 0, one == 2 ? bits : 0, one == 3 ? bits : 0);
                continue;
            }
            const uint32_t* at = reinterpret_cast<const uint32_t*>(f.at) + index * f.stride + column;
            if (column < f.width) four.x = at[0];
            if (column + 1 < f.width) four.y = at[1];
            if (column + 2 < f.width) four.z = at[2];
            if (column + 3 < f.width) four.w = at[3];
        }
    }

    DQL_DEVICE void store(const Factor& f, float* tile, const Fetched& fetched) const {
        DQL_UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint4& four = fetched.half[half];
            float* const to = tile + (thread() / 16 + 16 * half) * STRIDE + thread() % 16 * 4;
            *reinterpret_cast<uint4*>(to) =
                f.operands && a.bf16
                    ? make_uint4(four.x << 16, four.x & 0xffff0000u, four.y << 16, four.y & 0xffff0000u)
                    : four;
        }
    }

    // Chunk after chunk through shared memory, the next one on its way to registers meanwhile.
    template <class Multiply>
    DQL_DEVICE void over_rows(const Product& p, int i0, int j0, int64_t first, int64_t last, Multiply multiply) const {
        Fetched from_a, from_b;
        load(p.a, i0, first, last, from_a);
        load(p.b, j0, first, last, from_b);
        for (int64_t row = first; row < last; row += CHUNK) {
            sync_block();  // the chunk before is multiplied
            store(p.a, tile_a, from_a);
            store(p.b, tile_b, from_b);
            sync_block();
            if (row + CHUNK < last) {
                load(p.a, i0, row + CHUNK, last, from_a);
                load(p.b, j0, row + CHUNK, last, from_b);
            }
            multiply();
        }
    }

    // Eight warps, 16 by 32 of the tile each.
    DQL_DEVICE void on_tensor_cores(const Product& p, float* image, int i0, int j0, int64_t first, int64_t last) const {
        const int w = warp(), g = lane() / 4, t = lane() % 4, m0 = w % 4 * 16, n0 = w / 4 * 32;
        float d[4][4];
        DQL_UNROLL
        for (int i = 0; i < 16; ++i) d[i / 4][i % 4] = 0;
        over_rows(p, i0, j0, first, last, [&] {
            DQL_UNROLL
            for (int k = 0; k < CHUNK; k += 8) {
                const float* of_a = tile_a + (k + t) * STRIDE + m0 + g;
                const uint32_t fragment[4] = {as_bits(of_a[0]), as_bits(of_a[8]), as_bits(of_a[4 * STRIDE]),
                                              as_bits(of_a[4 * STRIDE + 8])};
                DQL_UNROLL
                for (int n = 0; n < 4; ++n) {
                    const float* of_b = tile_b + (k + t) * STRIDE + n0 + 8 * n + g;
                    const uint32_t other[2] = {as_bits(of_b[0]), as_bits(of_b[4 * STRIDE])};
                    mma_tf32(d[n], fragment, other);
                }
            }
        });
        DQL_UNROLL
        for (int n = 0; n < 4; ++n)
            DQL_UNROLL
            for (int i = 0; i < 4; ++i)
                write(p, image, i0 + m0 + g + i / 2 * 8, j0 + n0 + 8 * n + 2 * t + i % 2, d[n][i]);
    }

    // 16 by 16 threads, four by four of the tile each.
    DQL_DEVICE void on_fma_units(const Product& p, float* image, int i0, int j0, int64_t first, int64_t last) const {
        const int i = thread() / 16 * 4, j = thread() % 16 * 4;
        float d[4][4];
        DQL_UNROLL
        for (int n = 0; n < 16; ++n) d[n / 4][n % 4] = 0;
        over_rows(p, i0, j0, first, last, [&] {
            DQL_UNROLL_BY_2
            for (int k = 0; k < CHUNK; ++k) {
                const float4 of_a = load_floats(tile_a + k * STRIDE + i), of_b = load_floats(tile_b + k * STRIDE + j);
                const float x[4] = {of_a.x, of_a.y, of_a.z, of_a.w}, y[4] = {of_b.x, of_b.y, of_b.z, of_b.w};
                DQL_UNROLL
                for (int n = 0; n < 16; ++n) d[n / 4][n % 4] = fmaf(x[n / 4], y[n % 4], d[n / 4][n % 4]);
            }
        });
        DQL_UNROLL
        for (int n = 0; n < 16; ++n) write(p, image, i0 + i + n / 4, j0 + j + n % 4, d[n / 4][n % 4]);
    }

    DQL_DEVICE static void write(const Product& p, float* image, int i, int j, float value) {
        if (i < p.a.width && j < p.b.width) image[static_cast<int64_t>(i) * p.out_stride + j] = value;
    }

    // d_states of SUMMED_STATES states: the first layer's d_z over steps and candidates, times the states' weights.
    DQL_DEVICE void states(int64_t first) {
        float* sums = tile_a;  // [SUMMED_STATES][HP]
        for (int network = 0; network < a.networks; ++network) {
            sync_block();
            const char* d_z = a.d_z + network * a.d_z_apart * (a.bf16 ? 2 : 4);
            for (int i = thread(); i < SUMMED_STATES * a.HP; i += THREADS) {
                const int64_t b = first + i / a.HP;
                float sum = 0;
                if (b < a.B) {
                    DQL_UNROLL_BY_8
                    for (int row = 0; row < a.K * a.N; ++row)
                        sum += operand_at(d_z, (row / a.N * a.RP + b * a.N + row % a.N) * a.HP + i % a.HP, a.bf16);
                }
                sums[i] = sum;
            }
            sync_block();
            const float* weight = a.w_states + network * a.w_apart;
            // Eight lanes share an output: the weights of one state column lie far apart.
            const int outputs = SUMMED_STATES * a.S;
            for (int start = 0; start < outputs; start += THREADS / 8) {
                const int i = start + thread() / 8;
                const bool real = i < outputs && first + i / a.S < a.B;
                float sum = 0;
                if (real) {
                    const float* d = sums + i / a.S * a.HP;
                    DQL_UNROLL_BY_8
                    for (int o = thread() % 8; o < a.H; o += 8)
                        sum = fmaf(d[o], weight[static_cast<int64_t>(o) * a.stride + i % a.S], sum);
                }
                DQL_UNROLL
                for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
                if (real && thread() % 8 == 0) {
                    float* out = a.d_states + first * a.S + i;
                    *out = network == 0 ? sum : *out + sum;
                }
            }
        }
    }

    const ProductsArguments& a;
    float *tile_a, *tile_b;
};

DQL_KERNEL(THREADS, 1) products_kernel(DQL_ARGUMENT ProductsArguments arguments) {
    Products(arguments).run(block_y(), blocks_y());
}

}  // namespace device

namespace cuda {
namespace {

using device::Factor;
using device::Product;

// The products of all networks that ran, in the order of the layers.
class ProductList {
public:
    ProductList(const GradientJob& job, device::ProductsArguments& out)
        : job_(job), net_(job.net), s_(job.net, job.tiling), out_(out) {
        const int cloned = job.cloning.planes();
        const SavedPlaces saved(net_, job.tiling, job.networks, job.RP, job.K, cloned);
        const BackwardPlaces back(net_, job.tiling, job.networks, job.RP, job.K, cloned);
        const bool denoiser = net_.D > 0;
        const int64_t rows = static_cast<int64_t>(job.K + cloned) * job.RP;
        const int64_t plane = rows * s_.HP * s_.element;  // a layer's
        for (int n = 0; n < job.networks; ++n) {
            const int64_t at = (job.first_network + n) * net_.apart;
            const auto d_z = [&](int layer) { return operands(job.back + back.d_z + (n * net_.L + layer) * plane); };
            const auto h = [&](int layer) { return operands(job.saved + saved.h + (n * net_.L + layer) * plane); };
            for (int layer = 1; layer < net_.L; ++layer) {
                add(d_z(layer), h(layer - 1), rows, net_.hidden[layer - 1] + at, net_.H,
                    job.tiling.precision != Precision::FP32);
                add(d_z(layer), ones(), rows, net_.hidden_bias[layer - 1] + at, 1);
            }
            const Factor d_out = denoiser ? floats(job.back + back.d_out, net_.O)
                                          : rows_of(job.d_q + n * job.R, 1, job.R, 1, true);
            add(d_out, h(net_.L - 1), rows, net_.out + at, net_.H);
            add(d_out, ones(), rows, net_.out_bias + at, 1);
            const Factor x = denoiser ? floats(job.saved + saved.xs, net_.X)
                                      : rows_of(job.actions_in, net_.X, job.R, 1, false);
            add(d_z(0), x, rows, net_.first + net_.x_column + at, net_.stride);
            Factor s = rows_of(job.states, net_.S, job.R, job.N, false);
            s.period = job.RP;
            add(d_z(0), s, rows, net_.first + net_.state_column + at, net_.stride);
            if (!denoiser) add(d_z(0), ones(), rows, net_.first_bias + at, 1);
            if (denoiser && job.K > 0) add(d_z(0), ones(), job.RP, net_.size, 1, false, job.K, s_.HP);
            if (cloned > 0) {  // each row to that of its timestep, in a table of their own
                const int64_t behind = static_cast<int64_t>(job.K) * job.RP * s_.HP * s_.element;
                const Factor t = {reinterpret_cast<const char*>(job.cloning.t), false, true, true, job.cloning.T, 1, 0,
                                  job.R, 1};
                add(t, operands(job.back + back.d_z + behind), job.RP, net_.size + int64_t{job.K} * s_.HP, s_.HP);
            }
        }
    }

private:
    Factor operands(const char* at) const { return {at, true, false, false, net_.H, s_.HP, 0, 0, 1}; }
    static Factor floats(const char* at, int width) { return {at, false, false, false, width, width, 0, 0, 1}; }
    static Factor rows_of(const float* at, int width, int64_t limit, int divisor, bool ends) {
        return {reinterpret_cast<const char*>(at), false, false, ends, width, width, 0, limit, divisor};
    }
    static Factor ones() { return {nullptr, false, false, false, 1, 0, 0, 0, 1}; }

    void add(const Factor& a, const Factor& b, int64_t rows, int64_t out, int out_stride, bool tensor_cores = false,
             int batches = 1, int64_t out_batch = 0) {
        const auto tiles = [](const Factor& f) { return (f.width + device::SIDE - 1) / device::SIDE; };
        const int tiles_i = tiles(a), tiles_j = tiles(b);
        out_.products[out_.count++] = {a,       b,           rows,         batches, out,
                                       out_batch, out_stride, tensor_cores, tiles_j, tiles_i * tiles_j, out_.tiles};
        out_.tiles += tiles_i * tiles_j * batches;
    }

    const GradientJob& job_;
    const Mlp& net_;
    Slices s_;
    device::ProductsArguments& out_;
};

int64_t image_floats(const Mlp& net, const Tiling& tiling, int table_rows) {
    return net.size + (net.D > 0 ? static_cast<int64_t>(table_rows) * Slices(net, tiling).HP : 0);
}

}  // namespace

int64_t gradient_workspace(const Mlp& net, const Tiling& tiling, int K, int parts, bool parameters, int T) {
    return parameters ? parts * image_floats(net, tiling, K + T) : 0;
}

void gradients(const GradientJob& job, Stream stream) {
    const Mlp& net = job.net;
    const Slices s(net, job.tiling);
    device::ProductsArguments a = {};
    a.bf16 = job.tiling.precision == Precision::BF16;
    a.image = image_floats(net, job.tiling, job.K + job.cloning.T);
    a.images = job.workspace;
    if (job.d_flat != nullptr) ProductList(job, a);
    Grid grid;
    grid.x = a.tiles;
    grid.y = job.d_flat != nullptr ? job.parts : 1;
    if (job.d_states != nullptr) {
        if (job.cloning.planes() > 0) throw std::invalid_argument("of a cloned batch the states have no gradient");
        const BackwardPlaces back(net, job.tiling, job.networks, job.RP, job.K);
        a.d_states = job.d_states;
        a.d_z = job.back + back.d_z;
        a.d_z_apart = static_cast<int64_t>(net.L) * job.K * job.RP * s.HP;
        a.w_states = job.flat + net.first + net.state_column + job.first_network * net.apart;
        a.w_apart = net.apart;
        a.networks = job.networks, a.H = net.H, a.HP = s.HP, a.S = net.S, a.stride = net.stride;
        a.N = job.N, a.K = job.K, a.B = job.B, a.RP = job.RP;
        grid.x += (job.B + device::SUMMED_STATES - 1) / device::SUMMED_STATES;
    }
    if (grid.x == 0) return;
    grid.shared = std::max(2 * device::CHUNK * device::STRIDE, device::SUMMED_STATES * s.HP) * 4;
    launch("the products of gradients", device::products_kernel, grid, a, stream);
    if (job.d_flat == nullptr) return;
    const int T = job.cloning.planes() > 0 ? job.cloning.T : job.K, tables = (job.K > 0 ? 1 : 0) + job.cloning.planes();
    device::FinishArguments f = {net,    job.first_network, job.networks, s.HP, T,
                                 tables, job.parts,         a.image,      job.workspace};
    f.flat = job.flat, f.embedding = job.embedding, f.d_flat = job.d_flat;
    f.add_blocks = (net.size + THREADS - 1) / THREADS;
    f.column_blocks = net.D > 0 ? (net.H + device::TIME_COLUMNS - 1) / device::TIME_COLUMNS : 0;
    Grid finish;
    finish.x = f.add_blocks + f.column_blocks + (net.D > 0 ? 1 : 0);
    finish.shared = device::finish_floats(net.D, net.H) * 4;
    launch("the sums of gradients", device::finish_kernel, finish, f, stream);
}

}  // namespace cuda
}  // namespace dql
