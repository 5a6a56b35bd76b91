"""Which weights are in memory when: kept, or read from the file each time they are needed.

The large networks (transformer, T5, the filters' language model) run in pieces, and each piece needs its matrices only
while it computes. `Blocks` runs such pieces: it keeps the matrices of as many as it is allowed to, and reads the others
ahead of their turn into two buffers, one of which is being filled while the piece in the other computes. The networks
do not know it: they call `run(piece, *args)`.

Reading is done here and not by `mx.load`, for three reasons. A failing read names its file and tensor. What is read
again and again does not push other programs' pages out of memory. And the buffers are MLX's own memory, filled in place
by `pread`, so that nothing is copied or allocated while a picture is drawn.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .errors import ModelError
from .files import bypass, forget
from .weights import DTYPES, PACKED, TensorInfo
from .worker import evaluated

SLOTS = 2  # buffers for pieces that are not kept: one computes, one is read
_CHUNK = 32 * 2**20  # bytes of one read; several are under way at a time, which is what fast disks want
_THREADS = 4
_ALIGNMENT = 256  # of each tensor in a buffer; more than any kernel asks for
_TYPES = {name: getattr(mx, dtype) for dtype, name in DTYPES.items()} | {name: t for t, name in PACKED.items()}
_ABSENT = mx.zeros((0, 0))  # stands where matrices are that are not in memory


def matrices(piece: Callable) -> tuple[nn.Module, list[str]]:
    """The module that a piece belongs to, and the parameters of it that may be read each time.

    Those are the matrices of its linear layers, quantized or not, or its table where it is an embedding itself. Vectors
    stay: they are small. Of layers with a modulation, which is evaluated apart, `layer.modulate` needs just that, and
    the layer itself the others.
    """
    owner = getattr(piece, "__self__", piece)
    if isinstance(owner, nn.Embedding):
        return owner, ["weight"]
    apart = tuple(f"{name}." for name in getattr(owner, "modulation_layers", ()))
    wanted = getattr(piece, "__name__", "") == "modulate"
    names = []
    for path, layer in owner.named_modules():
        if isinstance(layer, nn.Linear | nn.QuantizedLinear) and path.startswith(apart or ("\0",)) == wanted:
            names += [f"{path}.{name}" for name, array in layer.parameters().items() if array.ndim == 2]
    return owner, names


class Unit:
    """The matrices of one piece in their files, and where each lies in a buffer.

    Attributes:
        size: bytes of a buffer that holds them all.
    """

    def __init__(self, piece: Callable, prefix: str, found: dict[str, tuple[Path, TensorInfo]]):
        self.module, names = matrices(piece)
        self.prefix = prefix
        self.tensors: list[tuple[str, Path, TensorInfo, int]] = []
        self.size = 0
        for name in sorted(names, key=lambda name: (str(found[prefix + name][0]), found[prefix + name][1].start)):
            path, info = found[prefix + name]
            self.tensors.append((name, path, info, self.size))
            self.size += -(-(info.end - info.start) // _ALIGNMENT) * _ALIGNMENT

    def computed(self, dtype: mx.Dtype) -> int:
        """Bytes of the matrices in a compute type."""
        types = ((info.end - info.start, _TYPES[info.dtype]) for _, _, info, _ in self.tensors)
        return sum(size if type in PACKED else size * dtype.size // type.size for size, type in types)

    def put(self, buffer: mx.array, dtype: mx.Dtype, cast: bool) -> None:
        """Makes what was read into the buffer the module's parameters.

        Args:
            buffer: (size,) uint8 or longer; the parameters are views of it, unless they are cast.
            dtype: the compute type.
            cast: whether a cast to it is made for good, so that the buffer can be dropped.
        """
        arrays = []
        for name, _, info, start in self.tensors:
            raw = buffer[start : start + info.end - info.start]
            array = raw.view(_TYPES[info.dtype]).reshape(info.shape)
            arrays.append((name, array if array.dtype in PACKED else array.astype(dtype)))
        if cast:
            mx.eval([array for _, array in arrays])
        self.module.update(tree_unflatten(arrays))

    def drop(self) -> None:
        """Takes the matrices away."""
        self.module.update(tree_unflatten([(name, _ABSENT) for name, *_ in self.tensors]))


class Reader:
    """Open weight files, read by several threads.

    Args:
        cached: whether the system may keep what was read, for the next time.
    """

    def __init__(self, cached: bool):
        self._cached = cached
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="flux-krea-read")
        self._files: dict[Path, int] = {}

    def read(self, unit: Unit, buffer: mx.array) -> list[Future]:
        """Starts to read a unit into a buffer.

        Raises:
            ModelError: a file cannot be opened. The futures raise it where a file cannot be read.
        """
        target = memoryview(np.array(buffer, copy=False))
        futures = []
        for name, path, info, start in unit.tensors:
            file, what = self._open(path), f"{path}: {unit.prefix}{name}"
            for offset in range(info.start, info.end, _CHUNK):
                count = min(_CHUNK, info.end - offset)
                where = start + offset - info.start
                futures.append(self._pool.submit(self._fill, file, target[where : where + count], offset, what))
        return futures

    def close(self) -> None:
        """Ends reading: what has not begun is left out, what has is waited for."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _open(self, path: Path) -> int:
        if path not in self._files:
            try:
                file = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ModelError(f"{path} cannot be read: {error.strerror}", "a shard of the model") from None
            self._files[path] = file
            if not self._cached:
                bypass(file)
        return self._files[path]

    def _fill(self, file: int, target: memoryview, offset: int, what: str) -> None:
        """Runs in the pool."""
        begin, count = offset, len(target)
        while target:
            try:
                done = os.preadv(file, [target], offset)
            except OSError as error:
                todo = "check the disk, then go on: nothing was lost"
                raise ModelError(f"{what} cannot be read: {error.strerror}", "", todo) from None
            if not done:
                raise ModelError(
                    f"{what}: the file has become shorter while it was read",
                    f"{begin + count} bytes",
                    "convert it again",
                )
            target, offset = target[done:], offset + done
        if not self._cached:
            forget(file, begin, count)


