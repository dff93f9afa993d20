"""The registry: who can run a chain, and the sentence that says why not."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from support.backends import OF_GPUS
from torch.utils._python_dispatch import TorchDispatchMode

import dql
from dql.backend.base import Backend, Chain
from dql.backend.eager import EagerBackend

registry = importlib.import_module("dql.backend.registry")


class Never(Backend):
    """A backend that can run nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, chain=None):
        return f"{self.name} needs a left-handed screw; buy one"

    def forward(self, chain, save):
        raise AssertionError("run although check said no")

    def backward(self, chain, saved, d_actions, need_parameters, need_states):
        raise AssertionError("run although check said no")


class Narrow(Never):
    """Can run something, but no chain of this size."""

    def check(self, chain=None):
        return None if chain is None else "it takes 4 states at most; use fewer"


class Counting(EagerBackend):
    """Runs, and counts."""

    def __init__(self, name: str) -> None:
        self.name, self.forwards = name, 0

    def forward(self, chain, save):
        self.forwards += 1
        return super().forward(chain, save)


@pytest.fixture
def only(monkeypatch):
    """A registry of these backends alone."""

    def register(*backends: Backend) -> None:
        monkeypatch.setattr(registry, "_REGISTRY", {})
        for backend in backends:
            registry.register(backend)

    return register


@pytest.fixture
def policy() -> dql.DiffusionPolicy:
    return dql.DiffusionPolicy(3, 2, hidden_dim=16)


STATES = torch.zeros(5, 3)


def test_every_backend_runs_or_says_why_not():
    found = dql.backends()
    assert found["eager"] is None
    for name, reason in found.items():
        assert isinstance(name, str)
        assert reason is None or (isinstance(reason, str) and reason and "\n" not in reason)


def test_a_named_backend_never_falls_back(only, policy):
    eager = Counting("eager")
    only(Never("odd"), eager)
    with pytest.raises(dql.BackendUnavailable) as caught:
        dql.sample(STATES, policy, backend="odd", seed=0)
    assert str(caught.value) == (
        "backend 'odd' cannot run this: odd needs a left-handed screw; buy one (able to: eager)"
    )
    assert eager.forwards == 0
    assert dql.backends()["odd"] in str(caught.value)  # the same sentence everywhere


def test_auto_takes_the_first_that_can(only, policy):
    first, second = Counting("first"), Counting("second")
    only(Never("odd"), Narrow("narrow"), first, second)
    dql.sample(STATES, policy, seed=0)
    assert (first.forwards, second.forwards) == (1, 0)
    dql.sample(STATES, policy, seed=0, backend="second")
    assert (first.forwards, second.forwards) == (1, 1)
    assert list(dql.backends()) == ["odd", "narrow", "first", "second"]
    assert dql.backends()["narrow"] is None  # able to run something, if not this


def test_the_order_of_auto():
    assert list(dql.backends()) == ["cpp", "cuda", "triton", "eager"]


def test_auto_with_nobody_able_gives_every_reason(only, policy):
    only(Never("odd"), Narrow("narrow"))
    with pytest.raises(dql.BackendUnavailable) as caught:
        dql.sample(STATES, policy)
    assert str(caught.value) == (
        "no backend can run this problem: odd: odd needs a left-handed screw; buy one; "
        "narrow: it takes 4 states at most; use fewer"
    )
    with pytest.raises(dql.BackendUnavailable, match=r"\(able to: no backend\)"):
        dql.sample(STATES, policy, backend="odd")


def test_unknown_backend(only, policy):
    only(Counting("eager"), Never("odd"))
    with pytest.raises(ValueError, match="unknown backend 'cudda'; this version of dql has: auto, eager, odd"):
        dql.sample(STATES, policy, backend="cudda")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_eager_has_no_other_precision(policy, precision):
    with pytest.raises(dql.BackendUnavailable) as caught:
        dql.sample(STATES, policy, backend="eager", precision=precision)
    for part in (
        "backend 'eager' cannot run this",
        f"no precision='{precision}'",
        "use precision='fp32'",
        "able to: ",
    ):
        assert part in str(caught.value)
    assert isinstance(caught.value, RuntimeError)


