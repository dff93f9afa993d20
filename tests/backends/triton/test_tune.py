"""`dql bench tune`: candidates, the file of measured tiles, forced tiles, the decision, and what the command refuses.

Timing needs a GPU; what is timed runs here in Triton's interpreter, and candidates are compiled in other processes.
"""

import importlib.util
import json
import math
import os
import threading
from dataclasses import asdict, replace

import pytest
import torch
from support.gpu import needs_gpu
from support.networks import make_policy, states_of

import dql as dql_package
from dql import tune
from dql.kernels.layout import DenoiserSpec
from dql.kernels.triton import aot, candidates, tiles
from dql.kernels.triton.tiles import Shape, Tile

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

needs_interpreter = pytest.mark.usefixtures("interpreted")
SHAPE = Shape("forward", 256, False, 300)
MINE = Tile(16, 32, 2, 4)  # not what the heuristic says
OTHER = Tile(32, 16, 3, 8)
SMALL = DenoiserSpec(3, 2, 16, 2)


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The file of measured tiles: not there yet."""
    path = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv("DQL_TILES", str(path))
    tiles._tuned.cache_clear()
    yield path
    tiles._tuned.cache_clear()


# ---------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("HP", [16, 64, 256, 512])
def test_candidates(arch, HP, bf16):
    for rows in (1, 16, 17, 33, 1 << 20):
        shape = Shape("forward", HP, bf16, rows)
        found = candidates.for_shape(arch, shape)
        assert found and len(set(found)) == len(found)
        assert {t.rows for t in found} == {r for r in (16, 32, 64) if r == 16 or r < 2 * rows}
        for tile in (*found, tiles.heuristic(arch, 108, shape)):
            assert tiles._checked(tile).chunk <= HP
        assert all(t.stages == 2 or t.stages * t.chunk <= HP for t in found)


def test_dropped_candidates_say_why(tmp_path, monkeypatch):
    """On 99 KB of shared memory; what is kept is left in Triton's cache for the process that measures."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    told: list[tuple[int, int]] = []
    wanted = [
        ("forward", "bf16", Tile(16, 128, 4, 8)),
        ("forward", "fp32", Tile(64, 16, 2, 4)),
        ("forward", "bf16", Tile(16, 12, 2, 4)),
        ("backward", "bf16", Tile(16, 64, 2, 8)),
    ]
    spec = DenoiserSpec(17, 6, 256)
    found = candidates.compiled(120, spec, wanted, 1, keep=True, progress=lambda *said: told.append(said))
    assert [(c.kind, c.precision, c.tile) for c in found] == wanted
    assert told == [(i, 4) for i in range(4)]
    large, spilling, broken, good = found
    assert f"{large.report.shared:,} bytes of shared memory; a block of sm_120 has" in large.refused
    assert spilling.refused == (
        f"it spills: {spilling.report.spill_stores} bytes stored, {spilling.report.spill_loads} loaded"
    )
    assert broken.report is None and broken.refused.startswith("it does not compile: CompilationError: ")
    assert good.refused is None and aot.fits(good.report) is None
    assert [path.stem for path in (tmp_path / "triton").rglob("*.cubin")] == ["_chain_bwd"]


def test_no_jobs():
    with pytest.raises(ValueError, match="jobs must be at least 1, not 0"):
        candidates.compiled(90, SMALL, [("forward", "fp32", MINE)], 0)


# ------------------------------------------------------------------------------------------------------ the file


def remember(shape: Shape = SHAPE, tile: Tile = MINE, arch: int = 90, processors: int = 132) -> None:
    tiles.remember({tiles.key(arch, processors, shape): tile}, {"gpu": "of the test"})


def test_a_measured_tile_is_chosen(file):
    usual = tiles.choose(90, 132, SHAPE)
    assert usual == tiles.heuristic(90, 132, SHAPE) != MINE
    remember()
    assert tiles.choose(90, 132, SHAPE) == tiles.measured(90, 132, SHAPE) == MINE
    assert json.loads(file.read_text()) == {
        "about": {"gpu": "of the test"},
        "tiles": {"sm_90 x132 forward H256 A16 float32 R512": asdict(MINE)},
    }


