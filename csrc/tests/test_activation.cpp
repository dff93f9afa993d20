// The activations of every variant against the same formulas in double precision, over a grid of all 2^32 floats or,
// with --all, over every one of them (minutes): values, slopes, infinities, NaNs. Prints the largest errors.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../cpu/engine.h"
#include "check.h"

namespace {

constexpr int CHUNK = 4096;
uint64_t stride = 401;  // of the floats' bit patterns; odd, so that all exponents and low bits come by

struct Reference {
    double value, slope;
};

Reference mish(double z) {
    if (z > 60.0) return {z, 1.0};
    const double e = std::exp(z), w = e * (e + 2.0), d = w + 2.0;
    return {z * (w / d), w / d + (e == 0.0 ? 0.0 : 4.0 * z * e * (e + 1.0) / (d * d))};
}

Reference silu(double z) {
    if (z > 60.0) return {z, 1.0};
    const double e = std::exp(z), d = e + 1.0;
    return {z * (e / d), e / d + (e == 0.0 ? 0.0 : z * e / (d * d))};
}

Reference relu(double z) { return {z > 0.0 ? z : 0.0, z > 0.0 ? 1.0 : 0.0}; }

float from_bits(uint32_t bits) {
    float z;
    std::memcpy(&z, &bits, 4);
    return z;
}

// The largest error so far, and where.
struct Worst {
    double error = 0.0;
    float z = 0.0f;
    void see(double e, float at) {
        if (!(e <= error)) error = e, z = at;
    }
};

struct Errors {
    Worst value;  // in ulps of the exact value, or of 2^-119 where that is larger: exp is subnormal below z = -87.3
    Worst near;   // of the slope near its zero, absolute
    Worst far;    // of the slope elsewhere, relative to it, or to 2^-119 where it is less
};

double ulp(double exact) {
    int exponent;
    std::frexp(exact, &exponent);
    return std::ldexp(1.0, std::max(exponent, -118) - 24);
}

void compare(float z, Reference exact, float value, float paired_value, float slope, Errors& worst) {
    constexpr double floor = 0x1p-119;
    const double value_error = std::fabs(exact.value) <= std::numeric_limits<float>::max()
                                   ? std::max(std::fabs(value - exact.value), std::fabs(paired_value - exact.value))
                                   : (value == exact.value && paired_value == exact.value ? 0.0 : 1e9);
    worst.value.see(value_error / ulp(exact.value), z);
    const double slope_error = std::fabs(slope - exact.slope);
    if (z >= -2.5f && z <= -0.5f)  // it crosses zero at -1.19 (Mish) and -1.28 (SiLU)
        worst.near.see(slope_error, z);
    else
        worst.far.see(slope_error / std::max(std::fabs(exact.slope), floor), z);
}

void measure(int activation, const char* name, Reference (*reference)(double), double ulps, double near, double far) {
    const std::vector<dql::Variant>& variants = dql::variants();
    std::vector<Errors> errors(variants.size());
    std::vector<int64_t> nans_lost(variants.size());
    dql::Buffer memory(4 * CHUNK);
    float *z = memory.data(), *value = z + CHUNK, *paired_value = value + CHUNK, *slope = paired_value + CHUNK;
    std::vector<Reference> exact(CHUNK);
    for (uint64_t first = 0; first < uint64_t{1} << 32; first += CHUNK * stride) {
        for (uint64_t i = 0; i < CHUNK; ++i) {
            z[i] = from_bits(static_cast<uint32_t>(first + i * stride));  // beyond the last it begins again
            exact[i] = reference(z[i]);
        }
        for (size_t v = 0; v < variants.size(); ++v) {
            if (!variants[v].kernels) continue;
            std::memcpy(value, z, CHUNK * sizeof(float));
            std::memcpy(paired_value, z, CHUNK * sizeof(float));
            variants[v].kernels->activate(activation, value, nullptr, CHUNK);
            variants[v].kernels->activate(activation, paired_value, slope, CHUNK);
            for (int i = 0; i < CHUNK; ++i) {
                if (std::isnan(z[i]))
                    nans_lost[v] += !std::isnan(value[i]) + !std::isnan(paired_value[i]) + !std::isnan(slope[i]);
                else if (!std::isinf(z[i]))
                    compare(z[i], exact[static_cast<size_t>(i)], value[i], paired_value[i], slope[i], errors[v]);
            }
        }
    }
    for (size_t v = 0; v < variants.size(); ++v) {
        if (!variants[v].kernels) continue;
        const Errors& worst = errors[v];
        std::printf("    %-4s %-10s value %.2f ulp (z = %.9g); slope %.2e relative (%.9g), near its zero %.2e (%.9g)\n",
                    name, variants[v].name, worst.value.error, static_cast<double>(worst.value.z), worst.far.error,
                    static_cast<double>(worst.far.z), worst.near.error, static_cast<double>(worst.near.z));
        CHECK_NEAR(worst.value.error, 0.0, ulps);
        CHECK_NEAR(worst.near.error, 0.0, near);
        CHECK_NEAR(worst.far.error, 0.0, far);
        CHECK_EQ(nans_lost[v], int64_t{0});
    }
}

// The bounds that csrc/cpu/activation.h states.
void mish_everywhere() { measure(dql::MISH, "mish", mish, 6.5, 1.2e-7, 6.5e-7); }
void silu_everywhere() { measure(dql::SILU, "silu", silu, 6.5, 1.2e-7, 6.5e-7); }
void relu_everywhere() { measure(dql::RELU, "relu", relu, 0.0, 0.0, 0.0); }

void special_values() {
    const float infinity = std::numeric_limits<float>::infinity(), largest = std::numeric_limits<float>::max();
    const float nan = std::numeric_limits<float>::quiet_NaN(), tiny = std::numeric_limits<float>::denorm_min();
    dql::Buffer memory(2 * 64);
    float *z = memory.data(), *slope = z + 64;
    for (const dql::Variant& variant : dql::variants()) {
        if (!variant.kernels) continue;
        for (const int activation : {dql::MISH, dql::SILU, dql::RELU}) {
            for (const bool with_slope : {false, true}) {
                const float in[] = {infinity, -infinity, nan, -nan, 0.0f, -0.0f, largest, -largest, tiny, -tiny, 25.0f};
                const int n = sizeof(in) / sizeof(float);
                for (int i = 0; i < 64; ++i) z[i] = in[i % n];
                variant.kernels->activate(activation, z, with_slope ? slope : nullptr, 64);
                for (int i = 0; i < 64; ++i) {
                    const float x = in[i % n];
                    const bool up = x > 20.0f, down = x < -104.0f;
                    if (std::isnan(x))
                        CHECK(std::isnan(z[i]));
                    else
                        CHECK_NEAR(z[i] == (up ? x : 0.0f) ? 0.0 : z[i], 0.0, tiny);  // exact, or a subnormal
                    if (!with_slope) continue;
                    if (std::isnan(x)) CHECK(std::isnan(slope[i]));
                    if (up) CHECK_EQ(slope[i], 1.0f);
                    if (down) CHECK_EQ(slope[i], 0.0f);
                }
            }
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && std::string(argv[1]) == "--all") stride = 1;
    RUN(special_values);
    RUN(mish_everywhere);
    RUN(silu_everywhere);
    RUN(relu_everywhere);
    return check::report();
}
