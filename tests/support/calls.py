"""A backend with kernels for GPUs as a caller meets it: seeds, batches, strides, gradients, changes between calls. The
tests that `triton/test_calls` and `cuda/test_calls` share; kernels are interpreted or emulated on the CPU.

Each of them has the fixtures `backend`, its name, and `tiles_of_16_rows`, with which rows are always cut into those.
"""

import math

import pytest
import torch

import dql
from dql import noise
from dql.backend.gpu import GpuBackend
from dql.sampler import run_chain
from support.cases import TOLERANCES, assert_close
from support.networks import A, S, make_policy, same_bits, states_of

Tensor = torch.Tensor
SEEDS = [0, 1, 2**63, 2**64 - 1]
SMALL = {"hidden_dim": 16, "num_hidden": 2, "T": 3}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch fills what it allocates with NaN, as its deterministic mode does: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def sample(backend: str, states: Tensor, policy: dql.DiffusionPolicy, **options: object) -> Tensor:
    given: dict = {"seed": 3} | options
    if "noise" in options:
        del given["seed"]
    return dql.sample(states, policy, backend=backend, **given)


def every_gradient(actions: Tensor, states: Tensor, policy: dql.DiffusionPolicy) -> list[Tensor]:
    """Of the states (if they require one) and of all parameters, for a fixed loss."""
    weights = torch.linspace(-1, 1, actions.numel()).view_as(actions)
    inputs = ([states] if states.requires_grad else []) + list(policy.denoiser.parameters())
    return list(torch.autograd.grad(actions, inputs, weights, retain_graph=True))


# The noise stream


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


@pytest.mark.parametrize("width", [3, 40])
def test_wide_actions_and_long_chains_draw_the_same_noise(backend, width):
    policy, states = dql.DiffusionPolicy(S, width, **(SMALL | {"T": 20})), states_of(5)
    with torch.no_grad():
        got, want = sample(backend, states, policy), dql.sample(states, policy, seed=3, backend="eager")
    assert_close(got, want, TOLERANCES["float32"], what="actions", case=f"A={width}", backend=backend)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 2**63, 2**63 + 5, 2**64 - 1])
def test_a_seed_in_memory_is_the_same_stream(backend, seed):
    """An int64 tensor holds the bits of the seed: from 2^63 on it is negative."""
    bits = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
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
    policy, states = make_policy(**SMALL), states_of(9)
    with torch.no_grad():
        for each in (backend, "eager"):
            got, want = (run_chain(states, policy, backend=each, seed=s) for s in (bits, seed))
            assert_close(got, want, TOLERANCES["float32"], what="actions", case=f"seed {seed}", backend=each)
            got, want = (run_chain(states, policy, backend=each, seed=s, num_candidates=2) for s in (bits, seed))
            assert_close(got, want, TOLERANCES["float32"], what="candidates", case=f"seed {seed}", backend=each)


def test_a_seed_in_memory_is_read_by_each_call(backend):
    policy, states, seed = make_policy(**SMALL), states_of(9), torch.tensor([1])
    with torch.no_grad():
        first = run_chain(states, policy, backend=backend, seed=seed)
        seed.fill_(2)
        second = run_chain(states, policy, backend=backend, seed=seed)
        assert torch.equal(second, run_chain(states, policy, backend=backend, seed=2))
    assert torch.equal(first, run_chain(states, policy, backend=backend, seed=1))


# Rows


@pytest.mark.parametrize("activation", ["mish", "relu"])
def test_a_row_does_not_depend_on_the_others(backend, activation, tiles_of_16_rows):
    """To the last bit, nor does its gradient, in the same place of a tile; NumPy's product rounds by the place."""
    policy, states = make_policy(activation=activation, T=2), states_of(40)
    given = torch.randn(2, 40, A, generator=torch.Generator().manual_seed(1))

    def run_rows(states: Tensor, rows: slice) -> list[Tensor]:
        inputs = states[rows].requires_grad_(True)
        actions = sample(backend, inputs, policy, noise=given[:, rows])
        return [actions.detach(), torch.autograd.grad(actions.square().sum(), inputs)[0]]

    whole = run_rows(states, slice(None))
    for rows in (slice(0, 1), slice(0, 15), slice(0, 16), slice(0, 17), slice(0, 39), slice(16, 40), slice(32, 33)):
        assert same_bits(run_rows(states, rows), [tensor[rows] for tensor in whole]), rows
    for rows in (slice(39, 40), slice(7, 30), slice(1, 40)):
        for got, tensor in zip(run_rows(states, rows), whole, strict=True):
            assert_close(got, tensor[rows], TOLERANCES["float32"], what="a row", case=rows)
    others = torch.cat([states_of(20), states[20:]])
    assert same_bits([tensor[20:] for tensor in run_rows(others, slice(None))], [tensor[20:] for tensor in whole])


