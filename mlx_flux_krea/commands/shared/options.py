"""Options of `generate`, declared once: for the command line, rows of a prompt file, the config file and tools."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import click

from mlx_flux_krea import home, presets
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.sampling.rules import parse_cache

from . import peers
from .answers import NEVER, bad_value, nearest, with_values

_SEED = re.compile(r"(-?\d+)(?:\+(\d+))?")
_SPAN = re.compile(r"(\d+) *(?:-|:|\.\.+|to) *(\d+)")  # from one seed to another, as in other tools
_RANDOM = ("-1", "random", "rand", "auto")  # other tools' words for no seed


_OTHER_WEIGHT = re.compile(r"(?P<file>.+?)(?:[: ]\s*(?P<plain>-?\d*\.?\d+)|=\s*(?P<odd>-?\d+%|-?\d*,\d+))")


def _check_weight(kind: click.ParamType, text: str, param, ctx) -> None:
    """Refuses a weight that is written as in other programs, with ours: FILE:0.8, FILE 0.8, FILE=80%, FILE=0,8."""
    match = None if os.path.exists(text) else _OTHER_WEIGHT.fullmatch(text)
    if match:
        written = match["plain"] or match["odd"]
        weight = float(written.rstrip("%").replace(",", ".")) / (100 if written.endswith("%") else 1)
        kind.fail(f"{text!r} has no weight that can be read; write {match['file']}={weight:g}.", param, ctx)


def split_lora(text: str) -> tuple[str, float | None]:
    """Splits SOURCE=WEIGHT; a text whose end is no number is all source."""
    source, equals, weight = text.rpartition("=")
    try:
        return (source.strip(), float(weight)) if equals else (text, None)
    except ValueError:
        return text, None


def split_style(text: str) -> tuple[str, float | None]:
    """Splits FILE=WEIGHT. The name of an existing file may hold a =, and a text whose end is no number is all file."""
    return (text, None) if os.path.exists(text) else split_lora(text)


class _Weighted(click.ParamType):
    """Type of a source and its weight, FILE=0.8.

    Args:
        name: of the type.
        noun: what the source is, for errors.
        split: splits a text into source and weight.
    """

    def __init__(self, name: str, noun: str, split: Callable[[str], tuple[str, float | None]]):
        self.name, self._noun, self._split = name, noun, split

    def convert(self, value, param, ctx) -> str:
        """Returns the text, once its weight is known to be a number."""
        text = str(value).strip()
        _check_address(self, self._split(text)[0], param, ctx)
        text = os.path.expanduser(text) if text.startswith("~") else text  # no shell does, after = and in quotes
        source, weight = self._split(text)
        if not source:
            self.fail(f"{value!r} names no {self._noun}.", param, ctx)
        _check_weight(self, text, param, ctx)
        if weight is not None and not abs(weight) <= presets.MAX_WEIGHT:
            self.fail(f"{weight!r} is not in the range {-presets.MAX_WEIGHT:g}<=x<={presets.MAX_WEIGHT:g}.", param, ctx)
        return text


LORA = _Weighted("lora", "adapter", split_lora)
STYLE = _Weighted("style", "image", split_style)


class Cache(click.ParamType):
    """Type of --cache: the name of a step cache, or none."""

    name = "cache"

    def convert(self, value, param, ctx) -> str:
        """Returns the name as the library writes it."""
        text = str(value).strip()
        try:
            return text if text == NO_CACHE else str(parse_cache(text))
        except UsageError as error:
            self.fail(f"{text!r} is no cache; expected {error.expected}, or {NO_CACHE}.", param, ctx)


class Seeds(click.ParamType):
    """Type of --seed: whole numbers, and ranges such as 7+4 (four seeds from 7)."""

    name = "seeds"

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        """Returns the seeds in a text, which spaces or commas separate."""
        if isinstance(value, tuple):
            return value
        if spelt := _span(value):
            self.fail(f"{value!r} is neither a seed nor a range such as 7+4{spelt}.", param, ctx)
        seeds: list[int] = []
        for part in value.replace(",", " ").split():
            if part in _RANDOM:
                self.fail(f"{part!r} is no seed; for a random one leave --seed out.", param, ctx)
            if not (match := _SEED.fullmatch(part)):
                self.fail(f"{part!r} is neither a seed nor a range such as 7+4{_span(part)}.", param, ctx)
            first, count = int(match[1]), int(match[2] or 1)
            if not 1 <= count <= presets.MAX_BATCH:
                self.fail(f"{part!r} is a range of {count} seeds, not of 1 to {presets.MAX_BATCH}.", param, ctx)
            if not 0 <= first <= 2**64 - count:
                self.fail(f"{part!r} is no seed; expected whole numbers from 0 to {2**64 - 1}.", param, ctx)
            seeds += range(first, first + count)
        if not 1 <= len(seeds) <= presets.MAX_BATCH:
            self.fail(f"{value!r} lists {len(seeds)} seeds, not 1 to {presets.MAX_BATCH}.", param, ctx)
        return tuple(seeds)


def _span(part: str) -> str:
    """Returns how a range of seeds is written that somebody wrote as its two ends; "" where it is none."""
    if not (match := _SPAN.fullmatch(part.strip())):
        return ""
    first, last = sorted((int(match[1]), int(match[2])))
    return f"; write {first}+{last - first + 1} ({last - first + 1} seeds from {first})"


IN_TERMINAL = "terminal"  # value of --preview without a file
_PICTURE_FILE = re.compile(rf".+\.(png|jpe?g|webp|avif|bmp|gif|hei[cf]|jxl|mp4|tiff?)|{IN_TERMINAL}", re.I)


def joined(args: list[str], option: str) -> list[str]:
    """Joins the numbers that follow an option into one value, which click expects."""
    found: list[str] = []
    place = None  # of the value of the option in `found`
    for i, arg in enumerate(args):
        if arg == "--":
            return found + args[i:]
        if place is not None and place < len(found) and _SEED.fullmatch(arg):
            found[place] += f" {arg}"
            continue
        if place is None or place < len(found):
            place = len(found) + 1 if arg == option else len(found) if arg.startswith(f"{option}=") else None
        found.append(arg)
    return found


class GeneratingCommand(click.Command):
    """Command whose --seed takes several numbers, and whose --preview needs no value."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Joins several words into the one value that click expects."""
        end = args.index("--") if "--" in args else len(args)
        for i, arg in enumerate(args[:end]):
            if arg == "--preview" and not _PICTURE_FILE.fullmatch("".join(args[i + 1 : i + 2])):
                args = [*args[:i], f"--preview={IN_TERMINAL}", *args[i + 1 :]]
        return super().parse_args(ctx, joined(args, "--seed"))


