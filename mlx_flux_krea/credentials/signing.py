"""Signs the bytes of a picture's file: a C2PA manifest that says how it was made goes into the file.

c2pa-python does the work, with everything off that would open a connection: no timestamp, no fetching of manifests or
of lists of revoked certificates. Pixels and our own record are not touched. The bytes are not the same twice, as
salts and times are in them.
"""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import CredentialsError, UsageError
from ..files import file_state, open_regular
from ..presets import CREDENTIALS
from .certificate import find_identity

SETTINGS = {  # of c2pa
    "builder": {"thumbnail": {"enabled": False}},  # which would hold the picture a second time
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "core": {"allowed_network_hosts": []},  # none
}
RECORD = "io.github.mlx-flux-krea.record"  # label of our assertion
_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_SOFTWARE = {"name": "mlx-flux-krea", "version": __version__}
_ALWAYS = ("software", "model", "base", "license")  # of a record, whatever --metadata says
_PARENT = "parentOf"  # C2PA's words for what a picture was made of
PART, INPUT = "componentOf", "inputTo"


@dataclass(frozen=True)
class Ingredient:
    """An image that a picture was made of.

    Attributes:
        title: for readers, such as "input image"; never the name of its file.
        relation: "parentOf" (the picture is a version of it), "componentOf" (it is seen in the picture) or "inputTo".
        path: of its file, whose own credentials are kept; None: it is no longer there.
    """

    title: str
    relation: str
    path: Path | None = None


@dataclass(frozen=True)
class Signing:
    """How pictures are signed.

    Attributes:
        mode: "on" (a picture that cannot be signed is saved without) or "require" (it is not saved).
        certificate: PEM file of one's own chain; None: the installation's own certificate.
        key: PEM file of its key.
        sources: images that the picture was made of.
    """

    mode: str
    certificate: Path | None = None
    key: Path | None = None
    sources: Sequence[Ingredient] = ()


def chosen(credentials: "str | Signing", files: Mapping[str, Any] | None = None) -> Signing | None:
    """Returns how a picture is signed, by a caller's word for it; None: not at all.

    Args:
        credentials: one of `presets.CREDENTIALS`; or the whole answer.
        files: of its input images, as `inputs_of` takes them.

    Raises:
        UsageError: another word, or the extra is not installed.
    """
    mode = credentials.mode if isinstance(credentials, Signing) else credentials
    if mode not in CREDENTIALS:
        raise UsageError(f"`credentials` is {mode!r}", f"one of {', '.join(CREDENTIALS)}")
    if mode == CREDENTIALS[0]:
        return None
    library()
    return credentials if isinstance(credentials, Signing) else Signing(mode, sources=inputs_of(files or {}))


def library() -> Any:
    """Returns the package c2pa.

    Raises:
        UsageError: it is not installed, or cannot be used on this machine.
    """
    try:
        import c2pa  # an extra
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        reason = "is not installed" if missing else f"cannot be used: {error}"
        todo = "install it: pip install 'mlx-flux-krea[credentials]'"
        raise UsageError(f"`credentials` needs the package c2pa-python, which {reason}", "", todo) from None
    return c2pa


def sign(encoded: bytes, format: str, record: dict, how: Signing, *, metadata: str) -> bytes:
    """Returns the bytes of a signed file.

    Args:
        encoded: the file.
        format: "PNG", "JPEG" or "WEBP".
        record: of the picture.
        how: the certificate, and the images that the picture was made of.
        metadata: "full", or "minimal": without prompt, seed and settings.

    Raises:
        CredentialsError: it cannot be signed; or the signed file is not valid when it is read again.
        UsageError: the extra is not installed.
    """
    c2pa, identity = library(), find_identity(how.certificate, how.key)
    sources = _with_parent(how.sources, record)
    info = c2pa.C2paSignerInfo(identity.algorithm.encode(), identity.chain, identity.key, None)
    signed = io.BytesIO()
    try:
        with c2pa.Context.from_dict(SETTINGS) as context, c2pa.Signer.from_info(info) as signer:
            without_file = [source for source in sources if not _is_readable(c2pa, context, source)]
            manifest = make_manifest(record, sources, metadata=metadata, without_file=without_file)
            with c2pa.Builder(manifest, context) as builder:
                for i, source in enumerate(sources):
                    if source not in without_file and source.path:
                        with open_regular(source.path) as file:
                            builder.add_ingredient(_ingredient(source, i), media_type(file.read(16)), _rewound(file))
                builder.sign(signer, _TYPES[format], io.BytesIO(encoded), signed)
    except (c2pa.C2paError, OSError, ValueError) as error:  # `verify_after_sign` is on: a wrong file is an error too
        raise CredentialsError(f"the picture cannot be signed: {_reason(error)}") from None
    return signed.getvalue()


