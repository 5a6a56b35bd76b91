"""An installation that `setup` makes: its sources, the precision that fits, the disk that it takes, its conversions."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from mlx_flux_krea import home
from mlx_flux_krea.convert import Report, examine, hub
from mlx_flux_krea.convert.job import Outline
from mlx_flux_krea.convert.room import needs_in_turn, shares_disk
from mlx_flux_krea.convert.walk import is_model_folder
from mlx_flux_krea.errors import FluxKreaError, ModelError, ResourceError, printable
from mlx_flux_krea.files import may_exist
from mlx_flux_krea.models.config import ModelIndex, ModelSizes
from mlx_flux_krea.models.filter_config import SELF_TEST
from mlx_flux_krea.presets import TASKS
from mlx_flux_krea.weights import ModelFolder, open_model

from . import estimates, signals
from .conversion import convert_sources
from .installed import find_installed, missing_parts
from .on_disk import REPOSITORIES, PartSource, Search, find_sources
from .terminal import Console, is_interactive
from .text import duration, size, table

FILTERS = ("nsfw", "pixtral")


@dataclass
class Installation:
    """Options of `setup`, and the facts known so far.

    Attributes:
        options: of the command.
        console: where questions and results are written.
        folder: the model, once it is installed.
        sources: parts that are still to be converted, with their sources.
        outlines: the outline of each conversion.
        precision: of a model that is to be converted.
        check: who checks pictures: "filters" or "review"; "": the model requires neither, as far as is known.
        is_waiting: the first picture waits for review.
        picture: file of the first picture.
    """

    options: dict[str, Any]
    console: Console
    folder: ModelFolder | None = None
    sources: dict[str, PartSource] = field(default_factory=dict)
    outlines: dict[str, Outline] = field(default_factory=dict)
    precision: str = "none"
    check: str = ""
    is_waiting: bool = False
    picture: Path | None = None

    @property
    def requires_filters(self) -> bool:
        """True where the licence of the model demands filters or review, as far as is known before conversion."""
        return (self.folder or self.outlines["model"]).requires_filters and not self.is_unproven

    @property
    def is_unproven(self) -> bool:
        """True where the licence is known once the model's file is hashed, during conversion."""
        return self.folder is None and self.outlines["model"].is_unproven

    @property
    def model(self) -> ModelFolder:
        """The installed model, after its step."""
        if self.folder is None:
            raise ValueError("[Installation] The model is not installed yet.")
        return self.folder


def installed_model(options: dict[str, Any]) -> Path | None:
    """Returns the folder of the model that the options mean, if it is installed and complete."""
    sources = options["model"]
    named = Path(sources[0]).expanduser() if len(sources) == 1 else None
    if named and not os.path.exists(named):
        named = home.named(sources[0])
    if named and named.is_dir() and is_model_folder(named):
        if problem := missing_parts(named):
            raise ModelError(f"{named} is damaged ({problem})", "a complete one", "convert it again")
        return named
    whole = [one for one in find_installed() if one.kind == "model" and not one.problem]
    for one in sorted(whole, key=lambda one: not one.default):
        fits = _was_converted_from(one.path, sources) if sources else one.filters == "required" and one.task == TASKS[0]
        if fits and options["quantize"] in (None, precision_name(one.path)):
            return one.path
    return None


def precision_name(path: Path) -> str | None:
    """Returns the precision of a model as -q names it; None: another one."""
    most = open_model(path).flux.quantization
    return "none" if most is None else str(most.bits) if most.mode == "affine" else None


def _was_converted_from(path: Path, sources: tuple[str, ...]) -> bool:
    """True where a model was converted from these sources, judged by names and sizes of files."""
    index = open_model(path).index
    if len(sources) == 1 and hub.is_repo_id(sources[0]):
        return index.name == sources[0].rpartition("/")[2]
    roots = [Path(source).expanduser() for source in sources]
    files = [file for root in roots for file in (root.rglob("*") if root.is_dir() else [root]) if file.is_file()]
    known = {(file.name, file.stat().st_size) for file in files}
    return all((Path(source.file).name, source.bytes) in known for source in index.source)


def lacks_self_test(name: str) -> bool:
    """True where a filter is complete except for its self-test, since setup was interrupted there."""
    folder = home.path(home.FILTERS, name)
    try:
        return not may_exist(folder / SELF_TEST) and missing_parts(folder) is None
    except (ModelError, PermissionError):
        return False


def choose_source(it: Installation, part: str, given: tuple[str, ...]) -> None:
    """Chooses the source of a part: the one given, else the person's choice, else the first that can be used.

    Raises:
        FluxKreaError: no source can be used.
    """
    offline, search = it.options["offline"], Search()
    found = [PartSource(given, ", ".join(given))] if given else find_sources(part, offline, search)
    if part == "model":
        for line in search.told():
            it.console.say(line)
    usable = _usable(it, part, found)
    if not usable:
        missing = f"no source of the {part} is on this disk"
        asked = "unset HF_HUB_OFFLINE" if hub.is_offline() else "leave out --offline"
        todo = f"connect, {asked} and start again, or name a folder: {_from_disk(part)}"
        raise ModelError(missing, REPOSITORIES[part][0], todo)
    answer = 1
    if len(usable) > 1 and is_interactive():
        for number, (source, outline) in enumerate(usable, 1):
            sizes = f"{size(outline.bytes)}, of which {size(outline.fetch)} to download"
            it.console.say(f"{number}  {part}: {source.where}, {sizes}")
        answer = click.prompt(f"Which {part}", type=click.IntRange(1, len(usable)), default=1, err=True)
    it.sources[part], it.outlines[part] = usable[answer - 1]


