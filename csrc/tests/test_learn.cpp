// learn() (engine.h) against the engine's functions called one by one, bit for bit, in every variant: any number of
// agents and threads, and what its queue does when an agent fails or the pool is taken. Under ThreadSanitizer too.
//
// Every buffer is a heap block of exactly the size that the interface names. Needs a POSIX system for fork.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "networks.h"
#include "../cpu/pool.h"

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1  // what g++ defines
#endif
#endif

namespace {

using namespace dql;

constexpr Sizes SIZES = {5, 3, 33, 2, 21, 1, 3, MISH, 16};
constexpr int64_t ROWS = 50, MOST = 6;  // of the data; updates of an agent
constexpr float DISCOUNT = 0.97f, MAX_ACTION = 1.5f;
constexpr double ETA = 0.7, TAU = 0.005, LR = 1e-3, MAX_NORM = 0.8;

struct Trained {
    Net net;
    std::unique_ptr<Network> network;
    Floats gradient, exp_avg, exp_avg_sq, step{0.0f};
    int64_t version = 0;

    Trained(bool critic, uint32_t seed) : net(made(critic, seed)), network(std::make_unique<Network>(net.spec)) {
        for (float& value : net.flat)  // what lies between tensors is 0: Adam and averages go over all of it
            if (!(value == value)) value = 0.0f;
        gradient = exp_avg = exp_avg_sq = Floats(net.flat.size(), 0.0f);
    }

    static Net made(bool critic, uint32_t seed) {
        std::mt19937 generator(seed);
        return Net(SIZES, critic, generator);
    }

    Weights weights() { return {network.get(), net.flat.data(), version}; }
    Optimizer adam() {
        return {gradient.data(), exp_avg.data(), exp_avg_sq.data(), step.data(), LR, MAX_NORM};
    }
    std::shared_ptr<Packed> packed(int parts) { return network->packed(net.flat.data(), version, parts); }

    double stepped(double lr_scale) {
        step[0] += 1.0f;
        const int64_t size = net.spec.flat_size;
        const double norm = adam_step({net.flat.data(), gradient.data(), exp_avg.data(), exp_avg_sq.data(), size},
                                      LR * lr_scale, static_cast<int64_t>(step[0]), MAX_NORM);
        ++version;
        return norm;
    }

    void towards(const Trained& source, double weight) {
        kernels().lerp(net.flat.data(), source.net.flat.data(), net.spec.flat_size, static_cast<float>(weight));
        ++version;
    }
};

// An agent with all that its updates take. Each has other numbers, the third clones behaviour, the second's target is
// the best of three actions.
struct Agent {
    bool learns_q;
    int64_t candidates;
    std::mt19937 generator;
    Trained actor, ema_actor, critic, critic_target;
    Table steps, loss;
    Floats states, actions, rewards, next_states, masks;
    std::vector<int64_t> rows;
    std::vector<UpdateSeeds> seeds;
    std::vector<double> lr_scale, ema_weight, metrics;

    explicit Agent(uint32_t m)
        : learns_q(m % 4 != 2), candidates(m % 4 == 1 ? 3 : 1), generator(m + 1), actor(false, 10 * m),
          ema_actor(false, 10 * m), critic(true, 10 * m + 1), critic_target(true, 10 * m + 1),
          steps(make_table(SIZES, generator, 2 * m + 1, true)), loss(make_table(SIZES, generator, 2 * m + 2, false)),
          states(draw(generator, ROWS * SIZES.S)), actions(draw(generator, ROWS * SIZES.A)),
          rewards(draw(generator, ROWS)), next_states(draw(generator, ROWS * SIZES.S)), masks(ROWS, 1.0f),
          metrics(static_cast<size_t>(MOST * (learns_q ? 8 : 2)), NOTHING) {
        for (int64_t i = 0; i < MOST * SIZES.B; ++i) rows.push_back(static_cast<int64_t>(generator() % ROWS));
        rows[0] = 0, rows[1] = ROWS - 1;
        masks[3] = 0.0f;
        for (int64_t i = 0; i < MOST; ++i) {
            const auto seed = [&] { return uint64_t{generator()} << 32 | generator(); };
            const uint64_t drawn[5] = {seed(), seed(), seed(), seed(), seed()};
            seeds.push_back({drawn[0], drawn[1], drawn[2], drawn[3], drawn[4]});
            lr_scale.push_back(1.0 - 0.1 * static_cast<double>(i));
            ema_weight.push_back(i % 2 ? 0.0 : 0.3);
        }
    }

