"""What the benches report: the rows of the last table and the further tables; as text and as JSON."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rivals import precision_of

from dql.kernels.cpp import binding

CEILING_SECONDS = 0.05  # several hundred times the loop it takes the best of


@dataclass
class Row:
    """One contender at one problem.

    Attributes:
        times: seconds of each round.
        baseline_times: of the published code in the same rounds; None where it has none.
        worst_error: of the closeness check that came before.
        flops: floating point operations of a call; None where nobody counts them.
        ceiling: FLOP/s that no product exceeds here, measured right before and after; see `fma_ceiling`.
    """

    problem: str
    contender: str
    times: list[float]
    baseline_times: list[float] | None
    worst_error: float | None = None
    flops: float | None = None
    ceiling: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def speedups(self) -> list[float] | None:
        """Baseline / contender of each round."""
        if self.baseline_times is None:
            return None
        return [b / t for b, t in zip(self.baseline_times, self.times, strict=True)]

    @property
    def speedup(self) -> float | None:
        return statistics.median(self.speedups) if self.speedups else None

    @property
    def share_of_ceiling(self) -> float | None:
        return self.flops / self.median / self.ceiling if self.flops and self.ceiling else None

    @property
    def precision(self) -> str:
        return precision_of(self.contender)

    @property
    def is_rival(self) -> bool:
        """What a user would take: torch.compile, JAX, ONNX Runtime, OpenVINO; neither the published code nor dql."""
        return self.contender != "published" and not self.contender.startswith("dql")


Tables = dict[str, list[dict[str, Any]]]
"""The further tables by title, each a list of rows: column -> text or number, or a list of them."""


def fma_ceiling(bf16: bool) -> float | None:
    """FLOP/s of multiply-adds on registers alone: one core's, times the number of threads.

    None without the native extension, or in bf16 on a CPU that cannot multiply it.
    """
    if binding.unavailable() is not None:
        return None
    return binding.fma_ceiling(CEILING_SECONDS, bf16) * torch.get_num_threads() or None


def _problems(rows: list[Row]) -> dict[str, list[Row]]:
    problems: dict[str, list[Row]] = {}
    for row in rows:
        problems.setdefault(row.problem, []).append(row)
    return problems


def _ratio(row: Row, other: Row | None) -> float | None:
    """How many times faster `row` is than `other`, through the baseline that both ran beside."""
    if other is None or row.speedup is None or other.speedup is None:
        return None
    return row.speedup / other.speedup


def best_rival(row: Row, rows: list[Row]) -> Row | None:
    """The fastest of what a user would take instead who needs the row's precision: one in bf16 only for bf16."""
    allowed = [r for r in rows if r is not row and r.is_rival and r.speedup is not None]
    allowed = [r for r in allowed if r.precision in ("fp32", row.precision)]
    return max(allowed, key=lambda r: r.speedup or 0.0, default=None)


def _ratios(row: Row, rows: list[Row]) -> dict[str, float | None]:
    others = [r for r in rows if r is not row and r.speedup is not None]
    best = max(others, key=lambda r: r.speedup or 0.0, default=None)
    eager = next((r for r in others if r.contender == "dql-eager"), None)
    rival = best_rival(row, rows)
    return {
        "published": row.speedup,
        "eager": _ratio(row, eager),
        "best_other": _ratio(row, best),
        "best_rival": _ratio(row, rival),
    }


def write_rows(rows: list[Row], write: Callable[[str], object]) -> None:
    """The last table, a problem after the other."""
    names = f"{'dql-eager':>12}{'best other':>12}{'best rival':>12}"
    write(f"{'':28}{'median us':>12}{'published':>12}{'quartiles':>18}{names}{'% of FMA':>10}{'rounds':>8}")
    for problem, group in _problems(rows).items():
        write(problem)
        for row in group:
            ratios = [f"{'' if r is None else f'{r:.2f}x':>12}" for r in _ratios(row, group).values()]
            low, _, high = statistics.quantiles(row.speedups) if row.speedups else (0.0, 0.0, 0.0)
            spread = f"{f'{low:.2f} .. {high:.2f}' if row.speedups else '':>18}"
            share = row.share_of_ceiling
            ceiling = f"{'' if share is None else f'{100 * share:.1f}':>10}"
            name, median = f"  {row.contender:26}", f"{row.median * 1e6:>12,.1f}"
            write(name + median + ratios[0] + spread + "".join(ratios[1:]) + ceiling + f"{len(row.times):>8}")


def write_table(rows: list[dict[str, Any]], write: Callable[[str], object]) -> None:
    """One of the further tables; its columns are the first row's."""
    cells = [[name.replace("_", " ") for name in rows[0]], *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    for line in cells:
        write("".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " .. ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return "" if value is None else str(value)


def row_reports(rows: list[Row]) -> list[dict[str, Any]]:
    return [_row_report(row, group) for group in _problems(rows).values() for row in group]


def _row_report(row: Row, group: list[Row]) -> dict[str, Any]:
    rival = best_rival(row, group)
    return {
        "problem": row.problem,
        "contender": row.contender,
        "median_us": row.median * 1e6,
        "quartiles_us": [q * 1e6 for q in statistics.quantiles(row.times)],
        "min_us": min(row.times) * 1e6,
        "rounds": len(row.times),
        "baseline_median_us": statistics.median(row.baseline_times) * 1e6 if row.baseline_times else None,
        "speedup_over": _ratios(row, group),
        "best_rival": rival.contender if rival else None,
        "speedup_over_published_quartiles": statistics.quantiles(row.speedups) if row.speedups else None,
        "flops": row.flops,
        "fma_ceiling_gflops": None if row.ceiling is None else row.ceiling / 1e9,
        "share_of_fma_ceiling": row.share_of_ceiling,
        "worst_error": row.worst_error,
    }
