"""Whole updates as a fixed sequence of kernels of a backend (dql/update_fused.py): the numbers of the path by autograd,
and how many kernels and operators of torch there are."""

from collections import Counter

import pytest
import torch
from support.cases import TOLERANCES, assert_close
from support.gpu_agents import CONFIG, DEVICE, A, S, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

import dql
from dql import update_fused, update_graphed
from dql.backend.registry import of_gpus, registry
from dql.data import DatasetInfo
from dql.kernels.cuda import binding
from dql.sampler import backend_for
from dql.schedule import NoiseSchedule
from dql.update_graphed import GraphedUpdate

Tensor = torch.Tensor
FUSED = of_gpus()
VARIANTS = {
    "plain": {},
    "clipping": {"grad_norm": 0.3},
    "not clipped": {"grad_norm": 1e9},
    "max_q_backup": {"max_q_backup": True, "grad_norm": 5.0},
    "cosine": {"lr_schedule": "cosine", "num_updates": 9, "eta": 0.3},
    "averages": {"ema_start": 0, "ema_every": 1, "ema_decay": 0.4, "tau": 0.7},
    "other networks": {"num_hidden": 3, "activation": "relu", "T": 4, "beta_schedule": "cosine"},
}
FREE = {"empty", "empty_like", "view", "slice", "unbind", "select", "detach"}  # operators that launch nothing


@pytest.fixture(params=FUSED)
def backend(request, runs_here) -> str:
    return runs_here(request.param)


@pytest.fixture
def by_autograd(monkeypatch):
    """`by_autograd(agent)`: its updates are, whatever its backend has."""
    slow: list[object] = []
    rule = update_fused.runs_fused
    monkeypatch.setattr(update_fused, "runs_fused", lambda agent, backend: agent not in slow and rule(agent, backend))
    return slow.append


def make_agent(backend: str, cls: type[dql.DiffusionBC] = dql.DiffusionQL, **changes):
    return cls(S, A, dql.Config(**CONFIG | changes, backend=backend), device=DEVICE)


def everything(agent) -> dict[str, Tensor]:
    """Networks, optimizers, and the gradients that an update leaves."""
    gradients = {f"{name}'s gradient": agent.modules()[name].flat.grad for name in agent.trained()}
    return agent.tensors() | gradients


