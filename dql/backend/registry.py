"""The registry of backends: who can run the reverse chain, and if not, why not and what mends it."""

from dql.backend.base import Backend, BackendUnavailable, Chain
from dql.backend.cpp import CppBackend
from dql.backend.eager import EagerBackend
from dql.backend.gpu import CUDA, TRITON, GpuBackend
from dql.shown import shown

_REGISTRY: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Adds a backend. "auto" takes the first that can run the problem, in the order of registration."""
    global _REGISTRY
    _REGISTRY = {**_REGISTRY, backend.name: backend}  # another object: who remembers the old one notices


def registry() -> dict[str, Backend]:
    """The backends by name, in the order of "auto"."""
    return _REGISTRY


def of_gpus() -> list[str]:
    """Those whose kernels are a GPU's, in the order of "auto"."""
    return [name for name, backend in _REGISTRY.items() if isinstance(backend, GpuBackend)]


def backends() -> dict[str, str | None]:
    """Every backend with None if it can run here, else one sentence: the reason and what mends it."""
    return {name: backend.check() for name, backend in _REGISTRY.items()}


def check_name(name: str) -> None:
    """Refuses a backend that does not exist.

    Raises:
        ValueError: naming those that do.
        TypeError: the name is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"a backend is named by a string, got {shown(name)}; use one of: auto, {', '.join(_REGISTRY)}")
    if name != "auto" and name not in _REGISTRY:
        raise ValueError(f"unknown backend {shown(name)}; this version of dql has: auto, {', '.join(_REGISTRY)}")


def pick(name: str, chain: Chain) -> Backend:
    """The backend that runs `chain`: the named one, never another; for "auto" the first that can.

    Raises:
        ValueError: no backend of that name exists.
        BackendUnavailable: it cannot run this problem here.
    """
    if not isinstance(name, str):
        check_name(name)
    if name == "auto":
        for backend in _REGISTRY.values():
            if backend.check(chain) is None and backend.only_by_name() is None:
                return backend
        reasons = "; ".join(f"{b.name}: {b.check(chain) or b.only_by_name()}" for b in _REGISTRY.values())
        raise BackendUnavailable(f"no backend can run this problem: {reasons}")
    check_name(name)
    backend = _REGISTRY[name]
    reason = backend.check(chain)
    if reason is not None:
        able = [b.name for b in _REGISTRY.values() if b.check(chain) is None]
        raise BackendUnavailable(
            f"backend {name!r} cannot run this: {reason} (able to: {', '.join(able) or 'no backend'})"
        )
    return backend


# In the order of "auto". `cpp` takes policies on the CPU alone; on a GPU `cuda` comes before `triton`: what an H200 was
# seen to be faster with `triton` at (docs/gpu.md) has other kernels in `cuda` since, which are yet to be measured.
for _backend in (CppBackend(), CUDA, TRITON, EagerBackend()):
    register(_backend)
