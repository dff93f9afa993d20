"""Random chains, for Hypothesis."""

from collections.abc import Callable

from hypothesis import strategies as st

from dql.kernels.layout import ACTIVATIONS
from dql.schedule import BETA_SCHEDULES, SAMPLERS
from support.cases import Case


@st.composite
def random_cases(
    draw: Callable[..., int],
    most_rows: int = 20,
    most_steps: int = 6,
    steps_of_large: int = 2,
    often_H: tuple[int, ...] = (),
) -> Case:
    """Mostly small, now and then large, often no multiple of anything; half of them of `often_H`; T at most 50."""
    large = draw(st.integers(0, 9)) == 0
    K = draw(st.integers(1, steps_of_large if large else most_steps))
    return Case(
        B=draw(st.integers(1, max(3, most_rows // 10) if large else most_rows)),
        S=draw(st.integers(1, 512 if large else 40)),
        A=draw(st.one_of(st.integers(1, 8), st.integers(1, 64))),
        K=K,
        N=draw(st.one_of(st.none(), st.integers(1, 5))),
        H=draw(st.one_of(*([st.sampled_from(often_H)] if often_H else []), st.integers(1, 512 if large else 80))),
        num_hidden=draw(st.integers(2, 4)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        sampler=draw(st.sampled_from(SAMPLERS)),
        stochasticity=draw(st.sampled_from([0.0, 0.5, 1.0])),
        T=draw(st.one_of(st.none(), st.integers(K, 50))),
        beta_schedule=draw(st.sampled_from(BETA_SCHEDULES)),
        max_action=draw(st.sampled_from([0.3, 1.0, 3.0, 20.0])),
        predict_epsilon=draw(st.booleans()),
        time_dim=draw(st.one_of(st.just(16), st.integers(2, 32).map(lambda half: 2 * half))),
    )
