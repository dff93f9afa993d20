// The kernel for many rows; compiled for compute capability 9.0 alone, whose instructions it uses.
#include "chain_launch.h"
#include "wide_chain.h"

namespace dql {
namespace cuda {

template <FirstLayer FIRST>
static ChainKernel of_width(int HP) {
    return HP == 128 ? device::wide_chain_kernel<128, FIRST> : device::wide_chain_kernel<256, FIRST>;
}

ChainKernel wide_chain_kernel_for(int HP, FirstLayer first) {
    switch (first) {
        case FirstLayer::PRODUCT: return of_width<FirstLayer::PRODUCT>(HP);
        case FirstLayer::IN_SHARED: return of_width<FirstLayer::IN_SHARED>(HP);
        default: return of_width<FirstLayer::IN_L2>(HP);
    }
}

}  // namespace cuda
}  // namespace dql
