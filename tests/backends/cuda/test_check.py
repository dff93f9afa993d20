"""What the backend "cuda" alone refuses: networks that do not fit a GPU's shared memory, and old drivers."""

import pytest
import torch
from support.calls import SMALL, chain_of, refused
from support.networks import make_policy

import dql
from dql.backend.registry import registry
from dql.kernels.cuda import binding
from dql.kernels.cuda import plan as cuda_plan

pytestmark = pytest.mark.usefixtures("emulated", "poisoned")


def test_shared_memory(monkeypatch):
    """Of a GPU that is not here: all that a plan asks of it are these facts."""
    monkeypatch.setattr(binding, "facts", lambda ordinal, emulated: (89, 128, 99 * 1024, False))
    cuda_plan._chosen.cache_clear()
    try:
        sentence = refused("cuda", dql.DiffusionPolicy(512, 64, hidden_dim=512, num_hidden=4))
        assert sentence.startswith("a network of these sizes needs ")
        assert "KB of shared memory in fp32, and a block of this GPU has 99 KB; use " in sentence
        policy = make_policy(**SMALL)
        assert registry()["cuda"].check(chain_of(policy, policy.step_table())) is None
    finally:
        cuda_plan._chosen.cache_clear()


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        ((0, 13000), "there is no NVIDIA driver here; see `dql doctor`"),
        (
            (12080, 13000),
            "the driver is for CUDA 12.8 and the extension was built with 13.0; install a newer driver",
        ),
    ],
    ids=["none", "too old"],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_drivers(versions, sentence, monkeypatch):
    monkeypatch.setattr(binding, "versions", lambda: versions)
    assert binding._no_device() == sentence
