"""The invisible watermark of black-forest-labs/flux: 46 bits in the chroma of a picture, as `invisible-watermark` does.

The method is called dwtDct there, though no DCT takes part. U of YUV is transformed by one level of Haar wavelets; its
low band is cut into blocks of 4 x 4 values, 8 x 8 pixels, row by row; of each block the largest value but the first
holds one bit: its size is moved to a quarter or to three quarters of a step of 36. The message repeats over the blocks.

It is a hint, not a proof: anybody can add it, and a small or strongly compressed copy loses it.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

LEAST_PIXELS = 65536  # of a picture that takes it, in `invisible-watermark`
# flux/util.py writes 48 digits; the two zeros at their start are not embedded.
MESSAGE = np.array([int(bit) for bit in f"{0b001010101111111010000111100111001111010100101110:b}"], np.uint8)
_STEP = np.float32(36)  # of the size of a value
_BLOCK = 4  # values of the low band, by as many
_STRIP = 256  # rows of pixels that are marked or read at a time; whole blocks
_ENOUGH = 38  # bits; as many are right by chance in one of 100,000 pictures
_HALF = np.float32(0.5)  # OpenCV's middle of U and V in floats
_ROOT = np.float32(0.70710678118654752440)  # of a half: the filter of Haar wavelets


@dataclass(frozen=True)
class FoundWatermark:
    """The message as it is read from a picture: how many of its bits are right, of how many."""

    right: int
    of: int = len(MESSAGE)

    @property
    def is_there(self) -> bool:
        """True where that is no chance."""
        return self.right >= _ENOUGH


def check_size(width: int, height: int) -> None:
    """Checks that a picture is large enough for the watermark.

    Raises:
        UsageError: it is not.
    """
    if width * height < LEAST_PIXELS:
        found = f"`watermark`, and the picture is {width} x {height}"
        raise UsageError(found, f"{LEAST_PIXELS} pixels or more, such as 256 x 256", "leave it out")


def embed(pixels: np.ndarray) -> np.ndarray:
    """Returns (H, W, 3) uint8 RGB pixels with the watermark; rounded, where flux/util.py truncates.

    Raises:
        UsageError: the picture is too small.
    """
    height, width = pixels.shape[:2]
    check_size(width, height)
    return np.concatenate([_marked(pixels[top : top + _STRIP], top) for top in range(0, height, _STRIP)])


def read(pixels: np.ndarray) -> FoundWatermark | None:
    """Looks for the watermark in (H, W, 3) uint8 RGB pixels; None: they are too few."""
    height, width = pixels.shape[:2]
    if height * width < LEAST_PIXELS:
        return None
    ones, count = np.zeros((2, len(MESSAGE))), np.zeros(len(MESSAGE))
    for top in range(0, height, _STRIP):
        blocks = _blocks(_haar(_whole(_to_yuv(pixels[top : top + _STRIP])[1]))[0])
        places = _places(top, width, len(blocks))
        count += np.bincount(places, minlength=len(MESSAGE))
        for way, at in enumerate((_largest(blocks), _oddest(blocks))):
            votes = np.abs(np.take_along_axis(blocks, at, 1)[:, 0]) % _STEP > _STEP / 2
            ones[way] += np.bincount(places, votes, len(MESSAGE))
    bits = ones / np.maximum(count, 1) * 255 > 127
    return FoundWatermark(int((bits == MESSAGE).sum(1).max()))


def _marked(pixels: np.ndarray, top: int) -> np.ndarray:
    """Returns a strip of a picture, from its row `top` on, with the watermark."""
    y, u, v = _to_yuv(pixels)
    inner = _whole(u)
    low, horizontal, vertical, diagonal = _haar(inner)
    blocks = _blocks(low)
    at = _largest(blocks)
    values = np.take_along_axis(blocks, at, 1)
    bits = MESSAGE[_places(top, pixels.shape[1], len(blocks)), None].astype(np.float32)
    moved = (np.abs(values) // _STEP + np.float32(0.25) + _HALF * bits) * _STEP
    np.put_along_axis(blocks, at, np.where(values < 0, -moved, moved), 1)
    _put_blocks(low, blocks)
    # the public implementation exchanges the two detail bands on the way back, which costs some 10 dB; so do we
    inner[:] = _joined(_joined(low, horizontal, 1), _joined(vertical, diagonal, 1), 0)
    return np.clip(np.rint(_to_rgb(y, u, v)), 0, 255).astype(np.uint8)


def _whole(u: np.ndarray) -> np.ndarray:
    """Returns the part of a plane that is transformed: sides are multiples of 4."""
    return u[: u.shape[0] // 4 * 4, : u.shape[1] // 4 * 4]


def _places(top: int, width: int, count: int) -> np.ndarray:
    """Returns for each block of a strip the place of its bit in the message."""
    before = top // (2 * _BLOCK) * (width // 4 * 2 // _BLOCK)
    return (before + np.arange(count)) % len(MESSAGE)


def _fused(a: np.ndarray, b: float, c: np.ndarray | np.float32) -> np.ndarray:
    """Returns a * b + c, rounded once to float32, as a processor does whose vectors OpenCV uses."""
    return (a.astype(np.float64) * np.float64(np.float32(b)) + c).astype(np.float32)


def _to_yuv(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns Y, U and V, float32, by the coefficients of OpenCV."""
    r, g, b = (pixels[..., i].astype(np.float32) for i in range(3))
    y = _fused(b, 0.114, _fused(g, 0.587, r * np.float32(0.299)))
    return y, _fused(b - y, 0.492, _HALF), _fused(r - y, 0.877, _HALF)


