"""The sdist and the wheel, built for real, installed elsewhere and imported from there."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from support import ROOT

import dql

IGNORED = (".*", "venv", "env", "build", "dist", "runs", "*.egg-info", "__pycache__")
LEFT_BEHIND = tuple(
    f"{name}{end}" for name in ("_native", "_cuda") for end in (".abi3.so", "_build.json", "_build.log")
)
LEFT_BEHIND += ("_cuda_emulated.abi3.so",)


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def can_build_without_isolation() -> bool:
    return importlib.util.find_spec("setuptools") is not None and int(version("setuptools").split(".")[0]) >= 77


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Builds the sdist from a copy of the sources, and the wheel from the sdist alone."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "sources", symlinks=True, ignore=shutil.ignore_patterns(*IGNORED))
    for name in LEFT_BEHIND:  # of an editable installation: no concern of the sdist, and not what the wheel gets
        (folder / "sources" / "kernels" / name).write_text("left behind")
    isolation = ["--no-isolation"] if can_build_without_isolation() else []
    run(
        sys.executable,
        "-m",
        "build",
        *isolation,
        "--outdir",
        str(folder / "dist"),
        ".",
        cwd=folder / "sources",
        DQL_NO_CUDA="1",  # minutes of nvcc: tests/packaging/test_build_cuda.py
        DQL_REQUIRE_CUDA="0",  # whatever the caller's own build was told
    )
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(dist) -> set[str]:
    """The names in the sdist, without their common folder."""
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def info_folder() -> str:
    return f"diffusion_ql-{dql.__version__}.dist-info"


def sources(folder: str, pattern: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern)}


def test_the_wheel_holds_dql_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = info_folder()
    assert {name.split("/")[0] for name in names} == {"dql", info}
    assert wheel.name.startswith(f"diffusion_ql-{dql.__version__}-")
    wanted = sources("dql", "*.py") | sources("dql/behaviours", "*.npz") | sources("dql/behaviours", "*.py")
    wanted |= {f"dql/{name}" for name in sources("kernels", "*.py")}
    assert not wanted - names, f"missing: {sorted(wanted - names)}"
    assert {"dql/kernels/__init__.py", "dql/kernels/reference.py", "dql/behaviours/hopper-0.npz"} <= names
    assert "dql/py.typed" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "bench/", "csrc/"))]
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".o"))]
    assert not [name for name in names if "__pycache__" in name]
    assert any(name.startswith(f"{info}/") and name.endswith("LICENSE") for name in names)


def test_the_wheel_holds_the_extension_for_every_later_python(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read("dql/kernels/_native_build.json"))
        tags = re.findall(r"^Tag: (.+)$", archive.read(f"{info_folder()}/WHEEL").decode(), re.M)
    assert ("dql/kernels/_native.abi3.so" in names) == record["built"]
    assert ("dql/kernels/_native_build.log" in names) == bool(not record["built"] and record["compiler"])
    if shutil.which("g++"):
        assert record["built"], record["reason"]
    assert "dql/kernels/_cuda.abi3.so" not in names
    with zipfile.ZipFile(wheel) as archive:
        said = json.loads(archive.read("dql/kernels/_cuda_build.json"))["reason"]
    assert said.startswith(
        "it was not built: DQL_NO_CUDA was set when dql was installed; unset it and install dql again"
    )
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert tags == [f"cp311-abi3-{platform}"]
    assert wheel.name.endswith(f"-cp311-abi3-{platform}.whl")


def test_the_wheel_describes_itself(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{info_folder()}/METADATA").decode()
        entry_points = archive.read(f"{info_folder()}/entry_points.txt").decode()
    assert re.search(r"^Name: diffusion-ql$", metadata, re.M)
    assert re.search(r"^Requires-Python: >=3\.11$", metadata, re.M)
    for extra in ("mujoco", "bench", "test", "dev"):
        assert re.search(rf"^Provides-Extra: {extra}$", metadata, re.M)
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M)
    assert {"torch", "numpy", "safetensors", "gymnasium", "minari", "pillow"} <= {name.lower() for name in required}
    assert "mujoco" not in required  # heavy: an extra
    assert "dql = dql.cli:main" in entry_points


def test_the_sdist_holds_all_that_building_needs(sdist):
    wanted = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "dql/__init__.py", "dql/py.typed"}
    wanted |= sources("kernels", "*.py") | sources("dql", "*.py") | sources("dql/behaviours", "*.npz")
    wanted |= {name for name in sources("csrc", "**/*") if name.endswith((".cpp", ".h", ".cu", ".py"))}
    assert not wanted - sdist, f"missing: {sorted(wanted - sdist)}"
    assert {"csrc/cpu/variant.cpp", "csrc/build_cuda.py", "csrc/cuda/prologue.cu"} <= sdist
    assert any(name.startswith("csrc/tests/") for name in sdist)
    assert not [name for name in sdist if name.startswith("dql/kernels")]  # a link in a checkout; here once is enough
    assert not [name for name in sdist if "__pycache__" in name or name.endswith(LEFT_BEHIND)]


def test_the_sdist_holds_all_tests_or_none(sdist):
    """setuptools takes tests/test_*.py by itself; without the modules they import they cannot run."""
    if any(name.startswith("tests/test_") for name in sdist):
        wanted = sources("tests", "*.py") | sources("bench", "*.py")
        assert not wanted - sdist, f"missing: {sorted(wanted - sdist)}; graft tests and bench in MANIFEST.in"


def test_the_installed_wheel_imports_and_samples(wheel, tmp_path):
    """Installed by itself, without the dependencies, which are here; run in another folder, not from the checkout."""
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target"]
    run(sys.executable, "-m", "pip", *install, str(target), str(wheel), cwd=elsewhere)
    top = {path.name for path in target.iterdir()} - {"bin"}
    assert top == {"dql", info_folder()}
    code = """
import importlib.resources
import dql, dql.kernels.reference, dql.kernels.layout, torch
print(dql.__file__, dql.kernels.reference.__file__, sep="\\n")
print(sum(p.name.endswith(".npz") for p in importlib.resources.files("dql.behaviours").iterdir()))
print(tuple(dql.sample(torch.zeros(2, 3), dql.DiffusionPolicy(3, 2, hidden_dim=16), seed=0).shape))
try:
    import dql.kernels._native as native
    print(native.__file__)
except ImportError as error:
    from dql.kernels import build_record
    print(build_record.reason(error))
"""
    output = run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(target)).splitlines()
    assert output[0] == str(target / "dql" / "__init__.py")
    assert output[1] == str(target / "dql" / "kernels" / "reference.py")
    assert int(output[2]) == len(sources("dql/behaviours", "*.npz")) > 0
    assert output[3] == "(2, 2)"
    extension = target / "dql" / "kernels" / "_native.abi3.so"
    if extension.exists():
        assert output[4] == str(extension)
    else:
        assert output[4].startswith("it was not built: ")
