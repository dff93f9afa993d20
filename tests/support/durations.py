"""Which tests are slow: `pytest --durations=0 -vv ... > LOG; python tests/support/durations.py LOG > tests/slow.txt`.

Of the second run in a checkout: in the first one test compiles the emulator for all. A line of that list is a test
function, one with the backend that makes it slow, or a file that all has to wait for what its tests share. They are
marked `slow`.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from dql.backend.registry import registry

BACKENDS = tuple(name for name in registry() if name != "eager")
MEAN, LONGEST = 0.8, 3.0  # seconds, in a run of two processes side by side, of a function's tests
SHARED = 5.0  # seconds of a fixture


def backend_of(test: str) -> str | None:
    """Which backend's a test is, by the words of its parameters: "test_it[triton-bf16]"."""
    parameters = test.partition("[")[2]
    return next((name for name in BACKENDS if re.search(rf"(^|[-, ]){re.escape(name)}([-,\] ]|$)", parameters)), None)


def groups_of(test: str) -> list[str]:
    """The lines that a test may be listed by: its file, its function, and that with its backend."""
    function = test.partition("[")[0].removeprefix("tests/")
    backend = backend_of(test)
    return [function.partition("::")[0], function, *([f"{function} {backend}"] if backend else [])]


def slow(lines: Iterable[str]) -> list[str]:
    """The lines of the list, of pytest's durations."""
    seconds: dict[str, float] = defaultdict(float)
    files = set()
    for line in lines:
        if found := re.match(r"\s*([\d.]+)s (call|setup|teardown)\s+(tests/\S.*)", line):
            seconds[found[3].strip()] += float(found[1])
            if found[2] == "setup" and float(found[1]) > SHARED:
                files.add(groups_of(found[3])[0])
    groups: dict[str, list[float]] = defaultdict(list)
    for test, took in seconds.items():
        groups[groups_of(test)[-1]].append(took)
    names = (name for name, took in groups.items() if sum(took) / len(took) > MEAN or max(took) > LONGEST)
    return sorted(files | {name for name in names if name.partition("::")[0] not in files})


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python tests/support/durations.py LOG, what pytest --durations=0 -vv printed")
    with open(sys.argv[1]) as log:
        print(*slow(log), sep="\n")
