"""Images that the page was given, in HOME/uploads under the hash of their bytes; only their ids leave the server."""

import contextlib
import hashlib
import io
import os
import re
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageChops, ImageOps

from mlx_flux_krea import home
from mlx_flux_krea.errors import FluxKreaError
from mlx_flux_krea.files import written_whole
from mlx_flux_krea.inputs.image import open_image
from mlx_flux_krea.presets import MAX_PIXELS
from mlx_flux_krea.provenance import opened, read_record

from .errors import HTTPProblem, invalid, not_found, plain

MOST_BYTES = 50_000_000  # of one image
MOST_KEPT = 4_000_000_000  # bytes of all of them
KEPT_DAYS = 7.0
_ID = re.compile("[0-9a-f]{16}")
_T = TypeVar("_T")
_few = threading.BoundedSemaphore(1)  # images that are decoded at a time


def folder() -> Path:
    """Returns the folder of the uploads."""
    return home.path(home.UPLOADS)


def keep(data: bytes) -> dict[str, Any]:
    """Keeps an image.

    Args:
        data: its file.

    Returns:
        Facts about it; "record" is None where it was not made here.

    Raises:
        HTTPProblem: not an image, or too large.
    """
    facts = _decoded(data, _facts)
    key = _store(data, facts["format"])
    record = None
    with contextlib.suppress(FluxKreaError):
        record = read_record(find(key))
    return {"id": key, "bytes": len(data), **facts, "record": record}


def keep_mask(data: bytes) -> str:
    """Keeps a mask that is transparent where the image is changed, as ours: white there. Returns its id.

    Args:
        data: its file.

    Raises:
        HTTPProblem: not an image, too large, or one without transparency.
    """
    mask = _decoded(data, _inverted_alpha)
    if mask is None:
        raise invalid("the mask has no transparency; expected it where the image is changed", "mask")
    encoded = io.BytesIO()
    mask.save(encoded, "PNG", compress_level=1)
    return _store(encoded.getvalue(), "png")


def find(key: str) -> Path:
    """Returns the file of an upload.

    Raises:
        HTTPProblem: there is none.
    """
    if (path := _find(key)) is None:
        raise not_found("upload")
    return path


def exists(key: str) -> bool:
    """Returns True where an upload has this id."""
    return _find(key) is not None


def png(key: str) -> bytes:
    """Returns an upload as a PNG: upright, in sRGB, with its transparency.

    Raises:
        HTTPProblem: there is none.
    """
    path, data = find(key), io.BytesIO()
    with _few:
        image = open_image(path)
        assert image is not None
        if isinstance(alpha := image.info.get("alpha"), Image.Image):
            image = image.copy()
            image.putalpha(alpha)
        image.save(data, "PNG", compress_level=1)
    return data.getvalue()


def remove_old(used: Collection[str]) -> None:
    """Deletes uploads that are old and that no job uses.

    Args:
        used: ids that jobs name.
    """
    for path in folder().glob("*.*") if folder().is_dir() else ():
        with contextlib.suppress(OSError):
            if path.stem not in used and time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                path.unlink()


def _decoded(data: bytes, read: Callable[[Image.Image], _T]) -> _T:
    """Decodes the image of a file once, and returns what a function makes of it.

    Args:
        data: the file.
        read: the function. It raises nothing of its own, since every failure is one of the file.

    Raises:
        HTTPProblem: not an image, or too large.
    """
    if not data:
        raise invalid("the body is empty; expected the bytes of an image")
    try:
        with _few, opened(io.BytesIO(data), most=None) as image:
            size = image.size
            if size[0] * size[1] <= MAX_PIXELS:
                image.load()
                return read(image)
    except FluxKreaError as error:
        raise invalid(plain(str(error))) from None
    found = f"the image has {size[0]} x {size[1]} pixels"
    raise HTTPProblem(413, "too_large", f"{found}; expected {MAX_PIXELS / 1e6:.0f} million at most")


def _facts(image: Image.Image) -> dict[str, Any]:
    kind, has_alpha = (image.format or "png").lower(), image.has_transparency_data
    return {"width": image.width, "height": image.height, "format": kind, "has_alpha": has_alpha}


def _inverted_alpha(image: Image.Image) -> Image.Image | None:
    """Returns white where an image is transparent, upright; None: it has no transparency."""
    if not image.has_transparency_data:
        return None
    turned = ImageOps.exif_transpose(image) or image
    return ImageChops.invert(turned.convert("RGBA").getchannel("A"))


def _store(data: bytes, kind: str) -> str:
    """Writes the file of an image, unless it is there. Returns its id."""
    key = hashlib.sha256(data).hexdigest()[:16]
    path = _find(key) or folder() / f"{key}.{kind}"
    if not path.exists():
        _make_room(len(data))
        with written_whole(path, mode=0o600) as file:
            file.write(data)
    os.utime(path)
    return key


def _find(key: str) -> Path | None:
    if not _ID.fullmatch(key):
        return None
    return next((path for path in folder().glob(f"{key}.*") if path.is_file() and not path.is_symlink()), None)


def _make_room(count: int) -> None:
    """Makes the folder, and checks that so many bytes more may lie there.

    Raises:
        HTTPProblem: they may not.
    """
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    if sum(path.stat().st_size for path in folder().iterdir()) + count > MOST_KEPT:
        todo = "wait, or delete the folder uploads in the home folder"
        raise HTTPProblem(507, "insufficient_resources", f"the uploads take {MOST_KEPT / 1e9:.0f} GB; {todo}")
