"""Gathers evidence of the licence of foreign weights: texts, ids and names beside them, hashes, the hub's answers."""

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mlx_flux_krea.beside import read_beside, sorted_facts
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.licence import FLUX_1_SCHNELL, Architecture, Evidence
from mlx_flux_krea.presets import SCHNELL_FILES, SCHNELL_REPOSITORIES

from .fetch import Remote
from .hub import stated_hashes
from .layouts import SourceComponent
from .sources import Source


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
    folders = _folders(source)
    found = read_beside(*folders)
    ids, _ = sorted_facts(list(source.metadata.items()))
    names = (source.path.name, *(folder.resolve().name for folder in folders), *stated_names(source))
    return Evidence(architecture=architecture, texts=found.texts, ids=ids + found.ids, names=names)


def stated_names(source: Source) -> tuple[str, ...]:
    """Returns the names that a source states, and its repository; not those of its files and folders."""
    _, names = sorted_facts(list(source.metadata.items()))
    return (*_on_hub(source.folder), *names, *read_beside(*_folders(source)).names)


def _folders(source: Source) -> list[Path]:
    """Returns the folders in which evidence may lie: that of a source, and that of its pipeline or repository."""
    folder = source.folder
    root = next((above for above in folder.parents if above.parent.name == "snapshots"), None)
    return list(dict.fromkeys([folder, *([folder.parent] if source.component else []), *([root] if root else [])]))


def _on_hub(folder: Path) -> list[str]:
    """Returns the repository of a folder in the hub's cache, as OWNER/NAME."""
    parts = [part for part in folder.resolve().parts if part.startswith("models--")]
    return [part.removeprefix("models--").replace("--", "/", 1) for part in parts]
