"""The calls `sample`, `select` and `set_policy`: shapes, randomness, gradients, and one sentence for every mistake."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import transcription
from support.cases import CASES, TOLERANCES, Case, assert_close, make_problem

import dql
from dql import noise as noise_stream
from dql import sampler as sampler_module
from dql.backend.registry import registry
from dql.schedule import SAMPLERS

Tensor = torch.Tensor
S, A, H = 4, 3, 16


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        yield
    assert sampler_module._default_policy is None, "a test left a policy set"


@pytest.fixture
def policy() -> dql.DiffusionPolicy:
    return dql.DiffusionPolicy(S, A, 1.5, H)


@pytest.fixture
def critic() -> dql.TwinCritic:
    return dql.TwinCritic(S, A, H)


# What comes back


@settings(max_examples=50, deadline=None)
@given(
    B=st.integers(0, 5),
    S=st.integers(1, 5),
    A=st.integers(1, 6),
    H=st.integers(1, 20),
    num_hidden=st.integers(1, 4),
    T=st.integers(1, 8),
    N=st.one_of(st.none(), st.integers(1, 4)),
    sampler=st.sampled_from(SAMPLERS),
    activation=st.sampled_from(["mish", "relu", "silu"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    predict_epsilon=st.booleans(),
    by_noise=st.booleans(),
    data=st.data(),
)
def test_shapes_bounds_and_gradients(
    B, S, A, H, num_hidden, T, N, sampler, activation, dtype, predict_epsilon, by_noise, data
):
    K = data.draw(st.one_of(st.none(), st.integers(1, T)), label="K")
    policy = dql.DiffusionPolicy(
        S, A, 0.7, H, num_hidden, T, activation=activation, predict_epsilon=predict_epsilon
    ).to(dtype)
    states = torch.randn(B, S, dtype=dtype).requires_grad_(True)
    shape = (B, A) if N is None else (B, N, A)
    random = {"noise": torch.randn(K or T, *shape, dtype=dtype)} if by_noise else {"seed": 3}
    actions = dql.sample(states, policy, num_candidates=N, sampler=sampler, num_steps=K, **random)
    assert actions.shape == shape
    assert actions.dtype == dtype
    assert (actions.abs() <= 0.7).all()
    if B:
        actions.square().sum().backward()
        assert states.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in policy.parameters())
    chosen = dql.select(states, policy, dql.TwinCritic(S, A, H).to(dtype), num_candidates=N or 2, seed=1)
    assert chosen.shape == (B, A)


def test_no_states(policy, critic):
    empty = torch.zeros(0, S)
    assert dql.sample(empty, policy).shape == (0, A)
    assert dql.sample(empty, policy, num_candidates=5).shape == (0, 5, A)
    assert dql.sample(empty, policy, noise=torch.zeros(5, 0, A)).shape == (0, A)
    assert dql.select(empty, policy, critic).shape == (0, A)
    with pytest.raises(ValueError, match="unknown backend"):  # the arguments are checked all the same
        dql.sample(empty, policy, backend="none")


def test_candidates_are_rows_of_their_state(policy):
    """Candidate n of state b is what state b gives with noise [:, b, n]."""
    policy = policy.double()
    states, noise = torch.randn(4, S).double(), torch.randn(5, 4, 3, A).double()
    got = dql.sample(states, policy, num_candidates=3, noise=noise)
    for n in range(3):
        want = dql.sample(states, policy, noise=noise[:, :, n])
        assert_close(got[:, n], want, TOLERANCES["float64"], what="actions", case=f"candidate {n}")
    by_seed = dql.sample(states, policy, num_candidates=3, seed=8)
    flat = dql.sample(states.repeat_interleave(3, 0), policy, seed=8)
    assert_close(by_seed.reshape(12, A), flat, TOLERANCES["float64"], what="actions", case="by seed")


def test_inputs_of_any_stride(policy):
    wide, noise = torch.randn(6, 2 * S), torch.randn(5, 6, A)
    want = dql.sample(wide[:, ::2].contiguous(), policy, noise=noise)
    tolerance = TOLERANCES["rows"]
    assert_close(dql.sample(wide[:, ::2], policy, noise=noise), want, tolerance, what="strided states")
    turned = noise.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert_close(dql.sample(wide[:, ::2], policy, noise=turned), want, tolerance, what="turned noise")
    one = torch.randn(1, S).requires_grad_(True)
    actions = dql.sample(one.expand(6, S), policy, noise=noise)
    actions.sum().backward()  # its gradient is an expanded scalar
    copies = one.detach().repeat(6, 1).requires_grad_(True)
    dql.sample(copies, policy, noise=noise).sum().backward()
    assert_close(one.grad, copies.grad.sum(0, keepdim=True), tolerance, what="d_states of an expanded state")


# Randomness


def test_the_same_seed_gives_the_same(policy, critic):
    states = torch.randn(6, S)
    assert torch.equal(dql.sample(states, policy, seed=4), dql.sample(states, policy, seed=4))
    assert not torch.equal(dql.sample(states, policy, seed=4), dql.sample(states, policy, seed=5))
    assert torch.equal(dql.select(states, policy, critic, seed=4), dql.select(states, policy, critic, seed=4))
    state = torch.get_rng_state()
    dql.sample(states, policy, seed=4)
    dql.select(states, policy, critic, seed=4)
    dql.sample(states, policy, noise=torch.zeros(5, 6, A))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn where nothing is needed


def test_manual_seed_makes_runs_repeat(policy, critic):
    states = torch.randn(6, S)

    def run() -> list[Tensor]:
        torch.manual_seed(11)
        return [
            dql.sample(states, policy),
            dql.sample(states, policy, num_candidates=2),
            dql.select(states, policy, critic),
            dql.sample(states, policy),
        ]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[3])  # each call draws anew


@pytest.mark.parametrize("N", [None, 4])
@pytest.mark.parametrize("H", [16, 256])  # 256: the large batch takes the split Mish, the small one does not
def test_a_row_does_not_depend_on_its_batch(N, H):
    policy = dql.DiffusionPolicy(S, A, hidden_dim=H)
    states = torch.randn(37, S)
    whole = dql.sample(states, policy, num_candidates=N, seed=9)
    for B in (1, 5, 36):
        part = dql.sample(states[:B], policy, num_candidates=N, seed=9)
        assert_close(part, whole[:B], TOLERANCES["rows"], what="actions", case=f"the first {B} of 37, N={N}")
    others = torch.cat([states[:5], torch.randn(32, S)])
    part = dql.sample(others, policy, num_candidates=N, seed=9)[:5]
    assert_close(part, whole[:5], TOLERANCES["rows"], what="actions", case=f"other rows after, N={N}")


# Gradients


def test_without_gradients_nothing_is_saved(policy, critic):
    states = torch.randn(3, S)
    with torch.no_grad():
        assert dql.sample(states.requires_grad_(True), policy, seed=0).grad_fn is None
    with torch.inference_mode():
        assert dql.sample(states, policy, seed=0).grad_fn is None
    assert dql.select(states, policy, critic, seed=0).grad_fn is None
    assert dql.sample(states, policy, seed=0).grad_fn is not None
    frozen = copy.deepcopy(policy).requires_grad_(False)
    assert dql.sample(states.detach(), frozen, seed=0).grad_fn is None
    actions = dql.sample(states, frozen, seed=0)
    actions.sum().backward()
    assert states.grad.any()
    assert not frozen.denoiser.flat.grad.any()


def test_only_what_requires_grad_gets_one(policy):
    policy.denoiser.time_mlp.requires_grad_(False)
    states = torch.randn(3, S)
    dql.sample(states, policy, seed=0).sum().backward()
    assert states.grad is None
    assert not policy.denoiser.time_mlp[1].weight.grad.any()
    assert policy.denoiser.mid_layer[0].weight.grad.any()


def test_backward_twice(policy):
    states = torch.randn(3, S)
    actions = dql.sample(states, policy, seed=0)
    actions.sum().backward(retain_graph=True)
    once = policy.denoiser.flat.grad.clone()
    actions.sum().backward()
    assert torch.equal(policy.denoiser.flat.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        actions.sum().backward()


def test_no_second_derivatives(policy):
    states = torch.randn(3, S, requires_grad=True)
    loss = dql.sample(states, policy, seed=0).square().sum()
    gradient = torch.autograd.grad(loss, states, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("what", ["parameter", "flat buffer", "optimizer step", "load_state_dict", "states"])
def test_changes_between_forward_and_backward_are_noticed(policy, what):
    """The backward pass would mix the old activations with the new values."""
    states = torch.randn(3, S)
    inputs = states.clone()
    actions = dql.sample(inputs, policy, seed=0)
    with torch.no_grad():
        if what == "parameter":
            policy.denoiser.mid_layer[2].weight.add_(0.1)
        elif what == "flat buffer":
            policy.denoiser.flat.mul_(1.1)
        elif what == "optimizer step":
            policy.denoiser.flat.grad.fill_(1.0)
            torch.optim.Adam([policy.denoiser.flat]).step()  # torch's fused=True counts no change, for any module
        elif what == "load_state_dict":
            policy.load_state_dict(dql.DiffusionPolicy(S, A, 1.5, H).state_dict())
        else:
            inputs.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        actions.sum().backward()


def test_inputs_are_never_changed(policy, critic):
    states, noise = torch.randn(5, S, requires_grad=True), torch.randn(5, 5, A)
    candidates = torch.randn(5, 5, 4, A)
    inputs = [states, noise, candidates, policy.denoiser.flat, critic.flat]
    before = [(t.detach().clone(), t._version) for t in inputs]
    for sampler in SAMPLERS:
        actions = dql.sample(states, policy, noise=noise, sampler=sampler)
        weights = torch.randn_like(actions)
        kept = weights.clone()
        actions.backward(weights)
        assert torch.equal(weights, kept)
        dql.sample(states, policy, noise=candidates, num_candidates=4, sampler=sampler).sum().backward()
        dql.select(states, policy, critic, num_candidates=4, noise=candidates, sampler=sampler, seed=0)
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


def test_the_result_is_the_callers(policy):
    """A result, or the noise it came from, may be written to: K = 1 passes through few operations."""
    policy = dql.DiffusionPolicy(S, A, hidden_dim=H, T=1)
    states, noise = torch.randn(3, S), torch.randn(1, 3, A)
    first = dql.sample(states, policy, noise=noise)
    kept, noise_kept = first.detach().clone(), noise.clone()
    with torch.no_grad():
        first.zero_()
    assert torch.equal(noise, noise_kept)
    assert torch.equal(dql.sample(states, policy, noise=noise), kept)


# The policy of set_policy


def test_set_policy(policy):
    other = dql.DiffusionPolicy(S, A, 1.5, H)
    states = torch.randn(2, S)
    want, want_other = dql.sample(states, policy, seed=0), dql.sample(states, other, seed=0)
    dql.set_policy(policy)
    try:
        assert torch.equal(dql.sample(states, seed=0), want)
        with dql.set_policy(other):
            assert torch.equal(dql.sample(states, seed=0), want_other)
            assert torch.equal(dql.sample(states, policy, seed=0), want)  # an argument wins
        assert torch.equal(dql.sample(states, seed=0), want)
        with pytest.raises(KeyError), dql.set_policy(other):
            raise KeyError
        assert torch.equal(dql.sample(states, seed=0), want)
    finally:
        dql.set_policy(None)
    with pytest.raises(ValueError, match=r"no policy: pass one, .* or set one first, dql\.set_policy\(policy\)"):
        dql.sample(states)
    with pytest.raises(TypeError, match="set_policy takes a DiffusionPolicy or None, got Denoiser"):
        dql.set_policy(policy.denoiser)
    with pytest.raises(TypeError, match="policy must be a DiffusionPolicy, got str"):
        dql.sample(states, "policy")


# The acting rule


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_select_by_hand(seed):
    """min of both critics, softmax, the first candidate whose cumulative probability exceeds the uniform number."""
    policy, critic = dql.DiffusionPolicy(S, A, hidden_dim=H).double(), dql.TwinCritic(S, A, H).double()
    with torch.no_grad():
        critic.flat.mul_(4)  # torch's default Q hardly differ
    states = torch.randn(8, S).double()
    candidates = dql.sample(states, policy, num_candidates=6, seed=seed)  # [B, N, A]
    with torch.no_grad():  # neither critic is always the smaller
        q1, q2 = critic(states, candidates)
        critic.q2_model[6].bias.add_((q1 - q2).mean())
        q1, q2 = critic(states, candidates)
    assert 0.2 < float((q1 < q2).double().mean()) < 0.8
    got = dql.select(states, policy, critic, num_candidates=6, seed=seed)
    probabilities = transcription.acting_probabilities(critic.state_dict(), states, candidates.detach())
    uniform = noise_stream.uniform(seed, 8).tolist()
    chosen = []
    for b in range(8):
        cumulative = 0.0
        for n in range(6):
            cumulative += float(probabilities[b, n])
            if cumulative > uniform[b]:
                break
        chosen.append(n)
        assert torch.equal(got[b], candidates[b, n]), f"state {b} takes another candidate than {n}"
    assert len(set(chosen)) > 1


def test_select_with_noise_and_frequencies():
    """20,000 equal states with equal candidates: the frequencies are softmax(min Q), within five deviations."""
    policy, critic = dql.DiffusionPolicy(S, A, hidden_dim=H).double(), dql.TwinCritic(S, A, H).double()
    with torch.no_grad():
        critic.flat.mul_(4)
    B, N = 20_000, 4
    state, noise = torch.randn(1, S).double(), torch.randn(5, 1, N, A).double()
    candidates = dql.sample(state, policy, noise=noise, num_candidates=N)[0]
    probabilities = transcription.acting_probabilities(critic.state_dict(), state, candidates.detach()[None])[0]
    got = dql.select(state.expand(B, S), policy, critic, num_candidates=N, noise=noise.expand(5, B, N, A), seed=6)
    counts = ((got[:, None] - candidates).abs().amax(-1) < 1e-9).double().sum(0)  # [N]
    assert int(counts.sum()) == B
    for n in range(N):
        p = float(probabilities[n])
        assert abs(float(counts[n]) / B - p) < 5 * math.sqrt(p * (1 - p) / B)


def test_select_survives_huge_q(policy, critic):
    with torch.no_grad():
        critic.flat.mul_(100)
    got = dql.select(torch.randn(50, S), policy, critic, num_candidates=50, seed=0)
    assert got.isfinite().all()


# One sentence for every mistake


def mistakes():
    """(call's changes, error, sentence)."""
    z = torch.zeros
    V = ValueError
    return {
        "an array": (
            {"states": [[0.0] * S]},
            TypeError,
            r"states must be a torch\.Tensor, got list; use torch\.as",
        ),
        "one state": (
            {"states": z(S)},
            V,
            rf"states must be \[B, {S}\] .* got \[{S}\]; for one state use states\[None",
        ),
        "wrong S": (
            {"states": z(2, S + 1)},
            V,
            rf"states must be \[B, {S}\] for this policy, got \[2, {S + 1}\]$",
        ),
        "3-D": ({"states": z(2, 1, S)}, V, rf"states must be \[B, {S}\] for this policy, got \[2, 1, {S}\]$"),
        "float64": (
            {"states": z(2, S).double()},
            V,
            r"states are torch\.float64, the policy is torch\.float32; use states\.to\(torch\.float32\)",
        ),
        "integers": ({"states": z(2, S).long()}, V, r"states are torch\.int64, the policy is torch\.float32"),
        "another device": (
            {"states": z(2, S, device="meta")},
            V,
            "states are on meta, the policy is on cpu; move one",
        ),
        "NaN": (
            {"states": z(2, S).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan))},
            V,
            "states hold 1 NaN or infinite values, the first at row 1, column 2; mend the source",
        ),
        "infinity": (
            {"states": torch.full((2, S), -torch.inf)},
            V,
            rf"states hold {2 * S} NaN or infinite values",
        ),
        "noise of another K": (
            {"noise": z(4, 2, A)},
            V,
            rf"noise must be \[K, B, A\] = \[5, 2, {A}\], got \[4, 2, {A}\]",
        ),
        "noise with candidates": (
            {"noise": z(5, 2, A), "num_candidates": 3},
            V,
            rf"noise must be \[K, B, N, A\] = \[5, 2, 3, {A}\], got \[5, 2, {A}\]",
        ),
        "noise that is none": ({"noise": 1.0}, V, "got float"),
        "noise of another dtype": (
            {"noise": z(5, 2, A).double()},
            V,
            r"noise is torch\.float64 on cpu, .* convert it",
        ),
        "noise with a gradient": (
            {"noise": z(5, 2, A, requires_grad=True)},
            V,
            r"noise requires grad, but no gradient flows to it; pass noise\.detach\(\)",
        ),
        "noise and seed": ({"noise": z(5, 2, A), "seed": 1}, V, "give noise or a seed, not both"),
        "a bad seed": ({"seed": -1}, V, r"seed must be an integer from 0 to 2\^64 - 1, got -1"),
        "too many steps": ({"num_steps": 6}, V, "from 1 to the 5 steps the policy was trained with, got 6"),
        "no steps": ({"num_steps": 0}, V, "from 1 to the 5 steps the policy was trained with, got 0"),
        "unknown sampler": (
            {"sampler": "none such"},
            V,
            f"unknown sampler 'none such'; known: {re.escape(', '.join(SAMPLERS))}, or a",
        ),
        "table and steps": (
            {"sampler": dql.StepTable.ddim(dql.NoiseSchedule(), 3), "num_steps": 2},
            V,
            "num_steps=2 but the StepTable has 3 rows; leave one out",
        ),
        "a table of a longer schedule": (
            {"sampler": dql.StepTable.ddim(dql.NoiseSchedule("vp", 50), 3)},
            V,
            "do not fit a policy trained with T = 5",
        ),
        "unknown backend": (
            {"backend": "gpu"},
            V,
            f"unknown backend 'gpu'; this version of dql has: auto, {', '.join(registry())}",
        ),
        "unknown precision": ({"precision": "fp8"}, V, "unknown precision 'fp8'; known: fp32, tf32, bf16"),
        "no candidates": ({"num_candidates": 0}, V, "num_candidates must be a positive integer.* got 0"),
        "half a candidate": (
            {"num_candidates": 2.5},
            V,
            r"num_candidates must be a positive integer.* got 2\.5",
        ),
    }


