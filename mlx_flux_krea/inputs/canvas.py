"""The image that a picture starts from: its mask, the part that is generated, and how that part comes back into it.

A mask is white where the image is repainted. The network sees a box of the image, at the size of the picture; what it
makes of the box is pasted back through the mask, so that every pixel outside the mask is the image's own.
"""

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from ..errors import UsageError
from ..presets import MAX_PIXELS
from .image import is_open, open_image

RAMP = 32  # pixels of an image beside a new border, over which its mask falls from white to black
SEAM = 8  # pixels at most, inside a mask, over which a picture fades into the image: as many as a latent covers

Box = tuple[int, int, int, int]  # left, top, right and bottom
_LANCZOS = Image.Resampling.LANCZOS
_BORDER = re.compile(r"\s*(\d{1,6})\s*(?:px|(%))?\s*")
_STRIP = 256  # lines of a picture that are pasted at a time
_WASTE = 16  # times the pixels of a crop: an image that is larger is not resized as a whole
_HALF = 128  # of 255, from which a mask is white


def open_mask(mask: Any) -> Image.Image | None:
    """Opens a mask, white where the image is repainted, as 8-bit grey.

    Args:
        mask: as for `open_image`; colours are turned into grey, and what is transparent is black.

    Raises:
        UsageError: as `open_image`.
    """
    if mask is None or is_open(mask, "L"):
        return mask
    opened = open_image(mask, "mask_image")
    assert opened is not None  # of a mask that is not None
    grey = opened.convert("L")
    if np.asarray(grey).max() < _HALF <= np.asarray(opened).max():
        raise UsageError("the mask is drawn in a dark colour", "white where the image is repainted", "draw it in white")
    alpha = opened.info.get("alpha")
    return grey if alpha is None else ImageChops.multiply(grey, alpha)


