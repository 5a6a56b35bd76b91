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
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import BinaryIO

from .errors import ModelError, ResourceError, UsageError

PAGE = mmap.PAGESIZE
MOST_BYTES = 2**25  # of a small file; the largest published one, a tokenizer.json, has 17 MB
MOST_NESTING = 100  # of JSON; ours has 5
_NO_PROCESS = 9_999_999  # a number that no process has, in the name of a file that only tries a folder
_CHUNK = 2**22  # bytes of one read of a file that is hashed
_BRACKETS = re.compile(r"[\[\]{}]")


# --- small files ---


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading. Links are followed; devices and pipes, which may never end or begin, are refused.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    return open(open_descriptor(path), "rb")


def open_descriptor(path: str | os.PathLike, flags: int = 0) -> int:
    """Does what `open_regular` does. Returns a descriptor.

    Args:
        path: the file.
        flags: more flags of the system's open.

    Raises:
        OSError: as there.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.ENODEV, "it is a device or a pipe, not a file", str(path))


def may_exist(path: str | os.PathLike) -> bool:
    """Looks for a file or folder. Where the system does not let us see, it may: opening it will say so."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def identity(path: str | os.PathLike) -> tuple[int, int] | None:
    """Returns what the system knows a file or folder by; None: there is none, or none that may be seen.

    One folder may have several spellings: macOS takes capitals and small letters, and accents inside and outside of
    their letters, for the same.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def file_state(path: str | os.PathLike) -> tuple[int, int]:
    """Returns time of the last change, in nanoseconds, and size of a file.

    Raises:
        OSError: there is none.
    """
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size


def identities(path: Path) -> set[tuple[int, int]]:
    """Returns the identities of a path and of the folders above it."""
    return {found for place in (path, *path.parents) if (found := identity(place))}


def read_small(path: Path, most: int = MOST_BYTES) -> bytes:
    """Reads a whole file that has no reason to be large: JSON, a tokenizer, a licence, prompts.

    Args:
        path: the file; links are followed.
        most: bytes above which it is refused unread.

    Raises:
        OSError: it cannot be read, is no regular file (a pipe would wait for ever), or is too large.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most / 1e6:.0f} MB", str(path))
    return data


def parse_json(text: str | bytes):
    """Returns the value of JSON text, which may begin with a byte order mark.

    Raises:
        ValueError: not UTF-8, not JSON, nested deeper than `MOST_NESTING`, or with text that UTF-8 cannot hold.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    if _depth(text) > MOST_NESTING:
        raise ValueError(f"it is nested more than {MOST_NESTING} deep")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair: no file, log or terminal takes it
    return value


def _depth(text: str) -> int:
    """Returns how deep brackets are nested, those inside strings included: an upper bound, without parsing."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def read_json(path: Path) -> dict:
    """Reads a JSON object from a small file.

    Raises:
        ModelError: missing, too large, not JSON, or not an object.
    """
    try:
        value = parse_json(read_small(path))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read: {reason}", "a JSON file") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}", "a JSON object")
    return value


# --- hashes ---


def sha256_if_exists(path: Path) -> str | None:
    """Returns the sha256 of a small file, such as a folder's manifest.json, which stands for all of it; else None."""
    return hashlib.sha256(read_small(path, most=2**31)).hexdigest() if path.exists() else None


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
    partial = path.with_name(_partial(path.name, os.getpid(), secrets.token_hex(8)))

    def create(name: str, flags: int) -> int:  # never what somebody put there
        return os.open(name, flags | os.O_EXCL | os.O_NOFOLLOW, 0o666 if mode is None else mode)

    try:
        with open(partial, "wb", opener=create) as file:
            yield file
            file.flush()
            sync(file.fileno())
        give_name(partial, path, force)
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


def partials(path: Path, process: int) -> list[Path]:
    """Returns the files that `replacing` left beside a path in a killed process."""
    return list(path.parent.glob(_partial(glob.escape(path.name), process, "*")))


def remove_partials(path: Path, process: int) -> None:
    """Deletes files that `replacing` left beside a path in a killed process."""
    for partial in partials(path, process):
        with contextlib.suppress(OSError):
            partial.unlink()


def try_writing(path: Path) -> None:
    """Makes an empty file beside a path and deletes it, and any that a killed process left there in doing so.

    Its name is a little longer than that of any temporary file that `written_whole` makes for this path, or for the
    same with a number.

    Raises:
        OSError: the folder does not take it.
    """
    numbered = path.with_stem(f"{path.stem}-000000")
    remove_partials(numbered, _NO_PROCESS)
    probe = path.with_name(_partial(numbered.name, _NO_PROCESS, secrets.token_hex(8)))
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o600))
    finally:
        probe.unlink(missing_ok=True)


def _partial(name: str, process: int, random: str) -> str:
    return f".{name}.{process}-{random}.partial"


def give_name(partial: Path, path: Path, force: bool) -> None:
    """Gives a complete file its name, at once.

    Raises:
        FileExistsError: without `force`, the name is taken.
    """
    if not force:
        _claim(partial, path)
    os.replace(partial, path)


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


def sync(descriptor: int) -> None:
    """Has the disk itself write down an open file; macOS's fsync stops at the disk's own memory."""
    if full := getattr(fcntl, "F_FULLFSYNC", None):
        with contextlib.suppress(OSError):  # disks on a network cannot
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_path(path: Path) -> None:
    """Does the same for a file that others have written, or for the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


# --- the system's cache ---


def open_direct(path: Path) -> int:
    """Opens a file for reading past the cache. Offsets, sizes and buffers must be multiples of `PAGE`.

    Raises:
        OSError: it cannot be read.
    """
    try:
        file = open_descriptor(path, getattr(os, "O_DIRECT", 0))
        try:
            os.preadv(file, [mmap.mmap(-1, PAGE)], 0)
        except OSError:
            os.close(file)
            raise
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a disk that does not support it
            raise
        file = open_descriptor(path)
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
