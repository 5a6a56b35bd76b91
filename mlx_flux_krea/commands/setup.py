"""flux-krea setup: from nothing to a first picture. Steps that are already done are skipped."""

import contextlib
import os
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from mlx_flux_krea import FluxPipeline, Request, home, macos
from mlx_flux_krea.convert import Report, examine, hub
from mlx_flux_krea.convert.folder import check_disk
from mlx_flux_krea.convert.job import Outline
from mlx_flux_krea.convert.room import needs_in_turn, shares_disk
from mlx_flux_krea.convert.sources import is_model_folder
from mlx_flux_krea.errors import FiltersError, FluxKreaError, ModelError, ResourceError, UsageError, printable
from mlx_flux_krea.files import may_exist, sha256_if_exists
from mlx_flux_krea.filters import acknowledgement
from mlx_flux_krea.filters.ledger import Ledger
from mlx_flux_krea.licence import PAGE as LICENCE_PAGE
from mlx_flux_krea.models.config import ModelIndex, ModelSizes
from mlx_flux_krea.models.filter_config import SELF_TEST
from mlx_flux_krea.presets import CHECKS, CHIPS, FIRST_PROMPT, PROPOSED_PRECISIONS
from mlx_flux_krea.provenance import read_record
from mlx_flux_krea.weights import ModelFolder, open_model

from .shared import estimates, settings, signals, trials
from .shared.conversion import convert_sources
from .shared.installed import find_installed, missing_parts
from .shared.on_disk import REPOSITORIES, PartSource, Search, find_sources
from .shared.options import FILE
from .shared.output import check_outcomes, meant_for, save
from .shared.terminal import Console, PipelineProgress, is_interactive, say_path, show_picture
from .shared.text import duration, json_text, size, table

PICTURE: dict[str, Any] = {"width": 512, "height": 512, "num_inference_steps": 20, "seed": 1}
AGREED = "I agree"
_FILTERS = ("nsfw", "pixtral")


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


@click.command()
@click.option("--model", multiple=True, help="Sources of the model, as for convert, or an installed model.")
@click.option("--nsfw", help="Path or hub id of the picture classifier.")
@click.option("--pixtral", help="Path or hub id of the Pixtral model.")
@click.option("--tokenizers", type=FILE, help="Folder with tokenizer/ and tokenizer_2/.")
@click.option(
    "-q",
    "--quantize",
    type=click.Choice(PROPOSED_PRECISIONS),
    help="Bits of the large layers.  [default: the best that fits]",
)
@click.option("--check", type=click.Choice(CHECKS[:2]), help="Who checks pictures: filters, or you (review).")
@click.option("--accept-licence", metavar="SHA256", help="Agree to the licence text with this hash.")
@click.option("--offline", is_flag=True, help="Use files on this disk, without network access.")
@click.option("--allow-unknown-filter", is_flag=True, help="Accept content filters that are not the published ones.")
@click.option("--keep-source", is_flag=True, help="Keep downloads in the hub's cache after conversion.")
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON.")
def setup(as_json, **options):
    """Install FLUX.1 Krea [dev] and make a first picture.

    Setup looks for weights on this disk, downloads missing ones, shows the licence, converts model and filters, and
    tests them. With --check review you look at every picture yourself, and no filter is fetched. An interrupted setup
    continues at the next start. Without a terminal, agree to the licence with --accept-licence.

    \b
    Examples:
      flux-krea setup
      flux-krea setup --check review
      flux-krea setup --model FLUX.1-Krea-dev --nsfw nsfw_image_detection --pixtral pixtral-12b --offline
    """
    console = Console()
    it, done, start = Installation(options, console), {}, time.perf_counter()
    with console.library_notes():
        for name, step in STEPS.items():
            done[name] = step(it)
            console.say(f"{name + ':':10} {printable(done[name])}")
    console.say(f"everything is ready, in {time.perf_counter() - start:.0f} s")
    _tell_result(it, done, as_json=as_json)


def _tell_result(it: Installation, done: dict[str, str], *, as_json: bool) -> None:
    """Prints the picture's path, or the report; and the next command to type."""
    facts = {"model": it.model.index.name, "path": str(it.model.path), "check": it.check or "none"}
    picture = None if it.is_waiting else str(it.picture)
    if as_json:
        click.echo(json_text(facts | {"picture": picture, "steps": done}))
    elif not it.is_waiting:
        say_path(it.picture)
    it.console.say("next: flux-krea review" if it.is_waiting else f"next: {_draw_with(it.model.path)}")


