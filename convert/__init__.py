"""The converter: any known layout of the weights into a model folder (`mlx_flux_krea.weights` documents the format).

    from mlx_flux_krea.convert import convert
    convert(["black-forest-labs/FLUX.1-Krea-dev"], "models/krea-8bit", quantize="8")

The two networks of the content filters are converted alike, into folders of the same form.

sources opens files, decode knows their types, layouts recognises them, maps names their tensors, remap puts tensors
together; own does all of it for folders of ours. quantize chooses bits, index, tokenizers and licence add what weights
do not say, write stores it. hub and fetch are for sources that are on the Hugging Face hub.
"""

import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_flux_krea import __version__
from mlx_flux_krea import config as configs
from mlx_flux_krea.errors import ModelError, UsageError, printable
from mlx_flux_krea.filters.config import NSFW_SHA256, FilterIndex
from mlx_flux_krea.weights import COMPONENTS, DTYPES, FILTERS, KINDS, home, layer_widths

from . import quantize as quantizing
from . import write
from .fetch import Fetching, Remote, outlined
from .hub import cache_folder, is_repo_id
from .index import make_filter_index, make_index
from .layouts import Found, identify, make_plan
from .licence import licence_files
from .own import Own, open_own
from .quantize import Layers
from .remap import Plan
from .sources import is_model_folder, open_sources
from .tokenizers import find_tokenizers

__all__ = ["Component", "Group", "Outline", "Report", "convert", "examine"]
Losses = dict[str, dict[str, tuple[float, float]]]  # of each component, what `write.write_component` returns
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# the type, and the recipe of those who ask for what suits
_DEFAULTS = {"model": ("bfloat16", "8"), "nsfw": ("float32", "none"), "pixtral": ("bfloat16", "4")}
_KEPT = "what the source has in as few bits or fewer stays as it is"


@dataclass(frozen=True)
class Component:
    """What one component was made of."""

    name: str
    layout: str
    files: tuple[str, ...]
    parameters: int
    bytes: int
    stored: str  # how most of it is
    dropped: tuple[tuple[str, str], ...]  # tensors left out on purpose, with the reason
    lost: tuple[tuple[str, str], ...]  # tensors that are not to be had, with the reason; zeros stand there
    left: tuple[tuple[str, str], ...]  # layers not quantized although the recipe has them, with the reason


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
class Report:
    """What a conversion did."""

    path: Path
    base: str
    dtype: str
    quantize: str
    components: tuple[Component, ...]
    groups: tuple[Group, ...]  # the one that lost most comes first
    notes: tuple[str, ...]


def convert(
    sources: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    dtype: str | None = None,
    quantize: str | None = "none",
    group_size: int | None = None,
    tokenizers: str | Path | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    offline: bool = False,
    discard_source: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    placing: Callable[[], AbstractContextManager] = nullcontext,
) -> Report:
    """Converts what the sources hold into a model folder.

    Args:
        sources: a folder (diffusers', ComfyUI's, mflux's, or a model folder of ours), an all-in-one file, or the
            files of the components one by one; or a filter: the classifier ViT or Pixtral, as published. Or any of it
            on the Hugging Face hub, as OWNER/NAME.
        out: the model folder to make; None: in the home folder (`weights.home`), models/NAME-RECIPE or filters/NAME.
        dtype: of every array that is not packed, and of scales: "bfloat16", "float16" or "float32"; None: bfloat16.
            The classifier is kept in float32.
        quantize: a row of `quantize.RECIPES`; None: what suits, "8", or "4" of Pixtral. The classifier is never
            quantized, nor is Pixtral's vision tower.
        group_size: how many numbers share a scale, where a recipe leaves the choice: 32, 64 or 128; None: 64.
        tokenizers: a folder with `tokenizer` and `tokenizer_2` (or `clip` and `t5`), where the sources have none.
        force: an existing model folder is replaced, once the new one is complete; nothing else ever is, nor a folder
            with files in it that the converter did not write.
        allow_nonfinite: weights may hold NaN and infinities, where nothing is quantized.
        offline: of the hub, only what is in its cache.
        discard_source: weights that are fetched from the hub are deleted as soon as they are converted.
        progress: called with the component at work, the bytes written so far and in all; or with "fetching" or
            "checking", and the bytes that are here of what comes from the hub.
        placing: gives the context in which the complete folder takes its name, for callers who handle signals.

    Raises:
        UsageError: an option or the target cannot be used, or options do not go together.
        ModelError: a source is missing, not to be had, damaged, incomplete or of another kind.
        ResourceError: not enough disk.
    """
    if dtype not in (None, *DTYPES):
        raise UsageError(f'no type is called "{dtype}"', f"one of {', '.join(DTYPES)}")
    quantizing.find_recipe(quantize or "8", group_size)
    if allow_nonfinite and quantize != "none":
        raise UsageError("NaN and infinities are allowed, and quantizing erases them", "one of both", "add -q none")
    if discard_source and not all(map(is_repo_id, sources)):
        raise UsageError("--discard-source is for what is fetched", "sources on the hub alone", "leave it out")
    if discard_source and offline:
        raise UsageError("--offline fetches nothing that --discard-source could delete", "one of both")
    with outlined(sources, offline, progress) as remote:
        job = _decide(remote.paths, out, dtype, quantize, group_size, tokenizers)
        index, losses = _write(job, remote, force, allow_nonfinite, discard_source, progress, placing)
    return _report(job, index, losses)


