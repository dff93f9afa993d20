"""Twin critics, their gradients and the acting rule by the kernels of every backend for GPUs, against float64 torch: on
a GPU where there is one, otherwise interpreted or emulated. `select` as a caller meets it is in `test_select`."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.cases import TOLERANCES, assert_all_close, assert_close
from support.critic import (
    BOTH,
    CASES,
    DEVICE,
    Case,
    Run,
    by_the_rule,
    chosen,
    drawing,
    expected,
    make_critic,
    on_device,
    poisoned,
)

import dql
from dql import noise as noise_stream
from dql.kernels.reference import time_embedding


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(kernels, case):
    got = Run(kernels, case).named()
    assert_all_close(got, expected(case), TOLERANCES["critic float32"], case=case, backend=kernels.__name__)


@pytest.mark.parametrize("case", [CASES[4], CASES[8]], ids=str)
def test_the_same_bits(kernels, case):
    """With and without saving, in a second backward pass, and whatever else is needed."""
    run = Run(kernels, case)
    unsaved, nothing = run.forward(save=False)
    assert nothing is None
    assert torch.equal(unsaved, run.q)
    whole = run.backward(True, True, True)
    for needs in itertools.product((False, True), repeat=3):
        for need, part, full in zip(needs, run.backward(*needs), whole, strict=True):
            assert torch.equal(part, full) if need else part is None


@pytest.mark.parametrize("only", [1, 2])
def test_of_one_critic_alone(kernels, only):
    """Whose d_q alone is not zero: the gradient of the actions is that of both, by number or by flags on the device."""
    run = Run(kernels, Case(B=37, S=11, A=3, H=16))
    run.d_q[2 - only] = 0
    want = run.backward(False, False, True)[2]
    flags = torch.zeros(4, device=DEVICE)
    flags[1 + only] = 1
    for which in (only, flags[2:]):
        with poisoned():
            got = run.runner.backward(
                run.flat, run.saved, run.states, run.actions, run.d_q, False, False, True, only=which
            )
        assert got[:2] == (None, None) and torch.equal(got[2], want)


def test_into_memory_that_is_given(kernels):
    run = Run(kernels, Case(B=37, S=11, A=3, H=16))
    want, into = run.backward(True, False, False)[0], torch.full_like(run.flat, torch.nan)
    got = run.runner.backward(run.flat, run.saved, run.states, run.actions, run.d_q, True, False, False, into=into)
    assert got[0] is into and torch.equal(into, want)


@pytest.mark.parametrize("which", [(0,), (1,)])
def test_one_network_is_half_of_both(kernels, which):
    case = Case(B=37, S=11, A=3, N=3, H=16)
    both, one = Run(kernels, case), Run(kernels, Case(B=37, S=11, A=3, N=3, H=16, which=which))
    alone, saved = one.runner.forward(both.flat, both.states, both.actions, 3, which, True)
    assert torch.equal(alone[0], both.q[which[0]])
    d_flat, _, _ = one.runner.backward(
        both.flat, saved, both.states, both.actions, both.d_q[which[0] :][:1], True, False, False
    )
    want, _, _ = both.backward(True, False, False)
    half = slice(0, len(want) // 2) if which == (0,) else slice(len(want) // 2, None)
    # not the same bits: rows are split among images by how many networks there are
    assert_close(d_flat[half], want[half], TOLERANCES["rows"], what="d_flat")


@pytest.mark.parametrize("case", [CASES[4], CASES[6]], ids=str)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision(kernels, case, precision):
    """The error is rounding's, as root mean square; in bf16 the values are those of operands that were rounded."""
    got, want = Run(kernels, case, precision).named(), expected(case)
    rounded = expected(case, "bf16")["q"] if precision == "bf16" else want["q"]
    assert_close(got["q"], rounded, TOLERANCES["bf16"], what="q", case=case, backend=kernels.__name__)
    for name in want:
        error = (got[name].double().cpu() - want[name]).square().mean().sqrt()
        size = want[name].square().mean().sqrt()
        assert error <= TOLERANCES["bf16 in all"].rel * size, f"{name}: error {error:.2e} of {size:.2e}"


