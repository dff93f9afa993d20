"""What the benches compare by: problems that decide something, and checks that can fail."""

import bench_gpu
import pytest
import rivals
import torch

CPU = torch.device("cpu")


@pytest.mark.parametrize("margin", bench_gpu.CLAMP_MARGINS.values(), ids=bench_gpu.CLAMP_MARGINS)
@pytest.mark.parametrize("B", [1, 50])
def test_every_row_of_a_problem_counts(B, margin):
    """At B = 1, too: rows of which rounding would decide are not drawn."""
    states, noise, weights = rivals.problem(B, CPU, margin)
    assert (states.shape, noise.shape, weights.shape) == ((B, rivals.S), (rivals.T, B, rivals.A), (B, rivals.A))
    assert weights.all() and len(states.unique(dim=0)) == B
    with torch.no_grad():
        _, predictions = rivals.LeanActor(rivals.published_actor(CPU)).chain(states, noise)
    assert (torch.stack(predictions).abs() - 1).abs().amin() > margin * 0.999
    assert all(map(torch.equal, rivals.problem(B, CPU, margin), (states, noise, weights)))


def test_norms():
    want = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2)}
    assert rivals.check_norms("x", {"a": torch.tensor([3.0, 4.5]), "b": torch.ones(2)}, want, 0.2) == pytest.approx(0.1)
    with pytest.raises(AssertionError, match="of 2 gradients these are off, allowed 1e-02: a by"):
        rivals.check_norms("x", {"a": torch.tensor([3.0, 4.5]), "b": torch.ones(2)}, want, 0.01)
    with pytest.raises(AssertionError, match="off"):
        rivals.check_norms("x", want | {"b": torch.full((2,), torch.nan)}, want, 0.2)
    with pytest.raises(AssertionError, match=r"expected to be zero, which compares nothing: \['b'\]"):
        rivals.check_norms("x", want, want | {"b": torch.zeros(2)}, 0.2)
