"""What a conversion begins with: what the sources are, what will be made of them and how. No weight is read for it."""

import math
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_flux_krea import home
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.licence import requires_filters
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.models.filter_config import FilterIndex
from mlx_flux_krea.weights import COMPONENTS, FILTERS, Sizes, layer_widths

from . import quantize as quantizing
from .fetch import outlined
from .index import make_filter_index, make_index
from .layouts import Found, identify, make_plan
from .licence import licence_files
from .own import Own, open_own
from .quantize import Layers
from .remap import Plan
from .sources import is_model_folder, open_sources
from .tokenizers import find_tokenizers

Index = configs.ModelIndex | FilterIndex
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# the type, and the recipe of those who ask for what suits
_DEFAULTS = {"model": ("bfloat16", "8"), "nsfw": ("float32", "none"), "pixtral": ("bfloat16", "4")}
_KEPT = "what the source has in as few bits or fewer stays as it is"


@dataclass(frozen=True)
class Group:
    """Layers of a kind: how they are stored, and what that lost."""

    component: str
    name: str
    stored: str
    parameters: int
    bytes: int
    error: float | None  # ||stored - source|| / ||source|| over the quantized layers, from up to 256 rows of each


@dataclass(frozen=True)
class Job:
    """All that is decided before a weight is read; by component, where there are several."""

    kind: str  # "model", or which filter
    own: Own | None
    found: dict[str, Found]
    plans: dict[str, tuple[Sizes, Plan]]  # its sizes, and how its tensors come about
    index: configs.ModelIndex | FilterIndex
    path: Path
    dtype: str
    recipe: quantizing.Recipe
    tokens: dict[str, bytes]  # the tokenizers' files
    layers: dict[str, Layers]
    left: dict[str, dict[str, str]]  # layers not quantized although the recipe has them, and why
    groups: dict[str, list[Group]]
    notes: tuple[str, ...]

    def bytes(self, component: str) -> int:
        """Of all its tensors, as they will be stored."""
        return sum(group.bytes for group in self.groups[component])

    def stored(self, component: str) -> str:
        """How most of it will be stored."""
        return stored_as(self.dtype, self.layers[component])


def decide(paths: list[Path], out, dtype: str | None, quantize: str | None, group_size: int | None, tokenizers) -> Job:
    """What the sources are, and what will be made of them."""
    own, found, plans, index = _understand(paths)
    kind = next((name for name in found if name in FILTERS), "model")
    dtype, quantize = dtype or _DEFAULTS[kind][0], quantize or _DEFAULTS[kind][1]
    if kind == "nsfw" and (dtype, quantize) != _DEFAULTS[kind]:
        raise UsageError(f"the classifier in {dtype}, -q {quantize}", "float32, -q none", "leave --dtype and -q out")
    recipe = quantizing.find_recipe(quantize, group_size)
    place = (home.MODELS, f"{index.name}-{_label(recipe, dtype)}") if kind == "model" else (home.FILTERS, kind)
    path = Path(os.path.expanduser(out)) if out else home.path(*place)
    tokens = find_tokenizers(found, plans, tokenizers)
    layers, left, notes = {}, {}, ()
    for name, (config, _) in plans.items():
        layers[name], left[name] = quantizing.choose(name, layer_widths(name, config), recipe)
        if name == "pixtral":
            asked, layers[name] = layers[name], quantizing.keep_packed(plans[name][1], layers[name])
            notes += (f"-q {quantize}: {_KEPT}",) if asked != layers[name] else ()
    groups = {name: _groups(name, plan, dtype, layers[name]) for name, (_, plan) in plans.items()}
    return Job(kind, own, found, plans, index, path, dtype, recipe, tokens, layers, left, groups, notes)


@dataclass(frozen=True)
class Outline:
    """What a conversion would begin with.

    Attributes:
        index: the facts of the model folder, without the records of its sources.
        sizes: of the four networks of a model; None: a filter.
        licence: the LICENSE.md that the folder would have; None: none.
        bytes: of all weight files.
        fetch: of them, bytes that would come from the hub.
        made: bytes of the weights in the folder, in each precision.
    """

    index: configs.ModelIndex | FilterIndex
    sizes: configs.ModelSizes | None
    licence: bytes | None
    bytes: int
    fetch: int
    made: dict[str, int]

    @property
    def requires_filters(self) -> bool:
        """True where the model's licence demands filters or review."""
        if not isinstance(self.index, configs.ModelIndex) or self.sizes is None:
            return False
        return requires_filters(self.sizes.flux.architecture, self.index.filters)

    def target(self, quantize: str) -> Path:
        """Where `convert` puts a model in this precision, and bfloat16."""
        return home.path(home.MODELS, f"{self.index.name}-{_label(quantizing.find_recipe(quantize, None), 'bfloat16')}")


