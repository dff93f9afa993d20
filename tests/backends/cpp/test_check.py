"""What the backend "cpp" refuses, in one sentence with the remedy, and how a machine does without it."""

import json
import subprocess
import sys

import pytest
import torch
from support.networks import needs_cpp

import dql
from dql.backend.base import Chain
from dql.backend.cpp import CppBackend
from dql.backend.registry import registry
from dql.kernels.cpp import binding

S, A = 4, 3


def refused(policy: dql.DiffusionPolicy, **options: object) -> str:
    """The sentence by which "cpp" refuses, and which every call gives; "auto" runs it all the same, if eager can."""
    states = torch.zeros(2, policy.state_dim, dtype=policy.dtype, device=policy.device)
    sentences = []
    for gradients in (True, False):
        for call in (
            lambda: dql.sample(states, policy, backend="cpp", seed=0, **options),
            lambda: dql.sample(states, policy, backend="cpp", seed=0, num_candidates=2, **options),
            lambda: dql.sample(states, policy, backend="cpp", seed=0, **options),  # again: nothing was prepared
        ):
            with torch.set_grad_enabled(gradients), pytest.raises(dql.BackendUnavailable) as caught:
                call()
            sentences.append(str(caught.value))
    assert len(set(sentences)) == 1
    head, _, rest = sentences[0].partition("backend 'cpp' cannot run this: ")
    sentence, _, able = rest.partition(" (able to: ")
    assert head == "" and "\n" not in sentence
    if "precision" not in options:
        assert able == "eager)"
        got, want = (dql.sample(states, policy, backend=b, seed=0, **options) for b in ("auto", "eager"))
        assert torch.equal(got, want)
    return sentence


@needs_cpp
@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"state_dim": 513}, "it takes state_dim from 1 to 512, and this network has 513"),
        ({"action_dim": 65}, "it takes action_dim from 1 to 64, and this network has 65"),
        ({"hidden_dim": 513}, "it takes hidden_dim from 1 to 512, and this network has 513"),
        ({"num_hidden": 1}, "it takes num_hidden from 2 to 4, and this network has 1"),
        ({"num_hidden": 5}, "it takes num_hidden from 2 to 4, and this network has 5"),
    ],
    ids=str,
)
def test_sizes(sizes, sentence):
    policy = dql.DiffusionPolicy(**({"state_dim": S, "action_dim": A, "hidden_dim": 16} | sizes))
    assert refused(policy) == f"{sentence}; use backend='eager'"


@needs_cpp
def test_the_largest_sizes_run():
    policy = dql.DiffusionPolicy(512, 64, hidden_dim=512, num_hidden=4)
    assert dql.sample(torch.zeros(1, 512), policy, backend="cpp").isfinite().all()


def chain_of(policy: dql.DiffusionPolicy, table: dql.StepTable) -> Chain:
    denoiser = policy.denoiser
    states = torch.zeros(1, policy.state_dim, device=policy.device)
    return Chain(
        denoiser.buffer, denoiser.weights, denoiser.spec, states, 1, None, 0, table, 1.0, "fp32", denoiser.kept
    )


@needs_cpp
def test_steps_and_devices():
    """Which `sample` refuses before any backend is asked, or cannot have."""
    policy, backend = dql.DiffusionPolicy(S, A, hidden_dim=16, T=1000), CppBackend()
    table = policy.step_table()
    assert backend.check(chain_of(policy, table)) is None
    longer = dql.StepTable("own", table.rows + table.rows[-1:], (1000, *table.timesteps), True)
    assert backend.check(chain_of(policy, longer)) == "it runs up to 1000 steps, not 1001; use backend='eager'"
    sentence = "it runs on the CPU and this policy is on meta; move it with policy.to('cpu')"
    assert backend.check(chain_of(policy.to("meta"), table)) == sentence


@needs_cpp
def test_dtype():
    policy = dql.DiffusionPolicy(S, A, hidden_dim=16)
    dql.sample(torch.zeros(1, S), policy, backend="cpp")
    for dtype in (torch.float64, torch.bfloat16):
        sentence = f"it computes in float32 and this policy is {dtype}; convert it with policy.to(torch.float32)"
        assert refused(policy.to(dtype)) == sentence
    dql.sample(torch.zeros(1, S), policy.float(), backend="cpp")


@needs_cpp
def test_precision():
    policy = dql.DiffusionPolicy(S, A, hidden_dim=16)
    assert refused(policy, precision="tf32") == "it has no precision='tf32'; use precision='fp32'"
    with binding.forced("generic"):
        sentence = "precision='bf16' needs a CPU with AVX512_BF16, which this one has not; use precision='fp32'"
        assert refused(policy, precision="bf16") == sentence
    with pytest.raises(dql.BackendUnavailable) as caught:
        dql.sample(torch.zeros(1, S), policy, precision="tf32")
    on_gpus = [(name, registry()[name]) for name in ("cuda", "triton")]
    reasons = "".join(f"{name}: {backend.check() or backend.only_by_name()}; " for name, backend in on_gpus)
    assert str(caught.value) == (
        f"no backend can run this problem: cpp: it has no precision='tf32'; use precision='fp32'; {reasons}"
        "eager: it computes in the parameters' own dtype and has no precision='tf32'; use precision='fp32'"
    )


