#include "emulator.h"

#include <stdlib.h>

#include "machine.h"

namespace dql {
namespace emulator {

__thread Here here = {0, 0, 0, 0, 0, 0, 1, nullptr};
__thread int64_t sent = 0;  // bytes between blocks, of the last run

namespace {

void entry() {
    Machine& m = *machine;
    arrived(m.scheduler);
    Fiber& me = *m.current;
    try {
        (*m.body)();
    } catch (const std::exception& error) {
        m.error = error.what();
    } catch (...) {
        m.error = "emulator: a kernel threw something that is no std::exception";
    }
    me.done = true;
    go(me.context, m.scheduler);
    abort();  // nobody goes back to a fiber that is done
}

void end_of_block(Machine& m, Block& block) {
    for (const Delivery& d : m.deliveries)
        if (&m.blocks[d.rank] == &block) wrong("a block ended while ", d.bytes, " bytes to it were under way");
    for (const auto& barrier : block.barriers) check_not_overwritten(here.rank, barrier.first);
    check_guards(block);
    for (int which = 1; which < 16; ++which)
        if (block.some[which].warps != 0) wrong("a block ended, but barrier ", which, " still waits for others");
    for (int w = 0; w < m.threads / 32; ++w)
        if (w % 4 != 0 && block.warps[w].groups != block.warps[w - 1].groups)
            wrong("warps of a warp group closed ", block.warps[w].groups, " and ", block.warps[w - 1].groups,
                  " groups of wgmma");
}

void end_of_thread(Machine& m, Warp& warp, Fiber& fiber) {
    Block& block = my_block();
    if (!fiber.copies.empty()) wrong("a thread ended with copies under way that it did not wait for");
    if (!fiber.products.empty() || !warp.products.empty())
        wrong("a thread ended with wgmma under way that it did not wait for");
    if (warp.arrived != 0) wrong("a lane ended while others of its warp wait in ", name_of(warp.kind));
    if (block.all.warps != 0) wrong("a thread ended while others of its block wait in sync_block");
    if (m.met != 0) wrong("a thread ended while others of its cluster wait in sync_cluster");
    warp.ended |= 1u << (here.thread & 31);
    warp.runnable &= ~warp.ended;
    if (++block.ended == m.threads) end_of_block(m, block);
}

// One turn of a warp: every lane that can, until it waits. Either end may be first: nothing orders them.
void run_warp(Machine& m, Warp& warp) {
    const bool backwards = drawn() % 2 != 0;
    for (uint32_t lanes = warp.runnable; lanes != 0;) {
        const int lane = backwards ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes);
        lanes &= ~(1u << lane);
        Fiber& fiber = warp.fibers[lane];
        m.current = &fiber;
        here = fiber.where;
        go(m.scheduler, fiber.context);
        if (!m.error.empty()) throw std::runtime_error(m.error);
        if (fiber.done) end_of_thread(m, warp, fiber);
    }
    m.current = nullptr;
}

// For a while nobody, one warp, one block, or all but one warp run only when nobody else can.
void choose_lazy(Machine& m) {
    const uint32_t kind = drawn() % 4;
    const size_t one = drawn() % m.warps.size(), per_block = m.threads / 32;
    for (size_t w = 0; w < m.warps.size(); ++w)
        m.warps[w].lazy = (kind == 1 && w == one) || (kind == 2 && w / per_block == one / per_block) ||
                          (kind == 3 && w != one);
}

// Often the one that ran last: it gets ahead, and what it uses is in the cache.
Warp* choose_warp(Machine& m, Warp* last) {
    if (drawn() % 128 == 0) choose_lazy(m);
    if (last != nullptr && last->runnable != 0 && !last->lazy && drawn() % 4 != 0) return last;
    const size_t count = m.warps.size(), first = drawn() % count;
    Warp* lazy = nullptr;
    for (size_t n = 0; n < count; ++n) {
        Warp& warp = m.warps[(first + n) % count];
        if (warp.runnable == 0) continue;
        if (!warp.lazy) return &warp;
        if (lazy == nullptr) lazy = &warp;
    }
    return lazy;
}

void begin_cluster(Machine& m, int64_t x, int64_t y, int64_t blocks_x, int64_t blocks_y, int64_t shared_bytes) {
    const int per_block = m.threads / 32;
    m.met = 0;
    for (int rank = 0; rank < m.cluster; ++rank) {
        Block& block = m.blocks[rank];
        fill(block, shared_bytes);
        block.ended = 0;
        block.warps = &m.warps[rank * per_block];
        for (Meeting& meeting : block.some) meeting = Meeting();
        block.barriers.clear();
    }
    for (size_t w = 0; w < m.warps.size(); ++w) {
        Warp& warp = m.warps[w];
        warp.fibers = &m.fibers[w * 32];
        warp.runnable = ALL_LANES;
        warp.arrived = warp.ended = 0;
        warp.groups = 0;
    }
    for (size_t i = 0; i < m.fibers.size(); ++i) {
        Fiber& fiber = m.fibers[i];
        const int rank = static_cast<int>(i) / m.threads;
        fiber.where = {static_cast<int>(i) % m.threads,
                       static_cast<int>(x) + rank,
                       static_cast<int>(y),
                       static_cast<int>(blocks_x),
                       static_cast<int>(blocks_y),
                       rank,
                       m.cluster,
                       m.blocks[rank].shared};
        fiber.done = fiber.fenced = false;
        fiber.groups = 0;
        prepare(fiber.context, stacks.at(i, m.fibers.size()), entry);
    }
    choose_lazy(m);
}

void run_cluster(Machine& m) {
    const auto running = [&] {
        for (const Block& block : m.blocks)
            if (block.ended < m.threads) return true;
        return false;
    };
    for (Warp* warp = nullptr; true;) {
        warp = choose_warp(m, warp);
        if (warp != nullptr) {
            run_warp(m, *warp);
            if (order_now == Order::RANDOM && !m.deliveries.empty() && drawn() % 16 == 0)
                land_one(drawn() % m.deliveries.size());
        } else if (!running()) {
            return;
        } else if (m.deliveries.empty()) {
            throw std::runtime_error(stuck(m));
        } else {
            land_some();
        }
    }
}

}  // namespace

void seed(uint64_t value) { random_state = value * 2 + 1; }
void order(Order value) { order_now = value; }

int64_t sent_bytes() { return sent; }

void run(const std::function<void()>& body, int64_t blocks_x, int64_t blocks_y, int cluster, int threads,
         int64_t shared_bytes) {
    if (machine != nullptr) throw std::runtime_error("emulator: a kernel cannot launch another");
    sent = 0;
    if (threads % 32 != 0 || threads < 32 || threads > 1024 || cluster < 1 || cluster > 8 || blocks_x % cluster != 0 ||
        blocks_x < 1 || blocks_y < 1 || shared_bytes < 0)
        throw std::runtime_error(text_of("emulator: no grid has ", blocks_x, " x ", blocks_y, " blocks in clusters of ",
                                         cluster, ", ", threads, " threads and ", shared_bytes,
                                         " bytes of shared memory"));
    struct Restored {
        ~Restored() {
            machine = nullptr;
            here = {0, 0, 0, 0, 0, 0, 1, nullptr};
        }
    };
    Machine m;
    m.body = &body;
    m.cluster = cluster, m.threads = threads;
    m.blocks.resize(cluster);
    m.warps.resize(cluster * threads / 32);
    m.fibers.resize(cluster * threads);
    const Restored restored;
    machine = &m;
    for (int64_t y = 0; y < blocks_y; ++y)
        for (int64_t x = 0; x < blocks_x; x += cluster) {
            begin_cluster(m, x, y, blocks_x, blocks_y, shared_bytes);
            run_cluster(m);
        }
}

}  // namespace emulator

