#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "pool.h"

namespace dql {

#if DQL_HAVE_AVX512BF16
const Kernels* kernels_avx512bf16();
#endif
#if DQL_HAVE_AVX512
const Kernels* kernels_avx512();
#endif
#if DQL_HAVE_AVX2
const Kernels* kernels_avx2();
#endif
const Kernels* kernels_generic();

// ---- variants ----

static std::vector<Variant> find_variants() {
    std::vector<Variant> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    (void)avx512;
#if DQL_HAVE_AVX512BF16
    if (avx512 && __builtin_cpu_supports("avx512bf16"))
        found.push_back({"avx512bf16", kernels_avx512bf16(), ""});
    else
        found.push_back({"avx512bf16", nullptr, "this CPU has no AVX512_BF16"});
#endif
#if DQL_HAVE_AVX512
    if (avx512)
        found.push_back({"avx512", kernels_avx512(), ""});
    else
        found.push_back({"avx512", nullptr, "this CPU has no AVX-512 (F, BW, DQ and VL)"});
#endif
#if DQL_HAVE_AVX2
    if (avx2)
        found.push_back({"avx2", kernels_avx2(), ""});
    else
        found.push_back({"avx2", nullptr, "this CPU has no AVX2 with FMA"});
#endif
#endif
    found.push_back({"generic", kernels_generic(), ""});
    return found;
}

const std::vector<Variant>& variants() {
    static const std::vector<Variant> found = find_variants();
    return found;
}

static const Kernels* forced = nullptr;

const Kernels& kernels() {
    if (forced) return *forced;
    static const Kernels* const best = [] {
        for (const Variant& variant : variants())
            if (variant.kernels) return variant.kernels;
        return static_cast<const Kernels*>(nullptr);  // not reached: generic always runs
    }();
    return *best;
}

void force_variant(const std::string& name) {
    if (name.empty()) {
        forced = nullptr;
        return;
    }
    std::string known;
    for (const Variant& variant : variants()) {
        if (name == variant.name) {
            if (!variant.kernels) throw std::invalid_argument("variant " + name + " cannot run: " + variant.reason);
            forced = variant.kernels;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(variant.name);
    }
    throw std::invalid_argument("unknown variant '" + name + "'; this build has: " + known);
}

// ---- memory ----

// Large buffers in pages of 2 MB, where the system has them: fewer faults and TLB misses, and neighbours in memory are
// neighbours in the L2 cache. With pages of 4 KB one row's chain took 14 to 17 us, as luck distributed them.
constexpr size_t HUGE_PAGE = size_t{2} << 20;
constexpr size_t LARGE = size_t{1} << 18;

// What a thread keeps of the large buffers that it freed.
struct Kept {
    static constexpr int BUFFERS = 4;
    static constexpr size_t BYTES = size_t{128} << 20;
    void* memory[BUFFERS] = {};
    size_t bytes[BUFFERS] = {};

    // The smallest that holds `needed` and is not far too large, or null.
    void* take(size_t& needed) {
        int best = -1;
        for (int i = 0; i < BUFFERS; ++i)
            if (memory[i] && bytes[i] >= needed && bytes[i] / 2 <= needed && (best < 0 || bytes[i] < bytes[best]))
                best = i;
        if (best < 0) return nullptr;
        needed = bytes[best];
        void* found = memory[best];
        memory[best] = nullptr;
        return found;
    }

    bool keep(void* freed, size_t size) {
        size_t total = size;
        for (int i = 0; i < BUFFERS; ++i) total += memory[i] ? bytes[i] : 0;
        if (total > BYTES) return false;
        for (int i = 0; i < BUFFERS; ++i) {
            if (memory[i]) continue;
            memory[i] = freed;
            bytes[i] = size;
            return true;
        }
        return false;
    }

    ~Kept();
};

static thread_local bool kept_is_gone = false;  // buffers may be freed after it, while the thread ends
static thread_local Kept kept;

Kept::~Kept() {
    kept_is_gone = true;
    for (void* p : memory) std::free(p);
}

void Buffer::Free::operator()(float* p) const {
    if (bytes < LARGE || kept_is_gone || !kept.keep(p, bytes)) std::free(p);
}

Buffer::Buffer(int64_t floats) : size_(floats) {
    const size_t needed = static_cast<size_t>(floats > 0 ? floats : 1) * sizeof(float);
    const size_t alignment = needed >= LARGE ? HUGE_PAGE : 64;
    size_t bytes = (needed + alignment - 1) / alignment * alignment;
    void* memory = needed >= LARGE && !kept_is_gone ? kept.take(bytes) : nullptr;
    if (!memory) {
        memory = std::aligned_alloc(alignment, bytes);
        if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (alignment == HUGE_PAGE) madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: its failure does not matter
#endif
    }
    memory_ = std::unique_ptr<float, Free>(static_cast<float*>(memory), Free{bytes});
}

// The calling thread's scratch, kept until the thread ends.
static float* scratch(int64_t floats) {
    thread_local Buffer buffer;
    if (buffer.size() < floats) {
        buffer = Buffer();
        buffer = Buffer(floats);
    }
    return buffer.data();
}

// ---- networks ----

Network::Network(Spec spec) : spec_(std::move(spec)) {}

TrunkSource Network::source(const float* flat, int trunk) const {
    const Spec& s = spec_;
    TrunkSource source = {};
    size_t i = s.critic ? static_cast<size_t>(trunk) * 2 * (s.L + 1) : 4;
    const auto next = [&] { return flat + s.offsets[i++]; };
    source.first_stride = s.A + s.D + s.S;
    source.x_column = s.critic ? s.S : 0;
    source.time_column = s.A;
    source.state_column = s.critic ? 0 : s.A + s.D;
    source.first = next();
    source.first_bias = next();
    for (int l = 0; l + 1 < s.L; ++l) {
        source.hidden[l] = next();
        source.hidden_bias[l] = next();
    }
    source.out = next();
    source.out_bias = next();
    return source;
}

void Network::allocate(Packed& packed, int parts) const {
    const Spec& s = spec_;
    const int64_t P = panels(s.H), padded = P * PANEL;
    float* at = nullptr;  // null: only counts
    int64_t total = 0;
    const auto take = [&](int64_t floats) {
        const int64_t rounded = (floats + 15) / 16 * 16;
        float* taken = at;
        if (at) at += rounded;
        total += rounded;
        return taken;
    };
    const auto lay_out = [&] {
        for (int i = 0; i < (s.critic ? 2 : 1); ++i) {
            Trunk& t = packed.trunks[i];
            if (parts & FORWARD) {
                t.S = s.S, t.X = s.A, t.D = s.D, t.H = s.H, t.L = s.L, t.O = s.critic ? 1 : s.A;
                t.activation = s.activation;
                t.P = P;
                t.x_weight = take(s.A * padded);
                for (int l = 0; l + 1 < s.L; ++l) {
                    t.hidden_weight[l] = take(padded * padded);
                    t.hidden_bias[l] = take(padded);
                }
                t.out_weight = take(t.O * padded);
                t.out_bias = take(t.O);
                t.state_weight = take(s.S * padded);
                t.time_weight = take(s.D * padded);
                t.first_bias = take(padded);
            }
            if (parts & BACKWARD) {
                t.out_weight_t = take(t.O * padded);
                for (int l = 0; l + 1 < s.L; ++l) t.hidden_weight_t[l] = take(padded * padded);
                t.x_weight_t = take(t.X * padded);
                t.state_weight_t = take(padded * panels(s.S) * PANEL);
            }
            if (parts & BF16)
                for (int l = 0; l + 1 < s.L; ++l)
                    t.hidden_weight_bf16[l] = reinterpret_cast<uint32_t*>(take(padded * padded / 2));
        }
    };
    lay_out();
    packed.buffers.emplace_back(total);
    at = packed.buffers.back().data();
    lay_out();
}

std::shared_ptr<Packed> Network::packed(const float* flat, int64_t version, int parts) {
    const int64_t stride = spec_.flat_size / PROBES > 0 ? spec_.flat_size / PROBES : 1;
    const int64_t probes = std::min<int64_t>(PROBES, spec_.flat_size / stride);
    bool same = current_ && flat == flat_ && version == version_;
    for (int64_t i = 0; same && i < probes; ++i) same = std::memcmp(&probes_[i], flat + i * stride, sizeof(float)) == 0;
    if (!same) {
        // Where nobody else holds the old version, its memory serves the new one.
        if (!current_ || current_.use_count() > 1) current_ = std::make_shared<Packed>();
        current_->parts = 0;
        current_->tables.clear();
        if (!spec_.critic) {
            const int64_t D = spec_.D;
            const int64_t sizes[4] = {2 * D * D, 2 * D, 2 * D * D, D};
            current_->time_mlp.resize(static_cast<size_t>(4 * D * D + 3 * D));
            float* to = current_->time_mlp.data();
            for (size_t i = 0; i < 4; ++i, to += sizes[i - 1])
                std::memcpy(to, flat + spec_.offsets[i], sizeof(float) * static_cast<size_t>(sizes[i]));
        }
        for (int64_t i = 0; i < probes; ++i) probes_[i] = flat[i * stride];
        flat_ = flat;
        version_ = version;
    }
    const int missing = (parts | FORWARD) & ~current_->parts;
    if (missing) {
        if (const int fresh = missing & ~current_->allocated) allocate(*current_, fresh);
        current_->allocated |= missing;
        for (int i = 0; i < (spec_.critic ? 2 : 1); ++i) kernels().pack(current_->trunks[i], source(flat, i), missing);
        current_->parts |= missing;
    }
    return current_;
}

// The tensors of the time MLP in Packed::time_mlp, and what its forward pass leaves behind a table's floats.
struct TimeMlp {
    const float *weight1, *bias1, *weight3, *bias3;  // [2D][D], [2D], [D][2D], [D]
    TimeMlp(const Packed& packed, int64_t D)
        : weight1(packed.time_mlp.data()), bias1(weight1 + 2 * D * D), weight3(bias1 + 2 * D),
          bias3(weight3 + 2 * D * D) {}
};

struct TimeSaved {
    float *table, *hidden, *slope, *features;  // [K][32 P], [K][wide], [K][wide], [K][32 panels(D)]
    int64_t wide, columns;                     // 2D padded to panels; floats of a row of features
    static int64_t floats(const Trunk& t, int64_t K) {
        return K * (t.P + 2 * panels(2 * t.D) + panels(t.D)) * PANEL;
    }
    TimeSaved(float* floats, const Trunk& t, int64_t K)
        : table(floats), hidden(table + K * t.P * PANEL), slope(hidden + K * panels(2 * t.D) * PANEL),
          features(slope + K * panels(2 * t.D) * PANEL), wide(panels(2 * t.D) * PANEL), columns(panels(t.D) * PANEL) {}
};

const float* Network::time_table(Packed& packed, const Table& table) const {
    for (const Packed::TimeTable& known : packed.tables)
        if (known.id == table.id) return known.floats.data();
    const Trunk& t = packed.trunks[0];
    const int64_t D = t.D, K = table.K;
    const TimeMlp mlp(packed, D);
    Buffer floats(TimeSaved::floats(t, K));
    const TimeSaved s(floats.data(), t, K);
    std::memset(s.hidden, 0, sizeof(float) * static_cast<size_t>(K * (2 * s.wide + s.columns)));
    for (int64_t k = 0; k < K; ++k)
        for (int64_t i = 0; i < 2 * D; ++i) {
            float z = mlp.bias1[i];
            for (int64_t d = 0; d < D; ++d) z += mlp.weight1[i * D + d] * table.embedding[static_cast<size_t>(k * D + d)];
            s.hidden[k * s.wide + i] = z;
        }
    kernels().activate(t.activation, s.hidden, s.slope, K * s.wide);
    for (int64_t k = 0; k < K; ++k)
        for (int64_t d = 0; d < D; ++d) {
            float f = mlp.bias3[d];
            for (int64_t i = 0; i < 2 * D; ++i) f += mlp.weight3[d * 2 * D + i] * s.hidden[k * s.wide + i];
            s.features[k * s.columns + d] = f;
        }
    kernels().time_table(t, s.features, K, s.table);
    if (packed.tables.size() >= 8) packed.tables.erase(packed.tables.begin());
    packed.tables.push_back({table.id, std::move(floats)});
    return packed.tables.back().floats.data();
}

// ---- tiles ----

constexpr int64_t FEW_ROWS = 4;  // not worth a thread of their own: the weights stream by once a tile

// Runs body(first_row, rows, scratch) over all rows. Results do not depend on how they are cut.
template <class Body>
static void over_tiles(int threads, int64_t rows, int64_t scratch_floats, const Body& body) {
    const int64_t most = kernels().max_rows;
    int64_t tiles = (rows + most - 1) / most;
    if (threads > 1 && tiles < 8 * threads)  // a whole number of tiles for every thread
        tiles = std::min((tiles + threads - 1) / threads * threads, std::max(tiles, rows / FEW_ROWS));
    if (tiles < 1) return;
    const int64_t each = rows / tiles, more = rows % tiles;
    parallel_for(threads, tiles, [&](int64_t tile, int) {
        const int64_t first = tile * each + std::min(tile, more);
        body(first, static_cast<int>(each + (tile < more)), scratch(scratch_floats));
    });
}

// ---- chains ----

int64_t saved_floats(const Trunk& t, int64_t rows, int64_t inside_rows) {
    return (panels(t.X) * (rows + inside_rows) + panels(t.O) * rows + 2 * t.L * t.P * rows) * PANEL;
}

static Saved saved_in(float* at, const Trunk& t, int64_t rows, int64_t inside_rows) {
    Saved saved = {};
    const auto take = [&](int64_t floats) {
        float* taken = at;
        at += floats;
        return taken;
    };
    saved.rows = rows;
    saved.x = take(panels(t.X) * rows * PANEL);
    for (int l = 0; l < t.L; ++l) {
        saved.hidden[l] = take(t.P * rows * PANEL);
        saved.slope[l] = saved.d_z[l] = take(t.P * rows * PANEL);
    }
    saved.d_out = take(panels(t.O) * rows * PANEL);
    saved.inside = take(panels(t.X) * inside_rows * PANEL);
    return saved;
}

static ChainJob chain_job(const ChainCall& call) {
    ChainJob job = {};
    job.net = &call.packed->trunks[0];
    job.time_table = call.time_table;
    job.states = call.states;
    job.noise = call.noise;
    job.seed = call.seed;
    job.B = call.B, job.N = call.N, job.R = call.B * call.N;
    job.K = call.table->K;
    job.steps = call.table->steps.data();
    job.max_action = call.max_action;
    job.bf16 = call.bf16;
    job.actions = call.actions;
    return job;
}

void chain(const ChainCall& call, SavedChain* saved) {
    ChainJob job = chain_job(call);
    const Trunk& t = *job.net;
    if (saved) {
        const int64_t rows = job.K * job.R;
        saved->packed = call.packed;
        saved->time_table = call.time_table;
        saved->B = call.B, saved->N = call.N;
        saved->memory = Buffer(saved_floats(t, rows, rows + job.R));
        saved->saved = saved_in(saved->memory.data(), t, rows, rows + job.R);
        job.saved = &saved->saved;
    }
    over_tiles(call.threads, job.R, kernels().scratch_floats(t, job.K),
               [&](int64_t first, int rows, float* scratch) { kernels().chain_tile(job, first, rows, scratch); });
}

void select(const ChainCall& call, const Packed& critic, uint64_t draw_seed, float* chosen) {
    ChainJob job = chain_job(call);
    const int64_t A = job.net->X, N = call.N;
    thread_local Buffer memory;  // of the candidates and their values, when the caller gives none
    const int64_t needed = job.R * (A + 1) + 16;
    if (memory.size() < needed) memory = Buffer(needed);
    job.actions = memory.data();
    job.q_min = memory.data() + job.R * A;
    job.critic = critic.trunks;
    const int64_t floats = kernels().scratch_floats(*job.net, job.K) + kernels().scratch_floats(critic.trunks[0], 1);
    over_tiles(call.threads, job.R, floats,
               [&](int64_t first, int rows, float* scratch) { kernels().chain_tile(job, first, rows, scratch); });
    for (int64_t b = 0; b < call.B; ++b) {
        float* q = job.q_min + b * N;
        float largest = q[0];
        for (int64_t n = 1; n < N; ++n) largest = q[n] > largest ? q[n] : largest;
        float total = 0.0f;
        for (int64_t n = 0; n < N; ++n) q[n] = total += std::exp(q[n] - largest);
        const float draw = static_cast<float>(kernels().uniform(draw_seed, 0, static_cast<uint32_t>(b))) * total;
        int64_t index = 0;  // of a critic that has become NaN, the first: no comparison holds
        while (index + 1 < N && q[index] <= draw) ++index;
        std::memcpy(chosen + b * A, job.actions + (b * N + index) * A, sizeof(float) * static_cast<size_t>(A));
    }
}

// ---- gradients of weights ----

// All products of a network's weight gradients, as tasks of similar size.
class WeightGradients {
public:
    WeightGradients(const Network& net, int trunk, const Gradients& out, const Saved& saved)
        : spec_(net.spec()), saved_(saved), accumulate_(out.accumulate) {
        const size_t first = spec_.critic ? static_cast<size_t>(trunk) * 2 * (spec_.L + 1) : 4;
        for (int l = 0; l <= spec_.L; ++l) {
            weight_[l] = out.flat + spec_.offsets[first + 2 * static_cast<size_t>(l)];
            bias_[l] = out.flat + spec_.offsets[first + 2 * static_cast<size_t>(l) + 1];
        }
        const int P = static_cast<int>(panels(spec_.H)), PO = static_cast<int>(panels(outputs()));
        for (int l = 1; l <= spec_.L; ++l)
            for (int j = 0; j < (l < spec_.L ? P : PO); ++j)
                for (int i = 0; i < P; ++i) tasks_.push_back({l, j, i});
        for (int j = 0; j < P; ++j)
            for (int a = 0; a < panels(spec_.A); ++a) tasks_.push_back({0, j, a});
        for (int l = spec_.critic ? 0 : 1; l <= spec_.L; ++l)
            for (int j = 0; j < (l < spec_.L ? P : PO); ++j) tasks_.push_back({l, j, -1});
    }

    int64_t size() const { return static_cast<int64_t>(tasks_.size()); }

    void run(int64_t index) const {
        const Task& task = tasks_[static_cast<size_t>(index)];
        const bool out = task.layer == spec_.L;
        const int64_t panel = saved_.rows * PANEL;
        const float* d = (out ? saved_.d_out : saved_.d_z[task.layer]) + task.j * panel;
        const int rows_of_out = valid(out ? outputs() : spec_.H, task.j);
        if (task.i < 0) {  // the bias
            alignas(64) float sums[PANEL];
            kernels().column_sums(d, saved_.rows, sums, false);
            float* to = bias_[task.layer] + task.j * PANEL;
            for (int c = 0; c < rows_of_out; ++c) to[c] = accumulate_ ? to[c] + sums[c] : sums[c];
            return;
        }
        OuterJob job = {};
        job.rows = saved_.rows;
        job.accumulate = accumulate_;
        if (task.layer == 0) {  // few columns: summed with d_z along the vectors, and stored transposed
            const int64_t stride = spec_.A + spec_.D + spec_.S;
            job.a = saved_.x + task.i * panel;
            job.b = d;
            job.valid_a = valid(spec_.A, task.i);
            job.valid_b = rows_of_out;
            job.out = weight_[0] + task.j * PANEL * stride + (spec_.critic ? spec_.S : 0) + task.i * PANEL;
            job.stride_a = 1;
            job.stride_b = stride;
        } else {
            job.a = d;
            job.b = saved_.hidden[task.layer - 1] + task.i * panel;
            job.valid_a = rows_of_out;
            job.valid_b = valid(spec_.H, task.i);
            job.out = weight_[task.layer] + task.j * PANEL * spec_.H + task.i * PANEL;
            job.stride_a = spec_.H;
            job.stride_b = 1;
        }
        kernels().outer(job);
    }

private:
    struct Task {
        int layer, j, i;  // panels of the weight's rows and columns; i < 0: the bias
    };
    int outputs() const { return spec_.critic ? 1 : spec_.A; }
    static int valid(int columns, int panel) { return std::min(PANEL, columns - panel * PANEL); }

    const Spec& spec_;
    const Saved& saved_;
    bool accumulate_;
    float *weight_[MAX_LAYERS + 1], *bias_[MAX_LAYERS + 1];
    std::vector<Task> tasks_;
};

// The state's columns of the first weight, from d_part [P][B][32], the gradient of each state's part.
static void state_gradient(const Network& net, const float* d_part, int64_t B, const float* states,
                           float* first_weight, bool accumulate, int threads) {
    const Spec& s = net.spec();
    const int64_t PS = panels(s.S), P = panels(s.H), stride = s.A + s.D + s.S;
    Buffer padded(PS * B * PANEL);
    kernels().to_panels(states, s.S, B, s.S, padded.data(), B * PANEL);
    parallel_for(threads, PS * P, [&](int64_t task, int) {
        const int64_t i = task % PS, j = task / PS;
        OuterJob job = {};
        job.a = padded.data() + i * B * PANEL;
        job.b = d_part + j * B * PANEL;
        job.rows = B;
        job.valid_a = static_cast<int>(std::min<int64_t>(PANEL, s.S - i * PANEL));
        job.valid_b = static_cast<int>(std::min<int64_t>(PANEL, s.H - j * PANEL));
        job.out = first_weight + j * PANEL * stride + (s.critic ? 0 : s.A + s.D) + i * PANEL;
        job.stride_a = 1;
        job.stride_b = stride;
        job.accumulate = accumulate;
        kernels().outer(job);
    });
}

static void d_states(const Trunk& t, const float* d_part, int64_t B, float* out, int threads) {
    over_tiles(threads, B, (panels(t.S) + 1) * PANEL * kernels().max_rows,
               [&](int64_t first, int rows, float* scratch) {
                   kernels().states_tile(t, d_part, B, first, rows, out, scratch);
               });
}

// From d_table [K][32 P], the gradient of what each timestep adds to the first layer, to the time MLP and to the first
// layer's bias and time columns.
static void time_gradient(const Network& net, const Packed& packed, const float* floats, const Table& table,
                          const float* d_table, const Gradients& out) {
    const Spec& s = net.spec();
    const Trunk& t = packed.trunks[0];
    const int64_t D = s.D, K = table.K, H = s.H, stride = s.A + s.D + s.S, wide = t.P * PANEL;
    const TimeSaved saved(const_cast<float*>(floats), t, K);
    const TimeMlp mlp(packed, D);
    const auto at = [&](size_t i) { return out.flat + s.offsets[i]; };
    float *weight1 = at(0), *bias1 = at(1), *weight3 = at(2), *bias3 = at(3), *first = at(4), *first_bias = at(5);
    if (!out.accumulate) {
        std::memset(weight1, 0, sizeof(float) * static_cast<size_t>(2 * D * D));
        std::memset(bias1, 0, sizeof(float) * static_cast<size_t>(2 * D));
        std::memset(weight3, 0, sizeof(float) * static_cast<size_t>(2 * D * D));
        std::memset(bias3, 0, sizeof(float) * static_cast<size_t>(D));
        std::memset(first_bias, 0, sizeof(float) * static_cast<size_t>(H));
        for (int64_t j = 0; j < H; ++j) std::memset(first + j * stride + s.A, 0, sizeof(float) * static_cast<size_t>(D));
    }
    std::vector<float> d_features(static_cast<size_t>(D)), d_hidden(static_cast<size_t>(2 * D));
    for (int64_t k = 0; k < K; ++k) {
        const float *d = d_table + k * wide, *features = saved.features + k * saved.columns;
        std::fill(d_features.begin(), d_features.end(), 0.0f);
        for (int64_t j = 0; j < H; ++j) {
            float* to = first + j * stride + s.A;
            first_bias[j] += d[j];
            for (int64_t i = 0; i < D; ++i) {
                to[i] += d[j] * features[i];
                d_features[static_cast<size_t>(i)] += d[j] * t.time_weight[block_index(D, t.P, i, j)];
            }
        }
        const float *hidden = saved.hidden + k * saved.wide, *slope = saved.slope + k * saved.wide;
        std::fill(d_hidden.begin(), d_hidden.end(), 0.0f);
        for (int64_t i = 0; i < D; ++i) {
            const float df = d_features[static_cast<size_t>(i)];
            bias3[i] += df;
            for (int64_t h = 0; h < 2 * D; ++h) {
                weight3[i * 2 * D + h] += df * hidden[h];
                d_hidden[static_cast<size_t>(h)] += df * mlp.weight3[i * 2 * D + h];
            }
        }
        for (int64_t h = 0; h < 2 * D; ++h) {
            const float dz = d_hidden[static_cast<size_t>(h)] * slope[h];
            bias1[h] += dz;
            for (int64_t i = 0; i < D; ++i)
                weight1[h * D + i] += dz * table.embedding[static_cast<size_t>(k * D + i)];
        }
    }
}

void chain_backward(const Network& net, SavedChain& saved, const Table& table, const float* states,
                    const float* d_actions, float d_scale, const Gradients& out, int threads) {
    const Trunk& t = saved.packed->trunks[0];
    const int64_t B = saved.B, N = saved.N, R = B * N, K = table.K, P = t.P;
    ChainBackwardJob job = {};
    job.net = &t;
    job.steps = table.steps.data();
    job.R = R;
    job.K = table.K;
    job.d_actions = d_actions;
    job.d_scale = d_scale;
    job.saved = &saved.saved;
    saved.spent = true;
    over_tiles(threads, R, kernels().scratch_floats(t, table.K), [&](int64_t first, int rows, float* scratch) {
        kernels().chain_backward_tile(job, first, rows, scratch);
    });
    // A state's part is shared by all steps and candidates: its gradient is the sum over both.
    Buffer d_part(P * B * PANEL), d_table(K * P * PANEL);
    const int64_t extra = P * (out.flat ? 2 : 1);
    const auto sums = [&](int64_t task) {
        const int64_t p = task % P;
        const float* d_z = saved.saved.d_z[0] + p * saved.saved.rows * PANEL;
        if (task >= P) {
            for (int64_t k = 0; k < K; ++k)
                kernels().column_sums(d_z + k * R * PANEL, R, d_table.data() + (k * P + p) * PANEL, false);
            return;
        }
        for (int64_t b = 0; b < B; ++b)
            for (int64_t k = 0; k < K; ++k)
                kernels().column_sums(d_z + (k * R + b * N) * PANEL, N, d_part.data() + (p * B + b) * PANEL, k > 0);
    };
    if (!out.flat) {
        parallel_for(threads, extra, [&](int64_t task, int) { sums(task); });
    } else {
        const WeightGradients weights(net, 0, out, saved.saved);
        parallel_for(threads, weights.size() + extra,
                     [&](int64_t task, int) { task < weights.size() ? weights.run(task) : sums(task - weights.size()); });
        state_gradient(net, d_part.data(), B, states, out.flat + net.spec().offsets[4], out.accumulate, threads);
        time_gradient(net, *saved.packed, saved.time_table, table, d_table.data(), out);
    }
    if (out.d_states) d_states(t, d_part.data(), B, out.d_states, threads);
}

// ---- the critic ----

static void critic_tiles(const CriticJob& job, int threads) {
    over_tiles(threads, job.R, kernels().scratch_floats(*job.net, 1),
               [&](int64_t first, int rows, float* scratch) { kernels().critic_tile(job, first, rows, scratch); });
}

static CriticJob critic_job(const Trunk& net, const float* states, int64_t B, const float* actions, int64_t N, float* q) {
    CriticJob job = {};
    job.net = &net;
    job.states = states;
    job.actions = actions;
    job.B = B, job.N = N, job.R = B * N;
    job.q = q;
    return job;
}

void q_values(const Packed& critic, const float* states, int64_t B, const float* actions, int64_t N, float* q1,
              float* q2, int threads) {
    critic_tiles(critic_job(critic.trunks[0], states, B, actions, N, q1), threads);
    critic_tiles(critic_job(critic.trunks[1], states, B, actions, N, q2), threads);
}

double target_q(const Packed& critic, const float* states, int64_t B, const float* actions, int64_t N,
                const float* rewards, const float* masks, float discount, float* out, int threads) {
    Buffer q(2 * B * N);
    q_values(critic, states, B, actions, N, q.data(), q.data() + B * N, threads);
    double total = 0.0;
    for (int64_t b = 0; b < B; ++b) {
        float best[2];
        for (int i = 0; i < 2; ++i) {
            const float* values = q.data() + (i * B + b) * N;
            best[i] = values[0];
            for (int64_t n = 1; n < N; ++n)
                if (!(values[n] <= best[i])) best[i] = values[n];  // a NaN is kept, as torch's amax keeps it
        }
        const float least = best[0] < best[1] || best[0] != best[0] ? best[0] : best[1];
        out[b] = rewards[b] + masks[b] * discount * least;
        total += out[b];
    }
    return total / static_cast<double>(B);
}

static double mean(const float* values, int64_t n) {
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) total += values[i];
    return total / static_cast<double>(n);
}

CriticLoss critic_gradient(const Network& net, const Packed& packed, const float* states, const float* actions,
                           int64_t B, const float* target, const Gradients& out, int threads) {
    const Trunk& t = packed.trunks[0];
    Buffer memory(saved_floats(t, B, 0) + 2 * B);
    float* q = memory.data() + saved_floats(t, B, 0);
    CriticLoss loss = {};
    for (int i = 0; i < 2; ++i) {
        const Saved saved = saved_in(memory.data(), t, B, 0);
        CriticJob job = critic_job(packed.trunks[i], states, B, actions, 1, q);
        job.saved = &saved;
        job.target_q = target;
        critic_tiles(job, threads);
        const WeightGradients weights(net, i, out, saved);
        parallel_for(threads, weights.size(), [&](int64_t task, int) { weights.run(task); });
        const size_t first = static_cast<size_t>(i) * 2 * (net.spec().L + 1);
        state_gradient(net, saved.d_z[0], B, states, out.flat + net.spec().offsets[first], out.accumulate, threads);
        for (int64_t b = 0; b < B; ++b) loss.loss += static_cast<double>(q[b] - target[b]) * (q[b] - target[b]);
        loss.q += mean(q, B) / 2;
    }
    loss.loss /= static_cast<double>(B);
    return loss;
}

QMeans q_gradient(const Packed& critic, int which, const float* states, const float* actions, int64_t B,
                  float* d_actions, int threads) {
    const Trunk& t = critic.trunks[which];
    Buffer memory(saved_floats(t, B, 0) + 2 * B);
    float* q = memory.data() + saved_floats(t, B, 0);
    const Saved saved = saved_in(memory.data(), t, B, 0);
    CriticJob job = critic_job(t, states, B, actions, 1, q);
    job.saved = &saved;
    job.d_actions = d_actions;
    critic_tiles(job, threads);
    critic_tiles(critic_job(critic.trunks[1 - which], states, B, actions, 1, q + B), threads);
    QMeans means = {mean(q, B), 0.0};
    for (int64_t b = 0; b < B; ++b) means.other += std::fabs(q[B + b]);
    means.other /= static_cast<double>(B);
    return means;
}

// ---- the noise-prediction loss ----

double bc_gradient(const Network& net, Packed& packed, const Table& table, const float* states, const float* actions,
                   int64_t B, uint64_t t_seed, uint64_t noise_seed, bool predict_epsilon, const Gradients& out,
                   int threads) {
    const Trunk& t = packed.trunks[0];
    const int64_t P = t.P, A = t.X;
    const float* floats = net.time_table(packed, table);
    Buffer memory(saved_floats(t, B, 0) + B + table.K * P * PANEL);
    float* row_loss = memory.data() + saved_floats(t, B, 0);
    float* d_table = row_loss + B;
    const Saved saved = saved_in(memory.data(), t, B, 0);
    std::vector<int32_t> times(static_cast<size_t>(B));
    kernels().integers(t_seed, 0, static_cast<uint64_t>(table.K), 0, B, times.data());
    BcJob job = {};
    job.net = &t;
    job.time_table = floats;
    job.q_sample = table.q_sample.data();
    job.states = states;
    job.actions = actions;
    job.t = times.data();
    job.seed = noise_seed;
    job.B = B;
    job.predict_epsilon = predict_epsilon;
    job.saved = &saved;
    job.row_loss = row_loss;
    over_tiles(threads, B, kernels().scratch_floats(t, 1),
               [&](int64_t first, int rows, float* scratch) { kernels().bc_tile(job, first, rows, scratch); });
    const WeightGradients weights(net, 0, out, saved);
    parallel_for(threads, weights.size() + P, [&](int64_t task, int) {
        if (task < weights.size()) return weights.run(task);
        const int64_t p = task - weights.size();
        for (int64_t k = 0; k < table.K; ++k)
            std::memset(d_table + (k * P + p) * PANEL, 0, sizeof(float) * PANEL);
        for (int64_t b = 0; b < B; ++b)
            kernels().column_sums(saved.d_z[0] + (p * B + b) * PANEL, 1,
                                  d_table + (times[static_cast<size_t>(b)] * P + p) * PANEL, true);
    });
    state_gradient(net, saved.d_z[0], B, states, out.flat + net.spec().offsets[4], out.accumulate, threads);
    time_gradient(net, packed, floats, table, d_table, out);
    return mean(row_loss, B) / static_cast<double>(A);
}

// ---- the optimiser ----

double adam_step(const AdamState& state, double lr, int64_t step, double max_norm) {
    constexpr double BETA1 = 0.9, BETA2 = 0.999, EPS = 1e-8;
    const double norm = std::sqrt(kernels().sum_squares(state.gradient, state.size));
    AdamJob job = {};
    job.parameters = state.parameters;
    job.gradient = state.gradient;
    job.exp_avg = state.exp_avg;
    job.exp_avg_sq = state.exp_avg_sq;
    job.size = state.size;
    const double scale = max_norm / (norm + 1e-6);
    job.gradient_scale = max_norm > 0.0 && !(scale >= 1.0) ? static_cast<float>(scale) : 1.0f;
    job.step_size = static_cast<float>(lr / (1.0 - std::pow(BETA1, static_cast<double>(step))));
    job.correction = static_cast<float>(std::sqrt(1.0 - std::pow(BETA2, static_cast<double>(step))));
    job.one_minus_beta1 = static_cast<float>(1.0 - BETA1);
    job.one_minus_beta2 = static_cast<float>(1.0 - BETA2);
    job.beta2 = static_cast<float>(BETA2);
    job.eps = static_cast<float>(EPS);
    kernels().adam(job);
    return norm;
}

}  // namespace dql
