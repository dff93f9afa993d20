"""The Triton twin critics, their gradients and `select`, interpreted where no CUDA device is: `kernel_critic`."""

from types import ModuleType

import pytest
import torch
from kernel_critic import *  # noqa: F403

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux only)")

from dql.kernels import twin_critic
from dql.kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not INTERPRETED,
    reason="no CUDA device, and TRITON_INTERPRET=1 was not set before triton was imported",
)


@pytest.fixture
def kernels() -> ModuleType:
    return twin_critic
