"""Pictures and tables from runs. Figures are drawn without a display and written as PNG."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dql.drawing import COLORS, DPI, new_figure
from dql.evaluate import confidence_interval
from dql.policy import DiffusionPolicy
from dql.rundir import RunDir, read_rows
from dql.sampler import sample
from dql.shown import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dql.data import TransitionDataset
    from dql.evaluate import Actor

_OTHER_COLORS = ("#009E73", "#CC79A7", "#56B4E9", "#000000", "#F0E442", "#0072B2", "#D55E00", "#E69F00")
_NEIGHBOURS = 400  # transitions whose states are nearest, as a sample of the data's actions at a state
_SAMPLES = 2000  # actions drawn from a policy
_CHOICES = 200  # actions chosen by an agent, each from its own candidates


def learning_curve(runs: Mapping[str, Path | Sequence[Path]], behaviour_returns: np.ndarray, path: Path) -> "Figure":
    """Return against updates beside the data's mean return: a line for each name, with its 95% interval.

    Of one run the interval is over the episodes of an evaluation: it says how well that agent was measured, and nothing
    of how another seed would fare. Of several runs, which differ by their seed, the line is the mean of their mean
    returns and the interval is over seeds (bootstrap over runs). The legend says which it is. Evaluations that failed
    are left out; of several runs a step is shown that all of them have.

    Args:
        runs: name -> run folder with an evaluations.csv, or several of them.
        behaviour_returns: episode returns of the data [E].
        path: the PNG to write.

    Returns:
        the figure.

    Raises:
        ValueError: no returns, no run, a folder that is not there, or several runs without a step in common.
    """
    path, behaviour_returns = Path(path), np.asarray(behaviour_returns, np.float64)
    if behaviour_returns.ndim != 1 or not len(behaviour_returns) or not np.isfinite(behaviour_returns).all():
        raise ValueError(f"behaviour_returns must be finite numbers [E], got {shown(behaviour_returns)}")
    figure, axes = new_figure(1, 1, 6.4, 4.0)
    ax = axes[0, 0]
    low, high = confidence_interval(behaviour_returns)
    mean = float(np.mean(behaviour_returns))
    ax.axhline(mean, color=COLORS["data"], linestyle="--", label=f"data, mean of {len(behaviour_returns)} episodes")
    ax.axhspan(low, high, color=COLORS["data"], alpha=0.2, linewidth=0)
    for name, color in colors_of(runs).items():
        folders = runs[name]
        several = [folders] if isinstance(folders, (str, Path)) else list(folders)
        steps, means, lows, highs = _curve(name, several)
        kind = "episodes" if len(several) == 1 else f"{len(several)} seeds"
        ax.plot(steps, means, marker="o", markersize=3, color=color, label=f"{name}, interval over {kind}")
        ax.fill_between(steps, lows, highs, color=color, alpha=0.2, linewidth=0)
    ax.set_xlabel("updates")
    ax.set_ylabel("return")
    ax.set_title("Evaluation during training (mean, 95% interval)", fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return figure


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: its own where it has one, else the next that none of the others has."""
    names = list(names)
    free = itertools.cycle([c for c in _OTHER_COLORS if c not in {COLORS.get(name) for name in names}])
    return {name: COLORS.get(name) or next(free) for name in names}


def _curve(name: str, folders: Sequence[str | Path]) -> tuple[list[int], list[float], list[float], list[float]]:
    """(steps, means, lower ends, upper ends) of one run over episodes, of several over runs."""
    tables = []
    if not folders:
        raise ValueError(f"{name!r} has no run; give a run folder, or several")
    for folder in folders:
        rows = read_rows(RunDir(folder).evaluations_path)
        tables.append({int(row["step"]): row for row in rows if np.isfinite(row["return_mean"])})
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} of {name!r} does not exist; give a run folder")
    if len(tables) == 1:
        rows = list(tables[0].values())
        means, lows, highs = ([row[key] for row in rows] for key in ("return_mean", "return_low", "return_high"))
        return list(tables[0]), means, lows, highs
    steps = sorted(set.intersection(*map(set, tables)))
    if not steps:
        raise ValueError(f"the runs of {name!r} have no step in common; draw each under a name of its own")
    returns = [np.array([table[step]["return_mean"] for table in tables]) for step in steps]
    intervals = [confidence_interval(values) for values in returns]
    return steps, [float(r.mean()) for r in returns], [low for low, _ in intervals], [high for _, high in intervals]


