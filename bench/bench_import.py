"""`import dql` against `import torch`, each in a fresh interpreter.

It asserts: that dql imports fast is promised, and a few tenths of a second show on any machine.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

LIMIT = 0.3  # seconds that `import dql` may take beyond `import torch`


def _fresh(statement: str) -> Callable[[], None]:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # an import without cached bytecode is not the usual one

    def run() -> None:
        subprocess.run([sys.executable, "-c", statement], check=True, env=environment)

    return run


@pytest.mark.benchmark(timer=time.perf_counter)  # whatever --benchmark-timer says: the time is spent in a child
def test_import(race, request) -> None:
    rounds = 3 if request.config.getoption("short") else 7
    row = race("import (published: torch alone)", "dql", _fresh("import dql"), _fresh("import torch"), rounds=rounds)
    if row is not None:
        more = statistics.median(t - b for t, b in zip(row.times, row.baseline_times, strict=True))
        assert more <= LIMIT, f"import dql takes {more:.2f} s more than import torch, promised are {LIMIT} s"
