"""A run that is killed and resumed ends bit for bit as one that never was: parameters, moments, averages, files.

Three kinds of kill. At a random moment of a real `dql train` process. Just before an operation on a file (an audit hook
of the killed process counts them and sends the SIGKILL), which meets the moments inside a checkpoint's writing.
And by the signals that ask for a clean end.
"""

import copy
import csv
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from dql.checkpoint import load_tensors
from dql.config import Config, RunConfig
from dql.rundir import RunDir, RunError, find_checkpoint
from dql.train import resume, train

TIMES = ("seconds", "updates_per_second")


def rows(path):
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def last_tensors(path):
    return load_tensors(find_checkpoint(path) / "agent.safetensors")


def differences(run, reference):
    """Everything in which two run folders differ although they must not; [] if nothing."""
    found = []
    a, b = last_tensors(run), last_tensors(reference)
    if a[1] != b[1]:
        found.append(f"description {a[1]} is not {b[1]}")
    if a[0].keys() != b[0].keys():
        found.append(f"tensors {sorted(a[0].keys() ^ b[0].keys())} are in one only")
    found += [f"tensor {name} differs" for name in a[0].keys() & b[0].keys() if not torch.equal(a[0][name], b[0][name])]
    if rows(run / "metrics.csv") != rows(reference / "metrics.csv"):
        found.append("metrics.csv differs")
    for name in ("evaluations.csv", "policy.safetensors"):
        if (run / name).read_bytes() != (reference / name).read_bytes():
            found.append(f"{name} differs")
    return found


def bookkeeping(run):
    """Which checkpoints a run has and selects, and what else lies about."""
    known = {".lock", "checkpoints", "config.json", "evaluations.csv", "metrics.csv", "policy.safetensors"}
    return {
        "steps": RunDir(run).steps(),
        "selection": json.loads((run / "selection.json").read_text()),
        "left over": sorted(
            str(p.relative_to(run))
            for p in run.rglob("*")
            if p.name not in known | {"selection.json", "agent.safetensors", "loop.json"}
            and not (p.parent.name == "checkpoints" and p.name.startswith("step-"))
        ),
    }


def assert_everything_is_compared(reference):
    """The reference run has everything that a resumption could lose: else its tests show nothing."""
    tensors, about = last_tensors(reference)
    assert about["step"] == about["config"]["num_updates"]
    for network in ("actor", "ema_actor", "critic", "critic_target"):
        assert any(name.startswith(f"{network}.") for name in tensors), network
    for adam in ("actor_adam", "critic_adam"):
        assert {f"{adam}.step", f"{adam}.exp_avg", f"{adam}.exp_avg_sq"} <= tensors.keys()
    initial = RunConfig.from_dict(RunDir(reference).read_config()["run"]).agent
    from dql.agents.registry import make_agent

    fresh = make_agent(about["state_dim"], about["action_dim"], initial).tensors()
    averaged = [n for n in fresh if n.startswith("ema_actor.") and not torch.equal(fresh[n], tensors[n])]
    assert averaged, "the EMA never stepped"
    assert len(rows(reference / "evaluations.csv")) >= 3


@pytest.fixture(scope="module")
def flags(tiny):
    return [*tiny, "--num-updates", 300, "--log-every", 7, "--checkpoint-every", 15, "--eval-every", 80,
            "--eval-episodes", 1, "--keep", 2, "--top-k", 1]  # fmt: skip


@pytest.fixture
def reference(dql, pendulum, flags, tmp_path):
    done = dql("train", "--dataset", pendulum, "--run-dir", "reference", *flags)
    assert done.code == 0, done.err
    assert_everything_is_compared(tmp_path / "reference")
    return tmp_path / "reference"


