"""Which weights are in memory when: resident, or streamed from disk each time they are needed.

The large networks (transformer, T5, the filters' language model) run block by block, and a block needs its matrices
only while it computes. `Blocks` runs such blocks. It makes as many resident as its budget allows, and reads the others
ahead of their turn into two buffers: one is filled while the block in the other computes. A block that is in memory
starts before the one before it has ended, so that a GPU never waits for its commands (`worker.Flight`). The networks do
not know it: they call `run(block, *args)`.

Reading is done here and not by `mx.load`, for three reasons. A failing read names its file and tensor. Weights that are
streamed again and again do not push other programs' pages out of memory. And the buffers are MLX's own memory, filled
in place by `pread`, so that nothing is copied or allocated during a run.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .errors import ModelError
from .files import bypass, forget, open_descriptor
from .weights import DTYPES, PACKED, TensorInfo
from .worker import Flight

SLOTS = 2  # buffers for streamed blocks: one computes, one is read
_CHUNK = 32 * 2**20  # bytes of one read; several run at a time, as fast disks need
_THREADS = 4
_ALIGNMENT = 256  # of each tensor in a buffer; more than any kernel asks for
_TYPES = {name: getattr(mx, dtype) for dtype, name in DTYPES.items()} | {name: t for t, name in PACKED.items()}
_ABSENT = mx.zeros((0, 0))  # in place of a matrix that is not in memory

Tensors = Mapping[str, tuple[Path, TensorInfo]]


def matrices(block: Callable) -> tuple[nn.Module, list[str]]:
    """Returns the module that a block belongs to, and the names of the parameters that may be streamed.

    Those are the matrices of its linear layers, quantized or not, or the table of an embedding. Vectors are small and
    always resident. In layers whose modulation is evaluated apart, `layer.modulate` needs the matrices of the
    modulation alone, and the layer itself all others.
    """
    owner: Any = getattr(block, "__self__", block)
    if isinstance(owner, nn.Embedding):
        return owner, ["weight"]
    apart = tuple(f"{name}." for name in getattr(owner, "modulation_layers", ()))
    wanted = getattr(block, "__name__", "") == "modulate"
    names = []
    for path, layer in owner.named_modules():
        if isinstance(layer, nn.Linear | nn.QuantizedLinear) and path.startswith(apart or ("\0",)) == wanted:
            names += [f"{path}.{name}" for name, array in _arrays(layer) if array.ndim == 2]
    return owner, names


def _arrays(layer: nn.Module) -> Iterator[tuple[str, mx.array]]:
    return ((name, array) for name, array in layer.parameters().items() if isinstance(array, mx.array))


class Unit:
    """The matrices of one block: their places in their files and in a buffer.

    Args:
        block: as the network calls it through `run`.
        prefix: path of the block's module in its network, with a dot at the end.
        tensors: files and places of the network's tensors.

    Attributes:
        size: bytes of a buffer that holds them all.
    """

    def __init__(self, block: Callable, prefix: str, tensors: Tensors):
        self.module, names = matrices(block)
        self.prefix = prefix
        self.tensors: list[tuple[str, Path, TensorInfo, int]] = []  # name, file, place in it, place in the buffer
        self.size = 0
        for name in sorted(names, key=lambda name: (str(tensors[prefix + name][0]), tensors[prefix + name][1].start)):
            path, info = tensors[prefix + name]
            self.tensors.append((name, path, info, self.size))
            self.size += -(-(info.end - info.start) // _ALIGNMENT) * _ALIGNMENT

    def computed(self, dtype: mx.Dtype) -> int:
        """Returns the bytes of the matrices in a compute type."""
        types = ((info.end - info.start, _TYPES[info.dtype]) for _, _, info, _ in self.tensors)
        return sum(size if type in PACKED else size * dtype.size // type.size for size, type in types)

    def put(self, buffer: mx.array, dtype: mx.Dtype, cast: bool) -> None:
        """Makes the contents of a buffer the module's parameters.

        Args:
            buffer: (size,) uint8 or longer; the parameters are views of it, unless they are cast.
            dtype: the compute type.
            cast: evaluates the cast to it now, so that the buffer can be dropped.
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
        """Frees the matrices."""
        self.module.update(tree_unflatten([(name, _ABSENT) for name, *_ in self.tensors]))


