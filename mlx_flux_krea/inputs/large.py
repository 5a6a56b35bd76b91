"""A picture that is enlarged in a second pass: its sizes, and what does not go together with it."""

import math
from dataclasses import dataclass
from typing import Any

from .. import presets
from ..errors import UsageError

Size = tuple[int, int]  # width and height


@dataclass(frozen=True)
class Large:
    """The second pass of a picture.

    Attributes:
        factor: by which the first pass's picture, or the image, is enlarged.
        width: of the finished picture, pixels.
        height: of the finished picture, pixels.
        own: width and height that the model draws at once: those of the first pass, or of the image's shape at the
            model's own area; tiles have this size.
        tiles: True where the transformer sees tiles of that size, False: the whole; None: as the plan finds.
        has_first: False where an image is enlarged: there is no pass before.
    """

    factor: float
    width: int
    height: int
    own: Size
    tiles: bool | None = None
    has_first: bool = True

    @property
    def size(self) -> Size:
        """Width and height of the finished picture."""
        return self.width, self.height


def takes_second_pass(given: Any, task: str) -> bool:
    """Checks the arguments of a call that is enlarged, and returns True where there is a second pass.

    Args:
        given: the Request.
        task: of the model.

    Raises:
        UsageError: a factor out of range, or arguments that do not go together with it.
    """
    factor = given.upscale
    if factor is None:
        return False
    if type(factor) not in (int, float) or not 1 <= factor <= presets.MOST_ENLARGED:
        raise UsageError(
            f"`upscale` is {factor!r}", f"a number from 1 to {presets.MOST_ENLARGED:g}, such as 1.5, 2 or 4"
        )
    if factor == 1:
        return False
    todo = "make the picture first, then enlarge it: `image` and `upscale`"
    if task != presets.TASKS[0]:
        raise UsageError(f"`upscale` with a model for {task}", "a model for text to image", todo)
    for name in ("mask_image", "expand", "control_image", "latents"):
        if getattr(given, name) is not None:
            raise UsageError(f"`upscale` and `{name}` are both given", "one of them", todo)
    if given.image is not None and (given.width or given.height):
        found = (
            "`width` and `height` do nothing with an image that is enlarged: its size is the image's, times `upscale`"
        )
        raise UsageError(found, "", "leave them out")
    if given.image is not None and given.stop_after is not None:
        found = "an image is enlarged in one pass, and there is nothing to choose from early"
        raise UsageError(found, "", "leave out `stop_after`, or `candidates`")
    return True


def enlarged(size: Size, factor: float, multiple: int) -> Size:
    """Returns a size times a factor, each side at the nearest multiple.

    Raises:
        UsageError: more pixels than a picture may have.
    """
    width, height = (max(multiple, round(side * factor / multiple) * multiple) for side in size)
    most = presets.MEGAPIXELS[1] * presets.MEGAPIXEL
    if width * height > most:
        found = f"{size[0]} x {size[1]} enlarged {factor:g} times is {width} x {height}"
        raise UsageError(found, f"{most / 1e6:.1f} million pixels at most", "a smaller `upscale`")
    return width, height


def make_large(given: Any, first: Size | None, target: Size, own: Size, multiple: int) -> Large:
    """Returns the second pass of a request.

    Args:
        given: the Request.
        first: size of the first pass; None: an image is enlarged.
        target: size of the finished picture.
        own: the model's own size.
        multiple: of each side.
    """
    has_first = first is not None
    if first is None:
        scale = min(1.0, math.sqrt(own[0] * own[1] / (target[0] * target[1])))
        wide, high = (max(multiple, round(side * scale / multiple) * multiple) for side in target)
        first = min(wide, target[0]), min(high, target[1])
    return Large(float(given.upscale), *target, own=first, tiles=given.upscale_tiles, has_first=has_first)
