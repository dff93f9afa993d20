// engine.h without Python: every call, in every variant that this CPU runs, at sizes that are no multiple of anything.
//
// Every buffer is a heap block of exactly the size that the interface names, and each call runs in a thread of its own,
// whose scratch memory starts empty: AddressSanitizer sees the first float read or written beyond any of them. run.sh
// has it fill new memory with NaN, which reaches the results if anything is read that nobody wrote.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "networks.h"

namespace {

using namespace dql;
constexpr uint64_t SEED = 0xFFFFFFFFFFFFFFFF;

// Each value at least twice, each pair of neighbours in some case; B * N over, at and under a tile.
const Sizes ALL_SIZES[] = {
    {1, 1, 16, 2, 1, 1, 1, MISH, 16},  {3, 3, 48, 3, 5, 1, 5, SILU, 16},   {33, 33, 48, 4, 3, 3, 5, MISH, 16},
    {3, 64, 16, 2, 13, 3, 1, RELU, 4}, {33, 1, 256, 3, 17, 1, 5, MISH, 16}, {1, 3, 512, 4, 2, 3, 1, MISH, 16},
    {33, 64, 512, 2, 1, 1, 5, SILU, 16}, {3, 33, 256, 2, 2, 3, 5, RELU, 40}, {65, 3, 1, 3, 29, 1, 2, MISH, 16},
    {3, 3, 33, 2, 43, 1, 5, MISH, 16}, {512, 32, 31, 4, 1, 5, 1, RELU, 16},
};

std::string name_of(const Sizes& z) {
    const auto part = [](const char* letter, int value) { return letter + std::to_string(value) + " "; };
    return part("S", z.S) + part("A", z.A) + part("H", z.H) + part("L", z.L) + part("B", z.B) + part("N", z.N) +
           part("K", z.K) + part("activation ", z.activation) + part("D", z.D);
}

// In a thread of its own: its scratch memory is what this one call asks for.
template <class Body>
void fresh(const Body& body) {
    std::thread(body).join();
}

Floats gradient_of(const Net& net) { return Floats(net.flat.size(), NOTHING); }

bool all_finite(const Floats& values) {
    return std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
}

// One of the results of a case.
struct Result {
    const char* name;
    Floats values;
};

// The largest difference relative to the largest value; NaN where both have it is what lies between tensors.
void check_near(const std::vector<Result>& got, const std::vector<Result>& want, const std::string& where) {
    CHECK_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) {
        double largest = 0.0, worst = 0.0;
        for (size_t j = 0; j < want[i].values.size(); ++j) {
            const double a = got[i].values[j], b = want[i].values[j];
            if (std::isnan(a) && std::isnan(b)) continue;
            largest = std::max(largest, std::fabs(b));
            worst = std::fabs(a - b) <= worst ? worst : std::fabs(a - b);
        }
        if (!(worst <= 1e-4 * largest + 1e-7))
            check::fail(__FILE__, __LINE__, where, got[i].name, " differs by ", worst, " of ", largest);
    }
}

struct Problem {
    Sizes z;
    std::mt19937 generator{17};
    Net net, critic_net;
    Network denoiser, critic;
    Table table, times;
    int64_t R;
    Floats states, noise, d_actions;

    explicit Problem(const Sizes& sizes)
        : z(sizes), net(z, false, generator), critic_net(z, true, generator), denoiser(net.spec),
          critic(critic_net.spec), table(make_table(z, generator, 1, true)), times(make_table(z, generator, 2, false)),
          R(static_cast<int64_t>(z.B) * z.N), states(draw(generator, static_cast<int64_t>(z.B) * z.S)),
          noise(draw(generator, z.K * R * z.A)), d_actions(draw(generator, R * z.A)) {}

    ChainCall call(int threads, bool drawn, bool bf16, bool backward, Floats& actions) {
        ChainCall call = {};
        const int parts = FORWARD | (backward ? BACKWARD : 0) | (bf16 ? BF16 : 0);
        call.packed = denoiser.packed(net.flat.data(), 0, parts);
        call.time_table = denoiser.time_table(*call.packed, table);
        call.table = &table;
        call.states = states.data();
        call.B = z.B, call.N = z.N;
        call.noise = drawn ? nullptr : noise.data();
        call.seed = SEED;
        call.max_action = 2.5f;
        call.bf16 = bf16;
        call.threads = threads;
        actions.assign(static_cast<size_t>(R * z.A), NOTHING);
        call.actions = actions.data();
        return call;
    }

