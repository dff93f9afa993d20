"""Arrays that lie in a file and are fetched from it, page by page, when somebody looks at them."""

import contextlib
import mmap
import os
import resource
from collections.abc import Iterable, Iterator

import numpy as np

from dql.datasets.info import DatasetError

_FAULTS = 8  # pages that a batch may wait for, one after the other, before the next batches are asked for at once
_BATCHES = 256  # that are, until it is tried again without: asking takes 1 ms a batch also where no page is missing
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's; Python names it from 3.13 on


class Mapping:
    """A file of float32 numbers as memory. What is written to that memory stays in it: the file does not change.

    A page that the file no longer has ends the process (SIGBUS), whoever looks at it. So the size is looked at before
    anything is mapped, nothing here ever shortens a file, and `check` tells when somebody else has.
    """

    def __init__(self, descriptor: int, name: str, *, own: bool = False) -> None:
        """Maps all of an open file; the descriptor may be closed.

        Args:
            descriptor: of a file that is not empty.
            name: what it is called, for the sentence.
            own: it has no name on the disk, so that nobody else can change it, and what is written goes to it.

        Raises:
            OSError: it cannot be mapped.
        """
        self.name, self._own = name, own
        self._descriptor = os.dup(descriptor)
        try:
            self._state = self._now()
            # Private, so that a write in place is one to memory as everywhere else; and nothing is set aside for such
            # writes, for which a file larger than the memory would be refused.
            flags = mmap.MAP_SHARED if own else mmap.MAP_PRIVATE | _NO_RESERVE
            self._map = mmap.mmap(self._descriptor, self._state[0], flags, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = -1
            raise
        self.address = np.frombuffer(self._map, np.uint8).ctypes.data
        self.advise(mmap.MADV_SEQUENTIAL)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def array(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of this shape from byte `offset` on; it keeps the memory, if not this object, alive.

        Raises:
            ValueError: the file does not reach as far.
        """
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._map, np.float32, count, offset).reshape(shape)

    def check(self) -> None:
        """Raises DatasetError if the file is not what was mapped: it has another size, or was written to since."""
        if not self._own and self._now() != self._state:
            raise DatasetError(
                f"{self.name} was changed while its rows were in use: nothing but dql may write there; start again, "
                "and it is made anew"
            )

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def advise(self, advice: int) -> None:
        with contextlib.suppress(OSError):  # nothing depends on it
            self._map.madvise(advice)

    def holds(self, address: int) -> bool:
        """Whether that is an address of its memory."""
        return self.address <= address < self.address + self._state[0]

    def ask_for(self, address: int, width: int, rows: np.ndarray) -> None:
        """Has the disk begin with the pages of all these rows of `width` bytes, without waiting for any.

        Args:
            address: of row 0, in its memory.
            width: bytes of a row.
            rows: their numbers.
        """
        starts = address - self.address + rows * width
        pages = starts - starts % mmap.PAGESIZE
        with contextlib.suppress(OSError):
            for page, length in zip(pages.tolist(), (starts + width - pages).tolist(), strict=True):
                self._map.madvise(mmap.MADV_WILLNEED, page, length)


class RowsAhead:
    """Asks for all rows of a batch at once where looking at them would wait for the disk page by page.

    That is ten times faster where the pages are not in memory, and for nothing where they are.
    """

    def __init__(self, mappings: Iterable[Mapping]) -> None:
        self.mappings = tuple(mappings)
        self._asking = 0  # for how many batches yet
        self._faults = _waited()

    def fetch(self, arrays: Iterable[tuple[int, int]], rows: np.ndarray) -> None:
        """To be called before the rows of a batch are looked at, by the same thread.

        Args:
            arrays: (address, bytes of a row) of each array; those in other memory are left out.
            rows: their numbers.

        Raises:
            DatasetError: a file was changed by somebody else.
        """
        for mapping in self.mappings:
            mapping.check()
        faults = _waited()
        if not self._asking and faults - self._faults >= _FAULTS:
            self._asking = _BATCHES
        self._faults = faults
        if self._asking:
            self._asking -= 1
            for address, width in arrays:
                for mapping in self.mappings:
                    if mapping.holds(address):
                        mapping.ask_for(address, width, rows)


def _waited() -> int:
    """Pages that this thread has waited for."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


def read_rows_at_random(mappings: Iterable[Mapping]) -> None:
    """From now on a look at a row fetches its pages alone, and not the 128 KB around them."""
    for mapping in mappings:
        mapping.advise(mmap.MADV_RANDOM)


@contextlib.contextmanager
def in_order(mappings: Iterable[Mapping]) -> Iterator[None]:
    """While the block lasts, the file is read ahead of whoever goes through it from its beginning to its end.

    Raises:
        DatasetError: a file was changed, before or meanwhile.
    """
    mappings = tuple(mappings)
    for mapping in mappings:
        mapping.check()
        mapping.advise(mmap.MADV_SEQUENTIAL)
    try:
        yield
    finally:
        read_rows_at_random(mappings)
    for mapping in mappings:
        mapping.check()
