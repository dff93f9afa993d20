// The Python module dql.kernels._native: the limited C API, addresses of tensors as integers, no torch.
//
// kernels/native.py is its only caller and checks sizes, dtypes and contiguity; here only counts and kinds of arguments
// are checked. Networks, tables and saved chains are capsules. The GIL is released while kernels run, and held while
// weights are packed, which makes the packed weights' bookkeeping safe.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <stdexcept>

#include "engine.h"

namespace dql {
namespace {

struct Failed {};  // a Python exception is set

class Arguments {
public:
    Arguments(PyObject* const* items, Py_ssize_t count, Py_ssize_t expected, const char* function) : items_(items) {
        if (count != expected) {
            PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", function, expected, count);
            throw Failed();
        }
    }

    PyObject* object() { return items_[next_++]; }

    long long integer() {
        const long long value = PyLong_AsLongLong(object());
        if (value == -1 && PyErr_Occurred()) throw Failed();
        return value;
    }

    uint64_t seed() {
        const unsigned long long value = PyLong_AsUnsignedLongLong(object());
        if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw Failed();
        return value;
    }

    double number() {
        const double value = PyFloat_AsDouble(object());
        if (value == -1.0 && PyErr_Occurred()) throw Failed();
        return value;
    }

    float* pointer() {
        void* value = PyLong_AsVoidPtr(object());
        if (!value && PyErr_Occurred()) throw Failed();
        return static_cast<float*>(value);
    }

    template <class T>
    T& handle() {
        void* value = PyCapsule_GetPointer(object(), T::NAME);
        if (!value) throw Failed();
        return *static_cast<T*>(value);
    }

private:
    PyObject* const* items_;
    Py_ssize_t next_ = 0;
};

// ---- tensors without torch's headers: DLPack's C exchange API (dlpack.h, version 1.2), which a torch.Tensor offers as
// a capsule; ten times faster than calling data_ptr() ----

struct DlTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct DlExchange {
    uint32_t major, minor;
    void* previous;
    void *allocate, *managed_from_object, *managed_to_object;
    int (*tensor_from_object)(void* object, DlTensor* out);
    void* current_stream;
};

const DlExchange* exchange = nullptr;

bool describe(PyObject* object, DlTensor& tensor) {
    if (exchange->tensor_from_object(object, &tensor) == 0) return true;
    PyErr_Clear();
    return false;
}

// The tensor's address, or 0 and a Python exception.
long long address(PyObject* tensor) {
    DlTensor described;
    if (exchange && describe(tensor, described))
        return static_cast<long long>(reinterpret_cast<intptr_t>(described.data)) +
               static_cast<long long>(described.byte_offset);
    static PyObject* const method = PyUnicode_InternFromString("data_ptr");
    PyObject* value = PyObject_CallMethodObjArgs(tensor, method, nullptr);
    if (!value) return 0;
    const long long at = PyLong_AsLongLong(value);
    Py_DECREF(value);
    return at;
}

struct NetworkHandle : Network {
    static constexpr const char* NAME = "dql.network";
    using Network::Network;
};
struct TableHandle : Table {
    static constexpr const char* NAME = "dql.table";
};
struct SavedHandle : SavedChain {
    static constexpr const char* NAME = "dql.saved_chain";
};

template <class T>
PyObject* capsule(std::unique_ptr<T> object) {
    PyObject* made = PyCapsule_New(object.get(), T::NAME, [](PyObject* self) {
        delete static_cast<T*>(PyCapsule_GetPointer(self, T::NAME));
    });
    if (!made) throw Failed();
    object.release();
    return made;
}

class WithoutGil {
public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    ~WithoutGil() { PyEval_RestoreThread(state_); }
    WithoutGil(const WithoutGil&) = delete;

private:
    PyThreadState* state_;
};

PyObject* none() {
    Py_INCREF(Py_None);
    return Py_None;
}

// Exceptions become Python's.
template <class Body>
PyObject* guarded(const Body& body) {
    try {
        return body();
    } catch (const Failed&) {
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// ---- the functions; `doc` names the arguments in order ----

PyObject* py_variants(PyObject*, PyObject* const*, Py_ssize_t) {
    return guarded([&]() -> PyObject* {
        PyObject* found = PyDict_New();
        if (!found) throw Failed();
        for (const Variant& variant : variants()) {
            PyObject* value = variant.kernels ? none() : PyUnicode_FromString(variant.reason.c_str());
            const int failed = value ? PyDict_SetItemString(found, variant.name, value) : -1;
            Py_XDECREF(value);
            if (failed) {
                Py_DECREF(found);
                throw Failed();
            }
        }
        return found;
    });
}

PyObject* py_force(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 1, "force");
        Py_ssize_t size = 0;
        const char* name = PyUnicode_AsUTF8AndSize(args.object(), &size);
        if (!name) throw Failed();
        force_variant(std::string(name, static_cast<size_t>(size)));
        return none();
    });
}

PyObject* py_in_use(PyObject*, PyObject* const*, Py_ssize_t) {
    return guarded([&] { return Py_BuildValue("(sN)", kernels().name, PyBool_FromLong(kernels().bf16)); });
}

PyObject* py_network(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 9, "network");
        Spec spec;
        spec.critic = args.integer() != 0;
        spec.S = static_cast<int>(args.integer());
        spec.A = static_cast<int>(args.integer());
        spec.D = static_cast<int>(args.integer());
        spec.H = static_cast<int>(args.integer());
        spec.L = static_cast<int>(args.integer());
        spec.activation = static_cast<int>(args.integer());
        spec.flat_size = args.integer();
        PyObject* offsets = args.object();
        const Py_ssize_t size = PyTuple_Size(offsets);
        const Py_ssize_t expected = 2 * (spec.L + 1) * (spec.critic ? 2 : 1) + (spec.critic ? 0 : 4);
        if (size < 0) throw Failed();
        if (spec.L < 2 || spec.L > MAX_LAYERS || size != expected) throw std::invalid_argument("network: bad offsets");
        for (Py_ssize_t i = 0; i < size; ++i) {
            spec.offsets.push_back(PyLong_AsLongLong(PyTuple_GetItem(offsets, i)));
            if (PyErr_Occurred()) throw Failed();
        }
        return capsule(std::make_unique<NetworkHandle>(std::move(spec)));
    });
}

