"""The baselines: ten whole updates against the transcription, exact continuation, what they take and refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import baselines as bl
from support.agents import CONFIG, A, B, S, as_dict, hyper, initial_state, make_batch, networks, randomness
from support.cases import TOLERANCES, Tolerance, assert_close
from support.runs import quietly

import dql
from dql import noise
from dql.agents.base import Agent
from dql.agents.registry import ALGORITHMS, load, make_agent
from dql.config import DIFFUSION, Config, RunConfig
from dql.data import load_dataset
from dql.rundir import RunDir, RunError, read_rows
from dql.train import OtherSettingsError, complete, default_run_dir, resume, train

BASELINES = [name for name in ALGORITHMS if name not in DIFFUSION]
SMALL = {"hidden_dim": 24, "batch_size": B, "seed": 5, "lr": 1e-3}
SINGLE = Tolerance(1e-6, 1e-6, "float32 keeps 7 digits")
MAX = 2.0  # of actions: a factor that was forgotten shows


def small(algorithm: str, **changes) -> Config:
    return Config(algorithm=algorithm, max_action=MAX, **SMALL | changes)


def parts(agent: Agent) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {k: v.detach().clone() for k, v in m.state_dict().items()} for name, m in agent.modules().items()}


def batch_of(step: int) -> dql.Batch:
    batch = make_batch(step)
    return replace(batch, actions=MAX * batch.actions)


def compare(agent: Agent, metrics: dict, state: dict, names: dict[str, str], step: int) -> None:
    case = f"{agent.algorithm}, update {step}"
    for name, key in names.items():
        want = torch.as_tensor(state["metrics"][key], dtype=torch.float64)
        assert_close(metrics[name], want.mean(), TOLERANCES["agent float64"], what=name, case=case)
    for network, tensors in parts(agent).items():
        for name, tensor in tensors.items():
            want = state[network][name]
            assert_close(tensor, want, TOLERANCES["agent float64"], what=f"{network}.{name}", case=case)


@pytest.mark.parametrize("algorithm", ["bc", "bc-gaussian"])
def test_ten_updates_of_behaviour_cloning_equal_the_transcription(algorithm):
    agent = make_agent(S, A, small(algorithm), dtype=torch.float64)
    state = bl.initial_state(parts(agent)["actor"])
    update = {"bc": bl.update_bc, "bc-gaussian": bl.update_bc_gaussian}[algorithm]
    for step in range(10):
        metrics = agent.update(batch_of(step))
        state = update(state, as_dict(batch_of(step)), bl.BCHyper(max_action=MAX, lr=1e-3))
        compare(agent, metrics, state, {"actor/bc_loss": "bc_loss", "actor/grad_norm": "actor_grad_norm"}, step)


@pytest.mark.parametrize("changes", [{}, {"policy_delay": 3, "alpha": 0.7, "policy_noise": 0.8, "noise_clip": 0.3}])
def test_ten_updates_of_td3_bc_equal_the_transcription(changes):
    config = small("td3-bc", tau=0.1, discount=0.9, critic_lr=2e-3, **changes)
    agent = make_agent(S, A, config, dtype=torch.float64)
    data = 3 + 2 * torch.randn(100, S, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data[:, 1] = 7.0  # a column that never changes
    agent.standardize(data)
    mean, std = torch.from_numpy(data.numpy().mean(0)), torch.from_numpy(data.numpy().std(0))
    p = parts(agent)
    state = bl.initial_state(p["actor"], p["critic"], actor_target=True)
    fields = {name: getattr(config, name) for name in bl.TD3BCHyper.__dataclass_fields__ if hasattr(config, name)}
    for step in range(10):
        batch = replace(batch_of(step), states=data[:B] + step, next_states=data[B : 2 * B] - step)
        metrics = agent.update(batch)
        seed = noise.derive(config.seed, "target", step)
        random = {"target_noise": noise.normal(seed, 1, B, A, dtype=torch.float64)[0]}
        state = bl.update_td3_bc(state, as_dict(batch), random, bl.TD3BCHyper(**fields), mean, std)
        names = {"critic/loss": "critic_loss", "critic/target_q": "target_q", "critic/grad_norm": "critic_grad_norm"}
        moves = (step + 1) % config.policy_delay == 0
        if moves:
            names |= {"actor/loss": "actor_loss", "actor/bc_loss": "bc_loss"}
            q_loss = state["metrics"]["q_loss"] / config.alpha
            assert float(metrics["actor/q_loss"]) == pytest.approx(q_loss, rel=1e-10)
        compare(agent, metrics, state, names, step)


@pytest.mark.parametrize("changes", [{}, {"expectile": 0.9, "temperature": 30.0, "advantage_clip": 2.0}])
def test_ten_updates_of_iql_equal_the_transcription(changes):
    config = small("iql", tau=0.1, discount=0.9, critic_lr=2e-3, num_updates=15, **changes)
    agent = make_agent(S, A, config, dtype=torch.float64)
    p = parts(agent)
    state = bl.initial_state(p["actor"], p["critic"], p["value"])
    h = bl.IQLHyper(
        MAX, 0.9, 0.1, config.expectile, config.temperature, config.advantage_clip, 1e-3, 2e-3, 2e-3, num_updates=15
    )
    clipped = 0
    for step in range(10):
        metrics = agent.update(batch_of(step))
        state = bl.update_iql(state, as_dict(batch_of(step)), h)
        clipped += int((state["metrics"]["weights"] == config.advantage_clip).sum())
        names = {f"{n}/{k}": f"{n}_{k}" for n in ("value", "actor", "critic") for k in ("loss", "grad_norm")}
        compare(agent, metrics, state, names | {"critic/target_q": "target_q"}, step)
    assert not changes or clipped, "no weight was clipped; take a higher temperature"


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("changes", [{}, {"beta_schedule": "linear", "T": 3, "eta": 5.0, "max_q_backup": True}])
def test_ten_updates_with_the_one_step_action_equal_edps_formula(backend, changes, runs_here):
    config = replace(CONFIG, actor_gradient="one-step", backend=backend, **changes)
    dtype = torch.float64 if backend == "eager" else torch.float32
    runs_here(backend)
    agent = dql.DiffusionQL(S, A, config, dtype=dtype)
    state, h = initial_state(agent), hyper(config)
    for step in range(10):
        metrics = agent.update(make_batch(step, dtype))
        state = bl.update_edp(state, as_dict(make_batch(step)), randomness(config, step), h)
        tolerance = TOLERANCES["agent float64" if backend == "eager" else "agent float32"]
        for name, key in {"actor/bc_loss": "bc_loss", "actor/q_loss": "q_loss", "critic/loss": "critic_loss"}.items():
            want = torch.as_tensor(state["metrics"][key], dtype=torch.float64)
            assert_close(metrics[name], want, tolerance, what=name, case=f"{backend}, update {step}")
        if backend == "eager":
            for network, tensors in networks(agent).items():
                for name, tensor in tensors.items():
                    assert_close(tensor, state[network][name], tolerance, what=f"{network}.{name}", case=f"{step}")


# What the loop, files and evaluation ask of every agent


@pytest.fixture
def run_config(pendulum, tmp_path):
    return lambda algorithm, **changes: RunConfig(
        pendulum,
        Config(algorithm=algorithm, hidden_dim=16, batch_size=16, num_updates=25),
        **{
            "run_dir": tmp_path / f"{algorithm}",
            "device": "cpu",
            "log_every": 10,
            "checkpoint_every": 10,
            "eval_every": 25,
            "eval_episodes": 1,
        }
        | changes,
    )


@pytest.mark.parametrize("algorithm", BASELINES)
def test_a_run(algorithm, run_config):
    run = run_config(algorithm)
    result, _ = quietly(train, run)
    folder = RunDir(run.run_dir)
    assert folder.steps() == [10, 20, 25] and type(result.agent) is ALGORITHMS[algorithm]
    ((step, evaluation),) = result.evaluations
    assert step == 25 and evaluation.lengths.tolist() == [200]
    agent = load(run.run_dir, "best")
    for name, tensor in result.agent.tensors().items():
        assert torch.equal(agent.tensors()[name], tensor), name
    states = load_dataset(run.dataset).states[:40]
    actions = agent.act(states, seed=3)
    assert actions.shape == (40, 1) and float(actions.abs().max()) <= 2.0
    assert torch.equal(actions, agent.act(states, seed=3))
    np.testing.assert_array_equal(agent.act(states[0].numpy(), seed=3), agent.act(states[:1], seed=3)[0].numpy())
    drawn = not torch.equal(actions, agent.act(states, seed=4))
    assert drawn == (algorithm == "bc-gaussian")
    assert not folder.policy_path.exists()


@pytest.mark.parametrize("algorithm", BASELINES)
def test_a_saved_agent_continues_bit_identically(algorithm, tmp_path):
    agent = make_agent(S, A, small(algorithm, num_updates=20))
    for step in range(5):
        agent.update(make_batch(step, torch.float32))
    agent.save(tmp_path)
    again = load(tmp_path)
    for step in range(5, 10):
        for one in (agent, again):
            one.update(make_batch(step, torch.float32))
    for name, tensor in agent.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name


def test_td3_bc_standardises_by_its_dataset(run_config):
    run = run_config("td3-bc")
    result, _ = quietly(train, run)
    states = load_dataset(run.dataset).states.double()
    assert_close(load(run.run_dir).state_mean.double(), states.mean(0), SINGLE, what="mean", case="dataset")
    assert_close(
        result.agent.state_std.double(), states.std(0, correction=0) + 1e-3, SINGLE, what="std", case="dataset"
    )


def test_every_column_of_metrics_is_documented(run_config):
    import re

    for algorithm in BASELINES:
        run = run_config(algorithm, eval_every=0)
        quietly(train, run)
        columns = set(read_rows(run.run_dir / "metrics.csv")[0]) - {"step", "seconds", "updates_per_second"}
        assert columns == set(re.findall(r"`(\w+/\w+)`", ALGORITHMS[algorithm].update.__doc__)), algorithm


def test_an_evaluation_at_the_start(run_config):
    run = run_config("bc", eval_at_start=True, eval_every=10)
    result, said = quietly(train, run)
    rows = read_rows(run.run_dir / "evaluations.csv")
    assert [row["step"] for row in rows] == [0, 10, 20, 25]
    assert np.isnan(rows[0]["bc_loss"]) and not np.isnan(rows[1]["bc_loss"])
    assert "update 0: return" in said and len(result.evaluations) == 4
    assert set(RunDir(run.run_dir).selection().values()) <= {10, 20, 25}, "the untrained agent is not selected"


@pytest.mark.parametrize("algorithm", BASELINES)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("actor.net.0.weight"), "actor.net.0.weight is missing"),
        (lambda t: t.__setitem__("actor.net.0.weight", torch.zeros(3, 3)), r"actor.net.0.weight is \[3, 3\]"),
        (lambda t: t["actor.net.2.bias"].fill_(float("nan")), "parameter 'net.2.bias' of the agent's actor holds NaN"),
        (lambda t: t.__setitem__("actor.log_more", torch.zeros(1)), "log_more"),
        (lambda t: t.__setitem__("other.flat", torch.zeros(1)), "it has 'other.flat', which an agent of .* has not"),
        (lambda t: t.__setitem__("actor", torch.zeros(1)), "it has 'actor', which"),
        (lambda t: t.__setitem__("actor.net.4.bias", t["actor.net.4.bias"].double()), "net.4.bias is torch.float64"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(algorithm, change, sentence, tmp_path):
    agent = make_agent(S, A, small(algorithm, **{"policy_delay": 1} if algorithm == "td3-bc" else {}))
    agent.update(make_batch(0, torch.float32))
    tensors = {name: tensor.clone() for name, tensor in agent.tensors().items()}
    change(tensors)
    agent.tensors = lambda: tensors
    agent.save(tmp_path)
    with pytest.raises(dql.CheckpointError, match=sentence):
        load(tmp_path)


@pytest.mark.parametrize("algorithm", BASELINES)
def test_sizes_of_a_file_take_no_memory_before_they_are_believed(algorithm, tmp_path):
    agent = make_agent(S, A, small(algorithm))
    for field, value in (("hidden_dim", 60_000), ("num_hidden", 10**9)):
        object.__setattr__(agent.config, field, value)
        agent.save(tmp_path)
        with pytest.raises(dql.CheckpointError, match=r"by the sizes that it names|hidden layers are more"):
            load(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("std", 1e-300), ("mean", 1e300)])
def test_standardisation_in_a_file_is_checked(tmp_path, name, value):
    agent = make_agent(S, A, small("td3-bc"))
    setattr(agent, f"state_{name}", torch.full((S,), value, dtype=torch.float64))  # as float32 it is 0 or infinite
    agent.save(tmp_path)
    with pytest.raises(dql.CheckpointError, match="not finite, or a deviation not positive"):
        load(tmp_path)
    setattr(agent, f"state_{name}", torch.full((S,), {"std": 0.0, "mean": float("inf")}[name]))
    agent.save(tmp_path)
    with pytest.raises(dql.CheckpointError, match="not finite, or a deviation not positive"):
        load(tmp_path)


@pytest.mark.parametrize("updates", [(0, 0), (2, 0), (2, 2)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_a_cast_agent_saves_is_read(algorithm, updates, tmp_path):
    """Adam's state and the standardisation may still be as they were before."""
    agent = make_agent(S, A, small(algorithm))
    for step in range(updates[0]):
        agent.update(make_batch(step, torch.float32))
    for module in agent.modules().values():
        module.double()
    for step in range(updates[1]):
        agent.update(make_batch(step))
    agent.save(tmp_path)
    read = load(tmp_path)
    assert read.dtype == torch.float64 and read.step == sum(updates)
    for each in (agent, read):
        each.update(make_batch(7))
    for network, tensors in parts(agent).items():
        for name, tensor in tensors.items():
            assert torch.equal(parts(read)[network][name], tensor), f"{network}.{name}"


