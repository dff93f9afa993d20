#include "emulator.h"

#include <stdlib.h>
#include <sys/mman.h>

#include <map>
#include <sstream>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace dql {
namespace emulator {

thread_local Here here;

namespace {

constexpr size_t STACK = 64 * 1024;
constexpr int64_t GUARD = 1024;  // bytes behind shared memory that nobody may write
constexpr char POISON = static_cast<char>(0xff);

[[noreturn]] void wrong(const std::string& what) {
    std::ostringstream text;
    text << "emulator: " << what << " (block " << here.block_x << ", " << here.block_y << ", thread " << here.thread << ")";
    throw std::runtime_error(text.str());
}

struct Phase {  // of threads that meet
    int count = 0, generation = 0;
};

struct BarrierState {
    int arrivals = 0, pending = 0, phase = 0;
    int64_t bytes = 0;
    bool expected = false;
};

struct Product {  // of wgmma, not yet made
    float* d;
    int columns;
    uint64_t a, b;
    bool add;
};

struct Fiber {
    Here where;
    bool done = false;
    std::function<bool()> ready;
    const char* waits = "";
    const void* waits_for = nullptr;
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    struct Copy {
        void* to;
        const void* from;
    };
    std::vector<std::vector<Copy>> groups;  // closed, the oldest first; the last one is open
    std::vector<std::vector<Product>> products;
};

struct Warp {
    Phase phase;
    Collective kind = Collective::NONE;
    uint32_t in[32][6];
};

struct Block {
    std::vector<char> memory;
    char* shared = nullptr;
    int64_t size = 0;
    int finished = 0;
    Phase all;
    std::map<int, Phase> some;
    std::vector<Warp> warps;
    std::map<const void*, BarrierState> barriers;
};

struct Delivery {  // bytes on their way
    char* to;
    const char* from;  // null: `value`
    uint32_t value[4];
    uint32_t bytes;
    const void* barrier;
    int rank;
};

struct Machine {
    const std::function<void()>* body = nullptr;
    int cluster = 1, threads = 0;
    std::vector<Block> blocks;
    std::vector<Fiber> fibers;
    Phase all;
    std::vector<Delivery> deliveries;
    Fiber* current = nullptr;
    std::string error;
#if defined(__x86_64__)
    void* scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
};

thread_local Machine* machine = nullptr;
thread_local uint64_t random_state = 1;

uint32_t drawn() {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(random_state >> 33);
}

// Stacks stay mapped for the next run.
class Stacks {
public:
    char* of(size_t fiber, size_t count) {
        if (count > count_) {
            if (memory_ != nullptr) munmap(memory_, count_ * STACK);
            memory_ = static_cast<char*>(
                mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
            if (memory_ == MAP_FAILED) throw std::bad_alloc();
            count_ = count;
        }
        return memory_ + fiber * STACK;
    }
    ~Stacks() {
        if (memory_ != nullptr) munmap(memory_, count_ * STACK);
    }

private:
    char* memory_ = nullptr;
    size_t count_ = 0;
};
thread_local Stacks stacks;

// ---- switching ----

#if defined(__x86_64__)
extern "C" void dql_emulator_switch(void** from, void* to);
asm(R"(
.text
.local dql_emulator_switch
.type dql_emulator_switch, @function
dql_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

void to_scheduler(Fiber& from) { dql_emulator_switch(&from.stack_pointer, machine->scheduler); }
void to_fiber(Fiber& to) { dql_emulator_switch(&machine->scheduler, to.stack_pointer); }
#else
void to_scheduler(Fiber& from) { swapcontext(&from.context, &machine->scheduler); }
void to_fiber(Fiber& to) { swapcontext(&machine->scheduler, &to.context); }
#endif

void entry() {
    try {
        (*machine->body)();
        for (const auto& group : machine->current->groups)
            if (!group.empty()) wrong("a thread ended with copies under way that nobody waited for");
        if (!machine->current->products.empty()) wrong("a thread ended with products under way that nobody waited for");
    } catch (const std::exception& error) {
        machine->error = error.what();
    }
    machine->current->done = true;
    to_scheduler(*machine->current);
    abort();  // nobody goes back to a fiber that is done
}

void start(Fiber& fiber, char* stack) {
#if defined(__x86_64__)
    auto* top = reinterpret_cast<uint64_t*>(stack + STACK);
    *--top = 0;
    *--top = reinterpret_cast<uint64_t>(&entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#endif
}

template <class Ready>
void wait_until(const char* what, const void* which, Ready ready) {
    if (ready()) return;
    Fiber& me = *machine->current;
    me.ready = ready;
    me.waits = what;
    me.waits_for = which;
    to_scheduler(me);
}

// ---- meeting ----

Block& my_block() { return machine->blocks[here.rank]; }

void meet(const char* what, Phase& phase, int total) {
    const int mine = phase.generation;
    if (++phase.count == total) {
        phase.count = 0;
        ++phase.generation;
        return;
    }
    wait_until(what, &phase, [&phase, mine] { return phase.generation != mine; });
}

Warp& my_warp(Collective kind) {
    Warp& warp = my_block().warps[here.thread >> 5];
    static const char* const names[] = {"none", "sync_warp", "shuffle_xor", "mma_bf16", "mma_tf32", "wgmma"};
    if (warp.phase.count == 0)
        warp.kind = kind;
    else if (warp.kind != kind)
        wrong(std::string("lanes of a warp meet in ") + names[static_cast<int>(warp.kind)] + " and in " +
              names[static_cast<int>(kind)]);
    return warp;
}

// ---- barriers and deliveries ----

BarrierState& state_of(const void* barrier) {
    for (Block& block : machine->blocks) {
        const auto found = block.barriers.find(barrier);
        if (found != block.barriers.end()) return found->second;
    }
    wrong("a barrier was never initialised");
}

void settle(BarrierState& state) {
    if (state.pending > 0 || state.bytes != 0) return;
    ++state.phase;
    state.pending = state.arrivals;
    state.expected = false;
}

void deliver(size_t index) {
    const Delivery d = machine->deliveries[index];
    machine->deliveries[index] = machine->deliveries.back();
    machine->deliveries.pop_back();
    if (machine->blocks[d.rank].finished == machine->threads) wrong("bytes arrive at a block that has ended");
    memcpy(d.to, d.from != nullptr ? d.from : reinterpret_cast<const char*>(d.value), d.bytes);
    BarrierState& state = state_of(d.barrier);
    state.bytes -= d.bytes;
    settle(state);
}

void check_inside(const void* at, int64_t bytes, int64_t unit, const char* what) {
    const Block& block = my_block();
    const int64_t offset = static_cast<const char*>(at) - block.shared;
    if (offset < 0 || offset + bytes > block.size)
        wrong(std::string(what) + " goes to bytes " + std::to_string(offset) + " .. of " + std::to_string(block.size) +
              " of shared memory");
    if (offset % unit != 0 || bytes % unit != 0)
        wrong(std::string(what) + " of " + std::to_string(bytes) + " bytes to offset " + std::to_string(offset) +
              " is not at a multiple of " + std::to_string(unit));
}

void send(int rank, int to, const uint32_t* value, uint32_t bytes, int barrier) {
    check_inside(here.shared + to, bytes, bytes, "a store to another block");
    char* shared = machine->blocks[rank].shared;
    Delivery d = {shared + to, nullptr, {}, bytes, shared + barrier, rank};
    memcpy(d.value, value, bytes);
    state_of(d.barrier);
    machine->deliveries.push_back(d);
}

// ---- a cluster ----

std::string stuck() {
    std::ostringstream text;
    text << "emulator: nobody can go on:";
    std::map<std::string, int> groups;
    for (const Fiber& fiber : machine->fibers) {
        if (fiber.done) continue;
        std::ostringstream one;
        one << " block " << fiber.where.block_x << " warp " << fiber.where.thread / 32 << " waits in " << fiber.waits;
        for (const Block& block : machine->blocks) {
            const auto found = block.barriers.find(fiber.waits_for);
            if (found != block.barriers.end())
                one << " at byte " << static_cast<const char*>(fiber.waits_for) - block.shared << ", phase "
                    << found->second.phase << ", arrivals missing " << found->second.pending << ", bytes missing "
                    << found->second.bytes;
        }
        ++groups[one.str()];
    }
    int shown = 0;
    for (const auto& group : groups)
        if (++shown <= 12) text << group.first << " (" << group.second << " threads);";
    return text.str();
}

void run_cluster(Machine& m, int64_t x, int64_t y, int64_t blocks_x, int64_t blocks_y, int64_t shared_bytes) {
    const size_t count = static_cast<size_t>(m.cluster) * m.threads;
    m.blocks = std::vector<Block>(m.cluster);
    m.fibers = std::vector<Fiber>(count);
    m.all = Phase();
    for (Block& block : m.blocks) {
        block.memory.assign(shared_bytes + GUARD + 1024, POISON);
        block.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block.memory.data()) + 1023) & ~uintptr_t{1023});
        block.size = shared_bytes;
        block.warps.resize(m.threads / 32);
    }
    for (size_t i = 0; i < count; ++i) {
        Here& where = m.fibers[i].where;
        where.thread = static_cast<int>(i) % m.threads;
        where.rank = static_cast<int>(i) / m.threads;
        where.block_x = static_cast<int>(x) + where.rank, where.block_y = static_cast<int>(y);
        where.blocks_x = static_cast<int>(blocks_x), where.blocks_y = static_cast<int>(blocks_y);
        where.cluster = m.cluster;
        where.shared = m.blocks[where.rank].shared;
        m.fibers[i].groups.resize(1);
        start(m.fibers[i], stacks.of(i, count));
    }
    size_t left = count;
    const size_t warps = count / 32;
    while (left > 0) {
        bool moved = false;
        const size_t first = drawn() % warps, step = drawn() % 2 != 0 ? 1 : warps - 1;
        for (size_t n = 0; n < warps; ++n) {
            const size_t warp = (first + n * step) % warps;
            if (m.cluster * m.threads > 64 && drawn() % 4 == 0) continue;  // it sleeps for a while
            for (size_t lane = 0; lane < 32; ++lane) {
                Fiber& fiber = m.fibers[warp * 32 + lane];
                if (fiber.done) continue;
                if (fiber.ready) {
                    if (!fiber.ready()) continue;
                    fiber.ready = nullptr;
                }
                moved = true;
                m.current = &fiber;
                here = fiber.where;
                to_fiber(fiber);
                if (!m.error.empty()) throw std::runtime_error(m.error);
                if (fiber.done) {
                    --left;
                    ++m.blocks[fiber.where.rank].finished;
                }
            }
            if (!m.deliveries.empty() && drawn() % 16 == 0) deliver(drawn() % m.deliveries.size());
        }
        if (moved) continue;
        bool possible = !m.deliveries.empty();
        for (const Fiber& fiber : m.fibers) possible = possible || (!fiber.done && (!fiber.ready || fiber.ready()));
        if (!possible && left > 0) throw std::runtime_error(stuck());
        for (size_t n = m.deliveries.empty() ? 0 : 1 + drawn() % m.deliveries.size(); n > 0; --n)
            deliver(drawn() % m.deliveries.size());
    }
    if (!m.deliveries.empty()) throw std::runtime_error("emulator: a cluster ended with bytes under way");
    for (const Block& block : m.blocks)
        for (int64_t i = 0; i < GUARD; ++i)
            if (block.shared[block.size + i] != POISON)
                throw std::runtime_error("emulator: a byte behind the block's shared memory was written, " +
                                         std::to_string(i) + " behind its end");
}

}  // namespace

void seed(uint64_t value) { random_state = value * 2 + 1; }

void run(const std::function<void()>& body, int64_t blocks_x, int64_t blocks_y, int cluster, int threads,
         int64_t shared_bytes) {
    if (threads % 32 != 0 || threads < 32 || threads > 1024 || cluster < 1 || blocks_x % cluster != 0)
        throw std::runtime_error("emulator: a grid of such a shape cannot be launched");
    Machine m;
    m.body = &body;
    m.cluster = cluster, m.threads = threads;
    Machine* const before = machine;
    const Here here_before = here;
    machine = &m;
    try {
        for (int64_t y = 0; y < blocks_y; ++y)
            for (int64_t x = 0; x < blocks_x; x += cluster) run_cluster(m, x, y, blocks_x, blocks_y, shared_bytes);
    } catch (...) {
        machine = before;
        here = here_before;
        throw;
    }
    machine = before;
    here = here_before;
}

}  // namespace emulator