def _draw_with(model: Path) -> str:
    """Returns a command that draws with a model, which is named where another would be taken."""
    usual = None
    with contextlib.suppress(ModelError):  # none is installed, or several and no default
        usual = home.find_model(None)
    if usual == model:
        return 'flux-krea generate "a frog holding a sign"'
    if model == home.NANO:
        return 'flux-krea generate "a red circle on a blue background" -m nano'
    known = home.installed_models().get(model.name) == model
    return f'flux-krea generate "a frog holding a sign" -m {shlex.quote(model.name if known else str(model))}'


def _weights(it: Installation) -> str:
    """Finds the installed model, or its sources."""
    if it.options["check"] == "review" and any(it.options[name] for name in _FILTERS):
        raise UsageError("--check review needs no filter, and one is named", "", "leave out --nsfw and --pixtral")
    if path := _installed(it.options):
        it.folder = open_model(path)
    else:
        _choose(it, "model", it.options["model"])
    if it.is_unproven:
        it.console.say("whether its licence asks for filters is known once its file is hashed, during conversion")
    if not it.sources:
        return "the model is installed"
    return f"model from {it.sources['model'].where}"


def _checks(it: Installation) -> str:
    """Asks who checks pictures, and finds sources of the filters that are missing."""
    asked, named = it.options["check"], any(it.options[name] for name in _FILTERS)
    if not it.requires_filters and asked != "filters":
        return "known after conversion" if it.is_unproven else "this model's licence asks for none"
    usual = settings.read_options().get("check", "")
    missing = [name for name in _FILTERS if trials.problem(name) and not _lacks_self_test(name)]
    it.check = asked or ("filters" if named else str(usual).replace("both", "filters"))
    if not it.check:
        it.check = _ask_who_checks(it, missing) if missing and is_interactive() else "filters"
    if it.check == "review":
        return "you review every picture before it is released"
    for name in missing:
        _choose(it, name, (it.options[name],) if it.options[name] else ())
    where = [f"{name} from {it.sources[name].where}" for name in missing]
    return f"filters: {'; '.join(where) or 'they are installed'}"


def _ask_who_checks(it: Installation, missing: list[str]) -> str:
    """Shows what filters and review cost, and asks which it shall be."""
    costs = estimates.filter_bytes()
    fetch, folder = (sum(costs[name][i] for name in missing) for i in (0, 1))
    seconds = estimates.filter_seconds()
    took = duration(estimates.conversion_seconds(fetch, fetch))
    each = f"{duration(seconds[0])} each" if seconds else _range_of_chips()
    rows = [
        ("who checks", "to download", "on disk", "takes about", "a picture"),
        ("filters", size(fetch), size(folder), took, each),
        ("review", "nothing", "nothing", "nothing", "you look at each"),
    ]
    it.console.say("the licence asks that filters or a person check every picture before it is released")
    it.console.say(table(rows, right=(1, 2, 3)))
    if seconds:
        it.console.say(f"filters take {duration(seconds[1])} more at the start of a program (computed)")
    return click.prompt("Who checks", type=click.Choice(CHECKS[:2]), default="filters", err=True)


def _range_of_chips() -> str:
    """Returns the filters' seconds for a picture on the slowest and the fastest chip, where this one is not known."""
    known = {chip: seconds[0] for chip in CHIPS if (seconds := estimates.filter_seconds(chip))}
    ends = (max(known, key=known.__getitem__), min(known, key=known.__getitem__))
    return " to ".join(f"{duration(known[chip])} ({chip})" for chip in ends)


def _remember(it: Installation) -> None:
    """Writes into the config file who checks pictures."""
    options = settings.read()
    if it.check and options.get("check") != it.check and (it.options["check"] or it.check == "review"):
        settings.write(options | {"check": it.check})


def _installed(options: dict[str, Any]) -> Path | None:
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
        fits = _was_converted_from(one.path, sources) if sources else one.filters == "required"
        if fits and options["quantize"] in (None, _precision(one.path)):
            return one.path
    return None


def _precision(path: Path) -> str | None:
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


def _lacks_self_test(name: str) -> bool:
    """True where a filter is complete except for its self-test, since setup was interrupted there."""
    folder = home.path(home.FILTERS, name)
    try:
        return not may_exist(folder / SELF_TEST) and missing_parts(folder) is None
    except (ModelError, PermissionError):
        return False


def _choose(it: Installation, part: str, given: tuple[str, ...]) -> None:
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
        raise ModelError(missing, REPOSITORIES[part][0], f"name one with --{part}")
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
        raise list(errors.values())[-1]
    return usable


