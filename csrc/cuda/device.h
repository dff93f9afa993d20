// Everything that the kernels use of the machine, and nothing else: who a thread is, barriers, copies, stores to other
// blocks of the cluster, tensor cores, a few instructions. Under nvcc it is PTX. Under a host compiler the same kernels
// run on emulator/emulator.h, which has the same vocabulary: that is how the tests prove them without a GPU.
//
// Kernels are functions of one argument, a plain struct, marked DQL_KERNEL(threads, blocks per multiprocessor).
#pragma once

#include <stdint.h>

#if !defined(__CUDACC__)
#include "emulator/emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define DQL_DEVICE __device__ __forceinline__
#define DQL_HOST_DEVICE __host__ __device__ __forceinline__
#define DQL_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DQL_ARGUMENT const __grid_constant__  // of a kernel
#define DQL_UNROLL _Pragma("unroll")
#define DQL_UNROLL_BY_2 _Pragma("unroll 2")
#define DQL_UNROLL_BY_8 _Pragma("unroll 8")
#define DQL_NO_UNROLL _Pragma("unroll 1")

namespace dql {
namespace device {

// ---- who and where: a block is one of cluster_size() in x; y is free ----

DQL_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DQL_DEVICE int lane() { return static_cast<int>(threadIdx.x & 31); }
// The same number in all lanes, which the compiler may then keep once a warp.
DQL_DEVICE int warp() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x >> 5), 0); }
DQL_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
DQL_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
DQL_DEVICE int blocks_x() { return static_cast<int>(gridDim.x); }
DQL_DEVICE int blocks_y() { return static_cast<int>(gridDim.y); }

#if __CUDA_ARCH__ >= 900
constexpr bool HAS_CLUSTERS = true;
#else
constexpr bool HAS_CLUSTERS = false;
#endif

DQL_DEVICE int cluster_rank() {
    uint32_t rank = 0;
    if constexpr (HAS_CLUSTERS) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

DQL_DEVICE int cluster_size() {
    uint32_t size = 1;
    if constexpr (HAS_CLUSTERS) asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return static_cast<int>(size);
}

// The block's dynamic shared memory, at a multiple of 1024.
DQL_DEVICE char* shared_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}

DQL_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- within a block ----

// The compiler moves no load or store across: fewer loads at a time need fewer registers.
DQL_DEVICE void keep_order() { asm volatile("" ::: "memory"); }
// A number that the compiler knows nothing of: what follows from it is computed here, and takes no register before.
DQL_DEVICE int made_here(int number) {
    asm volatile("" : "+r"(number));
    return number;
}
DQL_DEVICE void sync_block() { __syncthreads(); }
DQL_DEVICE void sync_warp() { __syncwarp(); }
// `threads` of the block, whole warps, at barrier number `which` of 1 .. 15.
DQL_DEVICE void sync_some(int which, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(which), "r"(threads) : "memory");
}
// The same without waiting for the others.
DQL_DEVICE void arrive_some(int which, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(which), "r"(threads) : "memory");
}
DQL_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// 16 bytes from device memory to shared memory, both at multiples of 16, as part of the calling thread's open group.
DQL_DEVICE void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DQL_DEVICE void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of the calling thread's groups are under way; what arrived is seen by this thread alone.
template <int PENDING>
DQL_DEVICE void wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- a barrier that counts bytes: a phase ends when its arrivals are made and all bytes announced by them are in ----

using Barrier = uint64_t;  // in shared memory

