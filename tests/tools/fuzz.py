"""Malformed inputs by the hundred, in one process: python tests/tools/fuzz.py KIND COUNT SEED, in an empty folder.

Kinds: calls (of the Python API), commands (lines of the command line), hdf5 (flipped bytes), json (of metadata and of a
run's folder), tensors (of every kind that torch has). A line of JSON tells what became of them: how many were refused,
how many were harmless (a flip that no reader looks at), and each fault: an exception the API does not name, an exit
code of 0, a traceback, a file written or a program started outside of the folder. A signal or a hang ends the
process, whose last line on stderr names the input: `tests/tools/test_fuzz.py` looks.
"""

import contextlib
import copy
import io
import json
import math
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path.cwd().resolve()
os.environ |= {"MINARI_DATASETS_PATH": str(HERE / "minari"), "DQL_CACHE": str(HERE / "cache"), "HOME": str(HERE)}
os.environ |= {
    "TMPDIR": str(HERE / "tmp"),
    "XDG_CACHE_HOME": str(HERE / "xdg"),
    "TRITON_CACHE_DIR": str(HERE / "triton"),
}

import gymnasium  # noqa: E402
import h5py  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import dql  # noqa: E402
from dql.checkpoint import CheckpointError  # noqa: E402
from dql.config import RunConfig  # noqa: E402
from dql.data import DatasetInfo, TransitionDataset, list_datasets  # noqa: E402
from dql.rundir import RunError  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
S, A = 3, 2
REFUSALS = (ValueError, TypeError, CheckpointError, RunError, dql.BackendUnavailable, FileNotFoundError, ImportError)
Case = tuple[str, Callable[[], object]]  # what it is; the call

