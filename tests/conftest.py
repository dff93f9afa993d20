"""What several test files share: a small real dataset, the command line in a process of its own, one thread."""

import os

# Before torch is imported, and inherited by every process that a test starts: a sum over rows depends on how threads
# split it, and the tests of several files run side by side on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before triton is imported (which torch leaves to others): its kernels run on NumPy. With a GPU they run there.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Likewise the CUDA kernels: in an emulator, which the first test that needs it compiles.
    os.environ.setdefault("DQL_CUDA_EMULATE", "1")

# It holds assertions of several files: a failed one there is to show its values too.
pytest.register_assert_rewrite("support")

DATASET = "dql/pendulum/mixed-v0"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """With a GPU one process: the contexts of several would share its memory."""
    return 1 if torch.cuda.is_available() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks those that tests/slow.txt lists."""
    from support import TESTS
    from support.durations import groups_of

    listed = set((TESTS / "slow.txt").read_text().splitlines())
    for item in items:
        if not listed.isdisjoint(groups_of(item.nodeid)):
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runs_here() -> Callable[..., str]:
    """`runs_here(backend)` gives the name, or skips the test, with the reason, if neither a GPU runs that backend's
    kernels nor the interpreter or the emulator in its place; `on_cpu=True`: if it takes no tensors on the CPU.

    What is to run them is made ready once a session, for the first test that asks: the emulator is compiled then.
    """
    from support.backends import cannot_run, cannot_stand_in

    reasons: dict[tuple[str, bool], str | None] = {}

    def runs(backend: str, on_cpu: bool = False) -> str:
        if (backend, on_cpu) not in reasons:
            reasons[backend, on_cpu] = (cannot_stand_in if on_cpu else cannot_run)(backend)
        if (reason := reasons[backend, on_cpu]) is not None:
            pytest.skip(f"{backend}: {reason}")
        return backend

    return runs


@pytest.fixture(scope="session")
def tiny():
    """Flags of an agent so small that a few hundred updates take a second or two; its EMA is active."""
    return [
        "--hidden-dim",
        "16",
        "--num-hidden",
        "2",
        "--batch-size",
        "32",
        "--num-candidates",
        "4",
        "--ema-start",
        "10",
    ]


@pytest.fixture(scope="session")
def pendulum_home(tmp_path_factory):
    """A folder with a Minari root that holds a small pendulum dataset, and a cache: read, never changed."""
    from dql.collect import make_dataset

    home = tmp_path_factory.mktemp("pendulum")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
        patch.setenv("DQL_CACHE", str(home / "cache"))
        made = make_dataset(DATASET, steps=1200, seed=0, progress=False)
    assert (made.steps, made.episodes) == (1200, 6)
    return home


@pytest.fixture
def pendulum(pendulum_home, monkeypatch):
    """The small pendulum dataset is there, for this process and those it starts; gives its id."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(pendulum_home / "minari"))
    monkeypatch.setenv("DQL_CACHE", str(pendulum_home / "cache"))
    return DATASET


@dataclass(frozen=True)
class Finished:
    """A process that has ended: exit code and what it said."""

    code: int
    out: str
    err: str

    def refused(self, *parts: object) -> str:
        """Asserts that it ended as an expected failure does: exit code 1, one line on stderr. Gives the line."""
        assert self.code == 1, (self.code, self.out, self.err)
        assert "Traceback" not in self.err, self.err
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        for part in parts:
            assert str(part) in lines[0], f"{str(part)!r} is not in: {lines[0]}"
        return lines[0]


@pytest.fixture(scope="session")
def dql_command():
    """What starts `dql ARGUMENTS`, for subprocess."""
    return lambda *arguments: [sys.executable, "-m", "dql.cli", *map(str, arguments)]


@pytest.fixture
def dql(dql_command, tmp_path):
    """Runs `dql ARGUMENTS` in a process of its own, in the test's folder, to its end."""

    def run(*arguments: object, timeout: float = 120, cwd: Path = tmp_path, env: dict[str, str] | None = None):
        done = subprocess.run(
            dql_command(*arguments),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            timeout=timeout,
            env=os.environ | (env or {}),
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def dql_here(capsys, monkeypatch, tmp_path):
    """`dql ARGUMENTS` in this process (no start-up time), in the test's folder; as `dql` otherwise."""
    from dql.cli import main

    def run(*arguments: object) -> Finished:
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as exit:  # of the argument parser
            code = exit.code
        said = capsys.readouterr()
        return Finished(code or 0, said.out, said.err)

    return run
