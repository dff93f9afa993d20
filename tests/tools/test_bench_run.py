"""`bench/gpu.sh` with faults planted into it: each costs its own line, and nothing else."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import machine
import pytest
import torch
from gpu import outcomes
from gpu import report as gpu_report
from gpu import run as gpu_run
from gpu import tools as gpu_tools
from gpu.parts import OutOfTimeError, Task

from dql.kernels import build_record

BENCH = Path(gpu_run.__file__).parents[1]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
# Of every process that Python starts with this folder on its path: one kind of call hangs, one crashes its process, one
# is wrong, the others are right at once, without torch.
PLANTED = """
import os, sys, time
if sys.orig_argv[1:3] == ["-m", "gpu.checks"]:
    backend, precision, kind = sys.orig_argv[3:6]
    if kind == "gradient": time.sleep(1000)
    if kind == "select": os.abort()
    if (precision, kind) == ("fp32", "forward"): print("ptxas fatal: no such register")
    if (precision, kind) == ("fp32", "graph"):
        print('{"what": "B=256", "error": 0.0, "limit": 0.0, "us": null, "why": null}', flush=True)
        raised = "Traceback (most recent call last):\\n  File\\nRuntimeError: CUDA error: no memory\\nCompile with\\n"
        print(raised, file=sys.stderr, flush=True)
        os._exit(1)
    error, code = (0.9, 1) if kind == "update" else (1e-5, 0)
    why = '"wrong"' if code else "null"
    print(f'{{"what": "B=256", "error": {error}, "limit": 0.01, "us": 12.5, "why": {why}}}', flush=True)
    os._exit(code)
"""


@pytest.fixture
def run(tmp_path) -> gpu_run.Run:
    (tmp_path / "scratch").mkdir()
    return gpu_run.Run(tmp_path / "scratch", gpu_run._parse(["--device", "cpu"]))


def task(run: gpu_run.Run, name: str, seconds: float = 120) -> Task:
    return Task(run.logs / f"{name}.log", time.monotonic() + seconds, dict(run.environment))


@NO_GPU
def test_without_a_gpu_it_says_so():
    done = subprocess.run(["bash", str(BENCH / "gpu.sh")], capture_output=True, text=True)
    assert done.returncode == 3
    assert "no NVIDIA GPU" in done.stderr


@NO_GPU
def test_checks_that_hang_crash_and_are_wrong(tmp_path):
    """From end to end, in the time that the hanging ones take; the report holds every line."""
    out, planted = tmp_path / "out", tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(PLANTED)
    code = "import sys; from gpu import run; run.A_CALL, run.COMPILED = 3, {}; sys.exit(run.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "triton", "cuda", "--device", "cpu", "--seconds", "100"]
    path = os.pathsep.join([str(planted), str(BENCH), str(BENCH.parent)])
    environment = os.environ | {"OUT": str(out), "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "triton bf16 forward: B=256 1.0e-05 of 1e-02 12.5 us; times beside 1 others" in lines
    assert "triton bf16 gradient: FAILED ended after 3 s: it hangs, or compiles too long" in lines
    assert any(line.startswith("triton fp32 select: FAILED its process ended with -6") for line in lines)
    assert "triton fp32 forward: B=256 1.0e-05 of 1e-02 12.5 us; times beside 1 others" in lines  # for all ptxas said
    raised = "triton fp32 graph: B=256 0.0e+00 of 0e+00; FAILED RuntimeError: CUDA error: no memory"
    assert raised in lines  # outside of what a check looks at
    assert "triton fp32 update: B=256 WRONG 9.0e-01 of 1e-02 12.5 us; times beside 1 others" in lines
    (path,) = out.glob("*.json")
    report = json.loads(path.read_text())
    assert report["parts"]["triton"]["why"] == "6 of 10 checks are wrong, 0 were not reached"
    assert report["parts"]["cuda"]["why"] == "6 of 22 checks are wrong, 0 were not reached"
    assert len(report["checks"]) == 32
    assert report["sources_sha256"] == machine.sources_sha256()
    with tarfile.open(out / f"{path.stem}-logs.tar.gz") as archive:
        assert "logs/check-triton-fp32-select.log" in archive.getnames()
    assert f"written: {path}" in done.stdout
    assert len(done.stdout) < 12_000


@NO_GPU
@pytest.mark.parametrize(
    ("backend", "precision", "kind", "lines"),
    [("cuda", "any", "clusters", 3), ("cuda", "fp32", "gradient", 1), ("triton", "any", "noise", 1)],
)
def test_a_kind_of_call(backend, precision, kind, lines, runs_here):
    """As the part runs it, here emulated or interpreted."""
    runs_here(backend)
    command = [sys.executable, "-m", "gpu.checks", backend, precision, kind, "--device", "cpu", "--small"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCH), str(BENCH.parent)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == lines
    assert all(row["why"] is None and (row["limit"] is None or row["error"] <= row["limit"]) for row in found)


CRASHES = """
import os, pytest, time