@pytest.mark.parametrize("mistake", mistakes())
def test_sample_says_what_is_wrong(policy, mistake):
    changes, error, sentence = mistakes()[mistake]
    arguments = {"states": torch.zeros(2, S), **changes}
    with pytest.raises(error, match=sentence) as caught:
        dql.sample(arguments.pop("states"), policy, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mistake", [m for m in mistakes() if "noise" not in m])
def test_select_says_the_same(policy, critic, mistake):
    changes, error, sentence = mistakes()[mistake]
    arguments = {"states": torch.zeros(2, S), **changes}
    with pytest.raises(error, match=sentence):
        dql.select(arguments.pop("states"), policy, critic, **arguments)


def test_select_needs_a_fitting_critic(policy, critic):
    states = torch.zeros(2, S)
    cases = [
        (None, TypeError, r"select needs a TwinCritic, got NoneType; without one, use dql\.sample"),
        (critic.q1_model, TypeError, "select needs a TwinCritic, got Sequential"),
        (
            dql.TwinCritic(S + 1, A, H),
            ValueError,
            rf"takes \(state, action\) sizes \({S + 1}, {A}\), .*\({S}, {A}\)",
        ),
        (
            copy.deepcopy(critic).double(),
            ValueError,
            r"the critic is torch\.float64 on cpu, the policy is torch\.float32",
        ),
    ]
    for wrong, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            dql.select(states, policy, wrong)
    with pytest.raises(ValueError, match="select needs num_candidates"):
        dql.select(states, policy, critic, num_candidates=None)
    with pytest.raises(ValueError, match="no policy"):
        dql.select(states, critic=critic)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(0, S - 1),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_any_bad_state_is_found_and_no_good_one_refused(row, column, bad, good):
    policy = dql.DiffusionPolicy(S, A, hidden_dim=4, num_hidden=1)
    states = torch.full((7, S), good)  # their sum may overflow: that alone is no mistake
    with torch.no_grad():
        policy.denoiser.flat.zero_()  # the network itself must not overflow here
    dql.sample(states, policy, seed=0)
    states[row, column] = bad
    with pytest.raises(ValueError, match=f"hold 1 NaN or infinite values, the first at row {row}, column {column};"):
        dql.sample(states, policy, seed=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=0, max_size=4), st.sampled_from([None, 2]))
