"""Every way in which the backend "cuda" cuts a problem, forced, on a real GPU.

The emulator proves these kernels on a CPU (`cuda/test_tilings`), as far as it can: what is left is what a GPU alone
has. Real layouts of fragments and descriptors, clusters, copies and stores that arrive when they arrive, one kernel
that starts before another ends, the PTX itself. It skips without a GPU; see `test_numbers`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.utils.deterministic
from support import cancelling
from support.cases import TOLERANCES, Case, Problem, assert_close, expected, make_problem
from support.gpu import (
    PRECISIONS,
    REDUCED_ACTIONS,
    SEED,
    SMOOTH,
    captured,
    check_fp32,
    check_reduced,
    gpu_policy,
    gpu_states,
    gradients,
    needs_cuda,
    needs_gpu,
    norm_error,
    on_device,
    poisoned,
    run_on_gpu,
    same_bits,
    sample,
)
from support.networks import make_critic

import dql
from dql.backend.base import timestep_embedding
from dql.kernels.cuda import binding
from dql.kernels.cuda.chain import ChainRunner
from dql.kernels.cuda.critic import CriticRunner
from dql.kernels.cuda.plan import SOLO_ROWS, WIDE, Tiling, forced
from dql.kernels.layout import CriticSpec, DenoiserSpec

pytestmark = [needs_gpu, needs_cuda]

Tensor = torch.Tensor
RESIDENT = [Tiling(cluster, m, True) for cluster in (1, 2, 4, 8) for m in (1, 2, 4)]
STREAMED = [Tiling(1, m, False) for m in (1, 2, 4)]
SOLO = [Tiling.alone(rows) for rows in SOLO_ROWS]
SAVING_SOLO = SOLO[1:]  # tiles of 4 rows save nothing
WIDE_TILING = Tiling(1, WIDE, False)
NETWORKS = [(17, 6, 256), (17, 24, 64)]  # S, A, H
BATCHES = (1, 16, 17, 256, 1000)
# of every kind one, for what is about launches and not about numbers
KINDS = [Tiling(8, 1, True), Tiling(4, 2, True), Tiling(2, 1, True), Tiling(1, 4, False), Tiling.alone(8), WIDE_TILING]


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned():
        yield


def name_of(tiling: Tiling) -> str:
    if tiling.solo:
        return f"solo-{tiling.rows}rows"
    kind = f"cluster{tiling.cluster}" if tiling.resident else "streamed"
    return f"{kind}-{tiling.rows}rows"


def skip_misfit(tiling: Tiling, precision: str, spec: DenoiserSpec | CriticSpec) -> None:
    """Skips where this GPU has no such kernel, or too little shared memory for it."""
    emulated = binding.emulating()
    capability, _, shared, wide = binding.facts(0, emulated)
    if tiling.solo and precision != "bf16":
        pytest.skip("solo blocks are for bf16")
    if tiling.resident and not tiling.solo and capability < 90:
        pytest.skip(f"weights are resident from compute capability 9.0 on, this GPU has {capability / 10}")
    if tiling.m_tiles == WIDE:
        if not wide:
            pytest.skip("tiles of 128 rows are for compute capability 9.0 alone, if it was built for it")
        return
    if precision == "fp32" and tiling.m_tiles == 4:
        pytest.skip("there are no tiles of 64 rows in fp32")
    mlp = binding.mlp(spec, emulated)
    needed = binding.load(emulated).shared_bytes(mlp, *tiling.numbers(precision), 1)
    if needed > shared:
        pytest.skip(f"it needs {needed} bytes of shared memory a block, this GPU has {shared}")


def forward(problem: Problem, precision: str) -> Tensor:
    with torch.no_grad():
        return dql.sample(
            problem.states,
            problem.policy,
            backend="cuda",
            noise=problem.noise,
            sampler=problem.table,
            precision=precision,
        )


def close_actions(got: Tensor, want: Tensor, precision: str, case: object) -> None:
    assert got.isfinite().all(), f"case {case}"
    if precision == "fp32":
        assert_close(got, want, TOLERANCES["float32"], what="actions", case=case, backend="cuda")
    else:
        error = norm_error(got.cpu(), want.cpu())
        assert error <= REDUCED_ACTIONS[precision], f"actions in case {case}: error {error:.3g} in {precision}"


# Values and gradients


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tiling", [*RESIDENT, *STREAMED, *SAVING_SOLO], ids=name_of)
def test_a_tiling(tiling, precision, network):
    """Forward that saves, backward, and forward that does not save."""
    S, A, H = network
    for B in BATCHES:
        case = Case(B=B, S=S, A=A, K=5, H=H, max_action=2.5 if precision == "fp32" else SMOOTH)
        skip_misfit(tiling, precision, make_problem(case, torch.float32).policy.denoiser.spec)
        with forced(tiling):
            got = run_on_gpu(case, "cuda", precision)
            alone = forward(on_device(make_problem(case, torch.float32)), precision)
        if precision == "fp32":
            check_fp32(case, got, "cuda")
        else:
            check_reduced(case, got, "cuda", precision)
        tolerance = TOLERANCES["float32" if precision == "fp32" else "bf16"]
        assert_close(alone, got["actions"], tolerance, what="actions without saving", case=case, backend="cuda")


@pytest.mark.parametrize("tiling", SOLO, ids=name_of)
@pytest.mark.parametrize(
    "options",
    [{}, {"H": 80}, {"A": 24}, {"num_hidden": 2}, {"H": 128, "num_hidden": 4}, {"activation": "silu"}, {"K": 15}],
    ids=str,
)
def test_a_block_alone(tiling, options):
    """Other sizes of the networks that solo blocks take; forward."""
    for B in (1, 37, 300):
        case = replace(Case(B=B, S=70, A=6, K=5, H=256, max_action=2.5), **options)
        problem = on_device(make_problem(case, torch.float32))
        skip_misfit(tiling, "bf16", problem.policy.denoiser.spec)
        with forced(tiling):
            close_actions(forward(problem, "bf16"), expected(case)["actions"], "bf16", case)


@pytest.mark.parametrize("max_action", [2.5, SMOOTH])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_128_rows(network, max_action):
    S, A, H = network
    for B in BATCHES:
        case = Case(B=B, S=S, A=A, K=5, H=H, max_action=max_action)
        problem = on_device(make_problem(case, torch.float32))
        skip_misfit(WIDE_TILING, "bf16", problem.policy.denoiser.spec)
        with forced(WIDE_TILING):
            close_actions(forward(problem, "bf16"), expected(case)["actions"], "bf16", case)


@pytest.mark.parametrize(
    "options",
    [
        {"H": 80}, {"A": 24}, {"num_hidden": 2}, {"num_hidden": 4}, {"activation": "silu"}, {"K": 1},
        {"S": 17, "A": 6}, {"S": 29, "A": 8}, {"S": 60, "A": 9}, {"S": 60, "A": 9, "H": 128},
    ],
)  # fmt: skip
def test_128_rows_of_other_networks(options):
    """The first layer is a product of one slab, of two, of three, or a sum onto the states' part; with 24 actions of
    width 256 the small layers' weights stay in device memory."""
    case = replace(Case(B=300, S=11, A=3, K=5, H=256, max_action=2.5), **options)
    problem = on_device(make_problem(case, torch.float32))
    skip_misfit(WIDE_TILING, "bf16", problem.policy.denoiser.spec)
    with forced(WIDE_TILING):
        close_actions(forward(problem, "bf16"), expected(case)["actions"], "bf16", case)