@dataclass(frozen=True)
class _Job:
    """All that is decided before a weight is read; by component, where there are several."""

    kind: str  # "model", or which filter
    own: Own | None
    found: dict[str, Found]
    plans: dict[str, tuple[object, Plan]]  # its sizes, and how its tensors come about
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
        return _stored(self.dtype, self.layers[component])


def _decide(
    paths: list[Path], out, dtype: str | None, quantize: str | None, group_size: int | None, tokenizers
) -> _Job:
    """What the sources are, and what will be made of them."""
    own, found, plans, index = _understand(paths)
    kind = next((name for name in found if name in FILTERS), "model")
    dtype, quantize = dtype or _DEFAULTS[kind][0], quantize or _DEFAULTS[kind][1]
    if kind == "nsfw" and (dtype, quantize) != _DEFAULTS[kind]:
        raise UsageError(f"the classifier in {dtype}, -q {quantize}", "float32, -q none", "leave --dtype and -q out")
    recipe = quantizing.find_recipe(quantize, group_size)
    place = Path("models", f"{index.name}-{_label(recipe, dtype)}") if kind == "model" else Path("filters", kind)
    path = Path(os.path.expanduser(out)) if out else home() / place
    tokens = find_tokenizers(found, plans, tokenizers)
    layers, left, notes = {}, {}, ()
    for name, (config, _) in plans.items():
        layers[name], left[name] = quantizing.choose(name, layer_widths(name, config), recipe)
        if name == "pixtral":
            asked, layers[name] = layers[name], quantizing.keep_packed(plans[name][1], layers[name])
            notes += (f"-q {quantize}: {_KEPT}",) if asked != layers[name] else ()
    groups = {name: _groups(name, plan, dtype, layers[name]) for name, (_, plan) in plans.items()}
    return _Job(kind, own, found, plans, index, path, dtype, recipe, tokens, layers, left, groups, notes)


def _write(
    job: _Job, remote: Remote, force: bool, allow_nonfinite: bool, discard: bool, progress: Callable | None, placing
) -> tuple[configs.ModelIndex | FilterIndex, Losses]:
    """Makes the folder, the smallest component first, while files of those after it may still come.

    Returns:
        The index with what it was made from, and what quantizing lost.
    """
    target = _resolved(job.path)
    total = sum(map(job.bytes, job.plans))
    files = {name: found.source.files for name, found in job.found.items()}
    sizes = {file: file.stat().st_size for some in files.values() for file in some}
    order = sorted(job.plans, key=lambda name: sum(sizes[file] for file in files[name]))
    last = {file: name for name in order for file in files[name]}  # who needs a file last
    coming = {file: remote.files[file] for file in last if file in remote.files}
    written, losses = 0, {}
    with (
        write.new_folder(target, force, [*remote.paths, *sizes], placing) as folder,
        write.hashing(file for file in sizes if file not in coming) as hashes,
        Fetching(coming, keep=not discard) as fetching,
    ):
        hashes |= fetching.hashes
        to_fetch = [fetching.left(file for file in last if last[file] == name) for name in order]
        _check_disk(target, to_fetch, [job.bytes(name) for name in order], discard)
        fetching.start()
        for component in order:
            config, plan = job.plans[component]
            fetching.wait(files[component], progress)

            def done(count: int, component: str = component) -> None:
                nonlocal written
                written += count
                if progress:
                    progress(component, written, total)

            losses[component] = write.write_component(
                folder,
                component,
                configs.to_json(config),
                plan,
                job.dtype,
                job.layers[component],
                done,
                allow_nonfinite,
            )
            fetching.discard(file for file in files[component] if last[file] == component)
        for name, data in job.tokens.items():
            folder.write(name, [data])
        if job.own:
            job.own.check({file: hashes[file].result() for file in sizes})
        records = tuple(
            configs.Source(name, hashes[file].result(), sizes[file], layout)
            for file, (name, layout) in _records(job.found).items()
        )
        before = job.own.index.source if job.own else ()
        index = replace(job.index, source=before + records, converter=__version__)
        stored = [f"{name}: {job.stored(name)}" for name in job.plans]
        for name, data in licence_files(index, _roots(job.found), stored).items():
            folder.write(name, [data])
        if progress:
            progress("reading back", total, total)
        class_name = next(name for name, (_, networks) in KINDS.items() if set(networks) == set(job.plans))
        folder.finish({"_class_name": class_name, **configs.to_json(index)})
    return index, losses


