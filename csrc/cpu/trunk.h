// One MLP over a tile of rows, forward and backward, and the packing of its weights.
#pragma once

#include "activation.h"
#include "gemm.h"

namespace dql {
namespace DQL_VARIANT {

// ---- packing ----

// Blocks of out[k][c] = in[c * stride + k], k < K; rows from K to padded_K are zeros.
static void pack_columns(const float* in, int64_t stride, int64_t columns, int64_t K, int64_t padded_K, float* out) {
    const int64_t P = panels(columns);
    for (int64_t first = 0; first < columns; first += BLOCK, out += padded_K * BLOCK) {
        const int64_t width = block_width(first / PANEL, P), valid = columns - first < width ? columns - first : width;
        for (int64_t k = 0; k < K; k += 16) {  // a cache line of each row of `in`
            const int64_t ks = K - k < 16 ? K - k : 16;
            float* to = out + k * width;
            int64_t c = 0;
            for (; c + W <= valid; c += W) {
                const float* rows = in + (first + c) * stride + k;
                int64_t i = 0;
                for (; i + 4 <= ks; i += 4) {
                    Vec quads[4];
                    for (int j = 0; j < 4; ++j) quads[j] = load_quads(rows + j * stride + i, 4 * stride);
                    transpose_blocks(quads);
                    for (int j = 0; j < 4; ++j) store(to + (i + j) * width + c, quads[j]);
                }
                for (; i < ks; ++i)
                    for (int j = 0; j < W; ++j) to[i * width + c + j] = rows[j * stride + i];
            }
            for (; c < valid; ++c)
                for (int64_t i = 0; i < ks; ++i) to[i * width + c] = in[(first + c) * stride + k + i];
            for (; c < width; ++c)
                for (int64_t i = 0; i < ks; ++i) to[i * width + c] = 0.0f;
        }
        __builtin_memset(out + K * width, 0, (size_t)((padded_K - K) * width) * 4);
    }
}

// Blocks of out[k][c] = in[k * stride + c], k < K; rows from K to padded_K are zeros.
static void pack_rows(const float* in, int64_t stride, int64_t columns, int64_t K, int64_t padded_K, float* out) {
    const int64_t P = panels(columns);
    for (int64_t first = 0; first < columns; first += BLOCK) {
        const int64_t width = block_width(first / PANEL, P), valid = columns - first < width ? columns - first : width;
        for (int64_t k = 0; k < padded_K; ++k, out += width) {
            const int64_t copied = k < K ? valid : 0;
            if (copied) __builtin_memcpy(out, in + k * stride + first, (size_t)copied * 4);
            if (copied < width) __builtin_memset(out + copied, 0, (size_t)(width - copied) * 4);
        }
    }
}

// out[p][row][c] = in[row * stride + 32 p + c]; out_panel floats from panel to panel.
static void to_panels(const float* in, int64_t stride, int64_t rows, int64_t columns, float* out, int64_t out_panel) {
    for (int64_t p = 0; p < panels(columns); ++p) {
        const int64_t valid = columns - p * PANEL < PANEL ? columns - p * PANEL : PANEL;
        for (int64_t r = 0; r < rows; ++r) {
            const float* from = in + r * stride + p * PANEL;
            float* to = out + p * out_panel + r * PANEL;
            if (valid == PANEL) {
                for (int c = 0; c < PANEL; c += W) store(to + c, load(from + c));
            } else {
                for (int c = 0; c < PANEL; ++c) to[c] = c < valid ? from[c] : 0.0f;
            }
        }
    }
}

// Rows of panels [panels][rows][32] back to [rows][columns].
static void from_panels(const float* in, int64_t in_panel, int64_t rows, int64_t columns, float* out) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) out[r * columns + c] = in[c / PANEL * in_panel + r * PANEL + c % PANEL];
}

// out[r][0 .. padded) = row r of `in`, padded with zeros.
static void pad_rows(const float* in, int64_t stride, int64_t rows, int64_t columns, int64_t padded, float* out) {
    for (int64_t r = 0; r < rows; ++r, out += padded) {
        __builtin_memcpy(out, in + r * stride, (size_t)columns * 4);
        if (columns < padded) __builtin_memset(out + columns, 0, (size_t)(padded - columns) * 4);
    }
}