def by_both(states: Tensor, policy: dql.DiffusionPolicy, noise: Tensor) -> list[Tensor]:
    """Actions by streamed weights and by tiles of 128 rows."""
    skip_misfit(WIDE_TILING, "bf16", policy.denoiser.spec)
    found = []
    for tiling in (Tiling(1, 4, False), WIDE_TILING):
        with torch.no_grad(), forced(tiling):
            found.append(dql.sample(states, policy, backend="cuda", noise=noise, precision="bf16"))
    return found


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("S", [17, 29, 60])
def test_128_rows_round_what_others_round(S, scale):
    """The first and the last layer are as good as float32 beside the hidden layers' rounding, which flips."""
    case = Case(B=300, S=S, A=6, K=5, H=256, max_action=SMOOTH)
    problem = on_device(make_problem(case, torch.float32))
    want, got = by_both(scale * problem.states, problem.policy, problem.noise)
    assert norm_error(got, want) <= TOLERANCES["bf16 flips"].rel


def test_128_rows_keep_what_cancels():
    """What is left of nearly equal numbers, in the first and in the last layer: `support/cancelling.py`."""
    for S in (17, 29, 60):
        policy, states, noise = cancelling.first_layer(S, "cuda")
        want, got = by_both(states, policy, noise)
        assert want.abs().min() > 0 and torch.equal(got, want), S
    for column in (0, 7, 130, 255):
        policy, states, noise = cancelling.last_layer(column, "cuda")
        want, got = by_both(states, policy, noise)
        assert want.abs().min() > 0 and ((got - want) / want).abs().max() < 1e-3, column


