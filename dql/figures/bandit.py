"""The paper's two toy figures (arXiv 2208.06193): a bandit whose good actions are four Gaussians.

The data are 10,000 actions around (+-0.8, +-0.8), deviation 0.05, clipped to [-1, 1]; the state is always 0. Their
rewards are normal, deviation 0.5, around a mean for each mode: 3 (upper left), 0 (lower left), 1.5 (upper right) and 5
(lower right). `bandit` clones the data by four methods and improves on them by four, as the authors' toy experiments do
(commit d871f5c): T = 50, 128 hidden units, batch 100, eta 2.5, one sample of a policy for an action.

What differs from these experiments, so that it takes minutes at most:

1. `UPDATES` updates in place of 100,000, at a learning rate of 50 times 3e-4, `LR`, which falls to 0 by a cosine.
2. One critic for TD3+BC, BCQ, BEAR-MMD and Diffusion-QL, learnt before them; there each has its own, learnt beside its
   policy. It needs no policy, for an episode is one step. It must come first, and be flat within the modes: where it
   has not yet learnt that rewards do not grow beyond the data, a policy runs into the corner and takes long to return.
3. DiffusionBC and Diffusion-QL take twice as many updates as the others, for an update is of one noise level of 50.
   Diffusion-QL goes on from DiffusionBC.
4. The figure's BCQ samples are perturbed; there they are the CVAE's own. The diffusion policies' embedding of time has
   16 dimensions, there 4.

How many updates are needed: with 1,500, DiffusionBC had 96 to 98% of its samples within 3 deviations of a mode, with
2,000 97 to 98%, with 4,000 98 to 99% (seeds 0 to 2). From there 2,000 updates of Diffusion-QL left 95 to 97% of all
samples in the best mode on a CPU with AVX2 alone and 92 to 97% on one with AVX-512, which rounds otherwise; 4,000 left
96 to 97% there (seeds 0 to 2; 94% with seed 3). After a critic that was learnt at 2e-2 only 90 to 97% were within any
(seeds 0 to 5). At 6e-3 in place of `LR`, up to 5% of them were in other modes, most in the second-best, where no small
step leads to a better one.

The CVAE is not the same at every seed: its loss is lower where it keeps two modes alone, and there it settles at some
(of the seeds 0 to 4 at 1), as it did after 15,000 updates at the published rate. BEAR-MMD clones here: its estimate of
the MMD, from 10 samples, stays above its threshold, so that lambda climbs to its upper bound, beside which the Q term
counts for nothing.
"""

import contextlib
import csv
import io
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from dql import noise
from dql.agents.diffusion import DiffusionBC, DiffusionQL
from dql.checkpoint import CheckpointError, explain, write_atomically
from dql.config import Config, plain_value
from dql.data import TransitionDataset
from dql.datasets.info import DatasetInfo
from dql.drawing import new_figure, write_figure
from dql.figures import bandit_methods as methods
from dql.networks import TwinCritic
from dql.report import colors_of
from dql.sampler import sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Tensor = torch.Tensor

MODES = ((-0.8, 0.8), (-0.8, -0.8), (0.8, 0.8), (0.8, -0.8))
MODE_NAMES = ("upper left", "lower left", "upper right", "lower right")
REWARDS = (3.0, 0.0, 1.5, 5.0)
STD, REWARD_STD = 0.05, 0.5
RADIUS = 3 * STD
SIZE = 10_000  # actions of the data
BATCH = 100
UPDATES = 2000  # of each method and of the critic
DIFFUSION = 2  # updates of a diffusion policy for one of the others
LR = 1.5e-2  # of every policy
CRITIC_LR = 3e-2  # at 1e-2 the critic's slope carries policies beyond the data
QL_CRITIC_LR = 3e-4  # it has learnt by then
T = 50
SAMPLES = 4000  # of a method, for its numbers
_SHOWN = 1000  # of them, as points
_FRAME = 1.6  # a panel shows actions of +-this
CLONING = ("data", "BC-MLE", "BC-CVAE", "BC-MMD", "DiffusionBC")
IMPROVEMENT = ("data", "TD3+BC", "BCQ", "BEAR-MMD", "Diffusion-QL")
_FILES = ("bandit.csv", *(f"bandit_{name}.{kind}" for name in ("cloning", "improvement") for kind in ("png", "pdf")))


