// The arithmetic of tensor cores on the fragments of a whole warp, as the PTX manual lays them out: lane 4 g + t holds
// of a rows g and g + 8, of b column g, of d rows g and g + 8 of columns 2 t and 2 t + 1.
#pragma once

#include <stdint.h>
#include <string.h>

namespace dql {
namespace emulator {

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

struct Fragments {  // of a warp
    uint32_t a[32][4], b[32][2];
    float* d[32];
};

typedef float Four __attribute__((vector_size(16)));

// d += a b, of [16, K] and [K, 8]
template <int K>
void add_product(const float (&a)[16][K], const float (&b)[K][8], float* const (&d)[32]) {
    for (int row = 0; row < 16; ++row) {
        Four sum[2] = {};
        for (int k = 0; k < K; ++k)
            for (int i = 0; i < 2; ++i) {
                Four four;
                memcpy(&four, &b[k][4 * i], 16);
                sum[i] += a[row][k] * four;
            }
        for (int n = 0; n < 8; ++n) d[row % 8 * 4 + n / 2][row / 8 * 2 + n % 2] += sum[n / 4][n % 4];
    }
}

// m16n8k16: a0, a1 are rows g, g + 8 of k = 2 t, 2 t + 1; a2, a3 of 8 more; b0 and b1 likewise
inline void multiply_bf16(const Fragments& f) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            float* const at = &a[g + i % 2 * 8][i / 2 * 8 + 2 * t];
            at[0] = float_of(f.a[lane][i] << 16);
            at[1] = float_of(f.a[lane][i] & 0xffff0000u);
        }
        for (int i = 0; i < 2; ++i) {
            b[8 * i + 2 * t][g] = float_of(f.b[lane][i] << 16);
            b[8 * i + 2 * t + 1][g] = float_of(f.b[lane][i] & 0xffff0000u);
        }
    }
    add_product(a, b, f.d);
}

// m16n8k8: a0, a1 are rows g, g + 8 of k = t; a2, a3 of t + 4; b0 and b1 likewise
inline void multiply_tf32(const Fragments& f) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = float_of(f.a[lane][i]);
        for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = float_of(f.b[lane][i]);
    }
    add_product(a, b, f.d);
}

// What the warps of a warp group ask for together; the warp's own rows of it are made one warp at a time.
struct WideProduct {
    int columns;    // 128 or 256
    uint64_t a, b;  // bytes in shared memory: see swizzled_operand
    bool add;
    float* d[32];
};

// 16 numbers of a swizzled row: the hardware folds bits 7 .. 9 of an address onto bits 4 .. 6.
inline void read_swizzled(float (&out)[16], const char* shared, uint64_t operand, int row) {
    for (int half = 0; half < 2; ++half) {
        const uint64_t at = operand + row * 128 + half * 16;
        uint16_t bits[8];
        memcpy(bits, shared + (at ^ (at >> 7 & 7) << 4), 16);
        for (int i = 0; i < 8; ++i) out[half * 8 + i] = float_of(static_cast<uint32_t>(bits[i]) << 16);
    }
}

// Rows first_row .. + 15 of m64 n(columns) k16
inline void multiply_wide(const WideProduct& p, const char* shared, int first_row) {
    for (int columns = 0; columns < p.columns; columns += 64) {  // a stack's worth at a time
        float b[16][64], column[16];
        for (int n = 0; n < 64; ++n) {
            read_swizzled(column, shared, p.b, columns + n);
            for (int k = 0; k < 16; ++k) b[k][n] = column[k];
        }
        for (int row = 0; row < 16; ++row) {
            float a[16], sum[64] = {};
            read_swizzled(a, shared, p.a, first_row + row);
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 64; ++n) sum[n] += a[k] * b[k][n];
            for (int n = 0; n < 64; ++n) {
                float& d = p.d[row % 8 * 4 + n % 8 / 2][(columns + n) / 8 * 4 + row / 8 * 2 + n % 2];
                d = (p.add ? d : 0) + sum[n];
            }
        }
    }
}

}  // namespace emulator
}  // namespace dql
