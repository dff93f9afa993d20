// The kernel for many rows; compiled for compute capability 9.0 alone, whose instructions it uses.
#include "chain_launch.h"
#include "wide_chain.h"

namespace dql {
namespace cuda {

ChainKernel wide_chain_kernel_for(int HP, bool floats_in_shared) {
    if (floats_in_shared) return HP == 128 ? device::wide_chain_kernel<128, true> : device::wide_chain_kernel<256, true>;
    return HP == 128 ? device::wide_chain_kernel<128, false> : device::wide_chain_kernel<256, false>;
}

}  // namespace cuda
}  // namespace dql
