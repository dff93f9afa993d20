"""The backend "triton" as a caller meets it, in Triton's interpreter: seeds, batches, strides, gradients, changes
between calls, what it refuses. Whether its numbers are right is in `test_triton`; a GPU's side in
`test_gpu_calls`.
"""

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from cases import TOLERANCES, assert_close, not_interpreted
from cpp_cases import A, S, make_policy, same_bits, states_of

import dql
from dql import noise
from dql.backends import Chain
from dql.sampler import run_chain
from dql.triton_backend import TritonBackend, _installed

Tensor = torch.Tensor

if (reason := not_interpreted()) is not None:
    pytest.skip(reason, allow_module_level=True)

from dql.kernels import chain_runner  # noqa: E402
from dql.kernels.tiles import Tile  # noqa: E402

SEEDS = [0, 1, 2**63, 2**64 - 1]
SMALL = {"hidden_dim": 16, "num_hidden": 2, "T": 3}


@pytest.fixture(autouse=True)
def _poisoned():
    """torch fills what it allocates with NaN, as its deterministic mode does: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def sample(states: Tensor, policy: dql.DiffusionPolicy, **options: object) -> Tensor:
    given: dict = {"seed": 3} | options
    if "noise" in options:
        del given["seed"]
    return dql.sample(states, policy, backend="triton", **given)


def every_gradient(actions: Tensor, states: Tensor, policy: dql.DiffusionPolicy) -> list[Tensor]:
    """Of the states (if they require one) and of all parameters, for a fixed loss."""
    weights = torch.linspace(-1, 1, actions.numel()).view_as(actions)
    inputs = ([states] if states.requires_grad else []) + list(policy.denoiser.parameters())
    return list(torch.autograd.grad(actions, inputs, weights, retain_graph=True))


# The noise stream


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_seed_gives_the_same_actions_as_eager(seed):
    policy, states = make_policy(), states_of(50)
    for N in (None, 7):
        with torch.no_grad():
            got, want = (
                dql.sample(states, policy, num_candidates=N, seed=seed, backend=backend)
                for backend in ("triton", "eager")
            )
        assert_close(got, want, TOLERANCES["float32"], what="actions", case=f"seed {seed}, N={N}", backend="triton")
    given = sample(states, policy, noise=noise.normal(seed, 5, 50, A))
    with torch.no_grad():
        drawn = sample(states, policy, seed=seed)
    assert_close(drawn, given, TOLERANCES["float32"], what="drawn noise", case=f"seed {seed}", backend="triton")


def test_without_a_seed_torch_draws_one():
    policy, states = make_policy(**SMALL), states_of(5)
    results = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        results += [sample(states, policy, seed=None).detach() for _ in range(2)]
    assert same_bits(results[2:4], results[:2])
    for other in (results[1], results[4]):
        assert not torch.equal(other, results[0])


@pytest.mark.parametrize("width", [3, 40])
def test_wide_actions_and_long_chains_draw_the_same_noise(width):
    policy, states = dql.DiffusionPolicy(S, width, **(SMALL | {"T": 20})), states_of(5)
    with torch.no_grad():
        got, want = sample(states, policy), dql.sample(states, policy, seed=3, backend="eager")
    assert_close(got, want, TOLERANCES["float32"], what="actions", case=f"A={width}", backend="triton")


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 2**63, 2**63 + 5, 2**64 - 1])
def test_a_seed_in_memory_is_the_same_stream(seed):
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
        for backend in ("triton", "eager"):
            got, want = (run_chain(states, policy, backend=backend, seed=s) for s in (bits, seed))
            assert_close(got, want, TOLERANCES["float32"], what="actions", case=f"seed {seed}", backend=backend)
            got, want = (run_chain(states, policy, backend=backend, seed=s, num_candidates=2) for s in (bits, seed))
            assert_close(got, want, TOLERANCES["float32"], what="candidates", case=f"seed {seed}", backend=backend)


def test_a_seed_in_memory_is_read_by_each_call():
    policy, states, seed = make_policy(**SMALL), states_of(9), torch.tensor([1])
    with torch.no_grad():
        first = run_chain(states, policy, backend="triton", seed=seed)
        seed.fill_(2)
        second = run_chain(states, policy, backend="triton", seed=seed)
        assert torch.equal(second, run_chain(states, policy, backend="triton", seed=2))
    assert torch.equal(first, run_chain(states, policy, backend="triton", seed=1))


# Rows


@pytest.mark.parametrize("activation", ["mish", "relu"])
def test_a_row_does_not_depend_on_the_others(activation, monkeypatch):
    """To the last bit, nor does its gradient, in the same place of a tile; NumPy's product rounds by the place."""
    monkeypatch.setattr(chain_runner, "choose", lambda arch, processors, shape: Tile(16, 16, 2, 4))
    policy, states = make_policy(activation=activation, T=2), states_of(40)
    given = torch.randn(2, 40, A, generator=torch.Generator().manual_seed(1))

    def run_rows(states: Tensor, rows: slice) -> list[Tensor]:
        inputs = states[rows].requires_grad_(True)
        actions = sample(inputs, policy, noise=given[:, rows])
        return [actions.detach(), torch.autograd.grad(actions.square().sum(), inputs)[0]]

    whole = run_rows(states, slice(None))
    for rows in (slice(0, 1), slice(0, 15), slice(0, 16), slice(0, 17), slice(0, 39), slice(16, 40), slice(32, 33)):
        assert same_bits(run_rows(states, rows), [tensor[rows] for tensor in whole]), rows
    for rows in (slice(39, 40), slice(7, 30), slice(1, 40)):
        for got, tensor in zip(run_rows(states, rows), whole, strict=True):
            assert_close(got, tensor[rows], TOLERANCES["float32"], what="a row", case=rows)
    others = torch.cat([states_of(20), states[20:]])
    assert same_bits([tensor[20:] for tensor in run_rows(others, slice(None))], [tensor[20:] for tensor in whole])


