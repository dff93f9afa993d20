"""The package's layout, and the builds of its extensions `dql.kernels._native` (C++) and `dql.kernels._cuda`.

The folder kernels/ is installed as dql.kernels, never as a top-level module. In a checkout dql/kernels is a link to it,
so that an editable installation needs no more than the checkout on Python's path, which type checkers and editors see,
too. The extensions are optional: without a compiler the installation succeeds, and a record beside each says in one
sentence what was missing. csrc/build_cpu.py and csrc/build_cuda.py tell how they are compiled, and what else is heeded.

    DQL_REQUIRE_NATIVE=1, DQL_REQUIRE_CUDA=1    the build fails if that extension cannot be built
    DQL_NO_NATIVE=1, DQL_NO_CUDA=1              it is not built
"""

import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def _loaded(path: Path) -> ModuleType:
    """A module by its file, as whoever imports its name finds it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


for _name in ("build_tools", "build_cpu", "build_cuda"):
    sys.modules.pop(_name, None)  # a process that runs this file twice has another NotBuilt the second time
build_record = _loaded(ROOT / "kernels" / "build_record.py")
NATIVE, CUDA, EMULATED, NotBuilt = (getattr(build_record, name) for name in ("NATIVE", "CUDA", "EMULATED", "NotBuilt"))


_loading = threading.Lock()


def _builder(name: str) -> ModuleType:
    """csrc/build_NAME.py.

    Raises:
        NotBuilt: it is not there.
    """
    paths = [ROOT / "csrc" / f"build_{part}.py" for part in ("tools", name)]
    if not all(path.exists() for path in paths):
        raise NotBuilt("the folder csrc/ with its sources is missing", "get the whole of dql")
    with _loading:  # two threads ask
        return [sys.modules.get(path.stem) or _loaded(path) for path in paths][-1]


class BuildExtensions(build_ext):
    """Compiles csrc/ with the compilers at hand."""

    def run(self) -> None:
        """Builds the extensions into build_lib, and into kernels/ for an editable installation; leaves their records.

        Raises:
            CompileError: one could not be built, and DQL_REQUIRE_NATIVE or DQL_REQUIRE_CUDA asks for it.
        """
        native: dict[str, Any] = {"variants": [], "left_out": {}}
        cuda: dict[str, Any] = {"architectures": [], "because": None, "resources": []}
        with ThreadPoolExecutor(2) as pool:  # side by side: each has times when one core alone is busy
            done = [
                pool.submit(self._one, NATIVE, native, "NATIVE", "cpu"),
                pool.submit(self._one, CUDA, cuda, "CUDA", "cuda"),
            ]
        for extension in done:
            extension.result()

    def _one(self, extension: Any, more: dict[str, Any], variable: str, builder: str) -> None:
        started = time.perf_counter()
        facts: dict[str, Any] = {"built": False, "reason": None, "compiler": None} | more
        # before: an edit during the build makes it outdated
        facts["sources"] = build_record.fingerprint(ROOT / "csrc", extension)
        in_place, log, name = bool(self.inplace), "", f"the extension dql.kernels.{extension.name}"
        required, refused = _is_set(f"DQL_REQUIRE_{variable}"), _is_set(f"DQL_NO_{variable}")
        if required and refused:
            raise CompileError(f"DQL_REQUIRE_{variable} and DQL_NO_{variable} contradict each other; unset one")
        target = Path(self.build_lib, "dql", "kernels", extension.file)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if refused:
                raise NotBuilt(f"DQL_NO_{variable} was set when dql was installed", "unset it")
            tools = _builder(builder)
            shop = tools.Workshop(extension, self._objects() / builder, self._workers(), bool(self.force))
            tools.build(shop, target, facts)
            facts["built"] = True
        except NotBuilt as error:
            facts["reason"] = f"it was not built: {error.cause}; {error.remedy} and {build_record.remedy(in_place)}"
            log = error.log
        except OSError as error:
            facts["reason"] = f"it was not built: {error}; mend that and {build_record.remedy(in_place)}"
        facts["seconds"] = round(time.perf_counter() - started, 1)
        for folder in [target.parent] + ([ROOT / "kernels"] if in_place else []):
            self._leave(extension, target, folder, facts, log)
        if facts["built"]:
            made = ", ".join(facts.get("variants") or [f"sm_{arch}" for arch in facts["architectures"]])
            print(f"dql.kernels.{extension.name}: {made} by {facts['compiler']} in {facts['seconds']} s")
        elif required:
            raise CompileError(f"{name}: {facts['reason']}\n{log}")
        else:
            self.warn(f"{name}: {facts['reason']}\n{log}")

    def _leave(self, extension: Any, built: Path, folder: Path, facts: dict[str, Any], log: str) -> None:
        """Puts the extension and its record into a folder, and takes away what an earlier build left there."""
        file = folder / extension.file
        if not facts["built"]:
            file.unlink(missing_ok=True)  # or it would be imported silently in place of the one that failed
        elif file != built:
            new = file.with_suffix(".new")
            shutil.copy2(built, new)
            new.replace(file)  # a process that runs the old one keeps it
        (folder / extension.record).write_text(json.dumps(facts, indent=2) + "\n")
        if log:
            (folder / extension.log).write_text(log)
        else:
            (folder / extension.log).unlink(missing_ok=True)

    def _objects(self) -> Path:
        # an editable installation gets a temporary build_temp; its objects must outlive it
        kept = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        return Path(kept if self.editable_mode else self.build_temp)

    def _workers(self) -> int:
        return self.parallel if isinstance(self.parallel, int) else _cores()

    def get_outputs(self) -> list[str]:
        """The files in build_lib, those that are there."""
        folder = Path(self.build_lib, "dql", "kernels")
        names = [name for one in (NATIVE, CUDA) for name in (one.file, one.record, one.log)]
        return [str(folder / name) for name in names if (folder / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Where each file in build_lib comes from in the checkout, for an editable installation."""
        if not self.inplace:
            return {}
        return {path: str(Path("kernels", Path(path).name)) for path in self.get_outputs()}


