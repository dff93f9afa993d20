"""What the tests of a run's faults share: a run of seconds, and an environment that does what a test says."""

import io

import gymnasium
import torch
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from rich.console import Console

from dql.config import Config, RunConfig


class Pendulum(PendulumEnv):
    """Does what a test says, whatever that is, before each step of each episode."""

    do = None
    constructor = None

    def __init__(self, **options):
        if Pendulum.constructor is not None:
            Pendulum.constructor()
        super().__init__(**options)

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.time += 1
        observation, reward, terminated, truncated, info = super().step(action)
        if Pendulum.do is not None:
            observation, reward, terminated = Pendulum.do(self.time, observation, reward)
        return observation, reward, terminated, truncated, info


gymnasium.register("Limited-v0", entry_point=Pendulum, max_episode_steps=5)
gymnasium.register("Endless-v0", entry_point=Pendulum)


def brief_run(dataset, folder):
    agent = Config(hidden_dim=16, num_hidden=2, batch_size=16, num_updates=40, num_candidates=2, ema_start=4)
    return RunConfig(
        dataset, agent, run_dir=folder, device="cpu", log_every=5, checkpoint_every=10, eval_every=10,
        eval_episodes=2, env="Limited-v0",
    )  # fmt: skip


def quietly(act, *arguments, **options):
    said = io.StringIO()
    result = act(*arguments, console=Console(file=said, width=400), **options)
    return result, said.getvalue()


def assert_one_sentence(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def assert_same_agent(a, b):
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name
