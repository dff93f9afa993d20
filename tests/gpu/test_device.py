"""What must hold on a GPU as on the CPU: the same numbers, and an update that never makes the host wait."""

import pytest
import torch
from torch import Tensor

import dql

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
)

S, A, B = 11, 3, 37
FP32 = {"rtol": 1e-4, "atol": 1e-5}  # float32 products of 256 terms, summed in another order, through five steps


def batch(device: str) -> dql.Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    return dql.Batch(normal(B, S), normal(B, A).clamp(-1, 1), normal(B), normal(B, S), torch.ones(B, device=device))


def test_noise_is_the_same_stream():
    host, gpu = (dql.noise.normal(11, 5, 1000, 6, device=device).cpu() for device in ("cpu", "cuda"))
    torch.testing.assert_close(gpu, host, rtol=1e-6, atol=1e-6)  # float64 sin, cos and log differ in their last bits


@pytest.mark.parametrize("candidates", [None, 7])
def test_the_same_seed_gives_the_same_actions_and_gradients(candidates):
    policy = dql.DiffusionPolicy(S, A)
    results = []
    for device in ("cpu", "cuda"):
        on_device = policy.to(device)
        states = batch(device).states.requires_grad_()
        actions = dql.sample(states, on_device, seed=3, num_candidates=candidates)
        parameters = list(on_device.denoiser.parameters())
        gradients = torch.autograd.grad(actions.square().sum(), [states, *parameters])
        results.append([t.detach().cpu() for t in (actions, *gradients)])
    for host, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, host, rtol=1e-3, atol=1e-4 * host.abs().max().item())


def test_an_update_is_the_same_and_never_waits():
    agents = [dql.DiffusionQL(S, A, dql.Config(seed=1), device=device) for device in ("cpu", "cuda")]
    agents[1].update(batch("cuda"))  # the first makes tables and kernels, which may wait
    agents[0].update(batch("cpu"))
    on_gpu = batch("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = agents[1].update(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in agents[0].update(batch("cpu")).items():
        torch.testing.assert_close(metrics[name].cpu(), value, **FP32)
