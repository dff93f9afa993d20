// The Python module dql.kernels._native: the limited C API, addresses of tensors as integers, no torch.
//
// kernels/cpp/binding.py is its only caller and checks each tensor's size, dtype and contiguity; here the arguments'
// counts and kinds are, that addresses are some, and that networks, tables and saved chains belong together. Those three
// are capsules. The GIL is released while kernels run.
#include "binding.h"

namespace dql {

void check_chain(const NetworkHandle& network, const TableHandle& table) {
    if (network.spec().critic) throw std::invalid_argument("a denoiser was expected, and these are critics");
    if (table.steps.empty()) throw std::invalid_argument("this table has no steps: it is the loss's");
}

namespace {

// ---- the functions; `doc` names the arguments in order ----

PyObject* py_variants(PyObject*, PyObject* const*, Py_ssize_t) {
    return guarded([&]() -> PyObject* {
        PyObject* found = PyDict_New();
        if (!found) throw Failed();
        for (const Variant& variant : variants()) {
            PyObject* value = variant.kernels ? none() : PyUnicode_FromString(variant.reason.c_str());
            const int failed = value ? PyDict_SetItemString(found, variant.name, value) : -1;
            Py_XDECREF(value);
            if (failed) {
                Py_DECREF(found);
                throw Failed();
            }
        }
        return found;
    });
}

PyObject* py_force(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 1, "force");
        Py_ssize_t size = 0;
        const char* name = PyUnicode_AsUTF8AndSize(args.object(), &size);
        if (!name) throw Failed();
        force_variant(std::string(name, static_cast<size_t>(size)));
        return none();
    });
}

PyObject* py_in_use(PyObject*, PyObject* const*, Py_ssize_t) {
    return guarded([&] { return Py_BuildValue("(sN)", kernels().name, PyBool_FromLong(kernels().bf16)); });
}

PyObject* py_network(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 9, "network");
        Spec spec;
        spec.critic = args.integer() != 0;
        spec.S = static_cast<int>(args.integer());
        spec.A = static_cast<int>(args.integer());
        spec.D = static_cast<int>(args.integer());
        spec.H = static_cast<int>(args.integer());
        spec.L = static_cast<int>(args.integer());
        spec.activation = static_cast<int>(args.integer());
        spec.flat_size = args.count();
        PyObject* offsets = args.object();
        const Py_ssize_t size = PyTuple_Size(offsets);
        const Py_ssize_t expected = 2 * (spec.L + 1) * (spec.critic ? 2 : 1) + (spec.critic ? 0 : 4);
        if (size < 0) throw Failed();
        if (spec.L < 2 || spec.L > MAX_LAYERS || size != expected) throw std::invalid_argument("network: bad offsets");
        for (Py_ssize_t i = 0; i < size; ++i) {
            const long long offset = PyLong_AsLongLong(PyTuple_GetItem(offsets, i));
            if (PyErr_Occurred()) throw Failed();
            if (offset < 0 || offset >= spec.flat_size) throw std::invalid_argument("network: an offset beyond its end");
            spec.offsets.push_back(offset);
        }
        return capsule(std::make_unique<NetworkHandle>(std::move(spec)));
    });
}

PyObject* py_table(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 5, "table");
        static uint64_t next_id = 0;
        auto table = std::make_unique<TableHandle>();
        table->id = ++next_id;
        table->K = static_cast<int>(args.count());
        table->D = static_cast<int>(args.count());
        const float *steps = args.optional(), *embedding = args.pointer(), *q_sample = args.optional();
        if (steps) table->steps.assign(steps, steps + table->K * STEP_COLUMNS);
        table->embedding.assign(embedding, embedding + static_cast<int64_t>(table->K) * table->D);
        if (q_sample) table->q_sample.assign(q_sample, q_sample + table->K * 2);
        return capsule(std::move(table));
    });
}

PyObject* py_all_finite(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 2, "all_finite");
        const float* values = args.optional();
        const int64_t size = args.count();
        if (!values && size) throw std::invalid_argument(Arguments::NO_MEMORY);
        return PyBool_FromLong(kernels().all_finite(values, size));
    });
}

void check_critic(const NetworkHandle& network) {
    if (!network.spec().critic) throw std::invalid_argument("a critic was expected, and this is a denoiser");
}

// network, flat, version
std::shared_ptr<Packed> packed(Arguments& args, NetworkHandle& network, int parts) {
    const float* flat = args.pointer();
    return network.packed(flat, args.integer(), parts);
}

