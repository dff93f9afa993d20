"""Every backend's reduced precisions as in `test_rounding`: chains of every size."""

import pytest
from support.backends import entry, rounded
from support.cases import SIZES
from support.checks import check_rounded

pytestmark = pytest.mark.usefixtures("poisoned")


@rounded(SIZES)
def test_rounds_as_it_should(backend, reduced, case):
    check_rounded(case, backend, reduced, entry(backend).rounded[reduced])
