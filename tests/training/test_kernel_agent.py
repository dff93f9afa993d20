"""Training with the backends whose kernels are a GPU's: chain and critics in kernels, everything else as ever."""

import pytest
import torch
from support.cases import TOLERANCES, assert_close
from support.gpu_agents import CONFIG, DEVICE, A, B, H, S, make_batch

import dql
from dql.backend.eager import EagerBackend
from dql.backend.registry import of_gpus, registry
from dql.sampler import run_chain
from dql.values import q_values, value_and_other

Tensor = torch.Tensor


@pytest.fixture(params=of_gpus())
def backend(request, runs_here) -> str:
    """Its kernels on the GPU, or interpreted or emulated where there is none."""
    return runs_here(request.param)


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_updates_are_those_of_eager(backend, max_q_backup):
    """Five updates, clipping and averages included; Adam turns a gradient of rounding size into a step of its own."""
    config = CONFIG | {"max_q_backup": max_q_backup, "grad_norm": 5.0}
    agents = [dql.DiffusionQL(S, A, dql.Config(**config, backend=b), device=DEVICE) for b in (backend, "eager")]
    for step in range(5):
        got, want = (agent.update(make_batch(step)) for agent in agents)
        for name in want:
            assert_close(got[name], want[name], TOLERANCES["agent float32"], what=name, case=f"step {step}")
    for name, want in agents[1].tensors().items():
        if name.split(".")[0] in ("actor", "critic", "ema_actor", "critic_target"):
            assert_close(agents[0].tensors()[name], want, TOLERANCES["agent float32"], what=name)


def test_behaviour_cloning_and_acting(backend):
    agents = [dql.DiffusionBC(S, A, dql.Config(**CONFIG, backend=b), device=DEVICE) for b in (backend, "eager")]
    for agent in agents:
        agent.update(make_batch(0))
    states = make_batch(1).states
    got, want = (agent.act(states, seed=4) for agent in agents)
    assert_close(got, want, TOLERANCES["agent float32"], what="actions")


def test_acting_chooses_the_same_candidate(backend):
    agents = [dql.DiffusionQL(S, A, dql.Config(**CONFIG, backend=b), device=DEVICE) for b in (backend, "eager")]
    states = make_batch(1).states
    got, want = (agent.act(states, seed=4) for agent in agents)
    same = (got - want).abs().amax(dim=1) < 1e-3  # a draw within rounding of a boundary may fall to the other side
    assert same.double().mean() > 0.9


def test_a_run_goes_on_where_it_was_saved(backend, tmp_path):
    first = dql.DiffusionQL(S, A, dql.Config(**CONFIG, backend=backend), device=DEVICE)
    first.update(make_batch(0))
    first.save(tmp_path)
    second = dql.load(tmp_path, device=DEVICE)
    first.update(make_batch(1))
    second.update(make_batch(1))
    for name, value in first.tensors().items():
        assert torch.equal(value, second.tensors()[name]), name


