"""Decides if a model's licence requires content filters, from plain facts about the model.

The licence of FLUX.1 [dev], and of every model derived from it, demands content filters or a person's review before
anything is released. `decide` is the one place that says whether a model needs them. Evidence only ever adds the
requirement, with one exception: a transformer whose files are published FLUX.1 [schnell] files, byte for byte, needs
none. A text, a name, an id or a field in JSON lifts nothing, since an Apache licence lies in many folders.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from .presets import SCHNELL_FILES, SCHNELL_REPOSITORIES

HIDDEN_SIZE, NUM_HEADS = 3072, 24  # of FLUX.1 and of whatever is derived from it, at any depth
SMALLEST = 1024  # hidden size below which a transformer is a toy, and requires nothing

DEV = "flux-1-dev-non-commercial"  # licence id of our own folders
PAGE = "https://github.com/mlx-flux-krea/mlx-flux-krea/blob/main/docs/licence.md"  # the licence in practice

# The licence's own words, which a text beside weights is recognised by, whatever its file is called.
_KINDS = "(?:krea|kontext|fill|canny|depth|redux|tools)"
_DEV_TITLE = re.compile(rf"flux(?:\.?1)?[\s-]*{_KINDS}?[\s-]*\[?\bdev\]?[\s-]+non-? ?commercial(?: licen[cs]e)?", re.I)
_DEV_TEXT = re.compile(rf"{_DEV_TITLE.pattern}|flux(?:\.1)? ?{_KINDS}? ?\[dev\].{{0,200}}non-? ?commercial", re.I)
_HYPHENS = re.compile("[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]")
_DEV_ID = re.compile(r"flux[-_.]?1?[-_.]?dev[-_.]non[-_.]?commercial|flux[-_. ]?1?[-_. ]?dev[-_. ]license", re.I)
_DEV_NAME = re.compile(r"flux[-_.\s]?1?[-_.\s]*(?:\[)?(?:krea|kontext|fill|canny|depth|redux|dev)(?![a-z])", re.I)


class Architecture(NamedTuple):
    """The sizes by which a transformer of FLUX.1's family is recognised, in the names of FluxParams."""

    hidden_size: int
    num_heads: int
    depth: int  # double blocks
    depth_single_blocks: int
    guidance_embed: bool


FLUX_1_DEV = Architecture(HIDDEN_SIZE, NUM_HEADS, depth=19, depth_single_blocks=38, guidance_embed=True)
FLUX_1_SCHNELL = FLUX_1_DEV._replace(guidance_embed=False)


@dataclass(frozen=True)
class Evidence:
    """Everything that is known of where a model comes from.

    Attributes:
        architecture: of the transformer.
        declared: whether a folder of ours says that filters are required.
        texts: licence texts that lie beside any of the sources.
        ids: licence ids, of JSON, of a file's metadata, of the hub.
        names: of files, folders and repositories, and ids of models in JSON.
        sha256: of every file that the transformer's weights came from; empty: not known.
        confirmed: those of `sha256` that the hub states for a repository of `presets.SCHNELL_REPOSITORIES`.
    """

    architecture: Architecture
    declared: bool = False
    texts: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    sha256: frozenset[str] = frozenset()
    confirmed: frozenset[str] = frozenset()

    def beside(self, others: Iterable["Evidence"]) -> "Evidence":
        """Returns this evidence with that of other sources of the same model, such as its text encoders."""
        others = list(others)
        return replace(
            self,
            declared=self.declared or any(one.declared for one in others),
            texts=self.texts + tuple(text for one in others for text in one.texts),
            ids=self.ids + tuple(id for one in others for id in one.ids),
            names=self.names + tuple(name for one in others for name in one.names),
        )


class Decision(NamedTuple):
    """A decision about filters or review, and the reason, as the end of a sentence."""

    required: bool
    why: str


