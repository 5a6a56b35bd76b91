"""The converter: any known layout of the weights into a model folder (`mlx_flux_krea.weights` documents the format).

    from mlx_flux_krea.convert import convert
    convert(["black-forest-labs/FLUX.1-Krea-dev"], "models/krea-8bit", quantize="8")

The two networks of the content filters are converted alike, into folders of the same form.

sources opens files, decode knows their types, layouts recognises them, maps names their tensors, remap puts tensors
together; own does all of it for folders of ours; hub and fetch are for what is on the Hugging Face hub. quantize has
the recipes, index, tokenizers and licence add what weights do not say; job holds all that is decided before a weight
is read, reading reads it, write makes the shards, folder gives the whole its name when it is complete and read back.
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
from mlx_flux_krea.models.filter_config import NSFW_SHA256, FilterIndex
from mlx_flux_krea.weights import CLASS_NAMES, DTYPES

from . import quantize as quantizing
from .fetch import Fetching, Remote, outlined
from .folder import Folder, check_disk, existing, new_folder
from .hub import cache_folder, is_repo_id
from .job import Group, Job, Outline, decide, examine, roots
from .layouts import Found
from .licence import licence_files
from .quantize import Layers
from .reading import Reading
from .write import write_component

__all__ = ["Component", "Group", "Outline", "Report", "convert", "examine"]
Losses = dict[str, dict[str, tuple[float, float]]]  # of each component, what `write_component` returns


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
        out: the model folder to make; None: in the home folder (`home.root`), models/NAME-RECIPE or filters/NAME.
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
        progress: called with the component at work, the bytes written so far and in all; with "fetching" or "checking",
            and the bytes that are here of what comes from the hub; at last with "reading back", and the bytes of the
            folder. Not always from the thread of the caller, but never twice at a time.
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
        job = decide(remote.paths, out, dtype, quantize, group_size, tokenizers)
        progress = progress or (lambda *_: None)
        index, losses = _write(job, remote, force, allow_nonfinite, discard_source, progress, placing)
    return _report(job, index, losses)


def _write(
    job: Job, remote: Remote, force: bool, allow_nonfinite: bool, discard: bool, progress: Callable, placing
) -> tuple[configs.ModelIndex | FilterIndex, Losses]:
    """Makes the folder, the smallest component first, while files of those after it may still come.

    Returns:
        The index with what it was made from, and what quantizing lost.
    """
    target = _resolved(job.path)
    total = sum(map(job.bytes, job.plans))
    files = {name: found.source.files for name, found in job.found.items()}
    sizes = {file: file.stat().st_size for some in files.values() for file in some}
    place = {name: min(tensor.start for tensor in found.tensors.values()) for name, found in job.found.items()}
    order = sorted(job.plans, key=lambda name: (sum(sizes[file] for file in files[name]), place[name]))
    last = {file: name for name in order for file in files[name]}  # who needs a file last
    coming = {file: remote.files[file] for file in last if file in remote.files}
    hashes, written, losses = {}, 0, {}
    with (
        new_folder(target, force, [*remote.paths, *sizes], placing) as folder,
        Reading(file for file in sizes if file not in coming) as reading,
        Fetching(coming, keep=not discard) as fetching,
    ):
        to_fetch = [fetching.left(file for file in last if last[file] == name) for name in order]
        _check_disk(target, to_fetch, [job.bytes(name) for name in order], discard)
        fetching.start()
        for component in order:
            config, plan = job.plans[component]
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
        index = _write_rest(job, folder, hashes, sizes)
        facts = {"_class_name": CLASS_NAMES[job.kind], **configs.to_json(index)}
        folder.finish(facts, partial(progress, "reading back"))
    return index, losses


def _write_rest(
    job: Job, folder: Folder, hashes: dict[Path, str], sizes: dict[Path, int]
) -> configs.ModelIndex | FilterIndex:
    """Tokenizers and licence; the index, which is not written yet, with what everything was made from."""
    for name, data in job.tokens.items():
        folder.write(name, data)
    if job.own:
        job.own.check(hashes)
    records = tuple(
        configs.SourceFile(name, hashes[file], sizes[file], layout)
        for file, (name, layout) in _records(job.found).items()
    )
    before = job.own.index.source if job.own else ()
    index = replace(job.index, source=before + records, converter=__version__)
    stored = [f"{name}: {job.stored(name)}" for name in job.plans]
    for name, data in licence_files(index, roots(job.found), stored).items():
        folder.write(name, data)
    return index


def _report(job: Job, index: configs.ModelIndex | FilterIndex, losses: Losses) -> Report:
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


def _check_disk(target: Path, to_fetch: list[int], made: list[int], discard: bool) -> None:
    """Refuses where a disk cannot hold what is fetched and made of it, component by component."""
    need, cache = sum(made) + 2**26, cache_folder()
    todo = "choose another disk with -o"
    if sum(to_fetch):
        todo += " or HF_HOME" + ("" if discard else ", or add --discard-source")
        if os.stat(existing(cache)).st_dev != os.stat(existing(target)).st_dev:
            check_disk(cache, sum(to_fetch), "choose another disk with HF_HOME")
        elif discard:  # while one is made, those after it may already be here
            need += max(sum(to_fetch[i:]) - sum(made[i + 1 :]) for i in range(len(made)))
        else:
            need += sum(to_fetch)
    check_disk(target, need, todo)


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
