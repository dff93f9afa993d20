"""Every backend as a caller meets it: seeds, and tensors of any kind. Rows are in `test_rows`, gradients in
`test_gradients`, changes between calls in `test_changes`, `select` in `test_select`, refusals in `test_refusals`; a
GPU's side is in `gpu/test_calls`.
"""

import math

import pytest
import torch
from support.backends import assert_same, every_variant
from support.calls import SMALL, every_gradient, sample
from support.cases import TOLERANCES, assert_close
from support.networks import A, S, make_critic, make_policy, same_bits, states_of

import dql
from dql import noise
from dql.sampler import run_chain

Tensor = torch.Tensor
SEEDS = [0, 1, 2**63, 2**64 - 1]
SEEDS_IN_MEMORY = [0, 7, 2**63 - 1, 2**63, 2**63 + 5, 2**64 - 1]
pytestmark = pytest.mark.usefixtures("poisoned")


# The noise stream


@every_variant
@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_seed_gives_the_same_actions_as_eager(backend, seed):
    policy, states = make_policy(), states_of(50)
    for N in (None, 7):
        with torch.no_grad():
            got, want = (
                dql.sample(states, policy, num_candidates=N, seed=seed, backend=each) for each in (backend, "eager")
            )
        assert_close(got, want, TOLERANCES["float32"], what="actions", case=f"seed {seed}, N={N}", backend=backend)
    given = sample(backend, states, policy, noise=noise.normal(seed, 5, 50, A))
    with torch.no_grad():
        drawn = sample(backend, states, policy, seed=seed)
    assert_close(drawn, given, TOLERANCES["float32"], what="drawn noise", case=f"seed {seed}", backend=backend)


def test_without_a_seed_torch_draws_one(backend):
    policy, states = make_policy(**SMALL), states_of(5)
    results = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        results += [sample(backend, states, policy, seed=None).detach() for _ in range(2)]
    assert same_bits(results[2:4], results[:2])
    for other in (results[1], results[4]):
        assert not torch.equal(other, results[0])


