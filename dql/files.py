"""Opening what others may have put there: no link is followed into writing, and no pipe is waited for."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_file(path: Path, flags: int) -> int:
    """A descriptor of the regular file at `path` itself: no link is followed, and a pipe is not waited for.

    Raises:
        OSError: as `os.open`; ELOOP for a symbolic link, EINVAL for what is no file.
    """
    return _regular(os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644), path)


def read_file(path: Path) -> bytes:
    """The bytes of a regular file, of a link's too.

    Raises:
        OSError: as `os.open`; EINVAL for what is no file.
    """
    with open_to_read(path) as file:
        return file.read()


def open_to_read(path: Path) -> BinaryIO:
    """A regular file, or a link's, for reading.

    Raises:
        OSError: as `os.open`; EINVAL for what is no file.
    """
    return os.fdopen(_regular(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), path), "rb")


def check_regular(path: Path) -> None:
    """For libraries that open files themselves.

    Raises:
        OSError: as `os.open`; EINVAL for what is no file.
    """
    _check_mode(os.stat(path).st_mode, path)  # first: a pipe's writer would be woken, a socket cannot be opened
    os.close(_regular(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), path))


def _regular(descriptor: int, path: Path) -> int:
    try:
        _check_mode(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_mode(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
