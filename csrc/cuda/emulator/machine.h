// The emulator's state and how fibers wait for each other and for bytes on their way. For emulator.cpp alone.
#pragma once

#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "emulator.h"
#include "fibers.h"
#include "products.h"

namespace dql {
namespace emulator {

constexpr int64_t GUARD = 1024;                       // bytes before and behind shared memory that nobody may write
constexpr uint16_t GUARD_HALF = 0x7fa5;               // NaN too, as bf16 and twice as float32
constexpr uint64_t BARRIER_WORD = 0xffa7ffa7ffa7ffa7;  // what memory has where a barrier is
constexpr uint32_t ALL_LANES = 0xffffffffu;
constexpr int64_t MOST_BYTES = (1 << 20) - 1;  // of a barrier's count

// What a warp's lanes do together.
enum class Collective : int {
    BLOCK, SOME, ARRIVE, CLUSTER, WARP, SHUFFLE, MMA_BF16, MMA_TF32, STORE_MATRICES, WGMMA_CLOSE, WGMMA_WAIT
};
inline const char* name_of(Collective kind) {
    static const char* const names[] = {"sync_block",  "sync_some", "arrive_some", "sync_cluster",   "sync_warp",
                                        "shuffle_xor", "mma_bf16",  "mma_tf32",    "store_matrices", "wgmma_close",
                                        "wgmma_wait"};
    return names[static_cast<int>(kind)];
}

struct Fiber;

struct BarrierState {
    int arrivals = 0, pending = 0;
    int64_t phase = 0, bytes = 0;  // announced and not in; negative: in and not announced
    bool expected = false, announced = false;  // in this phase; to others than `maker`
    bool of_peers = false;                     // another block's stores counted on it
    const Fiber* maker = nullptr;
    std::vector<Fiber*> waiting;
};

struct Copy {
    void* to;
    const void* from;
    int64_t group;
};

struct Fiber {
    Context context;
    Here where;
    bool done;
    const char* waits;  // the call
    int numbers[2];     // what it was given: of barrier_wait the byte and the parity; -1: nothing
    std::vector<Copy> copies;
    int64_t groups;                     // closed
    std::vector<WideProduct> products;  // of the open group; d[0] is this lane's
    bool fenced;                        // by wgmma_begin
};

struct Warp {
    Fiber* fibers;
    uint32_t runnable, arrived, ended;  // lanes
    bool lazy;                          // runs when nobody else can
    Collective kind;                    // that lanes have arrived at
    int which;
    Fragments fragments;
    float* out[32];
    char* rows[32];
    std::vector<std::pair<int64_t, WideProduct>> products;  // with their groups
    int64_t groups;
};

struct Meeting {
    uint32_t warps = 0, passed = 0;  // that have come; of these, that went on at once
    int threads = 0;  // as the first to come said
};

struct Block {
    std::vector<char> memory;
    char* shared;
    int64_t size;
    int ended;  // threads
    Meeting all, some[16];
    Warp* warps;
    std::map<int64_t, BarrierState> barriers;  // by byte
};

struct Delivery {  // bytes on their way
    char* to;
    const char* from;  // null: `value`
    uint32_t value[4];
    uint32_t bytes;
    int64_t barrier;
    int rank;
};

struct Machine {
    const std::function<void()>* body = nullptr;
    int cluster = 1, threads = 0;
    std::vector<Block> blocks;
    std::vector<Warp> warps;
    std::vector<Fiber> fibers;
    int met = 0;  // warps in sync_cluster
    std::vector<Delivery> deliveries;
    Fiber* current = nullptr;
    std::string error;
    Context scheduler;
};

inline thread_local Machine* machine = nullptr;
inline thread_local uint64_t random_state = 1;
inline thread_local Order order_now = Order::RANDOM;
inline thread_local Stacks stacks;

inline uint32_t drawn() {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(random_state >> 33);
}

// As one text, whatever the parts are.
template <class... Parts>
std::string text_of(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

// Names the thread, unless bytes arrive meanwhile, which is nobody's doing.
template <class... Parts>
[[noreturn]] void wrong(const Parts&... parts) {
    std::string where;
    if (machine->current != nullptr)
        where = text_of(" (block ", here.block_x, ", ", here.block_y, ", thread ", here.thread, ")");
    throw std::runtime_error(text_of("emulator: ", parts..., where));
}

inline Block& my_block() { return machine->blocks[here.rank]; }
inline Warp& my_warp() { return my_block().warps[here.thread >> 5]; }

// ---- waiting ----

inline const char BARRIER_WAIT[] = "barrier_wait";

inline void sleep_in(const char* call, int first = -1, int second = -1) {
    Fiber& me = *machine->current;
    me.waits = call;
    me.numbers[0] = first, me.numbers[1] = second;
    my_warp().runnable &= ~(1u << (here.thread & 31));
    go(me.context, machine->scheduler);
}

// True for the last lane of a warp that comes; the others are to sleep until it wakes them.
inline bool last_of_warp(Collective kind, int which = 0) {
    Warp& warp = my_warp();
    const auto named = [](Collective of, int number) {
        return of == Collective::SOME ? text_of(name_of(of), "(", number, ")") : std::string(name_of(of));
    };
    if (warp.ended != 0) wrong(named(kind, which), " after a lane of the warp has ended");
    if (warp.arrived == 0) warp.kind = kind, warp.which = which;
    if (warp.kind != kind || warp.which != which)
        wrong("lanes of a warp are in ", named(warp.kind, warp.which), " and in ", named(kind, which));
    warp.arrived |= 1u << (here.thread & 31);
    if (warp.arrived != ALL_LANES) return false;
    warp.arrived = 0;
    return true;
}

// `act` by the last lane, for all.
template <class Act>
void together(Collective kind, const Act& act) {
    if (!last_of_warp(kind)) return sleep_in(name_of(kind));
    act();
    my_warp().runnable = ALL_LANES;
}

// Of some or all warps of the block. True when all have come: then those that wait run on.
inline bool met(Meeting& meeting, int threads, bool waits = true) {
    Block& block = my_block();
    const uint32_t warp = 1u << (here.thread >> 5);
    if ((meeting.warps & warp) != 0) wrong("a warp comes to a barrier again before the others have");
    meeting.warps |= warp;
    if (!waits) meeting.passed |= warp;
    if (__builtin_popcount(meeting.warps) * 32 < threads) return false;
    for (int w = 0; w < machine->threads / 32; ++w)
        if (((meeting.warps & ~meeting.passed) >> w & 1) != 0) block.warps[w].runnable = ALL_LANES;
    meeting = Meeting();
    return true;
}

// ---- shared memory ----

inline void fill(Block& block, int64_t bytes) {
    block.memory.resize(bytes + 2 * GUARD + 1024);
    const auto start = reinterpret_cast<uintptr_t>(block.memory.data()) + GUARD;
    block.shared = reinterpret_cast<char*>((start + 1023) & ~uintptr_t{1023});
    block.size = bytes;
    for (int64_t i = 0; i < GUARD; i += 2) {
        memcpy(block.shared - GUARD + i, &GUARD_HALF, 2);
        memcpy(block.shared + bytes + i, &GUARD_HALF, 2);
    }
    memset(block.shared, 0xff, bytes);
}

inline void check_guards(const Block& block) {
    for (int64_t i = 0; i < GUARD; i += 2) {
        if (memcmp(block.shared - GUARD + i, &GUARD_HALF, 2) != 0)
            wrong("memory was written before the block's shared memory, at byte ", i - GUARD);
        if (memcmp(block.shared + block.size + i, &GUARD_HALF, 2) != 0)
            wrong("memory was written behind the block's shared memory of ", block.size, ", at byte ", block.size + i);
    }
}

inline void check_inside(int64_t offset, int64_t bytes, int64_t unit, const char* what) {
    const int64_t size = my_block().size;
    if (offset < 0 || offset + bytes > size)
        wrong(what, " has bytes ", offset, " .. ", offset + bytes - 1, ", but shared memory has ", size);
    if (offset % unit != 0 || bytes % unit != 0)
        wrong(what, " of ", bytes, " bytes at byte ", offset, " of shared memory is not at a multiple of ", unit);
}

inline int64_t offset_of(const void* at) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(here.shared));
}

inline void check_source(const void* from, const char* what) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) wrong(what, " reads from ", from, ", which is no multiple of 16");
    for (const Block& block : machine->blocks)
        if (from >= block.shared && from < block.shared + block.size)
            wrong(what, " reads from shared memory; it copies from device memory alone");
}

