"""Prints a bench report as the README's tables: python bench/table.py bench/results/REPORT.json"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from json_files import read_json
from machine import provenance

Row = dict[str, Any]
GPU_BATCH_SIZES = (1, 50, 256, 2500, 65536)
GPU_PROBLEMS = ("sample, forward", "sample, forward and backward", "select of 50")
UPDATE_PROBLEMS = ("update B=256", "update B=256, max_q_backup")
PRECISIONS = ("fp32", "tf32", "bf16")
NOT_MEASURED = "not measured"
RUNTIMES = "ONNX Runtime or OpenVINO"
GPU_TITLE = "device time and whole-call time on a GPU"
MATMUL_TITLE = "matrix product 4096 x 4096 x 4096"
UPDATE_TITLE = "what an update launches on a GPU"
COPY_TITLE = "copy of 1 GiB, read and written"
HOST_TITLE = "host's part of a call, the driver stubbed"


def time(us: float) -> str:
    if us < 99.95:
        return f"{us:.1f} us"
    return f"{us:.0f} us" if us < 999.5 else f"{us / 1000:.3g} ms"


def race_table(rows: list[Row]) -> str:
    """A line a problem, a column a contender; of torch.compile and of the exported graph's runtimes the fastest.

    A time is a contender's median. In brackets are the medians over pairs: how many times faster than the published
    code, which is float32, and than the fastest of what a user would take instead: of a float32 row that is a float32
    rival, of a bf16 row whichever is fastest, and "(fp32)" marks that it is one in float32. An empty cell says why.
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
        "JAX": [name for name in names if name == "jax"],
        RUNTIMES: [name for name in names if name.startswith(("onnxruntime", "openvino")) and not _is_bf16(name)],
        "OpenVINO, bf16": [name for name in names if name.startswith("openvino") and _is_bf16(name)],
    } | {_title(name): [name] for name in ours}
    columns = {title: members for title, members in columns.items() if members}
    lines = [["", *columns]]
    for problem, group in problems.items():
        cells = [
            _race_cell([group[name] for name in members if name in group]) or _why_empty(problem, title)
            for title, members in columns.items()
        ]
        lines.append([problem, *cells])
    return _markdown(lines)


def _is_bf16(contender: str) -> bool:
    return contender.endswith("-bf16")


def _why_empty(problem: str, title: str) -> str:
    gradients = problem.startswith("update") or problem.endswith("backward")
    if "OpenVINO" in title:
        return (
            "has no gradients" if gradients else "exports no critic" if problem.startswith("select") else NOT_MEASURED
        )
    return "float32 only" if gradients and "bf16" in title else NOT_MEASURED


def _title(contender: str) -> str:
    """dql-cpp-bf16 is `cpp`, bf16."""
    contender, graph, _ = contender.removeprefix("dql-").partition("+graph")
    backend, _, precision = contender.partition("-")
    if graph:
        return f"`{backend}` + graph"
    return f"`{backend}`, {precision}" if precision else f"`{backend}`"


def _race_cell(rows: list[Row]) -> str:
    if not rows:
        return ""
    row = max(rows, key=lambda row: row["speedup_over"]["published"])
    name, ratios = row["contender"], row["speedup_over"]
    if name in ("published", "jax"):  # alone in its column
        return time(row["median_us"])
    if not name.startswith("dql-"):
        return f"{time(row['median_us'])} ({name.removeprefix('compile-')})"
    over = [f"{ratios[key]:.3g}x" for key in ("published", "best_rival") if ratios.get(key) is not None]
    # A report that names no rival is of before there was one in bf16.
    if _is_bf16(name) and len(over) == 2 and not _is_bf16(row.get("best_rival") or ""):
        over[1] += " (fp32)"
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


def gpu_summary(report: dict[str, Any]) -> str:
    """A line for each contender, a column for each batch size: what was not measured says so.

    A cell holds the device's time, in brackets the host's of a whole call, which is a graph's replay where that was
    timed, how many times faster that call is than the published chain's in eager torch and than the graphed rival's
    (marked where that computes in float32 and the row does not), and the share that the bound is of the device's time.
    """
    measured = report.get("tables", {}).get(GPU_TITLE, [])
    if not measured and report.get("device") != "cuda":
        return ""
    parts = ["Device time (whole call), times faster than published and than compile + graph, share of the bound"]
    for problem in GPU_PROBLEMS:
        group = [row for row in measured if row["problem"] == problem]
        sizes = GPU_BATCH_SIZES if problem.startswith("sample") else (1,)
        names = ["published", "compile-lean+graph", *["compile-lean-bf16+graph"] * (problem == GPU_PROBLEMS[0])]
        names += [f"dql-{backend}-{precision}" for backend in _gpu_backends(measured) for precision in PRECISIONS]
        lines = [[problem, *(f"B = {B:,}" for B in sizes)]]
        lines += [[_contender(name), *(_gpu_cell(name, B, group) for B in sizes)] for name in names]
        parts.append(_markdown(lines))
    if (processes := len({row.get("process") for row in measured})) > 1:
        parts.append(f"Measured in {processes} processes, each after another broke: a ratio may be of two of them.")
    parts += filter(None, [_host_and_model(measured)])
    launched = report.get("tables", {}).get(UPDATE_TITLE, [])
    parts.append(_update_table(report.get("rows", []), launched, _gpu_backends(measured)))
    return "\n\n".join(parts)


