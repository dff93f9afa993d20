"""Prints the tables of docs/claims.md from what its runs wrote: python bench/claims.py docs/results

A folder a dataset, in it ALGORITHM-seedN.csv, the evaluations.csv of that run; and a folder `ablations` of the CSVs
that `dql figure eta`, `steps` and `candidates` wrote. A run's score is the mean of its last three evaluations; beside
the mean over seeds stands half the 95% t interval over seeds, and every seed's score.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from dql.evaluate import seed_interval
from dql.rundir import read_rows

LAST = 3
NAMES = {
    "bc": "BC",
    "diffusion-bc": "DiffusionBC",
    "td3-bc": "TD3+BC",
    "iql": "IQL",
    "edp": "EDP's one-step action",
    "diffusion-ql": "Diffusion-QL",
}


def score(path: Path) -> float:
    """Mean return of the last three evaluations of a run."""
    returns = [row["return_mean"] for row in read_rows(path)]
    if len(returns) < LAST or not np.isfinite(returns[-LAST:]).all():
        raise ValueError(f"{path} has not {LAST} evaluations at its end that succeeded")
    return float(np.mean(returns[-LAST:]))


def scores(folder: Path) -> dict[str, list[float]]:
    """Of each algorithm, in the order of NAMES, the scores of its seeds."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for path in folder.glob("*.csv"):
        if match := re.fullmatch(r"(.+)-seed(\d+)\.csv", path.name):
            found[match[1]][int(match[2])] = score(path)
    return {name: [found[name][seed] for seed in sorted(found[name])] for name in NAMES if name in found}


def cell(values: list[float]) -> str:
    """ "mean ± half interval (seed, seed, seed)"."""
    mean, (low, _) = float(np.mean(values)), seed_interval(np.array(values))
    interval = f" ± {mean - low:,.0f}" if len(values) > 1 else ""
    return f"{mean:,.0f}{interval} ({', '.join(f'{v:,.0f}' for v in values)})"


def table(folder: Path) -> str:
    """The table as Markdown."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and scores(path))
    of = {path.name: scores(path) for path in folders}
    lines = [f"| | {' | '.join(of)} |", f"|---{'|---' * len(of)}|"]
    for name, text in NAMES.items():
        if any(name in found for found in of.values()):
            cells = (cell(found[name]) if name in found else "not run" for found in of.values())
            lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation_table(path: Path) -> str:
    """The table of what `dql figure` wrote, as Markdown: a row a value, a column a way to act."""
    rows = read_rows(path)
    value = next(iter(rows[0]))
    ways: dict[float | None, str] = {None: "return"}  # of num_candidates, the ways to act are the values themselves
    if value != "num_candidates":
        numbers = sorted({row["candidates"] for row in rows}, reverse=True)
        ways = {n: "policy alone" if n == 1 else f"one of {n:.0f} candidates" for n in numbers}
    timed = ["ms an update"] if value == "T" else []
    head = [value.replace("num_", ""), *ways.values(), *timed]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for which in sorted({row[value] for row in rows}):
        these = sorted((row for row in rows if row[value] == which), key=lambda row: row["seed"])
        cells = [cell([row["return_mean"] for row in these if way in (None, row["candidates"])]) for way in ways]
        if timed:
            cells.append(f"{np.mean([row['ms_per_update'] for row in these]):.1f}")
        lines.append(f"| {which:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python bench/claims.py FOLDER, one with a folder of runs' CSVs for each dataset")
    print(table(Path(sys.argv[1])))
    for name in ("eta", "steps", "candidates"):
        if (path := Path(sys.argv[1]) / "ablations" / f"{name}.csv").exists():
            print(f"\n{ablation_table(path)}")
