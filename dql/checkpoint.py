"""Files that survive: tensors as safetensors (loading runs no code), written atomically."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dql.files import check_regular
from dql.shown import shown

FILE = "agent.safetensors"  # of an agent, in a checkpoint's folder
_ABOUT = {"kind", "format", "state_dim", "action_dim", "step", "config", "digest"}  # of policies and agents
UNFINISHED = ".unfinished"  # how the names of temporary files and folders end


class CheckpointError(RuntimeError):
    """A file that could not be written or read; the message says which, why, and what to do."""


def explain(path: Path, error: OSError) -> CheckpointError:
    """The sentence for a write that failed."""
    if error.errno == errno.ELOOP:
        return CheckpointError(f"cannot write {path}: it is a symbolic link; put the file itself there, or remove it")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CheckpointError(
            f"cannot write {path}: {error.strerror}; what was there before is untouched; free some space"
        )
    return CheckpointError(f"cannot write {path}: {error.strerror or error}; choose a folder that you may write to")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` to a temporary file beside `path`, flushes it to the disk, and renames it into place.

    Raises:
        CheckpointError: no space, no permission; the old file, if any, is untouched.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
    except OSError as error:
        raise explain(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explain(path, error) from error
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Writes tensors and a JSON description (in the file's header) as one safetensors file, atomically.

    The description in the file holds a digest of both as well, which `load_tensors` checks.

    Raises:
        CheckpointError: it cannot be written.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    described = json.dumps(about | {"digest": _digest(plain, about)})
    write_atomically(path, save(plain, metadata={"dql": described}))  # one entry: safetensors shuffles several


def _digest(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> str:
    """BLAKE2b of the description and of every tensor's name, type, shape and bytes."""
    whole = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote: (tensors on the CPU, description).

    Raises:
        CheckpointError: missing, not readable, damaged, or not written by dql.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.suffix in (".pth", ".pt"):
        raise CheckpointError(
            f"{path} is a pickle; for the authors' files use from_published(torch.load({str(path)!r}))"
        )
    try:
        check_regular(path)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise CheckpointError(f"{path} is no regular file; give the path of the .safetensors file") from error
        if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
            what = "is a folder" if isinstance(error, IsADirectoryError) else "does not exist"
            raise CheckpointError(f"{path} {what}; give the path of the .safetensors file") from error
        raise unreadable(path, error) from error
    except ValueError as error:  # a zero byte
        raise CheckpointError(f"{str(path)!r} is no path ({error}); give the path of the .safetensors file") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        about = json.loads(metadata["dql"]) if "dql" in metadata else None
        if isinstance(about, dict):
            _check_digest(tensors, about, sorted(metadata))
    except OSError as error:
        raise unreadable(path, error) from error
    except (SafetensorError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({reason}); take another checkpoint of the run"
        ) from error
    if not isinstance(about, dict):
        raise CheckpointError(
            f"{path} was not written by dql; for the authors' .pth files use DiffusionPolicy.from_published"
        )
    return tensors, about


def digest_in(path: Path) -> str | None:
    """The digest that `save_tensors` wrote into the file; None of a file without one."""
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            return str(json.loads((file.metadata() or {})["dql"])["digest"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _check_digest(tensors: dict[str, torch.Tensor], about: dict[str, Any], entries: list[str]) -> None:
    """Takes the digest out of the description; files of earlier versions have none.

    Raises:
        ValueError: the file is not as it was written. A name that nobody writes may be the digest's own, damaged.
    """
    if unknown := [*sorted(about.keys() - _ABOUT), *(name for name in entries if name != "dql")]:
        raise ValueError(f"its header holds {unknown[0]!r}")
    digest = about.pop("digest", None)
    if digest is not None and digest != _digest(tensors, about):
        raise ValueError("its content is not what was written: the digest differs")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The sentence for a file that is there and cannot be read, which says nothing of what it holds."""
    remedy = "make it readable for this user" if isinstance(error, PermissionError) else "mend that and try again"
    return CheckpointError(f"cannot read {path}: {error.strerror or error}; {remedy}")


def checked_device(device: torch.device | str) -> torch.device:
    """The device, known to be there.

    Raises:
        ValueError: it is not; the sentence names it and torch's reason.
    """
    try:
        torch.empty(0, device=device)
        if device is None:
            raise TypeError("None is no device")
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device {shown(device)} cannot be used ({reason}); use 'cpu' (--device cpu)") from error
    return torch.device(device)


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], about: dict[str, Any], known_format: int) -> Iterator[None]:
    """Building an object from what a file holds: whatever does not fit is a CheckpointError that names the file."""
    if about.get("format") != known_format:
        raise CheckpointError(
            f"{path} has format {about.get('format')!r}, this version of dql reads {known_format}; "
            "read it with the version that wrote it"
        )
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged: {reason}; take another checkpoint of the run") from error


def replace_folder(folder: Path, target: Path) -> None:
    """Renames a finished folder to `target`, dropping what stood there; at no moment is half a folder there."""
    doomed = None
    if target.exists():
        doomed = target.with_name(f".{target.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(target, doomed)
    os.rename(folder, target)
    _flush_folder(target.parent)
    if doomed is not None:
        shutil.rmtree(doomed, ignore_errors=True)
