// Launches of the chain kernel.
#include "chain_launch.h"

#include <algorithm>
#include <atomic>

namespace dql {
namespace cuda {
namespace {

bool is_wide(const Tiling& tiling) { return tiling.m_tiles == WIDE_M_TILES; }

ChainKernel kernel_for(const Mlp& net, const Tiling& tiling, bool saves, bool backward) {
    if (tiling.solo > 0) return solo_chain_kernel_for(Slices(net, tiling).HP, tiling.solo, saves, backward);
    if (is_wide(tiling)) return wide_chain_kernel_for(Slices(net, tiling).HP, BlockMemory(net, tiling).first_layer());
    switch (tiling.precision) {
        case Precision::FP32: return chain_kernel_for<Precision::FP32>(tiling, backward);
        case Precision::TF32: return chain_kernel_for<Precision::TF32>(tiling, backward);
        default: return chain_kernel_for<Precision::BF16>(tiling, backward);
    }
}

void check_tiling(const Mlp& net, const Tiling& tiling, bool backward) {
    const int c = tiling.cluster;
    if (is_wide(tiling) && (backward || net.D == 0 || net.H > 256 || tiling.precision != Precision::BF16 ||
                            tiling.resident))
        throw std::invalid_argument("tiles of 128 rows are for a denoiser's forward pass in bf16 with H up to 256");
    if (tiling.solo > 0 &&
        (net.D == 0 || net.H > 256 || net.H % 4 != 0 || tiling.precision != Precision::BF16 || c != 1))
        throw std::invalid_argument(
            "solo tiles are for a denoiser in bf16 with H up to 256, a multiple of 4, by one block");
    if (c != 1 && c != 2 && c != 4 && c != 8) throw std::invalid_argument("a cluster has 1, 2, 4 or 8 blocks");
    if (c > 1 && !tiling.resident) throw std::invalid_argument("streamed weights have no cluster");
}

int threads_of(const Tiling& tiling) { return is_wide(tiling) ? WIDE_THREADS : THREADS; }

void check_solo(const ChainJob& job) {
    if (job.tiling.solo > 0 && reinterpret_cast<uintptr_t>(job.flat) % 16 != 0)
        throw std::invalid_argument("the parameters must start at a multiple of 16 bytes in memory; clone them");
}

void check_cloning(const ChainJob& job) {
    const Cloning& c = job.cloning;
    if (c.planes() > 0 && (job.net.D == 0 || job.N != 1 || job.saved == nullptr || is_wide(job.tiling) ||
                           job.tiling.solo > 0 || (job.K != 0 && job.K != c.T)))
        throw std::invalid_argument("a batch is cloned beside a chain of all steps without candidates that saves");
}

Grid grid_of(const ChainJob& job, bool backward) {
    const int kinds = (job.K > 0 ? 1 : 0) + job.cloning.planes();
    const int64_t tiles = kinds * (whole_tiles(job.R, job.tiling) / job.tiling.rows());
    // a critic that is left out leaves its place at once
    const int side_by_side = job.only_at != nullptr || job.only > 0 ? 1 : job.networks;
    const int64_t clusters = std::max<int64_t>(1, job.max_clusters / side_by_side);
    Grid grid;
    grid.x = std::min(tiles, clusters) * job.tiling.cluster;
    grid.y = job.networks;
    grid.cluster = job.tiling.cluster;
    grid.threads = threads_of(job.tiling);
    grid.shared = shared_bytes(job.net, job.tiling, backward);
    // of the prologue, on the same stream; solo blocks have none
    grid.follows = !backward && job.tiling.solo == 0 && (job.tiling.resident || is_wide(job.tiling));
    grid.overlaps = grid.follows;
    return grid;
}

std::atomic<bool> carveout{true};

}  // namespace

bool same_carveout() { return carveout; }
void compare(bool same_carveout) { carveout = same_carveout; }

int64_t shared_bytes(const Mlp& net, const Tiling& tiling, bool backward) {
    check_tiling(net, tiling, backward);
    return BlockMemory(net, tiling).bytes;
}

void chain_forward(const ChainJob& job, Stream stream) {
    check_solo(job);
    check_cloning(job);
    if (is_wide(job.tiling) && job.saved != nullptr)
        throw std::invalid_argument("tiles of 128 rows save nothing for a backward pass");
    launch("the chain", kernel_for(job.net, job.tiling, job.saved != nullptr, false), grid_of(job, false),
           chain_arguments(job, false), stream);
}

void chain_backward(const ChainJob& job, Stream stream) {
    check_solo(job);
    check_cloning(job);
    launch("the chain's backward pass", kernel_for(job.net, job.tiling, true, true), grid_of(job, true),
           chain_arguments(job, true), stream);
}

#if defined(__CUDACC__)

int max_clusters(int ordinal, const Mlp& net, const Tiling& tiling, bool backward) {
    const ChainKernel kernel = kernel_for(net, tiling, backward, backward);
    const int64_t bytes = shared_bytes(net, tiling, backward);
    int before = 0, count = 0;
    check(cudaGetDevice(&before), "cudaGetDevice");
    check(cudaSetDevice(ordinal), "cudaSetDevice");
    try {
        allow_shared(reinterpret_cast<const void*>(kernel), bytes, "the chain");
        if (tiling.cluster > 1) {
            cudaLaunchAttribute attribute = {};
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = static_cast<unsigned>(tiling.cluster);
            attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
            cudaLaunchConfig_t config = {};
            config.gridDim = dim3(static_cast<unsigned>(tiling.cluster));
            config.blockDim = dim3(static_cast<unsigned>(threads_of(tiling)));
            config.dynamicSmemBytes = static_cast<size_t>(bytes);
            config.attrs = &attribute;
            config.numAttrs = 1;
            check(cudaOccupancyMaxActiveClusters(&count, reinterpret_cast<const void*>(kernel), &config),
                  "cudaOccupancyMaxActiveClusters");
        } else {
            int multiprocessors = 0;
            check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, reinterpret_cast<const void*>(kernel),
                                                                threads_of(tiling), static_cast<size_t>(bytes)),
                  "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
            check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ordinal),
                  "cudaDeviceGetAttribute");
            count *= multiprocessors;
        }
    } catch (...) {
        cudaSetDevice(before);
        throw;
    }
    check(cudaSetDevice(before), "cudaSetDevice");
    return count;
}

#else

int max_clusters(int ordinal, const Mlp&, const Tiling& tiling, bool) {
    return std::max(1, device(ordinal).multiprocessors / tiling.cluster);
}

#endif

}  // namespace cuda
}  // namespace dql
