"""Where datasets are found on this machine: a name -> the sources to read, and the list of what there is.

Only a download imports minari; listing and finding read folders and metadata.json.
"""

import contextlib
import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dql.datasets.info import DatasetError, DatasetNotFoundError
from dql.files import read_file

MAIN_FILE = "main_data.hdf5"  # of a Minari dataset in its default format


@dataclass(frozen=True)
class Source:
    """One thing to read: a Minari `data` folder or a D4RL file."""

    kind: str  # "minari" | "d4rl"
    path: Path
    name: str
    drop_broken: bool = False  # leave out episodes that cannot be used

    def files(self) -> list[Path]:
        """The files whose change makes a cached copy stale."""
        return [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())


@dataclass(frozen=True)
class DatasetSummary:
    """A line of `dql data list`; `problem` says why a dataset cannot be loaded."""

    dataset_id: str
    steps: int
    episodes: int
    size_mb: float
    env_id: str | None
    ref_min_score: float | None
    ref_max_score: float | None
    problem: str | None = None


def datasets_root() -> Path:
    """The folder of the local Minari datasets: MINARI_DATASETS_PATH, or ~/.minari/datasets."""
    named = os.environ.get("MINARI_DATASETS_PATH")
    return Path(named) if named else home("MINARI_DATASETS_PATH") / ".minari" / "datasets"


