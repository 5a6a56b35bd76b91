"""Edge maps: Canny's detector (Canny 1986), pixel for pixel as OpenCV's `cv2.Canny(image, low, high)`.

    edges = canny(pixels, 50, 200)                              arrays
    control_image = CannyDetector()(image, 50, 200, 1024, 1024)  controlnet_aux's class, for the cards' snippets

Written after OpenCV's description and imgproc/src/canny.cpp: Sobel 3 x 3 with repeated borders, L1 magnitude, of a
colour picture the channel with the largest magnitude at each pixel, four sectors, hysteresis over eight neighbours.
"""

from typing import Any

import numpy as np
from PIL import Image

from ..errors import UsageError
from .image import open_image
from .resample import resize

LOW, HIGH = 50.0, 200.0  # thresholds of FLUX.1 Canny [dev] (black-forest-labs/flux, image_embedders.py)
_TAN_22 = 13573  # tan(22.5 degrees) in 15 bits: between the horizontal sector and the diagonal ones
_BITS = 15
_STEP = 64  # pixels; controlnet_aux makes both sides multiples of it
_MOST = 2**26  # pixels of a map


class CannyDetector:
    """Makes edge maps of photos, as `controlnet_aux.CannyDetector` does."""

    def __call__(
        self,
        input_image: Any = None,
        low_threshold: float = 100,
        high_threshold: float = 200,
        detect_resolution: int = 512,
        image_resolution: int = 512,
        output_type: str | None = None,
    ) -> Any:
        """Returns the edge map of a photo, white on black.

        Args:
            input_image: any image that `open_image` takes.
            low_threshold: magnitude of an edge that continues a stronger one.
            high_threshold: magnitude of an edge that counts alone.
            detect_resolution: length in pixels of the shorter side on which edges are searched; both sides are rounded
                to multiples of 64.
            image_resolution: the same of the map.
            output_type: "pil" or "np"; None: an array for an array, else a PIL image.

        Returns:
            A PIL image in mode RGB, or an array (H, W, 3) uint8.

        Raises:
            UsageError: no image, or an argument out of its range, or a map of more than 67 million pixels.
        """
        if output_type not in (None, "pil", "np"):
            raise UsageError(f"`output_type` is {output_type!r}", '"pil" or "np"')
        image = open_image(input_image, "input_image")
        if image is None:
            raise UsageError("no `input_image` was given", "the photo to find edges in")
        # both sizes from the given one, as controlnet_aux computes them: the second from the first
        size = _size(image.size, detect_resolution, "detect_resolution")
        last = _size(size, image_resolution, "image_resolution")
        method = "lanczos" if _is_larger(image.size, detect_resolution) else "area"
        pixels = resize(np.asarray(image), size, method)
        edges = resize(canny(pixels, low_threshold, high_threshold)[..., None], last, "linear")
        rgb = np.repeat(edges, 3, axis=-1)
        as_array = output_type == "np" or (output_type is None and isinstance(input_image, np.ndarray))
        return rgb if as_array else Image.fromarray(rgb)


def edge_map(image: Image.Image) -> Image.Image:
    """Returns the edge map of a photo in its own size, with the thresholds of FLUX.1 Canny [dev], in mode RGB."""
    return Image.fromarray(canny(np.asarray(image.convert("RGB")), LOW, HIGH)).convert("RGB")