def test_128_rows_have_the_same_bits_each_time():
    """Three or four tiles a block, one after the other: what one of them reads too late or too early would show."""
    call = Calls(1, 50_001)
    skip_misfit(WIDE_TILING, "bf16", call.spec)
    with forced(WIDE_TILING):
        first = call.forward()
        for _ in range(30):
            assert same_bits(call.forward(), first)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tiling", [*RESIDENT, *STREAMED, *SOLO, WIDE_TILING], ids=name_of)
def test_more_tiles_than_fit_at_a_time(tiling, precision):
    """Each cluster goes through several tiles; the noise is its own draw."""
    if tiling == WIDE_TILING and precision != "bf16":
        pytest.skip("tiles of 128 rows are for bf16")
    policy, states = gpu_policy(hidden_dim=256), gpu_states(50_001)
    skip_misfit(tiling, precision, policy.denoiser.spec)
    with torch.no_grad():
        want = sample(states, policy, "eager")
        with forced(tiling):
            got = sample(states, policy, "cuda", precision=precision)
    close_actions(got, want, precision, f"of 50,001 rows, {tiling}")


@pytest.mark.parametrize("tiling", [*RESIDENT, *STREAMED, *SAVING_SOLO], ids=name_of)
def test_gradients_of_more_tiles_than_fit_at_a_time(tiling):
    """Each block goes through several tiles backward, too: 5,000 rows on up to 132 multiprocessors."""
    case = Case(B=5000, S=17, A=6, K=2, H=256, max_action=SMOOTH)
    problem = on_device(make_problem(case, torch.float32))
    skip_misfit(tiling, "bf16", problem.policy.denoiser.spec)
    with forced(tiling):
        got = run_on_gpu(case, "cuda", "bf16")
    check_reduced(case, got, "cuda", "bf16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tiling", [*RESIDENT, *STREAMED], ids=name_of)
def test_critics(tiling, precision):
    """Both networks side by side, against torch on the GPU: Q, and the gradients of actions, states and parameters."""
    critic, states = make_critic().to("cuda"), gpu_states(300).requires_grad_()
    actions = torch.rand(300, critic.spec.action_dim, device="cuda").mul_(2).sub_(1).requires_grad_()
    d_q = torch.randn(2, 300, device="cuda")
    skip_misfit(tiling, precision, critic.spec)
    want = torch.stack(critic(states, actions))
    names, parameters = zip(*critic.named_parameters(), strict=True)
    gradients = torch.autograd.grad(want, [states, actions, *parameters], d_q)
    wanted = {"q": want.detach()} | dict(zip(("d_states", "d_actions", *names), gradients, strict=True))
    runner = CriticRunner(critic.spec, precision, states.device)
    with torch.no_grad(), forced(tiling):
        q, saved = runner.forward(critic.buffer, states, actions, 1, (0, 1), save=True)
        d_flat, d_states, d_actions = runner.backward(
            critic.buffer, saved, states, actions, d_q, need_parameters=True, need_states=True, need_actions=True
        )
    got = {"q": q, "d_states": d_states, "d_actions": d_actions} | critic.spec.layout.views(d_flat)
    allowed = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 6e-2}[precision]
    for name, tensor in wanted.items():
        error = norm_error(got[name], tensor)
        assert error <= allowed, f"{name}, {tiling} in {precision}: error {error:.3g}, allowed {allowed:g}"


@pytest.mark.parametrize("tiling", [tiling for tiling in KINDS[:-1] if not tiling.solo], ids=name_of)
def test_select(tiling):
    """As `gpu/test_numbers.test_select_takes_what_eager_takes`. Critics have no solo blocks."""
    policy, critic, states = gpu_policy(), make_critic().to("cuda"), gpu_states(50)
    skip_misfit(tiling, "bf16", policy.denoiser.spec)
    want = dql.select(states, policy, critic, seed=SEED, backend="eager")
    with forced(tiling):
        got = dql.select(states, policy, critic, seed=SEED, backend="cuda", precision="bf16")
    assert int(((got - want).abs().amax(dim=1) < 1e-1).sum()) >= 35