def test_the_tile_changes_last_bits_alone(backend):
    policy, states = make_policy(), states_of(70)
    given = torch.randn(5, 70, A, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = sample(backend, states, policy, noise=given)
        for B in (1, 17, 65):  # a tile of 16, 32, 256 rows
            part = sample(backend, states[:B], policy, noise=given[:, :B])
            assert_close(part, whole[:B], TOLERANCES["rows"], what="actions", case=f"the first {B} of 70")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("N", [1, 3, 14])
def test_candidates_share_their_state(backend, N, precision, tiles_of_16_rows):
    """They are as repeated states, and the state's gradient is the sum of theirs."""
    policy, states = make_policy(**SMALL), states_of(9).requires_grad_(True)
    candidates = sample(backend, states, policy, num_candidates=N, precision=precision)
    repeated = states.detach().repeat_interleave(N, 0).requires_grad_(True)
    alone = sample(backend, repeated, policy, precision=precision)
    assert candidates.shape == (9, N, A)
    d_states, *d_parameters = every_gradient(candidates, states, policy)
    d_repeated, *want = every_gradient(alone, repeated, policy)
    got, want = [candidates, d_states, *d_parameters], [alone, d_repeated.view(9, N, S).sum(1), *want]
    for i, (tensor, wanted) in enumerate(zip(got, want, strict=True)):
        tolerance = TOLERANCES["float32" if precision == "fp32" else "bf16"]
        assert_close(tensor.view(wanted.shape), wanted, tolerance, what=f"tensor {i}")
    one = sample(backend, states[:1].detach(), policy, num_candidates=N, precision=precision)
    assert torch.equal(one, candidates[:1])


# Tensors of any kind


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
            assert torch.equal(sample(backend, states, policy), sample(backend, plain, policy))
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
    assert same_bits(outcome(wide[:, ::2], given, weights), want)
    for change in (moved, turned, sliced):
        assert same_bits(outcome(change(plain), given, weights), want), change.__name__
        assert same_bits(outcome(plain, change(given), weights), want), change.__name__
        assert same_bits(outcome(plain, given, change(weights)), want), change.__name__
    expanded = sample(backend, plain[:1].expand(6, S), policy, noise=given)
    assert torch.equal(expanded[0], want[0][0])
    plain.requires_grad_(True)
    (d_sum,) = torch.autograd.grad(sample(backend, plain, policy, noise=given).sum(), plain)
    (d_ones,) = torch.autograd.grad(sample(backend, plain, policy, noise=given), plain, torch.ones(6, A))
    assert torch.equal(d_sum, d_ones)  # the gradient of a sum is an expanded scalar


def test_no_states(backend):
    policy, empty = make_policy(**SMALL), torch.zeros(0, S, requires_grad=True)
    actions = sample(backend, empty, policy)
    assert actions.shape == (0, A)
    actions.sum().backward()
    assert sample(backend, empty, policy, num_candidates=5).shape == (0, 5, A)
    with torch.no_grad():
        for _ in range(3):
            assert sample(backend, empty.detach(), policy).shape == (0, A)


def test_torchs_default_dtype_is_of_no_concern(backend):
    states = states_of(9)
    want = sample(backend, states, make_policy(**SMALL))
    policy = make_policy(**SMALL)
    torch.set_default_dtype(torch.float64)
    try:
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                got = [sample(backend, states, policy) for _ in range(3)]
            assert all(actions.dtype == torch.float32 and torch.equal(actions, want) for actions in got)
    finally:
        torch.set_default_dtype(torch.float32)


# Gradients


@pytest.fixture
def saved(monkeypatch):
    """Of each chain from now on whether it saves for a backward pass; in a list that grows. None: it was prepared."""
    seen: list[bool] = []
    forward = GpuBackend.forward

    def recorded(self, chain, save):
        seen.append(save)
        return forward(self, chain, save)

    monkeypatch.setattr(GpuBackend, "forward", recorded)
    return seen


@pytest.mark.parametrize(("activation", "precision"), [("mish", "fp32"), ("relu", "fp32"), ("silu", "bf16")])
def test_actions_are_the_same_with_and_without_gradients(backend, activation, precision, saved):
    policy, states = make_policy(activation=activation), states_of(40)
    want = sample(backend, states, policy, precision=precision)
    assert want.requires_grad and saved == [True]
    saved.clear()
    with torch.no_grad():
        for _ in range(3):  # the second is prepared, the third runs it
            got = sample(backend, states, policy, precision=precision)
            assert torch.equal(got, want) and not got.requires_grad
        assert torch.equal(sample(backend, states, policy, precision=precision, num_candidates=1)[:, 0], want)
    with torch.inference_mode():
        assert torch.equal(sample(backend, states, policy, precision=precision), want)
    policy.requires_grad_(False)
    assert not sample(backend, states, policy, precision=precision).requires_grad
    assert saved and not any(saved)


def test_gradients_of_states_alone_and_of_some_parameters_alone(backend, saved):
    policy, states = make_policy(**SMALL), states_of(20).requires_grad_(True)
    d_states, *d_parameters = every_gradient(sample(backend, states, policy), states, policy)
    names = [name for name, _ in policy.denoiser.named_parameters()]
    weights = torch.linspace(-1, 1, 20 * A).view(20, A)
    policy.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(sample(backend, states, policy), states, weights)[0], d_states)
    policy.denoiser.final_layer.requires_grad_(True)
    policy.denoiser.zero_grad()
    sample(backend, states.detach(), policy).backward(weights)
    for name, parameter, want in zip(names, policy.denoiser.parameters(), d_parameters, strict=True):
        if name.startswith("final_layer"):
            assert torch.equal(parameter.grad, want)
        else:
            assert not parameter.grad.any()
    assert all(saved)


