"""What `bench/gpu.sh` runs: what only a GPU can show, within one limit of time, into one report.

    stage       parts, side by side
    build       build: the CUDA kernels for this GPU, in the tree; nothing if they are there, of these sources
                triton: every kind of call checked and timed, a process each (`checks.py`); nothing installed
                wheels: what bench/wheels/ holds, into a folder of its own, for `data` and `train` alone
    cuda        the same checks of the CUDA kernels, and each way in which they cut a problem
    quick       bench_gpu.py at B = 256, 1, 65,536, its gradient at 256, an update; without torch.compile
    tests       tests of the GPU tier, a pytest for each backend, side by side, 20 s a test at most, 60 of triton's
                rivals: torch.compile's graphs are compiled, for `bench`; data: a Minari dataset
    bench       bench_gpu.py in full
    update      bench_update.py
    profile     the chain's kernels under Nsight Compute
    sanitize    memcheck, racecheck, initcheck, synccheck of small calls
    train       `dql train` for what time remains

`first` is build, triton, cuda, quick and tests in 195 s. Parts that are named have all the time there is. `quick`,
`bench`, `update` and `train` have the machine to themselves. Report, logs, built objects and Triton's cache are packed
after each stage, so a run that is killed leaves what it had. What lies in bench/carried/ of an earlier run (its
*-objects.tar.gz and *-triton.tar.gz) is unpacked at the start.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from dql.backend.registry import of_gpus
from dql.kernels import build_record
from gpu import checks as gpu_checks
from gpu import outcomes
from gpu import report as gpu_report
from gpu import tools as gpu_tools
from gpu.parts import SAID, NothingToDoError, Outcome, OutOfTimeError, Part, Task, run_stages, say
from gpu.report import BUILT

ROOT = Path(__file__).parents[2]
CHECKS = [sys.executable, "-m", "gpu.checks"]
WHEELS, CARRIED = ROOT / "bench" / "wheels", ROOT / "bench" / "carried"
SECONDS, FIRST_SECONDS = 540.0, 195.0
TO_FINISH = 8.0  # of them, to write and pack
STAGES = (
    ("build", "triton", "wheels"),
    ("cuda",),
    ("quick",),
    ("tests", "rivals", "data"),
    ("bench",),
    ("update",),
    ("profile",),
    ("sanitize",),
    ("train",),
)
PARTS = tuple(name for stage in STAGES for name in stage)
FIRST = ("build", "triton", "cuda", "quick", "tests")
LEAST = {"build": 60, "triton": 40, "wheels": 10, "cuda": 20, "quick": 40, "tests": 55, "rivals": 55, "data": 55}
LEAST |= {"bench": 90, "update": 25, "profile": 25, "sanitize": 55, "train": 60}  # seconds kept for each
A_CALL = 20  # seconds after which a check, or a test, hangs
COMPILED = {"triton": 60}  # ... of a backend that compiles in them: one test of triton 36 kernels
A_TIME, A_QUICK_TIME = 60, 20
FOR_UPDATE = 12.0  # seconds of `quick`, whatever else hangs
QUICK_SIZES, QUICK = "256,1,65536", "not graph and (not backward or B256)"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLUGINS = {"pytest-xdist": "xdist", "pytest-timeout": "pytest_timeout", "pytest-benchmark": "pytest_benchmark"}
NOT_REACHED = "no time was left"
RAISED = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b")
OF_UPDATES = ("backends/test_actor.py", "backends/test_update_ops.py", "training/test_fused_update.py")
TIER = [*sorted((ROOT / "tests" / "gpu").glob("test_*.py")), *(ROOT / "tests" / name for name in OF_UPDATES)]
DATASET = "dql/hopper/medium-expert-v0"


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    options = _parse(arguments)
    os.chdir(ROOT)
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results").absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dql-gpu-") as folder:
        run = Run(Path(folder), options)
        report = gpu_report.Report(out, run.scratch, options.device)
        say("{device_name}: python {python}, torch {torch}, triton {triton}".format(**report.machine))
        done: dict[str, Outcome] = {}
        for of_stage in run_stages(run.stages(), started + options.seconds - TO_FINISH, run.logs, run.environment):
            done |= of_stage
            try:
                report.write(done)
                report.pack(run.caches)
            except Exception as error:  # a part may have left anything; the next stage is worth more
                say(f"the report cannot be written yet: {type(error).__name__}: {error}")
        say(f"== in short, after {time.monotonic() - started:.0f} of {options.seconds:.0f} s")
        say(report.summary())
    return 0 if all(outcome.is_fine for outcome in done.values()) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench/gpu.sh", description="Tests, benches and trains on a machine with a GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"first, or of {' '.join(PARTS)}; all by default")
    parser.add_argument("--seconds", type=float, help=f"limit of it all ({SECONDS:.0f}; of first {FIRST_SECONDS:.0f})")
    parser.add_argument("--tests-from", type=Path, metavar="REPORT", help="tests that it has as red or not reached")
    parser.add_argument("--sizes", help="B that bench and quick take, in this order, such as 256,1")
    parser.add_argument("--compile-sizes", help="B that bench compiles rivals for, all or none")
    parser.add_argument("--continue-run", type=Path, metavar="RUN.tar.gz", help="a training run to take further")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries this without a GPU")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in (*PARTS, "first")]:
        parser.error(f"there is no part {', '.join(unknown)}; there are first {' '.join(PARTS)}")
    for path, option in ((options.continue_run, "--continue-run"), (options.tests_from, "--tests-from")):
        if path and not path.is_file():
            parser.error(f"{option} {path}: there is no such file")
    options.chosen_tests = gpu_report.tests_to_repeat(options.tests_from) if options.tests_from else None
    if options.chosen_tests == []:
        parser.error(f"--tests-from {options.tests_from}: it has no test that is red or was not reached")
    first_alone = options.parts == ["first"]
    options.seconds = options.seconds or (FIRST_SECONDS if first_alone else SECONDS)
    if options.seconds < 4 * TO_FINISH:
        parser.error(f"--seconds must be at least {4 * TO_FINISH:.0f}, got {options.seconds:g}")
    named = {*options.parts, *(FIRST if "first" in options.parts else ())} or {*PARTS}
    named |= {"build"} if named - {"triton", "wheels", "data"} else set()
    named |= {"data", "wheels"} if "train" in named else set()
    options.parts = [name for name in PARTS if name in named]
    return options


class Run:
    """The parts, and what they share.

    Args:
        scratch: an empty folder for what they write.
        options: of the command line.
    """

    def __init__(self, scratch: Path, options: argparse.Namespace) -> None:
        self.scratch, self.logs, self.options = scratch, scratch / "logs", options
        self.logs.mkdir()
        self.device, self.site = options.device, scratch / "site"
        triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        self.small = ["--small"] if self.device == "cpu" else []
        self.caches = {"objects": [ROOT / "kernels" / name for name in BUILT], "triton": [triton]}
        path = [str(ROOT), str(ROOT / "bench"), str(self.site), os.environ.get("PYTHONPATH", "")]
        # What a pytest around this one tells its own processes is none of ours.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self.environment = inherited | {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONUNBUFFERED": "1",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # or torch warns of each product where what it allocates is filled
            "MINARI_DATASETS_PATH": str(scratch / "datasets"),
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "4",  # processes that live on beside what is timed
            # Unset, torch.compile sets it when it is first used: our kernels would be compiled again within the bench.
            "TRITON_CACHE_DIR": str(triton),
        }
        if self.device == "cpu":
            self.environment |= {"TRITON_INTERPRET": "1", "DQL_CUDA_EMULATE": "1", "OMP_NUM_THREADS": "1"}
        gpu_report.unpack(CARRIED, self.caches)

    def stages(self) -> list[list[Part]]:
        """The chosen ones; one that is alone has all the time there is."""
        chosen = [[name for name in stage if name in self.options.parts] for stage in STAGES]
        return [[Part(name, getattr(self, name), LEAST[name]) for name in stage] for stage in chosen if stage]

    def build(self, task: Task) -> str | None:
        capability = gpu_tools.capability(self.device)
        if (why := gpu_tools.is_built(capability)) is not None:
            say(f"build: {why}")
            return None
        if self.device == "cpu":
            return _failure(task, task.run([sys.executable, "setup.py", "-q", "build_cuda_emulator"]))
        for stale in (build_record.CUDA.file, build_record.CUDA.record):  # a build that is cut off leaves none to run
            (ROOT / "kernels" / stale).unlink(missing_ok=True)
        task.environment |= {"DQL_REQUIRE_CUDA": "1", "DQL_CUDA_ARCHS": os.environ.get("DQL_CUDA_ARCHS") or capability}
        return _failure(task, task.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"]))

    def wheels(self, task: Task) -> str | None:
        found = sorted(WHEELS.glob("*.whl"))
        if not found:
            raise NothingToDoError("bench/wheels/ holds none")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
        return _failure(task, task.run([*pip, "--no-compile", "--target", self.site, *found]))

    def triton(self, task: Task) -> str | None:
        return self._checks(task, "triton", _cores(0.85))

    def cuda(self, task: Task) -> str | None:
        return self._checks(task, "cuda", _cores(0.75))

    def _checks(self, task: Task, backend: str, jobs: int) -> str | None:
        """Each kind in a process of its own, `jobs` at a time; a line as each ends."""
        done: list[dict[str, Any]] = []
        most = COMPILED.get(backend, A_CALL)

        def check(precision: str, kind: str) -> dict[str, Any]:
            output = self.scratch / f"check-{backend}-{precision}-{kind}.out"
            own = task.of(f"check-{backend}-{precision}-{kind}")
            command = [*CHECKS, backend, precision, kind, "--device", self.device, *self.small]
            began, why, code = time.monotonic(), None, None
            try:
                code = own.run(command, output, most=most)
                if code not in (0, 1):
                    why = f"its process ended with {code}: {_last_line(own.log)}"
            except OutOfTimeError:
                hung = time.monotonic() - began > most - 1
                why = f"ended after {most} s: it hangs, or compiles too long" if hung else NOT_REACHED
            except NothingToDoError:
                pass  # it says why itself
            found, rest = gpu_tools.told(output.read_text(errors="replace") if output.exists() else "")
            if why is None and (not found or (code == 1 and not any(line["why"] for line in found))):
                why = _last_line(own.log)  # what no line tells of was raised outside what a check looks at
            if why is not None and rest:
                why = f"{why} / {rest}"
            here = {"backend": backend, "precision": precision, "kind": kind, "why": why, "found": found}
            return here | {"seconds": time.monotonic() - began, "beside": jobs - 1}

        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(check, *kind) for kind in gpu_checks.kinds(backend, bool(self.small))]
            for future in as_completed(futures):
                done.append(future.result())
                say(gpu_report.check_line(done[-1]))
                (self.scratch / f"checks-{backend}.json").write_text(json.dumps(done))
        if all(gpu_report.nothing_ran(check) for check in done):
            raise NothingToDoError(done[0]["found"][-1]["why"])
        missed = sum(check["why"] == NOT_REACHED for check in done)
        wrong = sum(gpu_report.check_is_wrong(check) for check in done) - missed
        if wrong or not missed:
            return f"{wrong} of {len(done)} checks are wrong, {missed} were not reached" if wrong else None
        raise OutOfTimeError

    def quick(self, task: Task) -> str | None:
        sizes = self.options.sizes or (QUICK_SIZES if self.device == "cuda" else "8,1")
        without = "".join(f" and not {name}" for name in gpu_report.hanging(self.scratch))
        sizes, limit = ["--sizes", sizes, "--compile-sizes", "none"], ["--timeout", str(A_QUICK_TIME)]
        first, wrong, cut = Task(task.log, task.deadline - FOR_UPDATE, task.environment), None, False
        try:
            wrong = self._timed(first, "bench_gpu.py", "-k", QUICK + without, *sizes, *limit)
        except OutOfTimeError:
            cut = True
        of_update = self._timed(task, "bench_update.py", "-k", f"test_update and plain{without}", "--short", *limit)
        if cut:
            raise OutOfTimeError
        return of_update or wrong

    def tests(self, task: Task) -> str | None:
        """One pytest a backend, side by side; those that want the GPU for themselves, afterwards."""
        ids = self.options.chosen_tests
        tests = [str(path) for path in TIER] if ids is None else ids
        each = ["-n", str(_cores(0.4)), "--max-worker-restart", "100000", "-m", "not alone"]

        def run(name: str, own: Task, *more: str) -> tuple[str | None, bool]:
            """(what is wrong, whether its time was over)."""
            try:
                return self._pytest(own, [*tests, *more], f"tests-{name}"), False
            except OutOfTimeError:
                return None, True

        first, *others = of_gpus()

        def of_backend(backend: str) -> tuple[str | None, bool]:
            a_test = COMPILED.get(backend, A_CALL) if self.device == "cuda" else 60  # what is interpreted is slow
            # the first runs those of no backend, too
            chosen = ["--no-backend", ",".join(others)] if backend == first else ["--only-backend", backend]
            limit = ["--timeout", str(a_test), *chosen]
            return run(backend, task.of(f"tests-{backend}"), *each, *limit)

        with ThreadPoolExecutor(1 + len(others)) as pool:
            done = list(pool.map(of_backend, [first, *others]))
        done.append(run("alone", task, "-p", "no:xdist", "--timeout", "60", "-m", "alone"))
        wrong = [why for why, _ in done if why is not None]
        if self.device == "cuda" and ids is None:
            wrong += gpu_report.untested(self.scratch, gpu_tools.capability(self.device))
        if not wrong and any(cut for _, cut in done):
            raise OutOfTimeError
        wrong += ["no time was left for some" for _, cut in done[:1] if any(cut for _, cut in done)]
        return "; ".join(wrong) or None

    def rivals(self, task: Task) -> str | None:
        """Compiled here, beside the tests, they come from torch's cache when they are timed."""
        benches = [str(ROOT / "bench" / name) for name in ("bench_gpu.py", "bench_update.py")]
        given = ["--benchmark-disable", "--device", self.device, *self._sizes(), "-n", str(_cores(0.25))]
        return self._pytest(task, [*benches, "-k", "compile", *given], "rivals")

    def data(self, task: Task) -> str | None:
        return _failure(task, task.run([sys.executable, "-m", "dql.cli", "data", "make", "hopper-medium-expert"]))

    def bench(self, task: Task) -> str | None:
        for path in (self.scratch / "inductor").rglob("*.best_config"):
            path.unlink()  # what torch.compile found fastest while tests kept the GPU busy: it looks again, alone
        return self._timed(task, "bench_gpu.py", *self._sizes())

    def update(self, task: Task) -> str | None:
        return self._timed(task, "bench_update.py")

    def profile(self, task: Task) -> str | None:
        ncu = gpu_tools.tool("ncu")
        wanted = [word for name in gpu_tools.NCU_SECTIONS for word in ("--section", name)]
        wrong = []
        for backend in of_gpus():
            command = [ncu, *gpu_tools.NCU_OPTIONS, *wanted, *CHECKS, backend, "any", "profile"]
            code = task.run(command, output=self.scratch / f"profile-{backend}.csv")
            wrong += [f"{backend}: ncu ended with {code}"] if code else []
        return "; ".join(wrong) or None

    def sanitize(self, task: Task) -> str | None:
        """Small calls of both backends under each tool, each tensor in an allocation of its own."""
        sanitizer, done = gpu_tools.tool("compute-sanitizer"), []
        task.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

        def check(backend: str, tool: str) -> dict[str, Any]:
            own = task.of(f"sanitize-{backend}-{tool}")
            calls = [*CHECKS, backend, "any", "all", "--small"]
            try:
                code: int | None = own.run([sanitizer, *gpu_tools.SANITIZER_OPTIONS, tool, *calls])
            except OutOfTimeError:
                code = None
            return {"backend": backend, "tool": tool} | gpu_tools.judge(code, own.log.read_text(errors="replace"))

        with ThreadPoolExecutor(_cores(0.5)) as pool:
            futures = [pool.submit(check, backend, tool) for tool in SANITIZERS for backend in of_gpus()]
            for future in as_completed(futures):
                done.append(future.result())
                say("{backend}, {tool}: {outcome}, {findings} findings, {cases} cases".format(**done[-1]))
                (self.scratch / "sanitizer.json").write_text(json.dumps(done))
        wrong = [f"{row['backend']} {row['tool']} {row['outcome']}" for row in done if row["outcome"] != "passed"]
        return ", ".join(sorted(wrong)) or None

    def train(self, task: Task) -> str | None:
        """Until the time is over, when it writes a checkpoint and ends; --continue-run goes on exactly."""
        command = [sys.executable, "-m", "dql.cli", "train"]
        if self.options.continue_run:
            gpu_tools.unpack_run(self.options.continue_run, self.scratch)
            command += ["--resume", self.scratch / "run"]
        else:
            contender, why = gpu_tools.fastest_backend(self.scratch)
            say(f"train: backend {contender}, {why}")
            graphed = ["--graphed"] if contender.endswith("+graph") else []
            command += ["--dataset", DATASET, "--run-dir", self.scratch / "run", "--device", self.device, *graphed]
            command += ["--backend", contender.removesuffix("+graph"), "--eval-every", "50000"]
        wait = max(task.left - 20, 1)
        code = task.run(["timeout", "-s", "TERM", f"{wait:.0f}", *command])
        return None if code in (0, 124, 143) else _failure(task, code)

    def _sizes(self) -> list[str]:
        named = {"--sizes": self.options.sizes, "--compile-sizes": self.options.compile_sizes}
        return [word for option, value in named.items() if value for word in (option, value)]

    def _timed(self, task: Task, bench: str, *more: str) -> str | None:
        """Times of one process after another, if one breaks; each has a JSON file of its own."""
        given = ["--benchmark-only", "--device", self.device, "-p", "no:xdist", "--timeout", str(A_TIME), *more]
        return self._pytest(task, [str(ROOT / "bench" / bench), *given], task.log.stem, Path(bench).stem)

    def _pytest(self, task: Task, arguments: Sequence[str], name: str, times: str | None = None) -> str | None:
        """Runs pytest, and again for what was not reached when its process broke; returns what failed."""
        if missing := [package for package, module in PLUGINS.items() if importlib.util.find_spec(module) is None]:
            return f"{', '.join(missing)} is not installed"
        path, round_, in_vain = self.scratch / f"{name}{'-' + times if times else ''}.jsonl", 0, 0
        base = [sys.executable, "-m", "pytest", "-p", "gpu.outcomes", "--outcomes", path, "-q"]
        base += ["-p", "no:cacheprovider", "--timeout-method", "thread", "-s", "--tb", "short"]
        files = [word for word in arguments if ".py" in word]
        options = [word for word in arguments if word not in files]
        while True:
            listed = self.scratch / f"{path.stem}.txt"
            listed.write_text("\n".join(files))
            report = ["--bench-json", self.scratch / f"{times}-{name}-{round_}.json"] if times else []
            try:
                # pytest-xdist itself may break when workers die, before any test is reached: then go on without it
                alone = ["-n", "0"] if in_vain and "-n" in options else []
                code = task.run([*base, f"@{listed}", *options, *alone, *report])
            except OutOfTimeError:
                outcomes.cut(path)
                raise
            collected, found = outcomes.read(path)
            left = [test for test in collected if test not in found]
            in_vain = in_vain + 1 if round_ and len(left) >= len(files) else 0
            if not left or in_vain > 1:
                break
            files, round_ = left, round_ + 1
        if not collected:
            return f"pytest ended with {code} and had collected nothing: {_last_line(task.log)}" if code != 5 else None
        failed = sum(record["outcome"] in ("failed", "error") for record in found.values())
        wrong = [f"{failed} of {len(collected)} failed"] if failed else []
        wrong += [f"{len(left)} were not reached"] if left else []
        return f"{name}: {', '.join(wrong)}" if wrong else None


def _failure(task: Task, code: int) -> str | None:
    return f"exit code {code}: {_last_line(task.log)}" if code else None


def _last_line(log: Path) -> str:
    """What a log ends with: the last line that names an exception, if one was raised, or else the last one."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    raised = [i for i, line in enumerate(lines) if RAISED.match(line)]
    trace = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    # torch adds advice to what CUDA says, in lines of their own
    chosen = lines[raised[-1] if raised and trace and raised[-1] > trace[-1] else -1] if lines else "no output"
    return chosen.removeprefix(SAID)[:200]


def _cores(share: float) -> int:
    """That share of the cores, and two at least: those of a stage add up to more than all, most wait for the GPU."""
    return max(int((os.cpu_count() or 1) * share), 2)


if __name__ == "__main__":
    sys.exit(main())