// states, B, actions, N: what critics are asked about
struct Rows {
    const float* states;
    int64_t B;
    const float* actions;
    int64_t N;
    explicit Rows(Arguments& args)
        : states(args.pointer()), B(args.count()), actions(args.pointer()), N(args.count()) {}
};

// network, flat, version, table, states, B, N, noise, seed, max_action, bf16, threads, actions
ChainCall chain_call(Arguments& args, int parts) {
    NetworkHandle& network = args.handle<NetworkHandle>();
    const float* flat = args.pointer();
    const int64_t version = args.integer();
    ChainCall call = {};
    const TableHandle& table = args.handle<TableHandle>();
    check_chain(network, table);
    call.table = &table;
    call.states = args.pointer();
    call.B = args.count();
    call.N = args.count();
    call.noise = args.optional();
    call.seed = args.seed();
    call.max_action = static_cast<float>(args.number());
    call.bf16 = args.integer() != 0;
    call.threads = static_cast<int>(args.integer());
    call.actions = args.pointer();
    call.packed = network.packed(flat, version, parts | (call.bf16 ? BF16 : 0));
    call.time_table = network.time_table(*call.packed, *call.table);
    return call;
}

PyObject* py_chain(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 13, "chain");
        const ChainCall call = chain_call(args, FORWARD);
        {
            WithoutGil released;
            chain(call, nullptr);
        }
        return none();
    });
}

PyObject* py_chain_saved(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 13, "chain_saved");
        const Spec& spec = Arguments(items, count, 13, "chain_saved").handle<NetworkHandle>().spec();
        const ChainCall call = chain_call(args, FORWARD | BACKWARD);
        auto saved = std::make_unique<SavedHandle>();
        {
            WithoutGil released;
            chain(call, saved.get());
        }
        saved->table = call.table->id;
        saved->offsets = spec.offsets;
        return capsule(std::move(saved));
    });
}

PyObject* py_chain_backward(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        Arguments args(items, count, 12, "chain_backward");
        NetworkHandle& network = args.handle<NetworkHandle>();
        SavedHandle& saved = args.handle<SavedHandle>();
        const Table& table = args.handle<TableHandle>();
        const float* states = args.pointer();
        const int64_t B = args.count();
        const float* d_actions = args.pointer();
        const int64_t R = args.count();
        if (saved.table != table.id || saved.offsets != network.spec().offsets || saved.B != B || saved.B * saved.N != R)
            throw std::invalid_argument("chain_backward: this was saved by another network, table or number of rows");
        const float d_scale = static_cast<float>(args.number());
        Gradients out = {};
        out.flat = args.optional();
        out.accumulate = args.integer() != 0;
        out.d_states = args.optional();
        const int threads = static_cast<int>(args.integer());
        if (saved.spent) return PyBool_FromLong(0);
        saved.spent = true;  // under the GIL: of two threads, one gets it
        {
            WithoutGil released;
            chain_backward(network, saved, table, states, d_actions, d_scale, out, threads);
        }
        return PyBool_FromLong(1);
    });
}

PyObject* py_select(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 17, "select");
        ChainCall call = chain_call(args, FORWARD);
        NetworkHandle& critic = args.handle<NetworkHandle>();
        check_critic(critic);
        const std::shared_ptr<Packed> weights = packed(args, critic, FORWARD);
        const uint64_t draw_seed = args.seed();
        {
            WithoutGil released;
            select(call, *weights, draw_seed, call.actions);
        }
        return none();
    });
}

PyObject* py_draw(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 18, "draw");
        ChainCall call = chain_call(args, FORWARD);
        NetworkHandle& critic = args.handle<NetworkHandle>();
        check_critic(critic);
        const std::shared_ptr<Packed> weights = packed(args, critic, FORWARD);
        const uint64_t draw_seed = args.seed();
        int64_t* index = reinterpret_cast<int64_t*>(args.pointer());
        {
            WithoutGil released;
            draw(call, *weights, draw_seed, index);
        }
        return none();
    });
}

PyObject* py_q_values(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 10, "q_values");
        NetworkHandle& critic = args.handle<NetworkHandle>();
        check_critic(critic);
        const std::shared_ptr<Packed> weights = packed(args, critic, FORWARD);
        const Rows rows(args);
        float *q1 = args.pointer(), *q2 = args.pointer();
        const int threads = static_cast<int>(args.integer());
        {
            WithoutGil released;
            q_values(*weights, rows.states, rows.B, rows.actions, rows.N, q1, q2, threads);
        }
        return none();
    });
}

