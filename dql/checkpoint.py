"""Files that survive: tensors as safetensors (loading runs no code), written atomically."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FILE = "agent.safetensors"  # of an agent, in a checkpoint's folder
UNFINISHED = ".unfinished"  # how the names of temporary files and folders end


class CheckpointError(RuntimeError):
    """A file that could not be written or read; the message says which, why, and what to do."""


def explain(path: Path, error: OSError) -> CheckpointError:
    """The sentence for a write that failed."""
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
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
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

    Raises:
        CheckpointError: it cannot be written.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(plain, metadata={"dql": json.dumps(about)}))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote: (tensors on the CPU, description).

    Raises:
        CheckpointError: missing, damaged, or not written by dql.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.suffix in (".pth", ".pt"):
        raise CheckpointError(
            f"{path} is a pickle; for the authors' files use from_published(torch.load({str(path)!r}))"
        )
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {kind}; give the path of the .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        about = json.loads(metadata["dql"]) if "dql" in metadata else None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}); take another checkpoint of the run"
        ) from error
    if not isinstance(about, dict):
        raise CheckpointError(
            f"{path} was not written by dql; for the authors' .pth files use DiffusionPolicy.from_published"
        )
    return tensors, about


def checked_device(device: torch.device | str) -> torch.device:
    """The device, known to be there.

    Raises:
        ValueError: it is not; the sentence names it and torch's reason.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device {str(device)!r} cannot be used ({reason}); use 'cpu' (--device cpu)") from error
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
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
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