def _check_login(source: PartSource, offline: bool, console: Console) -> None:
    """Checks access to gated repositories before anything is downloaded."""
    for repo in filter(hub.is_repo_id, source.sources):
        listing = hub.look(repo, offline)
        if listing.gated and listing.to_fetch:
            hub.check_access(repo)
            console.say(f"{repo} is open to {printable(str(hub.login()))}, who is logged in")


def _licence(it: Installation) -> str:
    """Shows the licence of the weights and asks for agreement."""
    if it.is_unproven:
        return "shown after conversion, if the model's hash does not prove it to be FLUX.1 [schnell]"
    if not it.requires_filters:
        return "this model requires none"
    text = acknowledgement.find_text(it.folder.path)[1] if it.folder else it.outlines["model"].licence
    if text is None:
        return "comes with the converted model"
    digest = acknowledgement.digest(text)
    model = (it.folder or it.outlines["model"]).index.name
    if known := acknowledgement.acknowledged().get(digest):
        return f"acknowledged on {known['date']}, sha256 {digest}"
    if it.options["accept_licence"]:
        if it.options["accept_licence"].strip().lower() != digest:
            raise FiltersError("--accept-licence names another text", digest, "read this text before you agree to it")
    else:
        _ask_agreement(text, digest=digest, model=model, console=it.console)
    acknowledgement.acknowledge(text, model)
    return f"acknowledged, sha256 {digest}"


def _ask_agreement(text: bytes, *, digest: str, model: str, console: Console) -> None:
    """Shows a licence and asks a person to agree.

    Raises:
        FiltersError: nobody agreed.
    """
    console.say("\n".join(printable(line) for line in text.decode(errors="replace").splitlines()))
    console.say(f"\nThis is the licence of {printable(model)}; its sha256 is {digest}.")
    console.say(f"A page about what it means in practice: {LICENCE_PAGE}")
    if not is_interactive():
        todo = f"read it, and agree at a terminal, or with --accept-licence {digest}"
        raise FiltersError("nobody has acknowledged the licence", "", todo)
    answer = click.prompt(
        f'Type "{AGREED}" to agree; anything else ends setup', default="", show_default=False, err=True
    )
    if answer.strip().lower() != AGREED.lower():
        raise FiltersError("the licence was not acknowledged", "", "nothing was downloaded or installed")


def _room(it: Installation) -> str:
    """Shows downloads, disk and time, and checks that they fit, by the numbers that `convert` asks for."""
    if not it.sources:
        _remember(it)
        return "nothing to download or convert"
    _, free = estimates.home_disk()
    if "model" in it.outlines:
        _choose_precision(it, free)
    rows = [("part", "from", "to download", "on disk", "takes about")]
    seconds = 0.0
    for part, outline in it.outlines.items():
        folder = outline.converted[_precision_of(it, part)]
        took = estimates.conversion_seconds(outline.fetch, outline.bytes)
        seconds += took
        rows.append((part, it.sources[part].where, size(outline.fetch), size(folder), duration(took)))
    it.console.say(table(rows, right=(2, 3, 4)))
    it.console.say(f"{duration(seconds)} is computed, not measured: {estimates.ASSUMED}")
    need, apart = _needs(it, it.precision)
    if free < need:
        todo = "make room, or name another place in $FLUX_KREA_HOME"
        raise ResourceError(f"{size(free)} are free on the disk of {home.root()}", size(need), todo)
    check_disk(hub.cache_folder(), apart, "choose another disk with HF_HOME")
    if is_interactive() and not click.confirm("Continue?", default=True, err=True):
        raise UsageError("nothing was installed", "", "start setup again at any time")
    _remember(it)
    return f"{size(need)} of {size(free)} free on the disk"


def _precision_of(it: Installation, part: str) -> str:
    """Returns the precision in which a part is stored."""
    return {"model": it.precision, "nsfw": "none", "pixtral": "4"}[part]


def _needs(it: Installation, precision: str) -> tuple[int, int]:
    """Returns the most bytes used at a time on the home folder's disk, and on that of the hub's cache.

    Args:
        it: with the sources of all parts.
        precision: of the model.
    """
    parts = []
    for part, outline in it.outlines.items():
        quantize = precision if part == "model" else _precision_of(it, part)
        parts.append((outline.rooms[quantize], _discards(it, part)))
    return needs_in_turn(parts, shared=shares_disk(home.path(home.MODELS, "model")))


def _discards(it: Installation, part: str) -> bool:
    """Returns True where the downloads of a part are deleted after conversion."""
    fetched = all(map(hub.is_repo_id, it.sources[part].sources))
    return fetched and not (it.options["offline"] or it.options["keep_source"])