def test_the_tile_changes_last_bits_alone():
    policy, states = make_policy(), states_of(70)
    given = torch.randn(5, 70, A, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = sample(states, policy, noise=given)
        for B in (1, 17, 65):  # a tile of 16, 32, 256 rows
            part = sample(states[:B], policy, noise=given[:, :B])
            assert_close(part, whole[:B], TOLERANCES["rows"], what="actions", case=f"the first {B} of 70")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("N", [1, 3, 14])
def test_candidates_share_their_state(N, precision, monkeypatch):
    """They are as repeated states, and the state's gradient is the sum of theirs."""
    monkeypatch.setattr(chain_runner, "choose", lambda arch, processors, shape: Tile(16, 16, 2, 4))
    policy, states = make_policy(**SMALL), states_of(9).requires_grad_(True)
    candidates = sample(states, policy, num_candidates=N, precision=precision)
    repeated = states.detach().repeat_interleave(N, 0).requires_grad_(True)
    alone = sample(repeated, policy, precision=precision)
    assert candidates.shape == (9, N, A)
    d_states, *d_parameters = every_gradient(candidates, states, policy)
    d_repeated, *want = every_gradient(alone, repeated, policy)
    got, want = [candidates, d_states, *d_parameters], [alone, d_repeated.view(9, N, S).sum(1), *want]
    for i, (tensor, wanted) in enumerate(zip(got, want, strict=True)):
        tolerance = TOLERANCES["float32" if precision == "fp32" else "bf16"]
        assert_close(tensor.view(wanted.shape), wanted, tolerance, what=f"tensor {i}")
    one = sample(states[:1].detach(), policy, num_candidates=N, precision=precision)
    assert torch.equal(one, candidates[:1])


# Tensors of any kind


def test_inputs_of_any_stride_and_place():
    policy = make_policy(**SMALL)
    wide = states_of(6, 2 * S)
    given = torch.randn(3, 6, A, generator=torch.Generator().manual_seed(1))
    weights = torch.linspace(-1, 1, 6 * A).view(6, A)
    plain = wide[:, ::2].contiguous()

    def outcome(states: Tensor, given: Tensor, weights: Tensor) -> list[Tensor]:
        states = states.detach().requires_grad_(True)
        actions = sample(states, policy, noise=given)
        inputs = [states, *policy.denoiser.parameters()]
        with torch.no_grad():
            assert torch.equal(sample(states, policy, noise=given), actions)
            assert torch.equal(sample(states, policy), sample(plain, policy))
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
    expanded = sample(plain[:1].expand(6, S), policy, noise=given)
    assert torch.equal(expanded[0], want[0][0])
    plain.requires_grad_(True)
    (d_sum,) = torch.autograd.grad(sample(plain, policy, noise=given).sum(), plain)
    (d_ones,) = torch.autograd.grad(sample(plain, policy, noise=given), plain, torch.ones(6, A))
    assert torch.equal(d_sum, d_ones)  # the gradient of a sum is an expanded scalar


def test_no_states():
    policy, empty = make_policy(**SMALL), torch.zeros(0, S, requires_grad=True)
    actions = sample(empty, policy)
    assert actions.shape == (0, A)
    actions.sum().backward()
    assert sample(empty, policy, num_candidates=5).shape == (0, 5, A)
    with torch.no_grad():
        for _ in range(3):
            assert sample(empty.detach(), policy).shape == (0, A)


def test_torchs_default_dtype_is_of_no_concern():
    states = states_of(9)
    want = sample(states, make_policy(**SMALL))
    policy = make_policy(**SMALL)
    torch.set_default_dtype(torch.float64)
    try:
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                got = [sample(states, policy) for _ in range(3)]
            assert all(actions.dtype == torch.float32 and torch.equal(actions, want) for actions in got)
    finally:
        torch.set_default_dtype(torch.float32)


# Gradients


@pytest.fixture
def saved(monkeypatch):
    """Of each chain from now on whether it saves for a backward pass; in a list that grows."""
    seen: list[bool] = []
    plan = chain_runner.ChainRunner.plan

    def recorded(self, B, candidates=1, noise=False, save=False):
        seen.append(save)
        return plan(self, B, candidates, noise, save)

    monkeypatch.setattr(chain_runner.ChainRunner, "plan", recorded)
    return seen


@pytest.mark.parametrize(("activation", "precision"), [("mish", "fp32"), ("relu", "fp32"), ("silu", "bf16")])
def test_actions_are_the_same_with_and_without_gradients(activation, precision, saved):
    policy, states = make_policy(activation=activation), states_of(40)
    want = sample(states, policy, precision=precision)
    assert want.requires_grad and saved == [True]
    saved.clear()
    with torch.no_grad():
        for _ in range(3):  # the second is prepared, the third runs it
            got = sample(states, policy, precision=precision)
            assert torch.equal(got, want) and not got.requires_grad
        assert torch.equal(sample(states, policy, precision=precision, num_candidates=1)[:, 0], want)
    with torch.inference_mode():
        assert torch.equal(sample(states, policy, precision=precision), want)
    policy.requires_grad_(False)
    assert not sample(states, policy, precision=precision).requires_grad
    assert saved and not any(saved)
    plan = chain_runner.ChainRunner.plan
    runner = next(kept for kept in policy.step_table().kept.values() if isinstance(kept, chain_runner.ChainRunner))
    with_save, without = (plan(runner, 40, save=save) for save in (True, False))
    assert without.n_operands + without.n_floats < 0.3 * (with_save.n_operands + with_save.n_floats)


def test_gradients_of_states_alone_and_of_some_parameters_alone(saved):
    policy, states = make_policy(**SMALL), states_of(20).requires_grad_(True)
    d_states, *d_parameters = every_gradient(sample(states, policy), states, policy)
    names = [name for name, _ in policy.denoiser.named_parameters()]
    weights = torch.linspace(-1, 1, 20 * A).view(20, A)
    policy.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(sample(states, policy), states, weights)[0], d_states)
    policy.denoiser.final_layer.requires_grad_(True)
    policy.denoiser.zero_grad()
    sample(states.detach(), policy).backward(weights)
    for name, parameter, want in zip(names, policy.denoiser.parameters(), d_parameters, strict=True):
        if name.startswith("final_layer"):
            assert torch.equal(parameter.grad, want)
        else:
            assert not parameter.grad.any()
    assert all(saved)