def examine(sources: Sequence[str | Path], *, tokenizers: str | Path | None = None, offline: bool = False) -> Outline:
    """Looks at sources as a conversion would, and finds out before it whether it can be done. Reads no weights.

    Arguments and errors are those of `convert`.
    """
    with outlined(sources, offline) as remote:
        _, found, plans, index = _understand(remote.paths)
        find_tokenizers(found, plans, tokenizers)
        files = {file for f in found.values() for file in f.source.files}
        coming = [remote.files[file][1] for file in files if file in remote.files]
        licence = licence_files(index, roots(found), []).get("LICENSE.md")
        return Outline(
            index=index,
            sizes=_model_sizes(plans),
            licence=licence,
            bytes=sum(file.stat().st_size for file in files),
            fetch=sum(file.size - file.here for file in coming),
            made={quantize: _made_bytes(plans, quantize) for quantize in quantizing.RECIPES},
        )


def _made_bytes(plans: dict[str, tuple[Sizes, Plan]], quantize: str) -> int:
    """Of the weights in a folder with the usual type of such a folder."""
    count = 0
    for name, (config, plan) in plans.items():
        layers, _ = quantizing.choose(name, layer_widths(name, config), quantizing.Recipe(quantize))
        dtype = _DEFAULTS.get(name, _DEFAULTS["model"])[0]
        count += sum(quantizing.count_bytes(t, dtype, quantizing.layer_of(t, layers)) for t in plan.targets)
    return count


def _understand(paths: list[Path]) -> tuple[Own | None, dict[str, Found], dict[str, tuple[Sizes, Plan]], Index]:
    """Sources as a folder of ours or not, the layout and the plan of every component, and the facts of the whole."""
    if own := _own(paths):
        return own, own.found, own.plans, own.index
    found = _components(paths)
    plans = {component: make_plan(f) for component, f in found.items()}
    sizes = _model_sizes(plans)
    if sizes is None:
        (name,) = found
        return None, found, plans, make_filter_index(found[name], plans[name][0])
    sizes.check()
    return None, found, plans, make_index(found, sizes.flux)


def _model_sizes(plans: dict[str, tuple[Sizes, Plan]]) -> configs.ModelSizes | None:
    """Returns the sizes of a model's networks; None: the plans are of a filter."""
    if "transformer" not in plans:
        return None
    flux, clip, t5, vae = (plans[component][0] for component in COMPONENTS)
    assert isinstance(flux, configs.FluxConfig)
    assert isinstance(clip, configs.CLIPConfig)
    assert isinstance(t5, configs.T5Config)
    assert isinstance(vae, configs.VAEConfig)
    return configs.ModelSizes(flux=flux, t5=t5, clip=clip, vae=vae)


def _own(paths: list[Path]) -> Own | None:
    """The one source, where it is a model folder of ours."""
    folders = (folder for path in paths if os.path.exists(path) for folder in (path, *path.absolute().parents[:2]))
    ours = next(filter(is_model_folder, folders), None)
    if ours is None:
        return None
    if paths != [ours]:
        name = shlex.quote(str(ours))
        raise ModelError(
            f"{ours} is a model folder of ours", "nothing beside it, and all of it", f"name it alone: {name}"
        )
    return open_own(ours)


def _components(paths: list[Path]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for source in open_sources(paths):
        for one in identify(source):
            if one.layout.component in found:
                other = found[one.layout.component].source.path
                raise ModelError(f"{source.path} and {other} are both a {one.layout.component}", "one of each")
            found[one.layout.component] = one
    if found.keys() & FILTERS.keys():
        if len(found) > 1:
            raise ModelError(f"the sources hold {', '.join(found)}", "a model, or one filter alone")
        return found
    missing = [c for c in COMPONENTS if c not in found]
    if missing:
        have = ", ".join(found) or "nothing"
        raise ModelError(f"the sources hold {have}", f"also {', '.join(missing)}", "name the missing files too")
    return {c: found[c] for c in COMPONENTS}


def _label(recipe: quantizing.Recipe, dtype: str) -> str:
    """As the folder is called: a precision that says it all stands alone."""
    if recipe.quantize == "none":
        return _SHORT[dtype]
    return recipe.label if dtype == "bfloat16" else f"{recipe.label}-{_SHORT[dtype]}"


def _groups(component: str, plan: Plan, dtype: str, layers: Layers) -> list[Group]:
    """The groups of a component in the order of its tensors; errors are not known yet."""
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
    """How most of the layers that are quantized are stored; what is not quantized is of the type."""
    quantized = Counter(q for q in layers.values() if q)
    return f"{quantized.most_common(1)[0][0]}, {dtype}" if quantized else dtype


def roots(found: dict[str, Found]) -> list[Path]:
    """Folders in which the licence of the transformer, or of a filter, may lie."""
    source = next(iter(found.values())).source
    return [source.folder.parent, source.folder] if source.component else [source.folder]
