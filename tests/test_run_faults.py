"""What goes wrong around a run: threads that build agents, flipped bits, links, simulators that fail or never end."""

import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from rich.console import Console

from dql.agent import DiffusionBC, load, make_agent
from dql.checkpoint import CheckpointError, load_tensors, save_tensors
from dql.config import Config, RunConfig
from dql.data import DatasetError, load_dataset
from dql.environments import make_env
from dql.evaluate import EvaluationStopped, evaluate
from dql.loop import LoopState
from dql.policy import DiffusionPolicy
from dql.rundir import RunDir, RunError, append_row, find_checkpoint, read_rows
from dql.train import resume, train


# Initial weights.
def digest(agent):
    whole = hashlib.sha256()
    for name, tensor in agent.tensors().items():
        whole.update(name.encode())
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


# Taken when torch's own generator was forked and seeded for them: a run's weights are still those.
@pytest.mark.parametrize(
    ("seed", "algorithm", "hidden_dim", "num_hidden", "activation", "float32", "float64"),
    [
        (0, "diffusion-ql", 16, 2, "mish", "6adb6f16d55f0707", "3994cc2bb0b8f429"),
        (1, "diffusion-ql", 32, 3, "relu", "987a50715e267515", "94511410362e1258"),
        (2**64 - 1, "diffusion-ql", 16, 2, "silu", "895efadccd212ae2", "8b20adb480cdf943"),
        (2**63 + 5, "diffusion-bc", 16, 4, "mish", "00eba63714f4f332", "31fd4afff2a528c7"),
        (7, "diffusion-bc", 256, 3, "mish", "8b934bb87de030d6", "e0b5da79ef607cfc"),
        (7, "diffusion-ql", 256, 3, "mish", "54e3226a1f29056f", "c6f07d14f30441e4"),
    ],
)
def test_initial_weights_are_what_they_were(seed, algorithm, hidden_dim, num_hidden, activation, float32, float64):
    config = Config(algorithm=algorithm, hidden_dim=hidden_dim, num_hidden=num_hidden, activation=activation, seed=seed)
    assert digest(make_agent(3, 2, config)) == float32
    assert digest(make_agent(3, 2, config, dtype=torch.float64)) == float64