// float32 to bf16, to nearest even; a NaN stays one.
DQL_INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Rows 2 k and 2 k + 1 of packed weights, element by element side by side, in blocks as they were.
static void pack_bf16(const float* packed, int64_t K, int64_t P, uint32_t* out) {
    for (int64_t panel = 0; panel < P; panel += BLOCK_PANELS) {
        const int64_t width = block_width(panel, P);
        for (int64_t k = 0; k < K; k += 2, packed += 2 * width)
            for (int64_t c = 0; c < width; ++c)
                *out++ = (uint32_t)to_bf16(packed[c]) | (uint32_t)to_bf16(packed[width + c]) << 16;
    }
}

static void pack(const Trunk& t, const TrunkSource& s, int what) {
    const int64_t padded = t.P * PANEL;
    if (what & FORWARD) {
        pack_columns(s.first + s.state_column, s.first_stride, t.H, t.S, t.S, t.state_weight);
        pack_columns(s.first + s.x_column, s.first_stride, t.H, t.X, t.X, t.x_weight);
        if (t.D) pack_columns(s.first + s.time_column, s.first_stride, t.H, t.D, t.D, t.time_weight);
        pad_rows(s.first_bias, 0, 1, t.H, padded, t.first_bias);
        for (int l = 0; l + 1 < t.L; ++l) {
            pack_columns(s.hidden[l], t.H, t.H, t.H, padded, t.hidden_weight[l]);
            pad_rows(s.hidden_bias[l], 0, 1, t.H, padded, t.hidden_bias[l]);
        }
        pad_rows(s.out, t.H, t.O, t.H, padded, t.out_weight);
        for (int o = 0; o < t.O; ++o) t.out_bias[o] = s.out_bias[o];
    }
    if (what & BF16)
        for (int l = 0; l + 1 < t.L; ++l) pack_bf16(t.hidden_weight[l], padded, t.P, t.hidden_weight_bf16[l]);
    if (what & BACKWARD) {
        pack_rows(s.out, t.H, t.H, t.O, t.O, t.out_weight_t);
        for (int l = 0; l + 1 < t.L; ++l) pack_rows(s.hidden[l], t.H, t.H, t.H, padded, t.hidden_weight_t[l]);
        for (int64_t i = 0; i < t.X; ++i)
            for (int64_t j = 0; j < padded; ++j)
                t.x_weight_t[i * padded + j] = j < t.H ? s.first[j * s.first_stride + s.x_column + i] : 0.0f;
        pack_rows(s.first + s.state_column, s.first_stride, t.S, t.H, padded, t.state_weight_t);
    }
}

// ---- activation of n floats; padded columns stay zero, as every activation is 0 at 0 ----

template <class A>
static inline void activate_as(float* z, int64_t n) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; i += W) store(z + i, A::value(load(z + i)));
}

template <class A>
static inline void activate_as(float* z, float* slope, int64_t n) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < n; i += W) {
        Vec s;
        const Vec h = A::value_and_slope(load(z + i), s);
        store(z + i, h);
        store(slope + i, s);
    }
}

static __attribute__((noinline)) void activate(int kind, float* z, float* slope, int64_t n) {
    if (slope) {
        if (kind == MISH) return activate_as<Mish>(z, slope, n);
        if (kind == SILU) return activate_as<Silu>(z, slope, n);
        return activate_as<Relu>(z, slope, n);
    }
    if (kind == MISH) return activate_as<Mish>(z, n);
    if (kind == SILU) return activate_as<Silu>(z, n);
    activate_as<Relu>(z, n);
}

#if defined(__AVX512BF16__)
static inline void round_to_bf16(const float* in, uint32_t* out, int64_t n) {
    for (int64_t i = 0; i < n; i += PANEL)
        _mm512_storeu_si512(out + i / 2, (__m512i)_mm512_cvtne2ps_pbh(load(in + i + W), load(in + i)));
}
#endif