NO_CACHE = "none"  # value of --cache that computes every step
DEFAULTS: dict[str, object] = {}  # by option: its default, where the model has none of its own


def _option(*names: str, help: str, default=None, **settings) -> click.Option:
    option = click.Option(names, help=help if default is None else f"{help}  [default: {default}]", **settings)
    if default is not None and not str(default).startswith("the "):
        DEFAULTS[str(option.name)] = default
    return option


def _installed(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Completes the names of installed models, for the shell."""
    return [name for name in home.installed_models() if name.startswith(incomplete)]


_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/.*)?", re.I)
_FILE_PAGE = re.compile(r".*/(?:blob|resolve)/[^/]+/([^?#]+\.safetensors)(?:[?#].*)?")


def _check_address(kind: click.ParamType, value, param, ctx) -> None:
    """Checks that a path is no address of the web.

    Raises:
        BadParameter: it is.
    """
    adapter = kind is LORA or isinstance(kind, _Adapter)
    takes_hub = not isinstance(param, click.Option) or kind is SOURCE or adapter
    if takes_hub and (page := _PAGE.fullmatch(str(value))):
        file = _FILE_PAGE.fullmatch(str(value)) if adapter else None
        name = f"{page[1]}:{file[1]}" if file else page[1]
        kind.fail(f"{value!r} is a page of the hub; write its name alone, {name}.", param, ctx)
    if re.match(r"\w+://", str(value)):
        kind.fail(f"{value!r} is an address, not a file; download it first.", param, ctx)


class _Source(click.types.StringParamType):
    """Type of a source of weights: a path, OWNER/NAME on the hub, or the name of an installed model."""

    def convert(self, value, param, ctx):
        """Returns the text."""
        _check_address(self, value, param, ctx)
        return super().convert(value, param, ctx)


class _Adapter(_Source):
    """Type of the source of an adapter: a path, or OWNER/NAME[:FILE] on the hub."""


class _File(click.Path):
    """Type of a path, which is not empty: no text would mean the current folder."""

    def convert(self, value, param, ctx):
        """Returns the path."""
        if value == "":
            self.fail("'' is no path.", param, ctx)
        _check_address(self, value, param, ctx)
        if isinstance(param, click.Option) and param.name == "output" and str(value).endswith(os.sep):
            self.fail(f"{value!r} is a folder, not a file; write {shlex.quote(f'{value}out.png')}.", param, ctx)
        if isinstance(param, click.Option) and str(value).startswith("~"):
            value = os.path.expanduser(value)  # no shell does, after = and in quotes
        return super().convert(value, param, ctx)


FILE = _File(path_type=Path)
SOURCE = _Source()
ADAPTER = _Adapter()
SIDE = click.IntRange(1, presets.MAX_SIDE)
DTYPE = click.Choice(presets.COMPUTE_TYPES)
METADATA = click.Choice(presets.METADATA)
QUALITY = click.IntRange(1, 100)
MODEL_HELP = "Installed model, or a folder."
MODEL_DEFAULT = "the only one, or models default"
_SCALE = click.FloatRange(0, presets.MAX_SCALE)
_BATCH = click.IntRange(1, presets.MAX_BATCH)
_STEPS = click.IntRange(1, presets.MAX_STEPS)
_AREA = click.FloatRange(*presets.MEGAPIXELS)
_NSFW = click.FloatRange(0, presets.NSFW_THRESHOLD)
_OF_MODEL = "the model's"
OPTIONS = [
    _option("-m", "--model", help=MODEL_HELP, default=MODEL_DEFAULT, shell_complete=_installed),
    _option("-o", "--output", type=FILE, help="PNG, JPEG or WebP file; {seed}, {n}, {prompt} are filled in.",
            default="out.png"),
    _option("--prompts", type=FILE, help="File of prompts, one a line; CSV, TSV and JSON set any option per row."),
    _option("--width", type=SIDE, help="Width in pixels, a multiple of 16.", default=_OF_MODEL),
    _option("--height", type=SIDE, help="Height in pixels, a multiple of 16.", default=_OF_MODEL),
    _option("--aspect", type=click.Choice(list(presets.ASPECTS)), help="Aspect ratio, instead of width and height."),
    _option("--megapixels", type=_AREA, default=_OF_MODEL,
            help="Area in megapixels, at the aspect ratio; above what the model draws well, in two passes."),
    _option("--upscale", type=click.FloatRange(1, presets.MOST_ENLARGED), metavar="1.5|2|4",
            help="Enlarge the picture, or --image, so many times in a second pass."),
    _option("--steps", type=_STEPS, help="Number of denoising steps.", default=_OF_MODEL),
    _option("--fast", is_flag=True, help="Compute 16 of 28 steps: like --cache skip, or as bench --fast chose."),
    _option("--solver", type=click.Choice(presets.SOLVERS), help="Method of a step; heun takes twice the time.",
            default=presets.SOLVERS[0]),
    _option("--schedule", type=click.Choice(presets.SCHEDULES), help="Noise levels: ComfyUI's of this name.",
            default=_OF_MODEL),
    _option("--cache", type=Cache(), metavar="NAME",
            help="Steps that are not computed in full: skip, first-block:T (T near 0.08), or none.",
            default=NO_CACHE),
    _option("--guidance", type=_SCALE, help="How closely to follow the prompt.", default=_OF_MODEL),
    _option("--seed", type=Seeds(), metavar="N...", help="Seeds: 1, or 1 2 3, or 7+4 (4 from 7).  [default: random]"),
    _option("-n", "--num-images", type=_BATCH, help="Number of pictures, with consecutive seeds.", default=1),
    _option("--candidates", type=click.IntRange(2, 100), metavar="N",
            help="Compute a third of the steps of N pictures, to choose from a contact sheet: resume ID --pick 3 5."),
    _option("--contact-sheet", is_flag=True, help="Also save a contact sheet, one row per prompt."),
    _option("--like", type=click.Choice(list(presets.TOOLS)), help="Tool whose defaults replace the model's."),
    _option("--from", "from_", type=FILE, help="Picture to repeat; other options change it."),
    _option("--noise", help=f"Noise recipe, the tool whose seeds to reproduce: {', '.join(presets.RECIPES)}.",
            default="diffusers"),
    _option("--negative-prompt", help="Text to avoid; needs --true-cfg-scale."),
    _option("--true-cfg-scale", type=_SCALE, help="Scale of the negative prompt; above 1, steps take twice the time.",
            default=1),
    _option("--lora", type=LORA, multiple=True, metavar="FILE[=W]",
            help="Adapter and its weight: a file, an installed one, OWNER/NAME[:FILE]; repeatable; none: no adapter."),
    _option("--style", type=STYLE, multiple=True, metavar="FILE[=W]",
            help="Image whose style the picture takes up, and its weight; repeatable; none: no image."),
    _option("--style-rule", type=click.Choice(presets.STYLE_RULES),
            help="How style images stand beside the prompt.", default=presets.STYLE_RULES[0]),
    _option("--image", type=FILE, help="Image to start from, to repaint, to fill, or Kontext's reference."),
    _option("--reference", type=FILE, multiple=True, help="Further reference for Kontext; repeatable."),
    _option("--strength", type=click.FloatRange(0, 1),
            help="Share of the steps that change the image; of a second pass too.  "
            f"[default: {presets.STRENGTH}; {presets.MASK_STRENGTH} with a mask; 1 where it is filled or expanded]"),
    _option("--mask", type=FILE, help="Mask of the image, white where it is repainted."),
    _option("--expand", metavar="T,R,B,L", help="Borders to paint around the image: pixels, or percent: 0,25%,0,25%."),
    _option("--crop-to-mask", is_flag=True, help="Generate the surroundings of the mask alone, at full size."),
    _option("--soft-mask", is_flag=True, help="Repaint what is grey in the mask by as much."),
    _option("--no-paste", is_flag=True, help="Leave the picture as generated, also outside of the mask."),
    _option("--control-image", type=FILE, help="Map, such as edges or depth, for a control model or adapter."),
    _option("--control", type=click.Choice(presets.KINDS),
            help="Make this map of the control image, which is a photo."),
    _option("--keep-map", is_flag=True, help="Save the map beside the picture, as NAME-canny.png or NAME-depth.png."),
    _option("--fit", type=click.Choice(presets.FITS),
            help="How images of another shape are brought to a size.  [default: stretch; crop for Kontext]"),
    _option("--no-auto-resize", is_flag=True, help="Read Kontext's reference at its own size."),
    _option("--dtype", type=DTYPE, help="Compute type.", default=_OF_MODEL),
    _option("--memory", default="auto",
            help="Memory for this program (not the Mac's), such as 6GB; blocks beyond it are streamed from disk."),
    _option("--quality", type=QUALITY, help="Quality of JPEG and WebP; WebP at 100 loses nothing.",
            default=presets.QUALITY),
    _option("--metadata", type=METADATA, help="Record in the file: all settings, or only that an AI made it.",
            default="full"),
    _option("--credentials", type=click.Choice(presets.CREDENTIALS),
            help="Sign pictures (C2PA): on, or require, which saves none without.", default=presets.CREDENTIALS[0]),
    _option("--watermark", is_flag=True, help="Add the invisible watermark of BFL's programs: 65,536 pixels or more."),
    _option("--check", type=click.Choice(presets.CHECKS),
            help="Who checks pictures before release: filters, you (review), or both.  [default: filters if required]"),
    _option("--nsfw-threshold", type=_NSFW, help="NSFW probability from which a picture is withheld.",
            default=presets.NSFW_THRESHOLD),
    _option("--integrity-margin", type=_SCALE, help="Minimum margin by which the filter must clear a picture.",
            default=0),
    _option("--preview", metavar="[FILE]", help="Show each step in the terminal (iTerm2, kitty), or in FILE."),
    _option("-v", "--verbose", is_flag=True, help="Show time and memory of each stage."),
    _option("--force", is_flag=True, help="Replace the output, also a link; otherwise the next free name is taken."),
    _option("--json", "as_json", is_flag=True, help="Print a JSON report; events go to stderr."),
]  # fmt: skip
BY_NAME = {str(option.name): option for option in OPTIONS} | {"prompt": _option("--prompt", help="Text to generate.")}
SIGNING = ("certificate", "certificate_key")  # files of one's own to sign with, in the config file alone
BY_NAME |= {name: _option(f"--{name.replace('_', '-')}", type=FILE, help="PEM file.") for name in SIGNING}
# Options that the library's arguments name differently.
ARGUMENTS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "num_images": "num_images_per_prompt",
    "mask": "mask_image",
    "crop_to_mask": "padding_mask_crop",
    "no_paste": "paste",
    "no_auto_resize": "auto_resize",
}
_OPTION_OF = {argument: option for option, argument in ARGUMENTS.items()}
_OPTION_OF |= {"style_images": "style", "style_weights": "style"}
_CONVERTING = {  # arguments of `convert`, which has options of its own
    "out": "-o",
    "quantize": "-q",
    "gptq": "--gptq",
    "tokenizers": "--tokenizers",
    "offline": "--offline",
    "discard_source": "--discard-source",
    "task": "--task",
}
_BACKQUOTED = re.compile(
    r"""(?<!\w)(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)  # a quoted text, which is somebody's own
    | `(?P<name>[a-z_][a-z0-9_]*)`""",
    re.VERBOSE,
)
POLICY = ("check", "nsfw_threshold", "integrity_margin")
_LASTING = ("model", "dtype", "memory", "contact_sheet", "preview", "verbose", *POLICY)
_RUN = (*_LASTING, *SIGNING, "candidates", "prompts", "from_", "force", "as_json")  # options of a whole run
PER_PICTURE = tuple(name for name in BY_NAME if name not in _RUN)
LASTING = (*_LASTING, *(name for name in PER_PICTURE if name != "prompt"))  # of a shell
CONFIG = (*LASTING, *SIGNING)  # may stand in the config file

# Options of an outer layer that an option of an inner layer replaces: row before file, command before config.
_SIZE = ("width", "height", "aspect", "megapixels")
_TILES = ("tiled", "upscale_tiles")
REPLACES = {
    "width": ("aspect", "megapixels", *_TILES),
    "height": ("aspect", "megapixels", *_TILES),
    "aspect": ("width", "height", *_TILES),
    "megapixels": ("width", "height", "upscale", *_TILES),
    "upscale": ("megapixels", *_TILES),
    "steps": ("sigmas",),
    "schedule": ("sigmas",),
    "cache": ("fast",),
    "num_images": ("candidates",),
    "candidates": ("num_images",),
    "fast": ("cache",),
    "prompt": ("prompt_2",),
    "negative_prompt": ("negative_prompt_2",),
    "seed": ("batch", "image_seed"),
    "control": ("depth_sha256",),
    "like": (*_SIZE, "steps", "sigmas", "schedule", "guidance", "noise", "max_sequence_length"),
}
EXCLUSIVE = [(side, other) for side in ("width", "height") for other in ("aspect", "megapixels")]
EXCLUSIVE += [
    ("upscale", "megapixels"),
    ("like", "from_"),
    ("prompt", "prompts"),
    ("fast", "cache"),
    ("candidates", "num_images"),
]


def spelled(name: str) -> str:
    """Returns an option as users write it."""
    return "PROMPT" if name == "prompt" else str(BY_NAME[name].opts[-1])


def with_option_names(message: str) -> str:
    """Replaces the library's backquoted arguments in a message by options: `guidance_scale` by --guidance.

    Names that are no option lose their backquotes. Quoted texts stay as they are.
    """

    def replaced(match: re.Match) -> str:
        name = match["name"]
        if name is None:
            return str(match["text"])
        if name in _CONVERTING:
            return _CONVERTING[name]
        option = _OPTION_OF.get(name, name)
        return spelled(option) if option in BY_NAME else name

    return _BACKQUOTED.sub(replaced, message)


def given_options(options: dict) -> tuple[dict, bool, bool]:
    """Splits a command's parameters into options that were given, --force, and --json.

    Raises:
        UsageError: two options exclude each other.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False and value != ()}
    for name in ("lora", "style"):
        if given.get(name) == ("none",):
            given[name] = ()
    for name in ("model", "memory", "noise"):
        if given.get(name) == "":
            raise UsageError(f"{spelled(name)} is empty", "a value", "leave it out for the default")
    force, as_json = given.pop("force", False), given.pop("as_json", False)
    check_together(given)
    return given, force, as_json