@needs_cpp
def test_select_refuses_the_same():
    policy, critic = dql.DiffusionPolicy(S, A, hidden_dim=16), dql.TwinCritic(S, A, 16)
    with pytest.raises(dql.BackendUnavailable, match="it has no precision='tf32'"):
        dql.select(torch.zeros(2, S), policy, critic, backend="cpp", precision="tf32")
    with pytest.raises(ValueError, match=r"the critic is torch\.float64 on cpu, the policy is torch\.float32"):
        dql.select(torch.zeros(2, S), policy, critic.double(), backend="cpp")


@needs_cpp
@pytest.mark.parametrize(
    "sizes",
    [{"hidden_dim": 600}, {"num_hidden": 1}, {"num_hidden": 5}],
    ids=str,
)
def test_select_with_a_critic_of_other_sizes(sizes):
    """The policy fits and its critic does not: then torch computes the critic, as for any backend without `select`."""
    policy = dql.DiffusionPolicy(S, A, hidden_dim=16)
    critic = dql.TwinCritic(**({"state_dim": S, "action_dim": A, "hidden_dim": 16} | sizes))
    states = torch.randn(5, S)
    want = dql.select(states, policy, critic, seed=1, backend="eager")
    assert torch.allclose(dql.select(states, policy, critic, seed=1), want, atol=1e-4)
    assert torch.allclose(dql.select(states, policy, critic, seed=1, backend="cpp"), want, atol=1e-4)


@needs_cpp
def test_it_is_listed_and_comes_first():
    found = dql.backends()
    assert list(found)[:1] == ["cpp"]
    assert found["cpp"] is None
    policy, states = dql.DiffusionPolicy(S, A, hidden_dim=16), torch.randn(5, S)
    assert torch.equal(dql.sample(states, policy, seed=1), dql.sample(states, policy, seed=1, backend="cpp"))


def without_extension(program: str) -> subprocess.CompletedProcess[str]:
    """A process in which the extension cannot be imported."""
    hide = "import sys\nsys.modules['dql.kernels._native'] = None\n"
    return subprocess.run([sys.executable, "-c", hide + program], capture_output=True, text=True, timeout=120)


def test_without_the_extension():
    """Everything runs on eager; "cpp" says why not, in the same words everywhere."""
    done = without_extension(
        """
import json, torch, dql
from dql.kernels.cpp import binding
policy, critic, states = dql.DiffusionPolicy(4, 3, hidden_dim=16), dql.TwinCritic(4, 3, 16), torch.zeros(2, 4)
said = {"unavailable": binding.unavailable(), "listed": dql.backends()["cpp"], "variants": binding.variants()}
with torch.no_grad():
    auto = [dql.sample(states, policy, seed=1) for _ in range(2)] + [dql.select(states, policy, critic, seed=1)]
    eager = [dql.sample(states, policy, seed=1, backend="eager")] * 2
    eager += [dql.select(states, policy, critic, seed=1, backend="eager")]
said["same"] = all(torch.equal(a, e) for a, e in zip(auto, eager))
dql.sample(states, policy).sum().backward()
for name, call in {
    "sample": lambda: dql.sample(states, policy, backend="cpp"),
    "select": lambda: dql.select(states, policy, critic, backend="cpp"),
}.items():
    try:
        call()
    except dql.BackendUnavailable as error:
        said[name] = str(error)
agent = dql.DiffusionQL(4, 3, dql.Config(hidden_dim=16))
batch = dql.Batch(states, torch.zeros(2, 3), torch.zeros(2), states, torch.ones(2))
said["update"] = sorted(agent.update(batch))[0]
try:
    dql.sample(torch.full((2, 4), float("nan")), policy)
except ValueError as error:
    said["nan"] = str(error)
print(json.dumps(said))
"""
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    reason = said["unavailable"]
    assert reason and "\n" not in reason
    assert said["listed"] == reason
    assert said["variants"] == {}
    assert said["same"] is True
    able = ", ".join(name for name in ("cuda", "triton", "eager") if registry()[name].check() is None)
    for call in ("sample", "select"):
        assert said[call] == f"backend 'cpp' cannot run this: {reason} (able to: {able})"
    assert said["update"] == "actor/bc_loss"
    assert "hold 8 NaN or infinite values" in said["nan"]


def test_the_doctor_without_the_extension():
    done = without_extension("sys.argv = ['dql', 'doctor']\nfrom dql.cli import main\nsys.exit(main())")
    assert done.returncode == 0, done.stderr
    reason = without_extension("import dql; print(dql.backends()['cpp'])").stdout
    letters = "".join(c for c in done.stdout if c not in "│┌┐└┘─┬┴├┤┼" and not c.isspace())  # the table folds its lines
    assert "backendcpp" + "".join(reason.split()) in letters