def spread_states(dataset: "TransitionDataset", count: int) -> torch.Tensor:
    """`count` states of the data far from each other [count, S]: greedy farthest points of a fixed subsample."""
    states = dataset.states[torch.linspace(0, len(dataset) - 1, min(len(dataset), 2000)).long()]
    scaled = states / states.std(0).clamp_min(1e-6)
    chosen = [int((scaled - scaled.mean(0)).norm(dim=1).argmin())]
    for _ in range(count - 1):
        chosen.append(int(torch.cdist(scaled, scaled[chosen]).amin(1).argmax()))
    return states[chosen]


def _actions_at(state: torch.Tensor, policy: "DiffusionPolicy | Actor", seed: int) -> torch.Tensor:
    """Many actions [n, A] at one state [S]."""
    if not isinstance(policy, DiffusionPolicy):
        return torch.from_numpy(policy.act(state.cpu().expand(_CHOICES, -1).numpy(), seed=seed))
    with torch.no_grad():
        at = state[None].to(policy.device, policy.dtype)
        return sample(at, policy, num_candidates=_SAMPLES, seed=seed)[0]


def action_distribution(
    dataset: "TransitionDataset",
    policies: Mapping[str, "DiffusionPolicy | Actor"],
    path: Path,
    *,
    states: torch.Tensor | None = None,
    titles: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Density over actions at a few states, the data's beside each policy's.

    The data's are the actions of the transitions whose states are nearest; a row of panels an action dimension (at
    most three), a column a state.

    Args:
        dataset: where the data's actions come from.
        policies: name -> a policy, of which samples are shown, or an agent, of which the actions it takes are.
        path: the PNG to write.
        states: [C, S]; None takes four of the data, far from each other.
        titles: one a state.
        seed: of the policies' samples.
    """
    states = spread_states(dataset, 4) if states is None else states.to(dataset.states)
    dims = min(dataset.action_dim, 3)
    bound = dataset.max_action
    edges = np.linspace(-bound, bound, 41)
    figure, axes = new_figure(dims, len(states), 2.6 * len(states), 2.3 * dims + 0.6)
    scale = dataset.states.std(0).clamp_min(1e-6)
    colors = colors_of(["data", *policies])
    for column, state in enumerate(states):
        nearest = ((dataset.states - state) / scale).norm(dim=1).topk(min(_NEIGHBOURS, len(dataset)), largest=False)
        drawn: dict[str, torch.Tensor] = {"data": dataset.actions[nearest.indices]}
        for name, policy in policies.items():
            drawn[name] = _actions_at(state, policy, seed)
        for dim in range(dims):
            ax = axes[dim, column]
            for name, actions in drawn.items():
                values = actions[:, dim].cpu().numpy()
                style: dict[str, Any] = (
                    {"histtype": "stepfilled", "alpha": 0.35}
                    if name == "data"
                    else {"histtype": "step", "linewidth": 1.5}
                )
                ax.hist(values, bins=edges, density=True, color=colors[name], label=name, **style)
            ax.set_yticks([])
            ax.spines[["top", "right", "left"]].set_visible(False)
            ax.set_xlabel("action" if dataset.action_dim == 1 else f"action {dim}", fontsize=8)
            if dim == 0 and titles is not None:
                ax.set_title(titles[column], fontsize=9)
    axes[0, 0].set_ylabel("density")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
