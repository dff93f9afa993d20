"""Rollouts: every episode counts once and stands alone; intervals; which checkpoint each rule of selection takes."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from dql.agents.diffusion import DiffusionBC
from dql.config import Config
from dql.datasets.info import DatasetInfo
from dql.evaluate import Evaluation, Scored, confidence_interval, evaluate, select_checkpoints, worth_keeping


class Countdown(gymnasium.Env):
    """An episode lasts as many steps as its seed says, 1 to 9, and pays 1 + the action's first number a step.

    It terminates if the number is even, else it is truncated. A reset without a seed starts an episode of 500 steps
    that pays 1000 each: whoever counts it is found out.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = 500 if seed is None else 1 + int(np.random.default_rng(seed).integers(9))
        self.pay, self.time = 1000.0 if seed is None else 1.0, 0
        return self._look(), {}

    def _look(self):
        return np.array([self.length, self.time], np.float32)

    def step(self, action):
        self.time += 1
        over, even = self.time >= self.length, self.length % 2 == 0
        return self._look(), self.pay + float(action[0]), over and even, over and not even, {}


class RowWise:
    """Acts on each row alone: the action is a hash of the state, so that episodes differ."""

    def __init__(self):
        self.seeds = []

    def act(self, states, *, seed=None):
        self.seeds.append(seed)
        return np.sin(states[:, :1] * 3.7 + states[:, 1:] * 1.3).astype(np.float32)


class Lazy:
    def act(self, states, *, seed=None):
        return np.zeros((len(states), 1), np.float32)


def info(low=None, high=None):
    return DatasetInfo("some/thing-v0", None, low, high, 0, np.zeros(0), "box", 1.0)


def test_every_episode_counts_once_however_long_the_others_take():
    result = evaluate(Lazy(), info(), episodes=40, seed=3, make=Countdown)
    assert result.returns.shape == result.lengths.shape == (40,)
    assert set(result.lengths) == set(range(1, 10)), "every length occurs"
    np.testing.assert_array_equal(result.returns, result.lengths)
    # A uniform length: counting whichever episodes end first would be far under 5.
    assert 3.9 < result.lengths.mean() < 6.1


def test_an_episode_does_not_depend_on_how_many_run_beside_it():
    many = evaluate(RowWise(), info(), episodes=25, seed=5, make=Countdown)
    assert len(set(many.returns)) >= 6
    for episodes in (1, 2, 7, 24):
        few = evaluate(RowWise(), info(), episodes=episodes, seed=5, make=Countdown)
        np.testing.assert_array_equal(few.returns, many.returns[:episodes])
        np.testing.assert_array_equal(few.lengths, many.lengths[:episodes])
    other = evaluate(RowWise(), info(), episodes=25, seed=6, make=Countdown)
    assert not np.array_equal(other.lengths, many.lengths)


def test_more_episodes_than_run_side_by_side():
    actor = RowWise()
    many = evaluate(actor, info(), episodes=205, seed=5, make=Countdown)
    assert many.lengths.shape == (205,)
    assert (many.lengths >= 1).all()
    first = evaluate(RowWise(), info(), episodes=100, seed=5, make=Countdown)
    np.testing.assert_array_equal(many.returns[:100], first.returns)
    assert not np.array_equal(many.lengths[100:200], many.lengths[:100]), "later waves have seeds of their own"
    assert len(set(actor.seeds)) == len(actor.seeds), "no step's actions are drawn twice from one seed"


def test_real_environments_with_early_ends():
    """Hopper falls at different times; alone each episode is what it is beside others."""
    pytest.importorskip("mujoco", reason='needs mujoco: pip install "diffusion-ql[mujoco]"')

    class Push:
        def act(self, states, *, seed=None):
            return np.sin(states[:, 5:8] * 40.0).astype(np.float32)

    def make():
        return gymnasium.make("Hopper-v5")

    five = evaluate(Push(), info(), episodes=5, seed=1, make=make)
    two = evaluate(Push(), info(), episodes=2, seed=1, make=make)
    assert len(set(five.lengths)) > 1
    np.testing.assert_array_equal(five.returns[:2], two.returns)
    np.testing.assert_array_equal(five.lengths[:2], two.lengths)


def test_a_diffusion_agent_repeats_itself():
    agent = DiffusionBC(2, 1, Config(hidden_dim=16, num_hidden=2))
    first, again = (evaluate(agent, info(), episodes=6, seed=2, make=Countdown) for _ in range(2))
    np.testing.assert_array_equal(first.returns, again.returns)
    other = evaluate(agent, info(), episodes=6, seed=3, make=Countdown)
    assert not np.array_equal(first.returns, other.returns)


def test_normalised_scores():
    with_scores = evaluate(Lazy(), info(1.0, 9.0), episodes=12, seed=0, make=Countdown)
    np.testing.assert_allclose(with_scores.normalized, 100 * (with_scores.lengths - 1) / 8)
    assert with_scores.normalized_score == pytest.approx(with_scores.normalized.mean())
    low, high = with_scores.normalized_interval
    assert low < with_scores.normalized_score < high
    without = evaluate(Lazy(), info(), episodes=2, seed=0, make=Countdown)
    assert (without.normalized, without.normalized_score, without.normalized_interval) == (None, None, None)
    assert without.to_dict()["normalized_score"] is None


