"""The CUDA extension `dql.kernels._cuda`: loading it, why it cannot be used, and networks as it wants them.

With DQL_CUDA_EMULATE=1 the same kernels run in an emulator on CPU tensors, slowly: for tests. The twin that does that
is compiled by `python setup.py build_cuda_emulator`.

Importing this module loads nothing.
"""

import os
import struct
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType

import torch

from .. import build_record
from ..build_record import CUDA
from ..layout import ACTIVATIONS, CriticSpec, DenoiserSpec, hidden_names

PRECISIONS = ("fp32", "tf32", "bf16")  # shapes.h numbers them in this order
_ADDRESSES = "dql.kernels._cuda"


def emulating() -> bool:
    """Whether the kernels run in the emulator (DQL_CUDA_EMULATE=1)."""
    return os.environ.get("DQL_CUDA_EMULATE", "0").lower() in ("1", "true", "on", "yes")


@cache
def load(emulated: bool) -> ModuleType:
    """The extension, or its emulated twin.

    Raises:
        ImportError: it cannot be imported; see `unavailable`.
    """
    return import_module(_ADDRESSES + ("_emulated" if emulated else ""))


def module() -> ModuleType:
    """The one in use, see `load`."""
    return load(emulating())


def unavailable(ordinal: int | None = None) -> str | None:
    """None if the kernels can run here, else one sentence: the reason and what mends it.

    Args:
        ordinal: the GPU that is to run them; None: the current one.
    """
    if emulating():
        return _no_emulator()
    return _not_loaded() or _no_device(ordinal)


def _no_emulator() -> str | None:
    try:  # again each time: tests compile it on their way
        load(True)
    except ImportError:
        return "DQL_CUDA_EMULATE=1 needs the emulated kernels; run python setup.py build_cuda_emulator, or unset it"
    return None


@cache
def _not_loaded() -> str | None:
    try:
        load(False)
    except ImportError as error:
        return f"the CUDA extension cannot be used: {build_record.reason(error, CUDA)}"
    return None


def _no_device(ordinal: int | None = None) -> str | None:
    driver, runtime = versions()
    if driver == 0:
        return "there is no NVIDIA driver here; see `dql doctor`"
    if driver // 1000 < runtime // 1000:  # within a major version an older driver will do
        told = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime))
        return "the driver is for CUDA {} and the extension was built with {}; install a newer driver".format(*told)
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False; see `dql doctor`"
    try:
        return cannot_run(torch.cuda.current_device() if ordinal is None else ordinal)
    except RuntimeError as error:  # no memory, or an earlier kernel's fault: the next call may fare better
        return f"the GPU did not answer ({error}); free its memory, or start this process anew"


@cache
def versions() -> tuple[int, int]:
    """(the driver's or 0, the runtime's that the extension holds), as 13000 for 13.0."""
    driver, runtime = load(False).versions()
    return driver, runtime


@cache
def cannot_run(ordinal: int) -> str | None:
    """None, or why the extension has no code for this device: what lasts, and so is asked once.

    Raises:
        RuntimeError: CUDA reported something that need not last.
    """
    capability = load(False).device(ordinal)[0]
    if capability < 80:
        return f"it needs compute capability 8.0 or more, and this GPU has {capability / 10}; use backend='eager'"
    told = load(False).cannot_run(ordinal)
    if told is None:
        return None
    built = (build_record.record(CUDA) or {}).get("architectures") or []
    names = ", ".join(f"sm_{name}" for name in built) or "unknown GPUs"
    wanted = ";".join([*built, str(capability)])
    return (
        f"the extension was built for {names} and this GPU is sm_{capability} ({told}); "
        f"set DQL_CUDA_ARCHS='{wanted}' and {build_record.again()}"
    )


@lru_cache(maxsize=8)
def facts(ordinal: int, emulated: bool) -> tuple[int, int, int, bool]:
    """(compute capability, multiprocessors, bytes of shared memory a block, whether tiles of 128 rows can run).

    The capability is that of the code which runs there, if that was compiled for less than the device has.
    """
    capability, multiprocessors, shared = load(emulated).device(ordinal)
    compiled = load(emulated).compiled_for(ordinal)
    return min(capability, compiled), multiprocessors, shared, load(emulated).can_run_wide(ordinal)


@lru_cache(maxsize=256)
def mlp(spec: DenoiserSpec | CriticSpec, emulated: bool) -> object:
    """The network as the kernels see it: sizes, and where its tensors lie in the flat buffer."""
    slots = {slot.name: slot.offset for slot in spec.layout.slots}
    S, A, H, L = spec.state_dim, spec.action_dim, spec.hidden_dim, spec.num_hidden
    if isinstance(spec, DenoiserSpec):
        D, outputs, networks, apart = spec.time_dim, A, 1, 0
        layers = [*hidden_names(L), "final_layer"]
        columns = (0, A, A + D)  # of action, time, state
        time = tuple(slots[f"time_mlp.{i}.{part}"] for i in (1, 3) for part in ("weight", "bias"))
    else:
        D, outputs, networks = 0, 1, 2
        layers = [f"q1_model.{2 * i}" for i in range(L + 1)]
        apart = slots["q2_model.0.weight"] - slots["q1_model.0.weight"]
        columns, time = (S, 0, 0), (0, 0, 0, 0)
    weights, biases = ([slots[f"{name}.{part}"] for name in layers] for part in ("weight", "bias"))
    activation = ACTIVATIONS.index(spec.activation)
    return load(emulated).mlp(
        S, A, D, H, L, outputs, activation, networks, spec.layout.size, apart, S + A + D, *columns,
        weights[0], biases[0], tuple(weights[1:L]), tuple(biases[1:L]), weights[L], biases[L], time,
    )  # fmt: skip


class Call:
    """What a launch is told: numbers of 8 bytes in a row, named by csrc/cuda/calls.h.

    The first of them, `moving`, change from call to call; the others may be packed once.
    """

    def __init__(self, fields: str) -> None:
        parts = [[field.split() for field in part.split(";") if field] for part in fields.split("|")]
        (self.moving, moving), (self.fixed, fixed) = [
            ([name for _, name in part], struct.Struct("=" + "".join(_CODES[kind] for kind, _ in part)))
            for part in parts
        ]
        self.move, self._fix = moving.pack, fixed.pack

    def fix(self, **values: float) -> bytes:
        """The second part; what is not named is 0."""
        return self._fix(*_in_order(self.fixed, values))

    def pack(self, fixed: bytes, **moving: int) -> bytes:
        """Both parts; what is not named is 0. `move(*moving) + fixed` is the same, of all in their order."""
        return self.move(*_in_order(self.moving, moving)) + fixed


_CODES = {"address": "Q", "integer": "q", "real": "d"}


def _in_order(names: list[str], values: Mapping[str, float]) -> list[float]:
    assert values.keys() <= {*names}, f"{values.keys() - {*names}} are none of {names}"
    return [values.get(name, 0) for name in names]


@cache
def calls(emulated: bool) -> dict[str, Call]:
    """How each launch is told its numbers: prologue, chain, gradients, choose, noise."""
    return {name: Call(fields) for name, fields in load(emulated).fields().items()}
