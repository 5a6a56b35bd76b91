"""A picture too large for the autoencoder's strips, in tiles that overlap and fade into each other.

Strips (vae.py) compute what the whole picture does, but some arrays must be there as a whole: 1 KiB a pixel in 16 bits,
where drawing takes 0.4 KiB and what does not depend on the size. So a Mac of 8 GB could draw 7 megapixels and develop
4. Tiles need these arrays of one tile only. Each has group statistics and an attention of its own, and so the
picture is slightly another: the plan takes them only where strips do not fit (`Plan.tiled`), and the picture's
record says so.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

SIDE = 128  # latent positions of a tile, a megapixel; neighbours share a quarter of a side or more


def decode(vae, z: mx.array, run: Callable) -> mx.array:
    """`vae.decode` in tiles; arguments and result are the same, in float32."""
    return in_tiles(vae.decode, z, 1, vae.config.downsampling, run)


def encode(vae, x: mx.array, run: Callable) -> tuple[mx.array, mx.array]:
    """`vae.encode` in tiles; arguments and result are the same, in float32."""

    def moments(tile: mx.array, run: Callable) -> mx.array:
        return mx.concatenate(vae.encode(tile, run), axis=-1)

    return tuple(mx.split(in_tiles(moments, x, vae.config.downsampling, 1, run), 2, axis=-1))


def in_tiles(function: Callable, x: mx.array, unit: int, unit_out: int, run: Callable) -> mx.array:
    """What a function of pictures gives, put together from tiles.

    Args:
        function: called as function(tile, run); gives (B, rows, columns, C).
        x: (B, H, W, C), a picture or its latents.
        unit: rows and columns of x for each latent position.
        unit_out: the same of the result.
        run: evaluates a piece, run(piece, *args).

    Returns:
        (B, H / unit * unit_out, W / unit * unit_out, C) float32.
    """
    height, width = (side // unit for side in x.shape[1:3])
    out = None
    for top, down in fades(height, unit_out):
        for left, across in fades(width, unit_out):
            rows, columns = len(down) // unit_out, len(across) // unit_out
            part = x[:, top * unit : (top + rows) * unit, left * unit : (left + columns) * unit]
            weights = mx.array(np.outer(down, across)[:, :, None])
            size, place = (height * unit_out, width * unit_out), (top * unit_out, left * unit_out)
            out = run(_add, out, function(part, run), weights, size, place)
    return out


def fades(length: int, unit: int) -> list[tuple[int, np.ndarray]]:
    """Where tiles begin on a side of so many latent positions, and how much each counts where; together always one.

    Returns:
        The first latent position, and float32 weights, `unit` for each position, of each tile.
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


def _add(out: mx.array | None, tile: mx.array, weights: mx.array, size: tuple, place: tuple) -> mx.array:
    if out is None:
        out = mx.zeros((tile.shape[0], *size, tile.shape[3]))
    rows, columns = (slice(first, first + n) for first, n in zip(place, tile.shape[1:3], strict=True))
    out[:, rows, columns] = out[:, rows, columns] + tile.astype(mx.float32) * weights
    return out
