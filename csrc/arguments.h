// What the functions of the Python modules share: arguments, capsules, exceptions. The limited C API.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>

namespace dql {

struct Failed {};  // a Python exception is set

// A tensor whose storage was freed has the address 0 plus its offset there; programs and their memory begin above.
inline bool in_memory(const void* address) { return reinterpret_cast<uintptr_t>(address) >= (uintptr_t{4} << 20); }

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

    // How many there are of something.
    int64_t count() {
        const long long value = integer();
        if (value < 0) throw std::invalid_argument("a size is negative");
        return value;
    }

    float* optional() {
        void* value = PyLong_AsVoidPtr(object());
        if (!value && PyErr_Occurred()) throw Failed();
        if (value && !in_memory(value)) throw std::invalid_argument(NO_MEMORY);
        return static_cast<float*>(value);
    }

    float* pointer() {
        float* value = optional();
        if (!value) throw std::invalid_argument(NO_MEMORY);
        return value;
    }

    template <class T>
    T& handle() {
        void* value = PyCapsule_GetPointer(object(), T::NAME);
        if (!value) throw Failed();
        return *static_cast<T*>(value);
    }

    static constexpr const char* NO_MEMORY =
        "a tensor has no memory: is it fake, on the meta device, or was its storage freed? Give one with values";

private:
    PyObject* const* items_;
    Py_ssize_t next_ = 0;
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

inline PyObject* none() {
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

}  // namespace dql