class EditableWheel(editable_wheel):
    """An editable installation as a path entry where the link dql/kernels is there; setuptools' own way is an import
    hook, which type checkers do not see and which a folder called dql in the working folder hides."""

    def finalize_options(self) -> None:
        """Lays the packages out as the checkout has them."""
        if (ROOT / "dql" / "kernels" / "__init__.py").is_file():
            self.distribution.package_dir = {"": "."}
        super().finalize_options()


class BuildCudaEmulator(Command):
    """For tests: the CUDA kernels for this machine's CPU, `dql.kernels._cuda_emulated`, into kernels/."""

    description = "compile the CUDA kernels with the C++ compiler, on the emulator, for tests"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """There are none."""

    def finalize_options(self) -> None:
        """There are none."""

    def run(self) -> None:
        """Builds it in place.

        Raises:
            CompileError: it could not be built.
        """
        temp = Path(f"build/emulator.{sys.implementation.cache_tag}")
        try:
            builder = _builder("cuda")
            builder.build_emulated(builder.Workshop(EMULATED, temp, _cores()), Path("kernels", EMULATED.file))
        except NotBuilt as error:
            print(error.log)
            remedy = "its whole output is above" if error.log else error.remedy
            raise CompileError(f"the emulated CUDA kernels were not built: {error.cause}; {remedy}") from None


def _is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


version = re.search(r'^__version__ = "(.+)"$', (ROOT / "dql" / "__init__.py").read_text(), re.M)
assert version is not None, "dql/__init__.py states no __version__"

# one wheel for CPython 3.11 and later; free-threaded ones have no limited API
limited = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp311"}}

# those of the folder kernels/ are dql.kernels
INSIDE = {path.parent.name for path in (ROOT / "dql").glob("*/__init__.py")} | {"behaviours", "kernels"}
PACKAGES = ["dql", *(f"dql.{name}" for name in sorted(INSIDE))]
PACKAGES += [f"dql.kernels.{path.parent.name}" for path in sorted((ROOT / "kernels").glob("*/__init__.py"))]

setup(
    version=version[1],
    packages=PACKAGES,
    package_dir={"dql": "dql", "dql.kernels": "kernels"},
    package_data={"dql": ["py.typed"], "dql.behaviours": ["*.npz", "*.md"]},
    ext_modules=[
        Extension(
            "dql.kernels._native",
            sources=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtensions, "editable_wheel": EditableWheel, "build_cuda_emulator": BuildCudaEmulator},
    options=limited,
)
