"""Adapters in the home folder, and the way from a name, a file or a place on the hub to one that fits a model.

    adapters/NAME/
      adapter.safetensors   the parts, by names that `parts.tensors_of` makes
      adapter.json          `parts.Facts`
      manifest.json         sha256 and size of both
      lengths-*.safetensors lengths of DoRA by the hash of a model, made when they are first needed

A file is translated when it is first used, and found again by its hash, wherever it lies then.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from .. import home, licence, macos
from ..beside import read_beside
from ..errors import ModelError, UsageError
from ..files import read_json, sha256, sync_path, written_whole
from ..licence import Architecture, Evidence
from ..models.config import ModelSizes, to_json
from ..weights import read_header
from .parts import Adapter, Facts, open_parts, read_facts, tensors_of
from .reading import described, outline, read, shapes_of

TENSORS, FACTS, MANIFEST = "adapter.safetensors", "adapter.json", "manifest.json"
DERIVED = "lengths-*.safetensors"  # of DoRA, which `formulas.Base` measures
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?::.+)?")


@dataclass(frozen=True)
class Origin:
    """Where a file comes from, beside the file itself.

    Attributes:
        source: as a person names it: a path, or OWNER/NAME:FILE on the hub.
        ids: of licences that the place states.
    """

    source: str
    ids: tuple[str, ...] = ()


def installed() -> dict[str, Path]:
    """Returns the folders of installed adapters by name. Hidden folders are incomplete and left out."""
    found = home.path(home.ADAPTERS).glob(f"*/{FACTS}")
    return {
        home.composed(path.parent.name): path.parent for path in sorted(found) if not path.parent.name.startswith(".")
    }


def find_hash(digest: str) -> Path | None:
    """Returns the installed adapter that was made from a file of this sha256."""
    for folder in installed().values():
        with contextlib.suppress(ModelError):
            if read_facts(folder / FACTS).sha256 == digest:
                return folder
    return None


def find_source(source: str) -> Path | None:
    """Returns the installed adapter that came from a place: OWNER/NAME on the hub, or one file there."""
    for folder in installed().values():
        with contextlib.suppress(ModelError):
            facts = read_facts(folder / FACTS)
            if source in (facts.source, facts.source.partition(":")[0]):
                return folder
    return None


def is_hub_source(source: str | os.PathLike) -> bool:
    """Recognises OWNER/NAME and OWNER/NAME:FILE where nothing lies at a path of that name."""
    return bool(_HUB.fullmatch(str(source))) and not os.path.lexists(os.path.expanduser(source))


def obtain(
    source: str | os.PathLike,
    sizes: ModelSizes,
    *,
    name: str | None = None,
    weight_name: str | None = None,
    origin: Origin | None = None,
) -> Adapter:
    """Returns an adapter for a model: an installed one, or one from a file, which is then installed.

    Args:
        source: the name of an installed one, a file, a folder that holds one, or a place on the hub.
        sizes: of the model.
        name: for the adapter; None: that of the file.
        weight_name: of the file in a folder, or on the hub.
        origin: where the file comes from, if that is not its path.

    Raises:
        ModelError: there is none; or it is damaged, or does not fit the model.
    """
    path = Path(os.path.expanduser(source))
    known = installed()
    if not os.path.exists(path):
        text = f"{source}:{weight_name}" if weight_name and is_hub_source(source) else str(source)
        if folder := known.get(home.composed(text)) or find_source(text):
            return opened(folder, sizes)
        raise missing(text)
    path = _file_in(path, weight_name)
    read_header(path)  # what is no such file need not be hashed, which takes as long as it is large
    digest = sha256(path)
    if folder := find_hash(digest):
        with contextlib.suppress(ModelError):  # of a model of other sizes, or damaged
            return opened(folder, sizes)
    origin = origin or Origin(str(path.absolute()))
    facts = Facts(name=name or path.stem, source=origin.source, sha256=digest)
    adapter = read(path, sizes, facts)
    adapter = replace(adapter, facts=with_licence(adapter.facts, path, origin, sizes.flux.architecture))
    with contextlib.suppress(OSError):  # a home folder that cannot be written costs only time
        return replace(adapter, facts=install(adapter))
    return adapter


def outlined(source: str | os.PathLike, sizes: ModelSizes) -> Adapter:
    """Returns an adapter of which the headers alone are read: its facts, and parts whose arrays have only shapes.

    Args:
        source: as in `obtain`; nothing is installed.
        sizes: of the model.

    Raises:
        ModelError: as in `obtain`.
    """
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):
        if folder := installed().get(home.composed(str(source))) or find_source(str(source)):
            return opened(folder, sizes, read=False)
        raise missing(str(source))
    path = _file_in(path, None)
    found = outline(path, sizes)
    facts = Facts(name=path.stem, source=str(path.absolute()), sha256="")
    return Adapter(described(found, facts, sizes), shapes_of(found))


def missing(text: str) -> ModelError:
    """Returns the error for an adapter that is not here."""
    names = ", ".join(installed()) or "none is installed"
    if is_hub_source(text):
        return ModelError(f"the adapter {text} was not fetched", names, f"fetch it: flux-krea models add {text}")
    todo = "install a file: flux-krea models add FILE, or OWNER/NAME:FILE on the hub"
    if text.partition("=")[0] in installed():
        todo = "a weight is a number: NAME=0.8"
    return ModelError(f"there is no adapter {text!r}", f"a file, or an installed one ({names})", todo)


def _file_in(path: Path, weight_name: str | None) -> Path:
    """Returns the file that a path means: itself, or the one in a folder.

    Raises:
        ModelError: none, or several.
        UsageError: a name that leads out of the folder.
    """
    if not path.is_dir():
        if path.suffix.lower() != ".safetensors":
            raise ModelError(f"{path} is no safetensors file", "an adapter as .safetensors", "others may run code")
        return path
    if weight_name is not None:
        if Path(weight_name).is_absolute() or ".." in Path(weight_name).parts:
            raise UsageError(f"`weight_name` is {weight_name!r}", "a file in the folder")
        return _file_in(path / weight_name, None)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = f"{path} holds {len(files)} safetensors files"
        raise ModelError(found, "one adapter", "name the file" if files else "")
    return files[0]


def opened(folder: Path, sizes: ModelSizes, read: bool = True) -> Adapter:
    """Opens an installed adapter; without `read`, its arrays are lazy.

    Raises:
        ModelError: it is damaged, or was made for a model of other sizes.
    """
    listed = read_json(folder / MANIFEST)
    for name in (TENSORS, FACTS):
        path, entry = folder / name, listed.get(name)
        if not isinstance(entry, dict) or not path.is_file() or path.stat().st_size != entry.get("bytes"):
            raise ModelError(f"{path} is damaged", "as manifest.json says", f"flux-krea models rm {folder.name}")
    facts = replace(read_facts(folder / FACTS), name=folder.name)
    return Adapter(facts, open_parts(folder / TENSORS, sizes, read=read))


def install(adapter: Adapter) -> Facts:
    """Writes an adapter into the home folder. Returns its facts, with the name under which it is there.

    Raises:
        OSError: it cannot be written.
    """
    place = home.path(home.ADAPTERS)
    place.mkdir(parents=True, exist_ok=True)
    folder = _free(place, adapter.facts)
    facts = replace(adapter.facts, name=folder.name)
    partial = place / f".{folder.name}.{secrets.token_hex(8)}"
    partial.mkdir()
    try:
        macos.exclude(partial)
        mx.save_safetensors(str(partial / TENSORS), tensors_of(adapter))
        sync_path(partial / TENSORS)
        with written_whole(partial / FACTS) as file:
            file.write(json.dumps(to_json(facts), indent=1).encode())
        files = {name: {"sha256": sha256(partial / name), "bytes": (partial / name).stat().st_size}
                 for name in (TENSORS, FACTS)}  # fmt: skip
        with written_whole(partial / MANIFEST) as file:
            file.write(json.dumps(files, indent=1).encode())
        if folder.exists():  # of the same file, for a model of other sizes
            shutil.rmtree(folder)
        partial.rename(folder)
        sync_path(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return facts


def _free(place: Path, facts: Facts) -> Path:
    """Returns the folder for an adapter: by its name, with a number where another file has that name."""
    plain = re.sub(r"[^\w.-]+", "-", facts.name).strip("-.")[:80] or "adapter"
    for number in range(1, 10_000):
        folder = place / (plain if number == 1 else f"{plain}-{number}")
        if not folder.exists():
            return folder
        with contextlib.suppress(ModelError):
            if read_facts(folder / FACTS).sha256 == facts.sha256:
                return folder
    raise OSError(f"{place} is full")


# --- licence ---


def with_licence(facts: Facts, path: Path, origin: Origin, architecture: Architecture) -> Facts:
    """Returns facts with the duties that an adapter adds to a model, by everything in and beside its file."""
    evidence = _evidence(facts, path, origin, architecture)
    why = "BFL's control adapters are under FLUX.1 [dev]'s licence" if facts.control else licence.dev_reason(evidence)
    return replace(facts, license=tuple(dict.fromkeys((*facts.license, *origin.ids, *evidence.ids))), dev=why)


def _evidence(facts: Facts, path: Path, origin: Origin, architecture: Architecture) -> Evidence:
    found = read_beside(path.parent)
    return Evidence(
        architecture=architecture,
        texts=found.texts,
        ids=(*facts.license, *origin.ids, *found.ids),
        names=(path.name, path.parent.resolve().name, origin.source, *facts.origins, *found.names),
    )


def added_duty(adapters: Iterable[Facts], architecture: Architecture) -> str:
    """Returns why adapters require filters or review of a model, or "": small models require nothing."""
    if architecture.hidden_size < licence.SMALLEST:
        return ""
    return next((f"the adapter {facts.name}: {facts.dev}" for facts in adapters if facts.dev), "")