def _report(job: _Job, index: configs.ModelIndex | FilterIndex, losses: Losses) -> Report:
    """What was made of what, and what it lost."""
    components = tuple(
        Component(
            name=name,
            layout=job.found[name].layout.name,
            files=tuple(file.name for file in job.found[name].source.files),
            parameters=plan.parameters,
            bytes=job.bytes(name),
            stored=job.stored(name),
            dropped=plan.dropped,
            lost=plan.lost,
            left=tuple(job.left[name].items()),
        )
        for name, (_, plan) in job.plans.items()
    )
    measured = [replace(g, error=_error(g, losses[name])) for name in job.plans for g in job.groups[name]]
    measured.sort(key=lambda group: -1 if group.error is None else group.error, reverse=True)
    notes = job.notes + (_more_bits(job.own.layers, job.layers) if job.own else ())
    notes += tuple(f"{g.name}: {g.stored} lost {g.error:.0%} of it; take more bits" for g in measured if _is_bad(g))
    if job.kind == "nsfw" and NSFW_SHA256 not in {source.sha256 for source in index.source}:
        notes += (f"{index.name}: not the published classifier, whose sha256 is {NSFW_SHA256}",)
    return Report(job.path, index.base, job.dtype, job.recipe.quantize, components, tuple(measured), notes)


@dataclass(frozen=True)
class Outline:
    """What a conversion would begin with.

    Attributes:
        index: the facts of the model folder, without the records of its sources.
        sizes: of each component, its config.
        licence: the LICENSE.md that the folder would have; None: none.
        bytes: of all weight files.
        fetch: of them, bytes that would come from the hub.
        made: bytes of the weights in the folder, in each precision.
    """

    index: configs.ModelIndex | FilterIndex
    sizes: dict[str, object]
    licence: bytes | None
    bytes: int
    fetch: int
    made: dict[str, int]

    def target(self, quantize: str) -> Path:
        """Where `convert` puts a model in this precision, and bfloat16."""
        return home() / "models" / f"{self.index.name}-{_label(quantizing.find_recipe(quantize, None), 'bfloat16')}"


def examine(sources: Sequence[str | Path], *, tokenizers: str | Path | None = None, offline: bool = False) -> Outline:
    """Looks at sources as a conversion would, and finds out before it whether it can be done. Reads no weights.

    Arguments and errors are those of `convert`.
    """
    with outlined(sources, offline) as remote:
        _, found, plans, index = _understand(remote.paths)
        find_tokenizers(found, plans, tokenizers)
        files = {file for f in found.values() for file in f.source.files}
        coming = [remote.files[file][1] for file in files if file in remote.files]
        licence = licence_files(index, _roots(found), []).get("LICENSE.md")
        return Outline(
            index=index,
            sizes={name: config for name, (config, _) in plans.items()},
            licence=licence,
            bytes=sum(file.stat().st_size for file in files),
            fetch=sum(file.size - file.here for file in coming),
            made={quantize: _made_bytes(plans, quantize) for quantize in quantizing.RECIPES},
        )


