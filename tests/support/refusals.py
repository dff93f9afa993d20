"""What the backends with kernels for GPUs refuse, in one sentence with the remedy, and what they make of values that
are no numbers: the tests that `triton/test_calls` and `cuda/test_check` share. Each has a fixture `backend`, its name.
"""

import copy
import math

import pytest
import torch

import dql
from dql.backend.base import Chain
from dql.backend.registry import registry
from dql.sampler import run_chain
from support.calls import SMALL, sample
from support.networks import A, S, make_policy, same_bits, states_of

Tensor = torch.Tensor


def refused(backend: str, policy: dql.DiffusionPolicy) -> str:
    """The sentence by which the backend refuses, the same in every call; eager can."""
    states = torch.zeros(2, policy.state_dim, dtype=policy.dtype)
    sentences = set()
    for gradients in (True, False):
        for N in (None, 2, None):
            with torch.set_grad_enabled(gradients), pytest.raises(dql.BackendUnavailable) as caught:
                sample(backend, states, policy, num_candidates=N)
            sentences.add(str(caught.value))
    (said,) = sentences
    head, _, rest = said.partition(f"backend {backend!r} cannot run this: ")
    sentence, _, able = rest.partition(" (able to: ")
    assert head == "" and "\n" not in sentence and able.endswith("eager)")
    assert dql.sample(states, policy, backend="eager").isfinite().all()
    return sentence


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"state_dim": 513}, "it takes state_dim from 1 to 512, and this network has 513"),
        ({"action_dim": 65}, "it takes action_dim from 1 to 64, and this network has 65"),
        ({"hidden_dim": 513}, "it takes hidden_dim from 1 to 512, and this network has 513"),
        ({"num_hidden": 1}, "it takes num_hidden from 2 to 4, and this network has 1"),
        ({"num_hidden": 5}, "it takes num_hidden from 2 to 4, and this network has 5"),
        ({"time_dim": 66}, "it takes time_dim from 4 to 64, and this network has 66"),
    ],
    ids=str,
)
def test_sizes(backend, sizes, sentence):
    policy = dql.DiffusionPolicy(**({"state_dim": S, "action_dim": A, "hidden_dim": 16} | sizes))
    assert refused(backend, policy) == f"{sentence}; use backend='eager'"


def test_dtypes(backend):
    """A policy that is cast is refused, though it ran before; one that is cast back runs."""
    policy, states = make_policy(**SMALL), states_of(5)
    with torch.no_grad():
        before = [sample(backend, states, policy) for _ in range(3)]
    for dtype in (torch.float64, torch.bfloat16):
        sentence = f"it takes float32 parameters and this policy is {dtype}; convert it with policy.to(torch.float32)"
        assert refused(backend, copy.deepcopy(policy).to(dtype)) == sentence
    policy.double()
    refused(backend, policy)
    policy.float()
    with torch.no_grad():
        assert same_bits([sample(backend, states, policy) for _ in range(3)], before)


def chain_of(policy: dql.DiffusionPolicy, table: dql.StepTable, candidates: int = 1) -> Chain:
    denoiser = policy.denoiser
    states = torch.zeros(1, policy.state_dim, device=policy.device)
    return Chain(
        denoiser.buffer, denoiser.weights, denoiser.spec, states, candidates, None, 0, table, 1.0, "fp32", denoiser.kept
    )


def test_steps_rows_and_devices(backend):
    """Which `sample` refuses before any backend is asked, or cannot have."""
    policy, runs = dql.DiffusionPolicy(S, A, hidden_dim=16, T=1000), registry()[backend]
    table = policy.step_table()
    assert runs.check(chain_of(policy, table)) is None
    longer = dql.StepTable("own", table.rows + table.rows[-1:], (1000, *table.timesteps), True)
    assert runs.check(chain_of(policy, longer)) == "it runs up to 1000 steps, not 1001; use backend='eager'"
    assert runs.check(chain_of(policy, table, 1 << 30)) is None
    sentence = "it takes up to 1,073,741,824 rows a call; split the states"
    assert runs.check(chain_of(policy, table, (1 << 30) + 1)) == sentence
    sentence = f"{runs.kernels.STAND_IN[0]}=1 runs it on the CPU and this policy is on meta; unset it"
    assert runs.check(chain_of(policy.to("meta"), table)) == sentence


# Values that are no numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("where", ["time_mlp.1.weight", "mid_layer.0.weight", "mid_layer.2.weight", "final_layer.bias"])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's, of what is meant here
def test_broken_weights_give_what_eager_gives(backend, value, where):
    """NaN comes out as NaN, and an infinity as torch has it or, where it met a zero of the padding, as NaN."""
    policy, states = make_policy(**SMALL), states_of(17)
    with torch.no_grad():
        policy.denoiser.get_parameter(where).view(-1)[1] = value
        got, want = (run_chain(states, policy, seed=0, backend=each) for each in (backend, "eager"))  # refuses no NaN
    if math.isinf(value):  # an activation of -infinity is 0 here, its limit; torch's is NaN
        got, want = (torch.where(got.isnan() | want.isnan(), math.nan, tensor) for tensor in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_bad_states_are_found(backend):
    policy, states = make_policy(**SMALL), states_of(37)
    states[20, 5] = math.inf
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(ValueError, match="hold 1 NaN or infinite values, the first at row 20, column 5"):
                sample(backend, states, policy)
