"""The training loop: what it writes, what it refuses before it begins, and how it ends when a loss does."""

import io
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.data_files import d4rl_file

import dql
from dql import progress
from dql.agents.diffusion import DiffusionBC, DiffusionQL
from dql.agents.registry import load
from dql.checkpoint import load_tensors
from dql.config import Config, RunConfig
from dql.data import DatasetError, load_dataset
from dql.rundir import RunDir, RunError, find_checkpoint, read_rows
from dql.train import TrainingDivergedError, default_run_dir, resume, train


@pytest.fixture
def run_config(pendulum, tmp_path):
    agent = Config(hidden_dim=16, num_hidden=2, batch_size=16, num_updates=25, num_candidates=2, ema_start=4)
    return RunConfig(
        pendulum, agent, run_dir=tmp_path / "run", device="cpu", log_every=10, checkpoint_every=10, eval_every=0
    )


def train_quietly(run, **options):
    said = io.StringIO()
    return train(run, console=Console(file=said, width=200), **options), said.getvalue()


def test_what_a_run_writes(run_config):
    result, _ = train_quietly(run_config)
    folder = RunDir(run_config.run_dir)
    assert (result.path, result.step, result.stopped_by, result.evaluations) == (run_config.run_dir, 25, None, [])
    assert result.seconds > 0
    assert sorted(p.name for p in run_config.run_dir.iterdir()) == [
        ".lock", "checkpoints", "config.json", "metrics.csv", "policy.safetensors"]  # fmt: skip
    assert folder.steps() == [10, 20, 25]
    written = folder.read_config()
    assert RunConfig.from_dict(written["run"]) == run_config.with_agent(max_action=2.0)
    assert (written["dataset"]["transitions"], written["dataset"]["state_dim"]) == (1200, 3)
    assert written["versions"]["torch"] == torch.__version__
    assert written["threads"] == torch.get_num_threads()


def test_max_action_is_the_datasets(run_config):
    result, _ = train_quietly(run_config)
    assert result.agent.policy.max_action == 2.0
    assert load(find_checkpoint(run_config.run_dir)).policy.max_action == 2.0


def test_the_policy_loads_and_samples(run_config):
    result, _ = train_quietly(run_config)
    policy = dql.DiffusionPolicy.load(run_config.run_dir / "policy.safetensors")
    states = load_dataset(run_config.dataset).states[:50]
    actions = dql.sample(states, policy, seed=3)
    assert actions.shape == (50, 1)
    assert actions.abs().max() <= 2.0
    assert torch.equal(actions, dql.sample(states, result.agent.policy, seed=3))


def test_checkpoints_hold_the_agent(run_config):
    result, _ = train_quietly(run_config)
    agent = load(find_checkpoint(run_config.run_dir, "25"))
    assert isinstance(agent, DiffusionQL)
    assert agent.step == 25
    for name, tensor in result.agent.tensors().items():
        assert torch.equal(agent.tensors()[name], tensor), name
    earlier = load(find_checkpoint(run_config.run_dir, "10"))
    assert earlier.step == 10
    assert not torch.equal(earlier.policy.denoiser.flat, agent.policy.denoiser.flat)


def test_metrics_are_means_since_the_line_before(run_config):
    """Against an agent that is updated by hand on the same draws."""
    train_quietly(run_config)
    data = load_dataset(run_config.dataset)
    config = replace(run_config.agent, max_action=2.0)
    agent = DiffusionQL(3, 1, config)
    single = [agent.update(data.sample(config.batch_size, config.seed, step)) for step in range(25)]
    rows = read_rows(run_config.run_dir / "metrics.csv")
    assert [row["step"] for row in rows] == [10, 20, 25]
    assert list(rows[0]) == ["step", "seconds", "updates_per_second", *single[0]]
    for row, span in zip(rows, (slice(0, 10), slice(10, 20), slice(20, 25)), strict=True):
        for name in single[0]:
            values = [float(metrics[name]) for metrics in single[span]]
            assert row[name] == pytest.approx(sum(values) / len(values), rel=1e-6, abs=1e-9), name
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert all(row["updates_per_second"] > 0 for row in rows)


