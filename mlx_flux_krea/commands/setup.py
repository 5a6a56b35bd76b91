"""flux-krea setup: from nothing to a first picture. A step that the disk shows to be done is not done again."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from mlx_flux_krea.errors import FiltersError, ModelError, ResourceError, UsageError, printable

from .shared import macos, signals
from .shared.on_disk import REPOSITORIES, Source, find_sources

PROMPT = "a lighthouse on a cliff at dusk, long exposure, the sea below it white with foam"
PICTURE = {"width": 512, "height": 512, "num_inference_steps": 20, "seed": 1}
AGREED = "I agree"
_FILTERS = ("nsfw", "pixtral")


@dataclass
class Installation:
    """What was asked for, and what is known so far.

    Attributes:
        said: the options.
        folder: the model, where it is installed.
        sources: what is still to be made, and of what.
        outlines: the same, as `convert` sees it.
        quantize: the precision of a model that is to be made.
        picture: the file of the test picture.
    """

    said: dict
    folder: object = None
    sources: dict[str, Source] = field(default_factory=dict)
    outlines: dict[str, object] = field(default_factory=dict)
    quantize: str | None = None
    picture: Path | None = None

    @property
    def requires_filters(self) -> bool:
        """Whether the licence of the model asks for filters."""
        return (self.folder or self.outlines["model"]).requires_filters


@click.command()
@click.option("--model", multiple=True, help="What to make the model of, as SOURCES of convert; or an installed one.")
@click.option("--nsfw", help="What to make the classifier of pictures of.")
@click.option("--pixtral", help="What to make the language model of that judges prompts and pictures.")
@click.option("--tokenizers", type=click.Path(path_type=Path), help="A folder with tokenizer/ and tokenizer_2/ in it.")
@click.option(
    "-q", "--quantize", type=click.Choice(["none", "8", "6", "5", "4"]), help="Precision.  [default: by plan]"
)
@click.option("--accept-licence", metavar="SHA256", help="Agree to the licence text that has this hash.")
@click.option("--offline", is_flag=True, help="Use what is on this disk, and ask nobody.")
@click.option("--keep-source", is_flag=True, help="Keep what is fetched in the hub's cache, also once it is converted.")
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON.")
def setup(as_json, **said):
    """Install FLUX.1 Krea [dev] and its filters, and make a first picture.

    Looks for weights on this disk, fetches what is missing, converts, tries everything out. Interrupted, it goes on
    with the next start; once all is done, it says so. Without a terminal nobody is asked, and the licence has to be
    named by its hash.

    \b
    Examples:
      flux-krea setup
      flux-krea setup --model FLUX.1-Krea-dev --nsfw nsfw_image_detection --pixtral pixtral-12b --offline
    """
    from .shared.terminal import say, show_notes

    show_notes()
    it, done, begin = Installation(said), {}, time.perf_counter()
    for name, step in STEPS.items():
        done[name] = step(it)
        say(f"{name + ':':10} {printable(done[name])}")
    say(f"all is well, in {time.perf_counter() - begin:.0f} s")
    if as_json:
        about = {"model": it.folder.index.name, "path": str(it.folder.path), "picture": str(it.picture), "steps": done}
        click.echo(json.dumps(about, ensure_ascii=False))
    else:
        click.echo(it.picture)


def _weights(it: Installation) -> str:
    """What is installed, and what the rest can be made of."""
    from mlx_flux_krea.weights import open_model

    from .shared import trials

    if path := _installed(it.said):
        it.folder = open_model(path)
    else:
        _choose(it, "model", it.said["model"])
    if it.requires_filters:
        for name in _FILTERS:
            if trials.problem(name) and not _is_untried(name):
                _choose(it, name, (it.said[name],) if it.said[name] else ())
    if not it.sources:
        return "everything is installed"
    return "; ".join(f"{part} from {source.where}" for part, source in it.sources.items())


def _installed(said: dict) -> Path | None:
    """The folder of the model that is meant, where it is installed and whole."""
    from mlx_flux_krea.convert.sources import is_model_folder
    from mlx_flux_krea.home import installed_models

    from .shared.installed import find_installed, missing_parts

    named = Path(said["model"][0]).expanduser() if len(said["model"]) == 1 else None
    if named and not named.exists():
        named = installed_models().get(said["model"][0], named)
    if named and named.is_dir() and is_model_folder(named):
        if problem := missing_parts(named):
            raise ModelError(f"{named} is damaged ({problem})", "a whole one", "convert it again")
        return named
    found = [one for one in find_installed() if one.kind == "model" and not one.problem]
    for one in sorted(found, key=lambda one: not one.default):
        fits = _was_made_of(one.path, said["model"]) if said["model"] else one.filters == "required"
        if fits and said["quantize"] in (None, _precision(one.path)):
            return one.path
    return None


def _precision(path: Path) -> str | None:
    """The precision of a model as -q names it, where it is a usual one."""
    from mlx_flux_krea.weights import open_model

    most = open_model(path).flux.quantization
    return "none" if most is None else str(most.bits) if most.mode == "affine" else None


def _was_made_of(path: Path, sources: tuple[str, ...]) -> bool:
    """Whether a model was made of these sources, judged by the names and sizes of files."""
    from mlx_flux_krea.convert.hub import is_repo_id
    from mlx_flux_krea.weights import open_model

    index = open_model(path).index
    if len(sources) == 1 and is_repo_id(sources[0]):
        return index.name == sources[0].rpartition("/")[2]
    roots = [Path(source).expanduser() for source in sources]
    files = [file for root in roots for file in (root.rglob("*") if root.is_dir() else [root]) if file.is_file()]
    known = {(file.name, file.stat().st_size) for file in files}
    return all((Path(source.file).name, source.bytes) in known for source in index.source)


def _is_untried(name: str) -> bool:
    """Whether a filter is whole but for its self-test: it was interrupted there."""
    from mlx_flux_krea import home
    from mlx_flux_krea.models.filter_config import SELF_TEST

    from .shared.installed import missing_parts

    folder = home.path(home.FILTERS, name)
    try:
        return not (folder / SELF_TEST).exists() and missing_parts(folder) is None
    except ModelError:
        return False


def _choose(it: Installation, part: str, given: tuple[str, ...]) -> None:
    """What a part is made of: what was named, else what the person chooses, else the first that can be used."""
    from mlx_flux_krea.convert import examine
    from mlx_flux_krea.errors import FluxKreaError

    from .shared.terminal import is_typed, say, size

    offline = it.said["offline"]
    usable, wrong = [], None
    for source in [Source(given, ", ".join(given))] if given else find_sources(part, offline):
        try:
            _check_login(source, offline)
            outline = examine(
                source.sources, tokenizers=it.said["tokenizers"] if part == "model" else None, offline=offline
            )
            usable.append((source, outline))
        except FluxKreaError as error:
            wrong = wrong or error
            say(f"{source.where} cannot be used: {printable(str(error))}")
    if not usable and wrong:
        raise wrong
    if not usable:
        repo = REPOSITORIES[part][0]
        raise ModelError(f"nothing on this disk can be made into the {part}", repo, f"name it with --{part}")
    answer = 1
    if len(usable) > 1 and is_typed():
        for number, (source, outline) in enumerate(usable, 1):
            say(f"{number}  {part}: {source.where}, {size(outline.bytes)}, of which {size(outline.fetch)} to fetch")
        answer = click.prompt(f"Which {part}", type=click.IntRange(1, len(usable)), default=1, err=True)
    it.sources[part], it.outlines[part] = usable[answer - 1]


def _check_login(source: Source, offline: bool) -> None:
    """A gated repository is asked whether it is open before anything comes from it."""
    from mlx_flux_krea.convert import hub

    from .shared.terminal import say

    for repo in filter(hub.is_repo_id, source.sources):
        listing = hub.look(repo, offline)
        if listing.gated and listing.to_fetch:
            hub.check_access(repo)
            say(f"{repo} is open to {printable(str(hub.login()))}, who is logged in")


def _licence(it: Installation) -> str:
    """The text that comes with the weights, and that a person has agreed to it."""
    from mlx_flux_krea.filters import acknowledgement as licence

    from .shared.terminal import is_typed, say

    if not it.requires_filters:
        return "this model asks for nothing"
    text = licence.find_text(it.folder.path)[1] if it.folder else it.outlines["model"].licence
    if text is None:
        return "comes with the converted model"
    digest, model = licence.digest(text), it.folder.index.name if it.folder else it.outlines["model"].index.name
    if known := licence.acknowledged().get(digest):
        return f"acknowledged on {known['date']}, sha256 {digest}"
    if it.said["accept_licence"]:
        if it.said["accept_licence"].strip().lower() != digest:
            raise FiltersError("--accept-licence names another text", digest, "read this one before you agree to it")
    else:
        say("\n".join(printable(line) for line in text.decode(errors="replace").splitlines()))
        say(f"\nThis is the licence of {printable(model)}; its sha256 is {digest}.")
        if not is_typed():
            todo = f"read it, and agree at a terminal, or with --accept-licence {digest}"
            raise FiltersError("nobody has acknowledged the licence", "", todo)
        answer = click.prompt(
            f'Type "{AGREED}" if you do; anything else ends this', default="", show_default=False, err=True
        )
        if answer.strip().lower() != AGREED.lower():
            raise FiltersError("the licence was not acknowledged", "", "nothing was fetched or installed")
    licence.acknowledge(text, model)
    return f"acknowledged, sha256 {digest}"


def _room(it: Installation) -> str:
    """What will be fetched and made, whether it fits, and in which precision."""
    from mlx_flux_krea import home

    from .shared import estimates
    from .shared.terminal import is_typed, say, size, table

    if not it.sources:
        return "nothing to fetch or convert"
    _, free = estimates.home_disk()
    if "model" in it.outlines:
        _choose_precision(it, free)
    rows, need, seconds = [("part", "from", "to fetch", "to make", "takes about")], 2**26, 0
    for part, outline in it.outlines.items():
        made = outline.made[{"model": it.quantize, "nsfw": "none", "pixtral": "4"}[part]]
        need += made + (outline.fetch if it.said["keep_source"] else 0)
        seconds += (took := estimates.seconds_to_make(outline.fetch, outline.bytes))
        rows.append((part, it.sources[part].where, size(outline.fetch), size(made), estimates.minutes(took)))
    say(table(rows, right=(2, 3, 4)))
    say(f"{estimates.minutes(seconds)} is computed, not measured: {estimates.ASSUMED}")
    if free < need:
        todo = "make room, or name another place in $FLUX_KREA_HOME"
        raise ResourceError(f"{size(free)} are free on the disk of {home.root()}", size(need), todo)
    if is_typed() and not click.confirm("Go on?", default=True, err=True):
        raise UsageError("nothing was installed", "", "start again whenever you like")
    return f"{size(need)} of {size(free)} free on the disk"


def _choose_precision(it: Installation, free: int) -> None:
    from .shared import estimates
    from .shared.terminal import is_typed, say, size, table

    outline, index = it.outlines["model"], it.outlines["model"].index
    shape = (index.defaults.width, index.defaults.height, index.max_sequence_length)
    found = estimates.precisions(outline.sizes, outline.made, *shape)
    it.quantize = it.said["quantize"] or estimates.propose(found, free)
    rows = [("precision", "disk", f"memory at {shape[0]} x {shape[1]}", "")]
    for name, one in found.items():
        how = "too little" if one.peak is None else "all in memory" if one.whole else "read block by block"
        rows.append((name, size(one.disk), size(one.peak) if one.peak else "", how))
    say(table(rows, right=(1, 2)))
    if is_typed() and not it.said["quantize"]:
        it.quantize = click.prompt("Precision", type=click.Choice(list(found)), default=it.quantize, err=True)
    if found[it.quantize].peak is None:
        raise ResourceError(f"in precision {it.quantize} no picture of {shape[0]} x {shape[1]} fits into memory")
    draws = estimates.seconds_to_draw(outline.sizes.flux, *shape, index.defaults.num_inference_steps)
    if draws:
        say(f"a picture of {shape[0]} x {shape[1]} takes about {estimates.minutes(draws)} here (computed)")


def _model(it: Installation) -> str:
    """The model, converted."""
    from mlx_flux_krea.home import default_model, installed_models
    from mlx_flux_krea.weights import open_model

    from .config import set_model
    from .shared.installed import missing_parts

    if it.folder:
        return f"{it.folder.path.name} is installed"
    target = it.outlines["model"].target(it.quantize)
    broken = target.is_dir() and (not (target / "manifest.json").exists() or missing_parts(target) is not None)
    report = _make(it, "model", quantize=it.quantize, tokenizers=it.said["tokenizers"], force=broken)
    it.folder = open_model(report.path)
    if len(installed_models()) > 1 and default_model() is None:
        set_model(report.path.name)
    _licence(it)  # where the text was not known before
    return f"{report.path.name}, {report.base}"


def _filters(it: Installation) -> str:
    """Both filters, converted and tried, where the licence asks for them."""
    from mlx_flux_krea import home

    from .shared import trials

    if not it.requires_filters:
        return "this model requires none"
    for name in _FILTERS:
        if name in it.sources:
            _make(it, name, quantize=None, force=home.path(home.FILTERS, name).exists())
        elif _is_untried(name):
            trials.record(name, home.path(home.FILTERS, name))
    return "installed, and they answer as they should"


def _make(it: Installation, part: str, **options):
    from mlx_flux_krea.convert.hub import is_repo_id

    from .convert import make
    from .shared.terminal import say

    sources, offline = it.sources[part].sources, it.said["offline"]
    discard = not (offline or it.said["keep_source"]) and all(map(is_repo_id, sources))
    say(f"converting {part} from {printable(it.sources[part].where)}")
    return make(list(sources), None, offline=offline, discard_source=discard, placing=signals.held, **options)


def _check(it: Installation) -> str:
    """Names, sizes and headers of everything; whole files were read back when they were written."""
    from .shared import trials
    from .shared.installed import missing_parts

    it.folder.check()
    if problem := missing_parts(it.folder.path):
        raise ModelError(f"{it.folder.path} is damaged ({problem})", "a whole one", "start again")
    for name in _FILTERS if it.requires_filters else ():
        if problem := trials.problem(name):
            raise FiltersError(f"the filter {name}: {problem}", "a whole one", "start again")
    return "every file is there, with its size and header"


def _picture(it: Installation) -> str:
    """One picture through the whole path."""
    from mlx_flux_krea import FluxPipeline, Request, home
    from mlx_flux_krea.errors import UsageError
    from mlx_flux_krea.files import sha256_if_exists
    from mlx_flux_krea.provenance import read_record

    from .config import make_folder
    from .shared.output import check_outcomes, save
    from .shared.terminal import PipelineProgress, is_typed, show_picture

    manifest = sha256_if_exists(it.folder.path / "manifest.json")
    it.picture = home.path(home.PICTURES, f"{it.folder.path.name}.png")
    try:
        if it.picture.exists() and (read_record(it.picture) or {}).get("manifest_sha256") == manifest:
            return "was made"
    except UsageError:  # damaged: another one is made
        pass
    make_folder(it.picture.parent)
    progress, pipe = PipelineProgress(), FluxPipeline.from_pretrained(it.folder.path)
    try:
        with macos.awake():
            request = Request(prompt=PROMPT, **PICTURE)
            result = pipe.generate(request, progress=progress, before_release=signals.hold)
        check_outcomes(list(result.outcomes))
        save(result.images[0], iter([it.picture]), force=True)
    finally:
        signals.let_go()
        progress.close()
    if is_typed():
        show_picture(it.picture)
    return f'"{PROMPT}", in {sum(result.seconds.values()):.0f} s'


STEPS = {
    "weights": _weights,
    "licence": _licence,
    "room": _room,
    "model": _model,
    "filters": _filters,
    "check": _check,
    "picture": _picture,
}