    std::vector<Result> chains(int threads, bool bf16) {
        Floats given, drawn, kept, d_flat = gradient_of(net), d_states(states.size(), NOTHING);
        fresh([&] { chain(call(threads, false, bf16, false, given), nullptr); });
        fresh([&] { chain(call(threads, true, bf16, false, drawn), nullptr); });
        SavedChain saved;
        fresh([&] { chain(call(threads, false, bf16, true, kept), &saved); });
        const Gradients out = {d_flat.data(), false, d_states.data()};
        fresh([&] {
            chain_backward(denoiser, saved, table, states.data(), d_actions.data(), 0.5f, out, threads);
        });
        CHECK(same_bits(kept, given));  // gradients or not, the actions are the same
        CHECK(net.written_where_it_should(d_flat));
        return {{"actions", given}, {"drawn", drawn}, {"kept", kept}, {"d_flat", d_flat}, {"d_states", d_states}};
    }

    // Gradients of the states alone, of the parameters alone, and added to what is there.
    void parts_of_a_gradient(const std::vector<Result>& whole) {
        const auto backward = [&](const Gradients& out) {
            Floats actions;
            SavedChain saved;
            chain(call(1, false, false, true, actions), &saved);
            chain_backward(denoiser, saved, table, states.data(), d_actions.data(), 0.5f, out, 1);
        };
        Floats d_flat = gradient_of(net), d_states(states.size(), NOTHING);
        backward({nullptr, false, d_states.data()});
        CHECK(same_bits(d_states, whole[4].values));
        backward({d_flat.data(), false, nullptr});
        CHECK(same_bits(d_flat, whole[3].values));
        Floats twice = whole[3].values;
        for (float& v : twice) v *= 2.0f;
        backward({d_flat.data(), true, nullptr});
        check_near({{"d_flat added", d_flat}}, {{"", twice}}, name_of(z));
    }

    std::vector<Result> selected(int threads, bool bf16) {
        Floats chosen(static_cast<size_t>(z.B) * z.A, NOTHING), unused, candidates;
        const std::shared_ptr<Packed> packed = critic.packed(critic_net.flat.data(), 0, FORWARD);
        fresh([&] { select(call(threads, true, bf16, false, unused), *packed, SEED, chosen.data()); });
        fresh([&] { chain(call(threads, true, bf16, false, candidates), nullptr); });
        Floats all;
        std::vector<int64_t> index(static_cast<size_t>(z.B), -1);
        fresh([&] { draw(call(threads, true, bf16, false, all), *packed, SEED, index.data()); });
        CHECK(same_bits(all, candidates));
        for (int b = 0; b < z.B; ++b) {  // what is chosen is the one of the state's own candidates that `draw` names
            CHECK(index[b] >= 0 && index[b] < z.N);
            const float* candidate = candidates.data() + (b * z.N + index[b]) * z.A;
            CHECK(std::memcmp(chosen.data() + b * z.A, candidate, sizeof(float) * z.A) == 0);
        }
        return {{"chosen", chosen}};
    }

    std::vector<Result> critics(int threads) {
        std::mt19937 own(5);  // the same numbers at every call
        const Floats actions = draw(own, R * z.A), rewards = draw(own, z.B), masks(rewards.size(), 1.0f);
        const Floats one_each(actions.begin(), actions.begin() + static_cast<int64_t>(z.B) * z.A);
        const auto packed = [&] { return critic.packed(critic_net.flat.data(), 0, FORWARD | BACKWARD); };
        Floats q1(static_cast<size_t>(R), NOTHING), q2 = q1, target(rewards.size(), NOTHING);
        Floats d_flat = gradient_of(critic_net), d_actions1(one_each.size(), NOTHING), d_actions2 = d_actions1;
        fresh([&] {
            q_values(*packed(), states.data(), z.B, actions.data(), z.N, q1.data(), q2.data(), threads);
        });
        double mean = 0.0;
        fresh([&] {
            mean = target_q(*packed(), states.data(), z.B, actions.data(), z.N, rewards.data(), masks.data(), 0.99f,
                            target.data(), threads);
        });
        CriticLoss loss = {};
        fresh([&] {
            loss = critic_gradient(critic, *packed(), states.data(), one_each.data(), z.B, target.data(),
                                   {d_flat.data(), false, nullptr}, threads);
        });
        CHECK(critic_net.written_where_it_should(d_flat));
        QMeans means[2];
        fresh([&] {
            means[0] = q_gradient(*packed(), 0, states.data(), one_each.data(), z.B, d_actions1.data(), threads);
        });
        fresh([&] {
            means[1] = q_gradient(*packed(), 1, states.data(), one_each.data(), z.B, d_actions2.data(), threads);
        });
        Floats scalars;
        for (const double v : {mean, loss.loss, loss.q, means[0].q, means[0].other, means[1].q, means[1].other})
            scalars.push_back(static_cast<float>(v));
        return {{"q1", q1},           {"q2", q2},           {"target_q", target},   {"d critic", d_flat},
                {"dq1/da", d_actions1}, {"dq2/da", d_actions2}, {"means", scalars}};
    }

