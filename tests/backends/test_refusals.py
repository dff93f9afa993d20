"""What every backend refuses, in one sentence with the remedy, and what it makes of values that are no numbers."""

import copy
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import pytest
import torch
from support.backends import NAMES, OF_GPUS, entry, every_variant, not_ready
from support.calls import SMALL, chain_of, refused, sample
from support.cases import EAGER_ALONE, make_problem
from support.networks import A, S, make_critic, make_policy, same_bits, states_of

import dql
from dql.backend.registry import registry
from dql.kernels.cpp import binding
from dql.kernels.layout import DenoiserSpec
from dql.sampler import run_chain

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_listed(name):
    """Where the machine has what it takes: all other tests skip where the backend says that it cannot run."""
    reason = not_ready(name) or (binding.unavailable() if name == "cpp" else None)
    if reason is not None:
        pytest.skip(reason)
    assert dql.backends()[name] is None


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"state_dim": 513}, "it takes state_dim from 1 to 512, and this network has 513"),
        ({"action_dim": 65}, "it takes action_dim from 1 to 64, and this network has 65"),
        ({"hidden_dim": 513}, "it takes hidden_dim from 1 to 512, and this network has 513"),
        ({"num_hidden": 1}, "it takes num_hidden from 2 to 4, and this network has 1"),
        ({"num_hidden": 5}, "it takes num_hidden from 2 to 4, and this network has 5"),
    ],
    ids=str,
)
def test_sizes(backend, sizes, sentence):
    """Which no backend takes but eager: "auto" is that."""
    policy = dql.DiffusionPolicy(**({"state_dim": S, "action_dim": A, "hidden_dim": 16} | sizes))
    assert refused(backend, policy, alone=True) == f"{sentence}; use backend='eager'"
    states = torch.zeros(2, policy.state_dim)
    assert torch.equal(sample("auto", states, policy), sample("eager", states, policy))


@pytest.mark.parametrize("case", EAGER_ALONE, ids=str)
def test_what_eager_alone_takes(backend, case):
    assert refused(backend, make_problem(case, torch.float32).policy, alone=True).endswith("; use backend='eager'")


def test_the_embeddings_size(gpu_backend):
    policy = dql.DiffusionPolicy(S, A, hidden_dim=16, time_dim=66)
    sentence = "it takes time_dim from 4 to 64, and this network has 66; use backend='eager'"
    assert refused(gpu_backend, policy) == sentence


@dataclass(frozen=True)
class Grown(DenoiserSpec):
    """A spec with one field more, as a change to the network would add it."""

    of_tomorrow: bool = False


def grown(on: bool) -> dql.DiffusionPolicy:
    policy = make_policy(**SMALL)
    policy.denoiser.spec = Grown(**asdict(policy.denoiser.spec), of_tomorrow=on)
    return policy


def test_a_field_of_the_network_that_kernels_do_not_read(backend):
    """They refuse it unless it is as by default: nobody gets another network's actions."""
    policy = grown(True)
    assert refused(backend, policy) == "it has no of_tomorrow=True; use backend='eager'"
    sample(backend, states_of(3), grown(False))


def test_a_field_that_the_exported_graph_lacks(tmp_path):
    with pytest.raises(ValueError, match="lacks what this policy has: it has no of_tomorrow=True; run it with dql"):
        grown(True).export_onnx(tmp_path / "policy.onnx")
    assert not any(tmp_path.iterdir())


def test_dtypes(backend):
    """A policy that is cast is refused, though it ran before; one that is cast back runs."""
    policy, states = make_policy(**SMALL), states_of(5)
    with torch.no_grad():
        before = [sample(backend, states, policy) for _ in range(3)]
    for dtype in (torch.float64, torch.bfloat16):
        cast = copy.deepcopy(policy).to(dtype)
        does, _, remedy = refused(backend, cast, alone=True).partition(f" and this policy is {dtype}; ")
        assert does == ("it takes float32 parameters" if backend in OF_GPUS else "it computes in float32")
        assert remedy == "convert it with policy.to(torch.float32)"
        assert torch.equal(sample("auto", states.to(dtype), cast), sample("eager", states.to(dtype), cast))
    policy.double()
    refused(backend, policy)
    policy.float()
    with torch.no_grad():
        assert same_bits([sample(backend, states, policy) for _ in range(3)], before)


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
    sentence = "it runs on the CPU and this policy is on meta; move it with policy.to('cpu')"
    if backend in OF_GPUS:
        sentence = f"{runs.kernels.STAND_IN[0]}=1 runs it on the CPU and this policy is on meta; unset it"
    assert runs.check(chain_of(policy.to("meta"), table)) == sentence


