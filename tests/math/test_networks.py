"""Denoiser and TwinCritic: published names, the flat buffer, and checkpoints of the published code."""

import copy
import io
import pickle
from dataclasses import replace

import published
import pytest
import torch
from support import transcription
from support.cases import TOLERANCES, assert_close

import dql
from dql.kernels.layout import ALIGNMENT, DenoiserSpec, FlatLayout
from dql.networks import Activation, FlatModule

Tensor = torch.Tensor
S, A, H = 5, 3, 32


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def assert_flat(module: FlatModule) -> None:
    """Every parameter and its gradient is a view of the flat buffer and of its gradient, at the layout's place."""
    module.flat_parameters()
    assert module.flat.shape == (module.layout.size,)
    views, gradients = module.layout.views(module.flat.detach()), module.layout.views(module.flat.grad)
    parameters = dict(module.named_parameters())
    assert list(parameters) == list(views) == list(module.state_dict())
    for name, parameter in parameters.items():
        assert parameter.data_ptr() == views[name].data_ptr(), f"{name} is no view of flat"
        assert parameter.grad.data_ptr() == gradients[name].data_ptr(), f"{name}.grad is no view of flat.grad"
        assert parameter.dtype == module.flat.dtype
        assert torch.equal(parameter, views[name]), name
    with torch.no_grad():
        before = {name: p.clone() for name, p in module.named_parameters()}
        module.flat.neg_()
        assert all(torch.equal(p, -before[name]) for name, p in module.named_parameters())
        module.flat.neg_()
    gap = torch.ones(module.layout.size, dtype=torch.bool)
    for slot in module.layout.slots:
        gap[slot.offset : slot.offset + slot.size] = False
        assert slot.offset % ALIGNMENT == 0
    assert not module.flat.detach()[gap].any()


def modules() -> list[FlatModule]:
    return [dql.Denoiser(S, A, H), dql.TwinCritic(S, A, H)]


def test_denoiser_names_and_shapes_are_the_published():
    shapes = {name: tuple(value.shape) for name, value in dql.Denoiser(17, 6).state_dict().items()}
    assert shapes == {
        "time_mlp.1.weight": (32, 16),
        "time_mlp.1.bias": (32,),
        "time_mlp.3.weight": (16, 32),
        "time_mlp.3.bias": (16,),
        "mid_layer.0.weight": (256, 6 + 16 + 17),
        "mid_layer.0.bias": (256,),
        "mid_layer.2.weight": (256, 256),
        "mid_layer.2.bias": (256,),
        "mid_layer.4.weight": (256, 256),
        "mid_layer.4.bias": (256,),
        "final_layer.weight": (6, 256),
        "final_layer.bias": (6,),
    }


