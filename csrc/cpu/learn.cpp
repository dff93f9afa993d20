// Whole updates of agents: each what `dql.update_native` says, in the order of the paper's algorithm 1. An agent's
// updates depend on nothing but that agent and its rows, so several agents run side by side, a core each.
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <stdexcept>

#include "engine.h"
#include "pool.h"

namespace dql {
namespace {

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

struct Batch {
    const float *states, *actions, *rewards, *next_states, *masks;
};

// The rows of one update, in one piece of memory.
Batch gather(const Transitions& data, const int64_t* rows, int64_t B, int64_t S, int64_t A, float* at) {
    const auto take = [&](const float* from, int64_t columns) {
        float* taken = at;
        for (int64_t b = 0; b < B; ++b)
            std::memcpy(at + b * columns, from + rows[b] * columns, sizeof(float) * static_cast<size_t>(columns));
        at += B * columns;
        return taken;
    };
    return {take(data.states, S), take(data.actions, A), take(data.rewards, 1), take(data.next_states, S),
            take(data.masks, 1)};
}

class Update {
public:
    Update(LearnCall& call, int threads)
        : call_(call), agent_(call.agent), threads_(threads), S_(agent_.actor.net->spec().S),
          A_(agent_.actor.net->spec().A), rows_(call.rows ? call.B * (2 * S_ + A_ + 2) : 0) {}

    void run(int64_t i) {
        if (call_.times) time_ = call_.times + i * LearnCall::TIMES;
        const Transitions& d = call_.data;
        ended();
        const Batch batch = call_.rows ? gather(d, call_.rows + i * call_.B, call_.B, S_, A_, rows_.data())
                                       : Batch{d.states, d.actions, d.rewards, d.next_states, d.masks};
        ended();
        const UpdateSeeds& seeds = call_.seeds[i];
        const double lr_scale = call_.lr_scale[i];
        double* metrics = call_.metrics + i * call_.metrics_each();
        if (!agent_.learns_q()) {
            metrics[0] = bc(batch, seeds);
            metrics[1] = step(agent_.actor, agent_.actor_adam, lr_scale);
            ended();
            return;
        }
        critic(batch, seeds, metrics);
        metrics[3] = step(agent_.critic, agent_.critic_adam, lr_scale);
        ended();
        actor(batch, seeds, metrics + 4);
        metrics[7] = step(agent_.actor, agent_.actor_adam, lr_scale);
        ended();
        if (call_.ema_weight[i] != 0.0) average(agent_.ema_actor, agent_.actor, call_.ema_weight[i]);
        average(agent_.critic_target, agent_.critic, agent_.tau);
        ended();
    }

private:
    // A phase has, and now the next one begins.
    void ended() {
        if (time_) *time_++ = std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
    }

    static std::shared_ptr<Packed> packed(const Weights& weights, int parts) {
        return weights.net->packed(weights.flat, weights.version, parts);
    }

    void chain(const Weights& weights, const float* states, int64_t N, uint64_t seed, float* actions,
               SavedChain* saved) const {
        ChainCall chain = {};
        chain.table = agent_.steps;
        chain.states = states;
        chain.B = call_.B, chain.N = N;
        chain.seed = seed;
        chain.max_action = agent_.max_action;
        chain.threads = threads_;
        chain.actions = actions;
        chain.packed = packed(weights, saved ? FORWARD | BACKWARD : FORWARD);
        chain.time_table = weights.net->time_table(*chain.packed, *chain.table);
        dql::chain(chain, saved);
    }

    // The gradient of the critics' loss; loss, mean Q, mean target
    void critic(const Batch& batch, const UpdateSeeds& seeds, double* metrics) {
        const int64_t B = call_.B, N = agent_.candidates;
        const Buffer memory(B * N * A_ + B);
        float *next_actions = memory.data(), *target = memory.data() + B * N * A_;
        chain(agent_.ema_actor, batch.next_states, N, seeds.target, next_actions, nullptr);
        ended();
        metrics[2] = target_q(*packed(agent_.critic_target, FORWARD), batch.next_states, B, next_actions, N,
                              batch.rewards, batch.masks, agent_.discount, target, threads_);
        ended();
        const CriticLoss loss =
            critic_gradient(*agent_.critic.net, *packed(agent_.critic, FORWARD | BACKWARD), batch.states, batch.actions,
                            B, target, {agent_.critic_adam.gradient, false, nullptr}, threads_);
        metrics[0] = loss.loss, metrics[1] = loss.q;
        ended();
    }

    // The gradient of the noise-prediction loss, which it returns
    double bc(const Batch& batch, const UpdateSeeds& seeds) {
        const Weights& actor = agent_.actor;
        const std::shared_ptr<Packed> weights = packed(actor, FORWARD | BACKWARD);
        const std::shared_ptr<const Buffer> time_table = actor.net->time_table(*weights, *agent_.loss);
        const double loss = bc_gradient(*actor.net, *weights, *time_table, *agent_.loss, batch.states, batch.actions,
                                        call_.B, seeds.bc_t, seeds.bc_noise, agent_.predict_epsilon,
                                        {agent_.actor_adam.gradient, false, nullptr}, threads_);
        ended();
        return loss;
    }

