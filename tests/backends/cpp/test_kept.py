"""What the backend "cpp" keeps between calls: weights packed once a version, prepared calls, scratch memory."""

import copy
import gc
import math
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from support.cases import TOLERANCES, assert_close
from support.networks import A, H, S, make_critic, make_policy, needs_cpp

import dql
from dql.kernels.cpp import binding

Tensor = torch.Tensor
pytestmark = needs_cpp


@pytest.fixture
def policy() -> dql.DiffusionPolicy:
    return make_policy(T=12)


@pytest.fixture
def critic() -> dql.TwinCritic:
    return make_critic()


STATES = torch.randn(9, S, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(12, 9, A, generator=torch.Generator().manual_seed(2))
WAYS: dict[str, Callable[[dql.DiffusionPolicy, str], Tensor]] = {
    # the ways into the kernels, each with packed weights of its own accord
    "seed": lambda policy, backend: dql.sample(STATES, policy, seed=3, backend=backend),
    "noise": lambda policy, backend: dql.sample(STATES, policy, noise=NOISE, backend=backend),
    "candidates": lambda policy, backend: dql.sample(STATES, policy, num_candidates=4, seed=3, backend=backend),
}


@pytest.fixture(params=WAYS)
def way(request) -> Callable[[dql.DiffusionPolicy, str], Tensor]:
    """Runs a chain with this backend, three times: from the second on, what the first kept may serve."""

    def run(policy: dql.DiffusionPolicy, backend: str) -> Tensor:
        with torch.no_grad():
            first, second, third = (WAYS[request.param](policy, backend) for _ in range(3))
        assert torch.equal(first, second) and torch.equal(first, third)
        return third

    return run


def gradients_of_one(policy: dql.DiffusionPolicy) -> None:
    policy.denoiser.zero_grad()
    policy.denoiser.flat.grad.fill_(1.0)


def adam_step(policy: dql.DiffusionPolicy, of_flat: bool, **options) -> None:
    gradients_of_one(policy)
    parameters = [policy.denoiser.flat] if of_flat else list(policy.parameters())
    torch.optim.Adam(parameters, lr=0.1, **options).step()


def turn(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.flip(0) for name, value in state.items()}


@torch.no_grad()
def copy_parameters(policy: dql.DiffusionPolicy) -> None:
    for parameter in policy.parameters():
        parameter.copy_(parameter.flip(0))


def write_data(name: str) -> Callable[[dql.DiffusionPolicy], None]:
    def change(policy: dql.DiffusionPolicy) -> None:
        parameter = policy.denoiser.get_parameter(name)
        parameter.data.copy_(torch.full_like(parameter, 0.5))

    return change


@torch.no_grad()
def ema(policy: dql.DiffusionPolicy) -> None:
    policy.denoiser.flat.lerp_(torch.ones_like(policy.denoiser.flat), 0.1)


@torch.inference_mode()
def in_inference_mode(policy: dql.DiffusionPolicy) -> None:
    policy.denoiser.mid_layer[2].weight.mul_(2)


@torch.no_grad()
def one_element(policy: dql.DiffusionPolicy) -> None:
    policy.denoiser.final_layer.bias[1] += 0.7


@torch.no_grad()
def one_of_many_elements(policy: dql.DiffusionPolicy) -> None:
    """Which only the version counter tells, if it is none of those that are compared."""
    policy.denoiser.mid_layer[2].weight[17, 23] += 5


def native_lerp(policy: dql.DiffusionPolicy) -> None:
    binding.lerp(policy.denoiser.buffer, torch.ones_like(policy.denoiser.buffer), 0.1)


def native_adam(policy: dql.DiffusionPolicy) -> None:
    flat = policy.denoiser.buffer
    binding.adam(flat, torch.ones_like(flat), torch.zeros_like(flat), torch.zeros_like(flat), 0.1, 1, 0.0)


CHANGES: dict[str, Callable[[dql.DiffusionPolicy], object]] = {
    "one element": one_element,
    "one of many elements": one_of_many_elements,
    "copy_": copy_parameters,
    "lerp_": ema,
    "inference mode": in_inference_mode,
    "load_state_dict": lambda policy: policy.load_state_dict(turn(policy.state_dict())),
    "Adam of flat": lambda policy: adam_step(policy, True, foreach=False),
    "Adam, foreach": lambda policy: adam_step(policy, False, foreach=True),
    "Adam, fused, of flat": lambda policy: adam_step(policy, True, fused=True),
    "Adam, fused, of parameters": lambda policy: adam_step(policy, False, fused=True),
    "native lerp": native_lerp,
    "native Adam": native_adam,
    ".data of all": lambda policy: policy.denoiser.flat.data.mul_(1.5),
    "float64 and back": lambda policy: copy_parameters(policy.double()) or policy.float(),
    "flatten_parameters": lambda policy: copy_parameters(policy) or policy.denoiser.flatten_parameters(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_parameters_is_noticed(policy, change, way):
    before = way(policy, "cpp")
    CHANGES[change](policy)
    got, want = way(policy, "cpp"), way(policy, "eager")
    assert_close(got, want, TOLERANCES["float32"], what="actions", case=change, backend="cpp")
    assert not torch.allclose(got, before, atol=1e-3)


@pytest.mark.parametrize("name", [name for name, _ in dql.DiffusionPolicy(S, A).denoiser.named_parameters()])
def test_data_written_behind_autograds_back_is_noticed(policy, name, way):
    """`parameter.data.copy_(...)`, which counts no version, is what an error of ours advises."""
    before = way(policy, "cpp")
    write_data(name)(policy)
    got, want = way(policy, "cpp"), way(policy, "eager")
    assert_close(got, want, TOLERANCES["float32"], what="actions", case=name, backend="cpp")
    assert not torch.equal(got, before)


def test_a_changed_critic_is_noticed(policy, critic):
    def run(backend: str) -> Tensor:
        return dql.select(STATES, policy, critic, num_candidates=20, seed=3, backend=backend)

    with torch.no_grad():
        for change in (lambda: None, lambda: critic.flat.mul_(-1), lambda: critic.q2_model[0].weight.mul_(3)):
            change()
            assert_close(run("cpp"), run("eager"), TOLERANCES["float32"], what="chosen", backend="cpp")
            assert torch.equal(run("cpp"), run("cpp"))


def test_training_and_sampling_in_turns(policy, way):
    """Gradients pack the transposed weights too, of the same version or the next."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = {}
        for backend in ("eager", "cpp"):
            actions = dql.sample(STATES, policy, seed=1, backend=backend)
            loss[backend] = torch.autograd.grad(actions.square().sum(), list(policy.parameters()))
            assert_close(way(policy, "cpp"), way(policy, "eager"), TOLERANCES["float32"], what="actions", backend="cpp")
        for parameter, got, want in zip(policy.parameters(), loss["cpp"], loss["eager"], strict=True):
            assert_close(got, want, TOLERANCES["float32"], what="gradient", backend="cpp")
            parameter.grad = want
        optimizer.step()


def test_inference_tensors(way):
    """A policy made in inference mode has no version counter."""
    with torch.inference_mode():
        torch.manual_seed(0)
        policy = dql.DiffusionPolicy(S, A, hidden_dim=H, T=12)
        for factor in (1.0, 1.3):
            policy.denoiser.final_layer.bias.mul_(factor)
            assert_close(way(policy, "cpp"), way(policy, "eager"), TOLERANCES["float32"], what="actions", backend="cpp")


@pytest.mark.parametrize("make", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy)), copy.copy])
def test_copies_after_use(policy, make, way):
    want = way(policy, "cpp")
    other = make(policy)
    assert torch.equal(way(other, "cpp"), want)
    if make is copy.copy:
        return
    copy_parameters(other)
    assert torch.equal(way(policy, "cpp"), want)
    assert_close(way(other, "cpp"), way(other, "eager"), TOLERANCES["float32"], what="actions", backend="cpp")


def test_a_step_table_after_use_can_be_copied(policy):
    table = dql.StepTable.ddim(policy.schedule, 6, stochasticity=0.5)
    want = dql.sample(STATES, policy, seed=1, sampler=table, backend="cpp")
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(dql.sample(STATES, policy, seed=1, sampler=other, backend="cpp"), want)
        assert other == table


def test_the_policys_other_settings_are_noticed(policy, way):
    way(policy, "cpp")
    policy.max_action = 0.25
    got = way(policy, "cpp")
    assert float(got.abs().amax()) == 0.25
    assert_close(got, way(policy, "eager"), TOLERANCES["float32"], what="actions", backend="cpp")


def test_replaced_modules_and_parameters_are_noticed(policy, way):
    way(policy, "cpp")
    old = policy.denoiser
    policy.denoiser = copy.deepcopy(old)
    copy_parameters(policy)
    assert_close(way(policy, "cpp"), way(policy, "eager"), TOLERANCES["float32"], what="actions", backend="cpp")
    layer = policy.denoiser.mid_layer[2]
    policy.denoiser.mid_layer[2] = torch.nn.Linear(H, H)
    with pytest.raises(RuntimeError, match="was replaced"):
        way(policy, "cpp")
    policy.denoiser.mid_layer[2] = layer
    way(policy, "cpp")
    layer.bias = torch.nn.Parameter(torch.zeros(H))
    with pytest.raises(RuntimeError, match="was replaced"):
        way(policy, "cpp")


def test_states_are_checked_at_every_call(policy, way):
    """A call that was prepared refuses what the first would have refused."""
    way(policy, "cpp")
    bad = STATES.clone()
    bad[4, 2] = math.nan
    with torch.no_grad():
        for states, sentence in (
            (bad, "hold 1 NaN or infinite values, the first at row 4, column 2"),
            (STATES.double(), "states are torch.float64, the policy is torch.float32"),
            (STATES[:, :5], r"states must be \[B, 11\] for this policy, got \[9, 5\]"),
            (STATES[0], "for one state use"),
        ):
            with pytest.raises(ValueError, match=sentence):
                dql.sample(states, policy, seed=3, backend="cpp")
        with pytest.raises(TypeError, match=r"states must be a torch\.Tensor, got list"):
            dql.sample([[0.0] * S], policy, seed=3, backend="cpp")
        strided = torch.randn(9, 2 * S)[:, ::2]
        want = dql.sample(strided.contiguous(), policy, seed=3, backend="cpp")
        assert torch.equal(dql.sample(strided, policy, seed=3, backend="cpp"), want)
        assert dql.sample(STATES[:0], policy, seed=3, backend="cpp").shape == (0, A)


def test_more_tables_than_are_kept():
    """A graph's table outlives those of later calls. Freed memory is overwritten here, if the C library can."""
    same = run_alone(
        """
import torch, dql
policy, states = dql.DiffusionPolicy(11, 3, hidden_dim=48, T=40), torch.randn(9, 11)
table = policy.step_table("ddpm", 12)
others = [dql.StepTable("own", table.rows, tuple(range(i + 11, i - 1, -1)), True) for i in range(29)]
found = []
for tables in (others, []):
    actions = dql.sample(states, policy, seed=1, sampler=table, backend="cpp")
    with torch.no_grad():
        for other in tables:
            dql.sample(states, policy, seed=2, sampler=other, backend="cpp")
    found.append([actions, *torch.autograd.grad(actions.sum(), list(policy.parameters()))])
print(all(torch.equal(a, b) for a, b in zip(*found)))
""",
        MALLOC_PERTURB_="85",
    )
    assert same == ["True"]


def test_a_policy_that_nobody_needs_goes_away(critic):
    policy = dql.DiffusionPolicy(S, A, hidden_dim=H)
    for _ in range(3):
        with torch.no_grad():
            dql.sample(STATES, policy, seed=1, backend="cpp")
        dql.sample(STATES, policy, seed=1, backend="cpp").sum().backward()
        dql.select(STATES, policy, critic, num_candidates=3, seed=1, backend="cpp")
    dead = weakref.ref(policy)
    del policy
    gc.collect()
    assert dead() is None


def run_alone(program: str, **environment: str) -> list[str]:
    """Runs a program in a process of its own, whose memory nothing else changes; gives the words that it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


_MEMORY = """
import gc, os, torch, dql
torch.set_num_threads(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
policy, critic = dql.DiffusionPolicy(17, 6), dql.TwinCritic(17, 6)
"""


needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="it reads and writes /proc/self"
)


@needs_proc
def test_steady_state_takes_no_memory():
    """20,000 calls: a kilobyte leaked by each would be 20 MB. The memory of gradients comes and goes: less is asked."""
    acting, training = run_alone(
        _MEMORY
        + """
state = torch.randn(1, 17)
def act(n):
    with torch.no_grad():
        for i in range(n):
            dql.sample(state, policy, backend="cpp")
            if i % 10 == 0:
                dql.select(state, policy, critic, num_candidates=50, backend="cpp")
def train(n):
    for i in range(n):
        dql.sample(state, policy, seed=i, backend="cpp").sum().backward()
for calls, n in (act, 20000), (train, 500):
    calls(n // 10)
    gc.collect()
    before = resident()
    calls(n)
    gc.collect()
    print(resident() - before)
"""
    )
    assert int(acting) < 300_000
    assert int(training) < 8 << 20


@needs_proc
def test_a_large_batch_takes_little_memory():
    """65,536 states forward: beyond inputs and outputs less than 16 MB; one layer's activations would be 64."""
    extra, outputs = run_alone(
        _MEMORY
        + """
states = torch.randn(65536, 17)
with torch.no_grad():
    dql.sample(states[:64], policy, seed=0, backend="cpp")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = resident()
    actions = dql.sample(states, policy, seed=0, backend="cpp")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024 - before, actions.numel() * 4)
"""
    )
    assert int(extra) - int(outputs) < 16 << 20