// ---- a layer: product, then activation, a few panels at a time ----

struct Layer {
    Product product;
    int activation;     // of the result, or -1
    float* slope;       // its derivative, panels as `out`; or null
};

struct RunUnits {
    const Product& product;
    template <int R, int U>
    void with(int64_t first) const {
        product_units<R, U>(product, first);
    }
};

struct RunLayer {
    const Layer& layer;
    int64_t P;

    template <int R>
    void rows() const {
        constexpr int TOGETHER = panels_at_once<R>();
        const Product& p = layer.product;
        for (int64_t panel = 0; panel < P; panel += TOGETHER) {
            const int64_t count = P - panel < TOGETHER ? P - panel : TOGETHER;
            in_groups<R, units(R)>(panel * UNITS_OF_PANEL, count * UNITS_OF_PANEL, RunUnits{p});
            if (layer.activation < 0) continue;
            for (int64_t q = panel; q < panel + count; ++q)
                activate(layer.activation, p.out + q * p.out_panel,
                         layer.slope ? layer.slope + q * p.out_panel : nullptr, R * PANEL);
        }
    }
};

static __attribute__((noinline)) void run_layer(const Layer& layer, int rows, int64_t P) {
    with_rows<MAX_ROWS>(rows, RunLayer{layer, P});
}

#if defined(__AVX512BF16__)
struct LayerBf16 {
    ProductBf16 product;
    int activation;
    float* slope;
    uint32_t* rounded;  // the result in bf16 pairs [P][rows][16], or null
};

struct RunUnitsBf16 {
    const ProductBf16& product;
    template <int R, int U>
    void with(int64_t first) const {
        product_units_bf16<R, U>(product, first);
    }
};

struct RunLayerBf16 {
    const LayerBf16& layer;
    int64_t P;

    template <int R>
    void rows() const {
        constexpr int TOGETHER = panels_at_once<R>();
        const ProductBf16& p = layer.product;
        for (int64_t panel = 0; panel < P; panel += TOGETHER) {
            const int64_t count = P - panel < TOGETHER ? P - panel : TOGETHER;
            in_groups<R, units(R)>(panel, count, RunUnitsBf16{p});
            for (int64_t q = panel; q < panel + count; ++q) {
                float* out = p.out + q * p.out_panel;
                activate(layer.activation, out, layer.slope ? layer.slope + q * p.out_panel : nullptr, R * PANEL);
                if (layer.rounded) round_to_bf16(out, layer.rounded + q * R * (PANEL / 2), R * PANEL);
            }
        }
    }
};
#endif

// ---- the network ----

// Where a tile's activations go: into a Saved, whose panels are long, or into scratch, used over and over.
struct Places {
    float* hidden[MAX_LAYERS];
    float* slope[MAX_LAYERS];  // null: not wanted
    int64_t panel;             // floats from panel to panel
};

static inline Places saved_places(const Saved& saved, const Trunk& t, int64_t row) {
    Places places = {};
    for (int l = 0; l < t.L; ++l) {
        places.hidden[l] = saved.hidden[l] + row * PANEL;
        places.slope[l] = saved.slope[l] + row * PANEL;
    }
    places.panel = saved.rows * PANEL;
    return places;
}

// Two buffers of P * rows * 32 floats, in turns.
static inline Places scratch_places(const Trunk& t, int rows, float* scratch) {
    Places places = {};
    places.panel = rows * PANEL;
    for (int l = 0; l < t.L; ++l) places.hidden[l] = scratch + (l % 2) * t.P * places.panel;
    return places;
}

// The state's part of the first layer: states [panels(S)][rows][32] -> [P][rows][32].
static inline void state_part(const Trunk& t, const float* states, int rows, const float* bias, float* out) {
    Layer layer = {};
    layer.product = {states, rows * PANEL, t.S, t.state_weight, t.P, bias, nullptr, 0, nullptr, out,
                     rows * PANEL};
    layer.activation = -1;
    run_layer(layer, rows, t.P);
}