def _to_rgb(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns (H, W, 3) float32 RGB."""
    u, v = u - _HALF, v - _HALF
    return np.stack([_fused(v, 1.140, y), _fused(v, -0.581, _fused(u, -0.395, y)), _fused(u, 2.032, y)], -1)


def _haar(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the low band and the horizontal, vertical and diagonal details of one level, each (H/2, W/2)."""
    (low, vertical), (horizontal, diagonal) = (_split(half, 1) for half in _split(x, 0))
    return low, horizontal, vertical, diagonal


def _split(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the low and the high half of an axis."""
    even, odd = (x[::2], x[1::2]) if axis == 0 else (x[:, ::2], x[:, 1::2])
    return _ROOT * odd + _ROOT * even, _ROOT * even - _ROOT * odd


def _joined(low: np.ndarray, high: np.ndarray, axis: int) -> np.ndarray:
    """Returns the axis of which these are the halves."""
    pair = np.stack([_ROOT * low + _ROOT * high, _ROOT * low - _ROOT * high], axis + 1)
    return pair.reshape([size * (2 if i == axis else 1) for i, size in enumerate(low.shape)])


def _blocks(low: np.ndarray) -> np.ndarray:
    """Returns the whole blocks of a band as rows, (N, 16); what is left at the edges has none."""
    rows, columns = low.shape[0] // _BLOCK, low.shape[1] // _BLOCK
    cut = low[: rows * _BLOCK, : columns * _BLOCK].reshape(rows, _BLOCK, columns, _BLOCK)
    return cut.transpose(0, 2, 1, 3).reshape(-1, _BLOCK * _BLOCK)


def _put_blocks(low: np.ndarray, blocks: np.ndarray) -> None:
    """Puts rows of `_blocks` back into their band."""
    rows, columns = low.shape[0] // _BLOCK, low.shape[1] // _BLOCK
    back = blocks.reshape(rows, columns, _BLOCK, _BLOCK).transpose(0, 2, 1, 3)
    low[: rows * _BLOCK, : columns * _BLOCK] = back.reshape(rows * _BLOCK, columns * _BLOCK)


def _largest(blocks: np.ndarray) -> np.ndarray:
    """Returns the place (N, 1) of the largest value of each block, the first one apart."""
    return np.argmax(np.abs(blocks[:, 1:]), 1)[:, None] + 1


def _oddest(blocks: np.ndarray) -> np.ndarray:
    """Returns the place (N, 1) of the value that differs most from the others of its block, the first one apart.

    On a surface of one colour this is the marked one, also where it was made smaller and is no longer the largest.
    """
    rest = blocks[:, 1:]
    return np.argmax(np.abs(rest - np.median(rest, 1, keepdims=True)), 1)[:, None] + 1