def test_the_dictionary_is_what_the_arrays_say():
    result = Evaluation(np.array([1.0, 2.0, 6.0]), np.array([3, 4, 8]), None)
    values = result.to_dict()
    assert (values["episodes"], values["return_mean"], values["length_mean"]) == (3, 3.0, 5.0)
    assert values["return_std"] == pytest.approx(np.std([1, 2, 6]))
    assert (values["return_low"], values["return_high"]) == result.return_interval


@pytest.mark.parametrize("episodes", [0, -1])
def test_no_episodes(episodes):
    with pytest.raises(ValueError, match="episodes must be at least 1"):
        evaluate(Lazy(), info(), episodes=episodes, make=Countdown)


def test_environments_are_closed_when_an_actor_fails():
    closed = []

    class Watched(Countdown):
        def close(self):
            closed.append(self)

    class Broken:
        def act(self, states, *, seed=None):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        evaluate(Broken(), info(), episodes=3, make=Watched)
    assert len(closed) == 3


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = confidence_interval(rng.normal(3.0, 2.0, 30), resamples=1000)
        covered += low <= 3.0 <= high
    assert 0.88 <= covered / 200 <= 0.99  # nominally 0.95; a percentile interval of 30 covers a little less


def test_interval_is_near_the_normal_one():
    values = np.random.default_rng(1).normal(-800, 100, 200)
    low, high = confidence_interval(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert confidence_interval(values) == (low, high), "the same values, the same interval"
    narrow = confidence_interval(values, level=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_interval_of_one_or_equal_episodes():
    assert confidence_interval(np.array([-5.0])) == (-5.0, -5.0)
    assert confidence_interval(np.full(7, 2.5)) == (2.5, 2.5)


# Return and loss of five evaluations; the losses are those of the published code's wrong index arithmetic.
LOSSES = (5.0, 1.0, 4.0, 2.0, 3.0)
FIVE = [
    Scored(step=100 * (i + 1), return_mean=r, bc_loss=b)
    for i, (r, b) in enumerate(zip((1.0, 2.0, 9.0, 4.0, 3.0), LOSSES, strict=True))
]


@pytest.mark.parametrize(("top_k", "loss"), [(0, 1.0), (1, 2.0), (2, 3.0), (4, 5.0), (9, 5.0)])
def test_offline_selection_takes_the_loss_of_that_rank(top_k, loss):
    chosen = select_checkpoints(FIVE, top_k)
    assert {e.step: e.bc_loss for e in FIVE}[chosen["offline"]] == loss
    assert chosen["best"] == 300
    assert chosen["last"] == 500


def test_selecting_from_nothing():
    with pytest.raises(ValueError, match="--eval-every"):
        select_checkpoints([], 1)
    assert worth_keeping([], 1) == set()


few_values = st.integers(-3, 3).map(float)  # few, so that ties occur


@given(
    scores=st.lists(st.tuples(few_values, few_values), min_size=1, max_size=12),
    top_k=st.integers(0, 4),
)
@settings(max_examples=300, deadline=None)
def test_what_may_be_selected_later_is_kept(scores, top_k):
    """Prunes after every evaluation as a run does: what the end selects was never thrown away."""
    evaluations = [Scored(10 * (i + 1), r, b) for i, (r, b) in enumerate(scores)]
    kept = set()
    for n in range(1, len(evaluations) + 1):
        seen = evaluations[:n]
        kept = (kept & worth_keeping(seen, top_k)) | {seen[-1].step}  # the newest is kept by `keep`
        chosen = select_checkpoints(seen, top_k)
        assert set(chosen.values()) <= kept
        assert len(worth_keeping(seen, top_k)) <= top_k + 2, "the disk does not fill up"
        by_loss = sorted(e.bc_loss for e in seen)
        losses = {e.step: e.bc_loss for e in seen}
        assert losses[chosen["offline"]] == by_loss[min(top_k, n - 1)]
        assert {e.step: e.return_mean for e in seen}[chosen["best"]] == max(e.return_mean for e in seen)


def test_returns_are_those_of_gymnasiums_vector_environment():
    """Bit for bit, although that goes on with environments whose episodes have ended, and shows their new states."""
    from dql import noise

    agent = DiffusionBC(2, 1, Config(hidden_dim=16, num_hidden=2))
    environments = gymnasium.vector.SyncVectorEnv([Countdown] * 12)
    states, _ = environments.reset(seed=[noise.derive(7, "episode", i) % 2**31 for i in range(12)])
    returns, running, step = np.zeros(12), np.ones(12, bool), 0
    while running.any():
        actions = agent.act(states, seed=noise.derive(7, "act", 0, step))
        states, rewards, terminated, truncated, _ = environments.step(actions)
        returns[running] += rewards[running]
        running &= ~(terminated | truncated)
        step += 1
    np.testing.assert_array_equal(evaluate(agent, info(), episodes=12, seed=7, make=Countdown).returns, returns)


def test_the_best_of_evaluations_of_which_some_failed():
    nan = float("nan")
    evaluations = [Scored(10, nan, 3.0), Scored(20, -5.0, 2.0), Scored(30, nan, 1.0), Scored(40, -7.0, 4.0)]
    assert select_checkpoints(evaluations, 0) == {"last": 40, "best": 20, "offline": 30}
    assert worth_keeping(evaluations, 0) == {20, 30}
    assert select_checkpoints(evaluations[:1], 0) == {"last": 10, "offline": 10}
    assert worth_keeping(evaluations[:1], 0) == {10}
