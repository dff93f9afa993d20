"""1,000 malformed inputs: each is refused by a sentence, or does nothing. The inputs are those of `fuzz.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")
SECONDS = 120  # of a kind that takes 5 to 15; one that hangs ends here
COUNTS = {"calls": 250, "commands": 200, "hdf5": 200, "json": 150, "tensors": 200}


def fuzz(folder: Path, kind: str, count: int, seed: int) -> dict:
    path = os.pathsep.join(filter(None, [str(FUZZ.parents[1]), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(FUZZ), kind, str(count), str(seed)]
    with (folder / "inputs.txt").open("w") as inputs:  # the last one is what a signal or a hang was met at
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=inputs, text=True, timeout=SECONDS
        )
    last = (folder / "inputs.txt").read_text(errors="replace").splitlines()[-20:]
    assert done.returncode == 0, f"{kind}: it ended with {done.returncode} at\n" + "\n".join(last)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", COUNTS)
def test_malformed_inputs(tmp_path, kind):
    folder = tmp_path / "here"
    folder.mkdir()
    found = fuzz(folder, kind, COUNTS[kind], seed=0)
    assert found["faults"] == []
    assert found["refused"] + found["harmless"] == COUNTS[kind]
    assert found["refused"] > COUNTS[kind] // 4
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_fault_would_be_found(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    found = fuzz(folder, "planted", 5, seed=0)
    assert (found["harmless"], found["refused"], len(found["faults"])) == (2, 2, 5)
    for part in ("write: touched open", "start: touched os.system", "long: a sentence of", "long: more than a line"):
        assert any(part in fault for fault in found["faults"]), part
    assert any("unforeseen: AttributeError" in fault for fault in found["faults"])


def test_thousand():
    assert sum(COUNTS.values()) == 1000