DQL_DEVICE void barrier_init(Barrier* barrier, int arrivals = 1) {
    if constexpr (HAS_CLUSTERS)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// By the thread that initialised, before a barrier of block or cluster tells the others.
DQL_DEVICE void barriers_ready() {
    if constexpr (HAS_CLUSTERS) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DQL_DEVICE void barrier_expect(Barrier* barrier, uint32_t bytes) {
    if constexpr (HAS_CLUSTERS)
        asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(
                         shared_address(barrier)),
                     "r"(bytes)
                     : "memory");
}
DQL_DEVICE void barrier_arrive(Barrier* barrier) {
    if constexpr (HAS_CLUSTERS)
        asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(barrier))
                     : "memory");
}
// Until the phase of this parity (0 first) has ended. Whoever waits may not be two phases late. What this block's threads
// and copies wrote before is seen: an acquire of the cluster's scope would empty the L1 cache at every wait.
DQL_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
    if constexpr (HAS_CLUSTERS)
        asm volatile(
            "{ .reg .pred done;\n"
            "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again; }" ::"r"(shared_address(barrier)),
            "r"(parity)
            : "memory");
}
// The same, of a barrier that other blocks' stores (send8, send16) count on: these are seen, in shared memory.
DQL_DEVICE void barrier_wait_for_peers(Barrier* barrier, uint32_t parity) {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
    if constexpr (HAS_CLUSTERS)
        asm volatile(
            "{ .reg .pred done;\n"
            "again: mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n"
            "fence.acquire.sync_restrict::shared::cluster.cluster; }" ::"r"(shared_address(barrier)),
            "r"(parity)
            : "memory");
#else
    if constexpr (HAS_CLUSTERS)
        asm volatile(
            "{ .reg .pred done;\n"
            "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again; }" ::"r"(shared_address(barrier)),
            "r"(parity)
            : "memory");
#endif
}

// By one thread: contiguous bytes, a multiple of 16 at multiples of 16, counted by the barrier when they are in.
DQL_DEVICE void bulk_copy(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
    if constexpr (HAS_CLUSTERS)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(to)),
                     "l"(from), "r"(bytes), "r"(shared_address(barrier))
                     : "memory");
}

// ---- between the blocks of a cluster ----

// All threads of all blocks; what they wrote to shared memory is seen by all.
DQL_DEVICE void sync_cluster() {
    if constexpr (HAS_CLUSTERS)
        asm volatile(
            "barrier.cluster.arrive.release.aligned;\n"
            "barrier.cluster.wait.acquire.aligned;" ::
                : "memory");
}

// The same where nothing is to be seen: before the kernel's end, so that nobody leaves while others write to it.
DQL_DEVICE void leave_cluster() {
    if constexpr (HAS_CLUSTERS)
        asm volatile(
            "barrier.cluster.arrive.relaxed.aligned;\n"
            "barrier.cluster.wait.aligned;" ::
                : "memory");
}

// Where the shared memory of block `rank` of the cluster starts, for other blocks' stores.
struct Peer {
    uint32_t start;
};
DQL_DEVICE Peer peer(int rank) {
    Peer found = {0};
    if constexpr (HAS_CLUSTERS)
        asm("mapa.shared::cluster.u32 %0, %1, %2;"
            : "=r"(found.start)
            : "r"(shared_address(shared_memory())), "r"(rank));
    return found;
}

// Writes to byte `to` of the peer's shared memory, and counts on its barrier at byte `barrier`.
DQL_DEVICE void send8(Peer peer, int to, uint2 value, int barrier) {
    if constexpr (HAS_CLUSTERS)
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                         peer.start + to),
                     "r"(value.x), "r"(value.y), "r"(peer.start + barrier)
                     : "memory");
}
DQL_DEVICE void send16(Peer peer, int to, uint4 value, int barrier) {
    if constexpr (HAS_CLUSTERS)
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                peer.start + to),
            "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(peer.start + barrier)
            : "memory");
}

// ---- one kernel after another on a stream ----

