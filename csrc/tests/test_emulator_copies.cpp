// The emulator itself: what arrives when it likes to, copies and stores to other blocks, and what waits for it.
#include "emulated.h"

namespace {

using namespace emulated;

// ---- cp.async ----

alignas(16) const float numbers[1024] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

void copies_are_in_when_waited_for() {
    always([] {
        run({1, 1, 1, 32}, [] {
            for (int i = 0; i < 4; ++i) {
                copy16(shared_at<float>(64 * thread() + 16 * i), numbers + 4 * i);
                close_group();
            }
            const float* own = shared_at<float>(64 * thread());
            wait_groups<2>();
            for (int i = 0; i < 8; ++i) CHECK_EQ(own[i], float(i));
            wait_groups<0>();
            for (int i = 0; i < 16; ++i) CHECK_EQ(own[i], float(i));
        });
    });
    int early = 0, late = 0;
    const auto count = [&] {
        run({1, 1, 1, 32}, [&] {
            copy16(shared_at<float>(16 * thread()), numbers + 4);
            (*shared_at<float>(16 * thread()) == 4 ? early : late) += 1;
            close_group();
            wait_groups<0>();
        });
    };
    emulator::order(Order::LATE);
    count();
    CHECK_EQ(early, 0);
    emulator::order(Order::RANDOM);
    count();
    CHECK(early > 0 && early < 32);
    emulator::order(Order::EAGER);
    late = 0;
    count();
    CHECK_EQ(late, 0);
    // What is read is what is there when the copy lands.
    emulator::order(Order::LATE);
    alignas(16) float source[4] = {1, 1, 1, 1};
    run({1, 1, 1, 32}, [&] {
        if (thread() > 0) return;
        copy16(shared_memory(), source);
        close_group();
        source[0] = 2;
        wait_groups<0>();
        CHECK_EQ(*shared_at<float>(0), 2.0f);
    });
    emulator::order(Order::RANDOM);
}

void copies_are_checked() {
    const auto with = [](int64_t to, int64_t from) {
        return error_of({1, 1, 1, 32, 64}, [=] { copy16(shared_memory() + to, numbers + from); });
    };
    SAYS(with(64, 0), "copy16 has bytes 64 .. 79, but shared memory has 64");
    SAYS(with(-16, 0), "copy16 has bytes -16");
    SAYS(with(8, 0), "copy16 of 16 bytes at byte 8 of shared memory is not at a multiple of 16");
    SAYS(with(0, 1), "no multiple of 16");
    SAYS(error_of({}, [] { copy16(shared_memory(), shared_memory() + 16); }), "reads from shared memory");
    emulator::order(Order::LATE);
    SAYS(with(0, 0), "a thread ended with copies under way");
    SAYS(error_of({}, [] {  // the group is not closed, so nobody can wait for it
             copy16(shared_memory(), numbers);
             wait_groups<0>();
         }),
         "a thread ended with copies under way");
    emulator::order(Order::RANDOM);
}

// ---- barriers that count bytes ----

void bulk_copies_arrive() {
    always([] {
        run({2, 1, 2, 96}, [] {
            make_barrier(0);
            for (int turn = 0; turn < 4; ++turn) {
                if (thread() == 5) {
                    if (turn % 2 == 0) barrier_expect(barrier_at(0), 96);
                    bulk_copy(shared_memory() + 64, numbers + 4 * turn, 32, barrier_at(0));
                    bulk_copy(shared_memory() + 128, numbers, 64, barrier_at(0));
                    if (turn % 2 == 1) barrier_expect(barrier_at(0), 96);  // bytes may come before they are announced
                }
                barrier_wait(barrier_at(0), turn & 1);
                for (int i = 0; i < 4; ++i) CHECK_EQ(shared_at<float>(64)[i], numbers[4 * turn + i]);
                CHECK_EQ(shared_at<float>(128)[15], 15.0f);
                sync_block();
                shared_at<float>(64)[thread() % 8] = -1;
                sync_block();
            }
        });
    });
    int early = 0;
    emulator::order(Order::LATE);
    for (int pass = 0; pass < 2; ++pass, emulator::order(Order::EAGER)) {
        run({1, 1, 1, 64}, [&] {
            make_barrier(0);
            if (thread() == 0) {
                barrier_expect(barrier_at(0), 32);
                bulk_copy(shared_memory() + 64, numbers, 32, barrier_at(0));
            }
            sync_block();
            early += *shared_at<float>(64) == 0;
            sync_block();
            barrier_wait(barrier_at(0), 0);
        });
        CHECK_EQ(early, pass * 64);
    }
    emulator::order(Order::RANDOM);
}

void bulk_copies_are_checked() {
    const auto with = [](int64_t to, int64_t from, uint32_t bytes) {
        return error_of({1, 1, 1, 32, 256}, [=] {
            make_barrier(0);
            if (thread() == 0) bulk_copy(shared_memory() + to, numbers + from, bytes, barrier_at(0));
        });
    };
    SAYS(with(16, 0, 256), "bulk_copy has bytes 16 .. 271, but shared memory has 256");
    SAYS(with(16, 0, 24), "bulk_copy of 24 bytes at byte 16");
    SAYS(with(24, 0, 32), "bulk_copy of 32 bytes at byte 24");
    SAYS(with(16, 2, 32), "no multiple of 16");
    emulator::order(Order::LATE);
    SAYS(with(16, 0, 32), "a block ended while 32 bytes to it were under way");
    emulator::order(Order::RANDOM);
}

void barriers_of_arrivals() {
    always([] {
        run({1, 1, 1, 128}, [] {
            make_barrier(0, 4);  // three arrive, one announces
            for (int turn = 0; turn < 5; ++turn) {
                if (lane() == 0) shared_at<int>(64)[warp()] = turn;
                if (lane() == 0 && warp() > 0) barrier_arrive(barrier_at(0));
                if (thread() == 0) {
                    barrier_expect(barrier_at(0), 16);
                    bulk_copy(shared_memory() + 128, numbers + 4 * turn % 16, 16, barrier_at(0));
                }
                barrier_wait(barrier_at(0), turn & 1);
                for (int w = 0; w < 4; ++w) CHECK_EQ(shared_at<int>(64)[w], turn);
                CHECK_EQ(shared_at<float>(128)[1], 4.0f * turn - 16 * (turn / 4) + 1);
                sync_block();
            }
        });
    });
}

void parities_are_as_ptx_has_them() {
    run({1, 1, 1, 32}, [] {
        make_barrier(0);
        barrier_wait(barrier_at(0), 1);  // the phase before the first has ended
        sync_warp();
        for (int phase = 0; phase < 4; ++phase) {
            if (thread() == 0) barrier_expect(barrier_at(0), 0);
            barrier_wait(barrier_at(0), phase & 1);
            barrier_wait(barrier_at(0), phase & 1);
            sync_warp();
        }
    });
    // Two phases late
    SAYS(error_of({1, 1, 1, 32}, [] {
             make_barrier(0);
             if (thread() != 0) return;
             barrier_expect(barrier_at(0), 0);
             barrier_expect(barrier_at(0), 0);
             barrier_wait(barrier_at(0), 0);
         }),
         "1 threads of block 0, 0 warp 0: barrier_wait(0, 0): the barrier at this byte is in phase 2 and lacks 1 "
         "arrivals and 0 bytes");
}

void misused_barriers() {
    const auto by_thread_0 = [](const std::function<void()>& body) {
        return error_of({}, [&] {
            make_barrier(8);
            if (thread() == 0) body();
        });
    };
    SAYS(by_thread_0([] { barrier_wait(barrier_at(16), 0); }), "at byte 16 of block 0 was never initialised");
    SAYS(by_thread_0([] { barrier_expect(barrier_at(16), 0); }), "never initialised");
    SAYS(by_thread_0([] { barrier_arrive(barrier_at(16)); }), "never initialised");
    SAYS(by_thread_0([] { bulk_copy(shared_memory() + 64, numbers, 16, barrier_at(16)); }), "never initialised");
    SAYS(by_thread_0([] { send8(peer(0), 64, make_uint2(1, 2), 16); }), "never initialised");
    SAYS(by_thread_0([] { barrier_init(barrier_at(8)); }), "initialised twice");
    SAYS(by_thread_0([] { barrier_init(barrier_at(20)); }), "a barrier of 8 bytes at byte 20");
    SAYS(by_thread_0([] { barrier_init(barrier_at(4096)); }), "a barrier has bytes 4096 .. 4103");
    SAYS(by_thread_0([] { barrier_init(barrier_at(32), 0); }), "a barrier of 0 arrivals");
    SAYS(by_thread_0([] { barrier_wait(barrier_at(8), 2); }), "parity 2");
    SAYS(by_thread_0([] { barrier_expect(barrier_at(8), 1 << 20); }), "less than 2^20");
    SAYS(by_thread_0([] {
             barrier_expect(barrier_at(8), 16);
             barrier_expect(barrier_at(8), 16);
         }),
         "barrier_expect twice in one phase");
    SAYS(by_thread_0([] {
             barrier_init(barrier_at(16), 2);
             barrier_expect(barrier_at(16), 16);
             barrier_arrive(barrier_at(16));
             barrier_arrive(barrier_at(16));
         }),
         "more arrivals at a barrier than it was made for");
    SAYS(by_thread_0([] { shared_memory()[9] = 0; }), "the barrier at byte 8 of block 0 was overwritten");
    SAYS(error_of({}, [] {
             if (thread() == 0) barrier_init(barrier_at(0));
             sync_block();
             barrier_wait(barrier_at(0), 1);
         }),
         "before the thread that initialised it called barriers_ready");
}

// ---- between blocks ----

// Each block hands all others what it had from its neighbour, sixty times, by two buffers in turn.
void blocks_exchange() {
    constexpr int BLOCKS = 8, TURNS = 60, BYTES = BLOCKS * 64 * 16;
    always([] {
        static int wrong;
        wrong = 0;
        run({BLOCKS, 1, BLOCKS, 64, 128 + 2 * BYTES}, [] {
            if (thread() == 0) {
                for (int i = 0; i < 2; ++i) barrier_init(barrier_at(8 * i));
                barriers_ready();
                for (int i = 0; i < 2; ++i) barrier_expect(barrier_at(8 * i), BYTES);
            }
            sync_cluster();
            uint32_t value = cluster_rank() * 64 + thread();
            for (int turn = 0; turn < TURNS; ++turn) {
                const int buffer = turn % 2, start = 128 + buffer * BYTES;
                for (int rank = 0; rank < BLOCKS; ++rank)
                    send16(peer(rank), start + (cluster_rank() * 64 + thread()) * 16, make_uint4(value, turn, 0, ~0u),
                           8 * buffer);
                barrier_wait_for_peers(barrier_at(8 * buffer), turn / 2 & 1);
                const int from = (cluster_rank() + 1) % BLOCKS * 64 + thread();
                const uint4 got = *shared_at<uint4>(start + 16 * from);
                wrong += got.y != uint32_t(turn) || got.w != ~0u;
                value = got.x;
                sync_block();  // all have read
                if (thread() == 0) barrier_expect(barrier_at(8 * buffer), turn + 2 < TURNS ? BYTES : 0);
            }
            wrong += value != uint32_t((cluster_rank() + TURNS) % BLOCKS * 64 + thread());
            sync_cluster();
        });
        CHECK_EQ(wrong, 0);
    });
}

// With one buffer in place of two a fast block overwrites what a slow one has not read.
void one_buffer_is_too_few() {
    const auto exchanged = [] {
        bool right = true;
        const std::string error = error_of({2, 1, 2, 32, 1024}, [&] {
            make_barrier(0);
            for (int turn = 0; turn < 20; ++turn) {
                if (thread() == 0) barrier_expect(barrier_at(0), 256);
                send8(peer(1 - cluster_rank()), 64 + 8 * thread(), make_uint2(turn, 0), 0);
                barrier_wait_for_peers(barrier_at(0), turn & 1);
                sync_block();
                right = right && shared_at<uint32_t>(64)[2 * thread()] == uint32_t(turn);
            }
            sync_cluster();
        });
        return right && error == "nothing";
    };
    CHECK(times(exchanged) < 10);
}

void sends_are_checked() {
    const auto with = [](int rank, int to, int barrier, int bytes) {
        return error_of({2, 1, 2, 32, 256}, [=] {
            make_barrier(0);
            if (thread() == 0 && cluster_rank() == 0) {
                if (bytes == 8) send8(peer(rank), to, make_uint2(1, 2), barrier);
                if (bytes == 16) send16(peer(rank), to, make_uint4(1, 2, 3, 4), barrier);
            }
        });
    };
    SAYS(with(2, 64, 0, 8), "there is no block 2 in a cluster of 2");
    SAYS(with(1, 256, 0, 8), "send8 has bytes 256 .. 263, but shared memory has 256");
    SAYS(with(1, 248, 0, 16), "send16 has bytes 248 .. 263");
    SAYS(with(1, 68, 0, 8), "send8 of 8 bytes at byte 68");
    SAYS(with(1, 72, 0, 16), "send16 of 16 bytes at byte 72");
    SAYS(with(1, 64, 8, 8), "the barrier at byte 8 of block 1 was never initialised");
    // A wait that sees what its own block wrote is not enough.
    SAYS(error_of({2, 1, 2, 32, 256}, [] {
             make_barrier(0);
             if (thread() == 0) barrier_expect(barrier_at(0), 8);
             if (thread() == 0) send8(peer(1 - cluster_rank()), 64, make_uint2(1, 2), 0);
             barrier_wait(barrier_at(0), 0);
             sync_cluster();
         }),
         "other blocks' stores ask for barrier_wait_for_peers");
    // It ends before the store, or while it is under way.
    emulator::order(Order::LATE);
    for (uint64_t seed = 0; seed < 20; ++seed) {
        emulator::seed(seed);
        const std::string text = with(1, 64, 0, 8);
        CHECK(text.find("a block ended while 8 bytes") != std::string::npos ||
              text.find("a store to block 1, which has ended") != std::string::npos);
    }
    emulator::order(Order::RANDOM);
}

// ---- nobody can go on ----

void deadlocks_are_told() {
    const std::string text = error_of({2, 1, 2, 64}, [] {
        make_barrier(0);
        if (cluster_rank() == 0) {
            if (thread() == 0) barrier_expect(barrier_at(0), 64);
            if (thread() == 3) send16(peer(0), 64, make_uint4(1, 2, 3, 4), 0);
            if (warp() == 0) barrier_wait(barrier_at(0), 0);
            sync_block();
        } else {
            sync_cluster();
        }
    });
    SAYS(text, "nobody can go on");
    SAYS(text, "32 threads of block 0, 0 warp 0: barrier_wait(0, 0): the barrier at this byte is in phase 0 and lacks "
               "0 arrivals and 48 bytes");
    SAYS(text, "32 threads of block 0, 0 warp 1: sync_block");
    SAYS(text, "32 threads of block 1, 0 warp 1: sync_cluster");
    SAYS(error_of({}, [] { if (thread() > 0) sync_warp(); else barrier_wait(barrier_at(0), 0); }), "never initialised");
    SAYS(error_of({}, [] {
             make_barrier(0);
             if (thread() > 0) sync_warp();
             else barrier_wait(barrier_at(0), 0);
         }),
         "31 threads of block 0, 0 warp 0: sync_warp");
}

}  // namespace

int main() {
    RUN(copies_are_in_when_waited_for);
    RUN(copies_are_checked);
    RUN(bulk_copies_arrive);
    RUN(bulk_copies_are_checked);
    RUN(barriers_of_arrivals);
    RUN(parities_are_as_ptx_has_them);
    RUN(misused_barriers);
    RUN(blocks_exchange);
    RUN(one_buffer_is_too_few);
    RUN(sends_are_checked);
    RUN(deadlocks_are_told);
    return check::report();
}