def test_it_is_chosen_for_nothing_else():
    remember()
    for rows in (257, 400, 512):
        assert tiles.choose(90, 132, replace(SHAPE, rows=rows)) == MINE
    assert tiles.measured(80, 132, SHAPE) is tiles.measured(90, 114, SHAPE) is None
    others = [{"rows": 256}, {"rows": 513}, {"kind": "saving"}, {"kind": "backward"}, {"HP": 128}, {"bf16": True}]
    for change in (*others, {"AP": 64}):
        shape = replace(SHAPE, **change)
        assert tiles.measured(90, 132, shape) is None, change
        assert tiles.choose(90, 132, shape) == tiles.heuristic(90, 132, shape)


def test_rows_by_powers_of_two():
    got = {rows: tiles.bucket(rows) for rows in (1, 2, 3, 4, 5, 256, 257, 2560, 1 << 20)}
    assert got == {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 256: 256, 257: 512, 2560: 4096, 1 << 20: 1 << 20}


def test_tiles_are_added(file):
    backward = replace(SHAPE, kind="backward")
    remember()
    remember(backward, OTHER)
    remember(arch=80, tile=OTHER)
    assert tiles.measured(90, 132, SHAPE) == MINE
    assert tiles.measured(90, 132, backward) == tiles.measured(80, 132, SHAPE) == OTHER
    remember(tile=OTHER)
    assert tiles.measured(90, 132, SHAPE) == OTHER
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_another_process_wrote_stays(file):
    remember()
    text = json.loads(file.read_text())
    text["tiles"]["of another"] = asdict(OTHER)
    file.write_text(json.dumps(text))
    remember(tile=OTHER)
    assert set(json.loads(file.read_text())["tiles"]) == {"of another", tiles.key(90, 132, SHAPE)}


def test_a_failed_write_leaves_the_file(file, monkeypatch):
    remember()
    before = file.read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        remember(tile=OTHER)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert tiles.measured(90, 132, SHAPE) == MINE


def entry(**changes: object) -> str:
    return json.dumps({"tiles": {tiles.key(90, 132, SHAPE): {**asdict(MINE), **changes}}})


