"""flux-krea bench: the speed of this machine with a model, as a block to share."""

import click

from mlx_flux_krea import FluxPipeline, __version__, macos
from mlx_flux_krea.disks import remember_speed
from mlx_flux_krea.errors import UsageError

from .shared import choosing, estimates, measuring
from .shared.estimates import device, this_chip
from .shared.measuring import StepBench
from .shared.options import DTYPE, MODEL_DEFAULT, MODEL_HELP, SIDE
from .shared.terminal import Console
from .shared.text import duration, json_text

_STEPS = 3
_RUNS = 7  # of so many steps: three types, resident and streamed, and the first one's second picture
SHARE = "https://github.com/mlx-flux-krea/mlx-flux-krea/issues/new?template=numbers.yml"


@click.command()
@click.option("-m", "--model", help=f"{MODEL_HELP}  [default: {MODEL_DEFAULT}]")
@click.option("--width", type=SIDE, help="Width in pixels.  [default: the model's]")
@click.option("--height", type=SIDE, help="Height in pixels.  [default: the model's]")
@click.option(
    "--steps",
    type=click.IntRange(2, 100),
    help=f"Number of steps of a run; the first also loads the weights.  [default: {_STEPS}]",
)
@click.option("--fast", is_flag=True, help="Choose what --fast does with this model: 8 runs at 512 x 512, resumable.")
@click.option(
    "--memory",
    default="auto",
    show_default=True,
    help="Memory for this program (not the Mac's), such as 6GB: measure with that alone.",
)
@click.option("--dtype", type=DTYPE, help="Measure this compute type alone.  [default: all three]")
@click.option("--json", "as_json", is_flag=True, help="Print all measurements as JSON.")
def bench(model, width, height, steps, fast, memory, dtype, as_json):
    """Measure the speed of this machine.

    Measures a step in each compute type, with as many blocks in memory as fit and with all of them streamed from disk;
    a first and a second picture; and the filters, where they are installed. Pictures are discarded, so that no filter
    is needed. It prints a block for the issue template "Share your Mac's numbers", whose last line is a row of the
    README's table.

    --fast generates two pictures in several modes, compares their latents with those of the full run, and stores the
    nearest mode that computes at most two thirds of the steps. It says first how long that takes. After Ctrl-C, the
    same command continues.

    \b
    Examples:
      flux-krea bench -m krea
      flux-krea bench -m krea --dtype bfloat16 --steps 5
      flux-krea bench -m krea --fast
    """
    console = Console()
    if fast:
        if given := [name for name, value in (("width", width), ("height", height), ("steps", steps)) if value]:
            raise UsageError(f"--fast, and --{given[0]}", "one of them", "it takes the model's steps, at 512 x 512")
        with console.library_notes():
            _choose(model, dtype, memory=memory, as_json=as_json, console=console)
        return
    with console.library_notes(), macos.awake():
        measured = StepBench(model, (width, height), steps or _STEPS, console)
        remember_speed(measured.pipe.folder.path)
        _say_duration(measured, dtype, memory)
        facts = measuring.measure_model(measured, dtype, memory)
        filters, in_words = measuring.filter_facts(measured.shape, console)
    if as_json:
        click.echo(json_text(facts | {"filters": filters}))
    else:
        click.echo(measuring.block(facts, in_words))
    _conclude(facts, console)


def _say_duration(measured: StepBench, dtype: str | None, memory: str) -> None:
    """Says about how long the measurements take, where the speed of the chip is known."""
    chip, runs = this_chip(), 2 if dtype or memory != "auto" else _RUNS
    if chip is None:
        return
    index, (width, height) = measured.pipe.folder.index, measured.shape
    step = estimates.step_seconds(
        measured.pipe.folder.flux.sizes, width=width, height=height, length=index.max_sequence_length, chip=chip
    )
    about = duration(step * runs * measured.steps)
    measured.console.say(f"takes about {about} at {estimates.SHARE_IN_WORDS}; fewer: --dtype, --memory, --steps 2")


def _conclude(facts: dict, console: Console) -> None:
    """Says which 16-bit type is the better one here, and where to share the numbers."""
    if facts["wanting"]:
        console.say(f"note: {facts['wanting']}")
    first = facts["measured"][0]["way"]
    halves = {one["dtype"]: one["seconds"] for one in facts["measured"] if one["way"] == first}
    if estimates.has_fast_halves() and {"bfloat16", "float16"} <= halves.keys():
        console.say(estimates.recommendation(halves["bfloat16"], halves["float16"]))
    console.say(f"to share these numbers: {SHARE}")


def _choose(model: str | None, dtype: str | None, *, memory: str, as_json: bool, console: Console) -> None:
    """Chooses the mode of --fast for a model, after the speed of a step was measured."""
    pipe = FluxPipeline.from_pretrained(model, dtype=dtype, memory=memory)
    choosing.check_choice(pipe)
    one = StepBench(model, choosing.shape_of(pipe), 3, console)
    _, seconds = one.generate(pipe, 0, output_type="latent")
    facts = choosing.choose(pipe, seconds, console) | {"device": device(), "version": __version__}
    click.echo(json_text(facts) if as_json else choosing.shown(facts))