namespace device {

using namespace emulator;

void sync_block() {
    if (my_block().ended > 0) wrong("sync_block after a thread of the block has ended");
    if (!last_of_warp(Collective::BLOCK) || !met(my_block().all, machine->threads)) sleep_in("sync_block");
}

namespace {
Meeting& meeting_of(const char* call, int which, int threads) {
    if (which < 1 || which > 15 || threads % 32 != 0 || threads < 32 || threads > machine->threads)
        wrong(call, "(", which, ", ", threads, "): barriers are 1 .. 15, threads whole warps of the block");
    Meeting& meeting = my_block().some[which];
    if (meeting.threads == 0) meeting.threads = threads;
    if (meeting.threads != threads)
        wrong(call, "(", which, ") of ", threads, " threads, but others meet there with ", meeting.threads);
    return meeting;
}
}  // namespace

void arrive_some(int which, int threads) {
    Meeting& meeting = meeting_of("arrive_some", which, threads);
    if (!last_of_warp(Collective::ARRIVE, which)) return sleep_in("arrive_some", which, threads);
    met(meeting, threads, false);
    my_warp().runnable = ALL_LANES;
}

void sync_some(int which, int threads) {
    Meeting& meeting = meeting_of("sync_some", which, threads);
    if (!last_of_warp(Collective::SOME, which) || !met(meeting, threads))
        sleep_in("sync_some", which, threads);
}

void sync_warp() {
    together(Collective::WARP, [] {});
}

void sync_cluster() {
    for (const Block& block : machine->blocks)
        if (block.ended > 0) wrong("sync_cluster after a thread of the cluster has ended");
    if (!last_of_warp(Collective::CLUSTER) || ++machine->met < static_cast<int>(machine->warps.size()))
        return sleep_in("sync_cluster");
    machine->met = 0;
    for (Warp& warp : machine->warps) warp.runnable = ALL_LANES;
}

float shuffle_xor(float value, int mask) {
    if (mask < 0 || mask > 31) wrong("shuffle_xor by ", mask, "; lanes are 0 .. 31");
    Warp& warp = my_warp();
    float result = 0;
    warp.fragments.a[lane()][0] = as_bits(value);
    warp.fragments.a[lane()][1] = static_cast<uint32_t>(lane() ^ mask);
    warp.out[lane()] = &result;
    together(Collective::SHUFFLE, [&] {
        for (int l = 0; l < 32; ++l) *warp.out[l] = as_float(warp.fragments.a[warp.fragments.a[l][1]][0]);
    });
    return result;
}

// ---- copies: as a thread's own, at the latest when it waits for their group ----

void copy16(void* to, const void* from) {
    check_inside(offset_of(to), 16, 16, "copy16");
    check_source(from, "copy16");
    Fiber& me = *machine->current;
    me.copies.push_back({to, from, me.groups});
    if (order_now == Order::LATE || (order_now == Order::RANDOM && drawn() % 8 != 0)) return;
    Copy& early = me.copies[drawn() % me.copies.size()];
    memcpy(early.to, early.from, 16);
    early = me.copies.back();
    me.copies.pop_back();
}
void close_group() { ++machine->current->groups; }
void wait_for_groups(int pending) {
    Fiber& me = *machine->current;
    size_t left = 0;
    for (const Copy& copy : me.copies) {
        if (copy.group < me.groups - pending)
            memcpy(copy.to, copy.from, 16);
        else
            me.copies[left++] = copy;
    }
    me.copies.resize(left);
}

// ---- barriers that count bytes ----

void barrier_init(Barrier* barrier, int arrivals) {
    const int64_t at = offset_of(barrier);
    check_inside(at, 8, 8, "a barrier");
    if (arrivals < 1 || arrivals > MOST_BYTES) wrong("a barrier of ", arrivals, " arrivals");
    if (my_block().barriers.count(at) != 0) wrong("the barrier at byte ", at, " is initialised twice");
    BarrierState state;
    state.arrivals = state.pending = arrivals;
    state.maker = machine->current;
    my_block().barriers[at] = state;
    memcpy(here.shared + at, &BARRIER_WORD, 8);
}
void barriers_ready() {
    for (auto& barrier : my_block().barriers)
        if (barrier.second.maker == machine->current) barrier.second.announced = true;
}
void barrier_expect(Barrier* barrier, uint32_t bytes) {
    BarrierState& state = state_of(here.rank, offset_of(barrier));
    if (state.expected && state.arrivals == 1) wrong("barrier_expect twice in one phase");
    state.expected = true;
    state.bytes += bytes;
    if (--state.pending < 0) wrong("more arrivals at a barrier than it was made for");
    settle(state);
}
void barrier_arrive(Barrier* barrier) {
    BarrierState& state = state_of(here.rank, offset_of(barrier));
    if (--state.pending < 0) wrong("more arrivals at a barrier than it was made for");
    settle(state);
}
namespace {
BarrierState& waited_for(Barrier* barrier, uint32_t parity) {
    if (parity > 1) wrong("barrier_wait for parity ", parity, ", which is 0 or 1");
    const int64_t at = offset_of(barrier);
    BarrierState& state = state_of(here.rank, at);
    Fiber& me = *machine->current;
    while (static_cast<uint32_t>(state.phase & 1) == parity) {
        state.waiting.push_back(&me);
        sleep_in(BARRIER_WAIT, static_cast<int>(at), static_cast<int>(parity));
    }
    return state;
}
}  // namespace
void barrier_wait(Barrier* barrier, uint32_t parity) {
    if (waited_for(barrier, parity).of_peers)
        wrong("barrier_wait sees what this block wrote; other blocks' stores ask for barrier_wait_for_peers");
}
void barrier_wait_for_peers(Barrier* barrier, uint32_t parity) { waited_for(barrier, parity); }

void bulk_copy(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
    check_inside(offset_of(to), bytes, 16, "bulk_copy");
    check_source(from, "bulk_copy");
    deliver({static_cast<char*>(to), static_cast<const char*>(from), {}, bytes, offset_of(barrier), here.rank});
}

Peer peer(int rank) {
    if (rank < 0 || rank >= machine->cluster) wrong("there is no block ", rank, " in a cluster of ", machine->cluster);
    return {rank};
}
namespace {
void counted_from_here(Peer peer, int barrier) {
    auto& barriers = machine->blocks[peer.rank].barriers;
    const auto found = barriers.find(barrier);
    if (found != barriers.end() && peer.rank != here.rank) found->second.of_peers = true;
}
}  // namespace
void send8(Peer peer, int to, uint2 value, int barrier) {
    check_inside(to, 8, 8, "send8");
    sent += 8;
    counted_from_here(peer, barrier);
    char* const shared = machine->blocks[peer.rank].shared;
    deliver({shared + to, nullptr, {value.x, value.y, 0, 0}, 8, barrier, peer.rank});
}
void send16(Peer peer, int to, uint4 value, int barrier) {
    check_inside(to, 16, 16, "send16");
    sent += 16;
    counted_from_here(peer, barrier);
    char* const shared = machine->blocks[peer.rank].shared;
    deliver({shared + to, nullptr, {value.x, value.y, value.z, value.w}, 16, barrier, peer.rank});
}

// ---- tensor cores: the last lane multiplies for all ----

namespace {
Fragments& put(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Fragments& all = my_warp().fragments;
    memcpy(all.a[lane()], a, sizeof a);
    memcpy(all.b[lane()], b, sizeof b);
    all.d[lane()] = d;
    return all;
}
}  // namespace

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const Fragments& all = put(d, a, b);
    together(Collective::MMA_BF16, [&] { multiply_bf16(all); });
}

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto rounded = [](uint32_t bits) { return (bits & 0x1fffu) == 0 || as_float(bits) != as_float(bits); };
    for (const uint32_t bits : {b[0], b[1]})
        if (!rounded(bits)) wrong("mma_tf32 of ", as_float(bits), ", which was not rounded to tf32");
    // Of a there may be rows that nobody asked for, with whatever was in their place: such a row's result is NaN.
    uint32_t rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = rounded(a[i]) ? a[i] : 0x7fffffffu;
    const Fragments& all = put(d, rows, b);
    together(Collective::MMA_TF32, [&] { multiply_tf32(all); });
}

