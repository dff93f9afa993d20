"""`dql train --profile`: the parts of an update, and a trace that viewers open."""

import json

import pytest
import torch

from dql.config import Config, RunConfig
from dql.kernels.cpp.binding import PHASES
from dql.profile import profile
from dql.rundir import RunError

SMALL = {"hidden_dim": 32, "num_hidden": 2, "batch_size": 32}


def spans(path):
    """The trace's complete events: Chrome's format, which Perfetto opens, too."""
    events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


@pytest.mark.parametrize("algorithm", ["diffusion-ql", "diffusion-bc"])
def test_the_phases_of_a_native_update(algorithm, pendulum, tmp_path, runs_here):
    runs_here("cpp")
    run = RunConfig(pendulum, Config(algorithm=algorithm, backend="cpp", **SMALL), device="cpu", threads=1)
    found = profile(run, tmp_path / "new" / "trace.json", updates=40)
    names = {part.name for part in found.parts}
    learnt = algorithm == "diffusion-ql"
    assert names == {"outside of the native call", *(PHASES if learnt else (PHASES[0], PHASES[5], PHASES[9]))}
    traced = spans(found.trace)
    calls = [span for span in traced if span["tid"] == 0]
    assert sum(int(span["name"].split()[0]) for span in calls) == 40
    for name in names - {"outside of the native call"}:
        mine = [span for span in traced if span["name"] == name]
        assert len(mine) == 40
        # The clocks are one: each phase lies within a call of native code, to the microsecond that ts is given in.
        assert all(any(c["ts"] - 1 <= s["ts"] <= c["ts"] + c["dur"] + 1 for c in calls) for s in mine)
        (part,) = [part for part in found.parts if part.name == name]
        assert sum(span["dur"] for span in mine) / 40_000 == pytest.approx(part.host_ms, rel=1e-6)
    # every nanosecond of the calls is in some part
    assert sum(part.host_ms for part in found.parts) == pytest.approx(sum(c["dur"] for c in calls) / 40_000, rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]  # no run was begun


def test_torchs_operations(pendulum, tmp_path):
    run = RunConfig(pendulum, Config(algorithm="iql", hidden_dim=16), device="cpu")
    found = profile(run, tmp_path / "trace.json", updates=3)
    (addmm,) = [part for part in found.parts if part.name == "aten::addmm"]
    assert addmm.calls == int(addmm.calls) > 0
    assert addmm.host_ms > 0 == addmm.device_ms
    assert found.update_ms > 0 and found.device == torch.device("cpu")
    assert any(span["name"] == "aten::addmm" for span in spans(found.trace))


def test_the_command(dql, pendulum, tmp_path):
    flags = ["train", "--dataset", pendulum, "--device", "cpu", "--hidden-dim", "16", "--num-hidden", "2"]
    done = dql(*flags, "--profile", tmp_path)
    assert "is a folder; name a file in it" in done.refused()
    done = dql(*flags, "--seeds", "0-1", "--profile", tmp_path / "t.json")
    assert "leave --seeds out" in done.refused()
    done = dql(*flags, "--profile", tmp_path / "t.json")
    assert done.code == 0, done.err
    assert "an update takes" in done.out and "perfetto" in done.out


def test_one_of_several_processes_is_refused(tmp_path, monkeypatch):
    """It would measure the update of one, and all would write one file."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="measures an update of one process"):
        profile(RunConfig("d"), tmp_path / "trace.json")
    assert not (tmp_path / "trace.json").exists()