def _host_and_model(measured: list[Row]) -> str:
    """The host's time of a call that nothing waits for, and, of a forward pass of `cuda`, what its model says of the
    device's (kernels/cuda/plan.py) beside the device's."""
    lines = [["", "contender", "B", "host", "device", "predicted", "largest part", "tiling"]]
    for row in measured:
        said = row.get("predicted_us") is not None
        if said or (row.get("host_us") is not None and row["contender"].startswith("dql-")):
            host = time(_median(row, "host_us")) if row.get("host_us") is not None else NOT_MEASURED
            model = [time(row["predicted_us"]), row["predicted_part"], row["tiling"]] if said else ["", "", ""]
            cells = [_contender(row["contender"]), f"{row['B']:,}", host, time(_median(row, "device_us"))]
            lines.append([row["problem"], *cells, *model])
    return _markdown(lines) if len(lines) > 1 else ""


def _gpu_backends(measured: list[Row]) -> list[str]:
    """Those that there are, and those that were measured and are no more."""
    from dql.backend.registry import of_gpus  # a report of CPUs needs no dql

    ours = (row["contender"].removeprefix("dql-").split("-") for row in measured if row["contender"].startswith("dql-"))
    return list(dict.fromkeys([*of_gpus(), *(backend for backend, *precision in ours if precision)]))


def _contender(name: str) -> str:
    rivals = {"compile-lean+graph": "compile + graph", "compile-lean-bf16+graph": "compile + graph, bf16"}
    return rivals.get(name) or (name if name == "published" else _title(name))


def _gpu_cell(name: str, B: int, group: list[Row]) -> str:
    found = {row["contender"]: row for row in group if row["B"] == B}
    if name not in found:
        return NOT_MEASURED
    row = found[name]
    call = found.get(f"{name}+graph", row)
    published, rival = (_published(row, group), _graphed_rival(row, group)) if name.startswith("dql-") else (None, None)
    over = [f"{_median(published, 'call_us') / _median(call, 'call_us'):.3g}x"] if published else []
    over += [f"{_median(rival, 'call_us') / _median(call, 'call_us'):.3g}x{_in_float32(row, rival)}"] if rival else []
    share = [f"{100 * row['share']:.0f}%"] if row.get("share") is not None else []
    kernels_alone = " kernels alone" if row.get("device_method") == "profiler" else ""
    times = f"{time(_median(row, 'device_us'))}{kernels_alone} ({time(_median(call, 'call_us'))})"
    return ", ".join([times, *over, *share])


def _update_table(rows: list[Row], launched: list[Row], backends: list[str]) -> str:
    """An update's time (whole call) and times faster than published; kernels, copies, and the kernels' own time."""
    seen = {(row["problem"], row["contender"]): row for row in launched}
    lines = [["", "contender", "whole call", "times faster than published", "kernels", "copies", "kernels alone"]]
    for problem in UPDATE_PROBLEMS:
        timed = {row["contender"]: row for row in rows if row["problem"] == problem}
        ours = [f"dql-{backend}{graph}" for backend in ("eager", *backends) for graph in ("", "+graph")]
        for name in ("published", *ours):
            row, launch = timed.get(name), seen.get((problem, name))
            times = [time(row["median_us"]), f"{row['speedup_over']['published']:.3g}x"] if row else [NOT_MEASURED, ""]
            counts = ["", "", NOT_MEASURED]
            if launch:
                counts = [str(launch["kernels"]), str(launch["copies"]), time(launch["kernels_alone_us"])]
            lines.append([problem, _contender(name), *times, *counts])
    return _markdown(lines)


def _published(row: Row, group: list[Row]) -> Row | None:
    return next((r for r in group if r["contender"] == "published" and r["B"] == row["B"]), None)


def _graphed_rival(row: Row, group: list[Row]) -> Row | None:
    names = ["compile-lean-bf16+graph"] * (row["precision"] == "bf16") + ["compile-lean+graph"]
    found = (r for name in names for r in group if r["contender"] == name and r["B"] == row["B"])
    return next(found, None)


def _in_float32(row: Row, rival: Row) -> str:
    """What marks a ratio over a rival that computes in float32, of a row that does not."""
    return " (fp32)" if row["precision"] != "fp32" and "bf16" not in rival["contender"] else ""


def _median(row: Row, key: str) -> float:
    return row[key][1]


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
    """All of a report's tables, after where they come from."""
    rows = report["rows"]
    parts = [provenance(report), gpu_summary(report), race_table(rows), ceiling_table(rows)]
    for title, table in report.get("tables", {}).items():
        parts.append(f"{title}:\n\n{further_table(table)}" if title != GPU_TITLE else "")
    return "\n\n".join(part for part in parts if part)


def main(arguments: list[str]) -> None:
    """Prints the report that is named."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        sys.exit("usage: python bench/table.py bench/results/REPORT.json")
    report = read_json(Path(arguments[0]))
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        sys.exit(f"{arguments[0]} is no report of a bench; give one, such as bench/results/REPORT.json")
    print(tables(report))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))  # of a checkout without an installation
    main(sys.argv[1:])