PyObject* py_target_q(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 12, "target_q");
        NetworkHandle& critic = args.handle<NetworkHandle>();
        check_critic(critic);
        const std::shared_ptr<Packed> weights = packed(args, critic, FORWARD);
        const Rows rows(args);
        const float *rewards = args.pointer(), *masks = args.pointer();
        const float discount = static_cast<float>(args.number());
        float* out = args.pointer();
        const int threads = static_cast<int>(args.integer());
        double mean;
        {
            WithoutGil released;
            mean = target_q(*weights, rows.states, rows.B, rows.actions, rows.N, rewards, masks, discount, out,
                            threads);
        }
        return PyFloat_FromDouble(mean);
    });
}

PyObject* py_critic_gradient(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 9, "critic_gradient");
        NetworkHandle& critic = args.handle<NetworkHandle>();
        check_critic(critic);
        const std::shared_ptr<Packed> weights = packed(args, critic, FORWARD | BACKWARD);
        const float* states = args.pointer();
        const float* actions = args.pointer();
        const int64_t B = args.count();
        const float* target = args.pointer();
        const Gradients out = {args.pointer(), false, nullptr};
        const int threads = static_cast<int>(args.integer());
        CriticLoss loss;
        {
            WithoutGil released;
            loss = critic_gradient(critic, *weights, states, actions, B, target, out, threads);
        }
        return Py_BuildValue("(dd)", loss.loss, loss.q);
    });
}

PyObject* py_q_gradient(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 9, "q_gradient");
        NetworkHandle& critic = args.handle<NetworkHandle>();
        check_critic(critic);
        const std::shared_ptr<Packed> weights = packed(args, critic, FORWARD | BACKWARD);
        const long long which_one = args.integer();
        if (which_one != 0 && which_one != 1) throw std::invalid_argument("q_gradient: there are two critics, 0 and 1");
        const int which = static_cast<int>(which_one);
        const float* states = args.pointer();
        const float* actions = args.pointer();
        const int64_t B = args.count();
        float* d_actions = args.pointer();
        const int threads = static_cast<int>(args.integer());
        QMeans means;
        {
            WithoutGil released;
            means = q_gradient(*weights, which, states, actions, B, d_actions, threads);
        }
        return Py_BuildValue("(dd)", means.q, means.other);
    });
}

PyObject* py_bc_gradient(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 13, "bc_gradient");
        NetworkHandle& network = args.handle<NetworkHandle>();
        const std::shared_ptr<Packed> weights = packed(args, network, FORWARD | BACKWARD);
        const Table& table = args.handle<TableHandle>();
        if (network.spec().critic || table.q_sample.empty())
            throw std::invalid_argument("bc_gradient takes a denoiser, and the table of its loss");
        const float* states = args.pointer();
        const float* actions = args.pointer();
        const int64_t B = args.count();
        const uint64_t t_seed = args.seed(), noise_seed = args.seed();
        const bool predict_epsilon = args.integer() != 0;
        const Gradients out = {args.pointer(), args.integer() != 0, nullptr};
        const int threads = static_cast<int>(args.integer());
        const std::shared_ptr<const Buffer> time_table = network.time_table(*weights, table);
        double loss;
        {
            WithoutGil released;
            loss = bc_gradient(network, *weights, *time_table, table, states, actions, B, t_seed, noise_seed,
                               predict_epsilon, out, threads);
        }
        return PyFloat_FromDouble(loss);
    });
}

PyObject* py_adam(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 8, "adam");
        AdamState state = {};
        state.parameters = args.pointer();
        state.gradient = args.pointer();
        state.exp_avg = args.pointer();
        state.exp_avg_sq = args.pointer();
        state.size = args.count();
        const double lr = args.number();
        const int64_t step = args.integer();
        const double max_norm = args.number();
        double norm;
        {
            WithoutGil released;
            norm = adam_step(state, lr, step, max_norm);
        }
        return PyFloat_FromDouble(norm);
    });
}

PyObject* py_lerp(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 4, "lerp");
        float* target = args.pointer();
        const float* source = args.pointer();
        const int64_t size = args.count();
        const float weight = static_cast<float>(args.number());
        {
            WithoutGil released;
            kernels().lerp(target, source, size, weight);
        }
        return none();
    });
}