void store_matrices(void* row, const uint32_t (&matrices)[4]) {
    check_inside(offset_of(row), 16, 16, "store_matrices");
    Fragments& all = my_warp().fragments;
    memcpy(all.a[lane()], matrices, sizeof matrices);
    my_warp().rows[lane()] = static_cast<char*>(row);
    together(Collective::STORE_MATRICES, [&] {
        for (int i = 0; i < 4; ++i)
            for (int from = 0; from < 32; ++from)
                memcpy(my_warp().rows[8 * i + from / 4] + from % 4 * 4, &all.a[from][i], 4);
    });
}

// ---- wgmma: each warp its own 16 rows, a group at a time, from what shared memory holds then ----

uint64_t swizzled_operand(const void* at) { return static_cast<uint64_t>(offset_of(at)); }
void wgmma_begin() { machine->current->fenced = true; }

void wgmma_issue(float* d, int columns, uint64_t a, uint64_t b, bool add) {
    Fiber& me = *machine->current;
    if (!me.fenced) wrong("wgmma without wgmma_begin");
    for (const uint64_t operand : {a, b}) {
        const uint64_t start = operand & ~uint64_t{1023}, rows = operand == b ? columns : 64;
        if (operand % 32 != 0 || operand - start >= 128 || start + rows * 128 > static_cast<uint64_t>(my_block().size))
            wrong("an operand of wgmma, ", rows, " rows at byte ", static_cast<int64_t>(operand),
                  ", is not at a multiple of 1024 and up to three times 32, or not inside shared memory");
    }
    WideProduct product = {columns, a, b, add, {d}};
    me.products.push_back(product);
}