def _choose_precision(it: Installation, free: int) -> None:
    """Proposes a precision that fits disk and memory, and lets a person choose.

    Raises:
        ResourceError: no picture fits into memory in the precision that was chosen.
    """
    index, sizes = _model_facts(it.outlines["model"])
    width, height, length = index.defaults.width, index.defaults.height, index.max_sequence_length
    picture = f"{width} x {height}"
    folders = it.outlines["model"].converted
    needs = {precision: _needs(it, precision)[0] for precision in folders}
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


def _model(it: Installation) -> str:
    """Converts the model."""
    if it.folder:
        return f"{it.folder.path.name} is installed"
    target = it.outlines["model"].target(it.precision)
    broken = target.is_dir() and (not (target / "manifest.json").exists() or missing_parts(target) is not None)
    report = _convert(it, "model", quantize=it.precision, tokenizers=it.options["tokenizers"], force=broken)
    it.folder = open_model(report.path)
    if home.default_model() == home.NANO_NAME or (len(home.installed_models()) > 1 and home.default_model() is None):
        settings.set_model(report.path.name)
    _licence(it)  # in case the text was not known before
    if it.requires_filters and not it.check:
        it.console.say(f"checks:    {printable(_checks(it))}")
        _remember(it)
    return f"{report.path.name}, {report.base}"


def _filters(it: Installation) -> str:
    """Converts both filters and runs their self-tests, if they are to check pictures."""
    if it.check != "filters":
        return "none: you review every picture" if it.check else "this model requires none"
    for name in _FILTERS:
        if name in it.sources:
            allowed, is_there = it.options["allow_unknown_filter"], may_exist(home.path(home.FILTERS, name))
            _convert(it, name, quantize=None, force=is_there, allow_unknown_filter=allowed)
        elif _lacks_self_test(name):
            trials.record(name, home.path(home.FILTERS, name), it.console)
    return "installed, and their self-tests pass"


def _convert(it: Installation, part: str, **options) -> Report:
    """Converts a part; downloads are deleted, unless --keep-source was given."""
    sources, offline, discard = it.sources[part].sources, it.options["offline"], _discards(it, part)
    it.console.say(f"converting {part} from {printable(it.sources[part].where)}")
    return convert_sources(
        sources, None, it.console, offline=offline, discard_source=discard, placing=signals.held, **options
    )


def _check(it: Installation) -> str:
    """Checks names, sizes and headers of all files, which were compared in full when they were written."""
    it.model.check()
    if problem := missing_parts(it.model.path):
        raise ModelError(f"{it.model.path} is damaged ({problem})", "a complete one", "start setup again")
    for name in _FILTERS if it.check == "filters" else ():
        if problem := trials.problem(name):
            raise FiltersError(f"the filter {name}: {problem}", "a complete one", "start setup again")
    return "every file has its size and header"


def _picture(it: Installation) -> str:
    """Generates the first picture, which filters or a person check."""
    manifest = sha256_if_exists(it.model.path / "manifest.json")
    it.picture = home.path(home.PICTURES, f"{it.model.path.name}.png")
    try:
        if it.picture.exists() and (read_record(it.picture) or {}).get("manifest_sha256") == manifest:
            return "already made"
    except UsageError:  # a damaged file is replaced
        pass
    meant = meant_for(it.picture, {})
    waiting = Ledger().waiting() if it.check == "review" else []
    if any(Ledger().meant_for(one).get("output") == str(it.picture) for one in waiting):
        it.is_waiting = True
        return "it waits for your review"
    settings.make_folder(it.picture.parent)
    pipe = FluxPipeline.from_pretrained(it.model.path, check=it.check or None)
    progress = PipelineProgress(it.console)
    try:
        with macos.awake():
            request = Request(prompt=FIRST_PROMPT, **PICTURE)
            result = pipe.generate(request, progress=progress, before_release=signals.hold, meant_for=meant)
        if it.check == "review":
            it.is_waiting = True
            return f'"{FIRST_PROMPT}", in {sum(result.seconds.values()):.0f} s; it waits for your review'
        check_outcomes(list(result.outcomes))
        save(result.images[0], iter([it.picture]), force=True)
    finally:
        signals.let_go()
        progress.close()
    if is_interactive():
        show_picture(it.picture, it.console)
    return f'"{FIRST_PROMPT}", in {sum(result.seconds.values()):.0f} s'


STEPS = {
    "weights": _weights,
    "checks": _checks,
    "licence": _licence,
    "room": _room,
    "model": _model,
    "filters": _filters,
    "check": _check,
    "picture": _picture,
}
