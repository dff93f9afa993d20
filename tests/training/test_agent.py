"""Whole updates against the transcription, cadences and schedules by hand, and exact continuation."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import transcription
from support.agents import CONFIG, A, B, H, S, as_dict, hyper, initial_state, make_batch, networks, randomness
from support.cases import TOLERANCES, assert_close

import dql
from dql.agents.registry import make_agent
from dql.backend.eager import EagerBackend
from dql.schedule import NoiseSchedule
from dql.update import update_actor, update_critic

Tensor = torch.Tensor

VARIANTS = {
    "plain": {},
    "max_q_backup": {"max_q_backup": True, "backup_candidates": 4},
    "no clipping": {"grad_norm": 0.0, "T": 2, "beta_schedule": "linear"},
    "cosine, another bound": {"beta_schedule": "cosine", "max_action": 2.0, "discount": 0.9, "tau": 0.1},
    "large layers": {"hidden_dim": 256, "T": 3},  # 4,096 elements: the split Mish
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_updates_equal_the_transcription(variant):
    config = replace(CONFIG, **VARIANTS[variant])
    agent = dql.DiffusionQL(S, A, config, dtype=torch.float64)
    state, h, coins = initial_state(agent), hyper(config), set()
    for step in range(10):
        batch, random = make_batch(step), randomness(config, step)
        coins.add(random["coin"])
        metrics = agent.update(batch)
        state = transcription.update(state, as_dict(batch), random, h)
        case = f"{variant}, update {step}"
        want = state["metrics"] | {"target_q": state["metrics"]["target_q"].mean()}
        for name, key in {
            "critic/loss": "critic_loss",
            "critic/grad_norm": "critic_grad_norm",
            "critic/target_q": "target_q",
            "actor/loss": "actor_loss",
            "actor/bc_loss": "bc_loss",
            "actor/q_loss": "q_loss",
            "actor/grad_norm": "actor_grad_norm",
        }.items():
            expected = torch.as_tensor(want[key], dtype=torch.float64)
            assert_close(metrics[name], expected, TOLERANCES["agent float64"], what=name, case=case)
        for network, tensors in networks(agent).items():
            for name, tensor in tensors.items():
                assert_close(
                    tensor,
                    state[network][name],
                    TOLERANCES["agent float64"],
                    what=f"{network}.{name}",
                    case=case,
                )
    assert coins == {True, False}, "ten updates must see both sides of the coin; take another seed"
    assert agent.step == 10
    assert not torch.equal(agent.ema_policy.denoiser.flat, agent.policy.denoiser.flat)


def test_ten_updates_of_diffusion_bc_equal_the_transcription():
    agent = dql.DiffusionBC(S, A, CONFIG, dtype=torch.float64)
    state, h = initial_state(agent), hyper(CONFIG, grad_norm=0.0)  # it never clips
    for step in range(10):
        batch = make_batch(step)
        metrics = agent.update(batch)
        state = transcription.update_bc(state, as_dict(batch), randomness(CONFIG, step), h)
        for name, key in {"actor/bc_loss": "bc_loss", "actor/grad_norm": "actor_grad_norm"}.items():
            want = torch.tensor(state["metrics"][key], dtype=torch.float64)
            assert_close(metrics[name], want, TOLERANCES["agent float64"], what=name, case=f"update {step}")
        for name, tensor in networks(agent)["actor"].items():
            assert_close(tensor, state["actor"][name], TOLERANCES["agent float64"], what=name, case=f"update {step}")
    assert metrics.keys() == {"actor/bc_loss", "actor/grad_norm"}
    assert agent.config.algorithm == "diffusion-bc"
    assert not hasattr(agent, "critic")


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_follows_to_its_rounding(variant):
    """Adam divides by the gradient's size, so a gradient that is all rounding may move a weight by lr either way."""
    config = replace(CONFIG, **VARIANTS[variant])
    agent = dql.DiffusionQL(S, A, config)
    state, h = initial_state(agent), hyper(config)
    for step in range(10):
        metrics = agent.update(make_batch(step, torch.float32))
        state = transcription.update(state, as_dict(make_batch(step)), randomness(config, step), h)
        for name, key in {
            "critic/loss": "critic_loss",
            "actor/bc_loss": "bc_loss",
            "actor/q_loss": "q_loss",
        }.items():
            want = torch.tensor(state["metrics"][key], dtype=torch.float64)
            assert_close(metrics[name], want, TOLERANCES["agent float32"], what=name, case=f"{variant}, update {step}")
            assert metrics[name].dtype == torch.float32
    for network, tensors in networks(agent).items():
        errors = torch.cat([(t.double() - state[network][k]).abs().flatten() for k, t in tensors.items()])
        lr = config.critic_lr if network.startswith("critic") else config.lr
        assert float(errors.max()) <= 10 * 2 * lr, network
        assert float(errors.quantile(0.99)) <= 0.01 * lr, network