// The next kernel may be started, if it was launched as one that follows (launch.h), while this one still runs.
DQL_DEVICE void let_next_start() {
    if constexpr (HAS_CLUSTERS) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// In such a kernel: until the one before has ended and all that it wrote is seen.
DQL_DEVICE void wait_for_previous() {
    if constexpr (HAS_CLUSTERS) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- between blocks that know nothing of each other ----

// Counts one more in device memory, and gives how many were counted before. What a thread wrote before it counted is
// seen by `written_by_others` in a thread, and its warp, that counted later.
DQL_DEVICE int count_in(int32_t* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
DQL_DEVICE float written_by_others(const float* at) {
    float value;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(at) : "memory");
    return value;
}

// ---- tensor cores: d += a b by a warp, fragments as the PTX manual lays them out ----

// m16n8k16 of bf16
DQL_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// m16n8k8 of tf32, which are float32 bits, rounded by `tf32`
DQL_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 x 8 bf16, by a warp: lane 4 g + t has of each the numbers 2 t and 2 t + 1 of row g, as results of
// products lie, and lane 8 i + r says where row r of matrix i goes, 16 bytes.
DQL_DEVICE void store_matrices(void* row, const uint32_t (&matrices)[4]) {
    if constexpr (HAS_CLUSTERS)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                     "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                     : "memory");
}

// ---- tensor cores that read shared memory by themselves: Hopper's, by the four warps of a warp group ----

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool HAS_WGMMA = true;
#else
constexpr bool HAS_WGMMA = false;
#endif

// An operand of bf16 at `at`, a multiple of 1024: rows of 64 numbers (128 bytes) whose 16-byte pieces are swizzled, the
// piece p of row r at place p ^ (r % 8). To go on by 16 numbers of k, add 32 to `at`.
DQL_DEVICE uint64_t swizzled_operand(const void* at) {
    const uint64_t address = (shared_address(at) & 0x3ffff) >> 4, eight_rows = 1024 >> 4, swizzle_128 = 1;
    return address | static_cast<uint64_t>(1) << 16 | eight_rows << 32 | swizzle_128 << 62;
}
// What lies `bytes` behind an operand, in the same shared memory.
DQL_DEVICE uint64_t further(uint64_t operand, int bytes) { return operand + (bytes >> 4); }
// What was written to shared memory by stores is seen by these tensor cores and by bulk copies.
DQL_DEVICE void fence_async() {
    if constexpr (HAS_CLUSTERS) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DQL_DEVICE void wgmma_begin() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
DQL_DEVICE void wgmma_close() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most PENDING closed groups are under way; `d` is what they write, and is not to be touched before.
template <int PENDING, int COUNT>
DQL_DEVICE void wgmma_wait(float (&d)[COUNT]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    if constexpr (PENDING == 0) {
        DQL_UNROLL
        for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
    }
#endif
}

#define DQL_EIGHT(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
                        "+f"(d[i + 6]), "+f"(d[i + 7])
#define DQL_SIXTY_FOUR(d, i) DQL_EIGHT(d, i), DQL_EIGHT(d, i + 8), DQL_EIGHT(d, i + 16), DQL_EIGHT(d, i + 24), \
                             DQL_EIGHT(d, i + 32), DQL_EIGHT(d, i + 40), DQL_EIGHT(d, i + 48), DQL_EIGHT(d, i + 56)

// d (+)= a b of 64 rows, COUNT * 2 columns and 16 numbers of k. Lane 4 g + t of warp w has rows 16 w + g and + 8 of the
// columns 8 i + 2 t and + 1 in d[4 i .. 4 i + 3], as m16n8 has them.
DQL_DEVICE void wgmma_bf16(float (&d)[64], uint64_t a, uint64_t b, bool add) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, add, 1, 1, 0, 0; }"
        : DQL_SIXTY_FOUR(d, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#endif
}
DQL_DEVICE void wgmma_bf16(float (&d)[128], uint64_t a, uint64_t b, bool add) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, add, 1, 1, 0, 0; }"
        : DQL_SIXTY_FOUR(d, 0), DQL_SIXTY_FOUR(d, 64)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#endif
}
#undef DQL_EIGHT
#undef DQL_SIXTY_FOUR

// Registers of each thread of this warp group, from here on: others give up what some need. By all four warps.
template <int COUNT>
DQL_DEVICE void fewer_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT>
DQL_DEVICE void more_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// ---- single instructions ----

DQL_DEVICE uint32_t tf32(float value) {  // to the nearest, ties away from zero
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}
DQL_DEVICE uint32_t bf16_pair(float low, float high) {  // to the nearest, ties to even
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
DQL_DEVICE float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DQL_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DQL_DEVICE float square_root(float x) {
    float y;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DQL_HOST_DEVICE float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, 4);
    return value;
#endif
}
DQL_HOST_DEVICE uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
#endif
}

}  // namespace device
}  // namespace dql

#endif  // __CUDACC__
