"""The backend "triton" in Triton's interpreter, on the CPU: its actions and gradients against the transcription, on
every path through the kernels. What needs a GPU is in `gpu/test_numbers`, callers' concerns are in `triton/test_calls`.

The interpreter multiplies float32 exactly, whatever precision a product asks for. But tf32 and bf16 operands are
rounded by hand there (see `dql.kernels.triton.ops`), as a GPU rounds them: those precisions are what they will be on
one, but for the tensor cores' sums.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import (
    CASES,
    TOLERANCES,
    Case,
    assert_all_close,
    assert_close,
    clear_of_kinks,
    expected,
    make_problem,
    named_gradients,
    not_interpreted,
    plain_chain,
    run,
    run_problem,
)
from support.checks import check_against_eager, random_cases, rms_error
from support.rounded_chain import Round, bf16, left_alone, rounded_chain, roundings, tf32, truncated

import dql

Tensor = torch.Tensor

if (reason := not_interpreted()) is not None:
    pytest.skip(reason, allow_module_level=True)

from dql.kernels.triton import chain as reverse_diffusion  # noqa: E402
from dql.kernels.triton import chain_gradients  # noqa: E402
from dql.kernels.triton import runner as chain_runner  # noqa: E402
from dql.kernels.triton.launch import Grid, Kernel  # noqa: E402
from dql.kernels.triton.packing import packed_sizes  # noqa: E402
from dql.kernels.triton.tiles import Shape, Tile  # noqa: E402

SMOOTH = 1e5  # an action bound that nothing reaches: rounding cuts no gradient off
TILES = [  # rows, chunk, stages, warps: 16 rows may stay in registers, others go through memory
    Tile(16, 16, 2, 4),
    Tile(16, 32, 3, 8),
    Tile(32, 16, 2, 4),
    Tile(64, 32, 4, 8),
    Tile(128, 16, 3, 16),
]


@pytest.fixture(autouse=True)
def _poisoned():
    """torch fills what it allocates with NaN, as its deterministic mode does: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# Every case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_transcription(case):
    assert_all_close(run(case, "triton"), expected(case), TOLERANCES["float32"], case=case, backend="triton")


# Reduced precisions


def check_rounded(case: Case, precision: str, what: str = "") -> None:
    """Against float64 with the same operands rounded; the gradient is that of a backward pass that rounds its own."""
    problem, distances = make_problem(case, torch.float64), []
    problem.states.requires_grad_(True)
    actions = rounded_chain(problem, roundings(precision), distances)
    weights = clear_of_kinks(problem, distances, margins=10)
    want = named_gradients(problem, actions, problem.states, weights)
    got = run_problem(make_problem(case, torch.float32), "triton", weights, precision)
    for name in want:
        allowed = TOLERANCES[f"{precision} operands" + (", gradient" if name != "actions" else "")]
        rms = rms_error(got[name], want[name])
        assert rms <= allowed.rel, f"{name} in case {case} {what}: {rms:.2g} above {allowed.rel:g}: {allowed.why}"


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_tf32(case):
    check_rounded(case, "tf32")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16(case):
    check_rounded(case, "bf16")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_each_operand_is_rounded_in_its_own_way(precision):
    """Had the kernels left one of them as it was, cut it off or rounded it to the other type, it would show.

    One float32 sum beside the border of two operands may round to the other: that hides a little. Of three cases one
    at least is free of it, or nearly, and tells the kernels from those of any other way by a factor of ten.
    """
    cases = [Case(B=B, S=5, A=3, K=3, N=2, H=32, max_action=SMOOTH) for B in (7, 9, 10)]
    problems = [make_problem(case, torch.float32) for case in cases]
    got = [run_problem(problem, "triton", problem.weights, precision) for problem in problems]

    def errors(changed: dict[str, Round]) -> list[dict[str, float]]:
        """Of each case and tensor, against the chain whose operands are rounded like that."""
        found = []
        for case, mine in zip(cases, got, strict=True):
            exact = make_problem(case, torch.float64)
            exact.states.requires_grad_(True)
            actions = rounded_chain(exact, roundings(precision, changed))
            want = named_gradients(exact, actions, exact.states, exact.weights)
            found.append({name: rms_error(mine[name], want[name]) for name in want})
        return found

    right = errors({})
    assert min(max(of_case.values()) for of_case in right) <= 1e-5
    for name, how in roundings(precision).items():
        for other in {left_alone, truncated, tf32, bf16} - {how}:
            ratios = [
                wrong[tensor] / (of_case[tensor] + 1e-7)
                for wrong, of_case in zip(errors({name: other}), right, strict=True)
                for tensor in of_case
            ]
            assert max(ratios) > 10, f"{name}: {how.__name__} or {other.__name__}"


