// Included by chain_fp32.cu, chain_tf32.cu and chain_bf16.cu, which define PRECISION: three compilations side by side.
#include "chain.h"
#include "chain_launch.h"

namespace dql {
namespace cuda {

template <Precision P, int MT>
ChainKernel chain_kernel_of(bool resident, bool backward) {
    if (resident) return backward ? device::chain_kernel<P, MT, true, true> : device::chain_kernel<P, MT, true, false>;
    return backward ? device::chain_kernel<P, MT, false, true> : device::chain_kernel<P, MT, false, false>;
}

template <>
ChainKernel chain_kernel_for<PRECISION>(const Tiling& tiling, bool backward) {
    switch (tiling.m_tiles) {
        case 1: return chain_kernel_of<PRECISION, 1>(tiling.resident, backward);
        case 2: return chain_kernel_of<PRECISION, 2>(tiling.resident, backward);
        case 4:  // float32 on the FMA units gains nothing by it, and has no registers for it
            if constexpr (PRECISION != Precision::FP32)
                return chain_kernel_of<PRECISION, 4>(tiling.resident, backward);
            break;
    }
    throw std::invalid_argument("a tile has 1, 2 or, but for fp32, 4 times 16 rows");
}

}  // namespace cuda
}  // namespace dql
