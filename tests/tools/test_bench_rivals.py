"""What the benches compare by: problems that decide something, and checks that can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_gpu
import bench_update
import machine
import numpy as np
import pytest
import rivals
import table
import torch
from lean import LeanAgent, lean_select
from rows import Row, best_rival, row_reports

import dql

BENCH = Path(machine.__file__).parent
CPU = torch.device("cpu")


@pytest.mark.parametrize("margin", bench_gpu.CLAMP_MARGINS.values(), ids=bench_gpu.CLAMP_MARGINS)
@pytest.mark.parametrize("B", [1, 50])
def test_every_row_of_a_problem_counts(B, margin):
    """At B = 1, too: rows of which rounding would decide are not drawn."""
    states, noise, weights = rivals.problem(B, CPU, margin)
    assert (states.shape, noise.shape, weights.shape) == ((B, rivals.S), (rivals.T, B, rivals.A), (B, rivals.A))
    assert weights.all() and len(states.unique(dim=0)) == B
    with torch.no_grad():
        _, predictions = rivals.LeanActor(rivals.published_actor(CPU)).chain(states, noise)
    assert (torch.stack(predictions).abs() - 1).abs().amin() > margin * 0.999
    assert all(map(torch.equal, rivals.problem(B, CPU, margin), (states, noise, weights)))


def test_norms():
    want = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2)}
    assert rivals.check_norms("x", {"a": torch.tensor([3.0, 4.5]), "b": torch.ones(2)}, want, 0.2) == pytest.approx(0.1)
    with pytest.raises(AssertionError, match="of 2 gradients these are off, allowed 1e-02: a by"):
        rivals.check_norms("x", {"a": torch.tensor([3.0, 4.5]), "b": torch.ones(2)}, want, 0.01)
    with pytest.raises(AssertionError, match="off"):
        rivals.check_norms("x", want | {"b": torch.full((2,), torch.nan)}, want, 0.2)
    with pytest.raises(AssertionError, match=r"expected to be zero, which compares nothing: \['b'\]"):
        rivals.check_norms("x", want, want | {"b": torch.zeros(2)}, 0.2)


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile gives the function itself, which takes no minute; the benches check what it compiles."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_the_compiled_update_is_the_published_one(max_q_backup, uncompiled):
    """Losses and gradients of the first update; of several, given the same draws, the parameters and averages."""
    batch, published = bench_update._batch(CPU), rivals.published_agent(CPU, max_q_backup=max_q_backup)
    published.ema_start = 0
    lean = LeanAgent(published, bench_update.B)
    assert bench_update._check_lean("lean", lean, published, batch) <= rivals.GRADIENT_TOLERANCE
    for seed in (1, 2):
        draws = bench_update._draws(dql.draws.UpdateSeeds.of(seed, seed), published, CPU)
        bench_update._given_update(published, batch, draws)
        lean.update(batch, draws)
    for name in ("actor", "ema_actor", "critic", "critic_target"):
        got, want = (dict(getattr(agent, name).named_parameters()) for agent in (lean, published))
        for key, tensor in want.items():
            torch.testing.assert_close(got[key], tensor, rtol=0, atol=1e-5, msg=f"{name}.{key}")
    assert lean.step == published.step == 3


def test_the_compiled_update_draws_and_learns(uncompiled):
    lean = LeanAgent(rivals.published_agent(CPU), bench_update.B)
    before = [p.clone() for p in lean.actor.parameters()]
    losses = [lean.update(bench_update._batch(CPU)) for _ in range(2)]
    assert losses[0]["actor/bc_loss"] != losses[1]["actor/bc_loss"]
    assert not any(map(torch.equal, before, lean.actor.parameters()))


def test_the_compiled_select_is_the_published_rule(uncompiled):
    published, state = (
        rivals.published_agent(CPU),
        np.random.default_rng(0).standard_normal(rivals.S).astype(np.float32),
    )
    select = lean_select(published, 50)
    for seed in range(5):
        noise, draw = dql.noise.normal(seed, rivals.T, 50, rivals.A), dql.noise.uniform(seed, 1)
        got = torch.from_numpy(select(state, noise, draw))
        rivals.check_selected("compile-lean", got, published, torch.from_numpy(state)[None], 50, seed)
    assert not np.array_equal(select(state), select(state)), "it draws"


needs_jax = pytest.mark.skipif(rivals.no_jax(CPU, short=False) is not None, reason=str(rivals.no_jax(CPU, short=False)))


@pytest.fixture
def lean_jax(monkeypatch):
    """Compiled with less care, which takes two thirds of the time; the benches check what they time."""
    import lean_jax

    monkeypatch.setattr(lean_jax, "OPTIONS", {"xla_backend_optimization_level": 0})
    return lean_jax


@needs_jax
def test_the_update_in_jax_is_the_published_one_and_ours(lean_jax):
    """Losses, gradients and steps of the first update; of three, given the same draws, the parameters and averages.

    With `max_q_backup`, of which one candidate is a case: every update takes seconds to compile.
    """
    batch, published = bench_update._batch(CPU), rivals.published_agent(CPU, max_q_backup=True)
    averaging = {"ema_start": 0, "ema_every": 2, "ema_decay": 0.5}  # so far that it is seen
    for name, value in averaging.items():
        setattr(published, name, value)
    config = dql.Config(backend="eager", max_q_backup=True, **averaging)
    ours, agent = rivals.matching_agent(published, config, CPU), lean_jax.JaxAgent(published)
    arrays = {name: lean_jax.array_of(value) for name, value in vars(batch).items()}
    assert bench_update._check_jax("jax", agent, published, batch) <= rivals.GRADIENT_TOLERANCE
    ours.update(batch)
    for step in (1, 2):
        draws = bench_update._draws(dql.draws.UpdateSeeds.of(config.seed, step), published, CPU)
        bench_update._given_update(published, batch, draws)
        agent.update(arrays, draws)
        ours.update(batch)
    modules = {f"{name}.{key}": p for name, m in ours.modules().items() for key, p in m.named_parameters()}
    got = agent.parameters()
    for wanted in (bench_update._parameters(published), modules):
        assert got.keys() == wanted.keys()
        for key, tensor in wanted.items():  # Adam moves what has a gradient of rounding size by up to lr, 3e-4
            torch.testing.assert_close(got[key], tensor.detach(), rtol=0, atol=3e-5, msg=key)
    assert int(agent.state["step"]) == published.step == ours.step == 3


@needs_jax
def test_the_update_in_jax_draws_and_learns(lean_jax):
    agent, batch = lean_jax.JaxAgent(rivals.published_agent(CPU)), bench_update._batch(CPU)
    arrays = {name: lean_jax.array_of(value) for name, value in vars(batch).items()}
    before = agent.parameters()
    losses = [float(agent.update(arrays)["actor/bc_loss"]) for _ in range(2)]
    assert losses[0] != losses[1]
    assert not any(torch.equal(before[key], p) for key, p in agent.parameters().items() if not key.startswith("ema"))


@needs_jax
def test_the_chain_in_jax_is_the_published_one(lean_jax):
    """Actions and gradients; without noise it draws."""
    states, noise, weights = rivals.problem(3, CPU)
    actor = rivals.published_actor(CPU)
    chain, gradients = lean_jax.sampler(actor, states), lean_jax.gradients(actor, states, weights)
    actions = actor.sample(states, noise)
    rivals.check_elements("jax", "actions", chain(noise), actions.detach(), rivals.ACTION_TOLERANCE)
    names, parameters = zip(*actor.model.named_parameters(), strict=True)
    want = dict(zip(names, torch.autograd.grad((actions * weights).sum(), parameters), strict=True))
    rivals.check_norms("jax", gradients(noise), want, rivals.GRADIENT_TOLERANCE)
    for draw in (chain, lambda: gradients()["final_layer.bias"]):
        first, second = (np.array(draw()) for _ in range(2))
        assert np.isfinite(first).all() and not np.array_equal(first, second)


@needs_jax
def test_select_in_jax_is_the_published_rule(lean_jax):
    published, state = rivals.published_agent(CPU), np.linspace(-1, 1, rivals.S, dtype=np.float32)
    select = lean_jax.jax_select(published, 50)
    for seed in range(5):
        noise, draw = dql.noise.normal(seed, rivals.T, 50, rivals.A), dql.noise.uniform(seed, 1)
        got = torch.from_numpy(select(state, noise, draw))
        rivals.check_selected("jax", got, published, torch.from_numpy(state)[None], 50, seed)
    assert not np.array_equal(select(state), select(state)), "it draws"


@needs_jax
def test_jax_uses_as_many_threads_as_torch(lean_jax, monkeypatch):
    lean_jax.start.__wrapped__()
    monkeypatch.setattr(lean_jax, "threads_used", lambda: 1.9)
    with pytest.raises(AssertionError, match=r"jax computes with .* threads, allowed 1"):
        lean_jax.start.__wrapped__()


def test_jax_says_why_not(monkeypatch):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None if name == "jax" else object())
    assert "jax is not installed: pip install" in rivals.no_jax(CPU, short=False)
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: object())
    assert rivals.no_jax(CPU, short=False) is None
    assert "leave out --short" in rivals.no_jax(CPU, short=True)
    assert "is compared on a CPU, this is cuda" in rivals.no_jax(torch.device("cuda"), short=False)


def test_precisions_of_contenders():
    names = ["published", "compile-lean", "openvino-static", "dql-cpp"]
    assert {rivals.precision_of(name) for name in names} == {"fp32"}
    names = [rivals.OPENVINO_BF16, "dql-cpp-bf16", "compile-lean-bf16", "compile-lean-bf16+graph"]
    assert {rivals.precision_of(name) for name in names} == {"bf16"}
    assert rivals.precision_of("dql-cuda-tf32") == "tf32"


def test_openvino_in_bf16_says_why_not(monkeypatch):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    assert "needs openvino" in rivals.no_runtime(rivals.OPENVINO_BF16, CPU)
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(rivals, "_openvino_capabilities", lambda: ["FP32", "INT8"])
    assert "needs a CPU on which OpenVINO multiplies bf16" in rivals.no_runtime(rivals.OPENVINO_BF16, CPU)
    assert rivals.no_runtime("openvino-static", CPU) is None
    monkeypatch.setattr(rivals, "_openvino_capabilities", lambda: ["FP32", "BF16"])
    assert rivals.no_runtime(rivals.OPENVINO_BF16, CPU) is None


def race(**milliseconds: float) -> list[Row]:
    names = {name.replace("_", "-"): value for name, value in milliseconds.items()}
    return [Row("sample B=1, forward", name, [value] * 3, [8.0] * 3) for name, value in names.items()]


def test_like_is_compared_with_like():
    """Of a float32 row a rival in bf16 is none; who takes bf16 takes the faster of both."""
    rows = race(published=8, compile_lean=4, openvino_static=2, openvino_static_bf16=1, dql_cpp=1, dql_cpp_bf16=0.5)
    of = {row.contender: best_rival(row, rows) for row in rows}
    assert of["dql-cpp"].contender == "openvino-static"
    assert of["dql-cpp-bf16"].contender == "openvino-static-bf16"
    header, _, line = table.race_table(row_reports(rows)).splitlines()
    assert header.split(" | ")[3:5] == ["ONNX Runtime or OpenVINO", "OpenVINO, bf16"]
    assert "| 1000000 us" not in line
    assert line.endswith("(8x, 2x) | 500 ms (16x, 2x) |")
    rows = race(published=8, openvino_static=1, openvino_static_bf16=2, dql_cpp_bf16=0.5)
    assert table.race_table(row_reports(rows)).endswith("500 ms (16x, 2x (fp32)) |")
    old = [{key: value for key, value in row.items() if key != "best_rival"} for row in row_reports(rows)]
    assert table.race_table(old).endswith("500 ms (16x, 2x (fp32)) |")


def test_jax_has_a_column_and_is_a_rival():
    """Also where a report has it for some problems only; a report without it has no such column."""
    rows = race(published=8, compile_lean=4, jax=2, openvino_static=2.5, dql_cpp=1)
    rows += [Row("update B=256", name, [4.0] * 3, [8.0] * 3) for name in ("published", "jax", "dql-cpp")]
    rows += [Row("update B=256, x", name, [4.0] * 3, [8.0] * 3) for name in ("published", "dql-cpp")]
    assert best_rival(rows[4], rows[:5]).contender == "jax"
    header, _, *lines = table.race_table(row_reports(rows)).splitlines()
    column = header.split(" | ").index("JAX")
    assert [line.split(" | ")[column] for line in lines] == ["2e+03 ms", "4e+03 ms", "not measured"]
    assert lines[0].endswith("(8x, 2x) |")
    assert "JAX" not in table.race_table(row_reports(race(published=8, compile_lean=4, dql_cpp=1)))


def test_an_empty_cell_says_why():
    rows = race(published=8, compile_lean=4, openvino_static=2, dql_cpp=1, dql_cpp_bf16=0.5)
    for problem in ("select N=50, one state", "update B=256", "sample B=1, forward and backward"):
        rows += [Row(problem, name, [4.0] * 3, [8.0] * 3) for name in ("published", "dql-cpp")]
    lines = [line.split(" | ") for line in table.race_table(row_reports(rows)).splitlines()[3:]]
    assert [[line[2], line[3], line[-1].removesuffix(" |")] for line in lines] == [
        ["not measured", "exports no critic", "not measured"],
        ["not measured", "has no gradients", "float32 only"],
        ["not measured", "has no gradients", "float32 only"],
    ]


def bench(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark-only", "--short"]
    # A worker of pytest-xdist hands its variables on, with which nothing is timed.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run([*command, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, env=env)


def test_a_report_says_where_it_comes_from(tmp_path):
    out = tmp_path / "out.json"
    done = bench("bench/bench_update.py", "-k", "bc", "--bench-json", out, cwd=BENCH.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["cpu"] and isinstance(report["cpu_features"], list)
    assert f"--bench-json {out}" in report["command"] and "bench/bench_update.py" in report["command"]
    assert report["changed_sources"] == machine.changed_sources()
    told = machine.provenance(report)
    assert report["command"] in told
    assert told in table.tables(report) and told in done.stdout


def test_changed_sources_are_loud():
    report = {"cpu": "a CPU", "threads": 1, "commit": "abcdef0123456", "uncommitted_changes": True, "rows": []}
    told = table.tables(report | {"changed_sources": ["dql/a.py", "b", "c", "d"]})
    assert "NOT OF THAT COMMIT" in told and "4 changed file(s): dql/a.py, b, c ..." in told
    assert "ITS COMMAND WAS NOT RECORDED" in told
    clean = table.tables(report | {"uncommitted_changes": False, "command": "pytest bench/"})
    assert clean == "a CPU, 1 thread(s), torch None, None, commit abcdef0123. `pytest bench/`"


def test_no_report_of_changed_sources_among_the_results():
    path = BENCH / "results" / "none.json"
    code = (
        "import sys; sys.path.insert(0, 'bench'); import machine, pytest; "
        "machine.changed_sources = lambda: ['dql/a.py']; "
        f"sys.exit(pytest.main(['-p', 'no:cacheprovider', '--collect-only', '-q', 'bench/bench_import.py', "
        f"'--bench-json', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH.parent, capture_output=True, text=True)
    assert done.returncode == 4, done.stdout
    assert "1 source(s) differ from the commit (dql/a.py); commit them first" in done.stderr
    assert not path.exists()
