"""What the backend "cpp" refuses that others take, that it comes first, and the doctor of a machine without it."""

import subprocess
import sys

import pytest
import torch
from support.calls import chain_of, refused
from support.networks import needs_cpp

import dql
from dql.backend.registry import registry
from dql.kernels.cpp import binding

S, A = 4, 3


@needs_cpp
def test_precision():
    policy = dql.DiffusionPolicy(S, A, hidden_dim=16)
    assert refused("cpp", policy, precision="tf32") == "it has no precision='tf32'; use precision='fp32'"
    with binding.forced("generic"):
        sentence = "precision='bf16' needs a CPU with AVX512_BF16, which this one has not; use precision='fp32'"
        assert refused("cpp", policy, precision="bf16") == sentence
    with pytest.raises(dql.BackendUnavailable) as caught:
        dql.sample(torch.zeros(1, S), policy, precision="tf32")
    chain = chain_of(policy, policy.step_table(), precision="tf32")
    reasons = {name: backend.check(chain) or backend.only_by_name() for name, backend in registry().items()}
    assert reasons["cpp"] == "it has no precision='tf32'; use precision='fp32'"
    assert reasons["eager"] == (
        "it computes in the parameters' own dtype and has no precision='tf32'; use precision='fp32'"
    )
    every = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    assert str(caught.value) == f"no backend can run this problem: {every}"


@needs_cpp
def test_select_refuses_the_same():
    policy, critic = dql.DiffusionPolicy(S, A, hidden_dim=16), dql.TwinCritic(S, A, 16)
    with pytest.raises(dql.BackendUnavailable, match="it has no precision='tf32'"):
        dql.select(torch.zeros(2, S), policy, critic, backend="cpp", precision="tf32")
    with pytest.raises(ValueError, match=r"the critic is torch\.float64 on cpu, the policy is torch\.float32"):
        dql.select(torch.zeros(2, S), policy, critic.double(), backend="cpp")


@needs_cpp
def test_it_is_listed_and_comes_first():
    found = dql.backends()
    assert list(found)[:1] == ["cpp"]
    assert found["cpp"] is None
    policy, states = dql.DiffusionPolicy(S, A, hidden_dim=16), torch.randn(5, S)
    assert torch.equal(dql.sample(states, policy, seed=1), dql.sample(states, policy, seed=1, backend="cpp"))


def without_extension(program: str) -> subprocess.CompletedProcess[str]:
    """A process in which the extension cannot be imported."""
    hide = "import sys\nsys.modules['dql.kernels._native'] = None\n"
    return subprocess.run([sys.executable, "-c", hide + program], capture_output=True, text=True, timeout=120)


def test_the_doctor_without_the_extension():
    done = without_extension("sys.argv = ['dql', 'doctor']\nfrom dql.cli import main\nsys.exit(main())")
    assert done.returncode == 0, done.stderr
    reason = without_extension("import dql; print(dql.backends()['cpp'])").stdout
    letters = "".join(c for c in done.stdout if c not in "│┌┐└┘─┬┴├┤┼" and not c.isspace())  # the table folds its lines
    assert "backendcpp" + "".join(reason.split()) in letters
