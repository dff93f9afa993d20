// Questions about devices and the driver.
#include "chain_launch.h"

namespace dql {
namespace cuda {

#if defined(__CUDACC__)

namespace {

// A device for as long as this lives; then the thread's own again.
class OnDevice {
public:
    explicit OnDevice(int ordinal) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        check(cudaSetDevice(ordinal), "cudaSetDevice");
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;

private:
    int before_ = 0;
};

// Of the extension, so for good. Another failure (no memory, an earlier kernel's fault) may be gone at the next call.
bool is_about_code(cudaError_t status) {
    switch (status) {
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorInvalidKernelImage:
        case cudaErrorInvalidSource:
        case cudaErrorInvalidPtx:
        case cudaErrorUnsupportedPtxVersion:
        case cudaErrorJitCompilerNotFound:
        case cudaErrorJitCompilationDisabled:
        case cudaErrorSymbolNotFound: return true;
        default: return false;
    }
}

// "", or CUDA's words for why this kernel has no code for the device. Throws where that could not be found out.
std::string no_code(int ordinal, ChainKernel kernel, cudaFuncAttributes& attributes) {
    const OnDevice here(ordinal);
    const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
    if (!is_about_code(status)) {
        check(status, "cudaFuncGetAttributes");
        return "";
    }
    cudaGetLastError();
    return cudaGetErrorString(status);
}

}  // namespace

bool emulated() { return false; }
std::map<std::string, int64_t> launches() { return {}; }

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() { return CUDART_VERSION; }

Device device(int ordinal) {
    const auto get = [&](cudaDeviceAttr what) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, what, ordinal), "cudaDeviceGetAttribute");
        return value;
    };
    return {10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor),
            get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

std::string cannot_run(int ordinal) {
    cudaFuncAttributes unused;
    return no_code(ordinal, chain_kernel_for<Precision::FP32>({Precision::FP32, 1, 1, false}, false), unused);
}

int compiled_for(int ordinal) {
    cudaFuncAttributes attributes;
    const ChainKernel kernel = chain_kernel_for<Precision::FP32>({Precision::FP32, 1, 1, true}, false);
    return no_code(ordinal, kernel, attributes).empty() ? attributes.ptxVersion : 0;
}

bool can_run_wide(int ordinal) {
    cudaFuncAttributes unused;
    const ChainKernel kernel = wide_chain_kernel_for(256, FirstLayer::PRODUCT);
    return device(ordinal).capability == 90 && no_code(ordinal, kernel, unused).empty();
}

void use_device(int ordinal) { check(cudaSetDevice(ordinal), "cudaSetDevice"); }

#else

bool emulated() { return true; }

std::map<std::string, int64_t> launches() {
    Launches& so_far = launches_so_far();
    const std::lock_guard<std::mutex> lock(so_far.mutex);
    return std::exchange(so_far.of, {});
}

int driver_version() { return 0; }
int runtime_version() { return 0; }
Device device(int) { return {EMULATED_CAPABILITY, 4, 227 * 1024}; }
std::string cannot_run(int) { return ""; }
int compiled_for(int) { return EMULATED_CAPABILITY; }
bool can_run_wide(int) { return true; }
void use_device(int) {}

#endif

}  // namespace cuda
}  // namespace dql