def test_the_metrics_by_hand():
    agent = dql.DiffusionQL(S, A, CONFIG, dtype=torch.float64)
    batch = make_batch(0)
    with torch.no_grad():
        q1, q2 = agent.critic(batch.states, batch.actions)
    metrics = agent.update(batch)
    assert metrics.keys() == {
        "critic/loss",
        "critic/q",
        "critic/target_q",
        "critic/grad_norm",
        "actor/loss",
        "actor/bc_loss",
        "actor/q_loss",
        "actor/grad_norm",
    }
    assert all(m.dim() == 0 and not m.requires_grad for m in metrics.values())
    assert float(metrics["critic/q"]) == pytest.approx(float(q1.mean() + q2.mean()) / 2, rel=1e-12)
    total = float(metrics["actor/bc_loss"] + CONFIG.eta * metrics["actor/q_loss"])
    assert float(metrics["actor/loss"]) == pytest.approx(total, rel=1e-12)


# Cadence


def test_the_average_starts_at_1000_and_moves_every_fifth_update():
    config = dql.Config(hidden_dim=H, batch_size=B)
    agent = dql.DiffusionQL(S, A, config, dtype=torch.float64)
    with torch.no_grad():
        agent.policy.denoiser.flat.mul_(1.5)  # apart from its average
    for step, moves in [
        (0, 0),
        (5, 0),
        (995, 0),
        (999, 0),
        (1000, 1),
        (1001, 0),
        (1004, 0),
        (1005, 1),
        (1006, 0),
    ]:
        before = agent.ema_policy.denoiser.flat.detach().clone()
        agent.step = step
        agent.update(make_batch(step))
        after, actor = agent.ema_policy.denoiser.flat.detach(), agent.policy.denoiser.flat.detach()
        want = 0.995 * before + 0.005 * actor if moves else before
        assert_close(after, want, TOLERANCES["agent float64"], what="ema_actor", case=f"step {step}")
        assert torch.equal(after, before) == (not moves), f"step {step}"


def test_the_targets_follow_every_update():
    agent = dql.DiffusionQL(S, A, replace(CONFIG, tau=0.25), dtype=torch.float64)
    for step in range(3):
        before = agent.critic_target.flat.detach().clone()
        agent.update(make_batch(step))
        want = 0.75 * before + 0.25 * agent.critic.flat.detach()
        assert_close(agent.critic_target.flat, want, TOLERANCES["agent float64"], what="critic_target", case=f"{step}")


def first_moments(agent) -> dict[str, float]:
    """The norm of the gradient that Adam saw in the first update: its first moment is a tenth of it."""
    adams = {name: o.tensors()["exp_avg"] for name, o in agent._optimizers().items()}
    return {name: 10 * float(moment.norm()) for name, moment in adams.items()}


@pytest.mark.parametrize("bound", [1e-3, 0.1, 1e6, 0.0])
def test_gradients_are_clipped(bound):
    agent = dql.DiffusionQL(S, A, replace(CONFIG, grad_norm=bound), dtype=torch.float64)
    metrics = agent.update(make_batch(0))
    for name, seen in first_moments(agent).items():
        norm = float(metrics[f"{name.removesuffix('_adam')}/grad_norm"])  # before clipping
        assert 0.1 < norm < 1e6
        want = norm * min(1.0, bound / (norm + 1e-6)) if bound else norm
        assert seen == pytest.approx(want, rel=1e-10), name


def test_diffusion_bc_never_clips():
    agent = dql.DiffusionBC(S, A, replace(CONFIG, grad_norm=1e-3), dtype=torch.float64)
    metrics = agent.update(make_batch(0))
    assert first_moments(agent)["actor_adam"] == pytest.approx(float(metrics["actor/grad_norm"]), rel=1e-10)