def test_backward_twice_through_one_graph():
    policy, states = make_policy(**SMALL), states_of(20).requires_grad_(True)
    actions = sample(states, policy, num_candidates=2)
    first, second, third = (every_gradient(actions, states, policy) for _ in range(3))
    assert same_bits(second, first) and same_bits(third, first)
    again = sample(states, policy, num_candidates=2)
    assert same_bits(every_gradient(again, states, policy), first)


def test_gradients_add_up():
    policy, states = make_policy(**SMALL), states_of(20)
    actions = sample(states, policy)
    actions.sum().backward(retain_graph=True)
    once = policy.denoiser.flat.grad.clone()
    actions.sum().backward()
    assert torch.equal(policy.denoiser.flat.grad, 2 * once)


@pytest.mark.parametrize("what", ["parameter", "flat buffer", "load_state_dict", "states"])
def test_changes_before_backward_are_noticed(what):
    policy, states = make_policy(**SMALL), states_of(5)
    actions = sample(states, policy)
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
    sample(states_of(5), policy).sum().backward()
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
def test_changes_between_calls_are_seen(change):
    """By calls with gradients, without, and prepared: weights are packed anew by each."""
    policy, states = make_policy(**SMALL), states_of(9)

    def calls(policy: dql.DiffusionPolicy) -> list[Tensor]:
        inputs = states.clone().requires_grad_(True)
        actions = sample(inputs, policy)
        with torch.no_grad():
            plain = [sample(states, policy) for _ in range(2)]
        return [actions.detach(), *plain, *every_gradient(actions, inputs, policy)]

    before = calls(policy)
    with torch.set_grad_enabled("Adam" in change):
        CHANGES[change](policy)
    after = calls(policy)
    assert not torch.equal(after[0], before[0])
    fresh = make_policy(**SMALL)
    fresh.load_state_dict(policy.state_dict())
    assert same_bits(after, calls(fresh))