Weights weights(Arguments& args, bool critic) {
    Weights weights;
    NetworkHandle& network = args.handle<NetworkHandle>();
    if (network.spec().critic != critic) throw std::invalid_argument("learn: a critic stands in a denoiser's place");
    weights.net = &network;
    weights.flat = args.pointer();
    weights.version = args.integer();
    return weights;
}

Optimizer optimizer(Arguments& args) {
    Optimizer adam;
    adam.gradient = args.pointer();
    adam.exp_avg = args.pointer();
    adam.exp_avg_sq = args.pointer();
    adam.step = args.pointer();
    adam.lr = args.number();
    adam.max_norm = args.number();
    return adam;
}

constexpr int64_t MOST_ROWS = int64_t{1} << 30;  // kernels/limits.py

// What `learn` is told of one agent, a tuple in the order of `methods` below
LearnCall learn_call(PyObject* tuple) {
    const Py_ssize_t size = PyTuple_Size(tuple);
    if (size < 0) throw Failed();
    std::vector<PyObject*> items;
    for (Py_ssize_t i = 0; i < size; ++i) items.push_back(PyTuple_GetItem(tuple, i));
    const bool learns_q = size == 46;
    Arguments args(items.data(), size, learns_q ? 46 : 26, "learn");
    LearnCall call = {};
    Learner& agent = call.agent;
    agent.actor = weights(args, false);
    agent.actor_adam = optimizer(args);
    if (learns_q) {
        agent.ema_actor = weights(args, false);
        agent.critic = weights(args, true);
        agent.critic_adam = optimizer(args);
        agent.critic_target = weights(args, true);
        agent.discount = static_cast<float>(args.number());
        agent.eta = args.number();
        agent.tau = args.number();
        agent.candidates = args.count();
        const TableHandle& steps = args.handle<TableHandle>();
        check_chain(static_cast<NetworkHandle&>(*agent.actor.net), steps);
        agent.steps = &steps;
    }
    const TableHandle& loss = args.handle<TableHandle>();
    if (loss.q_sample.empty()) throw std::invalid_argument("learn: this table is not the loss's");
    agent.loss = &loss;
    agent.predict_epsilon = args.integer() != 0;
    agent.max_action = static_cast<float>(args.number());
    const auto same_sizes = [&](const Weights& other) {
        return !other.net || (other.net->spec().S == agent.actor.net->spec().S &&
                              other.net->spec().A == agent.actor.net->spec().A);
    };
    if (!same_sizes(agent.ema_actor) || !same_sizes(agent.critic) || !same_sizes(agent.critic_target))
        throw std::invalid_argument("learn: its networks are of other sizes of states and actions");
    call.data.states = args.pointer();
    call.data.actions = args.pointer();
    call.data.rewards = args.pointer();
    call.data.next_states = args.pointer();
    call.data.masks = args.pointer();
    call.data.size = args.count();
    call.rows = reinterpret_cast<const int64_t*>(args.optional());
    call.B = args.count();
    call.n = args.count();
    if (call.B < 1 || agent.candidates < 1 || (!call.rows && (call.n != 1 || call.data.size != call.B)))
        throw std::invalid_argument("learn: the rows are missing");
    if (call.B > MOST_ROWS / agent.candidates) throw std::invalid_argument("learn: more rows than a call takes");
    call.seeds = reinterpret_cast<const UpdateSeeds*>(args.pointer());
    call.lr_scale = reinterpret_cast<const double*>(args.pointer());
    call.ema_weight = reinterpret_cast<const double*>(args.pointer());
    call.metrics = reinterpret_cast<double*>(args.pointer());
    call.times = reinterpret_cast<int64_t*>(args.optional());
    return call;
}

PyObject* py_learn(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 2, "learn");
        PyObject* agents = args.object();
        const int threads = static_cast<int>(args.integer());
        const Py_ssize_t size = PyTuple_Size(agents);
        if (size < 0) throw Failed();
        std::vector<LearnCall> calls;
        for (Py_ssize_t i = 0; i < size; ++i) calls.push_back(learn_call(PyTuple_GetItem(agents, i)));
        {
            WithoutGil released;
            learn(calls, threads);
        }
        return none();
    });
}

// For tests: the activation and its slope, and the noise, as the kernels compute them.
PyObject* py_activate(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 4, "activate");
        const int kind = static_cast<int>(args.integer());
        float *z = args.pointer(), *slope = args.optional();
        kernels().activate(kind, z, slope, args.count());
        return none();
    });
}

