"""The one report of `bench/gpu.sh`: what each part left, gathered into `<date>-<gpu>.json`; logs packed beside it.

    python bench/gpu_report.py bench/results/REPORT.json      prints it in short

    parts       outcome, reason and seconds of each
    tests, suite, rivals    how many tests passed, failed, were skipped (with the reasons) or not reached; each failure
    sanitizer   a line for each backend and tool: findings, or why it did not end
    tables      device times, an update's, as `table.py` prints them; rows: of update, its races
    profile     a line for each kernel that Nsight Compute saw
    kernels, cuda_build     registers and shared memory, of Triton's kernels and of the CUDA ones
    train       the run, its learning curve, the first updates beside the CPU's

What a part could not do is there as its reason. Nothing is filled in.
"""

import json
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import machine
import outcomes
import table
import torch
from json_files import read_json, write_json
from parts import Outcome

TEST_PARTS = ("tests", "suite", "rivals", "bench", "update")
NO_DEVICE = ("no CUDA device", "there is no NVIDIA driver", "run with --device cuda")  # reasons that a GPU takes away
ROOT = Path(__file__).parents[1]


class Report:
    """Writes the report.

    Args:
        out: the folder for it.
        scratch: the folder where the parts leave what they made.
        logs: the folder of their logs.
        device: "cuda", or "cpu" to try this out.
    """

    def __init__(self, out: Path, scratch: Path, logs: Path, device: str) -> None:
        self.out, self.scratch, self.logs = out, scratch, logs
        at = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self.machine = machine.machine(at, "events and perf_counter")
        gpu = "".join(c if c.isalnum() else "-" for c in self.machine["device_name"].lower()).strip("-")
        self.path = _free(out, f"{self.machine['date'][:10]}-{gpu}")
        self.content: dict[str, Any] = {}

    def write(self, done: dict[str, Outcome]) -> None:
        """Gathers what there is by now, and writes it atomically."""
        timed = [
            read_json(path)
            for path in sorted(self.scratch.glob("bench-*.json")) + sorted(self.scratch.glob("update-*.json"))
        ]
        # What is built on this machine, a process has seen that began after the installation.
        seen = next((report for report in timed if report), {})
        built = {key: seen[key] for key in ("native_variant", "cuda_extension") if key in seen}
        self.content = {
            **self.machine,
            **built,
            "parts": {name: vars(outcome) for name, outcome in done.items()},
            **{name: tests for name in TEST_PARTS if (tests := tests_of(self.scratch / f"{name}.jsonl")) is not None},
            "sanitizer": read_json(self.scratch / "sanitizer.json"),
            "tables": _merged_tables(timed),
            "rows": [row for report in timed if report for row in report["rows"]],
            "profile": read_json(self.scratch / "profile.json"),
            "train": read_json(self.scratch / "train.json"),
            "doctor": read_json(self.scratch / "doctor.json"),
            "cuda_build": read_json(ROOT / "kernels" / "_cuda_build.json"),
            "kernels": read_json(self.scratch / "kernels.json"),
        }
        write_json(self.path, self.content)

    def pack(self) -> None:
        """The logs as one file, the training run with its last checkpoint as another: easily carried away."""
        with tarfile.open(self.path.with_name(f"{self.path.stem}-logs.tar.gz"), "w:gz") as archive:
            outcomes_of_tests = sorted(path.name for path in self.scratch.glob("*.jsonl"))
            for name in ("logs", "profile.csv", "profile.log", *outcomes_of_tests):
                if (self.scratch / name).exists():
                    archive.add(self.scratch / name, name)
        if (self.scratch / "run").is_dir():
            with tarfile.open(self.path.with_name(f"{self.path.stem}-run.tar.gz"), "w:gz") as archive:
                older = [
                    f"run/checkpoints/{path.name}" for path in sorted(self.scratch.glob("run/checkpoints/step-*"))
                ][:-1]
                archive.add(self.scratch / "run", "run", filter=lambda file: None if file.name in older else file)

    def summary(self) -> str:
        return f"{summary(self.content)}\nwritten: {self.path}"


