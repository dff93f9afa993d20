"""What may change between two calls of the backend "cpp", and torch's settings around them."""

import copy
import importlib
import math

import pytest
import torch
from support.networks import A, S, make_critic, make_policy, needs_bf16, needs_cpp, states_of

import dql
from dql.backend.cpp import network
from dql.backend.eager import EagerBackend
from dql.backend.registry import register
from dql.kernels.cpp import binding

registry = importlib.import_module("dql.backend.registry")
pytestmark = needs_cpp


def sample(policy: dql.DiffusionPolicy, states: torch.Tensor, backend: str = "cpp") -> torch.Tensor:
    with torch.no_grad():
        return dql.sample(states, policy, seed=3, backend=backend)


@pytest.mark.parametrize("name", ["mid_layer.0", "mid_layer.2", "mid_layer.4", "final_layer"])
@pytest.mark.parametrize("part", ["columns", "rows"])
def test_a_part_of_a_matrix_written_through_data(name, part):
    """Folding an observation's scale into a layer writes a block of columns, and `.data` counts no version."""
    policy, states = make_policy(), states_of(5)
    for _ in range(3):
        sample(policy, states)
    weight = policy.denoiser.get_submodule(name).weight.data
    half = weight[:, weight.shape[1] // 2 :] if part == "columns" else weight[weight.shape[0] // 2 :]
    half.mul_(-0.5)
    assert torch.allclose(sample(policy, states), sample(policy, states, "eager"), atol=1e-4)


def test_a_shallow_copy_is_a_policy_of_its_own():
    policy, states = make_policy(max_action=1.0), states_of(40)
    for _ in range(3):
        sample(policy, states)
    other = copy.copy(policy)
    other.max_action = 0.1
    assert sample(other, states).abs().max() <= 0.1 + 1e-6
    assert sample(policy, states).abs().max() > 0.5


def batch_of(B: int = 32) -> dql.Batch:
    g = torch.Generator().manual_seed(1)
    states, next_states = torch.randn(2, B, S, generator=g)
    return dql.Batch(states, torch.rand(B, A, generator=g), torch.ones(B), next_states, torch.ones(B))


def agents(**config) -> tuple[dql.DiffusionQL, dql.DiffusionQL]:
    """The same agent on "cpp" and on "eager"."""
    return tuple(dql.DiffusionQL(S, A, dql.Config(hidden_dim=32, backend=name, **config)) for name in ("cpp", "eager"))


def test_an_update_after_the_schedule_changed():
    losses = []
    for agent in agents():
        agent.update(batch_of())
        agent.policy.schedule = dql.NoiseSchedule("linear", 20)
        losses.append(float(agent.update(batch_of())["actor/bc_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("which", ["policy", "ema_policy", "critic", "critic_target"])
def test_an_update_refuses_replaced_parameters(which):
    agent, _ = agents()
    agent.update(batch_of())
    owner = getattr(agent, which)
    layer = owner.denoiser.final_layer if "policy" in which else owner.q1_model[0]
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    with pytest.raises(RuntimeError, match="was replaced"):
        agent.update(batch_of())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_critics_nan_is_not_hidden_by_the_best_of_some(place):
    critic, states = make_critic(), states_of(1)
    actions = torch.zeros(3, A)
    actions[place] = math.nan
    target, _ = binding.target_q(
        network(critic), critic.buffer, states, actions, torch.zeros(1), torch.ones(1), discount=0.9
    )
    assert target.isnan().all()


def test_noise_changed_before_a_second_backward_pass():
    policy, states = make_policy(), states_of(6).requires_grad_(True)
    noise = torch.randn(5, 6, A)
    loss = dql.sample(states, policy, noise=noise, backend="cpp").sum()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    noise.normal_()
    with pytest.raises(RuntimeError, match=r"noise was changed in place.*noise\.clone\(\)"):
        loss.backward()


def test_a_backend_registered_later_is_noticed(monkeypatch):
    policy, states = make_policy(), states_of(3)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    for _ in range(3):
        sample(policy, states)

    class Counting(EagerBackend):
        name = "cpp"
        calls = 0

        def forward(self, chain, save):
            Counting.calls += 1
            return super().forward(chain, save)

    register(Counting())
    sample(policy, states)
    assert Counting.calls == 1


def test_a_changed_policy_is_fast_again():
    """What was prepared for the old bound is dropped, not tried in vain for ever."""
    policy, states = make_policy(), states_of(1)
    for bound in (1.0, 0.5):
        policy.max_action = bound
        for _ in range(3):
            sample(policy, states)
        (prepared,) = policy.kept.values()
        assert prepared[2](states, torch.empty(1, A), 3)


@needs_bf16
def test_bf16_is_not_run_by_a_variant_without_it():
    policy, states = make_policy(), states_of(4)
    with torch.no_grad():
        for _ in range(3):
            dql.sample(states, policy, seed=1, backend="cpp", precision="bf16")
        with binding.forced("generic"), pytest.raises(dql.BackendUnavailable, match="AVX512_BF16"):
            dql.sample(states, policy, seed=1, backend="cpp", precision="bf16")


@pytest.mark.parametrize("setting", [torch.float16, torch.float64, "meta"], ids=str)
def test_torchs_defaults_are_of_no_concern(setting):
    policy, critic, states, (agent, _) = make_policy(), make_critic(), states_of(9), agents()
    agent.update(batch_of())
    noise = torch.randn(5, 9, A)
    want = [sample(policy, states), dql.select(states, policy, critic, seed=1, backend="cpp")]
    change = torch.set_default_device if setting == "meta" else torch.set_default_dtype
    batch = batch_of()
    change(setting)
    try:
        got = [sample(policy, states), dql.select(states, policy, critic, seed=1, backend="cpp")]
        dql.sample(states, policy, noise=noise, backend="cpp").sum().backward()
        agent.update(batch)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_fake_tensors_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    policy, states = make_policy(), states_of(2)
    sample(policy, states)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Exception) as caught:  # noqa: PT011
        sample(policy, states)
    assert str(caught.value)


def test_an_agent_can_be_loaded_for_another_backend(tmp_path):
    """A run that was trained on "cpp" is of use where the extension is missing."""
    agent, _ = agents()
    agent.update(batch_of())
    agent.save(tmp_path)
    assert dql.load(tmp_path).config.backend == "cpp"
    other = dql.load(tmp_path, backend="eager")
    assert other.config.backend == "eager"
    assert torch.allclose(other.act(states_of(4), seed=1), agent.act(states_of(4), seed=1), atol=1e-4)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        dql.load(tmp_path, backend="gpu")
