// The emulator itself: threads, shared memory, barriers of threads. What a GPU does, it does; what a GPU would answer
// with wrong numbers or a hang, it names.
#include <algorithm>
#include <stdexcept>
#include <thread>
#include <vector>

#include "emulated.h"

namespace {

using namespace emulated;

// ---- grids, fibers ----

void every_thread_runs_once() {
    struct Who {
        int block_x, block_y, rank, thread;
    };
    for (const int cluster : {1, 2, 3, 8})
        for (const int threads : {32, 96, 1024}) {
            std::vector<Who> seen;
            const Launch launch = {2 * cluster, 2, cluster, threads, 100};
            run(launch, [&] {
                CHECK_EQ(lane(), thread() % 32);
                CHECK_EQ(warp(), thread() / 32);
                CHECK_EQ(cluster_size(), cluster);
                CHECK_EQ(blocks_x(), 2 * cluster);
                CHECK_EQ(blocks_y(), 2);
                CHECK_EQ(reinterpret_cast<uintptr_t>(shared_memory()) % 1024, 0u);
                seen.push_back({block_x(), block_y(), cluster_rank(), thread()});
            });
            CHECK_EQ(static_cast<int>(seen.size()), 4 * cluster * threads);
            std::vector<int> count(seen.size());
            for (const Who& who : seen) {
                CHECK_EQ(who.rank, who.block_x % cluster);
                ++count[(who.block_y * 2 * cluster + who.block_x) * threads + who.thread];
            }
            CHECK(std::all_of(count.begin(), count.end(), [](int n) { return n == 1; }));
        }
}

void impossible_grids() {
    for (const Launch& launch : {Launch{1, 1, 1, 33}, Launch{1, 1, 1, 0}, Launch{1, 1, 1, 1056}, Launch{3, 1, 2},
                                 Launch{9, 1, 9}, Launch{1, 1, 0}, Launch{0}, Launch{1, 0}, Launch{1, 1, 1, 32, -1}})
        SAYS(error_of(launch, [] {}), "no grid has");
    SAYS(error_of({}, [] { run({}, [] {}); }), "a kernel cannot launch another");
}

void exceptions_come_out() {
    for (int turn = 0; turn < 3; ++turn) {  // and the next run is as if nothing had been
        SAYS(error_of({}, [] {
                 sync_warp();
                 if (thread() == 40) throw std::out_of_range("told by thread 40");
                 sync_block();
             }),
             "told by thread 40");
        SAYS(error_of({}, [] { throw 1; }), "no std::exception");
        CHECK_EQ(error_of({}, [] { sync_block(); }), "nothing");
    }
}

void fibers_keep_their_registers() {
    std::vector<double> results(256);
    run({1, 1, 1, 256}, [&] {
        double a = thread(), b = 1;
        int64_t c[6] = {thread(), 1, 2, 3, 4, 5};
        for (int i = 0; i < 100; ++i) {
            if (i % 3 == 0) sync_block();
            sync_warp();
            a += i, b *= 1.01;
            for (int j = 0; j < 6; ++j) c[j] += j * i;
        }
        results[thread()] = a + b + static_cast<double>(c[0] + c[1] + c[2] + c[3] + c[4] + c[5]);
    });
    for (int i = 1; i < 256; ++i) CHECK_NEAR(results[i] - results[0], 2 * i, 1e-9);
}

void os_threads_are_apart() {
    std::vector<int> sums(4);
    std::vector<std::thread> threads;
    for (int n = 0; n < 4; ++n)
        threads.emplace_back([&sums, n] {
            emulator::seed(n);
            for (int turn = 0; turn < 20; ++turn)
                run({2, 1, 2, 64}, [&sums, n] {
                    *shared_at<int>(4 * thread()) = n;
                    sync_cluster();
                    if (thread() == 0)
                        for (int i = 0; i < 64; ++i) sums[n] += *shared_at<int>(4 * i);
                });
        });
    for (std::thread& thread : threads) thread.join();
    for (int n = 0; n < 4; ++n) CHECK_EQ(sums[n], n * 64 * 2 * 20);
}

// ---- shared memory ----

void shared_memory_is_nan() {
    run({2, 1, 1, 32, 400}, [] {
        for (int i = 0; i < 400; ++i) CHECK_EQ(shared_memory()[i], static_cast<char>(0xff));
        CHECK(std::isnan(*shared_at<float>(400)));  // behind it, too
        CHECK(std::isnan(*shared_at<float>(-4)));
        sync_block();
        shared_memory()[thread()] = 0;
    });
    SAYS(error_of({1, 1, 1, 32, 400}, [] { shared_memory()[400] = 0; }), "behind the block's shared memory");
    SAYS(error_of({1, 1, 1, 32, 400}, [] { shared_memory()[401 + 900] = -1; }), "behind the block's shared memory");
    SAYS(error_of({1, 1, 1, 32, 400}, [] { shared_memory()[-1] = 0; }), "before the block's shared memory");
}

// ---- threads that meet ----

void sync_block_orders() {
    const auto reversed = [](bool synced) {
        bool right = true;
        run({1, 1, 1, 256}, [&] {
            *shared_at<int>(4 * thread()) = thread();
            if (synced) sync_block();
            right = right && *shared_at<int>(4 * (255 - thread())) == 255 - thread();
        });
        return right;
    };
    always([&] { CHECK(reversed(true)); });
    CHECK_EQ(times([&] { return reversed(false); }), 0);
}

void sync_warp_orders() {
    const auto reversed = [](bool synced) {
        bool right = true;
        run({1, 1, 1, 32}, [&] {
            *shared_at<int>(4 * thread()) = thread();
            if (synced) sync_warp();
            if (thread() == 20) right = *shared_at<int>(4 * 3) == 3;
        });
        return right;
    };
    always([&] { CHECK(reversed(true)); });
    const int lucky = times([&] { return reversed(false); });
    CHECK(lucky > 0 && lucky < 50);  // either end of a warp may run first
}

// Warp 0 hands on to warp 1 a hundred times by one buffer: without the second barrier it runs ahead.
void warps_run_ahead() {
    const auto handed_on = [](bool both) {
        bool right = true;
        run({1, 1, 1, 64}, [&] {
            for (int i = 0; i < 100; ++i) {
                if (warp() == 0) *shared_at<int>(4 * lane()) = i;
                sync_block();
                if (warp() == 1) right = right && *shared_at<int>(4 * lane()) == i;
                if (both) sync_block();
            }
        });
        return right;
    };
    always([&] { CHECK(handed_on(true)); });
    CHECK_EQ(times([&] { return handed_on(false); }), 0);
}

void some_meet() {
    always([] {
        int after = 0;
        run({1, 1, 1, 128}, [&] {
            if (warp() == 0) return;  // it has no part in it
            if (warp() == 3) *shared_at<int>(0) = 7;
            sync_some(1, 96);
            after += *shared_at<int>(0) == 7;
            sync_some(warp() == 1 ? 2 : 3, warp() == 1 ? 32 : 64);
        });
        CHECK_EQ(after, 96);
    });
    always([] {  // two warps in turn, 20 times: neither is ahead, or waits for one that only came by
        int turns = 0;
        bool right = true;
        run({}, [&] {
            if (warp() == 1) arrive_some(1, 64);
            for (int i = 0; i < 20; ++i) {
                sync_some(1 + warp(), 64);
                if (lane() == 0) right = right && turns++ == 2 * i + warp();
                sync_warp();
                arrive_some(2 - warp(), 64);
            }
            if (warp() == 0) sync_some(1, 64);
        });
        CHECK(right);
        CHECK_EQ(turns, 40);
    });
    SAYS(error_of({}, [] { sync_some(0, 64); }), "barriers are 1 .. 15");
    SAYS(error_of({}, [] { arrive_some(16, 64); }), "arrive_some(16, 64): barriers are 1 .. 15");
    SAYS(error_of({}, [] { if (warp() == 0) arrive_some(1, 64); }), "a block ended, but barrier 1 still waits");
    SAYS(error_of({}, [] { if (warp() == 0) arrive_some(1, 64), arrive_some(1, 64); }), "comes to a barrier again");
    SAYS(error_of({}, [] { sync_some(1, 48); }), "whole warps");
    SAYS(error_of({1, 1, 1, 128}, [] { if (warp() < 2) sync_some(1, 96 + 32 * warp()); }), "others meet there with");
    SAYS(error_of({}, [] { sync_some(1 + lane() % 2, 64); }), "are in sync_some(");
    SAYS(error_of({}, [] { sync_some(1 + warp(), 64); }), "32 threads of block 0, 0 warp 1: sync_some(2, 64)");
}

void shuffles() {
    always([] {
        run({1, 1, 1, 64}, [] {
            for (int mask = 0; mask < 32; ++mask) CHECK_EQ(shuffle_xor(thread(), mask), float(thread() ^ mask));
            float sum = thread();
            for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
            CHECK_EQ(sum, 496.0f + 1024 * warp());
        });
    });
    SAYS(error_of({}, [] { shuffle_xor(1, 32); }), "lanes are 0 .. 31");
}

void warps_do_one_thing() {
    SAYS(error_of({}, [] { lane() == 5 ? sync_warp() : static_cast<void>(shuffle_xor(1, 1)); }), "sync_warp");
    SAYS(error_of({}, [] { lane() == 5 ? sync_warp() : static_cast<void>(shuffle_xor(1, 1)); }), "shuffle_xor");
    SAYS(error_of({}, [] { lane() == 5 ? sync_warp() : sync_block(); }), "lanes of a warp are in");
    SAYS(error_of({}, [] {
             float d[4] = {};
             const uint32_t a[4] = {}, b[2] = {};
             lane() < 7 ? mma_bf16(d, a, b) : mma_tf32(d, a, b);
         }),
         "mma_bf16");
    SAYS(error_of({}, [] { if (lane() > 0) sync_warp(); }), "sync_warp");
}

void nobody_leaves_early() {
    SAYS(error_of({}, [] { if (thread() != 3) sync_block(); }), "sync_block");
    for (uint64_t seed = 0; seed < 10; ++seed) {
        emulator::seed(seed);  // whoever comes first
        SAYS(error_of({}, [] { if (warp() == 0) sync_block(); }), "sync_block");
        SAYS(error_of({2, 1, 2, 32}, [] { if (cluster_rank() == 0) sync_cluster(); }), "sync_cluster");
    }
}

void sync_cluster_orders() {
    always([] {
        std::vector<int> marks(4 * 64), wrong(1);
        run({4, 1, 4, 64}, [&] {
            for (int turn = 1; turn < 5; ++turn) {
                marks[cluster_rank() * 64 + thread()] = turn;
                sync_cluster();
                for (const int mark : marks) wrong[0] += mark != turn;
                sync_cluster();
            }
        });
        CHECK_EQ(wrong[0], 0);
    });
}

}  // namespace

int main() {
    RUN(every_thread_runs_once);
    RUN(impossible_grids);
    RUN(exceptions_come_out);
    RUN(fibers_keep_their_registers);
    RUN(os_threads_are_apart);
    RUN(shared_memory_is_nan);
    RUN(sync_block_orders);
    RUN(sync_warp_orders);
    RUN(warps_run_ahead);
    RUN(some_meet);
    RUN(shuffles);
    RUN(warps_do_one_thing);
    RUN(nobody_leaves_early);
    RUN(sync_cluster_orders);
    return check::report();
}