def canny(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Finds edges.

    Args:
        pixels: (H, W) or (H, W, C) uint8.
        low: L1 magnitude of an edge that continues a stronger one.
        high: magnitude of an edge that counts alone. If `low` is larger, they change places.

    Returns:
        (H, W) uint8: 255 on edges, 0 elsewhere; equal to OpenCV's.

    Raises:
        UsageError: a threshold is no number.
    """
    for name, value in (("low_threshold", low), ("high_threshold", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise UsageError(f"`{name}` is {value!r}", "a number from 0 to 2040")
    low, high = sorted((int(np.floor(low)), int(np.floor(high))))
    dx, dy, magnitude = _gradients(pixels)
    edges = _thinned(dx, dy, magnitude, low)
    return _connected(edges, magnitude > high).astype(np.uint8) * 255


def _gradients(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns Sobel's dx, dy and |dx| + |dy|, (H, W) each: of the first channel with the largest magnitude."""
    best: list[np.ndarray] = []
    for channel in np.moveaxis(np.atleast_3d(pixels), -1, 0):
        padded = np.pad(channel.astype(np.int32), 1, "edge")
        smooth = padded[:-2] + 2 * padded[1:-1] + padded[2:]  # over rows
        dx = smooth[:, 2:] - smooth[:, :-2]
        step = padded[2:] - padded[:-2]
        dy = step[:, :-2] + 2 * step[:, 1:-1] + step[:, 2:]
        magnitude = np.abs(dx) + np.abs(dy)
        if best:
            larger = magnitude > best[2]
            for old, new in zip(best, (dx, dy, magnitude), strict=True):
                np.copyto(old, new, where=larger)
        else:
            best = [dx, dy, magnitude]
    return best[0], best[1], best[2]


def _thinned(dx: np.ndarray, dy: np.ndarray, magnitude: np.ndarray, low: int) -> np.ndarray:
    """Returns (H, W) bool: pixels above `low` that are maxima across their edge. Outside the picture there is none.

    Of two equal neighbours in a row or column the first is the edge, on a diagonal neither is.
    """
    rows, columns = np.nonzero(magnitude > low)
    width = magnitude.shape[1] + 2
    flat = np.pad(magnitude, 1).ravel()
    at = (rows + 1) * width + columns + 1
    x, y = dx[rows, columns].astype(np.int64), dy[rows, columns].astype(np.int64)
    tan_22 = np.abs(x) * _TAN_22
    tan_67 = tan_22 + (np.abs(x) << (_BITS + 1))
    steep = np.abs(y) << _BITS
    level, upright = steep < tan_22, steep > tan_67
    diagonal = width + np.where((x ^ y) < 0, -1, 1)
    across = np.where(level, 1, np.where(upright, width, diagonal))
    here, before, after = flat[at], flat[at - across], flat[at + across]
    is_edge = (here > before) & ((here > after) | ((here == after) & (level | upright)))
    edges = np.zeros(magnitude.shape, bool)
    edges[rows[is_edge], columns[is_edge]] = True
    return edges


def _connected(edges: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """Returns (H, W) bool: the edges that are connected with a strong one over eight neighbours.

    Labels of components come from hooking each root to the smallest label beside it, and shortening the paths
    (Shiloach and Vishkin 1982): few passes over arrays, however long an edge winds.
    """
    height, width = edges.shape
    numbers = np.full((height + 1, width + 2), -1, np.int64)  # a border to the right, left and below
    count = int(edges.sum())
    numbers[:height, 1:-1][edges] = np.arange(count)
    here = numbers[:height, 1:-1]
    pairs = []
    for beside in (here[:, 1:], numbers[1:, 1:-1], numbers[1:, :-2], numbers[1:, 2:]):
        start = here[:, : beside.shape[1]]
        both = (start >= 0) & (beside >= 0)
        pairs.append(np.stack([start[both], beside[both]]))
    a, b = np.concatenate(pairs, axis=1)
    label = np.arange(count)
    while len(a):
        low, high = np.minimum(a, b), np.maximum(a, b)
        order = np.argsort(-low, kind="stable")  # of several values for one place, the last one stays
        label[high[order]] = low[order]
        while not np.array_equal(shorter := label[label], label):
            label = shorter
        a, b = label[a], label[b]
        a, b = a[a != b], b[a != b]
    is_strong = np.zeros(count, bool)
    is_strong[label[strong[edges]]] = True
    kept = np.zeros(edges.shape, bool)
    kept[edges] = is_strong[label]
    return kept


def _size(size: tuple[int, int], resolution: int, name: str) -> tuple[int, int]:
    """Returns (width, height) with the shorter side at a resolution, both multiples of 64 (controlnet_aux/util.py)."""
    if type(resolution) is not int or not _STEP // 2 < resolution <= 2**14:
        raise UsageError(f"`{name}` is {resolution!r}", f"a number of pixels from {_STEP // 2 + 1} to {2**14}")
    scale = resolution / min(size)
    width, height = (int(np.round(side * scale / _STEP)) * _STEP for side in size)
    if width * height > _MOST:
        todo = f"crop the image, or take a smaller `{name}`"
        raise UsageError(
            f"the map of {size[0]} x {size[1]} would be {width} x {height}", f"{_MOST} pixels at most", todo
        )
    return width, height


def _is_larger(size: tuple[int, int], resolution: int) -> bool:
    return resolution > min(size)
