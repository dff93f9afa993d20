// Chains whose arguments were checked once, for callers to whom microseconds matter.
#include <algorithm>
#include <cstring>

#include "binding.h"

namespace dql {

namespace {

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

}  // namespace

// Takes the capsule if its version is known and it tells the probe's address as data_ptr() does.
PyObject* py_use_exchange(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 3, "use_exchange");
        const auto* api =
            static_cast<const DlExchange*>(PyCapsule_GetPointer(args.object(), "dlpack_exchange_api"));
        if (!api) {
            PyErr_Clear();  // another torch's idea of it: the slower ways remain
            return PyBool_FromLong(0);
        }
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
static bool intact(PyObject* places, PyObject* held, long long base) {
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
        if (PyErr_Occurred()) {
            PyErr_Clear();  // it has no address: a stand-in of torch's
            return false;
        }
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

namespace {

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

}  // namespace

PyObject* py_prepare(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 7, "prepare");
        auto prepared = std::make_unique<Prepared>();
        prepared->network = &args.handle<NetworkHandle>();
        prepared->table = &args.handle<TableHandle>();
        check_chain(*prepared->network, *prepared->table);
        prepared->flat = args.object();
        prepared->places = args.object();
        prepared->held = args.object();
        prepared->max_action = static_cast<float>(args.number());
        prepared->bf16 = args.integer() != 0;
        return capsule(std::move(prepared));
    });
}

// Of actions, which are few: cheaper than a call of the kernel for it.
static bool finite(const float* values, int64_t size) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < size; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        largest = std::max(largest, bits & 0x7fffffffu);
    }
    return largest < 0x7f800000u;  // infinity's, and NaN's are above
}

// prepared, states, actions, seed, threads -> whether it ran and the actions are finite; if not, the slow way says why.
PyObject* py_run_prepared(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments args(items, count, 5, "run_prepared");
        const Prepared& p = args.handle<Prepared>();
        DlTensor states, actions;
        if (!exchange || !describe(args.object(), states) || !describe(args.object(), actions))
            return PyBool_FromLong(0);
        const Spec& spec = p.network->spec();
        const bool fits = states.device_type == 1 && states.code == 2 && states.bits == 32 && states.dimensions == 2 &&
                          states.shape[0] > 0 && states.shape[1] == spec.S && actions.dimensions == 2 &&
                          actions.shape[0] == states.shape[0] && actions.shape[1] == spec.A && actions.code == 2 &&
                          actions.bits == 32 && actions.device_type == 1 && in_memory(states.data) &&
                          in_memory(actions.data) && states.shape[0] <= (int64_t{1} << 30) && (!p.bf16 || kernels().bf16) &&
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
        if (!in_memory(reinterpret_cast<const void*>(static_cast<intptr_t>(flat)))) return PyBool_FromLong(0);
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
        return PyBool_FromLong(finite(call.actions, call.B * spec.A));
    });
}

}  // namespace dql
