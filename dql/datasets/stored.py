"""HDF5 files as strangers wrote them: arrays of real numbers that the file itself holds, or one sentence.

Links out of the file and storage outside of it are not followed (they would read any file that the user can read), a
size is believed only where it is stored, and whatever the library raises of damaged bytes is a `DatasetError`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dql.datasets.info import DatasetError, broken_file
from dql.files import check_regular

_BEST_COMPRESSION = 2000  # deflate reaches 1,032
_UNSTORED_BYTES = 1 << 20  # of fill values, that any array may claim


@contextlib.contextmanager
def open_file(path: Path, name: str, remedy: str) -> Iterator[Any]:
    """The file for reading; errors of the library within the block become the sentence of a broken file.

    Args:
        path: the HDF5 file.
        name: of the dataset, for the sentence.
        remedy: for the sentence.

    Raises:
        DatasetError: it cannot be read.
    """
    import h5py

    try:
        check_regular(path)
        with h5py.File(path, "r") as file:
            yield file
    except DatasetError:
        raise
    except PermissionError as error:
        raise DatasetError(f"dataset {name}: {path} may not be read by this user ({error.strerror})") from error
    except MemoryError as error:
        raise DatasetError(f"dataset {name}: {path} needs more memory than there is: {remedy}") from error
    except Exception as error:  # damaged bytes end in nearly every kind that there is
        raise broken_file(name, path, error, remedy) from error


def member(group: Any, key: str) -> Any:
    """A group or an array of the group.

    Raises:
        ValueError: it is a link to somewhere else; KeyError: there is none.
    """
    import h5py

    if isinstance(group, dict):  # of another format than HDF5
        return group[key]
    if not isinstance(group, h5py.Group):
        raise ValueError(f"it is an array where a group with {key} is needed")
    found = group
    for part in key.split("/"):  # a name with a slash is stored as groups in groups
        link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
        if link is None:
            raise KeyError(f"it has no {key}")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"its {key} is a link to somewhere else, which is not followed")
        found = found[part]
    return found


def read_array(group: Any, key: str) -> np.ndarray:
    """An array of real numbers, whole.

    Raises:
        ValueError: a group, values that are no real numbers, values stored outside of the file, or a size that the file
            does not hold; KeyError: there is none.
    """
    return stored_array(group, key)[()]


def stored_array(group: Any, key: str) -> Any:
    """The same unread, to be read a part at a time."""
    return _checked(member(group, key), key)


def _checked(stored: Any, key: str) -> Any:
    if isinstance(stored, list):  # as a format without arrays has one
        stored = np.asarray(stored)
    if not hasattr(stored, "dtype") or not hasattr(stored, "nbytes"):
        raise ValueError(f"its {key} is a group where an array is needed")
    if stored.dtype.kind not in "fiub":
        raise ValueError(f"its {key} holds {str(stored.dtype)[:60]} where real numbers are needed")
    if stored.shape is None:
        raise ValueError(f"its {key} has no values")
    if isinstance(stored, np.ndarray):
        return stored
    if stored.external or stored.is_virtual:
        raise ValueError(f"its {key} is stored in other files, which are not read")
    held = stored.id.get_storage_size()
    if stored.nbytes > _BEST_COMPRESSION * held + _UNSTORED_BYTES:
        raise ValueError(f"its {key} claims {stored.nbytes:,} bytes, of which the file holds {held:,}")
    return stored


class Rows:
    """A group as the observation space walks it: only what the space names is looked at, and arrays stay unread."""

    def __init__(self, group: Any, key: str) -> None:
        self.group, self.key = group, key

    def __getitem__(self, key: str) -> Any:
        return rows_of(member(self.group, key), key)

    def as_tuple(self) -> tuple[Any, ...]:
        """Members that are called `_index_0`, `_index_1`, ..."""
        names = [f"_index_{i}" for i in range(len(self.group))]
        if set(names) != set(self.group):
            raise ValueError(f"its {self.key} has other members than those of a tuple")
        return tuple(self[name] for name in names)


def rows_of(stored: Any, key: str) -> Any:
    """An array, or what a space may walk: `Rows` of a group, a dict or tuple of another format."""
    if isinstance(stored, dict):
        return {name: rows_of(child, name) for name, child in stored.items()}
    if isinstance(stored, tuple):
        return tuple(rows_of(child, key) for child in stored)
    return Rows(stored, key) if hasattr(stored, "keys") else _checked(stored, key)


def address(group: Any) -> Any:
    """What two names of one group have in common; None in a format without names."""
    import h5py

    if not isinstance(group, h5py.Group):
        return None
    found = h5py.h5o.get_info(group.id)
    return found.fileno, found.addr