@every_variant
@pytest.mark.parametrize("width", [3, 40])
def test_wide_actions_and_long_chains_draw_the_same_noise(backend, width):
    """Which may be drawn some steps at a time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        policy, states = dql.DiffusionPolicy(S, width, **(SMALL | {"T": 100})), states_of(20)
    with torch.no_grad():
        got, want = sample(backend, states, policy), dql.sample(states, policy, seed=3, backend="eager")
        given = sample(backend, states, policy, noise=noise.normal(3, 100, 20, width))
    assert_close(got, want, TOLERANCES["float32"], what="actions", case=f"A={width}", backend=backend)
    assert_close(got, given, TOLERANCES["float32"], what="drawn noise", case=f"A={width}", backend=backend)


def in_memory(seed: int) -> Tensor:
    """An int64 tensor holds the bits of the seed: from 2^63 on it is negative."""
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed])


@pytest.mark.parametrize("seed", SEEDS_IN_MEMORY)
def test_a_seed_in_memory_is_the_same_stream(seed):
    bits = in_memory(seed)
    for B, width, offset in ((1, 3, 0), (300, 6, 0), (5, 4, 2**32 - 1)):
        got = noise.normal(bits, 3, B, width, offset=offset, dtype=torch.float64)
        want = noise.normal(seed, 3, B, width, offset=offset, dtype=torch.float64)
        assert_close(got, want, TOLERANCES["noise"], what="normals", case=f"seed {seed}")
    part = noise.normal(bits, 3, 4, 3, row_offset=2**32 - 4)
    assert torch.allclose(part, noise.normal(seed, 3, 4, 3, row_offset=2**32 - 4), rtol=1e-6, atol=0)
    assert noise.normal(bits, 3, 0, 3).shape == (3, 0, 3)
    for offset in (0, 2**32 - 1):
        got, want = (noise.uniform(s, 33, offset=offset) for s in (bits, seed))
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("seed", SEEDS_IN_MEMORY)
def test_a_seed_in_memory_gives_the_same_actions(gpu_backend, seed):
    policy, states, bits = make_policy(**SMALL), states_of(9), in_memory(seed)
    with torch.no_grad():
        for each in (gpu_backend, "eager"):
            got, want = (run_chain(states, policy, backend=each, seed=s) for s in (bits, seed))
            assert_close(got, want, TOLERANCES["float32"], what="actions", case=f"seed {seed}", backend=each)
            got, want = (run_chain(states, policy, backend=each, seed=s, num_candidates=2) for s in (bits, seed))
            assert_close(got, want, TOLERANCES["float32"], what="candidates", case=f"seed {seed}", backend=each)


def test_a_seed_in_memory_is_read_by_each_call(gpu_backend):
    policy, states, seed = make_policy(**SMALL), states_of(9), torch.tensor([1])
    with torch.no_grad():
        first = run_chain(states, policy, backend=gpu_backend, seed=seed)
        seed.fill_(2)
        second = run_chain(states, policy, backend=gpu_backend, seed=seed)
        assert torch.equal(second, run_chain(states, policy, backend=gpu_backend, seed=2))
    assert torch.equal(first, run_chain(states, policy, backend=gpu_backend, seed=1))


# Tensors of any kind


@every_variant
def test_inputs_of_any_stride_and_place(backend):
    policy = make_policy(**SMALL)
    wide = states_of(6, 2 * S)
    given = torch.randn(3, 6, A, generator=torch.Generator().manual_seed(1))
    weights = torch.linspace(-1, 1, 6 * A).view(6, A)
    plain = wide[:, ::2].contiguous()

    def outcome(states: Tensor, given: Tensor, weights: Tensor) -> list[Tensor]:
        states = states.detach().requires_grad_(True)
        actions = sample(backend, states, policy, noise=given)
        inputs = [states, *policy.denoiser.parameters()]
        with torch.no_grad():
            assert torch.equal(sample(backend, states, policy, noise=given), actions)
            assert_same(backend, [sample(backend, states, policy)], [sample(backend, plain, policy)], "by a seed")
        return [actions.detach(), *torch.autograd.grad(actions, inputs, weights)]

    def moved(tensor: Tensor) -> Tensor:
        """The same values one element further: at an address that is no multiple of 8 or 16 bytes."""
        longer = torch.full((tensor.numel() + 1,), math.nan)
        copied = longer[1:].view(tensor.shape).copy_(tensor)
        assert copied.data_ptr() % 8 == 4
        return copied

    def turned(tensor: Tensor) -> Tensor:
        copied = tensor.movedim(0, -1).contiguous().movedim(-1, 0)
        assert not copied.is_contiguous()
        return copied

    def sliced(tensor: Tensor) -> Tensor:
        around = torch.full([2 * n + 1 for n in tensor.shape], math.nan)
        inside = around[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return inside.copy_(tensor)

    want = outcome(plain, given, weights)
    assert_same(backend, outcome(wide[:, ::2], given, weights), want, "every second column")
    for change in (moved, turned, sliced):
        assert_same(backend, outcome(change(plain), given, weights), want, change.__name__)
        assert_same(backend, outcome(plain, change(given), weights), want, change.__name__)
        assert_same(backend, outcome(plain, given, change(weights)), want, change.__name__)
    expanded = sample(backend, plain[:1].expand(6, S), policy, noise=given)
    assert_same(backend, [expanded[0]], [want[0][0]], "expanded")
    plain.requires_grad_(True)
    (d_sum,) = torch.autograd.grad(sample(backend, plain, policy, noise=given).sum(), plain)
    (d_ones,) = torch.autograd.grad(sample(backend, plain, policy, noise=given), plain, torch.ones(6, A))
    assert_same(backend, [d_sum], [d_ones], "the gradient of a sum is an expanded scalar")


def test_no_states(backend):
    policy, empty = make_policy(**SMALL), torch.zeros(0, S, requires_grad=True)
    actions = sample(backend, empty, policy)
    assert actions.shape == (0, A)
    actions.sum().backward()
    assert sample(backend, empty, policy, num_candidates=5).shape == (0, 5, A)
    assert dql.select(empty.detach(), policy, make_critic(), backend=backend).shape == (0, A)
    with torch.no_grad():
        for _ in range(3):
            assert sample(backend, empty.detach(), policy).shape == (0, A)


def test_torchs_default_dtype_is_of_no_concern(backend):
    states, critic = states_of(9), make_critic()
    want = sample(backend, states, make_policy(**SMALL))
    chosen = dql.select(states, make_policy(**SMALL), critic, seed=1, backend=backend)
    policy = make_policy(**SMALL)
    torch.set_default_dtype(torch.float64)
    try:
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                got = [sample(backend, states, policy) for _ in range(3)]
            assert all(actions.dtype == torch.float32 and torch.equal(actions, want) for actions in got)
        assert torch.equal(dql.select(states, policy, critic, seed=1, backend=backend), chosen)
    finally:
        torch.set_default_dtype(torch.float32)


# torch.compile


def test_inside_torch_compile(backend):
    """A graph break, across which gradients flow."""
    policy, states = make_policy(**SMALL), states_of(9)

    def doubled(states: Tensor) -> Tensor:
        return sample(backend, states * 2, policy) + 1

    compiled = torch.compile(doubled, backend="eager")
    results = []
    for run in (doubled, compiled):
        inputs = states.clone().requires_grad_(True)
        actions = run(inputs)
        results.append([actions.detach(), *every_gradient(actions, inputs, policy)])
    assert same_bits(results[1], results[0])
    with torch.no_grad():
        assert torch.equal(compiled(states), doubled(states))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(doubled, backend="eager", fullgraph=True)(states)
