"""DiffusionPolicy: losses against the transcription, files that survive, and what is refused."""

import inspect
import json
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import transcription
from support.cases import TOLERANCES, assert_close

import dql

S, A, H = 4, 3, 16


@pytest.fixture
def policy() -> dql.DiffusionPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return dql.DiffusionPolicy(S, A, 2.0, H, 2, T=3, beta_schedule="cosine", activation="silu")


def test_q_sample_and_bc_loss_equal_the_transcription():
    for name, T in (("vp", 5), ("linear", 50), ("cosine", 2)):
        policy = dql.DiffusionPolicy(S, A, hidden_dim=H, T=T, beta_schedule=name).double()
        generator = torch.Generator().manual_seed(T)
        states, actions, noise = (torch.randn(6, n, generator=generator).double() for n in (S, A, A))
        t = torch.randint(0, T, (6,), generator=generator)
        schedule = transcription.make_schedule(name, T)
        want = transcription.q_sample(schedule, actions, t, noise)
        assert_close(policy.q_sample(actions, t, noise), want, TOLERANCES["float64"], what="q_sample", case=name)
        params = transcription.with_gradient(policy.denoiser.state_dict())
        want = transcription.bc_loss(params, schedule, states, actions, t, noise)
        got = policy.bc_loss(states, actions, t, noise)
        assert_close(got, want, TOLERANCES["float64"], what="bc_loss", case=name)
        got.backward()
        for parameter, (key, d) in zip(
            policy.denoiser.parameters(), transcription.gradients(want, params).items(), strict=True
        ):
            assert_close(parameter.grad, d, TOLERANCES["float64"], what=f"d_{key} of bc_loss", case=name)


def test_bc_loss_of_a_policy_that_predicts_x0():
    policy = dql.DiffusionPolicy(S, A, hidden_dim=H, predict_epsilon=False).double()
    states, actions, noise = (torch.randn(6, n).double() for n in (S, A, A))
    t = torch.tensor([0, 1, 2, 3, 4, 0])
    noisy = transcription.q_sample(transcription.make_schedule("vp", 5), actions, t, noise)
    output = transcription.denoiser(policy.denoiser.state_dict(), noisy, t, states)
    assert_close(
        policy.bc_loss(states, actions, t, noise),
        ((output - actions) ** 2).mean(),
        TOLERANCES["float64"],
        what="loss",
    )


def test_using_a_policy_in_inference_mode_does_not_spoil_it_for_training(policy):
    states, actions, t = torch.randn(4, S), torch.randn(4, A), torch.zeros(4, dtype=torch.long)
    with torch.inference_mode():
        policy.bc_loss(states, actions, t, torch.randn(4, A))
        policy(states, seed=0)
    (policy.bc_loss(states, actions, t, torch.randn(4, A)) + policy(states, seed=0).sum()).backward()
    assert policy.denoiser.flat.grad.isfinite().all()


