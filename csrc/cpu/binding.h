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
    uint64_t table = 0;            // whose steps were run
    std::vector<int64_t> offsets;  // of the network's tensors
};

// A denoiser that runs the steps of this table, or std::invalid_argument.
void check_chain(const NetworkHandle& network, const TableHandle& table);

// prepared.cpp
PyObject* py_use_exchange(PyObject*, PyObject* const* items, Py_ssize_t count);
PyObject* py_intact(PyObject*, PyObject* const* items, Py_ssize_t count);
PyObject* py_prepare(PyObject*, PyObject* const* items, Py_ssize_t count);
PyObject* py_run_prepared(PyObject*, PyObject* const* items, Py_ssize_t count);

}  // namespace dql