def home(variable: str) -> Path:
    """The user's folder.

    Raises:
        DatasetError: there is none, as in a container without HOME; the sentence names the variable to set instead.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise DatasetError(f"this user has no home folder (HOME is not set): set HOME, or {variable}") from error


def local_ids() -> list[str]:
    """Ids of all folders under the root that hold a `data` folder, sorted."""
    root = datasets_root()
    found = []
    for folder, children, _ in os.walk(root):
        if "data" in children and folder != str(root):
            found.append(Path(folder).relative_to(root).as_posix())
            children.clear()
        children[:] = [child for child in children if not child.startswith(".")]
    return sorted(found)


def list_datasets() -> list[DatasetSummary]:
    """All local Minari datasets, also those that are broken (with the sentence that says so)."""
    summaries = []
    for dataset_id in local_ids():
        folder = datasets_root() / dataset_id / "data"
        size = _megabytes(folder)
        try:
            metadata = read_metadata(Source("minari", folder, dataset_id))
            spec = env_spec_json(metadata)
            problem = None
            if metadata.get("data_format", "hdf5") == "hdf5" and not (folder / MAIN_FILE).exists():
                problem = f"{MAIN_FILE} is missing: {again(Source('minari', folder, dataset_id))}"
            summaries.append(
                DatasetSummary(
                    dataset_id,
                    whole_number(metadata, "total_steps", Source("minari", folder, dataset_id)),
                    whole_number(metadata, "total_episodes", Source("minari", folder, dataset_id)),
                    size,
                    None if spec is None else json.loads(spec)["id"],
                    *reference_scores(metadata),
                    problem,
                )
            )
        except DatasetError as error:
            summaries.append(DatasetSummary(dataset_id, 0, 0, size, None, None, None, str(error)))
    return summaries


def _megabytes(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # unreadable, or gone meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total / 1e6


def resolve(name: str, download: bool = False) -> list[Source]:
    """The sources behind a name: a Minari id, a folder, a D4RL file, or several of them joined by `+`.

    Raises:
        DatasetNotFoundError: one of them is not there.
    """
    if not name or "\0" in name:
        raise DatasetNotFoundError(f"dataset {name!r}: that is no name: see `dql data list`")
    try:
        whole = _expanded(name).exists()
    except OSError as error:  # too long a name, a folder that may not be entered
        raise DatasetNotFoundError(f"dataset {name[:100]}: {error.strerror}: check the path") from error
    parts = [name] if whole else name.split("+")
    if "" in parts:
        raise DatasetNotFoundError(f"dataset {name!r}: a name is missing beside a +: see `dql data list`")
    return [source for part in parts for source in _resolve_one(part, download)]


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~ without a home
        return Path(name)


def _resolve_one(name: str, download: bool) -> list[Source]:
    path = _expanded(name)
    if path.suffix in (".npz", ".npy", ".pkl", ".pickle", ".pt", ".parquet", ".csv") and path.is_file():
        raise DatasetError(
            f"dataset {name}: files of this kind are not read: build a TransitionDataset of your arrays and pass it to "
            "train(..., dataset=...), or write them as a D4RL .hdf5 file"
        )
    if path.suffix in (".hdf5", ".h5") and path.is_file():
        if path.name == MAIN_FILE and (path.parent / "metadata.json").exists():
            return [_minari_folder(path.parent)]
        return [Source("d4rl", path, path.name)]
    is_id = re.fullmatch(r"\w[-\w/]*", name) is not None
    local = datasets_root() / name / "data"
    if is_id and local.exists():
        if download and not (local / "metadata.json").exists():
            _download(name, force=True)
        return [Source("minari", local, name)]
    if path.is_dir():
        for folder in (path / "data", path):
            if (folder / MAIN_FILE).exists() or (folder / "metadata.json").exists():
                return [_minari_folder(folder)]
        raise DatasetNotFoundError(
            f"dataset {name}: the folder holds no Minari dataset (data/{MAIN_FILE}): give the folder above `data`"
        )
    if is_id:
        return _resolve_missing_id(name, download)
    raise DatasetNotFoundError(
        f"dataset {name}: there is no such file or folder, and it is no id of the form namespace/name-v0: check the "
        "path or see `dql data list`"
    )


def _resolve_missing_id(name: str, download: bool) -> list[Source]:
    parts = [name]
    if "medium-expert" in name and not name.startswith("dql/"):
        halves = [name.replace("medium-expert", half) for half in ("medium", "expert")]
        there = [(datasets_root() / half / "data").exists() for half in halves]
        if all(there):
            return [Source("minari", datasets_root() / half / "data", half) for half in halves]
        if any(there) or name.startswith("mujoco/"):  # published in two halves only
            parts = [half for half, exists in zip(halves, there, strict=True) if not exists]
    if download and not name.startswith("dql/"):
        for part in parts:
            _download(part)
        return _resolve_one(name, False)
    remedy = " and ".join(f"`{_command(part)}`" for part in parts)
    remedy += "" if name.startswith("dql/") else " (or download=True)"
    ids = local_ids()
    near = [i for i in ids if name.lower() in i.lower()] or difflib.get_close_matches(name, ids, 3, 0.6)
    hint = f"; near to it are {', '.join(near[:3])}" if near else ""
    raise DatasetNotFoundError(f"dataset {name} is not in {datasets_root()}: run {remedy}{hint}")


def _minari_folder(folder: Path) -> Source:
    source = Source("minari", folder, str(folder))
    return Source("minari", folder, str(read_metadata(source).get("dataset_id", folder)))


def _command(dataset_id: str) -> str:
    return f"dql data make {dataset_id}" if dataset_id.startswith("dql/") else f"minari download {dataset_id}"


def _download(dataset_id: str, force: bool = False) -> None:
    import minari

    try:
        minari.download_dataset(dataset_id, force_download=force)
    except Exception as error:  # offline it ends in whatever its transport raises, after some 24 seconds
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise DatasetError(
            f"dataset {dataset_id} could not be downloaded ({type(error).__name__}: {reason}): check the id and the "
            f"network, or copy the dataset's folder from another machine to {datasets_root() / dataset_id}"
        ) from error


def again(source: Source) -> str:
    """The remedy for a dataset that is broken on disk."""
    if source.kind == "d4rl" or not source.path.is_relative_to(datasets_root()):
        return f"fetch {source.path} again"
    return f"remove {source.path.parent} and run `{_command(source.name)}`"


def read_metadata(source: Source) -> dict[str, Any]:
    """metadata.json of a Minari `data` folder.

    Raises:
        DatasetError: it is missing or damaged.
    """
    path = source.path / "metadata.json"
    if not path.exists():
        raise DatasetNotFoundError(f"dataset {source.name} is only half there (no {path}): {again(source)}")
    try:
        metadata = json.loads(read_file(path))
    except PermissionError as error:
        raise DatasetError(f"dataset {source.name}: {path} may not be read by this user") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"dataset {source.name}: {path} cannot be read ({error}): {again(source)}") from error
    if not isinstance(metadata, dict):
        raise DatasetError(f"dataset {source.name}: {path} holds no metadata: {again(source)}")
    given = metadata.get("dataset_id")
    if given is not None and not (isinstance(given, str) and given.isprintable()):
        del metadata["dataset_id"]  # which a terminal would obey
    return metadata


def env_spec_json(metadata: Mapping[str, Any]) -> str | None:
    """The evaluation environment's EnvSpec JSON: `eval_env_spec` where there is one, else `env_spec`."""
    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    try:
        env_id = json.loads(text)["id"] if isinstance(text, str) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return str(text) if isinstance(env_id, str) and env_id.isprintable() else None


def reference_scores(metadata: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """(random, expert), or (None, None) unless both are there."""
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    try:
        scores = float(low), float(high)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None, None
    return scores if all(map(math.isfinite, scores)) and scores[0] != scores[1] else (None, None)


def whole_number(metadata: Mapping[str, Any], key: str, source: Source) -> int:
    """A count of the metadata, 0 where it has none.

    Raises:
        DatasetError: it is no whole number from 0.
    """
    value = metadata.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DatasetError(f"dataset {source.name}: its metadata has the {key} {str(value)[:60]!r}: {again(source)}")
    return value
