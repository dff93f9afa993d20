"""The one report of `bench/gpu.sh`: what each part left, gathered into `<date>-<gpu>.json`, and packed beside it.

    bench/gpu.sh report bench/results/REPORT.json      prints it in short

    parts       outcome, reason and seconds of each
    checks      each kind of call in each backend: errors, limits, times, or what was raised
    tests       by pytest run: how many passed, failed, were skipped and why; each failure; what was not reached
    sanitizer   a line for each backend and tool: findings, or why it did not end
    tables      device times, an update's; rows: of update, its races
    profile     a line for each kernel that Nsight Compute saw
    train       the run's last metrics and evaluations
    cuda_build  registers and shared memory of the CUDA kernels

What a part could not do is there as its reason. Nothing is filled in.
"""

import contextlib
import csv
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch
from json_files import read_json, write_json
from table import GPU_TITLE, time

from dql.backend.registry import of_gpus
from gpu import outcomes
from gpu.parts import Outcome, say
from gpu.tools import kernels_seen

ROOT = Path(__file__).parents[2]
BUILT = (
    "_cuda.abi3.so",
    "_cuda_build.json",
    "_native.abi3.so",
    "_native_build.json",
)  # in kernels/, what a build leaves
MOST_BYTES = 16 << 20  # of a packed file, or it does not come back
UNPACKED = (".ttir", ".ttgir", ".llir", ".ptx", ".source")  # of Triton's cache, which it can do without
GROUPS, LINE = 15, 170


class Report:
    """Writes the report.

    Args:
        out: the folder for it.
        scratch: the folder where the parts leave what they made.
        device: "cuda", or "cpu" to try this out.
    """

    def __init__(self, out: Path, scratch: Path, device: str) -> None:
        self.scratch = scratch
        at = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self.machine = machine.machine(at, "events and perf_counter")
        gpu = "".join(c if c.isalnum() else "-" for c in self.machine["device_name"].lower()).strip("-")
        stem = f"{self.machine['date'][:10]}-{gpu}"
        names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]  # no report replaces another
        self.path = next(path for path in (out / f"{name}.json" for name in names) if not path.exists())
        self.content: dict[str, Any] = {}

    def write(self, done: dict[str, Outcome]) -> None:
        """Gathers what there is by now, and writes it atomically."""
        timed = [report for path in sorted(self.scratch.glob("bench_*.json")) if (report := read_json(path))]
        tests = {path.stem: counted for path in sorted(self.scratch.glob("*.jsonl")) if (counted := tests_of(path))}
        profiles = {path.stem: path.read_text(errors="replace") for path in self.scratch.glob("profile-*.csv")}
        self.content = {
            **self.machine,
            "parts": {name: vars(outcome) for name, outcome in done.items()},
            "checks": [check for path in sorted(self.scratch.glob("checks-*.json")) for check in read_json(path) or ()],
            "tests": tests,
            "sanitizer": read_json(self.scratch / "sanitizer.json"),
            "tables": _merged_tables(timed),
            "rows": [row for report in timed for row in report["rows"]],
            "profile": {name: kernels_seen(text) for name, text in profiles.items()},
            "train": trained(self.scratch / "run"),
            "cuda_build": read_json(ROOT / "kernels" / "_cuda_build.json"),
        }
        with _said_if_full(self.path):
            write_json(self.path, self.content)

    def pack(self, caches: dict[str, list[Path]]) -> None:
        """The logs, built objects, Triton's cache and the training run as files that can be carried away."""
        logs = [path for path in self.scratch.iterdir() if path.name == "logs" or path.suffix in (".jsonl", ".csv")]
        run = self.scratch / "run"
        older = {path.name for path in sorted(run.glob("checkpoints/step-*"))[:-1]}
        for name, paths in {"logs": logs, **caches, "run": [run]}.items():
            present = [path for path in paths if path.exists()]
            target = self.path.with_name(f"{self.path.stem}-{name}.tar.gz")
            if not present:
                continue
            partial = target.with_name(f"{target.name}.partial")  # what was packed before stays until this is whole
            with _said_if_full(partial):
                with tarfile.open(partial, "w:gz", compresslevel=4) as archive:
                    for path in present:
                        archive.add(path, path.name, filter=lambda file: None if _left_out(file, older) else file)
                if (size := partial.stat().st_size) <= MOST_BYTES:
                    partial.replace(target)
                else:
                    kept = "what was packed before stays" if target.exists() else "left out"
                    say(f"{target.name} has {size >> 20} MiB, {MOST_BYTES >> 20} can go: {kept}")
                    partial.unlink()

    def summary(self) -> str:
        return f"{summary(self.content)}\nwritten: {self.path}"


