"""The arguments of a call that are images, or about them: opened, and checked against each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .. import presets
from ..errors import UsageError, amount
from .canvas import open_mask
from .image import open_image

MOST_REFERENCES = 4


@dataclass(frozen=True, kw_only=True)
class ImageArguments:
    """The arguments of a call that are images, or about them. None means: the model's default, or not used."""

    image: Any = None  # a PIL image, a path, or an array (`open_image`); several references for Kontext
    strength: float | None = None  # share of the schedule that an input image goes through
    mask_image: Any = None  # as `image`; white is repainted
    expand: Any = None  # borders to add around the image: `canvas.parse_borders`
    padding_mask_crop: int | None = None  # generates the mask's surroundings alone, so many pixels around it
    soft_mask: bool = False  # values between black and white of the mask change the image by as much
    paste: bool = True  # the picture comes back into the image, whose pixels outside the mask stay as they are
    control_image: Any = None  # a map, such as edges or depth
    control: str | None = None  # `control_image` is a photo, of which this map is made: one of presets.KINDS
    fit: str | None = None  # how images of another shape are brought to a size: "stretch", "crop" or "pad"
    auto_resize: bool = True  # Kontext reads references at one of its preferred sizes, else at their own


def _open_references(image: Any, argument: str) -> Image.Image | tuple[Image.Image, ...] | None:
    """Opens one image, or each of several."""
    if not isinstance(image, list | tuple) or len(image) < 2:
        return open_image(image, argument)
    if len(image) > MOST_REFERENCES:
        raise UsageError(f"`{argument}` holds {amount(len(image), 'image')}", f"{MOST_REFERENCES} at most")
    opened = tuple(one for one in (open_image(one, argument) for one in image) if one is not None)
    if len(opened) < len(image):
        raise UsageError(f"`{argument}` holds None", "images")
    return opened


# Arguments that hold images, with the function that opens each.
ARGUMENTS = {
    "image": _open_references,
    "mask_image": lambda image, argument: open_mask(image),
    "control_image": open_image,
}


def opened_inputs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the image arguments among these, opened."""
    return {name: ARGUMENTS[name](value, name) for name, value in values.items() if name in ARGUMENTS}


def check_arguments(given: ImageArguments, task: str, *, has_control: bool, kind: str | None) -> None:
    """Checks which images are there.

    Args:
        given: the call.
        task: of the model.
        has_control: a control adapter may be in use.
        kind: of the maps that a control model reads, where that is known.

    Raises:
        UsageError: images that do not go together, or that this model does not read.
    """
    _check_map(given, kind)
    several = isinstance(given.image, tuple)
    if several and task != "kontext":
        found = f"`image` holds {amount(len(given.image), 'image')}"
        raise UsageError(found, "one for a call", "make a call for each; only FLUX.1 Kontext reads several")
    if given.fit is not None and given.fit not in presets.FITS:
        raise UsageError(f"`fit` is {given.fit!r}", f"one of {', '.join(presets.FITS)}")
    for name in ("mask_image", "expand", "fit"):
        needed = given.image is None and (name != "fit" or given.control_image is None)
        if getattr(given, name) is not None and needed:
            raise UsageError(f"`{name}` does nothing without an image", "", "add `image`, or leave it out")
    if given.image is None and (unused := needs_mask(given)):
        raise UsageError(f"`{unused}` does nothing without an image and a mask", "", "add both, or leave it out")
    refused = {
        "kontext": ("mask_image", "expand", "control_image", "strength"),
        "fill": ("control_image",),
    }.get(task, ())
    for name in refused:
        if getattr(given, name) is not None:
            raise UsageError(f"`{name}` means nothing to a {task.capitalize()} model", "", "leave it out")
    if given.fit is not None and given.padding_mask_crop is not None and given.control_image is None:
        found = "`fit` does nothing with `padding_mask_crop`, which keeps the image's shape"
        raise UsageError(found, "one of them")
    if task == "fill" and given.image is None:
        raise UsageError("this model fills an image, and there is none", "`image` and `mask_image`")
    if task == "fill" and given.soft_mask:
        raise UsageError("`soft_mask` means nothing to a Fill model", "a mask of black and white", "leave it out")
    if task == "control" and given.control_image is None:
        raise UsageError("this is a control model, and there is no `control_image`", "a map such as edges or depth")
    if task == "text-to-image" and given.control_image is not None and not has_control:
        todo = "convert FLUX.1 Canny or Depth [dev], or load a control adapter"
        raise UsageError("`control_image` means nothing to this model", "a control model", todo)
    if task != "kontext" and not given.auto_resize:
        raise UsageError("`auto_resize` is for references of FLUX.1 Kontext", "", "leave it out")


def _check_map(given: ImageArguments, kind: str | None) -> None:
    """Checks the map that is made of a photo against the kind that the model reads."""
    if given.control is None:
        return
    if given.control not in presets.KINDS:
        raise UsageError(f"`control` is {given.control!r}", f"one of {', '.join(presets.KINDS)}")
    if given.control_image is None:
        todo = "add `control_image`, or leave it out"
        raise UsageError(f"`control` {given.control} makes a map of a photo, and there is none", "", todo)
    if kind not in (None, given.control):
        raise UsageError(f"`control` is {given.control}, and this model reads maps of {kind}", f"`control` {kind}")


def needs_mask(given: ImageArguments) -> str | None:
    """Returns the first argument that means something with a mask alone, or None."""
    used = {
        "padding_mask_crop": given.padding_mask_crop is not None,
        "soft_mask": given.soft_mask,
        "paste": not given.paste,
    }
    return next((name for name, is_used in used.items() if is_used), None)
