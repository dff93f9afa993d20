"""The cache of flat arrays: one safetensors file a source, in $DQL_CACHE or ~/.cache/dql.

A file is named by its source's path and holds, beside the five arrays, the sizes and times of the source's files and
a checksum. What does not fit (source changed, other format version, damaged file) is rebuilt and overwritten; a folder
that cannot be written costs only the caching.
"""

import hashlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dql.datasets.info import FIELDS, DatasetError, DatasetInfo, FlatData
from dql.datasets.sources import Source, home

FORMAT_VERSION = 2  # raise it whenever a reader or a rule changes what it makes of the same files


def cache_dir() -> Path:
    """$DQL_CACHE, or ~/.cache/dql."""
    named = os.environ.get("DQL_CACHE")
    return Path(named) if named else home("DQL_CACHE") / ".cache" / "dql"


def cache_path(source: Source) -> Path:
    """The cache file of a source, whether it exists or not."""
    place = str(source.path.resolve())
    slug = re.sub(r"[^\w.-]+", "-", source.name).strip("-")[-80:]
    slug += "-dropped" if source.drop_broken else ""
    return cache_dir() / f"{slug}-{hashlib.sha256(place.encode()).hexdigest()[:16]}.safetensors"


def cached(source: Source, read: Callable[[Source], FlatData], *, enabled: bool = True) -> FlatData:
    """`read(source)`, or what it returned the last time if the source has not changed since."""
    if not enabled:
        return read(source)
    try:
        path = cache_path(source)
    except DatasetError:  # no home folder: nothing is kept
        return read(source)
    fingerprint = _fingerprint(source)
    flat = _load(path, fingerprint)
    if flat is None:
        flat = read(source)
        _save(path, fingerprint, flat)
    return flat


def _fingerprint(source: Source) -> str:
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files()]
    return json.dumps([FORMAT_VERSION, source.kind, source.name, source.drop_broken, files])


def _checksum(arrays: dict[str, np.ndarray], info: str) -> str:
    crc = zlib.crc32(info.encode())
    for name in FIELDS:
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).data, crc)
    return f"{crc:08x}"


def _load(path: Path, fingerprint: str) -> FlatData | None:
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():  # nor a pipe, which the library would wait for
            return None
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return None
            arrays = {name: file.get_tensor(name) for name in FIELDS}
        if _checksum(arrays, metadata["info"]) != metadata["checksum"]:
            return None
        return FlatData(**arrays, info=DatasetInfo.from_json(metadata["info"]))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):  # damaged: the source is read again
        return None


def _save(path: Path, fingerprint: str, flat: FlatData) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(getattr(flat, name)) for name in FIELDS}
    info = flat.info.to_json()
    metadata = {"fingerprint": fingerprint, "info": info, "checksum": _checksum(arrays, info)}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem[-60:], suffix=".part")
        os.close(handle)
        save_file(arrays, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError):  # a read-only or full disk costs only the caching
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
