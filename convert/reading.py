"""Reads and hashes whole files in one pass, and leaves the system's cache to other programs.

The files of a model are as large as a machine's memory, or larger. So a source is read once: tensors are read in their
order in the file, and the hash is computed from the same bytes.
"""

import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from mmap import mmap
from pathlib import Path

import numpy as np

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import PAGE, fill, forget, open_direct, unreadable

from .tensors import Tensor

_CHUNK = 2**22  # bytes that are read at a time
_LARGE = 2**18  # bytes; smaller tensors may be read out of order, and are read again for the hash
_ALIGNMENT = 8  # of numbers of any type
_READERS = 4  # files that are hashed at a time
_BUFFERS = 4  # used in turn
_BUFFER = 2**23 + 2 * PAGE  # bytes of each; larger tensors get memory of their own


class Reading:
    """Source files, each read and hashed in one pass if its large tensors are requested in their order.

    In another order tensors and hashes are right too, but files are read twice. Buffers are reused: new memory costs
    more time than reading.

    Args:
        hashed: files to hash; others may be read too.
    """

    def __init__(self, hashed: Iterable[Path]):
        self._digests = {path: hashlib.sha256() for path in hashed}
        self._ends = dict.fromkeys(self._digests, 0)  # bytes of each file that are hashed, or being hashed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flux-krea-hash")
        self._buffers: deque[tuple[mmap, Future[None] | None]] = deque(
            (mmap(-1, _BUFFER), None) for _ in range(_BUFFERS)
        )  # each with the hashing that still reads it
        self._open: tuple[Path, int] | None = None  # one at a time

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._close()

    def data(self, tensor: Tensor) -> np.ndarray:
        """Returns the stored bytes of a tensor; valid until three more tensors were read.

        Raises:
            ModelError: the file cannot be read, or ends too early.
        """
        path, size = tensor.path, tensor.end - tensor.start
        if size < _LARGE or tensor.start < self._ends.get(path, tensor.start):
            return self._read(path, tensor.start, size, tensor.name)
        if path in self._ends:
            self._pass(path, tensor.start)
        return self._next(path, tensor.start, size, tensor.name)

    def finish(self, path: Path) -> str | None:
        """Reads the rest of a file, and closes it.

        Returns:
            Its sha256 in hexadecimal; None: the file is not one of `hashed`.

        Raises:
            ModelError: the file cannot be read.
        """
        if path in self._digests:
            self._pass(path, os.fstat(self._file(path)).st_size)
        wait([hashing for _, hashing in self._buffers if hashing])
        self._close()
        return self._digests[path].hexdigest() if path in self._digests else None

    def _pass(self, path: Path, end: int) -> None:
        """Reads and hashes a file up to a position."""
        while (start := self._ends[path]) < end:
            self._next(path, start, min(_CHUNK, end - start), "bytes that belong to no tensor of ours")

    def _next(self, path: Path, start: int, size: int, label: str) -> np.ndarray:
        """Reads the next bytes of a file, and hashes them in the background."""
        buffer, hashing = self._buffers.popleft()
        if hashing:
            hashing.result()
        data = self._read(path, start, size, label, buffer)
        forget(self._file(path), start, size)
        if path in self._digests:
            hashing = self._pool.submit(self._digests[path].update, data.data)
            self._ends[path] += size
        self._buffers.append((buffer, hashing))
        return data

    def _read(self, path: Path, start: int, size: int, label: str, buffer: mmap | None = None) -> np.ndarray:
        """Reads all pages that contain the bytes."""
        skip, file = start % PAGE, self._file(path)
        pages = -(-(skip + size) // PAGE) * PAGE
        if buffer is None or pages > _BUFFER:
            buffer = mmap(-1, max(pages, PAGE))
        try:
            is_whole = fill(file, memoryview(buffer)[:pages], start - skip, skip + size)
        except OSError as error:
            raise unreadable(path, error) from None
        if not is_whole:
            raise ModelError(f"{path} ended inside {label}", "a complete file", "copy or download it again")
        data = np.frombuffer(buffer, np.uint8, size, skip)
        return data.copy() if skip % _ALIGNMENT else data

    def _file(self, path: Path) -> int:
        if not self._open or self._open[0] != path:
            self._close()
            try:
                self._open = path, open_direct(path)
            except OSError as error:
                raise unreadable(path, error) from None
        return self._open[1]

    def _close(self) -> None:
        if self._open:
            os.close(self._open[1])
        self._open = None


@contextlib.contextmanager
def hashing(
    readers: Mapping[str, Callable[[threading.Event, Callable[[int], None]], str]],
    done: Callable[[int], None] = lambda count: None,
) -> Iterator[dict[str, Future[str]]]:
    """Hashes files, a few at a time; unfinished ones are stopped when the block ends.

    Args:
        readers: by name, a function that returns a file's hash; called with an event that stops it, and with `done`.
        done: called with the number of bytes just hashed, from several threads.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            yield {name: pool.submit(read, stop, done) for name, read in readers.items()}
        finally:
            stop.set()
