"""Recognises published filters: by their sizes before anything is read, and by the sha256 of their files after."""

import contextlib
from collections.abc import Iterable
from dataclasses import replace

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.models import filter_config
from mlx_flux_krea.models.filter_config import NSFW_VIT, PIXTRAL_12B, PIXTRAL_REPOSITORIES, FilterIndex

from .fetch import Remote
from .hub import stated_hashes
from .job import Conversion

_ALLOW = "to use it all the same, add --allow-unknown-filter: the log of every run will say so"


def check_sizes(job: Conversion) -> None:
    """Refuses a filter whose sizes are not the published ones, before any weight is read.

    Raises:
        ModelError: they are others.
    """
    for name, published in (("nsfw", NSFW_VIT), ("pixtral", PIXTRAL_12B)):
        if name in job.plans and _sizes(job.plans[name][0]) != _sizes(published):
            raise ModelError(f"{job.index.name} is not the published filter {name}", describe(name), _ALLOW)


def published_by(hashes: Iterable[str], remote: Remote, offline: bool) -> dict[str, str]:
    """Asks the hub, or its cache, which files are those of Pixtral 12B. Returns the repository of each sha256."""
    wanted = set(hashes)
    found = {
        file.digest: listing.repo
        for listing, file in remote.files.values()
        if listing.repo in PIXTRAL_REPOSITORIES and file.digest in wanted
    }
    unknown = wanted - found.keys()
    for repository in PIXTRAL_REPOSITORIES if unknown and not offline else ():
        with contextlib.suppress(ModelError):  # not reachable: then nothing is proven
            found |= dict.fromkeys(stated_hashes(repository) & unknown, repository)
    return found


def with_weights(index: FilterIndex, name: str, *, allow_unknown: bool) -> FilterIndex:
    """Returns the index of a filter with the statement whether its weights are the published ones.

    Raises:
        ModelError: they are others, and `allow_unknown` was not given.
    """
    if index.is_published(name):
        return replace(index, weights="published")
    if not allow_unknown:
        hashes = ", ".join(source.sha256 for source in index.source)
        raise ModelError(f"{index.name} is not the published filter {name}: sha256 {hashes}", describe(name), _ALLOW)
    return replace(index, weights="unknown")


def describe(name: str) -> str:
    """Describes the published files of a filter."""
    if name == "nsfw":
        return f"the published classifier, whose sha256 is {filter_config.NSFW_SHA256}"
    return f"files that the hub states for {' or '.join(PIXTRAL_REPOSITORIES)}"


def _sizes(config):
    """Returns sizes without the choice of tokens whose logits are kept."""
    return replace(config, head_ids=PIXTRAL_12B.head_ids) if hasattr(config, "head_ids") else config
