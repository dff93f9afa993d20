#include "pool.h"

#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace dql {
namespace {

// How long a thread watches for a change before it sleeps. Watching saves a wake-up, which takes about 30 us on a
// virtual machine whose core has gone to sleep (bench_pool.cpp); it stays short because torch's pool shares the cores.
constexpr std::chrono::microseconds kWorkerWatch{20};  // only in a row of calls that are no further apart than this
constexpr std::chrono::microseconds kCallerWatch{50};  // only while a worker is in its last task
constexpr int kMaxWorkers = 1023;

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

// Who may change a worker's state, and to what:
//   caller  Idle or Asleep -> Offered    (notifies when it was Asleep)
//   caller  Offered -> Idle              takes the offer back: the tasks ran out before the worker came
//   worker  Offered -> Running
//   caller  Running -> Awaited           the caller is about to sleep until this worker is done
//   worker  Running or Awaited -> Idle   (notifies when it was Awaited)
//   worker  Idle -> Asleep
enum class State { Idle, Asleep, Offered, Running, Awaited };

struct Job {
    void (*fn)(void*, int64_t, int) = nullptr;
    void* context = nullptr;
    int64_t tasks = 0;
    std::fenv_t environment{};
    bool soon = false;  // this call came soon after the one before: so may the next
    alignas(64) std::atomic<int64_t> next{0};  // on its own cache line: every worker writes it

    void run(int worker) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) fn(context, task, worker);
    }
};

struct alignas(64) Worker {
    std::atomic<State> state{State::Idle};
    std::mutex mutex;
    std::condition_variable changed;

    bool move(State from, State to) {
        return state.compare_exchange_strong(from, to, std::memory_order_acq_rel, std::memory_order_acquire);
    }

    // Watches the state until it is no longer `from`, for at most `limit`; returns whether it changed.
    bool watch_while(State from, std::chrono::microseconds limit) const {
        const auto end = std::chrono::steady_clock::now() + limit;
        do {
            for (int i = 0; i < 8; ++i) {
                if (state.load(std::memory_order_acquire) != from) return true;
                relax();
            }
        } while (std::chrono::steady_clock::now() < end);
        return false;
    }

    // Announces the sleep (`from` -> `sleeping`) and sleeps until the other side moves the state on.
    void sleep_while(State from, State sleeping) {
        std::unique_lock<std::mutex> lock(mutex);
        if (!move(from, sleeping)) return;
        while (state.load(std::memory_order_acquire) == sleeping) changed.wait(lock);
    }

    void wake() {
        // The sleeper announces itself and starts to wait under the lock: having held it, we know it waits.
        { std::lock_guard<std::mutex> lock(mutex); }
        changed.notify_one();
    }

    void offer() {
        if (state.exchange(State::Offered, std::memory_order_acq_rel) == State::Asleep) wake();
    }

    void finish() {
        if (move(State::Offered, State::Idle)) return;
        if (!watch_while(State::Running, kCallerWatch)) sleep_while(State::Running, State::Awaited);
    }

    [[noreturn]] void serve(Job& job, int worker) {
        for (bool soon = false;;) {
            while (!move(State::Offered, State::Running)) {
                if (!soon || !watch_while(State::Idle, kWorkerWatch)) sleep_while(State::Idle, State::Asleep);
                soon = false;
            }
            std::fesetenv(&job.environment);
            job.run(worker);
            soon = job.soon;
            if (state.exchange(State::Idle, std::memory_order_acq_rel) == State::Awaited) wake();
        }
    }
};

// Keeps the signals of the process away from the thread created in its scope: Python's main thread must get them, or
// Ctrl-C does not end a sleep. Faults stay with the thread that made them, so faulthandler still reports.
class SignalsBlocked {
#if !defined(_WIN32)
public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, fault);
        pthread_sigmask(SIG_BLOCK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;

private:
    sigset_t before_;
#endif
};

class Pool {
public:
    bool try_take() { return !taken_.exchange(true, std::memory_order_acquire); }
    void give_back() { taken_.store(false, std::memory_order_release); }

    // Only for who has taken the pool.
    void run(int threads, int64_t tasks, void (*fn)(void*, int64_t, int), void* context) {
        const int workers = ready(static_cast<int>((threads < tasks ? threads : tasks) - 1));
        job_.fn = fn;
        job_.context = context;
        job_.tasks = tasks;
        std::fegetenv(&job_.environment);
        job_.soon = std::chrono::steady_clock::now() - ended_ < kWorkerWatch;
        job_.next.store(0, std::memory_order_relaxed);  // published, with the rest, by the offers
        int offered = 0;
        while (offered < workers && job_.next.load(std::memory_order_relaxed) < tasks) workers_[offered++]->offer();
        job_.run(0);
        for (int i = 0; i < offered; ++i) workers_[i]->finish();
        ended_ = std::chrono::steady_clock::now();
    }

private:
    // Creates what is missing of `wanted` workers; returns how many of them there are.
    int ready(int wanted) {
        if (wanted > kMaxWorkers) wanted = kMaxWorkers;
        while (size_ < wanted) {
            Worker* worker = nullptr;
            try {
                const SignalsBlocked blocked;
                worker = new Worker;
                std::thread([this, worker, id = size_ + 1] { worker->serve(job_, id); }).detach();
            } catch (...) {  // no memory, or the system's limit on threads
                delete worker;
                break;
            }
            workers_[size_++] = worker;
        }
        return size_ < wanted ? size_ : wanted;
    }

    Job job_;
    Worker* workers_[kMaxWorkers] = {};
    int size_ = 0;
    std::chrono::steady_clock::time_point ended_{};
    std::atomic<bool> taken_{false};
};

// Never destroyed: its threads sleep in it until the process is gone, and a destructor that joined them would hang
// an interpreter that exits.
std::atomic<Pool*> current{nullptr};

#if !defined(_WIN32)
// In a child the threads do not exist and the locks may be held by them for ever: forget the pool, do not touch it.
// Registered when the library is loaded: at the first call, a fork on another thread might come in between.
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_relaxed); });
#endif

// The process's pool, or null if there is no memory for it. Takes no lock, for a child must not inherit one.
Pool* find_pool() {
    Pool* pool = current.load(std::memory_order_acquire);
    if (pool != nullptr) return pool;
    Pool* made = new (std::nothrow) Pool;
    if (current.compare_exchange_strong(pool, made, std::memory_order_acq_rel, std::memory_order_acquire)) return made;
    delete made;  // another thread was first; this one has no workers yet
    return pool;
}

}  // namespace

void parallel_for(int threads, int64_t tasks, void (*fn)(void*, int64_t, int), void* context) noexcept {
    if (threads > 1 && tasks > 1) {
        Pool* pool = find_pool();
        if (pool != nullptr && pool->try_take()) {
            pool->run(threads, tasks, fn, context);
            pool->give_back();
            return;
        }
    }
    for (int64_t task = 0; task < tasks; ++task) fn(context, task, 0);
}

}  // namespace dql
