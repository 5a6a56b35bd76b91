"""Writes the weights of a component: reads in the order of the source, writes each chunk to its place in our shards.

Only chunks of a few tensors are in memory at a time. Reading, hashing, quantizing (on two streams) and writing overlap.
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

from .folder import NewFolder
from .quantize import ITEM_BYTES, Layers, StoredChunk, count_bytes, layer_of, make, stored
from .reading import Reading
from .remap import ComponentPlan, Target

SHARD_BYTES = 4 * 2**30  # a shard ends with the block that reaches this size
_STARTED = 6  # chunks that are computed at a time
_WAITING = 8  # arrays that wait to be written
_MODULATION = ("_mod.lin.", ".modulation.lin.", "adaLN_modulation.")


def write_component(
    folder: NewFolder,
    component: str,
    config: dict,
    plan: ComponentPlan,
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
        done: called with the number of bytes just written.
        allow_nonfinite: accept NaN and infinities.

    Returns:
        For every quantized tensor, the sums of the squares of error and values.

    Raises:
        ModelError: a source cannot be read, or a tensor has NaN, infinities or values too large for the type.
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
        for row, chunk in _chunks(plan, dtype, layers, reading):
            if not allow_nonfinite:
                _check_finite(chunk, dtype)
            if chunk.loss is not None:
                losses[chunk.target.name] = losses.get(chunk.target.name, 0) + np.array(chunk.loss, np.float64)
            arrays = stored(chunk.target, dtype, layer_of(chunk.target, layers))
            for array, part in zip(arrays, chunk.parts, strict=True):
                data = np.asarray(part.reshape(-1).view(mx.uint8)).data
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
    return {name: (float(loss[0]), float(loss[1])) for name, loss in losses.items()}


def _chunks(plan: ComponentPlan, dtype: str, layers: Layers, reading: Reading) -> Iterator[tuple[int, StoredChunk]]:
    """Yields chunks, each with its first row in its tensor; the next are read while the previous ones are computed.

    They are in the order of the sources, so that each is read once, and alternate between two streams.
    """
    chunks = [
        (row, target, chunk_) for target in plan.targets for row, chunk_ in target.chunks(layer_of(target, layers))
    ]
    chunks.sort(key=lambda cut: [(str(tensor.path), tensor.start) for tensor in cut[2].sources[:1]])
    started: deque[tuple[int, StoredChunk]] = deque()
    for (row, target, chunk_), stream in zip(chunks, itertools.cycle(_streams()), strict=False):
        started.append((row, make(target, chunk_, dtype, layer_of(target, layers), reading.data, stream)))
        if len(started) == _STARTED:
            yield started.popleft()
    yield from started
    mx.clear_cache()


def _check_finite(chunk: StoredChunk, dtype: str) -> None:
    if problem := chunk.problem(dtype):
        tensor, nonfinite = chunk.chunk.sources[0], problem.startswith("NaN")
        todo = "download it again" if nonfinite else "use another `dtype`"
        raise ModelError(f"{tensor.path}: {tensor.name} holds {problem}", "finite weights" if nonfinite else "", todo)


@functools.cache
def _streams() -> tuple:
    """Returns two more streams, which every thread has for itself."""
    return tuple(mx.new_thread_local_stream(mx.default_device()) for _ in range(2))


def _shards(plan: ComponentPlan, dtype: str, layers: Layers) -> list[list[Target]]:
    """Divides tensors into shards: modulation apart from the rest, and no end inside a block."""
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
    """Returns the part of a name up to its first number: double_blocks.7, encoder.block.3."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def _header(targets: list[Target], dtype: str, layers: Layers) -> tuple[bytes, dict[str, int]]:
    """Returns a safetensors header in the given order, and the start of each array; the library's writers sort."""
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
