"""Gathers evidence of the licence of foreign weights: texts, ids and names beside them, hashes, the hub's answers."""

import contextlib
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import read_json, read_small
from mlx_flux_krea.licence import FLUX_1_SCHNELL, Architecture, Evidence
from mlx_flux_krea.presets import SCHNELL_FILES, SCHNELL_REPOSITORIES

from .fetch import Remote
from .hub import stated_hashes
from .layouts import SourceComponent
from .licence import LICENCE_NAMES
from .sources import Source

_MOST = 2**20  # bytes of a text that may be a licence or a model card
_CARD = re.compile(r"\A---\n(.*?)\n---\n", re.S)  # the facts that a model card begins with
_ID_KEYS, _NAME_KEYS = re.compile("licen[cs]e", re.I), re.compile("name|title|base_?model|_name_or_path", re.I)


def gather(components: dict[str, SourceComponent], architecture: Architecture, remote: Remote) -> Evidence:
    """Returns everything that is known before a weight is read.

    Args:
        components: the layout of every component.
        architecture: sizes of the transformer.
        remote: the sources; the hub states hashes and licence of its files.
    """
    first = components["transformer"].source
    evidence = _beside(first, architecture)
    others = {id(c.source): c.source for c in components.values() if c.source is not first}
    evidence = evidence.beside(_beside(source, architecture) for source in others.values())
    listings = {listing.repo: listing for listing, _ in remote.files.values()}
    evidence = replace(
        evidence,
        ids=evidence.ids + tuple(licence for listing in listings.values() for licence in listing.licences),
        names=evidence.names + tuple(listings),
    )
    stated = [remote.files[file] for file in first.files if file in remote.files]
    if len(stated) < len(first.files):
        return evidence
    hashes = frozenset(file.digest for _, file in stated)
    confirmed = frozenset(file.digest for listing, file in stated if listing.repo in SCHNELL_REPOSITORIES)
    return replace(evidence, sha256=hashes, confirmed=confirmed)


def confirm(evidence: Evidence, hashes: Iterable[str], offline: bool) -> tuple[Evidence, dict[str, str]]:
    """Adds the hashes of the transformer's files, and asks the hub for those that are not pinned.

    Args:
        evidence: from `gather`.
        hashes: sha256 of all files of the transformer, as they were read.
        offline: ask nobody.

    Returns:
        The evidence, and the repository that states each hash.
    """
    hashes = frozenset(hashes)
    evidence = replace(evidence, sha256=hashes, confirmed=evidence.confirmed & hashes)
    unknown = hashes - SCHNELL_FILES.keys()
    if evidence.architecture != FLUX_1_SCHNELL or not unknown:
        return evidence, {}
    published: dict[str, str] = {}
    for repository in () if offline else SCHNELL_REPOSITORIES:
        with contextlib.suppress(ModelError):  # not reachable: then nothing is proven
            published |= dict.fromkeys(stated_hashes(repository) & unknown, repository)
    return replace(evidence, confirmed=evidence.confirmed | published.keys()), published


def _beside(source: Source, architecture: Architecture) -> Evidence:
    """Returns the evidence in and beside one source: its names, its metadata, and the small files of its folders."""
    folders: list[Path] = [source.folder, source.folder.parent] if source.component else [source.folder]
    texts, facts = [], [dict(source.metadata)]
    for folder in folders:
        texts += [text for name in LICENCE_NAMES if (text := _text(folder / name))]
        card = _CARD.match(_text(folder / "README.md"))
        pairs = (line.partition(":") for line in card[1].split("\n")) if card else ()
        facts.append({key.strip(): value.strip() for key, _, value in pairs})
        for name in ("model_index.json", "config.json"):
            with contextlib.suppress(ModelError):
                facts.append(read_json(folder / name))
    stated = [(key, value) for one in facts for key, value in one.items() if isinstance(value, str)]
    names = [source.path.name, *(folder.resolve().name for folder in folders), *_on_hub(source.folder)]
    return Evidence(
        architecture=architecture,
        texts=tuple(texts),
        ids=tuple(value for key, value in stated if _ID_KEYS.search(key)),
        names=(*names, *(value for key, value in stated if _NAME_KEYS.search(key) and not _ID_KEYS.search(key))),
    )


def _on_hub(folder: Path) -> list[str]:
    """Returns the repository of a folder in the hub's cache, as OWNER/NAME."""
    parts = [part for part in folder.resolve().parts if part.startswith("models--")]
    return [part.removeprefix("models--").replace("--", "/", 1) for part in parts]


def _text(path: Path) -> str:
    try:
        return read_small(path, most=_MOST).decode(errors="replace")
    except OSError:
        return ""