    // The gradient of the actor's loss; that loss, its two terms
    void actor(const Batch& batch, const UpdateSeeds& seeds, double* metrics) {
        const int64_t B = call_.B;
        const double bc_loss = bc(batch, seeds);
        const Buffer memory(2 * B * A_);
        float *actions = memory.data(), *d_actions = memory.data() + B * A_;
        SavedChain saved;
        chain(agent_.actor, batch.states, 1, seeds.actor, actions, &saved);
        ended();
        int32_t coin;
        kernels().integers(seeds.coin, 0, 2, 0, 1, &coin);
        const QMeans means = q_gradient(*packed(agent_.critic, FORWARD | BACKWARD), coin ? 0 : 1, batch.states, actions,
                                        B, d_actions, threads_);
        ended();
        const double scale = means.other != 0.0 ? -agent_.eta / (static_cast<double>(B) * means.other) : NOT_A_NUMBER;
        chain_backward(*agent_.actor.net, saved, *agent_.steps, batch.states, d_actions, static_cast<float>(scale),
                       {agent_.actor_adam.gradient, true, nullptr}, threads_);
        ended();
        const double q_loss = means.other != 0.0 ? -means.q / means.other : NOT_A_NUMBER;
        metrics[0] = bc_loss + agent_.eta * q_loss, metrics[1] = bc_loss, metrics[2] = q_loss;
    }

    static double step(Weights& weights, Optimizer& adam, double lr_scale) {
        *adam.step += 1.0f;
        const double norm =
            adam_step({weights.flat, adam.gradient, adam.exp_avg, adam.exp_avg_sq, weights.net->spec().flat_size},
                      adam.lr * lr_scale, static_cast<int64_t>(*adam.step), adam.max_norm);
        ++weights.version;
        return norm;
    }

    static void average(Weights& target, const Weights& source, double weight) {
        kernels().lerp(target.flat, source.flat, source.net->spec().flat_size, static_cast<float>(weight));
        ++target.version;
    }

    LearnCall& call_;
    Learner& agent_;
    const int threads_;
    const int64_t S_, A_;
    const Buffer rows_;
    int64_t* time_ = nullptr;
};

void check(const LearnCall& call) {
    if (!call.rows) return;
    for (int64_t i = 0; i < call.n * call.B; ++i)
        if (call.rows[i] < 0 || call.rows[i] >= call.data.size)
            throw std::invalid_argument("learn: a row beyond the end of the data");
}

// Who has run which updates of several agents. A thread takes the free agent that has the most left, for one update at
// a time: whatever the numbers of agents, updates and threads are, no order would end sooner.
class Queue {
public:
    explicit Queue(std::vector<LearnCall>& calls) : calls_(calls), done_(calls.size(), 0), busy_(calls.size(), false) {}

    void work() noexcept {
        for (int64_t mine = -1; (mine = next(mine)) >= 0;) {
            const size_t m = static_cast<size_t>(mine);
            try {
                Update(calls_[m], 1).run(done_[m]);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex_);
                if (!error_) error_ = std::current_exception();
            }
        }
    }

    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

private:
    // Gives back the agent that was `mine`, and takes one; -1 if none is left for this thread.
    int64_t next(int64_t mine) noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (mine >= 0) {
            busy_[static_cast<size_t>(mine)] = false;
            ++done_[static_cast<size_t>(mine)];
        }
        if (error_) return -1;
        int64_t best = -1, most = 0;
        for (size_t m = 0; m < calls_.size(); ++m)
            if (const int64_t left = calls_[m].n - done_[m]; !busy_[m] && left > most)
                best = static_cast<int64_t>(m), most = left;
        if (best >= 0) busy_[static_cast<size_t>(best)] = true;
        return best;
    }

    std::vector<LearnCall>& calls_;
    std::mutex mutex_;
    std::vector<int64_t> done_;
    std::vector<bool> busy_;
    std::exception_ptr error_;
};

}  // namespace

void learn(std::vector<LearnCall>& calls, int threads) {
    for (const LearnCall& call : calls) check(call);
    const int64_t agents = static_cast<int64_t>(calls.size());
    if (agents > 1 && threads > 1 && 2 * agents >= threads) {
        Queue queue(calls);
        const int workers = static_cast<int>(agents < threads ? agents : threads);
        parallel_for(workers, workers, [&](int64_t, int) { queue.work(); });
        return queue.rethrow();
    }
    for (LearnCall& call : calls) {
        Update update(call, threads);
        for (int64_t i = 0; i < call.n; ++i) update.run(i);
    }
}

}  // namespace dql
