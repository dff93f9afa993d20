"""The cache of flat arrays: one safetensors file a source, in $DQL_CACHE or ~/.cache/dql.

A file is named by its source's path and holds, beside the five arrays, the sizes and times of the source's files and
a checksum. What does not fit (source changed, other format version, damaged file) is rebuilt and overwritten; a folder
that cannot be written costs only the caching.

The format's arrays are as they are in memory, one after the other. So arrays that are to stay on disk are this file,
mapped. It is never written to, only replaced by another: whoever has mapped it keeps what was there.
"""

import hashlib
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dql.datasets.info import FIELDS, DatasetError, DatasetInfo, FlatData, row_blocks
from dql.datasets.mapped import Mapping
from dql.datasets.sources import Source, home
from dql.datasets.spool import Spool
from dql.files import open_to_read

FORMAT_VERSION = 2  # raise it whenever a reader or a rule changes what it makes of the same files
_NO_CHECKSUM = "0" * 8
_DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


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


def cached(
    source: Source, read: Callable[[Source, Spool], FlatData], *, enabled: bool = True, most_bytes: float = math.inf
) -> FlatData:
    """`read(source)`, or what it returned the last time if the source has not changed since.

    Args:
        source: what is read.
        read: its reader.
        enabled: whether the cache is looked at and written.
        most_bytes: of arrays in memory; larger ones are those of the cache's file, mapped.

    Raises:
        DatasetError: what `read` refuses; no byte may be in memory, and there is no folder to write to.
    """
    if not enabled:
        return read(source, Spool(source.name))
    try:
        path = cache_path(source)
    except DatasetError:  # no home folder: nothing is kept
        if most_bytes == 0:
            raise
        return read(source, Spool(source.name))
    fingerprint = _fingerprint(source)
    flat = _load(path, fingerprint, most_bytes)
    if flat is None:
        flat = read(source, Spool(source.name, path.parent, most_bytes))
        if _save(path, fingerprint, flat) and flat.mappings:  # else the spool's files stay, which are as large
            flat = _load(path, fingerprint, 0) or flat
    return flat


def _fingerprint(source: Source) -> str:
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files()]
    return json.dumps([FORMAT_VERSION, source.kind, source.name, source.drop_broken, files])


def _load(path: Path, fingerprint: str, most_bytes: float) -> FlatData | None:
    try:
        with open_to_read(path) as file:
            layout, metadata = _layout(file)
            if metadata.get("fingerprint") != fingerprint:
                return None
            mapping = None
            if sum(4 * math.prod(shape) for _, shape in layout.values()) > most_bytes:
                mapping = _mapped(file, path)
                arrays = {name: mapping.array(*place) for name, place in layout.items()}
            else:
                arrays = {name: _read(file, *place) for name, place in layout.items()}
        crc = zlib.crc32(metadata["info"].encode())
        for name in FIELDS:
            crc = zlib.crc32(arrays[name].data, crc)
        if f"{crc:08x}" != metadata["checksum"]:
            return None
        info = DatasetInfo.from_json(metadata["info"])
        return FlatData(**arrays, info=info, mappings=() if mapping is None else (mapping,))
    except DatasetError:
        raise
    except _DAMAGED:  # the source is read again
        return None


def _mapped(file: BinaryIO, path: Path) -> Mapping:
    try:
        return Mapping(file.fileno(), str(path))
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be mapped ({error.strerror}): a limit of this process (ulimit -v, ulimit -d) or of the "
            "machine (vm.overcommit_memory) is below its size; raise that, or load it into memory (in_memory=True, "
            "--data-on device)"
        ) from error


def _layout(file: BinaryIO) -> tuple[dict[str, tuple[int, tuple[int, ...]]], dict[str, str]]:
    """(byte and shape of every array; the metadata) of a file that holds them whole, and nothing else.

    Raises:
        ValueError and others of _DAMAGED: any other file.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError("its header is longer than the file")
    header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    end = 8 + length
    layout: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (first, last) = tuple(about["shape"]), about["data_offsets"]
        fine = all(type(n) is int and n > 0 for n in shape) and first + 8 + length == end and end % 4 == 0
        if about["dtype"] != "F32" or not fine or last - first != 4 * math.prod(shape):
            raise ValueError(f"its {name} are no float32 array where the one before ends")
        layout[name] = (end, shape)
        end += last - first
    rows = layout["masks"][1]
    wide, narrow = layout["states"][1], layout["actions"][1]
    expected = dict(zip(FIELDS, (rows + wide[1:], rows + narrow[1:], rows, rows + wide[1:], rows), strict=True))
    if {name: shape for name, (_, shape) in layout.items()} != expected or len(rows) != 1 or end != size:
        raise ValueError("its arrays do not fit together, or not the file's size")
    return layout, metadata


def _read(file: BinaryIO, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, np.float32)
    file.seek(offset)
    if file.readinto(array.data.cast("B")) != array.nbytes:  # type: ignore[attr-defined]
        raise ValueError("it was cut short")
    return array


def _save(path: Path, fingerprint: str, flat: FlatData) -> bool:
    """Writes the arrays a part at a time; whether that went well."""
    info = flat.info.to_json()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem[-60:], suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(_header(flat, fingerprint, info, _NO_CHECKSUM))
            crc = zlib.crc32(info.encode())
            for name in FIELDS:
                array = getattr(flat, name)
                for rows in row_blocks(len(array), math.prod(array.shape[1:])):
                    block = np.ascontiguousarray(array[rows], np.float32).data
                    crc = zlib.crc32(block, crc)
                    file.write(block)
            file.seek(0)
            file.write(_header(flat, fingerprint, info, f"{crc:08x}"))
        os.replace(temporary, path)
    except OSError:  # a read-only or full disk costs only the caching
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True


def _header(flat: FlatData, fingerprint: str, info: str, checksum: str) -> bytes:
    """Of a safetensors file: its length, and JSON, filled up so that the arrays begin at a multiple of 64 bytes."""
    header: dict[str, Any] = {"__metadata__": {"fingerprint": fingerprint, "info": info, "checksum": checksum}}
    end = 0
    for name in FIELDS:
        shape = getattr(flat, name).shape
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * math.prod(shape)]}
        end += 4 * math.prod(shape)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text
