"""The tests of `support/calls.py` and `support/refusals.py` with the backend "triton", in Triton's interpreter, and how
a machine does without it. Whether its numbers are right is in `triton/test_chain`; a GPU's side in `gpu/test_calls`.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from support.calls import *  # noqa: F403
from support.calls import SMALL
from support.cases import not_interpreted
from support.networks import make_policy, states_of
from support.refusals import *  # noqa: F403
from support.refusals import refused

import dql
from dql.kernels.triton import _installed

if (reason := not_interpreted()) is not None:
    pytest.skip(reason, allow_module_level=True)

from dql.kernels.triton import runner as chain_runner
from dql.kernels.triton.tiles import Tile


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.fixture
def tiles_of_16_rows(monkeypatch):
    monkeypatch.setattr(chain_runner, "choose", lambda arch, processors, shape: Tile(16, 16, 2, 4))


def test_what_no_gradient_needs_has_no_memory():
    policy = make_policy()
    dql.sample(states_of(40), policy, backend="triton")
    kept = policy.step_table().kept.values()  # of all policies with this table
    runner = next(r for r in kept if isinstance(r, chain_runner.ChainRunner) and r.spec == policy.denoiser.spec)
    with_save, without = (runner.plan(40, save=save) for save in (True, False))
    assert without.n_operands + without.n_floats < 0.3 * (with_save.n_operands + with_save.n_floats)


def test_without_triton(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *package: None if name == "triton" else find_spec(name, *package)
    )
    _installed.cache_clear()
    try:
        sentence = dql.backends()["triton"]
        assert sentence.startswith("Triton is not installed; pip install ")
        assert refused("triton", make_policy(**SMALL)) == sentence
    finally:
        _installed.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu():
    """In a process that is not told to interpret. Triton is not even imported to find out."""
    program = """
import json, sys, torch, dql
policy, states = dql.DiffusionPolicy(4, 3, hidden_dim=16), torch.zeros(2, 4)
said = {"listed": dql.backends()["triton"], "auto": dql.sample(states, policy).shape == (2, 3)}
try:
    dql.sample(states, policy, backend="triton")
except dql.BackendUnavailable as error:
    said["refused"] = str(error)
said["imported"] = "triton" in sys.modules
print(json.dumps(said))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    sentence = "no CUDA device: torch.cuda.is_available() is False; see `dql doctor`"
    assert said["listed"] == sentence
    assert said["refused"].startswith(f"backend 'triton' cannot run this: {sentence} (able to: ")
    assert said["auto"] is True
    assert said["imported"] is False


def test_it_is_listed():
    assert dql.backends()["triton"] is None
