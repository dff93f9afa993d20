"""NaN and infinity in states, found by the kernels of "triton" and "cuda": that the actions of such rows are NaN and no
others change, that a later call raises, and that no call waits for the device to learn it.

On a GPU if there is one; else interpreted and emulated. CUDA graphs are in `gpu/test_calls`.
"""

import contextlib
import math
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from support.emulator import SOLO
from support.networks import A, S, make_critic, make_policy, states_of
from torch.utils._python_dispatch import TorchDispatchMode

import dql
from dql import finite
from dql.backend.registry import of_gpus, registry
from dql.kernels.cuda import plan as cuda_plan
from dql.kernels.cuda.plan import Tiling
from dql.sampler import run_chain

Tensor = torch.Tensor
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"hidden_dim": 16, "num_hidden": 2, "T": 2}
BAD = [math.nan, math.inf, -math.inf]
EARLIER = "the states of a call before this one"
PRECISIONS = ["fp32", "tf32", "bf16"]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's, of what is meant here


@pytest.fixture(params=of_gpus())
def backend(request, runs_here) -> str:
    return runs_here(request.param)


@pytest.fixture(autouse=True)
def _nothing_is_left_to_tell():
    """No test hands its report to the next, nor to those of other files."""
    yield
    with contextlib.suppress(ValueError):
        dql.check_states()
    dql.check_states()


def on_device(states: Tensor) -> Tensor:
    return states.to(DEVICE)


def policy_of(**sizes: object) -> dql.DiffusionPolicy:
    return make_policy(**(SMALL | sizes)).to(DEVICE)


def chain(states: Tensor, policy: dql.DiffusionPolicy, backend: str, report: bool = True, **options: object) -> Tensor:
    """`dql.sample` without a look at the states: what a repeated call, or one in a graph, runs."""
    with torch.no_grad():
        return run_chain(states, policy, backend=backend, seed=3, report=report, **options)


def clear() -> bool:
    """Whether there was something to report."""
    try:
        dql.check_states()
    except ValueError:
        return True
    return False


# What becomes of the actions


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ["mish", "relu", "silu"])
def test_bad_rows_are_nan_and_others_as_ever(backend, activation, precision):
    """One in the middle of a tile, its neighbour and the last, one of each value; the others to the last bit."""
    policy, good = policy_of(activation=activation), on_device(states_of(37))
    bad = torch.zeros(37, dtype=torch.bool, device=DEVICE)
    states = good.clone()
    for row, value in zip((17, 18, 36), BAD, strict=True):
        states[row, 4], bad[row] = value, True
    for N in (None, 3):
        want, got = (chain(s, policy, backend, num_candidates=N, precision=precision) for s in (good, states))
        assert want.isfinite().all()
        assert got[bad].isnan().all(), N
        assert torch.equal(got[~bad], want[~bad]), N
        assert clear() and not clear()


@pytest.mark.parametrize("value", BAD)
def test_a_single_state(backend, value):
    policy, state = policy_of(), on_device(states_of(1))
    chain(state, policy, backend)
    assert not clear()
    state[0, 2] = value
    assert chain(state, policy, backend).isnan().all() and clear()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ["mish", "relu", "silu"])
def test_infinity_never_ends_within_the_bounds(backend, activation, precision):
    """As it would here without a NaN put in its place: every unit of the first layer is off and an ordinary action
    follows, or each is infinite and an infinite x0 is clamped. No width is padded: infinity times 0 is NaN."""
    policy, states = policy_of(activation=activation, hidden_dim=64), on_device(states_of(9))
    with torch.no_grad():
        policy.denoiser.flat.abs_()
    states[2, 1], states[7, 3] = -math.inf, math.inf
    got = chain(states, policy, backend, precision=precision)
    assert got.isnan().all(dim=1).tolist() == [row in (2, 7) for row in range(9)]
    assert got.isfinite().sum() == 7 * A and clear()