@pytest.mark.parametrize("candidates", [None, 4])
def test_q_values(backend, candidates):
    """The glue: shapes, every gradient, and what needs none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        critic = dql.TwinCritic(S, A, H).to(DEVICE)
    states = make_batch(2).states.requires_grad_()
    actions = torch.randn(B, *([] if candidates is None else [candidates]), A, device=DEVICE, requires_grad=True)
    weights = torch.randn_like(actions[..., 0])
    inputs = [states, actions, *critic.parameters()]
    results = []
    for each in (registry()[backend], EagerBackend()):
        q1, q2 = q_values(critic, states, actions, each)
        assert q1.shape == q2.shape == actions.shape[:-1]
        gradients = torch.autograd.grad(((q1 + q2.square()) * weights).sum(), inputs)
        results.append([q1.detach(), q2.detach(), *gradients])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert_close(got, want, TOLERANCES["critic float32"], what=f"tensor {i}")
    with torch.no_grad():
        assert not q_values(critic, states, actions, registry()[backend])[0].requires_grad


@pytest.mark.parametrize("i", [1, 2])
def test_value_and_other(backend, i):
    """The gradient reaches the actions through one critic, and no frozen parameter."""
    critic = dql.TwinCritic(S, A, H).to(DEVICE).requires_grad_(False)
    states, actions = make_batch(3).states, make_batch(3).actions.requires_grad_()
    results = []
    for each in (registry()[backend], EagerBackend()):
        q, other = value_and_other(critic, i, states, actions, each)
        assert not other.requires_grad
        results.append([q.detach(), other, *torch.autograd.grad(q.sum(), actions)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, TOLERANCES["critic float32"], what="values")


def test_a_parameter_changed_before_backward_is_noticed(backend):
    critic = dql.TwinCritic(S, A, H).to(DEVICE)
    batch = make_batch(3)
    q, _ = q_values(critic, batch.states, batch.actions, registry()[backend])
    with torch.no_grad():
        critic.q1_model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


def test_a_critic_beyond_the_kernels_is_computed_by_torch(backend):
    critic = dql.TwinCritic(S, A, 520).to(DEVICE)
    batch = make_batch(3)
    got, want = q_values(critic, batch.states, batch.actions, registry()[backend]), critic(batch.states, batch.actions)
    assert torch.equal(got[0], want[0])


def test_noise_is_the_stream(backend):
    like = torch.empty(0, device=DEVICE)
    for seed, K, rows, actions in ((0, 1, 1, 1), (2**64 - 1, 3, 70, 5), (2**63, 2, 3, 64)):
        got = registry()[backend].normal(seed, K, rows, actions, like).cpu()
        torch.testing.assert_close(got, dql.noise.normal(seed, K, rows, actions), rtol=1e-6, atol=1e-6)
    assert registry()[backend].normal(1, 1, 2, 3, like.double()).dtype is torch.float64


@pytest.mark.parametrize("time_dim", [16, 6])
def test_gradients_added_at_once(backend, time_dim):
    """They are the parameters' own, and zero where none lies: a norm over the buffer counts nothing else."""
    torch.manual_seed(0)
    policy = dql.DiffusionPolicy(S, A, hidden_dim=H, num_hidden=2, T=3, time_dim=time_dim).to(DEVICE)
    critic, batch = dql.TwinCritic(S, A, H, 2).to(DEVICE), make_batch(0)
    with torch.no_grad():
        torch.full((1 << 16,), torch.nan, device=DEVICE)  # what is allocated next may hold it
    gradients = []
    for at_once in (True, False):
        policy.denoiser.zero_grad()
        critic.zero_grad()
        actions = run_chain(batch.states, policy, backend=backend, seed=1, at_once=at_once)
        q1, q2 = q_values(critic, batch.states, batch.actions, registry()[backend], at_once=at_once)
        (actions.square().mean() + q1.mean() - q2.square().mean()).backward()
        gradients.append([policy.denoiser.flat.grad.clone(), critic.flat.grad.clone()])
    for module, got, want in zip((policy.denoiser, critic), *gradients, strict=True):
        assert torch.equal(got, want)
        assert all(view.any() for view in module.layout.views(got).values())
        for view in module.layout.views(got).values():
            view.zero_()
        assert not got.any()
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    assert policy.denoiser.gradient_leaves(at_once=True) == list(policy.denoiser.parameters())


@pytest.mark.parametrize("name", registry())
def test_no_rows(name, runs_here):
    """Empty results of the right shapes, and gradients that are zero."""
    runs_here(name)
    device = "cpu" if name == "cpp" else DEVICE
    agent = dql.DiffusionQL(S, A, dql.Config(**CONFIG, backend=name), device=device)
    states, actions = torch.empty(0, S, device=device), torch.empty(0, A, device=device)
    for given, shape in (
        (actions, (0,)),
        (actions.view(0, 1, A), (0, 1)),
        (torch.empty(0, 4, A, device=device), (0, 4)),
    ):
        q1, q2 = q_values(agent.critic, states, given, registry()[name])
        assert q1.shape == q2.shape == shape
    (q1 + q2).sum().backward()
    assert not agent.critic.flat.grad.any()
    batch = dql.Batch(states, actions, states[:, 0], states, states[:, 0])
    assert agent.target_q(batch, seed=0).shape == (0,)
    got = run_chain(states.requires_grad_(), agent.policy, backend=name, seed=0)
    assert got.shape == (0, A)
    chosen = dql.select(states.detach(), agent.policy, agent.critic, backend=name)
    assert chosen.shape == (0, A)