def test_calling_it_samples(policy):
    states = torch.randn(4, S)
    got = policy(states, seed=3, num_candidates=2)
    assert torch.equal(got, dql.sample(states, policy, seed=3, num_candidates=2))
    assert "T=3, beta_schedule='cosine', max_action=2" in repr(policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load_round_trip(policy, tmp_path, dtype):
    policy = policy.to(dtype)
    path = tmp_path / "deep" / "folder" / "policy.safetensors"
    policy.save(path)
    loaded = dql.DiffusionPolicy.load(path)
    assert loaded.config() == policy.config()
    parameters = {*inspect.signature(dql.DiffusionPolicy).parameters}
    assert {*policy.config()} == parameters - {"generator"}, "all is saved"
    assert {field.name for field in fields(policy.denoiser.spec)} <= parameters
    assert loaded.denoiser.spec == policy.denoiser.spec
    assert loaded.dtype == dtype
    assert loaded.state_dict().keys() == policy.state_dict().keys()
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    states = torch.randn(5, S, dtype=dtype)
    assert torch.equal(dql.sample(states, loaded, seed=0), dql.sample(states, policy, seed=0))
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left
    assert loaded.step_table() == policy.step_table()


def test_saving_again_replaces(policy, tmp_path):
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    with torch.no_grad():
        policy.denoiser.flat.mul_(2)
    policy.save(str(path))
    assert torch.equal(dql.DiffusionPolicy.load(str(path)).denoiser.flat, policy.denoiser.flat)


def test_a_failed_write_leaves_the_old_file(policy, tmp_path):
    """A real write error: the process may not write files as large as this one."""
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    before = path.read_bytes()
    program = f"""
import resource, dql
policy = dql.DiffusionPolicy({S}, {A}, hidden_dim=64)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    policy.save({str(path)!r})
except dql.CheckpointError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"cannot write {path}: File too large; " in result.stdout
    assert "free some space" in result.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_to(policy, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(dql.CheckpointError, match=r"cannot write .*/file/policy: .*; choose a folder"):
        policy.save(tmp_path / "file" / "policy")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(dql.CheckpointError, match="Permission denied; choose a folder that you may write to"):
            policy.save(tmp_path / "locked" / "policy")


def test_missing_file(tmp_path):
    with pytest.raises(dql.CheckpointError, match=r"nothing\.safetensors does not exist; give the path"):
        dql.DiffusionPolicy.load(tmp_path / "nothing.safetensors")


def test_every_damaged_header_is_a_checkpoint_error(policy, tmp_path):
    """Each byte of the header changed in turn: it loads, or it is a CheckpointError, and nothing else."""
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    damaged = 0
    for i in range(0, header, 7):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x15]) + data[i + 1 :])
        try:
            dql.DiffusionPolicy.load(path)
        except dql.CheckpointError:
            damaged += 1
    assert damaged > header // 7 // 2


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_cut_off_file(policy, tmp_path, length):
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(dql.CheckpointError, match=r"policy\.safetensors is damaged .* take another checkpoint"):
        dql.DiffusionPolicy.load(path)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        (None, "was not written by dql; for the authors' .pth files use DiffusionPolicy.from_published"),
        ({"dql": json.dumps({"kind": "agent"})}, "no policy.*dql.load"),
        ({"dql": "no json"}, "damaged"),
        ({"dql": json.dumps({"kind": "policy", "format": 1})}, "damaged"),
        ({"dql": json.dumps({"kind": "policy", "format": 1, "config": {"width": 3}})}, "damaged|version"),
        ({"dql": json.dumps({"kind": "policy", "format": 2, "config": {}})}, "version"),
    ],
)
def test_files_of_another_kind(tmp_path, metadata, sentence):
    path = tmp_path / "file.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(dql.CheckpointError, match=sentence):
        dql.DiffusionPolicy.load(path)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_loading_runs_no_code(tmp_path, protocol):
    """A pickle under our name: torch.load would run it, we do not."""
    proof = tmp_path / "code-was-run"
    (tmp_path / "policy.safetensors").write_bytes(pickle.dumps(_Payload(proof), protocol=protocol))
    torch.save({"x": _Payload(proof)}, tmp_path / "agent.safetensors")
    with pytest.raises(dql.CheckpointError):
        dql.DiffusionPolicy.load(tmp_path / "policy.safetensors")
    with pytest.raises(dql.CheckpointError):
        dql.DiffusionPolicy.load(tmp_path / "agent.safetensors")
    with pytest.raises(dql.CheckpointError):
        dql.load(tmp_path)
    assert not proof.exists()
    pickle.loads((tmp_path / "policy.safetensors").read_bytes())  # it does run where pickle is trusted
    assert proof.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_action": 0}, "max_action must be a positive number, got 0"),
        ({"max_action": float("inf")}, "max_action must be a positive number, got inf"),
        ({"max_action": float("nan")}, "max_action must be a positive number, got nan"),
        ({"max_action": "1"}, "max_action must be a positive number, got '1'"),
        ({"T": 0}, "T must be an integer from 1 to 1000, got 0"),
        ({"beta_schedule": "x"}, "unknown beta schedule 'x'"),
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
        ({"state_dim": 0}, "state_dim must be"),
    ],
)
def test_bad_arguments(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dql.DiffusionPolicy(**{"state_dim": S, "action_dim": A, "hidden_dim": H} | changes)


def test_a_forged_size_takes_no_memory(tmp_path):
    """What a file says of its sizes is compared with what it holds before a network of that size is made."""
    from safetensors import safe_open

    dql.DiffusionPolicy(3, 2, 1.0, 16, 2).save(tmp_path / "policy.safetensors")
    with safe_open(tmp_path / "policy.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["dql"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    about.pop("digest")  # as an earlier version wrote it
    for name, value in {"hidden_dim": 65_536, "num_hidden": 10**9, "state_dim": 65_536, "action_dim": 3}.items():
        forged = about | {"config": about["config"] | {name: value}}
        save_file(tensors, tmp_path / "forged.safetensors", {"dql": json.dumps(forged)})
        with pytest.raises(dql.CheckpointError, match=r"sizes .* are not those that it names"):
            dql.DiffusionPolicy.load(tmp_path / "forged.safetensors")
    save_file(tensors, tmp_path / "forged.safetensors", {"dql": json.dumps(about)})
    assert dql.DiffusionPolicy.load(tmp_path / "forged.safetensors").state_dim == 3
