"""Episodes of behaviour policies in Gymnasium environments.

Every episode is a function of (seed, part of the recipe, episode index) alone: its environment seed, its snapshot, its
noise level and all its noise come from that triple. Episodes are kept in index order until the steps are reached, so
what is collected depends neither on the number of environments nor on timing.

Environments are stepped one after the other in this process with one batched policy evaluation: on 2 cores, with 16
environments (Gymnasium 1.4, mujoco 4.0), plain stepping was 1.8 (Hopper), 2.5 (HalfCheetah) and 5 times (Pendulum) as
fast as AsyncVectorEnv.
"""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dql.collect.recipes import LinearPolicy, Part, behaviour_policy, energy_controller, linear_actions

MAX_STEPS = 10_000_000


@dataclass
class Episode:
    """One episode's arrays, T steps, and where they came from."""

    seed: int
    snapshot: str
    noise_std: float
    random_prob: float
    observations: np.ndarray  # [T + 1, S]
    actions: np.ndarray  # [T, A] float32, clipped: what the environment was given
    rewards: np.ndarray  # [T] float64
    terminated: bool
    truncated: bool
    cut: bool  # truncated by the end of the collection and not by the environment


class Slot:
    """One environment, and preallocated arrays for the episode that runs in it."""

    def __init__(self, env_id: str) -> None:
        import gymnasium

        # These environments are Gymnasium's own: checking every step of them finds nothing.
        self.env = gymnasium.make(env_id, disable_env_checker=True)
        spec, states, actions = self.env.spec, self.env.observation_space, self.env.action_space
        assert spec is not None
        assert spec.max_episode_steps is not None
        assert isinstance(states, gymnasium.spaces.Box)
        assert isinstance(actions, gymnasium.spaces.Box)
        self.horizon: int = spec.max_episode_steps
        self.low, self.high = actions.low, actions.high  # [A] each
        (S,), (A,) = states.shape, actions.shape
        self.observations = np.empty((self.horizon + 1, S), states.dtype)
        self.actions = np.empty((self.horizon, A), np.float32)
        self.rewards = np.empty(self.horizon, np.float64)
        self.index = -1  # of the episode in it; -1: idle

    def start(self, part: Part, seed: int, index: int, policies: dict[str, LinearPolicy]) -> None:
        """Resets for episode `index` and draws all its randomness at once, in a fixed order."""
        source = np.random.SeedSequence([seed, zlib.crc32(part.name.encode()), index])
        rng = np.random.default_rng(source)
        self.index, self.length, self.terminated, self.truncated = index, 0, False, False
        self.seed = int(source.generate_state(1)[0])
        self.snapshot = part.snapshots[rng.integers(len(part.snapshots))]
        self.noise_std = float(rng.uniform(*part.noise_std))
        self.random_prob = 1.0 if self.snapshot == "random" else float(rng.uniform(*part.random_prob))
        self.policy = policies.get(self.snapshot)
        shape = self.actions.shape  # [T, A]
        self.noise = self.noise_std * 0.5 * (self.high - self.low) * rng.standard_normal(shape)
        self.is_random = rng.random(shape[0]) < self.random_prob
        self.random_actions = rng.uniform(self.low, self.high, shape)
        self.observations[0], _ = self.env.reset(seed=self.seed)

    def step(self, action: np.ndarray) -> None:
        """Takes the policy's action [A], noise added and clipped, or a random one."""
        t = self.length
        action = self.random_actions[t] if self.is_random[t] else action + self.noise[t]
        self.actions[t] = np.clip(action, self.low, self.high)
        observation, self.rewards[t], self.terminated, self.truncated, _ = self.env.step(self.actions[t])
        self.length = t + 1
        self.observations[t + 1] = observation

    def take(self) -> Episode:
        """The finished episode, copied out; the slot is idle afterwards."""
        T = self.length
        self.index = -1
        return Episode(
            self.seed,
            self.snapshot,
            self.noise_std,
            self.random_prob,
            self.observations[: T + 1].copy(),
            self.actions[:T].copy(),
            self.rewards[:T].copy(),
            self.terminated,
            self.truncated,
            cut=False,
        )


