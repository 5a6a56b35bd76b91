"""flux-krea setup: from nothing to a first picture. Steps that are already done are skipped."""

import contextlib
import shlex
import time
from pathlib import Path
from typing import Any

import click

from mlx_flux_krea import FluxPipeline, Request, home, licence, macos
from mlx_flux_krea.convert import hub
from mlx_flux_krea.convert.folder import check_disk
from mlx_flux_krea.disks import remember_speed
from mlx_flux_krea.errors import FiltersError, ModelError, ResourceError, UsageError, printable
from mlx_flux_krea.files import may_exist, sha256_if_exists
from mlx_flux_krea.filters import acknowledgement
from mlx_flux_krea.filters.ledger import Ledger
from mlx_flux_krea.licence import PAGE as LICENCE_PAGE
from mlx_flux_krea.models.config import ModelIndex
from mlx_flux_krea.presets import CHECKS, CHIPS, FIRST_PROMPT, PROPOSED_PRECISIONS, TASKS
from mlx_flux_krea.provenance import read_record
from mlx_flux_krea.weights import ModelFolder, open_model

from .shared import estimates, settings, signals, trials
from .shared.installation import (
    FILTERS,
    Installation,
    choose_precision,
    choose_source,
    convert_part,
    disk_needs,
    installed_model,
    lacks_self_test,
    precision_of,
)
from .shared.installed import missing_parts
from .shared.options import FILE, SOURCE
from .shared.output import check_outcomes, meant_for, save
from .shared.terminal import Console, PipelineProgress, is_interactive, say_path, show_picture
from .shared.text import duration, json_text, size, table

PICTURE: dict[str, Any] = {"width": 512, "height": 512, "num_inference_steps": 20, "seed": 1}
SMALL_PROMPT = "a red circle on a blue background"  # of a small model, which knows coloured shapes
AGREED = "I agree"


@click.command()
@click.option(
    "--model", multiple=True, type=SOURCE, help="Sources of the model, as for convert, or an installed model."
)
@click.option("--nsfw", type=SOURCE, help="Path or hub id of the picture classifier.")
@click.option("--pixtral", type=SOURCE, help="Path or hub id of the Pixtral model.")
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
    options["offline"] = options["offline"] or hub.is_offline()
    it, done, start = Installation(options, console), {}, time.perf_counter()
    with console.library_notes(), signals.continued("flux-krea setup continues where it stopped"):
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
    prompt = SMALL_PROMPT if _is_small(open_model(model)) else "a frog holding a sign"
    draw = f'flux-krea generate "{prompt}"'
    if usual == model:
        return draw
    known = model in (home.NANO, *home.installed_models().values())
    return f"{draw} -m {shlex.quote(_name(model) if known else str(model))}"


def _name(model: Path) -> str:
    return home.NANO_NAME if model == home.NANO else model.name


def _is_small(folder: ModelFolder) -> bool:
    return folder.flux.sizes.hidden_size < licence.SMALLEST


def _weights(it: Installation) -> str:
    """Finds the installed model, or its sources."""
    if it.options["check"] == "review" and any(it.options[name] for name in FILTERS):
        raise UsageError("--check review needs no filter, and one is named", "", "leave out --nsfw and --pixtral")
    if path := installed_model(it.options):
        it.folder = open_model(path)
    else:
        choose_source(it, "model", it.options["model"])
    index = it.outlines["model"].index if it.sources else it.model.index
    if isinstance(index, ModelIndex) and index.task != TASKS[0]:
        todo = "or give it a folder of its own: flux-krea convert SOURCE"
        raise ModelError(f"{index.name} is a model for {index.task_and_kind}", f"one for {TASKS[0]}", todo)
    if it.is_unproven:
        it.console.say("whether its licence asks for filters is known once its file is hashed, during conversion")
    if not it.sources:
        return "the model is installed"
    return f"model from {it.sources['model'].where}"


