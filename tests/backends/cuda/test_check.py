"""What the backend "cuda" refuses, in one sentence with the remedy, and how a machine does without it: the tests of
`support/refusals.py`, and what is its own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.calls import SMALL, poisoned_memory  # noqa: F401
from support.emulator import skip_without_emulator
from support.networks import A, make_policy, states_of
from support.refusals import *  # noqa: F403
from support.refusals import chain_of, refused

import dql
from dql.backend.registry import registry
from dql.kernels.cuda import binding
from dql.kernels.cuda import plan as cuda_plan

skip_without_emulator()


@pytest.fixture
def backend() -> str:
    return "cuda"


def test_it_is_listed_and_taken_by_name_alone():
    """The emulator is for tests: nobody is to meet it unasked."""
    assert dql.backends()["cuda"] is None
    sentence = "it is emulated (DQL_CUDA_EMULATE=1), for tests: name it"
    assert registry()["cuda"].only_by_name() == sentence
    assert list(dql.backends()) == ["cpp", "cuda", "triton", "eager"]
    policy, states = make_policy(**SMALL), states_of(3)
    with pytest.raises(
        dql.BackendUnavailable, match=r"cuda: it is emulated \(DQL_CUDA_EMULATE=1\), for tests: name it"
    ):
        dql.sample(states, policy, precision="tf32")
    assert dql.sample(states, policy, precision="tf32", backend="cuda").shape == (3, A)


def test_shared_memory(monkeypatch):
    """Of a GPU that is not here: all that a plan asks of it are these facts."""
    monkeypatch.setattr(binding, "facts", lambda ordinal, emulated: (89, 128, 99 * 1024, False))
    cuda_plan._chosen.cache_clear()
    try:
        sentence = refused("cuda", dql.DiffusionPolicy(512, 64, hidden_dim=512, num_hidden=4))
        assert sentence.startswith("a network of these sizes needs ")
        assert "KB of shared memory in fp32, and a block of this GPU has 99 KB; use " in sentence
        policy = make_policy(**SMALL)
        assert registry()["cuda"].check(chain_of(policy, policy.step_table())) is None
    finally:
        cuda_plan._chosen.cache_clear()


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        ((0, 13000), "there is no NVIDIA driver here; see `dql doctor`"),
        (
            (12080, 13000),
            "the driver is for CUDA 12.8 and the extension was built with 13.0; install a newer driver",
        ),
    ],
    ids=["none", "too old"],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_drivers(versions, sentence, monkeypatch):
    monkeypatch.setattr(binding, "versions", lambda: versions)
    assert binding._no_device() == sentence


def alone(program: str, emulate: bool, hidden: str = "") -> dict:
    """What a process of its own prints, as JSON; in it one module cannot be imported."""
    hide = f"import sys\nsys.modules[{hidden!r}] = None\n" if hidden else ""
    environment = {name: value for name, value in os.environ.items() if name != "DQL_CUDA_EMULATE"}
    environment |= {"DQL_CUDA_EMULATE": "1"} if emulate else {}
    done = subprocess.run(
        [sys.executable, "-c", hide + program], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PROGRAM = """
import json, sys, torch, dql
policy, critic, states = dql.DiffusionPolicy(4, 3, hidden_dim=16), dql.TwinCritic(4, 3, 16), torch.zeros(2, 4)
said = {"loaded": "dql.kernels._cuda" in sys.modules, "listed": dql.backends()["cuda"]}
said["auto"] = dql.sample(states, policy).shape == dql.select(states, policy, critic).shape == (2, 3)
agent = dql.DiffusionQL(4, 3, dql.Config(hidden_dim=16))
batch = dql.Batch(states, torch.zeros(2, 3), torch.zeros(2), states, torch.ones(2))
said["update"] = sorted(agent.update(batch))[0]
for name, call in {
    "sample": lambda: dql.sample(states, policy, backend="cuda"),
    "select": lambda: dql.select(states, policy, critic, backend="cuda"),
}.items():
    try:
        call()
    except dql.BackendUnavailable as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def check_said(said: dict) -> str:
    """Everything runs by another backend; "cuda" says why not, in the same words everywhere. Gives the words."""
    assert said["auto"] is True and said["update"] == "actor/bc_loss"
    assert said["listed"] and "\n" not in said["listed"]
    for call in ("sample", "select"):
        assert said[call].startswith(f"backend 'cuda' cannot run this: {said['listed']} (able to: ")
    return said["listed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu():
    """In a process that is not told to emulate. Importing dql loads nothing."""
    said = alone(PROGRAM, emulate=False)
    assert said["loaded"] is False
    sentence = check_said(said)
    no_driver = "there is no NVIDIA driver here; see `dql doctor`", "no CUDA device: torch.cuda.is_available() is False"
    assert sentence.startswith((*no_driver, "the CUDA extension cannot be used: ", "the driver is for CUDA "))


def test_without_the_extension():
    sentence = check_said(alone(PROGRAM, emulate=False, hidden="dql.kernels._cuda"))
    assert sentence.startswith("the CUDA extension cannot be used: ")


def test_without_the_emulator():
    sentence = check_said(alone(PROGRAM, emulate=True, hidden="dql.kernels._cuda_emulated"))
    assert sentence == (
        "DQL_CUDA_EMULATE=1 needs the emulated kernels; run python setup.py build_cuda_emulator, or unset it"
    )