def make_manifest(
    record: dict, sources: Sequence[Ingredient] = (), *, metadata: str, without_file: Sequence[Ingredient] = ()
) -> dict[str, Any]:
    """Returns the manifest of a picture, as data.

    Args:
        record: of the picture; with "image" it is a version of an image.
        sources: images that it was made of.
        metadata: "full" or "minimal".
        without_file: those of them that are named, and have no credentials to keep.
    """
    ids = {relation: [str(i) for i, s in enumerate(sources) if s.relation == relation] for relation in _RELATIONS}
    kind = "compositeWithTrainedAlgorithmicMedia" if ids[_PARENT] else "trainedAlgorithmicMedia"
    made: dict[str, Any] = {"digitalSourceType": _SOURCE_TYPE + kind, "softwareAgent": _SOFTWARE}
    if ids[INPUT]:
        made["parameters"] = {"ingredientIds": ids[INPUT]}
    if ids[_PARENT]:
        opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": ids[_PARENT]}}
        actions = [opened, {"action": "c2pa.edited", **made}]
    else:
        actions = [{"action": "c2pa.created", **made}]
    if ids[PART]:
        actions.append({"action": "c2pa.placed", "parameters": {"ingredientIds": ids[PART]}})
    shown = {name: record[name] for name in _ALWAYS if name in record}
    if metadata == "full":  # as text: readers show no large numbers, and no lists of numbers
        shown["record"] = json.dumps(record, ensure_ascii=False)
    return {
        "claim_generator_info": [_SOFTWARE],
        "ingredients": [_ingredient(source, i) for i, source in enumerate(sources) if source in without_file],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": RECORD, "data": shown},
        ],
    }


_RELATIONS = (_PARENT, PART, INPUT)
_TITLES = {"image_": "reference", "control_image": "control image", "style_": "style image"}  # by a name or its start


def parent(path: Path | None, title: str = "input image") -> Ingredient:
    """Returns the image that a picture is a version of."""
    return Ingredient(title, _PARENT, path)


def ingredient(name: str, path: Path | None) -> Ingredient:
    """Returns an input image by its name in a record, such as image, image_2, control_image or style_1."""
    if name == "image":
        return parent(path)
    return Ingredient(next(title for start, title in _TITLES.items() if name.startswith(start)), INPUT, path)


def inputs_of(files: Mapping[str, tuple[str, tuple[int, int]] | None]) -> list[Ingredient]:
    """Returns the images that a picture was made of, without its mask.

    Args:
        files: path and state of the file of each, by their names in a record; None: it comes from no file.
    """
    found = []
    for name, file in files.items():
        path = None
        with contextlib.suppress(OSError):
            path = Path(file[0]) if file and file_state(file[0]) == file[1] else None
        found += [ingredient(name, path)] if name != "mask_image" else []
    return found


def _with_parent(sources: Sequence[Ingredient], record: dict) -> list[Ingredient]:
    """Returns the sources, with a parent where the record has one that nobody names."""
    has_parent = any(source.relation == _PARENT for source in sources)
    return [*([parent(None)] if "image" in record and not has_parent else []), *sources]


def _ingredient(source: Ingredient, number: int) -> dict[str, str]:
    return {"title": source.title, "relationship": source.relation, "label": str(number)}


def _is_readable(c2pa: Any, context: Any, source: Ingredient) -> bool:
    """Tries whether a source's file can be an ingredient; one that cannot is named without its credentials."""
    if source.path is None:
        return False
    with contextlib.suppress(OSError, c2pa.C2paError), open_regular(source.path) as file:
        kind = media_type(file.read(16))
        with c2pa.Builder({"claim_generator_info": [_SOFTWARE]}, context) as trial:
            trial.add_ingredient(_ingredient(source, 0), kind, _rewound(file))
            return True
    return False


def _rewound(file: Any) -> Any:
    file.seek(0)
    return file


def media_type(start: bytes) -> str:
    """Returns the media type of a picture's file by its first bytes; "": it is another file."""
    found = (kind for kind, marks in _MARKS.items() if any(start[at : at + len(mark)] == mark for at, mark in marks))
    return next(found, "")


_MARKS = {  # media types, with the bytes that are at a place in their files
    "image/png": ((0, b"\x89PNG"),),
    "image/jpeg": ((0, b"\xff\xd8\xff"),),
    "image/webp": ((8, b"WEBP"),),
    "image/gif": ((0, b"GIF8"),),
    "image/tiff": ((0, b"II*\0"), (0, b"MM\0*")),
    "image/avif": ((4, b"ftypavif"),),
    "image/heic": ((4, b"ftypheic"), (4, b"ftypheix")),
    "image/heif": ((4, b"ftypmif1"),),
}


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