def test_sigkill_at_random_moments(dql_command, pendulum, flags, reference, tmp_path):
    moments = random.Random()  # truly random: over many runs of the tests, many moments
    run = tmp_path / "run"
    start = dql_command("train", "--dataset", pendulum, "--run-dir", run, *flags)
    again = dql_command("train", "--resume", run)
    killed, waits = 0, []
    while killed < 3:
        begun = (run / "config.json").exists()
        before = RunDir(run).steps()
        process = subprocess.Popen(again if begun else start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        # From the moment that it works (a new checkpoint, or half of one), some checkpoints further.
        while process.poll() is None and before == RunDir(run).steps():
            time.sleep(0.002)
        waits.append(moments.uniform(0, 0.25))
        try:
            process.wait(waits[-1])
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        said = process.communicate()[0].decode()
        assert process.returncode in (0, -signal.SIGKILL), said
        if process.returncode == 0:
            break
    assert killed >= 2, f"the run ended before it was killed: waits {waits}"
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert differences(run, reference) == [], f"waits {waits}"
    assert bookkeeping(run) == bookkeeping(reference), f"waits {waits}"


# A process that has imported everything forks a child for each `dql` command: a start costs milliseconds. The child
# is as real as any: it runs the command line's main() and ends by its exit code or by SIGKILL.
_FORKING = """
import json, os, signal, sys
import gymnasium, minari, torch, torch._dynamo, dql.cli, dql.data, dql.datasets.cache, dql.environments, dql.train
import safetensors.torch
from gymnasium.envs.classic_control.pendulum import PendulumEnv
gymnasium.register("BriefPendulum-v0", entry_point=PendulumEnv, max_episode_steps=6)
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"}
for line in sys.stdin:
    order = json.loads(line)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        done = 0
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        def hook(event, values):
            global done
            writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in CHANGES:
                if done == order["kill_before"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
        sys.addaudithook(hook)
        code = dql.cli.main(order["arguments"])
        sys.stdout.flush(), sys.stderr.flush()
        os.write(theirs, str(done).encode())
        os._exit(code)
    os.close(theirs)
    counted = os.read(ours, 100).decode()
    os.close(ours)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"code": status, "operations": int(counted or -1)}), flush=True)
"""


@pytest.fixture(scope="module")
def forked(pendulum_home, tmp_path_factory):
    """Runs a `dql` command in a forked process; `kill_before` N kills it before its operation N on a file."""
    place = tmp_path_factory.mktemp("forked")
    env = os.environ | {
        "MINARI_DATASETS_PATH": str(pendulum_home / "minari"),
        "DQL_CACHE": str(pendulum_home / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _FORKING],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=place,
    ) as process:  # fmt: skip

        def run(*arguments, kill_before=-1):
            order = {"arguments": [str(a) for a in arguments], "kill_before": kill_before, "log": str(place / "log")}
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            return answer | {"said": (place / "log").read_text()}

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def brief(tiny):
    """Flags of a run that logs, evaluates and saves often, within few updates."""
    return ["--dataset", "dql/pendulum/mixed-v0", *tiny, "--batch-size", 8, "--ema-start", 2, "--ema-every", 1,
            "--num-updates", 7, "--log-every", 2, "--checkpoint-every", 2, "--eval-every", 3, "--eval-episodes", 1,
            "--keep", 1, "--top-k", 0, "--env", "BriefPendulum-v0"]  # fmt: skip


@pytest.fixture(scope="module")
def killed_everywhere(forked, brief, tmp_path_factory):
    """(reference, a run folder for each file operation before which a run was killed, then resumed)."""
    place = tmp_path_factory.mktemp("killed")
    forked("train", *brief, "--run-dir", place / "warm-up")  # writes the dataset's cache
    whole = forked("train", *brief, "--run-dir", place / "reference")
    assert whole["code"] == 0, whole["said"]
    assert_everything_is_compared(place / "reference")
    total = whole["operations"]
    assert total > 50
    # The first and the last moments always; of those between, which are alike from checkpoint to checkpoint, some.
    moments = {*range(8), *random.Random().sample(range(8, total - 20), 12), *range(total - 20, total, 2)}
    runs = []
    for n in sorted(moments):
        run = place / f"killed-{n}"
        answer = forked("train", *brief, "--run-dir", run, kill_before=n)
        assert answer["code"] == -signal.SIGKILL, (n, answer)
        begun = (run / "config.json").exists()
        answer = forked("train", *(("--resume", run) if begun else (*brief, "--run-dir", run)))
        assert answer["code"] == 0, (n, answer["said"])
        runs.append(run)
    return place / "reference", runs


def test_sigkill_before_every_file_operation(killed_everywhere):
    reference, runs = killed_everywhere
    wrong = {run.name: found for run in runs if (found := differences(run, reference))}
    assert wrong == {}


def test_sigkill_leaves_nothing_behind(killed_everywhere):
    """Whenever it was killed: the same checkpoints kept, the same selected, and no unfinished file."""
    reference, runs = killed_everywhere
    expected = bookkeeping(reference)
    wrong = {run.name: kept for run in runs if (kept := bookkeeping(run)) != expected}
    assert wrong == {}


# In this process, where nothing is killed.
@pytest.fixture
def run_config(pendulum, tmp_path):
    agent = Config(hidden_dim=16, num_hidden=2, batch_size=16, num_updates=30, num_candidates=2, ema_start=4)
    return RunConfig(
        pendulum, agent, run_dir=tmp_path / "run", device="cpu", log_every=5, checkpoint_every=10, eval_every=0
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_cleanly_and_the_printed_command_continues(
    number, code, dql_command, dql_here, pendulum, tiny, tmp_path
):
    flags = [*tiny, "--num-updates", 100_000, "--log-every", 10, "--checkpoint-every", 100_000, "--eval-every", 0]
    command = dql_command("train", "--dataset", pendulum, "--run-dir", tmp_path / "stopped", *flags)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not len(rows_if_any(tmp_path / "stopped" / "metrics.csv")) >= 2:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert err == ""
    folder = RunDir(tmp_path / "stopped")
    (step,) = folder.steps()  # none was due: it was made for the signal
    assert f"after update {step:,}, checkpoint written" in out
    printed = shlex.split(out.strip().splitlines()[-1])
    assert printed[:3] == ["dql", "train", "--resume"]
    # The command as it was printed; a new length keeps it short.
    length = step + 5
    done = dql_here(*printed[1:], "--num-updates", length)
    assert done.code == 0, done.err
    assert f"resuming{printed[3]}atupdate{step:,}" in "".join(done.out.split())
    assert folder.steps()[-1] == length
    whole = train(_like(folder, tmp_path / "whole", length))
    for name, tensor in last_tensors(folder.path)[0].items():
        assert torch.equal(whole.agent.tensors()[name], tensor), name


def rows_if_any(path):
    return rows(path) if path.exists() else []


def _like(folder, path, num_updates):
    from dataclasses import replace

    run = RunConfig.from_dict(folder.read_config()["run"]).with_agent(num_updates=num_updates)
    return replace(run, run_dir=path)


def test_a_run_is_extended_exactly(run_config, tmp_path):
    train(run_config)
    longer = resume(run_config.run_dir, num_updates=55)
    whole = train(_like(RunDir(run_config.run_dir), tmp_path / "whole", 55))
    assert longer.step == 55
    assert longer.agent.config.num_updates == 55
    for name, tensor in whole.agent.tensors().items():
        assert torch.equal(longer.agent.tensors()[name], tensor), name
    assert rows(run_config.run_dir / "metrics.csv") == rows(tmp_path / "whole" / "metrics.csv")
    # The new length is the run's: a later resumption has nothing to do.
    assert resume(run_config.run_dir).step == 55


def test_an_ended_run_resumed_stays_as_it_is(run_config):
    first = train(run_config)
    files = {p: p.read_bytes() for p in run_config.run_dir.rglob("*") if p.is_file() and p.name != "config.json"}
    again = resume(run_config.run_dir)
    assert again.step == first.step == 30
    assert {p: p.read_bytes() for p in files} == files


def test_a_cosine_run_is_not_extended(run_config):
    run = run_config.with_agent(lr_schedule="cosine")
    train(run)
    with pytest.raises(RunError, match="cosine schedule cannot be changed"):
        resume(run.run_dir, num_updates=55)
    assert resume(run.run_dir, num_updates=30).step == 30, "the same length is no change"


def test_a_cosine_run_is_resumed_exactly(run_config, tmp_path):
    from dataclasses import replace

    run = run_config.with_agent(lr_schedule="cosine")
    whole = train(run)
    cut = train(replace(run, run_dir=tmp_path / "cut"))
    RunDir(cut.path).prune(1, set())
    _back_to(RunDir(cut.path), RunDir(run.run_dir), 20)
    again = resume(cut.path)
    for name, tensor in whole.agent.tensors().items():
        assert torch.equal(again.agent.tensors()[name], tensor), name


def _back_to(folder, source, step):
    """Leaves `folder` with the checkpoint `step` of `source` alone, as a kill after it would."""
    import shutil

    shutil.rmtree(folder.checkpoints_path)
    shutil.copytree(source.checkpoint_path(step), folder.checkpoint_path(step))
    folder.policy_path.unlink()


def test_a_changed_dataset_is_refused(run_config, tmp_path, monkeypatch):
    from dql.collect import make_dataset

    train(run_config)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "other"))
    make_dataset(run_config.dataset, steps=1200, seed=1, progress=False)
    with pytest.raises(RunError, match="is not the one this run began with"):
        resume(run_config.run_dir)


