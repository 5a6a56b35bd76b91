"""Decides a conversion: identifies the sources, names the new folder, plans its tensors. Reads no weights."""

import math
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from mlx_flux_krea import home
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.first_bytes import ends_in_zeros
from mlx_flux_krea.licence import FLUX_1_SCHNELL, Evidence
from mlx_flux_krea.licence import decide as decide_filters
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.presets import SCHNELL_FILES
from mlx_flux_krea.weights import BESIDE, COMPONENTS, FILTERS, KIND_OF, ModelFolder, Sizes, check_redux, layer_widths

from . import quantize as quantizing
from .choose import choose
from .evidence import gather
from .fetch import Remote, outlined
from .fit import make_plan
from .hub import is_repo_id
from .index import editing_family, make_component_index, make_filter_index, make_index
from .layouts import SourceComponent
from .licence import licence_files
from .own import OwnFolder, open_own
from .quantize import Layers
from .remap import ComponentPlan
from .room import Room
from .tasks import Task, check_task, find_task
from .tokenizers import find_tokenizers
from .walk import is_model_folder

Index = configs.ModelIndex | configs.ComponentIndex
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# default type and recipe of each kind
_DEFAULTS = {
    "model": ("bfloat16", "8"),
    "nsfw": ("float32", "none"),
    "pixtral": ("bfloat16", "4"),
    "redux": ("bfloat16", "none"),
    "depth": ("float32", "none"),
}
_FIXED = {"nsfw": "the classifier", "depth": "the depth network"}  # stored in one way; bfloat16 bands a map
_AS_IT_IS = "layers that have as few bits or fewer in the source stay as they are"


@dataclass(frozen=True)
class Group:
    """A group of layers: how it is stored, and its loss."""

    component: str
    name: str
    stored: str
    parameters: int
    bytes: int
    error: float | None  # ||stored - source|| / ||source|| over the quantized layers, from up to 256 rows of each


@dataclass(frozen=True)
class Conversion:
    """All decisions of a conversion, taken before a weight is read; by component where a field is a dict."""

    kind: str  # "model", "nsfw", "pixtral", "redux" or "depth"
    own: OwnFolder | None
    components: dict[str, SourceComponent]
    plans: dict[str, tuple[Sizes, ComponentPlan]]  # sizes, and how each tensor is made
    index: configs.ModelIndex | configs.ComponentIndex
    path: Path
    dtype: str
    recipe: quantizing.QuantizationRecipe
    tokens: dict[str, bytes]  # files of the tokenizers
    layers: dict[str, Layers]
    left: dict[str, dict[str, str]]  # layers not quantized although the recipe has them, and why
    groups: dict[str, list[Group]]
    notes: tuple[str, ...]
    evidence: Evidence | None  # of the model's licence; None: a filter, a component, or a folder of ours
    task: Task | None  # of a foreign transformer

    @property
    def flux(self) -> configs.FluxConfig | None:
        """Sizes of the transformer; None: a filter or a component."""
        sizes = _model_sizes(self.plans)
        return sizes.flux if sizes else None

    def bytes(self, component: str) -> int:
        """Returns the bytes of all tensors of a component, as they will be stored."""
        return sum(group.bytes for group in self.groups[component])

    def stored(self, component: str) -> str:
        """Describes how most layers of a component will be stored."""
        return stored_as(self.dtype, self.layers[component])