def tests_of(path: Path) -> dict[str, Any] | None:
    """What became of the tests that `outcomes` wrote down; None without such a file."""
    if not path.exists():
        return None
    collected, found, died = outcomes.read(path)
    counts = Counter(record["outcome"] for record in found.values())
    failures = [
        {"test": name, "outcome": record["outcome"], "why": record["why"]}
        for name, record in found.items()
        if record["outcome"] in ("failed", "error")
    ]
    failures += [{"test": name, "outcome": "failed", "why": "its process died or was killed"} for name in died]
    skipped = Counter(record["why"] for record in found.values() if record["outcome"] == "skipped")
    return {
        "collected": collected,
        "passed": counts["passed"],
        "failed": counts["failed"] + len(died),
        "errors": counts["error"],
        "skipped": counts["skipped"],
        "not_reached": max(collected - sum(map(outcomes.is_test, found)) - len(died), 0),
        "skipped_for_want_of_a_device": sum(n for why, n in skipped.items() if any(text in why for text in NO_DEVICE)),
        "skip_reasons": dict(skipped.most_common()),
        "failures": failures,
        "slowest": sorted(((r["seconds"] or 0.0, name) for name, r in found.items()), reverse=True)[:10],
    }


def summary(report: dict[str, Any]) -> str:
    """The report in short: its parts, tests, findings, and the tables."""
    lines = [
        f"{report['device_name']}, driver {report['driver']}, torch {report['torch']}, triton {report['triton']}, "
        f"commit {report['commit']}, sources {report['sources_sha256'][:16]}"
    ]
    lines += [f"{name}: {Outcome(**outcome)}" for name, outcome in report["parts"].items()]
    for name in TEST_PARTS:
        if (tests := report.get(name)) is not None:
            passed, failed, skipped = tests["passed"], tests["failed"] + tests["errors"], tests["skipped"]
            deviceless, missed = tests["skipped_for_want_of_a_device"], tests["not_reached"]
            lines.append(
                f"{name}: {passed:,} passed, {failed:,} failed, {skipped:,} skipped ({deviceless:,} for want of a "
                f"device), {missed:,} of {tests['collected']:,} not reached"
            )
            lines += [f"    {n:,} skipped: {why}" for why, n in list(tests["skip_reasons"].items())[:8]]
            lines += [f"    {f['outcome']} {f['test']}: {_last_line(f['why'])}" for f in tests["failures"][:15]]
    for found in report.get("sanitizer") or ():
        lines.append(
            f"sanitizer, {found['backend']}, {found['tool']}: {found['outcome']}, {found['findings']} findings"
        )
    if train := report.get("train"):
        lines += table.train_lines(train)
    lines.append(table.gpu_summary(report))
    return "\n".join(lines)


def _last_line(text: str) -> str:
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    others = [line.strip() for line in text.splitlines() if line.strip()]
    return (errors or others or [""])[0 if errors else -1][:160]


def _merged_tables(reports: list[dict[str, Any] | None]) -> dict[str, list[dict[str, Any]]]:
    """Of several processes of one bench, each row with its process: what one broke, the next went on with."""
    merged: dict[str, list[dict[str, Any]]] = {}
    for i, report in enumerate(reports):
        for title, found in (report or {}).get("tables", {}).items():
            merged.setdefault(title, []).extend(row | {"process": i} for row in found)
    return merged


def _free(out: Path, stem: str) -> Path:
    """A name that no report has yet: those of one day get a number."""
    names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
    return next(path for path in (out / f"{name}.json" for name in names) if not path.exists())


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python bench/gpu_report.py bench/results/REPORT.json")
    print(summary(json.loads(Path(sys.argv[1]).read_text())))