class Reader:
    """Open weight files, read by several threads.

    Args:
        cached: True lets the system cache the files, for the next time.
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
        array: Any = np.array(buffer, copy=False)  # a view; Any, since numpy's stubs hide the buffer before 3.12
        target = memoryview(array)
        futures = []
        for name, path, info, start in unit.tensors:
            file, tensor = self._open(path), f"{path}: {unit.prefix}{name}"
            for offset in range(info.start, info.end, _CHUNK):
                count = min(_CHUNK, info.end - offset)
                where = start + offset - info.start
                futures.append(
                    self._pool.submit(self._fill, file, target[where : where + count], offset=offset, tensor=tensor)
                )
        return futures

    def read_some(self, path: Path, tensor: str, offsets: Sequence[int], target: np.ndarray) -> None:
        """Fills each row of the target, (N, bytes) uint8, from its place in a tensor's file.

        Raises:
            ModelError: the file cannot be opened or read.
        """
        file = self._open(path)
        for offset, row in zip(offsets, target, strict=True):
            self._fill(file, memoryview(row), offset=offset, tensor=f"{path}: {tensor}")

    def close(self) -> None:
        """Ends reading: drops reads that have not begun and waits for the others."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _open(self, path: Path) -> int:
        if path not in self._files:
            try:
                file = open_descriptor(path)
            except OSError as error:
                raise ModelError(f"{path} cannot be read: {error.strerror}", "a shard of the model") from None
            self._files[path] = file
            if not self._cached:
                bypass(file)
        return self._files[path]

    def _fill(self, file: int, target: memoryview, *, offset: int, tensor: str) -> None:
        """Fills the target from a file. Runs in the pool."""
        begin, count = offset, len(target)
        while target:
            try:
                done = os.preadv(file, [target], offset)
            except OSError as error:
                todo = "check the disk, then continue: nothing was lost"
                raise ModelError(f"{tensor} cannot be read: {error.strerror}", "", todo) from None
            if not done:
                raise ModelError(
                    f"{tensor}: the file has become shorter while it was read",
                    f"{begin + count} bytes",
                    "convert it again",
                )
            target, offset = target[done:], offset + done
        if not self._cached:
            forget(file, begin, count)