@pytest.mark.parametrize("i", range(12))
def test_crashes(i): os.abort()
@pytest.mark.parametrize("i", range(8))
def test_fine(i): pass
def test_hangs(): time.sleep(100)
def test_wrong(): assert 7 == 8
"""


def test_many_crashes_and_a_hang_cost_no_other_test(run, tmp_path):
    """More than pytest-xdist would replace by itself, four for each worker."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(CRASHES)
    crashes = ["-n", "2", "--max-worker-restart", "100000", "--timeout", "3", "--rootdir", str(tmp_path)]
    why = run._pytest(task(run, "tests", 240), [str(tmp_path / "test_it.py"), *crashes], "tests-cuda")
    assert why == "tests-cuda: 14 of 22 failed"
    tests = gpu_report.tests_of(run.scratch / "tests-cuda.jsonl")
    assert (tests["passed"], tests["failed"], tests["not_reached"]) == (8, 14, [])
    groups = gpu_report.grouped({"tests-cuda": tests})
    assert sum(n for n, *_ in groups) == 14
    assert groups[0][0] == 12  # one line for them all
    assert groups[0][1:3] == ("test_it.py::test_crashes", "cuda")


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([["a"], [], ["b", "c"]], None),  # one round in vain
        ([["a"], [], ["b"], [], ["c"]], None),
        ([["a"], [], [], ["b", "c"]], "t: 2 were not reached"),
    ],
)
def test_one_round_in_vain_is_not_the_end(rounds, said, run):
    """pytest-xdist may break by itself when a worker dies: the next round does without."""
    left, in_vain = iter(rounds), False

    def round_of(command: list[object]) -> int:
        nonlocal in_vain
        assert command[-2:] == (["-n", "0"] if in_vain else ["-n", "2"])
        records = [{"test": name, "outcome": "passed", "why": None, "seconds": 1} for name in next(left)]
        in_vain = not records
        with (run.scratch / "t.jsonl").open("a") as file:
            for record in [{"collected": ["a", "b", "c"]}, *records]:
                file.write(json.dumps(record) + "\n")
        return 1

    own = SimpleNamespace(run=round_of, log=run.logs / "t.log")
    assert run._pytest(own, ["test_it.py", "-n", "2"], "t") == said


