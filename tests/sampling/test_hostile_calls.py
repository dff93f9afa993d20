"""Calls that would give a wrong number, garbage or a fault where nothing was said: each is refused in one sentence."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.networks import A, S, make_critic, make_policy, states_of
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import dql
from dql.backend.registry import of_gpus, registry
from dql.checkpoint import CheckpointError, save_tensors
from dql.networks import Activation
from dql.sampler import run_chain
from dql.values import q_values

Tensor = torch.Tensor
SMALL = {"hidden_dim": 16, "num_hidden": 2, "T": 2}


@pytest.fixture(params=registry())
def backend(request, runs_here) -> str:
    runs_here(request.param)
    if torch.cuda.is_available() and request.param in of_gpus():
        pytest.skip("tensors here are on the CPU")
    return request.param


def policy_of(**sizes: object) -> dql.DiffusionPolicy:
    return make_policy(**(SMALL | sizes))


# Second derivatives


@pytest.mark.parametrize("frozen", [True, False])
def test_a_gradient_penalty_through_sample_raises(backend, frozen):
    """Also where the incoming gradient needs none, and torch's `once_differentiable` would give a constant."""
    policy, states = policy_of().requires_grad_(not frozen), states_of(5).requires_grad_(True)
    actions = dql.sample(states, policy, backend=backend, seed=1)
    (plain,) = torch.autograd.grad(actions.sum(), states, retain_graph=True)
    (gradient,) = torch.autograd.grad(actions.sum(), states, create_graph=True)
    assert torch.equal(gradient, plain)  # create_graph alone is no mistake
    refused = pytest.raises(RuntimeError, match=r"dql.sample has no second derivative.*; take the penalty of")
    with refused:
        gradient.square().sum().backward(retain_graph=True)
    parameters = [] if frozen else list(policy.parameters())
    for of in (states, *parameters[:2], *([] if frozen else [parameters[-1]])):  # by whichever way it is asked for
        with refused:
            torch.autograd.grad(gradient.square().sum() + actions.sum(), of, retain_graph=True)
        with refused:
            (gradient.square().sum() + actions.sum()).backward(inputs=[of], retain_graph=True)
    weights = torch.ones(5, A, requires_grad=True)
    (gradient,) = torch.autograd.grad(actions, states, weights, create_graph=True)
    with refused:
        torch.autograd.grad(gradient.sum(), weights)
    with refused:
        torch.autograd.functional.hvp(lambda s: dql.sample(s, policy, backend=backend, seed=1).sum(), states_of(5),
                                      torch.ones(5, S))  # fmt: skip


def test_a_gradient_penalty_through_kernels_of_critics_raises(backend):
    critic, states, actions = make_critic(), states_of(5), torch.randn(5, A, requires_grad=True)
    if registry()[backend].critic(critic) is None:
        pytest.skip("torch computes these Q values")
    critic.requires_grad_(False)
    q = q_values(critic, states, actions, registry()[backend])[0]
    (gradient,) = torch.autograd.grad(q.sum(), actions, create_graph=True)
    refused = pytest.raises(RuntimeError, match="these Q values come from kernels and have no second derivative")
    with refused:
        gradient.square().sum().backward(retain_graph=True)
    with refused:
        torch.autograd.grad(gradient.square().sum(), actions)


