"""The exported chain in ONNX Runtime against `dql.sample`, the command `dql export`, and what is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.cases import CASES, TOLERANCES, Case, assert_close, make_problem

import dql
from dql.kernels.layout import ACTIVATIONS
from dql.schedule import SAMPLERS

onnx = pytest.importorskip("onnx", reason='needs onnx: pip install "diffusion-ql[test]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs onnxruntime: pip install "diffusion-ql[test]"')

S, A, H = 4, 3, 16
EXTRA = [
    Case(B=5, S=3, A=2, K=1, T=1000, H=16, sampler="ddim", predict_epsilon=False),
    Case(B=3, S=2, A=2, K=100, H=16, activation="relu", sampler="dpm-solver++", max_action=2.5),
    Case(B=3, S=3, A=2, K=5, H=16, num_hidden=2, activation="silu", predict_epsilon=False, N=4),
]


def open_session(path) -> "onnxruntime.InferenceSession":
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def run(session, states, noise) -> torch.Tensor:
    (actions,) = session.run(None, {"states": states.numpy(), "noise": noise.numpy()})
    return torch.from_numpy(actions)


@pytest.fixture
def policy() -> dql.DiffusionPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return dql.DiffusionPolicy(S, A, 2.0, H, 2, T=7)


@pytest.mark.parametrize("case", [*CASES, *EXTRA], ids=str)
def test_equals_sample(case, tmp_path):
    problem = make_problem(case, torch.float32)
    path = tmp_path / "policy.onnx"
    problem.policy.export_onnx(path, sampler=problem.table, num_candidates=case.N)
    with torch.no_grad():
        want = dql.sample(
            problem.states, problem.policy, backend="eager", num_candidates=case.N, noise=problem.noise,
            sampler=problem.table,
        )  # fmt: skip
    got = run(open_session(path), problem.states, problem.noise)
    assert_close(got, want, TOLERANCES["float32"], what="actions", case=case, backend="onnxruntime")


def test_the_cases_are_of_every_kind():
    cases = [*CASES, *EXTRA]
    for field, kinds in {
        "sampler": {*SAMPLERS},
        "activation": {*ACTIVATIONS},
        "predict_epsilon": {True, False},
        "num_hidden": {2, 3, 4},
    }.items():
        assert {getattr(case, field) for case in cases} == kinds, field


@pytest.mark.parametrize("num_candidates", [None, 5])
def test_one_file_for_any_number_of_states(policy, tmp_path, num_candidates):
    policy.export_onnx(tmp_path / "policy.onnx", num_candidates=num_candidates)
    session = open_session(tmp_path / "policy.onnx")
    generator = torch.Generator().manual_seed(0)
    for B in (1, 7, 300):
        states = torch.randn(B, S, generator=generator)
        rows = (B,) if num_candidates is None else (B, num_candidates)
        noise = torch.randn(7, *rows, A, generator=generator)
        with torch.no_grad():
            want = dql.sample(states, policy, backend="eager", noise=noise, num_candidates=num_candidates)
        assert_close(run(session, states, noise), want, TOLERANCES["float32"], what="actions", case=f"B = {B}")


def test_mish_far_from_zero(policy, tmp_path):
    """Pre-activations of thousands, where exp(z) is 0 and infinite: the actions are finite and right."""
    with torch.no_grad():
        policy.denoiser.get_parameter("mid_layer.0.weight").mul_(1e4)
        policy.denoiser.get_parameter("mid_layer.2.weight").mul_(1e-3)
    policy.export_onnx(tmp_path / "policy.onnx")
    states, noise = torch.randn(50, S), torch.randn(7, 50, A)
    with torch.no_grad():
        want = dql.sample(states, policy, backend="eager", noise=noise)
    got = run(open_session(tmp_path / "policy.onnx"), states, noise)
    assert_close(got, want, TOLERANCES["float32"], what="actions")
    assert (want.abs() < 2).any(), "clamped actions prove nothing"


def test_a_float64_policy_becomes_float32(policy, tmp_path):
    policy.double().export_onnx(tmp_path / "policy.onnx")
    states, noise = torch.randn(9, S), torch.randn(7, 9, A)
    with torch.no_grad():
        want = dql.sample(states.double(), policy, backend="eager", noise=noise.double())
    got = run(open_session(tmp_path / "policy.onnx"), states, noise)
    assert_close(got, want, TOLERANCES["float32"], what="actions")
    assert policy.dtype == torch.float64, "the policy itself is as before"


def test_what_the_file_says_of_itself(policy, tmp_path):
    path = tmp_path / "deep" / "policy.onnx"
    policy.export_onnx(path, sampler="ddim", num_steps=4, num_candidates=np.int64(5))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {p.key: p.value for p in model.metadata_props} == {
        "state_dim": "4", "action_dim": "3", "max_action": "2.0", "sampler": "ddim", "beta_schedule": "vp", "T": "7",
        "K": "4", "num_candidates": "5", "dql_version": dql.__version__,
    }  # fmt: skip
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
              for v in (*model.graph.input, *model.graph.output)}  # fmt: skip
    assert shapes == {"states": ["B", 4], "noise": [4, "B", 5, 3], "actions": ["B", 5, 3]}
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_a_thousand_steps_share_the_weights(tmp_path):
    sizes = {}
    for T in (1, 1000):
        policy = dql.DiffusionPolicy(S, A, hidden_dim=64, T=T)
        policy.export_onnx(tmp_path / f"{T}.onnx")
        sizes[T] = (tmp_path / f"{T}.onnx").stat().st_size
    assert sizes[1000] - sizes[1] < 1000 * 3000, sizes


# What is refused.
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sampler": "none such"}, "unknown sampler 'none such'"),
        ({"num_steps": 8}, "num_steps must be an integer from 1 to the 7 steps"),
        ({"num_candidates": 0}, "num_candidates must be a positive integer or None, got 0"),
        ({"num_candidates": True}, "num_candidates must be a positive integer or None, got True"),
    ],
)
def test_bad_arguments(policy, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        policy.export_onnx(tmp_path / "policy.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to(policy, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(dql.CheckpointError, match=r"cannot write .*/file/policy\.onnx: .*; choose a folder"):
        policy.export_onnx(tmp_path / "file" / "policy.onnx")


def test_a_failed_write_leaves_the_old_file(policy, tmp_path):
    """A real write error: the process may not write files as large as this one."""
    path = tmp_path / "policy.onnx"
    policy.export_onnx(path)
    before = path.read_bytes()
    program = f"""
