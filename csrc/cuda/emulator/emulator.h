// The vocabulary of device.h on the host: each CUDA thread is a fiber, a cluster of blocks runs at a time, and whatever
// a GPU does asynchronously happens late and in random order. So kernels run, slowly, in the tests, from the source
// that nvcc compiles. It is a strict machine: shared memory starts as NaN, copies and stores arrive when somebody waits
// for them, warps run ahead or fall behind as far as barriers let them, and misuse that a GPU would answer with wrong
// numbers or a hang is an error here.
//
// What it cannot show: the tensor cores' real layout of fragments and descriptors (it has the manual's), PTX, timing,
// missing fences (keep_order, fence_async), wrong addresses of device memory, a barrier that is missing after a wgmma, of
// whose 64 rows each warp here reads its own 16.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <stdexcept>

#define DQL_DEVICE inline
#define DQL_HOST_DEVICE inline
#define DQL_KERNEL(threads, blocks) void
#define DQL_ARGUMENT const
#define DQL_UNROLL
#define DQL_UNROLL_BY_2
#define DQL_UNROLL_BY_8
#define DQL_NO_UNROLL

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace dql {

namespace emulator {

// Runs a grid, cluster by cluster, on this OS thread: `threads` a multiple of 32 up to 1024, clusters of at most 8.
// Throws std::runtime_error for whatever a kernel did wrong or threw, and when no thread can go on, with what each
// waits for. Not to be called by a kernel. Several OS threads may be in it at once.
void run(const std::function<void()>& body, int64_t blocks_x, int64_t blocks_y, int cluster, int threads,
         int64_t shared_bytes);

// Of the order in which fibers run and bytes arrive, in this OS thread's runs.
void seed(uint64_t value);

// When copies, stores to other blocks and wgmma take effect: at once; not before they are waited for and nothing else
// can go on; any time until then (so it is at first). In this OS thread's runs.
enum class Order : int { EAGER, LATE, RANDOM };
void order(Order value);

// Bytes that blocks sent to blocks of their cluster, themselves too, in this OS thread's last run.
int64_t sent_bytes();

// Where this fiber is, set before it runs.
struct Here {
    int thread, block_x, block_y, blocks_x, blocks_y, rank, cluster;
    char* shared;
};
extern __thread Here here;  // not thread_local, whose every use would ask whether it is initialised

}  // namespace emulator

namespace device {

using Barrier = uint64_t;
constexpr bool HAS_CLUSTERS = true, HAS_WGMMA = true;

inline int thread() { return emulator::here.thread; }
inline int lane() { return emulator::here.thread & 31; }
inline int warp() { return emulator::here.thread >> 5; }
inline int block_x() { return emulator::here.block_x; }
inline int block_y() { return emulator::here.block_y; }
inline int blocks_x() { return emulator::here.blocks_x; }
inline int blocks_y() { return emulator::here.blocks_y; }
inline int cluster_rank() { return emulator::here.rank; }
inline int cluster_size() { return emulator::here.cluster; }
inline char* shared_memory() { return emulator::here.shared; }

void sync_block();
void sync_some(int which, int threads);
void arrive_some(int which, int threads);
void sync_warp();
void sync_cluster();
inline void leave_cluster() { sync_cluster(); }
float shuffle_xor(float value, int mask);
inline void keep_order() {}
inline int made_here(int number) { return number; }

void copy16(void* to, const void* from);
void close_group();
void wait_for_groups(int pending);
template <int PENDING>
void wait_groups() {
    wait_for_groups(PENDING);
}

void barrier_init(Barrier* barrier, int arrivals = 1);
void barriers_ready();
void barrier_expect(Barrier* barrier, uint32_t bytes);
void barrier_arrive(Barrier* barrier);
void barrier_wait(Barrier* barrier, uint32_t parity);
void barrier_wait_for_peers(Barrier* barrier, uint32_t parity);
void bulk_copy(void* to, const void* from, uint32_t bytes, Barrier* barrier);
struct Peer {
    int rank;
};
Peer peer(int rank);
void send8(Peer peer, int to, uint2 value, int barrier);
void send16(Peer peer, int to, uint4 value, int barrier);

inline void let_next_start() {}
inline void wait_for_previous() {}

inline int count_in(int32_t* counter) { return (*counter)++; }
inline float written_by_others(const float* at) { return *at; }

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

void store_matrices(void* row, const uint32_t (&matrices)[4]);

uint64_t swizzled_operand(const void* at);
inline uint64_t further(uint64_t operand, int bytes) { return operand + bytes; }
inline void fence_async() {}
void wgmma_begin();
void wgmma_close();
void wgmma_issue(float* d, int columns, uint64_t a, uint64_t b, bool add);
void wgmma_wait_for(int pending);
template <int COUNT>
void wgmma_bf16(float (&d)[COUNT], uint64_t a, uint64_t b, bool add) {
    static_assert(COUNT == 64 || COUNT == 128, "128 or 256 columns");
    wgmma_issue(d, COUNT * 2, a, b, add);
}
template <int PENDING, int COUNT>
void wgmma_wait(float (&)[COUNT]) {
    wgmma_wait_for(PENDING);
}
template <int COUNT>
void fewer_registers() {}
template <int COUNT>
void more_registers() {}

inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline uint32_t tf32(float value) {  // to the nearest, ties away from zero
    const uint32_t bits = as_bits(value);
    if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0x7fffffu) != 0 ? 0x7fffe000u : bits;
    return (bits + 0x1000u) & 0xffffe000u;
}
inline uint32_t bf16(float value) {  // to the nearest, ties to even
    const uint32_t bits = as_bits(value);
    if (value != value) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
inline uint32_t bf16_pair(float low, float high) { return bf16(low) | bf16(high) << 16; }
// As on a GPU, what would be subnormal is zero.
inline float exp2_approximate(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float reciprocal(float x) {
    const float y = 1.0f / (fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x);
    return fabsf(y) < 0x1p-126f ? copysignf(0.0f, y) : y;
}
inline float square_root(float x) { return sqrtf(x); }

}  // namespace device
}  // namespace dql
