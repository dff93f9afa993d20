"""`dql kernels`: what the compiler made of every kernel, Triton's or CUDA C++'s, as a table or as JSON."""

import importlib.util
import json
import platform
import sys
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from dql.kernels import build_record
from dql.kernels.triton.aot import ARCHITECTURES, Examined, architecture, examine_all, fits, matches
from dql.terminal import make_console

_COLUMNS = (
    "kernel",
    "warps",
    "regs",
    "spill st/ld",
    "stack",
    "shared",
    "blocks/SM",
    "warps/SM",
    "tensor cores",
    "FFMA",
    "MUFU",
    "LDGSTS",
    "BAR",
    "LDL/STL",
    "total",
    "s",
)


def kernels(arch: str, *, only: str = "*", jobs: int | None = None, as_json: bool = False) -> int:
    """Compiles, prints, and gives the exit code: 1 if a kernel does not compile or breaks a limit.

    Args:
        arch: names of architectures, joined by commas.
        only: globs, separated by commas, of which a label must match one.
        jobs: processes; by default one a core.
        as_json: print a JSON list.

    Raises:
        ValueError: an unknown architecture, no such label.
        ImportError: there is no Triton here.
    """
    architectures = list(dict.fromkeys(architecture(name) for name in arch.split(",")))
    if importlib.util.find_spec("triton") is None:
        remedy = (
            "pip install triton" if sys.platform == "linux" else f"it exists for Linux, not for {platform.system()}"
        )
        raise ImportError(f"the kernels are compiled by Triton, which is not installed here: {remedy}")
    stderr = make_console(stderr=True)
    if stderr.is_terminal:
        with stderr.status("starting") as status:
            found = examine_all(
                architectures, only, jobs, lambda i, n, label: status.update(Text(f"{i} of {n} compiled, now {label}"))
            )
    else:
        found = examine_all(architectures, only, jobs)
    if as_json:
        print(json.dumps([as_dict(e) for e in found], indent=2))
    else:
        _print(found, architectures)
    return 1 if any(_failure(e) for e in found) else 0


def cuda_kernels(*, only: str = "*", as_json: bool = False) -> int:
    """Prints what ptxas told of the CUDA kernels when the extension was built; gives the exit code, 1 if one spills.

    Args:
        only: globs, separated by commas, of which a kernel's name must match one.
        as_json: print a JSON list.

    Raises:
        ImportError: the extension was not built.
        ValueError: no such kernel.
    """
    record = build_record.record(build_record.CUDA) or {}
    if not record.get("built"):
        raise ImportError(f"the CUDA extension cannot be used: {build_record.reason(of=build_record.CUDA)}")
    rows = [row for row in record["resources"] if matches(row["kernel"], only)]
    if not rows:
        known = sorted({row["kernel"] for row in record["resources"]})
        raise ValueError(f"no kernel's name matches {only!r}; there are {len(known)}, such as {known[:3]}")
    rows.sort(key=lambda row: (row["arch"], row["kernel"]))
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        console = make_console()
        table = Table(title=f"by {record['compiler']}; shared memory is asked for at launch", title_justify="left")
        columns = ("kernel", "arch", "registers", "stack", "spill_stores", "spill_loads")
        for column in columns:
            table.add_column(column.replace("_", " "), justify="left" if column == "kernel" else "right")
        for row in rows:
            table.add_row(*(str(row[column]) for column in columns), style="red" if row["spill_stores"] else None)
        console.print(table)
    return 1 if any(row["spill_stores"] for row in rows) else 0


def as_dict(examined: Examined) -> dict[str, Any]:
    """Plain JSON values: the report's fields, beside them label, warps_per_sm, tensor_cores, and what failed or None.

    `limit` is the limit of the architecture that the kernel breaks, `error` why it does not compile.
    """
    head = {"label": examined.label, "arch": examined.arch, "error": examined.error}
    report = examined.report
    if report is None:
        return head
    derived = {"warps_per_sm": report.warps_per_sm, "tensor_cores": report.tensor_cores, "limit": fits(report)}
    return head | asdict(report) | derived | {"instead": examined.instead}


def _failure(examined: Examined) -> str | None:
    if examined.report is not None:
        return fits(examined.report)
    # a compiler's message begins with its type and ends with its point; the source is in between
    lines = (examined.error or "").strip().splitlines()
    return "it does not compile: " + " ... ".join(dict.fromkeys((lines[0], lines[-1])))


def _print(found: list[Examined], architectures: list[int]) -> None:
    console = make_console()
    for arch in architectures:
        rows, limits = [e for e in found if e.arch == arch], ARCHITECTURES[arch]
        if not rows:
            continue
        table = Table(
            title=f"sm_{arch}: a block has up to {limits.shared_per_block // 1024} KB of shared memory, "
            f"a multiprocessor {limits.warps} warps and {limits.blocks} blocks",
            title_justify="left",
        )
        for column in _COLUMNS:
            left = column in ("kernel", "tensor cores")
            table.add_column(column, justify="left" if left else "right", no_wrap=not left)
        for e in rows:
            table.add_row(*_row(e), style="red" if _failure(e) else None)
        console.print(table)
        for e in rows:
            warnings = e.report.warnings if e.report is not None else ()
            for text in (_failure(e), e.instead, *warnings):
                if text:
                    console.print(f"{e.label}: {text}", soft_wrap=True)


def _row(examined: Examined) -> list[str]:
    report = examined.report
    if report is None:
        return [examined.label]
    count = report.instructions
    return [
        examined.label,
        str(report.warps),
        str(report.registers),
        f"{report.spill_stores}/{report.spill_loads}",
        str(report.stack),
        f"{report.shared:,}",
        str(report.blocks_per_sm),
        str(report.warps_per_sm),
        " ".join(f"{count[kind]} {kind}" for kind in (report.tensor_cores or "").split("+") if kind) or "none",
        str(count["FFMA"] + count["FFMA2"]),
        str(count["MUFU"]),
        str(count["LDGSTS"]),
        str(count["BAR"]),
        f"{count['LDL']}/{count['STL']}",
        f"{count['total']:,}",
        f"{report.seconds:.1f}",
    ]
