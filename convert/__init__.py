"""The converter: writes a model folder from weights in any known layout (`mlx_flux_krea.weights` documents the format).

    from mlx_flux_krea.convert import convert
    convert(["black-forest-labs/FLUX.1-Krea-dev"], "models/krea-8bit", quantize="8")

The two networks of the content filters are converted in the same way, into folders of the same form, and so are those
of Redux and the depth network.

    walk, sets, sources      find checkpoints below a path, group their files, and open them
    gguf_header              reads the header of a GGUF file
    choose                   the source of each component
    tensors, formats         stored tensors, weights in several of them, and statements about them
    svdq, unpack             nunchaku's layers
    packing                  packed weights that go over unchanged
    decode                   the types in which files store numbers
    layouts, lookalikes      the known layouts, and other models that are refused
    identify                 the networks in a file
    fit, sizes, maps         sizes of a network, and names of its tensors
    remap, own               plan every tensor of ours: from a foreign layout, or from a folder of ours
    hub, fetch               files on the Hugging Face hub
    quantize                 the recipes
    filters                  whether a filter is the published one
    tasks                    what a transformer reads besides a prompt
    index, tokenizers, licence     facts and files that weights do not contain
    job                      all decisions, taken before a weight is read
    room                     disk space that conversions take
    gptq, blockwise          rounds the layers of a transformer by the inputs that they have
    reading, write, folder   read the weights, write shards, give the complete folder its name
"""

from . import checkout  # noqa: F401  # first, since imports from another checkout may fail with any message

# isort: split

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mlx_flux_krea import __version__
from mlx_flux_krea.errors import UsageError, printable
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.models.filter_config import FilterIndex
from mlx_flux_krea.presets import GPTQ
from mlx_flux_krea.weights import CLASS_NAMES, DTYPES
from mlx_flux_krea.worker import limit_cache

from . import quantize as quantizing
from .blockwise import Gptq, Rounding
from .evidence import confirm
from .fetch import Fetching, Remote, outlined
from .filters import check_sizes, describe, published_by, with_weights
from .folder import NewFolder, check_disk, new_folder
from .hub import cache_folder, is_repo_id
from .index import make_index
from .job import Conversion, Group, Outline, decide, examine, roots, writing_order
from .layouts import SourceComponent
from .licence import licence_files
from .quantize import Layers
from .reading import Reading
from .room import Room, shares_disk
from .write import write_component

__all__ = ["Component", "Gptq", "Group", "Outline", "Report", "convert", "examine"]
Losses = dict[str, dict[str, tuple[float, float]]]  # by component: the result of `write_component`


@dataclass(frozen=True)
class Component:
    """A component of a conversion's report."""

    name: str
    layout: str
    files: tuple[str, ...]
    parameters: int
    bytes: int
    stored: str  # how most of its layers are
    dropped: tuple[tuple[str, str], ...]  # tensors left out on purpose, with the reason
    lost: tuple[tuple[str, str], ...]  # tensors that the source lacks, with the reason; they are zero
    left: tuple[tuple[str, str], ...]  # layers not quantized although the recipe has them, with the reason