PyObject* py_table(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 5, "table");
        static uint64_t next_id = 0;
        auto table = std::make_unique<TableHandle>();
        table->id = ++next_id;
        table->K = static_cast<int>(args.integer());
        table->D = static_cast<int>(args.integer());
        const float *steps = args.pointer(), *embedding = args.pointer(), *q_sample = args.pointer();
        if (steps) table->steps.assign(steps, steps + table->K * STEP_COLUMNS);
        table->embedding.assign(embedding, embedding + static_cast<int64_t>(table->K) * table->D);
        if (q_sample) table->q_sample.assign(q_sample, q_sample + table->K * 2);
        return capsule(std::move(table));
    });
}

PyObject* py_all_finite(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 2, "all_finite");
        const float* values = args.pointer();
        return PyBool_FromLong(kernels().all_finite(values, args.integer()));
    });
}

// Takes the capsule if its version is known and it tells the probe's address as data_ptr() does.
PyObject* py_use_exchange(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 3, "use_exchange");
        const auto* api =
            static_cast<const DlExchange*>(PyCapsule_GetPointer(args.object(), "dlpack_exchange_api"));
        if (!api) throw Failed();
        PyObject* probe = args.object();
        const float* expected = args.pointer();
        DlTensor described = {};
        exchange = api->major == 1 && api->tensor_from_object ? api : nullptr;
        if (exchange && (!describe(probe, described) ||
                         static_cast<char*>(described.data) + described.byte_offset !=
                             reinterpret_cast<const char*>(expected)))
            exchange = nullptr;
        return PyBool_FromLong(exchange != nullptr);
    });
}

