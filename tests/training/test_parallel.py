"""One run in two processes with Gloo: it is that of one process with the same batch, to rounding."""

import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from dql.agents.registry import load
from dql.config import RunConfig
from dql.parallel import sharded
from dql.rundir import RunDir, RunError, read_rows
from dql.train import complete


@pytest.fixture
def command(pendulum, tmp_path):
    def of(name, processes, *more, resume=False):
        start = [sys.executable, "-m"]
        if processes > 1:
            start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        where = ["--resume", str(tmp_path / name)] if resume else ["--dataset", pendulum, "--run-dir", tmp_path / name]
        flags = [] if resume else [
            "--device", "cpu", "--hidden-dim", "16", "--num-hidden", "2", "--batch-size", "32", "--num-candidates", "2",
            "--ema-start", "4", "--ema-every", "2", "--log-every", "5", "--checkpoint-every", "10", "--eval-every",
            "20", "--eval-episodes", "2", "--eval-max-steps", "5", "--num-updates", "40",
        ]  # fmt: skip
        return [str(word) for word in (*start, "dql", "train", *where, *flags, *more)]

    return of


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "more",
    [
        ["--backend", "cpp"],
        ["--backend", "eager", "--max-q-backup", "--lr-schedule", "cosine"],
    ],
    ids=["cpp", "eager"],
)
def test_two_processes_are_one(more, command, tmp_path):
    said = run(command("two", 2, *more))
    assert said.count("dql eval") == 1  # one process speaks
    run(command("one", 1, *more))
    one, two = RunDir(tmp_path / "one"), RunDir(tmp_path / "two")
    assert one.steps() == two.steps()
    # Sums over 32 rows in two orders differ by 1e-7; Adam's first steps, of gradients that nearly cancel, make 1e-5 of
    # it, and 40 updates with a rate of 3e-4 move no parameter by more than 1e-2: a wrong row would show in all of them.
    for name, tensor in load(one.path).tensors().items():
        if "adam" not in name:
            torch.testing.assert_close(load(two.path).tensors()[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    for ours, its in zip(read_rows(two.metrics_path), read_rows(one.metrics_path), strict=True):
        for name, value in its.items():
            if name not in ("seconds", "updates_per_second"):
                assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    ours, its = read_rows(two.evaluations_path), read_rows(one.evaluations_path)
    assert [row["step"] for row in ours] == [row["step"] for row in its] == [20, 40]


def test_it_stops_together_and_goes_on(command, tmp_path):
    started = command("run", 2, "--num-updates", "100000", "--eval-every", "0", "--keep", "1")
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        steps = RunDir(tmp_path / "run").steps
        deadline = time.monotonic() + 120
        while not steps() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    done = steps()[-1]
    assert (RunDir(tmp_path / "run").checkpoint_path(done) / "loop.json").is_file()
    run(command("run", 2, "--num-updates", str(done + 7), resume=True))
    assert steps()[-1] == done + 7


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--batch-size", "33"], "cannot be cut into 2 equal parts"),
        (["--algorithm", "iql"], "this is iql"),
        (["--seeds", "0-1"], "several seeds"),
    ],
    ids=["uneven", "iql", "seeds"],
)
def test_what_is_refused(more, said, command, tmp_path):
    wanted = command("run", 2, *more)
    if more[0] == "--algorithm":
        wanted = [word for i, word in enumerate(wanted) if "--num-hidden" not in wanted[max(i - 1, 0) : i + 1]]
        for flag in ("--num-candidates", "--ema-start", "--ema-every"):
            at = wanted.index(flag)
            del wanted[at : at + 2]
    done = subprocess.run(wanted, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_processes_that_differ_are_refused(command, tmp_path):
    start, wanted = command("run", 2)[:7], command("run", 2)[8:]
    script = tmp_path / "differing.py"
    script.write_text(
        "import os, sys\nfrom dql.cli import main\n"
        "sys.exit(main([*sys.argv[1:], '--lr', '1e-' + str(3 + int(os.environ['RANK']))]))\n"
    )
    done = subprocess.run([*start[:-1], str(script), *wanted], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "the processes of this run differ in their settings" in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.fixture
def of_two(monkeypatch):
    """As torchrun would start the first of two processes on GPUs, but for the processes."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)


def test_one_that_fails_on_a_gpu_waits_for_no_other(of_two, monkeypatch):
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("NCCL waits there for the others"))
    with pytest.raises(RunError, match="diverged"), sharded([RunConfig("d", device="cuda")]):
        raise RunError("diverged")


def test_a_process_group_of_somebody_else_is_left_alone(of_two, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(RunError, match="in a process group"):
        sharded([RunConfig("d", device="cuda")]).__enter__()


def test_several_processes_share_nothing_but_a_run_of_train(of_two):
    with pytest.raises(RunError, match="start one"):
        complete(RunConfig("d", device="cpu"))