# Launches


@pytest.mark.parametrize("tiling", KINDS[:-1], ids=name_of)
def test_the_same_bits_each_time(tiling):
    """An exchange that now and then came too late would show."""
    policy, states = gpu_policy(hidden_dim=256), gpu_states(1000)
    skip_misfit(tiling, "bf16", policy.denoiser.spec)
    with forced(tiling):
        first = gradients(states, policy, "cuda", precision="bf16")
        for _ in range(50):
            assert same_bits(gradients(states, policy, "cuda", precision="bf16"), first)


@contextlib.contextmanager
def nothing_between() -> Iterator[None]:
    """torch does not fill what it allocates: the kernels follow each other, in memory that an earlier call had."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


class Calls:
    """Calls of one policy's chain that, unlike `dql.sample`, do not wait to look at the states."""

    def __init__(self, seed: int, B: int) -> None:
        policy = gpu_policy(seed=seed, hidden_dim=256)
        spec, table, self.flat = policy.denoiser.spec, policy.step_table(), policy.denoiser.buffer.detach()
        rows = torch.tensor([(*row, 0.0, 0.0) for row in table.rows], dtype=torch.float32, device="cuda")
        embedding = timestep_embedding(table, spec.time_dim, torch.float32, rows.device)
        self.spec, self.runner = spec, ChainRunner(spec, rows, embedding, 1.0, "bf16")
        self.states, self.d_actions = gpu_states(B), torch.randn(B, spec.action_dim, device="cuda")

    def forward(self) -> list[Tensor]:
        return [self.runner.forward(self.flat, self.states, 1, None, SEED, save=False)[0]]

    def backward(self) -> list[Tensor]:
        actions, saved = self.runner.forward(self.flat, self.states, 1, None, SEED, save=True)
        assert saved is not None
        d_flat, d_states = self.runner.backward(self.flat, saved, self.states, self.d_actions, True, True)
        assert d_flat is not None and d_states is not None
        return [actions, d_flat, d_states]


@pytest.mark.parametrize("what", ["forward", "backward"])
@pytest.mark.parametrize("tiling", KINDS, ids=name_of)
def test_calls_right_after_each_other(tiling, what):
    """The chain may start while its prologue runs, in memory that the call before had: other weights lie there."""
    if tiling == WIDE_TILING and what == "backward":
        pytest.skip("tiles of 128 rows are for forward passes")
    calls = [getattr(Calls(seed, B), what) for seed, B in ((1, 256), (2, 255))]
    skip_misfit(tiling, "bf16", gpu_policy(hidden_dim=256).denoiser.spec)
    with forced(tiling), nothing_between():
        want = []
        for call in calls:
            want.append(call())
            torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # so that the GPU finds them queued
        got = [calls[i % 2]() for i in range(100)]
    for i, tensors in enumerate(got):
        assert same_bits(tensors, want[i % 2]), f"call {i}"


@pytest.mark.parametrize("tiling", KINDS, ids=name_of)
def test_two_streams_at_a_time(tiling):
    """Clusters of both calls share the multiprocessors."""
    calls, streams = [Calls(1, 4000), Calls(2, 3999)], [torch.cuda.Stream() for _ in range(2)]
    skip_misfit(tiling, "bf16", calls[0].spec)
    got: list[list[list[Tensor]]] = [[], []]
    with forced(tiling), nothing_between():
        want = [call.forward() for call in calls]
        torch.cuda.synchronize()
        for _ in range(20):
            for results, call, stream in zip(got, calls, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(call.forward())
        torch.cuda.synchronize()
    for results, alone in zip(got, want, strict=True):
        assert all(same_bits(tensors, alone) for tensors in results)


@pytest.mark.parametrize("tiling", KINDS, ids=name_of)
def test_replays(tiling):
    policy, states = gpu_policy(hidden_dim=256), gpu_states(300)
    skip_misfit(tiling, "bf16", policy.denoiser.spec)
    with torch.no_grad(), forced(tiling):
        graph, actions = captured(lambda: sample(states, policy, "cuda", precision="bf16"))
        for change in (lambda: None, lambda: policy.denoiser.flat.mul_(1.1), states.neg_):
            change()
            for _ in range(20):
                actions.fill_(float("nan"))
                graph.replay()
            assert torch.equal(actions, sample(states, policy, "cuda", precision="bf16"))
