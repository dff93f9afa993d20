"""`dql figure steps | eta | candidates`: what T, eta and the number of candidates do to a score, over seeds.

steps       the denoising steps T that a policy is trained and run with: return, and time of an update
eta         the weight of the Q term, from 0 (behaviour cloning, the critic learnt beside it) to a hundred times as much
candidates  how many actions an agent draws to act, of which one is chosen by softmax(min Q): the same agents throughout

A score is the mean of a run's last three evaluations. Each value has a run a seed; a dot is a seed, the line their
mean, the band a t interval over seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console

from dql.config import Config
from dql.data import load_dataset
from dql.drawing import COLORS, new_figure, write_figure
from dql.evaluate import seed_interval
from dql.figures.cells import LAST, Cell, check_cells, run_all, run_config, write_csv
from dql.rundir import RunError
from dql.schedule import NoiseSchedule
from dql.shown import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Name = Literal["steps", "eta", "candidates"]
FIELDS = {"steps": "T", "eta": "eta", "candidates": "num_candidates"}
_ALONE = 1  # candidates: the policy without the critic's choice


@dataclass(frozen=True)
class Settings:
    """What all runs of a figure share.

    Attributes:
        dataset: as `RunConfig.dataset`.
        seeds: of training.
        updates: of each run.
        T, eta, num_candidates: where the figure does not vary it.
        hidden_dim, batch_size, reward_tune: as in `Config`.
        evaluations: of a run, the last three of which make its score.
        episodes: of an evaluation.
        env, eval_max_steps: as in `RunConfig`.
    """

    dataset: str
    seeds: tuple[int, ...] = (0, 1, 2)
    updates: int = 20_000
    T: int = 5
    eta: float = 1.0
    num_candidates: int = 50
    evaluations: int = 8
    episodes: int = 20
    hidden_dim: int = 256
    batch_size: int = 256
    reward_tune: str = "none"
    env: str | None = None
    eval_max_steps: int | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different numbers, got {shown(self.seeds)}; use --seeds 0-2")
        for name, least in (("updates", 1), ("evaluations", LAST), ("episodes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.updates < self.evaluations:
            raise ValueError(f"{self.updates} updates are fewer than {self.evaluations} evaluations; ask for more")
        if self.updates % self.evaluations:  # a last one beside it would count the same agent twice
            near = (self.updates + self.evaluations // 2) // self.evaluations * self.evaluations
            raise ValueError(
                f"{self.updates} updates cannot be divided by {self.evaluations} evaluations; use --updates {near}"
            )


def default_values(name: Name, settings: Settings) -> tuple[float, ...]:
    """T in 1 .. 20; eta 0 and two decades around the settings' own; 1, 10 and 50 candidates."""
    if name == "steps":
        return (1, 2, 5, 10, 20)
    if name == "eta":
        middle = settings.eta or 1.0
        return (0.0, *(float(f"{middle * 10**power:.3g}") for power in (-1, -0.5, 0, 0.5, 1)))
    return (1, 10, 50)


def cells_of(name: Name, values: Sequence[float], settings: Settings, out: Path) -> dict[tuple[float, int], Cell]:
    """(value, seed) -> its cell. Runs that figures have in common lie in the same folder, and are done once."""
    cells = {}
    for value in values:
        for seed in settings.seeds:
            fields = {"T": settings.T, "eta": settings.eta, "num_candidates": settings.num_candidates}
            if name != "candidates":
                fields[FIELDS[name]] = value if name == "eta" else int(value)
            numbers = {int(fields["num_candidates"]), _ALONE}
            if name == "candidates":
                numbers |= {Config(num_candidates=int(value)).num_candidates for value in values}  # which refuses 0
            agent = Config(
                num_updates=settings.updates,
                seed=seed,
                hidden_dim=settings.hidden_dim,
                batch_size=settings.batch_size,
                reward_tune=settings.reward_tune,  # type: ignore[arg-type]
                **fields,  # type: ignore[arg-type]
            )
            NoiseSchedule(agent.beta_schedule, agent.T)  # which refuses what is no number of steps
            run = run_config(
                settings.dataset,
                out / "runs" / f"T{agent.T}-eta{agent.eta:g}-N{agent.num_candidates}-seed{seed}",
                updates=settings.updates,
                evaluations=settings.evaluations,
                episodes=settings.episodes,
                agent=agent,
                env=settings.env,
                eval_max_steps=settings.eval_max_steps,
            )
            cells[value, seed] = Cell(run, tuple(sorted(numbers, reverse=True)))
    return cells


