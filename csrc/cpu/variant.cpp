// Compiled once for each instruction set, with -DDQL_VARIANT=<name> and its flags; see setup.py.
#include "gradients.h"
#include "losses.h"

#include <time.h>

namespace dql {
namespace DQL_VARIANT {

static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// FLOP/s of multiply-adds on registers alone, 12 or 24 independent sums: what no product can exceed.
static double fma_ceiling(double seconds, bool bf16) {
    constexpr int SUMS = REGISTERS == 32 ? 24 : 12;
    constexpr int64_t LOOPS = 1 << 16;
    double best = 0.0;
    const double until = now() + seconds;
#if defined(__AVX512BF16__)
    if (bf16) {
        __m512 sums[SUMS];
#pragma GCC unroll 24
        for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_setzero_ps();
        __m512bh x = (__m512bh)_mm512_set1_epi32(0x3F803F80);
        do {
            const double start = now();
            for (int64_t n = 0; n < LOOPS; ++n) {
#pragma GCC unroll 24
                for (int i = 0; i < SUMS; ++i) {
                    sums[i] = _mm512_dpbf16_ps(sums[i], x, x);
                    asm volatile("" : "+v"(sums[i]));
                }
            }
            const double rate = (double)LOOPS * SUMS * W * 4 / (now() - start);
            best = rate > best ? rate : best;
        } while (now() < until);
        return best;
    }
#endif
    if (bf16) return 0.0;
    Vec sums[SUMS];
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; ++i) sums[i] = Vec{};
    const Vec x = broadcast(1.000001f), y = broadcast(1e-6f);
    do {
        const double start = now();
        for (int64_t n = 0; n < LOOPS; ++n) {
#pragma GCC unroll 24
            for (int i = 0; i < SUMS; ++i) {
                sums[i] += x * y;
#if defined(__x86_64__)
                asm volatile("" : "+v"(sums[i]));
#elif defined(__aarch64__)
                asm volatile("" : "+w"(sums[i]));
#endif
            }
        }
        const double rate = (double)LOOPS * SUMS * W * 2 / (now() - start);
        best = rate > best ? rate : best;
    } while (now() < until);
    return best;
}

}  // namespace DQL_VARIANT

#define DQL_STRING(x) #x
#define DQL_NAME(x) DQL_STRING(x)
#define DQL_JOIN(a, b) a##b
#define DQL_SYMBOL(variant) DQL_JOIN(kernels_, variant)

const Kernels* DQL_SYMBOL(DQL_VARIANT)() {
    using namespace DQL_VARIANT;
#if defined(__AVX512BF16__)
    constexpr bool BF16_OPERANDS = true;
#else
    constexpr bool BF16_OPERANDS = false;
#endif
    static const Kernels kernels = {
        DQL_NAME(DQL_VARIANT), MAX_ROWS,   BF16_OPERANDS, pack,           to_panels,  time_table,
        activate,              scratch_floats, chain_tile, chain_backward_tile, bc_tile, critic_tile,
        outer,                 column_sums, add,          states_tile,    sum_squares, adam,
        lerp,                  all_finite, uniform,       integers,       normals,    fma_ceiling,
    };
    return &kernels;
}

}  // namespace dql
