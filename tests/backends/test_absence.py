"""A machine without a backend: everything runs by another, and it says why not, in the same words everywhere."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from support.backends import OF_GPUS

from dql.backend.registry import registry

PROGRAM = """
import json, sys, torch, dql
from dql.kernels.cpp import binding
name, first = sys.argv[1:]
policy, critic, states = dql.DiffusionPolicy(4, 3, hidden_dim=16), dql.TwinCritic(4, 3, 16), torch.zeros(2, 4)
said = {"loaded": "dql.kernels._cuda" in sys.modules, "listed": dql.backends()[name]}
for call, run in {
    "sample": lambda: dql.sample(states, policy, backend=name),
    "select": lambda: dql.select(states, policy, critic, backend=name),
}.items():
    try:
        run()
    except dql.BackendUnavailable as error:
        said[call] = str(error)
said["variants"] = binding.variants()
with torch.no_grad():
    auto, by_name = (
        [dql.sample(states, policy, seed=1, backend=b) for _ in range(2)]
        + [dql.select(states, policy, critic, seed=1, backend=b)] for b in ("auto", first)
    )
said["same"] = all(a.shape == (2, 3) and torch.equal(a, b) for a, b in zip(auto, by_name))
said["triton"] = "triton" in sys.modules
dql.sample(states, policy).sum().backward()
agent = dql.DiffusionQL(4, 3, dql.Config(hidden_dim=16))
batch = dql.Batch(states, torch.zeros(2, 3), torch.zeros(2), states, torch.ones(2))
said["update"] = sorted(agent.update(batch))[0]
try:
    dql.sample(torch.full((2, 4), float("nan")), policy)
except ValueError as error:
    said["nan"] = str(error)
print(json.dumps(said))
"""
STAND_INS = ("TRITON_INTERPRET", "DQL_CUDA_EMULATE")


def able(backend: str, *stand_ins: str) -> list[str]:
    """Who runs tensors on the CPU where that backend cannot, in the order of "auto"; it passes stand-ins over."""
    others = [name for name in registry() if name != backend]
    return [name for name in others if name in stand_ins or (name not in OF_GPUS and registry()[name].check() is None)]


def alone(backend: str, hidden: str = "", **environment: str) -> dict:
    """What a process of its own says in which a module cannot be imported and nothing stands in for a GPU, unless it is
    told to."""
    hide = f"import sys\nsys.modules[{hidden!r}] = None\n" if hidden else ""
    environment = {name: value for name, value in os.environ.items() if name not in STAND_INS} | environment
    command = [sys.executable, "-c", hide + PROGRAM, backend, able(backend)[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def reason(said: dict, backend: str, *stand_ins: str) -> str:
    """The words, the same everywhere."""
    assert said["same"] is True and said["update"] == "actor/bc_loss"
    assert "hold 8 NaN or infinite values" in said["nan"]
    assert said["listed"] and "\n" not in said["listed"]
    for call in ("sample", "select"):
        others = ", ".join(able(backend, *stand_ins))
        assert said[call] == f"backend {backend!r} cannot run this: {said['listed']} (able to: {others})"
    return said["listed"]


def test_without_the_extension_of_cpp():
    said = alone("cpp", hidden="dql.kernels._native")
    assert reason(said, "cpp")
    assert said["variants"] == {}


def test_auto_is_no_stand_in_though_it_is_able(runs_here):
    runs_here("triton", on_cpu=True)
    assert reason(alone("cpp", hidden="dql.kernels._native", TRITON_INTERPRET="1"), "cpp", "triton")


def test_without_the_extension_of_cuda():
    said = alone("cuda", hidden="dql.kernels._cuda")
    assert reason(said, "cuda").startswith("the CUDA extension cannot be used: ")


def test_without_the_emulator():
    said = alone("cuda", hidden="dql.kernels._cuda_emulated", DQL_CUDA_EMULATE="1")
    assert reason(said, "cuda") == (
        "DQL_CUDA_EMULATE=1 needs the emulated kernels; run python setup.py build_cuda_emulator, or unset it"
    )


NO_GPU = "no CUDA device: torch.cuda.is_available() is False; see `dql doctor`"
NO_CUDA = (
    "there is no NVIDIA driver here; see `dql doctor`",
    "the CUDA extension cannot be used: ",
    "the driver is for ",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("backend", "sentences"), [("cuda", (NO_GPU, *NO_CUDA)), ("triton", (NO_GPU,))])
def test_without_a_gpu(backend, sentences):
    """In a process that is told of no stand-in. Importing dql loads nothing, nor is Triton imported to find out."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: it says so, and not that there is no GPU")
    said = alone(backend)
    assert reason(said, backend).startswith(sentences)
    assert said["loaded"] is False and said["triton"] is False