def test_networks_of_two_dtypes_are_not_saved(tmp_path):
    agent = make_agent(S, A, small("iql"))
    agent.critic.double()
    with pytest.raises(ValueError, match=r"its critic is torch\.float64, and its actor torch\.float32; convert"):
        agent.save(tmp_path)


def test_a_file_with_another_algorithms_name_is_refused(tmp_path):
    """Its networks may fit: TD3+BC's actor is BC's, and sees other states."""
    for of, named in (("td3-bc", "bc"), ("diffusion-ql", "diffusion-bc")):
        agent = make_agent(S, A, small(of))
        agent.config = small(named)
        agent.save(tmp_path)
        with pytest.raises(dql.CheckpointError, match=f"which an agent of {named} has not"):
            load(tmp_path)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_adams_state_may_not_be_missing(algorithm, tmp_path):
    """An agent that went on without it would learn something else, and say nothing."""
    agent = make_agent(S, A, small(algorithm))
    agent.update(make_batch(0, torch.float32))
    agent.save(tmp_path)
    assert load(tmp_path).step == 1  # TD3+BC's actor has taken no step, and has none
    agent.update(make_batch(1, torch.float32))
    tensors = {name: tensor.clone() for name, tensor in agent.tensors().items()}
    for prefix in agent._optimizers():
        agent.tensors = lambda lost=prefix: {n: t for n, t in tensors.items() if not n.startswith(f"{lost}.")}
        agent.save(tmp_path)
        with pytest.raises(dql.CheckpointError, match=f"Adam's state of {prefix} is missing"):
            load(tmp_path)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_actions_that_are_nan_are_no_actions(algorithm):
    agent = make_agent(S, A, small(algorithm))
    with torch.no_grad():
        [*agent.modules()["actor"].parameters()][-1].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        agent.act(np.zeros((2, S)))
    with pytest.raises(ValueError, match="seed must be an integer from 0"):
        agent.act(np.zeros((2, S)), seed=-1)