def test_any_other_noise_shape_is_refused(shape, N):
    policy = dql.DiffusionPolicy(S, A, hidden_dim=4, num_hidden=1)
    right = [5, 2, A] if N is None else [5, 2, N, A]
    noise = torch.zeros(shape)
    if shape == right:
        return
    with pytest.raises(ValueError, match="noise must be "):
        dql.sample(torch.zeros(2, S), policy, num_candidates=N, noise=noise)


def test_num_steps_and_own_tables():
    case = Case(3, S, A, 5, H=H)
    problem = make_problem(case, torch.float64)
    policy, states, noise = problem.policy, problem.states, problem.noise
    for name in SAMPLERS:
        table = dql.StepTable.make(name, policy.schedule, 2)
        by_name = dql.sample(states, policy, noise=noise[:2], sampler=name, num_steps=2)
        assert torch.equal(by_name, dql.sample(states, policy, noise=noise[:2], sampler=table))
        assert torch.equal(by_name, dql.sample(states, policy, noise=noise[:2], sampler=table, num_steps=2))
    deterministic = dql.sample(states, policy, noise=noise, sampler="ddim")
    other = torch.cat([noise[:1], torch.randn_like(noise[1:])])
    assert torch.equal(deterministic, dql.sample(states, policy, noise=other, sampler="ddim"))
    assert not torch.equal(dql.sample(states, policy, noise=noise), dql.sample(states, policy, noise=other))