namespace device {

using namespace emulator;

void sync_block() {
    if (my_block().finished > 0) wrong("sync_block after a thread of the block has ended");
    meet("sync_block", my_block().all, machine->threads);
}
void sync_some(int which, int threads) {
    if (which < 1 || which > 15 || threads % 32 != 0) wrong("sync_some: barriers are 1 .. 15, threads whole warps");
    meet("sync_some", my_block().some[which], threads);
}
void sync_warp() { meet("sync_warp", my_warp(Collective::SYNC).phase, 32); }
void sync_cluster() {
    for (const Block& block : machine->blocks)
        if (block.finished > 0) wrong("sync_cluster after a thread of the cluster has ended");
    meet("sync_cluster", machine->all, machine->threads * machine->cluster);
}

float shuffle_xor(float value, int mask) {
    Warp& warp = my_warp(Collective::SHUFFLE);
    const int mine = lane();
    warp.in[mine][0] = as_bits(value);
    meet("shuffle_xor", warp.phase, 32);
    const float other = as_float(warp.in[mine ^ mask][0]);
    meet("shuffle_xor", my_warp(Collective::SHUFFLE).phase, 32);
    return other;
}

void copy16(void* to, const void* from) {
    check_inside(to, 16, 16, "copy16");
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) wrong("copy16 reads from an address that is no multiple of 16");
    machine->current->groups.back().push_back({to, from});
}
void close_group() { machine->current->groups.emplace_back(); }
void wait_for_groups(int pending) {
    auto& groups = machine->current->groups;
    while (static_cast<int>(groups.size()) - 1 > pending) {
        for (const auto& copy : groups.front()) memcpy(copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
}

void barrier_init(Barrier* barrier, int arrivals) {
    check_inside(barrier, 8, 8, "a barrier");
    BarrierState state;
    state.arrivals = state.pending = arrivals;
    my_block().barriers[barrier] = state;
}
void barrier_expect(Barrier* barrier, uint32_t bytes) {
    BarrierState& state = state_of(barrier);
    if (state.expected && state.arrivals == 1) wrong("barrier_expect twice in one phase");
    if (bytes >= 1u << 20) wrong("a barrier counts less than 2^20 bytes a phase");
    state.expected = true;
    state.bytes += bytes;
    --state.pending;
    settle(state);
}
void barrier_arrive(Barrier* barrier) {
    BarrierState& state = state_of(barrier);
    if (--state.pending < 0) wrong("more arrivals at a barrier than it was made for");
    settle(state);
}
void barrier_wait(Barrier* barrier, uint32_t parity) {
    if (parity > 1) wrong("a parity is 0 or 1");
    BarrierState* state = &state_of(barrier);
    wait_until("barrier_wait", barrier, [state, parity] { return static_cast<uint32_t>(state->phase & 1) != parity; });
}
void bulk_copy(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
    check_inside(to, bytes, 16, "bulk_copy");
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) wrong("bulk_copy reads from an address that is no multiple of 16");
    state_of(barrier);
    machine->deliveries.push_back({static_cast<char*>(to), static_cast<const char*>(from), {}, bytes, barrier, here.rank});
}
Peer peer(int rank) {
    if (rank < 0 || rank >= machine->cluster) wrong("there is no block " + std::to_string(rank) + " in the cluster");
    return {rank};
}
void send8(Peer peer, int to, uint2 value, int barrier) {
    const uint32_t words[2] = {value.x, value.y};
    send(peer.rank, to, words, 8, barrier);
}
void send16(Peer peer, int to, uint4 value, int barrier) {
    const uint32_t words[4] = {value.x, value.y, value.z, value.w};
    send(peer.rank, to, words, 16, barrier);
}

// ---- tensor cores: lane 4 g + t; a0 = (g, ..), a1 = (g + 8, ..), a2, a3 the same of the second half of k; b0, b1 ----

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Warp& warp = my_warp(Collective::MMA_BF16);
    const int mine = lane(), g = mine / 4, t = mine % 4;
    for (int i = 0; i < 4; ++i) warp.in[mine][i] = a[i];
    for (int i = 0; i < 2; ++i) warp.in[mine][4 + i] = b[i];
    meet("mma_bf16", warp.phase, 32);
    for (int j = 0; j < 4; ++j) {
        const int row_lane = 4 * g, column_lane = 4 * (2 * t + j % 2);
        float sum = 0;
        for (int half = 0; half < 2; ++half)
            for (int quarter = 0; quarter < 4; ++quarter) {
                const uint32_t x = warp.in[row_lane + quarter][2 * half + j / 2];
                const uint32_t y = warp.in[column_lane + quarter][4 + half];
                sum += as_float(x << 16) * as_float(y << 16) + as_float(x & 0xffff0000u) * as_float(y & 0xffff0000u);
            }
        d[j] += sum;
    }
    meet("mma_bf16", my_warp(Collective::MMA_BF16).phase, 32);
}

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Warp& warp = my_warp(Collective::MMA_TF32);
    const int mine = lane(), g = mine / 4, t = mine % 4;
    for (int i = 0; i < 6; ++i) {
        const uint32_t bits = i < 4 ? a[i] : b[i - 4];
        if ((bits & 0x1fffu) != 0 && as_float(bits) == as_float(bits)) wrong("mma_tf32 of a number that is not rounded");
        warp.in[mine][i] = bits;
    }
    meet("mma_tf32", warp.phase, 32);
    for (int j = 0; j < 4; ++j) {
        const int row_lane = 4 * g, column_lane = 4 * (2 * t + j % 2);
        float sum = 0;
        for (int half = 0; half < 2; ++half)
            for (int quarter = 0; quarter < 4; ++quarter)
                sum += as_float(warp.in[row_lane + quarter][2 * half + j / 2]) *
                       as_float(warp.in[column_lane + quarter][4 + half]);
        d[j] += sum;
    }
    meet("mma_tf32", my_warp(Collective::MMA_TF32).phase, 32);
}

