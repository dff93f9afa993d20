// The Python module dql.kernels._cuda: host.h with addresses as integers, no torch. Compiled with the emulator it is
// dql.kernels._cuda_emulated, whose addresses are those of the host's memory.
//
// kernels/cuda/binding.py loads it; its callers check sizes, dtypes and contiguity, here only counts and kinds of
// arguments are checked. The GIL is released while kernels are launched.
#include "../arguments.h"
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
    template <class T = float>
    T* address() {  // or null
        return reinterpret_cast<T*>(optional());
    }
    Tiling tiling() {
        const auto precision = static_cast<Precision>(number_of());
        const int cluster = number_of(), m_tiles = number_of();
        return {precision, cluster, m_tiles, flag()};
    }
    void on_device() { cuda::use_device(number_of()); }
    cuda::Stream stream() {  // a handle: CUDA numbers some from 1
        void* handle = PyLong_AsVoidPtr(object());
        if (!handle && PyErr_Occurred()) throw Failed();
        return handle;
    }
};

template <class Launch>
PyObject* launched(const Launch& launch) {
    {
        WithoutGil released;
        launch();
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
        Reader args(items, count, 10, "sizes");
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

DQL_CUDA_FUNCTION(shared_bytes) {
    return guarded([&] {
        Reader args(items, count, 6, "shared_bytes");
        const Mlp& net = args.handle<MlpHandle>();
        const Tiling tiling = args.tiling();
        return PyLong_FromLongLong(cuda::shared_bytes(net, tiling, args.flag()));
    });
}

DQL_CUDA_FUNCTION(max_clusters) {
    return guarded([&] {
        Reader args(items, count, 7, "max_clusters");
        const int ordinal = args.number_of();
        const Mlp& net = args.handle<MlpHandle>();
        const Tiling tiling = args.tiling();
        return PyLong_FromLong(cuda::max_clusters(ordinal, net, tiling, args.flag()));
    });
}

DQL_CUDA_FUNCTION(gradient_workspace) {
    return guarded([&] {
        Reader args(items, count, 8, "gradient_workspace");
        const Mlp& net = args.handle<MlpHandle>();
        const Tiling tiling = args.tiling();
        const int K = args.number_of(), parts = args.number_of();
        return PyLong_FromLongLong(cuda::gradient_workspace(net, tiling, K, parts, args.flag()));
    });
}

DQL_CUDA_FUNCTION(prologue) {
    return guarded([&] {
        Reader args(items, count, 15, "prologue");
        cuda::PrologueJob job = {};
        job.net = args.handle<MlpHandle>();
        job.tiling = args.tiling();
        job.transposed = args.flag();
        job.flat = args.pointer(), job.embedding = args.address(), job.states = args.pointer();
        job.B = args.integer(), job.K = args.number_of();
        job.packed = reinterpret_cast<char*>(args.pointer());
        job.told = args.address<int32_t>();
        args.on_device();
        const cuda::Stream stream = args.stream();
        return launched([&] { cuda::prologue(job, stream); });
    });
}

// network, tiling (4), transposed, first network, networks, flat, packed, steps, B, N, K, max_action
cuda::ChainJob chain_job(Reader& args) {
    cuda::ChainJob job = {};
    job.net = args.handle<MlpHandle>();
    job.tiling = args.tiling();
    job.transposed = args.flag();
    job.first_network = args.number_of(), job.networks = args.number_of();
    job.flat = args.pointer();
    job.packed = args.address<const char>();
    job.steps = args.address();
    job.B = args.integer(), job.N = args.number_of(), job.K = args.number_of();
    job.R = job.B * job.N;
    job.max_action = static_cast<float>(args.number());
    return job;
}

DQL_CUDA_FUNCTION(chain_forward) {
    return guarded([&] {
        Reader args(items, count, 24, "chain_forward");
        cuda::ChainJob job = chain_job(args);
        job.noise = args.address();
        job.seed = args.seed(), job.seed_at = args.address<const int64_t>();
        job.actions_in = args.address();
        job.out = args.pointer();
        job.saved = args.address<char>();
        job.max_clusters = args.number_of();
        args.on_device();
        const cuda::Stream stream = args.stream();
        return launched([&] { cuda::chain_forward(job, stream); });
    });
}

DQL_CUDA_FUNCTION(chain_backward) {
    return guarded([&] {
        Reader args(items, count, 22, "chain_backward");
        cuda::ChainJob job = chain_job(args);
        job.d_out = args.pointer();
        job.saved = reinterpret_cast<char*>(args.pointer());
        job.back = reinterpret_cast<char*>(args.pointer());
        job.d_actions = args.address();
        job.max_clusters = args.number_of();
        args.on_device();
        const cuda::Stream stream = args.stream();
        return launched([&] { cuda::chain_backward(job, stream); });
    });
}

DQL_CUDA_FUNCTION(gradients) {
    return guarded([&] {
        Reader args(items, count, 23, "gradients");
        cuda::GradientJob job = {};
        job.net = args.handle<MlpHandle>();
        job.tiling = args.tiling();
        job.first_network = args.number_of(), job.networks = args.number_of();
        job.flat = args.pointer(), job.embedding = args.address(), job.states = args.pointer();
        job.B = args.integer(), job.N = args.number_of(), job.K = args.number_of();
        job.R = job.B * job.N, job.RP = whole_tiles(job.R, job.tiling);
        job.saved = reinterpret_cast<char*>(args.pointer()), job.back = reinterpret_cast<char*>(args.pointer());
        job.actions_in = args.address(), job.d_q = args.address();
        job.workspace = args.address();
        job.parts = args.number_of();
        job.d_flat = args.address(), job.d_states = args.address();
        args.on_device();
        const cuda::Stream stream = args.stream();
        return launched([&] { cuda::gradients(job, stream); });
    });
}

DQL_CUDA_FUNCTION(choose) {
    return guarded([&] {
        Reader args(items, count, 10, "choose");
        cuda::ChooseJob job = {};
        job.q = args.pointer(), job.actions = args.pointer();
        job.seed = args.seed(), job.seed_at = args.address<const int64_t>();
        job.B = args.integer(), job.N = args.number_of(), job.A = args.number_of();
        job.R = job.B * job.N;
        job.chosen = args.pointer();
        args.on_device();
        const cuda::Stream stream = args.stream();
        return launched([&] { cuda::choose(job, stream); });
    });
}

DQL_CUDA_FUNCTION(noise) {
    return guarded([&] {
        Reader args(items, count, 8, "noise");
        cuda::NoiseJob job = {};
        job.seed = args.seed(), job.seed_at = args.address<const int64_t>();
        job.K = args.number_of(), job.R = args.integer(), job.A = args.number_of();
        job.out = args.pointer();
        args.on_device();
        const cuda::Stream stream = args.stream();
        return launched([&] { cuda::noise(job, stream); });
    });
}

#define DQL_ENTRY(name, doc) \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_##name)), METH_FASTCALL, doc}
#define DQL_TILING "precision, cluster, m_tiles, resident"
#define DQL_JOB "mlp, " DQL_TILING ", transposed, first network, networks, flat, packed, steps, B, N, K, max_action"

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
    DQL_ENTRY(shared_bytes, "mlp, " DQL_TILING ", backward -> bytes"),
    DQL_ENTRY(max_clusters, "ordinal, mlp, " DQL_TILING ", backward -> how many are resident at a time"),
    DQL_ENTRY(gradient_workspace, "mlp, " DQL_TILING ", K, parts, parameters -> floats"),
    DQL_ENTRY(prologue, "mlp, " DQL_TILING ", transposed, flat, embedding, states, B, K, packed, told, ordinal, stream"),
    DQL_ENTRY(chain_forward,
              DQL_JOB ", noise, seed, seed at, actions in, out, saved, max clusters, ordinal, stream"),
    DQL_ENTRY(chain_backward, DQL_JOB ", d_out, saved, back, d_actions, max clusters, ordinal, stream"),
    DQL_ENTRY(gradients, "mlp, " DQL_TILING ", first network, networks, flat, embedding, states, B, N, K, saved, back, "
                         "actions in, d_q, workspace, parts, d_flat, d_states, ordinal, stream"),
    DQL_ENTRY(choose, "q, actions, seed, seed at, B, N, A, chosen, ordinal, stream"),
    DQL_ENTRY(noise, "seed, seed at, K, R, A, out, ordinal, stream"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, DQL_MODULE, nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace dql

extern "C" __attribute__((visibility("default"))) PyObject* DQL_INIT() { return PyModule_Create(&dql::module); }