def test_cosine_by_hand():
    config = replace(CONFIG, lr_schedule="cosine", num_updates=100, lr=2e-3, critic_lr=4e-4)
    agent = dql.DiffusionQL(S, A, config, dtype=torch.float64)
    by_hand = {0: 1.0, 25: (2 + math.sqrt(2)) / 4, 50: 0.5, 75: (2 - math.sqrt(2)) / 4, 100: 0.0, 150: 0.0}
    for step, factor in by_hand.items():
        agent.step = step
        assert agent.lr_scale() == pytest.approx(factor, abs=1e-15)
        assert config.lr * factor == pytest.approx(transcription.cosine_lr(config.lr, min(step, 100), 100), abs=1e-15)
        before = networks(agent)
        agent.update(make_batch(0))
        assert agent.actor_adam.adam.param_groups[0]["lr"] == pytest.approx(2e-3 * factor, abs=1e-18)
        assert agent.critic_adam.adam.param_groups[0]["lr"] == pytest.approx(4e-4 * factor, abs=1e-18)
        moved = any(not torch.equal(networks(agent)["actor"][k], v) for k, v in before["actor"].items())
        assert moved == (factor > 0)
    constant = dql.DiffusionQL(S, A, CONFIG)
    constant.step = 10**6
    assert constant.lr_scale() == 1.0


# What gets a gradient


def test_the_actors_step_leaves_the_critic_alone():
    agent = dql.DiffusionQL(S, A, CONFIG, dtype=torch.float64)
    batch = make_batch(0)
    draws = agent.draws(len(batch.states))
    update_critic(agent, batch, draws, EagerBackend())
    values, gradient = agent.critic.flat.detach().clone(), agent.critic.flat.grad.clone()
    target = agent.critic_target.flat.detach().clone()
    update_actor(agent, batch, draws, EagerBackend())
    assert torch.equal(agent.critic.flat, values)
    assert torch.equal(agent.critic.flat.grad, gradient)
    assert torch.equal(agent.critic_target.flat, target)
    assert all(p.requires_grad for p in agent.critic.parameters())  # thawed again


def test_averages_never_require_grad():
    agent = dql.DiffusionQL(S, A, replace(CONFIG, ema_start=0, ema_every=1))
    for step in range(3):
        agent.update(make_batch(step, torch.float32))
    for module in (agent.ema_policy.denoiser, agent.critic_target):
        assert not any(p.requires_grad for p in module.parameters())
        assert not module.flat.grad.any()
    assert dql.sample(torch.zeros(2, S), agent.ema_policy, seed=0).grad_fn is None
    assert all(p.requires_grad for p in agent.policy.parameters())


def test_a_masked_row_does_not_bootstrap():
    agent = dql.DiffusionQL(S, A, CONFIG, dtype=torch.float64)
    batch = make_batch(0)
    y = agent.target_q(batch, seed=3)
    done = batch.masks == 0
    assert 0 < int(done.sum()) < B
    assert torch.equal(y[done], batch.rewards[done])
    assert not torch.isclose(y[~done], batch.rewards[~done]).any()


def test_rewards_as_a_column_are_refused():
    """[B, 1], as the published replay buffer has them, would broadcast to [B, B] without a word."""
    agent = dql.DiffusionQL(S, A, CONFIG, dtype=torch.float64)
    batch = make_batch(0)
    with pytest.raises(ValueError, match="rewards"):
        agent.update(replace(batch, rewards=batch.rewards[:, None], masks=batch.masks[:, None]))


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.float(), lambda m: m.to(torch.float32)])
def test_moving_a_network_does_not_stop_its_training(move):
    """.to() makes a fresh flat buffer: the optimizer must follow it, or say so."""
    agent = dql.DiffusionQL(S, A, CONFIG)
    move(agent.policy)
    before = agent.policy.denoiser.flat.detach().clone()
    try:
        agent.update(make_batch(0, torch.float32))
    except RuntimeError as error:
        assert "optimizer" in str(error)  # noqa: PT017 (either is right)
    else:
        assert not torch.equal(agent.policy.denoiser.flat, before)


# Randomness and files


