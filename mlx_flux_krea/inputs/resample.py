"""Resizes arrays as OpenCV does: by area, by Lanczos over eight pixels without a wider filter, or linearly.

Pillow's filters of the same names differ: they widen when they shrink. Used where a map must be that of a tool that
works with OpenCV.
"""

import numpy as np


def resize(pixels: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resizes a picture.

    Args:
        pixels: (H, W, C) uint8.
        size: width and height.
        method: "area", "lanczos" or "linear" (OpenCV's INTER_AREA, INTER_LANCZOS4, INTER_LINEAR).

    Returns:
        (height, width, C) uint8, within two levels of OpenCV's, whose weights are rounded to 11 bits.
    """
    width, height = size
    if pixels.shape[:2] == (height, width):
        return pixels
    if method == "area" and (width > pixels.shape[1] or height > pixels.shape[0]):
        method = "enlarged area"
    taps = {"area": _area, "enlarged area": _enlarged_area, "lanczos": _lanczos, "linear": _linear}[method]
    across = _apply(pixels.astype(np.float32), taps(pixels.shape[1], width), axis=1)
    down = _apply(across, taps(pixels.shape[0], height), axis=0)
    return np.clip(np.round(down), 0, 255).astype(np.uint8)


def _apply(pixels: np.ndarray, taps: tuple[np.ndarray, np.ndarray], axis: int) -> np.ndarray:
    """Returns weighted sums along an axis; taps are places and weights, (new length, number of taps) each."""
    places, weights = taps
    shape = [1] * pixels.ndim
    shape[axis] = -1
    total = np.zeros(())
    for place, weight in zip(places.T, weights.T, strict=True):
        total = total + np.take(pixels, place, axis) * weight.astype(np.float32).reshape(shape)
    return total


def _centres(old: int, new: int) -> np.ndarray:
    return (np.arange(new) + 0.5) * (old / new) - 0.5


def _linear(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    centres = _centres(old, new)
    first = np.floor(centres).astype(int)
    part = centres - first
    return np.clip(np.stack([first, first + 1], 1), 0, old - 1), np.stack([1 - part, part], 1)


def _lanczos(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the eight nearest pixels and their Lanczos weights (a = 4), which add up to 1."""
    centres = _centres(old, new)
    first = np.floor(centres).astype(int)
    places = first[:, None] + np.arange(-3, 5)
    distance = centres[:, None] - places
    weights = np.sinc(distance) * np.sinc(distance / 4) * (np.abs(distance) < 4)
    return np.clip(places, 0, old - 1), weights / weights.sum(1, keepdims=True)


def _area(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels that a new, larger one covers, and the share of each."""
    scale = old / new
    start = np.arange(new) * scale
    places = np.floor(start).astype(int)[:, None] + np.arange(int(np.ceil(scale)) + 1)
    covered = np.minimum(places + 1, (start + scale)[:, None]) - np.maximum(places, start[:, None])
    covered = np.clip(covered, 0, None) * (places < old)
    return np.clip(places, 0, old - 1), covered / covered.sum(1, keepdims=True)


def _enlarged_area(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two pixels and their weights: OpenCV's form of INTER_AREA where either side grows."""
    scale = old / new
    first = np.floor(np.arange(new) * scale).astype(int)
    part = np.arange(new) + 1 - (first + 1) / scale
    part = np.where(part <= 0, 0, part - np.floor(part))
    return np.clip(np.stack([first, first + 1], 1), 0, old - 1), np.stack([1 - part, part], 1)