def decide(
    remote: Remote,
    out,
    dtype: str | None,
    quantize: str | None,
    group_size: int | None,
    tokenizers,
    task: str | None = None,
) -> Conversion:
    """Reads the headers of sources and decides the whole conversion; arguments are those of `convert`."""
    own, components, plans, index, evidence, found, said = _understand(remote, task)
    kind = _kind(components)
    dtype, quantize = dtype or _DEFAULTS[kind][0], quantize or _DEFAULTS[kind][1]
    if kind in _FIXED and (dtype, quantize) != _DEFAULTS[kind]:
        raise UsageError(
            f"{_FIXED[kind]} in {dtype}, `quantize` {quantize}",
            "float32, `quantize` none",
            "leave `dtype` and `quantize` out",
        )
    if kind in BESIDE and quantize != "none":
        raise UsageError(f"{kind} with `quantize` {quantize}", "none: it is small", "leave `quantize` out")
    recipe = quantizing.find_recipe(quantize, group_size)
    layers, left = {}, {}
    notes = said + ((found.note,) if found and found.note else ())
    for name in plans:
        layers[name], left[name], is_kept = _choose_layers(name, plans, recipe)
        notes += (f"`quantize` {quantize}: {_AS_IT_IS}",) if is_kept else ()
    place = (home.COMPONENTS if kind in BESIDE else home.FILTERS, kind)
    if kind == "model":
        place = (home.MODELS, f"{index.name}-{_label(dtype, layers['transformer'])}")
    path = Path(os.path.expanduser(out)) if out else home.path(*place)
    tokens = find_tokenizers(components, plans, tokenizers)
    groups = {name: _groups(name, plan, dtype, layers[name]) for name, (_, plan) in plans.items()}
    return Conversion(
        kind=kind,
        own=own,
        components=components,
        plans=plans,
        index=index,
        path=path,
        dtype=dtype,
        recipe=recipe,
        tokens=tokens,
        layers=layers,
        left=left,
        groups=groups,
        notes=notes,
        evidence=evidence,
        task=found,
    )


def _kind(components: dict[str, SourceComponent]) -> str:
    """Returns "model", the name of a filter, or a key of `BESIDE`."""
    first = next(iter(components))
    return KIND_OF.get(first, first if first in FILTERS else "model")


def _choose_layers(
    name: str, plans: dict[str, tuple[Sizes, ComponentPlan]], recipe: quantizing.QuantizationRecipe
) -> tuple[Layers, dict[str, str], bool]:
    """Returns how each layer of a component is stored, layers left out with the reason, and if packing was kept."""
    config, plan = plans[name]
    layers, left = quantizing.choose(name, layer_widths(name, config), recipe)
    kept = quantizing.keep_packed(plan, layers, always=name == "pixtral")
    return kept, left, kept != layers


def writing_order(components: dict[str, SourceComponent]) -> tuple[list[str], dict[Path, str]]:
    """Returns the components in the order in which they are written, and the last one that needs each file.

    The smallest comes first, so that files of others can be fetched meanwhile.
    """
    files = {name: component.source.files for name, component in components.items()}
    start = {name: min(t.start for t in component.tensors.values()) for name, component in components.items()}
    order = sorted(files, key=lambda name: (sum(file.stat().st_size for file in files[name]), start[name]))
    return order, {file: name for name in order for file in files[name]}


@dataclass(frozen=True)
class Outline:
    """A preview of a conversion.

    Attributes:
        index: the facts of the model folder, without the records of its sources.
        sizes: of the four networks of a model; None: a filter or a component.
        licence: the LICENSE.md of the new folder; None: it would have none.
        bytes: size of all weight files.
        rooms: disk space in each precision.
        labels: the ends of the folder's name; none for a filter or a component.
        is_unproven: whether filters are required is not known before the transformer's file is read: by its sizes it
            may be FLUX.1 [schnell], and nothing states its sha256.
    """

    index: configs.ModelIndex | configs.ComponentIndex
    sizes: configs.ModelSizes | None
    licence: bytes | None
    bytes: int
    rooms: dict[str, Room]
    labels: dict[str, str]
    is_unproven: bool = False

    @property
    def fetch(self) -> int:
        """Bytes of the sources that are still to be fetched from the hub."""
        return sum(next(iter(self.rooms.values())).to_fetch)

    @property
    def converted(self) -> dict[str, int]:
        """Bytes of the converted weights in each precision."""
        return {quantize: sum(room.written) for quantize, room in self.rooms.items()}

    @property
    def requires_filters(self) -> bool:
        """True where the model's licence demands filters or review."""
        return isinstance(self.index, configs.ModelIndex) and self.index.filters == "required"

    def target(self, quantize: str) -> Path:
        """Returns where `convert` puts a model in this precision, and bfloat16."""
        return home.path(home.MODELS, f"{self.index.name}-{self.labels[quantize]}")