// Whether each (owner dict, name, offset) in `places` holds a tensor at base + offset, and each (owner dict, name,
// object) in `held` still that object: nobody took a parameter out of its flat buffer or replaced a layer.
bool intact(PyObject* places, PyObject* held, long long base) {
    const Py_ssize_t size = PyTuple_Size(places), objects = PyTuple_Size(held);
    if (size < 0 || objects < 0) throw Failed();
    for (Py_ssize_t i = 0; i < objects; ++i) {
        PyObject* place = PyTuple_GetItem(held, i);
        PyObject* found = PyDict_GetItemWithError(PyTuple_GetItem(place, 0), PyTuple_GetItem(place, 1));
        if (!found && PyErr_Occurred()) throw Failed();
        if (found != PyTuple_GetItem(place, 2)) return false;
    }
    for (Py_ssize_t i = 0; i < size; ++i) {
        PyObject* place = PyTuple_GetItem(places, i);
        PyObject* tensor = PyDict_GetItemWithError(PyTuple_GetItem(place, 0), PyTuple_GetItem(place, 1));
        if (!tensor && PyErr_Occurred()) throw Failed();
        if (!tensor || tensor == Py_None) return false;
        const long long at = address(tensor);
        if (PyErr_Occurred()) throw Failed();
        if (at != base + PyLong_AsLongLong(PyTuple_GetItem(place, 2))) return false;
    }
    return true;
}

PyObject* py_intact(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 3, "intact");
        PyObject *places = args.object(), *held = args.object();
        return PyBool_FromLong(intact(places, held, args.integer()));
    });
}

// A chain whose arguments were checked once; what can have changed since is looked at in every call. Its references are
// borrowed: the Python object that owns the capsule holds them, where the garbage collector sees them.
struct Prepared {
    static constexpr const char* NAME = "dql.prepared";
    NetworkHandle* network;
    TableHandle* table;
    PyObject *flat, *places, *held;
    float max_action;
    bool bf16;
};

PyObject* py_prepare(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 7, "prepare");
        auto prepared = std::make_unique<Prepared>();
        prepared->network = &args.handle<NetworkHandle>();
        prepared->table = &args.handle<TableHandle>();
        prepared->flat = args.object();
        prepared->places = args.object();
        prepared->held = args.object();
        prepared->max_action = static_cast<float>(args.number());
        prepared->bf16 = args.integer() != 0;
        return capsule(std::move(prepared));
    });
}

// prepared, states, actions, seed, threads -> whether it ran; if not, nothing was written and the slow way says why.
PyObject* py_run_prepared(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments args(items, count, 5, "run_prepared");
        const Prepared& p = args.handle<Prepared>();
        DlTensor states, actions;
        if (!exchange || !describe(args.object(), states) || !describe(args.object(), actions)) return PyBool_FromLong(0);
        const Spec& spec = p.network->spec();
        const bool fits = states.device_type == 1 && states.code == 2 && states.bits == 32 && states.dimensions == 2 &&
                          states.shape[0] > 0 && states.shape[1] == spec.S && actions.dimensions == 2 &&
                          actions.shape[0] == states.shape[0] && actions.shape[1] == spec.A && actions.code == 2 &&
                          actions.bits == 32 && actions.device_type == 1 &&
                          (!states.strides || ((states.strides[0] == spec.S || states.shape[0] == 1) &&
                                               (states.strides[1] == 1 || spec.S == 1)));
        if (!fits) return PyBool_FromLong(0);
        ChainCall call = {};
        call.table = p.table;
        call.states = reinterpret_cast<const float*>(static_cast<char*>(states.data) + states.byte_offset);
        call.actions = reinterpret_cast<float*>(static_cast<char*>(actions.data) + actions.byte_offset);
        call.B = states.shape[0];
        call.N = 1;
        call.seed = args.seed();
        call.max_action = p.max_action;
        call.bf16 = p.bf16;
        call.threads = static_cast<int>(args.integer());
        const long long flat = address(p.flat);
        if (PyErr_Occurred()) throw Failed();
        if (!intact(p.places, p.held, flat)) return PyBool_FromLong(0);
        if (!kernels().all_finite(call.states, call.B * spec.S)) return PyBool_FromLong(0);
        static PyObject* const attribute = PyUnicode_InternFromString("_version");
        PyObject* counted = PyObject_GetAttr(p.flat, attribute);
        if (!counted) {
            PyErr_Clear();  // an inference tensor counts no versions
            return PyBool_FromLong(0);
        }
        const long long version = PyLong_AsLongLong(counted);
        Py_DECREF(counted);
        call.packed = p.network->packed(reinterpret_cast<const float*>(static_cast<intptr_t>(flat)), version,
                                        FORWARD | (call.bf16 ? BF16 : 0));
        call.time_table = p.network->time_table(*call.packed, *call.table);
        {
            WithoutGil released;
            chain(call, nullptr);
        }
        return PyBool_FromLong(1);
    });
}