@dataclass(frozen=True)
class PanelNumbers:
    """What stands at a panel."""

    within: float
    """Share of the actions within 3 deviations (0.15) of a mode's middle."""
    modes: tuple[float, ...]
    """Of those within, the share of each mode, in the order of MODES; NaN where none is within."""
    reward: float
    """Mean of `true_rewards`."""


def true_rewards(actions: Tensor) -> Tensor:
    """The mean reward of the mode whose 3-deviation circle holds the action, 0 outside of all [n].

    Outside there are no data, and no reward is defined: 0, the worst mode's, is what a method gets for going there.

    Raises:
        ValueError: actions that are no finite numbers [n, 2].
    """
    mode, is_within = _nearest(actions)
    return torch.tensor(REWARDS)[mode] * is_within


def numbers(actions: Tensor) -> PanelNumbers:
    """Of actions [n, 2].

    Raises:
        ValueError: no actions, or some that are no finite numbers [n, 2].
    """
    if len(actions) == 0:
        raise ValueError("there are no actions to count; draw one at least")
    mode, is_within = _nearest(actions)
    counts = torch.bincount(mode[is_within], minlength=len(MODES)).tolist()
    shares = tuple(count / sum(counts) if sum(counts) else math.nan for count in counts)
    return PanelNumbers(sum(counts) / len(actions), shares, true_rewards(actions).double().mean().item())


def _nearest(actions: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the nearest mode, whether the action is within 3 deviations of it), each [n]."""
    if actions.ndim != 2 or actions.shape[1] != 2 or not bool(actions.isfinite().all()):
        raise ValueError(
            f"actions must be finite numbers [n, 2], got {list(actions.shape)}, "
            f"{int((~actions.isfinite()).sum())} of them not finite; a method that diverged has no panel"
        )
    distances = (actions[:, None].double() - torch.tensor(MODES).double()).norm(dim=2)  # [n, modes]
    nearest = distances.min(dim=1)
    return nearest.indices, nearest.values <= RADIUS + 1e-9  # 1e-9: what is at the circle, to rounding


def bandit_data(seed: int) -> TransitionDataset:
    """The bandit's data: states 0, episodes of one step, so that a critic's target is the reward."""
    mode = torch.arange(SIZE) // (SIZE // len(MODES))
    drawn = noise.normal(noise.derive(seed, "bandit"), 1, SIZE, 3)[0]
    actions = (torch.tensor(MODES)[mode] + STD * drawn[:, :2]).clamp(-1, 1)
    rewards = torch.tensor(REWARDS)[mode] + REWARD_STD * drawn[:, 2]
    states = methods.zero_states(SIZE)
    info = DatasetInfo("bandit", None, None, None, SIZE, rewards.double().numpy(), "box", 1.0)
    return TransitionDataset(states, actions, rewards, states, torch.zeros(SIZE), info)


def bandit(out: Path, *, seed: int = 0, updates: int = UPDATES, console: Console) -> dict[str, PanelNumbers]:
    """Trains all eight methods and writes bandit_cloning and bandit_improvement (.png and .pdf), and bandit.csv.

    Args:
        out: the folder.
        seed: of data, initial weights and all draws; torch's own generator is left alone.
        updates: of each method and of the critic; the diffusion policies take DIFFUSION times as many.
        console: where it speaks.

    Returns:
        the numbers by name, the data's first.

    Raises:
        ValueError: fewer than 1 update, or a seed that is none.
        CheckpointError: the folder cannot be written to.
    """
    out, seed = Path(out), noise.check_seed(seed)
    updates = plain_value("updates", int, updates)
    if updates < 1:
        raise ValueError(f"updates must be at least 1, got {updates}; leave it out for {UPDATES:,}")
    _check_folder(out)
    started = time.perf_counter()
    dataset = bandit_data(seed)
    actions = {"data": dataset.actions} | train(dataset, seed, updates, console)
    panels = {name: numbers(of_method) for name, of_method in actions.items()}
    made = f"Seed {seed}, {updates:,} updates ({DIFFUSION * updates:,} of the diffusion policies)."
    for name, names in (("cloning", CLONING), ("improvement", IMPROVEMENT)):
        figure = draw({n: actions[n] for n in names}, dataset.rewards if name == "improvement" else None, made)
        write_figure(figure, out / f"bandit_{name}")
    write_atomically(out / "bandit.csv", _table(panels, seed, updates).encode())
    console.print(f"{out}: {', '.join(_FILES)}; {time.perf_counter() - started:.0f} s in all", soft_wrap=True)
    return panels


def _check_folder(out: Path) -> None:
    """Before the work, not after it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except FileExistsError as error:
        raise CheckpointError(f"{out} is a file; give a folder for the figures") from error
    except OSError as error:
        raise explain(out, error) from error
    for name in _FILES:
        if (out / name).is_dir():
            raise CheckpointError(f"{out / name} is a folder, where a file is to be written; remove it")


