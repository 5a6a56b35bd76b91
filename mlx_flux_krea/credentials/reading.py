"""Reads and validates the content credentials in a picture's file, anybody's, and says in words what they show.

Whether a file has any is seen without the extra `credentials`; all else needs it. Nothing is fetched.
"""

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UsageError
from ..files import open_regular
from .certificate import known_certificates
from .signing import RECORD, SETTINGS, library, media_type

STATES = {
    "trusted": "good: nothing was changed since it was signed, and the signer is known here",
    "valid": "good: nothing was changed since it was signed; who signed is not known here",
    "invalid": "not good",
    "damaged": "they cannot be read",
    "elsewhere": "kept at an address, which is not opened",
    "unread": "there are some; to read them: pip install 'mlx-flux-krea[credentials]'",
    "lost": "lost: it was signed when it was made here, and was saved again by a program that does not keep them",
}
_PROBLEMS = {  # codes of the C2PA specification, in words
    "assertion.dataHash.mismatch": "the file was changed after it was signed",
    "assertion.bmffHash.mismatch": "the file was changed after it was signed",
    "assertion.boxesHash.mismatch": "the file was changed after it was signed",
    "assertion.hashedURI.mismatch": "a statement in the credentials was changed",
    "assertion.missing": "a statement is missing from the credentials",
    "claim.missing": "the credentials have no claim",
    "claimSignature.missing": "the credentials are not signed",
    "claimSignature.mismatch": "the credentials were changed: their signature does not fit",
    "claimSignature.outsideValidity": "it was signed when the certificate was not valid",
    "signingCredential.expired": "the certificate was not valid: it had expired, or the clock was wrong",
    "signingCredential.invalid": "the certificate may not sign pictures",
    "signingCredential.revoked": "the certificate was revoked",
    "ingredient.hashedURI.mismatch": "the credentials of an image that it was made of were changed",
    "ingredient.manifest.missing": "the credentials of an image that it was made of are missing",
}
_NOT_OF_THE_FILE = ("signingCredential.untrusted",)  # a failure by its name, which says nothing about the file
_RELATIONS = {"parentOf": "made from", "componentOf": "shows", "inputTo": "made with"}
_MOST_PARTS, _MOST_DEPTH = 20, 3  # actions and ingredients that are named
_LONGEST = 200  # characters of a text in them
_MOST_CHUNKS = 10_000  # of a file that is searched
_JPEG_ENDS = (0xD9, 0xDA)  # markers: end of the image, and the start of its pixels


def has_credentials(path: Path) -> bool:
    """Looks for credentials in a PNG, JPEG or WebP file, by the headers of its parts; needs no extra."""
    with contextlib.suppress(OSError, struct.error), open_regular(path) as file:
        start = file.read(12)
        if start.startswith(b"\x89PNG"):
            return any(name == b"caBX" for name, _ in _chunks(file, 8, ">", order="size first"))
        if start.startswith(b"RIFF") and start[8:] == b"WEBP":
            return any(name == b"C2PA" for name, _ in _chunks(file, 12, "<", order="name first"))
        if start.startswith(b"\xff\xd8"):
            return any(marker == 0xEB and b"c2pa" in data for marker, data in _segments(file))
    return False


def read_credentials(path: Path, certificate: Path | None = None) -> dict[str, Any] | None:
    """Reads the credentials of a file; None: it has none.

    Args:
        path: of the file.
        certificate: a file of certificates that are known besides this installation's own.

    Returns:
        As JSON: "state" (a key of `STATES`), "signer", "own" (true: by a certificate of this installation), "software",
        "actions", "ingredients" of the same form with "title" and "relation", and "problems", sentences.

    Raises:
        UsageError: the file cannot be opened.
    """
    try:
        c2pa = library()
    except UsageError:
        return {"state": "unread"} if has_credentials(path) else None
    roots, serials = known_certificates(certificate)
    settings = SETTINGS | ({"trust": {"user_anchors": roots.decode()}} if roots else {})
    try:
        with open_regular(path) as file, c2pa.Context.from_dict(settings) as context:
            kind = media_type(file.read(16))
            file.seek(0)
            reader = c2pa.Reader.try_create(kind, file, context=context) if kind else None
            if reader is None:
                return None
            with reader:
                return _facts(json.loads(reader.json()), serials)
    except c2pa.C2paError as error:
        reason = " ".join(str(error).split())
        if reason.startswith("Remote:"):
            return {"state": "elsewhere", "problems": [reason.rpartition(" ")[2]]}
        return {"state": "damaged", "problems": [reason]} if has_credentials(path) or "c2pa" in reason.lower() else None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None