@pytest.mark.parametrize("width", [1, 3, 17, 33])
def test_every_column_is_looked_at(backend, width):
    """Also where a weight of zero would hide it."""
    policy = dql.DiffusionPolicy(width, 2, **SMALL).to(DEVICE)
    with torch.no_grad():
        policy.denoiser.flat.zero_()
    good = on_device(states_of(9, width))
    assert chain(good, policy, backend).isfinite().all()
    for column in range(width):
        states = good.clone()
        states[column % 9, column] = BAD[column % 3]
        got = chain(states, policy, backend)
        assert got[column % 9].isnan().all() and got.isnan().any(dim=1).sum() == 1, column
        assert clear(), column


def test_sizes_that_fill_no_tile(backend):
    """Hidden widths of more than a block's threads and of no tensor core's, many actions, a long chain."""
    for sizes in ({"hidden_dim": 72, "action_dim": 3, "num_hidden": 4}, {"hidden_dim": 320, "action_dim": 24, "T": 3}):
        policy = dql.DiffusionPolicy(S, **(SMALL | sizes)).to(DEVICE)
        states = on_device(states_of(35))
        states[17, 2] = math.inf
        got = chain(states, policy, backend, precision="bf16")
        assert got.isnan().all(dim=1).tolist() == [row == 17 for row in range(35)]
        assert got[got.isnan().logical_not()].isfinite().all() and clear()


@pytest.mark.parametrize("tiling", [Tiling(1, 4, False), Tiling(4, 1, True), Tiling(1, 8, False), *SOLO], ids=str)
def test_every_kind_of_cuda_kernel(tiling, runs_here):
    """Streamed, resident in a cluster, 128 rows a block by wgmma, and few rows by a block alone."""
    runs_here("cuda")
    policy, good = policy_of(hidden_dim=256), on_device(states_of(131))
    states = good.clone()
    states[5, 0], states[130, S - 1] = math.nan, -math.inf
    with cuda_plan.forced(tiling):
        want, got = (chain(s, policy, "cuda", precision="bf16") for s in (good, states))
    bad = torch.zeros(131, dtype=torch.bool, device=DEVICE)
    bad[[5, 130]] = True
    assert got[bad].isnan().all() and torch.equal(got[~bad], want[~bad]) and clear()


@pytest.mark.parametrize("sizes", [(17, 6), (29, 8), (60, 9)], ids=str)
@pytest.mark.parametrize("N", [None, 3])
def test_every_column_in_tiles_of_128_rows(N, sizes, runs_here):
    """Where the chain looks at the states, in one slab or two, and where the prologue makes their part. Candidates of
    a state share what becomes of it."""
    runs_here("cuda")
    policy = dql.DiffusionPolicy(*sizes, **(SMALL | {"hidden_dim": 256})).to(DEVICE)
    good = on_device(states_of(150, sizes[0]))
    with cuda_plan.forced(Tiling(1, 8, False)):
        want = chain(good, policy, "cuda", precision="bf16", num_candidates=N)
        assert want.isfinite().all() and not clear()
        states, bad = good.clone(), torch.zeros(150, dtype=torch.bool, device=DEVICE)
        for column in range(sizes[0]):
            row = 149 - 2 * column
            states[row, column], bad[row] = BAD[column % 3], True
        got = chain(states, policy, "cuda", precision="bf16", num_candidates=N)
        assert got[bad].isnan().all() and torch.equal(got[~bad], want[~bad]) and clear()
        got = chain(states, policy, "cuda", precision="bf16", num_candidates=N, report=False)
        assert got[bad].isnan().all() and not clear()
        with torch.no_grad():
            policy.denoiser.flat.zero_()
            largest = torch.finfo(torch.float32).max
            huge = (
                on_device(torch.full((150, sizes[0]), largest))
                * (1 - 2 * (torch.arange(150, device=DEVICE) % 2))[:, None]
            )
            assert chain(huge, policy, "cuda", precision="bf16", num_candidates=N).isfinite().all() and not clear()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_huge_finite_states_are_good(backend, precision):
    """Their sum overflows, and so may their product with the weights: that is no mistake of the states.

    float32's largest rounds to infinity as an operand of TF32 and of bf16: bf16's largest is finite in all three.
    """
    policy = policy_of()
    with torch.no_grad():
        policy.denoiser.flat.zero_()
        largest = torch.finfo(torch.float32 if precision == "fp32" else torch.bfloat16).max
        states = on_device(torch.full((20, S), 1e38))
        states[3], states[4, 1] = -largest, largest
        for _ in range(4):
            assert dql.sample(states, policy, backend=backend, seed=3, precision=precision).isfinite().all()
    assert not clear()


