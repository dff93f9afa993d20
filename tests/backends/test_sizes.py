"""Every backend's actions and gradients in float32 against the transcription: chains of every size, as `test_numbers`
has every kind, and the corners of what is taken, against the eager backend in float64."""

import pytest
from support.backends import every_variant
from support.cases import SIZES, TOLERANCES, Case, assert_all_close, expected, run
from support.checks import check_against_eager

pytestmark = pytest.mark.usefixtures("poisoned")


@every_variant
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_equals_the_transcription(backend, case):
    assert_all_close(run(case, backend), expected(case), TOLERANCES["float32"], case=case, backend=backend)


@every_variant
@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, S=512, A=64, K=2, H=512, num_hidden=4, time_dim=64),
        Case(B=15, S=1, A=1, K=2, H=1, num_hidden=2, activation="silu", time_dim=4),
        Case(B=9, S=3, A=2, K=33, H=16, num_hidden=2, predict_epsilon=False, max_action=20.0),
    ],
    ids=["largest", "smallest", "many steps"],
)
def test_the_corners_of_what_it_takes(backend, case):
    assert check_against_eager(case, backend) >= 0.3
