"""Random problems, float32, on every backend, cut into tiles at random too where a backend can be told how."""

import pytest

pytest.importorskip("hypothesis")  # a GPU's machine may be without it

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import entry
from support.checks import check_against_eager
from support.random_cases import random_cases

pytestmark = pytest.mark.usefixtures("poisoned")


def test_random_problems(backend):
    known = entry(backend)

    @settings(max_examples=known.examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(random_cases(**known.cases), st.data())
    def hold(case, data):
        with known.any_cut(data.draw, case):
            check_against_eager(case, backend)

    hold()
