"""flux-krea generate: pictures from prompts."""

import sys

import click

from mlx_flux_krea import presets
from mlx_flux_krea.errors import UsageError

from .shared import settings
from .shared.generation import Generation, over_config
from .shared.options import OPTIONS, GeneratingCommand, given_options
from .shared.terminal import Console


@click.command(cls=GeneratingCommand, params=[click.Argument(["prompt"], required=False), *OPTIONS])
def generate(**options):
    """Generate pictures from PROMPT.

    A PROMPT of - is read from standard input. {a|b} in a prompt generates a picture of each alternative.

    With --json, standard error is a stream of events, one JSON object a line: "said", "skipped", "progress", "picture".
    Only a final error is a plain line.

    \b
    Examples:
      flux-krea generate "a frog holding a sign" --seed 7 -o frog.png
      flux-krea generate "a {red|green} ring" -m nano --seed 1 2 --contact-sheet
    """
    given, force, as_json = given_options(options)
    if given.get("prompt") == "-":
        given["prompt"] = _standard_input()
    base = over_config(settings.read_options(), given)
    Generation(Console(as_events=as_json), as_json=as_json).run_options(base, given, force)


def _standard_input() -> str:
    try:
        data = sys.stdin.buffer.read(presets.MAX_PROMPT + 1)
        if len(data) > presets.MAX_PROMPT:
            raise UsageError("standard input is too long", f"a prompt of {presets.MAX_PROMPT} bytes at most")
        return data.decode("utf-8-sig").strip()
    except (AttributeError, OSError, UnicodeDecodeError):
        raise UsageError("standard input is not UTF-8 text", "a prompt") from None