def test_one_process_a_folder(run_config, dql):
    train(run_config)
    holder = RunDir(run_config.run_dir)
    holder.lock()
    try:
        before = (run_config.run_dir / "metrics.csv").read_bytes()
        dql("train", "--resume", run_config.run_dir, "--num-updates", 60).refused(run_config.run_dir, "another process")
        assert (run_config.run_dir / "metrics.csv").read_bytes() == before
    finally:
        holder.unlock()
    assert resume(run_config.run_dir).step == 30, "the lock ends with its holder"


def test_starting_where_a_run_is(run_config):
    train(run_config)
    with pytest.raises(RunError, match=f"dql train --resume {run_config.run_dir}"):
        train(run_config)


def test_resuming_what_is_no_run(tmp_path):
    with pytest.raises(RunError, match=r"is no run: it has no config\.json"):
        resume(tmp_path)
    (tmp_path / "config.json").write_text('{"run": {')
    with pytest.raises(RunError, match="damaged"):
        resume(tmp_path)


def test_a_run_killed_before_its_first_checkpoint_starts_over(run_config):
    import shutil

    first = train(run_config)
    kept = rows(run_config.run_dir / "metrics.csv")
    shutil.rmtree(RunDir(run_config.run_dir).checkpoints_path)
    again = resume(run_config.run_dir)
    for name, tensor in first.agent.tensors().items():
        assert torch.equal(again.agent.tensors()[name], tensor), name
    assert rows(run_config.run_dir / "metrics.csv") == kept, "no line twice"