def check_together(options: dict) -> None:
    """Checks that options of one layer, such as one row, do not exclude each other.

    Raises:
        UsageError: two of them do.
    """
    for one, other in EXCLUSIVE:
        if one in options and other in options:
            raise UsageError(f"{spelled(one)} and {spelled(other)} are both given", "one of them")
    for name in ("num_images", "candidates"):
        if options.get(name, 1) > 1 and len(options.get("seed", ())) > 1:
            raise UsageError(f"{spelled(name)} is given with {len(options['seed'])} seeds", "one of them")


def find_name(name: str, allowed: tuple[str, ...], value: object = "") -> str:
    """Returns the name in the code of an option, which may be written with dashes.

    Args:
        name: as it is written.
        allowed: names that the place takes.
        value: that was typed with it, for the answer.

    Raises:
        UsageError: an unknown option.
    """
    known = str(name).strip().lstrip("-").replace("-", "_").lower()
    if known not in allowed:
        raise _not_allowed(name, known, allowed, str(value))
    return known


def cast(name: str, value, allowed: tuple[str, ...]) -> tuple[str, object]:
    """Reads an option of a file: returns its name in the code, and its value as the command line gives it.

    Args:
        name: with dashes or underscores, with or without leading dashes.
        value: a text, a number or a boolean; for `seed` also a list.
        allowed: names that the file may hold.

    Raises:
        UsageError: an unknown option, or a value that it does not take.
    """
    known = find_name(name, allowed, "" if "prompt" in allowed else value)
    label = known.strip("_").replace("_", "-")
    if known == "seed" and isinstance(value, list):
        value = " ".join(map(str, value))
    if BY_NAME[known].multiple:
        return known, _cast_several(known, value)
    if not isinstance(value, str | int | float):
        raise UsageError(f"{label} is {type(value).__name__}", "a text or a number")
    option = BY_NAME[known]
    try:
        return known, option.type.convert(str(value), option, None)
    except click.BadParameter as error:
        raise UsageError(bad_value(label, option, error.message)) from None