def _left_out(file: tarfile.TarInfo, older: set[str]) -> bool:
    return Path(file.name).suffix in UNPACKED or Path(file.name).name in older


@contextlib.contextmanager
def _said_if_full(path: Path) -> Any:
    """A disk that is full, or refuses, costs this file alone."""
    try:
        yield
    except OSError as error:
        say(f"{path.name.removesuffix('.partial')} cannot be written: {error}")
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def unpack(folder: Path, caches: dict[str, list[Path]]) -> None:
    """What an earlier run built, from *-objects.tar.gz and *-triton.tar.gz of the folder, to where it belongs."""
    for name, paths in caches.items():
        for packed in sorted(folder.glob(f"*-{name}.tar.gz")):
            try:
                with tarfile.open(packed) as archive:
                    archive.extractall(paths[0].parent, filter="data")
                say(f"unpacked {packed.name}")
            except (OSError, tarfile.TarError) as error:
                say(f"{packed.name} cannot be unpacked: {error}")


def tests_of(path: Path) -> dict[str, Any] | None:
    """What became of the tests that `outcomes` wrote down; None where it wrote nothing."""
    collected, found = outcomes.read(path)
    if not collected and not found:
        return None
    counts = Counter(record["outcome"] for record in found.values())
    red = [record for record in found.values() if record["outcome"] in ("failed", "error")]
    skipped = Counter(record["why"] for record in found.values() if record["outcome"] == "skipped")
    return {
        "collected": len(collected),
        **{name: counts[key] for name, key in (("passed", "passed"), ("failed", "failed"), ("errors", "error"))},
        "skipped": counts["skipped"],
        "skip_reasons": dict(skipped.most_common()),
        "failures": [{key: record[key] for key in ("test", "outcome", "why")} for record in red],
        "not_reached": [test for test in collected if test not in found],
        "slowest": sorted(((r["seconds"] or 0.0, name) for name, r in found.items()), reverse=True)[:10],
    }


def tests_to_repeat(path: Path) -> list[str]:
    """The tests of the GPU tier that are red in a report, or were not reached."""
    runs = [run for name, run in (read_json(path) or {}).get("tests", {}).items() if name.startswith("tests-")]
    red = [failure["test"] for run in runs for failure in run["failures"]]
    return list(dict.fromkeys([*red, *(test for run in runs for test in run["not_reached"])]))


def untested(scratch: Path, capability: str) -> list[str]:
    """Which kernels no passed test ran, though this GPU has them: a run without them is not green."""
    passed = [
        test
        for path in scratch.glob("tests-*.jsonl")
        for test, record in outcomes.read(path)[1].items()
        if record["outcome"] == "passed"
    ]
    wanted = {backend: backend for backend in of_gpus()} | {"cuda": r"gpu/test_tilings|cuda"}
    if int(capability) >= 90:
        wanted["a cluster of cuda"] = r"cluster[248]-"
    wanted["a block of cuda alone"] = r"gpu/test_tilings\.py::test_a_tiling\[solo"
    if int(capability) == 90:
        wanted["the wide kernel of cuda"] = r"128_rows|128rows"
    missing = [name for name, pattern in wanted.items() if not any(re.search(pattern, test) for test in passed)]
    return [f"no test of {name} passed" for name in missing]


def grouped(tests: dict[str, dict[str, Any]]) -> list[tuple[int, str, str, str]]:
    """(how many, test function, backend, message) of all failures, most first; numbers in messages count as equal."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, run in tests.items():
        for failure in run["failures"]:
            function = failure["test"].partition("[")[0].removeprefix("tests/").removeprefix("bench/")
            message = last_line(failure["why"])
            key = (function, name.rpartition("-")[2], re.sub(r"[\d.]+(e[-+]?\d+)?", "#", message))
            groups.setdefault(key, []).append(message)
    found = [(len(messages), key[0], key[1], messages[0]) for key, messages in groups.items()]
    return sorted(found, key=lambda group: -group[0])


def check_line(check: dict[str, Any]) -> str:
    """One kind of call: "triton bf16 forward: B=256 2.1e-03 of 3e-02 31.2 us; ..."; WRONG and FAILED stand out."""
    cells = []
    for found in check["found"]:
        cell = [found["what"]] if found["what"] else []
        if found["error"] is not None:
            cell.append(f"{'WRONG ' if found['why'] == 'wrong' else ''}{found['error']:.1e} of {found['limit']:.0e}")
        cell += [time(found["us"])] if found["us"] is not None else []
        cell += [found["why"]] if found["why"] not in (None, "wrong") else []
        cells.append(" ".join(cell))
    name = (
        f"{check['backend']} {check['kind']}"
        if check["precision"] == "any"
        else "{backend} {precision} {kind}".format(**check)
    )
    beside = check.get("beside")
    cells += [f"times beside {beside} others"] if beside and any(found["us"] for found in check["found"]) else []
    cells += [f"FAILED {check['why']}"] if check["why"] else []
    return f"{name}: {'; '.join(cells)}"[:400]


def check_is_wrong(check: dict[str, Any]) -> bool:
    raised = any(found["why"] is not None and found["limit"] is not None for found in check["found"])
    return check["why"] is not None or raised


def hanging(scratch: Path) -> list[str]:
    """What did not end in the checks, as pytest's -k names the benches of it: each would cost another limit."""
    checks = [check for path in sorted(scratch.glob("checks-*.json")) for check in read_json(path) or ()]
    hung = [check for check in checks if (check["why"] or "").startswith("ended after")]
    names = {
        "forward": "dql-{backend}-{precision}",
        "gradient": "(backward and dql-{backend}-{precision})",
        "update": "(test_update and dql-{backend})",
    }
    return [names[check["kind"]].format(**check) for check in hung if check["kind"] in names]