def test_backward_twice_through_one_graph(backend):
    policy, states = make_policy(**SMALL), states_of(20).requires_grad_(True)
    actions = sample(backend, states, policy, num_candidates=2)
    first, second, third = (every_gradient(actions, states, policy) for _ in range(3))
    assert same_bits(second, first) and same_bits(third, first)
    again = sample(backend, states, policy, num_candidates=2)
    assert same_bits(every_gradient(again, states, policy), first)


def test_gradients_add_up(backend):
    policy, states = make_policy(**SMALL), states_of(20)
    actions = sample(backend, states, policy)
    actions.sum().backward(retain_graph=True)
    once = policy.denoiser.flat.grad.clone()
    actions.sum().backward()
    assert torch.equal(policy.denoiser.flat.grad, 2 * once)


@pytest.mark.parametrize("what", ["parameter", "flat buffer", "load_state_dict", "states"])
def test_changes_before_backward_are_noticed(backend, what):
    policy, states = make_policy(**SMALL), states_of(5)
    actions = sample(backend, states, policy)
    with torch.no_grad():
        if what == "parameter":
            policy.denoiser.final_layer.bias.add_(0.1)
        elif what == "flat buffer":
            policy.denoiser.flat.mul_(1.1)
        elif what == "load_state_dict":
            policy.load_state_dict(make_policy(**SMALL).state_dict())
        else:
            states.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        actions.sum().backward()


# Changes between calls


def adam_step(policy: dql.DiffusionPolicy, **options: object) -> None:
    optimizer = torch.optim.Adam(policy.denoiser.parameters(), lr=0.1, **options)
    dql.sample(states_of(5), policy, backend="eager", seed=3).sum().backward()
    optimizer.step()


CHANGES = {
    "parameter": lambda p: p.denoiser.mid_layer[2].weight.mul_(1.5),
    "parameter.data": lambda p: p.denoiser.final_layer.bias.data.add_(0.1),  # no version counter tells of it
    "one element's data": lambda p: p.denoiser.mid_layer[0].weight.data[3].zero_(),
    "time MLP's data": lambda p: p.denoiser.time_mlp[1].weight.data.mul_(2),
    "flat buffer": lambda p: p.denoiser.flat.mul_(1.1),
    "NumPy": lambda p: p.denoiser.flat.detach().numpy().__imul__(1.2),
    "load_state_dict": lambda p: p.load_state_dict(make_policy(seed=6, **SMALL).state_dict()),
    "fused Adam": lambda p: adam_step(p, fused=True),
    "foreach Adam": lambda p: adam_step(p, foreach=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_calls_are_seen(backend, change):
    """By calls with gradients, without, and prepared: weights are packed anew by each."""
    policy, states = make_policy(**SMALL), states_of(9)

    def calls(policy: dql.DiffusionPolicy) -> list[Tensor]:
        inputs = states.clone().requires_grad_(True)
        actions = sample(backend, inputs, policy)
        with torch.no_grad():
            plain = [sample(backend, states, policy) for _ in range(2)]
        return [actions.detach(), *plain, *every_gradient(actions, inputs, policy)]

    before = calls(policy)
    with torch.set_grad_enabled("Adam" in change):
        CHANGES[change](policy)
    after = calls(policy)
    assert not torch.equal(after[0], before[0])
    fresh = make_policy(**SMALL)
    fresh.load_state_dict(policy.state_dict())
    assert same_bits(after, calls(fresh))


def test_other_attributes_between_calls(backend):
    policy, states = make_policy(**SMALL), states_of(9)
    with torch.no_grad():
        for _ in range(3):
            sample(backend, states, policy)
        policy.max_action = 0.2
        for _ in range(3):
            got, want = sample(backend, states, policy), dql.sample(states, policy, seed=3, backend="eager")
            assert_close(got, want, TOLERANCES["float32"], what="actions", backend=backend)
        policy.denoiser = make_policy(seed=6, **SMALL).denoiser
        for _ in range(3):
            got, want = sample(backend, states, policy), dql.sample(states, policy, seed=3, backend="eager")
            assert_close(got, want, TOLERANCES["float32"], what="actions", backend=backend)


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
