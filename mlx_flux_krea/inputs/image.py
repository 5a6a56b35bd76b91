"""Input images: any file, PIL image or array, as the networks that read images need it."""

import hashlib
import io
import logging
import os
from collections.abc import Callable
from typing import Any, TypeGuard

import mlx.core as mx
import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageFilter

from ..errors import UsageError, amount, printable
from ..files import file_state
from ..provenance import opened

logger = logging.getLogger("mlx_flux_krea")

OPAQUE = 248  # of 255, from which on a pixel counts as opaque
_NEAR = 24  # of 255, the share of opaque pixels around one from which its colour is taken
_STRIP = 256  # lines of an image that are converted at a time
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # Pillow's modes by the colour space of a profile


def open_image(image: Any, argument: str = "image") -> Image.Image | None:
    """Opens an image as the autoencoder's encoder needs it: upright by its EXIF orientation, RGB, whole in memory.

    Colours are converted to sRGB by the ICC profile, transparency is flattened on white, 16-bit grey becomes 8-bit.
    Where something is transparent, the result's `info` has "alpha": an 8-bit grey image of its size. Of an image from a
    file, it has "file": its path, and its state, by which a change is seen.

    Args:
        image: a PIL image, which stays as it is; a path; an array, `_image_from_array`; or a list of one of these.
        argument: its name, for errors.

    Raises:
        UsageError: not an image, broken, far too large, or of a mode whose white is not known.
    """
    if image is None or is_open(image):
        return image
    if isinstance(image, list | tuple):
        if len(image) != 1:
            found = f"`{argument}` holds {amount(len(image), 'image')}"
            raise UsageError(found, "one for a call", "make a call for each")
        return open_image(image[0], argument)
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        found = f"`{argument}` is an address, {printable(image)}"
        raise UsageError(found, "a file", "nothing is fetched: download it first")
    if (hasattr(image, "__array__") and not isinstance(image, Image.Image)) or isinstance(image, mx.array):
        image = _image_from_array(image, argument)
    if not isinstance(image, str | os.PathLike | Image.Image):
        raise UsageError(f"`{argument}` is {type(image).__name__}", "a PIL image, a path or an array (H, W, 3)")
    image = os.path.expanduser(image) if isinstance(image, str | os.PathLike) else image
    name = printable(image) if isinstance(image, str) else "the image"
    with opened(image) as file:
        if file.mode in ("I", "F"):
            raise UsageError(f"{name} has mode {file.mode}, whose white is not known", "8 or 16 bits, grey or RGB")
        if 0 in file.size:
            raise UsageError(f"{name} is {file.width} x {file.height}", "at least one pixel")
        file.load()
        flat, to_srgb = Image.new("RGB", file.size), _conversion_to_srgb(file.info.get("icc_profile"), name)
        alpha = None
        for top in range(0, file.height, _STRIP):  # copies of a part at a time, not of the whole
            part, opaque = _flattened(file.crop((0, top, file.width, min(top + _STRIP, file.height))), to_srgb)
            flat.paste(part, (0, top))
            if opaque is not None and np.asarray(opaque).min() < 255:
                alpha = Image.new("L", file.size, 255) if alpha is None else alpha
                alpha.paste(opaque, (0, top))
        turn = _TURNS.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    flat = flat if turn is None else flat.transpose(turn)
    if found := _file_of(image):
        flat.info["file"] = found
    if alpha is not None:
        flat.info["alpha"] = alpha if turn is None else alpha.transpose(turn)
    return flat


def _file_of(image: Any) -> tuple[str, tuple[int, int]] | None:
    """Returns path and state of the file of an image; None: it has none."""
    path = image.__dict__.get("filename") if isinstance(image, Image.Image) else image
    if not path or not isinstance(path, str | os.PathLike):
        return None
    try:
        return os.path.abspath(path), file_state(path)
    except OSError:
        return None


def pixels_sha256(image: Image.Image) -> str:
    """Returns the hash of an image's bytes, row by row, without a copy of the whole."""
    digest = hashlib.sha256()
    for top in range(0, image.height, _STRIP):
        digest.update(image.crop((0, top, image.width, min(top + _STRIP, image.height))).tobytes())
    return digest.hexdigest()