import resource, dql
policy = dql.DiffusionPolicy({S}, {A}, hidden_dim=64)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    policy.export_onnx({str(path)!r})
except dql.CheckpointError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"cannot write {path}: File too large; " in result.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_without_onnx(policy, tmp_path, monkeypatch, dql_here):
    monkeypatch.setitem(sys.modules, "onnx", None)  # what Python does where a package is absent
    with pytest.raises(ModuleNotFoundError, match=r'needs the package onnx .*pip install "diffusion-ql\[export\]"'):
        policy.export_onnx(tmp_path / "policy.onnx")
    policy.save(tmp_path / "policy.safetensors")
    dql_here("export", tmp_path / "policy.safetensors").refused("onnx", 'pip install "diffusion-ql[export]"')


def test_importing_dql_does_not_import_onnx():
    program = "import sys, dql; print('onnx' in sys.modules, 'dql.export' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


# The command.
@pytest.fixture
def ended_run(pendulum, tiny, dql_here, tmp_path):
    """A real run with evaluations, steps 10 and 20."""
    flags = ["--num-updates", 20, "--eval-every", 10, "--eval-episodes", 1, "--device", "cpu", "--top-k", 0]
    done = dql_here("train", "--dataset", pendulum, *tiny, *flags, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err
    return tmp_path / "run"


def test_export_of_a_run(ended_run, dql_here, tmp_path):
    done = dql_here("export", ended_run)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(
        f"{ended_run / 'policy.onnx'}: states [B, 3], noise [5, B, 1] -> actions [B, 1], float32"
    )
    assert len(done.out.splitlines()) == 1
    agent = dql.load(ended_run)
    generator = torch.Generator().manual_seed(3)
    states, noise = torch.randn(6, 3, generator=generator), torch.randn(5, 6, 1, generator=generator)
    with torch.no_grad():
        want = dql.sample(states, agent.policy, backend="eager", noise=noise)
    got = run(open_session(ended_run / "policy.onnx"), states, noise)
    assert_close(got, want, TOLERANCES["float32"], what="actions")
    assert got.abs().max() <= 2

    out = tmp_path / "elsewhere" / "ddim.onnx"
    flags = ["--sampler", "ddim", "--num-steps", 3, "--num-candidates", 4, "--out", out]
    done = dql_here("export", ended_run, "--which", 10, *flags)
    assert done.code == 0, done.err
    assert "noise [3, B, 4, 1] -> actions [B, 4, 1]" in done.out
    noise = torch.randn(3, 6, 4, 1, generator=generator)
    with torch.no_grad():
        want = dql.sample(
            states, dql.load(ended_run, "10").policy, backend="eager", noise=noise, num_candidates=4, sampler="ddim",
            num_steps=3,
        )  # fmt: skip
    assert_close(run(open_session(out), states, noise), want, TOLERANCES["float32"], what="actions")

    assert dql_here("export", ended_run, "--which", "best").code == 0
    best = json.loads((ended_run / "selection.json").read_text())["best"]
    assert dql_here("export", ended_run, "--which", best, "--out", tmp_path / "b.onnx").code == 0
    assert (ended_run / "policy-best.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()

    dql_here("export", ended_run, "--which", 17).refused("'17'", "[10, 20]")
    dql_here("export", ended_run, "--num-steps", 9).refused("num_steps must be an integer from 1 to the 5 steps")
    dql_here("export", ended_run, "--sampler", "none").refused("unknown sampler 'none'")


def test_export_of_a_policy_file_and_of_an_agent(policy, dql_here, tmp_path):
    policy.save(tmp_path / "mine.safetensors")
    done = dql_here("export", tmp_path / "mine.safetensors")
    assert done.code == 0, done.err
    states, noise = torch.randn(6, S), torch.randn(7, 6, A)
    with torch.no_grad():
        want = dql.sample(states, policy, backend="eager", noise=noise)
    assert_close(run(open_session(tmp_path / "mine.onnx"), states, noise), want, TOLERANCES["float32"], what="actions")
    dql_here("export", tmp_path / "mine.safetensors", "--which", "best").refused("--which", "is a file; leave it out")

    dql.DiffusionBC(S, A, dql.Config(hidden_dim=H)).save(tmp_path / "agent")
    assert dql_here("export", tmp_path / "agent").code == 0
    assert (tmp_path / "agent" / "policy.onnx").is_file()


def test_export_of_nothing(dql_here, tmp_path):
    dql_here("export", "nowhere").refused(
        "nowhere does not exist; give a run's or an agent's folder, or a policy's .safetensors file"
    )
    (tmp_path / "text.safetensors").write_text("no tensors")
    dql_here("export", tmp_path / "text.safetensors").refused("damaged or no safetensors file")


def test_the_help_names_it(dql_here):
    assert "\n  export " in dql_here("--help").out
    told = dql_here("export", "--help").out
    assert all(flag in told for flag in ("--which", "--out", "--sampler", "--num-steps", "--num-candidates"))


def test_a_pipe_is_no_policy(tmp_path):
    """Nobody writes to it: it is not waited for, and it is no folder."""
    from dql.checkpoint import CheckpointError
    from dql.cli import export

    os.mkfifo(tmp_path / "policy.safetensors")
    with pytest.raises(CheckpointError, match=r"policy\.safetensors is no regular file"):
        export(tmp_path / "policy.safetensors")


def test_candidates_are_checked_before_onnx_is_asked_for(policy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match="num_candidates must be up to"):
        policy.export_onnx(tmp_path / "policy.onnx", num_candidates=1 << 40)
    with pytest.raises(ModuleNotFoundError, match="needs the package onnx"):
        policy.export_onnx(tmp_path / "policy.onnx")