@pytest.mark.parametrize("rows", [3, 400])
@pytest.mark.parametrize("kind", ["mish", "relu", "silu"])
def test_torchs_critics_have_second_derivatives(kind, rows):
    """Also where nothing but the actions needs a gradient."""
    critic = dql.TwinCritic(S, A, 48, 3, kind).double().requires_grad_(False)
    states, actions = states_of(rows).double(), torch.randn(rows, A, dtype=torch.float64, requires_grad=True)
    functions = {"mish": torch.nn.Mish, "relu": torch.nn.ReLU, "silu": torch.nn.SiLU}
    plain = torch.nn.Sequential(*(functions[kind]() if isinstance(m, Activation) else m for m in critic.q1_model))
    found = []
    for q in (critic(states, actions)[0], plain(torch.cat([states, actions], dim=1))):
        (gradient,) = torch.autograd.grad(q.sum(), actions, create_graph=True)
        found.append(torch.autograd.grad((gradient.norm(dim=1) - 1).square().sum(), actions)[0])
    assert kind == "relu" or found[1].any()
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_training_with_create_graph_is_as_without(backend):
    """Somebody's habit; the gradients that stay in `.grad` do not drag a history into the next update."""
    found = []
    for create_graph in (False, True):
        policy, states = policy_of(), states_of(5)
        for seed in range(3):
            policy.zero_grad()
            dql.sample(states, policy, backend=backend, seed=seed).sum().backward(create_graph=create_graph)
            with torch.no_grad():
                for p in policy.parameters():
                    p.sub_(p.grad, alpha=0.1)
        found.append([p.detach() for p in policy.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_forward_mode_is_refused(backend):
    policy, states = policy_of().requires_grad_(False), states_of(5)
    with forward_ad.dual_level():
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                dual = forward_ad.make_dual(states, torch.ones_like(states))
                with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
                    dql.sample(dual, policy, backend=backend, seed=1)
                assert dql.sample(states, policy, backend=backend, seed=1).shape == (5, A)


# Tracing

TRACERS = {
    "jit.trace": lambda call, states: torch.jit.trace(call, (states,)),
    "make_fx": lambda call, states: make_fx(call)(states),
    "make_fx fake": lambda call, states: make_fx(call, tracing_mode="fake")(states),
    "make_fx symbolic": lambda call, states: make_fx(call, tracing_mode="symbolic")(states),
    "make_fx pre_dispatch": lambda call, states: make_fx(call, pre_dispatch=True)(states),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracers(backend, tracer):
    """They would record uninitialised memory."""
    policy, critic, states = policy_of(), make_critic(), states_of(5)
    calls = [
        lambda s: dql.sample(s, policy, backend=backend, seed=1),
        lambda s: dql.select(s, policy, critic, num_candidates=2, backend=backend, seed=1),
        lambda s: dql.select(s, policy, critic, num_candidates=2, backend=backend, seed=1, details=True).q1,
    ]
    for call in calls:
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                want = [call(states) for _ in range(3)]
                with pytest.raises(RuntimeError, match=r"cannot be traced by .*policy\.export_onnx"):
                    TRACERS[tracer](call, states)
                assert torch.equal(call(states), want[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [True, False])
def test_torch_export_names_the_way_out(strict):
    """And leaves the policy as it was, although torch.export leaves its modules other dictionaries."""
    policy, states = policy_of(), states_of(5)
    want = dql.sample(states, policy, seed=1)
    with pytest.raises(Exception, match="export_onnx"):
        torch.export.export(policy, (states,), strict=strict)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for _ in range(3):
                assert torch.equal(dql.sample(states, policy, seed=1), want)
    with torch.no_grad():
        policy.denoiser.final_layer.bias.add_(1)
        assert not torch.equal(dql.sample(states, policy, seed=1), want)


@pytest.mark.filterwarnings("ignore")
def test_torchs_onnx_export_names_ours(tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(RuntimeError, match="export_onnx"):
        torch.onnx.export(policy_of(), (states_of(5),), str(tmp_path / "model.onnx"), dynamo=False)


def test_modes_that_only_look_on_are_welcome(backend):
    class Onlooker(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    policy, states = policy_of(), states_of(5)
    want = dql.sample(states, policy, backend=backend, seed=1)
    with Onlooker():
        assert torch.equal(dql.sample(states, policy, backend=backend, seed=1), want)


# Numbers that are none


@pytest.mark.parametrize("value", [math.nan, -1, 0, math.inf, 1e300, -0.0, "1", None, 1e-300])
def test_max_action(value, tmp_path):
    for make in (lambda: dql.DiffusionPolicy(S, A, value), lambda: dql.Config(max_action=value)):
        with pytest.raises(ValueError, match="max_action must be"):
            make()
    policy = policy_of()
    with pytest.raises(ValueError, match="max_action must be a positive number"):
        policy.max_action = value
    assert policy.max_action == 1.0
    policy.save(tmp_path / "policy.safetensors")
    about = {"kind": "policy", "format": 1, "config": policy.config() | {"max_action": value}}
    save_tensors(tmp_path / "policy.safetensors", policy.denoiser.state_dict(), about)
    with pytest.raises(CheckpointError, match="max_action must be a positive number"):
        dql.DiffusionPolicy.load(tmp_path / "policy.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_noise(backend, value):
    policy, states = policy_of(), states_of(5)
    for shape, options in (((2, 5, A), {}), ((2, 5, 3, A), {"num_candidates": 3})):
        noise = torch.zeros(shape)
        noise[1, 4].view(-1)[-1] = value
        first = [1, 4, A - 1] if len(shape) == 3 else [1, 4, 2, A - 1]
        sentence = re.escape(f"noise hold 1 NaN or infinite values, the first at index {first}; give standard normal")
        with pytest.raises(ValueError, match=sentence):
            dql.sample(states, policy, backend=backend, noise=noise, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, -1e31, "1", None])
def test_step_tables(backend, value):
    policy = policy_of()
    table = policy.step_table()
    for column in (0, 1, 2, 3):
        row = list(table.rows[0])
        row[column] = value
        with pytest.raises(ValueError, match="row 0 of a step table must be six finite numbers"):
            dql.sample(states_of(5), policy, backend=backend, sampler=replace(table, rows=(row, *table.rows[1:])))


@pytest.mark.parametrize("backend", ["cpp", "eager"], indirect=True)
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_no_action_leaves_the_bounds(backend, value):
    """Whatever the parameters hold: NaN is refused where it comes out, in every kind of call."""
    refusals = 0
    for name in policy_of().denoiser.weights:
        policy, states = policy_of(), states_of(5)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                for changed in (False, True):
                    if changed:
                        with torch.no_grad():
                            policy.denoiser.get_parameter(name).view(-1)[0] = value
                    nan = run_chain(states, policy, backend=backend, seed=1).isnan().any()
                    for _ in range(3):
                        if not nan:
                            assert (dql.sample(states, policy, backend=backend, seed=1).abs() <= 1).all()
                            continue
                        refusals += 1
                        because = re.escape(name) if not math.isfinite(value) else "chain left the range"
                        with pytest.raises(ValueError, match=f"the actions are NaN, because the .*{because}"):
                            dql.sample(states, policy, backend=backend, seed=1)
                with torch.no_grad():
                    policy.load_state_dict(policy_of().state_dict())
    assert refusals > 6 or math.isfinite(value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_files_whose_parameters_are_not_finite(value, tmp_path):
    policy = policy_of()
    agent = dql.DiffusionQL(S, A, dql.Config(**SMALL))
    with torch.no_grad():
        policy.denoiser.mid_layer[0].bias[3] = agent.critic_target.q2_model[2].weight[1, 1] = value
    policy.save(tmp_path / "policy.safetensors")
    with pytest.raises(CheckpointError, match=r"parameter 'mid_layer\.0\.bias' of the policy holds NaN or infinite"):
        dql.DiffusionPolicy.load(tmp_path / "policy.safetensors")
    agent.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"parameter 'q2_model\.2\.weight' of the agent.s critic_target holds"):
        dql.load(tmp_path)
    with pytest.raises(ValueError, match=r"parameter 'q2_model\.2\.weight' of this critic holds NaN"):
        dql.TwinCritic.from_published(agent.critic_target.state_dict(), A)


# Arguments of another kind


def test_critics_say_what_they_take():
    critic, states, actions = make_critic(), states_of(5), torch.randn(5, A)
    for i in (3, 0, -1, True, None, "1", [1]):
        with pytest.raises(ValueError, match="i must be 1 or 2"):
            critic.q(i, states, actions)
    for wrong in (states.numpy(), states.tolist(), None):
        with pytest.raises(TypeError, match=r"states must be a torch\.Tensor"):
            critic(wrong, actions)
        with pytest.raises(TypeError, match=r"actions must be a torch\.Tensor"):
            critic(states, wrong)
    for wrong in (states.double(), states + 0j, states.long()):
        with pytest.raises(ValueError, match="convert one of them"):
            critic(wrong, actions)
    for s, a in ((states[0], actions), (states[:4], actions), (states[:, 1:], actions), (states, actions[0])):
        with pytest.raises(ValueError, match="a critic takes"):
            critic(s, a)
        with pytest.raises(ValueError, match="a critic takes"):
            critic.q_min(s, a)


def test_complex_and_numpy_arguments(backend):
    policy, critic, states = policy_of(), make_critic(), states_of(5)
    for wrong in (states.numpy(), states.tolist(), None, 3):
        with pytest.raises(TypeError, match=r"states must be a torch\.Tensor"):
            dql.sample(wrong, policy, backend=backend)
        with pytest.raises(TypeError, match=r"states must be a torch\.Tensor"):
            dql.select(wrong, policy, critic, backend=backend)
        with pytest.raises((TypeError, ValueError), match="noise must be"):
            dql.sample(states, policy, backend=backend, noise=wrong if wrong is not None else [])
    for wrong in (states + 0j, (states + 0j).conj(), states > 0):
        with pytest.raises(ValueError, match=r"use states\.to"):
            dql.sample(wrong, policy, backend=backend)


@pytest.mark.parametrize("wrong", [["cpp"], {"cpp": 1}, np.array(["cpp"]), 3, None, torch.zeros(2)])
def test_names_that_are_none(wrong):
    policy, critic, states = policy_of(), make_critic(), states_of(5)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for call in (dql.sample, lambda s, p, **o: dql.select(s, p, critic, **o)):
                with pytest.raises((TypeError, ValueError), match="backend is named by a string"):
                    call(states, policy, backend=wrong)
                with pytest.raises(ValueError, match="unknown precision"):
                    call(states, policy, precision=wrong)
                with pytest.raises(ValueError, match="unknown sampler"):
                    call(states, policy, sampler=wrong)
    for make in (
        lambda: dql.DiffusionPolicy(S, A, beta_schedule=wrong),
        lambda: dql.DiffusionPolicy(S, A, activation=wrong),
        lambda: dql.TwinCritic(S, A, activation=wrong),
    ):
        with pytest.raises(ValueError, match="unknown"):
            make()
    if not isinstance(wrong, (int, type(None))):
        with pytest.raises(ValueError, match="num_steps must be an integer"):
            dql.sample(states, policy, num_steps=wrong)


def test_more_rows_than_fit(backend):
    policy, critic = policy_of(), make_critic()
    for rows in (1 << 40, 1 << 33):
        states = torch.zeros(1, S).expand(rows, S)
        for call in (dql.sample, lambda s, p, **o: dql.select(s, p, critic, **o)):
            for gradients in (True, False):
                with (
                    torch.set_grad_enabled(gradients),
                    pytest.raises(ValueError, match=r"a call takes up to .*; spl"),
                ):
                    call(states, policy, backend=backend)
    with pytest.raises(ValueError, match="are more than the"):
        dql.sample(states_of(5), policy, backend=backend, num_candidates=1 << 40)


def test_act():
    agent = dql.DiffusionBC(S, A, dql.Config(**SMALL))
    states = states_of(5).numpy()
    want = agent.act(np.ascontiguousarray(states[::-1]), seed=1)
    for same in (np.flip(states, 0), np.flip(states, 0).astype(">f4"), np.asfortranarray(states[::-1])):
        assert (agent.act(same, seed=1) == want).all()
    assert agent.act(np.flip(states[0]), seed=1).shape == (A,)
    for wrong in (states.tolist(), [states], None, {"observation": states}, (states[0], {})):
        with pytest.raises(TypeError, match="states must be a tensor or a NumPy array"):
            agent.act(wrong)
    for wrong in (states.astype(object), states.astype(str), states.astype(complex)):
        with pytest.raises(TypeError, match="states must be an array of numbers"):
            agent.act(wrong)
    masked = np.ma.masked_array(states, mask=states > 1)
    with pytest.raises(ValueError, match=r"masked elements.*states\.filled"):
        agent.act(masked)
    assert (agent.act(np.ma.masked_array(states), seed=1) == agent.act(states, seed=1)).all()
    assert (agent.act(states.astype(np.longdouble), seed=1) == agent.act(states, seed=1)).all()


def test_what_agents_are_made_of(tmp_path):
    for wrong in ({"lr": 1.0}, "diffusion-ql", 3):
        with pytest.raises(TypeError, match=r"config must be a dql\.Config"):
            dql.DiffusionQL(S, A, wrong)
    for wrong in ("float32", torch.int64, None, torch.complex64):
        with pytest.raises(TypeError, match=r"dtype must be .*use torch\.float32"):
            dql.DiffusionQL(S, A, dql.Config(**SMALL), dtype=wrong)
    for wrong in (None, [], "gpu", {}):
        with pytest.raises(ValueError, match=r"cannot be used.*use 'cpu'"):
            dql.DiffusionQL(S, A, dql.Config(**SMALL), device=wrong)
    for wrong in ([], None, 3, "hopper"):
        with pytest.raises(ValueError, match="no tuned hyper-parameters for"):
            dql.Config.tuned(wrong)
    dql.DiffusionBC(S, A, dql.Config(**SMALL)).save(tmp_path)
    for wrong in ("a" * 5000, "a\0b", str(tmp_path / "b")):
        with pytest.raises(dql.CheckpointError, match=";"):
            dql.load(wrong)
    with pytest.raises(ValueError, match="up to 1,073,741,824, the rows of a call"):
        policy_of().export_onnx(tmp_path / "policy.onnx", num_candidates=1 << 40)


def test_what_is_no_published_network():
    policy = {f"model.{name}": value for name, value in policy_of().denoiser.state_dict().items()}
    policy["betas"] = torch.linspace(0.1, 0.2, 5)
    critic = make_critic().state_dict()
    for wrong in (None, [], policy_of(), "actor.pth", {1: torch.zeros(2)}, dict.fromkeys(policy, 3.0)):
        with pytest.raises(TypeError):
            dql.DiffusionPolicy.from_published(wrong)
        with pytest.raises(TypeError):
            dql.TwinCritic.from_published(wrong, A)
    for name in ("betas", "model.mid_layer.0.weight", "model.final_layer.weight"):
        with pytest.raises(ValueError, match=r"expected . dimensions"):
            dql.DiffusionPolicy.from_published(policy | {name: torch.zeros(())})
        with pytest.raises(ValueError, match="has no"):
            dql.DiffusionPolicy.from_published({key: value for key, value in policy.items() if key != name})
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        dql.TwinCritic.from_published(critic | {"q1_model.0.weight": torch.zeros(3)}, A)
    for wrong in ("1", 1.0, None, True):
        with pytest.raises(TypeError, match="action_dim must be an integer"):
            dql.TwinCritic.from_published(critic, wrong)


@pytest.mark.parametrize("of", [policy_of, make_critic])
def test_half_a_state_dict_is_not_loaded(of):
    module, other = of(), of()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    whole = other.state_dict()
    half = dict(list(whole.items())[:3])
    first = next(iter(whole))
    for wrong, error, sentence in (
        (half, RuntimeError, r"\d+ keys are missing \(the first is"),
        (whole | {"more": torch.zeros(1)}, RuntimeError, r"1 keys are unknown \(the first is 'more'"),
        (whole | {first: whole[first][:1]}, RuntimeError, "expected"),
        (whole | {first: whole[first] + 0j}, TypeError, "complex64.*give real ones"),
        (whole | {first: whole[first].numpy()}, TypeError, "must be a torch.Tensor"),
        (list(whole.items()), TypeError, "takes a state_dict, got list"),
    ):
        with pytest.raises(error, match=sentence) as raised:
            module.load_state_dict(wrong)
        assert "\n" not in str(raised.value)
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])
    module.load_state_dict(half, strict=False)
    module.load_state_dict(whole)
    assert all(torch.equal(value, whole[name]) for name, value in module.state_dict().items())


def test_targets_are_asked_for_as_everything_else(backend):
    agent = dql.DiffusionQL(S, A, dql.Config(backend=backend, **SMALL))

    def batch(states):
        return dql.Batch(states, torch.zeros(len(states), A), torch.ones(len(states)), states, torch.ones(len(states)))

    states = states_of(5)
    want = agent.target_q(batch(states), 1)
    assert torch.equal(agent.target_q(batch(torch._neg_view(-states)), 1), want)
    for wrong in (states.to_sparse(), states.double(), states[:, 1:], states.numpy()):
        with pytest.raises((TypeError, ValueError), match=r"batch\.states"):
            agent.target_q(batch(wrong), 1)
    with pytest.raises(RuntimeError, match=r"target_q cannot be traced by torch\.jit\.trace"):
        torch.jit.trace(lambda s: agent.target_q(batch(s), 1), states)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_critic_can_be_traced():
    critic = make_critic().requires_grad_(False)
    states, actions = states_of(5), torch.randn(5, A)
    traced = torch.jit.trace(lambda s: critic.q_min(s, actions), states)
    torch.testing.assert_close(traced(-states), critic.q_min(-states, actions))


def test_a_policy_that_is_not_finite_is_not_exported(tmp_path):
    policy = policy_of()
    with torch.no_grad():
        policy.denoiser.flat[7] = math.nan
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        policy.export_onnx(tmp_path / "policy.onnx")
    assert not (tmp_path / "policy.onnx").exists()
