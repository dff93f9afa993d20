// The kernels for few rows.
#include "chain_launch.h"
#include "solo_chain.h"

namespace dql {
namespace cuda {
namespace {

template <int HP, device::Solo MODE>
ChainKernel of_rows(int rows) {
    switch (rows) {
        case 4:
            if constexpr (MODE == device::Solo::SAMPLE) return device::solo_chain_kernel<HP, 4, MODE>;
            break;
        case 8: return device::solo_chain_kernel<HP, 8, MODE>;
        case 16: return device::solo_chain_kernel<HP, 16, MODE>;
        case 24: return device::solo_chain_kernel<HP, 24, MODE>;
    }
    throw std::invalid_argument("a solo tile has 4 (but to save), 8, 16 or 24 rows");
}

template <int HP>
ChainKernel of_mode(int rows, bool saves, bool backward) {
    if (backward) return of_rows<HP, device::Solo::BACKWARD>(rows);
    return saves ? of_rows<HP, device::Solo::SAVE>(rows) : of_rows<HP, device::Solo::SAMPLE>(rows);
}

}  // namespace

ChainKernel solo_chain_kernel_for(int HP, int rows, bool saves, bool backward) {
    return HP == 128 ? of_mode<128>(rows, saves, backward) : of_mode<256>(rows, saves, backward);
}

}  // namespace cuda
}  // namespace dql