@dataclass(frozen=True)
class Report:
    """The report of a conversion."""

    path: Path
    base: str
    dtype: str
    quantize: str
    components: tuple[Component, ...]
    groups: tuple[Group, ...]  # the largest loss first
    notes: tuple[str, ...]
    task: str = ""  # of a model, with the kind of a control model's maps
    gptq: bool = False


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
    allow_unknown_filter: bool = False,
    task: str | None = None,
    gptq: Gptq | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    placing: Callable[[], AbstractContextManager] = nullcontext,
) -> Report:
    """Converts sources into a model folder.

    Args:
        sources: a folder (diffusers', ComfyUI's, mflux's, or a model folder of ours), an all-in-one file, or the
            files of the components one by one; or a filter: the classifier ViT or Pixtral, as published; or FLUX.1
            Redux, a pipeline folder or its file and SigLIP's; or the depth network, Depth Anything V2 Small. Each may
            also be a repository on the Hugging Face hub, OWNER/NAME, or one file of it, OWNER/NAME:FILE. Trees of
            other programs are searched. Of several sources of a component the later one counts.
        out: the new model folder; None: in the home folder (`home.root`), models/NAME-RECIPE, filters/NAME or
            components/redux or components/depth.
        dtype: type of arrays that are not packed, and of scales: "bfloat16", "float16" or "float32"; None: bfloat16.
            The classifier and the depth network are always stored in float32.
        quantize: a row of `quantize.RECIPES`; None: "8", and "4" for Pixtral. The classifier is never quantized, nor is
            Pixtral's vision tower, nor Redux, nor the depth network.
        group_size: how many numbers share a scale, if the recipe leaves the choice: 32, 64 or 128; None: 64.
        tokenizers: a folder with `tokenizer` and `tokenizer_2` (or `clip` and `t5`), if the sources have none.
        force: replace an existing model folder once the new one is complete. Other folders are never replaced, nor a
            model folder with files in it that the converter did not write.
        allow_nonfinite: accept NaN and infinities in weights; only without quantization.
        offline: use only the hub's cache.
        discard_source: delete weights that were fetched from the hub as soon as they are converted.
        allow_unknown_filter: accept a filter that is not one of the published files; its folder says so, and so does
            the log of every run with it.
        task: what the transformer reads besides a prompt, where its files do not say it: "text-to-image", "kontext",
            "fill", "control", or "canny" or "depth" for a control model of that kind; None: found out.
        gptq: rounds the blocks of the transformer by the inputs that this collects, so that a step's error falls by a
            third (`blockwise`); for 4 and 3 bits, from a model folder in 16 bits. It takes hours, and after any end
            the same call continues. None: each number is rounded for itself.
        progress: called with a label, the bytes done and all bytes. The label is the name of the component being
            written, "fetching" or "checking" (files from the hub), or at last "reading back" (the folder). Calls come
            from several threads, one at a time. With `gptq`, "rounding" comes with inputs of layers instead of bytes.
        placing: returns the context in which the complete folder takes its name, for callers who handle signals.

    Raises:
        UsageError: an option or the target cannot be used, or options exclude each other.
        ModelError: a source is missing, out of reach, damaged, incomplete or of another kind.
        ResourceError: not enough disk.
    """
    if dtype not in (None, *DTYPES):
        raise UsageError(f'no type is called "{dtype}"', f"one of {', '.join(DTYPES)}")
    quantizing.find_recipe(quantize or "8", group_size)
    if allow_nonfinite and quantize != "none":
        raise UsageError(
            "NaN and infinities are allowed, and quantizing erases them", "one of both", "set `quantize` to none"
        )
    if discard_source and not all(map(is_repo_id, sources)):
        raise UsageError("`discard_source` is only for fetched files", "only sources on the hub", "leave it out")
    if discard_source and offline:
        raise UsageError("`offline` fetches nothing that `discard_source` could delete", "one of both")
    with outlined(sources, offline, progress) as remote:
        job = decide(remote, out, dtype, quantize, group_size, tokenizers, task)
        if not allow_unknown_filter:
            check_sizes(job)
        rounding = Rounding(job, gptq) if gptq else None
        if rounding and not out:
            job = replace(job, path=job.path.with_name(f"{job.path.name}-{GPTQ.lower()}"))
        progress = progress or (lambda *_: None)
        index, losses = _write(
            job,
            remote,
            force,
            allow_nonfinite,
            discard_source,
            allow_unknown_filter,
            offline,
            progress,
            placing,
            rounding,
        )
    return _report(job, index, losses, rounding)


def _write(
    job: Conversion,
    remote: Remote,
    force: bool,
    allow_nonfinite: bool,
    discard: bool,
    allow_unknown: bool,
    offline: bool,
    progress: Callable,
    placing,
    rounding: Rounding | None,
) -> tuple[configs.ModelIndex | configs.ComponentIndex, Losses]:
    """Writes the folder, the smallest component first, while files of later ones may still be fetched.

    Returns:
        The index with its sources, and the losses of quantization.
    """
    limit_cache()
    target = _resolved(job.path)
    total = sum(map(job.bytes, job.plans))
    files = {name: component.source.files for name, component in job.components.items()}
    sizes = {file: file.stat().st_size for some in files.values() for file in some}
    order, last = writing_order(job.components)
    coming = {file: remote.files[file] for file in last if file in remote.files}
    hashes, written, losses = {}, 0, {}
    with (
        rounding.working() if rounding else nullcontext(),
        new_folder(target, force, [*remote.paths, *sizes], placing) as folder,
        Reading(file for file in sizes if file not in coming) as reading,
        Fetching(coming, keep=not discard) as fetching,
    ):
        to_fetch = tuple(fetching.left(file for file in last if last[file] == name) for name in order)
        room = Room(to_fetch, tuple(job.bytes(name) for name in order))
        _check_disk(target, room, discard)
        plans = job.plans
        if rounding:
            rounding.check_disk(target, room.needs(discard=discard, shared=True)[0])
            plans = plans | {"transformer": (plans["transformer"][0], rounding.plan(progress))}
        fetching.start()
        for component in order:
            config, plan = plans[component]
            fetching.wait(files[component], progress)

            def done(count: int, component: str = component) -> None:
                nonlocal written
                written += count
                progress(component, written, total)

            losses[component] = write_component(
                folder,
                component,
                configs.to_json(config),
                plan,
                job.dtype,
                job.layers[component],
                reading,
                done,
                allow_nonfinite,
            )
            for file in (file for file in files[component] if last[file] == component):
                hashes[file] = reading.finish(file) or fetching.hashes[file].result()
                fetching.discard([file])
        losses["transformer"] = losses.get("transformer", {}) | (rounding.losses if rounding else {})
        index = _write_rest(job, remote, folder, hashes, sizes, allow_unknown, offline, rounding)
        facts = {"_class_name": CLASS_NAMES[job.kind], **configs.to_json(index)}
        folder.finish(facts, partial(progress, "reading back"))
    return index, losses


