"""Large files, read past the system's cache: what is read once does not push other programs' pages out of memory.

Each system has a way of its own. macOS is told before a file is read; Linux afterwards, or it reads what is aligned to
pages straight into a program's memory.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path

PAGE = mmap.PAGESIZE


def open_direct(path: Path) -> int:
    """A file to read past the cache: its descriptor. Places, sizes and buffers have to be multiples of `PAGE`.

    Raises:
        OSError: it cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        try:
            os.preadv(file, [mmap.mmap(-1, PAGE)], 0)
        except OSError:
            os.close(file)
            raise
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a disk that cannot
            raise
        file = os.open(path, os.O_RDONLY)
    bypass(file)
    return file


def bypass(file: int) -> None:
    """Has macOS keep nothing of what will be read of an open file.

    Args:
        file: its descriptor.
    """
    if hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(file, fcntl.F_NOCACHE, 1)


def forget(file: int, start: int = 0, count: int = 0) -> None:
    """Has Linux drop what it keeps of an open file.

    Args:
        file: its descriptor.
        start: of the bytes.
        count: of them; 0: to the end.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, count, os.POSIX_FADV_DONTNEED)
