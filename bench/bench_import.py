"""`import dql` against `import torch`, each in a fresh interpreter.

It asserts: that dql imports fast is promised, and a few tenths of a second show on any machine. What it asserts is
timed inside a process that has torch already: two whole starts, of some seconds each, differ by more than the limit.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

LIMIT = 0.3  # seconds that `import dql` may take beyond `import torch`
AFTER_TORCH = "import time, torch; start = time.perf_counter(); import dql; print(time.perf_counter() - start)"
ENVIRONMENT = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # an import without cached bytecode is not the usual one


def _fresh(statement: str) -> Callable[[], None]:
    def run() -> None:
        subprocess.run([sys.executable, "-c", statement], check=True, env=ENVIRONMENT)

    return run


@pytest.mark.benchmark(timer=time.perf_counter)  # whatever --benchmark-timer says: the time is spent in a child
def test_import(race, request) -> None:
    rounds = 3 if request.config.getoption("short") else 7
    race("import (published: torch alone)", "dql", _fresh("import dql"), _fresh("import torch"), rounds=rounds)
    more = statistics.median(_after_torch() for _ in range(rounds))
    assert more <= LIMIT, f"import dql takes {more:.2f} s more than import torch, promised are {LIMIT} s"


def _after_torch() -> float:
    """The seconds of `import dql` in a process that imported torch."""
    command = [sys.executable, "-c", AFTER_TORCH]
    return float(subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, text=True).stdout)
