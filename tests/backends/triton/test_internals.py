"""Another Triton than those that were tried, and tiles that do not fit what its compiler makes of them."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from support import ROOT, TESTS

import dql
from dql.kernels import limits
from dql.kernels.triton import internals as triton_internals

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

from dql.kernels.layout import CriticSpec, DenoiserSpec
from dql.kernels.triton import launch, tiles
from dql.kernels.triton.chain import chain_bwd_kernel, chain_fwd_kernel
from dql.kernels.triton.critic import CriticRunner
from dql.kernels.triton.packing import packed_sizes
from dql.kernels.triton.runner import ChainRunner
from dql.values import q_values

SPEC = DenoiserSpec(17, 6, 256)


@pytest.fixture
def version(monkeypatch):
    """`version("4.2.0")`: Triton says that it is that one."""
    real = importlib.metadata.version

    def pretend(told: str) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: told if name == "triton" else real(name))
        triton_internals.unsupported.cache_clear()

    yield pretend
    monkeypatch.undo()
    triton_internals.unsupported.cache_clear()


def test_this_triton_has_what_is_needed():
    assert triton_internals.lacks() is None
    assert triton_internals.unsupported() is None


def test_one_that_was_tried_is_not_tried_again(version, monkeypatch):
    monkeypatch.setattr(triton_internals, "lacks", lambda: pytest.fail("it costs a second"))
    for told in ("3.6.0", "3.7.1", "3.8.0", "3.9.0+git1"):
        version(told)
        assert triton_internals.unsupported() is None


def test_one_that_is_too_old(version):
    version("3.5.1")
    assert triton_internals.unsupported() == (
        "it needs Triton 3.6 or newer, and 3.5.1 is installed; pip install -U triton"
    )


def test_a_newer_one_that_does_what_is_needed(version):
    version("3.10.0")
    assert triton_internals.unsupported() is None


def renamed(monkeypatch):
    from triton.compiler import CompiledKernel

    monkeypatch.delattr(CompiledKernel, "_init_handles")
    return "its CompiledKernel has no _init_handles"


def another_launcher(monkeypatch):
    from triton.backends.nvidia.driver import CudaLauncher

    monkeypatch.setattr(CudaLauncher, "__call__", lambda self, grid, stream, *arguments: None)
    return "its launcher takes other arguments (grid, stream)"


def moved(monkeypatch):
    import triton.compiler

    monkeypatch.delattr(triton.compiler, "CompiledKernel")
    return "what is needed of it has changed (ImportError: "


@pytest.mark.parametrize("change", [renamed, another_launcher, moved])
def test_a_newer_one_that_has_changed(version, monkeypatch, change):
    """One sentence, in every place that tells of the backend; the others go on."""
    version("4.2.0")
    missing = change(monkeypatch)
    reason = triton_internals.unsupported()
    assert reason.startswith(f"Triton 4.2.0 is not among those that were tried (3.6 to 3.9), and {missing}")
    assert reason.endswith("; pip install 'triton<4.2', or use backend='cuda' or 'eager'")
    assert dql.backends()["triton"] == reason
    policy, states = dql.DiffusionPolicy(3, 2, hidden_dim=16), torch.zeros(2, 3)
    with pytest.raises(dql.BackendUnavailable) as error:
        dql.sample(states, policy, backend="triton")
    assert reason in str(error.value)
    assert dql.sample(states, policy, backend="eager").shape == (2, 2)


# Tiles


def test_smaller_tiles_come_to_an_end():
    tile, seen = tiles.Tile(64, 64, 4, 8), []
    while (tile := tiles.next_smaller(tile)) is not None:
        seen.append((tile.rows, tile.chunk, tile.stages))
    assert seen == [(64, 64, 3), (64, 64, 2), (64, 32, 2), (64, 16, 2), (32, 16, 2), (16, 16, 2)]


@pytest.mark.parametrize("make", [lambda tile: chain_fwd_kernel(SPEC, "fp32", tile, False, True),
                                  lambda tile: chain_bwd_kernel(SPEC, "bf16", tile)])  # fmt: skip
def test_the_first_that_fits_is_taken(make):
    kernel, asked = make(tiles.Tile(32, 32, 3, 8)), []

    def misfit(candidate):
        asked.append(candidate.tile)
        return None if candidate.tile.chunk == 16 else "too much"

    found = launch.first_that_fits(kernel, misfit)
    assert [(t.rows, t.chunk, t.stages) for t in asked] == [(32, 32, 3), (32, 32, 2), (32, 16, 2)]
    assert found.tile == tiles.Tile(32, 16, 2, 8)
    assert dict(found.constants)["CHUNK"] == 16 and found.num_stages == 2
    with pytest.raises(RuntimeError, match=r"fits this GPU with no tile of its rows: .*; use backend='cuda' or"):
        launch.first_that_fits(kernel, lambda _: "it asks for 9 bytes")


def test_it_is_asked_once_by_the_compilers_figures(monkeypatch):
    """On a GPU that is not there: 99 KB a block, and a compiler that needs 102,400 bytes for three stages."""
    device, compiled = torch.device("cuda", 0), []

    def compile(self, arch):
        compiled.append(self.tile)
        shared = 102_400 if self.tile.stages == 3 else 70_000
        return SimpleNamespace(metadata=SimpleNamespace(name="k", num_warps=8, shared=shared))

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_capability", lambda ordinal: 120)
    monkeypatch.setattr(launch.Kernel, "compile", compile)
    monkeypatch.setattr(triton_internals, "shared_memory", lambda ordinal: 101_376)
    kernel = chain_fwd_kernel.__wrapped__(SPEC, "tf32", tiles.Tile(16, 32, 3, 8), False, False)
    for _ in range(3):
        assert launch.fitting(kernel, device).tile == tiles.Tile(16, 32, 2, 8)
    assert compiled == [tiles.Tile(16, 32, 3, 8), tiles.Tile(16, 32, 2, 8)]
    assert kernel.misfit(0) == "it asks for 102,400 bytes of shared memory; a block of this GPU has 101,376"
    with tiles.forced(kernel.tile):
        assert launch.fitting(kernel, device) is kernel  # whatever fits


def test_numbers_of_32_bits_are_enough():
    """From 3.7 on Triton no longer looks. Each kind of number that kernels take in 32 bits, at its limit."""
    largest = packed_sizes(DenoiserSpec(limits.MAX_STATE_DIM, limits.MAX_ACTION_DIM, limits.MAX_HIDDEN_DIM, 4, 64))
    most = {"K": limits.MAX_STEPS, "n_floats": largest.floats, "n_operands": 2 * largest.operands}
    most |= dict.fromkeys(("R", "B", "N", "parts"), limits.MAX_ROWS)
    most |= dict.fromkeys(("T", "times"), limits.MAX_STEPS)
    choices = ("FIRST", "first", "n", "tell", "of_chain", "only", "maximised")
    in_memory = ("seed", "loss_seed", "only", "maximised", "lr_scale", "weight")
    most |= dict.fromkeys((*choices, *(f"{name}_in_memory" for name in in_memory)), 2)
    source = "".join(path.read_text() for path in Path(launch.__file__).parent.glob("*.py"))
    assert set(re.findall(r'^    (\w+): "i32"', source, re.M)) == set(most)
    assert max(most.values()) < 2**31
    rows, asked = limits.MAX_ROWS + 1, SimpleNamespace(critic=lambda critic: pytest.fail("more rows than kernels take"))
    states, actions = torch.zeros(1, 3).expand(rows, 3), torch.zeros(1, 2).expand(rows, 2)
    critic = create_autospec(dql.TwinCritic, instance=True, return_value="torch's")
    assert q_values(critic, states, actions, asked) == "torch's"


def test_more_are_refused_before_a_launch():
    """By the runners, too: a prepared call is not checked again when it gets another number of rows."""
    runner = ChainRunner(SPEC, torch.zeros(5, 8), torch.zeros(5, SPEC.time_dim), 1.0, "fp32")
    sentence = r"^backend 'triton': it takes up to 1,073,741,824 rows a call; split the states$"
    for B, N in ((limits.MAX_ROWS + 1, 1), (1 << 31, 1), (1 << 20, 1025)):
        with pytest.raises(ValueError, match=sentence):
            runner.plan(B, N)
    critics = CriticRunner(CriticSpec(17, 6, 256), "fp32", torch.device("cpu"))
    with pytest.raises(ValueError, match=sentence):
        critics.forward(torch.zeros(1), torch.zeros(1, 17).expand(1 << 20, 17), torch.zeros(1), 1025, (0, 1), False)
    long = ChainRunner(SPEC, torch.zeros(1001, 8), torch.zeros(1001, SPEC.time_dim), 1.0, "fp32")
    with pytest.raises(ValueError, match="it runs up to 1000 steps, not 1001; use backend='eager'"):
        long.plan(1)


# The interpreter

QUICKENED = """
import sys
import torch
import triton
import triton.language as tl
from dql.kernels.triton.launch import Kernel
from support import interpreter
from support.cases import CASES, run

@triton.jit
def twice(x: "*i32"):
    tl.store(x, tl.load(x) * 2)

def doubled(number):
    x = torch.tensor([number], dtype=torch.int32)
    Kernel.of(twice, num_warps=1).launch((1, 1, 1), x)
    return int(x)

def seen():
    found = [run(CASES[i], "triton", precision=precision) for i, precision in ((0, "fp32"), (3, "fp32"), (1, "bf16"))]
    return found, [doubled(number) for number in (3, -(1 << 30), 1 << 30)]

own, integers = seen()
if not interpreter.quicken():
    sys.exit(77)
quick, integers_of_quick = seen()
assert integers == integers_of_quick == [6, -(1 << 31), -(1 << 31)], (integers, integers_of_quick)
for a, b in zip(own, quick):
    assert all(torch.equal(a[name], b[name]) for name in a)
"""


def test_the_quickened_interpreter_is_the_interpreter(tmp_path, runs_here):
    """To the bit, and where integers overflow."""
    runs_here("triton", on_cpu=True)
    program = tmp_path / "quickened.py"  # Triton reads a kernel's source from its file
    program.write_text(QUICKENED)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT)])}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("this Triton's insides are others: its interpreter stays as it is")
    assert done.returncode == 0, done.stderr