DAMAGED = {
    "empty": "",
    "cut": entry()[:-3],
    "binary": "\udcff\udcfe\x00",
    "a list": "[]",
    "no tiles": "{}",
    "tiles as a list": '{"tiles": [1]}',
    "a tile as a number": '{"tiles": {"x": 3}}',
    "a field is missing": '{"tiles": {"x": {"rows": 16, "chunk": 16, "stages": 2}}}',
    "an unknown field": entry(clusters=2),
    "text": entry(rows="16"),
    "true": entry(stages=True),
    "no power of two": entry(rows=24),
    "too small": entry(chunk=8),
    "negative": entry(stages=-1),
    "too many warps": entry(warps=64),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_sentence_and_can_be_replaced(file, text):
    file.parent.mkdir()
    file.write_bytes(text.encode(errors="surrogateescape"))
    for _ in range(2):
        with pytest.raises(ValueError, match="is no file of this version's `dql bench tune`") as raised:
            tiles.choose(90, 132, SHAPE)
        assert str(file) in str(raised.value) and "delete it or run" in str(raised.value)
        assert "\n" not in str(raised.value)
    remember()
    assert tiles.choose(90, 132, SHAPE) == MINE


def test_unknown_fields_about_the_file_are_nothing_to_us(file):
    file.parent.mkdir()
    file.write_text(json.dumps({"since": 2, **json.loads(entry())}))
    assert tiles.choose(90, 132, SHAPE) == MINE


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("DQL_CACHE", str(tmp_path))
    assert tiles.tuned_path() == tmp_path / "cache" / "tiles.json"
    monkeypatch.delenv("DQL_TILES")
    assert tiles.tuned_path() == tmp_path / "tiles.json"
    monkeypatch.delenv("DQL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tiles._path.cache_clear()
    assert tiles.tuned_path() == tmp_path / "home" / ".cache" / "dql" / "tiles.json"
    tiles._path.cache_clear()


@needs_interpreter
def test_sample_uses_the_file_and_names_it_when_damaged(file, monkeypatch):
    """As on a GPU of compute capability 9.0 with 132 multiprocessors, though interpreted."""
    from dql.kernels.triton import runner as chain_runner

    monkeypatch.setattr(chain_runner, "architecture", lambda device: 90)
    monkeypatch.setattr(chain_runner, "multiprocessors", lambda device: 132)
    policy, states = make_policy(hidden_dim=16, num_hidden=2), states_of(20)
    want = dql_package.sample(states, policy, backend="triton", seed=1)
    asked = []
    monkeypatch.setattr(chain_runner, "choose", lambda *of: asked.append(tiles.choose(*of)) or asked[-1])
    remember(Shape("saving", 16, False, 20), Tile(64, 16, 2, 4))
    got = dql_package.sample(states, policy, backend="triton", seed=1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert asked == [Tile(64, 16, 2, 4)]
    file.write_text("{}")
    tiles._tuned.cache_clear()  # as in a process that starts now
    with pytest.raises(ValueError, match=r"tiles\.json is no file of this version's `dql bench tune`"):
        dql_package.sample(states, policy, backend="triton", seed=1)


# -------------------------------------------------------------------------------------------------- forced tiles


def test_forced():
    backward = replace(SHAPE, kind="backward")
    usual = [tiles.choose(90, 132, shape) for shape in (SHAPE, backward)]

    def now() -> list[Tile]:
        return [tiles.choose(90, 132, shape) for shape in (SHAPE, backward)]

    remember(tile=Tile(64, 64, 4, 16))
    with tiles.forced(MINE):
        assert now() == [MINE, MINE]
        with tiles.forced(OTHER, backward=MINE):
            assert now() == [OTHER, MINE]
            elsewhere: list[Tile] = []
            thread = threading.Thread(target=lambda: elsewhere.extend(now()))  # torch's backward passes have their own
            thread.start()
            thread.join()
            assert elsewhere == [OTHER, MINE]
        assert now() == [MINE, MINE]
    assert now() == [Tile(64, 64, 4, 16), usual[1]]
    with pytest.raises(KeyError), tiles.forced(OTHER):
        raise KeyError
    assert now() == [Tile(64, 64, 4, 16), usual[1]]


@needs_interpreter
def test_forced_tiles_give_equal_results():
    policy, inputs = make_policy(hidden_dim=48, num_hidden=3), states_of(37).requires_grad_()

    def run() -> list[torch.Tensor]:
        actions = dql_package.sample(inputs, policy, backend="triton", seed=1)
        return [actions, *torch.autograd.grad(actions.square().sum(), [inputs, *policy.denoiser.parameters()])]

    want = run()
    for tile, backward in ((MINE, None), (Tile(64, 64, 2, 8), OTHER), (OTHER, Tile(64, 16, 2, 4))):
        with tiles.forced(tile, backward):
            for got, expected in zip(run(), want, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------- what is measured


@pytest.fixture(params=tune.PRECISIONS)
def problem(request, interpreted):
    return tune.Problem(SMALL, request.param, 40, 2, torch.device("cpu"))


@pytest.mark.parametrize("kind", tune.KINDS)
def test_candidates_agree(problem, kind):
    """What a GPU's candidates must do to be timed; a candidate that is off in one tensor is not."""
    saved = problem.saved(problem.heuristic("saving")) if kind == "backward" else None
    assert saved is None or saved.rows == 48
    kept = [Tile(16, 16, 2, 4), Tile(16, 16, 2, 8), Tile(32, 16, 2, 4), Tile(64, 16, 2, 4)]
    assert tune.agreeing(problem, kind, kept, saved) == (kept, ())
    parameters = len(SMALL.layout.slots)
    count = {"forward": 1, "saving": parameters + 2, "backward": parameters + 1}[kind]
    assert len(problem.results(kind, kept[0], saved)) == count
    exact = {tile: problem.results(kind, tile, saved) for tile in kept}
    for error, wrong in ((0.1, True), (math.nan, True), (1e-7, False)):
        off = exact | {kept[2]: [*exact[kept[2]][:-1], exact[kept[2]][-1] * (1 + error)]}
        problem.results = lambda kind, tile, saved, off=off: off[tile]
        right, rest = tune.agreeing(problem, kind, kept, saved)
        assert rest == ((kept[2],) if wrong else ()), (error, rest)
        assert right == [tile for tile in kept if tile not in rest]


@pytest.mark.parametrize("kind", tune.KINDS)
def test_a_call_runs_the_tile_alone(problem, kind, monkeypatch):
    from dql.kernels.triton.launch import Kernel

    seen = []
    launch = Kernel.launch
    saved = problem.saved(Tile(16, 16, 2, 4))

    def recorded(kernel, grid, *arguments):
        seen.append((kernel.name, grid[0]))
        launch(kernel, grid, *arguments)

    monkeypatch.setattr(Kernel, "launch", recorded)
    problem.call(kind, Tile(16, 16, 2, 4), saved)()
    name, programs = seen[-1]
    assert (name, programs) == ("chain_bwd" if kind == "backward" else "chain_fwd", 3)
    assert [n for n, _ in seen[:-1]] == ([] if kind == "backward" else ["prologue"])


def test_a_backward_pass_starts_from_the_best_tile_of_saving(problem, monkeypatch):
    """And only with rows that divide what that left."""
    seen = {}

    def measure(problem, kind, kept, saved, seconds):
        seen[kind] = (kept, saved and saved.rows)
        best = kept[0] if kept else None
        return tune.Outcome(kind, problem.precision, 40, "", problem.heuristic(kind), None, best, None)

    monkeypatch.setattr(tune, "measure", measure)
    large, middle, least = (Tile(rows, 16, 2, 4) for rows in (64, 32, 16))
    usual = problem.heuristic("backward")
    for saving, rows, kept in (([large], 64, [large, middle, least]), ([], 64, None), ([least], 48, [least, usual])):
        some = {"saving": saving, "backward": [large, middle, least, usual]}
        assert [o.kind for o in tune._measure_all(problem, some, 1.0)] == list(some)
        expected = rows if saving else problem.saved(problem.heuristic("saving")).rows
        assert seen["backward"][1] == expected
        if kept is not None:
            assert set(seen["backward"][0]) == {*kept, usual}


def test_distance():
    one = torch.ones(4)
    assert tune.distance([one, one], [one, one]) == 0.0
    assert tune.distance([one, one * 1.5], [one, one]) == pytest.approx(0.5)
    assert tune.distance([one * 0], [one * 0]) == 0.0
    for bad in (math.nan, math.inf):
        assert tune.distance([one * bad], [one]) == tune.distance([one], [one * bad]) == math.inf
        assert tune.distance([one * bad], [one * bad]) == math.inf
    assert tune.distance([one], [one * 0]) == math.inf


def test_the_heuristic_stays_unless_another_is_faster_by_3_percent():
    usual = Tile(16, 16, 2, 4)
    for times, best in (
        ({usual: [1.0], MINE: [1.0]}, usual),
        ({usual: [1.029], MINE: [1.0]}, usual),
        ({usual: [1.031], MINE: [1.0]}, MINE),
        ({usual: [1.031], MINE: [1.0], OTHER: [0.9]}, OTHER),
        ({usual: [2.0, 1.0, 1.0], MINE: [0.1, 1.0, 1.0]}, usual),  # medians
        ({usual: [1.0]}, usual),
        ({MINE: [1.0], OTHER: [0.99]}, OTHER),  # the heuristic's did not fit
    ):
        assert tune.decide(times, usual) == best
    outcome = tune.Outcome("forward", "fp32", 1, "k", usual, 1.1, MINE, 1.0)
    assert outcome.gain == pytest.approx(0.1)
    assert replace(outcome, heuristic_seconds=None).gain is replace(outcome, best_seconds=None).gain is None


# --------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--precision", "fp32,tf32"], ["--precision takes fp32, bf16", "'tf32'; tf32 uses the tiles of fp32"]),
        (["--precision", "fp16"], ["not 'fp16'"]),
        (["--kinds", "forward,up"], ["--kinds takes forward, saving, backward", "'up'"]),
        (["--rows", "0"], ["--rows takes numbers from 1 to", "'0'"]),
        (["--rows", "1,,2"], ["--rows", "''"]),
        (["--rows", "-5"], ["--rows", "'-5'"]),
        (["--rows", str(1 << 31)], ["--rows", "2147483648"]),
        (["--steps", "0"], ["--steps must be from 1 to 1000, not 0"]),
        (["--seconds", "0"], ["--seconds must be positive"]),
        (["--seconds", "nan"], ["--seconds must be positive"]),
        (["--hidden-dim", "513"], ["hidden_dim from 1 to 512", "513"]),
        (["--num-hidden", "1"], ["num_hidden from 2 to 4"]),
        (["--arch", "sm_90"], ["--arch goes with --dry-run"]),
        (["--dry-run", "--arch", "sm_75"], ["unknown architecture 'sm_75'"]),
        (["--dry-run", "--arch", "sm_90", "--jobs", "0"], ["jobs must be at least 1"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") and len(value) % 2 == 0 else "",
)
def test_wrong_arguments_are_one_sentence(dql_here, arguments, parts):
    dql_here("bench", "tune", *arguments).refused(*parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_is_one_sentence(dql_here, file):
    for arguments in ([], ["--json"], ["--dry-run"]):
        line = dql_here("bench", "tune", *arguments).refused("no CUDA device", "--dry-run --arch sm_90")
        assert line.count(". ") == 0
    assert not file.exists()


def test_without_triton_is_one_sentence(dql_here, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dql_here("bench", "tune").refused("Triton is not installed", "pip install")


def test_dry_run_lists_the_candidates(dql_here, file):
    small = ["--hidden-dim", "32", "--rows", "1", "--precision", "bf16", "--kinds", "forward", "--jobs", "1"]
    done = dql_here("bench", "tune", "--dry-run", "--arch", "sm_90", *small, "--json")
    assert (done.code, done.err) == (0, "")
    rows = json.loads(done.out)
    assert [Tile(**row["tile"]) for row in rows] == candidates.for_shape(90, Shape("forward", 32, True, 1))
    for row in rows:
        assert (row["arch"], row["kind"], row["precision"], row["refused"]) == (90, "forward", "bf16", None)
        assert 0 < row["report"]["registers"] <= 255 and row["report"]["shared"] > 0
    assert not file.exists()


def test_tables(capsys):
    report = aot.Report("k", 90, 128, 0, 0, 0, 100_000, 0, 8, 2, {}, 0, 0, 0, (), 1.0)
    found = [
        candidates.Candidate("forward", "fp32", MINE, report, None),
        candidates.Candidate("saving", "bf16", OTHER, report, "it spills: 8 bytes stored, 4 loaded"),
        candidates.Candidate("saving", "bf16", OTHER, None, "it does not compile: X: [y]"),
    ]
    tune._print_candidates(90, found, False)
    said = capsys.readouterr().out
    assert "sm_90: 1 of 3 tiles would be measured" in said
    assert "16 x 32, ring 2, 4 warps" in said and "100,000" in said and "X: [y]" in said
    outcome = tune.Outcome("forward", "fp32", 2560, "k", OTHER, 2e-5, MINE, 1e-5, 7, (Tile(64, 64, 2, 8),), 9)
    none = replace(outcome, heuristic_seconds=None, best=None, best_seconds=None, wrong=())
    same = replace(outcome, best=OTHER, best_seconds=2e-5, wrong=())
    tune._print_outcomes([outcome, none, same], {"gpu": "G"}, "1 of 9 dropped", False)
    said = capsys.readouterr().out
    for part in ("G: 1 of 9 dropped", "2,560", "20.0", "10.0", "+100.0%", "none fits", "the same"):
        assert part in said, part
    assert "left out, a defect: 64 x 64, ring 2, 8 warps gives other results in k" in said
    tune._print_outcomes([outcome, none], {"gpu": "G"}, "", True)
    first, second = json.loads(capsys.readouterr().out)["shapes"]
    assert (first["gain"], second["gain"], first["best"]) == (1.0, None, asdict(MINE))


@needs_gpu
def test_tuning_on_a_gpu(dql, file):
    done = dql(
        *("bench", "tune", "--hidden-dim", 64, "--rows", "1,100", "--seconds", 0.2, "--json"),
        timeout=900,
        env={
            "DQL_TILES": str(file),
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(file.parent / "triton")),
        },
    )
    assert done.code == 0, done.err
    shapes = json.loads(done.out)["shapes"]
    assert [(s["precision"], s["rows"], s["kind"]) for s in shapes] == [
        (precision, rows, kind) for precision in tune.PRECISIONS for rows in (1, 100) for kind in tune.KINDS
    ]
    written = json.loads(file.read_text())["tiles"]
    for shape in shapes:
        assert shape["wrong"] == [] and shape["measured"] > 1 and shape["rounds"] >= tune.MIN_ROUNDS
        assert 0 < shape["best_seconds"] <= shape["heuristic_seconds"]
        assert written[shape["key"]] == shape["best"]
    device = torch.cuda.get_device_properties("cuda")
    arch = 10 * device.major + device.minor
    best = tiles.choose(arch, device.multi_processor_count, Shape("forward", 64, True, 100))
    assert asdict(best) == shapes[9]["best"]