// network, flat, version, table, states, B, N, noise, seed, max_action, bf16, threads, actions
ChainCall chain_call(Arguments& args, int parts) {
    NetworkHandle& network = args.handle<NetworkHandle>();
    const float* flat = args.pointer();
    const int64_t version = args.integer();
    ChainCall call = {};
    call.table = &args.handle<TableHandle>();
    call.states = args.pointer();
    call.B = args.integer();
    call.N = args.integer();
    call.noise = args.pointer();
    call.seed = args.seed();
    call.max_action = static_cast<float>(args.number());
    call.bf16 = args.integer() != 0;
    call.threads = static_cast<int>(args.integer());
    call.actions = args.pointer();
    call.packed = network.packed(flat, version, parts | (call.bf16 ? BF16 : 0));
    call.time_table = network.time_table(*call.packed, *call.table);
    return call;
}

PyObject* py_chain(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 13, "chain");
        const ChainCall call = chain_call(args, FORWARD);
        {
            WithoutGil released;
            chain(call, nullptr);
        }
        return none();
    });
}

PyObject* py_chain_saved(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 13, "chain_saved");
        const ChainCall call = chain_call(args, FORWARD | BACKWARD);
        auto saved = std::make_unique<SavedHandle>();
        {
            WithoutGil released;
            chain(call, saved.get());
        }
        return capsule(std::move(saved));
    });
}

PyObject* py_chain_backward(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 10, "chain_backward");
        NetworkHandle& network = args.handle<NetworkHandle>();
        SavedHandle& saved = args.handle<SavedHandle>();
        const Table& table = args.handle<TableHandle>();
        const float* states = args.pointer();
        const float* d_actions = args.pointer();
        const float d_scale = static_cast<float>(args.number());
        Gradients out = {};
        out.flat = args.pointer();
        out.accumulate = args.integer() != 0;
        out.d_states = args.pointer();
        const int threads = static_cast<int>(args.integer());
        if (saved.spent) throw std::runtime_error("chain_backward: this saved chain was used before");
        {
            WithoutGil released;
            chain_backward(network, saved, table, states, d_actions, d_scale, out, threads);
        }
        return none();
    });
}

PyObject* py_spent(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 1, "spent");
        return PyBool_FromLong(args.handle<SavedHandle>().spent);
    });
}

PyObject* py_select(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 17, "select");
        ChainCall call = chain_call(args, FORWARD);
        NetworkHandle& critic = args.handle<NetworkHandle>();
        const float* flat = args.pointer();
        const int64_t version = args.integer();
        const uint64_t draw_seed = args.seed();
        const std::shared_ptr<Packed> packed = critic.packed(flat, version, FORWARD);
        {
            WithoutGil released;
            select(call, *packed, draw_seed, call.actions);
        }
        return none();
    });
}

PyObject* py_q_values(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 10, "q_values");
        NetworkHandle& critic = args.handle<NetworkHandle>();
        const float* flat = args.pointer();
        const std::shared_ptr<Packed> packed = critic.packed(flat, args.integer(), FORWARD);
        const float* states = args.pointer();
        const int64_t B = args.integer();
        const float* actions = args.pointer();
        const int64_t N = args.integer();
        float *q1 = args.pointer(), *q2 = args.pointer();
        const int threads = static_cast<int>(args.integer());
        {
            WithoutGil released;
            q_values(*packed, states, B, actions, N, q1, q2, threads);
        }
        return none();
    });
}