def test_a_slice_and_no_alignment(kernels):
    """Actions, states and d_q may start anywhere in memory."""
    run = Run(kernels, CASES[4])
    whole = run.backward(True, True, True)
    for name in ("states", "actions", "d_q"):
        tensor = getattr(run, name)
        moved = torch.empty(tensor.numel() + 1, device=DEVICE)[1:].view(tensor.shape)
        setattr(run, name, moved.copy_(tensor))
    q, run.saved = run.forward(save=True)
    assert torch.equal(q, run.q)
    assert all(torch.equal(a, b) for a, b in zip(run.backward(True, True, True), whole, strict=True))


@pytest.mark.parametrize("which", [(1, 0), (), (2,), (0, 1, 1), 0])
def test_no_such_critics(kernels, which):
    run = Run(kernels, CASES[0])
    with pytest.raises(ValueError, match=r"which must be \(0, 1\), \(0,\) or \(1,\), the critics to run, got"):
        run.runner.forward(run.flat, run.states, run.actions, 1, which, False)


WRONG = {
    "shorter": lambda x: x.reshape(-1)[:-1],
    "longer": lambda x: torch.cat([x.reshape(-1), x.reshape(-1)]),
    "float64": lambda x: x.double(),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_memory_that_kernels_would_leave(kernels, wrong):
    """They get an address and a count: a tensor that holds less, or otherwise, is refused before."""
    run, change = Run(kernels, Case(B=3, S=5, A=2, H=16, num_hidden=2)), WRONG[wrong]
    case, states, actions = run.case, run.states, run.actions
    pieces = pytest.raises(ValueError, match=r"must be .* float32 numbers in one piece")
    rest = (run.candidates, case.which, False)
    with pieces:
        run.runner.forward(change(run.flat), states, actions, *rest)
    with pieces:
        run.runner.forward(run.flat, states, change(actions), *rest)
    every = (True, True, True)
    with pieces:
        run.runner.backward(change(run.flat), run.saved, states, actions, run.d_q, *every)
    with pieces:
        run.runner.backward(run.flat, run.saved, states, change(actions), run.d_q, *every)
    spec = dql.Denoiser(11, 3, 16, 2).spec
    table, embedding = torch.zeros(2, 8, device=DEVICE), torch.zeros(2, 16, device=DEVICE)
    chain = kernels.chain_runner(spec, table, embedding, 1.0, "fp32")
    flat, on, noise = (torch.zeros(*shape, device=DEVICE) for shape in ((spec.layout.size,), (4, 11), (2, 8, 3)))
    _, saved = chain.forward(flat, on, 2, noise, 0, True)
    with pieces:
        chain.forward(change(flat), on, 2, noise, 0, False)
    with pieces:
        chain.forward(flat, on, 2, change(noise), 0, False)
    with pieces:
        chain.backward(change(flat), saved, on, torch.zeros(8, 3, device=DEVICE), True, True)


# The acting rule


@pytest.mark.parametrize("spread", [0.1, 3.0, 100.0])
@pytest.mark.parametrize(("B", "N"), [(1, 1), (37, 1), (37, 3), (70, 50), (12, 1000), (3, 5000)])
def test_choice(kernels, B, N, spread):
    q, seed = drawing((B, N, spread))(2, B * N).float() * spread, 7 + B
    index, clear = by_the_rule(q, N, seed)
    assert clear.double().mean() > (0.5 if N > 1000 else 0.9)
    got = chosen(kernels, q, N, seed, A=1 if N == 3 else 3)
    assert torch.equal(got[clear], index[clear])
    assert (got - index).abs().max() <= 1
    assert N == 1 or spread > 1 or len(index.unique()) > min(B, N) / 3, "the rule itself hardly chooses"


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) + 11, (1 << 64) - 1])
def test_draw_seeds(kernels, seed):
    """All 64 bits of the seed count, as a number and in memory."""
    q = drawing("seeds")(2, 40 * 20)
    index, clear = by_the_rule(q.float(), 20, seed)
    got = chosen(kernels, q, 20, seed)
    assert torch.equal(got[clear], index[clear])
    signed = seed - (1 << 64) if seed >> 63 else seed
    in_memory = torch.tensor([0, signed], dtype=torch.int64, device=DEVICE)[1:]
    assert torch.equal(chosen(kernels, q, 20, in_memory), got)