    // Updates first .. first + n.
    LearnCall call(int64_t first, int64_t n) {
        LearnCall call = {};
        call.agent.actor = actor.weights(), call.agent.actor_adam = actor.adam();
        if (learns_q) {
            call.agent.ema_actor = ema_actor.weights();
            call.agent.critic = critic.weights(), call.agent.critic_adam = critic.adam();
            call.agent.critic_target = critic_target.weights();
            call.agent.steps = &steps;
            call.agent.discount = DISCOUNT, call.agent.eta = ETA, call.agent.tau = TAU;
            call.agent.candidates = candidates;
        }
        call.agent.loss = &loss;
        call.agent.max_action = MAX_ACTION;
        call.data = {states.data(), actions.data(), rewards.data(), next_states.data(), masks.data(), ROWS};
        call.rows = rows.data() + first * SIZES.B;
        call.B = SIZES.B, call.n = n;
        call.seeds = seeds.data() + first;
        call.lr_scale = lr_scale.data() + first, call.ema_weight = ema_weight.data() + first;
        call.metrics = metrics.data() + first * call.metrics_each();
        return call;
    }

    // As the tensors' counters do after a call.
    void count(const LearnCall& call) {
        const Learner& a = call.agent;
        actor.version = a.actor.version, ema_actor.version = a.ema_actor.version;
        critic.version = a.critic.version, critic_target.version = a.critic_target.version;
    }

    void learns(int64_t first, int64_t n, int threads) {
        std::vector<LearnCall> calls = {call(first, n)};
        learn(calls, threads);
        count(calls[0]);
    }

    Floats taken(const Floats& from, int64_t columns, int64_t i) const {
        Floats batch;
        for (int64_t b = 0; b < SIZES.B; ++b) {
            const auto at = from.begin() + rows[static_cast<size_t>(i * SIZES.B + b)] * columns;
            batch.insert(batch.end(), at, at + columns);
        }
        return batch;
    }

    Floats chain_of(Trained& of, const Floats& batch, int64_t N, uint64_t seed, SavedChain* saved) {
        Floats found(static_cast<size_t>(SIZES.B * N * SIZES.A), NOTHING);
        ChainCall call = {};
        call.packed = of.packed(saved ? FORWARD | BACKWARD : FORWARD);
        call.time_table = of.network->time_table(*call.packed, steps);
        call.table = &steps;
        call.states = batch.data();
        call.B = SIZES.B, call.N = N;
        call.seed = seed;
        call.max_action = MAX_ACTION;
        call.threads = 1;
        call.actions = found.data();
        chain(call, saved);
        return found;
    }