PyObject* py_target_q(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 12, "target_q");
        NetworkHandle& critic = args.handle<NetworkHandle>();
        const float* flat = args.pointer();
        const std::shared_ptr<Packed> packed = critic.packed(flat, args.integer(), FORWARD);
        const float* states = args.pointer();
        const int64_t B = args.integer();
        const float* actions = args.pointer();
        const int64_t N = args.integer();
        const float *rewards = args.pointer(), *masks = args.pointer();
        const float discount = static_cast<float>(args.number());
        float* out = args.pointer();
        const int threads = static_cast<int>(args.integer());
        double mean;
        {
            WithoutGil released;
            mean = target_q(*packed, states, B, actions, N, rewards, masks, discount, out, threads);
        }
        return PyFloat_FromDouble(mean);
    });
}

PyObject* py_critic_gradient(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 9, "critic_gradient");
        NetworkHandle& critic = args.handle<NetworkHandle>();
        const float* flat = args.pointer();
        const std::shared_ptr<Packed> packed = critic.packed(flat, args.integer(), FORWARD | BACKWARD);
        const float* states = args.pointer();
        const float* actions = args.pointer();
        const int64_t B = args.integer();
        const float* target = args.pointer();
        const Gradients out = {args.pointer(), false, nullptr};
        const int threads = static_cast<int>(args.integer());
        CriticLoss loss;
        {
            WithoutGil released;
            loss = critic_gradient(critic, *packed, states, actions, B, target, out, threads);
        }
        return Py_BuildValue("(dd)", loss.loss, loss.q);
    });
}

PyObject* py_q_gradient(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 9, "q_gradient");
        NetworkHandle& critic = args.handle<NetworkHandle>();
        const float* flat = args.pointer();
        const std::shared_ptr<Packed> packed = critic.packed(flat, args.integer(), FORWARD | BACKWARD);
        const int which = static_cast<int>(args.integer());
        const float* states = args.pointer();
        const float* actions = args.pointer();
        const int64_t B = args.integer();
        float* d_actions = args.pointer();
        const int threads = static_cast<int>(args.integer());
        QMeans means;
        {
            WithoutGil released;
            means = q_gradient(*packed, which, states, actions, B, d_actions, threads);
        }
        return Py_BuildValue("(dd)", means.q, means.other);
    });
}

PyObject* py_bc_gradient(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 13, "bc_gradient");
        NetworkHandle& network = args.handle<NetworkHandle>();
        const float* flat = args.pointer();
        const std::shared_ptr<Packed> packed = network.packed(flat, args.integer(), FORWARD | BACKWARD);
        const Table& table = args.handle<TableHandle>();
        const float* states = args.pointer();
        const float* actions = args.pointer();
        const int64_t B = args.integer();
        const uint64_t t_seed = args.seed(), noise_seed = args.seed();
        const bool predict_epsilon = args.integer() != 0;
        const Gradients out = {args.pointer(), args.integer() != 0, nullptr};
        const int threads = static_cast<int>(args.integer());
        network.time_table(*packed, table);  // made here, under the GIL
        double loss;
        {
            WithoutGil released;
            loss = bc_gradient(network, *packed, table, states, actions, B, t_seed, noise_seed, predict_epsilon, out,
                               threads);
        }
        return PyFloat_FromDouble(loss);
    });
}

PyObject* py_adam(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 8, "adam");
        AdamState state = {};
        state.parameters = args.pointer();
        state.gradient = args.pointer();
        state.exp_avg = args.pointer();
        state.exp_avg_sq = args.pointer();
        state.size = args.integer();
        const double lr = args.number();
        const int64_t step = args.integer();
        const double max_norm = args.number();
        double norm;
        {
            WithoutGil released;
            norm = adam_step(state, lr, step, max_norm);
        }
        return PyFloat_FromDouble(norm);
    });
}