def _usable(it: Installation, part: str, found: list[PartSource]) -> list[tuple[PartSource, Outline]]:
    """Returns the sources that can be converted: all if a person may choose, else the first.

    Raises:
        FluxKreaError: none of them can; the error of the last.
    """
    offline, tokenizers = it.options["offline"], it.options["tokenizers"] if part == "model" else None
    usable: list[tuple[PartSource, Outline]] = []
    errors: dict[str, FluxKreaError] = {}  # by text without the repository's name: an error of the network comes once
    for source in found:
        if usable and not (is_interactive() and (source.is_here or not usable[0][0].is_here or part == "model")):
            break
        try:
            _check_login(source, offline, it.console)
            usable.append((source, examine(source.sources, tokenizers=tokenizers, offline=offline)))
        except FluxKreaError as error:
            errors.setdefault(str(error).replace(source.sources[0], ""), error)
            if source.is_here and len(found) > 1:
                it.console.say(f"{source.where} cannot be used: {printable(str(error))}")
    if errors and not usable:
        error = list(errors.values())[-1]
        raise error if it.options[part] else error.with_next_step(f"or from a folder: {_from_disk(part)}")
    return usable


def _from_disk(part: str) -> str:
    """Returns the command that installs a part from a folder."""
    return f"flux-krea setup --{part} /path/to/{REPOSITORIES[part][0].rpartition('/')[2]}"


def _check_login(source: PartSource, offline: bool, console: Console) -> None:
    """Checks access to gated repositories before anything is downloaded."""
    for repo in filter(hub.is_repo_id, source.sources):
        listing = hub.look(repo, offline)
        if listing.gated and listing.to_fetch:
            hub.check_access(repo)
            console.say(f"{repo} is open to {printable(str(hub.login()))}, who is logged in")


def precision_of(it: Installation, part: str) -> str:
    """Returns the precision in which a part is stored."""
    return {"model": it.precision, "nsfw": "none", "pixtral": "4"}[part]


def disk_needs(it: Installation, precision: str) -> tuple[int, int]:
    """Returns the most bytes used at a time on the home folder's disk, and on that of the hub's cache.

    Args:
        it: with the sources of all parts.
        precision: of the model.
    """
    parts = []
    for part, outline in it.outlines.items():
        quantize = precision if part == "model" else precision_of(it, part)
        parts.append((outline.rooms[quantize], _discards(it, part)))
    return needs_in_turn(parts, shared=shares_disk(home.path(home.MODELS, "model")))


def _discards(it: Installation, part: str) -> bool:
    """Returns True where the downloads of a part are deleted after conversion."""
    fetched = all(map(hub.is_repo_id, it.sources[part].sources))
    return fetched and not (it.options["offline"] or it.options["keep_source"])


def choose_precision(it: Installation, free: int) -> None:
    """Proposes a precision that fits disk and memory, and lets a person choose.

    Raises:
        ResourceError: no picture fits into memory in the precision that was chosen.
    """
    index, sizes = _model_facts(it.outlines["model"])
    width, height, length = index.defaults.width, index.defaults.height, index.max_sequence_length
    picture = f"{width} x {height}"
    folders = it.outlines["model"].converted
    needs = {precision: disk_needs(it, precision)[0] for precision in folders}
    found = estimates.precisions(sizes, folders, needs, width=width, height=height, length=length)
    it.precision = it.options["quantize"] or estimates.propose(found, free)
    rows = [("precision", "disk", f"memory at {picture}", "")]
    for name, one in found.items():
        how = "too little" if one.peak is None else "all in memory" if one.whole else "streamed from disk"
        rows.append((name, size(one.disk), "" if one.peak is None else size(one.peak), how))
    it.console.say(table(rows, right=(1, 2)))
    if is_interactive() and not it.options["quantize"]:
        it.precision = click.prompt("Precision", type=click.Choice(list(found)), default=it.precision, err=True)
    if found[it.precision].peak is None:
        raise ResourceError(f"in precision {it.precision} no picture of {picture} fits into memory")
    steps = index.defaults.num_inference_steps
    seconds = estimates.picture_seconds(sizes.flux, width=width, height=height, length=length, steps=steps)
    if seconds:
        it.console.say(f"a picture of {picture} takes about {duration(seconds)} here (computed)")


def _model_facts(outline: Outline) -> tuple[ModelIndex, ModelSizes]:
    """Returns index and sizes of a model's outline.

    Raises:
        ModelError: the sources are those of a filter.
    """
    if not isinstance(outline.index, ModelIndex) or outline.sizes is None:
        raise ModelError(f"{outline.index.name} is a filter", "a model", "name its sources with --model")
    return outline.index, outline.sizes


def convert_part(it: Installation, part: str, **options) -> Report:
    """Converts a part; downloads are deleted, unless --keep-source was given."""
    sources, offline, discard = it.sources[part].sources, it.options["offline"], _discards(it, part)
    it.console.say(f"converting {part} from {printable(it.sources[part].where)}")
    return convert_sources(
        sources, None, it.console, offline=offline, discard_source=discard, placing=signals.held, **options
    )
