"""What `bench/gpu.sh` runs: everything that only a GPU can show, within one limit of time, into one report.

    stage       parts, side by side
    install     install: wheels from bench/wheels/ if there are any, then the package, its CUDA kernels built here
    check       doctor; tests (of the GPU tier); suite (all others); kernels (what Triton made of those of 256 hidden
                units for this GPU); rivals (torch.compile's graphs and Triton's kernels are compiled, for bench and
                update); data (a Minari dataset, and first updates on the CPU)
    bench       device and whole-call times, each beside its bound
    update      an update of training: time, launches
    profile     the chain's kernels under Nsight Compute
    sanitize    memcheck, racecheck, initcheck, synccheck
    train       `dql train` for what time remains; a million updates at most

`bench`, `update` and `train` have the machine to themselves. Whatever was cut off or left out is in the report, too.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import gpu_report
import outcomes
from parts import NothingToDoError, Outcome, OutOfTimeError, Part, Task, run_stages

ROOT = Path(__file__).parents[1]
SECONDS = 540.0
TO_FINISH = 20.0  # of them, to stop what still runs and to pack logs
STAGES = (
    ("install",),
    ("doctor", "tests", "suite", "kernels", "rivals", "data"),
    ("bench",),
    ("update",),
    ("profile",),
    ("sanitize",),
    ("train",),
)
# (at least, at most) seconds: what a part may count on, and when it is ended though others would leave it more
LIMITS = {
    "install": (60, 300),
    "doctor": (30, 60),
    "tests": (130, 300),
    "suite": (130, 400),
    "kernels": (120, 300),
    "rivals": (120, 300),
    "data": (100, 240),
    "bench": (150, 300),
    "update": (15, 90),
    "profile": (25, 90),
    "sanitize": (65, 400),
    "train": (45, 3600),
}
A_TEST = 150  # seconds after which a test hangs, as a kernel does whose barrier nobody reaches
MOST_RESTARTS = 8  # of a pytest whose process broke
ALSO_ON_A_GPU = ("test_device.py", "test_graphed_update.py")
DATASET = "dql/hopper/medium-expert-v0"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    started = time.monotonic()
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results").absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dql-gpu-") as folder:
        run = Run(Path(folder), options)
        report = gpu_report.Report(out, run.scratch, run.logs, options.device)
        done: dict[str, Outcome] = {}
        for of_stage in run_stages(run.stages(), started + options.seconds - TO_FINISH, run.logs, run.environment):
            done |= of_stage
            report.write(done)  # after each stage: of a run that is killed remains what it had
            if "install" in of_stage and not run.is_installed():
                print("dql cannot be imported, so nothing else can run", flush=True)
                break
        for name in run.parts:
            done.setdefault(name, Outcome("not run", "the package could not be installed"))
        report.write(done)
        report.pack()
        print(f"== in short, after {time.monotonic() - started:.0f} of {options.seconds:.0f} s")
        print(report.summary(), flush=True)
    return 0 if all(outcome.is_fine for outcome in done.values()) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [name for stage in STAGES for name in stage]
    parser = argparse.ArgumentParser("bench/gpu.sh", description="Tests, benches and trains on a machine with a GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {' '.join(names)}; all by default")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of it all (%(default).0f)")
    parser.add_argument("--continue-run", type=Path, metavar="RUN.tar.gz", help="a training run to take further")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu is for trying this out without one"
    )
    parser.add_argument("--no-install", action="store_true", help="the package as it is installed already")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in names]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {' '.join(names)}")
    if options.continue_run and not options.continue_run.is_file():
        parser.error(f"--continue-run {options.continue_run}: there is no such file")
    if options.seconds < 2 * TO_FINISH:
        parser.error(f"--seconds must be at least {2 * TO_FINISH:.0f}, got {options.seconds:g}")
    options.parts = [name for name in names if name in options.parts or not options.parts or name == "install"]
    if options.no_install:
        options.parts.remove("install")
    if "train" in options.parts and "data" not in options.parts:
        options.parts.append("data")
    return options


class Run:
    """The parts, and what they share.

    Args:
        scratch: an empty folder for what they write.
        options: of the command line.

    Attributes:
        logs: the folder of the parts' logs.
        environment: of every command.
        parts: names of those chosen.
    """

    def __init__(self, scratch: Path, options: argparse.Namespace) -> None:
        self.scratch, self.logs = scratch, scratch / "logs"
        self.logs.mkdir()
        self.parts: list[str] = options.parts
        self.device: str = options.device
        self.continued: Path | None = options.continue_run and options.continue_run.absolute()
        self.site = scratch / "site"
        path = [str(ROOT / "bench"), str(self.site), os.environ.get("PYTHONPATH", "")]
        self.compiled = scratch / "inductor"
        self.environment = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONUNBUFFERED": "1",
            "MINARI_DATASETS_PATH": str(scratch / "datasets"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.compiled),
            # Unset, torch.compile sets it when it is first used: our kernels would be compiled again within the bench.
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache"),
        }

    def stages(self) -> list[list[Part]]:
        """The chosen ones."""
        chosen = [[name for name in stage if name in self.parts] for stage in STAGES]
        return [
            [Part(name, getattr(self, name), *LIMITS[name], vital=name == "install") for name in stage]
            for stage in chosen
            if stage
        ]

    def install(self, task: Task) -> str | None:
        """The package, editable; what no network can bring comes from bench/wheels/, into a folder of its own."""
        wheels = sorted((ROOT / "bench" / "wheels").glob("*.whl"))
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
        if wheels and task.run([*pip, "--no-index", "--no-deps", "--no-compile", "--target", self.site, *wheels]):
            return "the wheels in bench/wheels/ cannot be installed"
        package = [*pip, "-e", ".", "--no-build-isolation", "--no-deps"]
        task.environment["DQL_REQUIRE_CUDA"] = "1"
        if task.run(package) == 0:
            return None
        del task.environment["DQL_REQUIRE_CUDA"]
        task.environment["DQL_NO_CUDA"] = "1"
        code = task.run(package)
        return "the CUDA kernels cannot be built" if code == 0 else f"pip's exit code {code}"

    def is_installed(self) -> bool:
        task = Task("import", self.logs / "install.log", time.monotonic() + 60, self.environment)
        try:
            return task.run([sys.executable, "-c", "import dql.kernels"]) == 0
        except OutOfTimeError:
            return False

    def doctor(self, task: Task) -> str | None:
        code = "import json, dql.doctor; print(json.dumps(dql.doctor.examine(), indent=1))"
        failed = task.run([sys.executable, "-c", code], output=self.scratch / "doctor.json")
        return f"exit code {failed}" if failed else None

    def tests(self, task: Task) -> str | None:
        tier = [*sorted(ROOT.glob("tests/test_gpu*.py")), *(ROOT / "tests" / name for name in ALSO_ON_A_GPU)]
        failed = self._pytest(task, tier, "tests", workers=_cores(0.6))
        told = gpu_report.tests_of(self.scratch / "tests.jsonl")
        if failed is None and self.device == "cuda" and told and told["skipped_for_want_of_a_device"]:
            return f"{told['skipped_for_want_of_a_device']} were skipped for want of a device, though there is one"
        return failed

    def suite(self, task: Task) -> str | None:
        rest = ["tests", "--ignore-glob=*/test_gpu*.py", *(f"--ignore=tests/{name}" for name in ALSO_ON_A_GPU)]
        return self._pytest(task, [*rest, "--continue-on-collection-errors"], "suite", workers=_cores(0.4), a_test=300)

    def kernels(self, task: Task) -> str | None:
        arch = 'arch = "sm_%d%d" % (torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0))'
        only = "*H256*,noise*,critic_finish*,choose*"  # of all sizes they would take longer than the stage has
        table = f"sys.exit(kernels(arch, only={only!r}, jobs={_cores(0.25)}, as_json=True))"
        code = f"import sys, torch; from dql.kernel_table import kernels; {arch}; {table}"
        failed = task.run([sys.executable, "-c", code], output=self.scratch / "kernels.json")
        return "a kernel does not compile, spills or does not fit; see kernels in the report" if failed else None

    def rivals(self, task: Task) -> str | None:
        """Compiled here, beside the tests, they come from torch's and Triton's caches when they are timed."""
        benches = ["bench/bench_gpu.py", "bench/bench_update.py"]
        command = [*benches, "-k", "compile or triton", "--benchmark-disable", "--device", self.device]
        return self._pytest(task, command, "rivals", workers=_cores(0.25))

    def data(self, task: Task) -> str | None:
        """The dataset that `train` takes, and the first updates on the CPU, that it is compared with."""
        task.environment["OMP_NUM_THREADS"] = "1"
        return self._train(task, "prepare", DATASET)

    def bench(self, task: Task) -> str | None:
        for path in self.compiled.rglob("*.best_config"):
            path.unlink()  # what torch.compile found fastest while tests kept the GPU busy: it looks again, alone
        return self._timed(task, "bench/bench_gpu.py")

    def update(self, task: Task) -> str | None:
        return self._timed(task, "bench/bench_update.py")

    def profile(self, task: Task) -> str | None:
        seconds = f"--seconds={task.left - 5:.0f}"
        return self._script(task, "profile_kernels.py", self.scratch / "profile.json", seconds)

    def sanitize(self, task: Task) -> str | None:
        seconds = f"--seconds={task.left - 5:.0f}"
        return self._script(
            task, "sanitize.py", "--json", self.scratch / "sanitizer.json", "--jobs", str(_cores(0.5)), seconds
        )

    def train(self, task: Task) -> str | None:
        return self._train(task, "run", DATASET, f"--seconds={task.left - 10:.0f}")

    def _train(self, task: Task, command: str, *arguments: str) -> str | None:
        continued = ["--continue-run", str(self.continued)] if self.continued else []
        device = ["--device", self.device] if command == "run" else []
        return self._script(task, "train_run.py", command, self.scratch, *arguments, *continued, *device)

    def _script(self, task: Task, script: str, *arguments: str | Path) -> str | None:
        code = task.run([sys.executable, ROOT / "bench" / script, *arguments])
        if code == 0:
            return None
        last = [line for line in task.log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return f"exit code {code}: {last[0][:200] if last else 'no output'}"

    def _timed(self, task: Task, bench: str) -> str | None:
        """Times of one process after another, if one breaks; each has a JSON file of its own."""
        return self._pytest(
            task, [bench, "--benchmark-only", "--device", self.device], task.name, reports=True, a_test=75
        )

    def _pytest(
        self,
        task: Task,
        arguments: Sequence[str | Path],
        name: str,
        workers: int = 0,
        reports: bool = False,
        a_test: int = A_TEST,
    ) -> str | None:
        """Runs pytest, again for what is left where its process broke; returns what failed."""
        task.environment["TORCHINDUCTOR_COMPILE_THREADS"] = "4"  # processes that live on beside what is timed
        if workers:  # one of many processes
            task.environment["OMP_NUM_THREADS"] = "1"
        path = self.scratch / f"{name}.jsonl"
        command: list[str | Path] = [sys.executable, "-m", "pytest", "-p", "outcomes", "--outcomes", path, "-q"]
        command += ["-p", "no:cacheprovider", "--deselect-known"]
        if _has("pytest_timeout"):
            command += [f"--timeout={a_test}", "--timeout-method=thread"]
        if workers > 1 and _has("xdist"):
            command += ["-n", str(workers), "--max-worker-restart=50"]
        for i in range(MOST_RESTARTS):
            report = ["--bench-json", self.scratch / f"{name}-{i}.json"] if reports else []
            code = task.run([*command, *arguments, *report])
            # 2 is an error of the collection, 5 that nothing is left; a test that hangs ends its process with 1, too
            if code in (0, 2, 5) or (code == 1 and not outcomes.read(path)[2]):
                break
        told = gpu_report.tests_of(path)
        if not told or not any(told[key] for key in ("passed", "failed", "errors", "skipped")):
            return f"pytest ran nothing, exit code {code}"
        counts = {"failed": told["failed"] + told["errors"], "not reached": told["not_reached"]}
        if any(counts.values()):
            wrong = " and ".join(f"{n} of {told['collected']} {what}" for what, n in counts.items() if n)
            return wrong if code in (0, 1) else f"{wrong}, exit code {code}"
        if not told["passed"]:
            why = f"all were skipped: {next(iter(told['skip_reasons']))}"
            if self.device == "cuda":
                return why
            raise NothingToDoError(why)
        return None


def _cores(share: float) -> int:
    """That share of the cores; those of a stage add up to more than all, since most also wait for the GPU."""
    return max(int((os.cpu_count() or 1) * share), 1)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


if __name__ == "__main__":
    sys.exit(main())
