"""Pictures and tables from runs. Figures are drawn without a display and written as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dql.evaluate import confidence_interval
from dql.policy import DiffusionPolicy
from dql.rundir import RunDir, read_rows
from dql.sampler import sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dql.data import TransitionDataset
    from dql.evaluate import Actor

# One colour a subject in every figure, distinguishable without red-green vision (Okabe and Ito).
COLORS = {"data": "#7f7f7f", "DiffusionBC": "#0072B2", "Diffusion-QL": "#D55E00", "Diffusion-QL, acting": "#E69F00"}
_NEIGHBOURS = 400  # transitions whose states are nearest, as a sample of the data's actions at a state
_SAMPLES = 2000  # actions drawn from a policy
_CHOICES = 200  # actions chosen by an agent, each from its own candidates


def _figure(rows: int, columns: int, width: float, height: float) -> tuple["Figure", np.ndarray]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def learning_curve(runs: Mapping[str, Path], behaviour_returns: np.ndarray, path: Path) -> None:
    """Return against updates, a line and its interval over episodes a run, beside the data's mean return.

    Args:
        runs: name -> run folder with an evaluations.csv.
        behaviour_returns: episode returns of the data [E].
        path: the PNG to write.
    """
    figure, axes = _figure(1, 1, 6.4, 4.0)
    ax = axes[0, 0]
    low, high = confidence_interval(behaviour_returns)
    mean = float(np.mean(behaviour_returns))
    ax.axhline(mean, color=COLORS["data"], linestyle="--", label=f"data, mean of {len(behaviour_returns)} episodes")
    ax.axhspan(low, high, color=COLORS["data"], alpha=0.2, linewidth=0)
    for name, folder in runs.items():
        rows = read_rows(RunDir(folder).evaluations_path)
        step, means, lows, highs = (
            [row[key] for row in rows] for key in ("step", "return_mean", "return_low", "return_high")
        )
        ax.plot(step, means, marker="o", markersize=3, color=COLORS.get(name), label=name)
        ax.fill_between(step, lows, highs, color=COLORS.get(name), alpha=0.2, linewidth=0)
    ax.set_xlabel("updates")
    ax.set_ylabel("return")
    ax.set_title("Evaluation during training (mean, 95% interval over episodes)", fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


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
    figure, axes = _figure(dims, len(states), 2.6 * len(states), 2.3 * dims + 0.6)
    scale = dataset.states.std(0).clamp_min(1e-6)
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
                ax.hist(values, bins=edges, density=True, color=COLORS.get(name), label=name, **style)
            ax.set_yticks([])
            ax.spines[["top", "right", "left"]].set_visible(False)
            ax.set_xlabel("action" if dataset.action_dim == 1 else f"action {dim}", fontsize=8)
            if dim == 0 and titles is not None:
                ax.set_title(titles[column], fontsize=9)
    axes[0, 0].set_ylabel("density")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