def test_a_table_of_ones_own():
    """Whose last step leaves the bounds, which no sampler's does: its clamp cuts gradients off too."""
    case = Case(B=37, S=3, A=3, K=3, H=16, num_hidden=2)
    rows = ((1.5, 0.8, 0.6, 0.3, 0.0, 0.5), (1.2, 0.6, 0.4, 0.3, 0.2, 0.4), (1.1, 0.3, 0.7, 0.9, -0.3, 0.0))
    exact, problem = (
        replace(make_problem(case, dtype), table=dql.StepTable("own", rows, (2, 1, 0)))
        for dtype in (torch.float64, torch.float32)
    )
    distances: list[Tensor] = []
    with torch.no_grad():
        plain_chain(exact, distances)
    weights = clear_of_kinks(exact, distances)
    want = run_problem(exact, "eager", weights)
    at_bound = (want["actions"].abs() == 1)[weights != 0].double().mean()
    assert 0.1 < at_bound < 0.9
    assert_all_close(run_problem(problem, "triton", weights), want, TOLERANCES["float32"], case=case, backend="triton")


# Tiles


def forced(monkeypatch: pytest.MonkeyPatch, forward: Tile, backward: Tile | None = None) -> list[Shape]:
    """These tiles from now on, whatever fits better. Returns the list of the shapes that are asked for, as it grows."""
    asked: list[Shape] = []

    def choose(arch: int, processors: int, shape: Shape) -> Tile:
        asked.append(shape)
        return (backward or forward) if shape.kind == "backward" else forward

    monkeypatch.setattr(chain_runner, "choose", choose)
    return asked


def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Kernel, Grid]]:
    """Every launch from now on, in a list that grows."""
    seen: list[tuple[Kernel, Grid]] = []
    launch = Kernel.launch

    def recorded(kernel: Kernel, grid: Grid, *arguments: object) -> None:
        seen.append((kernel, grid))
        launch(kernel, grid, *arguments)

    monkeypatch.setattr(Kernel, "launch", recorded)
    return seen


TILED = [
    Case(B=37, S=11, A=3, K=3, H=48),
    Case(B=9, S=3, A=40, K=3, N=5, H=24, num_hidden=2, activation="silu"),
    Case(B=19, S=5, A=20, K=2, H=130, activation="relu", max_action=3.0),
]


def in_registers(case: Case, tile: Tile) -> bool:
    return reverse_diffusion.small(tile, packed_sizes(make_problem(case, torch.float32).policy.denoiser.spec))


def test_every_case_has_a_tile_that_goes_through_memory_and_most_another():
    ways = [{in_registers(case, tile) for tile in TILES} for case in TILED]
    assert ways == [{True, False}, {True, False}, {False}]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("case", TILED, ids=str)