def test_a_process_without_workers_is_started_again(run, tmp_path, monkeypatch):
    """As benches run: one that crashes, one that hangs, one that is cut off by the end of the part."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(
        "import os, time\ndef test_a(): os.abort()\ndef test_b(): pass\ndef test_c(): time.sleep(100)\n"
        "def test_d(): assert False, 'no'\n"
    )
    monkeypatch.chdir(tmp_path)  # as a run stands in the root of the tree
    alone = ["-p", "no:xdist", "--timeout", "2", "--rootdir", str(tmp_path)]
    assert run._pytest(task(run, "t"), [str(tmp_path / "test_it.py"), *alone], "t") == "t: 3 of 4 failed"
    found = outcomes.read(run.scratch / "t.jsonl")[1]
    assert {name[-6:]: record["why"] == outcomes.DIED for name, record in found.items()} == {
        "test_a": True,
        "test_b": False,
        "test_c": True,
        "test_d": False,
    }


def test_a_backend_whose_time_is_over_costs_no_other_test(run, monkeypatch):
    """Those of the other one run, those that want the GPU alone are at least known to be missing."""
    asked = []

    def pytest_(own, arguments, name, times=None):
        asked.append(name)
        if name == "tests-cuda":
            raise OutOfTimeError
        return "tests-triton: 1 of 5 failed" if name == "tests-triton" else None

    monkeypatch.setattr(run, "_pytest", pytest_)
    assert run.tests(task(run, "tests")) == "tests-triton: 1 of 5 failed; no time was left for some"
    assert sorted(asked) == ["tests-alone", "tests-cuda", "tests-triton"]


def test_what_is_cut_off_is_not_reached(run, tmp_path, monkeypatch):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(100)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutOfTimeError):
        run._pytest(task(run, "t", 6), [str(tmp_path / "test_it.py"), "-p", "no:xdist", "--timeout", "60"], "t")
    tests = gpu_report.tests_of(run.scratch / "t.jsonl")
    assert (tests["passed"], tests["failed"], len(tests["not_reached"])) == (1, 0, 1)


def test_an_update_is_timed_though_the_rest_hangs(run, monkeypatch):
    """`quick` leaves out what did not end in the checks, and keeps time for an update."""
    asked = {}

    def timed(own, bench, *more):
        asked[bench] = (own.left, more)
        if bench == "bench_gpu.py":
            raise OutOfTimeError

    hung = {"backend": "cuda", "precision": "bf16", "kind": "forward", "why": "ended after 20 s: it hangs", "found": []}
    (run.scratch / "checks-cuda.json").write_text(json.dumps([hung]))
    monkeypatch.setattr(run, "_timed", timed)
    with pytest.raises(OutOfTimeError):
        run.quick(task(run, "quick", 60))
    assert asked["bench_gpu.py"][1][1].endswith(" and not dql-cuda-bf16")
    assert asked["bench_update.py"][0] - asked["bench_gpu.py"][0] == pytest.approx(gpu_run.FOR_UPDATE, abs=1)


def test_kernels_that_were_built_before(tmp_path, monkeypatch):
    """Of this GPU and these sources, and the CPU's with them: without it a GPU call takes a slower way."""
    monkeypatch.setattr(gpu_tools, "ROOT", tmp_path)
    monkeypatch.setattr(build_record, "_HERE", tmp_path / "kernels")
    (tmp_path / "kernels").mkdir()
    for extension in (build_record.CUDA, build_record.NATIVE):
        assert gpu_tools.is_built("90") is None
        (tmp_path / "kernels" / extension.file).write_bytes(b"code")
        facts = {"built": True, "sources": build_record.fingerprint(tmp_path / "csrc", extension)}
        facts |= {"architectures": ["90"]} if extension == build_record.CUDA else {}
        (tmp_path / "kernels" / extension.record).write_text(json.dumps(facts))
    assert gpu_tools.is_built("90") == "the kernels are there, for sm_90, of these sources"
    assert gpu_tools.is_built("100") is None


def test_a_missing_package_costs_the_tests(run, monkeypatch):
    monkeypatch.setattr(gpu_run, "PLUGINS", {"pytest-xdist": "xdist", "pytest-nothing": "nothing_of_the_kind"})
    assert run.tests(task(run, "tests")) == "; ".join(["pytest-nothing is not installed"] * 3)


def test_a_bench_tells_its_times(run, capsys):
    """As quick, bench and update run theirs: a line at once, all of it in a file."""
    sizes = ["--sizes", "1", "--compile-sizes", "none"]
    assert run._timed(task(run, "bench"), "bench_gpu.py", *sizes, "-k", "forward and eager and not backward") is None
    assert any(line.startswith("forward 1 dql-eager: ") for line in capsys.readouterr().out.splitlines())
    assert len(list(run.scratch.glob("bench_gpu-bench-*.json"))) == 1
    assert run._timed(task(run, "update"), "bench_update.py", "-k", "test_update_bc", "--short") is None
    (report,) = run.scratch.glob("bench_update-update-*.json")
    assert json.loads(report.read_text())["rows"][0]["contender"] == "dql"


