"""Images that the page was given, in HOME/uploads under the hash of their bytes; only their ids leave the server."""

import contextlib
import hashlib
import io
import os
import re
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from PIL import Image

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
    if not data:
        raise invalid("the body is empty; expected the bytes of an image")
    try:
        with _few, opened(io.BytesIO(data), most=None) as image:
            width, height, kind = image.width, image.height, (image.format or "png").lower()
            has_alpha = image.has_transparency_data
            if is_small := width * height <= MAX_PIXELS:
                image.load()
    except FluxKreaError as error:
        raise invalid(plain(str(error))) from None
    if not is_small:
        found = f"the image has {width} x {height} pixels"
        raise HTTPProblem(413, "too_large", f"{found}; expected {MAX_PIXELS / 1e6:.0f} million at most")
    key = hashlib.sha256(data).hexdigest()[:16]
    path = _find(key) or folder() / f"{key}.{kind}"
    if not path.exists():
        _make_room(len(data))
        with written_whole(path, mode=0o600) as file:
            file.write(data)
    os.utime(path)
    record = None
    with contextlib.suppress(FluxKreaError):
        record = read_record(path)
    facts = {"id": key, "width": width, "height": height, "bytes": len(data), "format": kind}
    return facts | {"has_alpha": has_alpha, "record": record}


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
