// The pool's contract (pool.h). Needs a POSIX system for fork, waitpid and getrusage.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "check.h"
#include "../cpu/pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1  // what g++ defines
#endif
#endif

namespace {

using Clock = std::chrono::steady_clock;

double millis(Clock::time_point since) {
    return std::chrono::duration<double, std::milli>(Clock::now() - since).count();
}

void work(double ms) {
    for (const auto start = Clock::now(); millis(start) < ms;) {
    }
}

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// One call in which every task must run exactly once, by a worker below `threads` that does nothing else meanwhile.
// What the tasks write is plain memory: ThreadSanitizer sees whether the call orders it before its return.
bool runs_every_task_once(int threads, int64_t tasks, double task_ms = 0) {
    const int workers = std::max(threads, 1);
    std::vector<int> runs(static_cast<size_t>(std::max<int64_t>(tasks, 0)));
    std::vector<std::atomic<bool>> busy(static_cast<size_t>(workers));
    std::atomic<bool> fair{true};
    dql::parallel_for(threads, tasks, [&](int64_t task, int worker) {
        if (worker < 0 || worker >= workers || busy[worker].exchange(true)) {
            fair = false;
            return;
        }
        work(task_ms);
        ++runs[task];
        busy[worker] = false;
    });
    return fair && std::all_of(runs.begin(), runs.end(), [](int count) { return count == 1; });
}

void every_task_once() {
    for (int threads : {-1, 0, 1, 2, 3, 8, 33, 2, 5}) {
        for (int64_t tasks : {-1, 0, 1, 2, 3, 7, 64, 1000}) {
            for (int call = 0; call < 5; ++call) CHECK(runs_every_task_once(threads, tasks));
        }
    }
    for (int call = 0; call < 2000; ++call) CHECK(runs_every_task_once(2 + call % 4, 4));
    for (int call = 0; call < 50; ++call) CHECK(runs_every_task_once(4, 8, 0.1));
}

void every_task_once_after_pauses() {
    // Around the time for which workers and caller watch before they sleep, where a wake-up could be lost.
    for (int call = 0; call < 1000; ++call) {
        work(0.0001 * (call % 600));
        CHECK(runs_every_task_once(3, 6, 0.0001 * (call % 97)));
    }
}

void several_threads_work() {
    std::vector<int64_t> tasks_of(2);
    for (int call = 0; call < 20 && tasks_of[1] == 0; ++call)
        dql::parallel_for(2, 40, [&](int64_t, int worker) { work(1), ++tasks_of[worker]; });
    CHECK(tasks_of[0] > 0);
    CHECK(tasks_of[1] > 0);
}

void function_and_context() {
    int64_t sum = 0;
    const auto add = [](void* context, int64_t task, int) { *static_cast<int64_t*>(context) += task; };
    dql::parallel_for(1, 10, add, &sum);
    CHECK_EQ(sum, 45);
    int calls = 0;
    dql::parallel_for(1, 3, [calls](int64_t, int) mutable { ++calls; });  // a callable that changes itself
    CHECK_EQ(calls, 0);
}

void nested_runs_inline() {
    std::atomic<int64_t> inner{0};
    std::atomic<bool> alone{true};
    dql::parallel_for(4, 8, [&](int64_t, int) {
        const auto self = std::this_thread::get_id();
        dql::parallel_for(4, 16, [&](int64_t, int worker) {
            ++inner;
            if (worker != 0 || std::this_thread::get_id() != self) alone = false;
        });
    });
    CHECK_EQ(inner.load(), 8 * 16);
    CHECK(alone);
}

void concurrent_callers() {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 8; ++caller)
        callers.emplace_back([caller] {
            for (int call = 0; call < 200; ++call) CHECK(runs_every_task_once(1 + (caller + call) % 5, call % 40));
        });
    for (auto& caller : callers) caller.join();
}

void taken_pool_does_not_block() {
    std::atomic<bool> holding{false}, release{false};
    std::thread holder([&] {
        dql::parallel_for(3, 3, [&](int64_t, int) {
            holding = true;
            while (!release) sleep_ms(1);
        });
    });
    while (!holding) sleep_ms(1);
    const auto self = std::this_thread::get_id();
    bool alone = true;
    dql::parallel_for(4, 100, [&](int64_t, int worker) {
        alone = alone && worker == 0 && std::this_thread::get_id() == self;
    });
    CHECK(alone);  // and we are here, though the other call has not ended
    release = true;
    holder.join();
    CHECK(runs_every_task_once(4, 100));
}

void workers_take_the_callers_rounding() {
    const int nearest = std::fegetround();
    for (int mode : {FE_UPWARD, FE_DOWNWARD, nearest}) {
        std::fesetround(mode);
        std::atomic<bool> same{true};
        dql::parallel_for(3, 12, [&](int64_t, int) {
            work(0.2);
            if (std::fegetround() != mode) same = false;
        });
        CHECK(same);
    }
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    for (unsigned flush : {0x8040u, 0u}) {  // flush denormal results to zero, read denormal inputs as zero
        _mm_setcsr((before & ~0x8040u) | flush);
        std::atomic<bool> same{true};
        dql::parallel_for(3, 12, [&](int64_t, int) {
            work(0.2);
            if ((_mm_getcsr() & 0x8040u) != flush) same = false;
        });
        CHECK(same);
    }
    _mm_setcsr(before);
#endif
}