class Blocks:
    """Runs the blocks of a network in a fixed order, with their matrices resident or read ahead of their turn.

    Args:
        network: the blocks' network, loaded. Its arrays of these matrices may be lazy, and are dropped.
        tensors: files and places of its tensors, from `NetworkFolder.tensors`.
        blocks: callables that the network passes to `run`, in order.
        dtype: the compute type.
        budget: bytes of matrices that may be resident; None: all.
        check: called while a read is waited for; raises to stop.

    Attributes:
        in_flight: False: each block starts when the one before it has ended.
        resident: places of the blocks that stay in memory once they are read.
        loaded: places of those that were read.
    """

    def __init__(
        self,
        network: nn.Module,
        tensors: Tensors,
        blocks: Sequence[Callable],
        *,
        dtype: mx.Dtype,
        budget: int | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        prefixes = {id(module): f"{path}." if path else "" for path, module in network.named_modules()}
        self.units = [Unit(block, prefixes[id(getattr(block, "__self__", block))], tensors) for block in blocks]
        self.places = {_key(block): place for place, block in enumerate(blocks)}
        self.dtype, self.check, self.in_flight = dtype, check, True
        self.sizes = [unit.computed(dtype) for unit in self.units]
        self.resident = resident_places(self.sizes, budget)
        self.loaded: set[int] = set()
        for unit in self.units:
            unit.drop()

    def set_budget(self, budget: int) -> None:
        """Changes the bytes that may be resident. Blocks that were read stay as far as the new budget has them."""
        places = resident_places(self.sizes, budget)
        if len(places) != len(self.resident) or sum(self.sizes[place] for place in self.resident) > budget:
            self.resident = places
        for place in self.loaded - self.resident:
            self.units[place].drop()
        self.loaded &= self.resident

    @contextlib.contextmanager
    def streaming(self, rounds: int) -> Iterator[Callable]:
        """Opens the files for so many rounds through all blocks, and gives the `run` to call the network with.

        Afterwards only resident blocks are in memory.
        """
        streaming = _Streaming(self, rounds * len(self.units))
        try:
            yield streaming.run
        finally:
            streaming.close()


class _Streaming:
    """The reads and buffers of `Blocks.streaming`, apart from it since a callback may begin another."""

    def __init__(self, blocks: Blocks, runs: int):
        self._blocks, self._left = blocks, runs
        self._reader = Reader(cached=len(blocks.resident) == len(blocks.units))
        self._buffers: dict[int, mx.array] = {}  # of blocks that were read or are being read
        self._reads: dict[int, list[Future]] = {}
        streamed = [unit.size for place, unit in enumerate(blocks.units) if place not in blocks.resident]
        self._free = [_bytes(max(streamed)) for _ in range(min(SLOTS, len(streamed)))]
        self._flight = Flight(blocks.in_flight)
        self._newest: int | None = None  # place of the block that was started last; None: that was no block

    def run(self, block: Callable, *args):
        """Returns the block's result. It is still computed, unless the block is the last one, or none of the network's.

        So whatever follows the blocks of a round finds them computed. A block that runs several times in a row is read
        once.
        """
        place, before = self._blocks.places.get(_key(block)), self._newest
        if place != before:
            self._newest = place
            self._left -= place is not None
            if self._flight.is_empty:
                self._free_buffer(before)
        if place is None:
            return self._flight.run(block, args)
        self._load(place, args)
        self._read_ahead(place)
        result = self._flight.start(block, args, partial(self._free_buffer, place))
        if place == len(self._blocks.units) - 1:
            self._flight.settle()
        self._read_ahead(place)
        return result

    def close(self) -> None:
        """Ends reading, and frees all blocks that are not resident."""
        self._reader.close()
        self._flight.end()
        for place in self._buffers.keys() - self._blocks.loaded:
            self._blocks.units[place].drop()
        # a traceback may hold `run`, and must hold no buffers
        del self._blocks, self._buffers, self._reads, self._free, self._flight

    def _free_buffer(self, place: int | None) -> None:
        """Takes the buffer of a block that has ended for the next ones, unless the block may run again at once."""
        if place in self._buffers and place != self._newest and place not in self._blocks.resident:
            self._blocks.units[place].drop()
            self._free.append(self._buffers.pop(place))

    def _load(self, place: int, args: tuple) -> None:
        """Waits until a block's matrices are in memory; `args` are those of its call."""
        blocks = self._blocks
        if place in blocks.loaded or (place in self._buffers and place not in self._reads):
            return
        if place in blocks.resident or not self._start(place):  # it is cast, or the block in flight has its buffer
            self._flight.settle(args)
            self._start(place)
        while wait(self._reads[place], timeout=0.1).not_done:
            blocks.check()
        for future in self._reads.pop(place, ()):
            future.result()
        blocks.units[place].put(self._buffers[place], blocks.dtype, cast=place in blocks.resident)
        if place in blocks.resident:
            blocks.loaded.add(place)
            del self._buffers[place]

    def _read_ahead(self, place: int) -> None:
        """Starts to read the blocks after this one, as far as there is room."""
        count = len(self._blocks.units)
        for ahead in range(1, min(self._left, count - 1) + 1):
            if not self._start((place + ahead) % count):
                break

    def _start(self, place: int) -> bool:
        """Starts to read a block, unless that has begun; returns False if there is no room now."""
        blocks = self._blocks
        if place in blocks.loaded or place in self._buffers:
            return True
        if place in blocks.resident:
            if self._reads.keys() & blocks.resident:  # one of those at a time
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


def read_rows(tensors: Tensors, path: str, rows: Sequence[int], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Reads rows of the arrays of one layer, such as a table of tokens of which few are needed.

    Args:
        tensors: files and places of its network's tensors.
        path: of the layer.
        rows: their numbers, in the order of the result.
        dtype: the compute type.

    Raises:
        ModelError: a file cannot be read.
    """
    reader, arrays = Reader(cached=True), {}
    try:
        for tensor, (file, info) in tensors.items():
            if tensor.startswith(f"{path}."):
                size = (info.end - info.start) // info.shape[0]
                raw = np.empty((len(rows), size), np.uint8)
                reader.read_some(file, tensor, [info.start + row * size for row in rows], raw)
                array = mx.array(raw).view(_TYPES[info.dtype]).reshape(len(rows), *info.shape[1:])
                arrays[tensor.removeprefix(f"{path}.")] = array if array.dtype in PACKED else array.astype(dtype)
    finally:
        reader.close()
    return arrays


def resident_places(sizes: Sequence[int], budget: int | None) -> set[int]:
    """Chooses the blocks that are resident, spread evenly, so that there is time to read each of the others.

    Args:
        sizes: bytes of each block.
        budget: bytes for the resident ones; None: all.
    """
    everything = set(range(len(sizes)))
    if budget is None or sum(sizes) <= budget:
        return everything
    for count in range(len(sizes) - 1, 0, -1):
        chosen = spread(count, len(sizes))
        if sum(sizes[place] for place in chosen) <= budget:
            return chosen
    return set()


def hidden_places(
    sizes: Sequence[int], budget: int, stored: Sequence[int], seconds: Sequence[float], disk: float
) -> set[int] | None:
    """Chooses the fewest resident blocks with which each of the others is read while those before it compute.

    A streamed block is read from when the streamed one before it begins, until its own turn.

    Args:
        sizes: bytes of each block in memory.
        budget: bytes for the resident ones.
        stored: bytes of each in its file.
        seconds: of each, computing; the time that reading may take.
        disk: bytes a second that are read.

    Returns:
        Their places, of which `resident_places` makes the same; None: there are none within the budget.
    """
    for count in range(len(sizes) + 1):
        chosen = spread(count, len(sizes))
        if resident_places(sizes, sum(sizes[place] for place in chosen)) != chosen:
            continue
        if sum(sizes[place] for place in chosen) > budget:
            return None
        others = [place for place in range(len(sizes)) if place not in chosen]
        turns = list(zip(others[-1:] + others, others, strict=False))  # the streamed block before, and the block
        if all(stored[place] <= disk * sum(_between(seconds, before, place)) for before, place in turns):
            return chosen
    return None


def _between(seconds: Sequence[float], first: int, end: int) -> Sequence[float]:
    """Returns the seconds from one block to the next, which may be of the next round, or itself in that."""
    return seconds[first:end] if first < end else [*seconds[first:], *seconds[:end]]


def spread(count: int, total: int) -> set[int]:
    """Returns `count` of `total` places, spread evenly."""
    return {(2 * i + 1) * total // (2 * count) for i in range(count)}


def _key(block: Callable) -> tuple[int, str]:
    return id(getattr(block, "__self__", block)), getattr(block, "__name__", "")