def train(dataset: TransitionDataset, seed: int, updates: int, console: Console) -> dict[str, Tensor]:
    """SAMPLES actions of each of the eight methods, by its name."""
    with _one_thread():
        critic = train_critic(dataset, seed, updates, console)
        trained = train_small(dataset, critic, seed, updates, console)
    trained |= train_diffusion(dataset, critic, seed, updates, console)
    return {name: trained[name] for name in (*CLONING[1:], *IMPROVEMENT[1:])}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For torch's operators on small tensors, which two threads do no sooner, and on busy cores seven times as late."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_critic(dataset: TransitionDataset, seed: int, updates: int, console: Console) -> TwinCritic:
    """The critic from which the four methods improve, frozen."""
    learner = methods.RewardCritic(seed, updates, CRITIC_LR)
    _run("critic", _of_rewards(learner.update, dataset, seed), updates, console)
    return learner.critic.requires_grad_(False)


def train_small(
    dataset: TransitionDataset, critic: TwinCritic, seed: int, updates: int, console: Console
) -> dict[str, Tensor]:
    """SAMPLES actions of each method that is not a diffusion."""
    sizes = (seed, updates, LR)
    of_names: dict[str, methods.Method] = {
        "BC-MLE": methods.GaussianMLE(*sizes),
        "BC-CVAE": methods.CVAE(*sizes),
        "BC-MMD": methods.MMD(*sizes),
        "TD3+BC": methods.TD3BC(*sizes, critic),
        "BCQ": methods.BCQ(*sizes, critic),
        "BEAR-MMD": methods.BEARMMD(*sizes, critic),
    }
    for name, method in of_names.items():
        _run(name, _of_rewards(method.update, dataset, seed), updates, console)
    return {name: method.sample(SAMPLES) for name, method in of_names.items()}


def train_diffusion(
    dataset: TransitionDataset, critic: TwinCritic, seed: int, updates: int, console: Console
) -> dict[str, Tensor]:
    """SAMPLES actions of DiffusionBC, and of Diffusion-QL that goes on from it."""
    sizes = (methods.STATE_DIM, methods.ACTION_DIM)
    config = Config(
        hidden_dim=methods.HIDDEN_DIM,
        T=T,
        eta=methods.ETA,
        lr=LR,
        critic_lr=QL_CRITIC_LR,
        lr_schedule="cosine",
        grad_norm=0.0,
        batch_size=BATCH,
        num_updates=DIFFUSION * updates,
        seed=seed,
    )
    cloner = DiffusionBC(*sizes, config)
    count = config.num_updates
    _run("DiffusionBC", lambda step: cloner.update(dataset.sample(BATCH, seed, step)), count, console)
    learner = DiffusionQL(*sizes, config)
    for policy in (learner.policy, learner.ema_policy):
        policy.load_state_dict(cloner.policy.state_dict())
    for its in (learner.critic, learner.critic_target):
        its.load_state_dict(critic.state_dict())
    # rows go on where the cloning's ended
    _run("Diffusion-QL", lambda step: learner.update(dataset.sample(BATCH, seed, count + step)), count, console)
    with torch.no_grad():
        return {
            name: sample(methods.zero_states(SAMPLES), agent.policy, seed=noise.derive(seed, name))
            for name, agent in (("DiffusionBC", cloner), ("Diffusion-QL", learner))
        }


