"""Pictures and tables from runs. Figures are drawn without a display and written as PNG."""

import colorsys
import math
from collections.abc import Iterable, Mapping, Sequence
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
# Of names that are not among these, in turn (Okabe and Ito's others, then Tol's): none is a colour of those above.
_FURTHER_COLORS = ("#009E73", "#CC79A7", "#56B4E9", "#000000", "#882255", "#999933", "#332288")
_GOLDEN = (math.sqrt(5) - 1) / 2  # of a turn from hue to hue: none comes back
# Student's t, two-sided 95%, of 1, 2, ... degrees of freedom; of more, an expansion about 1.96 is within 0.2%
_T95 = (12.7062, 4.3027, 3.1824, 2.7764)
_NEIGHBOURS = 400  # transitions whose states are nearest, as a sample of the data's actions at a state
_SAMPLES = 2000  # actions drawn from a policy
_CHOICES = 200  # actions chosen by an agent, each from its own candidates


def _figure(rows: int, columns: int, width: float, height: float) -> tuple["Figure", np.ndarray]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def colors(names: Iterable[str]) -> dict[str, str]:
    """A colour of its own for each name, those of COLORS where it has them; the same names get the same."""
    chosen: dict[str, str] = {}
    further = 0
    for name in names:
        if name in COLORS:
            chosen[name] = COLORS[name]
            continue
        if further < len(_FURTHER_COLORS):
            chosen[name] = _FURTHER_COLORS[further]
        else:
            red, green, blue = colorsys.hsv_to_rgb(further * _GOLDEN % 1.0, 0.9, 0.65)
            chosen[name] = f"#{round(255 * red):02X}{round(255 * green):02X}{round(255 * blue):02X}"
        further += 1
    return chosen


def seed_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95% interval of the mean over training seeds, of which there are few: a bootstrap would be too narrow.

    Args:
        values: a number for each seed [n], n >= 2.
    """
    values = np.asarray(values, np.float64)
    freedom = len(values) - 1
    if freedom < 1:
        raise ValueError("an interval over seeds needs two at least: one says nothing about another")
    if freedom <= len(_T95):
        t = _T95[freedom - 1]
    else:  # Cornish and Fisher
        z = 1.959964
        t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    half = t * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def learning_curve(runs: Mapping[str, Path | Sequence[Path]], behaviour_returns: np.ndarray, path: Path) -> None:
    """Return against updates, a line and its band a name, beside the data's mean return.

    What a band is stands in the legend. Of one run it is the interval over the episodes of an evaluation: it covers
    their luck, not the training seed's, and says nothing about another run. Of several it is the interval over the
    runs (`seed_interval`), each of which counts as its mean return.

    Args:
        runs: name -> run folder with an evaluations.csv; or several, one for each training seed, of which the updates
            are drawn at which all were evaluated.
        behaviour_returns: episode returns of the data [E].
        path: the PNG to write.

    Raises:
        ValueError: a name without a run, or with the same one twice.
    """
    figure, axes = _figure(1, 1, 6.4, 4.0)
    ax = axes[0, 0]
    low, high = confidence_interval(behaviour_returns)
    mean = float(np.mean(behaviour_returns))
    label = f"data, mean and interval of {len(behaviour_returns)} episodes"
    ax.axhline(mean, color=COLORS["data"], linestyle="--", label=label)
    ax.axhspan(low, high, color=COLORS["data"], alpha=0.2, linewidth=0)
    chosen = colors(runs)
    for name, given in runs.items():
        folders = [given] if isinstance(given, str | Path) else list(given)
        if len({Path(folder).resolve() for folder in folders}) != len(folders) or not folders:
            raise ValueError(f"{name}: its runs must be one or more different folders, got {[*map(str, folders)]}")
        step, means, lows, highs, of = _curve(folders)
        ax.plot(step, means, marker="o", markersize=3, color=chosen[name], label=f"{name}, {of}")
        ax.fill_between(step, lows, highs, color=chosen[name], alpha=0.2, linewidth=0)
    ax.set_xlabel("updates")
    ax.set_ylabel("return")
    ax.set_title("Evaluation during training: mean and 95% interval", fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _curve(folders: Sequence[Path]) -> tuple[list[float], list[float], list[float], list[float], str]:
    """Steps, means, lower and upper ends of the band, and what the band is over."""
    runs = [{row["step"]: row for row in read_rows(RunDir(folder).evaluations_path)} for folder in folders]
    if len(runs) == 1:
        rows = list(runs[0].values())
        step, means, lows, highs = (
            [row[key] for row in rows] for key in ("step", "return_mean", "return_low", "return_high")
        )
        episodes = {int(row["episodes"]) for row in rows if "episodes" in row}
        number = f"{episodes.pop()} " if len(episodes) == 1 else ""
        return step, means, lows, highs, f"one run, over {number}episodes"
    step = sorted(set.intersection(*(set(rows) for rows in runs)))
    returns = np.array([[rows[at]["return_mean"] for rows in runs] for at in step]).reshape(len(step), len(runs))
    bands = [seed_interval(row) for row in returns]
    lows, highs = [low for low, _ in bands], [high for _, high in bands]
    return step, returns.mean(axis=1).tolist(), lows, highs, f"over {len(runs)} runs"


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
    chosen = colors(["data", *policies])
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
                ax.hist(values, bins=edges, density=True, color=chosen[name], label=name, **style)
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