def test_critic_names_and_shapes_are_the_published():
    shapes = {name: tuple(value.shape) for name, value in dql.TwinCritic(17, 6).state_dict().items()}
    layers = [("0", (256, 23)), ("2", (256, 256)), ("4", (256, 256)), ("6", (1, 256))]
    assert shapes == {
        f"{q}.{number}.{kind}": shape if kind == "weight" else shape[:1]
        for q in ("q1_model", "q2_model")
        for number, shape in layers
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("num_hidden", [1, 2, 3, 4])
def test_networks_equal_the_transcription(num_hidden):
    generator = torch.Generator().manual_seed(num_hidden)
    states, actions = (torch.randn(7, n, generator=generator).double() for n in (S, A))
    t = torch.tensor([0, 1, 2, 3, 4, 0, 2])
    denoiser = dql.Denoiser(S, A, H, num_hidden).double()
    want = transcription.denoiser(denoiser.state_dict(), actions, t, states)
    assert_close(denoiser(actions, t, states), want, TOLERANCES["float64"], what="eps")
    critic = dql.TwinCritic(S, A, H, num_hidden).double()
    q1, q2 = critic(states, actions)
    for name, got, want in zip(
        ("Q1", "Q2"), (q1, q2), transcription.critic(critic.state_dict(), states, actions), strict=True
    ):
        assert_close(got, want, TOLERANCES["float64"], what=name)
    assert torch.equal(critic.q_min(states, actions), torch.minimum(q1, q2))


def test_critic_of_candidates_is_the_critic_of_each():
    critic = dql.TwinCritic(S, A, H).double()
    states, actions = torch.randn(4, S).double(), torch.randn(4, 6, A).double()
    q1, q2 = critic(states, actions)
    assert q1.shape == q2.shape == critic.q_min(states, actions).shape == (4, 6)
    for n in range(6):
        for got, want in zip((q1, q2), critic(states, actions[:, n]), strict=True):
            assert_close(got[:, n], want, TOLERANCES["float64"], what="Q of a candidate")


@pytest.mark.parametrize("kind", ["mish", "relu", "silu"])
@pytest.mark.parametrize("rows", [3, 300])  # 300 * 32 elements: the split Mish
def test_activation_module_has_autograds_gradient(kind, rows):
    z = torch.randn(rows, 32).double()
    own = {"mish": torch.nn.functional.mish, "relu": torch.relu, "silu": torch.nn.functional.silu}[kind]
    leaves = [z.clone().requires_grad_(True) for _ in range(2)]
    values = [Activation(kind)(leaves[0]), own(leaves[1])]
    weights = torch.randn_like(z)
    gradients = [torch.autograd.grad((v * weights).sum(), leaf)[0] for v, leaf in zip(values, leaves, strict=True)]
    assert_close(values[0], values[1], TOLERANCES["float64"], what=kind)
    assert_close(gradients[0], gradients[1], TOLERANCES["float64"], what=f"d_{kind}")
    assert torch.equal(Activation(kind)(z), values[0])


# The flat buffer


def test_flatness_survives():
    for module in modules():
        values = {k: v.clone() for k, v in module.state_dict().items()}
        copies = {
            "itself": module,
            "deepcopy": copy.deepcopy(module),
            "pickle": pickle.loads(pickle.dumps(module)),
            "float64": copy.deepcopy(module).to(torch.float64),
            "double and back": copy.deepcopy(module).double().float(),
            "to the same": copy.deepcopy(module).to("cpu"),
            "frozen": copy.deepcopy(module).requires_grad_(False),
        }
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copies["torch.save"] = torch.load(buffer, weights_only=False)
        loaded = copy.deepcopy(module)
        with torch.no_grad():
            loaded.flat.zero_()
        loaded.load_state_dict(module.state_dict())
        copies["load_state_dict"] = loaded
        storage = set()
        for how, other in copies.items():
            assert_flat(other)
            storage.add(other.flat.data_ptr())
            for name, value in other.state_dict().items():
                assert torch.equal(value.float(), values[name]), f"{name} after {how}"
        assert len(storage) == len(copies)  # no two share memory
        assert all(not p.requires_grad for p in copy.deepcopy(copies["frozen"]).parameters())
        assert all(p.requires_grad for p in copies["deepcopy"].parameters())


def test_a_policy_keeps_its_denoiser_flat():
    policy = dql.DiffusionPolicy(S, A, hidden_dim=H)
    for other in (policy, copy.deepcopy(policy), pickle.loads(pickle.dumps(policy)), policy.double()):
        assert_flat(other.denoiser)
        assert dql.sample(torch.zeros(2, S, dtype=other.dtype), other, seed=0).shape == (2, A)


def test_gradients_gather_in_the_flat_gradient():
    policy = dql.DiffusionPolicy(S, A, hidden_dim=H)
    denoiser = policy.denoiser
    dql.sample(torch.randn(4, S), policy, seed=0).sum().backward()
    assert_flat(denoiser)
    assert denoiser.flat.grad.any()
    for set_to_none in (False, True):
        denoiser.zero_grad(set_to_none=set_to_none)
        assert not denoiser.flat.grad.any()
        assert_flat(denoiser)


def test_zero_grad_mends_gradients_that_another_optimizer_took():
    """torch.optim's zero_grad sets the parameters' .grad to None; backward then makes tensors of their own."""
    denoiser = dql.Denoiser(S, A, H)
    torch.optim.SGD(denoiser.parameters(), lr=0.1).zero_grad()
    denoiser.zero_grad()
    assert_flat(denoiser)
    torch.optim.SGD(denoiser.parameters(), lr=0.1).zero_grad()
    denoiser(torch.randn(2, A), torch.tensor([0, 1]), torch.randn(2, S)).sum().backward()
    denoiser.zero_grad()
    assert_flat(denoiser)


@pytest.mark.parametrize("how", ["data", "attribute"])
def test_a_replaced_parameter_is_refused(how):
    policy = dql.DiffusionPolicy(S, A, hidden_dim=H)
    layer = policy.denoiser.mid_layer[2]
    if how == "data":
        layer.weight.data = torch.zeros(H, H)
    else:
        layer.weight = torch.nn.Parameter(torch.zeros(H, H))
    with pytest.raises(RuntimeError, match=r"'mid_layer\.2\.weight' was replaced .* flatten_parameters\(\)"):
        dql.sample(torch.zeros(2, S), policy, seed=0)
    policy.denoiser.flatten_parameters()  # the remedy
    assert_flat(policy.denoiser)
    assert not policy.denoiser.mid_layer[2].weight.any()
    dql.sample(torch.zeros(2, S), policy, seed=0)


def test_written_parameters_are_used():
    """The other remedy: values written into the parameters reach the chain."""
    policy, other = dql.DiffusionPolicy(S, A, hidden_dim=H), dql.DiffusionPolicy(S, A, hidden_dim=H)
    for mine, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    states = torch.randn(4, S)
    assert torch.equal(dql.sample(states, policy, seed=0), dql.sample(states, other, seed=0))


def test_assigning_a_state_dict_is_refused():
    denoiser = dql.Denoiser(S, A, H)
    with pytest.raises(ValueError, match=r"assign=True.* leave assign out"):
        denoiser.load_state_dict(dql.Denoiser(S, A, H).state_dict(), assign=True)


def test_layout_has_room_for_several_agents():
    layout = DenoiserSpec(S, A, H).layout
    flat = torch.randn(4, layout.size)
    for name, view in layout.views(flat).items():
        for m in range(4):
            assert torch.equal(view[m], layout.views(flat[m])[name])
    assert FlatLayout.build({"a": (3, 5), "b": (16,), "c": (1,)}).size == 16 + 16 + 16


# Bad sizes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"state_dim": 0}, "state_dim must be an integer from 1 to 65,536, got 0"),
        ({"action_dim": -1}, "action_dim must be an integer from 1 to 65,536, got -1"),
        ({"hidden_dim": 2.0}, r"hidden_dim must be an integer from 1 to 65,536, got 2\.0"),
        ({"num_hidden": True}, "num_hidden must be an integer from 1 to 65,536, got True"),
        ({"time_dim": 2}, "at least 4, got 2"),
        ({"time_dim": 17}, "time_dim must be even .* got 17"),
        ({"activation": "gelu"}, "unknown activation 'gelu'; known: mish, relu, silu"),
    ],
)
def test_bad_sizes(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dql.Denoiser(**{"state_dim": S, "action_dim": A, "hidden_dim": H} | changes)
    if "time_dim" not in changes:
        with pytest.raises(ValueError, match=sentence):
            dql.TwinCritic(**{"state_dim": S, "action_dim": A, "hidden_dim": H} | changes)


# Published checkpoints


@pytest.mark.parametrize("schedule", ["vp", "linear", "cosine"])
@pytest.mark.parametrize("T", [2, 5, 50])
def test_published_actor_loads_unchanged_and_acts_alike(schedule, T):
    theirs = published.PublishedAgent(S, A, 2.0, H, T, schedule).actor
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)  # as the authors save it
    file.seek(0)
    ours = dql.DiffusionPolicy.from_published(torch.load(file, weights_only=True), max_action=2.0)
    assert (ours.T, ours.schedule.name, ours.max_action) == (T, schedule, 2.0)
    assert (ours.state_dim, ours.action_dim, ours.denoiser.spec.hidden_dim) == (S, A, H)
    assert_flat(ours.denoiser)
    for name, value in ours.denoiser.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[f"model.{name}"])
    states, noise = torch.randn(9, S), torch.randn(T, 9, A)
    with torch.no_grad():
        want = theirs.sample(states, noise)
    assert float((want.abs() < 2).double().mean()) > 0.05
    # their schedule is float32, ours float64: 1 - abar_0 = 1e-4 of linear has lost four of its seven digits there
    tolerance = TOLERANCES["float32"] if schedule == "vp" else replace(TOLERANCES["float32"], rel=1e-3)
    assert_close(dql.sample(states, ours, noise=noise), want, tolerance, what="actions", case=f"{schedule} T={T}")


