"""The Triton twin critics, their gradients and `select`, interpreted where no CUDA device is: `kernel_critic`."""

from types import ModuleType

import pytest
from cuda_cases import cannot_run
from kernel_critic import *  # noqa: F403

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux only)")

from dql.kernels import twin_critic

pytestmark = pytest.mark.skipif(cannot_run("triton") is not None, reason=str(cannot_run("triton")))


@pytest.fixture
def kernels() -> ModuleType:
    return twin_critic