def examine(
    sources: Sequence[str | Path],
    *,
    tokenizers: str | Path | None = None,
    offline: bool = False,
    task: str | None = None,
) -> Outline:
    """Checks if sources can be converted, and previews the conversion. Reads no weights.

    Arguments and errors are those of `convert`.
    """
    with outlined(sources, offline) as remote:
        own, components, plans, index, evidence, *_ = _understand(remote, task)
        find_tokenizers(components, plans, tokenizers)
        files = {file for component in components.values() for file in component.source.files}
        order, last = writing_order(components)
        to_fetch = tuple(_left(remote, (file for file in last if last[file] == name)) for name in order)
        licence = licence_files(index, roots(components), []).get("LICENSE.md")
        return Outline(
            index=index,
            sizes=_model_sizes(plans),
            licence=licence,
            bytes=sum(file.stat().st_size for file in files),
            rooms={
                quantize: Room(to_fetch, tuple(_converted_bytes(name, plans, quantize) for name in order))
                for quantize in quantizing.RECIPES
            },
            labels={
                quantize: _label(
                    "bfloat16", _choose_layers("transformer", plans, quantizing.find_recipe(quantize, None))[0]
                )
                for quantize in quantizing.RECIPES
                if "transformer" in plans
            },
            is_unproven=evidence is not None and not own and _may_be_schnell(evidence),
        )


def _left(remote: Remote, files: Iterable[Path]) -> int:
    """Returns the bytes of files that are still to be fetched."""
    coming = [remote.files[file][1] for file in files if file in remote.files]
    return sum(file.size - file.here for file in coming)


def _may_be_schnell(evidence: Evidence) -> bool:
    """Returns True where the file's sha256, which nothing states yet, may lift the requirement of filters."""
    lifted = replace(evidence, sha256=frozenset(SCHNELL_FILES))
    return not evidence.sha256 and evidence.architecture == FLUX_1_SCHNELL and not decide_filters(lifted).required


def _converted_bytes(name: str, plans: dict[str, tuple[Sizes, ComponentPlan]], quantize: str) -> int:
    """Returns the bytes of a component's weights in a precision, in the usual type."""
    layers, _, _ = _choose_layers(name, plans, quantizing.QuantizationRecipe(quantize))
    dtype = _DEFAULTS.get(KIND_OF.get(name, name), _DEFAULTS["model"])[0]
    return sum(quantizing.count_bytes(t, dtype, quantizing.layer_of(t, layers)) for t in plans[name][1].targets)


class _Understood(NamedTuple):
    """Sources as they were identified."""

    own: OwnFolder | None  # None: foreign sources
    components: dict[str, SourceComponent]
    plans: dict[str, tuple[Sizes, ComponentPlan]]
    index: Index
    evidence: Evidence | None  # of a foreign model's licence
    task: Task | None  # of a foreign transformer
    notes: tuple[str, ...] = ()  # how the sources were chosen


def _understand(remote: Remote, task: str | None) -> _Understood:
    """Identifies sources: layout and plan of every component, index, evidence and task.

    Raises:
        ModelError: sources that cannot be converted.
        UsageError: the task that was asked for is not the transformer's, or has to be asked for.
    """
    if own := _own(remote.paths):
        return _Understood(own, own.components, own.plans, _as_asked(own, task), None, None)
    choice = choose(remote.paths)
    components = choice.components
    here = {file for component in components.values() for file in component.source.files if file not in remote.files}
    empty = (f"{file} ends in zeros, as an unfinished download does: is it whole?" for file in sorted(here)
             if ends_in_zeros(file))  # fmt: skip
    notes = (*choice.notes, *empty)
    plans = {name: make_plan(component) for name, component in components.items()}
    sizes = _model_sizes(plans)
    if (kind := _kind(components)) in BESIDE:
        if kind == "redux":
            encoder, embedder = (plans[name][0] for name in BESIDE[kind])
            assert isinstance(encoder, configs.SiglipConfig)
            assert isinstance(embedder, configs.ReduxConfig)
            check_redux(encoder, embedder)
        _refuse_task(kind, task)
        config = list(plans.values())[-1][0]
        return _Understood(None, components, plans, make_component_index(components, kind, config), None, None, notes)
    if sizes is None:
        (name,) = components
        _refuse_task(name, task)
        return _Understood(
            None, components, plans, make_filter_index(components[name], plans[name][0]), None, None, notes
        )
    sizes.check()
    found = find_task(components["transformer"].source, sizes.flux, task)
    evidence = gather(components, sizes.flux.architecture, remote)
    return _Understood(
        None, components, plans, make_index(components, sizes.flux, evidence, found), evidence, found, notes
    )


