"""Reads, hashes, replaces and locks files, if necessary past the system's cache.

Large weights are read once, so they should not push other programs' pages out of memory. Each system has its own way:
macOS is told before a file is read; Linux afterwards, or it reads whole pages directly into a program's memory.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import BinaryIO

from .errors import ModelError, ResourceError, UsageError

PAGE = mmap.PAGESIZE
_CHUNK = 2**22  # bytes of one read of a file that is hashed


# --- small files ---


def read_json(path: Path) -> dict:
    """Reads a JSON object from a file.

    Raises:
        ModelError: missing, not JSON, or not an object.
    """
    try:
        obj = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "a JSON file") from None
    if not isinstance(obj, dict):
        raise ModelError(f"{path} holds a {type(obj).__name__}", "a JSON object")
    return obj


# --- hashes ---


def sha256_if_exists(path: Path) -> str | None:
    """Returns the sha256 of a small file, such as a folder's manifest.json, which stands for all of it; else None."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def sha256(path: Path, stop: threading.Event | None = None, done: Callable[[int], None] = lambda count: None) -> str:
    """Returns the sha256 of a file, in hexadecimal.

    Args:
        path: the file.
        stop: ends hashing early.
        done: called with the number of bytes just hashed.

    Raises:
        CancelledError: `stop` was set.
        ModelError: the file cannot be read.
    """
    digest = hashlib.sha256()
    for chunk in chunks(path, stop):
        digest.update(chunk)
        done(len(chunk))
    return digest.hexdigest()


def chunks(path: Path, stop: threading.Event | None = None) -> Iterator[memoryview]:
    """Yields a file in chunks; each is valid until the next is requested.

    Raises:
        CancelledError: `stop` was set.
        ModelError: the file cannot be read.
    """
    try:
        file, buffer = open_direct(path), memoryview(mmap.mmap(-1, _CHUNK))
        try:
            size = os.fstat(file).st_size
            for start in range(0, size, _CHUNK):
                if stop and stop.is_set():
                    raise CancelledError
                count = min(_CHUNK, size - start)
                if not fill(file, buffer, start, count):
                    raise ModelError(f"{path} became shorter while it was read", "a file that nobody changes")
                yield buffer[:count]
                forget(file, start, count)
        finally:
            os.close(file)
    except OSError as error:
        raise unreadable(path, error) from None


def fill(file: int, pages: memoryview, start: int, need: int) -> bool:
    """Fills a buffer from the start of a page; returns True if the file has the needed bytes."""
    done = 0
    while done < need:
        end = done + os.preadv(file, [pages[done:]], start + done)
        before, done = done, end if end >= need else end // PAGE * PAGE
        if done == before:
            return False
    return True


def unreadable(path: Path, error: OSError) -> ModelError:
    """Returns the error to raise for a file that the system does not let us read."""
    return ModelError(f"{path} cannot be read: {error.strerror}", "a file that can")


# --- writing ---


@contextlib.contextmanager
def written_whole(path: Path, force: bool = True, mode: int | None = None) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes its name when it is complete and on disk; after an error it is deleted.

    Args:
        path: its name.
        force: replace an existing file of that name.
        mode: permissions of the file; None: the system's default.

    Raises:
        FileExistsError: without `force`, the name is taken, even if it was free when the block started.
        OSError: it cannot be written.
    """
    partial = path.with_name(_partial(path.name, os.getpid(), threading.get_native_id()))
    try:
        with open(partial, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not force:
            _claim(partial, path)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def replacing(path: Path, force: bool = True, mode: int | None = None) -> Iterator[BinaryIO]:
    """Opens a file as `written_whole` does, with errors for the person who named the path.

    Raises:
        FileExistsError: as there.
        UsageError: the path cannot be written.
        ResourceError: the disk is full.
    """
    try:
        with written_whole(path, force, mode) as file:
            yield file
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk of {path} is full", "", "make room, or choose another place") from None
        raise UsageError(f"{path} cannot be written: {error.strerror or error}", "", "choose another place") from None


def remove_partials(path: Path, process: int) -> None:
    """Deletes files that `replacing` left beside a path in a killed process."""
    for partial in path.parent.glob(_partial(glob.escape(path.name), process, "*")):
        with contextlib.suppress(OSError):
            partial.unlink()


def _partial(name: str, process: int, thread: int | str) -> str:
    return f".{name}.{process}-{thread}.partial"


def _claim(partial: Path, path: Path) -> None:
    """Claims a free name: by a second link or, on disks without links (exFAT), by an empty file."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:
        open(path, "xb").close()


# --- locks ---


def try_lock(path: Path, create: bool = True, mode: int = 0o600) -> int | None:
    """Opens and locks a file; the lock ends with the descriptor, or with the process.

    Args:
        path: the file.
        create: create the file if it does not exist.
        mode: permissions of a created file; by default for its owner alone.

    Returns:
        Its descriptor; None where another process holds the lock, or the file was replaced meanwhile.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), mode)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def wait_for_lock(descriptor: int) -> None:
    """Locks an open file, waiting for other processes; closing the descriptor unlocks it."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def sync_folder(path: Path) -> None:
    """Writes the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the system's cache ---


def open_direct(path: Path) -> int:
    """Opens a file for reading past the cache. Offsets, sizes and buffers must be multiples of `PAGE`.

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
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a disk that does not support it
            raise
        file = os.open(path, os.O_RDONLY)
    bypass(file)
    return file


def bypass(file: int) -> None:
    """Tells macOS not to cache an open file.

    Args:
        file: its descriptor.
    """
    if command := getattr(fcntl, "F_NOCACHE", None):
        fcntl.fcntl(file, command, 1)


def forget(file: int, start: int = 0, count: int = 0) -> None:
    """Tells Linux to drop an open file from its cache.

    Args:
        file: its descriptor.
        start: first byte.
        count: number of bytes; 0: to the end.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, count, os.POSIX_FADV_DONTNEED)