def in_words(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Returns rows of a table about credentials that `read_credentials` has read."""
    if found is None:
        return [("credentials", "none; a program that saves a picture again may have removed them")]
    rows = [("credentials", STATES[found["state"]]), *(("problem", text) for text in found.get("problems", ()))]
    if "signer" in found:
        known = "issued by a root of yours" if found["state"] == "trusted" else "unknown: in no list here"
        known = "this installation's own certificate, or yours" if found["own"] else known
        rows.append(("signed by", f"{found['signer']} ({known})"))
    rows += [("signed with", found["software"])] if found.get("software") else []
    rows += [("model", f"{found['model']}, licence {found.get('license', 'not stated')}")] if "model" in found else []
    rows += [("action", text) for text in found.get("actions", ())]
    return rows + list(_words_of_parts(found.get("ingredients", ()), 0))


def _words_of_parts(parts: Any, depth: int) -> Iterator[tuple[str, str]]:
    for part in parts:
        said: list[str] = [part["title"]]
        said += [f"signed by {part['signer']}"] if "signer" in part else ["without credentials"]
        said += part.get("problems", [])
        said += part.get("actions", [])
        yield f"{'  ' * depth}{_RELATIONS.get(part['relation'], part['relation'])}", "; ".join(said)
        yield from _words_of_parts(part.get("ingredients", ()), depth + 1)


def _facts(store: dict[str, Any], serials: set[str]) -> dict[str, Any]:
    """Returns the facts of the active manifest of a file.

    Args:
        store: manifests and their validation, as c2pa gives them. Much in it may be of any type: anybody wrote it.
        serials: of the certificates that are this installation's own.
    """
    results = _object(_object(store.get("validation_results")).get("activeManifest"))
    problems, state = _problems(results), str(store.get("validation_state", "")).lower()
    state = "invalid" if problems or state not in ("trusted", "valid") else state
    about = {"signer": "nobody named"} | _manifest(store, store.get("active_manifest"), 0)
    trusted = any(_object(one).get("code") == "signingCredential.trusted" for one in _list(results.get("success")))
    own = trusted and about.get("serial") in serials
    return {"state": state, "own": own, **about, "problems": problems}


def _manifest(store: dict[str, Any], label: Any, depth: int) -> dict[str, Any]:
    """Returns signer, software, actions and ingredients of a manifest in the store; {}: it is not there."""
    manifest = _object(_object(store.get("manifests")).get(str(label)))
    if not manifest:
        return {}
    signature = _object(manifest.get("signature_info"))
    software = _object(next(iter(_list(manifest.get("claim_generator_info"))), None))
    assertions = {str(one.get("label")): _object(one.get("data")) for one in _objects(manifest.get("assertions"))}
    about: dict[str, Any] = {
        "signer": _text(signature.get("common_name") or signature.get("issuer") or "nobody named"),
        "serial": _text(signature.get("cert_serial_number", "")),
        "software": " ".join(_text(software[name]) for name in ("name", "version") if software.get(name)),
    }
    about |= {"signed_at": _text(signature["time"])} if signature.get("time") else {}
    ours = assertions.get(RECORD, {})
    about |= {name: _text(ours[name]) for name in ("model", "license") if ours.get(name)}
    lists = [_objects(data.get("actions")) for name, data in assertions.items() if name.startswith("c2pa.actions")]
    about["actions"] = [_action(action) for actions in lists for action in actions[:_MOST_PARTS]][:_MOST_PARTS]
    parts = _objects(manifest.get("ingredients"))[:_MOST_PARTS]
    return about | {"ingredients": [_part(store, part, depth) for part in parts]}


def _part(store: dict[str, Any], ingredient: dict[str, Any], depth: int) -> dict[str, Any]:
    """Returns the facts of an image that the picture was made of."""
    about = {"title": _text(ingredient.get("title", "untitled")), "relation": _text(ingredient.get("relationship", ""))}
    if depth >= _MOST_DEPTH or not ingredient.get("active_manifest"):
        return about
    results = _object(_object(ingredient.get("validation_results")).get("activeManifest"))
    return about | _manifest(store, ingredient["active_manifest"], depth + 1) | {"problems": _problems(results)}


def _action(action: dict[str, Any]) -> str:
    """Returns an action in words: its name, the kind of its source, and the software."""
    agent = action.get("softwareAgent")
    names = [agent.get("name"), agent.get("version")] if isinstance(agent, dict) else [agent]
    by = " ".join(_text(name) for name in names if name)
    kind = _text(action.get("digitalSourceType") or "").rpartition("/")[2]
    name = _text(action.get("action", "")).removeprefix("c2pa.")
    return f"{name}{f' ({kind})' if kind else ''}{f' by {by}' if by else ''}"


def _problems(results: dict[str, Any]) -> list[str]:
    """Returns everything that a validation found wrong, as sentences."""
    codes = [_text(one.get("code")) for one in _objects(results.get("failure"))]
    return list(dict.fromkeys(_PROBLEMS.get(code, code) for code in codes if code not in _NOT_OF_THE_FILE))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in _list(value) if isinstance(one, dict)]


def _text(value: Any) -> str:
    return str(value)[:_LONGEST]


def _chunks(file: BinaryIO, place: int, byte_order: str, order: str) -> Iterator[tuple[bytes, int]]:
    """Yields name and size of each chunk of a PNG or of a RIFF file.

    Args:
        file: the file.
        place: of its first chunk.
        byte_order: of sizes, as `struct` writes it.
        order: "size first" (PNG, whose chunks have four bytes more), or "name first" (RIFF, in pairs of bytes).
    """
    for _ in range(_MOST_CHUNKS):
        file.seek(place)
        header = file.read(8)
        if len(header) < 8:
            return
        is_png = order == "size first"
        name, size = (header[4:], header[:4]) if is_png else (header[:4], header[4:])
        (count,) = struct.unpack(f"{byte_order}I", size)
        yield name, count
        place += 8 + count + (4 if is_png else count % 2)


def _segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields marker and first bytes of each segment of a JPEG before its pixels."""
    place = 2
    for _ in range(_MOST_CHUNKS):
        file.seek(place)
        mark, marker, size = struct.unpack(">BBH", file.read(4))
        if mark != 0xFF or marker in _JPEG_ENDS:
            return
        yield marker, file.read(min(size, 256))
        place += 2 + size