def test_every_column_of_metrics_is_documented(run_config):
    """Where `update` says what it returns."""
    for algorithm, cls in (("diffusion-ql", DiffusionQL), ("diffusion-bc", DiffusionBC)):
        run = replace(run_config.with_agent(algorithm=algorithm), run_dir=run_config.run_dir / algorithm)
        train_quietly(run)
        columns = set(read_rows(run.run_dir / "metrics.csv")[0]) - {"step", "seconds", "updates_per_second"}
        documented = set(re.findall(r"`(\w+/\w+)`", cls.update.__doc__))
        assert columns == documented


def test_diffusion_bc(run_config):
    run = replace(run_config.with_agent(algorithm="diffusion-bc"), eval_every=25, eval_episodes=1)
    result, _ = train_quietly(run)
    assert type(result.agent) is DiffusionBC
    assert type(load(find_checkpoint(run.run_dir, "best"))) is DiffusionBC
    tensors, about = load_tensors(find_checkpoint(run.run_dir) / "agent.safetensors")
    assert about["config"]["algorithm"] == "diffusion-bc"
    assert not any("critic" in name for name in tensors)
    ((step, evaluation),) = result.evaluations
    assert step == 25
    assert evaluation.lengths.tolist() == [200]


def test_evaluations_on_the_way_and_at_the_end(run_config):
    run = replace(run_config, eval_every=10, eval_episodes=2)
    result, said = train_quietly(run)
    rows = read_rows(run.run_dir / "evaluations.csv")
    assert [row["step"] for row in rows] == [10, 20, 25] == [step for step, _ in result.evaluations]
    info = load_dataset(run.dataset).info
    for row, (step, evaluation) in zip(rows, result.evaluations, strict=True):
        assert row["return_mean"] == evaluation.return_mean
        assert row["normalized_score"] == pytest.approx(float(info.normalized_score(row["return_mean"])))
        assert row["episodes"] == 2
        assert row["return_low"] <= row["return_mean"] <= row["return_high"] < 0
        assert f"update {step}: return {evaluation.return_mean:.1f}" in said
    # bc_loss is the mean since the evaluation before: here as in the metrics of the same spans.
    losses = [row["actor/bc_loss"] for row in read_rows(run.run_dir / "metrics.csv")]
    assert [row["bc_loss"] for row in rows] == pytest.approx(losses)


def test_evaluating_does_not_change_what_is_learnt(run_config, tmp_path):
    without, _ = train_quietly(run_config)
    with_evaluations, _ = train_quietly(
        replace(run_config, run_dir=tmp_path / "other", eval_every=5, eval_episodes=1, checkpoint_every=3, log_every=7)
    )
    for name, tensor in without.agent.tensors().items():
        assert torch.equal(with_evaluations.agent.tensors()[name], tensor), name


def test_seeds(run_config, tmp_path):
    first, _ = train_quietly(run_config)
    again, _ = train_quietly(replace(run_config, run_dir=tmp_path / "again"))
    other, _ = train_quietly(replace(run_config.with_agent(seed=1), run_dir=tmp_path / "other"))
    assert torch.equal(first.agent.policy.denoiser.flat, again.agent.policy.denoiser.flat)
    assert not torch.equal(first.agent.policy.denoiser.flat, other.agent.policy.denoiser.flat)


def test_reward_tune_reaches_the_learner(run_config, tmp_path):
    raw, _ = train_quietly(run_config)
    tuned, _ = train_quietly(replace(run_config.with_agent(reward_tune="normalize"), run_dir=tmp_path / "tuned"))
    assert not torch.equal(raw.agent.critic.flat, tuned.agent.critic.flat)
    assert resume(tmp_path / "tuned", console=Console(file=io.StringIO())).step == 25


def test_default_run_dirs():
    for dataset, name in {
        "dql/pendulum/mixed-v0": "dql-pendulum-mixed-v0",
        "a/b-v0+c/d-v0": "a-b-v0-c-d-v0",
        "/somewhere/hopper_medium-v2.hdf5": "hopper-medium-v2",
    }.items():
        assert default_run_dir(RunConfig(dataset, Config(seed=3))) == Path("runs") / f"{name}-diffusion-ql-seed3"


