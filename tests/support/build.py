"""What the tests of setup.py share: a copy of the project to build, and an environment to build it in."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from support import ROOT

_TOLD = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "DQL_CUDA_ARCHS", "PYTHONPATH")
_TOLD += tuple(f"DQL_{what}_{which}" for what in ("REQUIRE", "NO") for which in ("NATIVE", "CUDA"))


def compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


needs_compiler = pytest.mark.skipif(
    compiler() is None, reason="no C++ compiler was found; install one (on Debian or Ubuntu: apt install g++)"
)


def clean_environment(folder: Path) -> dict[str, str]:
    """That of a build: nothing that the caller's own build was told, and a setuptools that is new enough.

    Args:
        folder: for such a setuptools, if need be.
    """
    clean = {name: value for name, value in os.environ.items() if name not in _TOLD}
    if importlib.util.find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < 77:
        install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), "setuptools>=77"]
        subprocess.run(install, check=True)
        clean["PYTHONPATH"] = str(folder)
    return clean


class Project:
    """A copy of the project in a folder of its own, without sources in csrc/; `name` is the extension in question."""

    def __init__(self, folder: Path, tools: dict[str, str], name: str) -> None:
        self.folder, self.tools, self.name = folder, tools, name
        self.kernels, self.csrc, self.cpu = folder / "kernels", folder / "csrc", folder / "csrc" / "cpu"
        self.extension = self.kernels / f"{name}.abi3.so"
        folder.mkdir(exist_ok=True)
        ignore = shutil.ignore_patterns("_native*", "_cuda*", "__pycache__")
        for part in ("dql", "kernels"):
            shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=ignore)
        for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / part, folder)
        self.csrc.mkdir(exist_ok=True)
        for path in (ROOT / "csrc").glob("build_*.py"):
            shutil.copy(path, self.csrc)

    def with_real_sources(self) -> "Project":
        """The checkout's, and its objects as far as they are up to date."""
        shutil.copytree(ROOT / "csrc", self.csrc, dirs_exist_ok=True)
        for temp in (ROOT / "build").glob("temp.*"):
            shutil.copytree(temp, self.folder / "build" / temp.name, ignore=shutil.ignore_patterns("*.tmp", "*.so"))
        return self

    def call(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments]
        environment = self.tools | environment
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def build(self, **environment: str) -> dict:
        """Builds in place, which must not fail, and reads the record."""
        done = self.call("setup.py", "build_ext", "--inplace", **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.record()

    def record(self) -> dict:
        return json.loads((self.kernels / f"{self.name}_build.json").read_text())

    def log(self) -> Path:
        return self.kernels / f"{self.name}_build.log"

    def objects(self, folder: str) -> dict[str, int]:
        """The objects with their times."""
        return {path.name: path.stat().st_mtime_ns for path in self.folder.glob(f"build/temp.*/{folder}/*.o")}

    def build_record(self) -> ModuleType:
        """The copy's kernels/build_record.py."""
        return load(self.kernels / "build_record.py", "build_record")


def load(path: Path, name: str) -> ModuleType:
    """The module in a file, without the package that it belongs to."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def symbols(*arguments: str) -> list[tuple[str, str]]:
    """(type, name) of every symbol that a file defines."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm was not found; install it (on Debian or Ubuntu: apt install binutils)")
    output = subprocess.run([nm, *arguments, "--defined-only"], capture_output=True, text=True, check=True).stdout
    return [(line.split()[-2], line.split()[-1]) for line in output.splitlines() if len(line.split()) >= 2]