def test_published_critic_loads_unchanged():
    theirs = published.PublishedAgent(S, A, hidden_dim=H).critic
    ours = dql.TwinCritic.from_published(theirs.state_dict(), A)
    assert_flat(ours)
    states, actions = torch.randn(9, S), torch.randn(9, A)
    with torch.no_grad():
        for got, want in zip(ours(states, actions), theirs(states, actions), strict=True):
            assert_close(got, want[:, 0], TOLERANCES["float32"], what="Q")


def published_actor_dict() -> dict[str, Tensor]:
    return published.PublishedAgent(S, A, hidden_dim=H).actor.state_dict()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.pop("betas"), "not a published actor: the state_dict has no 'betas'"),
        (lambda d: d.pop("model.final_layer.weight"), "has no 'model.final_layer.weight'"),
        (
            lambda d: d.pop("model.final_layer.bias"),
            r"not a published actor: 1 missing key \('final_layer.bias'",
        ),
        (lambda d: d.update({"model.extra": torch.zeros(1)}), r"1 unknown key \('extra'"),
        (
            lambda d: d.update(betas=torch.full((5,), 0.1)),
            "the file's 5 betas are none of the published schedules",
        ),
        (
            lambda d: d.update({"model.mid_layer.2.weight": torch.zeros(H, H + 1)}),
            rf"'mid_layer.2.weight' is \[{H}, {H + 1}\], expected \[{H}, {H}\]",
        ),
        (lambda d: d.clear(), "not a published actor: the state_dict has no 'betas'"),
    ],
)
def test_wrong_published_actors(change, sentence):
    state_dict = dict(published_actor_dict())
    change(state_dict)
    with pytest.raises(ValueError, match=sentence):
        dql.DiffusionPolicy.from_published(state_dict)


