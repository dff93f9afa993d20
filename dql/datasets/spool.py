"""The rows that a reader finds, in memory, or beyond a number of bytes in files on disk that have no name."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from dql.datasets.info import DatasetError, row_blocks
from dql.datasets.mapped import Mapping

_BUFFER = 1 << 24  # bytes that are written at once


class Spool:
    """Columns of float32 rows, which grow by blocks and are then had as arrays.

    Attributes:
        on_disk: whether there were too many for the memory.
        mappings: of the columns that are mapped.
    """

    def __init__(self, name: str = "", folder: Path | None = None, most_bytes: float = math.inf) -> None:
        """A spool without rows.

        Args:
            name: of the dataset, for sentences.
            folder: where the files are made; they are gone with the process, however it ends.
            most_bytes: that are kept in memory; 0 for none, infinity for all.
        """
        self.name, self.folder = name, folder
        self.on_disk = False
        self.mappings: list[Mapping] = []
        self._most, self._must = most_bytes, most_bytes == 0
        self._blocks: dict[str, list[np.ndarray]] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._held = 0

    def add(self, **columns: np.ndarray) -> None:
        """A block of rows [n, ...] of each of these columns.

        Raises:
            DatasetError: the disk is full; or it cannot be written, and no byte may stay in memory.
        """
        for name, rows in columns.items():
            self._blocks.setdefault(name, []).append(rows)
            self._held += rows.nbytes
        if self._held > self._most:
            self._write()

    def array(self, name: str) -> np.ndarray:
        """All rows of a column [N, ...], which the spool no longer has then; of a file, mapped.

        Raises:
            DatasetError: the disk is full, or the file cannot be mapped.
        """
        if not self.on_disk:
            blocks = self._blocks.pop(name)
            self._held -= sum(block.nbytes for block in blocks)
            return np.concatenate(blocks)
        tail = self._blocks[name][-1].shape[1:]
        self._write()
        del self._blocks[name]
        try:
            with self._files.pop(name) as file:
                file.flush()
                mapping = Mapping(file.fileno(), f"dataset {self.name}", own=True)
                rows = file.tell() // (4 * math.prod(tail))
        except OSError as error:
            raise self._refused(error) from error
        self.mappings.append(mapping)
        return mapping.array(0, (rows, *tail))

    def change(self, name: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        """Puts function(rows) in the place of every block of a column."""
        known = len(self.mappings)
        old = self.array(name)  # which keeps its mapping alive
        del self.mappings[known:]
        for rows in row_blocks(len(old), math.prod(old.shape[1:])):
            self.add(**{name: function(old[rows])})

    def _write(self) -> None:
        try:
            for name, blocks in self._blocks.items():
                if name not in self._files:
                    self._files[name] = self._new_file()
                    self.on_disk = True
                for block in blocks:
                    self._files[name].write(np.ascontiguousarray(block, np.float32).data)
                self._blocks[name] = [blocks[-1][:0]]  # whose shape is that of the rows
        except OSError as error:
            if not self.on_disk and not self._must:  # a folder that cannot be written costs only the memory
                self._most = math.inf
                return
            raise self._refused(error) from error
        self._held, self._most = 0, _BUFFER

    def _new_file(self) -> IO[bytes]:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=self.folder)

    def _refused(self, error: OSError) -> DatasetError:
        return DatasetError(
            f"dataset {self.name}: its rows cannot be kept in {self.folder} ({error.strerror}): make room there for "
            "twice the dataset, set DQL_CACHE to a folder that has it, or load it into memory (in_memory=True, "
            "--data-on device)"
        )