    std::vector<Result> cloning(int threads) {
        std::vector<Result> results;
        const Floats actions(d_actions.begin(), d_actions.begin() + static_cast<int64_t>(z.B) * z.A);
        for (const bool predict_epsilon : {true, false}) {
            Floats d_flat = gradient_of(net);
            double loss = 0.0;
            const std::shared_ptr<Packed> packed = denoiser.packed(net.flat.data(), 0, FORWARD | BACKWARD);
            const std::shared_ptr<const Buffer> time_table = denoiser.time_table(*packed, times);
            fresh([&] {
                loss = bc_gradient(denoiser, *packed, *time_table, times, states.data(), actions.data(), z.B, 5, SEED,
                                   predict_epsilon, {d_flat.data(), false, nullptr}, threads);
            });
            CHECK(net.written_where_it_should(d_flat));
            results.push_back({"d bc", d_flat});
            results.push_back({"bc loss", {static_cast<float>(loss)}});
        }
        return results;
    }

    std::vector<Result> everything(int threads) {
        std::vector<Result> all = chains(threads, false);
        for (auto part : {selected(threads, false), critics(threads), cloning(threads)})
            all.insert(all.end(), part.begin(), part.end());
        for (const Result& result : all) {
            const std::string name = result.name;
            const bool has_gaps = name == "d_flat" || name == "d critic" || name == "d bc";
            if (!has_gaps && !all_finite(result.values))
                check::fail(__FILE__, __LINE__, name_of(z), name, " is not finite");
        }
        return all;
    }
};

void every_call() {
    for (const Sizes& z : ALL_SIZES) {
        std::vector<Result> first;
        every_variant([&](const std::string& variant) {
            Problem problem(z);
            const std::vector<Result> results = problem.everything(1);
            if (first.empty()) first = results;
            check_near(results, first, variant + ": " + name_of(z));
        });
    }
}

void threads_change_nothing() {
    for (const Sizes& z : {ALL_SIZES[2], ALL_SIZES[3], ALL_SIZES[9]})
        every_variant([&](const std::string& variant) {
            Problem problem(z);
            const std::vector<Result> one = problem.everything(1), three = problem.everything(3);
            for (size_t i = 0; i < one.size(); ++i)
                if (!same_bits(one[i].values, three[i].values))
                    check::fail(__FILE__, __LINE__, variant, ": ", name_of(z), one[i].name, " depends on threads");
        });
}

void parts_of_a_gradient() {
    for (const Sizes& z : {ALL_SIZES[1], ALL_SIZES[2]})
        every_variant([&](const std::string&) {
            Problem problem(z);
            problem.parts_of_a_gradient(problem.chains(1, false));
        });
}

void bf16() {
    for (const Variant& variant : variants()) {
        if (!variant.kernels || !variant.kernels->bf16) continue;
        force_variant(variant.name);
        for (const Sizes& z : {ALL_SIZES[0], ALL_SIZES[1], ALL_SIZES[2], ALL_SIZES[4], ALL_SIZES[8]}) {
            Problem problem(z);
            for (const Result& result : problem.chains(1, true))
                CHECK(result.name == std::string("d_flat") || all_finite(result.values));
            problem.selected(1, true);
        }
    }
    force_variant("");
}

// Many tiles, the last smaller, in one thread's scratch; and one step more than noise is drawn for at a time.
void long_chains() {
    every_variant([](const std::string& variant) {
        for (const Sizes& z : {Sizes{3, 1, 16, 2, 1, 1, 1000, MISH, 16}, Sizes{2, 33, 16, 2, 8, 1, 70, MISH, 16}}) {
            Problem problem(z);
            Floats drawn, together, given;
            fresh([&] { chain(problem.call(1, true, false, false, drawn), nullptr); });
            CHECK(all_finite(drawn));
            // the same noise, made at once and handed in
            const int64_t blocks = panels(z.A), step = blocks * z.B * PANEL;
            Floats panel(static_cast<size_t>(step), 0.0f);
            for (int k = 0; k < z.K; ++k) {
                kernels().normals(SEED, 0, static_cast<uint32_t>(k), 1, 0, z.B, z.A, panel.data(), step, z.B * PANEL);
                for (int r = 0; r < z.B; ++r)
                    for (int a = 0; a < z.A; ++a)
                        problem.noise[static_cast<size_t>((k * z.B + r) * z.A + a)] =
                            panel[static_cast<size_t>(a / PANEL * z.B * PANEL + r * PANEL + a % PANEL)];
            }
            fresh([&] { chain(problem.call(1, false, false, false, given), nullptr); });
            if (!same_bits(drawn, given))
                check::fail(__FILE__, __LINE__, variant, ": ", name_of(z), "noise drawn in parts differs");
        }
    });
}

