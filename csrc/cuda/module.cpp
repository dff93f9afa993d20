// The Python module dql.kernels._cuda: host.h with addresses as integers, no torch. Compiled with the emulator it is
// dql.kernels._cuda_emulated, whose addresses are those of the host's memory.
//
// kernels/cuda/binding.py loads it; its callers check sizes, dtypes and contiguity, here only counts and kinds of
// arguments are checked. The GIL is released while kernels are launched.
#include <cstring>

#include "../arguments.h"
#include "calls.h"
#include "host.h"

#if defined(DQL_EMULATED)
#define DQL_MODULE "dql.kernels._cuda_emulated"
#define DQL_INIT PyInit__cuda_emulated
#else
#define DQL_MODULE "dql.kernels._cuda"
#define DQL_INIT PyInit__cuda
#endif

namespace dql {
namespace {

struct MlpHandle : Mlp {
    static constexpr const char* NAME = "dql.cuda.mlp";
};

void integers(PyObject* tuple, int64_t* out, Py_ssize_t expected) {
    const Py_ssize_t size = PyTuple_Size(tuple);
    if (size < 0) throw Failed();
    if (size != expected) throw std::invalid_argument("a tuple of another length was expected");
    for (Py_ssize_t i = 0; i < size; ++i) {
        out[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
        if (PyErr_Occurred()) throw Failed();
    }
}

class Reader : public Arguments {
public:
    using Arguments::Arguments;

    int number_of() { return static_cast<int>(integer()); }
    bool flag() { return integer() != 0; }
    Tiling tiling() {
        const auto precision = static_cast<Precision>(number_of());
        const int cluster = number_of(), m_tiles = number_of();
        const bool resident = flag();
        return {precision, cluster, m_tiles, resident, number_of()};
    }
    // What a launch is told, see calls.h.
    template <class Call>
    Call call() {
        Py_buffer buffer;
        if (PyObject_GetBuffer(object(), &buffer, PyBUF_SIMPLE) != 0) throw Failed();
        Call told;
        const bool whole = buffer.len == static_cast<Py_ssize_t>(sizeof(Call));
        if (whole) std::memcpy(&told, buffer.buf, sizeof(Call));
        PyBuffer_Release(&buffer);
        if (!whole) throw std::invalid_argument("a call is packed in another length than its fields have");
        return told;
    }
};

template <class T = float>
T* maybe(cuda::address value) {
    T* at = reinterpret_cast<T*>(static_cast<uintptr_t>(value));
    if (at && !in_memory(at)) throw std::invalid_argument(Arguments::NO_MEMORY);
    return at;
}
template <class T = float>
T* memory(cuda::address value) {
    T* at = maybe<T>(value);
    if (!at) throw std::invalid_argument(Arguments::NO_MEMORY);
    return at;
}
template <class Call>
Tiling tiling_of(const Call& told) {
    return {static_cast<Precision>(told.precision), static_cast<int>(told.cluster), static_cast<int>(told.m_tiles),
            told.resident != 0, static_cast<int>(told.solo)};
}

template <class Call, class Launch>
PyObject* launched(const Call& told, const Launch& launch) {
    cuda::use_device(static_cast<int>(told.ordinal));
    // a handle: CUDA numbers some from 1
    const cuda::Stream stream = reinterpret_cast<void*>(static_cast<uintptr_t>(told.stream));
    {
        WithoutGil released;
        launch(stream);
    }
    return none();
}

#define DQL_CUDA_FUNCTION(name) PyObject* py_##name(PyObject*, PyObject* const* items, Py_ssize_t count)

DQL_CUDA_FUNCTION(emulated) {
    return guarded([&] {
        Reader args(items, count, 0, "emulated");
        return PyBool_FromLong(cuda::emulated());
    });
}

DQL_CUDA_FUNCTION(versions) {
    return guarded([&] {
        Reader args(items, count, 0, "versions");
        return Py_BuildValue("(ii)", cuda::driver_version(), cuda::runtime_version());
    });
}

DQL_CUDA_FUNCTION(device) {
    return guarded([&] {
        Reader args(items, count, 1, "device");
        const cuda::Device found = cuda::device(args.number_of());
        return Py_BuildValue("(iii)", found.capability, found.multiprocessors, found.shared_per_block);
    });
}

DQL_CUDA_FUNCTION(cannot_run) {
    return guarded([&]() -> PyObject* {
        Reader args(items, count, 1, "cannot_run");
        const std::string reason = cuda::cannot_run(args.number_of());
        return reason.empty() ? none() : PyUnicode_FromString(reason.c_str());
    });
}

DQL_CUDA_FUNCTION(compiled_for) {
    return guarded([&] {
        Reader args(items, count, 1, "compiled_for");
        return PyLong_FromLong(cuda::compiled_for(args.number_of()));
    });
}

DQL_CUDA_FUNCTION(can_run_wide) {
    return guarded([&] {
        Reader args(items, count, 1, "can_run_wide");
        return PyBool_FromLong(cuda::can_run_wide(args.number_of()));
    });
}

DQL_CUDA_FUNCTION(mlp) {
    return guarded([&] {
        Reader args(items, count, 21, "mlp");
        auto net = std::make_unique<MlpHandle>();
        net->S = args.number_of(), net->X = args.number_of(), net->D = args.number_of();
        net->H = args.number_of(), net->L = args.number_of(), net->O = args.number_of();
        net->activation = args.number_of(), net->networks = args.number_of();
        net->size = args.integer(), net->apart = args.integer();
        net->stride = args.number_of(), net->x_column = args.number_of();
        net->time_column = args.number_of(), net->state_column = args.number_of();
        net->first = args.integer(), net->first_bias = args.integer();
        if (net->L < 2 || net->L > MAX_HIDDEN_LAYERS) throw std::invalid_argument("mlp: 2 to 4 hidden layers");
        integers(args.object(), net->hidden, net->L - 1);
        integers(args.object(), net->hidden_bias, net->L - 1);
        net->out = args.integer(), net->out_bias = args.integer();
        int64_t time[4] = {};
        integers(args.object(), time, 4);
        net->time_w1 = time[0], net->time_b1 = time[1], net->time_w3 = time[2], net->time_b3 = time[3];
        return capsule(std::move(net));
    });
}

DQL_CUDA_FUNCTION(sizes) {
    return guarded([&] {
        Reader args(items, count, 11, "sizes");
        const Mlp& net = args.handle<MlpHandle>();
        const Tiling tiling = args.tiling();
        const int64_t B = args.integer(), R = args.integer();
        const int K = args.number_of();
        const bool transposed = args.flag();
        const int networks = args.number_of();
        const int64_t RP = whole_tiles(R, tiling);
        return Py_BuildValue("(LLLLi)", static_cast<long long>(Packed(net, tiling, transposed, B, K).end),
                             static_cast<long long>(SavedPlaces(net, tiling, networks, RP, K).end),
                             static_cast<long long>(BackwardPlaces(net, tiling, networks, RP, K).end),
                             static_cast<long long>(RP), Slices(net, tiling).HP);
    });
}

DQL_CUDA_FUNCTION(actor_sizes) {
    return guarded([&] {
        Reader args(items, count, 9, "actor_sizes");
        const Mlp& net = args.handle<MlpHandle>();
        const Tiling tiling = args.tiling();
        const int64_t B = args.integer();
        const int K = args.number_of(), T = args.number_of();
        const int64_t RP = whole_tiles(B, tiling);
        const SavedPlaces saved(net, tiling, 1, RP, K, 1);
        return Py_BuildValue("(LLLL)", static_cast<long long>(Packed(net, tiling, true, B, T).end),
                             static_cast<long long>(saved.end),
                             static_cast<long long>(BackwardPlaces(net, tiling, 1, RP, K, 1).end),
                             static_cast<long long>(saved.counter));
    });
}

DQL_CUDA_FUNCTION(shared_bytes) {
    return guarded([&] {
        Reader args(items, count, 7, "shared_bytes");
        const Mlp& net = args.handle<MlpHandle>();
        const Tiling tiling = args.tiling();
        return PyLong_FromLongLong(cuda::shared_bytes(net, tiling, args.flag()));
    });
}

DQL_CUDA_FUNCTION(max_clusters) {
    return guarded([&] {
        Reader args(items, count, 8, "max_clusters");
        const int ordinal = args.number_of();
        const Mlp& net = args.handle<MlpHandle>();
        const Tiling tiling = args.tiling();
        return PyLong_FromLong(cuda::max_clusters(ordinal, net, tiling, args.flag()));
    });
}

DQL_CUDA_FUNCTION(compare) {
    return guarded([&] {
        Reader args(items, count, 1, "compare");
        cuda::compare(args.flag());
        return none();
    });
}

DQL_CUDA_FUNCTION(launches) {
    return guarded([&] {
        Reader args(items, count, 0, "launches");
        PyObject* found = PyDict_New();
        if (found == nullptr) throw Failed();
        for (const auto& [name, times] : cuda::launches()) {
            PyObject* number = PyLong_FromLongLong(times);
            const bool put = number != nullptr && PyDict_SetItemString(found, name.c_str(), number) == 0;
            Py_XDECREF(number);
            if (put) continue;
            Py_DECREF(found);
            throw Failed();
        }
        return found;
    });
}

DQL_CUDA_FUNCTION(gradient_workspace) {
    return guarded([&] {
        Reader args(items, count, 10, "gradient_workspace");
        const Mlp& net = args.handle<MlpHandle>();
        const Tiling tiling = args.tiling();
        const int K = args.number_of(), parts = args.number_of();
        const bool parameters = args.flag();
        return PyLong_FromLongLong(cuda::gradient_workspace(net, tiling, K, parts, parameters, args.number_of()));
    });
}

// ---- launches: a network, or none, and what the launch is told ----

DQL_CUDA_FUNCTION(fields) {
    return guarded([&] {
        Reader args(items, count, 0, "fields");
        return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:s}", "prologue", cuda::PrologueCall::NAMES,
                             "chain", cuda::ChainCall::NAMES, "gradients", cuda::GradientCall::NAMES, "cloning",
                             cuda::CloningCall::NAMES, "choose", cuda::ChooseCall::NAMES, "noise",
                             cuda::NoiseCall::NAMES, "begin", cuda::BeginCall::NAMES, "critic_loss",
                             cuda::CriticLossCall::NAMES, "q_loss", cuda::QLossCall::NAMES, "adam",
                             cuda::AdamCall::NAMES);
    });
}

DQL_CUDA_FUNCTION(prologue) {
    return guarded([&] {
        Reader args(items, count, 2, "prologue");
        cuda::PrologueJob job = {};
        job.net = args.handle<MlpHandle>();
        const auto told = args.call<cuda::PrologueCall>();
        job.tiling = tiling_of(told), job.transposed = told.transposed != 0;
        job.flat = memory(told.flat), job.embedding = maybe(told.embedding), job.states = memory(told.states);
        job.B = told.B, job.K = static_cast<int>(told.K);
        job.packed = memory<char>(told.packed);
        job.told = maybe<int32_t>(told.told), job.counter = maybe<int32_t>(told.counter);
        return launched(told, [&](cuda::Stream stream) { cuda::prologue(job, stream); });
    });
}

cuda::ChainJob chain_job(const Mlp& net, const cuda::ChainCall& told) {
    cuda::ChainJob job = {};
    job.net = net;
    job.tiling = tiling_of(told), job.transposed = told.transposed != 0;
    job.first_network = static_cast<int>(told.first_network), job.networks = static_cast<int>(told.networks);
    job.flat = memory(told.flat);
    job.states = maybe(told.states), job.embedding = maybe(told.embedding), job.told = maybe<int32_t>(told.told);
    job.packed = maybe<const char>(told.packed);
    job.steps = maybe(told.steps);
    job.B = told.B, job.N = static_cast<int>(told.N), job.K = static_cast<int>(told.K), job.R = job.B * job.N;
    job.max_action = static_cast<float>(told.max_action);
    job.max_clusters = static_cast<int>(told.max_clusters);
    job.all_rows = told.all_rows != 0;
    job.only_at = maybe(told.only_at), job.only = static_cast<int>(told.only);
    return job;
}

cuda::Cloning cloning_of(const cuda::CloningCall& told) {
    cuda::Cloning c;
    c.actions = memory(told.actions), c.t = memory<const int64_t>(told.t), c.q_sample = memory(told.q_sample);
    c.seed = told.seed, c.seed_at = maybe<const int64_t>(told.seed_at);
    c.T = static_cast<int>(told.T), c.predict_epsilon = told.predict_epsilon != 0;
    c.loss = maybe(told.loss);
    return c;
}

PyObject* forward(const Mlp& net, const cuda::ChainCall& told, const cuda::Cloning& cloning) {
    cuda::ChainJob job = chain_job(net, told);
    job.noise = maybe(told.noise);
    job.seed = told.seed, job.seed_at = maybe<const int64_t>(told.seed_at);
    job.actions_in = maybe(told.actions_in);
    job.out = cloning.planes() > 0 && job.K == 0 ? nullptr : memory(told.out);
    job.saved = maybe<char>(told.saved);
    job.cloning = cloning;
    return launched(told, [&](cuda::Stream stream) { cuda::chain_forward(job, stream); });
}

PyObject* backward(const Mlp& net, const cuda::ChainCall& told, const cuda::Cloning& cloning) {
    cuda::ChainJob job = chain_job(net, told);
    job.d_out = cloning.planes() > 0 && job.K == 0 ? nullptr : memory(told.d_out);
    job.saved = memory<char>(told.saved);
    job.back = memory<char>(told.back);
    job.d_actions = maybe(told.d_actions);
    job.cloning = cloning;
    return launched(told, [&](cuda::Stream stream) { cuda::chain_backward(job, stream); });
}

PyObject* summed(const Mlp& net, const cuda::GradientCall& told, const cuda::Cloning& cloning) {
    cuda::GradientJob job = {};
    job.net = net;
    job.cloning = cloning;
    job.tiling = tiling_of(told);
    job.first_network = static_cast<int>(told.first_network), job.networks = static_cast<int>(told.networks);
    job.flat = memory(told.flat), job.embedding = maybe(told.embedding), job.states = memory(told.states);
    job.B = told.B, job.N = static_cast<int>(told.N), job.K = static_cast<int>(told.K);
    job.R = job.B * job.N, job.RP = whole_tiles(job.R, job.tiling);
    job.saved = memory<const char>(told.saved), job.back = memory<const char>(told.back);
    job.actions_in = maybe(told.actions_in), job.d_q = maybe(told.d_q);
    job.workspace = maybe(told.workspace);
    job.parts = static_cast<int>(told.parts);
    job.d_flat = maybe(told.d_flat), job.d_states = maybe(told.d_states);
    return launched(told, [&](cuda::Stream stream) { cuda::gradients(job, stream); });
}

#define DQL_PASS(name, Call, run)                                                  \
    DQL_CUDA_FUNCTION(name) {                                                      \
        return guarded([&] {                                                       \
            Reader args(items, count, 2, #name);                                   \
            const Mlp& net = args.handle<MlpHandle>();                             \
            return run(net, args.call<Call>(), {});                                \
        });                                                                        \
    }                                                                              \
    DQL_CUDA_FUNCTION(actor_##name) {                                              \
        return guarded([&] {                                                       \
            Reader args(items, count, 3, "actor_" #name);                          \
            const Mlp& net = args.handle<MlpHandle>();                             \
            const auto told = args.call<Call>();                                   \
            return run(net, told, cloning_of(args.call<cuda::CloningCall>()));      \
        });                                                                        \
    }

DQL_PASS(chain_forward, cuda::ChainCall, forward)
DQL_PASS(chain_backward, cuda::ChainCall, backward)
DQL_PASS(gradients, cuda::GradientCall, summed)

DQL_CUDA_FUNCTION(choose) {
    return guarded([&] {
        Reader args(items, count, 1, "choose");
        const auto told = args.call<cuda::ChooseCall>();
        cuda::ChooseJob job = {};
        job.q = memory(told.q), job.actions = memory(told.actions);
        job.seed = told.seed, job.seed_at = maybe<const int64_t>(told.seed_at);
        job.B = told.B, job.N = static_cast<int>(told.N), job.A = static_cast<int>(told.A), job.R = job.B * job.N;
        job.chosen = memory(told.chosen);
        return launched(told, [&](cuda::Stream stream) { cuda::choose(job, stream); });
    });
}

DQL_CUDA_FUNCTION(noise) {
    return guarded([&] {
        Reader args(items, count, 1, "noise");
        const auto told = args.call<cuda::NoiseCall>();
        cuda::NoiseJob job = {};
        job.seed = told.seed, job.seed_at = maybe<const int64_t>(told.seed_at);
        job.K = static_cast<int>(told.K), job.R = told.R, job.A = static_cast<int>(told.A);
        job.out = memory(told.out);
        return launched(told, [&](cuda::Stream stream) { cuda::noise(job, stream); });
    });
}

DQL_CUDA_FUNCTION(begin) {
    return guarded([&] {
        Reader args(items, count, 1, "begin");
        const auto told = args.call<cuda::BeginCall>();
        cuda::BeginJob job = {};
        job.states = memory(told.states), job.actions = memory(told.actions), job.rewards = memory(told.rewards);
        job.next_states = memory(told.next_states), job.masks = memory(told.masks);
        job.to_states = memory(told.to_states), job.to_actions = memory(told.to_actions);
        job.to_rewards = memory(told.to_rewards), job.to_next_states = memory(told.to_next_states);
        job.to_masks = memory(told.to_masks);
        job.size = told.size, job.rows = told.rows, job.first = told.first, job.B = told.B;
        job.S = static_cast<int>(told.S), job.A = static_cast<int>(told.A), job.T = static_cast<int>(told.T);
        job.bc_t = told.bc_t, job.t = memory<int64_t>(told.t), job.coin = told.coin;
        job.target = told.target, job.bc_noise = told.bc_noise, job.actor = told.actor;
        job.seeds = memory<int64_t>(told.seeds), job.scalars = memory(told.scalars);
        job.lr_scale = static_cast<float>(told.lr_scale), job.ema_weight = static_cast<float>(told.ema_weight);
        return launched(told, [&](cuda::Stream stream) { cuda::begin(job, stream); });
    });
}

DQL_CUDA_FUNCTION(critic_loss) {
    return guarded([&] {
        Reader args(items, count, 1, "critic_loss");
        const auto told = args.call<cuda::CriticLossCall>();
        cuda::CriticLossJob job = {};
        job.q_target = memory(told.q_target), job.rewards = memory(told.rewards), job.masks = memory(told.masks);
        job.q = memory(told.q), job.d_q = memory(told.d_q), job.metrics = memory(told.metrics);
        job.B = told.B, job.N = static_cast<int>(told.N), job.discount = static_cast<float>(told.discount);
        return launched(told, [&](cuda::Stream stream) { cuda::critic_loss(job, stream); });
    });
}

DQL_CUDA_FUNCTION(q_loss) {
    return guarded([&] {
        Reader args(items, count, 1, "q_loss");
        const auto told = args.call<cuda::QLossCall>();
        cuda::QLossJob job = {};
        job.q = memory(told.q), job.picked_at = maybe(told.picked_at), job.d_q = memory(told.d_q);
        job.loss = memory(told.loss);
        job.B = told.B, job.picked = static_cast<int>(told.picked), job.eta = static_cast<float>(told.eta);
        return launched(told, [&](cuda::Stream stream) { cuda::q_loss(job, stream); });
    });
}

DQL_CUDA_FUNCTION(adam) {
    return guarded([&] {
        Reader args(items, count, 1, "adam");
        const auto told = args.call<cuda::AdamCall>();
        cuda::AdamJob job = {};
        job.flat = memory(told.flat), job.gradient = memory(told.gradient);
        job.exp_avg = memory(told.exp_avg), job.exp_avg_sq = memory(told.exp_avg_sq), job.step = memory(told.step);
        job.lr = static_cast<float>(told.lr), job.lr_scale_at = maybe(told.lr_scale_at);
        job.max_norm = static_cast<float>(told.max_norm);
        job.average = maybe(told.average);
        job.weight = static_cast<float>(told.weight), job.weight_at = maybe(told.weight_at);
        job.count = told.count, job.sums = memory(told.sums), job.norm = memory(told.norm);
        return launched(told, [&](cuda::Stream stream) { cuda::adam(job, stream); });
    });
}

#define DQL_ENTRY(name, doc) \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_##name)), METH_FASTCALL, doc}
#define DQL_TILING "precision, cluster, m_tiles, resident, solo"

PyMethodDef methods[] = {
    DQL_ENTRY(emulated, "-> bool"),
    DQL_ENTRY(versions, "-> (driver's or 0, runtime's), 13000 for 13.0"),
    DQL_ENTRY(device, "ordinal -> (compute capability, multiprocessors, bytes of shared memory a block)"),
    DQL_ENTRY(cannot_run, "ordinal -> None or why no kernel runs there"),
    DQL_ENTRY(compiled_for, "ordinal -> compute capability that the code which runs there was compiled for"),
    DQL_ENTRY(can_run_wide, "ordinal -> bool: the kernel for 128 rows a tile"),
    DQL_ENTRY(mlp,
              "S, X, D, H, L, O, activation, networks, size of flat, apart, stride, x column, time column, state column, "
              "first, first bias, (hidden, ...), (hidden bias, ...), out, out bias, (time w1, b1, w3, b3) -> mlp"),
    DQL_ENTRY(sizes, "mlp, " DQL_TILING ", B, R, K, transposed, networks run -> bytes (packed, saved, back), RP, HP"),
    DQL_ENTRY(actor_sizes, "mlp, " DQL_TILING ", B, K, T -> bytes (packed, saved, back), where the counter is saved"),
    DQL_ENTRY(shared_bytes, "mlp, " DQL_TILING ", backward -> bytes"),
    DQL_ENTRY(max_clusters, "ordinal, mlp, " DQL_TILING ", backward -> how many are resident at a time"),
    DQL_ENTRY(compare, "same carveout: how kernels that overlap ask for shared memory, to measure"),
    DQL_ENTRY(gradient_workspace, "mlp, " DQL_TILING ", K, parts, parameters, T of a cloned batch or 0 -> floats"),
    DQL_ENTRY(fields, "-> {launch: \"type name;type name;...|type name;...\"}, as calls.h has them"),
    DQL_ENTRY(prologue, "mlp, packed call"),
    DQL_ENTRY(chain_forward, "mlp, packed call"),
    DQL_ENTRY(chain_backward, "mlp, packed call"),
    DQL_ENTRY(gradients, "mlp, packed call"),
    DQL_ENTRY(actor_chain_forward, "mlp, packed call, packed cloning"),
    DQL_ENTRY(actor_chain_backward, "mlp, packed call, packed cloning"),
    DQL_ENTRY(actor_gradients, "mlp, packed call, packed cloning"),
    DQL_ENTRY(choose, "packed call"),
    DQL_ENTRY(noise, "packed call"),
    DQL_ENTRY(begin, "packed call"),
    DQL_ENTRY(critic_loss, "packed call"),
    DQL_ENTRY(q_loss, "packed call"),
    DQL_ENTRY(adam, "packed call"),
    DQL_ENTRY(launches, "-> {kernel: how often the emulator ran it since the last question}"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, DQL_MODULE, nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace dql

extern "C" __attribute__((visibility("default"))) PyObject* DQL_INIT() { return PyModule_Create(&dql::module); }