@pytest.mark.parametrize("N", [3, 50, 1500])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_critic_that_is_no_number(kernels, N, bad):
    """The first candidate, of the states that it befell alone; from either network, anywhere among the candidates."""
    q = drawing(N)(2, 6 * N)
    index, clear = by_the_rule(q.float(), N, 3)
    hit = {0: 0, 2: N - 1, 4: N // 2}
    for b, n in hit.items():
        q[:, b * N + n] = bad
        if bad != bad:
            q[b // 2 % 2, b * N + n] = 1.0
    got = chosen(kernels, q, N, 3)
    assert not got[list(hit)].any()
    spared = [b for b in range(6) if b not in hit and clear[b]]
    assert spared and torch.equal(got[spared], index[spared])


def test_what_cannot_be_chosen(kernels):
    """A candidate that either critic finds hopeless is never drawn; the only other one always is."""
    N, B = 60, 20
    q = torch.zeros(2, B, N)
    best = torch.arange(B) * 7 % N
    q[0] = -1e4
    q[1, :, ::2] = -torch.inf
    q[0, torch.arange(B), best] = 0.0
    q[1, torch.arange(B), best] = 0.0
    assert torch.equal(chosen(kernels, q.view(2, -1), N, 5), best)


@pytest.mark.parametrize(
    ("B", "N", "K", "by_seed"),
    [(37, 50, 2, False), (1, 1, 2, False), (37, 1, 1, True), (2, 300, 2, True), (5, 3, 5, True)],
)
def test_select(kernels, B, N, K, by_seed):
    """Chain, critics and draw one after the other on the device give what `dql.select` gives in eager torch."""
    S, A, draw_seed = 11, 3, 12
    draw = drawing((B, N, K))
    critic = make_critic(Case(B, S, A, N, H=16), draw).float()
    policy = dql.DiffusionPolicy(S, A, 1.5, 16, 2, K)
    states, noise = draw(B, S).float(), draw(K, B, N, A).float()
    if by_seed:
        noise = noise_stream.normal(draw_seed, K, B * N, A).reshape(K, B, N, A)
    denoiser, table = policy.denoiser, dql.StepTable.make("ddpm", policy.schedule, K)
    rows = F.pad(torch.tensor(table.rows, dtype=torch.float32), (0, 2)).to(DEVICE)  # [K, 8]
    embedding = time_embedding(torch.tensor(table.timesteps, dtype=torch.float32), 16).to(DEVICE)
    chain = kernels.chain_runner(denoiser.spec, rows, embedding, policy.max_action, "fp32")
    runner = kernels.critic_runner(critic.spec, "fp32", DEVICE)
    flat, critic_flat, on = on_device(denoiser.buffer), on_device(critic.buffer), on_device(states)
    handed = None if by_seed else on_device(noise.reshape(K, B * N, A))
    with poisoned():
        candidates = chain.forward(flat, on, N, handed, draw_seed, False)[0]
        q, _ = runner.forward(critic_flat, on, candidates, N, BOTH, False)
        got = kernels.choose(q, candidates, N, draw_seed).cpu()
    index, clear = by_the_rule(q, N, draw_seed)
    assert clear.any()
    assert torch.equal(got[clear], candidates.cpu().view(B, N, A)[torch.arange(B), index][clear])
    want = dql.select(
        states, policy, critic, num_candidates=N, backend="eager", noise=noise.contiguous(), seed=draw_seed
    )
    assert_close(got[clear], want[clear], TOLERANCES["float32"], what="actions")
