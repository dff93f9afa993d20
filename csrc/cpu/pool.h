// The thread pool of the native backend.
//
// This header is included by files that are compiled for different instruction sets, so it defines nothing that two
// of them could share: the linker would keep one copy, and it might be the one this CPU cannot run.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dql {

// Runs fn(context, task, worker) once for every task of 0 .. tasks-1 on up to `threads` threads and returns when all
// are done. The caller is worker 0; worker < threads, and no two tasks run at once with the same worker, so `worker`
// may index scratch memory. Tasks are handed out in ascending order, one at a time, to whoever is free, so do not let
// a result depend on which worker ran what. Waking a sleeping core costs the caller about 10 us, and the worker comes
// about 30 us after the call (within 1 us if another call has just ended): less than 100 us of work is not worth it.
//
// - tasks <= 1 or threads <= 1: a plain loop in the caller, no lock, no atomic, no other thread.
// - The pool is one per process and serves one call at a time. A call that finds it taken (by another thread, or by
//   the task it is called from) runs all its tasks in the caller: it never waits for another call.
// - Threads are created when first needed and sleep between calls. If one cannot be created the call runs with
//   fewer. A thread that has not woken up by the time the tasks are handed out is not waited for.
// - A child made by fork() gets a pool of its own on first need, whatever the parent was doing. A task must not fork.
// - Workers run under the caller's floating-point environment (rounding, flushing of denormals), so the number of
//   threads does not change a result. Their stacks may be small (128 KB with musl): keep buffers elsewhere.
//
// Args:
//   threads: the most threads to use, the caller among them; more than there are cores is allowed.
//   tasks: number of tasks; 0 or less runs none.
//   fn: must not throw.
//   context: handed to fn as it is; may be null.
void parallel_for(int threads, int64_t tasks, void (*fn)(void* context, int64_t task, int worker),
                  void* context) noexcept;

// The same for a callable: parallel_for(threads, tasks, [&](int64_t task, int worker) { ... });
template <class Body>
void parallel_for(int threads, int64_t tasks, Body&& body) noexcept {
    using Callable = std::remove_reference_t<Body>;
    const auto call = [](void* context, int64_t task, int worker) noexcept {
        (*static_cast<Callable*>(context))(task, worker);
    };
    parallel_for(threads, tasks, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace dql