outside: list[str] = []  # what was touched that must not be
watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: writes outside of the folder, and programs."""
    if not watching:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in str(mode) for letter in "wax+") if mode is not None else bool(flags & 0o3)
        if writes and isinstance(path, (str, bytes)) and not _is_ours(os.fsdecode(path)):
            outside.append(f"{event} {path!r}")
    elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"):
        if not all(_is_ours(os.fsdecode(p)) for p in arguments[:2] if isinstance(p, (str, bytes))):
            outside.append(f"{event} {arguments!r}")
    elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn"):
        outside.append(f"{event} {str(arguments)[:200]}")


def _is_ours(path: str) -> bool:
    if path.startswith(("/dev/", "/proc/")):
        return True
    full = Path(os.path.abspath(path))
    return full.is_relative_to(HERE)


# Values


class Odd:
    """Has nothing of what anybody asks for, and refuses what everything has."""

    def __repr__(self) -> str:
        return "Odd()"

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


def garbage(random_: random.Random) -> Any:
    """One wrong value for nearly every argument."""
    plain = [
        None,
        True,
        "",
        "yes",
        "\0",
        "x" * 10_000,
        "../../etc",
        "🤖",
        b"bytes",
        [],
        [1, [2]],
        {},
        {"a": 1},
        (),
        (1, 2),
    ]
    numbers = [-1, 0, 2**63, 2**64, -(2**70), 10**30, 0.5, -0.0, math.nan, math.inf, -math.inf, 1e300, 1e-300, 3 + 4j]
    objects = [
        set(),
        object(),
        Odd(),
        print,
        int,
        range(3),
        torch.device("meta"),
        torch.float16,
        Path("/nowhere/at/all"),
    ]
    arrays = [np.float32(2), np.int64(-7), np.zeros(0), np.zeros((3, 3)), np.array(["a"]), np.array([object()])]
    arrays += [np.zeros((2, 3), complex), np.ma.masked_array([1.0], [True])]
    tensors = [torch.zeros(0), torch.zeros(2, 2, 2), torch.full((4, S), math.nan), torch.zeros(4, S, dtype=torch.int64)]
    tensors += [torch.zeros(4, S, dtype=torch.complex64)]
    return random_.choice([*plain, *numbers, *objects, *arrays, *tensors])


def value_of_json(random_: random.Random) -> Any:
    deep: Any = 1
    for _ in range(random_.choice([3, 50, 400])):
        deep = [deep]
    plain = [None, True, False, "", "x", "os:system", "../../../tmp/x", "\0", "x" * 5000, "NaN"]
    numbers = [-1, 0, 2**70, 1e308, 0.5, math.nan, math.inf]
    return random_.choice([*plain, *numbers, [], {}, [1, 2], ["id"], deep, {"a": deep}, {"id": "os:Thing-v0"}])


# The kinds


def calls(random_: random.Random) -> Iterator[Case]:
    policy = dql.DiffusionPolicy(S, A, hidden_dim=16, num_hidden=2)
    critic = dql.TwinCritic(S, A, 16, 2)
    agent = dql.DiffusionQL(S, A, dql.Config(hidden_dim=16, num_hidden=2))
    states = torch.zeros(4, S)
    info = DatasetInfo("mine", None, None, None, 1, np.zeros(1), "box", 1.0)
    batch = {"states": states, "actions": torch.zeros(4, A), "rewards": torch.zeros(4)}
    batch |= {"next_states": states, "masks": torch.ones(4)}

    def changed(call: Callable[..., object], values: dict[str, Any], name: str) -> Callable[[], object]:
        return lambda: call(**values | {name: value})

    targets: list[tuple[str, Callable[..., object], dict[str, Any], tuple[str, ...]]] = [
        ("Config", dql.Config, {}, tuple(dql.Config().to_dict())),
        ("RunConfig", RunConfig, {"dataset": "x"}, tuple(RunConfig("x").to_dict())),
        ("sample", dql.sample, {"states": states, "policy": policy},
         ("states", "policy", "backend", "precision", "noise", "seed", "num_candidates", "num_steps", "sampler")),
        ("select", dql.select, {"states": states, "policy": policy, "critic": critic},
         ("states", "policy", "critic", "backend", "precision", "seed", "num_candidates")),
        ("act", agent.act, {"states": states}, ("states", "seed")),
        ("Batch", lambda **v: agent.update(dql.Batch(**v)), batch, tuple(batch)),
        ("TransitionDataset", lambda **v: TransitionDataset(info=info, **v), batch, tuple(batch)),
        ("policy", dql.DiffusionPolicy, {"state_dim": S, "action_dim": A},
         ("state_dim", "action_dim", "max_action", "hidden_dim", "num_hidden", "T", "beta_schedule", "activation")),
        ("TwinCritic", dql.TwinCritic, {"state_dim": S, "action_dim": A}, ("state_dim", "action_dim", "hidden_dim")),
        ("q", critic, {"states": states, "actions": torch.zeros(4, A)}, ("states", "actions")),
        ("load_dataset", dql.load_dataset, {"name_or_path": "x"}, ("name_or_path", "reward_tune", "device")),
        ("load", dql.load, {"path": HERE / "none"}, ("path", "device", "backend")),
        ("DatasetInfo", DatasetInfo.from_json, {"text": "{}"}, ("text",)),
    ]  # fmt: skip
    while True:
        name, call, values, names = random_.choice(targets)
        argument, value = random_.choice(names), garbage(random_)
        yield f"{name}({argument}={str(type(value))[8:-2]} {_short(value)})", changed(call, values, argument)


def _short(value: Any) -> str:
    with contextlib.suppress(Exception):
        return repr(value)[:60]
    return "?"


def commands(random_: random.Random) -> Iterator[Case]:
    _dataset("some/thing-v0")
    run = _run()
    wrong = ["", "x", "\0", "-1", "1e999", "nan", "9" * 5000, "🤖", "../..", "/dev/null/x", "--", "true,false", "0x10"]
    # a command and flags that nothing can be right for, or that the wrong value makes wrong
    lines: list[tuple[list[str], list[str]]] = [
        (["train", "--dataset", "some/thing-v0"],
         ["--num-updates", "--batch-size", "--lr", "--hidden-dim", "--seed", "--T", "--device", "--backend", "--env",
          "--reward-tune", "--algorithm", "--threads", "--keep", "--eval-every", "--tuned", "--resume"]),
        (["train"], ["--dataset", "--resume", "--nothing"]),
        (["train", "--resume", str(run)], ["--num-updates", "--lr", "--dataset"]),
        (["eval", str(run)], ["--checkpoint", "--episodes", "--device", "--backend", "--env", "--seed"]),
        (["eval"], []),
        (["export", str(run)], ["--which", "--sampler", "--num-steps", "--num-candidates"]),
        (["export"], []),
        (["data", "info"], []),
        (["data", "make"], []),
        (["data", "make", "pendulum-mixed"], ["--steps", "--seed"]),
        (["data"], []),
        (["demo"], ["--updates", "--episodes", "--seed"]),
        (["kernels"], ["--arch", "--jobs", "--backend"]),
        (["bench", "tune"], ["--rows", "--arch", "--precision"]),
        ([], []),
    ]  # fmt: skip
    from dql.cli import main

    while True:
        base, flags = random_.choice(lines)
        words, value = list(base), random_.choice(wrong)
        if flags and (base[-1] not in ("info", "make") or random_.random() < 0.5):
            words += [random_.choice(flags), value]
        else:
            words += [value or "\0"]
        # digits alone may be right: these lines are to be wrong for certain
        if random_.random() < 0.1:
            words += ["--no-such-flag"]

        def call(words: list[str] = words) -> None:
            said, told = io.StringIO(), io.StringIO()
            try:
                with contextlib.redirect_stdout(told), contextlib.redirect_stderr(said):
                    code = main(words)
            except SystemExit as stop:
                code = stop.code
            text = said.getvalue()
            if code == 0:
                raise AssertionError(f"it ended with 0: {told.getvalue()[-200:]}")
            if "Traceback" in text or "did not foresee" in text:
                raise AssertionError(text[-600:])
            if code == 1 and len(text.strip().splitlines()) != 1:
                raise AssertionError(f"more than a line: {text[-300:]}")
            raise ValueError(text)  # refused, as it should be

        yield "dql " + " ".join(word[:40] for word in words), call


def hdf5(random_: random.Random) -> Iterator[Case]:
    minari = _dataset("some/thing-v0") / "data" / "main_data.hdf5"
    d4rl = HERE / "hopper_medium-v2.hdf5"
    with h5py.File(d4rl, "w") as file:
        for name, shape in {"observations": (40, S), "actions": (40, A), "rewards": (40,)}.items():
            file[name] = np.zeros(shape, np.float32)
        file["terminals"] = file["timeouts"] = np.arange(40) % 10 == 9
    whole = {path: path.read_bytes() for path in (minari, d4rl)}
    while True:
        path = random_.choice([minari, d4rl])
        content = bytearray(whole[path])
        places = [random_.randrange(len(content)) for _ in range(random_.choice([1, 1, 4, 64]))]
        how = random_.choice(["flip", "zero", "ones", "cut", "shuffle"])
        for place in places:
            if how == "flip":
                content[place] ^= 1 << random_.randrange(8)
            elif how in ("zero", "ones"):
                content[place : place + 8] = (b"\0" if how == "zero" else b"\xff") * len(content[place : place + 8])
            elif how == "shuffle":
                other = random_.randrange(len(content))
                content[place], content[other] = content[other], content[place]
        content = content[: places[0]] if how == "cut" else content

        def call(path: Path = path, content: bytes = bytes(content)) -> None:
            path.write_bytes(content)
            try:
                dql.load_dataset("some/thing-v0" if path == minari else str(d4rl), cache=False)
            finally:
                path.write_bytes(whole[path])

        yield f"{path.name} {how} at {places[:4]}", call


def json_(random_: random.Random) -> Iterator[Case]:
    metadata = _dataset("some/thing-v0") / "data" / "metadata.json"
    run = _run()
    loop = next(run.glob("checkpoints/step-*")) / "loop.json"
    files = {path: path.read_text() for path in (metadata, run / "config.json", loop, run / "selection.json")}
    agent = next(run.glob("checkpoints/step-*")) / "agent.safetensors"
    weights = agent.read_bytes()
    while True:
        path = random_.choice([*files, agent])
        if path == agent:
            n = int.from_bytes(weights[:8], "little")
            text, rest = weights[8 : 8 + n].decode(), weights[8 + n :]
        else:
            text, rest = files[path], b""
        written = json.loads(text)
        what = _mutate(written, random_)
        changed = json.dumps(written)
        if random_.random() < 0.1:
            changed = changed[: random_.randrange(len(changed))]
        content = changed.encode()
        if path == agent:
            content += b" " * (-len(content) % 8)
            content = len(content).to_bytes(8, "little") + content + rest

        def call(path: Path = path, content: bytes = content) -> None:
            before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
            before[metadata] = files[metadata].encode()
            path.write_bytes(content)
            try:
                if path == metadata:
                    list_datasets()
                    data = dql.load_dataset("some/thing-v0", cache=False)
                    if data.info.env_spec is not None:
                        _make(data.info)
                elif path.name in ("config.json", "selection.json"):
                    _command("eval", str(run), "--episodes", "1")
                else:
                    _command("train", "--resume", str(run))
            finally:
                for p in run.rglob("*"):
                    if p.is_file() and p not in before:
                        p.unlink()
                for p, old in before.items():
                    p.parent.mkdir(parents=True, exist_ok=True)
                    p.write_bytes(old)

        yield f"{path.name}: {what}", call


def _make(info: Any) -> None:
    from dql.environments import make_env

    make_env(info).close()


def _command(*words: str) -> None:
    """A command line that may be right; what it says must be a line."""
    from dql.cli import main

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = main(list(words))
    except SystemExit as stop:
        code = stop.code
    text = said.getvalue()
    if "Traceback" in text or "did not foresee" in text:
        raise AssertionError(text[-600:])
    if code:
        raise ValueError(text)


def _mutate(written: Any, random_: random.Random) -> str:
    """Changes one place of a JSON value, and says which."""
    places: list[tuple[Any, Any]] = []
    waiting = [written]
    while waiting:
        here = waiting.pop()
        for key, value in here.items() if isinstance(here, dict) else enumerate(here):
            places.append((here, key))
            if isinstance(value, (dict, list)) and value:
                waiting.append(value)
            elif isinstance(value, str) and value.startswith("{") and random_.random() < 0.5:
                inner = json.loads(value)
                what = _mutate(inner, random_)
                here[key] = json.dumps(inner)
                return f"in {key}: {what}"
    here, key = random_.choice(places)
    if random_.random() < 0.3:
        del here[key]
        return f"without {key}"
    here[key] = value_of_json(random_)
    return f"{key} = {_short(here[key])}"


def tensors(random_: random.Random) -> Iterator[Case]:
    from support.hostile_tensors import HOSTILE

    from dql.backend.registry import registry
    from dql.values import q_values

    policy = dql.DiffusionPolicy(S, A, hidden_dim=16, num_hidden=2)
    critic = dql.TwinCritic(S, A, 16, 2)
    agent = dql.DiffusionQL(S, A, dql.Config(hidden_dim=16, num_hidden=2))
    states, actions = torch.randn(4, S), torch.rand(4, A)
    noise = torch.randn(5, 4, A)
    while True:
        kind, backend = random_.choice(sorted(HOSTILE)), random_.choice(["auto", "cpp", "eager"])
        make = HOSTILE[kind]
        options = {"backend": backend}
        where = random_.choice(["states", "noise", "select", "critic", "act", "batch", "weights"])

        def call(make: Any = make, where: str = where, options: dict[str, Any] = options) -> object:
            if where == "states":
                return dql.sample(make(states), policy, **options)
            if where == "noise":
                return dql.sample(states, policy, noise=make(noise), **options)
            if where == "select":
                return dql.select(make(states), policy, critic, **options)
            if where == "critic":
                return q_values(critic, states, make(actions), registry()["cpp"])
            if where == "act":
                return agent.act(make(states))
            if where == "batch":
                return copy.deepcopy(agent).update(
                    dql.Batch(states, make(actions), states[:, 0], states, states[:, 0] * 0)
                )
            other = copy.deepcopy(policy)
            given = make(other.denoiser.flat.detach())
            try:
                other.denoiser.flat.data = given
            except RuntimeError as error:  # which torch refuses
                raise ValueError("no data of a parameter") from error
            return dql.sample(states, other, **options)

        yield f"{kind} as {where}, {backend}", call


def planted(random_: random.Random) -> Iterator[Case]:
    """One of each fault, for the test of this file."""

    def write() -> None:
        (HERE.parent / "outside.txt").write_text("x")
        raise ValueError("refused, but too late")

    def start() -> None:
        os.system("true")

    def long() -> None:
        raise ValueError("a\nb" * 2000)

    def unforeseen() -> None:
        raise AttributeError("a traceback")

    while True:
        yield from [
            ("write", write),
            ("start", start),
            ("long", long),
            ("unforeseen", unforeseen),
            ("fine", lambda: None),
        ]


KINDS = {"planted": planted, "calls": calls, "commands": commands, "hdf5": hdf5, "json": json_, "tensors": tensors}


# What the kinds start from


def _dataset(name: str) -> Path:
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    folder = HERE / "minari" / name
    if folder.exists():
        return folder
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(4):
        fields = {"observations": rng.normal(size=(11, 3)), "actions": rng.uniform(-2, 2, (10, 1)).astype(np.float32)}
        fields |= {
            "rewards": rng.normal(size=10),
            "terminations": np.zeros(10, bool),
            "truncations": np.arange(10) == 9,
        }
        episodes.append(EpisodeBuffer(**fields))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gymnasium.make("Pendulum-v1", max_episode_steps=5)
        minari.create_dataset_from_buffers(name, episodes, env=env)
    path = folder / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ref_min_score": -10.0, "ref_max_score": 0.0}))
    return folder


def _run() -> Path:
    from rich.console import Console

    from dql.train import train

    _dataset("some/thing-v0")
    run = HERE / "run"
    if not run.exists():
        config = dql.Config(hidden_dim=8, num_hidden=1, batch_size=4, num_updates=4, num_candidates=2, T=2)
        quiet = Console(file=io.StringIO())
        train(
            RunConfig(
                "some/thing-v0", config, run_dir=run, device="cpu", eval_every=2, eval_episodes=1, checkpoint_every=2
            ),
            console=quiet,
        )
    return run


def main() -> None:
    global watching
    kind, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    (HERE / "tmp").mkdir(exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = KINDS[kind](random.Random(seed))
    sys.addaudithook(_watch)
    # A parameter that was replaced is a RuntimeError, as torch has it.
    allowed = (*REFUSALS, RuntimeError) if kind == "tensors" else REFUSALS
    refused = harmless = 0
    faults: list[str] = []
    slowest = (0.0, "")
    for _ in range(count):
        what, call = next(cases)
        print(what.encode("ascii", "backslashreplace").decode(), file=sys.stderr, flush=True)
        began, watching = time.perf_counter(), True
        try:
            call()
            harmless += 1
        except allowed as error:
            refused += 1
            if len(str(error)) > 3000 and "usage" not in str(error):
                faults.append(f"{what}: a sentence of {len(str(error))} characters")
            if "\n" in str(error).strip() and kind != "commands":
                faults.append(f"{what}: more than a line: {str(error)[:300]}")
        except BaseException as error:
            faults.append(f"{what}: {type(error).__name__}: {str(error)[:500]}")
        finally:
            watching = False
        faults += [f"{what}: touched {event}" for event in outside]
        outside.clear()
        slowest = max(slowest, (time.perf_counter() - began, what))
    shutil.rmtree(HERE / "tmp", ignore_errors=True)
    print(json.dumps({"refused": refused, "harmless": harmless, "faults": faults, "slowest": slowest}))


if __name__ == "__main__":
    main()
