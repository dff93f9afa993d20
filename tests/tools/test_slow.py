"""The list of slow tests, from which `-m "not slow"` is made, and what makes it."""

import re
import subprocess
import sys

from support import TESTS
from support.durations import groups_of, slow

LISTED = (TESTS / "slow.txt").read_text().splitlines()
LOG = """
0.50s call     tests/a/test_a.py::test_quick
9.00s call     tests/a/test_a.py::test_two[triton-1]
0.20s call     tests/a/test_a.py::test_two[cpp-avx2-1]
0.10s setup    tests/a/test_a.py::test_two[cpp-avx2-1]
0.70s call     tests/a/test_a.py::test_near[1]
1.00s call     tests/a/test_a.py::test_near[2]
6.00s setup    tests/a/test_b.py::test_first
0.01s call     tests/a/test_b.py::test_second
4 passed in 9.00s
"""


def test_what_is_listed():
    assert slow(LOG.splitlines()) == ["a/test_a.py::test_near", "a/test_a.py::test_two triton", "a/test_b.py"]


def test_the_backend_is_one_of_the_words():
    assert groups_of("tests/a/test_a.py::test_it[64-cpp-avx2]")[-1] == "a/test_a.py::test_it cpp"
    assert groups_of("tests/a/test_a.py::test_it[cppless]") == ["a/test_a.py", "a/test_a.py::test_it"]


def test_all_that_is_listed_is_there():
    """What was renamed, or is gone, would be marked by nobody."""
    for line in LISTED:
        path, _, rest = line.partition("::")
        name = rest.partition(" ")[0]
        assert (TESTS / path).is_file(), line
        assert not name or re.search(rf"^def {name}\(", (TESTS / path).read_text(), re.MULTILINE), line


def test_a_log_is_asked_for():
    done = subprocess.run([sys.executable, TESTS / "support" / "durations.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and done.stderr.startswith("usage: python tests/")
