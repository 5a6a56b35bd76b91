"""Reads the header of a GGUF file: metadata and the places of tensors. Reads no tensor and checks every number.

The file is, in little-endian order: "GGUF", version, number of tensors, number of entries; the entries (key, type,
value); for each tensor its name, axes (the fastest first), type and offset; and the data, aligned.
"""

import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlx_flux_krea.errors import ModelError, printable
from mlx_flux_krea.files import open_regular
from mlx_flux_krea.weights import TensorInfo

from .decode import GGML, TYPES

# far above every real file: a T5 has 219 tensors, 40 entries, and a vocabulary of 32128 strings in one entry
_MOST_TENSORS, _MOST_ENTRIES, _MOST_STRINGS, _LARGEST = 2**16, 2**12, 2**20, 2**26
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ORIGINAL = "comfy.gguf.orig_shape."  # and a tensor's name


@dataclass
class _Header:
    """The unread rest of a header; every step is checked against the file's end."""

    file: BinaryIO
    left: int

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise ValueError(f"its header asks for {size} bytes where {self.left} are left")
        self.left -= size
        return self.file.read(size)

    def number(self, code: str) -> int | float:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def integer(self, code: str) -> int:
        return int(self.number(code))

    def count(self, most: int, noun: str) -> int:
        count = self.integer("Q")
        if count > most:
            raise ValueError(f"it counts {count} {noun}")
        return count

    def string(self) -> str:
        return self.take(self.integer("Q")).decode()

    def value(self) -> object:
        """Reads a number, a string, an array of numbers, or a list of strings."""
        kind = self.integer("I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value is of type {kind}")
        kind = self.integer("I")
        if kind == _STRING:
            return [self.string() for _ in range(self.count(_MOST_STRINGS, "strings in one entry"))]
        if kind not in _SCALARS:
            raise ValueError(f"an array is of type {kind}")
        stored = np.dtype(f"<{_SCALARS[kind]}")
        return np.frombuffer(self.take(self.integer("Q") * stored.itemsize), stored)


def read_gguf(path: Path) -> tuple[dict[str, TensorInfo], dict[str, object]]:
    """Returns tensors (axes in torch's order) and metadata of a GGUF file.

    Raises:
        ModelError: not a readable, complete GGUF file, or a file with unknown types.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header = _Header(file, min(size, _LARGEST))
            if header.take(4) != b"GGUF":
                raise ValueError("it does not start with GGUF")
            version = header.integer("I")
            if version not in (2, 3):
                raise ValueError(f"it is of version {version}, or of a machine with another order of bytes")
            tensors, entries = header.count(_MOST_TENSORS, "tensors"), header.count(_MOST_ENTRIES, "entries")
            metadata: dict[str, object] = {header.string(): header.value() for _ in range(entries)}
            listed = [_tensor(header) for _ in range(tensors)]
            placed = _placed(listed, _data_start(file.tell(), metadata), size)
            return {name: _reshaped(name, info, metadata) for name, info in placed.items()}, metadata
    except (OSError, ValueError, struct.error, MemoryError) as error:
        reason = getattr(error, "strerror", None) or printable(str(error))
        raise ModelError(
            f"{path} cannot be read: {reason}", "a complete GGUF file", "copy or download it again"
        ) from None


def _tensor(header: _Header) -> tuple[str, str, tuple[int, ...], int]:
    """Reads name, type, shape and offset of the next tensor."""
    name = header.string()
    axes = header.integer("I")
    if axes > 4:
        raise ValueError(f"{name[:100]} has {axes} axes")
    shape = tuple(header.integer("Q") for _ in range(axes))[::-1]
    kind, offset = header.integer("I"), header.integer("Q")
    if kind not in GGML:
        raise ValueError(
            f"{name[:100]} is of the ggml type {kind}, and only these are known: {', '.join(GGML.values())}"
        )
    if any(n < 1 for n in shape) or (shape[-1] if shape else 1) % TYPES[GGML[kind]].numbers:
        raise ValueError(f"{name[:100]} of shape {list(shape)} cannot be stored as {GGML[kind]}")
    return name, GGML[kind], shape, offset


def _reshaped(name: str, info: TensorInfo, metadata: dict[str, object]) -> TensorInfo:
    """Returns a tensor in the shape that it had before its rows were made to fit blocks (city96's ComfyUI-GGUF)."""
    shape = metadata.get(f"{_ORIGINAL}{name}")
    if shape is None:
        return info
    lengths = tuple(int(n) for n in shape) if isinstance(shape, np.ndarray) and shape.dtype.kind in "iu" else ()
    if not lengths or min(lengths) < 1 or math.prod(lengths) != math.prod(info.shape):
        raise ValueError(f"{name[:100]} of shape {list(info.shape)} cannot have had the shape {str(shape)[:100]}")
    return replace(info, shape=lengths)


def _data_start(end: int, metadata: dict[str, object]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise ValueError("its general.alignment is no power of two")
    return -(-end // alignment) * alignment


def _placed(listed: list[tuple[str, str, tuple[int, ...], int]], start: int, size: int) -> dict[str, TensorInfo]:
    """Returns every tensor with its place, inside the file and apart from the others."""
    infos, last = {}, start
    for name, dtype, shape, offset in sorted(listed, key=lambda t: t[3]):
        kind = TYPES[dtype]
        info = TensorInfo(dtype, shape, start + offset, start + offset + math.prod(shape) // kind.numbers * kind.bytes)
        if name in infos:
            raise ValueError(f"{name[:100]} is in it twice")
        if info.start < last:
            raise ValueError(f"{name[:100]} lies on top of another tensor")
        if info.end > size:
            raise ValueError(f"it ends before {name[:100]} does")
        infos[name], last = info, info.end
    return {name: infos[name] for name, *_ in listed}