    // Update i by the engine's other functions.
    void by_hand(int64_t i) {
        const int64_t B = SIZES.B;
        const Floats s = taken(states, SIZES.S, i), a = taken(actions, SIZES.A, i), r = taken(rewards, 1, i);
        const Floats next = taken(next_states, SIZES.S, i), mask = taken(masks, 1, i);
        const UpdateSeeds& seed = seeds[static_cast<size_t>(i)];
        const double scale = lr_scale[static_cast<size_t>(i)], weight = ema_weight[static_cast<size_t>(i)];
        double* out = metrics.data() + i * (learns_q ? 8 : 2);
        if (learns_q) {
            const Floats next_actions = chain_of(ema_actor, next, candidates, seed.target, nullptr);
            Floats target(static_cast<size_t>(B), NOTHING);
            out[2] = target_q(*critic_target.packed(FORWARD), next.data(), B, next_actions.data(), candidates, r.data(),
                              mask.data(), DISCOUNT, target.data(), 1);
            const CriticLoss loss =
                critic_gradient(*critic.network, *critic.packed(FORWARD | BACKWARD), s.data(), a.data(), B,
                                target.data(), {critic.gradient.data(), false, nullptr}, 1);
            out[0] = loss.loss, out[1] = loss.q, out[3] = critic.stepped(scale);
            out += 4;
        }
        const std::shared_ptr<Packed> packed = actor.packed(FORWARD | BACKWARD);
        const std::shared_ptr<const Buffer> time_table = actor.network->time_table(*packed, loss);
        const double bc = bc_gradient(*actor.network, *packed, *time_table, loss, s.data(), a.data(), B, seed.bc_t,
                                      seed.bc_noise, true, {actor.gradient.data(), false, nullptr}, 1);
        if (!learns_q) {
            out[0] = bc, out[1] = actor.stepped(scale);
            return;
        }
        SavedChain saved;
        const Floats own = chain_of(actor, s, 1, seed.actor, &saved);
        Floats d_actions(own.size(), NOTHING);
        int32_t coin;
        kernels().integers(seed.coin, 0, 2, 0, 1, &coin);
        const QMeans means = q_gradient(*critic.packed(FORWARD | BACKWARD), coin ? 0 : 1, s.data(), own.data(), B,
                                        d_actions.data(), 1);
        chain_backward(*actor.network, saved, steps, s.data(), d_actions.data(),
                       static_cast<float>(-ETA / (static_cast<double>(B) * means.other)),
                       {actor.gradient.data(), true, nullptr}, 1);
        const double q_loss = -means.q / means.other;
        out[0] = bc + ETA * q_loss, out[1] = bc, out[2] = q_loss, out[3] = actor.stepped(scale);
        if (weight != 0.0) ema_actor.towards(actor, weight);
        critic_target.towards(critic, TAU);
    }
};

bool same(const Trained& a, const Trained& b) {
    return same_bits(a.net.flat, b.net.flat) && same_bits(a.gradient, b.gradient) && same_bits(a.exp_avg, b.exp_avg) &&
           same_bits(a.exp_avg_sq, b.exp_avg_sq) && same_bits(a.step, b.step) && a.version == b.version;
}

bool same(const Agent& a, const Agent& b) {
    return same(a.actor, b.actor) && (!a.learns_q || (same(a.critic, b.critic) && same(a.ema_actor, b.ema_actor) &&
                                                      same(a.critic_target, b.critic_target))) &&
           std::memcmp(a.metrics.data(), b.metrics.data(), a.metrics.size() * sizeof(double)) == 0;
}

int64_t updates_of(size_t m) { return MOST - static_cast<int64_t>(m) % 3; }

// The first `count` agents after their updates, by hand.
std::vector<Agent> expected(size_t count) {
    std::vector<Agent> agents;
    for (size_t m = 0; m < count; ++m) {
        agents.emplace_back(static_cast<uint32_t>(m));
        for (int64_t i = 0; i < updates_of(m); ++i) agents[m].by_hand(i);
    }
    return agents;
}

std::vector<Agent> new_agents(size_t count) {
    std::vector<Agent> agents;
    for (size_t m = 0; m < count; ++m) agents.emplace_back(static_cast<uint32_t>(m));
    return agents;
}

// In two calls, so that the second begins with what the first left packed.
void learn_all(std::vector<Agent>& agents, int threads) {
    for (const bool begun : {false, true}) {
        std::vector<LearnCall> calls;
        for (size_t m = 0; m < agents.size(); ++m)
            calls.push_back(begun ? agents[m].call(2, updates_of(m) - 2) : agents[m].call(0, 2));
        learn(calls, threads);
        for (size_t m = 0; m < agents.size(); ++m) agents[m].count(calls[m]);
    }
}

void as_one_by_one() {
    every_variant([](const std::string& variant) {
        const std::vector<Agent> want = expected(4);
        for (size_t count = 1; count <= 4; ++count)
            for (int threads = 1; threads <= 4; ++threads) {
                std::vector<Agent> agents = new_agents(count);
                learn_all(agents, threads);
                for (size_t m = 0; m < count; ++m)
                    if (!same(agents[m], want[m]))
                        check::fail(__FILE__, __LINE__, variant, ": agent ", m, " of ", count, " on ", threads,
                                    " threads is not as alone");
            }
    });
}

void strange_numbers_of_threads() {
    const std::vector<Agent> want = expected(3);
    for (const int threads : {-5, 0, 300}) {
        std::vector<Agent> agents = new_agents(3);
        learn_all(agents, threads);
        for (size_t m = 0; m < 3; ++m) CHECK(same(agents[m], want[m]));
    }
    std::vector<LearnCall> none;
    learn(none, 4);
}

// The data are the batch.
void a_batch_as_it_is() {
    for (const uint32_t m : {0u, 1u, 2u}) {
        Agent by_rows(m), given(m);
        by_rows.learns(0, 1, 1);
        std::vector<LearnCall> calls = {given.call(0, 1)};
        const Floats s = given.taken(given.states, SIZES.S, 0), a = given.taken(given.actions, SIZES.A, 0),
                     r = given.taken(given.rewards, 1, 0), next = given.taken(given.next_states, SIZES.S, 0),
                     mask = given.taken(given.masks, 1, 0);
        calls[0].data = {s.data(), a.data(), r.data(), next.data(), mask.data(), SIZES.B};
        calls[0].rows = nullptr;
        learn(calls, 2);
        given.count(calls[0]);
        CHECK(same(given, by_rows));
    }
}

// Whatever fails, learn() throws, and the pool serves the next call.
void failures() {
    for (const int threads : {1, 2, 4})
        for (const int64_t row : {int64_t{-1}, ROWS}) {
            std::vector<Agent> agents = new_agents(3);
            agents[1].rows[2 * SIZES.B - 1] = row;
            bool thrown = false;
            try {
                learn_all(agents, threads);
            } catch (const std::invalid_argument&) {
                thrown = true;
            }
            CHECK(thrown);
            CHECK(same(agents[0], Agent(0)));  // nothing was written
        }
    for (const int threads : {1, 2, 4}) {
        std::vector<Agent> agents = new_agents(3);
        std::mt19937 generator(1);
        Sizes other = SIZES;
        other.D = 20;
        agents[1].loss = make_table(other, generator, 100, false);
        bool thrown = false;
        try {
            learn_all(agents, threads);
        } catch (const std::invalid_argument&) {  // in the middle of the second agent's first update
            thrown = true;
        }
        CHECK(thrown);
        std::vector<Agent> next = new_agents(2);
        const std::vector<Agent> want = expected(2);
        learn_all(next, threads);
        for (size_t m = 0; m < 2; ++m) CHECK(same(next[m], want[m]));
    }
}

void a_pool_that_is_taken() {
    const std::vector<Agent> want = expected(3);
    std::atomic<bool> holding{false}, release{false};
    std::thread holder([&] {
        parallel_for(3, 3, [&](int64_t, int) {
            holding = true;
            while (!release) std::this_thread::yield();
        });
    });
    while (!holding) std::this_thread::yield();
    std::vector<Agent> agents = new_agents(3);
    learn_all(agents, 3);
    release = true;
    holder.join();
    for (size_t m = 0; m < 3; ++m) CHECK(same(agents[m], want[m]));
}

void several_callers() {
    const std::vector<Agent> want = expected(2);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller)
        callers.emplace_back([&] {
            std::vector<Agent> agents = new_agents(2);
            learn_all(agents, 2);
            for (size_t m = 0; m < 2; ++m) CHECK(same(agents[m], want[m]));
        });
    for (std::thread& caller : callers) caller.join();
}

#if !defined(__SANITIZE_THREAD__)

// A child has the networks that its parent's threads were packing, and no lock of theirs.
void a_fork_while_others_pack() {
    std::mt19937 generator(1);
    const Net net({64, 8, 512, 4, 1, 1, 1, MISH, 16}, false, generator);
    Network network(net.spec);
    std::atomic<bool> stop{false};
    std::thread packer([&] {
        for (int64_t version = 1; !stop; ++version) network.packed(net.flat.data(), version, FORWARD | BACKWARD);
    });
    for (int i = 0; i < 20; ++i) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(10);  // ends it
            network.packed(net.flat.data(), 0, FORWARD);
            _exit(0);
        }
        int status = 0;
        CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
        if (check::failures > 0) break;
    }
    stop = true;
    packer.join();
}

#endif

}  // namespace

int main() {
#if !defined(__SANITIZE_THREAD__)
    RUN(a_fork_while_others_pack);  // first: no thread of another test's is there
#endif
    RUN(as_one_by_one);
    RUN(strange_numbers_of_threads);
    RUN(a_batch_as_it_is);
    RUN(failures);
    RUN(a_pool_that_is_taken);
    RUN(several_callers);
    return check::report();
}