def test_a_build_and_an_installation_that_fail(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run.gpu_tools, "is_built", lambda capability: None)
    run.device = "cuda"
    monkeypatch.setattr(gpu_run.gpu_tools, "capability", lambda device: "7")  # no such GPU
    kept = []  # of the build before, when the compiler starts
    original = Task.run
    monkeypatch.setattr(Task, "run", lambda *a: kept.extend(gpu_run.ROOT.glob("kernels/_cuda.abi3.so")) or original(*a))
    built = {name: path.read_bytes() for name in gpu_report.BUILT if (path := gpu_run.ROOT / "kernels" / name).exists()}
    try:
        own = task(run, "build", 60)
        own.environment["DQL_NO_NATIVE"] = "0"
        why = run.build(own)
    finally:
        for name, content in built.items():
            (gpu_run.ROOT / "kernels" / name).write_bytes(content)
    assert why is not None
    assert "exit code 1" in why
    assert kept == []
    monkeypatch.setattr(gpu_run, "WHEELS", tmp_path)
    (tmp_path / "nothing-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    assert "exit code 1: ERROR" in (run.wheels(task(run, "wheels", 60)) or "")


FULL = """
import resource, sys
from pathlib import Path
from gpu import report as gpu_report
from gpu.parts import Outcome

scratch, out = Path(sys.argv[1]), Path(sys.argv[2])
report = gpu_report.Report(out, scratch, "cpu")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as a disk that takes no more
report.write({"tests": Outcome("passed")})
report.pack({})
print("went on", report.path.exists(), list(out.iterdir()))
"""


def test_a_full_disk_at_packing(tmp_path):
    (tmp_path / "scratch" / "logs").mkdir(parents=True)
    (tmp_path / "scratch" / "logs" / "large.log").write_bytes(os.urandom(100_000))
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", FULL, str(tmp_path / "scratch"), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCH), str(BENCH.parent)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "-logs.tar.gz cannot be written: [Errno 27] File too large" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("went on")
    assert not list((tmp_path / "out").glob("*.tar.gz"))  # no half of one


def test_what_is_larger_than_can_be_carried_is_dropped_with_a_word(tmp_path, monkeypatch, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_bytes(os.urandom(3 << 20))
    monkeypatch.setattr(gpu_report, "MOST_BYTES", 1 << 20)
    report = gpu_report.Report(tmp_path, tmp_path, "cpu")
    report.pack({})
    assert "has 3 MiB, 1 can go: left out" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tar.gz"))


def test_what_was_packed_before_stays(tmp_path, monkeypatch, capsys):
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "a.log"
    report = gpu_report.Report(tmp_path, tmp_path, "cpu")
    log.write_bytes(b"small")
    report.pack({})
    log.write_bytes(os.urandom(3 << 20))
    monkeypatch.setattr(gpu_report, "MOST_BYTES", 1 << 20)
    report.pack({})
    assert "has 3 MiB, 1 can go: what was packed before stays" in capsys.readouterr().out
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        assert archive.extractfile("logs/a.log").read() == b"small"
    assert not list(tmp_path.glob("*.partial"))


def test_what_one_run_built_is_carried_into_the_next(tmp_path):
    there, here = tmp_path / "there" / "kernels", tmp_path / "here" / "kernels"
    there.mkdir(parents=True)
    here.mkdir(parents=True)
    (there / "_cuda.abi3.so").write_bytes(b"code")
    cache = tmp_path / "there" / "cache"
    (cache / "abc").mkdir(parents=True)
    for name in ("k.cubin", "k.ttir", "k.ptx", "k.source", "k.json"):
        (cache / "abc" / name).write_text(name)
    report = gpu_report.Report(tmp_path, tmp_path, "cpu")
    report.pack({"objects": [there / "_cuda.abi3.so", there / "absent.json"], "triton": [cache]})
    targets = {"objects": [here / "_cuda.abi3.so"], "triton": [tmp_path / "here" / "cache"]}
    (tmp_path / "x-objects.tar.gz").write_bytes(b"damaged")  # costs nothing
    gpu_report.unpack(tmp_path, targets)
    assert (here / "_cuda.abi3.so").read_bytes() == b"code"
    assert {path.name for path in (tmp_path / "here" / "cache" / "abc").iterdir()} == {"k.cubin", "k.json"}


def test_a_run_without_its_kernels_is_not_green(tmp_path):
    def passed(*tests: str) -> None:
        lines = [json.dumps({"test": test, "outcome": "passed", "why": None, "seconds": 1}) for test in tests]
        (tmp_path / "tests-all.jsonl").write_text("\n".join(lines))

    triton, plain = (
        "tests/gpu/test_numbers.py::test_fp32[triton-B1]",
        "tests/gpu/test_tilings.py::test_a_tiling[streamed-16rows]",
    )
    cluster = "tests/gpu/test_tilings.py::test_a_tiling[cluster8-16rows-fp32-(17, 6, 256)]"
    wide = "tests/gpu/test_tilings.py::test_128_rows[(17, 6, 256)-2.5]"
    solo = "tests/gpu/test_tilings.py::test_a_tiling[solo-8rows-bf16-(17, 6, 256)]"
    passed(triton, plain, cluster, wide, solo)
    assert gpu_report.untested(tmp_path, "90") == []
    passed(plain, solo)
    assert gpu_report.untested(tmp_path, "80") == ["no test of triton passed"]
    passed(triton, plain)
    assert gpu_report.untested(tmp_path, "90") == [
        "no test of a cluster of cuda passed",
        "no test of a block of cuda alone passed",
        "no test of the wide kernel of cuda passed",
    ]
    passed(triton, plain, solo)
    assert gpu_report.untested(tmp_path, "100") == ["no test of a cluster of cuda passed"]
    passed(triton)
    assert "no test of cuda passed" in gpu_report.untested(tmp_path, "80")


def test_the_plan_fits_its_limit():
    least = [max(gpu_run.LEAST[name] for name in stage) for stage in gpu_run.STAGES]
    assert sum(least) + gpu_run.TO_FINISH <= gpu_run.SECONDS == 540
    first = [[gpu_run.LEAST[name] for name in stage if name in gpu_run.FIRST] for stage in gpu_run.STAGES]
    assert sum(max(stage) for stage in first if stage) + gpu_run.TO_FINISH <= gpu_run.FIRST_SECONDS == 195


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["first"], ["build", "triton", "cuda", "quick", "tests"]),
        (["bench"], ["build", "bench"]),
        (["triton"], ["triton"]),
        (["train"], ["build", "wheels", "data", "train"]),
        ([], list(gpu_run.PARTS)),
    ],
)
def test_the_parts(arguments, parts):
    options = gpu_run._parse(arguments)
    assert options.parts == parts
    assert options.seconds == (195 if arguments == ["first"] else 540)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frob"], "there is no part frob; there are first build"),
        (["--seconds", "3"], "--seconds must be at least 32, got 3"),
        (["--continue-run", "nothing.tar.gz"], "nothing.tar.gz: there is no such file"),
        (["--tests-from", "nothing.json"], "nothing.json: there is no such file"),
    ],
)
def test_wrong_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        gpu_run.main(arguments)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_tests_from_a_report(tmp_path, capsys):
    run = {
        "failures": [{"test": "tests/gpu/test_numbers.py::a"}],
        "not_reached": ["tests/gpu/test_numbers.py::b", "tests/gpu/test_numbers.py::a"],
    }
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"tests": {"tests-cuda": run, "bench-bench_gpu": {"failures": [{"test": "bench"}]}}}))
    options = gpu_run._parse(["tests", "--tests-from", str(path)])
    assert options.chosen_tests == ["tests/gpu/test_numbers.py::a", "tests/gpu/test_numbers.py::b"]
    path.write_text('{"tests": {}}')
    with pytest.raises(SystemExit):
        gpu_run._parse(["--tests-from", str(path)])
    assert "it has no test that is red or was not reached" in capsys.readouterr().err