def test_a_backend_draws_the_noise_of_the_seed(only, policy):
    """What is handed over: the seed where there is no noise, the noise where there is, rows b * N + n."""
    seen = []

    class Looking(Counting):
        def forward(self, chain, save):
            seen.append((chain, save))
            return super().forward(chain, save)

    only(Looking("looking"))
    dql.sample(STATES, policy, seed=12, num_candidates=4)
    noise = torch.randn(5, 5, 4, 2)
    with torch.no_grad():
        dql.sample(STATES, policy, noise=noise, num_candidates=4)
    (first, save_first), (second, save_second) = seen
    assert first.noise is None
    assert (first.seed, first.candidates, first.precision, first.max_action) == (12, 4, "fp32", 1.0)
    assert (save_first, save_second) == (True, False)
    assert torch.equal(second.noise, noise.reshape(5, 20, 2))
    assert torch.equal(first.flat, policy.denoiser.flat)
    assert not first.flat.requires_grad
    assert not first.states.requires_grad


# What backends keep on a GPU


class Made(TorchDispatchMode):
    """Records what gives tensors on a device that stands for a GPU: (operation, where its input was, waited for)."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[tuple[str, str, bool]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_meta:
            given = args[0].device.type if isinstance(args[0], torch.Tensor) else "nowhere"
            self.by.append((operation.overloadpacket.__name__, given, not (kwargs or {}).get("non_blocking")))
        return out


@pytest.mark.parametrize("name", OF_GPUS)
def test_what_a_gpu_keeps_is_copied_from_the_host(name, runs_here):
    """By blocking copies alone. What a kernel makes there is done for the stream that made it, and the first call on
    another stream would have to wait for it."""
    runs_here(name, on_cpu=name == "cuda")
    gpu, backend = torch.device("meta"), registry.registry()[name]
    policy, critic = dql.DiffusionPolicy(4, 3, hidden_dim=16), dql.TwinCritic(4, 3, 16)
    flat, table = policy.denoiser.flat.to(gpu), dql.DiffusionPolicy(4, 3, T=7).step_table()
    chain = Chain(flat, {}, policy.denoiser.spec, STATES.to(gpu), 1, None, 0, table, 1.0, "bf16", policy.denoiser.kept)
    critic = SimpleNamespace(kept={}, spec=critic.spec, buffer=critic.buffer.to(gpu))
    table.kept.clear()  # of other tests: the table is shared
    with Made() as made:
        backend.chain_runner(chain)
        backend.critic_runner(critic, "bf16")
    assert len(made.by) >= 2, "steps and their embedding at least"
    assert set(made.by) == {("_to_copy", "cpu", True)}
    with Made() as made:
        backend.chain_runner(chain)
        backend.critic_runner(critic, "bf16")
    assert made.by == [], "kept"


@pytest.mark.parametrize("algorithm", [dql.DiffusionBC, dql.DiffusionQL])
@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_an_update_picks_its_backend_once(backend, algorithm, monkeypatch):
    if (reason := dql.backends()[backend]) is not None:
        pytest.skip(reason)
    agent = algorithm(4, 3, dql.Config(hidden_dim=16, num_hidden=2, backend=backend))
    picked = []
    monkeypatch.setattr("dql.sampler.pick", lambda name, chain: picked.append(name) or registry.pick(name, chain))
    batch = dql.Batch(torch.randn(8, 4), torch.rand(8, 3), torch.randn(8), torch.randn(8, 4), torch.ones(8))
    agent.update(batch)
    assert picked == [backend]


def test_another_chain_of_an_update_is_looked_at_too():
    """The averaged actor may have been replaced by one that the picked backend cannot run."""
    batch = dql.Batch(torch.randn(8, 4), torch.rand(8, 3), torch.randn(8), torch.randn(8, 4), torch.ones(8))
    if (reason := dql.backends()["cpp"]) is not None:
        pytest.skip(reason)
    for backend in ("cpp", "auto"):
        agent = dql.DiffusionQL(4, 3, dql.Config(hidden_dim=16, num_hidden=2, backend=backend))
        agent.ema_policy = dql.DiffusionPolicy(4, 3, hidden_dim=640, num_hidden=2)
        if backend == "auto":
            agent.update(batch)  # that chain on eager
        else:
            with pytest.raises(dql.BackendUnavailable, match="hidden_dim from 1 to 512, and this network has 640"):
                agent.update(batch)
            assert agent.step == 0


@pytest.mark.parametrize("name", ["cpp", "eager"])
def test_a_backend_is_named(name):
    """An object would have been looked at by nobody: kernels read what lies at an address."""
    policy, backend = dql.DiffusionPolicy(4, 3, hidden_dim=16), registry.registry()[name]
    for call in (dql.sample, lambda s, p, **o: dql.select(s, p, dql.TwinCritic(4, 3, 16), **o)):
        with pytest.raises(TypeError, match="a backend is named by a string"):
            call(torch.zeros(2, 4), policy, backend=backend)
