"""What became of the extensions `_native` (CPU) and `_cuda` of dql.kernels when they were built: the sentences, and the
record beside each.

setup.py writes the record, this module reads it, so both agree on its name and on what counts as a source. setup.py
loads this file by its path, before anything is installed: it imports nothing but the standard library.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class NotBuilt(Exception):
    """Why there is no extension: the cause, what mends it, and the compiler's output if there is any."""

    def __init__(self, cause: str, remedy: str, log: str = "") -> None:
        super().__init__(cause)
        self.cause, self.remedy, self.log = cause, remedy, log


@dataclass(frozen=True)
class Extension:
    """One of the two, by its module's name."""

    name: str

    @property
    def record(self) -> str:
        """Beside the extension: what was built, or why nothing was."""
        return f"{self.name}_build.json"

    @property
    def log(self) -> str:
        """Beside it after a failed compile: the compiler's whole output."""
        return f"{self.name}_build.log"

    @property
    def file(self) -> str:
        return f"{self.name}.abi3.so"


NATIVE, CUDA, EMULATED = Extension("_native"), Extension("_cuda"), Extension("_cuda_emulated")
VARIANTS = ("avx512bf16", "avx512", "avx2", "generic")  # fastest first

_HERE = Path(__file__).resolve().parent  # in a checkout dql/kernels is a link to this folder
_CHECKOUT = _HERE.parent  # of an editable installation; otherwise the installed package dql


def remedy(in_place: bool) -> str:
    """The command that builds the extension anew: in a checkout, or where dql was installed as a wheel."""
    if in_place:
        return "run pip install -e . again"
    # a plain second install would find the version present, or the wheel without the extension in pip's cache
    return "install dql again with pip install --force-reinstall --no-deps --no-cache-dir"


def again() -> str:
    """`remedy` for this copy of dql."""
    return remedy(_is_checkout())


def fingerprint(csrc: Path, of: Extension = NATIVE) -> str:
    """A digest of every file that the extension is compiled from, by name and content; its tests are left out."""
    digest = hashlib.sha256()
    for path in compiled_files(csrc, of):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compiled_files(csrc: Path, of: Extension = NATIVE) -> list[Path]:
    """The sources and headers of the extension, sorted."""
    own, builder = (csrc / "cuda", "build_cuda.py") if of == CUDA else (csrc / "cpu", "build_cpu.py")
    found = [path for path in own.rglob("*") if path.suffix in (".cu", ".cpp", ".h")]
    shared = [csrc / name for name in ("arguments.h", "philox.h", "build_tools.py", builder)]
    return sorted([*found, *(path for path in shared if path.exists())])


def record(of: Extension = NATIVE) -> dict[str, Any] | None:
    """The record of the last build, or None where there is none or it is not one.

    Keys: built, reason (None or a sentence), compiler (its version or None), seconds, sources (`fingerprint`); of
    _native variants (names, fastest first) and left_out (variant -> why); of _cuda architectures ("80", ...) and
    resources (of each kernel and architecture, what ptxas said).
    """
    try:
        facts = json.loads((_HERE / of.record).read_text())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and "built" in facts else None


def reason(error: ImportError | None = None, of: Extension = NATIVE) -> str:
    """One sentence for an extension that cannot be imported: why, and what mends it.

    Args:
        error: what the import raised, used where the record says that the extension was built.
        of: which.
    """
    facts = record(of)
    if facts is None:
        return f"it was not built: this copy of dql holds no record of a build; {again()}"
    if not facts["built"]:
        return str(facts["reason"])
    if not (_HERE / of.file).exists():
        return f"it was built, but its file {of.file} is no longer in {_HERE}; {again()}"
    return f"it was built, but Python cannot load it ({_one_line(error)}); {again()}"


def outdated(of: Extension = NATIVE) -> str | None:
    """None, or one sentence: the extension was compiled from other sources than this checkout holds now."""
    facts = record(of)
    if facts is None or not facts["built"] or not _is_checkout():
        return None
    if facts.get("sources") == fingerprint(_CHECKOUT / "csrc", of):
        return None
    return f"the sources in csrc/ have changed since it was built; {remedy(in_place=True)}"


def _is_checkout() -> bool:
    return (_CHECKOUT / "setup.py").exists()


def _one_line(error: ImportError | None) -> str:
    return " ".join(str(error).split()) if error is not None else "it gave no reason"