void workers_take_no_signals() {
    // A signal to the process must reach a thread of the program, not a worker.
    static std::atomic<int> taken{0};
    static thread_local bool is_worker = false;
    static std::atomic<int> taken_by_worker{0};
    dql::parallel_for(4, 16, [](int64_t, int worker) { work(0.2), is_worker = worker > 0; });
    std::signal(SIGUSR1, [](int) { ++taken, taken_by_worker += is_worker; });
    sigset_t set, before;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, &before);  // now only a worker could take it
    kill(getpid(), SIGUSR1);
    sleep_ms(20);
    CHECK_EQ(taken.load(), 0);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    for (const auto start = Clock::now(); taken == 0 && millis(start) < 1000;) sleep_ms(1);
    std::signal(SIGUSR1, SIG_DFL);
    CHECK_EQ(taken.load(), 1);
    CHECK_EQ(taken_by_worker.load(), 0);
}

void idle_costs_nothing() {
    const auto cpu_ms = [] {
        rusage usage{};
        getrusage(RUSAGE_SELF, &usage);
        const auto ms = [](const timeval& time) { return double(time.tv_sec) * 1e3 + double(time.tv_usec) * 1e-3; };
        return ms(usage.ru_utime) + ms(usage.ru_stime);
    };
    for (int call = 0; call < 100; ++call) CHECK(runs_every_task_once(8, 16, 0.01));  // workers watch for the next one
    const double before = cpu_ms();
    sleep_ms(200);
    const double spent = cpu_ms() - before;
    if (!(spent < 5)) check::fail(__FILE__, __LINE__, "idle for 200 ms the process used ", spent, " ms of CPU time");
}

#ifndef __SANITIZE_THREAD__

// Runs `body` in a forked child; true if it returned true within ten seconds.
template <class Body>
bool holds_in_child(Body body) {
    const pid_t child = fork();
    if (child == 0) _exit(body() ? 0 : 1);
    if (child < 0) return false;
    for (const auto start = Clock::now(); millis(start) < 10000; sleep_ms(2)) {
        int status = 0;
        if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    return false;
}

void fork_before_first_use() {
    CHECK(holds_in_child([] { return runs_every_task_once(4, 100); }));
}

void fork_after_use() {
    CHECK(runs_every_task_once(4, 100));
    CHECK(holds_in_child([] {
        return runs_every_task_once(4, 100, 0.01) && runs_every_task_once(2, 100) &&
               holds_in_child([] { return runs_every_task_once(3, 100, 0.01); });
    }));
    CHECK(runs_every_task_once(4, 100));
}

void fork_while_pool_is_taken() {
    std::atomic<bool> holding{false}, release{false};
    std::thread holder([&] {
        dql::parallel_for(3, 3, [&](int64_t, int) {
            holding = true;
            while (!release) sleep_ms(1);
        });
    });
    while (!holding) sleep_ms(1);
    CHECK(holds_in_child([] {
        std::atomic<bool> pooled{false};
        for (int call = 0; call < 20 && !pooled; ++call)
            dql::parallel_for(2, 20, [&](int64_t, int worker) { work(1), pooled = pooled || worker > 0; });
        return pooled && runs_every_task_once(4, 100);  // not merely inline: the child has a pool of its own
    }));
    release = true;
    holder.join();
}

void fork_while_others_call() {
    std::atomic<bool> stop{false};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 2; ++caller)
        callers.emplace_back([&] {
            while (!stop) CHECK(runs_every_task_once(3, 5));
        });
    for (int child = 0; child < 40; ++child) CHECK(holds_in_child([] { return runs_every_task_once(4, 50, 0.01); }));
    stop = true;
    for (auto& caller : callers) caller.join();
}

void fewer_threads_than_wanted() {
    // A child that may create no thread at all. The limit does not bind root: a child that is root becomes nobody.
    const auto forbid_threads = [] {
        const rlimit none{0, 0};
        if ((geteuid() == 0 && setuid(65534) != 0) || setrlimit(RLIMIT_NPROC, &none) != 0) return false;
        try {
            std::thread([] {}).join();
        } catch (const std::system_error&) {
            return true;
        }
        return false;
    };
    if (!holds_in_child(forbid_threads)) {
        std::printf("  skip   fewer_threads_than_wanted: a process cannot limit its own threads here\n");
        return;
    }
    CHECK(holds_in_child(
        [&] { return forbid_threads() && runs_every_task_once(4, 100) && runs_every_task_once(8, 3); }));
}

#endif  // __SANITIZE_THREAD__

}  // namespace

int main() {
#ifndef __SANITIZE_THREAD__
    RUN(fork_before_first_use);  // first: no pool yet
    RUN(fork_after_use);
    RUN(fork_while_pool_is_taken);
    RUN(fork_while_others_call);
    RUN(fewer_threads_than_wanted);
#else
    std::printf("  skip   forks: ThreadSanitizer does not support threads in the child of a process with threads\n");
#endif
    RUN(every_task_once);
    RUN(every_task_once_after_pauses);
    RUN(several_threads_work);
    RUN(function_and_context);
    RUN(nested_runs_inline);
    RUN(concurrent_callers);
    RUN(taken_pool_does_not_block);
    RUN(workers_take_the_callers_rounding);
    RUN(workers_take_no_signals);
    RUN(idle_costs_nothing);
    return check::report();
}