def _of_rewards(
    update: Callable[[Tensor, Tensor], object], dataset: TransitionDataset, seed: int
) -> Callable[[int], object]:
    def of_step(step: int) -> object:
        rows = dataset.indices(BATCH, seed, step)
        return update(dataset.actions[rows], dataset.rewards[rows])

    return of_step


def _run(name: str, update: Callable[[int], object], updates: int, console: Console) -> None:
    started = time.perf_counter()
    for step in range(updates):
        update(step)
    console.print(f"{name}: {updates:,} updates in {time.perf_counter() - started:.1f} s")


def draw(actions: dict[str, Tensor], rewards: Tensor | None, made: str) -> "Figure":
    """A panel for each name, with the numbers of its actions; the data's in the colours of their rewards, if given;
    below, how it was made."""
    figure, axes = new_figure(1, len(actions), 8.0, 2.7)
    colors = colors_of(actions)
    for ax, (name, points) in zip(axes[0], actions.items(), strict=True):
        found = numbers(points)
        chosen = torch.linspace(0, len(points) - 1, min(len(points), _SHOWN)).long()  # the data come mode by mode
        x, y = points[chosen].numpy().T
        if name == "data" and rewards is not None:
            ax.scatter(x, y, s=3, alpha=0.5, linewidths=0, c=rewards[chosen].numpy(), cmap="viridis")
            labels = [f"r = {reward:g}" for reward in REWARDS]
        else:
            ax.scatter(x, y, s=3, alpha=0.35, linewidths=0, color=colors[name])
            labels = ["" if math.isnan(share) else f"{share:.0%}" for share in found.modes]
        _decorate(ax, labels)
        outside = (points.abs() > _FRAME).any(1).double().mean().item()
        beyond = f"\n{outside:.0%} outside the frame" if outside >= 0.005 else ""
        ax.set_title(name, fontsize=9.5)
        ax.set_xlabel(f"{found.within:.1%} within\ntrue reward {found.reward:.2f}{beyond}", fontsize=8)
    figure.supxlabel(
        "Circles: 3 deviations (0.15) around the data's modes. Within: share of samples in a circle; beside each\n"
        "circle, its share of these. True reward: mean of the circle's mode; 0 outside, where there are no data.\n"
        f"{made}",
        fontsize=7.5,
    )
    return figure


def _decorate(ax: "Axes", labels: list[str]) -> None:
    """Circles of 3 deviations around the modes, each with its label."""
    from matplotlib.patches import Circle

    for (x, y), label in zip(MODES, labels, strict=True):
        ax.add_patch(Circle((x, y), RADIUS, fill=False, linewidth=0.7, edgecolor="black"))
        box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5}
        ax.text(x, y + math.copysign(0.38, y), label, ha="center", va="center", fontsize=8, bbox=box)
    ax.set(xlim=(-_FRAME, _FRAME), ylim=(-_FRAME, _FRAME), xticks=(-1, 0, 1), yticks=(-1, 0, 1), aspect="equal")
    ax.tick_params(labelsize=7, length=2)


def _table(panels: dict[str, PanelNumbers], seed: int, updates: int) -> str:
    """The numbers as CSV; shares of no actions are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    modes = [name.replace(" ", "_") for name in MODE_NAMES]
    writer.writerow(["method", "within", *modes, "true_reward", "seed", "updates"])
    for name, found in panels.items():
        shares = ["" if math.isnan(share) else f"{share:.4f}" for share in found.modes]
        writer.writerow([name, f"{found.within:.4f}", *shares, f"{found.reward:.4f}", seed, updates])
    return text.getvalue()
