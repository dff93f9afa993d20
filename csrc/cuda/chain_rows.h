// The chain's own arithmetic between two passes through the network, for a tile of ROWS rows: what it starts from, the
// update of x (or of its gradient), noise. A quad of a row's numbers belongs to one thread from step to step. What the
// kernels for 16 rows and more (chain_state.h) and for fewer (solo_chain.h) share.
#pragma once

#include "arithmetic.h"
#include "chain_arguments.h"

namespace dql {
namespace device {

template <int ROWS, bool BACKWARD, bool CLONES>  // CLONES: some rows may be a cloned batch's, of one step with number K
class ChainRows {
protected:
    static constexpr int M = ROWS;

    DQL_DEVICE ChainRows(const ChainArguments& arguments, int rank_)
        : a(arguments),
          memory(shared_memory()),
          rank(rank_),
          network(block_y()),
          narrow(a.memory.narrow),
          critic(a.net.D == 0),
          v(floats_at(a.memory.v)),
          own(floats_at(a.memory.own)) {}

    DQL_DEVICE float* floats_at(int offset) const { return reinterpret_cast<float*>(memory + offset); }

    DQL_DEVICE int quads() const { return narrow / 4; }
    DQL_DEVICE int all_quads() const { return M * quads(); }

    // Of a quad: 0: x0 of the step before, or d_x; 1: noise, or the gradient carried to x0; 2: d_raw.
    DQL_DEVICE float* own_place(int which, int quad) const { return own + which * M * narrow + 4 * quad; }
    // The narrow input of the tile's first step: quads `first`, `first` + THREADS, ...
    DQL_DEVICE void begin_rows(int first) {
        for (int quad = first; quad < all_quads(); quad += THREADS) {
            const int row = quad / quads(), q = quad % quads();
            const int64_t at = row0 + row;
            float x[4] = {0, 0, 0, 0}, zero[4] = {0, 0, 0, 0};
            if (critic) {
                if (at < a.R) {
                    if constexpr (BACKWARD)
                        read(x, a.d_out_in + network * a.R + at, q, 1);
                    else
                        read(x, a.actions_in + at * a.net.X, q, a.net.X);
                }
                put(v + 4 * quad, x);
                continue;
            }
            if (CLONES && k == a.K) {
                begin_cloned(x, at, q, quad);
                continue;
            }
            if constexpr (BACKWARD) {
                float last[4] = {0, 0, 0, 0};
                if (at < a.R) read(x, a.d_out_in + at * a.net.X, q, a.net.X);
                read(last, a.raws + (static_cast<int64_t>(a.K) * a.RP + at) * a.net.X, q, a.net.X);
                DQL_UNROLL
                for (int i = 0; i < 4; ++i) x[i] = inside(a, last[i]) ? x[i] : 0;
                put(own_place(0, quad), x);
                put(own_place(1, quad), zero);
                float raw[4] = {0, 0, 0, 0};
                read_raw(raw, quad, a.K - 1);
                backward_input(quad, a.K - 1, raw);
            } else {
                draw(a, x, at, q, 0);
                put(v + 4 * quad, x);
                put(own_place(0, quad), zero);
            }
        }
    }

    // What a cloned row starts from: forward x and, to be compared later, what is to be predicted; backward the
    // prediction's gradient, which the forward pass left.
    DQL_DEVICE void begin_cloned(float (&x)[4], int64_t at, int q, int quad) {
        if constexpr (BACKWARD) {
            if (at < a.R) read(x, cloned_gradient(at), q, a.net.X);
            if (rank == 0) write(a.d_out + (static_cast<int64_t>(a.K) * a.RP + at) * a.net.X, x, q, a.net.X);
        } else {
            float target[4] = {0, 0, 0, 0};
            clone(a, x, target, at, q);
            put(own_place(0, quad), target);
            if (rank == 0) write(a.xs + (static_cast<int64_t>(a.K) * a.RP + at) * a.net.X, x, q, a.net.X);
        }
        put(v + 4 * quad, x);
    }

    DQL_DEVICE float* cloned_gradient(int64_t at) const {
        return a.raws + (static_cast<int64_t>(a.K + 1) * a.RP + at) * a.net.X;
    }

    DQL_DEVICE void read_raw(float (&raw)[4], int quad, int j) const {
        const int64_t at = static_cast<int64_t>(j) * a.RP + row0 + quad / quads();
        read(raw, a.raws + at * a.net.X, quad % quads(), a.net.X);
    }

    // d_eps of step j from d_x behind it; `raw` of read_raw.
    DQL_DEVICE void backward_input(int quad, int j, const float (&raw)[4]) {
        const Step step(a.steps + j * STEP_STRIDE);
        float d_x[4], carried[4], d_raw[4], d_eps[4];
        get(d_x, own_place(0, quad));
        get(carried, own_place(1, quad));
        DQL_UNROLL
        for (int i = 0; i < 4; ++i) {
            d_raw[i] = inside(a, raw[i]) ? step.c0 * d_x[i] + carried[i] : 0;
            carried[i] = step.cp * d_x[i];
            d_eps[i] = -step.b * d_raw[i];
        }
        put(own_place(1, quad), carried);
        put(own_place(2, quad), d_raw);
        put(v + 4 * quad, d_eps);
        const int64_t at = static_cast<int64_t>(j) * a.RP + row0 + quad / quads();
        if (rank == 0) write(a.d_out + at * a.net.X, d_eps, quad % quads(), a.net.X);
    }