// x [panels(X)][rows][32] with panels of x_panel -> out [panels(O)][rows][32] with panels of out_panel.
//   common: [32 P], added to the first layer's sums, or null
//   base, base_row: row r adds base's row base_row[r]
//   rounded: scratch for bf16 operands, 2 * P * rows * 16; null computes in float32
static inline void trunk_forward(const Trunk& t, int rows, const float* x, int64_t x_panel, const float* common,
                                 const float* base, int64_t base_panel, const int32_t* base_row, const Places& places,
                                 uint32_t* rounded, float* out, int64_t out_panel) {
    Layer first = {};
    first.product = {x,    x_panel,    t.X,      t.x_weight,       t.P,  common,
                     base, base_panel, base_row, places.hidden[0], places.panel};
    first.activation = t.activation;
    first.slope = places.slope[0];
    first.product.fetch = places.slope[0];
    run_layer(first, rows, t.P);
#if defined(__AVX512BF16__)
    if (rounded) {
        const int64_t size = t.P * rows * (PANEL / 2);
        for (int64_t p = 0; p < t.P; ++p)
            round_to_bf16(places.hidden[0] + p * places.panel, rounded + p * rows * (PANEL / 2), rows * PANEL);
        for (int l = 1; l < t.L; ++l) {
            LayerBf16 layer = {};
            layer.product.in = rounded + (l - 1) % 2 * size;
            layer.product.in_panel = rows * (PANEL / 2);
            layer.product.K = t.P * PANEL;
            layer.product.weight = t.hidden_weight_bf16[l - 1];
            layer.product.P = t.P;
            layer.product.common = t.hidden_bias[l - 1];
            layer.product.out = places.hidden[l];
            layer.product.out_panel = places.panel;
            layer.activation = t.activation;
            layer.slope = places.slope[l];
            layer.rounded = l + 1 < t.L ? rounded + l % 2 * size : nullptr;
            with_rows<MAX_ROWS>(rows, RunLayerBf16{layer, t.P});
        }
        dot(places.hidden[t.L - 1], places.panel, rows, t.out_weight, t.P, t.out_bias, t.O, out, out_panel);
        return;
    }
#endif
    (void)rounded;
    for (int l = 1; l < t.L; ++l) {
        Layer layer = {};
        layer.product.in = places.hidden[l - 1];
        layer.product.in_panel = places.panel;
        layer.product.K = t.P * PANEL;
        layer.product.weight = t.hidden_weight[l - 1];
        layer.product.P = t.P;
        layer.product.common = t.hidden_bias[l - 1];
        layer.product.out = places.hidden[l];
        layer.product.out_panel = places.panel;
        layer.activation = t.activation;
        layer.slope = places.slope[l];
        layer.product.fetch = places.slope[l];
        run_layer(layer, rows, t.P);
    }
    dot(places.hidden[t.L - 1], places.panel, rows, t.out_weight, t.P, t.out_bias, t.O, out, out_panel);
}

// d_out, rows `row` .. of saved.d_out, -> saved.d_z of all layers, and d_x [panels(X)][rows][32] unless null.
static inline void trunk_backward(const Trunk& t, int rows, const Saved& saved, int64_t row, float* d_x,
                                  int64_t d_x_panel) {
    const int64_t panel = saved.rows * PANEL, at = row * PANEL;
    for (int l = t.L - 1; l >= 0; --l) {
        const bool last = l == t.L - 1;
        Layer layer = {};
        layer.product.in = last ? saved.d_out + at : saved.d_z[l + 1] + at;
        layer.product.in_panel = panel;
        layer.product.K = last ? t.O : t.P * PANEL;
        layer.product.weight = last ? t.out_weight_t : t.hidden_weight_t[l];
        layer.product.P = t.P;
        layer.product.out = saved.d_z[l] + at;
        layer.product.out_panel = panel;
        layer.product.times = layer.product.fetch = saved.slope[l] + at;
        layer.activation = -1;
        run_layer(layer, rows, t.P);
    }
    if (d_x) dot(saved.d_z[0] + at, panel, rows, t.x_weight_t, t.P, nullptr, t.X, d_x, d_x_panel);
}

}  // namespace DQL_VARIANT
}  // namespace dql
