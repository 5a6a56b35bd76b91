"""Unpacks nunchaku's layers, whose numbers lie in the order of a graphics card's registers. Arrays only.

Weights of 4 bits stand in tiles of 128 rows and 64 columns, vectors and scales in tiles of 128, factors of low rank in
tiles of 16 x 16. The decoders of `decode.TYPES` give float32 in the usual order.

Sources: the layout of nunchaku's packer, as unpacked beside it; SVDQuant (Li et al. 2024), section 4.
"""

import mlx.core as mx
import numpy as np

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SHIFT = 0.171875  # added to the int4 inputs of layers after GELU, to make them positive


def codes(data: np.ndarray, rows: int, width: int) -> mx.array:
    """Returns 4-bit codes as uint32, (rows, width): words of 8, the first in the lowest bits."""
    words = mx.array(data.view(np.uint32)).reshape(rows // 128, width // 64, 8, 8, 4, 2, 2)
    eight = (words[..., None] >> mx.arange(0, 32, 4, dtype=mx.uint32)) & 15
    return eight.transpose(0, 2, 5, 3, 1, 6, 4, 7).reshape(rows, width)


def vectors(values: mx.array, groups: int = 1) -> mx.array:
    """Returns biases, factors of inputs or outputs, or scales of groups of 64: float32, (length, groups)."""
    tiles = values.astype(mx.float32).reshape(-1, groups, 8, 4, 2, 2)
    return tiles.transpose(0, 2, 4, 3, 5, 1).reshape(-1, groups)


def in_small_tiles(values: mx.array, groups: int) -> mx.array:
    """Returns scales of groups of 16 as they are stored, in e4m3: bytes, (rows, groups)."""
    tiles = values.reshape(-1, groups // 4, 8, 4, 4, 4)
    return tiles.transpose(0, 4, 3, 2, 1, 5).reshape(-1, groups)


def low_rank(values: mx.array, is_down: bool) -> mx.array:
    """Returns a factor (rank, inputs) or (outputs, rank) from its tiles, stored as (inputs or outputs, rank)."""
    length, rank = values.shape
    tiles = values.astype(mx.float32).reshape(length // 16, rank // 16, 8, 4, 2, 2, 2).transpose(0, 1, 4, 2, 5, 3, 6)
    tiles = tiles.reshape(length // 16, rank // 16, 16, 16)
    return (
        tiles.transpose(1, 2, 0, 3).reshape(rank, length)
        if is_down
        else tiles.transpose(0, 2, 1, 3).reshape(length, rank)
    )


def product(factors: tuple[mx.array, ...], rows: int) -> mx.array:
    """Returns a factor for each output, (rows,): the product of those of each and of one of all."""
    whole = mx.ones((rows,))
    for factor in factors:
        whole = whole * (vectors(factor).reshape(-1) if factor.size > 1 else factor.astype(mx.float32).reshape(()))
    return whole


def _quantized(
    kind: str, data: np.ndarray, shape: tuple[int, ...], scales: mx.array, smooth: mx.array, factors: tuple
) -> mx.array:
    """Returns the quantized part of a weight, for inputs that are not yet divided by `smooth`."""
    rows, width = shape
    four = codes(data, rows, width)
    if kind == "int4":
        groups = width // 64
        values = (four ^ 8).astype(mx.float32) - 8
        scale = vectors(scales, groups)
    else:
        groups = width // 16
        values = mx.array(_E2M1 + tuple(-v for v in _E2M1))[four]
        scale = mx.from_fp8(in_small_tiles(scales, groups), mx.float32)
    scale = scale * product(factors, rows)[:, None]
    whole = (values.reshape(rows, groups, -1) * scale[..., None]).reshape(rows, width)
    return whole / vectors(smooth).reshape(-1)


def weight(kind: str):
    """Returns the decoder of a whole weight, its low-rank branch included."""

    def decode(data, shape, scales, smooth, down, up, *factors) -> mx.array:
        branch = low_rank(up, is_down=False) @ low_rank(down, is_down=True) if down.size else 0
        return _quantized(kind, data, shape, scales, smooth, factors) + branch

    return decode


def shift(data, shape, scales, smooth, *factors) -> mx.array:
    """Decodes the amount that nunchaku took off a bias for the shift of the layer's int4 inputs."""
    return _SHIFT * _quantized("int4", data, shape, scales, smooth, factors).sum(axis=1)


def bias(values: mx.array, taken: mx.array | None = None) -> mx.array:
    """Returns a bias, with what was taken off it."""
    whole = vectors(values).reshape(-1)
    return whole if taken is None else whole + taken


def modulation_codes(
    data: np.ndarray, shape: tuple[int, ...], scales: mx.array, zeros: mx.array, parts: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns codes of 0 to 15 as uint32, (rows, width), and scales and zeros, (rows, groups): a code c is c s + z."""
    rows, width = shape
    words = mx.array(data.view(np.uint16)).reshape(rows // 4, width // 64, 4, 16)
    words = words.transpose(0, 2, 1, 3).reshape(-1, 1, 8).astype(mx.uint32)
    four = (words >> mx.arange(0, 16, 4, dtype=mx.uint32).reshape(1, 4, 1)) & 15
    return _by_parts(four.reshape(rows, width), parts), _by_parts(scales.T, parts), _by_parts(zeros.T, parts)


def modulation(parts: int):
    """Returns the decoder of a layer of modulation (AWQ)."""

    def decode(data: np.ndarray, shape: tuple[int, ...], scales: mx.array, zeros: mx.array) -> mx.array:
        four, scale, zero = modulation_codes(data, shape, scales, zeros, parts)
        scale, zero = (each.astype(mx.float32)[..., None] for each in (scale, zero))
        return (four.astype(mx.float32).reshape(shape[0], -1, 64) * scale + zero).reshape(shape)

    return decode


def modulation_bias(values: mx.array, parts: int) -> mx.array:
    """Returns a bias of modulation; the file's has 1 added to each scale, the second part of three."""
    whole = _by_parts(values.astype(mx.float32), parts).reshape(parts // 3, 3, -1)
    return (whole - mx.array([0.0, 1.0, 0.0]).reshape(1, 3, 1)).reshape(-1)


def _by_parts(rows: mx.array, parts: int) -> mx.array:
    """Returns rows in the order of shift, scale and gate; in the file they alternate from channel to channel."""
    return rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)