def test_other_attributes_between_calls():
    policy, states = make_policy(**SMALL), states_of(9)
    with torch.no_grad():
        for _ in range(3):
            sample(states, policy)
        policy.max_action = 0.2
        for _ in range(3):
            got, want = sample(states, policy), dql.sample(states, policy, seed=3, backend="eager")
            assert_close(got, want, TOLERANCES["float32"], what="actions", backend="triton")
        policy.denoiser = make_policy(seed=6, **SMALL).denoiser
        for _ in range(3):
            got, want = sample(states, policy), dql.sample(states, policy, seed=3, backend="eager")
            assert_close(got, want, TOLERANCES["float32"], what="actions", backend="triton")


# Values that are no numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("where", ["time_mlp.1.weight", "mid_layer.0.weight", "mid_layer.2.weight", "final_layer.bias"])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's, of what is meant here
def test_broken_weights_give_what_eager_gives(value, where):
    """NaN comes out as NaN, and an infinity as torch has it or, where it met a zero of the padding, as NaN."""
    policy, states = make_policy(**SMALL), states_of(17)
    with torch.no_grad():
        policy.denoiser.get_parameter(where).view(-1)[1] = value
        got, want = (dql.sample(states, policy, seed=0, backend=backend) for backend in ("triton", "eager"))
    if math.isinf(value):  # an activation of -infinity is 0 here, its limit; torch's is NaN
        got, want = (torch.where(got.isnan() | want.isnan(), math.nan, tensor) for tensor in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_bad_states_are_found():
    policy, states = make_policy(**SMALL), states_of(37)
    states[20, 5] = math.inf
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(ValueError, match="hold 1 NaN or infinite values, the first at row 20, column 5"):
                sample(states, policy)


# torch.compile


def test_inside_torch_compile():
    """A graph break, across which gradients flow."""
    policy, states = make_policy(**SMALL), states_of(9)

    def doubled(states: Tensor) -> Tensor:
        return sample(states * 2, policy) + 1

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


# What it refuses, and why


def refused(policy: dql.DiffusionPolicy) -> str:
    """The sentence by which "triton" refuses, the same in every call; eager can."""
    states = torch.zeros(2, policy.state_dim, dtype=policy.dtype)
    sentences = set()
    for gradients in (True, False):
        for N in (None, 2, None):
            with torch.set_grad_enabled(gradients), pytest.raises(dql.BackendUnavailable) as caught:
                sample(states, policy, num_candidates=N)
            sentences.add(str(caught.value))
    (said,) = sentences
    head, _, rest = said.partition("backend 'triton' cannot run this: ")
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
def test_sizes(sizes, sentence):
    policy = dql.DiffusionPolicy(**({"state_dim": S, "action_dim": A, "hidden_dim": 16} | sizes))
    assert refused(policy) == f"{sentence}; use backend='eager'"


def test_dtypes():
    """A policy that is cast is refused, though it ran before; one that is cast back runs."""
    policy, states = make_policy(**SMALL), states_of(5)
    with torch.no_grad():
        before = [sample(states, policy) for _ in range(3)]
    for dtype in (torch.float64, torch.bfloat16):
        sentence = f"it takes float32 parameters and this policy is {dtype}; convert it with policy.to(torch.float32)"
        assert refused(copy.deepcopy(policy).to(dtype)) == sentence
    policy.double()
    refused(policy)
    policy.float()
    with torch.no_grad():
        assert same_bits([sample(states, policy) for _ in range(3)], before)


def chain_of(policy: dql.DiffusionPolicy, table: dql.StepTable, candidates: int = 1) -> Chain:
    denoiser = policy.denoiser
    states = torch.zeros(1, policy.state_dim, device=policy.device)
    return Chain(
        denoiser.buffer, denoiser.weights, denoiser.spec, states, candidates, None, 0, table, 1.0, "fp32", denoiser.kept
    )


def test_steps_rows_and_devices():
    """Which `sample` refuses before any backend is asked, or cannot have."""
    policy, backend = dql.DiffusionPolicy(S, A, hidden_dim=16, T=1000), TritonBackend()
    table = policy.step_table()
    assert backend.check(chain_of(policy, table)) is None
    longer = dql.StepTable("own", table.rows + table.rows[-1:], (1000, *table.timesteps), True)
    assert backend.check(chain_of(policy, longer)) == "it runs up to 1000 steps, not 1001; use backend='eager'"
    assert backend.check(chain_of(policy, table, 1 << 30)) is None
    sentence = "it takes up to 1,073,741,824 rows a call; split the states"
    assert backend.check(chain_of(policy, table, (1 << 30) + 1)) == sentence
    sentence = "TRITON_INTERPRET=1 runs it on the CPU and this policy is on meta; unset it"
    assert backend.check(chain_of(policy.to("meta"), table)) == sentence


def test_without_triton(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *package: None if name == "triton" else find_spec(name, *package)
    )
    _installed.cache_clear()
    try:
        sentence = dql.backends()["triton"]
        assert sentence.startswith("Triton is not installed; pip install ")
        assert refused(make_policy(**SMALL)) == sentence
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
