// What the tests of the emulator share: launches, what they throw, and all of it in every order.
#pragma once

#include <functional>
#include <string>

#include "../cuda/device.h"
#include "../cuda/emulator/emulator.cpp"
#include "check.h"

namespace emulated {

using namespace dql;
using namespace dql::device;
using emulator::Order;

constexpr Order ORDERS[] = {Order::EAGER, Order::LATE, Order::RANDOM};

struct Launch {
    int64_t x = 1, y = 1;
    int cluster = 1, threads = 64;
    int64_t shared = 4096;
};

inline void run(const Launch& launch, const std::function<void()>& body) {
    emulator::run(body, launch.x, launch.y, launch.cluster, launch.threads, launch.shared);
}

// What went wrong, or "nothing".
inline std::string error_of(const Launch& launch, const std::function<void()>& body) {
    try {
        run(launch, body);
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "nothing";
}

inline void says(const char* file, int line, const std::string& text, const std::string& part) {
    if (text.find(part) == std::string::npos) check::fail(file, line, "\"", text, "\" does not say \"", part, "\"");
}
#define SAYS(text, part) says(__FILE__, __LINE__, text, part)

// In every order, with several seeds.
inline void always(const std::function<void()>& test) {
    for (const Order order : ORDERS)
        for (uint64_t seed = 0; seed < 20; ++seed) {
            emulator::order(order);
            emulator::seed(seed);
            test();
        }
    emulator::order(Order::RANDOM);
}

// How many of 50 random runs say so.
inline int times(const std::function<bool()>& holds) {
    int count = 0;
    for (uint64_t seed = 0; seed < 50; ++seed) {
        emulator::seed(seed);
        count += holds();
    }
    return count;
}

template <class Type>
Type* shared_at(int byte) {
    return reinterpret_cast<Type*>(shared_memory() + byte);
}
inline Barrier* barrier_at(int byte) { return shared_at<Barrier>(byte); }

inline void make_barrier(int byte, int arrivals = 1) {
    if (thread() == 0) {
        barrier_init(barrier_at(byte), arrivals);
        barriers_ready();
    }
    sync_cluster();
}

}  // namespace emulated
