"""How the commands sign pictures: the user's certificate, checks before any work, and images that they were made of."""

import os
from pathlib import Path
from typing import Any, TypeGuard

from mlx_flux_krea.credentials import signing
from mlx_flux_krea.credentials.certificate import find_identity
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.inputs.image import open_image, pixels_sha256
from mlx_flux_krea.presets import CREDENTIALS

from . import settings
from .images import image_files


def check_credentials(mode: str | None) -> None:
    """Checks before any work that pictures can be signed, as far as they must be.

    Raises:
        UsageError: the extra is not installed.
        CredentialsError: the mode is "require", and certificate or key cannot be used.
    """
    if signing.chosen(mode or CREDENTIALS[0]) and mode == "require":
        find_identity(*settings.own_certificate())


def is_signed(mode: str | None) -> TypeGuard[str]:
    """True where pictures are signed; None is the usual mode, in which they are not."""
    return mode not in (None, CREDENTIALS[0])


def signed(mode: str | None, sources: list[signing.Ingredient]) -> dict[str, Any]:
    """Returns the argument `credentials` of `Picture.save`; {}: the picture is not signed.

    Args:
        mode: one of `presets.CREDENTIALS`; None: the usual one.
        sources: images that the picture was made of.
    """
    if not is_signed(mode):
        return {}
    certificate, key = settings.own_certificate()
    return {"credentials": signing.Signing(mode, certificate, key, sources)}


def sources_of(options: dict[str, Any], record: dict[str, Any]) -> list[signing.Ingredient]:
    """Returns the images that a picture was made of, without its mask.

    Args:
        options: of its job.
        record: of the picture, whose hashes say that a file still is the image that was read.
    """
    found = []
    for name, path in image_files(options).items():
        if name == "mask_image":
            continue
        found.append(signing.ingredient(name, path if _is(path, _recorded(record, name)) else None))
    return found


def parts_of(paths: list[Path]) -> list[signing.Ingredient]:
    """Returns the pictures that a contact sheet shows."""
    return [signing.Ingredient(f"picture {i}", signing.PART, path) for i, path in enumerate(paths, 1)]


def to_json(sources: list[signing.Ingredient]) -> list[list[str | None]]:
    """Returns sources as JSON, which is kept with a picture that waits for review."""
    return [[one.title, one.relation, one.path and os.path.abspath(one.path)] for one in sources]


def from_json(given: Any) -> list[signing.Ingredient]:
    """Reads the JSON of `to_json`; anything else is no source."""
    found = []
    for one in given if isinstance(given, list) else ():
        if isinstance(one, list) and len(one) == 3 and all(isinstance(part, str | None) for part in one):
            found.append(signing.Ingredient(str(one[0]), str(one[1]), one[2] and Path(one[2])))
    return found


def _recorded(record: dict[str, Any], name: str) -> Any:
    """Returns the hash that a record has of an image."""
    facts = record.get(name)
    if name.startswith("style_"):
        styles, place = (record.get("style") or {}).get("images", ()), int(name.removeprefix("style_")) - 1
        facts = styles[place] if place < len(styles) else None
    return facts.get("rgb_sha256") if isinstance(facts, dict) else None


def _is(path: Path, digest: Any) -> bool:
    """True where a file holds the image with this hash."""
    try:
        image = open_image(path)
        return image is not None and pixels_sha256(image) == digest
    except UsageError:
        return False