# Who is told, and when


def test_a_later_call_raises_and_the_next_looks_at_once(backend):
    policy, good = policy_of(), on_device(states_of(9))
    bad = good.clone()
    bad[4, 1] = math.inf
    with torch.no_grad():
        want = [dql.sample(good, policy, backend=backend, seed=3) for _ in range(3)]  # the third is prepared
        got = dql.sample(bad, policy, backend=backend, seed=3)
        assert got[4].isnan().all() and got.isnan().any(dim=1).sum() == 1
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        with pytest.raises(ValueError, match=EARLIER):
            dql.sample(good, policy, backend=backend, seed=3)
        for _ in range(3):  # now at once, with the place, in every call
            with pytest.raises(ValueError, match="hold 1 NaN or infinite values, the first at row 4, column 1"):
                dql.sample(bad, policy, backend=backend, seed=3)
        for _ in range(3):
            assert torch.equal(dql.sample(good, policy, backend=backend, seed=3), want[0])
    assert not clear()


def test_first_and_unprepared_calls_raise_at_once(backend):
    policy, bad = policy_of(), on_device(states_of(9))
    good = bad.clone()
    bad[8, S - 1] = math.nan
    noise = torch.randn(2, 9, A, device=DEVICE)
    for options in ({"num_candidates": 2}, {"noise": noise}, {"num_steps": 2}, {}):
        for gradients in (True, False):
            if options == {} and not gradients:
                continue  # that is the kind which is prepared
            for _ in range(3):
                with torch.set_grad_enabled(gradients):
                    dql.sample(good, policy, backend=backend, **options)
                    with pytest.raises(ValueError, match=f"row 8, column {S - 1}"):
                        dql.sample(bad, policy, backend=backend, **options)
    assert not clear()


def test_select(backend):
    """Its first call of a policy raises at once, the next do not wait."""
    policy, critic, good = policy_of(), make_critic().to(DEVICE), on_device(states_of(9))
    bad = good.clone()
    bad[4, 1] = -math.inf

    def select(states: Tensor) -> Tensor:
        return dql.select(states, policy, critic, num_candidates=5, backend=backend, seed=3)

    for _ in range(2):
        with pytest.raises(ValueError, match="row 4, column 1"):
            select(bad)
    want = select(good)
    got = select(bad)
    assert got[4].isnan().all()
    others = torch.arange(9, device=DEVICE) != 4
    assert torch.equal(got[others], want[others])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match=EARLIER):
        select(good)
    select(good)
    details = dql.select(bad, policy, critic, num_candidates=5, backend=backend, seed=3, details=True)
    assert torch.equal(details.actions.isnan(), got.isnan()) and torch.equal(details.actions[others], want[others])
    for tensor in (details.q1, details.q2, details.spread[:, 0]):
        assert torch.equal(tensor.isnan(), ~others)
    assert details.index[4] == 0
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match=EARLIER):
        select(good)
    with pytest.raises(ValueError, match="row 4, column 1"):
        select(bad)
    assert torch.equal(select(good), want) and not clear()


def test_training_tells_nobody(backend):
    """Nor do chains of others that were checked when loaded: whoever samples next cannot mend their batches."""
    policy, states = policy_of(), on_device(states_of(9))
    states[0, 0] = math.nan
    assert chain(states, policy, backend, report=False)[0].isnan().all()
    assert not clear()


def test_check_states_is_certain_and_tells_once(backend):
    policy, states = policy_of(), on_device(states_of(9))
    states[0] = math.nan
    for device in (None, DEVICE, states.device):
        for _ in range(2):  # two calls, one report
            chain(states, policy, backend)
        with pytest.raises(ValueError, match=f"on {states.device}, held NaN or infinite values"):
            dql.check_states(device)
        dql.check_states(device)
    chain(states, policy, backend)
    dql.check_states("meta")  # nothing ran there
    assert clear()