// ---- barriers and deliveries ----

inline void check_not_overwritten(int rank, int64_t at) {
    if (memcmp(machine->blocks[rank].shared + at, &BARRIER_WORD, 8) != 0)
        wrong("the barrier at byte ", at, " of block ", rank, " was overwritten");
}

inline BarrierState& state_of(int rank, int64_t at) {
    Block& block = machine->blocks[rank];
    const auto found = block.barriers.find(at);
    if (found == block.barriers.end()) wrong("the barrier at byte ", at, " of block ", rank, " was never initialised");
    check_not_overwritten(rank, at);
    BarrierState& state = found->second;
    if (!state.announced && state.maker != machine->current)
        wrong("a barrier is used by others before the thread that initialised it called barriers_ready");
    return state;
}

inline void settle(BarrierState& state) {
    if (state.bytes > MOST_BYTES || state.bytes < -MOST_BYTES)
        wrong("a barrier would count ", state.bytes, " bytes, but it counts less than 2^20 a phase");
    if (state.pending > 0 || state.bytes != 0) return;
    ++state.phase;
    state.pending = state.arrivals;
    state.expected = false;
    for (Fiber* fiber : state.waiting)  // each looks again when it runs: it may come too late
        machine->blocks[fiber->where.rank].warps[fiber->where.thread >> 5].runnable |= 1u << (fiber->where.thread & 31);
    state.waiting.clear();
}

