"""An editable installation as others see it: Python in the folder above the checkout, type checkers, editors.

The checkout is copied to a folder called dql, since that is what a clone is called; what it needs is here already.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import ROOT

USER = """
import torch, dql
from dql.kernels.layout import DenoiserSpec

policy = dql.DiffusionPolicy(state_dim=3, action_dim=2)
reveal_type(policy)
reveal_type(DenoiserSpec(3, 2, 64))
wrong: int = DenoiserSpec(3, 2, 64)


def of(critic: dql.TwinCritic, states: torch.Tensor) -> None:
    reveal_type(dql.select(states, policy, critic, details=True))
    chosen: torch.Tensor = dql.select(states, policy, critic)
    same: torch.Tensor = dql.select(states, policy, critic, details=False)
"""


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, Path]:
    """(the folder above a checkout called dql, a Python for which that is installed editable)."""
    if not has("setuptools"):
        pytest.skip("setuptools is not installed, which an installation without a network needs")
    if not (ROOT / "dql" / "kernels").is_symlink():
        pytest.skip("dql/kernels is no link here: this is no checkout, or its file system has none")
    above, site, venv = (tmp_path_factory.mktemp(name) for name in ("above", "site", "venv"))
    ignored = shutil.ignore_patterns(
        ".*", "venv", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "results"
    )
    shutil.copytree(ROOT, above / "dql", symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    pip += ["--disable-pip-version-check", "--target", str(site), "-e", str(above / "dql")]
    nothing = {
        f"DQL_{word}_{what}": value for word, value in (("NO", "1"), ("REQUIRE", "0")) for what in ("NATIVE", "CUDA")
    }
    done = subprocess.run(pip, capture_output=True, text=True, env=os.environ | nothing)
    assert done.returncode == 0, done.stderr
    (pth,) = site.glob("*.pth")
    assert pth.read_text().splitlines() == [str(above / "dql")]
    assert not list(site.glob("*finder*"))  # an import hook
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    shutil.copy(pth, packages)
    (packages / "here.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # torch and the rest
    return above, venv / "bin" / "python"


def test_the_folder_above_a_clone_called_dql(installed):
    """There `import dql` is the package, though a folder of that name lies in the working folder."""
    above, python = installed
    code = "import dql, dql.kernels.layout; print(dql.__file__, dql.kernels.__file__, sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], cwd=above, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = above / "dql" / "dql"
    assert done.stdout.splitlines() == [str(package / "__init__.py"), str(package / "kernels" / "__init__.py")]


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_see_the_package(installed, tmp_path, checker):
    if not has(checker):
        pytest.skip(f"{checker} is not installed; pip install -e '.[dev]'")
    _, python = installed
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,numpy.*]\nfollow_imports = skip\n")  # they take long
    option = {"mypy": "--python-executable", "pyright": "--pythonpath"}[checker]
    command = [sys.executable, "-m", checker, option, str(python), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    if checker == "pyright" and "user.py" not in said:
        pytest.skip(f"pyright cannot fetch itself here: {(said.strip().splitlines() or ['nothing said'])[-1][:200]}")
    assert done.returncode == 1, said  # for the line that is wrong
    for type_ in ("dql.policy.DiffusionPolicy", "dql.kernels.layout.DenoiserSpec", "dql.selection.Selection"):
        name = type_ if checker == "mypy" else type_.rpartition(".")[2]
        assert f'Revealed type is "{name}"' in said or f'is "{name}"' in said, said
    assert "user.py:8" in said and "ssignment" in said, said
    assert said.count("error:") == 1, said
