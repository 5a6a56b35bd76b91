"""Decodes and encodes large pictures in tiles that overlap and fade into each other.

Strips (vae.py) give the same numbers as the whole picture, but some arrays must be in memory whole: 1 KiB a pixel in 16
bits, where denoising takes 0.4 KiB and a fixed amount. With strips alone a Mac of 8 GB could denoise 7 megapixels and
decode 4. With tiles these arrays are as large as one tile. Each tile has its own group statistics and attention, so
the picture differs slightly. The plan uses tiles only if strips do not fit (`Plan.tiled`), and the picture's record
says so.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from . import Runner

SIDE = 128  # latent positions of a tile, a megapixel; neighbours share a quarter of a side or more


def decode(vae, z: mx.array, run: Runner) -> mx.array:
    """Decodes in tiles: arguments and result are those of `vae.decode`, in float32."""
    return in_tiles(vae.decode, z, unit=1, unit_out=vae.config.downsampling, run=run)


def encode(vae, x: mx.array, run: Runner) -> tuple[mx.array, mx.array]:
    """Encodes in tiles: arguments and result are those of `vae.encode`, in float32."""

    def moments(tile: mx.array, run: Runner) -> mx.array:
        return mx.concatenate(vae.encode(tile, run), axis=-1)

    mean, logvar = mx.split(in_tiles(moments, x, unit=vae.config.downsampling, unit_out=1, run=run), 2, axis=-1)
    return mean, logvar


def in_tiles(
    function: Callable[[mx.array, Runner], mx.array], x: mx.array, *, unit: int, unit_out: int, run: Runner
) -> mx.array:
    """Applies a function of pictures tile by tile.

    Args:
        function: called as function(tile, run); returns (B, rows, columns, C).
        x: (B, H, W, C), a picture or its latents.
        unit: rows and columns of x for each latent position.
        unit_out: rows and columns of the result for each latent position.
        run: evaluates a stage, run(stage, *args).

    Returns:
        (B, H / unit * unit_out, W / unit * unit_out, C) float32.
    """
    height, width = (side // unit for side in x.shape[1:3])
    shape = height * unit_out, width * unit_out
    out = mx.zeros(0)  # the first tile, at (0, 0), makes it
    for top, down in fades(height, unit_out):
        for left, across in fades(width, unit_out):
            rows, columns = len(down) // unit_out, len(across) // unit_out
            part = x[:, top * unit : (top + rows) * unit, left * unit : (left + columns) * unit]
            weights = mx.array(np.outer(down, across)[:, :, None])
            out = run(_add, out, function(part, run), weights, shape, (top * unit_out, left * unit_out))
    return out


def fades(length: int, unit: int) -> list[tuple[int, np.ndarray]]:
    """Places tiles along a side, with weights that add up to one everywhere.

    Args:
        length: latent positions of the side.
        unit: weights for each position.

    Returns:
        For each tile its first latent position and its float32 weights.
    """
    side, shared = min(SIDE, length), SIDE // 4
    count = 1 if side == length else -(-(length - shared) // (side - shared))
    starts = [i * (length - side) // max(count - 1, 1) for i in range(count)]
    ramp = np.minimum((np.arange(side * unit) + 0.5) / (shared * unit), 1)
    weights = [(ramp if i else 1) * (ramp[::-1] if i < count - 1 else 1) * np.ones(side * unit) for i in range(count)]
    total = np.zeros(length * unit)
    for start, weight in zip(starts, weights, strict=True):
        total[start * unit : (start + side) * unit] += weight
    return [
        (start, (weight / total[start * unit : (start + side) * unit]).astype(np.float32))
        for start, weight in zip(starts, weights, strict=True)
    ]


def _add(out: mx.array, tile: mx.array, weights: mx.array, shape: tuple[int, int], place: tuple[int, int]) -> mx.array:
    """Adds a weighted tile to the result; the first tile makes the array."""
    if place == (0, 0):
        out = mx.zeros((tile.shape[0], *shape, tile.shape[3]))
    rows, columns = (slice(first, first + n) for first, n in zip(place, tile.shape[1:3], strict=True))
    out[:, rows, columns] = out[:, rows, columns] + tile.astype(mx.float32) * weights
    return out
