// The emulator itself: tensor cores, element by element as the PTX manual lays out their fragments, and roundings.
#include <vector>

#include "emulated.h"

namespace {

using namespace emulated;

// ---- products ----

uint32_t bf16_bits(float value) { return bf16_pair(value, 0); }
float of_bf16(uint32_t bits) { return as_float(bits << 16); }

float number(uint32_t& state) {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-30f;
}

// Every element of a, b and d by the manual's formulas for the fragments, one number at a time.
template <int K, class Multiply>
void known_product(uint32_t state, float (*rounded)(float), const Multiply& multiply) {
    float a[16][K], b[K][8], d[16][8], out[16][8];
    for (auto& row : a) for (float& x : row) x = rounded(number(state));
    for (auto& row : b) for (float& x : row) x = rounded(number(state));
    for (auto& row : d) for (float& x : row) x = number(state);
    run({1, 1, 1, 32}, [&] {
        const int g = lane() / 4, t = lane() % 4;
        float own[4];
        for (int i = 0; i < 4; ++i) own[i] = d[i < 2 ? g : g + 8][2 * t + (i & 1)];
        multiply(own, a, b);
        for (int i = 0; i < 4; ++i) out[i < 2 ? g : g + 8][2 * t + (i & 1)] = own[i];
    });
    for (int row = 0; row < 16; ++row)
        for (int n = 0; n < 8; ++n) {
            double exact = d[row][n], size = std::fabs(exact);
            for (int k = 0; k < K; ++k) {
                exact += double{a[row][k]} * b[k][n];
                size += std::fabs(double{a[row][k]} * b[k][n]);
            }
            CHECK_NEAR(out[row][n], exact, 1e-6 * size);
        }
}

void mma_bf16_is_the_manuals() {
    for (uint32_t state = 1; state < 20; ++state)
        known_product<16>(state, [](float x) { return of_bf16(bf16_bits(x)); }, [](float (&d)[4], auto& a, auto& b) {
            const int g = lane() / 4, t = lane() % 4;
            uint32_t of_a[4], of_b[2];
            for (int i = 0; i < 8; ++i) {  // a_i of the manual: two in a register
                const int row = i < 2 || (i >= 4 && i < 6) ? g : g + 8, column = t * 2 + (i & 1) + (i >= 4 ? 8 : 0);
                const uint32_t bits = bf16_bits(a[row][column]);
                of_a[i / 2] = i % 2 == 0 ? bits : of_a[i / 2] | bits << 16;
            }
            for (int i = 0; i < 4; ++i) {
                const uint32_t bits = bf16_bits(b[t * 2 + (i & 1) + (i >= 2 ? 8 : 0)][g]);
                of_b[i / 2] = i % 2 == 0 ? bits : of_b[i / 2] | bits << 16;
            }
            mma_bf16(d, of_a, of_b);
        });
}

void mma_tf32_is_the_manuals() {
    for (uint32_t state = 1; state < 20; ++state)
        known_product<8>(state, [](float x) { return as_float(tf32(x)); }, [](float (&d)[4], auto& a, auto& b) {
            const int g = lane() / 4, t = lane() % 4;
            uint32_t of_a[4], of_b[2];
            for (int i = 0; i < 4; ++i) of_a[i] = as_bits(a[i == 0 || i == 2 ? g : g + 8][i < 2 ? t : t + 4]);
            for (int i = 0; i < 2; ++i) of_b[i] = as_bits(b[i == 0 ? t : t + 4][g]);
            mma_tf32(d, of_a, of_b);
        });
    const auto of = [](uint32_t bits) {
        return error_of({}, [bits] {
            float d[4] = {};
            const uint32_t a[4] = {}, b[2] = {bits, 0};
            mma_tf32(d, a, b);
        });
    };
    SAYS(of(as_bits(1.0001f)), "mma_tf32 of 1.0001, which was not rounded to tf32");
    CHECK_EQ(of(tf32(1.0001f)), "nothing");
    CHECK_EQ(of(0xffffffffu), "nothing");  // NaN, as memory is before it is written
    emulator::run(  // a row that was not rounded, which may be one that nobody asked for, and it alone
        [] {
            float d[4] = {};
            const uint32_t a[4] = {lane() / 4 == 3 ? as_bits(1.0001f) : as_bits(1.0f), 0, 0, 0}, b[2] = {as_bits(1.0f), 0};
            mma_tf32(d, a, b);
            CHECK_EQ(d[0] != d[0], lane() / 4 == 3);
            CHECK_EQ(d[2], 0.0f);
        },
        1, 1, 1, 32, 0);
}

// Two groups of 64 rows, 256 columns, k = 128 in two chunks: swizzled by hand.
template <int COLUMNS>
void wide_product() {
    constexpr int CHUNK = 64 * 128 * 2 + COLUMNS * 128;  // bytes: a of either group, b
    std::vector<float> a(128 * 128), b(COLUMNS * 128), out(128 * COLUMNS);
    uint32_t state = 7;
    for (float& x : a) x = of_bf16(bf16_bits(number(state)));
    for (float& x : b) x = of_bf16(bf16_bits(number(state)));
    run({1, 1, 1, 256, 2 * CHUNK}, [&] {
        const auto put = [](int start, int row, int k, float value) {
            const uint16_t bits = static_cast<uint16_t>(bf16_bits(value));
            memcpy(shared_memory() + start + row * 128 + (k / 8 ^ row % 8) * 16 + k % 8 * 2, &bits, 2);
        };
        for (int i = thread(); i < 128 * 128; i += 256)
            put(i % 128 / 64 * CHUNK, i / 128, i % 64, a[i]);  // rows 0 .. 127, group by group
        for (int i = thread(); i < COLUMNS * 128; i += 256)
            put(i % 128 / 64 * CHUNK + 128 * 128, i / 128, i % 64, b[i]);
        fence_async();
        sync_block();
        float d[COLUMNS / 2];
        for (float& x : d) x = 1e9f;  // not added
        const char* own = shared_memory() + warp() / 4 * 64 * 128;
        for (int chunk = 0; chunk < 2; ++chunk) {
            wgmma_begin();
            for (int i = 0; i < 4; ++i)
                wgmma_bf16(d, swizzled_operand(own + chunk * CHUNK + 32 * i),
                           swizzled_operand(shared_memory() + chunk * CHUNK + 128 * 128 + 32 * i), chunk + i > 0);
            wgmma_close();
            if (chunk > 0) wgmma_wait<1>(d);
        }
        wgmma_wait<0>(d);
        for (int i = 0; i < COLUMNS / 2; ++i) {
            const int row = 16 * warp() + lane() / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane() % 4 * 2 + i % 2;
            out[row * COLUMNS + column] = d[i];
        }
    });
    for (int row = 0; row < 128; ++row)
        for (int n = 0; n < COLUMNS; ++n) {
            double exact = 0, size = 0;
            for (int k = 0; k < 128; ++k) {
                exact += double{a[row * 128 + k]} * b[n * 128 + k];
                size += std::fabs(double{a[row * 128 + k]} * b[n * 128 + k]);
            }
            CHECK_NEAR(out[row * COLUMNS + n], exact, 1e-6 * size);
        }
}

void wgmma_is_the_manuals() {
    for (const Order order : ORDERS) {
        emulator::order(order);
        wide_product<128>();
        wide_product<256>();
    }
    emulator::order(Order::RANDOM);
}

void wgmma_is_checked() {
    const auto of = [](int64_t a, int64_t b, bool begun, int closed) {
        return error_of({1, 1, 1, 128, 65536}, [=] {
            float d[128] = {};
            if (begun) wgmma_begin();
            wgmma_bf16(d, swizzled_operand(shared_memory() + a), swizzled_operand(shared_memory() + b), true);
            if (closed > 0) wgmma_close();
            if (closed > 1) wgmma_wait<0>(d);
        });
    };
    CHECK_EQ(of(8192, 32768, true, 2), "nothing");
    SAYS(of(8192, 32768, false, 2), "wgmma without wgmma_begin");
    SAYS(of(8192 + 128, 32768, true, 2), "not at a multiple of 1024");
    SAYS(of(8192 + 16, 32768, true, 2), "not at a multiple of 1024");
    SAYS(of(65536 - 4096, 0, true, 2), "not inside shared memory");
    SAYS(of(0, 33 * 1024, true, 2), "an operand of wgmma, 256 rows at byte 33792");
    SAYS(of(8192, 32768, true, 0), "wgmma under way");
    emulator::order(Order::LATE);
    SAYS(of(8192, 32768, true, 1), "wgmma under way");
    emulator::order(Order::RANDOM);
    SAYS(error_of({1, 1, 1, 128, 65536}, [] {
             float d[128] = {};
             wgmma_begin();
             const char* at = shared_memory();
             wgmma_bf16(d, swizzled_operand(at), swizzled_operand(at + lane() / 16 * 1024), true);
             wgmma_close();
             wgmma_wait<0>(d);
         }),
         "lanes of a warp ask for different wgmma");
    SAYS(error_of({1, 1, 1, 128, 65536}, [] {
             float d[64] = {};
             wgmma_begin();
             if (warp() == 2) wgmma_close();
             wgmma_wait<0>(d);
         }),
         "warps of a warp group closed");
}

// ---- results on their way back to shared memory ----

// Lane 4 g + t has numbers 2 t and 2 t + 1 of row g of each matrix; where the row goes, lane 8 i + g says.
void matrices_are_stored_by_rows() {
    always([] {
        std::vector<uint16_t> found(32 * 8);
        run({1, 1, 1, 32}, [&] {
            const auto place = [](int matrix, int row) { return (row * 4 + (matrix ^ row % 4)) * 16; };
            uint32_t four[4];
            for (uint32_t i = 0; i < 4; ++i) {
                const uint32_t number = 64 * i + lane() / 4 * 8 + lane() % 4 * 2;
                four[i] = number | (number + 1) << 16;
            }
            store_matrices(shared_memory() + place(lane() / 8, lane() % 8), four);
            for (int i = 0; i < 8; ++i)
                memcpy(&found[lane() * 8 + i], shared_memory() + place(lane() / 8, lane() % 8) + 2 * i, 2);
        });
        for (uint16_t i = 0; i < 256; ++i) CHECK_EQ(found[i], i);
    });
    const auto of = [](int byte) {
        return error_of({1, 1, 1, 32}, [byte] { store_matrices(shared_memory() + byte, {0, 0, 0, 0}); });
    };
    CHECK_EQ(of(4080), "nothing");
    SAYS(of(4088), "store_matrices");
    SAYS(of(8), "not at a multiple of 16");
}

// ---- single instructions ----

void roundings() {
    CHECK_EQ(tf32(as_float(0x3f800fff)), 0x3f800000u);
    CHECK_EQ(tf32(as_float(0x3f801000)), 0x3f802000u);  // ties away, either sign
    CHECK_EQ(tf32(as_float(0x3f803000)), 0x3f804000u);
    CHECK_EQ(tf32(as_float(0xbf801000)), 0xbf802000u);
    CHECK_EQ(tf32(as_float(0x7f7fffff)), 0x7f800000u);
    CHECK_EQ(tf32(as_float(0xff800000)), 0xff800000u);
    CHECK(std::isnan(as_float(tf32(as_float(0x7f800001)))));
    CHECK_EQ(bf16_pair(as_float(0x3f808000), as_float(0x3f818000)), 0x3f823f80u);  // ties to even
    CHECK_EQ(bf16_pair(as_float(0x3f808001), as_float(0xbf80ffff)), 0xbf813f81u);
    CHECK_EQ(bf16_pair(as_float(0x7f7fffff), -INFINITY), 0xff807f80u);
    CHECK(std::isnan(of_bf16(bf16_bits(as_float(0x7f800001)))));
    CHECK_EQ(exp2_approximate(3), 8.0f);
    CHECK_EQ(exp2_approximate(-126), 0x1p-126f);
    CHECK_EQ(exp2_approximate(-126.5f), 0.0f);
    CHECK_EQ(exp2_approximate(-INFINITY), 0.0f);
    CHECK_EQ(exp2_approximate(200), INFINITY);
    CHECK(std::isnan(exp2_approximate(NAN)));
    CHECK_EQ(reciprocal(4), 0.25f);
    CHECK_EQ(reciprocal(-0x1p-130f), -INFINITY);
    CHECK_EQ(reciprocal(0x1p127f), 0.0f);
    CHECK_EQ(square_root(9), 3.0f);
}

}  // namespace

int main() {
    RUN(mma_bf16_is_the_manuals);
    RUN(mma_tf32_is_the_manuals);
    RUN(wgmma_is_the_manuals);
    RUN(wgmma_is_checked);
    RUN(matrices_are_stored_by_rows);
    RUN(roundings);
    return check::report();
}
