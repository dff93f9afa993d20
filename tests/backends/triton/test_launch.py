"""What reaches the driver in a prepared call of the backend "triton", which is no interpreter's: with a stubbed driver.

Nothing of it is run under TRITON_INTERPRET=1, which the other tests may set here: it is another process.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from support import ROOT

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

CALLS = """
import json, sys
import torch
import dql
import stubbed
from dql.kernels.triton import chain, prologue

if (reason := stubbed.impossible("triton")) is not None:
    sys.exit(reason)
torch.manual_seed(0)
policy, states, launched = dql.DiffusionPolicy(17, 6, hidden_dim=32), torch.zeros(40, 17), []
allocated, new_empty = [], torch.Tensor.new_empty

def seen(tensor, *size):
    allocated.append(new_empty(tensor, *size))
    return allocated[-1]

told = {}
with torch.no_grad():
    for precision in ("fp32", "bf16"):
        with stubbed.driver("triton", policy, launched):
            for _ in range(3):
                launched.clear(), allocated.clear()
                torch.Tensor.new_empty = seen
                dql.sample(states, policy, backend="triton", seed=(1 << 64) - 1, precision=precision)
                torch.Tensor.new_empty = new_empty
            (runner,) = (made for key, made in policy.step_table().kept.items() if key[0] == "triton")
            plan = runner.plan(40)
            told[precision] = {
                "launched": [(name, grid, arguments) for name, grid, arguments in launched],
                "constants": [len(plan.prologue.kernel.constants), len(plan.kernel.constants)],
                "parameters": [len(plan.prologue.kernel.signature()[0]), len(plan.kernel.signature()[0])],
                "buffer": [allocated[0].data_ptr(), 4 * allocated[0].numel()],
                "allocated": len(allocated),
                "n_floats": plan.n_floats, "n_operands": plan.n_operands,
                "table": runner.table.data_ptr(), "embedding": runner.embedding.data_ptr(),
                "flat": policy.denoiser.buffer.data_ptr(), "states": states.data_ptr(),
                "rows": plan.kernel.tile.rows, "index": [len(i) for i in plan.prologue.index],
            }
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "bench"), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", CALLS], env=environment, capture_output=True, text=True, timeout=120)
    if done.stderr.startswith("this Triton's launcher"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_prepared_call_launches(told, precision):
    """Every pointer is an address of the tensor that it is to be, and inside it; constants are None, and as many."""
    seen = told[precision]
    (first, grid, of_prologue), (second, chain_grid, of_chain) = seen["launched"]
    assert (first, second) == ("prologue", "chain_fwd")
    assert [len(of_prologue), len(of_chain)] == seen["parameters"]
    for arguments, constants in zip((of_prologue, of_chain), seen["constants"], strict=True):
        assert arguments[-constants:] == [None] * constants
    base, size = seen["buffer"]
    operands = base + 4 * seen["n_floats"]
    width = 2 if precision == "bf16" else 4
    assert operands % 16 == base % 16 == 0 and operands + width * seen["n_operands"] == base + size
    assert of_prologue[0] == seen["flat"] and of_prologue[3:7] == [seen["embedding"], seen["states"], base, operands]
    assert of_prologue[8:13] == [*seen["index"], 5, 40, 1]  # n_floats, n_operands, K, B, whether to tell
    assert grid[1:] == chain_grid[1:] == [1, 1] and chain_grid[0] == -(-40 // seen["rows"])
    assert of_chain[:4] == [base, operands, seen["table"], None]
    assert of_chain[6:13] == [-1, 1.0, 40, 40, 1, 5, 0]  # the seed's bits, max_action, R, B, N, K, no seed in memory


def test_the_scratch_is_one_allocation(told):
    """Beside the actions, which on the CPU are made in another way."""
    assert [seen["allocated"] for seen in told.values()] == [1, 1]
