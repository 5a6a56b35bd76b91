"""References of FLUX.1 Kontext: the sizes at which it reads them, and which picture sizes go with them.

Sizes are those of BFL's `PREFERED_KONTEXT_RESOLUTIONS` (src/flux/util.py) and of diffusers' FluxKontextPipeline, which
chooses among them by the nearest ratio of width to height.
"""

from ..errors import UsageError
from ..presets import KONTEXT_SIZES

LONGEST = 8  # times the shorter side: FLUX.1 has no size for longer images


def preferred_size(width: int, height: int) -> tuple[int, int]:
    """Returns the size of `KONTEXT_SIZES` whose shape is nearest to that of an image, the narrower of two.

    Raises:
        UsageError: the image is a strip.
    """
    if max(width, height) > LONGEST * min(width, height):
        expected = f"a shape up to {LONGEST}:1"
        raise UsageError(f"the image is {width} x {height}", expected, "cut it")
    return min(KONTEXT_SIZES, key=lambda size: (abs(width / height - size[0] / size[1]), size[0]))


def reference_size(width: int, height: int, multiple: int, *, auto_resize: bool) -> tuple[int, int]:
    """Returns the size at which the model reads a reference.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        multiple: of both sides.
        auto_resize: brings it to a preferred size; else its own size is rounded down.

    Raises:
        UsageError: the image is a strip, or smaller than one token.
    """
    if auto_resize:
        wanted = preferred_size(width, height)
        return wanted[0] // multiple * multiple, wanted[1] // multiple * multiple
    floored = width // multiple * multiple, height // multiple * multiple
    if not min(floored):
        raise UsageError(f"the reference is {width} x {height}", f"sides of {multiple} pixels at least")
    return floored
