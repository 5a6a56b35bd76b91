"""A stored tensor: its place in a file, its type, and the parts that belong to it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import open_regular, unreadable

from .decode import PARTS, TILE_ROWS, TILES, TYPES, WHOLE
from .exponents import Damaged


@dataclass(frozen=True)
class Tensor:
    """A stored tensor, or a weight that is stored in several tensors."""

    name: str
    path: Path
    dtype: str  # one of `decode.TYPES`, or a type that cannot be decoded
    shape: tuple[int, ...]  # in torch's order of axes, as if not packed
    start: int  # bytes from the start of the file
    end: int
    parts: tuple["Tensor", ...] = ()  # scales and the like, in the order of `formats.COMPOUNDS`

    @property
    def bytes(self) -> int:
        """Bytes in the file, including parts."""
        return self.end - self.start + sum(part.bytes for part in self.parts)

    @property
    def numbers(self) -> int:
        """Count of its numbers."""
        return math.prod(self.shape)

    @property
    def step(self) -> int:
        """Rows at whose multiples it may be cut: tiles of scales and blocks of numbers stay whole."""
        kind = TYPES[self.dtype]
        is_whole = not kind.rows or math.prod(self.shape[1:]) % kind.numbers
        return max(1, self.shape[0]) if is_whole else kind.rows

    def rows(self, first: int, count: int) -> "Tensor":
        """Returns some consecutive rows; the first is a multiple of `step`."""
        if count == self.shape[0]:
            return self
        size = (self.end - self.start) // self.shape[0]
        start, shape = self.start + first * size, (count, *self.shape[1:])
        parts = tuple(part._rows_of(self.shape[0], first, count) for part in self.parts)
        return replace(self, shape=shape, start=start, end=start + count * size, parts=parts)

    def _rows_of(self, all_: int, first: int, count: int) -> "Tensor":
        """Returns the part that belongs to some rows of a weight."""
        if self.dtype == TILES:
            return self.rows(first, -(-count // TILE_ROWS) * TILE_ROWS)
        is_cut = self.shape[:1] == (all_,) and not self.dtype.startswith(WHOLE)
        return self.rows(first, count) if is_cut else self

    def read(self, data: "Data") -> mx.array:
        """Returns the tensor as an array, in a type that holds every value.

        Raises:
            ModelError: its stream of codes is damaged.
        """
        is_last = self.parts and all(part.start <= self.start for part in self.parts)
        stored = None if is_last else data(self)  # in the order of the file where that can be
        parts = [part.read(data) for part in self.parts]
        try:
            return PARTS[self.dtype].decode(data(self) if stored is None else stored, self.shape, *parts)
        except Damaged as error:
            found = f"{self.path}: the {self.dtype} stream of {self.name} holds {error}"
            raise ModelError(found, "a complete file", "download it again") from None


def stored_bytes(tensor: Tensor) -> bytes:
    """Reads the bytes of a small tensor while a file is opened; weights are read by `reading.Reading`.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        with open_regular(tensor.path) as file:
            file.seek(tensor.start)
            return file.read(tensor.end - tensor.start)
    except OSError as error:
        raise unreadable(tensor.path, error) from None


Data = Callable[[Tensor], np.ndarray]  # returns the stored bytes of a tensor: `reading.Reading.data`
