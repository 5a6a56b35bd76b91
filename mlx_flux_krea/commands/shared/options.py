"""The options of `generate`, declared once: for the command line, rows of a prompt file, the config file and tools."""

import difflib
import re
from pathlib import Path

import click

from mlx_flux_krea import presets
from mlx_flux_krea.errors import UsageError

_SEED = re.compile(r"(-?\d+)(?:\+(\d+))?")


class Seeds(click.ParamType):
    """Whole numbers, and ranges such as 7+4: four seeds from 7 on."""

    name = "seeds"

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        """The seeds that a text lists, with spaces or commas between them."""
        if isinstance(value, tuple):
            return value
        seeds: list[int] = []
        for part in value.replace(",", " ").split():
            if not (match := _SEED.fullmatch(part)):
                self.fail(f"{part!r} is neither a seed nor a range such as 7+4.", param, ctx)
            first, count = int(match[1]), int(match[2] or 1)
            if not 1 <= count <= presets.MAX_BATCH:
                self.fail(f"{part!r} is a range of {count} seeds, not of 1 to {presets.MAX_BATCH}.", param, ctx)
            if not 0 <= first <= 2**64 - count:
                self.fail(f"{part!r} is not in the range 0<=x<={2**64 - 1}.", param, ctx)
            seeds += range(first, first + count)
        if not 1 <= len(seeds) <= presets.MAX_BATCH:
            self.fail(f"{value!r} lists {len(seeds)} seeds, not 1 to {presets.MAX_BATCH}.", param, ctx)
        return tuple(seeds)


IN_TERMINAL = "terminal"  # where --preview shows a picture if no file is named
_PICTURE_FILE = re.compile(rf".+\.(png|jpe?g|webp)|{IN_TERMINAL}", re.I)


class SeveralSeeds(click.Command):
    """A command whose --seed takes all the numbers that follow it, and whose --preview may do without a value."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Joins them to the one value that click reads."""
        joined: list[str] = []
        place = None  # where the value of --seed stands in `joined`
        for i, arg in enumerate(args):
            if arg == "--":
                joined += args[i:]
                break
            if place is not None and place < len(joined) and _SEED.fullmatch(arg):
                joined[place] += f" {arg}"
                continue
            if arg == "--preview" and not _PICTURE_FILE.fullmatch("".join(args[i + 1 : i + 2])):
                arg = f"--preview={IN_TERMINAL}"
            if place is None or place < len(joined):
                place = len(joined) + 1 if arg == "--seed" else len(joined) if arg.startswith("--seed=") else None
            joined.append(arg)
        return super().parse_args(ctx, joined)


USUAL: dict[str, object] = {}  # by option: what holds where nobody says otherwise and the model has no word in it


def _option(*names: str, help: str, usual=None, **settings) -> click.Option:
    option = click.Option(names, help=help if usual is None else f"{help}  [default: {usual}]", **settings)
    if usual is not None and not str(usual).startswith("the "):
        USUAL[option.name] = usual
    return option


def _installed(ctx, param, incomplete: str) -> list[str]:
    """For the shell's completion: the names of installed models."""
    from mlx_flux_krea.home import installed_models

    return [name for name in installed_models() if name.startswith(incomplete)]


