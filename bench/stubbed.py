"""Backends for GPUs with everything as it is but the driver, which does nothing: what a call costs its host.

On a machine without a GPU tensors are on the CPU, and what asks torch.cuda is answered at once: of a GPU's host the
allocator of its memory, the look at the current device and stream and the driver are missing there.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dql
from dql.kernels.cuda import plan


def impossible(backend: str) -> str | None:
    """None if the backend's launches can be stubbed here, else why not."""
    if backend == "cuda":
        return None if torch.cuda.is_available() else _no_cuda()
    if backend != "triton":
        return f"nobody has stubbed the driver of backend {backend!r}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux only)"
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set: the interpreter launches nothing"
    with pytest.MonkeyPatch.context() as patch:
        try:
            _stub_driver(patch)
            _launcher()(1, 1, 1, 0, 0, b"", None, None, None)
        except (AttributeError, TypeError) as error:
            return f"this Triton's launcher wants more than the stub has ({error})"
    return None


def _stub_driver(patch: pytest.MonkeyPatch) -> None:
    """Where there is none: Triton 3.9's launcher looks at it before it needs it."""
    from triton.runtime import driver

    if not torch.cuda.is_available():
        patch.setattr(driver, "_active", SimpleNamespace(), raising=False)


def _no_cuda() -> str | None:
    from dql.kernels.cuda import binding

    try:  # it is asked for sizes; it launches nothing
        binding.load(True)
    except ImportError:
        return "it asks the emulated kernels for sizes: python setup.py build_cuda_emulator"
    return None


Launch = tuple[str, tuple[int, int, int], tuple[Any, ...]]
"""A kernel's name, its grid and its arguments; in the places of constants stands None."""


@contextlib.contextmanager
def driver(backend: str, policy: dql.DiffusionPolicy, launched: list[Launch] | None = None) -> Iterator[None]:
    """Inside, the backend's kernels are launched as ever by calls of this policy, but never reach the driver.

    Args:
        backend: "triton" or "cuda".
        policy: what was prepared for it is forgotten, before and after.
        launched: gets each launch that there would have been, which takes time.
    """
    stub = {"triton": _triton, "cuda": _cuda}[backend]
    with pytest.MonkeyPatch.context() as patch:
        try:
            _forget(policy)
            stub(patch, policy.device, launched)
            yield
        finally:
            _forget(policy)


def _forget(policy: dql.DiffusionPolicy) -> None:
    policy.kept.clear()
    policy.step_table().kept.clear()
    plan._chosen.cache_clear()  # what was chosen may be another device's
    if importlib.util.find_spec("triton") is None:
        return
    from dql.kernels.triton import chain, prologue

    chain.chain_fwd_kernel.cache_clear()
    prologue.prologue_kernel.cache_clear()


def _triton(patch: pytest.MonkeyPatch, device: torch.device, launched: list[Launch] | None) -> None:
    from dql.backend.gpu import TRITON
    from dql.kernels.triton import internals, launch

    def compile(kernel: launch.Kernel, arch: int) -> Any:
        def told(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            assert launched is not None
            launched.append((kernel.name, (x, y, z), rest[5:]))

        metadata = SimpleNamespace(name=kernel.name, num_warps=kernel.num_warps, shared=0, tmem_size=0)
        run = _launcher() if launched is None else told
        return SimpleNamespace(run=run, function=0, packed_metadata=b"", metadata=metadata)

    patch.setattr(launch.Kernel, "compile", compile)
    _stub_driver(patch)
    if device.type == "cpu":
        patch.setattr(TRITON, "stands_in", lambda: True)
        patch.setattr(TRITON, "unavailable", lambda ordinal=None: None)
        patch.setattr(launch, "_capability", lambda ordinal: 90)
        patch.setattr(internals, "current_device", lambda: 0)
        patch.setattr(internals, "current_stream", lambda device: 0)


def _cuda(patch: pytest.MonkeyPatch, device: torch.device, launched: list[Launch] | None) -> None:
    """Without the extension's own part of a launch, which is unpacking what it is told, and the driver's."""
    from dql.kernels.cuda import binding

    if device.type == "cpu":
        patch.setenv("DQL_CUDA_EMULATE", "1")
    real = binding.load(binding.emulating())
    stub = SimpleNamespace(**{name: getattr(real, name) for name in dir(real) if not name.startswith("_")})
    for name in ("prologue", "chain_forward"):

        def nothing(mlp: object, told: bytes, name: str = name) -> None:
            if launched is not None:
                launched.append((name, (0, 0, 0), (told,)))

        setattr(stub, name, nothing)
    if device.type == "cpu":  # what is chosen on an H200
        patch.setattr(binding, "facts", lambda ordinal, emulated: (90, 132, 227 * 1024, True))
        stub.max_clusters = lambda ordinal, mlp, precision, cluster, *rest: 132 // cluster
    patch.setattr(binding, "load", lambda emulated: stub)


def _launcher() -> Any:
    """Triton's own, whose last step does nothing."""
    from triton.backends.nvidia.driver import CudaLauncher

    launcher = object.__new__(CudaLauncher)  # its __init__ asks the driver
    sizes = ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align")
    flags = {"launch_cooperative_grid": False, "launch_pdl": False, "gsan_enabled": False}
    vars(launcher).update(dict.fromkeys(sizes, 0) | flags | {"arg_annotations": (), "kernel_signature": b""})
    launcher.num_ctas, launcher.launch = 1, lambda *_: None
    return launcher
