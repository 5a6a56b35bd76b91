"""The second pass of a large picture: what holds it together above the area that the model was trained for.

The finished picture of the first pass, enlarged, is noised to the level of one of the last steps and denoised at its
new size. In each step the low frequencies of the predicted picture are drawn to those of the enlarged one; the model
sees the whole, or tiles of the size that it knows, whose velocities are blended; its patches of 2 x 2 latents lie one
latent aside in every second step. Formulas are those of HiFlow (Bu et al. 2025, arXiv:2504.06232) and of what it
cites. B batch, L image tokens, h and w latent size.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..models.config import FluxConfig
from ..models.transformer import rope
from . import sampler
from .sampler import pack, unpack

Model = Callable[[mx.array, int], mx.array]  # from latents (B, L, 64) and the number of a step to the velocity
Size = tuple[int, int]  # width and height


@dataclass(frozen=True)
class Recipe:
    """How the second pass is made; the defaults are those of the evidence (docs/large.md).

    Attributes:
        strength: share of the schedule that the enlarged picture goes through.
        guidance: weight of the enlarged picture's low frequencies.
        cutoff: frequency below which they are taken, as a share of the highest one that the first pass could hold.
        shifts: the patch grid lies one latent aside in every second step.
    """

    strength: float = 0.3
    guidance: float = 1.0
    cutoff: float = 1.5
    shifts: bool = True


RECIPE = Recipe()
_ORDER = 4  # of the Butterworth filter


def low_pass(length: int, cutoff: float) -> np.ndarray:
    """Returns the matrix of a Butterworth low-pass along one axis, of order 4.

    It weighs the cosines of a picture that is mirrored at its borders (the discrete cosine transform of type 2), so
    that nothing wraps around, and it is one matrix product on any device.

    Args:
        length: of the axis.
        cutoff: frequency at which half of the amplitude passes, as a share of the highest one.

    Returns:
        (length, length) float32.
    """
    orders = np.arange(length)
    basis = np.cos(np.pi * orders[:, None] * (orders + 0.5) / length) * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    passed = 1 / (1 + (orders / (length * cutoff)) ** (2 * _ORDER))
    return (basis.T @ (passed[:, None] * basis)).astype(np.float32)


def low_frequencies(width: int, height: int, cutoff: float) -> Callable[[mx.array], mx.array]:
    """Returns a function that takes the low frequencies of packed latents (B, L, 64), in float32.

    Args:
        width: of the latents.
        height: of the latents.
        cutoff: of `low_pass`.
    """
    down, across = (mx.array(low_pass(side, cutoff)) for side in (height, width))

    def low(latents: mx.array) -> mx.array:
        return pack(down @ unpack(latents.astype(mx.float32), width, height) @ across.T)

    return low


def guided(
    model: Model, sigmas: np.ndarray, enlarged: mx.array, low: Callable[[mx.array], mx.array], recipe: Recipe
) -> Model:
    """Returns a model whose predicted pictures have the low frequencies of the enlarged one.

    HiFlow's first alignment: with x0 = x - sigma v, x0 + a (low(enlarged) - low(x0)), as a velocity.

    Args:
        model: of the second pass.
        sigmas: (n + 1,) noise levels of the pass, falling to 0.
        enlarged: (B, L, 64) clean latents of the enlarged picture.
        low: takes the low frequencies of packed latents.
        recipe: the weight a.
    """
    wanted = low(enlarged)

    def velocity(latents: mx.array, step: int) -> mx.array:
        v, sigma = model(latents, step).astype(mx.float32), float(sigmas[step])
        missing = wanted - low(latents.astype(mx.float32) - sigma * v)
        return v - (recipe.guidance / sigma) * missing

    return velocity


@dataclass(frozen=True)
class Tiling:
    """Places of tiles along one side, in tokens, with weights that add up to one everywhere."""

    starts: tuple[int, ...]
    side: int
    weights: tuple[np.ndarray, ...]  # (side,) float32 of each

    @classmethod
    def along(cls, length: int, side: int) -> "Tiling":
        """Places tiles of so many tokens along a side; neighbours share a fifth of a tile or more."""
        side = min(side, length)
        shared = shared_tokens(side)
        count = tile_count(length, side)
        starts = [i * (length - side) // max(count - 1, 1) for i in range(count)]
        ramp = np.minimum((np.arange(side) + 0.5) / max(shared, 0.5), 1)
        weights = [(ramp if i else 1) * (ramp[::-1] if i < count - 1 else 1) * np.ones(side) for i in range(count)]
        total = np.zeros(length)
        for start, weight in zip(starts, weights, strict=True):
            total[start : start + side] += weight
        return cls(
            tuple(starts),
            side,
            tuple(
                (weight / total[start : start + side]).astype(np.float32)
                for start, weight in zip(starts, weights, strict=True)
            ),
        )


def tile_count(length: int, side: int) -> int:
    """Returns how many tiles of a side cover a length, with a fifth of a side shared."""
    shared = shared_tokens(side)
    return 1 if side >= length else -(-(length - shared) // (side - shared))


def shared_tokens(side: int) -> int:
    """Returns the tokens that neighbouring tiles of a side share, at least: a fifth of it."""
    return max(side // 5, 1) if side > 1 else 0


@dataclass(frozen=True)
class View:
    """How the transformer sees the latents of a pass, in each of its steps.

    Attributes:
        width: of the latents.
        height: of the latents.
        tile: width and height of what is seen at once, in latents; None: the whole.
        shifts: in every second step the patch grid lies one latent aside; borders are repeated for it.
        factor: by which the picture was enlarged; 1: this is no second pass.
        recipe: of the second pass.
    """

    width: int
    height: int
    tile: Size | None = None
    shifts: bool = False
    factor: float = 1.0
    recipe: Recipe = RECIPE

    @property
    def cutoff(self) -> float:
        """The cutoff of the low-pass, as a share of the highest frequency of these latents."""
        return self.recipe.cutoff / self.factor

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Sizes of what is seen at once, in latents, of all steps."""
        if self.tile:
            return (self.tile,)
        whole = self.width, self.height
        return (whole, (whole[0] + 2, whole[1] + 2)) if self.shifts else (whole,)

    @property
    def count(self) -> int:
        """Number of tiles in a step, the most of any."""
        if self.tile is None:
            return 1
        sides = zip((self.width, self.height), self.tile, strict=True)
        return math.prod(tile_count((side + 2 * self.shifts) // 2, tile // 2) for side, tile in sides)

    def tables(
        self, config: FluxConfig, text: int, size: Size, references: Sequence[Size] = ()
    ) -> tuple[mx.array, mx.array]:
        """Returns rope's tables for so many text tokens, a size of `sizes`, and references that follow."""
        return rope(sampler.position_ids(text, *size, references), config.axes_dim, config.theta)

    def parts(self, latents: mx.array, step: int) -> list[tuple[mx.array, Size]]:
        """Returns what is seen at a step of packed latents (1, L, 64): packed parts with their sizes in latents."""
        wide, high = self._grid(step)
        if self._is_aside(step):
            x = unpack(latents, self.width, self.height)
            latents = pack(mx.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], mode="edge"))
        if self.tile is None:
            return [(latents, (wide, high))]
        grid = latents.reshape(1, high // 2, wide // 2, -1)
        return [
            (grid[:, top : top + rows, left : left + columns].reshape(1, rows * columns, -1), self.tile)
            for top, left, rows, columns, _ in self._places(step)
        ]

    def joined(self, velocities: Sequence[mx.array], step: int) -> mx.array:
        """Returns the velocity (1, L, 64) of all latents from those of `parts`."""
        wide, high = self._grid(step)
        v = velocities[0]
        if self.tile is not None:
            grid = mx.zeros((1, high // 2, wide // 2, v.shape[-1]))
            for (top, left, rows, columns, weights), part in zip(self._places(step), velocities, strict=True):
                place = slice(None), slice(top, top + rows), slice(left, left + columns)
                grid[place] = grid[place] + part.astype(mx.float32).reshape(1, rows, columns, -1) * mx.array(weights)
            v = grid.reshape(1, -1, v.shape[-1])
        if self._is_aside(step):
            v = pack(unpack(v, wide, high)[:, :, 1:-1, 1:-1])
        return v

    def _is_aside(self, step: int) -> bool:
        return self.shifts and step % 2 == 1

    def _grid(self, step: int) -> Size:
        """Returns width and height of the latents that the patches of a step cover."""
        more = 2 * self._is_aside(step)
        return self.width + more, self.height + more

    def _places(self, step: int) -> list[tuple[int, int, int, int, np.ndarray]]:
        """Returns top, left, rows and columns of each tile, in tokens, and its weights (rows, columns, 1)."""
        assert self.tile is not None
        wide, high = self._grid(step)
        down, across = Tiling.along(high // 2, self.tile[1] // 2), Tiling.along(wide // 2, self.tile[0] // 2)
        return [
            (top, left, down.side, across.side, np.outer(a, b)[:, :, None])
            for top, a in zip(down.starts, down.weights, strict=True)
            for left, b in zip(across.starts, across.weights, strict=True)
        ]


def second_view(whole: View, own: Size, factor: float, *, tiled: bool) -> View:
    """Returns how a second pass is seen.

    Args:
        whole: the latents, seen whole.
        own: width and height, in latents, that the model draws at once.
        factor: by which the picture was enlarged.
        tiled: in tiles of that size.
    """
    return View(whole.width, whole.height, own if tiled else None, RECIPE.shifts, factor, RECIPE)


def second_views(size: Size, own: Size, factor: float, downsampling: int) -> tuple[View, View]:
    """Returns how a second pass is seen whole, and in tiles.

    Args:
        size: of the finished picture, pixels.
        own: that the model draws at once, pixels.
        factor: by which the picture was enlarged.
        downsampling: pixels of a latent.
    """
    (wide, high), tile = ((side[0] // downsampling, side[1] // downsampling) for side in (size, own))
    whole = View(wide, high)
    return second_view(whole, tile, factor, tiled=False), second_view(whole, tile, factor, tiled=True)


def second_seed(seed: int) -> int:
    """Returns the seed of the second pass's noise: another stream, which follows from the one of the first."""
    return int.from_bytes(hashlib.sha256(f"second pass of {seed}".encode()).digest()[:4], "little")