def _as_asked(own: OwnFolder, task: str | None) -> Index:
    """Returns the index of a folder of ours, with another task and its defaults if one is asked for."""
    index, folder = own.decided_index, own.folder
    if task is None:
        return index
    if not isinstance(index, configs.ModelIndex) or not isinstance(folder, ModelFolder):
        _refuse_task(next(iter(own.components)), task)
        return index
    name, kind, _ = check_task(folder.flux.sizes, task)
    family = editing_family(name, kind)
    if (name, kind) == (index.task, index.kind) or (name == index.task and kind is None):
        return index
    return replace(index, task=name, kind=kind, defaults=family.defaults if family else index.defaults)


def _refuse_task(name: str, task: str | None) -> None:
    if task is not None:
        raise UsageError(f"`task` {task}, and the source is of {name}", "a model", "leave `task` out")


def _model_sizes(plans: dict[str, tuple[Sizes, ComponentPlan]]) -> configs.ModelSizes | None:
    """Returns the sizes of a model's networks; None: the plans are of a filter or a component."""
    if "transformer" not in plans:
        return None
    flux, clip, t5, vae = (plans[component][0] for component in COMPONENTS)
    assert isinstance(flux, configs.FluxConfig)
    assert isinstance(clip, configs.CLIPConfig)
    assert isinstance(t5, configs.T5Config)
    assert isinstance(vae, configs.VAEConfig)
    return configs.ModelSizes(flux=flux, t5=t5, clip=clip, vae=vae)


def _own(paths: list[Path]) -> OwnFolder | None:
    """Opens the only source if it is a folder of ours; else returns None."""
    folders = (folder for path in paths if os.path.exists(path) for folder in (path, *path.absolute().parents[:2]))
    ours = next(filter(is_model_folder, folders), None)
    if ours is None:
        return None
    if not os.path.exists(paths[-1]) and not is_repo_id(paths[-1]):
        todo = f"the folder to make is named with `out`: `out` {shlex.quote(str(paths[-1]))}"
        raise ModelError(f"there is nothing at {paths[-1]}", "the model alone", todo)
    if paths != [ours]:
        name = shlex.quote(str(ours))
        raise ModelError(
            f"{ours} is a model folder of ours", "this folder as the only source", f"name it alone: {name}"
        )
    return open_own(ours)


def _label(dtype: str, layers: Layers) -> str:
    """Returns the part of a folder's name that tells its precision, with the type if it is not the usual one.

    Args:
        dtype: type of arrays that are not packed.
        layers: of the transformer.
    """
    quantized = Counter(q for q in layers.values() if q)
    if not quantized:
        return _SHORT[dtype]
    q = quantized.most_common(1)[0][0]
    parts = [f"{q.bits}bit" if q.mode == "affine" else q.mode]
    parts += [f"g{q.group_size}"] if q.mode == "affine" and q.group_size != quantizing.GROUP_SIZE else []
    parts += [f"rank{q.rank}"] if q.rank else []
    return "-".join(parts + ([] if dtype == "bfloat16" else [_SHORT[dtype]]))


def _groups(component: str, plan: ComponentPlan, dtype: str, layers: Layers) -> list[Group]:
    """Returns the groups of a component in the order of its tensors, without their errors."""
    groups: dict[str, list] = {}
    for target in plan.targets:
        groups.setdefault(quantizing.group_of(component, target.name), []).append(target)
    return [
        Group(
            component=component,
            name=name,
            stored=stored_as(dtype, {t.name: quantizing.layer_of(t, layers) for t in targets}),
            parameters=sum(math.prod(t.shape) for t in targets),
            bytes=sum(quantizing.count_bytes(t, dtype, quantizing.layer_of(t, layers)) for t in targets),
            error=None,
        )
        for name, targets in groups.items()
    ]


def stored_as(dtype: str, layers: Layers) -> str:
    """Describes how most quantized layers are stored, and the type of the others."""
    quantized = Counter(q for q in layers.values() if q)
    return f"{quantized.most_common(1)[0][0]}, {dtype}" if quantized else dtype


def roots(components: dict[str, SourceComponent]) -> list[Path]:
    """Returns the folders in which the licence of the transformer, of a filter or of a component may lie."""
    source = list(components.values())[-1 if "image_embedder" in components else 0].source
    return [source.folder.parent, source.folder] if source.component else [source.folder]