def test_torchs_own_generator_is_untouched():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for kind in (dql.DiffusionQL, dql.DiffusionBC):
        agent = kind(S, A, CONFIG)
        for step in range(2):
            agent.update(make_batch(step, torch.float32))
        agent.act(torch.zeros(3, S), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_the_seed_alone_makes_the_agent():
    runs = []
    for seed, global_seed in ((5, 0), (5, 1), (6, 0)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            agent = dql.DiffusionQL(S, A, replace(CONFIG, seed=seed))
            for step in range(2):
                agent.update(make_batch(step, torch.float32))
        runs.append(agent.tensors())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["actor.final_layer.bias"], runs[2]["actor.final_layer.bias"])
    assert not torch.equal(runs[0]["critic.q1_model.0.bias"], runs[0]["critic.q2_model.0.bias"])


@pytest.mark.parametrize("algorithm", ["diffusion-ql", "diffusion-bc"])
def test_a_saved_agent_continues_bit_identically(tmp_path, algorithm):
    config = CONFIG.of(algorithm, lr_schedule="cosine", num_updates=20)
    agent = make_agent(S, A, config)
    assert type(agent) is (dql.DiffusionQL if algorithm == "diffusion-ql" else dql.DiffusionBC)
    for step in range(5):
        agent.update(make_batch(step, torch.float32))
    agent.save(tmp_path)
    loaded = dql.load(tmp_path)
    assert (type(loaded), loaded.config, loaded.step) == (type(agent), agent.config, 5)
    for who in (agent, loaded):
        for step in range(5, 10):
            metrics = who.update(make_batch(step, torch.float32))
        assert all(m.isfinite() for m in metrics.values())
    mine, theirs = agent.tensors(), loaded.tensors()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), f"{name} differs after the continuation"
    states = torch.randn(3, S)
    assert torch.equal(agent.act(states, seed=0), loaded.act(states, seed=0))
    if algorithm == "diffusion-ql":
        assert not any(p.requires_grad for p in loaded.critic_target.parameters())


def test_an_agent_saved_before_its_first_update(tmp_path):
    agent = dql.DiffusionQL(S, A, CONFIG)
    agent.save(tmp_path / "new")
    loaded = dql.load(tmp_path / "new")
    for who in (agent, loaded):
        who.update(make_batch(0, torch.float32))
    assert all(torch.equal(value, loaded.tensors()[name]) for name, value in agent.tensors().items())


def test_a_float64_agent_stays_one(tmp_path):
    agent = dql.DiffusionQL(S, A, CONFIG, dtype=torch.float64)
    agent.update(make_batch(0))
    agent.save(tmp_path)
    loaded = dql.load(tmp_path)
    for name, value in agent.tensors().items():
        assert loaded.tensors()[name].dtype == value.dtype, name
        assert torch.equal(loaded.tensors()[name], value), name


def test_loading_what_is_no_agent(tmp_path):
    with pytest.raises(dql.CheckpointError, match=r"agent\.safetensors does not exist; give the path"):
        dql.load(tmp_path)
    dql.DiffusionPolicy(S, A, hidden_dim=16).save(tmp_path / "agent.safetensors")
    with pytest.raises(dql.CheckpointError, match=r"no agent.*use DiffusionPolicy\.load"):
        dql.load(tmp_path)
    agent = dql.DiffusionQL(S, A, CONFIG)
    agent.save(tmp_path)
    path = tmp_path / "agent.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(dql.CheckpointError, match="damaged"):
        dql.load(tmp_path)


# Acting


@pytest.mark.parametrize("kind", [dql.DiffusionQL, dql.DiffusionBC])
def test_act(kind):
    agent = kind(S, A, replace(CONFIG, num_candidates=7))
    states = torch.randn(4, S, generator=torch.Generator().manual_seed(0))
    if kind is dql.DiffusionQL:
        with torch.no_grad():  # apart from what they are copied to
            agent.critic.flat.mul_(-4)
            agent.policy.denoiser.flat.mul_(2)
    got = agent.act(states, seed=3)
    if kind is dql.DiffusionQL:  # the published rule: the online actor, the target critic
        want = dql.select(states, agent.policy, agent.critic_target, num_candidates=7, seed=3)
        for other in ((agent.policy, agent.critic), (agent.ema_policy, agent.critic_target)):
            assert not torch.equal(want, dql.select(states, *other, num_candidates=7, seed=3))
    else:
        want = dql.sample(states, agent.policy, seed=3)
    assert torch.equal(got, want)
    assert got.grad_fn is None
    assert torch.equal(agent.act(states[0], seed=3), agent.act(states[:1], seed=3)[0])
    array = agent.act(states.double().numpy(), seed=3)
    assert isinstance(array, np.ndarray)
    assert array.shape == (4, A)
    np.testing.assert_array_equal(array, got.numpy())
    assert agent.act(states[0].numpy()).shape == (A,)
    with pytest.raises(ValueError, match="states hold 1 NaN"):
        agent.act(torch.where(torch.arange(S) == 2, torch.nan, states[0]))


