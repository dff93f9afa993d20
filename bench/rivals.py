"""What the benches run dql against, and the check that both compute the same.

- `published`: `published.PublishedActor` and `PublishedAgent`, in eager torch;
- `compile-published`: its chain under torch.compile, forward;
- `compile-lean`: `LeanActor`, what a careful user would write and compile, without a backward of his own.

On a GPU torch.compile runs with CUDA graphs: eager torch is no rival there.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from published import TIME_DIM, PublishedActor, PublishedAgent, TimeEmbedding
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import dql

S, A, H, T = 17, 6, 256, 5  # a MuJoCo walker with the paper's network
COMPILED = ("compile-published", "compile-lean")
# Of float32 against float32, relative to a tensor's largest element (actions) or to its norm (gradients): the bound of
# the tests' float32 line. Measured 2e-6 at most; another sine or another order of a sum costs a few times that.
ACTION_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
CLAMP_MARGIN = 1e-3  # of a predicted x0 relative to max_action: nearer, rounding decides which side has a gradient


class LeanActor(nn.Module):
    """The published actor's chain in lean torch, sharing its parameters: the first layer split, the steps unrolled."""

    def __init__(self, actor: PublishedActor) -> None:
        super().__init__()
        self.model = actor.model
        device = actor.betas.device
        table = dql.StepTable.ddpm(dql.NoiseSchedule("vp", T))
        self.rows = table.rows
        timesteps = torch.tensor(table.timesteps, device=device, dtype=torch.float32)
        self.register_buffer("embedding", TimeEmbedding()(timesteps))  # [T, 16]

    def chain(self, states: Tensor, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(actions [B, A], each step's x0 [B, A] before its clamp) of states [B, S] and noise [T, B, A]."""
        layers, final = self.model.mid_layer, self.model.final_layer
        W_x, W_t, W_s = layers[0].weight.split([A, TIME_DIM, S], dim=1)
        state_part = F.linear(states, W_s)  # [B, H]
        time_part = F.linear(self.model.time_mlp[1:](self.embedding), W_t, layers[0].bias)  # [T, H]
        x, predictions = noise[0], []
        for k, (a, b, c0, cx, _, s) in enumerate(self.rows):
            eps = final(layers[1:](F.linear(x, W_x) + (state_part + time_part[k])))  # [B, A]
            predictions.append(a * x - b * eps)
            x = c0 * predictions[-1].clamp(-1, 1) + cx * x
            if s != 0:
                x = x + s * noise[k + 1]
        return x.clamp(-1, 1), predictions

    def forward(self, states: Tensor, noise: Tensor) -> Tensor:
        return self.chain(states, noise)[0]


@lru_cache(maxsize=1)
def no_compiler(device: torch.device) -> str | None:
    """None if torch.compile works here, else why not: one small function is compiled to find out."""
    compilers = [os.environ[v] for v in ("CXX",) if v in os.environ] or ["g++", "clang++"]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return f"torch.compile needs a C++ compiler on a CPU, and there is none ({', '.join(compilers)}); install g++"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64, device=device))
    except Exception as error:  # whatever a half-installed toolchain raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.compile does not work here: {reason[0]}"
    return None


@lru_cache(maxsize=1)
def published_actor(device: torch.device) -> PublishedActor:
    """The weights that every contender of the sampling benches shares."""
    torch.manual_seed(0)
    return PublishedActor(S, A, 1.0, H, T, "vp").to(device)


@lru_cache(maxsize=2)
def compiled(contender: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(states [B, S], noise [T, B, A]) -> actions [B, A] under torch.compile.

    On a CPU one graph with a symbolic B serves all B > 1 (as fast as one a size, tried), which bounds the time spent
    compiling; CUDA graphs need fixed shapes.
    """
    actor = published_actor(device)
    chain: Any = actor.sample if contender == "compile-published" else LeanActor(actor)
    if device.type == "cuda":
        return torch.compile(chain, dynamic=False, mode="reduce-overhead")
    return torch.compile(chain, dynamic=True)


class GivenDraws(TorchFunctionMode):
    """Inside, torch.randn, randn_like and randint return the given tensors in turn: the published code takes none."""

    def __init__(self, draws: Iterator[Tensor]) -> None:
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.randn, torch.randn_like, torch.randint):
            return next(self.draws)
        return func(*args, **(kwargs or {}))


def chain_draws(noise: Tensor) -> Iterator[Tensor]:
    """What the published chain draws for noise [T, B, A]; its last step draws once more and multiplies by zero."""
    yield from noise
    yield torch.zeros_like(noise[0])


def give_coin(maximised: int) -> None:
    """Seeds NumPy so that the published update's next coin maximises Q_1 or Q_2."""
    seed = next(s for s in range(100) if (np.random.RandomState(s).uniform() > 0.5) == (maximised == 1))
    np.random.seed(seed)


def matching_agent(published: PublishedAgent, config: dql.Config, device: torch.device) -> dql.DiffusionQL:
    """A DiffusionQL with the published agent's networks."""
    agent = dql.DiffusionQL(S, A, config, device=device)
    for policy, actor in ((agent.policy, published.actor), (agent.ema_policy, published.ema_actor)):
        loaded = dql.DiffusionPolicy.from_published(actor.state_dict(), max_action=config.max_action)
        policy.denoiser.load_state_dict(loaded.denoiser.state_dict())
    agent.critic.load_state_dict(published.critic.state_dict())
    agent.critic_target.load_state_dict(published.critic_target.state_dict())
    return agent


def published_agent(device: torch.device, **options: Any) -> PublishedAgent:
    torch.manual_seed(0)
    agent = PublishedAgent(S, A, **options)
    for module in (agent.actor, agent.ema_actor, agent.critic, agent.critic_target):
        module.to(device)  # in place: the optimizers keep their parameters
    return agent


def check_elements(contender: str, name: str, got: Tensor, want: Tensor, tolerance: float) -> float:
    """The largest error relative to the largest element of `want`.

    Raises:
        AssertionError: above `tolerance`, or not finite; it names the tensor, the worst element and how many are off.
    """
    assert got.shape == want.shape, f"{contender}: {name} is {list(got.shape)}, expected {list(want.shape)}"
    error = (got - want).abs() / want.abs().max().clamp_min(1e-30)
    bad = ~(error <= tolerance)
    if bad.any():
        index = np.unravel_index(int(error.nan_to_num(torch.inf).argmax()), error.shape)
        raise AssertionError(
            f"{contender}: {name} has {int(bad.sum())} of {bad.numel()} elements off, the worst at "
            f"{[int(i) for i in index]}: {float(got[index])!r} for {float(want[index])!r}, error "
            f"{float(error[index]):.1e} of the largest element, allowed {tolerance:.0e}"
        )
    return float(error.max())


def check_norms(contender: str, got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> float:
    """The largest error |got - want| / |want| over the named tensors.

    Raises:
        AssertionError: above `tolerance`, or not finite; it names the tensors.
    """
    assert got.keys() == want.keys(), f"{contender}: tensors {sorted(got)}, expected {sorted(want)}"
    errors = {name: float((got[name] - want[name]).norm() / want[name].norm().clamp_min(1e-30)) for name in want}
    bad = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= tolerance]
    assert not bad, f"{contender}: of {len(errors)} gradients these are off, allowed {tolerance:.0e}: {', '.join(bad)}"
    return max(errors.values())
