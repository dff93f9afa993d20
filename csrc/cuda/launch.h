// One way to launch a kernel, on the GPU or in the emulator.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "device.h"
#include "host.h"

namespace dql {
namespace cuda {

struct Grid {
    int64_t x;        // blocks, a multiple of `cluster`
    int64_t y = 1;
    int cluster = 1;  // blocks in x that form one
    int threads = THREADS;
    int64_t shared = 0;  // bytes of dynamic shared memory
    bool follows = false;  // may start before the kernel before it ends, and calls wait_for_previous
    bool overlaps = false;  // follows, or is followed
};

// Whether kernels that overlap ask for the same carve-out. To compare: host.h, compare.
bool same_carveout();

#if defined(__CUDACC__)

// Throws CudaError naming `call` if CUDA reported an error.
inline void check(cudaError_t status, const std::string& call) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // an error that does not stick is not left for torch to find
    throw CudaError(call + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

// More than 48 KB of shared memory must be asked for: once for each kernel and device, and then all that a block may
// have, so that threads with networks of different sizes do not take it from each other.
inline void allow_shared(const void* kernel, int64_t bytes, const char* name) {
    if (bytes <= 48 * 1024) return;
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> done;
    int ordinal = 0, most = 0;
    check(cudaGetDevice(&ordinal), "cudaGetDevice");
    const std::lock_guard<std::mutex> lock(mutex);
    if (done.count({kernel, ordinal}) > 0) return;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal), "cudaDeviceGetAttribute");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
          std::string("cudaFuncSetAttribute of ") + name);
    done.insert({kernel, ordinal});
}

// How a multiprocessor divides its memory into L1 cache and shared memory is by default what a kernel needs, and changes
// only when the multiprocessor is empty: of kernels that are to overlap, all ask for the same. Once for each kernel,
// device and wish.
inline void prefer_shared(const void* kernel, bool wanted, const char* name) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, bool> done;
    int ordinal = 0;
    check(cudaGetDevice(&ordinal), "cudaGetDevice");
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = done.find({kernel, ordinal});
    if (found == done.end() ? !wanted : found->second == wanted) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               wanted ? cudaSharedmemCarveoutMaxShared : cudaSharedmemCarveoutDefault),
          std::string("cudaFuncSetAttribute of ") + name);
    done[{kernel, ordinal}] = wanted;
}

template <class Job>
void launch(const char* name, void (*kernel)(Job), const Grid& grid, const Job& job, Stream stream) {
    allow_shared(reinterpret_cast<const void*>(kernel), grid.shared, name);
    if (grid.overlaps) prefer_shared(reinterpret_cast<const void*>(kernel), same_carveout(), name);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attributes[2] = {};
    config.attrs = attributes;
    if (grid.cluster > 1) {
        cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
    if (grid.follows) {
        cudaLaunchAttribute& follows = attributes[config.numAttrs++];
        follows.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        follows.val.programmaticStreamSerializationAllowed = 1;
    }
    check(cudaLaunchKernelEx(&config, kernel, job), std::string("the launch of ") + name);
}

#else

struct Launches {
    std::mutex mutex;
    std::map<std::string, int64_t> of;
};
inline Launches& launches_so_far() {
    static Launches launches;
    return launches;
}

template <class Job>
void launch(const char* name, void (*kernel)(Job), const Grid& grid, const Job& job, Stream) {
    {
        const std::lock_guard<std::mutex> lock(launches_so_far().mutex);
        ++launches_so_far().of[name];
    }
    emulator::run([&] { kernel(job); }, grid.x, grid.y, grid.cluster, grid.threads, grid.shared);
}

#endif

}  // namespace cuda
}  // namespace dql