def _made_bytes(plans: dict[str, tuple[object, Plan]], quantize: str) -> int:
    """Of the weights in a folder with the usual type of such a folder."""
    count = 0
    for name, (config, plan) in plans.items():
        layers, _ = quantizing.choose(name, layer_widths(name, config), quantizing.Recipe(quantize))
        dtype = _DEFAULTS.get(name, _DEFAULTS["model"])[0]
        count += sum(quantizing.count_bytes(t, dtype, quantizing.layer_of(t, layers)) for t in plan.targets)
    return count


def _understand(paths: list[Path]) -> tuple[Own | None, dict[str, Found], dict[str, tuple[object, Plan]], object]:
    """Sources as a folder of ours or not, the layout and the plan of every component, and the facts of the whole."""
    if own := _own(paths):
        return own, own.found, own.plans, own.index
    found = _components(paths)
    plans = {component: make_plan(f) for component, f in found.items()}
    if "transformer" not in found:
        (name,) = found
        return None, found, plans, make_filter_index(found[name], plans[name][0])
    configs.check_parts(*(plans[name][0] for name in ("transformer", "text_encoder_2", "text_encoder", "vae")))
    return None, found, plans, make_index(found, plans["transformer"][0])


def _check_disk(target: Path, to_fetch: list[int], made: list[int], discard: bool) -> None:
    """Refuses where a disk cannot hold what is fetched and made of it, component by component."""
    need, cache = sum(made) + 2**26, cache_folder()
    todo = "choose another disk with -o"
    if sum(to_fetch):
        todo += " or HF_HOME" + ("" if discard else ", or add --discard-source")
        if os.stat(write.existing(cache)).st_dev != os.stat(write.existing(target)).st_dev:
            write.check_disk(cache, sum(to_fetch), "choose another disk with HF_HOME")
        elif discard:  # while one is made, those after it may already be here
            need += max(sum(to_fetch[i:]) - sum(made[i + 1 :]) for i in range(len(made)))
        else:
            need += sum(to_fetch)
    write.check_disk(target, need, todo)


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
            stored=_stored(dtype, {t.name: quantizing.layer_of(t, layers) for t in targets}),
            parameters=sum(math.prod(t.shape) for t in targets),
            bytes=sum(quantizing.count_bytes(t, dtype, quantizing.layer_of(t, layers)) for t in targets),
            error=None,
        )
        for name, targets in groups.items()
    ]


def _stored(dtype: str, layers: Layers) -> str:
    """How most of the layers that are quantized are stored; what is not quantized is of the type."""
    quantized = Counter(q for q in layers.values() if q)
    return f"{quantized.most_common(1)[0][0]}, {dtype}" if quantized else dtype


def _error(group: Group, losses: dict[str, tuple[float, float]]) -> float | None:
    lost = [loss for name, loss in losses.items() if quantizing.group_of(group.component, name) == group.name]
    return math.sqrt(sum(error for error, _ in lost) / max(sum(all_ for _, all_ in lost), 1e-30)) if lost else None


def _more_bits(before: dict[str, Layers], after: dict[str, Layers]) -> tuple[str, ...]:
    """Where a model of ours gets more bits than it had."""
    more = [
        name
        for name, layers in before.items()
        if any(q and (after[name][path] is None or after[name][path].bits > q.bits) for path, q in layers.items())
    ]
    return tuple(f"{name}: more bits than the source has; what quantizing lost does not come back" for name in more)


def _is_bad(group: Group) -> bool:
    """Beyond what any recipe loses of weights like those that are published; 3 bits lose a fifth."""
    return group.error is not None and group.error > 0.3


def _roots(found: dict[str, Found]) -> list[Path]:
    """Folders in which the licence of the transformer, or of a filter, may lie."""
    source = next(iter(found.values())).source
    return [source.folder.parent, source.folder] if source.component else [source.folder]


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


def _resolved(path: Path) -> Path:
    target = os.path.realpath(path)  # what Path.resolve raises for links in a circle differs between versions
    try:
        target.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the name {printable(target)} is not UTF-8", "one that is", "choose with -o") from None
    return Path(target)


def _records(found: dict[str, Found]) -> dict[Path, tuple[str, str]]:
    """What every file is called, and its layout; an all-in-one file has several."""
    records: dict[Path, tuple[str, str]] = {}
    for f in found.values():
        for file in f.source.files:
            name = f"{file.parent.name}/{file.name}" if f.source.component else file.name
            before = f"{records[file][1]}; " if file in records else ""
            records[file] = (name, before + f.layout.name)
    return records
