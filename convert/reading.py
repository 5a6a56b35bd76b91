"""Reads files to their end, hashed on the way, and leaves the system's cache to other programs.

The files of a model are as large as a machine's memory, or larger. So a source is read once: its tensors come in the
order in which they lie in the file, and its hash is computed of the same bytes.
"""

import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.pagecache import bypass, forget

from .sources import Tensor

_CHUNK = 2**20  # of a size that stays in a processor's cache
_LARGE = 2**20  # smaller tensors may lie anywhere: they are read apart, and again when their turn comes
_BUFFERS = 4  # that are used in turn
_BUFFER = 2**23  # bytes of each; what is larger gets memory of its own


class Reading:
    """Source files, each read once and hashed on the way, as long as its large tensors are asked for in their order.

    Whatever the order, tensors and hashes are right. Buffers are used again: memory that is new each time costs a
    system more than reading into it.

    Args:
        hashed: the files whose hash is wanted. Others may be read too.
    """

    def __init__(self, hashed: Iterable[Path]):
        self._digests = {path: hashlib.sha256() for path in hashed}
        self._ends = dict.fromkeys(self._digests, 0)  # bytes of each file that are hashed, or about to be
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flux-krea-hash")
        self._buffers = deque((np.empty(_BUFFER, np.uint8), None) for _ in range(_BUFFERS))  # and who still reads each
        self._open: tuple[Path, int] | None = None  # one at a time

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.close()

    def data(self, tensor: Tensor) -> np.ndarray:
        """The bytes of a tensor, as they are stored; good until three more were read.

        Raises:
            ModelError: the file cannot be read, or ends too early.
        """
        path, size = tensor.path, tensor.end - tensor.start
        if size < _LARGE or tensor.start < self._ends.get(path, tensor.start):
            return self._read(path, tensor.start, np.empty(size, np.uint8), tensor.name)
        if path in self._ends:
            self._pass(path, tensor.start)
        return self._next(path, tensor.start, size, tensor.name)

    def finish(self, path: Path) -> str | None:
        """Reads what is left of a file, and closes it.

        Returns:
            Its sha256 in hexadecimal; None of a file whose hash was not wanted.

        Raises:
            ModelError: it cannot be read.
        """
        if path in self._digests:
            self._pass(path, os.fstat(self._file(path)).st_size)
        wait([hashing for _, hashing in self._buffers if hashing])
        self.close()
        return self._digests[path].hexdigest() if path in self._digests else None

    def close(self) -> None:
        """Closes what is open; it is opened again where it is needed again."""
        if self._open:
            os.close(self._open[1])
        self._open = None

    def _pass(self, path: Path, end: int) -> None:
        """Reads and hashes a file as far as this."""
        while (start := self._ends[path]) < end:
            self._next(path, start, min(_CHUNK, end - start), "what no tensor of ours is made of")

    def _next(self, path: Path, start: int, size: int, what: str) -> np.ndarray:
        """Reads on in a file, and has it hashed meanwhile."""
        buffer, hashing = self._buffers.popleft()
        if hashing:
            hashing.result()
        data = self._read(path, start, buffer[:size] if size <= _BUFFER else np.empty(size, np.uint8), what)
        forget(self._file(path), start, size)
        if path in self._digests:
            hashing = self._pool.submit(self._digests[path].update, data)
            self._ends[path] += size
        self._buffers.append((buffer, hashing))
        return data

    def _read(self, path: Path, start: int, data: np.ndarray, what: str) -> np.ndarray:
        done = 0
        try:
            while done < len(data) and (count := os.preadv(self._file(path), [data[done:]], start + done)):
                done += count
        except OSError as error:
            raise _unreadable(path, error) from None
        if done < len(data):
            raise ModelError(f"{path} ended inside {what}", "a complete file", "copy or download it again")
        return data

    def _file(self, path: Path) -> int:
        if not self._open or self._open[0] != path:
            self.close()
            try:
                self._open = path, os.open(path, os.O_RDONLY)
            except OSError as error:
                raise _unreadable(path, error) from None
            bypass(self._open[1])
        return self._open[1]


@contextlib.contextmanager
def hashing(
    paths: Iterable[Path], workers: int, done: Callable[[int], None] = lambda count: None
) -> Iterator[dict[Path, Future[str]]]:
    """The sha256 of files, computed beside other work; what is not done when the block ends is given up at once."""
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield {path: pool.submit(sha256, path, stop, done) for path in paths}
        finally:
            stop.set()


def sha256(path: Path, stop: threading.Event | None = None, done: Callable[[int], None] = lambda count: None) -> str:
    """Of a file, in hexadecimal.

    Args:
        path: the file.
        stop: ends it early.
        done: called with the bytes just hashed.

    Raises:
        CancelledError: `stop` was set.
        ModelError: the file cannot be read.
    """
    digest = hashlib.sha256()

    def use(piece: memoryview) -> None:
        digest.update(piece)
        done(len(piece))

    read_through(path, use, stop)
    return digest.hexdigest()


def read_through(path: Path, use: Callable[[memoryview], None], stop: threading.Event | None = None) -> None:
    """Hands all of a file to a function, piece after piece; each is there until the function returns.

    Raises:
        CancelledError: `stop` was set.
        ModelError: the file cannot be read.
    """
    buffer, end = memoryview(bytearray(_CHUNK)), 0
    try:
        with open(path, "rb", buffering=0) as file:
            bypass(file.fileno())
            while count := file.readinto(buffer):
                if stop and stop.is_set():
                    raise CancelledError
                use(buffer[:count])
                forget(file.fileno(), end, count)
                end += count
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(f"{path} cannot be read: {error.strerror}", "a file that can")