def _checks(it: Installation) -> str:
    """Asks who checks pictures, and finds sources of the filters that are missing."""
    asked, named = it.options["check"], any(it.options[name] for name in FILTERS)
    if not it.requires_filters and asked != "filters":
        return "known after conversion" if it.is_unproven else "this model's licence asks for none"
    usual = settings.read_options().get("check", "")
    missing = [name for name in FILTERS if trials.problem(name) and not lacks_self_test(name)]
    it.check = asked or ("filters" if named else str(usual).replace("both", "filters"))
    if not it.check:
        it.check = _ask_who_checks(it, missing) if missing and is_interactive() else "filters"
    if it.check == "review":
        return "you review every picture before it is released"
    for name in missing:
        choose_source(it, name, (it.options[name],) if it.options[name] else ())
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
        choose_precision(it, free)
    rows = [("part", "from", "to download", "on disk", "takes about")]
    seconds = 0.0
    for part, outline in it.outlines.items():
        folder = outline.converted[precision_of(it, part)]
        took = estimates.conversion_seconds(outline.fetch, outline.bytes)
        seconds += took
        rows.append((part, it.sources[part].where, size(outline.fetch), size(folder), duration(took)))
    it.console.say(table(rows, right=(2, 3, 4)))
    it.console.say(f"{duration(seconds)} is computed, not measured: {estimates.ASSUMED}")
    need, apart = disk_needs(it, it.precision)
    if free < need:
        todo = "make room, or name another place in $FLUX_KREA_HOME"
        raise ResourceError(f"{size(free)} are free on the disk of {home.root()}", size(need), todo)
    check_disk(hub.cache_folder(), apart, "choose another disk with HF_HOME")
    if is_interactive() and not click.confirm("Continue?", default=True, err=True):
        raise UsageError("nothing was installed", "", "start setup again at any time")
    _remember(it)
    return f"{size(need)} of {size(free)} free on the disk"


def _model(it: Installation) -> str:
    """Converts the model."""
    if it.folder:
        return f"{_name(it.folder.path)} is installed"
    target = it.outlines["model"].target(it.precision)
    broken = target.is_dir() and (not (target / "manifest.json").exists() or missing_parts(target) is not None)
    report = convert_part(it, "model", quantize=it.precision, tokenizers=it.options["tokenizers"], force=broken)
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
    for name in FILTERS:
        if name in it.sources:
            allowed, is_there = it.options["allow_unknown_filter"], may_exist(home.path(home.FILTERS, name))
            convert_part(it, name, quantize=None, force=is_there, allow_unknown_filter=allowed)
        elif lacks_self_test(name):
            trials.record(name, home.path(home.FILTERS, name), it.console)
    return "installed, and their self-tests pass"


def _check(it: Installation) -> str:
    """Checks names, sizes and headers of all files, which were compared in full when they were written."""
    it.model.check()
    if problem := missing_parts(it.model.path):
        raise ModelError(f"{it.model.path} is damaged ({problem})", "a complete one", "start setup again")
    for name in FILTERS if it.check == "filters" else ():
        if problem := trials.problem(name):
            raise FiltersError(f"the filter {name}: {problem}", "a complete one", "start setup again")
    remember_speed(it.model.path)
    return "every file has its size and header"


def _picture(it: Installation) -> str:
    """Generates the first picture, which filters or a person check."""
    manifest = sha256_if_exists(it.model.path / "manifest.json")
    it.picture = home.path(home.PICTURES, f"{_name(it.model.path)}.png")
    try:
        if it.picture.exists() and (read_record(it.picture) or {}).get("manifest_sha256") == manifest:
            return "already made"
    except UsageError:  # a damaged file is replaced
        pass
    meant = meant_for(it.picture, {})
    if it.check == "review":
        ledger = Ledger()
        if any(ledger.meant_for(one).get("output") == str(it.picture) for one in ledger.waiting()):
            it.is_waiting = True
            return "it waits for your review"
    settings.make_folder(it.picture.parent)
    pipe = FluxPipeline.from_pretrained(it.model.path, check=it.check or None)
    progress = PipelineProgress(it.console)
    try:
        with macos.awake():
            request = _first_request(it.model)
            result = pipe.generate(request, progress=progress, before_release=signals.hold, meant_for=meant)
        if it.check == "review":
            it.is_waiting = True
            return f'"{request.prompt}", in {sum(result.seconds.values()):.0f} s; it waits for your review'
        check_outcomes(list(result.outcomes))
        save(result.images[0], iter([it.picture]), force=True)
    finally:
        signals.let_go()
        progress.close()
    if is_interactive():
        show_picture(it.picture, it.console)
    return f'"{request.prompt}", in {sum(result.seconds.values()):.0f} s: {it.picture}'


def _first_request(model: ModelFolder) -> Request:
    """Returns the first picture of a model: a small one draws shapes in its own size and steps."""
    return Request(prompt=SMALL_PROMPT, seed=7) if _is_small(model) else Request(prompt=FIRST_PROMPT, **PICTURE)


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
