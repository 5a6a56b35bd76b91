"""Everything that a picture is made of besides its prompt: images, masks and maps, brought to size.

What `image` means is the model's task: text to image starts from it, or repaints it through a mask; Kontext reads it as
a reference; Fill fills it; a control model starts from it as text to image does, beside its `control_image`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from PIL import Image

from .. import presets
from ..errors import UsageError
from .arguments import ImageArguments, check_arguments, needs_mask
from .canvas import Canvas, fit_to, parse_borders
from .image import OPAQUE, filled, pixels_sha256
from .reference import preferred_size, reference_size


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of one picture, for one model and size.

    Attributes:
        given: the images as they were opened, by argument; a further reference is `image_2` and so on.
        canvas: what the picture starts from or repaints.
        references: of Kontext, as they were opened.
        sizes: at which the model reads them.
        control: the map for a control model or adapter, or the photo of which it is made.
        kind: of the map that is made; None: `control` is the map.
        fill: True for a model that reads the masked image and its mask beside the latents.
        soft: True where values between black and white of the mask are steps, not halves.
        paste: True where the picture comes back into the image, through the mask.
        fit: how images of another shape are brought to a size.
        more: arguments besides images, for a picture's record.
        finished: size of the image that a picture comes back into, where that is not here.
        made: bytes of an expanded image and its mask, which were brought to the size of the picture at once.
        notes: for the user.
    """

    given: Mapping[str, Image.Image] = field(default_factory=dict)
    canvas: Canvas | None = None
    references: tuple[Image.Image, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    control: Image.Image | None = None
    kind: str | None = None
    fill: bool = False
    soft: bool = False
    paste: bool = False
    fit: str = "stretch"
    more: Mapping[str, Any] = field(default_factory=dict)
    finished: tuple[int, int] | None = None
    made: int = 0
    notes: tuple[str, ...] = ()

    @property
    def is_masked(self) -> bool:
        """True where a part of the image stays."""
        return self.canvas is not None and self.canvas.mask is not None

    @property
    def is_read_beside(self) -> bool:
        """True where images take part in every step, and not in the first one's latents alone."""
        return self.is_masked or self.fill or bool(self.references) or self.control is not None

    @property
    def usual_strength(self) -> float:
        """The share of the schedule that changes the image where the caller names none."""
        if self.fill or "expand" in self.more:
            return presets.FULL_STRENGTH
        return presets.MASK_STRENGTH if self.is_masked else presets.STRENGTH

    @property
    def bytes(self) -> tuple[int, ...]:
        """Bytes of each image in memory, of an expanded one and of the one that it was made of."""
        images = {id(image): image for image in self.given.values()}
        images |= {id(self.canvas.image): self.canvas.image} if self.canvas else {}
        return tuple(_BYTES[image.mode] * image.width * image.height for image in images.values())

    @property
    def pasted_pixels(self) -> tuple[int, int]:
        """Pixels of the image that a picture comes back into, and of the part where it has its place; or 0, 0."""
        if not self.paste or not self.canvas:
            return 0, 0
        (wide, high), (left, top, right, bottom) = self.canvas.image.size, self.canvas.box
        return wide * high, (right - left) * (bottom - top)

    def picture_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the size of a finished picture, of which a part of this size was generated."""
        return self.canvas.image.size if self.paste and self.canvas else self.finished or (width, height)

    def without_images(self) -> "Inputs":
        """Returns the inputs with everything that a plan and a note say, and no image: they may be large."""
        finished = self.canvas.image.size if self.paste and self.canvas else None
        control = self.control and Image.new("RGB", (1, 1))  # there is one
        return replace(self, given={}, canvas=None, references=(), control=control, finished=finished)

    def reference_tokens(self, patch: int) -> int:
        """Returns the number of tokens that references add, of patch x patch pixels each."""
        return sum(width * height // patch**2 for width, height in self.sizes)

    def seen(self, width: int, height: int) -> Iterator[tuple[str, Image.Image]]:
        """Yields every image as the networks see it, with its argument."""
        if self.canvas:
            yield "image", self.canvas.part(width, height)
        for image, size in zip(self.references, self.sizes, strict=True):
            yield "image", fit_to(image, *size, self.fit)
        if self.control:
            yield "control_image", fit_to(self.control, width, height, self.fit)

    def with_map(self, made: Image.Image) -> "Inputs":
        """Returns the inputs with the map in the place of its photo."""
        return replace(self, control=made, kind=None)

    def record(self) -> dict[str, Any]:
        """Returns everything here that decides a picture, as JSON: images by their hashes."""
        return {name: _facts(image) for name, image in self.given.items()} | dict(self.more)


_BYTES = {"RGB": 4, "L": 1}  # of a pixel, as Pillow holds it


def _facts(image: Image.Image) -> dict[str, Any]:
    """Returns size and hash of an image: upright, before resizing."""
    name = "rgb_sha256" if image.mode == "RGB" else "grey_sha256"
    return {"width": image.width, "height": image.height, name: pixels_sha256(image)}


def gather_inputs(given: ImageArguments, task: str, *, has_control: bool, kind: str | None = None) -> Inputs:
    """Checks the images of a call against each other and the model's task; sizes come later, by `at_size`.

    Args:
        given: the call.
        task: of the model: "text-to-image", "kontext", "fill" or "control".
        has_control: a control adapter may be in use.
        kind: of the maps that a control model reads, where that is known.

    Raises:
        UsageError: images that do not go together, or that this model does not read.
    """
    check_arguments(given, task, has_control=has_control, kind=kind)
    images = given.image if isinstance(given.image, tuple) else (given.image,) if given.image is not None else ()
    named = {("image" if not i else f"image_{i + 1}"): image for i, image in enumerate(images)}
    mask, notes = given.mask_image, ()
    if mask is None and images and task != "kontext" and (transparent := _transparent(images[0], given.soft_mask)):
        mask, notes = transparent, ("the transparent part of the image is its mask",)
    elif mask is not None and images and "alpha" in images[0].info:
        notes = ("the image's transparency does nothing: a mask is given",)
    named |= {name: one for name, one in (("mask_image", mask), ("control_image", given.control_image)) if one}
    inputs = Inputs(named, control=given.control_image, kind=given.control, fill=task == "fill", soft=given.soft_mask)
    if task == "kontext":
        notes = ("several references are experimental: FLUX.1 Kontext was trained with one",) * (len(images) > 1)
        return replace(inputs, references=images, fit=given.fit or "crop", notes=notes)
    inputs = replace(inputs, fit=given.fit or "stretch")
    if not images:
        return inputs
    image = images[0] if mask is None else filled(images[0])
    canvas, more = Canvas.of(image, mask, soft=given.soft_mask), {}
    if given.expand is not None:
        borders = parse_borders(given.expand, *images[0].size)
        canvas, more = canvas.expanded(borders), {"expand": list(borders)}
    if task == "fill" and canvas.mask is None:
        todo = "white where it is filled; or `expand` fills around it"
        raise UsageError("this model fills an image, and there is no `mask_image`", "a mask", todo)
    if canvas.mask is None and (unused := needs_mask(given)):
        raise UsageError(f"`{unused}` does nothing without a mask", "", "give `mask_image`, or leave it out")
    return replace(inputs, canvas=canvas, paste=given.paste and canvas.mask is not None, more=more, notes=notes)


def _transparent(image: Image.Image, soft: bool) -> Image.Image | None:
    """Returns the mask of an image whose alpha channel is one; None: all of it is nearly opaque."""
    alpha = image.info.get("alpha")
    if alpha is None or alpha.getextrema()[0] > (254 if soft else 127):
        return None
    return alpha.point(lambda value: 255 - value if soft else 255 * (value < OPAQUE))


def at_size(inputs: Inputs, given: ImageArguments, width: int, height: int, multiple: int, *, is_asked: bool) -> Inputs:
    """Returns the inputs for a picture of this size.

    Args:
        inputs: from `gather`.
        given: the call.
        width: of what is generated.
        height: of what is generated.
        multiple: of both.
        is_asked: the caller wants this size, and not the image's.

    Raises:
        UsageError: a reference has a shape or a size that the model does not read, or nothing of the mask is left.
    """
    sizes = [reference_size(*one.size, multiple, auto_resize=given.auto_resize) for one in inputs.references]
    canvas, more = inputs.canvas, dict(inputs.more)
    if canvas and given.padding_mask_crop is not None:
        more["padding_mask_crop"] = given.padding_mask_crop
        canvas = canvas.cropped(width, height, given.padding_mask_crop)
    elif canvas:
        canvas = canvas.fitted(width, height, inputs.fit)
    if canvas and canvas.mask:
        read = canvas.repainted if inputs.fill else partial(canvas.grid, side=multiple // 2)
        name = "the mask" if given.mask_image or given.expand else "the transparent part of the image, its mask,"
        canvas.check_repainted(read(width, height, soft=inputs.soft), name)
    more |= {"soft_mask": True} if given.soft_mask else {}
    more |= {"paste": False} if inputs.is_masked and not given.paste else {}
    more |= {"fit": given.fit} if given.fit else {}
    more |= {"control": given.control} if given.control else {}
    more |= {} if given.auto_resize else {"auto_resize": False}
    notes, made = inputs.notes, 0
    if canvas and inputs.paste and given.padding_mask_crop is None and canvas.is_mostly_kept:
        found = "the image is {} x {}".format(*canvas.size) + f" and is generated at {width} x {height}"
        more_detail = canvas.size[0] * canvas.size[1] > 2 * width * height
        notes += (f"{found}: `padding_mask_crop` has more detail in the mask",) * more_detail
    notes += tuple(_stretched_masks(canvas))
    if not given.fit and is_asked:
        notes += tuple(_stretched(inputs, canvas, width, height))
    if canvas and is_asked and inputs.paste and given.padding_mask_crop is None:
        made = sum(_BYTES.values()) * math.prod(canvas.image.size) if given.expand is not None else 0
        canvas = canvas.resized(width, height)
    return replace(inputs, sizes=tuple(sizes), canvas=canvas, more=more, made=made, notes=notes)


def natural_size(inputs: Inputs, given: ImageArguments) -> tuple[tuple[int, int] | None, bool]:
    """Returns the shape that a picture has where no size is asked for, and True where it is a size to keep.

    Kontext's is the preferred size of its first reference; a part around a mask has the part's shape; others have that
    of the image that is repainted or started from, or of the control image.
    """
    if inputs.references:
        return preferred_size(*inputs.references[0].size), True
    if inputs.canvas and inputs.canvas.mask and given.padding_mask_crop is not None:
        mask = inputs.canvas.mask_over
        left, top, right, bottom = (mask and mask.getbbox()) or inputs.canvas.box
        wide, high = right - left + 2 * given.padding_mask_crop, bottom - top + 2 * given.padding_mask_crop
        return (max(wide, high // 2), max(high, wide // 2)), False
    image = inputs.canvas.image if inputs.canvas else inputs.control
    return (image.size, False) if image else (None, False)


def _stretched(inputs: Inputs, canvas: Canvas | None, width: int, height: int) -> Iterator[str]:
    """Yields a sentence about each image whose shape is changed by more than a twentieth."""
    shapes = {"image": canvas.size if canvas and canvas.fit == "stretch" else None}
    shapes["control image"] = inputs.control.size if inputs.control and inputs.fit == "stretch" else None
    for name, size in shapes.items():
        if size and not _alike(size, (width, height)):
            sizes = f"{size[0]} x {size[1]}", f"{width} x {height}"
            yield f"the {name} of {sizes[0]} is stretched to {sizes[1]}; `fit` crop or pad keeps its shape"


def _stretched_masks(canvas: Canvas | None) -> Iterator[str]:
    """Yields a sentence where the mask has another shape than its image."""
    if canvas and canvas.mask and not _alike(canvas.mask.size, canvas.image.size):
        sizes = "{} x {}".format(*canvas.mask.size), "{} x {}".format(*canvas.image.size)
        yield f"the mask of {sizes[0]} is stretched over the image of {sizes[1]}"


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """True where two shapes differ by less than a twentieth."""
    return 0.95 <= one[0] * other[1] / (one[1] * other[0]) <= 1.05