def check_updates(agents, steps: int, case: str) -> None:
    for step in range(steps):
        got, want = (agent.update(make_batch(step)) for agent in agents)
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert got[name].shape == value.shape and got[name].dtype is value.dtype
            assert_close(got[name], value, TOLERANCES["agent float32"], what=name, case=f"{case}, step {step}")
        for name, value in everything(agents[1]).items():
            assert_close(
                everything(agents[0])[name], value, TOLERANCES["agent float32"], what=name, case=f"{case}, step {step}"
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_are_those_of_autograd(backend, by_autograd, variant):
    """Of the same backend and of eager: networks, moments, the clipped gradients and the metrics."""
    for other in (backend, "eager"):
        agents = [make_agent(b, **VARIANTS[variant]) for b in (backend, other)]
        by_autograd(agents[1])
        check_updates(agents, 4, variant)


@pytest.mark.parametrize("cls", [dql.DiffusionQL, dql.DiffusionBC])
def test_a_denoiser_that_predicts_actions(backend, cls):
    agents = [make_agent(b, cls) for b in (backend, "eager")]
    for agent in agents:
        for policy in (agent.policy, getattr(agent, "ema_policy", agent.policy)):
            policy.predict_epsilon = False
    check_updates(agents, 3, "predict_epsilon=False")


def test_behaviour_cloning(backend, by_autograd):
    agents = [make_agent(b, dql.DiffusionBC, lr_schedule="cosine", num_updates=5) for b in (backend, backend)]
    by_autograd(agents[1])
    check_updates(agents, 4, "cloning")


def test_a_run_changes_paths(backend, by_autograd):
    """An agent of the one path goes on with the other: gradients, moments and counts of steps are the same memory."""
    agents = [make_agent(backend, grad_norm=5.0) for _ in range(2)]
    by_autograd(agents[1])
    check_updates(agents, 2, "before")
    kept = [agent.moments() for agent in agents]
    check_updates(agents[::-1], 2, "after")
    for agent, moments in zip(agents, kept, strict=True):
        assert all(a is b for a, b in zip(agent.moments(), moments, strict=True))


def test_whoever_keeps_a_version_notices(backend):
    agent = make_agent(backend, ema_start=2, ema_every=2)
    for step in range(3):
        before = {name: module.flat._version for name, module in agent.modules().items()}
        moments = [moment._version for moment in agent.moments()]
        gradients = [agent.modules()[name].flat.grad._version for name in agent.trained()]
        agent.update(make_batch(step))
        moved = {name for name, module in agent.modules().items() if module.flat._version > before[name]}
        assert moved == {*agent.modules()} - ({"ema_actor"} if step < 2 else set())
        assert all(m._version > v for m, v in zip(agent.moments(), moments, strict=bool(moments)))
        assert all(agent.modules()[n].flat.grad._version > v for n, v in zip(agent.trained(), gradients, strict=True))


def test_a_graph_of_parameters_that_an_update_changed_is_refused(backend):
    agent, batch = make_agent(backend), make_batch(0)
    loss = agent.critic(batch.states, batch.actions)[0].sum()
    agent.update(batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["actor", "critic"])
def test_what_is_frozen_stays(backend, name):
    """Autograd leaves it alone, so autograd it is."""
    agent = make_agent(backend)
    module = agent.modules()[name]
    frozen = next(iter(module.parameters())).requires_grad_(False)
    before = frozen.clone()
    assert not update_fused.runs_fused(agent, registry()[backend])
    agent.update(make_batch(0))
    assert torch.equal(frozen, before)


def test_which_agents_are_fused(backend):
    with_kernels = registry()[backend]
    assert update_fused.runs_fused(make_agent(backend), with_kernels)
    assert not update_fused.runs_fused(make_agent(backend), registry()["eager"])
    large = make_agent(backend)
    large.critic = dql.TwinCritic(S, A, 520).to(DEVICE)  # beyond the kernels
    assert not update_fused.runs_fused(large, with_kernels)


def test_gradients_that_an_outside_optimizer_dropped(backend):
    agents = [make_agent(b) for b in (backend, "eager")]
    for step in range(3):
        for agent in agents:
            torch.optim.SGD(agent.policy.denoiser.parameters()).zero_grad(set_to_none=True)
            torch.optim.SGD([agent.critic.flat]).zero_grad(set_to_none=True)
        check_updates(agents, 1, f"dropped {step}")
        for agent in agents:
            for name in agent.trained():
                module = agent.modules()[name]
                views = module.layout.views(module.flat.grad)
                assert all(p.grad.data_ptr() == views[n].data_ptr() for n, p in module.named_parameters())


class _Operators(TorchDispatchMode):
    """Counts those of torch that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


BC = {
    "the prologue": 1,
    "the chain": 1,
    "the chain's backward pass": 1,
    "the products of gradients": 1,
    "the sums of gradients": 1,
    "the gradient's norm": 1,
    "Adam's step": 1,
}
QL = dict.fromkeys(BC, 2) | {
    "the prologue": 5,
    "the chain": 5,
    "the chain's backward pass": 3,
    "the critics' loss": 1,
    "the Q loss": 1,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator counts launches")
@pytest.mark.parametrize(
    ("cls", "changes", "launches", "operators"),
    [
        (dql.DiffusionQL, {"grad_norm": 5.0}, QL, {"add": 1}),
        (dql.DiffusionQL, {"max_q_backup": True, "ema_start": 0, "ema_every": 1}, QL, {"add": 1}),
        (dql.DiffusionBC, {}, BC, {}),
    ],
)
def test_launches_of_an_update(runs_here, cls, changes, launches, operators):
    """24 in all of DiffusionQL, 7 of DiffusionBC, once the optimizers have their memory."""
    agent = make_agent(runs_here("cuda"), cls, **changes)
    agent.update(make_batch(0))
    batch = make_batch(1)
    draws, backend = agent.draws(len(batch.states)), backend_for(batch.states, agent.policy, "cuda")
    assert counted(lambda: agent.compute(batch, draws, backend)) == (launches, operators)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator counts launches")
def test_launches_of_a_recorded_update(runs_here, monkeypatch):
    """25 in all, its batch gathered from a dataset and all draws made."""
    monkeypatch.setattr(update_graphed, "record", lambda body, agent: (body, body()))
    monkeypatch.setattr(GraphedUpdate, "__init__", GraphedUpdate._prepare)
    batch = make_batch(0)
    update = GraphedUpdate(make_agent(runs_here("cuda"), ema_start=0), len(batch.states))
    data = dql.TransitionDataset(*vars(batch).values(), DatasetInfo("a/b-v0", None, None, None, 0, [], "box", 1.0))
    beginning = {"an update's beginning": 1}
    for _ in range(2):  # with and without an average
        assert counted(lambda: update.update_from(data)) == (beginning | QL, {"add": 1})
    assert counted(lambda: update.update(batch)) == (beginning | QL, {"add": 1})


@pytest.mark.parametrize("policy", ["policy", "ema_policy"])
@pytest.mark.parametrize(("name", "value"), [("schedule", NoiseSchedule("linear", 3)), ("max_action", 0.25)])
def test_a_chain_changed_after_the_recording_is_refused(policy, name, value, monkeypatch):
    """The graph has the numbers of the one before, and would go on with them."""
    monkeypatch.setattr(update_graphed, "record", lambda body, agent: (body, body()))
    monkeypatch.setattr(GraphedUpdate, "__init__", GraphedUpdate._prepare)
    agent = dql.DiffusionQL(3, 2, dql.Config(backend="eager", hidden_dim=8, num_hidden=1))
    batch = dql.Batch(*(torch.zeros(shape) for shape in ((4, 3), (4, 2), (4,), (4, 3), (4,))))
    update = GraphedUpdate(agent, 4)
    update.update(batch)
    setattr(getattr(agent, policy), name, value)
    with pytest.raises(RuntimeError, match="changed after its update was recorded"):
        update.update(batch)
    assert agent.step == 1


def counted(run) -> tuple[dict[str, int], dict[str, int]]:
    """(launches of our kernels, operators of torch that launch something)."""
    binding.module().launches()
    with _Operators() as seen:
        run()
    return binding.module().launches(), {name: count for name, count in seen.seen.items() if name not in FREE}
