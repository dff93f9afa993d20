"""What the backend "triton" keeps between calls, in the interpreter, and how it does without Triton."""

import importlib.util

import pytest
from support.calls import SMALL, refused
from support.networks import make_policy, states_of

import dql
from dql.kernels.triton import _installed

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

from dql.kernels.triton.runner import ChainRunner

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")


def test_what_no_gradient_needs_has_no_memory():
    policy = make_policy()
    dql.sample(states_of(40), policy, backend="triton")
    kept = policy.step_table().kept.values()  # of all policies with this table
    runner = next(r for r in kept if isinstance(r, ChainRunner) and r.spec == policy.denoiser.spec)
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
