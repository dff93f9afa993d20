"""Several seeds in one process: each run is, to the bit, the one that its seed alone would be."""

import copy
import pickle
import shutil
import signal
import subprocess
from dataclasses import replace

import pytest
import torch
from support.runs import Pendulum, assert_same_agent, brief_run, quietly

import dql
from dql import update_native
from dql.agents.registry import load, make_agent
from dql.cli import parse_seeds
from dql.config import Config
from dql.data import load_dataset
from dql.evaluate import EvaluationStopped, evaluate, evaluate_all
from dql.rundir import RunDir, RunError, read_rows
from dql.session import SeedsFailedError, Session
from dql.train import resume, resume_seeds, seed_run_dir, train, train_seeds

SEEDS = (0, 3, 2**63)


def lines(path):
    """All that a CSV file says, but for times."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "updates_per_second")} for row in read_rows(path)]


def assert_same_run(a, b):
    """Every file of two runs that is not of times or of where they are."""
    a, b = RunDir(a), RunDir(b)
    assert a.steps() == b.steps()
    for step in a.steps():
        assert_same_agent(load(a.path, str(step)), load(b.path, str(step)))
        ours, its = a.read_loop(step), b.read_loop(step)
        assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in its.items() if k != "seconds"}
    assert str(lines(a.metrics_path)) == str(lines(b.metrics_path))  # NaN is written alike
    assert str(lines(a.evaluations_path)) == str(lines(b.evaluations_path))
    assert a.selection() == b.selection()


@pytest.mark.parametrize(
    ("algorithm", "backend", "changes"),
    [
        ("diffusion-ql", "cpp", {}),
        ("diffusion-ql", "cpp", {"max_q_backup": True, "lr_schedule": "cosine"}),
        ("diffusion-ql", "cpp", {"actor_gradient": "one-step"}),
        ("diffusion-ql", "eager", {}),
        ("diffusion-bc", "cpp", {}),
        ("td3-bc", None, {}),
        ("iql", None, {}),
    ],
)
def test_each_is_as_alone(algorithm, backend, changes, pendulum, tmp_path, runs_here):
    if backend is not None:
        runs_here(backend)
    run = brief_run(pendulum, tmp_path / "together")
    agent = run.agent.of(algorithm, **changes, **({"backend": backend} if backend else {}))
    run = replace(run, agent=agent, threads=2)
    results, _ = quietly(train_seeds, run, SEEDS)
    assert [result.agent.config.seed for result in results] == list(SEEDS)
    for seed, result in zip(SEEDS, results, strict=True):
        alone = replace(run.with_agent(seed=seed), run_dir=tmp_path / f"alone{seed}", threads=1)
        quietly(train, alone)
        assert result.path == seed_run_dir(run, seed)
        assert_same_run(result.path, alone.run_dir)


def some_batch(B, S, A, seed):
    generator = torch.Generator().manual_seed(seed)
    states, next_states = torch.randn(2, B, S, generator=generator)
    return dql.Batch(states, torch.rand(B, A, generator=generator) * 2 - 1, states[:, 0], next_states, torch.ones(B))


@pytest.mark.parametrize("agents", [1, 2, 3, 5])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_and_company_change_no_bit(agents, threads, pendulum, runs_here):
    """Blocks of unequal lengths among agents that are at different updates, and one update a call."""
    runs_here("cpp")
    data = load_dataset(pendulum)
    config = Config(hidden_dim=32, num_hidden=2, batch_size=24, ema_start=2, ema_every=3, max_action=2.0, backend="cpp")
    several = dql.Ensemble.of(3, 1, config, seeds=range(agents), threads=threads)
    own = [copy.copy(data) for _ in range(agents)]
    found = [[] for _ in range(agents)]
    while min(agent.step for agent in several) < 7:
        counts = [min(1 + i % 3, 7 - agent.step) for i, agent in enumerate(several)]
        for values, block in zip(found, several.advance(own, counts), strict=True):
            values += [] if block is None else block[1].tolist()
    for seed, agent in enumerate(several):
        alone = make_agent(3, 1, replace(config, seed=seed))
        for step in range(7):
            metrics = alone.update(data.sample(24, seed, step))
            assert list(metrics) == list(update_native.names(alone))
            assert [float(value) for value in metrics.values()] == found[seed][step]
        assert_same_agent(agent, alone)
        assert agent.step == alone.step == 7


def test_a_block_ends_where_rows_are_drawn_anew(pendulum, runs_here):
    runs_here("cpp")
    data = load_dataset(pendulum)
    config = Config(hidden_dim=16, num_hidden=2, batch_size=2, max_action=2.0, backend="cpp")
    several, alone = dql.Ensemble.of(3, 1, config, seeds=[0]), make_agent(3, 1, config)
    several[0].step = alone.step = 254
    done = 0
    while done < 6:
        ((_, values),) = several.advance([data], [6 - done])
        done += len(values)
    for step in range(254, 260):
        alone.update(data.sample(2, 0, step))
    assert_same_agent(several[0], alone)


def test_weights_that_are_written_between_blocks_are_seen(pendulum, runs_here):
    """The versions that native code counts are those of the tensors."""
    runs_here("cpp")
    data = load_dataset(pendulum)
    config = Config(hidden_dim=16, num_hidden=2, batch_size=8, max_action=2.0, backend="cpp", ema_start=0)
    several, alone = dql.Ensemble.of(3, 1, config, seeds=[0]), make_agent(3, 1, config)
    states = data.states[:5]
    for _ in range(3):
        several.advance([data], [4])
        for _ in range(4):
            alone.update(data.sample(8, 0, alone.step))
        for agent in (several[0], alone):
            assert torch.equal(agent.act(states, seed=1), alone.act(states, seed=1))
            fresh = make_agent(3, 1, config)
            fresh.load_tensors(agent.tensors())
            assert torch.equal(agent.act(states, seed=1), fresh.act(states, seed=1))
            with torch.no_grad():
                agent.policy.denoiser.flat.mul_(0.9)
                agent.critic.flat[3] = 0.5


@pytest.mark.parametrize("candidates", [2**27, 2**62])
def test_more_candidates_than_a_call_takes(candidates, pendulum, runs_here):
    """24 times 2^62 is 0 in 64 bits."""
    runs_here("cpp")
    config = Config(hidden_dim=16, num_hidden=2, batch_size=24, max_action=2.0, backend="cpp", max_q_backup=True)
    several = dql.Ensemble.of(3, 1, replace(config, backup_candidates=candidates), seeds=(0, 1))
    with pytest.raises(ValueError, match="more rows than a call takes"):
        several.advance([load_dataset(pendulum)] * 2, [1, 1])


def test_the_parameters_are_one_tensor():
    several = dql.Ensemble.of(5, 2, Config(hidden_dim=16), seeds=(1, 2, 3))
    for name in several[0].modules():
        stacked = several.parameters(name)
        assert stacked.shape == (3, several[0].modules()[name].layout.size)
        for agent, row in zip(several, stacked, strict=True):
            assert torch.equal(row, agent.modules()[name].flat)
            assert row.data_ptr() == agent.modules()[name].flat.data_ptr()
    before = several[1].critic.flat._version
    several[0].update(some_batch(4, 5, 2, 0))
    assert several[1].critic.flat._version == before  # each network counts its own writes
    states = torch.randn(3, 4, 5)
    actions = several.act(states, seeds=(7, 8, 9))
    for i in range(3):
        assert torch.equal(actions[i], several[i].act(states[i], seed=7 + i))
    assert several.act(states.numpy()).shape == (3, 4, 2)


def test_an_agent_takes_none_of_the_others_along():
    config = Config(hidden_dim=32)
    several = dql.Ensemble.of(5, 2, config, seeds=range(8))
    several.update(some_batch(4, 5, 2, 0))
    alone = make_agent(5, 2, config)
    alone.update(some_batch(4, 5, 2, 0))
    assert len(pickle.dumps(several[0])) < 1.1 * len(pickle.dumps(alone))
    other = copy.deepcopy(several[0])
    other.update(some_batch(4, 5, 2, 1))
    alone.update(some_batch(4, 5, 2, 1))
    assert_same_agent(other, alone)
    assert torch.equal(several.parameters("actor")[0], several[0].policy.denoiser.flat)


def test_parameters_that_are_elsewhere_are_not_shown():
    several = dql.Ensemble.of(5, 2, Config(hidden_dim=16), seeds=(1, 2, 3))
    others = dql.Ensemble(several[1:2])
    assert torch.equal(others.parameters("critic")[0], several[1].critic.flat)
    with pytest.raises(RuntimeError, match="the critic of agent 1 is not in this ensemble's memory"):
        several.parameters("critic")
    others[0].critic.share_memory()
    with pytest.raises(RuntimeError, match="of agent 0"):
        others.parameters("critic")
    assert others.parameters("actor").shape[0] == 1


def test_what_a_subclass_changes_is_done_in_blocks_too(pendulum, runs_here):
    runs_here("cpp")

    class Halving(dql.DiffusionQL):
        def lr_scale(self, step=None):
            return 0.5**self.step

    class Averaging(dql.DiffusionQL):
        def ema_weight(self, step):
            return 0.1 * self.step

    class WithCritic(dql.DiffusionBC):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.critic = dql.TwinCritic(3, 1, 16, 2)  # for the caller's own use

    data = load_dataset(pendulum)
    for kind in (Halving, Averaging, WithCritic):
        config = Config(hidden_dim=16, num_hidden=2, batch_size=8, max_action=2.0, backend="cpp").of(kind.algorithm)
        several, alone = dql.Ensemble([kind(3, 1, config)]), kind(3, 1, config)
        ((_, values),) = several.advance([data], [5])
        assert len(values) == 5
        for _ in range(5):
            alone.update(data.sample(8, 0, alone.step))
        assert_same_agent(several[0], alone)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: dql.Ensemble([]), "at least|at least|one agent"),
        (lambda: dql.Ensemble([dql.BC(3, 1), dql.IQL(3, 1)]), "algorithm are bc and iql"),
        (lambda: dql.Ensemble([dql.BC(3, 1), dql.BC(4, 1)]), "sizes are"),
        (lambda: dql.Ensemble([dql.BC(3, 1)] * 2), "share a network"),
        (lambda: dql.Ensemble.of(3, 1, seeds=(1, 1)), "different"),
        (lambda: dql.Ensemble([dql.BC(3, 1)]).update([]), "1 agents and 0 batches"),
        (lambda: dql.Ensemble([dql.BC(3, 1)]).act(torch.zeros(4, 3)), r"states must be \[1, B, 3\]"),
        (lambda: dql.Ensemble([dql.BC(3, 1)]).act(torch.zeros(1, 4, 3), seeds=[1, 2]), "1 agents and 2 seeds"),
        (lambda: dql.Ensemble([dql.BC(3, 1)]).parameters("critic"), "no network 'critic'; they have actor"),
        (lambda: dql.Ensemble([dql.BC(3, 1)]).advance([], [1]), "1 agents, 0 datasets and 1 counts"),
    ],
)
def test_what_an_ensemble_refuses(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_one_that_diverges_costs_the_others_nothing(pendulum, tmp_path, monkeypatch):
    run = brief_run(pendulum, tmp_path / "together")
    run = replace(run.with_agent(grad_norm=0.0), eval_every=0)
    data = load_dataset(pendulum)
    broken = make_agent(3, 1, run.with_agent(seed=1, max_action=2.0).agent)
    with torch.no_grad():
        broken.critic.flat.fill_(1e30)

    def made(state_dim, action_dim, config, **options):
        return broken if config.seed == 1 else make_agent(state_dim, action_dim, config, **options)

    monkeypatch.setattr("dql.train.make_agent", made)
    with pytest.raises(SeedsFailedError, match="1 of 3 runs failed") as error:
        quietly(train_seeds, run, (0, 1, 2), dataset=data)
    assert "seed1: " in str(error.value) and "became NaN or infinite" in str(error.value)
    for seed in (0, 2):
        alone = replace(run.with_agent(seed=seed), run_dir=tmp_path / f"alone{seed}")
        quietly(train, alone, dataset=data)
        assert_same_run(run.run_dir / f"seed{seed}", alone.run_dir)


def test_an_evaluation_that_fails_is_that_seeds(pendulum):
    info, agents = load_dataset(pendulum).info, [make_agent(3, 1, Config(hidden_dim=16, seed=s)) for s in (0, 1)]

    class Broken:
        def act(self, states, *, seed=None):
            raise StopIteration

    limits = {"episodes": 2, "max_episode_steps": 3}
    found = evaluate_all([agents[0], Broken(), agents[1]], [info] * 3, seeds=(5, 6, 7), workers=2, **limits)
    assert isinstance(found[1], RuntimeError)
    for result, agent, seed in ((found[0], agents[0], 5), (found[2], agents[1], 7)):
        assert (result.returns == evaluate(agent, info, seed=seed, **limits).returns).all()
    with pytest.raises(EvaluationStopped):
        evaluate_all(agents, [info] * 2, seeds=(5, 6), stop=lambda: True, **limits)


@pytest.mark.parametrize("error", [ValueError("stuck"), SystemExit(0), StopIteration()])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_environment_that_closes_badly_is_that_seeds(error, workers, pendulum, monkeypatch):
    def close(self):
        if self.time < 3:  # its actor failed
            closed.append(self)
            raise error

    class Broken:
        def act(self, states, *, seed=None):
            raise ValueError("no action")

    monkeypatch.setattr(Pendulum, "close", close)
    info = load_dataset(pendulum).info.with_env("Limited-v0", typed=True)
    agents, limits = [make_agent(3, 1, Config(hidden_dim=16, seed=s)) for s in (0, 1)], {"episodes": 2}
    closed = []
    found = evaluate_all([agents[0], Broken(), agents[1]], [info] * 3, seeds=(5, 6, 7), workers=workers, **limits)
    assert len(closed) == 2
    with pytest.raises((ValueError, RuntimeError)) as alone:
        evaluate(Broken(), info, seed=6, **limits)
    assert repr(found[1]) == repr(alone.value)
    for result, agent, seed in ((found[0], agents[0], 5), (found[2], agents[1], 7)):
        assert (result.returns == evaluate(agent, info, seed=seed, **limits).returns).all()


@pytest.mark.parametrize("error", [ValueError("stuck"), SystemExit(0)])
def test_a_signal_in_environments_that_close_badly(error, pendulum, tmp_path, monkeypatch):
    run = brief_run(pendulum, tmp_path / "runs")
    whole = replace(run, run_dir=tmp_path / "whole")
    quietly(train_seeds, whole, (0, 1))

    def interrupt(time, observation, reward):
        if time == 2:
            signal.raise_signal(signal.SIGTERM)
        return observation, reward, False

    def close(self):
        if self.time < 5:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(Pendulum, "do", interrupt)
        patch.setattr(Pendulum, "close", close)
        results, _ = quietly(train_seeds, run, (0, 1))
    assert [(result.step, result.stopped_by) for result in results] == [(10, "SIGTERM")] * 2
    quietly(resume_seeds, [result.path for result in results])
    for seed in (0, 1):
        assert_same_run(run.run_dir / f"seed{seed}", whole.run_dir / f"seed{seed}")


def test_more_environments_than_stand_side_by_side(pendulum, monkeypatch):
    monkeypatch.setattr("dql.evaluate.MOST", 4)
    info, agents = load_dataset(pendulum).info, [make_agent(3, 1, Config(hidden_dim=16, seed=s)) for s in range(3)]
    limits = {"episodes": 3, "max_episode_steps": 2}
    found = evaluate_all(agents, [info] * 3, seeds=range(3), **limits)
    for seed, (result, agent) in enumerate(zip(found, agents, strict=True)):
        assert (result.returns == evaluate(agent, info, seed=seed, **limits).returns).all()


def test_none_begins_if_one_cannot(pendulum, tmp_path):
    run = replace(brief_run(pendulum, tmp_path / "runs"), eval_every=0)
    quietly(train, replace(run.with_agent(seed=1), run_dir=seed_run_dir(run, 1)))
    with pytest.raises(RunError, match="seed1 holds a run already"):
        quietly(train_seeds, run, (0, 1, 2))
    assert not (run.run_dir / "seed0").exists()
    assert not (run.run_dir / "seed2").exists()


def test_a_seeds_folder_is_no_link(pendulum, tmp_path):
    run = replace(brief_run(pendulum, tmp_path / "runs"), eval_every=0)
    (tmp_path / "elsewhere").mkdir()
    run.run_dir.mkdir()
    (run.run_dir / "seed1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="seed1 is a symbolic link"):
        quietly(train_seeds, run, (0, 1))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not (run.run_dir / "seed0").exists()


def test_runs_that_differ_do_not_go_on_together(pendulum, tmp_path):
    run = replace(brief_run(pendulum, tmp_path / "runs"), eval_every=0)
    quietly(train_seeds, run, (0, 1))
    other = replace(run.with_agent(lr=1e-3), run_dir=tmp_path / "other")
    quietly(train, other)
    with pytest.raises(RunError, match="differ in lr"):
        quietly(resume_seeds, [run.run_dir / "seed0", other.run_dir])
    with pytest.raises(RunError, match="named twice"):
        quietly(resume_seeds, [run.run_dir / "seed0", run.run_dir / "seed0"])


def test_runs_of_different_lengths_go_on_to_one(pendulum, tmp_path):
    """A kill may come between the new lengths in their config.json files, too."""
    run = replace(brief_run(pendulum, tmp_path / "runs"), eval_every=0)
    results, _ = quietly(train_seeds, run, (0, 1))
    both = [result.path for result in results]
    quietly(resume, both[0], num_updates=45)
    with pytest.raises(RunError, match="differ in num_updates"):
        quietly(resume_seeds, both)
    quietly(resume_seeds, both, num_updates=50)
    for seed, path in enumerate(both):
        alone = replace(run.with_agent(seed=seed, num_updates=50), run_dir=tmp_path / f"alone{seed}")
        quietly(train, alone)
        assert_same_agent(load(path), load(alone.run_dir))


def test_a_run_that_ends_before_the_others_is_whole(pendulum, tmp_path, monkeypatch):
    run = replace(brief_run(pendulum, tmp_path / "runs"), eval_every=0)
    results, _ = quietly(train_seeds, run, (0, 1))
    for result in results:
        (result.path / "policy.safetensors").unlink()
    for step in (30, 40):
        shutil.rmtree(RunDir(results[1].path).checkpoint_path(step))
    saw, original = [], Session._advance

    def stopping(self, counts):
        saw.append((results[0].path / "policy.safetensors").exists())
        signal.raise_signal(signal.SIGTERM)
        return original(self, counts)

    monkeypatch.setattr(Session, "_advance", stopping)
    again, _ = quietly(resume_seeds, [result.path for result in results])
    assert [result.stopped_by for result in again] == ["SIGTERM"] * 2
    assert again[0].step == 40 > again[1].step
    assert saw == [True]
    assert not (results[1].path / "policy.safetensors").exists()


def test_torchs_threads_are_put_back(pendulum, tmp_path):
    before = torch.get_num_threads()
    quietly(train_seeds, replace(brief_run(pendulum, tmp_path / "runs"), eval_every=0), (0, 1, 2))
    assert torch.get_num_threads() == before


def test_killed_and_resumed_at_different_updates(dql_command, pendulum, tmp_path):
    """SIGKILL leaves the seeds where their last checkpoints are; one of them is put back by another checkpoint."""
    run = replace(brief_run(pendulum, tmp_path / "runs"), keep=10)
    run = run.with_agent(num_updates=400)
    flags = ["--dataset", pendulum, "--seeds", "0,3", "--device", "cpu", "--log-every", "5", "--checkpoint-every", "10",
             "--eval-every", "100", "--eval-episodes", "2", "--keep", "10", "--hidden-dim", "16", "--num-hidden", "2",
             "--batch-size", "16", "--num-updates", "400", "--num-candidates", "2", "--ema-start", "4",
             "--eval-max-steps", "5"]  # fmt: skip
    for name in ("whole", "killed"):
        command = dql_command("train", *flags, "--run-dir", str(tmp_path / name))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            if name == "killed":
                steps = RunDir(tmp_path / name / "seed3").steps
                while process.poll() is None and max(steps(), default=0) < 150:
                    pass
                assert process.poll() is None, "it had ended before it was killed"
                process.send_signal(signal.SIGKILL)
            assert process.wait() == (0 if name == "whole" else -signal.SIGKILL)
    behind = RunDir(tmp_path / "killed" / "seed3")
    for step in behind.steps()[-3:]:
        for file in behind.checkpoint_path(step).iterdir():
            file.unlink()
        behind.checkpoint_path(step).rmdir()
    both = [tmp_path / "killed" / f"seed{seed}" for seed in (0, 3)]
    results, said = quietly(resume_seeds, both)
    assert [result.step for result in results] == [400, 400]
    assert said.count("resuming") == 2
    for seed in (0, 3):
        assert_same_run(tmp_path / "killed" / f"seed{seed}", tmp_path / "whole" / f"seed{seed}")
    again, _ = quietly(resume, both[1], num_updates=410)  # alone from here on
    assert again.step == 410


def test_a_signal_stops_all_and_they_go_on(pendulum, tmp_path, monkeypatch):
    run = replace(brief_run(pendulum, tmp_path / "runs"), eval_every=0)
    whole = replace(run, run_dir=tmp_path / "whole")
    quietly(train_seeds, whole, (0, 1))
    original = Session._advance

    def stopping(self, counts):
        blocks = original(self, counts)
        if self.loops[0].agent.step >= 17:
            signal.raise_signal(signal.SIGTERM)
        return blocks

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_advance", stopping)
        results, _ = quietly(train_seeds, run, (0, 1))
    assert {result.stopped_by for result in results} == {"SIGTERM"}
    assert all(17 <= result.step < 40 for result in results)
    quietly(resume_seeds, [result.path for result in results])
    for seed in (0, 1):
        ours, its = RunDir(run.run_dir / f"seed{seed}"), RunDir(whole.run_dir / f"seed{seed}")
        assert_same_agent(load(ours.path), load(its.path))
        assert str(lines(ours.metrics_path)) == str(lines(its.metrics_path))


def test_seeds_as_they_are_typed():
    assert parse_seeds("0-3") == [0, 1, 2, 3]
    assert parse_seeds("7, 1-2,5") == [7, 1, 2, 5]
    for bad in ("", "a", "3-1", "1,1", "0-99999", "-1", "1-", "0x3", "9" * 30):
        with pytest.raises(ValueError, match="--seeds"):
            parse_seeds(bad)


def test_the_command(dql, pendulum, tmp_path):
    flags = ["--dataset", pendulum, "--device", "cpu", "--eval-every", "0", "--hidden-dim", "16", "--num-hidden", "2",
             "--batch-size", "16", "--num-updates", "3"]  # fmt: skip
    done = dql("train", *flags, "--seeds", "0-1", "--run-dir", str(tmp_path / "r"))
    assert done.code == 0, done.err
    assert "6 updates of 2 seeds" in done.out
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["seed0", "seed1"]
    done = dql("train", *flags, "--seeds", "0-1", "--seed", "3")
    assert "leave one of them out" in done.refused()
    done = dql("train", "--resume", str(tmp_path / "r" / "seed0"), str(tmp_path / "r" / "seed1"), "--num-updates", "5")
    assert done.code == 0, done.err
    assert RunDir(tmp_path / "r" / "seed1").steps() == [3, 5]
    done = dql("train", "--resume", str(tmp_path / "r" / "seed0"), "--resume", str(tmp_path / "r" / "seed1"))
    assert "after one --resume" in done.refused()