def test_what_stands_in_for_a_gpu_is_taken_by_name_alone(gpu_backend):
    """It is for tests: nobody is to meet it unasked."""
    runs, policy, states = registry()[gpu_backend], make_policy(**SMALL), states_of(3)
    variable, being = runs.kernels.STAND_IN
    sentence = f"it is {being} ({variable}=1), for tests: name it"
    assert runs.only_by_name() == sentence
    with pytest.raises(dql.BackendUnavailable) as caught:
        dql.sample(states, policy, precision="tf32")
    assert f"{gpu_backend}: {sentence}" in str(caught.value)
    assert sample(gpu_backend, states, policy, precision="tf32").shape == (3, A)


# Values that are no numbers

PLACES = ["time_mlp.1.weight", "mid_layer.0.weight", "mid_layer.2.weight", "final_layer.bias"]
VALUES = [math.nan, math.inf, -math.inf, 1e38, -1e38]
WIDTHS = [16, 48, 64]


def broken() -> list[tuple[str, int, float, str]]:
    """Each backend with each value in each place, once; hidden sizes, and the variants of instructions that run here,
    in turn: any two of variant, value, place and size meet, of up to four variants."""
    found = []
    for name in NAMES:
        variants = [variant for variant, reason in entry(name).variants.items() if reason is None]
        ways = [f"{name}-{variant}" for variant in variants] or [name]
        for i, value in enumerate(VALUES):
            for j, where in enumerate(PLACES):
                found.append((ways[(i + j) % len(ways)], WIDTHS[(i + 2 * j) % len(WIDTHS)], value, where))
    return found


@pytest.mark.parametrize(("backend", "hidden_dim", "value", "where"), broken(), indirect=["backend"])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's, of what is meant here
def test_broken_weights_give_what_eager_gives(backend, hidden_dim, value, where):
    """NaN comes out as NaN, and infinity as torch has it or, where it met a zero of a GPU's padding, as NaN; nothing
    hangs or crashes. `sample` and `select` give no NaN away, but where they would have to wait for a GPU to know."""
    policy, states = make_policy(hidden_dim=hidden_dim), states_of(17)
    with torch.no_grad():
        policy.denoiser.get_parameter(where).view(-1)[1] = value
        got, want = (run_chain(states, policy, seed=0, backend=each) for each in (backend, "eager"))  # refuses no NaN
    if math.isinf(value):  # an activation of -infinity is 0 here, its limit; torch's is NaN
        assert backend in OF_GPUS or (want.isnan() | ~got.isnan()).all()
        got, want = (torch.where(got.isnan() | want.isnan(), math.nan, tensor) for tensor in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
    run_chain(states, policy, seed=0, backend=backend).sum().backward()
    for each in (backend, "eager"):
        if registry()[each].finds_bad_states:
            continue
        nan = run_chain(states, policy, seed=0, backend=each).isnan().any()
        with pytest.raises(ValueError, match="the actions are NaN, because the") if nan else nullcontext():
            sample(each, states, policy, seed=0)
        if math.isnan(value):
            with pytest.raises(ValueError, match=f"because the policy's parameter {where!r} holds NaN"):
                dql.select(states, policy, make_critic(), num_candidates=4, seed=0, backend=each)


@every_variant
@pytest.mark.parametrize("size", [1e4, 1e18, 3e38])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_huge_states(backend, size):
    policy = make_policy()
    states = states_of(17).clamp(-1, 1) * size
    with torch.no_grad():
        got, want = (run_chain(states, policy, seed=0, backend=each) for each in (backend, "eager"))
    assert torch.equal(got.isnan(), want.isnan())
    if size < 1e38:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    run_chain(states.requires_grad_(True), policy, seed=0, backend=backend).sum().backward()


@pytest.mark.parametrize(("row", "column", "value"), [(0, 0, math.nan), (36, S - 1, math.inf), (20, 5, -math.inf)])
def test_bad_states_are_found(backend, row, column, value):
    policy, states = make_policy(**SMALL), states_of(37)
    states[row, column] = value
    found = f"hold 1 NaN or infinite values, the first at row {row}, column {column}"
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for _ in range(3):
                with pytest.raises(ValueError, match=found):
                    sample(backend, states, policy)


def test_large_finite_states_are_good(backend):
    """Though their sum overflows."""
    assert sample(backend, torch.full((3, S), 3e38), make_policy(**SMALL)).shape == (3, A)