def _cut(episode: Episode, steps: int) -> Episode:
    """The episode's first `steps` steps; its end is a truncation unless it ended by itself just there."""
    if len(episode.rewards) > steps:
        episode.observations = episode.observations[: steps + 1]
        episode.actions, episode.rewards = episode.actions[:steps], episode.rewards[:steps]
        episode.terminated = episode.truncated = False
    if not (episode.terminated or episode.truncated):
        episode.truncated = episode.cut = True
    return episode


def collect(
    env_id: str,
    part: Part,
    seed: int,
    num_envs: int,
    *,
    steps: int | None = None,
    episodes: int = MAX_STEPS,
    advance: Callable[[int], None] = lambda kept: None,
) -> Iterator[Episode]:
    """Yields episodes 0, 1, 2, ... of a part, in order, until they hold `steps` steps, or `episodes` of them.

    Episode j is needed only while episodes 0 .. j-1 hold fewer than `steps` steps; what they hold so far is a
    lower bound, so an episode that this bound rules out is never started, or dropped.
    """
    with contextlib.ExitStack() as stack:
        slots = [Slot(env_id)]
        stack.callback(slots[0].env.close)
        wanted = episodes if steps is None else -(-steps // slots[0].horizon)  # more would only run ahead
        for _ in range(min(num_envs, wanted) - 1):
            slots.append(Slot(env_id))
            stack.callback(slots[-1].env.close)

        policies = {
            s: behaviour_policy(s.rsplit("/", 1)[0], int(s.rsplit("/", 1)[1])) for s in part.snapshots if "/" in s
        }
        limit = sys.maxsize if steps is None else steps
        finished: dict[int, Episode] = {}  # those that wait for an earlier one
        launched = yielded = yielded_steps = 0
        while True:
            running = {slot.index: slot for slot in slots if slot.index >= 0}
            held = (
                yielded_steps + sum(len(e.rewards) for e in finished.values()) + sum(s.length for s in running.values())
            )
            advance(min(limit, held))
            if held >= limit:
                bound = yielded_steps  # steps surely held by the episodes before j
                for j in sorted(running.keys() | finished.keys()):
                    if bound >= limit:
                        finished.pop(j, None)
                        if j in running:
                            running.pop(j).index = -1
                        continue
                    bound += running[j].length if j in running else len(finished[j].rewards)
                    if bound >= limit and j in running:
                        # Long enough, whatever the earlier ones turn out to be.
                        finished[j] = running.pop(j).take()
            else:
                for slot in slots:
                    if slot.index < 0 and launched < episodes:
                        slot.start(part, seed, launched, policies)
                        running[launched] = slot
                        launched += 1
            while yielded in finished and yielded_steps < limit:
                episode = finished.pop(yielded)
                if steps is not None:
                    episode = _cut(episode, min(len(episode.rewards), limit - yielded_steps))
                yielded, yielded_steps = yielded + 1, yielded_steps + len(episode.rewards)
                yield episode
            if not running:
                return
            for slot, action in zip(running.values(), _policy_actions(list(running.values())), strict=True):
                slot.step(action)
                if slot.terminated or slot.truncated:
                    index = slot.index  # take() clears it
                    finished[index] = slot.take()


def _policy_actions(slots: list[Slot]) -> np.ndarray:
    """The noise-free actions [N, A] of the running episodes."""
    observations = np.stack([slot.observations[slot.length] for slot in slots])  # [N, S]
    if slots[0].snapshot == "controller":
        return energy_controller(observations)
    actions = np.zeros((len(slots), slots[0].actions.shape[1]))  # [N, A]; the random policy's rows stay 0
    rows = [i for i, slot in enumerate(slots) if slot.policy is not None]
    if rows:
        policies = [slots[i].policy for i in rows]
        M, mean, std = (np.stack([getattr(p, key) for p in policies]) for key in ("M", "mean", "std"))
        actions[rows] = linear_actions(M, mean, std, observations[rows])
    return actions