class Blocks:
    """Runs pieces of a network, in a fixed order, with their matrices in memory or read ahead of their turn.

    Args:
        network: the pieces' network, loaded; its arrays of these matrices may be lazy and are dropped.
        found: where its tensors lie, from `ModelFolder.tensors`.
        pieces: what is called through `run`, in order.
        dtype: the compute type.
        keep: bytes of matrices that may stay in memory; None: all.
        check: called while a read is waited for; raises to stop.
    """

    def __init__(
        self,
        network: nn.Module,
        found: dict[str, tuple[Path, TensorInfo]],
        pieces: Sequence[Callable],
        dtype: mx.Dtype,
        keep: int | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        prefixes = {id(module): f"{path}." if path else "" for path, module in network.named_modules()}
        self.units = [Unit(piece, prefixes[id(getattr(piece, "__self__", piece))], found) for piece in pieces]
        self.places = {_key(piece): place for place, piece in enumerate(pieces)}
        self.network, self.dtype, self.check = network, dtype, check
        self.sizes = [unit.computed(dtype) for unit in self.units]
        self.kept = kept(self.sizes, keep)
        self.present: set[int] = set()  # kept, and read
        for unit in self.units:
            unit.drop()

    def allow(self, keep: int) -> None:
        """Another number of bytes that may stay in memory. What is there stays as far as it may."""
        if sum(self.sizes[place] for place in self.kept) > keep or sum(self.sizes) <= keep:
            self.kept = kept(self.sizes, keep)
        for place in self.present - self.kept:
            self.units[place].drop()
        self.present &= self.kept

    @contextlib.contextmanager
    def reading(self, rounds: int) -> Iterator[Callable]:
        """The `run` that the network is called with, for so many rounds through all pieces.

        Afterwards nothing is left of what was not to be kept.
        """
        one = _Pass(self, rounds * len(self.units))
        try:
            yield one.run
        finally:
            one.close()


class _Pass:
    """The reads and buffers of `Blocks.reading`, apart from it since a callback may begin another."""

    def __init__(self, blocks: Blocks, left: int):
        self._blocks, self._left = blocks, left
        self._reader = Reader(cached=len(blocks.kept) == len(blocks.units))
        self._buffers: dict[int, mx.array] = {}  # of pieces that are there or on their way
        self._reads: dict[int, list[Future]] = {}
        streamed = [unit.size for place, unit in enumerate(blocks.units) if place not in blocks.kept]
        self._free = [_bytes(max(streamed)) for _ in range(min(SLOTS, len(streamed)))]

    def run(self, piece: Callable, *args):
        """The piece's result, evaluated."""
        place = self._blocks.places.get(_key(piece))
        if place is None:
            return evaluated(piece, *args)
        self._get(place)
        self._left -= 1
        self._read_ahead(place)
        result = evaluated(piece, *args)
        if place not in self._blocks.kept:
            self._blocks.units[place].drop()
            self._free.append(self._buffers.pop(place))
        return result

    def close(self) -> None:
        """Ends reading; what is not kept is gone."""
        self._reader.close()
        for place in self._buffers.keys() - self._blocks.present:
            self._blocks.units[place].drop()
        self._blocks, self._buffers, self._reads, self._free = None, {}, {}, []  # a kept traceback may keep `run`

    def _get(self, place: int) -> None:
        """Waits until a piece's matrices are there."""
        blocks = self._blocks
        if place in blocks.present:
            return
        self._start(place)
        while wait(self._reads[place], timeout=0.1).not_done:
            blocks.check()
        for future in self._reads.pop(place):
            future.result()
        blocks.units[place].put(self._buffers[place], blocks.dtype, cast=place in blocks.kept)
        if place in blocks.kept:
            blocks.present.add(place)
            del self._buffers[place]

    def _read_ahead(self, place: int) -> None:
        """Starts to read for the pieces after this one, as far as there is room."""
        count = len(self._blocks.units)
        for ahead in range(1, min(self._left, count - 1) + 1):
            if not self._start((place + ahead) % count):
                break

    def _start(self, place: int) -> bool:
        """Starts to read a piece's matrices, unless they are there or on their way; False if there is no room now."""
        blocks = self._blocks
        if place in blocks.present or place in self._buffers:
            return True
        if place in blocks.kept:
            if self._reads.keys() & blocks.kept:  # one of those at a time
                return False
            buffer = _bytes(blocks.units[place].size)
        elif self._free:
            buffer = self._free.pop()
        else:
            return False
        self._buffers[place] = buffer
        self._reads[place] = self._reader.read(blocks.units[place], buffer)
        return True


def _bytes(count: int) -> mx.array:
    buffer = mx.zeros((count,), mx.uint8)
    mx.eval(buffer)
    return buffer


def kept(sizes: Sequence[int], budget: int | None) -> set[int]:
    """Which of some pieces stay in memory, spread evenly, so that there is time to read each of the others.

    Args:
        sizes: bytes of each.
        budget: bytes for those that stay; None: all.
    """
    everything = set(range(len(sizes)))
    if budget is None or sum(sizes) <= budget:
        return everything
    for count in range(len(sizes) - 1, 0, -1):
        chosen = {(2 * i + 1) * len(sizes) // (2 * count) for i in range(count)}
        if sum(sizes[place] for place in chosen) <= budget:
            return chosen
    return set()


def _key(piece: Callable) -> tuple[int, str]:
    return id(getattr(piece, "__self__", piece)), getattr(piece, "__name__", "")