    // After this step the chain takes noise: not after the last, where the posterior variance is 0.
    DQL_DEVICE bool draws() const { return !BACKWARD && !critic && k + 1 < a.K; }

    // noise[step] of quads `first`, `first` + `threads`, ... to place `which` of `own`.
    DQL_DEVICE void draw_quads(int first, int threads, int step, int which) {
        for (int quad = first; quad < all_quads(); quad += threads) {
            float noise[4] = {0, 0, 0, 0};
            draw(a, noise, row0 + quad / quads(), quad % quads(), step);
            put(own_place(which, quad), noise);
        }
    }

    // Of the update of a quad, what comes from device memory and depends on no sum: forward the last layer's bias,
    // backward raw x0 of the step that is next. Asked for before the sums are waited for.
    DQL_DEVICE void read_ahead(float (&ahead)[4], int quad) const {
        DQL_UNROLL
        for (int i = 0; i < 4; ++i) ahead[i] = 0;
        if constexpr (BACKWARD) {
            if (!critic) read_raw(ahead, quad, k - 1);
        } else {
            read(ahead, a.flat + a.net.out_bias + (a.first_network + network) * a.net.apart, quad % quads(), a.net.O);
        }
    }

    // From the last layer's sums of a quad to the next step's input, or to what the chain ends with.
    DQL_DEVICE void update_quad(const Step& step, const float (&sum)[4], int quad, const float (&ahead)[4],
                                const float* noise) {
        if constexpr (BACKWARD)
            update_backward(step, sum, quad, ahead);
        else
            update_forward(step, sum, quad, ahead, noise);
    }

private:
    DQL_DEVICE void update_forward(const Step& step, const float (&sum)[4], int quad, const float (&bias)[4],
                                   const float* noise_at) {
        const int row = quad / quads(), q = quad % quads(), A = a.net.X;
        const int64_t at = row0 + row;
        if (critic) {
            if (q == 0 && rank == 0 && at < a.R) a.out[network * a.R + at] = sum[0] + bias[0];
            return;
        }
        if (CLONES && k == a.K) return update_cloned(sum, quad, bias);
        float x[4], x0_before[4], noise[4] = {0, 0, 0, 0};
        get(x, v + 4 * quad);
        get(x0_before, own_place(0, quad));
        if (draws()) get(noise, noise_at);
        const Updated updated = chain_step(a, step, k, sum, bias, x, x0_before, noise);
        put(own_place(0, quad), updated.x0);
        put(v + 4 * quad, updated.next);
        const bool last = k + 1 == a.K;
        if (rank != 0) return;
        if (a.h != nullptr) {
            const int64_t here = (static_cast<int64_t>(k) * a.RP + at) * A;
            write(a.xs + here, x, q, A);
            write(a.raws + here, updated.raw, q, A);
            if (last) write(a.raws + here + a.RP * A, updated.next, q, A);
        }
        if (last && at < a.R) write_actions(a, at, q, updated.next);
    }

    // The squares of what a prediction is off, and the loss's gradient.
    DQL_DEVICE void update_cloned(const float (&sum)[4], int quad, const float (&bias)[4]) {
        const int q = quad % quads();
        const int64_t at = row0 + quad / quads();
        const float by = 2.0f / (static_cast<float>(a.R) * static_cast<float>(a.net.O));
        float target[4], squares[4], d_out[4];
        get(target, own_place(0, quad));
        DQL_UNROLL
        for (int i = 0; i < 4; ++i) {
            const bool real = at < a.R && 4 * q + i < a.net.O;
            const float off = real ? sum[i] + bias[i] - target[i] : 0;
            squares[i] = off * off, d_out[i] = by * off;
        }
        put(own_place(1, quad), squares);
        if (rank == 0 && at < a.R) write(cloned_gradient(at), d_out, q, a.net.O);
    }

    DQL_DEVICE void update_backward(const Step& step, const float (&sum)[4], int quad, const float (&raw)[4]) {
        const int row = quad / quads(), q = quad % quads(), A = a.net.X;
        const int64_t at = row0 + row;
        if (critic) {
            const int64_t of = a.only_at != nullptr || a.only > 0 ? 0 : network;
            if (rank == 0 && at < a.R) write(a.d_actions + (of * a.R + at) * A, sum, q, A);
            return;
        }
        float d_x[4], d_raw[4];
        get(d_x, own_place(0, quad));
        get(d_raw, own_place(2, quad));
        DQL_UNROLL
        for (int i = 0; i < 4; ++i) d_x[i] = step.cx * d_x[i] + step.a * d_raw[i] + sum[i];
        put(own_place(0, quad), d_x);
        backward_input(quad, k - 1, raw);
    }

protected:
    const ChainArguments& a;
    char* memory;
    int rank, network;  // of the cluster's blocks, of the networks that run
    int narrow;
    bool critic;
    float *v, *own;
    int k = 0;
    int64_t row0 = 0;
};

}  // namespace device
}  // namespace dql
