"""Training for real on a GPU, for as long as there is: a part of `bench/gpu.sh`.

    python bench/train_run.py prepare FOLDER DATASET                makes the dataset; first updates on the CPU
    python bench/train_run.py run FOLDER DATASET --seconds S [--continue-run RUN.tar.gz]

`run` does the same first updates on the GPU, with the same seeds and so the same batches and noise, then a run of a
million updates as `dql train` does it, with the backend whose update was the fastest in FOLDER/update-*.json. When the
time is over it stops with a checkpoint, is evaluated, and leaves FOLDER/run and FOLDER/train.json; it goes on exactly
with --continue-run, given FOLDER/run packed. Datasets lie where MINARI_DATASETS_PATH says.
"""

import argparse
import os
import signal
import statistics
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

from json_files import read_json, write_json

STARTED = time.monotonic()  # before torch is imported, which takes part of the limit
FIRST_UPDATES, FIRST_LOG = 300, 10
UPDATES, EVAL_EVERY, EVAL_EPISODES = 1_000_000, 50_000, 10
FOR_THE_END = 15.0  # seconds for the last evaluation and the files
CURVE_POINTS = 200
PARTS_OF_A_CURVE = ("actor/bc_loss", "actor/q_loss", "critic/loss", "critic/target_q")


def prepare(folder: Path, dataset: str) -> None:
    import minari

    from dql.collect import make_dataset

    if dataset not in minari.list_local_datasets():
        made = make_dataset(dataset, progress=False)
        print(f"{made.dataset_id}: {made.steps:,} steps in {made.seconds:.0f} s", flush=True)
    _first_updates(folder / "first-cpu", dataset, "cpu", "auto")


def _first_updates(
    path: Path, dataset: str, device: str, backend: str, graphed: bool = False
) -> list[dict[str, float]]:
    from dql.config import Config, RunConfig
    from dql.rundir import read_rows
    from dql.train import train

    agent = Config(backend=backend, num_updates=FIRST_UPDATES)
    train(RunConfig(dataset, agent, path, device, FIRST_LOG, eval_every=0, graphed=graphed))
    return read_rows(path / "metrics.csv")


def run(folder: Path, dataset: str, seconds: float, continued: Path | None, device: str) -> None:
    from dql import backends
    from dql.config import Config, RunConfig
    from dql.rundir import read_rows
    from dql.train import resume, train

    end = STARTED + seconds
    contender, why = fastest_backend(folder)
    backend, _, graph = contender.partition("+")
    graphed = bool(graph) and device != "cpu"
    print(f"backend {contender}: {why}", flush=True)
    here = {"dataset": dataset, "backend": backend, "graphed": graphed, "backend_because": why, "backends": backends()}
    first = {"gpu": _first_updates(folder / "first-gpu", dataset, device, backend, graphed)}
    if (cpu := folder / "first-cpu" / "metrics.csv").exists():
        first["cpu"] = read_rows(cpu)
    here["first_updates"] = first | {"worst": worst_differences(first)}
    write_json(folder / "train.json", here)

    path = folder / "run"
    if continued is not None:
        with tarfile.open(continued) as archive:
            archive.extractall(folder, filter="data")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: None)  # one that comes before the run listens
    threading.Thread(target=_stop_at, args=(end - FOR_THE_END, ended), daemon=True).start()
    if continued is None:
        agent = Config(backend=backend, num_updates=UPDATES)
        evaluation = {"eval_every": EVAL_EVERY, "eval_episodes": EVAL_EPISODES}
        result = train(RunConfig(dataset, agent, path, device, **evaluation, graphed=graphed))
    else:
        result = resume(path)
    ended.set()
    curve = read_rows(path / "metrics.csv") if (path / "metrics.csv").exists() else []
    rates = [row["updates_per_second"] for row in curve] or [result.step / max(result.seconds, 1e-9)]
    evaluations = read_rows(path / "evaluations.csv") if (path / "evaluations.csv").exists() else []
    here |= {
        "continued": continued is not None,
        "run_backend": result.agent.config.backend,  # a continued run keeps its own
        "updates": result.step,
        "of": UPDATES,
        "stopped_by": result.stopped_by,
        "seconds": result.seconds,
        "updates_per_second": statistics.median(rates),
        "curve": curve[:: max(len(curve) // CURVE_POINTS, 1)],
        "evaluations": evaluations,
    }
    write_json(folder / "train.json", here)
    if not evaluations or evaluations[-1]["step"] != result.step:
        here["last_evaluation"] = {"step": result.step} | _evaluation(result.agent, dataset)
        write_json(folder / "train.json", here)
    print(f"{result.step:,} updates, {here['updates_per_second']:.1f} a second", flush=True)


def _stop_at(end: float, ended: threading.Event) -> None:
    """As Ctrl-C would: after the update at hand the run writes a checkpoint and ends. Until it listens, again."""
    while not ended.wait(max(end - time.monotonic(), 1.0)):
        os.kill(os.getpid(), signal.SIGTERM)


def _evaluation(agent: Any, dataset: str) -> dict[str, Any]:
    from dql.data import load_dataset
    from dql.evaluate import evaluate

    return evaluate(agent, load_dataset(dataset).info, episodes=EVAL_EPISODES).to_dict()


def fastest_backend(folder: Path) -> tuple[str, str]:
    """(backend, with +graph if that was faster; why), by the updates timed before; "auto" where none was."""
    times: dict[str, float] = {}
    for report in map(read_json, sorted(folder.glob("update-*.json"))):
        for row in report["rows"] if report else ():
            if row["contender"].startswith("dql-") and row["problem"].count(",") == 0:
                times[row["contender"].removeprefix("dql-")] = row["median_us"]
    if not times:
        return "auto", "no update was timed"
    best = min(times, key=lambda name: times[name])
    return best, "an update takes " + ", ".join(f"{us:.0f} us with {name}" for name, us in times.items())


def worst_differences(first: dict[str, list[dict[str, float]]]) -> dict[str, float] | None:
    """|gpu - cpu| of each part of the losses, over the largest |cpu| of the curve; None without both."""
    if len(first) < 2:
        return None
    worst = {}
    for name in PARTS_OF_A_CURVE:
        cpu, gpu = ([row[name] for row in first[device]] for device in ("cpu", "gpu"))
        worst[name] = max(abs(a - b) for a, b in zip(cpu, gpu, strict=True)) / max(map(abs, cpu))
    return worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--continue-run", type=Path)
    parser.add_argument("--device", default="cuda", help="cpu is for trying this file out")
    chosen = parser.parse_args()
    if chosen.command == "prepare":
        prepare(chosen.folder, chosen.dataset)
    else:
        run(chosen.folder, chosen.dataset, chosen.seconds, chosen.continue_run, chosen.device)
    sys.exit()