// ---- wgmma: made when it is waited for, from what shared memory holds then; each warp its own 16 rows ----

uint64_t swizzled_operand(const void* at) { return static_cast<uint64_t>(static_cast<const char*>(at) - here.shared); }

void wgmma_begin() { machine->current->products.resize(machine->current->products.empty() ? 1 : machine->current->products.size()); }
void wgmma_close() { machine->current->products.emplace_back(); }

void wgmma_issue(float* d, int columns, uint64_t a, uint64_t b, bool add) {
    if (machine->current->products.empty()) wrong("wgmma without wgmma_begin");
    const uint64_t size = static_cast<uint64_t>(my_block().size);
    if (a % 16 != 0 || b % 16 != 0 || a + 63 * 128 >= size || b + (columns - 1) * 128u >= size)
        wrong("an operand of wgmma is outside shared memory");
    machine->current->products.back().push_back({d, columns, a, b, add});
}

void wgmma_finish(int pending) {
    auto& groups = machine->current->products;
    const int g = lane() / 4, t = lane() % 4, first = warp() % 4 * 16;
    // The hardware swizzles by bits of the address: bits 7 .. 9 onto bits 4 .. 6.
    const auto number = [](uint64_t base, int row, int k) {
        const uint64_t at = base + row * 128 + k * 2;
        uint16_t bits;
        memcpy(&bits, here.shared + (at ^ (at >> 7 & 7) << 4), 2);
        return as_float(static_cast<uint32_t>(bits) << 16);
    };
    while (static_cast<int>(groups.size()) - 1 > pending) {
        for (const Product& p : groups.front())
            for (int i = 0; i < p.columns / 8; ++i)
                for (int j = 0; j < 4; ++j) {
                    const int row = first + g + 8 * (j / 2), column = 8 * i + 2 * t + j % 2;
                    float sum = p.add ? p.d[4 * i + j] : 0;
                    for (int k = 0; k < 16; ++k) sum += number(p.a, row, k) * number(p.b, column, k);
                    p.d[4 * i + j] = sum;
                }
        groups.erase(groups.begin());
    }
    if (groups.size() == 1 && groups.front().empty()) groups.clear();
    meet("wgmma_wait", my_warp(Collective::WGMMA).phase, 32);
}

}  // namespace device
}  // namespace dql