@pytest.mark.parametrize(
    ("change", "action_dim", "sentence"),
    [
        (
            lambda d: d.pop("q1_model.0.weight"),
            A,
            "not a published critic: the state_dict has no 'q1_model.0.weight'",
        ),
        (lambda d: d.pop("q2_model.6.bias"), A, r"not a published critic: 1 missing key \('q2_model.6.bias'"),
        (lambda d: d.update(other=torch.zeros(1)), A, r"1 unknown key \('other'"),
        (
            lambda d: d.update({"q2_model.6.bias": torch.zeros(2)}),
            A,
            r"'q2_model.6.bias' is \[2\], expected \[1\]",
        ),
        (
            lambda d: None,
            S + A,
            f"action_dim must be from 1 to below the critic's {S + A} inputs, got {S + A}",
        ),
        (lambda d: None, 0, "action_dim must be from 1"),
    ],
)
def test_wrong_published_critics(change, action_dim, sentence):
    state_dict = dict(published.PublishedAgent(S, A, hidden_dim=H).critic.state_dict())
    change(state_dict)
    with pytest.raises(ValueError, match=sentence):
        dql.TwinCritic.from_published(state_dict, action_dim)


def test_an_actor_is_no_critic():
    with pytest.raises(ValueError, match="not a published critic"):
        dql.TwinCritic.from_published(published_actor_dict(), A)
    with pytest.raises(ValueError, match="not a published actor"):
        dql.DiffusionPolicy.from_published(published.PublishedAgent(S, A, hidden_dim=H).critic.state_dict())


@pytest.mark.parametrize("taken", ["flat", "parameters"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_any_optimizer_trains(taken, set_to_none):
    """The flat buffer and the parameters take the same steps, however the optimizer zeroes its gradients."""
    states, policy = torch.randn(8, 11), dql.DiffusionPolicy(11, 3, hidden_dim=16)
    reference = copy.deepcopy(policy)
    modules = {"ours": policy.denoiser, "reference": reference.denoiser}
    optimizer = torch.optim.SGD([modules["ours"].flat] if taken == "flat" else list(policy.parameters()), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        dql.sample(states, policy, seed=1).square().mean().backward()
        optimizer.step()
        gradients = torch.autograd.grad(
            dql.sample(states, reference, seed=1).square().mean(), list(reference.parameters())
        )
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.1)
    torch.testing.assert_close(modules["ours"].flat, modules["reference"].flat, rtol=1e-5, atol=1e-7)
    assert not torch.equal(modules["ours"].flat, dql.DiffusionPolicy(11, 3, hidden_dim=16).denoiser.flat)


def test_a_replaced_layer_is_refused():
    policy = dql.DiffusionPolicy(11, 3, hidden_dim=16)
    policy.denoiser.final_layer = torch.nn.Linear(16, 3)
    with pytest.raises(RuntimeError, match="layer 'final_layer' of Denoiser was replaced"):
        dql.sample(torch.zeros(1, 11), policy)