def test_initial_weights_in_threads():
    """While others build theirs and draw from torch's own generator, which stays where it was."""
    configs = [Config(hidden_dim=64, num_hidden=2, seed=seed) for seed in range(8)]
    alone = [digest(make_agent(3, 2, config)) for config in configs]
    over = threading.Event()

    def draw():
        while not over.is_set():
            torch.rand(3)

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(5):
                assert list(pool.map(lambda config: digest(make_agent(3, 2, config)), configs)) == alone
    finally:
        over.set()
        drawing.join()
    before = torch.get_rng_state()
    make_agent(3, 2, configs[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_no_module_touches_torchs_own_generator():
    """Seeding or forking it is a race between threads: nothing in the package does."""
    import re
    from pathlib import Path

    import dql

    used = re.compile(r"fork_rng|torch\.manual_seed\(|np\.random\.(seed|rand|normal|uniform)\(|random\.seed\(")
    found = [
        f"{path.name}: {line.strip()}"
        for path in Path(dql.__file__).parent.rglob("*.py")
        for line in path.read_text().splitlines()
        if used.search(line)
    ]
    assert found == []


def test_a_network_of_ones_own_draws_as_every_module_does():
    from dql.networks import TwinCritic
    from dql.policy import DiffusionPolicy

    torch.manual_seed(5)
    first = DiffusionPolicy(3, 2, hidden_dim=16), TwinCritic(3, 2, 16)
    torch.manual_seed(5)
    again = DiffusionPolicy(3, 2, hidden_dim=16), TwinCritic(3, 2, 16)
    own = torch.Generator().manual_seed(5)
    third = DiffusionPolicy(3, 2, hidden_dim=16, generator=own), TwinCritic(3, 2, 16, generator=own)
    for others in (again, third):
        assert torch.equal(first[0].denoiser.flat, others[0].denoiser.flat)
        assert torch.equal(first[1].flat, others[1].flat)


def test_an_agent_on_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match=r"device 'cuda' cannot be used \(.*\); use 'cpu'"):
        make_agent(3, 2, Config(hidden_dim=16), device="cuda")


# Runs whose evaluations, files and folders are not as they should be.
class Pendulum(PendulumEnv):
    """Does what a test says, whatever that is, before each step of each episode."""

    do = None
    constructor = None

    def __init__(self, **options):
        if Pendulum.constructor is not None:
            Pendulum.constructor()
        super().__init__(**options)

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.time += 1
        observation, reward, terminated, truncated, info = super().step(action)
        if Pendulum.do is not None:
            observation, reward, terminated = Pendulum.do(self.time, observation, reward)
        return observation, reward, terminated, truncated, info


gymnasium.register("Limited-v0", entry_point=Pendulum, max_episode_steps=5)
gymnasium.register("Endless-v0", entry_point=Pendulum)


@pytest.fixture(autouse=True)
def well_behaved():
    yield
    Pendulum.do = Pendulum.constructor = None


@pytest.fixture
def run_config(pendulum, tmp_path):
    agent = Config(hidden_dim=16, num_hidden=2, batch_size=16, num_updates=40, num_candidates=2, ema_start=4)
    return RunConfig(
        pendulum, agent, run_dir=tmp_path / "run", device="cpu", log_every=5, checkpoint_every=10, eval_every=10,
        eval_episodes=2, env="Limited-v0",
    )  # fmt: skip


def quietly(act, *arguments, **options):
    said = io.StringIO()
    result = act(*arguments, console=Console(file=said, width=400), **options)
    return result, said.getvalue()


def assert_one_sentence(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def assert_same_agent(a, b):
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name


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


@pytest.mark.parametrize("do", [nan_observation, array_reward, nan_reward, short_observation, broken])
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
    assert len(re.findall(r"^update 20: the evaluation failed \(\w+: .*\); its line .* is empty, and the run goes on$",
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
    undisturbed, _ = quietly(train, run_config)
    run = replace(run_config, run_dir=tmp_path / "crashing", checkpoint_every=1000)
    folder = RunDir(run.run_dir)

    def crash(time, observation, reward):
        if time == 4 and len(read_rows(folder.evaluations_path)) == 2:
            raise SystemExit(3)
        return observation, reward, False

    Pendulum.do = crash
    for _ in range(2):
        with pytest.raises(SystemExit):
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


# Checkpoints that are not what was written, or another run's.
def flipped(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def test_no_flipped_bit_goes_unnoticed(run_config):
    """In the header, the description, any tensor, the loop's own state; and the sentence names the file."""
    run = replace(run_config, eval_every=20)
    quietly(train, run)
    folder = RunDir(run.run_dir)
    moments = random.Random(0)
    wrong = []
    for path in (
        folder.checkpoint_path(40) / "agent.safetensors",
        folder.checkpoint_path(40) / "loop.json",
        folder.policy_path,
    ):
        whole = path.read_bytes()
        for bit in moments.sample(range(8 * len(whole)), 150):
            path.write_bytes(flipped(path, bit))
            try:
                if path.name == "agent.safetensors":
                    load(path.parent)
                elif path.name == "loop.json":
                    LoopState.from_dict({k: v for k, v in folder.read_loop(40).items() if k != "of"})
                else:
                    DiffusionPolicy.load(path)
            except (CheckpointError, RunError, ValueError) as error:
                if path.name != "loop.json" and str(path) not in str(error):
                    wrong.append((path.name, bit, str(error)))
            else:
                wrong.append((path.name, bit))
            path.write_bytes(whole)
    assert wrong == []
    for path in (folder.checkpoint_path(40) / "agent.safetensors", folder.checkpoint_path(40) / "loop.json"):
        whole = path.read_bytes()
        path.write_bytes(flipped(path, 8 * len(whole) - 100))
        with pytest.raises(
            RunError, match=rf"{path} is damaged.*remove {path.parent}, and resuming starts from"
        ) as caught:
            quietly(resume, run.run_dir)
        assert_one_sentence(caught)
        path.write_bytes(whole)
    assert quietly(resume, run.run_dir)[0].step == 40


def test_a_checkpoint_of_an_earlier_version_has_no_digest(run_config):
    from safetensors.torch import save

    quietly(train, run_config)
    folder = RunDir(run_config.run_dir).checkpoint_path(40)
    tensors, about = load_tensors(folder / "agent.safetensors")
    assert "digest" not in about
    (folder / "agent.safetensors").write_bytes(save(tensors, metadata={"dql": json.dumps(about)}))
    loop = json.loads((folder / "loop.json").read_text())
    for added in ("digest", "of", "evaluation_owed"):
        del loop[added]
    (folder / "loop.json").write_text(json.dumps(loop))
    resumed, _ = quietly(resume, run_config.run_dir, num_updates=50)
    assert resumed.step == 50


@pytest.mark.parametrize("what", ["seed", "hidden_dim", "step", "lr", "dataset's loop"])
def test_a_checkpoint_of_another_run(what, run_config, tmp_path):
    quietly(train, run_config)
    agent = run_config.agent
    other = {
        "seed": replace(agent, seed=1),
        "hidden_dim": replace(agent, hidden_dim=32),
        "lr": replace(agent, lr=1e-4),
    }.get(what, agent)
    other = replace(run_config, agent=other, run_dir=tmp_path / "other", eval_every=0)
    if what == "step":
        other = replace(other, checkpoint_every=1, keep=5)
    if what == "dataset's loop":
        other = other.with_agent(reward_tune="normalize")
    quietly(train, other)
    source, target = (RunDir(run.run_dir).checkpoint_path(40) for run in (other, run_config))
    if what == "step":
        source = source.with_name("step-000000039")
    if what == "dataset's loop":
        shutil.copy(source / "loop.json", target / "loop.json")
    else:
        shutil.rmtree(target)
        shutil.copytree(source, target)
    with pytest.raises(RunError, match=rf"{target} is no checkpoint of this run: it is of .*, or remove") as caught:
        quietly(resume, run_config.run_dir)
    assert_one_sentence(caught)
    if what == "step":
        with pytest.raises(CheckpointError, match="it is of update 39, its folder is named for 40"):
            load(run_config.run_dir)
    if what != "dataset's loop":
        assert {"step": "update 39", "hidden_dim": "hidden_dim 32"}.get(what, what) in str(caught.value)
    shutil.rmtree(target)
    assert quietly(resume, run_config.run_dir)[0].step == 40, "as the sentence says"


# Links in a run's folder.
NAMES = (".lock", "config.json", "metrics.csv", "evaluations.csv", "selection.json", "policy.safetensors",
         "checkpoints/step-000000040/agent.safetensors", "checkpoints/step-000000040/loop.json")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_link_in_the_folder_is_refused(name, run_config, tmp_path):
    quietly(train, run_config)
    link, elsewhere = run_config.run_dir / name, tmp_path / "precious"
    shutil.move(link, elsewhere)
    before = elsewhere.write_bytes(elsewhere.read_bytes() or b"precious") and elsewhere.read_bytes()
    link.symlink_to(elsewhere)
    with pytest.raises(RunError, match=rf"{link} is a symbolic link.*put the file or folder itself there") as caught:
        quietly(resume, run_config.run_dir, num_updates=50)
    assert_one_sentence(caught)
    assert elsewhere.read_bytes() == before
    link.unlink()
    shutil.move(elsewhere, link)
    assert quietly(resume, run_config.run_dir, num_updates=50)[0].step == 50, "the lock was given back"


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-000000040", "checkpoints/.step-000000050.unfinished",
                                  "checkpoints/.step-000000020.old"])  # fmt: skip
def test_a_linked_folder_is_refused(name, run_config, tmp_path):
    """Of checkpoints, and of their temporary names, which anybody can tell."""
    quietly(train, run_config)
    link, elsewhere = run_config.run_dir / name, tmp_path / "precious"
    if link.exists():
        shutil.move(link, elsewhere)
    else:
        elsewhere.mkdir()
    (elsewhere / "file").write_text("precious")
    link.symlink_to(elsewhere)
    before = sorted(p.name for p in elsewhere.rglob("*"))
    with pytest.raises(RunError, match=rf"{link} is a symbolic link"):
        quietly(resume, run_config.run_dir, num_updates=50)
    assert sorted(p.name for p in elsewhere.rglob("*")) == before


@pytest.mark.parametrize("name", [".lock", "metrics.csv", "evaluations.csv", "config.json", "checkpoints"])
def test_a_new_run_follows_no_link(name, run_config, tmp_path):
    """Nor a dangling one, which looks as if nothing were there."""
    for target in (tmp_path / "nothing", tmp_path / "precious"):
        run = replace(run_config, run_dir=tmp_path / f"run-{target.name}")
        run.run_dir.mkdir()
        if target.name == "precious":
            target.mkdir() if name == "checkpoints" else target.write_text("precious")
        (run.run_dir / name).symlink_to(target)
        with pytest.raises(RunError, match="is a symbolic link"):
            quietly(train, run)
    assert not (tmp_path / "nothing").exists()
    assert (tmp_path / "precious").is_dir() or (tmp_path / "precious").read_text() == "precious"


def test_links_that_appear_while_a_run_is_under_way(tmp_path):
    """Each writer refuses by itself: the folder was looked at when the run began."""
    folder, elsewhere = RunDir(tmp_path / "run"), tmp_path / "precious"
    folder.path.mkdir()
    elsewhere.mkdir()
    agent = DiffusionBC(3, 1, Config(hidden_dim=16, num_hidden=2))
    (elsewhere / "rows").write_text("precious")
    folder.metrics_path.symlink_to(elsewhere / "rows")
    with pytest.raises(CheckpointError, match=r"metrics\.csv: it is a symbolic link"):
        append_row(folder.metrics_path, {"step": 1})
    assert (elsewhere / "rows").read_text() == "precious"
    folder.save_checkpoint(1, agent, {})
    (folder.checkpoints_path / ".step-000000002.unfinished").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="symbolic link"):
        folder.save_checkpoint(2, agent, {})
    shutil.move(folder.checkpoints_path, tmp_path / "moved")
    folder.checkpoints_path.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="symbolic link"):
        folder.save_checkpoint(3, agent, {})
    assert [p.name for p in elsewhere.iterdir()] == ["rows"]
    # A file that is replaced whole: the link goes, what it pointed to stays.
    (folder.path / "selection.json").symlink_to(elsewhere / "rows")
    folder.write_json("selection.json", {"last": 3})
    assert (elsewhere / "rows").read_text() == "precious"
    assert not (folder.path / "selection.json").is_symlink()


def test_the_folder_itself_may_be_reached_through_a_link(run_config, tmp_path):
    (tmp_path / "big-disk").mkdir()
    run_config.run_dir.symlink_to(tmp_path / "big-disk")
    quietly(train, run_config)
    assert quietly(resume, run_config.run_dir, num_updates=50)[0].step == 50
    assert RunDir(tmp_path / "big-disk").steps()[-1] == 50


@pytest.mark.parametrize("name", [".lock", "metrics.csv"])
def test_a_pipe_is_not_waited_for(name, run_config):
    run_config.run_dir.mkdir()
    os.mkfifo(run_config.run_dir / name)
    with pytest.raises((RunError, CheckpointError)) as caught:
        quietly(train, run_config)
    assert_one_sentence(caught)


# Networks shared between processes.
def in_another_process(policy, critic, turn, answers):
    """Runs in a spawned process: adds to what it was given, then says what it sees of the other's writes."""
    policy.denoiser.flat_parameters()
    with torch.no_grad():
        policy.denoiser.flat.add_(0.25)
        critic.get_parameter("q1_model.0.weight").fill_(7.0)
    answers.put("written")
    turn.get()
    answers.put((policy.denoiser.flat.sum().item(), critic.flat.sum().item()))
    # Training goes on there as anywhere: a step of an optimizer is seen too.
    optimizer = torch.optim.SGD([policy.denoiser.flat], lr=1.0)
    policy.bc_loss(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.ones(4, 2)).backward()
    optimizer.step()
    answers.put(policy.denoiser.flat.sum().item())


@pytest.mark.parametrize("shared", [True, False])
def test_a_spawned_process_shares_the_networks(shared):
    """Whether share_memory() was called or torch's pickling did it, as for every nn.Module."""
    import dql

    policy, critic = DiffusionPolicy(3, 2, hidden_dim=16, num_hidden=2), dql.TwinCritic(3, 2, 16, 2)
    if shared:
        policy.share_memory()
        critic.share_memory()
    states, before = torch.randn(5, 3), policy.denoiser.flat.detach().clone()
    actions = dql.sample(states, policy, seed=1)
    context = torch.multiprocessing.get_context("spawn")
    turn, answers = context.Queue(), context.Queue()
    process = context.Process(target=in_another_process, args=(policy, critic, turn, answers))
    process.start()
    try:
        assert answers.get(timeout=60) == "written"
        assert torch.equal(policy.denoiser.flat, before + 0.25)
        assert (critic.get_parameter("q1_model.0.weight") == 7.0).all()
        policy.denoiser.flat_parameters()
        after = dql.sample(states, policy, seed=1)  # by whatever backend: nothing derived from the old weights is used
        assert not torch.equal(after, actions)
        torch.testing.assert_close(after, dql.sample(states, policy, seed=1, backend="eager"))
        with torch.no_grad():
            policy.denoiser.get_parameter("final_layer.bias").fill_(3.0)
            critic.flat.mul_(0.5)
        turn.put("read")
        assert answers.get(timeout=60) == (policy.denoiser.flat.sum().item(), critic.flat.sum().item())
        total = policy.denoiser.flat.sum().item()
        stepped = answers.get(timeout=60)
        assert stepped != total
        assert policy.denoiser.flat.sum().item() == stepped
    finally:
        process.join(20)
        process.kill()
    assert process.exitcode == 0


def test_copies_share_nothing():
    """A deep copy or a plain pickle of a shared network is one's own."""
    policy = DiffusionPolicy(3, 2, hidden_dim=16, num_hidden=2).share_memory()
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        other.denoiser.flat_parameters()
        with torch.no_grad():
            other.denoiser.flat.zero_()
        assert other.denoiser.get_parameter("final_layer.weight").eq(0).all()
        assert not policy.denoiser.get_parameter("final_layer.weight").eq(0).all()


# Files of JSON that hold something else.
STRANGE = [None, "x", "", -1, 0.5, math.inf, -math.inf, math.nan, 10**400, [], {}, [[]], True, {"a": 1}, "9" * 100]


def places(values, path=()):
    """The path of every value in a tree of JSON."""
    if path:
        yield path
    if isinstance(values, dict):
        for key, value in values.items():
            yield from places(value, (*path, key))
    elif isinstance(values, list):
        for i, value in enumerate(values[:1]):
            yield from places(value, (*path, i))


def changed(values, path, value=None, *, remove=False):
    values = copy.deepcopy(values)
    inside = values
    for key in path[:-1]:
        inside = inside[key]
    if remove:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return values


def variants(values, number=100):
    """Some of (what was changed, the values with that) for every place and every strange thing."""
    every = []
    for path in places(values):
        every.append(((*path, "removed"), changed(values, path, remove=True)))
        every += [((*path, f"{strange!r:.20}"), changed(values, path, strange)) for strange in STRANGE]
    return random.Random(0).sample(every, min(number, len(every)))


def not_in_a_sentence(act, cases):
    """The cases that raise anything but one sentence of ours; which of them nobody minded."""
    wrong, fine = [], []
    for what, prepare in cases:
        prepare()
        try:
            act()
        except (RunError, CheckpointError, DatasetError, ValueError) as error:
            if "\n" in str(error) or len(str(error)) > 900:
                wrong.append((what, str(error)))
        except BaseException as error:
            wrong.append((what, repr(error)))
        else:
            fine.append(what)
    assert wrong == []
    return fine


@pytest.fixture
def ended(run_config):
    """A run that has ended, so that resuming does no update."""
    quietly(train, replace(run_config.with_agent(num_updates=10), eval_episodes=1))
    return RunDir(run_config.run_dir)


def test_a_config_of_strange_values(ended, monkeypatch):
    written = json.loads(ended.config_path.read_text())
    cases = [
        (what, lambda values=values: ended.config_path.write_text(json.dumps(values)))
        for what, values in variants(written)
    ]
    # Nothing of it may start training: what differs from the checkpoint is another run's.
    monkeypatch.setattr("dql.loop.Loop._update", lambda self: pytest.fail("it trains"))
    cases = [case for case in cases if case[0][-2] != "num_updates" or case[0][-1] != "removed"]  # a million: longer
    fine = not_in_a_sentence(lambda: quietly(resume, ended.path), cases)
    for what in fine:
        assert what[0] in ("versions", "dataset", "run"), what
        assert what[1] != "agent" or what[2:] in [(name, "removed") for name in written["run"]["agent"]], what
    assert not [what for what in fine if what[0] == "dataset" and what[1] not in
                ("transitions", "state_dim", "action_dim", "in_memory", "info")]  # fmt: skip


def test_reading_a_run_of_strange_values(ended):
    """Who only reads it: dql eval, dql.load."""
    from dql.cli import evaluate as command
    from dql.data import DatasetInfo

    written = json.loads(ended.config_path.read_text())
    info = DatasetInfo.from_json(json.dumps(written["dataset"]["info"]))
    del written["dataset"]["info"]["episode_returns"], written["dataset"]["info"]["episode_lengths"]
    written["dataset"]["info"] |= {"episode_returns": [1.0], "episode_lengths": [1]}
    assert info.max_action == 2.0
    tree = {"dataset": {"info": written["dataset"]["info"]}}
    cases = [
        (what, lambda values=values: ended.config_path.write_text(json.dumps(written | values)))
        for what, values in variants(tree)
    ]
    cases = [(what, prepare) for what, prepare in cases if len(what) > 2]

    def read():
        ended.read_config()
        command(ended.path, checkpoint="last", episodes=1, device="cpu", as_json=True)

    with contextlib.redirect_stdout(io.StringIO()):
        not_in_a_sentence(read, random.Random(1).sample(cases, 40))


def test_a_loop_of_strange_values(ended, monkeypatch):
    path = ended.checkpoint_path(10) / "loop.json"
    written = ended.read_loop(10)
    monkeypatch.setattr("dql.loop.Loop._update", lambda self: pytest.fail("it trains"))
    cases = [
        (what, lambda values=values: ended.save_loop(10, values))  # with the digest that fits
        for what, values in variants(written)
    ]
    not_in_a_sentence(lambda: quietly(resume, ended.path), cases)
    ended.save_loop(10, written)
    assert quietly(resume, ended.path)[0].step == 10
    for text in ("[]", "3", "null", '"x"', "{}", "", "{", "\xff\xfe", '{"digest": "x"}'):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(RunError, match=f"{path} is damaged") as caught:
            quietly(resume, ended.path)
        assert_one_sentence(caught)


def test_a_checkpoint_of_strange_values(ended):
    path = ended.checkpoint_path(10) / "agent.safetensors"
    tensors, about = load_tensors(path)
    cases = [
        (what, lambda values=values: save_tensors(path, tensors, values))  # with the digest that fits
        for what, values in variants(about)
    ]
    fine = not_in_a_sentence(lambda: load(path.parent), cases)
    # A number of the config may be another: resuming compares them.
    assert {what[0] for what in fine if what != ("format", "True")} <= {"config"}
    cases = [
        (name, lambda name=name, value=value: save_tensors(path, tensors | {name: value}, about))
        for name in tensors
        for value in (torch.zeros(3), torch.zeros(0, 2))
    ]
    cases += [(name, lambda name=name: save_tensors(path, {k: v for k, v in tensors.items() if k != name}, about))
              for name in tensors]  # fmt: skip
    assert not_in_a_sentence(lambda: load(path.parent), cases) == []


@pytest.mark.parametrize("name", ["config.json", "selection.json", "checkpoints/step-000000010/loop.json"])
@pytest.mark.parametrize(
    "text",
    [b"[" * 200_000, b'{"run": ' + b"9" * 5000 + b"}", b'{"a": "' + b"\xff" + b'"}', b"", b"[1, 2]", b"nonsense"],
    ids=["deep", "long number", "no UTF-8", "empty", "a list", "no JSON"],
)
def test_what_is_no_json(name, text, ended, dql_here):
    path = ended.path / name
    path.write_bytes(text)
    command = ("eval", ended.path) if name == "selection.json" else ("train", "--resume", ended.path)
    assert len(dql_here(*command).refused(path, "damaged")) < 500


@pytest.mark.parametrize("name", ["metrics.csv", "evaluations.csv"])
@pytest.mark.parametrize("text", [b"step,a\r\nx,1\r\n", b"step,a\r\n\r\n\xff\r\n", b"step,a\r\n\r\n"])
def test_what_is_no_table(name, text, ended):
    (ended.path / name).write_bytes(text)
    with pytest.raises(RunError, match=f"{ended.path / name} is damaged"):
        quietly(resume, ended.path)


NAMES_READ = ("config.json", "metrics.csv", "checkpoints", "checkpoints/step-000000010/agent.safetensors",
              "checkpoints/step-000000010/loop.json")  # fmt: skip


@pytest.mark.parametrize("name", NAMES_READ)
def test_what_may_not_be_read_is_not_called_damaged(name, ended):
    """In a process of another user, for whom the file says no."""
    place = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        run = place / "run"
        shutil.copytree(ended.path, run)
        done = subprocess.run(
            [sys.executable, "-c", _AS_ANOTHER, str(run), name], capture_output=True, text=True, check=False
        )
        if done.returncode == 77:
            pytest.skip("only root can become another user")
        assert done.returncode == 0, done.stderr
        said = done.stdout.strip()
        assert "Permission denied" in said
        assert "damaged" not in said
        assert str(run / name) in said
        assert "\n" not in said
    finally:
        shutil.rmtree(place)


_AS_ANOTHER = """
import os, sys
from pathlib import Path
import dql
from dql.agent import load
from dql.checkpoint import CheckpointError, load_tensors
from dql.rundir import RunDir, RunError, read_rows
import safetensors.torch, torch, dql.datasets.info
run, name = Path(sys.argv[1]), sys.argv[2]
os.chmod(run.parent, 0o755), os.chmod(run, 0o755), os.chmod(run / name, 0)
try:
    os.setuid(65534)
except OSError:
    sys.exit(77)
folder = RunDir(run)
try:
    folder.read_config()
    read_rows(folder.metrics_path)
    step = max(folder.steps())
    load_tensors(folder.checkpoint_path(step) / "agent.safetensors")
    folder.read_loop(step)
except (RunError, CheckpointError) as error:
    print(error)
"""


# Values of a RunConfig.
def test_a_run_config_takes_what_means_a_value():
    agent = Config(hidden_dim=np.int64(16), lr=np.float32(0.5), max_q_backup=np.bool_(True), seed=np.uint64(2**64 - 1))
    run = RunConfig(Path("a.hdf5"), agent, run_dir="some/where", keep=np.int8(2), device=torch.device("cpu"))
    assert (run.dataset, run.run_dir, run.device, run.keep) == ("a.hdf5", Path("some/where"), "cpu", 2)
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    for config in (run, agent):
        for name, value in vars(config).items():
            assert type(value) in (str, int, float, bool, type(None), type(Path()), Config), name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset": None}, "dataset must be a string, got None"),
        ({"agent": {}}, r"agent must be a dql\.Config, got {}"),
        ({"run_dir": 3}, "run_dir must be a path, got 3"),
        ({"device": None}, "device must be a string, got None"),
        ({"keep": "3"}, "keep must be an integer, got '3'"),
        ({"keep": True}, "keep must be an integer, got True"),
        ({"eval_every": 2.0}, r"eval_every must be an integer, got 2\.0"),
        ({"eval_max_steps": 0}, "eval_max_steps must be at least 1, got 0"),
        ({"env": 5}, "env must be a string, got 5"),
        ({"graphed": "no"}, "graphed must be True or False, got 'no'"),
        ({"threads": 10**400}, "threads must be below 2\\^64"),
    ],
)
def test_a_run_config_refuses_what_does_not(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        RunConfig(**{"dataset": "x"} | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_q_backup": "yes"}, "max_q_backup must be True or False, got 'yes'"),
        ({"max_q_backup": 1}, "max_q_backup must be True or False, got 1"),
        ({"lr": True}, "lr must be a finite number, got True"),
        ({"lr": "1e-3"}, "lr must be a finite number, got '1e-3'"),
        ({"eta": 10**400}, "eta must be a finite number"),
        ({"backend": None}, "backend must be a string, got None"),
        ({"algorithm": ["diffusion-ql"]}, "algorithm must be one of diffusion-ql, diffusion-bc, got"),
        ({"hidden_dim": np.float64(16)}, "hidden_dim must be an integer"),
    ],
)
def test_a_config_refuses_what_is_of_another_kind(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**changes)