# Configurations

TUNED = """
halfcheetah-medium-v2          3e-4 1.0   no  no          2000  9 1
hopper-medium-v2               3e-4 1.0   no  no          2000  9 2
walker2d-medium-v2             3e-4 1.0   no  no          2000  1 1
halfcheetah-medium-replay-v2   3e-4 1.0   no  no          2000  2 0
hopper-medium-replay-v2        3e-4 1.0   no  no          2000  4 2
walker2d-medium-replay-v2      3e-4 1.0   no  no          2000  4 1
halfcheetah-medium-expert-v2   3e-4 1.0   no  no          2000  7 0
hopper-medium-expert-v2        3e-4 1.0   no  no          2000  5 2
walker2d-medium-expert-v2      3e-4 1.0   no  no          2000  5 1
antmaze-umaze-v0               3e-4 0.5   no  cql_antmaze 1000  2 2
antmaze-umaze-diverse-v0       3e-4 2.0   yes cql_antmaze 1000  3 2
antmaze-medium-play-v0         1e-3 2.0   yes cql_antmaze 1000  2 1
antmaze-medium-diverse-v0      3e-4 3.0   yes cql_antmaze 1000  1 1
antmaze-large-play-v0          3e-4 4.5   yes cql_antmaze 1000 10 2
antmaze-large-diverse-v0       3e-4 3.5   yes cql_antmaze 1000  7 1
pen-human-v1                   3e-5 0.15  no  normalize   1000  7 2
pen-cloned-v1                  3e-5 0.1   no  normalize   1000  8 2
kitchen-complete-v0            3e-4 0.005 no  no           250  9 2
kitchen-partial-v0             3e-4 0.005 no  no          1000 10 2
kitchen-mixed-v0               3e-4 0.005 no  no          1000 10 0
"""


def test_the_20_tuned_tasks_are_the_published():
    rows = [line.split() for line in TUNED.strip().splitlines()]
    assert [row[0] for row in rows] == list(dql.TUNED)
    assert len(rows) == 20
    for task, lr, eta, backup, tune, epochs, norm, top_k in rows:
        t, config = dql.TUNED[task], dql.Config.tuned(task)
        tune = "none" if tune == "no" else tune
        want = (float(lr), float(eta), backup == "yes", tune, int(epochs), float(norm), int(top_k))
        assert (t.lr, t.eta, t.max_q_backup, t.reward_tune, t.epochs, t.grad_norm, t.top_k) == want, task
        assert (config.lr, config.eta, config.max_q_backup, config.reward_tune, config.grad_norm) == (
            *want[:4],
            want[5],
        ), task
        assert config.num_updates == int(epochs) * 1000, task
        assert (config.critic_lr, config.lr_schedule, config.batch_size) == (3e-4, "constant", 256), task


def test_config_by_name_and_file():
    assert dql.Config.tuned("hopper-medium-v2", seed=4).seed == 4
    with pytest.raises(ValueError, match="no tuned hyper-parameters for 'hopper'; known: halfcheetah-medium-v2, "):
        dql.Config.tuned("hopper")
    for config in (dql.Config(), CONFIG, dql.Config.tuned("pen-human-v1")):
        assert dql.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown Config field 'lerning_rate'; written by another version"):
        dql.Config.from_dict({"lerning_rate": 1})