def filled(image: Image.Image) -> Image.Image:
    """Returns an opened image whose transparent pixels have the colours around them instead of white.

    Colours come from ever larger surroundings (a box blur over what is opaque), so that no edge of white lies in the
    pixels beside them.
    """
    alpha = image.info.get("alpha")
    if alpha is None or alpha.getextrema()[1] < OPAQUE:
        return image
    known = alpha.point(lambda value: 255 * (value >= OPAQUE))
    result, missing, radius = image.copy(), alpha.point(lambda value: 255 * (value < OPAQUE)), 2
    opaque = Image.composite(image, Image.new("RGB", image.size), known)
    while missing.getbbox() and radius <= 2 * max(image.size):
        blur = ImageFilter.BoxBlur(radius)
        share = np.asarray(known.filter(blur), np.float32)[..., None]
        colours = np.asarray(opaque.filter(blur), np.float32) * 255 / np.maximum(share, 1)
        near = Image.fromarray((255 * (share[..., 0] >= _NEAR)).astype(np.uint8))
        found = Image.fromarray(np.clip(np.round(colours), 0, 255).astype(np.uint8))
        result.paste(found, (0, 0), ImageChops.darker(missing, near))
        missing, radius = ImageChops.subtract(missing, near), 4 * radius
    return result


def _image_from_array(given: Any, argument: str) -> Image.Image:
    """Returns the image in an array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or one of these in a batch.

    Raises:
        UsageError: another shape, no pixels, or values other than uint8, uint16 and floats in [0, 1].
    """
    try:
        array = np.asarray(
            given.astype(mx.float32) if isinstance(given, mx.array) and given.dtype == mx.bfloat16 else given
        )
    except Exception as error:  # of any class, from the library that made the array
        found = f"`{argument}` is {type(given).__name__}, which cannot be read: {error}"
        raise UsageError(found, "a numpy array") from None
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        todo = "move the channels to the end" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise UsageError(f"`{argument}` has shape {np.shape(given)}", "(H, W), (H, W, 3) or (H, W, 4)", todo)
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise UsageError(f"`{argument}` holds floats from {array.min():g} to {array.max():g}", "0 to 1")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise UsageError(f"`{argument}` holds {array.dtype}", "uint8, uint16, or floats from 0 to 1")
    return Image.fromarray(array)


def _flattened(
    part: Image.Image, to_srgb: Callable[[Image.Image], Image.Image]
) -> tuple[Image.Image, Image.Image | None]:
    """Returns a part of an image as RGB on white, with 8 bits, and its alpha channel if it has one."""
    if part.mode.startswith("I;16"):
        part = Image.fromarray(np.round(np.asarray(part) / 257).astype(np.uint8))
    if part.mode not in ("RGBA", "RGBa", "LA", "La", "PA") and "transparency" not in part.info:
        return to_srgb(part), None
    grey = part.mode in ("LA", "La")
    part = part.convert("LA") if grey else part.convert("RGBA")
    colours = to_srgb(part.getchannel("L") if grey else part.convert("RGB")).convert("RGBA")
    alpha = part.getchannel("A")
    colours.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", part.size, "white"), colours).convert("RGB"), alpha


def _conversion_to_srgb(profile: bytes | None, name: str) -> Callable[[Image.Image], Image.Image]:
    """Returns the conversion of an image's colours to sRGB, by its ICC profile if it has one.

    Relative colorimetric with black point compensation, as browsers and photo programs show pictures. A profile that
    cannot be read is said and passed over.
    """

    def plain(part: Image.Image) -> Image.Image:
        return part.convert("RGB")

    if not profile:
        return plain
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(given):
            return plain
        inner: Any = given.profile
        mode = _PROFILE_MODES[inner.xcolor_space.strip()]
        how = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), mode, "RGB", *how)
    except (ImageCms.PyCMSError, OSError, KeyError):
        logger.warning("the colour profile of %s cannot be used: its colours are taken for sRGB", name)
        return plain

    def managed(part: Image.Image) -> Image.Image:
        if mode == "RGB" and part.mode not in ("L", "CMYK"):
            part = part.convert("RGB")
        if part.mode != mode:  # such as grey pixels with a profile of colours
            return plain(part)
        converted = ImageCms.applyTransform(part, transform)
        return plain(part) if converted is None else converted

    return managed


def is_open(image: object, mode: str = "RGB") -> TypeGuard[Image.Image]:
    """Recognises an image that `open_image` has returned, or one that is like it, of a mode."""
    return (
        type(image) is Image.Image  # in memory, unlike a file's
        and image.mode == mode
        and 0 not in image.size
        and not image.info.keys() & {"transparency", "icc_profile"}
        and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    )