def ablation(
    name: Name,
    settings: Settings,
    out: Path,
    *,
    values: Sequence[float] | None = None,
    jobs: int = 1,
    console: Console,
) -> list[Path]:
    """Trains what is missing, writes OUT/NAME.csv, and draws OUT/NAME.png and .pdf.

    Args:
        name: steps, eta or candidates.
        settings: of all runs.
        out: folder of the runs and pictures.
        values: instead of `default_values`.
        jobs: runs at once, each on one thread.
        console: where it speaks.

    Returns:
        the files.

    Raises:
        ValueError: a value that makes no agent.
        RunError: a folder in `out` holds a run with other settings or of other data; or runs failed: the others are
            drawn.
        DatasetError: the dataset cannot be used.
        KeyboardInterrupt: a signal; the same call goes on.
    """
    values = sorted(set(default_values(name, settings) if values is None else values))
    if not values:
        raise ValueError(f"no values of {FIELDS[name]}; give some, or leave --values out")
    if name != "eta" and any(value != int(value) for value in values):
        raise ValueError(f"{FIELDS[name]} must be whole numbers, got {', '.join(f'{v:g}' for v in values)}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    cells = cells_of(name, values, settings, out)
    data = load_dataset(settings.dataset, reward_tune=settings.reward_tune)
    check_cells([*cells.values()], data)
    distinct = list({cell.results_path: cell for cell in cells.values()}.values())
    console.print(
        f"{name}: {len(distinct)} runs of {settings.updates:,} updates on {settings.dataset}, {jobs} at once",
        soft_wrap=True,
    )

    def label(cell: Cell) -> str:
        agent = cell.run.agent
        return f"T = {agent.T}, eta = {agent.eta:g}, seed {agent.seed}"

    failed = run_all(distinct, jobs=jobs, console=console, name=label)
    rows = []
    for (value, seed), cell in cells.items():
        for number, result in cell.results().items():
            # the file may have what another figure asked for, too
            if number == value if name == "candidates" else number in cell.candidates:
                rows.append({FIELDS[name]: value, "seed": seed, "candidates": number} | vars(result))
    if not rows:
        raise RunError(f"every run failed, the last because: {failed[-1][1]}")
    write_csv(out / f"{name}.csv", rows)
    figure = draw(name, rows, data.info.episode_returns, settings)
    written = [out / f"{name}.csv", *write_figure(figure, out / name)]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(distinct)} runs failed, and {written[1]} is without them; mend that, and the same "
            f"command does them alone; the last because: {failed[-1][1]}"
        )
    return written


def draw(name: Name, rows: Sequence[dict[str, Any]], behaviour_returns: np.ndarray, settings: Settings) -> "Figure":
    """The picture of the rows of NAME.csv."""
    panels = 2 if name == "steps" else 1
    figure, axes = new_figure(1, panels, 4.6 * panels + 0.6, 4.0)
    ax = axes[0, 0]
    values = sorted({row[FIELDS[name]] for row in rows})
    if len(behaviour_returns):  # else no episode of the data is whole
        ax.axhline(behaviour_returns.mean(), color=COLORS["data"], linestyle="--", label="data, mean return")
    if name == "candidates":
        _line(ax, rows, values, name, "return_mean", COLORS["Diffusion-QL"], "chosen by softmax(min Q)")
    else:
        for number in sorted({row["candidates"] for row in rows}, reverse=True):
            color = COLORS["DiffusionBC"] if number == _ALONE else COLORS["Diffusion-QL"]
            text = "policy alone" if number == _ALONE else f"one of {number} candidates"
            these = [row for row in rows if row["candidates"] == number]
            _line(ax, these, values, name, "return_mean", color, text)
    ax.set_ylabel("return")
    titles = {"steps": "Denoising steps T", "eta": "Weight of the Q term", "candidates": "Candidates to act"}
    ax.set_title(f"{titles[name]}: {settings.dataset}", fontsize=10)
    if name == "steps":
        _line(
            axes[0, 1],
            rows,
            values,
            name,
            "ms_per_update",
            "#000000",
            f"an update of {settings.batch_size} transitions",
        )
        axes[0, 1].set_ylabel("milliseconds, one CPU thread")
        axes[0, 1].set_ylim(bottom=0)
        axes[0, 1].set_title("Time of an update", fontsize=10)
    for panel in axes[0]:
        panel.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        panel.set_xlabel({"steps": "T", "eta": "eta", "candidates": "candidates"}[name])
        panel.margins(x=0.12)
        panel.legend(frameon=False, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    # By the seeds and the data: the interval of three seeds that differ would leave nothing else to see.
    seen = [row["return_mean"] for row in rows if np.isfinite(row["return_mean"])]
    seen += [behaviour_returns.mean()] if len(behaviour_returns) else []
    room = max(0.25 * (max(seen) - min(seen)), 1e-3)
    ax.set_ylim(min(seen) - room, max(seen) + room)
    if name == "eta" and values[0] == 0 and len(values) > 1:
        for at, text, side in ((0, "behaviour cloning", "left"), (len(values) - 1, "improvement", "right")):
            ax.annotate(text, (at, 0.02), xycoords=("data", "axes fraction"), ha=side, fontsize=9, style="italic")
    seeds = {len({row["seed"] for row in rows if row[FIELDS[name]] == value}) for value in values}
    number = f"{max(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    band = f"band: 95% t interval over {number} seeds" if max(seeds) > 1 else "one seed: no interval"
    if min(seeds) == 1 < max(seeds):
        band += ", none where there is one"
    others = [f"T = {settings.T}"] * (name != "steps") + [f"eta = {settings.eta:g}"] * (name != "eta")
    figure.supxlabel(
        f"{', '.join(others)}, {settings.updates:,} updates; mean of the last {LAST} evaluations of "
        f"{settings.episodes} episodes\n{band}",
        fontsize=8,
        color="#555555",
    )
    return figure


def _line(
    ax: Any, rows: Sequence[dict[str, Any]], values: Sequence[float], name: Name, key: str, color: str, label: str
) -> None:
    """A dot a seed, their mean as a line, the interval as a band; values stand side by side, however far apart."""
    of = {value: np.array([row[key] for row in rows if row[FIELDS[name]] == value]) for value in values}
    of = {value: found[np.isfinite(found)] for value, found in of.items()}
    places = [i for i, value in enumerate(values) if len(of[value])]
    means = [float(of[values[i]].mean()) for i in places]
    nothing = (np.nan, np.nan)
    bounds = np.array([seed_interval(of[values[i]]) if len(of[values[i]]) > 1 else nothing for i in places])
    ax.plot(places, means, color=color, marker="o", markersize=4, label=label)
    ax.fill_between(places, bounds[:, 0], bounds[:, 1], color=color, alpha=0.15, linewidth=0)  # a gap at NaN
    for i in places:
        ax.plot(np.full(len(of[values[i]]), i), of[values[i]], ".", color=color, markersize=4, alpha=0.6)