def test_numpy_actions_are_checked_when_they_arrive(backend):
    agent = dql.DiffusionBC(S, A, dql.Config(backend=backend, hidden_dim=16, num_hidden=2, T=2), device=DEVICE)
    good = states_of(5).numpy()
    for _ in range(3):
        agent.act(good, seed=1)
    bad = good.copy()
    bad[2, 2] = math.inf
    with pytest.raises(ValueError, match=EARLIER):
        agent.act(bad, seed=1)
    assert not clear()


def test_of_many_threads_one_is_told(backend):
    policy, states = policy_of(), on_device(states_of(9))
    states[0] = math.nan
    chain(states, policy, backend)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    told, start = [], threading.Barrier(8)

    def ask() -> None:
        start.wait()
        try:
            finite.raise_if_set(states.device)
        except ValueError as error:
            told.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 1


# What it costs


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a number read from a tensor, a copy to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        words = ["_local_scalar_dense", "nonzero", "is_nonzero", "equal"]
        if (kwargs or {}).get("device") is not None:  # another dtype alone is the device's business
            words.append("_to_copy")
        if any(word in name for word in words):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_repeated_call_waits_for_nothing(backend, monkeypatch):
    """The kernels left out: interpreted, they are made of torch and NumPy."""
    policy, critic, states = policy_of(), make_critic().to(DEVICE), on_device(states_of(9))
    ran = []

    def sample() -> None:
        dql.sample(states, policy, backend=backend, seed=3)

    def select() -> None:
        dql.select(states, policy, critic, num_candidates=5, backend=backend, seed=3)

    with torch.no_grad():
        for _ in range(3):
            sample(), select()
        prepared = policy.kept[(backend, "ddpm", "fp32")][2].__self__
        plan = type("", (), {"run": lambda self, *arguments: ran.append(arguments)})()
        prepared.plans[9] = plan
        found, made = registry()[backend], (states.new_zeros(1), None)
        chains = SimpleNamespace(forward=lambda *arguments: ran.append(arguments) or made)
        monkeypatch.setattr(found, "chain_runner", lambda chain: chains)
        critics = SimpleNamespace(forward=lambda *arguments, save: made)
        monkeypatch.setattr(found, "critic_runner", lambda critic, precision: critics)
        monkeypatch.setattr(found.kernels, "choose", lambda q, *arguments: q)
        looked = []
        monkeypatch.setattr("dql.sampler._check_finite", lambda *arguments: looked.append(arguments))
        for call in (sample, select):
            with Waits() as waits:
                call()
            assert waits.seen == looked == [], call
        policy.kept.clear()
        select()
        assert len(looked) == 1  # a first call
    assert len(ran) == 3
    assert all(finite.alarm(states.device).word is arguments[-1] for arguments in ran)


def test_details_wait_for_nothing(backend, monkeypatch):
    """Likewise."""
    policy, critic, states = policy_of(), make_critic().to(DEVICE), on_device(states_of(9))
    found, N = registry()[backend], 5

    def select() -> dql.Selection:
        return dql.select(states, policy, critic, num_candidates=N, backend=backend, seed=3, details=True)

    want = select()
    chains = SimpleNamespace(forward=lambda *arguments: (states.new_ones(9 * N, A), None))
    critics = SimpleNamespace(forward=lambda flat, states, actions, *_, save: (states.new_ones(2, len(actions)), None))
    monkeypatch.setattr(found, "chain_runner", lambda chain: chains)
    monkeypatch.setattr(found, "critic_runner", lambda critic, precision: critics)
    monkeypatch.setattr(found.kernels, "choose", lambda q, actions, N, seed: actions[2::N])
    with Waits() as waits:
        got = select()
    assert waits.seen == []
    assert got.index.tolist() == [2] * 9 and got.index.device == want.index.device
    assert torch.equal(got.actions, states.new_ones(9, A)) and not got.spread.any()


def test_a_new_process_has_an_alarm_of_its_own(backend):
    """At its end, with a report that nobody asked for, it says nothing."""
    code = (
        "import torch, dql; from dql.sampler import run_chain; "
        f"p = dql.DiffusionPolicy(3, 2, hidden_dim=16, num_hidden=2, T=2).to({DEVICE!r}); "
        f"run_chain(torch.full((2, 3), torch.nan, device={DEVICE!r}), p, backend={backend!r}, seed=0, report=True)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