@pytest.mark.parametrize("algorithm", ["bc", "bc-gaussian"])
def test_states_beyond_the_networks_range_are_refused(algorithm):
    agent = make_agent(S, A, small(algorithm))
    with torch.no_grad():
        agent.actor.flat.mul_(1e20)  # finite, but infinity less infinity is NaN
    with pytest.raises(ValueError, match=r"left the range of torch\.float32: states or parameters are too large"):
        agent.act(np.full((1, S), 1e20))


def test_what_only_diffusion_agents_can_says_so(tmp_path):
    agent = dql.IQL(S, A)
    with pytest.raises(ValueError, match="an agent of iql has no diffusion policy"):
        agent.save_policy(tmp_path / "policy.safetensors")
    with pytest.raises(ValueError, match="can be recorded, none of IQL; call its own"):
        dql.GraphedUpdate(agent, 8)


@pytest.mark.parametrize("algorithm", BASELINES)
def test_bad_states_and_batches_are_refused(algorithm):
    agent = make_agent(S, A, small(algorithm))
    for states, sentence in (
        (torch.zeros(2, S + 1), rf"states must be \[B, {S}\]"),
        (torch.zeros(2, S, dtype=torch.float64), "states are torch.float64"),
        (torch.tensor([[0.0] * S, [float("nan")] * S]), "the first at row 1, column 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            agent.act(states)
    batch = make_batch(0, torch.float32)
    with pytest.raises(ValueError, match=r"batch\.rewards must be"):
        agent.update(replace(batch, rewards=batch.rewards[:, None]))
    assert agent.step == 0


def test_an_update_that_is_interrupted_leaves_the_agent_whole():
    agent = make_agent(S, A, small("td3-bc", policy_delay=1))
    step, agent.actor_adam.step = agent.actor_adam.step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        agent.update(make_batch(0, torch.float32))
    agent.actor_adam.step = step
    agent.update(make_batch(0, torch.float32))
    assert all(p.requires_grad for p in agent.critic.parameters())


def test_the_last_flag_counts_in_defaults_too(run_config):
    """--algorithm bc --algorithm iql is IQL with its cosine."""
    from dql.cli import main

    run = run_config("iql")
    flags = ["--algorithm", "bc", "--algorithm=iql", "--hidden-dim", "16", "--batch-size", "16", "--num-updates", "2"]
    assert main(["train", "--dataset", run.dataset, *flags, "--eval-every", "0", "--run-dir", str(run.run_dir)]) == 0
    agent = RunConfig.from_dict(RunDir(run.run_dir).read_config()["run"]).agent
    assert (agent.algorithm, agent.lr_schedule, agent.num_hidden) == ("iql", "cosine", 2)


def test_a_complete_run_is_completed(run_config):
    """Once: then it is read. What a kill took after the last checkpoint is made up for; other data are refused."""
    run = run_config("diffusion-ql", eval_every=0)
    agent, stopped = complete(run)
    assert agent.step == 25 and stopped is None
    folder = RunDir(run.run_dir)
    folder.policy_path.unlink()
    complete(run)
    assert folder.policy_path.exists()
    before = folder.checkpoint_path(25).stat().st_mtime_ns
    assert complete(run)[0].step == 25 and folder.checkpoint_path(25).stat().st_mtime_ns == before
    with pytest.raises(OtherSettingsError, match=r"other settings \(agent\)"):
        complete(run.with_agent(eta=2.0))
    written = folder.read_config()
    written["dataset"]["fingerprint"] = "another"
    folder.write_json("config.json", written)
    with pytest.raises(RunError, match="is not the one this run began with"):
        complete(run)


def test_a_config_of_another_algorithm_is_refused():
    for cls, algorithm in ((dql.TD3BC, "diffusion-ql"), (dql.IQL, "td3-bc"), (dql.DiffusionQL, "iql")):
        with pytest.raises(ValueError, match=f"the config is of {algorithm}"):
            cls(S, A, Config(algorithm=algorithm))
    assert dql.DiffusionBC(S, A, Config()).config.algorithm == "diffusion-bc"  # the networks are the same
    assert (dql.TD3BC(S, A).config.num_hidden, dql.IQL(S, A).config.activation) == (2, "relu")


def test_what_only_a_reverse_chain_has_is_refused(tmp_path, run_config, capsys):
    make_agent(S, A, small("td3-bc")).save(tmp_path)
    with pytest.raises(ValueError, match="an agent of td3-bc, which has no reverse chain"):
        load(tmp_path, backend="eager")
    from dql.cli import main

    assert main(["export", str(tmp_path)]) == 1
    assert "an agent of td3-bc: dql export writes the reverse chain of diffusion-ql" in capsys.readouterr().err
    assert main(["train", "--tuned", "hopper-medium-v2", "--algorithm", "iql", "--dataset", "x"]) == 1
    assert "--tuned has hyper-parameters of diffusion-ql and diffusion-bc alone" in capsys.readouterr().err
    with pytest.raises(RunError, match="--graphed records an update of diffusion-ql or diffusion-bc"):
        quietly(train, run_config("iql", graphed=True))


def test_a_complete_run_is_told_what_can_be_done(run_config):
    for algorithm, says in (("bc", "(it is complete: --num-updates N lengthens it)"), ("iql", "(it is complete)")):
        run = replace(run_config(algorithm, eval_every=0), run_dir=run_config("bc").run_dir / algorithm)
        quietly(train, run)
        _, said = quietly(resume, run.run_dir)
        assert says in said, algorithm
    with pytest.raises(RunError, match="begin a new run, of that length or with --lr-schedule constant"):
        resume(run.run_dir, num_updates=99)


def test_run_folders_are_named_for_what_differs():
    names = {default_run_dir(RunConfig("a/b-v0", Config(algorithm=algorithm))).name for algorithm in ALGORITHMS} | {
        default_run_dir(RunConfig("a/b-v0", Config(actor_gradient="one-step"))).name
    }
    assert len(names) == len(ALGORITHMS) + 1
    assert "a-b-v0-diffusion-ql-one-step-seed0" in names


def test_iql_starts_orthogonal():
    agent = make_agent(S, A, Config(algorithm="iql", hidden_dim=32), dtype=torch.float64)
    square = agent.actor.net[2].weight.detach()
    assert_close(square @ square.T, 2 * torch.eye(32, dtype=torch.float64), SINGLE, what="W W^T", case="iql")
    assert not agent.actor.net[2].bias.any() and not agent.actor.log_std.any()