def _write_rest(
    job: Conversion,
    remote: Remote,
    folder: NewFolder,
    hashes: dict[Path, str],
    sizes: dict[Path, int],
    allow_unknown: bool,
    offline: bool,
    rounding: Rounding | None,
) -> configs.ModelIndex | configs.ComponentIndex:
    """Writes tokenizers and licence; returns the index, with the records of all sources, for `NewFolder.finish`."""
    for name, data in job.tokens.items():
        folder.write(name, data)
    if job.own:
        job.own.check(hashes)
    index, published = job.index, {}
    if (
        job.evidence and job.flux and job.task
    ):  # the hashes are known now, and may prove that the transformer is [schnell]
        files = job.components["transformer"].source.files
        evidence, published = confirm(job.evidence, [hashes[file] for file in files], offline)
        index = make_index(job.components, job.flux, evidence, job.task)
    if job.kind == "pixtral" and not job.own:
        published = published_by(hashes.values(), remote, offline)
    records = tuple(
        configs.SourceFile(name, hashes[file], sizes[file], layout, published.get(hashes[file], ""))
        for file, (name, layout) in _records(job.components).items()
    )
    before = job.own.index.source if job.own else ()
    is_by_gptq = rounding or (job.own and job.own.is_by_gptq and job.layers == job.own.layers)
    index = replace(index, source=before + records, converter=f"{__version__}, {GPTQ}" if is_by_gptq else __version__)
    if isinstance(index, FilterIndex):
        index = with_weights(index, job.kind, allow_unknown=allow_unknown)
    stored = [f"{name}: {job.stored(name)}" for name in job.plans]
    if is_by_gptq:
        stored.append(f"blocks of the transformer: rounded by {GPTQ}, with the inputs that they have for some prompts")
    for name, data in licence_files(index, roots(job.components), stored).items():
        folder.write(name, data)
    return index


def _report(
    job: Conversion, index: configs.ModelIndex | configs.ComponentIndex, losses: Losses, rounding: Rounding | None
) -> Report:
    """Returns the report of a conversion."""
    components = tuple(
        Component(
            name=name,
            layout=job.components[name].layout.name,
            files=tuple(file.name for file in job.components[name].source.files),
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
    notes += (rounding.note(),) if rounding else ()
    if isinstance(index, FilterIndex) and index.weights == "unknown":
        notes += (f"{index.name}: an unknown filter, and not {describe(job.kind)}; the log of every run will say so",)
    return Report(
        path=job.path,
        base=index.base,
        dtype=job.dtype,
        quantize=job.recipe.quantize,
        components=components,
        groups=tuple(measured),
        notes=notes,
        task=index.task_and_kind if isinstance(index, configs.ModelIndex) else "",
        gptq=rounding is not None,
    )


def _check_disk(target: Path, room: Room, discard: bool) -> None:
    """Refuses if a disk cannot hold the fetched files and the folder, component by component."""
    todo, shared = "choose another disk with `out`", shares_disk(target)
    if sum(room.to_fetch):
        todo += " or HF_HOME" + ("" if discard else ", or add `discard_source`")
    need, apart = room.needs(discard=discard, shared=shared)
    if apart:
        check_disk(cache_folder(), apart, "choose another disk with HF_HOME")
    check_disk(target, need, todo)


def _error(group: Group, losses: dict[str, tuple[float, float]]) -> float | None:
    lost = [loss for name, loss in losses.items() if quantizing.group_of(group.component, name) == group.name]
    return math.sqrt(sum(error for error, _ in lost) / max(sum(all_ for _, all_ in lost), 1e-30)) if lost else None


def _more_bits(before: dict[str, Layers], after: dict[str, Layers]) -> tuple[str, ...]:
    """Returns notes on networks of a folder of ours that get more bits than they had."""
    more = [
        name
        for name, layers in before.items()
        if any(q and not quantizing.has_fewer_bits(after[name][path], q) for path, q in layers.items())
    ]
    return tuple(f"{name}: more bits than the source has; precision that was lost does not come back" for name in more)


def _is_bad(group: Group) -> bool:
    """Tells if a group lost more than any recipe does with published weights; 3 bits lose a fifth."""
    return group.error is not None and group.error > 0.3


def _resolved(path: Path) -> Path:
    target = os.path.realpath(path)  # Path.resolve raises different errors for circular links in different Pythons
    try:
        target.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the name {printable(target)} is not UTF-8", "one that is", "choose one with `out`") from None
    return Path(target)


def _records(components: dict[str, SourceComponent]) -> dict[Path, tuple[str, str]]:
    """Returns name and layout of every file; an all-in-one file has several layouts."""
    records: dict[Path, tuple[str, str]] = {}
    for component in components.values():
        for file in component.source.files:
            name = f"{file.parent.name}/{file.name}" if component.source.component else file.name
            before = f"{records[file][1]}; " if file in records else ""
            records[file] = (name, before + component.layout.name)
    return records
