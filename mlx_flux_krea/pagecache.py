"""Large files, read past the system's cache: what is read once does not push other programs' pages out of memory.

Each system has a way of its own: macOS is told before a file is read, Linux afterwards.
"""

import fcntl
import os


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