# What cannot work is found before training.
def assert_not_begun(run):
    assert not (run.run_dir / "metrics.csv").exists()
    assert not (run.run_dir / "config.json").exists(), "the folder can be used again"


def test_without_an_environment(run_config, tmp_path):
    """A D4RL file of an unknown task names none: refused with --eval-every, trained without."""
    d4rl_file(tmp_path / "mine.hdf5", 40, terminals=(19, 39), next_observations=True)
    run = replace(run_config, dataset=str(tmp_path / "mine.hdf5"))
    with pytest.raises(RunError, match="--env, or train without evaluations, --eval-every 0"):
        train_quietly(replace(run, eval_every=10))
    assert_not_begun(run)
    result, _ = train_quietly(run)
    assert result.step == 25
    assert find_checkpoint(run.run_dir) == RunDir(run.run_dir).checkpoint_path(25)
    assert not (run.run_dir / "evaluations.csv").exists()


def test_an_unknown_environment(run_config):
    run = replace(run_config, env="NoSuch-v0", eval_every=10)
    with pytest.raises(DatasetError, match=r"NoSuch-v0.*is not known to Gymnasium"):
        train_quietly(run)
    assert_not_begun(run)


def test_an_environment_of_other_spaces(run_config):
    run = replace(run_config, env="MountainCarContinuous-v0", eval_every=10)
    with pytest.raises(DatasetError, match=r"2 observations a step but dataset .* has 3"):
        train_quietly(run)
    assert_not_begun(run)


def test_mujoco_is_missing(run_config, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == "mujoco" or m.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mujoco", None)  # what Python does where a package is absent
    run = replace(run_config, env="Hopper-v5", eval_every=10)
    with pytest.raises(DatasetError, match=r"needs mujoco .*pip install \"diffusion-ql\[mujoco\]\""):
        train_quietly(run)
    assert_not_begun(run)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "nonsense"])
def test_a_device_that_is_not_there(device, run_config):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    run = replace(run_config, device=device)
    with pytest.raises(ValueError, match=rf"device '{device}' cannot be used \(.*\); use .*--device cpu") as caught:
        train_quietly(run)
    assert "\n" not in str(caught.value)
    assert_not_begun(run)


def test_a_graph_needs_a_gpu(run_config):
    run = replace(run_config, graphed=True)
    with pytest.raises(RunError, match="--graphed records a CUDA graph, and this run is on cpu; leave it out or use"):
        train_quietly(run)
    assert_not_begun(run)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
def test_a_graphed_run_is_as_the_other(run_config, tmp_path):
    runs = [replace(run_config, device="cuda", graphed=g, run_dir=tmp_path / f"graphed-{g}") for g in (True, False)]
    for run in runs:
        train_quietly(run)
    got, want = (read_rows(run.run_dir / "metrics.csv") for run in runs)
    assert [row["step"] for row in got] == [row["step"] for row in want] == [10, 20, 25]
    for name in ("critic/loss", "actor/bc_loss", "actor/q_loss"):
        assert [row[name] for row in got] == pytest.approx([row[name] for row in want], rel=1e-3)


def test_a_backend_that_is_not_there(run_config):
    with pytest.raises(ValueError, match="unknown backend 'magic'"):
        train_quietly(run_config.with_agent(backend="magic"))


