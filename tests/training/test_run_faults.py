"""Evaluations that fail, that cannot be made here, that are changed on resuming, and that would never end."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
from dataclasses import replace
from time import sleep

import numpy as np
import pytest
from support.runs import Pendulum, assert_one_sentence, assert_same_agent, brief_run, quietly

from dql.agents.diffusion import DiffusionBC
from dql.config import Config, RunConfig
from dql.data import DatasetError, load_dataset
from dql.environments import make_env
from dql.evaluate import EvaluationStopped, evaluate
from dql.rundir import RunDir, RunError, find_checkpoint, read_rows
from dql.train import resume, train


@pytest.fixture(autouse=True)
def well_behaved():
    yield
    Pendulum.do = Pendulum.constructor = None


@pytest.fixture
def run_config(pendulum, tmp_path):
    return brief_run(pendulum, tmp_path / "run")


# Evaluations that fail.
def nan_observation(time, observation, reward):
    return observation * (math.nan if time == 3 else 1), reward, False


def array_reward(time, observation, reward):
    return observation, np.array([reward, reward]), False


def nan_reward(time, observation, reward):
    return observation, math.nan, False


def short_observation(time, observation, reward):
    return observation[:1], reward, False


def broken(time, observation, reward):
    raise RuntimeError("the simulator\nbroke")


def leaving(time, observation, reward):
    sys.exit()


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no words")


def unspeakable(time, observation, reward):
    raise Unspeakable


@pytest.mark.parametrize(
    "do", [nan_observation, array_reward, nan_reward, short_observation, broken, leaving, unspeakable]
)
def test_an_evaluation_that_fails_costs_itself(do, run_config, tmp_path):
    """The second of four fails: its line is empty, the others and the agent are as without it."""
    undisturbed, _ = quietly(train, run_config)
    run = replace(run_config, run_dir=tmp_path / "faulty")
    folder = RunDir(run.run_dir)

    def at_20(*arguments):
        rows = read_rows(folder.evaluations_path)
        return do(*arguments) if len(rows) == 1 else (*arguments[1:], False)

    Pendulum.do = at_20
    faulty, said = quietly(train, run)
    assert len(re.findall(r"^update 20: the evaluation failed \(\w+.*\); its line .* is empty, and the run goes on$",
                          said, re.M)) == 1  # fmt: skip
    assert said.count("failed") == 1
    assert_same_agent(undisturbed.agent, faulty.agent)
    want, got = (read_rows(RunDir(r.run_dir).evaluations_path) for r in (run_config, run))
    assert [row["step"] for row in got] == [10, 20, 30, 40]
    assert [row["bc_loss"] for row in got] == [row["bc_loss"] for row in want]
    assert math.isnan(got[1]["return_mean"])
    assert got[0] == want[0]
    assert got[2:] == want[2:]
    assert [step for step, _ in faulty.evaluations] == [10, 30, 40]
    best = max((row for row in got if row["step"] != 20), key=lambda row: row["return_mean"])["step"]
    assert folder.selection()["best"] == best
    # It is no obstacle to resuming either.
    again, _ = quietly(resume, run.run_dir, num_updates=45)
    assert again.step == 45
    assert [row["step"] for row in read_rows(folder.evaluations_path)] == [10, 20, 30, 40, 45]


def test_all_evaluations_fail(run_config):
    Pendulum.do = broken
    result, said = quietly(train, run_config)
    assert result.step == 40
    assert said.count("the evaluation failed (RuntimeError: the simulator)") == 4
    folder = RunDir(run_config.run_dir)
    assert set(folder.selection()) == {"last", "offline"}
    with pytest.raises(RunError, match="no checkpoint 'best'"):
        find_checkpoint(run_config.run_dir, "best")


def test_a_process_that_dies_in_an_evaluation_has_its_checkpoint(run_config, tmp_path):
    """A crash of the simulator takes the process along: here an exception that nothing catches."""

    class Crash(BaseException):
        pass

    undisturbed, _ = quietly(train, run_config)
    run = replace(run_config, run_dir=tmp_path / "crashing", checkpoint_every=1000)
    folder = RunDir(run.run_dir)

    def crash(time, observation, reward):
        if time == 4 and len(read_rows(folder.evaluations_path)) == 2:
            raise Crash
        return observation, reward, False

    Pendulum.do = crash
    for _ in range(2):
        with pytest.raises(Crash):
            quietly(*((resume, run.run_dir) if folder.config_path.exists() else (train, run)))
        assert folder.steps()[-1] == 30
        assert [row["step"] for row in read_rows(folder.evaluations_path)] == [10, 20]
    # A way around it without mending the simulator.
    shutil.copytree(run.run_dir, tmp_path / "without")
    around, _ = quietly(resume, tmp_path / "without", eval_every=0)
    assert_same_agent(undisturbed.agent, around.agent)
    Pendulum.do = None
    mended, _ = quietly(resume, run.run_dir)
    assert_same_agent(undisturbed.agent, mended.agent)
    assert folder.evaluations_path.read_bytes() == RunDir(run_config.run_dir).evaluations_path.read_bytes()


def test_no_simulator_is_no_reason_not_to_resume(run_config, tmp_path):
    undisturbed, _ = quietly(train, run_config)
    run = replace(run_config.with_agent(num_updates=20), run_dir=tmp_path / "moved")
    quietly(train, run)

    def absent():
        raise ImportError("libGL.so.1: cannot open shared object file")

    Pendulum.constructor = absent
    with pytest.raises(DatasetError, match="cannot be imported"):
        quietly(resume, run.run_dir, num_updates=40, env="Limited-v0")  # it was asked for just now
    resumed, said = quietly(resume, run.run_dir, num_updates=40)
    assert len(re.findall(r"^warning: its evaluations are left out.*libGL", said, re.M)) == 1
    assert "failed" not in said
    assert_same_agent(undisturbed.agent, resumed.agent)
    rows = read_rows(RunDir(run.run_dir).evaluations_path)
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert [math.isnan(row["return_mean"]) for row in rows] == [False, False, True, True]
    assert set(RunDir(run.run_dir).selection()) == {"last", "best", "offline"}
    Pendulum.constructor = None
    _, said = quietly(resume, run.run_dir, num_updates=50)
    assert "warning" not in said
    assert not math.isnan(read_rows(RunDir(run.run_dir).evaluations_path)[-1]["return_mean"])
    Pendulum.constructor = broken_constructor
    with pytest.raises(
        DatasetError, match=r"Limited-v0 .* cannot be made \(KeyError: 'x'\): .*--eval-every 0"
    ) as caught:
        quietly(train, replace(run, run_dir=tmp_path / "new"))
    assert_one_sentence(caught)


def broken_constructor():
    raise KeyError("x")


def test_evaluations_may_be_changed_on_resuming(run_config, dql_here, tmp_path):
    quietly(train, run_config.with_agent(num_updates=20))
    flags = ("--num-updates", 40, "--eval-every", 5, "--eval-episodes", 3, "--env", "Endless-v0", "--eval-max-steps", 7)
    done = dql_here("train", "--resume", run_config.run_dir, *flags)
    assert done.code == 0, done.err
    folder = RunDir(run_config.run_dir)
    rows = read_rows(folder.evaluations_path)
    assert [row["step"] for row in rows] == [10, 20, 25, 30, 35, 40]
    assert [row["episodes"] for row in rows] == [2, 2, 3, 3, 3, 3]
    assert [row["length_mean"] for row in rows] == [5, 5, 7, 7, 7, 7]
    # Returns of five steps and of seven are not compared.
    assert folder.selection()["best"] == max(rows[2:], key=lambda row: row["return_mean"])["step"]
    written = RunConfig.from_dict(folder.read_config()["run"])
    assert (written.eval_every, written.eval_episodes, written.env, written.eval_max_steps) == (5, 3, "Endless-v0", 7)
    dql_here("train", "--resume", run_config.run_dir, "--lr", 1).refused("--lr cannot be given with --resume")
    dql_here("train", "--resume", run_config.run_dir, "--eval-every=-1").refused("eval_every must not be negative")


# Episodes that do not end.
def test_an_environment_without_a_time_limit(run_config, dql_here, tmp_path):
    run = replace(run_config, env="Endless-v0")
    with pytest.raises(DatasetError, match=r"Endless-v0 has no time limit.*--eval-max-steps N") as caught:
        quietly(train, run)
    assert_one_sentence(caught)
    assert not run.run_dir.exists(), "found before training"
    result, _ = quietly(train, replace(run, eval_max_steps=3))
    assert [evaluation.lengths.tolist() for _, evaluation in result.evaluations] == [[3, 3]] * 4
    done = dql_here("eval", run.run_dir, "--episodes", 1, "--json")  # as the run says
    assert json.loads(done.out)["last"]["length_mean"] == 3
    done = dql_here("eval", run.run_dir, "--episodes", 1, "--json", "--eval-max-steps", 2)
    assert json.loads(done.out)["last"]["length_mean"] == 2
    info = replace(load_dataset(run.dataset).info, env_spec='{"id": "Endless-v0"}')
    with pytest.raises(DatasetError, match=r"evaluate\(max_episode_steps=N\)"):
        evaluate(result.agent, info)
    with pytest.raises(ValueError, match="max_episode_steps must be at least 1, got 0"):
        evaluate(result.agent, info, max_episode_steps=0)
    # One that ends by itself is cut as well, or ends before.
    limited = replace(info, env_spec='{"id": "Limited-v0"}')
    for cap, length in ((2, 2), (5, 5), (9, 5)):
        assert set(evaluate(result.agent, limited, episodes=3, max_episode_steps=cap).lengths) == {length}


def test_an_evaluation_stops_within_a_step(run_config):
    """Of one environment, not of all."""
    steps = 0

    def stop():
        nonlocal steps
        steps += 1
        return steps > 30

    calls = []
    Pendulum.do = lambda time, observation, reward: (calls.append(time), (observation, reward, False))[1]
    info = replace(load_dataset(run_config.dataset).info, env_spec='{"id": "Endless-v0"}')
    with pytest.raises(EvaluationStopped):
        evaluate(Still(), info, episodes=8, max_episode_steps=1000, stop=stop)
    assert calls == [1] * 8 + [2] * 4  # it was asked as each was made, reset, before each round and each step


def test_a_signal_does_not_wait_for_a_step(run_config, tmp_path):
    """One that blocks, in an environment that keeps every Exception. Its checkpoint is written, the evaluation owed."""
    undisturbed, _ = quietly(train, run_config)
    run = replace(run_config, run_dir=tmp_path / "blocked")
    timers = [threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)) for _ in range(2)]

    def block(time, observation, reward):
        timer = timers.pop()
        timer.start()
        for _ in range(600):
            with contextlib.suppress(Exception):
                sleep(0.1)
        raise AssertionError("nobody came")

    Pendulum.do = block
    for begin in ((train, run), (resume, run.run_dir)):
        stopped, said = quietly(*begin)
        assert (stopped.stopped_by, stopped.step) == ("SIGTERM", 10)
        assert "failed" not in said
    Pendulum.do = None
    finished, _ = quietly(resume, run.run_dir)
    assert_same_agent(undisturbed.agent, finished.agent)
    assert RunDir(run.run_dir).evaluations_path.read_bytes() == RunDir(run_config.run_dir).evaluations_path.read_bytes()


def test_how_an_environment_closes_costs_nothing_before_the_training(run_config, monkeypatch):
    closes = []

    def close(self):
        closes.append(self)
        raise SystemExit if len(closes) == 1 else RuntimeError("it jams")

    monkeypatch.setattr(Pendulum, "close", close)
    result, said = quietly(train, run_config)
    assert result.step == 40
    assert said.count("the evaluation failed (RuntimeError: it jams)") == 4


class Still:
    def act(self, states, *, seed=None):
        assert np.isfinite(states).all()
        return np.zeros((len(states), 1), np.float32)


def test_what_a_finished_episode_shows_is_nobodys(run_config):
    """The even episodes end with NaN after two steps; the odd ones are bit for bit what they are without that."""
    info = replace(load_dataset(run_config.dataset).info, env_spec='{"id": "Limited-v0"}')
    agent = DiffusionBC(3, 1, Config(hidden_dim=16, num_hidden=2, max_action=2.0))
    whole = evaluate(agent, info, episodes=6, seed=4)

    made = itertools.count()

    def make():
        env = make_env(info)
        number, step = next(made), env.step

        def ending(action):
            observation, reward, terminated, truncated, extra = step(action)
            if number % 2 == 0 and env.unwrapped.time == 2:
                return observation * math.nan, reward, True, truncated, extra
            return observation, reward, terminated, truncated, extra

        env.step = ending
        return env

    cut = evaluate(agent, info, episodes=6, seed=4, make=make)
    assert cut.lengths.tolist() == [2, 5, 2, 5, 2, 5]
    np.testing.assert_array_equal(cut.returns[1::2], whole.returns[1::2])


@pytest.mark.parametrize("last", [None, {}, "nothing", np.zeros(7), {"a": -1}])
def test_a_finished_episode_may_show_what_is_no_observation(run_config, last):
    info = replace(load_dataset(run_config.dataset).info, env_spec='{"id": "Limited-v0"}')
    Pendulum.do = lambda time, observation, reward: (last, reward, True) if time == 3 else (observation, reward, False)
    assert evaluate(Still(), info, episodes=2).lengths.tolist() == [3, 3]
    Pendulum.do = lambda time, observation, reward: (last, reward, False)
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever flattening raises)
        evaluate(Still(), info, episodes=2)
