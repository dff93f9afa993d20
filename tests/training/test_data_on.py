"""A run whose data are on disk, or staged, is bit for bit the run whose data are in memory."""

import csv
import json
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch
from support.runs import quietly

import dql
import dql.data
import dql.session
import dql.train
from dql.agents import td3_bc
from dql.checkpoint import load_tensors
from dql.config import Config, RunConfig
from dql.data import load_dataset
from dql.rundir import find_checkpoint
from dql.staging import Staging
from dql.train import resume, train


@pytest.fixture
def run_config(pendulum, tmp_path):
    agent = Config(hidden_dim=16, num_hidden=2, batch_size=16, num_updates=25, num_candidates=2, ema_start=4)
    return RunConfig(
        pendulum, agent, run_dir=tmp_path / "run", device="cpu", log_every=10, checkpoint_every=10, eval_every=0
    )


def learnt(run):
    tensors, _ = load_tensors(find_checkpoint(run.run_dir) / "agent.safetensors")
    with (run.run_dir / "metrics.csv").open(newline="") as file:
        rows = [
            {k: v for k, v in row.items() if k not in ("seconds", "updates_per_second")} for row in csv.DictReader(file)
        ]
    return tensors, rows, json.loads((run.run_dir / "config.json").read_text())["dataset"]["fingerprint"]


def assert_same_run(a, b):
    (tensors, *rest), (others, *other_rest) = learnt(a), learnt(b)
    assert rest == other_rest
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.fixture
def staged(monkeypatch):
    """As a GPU has it: the loop stages its batches."""
    monkeypatch.setattr(dql.session, "batches_on", lambda data, device: Staging(data, device, steps=4))


def test_on_disk(run_config, tmp_path):
    for algorithm in ("diffusion-ql", "td3-bc"):
        base = run_config.with_agent(algorithm=algorithm) if algorithm != "diffusion-ql" else run_config
        runs = [replace(base, data_on=on, run_dir=tmp_path / f"{algorithm}-{on}") for on in ("device", "disk")]
        for run in runs:
            quietly(train, run)
        assert_same_run(*runs)


def test_staged(run_config, tmp_path, monkeypatch):
    other = replace(run_config, run_dir=tmp_path / "other", data_on="disk")
    quietly(train, run_config)
    monkeypatch.setattr(dql.session, "batches_on", lambda data, device: Staging(data, device, steps=4))
    quietly(train, other)
    assert_same_run(run_config, other)


def test_resumed_with_the_data_elsewhere(run_config, tmp_path):
    other = replace(run_config, run_dir=tmp_path / "other")
    quietly(train, run_config)
    quietly(train, other.with_agent(num_updates=13))
    quietly(resume, other.run_dir, num_updates=20, data_on="disk")
    assert json.loads((other.run_dir / "config.json").read_text())["run"]["data_on"] == "disk"
    quietly(resume, other.run_dir, num_updates=25, data_on="device")
    assert learnt(run_config)[0].keys() == learnt(other)[0].keys()
    for name, tensor in learnt(run_config)[0].items():
        assert torch.equal(tensor, learnt(other)[0][name]), name
    with pytest.raises(ValueError, match="data_on must be one of"):
        quietly(resume, other.run_dir, data_on="tape")


def test_a_signal_ends_the_thread(run_config, staged, monkeypatch):
    sample = Staging.sample

    def stopped(self, batch_size, seed, step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(self, batch_size, seed, step)

    monkeypatch.setattr(Staging, "sample", stopped)
    result, _ = quietly(train, replace(run_config, data_on="disk"))
    assert (result.stopped_by, result.step) == ("SIGINT", 8)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dql-staging")]


def test_what_auto_does(run_config, monkeypatch):
    data = load_dataset(run_config.dataset)
    bytes_ = data.nbytes
    for on, free, stays in (("auto", 2 * bytes_ - 2, True), ("disk", 1 << 40, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 50))
        placed = dql.train._placed(replace(run_config, data_on=on), data, torch.device("cuda", 0))
        assert (placed.device.type == "cpu") == stays, on
    for on, free in (("auto", 2 * bytes_), ("device", 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 50))
        with pytest.raises(ValueError, match="cuda"):  # it would be moved, were there a GPU
            dql.train._placed(replace(run_config, data_on=on), data, torch.device("cuda", 0))
    monkeypatch.setattr(dql.data, "available_memory", lambda: bytes_)
    for on, on_disk in (("auto", True), ("disk", True), ("device", False)):
        assert dql.train._load(replace(run_config, data_on=on)).on_disk == on_disk, on
    placed = dql.train._placed(run_config, dql.train._load(run_config), torch.device("cpu"))
    assert placed.on_disk


def test_states_are_standardised_in_parts(monkeypatch):
    states = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) * 7 + 100
    agents = [dql.TD3BC(3, 2, Config(algorithm="td3-bc", hidden_dim=16)) for _ in range(2)]
    agents[0].standardize(states)
    monkeypatch.setattr(td3_bc, "_WHOLE", 0)
    monkeypatch.setattr("dql.datasets.info.BLOCK", 700)
    agents[1].standardize(states)
    for name in ("state_mean", "state_std"):  # both in float64, then rounded once
        torch.testing.assert_close(getattr(agents[0], name), getattr(agents[1], name), rtol=2**-23, atol=0)
    with pytest.raises(ValueError, match="NaN"):
        agents[1].standardize(torch.full((900, 3), torch.nan))


def test_the_command_line(dql_here, pendulum, tmp_path):
    flags = ["--hidden-dim", 16, "--num-hidden", 2, "--batch-size", 16, "--eval-every", 0, "--device", "cpu"]
    run = tmp_path / "run"
    base = ["train", "--dataset", pendulum, *flags, "--num-updates", 3, "--run-dir", run]
    assert dql_here(*base, "--data-on", "disk").code == 0
    assert json.loads((run / "config.json").read_text())["run"]["data_on"] == "disk"
    assert dql_here("train", "--resume", run, "--num-updates", 4, "--data-on", "auto").code == 0
    assert json.loads((run / "config.json").read_text())["run"]["data_on"] == "auto"
    assert dql_here("train", "--resume", run, "--data-on", "tape").code != 0