def _cast_several(name: str, value) -> tuple:
    """Reads an option that may be given several times: a list of texts, or one text, in which a semicolon separates."""
    texts = value if isinstance(value, list | tuple) else str(value).split(";")
    option = BY_NAME[name]
    try:
        given = tuple(option.type.convert(str(text), option, None) for text in texts)
    except click.BadParameter as error:
        raise UsageError(bad_value(name, option, error.message)) from None
    return () if given == ("none",) else given


def _renamed(text: str, allowed: tuple[str, ...], value: str) -> str:
    """Returns an answer of `peers` for a place where options have no dashes: a column, the config file, the shell.

    Args:
        text: the answer.
        allowed: names that the place takes.
        value: that was typed; "": none, or the place is a column, whose cells have values of their own.
    """
    text = with_values(text, [value] * bool(value), {spelling: one for one in OPTIONS for spelling in one.opts})
    names = []
    for option, said in re.findall(r"(?<![\w-])(--?[A-Za-z][\w-]*)(?: (\S+))?", re.split(r" \(|: |, ", text)[0]):
        kept = f" {said}" if said == value else ""
        names += [f"{known}{kept}" for known, one in BY_NAME.items() if option in one.opts and known in allowed]
    if not names or not text.startswith("write "):
        return text
    return f"write {', '.join(name.strip('_').replace('_', '-') for name in dict.fromkeys(names))}"


def _not_allowed(name: str, plain: str, allowed: tuple[str, ...], value: str) -> UsageError:
    """Returns the error for a name in a file, and its plain form, that is no option there."""
    found = f"there is no option {name!r} here"
    names = [known.strip("_").replace("_", "-") for known in allowed]
    if near := nearest(plain, names):
        return UsageError(found, "", f"did you mean {near}?")
    if plain in BY_NAME and plain != "prompt" and spelled(plain) not in NEVER:
        return UsageError(found, "", f"it is an option of the command line, {spelled(plain)}")
    if row := peers.find(plain):
        return UsageError(f"{found} (of {row[0]})", "", _renamed(row[1], allowed, value))
    return UsageError(found, f"one of {', '.join(names)}")
