// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the generator under every
// number of dql/noise.py, for the host and for CUDA. One counter at a time; noise.h has the vectors.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define DQL_HD __host__ __device__ __forceinline__
#else
#define DQL_HD static inline __attribute__((always_inline))
#endif

namespace dql {

constexpr uint32_t PHILOX_MULTIPLIER_0 = 0xD2511F53u, PHILOX_MULTIPLIER_1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_KEY_STEP_0 = 0x9E3779B9u, PHILOX_KEY_STEP_1 = 0xBB67AE85u;
constexpr int PHILOX_ROUNDS = 10;

// The counter words that stand for a step in the draws of `uniform` and `integers`; no chain has that many steps.
constexpr uint32_t UNIFORM_STEP = 0xFFFFFFFFu, INTEGER_STEP = 0xFFFFFFFEu;

struct PhiloxWords {
    uint32_t w[4];
};

DQL_HD PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const uint64_t p0 = (uint64_t)PHILOX_MULTIPLIER_0 * c0, p1 = (uint64_t)PHILOX_MULTIPLIER_1 * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += PHILOX_KEY_STEP_0;
        k1 += PHILOX_KEY_STEP_1;
    }
    return {{c0, c1, c2, c3}};
}

// The open unit interval from a word: 24 significant bits: exact in float32 too.
DQL_HD double unit_double(uint32_t word) { return ((double)(word >> 9) + 0.5) * (1.0 / 8388608.0); }

}  // namespace dql
