"""Prints a bench report as the README's tables: python bench/table.py bench/results/REPORT.json"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GPU_TITLE = "device time and whole-call time on a GPU"
MATMUL_TITLE = "matrix product 4096 x 4096 x 4096"
COPY_TITLE = "copy of 1 GiB, read and written"


def time(us: float) -> str:
    if us < 99.95:
        return f"{us:.1f} us"
    return f"{us:.0f} us" if us < 999.5 else f"{us / 1000:.3g} ms"


def race_table(rows: list[Row]) -> str:
    """A line a problem, a column a contender; of torch.compile and of the exported graph's runtimes the fastest.

    A time is a contender's median. In brackets are the medians over pairs: how many times faster than the published
    code, and than the fastest of what a user would take instead, all of it float32.
    """
    problems: dict[str, dict[str, Row]] = {}
    for row in rows:
        problems.setdefault(row["problem"], {})[row["contender"]] = row
    problems = {name: group for name, group in problems.items() if "published" in group}
    if not problems:
        return ""
    names = dict.fromkeys(name for group in problems.values() for name in group)
    ours = sorted((name for name in names if name.startswith("dql-")), key=lambda name: name != "dql-eager")
    columns = {
        "published": ["published"],
        "torch.compile": [name for name in names if name.startswith("compile-")],
        "ONNX Runtime or OpenVINO": [name for name in names if name.startswith(("onnxruntime", "openvino"))],
    } | {_title(name): [name] for name in ours}
    columns = {title: members for title, members in columns.items() if members}
    lines = [["", *columns]]
    for problem, group in problems.items():
        cells = [_race_cell([group[name] for name in members if name in group]) for members in columns.values()]
        lines.append([problem, *cells])
    return _markdown(lines)


def _title(contender: str) -> str:
    """dql-cpp-bf16 is `cpp`, bf16."""
    backend, _, precision = contender.removeprefix("dql-").partition("-")
    return f"`{backend}`, {precision}" if precision else f"`{backend}`"


def _race_cell(rows: list[Row]) -> str:
    if not rows:
        return ""
    row = max(rows, key=lambda row: row["speedup_over"]["published"])
    name, ratios = row["contender"], row["speedup_over"]
    if name == "published":
        return time(row["median_us"])
    if not name.startswith("dql-"):
        return f"{time(row['median_us'])} ({name.removeprefix('compile-')})"
    over = [f"{ratios[key]:.3g}x" for key in ("published", "best_rival") if ratios.get(key) is not None]
    return f"{time(row['median_us'])} ({', '.join(over)})"


def ceiling_table(rows: list[Row]) -> str:
    """How much of the CPU's multiply-adds the native forward pass uses, in percent."""
    shares = [row for row in rows if row.get("share_of_fma_ceiling") and row["contender"].startswith("dql-cpp")]
    if not shares:
        return ""
    lines = [["", "contender", "% of FMA ceiling", "ceiling, GFLOP/s"]]
    for row in shares:
        share, ceiling = f"{100 * row['share_of_fma_ceiling']:.1f}", f"{row['fma_ceiling_gflops']:.0f}"
        lines.append([row["problem"], row["contender"], share, ceiling])
    return _markdown(lines)


def gpu_table(rows: list[Row]) -> str:
    """A table a problem: the device's time of the work, the host's of a call, what the work costs at least, and both
    times against the published chain in eager torch and against the graphed rival.

    Times are medians, with the 10th and 90th percentile. The bound is `bounds.bound_us`, in brackets its share of the
    device's time. The rival is the lean chain under torch.compile, replayed as a CUDA graph, at the same B: the one in
    bf16 for what computes in bf16, where there is one, else the float32 one.
    """
    parts = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        group = [row for row in rows if row["problem"] == problem]
        title = "device", "whole call", "million rows/s", "TFLOP/s", "of a matrix product", "bound (share)"
        ratios = "published: device", "... whole call", "compile + graph: device", "... whole call"
        lines = [["B", problem, *title, f"times faster than {ratios[0]}", ratios[1], f"than {ratios[2]}", ratios[3]]]
        for row in group:
            name = row["contender"] + {"graph": "", "profiler": " (kernels alone)"}[row["device_method"]]
            rates = f"{row['rows_per_s'] / 1e6:.3g}", f"{row['tflops']:.3g}", f"{100 * row['of_matmul']:.2g}%"
            over = [*_ratios(row, _published(row, group)), *_ratios(row, _graphed_rival(row, group))]
            lines.append([f"{row['B']:,}", name, *(_spread(row[key]) for key in _TIMES), *rates, _bound(row), *over])
        parts.append(_markdown(lines))
    return "\n\n".join(parts)


def _ratios(row: Row, other: Row | None) -> list[str]:
    return [f"{_median(other, key) / _median(row, key):.2f}x" if other else "" for key in _TIMES]


def _bound(row: Row) -> str:
    if row.get("bound_us") is None:  # of others, and in reports from before there were bounds
        return ""
    return f"{time(row['bound_us'])} ({100 * row['share']:.0f}%)"


def _published(row: Row, group: list[Row]) -> Row | None:
    return next((r for r in group if r["contender"] == "published" and r["B"] == row["B"]), None)


_TIMES = ("device_us", "call_us")


def _graphed_rival(row: Row, group: list[Row]) -> Row | None:
    names = ["compile-lean-bf16+graph"] * (row["precision"] == "bf16") + ["compile-lean+graph"]
    found = (r for name in names for r in group if r["contender"] == name and r["B"] == row["B"])
    return next(found, None)


def _median(row: Row, key: str) -> float:
    return row[key][1]


def _spread(times: list[float]) -> str:
    low, median, high = times
    return f"{time(median)} ({time(low)} to {time(high)})"


def further_table(rows: list[Row]) -> str:
    """A table that is no race with the published code, its columns as they were recorded."""
    return _markdown([[name.replace("_", " ") for name in rows[0]], *([*map(_text, row.values())] for row in rows)])


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _markdown(lines: Iterable[list[str]]) -> str:
    first, *rest = lines
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [first, ["---"] * len(first), *rest])


def tables(report: dict[str, Any]) -> str:
    """All of a report's tables."""
    rows = report["rows"]
    parts = [race_table(rows), ceiling_table(rows)]
    for title, table in report.get("tables", {}).items():
        parts.append(f"{title}:\n\n{gpu_table(table) if title == GPU_TITLE else further_table(table)}")
    return "\n\n".join(part for part in parts if part)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python bench/table.py bench/results/REPORT.json")
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