# Divergence.
def test_a_diverging_run_stops_and_its_checkpoint_is_good(run_config):
    """The critic's numbers are beyond float32 soon after its learning rate became absurd."""
    train_quietly(run_config)
    folder = RunDir(run_config.run_dir)
    before = {p: p.read_bytes() for p in folder.checkpoints_path.rglob("*") if p.is_file()}
    written = folder.read_config()
    # An absurd rate from update 25 on: what a resumed run takes from its checkpoint.
    path = folder.checkpoint_path(25) / "agent.safetensors"
    agent = load(path.parent)
    agent.config = replace(agent.config, critic_lr=1e30)
    agent.save(path.parent)
    folder.save_loop(25, folder.read_loop(25))  # which says with which agent it was saved
    before |= {p: p.read_bytes() for p in path.parent.iterdir()}
    written["run"]["agent"]["critic_lr"] = 1e30
    folder.write_json("config.json", written)
    with pytest.raises(TrainingDivergedError) as caught:
        resume(run_config.run_dir, num_updates=60, console=Console(file=io.StringIO()))
    text = str(caught.value)
    assert re.match(r"critic/\w+ became NaN or infinite before update \d+; ", text)
    assert f"the last good checkpoint is {folder.checkpoint_path(25)}" in text
    assert "--lr" in text
    assert "\n" not in text
    assert {p: p.read_bytes() for p in folder.checkpoints_path.rglob("*") if p.is_file()} == before
    assert all(tensor.isfinite().all() for tensor in load(folder.checkpoint_path(25)).tensors().values())
    assert not (run_config.run_dir / "policy.safetensors").exists() or load_tensors(folder.policy_path)


def test_divergence_before_any_checkpoint(run_config):
    run = run_config.with_agent(critic_lr=1e30)
    with pytest.raises(TrainingDivergedError, match=r"update 10; none (was|is) saved"):
        train_quietly(run)
    assert RunDir(run.run_dir).steps() == []


def test_no_checkpoint_of_a_diverged_agent(run_config):
    """Checkpoints fall due before the next line of metrics: what is not finite is not saved all the same."""
    run = replace(run_config.with_agent(critic_lr=1e30), log_every=1000, checkpoint_every=1, keep=100)
    with pytest.raises(TrainingDivergedError):
        train_quietly(run)
    folder = RunDir(run.run_dir)
    for step in folder.steps():
        for name, tensor in load(folder.checkpoint_path(step)).tensors().items():
            assert tensor.isfinite().all(), (step, name)


def test_a_diverged_agent_is_not_evaluated(run_config):
    """An evaluation falls due before the next line of metrics: no return of it is written or printed."""
    run = replace(run_config.with_agent(lr=1e30), log_every=1000, checkpoint_every=1000, eval_every=20, eval_episodes=1)
    with pytest.raises(TrainingDivergedError):
        train_quietly(run)
    assert read_rows(run.run_dir / "evaluations.csv") == []


# Progress.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def test_progress_without_a_terminal(run_config):
    _, said = train_quietly(replace(run_config, eval_every=20, eval_episodes=1))
    assert CONTROL.search(said) is None
    assert re.search(r"^25/25  [\d.]+ updates/s  0 s left  bc [\d.]+  q_loss \S+  critic \S+  target \S+$", said, re.M)


def test_progress_is_spoken_now_and_then(run_config, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY", 0.0)
    _, said = train_quietly(run_config)
    assert [line.split("/")[0] for line in said.splitlines()] == ["10", "20", "25"]


def test_progress_on_a_terminal(run_config):
    said = io.StringIO()
    train(run_config, console=Console(file=said, force_terminal=True, width=140))
    text = said.getvalue()
    assert "25/25" in text
    assert re.search(r"[0-9]/s", text)
    assert re.search(r"critic \S+", text)
    assert "\x1b[" in text


def test_training_in_another_thread(run_config):
    """Signals are the main thread's: elsewhere the loop leaves them alone."""
    import threading

    results = []
    thread = threading.Thread(target=lambda: results.append(train_quietly(run_config)[0].step))
    thread.start()
    thread.join()
    assert results == [25]


def test_signal_handlers_are_put_back(run_config):
    import signal

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    train_quietly(run_config)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_loaded_dataset_is_taken_as_it_is(run_config):
    data = load_dataset(run_config.dataset)
    result, _ = train_quietly(run_config, dataset=data)
    assert result.step == 25
    assert math.isfinite(read_rows(run_config.run_dir / "metrics.csv")[-1]["critic/loss"])


def test_a_damaged_checkpoint_is_named(run_config):
    train_quietly(run_config)
    path = find_checkpoint(run_config.run_dir) / "agent.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match=rf"{re.escape(str(path))} is damaged.*remove .*, and resuming starts from"):
        resume(run_config.run_dir, console=Console(file=io.StringIO()))