def test_any_tile_gives_the_same(case, tile, monkeypatch):
    usual = run(case, "triton")
    asked, seen = forced(monkeypatch, tile), launches(monkeypatch)
    got = run(case, "triton")
    assert [shape.kind for shape in asked] == ["saving", "backward"]
    assert_all_close(got, expected(case), TOLERANCES["float32"], case=case, backend=f"triton, {tile}")
    assert_close(got["actions"], usual["actions"], TOLERANCES["rows"], what="actions", case=case)
    chains = [(kernel, grid) for kernel, grid in seen if kernel.name in ("chain_fwd", "chain_bwd")]
    assert len(chains) == 2
    for kernel, grid in chains:
        constants = dict(kernel.constants)
        assert grid == (-(-case.rows // tile.rows), 1, 1)
        assert (constants["ROWS"], constants["HOLD"]) == (tile.rows, in_registers(case, tile))


@pytest.mark.parametrize("tile", [TILES[0], TILES[1], TILES[3]], ids=str)
@pytest.mark.parametrize("case", TILED, ids=str)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_any_tile_rounds_alike(precision, case, tile, monkeypatch):
    forced(monkeypatch, tile)
    check_rounded(case, precision, str(tile))


@pytest.mark.parametrize(
    ("forward", "backward", "programs"),
    [(TILES[0], TILES[3], (3, 3)), (TILES[2], TILES[4], (2, 1)), (TILES[3], TILES[0], (1, 4))],
    ids=str,
)
def test_the_backward_pass_has_tiles_of_its_own(forward, backward, programs, monkeypatch):
    """One that does not divide the padded rows of the forward pass is halved until it does: 48 rows take 16."""
    case = TILED[0]
    forced(monkeypatch, forward, backward)
    seen = launches(monkeypatch)
    got = run(case, "triton")
    assert_all_close(got, expected(case), TOLERANCES["float32"], case=case, backend="triton")
    grids = {kernel.name: grid[0] for kernel, grid in seen}
    assert (grids["chain_fwd"], grids["chain_bwd"]) == programs


# Sums over rows, in parts


@pytest.fixture
def rows_at_a_time(monkeypatch):
    """A function that sets how many rows the sums take at a time, and for how many multiprocessors they are split."""

    def set_both(rows: int, processors: int) -> None:
        monkeypatch.setattr(chain_gradients, "_CHUNK", rows)
        monkeypatch.setattr(chain_gradients, "multiprocessors", lambda device: processors)
        chain_gradients.products_kernel.cache_clear()

    yield set_both
    chain_gradients.products_kernel.cache_clear()


def run_afresh(case: Case, precision: str = "fp32") -> dict[str, Tensor]:
    """`run` with nothing kept of an earlier call, which is kept with the step table."""
    problem = make_problem(case, torch.float32)
    return run_problem(replace(problem, table=replace(problem.table)), "triton", precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sums_in_parts(precision, rows_at_a_time, monkeypatch):
    """Any number of parts gives the same to rounding, and twice the same call the same bits."""
    case = Case(B=13, S=70, A=3, K=4, H=80, N=3, num_hidden=2)  # HP = 128: 4 tiles of 64 x 64, and 4 of the states
    forced(monkeypatch, TILES[0])
    seen = launches(monkeypatch)

    def sums(processors: int) -> tuple[int, dict[str, Tensor]]:
        rows_at_a_time(16, processors)
        seen.clear()
        result, again = (run_afresh(case, precision) for _ in range(2))
        assert all(torch.equal(again[name], result[name]) for name in result), f"{processors} multiprocessors"
        (parts, same) = (grid[1] for kernel, grid in seen if kernel.name == "chain_products")
        assert parts == same
        return parts, result

    one, want = sums(0)
    found = [one]
    for processors in (4, 10_000):
        parts, got = sums(processors)
        found.append(parts)
        assert_all_close(got, want, TOLERANCES["sums"], case=f"{case} in {parts} parts", backend="triton")
    assert found == [1, 2, 3]  # at most one for every 64 of the 4 * 48 rows


def test_more_parts_than_rows(rows_at_a_time, monkeypatch):
    """Parts beyond the last row have nothing to add, and say so."""
    case = TILED[0]
    rows_at_a_time(256, 10_000)
    chain_gradients.products_kernel(make_problem(case, torch.float32).policy.denoiser.spec, "fp32", True)
    monkeypatch.setattr(chain_gradients, "_CHUNK", 8)  # the kernel keeps its 256
    seen = launches(monkeypatch)
    got = run_afresh(case)
    assert next(grid[1] for kernel, grid in seen if kernel.name == "chain_products") > case.K * 64 / 256
    assert_all_close(got, expected(case), TOLERANCES["float32"], case=case, backend="triton")


# Random problems


@st.composite
def problems(draw: Callable[..., Case]) -> tuple[Case, Tile, Tile]:
    """A problem, and the tiles to run it by."""

    def tile() -> Tile:
        return Tile(draw(st.sampled_from([16, 32, 64])), 16, 2, draw(st.sampled_from([1, 4, 8])))

    return draw(random_cases()), tile(), tile()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_random_problems(problem):
    case, forward, backward = problem
    with pytest.MonkeyPatch.context() as patch:
        forced(patch, forward, backward)
        check_against_eager(case, "triton")


@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, S=512, A=64, K=2, H=512, num_hidden=4, time_dim=64),
        Case(B=15, S=1, A=1, K=2, H=1, num_hidden=2, activation="silu", time_dim=4),
        Case(B=9, S=3, A=2, K=33, H=16, num_hidden=2, predict_epsilon=False, max_action=20.0),
    ],
    ids=["largest", "smallest", "more steps than a program takes"],
)
def test_the_corners_of_what_it_takes(case):
    assert check_against_eager(case, "triton") >= 0.3


def test_a_thousand_steps():
    problem = make_problem(Case(B=1, S=3, A=2, K=1000, H=16, num_hidden=2, beta_schedule="linear"), torch.float32)
    with torch.no_grad():
        got = dql.sample(problem.states, problem.policy, noise=problem.noise, backend="triton")
        want = dql.sample(problem.states, problem.policy, noise=problem.noise, backend="eager")
    assert_close(got, want, TOLERANCES["float32"], what="actions", backend="triton")