_FILE = click.Path(path_type=Path)
_SIDE = click.IntRange(1, presets.MAX_SIDE)
_SCALE = click.FloatRange(0, presets.MAX_SCALE)
_BATCH = click.IntRange(1, presets.MAX_BATCH)
_STEPS = click.IntRange(1, presets.MAX_STEPS)
_AREA = click.FloatRange(*presets.MEGAPIXELS)
_DTYPE = click.Choice(["bfloat16", "float16", "float32"])
_METADATA = click.Choice(["full", "minimal"])
_CHECK = click.Choice(["filters", "review", "both"])
_ONE = "the only one, or models default"
_MODEL = "the model's"
OPTIONS = [
    _option(
        "-m", "--model", help="A model folder, or the name of an installed one.", usual=_ONE, shell_complete=_installed
    ),
    _option("-o", "--output", type=_FILE, help="PNG, JPEG or WebP; takes {seed}, {n}, {prompt}.", usual="out.png"),
    _option("--prompts", type=_FILE, help="A file: a prompt a line; or CSV or JSONL, with any option per row."),
    _option("--width", type=_SIDE, help="Pixels, a multiple of 16.", usual=_MODEL),
    _option("--height", type=_SIDE, help="Pixels, a multiple of 16.", usual=_MODEL),
    _option("--aspect", type=click.Choice(list(presets.ASPECTS)), help="The shape, instead of width and height."),
    _option("--megapixels", type=_AREA, help="The area that goes with it.", usual=1),
    _option("--steps", type=_STEPS, help="Number of steps.", usual=_MODEL),
    _option("--guidance", type=_SCALE, help="How closely to follow the prompt.", usual=_MODEL),
    _option("--seed", type=Seeds(), metavar="N...", help="1, or 1 2 3, or 7+4: four from 7 on.  [default: a new one]"),
    _option("-n", "--num-images", type=_BATCH, help="With seeds that count up.", usual=1),
    _option("--contact-sheet", is_flag=True, help="All pictures as one besides, a row for each prompt."),
    _option("--like", type=click.Choice(list(presets.TOOLS)), help="What that tool does where you say nothing."),
    _option("--from", "from_", type=_FILE, help="A picture made here, to be made again; options beside it change it."),
    _option("--noise", help=f"Whose seed: {', '.join(presets.RECIPES)}.", usual="diffusers"),
    _option("--negative-prompt", help="What to move away from; needs --true-cfg-scale."),
    _option("--true-cfg-scale", type=_SCALE, help="Above 1: doubles the time of a step.", usual=1),
    _option("--image", type=_FILE, help="An image to start from."),
    _option("--strength", type=click.FloatRange(0, 1), help="How far to go from the image.", usual=presets.STRENGTH),
    _option("--dtype", type=_DTYPE, help="To compute in.", usual=_MODEL),
    _option("--memory", help="What may be used, such as 8GB; the rest is read as it is needed.", usual="auto"),
    _option("--quality", type=click.IntRange(1, 100), help="Of JPEG and WebP.", usual=95),
    _option(
        "--metadata",
        type=_METADATA,
        help="What the file tells: all that made it, or only that an AI did.",
        usual="full",
    ),
    _option("--check", type=_CHECK, help="Who looks first; review: you do.  [default: filters, if the licence asks]"),
    _option("--nsfw-threshold", type=click.FloatRange(0, 0.85), help="A picture passes below it.", usual=0.85),
    _option("--integrity-margin", type=_SCALE, help="How clear the filter's no must be.", usual=0),
    _option("--preview", metavar="[FILE]", help="Show each step in the terminal (iTerm2, kitty), or in this file."),
    _option("-v", "--verbose", is_flag=True, help="Show what each stage took of time and memory."),
    _option("--force", is_flag=True, help="Replace the output, also a link; otherwise the next free name is taken."),
    _option("--json", "as_json", is_flag=True, help="Print a JSON object instead of paths, and what happens as JSON."),
]
BY_NAME = {option.name: option for option in OPTIONS} | {"prompt": _option("--prompt", help="What to draw.")}
_POLICY = ("check", "nsfw_threshold", "integrity_margin")
_LASTING = ("model", "dtype", "memory", "contact_sheet", "preview", "verbose", *_POLICY)
_RUN = (*_LASTING, "prompts", "from_", "force", "as_json")  # of a whole run
PER_PICTURE = tuple(name for name in BY_NAME if name not in _RUN)
LASTING = (*_LASTING, *(name for name in PER_PICTURE if name != "prompt"))  # in the config file

# What an option takes the place of, where it was said nearer to the picture: file before row, config before command.
_SIZE = ("width", "height", "aspect", "megapixels")
REPLACES = {
    "width": ("aspect", "megapixels", "tiled"),
    "height": ("aspect", "megapixels", "tiled"),
    "aspect": ("width", "height", "tiled"),
    "megapixels": ("width", "height", "tiled"),
    "steps": ("sigmas",),
    "prompt": ("prompt_2",),
    "negative_prompt": ("negative_prompt_2",),
    "seed": ("batch", "image_seed"),
    "like": (*_SIZE, "steps", "sigmas", "guidance", "noise", "max_sequence_length"),
}
EXCLUSIVE = [(side, other) for side in ("width", "height") for other in ("aspect", "megapixels")]
EXCLUSIVE += [("like", "from_"), ("prompt", "prompts")]


def spelled(name: str) -> str:
    """An option as the user writes it."""
    return "PROMPT" if name == "prompt" else BY_NAME[name].opts[-1]


def said(options: dict) -> tuple[dict, bool, bool]:
    """The options of a command that somebody gave, without --force and --json, which are told apart.

    Raises:
        UsageError: two of them exclude each other.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    force, as_json = given.pop("force", False), given.pop("as_json", False)
    check_together(given)
    return given, force, as_json


def check_together(options: dict) -> None:
    """Refuses options of one command or one row that exclude each other.

    Raises:
        UsageError: two of them do.
    """
    for one, other in EXCLUSIVE:
        if one in options and other in options:
            raise UsageError(f"{spelled(one)} and {spelled(other)} are both given", "one of them")
    if options.get("num_images", 1) > 1 and len(options.get("seed", ())) > 1:
        raise UsageError(f"--num-images beside {len(options['seed'])} seeds", "one of them")


def cast(name: str, value, allowed: tuple[str, ...]) -> tuple[str, object]:
    """An option from a file: its name as the code knows it, and its value as the command line would give it.

    Args:
        name: with dashes or underscores, with or without dashes in front.
        value: a text, a number or a boolean; of `seed` also a list.
        allowed: the names that may stand there.

    Raises:
        UsageError: no such option, or a value that it does not take.
    """
    found = str(name).strip().lstrip("-").replace("-", "_").lower()
    if found not in allowed:
        near = difflib.get_close_matches(found, allowed, 1)
        todo = f"did you mean {near[0]}?" if near else f"one of {', '.join(allowed)}"
        raise UsageError(f"there is no option {name!r} here", "", todo)
    if found == "seed" and isinstance(value, list):
        value = " ".join(map(str, value))
    if not isinstance(value, str | int | float):
        raise UsageError(f"{found} is {type(value).__name__}", "a text or a number")
    option = BY_NAME[found]
    try:
        return found, option.type.convert(str(value), option, None)
    except click.BadParameter as error:
        raise UsageError(f"{found}: {error.message.rstrip('.')}") from None
