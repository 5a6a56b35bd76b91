"""Records that a person has agreed to the licence that comes with a model's weights.

    HOME/licences.json     sha256 of each text that a person has agreed to, with the date and the model

The text in the model folder counts: another version of a licence is another text, which has to be read again.
"""

import hashlib
import json
import shlex
import time
from pathlib import Path

from .. import home
from ..errors import FiltersError
from ..files import parse_json, read_small, replacing
from ..provenance import SOFTWARE
from ..weights import ModelFolder

TEXTS = ("LICENSE.md", "NOTICE", "README.md")  # the first that a folder has; the converter always writes the last


def find_text(folder: Path) -> tuple[Path, bytes]:
    """Returns the path and the bytes of the licence text in a model folder.

    Raises:
        FiltersError: there is none, or it cannot be read.
    """
    path = next((path for name in TEXTS if (path := folder / name).is_file()), None)
    if path is None:
        todo = "convert the model again"
        raise FiltersError(f"{folder} has no licence text in it", f"one of {', '.join(TEXTS)}", todo)
    try:
        return path, read_small(path)
    except OSError as error:
        raise FiltersError(f"{path} cannot be read: {error.strerror}", "the text of the licence") from None


def digest(text: bytes) -> str:
    """Returns the hash that identifies a text."""
    return hashlib.sha256(text).hexdigest()


def acknowledged() -> dict[str, dict]:
    """Returns the texts that were agreed to on this machine: {sha256: {"model", "date", "software"}}.

    Raises:
        FiltersError: the file is damaged.
    """
    path = _path()
    try:
        known = parse_json(read_small(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise FiltersError(
            f"{path} cannot be read: {error}", "a JSON file", "remove it: flux-krea setup asks"
        ) from None
    if not isinstance(known, dict):
        raise FiltersError(f"{path} holds a {type(known).__name__}", "a JSON object", "remove it: flux-krea setup asks")
    return known


def acknowledge(text: bytes, model: str) -> None:
    """Records that a person has agreed to a text. Called only for an answer that a person typed.

    Args:
        text: the licence.
        model: name of the model that it came with.

    Raises:
        FluxKreaError: the record cannot be written.
    """
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    known = acknowledged() | {digest(text): {"model": model, "date": date, "software": SOFTWARE}}
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        todo = "mend its rights, or name another place in $FLUX_KREA_HOME"
        raise FiltersError(f"{path.parent} cannot be written: {error.strerror}", "a folder", todo) from None
    with replacing(path, mode=0o600) as file:
        file.write(json.dumps(known, indent=1).encode())


def check_acknowledged(folder: ModelFolder) -> None:
    """Refuses a model that requires filters until a person has agreed to its licence.

    Raises:
        FiltersError: nobody has agreed, or only to another text.
    """
    if not folder.requires_filters:
        return
    path, text = find_text(folder.path)
    if digest(text) not in acknowledged():
        todo = f"read it and agree: flux-krea setup --model {shlex.quote(str(folder.path))}"
        raise FiltersError(f"the licence of this model was not acknowledged ({path})", "", todo)


def _path() -> Path:
    return home.path(home.LICENCES)