PyObject* py_lerp(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 4, "lerp");
        float* target = args.pointer();
        const float* source = args.pointer();
        const int64_t size = args.integer();
        const float weight = static_cast<float>(args.number());
        {
            WithoutGil released;
            kernels().lerp(target, source, size, weight);
        }
        return none();
    });
}

// For tests: the activation and its slope, and the noise, as the kernels compute them.
PyObject* py_activate(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 4, "activate");
        const int kind = static_cast<int>(args.integer());
        float *z = args.pointer(), *slope = args.pointer();
        kernels().activate(kind, z, slope, args.integer());
        return none();
    });
}

PyObject* py_fma_ceiling(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 2, "fma_ceiling");
        const double seconds = args.number();
        return PyFloat_FromDouble(kernels().fma_ceiling(seconds, args.integer() != 0));
    });
}

#define DQL_FUNCTION(name, doc) \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_##name)), METH_FASTCALL, doc}
#define DQL_CHAIN_DOC "network, flat, version, table, states, B, N, noise, seed, max_action, bf16, threads, actions"

PyMethodDef methods[] = {
    DQL_FUNCTION(variants, "-> {name: None or why this CPU cannot run it}, the fastest first"),
    DQL_FUNCTION(force, "name; '' undoes it"),
    DQL_FUNCTION(in_use, "-> (name, has bf16)"),
    DQL_FUNCTION(network, "is critic, S, A, D, H, L, activation, size of flat, offsets -> network"),
    DQL_FUNCTION(table, "K, D, steps [K, 6] or 0, embedding [K, D], q_sample [K, 2] or 0 -> table"),
    DQL_FUNCTION(all_finite, "values, count -> bool"),
    DQL_FUNCTION(use_exchange, "DLPack exchange API, a tensor, its address -> whether it is used"),
    DQL_FUNCTION(intact, "((dict, key, offset), ...), ((dict, key, object), ...), base -> bool"),
    DQL_FUNCTION(prepare, "network, table, flat tensor, places, held, max_action, bf16 -> prepared"),
    DQL_FUNCTION(run_prepared, "prepared, states, actions, seed, threads -> whether it ran"),
    DQL_FUNCTION(chain, DQL_CHAIN_DOC),
    DQL_FUNCTION(chain_saved, DQL_CHAIN_DOC " -> saved chain"),
    DQL_FUNCTION(chain_backward, "network, saved, table, states, d_actions, d_scale, d_flat or 0, accumulate, "
                                 "d_states or 0, threads"),
    DQL_FUNCTION(spent, "saved chain -> bool"),
    DQL_FUNCTION(select, DQL_CHAIN_DOC " [B, A], critic, flat, version, draw seed"),
    DQL_FUNCTION(q_values, "critic, flat, version, states, B, actions, N, q1, q2, threads"),
    DQL_FUNCTION(target_q, "critic, flat, version, states, B, actions, N, rewards, masks, discount, out, threads "
                           "-> mean"),
    DQL_FUNCTION(critic_gradient, "critic, flat, version, states, actions, B, target, d_flat, threads -> (loss, q)"),
    DQL_FUNCTION(q_gradient, "critic, flat, version, which, states, actions, B, d_actions, threads "
                             "-> (mean Q, mean |other Q|)"),
    DQL_FUNCTION(bc_gradient, "network, flat, version, table, states, actions, B, t seed, noise seed, "
                              "predict_epsilon, d_flat, accumulate, threads -> loss"),
    DQL_FUNCTION(adam, "parameters, gradient, exp_avg, exp_avg_sq, size, lr, step, max norm -> norm"),
    DQL_FUNCTION(lerp, "target, source, size, weight"),
    DQL_FUNCTION(activate, "kind, z, slope or 0, size"),
    DQL_FUNCTION(fma_ceiling, "seconds, bf16 -> FLOP/s of a loop on registers"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "The native CPU kernels; see kernels/native.py.", 0, methods, nullptr, nullptr,
    nullptr, nullptr};

}  // namespace
}  // namespace dql

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&dql::module); }
