"""The facts that `inspect` shows of a picture: its record, its content credentials, and the invisible watermark."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flux_krea.credentials import watermark
from mlx_flux_krea.credentials.reading import has_credentials, in_words, read_credentials
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.provenance import FORMATS, SIGNED, opened, read_picture

from . import settings
from .text import flattened, table

# Endings of files that are pictures: those that are written here, and those of cameras and other programs.
PICTURES = {*FORMATS, ".avif", ".dng", ".gif", ".heic", ".heif", ".tif", ".tiff"}


def describe_picture(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the facts of a picture as JSON, and as lines of text.

    Raises:
        UsageError: not a picture.
    """
    facts, found = _read(path)
    record, mark = facts["record"], _watermark(path)
    about = {}
    if any(facts.values()):
        about = {"made by": facts["source_type"] or "unknown", "software": facts["software"] or "unknown"}
    if record is None and facts["parameters"]:
        about["parameters"] = facts["parameters"]
    rows = flattened(about | {name: value for name, value in (record or {}).items() if name not in SIGNED})
    rows += [("watermark read", f"flux, {mark.right} of {mark.of} bits")] if mark else []
    rows += in_words(found)
    first = [] if any(facts.values()) else [f"{path} has no record of ours"]
    facts |= {"watermark": mark and {"right": mark.right, "of": mark.of}, "credentials": found}
    return {"kind": "picture", **facts}, "\n".join([*first, table(rows)])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Reads metadata and credentials of a picture; of one whose format Pillow does not open, the latter alone.

    Raises:
        UsageError: neither can be read.
    """
    try:
        facts = read_picture(path)
    except UsageError:
        if (found := _credentials(path, None)) is None or "signer" not in found:
            raise
        return dict.fromkeys(("source_type", "software", "parameters", "record")), found
    return facts, _credentials(path, facts["record"])


def _credentials(path: Path, record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Reads the credentials of a picture; where its record says that it was signed, and it is not, they are lost."""
    certificate = None
    with contextlib.suppress(UsageError):  # of a config file that is damaged: it matters little here
        certificate, _ = settings.own_certificate()
    found = read_credentials(path, certificate)
    was_signed = (record or {}).items() >= SIGNED.items()
    return {"state": "lost"} if found is None and was_signed and not has_credentials(path) else found


def _watermark(path: Path) -> watermark.FoundWatermark | None:
    """Looks for the watermark of flux in a picture; None: it has none, or is too large to be decoded."""
    with contextlib.suppress(UsageError), opened(path) as image:
        found = watermark.read(np.asarray(image.convert("RGB")))
        return found if found and found.is_there else None
    return None
