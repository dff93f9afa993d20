"""The backends that the tests of this folder are for, one after the other, as the registry has them: on tensors of the
CPU, their kernels interpreted or emulated where they are a GPU's. `support/backends.py` knows what is special to each.
"""

from types import ModuleType

import pytest
import torch
from support.backends import NAMES, OF_GPUS, entry
from support.calls import chain_of
from support.networks import make_policy

from dql.backend.registry import registry


@pytest.fixture(params=NAMES)
def backend(request, runs_here) -> str:
    """The name of each; with `support.backends.every_variant`, in every variant of its instructions."""
    name, _, variant = (request.param, "", "") if request.param in NAMES else request.param.rpartition("-")
    runs_here(name, on_cpu=True)
    if not variant:
        yield name
        return
    with entry(name).forced(variant):
        assert entry(name).in_use() == variant
        yield name


@pytest.fixture(params=OF_GPUS)
def gpu_backend(request, runs_here) -> str:
    """The name of each whose kernels are a GPU's."""
    return runs_here(request.param, on_cpu=True)


@pytest.fixture(params=OF_GPUS)
def kernels(request, runs_here) -> ModuleType:
    """The kernels of each of them, on the GPU if there is one."""
    return registry()[runs_here(request.param)].kernels


@pytest.fixture
def emulated(runs_here) -> None:
    """The CUDA kernels run in the emulator."""
    runs_here("cuda", on_cpu=True)


@pytest.fixture
def interpreted(runs_here) -> None:
    """The Triton kernels run in Triton's interpreter."""
    runs_here("triton", on_cpu=True)


@pytest.fixture
def reduced(backend, request) -> str:
    """A precision of the backend, see `support.backends.every_precision`; skips where it has it not, in its words."""
    policy = make_policy()
    chain = chain_of(policy, policy.step_table(), precision=request.param)
    if (reason := registry()[backend].check(chain)) is not None:
        # Of a CPU's instructions it depends which precisions there are; a GPU's backend has all of them.
        (pytest.skip if entry(backend).variants else pytest.fail)(f"{backend}: {reason}")
    return request.param


@pytest.fixture
def tiles_of_16_rows(backend):
    """Rows are cut into those, always."""
    with entry(backend).tiles_of_16_rows():
        yield


@pytest.fixture
def poisoned():
    """torch fills what it allocates with NaN, as its deterministic mode does: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        # ... and every bit pattern of bytes is one
        assert torch.empty(3).isnan().all() and torch.empty(8, dtype=torch.uint8).view(torch.float32).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
