// Handles and functions that module.cpp and prepared.cpp share.
#pragma once

#include "arguments.h"
#include "engine.h"

namespace dql {

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

// prepared.cpp
PyObject* py_use_exchange(PyObject*, PyObject* const* items, Py_ssize_t count);
PyObject* py_intact(PyObject*, PyObject* const* items, Py_ssize_t count);
PyObject* py_prepare(PyObject*, PyObject* const* items, Py_ssize_t count);
PyObject* py_run_prepared(PyObject*, PyObject* const* items, Py_ssize_t count);

}  // namespace dql
