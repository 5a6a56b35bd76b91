"""Published adapters for few steps, which come with steps, guidance and a weight: Turbo-Alpha and Hyper-SD.

One is recognised by its name (of the file, of its place on the hub, or of its metadata's title) together with the
layers that it changes: every linear layer of the transformer, ten of them outside the blocks. Neither is enough alone.
Styles that were trained beside such an adapter have its name, too, but not those layers; and the layers do not tell
the two from each other, whose weights are 1 and 0.125.

Facts: the model cards of alimama-creative/FLUX.1-Turbo-Alpha and ByteDance/Hyper-SD.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..models.config import ModelSizes
from . import names
from .names import AdapterTarget

_RANK = 64  # of both, at FLUX.1's size


@dataclass(frozen=True)
class FewSteps:
    """How an adapter for few steps was published.

    Attributes:
        name: a pattern of its names.
        steps: of a picture.
        guidance: of a picture.
        weight: of the adapter.
        publisher: its place on the hub.
    """

    name: str
    steps: int
    guidance: float
    weight: float
    publisher: str


PUBLISHED = (
    FewSteps(r"turbo[-_. ]?alpha", 8, 3.5, 1.0, "alimama-creative/FLUX.1-Turbo-Alpha"),
    FewSteps(r"hyper[-_. ]?(?:sd|flux).*(?<!\d)16[-_. ]?steps?", 16, 3.5, 0.125, "ByteDance/Hyper-SD"),
    FewSteps(r"hyper[-_. ]?(?:sd|flux).*(?<!\d)8[-_. ]?steps?", 8, 3.5, 0.125, "ByteDance/Hyper-SD"),
)


def recognised(texts: Iterable[str], changed: Iterable[AdapterTarget], sizes: ModelSizes) -> FewSteps | None:
    """Returns the published adapter that is meant, or None.

    Args:
        texts: names of the file, its place and its title.
        changed: the layers.
        sizes: of the model.
    """
    if not _is_everything(changed, sizes):
        return None
    text = "\n".join(texts)
    return next((one for one in PUBLISHED if re.search(one.name, text, re.I)), None)


def looks_like_one(changed: Iterable[AdapterTarget], ranks: Iterable[int], sizes: ModelSizes) -> bool:
    """Returns True where the layers and the rank are theirs, whatever the name."""
    return set(ranks) == {_RANK} and _is_everything(changed, sizes)


def _is_everything(changed: Iterable[AdapterTarget], sizes: ModelSizes) -> bool:
    """Returns True for changes of every linear layer of the transformer, and of no other network."""
    known = names.targets(sizes).values()
    layers = {target.path for target in known if target.component == "transformer" and target.width}
    return {(target.component, target.path) for target in changed} == {("transformer", path) for path in layers}