namespace {
void multiply_groups(Warp& warp, int64_t before) {
    size_t left = 0;
    for (const auto& [group, product] : warp.products) {
        if (group < before)
            multiply_wide(product, here.shared, warp.fibers->where.thread / 32 % 4 * 16);
        else
            warp.products[left++] = {group, product};
    }
    warp.products.resize(left);
}
}  // namespace

void wgmma_close() {
    together(Collective::WGMMA_CLOSE, [] {
        Warp& warp = my_warp();
        for (size_t i = 0; i < warp.fibers->products.size(); ++i) {
            WideProduct product = warp.fibers->products[i];
            for (int l = 0; l < 32; ++l) {
                const auto& own = warp.fibers[l].products;
                if (own.size() != warp.fibers->products.size() || own[i].a != product.a || own[i].b != product.b ||
                    own[i].add != product.add || own[i].columns != product.columns)
                    wrong("lanes of a warp ask for different wgmma");
                product.d[l] = own[i].d[0];
            }
            warp.products.emplace_back(warp.groups, product);
        }
        for (int l = 0; l < 32; ++l) warp.fibers[l].products.clear();
        ++warp.groups;
        if (order_now == Order::EAGER || (order_now == Order::RANDOM && drawn() % 2 != 0))
            multiply_groups(warp, warp.groups);
    });
}

void wgmma_wait_for(int pending) {
    if (!machine->current->products.empty()) wrong("wgmma_wait for a group that was not closed");
    machine->current->fenced = false;
    together(Collective::WGMMA_WAIT, [&] { multiply_groups(my_warp(), my_warp().groups - pending); });
}

}  // namespace device
}  // namespace dql