@dataclass(frozen=True, eq=False)
class Canvas:
    """An image with its mask, and the part of it that is generated.

    Attributes:
        image: RGB.
        mask: grey, white where the image is repainted, and stretched over it; None: it is repainted everywhere.
        box: the part.
        fit: how the part is brought to the size of the picture, one of `presets.FITS`.
    """

    image: Image.Image
    mask: Image.Image | None
    box: Box
    fit: str = "stretch"

    @classmethod
    def of(cls, image: Image.Image, mask: Image.Image | None = None, *, soft: bool = False) -> "Canvas":
        """Returns a canvas of a whole image.

        Args:
            image: RGB.
            mask: grey.
            soft: every value above black repaints; else those that are nearer to white.

        Raises:
            UsageError: the mask is black, or too dark.
        """
        lightest: Any = 255 if mask is None else mask.getextrema()[1]
        if not lightest:
            todo = "draw it in white on black; what is transparent in a mask is black"
            raise UsageError("the mask is black: nothing is repainted", "white where the image is repainted", todo)
        if lightest < _HALF and not soft:
            found = f"the mask is dark, {lightest} of 255 where it is lightest: nothing is repainted"
            todo = "multiply a mask of 0 and 1 by 255" if lightest == 1 else "`soft_mask` repaints grey by as much"
            raise UsageError(found, f"{_HALF} or more", todo)
        return cls(image, mask, (0, 0, *image.size))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the part."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    @property
    def is_mostly_kept(self) -> bool:
        """True where what is repainted lies within half of the image."""
        left, top, right, bottom = (self.mask and self.mask.getbbox()) or (0, 0, 0, 0)
        return self.mask is not None and 2 * (right - left) * (bottom - top) < self.mask.width * self.mask.height

    @property
    def mask_over(self) -> Image.Image | None:
        """The mask at the size of the image."""
        return self.mask if self.mask is None else fit_to(self.mask, *self.image.size, "stretch")

    def expanded(self, borders: Sequence[int]) -> "Canvas":
        """Returns the canvas with new borders, which the mask covers; it fades out over `RAMP` pixels of the image.

        The borders hold the image's outermost pixels until they are repainted.

        Args:
            borders: pixels at the top, right, bottom and left.

        Raises:
            UsageError: the new image has more pixels than any that is read.
        """
        top, right, bottom, left = borders
        width, height = self.image.width + left + right, self.image.height + top + bottom
        if width * height > MAX_PIXELS:
            found = f"the expanded image is {width} x {height}"
            raise UsageError(found, f"{MAX_PIXELS / 1e6:.0f} million pixels at most", "`expand` it less")
        mask, over = Image.new("L", (width, height), 255), self.mask_over
        down, across = _ramp(self.image.height, top, bottom)[:, None], _ramp(self.image.width, left, right)[None]
        for first in range(0, self.image.height, _STRIP):  # the image may be large
            inner = Image.fromarray(np.maximum(down[first : first + _STRIP], across))
            if over is not None:
                inner = ImageChops.lighter(inner, over.crop((0, first, over.width, first + inner.height)))
            mask.paste(inner, (left, top + first))
        return Canvas(_bordered(self.image, borders), mask, (0, 0, width, height))

    def cropped(self, width: int, height: int, padding: int) -> "Canvas":
        """Returns the canvas whose part is the surroundings of the mask, in the shape of the picture.

        As diffusers' `get_crop_region`: the mask's box, so many pixels more on each side, then widened or heightened as
        far as the image goes.
        """
        mask = self.mask_over
        box = (mask and mask.getbbox()) or self.box
        left, right = max(box[0] - padding, 0), min(box[2] + padding, self.image.width)
        top, bottom = max(box[1] - padding, 0), min(box[3] + padding, self.image.height)
        if (right - left) / (bottom - top) > width / height:
            more = int((right - left) * height / width - (bottom - top))
            top, bottom = _widened(top, bottom, more, self.image.height)
        else:
            more = int((bottom - top) * width / height - (right - left))
            left, right = _widened(left, right, more, self.image.width)
        return replace(self, mask=mask, box=(left, top, right, bottom), fit="pad")

    def fitted(self, width: int, height: int, fit: str) -> "Canvas":
        """Returns the canvas with a way to bring its part to the size of the picture; "crop" makes the part smaller."""
        if fit != "crop":
            return replace(self, fit=fit)
        left, top, right, bottom = self.box
        scale = min((right - left) / width, (bottom - top) / height)
        new = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = left + (right - left - new[0]) // 2, top + (bottom - top - new[1]) // 2
        return replace(self, box=(left, top, left + new[0], top + new[1]), fit="stretch")

    def resized(self, width: int, height: int) -> "Canvas":
        """Returns a canvas whose image is the part at this size, so that what comes back has it too."""
        mask = self.mask_over
        image = self.part(width, height)
        mask = mask and fit_to(_cut(mask, self.box), width, height, self.fit)
        return Canvas(image, mask, (0, 0, width, height))

    def part(self, width: int, height: int) -> Image.Image:
        """Returns the part of the image at the size of the picture."""
        return fit_to(_cut(self.image, self.box), width, height, self.fit)

    def repainted(self, width: int, height: int, *, soft: bool = False) -> np.ndarray:
        """Returns the mask of the part at the size of the picture, (height, width) float32 in [0, 1].

        Args:
            width: pixels.
            height: pixels.
            soft: leaves values between; else they are rounded, half up, as diffusers does.
        """
        if self.mask is None:
            return np.ones((height, width), np.float32)
        whole = self.box == (0, 0, *self.image.size)
        mask = self.mask if whole else self.mask_over or self.mask
        values = _weights(fit_to(mask if whole else _cut(mask, self.box), width, height, self.fit))
        return values if soft else (values >= 0.5).astype(np.float32)

    def grid(self, width: int, height: int, side: int, *, soft: bool = False) -> np.ndarray:
        """Returns the mask of the part at each latent, (height / side, width / side) float32.

        It is that of the latent's first pixel, as in diffusers; of a soft mask, the mean.

        Args:
            width: pixels.
            height: pixels.
            side: pixels of a latent.
            soft: as for `repainted`.
        """
        blocks = self.repainted(width, height, soft=soft).reshape(height // side, side, width // side, side)
        return blocks.mean((1, 3)) if soft else blocks[:, 0, :, 0].copy()

    def check_repainted(self, values: np.ndarray, name: str) -> None:
        """Checks that something of the mask is left in what the network reads of it.

        Args:
            values: from `repainted` or `grid`.
            name: of the mask.

        Raises:
            UsageError: nothing is: it is cut off with the rest of the image, or too small.
        """
        if values.any():
            return
        mask = self.mask_over
        is_cut = self.fit != "pad" and self.box != (0, 0, *self.image.size)
        if mask is not None and is_cut and np.asarray(_cut(mask, self.box)).max() < _HALF:
            raise UsageError(f"{name} lies outside of the part that `fit` crop leaves", "a part with some of it")
        todo = "`padding_mask_crop` generates its surroundings alone, where it is larger"
        raise UsageError(f"{name} is too small or too thin: nothing is repainted", "a larger one", todo)

    def paste(self, picture: np.ndarray, *, soft: bool = False) -> np.ndarray:
        """Returns the image with a picture in its part, through the mask.

        Args:
            picture: (height, width, 3) uint8, or floats in [0, 1].
            soft: as for `repainted`.

        Returns:
            (H, W, 3) of the whole image, in the type of `picture`; outside the mask it is the image itself.
        """
        mask = self.mask_over
        assert mask is not None  # nothing lies outside else
        width, height = self.size
        made = _resized(picture, width, height, "crop" if self.fit == "pad" else "stretch")
        in_bytes, whole = picture.dtype == np.uint8, np.array(self.image)
        if not in_bytes:
            whole = whole.astype(np.float32)
            whole /= 255
        left, top, right, bottom = self.box
        shares = np.asarray(_cut(seam(mask, soft=soft), self.box))
        for first in range(0, height, _STRIP):  # in float32 the whole takes a gigabyte
            rows = slice(first, first + _STRIP)
            share, own = shares[rows, :, None] / np.float32(255), whole[top:bottom, left:right][rows]
            mixed = np.clip(own + share * (made[rows] - own.astype(np.float32)), 0, 255.0 if in_bytes else 1.0)
            mixed = np.round(mixed) if in_bytes else mixed
            own[...] = np.where(share > 0, mixed, own)
        return whole


def seam(mask: Image.Image, *, soft: bool) -> Image.Image:
    """Returns a mask that fades in over `SEAM` pixels inside its edge, less where it is small or thin.

    It is rounded first: a thing that was painted is shown whole. Of a soft mask, the steps have seen to the rest.
    """
    mask = mask.point([255 * (value >= (1 if soft else _HALF)) for value in range(256)])
    left, top, right, bottom = mask.getbbox() or (0, 0, 1, 1)
    radius = min(SEAM // 2, min(right - left, bottom - top) // 32)
    while radius:
        inner = mask.filter(ImageFilter.MinFilter(2 * radius + 1))
        if 2 * np.count_nonzero(np.asarray(inner)) >= np.count_nonzero(np.asarray(mask)):
            return ImageChops.darker(mask, inner.filter(ImageFilter.BoxBlur(radius)))
        radius //= 2
    return mask


def fit_to(image: Image.Image, width: int, height: int, fit: str) -> Image.Image:
    """Brings an image to a size, with Lanczos.

    Args:
        image: of any mode that can be resized.
        width: pixels.
        height: pixels.
        fit: "stretch" changes its shape, as diffusers does; "crop" cuts off what is too much; "pad" fills what is
            missing with its outermost pixels.
    """
    if image.size == (width, height):
        return image
    if fit == "stretch":
        return image.resize((width, height), _LANCZOS)
    wide = image.width * height > width * image.height  # wider than the size is
    if wide == (fit == "crop"):
        new = max(1, image.width * height // image.height), height
    else:
        new = width, max(1, image.height * width // image.width)
    left, top = width // 2 - new[0] // 2, height // 2 - new[1] // 2
    if fit == "crop" and new[0] * new[1] > _WASTE * width * height:  # a strip, whose ends would take gigabytes
        across, down = image.width / new[0], image.height / new[1]
        right, bottom = min((width - left) * across, image.width), min((height - top) * down, image.height)
        return image.resize((width, height), _LANCZOS, box=(-left * across, -top * down, right, bottom))
    resized = image.resize(new, _LANCZOS)
    if fit == "crop":
        return resized.crop((-left, -top, width - left, height - top))
    padded = Image.new(image.mode, (width, height))
    padded.paste(resized, (left, top))
    right, bottom = left + new[0], top + new[1]
    bars = {  # place and size of each: its colours are those at a line of the image, as in diffusers
        (0, 0, width, top): (0, 0, new[0], 0),
        (0, bottom, width, height - bottom): (0, new[1], *new),
        (0, 0, left, height): (0, 0, 0, new[1]),
        (right, 0, width - right, height): (new[0], 0, *new),
    }
    for (x, y, wide, high), line in bars.items():
        if wide and high:
            padded.paste(resized.resize((wide, high), box=line), (x, y))
    return padded


def parse_borders(given: Any, width: int, height: int) -> tuple[int, int, int, int]:
    """Returns the pixels of new borders at the top, right, bottom and left of an image.

    Args:
        given: one, two or four numbers as in CSS (all sides; top and bottom, then right and left; each side), in pixels
            or as percent of the image's height or width: a text such as "0,25%", or a sequence of such.
        width: of the image.
        height: of the image.

    Raises:
        UsageError: something else, or no border.
    """
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, Sequence) else [given]
    matches = [_BORDER.fullmatch(str(part)) for part in parts]
    if len(matches) not in (1, 2, 4) or not all(matches):
        expected = "top, right, bottom and left in pixels or percent, such as 0,25%,0,25%"
        raise UsageError(f"`expand` is {reprlib.repr(given)}", expected)
    four = matches * (4 // len(matches))
    sides = (height, width, height, width)
    borders = [int(m[1]) * side // 100 if m[2] else int(m[1]) for m, side in zip(four, sides, strict=True) if m]
    if not any(borders):
        raise UsageError(f"`expand` is {reprlib.repr(given)}, which adds nothing", "a border above 0")
    return borders[0], borders[1], borders[2], borders[3]


def _widened(first: int, last: int, more: int, length: int) -> tuple[int, int]:
    """Widens a span by so many pixels, half on each side, within 0 and a length as far as that goes."""
    first, last = first - more // 2, last + more - more // 2
    if last >= length:
        first, last = first - (last - length), length
    if first < 0:
        first, last = 0, last - first
    return first, min(last, length)


def _bordered(image: Image.Image, borders: Sequence[int]) -> Image.Image:
    """Returns an image with its outermost pixels repeated at the top, right, bottom and left, without a second copy."""
    top, right, bottom, left = borders
    rows = np.clip(np.arange(-top, image.height + bottom), 0, image.height - 1)
    columns = np.clip(np.arange(-left, image.width + right), 0, image.width - 1)
    whole = Image.new(image.mode, (len(columns), len(rows)))
    for first in range(0, len(rows), _STRIP):
        own = rows[first : first + _STRIP]
        strip = np.asarray(image.crop((0, int(own[0]), image.width, int(own[-1]) + 1)))
        whole.paste(Image.fromarray(strip[own - own[0]][:, columns]), (0, first))
    return whole


def _ramp(length: int, before: int, after: int) -> np.ndarray:
    """Returns (length,) values, uint8, that fall from 255 beside each new border to 0 over `RAMP` pixels."""
    places = np.arange(length, dtype=np.float32)
    reach = min(RAMP, max(length // 4, 1))
    sides = [1 - (places + 1) / (reach + 1)] * bool(before) + [1 - (length - places) / (reach + 1)] * bool(after)
    ramp = np.maximum(0, np.max(sides, axis=0)) if sides else np.zeros(length, np.float32)
    return np.round(255 * ramp).astype(np.uint8)


def _cut(image: Image.Image, box: Box) -> Image.Image:
    return image if box == (0, 0, *image.size) else image.crop(box)


def _weights(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask, dtype=np.float32) / np.float32(255)


def _resized(picture: np.ndarray, width: int, height: int, fit: str) -> np.ndarray:
    """Returns pixels at another size, in their type."""
    if picture.dtype == np.uint8:
        return np.asarray(fit_to(Image.fromarray(picture), width, height, fit))
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in picture.transpose(2, 0, 1)]
    return np.stack([np.asarray(fit_to(channel, width, height, fit)) for channel in channels], axis=-1)