def nothing_ran(check: dict[str, Any]) -> bool:
    """It said only why it cannot run here."""
    return check["why"] is None and all(found["limit"] is None and found["why"] for found in check["found"])


def summary(report: dict[str, Any]) -> str:
    """The report in short: its parts, tests, findings, and times."""
    lines = [
        f"{report['device_name']}, driver {report['driver']}, torch {report['torch']}, triton {report['triton']}, "
        f"commit {report['commit']}, sources {report['sources_sha256'][:16]}"
    ]
    lines += [f"{name}: {Outcome(**outcome)}" for name, outcome in report["parts"].items()]
    for name, run in report["tests"].items():
        counts = f"{run['passed']:,} passed, {run['failed'] + run['errors']:,} failed, {run['skipped']:,} skipped"
        lines.append(f"{name}: {counts}, {len(run['not_reached']):,} of {run['collected']:,} not reached")
        lines += [f"    {n:,} skipped: {why[:LINE]}" for why, n in list(run["skip_reasons"].items())[:4]]
    groups = grouped(report["tests"])
    lines += [f"  {n} x {test} ({backend}): {message[:LINE]}" for n, test, backend, message in groups[:GROUPS]]
    lines += [f"  ... and {len(groups) - GROUPS} more kinds of failure"] if len(groups) > GROUPS else []
    lines += [
        f"sanitizer, {found['backend']}, {found['tool']}: {found['outcome']}, {found['findings']} findings"
        for found in report["sanitizer"] or ()
    ]
    if train := report["train"]:
        lines += [
            f"train: {kind}: " + ", ".join(f"{k} {v}" for k, v in row.items()) for kind, row in train.items() if row
        ]
    return "\n".join([*lines, *_times(report)])


def _times(report: dict[str, Any]) -> list[str]:
    """A line for each problem and B: device time (whole call) of each contender, fastest first."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for row in report["tables"].get(GPU_TITLE, ()):
        cell = f"{row['contender']} {time(row['device_us'][1])} ({time(row['call_us'][1])})"
        groups.setdefault(f"{row['problem']}, B={row['B']:,}", []).append((row["device_us"][1], cell))
    for row in report["rows"]:
        groups.setdefault(row["problem"], []).append((row["median_us"], f"{row['contender']} {time(row['median_us'])}"))
    return [f"{problem}: {'; '.join(cell for _, cell in sorted(cells))}" for problem, cells in groups.items()]


def last_line(text: str) -> str:
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    others = [line.strip() for line in text.splitlines() if line.strip()]
    return (errors or others or [""])[0 if errors else -1]


def trained(run: Path) -> dict[str, Any] | None:
    """The last line of a training run's metrics and of its evaluations."""
    files = {"metrics": run / "metrics.csv", "evaluations": run / "evaluations.csv"}
    rows = {name: list(csv.DictReader(path.open())) for name, path in files.items() if path.exists()}
    return {name: (found or [None])[-1] for name, found in rows.items()} or None


def _merged_tables(reports: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Of several processes of one bench, each row with its process: what one broke, the next went on with."""
    merged: dict[str, list[dict[str, Any]]] = {}
    for i, report in enumerate(reports):
        for title, found in report.get("tables", {}).items():
            merged.setdefault(title, []).extend(row | {"process": i} for row in found)
    return merged


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: bench/gpu.sh report bench/results/REPORT.json")
    found = read_json(Path(sys.argv[1]))
    if not isinstance(found, dict) or not isinstance(found.get("parts"), dict):
        sys.exit(f"{sys.argv[1]} is no report that bench/gpu.sh wrote; give one, such as bench/results/REPORT.json")
    print(summary(found))
