// Assertions for the C++ tests, each of which is a program of its own:
//
//   static void adds() { CHECK_EQ(1 + 1, 2); }
//   int main() { RUN(adds); return check::report(); }
//
// A failed check prints where, what and the values, and the test goes on. Checks may be made from any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <sstream>

namespace check {

inline std::atomic<int> failures{0};

template <class... Parts>
void fail(const char* file, int line, const Parts&... parts) {
    constexpr int kShown = 20;  // a wrong kernel is wrong in a million elements
    if (failures.fetch_add(1) >= kShown) return;
    std::ostringstream text;
    text.precision(17);
    text << file << ":" << line << ": ";
    (text << ... << parts) << "\n";
    std::cerr << text.str() << std::flush;
}

template <class Test>
void run(const char* name, Test test) {
    const int before = failures;
    const auto start = std::chrono::steady_clock::now();
    test();
    const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    std::printf("  %s %s (%.0f ms)\n", failures == before ? "ok    " : "FAILED", name, ms);
    std::fflush(stdout);  // a child that is forked must not print it again
}

// What main returns.
inline int report() {
    if (failures > 0) std::printf("  %d checks failed\n", failures.load());
    return failures > 0 ? 1 : 0;
}

}  // namespace check

#define RUN(test) check::run(#test, test)

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) check::fail(__FILE__, __LINE__, "not true: ", #condition); \
    } while (false)

#define CHECK_EQ(left, right)                                                                                   \
    do {                                                                                                        \
        const auto left_ = (left);                                                                              \
        const auto right_ = (right);                                                                            \
        if (!(left_ == right_))                                                                                 \
            check::fail(__FILE__, __LINE__, #left, " is ", left_, ", but ", #right, " is ", right_);             \
    } while (false)

// |left - right| <= tolerance; NaN is near nothing.
#define CHECK_NEAR(left, right, tolerance)                                                                      \
    do {                                                                                                        \
        const double left_ = (left), right_ = (right), tolerance_ = (tolerance);                                \
        if (!(std::fabs(left_ - right_) <= tolerance_))                                                         \
            check::fail(__FILE__, __LINE__, #left, " is ", left_, ", but ", #right, " is ", right_, ": ",        \
                        std::fabs(left_ - right_), " apart, allowed is ", tolerance_);                          \
    } while (false)