def test_the_defaults_are_the_papers():
    c = dql.Config()
    assert (c.T, c.beta_schedule, c.hidden_dim, c.num_hidden, c.activation) == (5, "vp", 256, 3, "mish")
    assert (c.discount, c.tau, c.ema_decay, c.ema_every, c.ema_start) == (0.99, 0.005, 0.995, 5, 1000)
    assert (c.batch_size, c.num_candidates, c.backup_candidates, c.lr, c.critic_lr) == (
        256,
        50,
        10,
        3e-4,
        3e-4,
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"T": 0}, "T must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"lr": 0.0}, r"lr must be positive, got 0\.0"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"max_action": -1.0}, r"max_action must be positive, got -1\.0"),
        ({"discount": 1.1}, r"discount must be from 0 to 1, got 1\.1"),
        ({"tau": -0.1}, r"tau must be from 0 to 1, got -0\.1"),
        ({"ema_decay": 2.0}, r"ema_decay must be from 0 to 1, got 2\.0"),
        ({"eta": -1.0}, r"eta must not be negative, got -1\.0"),
        ({"grad_norm": -1.0}, r"grad_norm must not be negative, got -1\.0"),
        ({"seed": -1}, r"seed must be from 0 to 2\^64 - 1, got -1"),
        ({"seed": 1 << 64}, r"seed must be from 0 to 2\^64 - 1"),
        ({"activation": "gelu"}, "activation"),
        ({"beta_schedule": "x"}, "beta"),
        ({"lr_schedule": "linear"}, "lr_schedule"),
        ({"algorithm": "td3"}, "algorithm"),
        ({"reward_tune": "twice"}, "reward_tune"),
    ],
)
def test_bad_configs(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dql.Config(**changes)


def test_a_batch_that_does_not_fit_is_refused():
    agent = dql.DiffusionQL(3, 2, dql.Config(hidden_dim=16))
    good = {
        "states": torch.zeros(4, 3),
        "actions": torch.zeros(4, 2),
        "rewards": torch.zeros(4),
        "next_states": torch.zeros(4, 3),
        "masks": torch.ones(4),
    }
    before = agent.critic.flat.detach().clone()
    for name, bad, words in (
        ("next_states", torch.zeros(1, 3), r"batch\.next_states must be \[4, 3\], got \[1, 3\]"),
        ("actions", torch.zeros(4, 1), r"batch\.actions must be \[4, 2\], got \[4, 1\]"),
        ("states", torch.zeros(4, 3, dtype=torch.float64), r"batch\.states is torch\.float64 .* torch\.float32"),
    ):
        with pytest.raises(ValueError, match=words):
            agent.update(dql.Batch(**(good | {name: bad})))
    with pytest.raises(TypeError, match=r"batch must be a dql\.Batch, got dict"):
        agent.update(good)
    assert torch.equal(agent.critic.flat, before), "a refused batch must not have trained anything"
    with torch.no_grad():
        agent.update(dql.Batch(**good))  # it asks for gradients itself
    assert not torch.equal(agent.critic.flat, before)


def test_a_batch_with_a_graph_is_data():
    agent = dql.DiffusionQL(3, 2, dql.Config(hidden_dim=16))
    other = dql.DiffusionPolicy(3, 2, hidden_dim=16)
    states = torch.zeros(4, 3)
    actions = dql.sample(states, other)
    for _ in range(2):
        agent.update(dql.Batch(states, actions, torch.zeros(4), states, torch.ones(4)))
    assert other.denoiser.flat.grad.abs().sum() == 0


def test_an_unknown_backend_is_refused_at_once():
    with pytest.raises(ValueError, match="unknown backend 'tritn'"):
        dql.DiffusionQL(3, 2, dql.Config(backend="tritn"))


@pytest.mark.parametrize("algorithm", ["diffusion-ql", "diffusion-bc", "td3-bc", "iql", "bc"])
def test_a_network_in_anothers_place_is_refused(algorithm):
    """Its optimizer would have gone on with the one before: metrics that look well, and nothing is learnt."""
    agent = make_agent(S, A, CONFIG.of(algorithm), dtype=torch.float64)
    agent.update(make_batch(0))
    at, name = (agent.policy, "denoiser") if hasattr(agent, "policy") else (agent, "actor")
    setattr(at, name, deepcopy(getattr(at, name)))
    with pytest.raises(RuntimeError, match="the agent's actor was replaced"):
        agent.update(make_batch(1))
    assert agent.step == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("schedule", NoiseSchedule("linear", 3)), ("max_action", 0.25), ("predict_epsilon", False)],
    ids=["schedule", "max_action", "predict_epsilon"],
)
@pytest.mark.parametrize("policy", ["policy", "ema_policy"])
def test_actors_of_two_kinds_are_the_same_in_native_code(policy, name, value, runs_here):
    """The native update has one table for both chains: where each has its own, it is another path's."""
    runs_here("cpp")
    found = {}
    for backend in ("eager", "cpp"):
        agent = dql.DiffusionQL(S, A, replace(CONFIG, backend=backend))
        setattr(getattr(agent, policy), name, value)
        batch = make_batch(0)
        batch = dql.Batch(*(tensor.float() for tensor in vars(batch).values()))
        found[backend] = agent.update(batch)
    for metric in ("critic/target_q", "actor/q_loss", "actor/bc_loss"):
        torch.testing.assert_close(found["cpp"][metric], found["eager"][metric], rtol=1e-4, atol=1e-5, msg=metric)