PyObject* py_fma_ceiling(PyObject*, PyObject* const* items, Py_ssize_t count) {
    return guarded([&] {
        Arguments args(items, count, 2, "fma_ceiling");
        const double seconds = args.number();
        return PyFloat_FromDouble(kernels().fma_ceiling(seconds, args.integer() != 0));
    });
}

#define DQL_FUNCTION(name, doc) \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_##name)), METH_FASTCALL, doc}
#define DQL_CHAIN_DOC "network, flat, version, table, states, B, N, noise, seed, max_action, bf16, threads, actions"

PyMethodDef methods[] = {
    DQL_FUNCTION(variants, "-> {name: None or why this CPU cannot run it}, the fastest first"),
    DQL_FUNCTION(force, "name; '' undoes it"),
    DQL_FUNCTION(in_use, "-> (name, has bf16)"),
    DQL_FUNCTION(network, "is critic, S, A, D, H, L, activation, size of flat, offsets -> network"),
    DQL_FUNCTION(table, "K, D, steps [K, 6] or 0, embedding [K, D], q_sample [K, 2] or 0 -> table"),
    DQL_FUNCTION(all_finite, "values, count -> bool"),
    DQL_FUNCTION(use_exchange, "DLPack exchange API, a tensor, its address -> whether it is used"),
    DQL_FUNCTION(intact, "((dict, key, offset), ...), ((dict, key, object), ...), base -> bool"),
    DQL_FUNCTION(prepare, "network, table, flat tensor, places, held, max_action, bf16 -> prepared"),
    DQL_FUNCTION(run_prepared, "prepared, states, actions, seed, threads -> whether it ran"),
    DQL_FUNCTION(chain, DQL_CHAIN_DOC),
    DQL_FUNCTION(chain_saved, DQL_CHAIN_DOC " -> saved chain"),
    DQL_FUNCTION(chain_backward, "network, saved, table, states, B, d_actions, R, d_scale, d_flat or 0, "
                                 "accumulate, d_states or 0, threads -> whether saved was unused"),
    DQL_FUNCTION(select, DQL_CHAIN_DOC " [B, A], critic, flat, version, draw seed"),
    DQL_FUNCTION(draw, DQL_CHAIN_DOC " [B N, A], critic, flat, version, draw seed, index int64 [B]"),
    DQL_FUNCTION(q_values, "critic, flat, version, states, B, actions, N, q1, q2, threads"),
    DQL_FUNCTION(target_q, "critic, flat, version, states, B, actions, N, rewards, masks, discount, out, threads "
                           "-> mean"),
    DQL_FUNCTION(critic_gradient, "critic, flat, version, states, actions, B, target, d_flat, threads -> (loss, q)"),
    DQL_FUNCTION(q_gradient, "critic, flat, version, which, states, actions, B, d_actions, threads "
                             "-> (mean Q, mean |other Q|)"),
    DQL_FUNCTION(bc_gradient, "network, flat, version, table, states, actions, B, t seed, noise seed, "
                              "predict_epsilon, d_flat, accumulate, threads -> loss"),
    DQL_FUNCTION(adam, "parameters, gradient, exp_avg, exp_avg_sq, size, lr, step, max norm -> norm"),
    DQL_FUNCTION(lerp, "target, source, size, weight"),
    DQL_FUNCTION(learn, "a tuple of agents, threads. An agent: actor, flat, version; gradient, exp_avg, exp_avg_sq, step, "
                        "lr, max norm; [ema actor, flat, version; critic, flat, version; its optimizer; target critic, "
                        "flat, version; discount, eta, tau, candidates, table;] the loss's table, predict_epsilon, "
                        "max_action; states, actions, rewards, next_states, masks, size; rows [n, B] or 0, B, n; "
                        "seeds [n, 5], lr_scale [n], ema_weight [n], metrics [n, 8 or 2], the last three float64; "
                        "times int64 [n, 12] or 0"),
    DQL_FUNCTION(activate, "kind, z, slope or 0, size"),
    DQL_FUNCTION(fma_ceiling, "seconds, bf16 -> FLOP/s of a loop on registers"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "The native CPU kernels; see kernels/cpp/binding.py.", 0, methods, nullptr, nullptr,
    nullptr, nullptr};

}  // namespace
}  // namespace dql

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&dql::module); }