// A saved chain holds the weights and the time table of its own version, whatever the network does meanwhile.
void saved_chains_keep_what_they_need() {
    Problem problem(ALL_SIZES[1]);
    const std::vector<Result> want = problem.chains(1, false);
    Floats actions, d_flat = gradient_of(problem.net), d_states(problem.states.size(), NOTHING);
    SavedChain saved;
    chain(problem.call(1, false, false, true, actions), &saved);
    Floats other = problem.net.flat;
    for (float& v : other) v *= 2.0f;
    problem.denoiser.packed(other.data(), 1, FORWARD | BACKWARD);
    chain_backward(problem.denoiser, saved, problem.table, problem.states.data(), problem.d_actions.data(), 0.5f,
                   {d_flat.data(), false, d_states.data()}, 1);
    CHECK(same_bits(d_flat, want[3].values));
    CHECK(same_bits(d_states, want[4].values));
}

void many_tables() {
    Problem problem(ALL_SIZES[1]);
    const std::vector<Result> want = problem.chains(1, false);
    Floats actions, d_flat = gradient_of(problem.net);
    SavedChain saved;
    chain(problem.call(1, false, false, true, actions), &saved);
    for (uint64_t id = 100; id < 120; ++id) {  // more than a network keeps
        const Table table = make_table(problem.z, problem.generator, id, true);
        problem.denoiser.time_table(*saved.packed, table);
    }
    chain_backward(problem.denoiser, saved, problem.table, problem.states.data(), problem.d_actions.data(), 0.5f,
                   {d_flat.data(), false, nullptr}, 1);
    CHECK(same_bits(d_flat, want[3].values));
}

void flat_buffers() {
    std::mt19937 generator(3);
    for (const int64_t size : {1, 15, 16, 17, 4095, 4096, 4097, 9000}) {
        const Floats start = draw(generator, size), gradient = draw(generator, size), source = draw(generator, size);
        std::vector<Result> first;
        every_variant([&](const std::string& variant) {
            Floats parameters = start, d = gradient, m(start.size()), v(start.size()), target = start;
            double norm = 0.0;
            for (int step = 1; step <= 3; ++step)
                norm = adam_step({parameters.data(), d.data(), m.data(), v.data(), size}, 1e-2, step, 1.0);
            double squares = 0.0;
            for (const float g : gradient) squares += static_cast<double>(g) * g;
            CHECK_NEAR(norm, std::sqrt(squares), 1e-5 * norm);
            kernels().lerp(target.data(), source.data(), size, 0.25f);
            CHECK(kernels().all_finite(target.data(), size));
            Floats bad = target;
            for (const int64_t at : {int64_t{0}, size / 2, size - 1})
                for (const float value : {NOTHING, INFINITY, -INFINITY}) {
                    bad = target;
                    bad[static_cast<size_t>(at)] = value;
                    CHECK(!kernels().all_finite(bad.data(), size));
                }
            const std::vector<Result> results = {
                {"adam", parameters}, {"exp_avg", m}, {"exp_avg_sq", v}, {"lerp", target}};
            if (first.empty()) first = results;
            check_near(results, first, variant + ": " + std::to_string(size) + " elements, ");
        });
    }
}

void wrong_variants() {
    for (const char* name : {"avx9", "cpp", "AVX2"}) {
        std::string said;
        try {
            force_variant(name);
        } catch (const std::invalid_argument& error) {
            said = error.what();
        }
        CHECK(said.find("unknown variant") == 0 && said.find("generic") != std::string::npos);
    }
}

}  // namespace

int main() {
    RUN(every_call);
    RUN(threads_change_nothing);
    RUN(parts_of_a_gradient);
    RUN(bf16);
    RUN(long_chains);
    RUN(saved_chains_keep_what_they_need);
    RUN(many_tables);
    RUN(flat_buffers);
    RUN(wrong_variants);
    return check::report();
}