inline void land(const Delivery& d) {
    memcpy(d.to, d.from != nullptr ? d.from : reinterpret_cast<const char*>(d.value), d.bytes);
    BarrierState& state = state_of(d.rank, d.barrier);
    state.bytes -= d.bytes;
    settle(state);
}

inline void land_one(size_t index) {
    const Delivery d = machine->deliveries[index];
    machine->deliveries[index] = machine->deliveries.back();
    machine->deliveries.pop_back();
    land(d);
}

inline void deliver(const Delivery& d) {
    state_of(d.rank, d.barrier);
    if (machine->blocks[d.rank].ended == machine->threads) wrong("a store to block ", d.rank, ", which has ended");
    if (order_now == Order::EAGER) return land(d);
    machine->deliveries.push_back(d);
}

// When nobody can go on. Late: one that somebody waits for.
inline void land_some() {
    auto& all = machine->deliveries;
    if (order_now == Order::RANDOM) {
        for (size_t n = 1 + drawn() % all.size(); n > 0; --n) land_one(drawn() % all.size());
        return;
    }
    const size_t first = drawn() % all.size();
    for (size_t n = 0; n < all.size(); ++n) {
        const Delivery& d = all[(first + n) % all.size()];
        if (!state_of(d.rank, d.barrier).waiting.empty()) return land_one((first + n) % all.size());
    }
    land_one(first);
}

// What each waits for, when nobody can go on.
inline std::string stuck(const Machine& m) {
    std::map<std::string, int> groups;  // of threads
    for (const Fiber& fiber : m.fibers) {
        if (fiber.done) continue;
        std::string what = text_of("block ", fiber.where.block_x, ", ", fiber.where.block_y, " warp ",
                                   fiber.where.thread / 32, ": ", fiber.waits);
        if (fiber.numbers[0] >= 0) what += text_of("(", fiber.numbers[0], ", ", fiber.numbers[1], ")");
        if (fiber.waits == BARRIER_WAIT) {
            const BarrierState& state = m.blocks[fiber.where.rank].barriers.at(fiber.numbers[0]);
            what += text_of(": the barrier at this byte is in phase ", state.phase, " and lacks ",
                            state.pending, " arrivals and ", state.bytes, " bytes");
        }
        ++groups[what];
    }
    std::string text = "emulator: nobody can go on:";
    int shown = 0;
    for (const auto& group : groups)
        if (++shown <= 16) text += text_of("\n  ", group.second, " threads of ", group.first);
    if (shown > 16) text += "\n  ...";
    return text;
}

}  // namespace emulator
}  // namespace dql