def is_schnell(evidence: Evidence) -> bool:
    """Returns True where every file of the transformer is a published FLUX.1 [schnell] file."""
    known = SCHNELL_FILES.keys() | evidence.confirmed
    return evidence.architecture == FLUX_1_SCHNELL and bool(evidence.sha256) and evidence.sha256 <= known


def decide(evidence: Evidence) -> Decision:
    """Decides whether a model's licence demands content filters or review."""
    sizes = evidence.architecture
    if evidence.declared:
        return Decision(True, "its model_index.json says so")
    if sizes.hidden_size < SMALLEST:
        return Decision(False, f"its hidden size, {sizes.hidden_size}, is below {SMALLEST}")
    if is_schnell(evidence):
        return Decision(False, "its transformer is a published FLUX.1 [schnell] file, by sha256")
    if stated := _stated(evidence, "the weights"):
        return Decision(True, stated)
    if (sizes.hidden_size, sizes.num_heads) == (HIDDEN_SIZE, NUM_HEADS):
        unproven = "" if sizes.guidance_embed else ", and its file is no published FLUX.1 [schnell] file"
        return Decision(True, f"it has FLUX.1's width{unproven}")
    if named := _named(evidence):
        return Decision(True, named)
    return Decision(False, "nothing known of it demands them")


def is_dev(evidence: Evidence) -> bool:
    """Returns True where a text, an id or a name says that the weights are FLUX.1 [dev]'s, or made from it."""
    return bool(dev_reason(evidence))


def dev_reason(evidence: Evidence) -> str:
    """Returns what says that weights are FLUX.1 [dev]'s, or made from it: a text, an id or a name; "" if nothing."""
    return _stated(evidence, "it") or _named(evidence)


def _stated(evidence: Evidence, beside: str) -> str:
    """Returns the text or id that says so, as the end of a sentence; "" where none does."""
    if any(_DEV_TEXT.search(_folded(text)) for text in evidence.texts):
        return f"the FLUX.1 [dev] licence lies beside {beside}"
    stated = next((id for id in evidence.ids if _DEV_ID.search(id) or _DEV_NAME.search(id) or dev_titles(id)), None)
    return f"its licence is stated as {stated}" if stated else ""


def dev_titles(text: str) -> list[str]:
    """Returns where a text names the FLUX.1 [dev] Non-Commercial License, in its own words."""
    return [match[0] for match in _DEV_TITLE.finditer(_folded(text))]


def _folded(text: str) -> str:
    """Returns a text on one line, with plain hyphens, and without the backslashes of Markdown."""
    return " ".join(_HYPHENS.sub("-", text.replace("\\", "")).split())


def _named(evidence: Evidence) -> str:
    """Returns the name that says so, as the end of a sentence; "" where none does."""
    named = next(filter(_DEV_NAME.search, evidence.names), None)
    return f"it is called {named}" if named else ""


class SourceHash(Protocol):
    """A source file of a conversion, as `model_index.json` records it."""

    @property
    def sha256(self) -> str: ...
    @property
    def layout(self) -> str: ...
    @property
    def published(self) -> str: ...


class FolderIndex(Protocol):
    """The part of `model_index.json` that says where a model folder comes from."""

    @property
    def name(self) -> str: ...
    @property
    def base(self) -> str: ...
    @property
    def license(self) -> str: ...
    @property
    def filters(self) -> str: ...
    @property
    def source(self) -> Sequence[SourceHash]: ...


def of_folder(architecture: Architecture, index: FolderIndex, text: str) -> Evidence:
    """Returns the evidence that a model folder of ours carries.

    Args:
        architecture: of its transformer.
        index: its model_index.json.
        text: its LICENSE.md, or "".
    """
    files = [source for source in index.source if "transformer" in source.layout]
    return Evidence(
        architecture=architecture,
        declared=index.filters == "required",
        texts=(text,),
        ids=(index.license,),
        names=(index.name, index.base),
        sha256=frozenset(source.sha256 for source in files),
        confirmed=frozenset(source.sha256 for source in files if source.published in SCHNELL_REPOSITORIES),
    )
