"""`dql figure bandit | steps | eta | candidates`: the flags."""

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from dql.figures.ablations import Settings, ablation
from dql.figures.bandit import UPDATES, bandit
from dql.terminal import make_console
from dql.train import dataset_name

_MOST_SEEDS = 1000
_FIGURE_HELP = """usage: dql figure NAME ...

  bandit                        the paper's two toy figures: four Gaussians, cloned and improved on, eight methods
  steps | eta | candidates      --dataset ID: what that number does to the score, over seeds

dql figure NAME --help tells more."""


@dataclass(frozen=True)
class AblationArguments:
    """Train agents that differ in one number, over seeds, and draw their scores. The same command goes on where it
    stopped."""

    dataset: str
    """A Minari dataset id, ids joined by +, a folder of one, or a D4RL .hdf5 file."""
    out: Path | None = None
    """Folder of the runs and pictures, by default runs/figures-<dataset>; figures share the runs that both need."""
    seeds: str = "0-2"
    """Of training: numbers and ranges, joined by commas."""
    values: str | None = None
    """Instead of the figure's own, joined by commas."""
    updates: int = 20_000
    """Of each run."""
    T: int = 5
    """Diffusion steps, where the figure does not vary them."""
    eta: float = 1.0
    """Weight of the Q term; the figure of eta has two decades around it."""
    num_candidates: int = 50
    """Actions drawn to act."""
    evaluations: int = 8
    """Of each run; the last three make its score."""
    episodes: int = 20
    """Episodes of an evaluation."""
    hidden_dim: int = 256
    """Width of the hidden layers."""
    batch_size: int = 256
    """Transitions per update."""
    reward_tune: str = "none"
    """Transformation of the rewards, as in dql train."""
    env: str | None = None
    """Gymnasium id to evaluate in, where the dataset names none."""
    eval_max_steps: int | None = None
    """Steps after which an episode of an evaluation is cut."""
    jobs: int = os.cpu_count() or 1
    """Runs at once, each on one thread."""


def figure(arguments: list[str]) -> int:
    """`dql figure bandit | steps | eta | candidates`."""
    name, rest = (arguments[0] if arguments else "--help"), arguments[1:]
    if name in ("-h", "--help"):
        print(_FIGURE_HELP)
        return 0
    if name == "bandit":
        return tyro.cli(_bandit, args=rest, prog="dql figure bandit")
    if name not in ("steps", "eta", "candidates"):
        raise ValueError(f"unknown figure {name!r}; dql figure draws bandit, steps, eta and candidates")
    args = tyro.cli(AblationArguments, args=rest, prog=f"dql figure {name}")
    shared = {k: v for k, v in vars(args).items() if k not in ("out", "seeds", "values", "jobs")}
    settings = Settings(seeds=_seeds(args.seeds), **shared)
    values = None if args.values is None else [_number(text) for text in args.values.split(",")]
    console = make_console()
    out = args.out or Path("runs") / f"figures-{dataset_name(args.dataset)}"
    written = ablation(name, settings, out, values=values, jobs=args.jobs, console=console)  # type: ignore[arg-type]
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)
    return 0


def _bandit(out: Path = Path("runs/bandit"), seed: int = 0, updates: int = UPDATES) -> int:
    """Clone the paper's bandit of four Gaussians by four methods, improve on it by four, and draw both figures.

    Args:
        out: Folder of the pictures and their numbers.
        seed: Of data, initial weights and all draws.
        updates: Of each method; the diffusion policies take twice as many.
    """
    bandit(out, seed=seed, updates=updates, console=make_console())
    return 0


def _seeds(text: str) -> tuple[int, ...]:
    """ "0-2,7" -> (0, 1, 2, 7)."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 40:
            raise ValueError(f"--seeds takes numbers and ranges joined by commas, such as 0-2,7, not {text!r}")
        ends = (int(first), int(last or first))
        if not 0 <= ends[1] - ends[0] < _MOST_SEEDS:
            raise ValueError(f"--seeds takes up to {_MOST_SEEDS} ascending numbers, not {part.strip()!r}")
        seeds += range(ends[0], ends[1] + 1)
    return tuple(seeds)


def _number(text: str) -> float:
    try:
        number = float(text)
        if not -1e9 < number < 1e9:
            raise ValueError
    except ValueError:
        raise ValueError(f"--values takes numbers joined by commas, not {text.strip()!r}") from None
    return number