# Evaluations that a signal meets.
_SLOW = """
import os, time
import gymnasium
from gymnasium.envs.classic_control.pendulum import PendulumEnv

class Slow(PendulumEnv):
    steps = 0
    def step(self, action):
        if os.path.exists(os.environ["SLOW"]):
            Slow.steps += 1
            if Slow.steps == 3:
                open(os.environ["SLOW"] + ".begun", "w").close()
            time.sleep(0.3)
        return super().step(action)

gymnasium.register("Slow-v0", entry_point=Slow, max_episode_steps=40)
"""


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """An environment's name, and a file: while that is there, an episode takes 12 seconds."""
    (tmp_path / "slow_environment.py").write_text(_SLOW)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("SLOW", str(tmp_path / "slow"))
    return "slow_environment:Slow-v0", tmp_path / "slow"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_an_evaluation_at_once(number, slow, dql, dql_command, pendulum, flags, tmp_path):
    """And the resumed run does it again: everything ends as if there had been no signal."""
    env, slowing = slow
    arguments = ["train", "--dataset", pendulum, *flags, "--env", env, "--checkpoint-every", 1000]
    assert dql(*arguments, "--run-dir", "reference").code == 0
    assert_everything_is_compared(tmp_path / "reference")
    slowing.touch()
    process = subprocess.Popen(
        dql_command(*arguments, "--run-dir", tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and not slowing.with_name("slow.begun").exists():
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(number)
    out, err = (said.decode() for said in process.communicate(timeout=30))
    assert time.monotonic() - sent < 4, "an episode had ten seconds to go"
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number], err
    folder = RunDir(tmp_path / "run")
    assert folder.steps() == [80], "its checkpoint came first"
    assert folder.read_loop(80)["evaluation_owed"] is True
    assert not folder.evaluations_path.exists()
    if number != signal.SIGKILL:
        assert "after update 80, checkpoint written" in out
        assert err == ""
    slowing.unlink()
    done = dql("train", "--resume", tmp_path / "run", "--env", "slow_environment:Slow-v0")  # typed again: a module's
    assert done.code == 0, done.err
    assert differences(tmp_path / "run", tmp_path / "reference") == []
    assert bookkeeping(tmp_path / "run") == bookkeeping(tmp_path / "reference")


def test_a_run_in_memory_is_resumed(run_config, tmp_path):
    """Its dataset is handed over again; another is refused, and none is, with what to do."""
    from dataclasses import replace

    from dql.data import load_dataset

    data = load_dataset(run_config.dataset)
    run = replace(run_config, dataset="my-robot")
    train(run.with_agent(num_updates=20), dataset=data)
    with pytest.raises(RunError, match=r"in memory, and 'my-robot' cannot be loaded; .*resume\(path, dataset=\.\.\.\)"):
        resume(run.run_dir, num_updates=30)
    other = copy.copy(data)
    other.rewards = data.rewards + 1
    with pytest.raises(RunError, match="is not the one this run began with"):
        resume(run.run_dir, num_updates=30, dataset=other)
    with pytest.raises(RunError, match="rewards are tuned 'normalize'"):
        resume(run.run_dir, num_updates=30, dataset=load_dataset(run_config.dataset, reward_tune="normalize"))
    again = resume(str(run.run_dir), num_updates=30, dataset=data)
    whole = train(replace(run, run_dir=tmp_path / "whole"), dataset=data)
    for name, tensor in whole.agent.tensors().items():
        assert torch.equal(again.agent.tensors()[name], tensor), name
    assert resume(run.run_dir, dataset=data).step == 30, "it is still known to be one"


def test_a_line_of_metrics_that_could_not_be_written_is_on_resuming(run_config, tmp_path, monkeypatch):
    """A full disk with room for a checkpoint: no update is lost, no line is missing and none is there twice."""
    from dataclasses import replace

    import dql.loop
    from dql.checkpoint import CheckpointError

    run = replace(run_config, checkpoint_every=1000, eval_every=15, eval_episodes=1)
    train(replace(run, run_dir=tmp_path / "whole"))
    append = dql.loop.append_row

    def full(path, row):
        if row["step"] == 15 and path.name == full.name:
            raise CheckpointError(f"cannot write {path}: No space left on device")
        append(path, row)

    monkeypatch.setattr(dql.loop, "append_row", full)
    for full.name in ("metrics.csv", "metrics.csv", "evaluations.csv", "evaluations.csv"):
        with pytest.raises(CheckpointError, match=full.name):
            resume(run.run_dir) if RunDir(run.run_dir).config_path.exists() else train(run)
        assert RunDir(run.run_dir).steps() == [15]
    monkeypatch.setattr(dql.loop, "append_row", append)
    assert resume(run.run_dir).step == 30
    assert differences(run.run_dir, tmp_path / "whole") == []
    assert bookkeeping(run.run_dir) == bookkeeping(tmp_path / "whole")
