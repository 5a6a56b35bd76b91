"""Writes the weights of a component: read in the order of the source, each piece put where it belongs in our shards.

Only pieces of a few tensors are in memory at a time. Reading, hashing, quantizing (on two streams) and writing overlap.
"""

import contextlib
import functools
import itertools
import json
import math
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.models.config import quantization_to_json
from mlx_flux_krea.weights import INDEX

from .folder import Folder
from .quantize import ITEM_BYTES, Layers, Made, count_bytes, layer_of, make, stored
from .reading import Reading
from .remap import Plan, Target

SHARD_BYTES = 4 * 2**30  # a shard ends with the block that reaches this
_BEGUN = 6  # pieces of tensors that are in the making at a time
_WAITING = 8  # arrays that are made and not written yet
_MODULATION = ("_mod.lin.", ".modulation.lin.", "adaLN_modulation.")


def write_component(
    folder: Folder,
    component: str,
    config: dict,
    plan: Plan,
    dtype: str,
    layers: Layers,
    reading: Reading,
    done: Callable[[int], None],
    allow_nonfinite: bool = False,
) -> dict[str, tuple[float, float]]:
    """Writes config.json, shards and index of one component.

    Args:
        folder: the model folder.
        component: its name there.
        config: sizes, as JSON.
        plan: its tensors.
        dtype: "float32", "bfloat16" or "float16", of every array that is not packed.
        layers: how layers are quantized.
        reading: reads the sources.
        done: called with the bytes just written.
        allow_nonfinite: NaN and infinities pass.

    Returns:
        Of every quantized tensor, the squares of error and values, summed.

    Raises:
        ModelError: a source that cannot be read, NaN or infinities in a tensor, or a value that does not fit the type.
    """
    quantization = quantization_to_json(layers)
    fields = {"quantization": quantization} if quantization else {}
    folder.write_json(f"{component}/config.json", {"dtype": dtype, **fields, **config})
    shards = _shards(plan, dtype, layers)
    weight_map, places, losses = {}, {}, {}
    with contextlib.ExitStack() as files, ThreadPoolExecutor(1, thread_name_prefix="flux-krea-write") as writer:
        for number, targets in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = files.enter_context(folder.open(f"{component}/{name}"))
            header, starts = _header(targets, dtype, layers)
            file.write(header)
            weight_map |= dict.fromkeys(starts, name)
            places |= {array: (file, start) for array, start in starts.items()}
        writing: deque[Future] = deque()
        for row, made in _made(plan, dtype, layers, reading):
            if not allow_nonfinite:
                _check_finite(made, dtype)
            if made.loss is not None:
                losses[made.target.name] = losses.get(made.target.name, 0) + np.array(made.loss, np.float64)
            arrays = stored(made.target, dtype, layer_of(made.target, layers))
            for array, part in zip(arrays, made.parts, strict=True):
                data = memoryview(np.asarray(part.reshape(-1).view(mx.uint8)))
                file, start = places[array]
                if row:
                    start += row * len(data) // part.shape[0]
                if len(writing) == _WAITING:
                    done(writing.popleft().result())
                writing.append(writer.submit(file.write, data, start))
        while writing:
            done(writing.popleft().result())
    metadata = {"total_size": sum(count_bytes(t, dtype, layer_of(t, layers)) for t in plan.targets)}
    folder.write_json(f"{component}/{INDEX}", {"metadata": metadata, "weight_map": weight_map})
    return {name: tuple(loss.tolist()) for name, loss in losses.items()}


def _made(plan: Plan, dtype: str, layers: Layers, reading: Reading) -> Iterator[tuple[int, Made]]:
    """Pieces, each with the row of its tensor that is its first: the next are read while those before are computed.

    They come in the order of the sources, so that these are read once, on two streams in turn.
    """
    pieces = [(row, target, piece) for target in plan.targets for row, piece in target.pieces()]
    pieces.sort(key=lambda cut: [(str(tensor.path), tensor.start) for tensor in cut[2].sources[:1]])
    begun: deque[tuple[int, Made]] = deque()
    for (row, target, piece), stream in zip(pieces, itertools.cycle(_streams()), strict=False):
        begun.append((row, make(target, piece, dtype, layer_of(target, layers), reading.data, stream)))
        if len(begun) == _BEGUN:
            yield begun.popleft()
    yield from begun
    mx.clear_cache()


def _check_finite(made: Made, dtype: str) -> None:
    if problem := made.problem(dtype):
        tensor, nonfinite = made.piece.sources[0], problem.startswith("NaN")
        todo = "download it again" if nonfinite else "use another --dtype"
        raise ModelError(f"{tensor.path}: {tensor.name} holds {problem}", "finite weights" if nonfinite else "", todo)


@functools.cache
def _streams() -> tuple:
    """Two more; in every thread that converts they are its own."""
    return tuple(mx.new_thread_local_stream(mx.default_device()) for _ in range(2))


def _shards(plan: Plan, dtype: str, layers: Layers) -> list[list[Target]]:
    """Modulation apart from the rest; a shard never ends inside a block."""
    modulation = [t for t in plan.targets if any(part in t.name for part in _MODULATION)]
    rest = [t for t in plan.targets if not any(part in t.name for part in _MODULATION)]
    shards: list[list[Target]] = []
    for group in (modulation, rest):
        shard, size, block = [], 0, None
        for target in group:
            if size >= SHARD_BYTES and _block(target.name) != block:
                shards.append(shard)
                shard, size = [], 0
            shard.append(target)
            size += count_bytes(target, dtype, layer_of(target, layers))
            block = _block(target.name)
        shards += [shard] if shard else []
    return shards


def _block(name: str) -> str:
    """The part of a name up to and with its first number: double_blocks.7, encoder.block.3."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def _header(targets: list[Target], dtype: str, layers: Layers) -> tuple[bytes, dict[str, int]]:
    """A safetensors header in the order given, and where each array begins; the library's own writers sort."""
    entries: dict = {"__metadata__": {"format": "mlx"}}
    offset, starts = 0, {}
    for target in targets:
        for name, (kind, shape) in stored(target, dtype, layer_of(target, layers)).items():
            end = offset + math.prod(shape) * ITEM_BYTES[kind]
            entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
            offset, starts[name] = end, offset
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = struct.pack("<Q", len(header)) + header
    return header, {name: len(header) + start for name, start in starts.items()}