def test_cases_are_different_problems():
    assert len({str(case) for case in CASES}) == len(CASES)
    assert replace(CASES[0], B=2) != CASES[0]


def test_autocast_does_not_touch_the_chain():
    policy = dql.DiffusionPolicy(11, 3, hidden_dim=64)
    states = torch.randn(40, 11, requires_grad=True)
    want = dql.sample(states, policy, seed=1)
    (want_gradient,) = torch.autograd.grad(want.sum(), states)
    with torch.autocast("cpu", torch.bfloat16):
        got = dql.sample(states, policy, seed=1)
        (gradient,) = torch.autograd.grad(got.sum(), states)
        with torch.no_grad():
            assert torch.equal(dql.sample(states, policy, seed=1), want)
    assert torch.equal(got, want)
    assert torch.equal(gradient, want_gradient)


def test_inside_torch_compile_it_runs_as_it_is():
    policy = dql.DiffusionPolicy(11, 3, hidden_dim=16)
    states = torch.randn(4, 11, requires_grad=True)
    compiled = torch.compile(lambda s: dql.sample(s, policy, seed=1) * 2, backend="eager")
    got, want = compiled(states), dql.sample(states, policy, seed=1) * 2
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(a.sum(), states)[0] for a in (got, want)))


def test_a_table_for_the_other_prediction_is_refused():
    policy = dql.DiffusionPolicy(11, 3, hidden_dim=16, predict_epsilon=False)
    table = dql.StepTable.ddim(policy.schedule, stochasticity=0.5)
    with pytest.raises(ValueError, match="made with predict_epsilon=True, the policy has False"):
        dql.sample(torch.zeros(1, 11), policy, sampler=table)


@pytest.mark.parametrize("bound", [1e6, 1e-9, 1e30])
def test_a_bound_beyond_half_precision(bound):
    policy, states = dql.DiffusionPolicy(3, 2, max_action=bound).half(), torch.zeros(4, 3).half()
    with pytest.raises(ValueError, match=r"is beyond what torch\.float16 holds, from 6.1"):
        dql.sample(states, policy, seed=1)
    assert dql.sample(states.bfloat16(), policy.bfloat16(), seed=1).isfinite().all()
    assert dql.sample(states.float(), policy.float(), seed=1).isfinite().all()
