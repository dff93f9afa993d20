// What a parallel_for costs, on a machine with two cores to spare:
//   g++ -std=c++17 -O2 -pthread -Icsrc csrc/cpu/pool.cpp csrc/tests/bench_pool.cpp -o bench_pool && ./bench_pool
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "../cpu/pool.h"

namespace {

using Clock = std::chrono::steady_clock;

double micros(Clock::time_point since) {
    return std::chrono::duration<double, std::micro>(Clock::now() - since).count();
}

void work(double us) {
    for (const auto start = Clock::now(); us > 0 && micros(start) < us;) {
    }
}

// A cache line from one core to another and back. A virtual machine does not choose its cores, nor keep them: this
// belongs beside every time of two threads.
void measure_round_trip() {
    alignas(64) static std::atomic<int> ball{0};
    constexpr int kRounds = 200, kBatches = 2000;
    std::thread other([] {
        for (int i = 0; i < kRounds * kBatches; ++i) {
            while (ball.load(std::memory_order_acquire) != 2 * i + 1) {
            }
            ball.store(2 * i + 2, std::memory_order_release);
        }
    });
    std::vector<double> times;
    for (int batch = 0; batch < kBatches; ++batch) {
        const auto start = Clock::now();
        for (int i = batch * kRounds; i < (batch + 1) * kRounds; ++i) {
            ball.store(2 * i + 1, std::memory_order_release);
            while (ball.load(std::memory_order_acquire) != 2 * i + 2) {
            }
        }
        times.push_back(micros(start) * 1e3 / kRounds);
    }
    other.join();
    std::sort(times.begin(), times.end());
    std::printf("round trip between two cores: %.0f ns at the least, %.0f median\n", times[0], times[kBatches / 2]);
}

// Calls with a gap before each, in which the caller works as Python does between two native calls.
void measure(int threads, int64_t tasks, double task_us, double gap_us) {
    constexpr int kCalls = 1000;
    std::vector<double> times;
    int64_t by_others = 0;
    for (int call = 0; call < kCalls; ++call) {
        work(gap_us);
        std::vector<int64_t> done(static_cast<size_t>(threads));
        const auto start = Clock::now();
        dql::parallel_for(threads, tasks, [&](int64_t, int worker) {
            work(task_us);
            ++done[worker];
        });
        times.push_back(micros(start));
        by_others += tasks - done[0];
    }
    std::sort(times.begin(), times.end());
    std::printf("%2d threads, %2d x %3.0f us, %4.0f us apart: %7.1f us median, %7.1f p95, %3.0f%% by workers\n",
                threads, static_cast<int>(tasks), task_us, gap_us, times[kCalls / 2], times[kCalls * 95 / 100],
                100.0 * double(by_others) / double(kCalls * tasks));
}

// A plain loop's overhead: one thread, or one task.
void measure_inline(int threads, int64_t tasks) {
    constexpr int kCalls = 10000000;
    int64_t sum = 0;
    const auto start = Clock::now();
    for (int call = 0; call < kCalls; ++call)
        dql::parallel_for(threads, tasks, [&](int64_t task, int) { sum += task + 1; });
    std::printf("%2d threads, %2d empty tasks, no hand-over: %.1f ns a call%s\n", threads, static_cast<int>(tasks),
                micros(start) * 1e3 / kCalls, sum == 0 ? "?" : "");  // sum keeps the loop from being removed
}

}  // namespace

int main() {
    measure_round_trip();
    measure_inline(2, 1);
    measure_inline(1, 2);
    for (double gap_us : {0.0, 10.0, 100.0, 1000.0}) measure(2, 2, 0, gap_us);
    for (double gap_us : {0.0, 10.0, 100.0, 1000.0}) measure(2, 2, 300, gap_us);
    measure(8, 32, 100, 0);  // more threads than cores
}
